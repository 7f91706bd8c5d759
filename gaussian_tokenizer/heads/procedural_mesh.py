"""The triangles of the procedural head: where the implicit surface is sampled and what is attached to it.

The skin is a grid, columns around the vertical axis and rows from crown to collar, cut at the eyes and the mouth; eyeballs, ears,
teeth and tongue are meshes of their own. Millimeters, axes as in `procedural_surface`.
"""

import itertools
import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from gaussian_tokenizer.heads.procedural_surface import EYE_CENTER, EYE_RADIUS, cast, skin_distance, skin_normal
from gaussian_tokenizer.heads.rigging import split_quads, strip_of_quads

FEWEST_FACES, MOST_FACES = 600, 40_000
Part = IntEnum("Part", "SKIN POCKET LEFT_EYE RIGHT_EYE LEFT_EAR RIGHT_EAR UPPER_TEETH LOWER_TEETH TONGUE", start=0)

# Columns: azimuth in degrees from the front (corners of eye and mouth fall on columns) and cells between, finest head.
AZIMUTHS = (0.0, 11.6, 15.6, 30.0, 62.0, 118.0, 180.0)
COLUMN_CELLS = (5, 2, 8, 9, 9, 6)
# Rows: origin of the rays (y, z), their elevation in degrees at the front and at the back, cells up to the next key.
ROWS = (
    (20.0, -5.0, 90.0, 90.0, 9),  # crown
    (20.0, -5.0, 42.0, 44.0, 6),  # hairline
    (20.0, -5.0, 12.0, 14.0, 7),  # brows
    (20.0, -5.0, 1.0, 2.0, 10),  # eyes
    (20.0, -5.0, -24.5, -8.0, 6),  # under the nose
    (20.0, -5.0, -33.3, -13.0, 8),  # mouth
    (18.0, -5.0, -46.0, -24.0, 6),  # chin
    (-2.0, -8.0, -57.0, -26.0, 4),  # under the chin
    (-32.0, -12.0, -50.0, -22.0, 5),  # throat
    (-84.0, -17.0, -34.0, -12.0, 4),  # neck
    (-148.0, -22.0, -24.0, 0.0, 0),  # collar
)
ROW_CELLS = tuple(key[4] for key in ROWS[:-1])
EYE_KEY, MOUTH_KEY = 3, 5
EYE_CUT, MOUTH_CUT = (11.6, 30.0), (-15.6, 15.6)  # azimuths of the corners
LID_UP, LID_DOWN, LID_TILT = 6.0, 4.6, 0.8  # millimeters the lids open above and below the row, and the outer corner up
MOUTH_BEND = 4.3  # millimeters that the mouth row comes down at the corners
EYE_ANGLES = (9.0, 18.0, 28.5, 40.0, 54.0, 70.0, 88.0, 110.0, 138.0)  # rings of an eyeball, from the pupil back
IRIS_ANGLE = 28.5
EAR_BASE = np.array([73.5, 2.0, -9.0])
POCKET_DEPTH, POCKET_HEIGHT = 36.0, 9.0  # from the lips to the back, from the mouth line to the roof and to the floor
# An arch of teeth: middle of its front (y of root and of tip, z), half its width, and how far its ends lie behind.
UPPER_ARCH, LOWER_ARCH = (-38.0, -50.0, 88.5, 17.5, 23.0), (-58.0, -50.0, 84.5, 16.0, 20.0)
TOOTH_THICKNESS = 3.5
TONGUE_LENGTH, TONGUE_WIDTH = (61.0, 81.0), 12.5  # z of root and tip, half the width


