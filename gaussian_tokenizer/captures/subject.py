"""A subject on disk: one avatar, its license and consent, and the images it was made from.

The layout is that of GaussianAvatars (the avatar) and of a VHAP export (the frames, see `transforms_json`), plus
`metadata.json` with avatar_id, license, consent, head_name and head_hash. Frames without an avatar are a `Tracking`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.avatar_files import METADATA_NAME, PARAMETERS_NAME, PLY_NAME
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.transforms_json import TRANSFORMS_NAME, read_transforms, write_frames
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.utils.atomic import atomic_folder
from gaussian_tokenizer.utils.json_files import read_json, write_json

UNKNOWN = "unknown"
LAYOUT = (
    f"<avatar_id>/{PLY_NAME} with {PARAMETERS_NAME} (or point_cloud/iteration_<N>/ with both), and optionally "
    f"{METADATA_NAME} and {TRANSFORMS_NAME} with images/ and flame_param/"
)


class About(NamedTuple):
    """What `metadata.json` says of a subject; "unknown" where it does not."""

    license: str = UNKNOWN
    consent: str = UNKNOWN
    provenance: str = UNKNOWN

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "About":
        """ValueError if license or consent is refused (false or "no")."""
        for name in ("license", "consent"):
            if str(metadata.get(name)).strip().lower() in ("false", "no"):
                raise ValueError(f"{name} in metadata.json is {metadata[name]!r}: the subject may not be used")
        values = (
            " ".join(value.split()) if isinstance(value := metadata.get(name), str) else "" for name in cls._fields
        )
        return cls(*(UNKNOWN if value.lower() in ("", "none", UNKNOWN) else value for value in values))

    @property
    def missing(self) -> list[str]:
        """Which of license and consent are unknown."""
        return [name for name in ("license", "consent") if getattr(self, name) == UNKNOWN]


@dataclass(frozen=True)
class Subject:
    """A subject folder. Only `metadata.json` is read when it is opened."""

    avatar_id: str
    path: Path
    metadata: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Subject":
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such subject folder; expected {LAYOUT}")
        avatar_id, metadata = read_metadata(path, path.name)
        return cls(avatar_id, path, metadata)

    @property
    def about(self) -> About:
        return About.of(self.metadata)

    def load_avatar(self, head: HeadModel | None = None) -> GaussianAvatar:
        """The avatar with `head` attached; ValueError if it was made on another head model."""
        return GaussianAvatar.load(self.path, head=head)

    def frames(self) -> list[Frame]:
        """All frames by timestep, then camera; [] for a folder without `transforms.json`."""
        path = self.path / TRANSFORMS_NAME
        return read_transforms(path) if path.exists() else []


def read_metadata(folder: Path, default_id: str) -> tuple[str, dict[str, Any]]:
    """The `avatar_id` and the content of a folder's `metadata.json`; `default_id` and {} if there is no such file."""
    path = folder / METADATA_NAME
    metadata = read_json(path) if path.is_file() else {}
    avatar_id = metadata.get("avatar_id", default_id)
    if not isinstance(avatar_id, str) or not avatar_id:
        raise ValueError(f"{path}: avatar_id is {avatar_id!r}, expected a string")
    return avatar_id, metadata


def shared_ids(ids: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Ids that several folders have -> names of those folders; `ids` are pairs of id and folder name."""
    names: dict[str, list[str]] = {}
    for avatar_id, name in ids:
        names.setdefault(avatar_id, []).append(name)
    return {avatar_id: found for avatar_id, found in names.items() if len(found) > 1}


def find_subjects(folder: str | os.PathLike) -> list[Subject]:
    """Every subject directly in `folder`, sorted by folder name; other folders are skipped."""
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
    """Write a subject folder, atomically.

    `metadata` should say `license` and `consent`; `avatar_id` is the folder's name unless given.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as new:
        write_json(new / METADATA_NAME, {"avatar_id": folder.name} | dict(metadata or {}))
        avatar.save(new)
        if frames:
            write_frames(new, frames)
