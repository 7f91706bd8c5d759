"""The rows of the table: from a pair to the frames a method makes of it.

`ours` makes an avatar of each source once, keeps it as a GaussianAvatars folder, and draws it with the driver's head
parameters in the driver's camera; `flame_position` does the same with a decoder that starts from head vertices. `truth`,
`copy-source` and `mean-image` need no model: what is perfect, and what knows nothing of the motion, or of the person. Methods that
ran elsewhere enter as folders of frames. Avatars and frames are files, so a run that was killed goes on where it was.
"""

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
from eval.reenactment.protocol import Pair, check_frames, frame_name, read_frames
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.skinning import Skinning
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.utils.atomic import atomic_file, atomic_folder
from modeling import AvatarPipeline, GaussianDecoder, to_gaussians
from modeling.conversion import vertex_points

BUILT_IN = ("truth", "ours", "flame_position", "copy-source", "mean-image")
FRAMES_AT_ONCE = 8  # always the same frames together, or the last digits would depend on where a run was killed
GENERATION_NAME = "generation.json"


@dataclass(frozen=True, eq=False)
class Method:
    """A row of the table."""

    name: str
    about: str
    frames: Callable[[Pair], np.ndarray]  # -> (N, H, W, 3) uint8, one for each of `pair.rows`
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # mode -> why it has no row there


@dataclass(frozen=True)
class Generated:
    """What a model made of some sources, and of how many tokens."""

    avatars: list[GaussianAvatar]
    tokens: list[int]


Maker = Callable[[Sequence[Clip]], Generated]


def truth() -> Method:
    return Method(
        "truth",
        "the true frames: what a perfect method would reach",
        lambda pair: pair.driver.images(pair.rows),
        {"cross": ("there is no true image of one person with the motion of another",)},
    )


def copy_source() -> Method:
    return Method(
        "copy-source",
        "the source portrait for every frame: the right person who never moves",
        lambda pair: np.repeat(pair.source.images([0]), len(pair.rows), 0),
    )


def mean_image(clips: Sequence[Clip]) -> Method:
    """Uses no image of the source's or the driver's clip, hence nothing of the frame it is judged on."""
    total = sum(clip.image(0).astype(np.int64) for clip in clips)

    def frames(pair: Pair) -> np.ndarray:
        left_out = {clip.subject_id: clip for clip in (pair.source, pair.driver)}.values()
        rest = total - sum(clip.image(0).astype(np.int64) for clip in left_out)
        mean = np.round(rest / (len(clips) - len(left_out))).astype(np.uint8)
        return np.repeat(mean[None], len(pair.rows), 0)

    needed = {"self": 2, "cross": 3}
    return Method(
        "mean-image",
        "the mean of the first frames of all subjects but source and driver: nobody, who never moves",
        frames,
        {
            mode: (f"needs {count} subjects, the dataset has {len(clips)}",)
            for mode, count in needed.items()
            if len(clips) < count
        },
    )


def compared(name: str, folder: Path, pairs: Sequence[Pair]) -> Method:
    """Frames from elsewhere, all of them looked at; in a mode in which any is not as it must be there is no row."""
    absent: dict[str, tuple[str, ...]] = {}
    for mode in dict.fromkeys(pair.mode for pair in pairs):
        if not (folder / mode).is_dir():
            absent[mode] = (f"no folder {folder / mode}",)
        elif problems := check_frames(folder, [pair for pair in pairs if pair.mode == mode]):
            absent[mode] = tuple(problems.lines())
    return Method(name, f"frames from {folder}", lambda pair: read_frames(folder, pair), absent)


def drawn(name: str, about: str, head: HeadModel, output: Path, device: torch.device | str) -> Method:
    """Avatars in `output/avatars/<name>`, which `make_avatars` fills, drawn to `output/frames/<name>` when asked for."""

    def frames(pair: Pair) -> np.ndarray:
        path = output / "avatars" / name / pair.source.subject_id
        if any(not (pair.path(output / "frames" / name) / frame_name(row)).is_file() for row in pair.rows):
            draw_pair(GaussianAvatar.load(path, head=head).to(device), pair, output / "frames" / name)
        return read_frames(output / "frames" / name, pair)

    return Method(name, about, frames)


