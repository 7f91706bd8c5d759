"""2D landmarks of made-up people, projected here in NumPy."""

from typing import NamedTuple

import numpy as np
import torch

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

# The numbers of iBUG's landmarks in a mirror image, by the parts of its published scheme.
PARTS = (
    range(17),
    range(17, 27),
    [27],
    [28],
    [29],
    [30],
    range(31, 36),
    (36, 37, 38, 39, 42, 43, 44, 45),
    (40, 41, 46, 47),
)
PARTS += (range(48, 55), range(55, 60), range(60, 65), range(65, 68))
MIRRORED = np.zeros(68, int)
for part in PARTS:
    MIRRORED[list(part)] = list(part)[::-1]


class Face(NamedTuple):
    """A person in front of a camera with the principal point in the middle of an image of 512 pixels."""

    params: HeadParameters
    rotation: np.ndarray  # (3, 3) head to camera, OpenCV axes
    translation: np.ndarray  # (3,) meters
    focal: float

    def project(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) meters -> (N, 2) pixels."""
        seen = points @ self.rotation.T + self.translation
        return 256 + self.focal * seen[:, :2] / seen[:, 2:]


def random_face(head: HeadModel, seed: int, identity_scale: float, yaw: float, distance: float = 1.0) -> Face:
    """A person with up to three expressions, turned by `yaw` degrees and by up to 10 about the other axes."""
    rng = np.random.default_rng(seed)
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params.shape.copy_(torch.from_numpy(identity_scale * np.clip(rng.standard_normal(head.n_shape), -2.5, 2.5)))
    params.expr[0, rng.choice(head.n_expression, 3, replace=False)] = torch.from_numpy(rng.uniform(0.3, 1, 3)).float()
    params.jaw_pose[0, 0] = max(0.0, rng.uniform(-0.25, 0.25))
    a, b, c = np.deg2rad((yaw, *rng.uniform(-10, 10, 2)))
    turn = np.array(((np.cos(a), 0, np.sin(a)), (0, 1, 0), (-np.sin(a), 0, np.cos(a))))
    nod = np.array(((1, 0, 0), (0, np.cos(b), -np.sin(b)), (0, np.sin(b), np.cos(b))))
    tilt = np.array(((np.cos(c), -np.sin(c), 0), (np.sin(c), np.cos(c), 0), (0, 0, 1)))
    rotation = np.diag((1.0, -1.0, -1.0)) @ tilt @ nod @ turn
    return Face(params, rotation, np.array((0.01, 0.02, distance)), 1200 * distance)


def vertices_of(head: HeadModel, params: HeadParameters) -> np.ndarray:
    return head.pose(params).vertices[0].double().numpy()


def noisy_landmarks(head: HeadModel, face: Face, seed: int, noise: float = 1.0) -> np.ndarray:
    """(68, 2) pixels with a normal error of `noise` pixels in x and y."""
    marks = head.landmarks(torch.from_numpy(vertices_of(head, face.params))).numpy()
    return face.project(marks) + noise * np.random.default_rng(seed).standard_normal((len(marks), 2))


def median_distance_mm(found: np.ndarray, expected: np.ndarray) -> float:
    """Median distance of points (N, 3) in meters after the best similarity (Umeyama 1991)."""
    a, b = found - found.mean(0), expected - expected.mean(0)
    left, values, right = np.linalg.svd(b.T @ a)
    signs = np.array((1, 1, np.sign(np.linalg.det(left @ right))))
    aligned = (values * signs).sum() / (a**2).sum() * a @ (left * signs @ right).T
    return 1000 * float(np.median(np.linalg.norm(aligned - b, axis=1)))


def angle_degrees(first: np.ndarray, second: np.ndarray) -> float:
    """The angle of the rotation between two rotations."""
    return float(np.degrees(np.arccos(np.clip((np.trace(first @ second.T) - 1) / 2, -1, 1))))
