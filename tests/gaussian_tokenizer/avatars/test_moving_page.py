"""A page with a moving avatar: what is in it, and what a real Chromium shows of it, opened as a file."""

import base64
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.avatars import moving_page
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.avatars.motions import synthetic_motion
from gaussian_tokenizer.avatars.moving_page import STEPS, PageCamera, save_page
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.image_metrics import psnr
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.synthetic.subject import synthesize_subject

WIDTH, HEIGHT = 300, 320  # of the window
CAMERA = PageCamera((0.0, 0.01, 0.02), 0.45, 1.0, 25.0)
ALIKE = 50.0  # dB; the page rounds to 8 bits after every Gaussian
TITLE = "</script><img src=x onerror=alert(1)> & 'Ada'"


@pytest.fixture(scope="module")
def gaussians() -> Gaussians:
    """8 frames of a head of 800 Gaussians whose scales change and whose colors depend on the view."""
    head = build_procedural_head(600)
    avatar = synthesize_subject(head, (0, 5), num_points=800).avatar
    posed = avatar.posed(synthetic_motion("look_around", head, 8), "face_frames")
    rest = torch.randn(len(posed), 15, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    posed.scales[:, ::4] *= 0.05  # smaller than a pixel, and
    posed.positions[:, ::4] *= 1.4  # outside of the head
    return replace(posed, sh=torch.cat((posed.sh, rest), 1))


@dataclass
class Opened:
    """The page in a window of a browser."""

    page: Any
    complaints: list[str]

    def image(self) -> torch.Tensor:
        """The canvas, (H, W, 3) in 0..1."""
        self.page.wait_for_timeout(300)
        content = self.page.locator("canvas").screenshot()
        return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))) / 255

    def seek(self, frame: int) -> None:
        self.page.locator("input").fill(str(frame))

    def label(self) -> str:
        return self.page.locator("output").text_content()


@pytest.fixture(scope="module")
def opened(browser, gaussians, tmp_path_factory) -> Iterator[Opened]:
    path = tmp_path_factory.mktemp("page") / "look.html"
    save_page(path, gaussians, CAMERA, TITLE)
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=2, has_touch=True)
    opened = Opened(context.new_page(), [])
    opened.page.on("console", lambda message: opened.complaints.append(message.text))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.on("request", lambda request: opened.complaints.append(request.url))
    opened.page.goto(path.as_uri())
    opened.page.locator("output", has_text="/").wait_for()
    assert opened.complaints == [path.as_uri()]
    opened.complaints.clear()
    yield opened
    context.close()


@pytest.fixture
def paused(opened) -> Opened:
    """At the first frame, seen from the first camera."""
    opened.seek(0)
    opened.page.locator("canvas").dblclick()
    return opened


def expected(gaussians: Gaussians, frame: int, like: torch.Tensor, azimuth=25.0, elevation=0.0, zoom=1.0):
    height, width = like.shape[:2]
    focal = zoom * min(width, height) / CAMERA.extent
    camera = Cameras.orbit(CAMERA.target, 1.0, [azimuth], elevation, focal, width, height)
    return render(gaussians.frames(frame), camera, background=1.0).image[0].clamp(0, 1)


def decibels(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(psnr(found[None], wanted[None]))


def test_a_page_draws_the_selected_frame_as_the_renderer_does(paused, gaussians):
    for frame in (0, 3, 7):
        paused.seek(frame)
        image = paused.image()
        assert paused.label() == f"{frame + 1} / 8"
        assert decibels(image, expected(gaussians, frame, image)) > ALIKE
        assert decibels(image, expected(gaussians, (frame + 1) % 8, image)) < ALIKE - 10
    assert paused.complaints == []


def test_mouse_and_wheel_orbit_and_zoom(paused, gaussians):
    paused.page.mouse.move(100, 100)
    paused.page.mouse.down()
    paused.page.mouse.move(150, 140, steps=5)
    paused.page.mouse.up()
    image = paused.image()
    assert decibels(image, expected(gaussians, 0, image, 5.0, 16.0)) > ALIKE
    paused.page.mouse.wheel(0, -200)
    image, zoom = paused.image(), paused.page.evaluate("view.zoom")  # how far one turn goes depends on the screen
    assert 1.1 < zoom < 2
    assert decibels(image, expected(gaussians, 0, image, 5.0, 16.0, zoom)) > ALIKE
    paused.page.locator("canvas").dblclick()
    image = paused.image()
    assert decibels(image, expected(gaussians, 0, image)) > ALIKE


def test_one_finger_orbits_and_two_zoom(paused, gaussians):
    touch = paused.page.context.new_cdp_session(paused.page)

    def fingers(kind: str, *places: tuple[int, int]) -> None:
        points = [{"x": x, "y": y, "id": index} for index, (x, y) in enumerate(places)]
        touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})

    for kind, place in (("Start", (100, 100)), ("Move", (130, 100)), ("Move", (200, 50))):
        fingers(kind, place)
    fingers("End")
    image = paused.image()
    assert decibels(image, expected(gaussians, 0, image, -15.0, -20.0)) > ALIKE
    fingers("Start", (100, 100), (150, 100))
    fingers("Move", (100, 100), (160, 100))
    fingers("End")
    image = paused.image()
    assert decibels(image, expected(gaussians, 0, image, -15.0, -20.0, 1.2)) > ALIKE