@dataclass
class Mesh:
    """A growing mesh of V vertices and F faces."""

    vertices: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))  # (V, 3) millimeters
    faces: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))  # (F, 3)
    part: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (V,) values of `Part`
    side: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (V,) +1 above the mouth row, -1 below, 0 on it
    travel: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (V,) millimeters in y that close the lids
    iris: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # (V,)

    def add(
        self, vertices: np.ndarray, part: int, side: np.ndarray | float = 0, travel: np.ndarray | float = 0
    ) -> np.ndarray:
        """Append vertices (..., 3); returns their indices (...)."""
        shape, start = vertices.shape[:-1], len(self.vertices)
        count = int(np.prod(shape))
        self.vertices = np.concatenate((self.vertices, vertices.reshape(-1, 3)))
        self.part = np.concatenate((self.part, np.full(count, part)))
        self.side = np.concatenate((self.side, np.broadcast_to(side, shape).ravel()))
        self.travel = np.concatenate((self.travel, np.broadcast_to(travel, shape).ravel()))
        self.iris = np.concatenate((self.iris, np.zeros(count, bool)))
        return np.arange(start, start + count).reshape(shape)

    def of(self, *parts: Part) -> np.ndarray:
        """(V,) bool: the vertices of these parts."""
        return np.isin(self.part, parts)

    def add_faces(self, *faces: np.ndarray) -> None:
        self.faces = np.concatenate((self.faces, *(np.reshape(f, (-1, 3)) for f in faces)))

    def add_quads(self, upper: np.ndarray, lower: np.ndarray) -> None:
        quads = strip_of_quads(upper, lower)
        self.add_faces(quads[:, 0], quads[:, 1])


def build_mesh(n_faces: int) -> Mesh:
    """The head with exactly `n_faces` triangles."""
    column_scale, row_scale = _resolution(n_faces)
    mesh = Mesh()
    _add_skin(mesh, column_scale, row_scale)
    cells = _part_cells(column_scale)
    for mirror in (1, -1):
        _add_eyeball(mesh, *cells.eye, mirror)
    for mirror in (1, -1):
        _add_ear(mesh, *cells.ear, mirror)
    _add_teeth(mesh, *cells.teeth, Part.UPPER_TEETH, UPPER_ARCH)
    _add_teeth(mesh, *cells.teeth, Part.LOWER_TEETH, LOWER_ARCH)
    _add_tongue(mesh, *cells.tongue)
    _split_edges(mesh, n_faces - len(mesh.faces))
    return mesh


def _resolution(n_faces: int) -> tuple[float, float]:
    """Scales of columns and rows that give the most faces up to `n_faces`; near-equal scales preferred."""
    if not FEWEST_FACES <= n_faces <= MOST_FACES:
        raise ValueError(f"procedural head of {n_faces} faces: expected {FEWEST_FACES} to {MOST_FACES}")
    stretches = (1.0, 0.96, 1.04, 0.92, 1.08, 0.88, 1.12)
    scales = [(columns, columns * stretch) for columns in np.arange(0.14, 2.5, 0.01) for stretch in stretches]
    short = np.array([n_faces - _count(*each) for each in scales])
    return scales[np.where(short >= 0, short, n_faces).argmin()]


def _cells(counts: tuple, scale: float) -> list[int]:
    return [max(1, round(count * scale)) for count in counts]


def _columns(scale: float) -> np.ndarray:
    """Azimuths in degrees from -180 to 180 (the last column repeats the first), symmetric."""
    parts = zip(AZIMUTHS, AZIMUTHS[1:], _cells(COLUMN_CELLS, scale), strict=False)
    half = np.concatenate((*(np.linspace(a, b, n, endpoint=False) for a, b, n in parts), AZIMUTHS[-1:]))
    return np.concatenate((-half[:0:-1], half))


def _cut_columns(azimuths: np.ndarray, cut: tuple[float, float]) -> np.ndarray:
    return np.flatnonzero((azimuths > cut[0] - 0.01) & (azimuths < cut[1] + 0.01))


class PartCells(NamedTuple):
    """How finely the parts beside the skin are divided."""

    pocket_rows: int
    teeth: tuple[int, int]  # cells along an arch, and strips: fronts only, or also edges and backs
    tongue: tuple[int, int]  # cells across and along
    eye: tuple[int, np.ndarray]  # segments around, and the angles of the rings
    ear: tuple[int, int, int]  # segments around, rings in front of the rim, rings behind it


def _part_cells(scale: float) -> PartCells:
    rings = EYE_ANGLES if scale > 0.7 else EYE_ANGLES[2::2] if scale > 0.45 else EYE_ANGLES[2::3]
    return PartCells(
        pocket_rows=max(2, round(3 * scale)),
        teeth=(max(2, 2 * round(6 * scale)), 1 if scale < 0.45 else 3),
        tongue=(max(2, 2 * round(3.5 * scale)), max(2, round(5 * scale))),
        eye=(max(6, 2 * round(10 * scale)), np.array(rings)),
        ear=(max(6, round(26 * scale)), max(1, round(9 * scale)), max(1, round(3 * scale))),
    )


