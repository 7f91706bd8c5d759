"""ICT-FaceKit (the ICT Face Model Light: MIT license, made from scans) as a head model.

Upstream is a folder of OBJ files of one topology: a neutral head, identities, expressions. It has no rig: joints and skinning
weights are made here. Paper: Li et al., "Learning Formation of Physically-Based Face Attributes", CVPR 2020.
"""

import re
from pathlib import Path

import numpy as np

from gaussian_tokenizer.heads import rigging
from gaussian_tokenizer.heads.head_model import JOINTS, HeadModel
from gaussian_tokenizer.utils.json_files import read_json

NEUTRAL, INDICES = "generic_neutral_mesh.obj", "vertex_indices.json"
N_VERTICES, N_FACES = 26_719, 26_384
# Faces and vertices of the parts, from the upstream documentation.
SKIN, SOCKETS, GUMS_AND_TEETH, EYEBALLS = np.split(np.arange(24_692), (11_144, 14_034, 21_496))
SKIN_VERTICES, MOUTH_VERTICES = slice(0, 11_248), (slice(11_248, 13_294), slice(14_062, 21_451))
EYE_VERTICES = {"left_eye": slice(21_451, 23_021), "right_eye": slice(23_021, 24_591)}
SCLERA_VERTICES = {"left_eye": slice(21_451, 22_221), "right_eye": slice(23_021, 23_791)}
IRIS_VERTICES = (slice(22_221, 23_021), slice(23_791, 24_591))
UPPER_TEETH, LOWER_TEETH = slice(17_039, 19_247), slice(19_247, 21_451)
IRIS_RADIUS = 0.0062  # meters
# Measured on the neutral, in centimeters: the axis the lower teeth turn about in jawOpen, and by how much.
JAW_HINGE, JAW_OPEN_DEGREES = np.array((0.0, -0.55, 1.82)), 25.3
NECK, ROOT = np.array((0.0, -9.5, -0.8)), np.array((0.0, -15.5, -1.6))


def read_ict(folder: str | Path, teeth: bool = False) -> HeadModel:
    """The upstream folder, or its `FaceXModel`, -> `HeadModel` with the identities and expressions that have a file.

    Centimeters become meters. Kept are skin, eye and mouth sockets and eyeballs (34,332 triangles), with `teeth` gums, tongue and
    teeth as well; not eyelashes and the films around the eyes.
    """
    folder = Path(folder)
    if (folder / "FaceXModel" / NEUTRAL).is_file():
        folder = folder / "FaceXModel"
    elif not (folder / NEUTRAL).is_file():
        raise FileNotFoundError(f"{folder}: no {NEUTRAL} here or in FaceXModel; expected an ICT-FaceKit folder")
    neutral, faces = _read_neutral(folder / NEUTRAL)
    names, landmark_vertices = _read_indices(folder / INDICES)
    identities = sorted(path.stem for path in folder.glob("identity*.obj") if re.fullmatch(r"identity\d+", path.stem))
    expressions = [name for name in names if (folder / f"{name}.obj").is_file()]
    if "jawOpen" not in expressions:
        raise FileNotFoundError(f"{folder}: lacks jawOpen.obj, from which the weights of the jaw are made")
    shape_dirs = _differences(folder, identities, neutral)
    expression_dirs = _differences(folder, expressions, neutral)

    parts = (SKIN, SOCKETS, EYEBALLS, GUMS_AND_TEETH) if teeth else (SKIN, SOCKETS, EYEBALLS)
    triangles = _triangulate(faces[np.concatenate(parts)], neutral)
    kept, triangles = np.unique(triangles, return_inverse=True)
    triangles = triangles.reshape(-1, 3)

    centers = {name: _sphere_center(neutral[vertices]) for name, vertices in SCLERA_VERTICES.items()}
    origin = (centers["left_eye"] + centers["right_eye"]) / 2 - 100 * rigging.BETWEEN_EYES
    weights = _skinning_weights(neutral, expression_dirs[:, :, expressions.index("jawOpen")])
    new_index = np.full(N_VERTICES, -1)
    new_index[kept] = np.arange(len(kept))
    landmarks = new_index[landmark_vertices]
    if (landmarks < 0).any():
        raise ValueError(f"{folder / INDICES}: a landmark lies on a part that is not kept")
    regions = _regions((neutral - origin) / 100, landmark_vertices)
    return rigging.build_head(
        "ict-facekit",
        triangles,
        expressions,
        rigging.points_at_vertices(triangles, landmarks),
        {name: mask[kept] for name, mask in regions.items()},
        template=(neutral[kept] - origin) / 100,
        shape_dirs=shape_dirs[kept] / 100,
        expression_dirs=expression_dirs[kept] / 100,
        pose_dirs=np.zeros((len(kept), 3, 9 * (len(JOINTS) - 1))),
        joint_regressor=_joint_regressor(neutral[kept], kept, centers),
        skinning_weights=weights[kept],
    )


