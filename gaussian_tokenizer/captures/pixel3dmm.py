"""Reader of Pixel3DMM: `checkpoint/<frame>.frame`, not unpickled (`plain_pickle`), and the square crops `cropped/<frame>.*`.

Rotations are the first two rows of a matrix (Zhou et al. 2019). The head is turned about the origin, R v + t, FLAME's about
its root joint j: translation = t + R j - j. The camera is world-to-camera with OpenGL axes; the focal length is in units of
the image's side, the principal point in half sides from the middle. `eyelids` are not FLAME parameters and are left out.
"""

import functools
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gaussian_tokenizer.avatars.motions import join_frames
from gaussian_tokenizer.captures.frame import OPENGL_TO_OPENCV, Frame, size_of_image
from gaussian_tokenizer.captures.tracking import Recording, find_image
from gaussian_tokenizer.geometry.rotations import matrix_to_quaternion
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.utils.plain_arrays import NUMPY, PlainArray, read_array
from gaussian_tokenizer.utils.plain_pickle import Name, Thing, interpret

MAX_BYTES = 2**26  # of a checkpoint, unpacked; Pixel3DMM's have a few hundred thousand
# Names that a checkpoint of plain values may contain; none of them is called.
STORAGES = {"Float": "<f4", "Double": "<f8", "Int": "<i4", "Long": "<i8", "Bool": "<b1"}
NAMES = NUMPY | {
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    **{("torch", f"{name}Storage"): dtype for name, dtype in STORAGES.items()},
    **{("torch", name): "constant" for name in ("Size", "device", "float32", "float64", "int32", "int64", "bool")},
    **{(f"numpy.{core}.multiarray", "scalar"): "scalar" for core in ("core", "_core")},
}
SHAPES = {
    "flame": {"exp": -1, "shape": -1, "eyes": 12, "jaw": 6, "neck": 6, "R": 6, "R_rotation_matrix": 9, "t": 3},
    "camera": {"R_base_0": 9, "t_base_0": 3, "fl": 1, "pp": 2},
}


def read_pixel3dmm(folder: Path, head: HeadModel | None) -> Recording:
    """Every frame, with its image if there are `cropped/`; the shape of the first. ValueError names a file that is wrong."""
    files = checkpoint_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: has no checkpoint/<frame>.frame")
    if head is None:
        raise ValueError(
            f"{folder}: Pixel3DMM turns the head about the origin; give the head model, whose root joint is needed"
        )
    cropped = folder / "cropped"
    arrays = {frame: _load(path) for frame, path in files.items()}
    params = {frame: _to_params(files[frame], each["flame"], head) for frame, each in arrays.items()}
    frames = []
    for frame, path in files.items() if cropped.is_dir() else ():
        image = find_image([cropped], path.stem)
        if image is None:
            raise ValueError(f"{path}: has no image {cropped / path.stem}.jpg or .png; copy the folder cropped/ again")
        frames.append(_to_frame(frame, image, arrays[frame]["camera"], params[frame]))
    eyelids = max(float(np.abs(each["flame"].get("eyelids", np.zeros(1))).max()) for each in arrays.values())
    joined = join_frames([*params.values()], [*files.values()], of_subject=True)
    return Recording(frames, tuple(files), joined, None, {"eyelids_left_out": round(eyelids, 4)})


def checkpoint_files(folder: Path) -> dict[int, Path]:
    """Number of the frame -> its file, in order."""
    paths = [path for path in folder.glob("checkpoint/*.frame") if re.fullmatch(r"\d+", path.stem)]
    return {int(path.stem): path for path in sorted(paths, key=lambda path: int(path.stem))}


