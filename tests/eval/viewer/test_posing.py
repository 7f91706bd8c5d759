"""Fast posing against `GaussianAvatar.posed`, which has tests of its own."""

import pytest
import torch

from eval.viewer.posing import Rig
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.motions import expression_frames, synthetic_motion
from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.subject import synthesize_subject


@pytest.fixture(scope="module")
def avatar() -> GaussianAvatar:
    return synthesize_subject(build_procedural_head(600), 1, num_points=300).avatar


def test_every_pose_is_that_of_the_avatar(avatar):
    rig = Rig.of(avatar)
    motion = synthetic_motion("look_around", avatar.head, 4)
    poses = [*expression_frames(avatar.head).values(), *(motion.frame(index) for index in range(4))]
    for params in poses:
        expected = avatar.posed(params)
        axes = quaternion_to_matrix(expected.quats[0]) * expected.scales[0, :, None]
        splats = rig.pose(params)
        torch.testing.assert_close(torch.from_numpy(splats.centers), expected.positions[0], atol=1e-6, rtol=0)
        covariances = torch.from_numpy(splats.covariances)
        assert (covariances - axes @ axes.mT).abs().max() < 1e-5 * (axes @ axes.mT).abs().max()


def test_one_pose_leaves_no_trace_in_the_next(avatar):
    rig, frames = Rig.of(avatar), expression_frames(avatar.head)
    before = rig.pose(frames["neutral"])
    rig.pose(frames["turn"])
    after = rig.pose(frames["neutral"])
    assert (before.centers == after.centers).all() and (before.covariances == after.covariances).all()


def test_fewer_points_are_posed_as_they_are_among_all(avatar):
    rig, params = Rig.of(avatar), expression_frames(avatar.head)["turn"]
    every, all_points = rig.every(3).pose(params), rig.pose(params)
    torch.testing.assert_close(every.centers, all_points.centers[::3], atol=1e-7, rtol=0)
    torch.testing.assert_close(every.covariances, all_points.covariances[::3], atol=1e-9, rtol=1e-4)


def test_an_avatar_of_points_alone_is_refused(avatar):
    points = GaussianAvatar.from_points(avatar.canonical_points(), avatar.params, avatar.head)
    with pytest.raises(ValueError, match="holds points only"):
        Rig.of(points)
