"""A tracked subject: images, cameras and head parameters, as a face tracker leaves them; the input of a fit.

A reader (`vhap`, `pixel3dmm`) returns a `Recording`, which `loading.load_tracking` turns into a `Tracking`. Frames hold
paths, so an image is decoded when it is asked for.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gaussian_tokenizer.captures.frame import Frame, has_alpha, load_image
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class Tracking:
    """One tracked subject."""

    subject_id: str
    path: Path
    kind: str  # "vhap", "monocular" (one camera), "union", "vhap_raw" or "pixel3dmm"
    frames: tuple[Frame, ...]  # by timestep, then camera
    timesteps: tuple[int, ...]  # T of them, sorted
    params: HeadParameters  # T rows; row t belongs to timesteps[t]
    # "train", "val" (held-out camera) and "test" (held-out timesteps): indices into frames
    splits: dict[str, tuple[int, ...]]
    metadata: dict[str, Any]

    def row(self, frame: Frame) -> int:
        """The row of `params` at the timestep of a frame."""
        return self.timesteps.index(frame.timestep)

    def cameras(self, indices: Sequence[int]) -> Cameras:
        """The cameras of some frames, float64; ValueError if their images differ in size."""
        chosen = [self.frames[index] for index in indices]
        sizes = Counter((frame.width, frame.height) for frame in chosen)
        if len(sizes) != 1:
            found = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sorted(sizes.items()))
            raise ValueError(f"{self.path}: images of different sizes: {found or 'none'}; expected one size")
        viewmats, Ks = (np.stack([getattr(frame, name) for frame in chosen]) for name in ("viewmat", "K"))
        return Cameras(torch.from_numpy(viewmats), torch.from_numpy(Ks), chosen[0].width, chosen[0].height)

    def image(self, index: int) -> torch.Tensor:
        """(H, W, 4) float32 in 0..1, colors as in the file (straight alpha).

        Alpha is the PNG's own, else the mask, else 1. Where the mask is soft, the color contains some background.
        """
        frame = self.frames[index]
        image = load_image(frame.image)
        if has_alpha(image):
            rgba = np.asarray(image.convert("RGBA"))
        else:
            alpha = 255 if frame.mask is None else np.asarray(load_image(frame.mask).convert("L"))
            rgb = np.asarray(image.convert("RGB"))
            rgba = np.dstack((rgb, np.broadcast_to(np.asarray(alpha, np.uint8), rgb.shape[:2])))
        return torch.from_numpy(rgba.astype(np.float32) / 255)


@dataclass(frozen=True, eq=False)
class Recording:
    """Frames and head parameters as read, before any check that they fit together."""

    frames: list[Frame]  # by timestep, then camera
    timesteps: tuple[int, ...]  # T of them, sorted
    params: HeadParameters  # T rows
    splits: dict[str, list[int]] | None = None  # None: not in the data, VHAP's rule is used
    metadata: dict[str, Any] = field(default_factory=dict)


def join_params(of_timestep: Mapping[int, HeadParameters], names: Mapping[int, str]) -> HeadParameters:
    """Join the parameters of each timestep (T = 1) to T rows, with the shape and static offset of the first.

    ValueError that gives the name of an entry with more than one frame, or with other sizes than the first.
    """
    timesteps = sorted(of_timestep)
    first = of_timestep[timesteps[0]]
    for timestep in timesteps:
        each = of_timestep[timestep]
        if each.num_frames != 1:
            raise ValueError(
                f"{names[timestep]}: holds {each.num_frames} frames, expected the 1 of timestep {timestep}; "
                "is it the file of a whole sequence?"
            )
        for key, value in first.tensors().items():
            other = each.tensors().get(key)
            if other is None or other.shape != value.shape:
                found = "missing" if other is None else tuple(other.shape)
                raise ValueError(
                    f"{names[timestep]}: {key} is {found}, in {names[timesteps[0]]} it is {tuple(value.shape)}; "
                    "all must be of one head model and one tracking"
                )
    per_frame: dict[str, Any] = {
        key: torch.cat([of_timestep[timestep].tensors()[key] for timestep in timesteps])
        for key in (*FRAME_KEYS, "dynamic_offset")
        if key in first.tensors()
    }
    return replace(first, layout=None, **per_frame)


def find_image(folders: Sequence[Path], stem: str) -> Path | None:
    """The image of this name in the first folder that has it, with any of IMAGE_SUFFIXES."""
    paths = (folder / f"{stem}{suffix}" for folder in folders for suffix in IMAGE_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)
