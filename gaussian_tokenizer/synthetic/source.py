"""Synthetic subjects with rendered portraits, one at a time: what `synthesize` writes to folders or to a corpus.

A subject is a function of its name, the settings and the head model. `SyntheticSource` hands subjects to `corpus.build`
without writing folders, as they would be read from these, to the last bit.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.frame import OPENGL_TO_OPENCV, Frame
from gaussian_tokenizer.captures.subject import Subject
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras, portrait_cameras
from gaussian_tokenizer.rendering.splatting import render, to_rgba
from gaussian_tokenizer.synthetic.layout import MAX_POINTS_PER_FACE, MIN_POINTS_PER_FACE
from gaussian_tokenizer.synthetic.light import LIGHTS
from gaussian_tokenizer.synthetic.subject import (
    LOOKS,
    PLACEMENTS,
    SyntheticSubject,
    draw_timesteps,
    portrait_avatar,
    synthesize_subject,
)
from gaussian_tokenizer.synthetic.views import random_cameras
from gaussian_tokenizer.utils.options import option

LICENSE, CONSENT = "CC0-1.0", "synthetic, no person"
MAX_VIEWS = 12
DEGREES_BETWEEN_VIEWS = 30.0
PIXELS_BETWEEN_POINTS = 2.0  # in a portrait
CAMERAS, PORTRAITS = ("random", "ring"), ("any", "rest")
# The subjects and captures of before these settings existed, to the last bit.
PLAIN = {"look": "plain", "light": "plain", "cameras": "ring", "portrait": "rest"}
TIMESTEPS, VIEWS, EXPRESSION = 1, 4, 5  # numbers of random streams after the seed; 2, 3 are those of `subject`


@dataclass(frozen=True)
class SyntheticSettings:
    """What decides a synthetic subject, besides its index and the head model."""

    seed: int = option(0, "of identities, appearance and motion")
    num_points: int | None = option(None, "Gaussians of an average subject (400 on 600 faces, up to 26,000)", type=int)
    image_size: int = option(128, "pixels, both sides of a portrait")
    views: int = option(1, f"cameras of a timestep, 1 to {MAX_VIEWS}")
    timesteps: int = option(1, "the first as --portrait says, further ones with random expressions and turns")
    identity_scale: float = option(1.0, "how much heads differ: 1 natural, 2 caricatures")
    min_points_per_face: int = option(MIN_POINTS_PER_FACE, "a smaller number spreads the points over more faces")
    placement: str = option("captured", "points at places of each subject's own, or of all", choices=PLACEMENTS)

    look: str = option("varied", "haircuts, marks, glasses ..., or hair and colors only", choices=LOOKS)
    light: str = option("varied", "a light for each subject; hard: outside of varied's range", choices=LIGHTS)
    cameras: str = option("random", "another for each frame, or fixed: front, 30 degrees left ...", choices=CAMERAS)
    portrait: str = option(
        "any", "first timestep: half of the subjects with an expression, or at rest", choices=PORTRAITS
    )

    def __post_init__(self) -> None:
        for name, known in (
            ("placement", PLACEMENTS), ("look", LOOKS), ("light", LIGHTS), ("cameras", CAMERAS), ("portrait", PORTRAITS)
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {known}")
        for name, low, high in (
            ("seed", 0, 2**63 - 1),
            ("image_size", 16, 2048),
            ("views", 1, MAX_VIEWS),
            ("timesteps", 1, 10_000),
            ("num_points", 1, 1_000_000),
            ("identity_scale", 0, 10),
            ("min_points_per_face", 1, MAX_POINTS_PER_FACE),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} to {high}")

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings, but for plain ones of PLAIN: files of before those existed are continued."""
        return {name: value for name, value in asdict(self).items() if PLAIN.get(name) != value}


@dataclass(frozen=True)
class SyntheticSource:
    """A source of synthetic subjects for `corpus.build`; see `corpus.sources.SubjectSource`."""

    num_subjects: int
    settings: SyntheticSettings
    where: str = "synthetic subjects"

    def __post_init__(self) -> None:
        if not 1 <= self.num_subjects <= 1_000_000:
            raise ValueError(f"num_subjects is {self.num_subjects}, expected 1 to 1000000")

    @property
    def recipe(self) -> dict[str, Any]:
        return self.settings.recipe

    def names(self) -> list[str]:
        return [f"synthetic-{self.settings.seed}-{index:06d}" for index in range(self.num_subjects)]

    def open(self, name: str, head: HeadModel) -> "RenderedSubject":
        subject = render_subject(name, self.settings, head)
        return replace(subject, images=[_as_read(frame) for frame in subject.images])


