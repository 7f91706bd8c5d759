"""Glasses: Gaussians along two rims, a bridge and two arms, off the surface and bound to faces of skin near them."""

from typing import NamedTuple

import numpy as np

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.synthetic.details import Glasses
from gaussian_tokenizer.synthetic.layout import MAX_POINTS_PER_FACE, FaceLayout

IN_FRONT = 0.014  # meters from the eyes to the rims
HOLDING = ("skin", "nose", "ears", "beard")  # zones of the faces that glasses are bound to
SPACING = (0.002, 0.012)  # meters between Gaussians


class GlassesPoints(NamedTuple):
    """M Gaussians of glasses."""

    positions: np.ndarray  # (M, 3) meters, canonical
    faces: np.ndarray  # (M,)
    scales: np.ndarray  # (M, 3) meters
    axes: np.ndarray  # (M, 3, 3) rotations, columns the axes


def glasses_points(
    glasses: Glasses, head: HeadModel, vertices: np.ndarray, layout: FaceLayout, occupied: np.ndarray, spacing: float
) -> GlassesPoints | None:
    """Glasses on a head with `vertices` (V, 3), at most MAX_POINTS_PER_FACE on a face with the points of `occupied` (N,).

    About one Gaussian every `spacing` meters; None on a head without eyes or ears.
    """
    regions = {name: mask.numpy() for name, mask in head.regions.items()}
    if not all(name in regions and regions[name].any() for name in ("eyes", "ears")):
        return None
    spacing = float(np.clip(spacing, *SPACING))
    lines = [
        _resampled(line, spacing) for line in _lines(glasses, vertices[regions["eyes"]], vertices[regions["ears"]])
    ]
    positions = np.concatenate([line[:-1] for line in lines])
    along = np.concatenate([np.diff(line, axis=0) for line in lines])
    length = np.linalg.norm(along, axis=1, keepdims=True)
    along /= np.maximum(length, 1e-9)
    faces = _faces_near(positions, vertices, head, layout, occupied)
    side = np.cross(along, np.where(np.abs(along[:, 1:2]) < 0.9, (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    axes = np.stack((along, side, np.cross(along, side)), 2)
    thin = np.full_like(length, glasses.thickness / 2)
    held = faces >= 0
    return GlassesPoints(
        positions[held], faces[held], np.hstack((0.6 * length + thin / 2, thin, thin))[held], axes[held]
    )


def _lines(glasses: Glasses, eyes: np.ndarray, ears: np.ndarray) -> list[np.ndarray]:
    """Polylines (P, 3) of rims, bridge and arms."""
    left = eyes[eyes[:, 0] > 0].mean(0)
    distance, front = 2 * left[0], eyes[:, 2].max() + IN_FRONT
    width, height = glasses.width * distance, glasses.height * distance
    middle = np.array((left[0] * 1.03, left[1] - 0.1 * height))
    angle = np.linspace(0, 2 * np.pi, 65)
    cosine, sine = np.cos(angle), np.sin(angle)
    rounded = 2 / glasses.corners
    rim = np.stack(
        (width * np.sign(cosine) * np.abs(cosine) ** rounded, height * np.sign(sine) * np.abs(sine) ** rounded), 1
    )
    ear = ears[ears[:, 0] > 0]
    behind = np.array((ear[:, 0].mean(), ear[:, 1].max() - 0.015, ear[:, 2].mean()))
    lines = []
    for sign in (1, -1):
        x, y = (middle + rim).T
        lines.append(np.stack((sign * x, y, front - 1.2 * x**2), 1))
        x, y = middle[0] + width, middle[1] + 0.4 * height
        hinge = np.array((x, y, front - 1.2 * x**2))
        lines.append(np.array((hinge, behind)) * (sign, 1, 1))
    inner, y = middle[0] - width, middle[1] + 0.35 * height
    x = np.linspace(-inner, inner, 9)
    lines.append(np.stack((x, y + 0.15 * height * (1 - (x / inner) ** 2), np.full(9, front)), 1))
    return lines


def _resampled(line: np.ndarray, spacing: float) -> np.ndarray:
    """Points every `spacing` meters of a polyline (P, 3)."""
    reached = np.concatenate(([0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))))
    places = np.linspace(0, reached[-1], max(2, round(reached[-1] / spacing)) + 1)
    return np.stack([np.interp(places, reached, line[:, axis]) for axis in range(3)], 1)


def _faces_near(
    positions: np.ndarray, vertices: np.ndarray, head: HeadModel, layout: FaceLayout, occupied: np.ndarray
) -> np.ndarray:
    """(M,) the nearest face with points and room for another one; -1 if all are full."""
    counts = np.bincount(occupied, minlength=head.n_faces)
    most = max(MAX_POINTS_PER_FACE, counts.max())
    holding = np.isin(layout.zone, [layout.zones.index(name) for name in HOLDING]) & (counts > 0)
    candidates = np.flatnonzero(holding)
    if len(candidates) == 0:
        return np.full(len(positions), -1)
    centers = vertices[head.faces.numpy()[candidates]].mean(1)
    order = np.argsort(((positions[:, None] - centers) ** 2).sum(2), axis=1)
    faces = np.full(len(positions), -1)
    for index, row in enumerate(order):
        free = row[counts[candidates[row]] < most]
        if len(free):
            faces[index] = candidates[free[0]]
            counts[faces[index]] += 1
    return faces
