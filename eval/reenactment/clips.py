"""What the bench is run on: clips, each the frames of one tracked subject, camera after camera, over time.

A dataset is a folder of tracked subjects, as `gaussian_tokenizer.captures` reads them (VHAP exports, Pixel3DMM's output, what
`python -m gaussian_tokenizer.synthesize` writes), or a corpus folder, of which one split is read. Every image comes with its
camera and the head parameters of its moment. Images are opened when they are asked for, and laid on white.
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
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.corpus.corpus import MANIFEST_NAME, is_url, load_corpus
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras

FILE_NAME = re.compile(r"[^\x00-\x1f/\\.][^\x00-\x1f/\\]*")  # subjects name files and folders


@dataclass(frozen=True, eq=False)
class Clip:
    """T frames of one subject: in order of camera, then of time. The first is the source of the bench."""

    subject_id: str
    numbers: list[int]  # T, of the cameras
    cameras: Cameras  # T of them, float64
    params: HeadParameters  # T rows
    read: Callable[[int], Image.Image]  # row -> image as stored, RGBA

    def __len__(self) -> int:
        return len(self.cameras)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.cameras.width, self.cameras.height

    def portrait(self) -> Image.Image:
        """The first image with its transparency: what a method makes an avatar of."""
        return self.read(0)

    def image(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8, on white."""
        return on_white(self.read(row))

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """(N, H, W, 3) uint8, on white."""
        return np.stack([self.image(row) for row in rows])


def open_dataset(
    path: str | os.PathLike,
    head: HeadModel,
    split: str = "validation",
    camera: int | None = None,
    num_subjects: int | None = None,
    num_frames: int | None = None,
) -> list[Clip]:
    """The clips of a dataset in the order of their subjects' names, one a subject.

    `camera` is the number of the camera to take (None: all of them), `num_subjects` takes the first so many
    subjects, `num_frames` the first so many frames of each camera. ValueError or FileNotFoundError that names the subject for
    what cannot be read, a head model of another kind, images of several sizes (distances in pixels would mean
    different things), fewer than two frames, and a subject id that cannot name a file.
    """
    path = Path(path) if not is_url(str(path)) else path
    of_corpus = not isinstance(path, Path) or (path / MANIFEST_NAME).is_file()
    chosen = camera, num_frames
    clips = _corpus_clips(path, head, split, *chosen) if of_corpus else _tracked_clips(Path(path), head, *chosen)
    clips = sorted(clips, key=lambda clip: clip.subject_id)[:num_subjects]
    for clip in clips:
        if not FILE_NAME.fullmatch(clip.subject_id):
            raise ValueError(f"{path}: subject id {clip.subject_id!r} cannot name a file; give it another avatar_id")
        if len(clip) < 2:
            raise ValueError(
                f"{path}: subject {clip.subject_id!r} has {len(clip)} frame, expected at least "
                "2: the first is the source, the others drive"
            )
        if clip.size != clips[0].size:
            raise ValueError(
                f"{path}: images of {clip.subject_id!r} are of {clip.size} pixels (width, height), those of "
                f"{clips[0].subject_id!r} of {clips[0].size}; resize them to one size"
            )
    return clips


def digest(clips: Sequence[Clip]) -> str:
    """16 hex digits over everything a run reads: images, cameras and head parameters. Opens every image once."""
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


def _tracked_clips(path: Path, head: HeadModel, camera: int | None, num_frames: int | None) -> list[Clip]:
    clips = []
    for folder in tqdm(find_trackings(path), desc="opening the dataset", unit="subject", leave=False):
        tracking = load_tracking(folder, head)
        made_on = tracking.metadata.get("head_hash")
        if made_on not in (None, head.hash):
            raise ValueError(
                f"{folder}: was tracked on head model {tracking.metadata.get('head_name')!r} (hash {made_on}), the model "
                f"is made for {head.name!r} (hash {head.hash})"
            )
        places = [(frame.camera, frame.timestep) for frame in tracking.frames]
        rows = _choose_frames(str(folder), places, camera, num_frames)
        moments = torch.tensor([tracking.row(tracking.frames[index]) for index in rows])
        params = _take(tracking.params, moments)
        numbers = [places[row][0] for row in rows]
        clips.append(
            Clip(tracking.subject_id, numbers, tracking.cameras(rows), params, _tracked_reader(tracking, rows))
        )
    return clips


