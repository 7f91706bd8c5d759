"""Zones of the faces of a head, and the regular placement: the same faces for all subjects of one style of hair and beard.

Every face belongs to one zone, found from the regions of the head model. A face carries no point, or 4 to 15 (the bounds of
the paper's fit); the occupied faces of a zone are the first of a farthest-point order, evenly spread for any number of them.
`captured` places points as a fit does.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

MIN_POINTS_PER_FACE, MAX_POINTS_PER_FACE = 4, 15
# zone: (points per area relative to plain skin, points on an occupied face of average size). A later zone wins.
ZONES = {
    "skin": (1.6, 4),
    "neck": (1.0, 4),
    "ears": (1.0, 4),
    "nose": (3.0, 4),
    "scalp": (1.1, 4),
    "beard": (1.6, 4),
    "brows": (5.0, 6),
    "eyelids": (4.0, 4),
    "lips": (14.0, 7),
    "eyes": (4.0, 4),
    "iris": (14.0, 6),
    "mouth_interior": (2.5, 4),
    "teeth": (5.0, 4),
    "tongue": (3.0, 4),
}
HAIR = {"bald": ZONES["scalp"], "short": (1.45, 8), "curly": (1.6, 11), "long": (1.75, 13)}
BEARD = {"none": ZONES["beard"], "stubble": (2.0, 6), "short": (2.5, 8), "full": (3.0, 11)}
# Relative density of the average subject, which has exactly the number of points asked for.
REFERENCE = {"scalp": 1.43, "beard": 2.3}
# How much denser than plain skin, where every face carries points.
DENSER = {"brows": 3, "eyelids": 3, "lips": 4, "eyes": 4, "iris": 9, "beard": 1.5, "teeth": 2}
DENSER_HAIR = {"bald": 1, "short": 1.5, "curly": 2.5, "long": 3}
# Skin hides what is behind it, so it must have no holes: next to faces without points its points are wider, by up to
# CLOSING meters. Points in the mouth must not show through the lips: they are at most WIDEST_INSIDE meters wide.
CLOSED, CLOSING = ("skin", "neck", "nose", "beard"), 0.002
INSIDE, WIDEST_INSIDE = ("mouth_interior", "teeth", "tongue"), 0.006
JAW_OPENING = 0.3  # radians: the most a random timestep opens the jaw, and up to which closed zones stay closed
LOOKING_FORWARD = 0.35  # faces of an eyeball whose normal has a smaller z are behind the lids
FULL_HEAD_POINTS = 26_000


@dataclass(frozen=True, eq=False)
class FaceLayout:
    """Zones of the faces of one head model."""

    zones: tuple[str, ...]  # names, those of `ZONES`
    zone: np.ndarray  # (F,) index into `zones`; -1 on faces that never carry a point
    areas: np.ndarray  # (F,) m^2, of the template
    order: dict[str, np.ndarray]  # zone -> its faces, spatially even from the first to the last
    centers: np.ndarray  # (2, F, 3) meters, of the faces of the template at rest and with the jaw open

    def zone_area(self, zone: str) -> float:
        return float(self.areas[self.order[zone]].sum())

    def reference(self) -> float:
        """Sum of density times area of the average subject: what `num_points` is spread over."""
        return sum(REFERENCE.get(zone, ZONES[zone][0]) * self.zone_area(zone) for zone in self.zones)


class SurfacePoints(NamedTuple):
    """Where N points are; arrays of length N."""

    faces: np.ndarray
    barycentrics: np.ndarray  # (N, 3)
    spacing: np.ndarray  # meters that a point has to fill
    heights: np.ndarray  # meters off the surface, along its normal
    depth: np.ndarray  # in the volume of hair or beard, 0..1
    along: np.ndarray  # position along the strand, 0..1


@functools.lru_cache(maxsize=4)
def face_layout(head: HeadModel) -> FaceLayout:
    """The zones of `head`. Faces of unknown color never carry points: `mouth_interior` of a head without `teeth`."""
    faces, template = head.faces.cpu().numpy(), head.template.cpu().numpy().astype(np.float64)
    corners = template[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    double_areas = np.linalg.norm(normals, axis=1)
    names = tuple(ZONES)
    zone = np.zeros(len(faces), np.int64)
    for index, name in enumerate(names):
        if name in head.regions:
            zone[_faces_of(head.regions[name].cpu().numpy(), faces)] = index
    eyeball = np.isin(zone, [names.index("eyes"), names.index("iris")])
    zone[eyeball & (normals[:, 2] < LOOKING_FORWARD * double_areas)] = -1
    if "mouth_interior" in head.regions:
        inside = head.regions["mouth_interior"].cpu().numpy()[faces].any(1)
        if "teeth" in head.regions:
            zone[inside & (zone < names.index("mouth_interior"))] = names.index("mouth_interior")
        else:
            zone[inside] = -1
    zone[double_areas <= 0] = -1
    open_jaw = HeadParameters.zeros(head.n_shape, head.n_expression)
    open_jaw.jaw_pose[0, 0] = JAW_OPENING
    opened = head.pose(open_jaw.to(head.device)).vertices[0].cpu().double().numpy()
    centers = np.stack((corners.mean(1), opened[faces].mean(1)))
    order = {name: _farthest_point_order(centers[0], np.flatnonzero(zone == index)) for index, name in enumerate(names)}
    return FaceLayout(names, zone, double_areas / 2, order, centers)


def default_num_points(n_faces: int) -> int:
    """400 points on 600 faces, 26,000 (the paper's size) on FLAME's 10,144 and above; a power law between."""
    return min(FULL_HEAD_POINTS, round(400 * (n_faces / 600) ** 1.476))


def sparse_counts(
    layout: FaceLayout, num_points: int, hair: str, beard: str, min_points_per_face: int = MIN_POINTS_PER_FACE
) -> np.ndarray:
    """Points on every face (F,), each 0 or 4..15; about `num_points` in total, more with much hair, fewer without."""
    chosen = ZONES | {"scalp": HAIR[hair], "beard": BEARD[beard]}
    reference = layout.reference()
    counts = np.zeros(len(layout.zone), np.int64)
    for zone, (density, per_face) in chosen.items():
        faces = layout.order[zone]
        if len(faces) == 0:
            continue
        wanted = num_points * density * layout.zone_area(zone) / reference
        # A zone too small for its points fills its faces up.
        mean = max(per_face * min_points_per_face / MIN_POINTS_PER_FACE, wanted / len(faces))
        relative = np.sqrt(layout.areas[faces] / layout.areas[faces].mean())
        on_face = np.clip(np.round(mean * relative), min_points_per_face, MAX_POINTS_PER_FACE).astype(np.int64)
        # Whole faces, as close to the wanted number as possible; at least two where left and right are visible.
        fewest = 1 if zone in INSIDE else 2
        occupied = max(fewest, int(np.searchsorted(np.cumsum(on_face) - on_face / 2, wanted)))
        counts[faces[:occupied]] = on_face[:occupied]
    return counts


def dense_counts(layout: FaceLayout, spacing: float, hair: str) -> np.ndarray:
    """Points on every face (F,) for a closed surface: one per `spacing`^2 (m^2), more where detail or hair is."""
    more = np.array([DENSER.get(zone, 1.0) for zone in layout.zones])
    more[layout.zones.index("scalp")] = DENSER_HAIR[hair]
    counts = np.maximum(1, np.round(layout.areas * more[layout.zone] / spacing**2)).astype(np.int64)
    return np.where(layout.zone >= 0, counts, 0)


def regular_points(layout: FaceLayout, counts: np.ndarray) -> SurfacePoints:
    """`counts` (F,) points on the faces, at the same places for all subjects."""
    faces, index, barycentrics = points_of_faces(counts)
    # Even over the points of a face and over the faces.
    depth = (0.5 + index * 0.6180339887498949 + faces * 0.7548776662466927) % 1
    along = (0.5 + index * 0.8191725133961645 + faces * 0.5698402909980532) % 1
    return SurfacePoints(faces, barycentrics, spacings(layout, counts)[faces], np.zeros(len(faces)), depth, along)


def spacings(layout: FaceLayout, counts: np.ndarray) -> np.ndarray:
    """(F,) meters that each point of a face with `counts` (F,) points has to fill, 0 on a face without points.

    The distance between points spread evenly over their zone, or at least over their face; on skin also that to the faces
    without points which they are nearest to, at rest and with the jaw open.
    """
    result = np.zeros(len(layout.zone))
    for zone, faces in layout.order.items():
        occupied, bare = faces[counts[faces] > 0], faces[counts[faces] == 0]
        if len(occupied) == 0:
            continue
        even = np.sqrt(layout.zone_area(zone) / counts[faces].sum())
        spacing = np.maximum(even, np.sqrt(layout.areas[occupied] / counts[occupied]))
        if zone in INSIDE:
            spacing = np.minimum(spacing, WIDEST_INSIDE)
        if zone in CLOSED and len(bare):
            for centers in layout.centers:
                distance = np.linalg.norm(centers[bare, None] - centers[occupied], axis=-1)
                np.maximum.at(spacing, distance.argmin(1), distance.min(1))
            spacing = np.minimum(spacing, even + CLOSING)
        result[occupied] = spacing
    return result


def points_of_faces(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (F,) -> faces (N,), index of each point on its face (N,), barycentrics (N, 3).

    The k-th point of any face has the same barycentrics: Roberts' R2 sequence from the centroid, folded onto a triangle.
    """
    faces = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(faces)) - np.repeat(np.cumsum(counts) - counts, counts)
    u, v = (1 / 3 + index * 0.7548776662466927) % 1, (1 / 3 + index * 0.5698402909980532) % 1
    folded = u + v > 1
    u, v = np.where(folded, 1 - u, u), np.where(folded, 1 - v, v)
    return faces, index, np.stack((u, v, 1 - u - v), 1)


def _faces_of(mask: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Faces with at least two corners in a region; of a region too small to have any, those with one."""
    corners = mask[faces].sum(1)
    return np.flatnonzero(corners >= (2 if (corners >= 2).any() else 1))


def _farthest_point_order(points: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """`chosen` indices from the most central on, each the farthest from those before (Gonzalez 1985)."""
    if len(chosen) == 0:
        return chosen
    points = points[chosen]
    distance = np.full(len(points), np.inf)
    order = np.zeros(len(points), np.int64)
    order[0] = np.linalg.norm(points - points.mean(0), axis=1).argmin()
    for step in range(1, len(points)):
        distance = np.minimum(distance, ((points - points[order[step - 1]]) ** 2).sum(1))
        distance[order[step - 1]] = -1
        order[step] = distance.argmax()
    return chosen[order]
