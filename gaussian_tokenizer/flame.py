"""FLAME from its pickle, by a reader that runs nothing.

FLAME (Li et al. 2017; 2020, 2023 and 2023 Open) is distributed as a Python-2 pickle that holds chumpy arrays and a
scipy sparse matrix. A pickle is a program, so it is run by an unpickler that knows a handful of names: the parts of
NumPy that rebuild an array, and inert stand-ins for chumpy and scipy objects that only keep what they are given.
Every other name ends the reading with a `ValueError` before anything is called. Convert once: `HeadModel.save`.
With the teeth that GaussianAvatars adds (`flame_teeth`) the mesh has 5,143 vertices and 10,144 faces.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from gaussian_tokenizer.flame_teeth import add_teeth
from gaussian_tokenizer.head_model import JOINTS, HeadModel

EXPRESSIONS = 100  # the last ones of the shape directions
PARENTS = (-1, 0, 1, 1, 1)
KEYS = ("v_template", "f", "shapedirs", "posedirs", "J_regressor", "kintree_table", "weights")


def read_flame(
    path: str | Path,
    teeth: bool = True,
    lip_rings: tuple[np.ndarray, np.ndarray] | None = None,
    expressions: int = EXPRESSIONS,
) -> HeadModel:
    """A FLAME pickle -> `HeadModel`.

    `lip_rings`: 15 vertex indices of the upper and 15 of the lower lip, each from one corner of the mouth to the
    other, both in the same direction; None finds them on the mesh (`flame_teeth.find_lip_rings`). `expressions`: how
    many of the last shape directions are expressions.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such FLAME file; it is downloaded, after registration, from MPI's FLAME site"
        )
    content = _read_pickle(path)
    arrays = _arrays(path, content, expressions)
    if teeth:
        try:
            add_teeth(arrays, lip_rings, expressions)
        except ValueError as error:
            raise ValueError(f"{path}: no teeth: {error}; give lip_rings=(upper, lower), or teeth=False") from error
    vertices = arrays["v_template"].astype(np.float32)
    shapes = arrays["shapedirs"].astype(np.float32)
    split = shapes.shape[2] - expressions
    return HeadModel(
        name=path.stem,
        template=torch.from_numpy(vertices),
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
        regions=_regions(arrays),
    )


class _Kept:
    """Stands in for an object of a library: keeps the state it is given, does nothing."""

    state: object = None

    def __init__(self, *arguments: object) -> None:
        self.state = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _ChumpyArray(_Kept): ...


class _SparseColumns(_Kept): ...


class _SparseRows(_Kept): ...


class _Dtype(_Kept):
    """`numpy.dtype('f8', 0, 1)` and the like; only numbers, only the byte order is taken from the state."""

    def __init__(self, code: str = "", *_: object) -> None:
        self.dtype = np.dtype(code) if isinstance(code, str) else np.dtype(object)
        if self.dtype.kind not in "biuf":
            raise ValueError(f"an array of {code!r}, which are not numbers")

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray(_Kept):
    """A NumPy array: its state is (version, shape, dtype, is Fortran order, bytes)."""

    def array(self) -> np.ndarray:
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an array without its content")
        _, shape, dtype, fortran_order, content = self.state
        content = content.encode("latin1") if isinstance(content, str) else content  # a Python-2 string is bytes
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise ValueError("an array of something else than numbers")
        return np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")


class _Call:
    """A function that a pickle may call, and not alter."""

    __slots__ = ("function",)

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *arguments: object) -> object:
        return self.function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError("it sets the state of a function")


def _reconstruct_object(kind: type, base: type, state: object) -> _Kept:
    """`copy_reg._reconstructor`, for stand-ins only."""
    if not (isinstance(kind, type) and issubclass(kind, _Kept) and base is object and state is None):
        raise ValueError("it reconstructs an object of an unknown kind")
    return kind()


