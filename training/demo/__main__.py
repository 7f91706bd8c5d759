"""Everything in minutes on two CPU cores: subjects -> tokens -> corpus -> two trainings -> animated avatars of new subjects.

    python -m training.demo --output_dir outputs/demo        # what `make demo` runs

Each step is a command of the toolkit, printed before it runs. Then the models generate avatars of held-out subjects, which
`report.json` compares with the true ones and `images/` shows; `pipeline/` is a folder for `AvatarPipeline.from_pretrained`. The
last step is the reenactment bench, on subjects of another seed: `bench/`.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.corpus.corpus import Corpus, load_corpus
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.point_plots import draw_comparison
from gaussian_tokenizer.rendering.portrait_points import Portrait
from gaussian_tokenizer.synthetic.source import PLAIN
from gaussian_tokenizer.utils.atomic import atomic_file
from modeling import AvatarPipeline, GaussianDecoder, PointillistForCausalLM
from modeling.point_features import point_features
from training.common.arguments import exit_on_user_error
from training.common.model_card import hub_license
from training.decoder.subjects import SubjectRows, collate_subjects, mean_image_metrics, mean_images, portrait_of
from training.demo.report import (
    compare_points,
    draw_avatars,
    draw_motion,
    image_metrics,
    judge,
    nll_of_another,
    true_frames,
)

STEPS = 6
SHOWN = 8  # subjects in the images
BENCH_SEED = 77  # added to the seed of the training subjects


def main() -> None:
    arguments, training = parse_arguments()
    begin = time.perf_counter()
    output, seed = arguments.output_dir, arguments.seed
    # Waiting threads sleep instead of spinning, which makes training several times faster on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    shutil.rmtree(output, ignore_errors=True)
    # Two processes of one thread: two threads do not multiply matrices this small faster.
    launch = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    processes = os.cpu_count() or 1

    def same(*names: str) -> dict[str, object]:
        return {name: getattr(arguments, name) for name in names}

    def synthesize(**options: object) -> list[str]:
        subject = same("head", "num_points", "identity_scale", "min_points_per_face")
        options = subject | PLAIN | {"num_proc": processes, "placement": "regular"} | options
        return [sys.executable, "-m", "gaussian_tokenizer.synthesize", *flags(**options)]

    captured = same("num_subjects", "views", "timesteps", "image_size", "seed")
    run(1, "synthetic subjects", synthesize(**captured, output_dir=output / "avatars"))
    run(2, "corpus", [sys.executable, "-m", "gaussian_tokenizer.build_corpus", *flags(
        avatars=output / "avatars", **same("head", "n_bins", "token_order", "image_size"),
        num_proc=processes, num_validation=arguments.num_heldout, output_dir=output / "corpus",
    )])  # fmt: skip
    run(3, "training of the point model", [
        *launch, "-m", "training.pretrain", arguments.config,
        *flags(corpus=output / "corpus", output_dir=output / "model", seed=seed), *training,
    ])  # fmt: skip
    run(4, "training of the Gaussian decoder", [
        *launch, "-m", "training.train_gaussian_decoder", arguments.decoder_config, *flags(
            point_model=output / "model", corpus=output / "corpus", head=arguments.head, output_dir=output / "decoder",
            feature_cache=output / "features", seed=seed,
        ), *(flags(max_steps=arguments.decoder_steps) if arguments.decoder_steps else []),
    ])  # fmt: skip
    announce(5, "avatars of held-out subjects, from portrait and head mesh")
    report = evaluate(arguments)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    with atomic_file(output / "report.json") as file:
        file.write(json.dumps(report, indent=2).encode())
    print(summary(report, output))
    if arguments.num_bench:
        run(STEPS, "reenactment bench: subjects of the bench", synthesize(
            num_subjects=arguments.num_bench, views=4, timesteps=4, image_size=128, seed=seed + BENCH_SEED,
            output_dir=output / "bench_subjects",
        ))  # fmt: skip
        run(STEPS, "reenactment bench", [sys.executable, "-m", "eval.reenactment_bench", *flags(
            model=output / "pipeline", dataset=output / "bench_subjects", output_dir=output / "bench",
            max_points=4 * arguments.num_points,
        )])  # fmt: skip
    print(f"\nthe whole demo: {(time.perf_counter() - begin) / 60:.1f} minutes")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The demo's own arguments, and those that it passes on to the point model's training."""
    parser = argparse.ArgumentParser(
        prog="python -m training.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/demo"))
    add("--head", default="procedural:600", help="head model of the subjects: procedural:N, a file, an ICT folder")
    add("--num_subjects", type=int, default=400)
    add("--num_points", type=int, default=160, help="approximate points of an average subject")
    add("--min_points_per_face", type=int, default=1, help="on an occupied face (the paper: 4)")
    add("--identity_scale", type=float, default=2.5, help="spread of the head shapes; 1 is that of the shape prior")
    add("--views", type=int, default=3, help="cameras around a subject")
    add("--timesteps", type=int, default=2, help="timesteps of a subject: at rest, then expressions")
    add("--num_heldout", type=int, default=16, help="subjects kept from training")
    add("--num_generated", type=int, default=16, help="held-out subjects to generate avatars of")
    add("--config", default="training/configs/demo.yaml", help="of training/pretrain.py")
    add("--decoder_config", default="training/configs/decoder_demo.yaml", help="of training/train_gaussian_decoder.py")
    add("--decoder_steps", type=int, help="steps of the decoder's training; by default those of its config")
    add("--num_bench", type=int, default=8, help="subjects of the reenactment bench, 16 frames each; 0: no bench")
    add("--n_bins", type=int, default=128, help="quantization levels per axis (the paper: 1,024)")
    add("--token_order", default="xyzf", help="order of a point's tokens x, y, z and face (f)")
    add("--image_size", type=int, default=112, help="pixels of an image, a multiple of 14")
    add("--seed", type=int, default=0)
    arguments, training = parser.parse_known_args()
    if arguments.num_heldout < 2:
        raise ValueError(f"--num_heldout must be at least 2, found {arguments.num_heldout}: one subject has no others")
    return arguments, training


