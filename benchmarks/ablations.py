"""What the Gaussian decoder gains from each of its inputs: the paper's ablation, on open data.

    make demo && python benchmarks/ablations.py      # half an hour on two cores; run again, it resumes
    python benchmarks/ablations.py --seeds 0 --steps 20 --output_dir outputs/small_ablations

The corpus and the point model are the demo's. Each decoder is trained from new weights for the same steps on the same subjects,
with the demo's settings except for its inputs:

    full             position and hidden state of the point model (the paper)
    position         positions of the points alone
    ar_feature       hidden states alone
    flame_position   no point model: the vertices of the subject's head
    full + anchors   as full, and where the point's face is on the subject's head (ours)

Then each decodes avatars of the same held-out subjects from portrait and head parameters; those that read points decode the same
generated clouds. PSNR and SSIM are means over all frames of these subjects; +- is the standard deviation over the seeds.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from report import markdown_table, write_report

from eval.reenactment.methods import vertex_avatar
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from modeling import AvatarPipeline, GaussianDecoder, PointillistForCausalLM
from modeling.point_features import fingerprint
from training.common.rows import HEAD_COLUMNS
from training.decoder.subjects import SubjectRows, mean_image_metrics, mean_images
from training.recipe.evaluation import reencoded, shape_parameters
from training.recipe.report import image_metrics, images_of, on_white, true_frames

WAYS = {
    "full": ["--mode", "full", "--read_anchors", "false"],
    "position": ["--mode", "position", "--read_anchors", "false"],
    "ar_feature": ["--mode", "ar_feature", "--read_anchors", "false"],
    "flame_position": ["--mode", "flame_position", "--read_anchors", "false"],
    "full + anchors": ["--mode", "full", "--read_anchors", "true"],
}
SHOWN, SIZE = 5, 144  # subjects of the image, pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="folder of a finished demo")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablations"), help="folder of the decoders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=450, help="of each decoder's training")
    parser.add_argument("--num_subjects", type=int, default=16, help="held-out subjects")
    parser.add_argument("--config", default="training/configs/decoder_demo.yaml", help="all other settings")
    parser.add_argument("--image", type=Path, default=Path("docs/images/ablations.png"))
    arguments = parser.parse_args()
    # A decoder belongs to its point model: decoders of another demo must not be reused.
    point_model = fingerprint(PointillistForCausalLM.from_pretrained(arguments.demo / "model"))
    arguments.output_dir /= point_model[:8]
    for seed in arguments.seeds:  # seed by seed: if stopped, every variant has as many
        for way in WAYS:
            train(way, seed, arguments)
    torch.set_num_threads(1)
    judged, images = judge(arguments)
    rows = [table_row(way, values) for way, values in judged.items()]
    print("\n" + markdown_table(rows))
    settings = {"seeds": arguments.seeds, "steps": arguments.steps, "subjects": arguments.num_subjects}
    path = write_report("ablations", rows, **settings, by_seed=judged)
    draw(arguments.image, images)
    print(f"\nwritten: {path}, {arguments.image}")


def folder_of(way: str, seed: int, arguments: argparse.Namespace) -> Path:
    return arguments.output_dir / f"{way.replace(' + ', '_')}-{seed}"


def train(way: str, seed: int, arguments: argparse.Namespace) -> None:
    output = folder_of(way, seed, arguments)
    report = output / "training_report.json"
    if report.is_file() and json.loads(report.read_text())["steps"] == arguments.steps:
        return
    command = [
        Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", 2, "training/train_gaussian_decoder.py",
        arguments.config, "--point_model", arguments.demo / "model", "--corpus", arguments.demo / "corpus",
        "--head", arguments.demo / "pipeline" / "head" / "head.safetensors",
        "--feature_cache", arguments.demo / "features", "--output_dir", output, "--seed", seed, "--max_steps", arguments.steps,
        "--eval_steps", arguments.steps, "--save_steps", arguments.steps, *WAYS[way],
    ]  # fmt: skip
    print(f"\n=== {way}, seed {seed}\n$", shlex.join(map(str, command)), flush=True)
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    subprocess.run([str(word) for word in command], check=True, env=environment)


@torch.no_grad()
def judge(arguments: argparse.Namespace) -> tuple[dict, list[list[np.ndarray]]]:
    """Variant -> metric -> a value for each seed; and for the first subjects a row of images: portrait, one for each variant."""
    pipeline = AvatarPipeline.from_pretrained(arguments.demo / "pipeline")
    corpus = load_corpus(arguments.demo / "corpus")
    subjects = SubjectRows(corpus, "validation", HEAD_COLUMNS, max_subjects=arguments.num_subjects)
    rows = range(len(subjects))
    params = [shape_parameters(pipeline, subjects.subject(row, None)["shape"]) for row in rows]
    frames = [true_frames(subjects, row) for row in rows]
    portraits = [subjects.frames[subjects.frame_rows(row)[0]]["image"] for row in rows]
    inputs = pipeline.inputs(portraits, params)
    longest = 2 * int(subjects.rows.lengths.max()) // 4
    written = pipeline.generate(inputs, seed=0, max_points=longest, max_points_per_face=15, progress=True)
    clouds = list(zip(*pipeline.decode_points(written), inputs["pixel_values"], params))
    means = mean_images(SubjectRows(corpus, "train"))
    baseline = [mean_image_metrics(means, subjects, list(subjects.frame_rows(row))) for row in rows]
    mean_psnr, mean_ssim = (float(np.mean([float(value.mean()) for value in values])) for values in zip(*baseline))
    judged: dict = {"mean image": {"psnr": [mean_psnr], "ssim": [mean_ssim]}}
    images = [[on_white(portraits[row], SIZE)] for row in rows[:SHOWN]]
    for way in WAYS:
        judged[way] = {"psnr": [], "ssim": [], "psnr_true_points": []}
        for seed in arguments.seeds:
            decoder = GaussianDecoder.from_pretrained(folder_of(way, seed, arguments)).eval()
            pipeline.gaussian_decoder, found = decoder, []
            for row in rows:
                if way == "flame_position":
                    avatar = known = vertex_avatar(pipeline.head, decoder, *clouds[row][2:])
                else:
                    avatar = pipeline.decode_attributes(*clouds[row])
                    known = reencoded(pipeline, subjects, row, inputs, params[row])
                found.append((*image_metrics(avatar, frames[row]), image_metrics(known, frames[row])[0]))
                if seed == arguments.seeds[0] and row < SHOWN:
                    images[row].append(images_of(avatar, None, portrait_cameras(pipeline.head, SIZE))[0])
            for name, value in zip(judged[way], np.mean(found, axis=0)):
                judged[way][name].append(float(value))
    return judged, images


def table_row(way: str, values: dict[str, list[float]]) -> dict[str, str]:
    """Mean over the seeds and their standard deviation."""

    def cell(name: str, digits: int) -> str:
        if name not in values:
            return ""
        spread = f" +- {np.std(values[name], ddof=1):.{digits}f}" if len(values[name]) > 1 else ""
        return f"{np.mean(values[name]):.{digits}f}{spread}"

    return {
        "decoder": way,
        "PSNR from the portrait": cell("psnr", 2),
        "SSIM from the portrait": cell("ssim", 3),
        "PSNR on true points": cell("psnr_true_points", 2),
    }


def draw(path: Path, images: list[list[np.ndarray]]) -> None:
    """A row for each subject: the portrait, then the avatar of each variant."""
    lines = np.concatenate([np.concatenate(line, axis=1) for line in images])
    labels = Image.new("RGB", (lines.shape[1], 16), "white")
    for number, name in enumerate(("portrait", *WAYS)):
        ImageDraw.Draw(labels).text((number * SIZE + 4, 2), name, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.asarray(labels), lines])).save(path)


if __name__ == "__main__":
    main()
