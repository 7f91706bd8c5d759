"""Untrusted `.npz` files: plain arrays, never pickled objects, and a limit of memory that is checked before unpacking.

A zip of three megabytes may hold six gigabytes; no more is unpacked than the entries' headers announce.
"""

import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np

MAX_BYTES = 2**29  # of the arrays that are asked for, unpacked
MAX_OTHER_BYTES = 2**26  # of all others


def read_npz(path: str | os.PathLike, wanted: Collection[str] | None = None) -> tuple[dict[str, np.ndarray], int]:
    """All arrays of an npz in stored order, and the zip compression of the first; ValueError in one line for anything else.

    The arrays `wanted` (None: all) may take MAX_BYTES together, the others MAX_OTHER_BYTES, or the size of the file if more.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such npz file")
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise ValueError("holds an array twice")
            others = entries.keys() - (entries.keys() if wanted is None else wanted)
            _check_size(path, [entry.file_size for key, entry in entries.items() if key not in others], MAX_BYTES)
            _check_size(path, [entries[key].file_size for key in others], MAX_OTHER_BYTES, ", ".join(sorted(others)))
            for key, entry in entries.items():
                with archive.open(entry) as stream:
                    arrays[key] = _read_npy(key, stream, entry.file_size)
    except MemoryError:
        raise ValueError(f"{path}: declares more data than fits into memory; the file is damaged") from None
    # A damaged zip or npy header fails in the standard library's and NumPy's parsers in a dozen ways (BadZipFile,
    # zlib.error, EOFError, struct.error, NotImplementedError, TokenError ...); to the user all are one.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable npz of plain arrays: {reason}") from error
    return arrays, next(iter(entries.values())).compress_type if entries else zipfile.ZIP_STORED


def _check_size(path: Path, sizes: list[int], limit: int, names: str = "") -> None:
    limit = max(limit, path.stat().st_size)
    if sum(sizes) > limit:
        beside = f" in arrays that are not needed ({names[:100]})" if names else ""
        raise ValueError(f"{sum(sizes):,} bytes when unpacked{beside}, expected at most {limit:,}")


def _read_npy(key: str, stream: IO[bytes], size: int) -> np.ndarray:
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError(f"{key} holds pickled objects, which are never opened; save it as a plain float32 array")
    found, expected = size - stream.tell(), dtype.itemsize * int(np.prod(shape, dtype=object))
    if found != expected:
        raise ValueError(f"{key} is cut short: {found} bytes, expected {expected} for {shape}")
    data = stream.read(expected)
    array = np.frombuffer(data, dtype) if dtype.itemsize else np.empty(0, dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")
