"""Gaussians and cameras to images: gsplat on CUDA, a differentiable rasterizer in compiled loops elsewhere."""

from .cameras import Cameras, portrait_cameras
from .portrait_points import Portrait, face_pixels
from .splatting import render

__all__ = ["Cameras", "Portrait", "face_pixels", "portrait_cameras", "render"]