def _count(column_scale: float, row_scale: float) -> int:
    """Faces that the scales give, before edges are split."""
    azimuths = _columns(column_scale)
    skin = (len(azimuths) - 1) * (2 * sum(_cells(ROW_CELLS, row_scale)) - 1)
    rims = 2 * 2 * 2 * (len(_cut_columns(azimuths, EYE_CUT)) - 1)
    cells = _part_cells(column_scale)
    mouth_cells = len(_cut_columns(azimuths, MOUTH_CUT)) - 1
    pocket = (2 * 2 * mouth_cells) * cells.pocket_rows + 2 * 2 * (cells.pocket_rows - 1)
    segments, angles = cells.eye
    around, front, back = cells.ear
    eyes, ears = 2 * 2 * segments * len(angles), 2 * around * (2 * (front + back) - 1)
    return skin + rims + pocket + eyes + ears + 2 * 2 * math.prod(cells.teeth) + 2 * math.prod(cells.tongue)


def _add_skin(mesh: Mesh, column_scale: float, row_scale: float) -> None:
    azimuths = _columns(column_scale)
    columns = len(azimuths) - 1
    cells = _cells(ROW_CELLS, row_scale)
    starts = np.concatenate(([0], np.cumsum(cells)))
    keys = np.array([key[:4] for key in ROWS])
    rows = np.arange(starts[-1] + 1)
    y, z, front, back = (_smooth_curve(starts, keys[:, i], rows)[:, None] for i in range(4))
    turn = np.deg2rad(azimuths[:-1])
    facing = (1 + np.cos(turn)) / 2
    elevation = np.deg2rad(back + (front - back) * facing)  # (rows, columns)
    origin = np.stack(np.broadcast_arrays(0.0, y, z + 0 * turn), -1)

    eye_row, mouth_row = starts[EYE_KEY], starts[MOUTH_KEY]
    opening, tilt, eye_columns = _lid_shape(azimuths[:-1])
    distance = 88.0  # from the origin of the rays to the lids, turns millimeters into angles
    fade_up = np.clip((rows - starts[EYE_KEY - 1]) / cells[EYE_KEY - 1], 0, 1) * (rows <= eye_row)
    fade_down = np.clip((starts[EYE_KEY + 1] - rows) / cells[EYE_KEY], 0, 1) * (rows > eye_row)
    up, down = LID_UP * opening + tilt, -LID_DOWN * opening + tilt
    above = elevation + (fade_up[:, None] * up + fade_down[:, None] * down) / distance
    # A cone meets the rounded mouth in a curve that rises to the corners; bend the rows there to make it level.
    x = azimuths[:-1] / MOUTH_CUT[1]
    near_mouth = np.interp(rows, starts[[MOUTH_KEY - 1, MOUTH_KEY, MOUTH_KEY + 1]], (0, 1, 0))
    above -= MOUTH_BEND * near_mouth[:, None] * x**2 * np.exp(1 - x**2) / distance
    below_lids = elevation[eye_row] + down / distance

    def surface(angles: np.ndarray, starts_of_rays: np.ndarray) -> np.ndarray:
        direction = np.stack((np.cos(angles) * np.sin(turn), np.sin(angles), np.cos(angles) * np.cos(turn)), -1)
        return cast(starts_of_rays.reshape(-1, 3), direction.reshape(-1, 3)).reshape(direction.shape)

    points = surface(above, origin)
    lower_lids = surface(below_lids[None], origin[eye_row][None])[0]
    gap = np.where(opening > 0, points[eye_row, :, 1] - lower_lids[:, 1], 0)
    travel = -0.85 * gap * fade_up[:, None] ** 1.5 + 0.15 * gap * fade_down[:, None] ** 1.5
    side = np.sign(mouth_row - rows)[:, None] + 0.0 * turn

    crown = mesh.add(points[0, :1], Part.SKIN, 1.0)
    upper = mesh.add(points[1:], Part.SKIN, side[1:], travel[1:])  # (rows - 1, columns)
    upper = np.concatenate((np.broadcast_to(crown, (1, columns)), upper))
    lower = upper.copy()  # the indices that the cells below a row use: other vertices along the cuts
    mouth_columns = _cut_columns(azimuths, MOUTH_CUT)
    for cut in eye_columns:
        inside = cut[1:-1]
        lower[eye_row, inside] = mesh.add(lower_lids[inside], Part.SKIN, 1.0, 0.15 * gap[inside])
    inside = mouth_columns[1:-1]
    lower[mouth_row, inside] = mesh.add(points[mouth_row, inside], Part.SKIN, -1.0)
    mesh.side[upper[mouth_row, inside]] = 1.0

    closed = np.append(np.arange(columns), 0)
    mesh.add_faces(np.stack((np.broadcast_to(crown, columns), upper[1, closed[:-1]], upper[1, closed[1:]]), 1))
    for row in rows[1:-1]:
        mesh.add_quads(lower[row, closed], upper[row + 1, closed])
    for cut in eye_columns:
        _add_lid_rims(mesh, upper[eye_row, cut], lower[eye_row, cut])
    _add_pocket(
        mesh, upper[mouth_row, mouth_columns], lower[mouth_row, mouth_columns], _part_cells(column_scale).pocket_rows
    )


