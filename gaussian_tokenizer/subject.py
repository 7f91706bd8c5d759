"""A subject on disk: one avatar, what is known about the person, and the pictures it was made from.

The layout is that of GaussianAvatars (the avatar) and of a VHAP export (the frames), plus `metadata.json`:

    <folder>/point_cloud.ply, flame_param.npz          or point_cloud/iteration_<N>/ with both
    <folder>/metadata.json                             avatar_id, licence, consent, head_name, head_hash, ...
    <folder>/transforms.json                           cameras and paths of the frames
    <folder>/images/<timestep>_<camera>.png            flame_param/<timestep>.npz

In the files a camera is camera-to-world with OpenGL axes and `cy` counted from the lower edge; in here it is
world-to-camera with OpenCV axes (x right, y down, z forward) and `cy` counted from the upper edge, like everywhere in
the toolkit. `find_subjects` and `Subject.frames` read, `write_subject` writes.
"""

import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gaussian_tokenizer.atomic import atomic_folder
from gaussian_tokenizer.avatar import METADATA_NAME, PARAMETERS_NAME, PLY_NAME, GaussianAvatar
from gaussian_tokenizer.head_model import HeadModel
from gaussian_tokenizer.head_parameters import HeadParameters

TRANSFORMS_NAME, CANONICAL_NAME = "transforms.json", "canonical_flame_param.npz"
LAYOUT = (
    f"<avatar_id>/{PLY_NAME} with {PARAMETERS_NAME} (or point_cloud/iteration_<N>/ with both), and optionally "
    f"{METADATA_NAME} and {TRANSFORMS_NAME} with images/ and flame_param/"
)
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
HELD_OUT_CAMERA = 8  # of VHAP's 16; the last one where there is no camera 8


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a subject: where its camera stood, and the head parameters at that moment.

    Read frames hold paths in `image` and `params`; a frame to be written may also hold the picture (PIL, or uint8
    (H, W, 3 or 4)) and the `HeadParameters` of T = 1 themselves.
    """

    timestep: int
    camera: int
    viewmat: np.ndarray  # (4, 4) float64, world-to-camera, OpenCV axes, metres
    fx: float  # pixels
    fy: float
    cx: float  # pixels from the left edge
    cy: float  # pixels from the upper edge
    width: int
    height: int
    image: Path | Image.Image | np.ndarray
    params: Path | HeadParameters

    @property
    def K(self) -> np.ndarray:
        """(3, 3) float64 intrinsics in pixels."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], dtype=np.float64)

    def image_bytes(self) -> bytes:
        """The picture as a file: the bytes on the disk, or PNG of a picture in memory."""
        if isinstance(self.image, Path):
            return self.image.read_bytes()
        picture = self.image if isinstance(self.image, Image.Image) else Image.fromarray(self.image)
        stream = io.BytesIO()
        picture.save(stream, format="PNG")
        return stream.getvalue()

    def load_params(self) -> HeadParameters:
        return HeadParameters.load(self.params) if isinstance(self.params, Path) else self.params


@dataclass(frozen=True)
class Subject:
    """A subject folder; nothing but `metadata.json` is read before it is asked for."""

    avatar_id: str
    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def licence(self) -> str:
        return str(self.metadata.get("licence", "unknown"))

    @property
    def consent(self) -> str:
        return str(self.metadata.get("consent", "unknown"))

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Subject":
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such subject folder; expected {LAYOUT}")
        metadata = _read_json(path / METADATA_NAME) if (path / METADATA_NAME).exists() else {}
        avatar_id = metadata.get("avatar_id", path.name)
        if not isinstance(avatar_id, str) or not avatar_id:
            raise ValueError(f"{path / METADATA_NAME}: avatar_id is {avatar_id!r}, expected a string")
        return cls(avatar_id, path, metadata)

    def load_avatar(self, head: HeadModel | None = None) -> GaussianAvatar:
        """The avatar with `head` attached; ValueError if it was made on another head model."""
        return GaussianAvatar.load(self.path, head=head)

    def frames(self) -> list[Frame]:
        """All frames by timestep, then camera; [] for a folder without `transforms.json`."""
        path = self.path / TRANSFORMS_NAME
        if not path.exists():
            return []
        transforms = _read_json(path)
        entries = transforms.get("frames")
        if not isinstance(entries, list):
            raise ValueError(f"{path}: has no list `frames`; expected the transforms.json of a VHAP export")
        frames = []
        for row, entry in enumerate(entries):
            try:
                # What the rig has in common may stand once, at the top.
                frames.append(_read_frame(self.path, {**transforms, **entry}))
            except KeyError as error:
                raise ValueError(f"{path}: frame {row} lacks {error}") from None
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{path}: frame {row}: {error}") from None
        frames.sort(key=lambda frame: (frame.timestep, frame.camera))
        for first, second in itertools.pairwise(frames):
            if (first.timestep, first.camera) == (second.timestep, second.camera):
                raise ValueError(f"{path}: two frames of timestep {first.timestep} and camera {first.camera}")
        return frames


def find_subjects(folder: str | os.PathLike) -> list[Subject]:
    """Every subject directly in `folder`, sorted by folder name. Folders of other things are passed over."""
    return [Subject.open(path) for path in find_subject_folders(folder)]


