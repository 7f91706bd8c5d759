"""PSNR and SSIM (Wang et al. 2004) of images (B, H, W, 3) in 0..1, differentiable; coverage of their alpha."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for a range of 1


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of each image, for a peak of 1."""
    return -10 * (images - truth).square().flatten(1).mean(1).clamp(min=1e-12).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """(B,) structural similarity, 1 for equal images: the mean over channels and pixels whose window lies inside.

    ValueError if the images are smaller than the window.
    """
    if min(images.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs at least its window of {SSIM_WINDOW} pixels, found images of {images.shape[2]}x{images.shape[1]}"
        )
    steps = torch.arange(SSIM_WINDOW, device=images.device, dtype=images.dtype) - SSIM_WINDOW // 2
    weights = (-steps.square() / (2 * SSIM_SIGMA**2)).exp()
    weights = weights / weights.sum()
    a, b = (rearrange(x, "b h w c -> (b c) h w") for x in (images, truth))
    moments = torch.cat((a, b, a * a, b * b, a * b))
    # A Gaussian over the plane is one along each axis: 22 multiplications a pixel instead of 121. One group an image, because
    # the convolution of a batch of single channels takes fourteen times as long on a CPU.
    count = len(moments)
    along_rows = F.conv2d(moments, weights.view(1, 1, 1, -1).expand(count, 1, 1, -1), groups=count)
    moments = F.conv2d(along_rows, weights.view(1, 1, -1, 1).expand(count, 1, -1, 1), groups=count)
    mean_a, mean_b, aa, bb, ab = moments.chunk(5)
    var_a, var_b, covariance = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    likeness = likeness / ((mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2))
    return likeness.flatten(1).mean(1).unflatten(0, (len(images), -1)).mean(1)


def coverage(alphas: Tensor, truth: Tensor) -> Tensor:
    """(B,) share of the true subject's pixels (alpha above 1/2) that are opaque (above 1/2) in the rendering too, 1 without holes.

    Alphas (B, H, W, 1) in 0..1. NaN where the truth is opaque everywhere, as an image without alpha is, or nowhere.
    """
    subject = (truth > 0.5).flatten(1)
    covered = (subject & (alphas > 0.5).flatten(1)).sum(1) / subject.sum(1)
    return covered.masked_fill(subject.all(1), math.nan)
