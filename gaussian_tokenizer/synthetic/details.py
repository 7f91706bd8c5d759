"""Details of a subject, from a random stream of their own: age, marks of the skin, make-up, brows, haircut, glasses, clothes.

They refine the plain appearance of a seed. Places are in face coordinates: `across`, 0 in the middle and 0.5 at the
subject's left eye, and `up`, 0 at the eyes and -1 at the mouth.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.synthetic.mixing import mix, smoothstep

CUTS = {  # by hair style, the more frequent ones twice; see `haircuts`
    "bald": ("none", "shaved", "horseshoe", "horseshoe"),
    "short": ("none", "fringe", "fringe", "receding", "thinning", "bun", "quiff", "undercut"),
    "curly": ("none", "afro", "afro", "fringe", "receding", "undercut", "bun"),
    "long": ("none", "fringe", "fringe", "bob", "bob", "bun", "receding"),
}
LIPSTICKS = ((0.72, 0.10, 0.14), (0.50, 0.08, 0.16), (0.88, 0.38, 0.42), (0.62, 0.22, 0.36), (0.78, 0.36, 0.22))
SHADOWS = ((0.30, 0.20, 0.22), (0.35, 0.40, 0.62), (0.55, 0.32, 0.48), (0.22, 0.32, 0.28), (0.62, 0.45, 0.28))
CLOTHES = ((0.10, 0.11, 0.14), (0.92, 0.91, 0.89), (0.20, 0.30, 0.52), (0.55, 0.12, 0.14), (0.30, 0.42, 0.28),
           (0.72, 0.60, 0.42), (0.45, 0.45, 0.48), (0.85, 0.65, 0.20), (0.50, 0.35, 0.55))  # fmt: skip
FRAMES = (
    (0.06, 0.05, 0.05),
    (0.25, 0.14, 0.08),
    (0.72, 0.58, 0.32),
    (0.60, 0.61, 0.63),
    (0.55, 0.12, 0.12),
    (0.15, 0.22, 0.42),
)
GLASSES, FRECKLED, MADE_UP = 0.3, 0.25, 0.35  # how frequent
MARKS, MOST_MOLES, MOLE = 60, 4, (0.28, 0.17, 0.13)
GRAY = np.array((0.70, 0.69, 0.67))
CREASE = 0.05  # width of a crease, face coordinates


@dataclass(frozen=True, eq=False)
class Glasses:
    """Lengths relative to the distance between the eyes."""

    color: np.ndarray  # (3,)
    width: float  # half of a rim's
    height: float
    corners: float  # exponent of the superellipse: 2 is an ellipse, 5 nearly a rectangle
    thickness: float  # meters


@dataclass(frozen=True, eq=False)
class Details:
    """Strengths are 0..1, colors RGB in 0..1, places and sizes in face coordinates."""

    age: float
    marks: np.ndarray  # (MARKS, 4) moles, then freckles: across, up, radius, strength
    mark_color: np.ndarray
    creases: np.ndarray  # (3,) heights of the lines of the forehead
    blotches: float
    blotch_vectors: np.ndarray  # (W, 3) radians per meter
    blotch_phases: np.ndarray  # (W,)
    shadow: np.ndarray
    shadow_strength: float
    lipstick: np.ndarray
    lipstick_strength: float
    brow_shape: np.ndarray  # (3,) thickness relative to the plain brow, arch, tilt
    cut: str  # one of CUTS
    cut_amount: float
    gray_temples: float
    shaved: float  # how much of shaved hair shows
    clothes: np.ndarray
    neckline: float  # where clothes end, 0 at the neck's lower end, 1 at its upper one
    glasses: Glasses | None


def draw_details(rng: np.random.Generator, hair_style: str, bearded: bool, skin: np.ndarray) -> Details:
    """Random details of a subject with that hair and skin (3,); none that are `bearded` wear make-up."""
    age, made_up = rng.beta(1.2, 1.8), (rng.random() < MADE_UP) * (not bearded)
    count, freckled = rng.integers(0, MOST_MOLES + 1), (rng.random() < FRECKLED) * rng.uniform(0.4, 0.9)
    moles = np.arange(MARKS) < count
    places = np.where(
        moles, rng.uniform((-1, -1.6), (1, 0.9), (MARKS, 2)).T, rng.normal((0, -0.4), (0.5, 0.25), (MARKS, 2)).T
    )
    sizes = np.where(moles, rng.uniform(0.014, 0.032, MARKS), rng.uniform(0.010, 0.024, MARKS))
    strengths = np.where(moles, 0.85, freckled * rng.uniform(0.3, 1, MARKS))
    directions = rng.standard_normal((8, 3))
    vectors = (
        2 * np.pi * directions / np.linalg.norm(directions, axis=1, keepdims=True) / rng.uniform(0.012, 0.05, (8, 1))
    )
    glasses = Glasses(
        color=_one_of(rng, FRAMES),
        width=rng.uniform(0.38, 0.46),
        height=rng.uniform(0.26, 0.40),
        corners=rng.uniform(2, 4.5),
        thickness=rng.uniform(0.0018, 0.0036),
    )
    return Details(
        age=age,
        marks=np.c_[places.T, sizes, strengths],
        mark_color=np.minimum(MOLE, 0.75 * skin),
        creases=rng.uniform((0.52, 0.70, 0.88), (0.60, 0.78, 0.96)),
        blotches=rng.uniform(0.1, 1.0),
        blotch_vectors=vectors,
        blotch_phases=rng.uniform(0, 2 * np.pi, 8),
        shadow=_one_of(rng, SHADOWS),
        shadow_strength=made_up * rng.uniform(0.2, 0.75),
        lipstick=_one_of(rng, LIPSTICKS),
        lipstick_strength=made_up * rng.uniform(0.3, 0.9),
        brow_shape=rng.uniform((0.5, -0.1, -0.25), (1.4, 0.5, 0.25)),
        cut=str(rng.choice(CUTS[hair_style])),
        cut_amount=rng.random(),
        gray_temples=float(smoothstep((age - 0.35) / 0.4) * rng.random()),
        shaved=rng.uniform(0.1, 0.5),
        clothes=_one_of(rng, CLOTHES),
        neckline=rng.uniform(-0.1, 0.75),
        glasses=glasses if rng.random() < GLASSES else None,
    )


def face_coordinates(head: HeadModel, points: np.ndarray) -> dict[str, np.ndarray]:
    """`across`, `up` of `points` (N, 3) on the template, `from_front` in radians, `neck_height` 0..1; {} without the regions."""
    template, regions = head.template.double().numpy(), {name: mask.numpy() for name, mask in head.regions.items()}
    if not all(name in regions and regions[name].any() for name in ("eyes", "lips", "scalp", "neck", "brows")):
        return {}
    eyes, lips, scalp, neck = (template[regions[name]] for name in ("eyes", "lips", "scalp", "neck"))
    middle = (scalp[:, 2].min() + scalp[:, 2].max()) / 2
    return {
        "across": points[:, 0] / (2 * np.abs(eyes[:, 0]).mean()),
        "up": (points[:, 1] - eyes[:, 1].mean()) / (eyes[:, 1].mean() - lips[:, 1].mean()),
        "from_front": np.arctan2(np.abs(points[:, 0]), points[:, 2] - middle),
        "neck_height": (points[:, 1] - neck[:, 1].min()) / np.ptp(neck[:, 1]),
    }


def brow_weights(details: Details, coordinates: Mapping[str, np.ndarray], head: HeadModel) -> np.ndarray:
    """(N,) brows of the subject's own shape where `head`, which has the region, has its brows."""
    thickness, arch, tilt = details.brow_shape
    plain = face_coordinates(head, head.template[head.regions["brows"]].double().numpy())
    inner, outer, level = np.abs(plain["across"]).min(), np.abs(plain["across"]).max(), plain["up"].mean()
    side, up = np.abs(coordinates["across"]), coordinates["up"]
    along = (side - inner) / (outer - inner)
    line = level + 0.12 * (arch * (1 - (2 * along - 1.2) ** 2) + tilt * (along - 0.5))
    half = 0.075 * thickness * (1.1 - 0.6 * np.clip(along, 0, 1))
    ends = smoothstep((along + 0.05) / 0.15) * smoothstep((1.1 - along) / 0.2)
    return smoothstep(1.5 - np.abs(up - line) / half) * ends * (coordinates["from_front"] < 1.3)


