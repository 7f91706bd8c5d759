from collections import Counter

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from gaussian_tokenizer.heads.head_model import JOINTS, HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

REGIONS = {
    "face", "scalp", "beard", "brows", "lips", "eyelids", "eyes", "iris", "ears", "nose", "neck", "mouth_interior",
    "teeth", "tongue",
}  # fmt: skip


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head()


def expression(head: HeadModel, **weights: float) -> torch.Tensor:
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    for name, weight in weights.items():
        params.expr[0, head.expression_names.index(name)] = weight
    return head.shaped(params)[0]


@pytest.mark.parametrize("n_faces", [600, 601, 1313, 4000, 10144])
def test_any_number_of_faces_is_met_exactly(n_faces):
    assert build_procedural_head(n_faces).n_faces == n_faces


@pytest.mark.parametrize("n_faces", [0, 599, 40_001])
def test_numbers_of_faces_out_of_reach_are_refused(n_faces):
    with pytest.raises(ValueError, match=f"{n_faces} faces: expected 600 to 40000"):
        build_procedural_head(n_faces)


@pytest.mark.parametrize("n_faces", [600, 2500, 10144])
def test_the_mesh_is_oriented_without_degenerate_faces_or_unused_vertices(n_faces):
    head = build_procedural_head(n_faces)
    a, b, c = (head.template[head.faces[:, corner]].double() for corner in range(3))
    assert (torch.linalg.cross(b - a, c - a).norm(dim=-1) / 2).min() > 1e-8  # 0.01 square millimeters
    directed = Counter(map(tuple, head.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).tolist()))
    assert max(directed.values()) == 1  # no edge is used twice in the same direction
    assert set(head.faces.unique().tolist()) == set(range(head.n_vertices))
    volume = (a * torch.linalg.cross(b, c)).sum(-1).sum() / 6
    assert 0.003 < volume < 0.008  # litres of an adult head and neck, positive: faces look outward


def test_the_head_has_the_size_of_a_head(head):
    eyes = head.joint_regressor[3:] @ head.template
    assert 0.060 < (eyes[0, 0] - eyes[1, 0]) < 0.064
    skull = head.template[head.regions["scalp"]]
    size = skull.amax(0) - skull.amin(0)
    assert 0.14 < size[0] < 0.165 and size[2] > size[0]  # longer than broad
    assert head.template[:, 1].max() - head.landmarks(head.template)[8, 1] == pytest.approx(0.22, abs=0.015)


def test_building_twice_gives_the_same_bytes():
    assert build_procedural_head.__wrapped__(900).hash == build_procedural_head(900).hash


def test_the_template_is_symmetric(head):
    distance, _ = cKDTree(head.template.numpy()).query(head.template.numpy() * (-1, 1, 1))
    assert np.quantile(distance, 0.97) < 1e-4


def test_skinning_weights_are_a_partition_and_joints_sit_where_they_turn(head):
    torch.testing.assert_close(head.skinning_weights.sum(1), torch.ones(head.n_vertices), atol=1e-5, rtol=0)
    assert head.skinning_weights.min() >= 0
    torch.testing.assert_close(head.joint_regressor.sum(1), torch.ones(5), atol=1e-4, rtol=0)
    joints = dict(zip(JOINTS, (head.joint_regressor @ head.template).tolist(), strict=True))
    assert joints["root"][1] < joints["neck"][1] < joints["jaw"][1] < joints["left_eye"][1]
    assert joints["left_eye"][0] > 0 > joints["right_eye"][0]


def test_eyeballs_turn_in_place(head):
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    rest = head.shaped(params)[0]
    params.eyes_pose[0] = torch.tensor([0.0, 0.4, 0.0, 0.0, 0.4, 0.0])
    turned = head.pose(params).vertices[0]
    left = head.skinning_weights[:, 3] == 1
    center = head.joint_regressor[3] @ rest
    before, after = (rest[left] - center).norm(dim=-1), (turned[left] - center).norm(dim=-1)
    assert (before - after).abs().max() < 1e-5
    assert turned[left & head.regions["iris"]][:, 0].mean() > rest[left & head.regions["iris"]][:, 0].mean() + 3e-3
    assert (turned - rest)[~head.regions["eyes"]].abs().max() < 1e-6


