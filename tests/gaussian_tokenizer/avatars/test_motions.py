"""Motions: read from trackers' files, or made up for any head, closed and plausible."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gaussian_tokenizer.avatars.motions import MOTIONS, expression_frames, load_motion, synthetic_motion
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

HEAD = build_procedural_head(600)
ARKIT = ("jawOpen", "mouthSmile_L", "mouthSmile_R", "eyeBlink_L", "eyeBlink_R", "browInnerUp_L", "browInnerUp_R")


def head_with(names) -> HeadModel:
    """The small head with other expressions: as many random directions as names."""
    directions = torch.randn(HEAD.n_vertices, 3, len(names), generator=torch.Generator().manual_seed(0)) * 1e-3
    return replace(HEAD, expression_names=tuple(names), expression_dirs=directions)


HEADS = {"procedural": HEAD, "arkit": head_with(ARKIT), "flame": head_with([f"expression_{i:03d}" for i in range(100)])}


def random_params(num_frames=4, head=HEAD, seed=0) -> HeadParameters:
    generator = torch.Generator().manual_seed(seed)
    zeros = HeadParameters.zeros(head.n_shape, head.n_expression, num_frames)
    values = {name: torch.randn(value.shape, generator=generator) for name, value in zeros.tensors().items()}
    return HeadParameters(**values, dynamic_offset=torch.randn(num_frames, head.n_vertices, 3, generator=generator))


def assert_same_motion(first: HeadParameters, second: HeadParameters) -> None:
    for name in (*FRAME_KEYS, "dynamic_offset"):
        assert torch.equal(first.tensors()[name], second.tensors()[name]), name


# Files


def test_a_parameter_file_and_the_folder_of_its_avatar_are_the_same_motion(tmp_path):
    params = random_params()
    params.save(tmp_path / "flame_param.npz")
    for path in (tmp_path / "flame_param.npz", tmp_path):
        assert_same_motion(load_motion(path, HEAD), params)


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_of_timesteps_is_read_in_the_order_of_their_numbers(tmp_path, inside):
    params = random_params(12)
    folder = tmp_path / "flame_param"
    folder.mkdir()
    for timestep in range(12):
        params.frame(timestep).save(folder / f"{timestep + 995:d}.npz")  # 995 to 1006: by name, 1000 would come first
    (folder / "notes.npz").write_bytes(b"not a timestep")
    motion = load_motion(folder if inside else tmp_path, HEAD)
    assert_same_motion(motion, params)
    assert torch.equal(motion.shape, params.shape)


def test_the_motion_of_someone_tracked_with_more_shape_components_is_read(tmp_path):
    replace(random_params(), shape=torch.zeros(300)).save(tmp_path / "a.npz")
    assert load_motion(tmp_path / "a.npz", HEAD).num_frames == 4


def test_a_motion_of_another_head_model_is_named_with_its_file(tmp_path):
    random_params(head=HEADS["flame"]).save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz: the motion has 100 expression components, .* has 18; give"):
        load_motion(tmp_path / "a.npz", HEAD)


def test_timesteps_that_do_not_fit_together_are_named(tmp_path):
    random_params(1).save(tmp_path / "00000.npz")
    random_params(1, head=HEADS["flame"]).save(tmp_path / "00001.npz")
    with pytest.raises(ValueError, match=r"00001\.npz: expr is \(1, 100\), but \(1, 18\) in 00000\.npz"):
        load_motion(tmp_path, HEAD)
    replace(random_params(1), dynamic_offset=None).save(tmp_path / "00001.npz")
    with pytest.raises(ValueError, match=r"00001\.npz: dynamic_offset is missing"):
        load_motion(tmp_path, HEAD)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody"):
        load_motion(tmp_path / "nobody.npz", HEAD)
    with pytest.raises(FileNotFoundError, match=r"no motion: holds neither flame_param\.npz nor flame_param/"):
        load_motion(tmp_path, HEAD)
    (tmp_path / "00000.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"00000\.npz: not a readable npz"):
        load_motion(tmp_path, HEAD)


# Made up


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", MOTIONS)
def test_a_synthetic_motion_is_smooth_closed_and_plausible_on_any_head(name, kind):
    head = HEADS[kind]
    motion = synthetic_motion(name, head, 96)
    assert motion.num_frames == 96
    head.check(motion)
    vertices = head.pose(motion).vertices
    steps = (vertices - vertices.roll(1, 0)).norm(dim=-1).amax(1)  # meters to the frame before, around the end
    assert (vertices - vertices[:1]).norm(dim=-1).max() > 0.002  # it moves
    assert steps[0] <= 1.05 * steps[1:].max() and steps.max() < 0.02  # and nowhere jumps
    for joint in ("rotation", "neck_pose", "jaw_pose", "eyes_pose"):
        assert motion.tensors()[joint].abs().max() < 0.61  # 35 degrees
    assert motion.jaw_pose[:, 0].min() >= 0 and motion.jaw_pose.max() < 0.26
    limit = 1.6 if kind == "flame" else 1.01
    assert motion.expr.min() >= 0 and motion.expr.max() < limit


@pytest.mark.parametrize("name", MOTIONS)
def test_a_synthetic_motion_is_the_same_every_time_and_finer_with_more_frames(name):
    coarse, again, fine = (synthetic_motion(name, HEAD, count) for count in (24, 24, 48))
    for key in FRAME_KEYS:
        assert torch.equal(coarse.tensors()[key], again.tensors()[key])
        torch.testing.assert_close(coarse.tensors()[key], fine.tensors()[key][::2], atol=1e-6, rtol=0)


def test_talking_opens_the_mouth_and_closes_it_several_times():
    jaw = synthetic_motion("talk", HEAD, 96).jaw_pose[:, 0].numpy()
    peaks = (jaw > np.roll(jaw, 1)) & (jaw >= np.roll(jaw, -1)) & (jaw > 0.05)
    assert 3 <= peaks.sum() <= 10
    assert jaw.max() > 0.12 and jaw.min() < 0.02


def test_nodding_lowers_the_chin_first_and_looking_around_turns_both_ways():
    vertices = HEAD.pose(synthetic_motion("nod", HEAD, 48)).vertices
    front = HEAD.template[:, 2].argmax()
    assert vertices[6, front, 1] < vertices[0, front, 1] - 0.01
    assert vertices[18, front, 1] > vertices[0, front, 1] + 0.01
    sideways = HEAD.pose(synthetic_motion("look_around", HEAD, 48)).vertices[:, front, 0]
    assert sideways.max() > 0.04 and sideways.min() < -0.04


def test_the_walk_shows_every_expression_with_its_other_side():
    expr = synthetic_motion("expressions", HEAD, 480).expr
    assert (expr.max(0).values > 0.95).all()
    names = HEAD.expression_names
    assert torch.equal(expr[:, names.index("smile_left")], expr[:, names.index("smile_right")])
    at_peak = expr[expr[:, names.index("pucker")].argmax()]
    assert at_peak[names.index("mouth_wide")] < 0.1 and (at_peak > 0.1).sum() == 1
    flame = synthetic_motion("expressions", HEADS["flame"], 480).expr
    assert (flame[:, :10].max(0).values > 1.4).all() and not flame[:, 10:].any()


def test_an_unknown_motion_or_no_frames_are_refused():
    with pytest.raises(ValueError, match="motion 'dance': expected one of talk, nod, look_around, expressions"):
        synthetic_motion("dance", HEAD)
    with pytest.raises(ValueError, match="0 frames"):
        synthetic_motion("nod", HEAD, 0)


@pytest.mark.parametrize("kind", HEADS)
def test_expression_frames_differ_from_each_other_on_any_head(kind):
    head = HEADS[kind]
    frames = expression_frames(head)
    assert next(iter(frames)) == "neutral" and {"smile", "jaw_open", "brows_up", "blink", "turn"} <= frames.keys()
    vertices = torch.stack([head.pose(params).vertices[0] for params in frames.values()])
    torch.testing.assert_close(vertices[0], head.template, atol=1e-6, rtol=0)
    apart = (vertices[:, None] - vertices).norm(dim=-1).amax(-1) + torch.eye(len(frames))
    # This ARKit head has no frown.
    assert apart.min() > 1e-3 or (kind == "arkit" and (apart < 1e-3).sum() == 2)
    mouth = head.landmarks(vertices)
    assert (mouth[:, 66] - mouth[:, 62]).norm(dim=-1).argmax() == list(frames).index("jaw_open")


def test_the_words_of_a_head_with_names_are_its_own_expressions():
    expr = expression_frames(HEADS["arkit"])["blink"].expr[0]
    assert {ARKIT[i] for i in expr.nonzero()[:, 0]} == {"eyeBlink_L", "eyeBlink_R"}
    expr = expression_frames(HEAD)["smile"].expr[0]
    assert {HEAD.expression_names[i] for i in expr.nonzero()[:, 0]} == {"smile_left", "smile_right"}
