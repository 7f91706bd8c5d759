"""Conditions of the model as arrays: portraits to pixels, head meshes to normals. Travels with checkpoints."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .image_files import open_image
from .point_codec import as_array

IMAGE_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)  # of ImageNet, as in DINOv2's training
IMAGE_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def pixel_values(images: Any, size: int) -> np.ndarray:
    """One image or B of them -> (B, 3, S, S) float32, normalized.

    An image is a PIL image of any mode, an image file, or an array or tensor (H, W), (H, W, C) or (C, H, W). It is laid on
    the middle of a white square, neither cropped nor stretched.
    """
    is_stack = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    batch = list(images) if is_stack or isinstance(images, (list, tuple)) else [images]
    if not batch:
        raise ValueError("an empty list of images; expected at least one")
    pixels: np.ndarray = np.empty((len(batch), size, size, 3), dtype=np.float32)
    for index, image in enumerate(batch):
        try:
            rgb = _rgb_on_white(image)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise ValueError(f"image {index} cannot be read: {error}") from error
        scale = size / max(rgb.size)
        width, height = (max(1, round(side * scale)) for side in rgb.size)
        square = Image.new("RGB", (size, size), "white")
        resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(resized, ((size - width) // 2, (size - height) // 2))
        pixels[index] = np.asarray(square)
    pixels = (pixels / 255 - IMAGE_MEAN) / IMAGE_STD
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def portrait_rgba(image: Any, size: int) -> np.ndarray:
    """One image, as `pixel_values` takes it -> (4, H, W) float32 in 0..1 with its alpha, the longer side of `size` pixels."""
    whole = upright(image)
    scale = size / max(whole.size)
    width, height = (max(1, round(side * scale)) for side in whole.size)
    resized = whole.convert("RGBA").resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, np.float32).transpose(2, 0, 1)) / 255


def head_condition(head_vertices: Any, head_faces: Any, n_faces: int) -> dict[str, np.ndarray]:
    """Vertices (V, 3) or (B, V, 3) -> `head_vertices` (B, V, 3) float32 and, with faces (F, 3), `head_normals`."""
    if isinstance(head_vertices, (list, tuple)):
        head_vertices = np.stack([as_array(each, "head_vertices") for each in head_vertices])
    vertices = as_array(head_vertices, "head_vertices")
    vertices = vertices[None] if vertices.ndim == 2 else vertices
    if vertices.ndim != 3 or vertices.shape[2] != 3 or vertices.size == 0 or vertices.dtype.kind not in "fiu":
        raise ValueError(f"head_vertices are {vertices.dtype} {vertices.shape}; expected (V, 3) or (B, V, 3)")
    if not np.isfinite(vertices).all():
        raise ValueError("head_vertices hold NaN or Inf; expected meters")
    data = {"head_vertices": vertices.astype(np.float32)}
    if head_faces is not None:
        faces = as_array(head_faces, "head_faces")
        if faces.shape != (n_faces, 3) or faces.dtype.kind not in "iu":
            raise ValueError(f"head_faces are {faces.dtype} {faces.shape}; expected integers ({n_faces}, 3)")
        if faces.min() < 0 or faces.max() >= vertices.shape[1]:
            raise ValueError(f"head_faces name vertices {faces.min()} to {faces.max()} of {vertices.shape[1]}")
        data["head_normals"] = np.stack([vertex_normals(head, faces) for head in vertices]).astype(np.float32)
    return data


def face_condition(vertices: np.ndarray, faces: np.ndarray, bounds: np.ndarray, n_bins: int) -> dict[str, np.ndarray]:
    """Vertices (B, V, 3), faces (F, 3), bounds (2, 3) -> `face_centers`, `face_normals` (B, F, 3) float32.

    Centers are in bins: 0 and `n_bins` at the bounds. A face without an area has the normal 0.
    """
    corners = vertices.astype(np.float64)[:, faces]
    normals = np.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-20)
    centers = (corners.mean(axis=2) - bounds[0]) / (bounds[1] - bounds[0]) * n_bins
    return {"face_centers": centers.astype(np.float32), "face_normals": normals.astype(np.float32)}


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Vertices (V, 3), faces (F, 3) -> unit area-weighted normals (V, 3); zero where no face with an area touches."""
    corners = vertices.astype(np.float64)[faces]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    weights = np.repeat(face_normals, 3, axis=0)
    normals = np.stack([np.bincount(faces.ravel(), weights[:, axis], len(vertices)) for axis in range(3)], axis=1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)


def _rgb_on_white(image: Any) -> Image.Image:
    """PIL image, file, array or tensor -> PIL "RGB", upright, transparency composited on white."""
    image = upright(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright(image: Any) -> Image.Image:
    """PIL image, file, array or tensor -> PIL image of 8 bits a channel, turned as its EXIF says."""
    if isinstance(image, (str, os.PathLike)):
        image = open_image(image)
    if not isinstance(image, Image.Image):
        image = _image_from_array(as_array(image, "image"))
    image = ImageOps.exif_transpose(image)
    if 0 in image.size:
        raise ValueError(f"its size is {image.size}")
    if image.mode.startswith(("I", "F")):  # 16-bit files; PIL would clip instead of scaling
        values = np.asarray(image)
        image = _image_from_array(values if image.mode == "F" else values.clip(0, 65535).astype(np.uint16))
    return image


def _image_from_array(values: np.ndarray) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W), C = 1 to 4: uint8, uint16, bool, or floats in [0, 1]."""
    if values.ndim == 3 and values.shape[2] not in (1, 2, 3, 4) and values.shape[0] in (1, 2, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.size == 0 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (2, 3, 4))):
        raise ValueError(f"an array of shape {values.shape}; expected (H, W), (H, W, C) or (C, H, W), C from 1 to 4")
    if values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"float values from {values.min()} to {values.max()}; expected [0, 1], or uint8")
        values = values * 255
    elif values.dtype == np.uint16:
        values = values / 257
    elif values.dtype == np.bool_:
        values = values * 255.0
    elif values.dtype != np.uint8:
        raise ValueError(f"an array of {values.dtype}; expected uint8, uint16, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(np.rint(values).astype(np.uint8)))
