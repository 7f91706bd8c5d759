"""The captured placement: points of each subject's own, dense where its detail is; and the regular one, as it was."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaussian_tokenizer.geometry.triangles import closest_point_barycentrics
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.synthetic.captured import NOISE, captured_points
from gaussian_tokenizer.synthetic.layout import MAX_POINTS_PER_FACE, face_layout
from gaussian_tokenizer.synthetic.subject import SyntheticSubject, portrait_avatar, synthesize_subject

HEAD = build_procedural_head(600)


@pytest.fixture(scope="module")
def detailed() -> HeadModel:
    return build_procedural_head(4000)


@pytest.fixture(scope="module")
def crowd(detailed) -> list[SyntheticSubject]:
    return [synthesize_subject(detailed, (3, index)) for index in range(12)]


def counts_of(subject: SyntheticSubject) -> np.ndarray:
    return np.bincount(subject.avatar.faces.numpy(), minlength=subject.head.n_faces)


def shared_faces(subjects: list[SyntheticSubject]) -> float:
    """Mean share of the occupied faces of one subject that another one occupies."""
    occupied = [counts_of(subject) > 0 for subject in subjects]
    return float(np.mean([(one & other).sum() / one.sum() for one, other in itertools.permutations(occupied, 2)]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(40, 2000), st.integers(1, 6))
def test_points_lie_on_visible_faces_within_the_limits_and_are_those_of_the_seed(seed, num_points, least):
    layout, contrast = face_layout(HEAD), np.random.default_rng(seed).uniform(0, 1, HEAD.n_faces)
    points, again = (
        captured_points(layout, contrast, num_points, "short", "none", least, np.random.default_rng(seed)) for _ in "12"
    )
    for name, one, other in zip(points._fields, points, again):
        assert np.array_equal(one, other), name
    counts = np.bincount(points.faces, minlength=HEAD.n_faces)
    assert (layout.zone[counts > 0] >= 0).all()
    assert least <= counts[counts > 0].min() and counts.max() <= MAX_POINTS_PER_FACE
    assert (points.barycentrics >= 0).all() and np.allclose(points.barycentrics.sum(1), 1)
    assert np.abs(points.heights).max() < 0.004 and (points.spacing > 0).all()
    assert num_points / 2 < len(points.faces) < 2 * num_points


def test_the_total_is_near_the_one_asked_for_and_differs_between_subjects():
    totals = np.array([len(synthesize_subject(HEAD, (3, index)).avatar) for index in range(60)])
    assert 380 < totals.mean() < 420
    assert 0.04 < totals.std() / totals.mean() < 0.12


def test_two_subjects_share_few_faces_and_no_place(crowd, detailed):
    assert shared_faces([synthesize_subject(HEAD, (3, index)) for index in range(8)]) < 0.4
    assert shared_faces(crowd[:6]) < 0.6
    assert shared_faces([synthesize_subject(detailed, (3, index), placement="regular") for index in range(6)]) > 0.9
    layout = face_layout(HEAD)
    places = np.concatenate(
        [
            captured_points(layout, np.zeros(HEAD.n_faces), 400, "short", "none", 4, np.random.default_rng(seed))[1]
            for seed in range(20)
        ]
    )
    assert len(np.unique(places.round(9), axis=0)) == len(places)
    np.testing.assert_allclose(places.mean(0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(places.std(0), 18**-0.5, atol=0.02)  # of the uniform distribution on a triangle


def test_an_occupied_face_carries_4_to_15_points(crowd):
    counts = np.concatenate([counts_of(subject) for subject in crowd])
    assert set(counts) == {0, *range(4, 16)}


def test_points_of_bare_skin_are_millimeters_from_it(crowd, detailed):
    layout, hair = face_layout(detailed), detailed.regions["scalp"] | detailed.regions["beard"]
    zones = [layout.zones.index(zone) for zone in ("skin", "neck", "nose")]
    bare = torch.from_numpy(np.isin(layout.zone, zones)) & ~hair[detailed.faces].any(1)
    distances = []
    for subject in crowd:
        points = subject.avatar.canonical_points()
        chosen = bare[points["faces"]]
        positions, faces = points["positions"][chosen].double(), points["faces"][chosen]
        triangles = detailed.canonical_vertices(subject.params).double()[detailed.faces[faces]]
        feet = torch.einsum("nc,nci->ni", closest_point_barycentrics(positions, triangles), triangles)
        distances.append((positions - feet).norm(dim=1))
    distance = torch.cat(distances)
    assert distance.max() < 0.007  # noise of 3.75 mm at most, above a surface that bulges over its triangles
    assert 0.9 * NOISE < distance.square().mean().sqrt() < 1.3 * NOISE


def per_area(subjects: list[SyntheticSubject], faces: np.ndarray) -> float:
    areas = face_layout(subjects[0].head).areas
    return float(np.mean([counts_of(subject)[faces].sum() for subject in subjects]) / areas[faces].sum())


def test_points_are_dense_at_the_edges_of_brows_lips_and_hair(crowd, detailed):
    layout = face_layout(detailed)
    skin, scalp = (layout.zone == layout.zones.index(zone) for zone in ("skin", "scalp"))
    corners = {name: detailed.regions[name][detailed.faces].sum(1).numpy() for name in ("brows", "lips", "scalp")}
    plain = skin & ~np.any([corner > 0 for corner in corners.values()], axis=0)
    cheeks = per_area(crowd, plain)
    for name in ("brows", "lips"):
        assert per_area(crowd, np.isin(corners[name], (1, 2))) > 2 * cheeks, name
    line = np.isin(corners["scalp"], (1, 2))
    hairy, bald = (
        [subject for subject in crowd if (subject.appearance.hair_style == "bald") == is_bald]
        for is_bald in (False, True)
    )
    inside = scalp & ~line
    assert per_area(hairy, line) > 1.3 * per_area(hairy, inside)
    # The line is the subject's own: the bald have none.
    assert per_area(hairy, line) > 1.3 * per_area(bald, line)


def test_a_head_has_no_holes_where_the_regular_placement_has_none():
    head = build_procedural_head(2000)
    cameras = portrait_cameras(head, 48, [0.0, 40.0, -40.0, 150.0])
    for seed in range(3):
        subject = synthesize_subject(head, (0, seed))
        closed = portrait_avatar(subject, 2 / float(cameras.Ks[0, 0, 0])).canonical_gaussians()
        outside = 1 - render(closed, cameras).alpha[..., 0]
        inside = torch.nn.functional.max_pool2d(outside[:, None], 5, 1, 2)[:, 0] < 0.02
        alpha = render(subject.avatar.canonical_gaussians(), cameras).alpha[..., 0]
        assert inside.float().mean() > 0.05 and alpha[inside].min() > 0.9


def test_images_do_not_depend_on_the_placement():
    one, other = (
        portrait_avatar(synthesize_subject(HEAD, 5, placement=placement), 0.01) for placement in ("captured", "regular")
    )
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_another_placement_is_refused():
    with pytest.raises(ValueError, match="placement is 'random', expected one of"):
        synthesize_subject(HEAD, 0, placement="random")


@pytest.mark.parametrize(
    ("index", "faces", "sums"),
    [
        (0, "6641d4d68c21368a", (291.833708, 1677.513541, 1599.538589, 1219.907724, 565.899078)),
        (2, "145bd8f06dd6e544", (147.761488, 670.142705, 1397.163877, 1105.760649, 499.91704)),
    ],
)
def test_the_regular_placement_stays_as_it_was_before_there_was_another(index, faces, sums):
    avatar = synthesize_subject(HEAD, (0, index), placement="regular").avatar
    assert hashlib.sha256(avatar.faces.numpy().tobytes()).hexdigest().startswith(faces)
    found = [
        float(getattr(avatar, name).double().abs().sum())
        for name in ("positions", "sh", "opacities", "scales", "quats")
    ]
    np.testing.assert_allclose(found, sums, rtol=1e-5)
