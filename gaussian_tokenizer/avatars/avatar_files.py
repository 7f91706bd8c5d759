"""The files of an avatar, a safetensors file or a GaussianAvatars folder, to and from the fields of a `GaussianAvatar`."""

import re
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaussian_tokenizer.avatars.gaussians import sh_degree_of
from gaussian_tokenizer.avatars.ply import MAX_SH_DEGREE, PlyGaussians, read_gaussian_ply, write_gaussian_ply
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.utils.atomic import atomic_file, atomic_folder, flush_to_disk
from gaussian_tokenizer.utils.json_files import read_json, to_json
from gaussian_tokenizer.utils.tensor_files import TensorFormat

AVATAR_FILE = TensorFormat(
    "an avatar file", "gaussian_avatar", "avatar-pointillist gaussian avatar 1", "make one with GaussianAvatar.save"
)
PLY_NAME, PARAMETERS_NAME, METADATA_NAME = "point_cloud.ply", "flame_param.npz", "metadata.json"
GAUSSIAN_AVATARS_SH_DEGREE = 3  # the default of its viewer, which opens files of no other degree


def read_folder(path: Path, head: HeadModel | None) -> dict[str, Any]:
    """The fields of an avatar in a GaussianAvatars folder, or beside a PLY; ValueError if it was not made on `head`."""
    ply_path = _find_ply(path)
    metadata_path = (path if path.is_dir() else path.parent) / METADATA_NAME
    name, digest = _head_identity(_metadata_content(metadata_path) or {}, metadata_path)
    if head is not None:
        check_hash(str(path), name, digest, head)
    stored = read_gaussian_ply(ply_path, with_faces=True, n_faces=None if head is None else head.n_faces)
    tensors = {name: torch.from_numpy(value) for name, value in vars(stored).items()}
    stored_degree = sh_degree_of(tensors["sh"])
    tensors["sh"] = tensors["sh"][:, : (_used_degree(tensors["sh"]) + 1) ** 2].contiguous()
    parameters_path = ply_path.with_name(PARAMETERS_NAME)
    params = HeadParameters.load(parameters_path) if parameters_path.exists() else None
    return {**tensors, "params": params, "head_name": name, "head_hash": digest, "folder_sh_degree": stored_degree}


def write_folder(
    path: Path, tensors: dict[str, Tensor], params: HeadParameters | None, head_name: str | None, head_hash: str | None
) -> None:
    """Write the complete `tensors` of an avatar; a folder that is there keeps its other files."""
    stale = path / PARAMETERS_NAME
    if params is None and stale.exists():
        raise ValueError(f"{stale}: this avatar has no head parameters to replace it with; save to another folder")
    gaussians = PlyGaussians(**{name: value.detach().cpu().numpy() for name, value in tensors.items()})
    metadata = _metadata_content(path / METADATA_NAME)
    if head_hash is not None or metadata is not None:
        metadata = (metadata or {}) | {"head_name": head_name, "head_hash": head_hash}
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file, expected a folder or a name that ends in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext(path) if path.exists() else atomic_folder(path) as folder:
        _write_files(gaussians, params, metadata, folder)


def padded(path: Path, sh: Tensor, folder_degree: int | None, sh_degree: int | None) -> Tensor:
    """The colors with bands of zeros up to the degree that is asked for, was there, or GaussianAvatars' viewer expects."""
    own = sh_degree_of(sh)
    if sh_degree is None:
        sh_degree = max(own, GAUSSIAN_AVATARS_SH_DEGREE if folder_degree is None else folder_degree)
    if not own <= sh_degree <= MAX_SH_DEGREE:
        raise ValueError(f"{path}: colors of SH degree {own}, sh_degree={sh_degree}; expected {own} to {MAX_SH_DEGREE}")
    return torch.cat((sh, sh.new_zeros(len(sh), (sh_degree + 1) ** 2 - sh.shape[1], 3)), 1)


def read_safetensors(path: Path) -> dict[str, Any]:
    """The fields of an avatar in a file that `write_safetensors` wrote; their shapes are not checked here."""
    with AVATAR_FILE.opened(path) as (about, tensors):
        name, digest = _head_identity(about, "its metadata")
    check_finite(str(path), tensors)
    parameters = {key.removeprefix("params."): tensors.pop(key) for key in list(tensors) if key.startswith("params.")}
    try:
        params = HeadParameters(**parameters) if parameters else None
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None
    return {**tensors, "params": params, "head_name": name, "head_hash": digest}


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], params: HeadParameters | None, head_name: str | None, head_hash: str | None
) -> None:
    if params is not None:
        tensors = tensors | {f"params.{name}": value.float() for name, value in params.tensors().items()}
    AVATAR_FILE.write(path, tensors, {"head_name": head_name, "head_hash": head_hash})


def check_hash(what: str, name: str | None, digest: str | None, head: HeadModel) -> None:
    if digest is not None and digest != head.hash:
        raise ValueError(
            f"{what} was made on head model {name!r} (hash {digest}), not on {head.name!r} (hash {head.hash}); "
            "load the head model it was made on"
        )


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.int64):
            raise ValueError(f"{what}: {name} is {value.dtype}, expected float32 (faces int64)")
        finite = torch.isfinite(value)
        if not finite.all():
            index = (~finite).nonzero()[0].tolist()
            raise ValueError(f"{what}: {name} of row {index[0] if index else 0} is {value[tuple(index)].item()}")


def _find_ply(path: Path) -> Path:
    if path.suffix == ".ply":
        return path
    if (path / PLY_NAME).is_file():
        return path / PLY_NAME
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such avatar; expected a .safetensors file or a folder with {PLY_NAME}")
    paths = path.glob(f"point_cloud/iteration_*/{PLY_NAME}")
    iterations = [each for each in paths if re.fullmatch(r"iteration_[0-9]+", each.parent.name)]
    if not iterations:
        raise FileNotFoundError(f"{path}: holds neither {PLY_NAME} nor point_cloud/iteration_<N>/{PLY_NAME}")
    return max(iterations, key=lambda each: int(each.parent.name.removeprefix("iteration_")))


def _used_degree(sh: Tensor) -> int:
    """The degree of (N, K, 3) coefficients without the empty bands at their end, which only pad a file.

    Empty is what has no bit set, so that a file with a -0.0 is written back as it was.
    """
    used = [
        degree
        for degree in range(1, sh_degree_of(sh) + 1)
        if sh[:, degree**2 : (degree + 1) ** 2].view(torch.int32).any()
    ]
    return max(used, default=0)


def _write_files(gaussians: PlyGaussians, params: HeadParameters | None, metadata: dict | None, folder: Path) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(folder / PLY_NAME))]
        write_gaussian_ply(files[0], gaussians)
        if params is not None:
            files.append(stack.enter_context(atomic_file(folder / PARAMETERS_NAME)))
            params.write(files[-1])
        if metadata is not None:
            files.append(stack.enter_context(atomic_file(folder / METADATA_NAME)))
            files[-1].write(to_json(metadata).encode())
        # All that can fail has failed before the first of them gets its name.
        for file in files:
            flush_to_disk(file)


def _metadata_content(path: Path) -> dict | None:
    """The JSON object of a metadata file; None if there is no such file."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _head_identity(content: dict, where: object) -> tuple[str | None, str | None]:
    """Name and hash of the head model, as far as the content says them; errors call it `where`."""
    name, digest = content.get("head_name"), content.get("head_hash")
    for key, value in (("head_name", name), ("head_hash", digest)):
        if not isinstance(value, str | None):
            raise ValueError(f"{where}: {key} is {value!r}, expected a string")
    return name, digest
