"""Subject folders: what is written is read back, cameras are converted at the border, bad folders are named."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.subject import Subject, find_subjects, write_subject
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters


def tiny_head(seed=0, vertices=10, faces=16):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return torch.tensor(rng.standard_normal(shape), dtype=torch.float32) * 0.05

    return HeadModel(
        name=f"tiny {seed}",
        template=normal(vertices, 3),
        faces=torch.tensor(np.stack([rng.permutation(vertices)[:3] for _ in range(faces)])),
        shape_dirs=normal(vertices, 3, 3) * 0.2,
        expression_dirs=normal(vertices, 3, 2) * 0.2,
        pose_dirs=normal(vertices, 3, 36) * 0.01,
        joint_regressor=torch.tensor(rng.dirichlet(np.ones(vertices), 5), dtype=torch.float32),
        skinning_weights=torch.tensor(rng.dirichlet(np.ones(5), vertices), dtype=torch.float32),
        parents=(-1, 0, 1, 1, 1),
        expression_names=("smile", "frown"),
        landmark_faces=torch.zeros(0, dtype=torch.int64),
        landmark_barycentrics=torch.zeros(0, 3),
        regions={},
    )


HEAD = tiny_head()


def random_avatar(seed=0, count=12, num_frames=3):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    params = HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression, num_frames)
    params = replace(params, shape=normal(HEAD.n_shape), expr=normal(num_frames, HEAD.n_expression))
    return GaussianAvatar(
        positions=normal(count, 3),
        faces=torch.randint(0, HEAD.n_faces, (count,), generator=generator),
        sh=normal(count, 1, 3),
        opacities=normal(count),
        scales=normal(count, 3),
        quats=normal(count, 4),
        params=params,
    ).with_head(HEAD)


def image(seed=0, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def frames_of(avatar, cameras=2, size=8):
    viewmat = np.eye(4)
    viewmat[1:3, 1:3] *= -1
    viewmat[2, 3] = 1.0
    return [
        Frame(timestep, camera, viewmat, 20.0, 21.0, 3.5, 4.75, size, size, image(10 * timestep + camera, size), params)
        for timestep in range(avatar.params.num_frames)
        for camera in range(cameras)
        for params in [avatar.params.frame(timestep)]
    ]


def test_a_written_subject_is_read_back(tmp_path):
    avatar = random_avatar()
    frames = frames_of(avatar)
    write_subject(tmp_path / "ada", avatar, frames, {"license": "CC0-1.0", "consent": "synthetic", "seed": 3})
    subject = Subject.open(tmp_path / "ada")
    assert (subject.avatar_id, *subject.about[:2]) == ("ada", "CC0-1.0", "synthetic")
    assert subject.metadata["seed"] == 3 and subject.metadata["head_hash"] == HEAD.hash
    loaded = subject.load_avatar(HEAD)
    assert torch.equal(loaded.positions, avatar.positions) and torch.equal(loaded.faces, avatar.faces)
    assert torch.equal(loaded.params.expr, avatar.params.expr)
    read = subject.frames()
    assert [(frame.timestep, frame.camera) for frame in read] == [(t, c) for t in range(3) for c in range(2)]
    for found, given in zip(read, frames):
        np.testing.assert_allclose(found.viewmat, given.viewmat, atol=1e-15)
        np.testing.assert_allclose(found.K, given.K)
        assert (found.width, found.height) == (given.width, given.height)
        np.testing.assert_array_equal(np.asarray(Image.open(found.image)), given.image)
        assert found.image_bytes() == found.image.read_bytes()
        assert torch.equal(found.load_params().expr, given.params.expr)


def test_a_camera_of_a_file_is_turned_to_world_to_camera_opencv(tmp_path):
    avatar = random_avatar(num_frames=1)
    write_subject(tmp_path / "ada", avatar, frames_of(avatar, cameras=1))
    path = tmp_path / "ada" / "transforms.json"
    transforms = json.loads(path.read_text())
    angle = 0.3
    camera_to_world = np.eye(4)
    camera_to_world[:3, :3] = [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    camera_to_world[:3, 3] = [0.4, 0.1, 1.2]
    transforms["frames"][0]["transform_matrix"] = camera_to_world.tolist()
    transforms["frames"][0] |= {"cy": 3.0, "cx": 5.0}
    path.write_text(json.dumps(transforms))
    frame = Subject.open(tmp_path / "ada").frames()[0]
    # A point 2 m in front of the camera, 0.1 m to its right and 0.2 m up, in its own OpenGL axes.
    world = camera_to_world @ [0.1, 0.2, -2.0, 1.0]
    np.testing.assert_allclose(frame.viewmat @ world, [0.1, -0.2, 2.0, 1.0], atol=1e-12)
    x, y, depth = frame.K @ (frame.viewmat @ world)[:3]
    assert x / depth == pytest.approx(5.0 + 20.0 * 0.05)
    assert y / depth == pytest.approx((8 - 3.0) - 21.0 * 0.1)  # up in the world is up in the image


def test_a_folder_has_what_gaussianavatars_needs_to_recognize_it(tmp_path):
    avatar = random_avatar(num_frames=10)
    write_subject(tmp_path / "ada", avatar, frames_of(avatar, cameras=3))
    canonical = HeadParameters.load(tmp_path / "ada" / "canonical_flame_param.npz")
    assert canonical.jaw_pose.tolist() == [[pytest.approx(0.3), 0, 0]] and not canonical.expr.any()
    split = {
        name: {
            (frame["timestep_index"], frame["camera_index"])
            for frame in json.loads((tmp_path / "ada" / f"transforms_{name}.json").read_text())["frames"]
        }
        for name in ("train", "val", "test")
    }
    assert split["train"] == {(t, c) for t in range(7) for c in range(2)}
    assert split["val"] == {(t, 2) for t in range(7)}
    assert split["test"] == {(t, c) for t in range(7, 10) for c in range(3)}


def test_a_field_of_view_alone_is_a_camera_too(tmp_path):
    avatar = random_avatar(num_frames=1)
    write_subject(tmp_path / "ada", avatar, frames_of(avatar, cameras=1))
    path = tmp_path / "ada" / "transforms.json"
    entry = json.loads(path.read_text())["frames"][0]
    kept = ("timestep_index", "camera_index", "transform_matrix", "file_path", "flame_param_path", "camera_angle_x")
    path.write_text(json.dumps({"frames": [{key: entry[key] for key in kept}]}))
    frame = Subject.open(tmp_path / "ada").frames()[0]
    assert (frame.width, frame.height, frame.cx, frame.cy) == (8, 8, 4.0, 4.0)
    assert frame.fx == pytest.approx(20.0) and frame.fy == frame.fx


def test_a_plain_gaussianavatars_folder_is_a_subject_without_frames(tmp_path):
    random_avatar().save(tmp_path / "306" / "point_cloud" / "iteration_30")
    (tmp_path / "306" / "point_cloud" / "iteration_30" / "metadata.json").unlink()
    (tmp_path / "notes").mkdir()
    [subject] = find_subjects(tmp_path)
    assert (subject.avatar_id, subject.about.license, subject.frames()) == ("306", "unknown", [])
    assert len(subject.load_avatar(HEAD)) == 12


def test_a_folder_without_avatars_says_the_layout_it_expected(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no avatars in its 1 folders; expected <avatar_id>/point_cloud.ply"):
        find_subjects(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_subjects(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform_matrix": [[1, 0, 0]]}, r"frame 1: transform_matrix is \(1, 3\)"),
        ({"transform_matrix": (2 * np.eye(4)).tolist()}, "frame 1: transform_matrix .* not a rotation"),
        ({"file_path": "images/absent.png"}, "frame 1: .*absent.png does not exist"),
        ({"fl_x": -1.0}, "frame 1: intrinsics fx=-1.0"),
        ({"timestep_index": None}, "frame 1: "),
        ({"camera_index": 0}, "two frames of timestep 0 and camera 0"),
    ],
)
def test_a_bad_frame_is_named(tmp_path, change, message):
    avatar = random_avatar(num_frames=1)
    write_subject(tmp_path / "ada", avatar, frames_of(avatar))
    path = tmp_path / "ada" / "transforms.json"
    transforms = json.loads(path.read_text())
    transforms["frames"][1] |= change
    path.write_text(json.dumps(transforms))
    with pytest.raises(ValueError, match=message):
        Subject.open(tmp_path / "ada").frames()


def test_a_frame_that_lacks_a_path_or_a_file_that_is_not_json_is_named(tmp_path):
    avatar = random_avatar(num_frames=1)
    write_subject(tmp_path / "ada", avatar, frames_of(avatar))
    path = tmp_path / "ada" / "transforms.json"
    transforms = json.loads(path.read_text())
    del transforms["frames"][0]["flame_param_path"]
    path.write_text(json.dumps(transforms))
    with pytest.raises(ValueError, match=r"transforms.json: frame 0 lacks 'flame_param_path'"):
        Subject.open(tmp_path / "ada").frames()
    for content in ("{", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"transforms.json: not JSON"):
            Subject.open(tmp_path / "ada").frames()


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    avatar = random_avatar(num_frames=1)
    frames = frames_of(avatar, cameras=1)
    with pytest.raises(ValueError, match="two frames of timestep 0 and camera 0"):
        write_subject(tmp_path / "ada", avatar, frames + frames)
    assert list(tmp_path.iterdir()) == []
