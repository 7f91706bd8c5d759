"""Recognizes and reads the output of face trackers, which an avatar is fitted to; of the images only the headers."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from gaussian_tokenizer.avatars.avatar_files import METADATA_NAME
from gaussian_tokenizer.captures.checks import find_problems
from gaussian_tokenizer.captures.pixel3dmm import checkpoint_files, read_pixel3dmm
from gaussian_tokenizer.captures.subject import read_metadata, shared_ids
from gaussian_tokenizer.captures.tracking import Recording, Tracking
from gaussian_tokenizer.captures.transforms_json import TRANSFORMS_NAME, sister_folders, vhap_split
from gaussian_tokenizer.captures.vhap import RAW_PATTERN, raw_file, read_dataset, read_raw
from gaussian_tokenizer.heads.head_model import HeadModel

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
    """Read a subject that was tracked on `head`.

    Raises FileNotFoundError or ValueError with one line that says what is wrong and what to do: unreadable or missing
    files, head parameters of another subject or head model, NaN, and the errors of `checks.find_problems`.
    """
    tracking = read_tracking(path, head)
    errors = [problem.text for problem in find_problems(tracking, head) if problem.is_error]
    if errors:
        rest = f" (and {len(errors) - 1} more; python -m gaussian_tokenizer.inspect lists them)" if errors[1:] else ""
        raise ValueError(f"{tracking.path}: {errors[0]}{rest}")
    return tracking


def read_tracking(path: str | os.PathLike, head: HeadModel | None) -> Tracking:
    """`load_tracking` without the check whether images, cameras and head fit together.

    Without a head, the sizes of the parameters are not checked either, and Pixel3DMM cannot be read (ValueError).
    """
    path = Path(path)
    form = recognize(path)
    if form is None:
        found = "is not a tracking" if path.exists() else "no such folder"
        raise FileNotFoundError(f"{path}: {found}; expected {EXPECTED}")
    folder = path if path.is_dir() else path.parent
    subject_id, metadata = read_metadata(folder, folder.resolve().name)
    recording = READERS[form](path, head)
    if head is not None:
        try:
            head.check(recording.params)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    frames, timesteps, params, splits, own_metadata = recording
    if splits is None:
        splits = vhap_split([frame.key for frame in frames])
    kind = form
    if form == "vhap" and sister_folders(folder):
        kind = "union"
    elif form == "vhap" and len({frame.camera for frame in frames}) == 1:
        kind = "monocular"
    rows = {name: tuple(indices) for name, indices in splits.items()}
    return Tracking(subject_id, path, kind, tuple(frames), timesteps, params, rows, metadata | own_metadata)


def recognize(path: Path) -> str | None:
    """The key of the reader in READERS; None if it is not a tracking."""
    if path.is_file():
        return "vhap_raw" if re.fullmatch(RAW_PATTERN, path.name) else None
    if (path / TRANSFORMS_NAME).is_file() or (path / "transforms_train.json").is_file():
        return "vhap"
    if raw_file(path) is not None:
        return "vhap_raw"
    return "pixel3dmm" if checkpoint_files(path) else None


def find_trackings(path: str | os.PathLike) -> list[Path]:
    """The folder itself if it is a tracking, else the trackings directly in it by name, without the sequences of a UNION.

    FileNotFoundError if there are none; ValueError if two have the same subject id.
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
    ids = [(read_metadata(each, each.resolve().name)[0], each.name) for each in found]
    for subject_id, names in shared_ids(ids).items():
        raise ValueError(
            f"{path}: {', '.join(names)} have one subject id, {subject_id!r}; give each its own in {METADATA_NAME}"
        )
    return found
