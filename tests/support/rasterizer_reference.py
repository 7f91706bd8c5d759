"""The slow twin of `gaussian_tokenizer.rendering.rasterizer`: every Gaussian against every pixel, in float64, with plain autograd.

Same arguments, same results, no sorting by pixel, no skipping, no gradient by hand: written to be read beside the
formulas (Kerbl et al. 2023, section 4; Zwicker et al. 2001, section 5; conventions of gsplat 1.5). Tests hold the two
together. Blocks of pixels are checkpointed, which bounds the memory.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix

PIXELS_AT_ONCE = 1024


def rasterize_reference(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    eps2d: float = 0.3,
    near: float = 0.01,
    far: float = 1e10,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rasterizer.rasterize`, always float64."""
    if means.ndim == 2:
        means, quats, scales = means[None], quats[None], scales[None]
    n_images = max(len(means), len(viewmats))
    means, quats, scales = (x.double().expand(n_images, *x.shape[1:]) for x in (means, quats, scales))
    viewmats, Ks = (x.double().expand(n_images, *x.shape[1:]) for x in (viewmats, Ks.detach()))
    opacities, sh = opacities.double(), sh.double()
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack((columns.flatten(), rows.flatten()), 1).double()
    images = []
    for mean, quat, scale, viewmat, K in zip(means, quats, scales, viewmats, Ks):
        gaussians = _project(mean, quat, scale, opacities, sh, viewmat, K, (width, height), eps2d, near, far)
        blocks = [
            checkpoint(_blend, block, *gaussians, use_reentrant=False, preserve_rng_state=False)
            for block in pixels.split(PIXELS_AT_ONCE)
        ]
        images.append(torch.cat(blocks).view(height, width, 5))
    sums = torch.stack(images)
    return sums[..., :3], sums[..., 4:], sums[..., 3:4]


def _project(
    mean: Tensor, quat: Tensor, scale: Tensor, opacities: Tensor, sh: Tensor, viewmat: Tensor, K: Tensor,
    size: tuple[int, int], eps2d: float, near: float, far: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Front to back: means (M, 2), inverse covariances (M, 2, 2), opacities (M,), color + depth + 1 (M, 5)."""
    depth = (mean @ viewmat[:3, :3].T + viewmat[:3, 3])[:, 2]
    seen = ((depth > near) & (depth < far)).nonzero()[:, 0]
    seen = seen[depth[seen].argsort(stable=True)]
    mean, quat, scale, opacities, sh = mean[seen], quat[seen], scale[seen], opacities[seen], sh[seen]
    in_camera = mean @ viewmat[:3, :3].T + viewmat[:3, 3]
    depth = in_camera[:, 2]
    focal, principal, limits = K.diagonal()[:2], K[:2, 2], torch.tensor(size).double()
    tangent = in_camera[:, :2] / depth[:, None]
    margin = 0.15 * limits / focal
    inside = torch.minimum(torch.maximum(tangent, -principal / focal - margin), (limits - principal) / focal + margin)
    jacobian = torch.cat((torch.diag_embed(focal / depth[:, None]), -(focal * inside / depth[:, None])[..., None]), 2)
    rotation = quaternion_to_matrix(quat)
    covariance = rotation @ torch.diag_embed(scale**2) @ rotation.mT
    jacobian = jacobian @ viewmat[:3, :3]
    projected = jacobian @ covariance @ jacobian.mT + eps2d * torch.eye(2).double()
    means2d = (in_camera @ K.T)[:, :2] / depth[:, None]
    direction = mean - torch.linalg.inv(viewmat)[:3, 3]
    basis = sh_basis(direction / direction.norm(dim=1, keepdim=True), round(sh.shape[1] ** 0.5) - 1)
    colors = (torch.einsum("nk,nkc->nc", basis, sh) + 0.5).clamp(min=0)
    features = torch.cat((colors, depth[:, None], torch.ones_like(depth[:, None])), 1)
    return means2d, torch.linalg.inv(projected), opacities, features


def _blend(pixels: Tensor, means2d: Tensor, conics: Tensor, opacities: Tensor, features: Tensor) -> Tensor:
    """(P, 5) sums at P pixels (P, 2)."""
    difference = pixels[:, None] - means2d
    sigma = 0.5 * torch.einsum("pmi,mij,pmj->pm", difference, conics, difference)
    alpha = (opacities * torch.exp(-sigma)).clamp(max=0.999)
    alpha = torch.where(alpha >= 1 / 255, alpha, 0)
    after = torch.cumprod(1 - alpha, 1)
    before = torch.cat((torch.ones_like(after[:, :1]), after[:, :-1]), 1)
    weight = torch.where(after > 1e-4, alpha * before, 0)
    return weight @ features


def sh_basis(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics (N, (degree + 1)^2) of unit directions (N, 3), degree 0 to 3.

    With the Condon-Shortley phase, order m = -l..l inside a degree, as 3D Gaussian Splatting has them (Sloan 2013).
    """
    x, y, z = directions.unbind(1)
    xx, yy, zz = x * x, y * y, z * z
    pi = math.pi
    one, two = math.sqrt(3 / (4 * pi)), math.sqrt(15 / (4 * pi))
    three = math.sqrt(35 / (32 * pi)), math.sqrt(105 / (4 * pi)), math.sqrt(21 / (32 * pi)), math.sqrt(7 / (16 * pi))
    basis = [torch.full_like(x, math.sqrt(1 / (4 * pi)))]
    if degree > 0:
        basis += [-one * y, one * z, -one * x]
    if degree > 1:
        basis += [two * x * y, -two * y * z, two / math.sqrt(12) * (2 * zz - xx - yy)]
        basis += [-two * x * z, two / 2 * (xx - yy)]
    if degree > 2:
        basis += [-three[0] * y * (3 * xx - yy), three[1] * x * y * z, -three[2] * y * (4 * zz - xx - yy)]
        basis += [three[3] * z * (2 * zz - 3 * xx - 3 * yy), -three[2] * x * (4 * zz - xx - yy)]
        basis += [three[1] / 2 * z * (xx - yy), -three[0] * x * (xx - 3 * yy)]
    return torch.stack(basis, 1)
