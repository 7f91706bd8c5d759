"""Colors of points: their own, or by generation order, by the face they are anchored to, or by their density on the surface.

Colors are (N, 3) float32 in 0..1, in the avatar's row order, which for a generated avatar is the order of generation.
"""

import numpy as np

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import SH_DC
from gaussian_tokenizer.heads.head_parameters import HeadParameters

ORDER = "generation order"
MODES = ("true color", ORDER, "face", "density")
MAX_DISORDER = 0.05  # relative to the height of the avatar: 0 for rows sorted by height, 0.3 for any order
# Eight samples of matplotlib's viridis (CC0), from dark to bright.
VIRIDIS = np.array(
    [
        (0.267, 0.005, 0.329),
        (0.275, 0.195, 0.496),
        (0.213, 0.359, 0.552),
        (0.153, 0.497, 0.558),
        (0.122, 0.632, 0.531),
        (0.290, 0.759, 0.428),
        (0.622, 0.854, 0.226),
        (0.993, 0.906, 0.144),
    ]
)
GOLDEN = 0.618033988749895  # golden ratio: consecutive multiples, modulo 1, are far apart


def modes(avatar: GaussianAvatar) -> tuple[str, ...]:
    """The MODES that are meaningful for this avatar: generation order only where rows are sorted by height, as generated."""
    heights = avatar.canonical_points()["positions"][:, 1].numpy()
    disorder = np.abs(heights - np.sort(heights)).mean()
    return MODES if disorder <= MAX_DISORDER * np.ptp(heights) else tuple(mode for mode in MODES if mode != ORDER)


def point_colors(avatar: GaussianAvatar, mode: str) -> np.ndarray:
    """The colors of one of MODES."""
    count = len(avatar)
    if mode == "true color":
        assert avatar.sh is not None
        return (avatar.sh[:, 0].numpy() * SH_DC + 0.5).clip(0, 1).astype(np.float32)
    if mode == ORDER:
        return ramp(np.arange(count) / max(count - 1, 1))
    if mode == "face":
        return hues(avatar.faces.numpy() * GOLDEN)
    if mode == "density":
        # By rank: densities span three orders of magnitude, and on a linear scale most points would share one color.
        distinct, rank = np.unique(points_per_area(avatar), return_inverse=True)
        return ramp(rank / max(len(distinct) - 1, 1))
    raise ValueError(f"color {mode!r}: expected one of {', '.join(MODES)}")


def points_per_area(avatar: GaussianAvatar) -> np.ndarray:
    """(N,) number of points on the face of each point, per square meter of that face on the canonical head."""
    head = avatar.head
    assert head is not None
    own = avatar.params or HeadParameters.zeros(head.n_shape, head.n_expression)
    a, b, c = head.canonical_vertices(own).double().numpy()[head.faces.numpy()].swapaxes(0, 1)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    faces = avatar.faces.numpy()
    return (np.bincount(faces, minlength=head.n_faces) / areas.clip(1e-12))[faces]


def ramp(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 as colors from dark violet to yellow."""
    stops = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(values, stops, channel) for channel in VIRIDIS.T], -1).astype(np.float32)


def hues(values: np.ndarray) -> np.ndarray:
    """The fractional parts of values as hues of medium brightness and saturation."""
    distance = np.abs((values[:, None] - np.array((0, 1 / 3, 2 / 3)) + 0.5) % 1 - 0.5)  # to red, green, blue
    return (0.15 + 0.8 * (2 - 6 * distance).clip(0, 1)).astype(np.float32)
