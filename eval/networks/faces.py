"""Networks that read faces: landmarks, rotation and expression by MediaPipe, identity by ArcFace; NaN where there is no face."""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.networks.weights import Missing, check_images, find_weights, provenance, wrong_file
from gaussian_tokenizer.captures.landmark_files import MESH_68, from_mediapipe

Array = NDArray[np.float64]

LANDMARK_FLAG, LANDMARK_FILE = "--landmark_weights", "face_landmarker.task"
LANDMARK_EXPECTED = f"MediaPipe's {LANDMARK_FILE}"
LANDMARK_MEMBERS = (
    "face_detector.tflite",
    "face_landmarks_detector.tflite",
    "face_blendshapes.tflite",
    "geometry_pipeline_metadata_landmarks.binarypb",
)
EXPRESSIONS = 52

# Where ArcFace expects eyes, nose and mouth corners in its 112 x 112 crop (x, y); in InsightFace pixel centers are integers.
ARCFACE_SIZE, ARCFACE_FILE = 112, "w600k_r50.onnx"
ARCFACE_FIVE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
ARCFACE_TEMPLATE = ARCFACE_FIVE + 0.5


@dataclass(frozen=True)
class FaceReading:
    """The faces of N images; NaN in every row whose image shows none."""

    landmarks: Array  # (N, 68, 2) pixels x, y; centers of pixels are at + 0.5
    rotations: Array  # (N, 3, 3) head to camera
    expressions: Array  # (N, 52) blendshape weights, 0 to 1


def open_face(weights: str | None) -> "FaceLandmarks | Missing":
    """MediaPipe's FaceLandmarker."""
    packages = {"mediapipe": "mediapipe"}
    found = find_weights("FaceLandmarker, mediapipe", packages, weights, LANDMARK_FLAG, LANDMARK_FILE)
    return found if isinstance(found, Missing) else FaceLandmarks(found)


class FaceLandmarks:
    """Landmarks, rotation and expression of the most prominent face of each image."""

    def __init__(self, weights: Path):
        from mediapipe.tasks.python import BaseOptions, vision

        check_task_file(weights)
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(weights)),
            num_faces=1,
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
        )
        try:
            self.landmarker = vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError, OSError) as error:
            problem = f"rejected by mediapipe ({str(error).splitlines()[0]})"
            raise wrong_file(LANDMARK_FLAG, weights, problem, LANDMARK_EXPECTED) from None
        self.about = provenance("FaceLandmarker, 68 of 478 points", "mediapipe", weights)

    def __call__(self, images: np.ndarray) -> FaceReading:
        """Faces of images (N, H, W, 3) uint8, each image by itself: no tracking from one to the next."""
        import mediapipe

        check_images(images)
        wrapped = (mediapipe.Image(mediapipe.ImageFormat.SRGB, np.ascontiguousarray(image)) for image in images)
        return reading_of([self.landmarker.detect(image) for image in wrapped], *images.shape[1:3])


def reading_of(results: list, height: int, width: int) -> FaceReading:
    """FaceLandmarker's results for N images of one size, as arrays."""
    landmarks = np.full((len(results), len(MESH_68), 2), np.nan)
    rotations = np.full((len(results), 3, 3), np.nan)
    expressions = np.full((len(results), EXPRESSIONS), np.nan)
    for row, result in enumerate(results):
        if not (result.face_landmarks and result.facial_transformation_matrixes and result.face_blendshapes):
            continue
        mesh = np.array([(point.x, point.y) for point in result.face_landmarks[0]])
        landmarks[row] = from_mediapipe(mesh, height, width)
        rotations[row] = nearest_rotation(np.asarray(result.facial_transformation_matrixes[0])[:3, :3])
        expressions[row] = [shape.score for shape in result.face_blendshapes[0]]
    return FaceReading(landmarks, rotations, expressions)


def nearest_rotation(matrix: np.ndarray) -> Array:
    """The rotation nearest to a (3, 3) matrix, which may have a scale: U Vᵀ of its singular value decomposition."""
    left, _, right = np.linalg.svd(np.asarray(matrix, np.float64))
    return left @ np.diag([1, 1, np.sign(np.linalg.det(left @ right))]) @ right


def check_task_file(weights: Path) -> None:
    """ValueError for a file that is not MediaPipe's archive of networks: its own errors name graph nodes, not the file."""
    try:
        with zipfile.ZipFile(weights) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise wrong_file(LANDMARK_FLAG, weights, "not an archive of networks", LANDMARK_EXPECTED) from None
    lacking = [name for name in LANDMARK_MEMBERS if name not in names]
    if lacking:
        some = ", ".join([*names[:3], "..."][: len(names)]) or "nothing"
        raise wrong_file(LANDMARK_FLAG, weights, f"holds {some}, but not {lacking[0]}", LANDMARK_EXPECTED)


