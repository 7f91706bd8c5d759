"""2D landmarks of a face from a file, or from MediaPipe, which finds them in a photograph."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gaussian_tokenizer.utils.npz import read_npz

# Of the 478 vertices of MediaPipe's mesh, those nearest to the 68 iBUG points, in iBUG's order: from the left of the image to
# the right.
MESH_68 = (
    127, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 356,  # jaw
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,  # brows
    168, 197, 5, 4, 98, 97, 2, 326, 327,  # nose
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # eyes
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,  # lips, outside
    78, 82, 13, 312, 308, 317, 14, 87,  # lips, inside
)  # fmt: skip
EXPECTED = '{"landmarks": [[x, y], ...]} with 68 or 51 points in pixels, or an npz with an array "landmarks"'


def read_landmarks(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Landmarks (K, 2) in pixels, and their confidences (K,) if the file has some.

    JSON: the points as a list, or as "landmarks" of an object; a point is [x, y], [x, y, confidence] or {"x": .., "y": ..}.
    NPZ: `landmarks`. Both may have `confidences` beside them. ValueError names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of landmarks; expected {EXPECTED}")
    content: Any = read_npz(path, ("landmarks", "confidences"))[0] if path.suffix == ".npz" else _json(path)
    confidences = None
    if isinstance(content, dict):
        if "landmarks" not in content:
            raise ValueError(f"{path}: has {', '.join(content) or 'nothing'}; expected {EXPECTED}")
        content, confidences = content["landmarks"], content.get("confidences")
    try:
        if isinstance(content, list) and all(isinstance(point, dict) for point in content):
            content = [(point["x"], point["y"]) for point in content]
        points = np.asarray(content, np.float64)
        confidences = None if confidences is None else np.asarray(confidences, np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}: its landmarks are no list of points; expected {EXPECTED}") from None
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ValueError(f"{path}: landmarks are {points.shape}; expected {EXPECTED}")
    if points.shape[1] == 3 and confidences is None:
        confidences = points[:, 2]
    return points[:, :2], confidences


def detect_landmarks(image: Image.Image, task_file: str | Path) -> np.ndarray:
    """(68, 2) pixels of the most prominent face, by MediaPipe's FaceLandmarker with the network in `face_landmarker.task`.

    Its points are of a 3D mesh: those of the jaw are on the jaw, not on the outline of a turned head.
    """
    try:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError:
        raise ImportError(
            'finding landmarks needs mediapipe: pip install "mediapipe>=0.10"; or give --landmarks'
        ) from None
    path = Path(task_file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected MediaPipe's face_landmarker.task")
    pixels = np.ascontiguousarray(image.convert("RGB"))
    options = vision.FaceLandmarkerOptions(base_options=BaseOptions(model_asset_path=str(path)), num_faces=1)
    try:
        with vision.FaceLandmarker.create_from_options(options) as landmarker:
            found = landmarker.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, pixels)).face_landmarks
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: rejected by mediapipe ({reason}); expected face_landmarker.task") from None
    if not found:
        raise ValueError("mediapipe finds no face in the image; give --landmarks")
    return from_mediapipe(np.array([(point.x, point.y) for point in found[0]]), *pixels.shape[:2])


def from_mediapipe(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """MediaPipe's 478 points (478, 2), fractions of the image -> iBUG's 68 (68, 2), pixels."""
    return points[list(MESH_68)] * (width, height)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}; expected {EXPECTED}") from None
