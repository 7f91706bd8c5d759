"""Posing: Gaussians follow the mesh they are bound to, by either animation, as the formulas say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.avatars.skinning import Skinning, nearest_rotation, retarget
from gaussian_tokenizer.geometry.rotations import axis_angle_to_matrix, quaternion_to_matrix
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

HEAD = build_procedural_head(600)


def random_params(num_frames=3, head=HEAD, seed=0, dtype=torch.float64, offsets=True) -> HeadParameters:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype) * 0.3

    values = {
        name: normal(*value.shape)
        for name, value in HeadParameters.zeros(head.n_shape, head.n_expression, num_frames).tensors().items()
    }
    if offsets:
        values["static_offset"] = normal(head.n_vertices, 3) * 0.003
        values["dynamic_offset"] = normal(num_frames, head.n_vertices, 3) * 0.003
    return HeadParameters(**values)


def random_avatar(count=60, head=HEAD, seed=0, params=None, spread=0.5) -> GaussianAvatar:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return GaussianAvatar(
        positions=normal(count, 3) * spread,
        faces=torch.randint(head.n_faces, (count,), generator=generator),
        sh=normal(count, 1, 3),
        opacities=normal(count),
        scales=normal(count, 3) * 0.5 - 1,
        quats=normal(count, 4),
        params=random_params(head=head, seed=seed) if params is None else params,
    ).with_head(head)


def covariances(gaussians: Gaussians) -> torch.Tensor:
    """(T, N, 3, 3) in millimeters, so that a tolerance means the same as for positions in meters."""
    stretched = quaternion_to_matrix(gaussians.quats) * (1000 * gaussians.scales[..., None, :])
    return stretched @ stretched.transpose(-1, -2)


# Linear blend skinning


def closest_barycentrics(point: np.ndarray, triangle: np.ndarray) -> np.ndarray:
    """By the definition: the best of the inside, the three edges and their ends, each found by least squares."""
    best = None
    for corners in ((0, 1, 2), (0, 1), (1, 2), (2, 0), (0,), (1,), (2,)):
        origin, rest = triangle[corners[0]], triangle[list(corners[1:])]
        directions = (rest - origin).T
        along = np.linalg.lstsq(directions, point - origin, rcond=None)[0] if len(rest) else np.zeros(0)
        values = np.zeros(3)
        values[list(corners)] = [1 - along.sum(), *along]
        distance = np.linalg.norm(values @ triangle - point)
        if (values >= 0).all() and (best is None or distance < best[0]):
            best = distance, values
    return best[1]


def skinned_one_by_one(avatar: GaussianAvatar, head: HeadModel, params: HeadParameters, frame: int, correctives=True):
    """Centers and rotation matrices, point by point in NumPy, from the formulas of the paper, FLAME and SMPL."""
    values = {name: value.double().numpy() for name, value in params.tensors().items()}
    template, shapes, expressions, correctors, regressor, weights = (
        getattr(head, name).double().numpy()
        for name in ("template", "shape_dirs", "expression_dirs", "pose_dirs", "joint_regressor", "skinning_weights")
    )
    canonical = template + shapes @ values["shape"] + values["static_offset"]
    offsets = values["dynamic_offset"][frame]
    shaped = canonical + expressions @ values["expr"][frame] + offsets
    joints = regressor @ shaped
    angles = [values["rotation"][frame], values["neck_pose"][frame], values["jaw_pose"][frame]]
    angles += [values["eyes_pose"][frame, :3], values["eyes_pose"][frame, 3:]]
    turns = [Rotation.from_rotvec(angle).as_matrix() for angle in angles]
    chain: list[np.ndarray] = []
    for joint, parent in enumerate(head.parents):
        local = np.eye(4)
        local[:3, :3], local[:3, 3] = turns[joint], joints[joint] - (joints[parent] if joint else 0)
        chain.append(local if parent < 0 else chain[parent] @ local)
    features = np.concatenate([(turn - np.eye(3)).ravel() for turn in turns[1:]]) * correctives
    centers, rotations = [], []
    for position, face, quat in zip(avatar.positions.double().numpy(), avatar.faces, avatar.quats.double().numpy()):
        corners = head.faces[face].numpy()
        v0, v1, v2 = triangle = canonical[corners]
        edge = v1 - v0
        a0 = edge / np.linalg.norm(edge)
        a1 = np.cross(a0, v2 - v0)
        a1 /= np.linalg.norm(a1)
        axes = np.stack((a0, a1, np.cross(a0, a1)), 1)
        size = (np.linalg.norm(edge) + abs(axes[:, 2] @ (v2 - v0))) / 2
        point = size * axes @ position + triangle.mean(0)
        c = closest_barycentrics(point, triangle)
        expression_dirs = np.einsum("c,cik->ik", c, expressions[corners])  # interpolated directions, as in the paper
        corrective_dirs = np.einsum("c,cik->ik", c, correctors[corners])
        rest = point + expression_dirs @ values["expr"][frame] + corrective_dirs @ features + c @ offsets[corners]
        w = c @ weights[corners]
        center, blend = np.zeros(3), np.zeros((3, 3))
        for joint in range(head.n_joints):
            center += w[joint] * (chain[joint][:3, :3] @ (rest - joints[joint]) + chain[joint][:3, 3])
            blend += w[joint] * chain[joint][:3, :3]
        left, _, right = np.linalg.svd(blend)
        turn = left @ np.diag((1, 1, np.linalg.det(left @ right))) @ right
        centers.append(center + values["translation"][frame])
        rotations.append(turn @ axes @ Rotation.from_quat(quat, scalar_first=True).as_matrix())
    return np.stack(centers), np.stack(rotations)


@pytest.mark.parametrize("correctives", [True, False])
def test_skinning_agrees_with_a_loop_over_points_written_from_the_formulas(correctives):
    avatar = random_avatar(seed=1, spread=1.0)
    posed = avatar.posed(pose_correctives=correctives)
    for frame in range(3):
        centers, rotations = skinned_one_by_one(avatar, HEAD, avatar.params, frame, correctives)
        np.testing.assert_allclose(posed.positions[frame], centers, atol=1e-8)
        np.testing.assert_allclose(quaternion_to_matrix(posed.quats[frame]), rotations, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_a_point_on_a_vertex_follows_the_vertex(seed):
    params = random_params(seed=seed)
    corners = torch.arange(HEAD.n_faces) % 3
    vertices = HEAD.faces[torch.arange(HEAD.n_faces), corners]
    on_vertices = {
        "positions": HEAD.canonical_vertices(params)[vertices],
        "faces": torch.arange(HEAD.n_faces),
    }
    points = GaussianAvatar.from_points(on_vertices, replace_dtype(params, torch.float32), HEAD)
    count = len(points)
    avatar = replace(
        points,
        sh=torch.zeros(count, 1, 3),
        opacities=torch.zeros(count),
        scales=torch.zeros(count, 3),
        quats=torch.ones(count, 4),
    )
    # An avatar keeps float32, and `own` shape: so the vertex is where float32 put it, and the motion is exact.
    motion = replace_dtype(avatar.params, torch.float64)
    start = avatar.posed(motion.canonical()).positions[0] - HEAD.canonical_vertices(motion)[vertices]
    assert start.abs().max() < 1e-6
    expected = HEAD.pose(motion).vertices[:, vertices]
    assert (avatar.posed(motion).positions - expected).norm(dim=-1).max() < 1e-6


def replace_dtype(params: HeadParameters, dtype: torch.dtype) -> HeadParameters:
    return replace(params, **{name: value.to(dtype) for name, value in params.tensors().items()})


def test_a_point_in_the_middle_of_a_face_stays_in_its_plane_and_follows_its_expression():
    params = HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression, 2)
    params = replace_dtype(params, torch.float64)
    params.expr[1] = torch.rand(HEAD.n_expression, generator=torch.Generator().manual_seed(0))
    avatar = replace(random_avatar(params=params), positions=torch.zeros(60, 3))
    centroids = HEAD.pose(params).vertices[:, HEAD.faces[avatar.faces]].mean(2)
    torch.testing.assert_close(avatar.posed().positions, centroids, atol=1e-6, rtol=0)


def test_turning_the_whole_head_turns_every_gaussian_rigidly():
    avatar = random_avatar()
    turn = torch.tensor([[0.4, -1.1, 0.7]], dtype=torch.float64)
    motion = replace(avatar.params.canonical(), rotation=turn)
    still, turned = avatar.posed(avatar.params.canonical()), avatar.posed(motion)
    rotation = axis_angle_to_matrix(turn)[0]
    expected = rotation @ covariances(still) @ rotation.T
    torch.testing.assert_close(covariances(turned), expected, atol=1e-9, rtol=1e-7)
    apart = still.positions[0, :, None] - still.positions[0]
    torch.testing.assert_close(turned.positions[0, :, None] - turned.positions[0], apart @ rotation.T)


@pytest.mark.parametrize("joint", ["neck_pose", "jaw_pose"])
def test_a_gaussian_between_two_joints_turns_with_the_mean_of_both(joint):
    avatar = random_avatar(count=400)
    angle = torch.zeros(1, 3, dtype=torch.float64)
    angle[0, 0] = 0.8
    still, posed = avatar.canonical_gaussians(), avatar.posed(replace(avatar.params.canonical(), **{joint: angle}))
    between = quaternion_to_matrix(posed.quats[0]) @ quaternion_to_matrix(still.quats[0]).transpose(-1, -2)
    angles = torch.arccos(((between.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1))
    assert angles.min() < 1e-3 and angles.max() < 0.8 + 1e-4
    assert ((angles > 0.05) & (angles < 0.75)).any()
    # All about the same axis.
    axes = torch.stack((between[:, 2, 1] - between[:, 1, 2], between[:, 0, 2] - between[:, 2, 0]), -1)
    assert (axes[:, 0] > -1e-5).all() and axes[:, 1].abs().max() < 1e-5


def test_lams_settings_leave_rotations_and_correctives_out():
    avatar = random_avatar()
    full, lam = avatar.posed(), avatar.posed(pose_correctives=False, rotate_covariances=False)
    canonical = avatar.canonical_gaussians()
    torch.testing.assert_close(lam.quats, canonical.quats.expand(3, -1, -1))
    torch.testing.assert_close(lam.scales, canonical.scales.expand(3, -1, -1))
    assert torch.equal(lam.positions, avatar.posed(pose_correctives=False).positions)
    assert (full.positions - lam.positions).norm(dim=-1).max() > 1e-4
    assert (covariances(full) - covariances(lam)).abs().max() > 1


# Both animations


def test_both_animations_coincide_in_canonical_pose():
    avatar = random_avatar()
    rest = avatar.params.canonical()
    expected = avatar.canonical_gaussians()
    # As exact as the skinning weights of the head, which are float32 and sum to 1 but for 1e-7.
    for animation in ("lbs", "face_frames"):
        posed = avatar.posed(rest, animation=animation)
        torch.testing.assert_close(posed.positions, expected.positions, atol=5e-8, rtol=0)
        torch.testing.assert_close(covariances(posed), covariances(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected.positions[0], avatar.canonical_points()["positions"], check_dtype=False)


@pytest.mark.parametrize("animation", ["lbs", "face_frames"])
def test_canonical_gaussians_that_are_no_avatar_yet_are_posed_as_the_avatar_is(animation):
    avatar = random_avatar()
    canonical = avatar.canonical_gaussians()
    leaf = canonical.positions.clone().requires_grad_()
    bound = Skinning.of_canonical(replace(canonical, positions=leaf), avatar.faces, avatar.params, HEAD)
    posed = bound.pose(avatar.params, animation)
    expected = avatar.posed(animation=animation)
    torch.testing.assert_close(posed.positions, expected.positions, atol=1e-9, rtol=0)
    torch.testing.assert_close(covariances(posed), covariances(expected), atol=1e-7, rtol=1e-7)
    posed.positions.sum().backward()
    assert leaf.grad.abs().min() > 0
    with pytest.raises(ValueError, match="canonical Gaussians have 1 frame, found 3"):
        Skinning.of_canonical(posed, avatar.faces, avatar.params, HEAD)


def test_a_gaussian_on_a_face_follows_the_face_as_computed_by_hand():
    head = replace(
        HEAD,
        template=torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 0, -2]]),
        faces=torch.tensor([[0, 1, 2]]),
        shape_dirs=torch.zeros(3, 3, 1),
        # One unit of the expression doubles the triangle.
        expression_dirs=torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 0, -2]])[..., None],
        pose_dirs=torch.zeros(3, 3, 36),
        joint_regressor=torch.tensor([[1.0, 0, 0]] * 5),
        skinning_weights=torch.tensor([[1.0, 0, 0, 0, 0]] * 3),
        expression_names=("double",),
        landmark_faces=torch.zeros(0, dtype=torch.int64),
        landmark_barycentrics=torch.zeros(0, 3),
        regions={},
    )
    params = HeadParameters.zeros(1, 1, 3)
    params.expr[1] = 1.0
    params.rotation[2, 2] = torch.pi / 2  # x becomes y, y becomes -x
    params.translation[2, 0] = 5.0
    avatar = GaussianAvatar(
        positions=torch.tensor([[0.0, 0.5, 0.0]]),  # half a face scale along the normal
        faces=torch.tensor([0]),
        sh=torch.zeros(1, 1, 3),
        opacities=torch.zeros(1),
        scales=torch.tensor([[0.5, 0.25, 0.125]]).log(),
        quats=torch.tensor([[3.0, 0, 0, 0]]),
        params=params,
    ).with_head(head)
    posed = avatar.posed(animation="face_frames")
    # x along the edge, y = x cross -z = y up, scale = (2 + 2) / 2 = 2, centroid (2/3, 0, -2/3).
    third = 2 / 3
    expected = torch.tensor([[third, 1, -third], [2 * third, 2, -2 * third], [5 - 1, third, -third]])
    torch.testing.assert_close(posed.positions[:, 0], expected)
    sizes = torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(posed.scales[:, 0], torch.stack((sizes, 2 * sizes, sizes)))
    quarter = torch.tensor([0.5**0.5, 0, 0, 0.5**0.5])
    torch.testing.assert_close(posed.quats[:, 0], torch.stack((torch.tensor([1.0, 0, 0, 0]),) * 2 + (quarter,)))
    # Skinned, it turns the same way, but keeps its size and its height over the face when that grows.
    skinned = avatar.posed(animation="lbs")
    torch.testing.assert_close(skinned.positions[::2], posed.positions[::2])
    torch.testing.assert_close(skinned.positions[1, 0], torch.tensor([2 * third, 1, -2 * third]))
    torch.testing.assert_close(skinned.scales[:, 0], sizes.expand(3, 3))
    torch.testing.assert_close(skinned.quats[:, 0].abs(), posed.quats[:, 0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("animation", ["lbs", "face_frames"])
def test_a_batch_is_its_frames_one_by_one(animation):
    avatar = random_avatar()
    together = avatar.posed(animation=animation)
    for frame in range(3):
        alone = avatar.posed(avatar.params.frame(frame), animation=animation)
        torch.testing.assert_close(together.frames(frame).positions, alone.positions, atol=1e-12, rtol=0)
        torch.testing.assert_close(together.frames(frame).scales, alone.scales)
        torch.testing.assert_close(together.frames(frame).quats, alone.quats)
    assert together.num_frames == 3 and together.positions.dtype == torch.float64


@pytest.mark.parametrize("animation", ["lbs", "face_frames"])
def test_posing_is_differentiable_to_gaussians_and_motion(animation):
    avatar = random_avatar(count=8)
    names = ("positions", "scales", "quats")
    leaves = {name: getattr(avatar, name).clone().requires_grad_() for name in names}
    motion = {name: value.clone().requires_grad_() for name, value in avatar.params.tensors().items()}
    posed = replace(avatar, **leaves).posed(HeadParameters(**motion), animation=animation)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(value.shape, generator=generator).double() for value in (posed.positions, posed.scales)]
    turned = covariances(posed)
    loss = (posed.positions * weights[0]).sum() + (posed.scales * weights[1]).sum() + turned.square().sum()
    loss.backward()
    for name, leaf in {**leaves, **motion}.items():
        if name in ("shape", "static_offset"):  # the avatar's own are used
            assert leaf.grad is None
        else:
            assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0, name


def test_gradients_of_skinning_are_those_of_finite_differences():
    avatar = random_avatar(count=5)
    motion = avatar.params.frame(1)
    names = ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")

    def pose(*values):
        posed = avatar.posed(replace(motion, **dict(zip(names, values))))
        return posed.positions, quaternion_to_matrix(posed.quats)

    inputs = tuple(getattr(motion, name).clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(pose, inputs, eps=1e-6, atol=1e-6)


def test_only_the_frames_an_image_shows_get_a_gradient():
    avatar = random_avatar()
    jaw = avatar.params.jaw_pose.clone().requires_grad_()
    avatar.posed(replace(avatar.params, jaw_pose=jaw)).frames(1).positions.square().sum().backward()
    assert jaw.grad[1].any() and not jaw.grad[0].any() and not jaw.grad[2].any()


# Another subject's motion


@pytest.mark.parametrize("animation", ["lbs", "face_frames"])
def test_the_motion_of_another_subject_leaves_the_own_shape(animation):
    avatar = random_avatar(seed=0)
    other = random_params(num_frames=2, seed=5)
    posed = avatar.posed(other, animation=animation)
    as_own = replace(other, shape=avatar.params.shape, static_offset=avatar.params.static_offset)
    assert torch.equal(posed.positions, avatar.posed(as_own, animation=animation).positions)
    larger = replace(other, shape=torch.ones(300).double(), static_offset=None)
    assert torch.equal(posed.positions, avatar.posed(larger, animation=animation).positions)
    assert posed.num_frames == 2


def test_a_motion_of_another_head_model_is_refused_in_one_line():
    avatar = random_avatar()
    with pytest.raises(ValueError, match=r"has 100 expression components, head model 'procedural:600' has 18; give"):
        avatar.posed(HeadParameters.zeros(300, 100))
    other = replace(
        HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression),
        dynamic_offset=torch.zeros(1, 5143, 3),
        static_offset=None,
    )
    with pytest.raises(ValueError, match=f"has 5143 vertices in dynamic_offset, .* has {HEAD.n_vertices}"):
        retarget(avatar.params, other, HEAD)


# Bound once, posed often


def test_one_pose_leaves_no_trace_in_the_next_and_each_is_that_of_the_avatar():
    avatar, motions = random_avatar(count=400), [random_params(seed=seed) for seed in (5, 6, 5)]
    bound = avatar.bind()
    for animation in ("lbs", "face_frames"):
        for motion in motions:
            posed, expected = bound.pose(motion, animation), avatar.posed(motion, animation)
            for name in ("positions", "scales", "quats", "opacities", "sh"):
                assert torch.equal(getattr(posed, name), getattr(expected, name))


def test_points_that_share_the_rotation_of_a_joint_turn_as_they_do_alone():
    avatar = random_avatar(count=400)
    alone = avatar.positions.clone().requires_grad_()  # with a gradient to the weights nothing is shared
    expected = replace(avatar, positions=alone).posed()
    posed = avatar.posed()
    assert len(avatar.bind()._anchors.mixed) < 300
    assert torch.equal(posed.quats, expected.quats) and torch.equal(posed.positions, expected.positions)


def test_covariances_are_those_of_the_posed_gaussians():
    avatar = random_avatar(count=400)
    posed = avatar.posed()
    positions, found = avatar.bind().covariances(avatar.params)
    assert torch.equal(positions, posed.positions)
    torch.testing.assert_close(1e6 * found, covariances(posed), atol=1e-9, rtol=1e-9)


def test_some_gaussians_are_posed_as_they_are_among_all():
    avatar = random_avatar()
    some, every = avatar.select(slice(None, None, 3)).posed(), avatar.posed()
    torch.testing.assert_close(some.positions, every.positions[:, ::3], atol=1e-12, rtol=0)
    torch.testing.assert_close(some.quats, every.quats[:, ::3], atol=1e-12, rtol=0)


# The nearest rotation


def test_the_nearest_rotation_is_that_of_the_singular_value_decomposition():
    rng = np.random.default_rng(0)
    rotations = Rotation.random(300, rng).as_matrix().reshape(100, 3, 3, 3)
    weights = rng.dirichlet(np.ones(3), 100)
    means = np.einsum("nk,nkij->nij", weights, rotations)
    stable = np.linalg.det(means) > 2e-3
    assert stable.sum() > 40
    left, _, right = np.linalg.svd(means)
    found = nearest_rotation(torch.from_numpy(means), instead=torch.from_numpy(rotations[:, 0])).numpy()
    np.testing.assert_allclose(found[stable], (left @ right)[stable], atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotations_that_cancel_out_give_one_of_them_and_a_finite_gradient(dtype):
    half_turns = axis_angle_to_matrix(torch.tensor([[0.0, 0, 0], [torch.pi, 0, 0]], dtype=dtype))
    mean = half_turns.mean(0).requires_grad_()
    found = nearest_rotation(mean, instead=half_turns[0])
    torch.testing.assert_close(found, torch.eye(3, dtype=dtype))
    found.square().sum().backward()
    assert torch.isfinite(mean.grad).all()


def test_a_mean_of_rotations_far_apart_is_a_rotation_in_single_precision():
    turns = axis_angle_to_matrix(torch.tensor([[0.0, 0, 0], [0.0, np.deg2rad(170), 0]], dtype=torch.float32))
    found = nearest_rotation(turns.mean(0), instead=turns[0])
    expected = axis_angle_to_matrix(torch.tensor([0.0, np.deg2rad(85), 0], dtype=torch.float32))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
