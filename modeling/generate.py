"""Generate the point cloud of a portrait: points.safetensors (positions, faces, ids), points.ply and points.png.

pointillist generate --model outputs/demo/model --head procedural:600 --portrait portrait.png --output_dir outputs/me
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.numpy import save as safetensors_bytes
from transformers import CompileConfig, TorchAoConfig, set_seed

from gaussian_tokenizer.avatars.ply import write_point_ply
from gaussian_tokenizer.captures.loading import load_tracking
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.point_plots import draw_comparison
from gaussian_tokenizer.rendering.portrait_points import Portrait, face_pixels
from gaussian_tokenizer.tokenizer.image_files import open_image
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.precision import choose_bf16

from .checks import check_head
from .pointillist.modeling_pointillist import PointillistForCausalLM

DTYPES = ("auto", "float32", "bfloat16")
OPTIONS = ("max_points", "max_points_per_face", "temperature", "top_p", "guidance_scale")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="pointillist generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id of a point model with its tokenizer")
    add("--head", required=True, help="head model: procedural:600, .safetensors, FLAME .pkl, ICT folder")
    add("--portrait", type=Path, help="image of the subject, face in the center")
    add("--params", type=Path, help="flame_param.npz with the subject's shape (default: the mean head)")
    add(
        "--tracking",
        type=Path,
        help="folder of a tracked subject, as fit-portrait leaves: its first image, with camera and head parameters, instead of "
        "--portrait and --params; what a model that reads the portrait at its faces needs",
    )
    add("--output_dir", type=Path, required=True, help="folder for points.safetensors, .ply and .png")
    add("--max_points", type=int, help="generate no more points than this (default: 32,768)")
    add("--max_points_per_face", type=int, help="most points on a face")
    add("--temperature", type=float, default=0.9, help="below 1: prefer likely tokens")
    add("--top_p", type=float, default=0.95, help="sample from the likeliest tokens of this total mass")
    add("--guidance_scale", type=float, default=1.0, help="above 1: follow the condition more closely")
    add("--seed", type=int, default=0, help="of the random sampling")
    add(
        "--dtype",
        choices=DTYPES,
        help="precision; auto: bfloat16 on a device that is fast in it (default: as the model was saved)",
    )
    add(
        "--quantize",
        choices=["int8"],
        help="the decoder's linear layers in 8 bits, in steps that are compiled first (needs the extra `quantized`)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    arguments = parser.parse_args()
    try:
        generate(arguments)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {' '.join(str(error).split())}\n")


def generate(arguments: argparse.Namespace) -> None:
    """Generate the points of the portrait and write the files."""
    options: dict[str, Any] = {}
    if (dtype := dtype_for(arguments.dtype, arguments.device)) is not None:
        options["dtype"] = dtype
    if arguments.quantize is not None:
        options["quantization_config"] = quantization(arguments.device)
    model, tokenizer = open_model(arguments.model, **options)
    model = model.to(arguments.device)
    head = load_head(arguments.head)
    check_head(tokenizer, head, f"--head {arguments.head}")
    portrait, params, camera = subject_of(arguments, head)
    config = model.config

    set_seed(arguments.seed)
    if portrait is None and config.use_vision_encoder:
        print("note: without --portrait the model reads only the head, which it was not trained for", file=sys.stderr)
    if arguments.portrait and not (config.use_vision_encoder or config.read_portrait):
        raise ValueError("this model reads no portrait (use_vision_encoder is false): leave --portrait out")
    if arguments.params and not (config.use_point_encoder or config.mesh_aware_faces):
        raise ValueError("this model reads no head mesh (use_point_encoder is false): leave --params out")
    vertices = head.template if params is None else head.canonical_vertices(params)
    inputs = tokenizer(images=portrait, head_vertices=vertices, head_faces=head.faces, return_tensors="pt")
    if config.read_portrait:
        if portrait is None:
            raise ValueError("this model reads the portrait at its faces: give --tracking, or --portrait and --params")
        own = HeadParameters.zeros(head.n_shape, head.n_expression) if params is None else params
        seen = Portrait.of(portrait, own, camera, head, tokenizer.image_size)
        inputs["face_pixels"] = face_pixels(seen, head)[None]
    condition = {name: value.to(model.device) for name, value in model.select_inputs(inputs).items()}
    sampling = {name: getattr(arguments, name) for name in OPTIONS} | (compiled_steps() if arguments.quantize else {})
    ids = model.generate(**condition, **sampling, progress=True)[0].cpu()
    points = tokenizer.decode(ids)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(arguments.output_dir / "points.safetensors") as file:
        file.write(safetensors_bytes({**points, "input_ids": ids.numpy()}))
    write_point_ply(arguments.output_dir / "points.ply", points["positions"], points["faces"])
    draw_comparison(arguments.output_dir / "points.png", [("portrait", portrait, {"generated": points["positions"]})])
    print(f"{len(points['faces']):,} points in {arguments.output_dir}: points.safetensors, points.ply, points.png")


def subject_of(
    arguments: argparse.Namespace, head: HeadModel
) -> tuple[Image.Image | None, HeadParameters | None, Cameras | None]:
    """Portrait, head parameters and camera of the command line; None where it names none."""
    if arguments.tracking is None:
        params = HeadParameters.load(arguments.params) if arguments.params else None
        return open_image(arguments.portrait) if arguments.portrait else None, params, None
    if arguments.portrait or arguments.params:
        raise ValueError("--tracking has portrait and head parameters: leave --portrait and --params out")
    tracking = load_tracking(arguments.tracking, head)
    portrait = Image.fromarray((255 * tracking.image(0)).round().to(torch.uint8).numpy())
    return portrait, tracking.params.frame(0), tracking.cameras([0]).to(torch.float32)


def dtype_for(name: str | None, device: str) -> torch.dtype | None:
    """The precision that `--dtype` names, with a note where the device matters; None: as the model was saved."""
    if name is None:
        return None
    bf16, reason = choose_bf16(None if name == "auto" else name == "bfloat16", device, f"--dtype {name}")
    dtype = torch.bfloat16 if bf16 else torch.float32
    if ":" in reason:
        print(f"note: {str(dtype).removeprefix('torch.')} ({reason})", file=sys.stderr)
    return dtype


def quantization(device: str) -> TorchAoConfig:
    """The decoder's linear layers in 8 bits, by torchao: weights, and on a CPU what they multiply, row by row.

    Faster only in `compiled_steps`. Raises `ValueError` where torchao is missing.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    except ImportError:
        raise ValueError('--quantize needs torchao: pip install "avatar-pointillist[quantized]"') from None
    chosen = Int8DynamicActivationInt8WeightConfig() if device == "cpu" else Int8WeightOnlyConfig()
    return TorchAoConfig(chosen, modules_to_not_convert=["condition_encoder", "model.embed_tokens", "lm_head"])


def compiled_steps() -> dict[str, Any]:
    """Options of `generate` that compile a step, on a CPU too; there it takes a C++ compiler and about a minute."""
    compile_config: Any = CompileConfig(mode="default")  # the field below is not declared
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}


def open_model(name: str, **options: Any) -> tuple[PointillistForCausalLM, GaussianTokenizer]:
    """Model and tokenizer of a folder or Hub id; `options` of `from_pretrained`."""
    try:
        return PointillistForCausalLM.from_pretrained(name, **options).eval(), GaussianTokenizer.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"--model {name}: no model with its tokenizer, neither in a folder with config.json, model.safetensors and "
            f"processor_config.json nor in the cache of the Hub ({error})"
        ) from error


if __name__ == "__main__":
    main()
