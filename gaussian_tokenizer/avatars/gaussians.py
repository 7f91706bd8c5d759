"""World-space Gaussians with activated values, as a splatter draws them; named as in `gsplat.rasterization`."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

MIN_SCALE = 1e-12  # meters; what is smaller is stored as this, with a finite logarithm in float32
SH_DC = 0.28209479177387814  # the constant basis function, 1 / (2 sqrt(pi))


@dataclass(frozen=True, eq=False)
class Gaussians:
    """T frames of N Gaussians. Shapes are checked at construction, `ValueError` if they disagree."""

    positions: Tensor  # (T, N, 3) meters, world space
    scales: Tensor  # (T, N, 3) meters, one standard deviation along each axis
    quats: Tensor  # (T, N, 4) wxyz, of any length
    opacities: Tensor  # (N,) in 0..1
    sh: Tensor  # (N, K, 3) coefficients, K = (degree + 1)^2; rgb = sum of basis * sh + 0.5, evaluated in world directions

    def __post_init__(self) -> None:
        if self.positions.ndim != 3:
            raise ValueError(f"positions of Gaussians are {tuple(self.positions.shape)}, expected (T, N, 3)")
        frames, count, _ = self.positions.shape
        expected = {
            "positions": (frames, count, 3),
            "scales": (frames, count, 3),
            "quats": (frames, count, 4),
            "opacities": (count,),
            "sh": (count, (self.sh_degree + 1) ** 2, 3),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} is {tuple(getattr(self, name).shape)}, expected {shape}")

    def __len__(self) -> int:
        return self.positions.shape[1]

    @property
    def num_frames(self) -> int:
        return self.positions.shape[0]

    @property
    def sh_degree(self) -> int:
        return sh_degree_of(self.sh)

    @property
    def colors(self) -> Tensor:
        """(N, 3) >= 0, the part of the color that does not depend on the view."""
        return (self.sh[:, 0] * SH_DC + 0.5).clamp(min=0)

    def frames(self, index: int | slice) -> "Gaussians":
        """One frame (as T = 1) or a slice of them."""
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        return replace(self, positions=self.positions[index], scales=self.scales[index], quats=self.quats[index])

    def to(self, *device_or_dtype) -> "Gaussians":
        return Gaussians(**{field.name: getattr(self, field.name).to(*device_or_dtype) for field in fields(self)})

    def check_finite(self) -> None:
        """ValueError that names the attribute and the Gaussian if any value is NaN or infinite."""
        for field in fields(self):
            value = getattr(self, field.name)
            finite = torch.isfinite(value)
            if not finite.all():
                index = (~finite).nonzero()[0].tolist()
                row = index[0] if field.name in ("opacities", "sh") else index[1]
                found = value[tuple(index)].item()
                raise ValueError(f"{field.name} of Gaussian {row} is {found}, expected a finite number")


def sh_degree_of(sh: Tensor) -> int:
    """The degree of coefficients (N, K, 3); ValueError if it is not 0 to 3."""
    if sh.ndim != 3 or sh.shape[1] not in (1, 4, 9, 16):
        raise ValueError(f"sh is {tuple(sh.shape)}, expected (N, K, 3) with K of 1, 4, 9 or 16")
    return round(sh.shape[1] ** 0.5) - 1
