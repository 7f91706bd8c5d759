"""`render`: Gaussians and cameras to images, with gradients.

`gsplat.rasterization` draws on CUDA devices, `rasterizer.rasterize` elsewhere, with the same conventions.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.rasterizer import rasterize

logger = logging.getLogger(__name__)

MIN_DEPTH_ALPHA = 1e-10  # depth is divided by no less, as in gsplat


class Rendering(NamedTuple):
    """C images, in the dtype and on the device of the Gaussians' positions."""

    image: Tensor  # (C, H, W, 3), colors as the Gaussians give them: not clipped at 1
    alpha: Tensor  # (C, H, W, 1) in 0..1
    depth: Tensor  # (C, H, W, 1) meters along the viewing axis, the expected depth; 0 where nothing is


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    background: float | Sequence[float] | Tensor = 1.0,
    eps2d: float = 0.3,
    near: float = 0.01,
    far: float = 1e10,
) -> Rendering:
    """Image i shows frame i with camera i; a single frame or a single camera is repeated.

    `background` is a gray value, a color (3,) or a color for each image (C, 3). `eps2d` (pixel^2) is added to the
    variances of every projected Gaussian; those nearer than `near` or farther than `far` meters are left out.
    Gradients reach the Gaussians, `cameras.viewmats` and the background, not `cameras.Ks`. `ValueError` for values that
    are not finite, numbers of frames and cameras that do not fit, or a background of another shape.
    """
    frames, n_cameras = gaussians.num_frames, len(cameras)
    if (frames != n_cameras and 1 not in (frames, n_cameras)) or 0 in (frames, n_cameras):
        raise ValueError(
            f"{frames} frames and {n_cameras} cameras, expected as many of both, or one of either; "
            "choose with gaussians.frames(...) and cameras[...]"
        )
    if not (eps2d >= 0 and 0 < near < far):
        raise ValueError(f"eps2d={eps2d}, near={near}, far={far}, expected eps2d >= 0 and 0 < near < far")
    gaussians.check_finite()
    positions = gaussians.positions
    backdrop = _background(background, max(frames, n_cameras), positions)
    cameras = cameras.to(positions.device)
    on_gpu = _gsplat_rasterization() if positions.is_cuda else None
    draw = _with_ours if on_gpu is None else functools.partial(_with_gsplat, on_gpu)
    _log_once("the toolkit's rasterizer draws (CPU)" if on_gpu is None else "gsplat draws (CUDA)")
    try:
        colors, alpha, depth = draw(gaussians, cameras, eps2d, near, far)
    except torch.cuda.OutOfMemoryError as error:
        raise torch.cuda.OutOfMemoryError(
            f"out of GPU memory with {max(frames, n_cameras)} images of {cameras.width} x {cameras.height} and "
            f"{len(gaussians):,} Gaussians; render fewer cameras or frames a call, smaller width and height, or fewer "
            f"points ({error})"
        ) from error
    return Rendering(colors + (1 - alpha) * backdrop, alpha, depth)


def to_rgba(image: Tensor, alpha: Tensor) -> np.ndarray:
    """An image (H, W, 3) on black with its alpha (H, W, 1) -> (H, W, 4) uint8: colors not darkened where transparent."""
    straight = image / alpha.clamp(min=1 / 255)
    return (torch.cat((straight, alpha), -1).detach().clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()


def _background(background: float | Sequence[float] | Tensor, n_images: int, like: Tensor) -> Tensor:
    """(), (1, 1, 1, 3) or (C, 1, 1, 3)."""
    colors = torch.as_tensor(background).to(like)
    if colors.ndim == 0:
        return colors
    if colors.shape not in ((3,), (n_images, 3)):
        raise ValueError(
            f"background is {tuple(colors.shape)}, expected a number, a color (3,) or a color an image ({n_images}, 3)"
        )
    return colors.reshape(-1, 1, 1, 3)


def _with_ours(
    gaussians: Gaussians, cameras: Cameras, eps2d: float, near: float, far: float
) -> tuple[Tensor, Tensor, Tensor]:
    device = gaussians.positions.device
    drawn, own = gaussians.to("cpu"), cameras.to("cpu")
    inputs = (drawn.positions, drawn.quats, drawn.scales, drawn.opacities, drawn.sh, own.viewmats, own.Ks)
    colors, alpha, depth = rasterize(*inputs, own.width, own.height, eps2d=eps2d, near=near, far=far)
    return colors.to(device), alpha.to(device), (depth / alpha.clamp(min=MIN_DEPTH_ALPHA)).to(device)


def _with_gsplat(
    rasterization: Callable, gaussians: Gaussians, cameras: Cameras, eps2d: float, near: float, far: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = gaussians.positions.dtype
    gaussians, cameras = gaussians.to(torch.float32), cameras.to(torch.float32)
    frames, n_cameras = gaussians.num_frames, len(cameras)
    if len(gaussians) == 0:  # its kernels want at least one
        shape = (max(frames, n_cameras), cameras.height, cameras.width, 1)
        nothing = gaussians.positions.new_zeros(shape, dtype=dtype)
        return nothing.expand(*shape[:3], 3), nothing, nothing
    images = []
    # One call draws one frame with all its cameras.
    for frame in range(frames):
        own = cameras if frames == 1 else cameras[frame if n_cameras > 1 else 0]
        drawn, alpha, _ = rasterization(
            means=gaussians.positions[frame],
            quats=gaussians.quats[frame],
            scales=gaussians.scales[frame],
            opacities=gaussians.opacities,
            colors=gaussians.sh,
            sh_degree=gaussians.sh_degree,
            viewmats=own.viewmats,
            Ks=own.Ks.contiguous(),
            width=own.width,
            height=own.height,
            near_plane=near,
            far_plane=far,
            eps2d=eps2d,
            packed=False,
            render_mode="RGB+ED",
        )
        images.append(torch.cat((drawn, alpha), -1))
    sums = torch.cat(images).to(dtype)
    return sums[..., :3], sums[..., 4:], sums[..., 3:4]


@functools.cache
def _gsplat_rasterization() -> Callable | None:
    """`gsplat.rasterization` if it draws one Gaussian, else None with a warning; the first call may compile for minutes."""
    if not torch.cuda.is_available():
        return None
    try:
        from gsplat import rasterization

        one, eye = torch.ones(1, 1, 3, device="cuda"), torch.eye(4, device="cuda")[None]
        probe = Gaussians(one, one, eye[:, :1], one[0, :, 0], one)
        _with_gsplat(rasterization, probe, Cameras(eye, eye[:, :3, :3], 1, 1), 0.3, 0.01, 1e10)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        logger.warning(
            "gsplat does not work here (%s: %s); the toolkit's slower rasterizer draws on the CPU instead. "
            'For gsplat: pip install "avatar-pointillist[render]", with a CUDA toolkit (nvcc) of the version of torch',
            type(error).__name__,
            error,
        )
        return None
    return rasterization


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
