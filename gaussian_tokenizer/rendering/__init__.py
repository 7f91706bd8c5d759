"""Gaussians and cameras to images: gsplat on CUDA, a differentiable rasterizer in compiled loops elsewhere."""

from .cameras import Cameras, portrait_cameras
from .splatting import render

__all__ = ["Cameras", "portrait_cameras", "render"]
