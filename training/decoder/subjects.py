"""Subjects with images, for the Gaussian decoder: a source portrait as input, and several frames as targets.

The source is the subject's first image, or a random one; further images may be read with it. Each target comes with its camera,
the expression and pose of its timestep, and a background for both the true and the rendered image, so that opacity is learned.
Axes: B subjects, C target frames, K images that are read, H W pixels, S shape, E expression.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gaussian_tokenizer.corpus.corpus import Corpus
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.image_metrics import psnr, ssim
from gaussian_tokenizer.rendering.portrait_points import Portrait
from gaussian_tokenizer.tokenizer.processing_conditions import portrait_rgba
from training.common.portraits import PortraitAugmentation, laid_on, plain_portraits
from training.common.rows import AvatarRows, shuffled_row

BACKGROUNDS = (0.0, 0.5, 1.0)  # gray levels of training (LAM)
PORTRAIT = "portrait_"  # before the names of its camera and head parameters in a batch


class SubjectRows:
    """The subjects of one split: sequence, portrait and other `inputs` of the point model, shape and images."""

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        inputs: Iterable[str] = (),
        max_subjects: int | None = None,
        read_portrait: bool = False,
        head: HeadModel | None = None,
    ):
        self.rows = AvatarRows(corpus, split, {"pixel_values", *inputs}, head)
        self.tokenizer = self.rows.tokenizer
        self.frames = corpus.frames(split)
        shapes = [name for name in ("shape", "static_offset") if name in self.rows.avatars.column_names]
        self.shapes = self.rows.avatars.select_columns(shapes)
        self.max_subjects, self.read_portrait = max_subjects, read_portrait

    def __len__(self) -> int:
        return len(self.rows) if self.max_subjects is None else min(len(self.rows), self.max_subjects)

    def frame_rows(self, row: int) -> range:
        """The rows in `frames` of a subject."""
        return self.rows.frame_rows[self.rows.ids[row]]

    def subject(
        self, row: int, read: list[int] | None = None, augmentation: PortraitAugmentation | None = None
    ) -> dict[str, Any]:
        """Sequence (L,), condition (source portrait and mesh), shape (S,) and, where there is one, static_offset (V, 3).

        `read` are the rows in `frames` of the source, by default the subject's first, and of further images. With `read_portrait`
        also all of these (K, 4, H, W) as the pipeline would give them, and their cameras and head parameters (K, ...).
        """
        read = read or [self.rows.portrait_row(row, None)]
        shapes = {name: np.asarray(value, np.float32) for name, value in self.shapes[row].items()}
        images = [self.frames[each]["image"] for each in read]
        images = images if augmentation is None else [augmentation(image) for image in images]
        condition = self.rows.condition(row, None, read[0], images[0])
        subject = {"input_ids": self.rows.sequence(row)} | shapes | condition
        if self.read_portrait:
            own = self.targets(read)
            height, width = own.pop("images").shape[1:3]
            portrait = np.stack([portrait_rgba(image, self.tokenizer.image_size) for image in images])
            own["Ks"] *= np.float32([[portrait.shape[3] / width], [portrait.shape[2] / height], [1]])
            subject["portrait"] = portrait
            subject |= {PORTRAIT + name: value for name, value in own.items()}
        return subject

    def targets(self, frame_rows: list[int]) -> dict[str, np.ndarray]:
        """Images (C, H, W, 4) float32 in 0..1 with their opacity, cameras and head parameters of those frames."""
        frames = [self.frames[row] for row in frame_rows]
        images = [rgba(frame["image"]) for frame in frames]
        for frame, image in zip(frames, images):
            if image.shape != images[0].shape:
                sizes = [f"{found.shape[1]}x{found.shape[0]}" for found in (images[0], image)]
                raise ValueError(
                    f"images of {frame['avatar_id']!r} have {sizes[0]} and {sizes[1]} pixels; "
                    "the target frames of a subject must have one size: resize them"
                )
        Ks = [[[frame["fx"], 0, frame["cx"]], [0, frame["fy"], frame["cy"]], [0, 0, 1]] for frame in frames]
        return {
            "images": np.stack(images),
            "viewmats": np.asarray([frame["viewmat"] for frame in frames], np.float32),
            "Ks": np.asarray(Ks, np.float32),
            **{name: np.asarray([frame[name] for frame in frames], np.float32) for name in FRAME_KEYS},
        }


@dataclass(eq=False)
class TrainSubjects(Dataset):
    """`num_items` subjects with `num_targets` of their frames each; each epoch has every subject once.

    An item with a generated sequence is of a subject that has one, which need not be all (`generated_sequences`). Item i depends
    only on the seed and on i, so a resumed run sees the same items. Those of a step read equally many images.
    """

    subjects: SubjectRows
    num_items: int
    num_targets: int
    seed: int
    random_source: bool  # use a random image of a subject as its portrait instead of the first one
    generated_sequences: Sequence[np.ndarray] = ()  # of the first subjects, or of all; see generated_sequences.py
    self_generated_ratio: float = 0.0  # share of the items that have it instead of the true sequence
    num_references: int = 1  # images of a subject that are read, its source among them, are 1 to this many
    items_per_step: int = 1
    augment_portraits: bool = False

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, random = shuffled_row(index, len(self.subjects), self.seed)
        generated = np.random.default_rng((self.seed, 4, index)).random() < self.self_generated_ratio
        if generated:
            row %= len(self.generated_sequences)
        rows = self.subjects.frame_rows(row)
        read = [self.subjects.rows.portrait_row(row, random if self.random_source else None)]
        if self.num_references > 1:
            step = np.random.default_rng((self.seed, 2, index // self.items_per_step))
            count, others = int(step.integers(self.num_references)), [each for each in rows if each != read[0]] or read
            read += random.choice(others, count, replace=len(others) < count).tolist()
        augmentation = None
        if self.augment_portraits:
            augmentation = PortraitAugmentation(self.seed, index, self.subjects.rows.any_image)
        item = self.subjects.subject(row, read, augmentation)
        if generated:
            item["input_ids"] = self.generated_sequences[row]
        chosen = random.choice(len(rows), self.num_targets, replace=len(rows) < self.num_targets)
        background = random.choice(BACKGROUNDS, self.num_targets).astype(np.float32)
        random.random()  # unused: once the draw of `generated`; without it the portraits' colors would change
        targets = self.subjects.targets([rows[i] for i in chosen])
        if augmentation is not None:  # the color of a pixel stays that of its point
            targets["images"][..., :3] = augmentation.color(targets["images"][..., :3])
        elif self.subjects.read_portrait:
            item["portrait"] = plain_portraits(item["portrait"], random)
        return item | targets | {"background": background}


@dataclass(eq=False)
class EvaluationSubjects(Dataset):
    """Every subject once with its frames, or `max_frames` of them, evenly spaced, on white.

    If several images are read (`num_references`, evenly spaced, the first among them), the others are evaluated; ValueError if a
    subject has no others.
    """

    subjects: SubjectRows
    max_frames: int
    num_references: int = 1

    def __post_init__(self) -> None:
        for row in range(len(self) if self.num_references > 1 else 0):
            found = len(self.subjects.frame_rows(row))
            if found <= self.num_references:
                raise ValueError(
                    f"subject {self.subjects.rows.ids[row]!r} has {found} images, of which --num_references "
                    f"{self.num_references} leaves none to evaluate; give a smaller number"
                )

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, row: int) -> dict[str, Any]:
        rows = self.frame_rows(row)
        background = np.ones(len(rows), np.float32)
        item = self.subjects.subject(row, self.read_rows(row))
        if self.subjects.read_portrait:
            item["portrait"] = laid_on(item["portrait"], np.ones((self.num_references, 3), np.float32))
        return item | self.subjects.targets(rows) | {"background": background}

    def frame_rows(self, row: int) -> list[int]:
        """The rows in `frames` of a subject's frames that are evaluated."""
        rows: Sequence[int] = self.subjects.frame_rows(row)
        if self.num_references > 1:
            rows = sorted(set(rows) - set(self.read_rows(row)))
        return evenly_spaced(rows, min(len(rows), self.max_frames))

    def read_rows(self, row: int) -> list[int]:
        """The rows in `frames` of the images of a subject that are read: the first, and of the others by camera, then time."""
        first, *others = self.subjects.frame_rows(row)
        if self.num_references == 1:
            return [first]
        cameras = dict(zip(others, self.subjects.frames.select_columns("camera")[others]["camera"]))
        return evenly_spaced([first, *sorted(others, key=cameras.__getitem__)], self.num_references)


