"""Differentiable Gaussian splatting on the CPU: what `render` uses where there is no CUDA.

World-space Gaussians and pinhole cameras go in; color, alpha and depth sums come out, with gradients to everything but
the intrinsics. The mathematics is that of 3D Gaussian Splatting (Kerbl et al. 2023) with the conventions of gsplat 1.5:
affine projection (Zwicker et al. 2001, section 5), `eps2d` added to the 2D covariance, alpha = min(0.999, opacity
exp(-sigma)), nothing below 1/255, and a pixel ends before the Gaussian that would bring its transmittance to 1e-4.

Here are the steps and what autograd keeps of them. The loops, compiled by numba, are in `projection` (world to ellipses)
and `blending` (ellipses to pixels); `compiling` runs them on as many threads as torch uses.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gaussian_tokenizer.rendering import projection
from gaussian_tokenizer.rendering.blending import (
    MIN_ALPHA,
    N_SUMS,
    TILE,
    blend,
    blend_backward,
    count_tiles,
    fill_tiles,
)
from gaussian_tokenizer.rendering.compiling import in_threads

PART = 2048  # Gaussians that one thread takes at a time; sums over all Gaussians are made part by part
TILES_AT_ONCE = 4


def rasterize(
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
    """Colors (C, H, W, 3), alpha (C, H, W, 1) and depth sums (C, H, W, 1), all weighted by alpha, without background.

    means, scales (T, N, 3) or (N, 3) meters; quats (T, N, 4) or (N, 4) wxyz; opacities (N,); sh (N, K, 3); viewmats
    (C, 4, 4) world to camera, OpenCV axes; Ks (C, 3, 3) pixels. Image i shows frame i with camera i, one of either is
    repeated. Results have the dtype of `means`; the projection is always computed in float64, which costs little and
    keeps the blending, in float32, exact for long and thin Gaussians. No gradient reaches Ks.
    """
    if means.ndim == 2:
        means, quats, scales = means[None], quats[None], scales[None]
    dtype = torch.float64 if means.dtype == torch.float64 else torch.float32
    inputs = [x.to(dtype) for x in (means, quats, scales, opacities, sh)]
    lens = (width, height, float(eps2d))
    colors, alphas, depths = _Rasterize.apply(
        *inputs, viewmats.double(), Ks.detach().double(), lens, float(near), float(far)
    )
    return colors.to(means.dtype), alphas.to(means.dtype), depths.to(means.dtype)


def project(
    means: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor, width: int, height: int, eps2d: float
) -> tuple[Tensor, Tensor, Tensor]:
    """N Gaussians to one image, without gradients: means (N, 2) pixels, shapes (N, 3), depths (N,) meters; float64.

    The shape of a projected covariance [[xx, xy], [xy, yy]] is (xy / yy, yy, det / yy), see `projection`.
    """
    count = len(means)
    gaussians = [x.detach().double().contiguous().numpy() for x in (means, quats, scales)]
    camera = [x.detach().double().contiguous().numpy() for x in (viewmat, K)]
    ellipses, features, seen = np.empty((count, 6)), np.empty((count, 4)), np.empty(count, np.bool_)
    everything = -math.inf, math.inf, 0.0
    in_threads(
        projection.project, count, PART, *gaussians, np.ones(count), np.zeros((count, 1, 3)), *camera, np.zeros(3),
        width, height, float(eps2d), *everything, ellipses, features, seen,
    )  # fmt: skip
    drawn = torch.from_numpy(ellipses)
    return drawn[:, :2], drawn[:, 2:5], torch.from_numpy(features[:, 3].copy())


class _Rasterize(torch.autograd.Function):
    """All images; the backward pass computes the weights again, and needs each image's lists and where its pixels ended."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors, (lens, near, far) = arguments[:7], arguments[7:]
        means, quats, scales, opacities, sh, viewmats, Ks = (x.detach().contiguous().numpy() for x in tensors)
        count, (width, height, _) = max(len(means), len(viewmats)), lens
        colors = np.empty((count, height, width, 3), means.dtype)
        alphas, depths = np.empty((2, count, height, width, 1), means.dtype)
        ctx.images = []
        for index in range(count):
            frame, camera = min(index, len(means) - 1), min(index, len(viewmats) - 1)
            gaussians = (means[frame], quats[frame], scales[frame], opacities, sh)
            image = _Image.project(gaussians, viewmats[camera], Ks[camera], lens, near, far)
            image.blend(colors[index], alphas[index, ..., 0], depths[index, ..., 0])
            if any(ctx.needs_input_grad):
                ctx.images.append((frame, camera, image))
        ctx.save_for_backward(*tensors)
        return torch.from_numpy(colors), torch.from_numpy(alphas), torch.from_numpy(depths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors = ctx.saved_tensors[:6]
        means, quats, scales, opacities, sh, viewmats = sums = [np.zeros(x.shape) for x in tensors]
        grad_colors, grad_alphas, grad_depths = (x.contiguous().numpy() for x in grads)
        for index, (frame, camera, image) in enumerate(ctx.images):
            grad_image = grad_colors[index], grad_alphas[index, ..., 0], grad_depths[index, ..., 0]
            frame_sums = (means[frame], quats[frame], scales[frame], opacities, sh)
            viewmats[camera] += image.backward(grad_image, frame_sums)
        return *(torch.from_numpy(x).to(like.dtype) for x, like in zip(sums, tensors)), None, None, None, None


@dataclass(frozen=True, eq=False)
class _Image:
    """N Gaussians seen by one camera: M of them are seen, front to back, with E entries in the lists of T tiles."""

    gaussians: tuple[np.ndarray, ...]  # means (N, 3), quats (N, 4), scales (N, 3), opacities (N,), sh (N, K, 3)
    camera: tuple[np.ndarray, ...]  # viewmat (4, 4), K (3, 3), position (3,)
    lens: tuple[int, int, float]  # width, height, eps2d
    ellipses: np.ndarray  # (N, 6)
    features: np.ndarray  # (N, 4)
    order: np.ndarray  # (M,) int64
    entries: np.ndarray  # (M + 1,) int64, the first entry of each Gaussian
    starts: np.ndarray  # (T + 1,) int64, the first entry of each tile
    owners: np.ndarray  # (E,) int32, Gaussians, by tile
    places: np.ndarray  # (E,) int32, the same entries' numbers by Gaussian
    remaining: np.ndarray  # (T, TILE, TILE) transmittance
    stops: np.ndarray  # (T, TILE, TILE) place in the tile's list of the Gaussian that ended the pixel

    @classmethod
    def project(
        cls, gaussians: tuple, viewmat: np.ndarray, K: np.ndarray, lens: tuple, near: float, far: float
    ) -> "_Image":
        count, (width, height, _) = len(gaussians[0]), lens
        dtype = gaussians[0].dtype
        camera = viewmat, K, np.ascontiguousarray(np.linalg.inv(viewmat)[:3, 3])
        ellipses, features, seen = np.empty((count, 6)), np.empty((count, 4), dtype), np.empty(count, np.bool_)
        in_threads(
            projection.project, count, PART, *gaussians, *camera, *lens, near, far, MIN_ALPHA, ellipses, features, seen
        )
        order = np.flatnonzero(seen)
        depths = gaussians[0][order] @ viewmat[2, :3] + viewmat[2, 3]
        order = order[np.argsort(depths, kind="stable")]
        n_across, n_down = -(-width // TILE), -(-height // TILE)
        n_tiles, n_parts = n_across * n_down, -(-len(order) // PART)
        met, per_tile = np.zeros(len(order), np.int32), np.zeros((n_parts, n_tiles), np.int64)
        tiles = (PART, order, ellipses, n_across, n_down)
        in_threads(count_tiles, n_parts, 1, *tiles, met, per_tile)
        entries, starts = _first(met), _first(per_tile.sum(0))
        cursors = starts[:-1] + np.cumsum(per_tile, 0) - per_tile
        owners, places = np.empty((2, entries[-1]), np.int32)
        in_threads(fill_tiles, n_parts, 1, *tiles, entries, cursors, owners, places)
        pixels = (n_tiles, TILE, TILE)
        return cls(
            gaussians, camera, lens, ellipses, features, order, entries, starts, owners, places,
            *np.empty((2, *pixels), dtype),
        )  # fmt: skip

    def blend(self, colors: np.ndarray, alphas: np.ndarray, depths: np.ndarray) -> None:
        in_threads(
            blend, len(self.starts) - 1, TILES_AT_ONCE, self.starts, self.owners, self.ellipses, self.features, colors,
            alphas, depths, self.remaining, self.stops,
        )  # fmt: skip

    def backward(self, grad_image: tuple[np.ndarray, ...], sums: tuple[np.ndarray, ...]) -> np.ndarray:
        """Add the gradients of the Gaussians to `sums`, float64; that of the camera's matrix is returned (4, 4)."""
        entry_sums = np.zeros((len(self.owners), N_SUMS), self.features.dtype)
        in_threads(
            blend_backward, len(self.starts) - 1, TILES_AT_ONCE, self.starts, self.owners, self.places, self.ellipses,
            self.features, self.remaining, self.stops, *grad_image, entry_sums,
        )  # fmt: skip
        n_parts = -(-len(self.order) // PART)
        by_part = np.zeros((n_parts, projection.CAMERA_GRADIENTS))
        in_threads(
            projection.project_backward, n_parts, 1, PART, self.order, self.entries, entry_sums, *self.gaussians,
            *self.camera, *self.lens, self.ellipses, *sums, by_part,
        )  # fmt: skip
        total = by_part.sum(0)
        grad_viewmat, by_inverse, inverse = np.zeros((4, 4)), np.zeros((4, 4)), np.linalg.inv(self.camera[0])
        grad_viewmat[:3] = total[:12].reshape(3, 4)
        by_inverse[:3, 3] = total[12:]  # the camera's position is the inverse's last column
        return grad_viewmat - inverse.T @ by_inverse @ inverse.T


def _first(counts: np.ndarray) -> np.ndarray:
    """(n,) counts -> (n + 1,) where each one's entries begin, and the end."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
