"""Which faces carry points, and where on a face."""

import dataclasses

import numpy as np
import pytest

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.layout import (
    BEARD,
    CLOSING,
    HAIR,
    WIDEST_INSIDE,
    default_num_points,
    dense_counts,
    face_layout,
    points_of_faces,
    spacings,
    sparse_counts,
)


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(600)


@pytest.mark.parametrize("hair", HAIR)
@pytest.mark.parametrize("beard", BEARD)
def test_an_occupied_face_carries_4_to_15_points_and_the_total_is_near_the_one_asked_for(head, hair, beard):
    counts = sparse_counts(face_layout(head), 400, hair, beard)
    assert set(counts) <= {0, *range(4, 16)}
    assert 300 <= counts.sum() <= 500
    assert 45 <= (counts > 0).sum() <= 95


def test_the_full_head_carries_22000_to_30000_points():
    layout = face_layout(build_procedural_head())
    wanted = default_num_points(len(layout.zone))
    totals = [sparse_counts(layout, wanted, hair, beard).sum() for hair in HAIR for beard in BEARD]
    assert 22_000 <= min(totals) < max(totals) <= 30_000


def test_more_points_are_had_for_the_asking(head):
    few, many = (sparse_counts(face_layout(head), wanted, "short", "short").sum() for wanted in (400, 1600))
    assert 3.5 * few < many < 4.5 * few


def test_hair_and_beard_leave_the_rest_of_the_face_as_it_is(head):
    layout = face_layout(head)
    plain, hairy = (sparse_counts(layout, 400, *styles) for styles in (("bald", "none"), ("long", "full")))
    elsewhere = ~np.isin(layout.zone, [layout.zones.index("scalp"), layout.zones.index("beard")])
    assert (plain[elsewhere] == hairy[elsewhere]).all()
    for zone in ("scalp", "beard"):
        assert hairy[layout.order[zone]].sum() > 1.3 * plain[layout.order[zone]].sum()


def test_the_mouth_is_filled_where_the_head_says_which_of_it_are_teeth_and_empty_elsewhere(head):
    untold = dataclasses.replace(head, regions={k: v for k, v in head.regions.items() if k not in ("teeth", "tongue")})
    inside = head.regions["mouth_interior"].numpy()[head.faces.numpy()].any(1)
    for counts_of in (
        lambda layout: sparse_counts(layout, 5000, "long", "full"),
        lambda layout: dense_counts(layout, 0.005, "long"),
    ):
        assert counts_of(face_layout(untold))[inside].sum() == 0
        assert counts_of(face_layout(head))[inside].sum() > 0
    layout = face_layout(head)
    few = sparse_counts(layout, 400, "long", "full")
    for zone in ("mouth_interior", "teeth", "tongue"):
        assert (dense_counts(layout, 0.005, "long")[layout.order[zone]] > 0).all()
        assert 0 < few[layout.order[zone]].sum() < 0.1 * few.sum()


def test_nothing_is_put_behind_the_eyeballs(head):
    faces, template = head.faces.numpy(), head.template.numpy()
    counts = sparse_counts(face_layout(head), 5000, "long", "full") + dense_counts(face_layout(head), 0.005, "long")
    corners = template[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    eyes = head.regions["eyes"].numpy()[faces].all(1)
    assert counts[eyes & (normals[:, 2] < 0)].sum() == 0
    assert counts[eyes & (normals[:, 2] > 0)].sum() > 0


def test_the_first_faces_of_a_zone_are_spread_over_all_of_it(head):
    layout = face_layout(head)
    centers = head.template.double().numpy()[head.faces.numpy()].mean(1)
    scalp = layout.order["scalp"]
    assert sorted(scalp) == np.flatnonzero(layout.zone == layout.zones.index("scalp")).tolist()

    def gap(chosen: np.ndarray) -> float:
        return np.linalg.norm(centers[scalp][:, None] - centers[chosen], axis=-1).min(1).max()

    some = [np.random.default_rng(seed).permutation(scalp)[:12] for seed in range(10)]
    assert gap(scalp[:12]) < 0.8 * np.mean([gap(chosen) for chosen in some])


def test_a_head_without_regions_is_all_skin(head):
    layout = face_layout(dataclasses.replace(head, regions={}))
    counts = sparse_counts(layout, 400, "long", "full")
    assert {layout.zones[zone] for zone in layout.zone[counts > 0]} == {"skin"}
    assert 300 <= counts.sum() <= 500


def test_the_kth_point_of_every_face_has_the_same_barycentrics():
    faces, index, barycentrics = points_of_faces(np.array([4, 0, 15, 7]))
    assert faces.tolist() == [0] * 4 + [2] * 15 + [3] * 7
    assert index.tolist() == [*range(4), *range(15), *range(7)]
    for face in (0, 3):
        mine = barycentrics[faces == face]
        np.testing.assert_array_equal(mine, barycentrics[faces == 2][: len(mine)])


@pytest.mark.parametrize("count", [4, 8, 15, 200])
def test_the_points_of_a_face_lie_inside_it_and_apart(count):
    _, _, barycentrics = points_of_faces(np.array([count]))
    assert (barycentrics > 0).all()
    np.testing.assert_allclose(barycentrics.sum(1), 1)
    corners = np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]])
    points = barycentrics @ corners
    distances = np.linalg.norm(points[:, None] - points, axis=-1) + 9 * np.eye(count)
    assert distances.min() > 0.25 * (0.433 / count) ** 0.5


def test_a_dense_layout_puts_a_point_into_every_square_of_the_spacing(head):
    layout = face_layout(head)
    counts = dense_counts(layout, 0.004, "bald")
    visible = layout.zone >= 0
    assert (counts[visible] >= 1).all()
    assert counts.sum() > 0.95 * layout.areas[visible].sum() / 0.004**2


def test_points_on_skin_are_wide_enough_to_fill_the_faces_beside_them():
    layout = face_layout(build_procedural_head(4000))
    counts = sparse_counts(layout, default_num_points(4000), "short", "none")
    wide, faces = spacings(layout, counts), layout.order["skin"]
    occupied, bare = faces[counts[faces] > 0], faces[counts[faces] == 0]
    assert (wide[occupied] > 0).all() and (wide[counts == 0] == 0).all()
    even = np.sqrt(layout.zone_area("skin") / counts[faces].sum())
    for centers in layout.centers:
        distance = np.linalg.norm(centers[bare, None] - centers[occupied], axis=-1)
        reached = np.minimum(distance.min(1), even + CLOSING)
        assert (wide[occupied][distance.argmin(1)] > reached - 1e-9).all()
    assert wide[layout.order["teeth"]].max() <= WIDEST_INSIDE


def test_fewer_points_on_a_face_spread_them_over_more_faces(head):
    layout = face_layout(head)
    four, one = (sparse_counts(layout, 200, "short", "none", least) for least in (4, 1))
    assert abs(int(one.sum()) - int(four.sum())) < 4 * len(layout.zones)  # a zone has one face of four points at least
    assert four[four > 0].min() == 4 and one[one > 0].min() == 1
    assert (one > 0).sum() > 2.5 * (four > 0).sum()
    np.testing.assert_array_equal(four, sparse_counts(layout, 200, "short", "none"))
