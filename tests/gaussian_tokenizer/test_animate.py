"""`python -m gaussian_tokenizer.animate`: files of a moving head from the command line, errors in one line."""

import io
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import plyfile
import pytest
import torch
from PIL import Image
from pretended_device import PretendedDevice

from gaussian_tokenizer import animate
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.motions import synthetic_motion
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.image_metrics import psnr
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.synthetic.subject import synthesize_subject

HEAD = build_procedural_head(600)


@pytest.fixture(scope="module")
def avatar_path(tmp_path_factory):
    """A subject with short hair, 400 points."""
    path = tmp_path_factory.mktemp("subject") / "avatar.safetensors"
    synthesize_subject(HEAD, (0, 5)).avatar.save(path)
    return path


@pytest.fixture
def command(avatar_path, tmp_path, monkeypatch, capsys):
    """Run the command with small images; what it printed, or the line of its error."""
    monkeypatch.chdir(tmp_path)

    def run(*words, **options) -> str:
        values = {"avatar": avatar_path, "head": "procedural:600", "image_size": 32, "num_frames": 4, "device": "cpu"}
        values |= {name: value for name, value in options.items()}
        line = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["animate", *line, *words])
        try:
            animate.main()
        except SystemExit as stop:
            assert stop.code == 1
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith("error: ")
            return error
        printed = capsys.readouterr()
        assert "100%" in printed.err or not (options.keys() & {"output", "ply_sequence"})
        return printed.out

    return run


def read_images(folder) -> np.ndarray:
    images = []
    for name in sorted(os.listdir(folder)):
        with Image.open(folder / name) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images)


def ink(image: np.ndarray) -> np.ndarray:
    """(H, W) how far from the white background."""
    return 255 - image.min(-1).astype(float)


@pytest.mark.parametrize("motion", ["talk", "nod", "look_around", "expressions", "turntable"])
def test_every_built_in_motion_moves_the_head_in_the_images(command, tmp_path, motion):
    said = command(motion=motion, output="frames")
    assert "4 images of 32 x 32 in frames" in said
    images = read_images(tmp_path / "frames")
    assert images.shape == (4, 32, 32, 3)
    assert all((images[0] != image).any() for image in images[1:])


def test_the_whole_head_is_in_the_image_right_side_up(command, tmp_path):
    command(motion="turntable", output="frames", num_frames=1, image_size=64)
    image = read_images(tmp_path / "frames")[0]
    drawn = ink(image) > 30
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert 2 < rows[0] < 16 and columns[0] > 3 and columns[-1] < 60  # room above and beside the head, the neck below
    assert rows[-1] > 55
    assert image[rows[0] + 3, 32].sum() < image[36, 32].sum()  # dark hair above, skin below
    assert abs(columns.mean() - 31.5) < 4


def test_images_are_what_the_renderer_draws_of_the_posed_gaussians(command, tmp_path, avatar_path):
    command(motion="nod", output="frames", num_frames=5, azimuth=40, background=0.25, animation="face_frames")
    avatar = GaussianAvatar.load(avatar_path, head=HEAD)
    motion = synthetic_motion("nod", HEAD, 5)
    target, extent = animate.framing(avatar.bind(), motion, [40.0])
    cameras = animate.Cameras.orbit(target, 1.0, [40.0], 0.0, 32 / extent, 32, 32)
    expected = render(avatar.posed(motion, "face_frames"), cameras, background=0.25).image.clamp(0, 1).numpy()
    assert np.abs(read_images(tmp_path / "frames") / 255 - expected).max() < 0.5 / 255 + 1e-4


def test_a_turntable_starts_at_the_azimuth_and_goes_around_by_the_subjects_left(command, tmp_path, avatar_path):
    command(motion="turntable", output="turning", azimuth=90)
    avatar = GaussianAvatar.load(avatar_path, head=HEAD)
    still, around = HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression), [90.0, 180.0, 270.0, 360.0]
    target, extent = animate.framing(avatar.bind(), still, around)
    cameras = animate.Cameras.orbit(target, 1.0, around, 0.0, 32 / extent, 32, 32)
    expected = render(avatar.posed(still), cameras).image.clamp(0, 1).numpy()
    assert np.abs(read_images(tmp_path / "turning") / 255 - expected).max() < 0.5 / 255 + 1e-4
    # Seen from its left (camera on +x), the face looks to the left of the image.
    nose = HEAD.template[HEAD.template[:, 2].argmax()]
    cameras = animate.Cameras.orbit(HEAD.template.mean(0), 1.0, [90.0], 0.0, 100.0, 32, 32)
    seen = cameras.viewmats[0] @ torch.cat((nose, torch.ones(1)))
    assert seen[0] < -0.03


