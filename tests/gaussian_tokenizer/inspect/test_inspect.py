"""The command that says what a path is: every kind is recognized, what is wrong decides the exit status."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.export import save_splats
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.captures.contact_sheet import contact_sheet
from gaussian_tokenizer.captures.loading import load_tracking, read_tracking
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.inspect.__main__ import inspect, main

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def in_opencv_axes(entry):
    entry["transform_matrix"] = (np.array(entry["transform_matrix"]) @ FLIP).tolist()


def test_a_tracking_is_counted(tracked):
    report = inspect(tracked)  # on the head that its metadata names
    assert report.what == "a VHAP dataset folder of several cameras" and report.problems == []
    assert report.facts["images"] == {"count": 24, "size": ["40x40"], "alpha": True, "masks": 24}
    assert report.facts["cameras"]["count"] == 6 and report.facts["timesteps"] == {"count": 4, "first": 0, "last": 3}
    assert report.facts["splits"] == {"train": 15, "val": 3, "test": 6}
    assert report.facts["head"] == {"name": "procedural:600", "shape": 25, "expressions": 18, "offsets": "none"}
    assert report.facts["avatar"]["gaussians"] == len(GaussianAvatar.load(tracked))
    [command] = report.next
    assert command.endswith(f"--data {tracked} --head procedural:600 --output_dir avatars")


def test_the_command_prints_a_report_and_ends_well(tracked, tmp_path, capsys):
    assert main([str(tracked), "--image", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr().out
    assert "nothing wrong found" in printed and "count 24, size 40x40, alpha yes, masks 24" in printed
    assert Image.open(tmp_path / "sheet.png").width > 6 * 200


def test_a_wrong_camera_convention_is_said_drawn_and_ends_badly(copy_of_tracked, change_frames, tmp_path, capsys):
    change_frames(copy_of_tracked, in_opencv_axes)
    assert main([str(copy_of_tracked), "--json", "--image", str(tmp_path / "wrong.png")]) == 1
    report = json.loads(capsys.readouterr().out)
    [problem] = report["problems"]
    assert (
        problem["severity"] == "error" and "were transform_matrix camera-to-world with OpenCV axes" in problem["text"]
    )
    assert report["images"]["count"] == 24 and report["next"] == []
    assert (tmp_path / "wrong.png").is_file()


def outlined(sheet):
    """Rows of the contact sheet that have the outline of a head."""
    return np.flatnonzero((np.asarray(sheet) == (255, 214, 0)).all(-1).any(1))


def test_the_contact_sheet_shows_the_head_where_it_is(tracked, copy_of_tracked, small_head, change_frames):
    right = contact_sheet(load_tracking(tracked, small_head), small_head, count=3)
    change_frames(copy_of_tracked, in_opencv_axes)
    wrong = contact_sheet(read_tracking(copy_of_tracked, small_head), small_head, count=3)
    # Two rows, the head in the second; of the wrong convention three, the head in the third only.
    assert right.width == wrong.width and wrong.height == pytest.approx(right.height * 3 / 2, abs=1)
    row = right.height // 2
    assert outlined(right).size and (outlined(right) // row == 1).all()
    assert outlined(wrong).size and (outlined(wrong) // row == 2).all()
    assert np.array_equal(outlined(wrong) - row, outlined(right))


def test_a_tracking_without_a_known_head_is_a_warning(copy_of_tracked, capsys, tmp_path):
    (copy_of_tracked / "metadata.json").unlink()
    report = inspect(copy_of_tracked)
    assert not report.has_errors and "give --head" in report.problems[0].text
    assert report.facts["subject"] == {"id": "ada", "license": "unknown", "consent": "unknown"}
    assert inspect(copy_of_tracked, "procedural:600").problems == []
    assert main([str(copy_of_tracked), "--image", str(tmp_path / "sheet.png")]) == 1
    assert capsys.readouterr().err.endswith("with images and a head model; give --head\n")
    assert not (tmp_path / "sheet.png").exists()


def test_what_cannot_be_read_is_a_problem_and_not_a_crash(copy_of_tracked, capsys):
    (copy_of_tracked / "images" / "00001_02.png").unlink()
    assert main([str(copy_of_tracked)]) == 1
    printed = capsys.readouterr().out
    assert "ERROR: " in printed and "00001_02.png does not exist" in printed
    (copy_of_tracked / "canonical_flame_param.npz").unlink()
    shutil.copy(copy_of_tracked / "images" / "00001_01.png", copy_of_tracked / "images" / "00001_02.png")
    [problem] = inspect(copy_of_tracked).problems
    assert not problem.is_error and problem.text.startswith("has no canonical_flame_param.npz")


def test_an_avatar_on_a_face_of_any_number_is_counted_in_little_memory(tracked, tmp_path):
    avatar = GaussianAvatar.load(tracked)
    replace(avatar, faces=avatar.faces.clone().index_fill_(0, torch.tensor([3]), 2**40)).save(
        tmp_path / "a.safetensors"
    )
    report = inspect(tmp_path / "a.safetensors")
    assert report.facts["faces"]["points_on_one"].startswith("1 to ") and report.problems == []


def test_an_avatar_is_described(tracked, tmp_path):
    for name in ("point_cloud.ply", "flame_param.npz"):
        (tmp_path / "model" / "point_cloud" / "iteration_30").mkdir(parents=True, exist_ok=True)
        shutil.copy(tracked / name, tmp_path / "model" / "point_cloud" / "iteration_30")
    avatar = GaussianAvatar.load(tracked)
    avatar.save(tmp_path / "avatar.safetensors")
    for path, what in (
        (tmp_path / "model", "a GaussianAvatars result folder"),
        (tmp_path / "avatar.safetensors", "an avatar"),
        (tracked / "point_cloud.ply", "a PLY of Gaussians"),
    ):
        report = inspect(path)
        assert report.what == what and report.problems == [] and report.facts["gaussians"]["count"] == len(avatar)
        assert report.facts["faces"]["occupied"] == len(avatar.faces.unique())
    assert inspect(tracked / "flame_param.npz").facts["frames"] == 1
    avatar.with_head(load_head("procedural:600")).save(tmp_path / "padded")
    assert inspect(tmp_path / "padded").facts["gaussians"] == {
        "count": len(avatar),
        "sh_degree": 0,
        "sh_degree_of_the_file": 3,
    }
    report = inspect(tmp_path / "avatar.safetensors", "procedural:700")
    assert "made on head model 'procedural:600'" in report.problems[0].text and report.has_errors


@pytest.mark.parametrize("name", ["world.ply", "world.splat", "world.compressed.ply"])
@pytest.mark.parametrize("degree", [0, 2])
def test_what_is_exported_for_splat_viewers_is_told_from_avatars_counted_and_measured(tmp_path, name, degree, capsys):
    if name != "world.ply":
        pytest.importorskip("gsplat")
    generator = torch.Generator().manual_seed(0)
    gaussians = Gaussians(
        positions=torch.rand(1, 300, 3, generator=generator) * torch.tensor((0.2, 0.4, 0.1)),
        scales=torch.full((1, 300, 3), 0.01),
        quats=torch.randn(1, 300, 4, generator=generator),
        opacities=torch.full((300,), 0.7),
        sh=torch.randn(300, (degree + 1) ** 2, 3, generator=generator),
    )
    gaussians.positions[0, :2] = torch.tensor(((-0.25, 0.5, 0.125), (0.5, -0.125, 0)))
    save_splats(tmp_path / name, gaussians)
    report = inspect(tmp_path / name)
    assert report.problems == [] and "world-space Gaussians" in report.what
    assert report.facts["gaussians"] == {"count": 300, "sh_degree": 0 if name == "world.splat" else degree}
    expected = {"x": "-0.250 to 0.500", "y": "-0.125 to 0.500", "z": "0.000 to 0.125", "unit": "meters"}
    assert report.facts["bounds"] == expected
    assert main([str(tmp_path / name)]) == 0 and "ERROR" not in capsys.readouterr().out
    content = (tmp_path / name).read_bytes()
    for number, damaged in enumerate((content[:-5], content[:80], content + b"\0")):
        path = tmp_path / f"{number}{name.removeprefix('world')}"
        path.write_bytes(damaged)
        assert main([str(path)]) == 1 and capsys.readouterr().out.count("ERROR: ") == 1


def test_folders_of_this_toolkit_are_recognized(tiny_corpus, small_head, tmp_path):
    small_head.save(tmp_path / "head.safetensors")
    report = inspect(tmp_path / "head.safetensors")
    assert report.what == "a head model" and report.facts["hash"] == small_head.hash
    report = inspect(tiny_corpus)
    assert report.facts["avatars"] == {"shards": 2, "train": 8, "validation": 4}
    assert report.next == [f"python -m gaussian_tokenizer.build_corpus validate {tiny_corpus}"]
    assert inspect(tiny_corpus / "tokenizer").facts["settings"]["n_bins"] == 64
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "avatar_pointillist"}')
    report = inspect(tmp_path / "model")
    assert report.facts["model_type"] == "avatar_pointillist" and "no weights" in report.problems[0].text
    (tmp_path / "pipeline" / "head").mkdir(parents=True)
    (tmp_path / "pipeline" / "pipeline.json").write_text('{"components": ["head", "tokenizer"]}')
    assert [problem.text for problem in inspect(tmp_path / "pipeline").problems] == ["lacks tokenizer/"]
    (tmp_path / "pipeline" / "pipeline.json").write_text('{"components": 3}')
    [problem] = inspect(tmp_path / "pipeline").problems
    assert "components in pipeline.json are 3, expected a list" in problem.text


def test_two_subjects_of_one_id_are_found_in_a_folder_of_many(tracked, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(tracked, tmp_path / name)
    (tmp_path / "c" / "metadata.json").write_text('{"avatar_id": "someone else"}')
    report = inspect(tmp_path)
    assert report.facts == {"folders": 3, "avatars": 3, "trackings": {"count": 3, "vhap": 3}}
    [problem] = report.problems
    assert problem.is_error and problem.text.startswith("a, b have one id, 'synthetic-3-000000'")


@pytest.mark.parametrize("name", ["notes.txt", "empty", "broken.safetensors", "broken.npz", "broken.ply"])
def test_what_is_nothing_or_broken_ends_badly(tmp_path, name, capsys):
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"nothing of ours")
    else:
        path.mkdir()
    assert main([str(path)]) == 1
    assert capsys.readouterr().out.count("ERROR: ") == 1


def test_a_path_that_is_not_there_is_said_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: no such file or folder\n"
    assert main([str(tmp_path), "--head", "nowhere.pkl"]) == 1
    assert "nowhere.pkl" in capsys.readouterr().err