def _tracked_reader(tracking: Tracking, rows: list[int]) -> Callable[[int], Image.Image]:
    def read(row: int) -> Image.Image:
        return Image.fromarray((tracking.image(rows[row]).numpy() * 255 + 0.5).astype(np.uint8))

    return read


def _corpus_clips(
    path: str | os.PathLike, head: HeadModel, split: str, camera: int | None, num_frames: int | None
) -> list[Clip]:
    corpus = load_corpus(path)
    made_on = corpus.manifest["head"]
    if made_on["hash"] != head.hash:
        raise ValueError(
            f"{path}: was made on head model {made_on['name']!r} (hash {made_on['hash']}), the model is made for "
            f"{head.name!r} (hash {head.hash})"
        )
    avatars, frames = corpus.avatars(split), corpus.frames(split)
    rows_of = corpus.frame_rows(split)
    poses = frames.remove_columns("image").with_format("numpy")
    clips = []
    for avatar in avatars.select_columns([c for c in ("avatar_id", "shape", "static_offset") if c in avatars.features]):
        own = rows_of[avatar["avatar_id"]]
        where = f"{path}: subject {avatar['avatar_id']!r}"
        entries = [poses[row] | {"row": row} for row in own]
        places = [(int(entry["camera"]), int(entry["timestep"])) for entry in entries]
        taken = [entries[index] for index in _choose_frames(where, places, camera, num_frames)]
        sizes = {(int(entry["width"]), int(entry["height"])) for entry in taken}
        if len(sizes) > 1:
            raise ValueError(f"{where} has images of {sorted(sizes)} pixels; resize them to one size")
        Ks = [[[e["fx"], 0, e["cx"]], [0, e["fy"], e["cy"]], [0, 0, 1]] for e in taken]
        cameras = Cameras(
            torch.tensor(np.stack([e["viewmat"] for e in taken]), dtype=torch.float64),
            torch.tensor(np.array(Ks, np.float64)),
            *sizes.pop(),
        )
        static = avatar.get("static_offset")
        moving: dict[str, Any] = {name: torch.tensor(np.stack([e[name] for e in taken])).float() for name in FRAME_KEYS}
        params = HeadParameters(
            shape=torch.tensor(avatar["shape"], dtype=torch.float32),
            static_offset=None if static is None else torch.tensor(static, dtype=torch.float32),
            **moving,
        )
        numbers = [int(entry["camera"]) for entry in taken]
        clips.append(Clip(avatar["avatar_id"], numbers, cameras, params, _corpus_reader(frames, taken)))
    return clips


def _corpus_reader(frames, entries: list[dict]) -> Callable[[int], Image.Image]:
    def read(row: int) -> Image.Image:
        return frames[entries[row]["row"]]["image"].convert("RGBA")

    return read


def _choose_frames(
    where: str, places: Sequence[tuple[int, int]], camera: int | None, num_frames: int | None
) -> list[int]:
    """Indices of the frames, given (camera, timestep) of each: of the wanted camera or of all, the first of each."""
    if not places:
        raise ValueError(f"{where} has no images")
    cameras = sorted({number for number, _ in places})
    if camera is not None and camera not in cameras:
        raise ValueError(f"{where} has no camera {camera}; it has {', '.join(map(str, cameras))}")
    order = sorted(range(len(places)), key=places.__getitem__)
    wanted = cameras if camera is None else [camera]
    return [row for number in wanted for row in [row for row in order if places[row][0] == number][:num_frames]]


def _take(params: HeadParameters, rows: torch.Tensor) -> HeadParameters:
    """Frames in this order."""
    per_frame: dict[str, Any] = {
        name: value[rows] for name, value in params.tensors().items() if name not in ("shape", "static_offset")
    }
    return replace(params, layout=None, **per_frame)