def test_a_file_of_another_subject_drives_the_avatar_and_the_camera_gives_it_room(command, tmp_path):
    motion = HeadParameters.zeros(300, HEAD.n_expression, 6)
    motion.translation[:, 0] = torch.linspace(-0.4, 0.4, 6)
    motion.save(tmp_path / "flame_param.npz")
    command(motion="flame_param.npz", output="frames", num_frames=None)
    images = read_images(tmp_path / "frames")
    assert len(images) == 6
    middles = [np.average(np.arange(32), weights=ink(image).sum(0)) for image in images]
    assert middles[0] < 8 and middles[-1] > 24 and np.all(np.diff(middles) > 2)
    edges = np.stack([ink(image)[:, column] for image in images for column in (0, -1)])
    assert edges.max() < 100
    command(motion=tmp_path, output="frames", num_frames=2)  # the folder, and the first frames of it
    assert len(read_images(tmp_path / "frames")) == 2


def test_a_gif_an_export_and_a_sequence_come_from_one_run(command, tmp_path, avatar_path):
    said = command(motion="talk", output="talk.gif", ply_sequence="plys", export="rest.ply", fps=10)
    assert "4 images" in said and "4 frames of" in said and "at rest in rest.ply" in said
    with Image.open(tmp_path / "talk.gif") as gif:
        assert gif.n_frames == 4 and gif.info["duration"] == 100 and gif.size == (32, 32)
    avatar = GaussianAvatar.load(avatar_path, head=HEAD)
    rest = plyfile.PlyData.read(tmp_path / "rest.ply")["vertex"]
    np.testing.assert_allclose(rest["y"], avatar.canonical_gaussians().positions[0, :, 1], atol=1e-6)
    posed = avatar.posed(synthetic_motion("talk", HEAD, 4))
    last = plyfile.PlyData.read(tmp_path / "plys" / "00003.ply")["vertex"]
    np.testing.assert_allclose(last["y"], posed.positions[3, :, 1], atol=1e-6)
    assert len(os.listdir(tmp_path / "plys")) == 4


def test_exports_are_turned_for_viewers_whose_y_points_down(command, tmp_path, avatar_path):
    command(motion="talk", ply_sequence="plys", export="rest.ply", up="minus_y")
    avatar = GaussianAvatar.load(avatar_path, head=HEAD)
    posed = avatar.posed(synthetic_motion("talk", HEAD, 4))
    for name, upright in (("rest.ply", avatar.canonical_gaussians()), ("plys/00000.ply", posed)):
        table = plyfile.PlyData.read(tmp_path / name)["vertex"]
        np.testing.assert_allclose(table["y"], -upright.positions[0, :, 1], atol=1e-6)
        np.testing.assert_allclose(table["z"], -upright.positions[0, :, 2], atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"motion": "look_around", "azimuth": 30, "background": 0.25}, {"motion": "turntable"}]
)
def test_a_page_shows_what_the_images_do(command, tmp_path, browser, options):
    command(output="frames", image_size=128, **options)
    assert "4 frames in a.html, 0.0 MB" in command(output="a.html", **options)
    page = browser.new_page()
    page.goto((tmp_path / "a.html").as_uri())
    for _ in range(2):  # the footer is higher in a narrow window
        footer = page.locator("footer").bounding_box()
        page.set_viewport_size({"width": 128, "height": 128 + int(footer["height"])})
    page.locator("input").fill("1")
    page.locator("output", has_text="2 / 4").wait_for()
    page.wait_for_timeout(300)
    with Image.open(io.BytesIO(page.locator("canvas").screenshot())) as image:
        shown = torch.from_numpy(np.array(image.convert("RGB"))) / 255
    images = torch.from_numpy(read_images(tmp_path / "frames")) / 255
    found = psnr(shown.expand_as(images), images)
    assert found[1] > 47 and all(found[frame] < 35 for frame in (0, 2, 3))
    page.close()


def test_a_large_page_is_warned_about(command, monkeypatch):
    monkeypatch.setattr(animate, "LARGE_PAGE", 1000)
    assert "give fewer --num_frames" in command(output="a.html")


def test_a_second_run_gives_the_same_bytes(command, tmp_path):
    command(output="a.gif")
    command(output="b.gif")
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_the_head_is_the_built_in_one_that_the_avatar_was_made_on(command, tmp_path):
    command(output="told.gif")
    command(output="found.gif", head=None)
    assert (tmp_path / "told.gif").read_bytes() == (tmp_path / "found.gif").read_bytes()


