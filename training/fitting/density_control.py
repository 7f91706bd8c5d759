"""Where Gaussians are added and removed while an avatar is fitted: clone, split, prune, and the 4 to 15 on every face.

Growth and pruning are those of 3D Gaussian Splatting (Kerbl et al. 2023, section 5.2) with the bindings of GaussianAvatars
(Qian et al. 2024, section 3.3): a new Gaussian is bound to the face of the one it comes from.
Axes: N Gaussians, F faces, K SH coefficients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix

CHILD_SIZE = 1.6  # a child's scales are its parent's divided by this (0.8 times the two children)


@dataclass(frozen=True, eq=False)
class GaussianParams:
    """N Gaussians bound to faces as they are optimized: relative to the face, before activation."""

    positions: Tensor  # (N, 3) in units of the face scale
    log_scales: Tensor  # (N, 3)
    quats: Tensor  # (N, 4) wxyz of any length
    opacities: Tensor  # (N,) logits
    sh_dc: Tensor  # (N, 1, 3)
    sh_rest: Tensor  # (N, K - 1, 3)
    faces: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.faces)

    def map(self, change: Callable[[Tensor], Tensor]) -> "GaussianParams":
        return GaussianParams(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def values(self) -> dict[str, Tensor]:
        """The optimized tensors: all but the faces."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "faces"}


@dataclass(frozen=True)
class FaceLimits:
    """Bounds for the number of Gaussians on an occupied face: AvatarPointillist's density constraint."""

    low: int = 4
    high: int = 15

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"a face cannot hold between {self.low} and {self.high} points; expected 1 <= min <= max")


@dataclass(frozen=True)
class DensifyConfig:
    """When a Gaussian is cloned, split or pruned; a limit of None is not applied."""

    densify_grad_threshold: float  # mean screen-space gradient from which a Gaussian is cloned or split
    percent_dense: float  # meters, largest scale that is cloned; a larger one is split
    min_opacity: float  # 0..1, below it is pruned
    max_scale: float | None = None  # meters, above it is pruned
    max_radius: float | None = None  # pixels on any screen, above it is pruned
    min_pixels: float = 0.0  # on a full face, Gaussians with fewer pixels in every image make room for others
    limits: FaceLimits | None = FaceLimits()  # None: no density constraint, and no face is ever emptied


@dataclass(frozen=True, eq=False)
class DensifyStats:
    """Statistics of every Gaussian since the last density control."""

    gradients: Tensor  # (N,) mean length of the screen-space gradient
    scales: Tensor  # (N,) meters, the largest of the three
    radii: Tensor  # (N,) pixels, largest seen
    pixels: Tensor  # (N,) how many it makes up in the image where it makes up most
    unseen: Tensor  # (F,) bool, faces whose Gaussians are in no image


@dataclass(frozen=True, eq=False)
class Edit:
    """Gaussians during density control, and where each comes from."""

    gaussians: GaussianParams
    usefulness: Tensor  # (N,) gradient times opacity; a new Gaussian has that of its parent
    origin: Tensor  # (N,) int64 row before the step, whose optimizer state it keeps; -1 for a new one

    def keep(self, chosen: Tensor) -> "Edit":
        """The rows of a mask (N,), in order."""
        return Edit(self.gaussians.map(lambda value: value[chosen]), self.usefulness[chosen], self.origin[chosen])

    def add(self, gaussians: GaussianParams, usefulness: Tensor) -> "Edit":
        """Append new Gaussians."""
        pairs = ((getattr(self.gaussians, f.name), getattr(gaussians, f.name)) for f in fields(GaussianParams))
        new = torch.full_like(gaussians.faces, -1)
        joined = GaussianParams(*map(torch.cat, pairs))
        return Edit(joined, torch.cat((self.usefulness, usefulness)), torch.cat((self.origin, new)))


@torch.no_grad()
def control_density(
    gaussians: GaussianParams, stats: DensifyStats, config: DensifyConfig, generator: torch.Generator
) -> Edit:
    """One step: prune, clone or split, and keep to the limits. `generator` (CPU) places the children of splits.

    Gaussians are not pruned if all of their face would be (GaussianAvatars). With limits, however, a face in `stats.unseen` loses
    all of its Gaussians, and a full face as many of its hardly visible ones as others are to be cloned or split; the most useful
    of these (gradient times opacity, the first of equals) are, as long as there is room.
    """
    n_faces = len(stats.unseen)
    usefulness = stats.gradients * gaussians.opacities.sigmoid()
    edit = Edit(gaussians, usefulness, torch.arange(len(gaussians), device=gaussians.faces.device))
    edit = edit.keep(~_pruned(gaussians, stats, config, n_faces))
    if config.limits is not None:
        edit = edit.keep(~stats.unseen[edit.gaussians.faces])
        edit = edit.keep(rank_on_face(edit.gaussians.faces, edit.usefulness, n_faces) < config.limits.high)
        edit = edit.keep(~_giving_way(edit, stats, config, config.limits.high, n_faces))
    edit = _grow(edit, stats, config, n_faces, generator)
    return edit if config.limits is None else _top_up(edit, config.limits.low, n_faces, generator)