@dataclass(frozen=True)
class RenderedSubject(Subject):
    """A subject in memory; `path` is only a name."""

    avatar: GaussianAvatar
    images: list[Frame]

    def load_avatar(self, head: HeadModel | None = None) -> GaussianAvatar:
        return self.avatar

    def frames(self) -> list[Frame]:
        return self.images


def render_subject(name: str, settings: SyntheticSettings, head: HeadModel) -> RenderedSubject:
    """The subject of a name `synthetic-<seed>-<index>` with its images."""
    seed = (settings.seed, int(name.rsplit("-", 1)[1]))
    same = ("num_points", "identity_scale", "min_points_per_face", "placement", "look", "light")
    subject = synthesize_subject(head, seed, **{name: getattr(settings, name) for name in same})
    metadata = {
        "avatar_id": name,
        "license": LICENSE,
        "consent": CONSENT,
        "hair_style": subject.appearance.hair_style,
        "beard_style": subject.appearance.beard_style,
        "recipe": settings.recipe,
        "head_name": head.name,
        "head_hash": head.hash,
    }
    expressive = settings.portrait == "any" and np.random.default_rng((*seed, EXPRESSION)).random() < 0.5
    motion = draw_timesteps(subject, settings.timesteps, (*seed, TIMESTEPS), at_rest=not expressive)
    if settings.cameras == "ring":
        cameras = ring(head, settings.image_size, settings.views, settings.timesteps)
        pixels_per_meter = float(cameras.Ks[0, 0, 0])  # a meter from the camera
    else:
        vertices = head.pose(motion).vertices.repeat_interleave(settings.views, 0)
        skulls = vertices[:, ~head.regions["neck"]] if "neck" in head.regions else vertices
        cameras = random_cameras(skulls, settings.image_size, np.random.default_rng((*seed, VIEWS)))
        distances = (cameras.positions - skulls.mean(1)).norm(dim=1)
        pixels_per_meter = float((cameras.Ks[:, 0, 0] / distances).max())
    frames = render_frames(subject, cameras, motion, pixels_per_meter)
    return RenderedSubject(name, Path(name), metadata, subject.avatar, frames)


def ring(head: HeadModel, image_size: int, views: int, timesteps: int) -> Cameras:
    """The same cameras for all subjects and timesteps (T * C): the front, 30 degrees from its left, from its right, 60, ..."""
    azimuths = [DEGREES_BETWEEN_VIEWS * ((number + 1) // 2) * (1 if number % 2 else -1) for number in range(views)]
    return portrait_cameras(head, image_size, azimuths)[list(range(views)) * timesteps]


def render_frames(
    subject: SyntheticSubject, cameras: Cameras, motion: HeadParameters, pixels_per_meter: float
) -> list[Frame]:
    """Images and masks of a subject at T timesteps from `cameras` (T * C), with transparent background.

    `pixels_per_meter` at the head, of the closest camera, says how dense the points are.
    """
    views = len(cameras) // motion.num_frames
    avatar = portrait_avatar(subject, spacing=PIXELS_BETWEEN_POINTS / pixels_per_meter)
    gaussians = avatar.posed(motion)
    frames = []
    for timestep in range(motion.num_frames):
        own = cameras[timestep * views : (timestep + 1) * views]
        images = render(gaussians.frames(timestep), own, background=0.0)
        for camera, (image, alpha) in enumerate(zip(images.image, images.alpha)):
            viewmat = own.viewmats[camera].double().numpy()
            (fx, _, cx), (_, fy, cy) = own.Ks[camera, :2].tolist()
            rgba, params = to_rgba(image, alpha), motion.frame(timestep)
            intrinsics = (fx, fy, cx, cy, own.width, own.height)
            frames.append(Frame(timestep, camera, viewmat, *intrinsics, rgba, params, mask=rgba[..., 3]))
    return frames


def _as_read(frame: Frame) -> Frame:
    """The frame with the rounding of camera and principal point after a round trip through a file."""
    camera_to_world = np.linalg.inv(frame.viewmat) @ OPENGL_TO_OPENCV
    return replace(
        frame,
        viewmat=np.linalg.inv(camera_to_world @ OPENGL_TO_OPENCV),
        cy=frame.height - (frame.height - frame.cy),
    )
