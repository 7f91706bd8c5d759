"""What color a point of the viewer has: its own, or one that says when it was written, where it is bound, how dense it is.

Colors are (N, 3) float32 in 0..1 in the avatar's order of rows, which for a generated avatar is the order in which the model
wrote the points.
"""

import numpy as np

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import SH_DC
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

ORDER = "generation order"
MODES = ("true color", ORDER, "face", "density")
MAX_DISORDER = 0.05  # of the extent in height: 0 where rows rise, 0.3 where they are in any order
# Eight samples of matplotlib's viridis (CC0), dark to bright, between which is interpolated.
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
GOLDEN = 0.618033988749895  # steps of the golden section keep the hues of neighboring faces apart


def modes(avatar: GaussianAvatar) -> tuple[str, ...]:
    """Those of MODES that say something about this avatar: the order, only where it is the order of a generation.

    A point model writes from the neck to the crown, and a decoder moves the points a little from where they were written.
    Rows of avatars that were fitted, synthesized or made elsewhere do not rise.
    """
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
        # By rank: densities of a head span three orders of magnitude, and a few would leave one color to the rest.
        return ramp(_ranks(points_per_area(avatar)))
    raise ValueError(f"color {mode!r}: expected one of {', '.join(MODES)}")


def points_per_area(avatar: GaussianAvatar) -> np.ndarray:
    """(N,) points bound to the face of each point, per square meter of that face at rest."""
    head = avatar.head
    assert head is not None
    own = avatar.params or HeadParameters.zeros(head.n_shape, head.n_expression)
    on_face = np.bincount(avatar.faces.numpy(), minlength=head.n_faces)
    return (on_face / face_areas(head, own).clip(1e-12))[avatar.faces.numpy()]


def face_areas(head: HeadModel, own: HeadParameters) -> np.ndarray:
    """(F,) square meters on the canonical head."""
    a, b, c = head.canonical_vertices(own).double().numpy()[head.faces.numpy()].swapaxes(0, 1)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def ramp(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 from dark violet to yellow."""
    stops = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(values, stops, channel) for channel in VIRIDIS.T], -1).astype(np.float32)


def hues(values: np.ndarray) -> np.ndarray:
    """Values, of which the fraction counts, around the circle of hues, not too bright and not too pale."""
    distance = np.abs((values[:, None] - np.array((0, 1 / 3, 2 / 3)) + 0.5) % 1 - 0.5)  # to red, green, blue
    return (0.15 + 0.8 * (2 - 6 * distance).clip(0, 1)).astype(np.float32)


def _ranks(values: np.ndarray) -> np.ndarray:
    """0 for the smallest to 1 for the largest; equal values have equal ranks."""
    distinct, which = np.unique(values, return_inverse=True)
    return which / max(len(distinct) - 1, 1)