def paint_skin(details: Details, colors: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Colors (N, 3) of skin with blotches, marks, creases, eye shadow and lipstick; `weights` hold the face coordinates."""
    across, up = weights["across"], weights["up"]
    face = smoothstep((1.5 - weights["from_front"]) / 0.3) * (1 - weights["neck"])
    blotches = 0.16 * details.blotches * weights["blotches"][:, None]
    cheeks = np.exp(-((np.abs(across) - 0.55) ** 2 / 0.06 + (up + 0.6) ** 2 / 0.08)) * face * details.blotches
    colors = colors * (1 + blotches * np.array((0.5, 1.1, 1.2))) * (1 - 0.22 * cheeks[:, None] * np.array((0, 1, 0.85)))
    colors = colors * (
        1 - 0.42 * (details.age * face * _creases(details, across, up))[:, None] * np.array((0.8, 1, 1.05))
    )
    for x, y, radius, strength in details.marks[details.marks[:, 3] > 0]:
        squared = (across - x) ** 2 + (up - y) ** 2
        colors = mix(colors, details.mark_color, strength * face * np.exp(-squared / (2 * radius**2)))
    lids = np.exp(-((np.abs(across) - 0.52) ** 2 / 0.07 + (up - 0.13) ** 2 / 0.012)) * face
    return mix(colors, details.shadow, details.shadow_strength * lids)


def _creases(details: Details, across: np.ndarray, up: np.ndarray) -> np.ndarray:
    """(N,) how deep in a crease: forehead, between the brows, beside nose and mouth, crow's feet, bags under the eyes."""
    side = np.abs(across)

    def line(distance: np.ndarray, extent: np.ndarray) -> np.ndarray:
        return np.exp(-((distance / CREASE) ** 2)) * extent

    deep = np.zeros_like(up)
    for height in details.creases:
        deep = np.maximum(deep, 0.8 * line(up - height + 0.08 * across**2, smoothstep((0.95 - side) / 0.3)))
    # From the wing of the nose outwards and down to the corner of the mouth.
    beside = line(side - (0.34 + 0.22 * (-0.5 - up)), smoothstep((-0.45 - up) / 0.15) * smoothstep((up + 1.25) / 0.3))
    frown = 0.7 * line(side - 0.09, smoothstep((up - 0.15) / 0.1) * smoothstep((0.5 - up) / 0.1))
    bags = 0.7 * line(up + 0.24 - 0.6 * (side - 0.5) ** 2, smoothstep((0.3 - np.abs(side - 0.5)) / 0.1))
    feet = 0.6 * line((up % 0.16) - 0.08, smoothstep((side - 0.88) / 0.06) * smoothstep((1.12 - side) / 0.1))
    feet = feet * smoothstep((0.22 - np.abs(up)) / 0.08)
    return np.max((deep, beside, frown, bags, feet), axis=0)


def gray(details: Details, hair: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """(N, 3) color `hair` (3,) with gray temples."""
    temples = np.exp(-(((weights["from_front"] - 1.2) / 0.55) ** 2)) * smoothstep((0.9 - weights["up"]) / 0.8)
    return mix(np.broadcast_to(hair, (len(temples), 3)), GRAY, details.gray_temples * temples)


def clothes(details: Details, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """(N,) how much of a point is clothes."""
    return smoothstep((details.neckline - weights["neck_height"]) / 0.06 + 0.5) * weights["neck"]


def _one_of(rng: np.random.Generator, colors: tuple) -> np.ndarray:
    """One of the colors, brighter or darker."""
    return np.clip(np.array(colors[rng.integers(len(colors))]) * rng.uniform(0.8, 1.2), 0, 1)
