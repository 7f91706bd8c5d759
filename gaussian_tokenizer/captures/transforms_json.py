"""Reads and writes the frames of a VHAP export: `transforms*.json` with images, masks, cameras and head parameters.

In the files, a camera is camera-to-world with OpenGL axes and `cy` counts from the lower edge. A JSON is untrusted: the files
it names must be in its folder or, in a UNION of sequences, in a sister folder listed in `sequences_*.txt`.
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from gaussian_tokenizer.captures.frame import OPENGL_TO_OPENCV, Frame, file_bytes, size_of_image
from gaussian_tokenizer.utils.json_files import read_json, write_json

TRANSFORMS_NAME, CANONICAL_NAME = "transforms.json", "canonical_flame_param.npz"
SPLITS = ("train", "val", "test")
HELD_OUT_CAMERA = 8  # of VHAP's 16; the last camera if there is no camera 8


def read_transforms(path: Path) -> list[Frame]:
    """The frames of one `transforms*.json` by timestep, then camera.

    ValueError names the file and the frame for a path outside the folder, a missing file, a matrix that is not a camera,
    an image of another size than stated, and two frames of one timestep and camera.
    """
    content = read_json(path)
    entries = content.get("frames")
    if not isinstance(entries, list):
        raise ValueError(f"{path}: has no list `frames`; expected the {TRANSFORMS_NAME} of a VHAP export")
    sisters = sister_folders(path.parent)
    shared = {key: value for key, value in content.items() if key != "frames"}
    frames, missing = [], []
    for row, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise TypeError(f"is a JSON {type(entry).__name__}, expected an object")
            # What all frames share may stand once, at the top.
            frame = _read_frame(path.parent, sisters, shared | entry)
        except KeyError as error:
            raise ValueError(f"{path}: frame {row} lacks {error}") from None
        except FileNotFoundError as error:
            missing.append(f"frame {row}: {error}")
        except (TypeError, ValueError, ArithmeticError, OSError) as error:
            raise ValueError(f"{path}: frame {row}: {error}") from None
        else:
            frames.append(frame)
    if missing:
        rest = f" (and files of {len(missing) - 1} more of {len(entries)} frames)" if len(missing) > 1 else ""
        raise ValueError(f"{path}: {missing[0]}{rest}; copy or export the data again")
    return sorted_frames(frames, path)


def sorted_frames(frames: Iterable[Frame], path: Path) -> list[Frame]:
    """By timestep, then camera; ValueError that names `path` if two have the same."""
    ordered = sorted(frames, key=lambda frame: frame.key)
    for first, second in itertools.pairwise(ordered):
        if first.key == second.key:
            raise ValueError(f"{path}: two frames of timestep {first.timestep} and camera {first.camera}")
    return ordered


def sister_folders(folder: Path) -> frozenset[str]:
    """Names of the sequence folders beside `folder` that a UNION consists of; empty for any other folder."""
    names: set[str] = set()
    for path in sorted(folder.glob("sequences_*.txt")):
        for name in path.read_text(encoding="utf-8").split("\n"):
            name = name.strip()
            if name in (".", "..") or "/" in name or "\\" in name:
                raise ValueError(f"{path}: names {name!r}, expected names of folders beside {folder.name}")
            names.add(name)
    return frozenset(names - {""})


def resolve_inside(folder: Path, name: Any, sisters: frozenset[str] = frozenset()) -> Path:
    """The path of a file that a JSON in `folder` names; ValueError if it leads out of the folder, also by a link.

    "../<sister>/.." is allowed for `sisters`. The file need not exist.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"names the file {name!r}, expected a path inside the folder")
    parts = PurePosixPath(name).parts
    root = folder
    if len(parts) > 2 and parts[0] == ".." and parts[1] in sisters:
        root, parts = folder.parent / parts[1], parts[2:]
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or "\\" in name
    path = root.joinpath(*parts)
    by_link = ""
    if not absolute and ".." not in parts:
        # realpath, because Path.resolve fails on a loop of links.
        real_root, real_path = Path(os.path.realpath(root)), Path(os.path.realpath(path))
        beside = root is folder or real_root.parent == Path(os.path.realpath(folder)).parent
        if beside and real_path.is_relative_to(real_root):
            return path
        by_link = "by way of a link "
    allowed = f" or {', '.join(sorted(sisters))} beside it" if sisters else ""
    raise ValueError(
        f"names {name!r}, a file {by_link}outside the folder; refused, only files in {folder.name}{allowed} are read"
    )


def write_frames(folder: Path, frames: Sequence[Frame]) -> None:
    """Write images, masks, head parameters, `transforms*.json` and `canonical_flame_param.npz` into a new folder."""
    (folder / "flame_param").mkdir()
    entries, written = [], {}
    for frame in sorted_frames(frames, folder):
        name = f"{frame.timestep:05d}_{frame.camera:02d}.png"
        params_path = f"flame_param/{frame.timestep:05d}.npz"
        images = {f"images/{name}": frame.image}
        if frame.mask is not None:
            images[f"fg_masks/{name}"] = frame.mask
        for path, image in images.items():
            size = size_of_image(image)
            if size != (frame.width, frame.height):
                raise ValueError(f"{path} is of {size} pixels, its camera of {(frame.width, frame.height)}")
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(file_bytes(image))
        if params_path not in written:
            params = written[params_path] = frame.load_params()
            if params.num_frames != 1:
                found = f"head parameters of {params.num_frames} frames"
                raise ValueError(f"timestep {frame.timestep} has {found}, expected its own 1")
            with open(folder / params_path, "wb") as file:
                params.write(file)
        entries.append(_entry(frame, list(images), params_path))
    with open(folder / CANONICAL_NAME, "wb") as file:
        next(iter(written.values())).frame(0).canonical(jaw_angle=0.3).write(file)
    write_json(folder / TRANSFORMS_NAME, _transforms(entries, entries[0]))
    for split, rows in vhap_split([(entry["timestep_index"], entry["camera_index"]) for entry in entries]).items():
        write_json(folder / f"transforms_{split}.json", _transforms([entries[row] for row in rows], entries[0]))


