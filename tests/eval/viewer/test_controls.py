from dataclasses import replace
from math import radians

import pytest
import torch

from eval.viewer.controls import MAX_EXPRESSIONS, motions, sliders, to_parameters
from gaussian_tokenizer.avatars.motions import MOTIONS, synthetic_motion
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.subject import synthesize_subject


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(600)


def by_label(head):
    return {each.label: each for group in sliders(head).values() for each in group}


def test_degrees_become_radians_of_the_joint(head):
    found = by_label(head)
    params = to_parameters([(found["jaw open"], 20.0), (found["neck turn"], -30.0)], head)
    assert params.num_frames == 1
    assert params.jaw_pose[0].tolist() == pytest.approx([radians(20), 0, 0])
    assert params.neck_pose[0].tolist() == pytest.approx([0, radians(-30), 0])


def test_both_eyes_move_together(head):
    params = to_parameters([(by_label(head)["eyes sideways"], 10.0)], head)
    assert params.eyes_pose[0].tolist() == pytest.approx([0, radians(10), 0, 0, radians(10), 0])


def test_expressions_are_named_as_the_head_names_them(head):
    expressions = sliders(head)["expression"]
    assert len(expressions) == min(MAX_EXPRESSIONS, head.n_expression)
    assert expressions[5].label == "smile left" and (expressions[5].low, expressions[5].high) == (0, 1)
    assert to_parameters([(expressions[5], 0.5)], head).expr[0].nonzero().tolist() == [[5]]


def test_components_without_a_name_go_both_ways(head):
    unnamed = replace(head, expression_names=tuple(f"expression_{index}" for index in range(head.n_expression)))
    assert {(each.low, each.high) for each in sliders(unnamed)["expression"]} == {(-3, 3)}


def test_all_at_zero_is_the_head_at_rest_and_every_slider_moves_it(head):
    everything = [each for group in sliders(head).values() for each in group]
    rest = head.pose(to_parameters([(each, 0.0) for each in everything], head)).vertices
    assert torch.equal(rest, head.pose(HeadParameters.zeros(head.n_shape, head.n_expression)).vertices)
    for each in everything:
        assert (head.pose(to_parameters([(each, each.high)], head)).vertices - rest).abs().max() > 5e-4, each.label


def test_sliders_are_added_to_the_frame_of_a_motion_which_stays_as_it_was(head):
    motion = synthetic_motion("nod", head, 8)
    frame = motion.frame(3)
    before = frame.neck_pose.clone()
    params = to_parameters([(by_label(head)["neck nod"], 10.0)], head, frame)
    assert float(params.neck_pose[0, 0]) == pytest.approx(float(before[0, 0]) + radians(10))
    assert torch.equal(params.expr, frame.expr) and torch.equal(frame.neck_pose, before)
    assert torch.equal(motion.neck_pose[3:4], before)


def test_motions_are_the_built_in_ones_the_file_and_what_the_avatar_came_with(head, tmp_path):
    avatar = synthesize_subject(head, 1, num_points=60, placement="regular").avatar
    path = tmp_path / "tracked.npz"
    synthetic_motion("talk", head, 5).save(path)
    assert [*motions(head, None, avatar)] == [*MOTIONS]
    moving = replace(avatar, params=replace(synthetic_motion("nod", head, 3), shape=avatar.params.shape))
    found = motions(head, str(path), moving)
    assert [*found] == [*MOTIONS, "tracked.npz", "recorded"]
    assert found["tracked.npz"].num_frames == 5 and found["recorded"].num_frames == 3
