"""A small, exact splatter in NumPy: the portraits of synthetic subjects.

World-space Gaussians and a pinhole camera go in, an image comes out. Every Gaussian is projected by the affine
approximation of EWA splatting (Zwicker et al. 2001, section 5: Sigma' = J W Sigma W^T J^T), widened by the 0.3 pixel^2
of 3D Gaussian Splatting (Kerbl et al. 2023), and composited front to back in order of depth. Nothing is stopped early
and nothing is approximated besides: all (Gaussian, pixel) pairs are written out, sorted by pixel, and multiplied up
along each pixel. Slower than a tiled rasteriser, but plain, without gradients and good for thousands of Gaussians.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LOW_PASS = 0.3  # pixel^2, added to the diagonal of every projected covariance
MIN_ALPHA, MAX_ALPHA = 1 / 255, 0.99  # a contribution below is left out, one above is cut
NEAR = 0.01  # metres
PAIRS_AT_ONCE = 60_000  # what stays in a processor's cache; more is slower


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera; pixel (row i, column j) is sampled at its centre, x = j + 0.5, y = i + 0.5."""

    viewmat: np.ndarray  # (4, 4) world to camera, OpenCV axes: x right, y down, z forward
    K: np.ndarray  # (3, 3) pixels
    width: int
    height: int


def look_at(
    eye: np.ndarray, target: np.ndarray, focal: float, width: int, height: int, up: tuple = (0.0, 1.0, 0.0)
) -> Camera:
    """A camera at `eye` (3,) that sees `target` (3,) in the middle of its image, `up` upwards; `focal` in pixels."""
    forward = np.asarray(target, np.float64) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    rotation = np.stack((right, np.cross(forward, right), forward))
    viewmat = np.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = rotation, -rotation @ eye
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float64)
    return Camera(viewmat, K, width, height)