def find_subject_folders(folder: str | os.PathLike) -> list[Path]:
    """The folders `find_subjects` would open; FileNotFoundError with the expected layout if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with {LAYOUT}")
    signs = (PLY_NAME, "point_cloud", PARAMETERS_NAME, METADATA_NAME, TRANSFORMS_NAME)
    paths = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [path for path in paths if any((path / sign).exists() for sign in signs)]
    if not found:
        raise FileNotFoundError(f"{folder}: no avatars in its {len(paths)} folders; expected {LAYOUT}")
    return found


def write_subject(
    folder: str | os.PathLike,
    avatar: GaussianAvatar,
    frames: Sequence[Frame] = (),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a subject folder; it appears whole, or not at all.

    `metadata` should say `licence` and `consent`; `avatar_id` is the folder's name unless given, the name and hash of
    the head model are the avatar's. Frames also give `canonical_flame_param.npz` and VHAP's split of the frames
    (`transforms_train.json`, ..), without which GaussianAvatars does not recognise the folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as new:
        _write_json(new / METADATA_NAME, {"avatar_id": folder.name} | dict(metadata or {}))
        avatar.save(new)
        if frames:
            _write_frames(new, frames)


# ---- reading


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def _read_frame(folder: Path, entry: dict[str, Any]) -> Frame:
    image, params = folder / entry["file_path"], folder / entry["flame_param_path"]
    for path in (image, params):
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
    if "w" in entry and "h" in entry:
        width, height = int(entry["w"]), int(entry["h"])
    else:
        with Image.open(image) as picture:
            width, height = picture.size
    # GaussianAvatars itself reads the angle only; square pixels and a centred principal point are its rule.
    fx = float(entry["fl_x"]) if "fl_x" in entry else width / (2 * math.tan(float(entry["camera_angle_x"]) / 2))
    fy = float(entry.get("fl_y", fx))
    cx, cy = float(entry.get("cx", width / 2)), height - float(entry.get("cy", height / 2))
    if not (all(map(math.isfinite, (fx, fy, cx, cy))) and fx > 0 and fy > 0 and width > 0 and height > 0):
        raise ValueError(f"intrinsics fx={fx} fy={fy} cx={cx} cy={cy} of {width}x{height} pixels are not a camera")
    return Frame(
        timestep=int(entry["timestep_index"]),
        camera=int(entry["camera_index"]),
        viewmat=_to_viewmat(entry["transform_matrix"]),
        fx=fx,
        fy=fy,
        cx=cx,
        cy=cy,
        width=width,
        height=height,
        image=image,
        params=params,
    )


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


def _write_frames(folder: Path, frames: Sequence[Frame]) -> None:
    (folder / "images").mkdir()
    (folder / "flame_param").mkdir()
    entries, written = [], {}
    for frame in sorted(frames, key=lambda frame: (frame.timestep, frame.camera)):
        image_path = f"images/{frame.timestep:05d}_{frame.camera:02d}.png"
        params_path = f"flame_param/{frame.timestep:05d}.npz"
        if (folder / image_path).exists():
            raise ValueError(f"two frames of timestep {frame.timestep} and camera {frame.camera}")
        (folder / image_path).write_bytes(frame.image_bytes())
        if params_path not in written:
            written[params_path] = frame.load_params()
            with open(folder / params_path, "wb") as file:
                written[params_path].write(file)
        entries.append(_frame_entry(frame, image_path, params_path))
    with open(folder / CANONICAL_NAME, "wb") as file:
        next(iter(written.values())).frame(0).canonical(jaw_angle=0.3).write(file)
    for name, chosen in {"": entries, **_vhap_split(entries)}.items():
        _write_json(folder / f"transforms{name}.json", _transforms(chosen, entries[0]))


def _frame_entry(frame: Frame, image_path: str, params_path: str) -> dict[str, Any]:
    return {
        "timestep_index": frame.timestep,
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
        "file_path": image_path,
        "flame_param_path": params_path,
    }


def _transforms(entries: list[dict[str, Any]], rig: dict[str, Any]) -> dict[str, Any]:
    shared = {key: rig[key] for key in ("cx", "cy", "fl_x", "fl_y", "h", "w", "camera_angle_x", "camera_angle_y")}
    indices = {
        f"{what}_indices": sorted({entry[f"{what}_index"] for entry in entries}) for what in ("timestep", "camera")
    }
    return {"frames": entries, **shared, **indices}


def _vhap_split(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """VHAP's split of one sequence: the last 30 % of the timesteps are the test, one camera of the others is val."""
    timesteps = sorted({entry["timestep_index"] for entry in entries})
    cameras = sorted({entry["camera_index"] for entry in entries})
    seen = set(timesteps[: math.ceil(0.7 * len(timesteps))])
    held_out = HELD_OUT_CAMERA if HELD_OUT_CAMERA in cameras else cameras[-1]
    split: dict[str, list[dict[str, Any]]] = {"_train": [], "_val": [], "_test": []}
    for entry in entries:
        is_val = entry["camera_index"] == held_out and len(cameras) > 1
        name = "_test" if entry["timestep_index"] not in seen else "_val" if is_val else "_train"
        split[name].append(entry)
    return split


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
