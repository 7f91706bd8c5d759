"""Soft borders and mixed colors."""

from typing import Any

import numpy as np


def smoothstep(x: Any) -> Any:
    """0 below 0, 1 above 1, smooth between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def mix(colors: np.ndarray, others: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Colors (N, 3), with a share `weight` (N,) of others (N, 3) or (3,)."""
    weight = np.asarray(weight, np.float64)[:, None]
    return colors * (1 - weight) + others * weight
