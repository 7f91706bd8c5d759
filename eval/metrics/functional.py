"""The formulas of the metrics: images, features, landmarks or rotations in, one number per frame (or per set) out.

    images (N, H, W, 3) uint8 -> psnr, ssim
    alphas (N, H, W) uint8      -> coverage
    features (N, D)             -> frechet_distance (FID), cosine_similarity (CSIM, CLIP)
    landmarks (N, K, 2)         -> keypoint_distance (AKD)
    rotations (N, 3, 3)         -> pose_distance_geodesic, pose_distance_euler (APD)
    expressions (N, E)          -> expression_distance (AED)

Everything is float64. A row of NaN means that no face was found; the distance of that frame is then NaN too, never zero.
Definitions and reasons: docs/metrics.md.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from eval.networks.weights import check_images
from gaussian_tokenizer.rendering import image_metrics

Array = NDArray[np.float64]

MAX_ROTATION_ERROR = 1e-3  # of R Rᵀ - I: single precision stays below 1e-5, zeros and scaled rotations far above


def psnr(a: ArrayLike, b: ArrayLike) -> Array:
    """(N,) peak signal-to-noise ratio in dB of images (N, H, W, 3) uint8, 10 log10(255² / mean square); inf for equal ones."""
    a, b = np.asarray(a), np.asarray(b)
    check_images(a, b)
    error = np.array([np.square(x.astype(np.float64) - y).mean() for x, y in zip(a, b)])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)


def ssim(a: ArrayLike, b: ArrayLike) -> Array:
    """(N,) structural similarity of images (N, H, W, 3) uint8 (Wang et al. 2004), 1 for equal ones.

    Gaussian window of 11 pixels with sigma 1.5, each channel by itself; the mean over channels and over all pixels whose window
    lies within the image. ValueError for images smaller than the window.
    """
    a, b = np.asarray(a), np.asarray(b)
    check_images(a, b)
    pairs = ((torch.from_numpy(x / 255.0)[None], torch.from_numpy(y / 255.0)[None]) for x, y in zip(a, b))
    return np.array([float(image_metrics.ssim(*pair)) for pair in pairs])  # one at a time: SSIM holds five copies


def coverage(a: ArrayLike, truth: ArrayLike) -> Array:
    """(N,) share of the pixels of the true subject that are opaque in the frames too, of alphas (N, H, W) uint8: 1 without holes.

    Opaque is an alpha above 1/2. NaN where the truth is opaque everywhere, as an image without alpha is, or nowhere.
    """
    a, truth = np.asarray(a), np.asarray(truth)
    if a.shape != truth.shape or a.ndim != 3 or (a.dtype, truth.dtype) != (np.uint8, np.uint8):
        raise ValueError(f"expected alphas (N, H, W) uint8, found {a.dtype} {a.shape} and {truth.dtype} {truth.shape}")
    pair = (torch.from_numpy(x / 255.0)[..., None] for x in (a, truth))
    return image_metrics.coverage(*pair).double().numpy()


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """|μx - μy|² + Tr(Σx + Σy - 2 (Σx Σy)^½) of features (N, D) and (M, D): FID where they are Inception's (Heusel et al. 2017).

    With centered features X and Y, divided by √(N - 1) and √(M - 1), Σx = XᵀX and Σy = YᵀY, and the non-zero eigenvalues of
    Σx Σy are the squared singular values of X Yᵀ, whose sum is the trace of the root. ValueError for fewer than two rows, different
    widths, or a value that is not finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    for features in (x, y):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != x.shape[-1]:
            wanted = "features (N, D) and (M, D) with at least two rows"
            raise ValueError(f"the Fréchet distance compares {wanted}, found {x.shape} and {y.shape}")
        if not np.isfinite(features).all():
            row = int(np.argmin(np.isfinite(features).all(1)))
            raise ValueError(f"row {row} of the features is not finite; leave out and count frames without features")
    shift = x.mean(0) - y.mean(0)
    spread_x, spread_y = _spread(x), _spread(y)
    root = np.linalg.svd(spread_x @ spread_y.T, compute_uv=False).sum()
    squared = shift @ shift + np.square(spread_x).sum() + np.square(spread_y).sum() - 2 * root
    return max(float(squared), 0.0)


