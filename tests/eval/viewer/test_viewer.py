"""The command line of the viewer, and the page as far as it goes without a browser."""

import io
import shutil
import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("viser", reason="the viewer needs viser: pip install 'avatar-pointillist[viewer]'")

from eval.viewer.__main__ import main
from eval.viewer.page import UNITS, Page, _screenshot, open_server
from gaussian_tokenizer.avatars.avatar import GaussianAvatar, open_avatar
from gaussian_tokenizer.avatars.motions import synthetic_motion
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.subject import synthesize_subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewer") / "ada"
    synthesize_subject(build_procedural_head(600), 1, num_points=80, placement="regular").avatar.save(folder)
    return folder


@pytest.fixture
def server():
    server = open_server("127.0.0.1", 0)
    yield server
    server.stop()


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def slider(page: Page, label: str):
    return next(handle for each, handle in page.sliders if each.label == label)


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "127.0.0.1" in capsys.readouterr().out


def test_a_folder_that_is_no_avatar_is_named(capsys, tmp_path):
    assert f"{tmp_path}: holds neither point_cloud.ply" in refusal(capsys, "--avatar", tmp_path, "--port", 0)


def test_an_avatar_of_another_head_model_is_refused(capsys, folder):
    said = refusal(capsys, "--avatar", folder, "--head", "procedural:800", "--port", 0)
    assert "procedural:600" in said and "procedural:800" in said


def test_the_built_in_head_needs_no_naming_and_others_do(capsys, folder, tmp_path):
    assert open_avatar(folder, None).head.n_faces == 600
    unknown = shutil.copytree(folder, tmp_path / "unknown")
    (unknown / "metadata.json").unlink()
    said = refusal(capsys, "--avatar", unknown, "--port", 0)
    assert "does not say which head model" in said and "--head" in said


def test_an_image_that_cannot_be_read_is_named(capsys, tmp_path):
    broken = tmp_path / "portrait.png"
    broken.write_bytes(b"not an image")
    assert f"{broken} is not a readable image" in refusal(capsys, "--model", tmp_path, "--image", broken, "--port", 0)


def test_a_model_without_a_portrait_is_refused(capsys, tmp_path):
    assert "--image" in refusal(capsys, "--model", tmp_path)