def _load(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a checkpoint, float64, with their leading axis of 1 taken off."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_BYTES:
                raise ValueError(f"{size:,} bytes when unpacked, expected at most {MAX_BYTES:,}")
            content = _interpret(archive)
    # A damaged zip fails in a dozen ways (BadZipFile, zlib.error, EOFError, NotImplementedError, ...).
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a file of plain arrays as Pixel3DMM saves it: {reason}") from None
    loaded: dict[str, dict[str, np.ndarray]] = {}
    for part, sizes in SHAPES.items():
        values = content.get(part) if isinstance(content, dict) else None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: has no {part!r}, expected Pixel3DMM's checkpoint/<frame>.frame")
        loaded[part] = {}
        for key, size in sizes.items():
            value = _numbers(values.get(key))
            if value is None or value.dtype.kind not in "fi":
                found = type(values.get(key)).__name__ if value is None else value.dtype
                raise ValueError(f"{path}: {part}[{key!r}] is {found}, expected an array of numbers")
            if size >= 0 and value.size != size:
                raise ValueError(f"{path}: {part}[{key!r}] is {value.shape}, expected (1, ..) with {size} numbers")
            with np.errstate(over="ignore"):
                finite = np.isfinite(value.astype(np.float32)).all()
            if not finite:
                raise ValueError(f"{path}: {part}[{key!r}] holds NaN or Inf; every value must be finite")
            loaded[part][key] = np.asarray(value, np.float64).reshape(-1)
    eyelids = _numbers(content["flame"].get("eyelids"))
    if eyelids is not None and eyelids.size and np.isfinite(eyelids).all():
        loaded["flame"]["eyelids"] = eyelids
    return loaded


def _interpret(archive: zipfile.ZipFile) -> Any:
    """The content of a file of `torch.save`, as `plain_pickle` gives it; storages of tensors become arrays (N,)."""
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError("not one file that torch.save has written")
    folder = names[0].removesuffix(".pkl")
    read = functools.cache(archive.read)  # many tensors may lie in one storage

    def storage(identifier: object) -> np.ndarray:
        match identifier:
            case ("storage", Name(meaning=dtype), str(key), *_) if dtype in STORAGES.values():
                return np.frombuffer(read(f"{folder}/{key}"), dtype)
        raise ValueError("a tensor whose storage is not known")

    return interpret(archive.read(names[0]), NAMES, storage)


def _numbers(value: object) -> np.ndarray | None:
    """The numbers of an array or of a contiguous tensor; None for anything else."""
    try:
        if isinstance(value, Thing) and value.meaning == "tensor":
            stored, start, shape, strides = value.arguments[:4]
            if any(strides[axis] != math.prod(shape[axis + 1 :]) for axis, size in enumerate(shape) if size != 1):
                return None
            return stored[start : start + math.prod(shape)].reshape(shape)
        plain = read_array(value)
    except (ValueError, TypeError, AttributeError):
        return None
    if not isinstance(plain, PlainArray):
        return None
    return np.frombuffer(plain.content, plain.dtype).reshape(plain.shape, order="F" if plain.fortran_order else "C")


def _to_params(path: Path, flame: dict[str, np.ndarray], head: HeadModel) -> HeadParameters:
    rotation = flame["R_rotation_matrix"].reshape(3, 3)
    if not np.allclose(_matrix(flame["R"]), rotation, atol=1e-3):
        raise ValueError(
            f"{path}: flame['R'] is not the first two rows of flame['R_rotation_matrix']; another version?"
        )
    turns = {
        "rotation": [rotation],
        "neck_pose": [_matrix(flame["neck"])],
        "jaw_pose": [_matrix(flame["jaw"])],
        "eyes_pose": [_matrix(flame["eyes"][:6]), _matrix(flame["eyes"][6:])],
    }
    values: dict[str, np.ndarray] = {name: _axis_angles(np.stack(each)) for name, each in turns.items()}
    values |= {"expr": flame["exp"], "translation": np.zeros(3)}
    tensors: dict[str, Any] = {name: torch.from_numpy(value).float()[None] for name, value in values.items()}
    params = HeadParameters(shape=torch.from_numpy(flame["shape"]).float(), **tensors)
    try:
        head.check(params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    joint = (head.joint_regressor[0].cpu() @ head.shaped(params)[0].cpu()).double().numpy()
    params.translation[0] = torch.from_numpy(flame["t"] + rotation @ joint - joint).float()
    return params


def _to_frame(frame: int, image: Path, camera: dict[str, np.ndarray], params: HeadParameters) -> Frame:
    width, height = size_of_image(image)
    if width != height:
        raise ValueError(f"{image} is of {width}x{height} pixels, expected Pixel3DMM's square crop")
    viewmat = np.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = camera["R_base_0"].reshape(3, 3), camera["t_base_0"]
    focal = float(camera["fl"][0]) * width
    cx, cy = (width / 2 * (1 + camera["pp"])).tolist()
    return Frame(frame, 0, OPENGL_TO_OPENCV @ viewmat, focal, focal, cx, cy, width, height, image, params)


def _matrix(rows: np.ndarray) -> np.ndarray:
    """First two rows of a rotation, (6,), not quite orthogonal -> the rotation (3, 3), by Gram-Schmidt."""
    first = rows[:3] / max(float(np.linalg.norm(rows[:3])), 1e-12)
    second = rows[3:] - (first @ rows[3:]) * first
    second /= max(float(np.linalg.norm(second)), 1e-12)
    return np.stack((first, second, np.cross(first, second)))


def _axis_angles(matrices: np.ndarray) -> np.ndarray:
    """(N, 3, 3) -> (3 N,) radians."""
    quats = matrix_to_quaternion(torch.from_numpy(matrices)).numpy()
    quats *= np.where(quats[:, :1] < 0, -1, 1)
    sines = np.linalg.norm(quats[:, 1:], axis=1, keepdims=True)
    angles = 2 * np.arctan2(sines, quats[:, :1])
    return (quats[:, 1:] * angles / np.maximum(sines, 1e-12)).reshape(-1)
