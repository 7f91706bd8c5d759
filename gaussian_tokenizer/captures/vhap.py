"""Readers of VHAP: an exported dataset folder, a UNION of several, and the tracker's own `tracked_flame_params_*.npz`.

A UNION has only the `transforms_*.json` of the three splits, whose paths lead into its sequences; of their shapes the first
is taken, as in GaussianAvatars. The raw file has one fixed camera a meter in front of the origin, which is moved to the mean
translation of the head, as by VHAP's export; masks are in `alpha_maps/` or `fg_masks/`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gaussian_tokenizer.avatars.motions import join_frames
from gaussian_tokenizer.captures.frame import OPENGL_TO_OPENCV, Frame, size_of_image
from gaussian_tokenizer.captures.tracking import Recording, find_image
from gaussian_tokenizer.captures.transforms_json import (
    SPLITS,
    TRANSFORMS_NAME,
    frame_index,
    read_transforms,
    sister_folders,
    sorted_frames,
)
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.utils.json_files import read_json

RAW_PATTERN = r"tracked_flame_params_\d+\.npz"
# Mean distance of the skins of two trackings. Synthetic subjects are 3.6 to 15 mm apart, median 6.8.
OTHER_SUBJECT_MM = 10.0


def read_dataset(folder: Path, head: HeadModel | None) -> Recording:
    """A dataset folder or a UNION. ValueError for parameters of another subject or of more than one timestep."""
    split_files = {name: folder / f"transforms_{name}.json" for name in SPLITS}
    whole = folder / TRANSFORMS_NAME
    if whole.is_file():
        frames = read_transforms(whole)
        keys_of = {name: _frame_keys(path) for name, path in split_files.items() if path.is_file()}
    else:
        of_split = {name: read_transforms(path) for name, path in split_files.items() if path.is_file()}
        keys_of = {name: [each.key for each in chosen] for name, chosen in of_split.items()}
        # A frame may be in two splits (GEM puts the only camera into train and val); two images may not be one frame.
        different = {(each.image, *each.key): each for chosen in of_split.values() for each in chosen}
        frames = sorted_frames(different.values(), folder / "transforms_*.json")
    if not frames:
        raise ValueError(f"{folder}: its transforms have no frames")
    index = {frame.key: row for row, frame in enumerate(frames)}
    for name, keys in keys_of.items():
        unknown = [key for key in keys if key not in index]
        if unknown:
            raise ValueError(
                f"{split_files[name]}: has timestep {unknown[0][0]} of camera {unknown[0][1]}, "
                f"which {whole.name} lacks ({len(unknown)} such frames); export the data again"
            )
    splits = {name: sorted(index[key] for key in keys_of.get(name, [])) for name in SPLITS} if keys_of else None
    timesteps, params, metadata = _load_params(folder, frames, head)
    return Recording(frames, timesteps, params, splits, metadata)


def read_raw(path: Path, head: HeadModel | None) -> Recording:
    """`tracked_flame_params_<epoch>.npz` (in a folder the latest) with the images beside it, if there are any."""
    file = raw_file(path) if path.is_dir() else path
    if file is None:
        raise FileNotFoundError(f"{path}: has no tracked_flame_params_<epoch>.npz")
    params = HeadParameters.load(file)
    other = params.layout.other_arrays if params.layout else {}
    offset = params.translation.mean(0)
    params = replace(params, layout=None, translation=params.translation - offset)
    T = params.num_frames
    ids = [str(each) for each in other.get("timestep_id", np.array([f"{row:05d}" for row in range(T)])).reshape(-1)]
    if len(ids) != T or len(set(ids)) != T or any(not re.fullmatch(r"[\w-]+", each) for each in ids):
        raise ValueError(f"{file}: timestep_id names {len(ids)} timesteps, expected {T} different plain names")
    frames = []
    if (file.parent / "images").is_dir():
        camera_to_world = np.eye(4)  # OpenGL axes
        camera_to_world[:3, 3] = np.array([0.0, 0.0, 1.0]) - offset.double().numpy()
        frames = _raw_frames(
            file, ids, params, _focal_length(file, other), np.linalg.inv(camera_to_world @ OPENGL_TO_OPENCV)
        )
    return Recording(frames, tuple(range(T)), params, None, {"tracking_file": file.name})


def _focal_length(file: Path, arrays: Mapping[str, np.ndarray]) -> float:
    """In units of the longer side of the image."""
    if "focal_length" not in arrays:
        raise ValueError(
            f"{file}: has no focal_length, so its cameras are calibrated ones that are not in this file; export a dataset "
            "folder with VHAP (vhap/export_as_nerf_dataset.py) and give that"
        )
    value = arrays["focal_length"]
    is_number = value.dtype.kind in "fiu" and value.size > 0
    focal = float(value.reshape(-1)[0]) if is_number else 0.0
    if 0 < focal < np.inf:
        return focal
    found = focal if is_number else f"{value.dtype} {value.shape}"
    raise ValueError(
        f"{file}: focal_length is {found}, expected a number above 0 (in units of the longer side); export the tracking again"
    )


def _raw_frames(file: Path, ids: list[str], params: HeadParameters, focal: float, viewmat: np.ndarray) -> list[Frame]:
    frames, missing = [], []
    for row, name in enumerate(ids):
        image = find_image([file.parent / "images"], name)
        if image is None:
            missing.append(name)
            continue
        mask = find_image([file.parent / "alpha_maps", file.parent / "fg_masks"], name)
        width, height = size_of_image(image)
        f = focal * max(width, height)
        if mask is not None and size_of_image(mask) != (width, height):
            raise ValueError(f"{mask} is of {size_of_image(mask)} pixels, {image.name} of {(width, height)}; resize it")
        own = params.frame(row)
        frames.append(Frame(row, 0, viewmat, f, f, width / 2, height / 2, width, height, image, own, mask))
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of {len(ids)} timesteps have no image in {file.parent / 'images'}, the first is "
            f"{missing[0]}; copy the folder images/ of the sequence again"
        )
    return frames


def raw_file(folder: Path) -> Path | None:
    """The `tracked_flame_params_<epoch>.npz` of the latest epoch."""
    paths = [path for path in folder.glob("tracked_flame_params_*.npz") if re.fullmatch(RAW_PATTERN, path.name)]
    return max(paths, key=lambda path: int(path.stem.rsplit("_", 1)[1]), default=None)


def _frame_keys(path: Path) -> list[tuple[int, int]]:
    """(timestep, camera) of the frames of a split, whose other content is in `transforms.json` already."""
    entries = read_json(path).get("frames")
    try:
        return [frame_index(entry) for entry in entries]  # type: ignore[union-attr]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its frames lack timestep_index or camera_index: {error!r}") from None


def _load_params(
    folder: Path, frames: list[Frame], head: HeadModel | None
) -> tuple[tuple[int, ...], HeadParameters, dict[str, Any]]:
    path_of: dict[int, Path] = {}
    for frame in frames:
        assert isinstance(frame.params, Path)
        known = path_of.setdefault(frame.timestep, frame.params)
        if known != frame.params:
            raise ValueError(
                f"{folder}: timestep {frame.timestep} has two flame_param files, {known.name} and {frame.params.name}; "
                "all cameras of a timestep see one head"
            )
    loaded = {timestep: HeadParameters.load(path) for timestep, path in sorted(path_of.items())}
    for timestep, each in loaded.items():
        if each.num_frames != 1:
            raise ValueError(
                f"{path_of[timestep]}: holds {each.num_frames} frames, expected the 1 of timestep {timestep}; "
                "is it the file of a whole sequence?"
            )
    params = join_frames([*loaded.values()], [path_of[timestep] for timestep in loaded], of_subject=True)
    first_of = _check_sequences(loaded, path_of)
    of_sequence = {name: loaded[first] for name, first in first_of.items()}
    distances = _check_subject(of_sequence, folder, head) if head is not None and len(first_of) > 1 else {}
    metadata = {"sequences": sorted(first_of), "sequence_distances_mm": distances} if sister_folders(folder) else {}
    return tuple(sorted(loaded)), params, metadata


def _check_sequences(loaded: dict[int, HeadParameters], path_of: dict[int, Path]) -> dict[str, int]:
    """Sequence folder -> its first timestep; ValueError if the shape changes within one."""
    first_of: dict[str, int] = {}
    for timestep, params in loaded.items():
        first = first_of.setdefault(path_of[timestep].parent.parent.name, timestep)
        for key in ("shape", "static_offset"):
            own, expected = params.tensors().get(key), loaded[first].tensors().get(key)
            if own is not None and expected is not None and not torch.allclose(own, expected, atol=1e-6):
                difference = float((own - expected).abs().max())
                raise ValueError(
                    f"{path_of[timestep]}: its {key} differs from that of {path_of[first].name} by up to {difference:.3g}: "
                    "it is of another subject or another tracking; put the right file there"
                )
    return first_of


def _check_subject(of_sequence: dict[str, HeadParameters], folder: Path, head: HeadModel) -> dict[str, float]:
    """Mean distance of each sequence's skin to that of the first, mm; ValueError if it cannot be the same subject.

    Sequences are tracked separately, so a small distance is normal.
    """
    name_of_first, reference = next(iter(of_sequence.items()))
    distances = {}
    for name, params in of_sequence.items():
        skin, expected = (head.canonical_vertices(replace(each, static_offset=None)) for each in (params, reference))
        distances[name] = round(1000 * float((skin - expected).norm(dim=1).mean()), 3)
        if distances[name] > OTHER_SUBJECT_MM:
            raise ValueError(
                f"{folder}: the head of sequence {name} is {distances[name]:.1f} mm from that of {name_of_first} on "
                f"average, expected less than {OTHER_SUBJECT_MM:g}: it is of another subject"
            )
    return distances