def splat(gaussians: Mapping, camera: Camera, background: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw N Gaussians: image (H, W, 3) and alpha (H, W), both float64 in 0..1 (colours as given, not clipped).

    `gaussians` as from `GaussianAvatar.posed_gaussians`: positions (N, 3) metres, scales (N, 3) metres, quats (N, 4)
    wxyz, opacities (N,) in 0..1, colors (N, 3); arrays or CPU tensors.
    """
    names = ("positions", "scales", "quats", "opacities", "colors")
    positions, scales, quats, opacities, colors = (np.asarray(gaussians[name], np.float64) for name in names)
    in_camera = positions @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
    seen = np.flatnonzero((in_camera[:, 2] > NEAR) & (opacities >= MIN_ALPHA))
    seen = seen[np.argsort(in_camera[seen, 2], kind="stable")]  # front to back
    covariances = _covariances(scales[seen], quats[seen])
    centers, covariances = project(in_camera[seen], covariances, camera)
    premultiplied = np.zeros((camera.height * camera.width, 3))
    alpha = np.zeros(camera.height * camera.width)
    drawn = _Drawn.make(centers, covariances, opacities[seen], colors[seen], camera)
    n_bands = max(1, -(-int(drawn.areas().sum()) // PAIRS_AT_ONCE))
    # A band of at most 65,536 pixels lets NumPy sort the pairs by radix.
    rows = max(1, min(-(-camera.height // n_bands), 65536 // camera.width))
    for top in range(0, camera.height, rows):
        bottom = min(top + rows, camera.height)
        band = slice(top * camera.width, bottom * camera.width)
        premultiplied[band], alpha[band] = _composite(drawn, top, bottom, camera.width)
    image = premultiplied + background * (1 - alpha[:, None])
    return image.reshape(camera.height, camera.width, 3), alpha.reshape(camera.height, camera.width)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Colours in 0..1 to bytes, clipped and rounded."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def project(in_camera: np.ndarray, covariances: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Means (N, 3) in camera space and covariances (N, 3, 3) in world space to pixels: (N, 2) and (N, 2, 2)."""
    x, y, z = in_camera.T
    (fx, _, cx), (_, fy, cy) = camera.K[:2]
    centers = np.stack((fx * x / z + cx, fy * y / z + cy), 1)
    jacobian = np.zeros((len(z), 2, 3))
    jacobian[:, 0, 0], jacobian[:, 0, 2] = fx / z, -fx * x / z**2
    jacobian[:, 1, 1], jacobian[:, 1, 2] = fy / z, -fy * y / z**2
    turned = jacobian @ camera.viewmat[:3, :3]
    return centers, turned @ covariances @ turned.transpose(0, 2, 1) + LOW_PASS * np.eye(2)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Projected Gaussians from front to back, those outside the image left out."""

    centers: np.ndarray  # (N, 2)
    conics: np.ndarray  # (N, 3) entries xx, xy, yy of the inverse covariance
    opacities: np.ndarray  # (N,)
    colors: np.ndarray  # (N, 3)
    boxes: np.ndarray  # (N, 4) columns from, to, rows from, to (exclusive) that reach MIN_ALPHA

    @classmethod
    def make(
        cls, centers: np.ndarray, covariances: np.ndarray, opacities: np.ndarray, colors: np.ndarray, camera: Camera
    ) -> "_Drawn":
        xx, xy, yy = covariances[:, 0, 0], covariances[:, 0, 1], covariances[:, 1, 1]
        conics = np.stack((yy, -xy, xx), 1) / (xx * yy - xy * xy)[:, None]
        # opacity * exp(-d^2 / 2) >= MIN_ALPHA inside an ellipse, whose bounding box is that of the covariance.
        reach = np.sqrt(2 * np.log(opacities / MIN_ALPHA))[:, None] * np.sqrt(np.stack((xx, yy), 1))
        limits = np.array([camera.width, camera.height])
        low = np.clip(np.ceil(centers - reach - 0.5), 0, limits).astype(np.int64)
        high = np.clip(np.floor(centers + reach - 0.5) + 1, 0, limits).astype(np.int64)
        boxes = np.stack((low[:, 0], high[:, 0], low[:, 1], high[:, 1]), 1)
        kept = (high > low).all(1)
        return cls(centers[kept], conics[kept], opacities[kept], colors[kept], boxes[kept])

    def areas(self) -> np.ndarray:
        return (self.boxes[:, 1] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 2])


def _composite(drawn: _Drawn, top: int, bottom: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows top..bottom of the image: premultiplied colours (P, 3) and alpha (P,) of P = rows * width pixels."""
    n_pixels = (bottom - top) * width
    first, last = np.maximum(drawn.boxes[:, 2], top), np.minimum(drawn.boxes[:, 3], bottom)
    inside = np.flatnonzero(last > first)
    left, columns = drawn.boxes[inside, 0], drawn.boxes[inside, 1] - drawn.boxes[inside, 0]
    counts = columns * (last - first)[inside]
    # Pair k of a Gaussian is pixel (k // columns, k % columns) of its box. 32 bits: a band has few pairs.
    owner = np.repeat(np.arange(len(inside), dtype=np.int32), counts)
    within = np.arange(len(owner), dtype=np.int32) - (np.cumsum(counts) - counts).astype(np.int32)[owner]
    row = within // columns.astype(np.int32)[owner]
    column = within - row * columns.astype(np.int32)[owner]
    row += (first[inside] - top).astype(np.int32)[owner]
    column += left.astype(np.int32)[owner]
    centers = drawn.centers[inside] - (0.5, top + 0.5)
    dx, dy = column - centers[owner, 0], row - centers[owner, 1]
    xx, xy, yy = (np.array((-0.5, -1.0, -0.5)) * drawn.conics[inside]).T
    exponent = dx * (xx[owner] * dx + xy[owner] * dy) + yy[owner] * (dy * dy)
    alpha = np.minimum(MAX_ALPHA, drawn.opacities[inside][owner] * np.exp(exponent))
    kept = np.flatnonzero(alpha >= MIN_ALPHA)
    pixel = (row[kept] * width + column[kept]).astype(np.uint16)
    order = np.argsort(pixel, kind="stable")  # within a pixel still front to back
    pixel, kept = pixel[order], kept[order]
    alpha, colors = alpha[kept], drawn.colors[inside][owner[kept]]

    log_transmittance = np.cumsum(np.log1p(-alpha))
    before = np.concatenate(([0.0], log_transmittance))[:-1]
    starts = np.flatnonzero(np.diff(pixel.astype(np.int32), prepend=-1))
    lengths = np.diff(starts, append=len(pixel))
    weights = alpha * np.exp(before - np.repeat(before[starts], lengths))
    premultiplied = [np.bincount(pixel, weights * colors[:, channel], n_pixels) for channel in range(3)]
    return np.stack(premultiplied, 1), np.bincount(pixel, weights, n_pixels)


def _covariances(scales: np.ndarray, quats: np.ndarray) -> np.ndarray:
    """(N, 3, 3) R diag(scales)^2 R^T."""
    w, x, y, z = (quats / np.linalg.norm(quats, axis=1, keepdims=True)).T
    rotations = np.empty((len(w), 3, 3))
    rotations[:, 0] = np.stack((1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)), 1)
    rotations[:, 1] = np.stack((2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)), 1)
    rotations[:, 2] = np.stack((2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)), 1)
    stretched = rotations * scales[:, None, :]
    return stretched @ stretched.transpose(0, 2, 1)
