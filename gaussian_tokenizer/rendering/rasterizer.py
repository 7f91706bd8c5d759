"""Differentiable Gaussian splatting in plain PyTorch: what `render` uses where there is no CUDA.

World-space Gaussians and pinhole cameras go in; color, alpha and depth sums come out, with gradients to everything but
the intrinsics. The mathematics is that of 3D Gaussian Splatting (Kerbl et al. 2023) with the conventions of gsplat 1.5:
affine projection (Zwicker et al. 2001, section 5), `eps2d` added to the 2D covariance, alpha = min(0.999, opacity
exp(-sigma)), nothing below 1/255, and a pixel ends before the Gaussian that would bring its transmittance to 1e-4.
`rasterizer_reference` is the slow twin.

The work is laid out in strips of `STRIP` pixels of one image row. A Gaussian meets the strips that its ellipse crosses
(found exactly, row by row), the intersections are sorted by strip and stay in order of depth inside, and pixel j of all
intersections is one contiguous vector. Time and memory grow with the intersections: with points + pixels, not their product.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix

MIN_ALPHA, MAX_ALPHA = 1 / 255, 0.999  # a contribution below is left out, one above is cut
MIN_TRANSMITTANCE = 1e-4
CHANNELS = 5  # red, green, blue, depth, one (its sum is alpha)
STRIP = 8  # pixels; shorter strips mean more intersections, longer ones more pixels outside the ellipse
INTERSECTIONS_AT_ONCE = 16384  # temporaries of this many strips stay in a core's cache
STEEP = 1e30  # makes any number below zero a very low one
NOTHING = -60.0  # exponents are cut here: exp is ten times slower where its result underflows


@contextmanager
def _one_thread() -> Iterator[None]:
    """Each operation is so short that threads lose more by waiting for each other, 30 times on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
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
    axes = quaternion_to_matrix(quats.double()) * scales.double()[..., None, :]
    centers, log_opacities = means.double(), opacities.double().clamp(min=1e-30).log()
    images = []
    for index in range(max(len(means), len(viewmats))):
        frame, camera = min(index, len(means) - 1), min(index, len(viewmats) - 1)
        viewmat, K = viewmats[camera].double(), Ks[camera].detach().double()
        with torch.no_grad():
            depth = centers[frame] @ viewmat[2, :3] + viewmat[2, 3]
            seen = ((depth > near) & (depth < far) & (opacities >= MIN_ALPHA)).nonzero()[:, 0]
            seen = seen[depth[seen].argsort(stable=True)]  # front to back
        means2d, covariances, depth = project(centers[frame][seen], axes[frame][seen], viewmat, K, width, height, eps2d)
        colors = view_colors(centers[frame][seen], sh[seen], viewmat)
        features = torch.cat(
            (colors.to(dtype), depth[:, None].to(dtype), torch.ones_like(depth[:, None], dtype=dtype)), 1
        )
        ellipses = torch.cat((means2d.T, covariances.T, log_opacities[seen][None]))
        images.append(_Blend.apply(ellipses, features, width, height))
    sums = torch.stack(images).to(means.dtype)
    return sums[..., :3], sums[..., 4:], sums[..., 3:4]


