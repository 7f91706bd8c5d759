"""Appearance of synthetic subjects: random hair, beard and colors of a subject, and the color of each of its points.

Colors are lit (Lambert's law, darker depths of hair), as a fit with spherical harmonics of degree 0 would have them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from gaussian_tokenizer.synthetic.details import Details, clothes, draw_details, gray, paint_skin
from gaussian_tokenizer.synthetic.haircuts import SHORT_SIDES
from gaussian_tokenizer.synthetic.light import Light
from gaussian_tokenizer.synthetic.mixing import mix, smoothstep

HAIR_STYLES = {"bald": 0.15, "short": 0.35, "curly": 0.22, "long": 0.28}  # style: how frequent
BEARD_STYLES = {"none": 0.52, "stubble": 0.13, "short": 0.15, "full": 0.20}
HAIR_THICKNESS = {"bald": 0.0, "short": 0.010, "curly": 0.030, "long": 0.014}  # meters
BEARD_THICKNESS = {"none": 0.0, "stubble": 0.001, "short": 0.007, "full": 0.017}
SKINS = ((0.33, 0.20, 0.14), (0.50, 0.32, 0.22), (0.70, 0.49, 0.36), (0.85, 0.64, 0.51), (0.94, 0.77, 0.67))  # a scale
HAIR_COLORS = (
    (0.05, 0.04, 0.04),  # black
    (0.17, 0.10, 0.06),  # dark brown
    (0.36, 0.21, 0.11),  # brown
    (0.55, 0.22, 0.08),  # red
    (0.80, 0.62, 0.32),  # blond
    (0.60, 0.59, 0.58),  # gray
    (0.88, 0.87, 0.85),  # white
)
EYE_COLORS = ((0.22, 0.12, 0.06), (0.38, 0.24, 0.10), (0.28, 0.42, 0.22), (0.22, 0.42, 0.65), (0.45, 0.50, 0.53))
SCLERA, PUPIL = np.array((0.95, 0.94, 0.92)), np.array((0.02, 0.02, 0.02))
CAVITY, TEETH, TONGUE = np.array((0.25, 0.08, 0.08)), np.array((0.94, 0.90, 0.80)), np.array((0.74, 0.34, 0.33))
LIGHT = np.array((0.30, 0.55, 0.78)) / np.linalg.norm((0.30, 0.55, 0.78))


@dataclass(frozen=True, eq=False)
class Appearance:
    """What a subject looks like, apart from its shape; colors are RGB in 0..1, lengths meters."""

    hair_style: str
    beard_style: str
    skin: np.ndarray  # (3,)
    hair: np.ndarray
    beard: np.ndarray
    brows: np.ndarray
    lips: np.ndarray
    iris: np.ndarray
    brow_strength: float  # 0..1
    hair_thickness: float
    hair_length: float  # how far long hair falls
    beard_thickness: float
    wave_vectors: np.ndarray  # (W, 3) radians per meter, of the slow variation of hair and beard
    wave_phases: np.ndarray  # (W,)
    details: Details | None = None
    light: Light | None = None  # None: that of all plain subjects


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """A random appearance; the number of draws is always the same."""
    hair_style = str(rng.choice(list(HAIR_STYLES), p=list(HAIR_STYLES.values())))
    beard_style = str(rng.choice(list(BEARD_STYLES), p=list(BEARD_STYLES.values())))
    tone = rng.uniform(0, len(SKINS) - 1)
    skin = np.array([np.interp(tone, np.arange(len(SKINS)), channel) for channel in zip(*SKINS, strict=True)])
    # Dark skin seldom comes with fair hair or eyes.
    fairness = tone / (len(SKINS) - 1)
    natural = np.array((1.5, 1.2, 1.3 * fairness, 0.8 * fairness, 1.6 * fairness**2, 0.5, 0.35))
    hair = _jitter(rng, np.array(HAIR_COLORS)[rng.choice(len(HAIR_COLORS), p=natural / natural.sum())], 0.15)
    eyes = np.array((1.0, 0.6, fairness, 1.4 * fairness, 0.6 * fairness))
    iris = _jitter(rng, np.array(EYE_COLORS)[rng.choice(len(EYE_COLORS), p=eyes / eyes.sum())], 0.15)
    redness = rng.uniform(0.2, 1.0)
    hair_thickness = HAIR_THICKNESS[hair_style] * rng.uniform(0.75, 1.4)
    beard_thickness = BEARD_THICKNESS[beard_style] * rng.uniform(0.8, 1.4)
    directions = rng.standard_normal((5, 3))
    wavelengths = rng.uniform(0.05, 0.12, (5, 1))
    return Appearance(
        hair_style=hair_style,
        beard_style=beard_style,
        skin=_jitter(rng, skin, 0.05),
        hair=hair,
        beard=np.clip(hair * rng.uniform(0.7, 1.1) + (0.03, 0.01, 0), 0, 1),
        brows=0.7 * hair + 0.15 * skin,
        lips=np.clip(skin * (1 - redness * np.array((0.02, 0.36, 0.30))), 0, 1),
        iris=iris,
        brow_strength=rng.uniform(0.35, 1.0),
        hair_thickness=hair_thickness,
        hair_length=rng.uniform(0.07, 0.20),
        beard_thickness=beard_thickness,
        wave_vectors=2 * np.pi * directions / np.linalg.norm(directions, axis=1, keepdims=True) / wavelengths,
        wave_phases=rng.uniform(0, 2 * np.pi, 5),
    )


def detailed(appearance: Appearance, rng: np.random.Generator) -> Appearance:
    """The appearance with random details, and what follows from them for lips and hair."""
    details = draw_details(rng, appearance.hair_style, appearance.beard_style != "none", appearance.skin)
    own = details.lipstick_strength
    hair_thickness = SHORT_SIDES if details.cut == "horseshoe" else appearance.hair_thickness
    lips = (1 - own) * appearance.lips + own * details.lipstick
    return replace(appearance, details=details, lips=lips, hair_thickness=hair_thickness)


def colors_of(
    appearance: Appearance, weights: Mapping[str, np.ndarray], normal: np.ndarray, waves: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    """(N, 3) lit colors in 0..1.

    `weights` (N,) in 0..1 by region, with `iris_distance` (1 at the rim) where the head has irises and `mouth_depth`
    (0 at the lips, 1 at the back) where it has a `mouth_interior`; `normal` (N, 3); `waves` (N,) slow variation in
    -1..1; `depth` (N,) in the hair, 0 at the skin.
    """
    colors = np.broadcast_to(appearance.skin, normal.shape)
    blood = 0.6 * np.maximum(weights["ears"], weights["nose"])
    colors = mix(colors, appearance.skin * (1.0, 0.84, 0.80), blood)
    details = appearance.details
    if details is not None and "across" in weights:
        colors = paint_skin(details, colors, weights)
    colors = mix(colors, appearance.lips, weights["lips"])
    colors = mix(colors, appearance.brows, appearance.brow_strength * weights["brows"])
    strands = ((0.62 + 0.38 * depth) * (1 + 0.25 * waves))[:, None]
    stubble = 0.35 if appearance.beard_style == "stubble" else 0.0
    bearded = weights["beard"] * (1.0 if appearance.beard_thickness > 0.002 else stubble)
    colors = mix(colors, appearance.beard * strands, bearded)
    shaved = 0.06 if details is None or details.cut != "shaved" else details.shaved
    haired = weights["scalp"] * (1.0 if appearance.hair_thickness else shaved)
    hair = appearance.hair
    if details is not None and "across" in weights:
        hair = gray(details, hair, weights)
        colors = mix(colors, details.clothes, clothes(details, weights))
    colors = mix(colors, hair * strands, haired)
    light = _light(appearance.light, normal, weights["neck"])
    if "mouth_depth" in weights:
        inside = mix(mix(CAVITY, TONGUE, weights["tongue"]), TEETH, weights["teeth"])
        # The deeper, the darker.
        colors = mix(colors, inside * (1 - 0.6 * weights["mouth_depth"])[:, None], weights["mouth_interior"])
    colors = colors * light
    eyes = np.broadcast_to(SCLERA, normal.shape)
    if "iris_distance" in weights:
        distance = weights["iris_distance"]
        eyes = mix(eyes, appearance.iris * (1 - 0.5 * smoothstep((distance - 0.7) / 0.3))[:, None], distance < 1)
        eyes = mix(eyes, PUPIL, distance < 0.42)
    if appearance.light is not None:
        eyes = eyes * (0.3 + 0.7 * light)
    return np.clip(mix(colors, eyes, weights["eyes"] > 0.5), 0, 1)


def _light(light: Light | None, normal: np.ndarray, neck: np.ndarray) -> np.ndarray:
    """(N, 3) or (N, 1) factors of the colors."""
    if light is not None:
        return light.on(normal, neck)
    return (0.62 + 0.45 * np.maximum(normal @ LIGHT, 0) - 0.12 * neck)[:, None]


def _jitter(rng: np.random.Generator, color: np.ndarray, amount: float) -> np.ndarray:
    return np.clip(color * rng.uniform(1 - amount, 1 + amount) * rng.uniform(1 - amount / 3, 1 + amount / 3, 3), 0, 1)
