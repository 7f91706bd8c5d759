"""The teeth that GaussianAvatars (Qian et al. 2024) and VHAP add to FLAME, which Gaussians inside the mouth are bound to.

8 rows of 15 vertices, three strips of faces for each jaw, placed between the ridges of the lips; they move with the neck joint or
the jaw and have the identity of the lips. The ridges are found on the mesh, so the teeth are close to those of GaussianAvatars' own
files; to get exactly those, give GaussianAvatars' lists of lip vertices as `lip_rings`.
"""

import numpy as np

from gaussian_tokenizer.heads.head_model import JOINTS
from gaussian_tokenizer.heads.rigging import strip_of_quads

RING = 15  # vertices of each row and of each lip ring
RECEDED = 3e-4  # meters behind the ridge, both lips together, that end the search


def add_teeth(arrays: dict[str, np.ndarray], lip_rings: tuple[np.ndarray, np.ndarray] | None, expressions: int) -> None:
    """Append 120 vertices and 168 faces to the arrays of a FLAME model, in place; rows in GaussianAvatars' order.

    `lip_rings` (15,) and (15,): vertices of the upper and the lower lip, both from one corner of the mouth to the other in the same
    direction; None finds them on the mesh. The last `expressions` shape directions do not move the teeth.
    """
    vertices = arrays["v_template"]
    upper, lower = find_lip_rings(vertices, arrays["f"]) if lip_rings is None else map(np.asarray, lip_rings)
    if upper.shape != (RING,) or lower.shape != (RING,):
        raise ValueError(f"lip rings of {upper.shape} and {lower.shape} vertices were given, expected ({RING},) each")
    distance = np.linalg.norm(vertices[upper] - vertices[lower], axis=1).mean()
    up, back = np.array((0, distance, 0)), np.array((0, 0, -distance))
    middle = (vertices[upper] + vertices[lower]) / 2
    middle[:, 1] = middle[:, 1].mean()
    middle += 1.5 * back
    upper_edge = middle + 0.1 * up
    lower_edge = middle - 0.1 * up + 0.4 * back
    upper_root, lower_root = upper_edge + 2 * up, lower_edge - 2 * up
    front = (upper_root, lower_root, upper_edge, lower_edge)
    # upper root, lower root, upper edge, lower edge; then behind them upper root, upper edge, lower root, lower edge
    rows = np.stack((*front, upper_root + back, upper_edge + back, lower_root + back, lower_edge + back))
    is_upper = np.array((1, 0, 1, 0, 1, 1, 0, 0), bool)

    start, count = len(vertices), rows.shape[0] * RING
    index = start + np.arange(count).reshape(len(rows), RING)
    # Seen from the front, left to right is from the subject's right (-x) to the left.
    seen = index[:, ::-1] if vertices[upper[0], 0] > vertices[upper[-1], 0] else index
    strips = [(0, 2), (5, 4), (2, 5), (3, 1), (6, 7), (7, 3)]  # (above, below) as seen from outside
    faces = np.concatenate([strip_of_quads(seen[above], seen[below]).reshape(-1, 3) for above, below in strips])

    lips = (arrays["shapedirs"][upper] + arrays["shapedirs"][lower]) / 2
    lips[:, :, lips.shape[2] - expressions :] = 0
    added = {
        "v_template": rows.reshape(-1, 3),
        "f": faces,
        "shapedirs": np.tile(lips, (len(rows), 1, 1)),
        "posedirs": np.zeros((count, *arrays["posedirs"].shape[1:])),
        "weights": np.eye(len(JOINTS))[np.where(is_upper, JOINTS.index("neck"), JOINTS.index("jaw")).repeat(RING)],
    }
    arrays |= {key: np.concatenate((arrays[key], value)) for key, value in added.items()}
    arrays["J_regressor"] = np.concatenate((arrays["J_regressor"], np.zeros((len(JOINTS), count))), axis=1)
    arrays["teeth"] = np.arange(start + count) >= start


