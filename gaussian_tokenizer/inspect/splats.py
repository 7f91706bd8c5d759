"""What `inspect` says of PLY, compressed PLY (SuperSplat) and `.splat` (antimatter15) files of world-space Gaussians."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gaussian_tokenizer.avatars.ply import read_gaussian_ply

SPLAT = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])
MAX_HEADER_BYTES, END = 65536, b"end_header\n"
CHUNK = 256  # Gaussians that share the bounds of one row of a compressed PLY
CHUNK_NAMES = [f"{end}_{axis}" for end in ("min", "max") for axis in "xyz"]
PROPERTY, KINDS = r"^property (\w+) (\w+)\s*$", {"float": "<f4", "uint": "<u4", "uchar": "u1"}


def ply_kind(path: Path) -> str:
    """A PLY is "compressed" (SuperSplat), "bound" to the faces of a head (GaussianAvatars), or neither: "world"."""
    header = _header(path)
    if re.search(r"^element chunk \d", header, re.MULTILINE):
        return "compressed"
    return "bound" if re.search(r"^property \w+ binding_0\s*$", header, re.MULTILINE) else "world"


def world_ply_facts(path: Path) -> dict[str, Any]:
    gaussians = read_gaussian_ply(path, with_faces=False)
    degree = round(gaussians.sh.shape[1] ** 0.5) - 1
    return _facts(len(gaussians.positions), degree, gaussians.positions.min(0), gaussians.positions.max(0))


def splat_facts(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size == 0 or size % SPLAT.itemsize:
        raise ValueError(f"{path}: {size} bytes, expected {SPLAT.itemsize} per Gaussian; not a .splat, or cut short")
    positions = np.fromfile(path, SPLAT)["position"]
    _check_finite(path, "position", positions)
    return _facts(len(positions), 0, positions.min(0), positions.max(0))


def compressed_ply_facts(path: Path) -> dict[str, Any]:
    # Name, count and text of each element.
    _, *elements = re.split(r"^element (\w+) (\d{1,12})\s*$", _header(path), flags=re.MULTILINE)
    try:
        counts = {name: int(count) for name, count in zip(elements[::3], elements[1::3])}
        rows = {
            name: np.dtype([(each, KINDS[kind]) for kind, each in re.findall(PROPERTY, text, re.MULTILINE)])
            for name, text in zip(elements[::3], elements[2::3])
        }
        count, chunks, bounds_row = counts["vertex"], counts["chunk"], rows["chunk"][CHUNK_NAMES]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not SuperSplat's compressed PLY: its header lacks or misuses {error}") from None
    if count == 0 or chunks != -(-count // CHUNK):
        raise ValueError(f"{path}: {chunks} chunks of {CHUNK} for {count} Gaussians; the file is damaged")
    with open(path, "rb") as file:
        begin = file.read(MAX_HEADER_BYTES).find(END) + len(END)
        if begin < len(END):
            raise ValueError(f"{path}: the PLY header has no end_header; the file is cut short or damaged")
        expected, found = begin + sum(counts[name] * rows[name].itemsize for name in rows), path.stat().st_size
        if found != expected:
            raise ValueError(f"{path}: {found} bytes, expected {expected} for {count} Gaussians; cut short or damaged")
        file.seek(begin)
        chunk = np.fromfile(file, bounds_row, chunks)
    bounds = np.stack([chunk[name] for name in CHUNK_NAMES], 1)
    _check_finite(path, "bound", bounds)
    rest = len(rows["sh"].names or ()) if "sh" in rows else 0
    degree = round((rest / 3 + 1) ** 0.5) - 1
    return _facts(count, degree, bounds[:, :3].min(0), bounds[:, 3:].max(0))


def _check_finite(path: Path, what: str, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"{path}: {what} of row {row} is {values[row, column]}, expected a number")


def _header(path: Path) -> str:
    """Up to `end_header`; the first bytes of a file that has none."""
    with open(path, "rb") as file:
        return file.read(MAX_HEADER_BYTES).split(b"end_header")[0].decode("ascii", "replace")


def _facts(count: int, sh_degree: int, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    return {
        "gaussians": {"count": count, "sh_degree": sh_degree},
        "bounds": {axis: f"{a:.3f} to {b:.3f}" for axis, a, b in zip("xyz", low, high)} | {"unit": "meters"},
    }
