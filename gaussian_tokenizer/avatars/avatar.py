"""The avatar: Gaussians, each anchored to a face of a head model, with the head parameters of one subject."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gaussian_tokenizer.avatars.anchoring import (
    FaceFrames,
    Local,
    Placed,
    face_frames,
    local_to_world,
    to_local,
    world_to_local,
)
from gaussian_tokenizer.avatars.avatar_files import (
    PLY_NAME,
    check_finite,
    check_hash,
    padded,
    read_folder,
    read_safetensors,
    write_folder,
    write_safetensors,
)
from gaussian_tokenizer.avatars.export import save_splats
from gaussian_tokenizer.avatars.gaussians import MIN_SCALE, Gaussians, sh_degree_of
from gaussian_tokenizer.avatars.skinning import Skinning
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import built_in_head, load_head

MAX_OPACITY = 1 - 1e-6  # and 1e-6 the least: logits are stored


@dataclass(frozen=True, eq=False)
class GaussianAvatar:
    """N face-anchored Gaussians; what is None is not known (a point cloud may have no colors yet)."""

    positions: Tensor  # (N, 3) float32, face-local, in units of the face scale
    faces: Tensor  # (N,) int64
    sh: Tensor | None = None  # (N, K, 3) coefficients, K = (degree + 1)^2
    opacities: Tensor | None = None  # (N,) logits
    scales: Tensor | None = None  # (N, 3) natural logs, face-local
    quats: Tensor | None = None  # (N, 4) wxyz of any length, face-local
    params: HeadParameters | None = None
    head_name: str | None = None  # of the head model it was made on
    head_hash: str | None = None
    head: HeadModel | None = None  # attached, never saved
    folder_sh_degree: int | None = None  # of the folder it was read from, empty bands included

    def __post_init__(self) -> None:
        count = self.positions.shape[0]
        if count == 0:
            raise ValueError("an avatar of 0 Gaussians; expected at least one")
        expected: dict[str, tuple] = {"positions": (count, 3), "faces": (count,), "opacities": (count,)}
        expected |= {"scales": (count, 3), "quats": (count, 4)}
        if self.sh is not None:
            expected["sh"] = (count, (sh_degree_of(self.sh) + 1) ** 2, 3)
        for name, value in self.tensors().items():
            dtype = torch.int64 if name == "faces" else torch.float32
            if tuple(value.shape) != expected[name] or value.dtype != dtype:
                raise ValueError(
                    f"{name} is {tuple(value.shape)} {value.dtype}, expected {expected[name]} {dtype} "
                    f"for an avatar of {count} Gaussians"
                )

    def __len__(self) -> int:
        return self.positions.shape[0]

    @property
    def sh_degree(self) -> int | None:
        return None if self.sh is None else sh_degree_of(self.sh)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the Gaussians by name, without those that are None."""
        names = ("positions", "faces", "sh", "opacities", "scales", "quats")
        return {name: value for name in names if (value := self.__dict__[name]) is not None}

    def to(self, device: torch.device | str) -> "GaussianAvatar":
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        params = None if self.params is None else self.params.to(device)
        head = None if self.head is None else self.head.to(device)
        return replace(self, **moved, params=params, head=head)

    def select(self, index: Tensor | slice) -> "GaussianAvatar":
        """The avatar of some of its Gaussians, in the order of `index`."""
        return replace(self, **{name: value[index] for name, value in self.tensors().items()})  # type: ignore[arg-type]

    def with_head(self, head: HeadModel) -> "GaussianAvatar":
        """The same avatar with its head model attached; ValueError if it is not the one the avatar was made on."""
        check_hash("avatar", self.head_name, self.head_hash, head)
        wrong = (self.faces < 0) | (self.faces >= head.n_faces)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"Gaussian {row} is bound to face {int(self.faces[row])}, head model {head.name!r} has {head.n_faces} "
                "faces; attach the head model the avatar was made on"
            )
        if self.params is not None:
            head.check(self.params)
        return replace(self, head=head, head_name=head.name, head_hash=head.hash)

    def canonical_points(self) -> dict[str, Tensor]:
        """Points on the canonical head (own shape, no expression, no pose): positions (N, 3) meters, faces (N,)."""
        head, params = self._head_and_params()
        frames = face_frames(head.canonical_vertices(params), head.faces)
        return {"positions": local_to_world(self.positions.to(frames.centers), self.faces, frames), "faces": self.faces}

    @classmethod
    def from_points(cls, points: Mapping, params: HeadParameters | None, head: HeadModel) -> "GaussianAvatar":
        """An avatar of positions only, from `positions` (N, 3) meters on the canonical head and `faces` (N,)."""
        positions = torch.as_tensor(points["positions"], dtype=torch.float32, device=head.device)
        faces = torch.as_tensor(points["faces"], dtype=torch.int64, device=head.device)
        unplaced = cls(positions=positions, faces=faces, params=params).with_head(head)
        check_finite("points", {"positions": positions})
        frames = unplaced._canonical_frames()
        return replace(unplaced, positions=world_to_local(positions.to(frames.centers), faces, frames).float())

    @classmethod
    @torch.no_grad()
    def from_gaussians(
        cls, gaussians: Gaussians, faces: Tensor, params: HeadParameters | None, head: HeadModel
    ) -> "GaussianAvatar":
        """An avatar of Gaussians on the canonical head (T = 1), as a network predicts them; `faces` (N,).

        The inverse of `canonical_gaussians`, detached. Opacities are kept in 1e-6..1 - 1e-6: an avatar stores logits.
        ValueError for more frames, NaN, or a face without area.
        """
        if gaussians.num_frames != 1:
            raise ValueError(f"an avatar is made of 1 frame of canonical Gaussians, found {gaussians.num_frames}")
        gaussians.check_finite()
        gaussians = gaussians.to(head.device, torch.float32)
        avatar = cls.from_points({"positions": gaussians.positions[0], "faces": faces}, params, head)
        frames = avatar._canonical_frames()
        positions, quats = gaussians.positions[0].to(frames.centers), gaussians.quats[0].to(frames.centers)
        local = to_local(Placed(positions, gaussians.scales[0].clamp(min=MIN_SCALE), quats), avatar.faces, frames)
        opacities = gaussians.opacities.clamp(1 - MAX_OPACITY, MAX_OPACITY).logit()
        scales, quats = local.log_scales.float(), local.quats.float()
        return replace(avatar, sh=gaussians.sh.detach(), opacities=opacities, scales=scales, quats=quats)

    def canonical_gaussians(self) -> Gaussians:
        """The Gaussians on the canonical head (own shape, no expression, no pose), T = 1."""
        return self.bind().at_rest()

    def posed(
        self,
        params: HeadParameters | None = None,
        animation: str = "lbs",
        pose_correctives: bool = True,
        rotate_covariances: bool = True,
    ) -> Gaussians:
        """The world-space Gaussians in every frame of `params` (None: the avatar's own); arguments as of `Skinning.pose`.

        Differentiable, in the dtype of `params`. To pose one avatar many times, `bind` it once. ValueError for one without
        colors or a motion of another head model.
        """
        bound = self.bind(None if params is None else params.expr.dtype)
        motion = bound.own if params is None else params.to(self.positions.device)
        return bound.pose(motion, animation, pose_correctives, rotate_covariances)

    def bind(self, dtype: torch.dtype | None = None) -> Skinning:
        """The Gaussians bound to the head, to be posed many times by motions of `dtype` (None: of the own parameters)."""
        tensors = self._complete("posing")
        head, own = self._head_and_params()
        like = own.expr.to(self.positions.device, dtype)
        tensors = {name: value if name == "faces" else value.to(like) for name, value in tensors.items()}
        local = Local(tensors["positions"], tensors["scales"], tensors["quats"])
        return Skinning(local, self.faces, own.to(like), head, tensors["opacities"].sigmoid(), tensors["sh"])

    @classmethod
    def load(cls, path: str | os.PathLike, head: HeadModel | None = None) -> "GaussianAvatar":
        """Read a `.safetensors` avatar or a GaussianAvatars folder, and attach `head` if one is given.

        A folder holds `point_cloud.ply` and `flame_param.npz`, or `point_cloud/iteration_<N>/` with them (the largest N is
        read); the path of such a PLY is accepted too. Raises FileNotFoundError, or ValueError with one line that names the
        file, the property and the row.
        """
        path = Path(path)
        fields = read_safetensors(path) if path.suffix == ".safetensors" else read_folder(path, head)
        try:
            avatar = cls(**fields)
            if int(avatar.faces.min()) < 0:
                raise ValueError(f"faces: row {int(avatar.faces.argmin())} is {int(avatar.faces.min())}, expected >= 0")
            return avatar if head is None else avatar.with_head(head)
        except (ValueError, TypeError, IndexError) as error:  # a missing or unknown tensor is a TypeError
            reason = str(error).replace("GaussianAvatar.__init__()", "tensors of an avatar file:")
            raise ValueError(f"{path}: {reason}") from None

    def save(self, path: str | os.PathLike, sh_degree: int | None = None) -> None:
        """Write a `.safetensors` file, or else a GaussianAvatars folder; atomically, either way.

        An existing folder keeps its other files. What was loaded from a folder and not changed is written with the same
        bytes. Otherwise the folder is what GaussianAvatars' viewer opens: colors are padded with zeros to SH degree 3 (or
        `sh_degree`), and missing offsets are zeros, for which a head model must be attached.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            if sh_degree is not None:
                raise ValueError(f"{path}: sh_degree={sh_degree} is for folders; a .safetensors file keeps its colors")
            write_safetensors(path, self.tensors(), self.params, self.head_name, self.head_hash)
        elif path.suffix == ".ply":
            raise ValueError(
                f"{path}: an avatar is a folder or a .safetensors file; for a PLY of world-space Gaussians use "
                "save_world_ply"
            )
        else:
            tensors = self._complete(f"writing {PLY_NAME}")
            tensors["sh"] = padded(path, tensors["sh"], self.folder_sh_degree, sh_degree)
            write_folder(path, tensors, self._params_with_offsets(path), self.head_name, self.head_hash)

    def save_world_ply(
        self,
        path: str | os.PathLike,
        frame: int | None = 0,
        animation: str = "lbs",
        up: Literal["y", "minus_y"] = "y",
    ) -> None:
        """Write the Gaussians as posed in `frame` (None: at rest) to a PLY for ordinary viewers; `up` as `save_splats`."""
        bound = self.bind()
        save_splats(path, bound.at_rest() if frame is None else bound.pose(bound.own.frame(frame), animation), up=up)

    def _params_with_offsets(self, path: Path) -> HeadParameters | None:
        """Head parameters with both offsets, as GaussianAvatars reads them; those of a folder that was read as they were."""
        if self.params is None or (self.folder_sh_degree is not None and self.params.layout is not None):
            return self.params
        try:
            return self.params.with_offsets(None if self.head is None else self.head.n_vertices)
        except ValueError as error:
            remedy = "attach the avatar's head model: avatar.with_head(load_head(...))"
            raise ValueError(f"{path}: {error}; {remedy}") from None

    def _canonical_frames(self) -> FaceFrames:
        """The frames of all faces of the canonical head; ValueError if a point is bound to a face that is one point."""
        head, params = self._head_and_params()
        frames = face_frames(head.canonical_vertices(params), head.faces)
        flat = frames.scales[self.faces] <= 1e-9
        if flat.any():
            row = int(flat.nonzero()[0])
            raise ValueError(f"point {row} is bound to face {int(self.faces[row])}, whose three vertices are one point")
        return frames

    def _head_and_params(self) -> tuple[HeadModel, HeadParameters]:
        if self.head is None:
            of = f" ({self.head_name!r})" if self.head_name else ""
            raise ValueError(f"the avatar has no head model attached; attach the one it was made on{of} by with_head")
        if self.params is not None:
            return self.head, self.params
        return self.head, HeadParameters.zeros(self.head.n_shape, self.head.n_expression).to(self.head.device)

    def _complete(self, purpose: str) -> dict[str, Tensor]:
        """The tensors of an avatar that has all of them."""
        tensors = self.tensors()
        missing = [name for name in ("sh", "opacities", "scales", "quats") if name not in tensors]
        if missing:
            raise ValueError(
                f"{purpose} needs {', '.join(missing)}, which this avatar does not have: it holds points only; "
                "decode them to Gaussians first, or save a .safetensors file"
            )
        return tensors


def open_avatar(path: str | os.PathLike, head: str | None = None) -> GaussianAvatar:
    """`GaussianAvatar.load` with its head model: the one `head` names (as for `load_head`), else the built-in one.

    Raises ValueError if `head` is None and the avatar does not say that it was made on the built-in head.
    """
    made_on = None if head is not None else GaussianAvatar.load(path).head_name
    found = load_head(head) if head is not None else built_in_head(made_on)
    if found is None:
        said = "does not say which head model it was made on" if made_on is None else f"was made on {made_on!r}"
        raise ValueError(f"{path}: {said}; give that with --head")
    return GaussianAvatar.load(path, head=found)
