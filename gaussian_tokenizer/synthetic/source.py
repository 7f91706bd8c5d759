"""Synthetic subjects with their images, made one at a time: what `synthesize` writes to folders or to a corpus."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.frame import OPENGL_TO_OPENCV
from gaussian_tokenizer.captures.subject import Frame
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.rendering.splatting import render, to_rgba
from gaussian_tokenizer.synthetic.layout import MAX_POINTS_PER_FACE
from gaussian_tokenizer.synthetic.subject import (
    SyntheticSubject,
    draw_timesteps,
    portrait_avatar,
    synthesize_subject,
)

LICENSE, CONSENT = "CC0-1.0", "synthetic, no person"


MAX_VIEWS = 12


DEGREES_BETWEEN_VIEWS = 30.0


PIXELS_BETWEEN_POINTS = 2.0  # in a portrait


@dataclass(frozen=True)
class SyntheticSource:
    """Synthetic subjects as what a corpus is built from, see `corpus_builder.build`; none of them becomes a folder."""

    num_subjects: int
    recipe: dict[str, Any]  # the arguments of `synthesize` from `seed` on, but `num_proc`
    where: str = "synthetic subjects"

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("num_subjects", self.num_subjects, 1, 1_000_000),
            ("seed", self.recipe["seed"], 0, 2**63 - 1),
            ("image_size", self.recipe["image_size"], 16, 2048),
            ("views", self.recipe["views"], 1, MAX_VIEWS),
            ("timesteps", self.recipe["timesteps"], 1, 10_000),
            ("num_points", 1 if self.recipe["num_points"] is None else self.recipe["num_points"], 1, 1_000_000),
            ("identity_scale", self.recipe["identity_scale"], 0, 10),
            ("min_points_per_face", self.recipe["min_points_per_face"], 1, MAX_POINTS_PER_FACE),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} to {high}")

    def names(self) -> list[str]:
        return [f"synthetic-{self.recipe['seed']}-{index:06d}" for index in range(self.num_subjects)]

    def open(self, name: str, head: HeadModel) -> "MadeSubject":
        made = _make(name, self.recipe, head)
        return replace(made, images=[_as_read(frame) for frame in made.images])


@dataclass(frozen=True)
class MadeSubject:
    """A subject that was never a folder."""

    avatar_id: str
    metadata: dict[str, Any]
    avatar: GaussianAvatar
    images: list[Frame]

    def load_avatar(self, head: HeadModel) -> GaussianAvatar:
        return self.avatar

    def frames(self) -> list[Frame]:
        return self.images


def render_frames(subject: SyntheticSubject, image_size: int, views: int, moments: HeadParameters) -> list[Frame]:
    """Images and masks of a subject in each of the moments from every camera, transparent around it.

    Camera 0 sees the front, the next 30 degrees from its left, from its right, 60, ...
    """
    azimuths = [DEGREES_BETWEEN_VIEWS * ((number + 1) // 2) * (1 if number % 2 else -1) for number in range(views)]
    cameras = portrait_cameras(subject.head, image_size, azimuths)
    focal = float(cameras.Ks[0, 0, 0])
    avatar = portrait_avatar(subject, spacing=PIXELS_BETWEEN_POINTS / focal)  # a meter from the camera
    gaussians = avatar.posed(moments)
    frames = []
    for timestep in range(moments.num_frames):
        images = render(gaussians.frames(timestep), cameras, background=0.0)
        for number, (image, alpha) in enumerate(zip(images.image, images.alpha)):
            (fx, _, cx), (_, fy, cy) = cameras.Ks[number, :2].tolist()
            rgba = to_rgba(image, alpha)
            frames.append(
                Frame(
                    timestep=timestep,
                    camera=number,
                    viewmat=cameras.viewmats[number].double().numpy(),
                    fx=fx,
                    fy=fy,
                    cx=cx,
                    cy=cy,
                    width=image_size,
                    height=image_size,
                    image=rgba,
                    params=moments.frame(timestep),
                    mask=rgba[..., 3],
                )
            )
    return frames


def _make(name: str, recipe: dict, head: HeadModel) -> MadeSubject:
    index = int(name.rsplit("-", 1)[1])
    subject = synthesize_subject(
        head,
        (recipe["seed"], index),
        *(recipe[key] for key in ("num_points", "identity_scale", "min_points_per_face")),
    )
    metadata = {
        "avatar_id": name,
        "license": LICENSE,
        "consent": CONSENT,
        "hair_style": subject.appearance.hair_style,
        "beard_style": subject.appearance.beard_style,
        "recipe": recipe,
        "head_name": head.name,
        "head_hash": head.hash,
    }
    moments = draw_timesteps(subject, recipe["timesteps"], (recipe["seed"], index, 1))
    frames = render_frames(subject, recipe["image_size"], recipe["views"], moments)
    return MadeSubject(name, metadata, subject.avatar, frames)


def _as_read(frame: Frame) -> Frame:
    """With the last bits that camera and principal point have when they come back from a file."""
    camera_to_world = np.linalg.inv(frame.viewmat) @ OPENGL_TO_OPENCV
    return replace(
        frame,
        viewmat=np.linalg.inv(camera_to_world @ OPENGL_TO_OPENCV),
        cy=frame.height - (frame.height - frame.cy),
    )
