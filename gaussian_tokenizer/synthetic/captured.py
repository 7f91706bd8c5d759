"""The captured placement: every subject has its points on faces and at places of its own, as a fit to images does.

Points are dense where they are in the regular placement and where the subject's color changes across a face. Occupied faces
are drawn by systematic sampling along a space-filling curve: random, with the right share of points in every neighborhood.
"""

import numpy as np

from gaussian_tokenizer.synthetic.layout import (
    BEARD,
    CLOSED,
    HAIR,
    INSIDE,
    MAX_POINTS_PER_FACE,
    MIN_POINTS_PER_FACE,
    ZONES,
    FaceLayout,
    SurfacePoints,
    spacings,
)

DETAIL, DENSEST = 4.0, 20.0  # a color that changes by 1 makes a face denser by 1 + DETAIL; the largest relative density
TOTAL_SPREAD = 0.05  # how far the total is from what hair and beard ask for, relative
MOST_EXPECTED = 7  # mean number of points on an occupied face where a few faces could carry all points
NOISE, LESS_NOISE, NOISE_LIMIT = 0.0015, 0.0003, 2.5  # standard deviations in meters, and the largest in these
# Teeth must not show through the lips, nor eyes through their lids: these are less noisy, and lips move outwards only.
PRECISE, OUTWARDS = (*INSIDE, "eyes", "iris", "eyelids"), "lips"
# Random places leave larger gaps than even ones: there points are WIDER times as wide.
WIDER = 1.25


def captured_points(
    layout: FaceLayout,
    contrast: np.ndarray,
    num_points: int,
    hair: str,
    beard: str,
    min_points_per_face: int,
    rng: np.random.Generator,
) -> SurfacePoints:
    """About `num_points` random points, more with much hair, `min_points_per_face` to 15 on an occupied face.

    `contrast` (F,) is the distance of the colors (RGB in 0..1) that each face connects.
    """
    chosen = ZONES | {"scalp": HAIR[hair], "beard": BEARD[beard]}
    density, per_face = np.array([chosen[zone] for zone in layout.zones])[layout.zone].T
    areas, zones = np.where(layout.zone >= 0, layout.areas, 0), np.array(layout.zones)[layout.zone]
    total = num_points * (density * areas).sum() / layout.reference() * rng.uniform(1 - TOTAL_SPREAD, 1 + TOTAL_SPREAD)
    seen = np.where(np.isin(zones, INSIDE), 0, contrast)
    wanted = np.minimum(density * (1 + DETAIL * seen), DENSEST) * areas
    for _ in range(10):  # what full faces cannot hold goes to the others
        wanted = np.minimum(wanted * total / wanted.sum(), MAX_POINTS_PER_FACE)
    drawn = rng.poisson(np.minimum(per_face, MOST_EXPECTED) * min_points_per_face / MIN_POINTS_PER_FACE)
    sizes = np.clip(np.round(np.maximum(wanted, drawn)), min_points_per_face, MAX_POINTS_PER_FACE).astype(np.int64)
    # Occupied with a probability that gives the wanted number on average; one face at least.
    probability = np.minimum(wanted / sizes, 1)
    order = np.lexsort((_curve(layout.centers[0], rng), layout.zone))
    reached = np.floor(np.cumsum(probability[order]) / min(probability.sum(), 1) + rng.random())
    counts = np.zeros(len(sizes), np.int64)
    occupied = order[np.diff(reached, prepend=0) > 0]
    counts[occupied] = sizes[occupied]

    faces = np.repeat(np.arange(len(counts)), counts)
    spacing = (spacings(layout, counts) * np.where(np.isin(zones, CLOSED), WIDER, 1))[faces]
    noise = np.clip(rng.standard_normal(len(faces)), -NOISE_LIMIT, NOISE_LIMIT)
    noise = np.where(zones[faces] == OUTWARDS, np.abs(noise), noise)
    heights = np.where(np.isin(zones[faces], PRECISE), LESS_NOISE, NOISE) * noise
    barycentrics = rng.dirichlet(np.ones(3), len(faces))  # uniform on the triangle
    depth, along = rng.random((2, len(faces)))
    return SurfacePoints(faces, barycentrics, spacing, heights, depth, along)


def _curve(positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(F,) place of each of `positions` (F, 3) on a Z-order curve (Morton 1966) of random orientation."""
    turned = positions @ np.linalg.qr(rng.standard_normal((3, 3)))[0]
    low, high = turned.min(0), turned.max(0)
    cells = (1023 * (turned - low) / (high - low).max()).astype(np.int64)
    bits = cells[:, :, None] >> np.arange(10) & 1  # (F, 3, 10)
    return (bits << 3 * np.arange(10) + np.arange(3)[:, None]).sum((1, 2))
