"""Shared by the procedural head and ICT-FaceKit, which come without a rig: joints, landmarks, hairline and neck.

Regions are drawn in meters, with the point between the eyes at `BETWEEN_EYES`: ICT-FaceKit is moved there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gaussian_tokenizer.heads.head_model import JOINTS, PARENTS, HeadModel

BETWEEN_EYES = np.array((0.0, 0.022, 0.070))


def build_head(
    name: str,
    faces: np.ndarray,
    expression_names: Sequence[str],
    landmarks: tuple[np.ndarray, np.ndarray],
    regions: Mapping[str, np.ndarray],
    **arrays: np.ndarray,
) -> HeadModel:
    """A head model from NumPy arrays, in meters, with `landmarks` as faces (68,) and barycentrics (68, 3).

    Floats are rounded to 1e-7, so that the last bits of another machine's arithmetic do not reach the hash.
    """
    return HeadModel(
        name=name,
        faces=torch.from_numpy(np.ascontiguousarray(faces, np.int64)),
        parents=PARENTS,
        expression_names=tuple(expression_names),
        landmark_faces=torch.from_numpy(landmarks[0]),
        landmark_barycentrics=_rounded(landmarks[1]),
        regions={region: torch.from_numpy(mask) for region, mask in regions.items()},
        **{key: _rounded(value) for key, value in arrays.items()},
    )


def points_at_vertices(faces: np.ndarray, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (K,) as points on the mesh: a face of each (K,) and its barycentrics (K, 3)."""
    chosen = np.array([np.flatnonzero((faces == vertex).any(1))[0] for vertex in vertices], np.int64)
    return chosen, (faces[chosen] == vertices[:, None]).astype(np.float64)


def _rounded(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.round(values, 7).astype(np.float32) + np.float32(0)))


def fit_joint_regressor(vertices: np.ndarray, joints: Mapping[str, tuple[Any, np.ndarray]]) -> np.ndarray:
    """(J, V) weights that give each joint (3,) from its support (V,) bool and sum to 1: those closest to a plain mean."""
    rows = np.zeros((len(JOINTS), len(vertices)))
    for row, (target, support) in zip(rows, (joints[name] for name in JOINTS), strict=True):
        chosen = vertices[support]
        equations = np.concatenate((chosen.T, np.ones((1, len(chosen)))))  # (4, n) @ weights = (target, 1)
        even = np.full(len(chosen), 1 / len(chosen))
        row[support] = even + np.linalg.pinv(equations) @ (np.append(target, 1) - equations @ even)
    return rows


def split_quads(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, along_ac: np.ndarray) -> np.ndarray:
    """Quads by their corners (Q,) in order -> triangles (Q, 2, 3), cut along a-c where `along_ac` (Q,), else along b-d."""
    first = np.where(along_ac[:, None], np.stack((a, b, c), 1), np.stack((a, b, d), 1))
    second = np.where(along_ac[:, None], np.stack((a, c, d), 1), np.stack((b, c, d), 1))
    return np.stack((first, second), 1)


def strip_of_quads(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Two rows of vertices (C,), left to right seen from outside -> triangles (C - 1, 2, 3)."""
    cells = len(upper) - 1
    half = np.arange(cells) < cells / 2  # diagonals mirrored about the middle, as the head is
    return split_quads(upper[:-1], lower[:-1], lower[1:], upper[1:], half)


def smoothstep(x: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, 3x^2 - 2x^3 between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def above_hairline(points: np.ndarray) -> np.ndarray:
    """(V, 3) -> (V,) bool: high on the forehead, down in front of the ears, low at the nape."""
    z = (-0.120, -0.070, -0.020, 0.018, 0.042, 0.060, 0.076)
    return points[:, 1] > np.interp(points[:, 2], z, (-0.062, -0.062, -0.016, -0.004, 0.052, 0.072, 0.080))


def below_jaw(points: np.ndarray) -> np.ndarray:
    """(V, 3) -> (V,) bool: the neck, from under the hair behind to under the chin in front."""
    z = (-0.120, -0.070, -0.020, 0.020, 0.050, 0.090)
    return points[:, 1] < np.interp(points[:, 2], z, (-0.062, -0.062, -0.052, -0.068, -0.092, -0.110))


def in_beard(points: np.ndarray) -> np.ndarray:
    """(V, 3) -> (V,) bool: moustache, chin and jaw, up to the sideburns; includes lips and nose."""
    x = (0.0, 0.024, 0.040, 0.075)
    return points[:, 1] < np.interp(np.abs(points[:, 0]), x, (-0.027, -0.029, -0.040, -0.004))
