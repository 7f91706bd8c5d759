"""The sliders of the viewer, and the head parameters of one frame that their values are added to."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import pi
from pathlib import Path
from typing import Any

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.motions import MOTIONS, UNNAMED, load_motion, synthetic_motion
from gaussian_tokenizer.avatars.skinning import check_motion
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

MAX_EXPRESSIONS = 10
STILL = "none"
NUM_FRAMES = 96  # of a synthetic motion: about four seconds


@dataclass(frozen=True)
class Slider:
    """Its value, times `factor`, is added to the entries `columns` of the head parameter `target`."""

    label: str
    low: float
    high: float
    step: float
    target: str
    columns: tuple[int, ...]
    factor: float = 1.0


def sliders(head: HeadModel) -> dict[str, list[Slider]]:
    """The sliders by group; 0 is at rest for all of them."""

    def degrees(label: str, low: float, high: float, target: str, *columns: int) -> Slider:
        return Slider(label, low, high, 0.5, target, columns, pi / 180)

    joints = [
        degrees("jaw open", 0, 30, "jaw_pose", 0),
        degrees("jaw sideways", -10, 10, "jaw_pose", 1),
        degrees("neck nod", -40, 40, "neck_pose", 0),
        degrees("neck turn", -60, 60, "neck_pose", 1),
        degrees("neck tilt", -30, 30, "neck_pose", 2),
        degrees("eyes down", -25, 25, "eyes_pose", 0, 3),  # both eyes
        degrees("eyes sideways", -35, 35, "eyes_pose", 1, 4),
    ]
    expressions = []
    for column, name in enumerate(head.expression_names[:MAX_EXPRESSIONS]):
        # Named ones are weights, unnamed ones count standard deviations.
        low, high = (-3.0, 3.0) if re.fullmatch(UNNAMED, name) else (0.0, 1.0)
        expressions.append(Slider(name.replace("_", " "), low, high, 0.01, "expr", (column,)))
    return {"joints (degrees)": joints, "expression": expressions}


def to_parameters(
    values: Sequence[tuple[Slider, float]], head: HeadModel, frame: HeadParameters | None = None
) -> HeadParameters:
    """The frame of a motion (None: the head at rest) with the slider values added."""
    frame = HeadParameters.zeros(head.n_shape, head.n_expression) if frame is None else frame
    changed: dict[str, Any] = {slider.target: frame.tensors()[slider.target].clone() for slider, _ in values}
    for slider, value in values:
        changed[slider.target][0, list(slider.columns)] += slider.factor * value
    return replace(frame, **changed)


def motions(head: HeadModel, path: str | None, avatar: GaussianAvatar) -> Mapping[str, HeadParameters]:
    """The motions to play, by name: synthetic ones, the file or folder `path`, and the avatar's own frames."""
    found = {name: synthetic_motion(name, head, NUM_FRAMES) for name in MOTIONS}
    if path is not None:
        found[Path(path).name] = load_motion(path, head)
    if avatar.params is not None and avatar.params.num_frames > 1:
        check_motion(avatar.params, head)
        found["recorded"] = avatar.params
    return found
