"""The loss of a fit, and what density control needs to know of every Gaussian.

    loss = 0.8 L1 + 0.2 (1 - SSIM) + 0.01 mean relu(|x| - 1) + 1.0 mean |relu(s - 0.6)|       (Qian et al. 2024, section 3.4)

x and s are position and scales relative to the face, in units of its size; the means run over the Gaussians in the image.
Axes: N Gaussians, H W pixels.
"""

import torch
from torch import Tensor

from gaussian_tokenizer.avatars.gaussians import SH_DC, Gaussians
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.image_metrics import ssim
from gaussian_tokenizer.rendering.rasterizer import project
from gaussian_tokenizer.rendering.splatting import render

NEAR, EPS2D = 0.01, 0.3  # as in `render`
RADIUS = 3.0  # standard deviations: how far a Gaussian is counted as covering the screen (3D Gaussian Splatting)


def photometric_loss(image: Tensor, truth: Tensor, lambda_dssim: float) -> Tensor:
    """(1 - w) L1 + w (1 - SSIM) of images (B, H, W, 3)."""
    l1 = (image - truth).abs().mean()
    return l1 if lambda_dssim == 0 else (1 - lambda_dssim) * l1 + lambda_dssim * (1 - ssim(image, truth).mean())


def position_regularizer(positions: Tensor, threshold: float) -> Tensor:
    """Mean distance of face-local positions (N, 3) from the face's center beyond `threshold` face sizes."""
    return _mean((_length(positions) - threshold).relu())


def scale_regularizer(log_scales: Tensor, threshold: float) -> Tensor:
    """Mean length of the excess of face-local scales, exp of (N, 3), over `threshold` face sizes."""
    return _mean(_length((log_scales.exp() - threshold).relu()))


@torch.no_grad()
def screen_radii(gaussians: Gaussians, camera: Cameras) -> Tensor:
    """(N,) pixels, three standard deviations of the longer axis; 0 for a Gaussian outside the image. T = C = 1."""
    drawn = gaussians.to("cpu")
    means, shapes, depths = (
        x.to(gaussians.positions.device)
        for x in project(
            drawn.positions[0], drawn.quats[0], drawn.scales[0], camera.viewmats[0].cpu(), camera.Ks[0].cpu(),
            camera.width, camera.height, EPS2D,
        )
    )  # fmt: skip
    slope, over_rows, inside = shapes.unbind(1)
    # The covariance is [[inside + slope^2 over_rows, slope over_rows], [slope over_rows, over_rows]].
    half = (inside + slope**2 * over_rows + over_rows) / 2
    radii = RADIUS * (half + (half**2 - inside * over_rows).clamp(min=0).sqrt()).sqrt()
    size = means.new_tensor([camera.width, camera.height])
    on_screen = ((means + radii[:, None] > 0) & (means - radii[:, None] < size)).all(1)
    return torch.where(on_screen & (depths > NEAR), radii, 0.0).float()


@torch.no_grad()
def screen_gradients(gradients: Tensor, positions: Tensor, camera: Cameras) -> Tensor:
    """(N,) lengths of the loss's gradient with respect to screen positions, from that of world positions (N, 3).

    A move of du pixels is a move of du z / f meters across the viewing axis, so dL/du = (z / f) dL/dx in camera axes; 3D
    Gaussian Splatting measures screens from -1 to 1, hence times half the width or height.
    """
    rotation, offset = camera.viewmats[0, :2, :3].to(gradients), camera.viewmats[0, 2].to(gradients)
    depths = positions @ offset[:3] + offset[3]
    half_sizes = gradients.new_tensor([camera.width, camera.height]) / 2
    focal = camera.Ks[0, [0, 1], [0, 1]].to(gradients)
    return depths.abs() * (gradients @ rotation.T * (half_sizes / focal)).norm(dim=1)


@torch.enable_grad()
def pixels_covered(gaussians: Gaussians, camera: Cameras) -> Tensor:
    """(N,) how many pixels each Gaussian makes up: the sum of its blending weights. T = C = 1.

    An image is linear in the colors, so the weights are the gradient of its sum.
    """
    colors = torch.zeros_like(gaussians.sh[:, :1]).requires_grad_()
    gray = Gaussians(gaussians.positions, gaussians.scales, gaussians.quats, gaussians.opacities, colors)
    (shares,) = torch.autograd.grad(render(gray, camera, background=0.0).image[..., 0].sum(), colors)
    return shares[:, 0, 0] / SH_DC


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)


def _length(vectors: Tensor) -> Tensor:
    # Clamped under the root, so that a zero vector has a zero gradient instead of NaN.
    return vectors.square().sum(-1).clamp(min=1e-20).sqrt()