def vhap_split(keys: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    """VHAP's split of one sequence, (timestep, camera) of every frame -> rows of train, val and test.

    The last 30 % of the timesteps are test; of the others, one camera is val if there are several.
    """
    timesteps, cameras = sorted({timestep for timestep, _ in keys}), {camera for _, camera in keys}
    seen = set(timesteps[: math.ceil(0.7 * len(timesteps))])
    held_out = HELD_OUT_CAMERA if HELD_OUT_CAMERA in cameras else max(cameras, default=0)
    split: dict[str, list[int]] = {name: [] for name in SPLITS}
    for row, (timestep, camera) in enumerate(keys):
        is_val = camera == held_out and len(cameras) > 1
        split["test" if timestep not in seen else "val" if is_val else "train"].append(row)
    return split


def frame_index(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Timestep and camera of an entry of `transforms*.json`; KeyError or ValueError if it lacks them."""
    timestep, camera = (entry[f"{what}_index"] for what in ("timestep", "camera"))
    for what, value in (("timestep", timestep), ("camera", camera)):
        if type(value) is not int or not 0 <= value < 2**31:
            raise ValueError(f"{what}_index is {value!r}, expected a whole number from 0; export the data again")
    return timestep, camera


# ---- reading


def _read_frame(folder: Path, sisters: frozenset[str], entry: dict[str, Any]) -> Frame:
    image, params = (resolve_inside(folder, entry[key], sisters) for key in ("file_path", "flame_param_path"))
    mask = resolve_inside(folder, entry["fg_mask_path"], sisters) if entry.get("fg_mask_path") is not None else None
    if not params.is_file():
        raise FileNotFoundError(f"{params} does not exist")
    sizes = {path: size_of_image(path) for path in (image, mask) if path is not None}
    width, height = (int(entry["w"]), int(entry["h"])) if "w" in entry and "h" in entry else sizes[image]
    for path, size in sizes.items():
        if size != (width, height):
            raise ValueError(
                f"{path} has {size[0]}x{size[1]} pixels, expected {width}x{height}; resize it, or export the data again"
            )
    # GaussianAvatars reads only the angle, and assumes square pixels and a centered principal point.
    fx = float(entry["fl_x"]) if "fl_x" in entry else width / (2 * math.tan(float(entry["camera_angle_x"]) / 2))
    fy = float(entry.get("fl_y", fx))
    cx, cy = float(entry.get("cx", width / 2)), height - float(entry.get("cy", height / 2))
    if not (all(map(math.isfinite, (fx, fy, cx, cy))) and fx > 0 and fy > 0 and width > 0 and height > 0):
        raise ValueError(f"intrinsics fx={fx} fy={fy} cx={cx} cy={cy} of {width}x{height} pixels are not a camera")
    viewmat = _to_viewmat(entry["transform_matrix"])
    return Frame(*frame_index(entry), viewmat, fx, fy, cx, cy, width, height, image, params, mask)


def _to_viewmat(transform_matrix: Any) -> np.ndarray:
    """Camera-to-world with OpenGL axes -> world-to-camera with OpenCV axes, (4, 4)."""
    matrix = np.asarray(transform_matrix, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise ValueError(f"transform_matrix is {matrix.shape}, expected (4, 4)")
    rotation = matrix[:3, :3]
    rigid = np.isfinite(matrix).all() and np.allclose(matrix[3], [0, 0, 0, 1])
    if not (rigid and np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) and np.linalg.det(rotation) > 0):
        raise ValueError(f"transform_matrix {matrix.tolist()} is not a rotation and a translation")
    return np.linalg.inv(matrix @ OPENGL_TO_OPENCV)


# ---- writing


def _entry(frame: Frame, images: list[str], params_path: str) -> dict[str, Any]:
    return {
        "timestep_index": frame.timestep,
        "timestep_index_original": frame.timestep,
        "timestep_id": f"{frame.timestep:05d}",
        "camera_index": frame.camera,
        "camera_id": f"{frame.camera:02d}",
        "cx": frame.cx,
        "cy": frame.height - frame.cy,
        "fl_x": frame.fx,
        "fl_y": frame.fy,
        "h": frame.height,
        "w": frame.width,
        "camera_angle_x": 2 * math.atan(frame.width / (2 * frame.fx)),
        "camera_angle_y": 2 * math.atan(frame.height / (2 * frame.fy)),
        "transform_matrix": (np.linalg.inv(frame.viewmat) @ OPENGL_TO_OPENCV).tolist(),
        **dict(zip(("file_path", "fg_mask_path"), images)),
        "flame_param_path": params_path,
    }


def _transforms(entries: list[dict[str, Any]], rig: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"frames": entries}
    content |= {key: rig[key] for key in ("cx", "cy", "fl_x", "fl_y", "h", "w", "camera_angle_x", "camera_angle_y")}
    for what in ("timestep", "camera"):
        content[f"{what}_indices"] = sorted({entry[f"{what}_index"] for entry in entries})
    return content
