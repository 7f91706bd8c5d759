"""Projection, silhouette, inside and outside, against formulas written out in loops and against the renderer."""

import numpy as np
import pytest
import torch

from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.captures.loading import load_tracking
from gaussian_tokenizer.captures.projection import (
    CONVENTIONS,
    EXPECTED,
    as_if,
    is_inside,
    project,
    sample_frames,
    share_seen,
    silhouette,
)
from gaussian_tokenizer.rendering.splatting import render


@pytest.fixture(scope="module")
def tracking(tracked, small_head):
    return load_tracking(tracked, small_head)


def test_a_point_is_projected_to_where_the_renderer_draws_it(tracking):
    frame = tracking.frames[3]
    points = np.random.default_rng(0).uniform(-0.08, 0.08, (6, 3))
    pixels, depth = project(points, frame, frame.viewmat)
    for point, pixel, distance in zip(points, pixels, depth):
        dot = Gaussians(
            positions=torch.tensor(point)[None, None],
            scales=torch.full((1, 1, 3), 0.002, dtype=torch.float64),
            quats=torch.tensor([[[1.0, 0, 0, 0]]], dtype=torch.float64),
            opacities=torch.ones(1, dtype=torch.float64),
            sh=torch.ones(1, 1, 3, dtype=torch.float64),
        )
        drawn = render(dot, tracking.cameras([3]))
        alpha = drawn.alpha[0, ..., 0].numpy()
        rows, columns = np.indices(alpha.shape) + 0.5
        center = np.array([(alpha * columns).sum(), (alpha * rows).sum()]) / alpha.sum()
        np.testing.assert_allclose(pixel, center, atol=0.02)
        row, column = np.unravel_index(alpha.argmax(), alpha.shape)
        assert float(drawn.depth[0, row, column, 0]) == pytest.approx(distance, abs=1e-6)


def test_a_silhouette_is_where_any_triangle_is(tracking, small_head):
    [sample] = sample_frames(tracking, small_head, 1)
    faces, frame = small_head.faces.numpy(), sample.frame
    found = silhouette(sample.vertices, faces, frame, frame.viewmat, longest=160)
    pixels, _ = project(sample.vertices, frame, frame.viewmat)
    x, y = np.meshgrid(np.arange(160) + 0.5, np.arange(160) + 0.5)
    expected = np.zeros((160, 160), bool)
    for (ax, ay), (bx, by), (cx, cy) in 4 * pixels[faces]:
        sides = [
            (qx - px) * (y - py) - (qy - py) * (x - px)
            for (px, py), (qx, qy) in (((ax, ay), (bx, by)), ((bx, by), (cx, cy)), ((cx, cy), (ax, ay)))
        ]
        expected |= np.all([side >= 0 for side in sides], 0) | np.all([side <= 0 for side in sides], 0)
    assert expected.mean() > 0.2
    assert (found & expected).sum() / (found | expected).sum() > 0.97  # PIL paints every pixel an edge touches
    assert (expected & ~found).mean() < 0.002


def test_the_middle_of_the_head_is_inside_and_around_it_is_outside(small_head):
    vertices, faces = small_head.template.double().numpy(), small_head.faces.numpy()
    skull = vertices[~small_head.regions["neck"].numpy()]
    middle, size = skull.mean(0), float(np.ptp(skull, 0).max())
    assert is_inside(middle, vertices, faces)
    rng = np.random.default_rng(0)
    for direction in rng.standard_normal((20, 3)):
        direction /= np.linalg.norm(direction)
        assert is_inside(middle + 0.1 * size * direction, vertices, faces)
        assert not is_inside(middle + 1.5 * size * direction, vertices, faces)


def test_a_frame_is_seen_as_if_it_were_of_another_convention(tracking):
    frame = tracking.frames[1]
    camera_to_world = np.linalg.inv(frame.viewmat)
    assert np.allclose(as_if(frame, EXPECTED), frame.viewmat)
    # The file held x right, y up, z backward in columns; taken for x right, y down, z forward it looks the other way.
    turned = np.linalg.inv(as_if(frame, "camera-to-world with OpenCV axes"))
    assert np.allclose(turned[:3, 3], camera_to_world[:3, 3])
    assert np.allclose(turned[:3, :3], camera_to_world[:3, :3] * [1, -1, -1])
    stored = camera_to_world * [1, -1, -1, 1]
    assert np.allclose(as_if(frame, "world-to-camera with OpenCV axes"), stored)
    assert np.allclose(as_if(frame, "world-to-camera with OpenGL axes"), np.diag([1, -1, -1, 1]) @ stored)


@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_only_the_right_convention_sees_the_head(tracking, small_head, convention):
    samples = sample_frames(tracking, small_head, 6)
    seen = np.mean([share_seen(each.vertices, each.frame, as_if(each.frame, convention)) for each in samples])
    assert (seen > 0.9) == (convention == EXPECTED) and (convention == EXPECTED or seen < 0.3)


@pytest.mark.parametrize(("count", "cameras", "timesteps"), [(1, 1, 1), (3, 3, 3), (6, 6, 4), (12, 6, 4), (99, 6, 4)])
def test_a_sample_is_of_many_cameras_and_timesteps(tracking, small_head, count, cameras, timesteps):
    samples = sample_frames(tracking, small_head, count)
    assert len(samples) == len({each.frame_index for each in samples}) == min(count, 24)
    assert len({each.frame.camera for each in samples}) == cameras
    assert len({each.frame.timestep for each in samples}) >= min(timesteps, 2 if count == 12 else timesteps)
    for each in samples:
        assert tracking.frames[each.frame_index] is each.frame
        params = tracking.params.frame(each.frame.timestep)
        np.testing.assert_allclose(each.vertices, small_head.pose(params).vertices[0], atol=1e-6)
