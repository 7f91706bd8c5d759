"""Face-bound Gaussians that move with the head: the paper's linear blend skinning (SMPL's chain), or face frames."""

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gaussian_tokenizer.avatars.anchoring import Local, Placed, face_frames, to_local, to_world
from gaussian_tokenizer.avatars.gaussians import MIN_SCALE, Gaussians
from gaussian_tokenizer.geometry.rotations import matrix_to_quaternion, quaternion_multiply, quaternion_to_matrix
from gaussian_tokenizer.geometry.triangles import closest_point_barycentrics, interpolate
from gaussian_tokenizer.heads.head_model import HeadModel, blend_joints
from gaussian_tokenizer.heads.head_parameters import HeadParameters

ANIMATIONS = ("lbs", "face_frames")
NEWTON_STEPS = 8  # enough for double precision at the determinant below
SINGULAR = 1e-3  # determinant of a mean of rotations below which the nearest rotation is not stable


class Anchors(NamedTuple):
    """Where N points are bound for linear blend skinning."""

    corners: Tensor  # (N, 3) int64, the vertices of each point's face
    barycentrics: Tensor  # (N, 3) of the closest point on that face
    weights: Tensor  # (N, J)
    mixed: Tensor  # (M,) int64, points whose rotation is computed for each of them
    turns: Tensor  # (N,) int64, index of each point's rotation among those M and the J joints'


