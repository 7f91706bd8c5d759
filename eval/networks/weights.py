"""What all networks of the metrics share: being missing, where they come from, and weights that run no code.

Nothing is downloaded. A package that is not installed, or weights that nobody gave, make a network `Missing`; a file that was
given and is not what its flag asks for is an error, before anything is computed with it.
"""

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

BATCH = 8  # images a forward pass


@dataclass(frozen=True)
class Missing:
    """A network that cannot be had here: what its metric shows instead of a number."""

    network: str  # for subjects: "AlexNet, lpips"
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"n/a ({self.reason})"


@dataclass(frozen=True)
class Source:
    """What a number was computed with."""

    name: str  # the network
    package: str
    version: str
    weights: str  # name of the file
    sha256: str  # of that file


def source_of(name: str, package: str, weights: Path) -> Source:
    """Name and hash of a weights file, and the installed version of the package that reads it."""
    with open(weights, "rb") as file:
        return Source(name, package, version(package), weights.name, hashlib.file_digest(file, "sha256").hexdigest())


def find_weights(
    network: str, packages: Mapping[str, str], weights: Path | None, flag: str, file: str
) -> Path | Missing:
    """The weights file, if all packages (module -> name to install) can be imported and weights are given; else what lacks.

    Raises:
        FileNotFoundError: weights are given, and are not there.
    """
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"{flag} {weights}: no such file; expected {file}")
    absent = [module for module in packages if find_spec(module) is None]
    if weights is not None and not absent:
        for module in packages:
            try:
                import_module(module)
            except (ImportError, RuntimeError, OSError) as error:  # e.g. a torchvision that was built for another torch
                reason = f"{module} is installed, but fails: {' '.join(str(error).split())}"
                return Missing(network, reason, f"a {packages[module]} that fits torch {torch.__version__}")
        return weights
    reasons, remedies = [], []
    if absent:
        names = " ".join(packages[module] for module in absent)
        reasons.append(f"not installed: {names}")
        remedies.append(f"pip install {names}")
    if weights is None:
        reasons.append("no weights given")
        remedies.append(f"{flag} {file}")
    return Missing(network, "; ".join(reasons), "; ".join(remedies))


def cached_checkpoint(name: str) -> Path | None:
    """A file that torch.hub has downloaded earlier, if it is there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    return path if path.is_file() else None


def read_state_dict(path: Path, flag: str, expected: str) -> dict[str, Tensor]:
    """A state dict of tensors from a `.safetensors` file or a checkpoint of torch, whose code is never run.

    Raises:
        ValueError: anything else, a TorchScript archive or a pickle of objects included.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        # torch's long text explains how to run the file's code; that is not the way out here
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise ValueError(f"{flag} {path}: is no file of plain tensors ({reason}); expected {expected}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{flag} {path}: holds a {type(state).__name__} that is no state dict; expected {expected}")
    return state


def check_state_dict(
    found: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], path: Path, flag: str, expected: str
) -> None:
    """ValueError that names the first tensor of `shapes` which a state dict lacks or has in another shape."""
    for name, shape in shapes.items():
        if name not in found:
            first = next(iter(found), "nothing")
            raise ValueError(
                f"{flag} {path}: has no tensor {name} among its {len(found)} (the first is {first}); expected {expected}"
            )
        if tuple(found[name].shape) != tuple(shape):
            raise ValueError(
                f"{flag} {path}: {name} is {tuple(found[name].shape)}, not {tuple(shape)}; expected {expected}"
            )


def batches(*images: np.ndarray) -> Iterator[list[Tensor]]:
    """Stacks of images (N, H, W, 3) uint8 of one N, piece by piece as tensors (n, 3, H, W) uint8.

    Raises:
        ValueError: not images of 8 bits, or stacks of different shapes.
    """
    for stack in images:
        if stack.ndim != 4 or stack.shape[3] != 3 or stack.dtype != np.uint8 or stack.shape != images[0].shape:
            shapes = ", ".join(f"{stack.shape} {stack.dtype}" for stack in images)
            raise ValueError(f"expected images (N, H, W, 3) uint8 of one size, found {shapes}")
    for begin in range(0, len(images[0]), BATCH):
        yield [torch.from_numpy(stack[begin : begin + BATCH].copy()).permute(0, 3, 1, 2) for stack in images]