def evenly_spaced(rows: Sequence[int], count: int) -> list[int]:
    return [rows[i * len(rows) // count] for i in range(count)]


def rgba(image: Image.Image) -> np.ndarray:
    """(H, W, 4) float32 in 0..1. An image without an alpha channel is opaque."""
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit gray
        gray = np.asarray(image, np.float32) / 65535
        return np.stack((gray, gray, gray, np.ones_like(gray)), -1)
    return np.asarray(image.convert("RGBA"), np.float32) / 255


def collate_subjects(items: list[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack subjects: ids (B, L) padded on the right, everything else (B, ...) or (B, C, ...)."""
    ids = [torch.from_numpy(item["input_ids"]) for item in items]
    batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id)}
    for name in items[0]:
        if name in batch:
            continue
        shapes = {item[name].shape for item in items}
        if len(shapes) > 1:
            raise ValueError(f"subjects of one batch have {name} of shapes {sorted(shapes)}; they must agree")
        batch[name] = torch.from_numpy(np.stack([item[name] for item in items]))
    return batch


def cameras_of(batch: Mapping[str, torch.Tensor], row: int) -> Cameras:
    """The cameras of one subject's target frames."""
    height, width = batch["images"].shape[2:4]
    return Cameras(viewmats=batch["viewmats"][row], Ks=batch["Ks"][row], width=width, height=height)


def motion_of(batch: Mapping[str, torch.Tensor], row: int) -> HeadParameters:
    """Head parameters of one subject's target frames, T = C."""
    names = ("shape", "static_offset", *FRAME_KEYS)
    return HeadParameters(**{name: batch[name][row] for name in names if name in batch})


def portrait_of(batch: Mapping[str, torch.Tensor], row: int) -> Portrait:
    """The source portrait of one subject, with its references, of a batch that has it."""
    own = {name.removeprefix(PORTRAIT): value for name, value in batch.items() if name.startswith(PORTRAIT)}
    own |= {name: batch[name] for name in ("shape", "static_offset") if name in batch}
    images, motion = batch["portrait"][row], motion_of(own, row)
    cameras = Cameras(own["viewmats"][row], own["Ks"][row], width=images.shape[3], height=images.shape[2])
    first, *others = (Portrait(image, cameras[i], motion.frame(i)) for i, image in enumerate(images))
    return replace(first, references=tuple(others))


def on_background(images: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """(C, H, W, 4) over gray levels (C,) -> (C, H, W, 3)."""
    color, alpha = images.split((3, 1), dim=-1)
    return color * alpha + background[:, None, None, None] * (1 - alpha)


def mean_images(train: SubjectRows) -> dict[int, torch.Tensor]:
    """camera -> mean training image (H, W, 3) on white: a baseline that knows nothing of the subject."""
    sums: dict[int, list] = {}
    for row, camera in enumerate(train.frames["camera"]):
        image = on_background(torch.from_numpy(train.targets([row])["images"]), torch.ones(1))[0]
        total = sums.setdefault(camera, [torch.zeros_like(image), 0])
        total[0] += image
        total[1] += 1
    return {camera: total / count for camera, (total, count) in sums.items()}


def mean_image_metrics(
    means: Mapping[int, torch.Tensor], subjects: SubjectRows, frame_rows: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """PSNR (dB) and SSIM (C,) of the mean image of the same camera, for those of the frames whose camera has one."""
    cameras = dict(zip(frame_rows, subjects.frames.select_columns("camera")[frame_rows]["camera"]))
    rows = [row for row in frame_rows if cameras[row] in means]
    if not rows:
        return torch.zeros(0), torch.zeros(0)
    truth = on_background(torch.from_numpy(subjects.targets(rows)["images"]), torch.ones(len(rows)))
    predicted = torch.stack([means[cameras[row]] for row in rows])
    return psnr(predicted, truth), ssim(predicted, truth)
