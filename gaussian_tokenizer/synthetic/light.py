"""Light on a synthetic subject, from a random stream of its own: a key light, a weaker fill light, and what comes from all sides.

Like all colors of a subject it is baked into its Gaussians. Every subject has a draw of its own, so held-out subjects are
lit as none of training is; `hard` light is outside of the range of `varied`: from the side or below, with little ambient.
"""

from dataclasses import dataclass

import numpy as np

LIGHTS = ("varied", "hard", "plain")
# Ranges of: degrees to a side, degrees upwards, exposure, share of ambient light, strength of the color's tint.
RANGES = {
    "varied": ((0, 70), (5, 65), (0.85, 1.3), (0.4, 0.8), (0, 1)),
    "hard": ((75, 105), (-20, 60), (0.9, 1.6), (0.15, 0.4), (1, 1.8)),
}
WARM = np.array((0.09, 0.0, -0.14))  # added to white by a tint of 1; blue light has negative tints
MOST_FILL = 0.4  # of the key light
UNDER_CHIN = 0.18  # share of light that the neck lacks


@dataclass(frozen=True, eq=False)
class Light:
    """Directions point to the lights, with unit length; colors are factors of RGB."""

    direction: np.ndarray  # (3,)
    color: np.ndarray
    fill_direction: np.ndarray
    fill_color: np.ndarray
    ambient: np.ndarray

    def on(self, normals: np.ndarray, neck: np.ndarray) -> np.ndarray:
        """(N, 3) factors of the colors of points with `normals` (N, 3), `neck` (N,) in 0..1 (Lambert's law)."""
        key = np.maximum(normals @ self.direction, 0)[:, None] * self.color
        fill = np.maximum(normals @ self.fill_direction, 0)[:, None] * self.fill_color
        return (self.ambient + key + fill) * (1 - UNDER_CHIN * neck)[:, None]


def draw_light(rng: np.random.Generator, kind: str) -> Light | None:
    """A random light of a kind of LIGHTS; None stands for the light of `plain` subjects, the same for all."""
    if kind == "plain":
        return None
    side, up, exposure, ambient, tint = (rng.uniform(*bounds) for bounds in RANGES[kind])
    sign, tints = rng.choice((-1, 1)), rng.choice((-1, 1), 2) * tint * np.array((1, rng.uniform(0, 0.6)))
    fill_side, fill_up, fill = rng.uniform(20, 80), rng.uniform(-15, 40), rng.uniform(0, MOST_FILL)
    key = exposure * (1 - ambient) * (1 + WARM * tints[0])
    return Light(
        direction=_direction(sign * side, up),
        color=key,
        fill_direction=_direction(-sign * fill_side, fill_up),
        fill_color=fill * key[::-1],  # of the opposite tint
        ambient=exposure * ambient * (1 + WARM * tints[1]),
    )


def _direction(side: float, up: float) -> np.ndarray:
    """From degrees to the subject's left and upwards; (0, 0, 1) is in front of the face."""
    side, up = np.deg2rad((side, up))
    return np.array((np.sin(side) * np.cos(up), np.sin(up), np.cos(side) * np.cos(up)))
