"""Density control as a function of tensors: what grows, what goes, and that faces hold 4 to 15 or nothing."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix
from training.fitting.density_control import (
    CHILD_SIZE,
    DensifyConfig,
    DensifyStats,
    Edit,
    FaceLimits,
    GaussianParams,
    control_density,
    rank_on_face,
)


def cloud_on(faces: list[int], seed: int = 0, opacity: float | None = None) -> GaussianParams:
    random = torch.Generator().manual_seed(seed)
    count = len(faces)
    opacities = torch.randn(count, generator=random) if opacity is None else torch.full((count,), opacity).logit()
    return GaussianParams(
        positions=torch.randn(count, 3, generator=random),
        log_scales=torch.randn(count, 3, generator=random) * 0.3,
        quats=torch.randn(count, 4, generator=random),
        opacities=opacities,
        sh_dc=torch.randn(count, 1, 3, generator=random),
        sh_rest=torch.randn(count, 3, 3, generator=random),
        faces=torch.tensor(faces, dtype=torch.int64),
    )


def stats_of(gradients, n_faces: int, scales=None, radii=None, unseen=(), pixels=None) -> DensifyStats:
    gradients = torch.as_tensor(gradients, dtype=torch.float32)
    hidden = torch.zeros(n_faces, dtype=torch.bool)
    hidden[list(unseen)] = True
    zeros, many = torch.zeros_like(gradients), torch.full_like(gradients, 99.0)
    return DensifyStats(
        gradients,
        zeros if scales is None else torch.as_tensor(scales, dtype=torch.float32),
        zeros if radii is None else torch.as_tensor(radii, dtype=torch.float32),
        many if pixels is None else torch.as_tensor(pixels, dtype=torch.float32),
        hidden,
    )


def step(gaussians: GaussianParams, stats: DensifyStats, **config) -> Edit:
    given_rules = {"densify_grad_threshold": 1.0, "percent_dense": 0.5, "min_opacity": 0.05} | config
    return control_density(gaussians, stats, DensifyConfig(**given_rules), torch.Generator().manual_seed(0))


def counts(edit: Edit, n_faces: int) -> list[int]:
    return edit.gaussians.faces.bincount(minlength=n_faces).tolist()


@st.composite
def situations(draw):
    """Any gaussians, as full or empty as it may be, any stats, and limits."""
    n_faces = draw(st.integers(1, 6))
    count = draw(st.integers(1, 60))
    faces = draw(st.lists(st.integers(0, n_faces - 1), min_size=count, max_size=count))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    low = draw(st.integers(1, 6))
    limits = FaceLimits(low, low + draw(st.integers(0, 9)))
    stats = stats_of(
        random.exponential(1.0, count),
        n_faces,
        random.exponential(0.5, count),
        random.exponential(10, count),
        np.flatnonzero(random.random(n_faces) < draw(st.sampled_from([0, 0.3]))),
        random.exponential(1.0, count),
    )
    largest = draw(st.sampled_from([None, 1.0]))
    return (
        cloud_on(faces, draw(st.integers(0, 99))),
        stats,
        limits,
        {"max_scale": largest, "max_radius": largest and 25.0},
    )


@settings(max_examples=150, deadline=None)
@given(situations())
def test_after_a_step_every_face_is_empty_or_within_the_limits(situation):
    gaussians, stats, limits, config = situation
    edit = step(gaussians, stats, limits=limits, **config)
    after = edit.gaussians.faces.bincount(minlength=len(stats.unseen))
    occupied = gaussians.faces.bincount(minlength=len(after)) > 0
    assert ((after == 0) | ((after >= limits.low) & (after <= limits.high))).all()
    assert torch.equal(after > 0, occupied & ~stats.unseen)


@settings(max_examples=150, deadline=None)
@given(situations(), st.booleans())
def test_what_stays_is_unchanged_and_what_is_new_is_bound_where_something_was(situation, constrained):
    gaussians, stats, limits, config = situation
    edit = step(gaussians, stats, limits=limits if constrained else None, **config)
    old = edit.origin >= 0
    for field in fields(GaussianParams):
        assert torch.equal(getattr(edit.gaussians, field.name)[old], getattr(gaussians, field.name)[edit.origin[old]])
    assert len(edit.origin[old].unique()) == int(old.sum())
    assert set(edit.gaussians.faces[~old].tolist()) <= set(gaussians.faces.tolist())
    # New ones stand behind the old, which keep their order.
    assert torch.equal(edit.origin[old], edit.origin[old].sort().values) and not old[int(old.sum()) :].any()


@settings(max_examples=100, deadline=None)
@given(situations())
def test_without_limits_it_prunes_clones_and_splits_as_a_loop_over_the_formulas_does(situation):
    gaussians, stats, _, config = situation
    edit = step(gaussians, stats, limits=None, **config)
    faces, opacities = gaussians.faces.tolist(), torch.sigmoid(gaussians.opacities.double()).tolist()
    doomed = {
        row
        for row in range(len(faces))
        if opacities[row] < 0.05
        or (config["max_scale"] is not None and float(stats.scales[row]) > 1.0)
        or (config["max_radius"] is not None and float(stats.radii[row]) > 25.0)
    }
    for face in set(faces):  # a face never loses its last one
        if all(row in doomed for row in range(len(faces)) if faces[row] == face):
            doomed -= {row for row in range(len(faces)) if faces[row] == face}
    kept, clones, children = [], [], []
    for row in range(len(faces)):
        if row in doomed:
            continue
        grows = float(stats.gradients[row]) >= 1.0
        small = float(stats.scales[row]) <= 0.5
        if not grows or small:
            kept.append(row)
        if grows:
            (clones if small else children).append(row)
    assert edit.origin.tolist() == kept + [-1] * (len(clones) + 2 * len(children))
    new = edit.gaussians.map(lambda value: value[len(kept) :])
    for name, value in gaussians.map(lambda value: value[clones]).values().items():
        assert torch.equal(new.values()[name][: len(clones)], value)
    twice = [row for row in children for _ in range(2)]
    assert torch.equal(new.faces, gaussians.faces[clones + twice])
    torch.testing.assert_close(new.log_scales[len(clones) :].exp(), gaussians.log_scales[twice].exp() / CHILD_SIZE)
    assert torch.equal(new.opacities[len(clones) :], gaussians.opacities[twice])


def test_children_of_a_split_are_drawn_from_their_parent():
    parent = cloud_on([0], seed=3, opacity=0.5)
    parents = parent.map(lambda value: value.repeat_interleave(20_000, 0))
    edit = step(parents, stats_of([2.0] * 20_000, 1, scales=[1.0] * 20_000), limits=None)
    offsets = (edit.gaussians.positions - parent.positions).double()
    axes = quaternion_to_matrix(parent.quats[0].double()) * parent.log_scales[0].double().exp()
    assert len(offsets) == 40_000
    torch.testing.assert_close(offsets.mean(0), torch.zeros(3).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(offsets.T.cov(), axes @ axes.T, atol=0.05, rtol=0.05)


def test_a_full_face_does_not_grow_and_another_only_as_far_as_there_is_room():
    limits = FaceLimits(1, 4)
    gaussians = cloud_on([0, 0, 0, 0, 1, 1, 1], opacity=0.5)
    edit = step(gaussians, stats_of([9, 9, 9, 9, 3, 5, 4], 2), limits=limits)
    assert counts(edit, 2) == [4, 4]
    # Of three that ask for one place, the most useful one gets it.
    assert torch.equal(edit.gaussians.positions[edit.origin < 0], gaussians.positions[5:6])


def test_on_a_full_face_the_least_visible_give_way_to_as_many_as_want_to_grow():
    limits = FaceLimits(1, 4)
    gaussians = cloud_on([0, 0, 0, 0, 1, 1], opacity=0.5)
    stats = stats_of([0, 2, 0, 0, 0, 2], 2, pixels=[0.3, 5, 0.1, 0.2, 0.0, 5])
    edit = step(gaussians, stats, limits=limits, min_pixels=0.5)
    assert edit.origin.tolist() == [0, 1, 3, 4, 5, -1, -1] and counts(edit, 2) == [4, 3]
    assert step(gaussians, stats, limits=limits, min_pixels=0.0).origin.tolist() == [0, 1, 2, 3, 4, 5, -1]
    nobody_wants = stats_of([0] * 6, 2, pixels=[0] * 6)
    assert step(gaussians, nobody_wants, limits=limits, min_pixels=0.5).origin.tolist() == [0, 1, 2, 3, 4, 5]


def test_usefulness_is_gradient_times_opacity():
    gaussians = cloud_on([0, 0], opacity=0.5)
    gaussians.opacities[1] = torch.logit(torch.tensor(0.9))
    edit = step(gaussians, stats_of([3, 2], 1), limits=FaceLimits(1, 3))
    assert torch.equal(edit.gaussians.positions[-1], gaussians.positions[1])  # 1.8 before 1.5


def test_a_face_short_of_points_is_topped_up_by_halving_what_it_has():
    gaussians = cloud_on([2], opacity=0.5)
    edit = step(gaussians, stats_of([0.0], 4), limits=FaceLimits(4, 15))
    assert counts(edit, 4) == [0, 0, 4, 0]
    torch.testing.assert_close(
        edit.gaussians.log_scales.exp(), (gaussians.log_scales.exp() / CHILD_SIZE**2).expand(4, 3)
    )


def test_too_many_on_a_face_are_cut_to_the_most_useful():
    gaussians = cloud_on([0] * 20, opacity=0.5)
    gradients = torch.linspace(0, 0.9, 20)
    edit = step(gaussians, stats_of(gradients, 1), limits=FaceLimits(4, 15))
    assert edit.origin.tolist() == list(range(5, 20))


def test_unseen_faces_are_emptied_under_the_constraint_only():
    gaussians = cloud_on([0, 1, 1], opacity=0.5)
    stats = stats_of([0, 0, 0], 2, unseen=[1])
    assert counts(step(gaussians, stats, limits=FaceLimits(1, 4)), 2) == [1, 0]
    assert counts(step(gaussians, stats, limits=None), 2) == [1, 2]


def test_the_same_generator_gives_the_same_children():
    gaussians, stats = cloud_on([0, 0, 1], opacity=0.5), stats_of([2, 2, 2], 2, scales=[1, 1, 1])
    first, second = (step(gaussians, stats) for _ in range(2))
    assert torch.equal(first.gaussians.positions, second.gaussians.positions)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_ranks_are_those_of_sorting_each_face(rows):
    faces = torch.tensor([face for face, _ in rows], dtype=torch.int64)
    score = torch.tensor([float(value) for _, value in rows])
    expected = [0] * len(rows)
    for face in range(4):
        own = sorted((row for row in range(len(rows)) if rows[row][0] == face), key=lambda row: (-rows[row][1], row))
        for rank, row in enumerate(own):
            expected[row] = rank
    assert rank_on_face(faces, score, 4).tolist() == expected


@pytest.mark.parametrize(("low", "high"), [(0, 15), (5, 4), (-1, 3)])
def test_limits_that_no_face_can_keep_are_refused(low, high):
    with pytest.raises(ValueError, match=f"between {low} and {high} points"):
        FaceLimits(low, high)
