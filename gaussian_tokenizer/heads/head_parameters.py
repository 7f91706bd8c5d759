"""The parameters of a head model, one subject's identity and a sequence of frames, and their file `flame_param.npz`.

Names, shapes and units are those of VHAP and GaussianAvatars. A file that is read is written back byte for byte.
"""

import operator
import os
import zipfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.npz import read_npz

FRAME_KEYS = {"expr": None, "rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}
ROTATION_KEYS = ("rotation", "neck_pose", "jaw_pose", "eyes_pose")  # of the joints, in their order
REQUIRED_KEYS = ("shape", *FRAME_KEYS)
OFFSET_KEYS = ("static_offset", "dynamic_offset")


@dataclass(frozen=True, eq=False)
class NpzLayout:
    """How a parameter file was stored, beyond its tensors."""

    keys: tuple[str, ...] = (*REQUIRED_KEYS, *OFFSET_KEYS)
    static_offset_ndim: int = 3  # (1, V, 3); or 2 for (V, 3)
    compression: int = zipfile.ZIP_STORED
    other_arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class HeadParameters:
    """Head parameters of T frames; float32 tensors (as stored). S shape size, E expression size, V vertices."""

    shape: Tensor  # (S,)
    expr: Tensor  # (T, E)
    rotation: Tensor  # (T, 3) axis-angle, radians, about the root joint
    neck_pose: Tensor  # (T, 3)
    jaw_pose: Tensor  # (T, 3)
    eyes_pose: Tensor  # (T, 6) left, right
    translation: Tensor  # (T, 3) meters, applied last
    static_offset: Tensor | None = None  # (V, 3) meters
    dynamic_offset: Tensor | None = None  # (T, V, 3) meters
    layout: NpzLayout | None = None

    def __post_init__(self) -> None:
        _check_shapes("head parameters", {name: tuple(value.shape) for name, value in self.tensors().items()})
        for name, value in self.tensors().items():
            if not value.is_floating_point():
                raise ValueError(f"head parameters: {name} is {value.dtype}, expected torch.float32")

    @property
    def num_frames(self) -> int:
        return self.expr.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, without the offsets that are None."""
        values = {f.name: self.__dict__[f.name] for f in fields(self) if f.name != "layout"}
        return {name: value for name, value in values.items() if value is not None}

    def per_frame(self) -> dict[str, Tensor]:
        """The parameters that have an axis of frames."""
        return {name: value for name, value in self.tensors().items() if name not in ("shape", "static_offset")}

    def frame(self, index: int | slice) -> "HeadParameters":
        """One frame (as T = 1) or a slice of frames; shape and static offset stay."""
        if not isinstance(index, slice):
            index = operator.index(index)
            if not -self.num_frames <= index < self.num_frames:
                raise ValueError(f"frame {index} asked of head parameters that hold {self.num_frames} frames")
            index = slice(index % self.num_frames, index % self.num_frames + 1)
        return replace(self, layout=None, **{name: value[index] for name, value in self.per_frame().items()})

    def canonical(self, jaw_angle: float = 0.0) -> "HeadParameters":
        """T = 1: own shape and static offset, everything else zero; the jaw opened by `jaw_angle`, radians."""
        rest = {name: torch.zeros_like(value[:1]) for name, value in self.per_frame().items()}
        rest["jaw_pose"][:, 0] = jaw_angle
        return replace(self, layout=None, **rest)

    def with_offsets(self, n_vertices: int | None = None) -> "HeadParameters":
        """The same with both offsets, as GaussianAvatars' viewer needs, zeros where one is None; ValueError if V is unknown."""
        static, dynamic = self.static_offset, self.dynamic_offset
        size = next((offset.shape[-2] for offset in (static, dynamic) if offset is not None), n_vertices)
        if size is None:
            raise ValueError("head parameters without offsets do not say how many vertices their head model has")
        if static is None:
            static = self.expr.new_zeros(size, 3)
        if dynamic is None:
            dynamic = self.expr.new_zeros(1, size, 3).expand(self.num_frames, -1, -1)
        return replace(self, static_offset=static, dynamic_offset=dynamic)

    @classmethod
    def zeros(cls, shape_size: int, expression_size: int, num_frames: int = 1) -> "HeadParameters":
        """The mean head at rest, without offsets."""
        per_frame: dict[str, Any] = {
            name: torch.zeros(num_frames, size or expression_size) for name, size in FRAME_KEYS.items()
        }
        return cls(shape=torch.zeros(shape_size), **per_frame)

    def to(self, like: torch.device | str | torch.dtype | Tensor) -> "HeadParameters":
        moved: dict[str, Any] = {name: value.to(like) for name, value in self.tensors().items()}
        return replace(self, **moved)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadParameters":
        """Read a `flame_param.npz`: of a GaussianAvatars avatar (T frames) or of one VHAP frame (T = 1).

        ValueError, in one line that names file, key and row, for anything but finite arrays of agreeing shapes.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such head parameter file (flame_param.npz)")
        arrays, compression = read_npz(path, (*REQUIRED_KEYS, *OFFSET_KEYS))
        missing = [key for key in REQUIRED_KEYS if key not in arrays]
        if missing:
            raise ValueError(
                f"{path}: lacks {', '.join(missing)}; a head parameter file has {', '.join(REQUIRED_KEYS)}"
            )
        values = {key: arrays[key] for key in (*REQUIRED_KEYS, *OFFSET_KEYS) if key in arrays}
        for key, value in values.items():
            if value.dtype.kind != "f" or value.dtype.itemsize != 4:
                raise ValueError(f"{path}: {key} is {value.dtype}, expected float32")
            finite = np.isfinite(value)
            if not finite.all():
                row = np.argwhere(~finite)[0].tolist()
                raise ValueError(f"{path}: {key} holds {value[tuple(row)]} at index {row}; every value must be finite")
        static = values.get("static_offset")
        if static is not None and static.ndim == 3:
            if len(static) != 1:
                raise ValueError(f"{path}: static_offset is {static.shape}, expected (1, V, 3)")
            values["static_offset"] = static[0]
        _check_shapes(path, {key: value.shape for key, value in values.items()})
        other = {key: value for key, value in arrays.items() if key not in values}
        layout = NpzLayout(tuple(arrays), 3 if static is None else static.ndim, compression, other)
        # A contiguous copy in native byte order, as torch needs it; the file's buffer is freed.
        tensors = {key: torch.from_numpy(np.array(value, np.float32, order="C")) for key, value in values.items()}
        return cls(**tensors, layout=layout)

    def save(self, path: str | os.PathLike) -> None:
        """Write a `flame_param.npz`, atomically; of parameters that were loaded and not changed, the same bytes."""
        with atomic_file(path) as file:
            self.write(file)

    def write(self, file: BinaryIO) -> None:
        """Write the npz into an open binary file."""
        layout = self.layout or NpzLayout()
        arrays = {name: value.detach().cpu().float().contiguous().numpy() for name, value in self.tensors().items()}
        if "static_offset" in arrays and layout.static_offset_ndim == 3:
            arrays["static_offset"] = arrays["static_offset"][None]
        everything = {**arrays, **layout.other_arrays}
        ordered = [key for key in layout.keys if key in everything]
        ordered += [key for key in everything if key not in layout.keys]
        # As np.savez, entry for entry, but with any key names.
        with zipfile.ZipFile(file, "w", layout.compression) as archive:
            for key in ordered:
                with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, everything[key], allow_pickle=False)


def _check_shapes(what: object, shapes: dict[str, tuple[int, ...]]) -> None:
    """`ValueError` if the shapes of the parameters of `what` are wrong or disagree."""
    num_frames = next(iter(shapes["expr"]), 0)
    of_frames = f": expr holds {num_frames} frames"
    rules = [
        ("shape", len(shapes["shape"]) == 1, "(S,)"),
        ("expr", len(shapes["expr"]) == 2 and num_frames > 0, "(T, E) with at least one frame"),
    ]
    for name, size in FRAME_KEYS.items():
        if size:
            rules.append((name, shapes[name] == (num_frames, size), f"({num_frames}, {size}){of_frames}"))
    static, dynamic = (shapes.get(name) for name in OFFSET_KEYS)
    if static is not None:
        rules.append(("static_offset", len(static) == 2 and static[1] == 3, "(V, 3) or in a file (1, V, 3)"))
    if dynamic is not None:
        fits = len(dynamic) == 3 and dynamic[::2] == (num_frames, 3)
        rules.append(("dynamic_offset", fits, f"({num_frames}, V, 3){of_frames}"))
    for name, fits, expected in rules:
        if not fits:
            raise ValueError(f"{what}: {name} is {shapes[name]}, expected {expected}")
    if static and dynamic and static[0] != dynamic[1]:
        raise ValueError(
            f"{what}: static_offset is of {static[0]} vertices, dynamic_offset of {dynamic[1]}; expected one head model"
        )
