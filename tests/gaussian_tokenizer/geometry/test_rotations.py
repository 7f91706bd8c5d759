import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from gaussian_tokenizer.geometry.rotations import (
    axis_angle_to_matrix,
    matrix_to_quaternion,
    quaternion_multiply,
    quaternion_to_matrix,
)

VECTORS = np.random.default_rng(0).normal(size=(200, 3)) * np.geomspace(1e-9, 6.0, 200)[:, None]


def wxyz(rotation: Rotation) -> np.ndarray:
    return np.roll(rotation.as_quat(), 1, axis=-1)


def test_axis_angles_become_the_matrices_of_scipy_from_tiny_to_large_angles():
    ours = axis_angle_to_matrix(torch.from_numpy(VECTORS))
    np.testing.assert_allclose(ours.numpy(), Rotation.from_rotvec(VECTORS).as_matrix(), atol=1e-12)


def test_leading_axes_and_dtype_are_kept():
    ours = axis_angle_to_matrix(torch.from_numpy(VECTORS).float().reshape(4, 50, 3))
    assert ours.shape == (4, 50, 3, 3) and ours.dtype == torch.float32


def test_a_zero_rotation_is_the_identity_and_has_the_right_gradient():
    vector = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    matrix = axis_angle_to_matrix(vector)
    torch.testing.assert_close(matrix, torch.eye(3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(matrix[2, 1], vector)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


def test_gradients_agree_with_finite_differences_on_both_sides_of_the_series():
    for scale in (1e-4, 0.9e-3, 1.1e-3, 0.5, 3.0):
        vector = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64).mul(scale).requires_grad_()
        assert torch.autograd.gradcheck(axis_angle_to_matrix, vector)


def test_quaternions_and_matrices_convert_as_in_scipy():
    turns = Rotation.random(500, random_state=1)
    half_turns = Rotation.from_rotvec(np.pi * np.eye(3))  # w = 0: each needs another row of Shepperd's method
    for rotation in (turns, half_turns):
        ours = matrix_to_quaternion(torch.from_numpy(rotation.as_matrix())).numpy()
        expected = wxyz(rotation)
        assert (ours[:, 0] >= 0).all()
        np.testing.assert_allclose(np.abs((ours * expected).sum(-1)), 1, atol=1e-12)
        np.testing.assert_allclose(
            quaternion_to_matrix(torch.from_numpy(3 * ours)).numpy(), rotation.as_matrix(), atol=1e-12
        )


def test_quaternion_gradients_are_finite_for_half_turns():
    matrix = torch.from_numpy(Rotation.from_rotvec(np.pi * np.eye(3)).as_matrix()).requires_grad_()
    matrix_to_quaternion(matrix).sum().backward()
    assert torch.isfinite(matrix.grad).all()


@pytest.mark.parametrize("seed", [2, 3])
def test_the_product_turns_by_the_second_then_by_the_first(seed):
    first, second = Rotation.random(50, random_state=seed), Rotation.random(50, random_state=seed + 10)
    product = quaternion_multiply(torch.from_numpy(wxyz(first)), torch.from_numpy(wxyz(second)))
    np.testing.assert_allclose(quaternion_to_matrix(product).numpy(), (first * second).as_matrix(), atol=1e-12)
