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
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.rendering.splatting import render, to_rgba
from gaussian_tokenizer.synthetic.layout import MAX_POINTS_PER_FACE, MIN_POINTS_PER_FACE
from gaussian_tokenizer.synthetic.subject import (
    PLACEMENTS,
    SyntheticSubject,
    draw_timesteps,
    portrait_avatar,
    synthesize_subject,
)
from gaussian_tokenizer.utils.options import option

LICENSE, CONSENT = "CC0-1.0", "synthetic, no person"
MAX_VIEWS = 12
DEGREES_BETWEEN_VIEWS = 30.0
PIXELS_BETWEEN_POINTS = 2.0  # in a portrait


@dataclass(frozen=True)
class SyntheticSettings:
    """What decides a synthetic subject, besides its index and the head model."""

    seed: int = option(0, "of identities, appearance and motion")
    num_points: int | None = option(None, "Gaussians of an average subject (400 on 600 faces, up to 26,000)", type=int)
    image_size: int = option(128, "pixels, both sides of a portrait")
    views: int = option(1, f"cameras around a subject, 1 (front) to {MAX_VIEWS}")
    timesteps: int = option(1, "1 is at rest, further ones have random expressions and turns")
    identity_scale: float = option(1.0, "how much heads differ: 1 natural, 2 caricatures")
    min_points_per_face: int = option(MIN_POINTS_PER_FACE, "a smaller number spreads the points over more faces")
    placement: str = option("captured", "points at places of each subject's own, or of all", choices=PLACEMENTS)

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement is {self.placement!r}, expected one of {PLACEMENTS}")
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
        return asdict(self.settings)

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
    same = ("num_points", "identity_scale", "min_points_per_face", "placement")
    subject = synthesize_subject(head, seed, **{name: getattr(settings, name) for name in same})
    metadata = {
        "avatar_id": name,
        "license": LICENSE,
        "consent": CONSENT,
        "hair_style": subject.appearance.hair_style,
        "beard_style": subject.appearance.beard_style,
        "recipe": asdict(settings),
        "head_name": head.name,
        "head_hash": head.hash,
    }
    motion = draw_timesteps(subject, settings.timesteps, (*seed, 1))
    frames = render_frames(subject, settings.image_size, settings.views, motion)
    return RenderedSubject(name, Path(name), metadata, subject.avatar, frames)


def render_frames(subject: SyntheticSubject, image_size: int, views: int, motion: HeadParameters) -> list[Frame]:
    """Images and masks of a subject at each timestep from every camera, with transparent background.

    Camera 0 sees the front, the next 30 degrees from its left, from its right, 60, ...
    """
    azimuths = [DEGREES_BETWEEN_VIEWS * ((number + 1) // 2) * (1 if number % 2 else -1) for number in range(views)]
    cameras = portrait_cameras(subject.head, image_size, azimuths)
    focal = float(cameras.Ks[0, 0, 0])
    avatar = portrait_avatar(subject, spacing=PIXELS_BETWEEN_POINTS / focal)  # a meter from the camera
    gaussians = avatar.posed(motion)
    frames = []
    for timestep in range(motion.num_frames):
        images = render(gaussians.frames(timestep), cameras, background=0.0)
        for camera, (image, alpha) in enumerate(zip(images.image, images.alpha)):
            viewmat = cameras.viewmats[camera].double().numpy()
            (fx, _, cx), (_, fy, cy) = cameras.Ks[camera, :2].tolist()
            rgba, own = to_rgba(image, alpha), motion.frame(timestep)
            intrinsics = (fx, fy, cx, cy, image_size, image_size)
            frames.append(Frame(timestep, camera, viewmat, *intrinsics, rgba, own, mask=rgba[..., 3]))
    return frames


def _as_read(frame: Frame) -> Frame:
    """The frame with the rounding of camera and principal point after a round trip through a file."""
    camera_to_world = np.linalg.inv(frame.viewmat) @ OPENGL_TO_OPENCV
    return replace(
        frame,
        viewmat=np.linalg.inv(camera_to_world @ OPENGL_TO_OPENCV),
        cy=frame.height - (frame.height - frame.cy),
    )
