"""The head model: a triangle mesh with blendshapes, pose correctives and linear blend skinning.

Formulas: SMPL (Loper et al. 2015, eq. 2-10) as used by FLAME (Li et al. 2017).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaussian_tokenizer.geometry.rotations import axis_angle_to_matrix
from gaussian_tokenizer.heads.head_parameters import ROTATION_KEYS, HeadParameters
from gaussian_tokenizer.utils.tensor_files import TensorFormat

JOINTS = ("root", "neck", "jaw", "left_eye", "right_eye")
HEAD_FILE = TensorFormat(
    "a head model file", "head_model", "avatar-pointillist head model 1", "make one with HeadModel.save"
)
PARENTS = (-1, 0, 1, 1, 1)  # of the joints, in every model that is built here
WEIGHT_ERROR = 1e-3  # of the sum of a vertex's skinning weights: well above rounding errors
# What the hash covers, in this order: the tensors that decide where a vertex goes.
GEOMETRY = ("template", "faces", "shape_dirs", "expression_dirs", "pose_dirs", "joint_regressor", "skinning_weights")


class PosedHead(NamedTuple):
    """What `HeadModel.pose` gives."""

    vertices: Tensor  # (T, V, 3) meters
    joint_transforms: Tensor  # (T, J, 4, 4), act on the rest vertices
    rest_vertices: Tensor  # (T, V, 3) shaped, with expression, offsets and pose correctives


@dataclass(frozen=True, eq=False)
class HeadModel:
    """Tensors of one head model; shapes are checked at construction, `ValueError` if they disagree."""

    name: str
    template: Tensor  # (V, 3) float32 meters, y up, face towards +z, +x the subject's left
    faces: Tensor  # (F, 3) int64, counter-clockwise seen from outside
    shape_dirs: Tensor  # (V, 3, S) meters per unit, a unit being about one standard deviation
    expression_dirs: Tensor  # (V, 3, E)
    pose_dirs: Tensor  # (V, 3, 36) row-major entries of R - I of the joints 1..4
    joint_regressor: Tensor  # (J, V)
    skinning_weights: Tensor  # (V, J) rows sum to 1
    parents: tuple[int, ...]
    expression_names: tuple[str, ...]
    landmark_faces: Tensor  # (K,) int64, the 68 of `heads.landmarks`, the 51 without the jaw, or K = 0
    landmark_barycentrics: Tensor  # (K, 3)
    regions: Mapping[str, Tensor]  # name -> (V,) bool

    def __post_init__(self) -> None:
        what = f"head model {self.name!r}"
        scalars = [name for name, value in self._tensors().items() if value.ndim == 0]
        if scalars:
            raise ValueError(f"{what}: {', '.join(scalars)} is one number, expected an array")
        vertices, joints = self.template.shape[0], len(JOINTS)
        expected = {
            "template": (vertices, 3),
            "faces": (self.faces.shape[0], 3),
            "shape_dirs": (vertices, 3, self.shape_dirs.shape[-1]),
            "expression_dirs": (vertices, 3, len(self.expression_names)),
            "pose_dirs": (vertices, 3, 9 * (joints - 1)),
            "joint_regressor": (joints, vertices),
            "skinning_weights": (vertices, joints),
            "landmark_faces": tuple(self.landmark_faces.shape[:1]),
            "landmark_barycentrics": (self.landmark_faces.shape[0], 3),
        }
        found = {field: getattr(self, field) for field in expected}
        expected |= {f"region {region}": (vertices,) for region in self.regions}
        found |= {f"region {region}": mask for region, mask in self.regions.items()}
        for field, shape in expected.items():
            if tuple(found[field].shape) != shape:
                raise ValueError(f"{what}: {field} is {tuple(found[field].shape)}, expected {shape}")
        for region, mask in self.regions.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"{what}: region {region} is {mask.dtype}, expected torch.bool")
        if not vertices or not self.n_faces:
            raise ValueError(f"{what}: {vertices} vertices and {self.n_faces} faces, expected a mesh")
        if len(self.parents) != joints or self.parents[0] != -1:
            raise ValueError(f"{what}: parents are {self.parents}, expected {joints} with -1 first")
        if any(not 0 <= parent < joint for joint, parent in enumerate(self.parents) if joint):
            raise ValueError(f"{what}: parents {self.parents} must come before their children")

    @property
    def n_vertices(self) -> int:
        return self.template.shape[0]

    @property
    def n_faces(self) -> int:
        return self.faces.shape[0]

    @property
    def n_shape(self) -> int:
        return self.shape_dirs.shape[-1]

    @property
    def n_expression(self) -> int:
        return self.expression_dirs.shape[-1]

    @property
    def n_joints(self) -> int:
        return self.skinning_weights.shape[-1]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.__dict__.items() if isinstance(value, Tensor)}

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits that identify the geometry, whatever the model or its file is called."""
        digest = hashlib.sha256(repr(self.parents).encode())
        for field in GEOMETRY:
            tensor = getattr(self, field)
            digest.update(f"{field} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return self.template.device

    def to(self, device: torch.device | str) -> "HeadModel":
        """The same model with every tensor on `device`."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        regions = {region: mask.to(device) for region, mask in self.regions.items()}
        return dataclasses.replace(self, **moved, regions=regions)  # type: ignore[arg-type]

    def check(self, params: HeadParameters) -> None:
        """`ValueError` if `params` have another number of shapes, expressions or vertices than this model."""
        sizes = [("shape", params.shape.shape[-1], self.n_shape), ("expr", params.expr.shape[-1], self.n_expression)]
        for field, offset in (("static_offset", params.static_offset), ("dynamic_offset", params.dynamic_offset)):
            if offset is not None:
                sizes.append((field, offset.shape[-2], self.n_vertices))
        for field, found, expected in sizes:
            if found != expected:
                raise ValueError(
                    f"head parameters have {field} of size {found}, head model {self.name!r} has {expected}; "
                    "use the head model the parameters were made with"
                )

    def shaped(self, params: HeadParameters) -> Tensor:
        """(T, V, 3): template + own shape + expression + offsets, before any joint turns."""
        self.check(params)
        template, shape_dirs = self.template.to(params.expr), self.shape_dirs.to(params.expr)
        identity = template + shape_dirs @ params.shape.to(params.expr)
        if params.static_offset is not None:
            identity = identity + params.static_offset.to(params.expr)
        directions = self.expression_dirs.to(params.expr).flatten(0, 1)  # (V * 3, E)
        vertices = identity + (params.expr @ directions.T).unflatten(-1, (-1, 3))
        if params.dynamic_offset is not None:
            vertices = vertices + params.dynamic_offset.to(params.expr)
        return vertices

    def canonical_vertices(self, params: HeadParameters) -> Tensor:
        """(V, 3): the subject's own shape and static offset, zero expression, zero pose."""
        return self.shaped(params.canonical())[0]

    def pose(self, params: HeadParameters, pose_correctives: bool = True) -> PosedHead:
        """Pose every frame of `params`, in their dtype and on their device.

        The translation is part of `joint_transforms`: vertex = sum_j weight_j * joint_transform_j(rest vertex).
        """
        rest_vertices, transforms = self.articulate(params, pose_correctives)
        vertices, _ = blend_joints(self.skinning_weights.to(rest_vertices), transforms, rest_vertices)
        last_row = transforms.new_tensor((0.0, 0.0, 0.0, 1.0)).expand(*transforms.shape[:2], 1, 4)
        return PosedHead(vertices, torch.cat((transforms, last_row), -2), rest_vertices)

    def articulate(self, params: HeadParameters, pose_correctives: bool = True) -> tuple[Tensor, Tensor]:
        """`rest_vertices` (T, V, 3) of `pose`, and the affine joint transforms (T, J, 3, 4) that act on them."""
        vertices = self.shaped(params)  # (T, V, 3)
        axis_angles = torch.cat([getattr(params, name) for name in ROTATION_KEYS], -1)
        rotations = axis_angle_to_matrix(axis_angles.unflatten(-1, (self.n_joints, 3)).to(vertices))  # (T, J, 3, 3)
        joints = self.joint_regressor.to(vertices) @ vertices  # (T, J, 3)
        if pose_correctives:
            identity = torch.eye(3, dtype=vertices.dtype, device=vertices.device)
            features = (rotations[:, 1:] - identity).flatten(1)  # (T, 36)
            directions = self.pose_dirs.to(vertices).flatten(0, 1)  # (V * 3, 36)
            vertices = vertices + (features @ directions.T).unflatten(-1, (-1, 3))

        world_rotations, world_joints = [rotations[:, 0]], [joints[:, 0]]
        for joint, parent in enumerate(self.parents[1:], start=1):
            bone = joints[:, joint] - joints[:, parent]
            world_joints.append(world_joints[parent] + (world_rotations[parent] @ bone[..., None])[..., 0])
            world_rotations.append(world_rotations[parent] @ rotations[:, joint])
        turned = torch.stack(world_rotations, 1)  # (T, J, 3, 3)
        moved = torch.stack(world_joints, 1) - (turned @ joints[..., None])[..., 0]  # minus the rest joint
        moved = moved + params.translation.to(vertices)[:, None]
        return vertices, torch.cat((turned, moved[..., None]), -1)

    def normals(self, vertices: Tensor) -> Tensor:
        """(..., V, 3) positions -> (..., V, 3) unit normals, the area-weighted mean of the faces around a vertex."""
        faces = self.faces.to(vertices.device)
        a, b, c = (vertices[..., faces[:, corner], :] for corner in range(3))
        face_normals = torch.linalg.cross(b - a, c - a)
        corners = face_normals.repeat_interleave(3, dim=-2)
        sums = torch.zeros_like(vertices).index_add(vertices.dim() - 2, faces.flatten(), corners)
        return torch.nn.functional.normalize(sums, dim=-1, eps=1e-20)

    def landmarks(self, vertices: Tensor) -> Tensor:
        """(..., V, 3) positions -> (..., K, 3) landmarks."""
        corners = vertices[..., self.faces[self.landmark_faces].to(vertices.device), :]  # (..., K, 3, 3)
        return (corners * self.landmark_barycentrics.to(vertices)[..., None]).sum(-2)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        regions = {f"region.{region}": mask for region, mask in self.regions.items()}
        about = {"name": self.name, "parents": self.parents, "expression_names": self.expression_names}
        HEAD_FILE.write(path, self._tensors() | regions, about)

    @classmethod
    def load(cls, path: str | Path) -> "HeadModel":
        """Read what `save` wrote; `ValueError` naming the file if it is cut, not a head model, or inconsistent."""
        with HEAD_FILE.opened(Path(path)) as (about, tensors):
            strings = _read_metadata(about)
            masks = [key for key in sorted(tensors) if key.startswith("region.")]
            regions = {key.removeprefix("region."): tensors.pop(key) for key in masks}
            expected = {field.name for field in dataclasses.fields(cls)} - {*strings, "regions"}
            if set(tensors) != expected:
                missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
                raise ValueError(f"missing tensors {missing}, unknown tensors {unknown}")
            for key, tensor in tensors.items():
                wanted = torch.int64 if key in ("faces", "landmark_faces") else torch.float32
                if tensor.dtype != wanted:
                    raise ValueError(f"{key} is {tensor.dtype}, expected {wanted}")
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{key} has NaN or Inf")
            head = cls(**tensors, **strings, regions=regions)
            for key, size in (("faces", head.n_vertices), ("landmark_faces", head.n_faces)):
                if tensors[key].numel() and not 0 <= int(tensors[key].min()) <= int(tensors[key].max()) < size:
                    raise ValueError(f"{key} has an index outside 0..{size - 1}")
            sums = head.skinning_weights.sum(1)
            worst, least = int((sums - 1).abs().argmax()), float(head.skinning_weights.min())
            if abs(float(sums[worst]) - 1) > WEIGHT_ERROR or least < -WEIGHT_ERROR:
                raise ValueError(
                    f"skinning_weights of vertex {worst} sum to {float(sums[worst]):.4g}, the least weight is {least:.4g}; "
                    "expected weights from 0 that sum to 1"
                )
            return head


def blend_joints(weights: Tensor, transforms: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Linear blend skinning of `points` (T, N, 3) by weights (N, J) and affine joint transforms (T, J, 3, 4).

    The moved points (T, N, 3) and, for what turns with them, the means of the joints' rotations (T, N, 3, 3).
    """
    blended = (weights @ transforms.flatten(2)).unflatten(-1, (3, 4))  # (T, N, 3, 4)
    return (blended[..., :3] @ points[..., None])[..., 0] + blended[..., 3], blended[..., :3]


def _read_metadata(about: Mapping[str, Any]) -> dict[str, Any]:
    name, parents, expressions = about["name"], about["parents"], about["expression_names"]
    if not isinstance(parents, list) or any(type(parent) is not int for parent in parents):
        raise ValueError("parents must be whole numbers")
    if not isinstance(expressions, list) or any(not isinstance(each, str) for each in (name, *expressions)):
        raise ValueError("names must be text")
    return {"name": name, "parents": tuple(parents), "expression_names": tuple(expressions)}