def make_avatars(name: str, maker: Maker, clips: Sequence[Clip], output: Path, batch_size: int) -> list[dict[str, Any]]:
    """The avatar of every clip's first frame to `output/avatars/<name>/<subject>`; returns what was noted at making each.

    The same clips are always made together: which noise a source gets depends on those beside it. What is there stays.
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
                for path, avatar, tokens in zip(paths, made.avatars, made.tokens):
                    noted = {"seconds": seconds, "batch": len(batch), "tokens": tokens, "points": len(avatar)}
                    with atomic_folder(path) as new:
                        avatar.to("cpu").save(new)
                        (new / GENERATION_NAME).write_text(json.dumps(noted))
            progress.update(len(batch))
    return [json.loads((folder / clip.subject_id / GENERATION_NAME).read_text()) for clip in clips]


def ours_maker(pipeline: AvatarPipeline, seed: int, **generate: Any) -> Maker:
    """Portrait and head parameters of the first frame -> avatars, by the whole pipeline."""

    def make(clips: Sequence[Clip]) -> Generated:
        params = [source_params(clip) for clip in clips]
        inputs = pipeline.inputs([clip.portrait() for clip in clips], params)
        written = pipeline.write(inputs, seed=seed, **generate)
        parts = zip(*pipeline.points(written), inputs["pixel_values"], params)
        tokens = (written.sequences < pipeline.point_model.config.bos_token_id).sum(1).tolist()
        return Generated([pipeline.decode_attributes(*part) for part in parts], tokens)

    return make


def flame_position_maker(pipeline: AvatarPipeline, decoder: GaussianDecoder) -> Maker:
    """The ablation without a point model: a Gaussian on every vertex of the head, of the subject's own shape."""

    def make(clips: Sequence[Clip]) -> Generated:
        params = [source_params(clip) for clip in clips]
        portraits = pipeline.inputs([clip.portrait() for clip in clips], params)["pixel_values"]
        avatars = [vertex_avatar(pipeline.head, decoder, *person) for person in zip(portraits, params)]
        return Generated(avatars, [0] * len(avatars))

    return make


@torch.no_grad()
def vertex_avatar(
    head: HeadModel, decoder: GaussianDecoder, pixel_values: Tensor, params: HeadParameters
) -> GaussianAvatar:
    """What a decoder of mode "flame_position" makes of a portrait (3, h, w), as the pipeline prepares it, and a head."""
    positions, faces = vertex_points(head, params.to(head.device))
    decoded = decoder(positions=positions[None].float(), pixel_values=pixel_values[None])
    return GaussianAvatar.from_gaussians(to_gaussians(decoded), faces, params.to(head.device).canonical(), head)


def source_params(clip: Clip) -> HeadParameters:
    """What a tracker says of the source frame; shape and static offset are used."""
    return clip.params.frame(0)


@torch.no_grad()
def draw_pair(avatar: GaussianAvatar, pair: Pair, folder: Path) -> None:
    """Draw the avatar as the driver moves, on white, into the folder of the pair; frames that are there stay."""
    target = pair.path(folder)
    target.mkdir(parents=True, exist_ok=True)
    bound = avatar.bind()
    for start in range(pair.rows.start, pair.rows.stop, FRAMES_AT_ONCE):
        rows = range(start, min(start + FRAMES_AT_ONCE, pair.rows.stop))
        if all((target / frame_name(row)).is_file() for row in rows):
            continue
        for row, image in zip(rows, draw(bound, pair.driver, rows)):
            with atomic_file(target / frame_name(row)) as file:
                Image.fromarray(image).save(file, format="PNG")


def draw(bound: Skinning, driver: Clip, rows: range) -> np.ndarray:
    """(N, H, W, 3) uint8: the avatar with the driver's expressions, poses and cameras, on its own shape."""
    some = slice(rows.start, rows.stop)
    posed = bound.pose(driver.params.frame(some).to(bound.faces.device))
    image = render(posed, driver.cameras[some].to(torch.float32), background=1.0).image
    return (image.clamp(0, 1) * 255 + 0.5).byte().cpu().numpy()
