"""The avatar: Gaussians, each anchored to a face of a head model, with the head parameters of one subject.

Between files and everything else. Kept as our own safetensors file, or as a GaussianAvatars folder (`point_cloud.ply`
with `binding_0` and `flame_param.npz`, read and written byte for byte); written as world-space PLY for ordinary splat
viewers. Positions, scales and rotations stay as stored, relative to the face; the canonical and the posed Gaussians
are computed from them and the attached head model (formulas: `anchoring` and `animation`).
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gaussian_tokenizer.avatars.anchoring import (
    FaceFrames,
    face_frames,
    local_to_world,
    world_to_local,
    world_to_local_log_scales,
    world_to_local_quats,
)
from gaussian_tokenizer.avatars.export import save_ply
from gaussian_tokenizer.avatars.gaussians import MIN_SCALE, Gaussians
from gaussian_tokenizer.avatars.ply import MAX_SH_DEGREE, PlyGaussians, read_gaussian_ply, write_gaussian_ply
from gaussian_tokenizer.avatars.skinning import Local, Skinning
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import built_in_head, load_head
from gaussian_tokenizer.utils.atomic import atomic_file, atomic_folder, flush_to_disk
from gaussian_tokenizer.utils.json_files import parse_json, read_json

FORMAT = "avatar-pointillist gaussian avatar 1"
PLY_NAME, PARAMETERS_NAME, METADATA_NAME = "point_cloud.ply", "flame_param.npz", "metadata.json"
GAUSSIAN_AVATARS_SH_DEGREE = 3  # of its viewer unless told otherwise; it opens no file of another
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
    folder_sh_degree: int | None = None  # of the folder it was read from, where empty bands may follow those of `sh`

    def __post_init__(self) -> None:
        count = self.positions.shape[0]
        if count == 0:
            raise ValueError("an avatar of 0 Gaussians; expected at least one")
        expected: dict[str, tuple] = {"positions": (count, 3), "faces": (count,), "opacities": (count,)}
        expected |= {"scales": (count, 3), "quats": (count, 4)}
        if self.sh is not None:
            coefficients = self.sh.shape[1] if self.sh.ndim == 3 else 0
            if coefficients not in (1, 4, 9, 16):
                raise ValueError(f"sh is {tuple(self.sh.shape)}, expected (N, K, 3) with K of 1, 4, 9 or 16")
            expected["sh"] = (count, coefficients, 3)
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
        return None if self.sh is None else _degree(self.sh)

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
        """The avatar of some of its Gaussians, or of all in another order."""
        return replace(self, **{name: value[index] for name, value in self.tensors().items()})  # type: ignore[arg-type]

    def with_head(self, head: HeadModel) -> "GaussianAvatar":
        """The same avatar with its head model attached; ValueError if it is not the one the avatar was made on."""
        _check_hash("avatar", self.head_name, self.head_hash, head)
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
        points_as_they_are = cls(positions=positions, faces=faces, params=params).with_head(head)
        _check_finite("points", {"positions": positions})
        frames = points_as_they_are._canonical_frames()
        local = world_to_local(positions.to(frames.centers), faces, frames)
        return replace(points_as_they_are, positions=local.float())

    @classmethod
    @torch.no_grad()
    def from_gaussians(
        cls, gaussians: Gaussians, faces: Tensor, params: HeadParameters | None, head: HeadModel
    ) -> "GaussianAvatar":
        """An avatar of Gaussians on the canonical head (T = 1), as a network predicts them; `faces` (N,).

        The inverse of `canonical_gaussians`. Detached and kept as float32; opacities of 0 and 1 become 1e-6 and
        1 - 1e-6, because an avatar stores logits. Raises ValueError for more frames, NaN, or a face without area.
        """
        if gaussians.num_frames != 1:
            raise ValueError(f"an avatar is made of 1 frame of canonical Gaussians, found {gaussians.num_frames}")
        gaussians.check_finite()
        gaussians = gaussians.to(head.device, torch.float32)
        points = {"positions": gaussians.positions[0], "faces": faces}
        avatar = cls.from_points(points, params, head)
        frames = avatar._canonical_frames()
        log_scales = gaussians.scales[0].clamp(min=MIN_SCALE).log()
        return replace(
            avatar,
            sh=gaussians.sh.detach(),
            opacities=gaussians.opacities.clamp(1 - MAX_OPACITY, MAX_OPACITY).logit(),
            scales=world_to_local_log_scales(log_scales, avatar.faces, frames).float(),
            quats=world_to_local_quats(gaussians.quats[0].to(frames.centers), avatar.faces, frames).float(),
        )

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
        """What a splatter draws, in every frame of `params` (None: the avatar's own), in world space.

        `animation` "lbs" is linear blend skinning with interpolated weights and blendshapes (the paper), "face_frames"
        lets positions, sizes and rotations follow the faces (GaussianAvatars). `params` may be another subject's
        motion: the avatar keeps its own shape and static offset. `rotate_covariances=False` leaves the rotations of
        "lbs" as they are at rest; with `pose_correctives=False` that is what LAM draws. Computed in the dtype of
        `params`, with gradients to them and to the tensors of the avatar. SH are not turned: they are evaluated in
        world directions. To pose one avatar many times, `bind` it once. Raises ValueError for an avatar without colors or
        a motion of another head model.
        """
        bound = self.bind(None if params is None else params.expr.dtype)
        motion = bound.own if params is None else params.to(self.positions.device)
        return bound.pose(motion, animation, pose_correctives, rotate_covariances)

    def bind(self, dtype: torch.dtype | None = None) -> Skinning:
        """The Gaussians bound to the head, to be posed many times by motions of `dtype` (None: of the own parameters).

        Raises ValueError for an avatar without colors.
        """
        tensors = self._complete("posing")
        head, own = self._head_and_params()
        like = own.expr.to(self.positions.device, dtype)
        tensors = {name: value if name == "faces" else value.to(like) for name, value in tensors.items()}
        local = Local(tensors["positions"], tensors["scales"], tensors["quats"])
        return Skinning(local, self.faces, own.to(like), head, tensors["opacities"].sigmoid(), tensors["sh"])

    @classmethod
    def load(
        cls, path: str | os.PathLike, head: HeadModel | None = None, sh_degree: int | None = None
    ) -> "GaussianAvatar":
        """Read a `.safetensors` avatar or a GaussianAvatars folder, and attach `head` if one is given.

        A folder holds `point_cloud.ply` (beside it `flame_param.npz`), or `point_cloud/iteration_<N>/` with them, of
        which the newest N is read; the path of such a PLY does as well. Raises FileNotFoundError, or ValueError with
        one line that names the file, the property and the row.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            avatar = _load_safetensors(path)
            if sh_degree is not None and avatar.sh_degree not in (None, sh_degree):
                raise ValueError(f"{path}: colors of SH degree {avatar.sh_degree}, expected {sh_degree}")
        else:
            avatar = _load_folder(path, head, sh_degree)
        if head is None:
            return avatar
        try:
            return avatar.with_head(head)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike, sh_degree: int | None = None) -> None:
        """Write a `.safetensors` file, or else a GaussianAvatars folder; atomically, either way.

        A folder may exist and keeps its other files. `point_cloud.ply` and `flame_param.npz` that were loaded from a
        folder and not changed are written with the bytes they had. Otherwise they are what GaussianAvatars' viewer
        opens: colors are padded with zeros to SH degree 3 (or `sh_degree`), and offsets that are None are written as
        zeros, for which a head model must be attached. Its name and hash go to `metadata.json`.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            if sh_degree is not None:
                raise ValueError(f"{path}: sh_degree={sh_degree} is for folders; a .safetensors file keeps its colors")
            _save_safetensors(self, path)
        elif path.suffix == ".ply":
            raise ValueError(
                f"{path}: an avatar is a folder or a .safetensors file; for a PLY of world-space Gaussians use "
                "save_world_ply"
            )
        else:
            _save_folder(self, path, sh_degree)

    def save_world_ply(
        self,
        path: str | os.PathLike,
        frame: int | None = 0,
        animation: str = "lbs",
        up: Literal["y", "minus_y"] = "y",
    ) -> None:
        """Write the Gaussians as posed in `frame` (None: in canonical pose) to a PLY that ordinary viewers open.

        `up` as for `export.save_splats`.
        """
        if frame is None:
            save_ply(path, self.canonical_gaussians(), up=up)
            return
        self._complete("posing")  # before a head is asked for
        _, params = self._head_and_params()
        save_ply(path, self.posed(params.frame(frame), animation), up=up)

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
    if head is not None:
        return GaussianAvatar.load(path, head=load_head(head))
    made_on = GaussianAvatar.load(path).head_name
    found = built_in_head(made_on)
    if found is None:
        said = "does not say which head model it was made on" if made_on is None else f"was made on {made_on!r}"
        raise ValueError(f"{path}: {said}; give that with --head")
    return GaussianAvatar.load(path, head=found)


def _load_folder(path: Path, head: HeadModel | None, sh_degree: int | None) -> GaussianAvatar:
    ply_path = _find_ply(path)
    name, digest = _read_metadata(path if path.is_dir() else path.parent)
    if head is not None:
        _check_hash(str(path), name, digest, head)
    n_faces = None if head is None else head.n_faces
    gaussians = read_gaussian_ply(ply_path, with_faces=True, n_faces=n_faces)
    tensors: dict[str, Any] = {
        field.name: torch.from_numpy(gaussians.__dict__[field.name]) for field in fields(gaussians)
    }
    stored_degree, degree = _degree(tensors["sh"]), _used_degree(tensors["sh"])
    if sh_degree is not None and not degree <= sh_degree <= stored_degree:
        raise ValueError(f"{ply_path}: colors of SH degree {degree}, expected {sh_degree}")
    tensors["sh"] = tensors["sh"][:, : ((degree if sh_degree is None else sh_degree) + 1) ** 2].contiguous()
    parameters_path = ply_path.with_name(PARAMETERS_NAME)
    params = HeadParameters.load(parameters_path) if parameters_path.exists() else None
    return GaussianAvatar(**tensors, params=params, head_name=name, head_hash=digest, folder_sh_degree=stored_degree)


def _degree(sh: Tensor) -> int:
    return round(sh.shape[1] ** 0.5) - 1


def _used_degree(sh: Tensor) -> int:
    """The degree of (N, K, 3) coefficients without the empty bands at their end, which only pad a file.

    Empty is what has no bit set, so that a file with a -0.0 is written back as it was.
    """
    used = [
        degree for degree in range(1, _degree(sh) + 1) if sh[:, degree**2 : (degree + 1) ** 2].view(torch.int32).any()
    ]
    return max(used, default=0)


def _find_ply(path: Path) -> Path:
    if path.suffix == ".ply":
        return path
    if (path / PLY_NAME).is_file():
        return path / PLY_NAME
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such avatar; expected a .safetensors file or a folder with {PLY_NAME}")
    iterations = {}
    for ply_path in path.glob(f"point_cloud/iteration_*/{PLY_NAME}"):
        match = re.fullmatch(r"iteration_([0-9]+)", ply_path.parent.name)
        if match:
            iterations[int(match[1])] = ply_path
    if not iterations:
        raise FileNotFoundError(f"{path}: holds neither {PLY_NAME} nor point_cloud/iteration_<N>/{PLY_NAME}")
    return iterations[max(iterations)]


def _save_folder(avatar: GaussianAvatar, path: Path, sh_degree: int | None) -> None:
    tensors = dict(avatar._complete(f"writing {PLY_NAME}"))
    tensors["sh"] = _padded(path, tensors["sh"], avatar.folder_sh_degree, sh_degree)
    gaussians, params = _to_ply(tensors), _with_offsets(path, avatar)
    stale = path / PARAMETERS_NAME
    if avatar.params is None and stale.exists():
        raise ValueError(f"{stale}: this avatar has no head parameters to replace it with; save to another folder")
    metadata_path = path / METADATA_NAME
    metadata = _metadata_content(metadata_path)
    if avatar.head_hash is not None or metadata is not None:
        metadata = (metadata or {}) | {"head_name": avatar.head_name, "head_hash": avatar.head_hash}
    if path.exists():
        if not path.is_dir():
            raise ValueError(f"{path}: is a file, expected a folder or a name that ends in .safetensors")
        _write_files(gaussians, params, metadata, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(path) as folder:
        _write_files(gaussians, params, metadata, folder)


def _write_files(gaussians: PlyGaussians, params: HeadParameters | None, metadata: dict | None, folder: Path) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(folder / PLY_NAME))]
        write_gaussian_ply(files[0], gaussians)
        if params is not None:
            files.append(stack.enter_context(atomic_file(folder / PARAMETERS_NAME)))
            params.write(files[-1])
        if metadata is not None:
            files.append(stack.enter_context(atomic_file(folder / METADATA_NAME)))
            files[-1].write((json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode())
        # All that can fail has failed before the first of them gets its name.
        for file in files:
            flush_to_disk(file)


def _padded(path: Path, sh: Tensor, folder_degree: int | None, sh_degree: int | None) -> Tensor:
    """The colors with bands of zeros up to the degree that is asked for, was there, or GaussianAvatars' viewer expects."""
    own = _degree(sh)
    if sh_degree is None:
        sh_degree = max(own, GAUSSIAN_AVATARS_SH_DEGREE if folder_degree is None else folder_degree)
    if not own <= sh_degree <= MAX_SH_DEGREE:
        raise ValueError(f"{path}: colors of SH degree {own}, sh_degree={sh_degree}; expected {own} to {MAX_SH_DEGREE}")
    return torch.cat((sh, sh.new_zeros(len(sh), (sh_degree + 1) ** 2 - sh.shape[1], 3)), 1)