def rank_on_face(faces: Tensor, score: Tensor, n_faces: int) -> Tensor:
    """(N,) int64 ranks within a face: 0 for the highest score (N,); of equal scores the first row comes first."""
    order = score.argsort(descending=True, stable=True)
    order = order[faces[order].argsort(stable=True)]  # by face, inside by score
    counts = faces.bincount(minlength=n_faces)
    before = (counts.cumsum(0) - counts)[faces[order]]
    ranks = torch.empty_like(faces)
    ranks[order] = torch.arange(len(faces), device=faces.device) - before
    return ranks


def _pruned(gaussians: GaussianParams, stats: DensifyStats, config: DensifyConfig, n_faces: int) -> Tensor:
    doomed = gaussians.opacities.sigmoid() < config.min_opacity
    if config.max_scale is not None:
        doomed = doomed | (stats.scales > config.max_scale)
    if config.max_radius is not None:
        doomed = doomed | (stats.radii > config.max_radius)
    left = gaussians.faces.bincount(minlength=n_faces) - gaussians.faces[doomed].bincount(minlength=n_faces)
    return doomed & (left[gaussians.faces] > 0)


def _giving_way(edit: Edit, stats: DensifyStats, config: DensifyConfig, high: int, n_faces: int) -> Tensor:
    """On full faces: the least visible Gaussians, at most as many as others of the face are to be cloned or split."""
    faces, pixels = edit.gaussians.faces, stats.pixels[edit.origin]
    idle = (pixels < config.min_pixels) & (faces.bincount(minlength=n_faces) == high)[faces]
    wants = (stats.gradients[edit.origin] >= config.densify_grad_threshold) & ~idle
    asked_for = faces[wants].bincount(minlength=n_faces)
    least_first = torch.where(idle, -pixels, -torch.inf)
    return idle & (rank_on_face(faces, least_first, n_faces) < asked_for[faces])


def _grow(edit: Edit, stats: DensifyStats, config: DensifyConfig, n_faces: int, generator: torch.Generator) -> Edit:
    """Clone small and split large Gaussians whose gradient reaches the threshold; each adds one to its face."""
    wants = stats.gradients[edit.origin] >= config.densify_grad_threshold
    if config.limits is not None:
        room = config.limits.high - edit.gaussians.faces.bincount(minlength=n_faces)
        score = torch.where(wants, edit.usefulness, -1)
        wants = wants & (rank_on_face(edit.gaussians.faces, score, n_faces) < room[edit.gaussians.faces])
    small = stats.scales[edit.origin] <= config.percent_dense
    clones = edit.keep(wants & small)
    nothing_new = wants.new_zeros(len(clones.origin))
    split = torch.cat((wants & ~small, nothing_new))
    return _split_in_two(edit.add(clones.gaussians, clones.usefulness), split, generator)


def _top_up(edit: Edit, low: int, n_faces: int, generator: torch.Generator) -> Edit:
    """Split the most useful Gaussians of every occupied face that has fewer than `low`, until it has as many."""
    while True:
        counts = edit.gaussians.faces.bincount(minlength=n_faces)
        missing = (low - counts).clamp(min=0)[edit.gaussians.faces]
        if not missing.any():
            return edit
        edit = _split_in_two(edit, rank_on_face(edit.gaussians.faces, edit.usefulness, n_faces) < missing, generator)


def _split_in_two(edit: Edit, chosen: Tensor, generator: torch.Generator) -> Edit:
    """Replace each of the chosen (N,) by two smaller Gaussians, sampled from it as from a distribution.

    All in units of the face: x' = x + R(q) (exp(log_scales) * noise). (GaussianAvatars' code scales the noise in meters and adds it
    to local units, so its children hardly move.)
    """
    parents = edit.keep(chosen)
    twice = parents.gaussians.map(lambda value: value.repeat_interleave(2, 0))
    noise = torch.randn(len(twice), 3, generator=generator).to(twice.positions)
    offsets = (quaternion_to_matrix(twice.quats) @ (twice.log_scales.exp() * noise)[..., None])[..., 0]
    children = replace(twice, positions=twice.positions + offsets, log_scales=twice.log_scales - math.log(CHILD_SIZE))
    return edit.keep(~chosen).add(children, parents.usefulness.repeat_interleave(2))
