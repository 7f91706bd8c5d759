"""Fitting an avatar to a tracked subject: GaussianAvatars (Qian et al. 2024) with AvatarPointillist's density constraint.

Step i depends only on the settings, i and the state before it, so a resumed fit ends with the same bytes (on the CPU; a GPU sums
gradients in any order). Axes: N Gaussians, F faces, T timesteps.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from gaussian_tokenizer.avatars.anchoring import Local
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.avatars.skinning import Skinning
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, ROTATION_KEYS
from gaussian_tokenizer.rendering.splatting import render
from training.fitting.arguments import FitSettings
from training.fitting.density_control import DensifyConfig, DensifyStats, GaussianParams, control_density
from training.fitting.images import Images, evenly_spread
from training.fitting.losses import (
    photometric_loss,
    pixels_covered,
    position_regularizer,
    scale_regularizer,
    screen_gradients,
    screen_radii,
)
from training.fitting.state import FitState

MAX_FIRST_COLOR = 1 / 255  # of the constant SH coefficient of a first Gaussian
OPACITY_AFTER_RESET = 0.01
EXTENT_MARGIN = 1.1
SMALLEST_IMAGE = 11  # pixels, the window of SSIM


class Fit:
    """The data and settings of a fit: everything but its state. ValueError for a subject that cannot be fitted."""

    def __init__(
        self,
        tracking: Tracking,
        head: HeadModel,
        settings: FitSettings,
        device: torch.device,
        cache_megabytes: int = 4096,
    ):
        self.tracking, self.settings, self.train = tracking, settings.shortened(), tracking.splits["train"]
        self.images = Images(tracking, settings.background, device, cache_megabytes)
        if not self.train:
            raise ValueError(f"{tracking.path}: no training images, its training split is empty")
        smallest = min(min(tracking.frames[index].width, tracking.frames[index].height) for index in self.train)
        if smallest // settings.start_downscale < SMALLEST_IMAGE:
            raise ValueError(
                f"{tracking.path}: images of {smallest} pixels; with --start_downscale {settings.start_downscale} they must "
                f"have at least {SMALLEST_IMAGE * settings.start_downscale}"
            )
        if all(self.images.is_dark(index) for index in self.train):
            raise ValueError(f"{tracking.path}: every training image is black or transparent; is the mask inverted?")
        self.head, self.params = head.to(device), tracking.params.to(device)
        self.extent = scene_extent(tracking, self.settings)  # meters

    def begin(self) -> FitState:
        """One nearly gray Gaussian per face, as large as the face. ValueError if no camera sees any of them."""
        count = self.head.n_faces
        generator = torch.Generator().manual_seed(self.settings.seed)
        gaussians = GaussianParams(
            positions=torch.zeros(count, 3),
            log_scales=torch.zeros(count, 3),
            quats=torch.tensor([1.0, 0, 0, 0]).repeat(count, 1),
            opacities=torch.full((count,), self.settings.init_opacity).logit(),
            sh_dc=torch.rand(count, 1, 3, generator=generator) * MAX_FIRST_COLOR,
            sh_rest=torch.zeros(count, (self.settings.sh_degree + 1) ** 2 - 1, 3),
            faces=torch.arange(count),
        ).map(lambda value: value.to(self.head.device))
        names = (*FRAME_KEYS,) if self.settings.finetune_head else ()
        state = FitState.begin(gaussians, {name: self.params.tensors()[name].clone() for name in names})
        radii = (screen_radii(self.posed(state, index), self.images.camera(index)) for index in self.train)
        if not any((radius > 0).any() for radius in radii):
            raise ValueError(
                f"{self.tracking.path}: no camera sees the head; check the camera convention with "
                f"`python -m gaussian_tokenizer.inspect {self.tracking.path} --image look.png`"
            )
        return state

    def posed(self, state: FitState, index: int) -> Gaussians:
        """The Gaussians at the timestep of image `index`, T = 1."""
        row = self.images.row(index)
        params = self.params.frame(row)
        if state.head:
            params = replace(params, **{name: value[row : row + 1] for name, value in state.head.items()})
        gaussians = state.gaussians
        local = Local(gaussians.positions, gaussians.log_scales, gaussians.quats)
        degree = min(self.settings.sh_degree, state.iteration // self.settings.sh_degree_interval)
        sh = torch.cat((gaussians.sh_dc, gaussians.sh_rest[:, : (degree + 1) ** 2 - 1]), 1)
        bound = Skinning(local, gaussians.faces, params, self.head, gaussians.opacities.sigmoid(), sh)
        return bound.pose(params, "face_frames")

    def downscale(self, iteration: int) -> int:
        """The images of a step have 1/n of their side; n is halved at equal intervals until it is 1."""
        halvings = int(math.log2(self.settings.start_downscale))
        if iteration >= self.settings.full_resolution_from or halvings == 0:
            return 1
        return self.settings.start_downscale >> (halvings * iteration // self.settings.full_resolution_from)

    def avatar(self, state: FitState) -> GaussianAvatar:
        """The fitted avatar with the head parameters of every timestep."""
        gaussians = state.gaussians.map(lambda value: value.detach().cpu())
        head = {name: value.detach().cpu() for name, value in state.head.items()}
        return GaussianAvatar(
            positions=gaussians.positions,
            faces=gaussians.faces,
            sh=torch.cat((gaussians.sh_dc, gaussians.sh_rest), 1),
            opacities=gaussians.opacities,
            scales=gaussians.log_scales,
            quats=gaussians.quats,
            params=replace(self.tracking.params, layout=None, **head),
        ).with_head(self.head.to("cpu"))


def optimize(fit: Fit, state: FitState, after_step: Callable[[FitState, float], None]) -> None:
    """Run the remaining steps; `after_step` is called with the state and the loss after each."""
    settings = fit.settings
    while state.iteration < settings.iterations:
        loss = _step(fit, state)
        state.iteration += 1
        iteration = state.iteration
        if settings.densify_from < iteration < settings.densify_until and iteration % settings.densify_interval == 0:
            stats, config = densify_stats(fit, state), densify_config(fit, iteration)
            words = np.random.SeedSequence((settings.seed, iteration)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
            state.apply(control_density(state.gaussians, stats, config, generator))
            if len(state.gaussians) == 0:
                raise ValueError(
                    f"{fit.tracking.path}: no Gaussian is in any image after {iteration} steps; do images, cameras and "
                    "head parameters belong to one recording?"
                )
        if _resets_opacities(settings, iteration):
            state.lower_opacities(OPACITY_AFTER_RESET)
        after_step(state, loss)


def scene_extent(tracking: Tracking, settings: FitSettings) -> float:
    """Meters: 1.1 times the largest distance of a training camera from their center, within bounds.

    Without the lower bound a single static camera would have an extent of 0, so that no position moves (GaussianAvatars, issue 87).
    """
    if settings.scene_extent is not None:
        return settings.scene_extent
    places = np.stack([np.linalg.inv(tracking.frames[index].viewmat)[:3, 3] for index in tracking.splits["train"]])
    farthest = float(np.linalg.norm(places - places.mean(0), axis=1).max())
    return min(max(EXTENT_MARGIN * farthest, settings.min_extent), settings.max_extent)


def learning_rates(fit: Fit, iteration: int) -> dict[str, float]:
    """Learning rates by the names of `FitState.parameters`; that of positions decays exponentially."""
    settings = fit.settings
    progress = min(iteration / settings.iterations, 1.0)
    position = settings.position_lr ** (1 - progress) * settings.position_lr_final**progress
    return {
        "positions": position * fit.extent,
        "log_scales": settings.scale_lr,
        "quats": settings.rotation_lr,
        "opacities": settings.opacity_lr,
        "sh_dc": settings.color_lr,
        "sh_rest": settings.sh_lr,
        "head.expr": settings.expr_lr,
        "head.translation": settings.translation_lr,
        **{f"head.{name}": settings.pose_lr for name in ROTATION_KEYS},
    }


def densify_config(fit: Fit, iteration: int) -> DensifyConfig:
    """Density control's config in meters and pixels."""
    settings = fit.settings
    prune_large = 0 < settings.prune_large_from < iteration
    return DensifyConfig(
        densify_grad_threshold=settings.densify_grad_threshold,
        percent_dense=settings.percent_dense * fit.extent,
        min_opacity=settings.min_opacity,
        max_scale=settings.max_scale * fit.extent if prune_large else None,
        max_radius=settings.max_radius if prune_large else None,
        min_pixels=settings.min_pixels,
        limits=settings.limits,
    )


