"""Everything an interrupted fit needs to go on as if nothing had happened, and Adam, which is most of it.

Rows of Gaussians come and go while they are optimized (`density_control`), and the optimizer's moments must follow; so Adam
(Kingma & Ba 2015) is spelt out here on plain tensors: a dozen lines, in place of reaching into the state of
`torch.optim.Adam`, with whose steps it agrees. A checkpoint is one safetensors file, written atomically.

Axes: N Gaussians, T timesteps, K SH coefficients.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from gaussian_tokenizer.utils.atomic import atomic_file
from training.fitting.density_control import Edit, GaussianParams

FORMAT = "avatar-pointillist fit 1"
STATISTICS = ("gradient_sums", "views", "radii")
BETAS, EPSILON = (0.9, 0.999), 1e-15


@dataclass(eq=False)
class FitState:
    """A fit after `iteration` steps."""

    gaussians: GaussianParams
    head: dict[str, Tensor]  # head parameters that are fine-tuned, (T, size)
    moments: dict[str, tuple[Tensor, Tensor]]  # of everything optimized: means of the gradient and of its square
    gradient_sums: Tensor  # (N,) screen-space gradients since the last density control
    views: Tensor  # (N,) float32, images that had the Gaussian in them since then
    radii: Tensor  # (N,) float32 pixels, the largest since then
    iteration: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"wall": 0.0, "cpu": 0.0})

    @classmethod
    def begin(cls, gaussians: GaussianParams, head: dict[str, Tensor]) -> "FitState":
        moments = {
            name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in _all(gaussians, head).items()
        }
        return cls(gaussians, head, moments, *_no_statistics(gaussians))

    def parameters(self) -> dict[str, Tensor]:
        """All that is optimized by name: the values of the gaussians, and `head.<name>`."""
        return _all(self.gaussians, self.head)

    @torch.no_grad()
    def adam_step(self, rates: Mapping[str, float]) -> None:
        """One step of Adam with the gradients in `.grad`, which are taken away; `rates` are learning rates by name."""
        count = self.iteration + 1
        for name, value in self.parameters().items():
            gradient, value.grad = value.grad, None
            if gradient is None:
                continue
            mean, square = self.moments[name]
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = (square / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
            value.addcdiv_(mean, scale, value=-rates[name] / (1 - BETAS[0] ** count))

    def apply(self, edit: Edit) -> None:
        """Replace the Gaussians; each keeps the moments of the row it was, new ones begin at zero. Statistics begin anew."""
        new, source = edit.origin < 0, edit.origin.clamp(min=0)
        for name in self.gaussians.values():
            for moment in (rows := [moment[source] for moment in self.moments[name]]):
                moment[new] = 0
            self.moments[name] = rows[0], rows[1]
        self.gaussians = edit.gaussians
        self.gradient_sums, self.views, self.radii = _no_statistics(edit.gaussians)

    @torch.no_grad()
    def lower_opacities(self, highest: float) -> None:
        """No opacity above `highest`, and none in motion: what the images do not need does not come back."""
        limit = torch.logit(torch.tensor(highest)).item()
        self.gaussians.opacities.clamp_(max=limit)
        for moment in self.moments["opacities"]:
            moment.zero_()

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint; `identity` says of what fit it is."""
        tensors = {**self.parameters(), "faces": self.gaussians.faces}
        for name, (mean, square) in self.moments.items():
            tensors |= {f"mean.{name}": mean, f"square.{name}": square}
        tensors |= {name: getattr(self, name) for name in STATISTICS}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        about = {"format": FORMAT, "iteration": self.iteration, "seconds": self.seconds, "identity": dict(identity)}
        content = serialize(tensors, metadata={"fit": json.dumps(about)})
        with atomic_file(path) as file:
            file.write(content)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "FitState":
        """Read a checkpoint; ValueError if it is damaged."""
        with _opened(path, str(device)) as (about, file):
            # Copies: what is read otherwise lies in the file, which the next checkpoint replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            gaussians = GaussianParams(**{field.name: tensors[field.name] for field in fields(GaussianParams)})
            head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
            moments = {name: (tensors[f"mean.{name}"], tensors[f"square.{name}"]) for name in _all(gaussians, head)}
            statistics = {name: tensors[name] for name in STATISTICS}
            return cls(gaussians, head, moments, **statistics, iteration=about["iteration"], seconds=about["seconds"])


def saved_identity(path: Path) -> dict[str, Any]:
    """Of what fit a checkpoint is; ValueError if it is damaged."""
    with _opened(path) as (about, _):
        return about["identity"]


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[tuple[dict[str, Any], Any]]:
    try:
        with safe_open(os.fspath(path), framework="pt", device=device) as file:
            about = json.loads((file.metadata() or {})["fit"])
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}")
            yield about, file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole checkpoint of a fit ({error}); remove it to begin again") from None


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What two nested mappings disagree in, as `name is a, asked for b`."""
    texts = []
    for name in sorted({*found, *asked}):
        first, second = found.get(name), asked.get(name)
        if first == second:
            continue
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            texts.append(differences(first, second))
        else:
            texts.append(f"{name} is {first!r}, asked for {second!r}")
    return ", ".join(texts)


def _all(gaussians: GaussianParams, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**gaussians.values(), **{f"head.{name}": value for name, value in head.items()}}


def _no_statistics(gaussians: GaussianParams) -> tuple[Tensor, Tensor, Tensor]:
    zeros = gaussians.opacities.new_zeros(len(gaussians))
    return zeros.clone(), zeros.clone(), zeros
