"""Trackings: what was written as a VHAP export is read back as images, cameras and parameters; wrong ones are refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.captures.loading import find_trackings, load_tracking
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.rendering.splatting import render, to_rgba
from gaussian_tokenizer.synthetic.source import PIXELS_BETWEEN_POINTS
from gaussian_tokenizer.synthetic.subject import draw_timesteps, portrait_avatar, synthesize_subject


def change_npz(path, **arrays):
    with np.load(path) as stored:
        content = dict(stored)
    np.savez(path, **(content | arrays))


def test_a_synthetic_subject_is_read_as_it_was_made(tracked, small_head):
    tracking = load_tracking(tracked, small_head)
    assert (tracking.subject_id, tracking.kind) == ("synthetic-3-000000", "vhap")
    assert tracking.metadata["license"] == "CC0-1.0"
    assert tracking.timesteps == (0, 1, 2, 3)
    assert [(each.timestep, each.camera) for each in tracking.frames] == [(t, c) for t in range(4) for c in range(6)]
    subject = synthesize_subject(small_head, (3, 0), 60)
    motion = draw_timesteps(subject, 4, (3, 0, 1))
    for name, tensor in motion.tensors().items():
        assert torch.equal(tracking.params.tensors()[name], tensor), name
    made = portrait_cameras(small_head, 40, [0, 30, -30, 60, -60, 90])
    read = tracking.cameras(range(6))
    assert (read.width, read.height) == (40, 40)
    assert (read.viewmats - made.viewmats).abs().max() <= 1e-12 and (read.Ks - made.Ks).abs().max() <= 1e-12
    # The image of a timestep, rendered again from what was read, is the image that was read.
    index = 4 * 3 + 1
    frame = tracking.frames[index]
    avatar = portrait_avatar(subject, PIXELS_BETWEEN_POINTS / float(made.Ks[0, 0, 0]))
    drawn = render(avatar.posed(tracking.params.frame(tracking.row(frame))), tracking.cameras([index]), background=0.0)
    drawn = to_rgba(drawn.image[0], drawn.alpha[0])
    assert np.abs(drawn.astype(int) - np.asarray(Image.open(frame.image))).max() <= 1
    assert np.array_equal(np.asarray(Image.open(frame.mask)), np.asarray(Image.open(frame.image))[..., 3])


def test_splits_are_those_of_the_files(copy_of_tracked, small_head):
    tracking = load_tracking(copy_of_tracked, small_head)
    keys = {
        name: {(tracking.frames[index].timestep, tracking.frames[index].camera) for index in indices}
        for name, indices in tracking.splits.items()
    }
    assert keys["train"] == {(t, c) for t in range(3) for c in range(5)}
    assert keys["val"] == {(t, 5) for t in range(3)}
    assert keys["test"] == {(3, c) for c in range(6)}
    # Whoever splits otherwise is followed; who says nothing gets VHAP's rule.
    path = copy_of_tracked / "transforms_test.json"
    content = json.loads(path.read_text())
    content["frames"] = content["frames"][:1]
    path.write_text(json.dumps(content))
    assert load_tracking(copy_of_tracked, small_head).splits["test"] == (18,)
    for name in ("train", "val", "test"):
        (copy_of_tracked / f"transforms_{name}.json").unlink()
    assert load_tracking(copy_of_tracked, small_head).splits == tracking.splits


def test_alpha_is_the_images_own_or_the_masks_or_one(copy_of_tracked, small_head, change_frames):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (40, 40, 4), dtype=np.uint8) for name in ("own", "mask", "none")}
    paths = sorted((copy_of_tracked / "images").iterdir())
    for path, (name, rgba) in zip(paths, images.items()):
        Image.fromarray(rgba if name == "own" else rgba[..., :3]).save(path)
        Image.fromarray(rgba[..., 3]).save(copy_of_tracked / "fg_masks" / path.name)
    from gaussian_tokenizer.captures.loading import read_tracking

    change_frames(copy_of_tracked, lambda entry: entry.pop("fg_mask_path"), row=2)
    tracking = read_tracking(copy_of_tracked, small_head)
    for index, (name, rgba) in enumerate(images.items()):
        found = tracking.image(index)
        assert found.dtype == torch.float32 and found.shape == (40, 40, 4)
        expected = rgba.astype(np.float32) / 255
        if name == "none":
            expected[..., 3] = 1
        assert np.array_equal(found.numpy(), expected), name


def test_a_monocular_export_is_recognized(copy_of_tracked, small_head):
    for path in copy_of_tracked.glob("transforms*.json"):
        content = json.loads(path.read_text())
        content["frames"] = [entry for entry in content["frames"] if entry["camera_index"] == 0]
        path.write_text(json.dumps(content))
    tracking = load_tracking(copy_of_tracked, small_head)
    assert tracking.kind == "monocular" and len(tracking.frames) == 4
    assert tracking.splits == {"train": (0, 1, 2), "val": (), "test": (3,)}


def test_parameters_of_another_head_model_are_refused(tracked, copy_of_tracked, small_head):
    with pytest.raises(
        ValueError, match=r"was made on head model 'procedural:600' .*give the head model it was made on"
    ):
        load_tracking(tracked, build_procedural_head(700))
    for path in (copy_of_tracked / "flame_param").iterdir():
        change_npz(path, shape=np.zeros(300, np.float32))
    with pytest.raises(ValueError, match="shape of size 300, head model 'procedural:600' has 25"):
        load_tracking(copy_of_tracked, small_head)


def test_parameters_of_another_subject_are_refused(copy_of_tracked, small_head):
    path = copy_of_tracked / "flame_param" / "00002.npz"
    change_npz(path, shape=HeadParameters.load(path).shape.numpy() + np.float32(0.5))
    message = r"flame_param/00002.npz: its shape differs from that of 00000.npz by up to 0.5: it is of another subject"
    with pytest.raises(ValueError, match=message):
        load_tracking(copy_of_tracked, small_head)


def test_parameters_of_a_whole_sequence_are_no_timestep(copy_of_tracked, small_head):
    params = HeadParameters.load(copy_of_tracked / "flame_param" / "00001.npz")
    several = {name: value.expand(4, -1).clone() for name, value in params.tensors().items() if name != "shape"}
    replace(params, **several).save(copy_of_tracked / "flame_param" / "00001.npz")
    with pytest.raises(ValueError, match=r"00001.npz: holds 4 frames, expected the 1 of timestep 1"):
        load_tracking(copy_of_tracked, small_head)


def test_parameters_with_an_offset_in_one_file_only_are_refused(copy_of_tracked, small_head):
    offset = np.zeros((1, small_head.n_vertices, 3), np.float32)
    change_npz(copy_of_tracked / "flame_param" / "00000.npz", static_offset=offset)
    shape = rf"\({small_head.n_vertices}, 3\)"
    with pytest.raises(ValueError, match=rf"00001.npz: static_offset is missing, but {shape} in .*00000.npz"):
        load_tracking(copy_of_tracked, small_head)


def test_nan_in_a_parameter_is_named(copy_of_tracked, small_head):
    change_npz(copy_of_tracked / "flame_param" / "00001.npz", jaw_pose=np.array([[0, np.nan, 0]], np.float32))
    with pytest.raises(ValueError, match=r"flame_param/00001.npz: jaw_pose holds nan at index \[0, 1\]"):
        load_tracking(copy_of_tracked, small_head)


def test_a_timestep_has_one_head(copy_of_tracked, small_head, change_frames):
    change_frames(copy_of_tracked, lambda entry: entry.update(flame_param_path="flame_param/00001.npz"), row=2)
    with pytest.raises(ValueError, match=r"timestep 0 has two flame_param files, 00000.npz and 00001.npz"):
        load_tracking(copy_of_tracked, small_head)


def test_a_split_of_frames_that_are_not_there_is_refused(copy_of_tracked, small_head):
    path = copy_of_tracked / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"] = content["frames"][:-2]
    path.write_text(json.dumps(content))
    message = r"transforms_test.json: has timestep 3 of camera 4, which transforms.json lacks \(2 such frames\)"
    with pytest.raises(ValueError, match=message):
        load_tracking(copy_of_tracked, small_head)


def test_cameras_of_different_images_are_not_one_set(copy_of_tracked, small_head, change_frames):
    from gaussian_tokenizer.captures.loading import read_tracking

    for folder in ("images", "fg_masks"):
        path = copy_of_tracked / folder / "00000_01.png"
        Image.open(path).resize((20, 30)).save(path)
    change_frames(copy_of_tracked, lambda entry: entry.update(w=20, h=30) if "00000_01" in entry["file_path"] else None)
    tracking = read_tracking(copy_of_tracked, small_head)
    assert len(tracking.cameras([0, 2])) == 2 and tracking.cameras([1]).height == 30
    with pytest.raises(ValueError, match=r"images of different sizes: 20x30 \(1\), 40x40 \(2\)"):
        tracking.cameras([0, 1, 2])
    with pytest.raises(ValueError, match="images of different sizes: 23 of 40x40, 1 of 20x30; resize them to one"):
        load_tracking(copy_of_tracked, small_head)


def test_trackings_are_found_by_name_and_have_different_ids(tracked, tmp_path, small_head):
    for name in ("b", "a"):
        shutil.copytree(tracked, tmp_path / name)
        (tmp_path / name / "metadata.json").write_text(json.dumps({"avatar_id": f"subject {name}"}))
    (tmp_path / "notes").mkdir()
    assert find_trackings(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert find_trackings(tmp_path / "a") == [tmp_path / "a"]
    (tmp_path / "b" / "metadata.json").write_text(json.dumps({"avatar_id": "subject a"}))
    with pytest.raises(ValueError, match=r"a, b have one subject id, 'subject a'; give each its own in metadata.json"):
        find_trackings(tmp_path)
    with pytest.raises(FileNotFoundError, match="none of its 0 folders is a tracking; expected a VHAP dataset folder"):
        find_trackings(tmp_path / "notes")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tracking(tmp_path / "absent", small_head)
