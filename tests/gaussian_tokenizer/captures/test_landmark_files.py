"""Landmarks from files and from MediaPipe's mesh."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gaussian_tokenizer.captures.landmark_files import MESH_68, detect_landmarks, from_mediapipe, read_landmarks

POINTS = np.random.default_rng(0).uniform(0, 500, (68, 2)).round(2)


def written(folder, content):
    path = folder / "points.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_form_gives_the_same_points(tmp_path):
    weights = np.linspace(0, 1, 68).round(3)
    with_weights = np.column_stack((POINTS, weights)).tolist()
    for content, confidences in (
        (POINTS.tolist(), None),
        ({"landmarks": POINTS.tolist()}, None),
        ({"landmarks": [{"x": x, "y": y} for x, y in POINTS.tolist()]}, None),
        ({"landmarks": with_weights}, weights),
        (with_weights, weights),
        ({"landmarks": POINTS.tolist(), "confidences": weights.tolist(), "image": "a.png"}, weights),
    ):
        found, found_weights = read_landmarks(written(tmp_path, content))
        np.testing.assert_array_equal(found, POINTS)
        assert (found_weights is None) if confidences is None else np.array_equal(found_weights, confidences)
    np.savez(tmp_path / "points.npz", landmarks=POINTS.astype(np.float32), confidences=weights)
    found, found_weights = read_landmarks(tmp_path / "points.npz")
    np.testing.assert_allclose(found, POINTS, rtol=1e-6)
    np.testing.assert_array_equal(found_weights, weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ({"points": [[1, 2]]}, "has points; expected"),
        ({"landmarks": [1, 2, 3]}, r"landmarks are \(3,\)"),
        ({"landmarks": [[1, 2], [3]]}, "no list of points"),
        ({"landmarks": [{"x": 1}]}, "no list of points"),
        ({"landmarks": "none"}, "no list of points"),
        ({"landmarks": [[10**400, 1]]}, "no list of points"),
        ({"landmarks": None}, r"landmarks are \(\)"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"points\.json: .*{message}"):
        read_landmarks(written(tmp_path, content))


def test_pickles_and_missing_files_are_refused(tmp_path):
    np.savez(tmp_path / "points.npz", landmarks=np.array([{}], object))
    with pytest.raises(ValueError, match=r"points\.npz: .*pickled objects"):
        read_landmarks(tmp_path / "points.npz")
    with pytest.raises(FileNotFoundError, match=r"expected .*68 or 51 points in pixels"):
        read_landmarks(tmp_path / "none.json")


def test_mediapipes_mesh_becomes_pixels_of_a_wide_image():
    mesh = np.random.default_rng(0).random((478, 2))
    found = from_mediapipe(mesh, height=100, width=300)
    np.testing.assert_array_equal(found[30], mesh[4] * (300, 100))  # the tip of the nose
    assert found.shape == (68, 2) and len(set(MESH_68)) == 68


def test_without_mediapipe_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(ImportError, match=r"pip install .mediapipe"):
        detect_landmarks(Image.new("RGB", (8, 8)), tmp_path / "face_landmarker.task")


def test_faces_that_mediapipe_finds_are_given_and_its_failures_named(tmp_path, monkeypatch):
    """A stand-in for the package: its network is not to be had here."""
    mesh = [SimpleNamespace(x=0.001 * i, y=0.5) for i in range(478)]
    faces: list = [mesh]

    class FaceLandmarker:
        @staticmethod
        def create_from_options(options):
            if b"network" not in Path(options.base_options.model_asset_path).read_bytes():
                raise RuntimeError("no network\nmore")
            return FaceLandmarker()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def detect(self, image):
            assert image.shape == (20, 40, 3)
            return SimpleNamespace(face_landmarks=faces)

    vision = SimpleNamespace(FaceLandmarker=FaceLandmarker, FaceLandmarkerOptions=SimpleNamespace)
    tasks = ModuleType("mediapipe.tasks.python")
    tasks.BaseOptions, tasks.vision = SimpleNamespace, vision
    package = ModuleType("mediapipe")
    package.Image, package.ImageFormat = lambda kind, pixels: pixels, SimpleNamespace(SRGB=1)
    for name, module in (("mediapipe", package), ("mediapipe.tasks", ModuleType("tasks")), (tasks.__name__, tasks)):
        monkeypatch.setitem(sys.modules, name, module)
    task, image = tmp_path / "face_landmarker.task", Image.new("L", (40, 20))
    with pytest.raises(FileNotFoundError, match=r"expected MediaPipe's face_landmarker\.task"):
        detect_landmarks(image, task)
    task.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"rejected by mediapipe \(no network\)"):
        detect_landmarks(image, task)
    task.write_bytes(b"network")
    np.testing.assert_allclose(detect_landmarks(image, task)[30], (0.004 * 40, 10))
    faces.clear()
    with pytest.raises(ValueError, match="finds no face"):
        detect_landmarks(image, task)
