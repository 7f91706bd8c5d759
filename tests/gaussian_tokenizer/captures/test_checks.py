"""What cannot be right is refused with one sequence that says what it is; what may be right is a warning."""

import json

import numpy as np
import pytest
from PIL import Image

from gaussian_tokenizer.captures.checks import find_problems
from gaussian_tokenizer.captures.loading import load_tracking, read_tracking

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def texts(folder, head):
    return [(problem.is_error, problem.text) for problem in find_problems(read_tracking(folder, head), head)]


def change_matrices(change_frames, folder, change):
    def apply(entry):
        entry["transform_matrix"] = change(np.array(entry["transform_matrix"])).tolist()

    change_frames(folder, apply)


def test_nothing_is_wrong_with_a_synthetic_subject(tracked, small_head):
    assert texts(tracked, small_head) == []


@pytest.mark.parametrize(
    ("change", "convention", "remedy"),
    [
        (lambda m: m @ FLIP, "camera-to-world with OpenCV axes", "negate the second and third column"),
        (lambda m: np.linalg.inv(m), "world-to-camera with OpenGL axes", "invert it"),
        (lambda m: np.linalg.inv(m @ FLIP), "world-to-camera with OpenCV axes", "invert it, then negate"),
    ],
)
def test_another_camera_convention_is_recognized_and_named(
    copy_of_tracked, small_head, change_frames, change, convention, remedy
):
    change_matrices(change_frames, copy_of_tracked, change)
    message = (
        rf"the cameras do not see the head: \d+% of it is in the images; 9\d% would be, were transform_matrix {convention}; "
        rf"expected camera-to-world with OpenGL axes .*: {remedy}"
    )
    with pytest.raises(ValueError, match=message):
        load_tracking(copy_of_tracked, small_head)


def test_a_single_camera_in_front_fits_two_conventions(copy_of_tracked, small_head, change_frames):
    for path in copy_of_tracked.glob("transforms*.json"):
        content = json.loads(path.read_text())
        content["frames"] = [entry for entry in content["frames"] if entry["camera_index"] == 0]
        for entry in content["frames"]:  # straight in front, at the height of the origin
            entry["transform_matrix"] = (np.array([*np.eye(4)[:2], [0, 0, 1, 1.0], [0, 0, 0, 1.0]]) @ FLIP).tolist()
        path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="camera-to-world with OpenCV axes or world-to-camera with OpenCV axes; expected"
    ):
        load_tracking(copy_of_tracked, small_head)


def test_cameras_that_no_convention_explains_are_refused(copy_of_tracked, small_head, change_frames):
    def away(matrix):
        matrix[:3, 3] += [0, 30, 0]
        return matrix

    change_matrices(change_frames, copy_of_tracked, away)
    with pytest.raises(ValueError, match=r"the cameras do not see the head: 0% .*no other convention fits either"):
        load_tracking(copy_of_tracked, small_head)


def test_millimeters_are_noticed(copy_of_tracked, small_head, change_frames):
    def in_millimeters(matrix):
        matrix[:3, 3] *= 1000
        return matrix

    change_matrices(change_frames, copy_of_tracked, in_millimeters)
    with pytest.raises(
        ValueError, match=r"the head covers 0.0\d% of the images, .* 1e\+03 m away; .* in millimeters\?"
    ):
        load_tracking(copy_of_tracked, small_head)


def test_cameras_inside_the_head_are_refused(copy_of_tracked, small_head, change_frames):
    middle = small_head.template[~small_head.regions["neck"]].mean(0).numpy()

    def inside(matrix):
        matrix[:3, 3] = middle
        return matrix

    change_matrices(change_frames, copy_of_tracked, inside)
    with pytest.raises(ValueError, match=r"16 of 16 sampled cameras are inside the head, the first is camera 0 at"):
        load_tracking(copy_of_tracked, small_head)


def test_one_camera_that_sees_nothing_is_a_warning(copy_of_tracked, small_head, change_frames):
    def turn_away(entry):
        if entry["camera_index"] == 2:
            entry["transform_matrix"] = (np.array(entry["transform_matrix"]) @ FLIP).tolist()

    change_frames(copy_of_tracked, turn_away)
    [(is_error, text)] = texts(copy_of_tracked, small_head)
    assert not is_error and "camera 2 at timestep" in text and text.endswith("sees nothing of the head")
    load_tracking(copy_of_tracked, small_head)


