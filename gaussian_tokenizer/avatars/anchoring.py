"""Gaussians that ride on a triangle mesh: face frames, local <-> world, closest points and interpolation.

Every Gaussian is stored relative to the frame of the face it is bound to, so that it follows the head as it moves. The
frame of a face is its centroid, a rotation (x along the first edge, y the normal, z in the plane, away from the third
vertex) and a scale (the mean of base length and height). Formulas: Qian et al., GaussianAvatars, CVPR 2024, section
3.2; closest points on triangles: Ericson, Real-Time Collision Detection, section 5.1.5. Everything is differentiable
and batched: leading axes `...` (frames T, or nothing) pass through.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gaussian_tokenizer.geometry.rotations import matrix_to_quaternion, quaternion_multiply


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


def local_to_world_log_scales(log_scales: Tensor, point_faces: Tensor, frames: FaceFrames) -> Tensor:
    """Local natural-log scales (..., N, 3) to world ones: the scale of a Gaussian grows with its face."""
    return log_scales + frames.scales.index_select(-1, point_faces).log()[..., None]


def world_to_local_log_scales(log_scales: Tensor, point_faces: Tensor, frames: FaceFrames) -> Tensor:
    """The inverse of `local_to_world_log_scales`."""
    return log_scales - frames.scales.index_select(-1, point_faces).log()[..., None]


def local_to_world_quats(quats: Tensor, point_faces: Tensor, frames: FaceFrames) -> Tensor:
    """Local rotations (..., N, 4) wxyz, of any length, to unit world quaternions: the face's turn applied last."""
    face_quats = matrix_to_quaternion(frames.rotations).index_select(-2, point_faces)
    return quaternion_multiply(face_quats, _normalize(quats))


def world_to_local_quats(quats: Tensor, point_faces: Tensor, frames: FaceFrames) -> Tensor:
    """The inverse of `local_to_world_quats`, for unit quaternions."""
    face_quats = matrix_to_quaternion(frames.rotations).index_select(-2, point_faces)
    conjugates = face_quats * face_quats.new_tensor([1.0, -1.0, -1.0, -1.0])
    return quaternion_multiply(conjugates, _normalize(quats))


def _norm(vectors: Tensor) -> Tensor:
    # Clamped under the root, so that a zero vector has a zero gradient instead of NaN.
    return vectors.square().sum(-1).clamp(min=1e-20).sqrt()


def _normalize(vectors: Tensor) -> Tensor:
    return vectors / _norm(vectors)[..., None]


def points_per_face(faces: np.ndarray, n_faces: int) -> np.ndarray:
    """Face of every point (N,) -> histogram (max + 1,): entry k is the number of faces with k points."""
    return np.bincount(np.bincount(faces, minlength=n_faces))
