"""Face frames against hand-computed triangles and a float64 loop; inverse pairs; closest points against scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from gaussian_tokenizer.avatars.anchoring import (
    Local,
    face_frames,
    to_local,
    to_world,
)
from gaussian_tokenizer.geometry.triangles import closest_point_barycentrics, interpolate


def random_mesh(seed, num_vertices=12, num_faces=20, frames=(), dtype=torch.float32):
    rng = np.random.default_rng(seed)
    vertices = torch.tensor(rng.standard_normal((*frames, num_vertices, 3)) * 0.1, dtype=dtype)
    faces = torch.tensor(np.stack([rng.permutation(num_vertices)[:3] for _ in range(num_faces)]))
    return vertices, faces


def frame_by_the_formula(v0, v1, v2):
    """The published formula in float64, one triangle at a time."""

    def normalize(u):
        return u / math.sqrt(max(u @ u, 1e-20))

    a0 = normalize(v1 - v0)
    a1 = normalize(np.cross(a0, v2 - v0))
    a2 = -normalize(np.cross(a1, a0))
    scale = (np.linalg.norm(v1 - v0) + abs(a2 @ (v2 - v0))) / 2
    return (v0 + v1 + v2) / 3, np.stack([a0, a1, a2], axis=1), scale


def test_the_frame_of_a_triangle_computed_by_hand():
    # First edge 2 along x; third vertex 4 up in y. Normal +z; the third axis points away from the third vertex.
    vertices = torch.tensor([[0.0, 0, 0], [2, 0, 0], [1, 4, 0]])
    frames = face_frames(vertices, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(frames.centers[0], torch.tensor([1.0, 4 / 3, 0]))
    torch.testing.assert_close(frames.rotations[0], torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]))
    assert frames.scales.tolist() == [3.0]  # mean of base 2 and height 4


def test_the_frame_of_a_slanted_triangle_uses_its_height_and_not_its_side():
    vertices = torch.tensor([[1.0, 1, 1], [1, 1, 4], [1, 3, 101]])
    frames = face_frames(vertices, torch.tensor([[0, 1, 2]]))
    assert frames.scales.tolist() == [pytest.approx(2.5)]  # base 3, height 2
    torch.testing.assert_close(frames.rotations[0].T, torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]))


def test_frames_agree_with_the_formula_in_float64_for_every_frame_and_face():
    vertices, faces = random_mesh(0, frames=(3,))
    frames = face_frames(vertices, faces)
    for t in range(3):
        for f, corners in enumerate(faces.tolist()):
            center, rotation, scale = frame_by_the_formula(*vertices[t, corners].double().numpy())
            np.testing.assert_allclose(frames.centers[t, f], center, atol=1e-6)
            np.testing.assert_allclose(frames.rotations[t, f], rotation, atol=2e-5)
            np.testing.assert_allclose(frames.scales[t, f], scale, rtol=1e-4)


def test_rotations_are_proper():
    frames = face_frames(*random_mesh(1, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(frames.rotations), torch.ones(20, dtype=torch.float64))
    product = frames.rotations.mT @ frames.rotations
    torch.testing.assert_close(product, torch.eye(3, dtype=torch.float64).expand_as(product))


def test_a_degenerate_triangle_has_finite_frames_and_gradients():
    vertices = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], requires_grad=True)
    frames = face_frames(vertices, torch.tensor([[0, 1, 2], [0, 3, 3]]))
    (frames.centers.sum() + frames.rotations.sum() + frames.scales.sum()).backward()
    assert torch.isfinite(frames.rotations).all() and torch.isfinite(vertices.grad).all()


def test_to_world_is_the_published_formula():
    vertices, faces = random_mesh(2)
    rng = np.random.default_rng(3)
    local = rng.standard_normal((50, 3))
    point_faces = rng.integers(0, len(faces), 50)
    quats = rng.standard_normal((50, 4))
    log_scales = rng.standard_normal((50, 3))
    frames = face_frames(vertices.double(), faces)
    index = torch.from_numpy(point_faces)
    stored = Local(*(torch.from_numpy(values) for values in (local, log_scales, quats)))
    positions, world_scales, world_quats = to_world(stored, index, frames)
    for n, face in enumerate(point_faces):
        center, rotation, scale = frame_by_the_formula(*vertices[faces[face]].double().numpy())
        np.testing.assert_allclose(positions[n], scale * rotation @ local[n] + center, atol=1e-9)
        np.testing.assert_allclose(world_scales[n], scale * np.exp(log_scales[n]), rtol=1e-9)
        turned = Rotation.from_matrix(rotation) * Rotation.from_quat(quats[n], scalar_first=True)
        found = Rotation.from_quat(world_quats[n].numpy(), scalar_first=True)
        assert (turned.inv() * found).magnitude() < 1e-9
        assert float(world_quats[n].norm()) == pytest.approx(1)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), batched=st.booleans())
def test_to_local_undoes_to_world(seed, batched):
    vertices, faces = random_mesh(seed, frames=(2,) if batched else (), dtype=torch.float64)
    frames = face_frames(vertices, faces)
    generator = torch.Generator().manual_seed(seed)
    point_faces = torch.randint(len(faces), (30,), generator=generator)

    def normal(size):
        return torch.randn(30, size, generator=generator, dtype=torch.float64)

    local, scales, quats = normal(3), normal(3), torch.nn.functional.normalize(normal(4), dim=-1)
    shape = (2, 30) if batched else (30,)
    world = to_world(Local(local, scales, quats), point_faces, frames)
    assert world.positions.shape == (*shape, 3)
    positions, log_scales, back = to_local(world, point_faces, frames)
    torch.testing.assert_close(positions, local.expand_as(positions), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_scales, scales.expand_as(log_scales))
    aligned = back * (back * quats).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(aligned, quats.expand_as(back), rtol=1e-6, atol=1e-7)


def test_gaussians_follow_a_rigid_motion_of_the_head():
    vertices, faces = random_mesh(4, dtype=torch.float64)
    motion = Rotation.from_rotvec([0.3, -0.5, 0.2])
    turn, shift = torch.from_numpy(motion.as_matrix()), torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    local, quats = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    point_faces = torch.arange(20)
    before, after = face_frames(vertices, faces), face_frames(vertices @ turn.T + shift, faces)
    stored = Local(local, torch.zeros_like(local), quats)
    still, moved = to_world(stored, point_faces, before), to_world(stored, point_faces, after)
    torch.testing.assert_close(moved.positions, still.positions @ turn.T + shift)
    turned = motion * Rotation.from_quat(still.quats.numpy(), scalar_first=True)
    found = Rotation.from_quat(moved.quats.numpy(), scalar_first=True)
    assert (turned.inv() * found).magnitude().max() < 1e-6


def test_gradients_agree_with_finite_differences():
    vertices, faces = random_mesh(5, dtype=torch.float64)
    local = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    quats = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    point_faces = torch.arange(8)

    def world(vertices, local, quats):
        placed = to_world(Local(local, torch.zeros_like(local), quats), point_faces, face_frames(vertices, faces))
        return placed.positions, placed.quats

    assert torch.autograd.gradcheck(world, (vertices.requires_grad_(), local, quats))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.01, 1.0, 20.0]))
def test_closest_points_agree_with_a_minimizer(seed, spread):
    rng = np.random.default_rng(seed)
    triangle, point = rng.standard_normal((3, 3)), rng.standard_normal(3) * spread
    found = closest_point_barycentrics(torch.from_numpy(point)[None], torch.from_numpy(triangle)[None])[0].numpy()
    assert (found >= 0).all() and found.sum() == pytest.approx(1)

    def distance(b):
        return float(((np.array([1 - b[0] - b[1], b[0], b[1]]) @ triangle - point) ** 2).sum())

    inside = {"type": "ineq", "fun": lambda b: 1 - b[0] - b[1]}
    best = min(
        minimize(distance, start, bounds=[(0, 1)] * 2, constraints=[inside], method="SLSQP", tol=1e-14).fun
        for start in ([0.3, 0.3], [0, 0], [1, 0], [0, 1])
    )
    assert math.sqrt(distance(found[1:])) <= math.sqrt(best) + 1e-6


def test_closest_points_of_each_region_of_a_triangle_computed_by_hand():
    triangle = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    points = torch.tensor(
        [[0.25, 0.25, 5], [-1, -1, 0], [3, -1, 0], [-1, 3, 0], [0.5, -2, 1], [1, 1, 0], [-1, 0.25, 0]]
    )
    expected = [[0.5, 0.25, 0.25], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 0.5, 0.5], [0.75, 0, 0.25]]
    found = closest_point_barycentrics(points, triangle.expand(len(points), 3, 3))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_degenerate_triangles_have_closest_points_too():
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    dot = torch.ones(3, 3)
    found = closest_point_barycentrics(torch.tensor([[1.5, 1, 0], [4.0, 5, 6]]), torch.stack([line, dot]))
    torch.testing.assert_close(found.sum(-1), torch.ones(2))
    torch.testing.assert_close(found[0] @ line, torch.tensor([1.5, 0, 0]))
    torch.testing.assert_close(found[1] @ dot, torch.ones(3))


def test_interpolation_reproduces_linear_functions_of_position():
    vertices, faces = random_mesh(6)
    barycentrics = torch.rand(30, 3)
    barycentrics = barycentrics / barycentrics.sum(-1, keepdim=True)
    point_faces = torch.randint(len(faces), (30,))
    points = interpolate(vertices, faces, point_faces, barycentrics)
    weights = torch.randn(3, 5, 2)
    per_vertex = torch.einsum("vi,ijk->vjk", vertices, weights)
    found = interpolate(per_vertex, faces, point_faces, barycentrics)
    assert found.shape == (30, 5, 2)
    torch.testing.assert_close(found, torch.einsum("ni,ijk->njk", points, weights))
    one_value = interpolate(torch.arange(12.0), faces, point_faces, torch.eye(3)[[1]].expand(30, 3))
    torch.testing.assert_close(one_value, faces[point_faces, 1].float())