def test_the_button_plays_and_pauses(paused):
    button = paused.page.locator("button")
    assert button.text_content() == "Play"
    button.click()
    paused.page.locator("output", has_not_text="1 / 8").wait_for()
    assert button.text_content() == "Pause"
    button.click()
    paused.page.wait_for_timeout(200)
    before = paused.label()
    paused.page.wait_for_timeout(300)
    assert paused.label() == before


def test_names_are_text(paused):
    assert paused.page.title() == TITLE
    assert paused.page.locator("small").text_content() == f"{TITLE} · {len_of(paused)} Gaussians"
    assert paused.page.locator("img").count() == 0


def len_of(opened: Opened) -> str:
    return f"{opened.page.evaluate('set.count'):,}"


def test_a_page_holds_the_frames_to_half_a_step(gaussians, tmp_path):
    path = tmp_path / "look.html"
    size = save_page(path, (gaussians.frames(index) for index in range(8)), CAMERA, "Ada")
    assert path.stat().st_size == size
    found = read_back(path)
    wanted = {
        "positions": gaussians.positions,
        "quats": gaussians.quats / gaussians.quats.norm(dim=-1, keepdim=True),
        "scales": gaussians.scales.log(),
        "opacities": gaussians.opacities[None, :, None],
        "sh": gaussians.sh.flatten(1)[None],
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(found[name] - value.numpy()).max() <= STEPS[name] / 2 + 1e-6


def test_what_does_not_move_is_held_once(gaussians, tmp_path):
    still = gaussians.frames(0)
    save_page(tmp_path / "still.html", [still, still, still], CAMERA, "Ada")
    assert {name: len(array) for name, array in read_back(tmp_path / "still.html").items()} == dict.fromkeys(STEPS, 1)


def read_back(path: Path) -> dict[str, np.ndarray]:
    """Attributes (T, N, width) by name."""
    text = path.read_text()
    settings = json.loads(re.search(r"const set = (\{.*?\}), arrays", text)[1])
    content = zlib.decompress(base64.b64decode(re.search(r'id="data">(.*?)</script>', text)[1]))
    arrays, start = {}, 0
    for name, frames, width, step in settings["arrays"]:
        size = frames * width * settings["count"]
        planes = np.frombuffer(content, np.uint8, 4 * size, start).reshape(4, size).astype(np.int64)
        coded = sum(planes[k] << 8 * k for k in range(4)).reshape(frames, width, settings["count"])
        changes = np.where(coded % 2 == 1, -(coded + 1) // 2, coded // 2)
        arrays[name] = (changes.cumsum(0) * step).transpose(0, 2, 1)
        start += 4 * size
    assert start == len(content)
    return arrays


def test_what_cannot_be_a_page_is_refused_and_leaves_no_file(gaussians, tmp_path, monkeypatch):
    wrong = replace(gaussians, positions=gaussians.positions.clone())
    wrong.positions[2, 5, 1] = torch.nan
    for given, fps, line in (
        ([], 25, "no frames to write"),
        (wrong, 25, "positions of Gaussian 5"),
        (gaussians, 0, "0 frames per"),
    ):
        with pytest.raises(ValueError, match=line):
            save_page(tmp_path / "a.html", given, CAMERA, "Ada", fps=fps)
    monkeypatch.setattr(moving_page, "MAX_BYTES", 8 * len(gaussians) * 40 - 1)
    with pytest.raises(ValueError, match="give fewer frames or Gaussians"):
        save_page(tmp_path / "a.html", gaussians, CAMERA, "Ada")
    assert list(tmp_path.iterdir()) == []


def test_a_phone_shows_all_of_the_page(gaussians, tmp_path, width_on_a_phone):
    save_page(tmp_path / "a.html", gaussians, CAMERA, "a" * 200)
    assert width_on_a_phone(tmp_path / "a.html") == 390