def flags(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def announce(number: int, title: str) -> None:
    print(f"\n=== {number}/{STEPS} {title}", flush=True)


def run(number: int, title: str, command: list[str]) -> None:
    """Run a command of the toolkit, its output passing through."""
    announce(number, title)
    shown = {command[0]: Path(command[0]).name, sys.executable: "python"}
    print("$", shlex.join([shown.get(part, part) for part in command]), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"error: the step {title!r} failed; its message is above")


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate avatars, save the pipeline; returns the content of `report.json`."""
    output = arguments.output_dir
    corpus = load_corpus(output / "corpus")
    pipeline = AvatarPipeline(
        corpus.tokenizer,
        PointillistForCausalLM.from_pretrained(output / "model"),
        GaussianDecoder.from_pretrained(output / "decoder"),
        load_head(arguments.head),
    )
    report = json.loads((output / "model" / "training_report.json").read_text())
    report["decoder"] = json.loads((output / "decoder" / "training_report.json").read_text())
    report |= generate(pipeline, corpus, arguments.num_generated, arguments.seed, output)
    images = [output / "images" / "avatars.png"]
    pipeline.save_pretrained(output / "pipeline", images=images, license=hub_license(corpus))
    return report


def summary(report: dict[str, Any], output: Path) -> str:
    own, others = report["mean_chamfer_own"] * 1000, report["mean_chamfer_others"] * 1000
    return (
        f"\npoints: held-out NLL {report['heldout_nll']:.3f} nats per token, with another subject's portrait and mesh "
        f"{report['heldout_nll_other_condition']:.3f} (unigram {report['unigram_nll']:.3f}, uniform "
        f"{report['uniform_nll']:.3f}); invalid tokens {sum(g['invalid_tokens'] for g in report['generated'])}; mean chamfer "
        f"distance to the same subject {own:.2f} mm, to the others {others:.2f} mm\n"
        f"images: PSNR {report['psnr_heldout']:.2f} dB from the portrait, {report['psnr_reencoded']:.2f} dB on the true points, "
        f"mean image {report['psnr_mean_image']:.2f} dB; {report['seconds'] / 60:.1f} minutes\n"
        f"see {output / 'images' / 'avatars.png'}, motion.gif and generated.png; all results are in {output / 'report.json'}"
    )


def generate(pipeline: AvatarPipeline, corpus: Corpus, count: int, seed: int, output: Path) -> dict[str, Any]:
    """Avatars of the first `count` held-out subjects, compared with the true ones and drawn; entries of the report."""
    reads = pipeline.gaussian_decoder.config.read_portrait
    subjects = SubjectRows(corpus, "validation", pipeline.point_model.input_names, None, reads)
    rows = range(min(count, len(subjects)))
    items = [subjects.subject(row, None) for row in rows]
    params = [shape_parameters(pipeline, item["shape"]) for item in items]
    read = [portrait_of(collate_subjects([item], 0), 0) if reads else None for item in items]
    portraits = [subjects.frames[subjects.frame_rows(row)[0]]["image"] for row in rows]
    max_points = 2 * (int(subjects.rows.lengths.max()) // 4)
    torch.set_num_threads(1)  # one thread multiplies matrices this small faster than two
    begin = time.perf_counter()
    inputs = pipeline.inputs(portraits, params)
    generated = pipeline.generate(inputs, seed=seed, max_points=max_points, max_points_per_face=15, progress=True)
    tokens = int((generated.sequences < pipeline.tokenizer.bos_token_id).sum())
    print(f"{tokens:,} tokens in {time.perf_counter() - begin:.1f} s", flush=True)

    truth = [pipeline.tokenizer.decode(subjects.rows.sequence(row)) for row in range(len(subjects))]
    means = mean_images(SubjectRows(corpus, "train"))
    results, clouds, avatars = [], [], []
    for row, features in zip(rows, pipeline.decode_points(generated)[1]):
        avatar_id = subjects.rows.ids[row]
        points, invalid = judge(pipeline.tokenizer, generated.sequences[row].numpy())
        avatar = pipeline.decode_attributes(points, features, inputs["pixel_values"][row], params[row], read[row])
        avatar.save(output / "generated" / avatar_id)
        frames = true_frames(subjects, row)
        mean_psnr, mean_ssim = mean_image_metrics(means, subjects, list(subjects.frame_rows(row)))
        limit = reencoded(pipeline, subjects, row, inputs, params[row], read[row])  # what perfect points would give
        images = {"heldout": image_metrics(avatar, frames), "reencoded": image_metrics(limit, frames)}
        images["mean_image"] = (float(mean_psnr.mean()), float(mean_ssim.mean()))
        results.append(
            {"avatar_id": avatar_id, **compare_points(points, invalid, truth, row)}
            | {f"{metric}_{name}": images[name][i] for i, metric in enumerate(("psnr", "ssim")) for name in images}
        )
        clouds.append((avatar_id, portraits[row], {"true": truth[row]["positions"], "generated": points["positions"]}))
        avatars.append((avatar_id, portraits[row], avatar))
    (output / "images").mkdir(parents=True, exist_ok=True)
    draw_comparison(output / "images" / "generated.png", clouds[:SHOWN])
    draw_avatars(output / "images" / "avatars.png", avatars[:SHOWN])
    draw_motion(output / "images" / "motion.gif", avatars)
    portraits[0].save(output / "portrait.png")  # for the examples of the README

    averages = {key: float(np.mean([result[key] for result in results])) for key in results[0] if key != "avatar_id"}
    return {
        "generated": results,
        "mean_chamfer_own": averages["chamfer_own"],
        "mean_chamfer_others": averages["chamfer_others"],
        "closest_is_own": averages["closest_is_own"],
        "heldout_nll_other_condition": nll_of_another(pipeline.point_model, subjects.rows),
        **{key: value for key, value in averages.items() if key.startswith(("psnr_", "ssim_"))},
    }


def shape_parameters(pipeline: AvatarPipeline, shape: np.ndarray) -> HeadParameters:
    """The head parameters that a tracker would find for a portrait: here the true shape."""
    zeros = HeadParameters.zeros(pipeline.head.n_shape, pipeline.head.n_expression)
    zeros.shape.copy_(torch.from_numpy(shape))
    return zeros


def reencoded(
    pipeline: AvatarPipeline,
    subjects: SubjectRows,
    row: int,
    inputs: dict[str, Tensor],
    params: HeadParameters,
    read: Portrait | None = None,
) -> GaussianAvatar:
    """The avatar that the decoder makes of a subject's true points."""
    ids = torch.from_numpy(subjects.rows.sequence(row))[None]
    condition = pipeline.point_model.select_inputs({name: value[row : row + 1] for name, value in inputs.items()})
    features = point_features(pipeline.point_model, ids, **condition)[0]
    points, pixels = pipeline.tokenizer.decode(ids[0]), inputs["pixel_values"][row]
    return pipeline.decode_attributes(points, features, pixels, params, read)


if __name__ == "__main__":
    exit_on_user_error(main)
