"""Gaussians in PLY files: the layout of 3D Gaussian splatting, with or without the face each one is bound to.

Binary little-endian, every property float32: x y z, nx ny nz (zero), f_dc, f_rest (all of red, then green, then blue),
opacity (logit), scale (natural log), rot (w x y z). With binding_0, the face index, the values are local to the face.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gaussian_tokenizer.utils.atomic import atomic_file

MAX_SH_DEGREE = 3
_MAX_HEADER_BYTES = 65536
_NORMALS = ("nx", "ny", "nz")


@dataclass(frozen=True, eq=False)
class PlyGaussians:
    """N Gaussians as stored: float32 arrays of finite values."""

    positions: np.ndarray  # (N, 3)
    sh: np.ndarray  # (N, K, 3) coefficients, K = (degree + 1)^2
    opacities: np.ndarray  # (N,) logits
    scales: np.ndarray  # (N, 3) natural logs
    quats: np.ndarray  # (N, 4) wxyz, any length
    faces: np.ndarray | None = None  # (N,) int64


def property_names(sh_degree: int, with_faces: bool) -> list[str]:
    """The properties of a file, in order."""
    num_rest = 3 * ((sh_degree + 1) ** 2 - 1)
    names = ["x", "y", "z", *_NORMALS, *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(num_rest))]
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    return [*names, "binding_0"] if with_faces else names


def read_gaussian_ply(path: str | os.PathLike, *, with_faces: bool, n_faces: int | None = None) -> PlyGaussians:
    """Read a GaussianAvatars PLY (`with_faces=True`) or a world-space one (`with_faces=False`), of SH degree 0 to 3.

    `n_faces` checks the face indices against a head model. Raises FileNotFoundError, or ValueError with one line that
    names the file, the property and the row (counted from 0).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such PLY file")
    with open(path, "rb") as file:
        num_rows, names, header_bytes = _read_header(path, file.read(_MAX_HEADER_BYTES))
        degree = _check_properties(path, names, with_faces)
        _check_size(path, os.fstat(file.fileno()).st_size - header_bytes, num_rows, 4 * len(names))
        file.seek(header_bytes)
        rows = np.fromfile(file, "<f4", num_rows * len(names)).reshape(num_rows, len(names))
    rows = rows.astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(f"{path}: property {names[column]} of row {row} is {rows[row, column]}, expected a number")

    column = {name: index for index, name in enumerate(names)}

    def columns(prefix: str, count: int) -> np.ndarray:
        wanted = [column[f"{prefix}{i}"] for i in range(count)]
        if count and wanted == list(range(wanted[0], wanted[0] + count)):  # the usual order: five times faster
            return rows[:, wanted[0] : wanted[0] + count].copy()
        return rows[:, wanted]

    coefficients = (degree + 1) ** 2
    sh = np.empty((num_rows, coefficients, 3), np.float32)
    sh[:, 0] = columns("f_dc_", 3)
    rest = columns("f_rest_", 3 * (coefficients - 1))
    sh[:, 1:] = rest.reshape(num_rows, 3, coefficients - 1).transpose(0, 2, 1)
    return PlyGaussians(
        positions=rows[:, [column[axis] for axis in "xyz"]],
        sh=sh,
        opacities=rows[:, column["opacity"]].copy(),
        scales=columns("scale_", 3),
        quats=columns("rot_", 4),
        faces=_faces(path, rows[:, column["binding_0"]], n_faces) if with_faces else None,
    )


def write_gaussian_ply(target: str | os.PathLike | BinaryIO, gaussians: PlyGaussians) -> None:
    """Write a PLY, atomically (or into an open binary file); with binding_0 where the Gaussians have faces."""
    if isinstance(target, str | os.PathLike):
        with atomic_file(target) as file:
            write_gaussian_ply(file, gaussians)
        return
    num_rows, coefficients, _ = gaussians.sh.shape
    names = property_names(round(coefficients**0.5) - 1, gaussians.faces is not None)
    normals, rest = np.zeros((num_rows, 3), np.float32), gaussians.sh[:, 1:].transpose(0, 2, 1).reshape(num_rows, -1)
    groups = [gaussians.positions, normals, gaussians.sh[:, 0], rest]
    groups += [gaussians.opacities[:, None], gaussians.scales, gaussians.quats]
    if gaussians.faces is not None:
        groups.append(gaussians.faces[:, None])
    rows = np.empty((num_rows, len(names)), "<f4")
    np.concatenate(groups, axis=1, out=rows, casting="same_kind")
    _write_rows(target, rows.view([(name, "<f4") for name in names]))


def write_point_ply(path: str | os.PathLike, positions: np.ndarray, faces: np.ndarray) -> None:
    """Write a cloud of points (N, 3) with the face (N,) of each, atomically: x, y, z as float, face as int."""
    rows = np.empty(len(faces), [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("face", "<i4")])
    rows["x"], rows["y"], rows["z"] = positions.T
    rows["face"] = faces
    with atomic_file(path) as file:
        _write_rows(file, rows)


