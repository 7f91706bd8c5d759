"""Where Gaussians are added and removed while an avatar is fitted: clone, split, prune, and the 4 to 15 on every face.

Growth and pruning are those of 3D Gaussian Splatting (Kerbl et al. 2023, section 5.2) with the bindings of GaussianAvatars
(Qian et al. 2024, section 3.3): what is born of a Gaussian is bound to its face. `FaceLimits` is AvatarPointillist's density
constraint: after a step every face holds no Gaussian, or between `low` and `high` of them. Full faces do not grow beyond what
their least visible Gaussians make room for, and those short of points are topped up by splitting what is on them. Pure functions of
tensors: nothing here knows of pictures or optimisers.

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
class Cloud:
    """N Gaussians bound to faces, as they are optimised: relative to the face, not activated."""

    positions: Tensor  # (N, 3) in units of the face scale
    log_scales: Tensor  # (N, 3)
    quats: Tensor  # (N, 4) wxyz of any length
    opacities: Tensor  # (N,) logits
    sh_dc: Tensor  # (N, 1, 3)
    sh_rest: Tensor  # (N, K - 1, 3)
    faces: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.faces)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Cloud":
        return Cloud(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def values(self) -> dict[str, Tensor]:
        """What is optimised: all but the faces."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "faces"}


@dataclass(frozen=True)
class FaceLimits:
    """Bounds for the number of Gaussians on an occupied face."""

    low: int = 4
    high: int = 15

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"a face cannot hold between {self.low} and {self.high} points; expected 1 <= min <= max")


