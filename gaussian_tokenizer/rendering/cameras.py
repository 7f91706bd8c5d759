"""Pinhole cameras with OpenCV axes (x right, y down, z forward), in pixels from the upper left corner; centers at + 0.5.

World axes are the head's: y up, the face looks along +z, +x is the subject's left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaussian_tokenizer.heads.head_model import HeadModel


@dataclass(frozen=True, eq=False)
class Cameras:
    """C cameras of one image size. `ValueError` at construction if anything in them cannot be a camera."""

    viewmats: Tensor  # (C, 4, 4) world to camera, meters
    Ks: Tensor  # (C, 3, 3) pixels: [[fx, skew, cx], [0, fy, cy], [0, 0, 1]]
    width: int
    height: int

    def __post_init__(self) -> None:
        for name, shape in (("viewmats", (4, 4)), ("Ks", (3, 3))):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                found = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} is a {found}, expected a tensor of floats; use torch.as_tensor")
            if value.ndim != 3 or value.shape[1:] != shape:
                raise ValueError(
                    f"{name} is {tuple(value.shape)}, expected (C, {shape[0]}, {shape[1]}); one camera needs [None]"
                )
            if not torch.isfinite(value).all():
                index = (~torch.isfinite(value)).nonzero()[0].tolist()
                raise ValueError(
                    f"{name} of camera {index[0]} has {value[tuple(index)].item()}, expected finite numbers"
                )
        if len(self.viewmats) != len(self.Ks):
            raise ValueError(
                f"{len(self.viewmats)} viewmats and {len(self.Ks)} Ks, expected as many; repeat the shorter one with expand"
            )
        wrong = ((self.viewmats[:, 3] - self.viewmats.new_tensor([0, 0, 0, 1])).abs() > 1e-4).any(1)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"the last row of viewmats[{first}] is {self.viewmats[first, 3].tolist()}, expected [0, 0, 0, 1]; "
                "is the matrix transposed?"
            )
        focal = self.Ks.detach()[:, [0, 1], [0, 1]]
        if (focal <= 0).any():
            first = int((focal <= 0).any(1).nonzero()[0])
            raise ValueError(
                f"the focal lengths of camera {first} are {focal[first].tolist()} pixels, expected more than 0; "
                "OpenGL cameras are converted by turning the y and z axes of viewmats"
            )
        for name in ("width", "height"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of pixels, at least 1")

    @classmethod
    def look_at(
        cls,
        eyes: Tensor | Sequence,
        target: Tensor | Sequence[float],
        focal: float,
        width: int,
        height: int,
        up: Sequence[float] = (0.0, 1.0, 0.0),
    ) -> "Cameras":
        """Cameras at `eyes`, (C, 3) or (3,) meters, with `target` (3,) in the middle of the image and `up` upwards.

        `focal` in pixels. Dtype and device are those of `eyes`; float32 on the CPU unless it is a tensor of floats.
        """
        eyes = torch.as_tensor(eyes)
        eyes = eyes if eyes.is_floating_point() else eyes.float()
        if eyes.ndim not in (1, 2) or eyes.shape[-1] != 3:
            raise ValueError(f"eyes are {tuple(eyes.shape)}, expected (C, 3) or (3,)")
        eyes = eyes.reshape(-1, 3)
        forward = torch.as_tensor(target).to(eyes) - eyes
        right = torch.linalg.cross(forward, torch.as_tensor(up).to(eyes).expand_as(forward))
        flat = right.norm(dim=1) <= 1e-6 * forward.norm(dim=1)
        if flat.any():
            index = int(flat.nonzero()[0])
            raise ValueError(
                f"camera {index} at {eyes[index].tolist()} sees the target along {forward[index].tolist()}, which leaves no "
                f"side for up={tuple(up)}; move the eye or give another up"
            )
        forward, right = (torch.nn.functional.normalize(axis, dim=1) for axis in (forward, right))
        rotation = torch.stack((right, torch.linalg.cross(forward, right), forward), 1)
        viewmats = torch.eye(4).to(eyes).repeat(len(eyes), 1, 1)
        viewmats[:, :3, :3] = rotation
        viewmats[:, :3, 3] = -(rotation @ eyes[:, :, None])[:, :, 0]
        K = eyes.new_tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        return cls(viewmats, K.expand(len(eyes), 3, 3), width, height)

    @classmethod
    def orbit(
        cls,
        target: Tensor | Sequence[float],
        distance: float,
        azimuths_degrees: Tensor | Sequence[float],
        elevation: float,
        focal: float,
        width: int,
        height: int,
    ) -> "Cameras":
        """Cameras on a circle around `target` (3,), `distance` meters away, one for each azimuth.

        Azimuth 0 is in front of the face, positive ones are to the subject's left. `elevation` is in degrees above the
        target, between -90 and 90; `focal` in pixels.
        """
        if not distance > 0:
            raise ValueError(f"distance is {distance}, expected more than 0 meters")
        if not -90 < elevation < 90:
            raise ValueError(
                f"elevation is {elevation}, expected degrees between -90 and 90; use look_at for a top view"
            )
        azimuths = torch.deg2rad(torch.as_tensor(azimuths_degrees, dtype=torch.float64).reshape(-1))
        height_angle = torch.deg2rad(torch.as_tensor(elevation, dtype=torch.float64))
        flat = height_angle.cos()
        direction = torch.stack(
            (azimuths.sin() * flat, height_angle.sin().expand_as(azimuths), azimuths.cos() * flat), 1
        )
        eyes = torch.as_tensor(target, dtype=torch.float64).cpu() + distance * direction
        cameras = cls.look_at(eyes, target, focal, width, height)
        if not isinstance(target, Tensor):
            return cameras.to(torch.float32)
        return cameras.to(target.device, target.dtype if target.is_floating_point() else torch.float32)

    def __len__(self) -> int:
        return len(self.viewmats)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Cameras":
        """One camera (as C = 1), a slice, or those of a list of indices or a mask."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"camera {index} of {len(self)}")
            index = [index]
        return replace(self, viewmats=self.viewmats[index], Ks=self.Ks[index])

    def to(self, *device_or_dtype) -> "Cameras":
        return replace(self, viewmats=self.viewmats.to(*device_or_dtype), Ks=self.Ks.to(*device_or_dtype))

    @property
    def positions(self) -> Tensor:
        """(C, 3) meters, world space."""
        return torch.linalg.inv(self.viewmats)[:, :3, 3]


def portrait_cameras(head: HeadModel, size: int, azimuths: Sequence[float] = (0.0,)) -> Cameras:
    """Square cameras one meter from a head, `azimuths` degrees to its left, framed by the template of the head model."""
    template = head.template.cpu().double()
    skull = template[~head.regions["neck"].cpu()] if "neck" in head.regions else template
    low, high = skull.amin(0), skull.amax(0)
    extent = 1.5 * float(high[1] - low[1])  # room for hair and neck
    return Cameras.orbit((low + high) / 2, 1.0, azimuths, 0.0, focal=size / extent, width=size, height=size)


def default_camera(head: HeadModel, width: int, height: int) -> Cameras:
    """The camera that a portrait is taken to have when nothing is known: that of `portrait_cameras`, in the square around it."""
    square = portrait_cameras(head, max(width, height))
    Ks = square.Ks.clone()
    Ks[:, 0, 2], Ks[:, 1, 2] = width / 2, height / 2
    return replace(square, Ks=Ks, width=width, height=height)
