"""The skin of the procedural head as an implicit surface: smooth unions of ellipsoids and cones.

Millimeters, x to the subject's left, y up, z forward; the proportions of an average adult. Method: distance functions
and polynomial smooth minimum after I. Quilez.
"""

import numpy as np

EYE_CENTER = np.array([31.0, 22.0, 70.0])  # of the left eye; the right one is its mirror image
EYE_RADIUS = 12.2
LID_RADIUS = 14.0


def skin_distance(points: np.ndarray) -> np.ndarray:
    """points (..., 3) -> (...) distance to the skin in millimeters, negative inside (a lower bound outside)."""
    p = points
    m = p.copy()  # paired features are modelled on the left (x > 0) and mirrored
    m[..., 0] = np.sqrt(p[..., 0] ** 2 + 0.25)

    head = _ellipsoid(p, (0, 48, -8), (75, 82, 95))  # cranium
    head = _join(head, _ellipsoid(p, (0, 58, 22), (62, 52, 65)), 20)  # forehead
    head = _join(head, _ellipsoid(p, (0, -14, 26), (58, 82, 62)), 24)  # face
    head = _join(head, _ellipsoid(m, (42, -4, 53), (21, 17, 24)), 26)  # cheekbones
    head = _carve(head, _ellipsoid(m, (76, 28, 50), (12, 24, 22)), 18)  # temples
    head = _join(head, _cone(m, (54, -4, 0), (44, -50, 12), 12, 10), 22)  # rami of the jaw
    head = _join(head, _cone(m, (44, -50, 12), (12, -80, 75), 10, 11), 22)  # jaw
    head = _join(head, _ellipsoid(m, (35, -28, 49), (19, 30, 26)), 24)  # cheeks
    chin = _join(_ellipsoid(p, (0, -79, 81), (17, 13, 13)), _ellipsoid(m, (9, -82, 79), (10, 9, 10)), 8)
    head = _join(head, chin, 14)
    head = _join(head, _ellipsoid(p, (0, -42, 68), (30, 28, 28)), 16)  # muzzle
    head = _join(head, _neck(p, m), 22)

    brow = _bent_cone(m, ((9, 38, 82), (28, 42.5, 80), (47, 38, 65)), (6.5, 6.5, 5.5), 5)
    head = _join(head, brow, 10)
    head = _carve(head, _ellipsoid(m, (31, 21, 93), (19, 13, 15)), 9)  # eye sockets
    head = _carve(head, _ellipsoid(m, (15, 20, 92), (6, 10, 8)), 6)  # beside the bridge of the nose
    head = _join(head, np.linalg.norm(m - EYE_CENTER, axis=-1) - LID_RADIUS, 3.5)  # eyelids
    head = _join(head, _cone(m, (21, 9, 80), (42, 11, 75), 3, 2.5), 7)  # pouches below the eyes
    head = _join(head, _nose(p, m), 6)
    head = _carve(head, _ellipsoid(m, (5.6, -28, 104), (2.8, 3.0, 4.6)), 2)  # nostrils
    head = _carve(head, _cone(m, (20, -25, 98), (31, -44, 92), 1.5, 1.5), 7)  # folds from nose to mouth
    return _mouth(head, p, m)


def cast(origins: np.ndarray, directions: np.ndarray, reach: float = 230.0) -> np.ndarray:
    """Where rays (N, 3) from inside the head leave it for the last time: (N, 3), found by marching in from outside."""
    distance = np.full(len(origins), reach)
    moving = np.arange(len(origins))
    for _ in range(110):
        step = 0.75 * skin_distance(origins[moving] + distance[moving, None] * directions[moving])
        distance[moving] -= step
        moving = moving[np.abs(step) > 1e-6]
    return origins + distance[:, None] * directions


def skin_normal(points: np.ndarray) -> np.ndarray:
    """points (N, 3) -> (N, 3) unit outward normals by central differences."""
    steps = 0.5 * np.eye(3)
    gradient = np.stack([skin_distance(points + step) - skin_distance(points - step) for step in steps], -1)
    return gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)