@pytest.mark.parametrize("made_on", ["flame2023", "procedural/../flame.pkl", None])
def test_a_head_that_the_avatar_does_not_give_is_asked_for(command, avatar_path, made_on):
    replace(GaussianAvatar.load(avatar_path), head_name=made_on, head_hash=None).save("other.safetensors")
    said = "does not say which head model it was made on" if made_on is None else f"was made on {made_on!r}"
    assert f"{said}; give that with --head" in command(avatar="other.safetensors", output="a.gif", head=None)


def test_on_another_device_the_same_files_come_out(command, tmp_path):
    for motion, method in (("talk", "lbs"), ("turntable", "face_frames")):
        files = {"motion": motion, "animation": method, "export": "a.ply", "ply_sequence": "sequence", "output": "a"}
        command(**files)
        expected = {path: path.read_bytes() for path in tmp_path.glob("**/*.p*")}
        with PretendedDevice() as device:
            command(device=device, **files)
        assert len(expected) == 9 and expected == {path: path.read_bytes() for path in tmp_path.glob("**/*.p*")}
        shutil.rmtree(tmp_path / "sequence")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "nothing to write: give --output, --ply_sequence or --export"),
        ({"output": "a.avi"}, "--output a.avi: expected .html, .gif, .mp4"),
        ({"output": "nowhere/a.gif"}, "nowhere/a.gif: its folder nowhere is not there"),
        ({"output": "a.gif", "motion": "dance"}, "--motion dance: no such file or folder; built in are talk, nod"),
        ({"output": "a.gif", "avatar": "nobody"}, "nobody: no such avatar"),
        ({"output": "a.gif", "head": "procedural:1200"}, "was made on head model 'procedural:600'"),
        ({"output": "a.gif", "head": "sphere"}, "head 'sphere': nothing there"),
        ({"output": "a.gif", "num_frames": 0}, "--num_frames 0: expected at least 1"),
        ({"output": "a.gif", "image_size": 0}, "--image_size 0: expected 8 to 8192"),
        ({"output": "a.gif", "background": 3}, "--background 3.0: expected 0 (black) to 1 (white)"),
        ({"output": "a.gif", "device": "abacus"}, "--device abacus: not usable here"),
        ({"output": "a.gif", "fps": 0}, "--fps 0.0: expected more than 0"),
        ({"export": "a.obj"}, "a.obj: unknown kind of file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(command, tmp_path, options, line):
    assert line in command(**options)
    assert os.listdir(tmp_path) == []


def test_motions_and_avatars_that_do_not_fit_are_said_in_one_line(command, tmp_path):
    HeadParameters.zeros(300, 100, 2).save(tmp_path / "flame.npz")
    assert "flame.npz: the motion has 100 expression components" in command(motion="flame.npz", output="a.gif")
    points = {"positions": HEAD.template[:5], "faces": torch.arange(5)}
    GaussianAvatar.from_points(points, None, HEAD).save(tmp_path / "points.safetensors")
    assert "it holds points only" in command(avatar="points.safetensors", output="a.gif")
    assert sorted(os.listdir(tmp_path)) == ["flame.npz", "points.safetensors"]


def test_what_a_missing_package_is_installed_with_is_said_in_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert 'pip install "avatar-pointillist[video]"' in command(output="a.mp4")
    assert os.listdir(tmp_path) == []


def test_a_head_is_framed_by_its_skull_and_its_hair_but_not_by_a_stray_gaussian():
    still = HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression)
    bald, curly = (
        next(
            s
            for i in range(60)
            if (s := synthesize_subject(HEAD, (7, i), num_points=2000)).appearance.hair_style == style
        )
        for style in ("bald", "curly")
    )
    target, extent = animate.framing(bald.avatar.bind(), still, [0.0])
    skull = HEAD.canonical_vertices(bald.params)[~HEAD.regions["neck"]]
    assert extent == pytest.approx(1.5 * float(skull[:, 1].max() - skull[:, 1].min()), rel=0.05)
    assert (skull - target).abs().max() < extent / 2
    target, extent = animate.framing(curly.avatar.bind(), still, [0.0])
    gaussians = curly.avatar.canonical_gaussians()
    assert float((gaussians.positions[0, :, 1] - target[1]).max()) < extent / 2
    positions = curly.avatar.positions.clone()
    positions[0] += 1000
    assert animate.framing(replace(curly.avatar, positions=positions).bind(), still, [0.0])[1] == pytest.approx(
        extent, rel=0.05
    )
