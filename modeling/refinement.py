"""A decoded avatar made more like its portrait: a few steps of rendering, comparing and following the gradient (Adam).

    loss = L1 + 0.2 (1 - SSIM) + PENALTY * mean over the Gaussians of |change|^2,    changes in `UNITS`

The penalty keeps attributes near the decoder's: one view says little about the others, and nothing about what it does not show.
A Gaussian that the portrait does not show has no gradient and keeps every bit.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import SH_DC
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.image_metrics import ssim
from gaussian_tokenizer.rendering.portrait_points import Portrait
from gaussian_tokenizer.rendering.splatting import render

# By how much an attribute of a decoded avatar may well be wrong; a step of Adam moves it by `LEARNING_RATE` of that at most.
UNITS = {
    "positions": 0.001,  # meters on the canonical head
    "sh": 0.25 / SH_DC,  # constant coefficient: a quarter of the range of colors
    "opacities": 1.0,  # logit
    "scales": 0.25,  # natural log
}
MAX_OFFSET = 0.003  # meters along each axis of the face
LAMBDA_DSSIM = 0.2
PENALTY = 1e-3
LEARNING_RATE = 0.2  # falls to 0 over the steps along a cosine
LEAST_GRADIENT = 1e-2  # of an average Gaussian's share of the image: what the portrait hardly shows hardly moves
OPAQUE = 0.5  # alpha
MARGIN = 1 / 32  # of the image inside the silhouette in a portrait without alpha: near the edge the background may show


def check_steps(steps: int) -> None:
    """ValueError unless `steps` is a whole number from 0 on, and gradients can be had where there are any steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"refine_steps is {steps!r}, expected a whole number of steps, 0 for none")
    if steps and torch.is_inference_mode_enabled():
        raise ValueError(
            "refine_steps needs gradients, which torch.inference_mode() rules out; use torch.no_grad() there"
        )


@torch.enable_grad()
def refine(avatar: GaussianAvatar, portrait: Portrait, steps: int) -> GaussianAvatar:
    """The avatar after `steps` steps (0: itself) against the portrait, at its pose and from its camera; repeatable on a CPU.

    A portrait with alpha is compared everywhere, over another background each step; one without (1 everywhere) well inside the
    silhouette that the avatar had at first. Positions, constant color, opacities and scales change. ValueError for a number of
    steps that is none, an avatar without colors, or a portrait smaller than SSIM's window.
    """
    check_steps(steps)
    if steps == 0:
        return avatar
    truth, alpha = portrait.image.movedim(0, -1)[None].to(avatar.positions).split((3, 1), -1)
    camera = _resized(portrait.camera, truth.shape[2], truth.shape[1])
    compared = torch.ones_like(alpha) if (alpha < 1).any() else _inside(avatar, portrait.params, camera)
    changes = {name: torch.zeros_like(_refined(avatar, name), requires_grad=True) for name in UNITS}
    optimizer = torch.optim.Adam(changes.values(), eps=LEAST_GRADIENT)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        background = torch.rand(3, generator=generator).to(truth)
        posed = _changed(avatar, changes).posed(portrait.params)
        drawn = render(posed, camera, background).image * compared
        wanted = (truth + (1 - alpha) * (background - 1)) * compared  # the portrait is on white
        loss = (drawn - wanted).abs().mean() + LAMBDA_DSSIM * (1 - ssim(drawn, wanted).mean())
        penalty = sum(value.square().sum() for value in changes.values())
        optimizer.zero_grad()
        (loss * len(avatar) + PENALTY * penalty).backward()
        optimizer.step()
    return _changed(avatar, {name: value.detach() for name, value in changes.items()})


def _refined(avatar: GaussianAvatar, name: str) -> Tensor:
    value = avatar._complete("refinement")[name]
    return value[:, :1] if name == "sh" else value


def _changed(avatar: GaussianAvatar, changes: dict[str, Tensor]) -> GaussianAvatar:
    """The avatar with changes in `UNITS` added; those of positions end smoothly at `MAX_OFFSET`."""
    tensors = avatar.tensors()
    steps = {name: change * UNITS[name] for name, change in changes.items()}
    sh = torch.cat((tensors["sh"][:, :1] + steps["sh"], tensors["sh"][:, 1:]), 1)
    offsets = MAX_OFFSET * torch.tanh(steps["positions"] / MAX_OFFSET) / _face_sizes(avatar)
    return replace(
        avatar,
        positions=avatar.positions + offsets,
        sh=sh,
        opacities=tensors["opacities"] + steps["opacities"],
        scales=tensors["scales"] + steps["scales"],
    )


@torch.no_grad()
def _face_sizes(avatar: GaussianAvatar) -> Tensor:
    """(N, 1) meters on the canonical head, the unit of face-local positions."""
    return avatar._canonical_frames().scales[avatar.faces, None].to(avatar.positions)


@torch.no_grad()
def _inside(avatar: GaussianAvatar, params: HeadParameters, camera: Cameras) -> Tensor:
    """(1, H, W, 1) 1 where the avatar is opaque and no pixel within `MARGIN` is not."""
    outside = (render(avatar.posed(params), camera).alpha <= OPAQUE).to(avatar.positions).movedim(-1, 1)
    reach = max(1, round(MARGIN * max(camera.width, camera.height)))
    near = torch.nn.functional.max_pool2d(outside, 2 * reach + 1, stride=1, padding=reach)
    return 1 - near.movedim(1, -1)


def _resized(camera: Cameras, width: int, height: int) -> Cameras:
    """The camera of the same image at another size."""
    scale = camera.Ks.new_tensor((width / camera.width, height / camera.height, 1.0))
    return replace(camera, Ks=camera.Ks * scale[:, None], width=width, height=height)
