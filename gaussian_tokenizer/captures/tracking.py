"""A tracked subject: images, cameras and head parameters, as a face tracker leaves them; the input of a fit."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gaussian_tokenizer.captures.frame import Frame, has_alpha, load_image
from gaussian_tokenizer.heads.head_parameters import HeadParameters
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


class Recording(NamedTuple):
    """Frames and head parameters as read, before any check that they fit together."""

    frames: list[Frame]  # by timestep, then camera
    timesteps: tuple[int, ...]  # T of them, sorted
    params: HeadParameters  # T rows
    splits: dict[str, list[int]] | None  # None: not in the data, VHAP's rule is used
    metadata: dict[str, Any]


def find_image(folders: Sequence[Path], stem: str) -> Path | None:
    """The image of this name in the first folder that has it, with any of IMAGE_SUFFIXES."""
    paths = (folder / f"{stem}{suffix}" for folder in folders for suffix in IMAGE_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)