def _smooth_curve(knots: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Monotone cubic through (knots, values), by Fritsch and Butland: even rows without overshoot."""
    step = np.diff(knots)
    slope = np.diff(values) / step
    tangent = np.zeros(len(knots))
    tangent[0], tangent[-1] = slope[0], slope[-1]
    product = slope[:-1] * slope[1:]
    inner = product > 0
    tangent[1:-1][inner] = (2 * product / np.where(inner, slope[:-1] + slope[1:], 1))[inner]
    cell = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, len(step) - 1)
    h, t = step[cell], (at - knots[cell]) / step[cell]
    cubic = (2 * t**3 - 3 * t**2 + 1) * values[cell] + (t**3 - 2 * t**2 + t) * h * tangent[cell]
    return cubic + (3 * t**2 - 2 * t**3) * values[cell + 1] + (t**3 - t**2) * h * tangent[cell + 1]


def _lid_shape(azimuths: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Per column: how far the lids open (0..1), the tilt in millimeters; and the columns of the two cuts."""
    inner, outer = EYE_CUT
    u = (np.abs(azimuths) - inner) / (outer - inner)
    within = (u > -1e-6) & (u < 1 + 1e-6)
    opening = np.where(within, np.sin(np.pi * np.clip(u, 0, 1) ** 0.9) ** 0.8, 0)
    opening[np.abs(u) < 1e-6] = opening[np.abs(u - 1) < 1e-6] = 0
    tilt = np.where(within, LID_TILT * (2 * u - 1), 0)
    return opening, tilt, [np.flatnonzero(within & (azimuths < 0)), np.flatnonzero(within & (azimuths > 0))]


def _add_lid_rims(mesh: Mesh, upper: np.ndarray, lower: np.ndarray) -> None:
    """The thickness of the lids: from their edges to just inside the eyeball."""
    rims = []
    for edge in (upper, lower):
        points = mesh.vertices[edge]
        center = EYE_CENTER * np.where(points[:, :1] > 0, (1, 1, 1), (-1, 1, 1))
        ray = points - center
        inward = center + ray * (EYE_RADIUS - 1.2) / np.linalg.norm(ray, axis=1, keepdims=True)
        rims.append(mesh.add(inward, Part.SKIN, 1.0, mesh.travel[edge]))
    mesh.add_quads(upper, rims[0])
    mesh.add_quads(rims[1], lower)


def _add_pocket(mesh: Mesh, upper: np.ndarray, lower: np.ndarray, rows: int) -> None:
    """The inside of the mouth: a roof from the upper lip and a floor from the lower, which meet at the back."""
    lips = mesh.vertices[upper]
    back = mesh.add(lips * (0.7, 1, 1) - (0, 2, POCKET_DEPTH), Part.POCKET, 0.0)
    sheets = []
    for edge, sign in ((upper, 1.0), (lower, -1.0)):
        sheet = [edge]
        for row in range(1, rows):
            depth = row / rows
            height = sign * POCKET_HEIGHT * np.sin(np.pi * depth**0.7) - 2 * depth
            offset = np.array((0, height, -POCKET_DEPTH * depth))
            sheet.append(mesh.add(lips * (1 - 0.3 * depth, 1, 1) + offset, Part.POCKET, sign))
        sheets.append([*sheet, back])
    for roof, deeper in itertools.pairwise(sheets[0]):
        mesh.add_quads(roof, deeper)
    for floor, deeper in itertools.pairwise(sheets[1]):
        mesh.add_quads(deeper, floor)
    # The cheeks: between roof and floor, from the corner of the mouth to the back.
    for end in (0, -1):
        roof, floor = (np.array([row[end] for row in sheet]) for sheet in sheets)
        quads = split_quads(roof[:-1], floor[:-1], floor[1:], roof[1:], np.ones(len(roof) - 1, bool))
        quads = quads if end == 0 else quads[..., ::-1]
        mesh.add_faces(quads[:-1, 1], quads[1:, 0])  # the sheets meet at both ends: a triangle less at each


def _add_teeth(mesh: Mesh, cells: int, strips: int, part: Part, arch: tuple[float, float, float, float, float]) -> None:
    """One arch of teeth as a parabola behind the lips, its root sunk into the roof or the floor of the pocket."""
    root, tip, front, half_width, recess = arch
    along = np.linspace(-1, 1, cells + 1)
    outer = np.stack((half_width * along, 0 * along, front - recess * along**2), 1)
    inner = outer * (1 - TOOTH_THICKNESS / half_width, 1, 1) - (0, 0, TOOTH_THICKNESS)
    rings = ((outer, root), (outer, tip), (inner, tip), (inner, root))[: strips + 1]
    rows = [mesh.add(ring + np.array((0, height, 0)), part) for ring, height in rings]
    for above, below in itertools.pairwise(rows if root > tip else rows[::-1]):
        mesh.add_quads(above, below)


def _add_tongue(mesh: Mesh, across: int, along: int) -> None:
    """The upper side of a tongue that lies in the lower teeth: a dome whose rim is sunk into the floor."""
    x = np.linspace(-1, 1, across + 1)
    t = np.linspace(0, 1, along + 1)[:, None]  # 0 at the root
    width = TONGUE_WIDTH * np.sqrt(1 - 0.75 * t**3)
    height = -50.0 + 7.0 * np.sin(np.pi * (0.1 + 0.8 * t)) - 10.0 * x**4 - 8.0 * t**6
    depth = TONGUE_LENGTH[0] + t * (TONGUE_LENGTH[1] - TONGUE_LENGTH[0] - 6.0 * x**2)
    points = np.stack(np.broadcast_arrays(width * x, height, depth), -1)
    rows = mesh.add(points, Part.TONGUE)
    for back, front in itertools.pairwise(rows):
        mesh.add_quads(back, front)


def _add_eyeball(mesh: Mesh, segments: int, angles: np.ndarray, mirror: int) -> None:
    """A sphere of rings around the gaze (+z), with a slightly bulging cornea."""
    part = Part.LEFT_EYE if mirror > 0 else Part.RIGHT_EYE
    around = 2 * np.pi * np.arange(segments) / segments
    polar = np.deg2rad(angles)[:, None]
    radius = EYE_RADIUS + 0.5 * np.clip(np.cos(polar * 90 / 35), 0, 1) * (polar < np.deg2rad(35))
    rings = np.stack((np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar) + 0 * around), -1)
    center = EYE_CENTER * (mirror, 1, 1)
    front = mesh.add(np.add(center, (0, 0, EYE_RADIUS + 0.5))[None], part)
    rings = mesh.add(center + radius[..., None] * rings, part)
    back = mesh.add((center - (0, 0, EYE_RADIUS))[None], part)
    mesh.iris[front] = True
    mesh.iris[rings[angles <= IRIS_ANGLE + 0.01]] = True
    _add_rings(mesh, front, rings, back, flip=False)


