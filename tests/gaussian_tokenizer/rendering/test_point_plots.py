"""Images of clouds: turned the right way, near over far, early dark and late bright, no cloud too small."""

import numpy as np
import pytest
from PIL import Image

from gaussian_tokenizer.rendering.point_plots import draw_comparison, draw_points, view


def rows_and_columns(pixels):
    return np.argwhere(pixels)[:, 0], np.argwhere(pixels)[:, 1]


def drawn(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_front_shows_the_subjects_left_on_the_right_and_the_nose_near():
    points = np.array([[0.1, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.3]])
    image, depth = view(points, 0)
    assert np.allclose(image, points[:, :2])
    assert depth.argmax() == 2


@pytest.mark.parametrize("azimuth", [0.0, 45.0, 90.0, 213.0])
def test_a_view_is_a_rotation_about_the_vertical(azimuth):
    points = np.random.default_rng(0).normal(size=(20, 3))
    image, depth = view(points, azimuth)
    turned = np.concatenate([image, depth[:, None]], 1)
    assert np.allclose(turned @ turned.T, points @ points.T)
    assert np.allclose(turned[:, 1], points[:, 1])
    # The camera is on the subject's left: what looks along its left ear comes nearer.
    towards = np.array([np.sin(np.radians(azimuth)), 0, np.cos(np.radians(azimuth))])
    assert np.allclose(depth, points @ towards)


def test_the_profile_from_the_subjects_left_shows_the_nose_on_the_left():
    image, _ = view(np.array([[0.0, 0.0, 0.3]]), 90.0)
    assert image[0, 0] < 0


def test_early_points_are_dark_and_late_ones_bright(tmp_path):
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 30), np.linspace(-1, 1, 30)), -1).reshape(-1, 2)
    grid = grid[np.argsort(grid[:, 1], kind="stable")]  # written from below
    cloud = np.concatenate([grid, np.zeros((900, 1))], 1)
    draw_comparison(tmp_path / "a.png", [("a", None, {"cloud": cloud})], {"front": 0.0})
    pixels = drawn(tmp_path / "a.png")
    points = (pixels.max(-1) - pixels.min(-1)) > 40  # colored, not the gray of letters
    rows, columns = rows_and_columns(points)
    colors = pixels[rows, columns]
    below, above = colors[rows > np.quantile(rows, 0.9)].mean(0), colors[rows < np.quantile(rows, 0.1)].mean(0)
    assert above.sum() > below.sum() + 100  # viridis goes from violet to yellow


def test_near_points_cover_far_ones(tmp_path):
    near, far = np.array([[0.0, 0.0, 0.5]]), np.array([[0.0, 0.0, -0.5]])
    corners = np.array([[-1.0, -1, 0], [1.0, 1, 0]])
    for order, name in (((near, far), "near-first"), ((far, near), "near-last")):
        cloud = np.concatenate([corners[:1], *order, corners[1:]])
        draw_comparison(tmp_path / f"{name}.png", [("a", None, {"cloud": cloud})], {"front": 0.0})
    first, last = drawn(tmp_path / "near-first.png"), drawn(tmp_path / "near-last.png")
    # The middle shows the near point: written second of four in one image, third in the other.
    differing = (first != last).any(-1)
    rows, columns = rows_and_columns(differing)
    middle = int(np.median(rows)), int(np.median(columns))
    assert last[middle].sum() > first[middle].sum()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_portraits_of_every_kind_are_shown_in_their_own_colors(tmp_path, mode):
    gray = Image.new("RGB", (32, 32), (0, 0, 0)).convert(mode)
    draw_comparison(tmp_path / "a.png", [("a", gray, {"cloud": np.zeros((0, 3))})])
    assert ((drawn(tmp_path / "a.png") == 0).all(-1)).mean() > 0.02


def test_empty_and_single_point_clouds_and_several_rows_are_drawn(tmp_path):
    portrait = Image.new("RGB", (8, 8))
    cloud = np.random.default_rng(0).normal(size=(50, 3))
    rows = [
        ("a", portrait, {"true": cloud, "generated": np.zeros((0, 3))}),
        ("b", None, {"true": np.zeros((1, 3)), "generated": cloud}),
    ]
    draw_comparison(tmp_path / "two.png", rows)
    draw_comparison(tmp_path / "one.png", rows[:1])
    draw_comparison(tmp_path / "none.png", [("a", None, {"generated": np.zeros((0, 3))})])
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in ("one", "two")]
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > 1.5 * sizes[0][1]


def test_points_are_drawn_over_their_head_at_their_place_near_over_far():
    """A head of 2 x 2 x 0 m in 100 pixels: 95 pixels are the diagonal of its base, 2 m; colors by height, bright above."""
    vertices = np.array([(-1, -1, 0), (1, -1, 0), (-1, 1, 0), (1, 1, 0)], float)
    image = np.array(draw_points(np.array([(0.5, 1.0, 0.1), (0.5, -1.0, 0.2)]), vertices, 0.0, 100)).astype(int)
    left, top = int((0.5 * 0.95 / 2 + 0.5) * 100), int((-1 * 0.95 / 2 + 0.5) * 100)
    assert image[top, left].tolist() == [253, 231, 37] and image[100 - top - 1, left].tolist() == [68, 1, 84]
    assert (image[50, 50] == 255).all() and (image[top, int((1 * 0.95 / 2 + 0.5) * 100)] == 205).all()
    behind = np.array(draw_points(np.array([(0.0, 0.0, 0.5), (0.3, 1.0, 0.0)]), vertices, 90.0, 100))
    other = np.array(draw_points(np.array([(0.3, 1.0, 0.0), (0.0, 0.0, 0.5)]), vertices, 90.0, 100))
    np.testing.assert_array_equal(behind, other)  # the order of the points does not matter
    assert draw_points(np.zeros((0, 3)), vertices, 0.0, 100).size == (100, 100)