def read_obj(path: Path, with_faces: bool = True) -> tuple[np.ndarray, list[list[int]]]:
    """Positions (V, 3) float64 and the faces, 0-based vertex indices, of an OBJ file; everything else is skipped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an ICT-FaceKit folder with {NEUTRAL} in FaceXModel")
    lines = path.read_bytes().split(b"\n")
    values = b" ".join(line[2:] for line in lines if line.startswith(b"v ")).split()
    try:
        vertices = np.array(values, np.float64).reshape(-1, 3)
        corners = [line.split()[1:] for line in lines if with_faces and line.startswith(b"f ")]
        faces = [[int(corner.partition(b"/")[0]) - 1 for corner in face] for face in corners]
    except ValueError as error:
        raise ValueError(f"{path}: not a readable OBJ file: {error}") from error
    if not np.isfinite(vertices).all():
        raise ValueError(f"{path}: vertex {int(np.argwhere(~np.isfinite(vertices))[0, 0])} is not finite")
    for index, face in enumerate(faces):
        if len(face) not in (3, 4) or min(face) < 0 or max(face) >= len(vertices):
            raise ValueError(f"{path}: face {index} is {face}, expected 3 or 4 of the {len(vertices)} vertices")
    return vertices, faces


def _read_neutral(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Positions (V, 3) and faces (F, 4); a triangle repeats its last vertex."""
    vertices, faces = read_obj(path)
    if (len(vertices), len(faces)) != (N_VERTICES, N_FACES):
        found = f"{len(vertices)} vertices and {len(faces)} faces"
        raise ValueError(f"{path}: {found}, expected the {N_VERTICES} and {N_FACES} of the ICT Face Model Light")
    return vertices, np.array([face if len(face) == 4 else [*face, face[-1]] for face in faces])