def _reconstruct_array(kind: type, *_: object) -> _NumpyArray:
    """`numpy.core.multiarray._reconstruct`: an empty array; its state comes later."""
    if kind is not _NumpyArray:
        raise ValueError("it reconstructs an array of an unknown kind")
    return _NumpyArray()


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, with which Python 3 writes bytes in protocol 2."""
    if encoding != "latin1":
        raise ValueError(f"it encodes to {encoding!r}")
    return text.encode("latin1")


# Everything a FLAME pickle may name.
_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _NumpyArray,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Call(_reconstruct_array),
    ("numpy._core.multiarray", "_reconstruct"): _Call(_reconstruct_array),
    ("copy_reg", "_reconstructor"): _Call(_reconstruct_object),
    ("copyreg", "_reconstructor"): _Call(_reconstruct_object),
    ("_codecs", "encode"): _Call(_encode),
    ("__builtin__", "object"): object,
    ("builtins", "object"): object,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): dict,
    ("chumpy", "Ch"): _ChumpyArray,
    ("chumpy.ch", "Ch"): _ChumpyArray,
    ("scipy.sparse", "csc_matrix"): _SparseColumns,
    ("scipy.sparse.csc", "csc_matrix"): _SparseColumns,
    ("scipy.sparse._csc", "csc_matrix"): _SparseColumns,
    ("scipy.sparse", "csr_matrix"): _SparseRows,
    ("scipy.sparse.csr", "csr_matrix"): _SparseRows,
    ("scipy.sparse._csr", "csr_matrix"): _SparseRows,
}


class _FlameUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it names {module}.{name}, which no FLAME file needs; nothing of it was run")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> object:
        raise ValueError("it refers to objects outside the file")


def _read_pickle(path: Path) -> dict:
    unpickler = _FlameUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1")
    try:
        content = unpickler.load()
    # A damaged or hostile pickle can fail in any way that its opcodes can; all of them mean the same to the user.
    except Exception as error:
        raise ValueError(f"{path}: not a FLAME pickle that is safe to read: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dictionary with {', '.join(KEYS)}")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; a FLAME file has {', '.join(KEYS)}")
    return content


def _arrays(path: Path, content: Mapping, expressions: int) -> dict[str, np.ndarray]:
    """The arrays of `KEYS`, float64 and int64, of checked shapes."""
    arrays = {}
    for key in KEYS:
        try:
            value = _dense(content[key])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{path}: {key} is not a readable array: {error}") from error
        if value.dtype.kind not in "iuf" or not np.isfinite(value.astype(np.float64)).all():
            raise ValueError(f"{path}: {key} holds {value.dtype} values that are not all finite numbers")
        arrays[key] = value.astype(np.int64 if key in ("f", "kintree_table") else np.float64)
    vertices, joints = len(arrays["v_template"]), len(JOINTS)
    shapes = arrays["shapedirs"].shape[-1] if arrays["shapedirs"].ndim == 3 else 0
    expected = {
        "v_template": (vertices, 3),
        "f": (len(arrays["f"]), 3),
        "shapedirs": (vertices, 3, shapes),
        "posedirs": (vertices, 3, 9 * (joints - 1)),
        "J_regressor": (joints, vertices),
        "kintree_table": (2, joints),
        "weights": (vertices, joints),
    }
    for key, shape in expected.items():
        if arrays[key].shape != shape:
            raise ValueError(f"{path}: {key} is {arrays[key].shape}, expected {shape}")
    if shapes < expressions:
        raise ValueError(f"{path}: shapedirs holds {shapes} directions, expected {expressions} expressions and more")
    parents = tuple(arrays["kintree_table"][0, 1:].tolist())
    if parents != PARENTS[1:]:
        raise ValueError(f"{path}: the parents of joints 1 to 4 are {parents}, expected {PARENTS[1:]}")
    if arrays["f"].min() < 0 or arrays["f"].max() >= vertices:
        raise ValueError(f"{path}: f has a vertex index outside 0..{vertices - 1}")
    return arrays


def _dense(value: object) -> np.ndarray:
    """A plain array from what a stand-in has kept."""
    if isinstance(value, _NumpyArray):
        return value.array()
    if isinstance(value, _ChumpyArray) and isinstance(value.state, dict):
        return _dense(value.state["x"])
    if isinstance(value, _SparseColumns):
        return _dense_from_sparse(value.state).T
    if isinstance(value, _SparseRows):
        return _dense_from_sparse(value.state, rows_first=True)
    raise TypeError(f"found {type(value).__name__.strip('_')}")


def _dense_from_sparse(state: object, rows_first: bool = False) -> np.ndarray:
    """The compressed lines of a sparse matrix -> (lines, width), dense; columns are lines unless `rows_first`."""
    if not isinstance(state, dict):
        raise TypeError("a sparse matrix without its content")
    shape = state["_shape"] if "_shape" in state else state["shape"]
    lines, width = (int(size) for size in (shape if rows_first else reversed(shape)))
    data, indices, starts = (_dense(state[key]) for key in ("data", "indices", "indptr"))
    counts: np.ndarray = np.diff(starts.astype(np.int64))
    consistent = (
        data.shape == indices.shape == (int(counts.sum()),) and counts.shape == (lines,) and (counts >= 0).all()
    )
    if not consistent or lines * width > 10**8 or (len(indices) and not 0 <= indices.min() <= indices.max() < width):
        raise ValueError("a sparse matrix whose parts disagree")
    dense = np.zeros((lines, width))
    np.add.at(dense, (np.repeat(np.arange(lines), counts), indices), data)
    return dense


def _regions(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What a FLAME file itself says of its parts: the eyeballs are the vertices that follow an eye joint alone."""
    eyes = arrays["weights"][:, 3:5].sum(1) > 0.999
    regions = {"eyes": torch.from_numpy(eyes)}
    if "teeth" in arrays:
        regions["mouth_interior"] = torch.from_numpy(arrays["teeth"].astype(bool))
    return regions