def open_arcface(weights: str | None, landmark_weights: str | None, device: str) -> "ArcFace | Missing":
    """An ArcFace network; `Missing` without the landmarks that its crops are aligned with."""
    # Since 1.29, onnxruntime sends telemetry unless this is set before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    name = "ArcFace, onnxruntime"
    found = find_weights(name, {"onnxruntime": "onnxruntime"}, weights, "--arcface_weights", ARCFACE_FILE)
    # Opened even without landmarks, because a wrong file is an error first.
    arcface = found if isinstance(found, Missing) else ArcFace(found, device)
    lacks = [part for part in (arcface, open_face(landmark_weights)) if isinstance(part, Missing)]
    if not lacks:
        return arcface
    reason = "; ".join(f"{lack.network.split(',')[0]}: {lack.reason}" for lack in lacks)
    return Missing(name, reason, "; ".join(lack.remedy for lack in lacks))


class ArcFace:
    """Identity features (Deng et al. 2019) of aligned faces, compared by their cosine: CSIM.

    Input pixels are (value - 127.5) / 127.5 in RGB, as in InsightFace's ONNX networks exported from PyTorch.
    """

    def __init__(self, weights: Path, device: str):
        import onnxruntime

        expected = f"an ArcFace network (..., 3, {ARCFACE_SIZE}, {ARCFACE_SIZE}) -> (..., 512), as {ARCFACE_FILE}"
        cuda = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        try:
            self.session = onnxruntime.InferenceSession(str(weights), providers=[*cuda, "CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base class
            problem = f"not an ONNX network ({str(error).splitlines()[0][:200]})"
            raise wrong_file("--arcface_weights", weights, problem, expected) from None
        inputs = [value.shape for value in self.session.get_inputs()]
        outputs = [value.shape for value in self.session.get_outputs()]
        if [shape[1:] for shape in inputs] != [[3, ARCFACE_SIZE, ARCFACE_SIZE]] or [s[-1] for s in outputs] != [512]:
            raise wrong_file("--arcface_weights", weights, f"maps {inputs} to {outputs}", expected)
        self.input = self.session.get_inputs()[0].name
        self.about = provenance("ArcFace, five-point alignment", "onnxruntime", weights)

    def __call__(self, images: np.ndarray, landmarks: np.ndarray) -> Array:
        """(N, 512) features of images (N, H, W, 3) uint8 with landmarks (N, 68, 2); NaN where the landmarks are NaN."""
        features = np.full((len(images), 512), np.nan)
        for row, (image, points) in enumerate(zip(images, five_points(landmarks))):
            if np.isfinite(points).all():
                pixels = aligned_face(image, points).astype(np.float32).transpose(2, 0, 1)[None]
                features[row] = self.session.run(None, {self.input: (pixels - 127.5) / 127.5})[0].reshape(512)
        return features


def five_points(landmarks: np.ndarray) -> Array:
    """(N, 68, 2) iBUG points -> (N, 5, 2): left and right eye in the image, tip of the nose, mouth corners."""
    points = np.asarray(landmarks, np.float64)
    eyes = [points[:, 36:42].mean(1), points[:, 42:48].mean(1)]
    return np.stack([*eyes, points[:, 30], points[:, 48], points[:, 54]], axis=1)


def aligned_face(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(112, 112, 3) uint8 crop in which the five points (5, 2) of an image (H, W, 3) uint8 lie nearest to ArcFace's template.

    Bilinear, black outside the image.
    """
    rotation, shift = similarity(ARCFACE_TEMPLATE, points)  # from the crop back to the image, as PIL samples
    coefficients = np.concatenate((rotation, shift[:, None]), axis=1).ravel()
    options = ((ARCFACE_SIZE, ARCFACE_SIZE), Image.Transform.AFFINE, tuple(coefficients), Image.Resampling.BILINEAR)
    # In float: PIL truncates 8-bit results, which is half a gray level too dark on average.
    channels = [Image.fromarray(plane).transform(*options) for plane in image.astype(np.float32).transpose(2, 0, 1)]
    return np.rint(np.stack([np.asarray(channel) for channel in channels], -1)).astype(np.uint8)


def similarity(source: np.ndarray, target: np.ndarray) -> tuple[Array, Array]:
    """The scaled rotation A (2, 2) and shift t (2,) that minimize |A source + t - target|² for points (K, 2).

    As complex numbers, the centered points have one unknown: the slope of the regression line.
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    slope = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean()).real
    matrix = np.array([[slope.real, -slope.imag], [slope.imag, slope.real]])
    return matrix, target.mean(0) - matrix @ source.mean(0)