def project(
    centers: Tensor, axes: Tensor, viewmat: Tensor, K: Tensor, width: int, height: int, eps2d: float
) -> tuple[Tensor, Tensor, Tensor]:
    """N Gaussians to one image: means (N, 2) pixels, shapes (N, 3), depths (N,) meters.

    `axes` (N, 3, 3) has the standard deviations as columns (rotation times scales). The shape of a projected covariance
    [[xx, xy], [xy, yy]] is (xy / yy, yy, det / yy): the slope of the line of the rows' maxima, the variance over rows, and
    the variance inside a row, so that sigma = dy^2 / (2 yy) + (dx - slope dy)^2 / (2 det / yy). Nothing is subtracted to
    get it: det = |a x b|^2 + eps2d (|a|^2 + |b|^2) + eps2d^2 for the image axes a and b.
    """
    x, y, depth = (centers @ viewmat[:3, :3].T + viewmat[:3, 3]).unbind(1)
    (fx, skew, cx), (_, fy, cy) = K[0], K[1]
    tan_x, tan_y = x / depth, y / depth
    means2d = torch.stack((fx * tan_x + skew * tan_y + cx, fy * tan_y + cy), 1)
    # Outside of the image plus 15% the Jacobian is taken at the border, or it would blow up Gaussians beside the camera.
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    tan_x = tan_x.clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    tan_y = tan_y.clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    in_camera = viewmat[:3, :3] @ axes
    a = (fx / depth)[:, None] * (in_camera[:, 0] - tan_x[:, None] * in_camera[:, 2])
    b = (fy / depth)[:, None] * (in_camera[:, 1] - tan_y[:, None] * in_camera[:, 2])
    xx, yy = (a * a).sum(1), (b * b).sum(1)
    det = torch.linalg.cross(a, b).square().sum(1) + eps2d * (xx + yy + eps2d)
    yy = yy + eps2d
    return means2d, torch.stack(((a * b).sum(1) / yy, yy, det / yy), 1), depth


def view_colors(centers: Tensor, sh: Tensor, viewmat: Tensor) -> Tensor:
    """(N, 3) >= 0, spherical harmonics (N, K, 3) seen from the camera, plus 0.5."""
    directions = centers - torch.linalg.inv(viewmat)[:3, 3]
    basis = sh_basis(torch.nn.functional.normalize(directions, dim=1), round(sh.shape[1] ** 0.5) - 1).to(sh.dtype)
    return ((basis[:, :, None] * sh).sum(1) + 0.5).clamp(min=0)


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