def change_images(folder, change):
    for path in folder.iterdir():
        with Image.open(path) as image:
            changed = change(np.asarray(image))
        Image.fromarray(changed).save(path)


def test_inverted_masks_are_recognized(copy_of_tracked, small_head):
    change_images(copy_of_tracked / "fg_masks", lambda mask: 255 - mask)
    message = (
        r"the masks \(fg_masks\) are inverted: mean 0.\d\d on the projected head, 0.\d\d around it; expected white"
    )
    with pytest.raises(ValueError, match=message):
        load_tracking(copy_of_tracked, small_head)


def test_inverted_alpha_is_recognized(copy_of_tracked, small_head):
    change_images(copy_of_tracked / "images", lambda image: np.dstack((image[..., :3], 255 - image[..., 3])))
    with pytest.raises(ValueError, match="the alpha of the images is inverted"):
        load_tracking(copy_of_tracked, small_head)


def test_masks_that_are_empty_are_not_called_inverted(copy_of_tracked, small_head):
    change_images(copy_of_tracked / "fg_masks", lambda mask: 0 * mask)
    with pytest.raises(ValueError, match=r"the masks \(fg_masks\) are not on the head: mean 0.00"):
        load_tracking(copy_of_tracked, small_head)


def test_a_subject_whose_every_image_is_black_is_refused(copy_of_tracked, small_head):
    change_images(copy_of_tracked / "images", lambda image: 0 * image[..., :3])
    with pytest.raises(ValueError, match="every image is black; export the images again"):
        load_tracking(copy_of_tracked, small_head)
    Image.new("RGB", (40, 40), "white").save(copy_of_tracked / "images" / "00003_05.png")
    load_tracking(copy_of_tracked, small_head)  # one that is not is enough


def test_a_background_that_nothing_cuts_out_is_a_warning(copy_of_tracked, small_head, change_frames):
    change_images(copy_of_tracked / "images", lambda image: image[..., :3])
    assert texts(copy_of_tracked, small_head) == []  # masks do
    change_frames(copy_of_tracked, lambda entry: entry.pop("fg_mask_path"))
    [(is_error, text)] = texts(copy_of_tracked, small_head)
    assert not is_error and text.startswith("no masks, and images without alpha")


def test_masks_of_some_images_only_are_refused(copy_of_tracked, small_head, change_frames):
    change_images(copy_of_tracked / "images", lambda image: image[..., :3])
    change_frames(copy_of_tracked, lambda entry: entry.pop("fg_mask_path") if entry["camera_index"] == 1 else None)
    with pytest.raises(
        ValueError, match=r"masks are missing for \d of 16 sampled images, the first of timestep 0 from"
    ):
        load_tracking(copy_of_tracked, small_head)


def test_a_image_that_is_cut_short_is_named(copy_of_tracked, small_head):
    path = copy_of_tracked / "images" / "00000_00.png"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"00000_00.png is not a readable image"):
        load_tracking(copy_of_tracked, small_head)


def test_frames_without_images_and_without_a_split_are_warnings(copy_of_tracked, small_head):
    for name in ("transforms.json", "transforms_train.json"):
        content = json.loads((copy_of_tracked / name).read_text())
        content["frames"] = content["frames"][:3] + content["frames"][4:]
        (copy_of_tracked / name).write_text(json.dumps(content))
    assert texts(copy_of_tracked, small_head) == [
        (False, "1 images are missing, the first of timestep 0 from camera 3")
    ]
    content = json.loads((copy_of_tracked / "transforms_train.json").read_text())
    (copy_of_tracked / "transforms_train.json").write_text(json.dumps(content | {"frames": content["frames"][:-2]}))
    assert (False, "2 of 23 frames are in no split") in texts(copy_of_tracked, small_head)


def test_a_tracking_without_frames_to_train_on_is_refused(copy_of_tracked, small_head):
    content = json.loads((copy_of_tracked / "transforms_train.json").read_text())
    (copy_of_tracked / "transforms_train.json").write_text(json.dumps(content | {"frames": []}))
    with pytest.raises(ValueError, match="has no frames to train on: its train split is empty"):
        load_tracking(copy_of_tracked, small_head)
