"""The loss of a fit and its measurements, against loops over the formulas and against finite differences."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.image_metrics import ssim
from gaussian_tokenizer.rendering.splatting import render
from training.fitting.losses import (
    photometric_loss,
    pixels_covered,
    position_regularizer,
    scale_regularizer,
    screen_gradients,
    screen_radii,
)

CAMERA = Cameras.look_at([0.02, 0.05, 0.6], [0.0, 0.0, 0.0], focal=100.0, width=48, height=32)


def some_gaussians(count: int, spread: float = 0.03, seed: int = 0, opacity: float = 0.6) -> Gaussians:
    random = torch.Generator().manual_seed(seed)
    return Gaussians(
        positions=torch.randn(1, count, 3, generator=random) * spread,
        scales=torch.rand(1, count, 3, generator=random) * 0.02 + 0.004,
        quats=torch.randn(1, count, 4, generator=random),
        opacities=torch.full((count,), opacity),
        sh=torch.randn(count, 1, 3, generator=random) * 0.5,
    )


def test_regularizers_are_the_means_of_the_formulas():
    random = np.random.default_rng(0)
    positions, log_scales = random.normal(0, 1, (50, 3)), random.normal(-0.5, 0.6, (50, 3))
    beyond = too_large = 0.0
    for x, s in zip(positions, log_scales):
        beyond += max(np.sqrt((x**2).sum()) - 1.0, 0.0)
        too_large += np.sqrt((np.maximum(np.exp(s) - 0.6, 0.0) ** 2).sum())
    found = position_regularizer(torch.from_numpy(positions), 1.0), scale_regularizer(torch.from_numpy(log_scales), 0.6)
    assert [value.item() for value in found] == pytest.approx([beyond / 50, too_large / 50], rel=1e-9)


def test_regularizers_stay_finite_where_there_is_nothing_and_at_zero():
    positions = torch.zeros(3, 3, requires_grad=True)
    (position_regularizer(positions, 1.0) + scale_regularizer(positions, 2.0)).backward()
    assert positions.grad.abs().max() == 0
    assert position_regularizer(torch.zeros(0, 3), 1.0).item() == 0 == scale_regularizer(torch.zeros(0, 3), 0.6).item()


def test_the_photometric_loss_weighs_l1_and_ssim():
    image, truth = torch.rand(2, 2, 20, 24, 3, generator=torch.Generator().manual_seed(1))
    l1 = np.abs(image.double().numpy() - truth.double().numpy()).mean()
    expected = 0.8 * l1 + 0.2 * (1 - ssim(image, truth).mean().item())
    assert photometric_loss(image, truth, 0.2).item() == pytest.approx(expected, rel=1e-5)
    assert photometric_loss(image, truth, 0.0).item() == pytest.approx(l1, rel=1e-5)


def test_radii_are_three_standard_deviations_of_the_projected_ellipse():
    gaussians = some_gaussians(30)
    found = screen_radii(gaussians, CAMERA)
    rotation, offset = CAMERA.viewmats[0, :3, :3].double().numpy(), CAMERA.viewmats[0, :3, 3].double().numpy()
    axes = quaternion_to_matrix(gaussians.quats[0].double()) * gaussians.scales[0].double()[:, None]
    for row in range(30):
        x, y, z = rotation @ gaussians.positions[0, row].double().numpy() + offset
        jacobian = 100.0 / z * np.array([[1, 0, -x / z], [0, 1, -y / z]])
        spread = jacobian @ rotation @ axes[row].numpy()
        longest = np.linalg.eigvalsh(spread @ spread.T + 0.3 * np.eye(2))[-1]
        u, v = 100.0 * x / z + 24, 100.0 * y / z + 16
        radius = 3 * np.sqrt(longest)
        inside = -radius < u < 48 + radius and -radius < v < 32 + radius
        assert found[row].item() == pytest.approx(radius if inside else 0.0, rel=1e-4)


def test_gaussians_behind_or_beside_the_camera_are_not_in_the_image():
    gaussians = some_gaussians(3)
    gaussians.positions[0] = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.2], [2.0, 0.0, 0.0]])
    assert (screen_radii(gaussians, CAMERA) > 0).tolist() == [True, False, False]


def test_screen_gradients_are_those_of_moving_a_gaussian_by_pixels():
    gaussians = some_gaussians(1, spread=0.0, seed=4)
    elsewhere = replace(gaussians, positions=gaussians.positions + torch.tensor([0.01, -0.006, 0.0]))
    target = render(elsewhere, CAMERA, 0.0).image

    def loss(camera: Cameras, positions: torch.Tensor) -> torch.Tensor:
        return (render(replace(gaussians, positions=positions), camera, 0.0).image - target).square().mean()

    positions = gaussians.positions.clone().requires_grad_()
    loss(CAMERA, positions).backward()
    found = screen_gradients(positions.grad[0], gaussians.positions[0], CAMERA)
    moved = []
    for axis, half_size in ((0, 24), (1, 16)):  # the principal point moves all there is by pixels, and nothing else
        values = []
        for shift in (-0.1, 0.1):
            Ks = CAMERA.Ks.clone()
            Ks[0, axis, 2] += shift
            values.append(loss(replace(CAMERA, Ks=Ks), gaussians.positions).item())
        moved.append((values[1] - values[0]) / 0.2 * half_size)
    assert found.item() == pytest.approx(np.hypot(*moved), rel=0.05)


def test_pixels_covered_add_up_to_the_image_and_leave_out_what_is_hidden():
    gaussians = some_gaussians(40, opacity=0.9)
    shares = pixels_covered(gaussians, CAMERA)
    assert shares.sum().item() == pytest.approx(render(gaussians, CAMERA, 0.0).alpha.sum().item(), rel=1e-4)
    wall = some_gaussians(6, opacity=0.9999)
    wall.positions[0] = torch.tensor([[0.0, 0.0, z] for z in (0.1, 0.11, 0.12, 0.13, 0.14, -0.1)])
    wall.scales[0] = torch.tensor([[0.05] * 3] * 5 + [[0.002] * 3])
    assert pixels_covered(wall, CAMERA)[5].item() < 1e-3
