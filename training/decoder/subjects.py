"""Subjects with images, for the Gaussian decoder: one source portrait to read, several frames to be drawn like.

Item i of `TrainSubjects` depends on the seed and on i alone, as the windows of pre-training do: a resumed run sees the same. The
source is the subject's first image (VHAP: first timestep, first camera), or a random one. Each target comes with its camera,
the expression and pose of its moment, and a background on which truth and drawing are both laid, so that opacity is learned.

Axes: B subjects, C target frames, H W pixels, S shape, E expression.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from gaussian_tokenizer.corpus.corpus import Corpus
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras
from training.common.rows import AvatarRows

BACKGROUNDS = (0.0, 0.5, 1.0)  # gray levels of training (LAM)


class SubjectRows:
    """Random access to the subjects of one split: sequence, condition, shape and images."""

    def __init__(self, corpus: Corpus, split: str, use_heads: bool, max_subjects: int | None = None):
        self.rows = AvatarRows(corpus, split, use_images=True, use_heads=use_heads)
        self.tokenizer = self.rows.tokenizer
        self.frames = corpus.frames(split)
        shapes = [name for name in ("shape", "static_offset") if name in self.rows.avatars.column_names]
        self.shapes = self.rows.avatars.select_columns(shapes)
        self.max_subjects = max_subjects

    def __len__(self) -> int:
        return len(self.rows) if self.max_subjects is None else min(len(self.rows), self.max_subjects)

    def frame_rows(self, row: int) -> range:
        """The rows in `frames` of a subject."""
        return self.rows.frame_rows[self.rows.ids[row]]

    def subject(self, row: int, pick: np.random.Generator | None) -> dict[str, Any]:
        """Sequence (L,), condition (source portrait and mesh), shape (S,) and, where there is one, static_offset (V, 3)."""
        shapes = {name: np.asarray(value, np.float32) for name, value in self.shapes[row].items()}
        return {"input_ids": self.rows.sequence(row)} | shapes | self.rows.condition(row, pick)

    def targets(self, frame_rows: list[int]) -> dict[str, np.ndarray]:
        """Images (C, H, W, 4) float32 in 0..1 with their opacity, cameras and head parameters of those frames.

        Raises:
            ValueError: two images are not of one size.
        """
        frames = [self.frames[row] for row in frame_rows]
        images = [rgba(frame["image"]) for frame in frames]
        for frame, image in zip(frames, images):
            if image.shape != images[0].shape:
                sizes = [f"{found.shape[1]}x{found.shape[0]}" for found in (images[0], image)]
                raise ValueError(
                    f"images of {frame['avatar_id']!r} are of {sizes[0]} and {sizes[1]} pixels; "
                    "the frames of a corpus must be of one size to be learned from together: resize them"
                )
        Ks = np.zeros((len(frames), 3, 3), np.float32)
        for K, frame in zip(Ks, frames):
            K[:] = [[frame["fx"], 0, frame["cx"]], [0, frame["fy"], frame["cy"]], [0, 0, 1]]
        return {
            "images": np.stack(images),
            "viewmats": np.asarray([frame["viewmat"] for frame in frames], np.float32),
            "Ks": Ks,
            **{name: np.asarray([frame[name] for frame in frames], np.float32) for name in FRAME_KEYS},
        }


class TrainSubjects(Dataset):
    """`num_items` subjects with `num_targets` of their frames each; in every epoch each subject once.

    Args:
        random_source: read any image of a subject instead of its first.
        generated_sequences: of every subject, a sequence to be read in the place of the true one (see `generated_sequences`), ..
        self_generated_ratio: .. and in which share of the items.
    """

    def __init__(
        self,
        subjects: SubjectRows,
        num_items: int,
        num_targets: int,
        seed: int,
        random_source: bool,
        generated_sequences: Sequence[np.ndarray] = (),
        self_generated_ratio: float = 0.0,
    ):
        self.subjects, self.num_items, self.num_targets = subjects, num_items, num_targets
        self.seed, self.random_source = seed, random_source
        self.generated_sequences, self.self_generated_ratio = generated_sequences, self_generated_ratio

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(index, len(self.subjects))
        row = int(np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.subjects))[position])
        random = np.random.default_rng((self.seed, 1, index))
        item = self.subjects.subject(row, random if self.random_source else None)
        rows = self.subjects.frame_rows(row)
        chosen = random.choice(len(rows), self.num_targets, replace=len(rows) < self.num_targets)
        background = random.choice(BACKGROUNDS, self.num_targets).astype(np.float32)
        if random.random() < self.self_generated_ratio:
            item["input_ids"] = self.generated_sequences[row]
        return item | self.subjects.targets([rows[i] for i in chosen]) | {"background": background}


class EvaluationSubjects(Dataset):
    """Every frame of every subject once, on white; subjects with more than `max_frames` frames give evenly spread ones."""

    def __init__(self, subjects: SubjectRows, max_frames: int):
        self.subjects, self.max_frames = subjects, max_frames

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, row: int) -> dict[str, Any]:
        chosen = self.frame_rows(row)
        background = np.ones(len(chosen), np.float32)
        return self.subjects.subject(row, None) | self.subjects.targets(chosen) | {"background": background}

    def frame_rows(self, row: int) -> list[int]:
        """The frames of a subject that are looked at."""
        rows = self.subjects.frame_rows(row)
        count = min(len(rows), self.max_frames)
        return [rows[i * len(rows) // count] for i in range(count)]


def rgba(image: Image.Image) -> np.ndarray:
    """(H, W, 4) float32 in 0..1. An image without transparency is opaque: its background is part of it."""
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit gray
        gray = np.asarray(image, np.float32) / 65535
        return np.stack((gray, gray, gray, np.ones_like(gray)), -1)
    return np.asarray(image.convert("RGBA"), np.float32) / 255


def collate_subjects(items: list[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack subjects: ids (B, L) padded on the right, everything else (B, ...) or (B, C, ...)."""
    longest = max(len(item["input_ids"]) for item in items)
    input_ids = torch.full((len(items), longest), pad_token_id)
    for row, item in zip(input_ids, items):
        row[: len(item["input_ids"])] = torch.from_numpy(item["input_ids"])
    others = {name for name in items[0] if name != "input_ids"}
    for name in sorted(others):
        shapes = {item[name].shape for item in items}
        if len(shapes) > 1:
            raise ValueError(f"subjects of one batch have {name} of shapes {sorted(shapes)}; they must agree")
    return {"input_ids": input_ids} | {
        name: torch.from_numpy(np.stack([item[name] for item in items])) for name in sorted(others)
    }