class _Blend(torch.autograd.Function):
    """Composite M projected Gaussians, given front to back, to (H, W, CHANNELS) sums of weight times feature.

    `ellipses` (6, M) float64: mean x, mean y, slope, variance over rows, variance inside a row, log opacity.
    `features` (M, CHANNELS). The backward pass computes the weights again; the intersections are kept.
    """

    @staticmethod
    def forward(ctx: Any, ellipses: Tensor, features: Tensor, width: int, height: int) -> Tensor:
        intersections = _Intersections.of(ellipses.numpy(), width, height, features.dtype)
        # Eight columns: the widths that embedding_bag is fast for.
        padded = torch.nn.functional.pad(features, (0, 8 - CHANNELS))
        sums = features.new_zeros(intersections.n_strips, STRIP, CHANNELS)
        for chunk in intersections.chunks():
            alpha, transmittance, _ = chunk.weights()
            count, per_strip = len(chunk.owners), len(chunk.strips)
            bags = torch.arange(0, STRIP * count, count)[:, None] + chunk.starts
            blended = torch.nn.functional.embedding_bag(
                chunk.owners.repeat(STRIP),
                padded,
                bags.flatten().to(chunk.owners.dtype),
                mode="sum",
                per_sample_weights=alpha.mul_(transmittance).flatten(),
            )
            sums[chunk.strips] = blended[:, :CHANNELS].view(STRIP, per_strip, CHANNELS).transpose(0, 1)
        ctx.save_for_backward(ellipses, features)
        ctx.intersections = intersections
        return sums.view(height, -1, CHANNELS)[:, :width].contiguous()

    @staticmethod
    @once_differentiable
    @_one_thread()
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        ellipses, features = ctx.saved_tensors
        intersections: _Intersections = ctx.intersections
        missing = -grad.shape[1] % STRIP
        grad = torch.nn.functional.pad(grad, (0, 0, 0, missing)).view(-1, STRIP, CHANNELS)
        # Sums over a Gaussian's pixels, in float64: those of g, g dy, g dy^2, g u, g u dy, g u^2, and of the features.
        sums = ellipses.new_zeros(6 + CHANNELS - 1, features.shape[0])
        for chunk in intersections.chunks():
            chunk.add_gradients(sums, grad[chunk.strips].permute(2, 1, 0).contiguous(), features)
        total, dy, dy2, u, u_dy, u2 = sums[:6]
        _, _, slope, over_rows, inside, _ = ellipses
        grad_ellipses = torch.stack(
            (u / inside, dy / over_rows - slope * u / inside, u_dy / inside,
             dy2 / (2 * over_rows**2), u2 / (2 * inside**2), total)
        )  # fmt: skip
        grad_features = torch.nn.functional.pad(sums[6:].T, (0, 1)).to(features.dtype)
        return grad_ellipses, grad_features, None, None


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some whole strips with their intersections, sorted by strip, front to back inside."""

    strips: Tensor  # (S,) int64
    starts: Tensor  # (S,) int64, the first intersection of each
    counts: np.ndarray  # (S,)
    owners: Tensor  # (E,) int32, Gaussians
    peak: Tensor  # (E,) log alpha at the row's maximum
    offset: Tensor  # (E,) pixels from that maximum to the center of the strip's first pixel
    falloff: Tensor  # (E,) 1 / (2 variance inside the row)
    middle: Tensor  # (E,) of the ellipse's pixels in this row, counted from the strip's first
    reach: Tensor  # (E,) half their number
    dy: Tensor  # (E,) pixels from the mean to the row

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, transmittance in front (1e-26 where the pixel has ended), 1 - alpha: each (STRIP, E)."""
        pixel = torch.arange(STRIP, dtype=self.peak.dtype)[:, None]
        from_maximum = self.offset + pixel
        alpha = torch.addcmul(self.peak, self.falloff * from_maximum, from_maximum, value=-1)
        # Whether a pixel belongs to the ellipse was decided in float64; a minimum is several times faster than `where`.
        outside = (pixel - self.middle).abs_().sub_(self.reach).mul_(-STEEP)
        alpha = torch.minimum(alpha, outside, out=alpha).clamp_(min=NOTHING).exp_().clamp_(max=MAX_ALPHA)
        alpha = torch.nn.functional.threshold(alpha, 2 * math.exp(NOTHING), 0.0)
        rest = 1 - alpha
        logs = rest.log()
        # Exclusive sums along all intersections, in float64 because they are long, less the value at the strip's start.
        before = torch.zeros(STRIP, logs.shape[1] + 1, dtype=torch.float64)
        torch.cumsum(logs.double(), 1, out=before[:, 1:])
        before = (before[:, :-1] - self.repeat(before[:, self.starts])).to(logs.dtype)
        ended = (before + logs).sub_(math.log(MIN_TRANSMITTANCE)).mul_(STEEP)
        return alpha, torch.minimum(before, ended, out=before).clamp_(min=NOTHING).exp_(), rest

    def add_gradients(self, sums: Tensor, grad: Tensor, features: Tensor) -> None:
        """Add these intersections to the sums (10, M), given the gradient (CHANNELS, STRIP, S) of the strips."""
        alpha, transmittance, rest = self.weights()
        owners = self.owners.long()
        weight = alpha * transmittance
        grad = self.repeat(grad)
        feature = features[owners].T.contiguous()
        along = grad[CHANNELS - 1].clone()
        sources = []
        for channel in range(CHANNELS - 1):
            along.addcmul_(feature[channel], grad[channel])
            sources.append(grad[channel].mul_(weight).sum(0))
        # dL/dalpha = T (c . grad) - (what the intersections behind contribute) / (1 - alpha)
        through = torch.cumsum((weight * along).double(), 1)
        total = self.repeat(through[:, self.starts + torch.from_numpy(self.counts) - 1])
        behind = (total - through).to(alpha.dtype)
        g = transmittance.mul_(along).sub_(behind.div_(rest))
        # No gradient where the pixel has ended (transmittance and `behind` vanish) or alpha was cut: only -alpha > -MAX.
        g.mul_(torch.nn.functional.threshold(-alpha, -MAX_ALPHA, 0.0)).neg_()
        from_maximum = self.offset + torch.arange(STRIP, dtype=alpha.dtype)[:, None]
        g_sum, g_u = g.sum(0), g.mul_(from_maximum).sum(0)
        g_u2 = g.mul_(from_maximum).sum(0)
        sources = [g_sum, g_sum * self.dy, g_sum * self.dy**2, g_u, g_u * self.dy, g_u2, *sources]
        for row, source in zip(sums, sources):
            row.index_add_(0, owners, source.double())

    def repeat(self, values: Tensor) -> Tensor:
        """(..., S) -> (..., E), a strip's value for each of its intersections; NumPy's is the fast one."""
        return torch.from_numpy(np.repeat(values.numpy(), self.counts, axis=-1))


