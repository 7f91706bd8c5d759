"""What `inspect` says of files of world-space Gaussians, which this toolkit exports for splat viewers.

PLY of 3D Gaussian Splatting, SuperSplat's compressed PLY and antimatter15's `.splat`: the number of Gaussians, their SH
degree, and the box around their centers, in meters. ValueError for a file that is cut short or holds NaN or Inf.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gaussian_tokenizer.avatars.ply import read_gaussian_ply

SPLAT = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])
MAX_HEADER_BYTES, END = 65536, b"end_header\n"
CHUNK = 256  # Gaussians that share the bounds of one row of a compressed PLY
CHUNK_NAMES = [f"{end}_{axis}" for end in ("min", "max") for axis in "xyz"]


def ply_header(path: Path) -> str:
    """The header of a PLY up to its `end_header`, or its first bytes if it has none."""
    with open(path, "rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    return start.split(b"end_header")[0].decode("ascii", "replace")


def is_compressed_ply(header: str) -> bool:
    return re.search(r"^element chunk \d", header, re.MULTILINE) is not None


def is_bound_ply(header: str) -> bool:
    """Whether every Gaussian is bound to a face: a GaussianAvatars file."""
    return re.search(r"^property \w+ binding_0\s*$", header, re.MULTILINE) is not None


def world_ply_facts(path: Path) -> dict[str, Any]:
    gaussians = read_gaussian_ply(path, with_faces=False)
    degree = round(gaussians.sh.shape[1] ** 0.5) - 1
    return _facts(len(gaussians.positions), degree, gaussians.positions.min(0), gaussians.positions.max(0))


def splat_facts(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size == 0 or size % SPLAT.itemsize:
        raise ValueError(
            f"{path}: {size} bytes, expected {SPLAT.itemsize} for each Gaussian; not a .splat, or cut short"
        )
    positions = np.fromfile(path, SPLAT)["position"]
    _check_finite(path, "position", positions)
    return _facts(len(positions), 0, positions.min(0), positions.max(0))


def compressed_ply_facts(path: Path) -> dict[str, Any]:
    header = ply_header(path)
    elements = dict(re.findall(r"^element (\w+) (\d{1,12})\s*$", header, re.MULTILINE))
    parts = re.split(r"^element (\w+) .*$", header, flags=re.MULTILINE)
    rows = {
        name: re.findall(r"^property (\w+) (\w+)\s*$", text, re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2])
    }
    sizes = {"float": 4, "uint": 4, "uchar": 1}
    try:
        widths = {name: sum(sizes[kind] for kind, _ in properties) for name, properties in rows.items()}
        counts = {name: int(elements[name]) for name in rows}
        count, chunks = counts["vertex"], counts["chunk"]
        columns = [[name for _, name in rows["chunk"]].index(name) for name in CHUNK_NAMES]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a compressed PLY as SuperSplat writes it: {error} in its header") from None
    if count == 0 or chunks != -(-count // CHUNK):
        raise ValueError(f"{path}: {chunks} chunks of {CHUNK} for {count} Gaussians; the file is damaged")
    with open(path, "rb") as file:
        begin = file.read(MAX_HEADER_BYTES).find(END) + len(END)
        if begin < len(END):
            raise ValueError(f"{path}: the PLY header has no end_header; the file is cut short or damaged")
        expected, found = begin + sum(counts[name] * widths[name] for name in rows), path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{path}: {found} bytes, expected {expected} for {count} Gaussians; the file is cut or damaged"
            )
        file.seek(begin)
        bounds = np.fromfile(file, "<f4", chunks * len(rows["chunk"])).reshape(chunks, -1)[:, columns]
    _check_finite(path, "bound", bounds)
    rest = len(rows.get("sh", ()))
    degree = round((rest / 3 + 1) ** 0.5) - 1
    return _facts(count, degree, bounds[:, :3].min(0), bounds[:, 3:].max(0))


def _check_finite(path: Path, what: str, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"{path}: {what} of row {row} is {values[row, column]}, expected a number")


def _facts(count: int, sh_degree: int, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    return {
        "gaussians": {"count": count, "sh_degree": sh_degree},
        "bounds": {axis: f"{a:.3f} to {b:.3f}" for axis, a, b in zip("xyz", low, high)} | {"unit": "meters"},
    }
