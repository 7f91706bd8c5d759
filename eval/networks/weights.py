"""What all networks of the metrics share: being missing, provenance, and weights that are read without running code.

A file that was given but is not what its flag expects is an error, raised before anything is computed.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from gaussian_tokenizer.utils.hub import one_line

BATCH = 8  # images per forward pass
Shapes = Mapping[str, Sequence[int]]  # of tensors by name


@dataclass(frozen=True)
class Missing:
    """A network that is not available: its metrics show the reason instead of a number."""

    network: str  # what is missing, e.g. "LPIPS v0.1, AlexNet"
    reason: str
    remedy: str

    @property
    def about(self) -> dict[str, str]:
        """As the `about` of a network that is available."""
        return {"missing": self.reason, "remedy": self.remedy}


def provenance(name: str, package: str, weights: Path) -> dict[str, str]:
    """What a number was computed with: the network, its package and version, its weights file and that file's SHA-256."""
    with open(weights, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "package": package, "version": version(package), "weights": weights.name, "sha256": sha256}


def find_weights(
    network: str, packages: Mapping[str, str], weights: str | Path | None, flag: str, file: str
) -> Path | Missing:
    """The weights file if all packages (module -> name to install) import, else what is missing.

    Without `weights`, a file in torch.hub's cache is taken. FileNotFoundError if `weights` do not exist.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not weights and cached.is_file():
        weights = cached
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(f"{flag} {weights}: no such file; expected {file}")
    absent = " ".join(package for module, package in packages.items() if find_spec(module) is None)
    lacks = [(f"not installed: {absent}", f"pip install {absent}")] if absent else []
    lacks += [] if weights else [("no weights given", f"{flag} {file}")]
    if lacks or not weights:
        return Missing(network, *map("; ".join, zip(*lacks)))
    for module in packages:
        try:
            import_module(module)
        except (ImportError, RuntimeError, OSError) as error:  # e.g. a torchvision built for another torch
            reason = f"{module} is installed, but fails: {one_line(error)}"
            return Missing(network, reason, f"a {packages[module]} that fits torch {torch.__version__}")
    return Path(weights)


def wrong_file(flag: str, path: str | Path, problem: str, expected: str) -> ValueError:
    """The error for a file or folder that is not what its flag expects."""
    return ValueError(f"{flag} {path}: {problem}; expected {expected}")


def read_state_dict(path: Path, flag: str, expected: str, shapes: Shapes | None = None) -> dict[str, Tensor]:
    """A state dict of tensors from a `.safetensors` file or a torch checkpoint, whose code is never run.

    ValueError for anything else, and where a tensor of `shapes` is missing or has another shape.
    """
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        # The rest of torch's message explains how to run the file's code, which is not an option here.
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise wrong_file(flag, path, f"not a file of plain tensors ({reason})", expected) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise wrong_file(flag, path, f"holds a {type(state).__name__}, not a state dict", expected)
    for name, shape in (shapes or {}).items():
        if name not in state:
            problem = f"has no tensor {name} among its {len(state)} (the first is {next(iter(state), 'nothing')})"
            raise wrong_file(flag, path, problem, expected)
        if state[name].shape != tuple(shape):
            raise wrong_file(flag, path, f"{name} is {tuple(state[name].shape)}, not {tuple(shape)}", expected)
    return state


def in_batches(network: Callable[..., Tensor], *images: np.ndarray) -> np.ndarray:
    """What a network gives for stacks of images (N, H, W, 3) uint8, batch by batch, as float64."""
    return torch.cat([network(*batch) for batch in batches(*images)]).double().cpu().numpy()


def batches(*images: np.ndarray) -> Iterator[list[Tensor]]:
    """Checked stacks of images (N, H, W, 3) uint8, batch by batch as tensors (n, 3, H, W) uint8."""
    check_images(*images)
    for begin in range(0, len(images[0]), BATCH):
        yield [torch.from_numpy(stack[begin : begin + BATCH].copy()).permute(0, 3, 1, 2) for stack in images]


def check_images(*images: np.ndarray) -> None:
    """ValueError for images that are not 8-bit, and for stacks of different shapes."""
    for stack in images:
        if stack.ndim != 4 or stack.shape[3] != 3 or stack.dtype != np.uint8 or stack.shape != images[0].shape:
            shapes = ", ".join(f"{stack.shape} {stack.dtype}" for stack in images)
            raise ValueError(f"expected images (N, H, W, 3) uint8 of one size, found {shapes}")
