"""Exports: independent readers find in the files what was given, and a refusal leaves nothing half-written."""

import errno
import os
import sys
from dataclasses import replace

import numpy as np
import plyfile
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.avatars.export import save_ply_sequence, save_splats, save_video
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.avatars.ply import read_gaussian_ply
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.utils import atomic


def random_gaussians(count=300, num_frames=2, degree=1, seed=0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return Gaussians(
        positions=normal(num_frames, count, 3) * 0.1,
        scales=(normal(num_frames, count, 3) * 0.3 - 5).exp(),
        quats=normal(num_frames, count, 4),
        opacities=torch.rand(count, generator=generator) * 0.9 + 0.05,
        sh=normal(count, (degree + 1) ** 2, 3) * 0.4,
    )


def moving_images(num_frames=6, height=24, width=32) -> np.ndarray:
    """A bright disc that crosses a color gradient."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for index in range(num_frames):
        ground = np.stack((x * 4, y * 6, np.full_like(x, 60)), -1)
        disc = (x - 5 - 4 * index) ** 2 + (y - height / 2) ** 2 < 16
        frames.append(np.where(disc[..., None], (250, 240, 90), ground))
    return np.stack(frames).astype(np.uint8)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Gaussians


def assert_table_holds(table, gaussians: Gaussians, frame: int) -> None:
    for column, axis in enumerate("xyz"):
        np.testing.assert_array_equal(table[axis], gaussians.positions[frame, :, column])
        np.testing.assert_allclose(np.exp(table[f"scale_{column}"]), gaussians.scales[frame, :, column], rtol=1e-5)
        np.testing.assert_array_equal(table[f"f_dc_{column}"], gaussians.sh[:, 0, column])
    for column in range(4):
        np.testing.assert_array_equal(table[f"rot_{column}"], gaussians.quats[frame, :, column])
    np.testing.assert_allclose(1 / (1 + np.exp(-table["opacity"])), gaussians.opacities, atol=1e-6)


@pytest.mark.parametrize("degree", [0, 3])
def test_a_ply_holds_one_frame_as_other_programs_read_it(tmp_path, degree):
    gaussians = random_gaussians(degree=degree)
    save_splats(tmp_path / "a.ply", gaussians, frame=1)
    save_splats(tmp_path / "b.ply", gaussians, frame=-1)
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    table = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    assert_table_holds(table, gaussians, 1)
    rest = [p.name for p in table.properties if p.name.startswith("f_rest")]
    assert len(rest) == 3 * ((degree + 1) ** 2 - 1)
    if degree:
        np.testing.assert_array_equal(table["f_rest_16"], gaussians.sh[:, 2, 1])  # green after 15 of red


def test_opacities_and_scales_at_their_ends_are_written_finite(tmp_path):
    gaussians = random_gaussians(3, 1)
    gaussians.opacities[:] = torch.tensor([0.0, 1.0, 0.5])
    gaussians.scales[0, 0] = 0
    save_splats(tmp_path / "a.ply", gaussians)
    table = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    assert all(np.isfinite(table[p.name]).all() for p in table.properties)
    np.testing.assert_allclose(1 / (1 + np.exp(-table["opacity"])), [0, 1, 0.5], atol=1e-6)
    assert table["scale_0"][0] < -25


def test_a_sequence_is_a_numbered_ply_for_each_frame(tmp_path):
    gaussians = random_gaussians(20, num_frames=5)
    assert save_ply_sequence(tmp_path / "whole", gaussians) == 5
    assert save_ply_sequence(tmp_path / "parts", (gaussians.frames(slice(i, i + 2)) for i in (0, 2, 4))) == 5
    assert content(tmp_path / "whole") == content(tmp_path / "parts")
    assert sorted(os.listdir(tmp_path / "whole")) == [f"0000{i}.ply" for i in range(5)]
    for frame in range(5):
        assert_table_holds(plyfile.PlyData.read(tmp_path / "whole" / f"0000{frame}.ply")["vertex"], gaussians, frame)


def test_a_sequence_that_breaks_off_leaves_the_old_one(tmp_path):
    gaussians = random_gaussians(20, num_frames=3)
    save_ply_sequence(tmp_path / "motion", gaussians.frames(0))
    before = content(tmp_path)
    gaussians.positions[2, 4, 0] = torch.inf
    with pytest.raises(ValueError, match="positions of Gaussian 4 is inf"):
        save_ply_sequence(tmp_path / "motion", gaussians)
    with pytest.raises(ValueError, match="no frames to write"):
        save_ply_sequence(tmp_path / "motion", [])
    assert content(tmp_path) == before and os.listdir(tmp_path) == ["motion"]


def test_a_splat_file_holds_32_bytes_a_gaussian(tmp_path):
    pytest.importorskip("gsplat")
    gaussians = random_gaussians()
    save_splats(tmp_path / "a.splat", gaussians)
    record = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])
    rows = np.fromfile(tmp_path / "a.splat", record)
    assert len(rows) == 300
    # The file has an order of its own: rows are told by their positions.
    found, given = np.lexsort(rows["position"].T), np.lexsort(gaussians.positions[0].numpy().T)
    rows = rows[found]
    np.testing.assert_array_equal(rows["position"], gaussians.positions[0][given])
    np.testing.assert_allclose(rows["scale"], gaussians.scales[0][given], rtol=1e-5)
    colors = 0.5 + 0.28209479177387814 * gaussians.sh[:, 0].numpy()
    np.testing.assert_allclose(rows["rgba"][:, :3] / 255, np.clip(colors, 0, 1)[given], atol=1 / 250)
    np.testing.assert_allclose(rows["rgba"][:, 3] / 255, gaussians.opacities[given], atol=1 / 250)
    quats = torch.nn.functional.normalize(gaussians.quats[0], dim=1).numpy()
    np.testing.assert_allclose((rows["rotation"].astype(float) - 128) / 128, quats[given], atol=1 / 120)


def test_a_compressed_ply_holds_positions_to_a_hundredth_of_a_percent_of_their_chunk(tmp_path):
    pytest.importorskip("gsplat")
    gaussians = random_gaussians()
    save_splats(tmp_path / "a.compressed.ply", gaussians, frame=1)
    data = plyfile.PlyData.read(tmp_path / "a.compressed.ply")
    chunks, vertices = data["chunk"], data["vertex"]
    assert len(vertices.data) == 300 and len(chunks.data) == 2  # 256 a chunk
    chunk = np.arange(300) // 256
    unpacked = []
    for axis, shift, bits in (("x", 21, 11), ("y", 11, 10), ("z", 0, 11)):
        low, high = chunks[f"min_{axis}"][chunk], chunks[f"max_{axis}"][chunk]
        parts = (vertices["packed_position"] >> shift) & ((1 << bits) - 1)
        unpacked.append(low + (high - low) * parts / ((1 << bits) - 1))
    found = torch.from_numpy(np.stack(unpacked, 1)).float()
    distances = torch.cdist(found, gaussians.positions[1])
    assert distances.min(1).values.max() < 1e-3
    assert len(set(distances.argmin(1).tolist())) > 295  # each its own


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_every_element_of_a_compressed_ply_has_properties(tmp_path, degree):
    pytest.importorskip("gsplat")
    save_splats(tmp_path / "a.compressed.ply", random_gaussians(degree=degree))
    data = plyfile.PlyData.read(tmp_path / "a.compressed.ply")
    assert [each.name for each in data.elements] == ["chunk", "vertex"] + ["sh"] * (degree > 0)
    assert all(len(each.properties) > 0 and len(each.data) in (2, 300) for each in data.elements)
    if degree:
        assert len(data["sh"].properties) == 3 * ((degree + 1) ** 2 - 1)


@pytest.mark.parametrize("degree", [0, 3])
def test_upside_down_gaussians_look_the_same_to_an_upside_down_camera(tmp_path, degree):
    gaussians = random_gaussians(60, degree=degree)
    save_splats(tmp_path / "a.ply", gaussians, up="minus_y")
    stored = read_gaussian_ply(tmp_path / "a.ply", with_faces=False)
    np.testing.assert_allclose(stored.positions, gaussians.positions[0] * torch.tensor((1, -1, -1)))
    tensors = {name: torch.from_numpy(getattr(stored, name)) for name in ("positions", "scales", "quats", "sh")}
    turned = Gaussians(
        tensors["positions"][None], tensors["scales"].exp()[None], tensors["quats"][None], gaussians.opacities,
        tensors["sh"],
    )  # fmt: skip
    camera = Cameras.orbit((0, 0, 0), 1.0, [30.0], 20.0, 100.0, 48, 48)
    half_turn = torch.diag(torch.tensor((1.0, -1, -1, 1)))  # about x
    upside_down = replace(camera, viewmats=camera.viewmats @ half_turn)
    expected, found = render(gaussians.frames(0), camera).image, render(turned, upside_down).image
    assert expected.std() > 0.05 and (expected - found).abs().max() < 1e-4


def test_a_sequence_and_a_splat_are_turned_like_a_ply(tmp_path):
    pytest.importorskip("gsplat")
    gaussians = random_gaussians(20, num_frames=2)
    save_ply_sequence(tmp_path / "motion", gaussians, up="minus_y")
    save_splats(tmp_path / "a.ply", gaussians, frame=1, up="minus_y")
    assert (tmp_path / "motion" / "00001.ply").read_bytes() == (tmp_path / "a.ply").read_bytes()
    save_splats(tmp_path / "a.splat", gaussians, frame=1, up="minus_y")
    rows = np.fromfile(tmp_path / "a.splat", "<f4").reshape(-1, 8)
    table = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    assert (
        sorted(rows[:, 1].tolist()) == sorted(table["y"].tolist()) == sorted((-gaussians.positions[1, :, 1]).tolist())
    )
    with pytest.raises(ValueError, match="up is 'z', expected 'y' or 'minus_y'"):
        save_splats(tmp_path / "b.ply", gaussians, up="z")


def test_one_bad_value_is_named_instead_of_a_file_without_gaussians(tmp_path):
    pytest.importorskip("gsplat")
    gaussians = random_gaussians()
    gaussians.opacities[17] = torch.nan
    for name in ("a.ply", "a.splat", "a.compressed.ply"):
        with pytest.raises(ValueError, match="opacities of Gaussian 17 is nan"):
            save_splats(tmp_path / name, gaussians)
    assert os.listdir(tmp_path) == []


def test_without_gsplat_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat.exporter", None)
    with pytest.raises(ImportError, match=r'pip install "avatar-pointillist\[render\]", or write a plain \.ply'):
        save_splats(tmp_path / "a.splat", random_gaussians())
    assert os.listdir(tmp_path) == []


def test_gaussians_of_an_unknown_kind_or_frame_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.obj: unknown kind of file; .*\.compressed\.ply, \.ply, \.splat"):
        save_splats(tmp_path / "a.obj", random_gaussians())
    with pytest.raises(ValueError, match="frame 2 asked of Gaussians of 2 frames"):
        save_splats(tmp_path / "a.ply", random_gaussians(), frame=2)
    assert os.listdir(tmp_path) == []


# Images


def test_a_gif_keeps_its_images_one_palette_the_speed_and_repeats(tmp_path):
    images = moving_images()
    save_video(tmp_path / "a.gif", images, fps=20)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 6 and gif.info["loop"] == 0
        for index in range(6):
            gif.seek(index)
            assert gif.info["duration"] == 50
            found = np.asarray(gif.convert("RGB")).astype(int)
            assert np.abs(found - images[index]).mean() < 6 and np.abs(found - images[index]).max() < 40


def test_what_does_not_move_in_a_gif_does_not_flicker(tmp_path):
    images = moving_images()
    rng = np.random.default_rng(0)
    # More colors than a palette has, the same in all frames, under what moves: where dithering would carry it.
    images[:, -8:] = rng.integers(0, 255, (8, 32, 3))
    save_video(tmp_path / "a.gif", images)
    with Image.open(tmp_path / "a.gif") as gif:
        frames = []
        for index in range(6):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB"))[-8:])
    assert all(np.array_equal(frame, frames[0]) for frame in frames)


def test_few_colors_and_a_background_are_exact_in_a_gif(tmp_path):
    images = np.full((3, 40, 40, 3), 255, np.uint8)
    images[:, 5:9, 5:9] = (1, 2, 3)
    for index, noise in enumerate((0, 1000)):
        pixels = np.random.default_rng(0).integers(0, 255, (3, noise, 3))
        images.reshape(3, -1, 3)[:, 600 : 600 + noise] = pixels
        save_video(tmp_path / f"{index}.gif", images)
        with Image.open(tmp_path / f"{index}.gif") as gif:
            found = np.asarray(gif.convert("RGB"))
        assert (found[:4] == 255).all()
        if not noise:
            np.testing.assert_array_equal(found, images[0])


@pytest.mark.parametrize(("height", "width"), [(24, 32), (25, 33)])
def test_an_mp4_is_read_back_by_ffmpeg_at_an_even_size(tmp_path, height, width):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    images = moving_images(10, height, width)
    save_video(tmp_path / "a.mp4", images, fps=10)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    meta = next(reader)
    assert meta["size"] == (width + width % 2, height + height % 2) and meta["fps"] == 10
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and abs(meta["duration"] - 1) < 0.05
    frames = [np.frombuffer(frame, np.uint8).reshape(*meta["size"][::-1], 3) for frame in reader]
    assert len(frames) == 10
    for frame, image in zip(frames, images):
        # Colors are halved in resolution, so compare the brightness.
        difference = frame[:height, :width].mean(-1) - image.mean(-1)
        assert np.abs(difference).mean() < 8


def test_a_name_without_suffix_is_a_folder_of_exact_pngs(tmp_path):
    images = moving_images(3)
    save_video(tmp_path / "frames", images)
    save_video(tmp_path / "frames", torch.from_numpy(images[:2] / 255))  # replaces the folder; floats round back
    assert sorted(os.listdir(tmp_path / "frames")) == ["00000.png", "00001.png"]
    for index in range(2):
        with Image.open(tmp_path / "frames" / f"0000{index}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), images[index])


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("a.avi", moving_images(), r"a\.avi: unknown kind of video; give \.gif, \.mp4"),
        ("a.gif", np.zeros((3, 4, 4), np.uint8), r"images \(T, H, W, 3\), at least one; found \(3, 4, 4\)"),
        ("a.gif", np.zeros((0, 4, 4, 3), np.uint8), "at least one"),
        ("a.gif", np.zeros((1, 4, 4, 3), np.int64), "int64, expected uint8 or floats"),
        ("a.gif", np.full((1, 4, 4, 3), np.nan), "image 0 holds a value that is not finite"),
    ],
)
def test_what_is_no_video_is_refused_before_anything_is_written(tmp_path, name, images, message):
    with pytest.raises(ValueError, match=message):
        save_video(tmp_path / name, images)
    with pytest.raises(ValueError, match="0 frames per second"):
        save_video(tmp_path / "a.gif", moving_images(), fps=0)
    assert os.listdir(tmp_path) == []


def test_without_imageio_ffmpeg_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r'pip install "avatar-pointillist\[video\]", or write a \.gif'):
        save_video(tmp_path / "a.mp4", moving_images())
    assert os.listdir(tmp_path) == []


# What can go wrong on a disk


def write(kind: str, path) -> None:
    if kind in (".ply", ".splat"):
        save_splats(path, random_gaussians())
    elif kind == "sequence":
        save_ply_sequence(path, random_gaussians())
    else:
        save_video(path, moving_images())


KINDS = {".ply": "a.ply", ".splat": "a.splat", "sequence": "a", ".gif": "a.gif", ".mp4": "a.mp4", "images": "a"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_written_into_gives_one_line_and_no_file(tmp_path, kind):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no such folder to write into; create it first") as caught:
            write(kind, folder / KINDS[kind])
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, kind):
    pytest.importorskip("gsplat" if kind == ".splat" else "imageio_ffmpeg" if kind == ".mp4" else "PIL")
    write(kind, tmp_path / KINDS[kind])
    before = content(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(kind, tmp_path / KINDS[kind])
    with pytest.raises(OSError, match="No space left"):
        write(kind, tmp_path / f"new_{KINDS[kind]}")
    assert content(tmp_path) == before and os.listdir(tmp_path) == [KINDS[kind]]


def test_what_ffmpeg_cannot_write_is_one_line(tmp_path, monkeypatch):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

    def broken(*args, **kwargs):
        yield
        raise OSError("Broken pipe\n\nFFMPEG COMMAND:\n...\n\nFFMPEG STDERR OUTPUT:\nNo space left on device\n")

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", broken)
    with pytest.raises(OSError, match=r"^ffmpeg could not write the video: No space left on device$"):
        save_video(tmp_path / "a.mp4", moving_images())
    assert os.listdir(tmp_path) == []


def test_posed_gaussians_with_gradients_are_written_too(tmp_path):
    gaussians = random_gaussians(5, 1)
    save_splats(tmp_path / "a.ply", replace(gaussians, positions=gaussians.positions.clone().requires_grad_()))
    assert len(plyfile.PlyData.read(tmp_path / "a.ply")["vertex"].data) == 5
