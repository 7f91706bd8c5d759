"""The splatter against a loop over pixels and Gaussians, written from the formulas."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from gaussian_tokenizer import portrait
from gaussian_tokenizer.portrait import Camera, look_at, splat, to_uint8


def random_gaussians(count: int, seed: int, size: float = 0.03) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "positions": rng.uniform(-0.15, 0.15, (count, 3)),
        "scales": size * rng.uniform(0.1, 1, (count, 3)),
        "quats": 3 * rng.standard_normal((count, 4)),
        "opacities": rng.uniform(0.001, 1, count),
        "colors": rng.uniform(0, 1, (count, 3)),
    }


def one_gaussian(position=(0.0, 0.0, 0.0), color=(1.0, 0.0, 0.0), opacity=1.0, scale=0.02) -> dict[str, np.ndarray]:
    return {
        "positions": np.array([position]),
        "scales": np.full((1, 3), scale),
        "quats": np.array([[1.0, 0, 0, 0]]),
        "opacities": np.array([opacity]),
        "colors": np.array([color]),
    }


def draw_by_loop(gaussians: dict, camera: Camera, background: float) -> np.ndarray:
    """Every pixel asks every Gaussian, nearest first; covariances by scipy's rotations."""
    rotation, translation = camera.viewmat[:3, :3], camera.viewmat[:3, 3]
    fx, fy, cx, cy = camera.K[0, 0], camera.K[1, 1], camera.K[0, 2], camera.K[1, 2]
    splats = []
    for position, scale, quat, opacity, color in zip(*gaussians.values(), strict=True):
        t = rotation @ position + translation
        if t[2] <= 0.01:
            continue
        w, x, y, z = quat
        axes = Rotation.from_quat([x, y, z, w]).as_matrix()
        covariance = axes @ np.diag(scale**2) @ axes.T
        jacobian = np.array([[fx / t[2], 0, -fx * t[0] / t[2] ** 2], [0, fy / t[2], -fy * t[1] / t[2] ** 2]])
        projected = jacobian @ rotation @ covariance @ rotation.T @ jacobian.T + 0.3 * np.eye(2)
        mean = np.array([fx * t[0] / t[2] + cx, fy * t[1] / t[2] + cy])
        splats.append((t[2], mean, np.linalg.inv(projected), opacity, color))
    splats.sort(key=lambda entry: entry[0])
    image = np.zeros((camera.height, camera.width, 3))
    for row in range(camera.height):
        for column in range(camera.width):
            transmittance = 1.0
            for _, mean, conic, opacity, color in splats:
                offset = np.array([column + 0.5, row + 0.5]) - mean
                alpha = min(0.99, opacity * math.exp(-0.5 * offset @ conic @ offset))
                if alpha < 1 / 255:
                    continue
                image[row, column] += transmittance * alpha * color
                transmittance *= 1 - alpha
            image[row, column] += transmittance * background
    return image


@pytest.mark.parametrize("seed", [0, 1])
def test_the_image_is_that_of_a_loop_over_pixels_and_gaussians(seed):
    gaussians = random_gaussians(40, seed)
    gaussians["positions"][0] = [0, 0, 2.0]  # behind the camera
    camera = look_at(np.array([0.3, 0.1, 1.0]), np.array([0.0, 0.02, 0.0]), 45.0, 24, 17)
    image, _ = splat(gaussians, camera, background=0.7)
    np.testing.assert_allclose(image, draw_by_loop(gaussians, camera, 0.7), atol=1e-9)


def test_bands_of_any_height_give_the_same_image(monkeypatch):
    gaussians = random_gaussians(200, 3)
    camera = look_at(np.array([0.0, 0.0, 1.0]), np.zeros(3), 60.0, 32, 31)
    whole, whole_alpha = splat(gaussians, camera)
    monkeypatch.setattr(portrait, "PAIRS_AT_ONCE", 3000)
    banded, banded_alpha = splat(gaussians, camera)
    np.testing.assert_allclose(banded, whole, atol=1e-12)
    np.testing.assert_allclose(banded_alpha, whole_alpha, atol=1e-12)


def test_the_order_of_the_gaussians_does_not_matter():
    gaussians = random_gaussians(100, 4)
    camera = look_at(np.array([0.0, 0.0, 1.0]), np.zeros(3), 60.0, 32, 32)
    shuffled = {name: value[::-1] for name, value in gaussians.items()}
    np.testing.assert_allclose(splat(gaussians, camera)[0], splat(shuffled, camera)[0], atol=1e-12)


def test_a_point_above_and_to_the_left_of_the_subject_is_seen_above_and_to_the_right():
    # The camera stands in front of the face (+z): the subject's left (+x) is on the right of the image.
    camera = look_at(np.array([0.0, 0.0, 1.0]), np.zeros(3), 64.0, 64, 64)
    _, alpha = splat(one_gaussian((0.25, 0.25, 0.0)), camera)
    row, column = np.unravel_index(alpha.argmax(), alpha.shape)
    assert (row, column) in {(15, 47), (15, 48), (16, 47), (16, 48)}


def test_the_nearer_of_two_opaque_gaussians_hides_the_other():
    near, far = one_gaussian((0, 0, 0.1), (1.0, 0, 0)), one_gaussian((0, 0, -0.1), (0, 0, 1.0))
    both = {name: np.concatenate((far[name], near[name])) for name in near}
    camera = look_at(np.array([0.0, 0.0, 1.0]), np.zeros(3), 200.0, 33, 33)
    image, alpha = splat(both, camera)
    assert image[16, 16, 0] > 0.98
    assert image[16, 16, 2] < 0.011
    assert alpha[16, 16] > 0.99


def test_nothing_in_sight_gives_the_background():
    camera = look_at(np.array([0.0, 0.0, 1.0]), np.zeros(3), 60.0, 8, 6)
    image, alpha = splat(one_gaussian((0, 0, 5.0)), camera, background=0.25)
    assert (image == 0.25).all()
    assert (alpha == 0).all()
    assert image.shape == (6, 8, 3)


def test_bytes_are_clipped_and_rounded():
    assert to_uint8(np.array([-0.1, 0.0, 0.5, 1.0, 1.3])).tolist() == [0, 0, 128, 255, 255]
