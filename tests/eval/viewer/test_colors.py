from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

from eval.viewer.colors import MODES, modes, point_colors, points_per_area, ramp
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.subject import synthesize_subject
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer


@pytest.fixture(scope="module")
def avatar() -> GaussianAvatar:
    return synthesize_subject(build_procedural_head(600), 1, num_points=300).avatar


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_each_point_a_color(avatar, mode):
    colors = point_colors(avatar, mode)
    assert colors.shape == (len(avatar), 3) and colors.dtype == np.float32
    assert 0 <= colors.min() < colors.max() <= 1


def test_true_colors_are_those_of_the_gaussians(avatar):
    expected = avatar.canonical_gaussians().colors.clamp(max=1).numpy()
    np.testing.assert_allclose(point_colors(avatar, "true color"), expected, atol=1e-6)


def test_the_ramp_is_viridis():
    values = np.linspace(0, 1, 50)
    np.testing.assert_allclose(ramp(values), matplotlib.colormaps["viridis"](values)[:, :3], atol=0.1)


def test_order_runs_from_the_first_row_to_the_last(avatar):
    colors = point_colors(avatar, "generation order")
    np.testing.assert_allclose(colors[[0, -1]], ramp(np.array((0.0, 1.0))))
    turned = replace(avatar, positions=avatar.positions.flip(0), faces=avatar.faces.flip(0))
    np.testing.assert_array_equal(point_colors(turned, "generation order"), colors)  # of the row, not of the point


def test_generation_order_is_a_mode_of_generated_avatars_only(avatar):
    assert "generation order" not in modes(avatar) and set(modes(avatar)) < set(MODES)
    tokenizer = GaussianTokenizer(n_bins=64, n_faces=avatar.head.n_faces)
    tokenizer.fit([avatar])
    written = tokenizer.decode(tokenizer(avatar)["input_ids"])
    moved = written["positions"] + np.random.default_rng(0).normal(0, 0.005, written["positions"].shape)
    for positions in (written["positions"], moved):  # as written, and as a decoder moves them
        assert (
            modes(GaussianAvatar.from_points(written | {"positions": positions}, avatar.params, avatar.head)) == MODES
        )


def test_points_have_one_color_exactly_where_they_have_one_face(avatar):
    colors = point_colors(avatar, "face")
    faces = avatar.faces.numpy()
    by_face = {face: {tuple(color) for color in colors[faces == face]} for face in np.unique(faces)}
    assert all(len(found) == 1 for found in by_face.values())
    assert len(set().union(*by_face.values())) == len(by_face)


def test_density_is_points_of_a_face_by_its_area(avatar):
    head, row = avatar.head, 7
    face = int(avatar.faces[row])
    a, b, c = head.canonical_vertices(avatar.params)[head.faces[face]].double()
    area = torch.linalg.cross(b - a, c - a).norm() / 2
    expected = int((avatar.faces == face).sum()) / float(area)
    assert points_per_area(avatar)[row] == pytest.approx(expected, rel=1e-5)


def test_the_densest_points_are_the_brightest(avatar):
    density, colors = points_per_area(avatar), point_colors(avatar, "density")
    np.testing.assert_allclose(colors[density.argmin()], ramp(np.zeros(1))[0])
    np.testing.assert_allclose(colors[density.argmax()], ramp(np.ones(1))[0])


def test_an_unknown_mode_is_named(avatar):
    with pytest.raises(ValueError, match="'rainbow': expected one of true color"):
        point_colors(avatar, "rainbow")
