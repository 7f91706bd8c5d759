"""A moving avatar as one HTML file that plays by itself: no server, no network, nothing to install.

The template `moving_page.html.j2` is the player: it unpacks the frames, projects them as `rendering.projection` does, sorts
them by depth and blends them with WebGL 2.

Every attribute is rounded to a multiple of its step. Of each frame the difference from the one before is kept, as an
unsigned number (0, -1, 1, -2, ... become 0, 1, 2, 3, ...), all lowest bytes first: so what moves slowly deflates well.
"""

import base64
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from gaussian_tokenizer.avatars.gaussians import MIN_SCALE, Gaussians
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.templates import render_template

# Of positions in meters, unit quaternions, logarithms of scales, opacities, SH coefficients.
STEPS = {"positions": 1e-5, "quats": 1 / 2048, "scales": 1 / 256, "opacities": 1 / 1024, "sh": 1 / 1024}
LARGEST = 2**30 - 1  # steps, so that a difference has 31 bits: positions reach 10 km
MAX_BYTES = 2**29  # unpacked, what a browser still holds: 20 seconds of 27,000 Gaussians


@dataclass(frozen=True)
class PageCamera:
    """Where a page looks from at first; the user then orbits around the target."""

    target: Sequence[float]  # (3,) meters
    extent: float  # meters, side of the square that the window shows at the target
    distance: float = 1.0  # meters from the target
    azimuth: float = 0.0  # degrees to the subject's left
    turn: float = 0.0  # degrees to the subject's left in the course of all frames


def save_page(
    path: str | os.PathLike,
    gaussians: Gaussians | Iterable[Gaussians],
    camera: PageCamera,
    title: str,
    fps: float = 25.0,
    background: float = 1.0,
) -> int:
    """Write the frames as one HTML file, atomically; returns its size in bytes.

    An iterable gives the motion in parts of any number of frames. `title` may be any text, `background` is a gray in 0..1.
    ValueError if there are no frames or too many for a browser, a value is not finite, or `fps` is not above 0 and at
    most 1000.
    """
    if not 0 < fps <= 1000:
        raise ValueError(f"{fps} frames per second; expected more than 0 and at most 1000")
    with atomic_file(path) as file:  # opened first: a missing folder fails before minutes of posing
        arrays = _in_steps([gaussians] if isinstance(gaussians, Gaussians) else gaussians, Path(path))
        num_frames, _, count = arrays["positions"].shape
        changes = {name: _changes(array) for name, array in arrays.items()}
        kinds = [(name, *change.shape[:2], STEPS[name]) for name, change in changes.items()]
        settings = {"frames": num_frames, "count": count, "fps": fps, "background": background, "arrays": kinds}
        settings |= asdict(camera)
        data = base64.b64encode(zlib.compress(b"".join(map(_planes, changes.values())), 9)).decode()
        page = render_template(__package__, "moving_page.html.j2", title=title, settings=settings, data=data).encode()
        return file.write(page)


def _in_steps(parts: Iterable[Gaussians], path: Path) -> dict[str, np.ndarray]:
    """Arrays (T, width, N) of whole steps; T = 1 for opacities and SH."""
    moving: dict[str, list[np.ndarray]] = {"positions": [], "quats": [], "scales": []}
    part, size = None, 0
    for part in parts:
        part.check_finite()
        size += 4 * 10 * part.num_frames * len(part)
        if size > MAX_BYTES:
            raise ValueError(
                f"{path}: a browser would have to unpack more than {MAX_BYTES >> 20} MiB; give fewer frames or Gaussians"
            )
        values = (part.positions, normalize(part.quats, dim=-1, eps=1e-12), part.scales.clamp(min=MIN_SCALE).log())
        for (name, frames), value in zip(moving.items(), values):
            frames.append(_rounded(name, value))
    if part is None or part.num_frames == 0:
        raise ValueError(f"{path}: no frames to write")
    still = {"opacities": part.opacities[None, :, None], "sh": part.sh.flatten(1)[None]}
    arrays = {name: np.concatenate(frames) for name, frames in moving.items()}
    return arrays | {name: _rounded(name, value) for name, value in still.items()}


def _rounded(name: str, values: Tensor) -> np.ndarray:
    """(T, N, width) -> (T, width, N) int32."""
    steps = np.rint(values.detach().double().cpu().numpy() / STEPS[name])
    return steps.clip(-LARGEST, LARGEST).astype(np.int32).transpose(0, 2, 1)


def _changes(steps: np.ndarray) -> np.ndarray:
    """The first frame and each one's difference from the one before, unsigned; only the first if nothing changes."""
    changes = np.diff(steps, axis=0, prepend=np.int32(0))
    changes = changes if changes[1:].any() else changes[:1]
    return ((changes << 1) ^ (changes >> 31)).view(np.uint32)


def _planes(changes: np.ndarray) -> bytes:
    """All lowest bytes, then all second ones, ..."""
    return np.ascontiguousarray(changes, "<u4").reshape(-1, 1).view(np.uint8).T.tobytes()