def test_identities_move_eyeballs_as_a_whole_and_leave_the_lids_outside_them(head):
    left = head.skinning_weights[:, 3] == 1
    lids = head.regions["eyelids"] & (head.template[:, 0] > 0)
    for identity in range(head.n_shape):
        for sign in (-2.5, 2.5):
            shaped = head.template + sign * head.shape_dirs[:, :, identity]
            center = head.joint_regressor[3] @ shaped
            radius = (shaped[left] - center).norm(dim=-1)
            before = (head.template[left] - head.joint_regressor[3] @ head.template).norm(dim=-1)
            ratio = radius / before
            assert ratio.max() - ratio.min() < 0.08  # only eye_size changes an eyeball at all, and it stays round
            outside = (shaped[lids] - center).norm(dim=-1) - 0.0122 * ratio.mean()
            at_rest = (head.template[lids] - head.joint_regressor[3] @ head.template).norm(dim=-1) - 0.0122
            assert (outside - at_rest)[at_rest > 1e-3].min() > -1.5e-3, identity


def test_the_jaw_takes_the_chin_and_the_lower_lip_but_not_the_upper(head):
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    rest = head.landmarks(head.shaped(params)[0])
    params.jaw_pose[0, 0] = 0.3
    moved = head.landmarks(head.pose(params).vertices[0]) - rest
    assert moved[8, 1] < -0.01 and moved[66, 1] < -0.01  # chin, lower lip
    assert moved[62].norm() < 2e-3 and moved[30].norm() < 1e-3  # upper lip, tip of the nose


def test_there_are_identities_and_expressions_enough_and_none_is_empty(head):
    assert head.n_shape >= 16 and head.n_expression >= 12
    assert len(set(head.expression_names)) == head.n_expression
    assert (head.shape_dirs.norm(dim=1).amax(0) > 5e-4).all()
    assert (head.expression_dirs.norm(dim=1).amax(0) > 1e-3).all()


def test_expressions_do_what_their_names_say(head):
    rest = head.landmarks(head.template)
    smile = head.landmarks(expression(head, smile_left=1)) - rest
    assert smile[54, 1] > 3e-3 and smile[54, 0] > 2e-3 and smile[48].norm() < 5e-4  # the left corner, it alone
    brows = head.landmarks(expression(head, brows_up_right=1)) - rest
    assert brows[19, 1] > 3e-3 and brows[24].norm() < 5e-4
    closed = head.landmarks(expression(head, lids_close_left=1))
    gap = (rest[[43, 44]] - rest[[47, 46]])[:, 1].mean()
    assert (closed[[43, 44]] - closed[[47, 46]])[:, 1].mean().abs() < 0.25 * gap
    assert head.landmarks(expression(head, jaw_drop=1))[8, 1] < rest[8, 1] - 0.02
    pucker = head.landmarks(expression(head, pucker=1))
    assert pucker[54, 0] - pucker[48, 0] < rest[54, 0] - rest[48, 0] - 0.01


def posed(head: HeadModel, seed: int, jaw: float = 0.0, **weights: float) -> torch.Tensor:
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params.shape.copy_(torch.randn(head.n_shape, generator=torch.Generator().manual_seed(seed)).clamp(-2.5, 2.5))
    params.jaw_pose[0, 0] = jaw
    for name, weight in weights.items():
        params.expr[0, head.expression_names.index(name)] = weight
    return head.pose(params).vertices[0]


