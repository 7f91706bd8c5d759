"""The rows of the table: from a pair to the frames a method makes of it.

`ours` makes an avatar of each source once and renders it with the driver's head parameters and camera; `flame_position` does the
same with a decoder that starts from head vertices. Avatars and frames are files, so a killed run resumes where it stopped.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.reenactment.clips import Clip
from eval.reenactment.protocol import Pair, by_mode, check_frames, frame_name, read_frames
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.skinning import Skinning
from gaussian_tokenizer.captures.frame import load_image
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.portrait_points import Portrait
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.utils.atomic import atomic_file, atomic_folder
from modeling import AvatarPipeline, GaussianDecoder, to_gaussians
from modeling.conversion import vertex_points

BUILT_IN = ("truth", "ours", "flame_position", "copy-source", "mean-image")
FRAMES_AT_ONCE = 8  # always in the same groups, or the last digits would depend on where a run was killed
GENERATION_NAME = "generation.json"


@dataclass(frozen=True, eq=False)
class Method:
    """A row of the table."""

    name: str
    about: str
    frames: Callable[[Pair], np.ndarray]  # -> (N, H, W, 3) uint8, one for each of `pair.rows`
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # mode -> why it has no row there
    compared: bool = False  # whether its frames come from elsewhere
    alphas: Callable[[Pair], np.ndarray] | None = None  # -> (N, H, W) uint8, where they are known

    def drawn(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Frames and alphas of a pair."""
        return self.frames(pair), None if self.alphas is None else self.alphas(pair)


# The avatars of the first frames of some clips, each with the number of tokens it was generated from.
Maker = Callable[[Sequence[Clip]], list[tuple[GaussianAvatar, int]]]


def make_methods(
    arguments: argparse.Namespace,
    folders: dict[str, Path],
    pipeline: AvatarPipeline,
    decoder: GaussianDecoder | None,
    clips: Sequence[Clip],
    pairs: Sequence[Pair],
) -> tuple[list[Method], list[dict[str, Any]]]:
    """Make the avatars; returns the rows of the table, and the generation stats of "ours"."""
    output: Path = arguments.output_dir
    others = [compared(name, folder, pairs) for name, folder in folders.items()]
    for method in others:
        for mode, problems in method.absent.items():
            print(f"{method.name}, {mode}: refused\n  " + "\n  ".join(problems), flush=True)
    limits = {"max_points": arguments.max_points, "max_points_per_face": arguments.max_points_per_face}
    maker = ours_maker(pipeline, arguments.seed, candidates=arguments.candidates, **limits, progress=False)
    generation = make_avatars("ours", maker, clips, output, arguments.batch_size)
    about = {"ours": f"the pipeline {arguments.model}"}
    if decoder is not None:
        make_avatars("flame_position", flame_position_maker(pipeline, decoder), clips, output, arguments.batch_size)
        by = arguments.flame_position
        about["flame_position"] = f"Gaussians on the vertices of the head, by {by}: the paper's ablation"
    own = [rendered(name, text, pipeline.head, output, arguments.device) for name, text in about.items()]
    return [truth(), *own, *others, copy_source(), mean_image(clips)], generation


def truth() -> Method:
    about = "the true frames: the result of a perfect method"
    absent = {"cross": ("no true image shows one subject with the motion of another",)}

    def alphas(pair: Pair) -> np.ndarray:
        return pair.driver.alphas(pair.rows)

    return Method("truth", about, lambda pair: pair.driver.images(pair.rows), absent, alphas=alphas)


def copy_source() -> Method:
    about = "the source portrait as every frame: the right subject, no motion"

    def frames(pair: Pair) -> np.ndarray:
        return np.repeat(pair.source.images([0]), len(pair.rows), 0)

    def alphas(pair: Pair) -> np.ndarray:
        return np.repeat(pair.source.alphas([0]), len(pair.rows), 0)

    return Method("copy-source", about, frames, alphas=alphas)


