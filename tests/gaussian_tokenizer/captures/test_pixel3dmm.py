"""Pixel3DMM's checkpoints: the head is where its own projection puts it, and nothing in the file is run."""

import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from gaussian_tokenizer.captures.loading import load_tracking, read_tracking
from gaussian_tokenizer.captures.projection import project
from gaussian_tokenizer.heads.head_parameters import HeadParameters

FOCAL, CENTER = 3.0, (0.05, -0.1)


def checkpoint(small_head, seed=0):
    """What the tracker saves for one frame, on our head, and the turns in it as rotations."""
    rng = np.random.default_rng(seed)
    turns = {name: Rotation.from_rotvec(0.2 * rng.standard_normal(3)) for name in ("R", "neck", "jaw", "left", "right")}
    rows = {name: turn.as_matrix()[:2].reshape(1, 6).astype(np.float32) for name, turn in turns.items()}
    flame = {
        "exp": 0.3 * rng.standard_normal((1, small_head.n_expression)).astype(np.float32),
        "shape": rng.standard_normal((1, small_head.n_shape)).astype(np.float32),
        "eyes": np.concatenate((rows["left"], rows["right"]), 1),
        "eyelids": np.array([[0.1, -0.2]], np.float32),
        "jaw": rows["jaw"],
        "neck": rows["neck"],
        "R": 1.3 * rows["R"],  # of any length
        "R_rotation_matrix": turns["R"].as_matrix()[None].astype(np.float32),
        "t": 0.05 * rng.standard_normal((1, 3)).astype(np.float32),
    }
    camera = {
        "R_base_0": Rotation.from_euler("y", 10, degrees=True).as_matrix()[None].astype(np.float32),
        "t_base_0": np.array([[0.01, 0.02, -1.0]], np.float32),
        "fl": np.array([[FOCAL]], np.float32),
        "pp": np.array([CENTER], np.float32),
    }
    content = {"flame": flame, "camera": camera, "img_size": np.array([512, 512]), "frame_id": 0, "global_step": 9}
    return content, turns


def save(folder, content, frame=0):
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "cropped").mkdir(exist_ok=True)
    torch.save(content, folder / "checkpoint" / f"{frame:05d}.frame")
    Image.new("RGB", (64, 64), (90, 80, 70)).save(folder / "cropped" / f"{frame:05d}.jpg")


def test_the_head_is_where_pixel3dmm_projects_it(tmp_path, small_head):
    content, turns = checkpoint(small_head)
    save(tmp_path / "ada", content)
    tracking = read_tracking(tmp_path / "ada", small_head)
    assert (tracking.kind, tracking.subject_id, tracking.timesteps) == ("pixel3dmm", "ada", (0,))
    assert tracking.splits["train"] == (0,) and tracking.metadata["eyelids_left_out"] == 0.2
    [frame] = tracking.frames
    ours = small_head.pose(tracking.params).vertices[0].double().numpy()
    pixels, _ = project(ours, frame, frame.viewmat)
    # Its own way: FLAME without a turn of the root, then R v + t, then an OpenGL camera.
    flame = content["flame"]
    rest = HeadParameters(
        shape=torch.from_numpy(flame["shape"][0]),
        expr=torch.from_numpy(flame["exp"]),
        rotation=torch.zeros(1, 3),
        neck_pose=torch.tensor(turns["neck"].as_rotvec()[None]).float(),
        jaw_pose=torch.tensor(turns["jaw"].as_rotvec()[None]).float(),
        eyes_pose=torch.tensor(np.concatenate([turns["left"].as_rotvec(), turns["right"].as_rotvec()])[None]).float(),
        translation=torch.zeros(1, 3),
    )
    vertices = small_head.pose(rest).vertices[0].double().numpy() @ turns["R"].as_matrix().T + flame["t"]
    seen = vertices @ content["camera"]["R_base_0"][0].T.astype(float) + content["camera"]["t_base_0"]
    x = 32 * (1 + CENTER[0]) + FOCAL * 64 * seen[:, 0] / -seen[:, 2]
    y = 32 * (1 + CENTER[1]) - FOCAL * 64 * seen[:, 1] / -seen[:, 2]
    np.testing.assert_allclose(ours, vertices, atol=1e-6)
    np.testing.assert_allclose(pixels, np.stack((x, y), 1), atol=1e-3)


def test_a_video_has_a_row_for_every_frame_and_the_first_ones_shape(tmp_path, small_head):
    contents = {frame: checkpoint(small_head, seed=frame)[0] for frame in (2, 0, 11)}
    for frame, content in contents.items():
        save(tmp_path / "ada", content, frame)
    tracking = read_tracking(tmp_path / "ada", small_head)
    assert tracking.timesteps == (0, 2, 11) and len(tracking.frames) == 3
    assert torch.equal(tracking.params.shape, torch.from_numpy(contents[0]["flame"]["shape"][0]))
    for row, frame in enumerate((0, 2, 11)):
        assert torch.equal(tracking.params.expr[row], torch.from_numpy(contents[frame]["flame"]["exp"][0]))


class Mine:
    """A pickle of this makes a folder when it is opened without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, small_head):
    content, _ = checkpoint(small_head)
    save(tmp_path / "ada", content | {"extra": Mine(tmp_path / "run")})
    with pytest.raises(ValueError, match=r"00000.frame: not a file of plain arrays as Pixel3DMM saves it"):
        load_tracking(tmp_path / "ada", small_head)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("flame", {"exp": np.full((1, 18), np.nan, np.float32)}, r"flame\['exp'\] holds NaN or Inf"),
        (
            "flame",
            {"jaw": np.zeros((1, 3), np.float32)},
            r"flame\['jaw'\] is \(1, 3\), expected \(1, ..\) with 6 numbers",
        ),
        ("flame", {"shape": np.zeros((1, 300), np.float32)}, "shape of size 300, head model 'procedural:600' has 25"),
        ("flame", {"t": None}, r"flame\['t'\] is NoneType, expected an array of numbers"),
        ("flame", {"R": np.array([[0, 0, 1, 0, 1, 0]], np.float32)}, "is not the first two rows of"),
        ("camera", None, "has no 'camera', expected Pixel3DMM's checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, small_head, part, changes, message):
    content, _ = checkpoint(small_head)
    content[part] = None if changes is None else content[part] | changes
    save(tmp_path / "ada", content)
    with pytest.raises(ValueError, match=rf"00000.frame: .*{message}"):
        load_tracking(tmp_path / "ada", small_head)


def test_a_cut_file_and_a_missing_image_are_named(tmp_path, small_head):
    save(tmp_path / "ada", checkpoint(small_head)[0])
    path = tmp_path / "ada" / "checkpoint" / "00000.frame"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00000.frame: not a file of plain arrays"):
        load_tracking(tmp_path / "ada", small_head)
    path.write_bytes(whole)
    (tmp_path / "ada" / "cropped" / "00000.jpg").unlink()
    with pytest.raises(ValueError, match=r"has no image .*cropped/00000.jpg or .png; copy the folder cropped/ again"):
        load_tracking(tmp_path / "ada", small_head)


def test_arrays_that_numpy_1_wrote_are_read(tmp_path, small_head):
    save(tmp_path / "ada", checkpoint(small_head)[0])
    path = tmp_path / "ada" / "checkpoint" / "00000.frame"
    expected = read_tracking(tmp_path / "ada", small_head).params
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert torch.equal(read_tracking(tmp_path / "ada", small_head).params.expr, expected.expr)
