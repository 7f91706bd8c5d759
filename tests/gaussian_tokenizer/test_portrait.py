"""`pointillist fit-portrait`: a folder that trackings are read from, whatever kind of image is given; errors in one line."""

import json
import sys

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from gaussian_tokenizer import portrait
from gaussian_tokenizer.captures.loading import load_tracking
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

MARKS = ROOT / "training/recipe/astronaut.json"
POINTS = np.array(json.loads(MARKS.read_text())["landmarks"]) - (100, 20)
WIDTH, HEIGHT = 200, 260


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in a folder with the landmarks; its output, or the line of its error."""
    (tmp_path / "points.json").write_text(json.dumps(POINTS.tolist()))
    monkeypatch.chdir(tmp_path)

    def run(image, *words: str) -> tuple[str, str]:
        line = [str(image), "--head", "procedural:600", "--output_dir", "fit", *words]
        monkeypatch.setattr(sys, "argv", ["fit-portrait", *line])
        try:
            portrait.main()
        except SystemExit as stop:
            assert stop.code == 1
            (error,) = capsys.readouterr().err.strip().splitlines()
            assert error.startswith("error: ")
            return "", error
        return capsys.readouterr()

    return run


def gradient() -> np.ndarray:
    return np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, WIDTH))


def test_the_folder_is_a_tracking_with_the_camera_and_the_head(command, tmp_path):
    Image.fromarray(gradient()).convert("RGB").save("photo.jpg")
    printed, noted = command("photo.jpg", "--landmarks", "points.json")
    assert "68 landmarks within" in printed and noted == ""
    tracking = load_tracking(tmp_path / "fit", build_procedural_head(600))
    (frame,) = tracking.frames
    assert (frame.width, frame.height, frame.cx, frame.cy) == (WIDTH, HEIGHT, 100, 130)
    report = json.loads((tmp_path / "fit/fit.json").read_text())
    assert report["warnings"] == [] and len(report["residuals_pixels"]) == 68
    assert np.sqrt(np.square(report["residuals_pixels"]).mean()) == pytest.approx(report["rms_pixels"], abs=1e-3)
    head = build_procedural_head(600)
    marks = head.landmarks(head.pose(tracking.params).vertices[0]).double().numpy()
    seen = (marks @ frame.viewmat[:3, :3].T + frame.viewmat[:3, 3]) @ frame.K.T
    inner = np.linalg.norm(seen[17:, :2] / seen[17:, 2:] - POINTS[17:], axis=1)
    np.testing.assert_allclose(inner, report["residuals_pixels"][17:], atol=0.01)
    drawn = Image.open("fit/fit.png")
    assert drawn.mode == "RGB" and drawn.width > drawn.height
    printed, _ = command("photo.jpg", "--landmarks", "points.json", "--focal", "900")  # once more, over the first
    assert "focal length 900" in printed


def test_images_of_every_kind_are_read_upright_and_in_full_range(command, tmp_path):
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, 100:] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    cases = {
        "gray.png": (Image.fromarray(gradient()), {}),
        "sixteen.png": (Image.fromarray(gradient().astype(np.uint16) * 257), {}),
        "alpha.png": (Image.merge("LA", (Image.fromarray(gradient()), Image.fromarray(alpha))), {}),
        "turned.jpg": (Image.fromarray(np.rot90(gradient())), {"exif": turned, "quality": 95}),
    }
    for name, (image, options) in cases.items():
        image.save(name, **options)
        printed, _ = command(name, "--landmarks", "points.json")
        assert "68 landmarks" in printed, name
        found = Image.open(tmp_path / "fit/images/00000_00.png")
        assert found.size == (WIDTH, HEIGHT) and found.mode == ("RGBA" if name == "alpha.png" else "RGB"), name
        pixels = np.asarray(found)
        assert np.abs(pixels[..., 0].astype(int) - gradient())[4:-4, 4:-4].max() <= 4, name
        if name == "alpha.png":
            np.testing.assert_array_equal(pixels[..., 3], alpha)


def test_warnings_go_to_the_other_stream(command):
    Image.fromarray(gradient()).save("photo.png")
    _, noted = command("photo.png", "--landmarks", write_small())
    assert noted.startswith("warning: the face is 20 pixels large") and noted.count("\n") == 1


def write_small() -> str:
    small = (POINTS - POINTS.mean(0)) * 20 / 92 + 100
    with open("small.json", "w") as file:
        json.dump(small.tolist(), file)
    return "small.json"


def test_what_is_wrong_is_said_in_one_line(command, tmp_path):
    Image.fromarray(gradient()).save("photo.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "few.json").write_text(json.dumps(POINTS[:5].tolist()))
    for words, message in (
        (("photo.png",), "give either --landmarks"),
        (("none.png", "--landmarks", "points.json"), "none.png does not exist"),
        (("broken.png", "--landmarks", "points.json"), "broken.png is not a readable image"),
        (("photo.png", "--landmarks", "none.json"), "none.json: no such file of landmarks"),
        (("photo.png", "--landmarks", "few.json"), "landmarks are (5, 2), expected (68, 2)"),
        (("photo.png", "--landmarks", "points.json", "--landmark_embedding", "none.npy"), "none.npy: no such"),
        (("photo.png", "--landmarks", "points.json", "--focal", "-1"), "focal is -1"),
    ):
        _, error = command(*words)
        assert message in error, words
    assert not (tmp_path / "fit").exists()
