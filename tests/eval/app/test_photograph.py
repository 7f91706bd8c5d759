"""A photograph of the app: any kind is opened, clicks become landmarks, the portrait keeps image and camera together."""

import json

import numpy as np
import pytest
from faces_2d import noisy_landmarks, random_face
from paths import ROOT
from PIL import Image

from eval.app.photograph import CLICKS, MAX_SIDE, OPTIONAL, Photograph

ASTRONAUT = np.array(json.loads((ROOT / "training/recipe/astronaut.json").read_text())["landmarks"])


@pytest.fixture
def photograph(tmp_path) -> Photograph:
    Image.new("RGB", (512, 512), "gray").save(tmp_path / "gray.png")
    return Photograph(tmp_path / "gray.png")


def halves(mode: str) -> Image.Image:
    """40 x 20 pixels, dark on the left and bright on the right."""
    values = np.repeat(np.linspace(0, 1, 2)[None], 20, 0).repeat(20, 1)
    if mode == "I;16":
        return Image.fromarray((values * 65535).astype(np.uint16))
    return Image.fromarray((values * 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "name"), [("L", "a.png"), ("I;16", "a.png"), ("P", "a.gif"), ("CMYK", "a.jpg"), ("RGBA", "a.webp")]
)
def test_any_kind_of_image_is_opened(mode, name, tmp_path):
    halves(mode).save(tmp_path / name)
    image = Photograph(tmp_path / name).image
    assert image.size == (40, 20) and image.mode in ("RGB", "RGBA")
    left, right = (image.convert("L").getpixel((x, 10)) for x in (5, 35))
    assert left < 30 and right > 225


def test_it_is_turned_upright_and_made_small(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: the left of the file is the upper edge
    halves("RGB").resize((4000, 2000)).save(tmp_path / "turned.jpg", exif=exif)
    image = Photograph(tmp_path / "turned.jpg").image
    assert image.size == (MAX_SIDE // 2, MAX_SIDE)
    assert image.getpixel((200, 100))[0] < 30 and image.getpixel((200, 900))[0] > 225


def test_clicks_are_asked_for_in_turn_can_be_undone_and_then_move_the_nearest(photograph):
    order = [*CLICKS.values()]
    for index in order:
        assert photograph.asked[0] == index
        photograph.click(*ASTRONAUT[index])
    assert photograph.confidences.nonzero()[0].tolist() == sorted(order)
    np.testing.assert_array_equal(photograph.points[order], ASTRONAUT[order])
    photograph.undo()
    assert photograph.asked == order[-1:] and not photograph.confidences[order[-1]]
    photograph.click(1, 2)
    photograph.click(*(ASTRONAUT[36] + (2, -1)))
    assert photograph.points[36].tolist() == (ASTRONAUT[36] + (2, -1)).tolist()
    assert photograph.points[order[-1]].tolist() == [1, 2]


def test_the_head_is_fitted_as_soon_as_the_clicks_are_enough(photograph, bench_head):
    for count, index in enumerate(CLICKS.values(), 1):
        photograph.click(*ASTRONAUT[index])
        photograph.fit(bench_head)
        assert (photograph.found is not None) == (count >= len(CLICKS) - OPTIONAL)
    assert photograph.found.rms < 6 and photograph.found.warnings == ()


@pytest.mark.parametrize("rows", [slice(0, 68), slice(17, 68)])
def test_landmarks_of_a_file_are_in_its_own_pixels(rows, bench_head, tmp_path):
    Image.new("RGB", (2048, 2048)).save(tmp_path / "large.png")
    photograph = Photograph(tmp_path / "large.png")
    photograph.use(4 * ASTRONAUT[rows], None, bench_head)
    photograph.fit(bench_head)
    assert photograph.asked == [] and photograph.found.rms < 12
    np.testing.assert_allclose(photograph.points[rows], 2 * ASTRONAUT[rows])
    with pytest.raises(ValueError, match="outside the image of 2048x2048"):
        photograph.use(40 * ASTRONAUT, None, bench_head)
    assert photograph.confidences.any(), "those before are kept"


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_portrait_is_framed_and_its_camera_sees_the_same(mode, bench_head, tmp_path):
    """A dot in the photograph where the nose is projected is in the portrait where its camera projects the nose."""
    face = random_face(bench_head, 3, 1.0, 15)
    marks = noisy_landmarks(bench_head, face, 3, noise=0) * 0.5 - 60  # in the corner of 512 pixels
    Image.new(mode, (512, 512), "gray").save(tmp_path / "gray.png")
    photograph = Photograph(tmp_path / "gray.png")
    photograph.use(marks, None, bench_head)
    photograph.fit(bench_head)
    x, y = photograph.found.landmarks[30].tolist()
    photograph.image.paste("red", (round(x) - 3, round(y) - 3, round(x) + 3, round(y) + 3))
    image, params, camera = photograph.portrait(bench_head)
    assert image.mode == mode and image.size == (camera.width, camera.height) and image.width == image.height
    nose = bench_head.landmarks(bench_head.pose(params).vertices[0])[30]
    seen = camera.Ks[0] @ (camera.viewmats[0, :3, :3] @ nose + camera.viewmats[0, :3, 3])
    x, y = (seen[:2] / seen[2]).round().int().tolist()
    assert image.getpixel((x, y))[:3] == (255, 0, 0)
    outside = image.getpixel((0, 0))
    assert outside[:3] == (255, 255, 255) and outside[3:] in ((), (0,)), "white, or transparent, beyond the photograph"
    skull = bench_head.canonical_vertices(params)[~bench_head.regions["neck"]]
    height = float(np.ptp(skull[:, 1].numpy()) * camera.Ks[0, 1, 1] / seen[2])
    assert height / image.height == pytest.approx(2 / 3, rel=0.1)


def test_a_failed_fit_leaves_no_head_of_the_one_before(photograph, bench_head):
    for index in CLICKS.values():
        photograph.click(*ASTRONAUT[index])
    photograph.fit(bench_head)
    photograph.points[:] = 100.0
    with pytest.raises(ValueError, match="on a point or a line"):
        photograph.fit(bench_head)
    assert photograph.found is None
