"""Generate the point cloud of a portrait from the command line.

    python -m modeling.generate --model outputs/demo/model --head procedural:600 --portrait portrait.png --output_dir outputs/me

Input: a portrait and a head model, with its mean shape unless `--params flame_param.npz` gives another. Output:
`points.safetensors` (positions, faces, ids), `points.ply` for any viewer of point clouds, and `points.png`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save as safetensors_bytes
from transformers import set_seed

from gaussian_tokenizer.avatars.ply import write_point_ply
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.point_plots import draw_comparison
from gaussian_tokenizer.tokenizer.image_files import open_image
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_file

from .checks import check_head
from .pointillist.modeling_pointillist import PointillistForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a point model with its tokenizer")
    parser.add_argument(
        "--head", required=True, help="head model: procedural:600, .safetensors, FLAME .pkl, ICT folder"
    )
    parser.add_argument("--portrait", type=Path, help="image of the subject, face in the center")
    parser.add_argument("--params", type=Path, help="flame_param.npz with the subject's shape (default: the mean head)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for points.safetensors, .ply and .png")
    parser.add_argument("--max_points", type=int, help="generate no more points than this (default: 32,768)")
    parser.add_argument("--max_points_per_face", type=int, help="most points on a face")
    parser.add_argument("--temperature", type=float, default=0.9, help="below 1: prefer likely tokens")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample from the likeliest tokens of this total mass")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="above 1: follow the condition more closely")
    parser.add_argument("--seed", type=int, default=0, help="of the random sampling")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    arguments = parser.parse_args()
    try:
        generate(arguments)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {' '.join(str(error).split())}\n")


def generate(arguments: argparse.Namespace) -> None:
    """Generate the points of the portrait and write the files."""
    model, tokenizer = open_model(arguments.model)
    model = model.to(arguments.device)
    head = load_head(arguments.head)
    check_head(tokenizer, head, f"--head {arguments.head}")
    params = HeadParameters.load(arguments.params) if arguments.params else None
    portrait = open_image(arguments.portrait) if arguments.portrait else None

    set_seed(arguments.seed)
    ids = model.generate(
        **condition(model, tokenizer, head, portrait, params),
        max_points=arguments.max_points,
        max_points_per_face=arguments.max_points_per_face,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        guidance_scale=arguments.guidance_scale,
        progress=True,
    )[0].cpu()
    points = tokenizer.decode(ids)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    save_points(arguments.output_dir, points, ids.numpy())
    draw_comparison(arguments.output_dir / "points.png", [("portrait", portrait, {"generated": points["positions"]})])
    print(f"{len(points['faces']):,} points in {arguments.output_dir}: points.safetensors, points.ply, points.png")


def open_model(name: str) -> tuple[PointillistForCausalLM, GaussianTokenizer]:
    """Model and tokenizer of a folder or Hub id."""
    try:
        return PointillistForCausalLM.from_pretrained(name).eval(), GaussianTokenizer.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"--model {name}: no model with its tokenizer, neither in a folder with config.json, model.safetensors and "
            f"processor_config.json nor in the cache of the Hub ({error})"
        ) from error


def condition(
    model: PointillistForCausalLM,
    tokenizer: GaussianTokenizer,
    head: HeadModel,
    portrait: Image.Image | None,
    params: HeadParameters | None,
) -> dict[str, torch.Tensor]:
    """The inputs of `generate` for a portrait and a head, as far as this model has encoders for them."""
    if portrait is None and model.config.use_vision_encoder:
        print("note: without --portrait the model reads only the head, which it was not trained for", file=sys.stderr)
    if portrait is not None and not model.config.use_vision_encoder:
        raise ValueError("this model reads no portrait (use_vision_encoder is false): leave --portrait out")
    if params is not None and not model.config.use_point_encoder:
        raise ValueError("this model reads no head mesh (use_point_encoder is false): leave --params out")
    vertices = head.template if params is None else head.canonical_vertices(params)
    inputs = tokenizer(images=portrait, head_vertices=vertices, head_faces=head.faces, return_tensors="pt")
    return {name: value.to(model.device) for name, value in model.select_inputs(inputs).items()}


def save_points(folder: Path, points: dict[str, np.ndarray], ids: np.ndarray) -> None:
    """`points.safetensors` and a binary `points.ply` with x, y, z and face."""
    with atomic_file(folder / "points.safetensors") as file:
        file.write(safetensors_bytes({**points, "input_ids": ids}))
    write_point_ply(folder / "points.ply", points["positions"], points["faces"])


if __name__ == "__main__":
    main()
