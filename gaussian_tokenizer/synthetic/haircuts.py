"""Haircuts: which of the scalp has hair, how far it stands off, and strands that fall on the forehead or form a bun."""

from collections.abc import Mapping

import numpy as np

from gaussian_tokenizer.synthetic.details import Details
from gaussian_tokenizer.synthetic.mixing import smoothstep

SHORT_SIDES = 0.008  # meters: hair of a bald subject's sides
BOB, BUN_RADIUS = (-1.7, -1.0), (0.026, 0.042)  # where a bob ends, face coordinates; meters
FRINGE = (0.02, 0.05)  # meters below the hair line


def hair_mask(details: Details, coordinates: Mapping[str, np.ndarray]) -> np.ndarray:
    """(N,) share of its hair that a point of the scalp has: less where hair recedes or thins."""
    across, up, front = (np.abs(coordinates["across"]), coordinates["up"], coordinates["from_front"])
    amount = details.cut_amount
    if details.cut == "receding":  # corners first, then the middle
        line = 1.25 + 0.55 * amount * np.exp(-((across - 0.6) ** 2) / 0.08) + 0.35 * amount**2
        return np.where(front < 1.25, smoothstep((up - line) / 0.12 + 0.5), 1.0)
    if details.cut in ("thinning", "horseshoe"):
        top = 1.35 - 0.5 * amount + (0.5 if details.cut == "thinning" else 0)
        bare = 1 - smoothstep((top - up) / 0.2 + 0.5) * smoothstep((front - 0.9) / 0.3)
        return 1 - bare * (1 if details.cut == "horseshoe" else 0.55 + 0.4 * amount)
    return np.ones_like(up)


def volume(details: Details, coordinates: Mapping[str, np.ndarray]) -> np.ndarray:
    """(N,) factors of the thickness of hair."""
    across, up, front = (np.abs(coordinates["across"]), coordinates["up"], coordinates["from_front"])
    top = smoothstep((up - 0.9) / 0.5)
    if details.cut == "afro":
        return np.full_like(up, 1.15 + 0.5 * details.cut_amount)
    if details.cut == "quiff":
        return 1 + (1.2 + 1.3 * details.cut_amount) * top * smoothstep((1.3 - front) / 0.8)
    if details.cut == "undercut":
        return 0.25 + (0.75 + 0.6 * details.cut_amount) * top * smoothstep((1.1 - across) / 0.4)
    return np.ones_like(up)


def fringe_offsets(
    details: Details, coordinates: Mapping[str, np.ndarray], roots: np.ndarray, along: np.ndarray
) -> np.ndarray:
    """(N, 3) from roots (N, 3) on the head down over the forehead, strands up to the position `along` (N,) in 0..1."""
    front, up = coordinates["from_front"], coordinates["up"]
    near = smoothstep((1.15 - front) / 0.35) * smoothstep((1.75 - up) / 0.25)
    length = FRINGE[0] + details.cut_amount * (FRINGE[1] - FRINGE[0])
    drop = near * length * along
    moved = roots - drop[:, None] * (0, 1, 0)
    chosen = np.flatnonzero(drop > 1e-4)
    offsets = moved - roots
    forehead = roots[(front < 1) & (up > 0.25) & (up < 1.5)]
    forehead = forehead[:: max(1, len(forehead) // 200)]
    if len(forehead) == 0 or len(chosen) == 0:
        return offsets
    # Onto the surface: as far forward as the forehead is at the place below.
    squared = ((moved[chosen, None, :2] - forehead[None, :, :2]) ** 2).sum(2)
    weight = 1 / (squared + 4e-6) ** 2
    ahead = weight @ forehead[:, 2] / weight.sum(1)
    offsets[chosen, 2] += np.maximum(ahead - moved[chosen, 2], 0) * smoothstep(drop[chosen] / 0.004)
    return offsets


def bob_length(details: Details, coordinates: Mapping[str, np.ndarray], roots: np.ndarray) -> np.ndarray:
    """(N,) meters from roots (N, 3) to where a bob ends, the same height all around."""
    end = BOB[0] + details.cut_amount * (BOB[1] - BOB[0])
    unit = np.ptp(roots[:, 1]) / max(np.ptp(coordinates["up"]), 1e-9)
    return unit * np.maximum(coordinates["up"] - end, 0)


def bun(
    details: Details, coordinates: Mapping[str, np.ndarray], where: tuple[np.ndarray, np.ndarray], scalp: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places (N, 3) in a ball above the `scalp` (K, 3), and which points (N,) at its back go there; `where` are in 0..1."""
    radius = BUN_RADIUS[0] + details.cut_amount * (BUN_RADIUS[1] - BUN_RADIUS[0])
    low, high = scalp.min(0), scalp.max(0)
    tilt = 0.25 + 0.9 * (7.3 * details.cut_amount % 1)  # from straight up backwards
    direction = np.array((0, np.cos(tilt), -np.sin(tilt)))
    center = (low + high) / 2 + direction * ((high - low) / 2 + 0.6 * radius)
    azimuth, height = 2 * np.pi * where[0], 2 * where[1] - 1
    flat = np.sqrt(1 - height**2)
    ball = center + radius * np.stack((flat * np.cos(azimuth), height, flat * np.sin(azimuth)), 1)
    return ball, (coordinates["from_front"] > 1.9) & (7.13 * (where[0] + where[1]) % 1 < 0.4)
