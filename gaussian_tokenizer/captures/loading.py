"""A tracked person: images, cameras and head parameters, as a face tracker leaves them; what an avatar is fitted to.

`load_tracking` recognizes what a path is, reads it with one of the `tracking_formats`, and refuses it with one error if
`tracking_checks` finds that it cannot be right. `read_tracking` leaves those checks to the caller. Nothing but headers
of images and the head parameters is read before it is asked for.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gaussian_tokenizer.avatars.avatar_files import METADATA_NAME
from gaussian_tokenizer.captures.checks import find_problems
from gaussian_tokenizer.captures.pixel3dmm import checkpoint_files, read_pixel3dmm
from gaussian_tokenizer.captures.recording import Recording
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.captures.transforms_json import SPLITS, TRANSFORMS_NAME, sister_folders, vhap_split
from gaussian_tokenizer.captures.vhap import RAW_PATTERN, raw_file, read_dataset, read_raw
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.utils.json_files import read_json

READERS: dict[str, Callable[[Path, HeadModel | None], Recording]] = {
    "vhap": read_dataset,
    "vhap_raw": read_raw,
    "pixel3dmm": read_pixel3dmm,
}
EXPECTED = (
    "a VHAP dataset folder (transforms.json, or the transforms_train.json of a UNION), a folder with VHAP's "
    "tracked_flame_params_<epoch>.npz and images/, or Pixel3DMM's output (checkpoint/<frame>.frame and cropped/)"
)


def load_tracking(path: str | os.PathLike, head: HeadModel) -> Tracking:
    """Read a tracked person made on `head`.

    Raises FileNotFoundError or ValueError with one line that says what is wrong and what to do: unreadable or missing
    files, head parameters of another person or head model, NaN, and whatever `tracking_checks.find_problems` calls an
    error (cameras that do not see the head, inverted masks, black images, ...).
    """
    tracking = read_tracking(path, head)
    errors = [problem.text for problem in find_problems(tracking, head) if problem.is_error]
    if errors:
        rest = f" (and {len(errors) - 1} more; python -m gaussian_tokenizer.inspect lists them)" if errors[1:] else ""
        raise ValueError(f"{tracking.path}: {errors[0]}{rest}")
    return tracking


def read_tracking(path: str | os.PathLike, head: HeadModel | None) -> Tracking:
    """`load_tracking` without a look at whether images, cameras and head fit together.

    Without a head the sizes of the parameters are not checked either; Pixel3DMM's cannot be read (ValueError).
    """
    path = Path(path)
    form = recognize(path)
    if form is None:
        found = "is not a tracking" if path.exists() else "no such folder"
        raise FileNotFoundError(f"{path}: {found}; expected {EXPECTED}")
    folder = path if path.is_dir() else path.parent
    subject_id, metadata = _identity(folder)
    recording = READERS[form](path, head)
    if head is not None:
        try:
            head.check(recording.params)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    moments = [(frame.timestep, frame.camera) for frame in recording.frames]
    splits = recording.splits
    if splits is None:
        splits = vhap_split(moments) if moments else {name: [] for name in SPLITS}
    kind = form
    if form == "vhap" and sister_folders(folder):
        kind = "union"
    elif form == "vhap" and len({camera for _, camera in moments}) == 1:
        kind = "monocular"
    return Tracking(
        subject_id=subject_id,
        path=path,
        kind=kind,
        frames=tuple(recording.frames),
        timesteps=recording.timesteps,
        params=recording.params,
        splits={name: tuple(rows) for name, rows in splits.items()},
        metadata=metadata | recording.metadata,
    )


def recognize(path: Path) -> str | None:
    """Which of the READERS reads it; None if it is no tracking."""
    if path.is_file():
        return "vhap_raw" if re.fullmatch(RAW_PATTERN, path.name) else None
    if (path / TRANSFORMS_NAME).is_file() or (path / "transforms_train.json").is_file():
        return "vhap"
    if raw_file(path) is not None:
        return "vhap_raw"
    return "pixel3dmm" if checkpoint_files(path) else None


def find_trackings(path: str | os.PathLike) -> list[Path]:
    """The folder itself if it is a tracking, else those directly in it, sorted by name.

    FileNotFoundError if there is none; ValueError if two of them are of one subject id. Sequences that a UNION beside
    them is made of are left out: the UNION holds their frames.
    """
    path = Path(path)
    if recognize(path) is not None:
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected {EXPECTED}, or a folder of such")
    inside = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    found = [each for each in inside if recognize(each) is not None]
    if not found:
        raise FileNotFoundError(f"{path}: none of its {len(inside)} folders is a tracking; expected {EXPECTED}")
    in_union = {name for each in found for name in sister_folders(each)}
    found = [each for each in found if each.name not in in_union]
    by_id: dict[str, list[str]] = {}
    for each in found:
        by_id.setdefault(_identity(each)[0], []).append(each.name)
    for subject_id, names in by_id.items():
        if len(names) > 1:
            raise ValueError(
                f"{path}: {', '.join(names)} have one subject id, {subject_id!r}; give each its own in {METADATA_NAME}"
            )
    return found


def _identity(folder: Path) -> tuple[str, dict[str, Any]]:
    """The subject id and the content of `metadata.json`, if there is one."""
    path = folder / METADATA_NAME
    metadata = read_json(path) if path.is_file() else {}
    subject_id = metadata.get("avatar_id", folder.resolve().name)
    if not isinstance(subject_id, str) or not subject_id:
        raise ValueError(f"{path}: avatar_id is {subject_id!r}, expected a string")
    return subject_id, metadata
