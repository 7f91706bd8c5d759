"""The whole road in minutes on two CPU cores: heads -> avatars -> tokens -> corpus -> training -> new point clouds.

    python -m training.demo --output_dir outputs/demo        # what `make demo` runs

Each step is a command of the toolkit, printed before it runs, so it can be repeated with other settings. At the end the model
writes clouds for held-out subjects from their portraits and head meshes alone; `report.json` says how close each is to its own
subject's true cloud and to the other subjects' (chamfer distance), and `pictures/` shows them.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from gaussian_tokenizer.atomic import atomic_file
from gaussian_tokenizer.corpus import Corpus, load_corpus
from gaussian_tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistForCausalLM
from modeling.point_pictures import draw_comparison
from training.arguments import exit_on_user_error
from training.metrics import slot_metrics, slot_sums
from training.windows import AvatarRows, EvaluationWindows, collate_windows

# A point sampled too high skips all that would have come before it, and the sorted order never goes back: prefer likely tokens.
SAMPLING = dict(temperature=0.7, top_p=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument(
        "--head", default="procedural:600", help="head model of the subjects: procedural:N, a file, an ICT folder"
    )
    parser.add_argument("--num_subjects", type=int, default=272)
    parser.add_argument("--num_points", type=int, default=160, help="points of an average subject, about")
    parser.add_argument("--identity_scale", type=float, default=2.5, help="how much heads differ; 1 is a crowd's")
    parser.add_argument("--num_heldout", type=int, default=16, help="of them, kept from training")
    parser.add_argument("--num_generated", type=int, default=8, help="held-out subjects to generate")
    parser.add_argument("--config", default="training/configs/demo.yaml", help="of training/pretrain.py")
    parser.add_argument("--n_bins", type=int, default=128, help="quantisation levels an axis (the paper: 1,024)")
    parser.add_argument("--image_size", type=int, default=112, help="pixels of a portrait, a multiple of 14")
    parser.add_argument("--seed", type=int, default=0)
    arguments, training = parser.parse_known_args()
    if arguments.num_heldout < 2:
        raise ValueError(f"--num_heldout must be at least 2, found {arguments.num_heldout}: one subject has no others")
    begin = time.perf_counter()
    output, processes = arguments.output_dir, str(os.cpu_count() or 1)
    # Waiting threads sleep instead of spinning: on a machine that does something else too, training is then several times faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    shutil.rmtree(output, ignore_errors=True)

    run("1/4 synthetic subjects", [
        sys.executable, "-m", "gaussian_tokenizer.synthesize", "--num_subjects", str(arguments.num_subjects),
        "--num_points", str(arguments.num_points), "--identity_scale", str(arguments.identity_scale),
        "--head", arguments.head, "--image_size", str(arguments.image_size), "--seed", str(arguments.seed),
        "--output", str(output / "avatars"), "--num_proc", processes,
    ])  # fmt: skip
    run("2/4 corpus", [
        sys.executable, "-m", "gaussian_tokenizer.build_corpus", "--avatars", str(output / "avatars"), "--head", arguments.head,
        "--n_bins", str(arguments.n_bins), "--image_size", str(arguments.image_size), "--num_proc", processes,
        "--num_validation", str(arguments.num_heldout), "--output", str(output / "corpus"),
    ])  # fmt: skip
    run("3/4 training", [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "training/pretrain.py", arguments.config,
        "--corpus", str(output / "corpus"), "--output_dir", str(output / "model"), "--seed", str(arguments.seed), *training,
    ])  # fmt: skip
    announce("4/4 new point clouds for held-out subjects")
    model = PointillistForCausalLM.from_pretrained(output / "model").eval()
    corpus = load_corpus(output / "corpus")
    generated = generate(model, corpus, arguments.num_generated, arguments.seed, output / "pictures")

    report = json.loads((output / "model" / "training_report.json").read_text())
    own, others = (np.mean([g[key] for g in generated]) for key in ("chamfer_own", "chamfer_others"))
    report["heldout_nll_other_condition"] = nll_of_another(model, corpus)
    report.update(
        generated=generated,
        mean_chamfer_own=float(own),
        mean_chamfer_others=float(others),
        closest_is_own=float(np.mean([g["closest_is_own"] for g in generated])),
        seconds=round(time.perf_counter() - begin, 1),
    )
    with atomic_file(output / "report.json") as file:
        file.write(json.dumps(report, indent=2).encode())
    print(
        f"\nheld-out NLL {report['heldout_nll']:.3f} nats a token, with another subject's portrait and mesh "
        f"{report['heldout_nll_other_condition']:.3f} (unigram {report['unigram_nll']:.3f}, uniform "
        f"{report['uniform_nll']:.3f}); invalid tokens {sum(g['invalid_tokens'] for g in generated)}; mean chamfer distance to "
        f"the own subject {own * 1000:.2f} mm, to the others {others * 1000:.2f} mm; {report['seconds'] / 60:.1f} minutes\n"
        f"look at {output / 'pictures' / 'generated.png'}; figures in {output / 'report.json'}"
    )


def announce(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def run(title: str, command: list[str]) -> None:
    """Run one command of the toolkit, its output passing through."""
    announce(title)
    shown = {command[0]: Path(command[0]).name, sys.executable: "python"}
    print("$", shlex.join([shown.get(part, part) for part in command]), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"error: the step {title!r} failed; its message is above")


def generate(model: PointillistForCausalLM, corpus: Corpus, count: int, seed: int, pictures: Path) -> list[dict]:
    """Clouds for the first `count` held-out subjects, judged against the true ones and drawn beside them."""
    tokenizer, config = corpus.tokenizer, model.config
    rows = AvatarRows(corpus, "validation", config.use_vision_encoder, config.use_point_encoder)
    count = min(count, len(rows))
    conditions = [rows.condition(row, None) for row in range(count)]
    inputs = {name: torch.from_numpy(np.stack([c[name] for c in conditions])) for name in conditions[0]}
    longest = int(rows.lengths.max()) // 4
    set_seed(seed)
    torch.set_num_threads(1)  # matrices this small are multiplied faster by one thread than by two
    begin = time.perf_counter()
    sentences = model.generate(**inputs, max_points=2 * longest, max_points_per_face=15, progress=True, **SAMPLING)
    tokens = int((sentences < config.bos_token_id).sum())
    print(f"{tokens:,} tokens in {time.perf_counter() - begin:.1f} s", flush=True)

    truth = [tokenizer.decode(rows.sentence(row)) for row in range(len(rows))]
    results, drawn = [], []
    for row in range(count):
        points, invalid = judge(tokenizer, sentences[row].numpy())
        distances = np.array([chamfer(points["positions"], other["positions"]) for other in truth])
        avatar_id = str(rows.avatars[row]["avatar_id"])
        results.append(
            {
                "avatar_id": avatar_id,
                "num_points": len(points["faces"]),
                "num_points_true": len(truth[row]["faces"]),
                "invalid_tokens": invalid,
                "chamfer_own": float(distances[row]),
                "chamfer_others": float(np.delete(distances, row).mean()),
                "closest_is_own": bool(distances.argmin() == row),
            }
        )
        portrait = rows_portrait(corpus, avatar_id)
        drawn.append((avatar_id, portrait, {"true": truth[row]["positions"], "generated": points["positions"]}))
    pictures.mkdir(parents=True, exist_ok=True)
    draw_comparison(pictures / "generated.png", drawn)
    for name, *row in drawn:
        draw_comparison(pictures / f"{name}.png", [(name, *row)])
    return results


@torch.no_grad()
def nll_of_another(model: PointillistForCausalLM, corpus: Corpus) -> float:
    """Held-out NLL where each subject is read under the next one's condition: what the condition is worth."""
    config = model.config
    windows = EvaluationWindows(
        AvatarRows(corpus, "validation", config.use_vision_encoder, config.use_point_encoder), config.sliding_window
    )
    sums = torch.zeros(3, 4, dtype=torch.double)
    for i, (row, _, _) in enumerate(windows.items):
        item = windows[i] | windows.rows.condition((row + 1) % len(windows.rows), None)
        batch = collate_windows([item], config.pad_token_id)
        labels = batch.pop("labels")
        sums += slot_sums(model(**batch).logits, labels).sum(0)
    return slot_metrics(sums, "")["nll"]


def judge(tokenizer: GaussianTokenizer, ids: np.ndarray) -> tuple[dict, int]:
    """Points of a generated sentence, and how many of its tokens are not what the tokenizer would have written."""
    points = tokenizer.decode(ids, errors="truncate")
    invalid = int(points.pop("dropped"))
    if len(points["faces"]):
        again = tokenizer(points)["input_ids"].astype(np.int64)[: 1 + 4 * len(points["faces"])]
        invalid += int((ids[: len(again)] != again).sum())
    return points, invalid


def chamfer(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance in metres to the nearest point of the other cloud, averaged over both directions."""
    if not len(a) or not len(b):
        return float("inf")
    distances = torch.cdist(torch.from_numpy(a).double(), torch.from_numpy(b).double())
    return float(distances.min(1).values.mean() + distances.min(0).values.mean()) / 2


def rows_portrait(corpus: Corpus, avatar_id: str):
    """The first picture of a held-out subject."""
    return corpus.frames("validation")[corpus.frame_rows("validation")[avatar_id][0]]["image"]


if __name__ == "__main__":
    exit_on_user_error(main)