def mean_image(clips: Sequence[Clip]) -> Method:
    """Uses no image of the source's or the driver's clip, and thus nothing of the frame it is compared with."""
    total = sum(clip.image(0).astype(np.int64) for clip in clips)

    def frames(pair: Pair) -> np.ndarray:
        left_out = {clip.subject_id: clip for clip in (pair.source, pair.driver)}.values()
        rest = total - sum(clip.image(0).astype(np.int64) for clip in left_out)
        mean = np.round(rest / (len(clips) - len(left_out))).astype(np.uint8)
        return np.repeat(mean[None], len(pair.rows), 0)

    about = "the mean of the first frames of all subjects but source and driver: no subject, no motion"
    needed = {mode: count for mode, count in (("self", 2), ("cross", 3)) if len(clips) < count}
    absent = {mode: (f"needs {count} subjects, the dataset has {len(clips)}",) for mode, count in needed.items()}
    return Method("mean-image", about, frames, absent)


def compared(name: str, folder: Path, pairs: Sequence[Pair]) -> Method:
    """Frames from elsewhere. All are checked; a mode in which any frame deviates has no row."""
    absent: dict[str, tuple[str, ...]] = {}
    for mode, own in by_mode(pairs).items():
        if not (folder / mode).is_dir():
            absent[mode] = (f"no folder {folder / mode}",)
        elif problems := check_frames(folder, own):
            absent[mode] = tuple(problems)
    return Method(name, f"frames from {folder}", lambda pair: read_frames(folder, pair), absent, compared=True)


def rendered(name: str, about: str, head: HeadModel, output: Path, device: torch.device | str) -> Method:
    """The avatars of `make_avatars` in `output/avatars/<name>`, rendered to `output/frames/<name>` and `alphas` on demand."""
    folder, alpha_folder = output / "frames" / name, output / "alphas" / name

    def draw(pair: Pair) -> None:
        if any(
            not (pair.path(each) / frame_name(row)).is_file() for each in (folder, alpha_folder) for row in pair.rows
        ):
            avatar = GaussianAvatar.load(output / "avatars" / name / pair.source.subject_id, head=head)
            render_pair(avatar.to(device), pair, folder, alpha_folder)

    def frames(pair: Pair) -> np.ndarray:
        draw(pair)
        return read_frames(folder, pair)

    def alphas(pair: Pair) -> np.ndarray:
        draw(pair)
        return np.stack([np.asarray(load_image(pair.path(alpha_folder) / frame_name(row))) for row in pair.rows])

    return Method(name, about, frames, alphas=alphas)


def make_avatars(name: str, maker: Maker, clips: Sequence[Clip], output: Path, batch_size: int) -> list[dict[str, Any]]:
    """The avatar of every clip's first frame to `output/avatars/<name>/<subject>`; returns the generation stats of each.

    The same clips are always made together, because the noise of a source depends on its batch. Existing avatars stay.
    """
    folder = output / "avatars" / name
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(clips), desc=f"avatars: {name}", unit="avatar") as progress:
        for start in range(0, len(clips), batch_size):
            batch = clips[start : start + batch_size]
            paths = [folder / clip.subject_id for clip in batch]
            if not all(path.is_dir() for path in paths):
                begin = time.perf_counter()
                made = maker(batch)
                seconds = (time.perf_counter() - begin) / len(batch)
                for path, (avatar, tokens) in zip(paths, made):
                    stats = {"seconds": seconds, "batch": len(batch), "tokens": tokens, "gaussians": len(avatar)}
                    with atomic_folder(path) as new:
                        avatar.to("cpu").save(new)
                        (new / GENERATION_NAME).write_text(json.dumps(stats))
            progress.update(len(batch))
    return [json.loads((folder / clip.subject_id / GENERATION_NAME).read_text()) for clip in clips]


