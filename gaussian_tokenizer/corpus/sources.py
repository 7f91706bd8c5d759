"""A subject on its way into a corpus: where it comes from, whether it can be used, and what the corpus holds of it.

Reading is what takes time (a folder is many small files, a synthetic subject has to be drawn first), and token ids need
bounds, which need every subject. So `read_subject` reads each subject once, whole, and leaves all the rest of its rows in
one file of the folder in the making; `corpus_shards` writes the Parquet files from those. Images that lie in files
stay where they are until their shard is written.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from gaussian_tokenizer.avatars.anchoring import face_frames, local_to_world
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.subject import Frame, Subject, find_subject_folders
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.tokenizer.image_files import verify_image
from gaussian_tokenizer.utils.atomic import atomic_file

ABOUT = ("license", "consent", "provenance")  # of a subject's metadata: what a card says of everyone
UNKNOWN = "unknown"
CAMERA = ("fx", "fy", "cx", "cy")


class SubjectLike(Protocol):
    """What `Subject` is for a folder."""

    @property
    def avatar_id(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    def load_avatar(self, head: HeadModel) -> GaussianAvatar: ...
    def frames(self) -> Sequence[Frame]: ...


class SubjectSource(Protocol):
    """Where the subjects of a corpus come from; it goes to every process."""

    @property
    def where(self) -> str:
        """For messages."""

    @property
    def recipe(self) -> Any:
        """What decides the subjects beside their names, as JSON, if they are made and not found: those that are ready are
        then kept when a killed build is continued. None: subjects lie in files, and are read again."""

    def names(self) -> Sequence[str]:
        """One for each subject; folder names, where there are folders."""

    def open(self, name: str, head: HeadModel) -> SubjectLike:
        """ValueError or OSError for a subject that cannot be used."""


@dataclass(frozen=True)
class FolderSource:
    """The subject folders in a folder."""

    path: Path
    recipe: None = None

    @property
    def where(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        return [path.name for path in find_subject_folders(self.path)]

    def open(self, name: str, head: HeadModel) -> Subject:
        return Subject.open(self.path / name)


@dataclass(frozen=True, eq=False, slots=True)
class SubjectSummary:
    """What a subject holds; `problem` says why it cannot go into a corpus. Small: the summary of all is kept in memory."""

    number: int  # of its name among the names of the source
    name: str
    avatar_id: str
    about: tuple[str, ...] = (UNKNOWN,) * len(ABOUT)
    problem: str | None = None
    num_points: int = 0
    box: np.ndarray = field(
        default_factory=lambda: np.zeros((2, 3), np.float32)
    )  # (2, 3) corners around the canonical points, meters
    static_offset: bool = False
    image_sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (K,) bytes, one a frame
    digest: bytes = b""  # over everything that goes into the corpus


def read_subject(number: int, name: str, source: SubjectSource, folder: Path, head: HeadModel) -> SubjectSummary:
    """Read a subject whole and write what a corpus holds of it to `folder`; never raises for what is in its files."""
    path = subject_file(folder, number)
    if source.recipe is not None and path.exists():
        with safe_open(path, framework="np") as file:
            found = {key: file.get_tensor(key) for key in file.keys() if key != "frames.images"}  # noqa: SIM118
            return _summarize(number, name, found, json.loads(file.metadata()["subject"]), path.read_bytes())
    avatar_id, about = name, (UNKNOWN,) * len(ABOUT)
    try:
        subject = source.open(name, head)
        avatar_id, about = subject.avatar_id, about_of(subject.metadata)
        tensors, told = _read(subject, head)
        # One entry of metadata: safetensors does not promise the order of several, and equal subjects give equal digests.
        content = save(tensors, metadata={"subject": json.dumps(told, sort_keys=True)})
    except Exception as error:
        # Pillow alone has a dozen kinds of errors for a damaged file; to the user all are a subject that is not usable.
        reason = " ".join(str(error).split())
        if not reason or not isinstance(error, ValueError | OSError):
            reason = f"{type(error).__name__}: {reason}"
        return SubjectSummary(number, name, avatar_id, about, problem=reason)
    if source.recipe is None:  # not kept if the build is killed: nothing waits for the disk
        path.write_bytes(content)
    else:
        with atomic_file(path) as file:
            file.write(content)
    return _summarize(number, name, tensors, told, content)


def subject_file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def about_of(metadata: dict[str, Any]) -> tuple[str, ...]:
    """License, consent and provenance; "unknown" where the metadata do not say so in words. ValueError for a plain no."""
    for name in ABOUT[:2]:
        if str(metadata.get(name)).strip().lower() in ("false", "no"):
            raise ValueError(f"{name} in metadata.json is {metadata[name]!r}: the subject may not be used")
    values = (" ".join(value.split()) if isinstance(value := metadata.get(name), str) else "" for name in ABOUT)
    return tuple(UNKNOWN if value.lower() in ("", "none", UNKNOWN) else value for value in values)


# ---- reading


def _read(subject: SubjectLike, head: HeadModel) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Everything a corpus holds of a subject but its token ids: arrays, and what is no array."""
    avatar = subject.load_avatar(head)
    params = avatar.params or HeadParameters.zeros(head.n_shape, head.n_expression)
    params = replace(params.frame(0), dynamic_offset=None)
    vertices = head.canonical_vertices(params)
    # The avatar's canonical_points, of vertices that are here already.
    positions = local_to_world(avatar.positions, avatar.faces, face_frames(vertices, head.faces)).numpy()
    if not np.isfinite(positions).all():
        row = int(np.argmin(np.isfinite(positions).all(axis=1)))
        raise ValueError(f"{subject.avatar_id}: point {row} is at {positions[row].tolist()} on the canonical head")
    tensors = {
        "positions": positions,
        "faces": avatar.faces.numpy().astype(np.int32),
        "shape": params.shape.numpy(),
        **{name: value[0] for name, value in pose_of(params).items()},
        "head_vertices": vertices.numpy(),
        "head_normals": head.normals(vertices).numpy().astype(np.float16),
    }
    if params.static_offset is not None and params.static_offset.any():
        tensors["static_offset"] = params.static_offset.numpy()
    frames, images, times = _read_frames(subject.frames(), head)
    tensors |= {f"frames.{name}": value for name, value in frames.items()}
    about = {"avatar_id": subject.avatar_id, "metadata": subject.metadata, "images": images, "times": times}
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}, about


