"""The effect of the density constraint, 4 to 15 Gaussians on a face, on fits and on the point model.

    python benchmarks/density_constraint.py                 # about a quarter of an hour of one core
    python benchmarks/density_constraint.py --num_subjects 4 --num_heldout 1 --steps 60 --output_dir outputs/small_study

Two questions, each answered with and without the density constraint, all else equal.

1. Two synthetic subjects (1,500 faces, 128 pixels, nine cameras, the demo schedule): PSNR of a held-out camera and of held-out
   timesteps; the number of Gaussians, and of those on the fullest face.
2. Several smaller ones (600 faces, 64 pixels, a shorter schedule), as corpora with one tokenizer: the loss of a small point model
   on unseen subjects, after the same number of steps. Sequences differ in length, so nats per token do not compare: a denser cloud
   has more points, each with less information. Hence also nats per point and nats a subject.

Every step is a command of the toolkit, printed before it runs. Existing results are kept.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from report import markdown_table, write_report

from gaussian_tokenizer.captures.subject import find_subjects
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_file

HEADS = {"large": "procedural:1500", "several": "procedural:600"}  # the paper: 10,144 for 27,000 points
N_BINS = 128
WAYS = {"limited": "4 to 15", "free": "no limit"}  # name of a folder: points on a face
SHORT = {  # for images of 64 pixels
    "iterations": 240, "start_downscale": 2, "full_resolution_from": 120, "densify_until": 210, "densify_interval": 20,
}  # fmt: skip
MODEL = {
    "use_vision_encoder": "false", "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "sliding_window": 256,
    "per_device_train_batch_size": 4, "max_eval_avatars": 99, "num_threads": 1, "use_cpu": "true", "disable_tqdm": "true",
}  # fmt: skip
MAX_LOSS, MIN_PSNR = 0.5, 28.0  # dB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/density_constraint"))
    parser.add_argument("--num_large", type=int, default=2, help="subjects of the first question")
    parser.add_argument("--num_subjects", type=int, default=8, help="of the second question")
    parser.add_argument("--num_heldout", type=int, default=2, help="subjects kept from training")
    parser.add_argument("--steps", type=int, default=400, help="of the point model")
    parser.add_argument("--image", type=Path, default=Path("docs/images/density_constraint.png"))
    arguments = parser.parse_args()
    output = arguments.output_dir

    synthesize(output / "large", HEADS["large"], arguments.num_large, image_size=128, timesteps=6)
    synthesize(output / "several", HEADS["several"], arguments.num_subjects, image_size=64, timesteps=4)
    for name, schedule in (("large", {}), ("several", SHORT)):
        for way in WAYS:
            limited = "true" if way == "limited" else "false"
            fit(output / name, HEADS[name], output / f"{name}-{way}", density_constraint=limited, **schedule)
    fits = [fit_row(name, way, output) for name in ("large", "several") for way in WAYS]

    tokenizer = shared_tokenizer(output)
    models = []
    for way in WAYS:
        build(output / f"several-{way}", tokenizer, arguments.num_heldout, output / f"corpus-{way}")
        pretrain(output / f"corpus-{way}", arguments.steps, output / f"model-{way}")
        models.append(model_row(way, output))
    draw(models, output, arguments.image)
    targets = judge(fits)
    print(markdown_table(fits), markdown_table(models), markdown_table(targets), sep="\n\n")
    path = write_report("density_constraint", fits, point_models=models, targets=targets, threads=1, n_bins=N_BINS)
    print(f"\nwritten: {path}, {arguments.image}")


# ---- the steps


def run(*words: object) -> None:
    print("$ python", shlex.join(map(str, words)), flush=True)
    subprocess.run([sys.executable, *map(str, words)], check=True)


def flags(**values: object) -> list[object]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def synthesize(folder: Path, head: str, count: int, image_size: int, timesteps: int) -> None:
    options = flags(
        num_subjects=count, views=9, timesteps=timesteps, image_size=image_size, head=head, output_dir=folder
    )
    run("-m", "gaussian_tokenizer.synthesize", "--plain", *options)


def fit(data: Path, head: str, output: Path, **settings: object) -> None:
    options = flags(data=data, head=head, output_dir=output, device="cpu", disable_tqdm="true", **settings)
    run("training/fit_avatars.py", "training/configs/fit_demo.yaml", *options)


def shared_tokenizer(output: Path) -> Path:
    """One box for the points of both variants, so that levels have the same size."""
    head = load_head(HEADS["several"])
    avatars = [subject.load_avatar(head) for way in WAYS for subject in find_subjects(output / f"several-{way}")]
    tokenizer = GaussianTokenizer(
        n_bins=N_BINS, n_faces=head.n_faces, image_size=56, head_name=head.name, head_hash=head.hash
    )
    tokenizer.fit(avatars, 0.0)
    tokenizer.save_pretrained(output / "tokenizer")
    return output / "tokenizer"


def build(avatars: Path, tokenizer: Path, num_heldout: int, corpus: Path) -> None:
    options = flags(
        avatars=avatars, head=HEADS["several"], tokenizer=tokenizer, num_validation=num_heldout, output_dir=corpus
    )
    run("-m", "gaussian_tokenizer.build_corpus", *options, "--overwrite")


def pretrain(corpus: Path, steps: int, output: Path) -> None:
    report = output / "training_report.json"
    if report.is_file() and json.loads(report.read_text())["steps"] == steps:
        return
    often = max(1, steps // 4)
    options = flags(corpus=corpus, output_dir=output, max_steps=steps, eval_steps=often, save_steps=steps, **MODEL)
    run("training/pretrain.py", "training/configs/demo.yaml", *options)


# ---- the figures


def reports(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/fit_report.json"))]


def fit_row(name: str, way: str, output: Path) -> dict:
    """Means over the subjects, the largest face of all of them."""
    found = reports(output / f"{name}-{way}")
    faces = [report["points_per_face"] for report in found]

    def mean(key: str) -> float:
        return float(np.mean([report[key] for report in found]))

    return {
        "subjects": len(found),
        "head": HEADS[name],
        "pixels": found[0]["image_size"][0],
        "on a face": WAYS[way],
        "PSNR camera": round(mean("psnr"), 2),
        "PSNR timesteps": round(mean("psnr_timesteps"), 2),
        "PSNR tokens": round(mean("psnr_tokenized"), 2),
        "SSIM camera": round(mean("ssim"), 3),
        "points": round(mean("num_points")),
        "fullest face": max(face["max"] for face in faces),
        "empty faces": round(float(np.mean([face["share_empty"] for face in faces])), 3),
        "CPU seconds": round(float(np.mean([report["seconds"]["cpu"] for report in found]))),
    }


def model_row(way: str, output: Path) -> dict:
    report = json.loads((output / f"model-{way}" / "training_report.json").read_text())
    points, subjects, tokens = held_out(output / f"corpus-{way}")
    nats = report["heldout_nll"] * tokens
    return {
        "on a face": WAYS[way],
        "steps": report["steps"],
        "parameters": report["num_parameters"],
        "held-out points a subject": round(points / subjects),
        "nats per token": report["heldout_nll"],
        "unigram": report["unigram_nll"],
        **{f"nats {slot}": report[f"heldout_nll_{slot}"] for slot in ("x", "y", "z", "face")},
        "nats per point": nats / points,
        "nats a subject": round(nats / subjects),
    }


def held_out(corpus: Path) -> tuple[int, int, int]:
    """Points, subjects and tokens (end tokens counted, first ones not) of the held-out split."""
    avatars = load_corpus(corpus).avatars("validation")
    points = sum(avatars["num_points"])
    return points, len(avatars), 4 * points + len(avatars)


def judge(fits: list[dict]) -> list[dict]:
    limited, free = fits[0], fits[1]
    loss = free["PSNR camera"] - limited["PSNR camera"]
    rows = [
        ("PSNR with the constraint, dB", limited["PSNR camera"], f">= {MIN_PSNR}", limited["PSNR camera"] >= MIN_PSNR),
        ("PSNR lost to the constraint, dB", loss, f"<= {MAX_LOSS}", loss <= MAX_LOSS),
        ("fullest face with it", limited["fullest face"], "<= 15", limited["fullest face"] <= 15),
        ("fullest face without it", free["fullest face"], ">= 60", free["fullest face"] >= 60),
    ]
    return [
        {"target": name, "measured": value, "wanted": wanted, "reached": reached}
        for name, value, wanted, reached in rows
    ]


def draw(models: list[dict], output: Path, path: Path) -> None:
    """Points on the faces of one subject, and the loss of the point models over their steps."""
    from matplotlib.figure import Figure

    colors = {"limited": "#3b6ea5", "free": "#c2703d"}
    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    histogram, points, subjects = figure.subplots(1, 3)
    for way in WAYS:
        report = reports(output / f"large-{way}")[0]
        counts = np.repeat(
            np.arange(len(report["points_per_face"]["histogram"])), report["points_per_face"]["histogram"]
        )
        shown = np.sort(counts)[::-1]
        label = f"{WAYS[way]}: {report['num_points']:,} points, {report['psnr']:.2f} dB"
        histogram.plot(np.arange(1, len(shown) + 1), shown, color=colors[way], label=label)
    histogram.set(xlabel="face, fullest first", ylabel="points on it", yscale="symlog", title="one subject, 128 pixels")
    for row, way in zip(models, WAYS):
        log = json.loads((output / f"model-{way}" / "training_log.json").read_text())
        evaluated = [(entry["step"], entry["eval_nll"]) for entry in log if "eval_nll" in entry]
        steps, nll = np.array(evaluated).T
        points.plot(
            steps, nll * row["nats per point"] / row["nats per token"], "o-", color=colors[way], label=WAYS[way]
        )
        subjects.plot(
            steps, nll * row["nats a subject"] / row["nats per token"] / 1000, "o-", color=colors[way], label=WAYS[way]
        )
    points.set(xlabel="step", ylabel="nats per point", title="point model, subjects not seen")
    subjects.set(xlabel="step", ylabel="thousand nats a subject", title="the same, whole sequences", ylim=(0, None))
    for axes in (histogram, points, subjects):
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