def _add_rings(mesh: Mesh, tip: np.ndarray, rings: np.ndarray, end: np.ndarray | None, flip: bool) -> None:
    """Close rings of indices (R, C), counter-clockwise around `tip` from outside, with a fan at the tip (and end)."""
    ring = np.concatenate((rings, rings[:, :1]), 1)
    start = len(mesh.faces)
    mesh.add_faces(np.stack((np.broadcast_to(tip, ring.shape[1] - 1), ring[0, :-1], ring[0, 1:]), 1))
    for inner, outer in itertools.pairwise(ring):
        mesh.add_quads(inner, outer)
    if end is not None:
        mesh.add_faces(np.stack((np.broadcast_to(end, ring.shape[1] - 1), ring[-1, 1:], ring[-1, :-1]), 1))
    if flip:
        mesh.faces[start:] = mesh.faces[start:, ::-1]


def _add_ear(mesh: Mesh, segments: int, front: int, back: int, mirror: int) -> None:
    """A shell: from the concha over antihelix and helix to the rim, and behind it back into the skull."""
    phi = 2 * np.pi * np.arange(segments) / segments  # 0 towards the back, counter-clockwise seen from outside: up next
    t = np.concatenate((np.arange(1, front + 1) / front, 1 + np.arange(1, back + 1) / back))[:, None]
    rearward = 0.5 + 0.5 * np.cos(phi - 0.5)  # the helix is highest behind and above, flat at the lobe and the cheek
    height = np.interp(t, (0, 0.25, 0.42, 0.56, 0.72, 0.88, 0.96, 1.0), (-3.5, -3.0, 1.5, 2.6, 0.4, 3.2, 3.0, 1.2))
    reach = np.interp(t, (0, 1, 1.25, 2), (0, 1, 0.97, 0.62))
    behind = np.interp(t, (1, 1.25, 2), (0, -2.2, -13.0))
    up = np.sin(phi) * np.where(np.sin(phi) > 0, 30.0, 31.0)
    rear = np.cos(phi) * (15.5 + 3.5 * np.sin(phi)) + 1.0
    center = np.array((-5.0, -2.0))  # the concha, (up, rear)
    a = center[0] + reach * (up - center[0])
    b = center[1] + reach * (rear - center[1])
    h = height * (0.25 + 0.75 * rearward) * (t <= 1) + (behind + 1.2 * (0.25 + 0.75 * rearward)) * (t > 1)
    flare, lean = np.deg2rad(27), np.deg2rad(12)
    rear_axis = np.array((np.sin(flare), 0, -np.cos(flare)))
    out_axis = np.array((np.cos(flare), 0, np.sin(flare)))
    up_axis = np.cos(lean) * np.array((0, 1, 0)) + np.sin(lean) * rear_axis
    rear_axis = np.cos(lean) * rear_axis - np.sin(lean) * np.array((0, 1, 0))

    def place(a: np.ndarray, b: np.ndarray, h: np.ndarray) -> np.ndarray:
        local = a[..., None] * up_axis + b[..., None] * rear_axis + h[..., None] * out_axis
        return (EAR_BASE + local) * (mirror, 1, 1)

    part = Part.LEFT_EAR if mirror > 0 else Part.RIGHT_EAR
    middle = mesh.add(place(*(np.array([value]) for value in (*center, -3.5))), part)
    rings = mesh.add(place(a, b, h), part)
    _add_rings(mesh, middle, rings, None, flip=mirror < 0)


