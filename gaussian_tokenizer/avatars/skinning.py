"""Moving face-bound Gaussians with the head: linear blend skinning, or riding on the faces.

Canonical or face-local Gaussians and head parameters of T frames go in, world-space positions, scales and quaternions
of T frames come out, batched and differentiable. `skin` is the paper's way: skinning weights and blendshapes are
interpolated at the point's closest point on its face (AvatarPointillist, CVPR 2026; the chain is SMPL's, Loper et al.
2015). `pose_by_face_frames` is that of GaussianAvatars (Qian et al., CVPR 2024, section 3.2). They agree at rest. In the
first a Gaussian keeps its size and turns with the joints, in the second it is stretched and turned with its triangle.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gaussian_tokenizer.avatars.anchoring import (
    face_frames,
    local_to_world,
    local_to_world_log_scales,
    local_to_world_quats,
    world_to_local,
    world_to_local_log_scales,
    world_to_local_quats,
)
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.geometry.rotations import matrix_to_quaternion, quaternion_multiply
from gaussian_tokenizer.geometry.triangles import closest_point_barycentrics, interpolate
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

METHODS = ("lbs", "face_frames")
MIN_SCALE = 1e-9  # meters; what is smaller has no finite logarithm
NEWTON_STEPS = 8  # enough for double precision at the determinant below
SINGULAR = 1e-3  # determinant of a mean of rotations below which "the nearest rotation" has no stable answer


@dataclass(frozen=True, eq=False)
class Placed:
    """Where N Gaussians are in T frames (leading axes `...`: T, or none in canonical pose), world space."""

    positions: Tensor  # (..., N, 3) meters
    scales: Tensor  # (..., N, 3) meters
    quats: Tensor  # (..., N, 4) unit, wxyz


@dataclass(frozen=True, eq=False)
class Local:
    """N Gaussians relative to their faces, as an avatar stores them."""

    positions: Tensor  # (N, 3) in units of the face scale
    log_scales: Tensor  # (N, 3)
    quats: Tensor  # (N, 4) wxyz, any length
    faces: Tensor  # (N,) int64


def retarget(own: HeadParameters, motion: HeadParameters, head: HeadModel) -> HeadParameters:
    """The motion on the subject's own head: `own` shape and static offset, all that moves from `motion`.

    Of the motion, expression, joint rotations, translation and dynamic offset are used, in its dtype; whose shape it
    carries does not matter. `ValueError` if it was made for a head of other expressions or vertices.
    """
    check_motion(motion, head)
    like = motion.expr
    static = None if own.static_offset is None else own.static_offset.to(like)
    return replace(motion, shape=own.shape.to(like), static_offset=static, layout=None)


def animate(
    gaussians: Gaussians,
    faces: Tensor,
    params: HeadParameters,
    head: HeadModel,
    method: str = "lbs",
    pose_correctives: bool = True,
    rotate_covariances: bool = True,
) -> Gaussians:
    """Canonical Gaussians (T = 1) bound to `faces` (N,), in every frame of `params`, whose shape is the subject's own.

    `GaussianAvatar.posed` for Gaussians that are no avatar yet, such as what a network predicts: gradients pass to
    them and to `params`.
    """
    if gaussians.num_frames != 1:
        raise ValueError(f"canonical Gaussians have 1 frame, found {gaussians.num_frames}")
    positions, quats = gaussians.positions[0], normalize(gaussians.quats[0], dim=-1)
    scales = gaussians.scales[0].clamp(min=MIN_SCALE)
    if method == "lbs":
        placed = skin(Placed(positions, scales, quats), faces, params, head, pose_correctives, rotate_covariances)
    else:
        frames = face_frames(head.canonical_vertices(params), head.faces)
        local = Local(
            world_to_local(positions, faces, frames),
            world_to_local_log_scales(scales.log(), faces, frames),
            world_to_local_quats(quats, faces, frames),
            faces,
        )
        placed = place(local, params, head, method, pose_correctives, rotate_covariances)
    return Gaussians(placed.positions, placed.scales, placed.quats, gaussians.opacities, gaussians.sh)


def place(
    local: Local, params: HeadParameters, head: HeadModel, method: str, pose_correctives: bool, rotate_covariances: bool
) -> Placed:
    """Gaussians of an avatar in every frame of `params`, whose shape is its own: by `skin` or `pose_by_face_frames`."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} of posing; expected {' or '.join(METHODS)}")
    head_faces = head.faces.to(local.faces.device)
    if method == "lbs":
        at_rest = pose_by_face_frames(local, head.canonical_vertices(params), head_faces)
        return skin(at_rest, local.faces, params, head, pose_correctives, rotate_covariances)
    return pose_by_face_frames(local, head.pose(params, pose_correctives).vertices, head_faces)