def _with_offsets(path: Path, avatar: GaussianAvatar) -> HeadParameters | None:
    """The head parameters with both offsets, as GaussianAvatars reads them; those of a folder that was read as they were."""
    params = avatar.params
    if params is None or (avatar.folder_sh_degree is not None and params.layout is not None):
        return params
    try:
        return params.with_offsets(None if avatar.head is None else avatar.head.n_vertices)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; attach the avatar's head model: avatar.with_head(load_head(...))") from None


def _to_ply(tensors: dict[str, Tensor]) -> PlyGaussians:
    return PlyGaussians(**{name: value.detach().cpu().numpy() for name, value in tensors.items()})


def _save_safetensors(avatar: GaussianAvatar, path: Path) -> None:
    tensors = avatar.tensors()
    if avatar.params is not None:
        tensors |= {f"params.{name}": value.float() for name, value in avatar.params.tensors().items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    about = {"format": FORMAT, "head_name": avatar.head_name, "head_hash": avatar.head_hash}
    # One metadata entry: safetensors does not promise the order of several, and equal avatars give equal files.
    content = to_safetensors(tensors, metadata={"gaussian_avatar": json.dumps(about)})
    with atomic_file(path) as file:
        file.write(content)


def _load_safetensors(path: Path) -> GaussianAvatar:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such avatar file")
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    try:
        about = parse_json(entries["gaussian_avatar"], path)
        if about["format"] != FORMAT:
            raise ValueError(about["format"])
        name, digest = _head_identity(about)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not an avatar file: its metadata does not say {FORMAT!r}") from None
    _check_finite(str(path), tensors)
    parameters = {key.removeprefix("params."): tensors.pop(key) for key in list(tensors) if key.startswith("params.")}
    try:
        params = HeadParameters(**parameters) if parameters else None
        avatar = GaussianAvatar(**tensors, params=params, head_name=name, head_hash=digest)
        if int(avatar.faces.min()) < 0:
            raise ValueError(f"faces: row {int(avatar.faces.argmin())} is {int(avatar.faces.min())}, expected >= 0")
    except (ValueError, TypeError, IndexError, KeyError) as error:  # a missing or unknown tensor is a TypeError
        reason = str(error).replace("GaussianAvatar.__init__()", "tensors of an avatar file:")
        raise ValueError(f"{path}: {reason}") from None
    return avatar


def _metadata_content(path: Path) -> dict | None:
    """The JSON object of a metadata file; None if there is no such file."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_metadata(folder: Path) -> tuple[str | None, str | None]:
    """Name and hash of the head model, as far as the folder says them."""
    content = _metadata_content(folder / METADATA_NAME)
    try:
        return _head_identity(content or {})
    except TypeError as error:
        raise ValueError(f"{folder / METADATA_NAME}: {error}") from None


def _head_identity(content: dict) -> tuple[str | None, str | None]:
    name, digest = content.get("head_name"), content.get("head_hash")
    for key, value in (("head_name", name), ("head_hash", digest)):
        if not isinstance(value, str | None):
            raise TypeError(f"{key} is {value!r}, expected a string")
    return name, digest


def _check_hash(what: str, name: str | None, digest: str | None, head: HeadModel) -> None:
    if digest is not None and digest != head.hash:
        raise ValueError(
            f"{what} was made on head model {name!r} (hash {digest}), not on {head.name!r} (hash {head.hash}); "
            "load the head model it was made on"
        )


def _check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.int64):
            raise ValueError(f"{what}: {name} is {value.dtype}, expected float32 (faces int64)")
        finite = torch.isfinite(value)
        if not finite.all():
            index = (~finite).nonzero()[0].tolist()
            raise ValueError(f"{what}: {name} of row {index[0] if index else 0} is {value[tuple(index)].item()}")