def _write_rows(file: BinaryIO, rows: np.ndarray) -> None:
    """One element `vertex` of the fields of a structured array, float32 or int32."""
    assert rows.dtype.names is not None
    properties = "".join(
        f"property {'int' if rows.dtype[name].kind == 'i' else 'float'} {name}\n" for name in rows.dtype.names
    )
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{properties}end_header\n"
    file.write(header.encode("ascii"))
    file.write(rows.data)


def _read_header(path: Path, start: bytes) -> tuple[int, list[str], int]:
    """Number of rows, property names and length of the header in bytes."""
    if not re.match(rb"ply\r?\n", start):
        raise ValueError(f"{path}: not a PLY file, it starts with {start[:16]!r} instead of b'ply'")
    end = re.search(rb"\nend_header\r?\n", start)
    if end is None:
        raise ValueError(f"{path}: the PLY header has no end_header; the file is cut short or damaged")
    try:
        lines = start[: end.start()].decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the PLY header holds a byte {start[error.start]:#x} that is not ASCII") from None
    num_rows, names = None, []
    if len(lines) < 2 or not lines[1].startswith("format "):
        raise ValueError(f"{path}: line 2 of the PLY header is not the format line")
    if lines[1].split() != ["format", "binary_little_endian", "1.0"]:
        raise ValueError(
            f"{path}: PLY of {lines[1]!r}, expected 'format binary_little_endian 1.0'; "
            "convert it to binary little-endian"
        )
    for number, line in enumerate(lines[2:], start=3):
        words = line.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "element":
            if num_rows is not None or len(words) != 3 or words[1] != "vertex":
                raise ValueError(
                    f"{path}: header line {number} is {line!r}, expected one element 'vertex' and no other"
                )
            if not re.fullmatch(r"[0-9]{1,15}", words[2]):
                raise ValueError(f"{path}: header line {number}: {words[2]!r} is not a number of rows")
            num_rows = int(words[2])
        elif words[0] == "property" and num_rows is not None and len(words) >= 3:
            if words[1] not in ("float", "float32"):
                raise ValueError(f"{path}: property {words[-1]} is {' '.join(words[1:-1])}, expected float32")
            if len(words) != 3 or words[2] in names:
                raise ValueError(f"{path}: header line {number} is {line!r}, expected a new property of one name")
            names.append(words[2])
        else:
            raise ValueError(f"{path}: header line {number} is not understood: {line!r}")
    if num_rows is None:
        raise ValueError(f"{path}: the PLY header has no element 'vertex'")
    return num_rows, names, end.end()


def _check_properties(path: Path, names: list[str], with_faces: bool) -> int:
    """The SH degree of the file."""
    num_rest = sum(name.startswith("f_rest_") for name in names)
    counts = {3 * ((degree + 1) ** 2 - 1): degree for degree in range(MAX_SH_DEGREE + 1)}
    if num_rest not in counts:
        raise ValueError(f"{path}: {num_rest} f_rest properties, expected {sorted(counts)} (SH degree 0 to 3)")
    degree = counts[num_rest]
    expected = property_names(degree, with_faces)
    missing = [name for name in expected if name not in names and name not in _NORMALS]
    if missing == ["binding_0"]:
        raise ValueError(f"{path}: lacks property binding_0, the face of each Gaussian: a plain splat, not an avatar")
    if missing:
        raise ValueError(f"{path}: lacks property {', '.join(missing)}; not a PLY of Gaussians")
    unknown = [name for name in names if name not in expected]
    if unknown == ["binding_0"]:
        raise ValueError(f"{path}: has property binding_0: an avatar in face-local units, expected a world-space PLY")
    if unknown:
        raise ValueError(f"{path}: unknown property {', '.join(unknown)}; remove it before reading")
    return degree


def _check_size(path: Path, found: int, num_rows: int, row_bytes: int) -> None:
    if num_rows == 0:
        raise ValueError(f"{path}: element vertex 0: the file holds no Gaussians")
    expected = num_rows * row_bytes
    if found < expected:
        raise ValueError(
            f"{path}: truncated: the header says {num_rows} rows of {row_bytes} bytes, the file ends in row "
            f"{found // row_bytes} ({found} of {expected} bytes)"
        )
    if found > expected:
        raise ValueError(f"{path}: {found - expected} bytes follow the {num_rows} rows the header announces")


def _faces(path: Path, binding: np.ndarray, n_faces: int | None) -> np.ndarray:
    # Above 2^24 a float32 no longer tells neighboring integers apart.
    limit = n_faces if n_faces is not None else 2**24
    wrong = (binding < 0) | (binding >= limit) | (binding != np.floor(binding))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{path}: property binding_0 of row {row} is {binding[row]:g}, expected a face index from 0 to {limit - 1}"
        )
    return binding.astype(np.int64)