class Skinning:
    """N Gaussians bound to one subject's head, made by `GaussianAvatar.bind` or from canonical Gaussians.

    What does not depend on the pose is computed once and kept, with its gradients: in training, bind once a step.
    """

    def __init__(
        self,
        gaussians: Placed | Local,
        faces: Tensor,
        own: HeadParameters,
        head: HeadModel,
        opacities: Tensor,
        sh: Tensor,
    ) -> None:
        """`faces` (N,) int64; of `own`, shape and static offset are used. `opacities` (N,) in 0..1, `sh` (N, K, 3)."""
        self.gaussians, self.faces, self.own, self.head = gaussians, faces, own, head
        self.opacities, self.sh = opacities, sh
        self.head_faces = head.faces.to(faces.device)

    @classmethod
    def of_canonical(cls, gaussians: Gaussians, faces: Tensor, own: HeadParameters, head: HeadModel) -> "Skinning":
        """Canonical Gaussians (T = 1) that are no avatar yet, such as what a network predicts; `faces` (N,)."""
        if gaussians.num_frames != 1:
            raise ValueError(f"canonical Gaussians have 1 frame, found {gaussians.num_frames}")
        scales, quats = gaussians.scales[0].clamp(min=MIN_SCALE), normalize(gaussians.quats[0], dim=-1)
        canonical = Placed(gaussians.positions[0], scales, quats)
        return cls(canonical, faces, own, head, gaussians.opacities, gaussians.sh)

    def pose(
        self,
        motion: HeadParameters,
        animation: str = "lbs",
        pose_correctives: bool = True,
        rotate_covariances: bool = True,
    ) -> Gaussians:
        """The Gaussians in every frame of `motion`, which may be another subject's: shape and static offset stay.

        `animation` "lbs" is linear blend skinning with interpolated weights and blendshapes (the paper), "face_frames" lets
        positions, sizes and rotations follow the faces (GaussianAvatars). `rotate_covariances=False` leaves the rotations of
        "lbs" as at rest; with `pose_correctives=False` that is LAM's renderer. SH are not rotated. ValueError for a motion
        of another head model.
        """
        if animation not in ANIMATIONS:
            raise ValueError(f"animation is {animation!r}, expected {' or '.join(ANIMATIONS)}")
        params = retarget(self.own, motion, self.head)
        if animation == "face_frames":
            positions, scales, quats = self._on_faces(self.head.pose(params, pose_correctives).vertices)
        else:
            positions, rotations, blended = self._skinned(params, pose_correctives)
            scales = self._canonical.scales.expand_as(positions)
            quats = self._canonical.quats.expand(*positions.shape[:2], 4)
            if rotate_covariances:
                turns = matrix_to_quaternion(self._nearest_rotations(rotations, blended))
                quats = quaternion_multiply(turns.index_select(1, self._anchors.turns), quats)
        return Gaussians(positions, scales, quats, self.opacities, self.sh)

    def positions(self, motion: HeadParameters) -> Tensor:
        """Only the positions (T, N, 3) of "lbs", in meters."""
        return self._skinned(retarget(self.own, motion, self.head), True)[0]

    def covariances(self, motion: HeadParameters) -> tuple[Tensor, Tensor]:
        """Positions (T, N, 3) in meters and covariances (T, N, 3, 3) of "lbs"; faster than `pose`, without quaternions."""
        positions, rotations, blended = self._skinned(retarget(self.own, motion, self.head), True)
        turns = self._nearest_rotations(rotations, blended).index_select(1, self._anchors.turns)
        axes = turns @ self._canonical_axes
        return positions, axes @ axes.mT

    def at_rest(self) -> Gaussians:
        """The Gaussians on the canonical head (own shape, no expression, no pose), T = 1."""
        positions, scales, quats = self._canonical
        return Gaussians(positions[None], scales[None], quats[None], self.opacities, self.sh)

    @cached_property
    def _canonical_vertices(self) -> Tensor:
        return self.head.canonical_vertices(self.own)  # (V, 3)

    @cached_property
    def _canonical(self) -> Placed:
        return self.gaussians if isinstance(self.gaussians, Placed) else self._on_faces(self._canonical_vertices)

    @cached_property
    def _canonical_axes(self) -> Tensor:
        """(N, 3, 3) rotation times scales: covariance = axes axes^T."""
        return quaternion_to_matrix(self._canonical.quats) * self._canonical.scales[:, None]

    @cached_property
    def _local(self) -> Local:
        if isinstance(self.gaussians, Local):
            return self.gaussians
        return to_local(self.gaussians, self.faces, face_frames(self._canonical_vertices, self.head_faces))

    @cached_property
    def _anchors(self) -> Anchors:
        canonical, corners = self._canonical_vertices, self.head_faces[self.faces]
        barycentrics = closest_point_barycentrics(self._canonical.positions, canonical[corners])
        weights = interpolate(self.head.skinning_weights.to(canonical), self.head_faces, self.faces, barycentrics)
        # Points that follow one joint share its rotation. Not in training: a gradient to the weights takes every point's.
        mixed = (weights != 1).all(-1) | weights.requires_grad
        turns = torch.where(mixed, mixed.cumsum(0) - 1, mixed.sum() + weights.argmax(-1))
        return Anchors(corners, barycentrics, weights, mixed.nonzero()[:, 0], turns)

    def _on_faces(self, vertices: Tensor) -> Placed:
        """The Gaussians on a mesh of `vertices` (..., V, 3)."""
        return to_world(self._local, self.faces, face_frames(vertices, self.head_faces))

    def _skinned(self, params: HeadParameters, pose_correctives: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Linear blend skinning: positions (T, N, 3), rotations of joints (T, J, 3, 3), their means (T, N, 3, 3).

        For a point x of the canonical head with barycentrics c of its closest point on its face, and weights w = c . W:
        x' = sum_j w_j A_j (x + sum_i c_i (rest_i - canonical_i)). Blendshapes and correctives are linear in the vertices,
        so displacements are interpolated in place of the directions.
        """
        corners, barycentrics, weights, _, _ = self._anchors
        rest_vertices, transforms = self.head.articulate(params, pose_correctives)
        displacements = rest_vertices - self._canonical_vertices  # (T, V, 3)
        moved = self._canonical.positions + sum(
            barycentrics[:, corner, None] * displacements.index_select(1, corners[:, corner]) for corner in range(3)
        )  # (T, N, 3)
        positions, blended = blend_joints(weights, transforms, moved)
        return positions, transforms[..., :3], blended

    def _nearest_rotations(self, rotations: Tensor, blended: Tensor) -> Tensor:
        """(T, M + J, 3, 3): a point turns by the rotation nearest to the mean of its joints', sum_j w_j R_j."""
        _, _, weights, mixed, _ = self._anchors
        strongest = rotations.index_select(1, weights.index_select(0, mixed).argmax(-1))  # (T, M, 3, 3)
        means = torch.cat((blended.index_select(1, mixed), rotations), 1)
        return nearest_rotation(means, instead=torch.cat((strongest, rotations), 1))


def retarget(own: HeadParameters, motion: HeadParameters, head: HeadModel) -> HeadParameters:
    """The motion on the subject's own head: shape and static offset of `own`, everything else of `motion`, in its dtype."""
    check_motion(motion, head)
    like = motion.expr
    static = None if own.static_offset is None else own.static_offset.to(like)
    return replace(motion, shape=own.shape.to(like), static_offset=static, layout=None)


def check_motion(motion: HeadParameters, head: HeadModel, what: str = "the motion") -> None:
    """ValueError if `motion` was made for a head with other expressions or vertices than `head`."""
    found, of, expected = motion.expr.shape[-1], "expression components", head.n_expression
    if found == expected and motion.dynamic_offset is not None:
        found, of, expected = motion.dynamic_offset.shape[-2], "vertices in dynamic_offset", head.n_vertices
    if found != expected:
        raise ValueError(
            f"{what} has {found} {of}, head model {head.name!r} has {expected}; give a motion made with this head "
            "model, or use the avatar's"
        )


def nearest_rotation(matrix: Tensor, instead: Tensor) -> Tensor:
    """(..., 3, 3), means of rotations -> the nearest rotations in the Frobenius norm; `instead` where nearly singular.

    The rotation of the polar decomposition by Newton's iteration X <- (g X + X^-T / g) / 2, g = det(X)^(-1/3) (Higham
    1986, scaled), which unlike an SVD has a gradient where singular values are equal.
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