def find_lip_rings(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ridges of the lips: 15 vertices of the upper and 15 of the lower, each from the subject's right to the left.

    The mouth is the most forward border of the mesh, vertices (V, 3) and faces (F, 3); its leftmost and rightmost vertices are the
    corners. From its upper and lower arc the search goes outward ring by ring; the ring that is furthest forward at the middle is
    the ridge. `ValueError` if a mesh has no such mouth.
    """
    upper_arc, lower_arc = _mouth_arcs(vertices, faces)
    neighbors = _neighbors(len(vertices), faces)
    heights = np.abs(vertices[:, 1] - vertices[upper_arc[[0, -1]], 1].mean())  # above or below the corners
    level = np.full(len(vertices), -1)
    arc_of = np.zeros(len(vertices))  # +1 reached from the upper arc, -1 from the lower, 0 from a corner
    ring = np.concatenate((upper_arc, lower_arc))
    level[ring] = 0
    arc_of[upper_arc[1:-1]], arc_of[lower_arc[1:-1]] = 1, -1
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for depth in range(1, 13):
        reached = sorted({n for vertex in ring for n in neighbors[vertex] if level[n] < 0})
        for vertex in reached:
            parents = [n for n in neighbors[vertex] if level[n] == depth - 1]
            nearest = np.linalg.norm(vertices[parents] - vertices[vertex], axis=1).argmin()
            arc_of[vertex] = arc_of[parents[nearest]]
        ring = np.array(reached, np.int64)
        level[ring] = depth
        lips = [ring[arc_of[ring] == side] for side in (1, -1)]
        if min(len(lip) for lip in lips) < RING:
            break
        upper, lower = (lip[np.argsort(vertices[lip, 0], kind="stable")] for lip in lips)
        forward = float(sum(vertices[lip[np.abs(vertices[lip, 0]).argmin()], 2] for lip in (upper, lower)))
        if best is None or forward > best[0]:
            best = forward, _pick(upper, heights), _pick(lower, heights)
        elif forward < best[0] - RECEDED:
            break
    if best is None:
        raise ValueError(f"the lips around the mouth have fewer than {RING} vertices in a ring")
    return best[1], best[2]


def _pick(ordered: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """15 of the vertices of a lip, in order: all but those at the corners of the mouth, or an even choice of many."""
    while RING < len(ordered) <= RING + 3:
        ordered = ordered[1:] if heights[ordered[0]] < heights[ordered[-1]] else ordered[:-1]
    return ordered[np.round(np.linspace(0, len(ordered) - 1, RING)).astype(np.int64)]


def _neighbors(count: int, faces: np.ndarray) -> list[list[int]]:
    sets: list[set[int]] = [set() for _ in range(count)]
    for a, b, c in faces.tolist():
        sets[a].update((b, c))
        sets[b].update((a, c))
        sets[c].update((a, b))
    return [sorted(one) for one in sets]


def _mouth_arcs(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower arc of the most forward border, both with the two corners at their ends."""
    directed = {(int(a), int(b)) for face in faces for a, b in zip(face, np.roll(face, -1), strict=True)}
    follows = {a: b for a, b in directed if (b, a) not in directed}
    loops: list[np.ndarray] = []
    while follows:
        border = [min(follows)]
        while (following := follows.pop(border[-1], None)) is not None and following != border[0]:
            border.append(following)
        if len(border) >= 2 * RING:
            loops.append(np.array(border))
    if len(loops) < 2:
        raise ValueError(f"found {len(loops)} borders of {2 * RING} or more edges, expected the mouth and the neck")
    loop = max(loops, key=lambda one: float(vertices[one, 2].mean()))
    right, left = int(vertices[loop, 0].argmin()), int(vertices[loop, 0].argmax())
    loop = np.roll(loop, -right)
    split = (left - right) % len(loop)
    arcs = [loop[: split + 1], np.append(loop[split:], loop[0])]
    arcs.sort(key=lambda arc: float(vertices[arc, 1].mean()))
    return arcs[1], arcs[0]
