"""Frames of a VHAP export: read back as written, and a JSON that leads out of its folder is refused."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.transforms_json import (
    read_transforms,
    resolve_inside,
    sister_folders,
    vhap_split,
    write_frames,
)
from gaussian_tokenizer.heads.head_parameters import HeadParameters


def random_frames(timesteps=10, cameras=3, width=7, height=5, seed=0):
    rng = np.random.default_rng(seed)
    frames = []
    for timestep in range(timesteps):
        params = replace(
            HeadParameters.zeros(4, 3),
            shape=torch.linspace(-1, 1, 4),
            expr=torch.tensor(rng.standard_normal((1, 3)), dtype=torch.float32),
            neck_pose=torch.tensor(rng.standard_normal((1, 3)), dtype=torch.float32),
            static_offset=torch.full((6, 3), 0.25),
        )
        for camera in range(cameras):
            rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
            viewmat = np.eye(4)
            viewmat[:3, :3] = rotation * np.sign(np.linalg.det(rotation))
            viewmat[:3, 3] = rng.standard_normal(3)
            intrinsics = (20 + rng.random(), 21 + rng.random(), 3 + rng.random(), 2 + rng.random())
            image = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
            mask = rng.integers(0, 256, (height, width), dtype=np.uint8)
            frames.append(Frame(timestep, camera, viewmat, *intrinsics, width, height, image, params, mask))
    return frames


def test_what_is_written_is_read_back(tmp_path):
    given = random_frames()
    write_frames(tmp_path, given[::-1])
    read = read_transforms(tmp_path / "transforms.json")
    assert [(frame.timestep, frame.camera) for frame in read] == [(t, c) for t in range(10) for c in range(3)]
    for found, frame in zip(read, given):
        assert np.abs(found.viewmat - frame.viewmat).max() <= 1e-12
        assert np.abs(found.K - frame.K).max() <= 1e-12
        assert np.array_equal(np.asarray(Image.open(found.image)), frame.image)
        assert np.array_equal(np.asarray(Image.open(found.mask)), frame.mask)
        for name, tensor in frame.params.tensors().items():
            assert torch.equal(found.load_params().tensors()[name], tensor), name


def test_frames_that_were_read_are_written_with_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    write_frames(tmp_path / "first", random_frames())
    write_frames(tmp_path / "second", read_transforms(tmp_path / "first" / "transforms.json"))
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*")]
    assert len(files) == 10 * 3 * 2 + 10 + 1 + 4
    for path in files:
        if path.suffix != ".json":
            assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path


def test_an_entry_has_the_keys_of_a_vhap_export(tmp_path):
    write_frames(tmp_path, random_frames(timesteps=2, cameras=2))
    content = json.loads((tmp_path / "transforms.json").read_text())
    assert content["timestep_indices"] == content["camera_indices"] == [0, 1]
    entry = content["frames"][3]
    assert set(entry) == {
        *("timestep_index", "timestep_index_original", "timestep_id", "camera_index", "camera_id", "cx", "cy", "fl_x"),
        *("fl_y", "h", "w", "camera_angle_x", "camera_angle_y", "transform_matrix", "file_path", "fg_mask_path"),
        "flame_param_path",
    }
    assert (entry["file_path"], entry["fg_mask_path"]) == ("images/00001_01.png", "fg_masks/00001_01.png")
    assert entry["flame_param_path"] == "flame_param/00001.npz"
    assert entry["fl_x"] == pytest.approx(entry["w"] / 2 / math.tan(entry["camera_angle_x"] / 2))


def test_a_image_of_another_size_than_its_camera_is_not_written(tmp_path):
    [frame] = random_frames(1, 1)
    with pytest.raises(ValueError, match=r"images/00000_00.png is of \(7, 5\) pixels, its camera of \(8, 5\)"):
        write_frames(tmp_path, [replace(frame, width=8)])


def test_head_parameters_of_several_frames_are_not_one_timestep(tmp_path):
    [frame] = random_frames(1, 1)
    with pytest.raises(ValueError, match="timestep 0 has head parameters of 3 frames, expected its own 1"):
        write_frames(tmp_path, [replace(frame, params=HeadParameters.zeros(4, 3, 3))])


@pytest.mark.parametrize(("cameras", "held_out"), [(1, None), (3, 2), (16, 8)])
def test_the_last_third_of_the_time_is_the_test_and_one_camera_validates(cameras, held_out):
    keys = [(timestep, camera) for timestep in range(10) for camera in range(cameras)]
    split = {name: {keys[row] for row in rows} for name, rows in vhap_split(keys).items()}
    assert split["test"] == {(t, c) for t in (7, 8, 9) for c in range(cameras)}
    assert split["val"] == {(t, c) for t in range(7) for c in range(cameras) if c == held_out}
    assert split["train"] == set(keys) - split["test"] - split["val"]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "images/../../secret.png",
        "/etc/passwd",
        "C:\\secret.png",
        "..\\secret.png",
        "../EMO-2/images/0.png",
        "../EMO-1/../secret.png",
        "../EMO-1",
        "",
        "a\0b",
        None,
        7,
    ],
)
def test_a_path_out_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "UNION").mkdir()
    (tmp_path / "EMO-1").mkdir()
    with pytest.raises(ValueError, match=r"outside the folder; refused|expected a path inside"):
        resolve_inside(tmp_path / "UNION", name, frozenset({"EMO-1"}))


def test_a_union_may_name_files_of_its_sequences(tmp_path):
    for name in ("UNION", "EMO-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "UNION" / "sequences_trainval.txt").write_text("EMO-1\n\n")
    sisters = sister_folders(tmp_path / "UNION")
    assert sisters == {"EMO-1"} and sister_folders(tmp_path / "EMO-1") == set()
    path = resolve_inside(tmp_path / "UNION", "../EMO-1/images/0.png", sisters)
    assert path == tmp_path / "EMO-1" / "images" / "0.png"
    (tmp_path / "UNION" / "sequences_test.txt").write_text("../elsewhere\n")
    with pytest.raises(ValueError, match=r"sequences_test.txt: names '../elsewhere', expected names of folders beside"):
        sister_folders(tmp_path / "UNION")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "image.png").write_bytes(b"secret")
    (tmp_path / "data" / "ada" / "images").mkdir(parents=True)
    ada = tmp_path / "data" / "ada"
    (ada / "images" / "0.png").symlink_to(tmp_path / "secret" / "image.png")
    (ada / "linked").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "EMO-1").symlink_to(tmp_path / "secret")
    (ada / "loop.png").symlink_to(ada / "loop.png")
    (ada / "images" / "1.png").symlink_to(ada / "images" / "2.png")
    for name in ("images/0.png", "linked/image.png", "../EMO-1/image.png"):
        with pytest.raises(ValueError, match="a file by way of a link outside the folder; refused"):
            resolve_inside(ada, name, frozenset({"EMO-1"}))
    assert resolve_inside(ada, "images/1.png") == ada / "images" / "1.png"  # a link inside is none of our business
    assert not resolve_inside(ada, "loop.png").is_file()
    (tmp_path / "alias").symlink_to(ada)  # how the user got to the folder neither
    assert resolve_inside(tmp_path / "alias", "images/1.png").parent.parent == tmp_path / "alias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_path": "../../etc/passwd"}, r"frame 1: names '../../etc/passwd', a file outside the folder; refused"),
        ({"fg_mask_path": "/etc/passwd"}, r"frame 1: names '/etc/passwd', a file outside"),
        ({"flame_param_path": "../other/flame_param/00000.npz"}, "frame 1: names '../other.* outside the folder"),
        ({"fg_mask_path": "fg_masks/absent.png"}, "frame 1: .*fg_masks/absent.png does not exist"),
        ({"flame_param_path": "flame_param/9.npz"}, "frame 1: .*flame_param/9.npz does not exist"),
        ({"w": 9}, r"00000_01.png has 7x5 pixels, expected 9x5; resize it"),
        ({"fg_mask_path": "small.png"}, r"small.png has 2x2 pixels, expected 7x5"),
        ({"file_path": "transforms.json"}, "transforms.json is not a readable image"),
        ({"file_path": "pipe"}, "pipe does not exist"),
        ({"fl_x": "abc"}, "frame 1: could not convert"),
        ({"fl_x": float("nan")}, "frame 1: intrinsics fx=nan"),
        ({"transform_matrix": [[float("nan")] * 4] * 4}, "is not a rotation and a translation"),
        ({"timestep_index": 1e400}, "frame 1: timestep_index is inf, expected a whole number from 0"),
        ({"timestep_index": 1.5}, "frame 1: timestep_index is 1.5, expected a whole number from 0"),
        ({"timestep_index": "1"}, "frame 1: timestep_index is '1', expected a whole number"),
        ({"timestep_index": 2**31}, "frame 1: timestep_index is 2147483648, expected a whole number"),
        ({"camera_index": True}, "frame 1: camera_index is True, expected a whole number"),
        ({"camera_index": -1}, "frame 1: camera_index is -1, expected a whole number"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, change, message):
    write_frames(tmp_path, random_frames(1, 2))
    Image.new("L", (2, 2)).save(tmp_path / "small.png")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    path = tmp_path / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"][1] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_transforms(path)


def test_a_camera_angle_of_zero_is_no_camera(tmp_path):
    write_frames(tmp_path, random_frames(1, 1))
    path = tmp_path / "transforms.json"
    content = json.loads(path.read_text())
    del content["fl_x"], content["frames"][0]["fl_x"]
    content["frames"][0]["camera_angle_x"] = 0.0
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"frame 0: .*division by zero"):
        read_transforms(path)


def test_missing_images_are_counted(tmp_path):
    write_frames(tmp_path, random_frames(4, 2))
    for path in sorted((tmp_path / "images").iterdir())[2:7]:
        path.unlink()
    message = r"frame 2: .*00001_00.png does not exist \(and files of 4 more of 8 frames\); copy or export"
    with pytest.raises(ValueError, match=message):
        read_transforms(tmp_path / "transforms.json")


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, '{"frames": 3}', '{"frames": [3]}'])
def test_what_is_no_transforms_json_is_named(tmp_path, content):
    (tmp_path / "transforms.json").write_text(content)
    with pytest.raises(ValueError, match=r"transforms.json: (holds|not JSON|has no list|frame 0: is a JSON int)"):
        read_transforms(tmp_path / "transforms.json")
