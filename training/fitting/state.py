"""Everything that an interrupted fit needs to continue exactly: the Gaussians, the head parameters, Adam, and density statistics.

As Gaussians are added and removed, the state of `torch.optim.Adam` is cut and grown with them, as in gsplat's strategies.
Axes: N Gaussians, T timesteps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaussian_tokenizer.utils.tensor_files import TensorFormat
from training.fitting.density_control import Edit, GaussianParams

CHECKPOINT = TensorFormat(
    "a complete checkpoint of a fit", "fit", "avatar-pointillist fit 2", "remove it to begin again"
)
STATISTICS = ("gradient_sums", "views", "radii")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(eq=False)
class FitState:
    """A fit after `iteration` steps."""

    gaussians: GaussianParams
    head: dict[str, Tensor]  # head parameters that are fine-tuned, (T, size)
    gradient_sums: Tensor  # (N,) screen-space gradients since the last density control
    views: Tensor  # (N,) float32, images that contained the Gaussian since then
    radii: Tensor  # (N,) float32 pixels, the largest since then
    iteration: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"wall": 0.0, "cpu": 0.0})

    def __post_init__(self) -> None:
        groups = [{"params": [value], "name": name} for name, value in self.parameters().items()]
        # Neither foreach nor fused: each parameter by itself, in one order of operations on every device.
        self.adam = torch.optim.Adam(groups, eps=1e-15, foreach=False, fused=False)

    @classmethod
    def begin(cls, gaussians: GaussianParams, head: dict[str, Tensor]) -> "FitState":
        return cls(gaussians, head, *_no_statistics(gaussians))

    def parameters(self) -> dict[str, Tensor]:
        """All that is optimized by name: the values of the Gaussians, and `head.<name>`."""
        return {**self.gaussians.values(), **{f"head.{name}": value for name, value in self.head.items()}}

    def adam_step(self, rates: Mapping[str, float]) -> None:
        """One step with the gradients in `.grad`, which are cleared; `rates` are learning rates by name."""
        for group in self.adam.param_groups:
            group["lr"] = rates[group["name"]]
        self.adam.step()
        self.adam.zero_grad()

    def apply(self, edit: Edit) -> None:
        """Replace the Gaussians. Each keeps the moments of the row it comes from, new ones begin at zero, as do the statistics."""
        new, source = edit.origin < 0, edit.origin.clamp(min=0)
        values = edit.gaussians.values()
        for group in self.adam.param_groups:
            if group["name"] not in values:
                continue
            state = self.adam.state.pop(group["params"][0])
            for name in MOMENTS:
                state[name] = state[name][source]
                state[name][new] = 0
            group["params"] = [values[group["name"]]]
            self.adam.state[group["params"][0]] = state
        self.gaussians = edit.gaussians
        self.gradient_sums, self.views, self.radii = _no_statistics(edit.gaussians)

    @torch.no_grad()
    def lower_opacities(self, highest: float) -> None:
        """Clamp opacities to `highest` and reset their moments; those that the images need grow again."""
        limit = torch.logit(torch.tensor(highest)).item()
        self.gaussians.opacities.clamp_(max=limit)
        for name in MOMENTS:
            self.adam.state[self.gaussians.opacities][name].zero_()

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint; `identity` tells which fit it belongs to."""
        tensors = {**self.parameters(), "faces": self.gaussians.faces}
        for group in self.adam.param_groups:
            state = self.adam.state[group["params"][0]]
            tensors |= {f"{key}.{group['name']}": value for key, value in state.items()}
        tensors |= {name: getattr(self, name) for name in STATISTICS}
        about = {"iteration": self.iteration, "seconds": self.seconds, "identity": dict(identity)}
        CHECKPOINT.write(path, tensors, about)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "FitState":
        """Read a checkpoint; ValueError if it is damaged."""
        with CHECKPOINT.opened(path) as (about, tensors):
            # Copies, because the tensors are mapped from the file, which the next checkpoint replaces.
            tensors = {name: value.clone().to(device) for name, value in tensors.items()}
            gaussians = GaussianParams(**{field.name: tensors[field.name] for field in fields(GaussianParams)})
            head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
            statistics = {name: tensors[name] for name in STATISTICS}
            state = cls(gaussians, head, **statistics, iteration=about["iteration"], seconds=about["seconds"])
            for name, value in state.parameters().items():
                moments = {key: tensors[f"{key}.{name}"] for key in MOMENTS}
                state.adam.state[value] = {"step": tensors[f"step.{name}"].cpu(), **moments}
            return state


def saved_identity(path: Path) -> dict[str, Any]:
    """Which fit a checkpoint belongs to; ValueError if it is damaged."""
    with CHECKPOINT.opened(path) as (about, _):
        return about["identity"]


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Where two nested mappings differ, as `name is a, asked for b`."""
    texts = []
    for name in sorted({*found, *asked}):
        first, second = found.get(name), asked.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping) and first != second:
            texts.append(differences(first, second))
        elif first != second:
            texts.append(f"{name} is {first!r}, asked for {second!r}")
    return ", ".join(texts)


def _no_statistics(gaussians: GaussianParams) -> tuple[Tensor, Tensor, Tensor]:
    zeros = gaussians.opacities.new_zeros(len(gaussians))
    return zeros.clone(), zeros.clone(), zeros
