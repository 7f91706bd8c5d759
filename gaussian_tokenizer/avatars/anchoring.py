"""Face frames and Gaussians relative to them (Qian et al., GaussianAvatars, CVPR 2024, section 3.2).

The frame of a face is its centroid, a rotation (x along the first edge, y the normal, z away from the third vertex) and a
scale (the mean of base length and height). Differentiable; leading axes `...` (frames T, or nothing) pass through.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gaussian_tokenizer.geometry.rotations import matrix_to_quaternion, quaternion_multiply


class Placed(NamedTuple):
    """N Gaussians in world space; leading axes `...` are T frames, or nothing on the canonical head."""

    positions: Tensor  # (..., N, 3) meters
    scales: Tensor  # (..., N, 3) meters
    quats: Tensor  # (..., N, 4) unit, wxyz


class Local(NamedTuple):
    """N Gaussians relative to their faces, as an avatar stores them."""

    positions: Tensor  # (N, 3) in units of the face scale
    log_scales: Tensor  # (N, 3) natural logs
    quats: Tensor  # (N, 4) wxyz, any length


@dataclass(frozen=True, eq=False)
class FaceFrames:
    """A frame for each face of a posed mesh."""

    centers: Tensor  # (..., F, 3)
    rotations: Tensor  # (..., F, 3, 3), axes as columns, determinant +1
    scales: Tensor  # (..., F), meters

    def of_points(self, point_faces: Tensor) -> "FaceFrames":
        """The frames of the faces that N points are bound to; `point_faces` (N,) int64."""
        return FaceFrames(
            self.centers.index_select(-2, point_faces),
            self.rotations.index_select(-3, point_faces),
            self.scales.index_select(-1, point_faces),
        )


def face_frames(vertices: Tensor, faces: Tensor) -> FaceFrames:
    """Frames of the triangles `faces` (F, 3) over `vertices` (..., V, 3)."""
    v0, v1, v2 = (vertices.index_select(-2, faces[:, corner]) for corner in range(3))
    first_edge = v1 - v0
    x_axis = _normalize(first_edge)
    y_axis = _normalize(torch.linalg.cross(x_axis, v2 - v0))
    z_axis = -_normalize(torch.linalg.cross(y_axis, x_axis))
    height = (z_axis * (v2 - v0)).sum(-1).abs()
    return FaceFrames(
        centers=(v0 + v1 + v2) / 3,
        rotations=torch.stack((x_axis, y_axis, z_axis), dim=-1),
        scales=(_norm(first_edge) + height) / 2,
    )


def local_to_world(positions: Tensor, point_faces: Tensor, frames: FaceFrames) -> Tensor:
    """Face-local positions (..., N, 3), in units of the face scale, to world positions (..., N, 3) in meters."""
    frames = frames.of_points(point_faces)
    rotated = torch.einsum("...ij,...j->...i", frames.rotations, positions)
    return rotated * frames.scales[..., None] + frames.centers


def world_to_local(positions: Tensor, point_faces: Tensor, frames: FaceFrames) -> Tensor:
    """The inverse of `local_to_world`."""
    frames = frames.of_points(point_faces)
    rotated = torch.einsum("...ji,...j->...i", frames.rotations, positions - frames.centers)
    return rotated / frames.scales[..., None]


def to_world(local: Local, point_faces: Tensor, frames: FaceFrames) -> Placed:
    """N face-bound Gaussians in world space: position, size and rotation follow the face each is bound to."""
    face_quats = matrix_to_quaternion(frames.rotations).index_select(-2, point_faces)
    log_scales = local.log_scales + frames.scales.index_select(-1, point_faces).log()[..., None]
    return Placed(
        local_to_world(local.positions, point_faces, frames),
        log_scales.exp(),
        quaternion_multiply(face_quats, _normalize(local.quats)),
    )


def to_local(placed: Placed, point_faces: Tensor, frames: FaceFrames) -> Local:
    """The inverse of `to_world`."""
    face_quats = matrix_to_quaternion(frames.rotations).index_select(-2, point_faces)
    conjugates = face_quats * face_quats.new_tensor([1.0, -1.0, -1.0, -1.0])
    return Local(
        world_to_local(placed.positions, point_faces, frames),
        placed.scales.log() - frames.scales.index_select(-1, point_faces).log()[..., None],
        quaternion_multiply(conjugates, _normalize(placed.quats)),
    )


def _norm(vectors: Tensor) -> Tensor:
    # Clamped under the root, so that a zero vector has a zero gradient instead of NaN.
    return vectors.square().sum(-1).clamp(min=1e-20).sqrt()


def _normalize(vectors: Tensor) -> Tensor:
    return vectors / _norm(vectors)[..., None]


def points_per_face(faces: np.ndarray, n_faces: int) -> np.ndarray:
    """Face of every point (N,) -> histogram (max + 1,): entry k is the number of faces with k points."""
    return np.bincount(np.bincount(faces, minlength=n_faces))
