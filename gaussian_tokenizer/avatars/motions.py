"""Motions: head parameters over time that move an avatar, read from files of a tracker or made up for any head model."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from math import tau
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaussian_tokenizer.avatars.avatar_files import PARAMETERS_NAME
from gaussian_tokenizer.avatars.skinning import check_motion
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

MOTIONS = ("talk", "nod", "look_around", "expressions")
FRAMES_FOLDER = "flame_param"
# Patterns of the expression names of the procedural head and of ARKit. On FLAME's unnamed ones, word i is component i.
WORDS = {
    "smile": r"smile_(left|right)|mouthSmile_[LR]",
    "brows_up": r"brows_up_(left|right)|brows_inner_up|brow(Inner|Outer)Up_[LR]",
    "blink": r"lids_close_(left|right)|eyeBlink_[LR]",
    "pucker": r"pucker|mouthPucker",
    "wide": r"mouth_wide|mouthStretch_[LR]",
    "frown": r"frown|mouthFrown_[LR]|brows_down|browDown_[LR]",
}
UNNAMED = r"expression_?\d+|expression \d+"
UNNAMED_WEIGHT, UNNAMED_COUNT = 1.5, 10  # in standard deviations; components that "expressions" shows
SIDE = r"_(left|right|L|R)$"


def load_motion(path: str | os.PathLike, head: HeadModel) -> HeadParameters:
    """The frames of a motion: a `.npz` file, or a folder that has `flame_param.npz` or `flame_param/<timestep>.npz`.

    The folder of timesteps itself is accepted too. Shape and static offset are those of the (first) file, of any size:
    posing an avatar does not use them. Raises FileNotFoundError, or ValueError that names the file if it is damaged or
    its motion was made for another head model than `head`.
    """
    path = Path(path)
    motion, path = _load_folder(path) if path.is_dir() else (HeadParameters.load(path), path)
    check_motion(motion, head, f"{path}: the motion")
    return motion


def join_frames(parts: Sequence[HeadParameters], paths: Sequence[Path], of_subject: bool = False) -> HeadParameters:
    """The frames of all parts in one, with shape and static offset of the first; of their own sizes unless `of_subject`.

    ValueError that names the file of a part whose sizes differ from those of the first.
    """
    first, per_frame = parts[0].tensors(), parts[0].per_frame()
    for path, part in zip(paths, parts):
        for name in first if of_subject else per_frame:
            found, expected = part.tensors().get(name), first[name]
            size = slice(1 if name in per_frame else 0, None)
            if found is None or found.shape[size] != expected.shape[size]:
                what = "missing" if found is None else tuple(found.shape)
                raise ValueError(
                    f"{path}: {name} is {what}, but {tuple(expected.shape)} in {paths[0].name}; "
                    "all must be of one head model and one tracking"
                )
    joined: dict[str, Any] = {name: torch.cat([part.tensors()[name] for part in parts]) for name in per_frame}
    return replace(parts[0], layout=None, **joined)


def synthetic_motion(name: str, head: HeadModel, num_frames: int = 48) -> HeadParameters:
    """`num_frames` frames of the mean head doing `name`, one of MOTIONS; the first frame continues the last."""
    if name not in MOTIONS:
        raise ValueError(f"motion {name!r}: expected one of {', '.join(MOTIONS)}, or a file")
    if num_frames < 1:
        raise ValueError(f"{num_frames} frames asked for; expected at least 1")
    phase = torch.arange(num_frames, dtype=torch.float64) / num_frames  # 0 <= phase < 1
    make = {"talk": _talk, "nod": _nod, "look_around": _look_around, "expressions": _expressions}[name]
    values: dict[str, Any] = {key: value.float() for key, value in make(phase, head).items()}
    zeros = HeadParameters.zeros(head.n_shape, head.n_expression, num_frames)
    return replace(zeros, **values).to(head.device)


def expression_frames(head: HeadModel) -> dict[str, HeadParameters]:
    """A few fixed poses of the mean head by name, T = 1 each, neutral first."""

    def pose(word: str = "", weight: float = 1.0, **rotations: tuple[float, ...]) -> HeadParameters:
        values: dict[str, Any] = {key: torch.tensor([value]) for key, value in rotations.items()}
        if word:
            values["expr"] = (weight * _word(head, word))[None].float()
        neutral = HeadParameters.zeros(head.n_shape, head.n_expression)
        return replace(neutral, **values).to(head.device)

    return {
        "neutral": pose(),
        "smile": pose("smile"),
        "jaw_open": pose(jaw_pose=(0.3, 0.0, 0.0)),
        "brows_up": pose("brows_up"),
        "blink": pose("blink"),
        "frown": pose("frown"),
        "turn": pose("smile", 0.6, neck_pose=(0.0, 0.5, 0.0), eyes_pose=(0.0, 0.2, 0.0, 0.0, 0.2, 0.0)),
    }


def _talk(phase: Tensor, head: HeadModel) -> dict[str, Tensor]:
    """Syllables: the jaw follows a sum of harmonics that is never negative, lips part and round at other rates."""
    zero = torch.zeros_like(phase)
    syllables = (_wave(phase, 4) + 0.6 * _wave(phase, 7, 0.3) + 0.5 * _wave(phase, 3, 0.6)).clamp(min=-0.6) + 0.6
    jaw = 0.09 * syllables * (0.65 + 0.35 * _wave(phase, 1, 0.1))
    rounded, spread = _bump(phase, 0.35, 0.25), _bump(phase, 0.75, 0.3)
    expr = (
        0.7 * rounded[:, None] * _word(head, "pucker")
        + 0.5 * spread[:, None] * _word(head, "wide")
        + 0.3 * _bump(phase, 0.2, 0.4)[:, None] * _word(head, "brows_up")
        + _bump(phase, 0.55, 0.1)[:, None] * _word(head, "blink")
    )
    neck = torch.stack((0.05 * _wave(phase, 2), 0.08 * _wave(phase, 1), 0.03 * _wave(phase, 1, 0.25)), -1)
    return {"jaw_pose": torch.stack((jaw, zero, zero), -1), "expr": expr, "neck_pose": neck}


def _nod(phase: Tensor, head: HeadModel) -> dict[str, Tensor]:
    zero = torch.zeros_like(phase)
    pitch = 0.25 * _wave(phase, 2)
    expr = 0.5 * _bump(phase, 0.5, 0.8)[:, None] * _word(head, "smile")
    expr = expr + _bump(phase, 0.1, 0.1)[:, None] * _word(head, "blink")
    # The eyes keep looking at the same point.
    eyes = torch.stack((-0.6 * pitch, zero, zero), -1)
    return {"neck_pose": torch.stack((pitch, zero, zero), -1), "eyes_pose": torch.cat((eyes, eyes), -1), "expr": expr}


def _look_around(phase: Tensor, head: HeadModel) -> dict[str, Tensor]:
    """The head swings from side to side and up and down; the eyes lead it by a twelfth of the way."""
    zero = torch.zeros_like(phase)
    neck = torch.stack((0.15 * _wave(phase, 2, 0.25), 0.55 * _wave(phase, 1), 0.06 * _wave(phase, 1, 0.5)), -1)
    eyes = torch.stack((0.1 * _wave(phase, 2, 1 / 3), 0.3 * _wave(phase, 1, 1 / 12), zero), -1)
    blinks = _bump(phase, 0.25, 0.1) + _bump(phase, 0.8, 0.1)
    expr = blinks[:, None] * _word(head, "blink") + 0.4 * _bump(phase, 0.6, 0.3)[:, None] * _word(head, "brows_up")
    return {"neck_pose": neck, "eyes_pose": torch.cat((eyes, eyes), -1), "expr": expr}


def _expressions(phase: Tensor, head: HeadModel) -> dict[str, Tensor]:
    """One expression after the other, left and right together, each fading into the next."""
    groups = _groups(head)
    expr = torch.zeros(len(phase), head.n_expression, dtype=torch.float64)
    for index, (columns, weight) in enumerate(groups):
        center, width = (index + 0.5) / len(groups), min(1.0, 2 / (len(groups) + 1))
        expr[:, columns] += (weight * _bump(phase, center, width))[:, None]
    return {"expr": expr}


def _wave(phase: Tensor, cycles: int, lead: float = 0.0) -> Tensor:
    """A sine of whole cycles, so that it closes; `lead` in parts of a cycle."""
    return (tau * (cycles * phase + lead)).sin()


def _bump(phase: Tensor, center: float, width: float) -> Tensor:
    """A raised cosine from 0 up to 1 and down to 0, around the circle."""
    distance = ((phase - center + 0.5) % 1 - 0.5).abs()
    return torch.where(distance < width / 2, 0.5 + 0.5 * (tau * distance / width).cos(), torch.zeros_like(phase))


def _word(head: HeadModel, word: str) -> Tensor:
    """(E,) float64 expression of a word of WORDS; zero for words that match no expression."""
    expr = torch.zeros(head.n_expression, dtype=torch.float64)
    columns = [index for index, name in enumerate(head.expression_names) if re.fullmatch(WORDS[word], name)]
    expr[columns] = 1.0
    if _is_unnamed(head):
        component = [*WORDS].index(word)
        expr[component : component + 1] = UNNAMED_WEIGHT
    return expr


def _groups(head: HeadModel) -> list[tuple[list[int], float]]:
    """Columns of the expressions to show together, and the weight."""
    if _is_unnamed(head):
        return [([index], UNNAMED_WEIGHT) for index in range(min(UNNAMED_COUNT, head.n_expression))]
    together: dict[str, list[int]] = {}
    for index, name in enumerate(head.expression_names):
        together.setdefault(re.sub(SIDE, "", name), []).append(index)
    return [(columns, 1.0) for columns in together.values()]


def _is_unnamed(head: HeadModel) -> bool:
    return all(re.fullmatch(UNNAMED, name) for name in head.expression_names)


def _load_folder(folder: Path) -> tuple[HeadParameters, Path]:
    if (folder / PARAMETERS_NAME).is_file():
        return HeadParameters.load(folder / PARAMETERS_NAME), folder / PARAMETERS_NAME
    frames_folder = folder / FRAMES_FOLDER if (folder / FRAMES_FOLDER).is_dir() else folder
    paths = [path for path in frames_folder.glob("*.npz") if path.stem.isdecimal()]
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no motion: holds neither {PARAMETERS_NAME} nor {FRAMES_FOLDER}/<timestep>.npz"
        )
    paths.sort(key=lambda path: (int(path.stem), path.stem))
    return join_frames([HeadParameters.load(path) for path in paths], paths), frames_folder
