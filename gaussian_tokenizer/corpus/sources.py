"""A subject on its way into a corpus: where it comes from, whether it can be used, and what the corpus holds of it.

Reading takes the time, and token ids need bounds, which need every subject. So `read_subject` reads each subject once and
leaves all but the ids in one file of the build folder, from which `shards` writes. Images on disk stay there until then.
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
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.subject import About, Subject, find_subject_folders
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.tokenizer.image_files import verify_image
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.hub import one_line

FRAME_SCALARS = {
    **dict.fromkeys(("timestep", "camera", "width", "height"), np.int32),
    **dict.fromkeys(("fx", "fy", "cx", "cy"), np.float32),
}


class SubjectSource(Protocol):
    """Where the subjects of a corpus come from; it is pickled for every process."""

    @property
    def where(self) -> str:
        """For messages."""

    @property
    def recipe(self) -> Any:
        """What decides generated subjects, which a continued build keeps, as JSON; None for subjects in files."""

    def names(self) -> Sequence[str]:
        """One for each subject; folder names, where there are folders."""

    def open(self, name: str, head: HeadModel) -> Subject:
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
    """What a subject holds; small, because the summaries of all subjects are kept in memory."""

    number: int  # index of its name among the names of the source
    name: str
    avatar_id: str
    about: About
    problem: str | None = None  # why it cannot go into a corpus
    num_points: int = 0
    box: np.ndarray = field(default_factory=lambda: np.zeros((2, 3), np.float32))  # corners around the points, meters
    static_offset: bool = False
    image_sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (K,) bytes of each frame
    digest: bytes = b""  # over everything that goes into the corpus


def read_subject(number: int, name: str, source: SubjectSource, folder: Path, head: HeadModel) -> SubjectSummary:
    """Read a whole subject and write what a corpus holds of it to `folder`; never raises for the content of its files."""
    path = subject_file(folder, number)
    if source.recipe is not None and path.exists():
        with safe_open(path, framework="np") as file:
            found = {key: file.get_tensor(key) for key in file.keys() if key != "frames.images"}  # noqa: SIM118
            return _summarize(number, name, found, json.loads(file.metadata()["subject"]), path.read_bytes())
    avatar_id, about = name, About()
    try:
        subject = source.open(name, head)
        avatar_id, about = subject.avatar_id, About.of(subject.metadata)
        tensors, others = _read(subject, head)
        # One entry of metadata: safetensors does not promise the order of several, and equal subjects give equal digests.
        content = save(tensors, metadata={"subject": json.dumps(others, sort_keys=True)})
    except Exception as error:
        # Pillow alone raises a dozen types for a damaged file; to the user each is a subject that cannot be used.
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return SubjectSummary(number, name, avatar_id, about, problem=kind + one_line(error))
    if source.recipe is None:  # not kept if the build is killed, so there is no need to wait for the disk
        path.write_bytes(content)
    else:
        with atomic_file(path) as file:
            file.write(content)
    return _summarize(number, name, tensors, others, content)


def subject_file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _summarize(
    number: int, name: str, tensors: dict[str, np.ndarray], others: dict[str, Any], content: bytes
) -> SubjectSummary:
    positions = tensors["positions"]
    return SubjectSummary(
        number=number,
        name=name,
        avatar_id=others["avatar_id"],
        about=About.of(others["metadata"]),
        num_points=len(positions),
        box=np.stack([positions.min(axis=0), positions.max(axis=0)]),
        static_offset="static_offset" in tensors,
        image_sizes=tensors["frames.image_size"],
        digest=hashlib.sha256(content).digest(),
    )


def _read(subject: Subject, head: HeadModel) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Everything a corpus holds of a subject but its token ids: arrays, and JSON."""
    avatar = subject.load_avatar(head)
    params = avatar.params or HeadParameters.zeros(head.n_shape, head.n_expression)
    params = replace(params.frame(0), dynamic_offset=None)
    vertices = head.canonical_vertices(params)
    # As avatar.canonical_points(), with the vertices that are here already.
    positions = local_to_world(avatar.positions, avatar.faces, face_frames(vertices, head.faces)).numpy()
    if not np.isfinite(positions).all():
        row = int(np.argmin(np.isfinite(positions).all(axis=1)))
        raise ValueError(f"{subject.avatar_id}: point {row} is at {positions[row].tolist()} on the canonical head")
    tensors = {
        "positions": positions,
        "faces": avatar.faces.numpy().astype(np.int32),
        "shape": params.shape.numpy(),
        **_pose(params),
        "head_vertices": vertices.numpy(),
        "head_normals": head.normals(vertices).numpy().astype(np.float16),
    }
    if params.static_offset is not None and params.static_offset.any():
        tensors["static_offset"] = params.static_offset.numpy()
    frames, images, times = _read_frames(subject.frames(), head)
    tensors |= {f"frames.{name}": value for name, value in frames.items()}
    others = {"avatar_id": subject.avatar_id, "metadata": subject.metadata, "images": images, "times": times}
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}, others


def _read_frames(frames: Sequence[Frame], head: HeadModel) -> tuple[dict[str, np.ndarray], list[str], list[int]]:
    """Columns of K frames, the paths or names of their images, and the times of those on disk."""
    if not frames:
        return {"image_size": np.zeros(0, np.int64)}, [], []
    sizes, paths, times, poses, rendered = [], [], [], [], []
    pose: dict[str, np.ndarray] = {}
    params_path: object = None
    for frame in frames:
        if frame.params != params_path:  # the cameras of one timestep share it
            params = frame.load_params()
            try:
                head.check(params)
            except ValueError as error:
                raise ValueError(f"{frame.params}: {error}") from None
            params_path, pose = frame.params, _pose(params)
        poses.append(pose)
        data = frame.image_bytes()
        sizes.append(len(data))
        _check_image(frame, data)
        if isinstance(frame.image, Path):
            paths.append(os.path.abspath(frame.image))
            # The time stands for the content: it only decides whether a shard of an interrupted build is still valid.
            times.append(frame.image.stat().st_mtime_ns)
        else:
            paths.append(f"{frame.timestep:05d}_{frame.camera:02d}.png")  # as `write_subject` names it
            rendered.append(np.frombuffer(data, np.uint8))
    columns: dict[str, np.ndarray] = {
        **{name: np.array([getattr(frame, name) for frame in frames], kind) for name, kind in FRAME_SCALARS.items()},
        "viewmat": np.array([frame.viewmat for frame in frames], np.float32),
        "image_size": np.array(sizes, np.int64),
        **{name: np.stack([pose[name] for pose in poses]) for name in FRAME_KEYS},
    }
    if rendered:
        columns["images"] = np.concatenate(rendered)
    return columns, paths, times


def _check_image(frame: Frame, data: bytes) -> None:
    try:
        verify_image(data)
    except ValueError as error:
        raise ValueError(f"{frame.image}: damaged image ({error})") from None


def _pose(params: HeadParameters) -> dict[str, np.ndarray]:
    """Expression and pose of the first frame, each (size,) float32."""
    values = params.tensors()
    return {name: values[name][0].numpy() for name in FRAME_KEYS}