def keypoint_distance(a: ArrayLike, b: ArrayLike) -> Array:
    """(N,) mean Euclidean distance of landmarks (N, K, 2), in their unit (pixels); its mean over frames is AKD."""
    a, b = _same_shape(a, b, "landmarks", (None, None, 2))
    return np.linalg.norm(a - b, axis=-1).mean(-1)


def pose_distance_geodesic(a: ArrayLike, b: ArrayLike) -> Array:
    """(N,) angle in radians, 0 to π, of the rotation from a (N, 3, 3) to b, independent of any choice of axes.

    From |a - b| = 2 √2 sin(angle / 2), which is accurate for small angles, unlike the arc cosine of the trace.
    """
    a, b = _rotations(a, b)
    chord = np.sqrt(np.square(a - b).sum((-2, -1))) / (2 * np.sqrt(2))
    return 2 * np.arcsin(np.minimum(chord, 1.0))


def pose_distance_euler(a: ArrayLike, b: ArrayLike) -> Array:
    """(N,) mean absolute difference in radians of the three Euler angles of rotations (N, 3, 3): APD as published.

    The angles are those of R = Rz Ry Rx, as in Deep3DFaceRecon; differences wrap around at π.
    """
    first, second = map(_euler_angles, _rotations(a, b))
    difference = first - second
    return np.abs(np.arctan2(np.sin(difference), np.cos(difference))).mean(-1)


def expression_distance(a: ArrayLike, b: ArrayLike) -> Array:
    """(N,) mean absolute difference of expression coefficients (N, E); its mean over frames is AED."""
    a, b = _same_shape(a, b, "expressions", (None, None))
    return np.abs(a - b).mean(-1)


def cosine_similarity(a: ArrayLike, b: ArrayLike) -> Array:
    """(N,) cosine of the angle between features (N, D), -1 to 1; NaN where either is NaN or zero. CSIM, CLIP similarity."""
    a, b = _same_shape(a, b, "features", (None, None))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1))


def _spread(features: Array) -> Array:
    """A matrix S of at most D rows with SᵀS the unbiased covariance of features (N, D)."""
    centered = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centered, mode="r")) if len(centered) > centered.shape[1] else centered


def _same_shape(a: ArrayLike, b: ArrayLike, what: str, shape: tuple[int | None, ...]) -> tuple[Array, Array]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or len(a.shape) != len(shape) or any(e not in (None, s) for e, s in zip(shape, a.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"expected {what} ({wanted}) of one shape, found {a.shape} and {b.shape}")
    return a, b


def _rotations(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    a, b = _same_shape(a, b, "rotations", (None, 3, 3))
    for matrices in (a, b):
        error = np.abs(matrices @ matrices.swapaxes(-2, -1) - np.eye(3)).max((-2, -1))
        with np.errstate(invalid="ignore"):
            # False for NaN, where no face was found.
            wrong = (error > MAX_ROTATION_ERROR) | (np.linalg.det(matrices) < 0)
        if wrong.any():
            row, remedy = int(np.argmax(wrong)), "give NaN where no face was found"
            raise ValueError(f"matrix {row} is not a rotation: {matrices[row].tolist()}; {remedy}")
    return a, b


def _euler_angles(rotations: Array) -> Array:
    """(N, 3) angles about x, y and z of R = Rz Ry Rx, in radians. Not by scipy, which is not a dependency and refuses NaN."""
    x = np.arctan2(rotations[:, 2, 1], rotations[:, 2, 2])
    y = np.arcsin(np.clip(-rotations[:, 2, 0], -1, 1))
    z = np.arctan2(rotations[:, 1, 0], rotations[:, 0, 0])
    return np.stack((x, y, z), -1)
