"""Variety of synthetic subjects: the plain ones stay, details, light and cameras are drawn within their ranges."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.appearance import colors_of
from gaussian_tokenizer.synthetic.details import CUTS
from gaussian_tokenizer.synthetic.haircuts import hair_mask
from gaussian_tokenizer.synthetic.layout import (
    MAX_POINTS_PER_FACE,
    MIN_POINTS_PER_FACE,
    face_layout,
    regular_points,
    sparse_counts,
)
from gaussian_tokenizer.synthetic.light import RANGES, draw_light
from gaussian_tokenizer.synthetic.source import PLAIN, SyntheticSettings, render_subject
from gaussian_tokenizer.synthetic.subject import _build_avatar, synthesize_subject
from gaussian_tokenizer.synthetic.views import AZIMUTH, DISTANCES, ELEVATION, FILLS, ROLL

HEAD = build_procedural_head(600)
VARIED = {"look": "varied", "light": "varied"}


@pytest.fixture(scope="module")
def crowd():
    return [synthesize_subject(HEAD, (7, index), **VARIED) for index in range(60)]


@pytest.fixture(scope="module")
def rendered():
    settings = SyntheticSettings(image_size=48, views=3, timesteps=2, num_points=60)
    return [render_subject(f"synthetic-3-{index:06d}", settings, HEAD) for index in range(6)]


def test_plain_subjects_are_those_of_before_there_was_variety():
    found = hashlib.sha256()
    subject = render_subject(
        "synthetic-0-000004", SyntheticSettings(image_size=24, views=2, timesteps=2, **PLAIN), HEAD
    )
    for name in ("positions", "faces", "sh", "scales"):
        # Rounded, for the last bit differs between machines.
        found.update(np.rint(subject.avatar.tensors()[name].double().numpy() * 1e4).astype(np.int64).tobytes())
    for frame in subject.images:
        found.update(np.rint(np.r_[frame.viewmat.ravel(), frame.fx, frame.cx] * 1e4).astype(np.int64).tobytes())
    assert found.hexdigest()[:16] == "6407a95c80fe8c57"
    assert not subject.metadata["recipe"].keys() & PLAIN.keys()


def test_a_seed_keeps_its_identity_and_style_with_details(crowd):
    for index, subject in enumerate(crowd[:20]):
        plain = synthesize_subject(HEAD, (7, index))
        assert torch.equal(subject.params.shape, plain.params.shape)
        for name in ("hair_style", "beard_style", "skin", "hair", "iris", "wave_vectors"):
            np.testing.assert_array_equal(getattr(subject.appearance, name), getattr(plain.appearance, name))
        assert subject.appearance.details.cut in CUTS[plain.appearance.hair_style]
        again = synthesize_subject(HEAD, (7, index), **VARIED).avatar
        for name, tensor in subject.avatar.tensors().items():
            assert torch.equal(tensor, again.tensors()[name]), name
            assert torch.isfinite(tensor).all(), name


def test_light_and_details_have_streams_of_their_own(crowd):
    dark = synthesize_subject(HEAD, (7, 0), look="varied", light="hard")
    assert crowd[0].appearance.details.age == dark.appearance.details.age
    lit = synthesize_subject(HEAD, (7, 0), light="varied").appearance.light
    np.testing.assert_array_equal(crowd[0].appearance.light.direction, lit.direction)
    assert len({subject.appearance.light.direction.tobytes() for subject in crowd}) == len(crowd)


def test_light_is_lamberts_law_of_two_lights_over_an_ambient_one():
    light = draw_light(np.random.default_rng(2), "varied")
    random = np.random.default_rng(0)
    normals = random.standard_normal((40, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    neck = random.random(40)
    expected = np.zeros((40, 3))
    for point in range(40):
        for channel in range(3):
            value = light.ambient[channel]
            value += light.color[channel] * max(0.0, sum(normals[point] * light.direction))
            value += light.fill_color[channel] * max(0.0, sum(normals[point] * light.fill_direction))
            expected[point, channel] = value * (1 - 0.18 * neck[point])
    np.testing.assert_allclose(light.on(normals, neck), expected, rtol=1e-12)


def test_hard_light_is_outside_of_the_range_of_varied_light():
    for seed in range(50):
        for kind in RANGES:
            light = draw_light(np.random.default_rng(seed), kind)
            side = np.rad2deg(abs(np.arctan2(light.direction[0], light.direction[2])))
            ambient = (light.ambient / (light.ambient + light.color))[1]  # green has no tint
            low, high = RANGES[kind][0]
            assert low - 1e-6 <= side <= high + 1e-6
            assert RANGES[kind][3][0] - 1e-9 <= ambient <= RANGES[kind][3][1] + 1e-9
    assert RANGES["hard"][0][0] > RANGES["varied"][0][1] and RANGES["hard"][3][1] <= RANGES["varied"][3][0]


def test_a_lit_side_is_brighter_than_the_other(crowd):
    appearance = dataclasses.replace(crowd[0].appearance, details=None)
    normals = np.stack((appearance.light.direction, -appearance.light.direction))
    names = ("ears", "nose", "lips", "brows", "beard", "scalp", "neck", "eyes")
    colors = colors_of(appearance, {name: np.zeros(2) for name in names}, normals, np.zeros(2), np.zeros(2))
    assert (colors[0] > colors[1]).all()


def test_random_cameras_frame_the_head(rendered):
    fills, turns = [], []
    for subject in rendered:
        for frame in subject.images:
            skull = HEAD.pose(frame.load_params()).vertices[0, ~HEAD.regions["neck"]].double().numpy()
            seen = skull @ frame.viewmat[:3, :3].T + frame.viewmat[:3, 3]
            pixels = (seen @ frame.K.T)[:, :2] / seen[:, 2:]
            fills.append(np.ptp(pixels, axis=0).max() / 48)
            assert pixels.min() > 0 and pixels.max() < 48
            right, _, forward = frame.viewmat[:3, :3]
            azimuth, elevation = np.arctan2(-forward[0], -forward[2]), np.arcsin(-forward[1])
            level = np.cross(forward, (0, 1, 0)) / np.linalg.norm(np.cross(forward, (0, 1, 0)))
            turns.append(np.rad2deg((azimuth, elevation, np.arccos(min(1, right @ level)))))
            eye = -frame.viewmat[:3, :3].T @ frame.viewmat[:3, 3]
            distance = np.linalg.norm(eye - (skull.min(0) + skull.max(0)) / 2)
            assert DISTANCES[0] - 1e-4 < distance < 1.05 * DISTANCES[1]
    fills, turns = np.array(fills), np.abs(turns)
    assert FILLS[0] - 1e-3 < fills.min() < 0.65 and 0.8 < fills.max() < FILLS[1] + 1e-3
    assert (turns.max(0) <= np.array((AZIMUTH, ELEVATION, ROLL)) + 1e-3).all()
    assert (turns.max(0) > 0.7 * np.array((AZIMUTH, ELEVATION, ROLL))).all()
    assert len({frame.viewmat.tobytes() for subject in rendered for frame in subject.images}) == 36


def test_about_half_of_the_portraits_have_an_expression_unless_they_shall_rest():
    settings = SyntheticSettings(image_size=16, num_points=20, look="plain")
    first = [render_subject(f"synthetic-0-{index:06d}", settings, HEAD).images[0] for index in range(16)]
    assert 3 <= sum(bool(frame.load_params().expr.any()) for frame in first) <= 13
    settings = dataclasses.replace(settings, portrait="rest")
    first = [render_subject(f"synthetic-0-{index:06d}", settings, HEAD).images[0] for index in range(8)]
    assert not any(bool(frame.load_params().expr.any()) for frame in first)


def test_glasses_are_added_in_front_of_the_eyes_within_the_limits_of_a_face(crowd):
    wearers = [subject for subject in crowd if subject.appearance.details.glasses is not None]
    assert 0.1 < len(wearers) / len(crowd) < 0.5
    for subject in wearers[:6]:
        counts = np.bincount(subject.avatar.faces.numpy())
        assert counts[counts > 0].min() >= MIN_POINTS_PER_FACE and counts.max() <= MAX_POINTS_PER_FACE
        points = subject.avatar.canonical_points()["positions"]
        eyes = HEAD.canonical_vertices(subject.params)[HEAD.regions["eyes"]]
        glasses = (subject.avatar.sh[:, 0] == subject.avatar.sh[-1, 0]).all(1)  # of one color
        ahead = points[glasses, 2] > eyes[:, 2].max() + 0.005
        assert ahead.sum() >= 12
        rims = points[glasses][ahead]
        assert rims[:, 0].min() < eyes[:, 0].min() + 0.005 and rims[:, 0].max() > eyes[:, 0].max() - 0.005
        assert not HEAD.regions["eyes"][HEAD.faces[subject.avatar.faces[glasses]]].any()  # eyes turn


@pytest.mark.parametrize(("cut", "style"), [("fringe", "short"), ("bun", "short"), ("bob", "long"), ("afro", "curly")])
def test_a_cut_changes_where_hair_is(crowd, cut, style):
    subject = next(s for s in crowd if s.appearance.hair_style == style)
    details = dataclasses.replace(subject.appearance.details, glasses=None, cut_amount=0.5)
    clouds = []
    for name in ("none", cut):
        appearance = dataclasses.replace(subject.appearance, details=dataclasses.replace(details, cut=name))
        points = _surface_points(subject)
        avatar = _build_avatar(HEAD, subject.params, appearance, points, 0.85)
        scalp = HEAD.regions["scalp"][HEAD.faces].all(1)[avatar.faces]
        clouds.append(avatar.canonical_points()["positions"][scalp].numpy())
    plain, own = clouds
    moved = own - plain
    if cut == "fringe":  # down over the forehead, outside of it
        front = plain[:, 2] > np.quantile(plain[:, 2], 0.8)
        assert moved[front, 1].min() < -0.01 and not moved[plain[:, 2] < -0.03].any()
    elif cut == "bun":
        reached = [(cloud @ np.array((0, 0.67, -0.74))).max() for cloud in (plain, own)]  # up and backwards
        assert reached[1] > reached[0] + 0.02
    elif cut == "bob":
        low = np.sort(own[:, 1])[: len(own) // 10]
        assert np.ptp(low) < np.ptp(np.sort(plain[:, 1])[: len(plain) // 10])
    else:
        assert np.linalg.norm(own, axis=1).mean() > np.linalg.norm(plain, axis=1).mean() + 0.002


def _surface_points(subject):
    layout = face_layout(HEAD)
    styles = subject.appearance.hair_style, subject.appearance.beard_style
    return regular_points(layout, sparse_counts(layout, 900, *styles))


def test_hair_recedes_where_the_cut_says():
    details = synthesize_subject(HEAD, 0, look="varied").appearance.details
    places = {"across": np.zeros(2), "up": np.array((2.2, 0.3)), "from_front": np.array((1.5, 2.5))}  # top, nape
    for cut, low, high in (("horseshoe", 0, 0.01), ("thinning", 0.05, 0.5), ("fringe", 1, 1), ("none", 1, 1)):
        mask = hair_mask(dataclasses.replace(details, cut=cut, cut_amount=0.5), places)
        assert low <= mask[0] <= high and mask[1] == 1
    forehead = {"across": np.zeros(1), "up": np.array((1.2,)), "from_front": np.array((0.2,))}
    assert hair_mask(dataclasses.replace(details, cut="receding", cut_amount=1.0), forehead)[0] == 0


def test_a_head_without_regions_takes_the_varied_look():
    head = dataclasses.replace(HEAD, regions={})
    avatar = synthesize_subject(head, 3, **VARIED).avatar
    assert 300 <= len(avatar) <= 500 and all(torch.isfinite(tensor).all() for tensor in avatar.tensors().values())


@pytest.mark.parametrize(("name", "value"), [("look", "fancy"), ("light", "dim")])
def test_unknown_kinds_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is '{value}', expected one of"):
        synthesize_subject(HEAD, 0, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is '{value}', expected one of"):
        SyntheticSettings(**{name: value})