@dataclass(frozen=True, eq=False)
class _Intersections:
    """Every (Gaussian, strip) with at least one pixel where alpha reaches MIN_ALPHA, sorted by strip, then by depth."""

    n_strips: int
    counts: np.ndarray  # (n_strips,) intersections of each strip
    owners: Tensor  # (E,) int32
    table: Tensor  # (6, E) peak, offset, falloff, middle, reach, dy of _Chunk

    @classmethod
    def of(cls, ellipses: np.ndarray, width: int, height: int, dtype: torch.dtype) -> "_Intersections":
        mean_x, mean_y, slope, over_rows, inside, log_opacity = ellipses
        room = np.maximum(log_opacity - math.log(MIN_ALPHA), 0)
        top, rows = _pixels_within(mean_y, np.sqrt(2 * room * over_rows), height)
        owner = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
        row = _count_up(top, rows)
        dy = row + 0.5 - mean_y[owner]
        peak = log_opacity[owner] - dy * dy / (2 * over_rows)[owner]
        center = mean_x[owner] + slope[owner] * dy
        room = np.maximum(peak - math.log(MIN_ALPHA), 0)
        left, columns = _pixels_within(center, np.sqrt(room * (2 * inside)[owner]), width)
        first = left // STRIP
        strips = np.where(columns > 0, (left + columns - 1) // STRIP - first + 1, 0)
        per_row = -(-width // STRIP)
        strip = _count_up(row * per_row + first, strips)
        # Stable: the Gaussians come front to back, and stay so inside a strip.
        strip, order = (values.numpy() for values in torch.sort(torch.from_numpy(strip), stable=True))
        line = np.repeat(np.arange(len(owner), dtype=np.int32), strips)[order]
        x = (strip % per_row) * STRIP
        left, columns, owner = left[line], columns[line], owner[line]
        table = np.stack(
            (
                peak[line],
                x + 0.5 - center[line],
                (0.5 / inside)[owner],
                left + 0.5 * (columns - 1) - x,
                0.5 * columns,
                dy[line],
            )
        )
        n_strips = height * per_row
        counts = np.bincount(strip, minlength=n_strips)
        return cls(n_strips, counts, torch.from_numpy(owner), torch.from_numpy(table).to(dtype))

    def chunks(self) -> Iterator[_Chunk]:
        filled = np.flatnonzero(self.counts)
        counts = self.counts[filled]
        ends = np.cumsum(counts)
        cuts = np.searchsorted(
            ends, np.arange(INTERSECTIONS_AT_ONCE, ends[-1] if len(ends) else 0, INTERSECTIONS_AT_ONCE)
        )
        cuts = np.unique(np.concatenate(([0], cuts, [len(ends)])))
        for low, high in pairwise(cuts.tolist()):
            begin, end = int(ends[low] - counts[low]), int(ends[high - 1])
            yield _Chunk(
                torch.from_numpy(filled[low:high]),
                torch.from_numpy(ends[low:high] - counts[low:high] - begin),
                counts[low:high],
                self.owners[begin:end],
                *self.table[:, begin:end].unbind(),
            )


def _pixels_within(center: np.ndarray, reach: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel and number of pixels whose centers lie in [center - reach, center + reach] and in the image, int32."""
    first = np.clip(np.ceil(center - reach - 0.5), 0, size)
    end = np.clip(np.floor(center + reach + 0.5), 0, size)
    return first.astype(np.int32), np.maximum(end - first, 0).astype(np.int32)


def _count_up(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first, first + 1, ..., `counts` numbers of each, one after the other, int32."""
    ends = np.cumsum(counts, dtype=np.int32)
    return np.arange(ends[-1] if len(ends) else 0, dtype=np.int32) + np.repeat(first - (ends - counts), counts)