def ours_maker(pipeline: AvatarPipeline, seed: int, **generate: Any) -> Maker:
    """Portrait and head parameters of the first frame -> avatars, by the whole pipeline."""

    def make(clips: Sequence[Clip]) -> list[tuple[GaussianAvatar, int]]:
        params, images = [clip.params.frame(0) for clip in clips], [clip.read(0) for clip in clips]
        cameras = [clip.cameras[0] for clip in clips]
        portraits = pipeline.portraits(images, params, cameras, [clip.references() for clip in clips])
        inputs = pipeline.inputs(images, params, portraits)
        written = pipeline.generate(inputs, seed=seed, **generate)
        parts = zip(*pipeline.decode_points(written), inputs["pixel_values"], params, portraits)
        tokens = (written.sequences < pipeline.point_model.config.bos_token_id).sum(1).tolist()
        return [(pipeline.decode_attributes(*part), count) for part, count in zip(parts, tokens)]

    return make


def flame_position_maker(pipeline: AvatarPipeline, decoder: GaussianDecoder) -> Maker:
    """The paper's ablation without a point model: a Gaussian on every vertex of the subject's own head."""

    def make(clips: Sequence[Clip]) -> list[tuple[GaussianAvatar, int]]:
        params, images = [clip.params.frame(0) for clip in clips], [clip.read(0) for clip in clips]
        pixels = torch.from_numpy(pipeline.tokenizer(images=images)["pixel_values"]).to(pipeline.device)
        portraits: list[Portrait | None] = [None] * len(clips)
        if decoder.config.read_portrait:
            head, size = pipeline.head, pipeline.tokenizer.image_size
            portraits = [
                Portrait.of(image, own, clip.cameras[0], head, size, clip.references())
                for image, own, clip in zip(images, params, clips)
            ]
        return [(vertex_avatar(pipeline.head, decoder, *each), 0) for each in zip(pixels, params, portraits)]

    return make


@torch.no_grad()
def vertex_avatar(
    head: HeadModel,
    decoder: GaussianDecoder,
    pixel_values: Tensor,
    params: HeadParameters,
    portrait: Portrait | None = None,
) -> GaussianAvatar:
    """The avatar that a decoder of mode "flame_position" makes of a portrait (3, h, w), prepared by the pipeline, and a head.

    `portrait` is for a decoder that reads it.
    """
    params = params.to(head.device)
    positions, faces = vertex_points(head, params)
    inputs = {"positions": positions.float(), "pixel_values": pixel_values}
    if portrait is not None:
        inputs |= portrait.inputs(positions, faces, head)
    decoded = decoder(**{name: value[None] for name, value in inputs.items()})
    faces = decoder.config.per_gaussian(faces)
    return GaussianAvatar.from_gaussians(to_gaussians(decoded), faces, params.canonical(), head)


@torch.no_grad()
def render_pair(avatar: GaussianAvatar, pair: Pair, folder: Path, alpha_folder: Path) -> None:
    """Render the avatar with the driver's motion, on white, into the folders of the pair; existing frames stay."""
    targets = pair.path(folder), pair.path(alpha_folder)
    for target in targets:
        target.mkdir(parents=True, exist_ok=True)
    skinning = avatar.bind()
    for start in range(pair.rows.start, pair.rows.stop, FRAMES_AT_ONCE):
        rows = range(start, min(start + FRAMES_AT_ONCE, pair.rows.stop))
        if all((target / frame_name(row)).is_file() for target in targets for row in rows):
            continue
        for target, images in zip(targets, render_frames(skinning, pair.driver, rows)):
            for row, image in zip(rows, images):
                with atomic_file(target / frame_name(row)) as file:
                    Image.fromarray(image).save(file, format="PNG")


def render_frames(skinning: Skinning, driver: Clip, rows: range) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W, 3) and alphas (N, H, W) uint8: the avatar with the driver's expressions, poses and cameras, on its own shape."""
    some = slice(rows.start, rows.stop)
    posed = skinning.pose(driver.params.frame(some).to(skinning.faces.device))
    drawn = render(posed, driver.cameras[some].to(torch.float32), background=1.0)
    image, alpha = ((x.clamp(0, 1) * 255 + 0.5).byte().cpu().numpy() for x in (drawn.image, drawn.alpha[..., 0]))
    return image, alpha