def test_a_port_in_use_is_one_clear_error(capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(capsys, "--avatar", folder, "--port", port)
    assert said.count("\n") == 1 and f"port {port}" in said and "--port" in said


def test_the_server_listens_only_at_the_requested_address(server):
    assert server.get_host() == "127.0.0.1"
    with pytest.raises(ValueError, match="cannot listen"):
        open_server("127.0.0.1", server.get_port())


def test_the_page_follows_its_controls(server, folder):
    avatar = open_avatar(folder, None)
    page = Page(server, {"ada": avatar}, {"nod": synthetic_motion("nod", avatar.head, 8)})
    page.render_as.value = "Gaussians"
    slider(page, "neck turn").value = 40.0
    page.draw()
    expected = avatar.posed(page.parameters())
    np.testing.assert_allclose(page.handles[0].centers / UNITS, expected.positions[0].numpy(), atol=1e-6)
    true_colors = page.handles[0].rgbs.copy()
    page.color.value = "face"
    page.draw()
    assert (page.handles[0].rgbs != true_colors).any()
    page.render_as.value = "points"
    page.draw()
    face_colors = page.handles[0].colors.copy()
    np.testing.assert_allclose(page.handles[0].points / UNITS, expected.positions[0].numpy(), atol=1e-6)
    page.color.value = "true color"
    slider(page, "neck turn").value = 0.0
    page.draw()
    assert (page.handles[0].points / UNITS != expected.positions[0].numpy()).any()
    assert (page.handles[0].colors != face_colors).any()


def test_the_timeline_poses_the_avatar_and_the_sliders_are_added(server, folder):
    avatar = open_avatar(folder, None)
    motion = synthetic_motion("nod", avatar.head, 8)
    page = Page(server, {"ada": avatar}, {"nod": motion})
    page.playback.motion.value = "nod"
    page.playback.play.value = False
    page.playback.timeline.value = 3
    slider(page, "jaw open").value = 10.0
    page.draw()
    frame = motion.frame(3)
    frame.jaw_pose[0, 0] += np.radians(10)
    expected = avatar.posed(frame).positions[0].numpy()
    np.testing.assert_allclose(page.handles[0].points / UNITS, expected, atol=1e-6)


@pytest.mark.parametrize("render_as", ["points", "Gaussians"])
def test_all_that_is_sent_to_the_browser_is_finite(server, folder, render_as):
    avatar = open_avatar(folder, None)
    page = Page(server, {"ada": avatar}, {"talk": synthetic_motion("talk", avatar.head, 4)})
    page.playback.motion.value = "talk"
    for color in page.shown[0].modes:
        for each in page.shown[0].posed(page.parameters(), color, render_as).values():
            assert each.size > 0 and np.isfinite(each).all()


def in_generation_order(avatar: GaussianAvatar) -> GaussianAvatar:
    order = avatar.canonical_points()["positions"][:, 1].argsort()
    return replace(avatar, **{name: value[order] for name, value in avatar.tensors().items()})


def test_generation_order_is_offered_for_generated_avatars(server, folder):
    fitted = open_avatar(folder, None)
    assert "generation order" not in Page(server, {"ada": fitted}, {}).color.options
    page = Page(server, {"ada": fitted, "eve": in_generation_order(fitted)}, {})
    assert "generation order" in page.color.options
    true_colors = [handle.colors.copy() for handle in page.handles]
    page.color.value = "generation order"
    page.draw()
    kept, painted = (handle.colors for handle in page.handles)
    assert (kept == true_colors[0]).all() and (painted != true_colors[1]).any()


def test_a_name_is_escaped_in_the_title(server, folder, monkeypatch):
    written = []
    monkeypatch.setattr(server.gui, "add_markdown", written.append)
    Page(server, {"<script>": open_avatar(folder, None)}, {})
    assert written[0].startswith("<title>&lt;script&gt;: avatar viewer</title>") and "<script>" not in written[0]


class Client:
    """A page whose camera can be set."""

    def __init__(self, aspect: float) -> None:
        self.camera = SimpleNamespace(aspect=aspect)

    def atomic(self):
        return nullcontext()


@pytest.mark.parametrize("count", [1, 2])
def test_the_view_from_the_start_shows_all_of_it_on_every_page(server, folder, count):
    avatar = open_avatar(folder, None)
    page = Page(server, {str(number): avatar for number in range(count)}, {})
    points = np.concatenate([handle.points for handle in page.handles])
    start = server.initial_camera
    for aspect in (16 / 9, 390 / 844):
        client = Client(aspect)
        page._reset_view(client)
        camera = client.camera
        np.testing.assert_allclose(camera.look_at, start.look_at)
        seen = points - camera.position  # looking along -z, with y up
        height = -seen[:, 2] * np.tan(start.fov / 2)
        assert (np.abs(seen[:, 0]) < height * aspect).all() and (np.abs(seen[:, 1]) < height).mean() > 0.9
        assert (aspect < 1) == (not np.allclose(camera.position, start.position))


def test_of_very_many_points_some_are_shown_as_points_and_all_as_gaussians(server, folder, monkeypatch):
    monkeypatch.setattr("eval.viewer.page.MAX_POINTS", 60)
    avatar = open_avatar(folder, None)
    page = Page(server, {"ada": avatar}, {})
    assert len(page.handles[0].points) == len(page.handles[0].colors) == -(-len(avatar) // 3)
    page.render_as.value = "Gaussians"
    page.draw()
    assert len(page.handles[0].centers) == len(avatar) > 120


@pytest.mark.parametrize(
    ("seconds", "error", "there", "expected"),
    [
        (0.0, None, True, ("Gaussians", True)),
        (0.25, None, True, ("points", True)),
        (0.0, TimeoutError(), True, ("points", True)),
        (0.0, RuntimeError("it went away"), False, ("points", False)),
    ],
    ids=["fast", "slow", "never answers", "went away"],
)
def test_a_page_that_draws_fast_gets_gaussians(server, folder, monkeypatch, seconds, error, there, expected):
    page = Page(server, {"ada": open_avatar(folder, None)}, {})

    def image(*size, **options):
        if error is not None:
            raise error
        time.sleep(seconds)

    storage = SimpleNamespace(get_item=lambda *key, **options: None)
    said = []
    client = SimpleNamespace(client_id=3, local_storage=storage, get_render=image)
    client.add_notification = lambda title, *text, **options: said.append(title)
    monkeypatch.setattr(server, "get_clients", lambda: {3: client} if there else {})
    page._measure_speed(client)
    assert (page.render_as.value, page.measured) == expected
    assert said == (["rendering as points"] if expected == ("points", True) else [])


def test_two_avatars_stand_side_by_side(server, folder):
    avatar = open_avatar(folder, None)
    page = Page(server, {"ada": avatar, "ada (compared)": avatar}, {})
    left, right = (handle.points for handle in page.handles)
    assert (right[:, 0] - left[:, 0] > 0.2 * UNITS).all()
    np.testing.assert_allclose(left[:, 1:], right[:, 1:], atol=1e-5)


def test_a_screenshot_keeps_its_transparency():
    image = np.zeros((3, 5, 4), np.uint8)
    image[1, 2] = (200, 100, 50, 255)
    camera = SimpleNamespace(image_height=3, image_width=5)
    client = SimpleNamespace(camera=camera, get_render=lambda *size, **options: image)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(_screenshot(client, None)))), image)
