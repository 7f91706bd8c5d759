"""FLAME (Li et al. 2017; 2020, 2023 and 2023 Open) from its Python-2 pickle, of which nothing is run (`plain_arrays`).

With the teeth that GaussianAvatars adds (`flame_teeth`) the mesh has 5,143 vertices and 10,144 faces.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from gaussian_tokenizer.heads.flame_teeth import add_teeth
from gaussian_tokenizer.heads.head_model import JOINTS, PARENTS, HeadModel
from gaussian_tokenizer.utils.plain_arrays import PlainArray, PlainSparse, arrays_in_child

EXPRESSIONS = 100  # the last of the shape directions
MAX_NUMBERS = 2**25  # in all arrays of a file; FLAME 2023 has 7 million
KEYS = ("v_template", "f", "shapedirs", "posedirs", "J_regressor", "kintree_table", "weights")


def read_flame(
    path: str | Path,
    teeth: bool = True,
    lip_rings: tuple[np.ndarray, np.ndarray] | None = None,
    expressions: int = EXPRESSIONS,
) -> HeadModel:
    """A FLAME pickle -> `HeadModel`; the last `expressions` of its shape directions are expressions.

    `lip_rings` place the teeth, as in `flame_teeth.add_teeth`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such FLAME file; download it, after registration, from MPI's FLAME site")
    try:
        arrays = _arrays(arrays_in_child(path, KEYS), expressions)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if teeth:
        try:
            add_teeth(arrays, lip_rings, expressions)
        except ValueError as error:
            raise ValueError(f"{path}: no teeth: {error}; give lip_rings=(upper, lower), or teeth=False") from error
    regions = {"eyes": arrays["weights"][:, 3:5].sum(1) > 0.999}  # the vertices that follow an eye joint alone
    if teeth:
        regions["mouth_interior"] = arrays["teeth"]
    shapes = arrays["shapedirs"].astype(np.float32)
    split = shapes.shape[2] - expressions
    return HeadModel(
        name=path.stem,
        template=torch.from_numpy(arrays["v_template"].astype(np.float32)),
        faces=torch.from_numpy(arrays["f"]),
        shape_dirs=torch.from_numpy(shapes[:, :, :split].copy()),
        expression_dirs=torch.from_numpy(shapes[:, :, split:].copy()),
        pose_dirs=torch.from_numpy(arrays["posedirs"].astype(np.float32)),
        joint_regressor=torch.from_numpy(arrays["J_regressor"].astype(np.float32)),
        skinning_weights=torch.from_numpy(arrays["weights"].astype(np.float32)),
        parents=PARENTS,
        expression_names=tuple(f"expression_{index:03d}" for index in range(expressions)),
        landmark_faces=torch.zeros(0, dtype=torch.int64),
        landmark_barycentrics=torch.zeros(0, 3),
        regions={region: torch.from_numpy(mask) for region, mask in regions.items()},
    )


def _arrays(plain: Mapping[str, PlainArray | PlainSparse], expressions: int) -> dict[str, np.ndarray]:
    """The arrays of `KEYS`, float64 and int64, of checked shapes and values."""
    # Before any is made: a sparse matrix is as large as it says.
    numbers = sum(math.prod(value.shape) for value in plain.values())
    if numbers > MAX_NUMBERS:
        raise ValueError(f"its arrays have {numbers:,} numbers, expected at most {MAX_NUMBERS:,} in all")
    vertices, joints = (plain["v_template"].shape or (0,))[0], len(JOINTS)
    shapes = plain["shapedirs"].shape[-1] if len(plain["shapedirs"].shape) == 3 else 0
    expected = {
        "v_template": (vertices, 3),
        "f": ((plain["f"].shape or (0,))[0], 3),
        "shapedirs": (vertices, 3, shapes),
        "posedirs": (vertices, 3, 9 * (joints - 1)),
        "J_regressor": (joints, vertices),
        "kintree_table": (2, joints),
        "weights": (vertices, joints),
    }
    for key, shape in expected.items():
        if plain[key].shape != shape or 0 in shape[:1]:
            raise ValueError(f"{key} is {plain[key].shape}, expected {shape} and at least one row")
    if shapes < expressions:
        raise ValueError(f"shapedirs holds {shapes} directions, expected {expressions} expressions and more")
    arrays = {}
    for key in KEYS:
        try:
            value = _dense(plain[key])
        except ValueError as error:
            raise ValueError(f"{key} is not a readable array: {error}") from error
        with np.errstate(over="ignore"):
            finite = value.dtype.kind in "iuf" and np.isfinite(value.astype(np.float32)).all()
        if not finite:
            raise ValueError(f"{key} holds {value.dtype} values that are not all finite float32 numbers")
        arrays[key] = value.astype(np.int64 if key in ("f", "kintree_table") else np.float64)
    parents = tuple(arrays["kintree_table"][0, 1:].tolist())
    if parents != PARENTS[1:]:
        raise ValueError(f"the parents of joints 1 to 4 are {parents}, expected {PARENTS[1:]}")
    if arrays["f"].min() < 0 or arrays["f"].max() >= vertices:
        raise ValueError(f"f has a vertex index outside 0..{vertices - 1}")
    return arrays


def _dense(value: PlainArray | PlainSparse) -> np.ndarray:
    if isinstance(value, PlainArray):
        flat = np.frombuffer(value.content, value.dtype)
        return flat.reshape(value.shape, order="F" if value.fortran_order else "C")
    return _dense_from_sparse(value) if value.rows_first else _dense_from_sparse(value).T


def _dense_from_sparse(value: PlainSparse) -> np.ndarray:
    """(lines, width); columns are lines unless `rows_first`."""
    lines, width = value.shape if value.rows_first else value.shape[::-1]
    data, indices, starts = (_dense(part) for part in (value.data, value.indices, value.indptr))
    if starts.shape != (lines + 1,) or not data.shape == indices.shape == (len(indices.reshape(-1)),):
        raise ValueError("a sparse matrix whose parts disagree")
    if starts.dtype.kind not in "iu" or indices.dtype.kind not in "iu":
        raise ValueError("a sparse matrix whose indices are not integers")
    counts: np.ndarray = np.diff(starts.astype(np.int64))
    complete = (counts >= 0).all() and int(starts[0]) == 0 and int(starts[-1]) == len(indices)
    if not complete or (len(indices) and not 0 <= indices.min() <= indices.max() < width):
        raise ValueError("a sparse matrix whose parts disagree")
    dense = np.zeros((lines, width))
    np.add.at(dense, (np.repeat(np.arange(lines), counts), indices), data)
    return dense