@torch.no_grad()
def densify_stats(fit: Fit, state: FitState) -> DensifyStats:
    """The statistics that density control decides by.

    Pixels are those of full-size images, counted in `visibility_images` images or one of each camera.
    """
    settings, downscale = fit.settings, fit.downscale(state.iteration)
    pixels, on_face = torch.zeros_like(state.radii), state.radii.new_zeros(fit.head.n_faces)
    cameras = {fit.tracking.frames[index].camera for index in fit.train}
    count = max(settings.visibility_images, len(cameras)) if settings.limits is not None else 0
    for index in evenly_spread(fit.tracking, fit.train, count):
        shares = pixels_covered(fit.posed(state, index), fit.images.camera(index, downscale)) * downscale**2
        pixels = pixels.maximum(shares)
        on_face = on_face.maximum(torch.zeros_like(on_face).index_add_(0, state.gaussians.faces, shares))
    return DensifyStats(
        gradients=state.gradient_sums / state.views.clamp(min=1),
        scales=fit.posed(state, fit.train[0]).scales[0].amax(1),
        radii=state.radii,
        pixels=pixels,
        unseen=(on_face < settings.min_face_pixels) & settings.allow_empty_faces,
    )


def _step(fit: Fit, state: FitState) -> float:
    """Render, step, collect the statistics of density control; returns the loss."""
    settings = fit.settings
    for value in state.parameters().values():
        value.requires_grad_()
    total = 0.0
    for index in _images_of_step(fit, state.iteration):
        downscale = fit.downscale(state.iteration)
        camera, truth = fit.images.camera(index, downscale), fit.images.truth(index, downscale)
        posed = fit.posed(state, index)
        posed.positions.retain_grad()
        radii = screen_radii(posed, camera)
        visible = radii > 0
        loss = photometric_loss(render(posed, camera, settings.background).image, truth, settings.lambda_dssim)
        distance = position_regularizer(state.gaussians.positions[visible], settings.position_threshold)
        size = scale_regularizer(state.gaussians.log_scales[visible], settings.scale_threshold)
        loss = loss + settings.position_weight * distance + settings.scale_weight * size
        (loss / settings.images_per_step).backward()
        total += loss.item() / settings.images_per_step
        gradient = posed.positions.grad
        assert gradient is not None
        on_screen = screen_gradients(gradient[0] * settings.images_per_step, posed.positions[0].detach(), camera)
        state.gradient_sums += on_screen * visible
        state.views += visible
        state.radii = state.radii.maximum(radii * downscale)
    state.adam_step(learning_rates(fit, state.iteration))
    for value in state.parameters().values():
        value.requires_grad_(False)
    return total


def _images_of_step(fit: Fit, iteration: int) -> list[int]:
    """Every training image once in a random order, then again in another."""
    chosen = []
    for number in range(iteration * fit.settings.images_per_step, (iteration + 1) * fit.settings.images_per_step):
        epoch, position = divmod(number, len(fit.train))
        order = np.random.default_rng((fit.settings.seed, epoch)).permutation(len(fit.train))
        chosen.append(fit.train[order[position]])
    return chosen


def _resets_opacities(settings: FitSettings, iteration: int) -> bool:
    if not settings.opacity_reset_interval > 0 or iteration >= settings.densify_until:
        return False
    # On a white background, which faint white Gaussians could imitate, one more reset when density control begins.
    at_start = settings.background == 1.0 and iteration == settings.densify_from
    return at_start or iteration % settings.opacity_reset_interval == 0