def _neck(p: np.ndarray, m: np.ndarray) -> np.ndarray:
    neck = _cone(p / (0.94, 1, 1), (0, -40, -12), (0, -172, -22), 47, 51)
    neck = _join(neck, _cone(m, (54, -34, -22), (15, -168, 27), 8, 7), 12)  # muscles from ear to breastbone
    neck = _join(neck, _cone(m, (20, -20, -52), (38, -190, -50), 14, 26), 26)  # trapezius
    return _join(neck, _ellipsoid(p, (0, -120, 30), (9, 12, 8)), 12)  # larynx


def _nose(p: np.ndarray, m: np.ndarray) -> np.ndarray:
    bridge = _bent_cone(p, ((0, 22, 81), (0, 2, 93), (0, -15, 104)), (5.5, 5.8, 7), 6)
    nose = _join(bridge, _cone(m, (4, 12, 80), (7.5, -18, 93), 5, 6.5), 9)  # sides
    nose = _join(nose, _ellipsoid(p, (0, -17, 106), (9, 8.2, 9.2)), 7)  # tip
    nose = _join(nose, _ellipsoid(m, (11.5, -21.5, 97), (6.2, 6.8, 10)), 5)  # wings
    return _join(nose, _cone(p, (0, -24, 108), (0, -28.5, 96), 3.2, 3.6), 4)  # septum


def _mouth(head: np.ndarray, p: np.ndarray, m: np.ndarray) -> np.ndarray:
    head = _carve(head, _cone(p, (0, -31, 103), (0, -37, 103), 2.0, 2.4), 3)  # philtrum
    # Each lip is a roll that thins and recedes towards the corner of the mouth.
    upper = _bent_cone(m, ((3.4, -42.6, 94.2), (11, -43.4, 91.8), (25, -47, 81)), (5.0, 4.4, 2), 4)
    lower = _bent_cone(m, ((0, -53.2, 92.3), (11, -52.4, 90.0), (25, -47.5, 81)), (5.8, 5.0, 2), 4)
    head = _join(_join(head, upper, 4), lower, 4)
    head = _carve(head, _cone(m, (0, -63, 96.5), (10, -62.5, 93), 3.5, 3), 6)  # groove above the chin
    line = _bent_cone(m, ((0, -47.6, 99), (12, -47.6, 96), (26, -47.4, 85)), (0.7, 0.7, 0.7), 1)
    return _carve(head, line, 3)


def _ellipsoid(p: np.ndarray, center: tuple, radii: tuple) -> np.ndarray:
    q = p - np.array(center, float)
    size = np.array(radii, float)
    near = np.linalg.norm(q / size, axis=-1)
    return near * (near - 1) / np.maximum(np.linalg.norm(q / size**2, axis=-1), 1e-9)


def _cone(p: np.ndarray, start: tuple, end: tuple, start_radius: float, end_radius: float) -> np.ndarray:
    """Distance to a ball that moves from `start` to `end` while its radius changes evenly."""
    arm, axis = p - np.array(start, float), np.subtract(end, start).astype(float)
    along = np.clip((arm @ axis) / (axis @ axis), 0, 1)
    distance = np.linalg.norm(arm - along[..., None] * axis, axis=-1)
    return distance - (start_radius + along * (end_radius - start_radius))


def _bent_cone(p: np.ndarray, points: tuple, radii: tuple, blend: float) -> np.ndarray:
    """Two cones from the first of three points over the second to the third."""
    first, second = (_cone(p, *points[i : i + 2], *radii[i : i + 2]) for i in range(2))
    return _join(first, second, blend)


def _join(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    """Smooth union: the surfaces flow into each other within `blend` millimeters."""
    overlap = np.maximum(blend - np.abs(a - b), 0) / blend
    return np.minimum(a, b) - overlap * overlap * blend / 4


def _carve(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    """Smooth difference: `a` without `b`."""
    return -_join(-a, b, blend)