def inside_skin(head: HeadModel, vertices: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(N,) bool, by the winding number of the skin, the mouth's opening and the eyes filled with a fan each."""
    apart = torch.stack([head.regions[name] for name in ("mouth_interior", "eyes")]).any(0)
    faces = head.faces[~apart[head.faces].any(1)]
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    keys = edges[:, 0] * len(vertices) + edges[:, 1]
    border = edges[~torch.isin(edges[:, 1] * len(vertices) + edges[:, 0], keys)]
    mouth = border[(vertices[border, 2] > 0.05).all(1) & (head.template[border, 1] < -0.02).all(1)]
    caps = torch.stack(
        (vertices[mouth[:, 1]], vertices[mouth[:, 0]], vertices[mouth].mean((0, 1)).expand(len(mouth), 3)), 1
    )
    a, b, c = (torch.cat((vertices[faces], caps)).double()[None] - points.double()[:, None, None]).unbind(2)
    la, lb, lc = a.norm(dim=-1), b.norm(dim=-1), c.norm(dim=-1)
    volume = (a * torch.linalg.cross(b, c)).sum(-1)
    below = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return torch.atan2(volume, below).sum(1) / (2 * torch.pi) > 0.5


MOUTHS: list[dict[str, float]] = [
    {},
    {"pucker": 1},
    {"frown": 1},
    {"mouth_left": 1},
    {"smile_left": 1, "smile_right": 1},
    {"mouth_wide": 1},
    {"jaw": 0.3},
    {"jaw": 0.15, "lips_part": 1},
]


@pytest.mark.parametrize("n_faces", [600, 2000])
@pytest.mark.parametrize("mouth", MOUTHS, ids=lambda mouth: "-".join(mouth) or "rest")
def test_teeth_and_tongue_stay_behind_the_lips_and_in_the_chin(n_faces, mouth):
    head = build_procedural_head(n_faces)
    within = head.faces[(head.regions["teeth"] | head.regions["tongue"])[head.faces].all(1)]
    for seed in range(12):
        vertices = posed(head, seed, **mouth)
        points = torch.cat((vertices[within.unique()], vertices[within].mean(1)))
        assert inside_skin(head, vertices, points).all(), seed


def test_the_inside_of_the_skin_is_told_from_the_outside(head):
    points = torch.tensor([[0.0, -0.05, 0.06], [0.0, 0.05, 0.0], [0.0, -0.05, 0.12], [0.0, -0.09, 0.11]])
    assert inside_skin(head, head.template, points).tolist() == [True, True, False, False]


@pytest.mark.parametrize("n_faces", [600, 10144])
def test_the_upper_teeth_stay_with_the_skull_and_the_lower_with_the_jaw(n_faces):
    head = build_procedural_head(n_faces)
    moved = posed(head, 0, jaw=0.3) - posed(head, 0)
    teeth, joint = head.regions["teeth"], head.skinning_weights.argmax(1)
    assert set(joint[teeth].tolist()) == {1, 2} and (head.skinning_weights[teeth].amax(1) == 1).all()
    assert moved[teeth & (joint == 1)].abs().max() < 1e-5
    assert moved[teeth & (joint == 2), 1].max() < -0.01
    assert moved[head.regions["tongue"], 1].max() < -0.01


@pytest.mark.parametrize("n_faces", [600, 10144])
def test_the_mouth_is_closed_behind_the_lips(n_faces):
    head = build_procedural_head(n_faces)
    apart = head.regions["teeth"] | head.regions["tongue"] | head.regions["ears"] | head.regions["eyes"]
    faces = head.faces[~apart[head.faces].any(1)]
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    borders = set(map(tuple, edges.tolist())) - set(map(tuple, edges.flip(1).tolist()))
    heights = head.template[torch.tensor(sorted(borders))][:, :, 1]
    # Only the collar is open, and the lids before the eyeballs.
    assert ((heights < -0.12) | (heights > 0)).all()


def test_hair_stays_with_the_skull_whatever_the_jaw_does():
    for n_faces in (600, 10144):
        head = build_procedural_head(n_faces)
        moved = posed(head, 3, jaw=0.3) - posed(head, 3)
        assert moved[head.regions["scalp"]].abs().max() < 1e-4


def test_landmarks_follow_the_multi_pie_order(head):
    points = head.landmarks(head.template)
    assert points.shape == (68, 3)
    assert points[0, 0] < 0 < points[16, 0]  # the subject's right first
    assert points[[36, 39, 42, 45], 0].tolist() == sorted(points[[36, 39, 42, 45], 0].tolist())
    assert points[27, 1] > points[30, 1] > points[51, 1] > points[57, 1] > points[8, 1]
    mirrored = points[[16, 45, 54, 26, 35]] * torch.tensor([-1.0, 1.0, 1.0])
    torch.testing.assert_close(points[[0, 36, 48, 17, 31]], mirrored, atol=1.5e-3, rtol=0)


@pytest.mark.parametrize("n_faces", [600, 10144])
def test_every_region_exists_and_lies_where_it_should(n_faces):
    head = build_procedural_head(n_faces)
    assert set(head.regions) == REGIONS
    means = {name: head.template[mask].mean(0) for name, mask in head.regions.items()}
    for name, mask in head.regions.items():
        assert mask.any(), name
        assert abs(means[name][0]) < 5e-3, name
    heights = [float(means[name][1]) for name in ("scalp", "brows", "eyes", "lips", "neck")]
    assert heights == sorted(heights, reverse=True)
    assert not (head.regions["iris"] & ~head.regions["eyes"]).any()
    assert not (head.regions["scalp"] & head.regions["face"]).any()