def _split_edges(mesh: Mesh, missing: int) -> None:
    """Cut the longest edges of plain skin until `missing` faces are added: an inner edge gives two, a border edge 1."""
    inner: list[int] = []
    while missing > 0:
        edges = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
        unique, inverse, counts = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
        owners = np.argsort(inverse.ravel(), kind="stable") // 3
        first = np.concatenate(([0], np.cumsum(counts)[:-1]))
        plain = (mesh.part == Part.SKIN) & (mesh.travel == 0) & (mesh.vertices[:, 2] < 60)
        wanted = 1 if missing % 2 else 2
        length = np.linalg.norm(mesh.vertices[unique[:, 0]] - mesh.vertices[unique[:, 1]], axis=1)
        usable = plain[unique].all(1) & (counts == wanted)
        # Rounded, so that mirrored edges tie and the choice does not hang on the last bit.
        order = np.lexsort((np.arange(len(unique)), -np.round(length, 3)))
        touched: set[int] = set()
        for edge in order[usable[order]]:
            faces = owners[first[edge] : first[edge] + wanted]
            if touched.intersection(faces.tolist()):
                continue
            touched.update(faces.tolist())
            middle = mesh.vertices[unique[edge]].mean(0, keepdims=True)
            new = int(mesh.add(middle, Part.SKIN, mesh.side[unique[edge]].mean())[0])
            for face in faces:
                corners = mesh.faces[face]
                second = corners.copy()
                corners[corners == unique[edge, 1]] = new
                second[second == unique[edge, 0]] = new
                mesh.add_faces(second)
            missing -= wanted
            if wanted == 2:
                inner.append(new)
            if missing <= 0 or wanted == 1:
                break
    for _ in range(4):  # the new vertices go from the middle of their edge to the skin
        mesh.vertices[inner] -= skin_distance(mesh.vertices[inner])[:, None] * skin_normal(mesh.vertices[inner])