def cameras_of(batch: Mapping[str, torch.Tensor], row: int) -> Cameras:
    """The cameras of one subject's target frames."""
    height, width = batch["images"].shape[2:4]
    return Cameras(viewmats=batch["viewmats"][row], Ks=batch["Ks"][row], width=width, height=height)


def motion_of(batch: Mapping[str, torch.Tensor], row: int) -> HeadParameters:
    """Head parameters of one subject's target frames, T = C."""
    static_offset = batch["static_offset"][row] if "static_offset" in batch else None
    return HeadParameters(
        shape=batch["shape"][row], static_offset=static_offset, **{name: batch[name][row] for name in FRAME_KEYS}
    )


def on_background(images: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """(C, H, W, 4) over gray levels (C,) -> (C, H, W, 3)."""
    color, alpha = images.split((3, 1), dim=-1)
    return color * alpha + background[:, None, None, None] * (1 - alpha)


def mean_images(train: SubjectRows) -> dict[int, torch.Tensor]:
    """camera -> mean training image (H, W, 3) on white: the baseline that knows nobody."""
    sums: dict[int, list] = {}
    for row, camera in enumerate(train.frames["camera"]):
        image = on_background(torch.from_numpy(train.targets([row])["images"]), torch.ones(1))[0]
        total = sums.setdefault(camera, [torch.zeros_like(image), 0])
        total[0] += image
        total[1] += 1
    return {camera: total / count for camera, (total, count) in sums.items()}