def _read_frames(frames: Sequence[Frame], head: HeadModel) -> tuple[dict[str, np.ndarray], list[str], list[int]]:
    """Columns of K frames, the paths or names of their images, and the times of those that lie in files."""
    sizes, paths, times, poses, drawn = [], [], [], [], []
    pose: dict[str, np.ndarray] = {}
    params_path: object = None
    for frame in frames:
        if frame.params != params_path:  # the cameras of one moment share it
            params = frame.load_params()
            try:
                head.check(params)
            except ValueError as error:
                raise ValueError(f"{frame.params}: {error}") from None
            params_path, pose = frame.params, {name: value[0] for name, value in pose_of(params).items()}
        poses.append(pose)
        data = frame.image_bytes()
        sizes.append(len(data))
        _check_image(frame, data)
        if isinstance(frame.image, Path):
            paths.append(os.path.abspath(frame.image))
            # The time stands for the content: it is only asked whether a shard of an interrupted build is still good.
            times.append(frame.image.stat().st_mtime_ns)
        else:
            paths.append(f"{frame.timestep:05d}_{frame.camera:02d}.png")  # as `write_subject` names it
            drawn.append(np.frombuffer(data, np.uint8))
    if not paths:
        return {"image_size": np.zeros(0, np.int64)}, [], []
    columns: dict[str, np.ndarray] = {
        "timestep": np.array([frame.timestep for frame in frames], np.int32),
        "camera": np.array([frame.camera for frame in frames], np.int32),
        "image_size": np.array(sizes, np.int64),
        **{name: np.array([getattr(frame, name) for frame in frames], np.float32) for name in CAMERA},
        "width": np.array([frame.width for frame in frames], np.int32),
        "height": np.array([frame.height for frame in frames], np.int32),
        "viewmat": np.array([frame.viewmat for frame in frames], np.float32),
        **{name: np.stack([pose[name] for pose in poses]) for name in FRAME_KEYS},
    }
    if drawn:
        columns["images"] = np.concatenate(drawn)
    return columns, paths, times


def _check_image(frame: Frame, data: bytes) -> None:
    try:
        verify_image(data)
    except ValueError as error:
        raise ValueError(f"{frame.image}: damaged image ({error})") from None


def pose_of(params: HeadParameters) -> dict[str, np.ndarray]:
    """Expression and pose, each (T, size) float32."""
    values = params.tensors()
    return {name: values[name].numpy() for name in FRAME_KEYS}


def _summarize(
    number: int, name: str, tensors: dict[str, np.ndarray], about: dict[str, Any], content: bytes
) -> SubjectSummary:
    positions = tensors["positions"]
    return SubjectSummary(
        number=number,
        name=name,
        avatar_id=about["avatar_id"],
        about=about_of(about["metadata"]),
        num_points=len(positions),
        box=np.stack([positions.min(axis=0), positions.max(axis=0)]),
        static_offset="static_offset" in tensors,
        image_sizes=tensors["frames.image_size"],
        digest=hashlib.sha256(content).digest(),
    )
