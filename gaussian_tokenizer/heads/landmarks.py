"""The 68 landmarks of iBUG (300-W) on a head model: their order, and the files that place them on FLAME.

Jaw 0-16, brows 17-26, nose 27-35, eyes 36-47, lips 48-67, each from the left to the right of an image of the face, so the
subject's right comes first. The 51 without the jaw are numbers 17-67.
"""

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.utils.npz import read_npz
from gaussian_tokenizer.utils.plain_arrays import NUMPY, PlainArray, read_array
from gaussian_tokenizer.utils.plain_pickle import Thing, interpret

N_JAW, N_LANDMARKS = 17, 68
MAX_BYTES = 2**24  # of an embedding; FLAME's have 30 to 300 thousand
# Faces and barycentrics in a file: all 68 (DECA, VHAP), the 51 (DECA), the 51 of FLAME's own file.
KEYS = (
    ("full_lmk_faces_idx", "full_lmk_bary_coords"),
    ("static_lmk_faces_idx", "static_lmk_bary_coords"),
    ("lmk_face_idx", "lmk_b_coords"),
)
# What is beside them are tensors, which are not read; none of these names is called.
NAMES = NUMPY | {
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch.storage", "_load_from_bytes"): "tensor",
}


def with_landmarks(head: HeadModel, path: str | Path) -> HeadModel:
    """The head model with the landmarks of a FLAME embedding: 68, or the 51 without the jaw if there are no more.

    `landmark_embedding.npy` (DECA, VHAP), `flame_static_embedding.pkl` (MPI), or an `.npz` with such keys. Nothing in a
    pickle is run. ValueError names the file if it is something else, or names faces that the head model does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such landmark embedding")
    content: Mapping[str, Any] = read_npz(path)[0] if path.suffix == ".npz" else _unpickled(path)
    for names in KEYS:
        if all(name in content for name in names):
            break
    else:
        expected = " or ".join(f"{faces} with {weights}" for faces, weights in KEYS)
        raise ValueError(f"{path}: has {', '.join(map(str, content)) or 'nothing'}; expected {expected}")
    try:
        faces, barycentrics = (_array(content[name]) for name in names)
    except ValueError as error:
        raise ValueError(f"{path}: {' or '.join(names)} is not a readable array: {error}") from None
    faces = faces.reshape(-1)
    barycentrics = barycentrics.reshape(-1, 3) if barycentrics.size == 3 * faces.size else barycentrics
    if len(faces) > N_LANDMARKS and names == KEYS[0]:  # VHAP's eyes
        faces, barycentrics = faces[:N_LANDMARKS], barycentrics[:N_LANDMARKS]
    if len(faces) not in (N_LANDMARKS, N_LANDMARKS - N_JAW) or barycentrics.shape != (len(faces), 3):
        raise ValueError(f"{path}: {len(faces)} faces and barycentrics {barycentrics.shape}, expected 68 or 51 of both")
    if faces.dtype.kind not in "iu" or faces.min() < 0 or faces.max() >= head.n_faces:
        raise ValueError(f"{path}: names faces {faces.min()} to {faces.max()}, {head.name!r} has {head.n_faces}")
    if not np.isfinite(barycentrics).all() or np.abs(barycentrics.sum(1) - 1).max() > 1e-3:
        raise ValueError(f"{path}: barycentrics that do not sum to 1; is the file damaged?")
    return dataclasses.replace(
        head,
        landmark_faces=torch.from_numpy(faces.astype(np.int64)),
        landmark_barycentrics=torch.from_numpy(barycentrics.astype(np.float32)),
    )


def _unpickled(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle, or in the only element of an array of objects."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, expected a landmark embedding below {MAX_BYTES:,}")
    pickled = path.read_bytes()
    try:
        if path.suffix == ".npy":
            pickled = _objects(pickled)
        content = interpret(pickled, NAMES)
    except (ValueError, UnicodeError) as error:
        raise ValueError(f"{path}: not a landmark embedding that is safe to read: {error}") from None
    match content:
        case Thing(meaning="array", state=(_, _, _, _, [dict() as content])):
            pass
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no dictionary; expected one with {KEYS[0][0]} or {KEYS[2][0]}")
    return content


def _objects(npy: bytes) -> bytes:
    """The pickle after the header of an array of objects; NumPy's own reader of headers fails in many ways."""
    form, start = ("<H", 10) if npy[6:7] == b"\1" else ("<I", 12)
    if npy[:6] != b"\x93NUMPY" or len(npy) < start:
        raise ValueError("it is no npy file")
    end = start + struct.unpack(form, npy[8:start])[0]
    if b"'|O'" not in npy[start:end]:
        raise ValueError("it is an array of numbers")
    return npy[end:]


def _array(value: object) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    plain = read_array(value)
    if not isinstance(plain, PlainArray):
        raise ValueError("found a sparse matrix")
    flat = np.frombuffer(plain.content, plain.dtype)
    return flat.reshape(plain.shape, order="F" if plain.fortran_order else "C")