def check_motion(motion: HeadParameters, head: HeadModel) -> None:
    """`ValueError` if the frames of `motion` cannot move `head`."""
    found, what, expected = motion.expr.shape[-1], "expression components", head.n_expression
    if found == expected and motion.dynamic_offset is not None:
        found, what, expected = motion.dynamic_offset.shape[-2], "vertices in dynamic_offset", head.n_vertices
    if found != expected:
        raise ValueError(
            f"the motion has {found} {what}, head model {head.name!r} has {expected}; give a motion made with this head "
            "model, or use the avatar's"
        )


def pose_by_face_frames(local: Local, vertices: Tensor, head_faces: Tensor) -> Placed:
    """The Gaussians on a mesh of `vertices` (..., V, 3): position, size and turn follow the face each is bound to."""
    frames = face_frames(vertices, head_faces)
    return Placed(
        local_to_world(local.positions, local.faces, frames),
        local_to_world_log_scales(local.log_scales, local.faces, frames).exp(),
        local_to_world_quats(local.quats, local.faces, frames),
    )


def skin(
    at_rest: Placed,
    faces: Tensor,
    params: HeadParameters,
    head: HeadModel,
    pose_correctives: bool = True,
    rotate_covariances: bool = True,
) -> Placed:
    """Linear blend skinning of N canonical Gaussians, bound to `faces` (N,), by every frame of `params`.

    For a point x of the canonical head with barycentrics c of its closest point on its face, and weights w = c . W:
    x' = sum_j w_j A_j (x + sum_i c_i (rest_i - canonical_i)). Blendshapes and correctives are linear in the vertices,
    so displacements are interpolated in place of the directions. The quaternions turn by the rotation nearest to
    sum_j w_j R_j, scales stay as they are at rest; without `rotate_covariances` quaternions stay too, which together
    with `pose_correctives=False` is what LAM's renderer does.
    """
    head_faces = head.faces.to(faces.device)
    canonical = head.canonical_vertices(params)  # (V, 3)
    corners = head_faces[faces]  # (N, 3)
    barycentrics = closest_point_barycentrics(at_rest.positions, canonical[corners])  # (N, 3)
    weights = interpolate(head.skinning_weights.to(canonical), head_faces, faces, barycentrics)  # (N, J)

    posed = head.pose(params, pose_correctives)
    displacements = posed.rest_vertices - canonical  # (T, V, 3)
    moved = at_rest.positions + sum(
        barycentrics[:, corner, None] * displacements.index_select(1, corners[:, corner]) for corner in range(3)
    )  # (T, N, 3)
    affine = posed.joint_transforms[:, :, :3]  # (T, J, 3, 4)
    blended = (weights @ affine.flatten(2)).unflatten(-1, (3, 4))  # (T, N, 3, 4)
    positions = (blended[..., :3] @ moved[..., None])[..., 0] + blended[..., 3]

    quats = at_rest.quats.expand(*positions.shape[:2], 4)
    if rotate_covariances:
        blend, rotations = blended[..., :3], affine[..., :3]  # (T, N, 3, 3), (T, J, 3, 3)
        strongest = rotations.index_select(1, weights.argmax(-1))
        turns = nearest_rotation(blend, instead=strongest)
        quats = quaternion_multiply(matrix_to_quaternion(turns), quats)
    return Placed(positions, at_rest.scales.expand_as(positions), quats)


def nearest_rotation(matrix: Tensor, instead: Tensor) -> Tensor:
    """(..., 3, 3), means of rotations -> the nearest rotations in the Frobenius norm.

    That is the rotation of the polar decomposition, reached by Newton's iteration X <- (g X + X^-T / g) / 2 with
    g = det(X)^(-1/3) (Higham 1986, scaled), which unlike an SVD has a gradient where singular values are equal. Where
    the mean is nearly singular (rotations half a turn apart cancel out) the rotation `instead` (..., 3, 3) is taken.
    """
    cofactors = _cofactors(matrix)
    determinant = (matrix * cofactors).sum((-1, -2)) / 3
    broken = (determinant < SINGULAR)[..., None, None]
    rotation = torch.where(broken, instead, matrix)
    for _ in range(NEWTON_STEPS):
        cofactors = _cofactors(rotation)
        determinant = (rotation[..., 0, :] * cofactors[..., 0, :]).sum(-1)
        scaling = determinant.pow(-1 / 3)
        rotation = (scaling[..., None, None] * rotation + cofactors / (scaling * determinant)[..., None, None]) / 2
    return rotation


def _cofactors(matrix: Tensor) -> Tensor:
    """(..., 3, 3) -> det(M) M^-T, whose rows are the cross products of the rows of M."""
    first, second, third = matrix.unbind(-2)
    cross = torch.linalg.cross
    return torch.stack((cross(second, third), cross(third, first), cross(first, second)), -2)
