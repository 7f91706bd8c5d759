"""What the readers of trackers' output (`vhap`, `pixel3dmm`) return, a `Recording`, and the helpers they share.

`loading` turns a recording into a `Tracking`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


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
