"""Where the head of a tracking is in its images: projection, silhouette, and the same in other camera conventions."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from gaussian_tokenizer.captures.frame import OPENGL_TO_OPENCV, Frame
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.heads.head_model import HeadModel

NEAR = 0.01  # meters; what is closer to the camera is not drawn
EXPECTED = "camera-to-world with OpenGL axes"
# What a transform_matrix may be instead of what is expected: matrix -> world-to-camera with OpenCV axes.
CONVENTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    EXPECTED: lambda matrix: np.linalg.inv(matrix @ OPENGL_TO_OPENCV),
    "camera-to-world with OpenCV axes": np.linalg.inv,
    "world-to-camera with OpenCV axes": lambda matrix: matrix,
    "world-to-camera with OpenGL axes": lambda matrix: OPENGL_TO_OPENCV @ matrix,
}


class Sample(NamedTuple):
    """One frame of a tracking and the posed head at its timestep."""

    frame_index: int
    frame: Frame
    vertices: np.ndarray  # (V, 3) float64 meters, world space


def sample_frames(tracking: Tracking, head: HeadModel, count: int) -> list[Sample]:
    """Up to `count` frames, evenly spread over cameras and timesteps."""
    frames = tracking.frames
    by_camera: dict[int, list[int]] = {}
    for index, frame in enumerate(frames):
        by_camera.setdefault(frame.camera, []).append(index)
    cameras = _spread(sorted(by_camera), count)
    each = -(-min(count, len(frames)) // len(cameras))  # frames of each camera
    chosen = []
    for number, camera in enumerate(cameras):
        own = by_camera[camera]
        # The first timestep is shifted from camera to camera, so that one image per camera shows several timesteps.
        start = number * len(own) // len(cameras) if each == 1 else 0
        chosen += [own[(start + step) % len(own)] for step in _spread(range(len(own)), each)]
    chosen = chosen[:count]
    vertices = {}
    for row in sorted({tracking.row(frames[index]) for index in chosen}):
        vertices[row] = head.pose(tracking.params.frame(row).to(head.device)).vertices[0].double().cpu().numpy()
    return [Sample(index, frames[index], vertices[tracking.row(frames[index])]) for index in chosen]


def as_if(frame: Frame, convention: str) -> np.ndarray:
    """The viewmat (4, 4) a frame would have, had its file been written in another convention."""
    matrix = np.linalg.inv(frame.viewmat) @ OPENGL_TO_OPENCV
    return CONVENTIONS[convention](matrix)


def project(vertices: np.ndarray, frame: Frame, viewmat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(V, 3) world -> pixels (V, 2), counted from the upper left corner, and depths (V,) meters; behind is below 0."""
    seen = vertices @ viewmat[:3, :3].T + viewmat[:3, 3]
    depth = seen[:, 2]
    focal, center = np.array([frame.fx, frame.fy]), np.array([frame.cx, frame.cy])
    return seen[:, :2] / np.where(np.abs(depth) < 1e-9, 1e-9, depth)[:, None] * focal + center, depth


def share_seen(vertices: np.ndarray, frame: Frame, viewmat: np.ndarray) -> float:
    """Share of the vertices in front of the camera and inside the image, 0..1."""
    pixels, depth = project(vertices, frame, viewmat)
    inside = (pixels >= 0).all(1) & (pixels < [frame.width, frame.height]).all(1)
    return float((inside & (depth > NEAR)).mean())


def silhouette(
    vertices: np.ndarray, faces: np.ndarray, frame: Frame, viewmat: np.ndarray, longest: int = 128
) -> np.ndarray:
    """(h, w) bool: where the mesh is in an image whose longer side is made `longest` pixels."""
    width, height, scale = size_within(frame, longest)
    pixels, depth = project(vertices, frame, viewmat)
    drawing = Image.new("L", (width, height))
    draw = ImageDraw.Draw(drawing)
    for corners in visible_triangles(pixels * scale, depth, faces, width, height)[1]:
        draw.polygon(corners, fill=255)
    return np.asarray(drawing) > 0


def visible_triangles(
    pixels: np.ndarray, depth: np.ndarray, faces: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, list[list[float]]]:
    """Indices of the faces in front of the camera that touch the image, and the corners of each for PIL."""
    corners = pixels[faces] - 0.5  # the middle of PIL's first pixel is at 0
    in_front = (depth[faces] > NEAR).all(1)
    touches = (corners.max(1) >= -1).all(1) & (corners.min(1) <= [width, height]).all(1)
    shown = np.flatnonzero(in_front & touches)
    return shown, corners[shown].reshape(-1, 6).tolist()


def size_within(frame: Frame, longest: int) -> tuple[int, int, np.ndarray]:
    """Width, height and scale (2,) of an image whose longer side is made `longest` pixels."""
    factor = longest / max(frame.width, frame.height)
    width, height = max(1, round(frame.width * factor)), max(1, round(frame.height * factor))
    return width, height, np.array([width / frame.width, height / frame.height])


def is_inside(point: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> bool:
    """Whether a point (3,) is inside a mesh, open at the neck or not: its winding number is above a half.

    Solid angles after van Oosterom and Strackee (1983).
    """
    a, b, c = (vertices[faces[:, corner]] - point for corner in range(3))
    la, lb, lc = (np.linalg.norm(each, axis=1) for each in (a, b, c))
    volume = np.einsum("ij,ij->i", a, np.cross(b, c))
    ab, bc, ca = (np.einsum("ij,ij->i", first, second) for first, second in ((a, b), (b, c), (c, a)))
    solid = 2 * np.arctan2(volume, la * lb * lc + ab * lc + bc * la + ca * lb)
    return bool(solid.sum() / (4 * np.pi) > 0.5)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the items, evenly spread, the first always among them."""
    count = min(count, len(items))
    return [items[step * len(items) // count] for step in range(count)]