@dataclass(frozen=True)
class Rules:
    """When a Gaussian grows and when it goes; a limit of None is not applied."""

    min_gradient: float  # mean screen-space gradient, above which a Gaussian grows
    clone_below: float  # metres, largest scale up to which it is cloned; above it is split
    min_opacity: float  # 0..1, below it is removed
    max_scale: float | None = None  # metres, above it is removed
    max_radius: float | None = None  # pixels on any screen, above it is removed
    min_pixels: float = 0.0  # of every picture; on a full face what makes up fewer gives way to what wants to grow
    limits: FaceLimits | None = FaceLimits()  # None: no density constraint, and no face is ever emptied


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was observed of every Gaussian since the last step."""

    gradients: Tensor  # (N,) mean length of the screen-space gradient
    scales: Tensor  # (N,) metres, the largest of the three
    radii: Tensor  # (N,) pixels, largest seen
    pixels: Tensor  # (N,) how many it makes up of the picture where it makes up most
    unseen: Tensor  # (F,) bool, faces whose Gaussians are in no picture


@dataclass(frozen=True, eq=False)
class Edit:
    """A cloud in the making, and where each of its Gaussians comes from."""

    cloud: Cloud
    usefulness: Tensor  # (N,) gradient times opacity; of a child, its parent's
    origin: Tensor  # (N,) int64 row before the step, whose optimiser state it keeps; -1 for a new one

    def keep(self, chosen: Tensor) -> "Edit":
        """The rows of a mask (N,), in order."""
        return Edit(self.cloud.map(lambda value: value[chosen]), self.usefulness[chosen], self.origin[chosen])

    def add(self, cloud: Cloud, usefulness: Tensor) -> "Edit":
        """New Gaussians behind those there are."""
        joined = {f.name: torch.cat((getattr(self.cloud, f.name), getattr(cloud, f.name))) for f in fields(Cloud)}
        new = torch.full_like(cloud.faces, -1)
        return Edit(Cloud(**joined), torch.cat((self.usefulness, usefulness)), torch.cat((self.origin, new)))


@torch.no_grad()
def control_density(cloud: Cloud, evidence: Evidence, rules: Rules, generator: torch.Generator) -> Edit:
    """One step: prune, grow, and keep to the limits. `generator` (CPU) places the children of splits.

    Without limits: a Gaussian is not pruned if all of its face would be (GaussianAvatars). With them the same holds, but a
    face in `evidence.unseen` loses all of its own, and a full face as many of its hardly visible ones as others ask to grow; of
    those the most useful (gradient times opacity, the first of equals) grow as long as there is room.
    """
    n_faces = len(evidence.unseen)
    usefulness = evidence.gradients * cloud.opacities.sigmoid()
    edit = Edit(cloud, usefulness, torch.arange(len(cloud), device=cloud.faces.device))
    edit = edit.keep(~_pruned(cloud, evidence, rules, n_faces))
    if rules.limits is not None:
        edit = edit.keep(~evidence.unseen[edit.cloud.faces])
        edit = edit.keep(rank_on_face(edit.cloud.faces, edit.usefulness, n_faces) < rules.limits.high)
        edit = edit.keep(~_giving_way(edit, evidence, rules, rules.limits.high, n_faces))
    edit = _grow(edit, evidence, rules, n_faces, generator)
    return edit if rules.limits is None else _top_up(edit, rules.limits.low, n_faces, generator)


def rank_on_face(faces: Tensor, score: Tensor, n_faces: int) -> Tensor:
    """(N,) int64: 0 for the highest score (N,) of its face, then 1, ...; of equal scores the first row comes first."""
    order = score.argsort(descending=True, stable=True)
    order = order[faces[order].argsort(stable=True)]  # by face, inside by score
    counts = faces.bincount(minlength=n_faces)
    before = (counts.cumsum(0) - counts)[faces[order]]
    ranks = torch.empty_like(faces)
    ranks[order] = torch.arange(len(faces), device=faces.device) - before
    return ranks


def _pruned(cloud: Cloud, evidence: Evidence, rules: Rules, n_faces: int) -> Tensor:
    doomed = cloud.opacities.sigmoid() < rules.min_opacity
    if rules.max_scale is not None:
        doomed = doomed | (evidence.scales > rules.max_scale)
    if rules.max_radius is not None:
        doomed = doomed | (evidence.radii > rules.max_radius)
    left = cloud.faces.bincount(minlength=n_faces) - cloud.faces[doomed].bincount(minlength=n_faces)
    return doomed & (left[cloud.faces] > 0)


def _giving_way(edit: Edit, evidence: Evidence, rules: Rules, high: int, n_faces: int) -> Tensor:
    """On full faces: the least visible Gaussians, no more of them than others of the face ask to grow."""
    faces, pixels = edit.cloud.faces, evidence.pixels[edit.origin]
    idle = (pixels < rules.min_pixels) & (faces.bincount(minlength=n_faces) == high)[faces]
    wants = (evidence.gradients[edit.origin] >= rules.min_gradient) & ~idle
    asked_for = faces[wants].bincount(minlength=n_faces)
    least_first = torch.where(idle, -pixels, -torch.inf)
    return idle & (rank_on_face(faces, least_first, n_faces) < asked_for[faces])


def _grow(edit: Edit, evidence: Evidence, rules: Rules, n_faces: int, generator: torch.Generator) -> Edit:
    """Clone small and split large Gaussians whose gradient is above the threshold; each adds one to its face."""
    wants = evidence.gradients[edit.origin] >= rules.min_gradient
    if rules.limits is not None:
        room = rules.limits.high - edit.cloud.faces.bincount(minlength=n_faces)
        score = torch.where(wants, edit.usefulness, -1)
        wants = wants & (rank_on_face(edit.cloud.faces, score, n_faces) < room[edit.cloud.faces])
    small = evidence.scales[edit.origin] <= rules.clone_below
    clones = edit.keep(wants & small)
    nothing_new = wants.new_zeros(len(clones.origin))
    split = torch.cat((wants & ~small, nothing_new))
    return _split_in_two(edit.add(clones.cloud, clones.usefulness), split, generator)


def _top_up(edit: Edit, low: int, n_faces: int, generator: torch.Generator) -> Edit:
    """Split the most useful Gaussians of every occupied face that has fewer than `low`, until it has as many."""
    while True:
        counts = edit.cloud.faces.bincount(minlength=n_faces)
        missing = (low - counts).clamp(min=0)[edit.cloud.faces]
        if not missing.any():
            return edit
        edit = _split_in_two(edit, rank_on_face(edit.cloud.faces, edit.usefulness, n_faces) < missing, generator)


def _split_in_two(edit: Edit, chosen: Tensor, generator: torch.Generator) -> Edit:
    """Two smaller Gaussians in the place of each of the chosen (N,), drawn from it as from a distribution.

    All in units of the face: x' = x + R(q) (exp(log_scales) * noise). (In GaussianAvatars' code the noise is scaled in metres
    and added to local units, and hardly moves.)
    """
    parents = edit.keep(chosen)
    twice = parents.cloud.map(lambda value: value.repeat_interleave(2, 0))
    noise = torch.randn(len(twice), 3, generator=generator).to(twice.positions)
    offsets = (quaternion_to_matrix(twice.quats) @ (twice.log_scales.exp() * noise)[..., None])[..., 0]
    children = replace(twice, positions=twice.positions + offsets, log_scales=twice.log_scales - math.log(CHILD_SIZE))
    return edit.keep(~chosen).add(children, parents.usefulness.repeat_interleave(2))
