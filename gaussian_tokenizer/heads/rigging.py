"""Shared by the head models without a rig: joints from vertices, landmarks on faces, lines of hair and neck.

Used by the procedural head and by ICT-FaceKit, which come without a rig. The region lines are drawn once for both, in
meters, with the point between the eyes at (0, 0.022, 0.070): ICT-FaceKit is moved there.
"""

import numpy as np
import torch

BETWEEN_EYES = np.array((0.0, 0.022, 0.070))


def fit_joint_regressor(vertices: np.ndarray, support: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(V,) weights on `support` (V,) bool that sum to 1 and give `target` (3,): the ones closest to a plain mean."""
    chosen = vertices[support]
    equations = np.concatenate((chosen.T, np.ones((1, len(chosen)))))  # (4, n) @ weights = (target, 1)
    even = np.full(len(chosen), 1 / len(chosen))
    correction = np.linalg.pinv(equations) @ (np.append(target, 1) - equations @ even)
    row = np.zeros(len(vertices))
    row[support] = even + correction
    return row


def split_quads(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, along_ac: np.ndarray) -> np.ndarray:
    """Quads by their corners (Q,) in order -> triangles (Q, 2, 3), cut along a-c where `along_ac` (Q,), else along b-d."""
    first = np.where(along_ac[:, None], np.stack((a, b, c), 1), np.stack((a, b, d), 1))
    second = np.where(along_ac[:, None], np.stack((a, c, d), 1), np.stack((b, c, d), 1))
    return np.stack((first, second), 1)


def smoothstep(x: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, 3x^2 - 2x^3 between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def rounded(values: np.ndarray) -> torch.Tensor:
    """float32 after rounding to 1e-7: the last bits of another machine's arithmetic do not reach the hash."""
    return torch.from_numpy(np.ascontiguousarray(np.round(values, 7).astype(np.float32) + np.float32(0)))


def vertices_as_face_points(faces: np.ndarray, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A face that has each vertex (K,), and the barycentrics (K, 3) that pick it."""
    chosen = np.array([np.flatnonzero((faces == vertex).any(1))[0] for vertex in vertices], np.int64)
    return chosen, (faces[chosen] == vertices[:, None]).astype(np.float64)


def above_hairline(points: np.ndarray) -> np.ndarray:
    """(V, 3) -> (V,) bool: high on the forehead, down in front of the ears, low at the nape."""
    z = (-0.120, -0.070, -0.020, 0.018, 0.042, 0.060, 0.076)
    return points[:, 1] > np.interp(points[:, 2], z, (-0.062, -0.062, -0.016, -0.004, 0.052, 0.072, 0.080))


def below_jaw(points: np.ndarray) -> np.ndarray:
    """(V, 3) -> (V,) bool: the neck, from under the hair behind to under the chin in front."""
    z = (-0.120, -0.070, -0.020, 0.020, 0.050, 0.090)
    return points[:, 1] < np.interp(points[:, 2], z, (-0.062, -0.062, -0.052, -0.068, -0.092, -0.110))


def in_beard(points: np.ndarray) -> np.ndarray:
    """(V, 3) -> (V,) bool: moustache, chin and jaw, up to the sideburns; lips and nose are to be left out."""
    x = (0.0, 0.024, 0.040, 0.075)
    return points[:, 1] < np.interp(np.abs(points[:, 0]), x, (-0.027, -0.029, -0.040, -0.004))
