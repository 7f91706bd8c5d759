"""VHAP's other forms: a UNION of sequences, and the tracker's own npz of a video."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.captures.loading import find_trackings, load_tracking, read_tracking
from gaussian_tokenizer.captures.projection import project
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.inspect.__main__ import inspect


def make_union(folder, tracked, shape_offset=0.0):
    """Two sequences, the second with a shape of its own, and the UNION as VHAP combines them: the second is the test."""
    union = folder / "UNION2_ada"
    union.mkdir(parents=True)
    first_timestep = 0
    for split, sequence in (("trainval", "EMO-1"), ("test", "EMO-2")):
        shutil.copytree(tracked, folder / sequence)
        for path in (folder / sequence / "flame_param").iterdir() if sequence == "EMO-2" else ():
            params = HeadParameters.load(path)
            replace(params, shape=params.shape + shape_offset).save(path)
        (folder / sequence / "metadata.json").unlink()
        content = json.loads((folder / sequence / "transforms.json").read_text())
        for entry in content["frames"]:
            for key in ("timestep_index_original", "timestep_id"):
                del entry[key]
            entry["timestep_index"] += first_timestep
            for key in ("file_path", "fg_mask_path", "flame_param_path"):
                entry[key] = f"../{sequence}/{entry[key]}"
        first_timestep += 4
        parts = {"test": content["frames"]}
        if split == "trainval":
            parts = {
                "train": [entry for entry in content["frames"] if entry["camera_index"] != 5],
                "val": [entry for entry in content["frames"] if entry["camera_index"] == 5],
            }
            shutil.copy(folder / sequence / "canonical_flame_param.npz", union)
        for name, entries in parts.items():
            (union / f"transforms_{name}.json").write_text(json.dumps(content | {"frames": entries}))
        (union / f"sequences_{split}.txt").write_text(f"{sequence}\n")
    return union


def test_a_union_is_read_from_its_sequences(tracked, tmp_path, small_head):
    union = make_union(tmp_path / "data", tracked, shape_offset=0.05)
    tracking = load_tracking(union, small_head)
    assert (tracking.kind, tracking.subject_id, tracking.timesteps) == ("union", "UNION2_ada", tuple(range(8)))
    assert {name: len(indices) for name, indices in tracking.splits.items()} == {"train": 20, "val": 4, "test": 24}
    assert all("EMO-2" in str(tracking.frames[index].image) for index in tracking.splits["test"])
    single = load_tracking(tracked, small_head)
    assert torch.equal(tracking.params.expr, torch.cat([single.params.expr, single.params.expr]))
    assert torch.equal(tracking.params.shape, single.params.shape)  # the first sequence's, as GaussianAvatars takes it
    distances = tracking.metadata["sequence_distances_mm"]
    assert distances["EMO-1"] == 0 and 0 < distances["EMO-2"] < 5
    assert find_trackings(tmp_path / "data") == [union]  # the sequences are in it
    report = inspect(union, small_head)
    assert report.what == "a UNION of VHAP dataset folders" and report.facts["sequences"] == ["EMO-1", "EMO-2"]
    assert report.problems == []


def test_sequences_with_heads_far_apart_are_a_warning(tracked, tmp_path, small_head):
    union = make_union(tmp_path, tracked, shape_offset=1.0)
    [problem] = inspect(union, small_head).problems
    assert not problem.is_error and "far from the first one's on average (EMO-2" in problem.text


def test_a_sequence_of_another_subject_does_not_belong_in_a_union(tracked, tmp_path, small_head):
    union = make_union(tmp_path, tracked, shape_offset=3.0)
    with pytest.raises(
        ValueError, match=r"the head of sequence EMO-2 is \d+.\d mm from that of EMO-1 .* another subject"
    ):
        load_tracking(union, small_head)


def test_a_union_may_name_only_the_sequences_it_lists(tracked, tmp_path, small_head):
    union = make_union(tmp_path, tracked)
    (union / "sequences_test.txt").unlink()
    message = r"transforms_test.json: frame 0: names '../EMO-2/images/00000_00.png', a file outside the folder"
    with pytest.raises(ValueError, match=message):
        load_tracking(union, small_head)


def make_raw(folder, small_head, timesteps=4, focal=2.0, image=(24, 32), suffix=".jpg", **changes):
    """A video of `image` (height, width) as VHAP tracked it, with what else its npz holds."""
    rng = np.random.default_rng(0)
    names = np.array([f"f{number:06d}" for number in range(timesteps)])
    arrays = {
        name: 0.1 * rng.standard_normal((timesteps, size)).astype(np.float32)
        for name, size in (("rotation", 3), ("translation", 3), ("neck_pose", 3), ("jaw_pose", 3), ("eyes_pose", 6))
    }
    arrays |= {
        "shape": 0.1 * rng.standard_normal(small_head.n_shape).astype(np.float32),
        "expr": 0.1 * rng.standard_normal((timesteps, small_head.n_expression)).astype(np.float32),
        "timestep_id": names,
        "n_processed_frames": np.array(timesteps),
        "lights": np.zeros((9, 3), np.float32),
        "focal_length": np.array([focal], np.float32),
        "image_size": np.array(image),
    }
    arrays |= changes
    (folder / "images").mkdir(parents=True)
    (folder / "alpha_maps").mkdir()
    for number, name in enumerate(names):
        for kind in ("images", "alpha_maps"):
            Image.new("RGB" if kind == "images" else "L", image[::-1], 40 * number + 20).save(
                folder / kind / f"{name}{suffix}"
            )
    np.savez(
        folder / "tracked_flame_params_30.npz", **{name: value for name, value in arrays.items() if value is not None}
    )
    return arrays


def test_a_raw_tracking_sees_the_head_where_the_tracker_did(tmp_path, small_head):
    arrays = make_raw(tmp_path / "ada", small_head)
    np.savez(tmp_path / "ada" / "tracked_flame_params_5.npz", shape=np.zeros(1))  # an earlier epoch, not looked at
    tracking = read_tracking(tmp_path / "ada", small_head)
    assert (tracking.kind, tracking.subject_id, tracking.timesteps) == ("vhap_raw", "ada", (0, 1, 2, 3))
    assert tracking.splits == {"train": (0, 1, 2), "val": (), "test": (3,)}
    assert torch.equal(tracking.params.expr, torch.from_numpy(arrays["expr"]))
    assert tracking.params.translation.mean(0).abs().max() < 1e-6  # the origin is where the head is on average
    names = ("shape", "expr", "rotation", "translation", "neck_pose", "jaw_pose", "eyes_pose")
    as_tracked = HeadParameters(**{name: torch.from_numpy(arrays[name]) for name in names})
    for number, frame in enumerate(tracking.frames):
        assert frame.image.name == f"f{number:06d}.jpg" and frame.mask.name == frame.image.name
        assert float(tracking.image(number)[0, 0, 3]) == pytest.approx((40 * number + 20) / 255, abs=0.01)
        ours = small_head.pose(tracking.params.frame(number)).vertices[0].double().numpy()
        pixels, depth = project(ours, frame, frame.viewmat)
        # The tracker's own world: the camera at (0, 0, 1) looks along -z, y up, the focal length in longer sides.
        x, y, z = small_head.pose(as_tracked.frame(number)).vertices[0].double().numpy().T
        expected = np.stack((32 / 2 + 2.0 * 32 * x / (1 - z), 24 / 2 - 2.0 * 32 * y / (1 - z)), 1)
        np.testing.assert_allclose(pixels, expected, atol=1e-3)
        np.testing.assert_allclose(depth, 1 - z, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"focal_length": None},
            "has no focal_length, so its cameras are calibrated .* export a dataset folder with VHAP",
        ),
        ({"focal_length": np.array([-1.0])}, "focal_length is -1.0, expected a number above 0"),
        ({"focal_length": np.zeros(0)}, r"focal_length is float64 \(0,\), expected a number"),
        ({"focal_length": np.array(["2.0"])}, r"focal_length is <U3 \(1,\), expected a number"),
        ({"timestep_id": np.array(["a", "b"])}, "timestep_id names 2 timesteps, expected 4 different plain names"),
        ({"timestep_id": np.array(["../secret", "b", "c", "d"])}, "timestep_id names .* plain names"),
        ({"timestep_id": np.array(["f000000", "b", "c", "d"])}, "3 of 4 timesteps have no image in .*images, .* b;"),
        ({"expr": np.zeros((3, 18), np.float32)}, r"rotation is \(4, 3\), expected \(3, 3\): expr holds 3 frames"),
        ({"timestep_id": np.array([{}] * 4)}, "timestep_id holds pickled objects, which are never opened"),
    ],
)
def test_a_raw_tracking_that_cannot_be_used_says_why(tmp_path, small_head, changes, message):
    make_raw(tmp_path / "ada", small_head, **changes)
    with pytest.raises(ValueError, match=message):
        load_tracking(tmp_path / "ada", small_head)


def test_a_raw_tracking_without_images_holds_parameters_only(tmp_path, small_head):
    make_raw(tmp_path / "ada", small_head, focal_length=None)
    shutil.rmtree(tmp_path / "ada" / "images")
    file = tmp_path / "ada" / "tracked_flame_params_30.npz"
    tracking = read_tracking(file, small_head)
    assert (tracking.subject_id, tracking.frames, tracking.params.num_frames) == ("ada", (), 4)
    with pytest.raises(ValueError, match="has head parameters, but no images beside them"):
        load_tracking(file, small_head)


@pytest.mark.parametrize("index", [1.5, True, -1, None])
def test_a_split_whose_timesteps_are_no_whole_numbers_is_refused(copy_of_tracked, small_head, index):
    path = copy_of_tracked / "transforms_val.json"
    content = json.loads(path.read_text())
    content["frames"][0]["timestep_index"] = index
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"transforms_val.json: its frames lack timestep_index or camera_index: .*expected"
    ):
        load_tracking(copy_of_tracked, small_head)
