"""The bench's data: clips, each with the frames of one tracked subject, their cameras and head parameters.

A dataset is a folder of tracked subjects as `gaussian_tokenizer.captures` reads them, or one split of a corpus.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from gaussian_tokenizer.captures.loading import find_trackings, load_tracking
from gaussian_tokenizer.corpus.corpus import MANIFEST_NAME, is_url, load_corpus
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.portrait_points import Reference

STATIC_KEYS = ("shape", "static_offset")  # of HeadParameters: the same in all frames of a subject
FILE_NAME = re.compile(r"[^\x00-\x1f/\\.][^\x00-\x1f/\\]*")  # subject ids become names of files and folders


@dataclass(frozen=True, eq=False)
class Clip:
    """T frames of one subject, in order of camera, then time, but for those that avatars are made of, which come first."""

    subject_id: str
    numbers: list[int]  # camera number of each frame
    cameras: Cameras  # T, float64
    params: HeadParameters  # T rows
    read: Callable[[int], Image.Image]  # row -> image as stored, RGBA
    num_references: int = 1  # frames that avatars are made of: the source in row 0 and those after it

    def __len__(self) -> int:
        return len(self.cameras)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.cameras.width, self.cameras.height

    def image(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8, on white."""
        return on_white(self.read(row))

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """(N, H, W, 3) uint8, on white."""
        return np.stack([self.image(row) for row in rows])

    def alphas(self, rows: Sequence[int]) -> np.ndarray:
        """(N, H, W) uint8, 255 everywhere in an image without alpha."""
        return np.stack([np.asarray(self.read(row).convert("RGBA"))[..., 3] for row in rows])

    def references(self) -> list[Reference]:
        """What a pipeline reads besides the source."""
        rows = range(1, self.num_references)
        return [Reference(self.read(row), self.params.frame(row), self.cameras[row]) for row in rows]

    def with_references(self, count: int) -> "Clip":
        """The same frames, `count` of them, evenly spaced, moved to the beginning."""
        first = [i * len(self) // count for i in range(count)]
        rows = first + [row for row in range(len(self)) if row not in first]
        params: dict[str, Any] = {name: value[rows] for name, value in self.params.per_frame().items()}
        return Clip(
            self.subject_id,
            [self.numbers[row] for row in rows],
            self.cameras[rows],
            replace(self.params, layout=None, **params),
            lambda row: self.read(rows[row]),
            count,
        )


def open_dataset(
    path: str | os.PathLike,
    head: HeadModel,
    split: str = "validation",
    camera: int | None = None,
    num_subjects: int | None = None,
    num_frames: int | None = None,
    num_references: int = 1,
) -> list[Clip]:
    """The clips of a dataset, one per subject, sorted by subject id.

    `camera` is the number of the only camera to take, `num_subjects` takes the first subjects, `num_frames` the first frames of
    each camera; `num_references` frames of each clip are for its avatar. ValueError or FileNotFoundError that names the subject
    for unreadable data, another head model, images of several sizes (distances in pixels would not be comparable), no frame
    besides those of the avatar, and a subject id that cannot name a file.
    """
    if is_url(str(path)) or (Path(path) / MANIFEST_NAME).is_file():
        clips = _corpus_clips(path, head, split, camera, num_frames)
    else:
        folders = tqdm(find_trackings(path), desc="opening the dataset", unit="subject", leave=False)
        clips = [_tracked_clip(folder, head, camera, num_frames) for folder in folders]
    clips = sorted(clips, key=lambda clip: clip.subject_id)[:num_subjects]
    for clip in clips:
        if not FILE_NAME.fullmatch(clip.subject_id):
            raise ValueError(f"{path}: subject id {clip.subject_id!r} cannot name a file; use another avatar_id")
        if len(clip) <= num_references:
            are = "the first is the source" if num_references == 1 else f"{num_references} are read for the avatar"
            wanted = f"expected at least {num_references + 1}: {are}, the others drive"
            found = f"{len(clip)} frame" + ("" if len(clip) == 1 else "s")
            raise ValueError(f"{path}: subject {clip.subject_id!r} has {found}, {wanted}")
        if clip.size != clips[0].size:
            others = f"those of {clips[0].subject_id!r} {clips[0].size}; resize them to one size"
            raise ValueError(f"{path}: images of {clip.subject_id!r} are {clip.size} pixels (width, height), {others}")
    return clips if num_references == 1 else [clip.with_references(num_references) for clip in clips]


def digest(clips: Sequence[Clip]) -> str:
    """16 hex digits of a hash of all images, cameras and head parameters. Opens every image once."""
    found = hashlib.sha256()
    with tqdm(total=sum(map(len, clips)), desc="reading the dataset", unit="frame", leave=False) as progress:
        for clip in clips:
            found.update(f"{clip.subject_id}/{clip.numbers}/{clip.size}".encode())
            for value in (clip.cameras.viewmats, clip.cameras.Ks, *clip.params.tensors().values()):
                found.update(value.contiguous().numpy().tobytes())
            for row in range(len(clip)):
                found.update(clip.read(row).tobytes())
                progress.update()
    return found.hexdigest()[:16]


def on_white(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an image with or without transparency."""
    rgba = np.asarray(image.convert("RGBA"), np.uint32)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _tracked_clip(folder: Path, head: HeadModel, camera: int | None, num_frames: int | None) -> Clip:
    tracking = load_tracking(folder, head)
    rows = _choose_frames(str(folder), [(f.camera, f.timestep) for f in tracking.frames], camera, num_frames)
    timesteps = torch.tensor([tracking.row(tracking.frames[row]) for row in rows])
    per_frame: dict[str, Any] = {name: value[timesteps] for name, value in tracking.params.per_frame().items()}
    params = replace(tracking.params, layout=None, **per_frame)

    def read(row: int) -> Image.Image:
        return Image.fromarray((tracking.image(rows[row]).numpy() * 255 + 0.5).astype(np.uint8))

    numbers = [tracking.frames[row].camera for row in rows]
    return Clip(tracking.subject_id, numbers, tracking.cameras(rows), params, read)


def _corpus_clips(
    path: str | os.PathLike, head: HeadModel, split: str, camera: int | None, num_frames: int | None
) -> list[Clip]:
    corpus = load_corpus(path)
    made_on = corpus.manifest["head"]
    if made_on["hash"] != head.hash:
        expected = f"the pipeline expects {head.name!r} (hash {head.hash})"
        raise ValueError(f"{path}: made on head model {made_on['name']!r} (hash {made_on['hash']}), but {expected}")
    avatars, frames = corpus.avatars(split), corpus.frames(split)
    rows_of = corpus.frame_rows(split)
    poses = frames.remove_columns("image").with_format("numpy")

    def clip(avatar: dict[str, Any]) -> Clip:
        rows = rows_of[avatar["avatar_id"]]
        where = f"{path}: subject {avatar['avatar_id']!r}"
        entries = [poses[row] for row in rows]
        places = [(int(entry["camera"]), int(entry["timestep"])) for entry in entries]
        chosen = _choose_frames(where, places, camera, num_frames)
        taken = [entries[index] for index in chosen]
        sizes = {(int(entry["width"]), int(entry["height"])) for entry in taken}
        if len(sizes) > 1:
            raise ValueError(f"{where} has images of {sorted(sizes)} pixels; resize them to one size")
        Ks = [[[e["fx"], 0, e["cx"]], [0, e["fy"], e["cy"]], [0, 0, 1]] for e in taken]
        viewmats = torch.tensor(np.stack([entry["viewmat"] for entry in taken]), dtype=torch.float64)
        cameras = Cameras(viewmats, torch.tensor(Ks, dtype=torch.float64), *sizes.pop())
        values = {name: np.stack([entry[name] for entry in taken]) for name in FRAME_KEYS}
        values |= {name: avatar[name] for name in STATIC_KEYS if avatar.get(name) is not None}
        tensors: dict[str, Any] = {name: torch.tensor(each, dtype=torch.float32) for name, each in values.items()}

        def read(row: int) -> Image.Image:
            return frames[rows[chosen[row]]]["image"].convert("RGBA")

        numbers = [places[index][0] for index in chosen]
        return Clip(avatar["avatar_id"], numbers, cameras, HeadParameters(**tensors), read)

    columns = [name for name in ("avatar_id", *STATIC_KEYS) if name in avatars.features]
    return [clip(avatar) for avatar in avatars.select_columns(columns)]


def _choose_frames(
    where: str, places: Sequence[tuple[int, int]], camera: int | None, num_frames: int | None
) -> list[int]:
    """Indices of the frames to take, given (camera, timestep) of each, in order of camera, then time."""
    if not places:
        raise ValueError(f"{where} has no images")
    cameras = sorted({number for number, _ in places})
    if camera is not None and camera not in cameras:
        raise ValueError(f"{where} has no camera {camera}; it has {', '.join(map(str, cameras))}")
    chosen: list[int] = []
    for number in cameras if camera is None else [camera]:
        own = [row for row, place in enumerate(places) if place[0] == number]
        chosen += sorted(own, key=places.__getitem__)[:num_frames]
    return chosen