def _read_indices(path: Path) -> tuple[list[str], np.ndarray]:
    """Names of the expressions, and the vertices (68,) of the landmarks."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds the names of the expressions and the landmarks")
    try:
        content = read_json(path)
        expressions = [str(name) for name in content["expressions"]]
        landmarks = np.array(content["idx_to_landmark_verts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the index file of ICT-FaceKit: {error!r}") from error
    plain = all(re.fullmatch(r"\w+", name) for name in expressions)
    if not plain or landmarks.shape != (68,) or landmarks.dtype.kind != "i" or not (landmarks < N_VERTICES).all():
        raise ValueError(f"{path}: expected names in expressions and 68 vertices in idx_to_landmark_verts")
    return expressions, landmarks


def _differences(folder: Path, names: list[str], neutral: np.ndarray) -> np.ndarray:
    """(V, 3, len(names)) centimeters."""
    dirs = np.zeros((*neutral.shape, len(names)))
    for index, name in enumerate(names):
        path = folder / f"{name}.obj"
        vertices, _ = read_obj(path, with_faces=False)
        if vertices.shape != neutral.shape:
            raise ValueError(f"{path}: {len(vertices)} vertices, expected {len(neutral)} as in {NEUTRAL}")
        dirs[:, :, index] = vertices - neutral
    return dirs


def _triangulate(quads: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """(F, 4) -> triangles, each quad cut along its shorter diagonal; a repeated last corner means a triangle."""
    a, b, c, d = quads.T
    across = np.linalg.norm(vertices[a] - vertices[c], axis=1), np.linalg.norm(vertices[b] - vertices[d], axis=1)
    both = rigging.split_quads(a, b, c, d, (across[0] <= across[1] + 1e-6) | (c == d)).reshape(-1, 3)
    return both[(both[:, 1] != both[:, 2])]


def _sphere_center(points: np.ndarray) -> np.ndarray:
    """Least-squares center of a sphere through points (N, 3)."""
    system = np.concatenate((2 * points, np.ones((len(points), 1))), axis=1)
    return np.linalg.lstsq(system, (points**2).sum(1), rcond=None)[0][:3]


def _skinning_weights(neutral: np.ndarray, jaw_open: np.ndarray) -> np.ndarray:
    """(V, 5); how much each vertex turns with the jaw is measured on the jawOpen shape."""
    weights = np.zeros((len(neutral), len(JOINTS)))
    weights[:, 0] = 1 - rigging.smoothstep((neutral[:, 1] + 15.5) / 6.0)
    angle = np.deg2rad(JAW_OPEN_DEGREES)
    arm = (neutral - JAW_HINGE)[:, 1:]
    turned = arm @ np.array(((np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle)))) - arm  # about +x
    # The part of the shape that lies along the turn; damped (by 3 mm) where the turn itself hardly moves anything.
    share = (jaw_open[:, 1:] * turned).sum(1) / ((turned**2).sum(1) + 0.09)
    weights[:, 2] = rigging.smoothstep(1.05 * np.clip(share, 0, 1)) * (1 - weights[:, 0])
    weights[UPPER_TEETH], weights[LOWER_TEETH] = np.eye(5)[1], np.eye(5)[2]
    for name, vertices in EYE_VERTICES.items():
        weights[vertices] = np.eye(5)[JOINTS.index(name)]
    weights[:, 1] = 1 - weights[:, [0, 2, 3, 4]].sum(1)
    return weights


def _joint_regressor(vertices: np.ndarray, kept: np.ndarray, centers: dict[str, np.ndarray]) -> np.ndarray:
    skin, (_, y, z) = kept < SKIN_VERTICES.stop, vertices.T
    joints = {
        "root": (ROOT, skin & (y < -13)),
        "neck": (NECK, skin & (y > -12.5) & (y < -7) & (z < 6.5)),
        "jaw": (JAW_HINGE, skin & (np.abs(y - JAW_HINGE[1]) < 3) & (z < 7)),
    }
    for name, sclera in SCLERA_VERTICES.items():
        joints[name] = centers[name], (kept >= sclera.start) & (kept < sclera.stop)
    return rigging.fit_joint_regressor(vertices, joints)


def _regions(points: np.ndarray, landmarks: np.ndarray) -> dict[str, np.ndarray]:
    """Names -> (V,) bool, from the parts, the landmarks and the lines of `rigging`; `points` in meters."""

    def vertices(*parts: slice) -> np.ndarray:
        return np.isin(np.arange(len(points)), np.r_[parts])

    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    marks = points[landmarks]
    skin = vertices(SKIN_VERTICES)
    front = skin & (z > 0.055)
    # The ear stands out from the side of the head, behind the jaw and below the height of the brows.
    ears = skin & (x > np.interp(y, (-0.035, -0.020, 0.0, 0.03), (0.0685, 0.074, 0.0775, 0.0795)))
    ears &= (y > -0.036) & (y < 0.034) & (z < 0.012) & (z > -0.055)
    lips = _in_polygon(points, marks[48:60]) | (_distance_to_line(points, marks[[*range(48, 60), 48]]) < 0.0015)
    lips &= front
    brows = front & (np.minimum(*(_distance_to_line(points, marks[a:b]) for a, b in ((17, 22), (22, 27)))) < 0.005)
    half_width = np.interp(y, (marks[33, 1], marks[30, 1], marks[28, 1], marks[27, 1]), (0.018, 0.018, 0.010, 0.008))
    nose = front & (x < half_width) & (y > marks[33, 1] - 0.002) & (y < marks[27, 1] + 0.002)
    eye_centers = rigging.BETWEEN_EYES + np.stack((np.where(points[:, 0] < 0, -0.031, 0.031), 0 * x, 0 * x), 1)
    eyelids = front & (np.linalg.norm(points - eye_centers, axis=1) < 0.0195)
    scalp = skin & rigging.above_hairline(points) & ~ears
    neck = skin & rigging.below_jaw(points) & ~ears
    face = skin & ~scalp & ~neck & ~ears & (z > 0.005)
    return {
        "face": face,
        "scalp": scalp,
        "beard": face & rigging.in_beard(points) & ~lips & ~nose,
        "brows": brows,
        "lips": lips,
        "eyelids": eyelids,
        "eyes": vertices(*EYE_VERTICES.values()),
        "iris": _seen_iris(points),
        "ears": ears,
        "nose": nose,
        "neck": neck,
        "mouth_interior": vertices(*MOUTH_VERTICES),
    }


def _seen_iris(points: np.ndarray) -> np.ndarray:
    """(V,) bool: the iris of each eye and the clear cornea in front of it, which is part of the sclera's mesh."""
    seen = np.zeros(len(points), bool)
    for eye, iris in zip(EYE_VERTICES.values(), IRIS_VERTICES, strict=True):
        middle = points[eye].mean(0)
        gaze = points[iris].mean(0) - middle
        gaze /= np.linalg.norm(gaze)
        forward = (points[eye] - middle) @ gaze
        aside = np.linalg.norm(points[eye] - middle - forward[:, None] * gaze, axis=1)
        seen[eye] = (forward > 0) & (aside < IRIS_RADIUS)
    return seen


def _in_polygon(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """(V,) bool: inside a polygon seen from the front, by the number of edges to the right of the point."""
    inside = np.zeros(len(points), bool)
    for (ax, ay, _), (bx, by, _) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if ay == by:
            continue
        crosses = (ay > points[:, 1]) != (by > points[:, 1])
        inside ^= crosses & (points[:, 0] < ax + (points[:, 1] - ay) * (bx - ax) / (by - ay))
    return inside


def _distance_to_line(points: np.ndarray, line: np.ndarray) -> np.ndarray:
    """(V,) distance to a line of segments, seen from the front."""
    distances = []
    for start, end in zip(line[:-1, :2], line[1:, :2], strict=True):
        axis = end - start
        along = np.clip((points[:, :2] - start) @ axis / (axis @ axis), 0, 1)
        distances.append(np.linalg.norm(points[:, :2] - start - along[:, None] * axis, axis=1))
    return np.min(distances, axis=0)
