"""The whole road in minutes on two CPU cores: subjects -> tokens -> corpus -> two trainings -> new avatars that move.

    python -m training.demo --output_dir outputs/demo        # what `make demo` runs

Each step is a command of the toolkit, printed before it runs, so it can be repeated with other settings. Then the models
make avatars of held-out subjects from their portraits and head meshes alone. `report.json` says how close their points are to the
true ones (chamfer distance) and their images to the true frames (PSNR, SSIM), `images/` shows them, `pipeline/` holds the
four components for `AvatarPipeline.from_pretrained`. Last comes the reenactment bench, on subjects of another seed: `bench/`.
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

from gaussian_tokenizer.corpus.corpus import Corpus, load_corpus
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.point_plots import draw_comparison
from gaussian_tokenizer.utils.atomic import atomic_file
from modeling import AvatarPipeline, GaussianDecoder, PointillistForCausalLM
from modeling.point_features import point_features
from training.common.arguments import exit_on_user_error
from training.common.model_card import hub_license
from training.decoder.subjects import SubjectRows, mean_images
from training.demo.report import (
    chamfer,
    draw_avatars,
    draw_motion,
    image_metrics,
    judge,
    mean_image_metrics,
    nll_of_another,
    true_frames,
)

STEPS = 6
SHOWN = 8  # subjects in the images
BENCH_SEED = 77  # more than that of the training: other subjects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument(
        "--head", default="procedural:600", help="head model of the subjects: procedural:N, a file, an ICT folder"
    )
    parser.add_argument("--num_subjects", type=int, default=400)
    parser.add_argument("--num_points", type=int, default=160, help="points of an average subject, about")
    parser.add_argument("--min_points_per_face", type=int, default=1, help="on an occupied face (the paper: 4)")
    parser.add_argument("--identity_scale", type=float, default=2.5, help="how much heads differ; 1 is a crowd's")
    parser.add_argument("--views", type=int, default=3, help="cameras around a subject")
    parser.add_argument("--timesteps", type=int, default=2, help="moments of a subject: at rest, then expressions")
    parser.add_argument("--num_heldout", type=int, default=16, help="of them, kept from training")
    parser.add_argument("--num_generated", type=int, default=16, help="held-out subjects to make avatars of")
    parser.add_argument("--config", default="demo", help="config of the point model's training")
    parser.add_argument("--decoder_config", default="decoder_demo", help="config of the decoder's training")
    parser.add_argument("--decoder_steps", type=int, help="steps of the decoder's training, if not those of its config")
    parser.add_argument(
        "--num_bench", type=int, default=8, help="subjects of the reenactment bench, 16 frames each; 0: no bench"
    )
    parser.add_argument("--n_bins", type=int, default=128, help="quantization levels an axis (the paper: 1,024)")
    parser.add_argument("--image_size", type=int, default=112, help="pixels of an image, a multiple of 14")
    parser.add_argument("--seed", type=int, default=0)
    arguments, training = parser.parse_known_args()
    if arguments.num_heldout < 2:
        raise ValueError(f"--num_heldout must be at least 2, found {arguments.num_heldout}: one subject has no others")
    begin = time.perf_counter()
    output, processes = arguments.output_dir, str(os.cpu_count() or 1)
    # Waiting threads sleep instead of spinning: on a machine that does something else too, training is then several times faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    shutil.rmtree(output, ignore_errors=True)
    # Two processes of one thread: matrices this small are not multiplied faster by two threads.
    launch = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]

    subjects = [
        sys.executable, "-m", "gaussian_tokenizer.synthesize", "--head", arguments.head, "--num_points", str(arguments.num_points),
        "--identity_scale", str(arguments.identity_scale), "--min_points_per_face", str(arguments.min_points_per_face),
        "--num_proc", processes,
    ]  # fmt: skip
    run(1, "synthetic subjects", [
        *subjects, "--num_subjects", str(arguments.num_subjects), "--views", str(arguments.views), "--timesteps",
        str(arguments.timesteps), "--image_size", str(arguments.image_size), "--seed", str(arguments.seed),
        "--output_dir", str(output / "avatars"),
    ])  # fmt: skip
    run(2, "corpus", [
        sys.executable, "-m", "gaussian_tokenizer.build_corpus", "--avatars", str(output / "avatars"), "--head", arguments.head,
        "--n_bins", str(arguments.n_bins), "--image_size", str(arguments.image_size), "--num_proc", processes,
        "--num_validation", str(arguments.num_heldout), "--output_dir", str(output / "corpus"),
    ])  # fmt: skip
    run(3, "training of the point model", [
        *launch, "-m", "training.pretrain", arguments.config,
        "--corpus", str(output / "corpus"), "--output_dir", str(output / "model"), "--seed", str(arguments.seed), *training,
    ])  # fmt: skip
    run(4, "training of the Gaussian decoder", [
        *launch, "-m", "training.train_gaussian_decoder", arguments.decoder_config, "--point_model", str(output / "model"),
        "--corpus", str(output / "corpus"), "--head", arguments.head, "--output_dir", str(output / "decoder"),
        "--feature_cache", str(output / "features"), "--seed", str(arguments.seed),
        *(["--max_steps", str(arguments.decoder_steps)] if arguments.decoder_steps else []),
    ])  # fmt: skip
    announce(5, "avatars of held-out subjects, from portrait and head mesh")
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
    image = output / "images" / "avatars.png"
    pipeline.save_pretrained(output / "pipeline", images=[image], license=hub_license(corpus))
    report["seconds"] = round(time.perf_counter() - begin, 1)
    with atomic_file(output / "report.json") as file:
        file.write(json.dumps(report, indent=2).encode())
    own, others = report["mean_chamfer_own"] * 1000, report["mean_chamfer_others"] * 1000
    print(
        f"\npoints: held-out NLL {report['heldout_nll']:.3f} nats a token, with another subject's portrait and mesh "
        f"{report['heldout_nll_other_condition']:.3f} (unigram {report['unigram_nll']:.3f}, uniform "
        f"{report['uniform_nll']:.3f}); invalid tokens {sum(g['invalid_tokens'] for g in report['generated'])}; mean chamfer "
        f"distance to the own subject {own:.2f} mm, to the others {others:.2f} mm\n"
        f"images: PSNR {report['psnr_heldout']:.2f} dB from the portrait, {report['psnr_reencoded']:.2f} dB on the true points, "
        f"mean image {report['psnr_mean_image']:.2f} dB; {report['seconds'] / 60:.1f} minutes\n"
        f"look at {output / 'images' / 'avatars.png'}, motion.gif and generated.png; figures in {output / 'report.json'}"
    )
    if arguments.num_bench:
        run(STEPS, "reenactment bench: subjects of the bench", [
            *subjects, "--num_subjects", str(arguments.num_bench), "--views", "4", "--timesteps", "4", "--image_size", "128",
            "--seed", str(arguments.seed + BENCH_SEED), "--output_dir", str(output / "bench_subjects"),
        ])  # fmt: skip
        run(STEPS, "reenactment bench", [
            sys.executable, "-m", "eval.reenactment_bench", "--model", str(output / "pipeline"), "--dataset",
            str(output / "bench_subjects"), "--output_dir", str(output / "bench"), "--max_points", str(4 * arguments.num_points),
        ])  # fmt: skip
    print(f"\nthe whole demo: {(time.perf_counter() - begin) / 60:.1f} minutes")


def announce(number: int, title: str) -> None:
    print(f"\n=== {number}/{STEPS} {title}", flush=True)


def run(number: int, title: str, command: list[str]) -> None:
    """Run one command of the toolkit, its output passing through."""
    announce(number, title)
    shown = {command[0]: Path(command[0]).name, sys.executable: "python"}
    print("$", shlex.join([shown.get(part, part) for part in command]), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"error: the step {title!r} failed; its message is above")


def generate(pipeline: AvatarPipeline, corpus: Corpus, count: int, seed: int, output: Path) -> dict:
    """Avatars of the first `count` held-out subjects, judged against the true ones and drawn; entries of the report."""
    tokenizer, config = pipeline.tokenizer, pipeline.point_model.config
    subjects = SubjectRows(corpus, "validation", use_heads=config.use_point_encoder)
    count = min(count, len(subjects))
    entries = [subjects.subject(row, None) for row in range(count)]
    frames = [true_frames(subjects, row) for row in range(count)]
    params = [shape_parameters(pipeline, person) for person in entries]
    portraits = [subjects.frames[subjects.frame_rows(row)[0]]["image"] for row in range(count)]
    longest = int(subjects.rows.lengths.max()) // 4
    torch.set_num_threads(1)  # matrices this small are multiplied faster by one thread than by two
    begin = time.perf_counter()
    inputs = pipeline.inputs(portraits, params)
    written = pipeline.generate(inputs, seed=seed, max_points=2 * longest, max_points_per_face=15, progress=True)
    tokens = int((written.sequences < config.bos_token_id).sum())
    print(f"{tokens:,} tokens in {time.perf_counter() - begin:.1f} s", flush=True)

    truth = [tokenizer.decode(subjects.rows.sequence(row)) for row in range(len(subjects))]
    means = mean_images(SubjectRows(corpus, "train", use_heads=False))
    results, clouds, avatars = [], [], []
    for row, features in enumerate(pipeline.decode_points(written)[1]):
        points, invalid = judge(tokenizer, written.sequences[row].numpy())
        distances = np.array([chamfer(points["positions"], other["positions"]) for other in truth])
        avatar = pipeline.decode_attributes(points, features, inputs["pixel_values"][row], params[row])
        avatar_id = str(subjects.rows.avatars[row]["avatar_id"])
        avatar.save(output / "generated" / avatar_id)
        drawn = {
            "heldout": image_metrics(avatar, frames[row]),
            "reencoded": image_metrics(reencoded(pipeline, entries[row], inputs, row, params[row]), frames[row]),
            "mean_image": mean_image_metrics(means, subjects, row),
        }
        results.append(
            {
                "avatar_id": avatar_id,
                "num_points": len(points["faces"]),
                "num_points_true": len(truth[row]["faces"]),
                "invalid_tokens": invalid,
                "chamfer_own": float(distances[row]),
                "chamfer_others": float(np.delete(distances, row).mean()),
                "closest_is_own": bool(distances.argmin() == row),
                **{f"psnr_{name}": value[0] for name, value in drawn.items()},
                **{f"ssim_{name}": value[1] for name, value in drawn.items()},
            }
        )
        clouds.append((avatar_id, portraits[row], {"true": truth[row]["positions"], "generated": points["positions"]}))
        avatars.append((avatar_id, portraits[row], avatar))
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw_comparison(images / "generated.png", clouds[:SHOWN])
    draw_avatars(images / "avatars.png", avatars[:SHOWN])
    draw_motion(images / "motion.gif", avatars)
    portraits[0].save(output / "portrait.png")  # for the examples of the README
    averaged = [key for key in results[0] if key.startswith(("psnr_", "ssim_"))]
    return {
        "generated": results,
        "mean_chamfer_own": float(np.mean([g["chamfer_own"] for g in results])),
        "mean_chamfer_others": float(np.mean([g["chamfer_others"] for g in results])),
        "closest_is_own": float(np.mean([g["closest_is_own"] for g in results])),
        "heldout_nll_other_condition": nll_of_another(pipeline.point_model, subjects.rows),
        **{key: float(np.mean([g[key] for g in results])) for key in averaged},
    }


def shape_parameters(pipeline: AvatarPipeline, person: dict) -> HeadParameters:
    """The head parameters that a tracker would give of a portrait: here the true shape."""
    zeros = HeadParameters.zeros(pipeline.head.n_shape, pipeline.head.n_expression)
    zeros.shape.copy_(torch.from_numpy(person["shape"]))
    return zeros


def reencoded(pipeline: AvatarPipeline, person: dict, inputs: dict, row: int, params: HeadParameters):
    """The avatar that the decoder makes of a subject's true points."""
    ids = torch.from_numpy(person["input_ids"])[None]
    condition = pipeline.point_model.select_inputs({name: value[row : row + 1] for name, value in inputs.items()})
    features = point_features(pipeline.point_model, ids, **condition)[0]
    return pipeline.decode_attributes(pipeline.tokenizer.decode(ids[0]), features, inputs["pixel_values"][row], params)


if __name__ == "__main__":
    exit_on_user_error(main)
