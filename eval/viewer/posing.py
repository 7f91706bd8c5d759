"""An avatar made ready to be posed many times a second: what does not change from pose to pose is computed once.

`GaussianAvatar.posed` computes everything anew and with gradients. Here the closest points, the interpolated weights and
the Gaussians at rest are kept, and the nearest rotation is looked for only where a point follows more than one joint.
Centers and covariances come out, which is what the browser draws; tests hold them to `GaussianAvatar.posed`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.skinning import nearest_rotation, retarget
from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix
from gaussian_tokenizer.geometry.triangles import closest_point_barycentrics, interpolate
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

ONE_JOINT = 1 - 1e-6  # weight from which a point follows its joint alone


class Splats(NamedTuple):
    """N posed Gaussians: `centers` (N, 3) meters, `covariances` (N, 3, 3) square meters, float32."""

    centers: np.ndarray
    covariances: np.ndarray


@dataclass(frozen=True, eq=False)
class Rig:
    """One avatar's Gaussians at rest and what moves them; linear blend skinning as in `animation.skin`."""

    head: HeadModel
    own: HeadParameters  # T = 1, at rest: the subject's shape and static offset
    canonical: Tensor  # (V, 3)
    centers: Tensor  # (N, 3) meters
    axes: Tensor  # (N, 3, 3) rotation times scales: covariance = axes axes^T
    corners: Tensor  # (N, 3) int64 vertices of each point's face
    barycentrics: Tensor  # (N, 3) of the closest point on that face
    weights: Tensor  # (N, J)
    mixed: Tensor  # int64 indices of the points that follow several joints

    @classmethod
    @torch.inference_mode()
    def of(cls, avatar: GaussianAvatar) -> "Rig":
        """Raises ValueError for an avatar without colors or without its head model."""
        rest = avatar.canonical_gaussians()
        head = avatar.head
        assert head is not None
        own = avatar.params or HeadParameters.zeros(head.n_shape, head.n_expression)
        canonical = head.canonical_vertices(own)
        corners = head.faces[avatar.faces]
        barycentrics = closest_point_barycentrics(rest.positions[0], canonical[corners])
        weights = interpolate(head.skinning_weights, head.faces, avatar.faces, barycentrics)
        return cls(
            head=head,
            own=own.canonical(),
            canonical=canonical,
            centers=rest.positions[0],
            axes=quaternion_to_matrix(rest.quats[0]) * rest.scales[0, :, None],
            corners=corners,
            barycentrics=barycentrics,
            weights=weights,
            mixed=(weights.amax(1) < ONE_JOINT).nonzero()[:, 0],
        )

    def every(self, step: int) -> "Rig":
        """That of each `step`-th point."""
        names = ("centers", "axes", "corners", "barycentrics", "weights")
        fewer = {name: getattr(self, name)[::step] for name in names}
        return replace(self, **fewer, mixed=(fewer["weights"].amax(1) < ONE_JOINT).nonzero()[:, 0])

    @torch.inference_mode()
    def pose(self, params: HeadParameters) -> Splats:
        """The Gaussians in the one frame of `params`, of which all but shape and static offset is used."""
        posed = self.head.pose(retarget(self.own, params, self.head))
        displacements = posed.rest_vertices[0] - self.canonical  # (V, 3)
        moved = self.centers.clone()
        for corner in range(3):
            moved += self.barycentrics[:, corner, None] * displacements[self.corners[:, corner]]
        affine = posed.joint_transforms[0, :, :3]  # (J, 3, 4)
        blended = (self.weights @ affine.flatten(1)).unflatten(1, (3, 4))  # (N, 3, 4)
        centers = (blended[..., :3] @ moved[..., None])[..., 0] + blended[..., 3]

        turns, strongest = blended[..., :3], affine[self.weights[self.mixed].argmax(1), :, :3]
        turns[self.mixed] = nearest_rotation(turns[self.mixed], instead=strongest)
        axes = turns @ self.axes
        return Splats(centers.numpy(), (axes @ axes.mT).numpy())
