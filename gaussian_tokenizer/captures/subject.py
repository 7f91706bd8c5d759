"""A subject on disk: one avatar, what is known about the person, and the images it was made from.

The layout is that of GaussianAvatars (the avatar) and of a VHAP export (the frames), plus `metadata.json`:

    <folder>/point_cloud.ply, flame_param.npz          or point_cloud/iteration_<N>/ with both
    <folder>/metadata.json                             avatar_id, license, consent, head_name, head_hash, ...
    <folder>/transforms.json                           cameras and paths of the frames: see `transforms`

`find_subjects` and `Subject.frames` read, `write_subject` writes. What has frames and no avatar yet is a `tracking`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.avatar_files import METADATA_NAME, PARAMETERS_NAME, PLY_NAME
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.transforms_json import TRANSFORMS_NAME, read_transforms, write_frames
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.utils.atomic import atomic_folder
from gaussian_tokenizer.utils.json_files import read_json, write_json

__all__ = ["Frame", "Subject", "find_subject_folders", "find_subjects", "write_subject"]
LAYOUT = (
    f"<avatar_id>/{PLY_NAME} with {PARAMETERS_NAME} (or point_cloud/iteration_<N>/ with both), and optionally "
    f"{METADATA_NAME} and {TRANSFORMS_NAME} with images/ and flame_param/"
)


@dataclass(frozen=True)
class Subject:
    """A subject folder; nothing but `metadata.json` is read before it is asked for."""

    avatar_id: str
    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def license(self) -> str:
        return self._answer("license")

    @property
    def consent(self) -> str:
        return self._answer("consent")

    def _answer(self, name: str) -> str:
        value = self.metadata.get(name)
        return value if isinstance(value, str) and value.strip() else "unknown"

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Subject":
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such subject folder; expected {LAYOUT}")
        metadata = read_json(path / METADATA_NAME) if (path / METADATA_NAME).exists() else {}
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
        return read_transforms(path) if path.exists() else []


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

    `metadata` should say `license` and `consent`; `avatar_id` is the folder's name unless given, the name and hash of
    the head model are the avatar's. Frames also give `canonical_flame_param.npz` and VHAP's split of the frames
    (`transforms_train.json`, ..), without which GaussianAvatars does not recognize the folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as new:
        write_json(new / METADATA_NAME, {"avatar_id": folder.name} | dict(metadata or {}))
        avatar.save(new)
        if frames:
            write_frames(new, frames)
