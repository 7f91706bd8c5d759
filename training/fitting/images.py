"""The images of a tracked subject for a fit: on a background, at the current size, with their cameras. Axes: H W pixels."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.rendering.cameras import Cameras


class Images:
    """Images and cameras of one tracking on a device; decoded images are cached as bytes up to a memory budget."""

    def __init__(self, tracking: Tracking, background: float, device: torch.device, cache_megabytes: int = 4096):
        self.tracking, self.background, self.device = tracking, background, device
        largest = max((frame.width * frame.height for frame in tracking.frames), default=1)
        self._bytes = functools.lru_cache(maxsize=int(cache_megabytes * 1e6) // (4 * largest))(self._read)

    def truth(self, index: int, downscale: int = 1) -> Tensor:
        """(1, H, W, 3) in 0..1 on the background; each pixel is the mean of `downscale`^2, incomplete ones at the edges are cut."""
        color, alpha = self.rgba(index).split((3, 1), -1)
        image = (color * alpha + self.background * (1 - alpha))[None]
        if downscale == 1:
            return image
        small = torch.nn.functional.avg_pool2d(image.permute(0, 3, 1, 2), downscale)
        return small.permute(0, 2, 3, 1).contiguous()

    def camera(self, index: int, downscale: int = 1) -> Cameras:
        """The camera of that image, float32."""
        camera = self.tracking.cameras([index]).to(self.device, torch.float32)
        if downscale == 1:
            return camera
        Ks = camera.Ks.clone()
        Ks[:, :2] /= downscale
        return replace(camera, Ks=Ks, width=camera.width // downscale, height=camera.height // downscale)

    def row(self, index: int) -> int:
        """The row of the tracking's head parameters."""
        return self.tracking.row(self.tracking.frames[index])

    def rgba(self, index: int) -> Tensor:
        """(H, W, 4) in 0..1, straight alpha."""
        return self._bytes(index).to(self.device).float() / 255

    def is_dark(self, index: int) -> bool:
        """Whether the image shows nothing: it is black or transparent."""
        rgba = self._bytes(index)
        return not bool((rgba[..., :3].bool().any(-1) & rgba[..., 3].bool()).any())

    def _read(self, index: int) -> Tensor:
        return (self.tracking.image(index) * 255).round().to(torch.uint8)


def evenly_spread(tracking: Tracking, indices: Sequence[int], count: int | None) -> list[int]:
    """At most `count` of some images, in order, evenly spaced over cameras and over time; None: all."""
    if count is None or len(indices) <= count:
        return list(indices)
    by_camera: dict[int, list[int]] = {}
    for index in indices:
        by_camera.setdefault(tracking.frames[index].camera, []).append(index)
    cameras = [by_camera[camera] for camera in sorted(by_camera)]
    chosen = set()
    for number in range(count):
        # Cameras take turns, or are evenly spaced if there are too many. Every n-th image could belong to one camera.
        images = cameras[number * len(cameras) // count if count < len(cameras) else number % len(cameras)]
        chosen.add(images[number * len(images) // count])
    return sorted(chosen)
