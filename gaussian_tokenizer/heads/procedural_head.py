"""The built-in head model, without download or license, at any number of faces from 600 to 40,000.

All of it is our own modeling: no scan and no other model went into it. Every machine gets the same bytes. One unit of an
identity direction is one standard deviation of a varied crowd, one unit of an expression is the full expression.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from gaussian_tokenizer.geometry.triangles import closest_point_barycentrics
from gaussian_tokenizer.heads import rigging
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.procedural_mesh import Mesh, Part, build_mesh
from gaussian_tokenizer.heads.procedural_surface import EYE_CENTER, skin_distance, skin_normal

EYES, EARS = (Part.LEFT_EYE, Part.RIGHT_EYE), (Part.LEFT_EAR, Part.RIGHT_EAR)
TEETH = (Part.UPPER_TEETH, Part.LOWER_TEETH)
MOUTH_PARTS = (Part.POCKET, *TEETH, Part.TONGUE)
HARD_PARTS = (*EYES, *TEETH, Part.TONGUE)  # moved by the joints only, not by expressions of the skin around
JOINT_POSITIONS = {  # millimeters
    "root": (0.0, -150.0, -22.0),
    "neck": (0.0, -88.0, -18.0),
    "jaw": (0.0, -12.0, 10.0),
    "left_eye": tuple(EYE_CENTER),
    "right_eye": tuple(EYE_CENTER * (-1, 1, 1)),
}
JAW_DROP_DEGREES = 20.0
LIP_LINE = (-47.0, 88.0)  # (y, z)


class Move(NamedTuple):
    """A smooth local displacement in millimeters: exp(-|(p - center) / radii|^4) * (shift + scale * (p - center)).

    A `center` with x > 0 is mirrored to the other side unless `one_side`.
    """

    center: tuple[float, float, float]
    radii: tuple[float, float, float]
    shift: tuple[float, float, float] = (0, 0, 0)
    scale: tuple[float, float, float] = (0, 0, 0)
    one_side: bool = False


WIDE = 1e6
# Directions without moves are computed in `_identity` and `_expression`.
IDENTITY: dict[str, tuple[Move, ...]] = {
    "head_size": (Move((0, 0, 0), (WIDE, WIDE, WIDE), scale=(0.035, 0.035, 0.035)),),
    "head_width": (Move((0, 20, 0), (WIDE, 120, WIDE), scale=(0.045, 0, 0)),),
    "skull_height": (Move((0, 140, -10), (WIDE, 110, WIDE), (0, 7, 0)),),
    "skull_depth": (Move((0, 40, -105), (WIDE, 90, 100), (0, 0, -6.5)),),
    "forehead_slope": (Move((0, 95, 75), (75, 48, 70), (0, 0, -5.5)),),
    "brow_ridge": (Move((24, 39, 86), (24, 11, 20), (0, -0.8, 2.8)), Move((0, 36, 88), (12, 10, 20), (0, 0, 1.2))),
    "eye_distance": (Move((31, 22, 74), (22, 22, 30), (1.9, 0, 0)),),
    "eye_size": (Move((31, 22, 70), (23, 21, 24), scale=(0.07, 0.085, 0.06)),),
    "eye_height": (Move((31, 24, 76), (26, 26, 34), (0, 2.0, 0)),),
    "nose_length": (Move((0, -23, 106), (21, 17, 26), (0, -3.6, 0.6)),),
    "nose_width": (Move((12, -21, 97), (12, 14, 18), (2.2, 0, 0)),),
    "nose_bridge": (Move((0, 4, 98), (11, 17, 20), (0, 0, 3.4)),),
    "nose_tip": (Move((0, -18, 110), (14, 11, 15), (0, 1.4, 3.4)),),
    "cheekbones": (Move((56, -2, 46), (24, 20, 34), (3.6, 0, 1.2)),),
    "cheek_fullness": (Move((46, -34, 58), (24, 24, 34), (3.8, 0, 2.6)),),
    "jaw_width": (Move((50, -54, 18), (34, 32, 50), (4.8, 0, 0)),),
    "chin_length": (Move((0, -88, 78), (48, 28, 52), (0, -5.0, 0)),),
    "chin_forward": (Move((0, -80, 92), (26, 18, 34), (0, 0, 4.5)),),
    "mouth_width": (Move((24, -47, 88), (14, 13, 20), (2.6, 0, -0.8)),),
    "mouth_height": (Move((0, -47, 92), (34, 15, 40), (0, 2.2, 0)),),
    "lip_thickness": (
        Move((0, -41.5, 97), (21, 4.6, 16), (0, 1.5, 1.6)),
        Move((0, -54.0, 96), (20, 5.4, 16), (0, -1.7, 1.9)),
    ),
    "neck_width": (Move((0, -150, -18), (WIDE, 66, WIDE), scale=(0.085, 0, 0.06)),),
    "asymmetry": (
        Move((0, -20, 105), (20, 26, 30), (1.6, 0, 0)),
        Move((0, -70, 84), (44, 36, 50), (1.6, 0, 0)),
        Move((31, 22, 76), (24, 22, 30), (0, 0.9, 0), one_side=True),
    ),
    **dict.fromkeys(("ear_size", "ear_protrusion"), ()),
}
MOUTH_CORNER, CORNER_RADII = (25.0, -47.0, 87.0), (17.0, 14.0, 22.0)
RIGHT_CORNER = (-25.0, -47.0, 87.0)
EXPRESSIONS: dict[str, tuple[Move, ...]] = {
    **dict.fromkeys(("jaw_drop", "lips_part", "lids_close_left", "lids_close_right", "lids_widen"), ()),
    "smile_left": (
        Move(MOUTH_CORNER, CORNER_RADII, (6, 7, -4), one_side=True),
        Move((36, -16, 78), (19, 17, 24), (1.5, 4, 2.5), one_side=True),
    ),
    "smile_right": (
        Move(RIGHT_CORNER, CORNER_RADII, (-6, 7, -4), one_side=True),
        Move((-36, -16, 78), (19, 17, 24), (-1.5, 4, 2.5), one_side=True),
    ),
    "frown": (Move(MOUTH_CORNER, CORNER_RADII, (0.5, -7, -1)), Move((0, -60, 92), (16, 9, 20), (0, 2, 1.5))),
    "mouth_wide": (Move(MOUTH_CORNER, (20, 18, 26), (6.5, -1, -3)),),
    "pucker": (Move(MOUTH_CORNER, (14, 14, 22), (-8.5, 0, 4)), Move((0, -47, 96), (19, 14, 26), (0, 0, 6))),
    "mouth_left": (Move((0, -48, 92), (36, 18, 40), (6, 0, 0)),),
    "mouth_right": (Move((0, -48, 92), (36, 18, 40), (-6, 0, 0)),),
    "cheek_puff": (Move((46, -38, 62), (24, 20, 34), (7.5, 0, 4)),),
    "nose_wrinkle": (
        Move((12, -18, 98), (13, 15, 20), (0.8, 3.8, 0.5)),
        Move((12, 34, 88), (13, 10, 20), (-1, -3, 0.6)),
    ),
    "brows_up_left": (Move((30, 44, 82), (26, 16, 34), (0, 6.5, 0.6), one_side=True),),
    "brows_up_right": (Move((-30, 44, 82), (26, 16, 34), (0, 6.5, 0.6), one_side=True),),
    "brows_inner_up": (Move((0, 44, 90), (22, 15, 26), (0, 6, 0)),),
    "brows_down": (Move((18, 38, 86), (22, 11, 26), (-2.5, -5, 1)),),
}
UPPER_ROLL, LOWER_ROLL = ((0.0, -43.0, 96.0), (22.0, 10.0, 28.0)), ((0.0, -53.0, 94.0), (24.0, 14.0, 28.0))
LOWER_LIP = (*range(55, 60), *range(65, 68))  # of the landmarks
ON_CUTS = (*range(36, 49), 54, *range(60, 68))  # the landmarks on the edges of lids and lips


@functools.lru_cache(maxsize=8)
def build_procedural_head(n_faces: int = 10144) -> HeadModel:
    """The procedural head with exactly `n_faces` faces; `ValueError` outside what the topology can do."""
    mesh = build_mesh(n_faces)
    weights = _skinning_weights(mesh)
    shape_dirs = np.stack([_identity(mesh, name, moves) for name, moves in IDENTITY.items()], -1)
    expression_dirs = np.stack([_expression(mesh, weights, name, moves) for name, moves in EXPRESSIONS.items()], -1)
    return rigging.build_head(
        "procedural" if n_faces == 10144 else f"procedural:{n_faces}",
        mesh.faces,
        list(EXPRESSIONS),
        _landmark_points(mesh),
        _regions(mesh),
        template=mesh.vertices / 1000,
        shape_dirs=shape_dirs / 1000,
        expression_dirs=expression_dirs / 1000,
        pose_dirs=_pose_correctives(mesh) / 1000,
        joint_regressor=_joint_regressor(mesh),
        skinning_weights=weights,
    )


def _flat_bump(p: np.ndarray, center: tuple, radii: tuple) -> np.ndarray:
    squared = (((p - center) / radii) ** 2).sum(-1)
    return np.exp(-(squared**2))


def _displacement(p: np.ndarray, moves: tuple[Move, ...]) -> np.ndarray:
    """(V, 3) sum of moves at points (V, 3)."""
    total = np.zeros_like(p)
    for move in moves:
        mirrored = move.center[0] > 0 and not move.one_side
        for flip in ((1, 1, 1), (-1, 1, 1)) if mirrored else ((1, 1, 1),):
            center = np.multiply(move.center, flip)
            field = np.multiply(move.shift, flip) + np.multiply(move.scale, p - center)
            total += _flat_bump(p, tuple(center), move.radii)[:, None] * field
    return total


def _eye_centers(p: np.ndarray) -> np.ndarray:
    return EYE_CENTER * np.where(p[:, :1] >= 0, (1, 1, 1), (-1, 1, 1))


def _identity(mesh: Mesh, name: str, moves: tuple[Move, ...]) -> np.ndarray:
    p = mesh.vertices
    ear = mesh.of(*EARS)
    base = np.where(p[:, :1] >= 0, (73.0, 0.0, -4.0), (-73.0, 0.0, -4.0))
    if name == "ear_size":
        return ear[:, None] * 0.11 * (p - base)
    if name == "ear_protrusion":
        rearward = np.clip(4 - p[:, 2], 0, None)
        return ear[:, None] * np.stack((0.3 * rearward * np.sign(p[:, 0]), 0 * rearward, 0.08 * rearward), -1)
    if name == "eye_size":
        return _displacement(p, moves) * ~ear[:, None]
    # What is inside the mouth moves with the lips in front of it.
    p = np.where(mesh.of(*MOUTH_PARTS)[:, None], np.stack((p[:, 0], *(0 * p[:, :2] + LIP_LINE).T), 1), p)
    # Eyeballs and ears move rigidly, and the lids nearly as the eyeballs do, so that neither cuts through the other.
    centers = _eye_centers(p)
    along = np.where(mesh.of(*EYES), 1.0, 0.95 * np.exp(-((np.linalg.norm(p - centers, axis=1) / 21) ** 6)))[:, None]
    at = np.where(ear[:, None], base + 0.15 * (p - base), p + along * (centers - p))
    return _displacement(at, moves)


def _expression(mesh: Mesh, weights: np.ndarray, name: str, moves: tuple[Move, ...]) -> np.ndarray:
    p = mesh.vertices
    if name == "jaw_drop":
        angle = np.deg2rad(JAW_DROP_DEGREES)
        x, y, z = (p - JOINT_POSITIONS["jaw"]).T
        turned_y, turned_z = np.cos(angle) * y - np.sin(angle) * z, np.sin(angle) * y + np.cos(angle) * z
        return weights[:, 2:3] * np.stack((0 * x, turned_y - y, turned_z - z), -1)
    if name == "lips_part":
        up = _flat_bump(p, *UPPER_ROLL) * (mesh.side > 0) * weights[:, 1]
        down = _flat_bump(p, *LOWER_ROLL) * weights[:, 2] * ~mesh.of(*HARD_PARTS)
        return up[:, None] * np.array((0, 3.5, 0.8)) + down[:, None] * np.array((0, -5.0, 0.5))
    if name.startswith("lids"):
        on_side = {"lids_close_left": p[:, 0] > 0, "lids_close_right": p[:, 0] < 0, "lids_widen": True}[name]
        return _lid_motion(mesh, mesh.travel * on_side * (-0.3 if name == "lids_widen" else 1.0))
    return _displacement(p, moves) * ~mesh.of(*HARD_PARTS)[:, None]


def _lid_motion(mesh: Mesh, travel: np.ndarray) -> np.ndarray:
    """Move up or down by `travel` on a sphere around the eye: closed lids bulge over the eyeball."""
    arm = mesh.vertices - _eye_centers(mesh.vertices)
    squared = (arm**2).sum(-1)
    y = arm[:, 1] + travel
    z = np.sqrt(np.maximum(squared - arm[:, 0] ** 2 - y**2, 0))
    z = np.where(z > 0, z, arm[:, 2])
    return np.stack((0 * y, travel, z - arm[:, 2]), -1) * (travel != 0)[:, None]


def _skinning_weights(mesh: Mesh) -> np.ndarray:
    """(V, 5), rows sum to 1: chin, lower lip, lower teeth and tongue follow the jaw, the rest of the head the neck."""
    p = mesh.vertices
    weights = np.zeros((len(p), 5))
    weights[:, 0] = 1 - rigging.smoothstep((p[:, 1] + 150) / 75)
    # Below the plane through the hinge and the mouth line, softly in the cheeks, sharply between the lips.
    hinge = np.array(JOINT_POSITIONS["jaw"])
    along = np.array((0, -47.0, 97.0)) - hinge
    downward = np.array((0, -along[2], along[1])) / np.linalg.norm(along)
    soft = rigging.smoothstep(0.5 + ((p - hinge) @ downward) / 30)
    between_lips = (
        (1 - rigging.smoothstep((np.abs(p[:, 0]) - 9) / 16)) * np.exp(-(((p[:, 1] + 47) / 20) ** 4)) * (p[:, 2] > 45)
    )
    jaw = soft + between_lips * ((1 - mesh.side) / 2 - soft)
    jaw *= rigging.smoothstep((p[:, 2] - 2) / 38) * rigging.smoothstep((p[:, 1] + 128) / 32)
    jaw[rigging.above_hairline(p / 1000)] = 0  # hair stays with the skull
    weights[:, 2] = jaw * (1 - weights[:, 0])
    for joint, parts in enumerate(((*EARS, Part.UPPER_TEETH), (Part.LOWER_TEETH, Part.TONGUE), EYES[:1], EYES[1:]), 1):
        weights[mesh.of(*parts)] = np.eye(5)[joint]
    weights[:, 1] = 1 - weights[:, [0, 2, 3, 4]].sum(1)
    return weights


def _joint_regressor(mesh: Mesh) -> np.ndarray:
    p, skin = mesh.vertices, mesh.of(Part.SKIN)
    supports = (
        skin & (p[:, 1] < -125),
        skin & (p[:, 1] < -60) & (p[:, 1] > -135) & (p[:, 2] < 55),
        skin & (np.abs(p[:, 1] + 10) < 35) & (p[:, 2] < 60),
        mesh.of(Part.LEFT_EYE),
        mesh.of(Part.RIGHT_EYE),
    )
    joints = zip(JOINT_POSITIONS.values(), supports, strict=True)
    return rigging.fit_joint_regressor(p, dict(zip(JOINT_POSITIONS, joints, strict=True)))


def _pose_correctives(mesh: Mesh) -> np.ndarray:
    """(V, 3, 36) millimeters per unit of the entries of R - I; entry (2, 1) is the sine of a turn about x."""
    correctives = np.zeros((len(mesh.vertices), 3, 36))
    nodding = Move((0, -105, 35), (40, 22, 40), (0, 0, -8))  # shortens the throat
    jaw_opening = Move((48, -34, 50), (24, 24, 34), (-5, 0, -1))  # draws the cheeks in
    for joint, move in enumerate((nodding, jaw_opening)):
        correctives[:, :, joint * 9 + 7] = _displacement(mesh.vertices, (move,)) * mesh.of(Part.SKIN)[:, None]
    return correctives


def _regions(mesh: Mesh) -> dict[str, np.ndarray]:
    """Names -> (V,) bool; a vertex may be in several regions."""
    p, skin = mesh.vertices, mesh.of(Part.SKIN)
    x, y, z = np.abs(p[:, 0]), p[:, 1], p[:, 2]
    to_eye = np.linalg.norm(p - _eye_centers(p), axis=1)
    scalp = skin & rigging.above_hairline(p / 1000)
    neck = skin & rigging.below_jaw(p / 1000)
    lips = skin & (((x / 26.5) ** 2 + ((y + 48) / np.where(y > -47.4, 6.2, 8.6)) ** 2) < 1) & (z > 60)
    nose = skin & (x < np.interp(y, (-32, -14, 10, 26), (19, 18, 10, 7))) & (y > -31) & (y < 26) & (z > 80)
    brows = skin & (x > 8) & (x < 50) & (z > 40) & (np.abs(y - np.interp(x, (8, 28, 50), (36.5, 41.5, 35))) < 5)
    face = skin & ~scalp & ~neck & (z > 5)
    return {
        "face": face,
        "scalp": scalp,
        "beard": face & rigging.in_beard(p / 1000) & ~lips & ~nose,
        "brows": brows,
        "lips": lips,
        "eyelids": skin & (to_eye < 17.5) & (z > 66),
        "eyes": mesh.of(*EYES),
        "iris": mesh.iris.copy(),
        "ears": mesh.of(*EARS),
        "nose": nose,
        "neck": neck,
        "mouth_interior": mesh.of(*MOUTH_PARTS),
        "teeth": mesh.of(*TEETH),
        "tongue": mesh.of(Part.TONGUE),
    }


def _landmark_points(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Faces (68,) and barycentrics (68, 3) of the points of the skin nearest to the landmarks, whatever the resolution."""
    targets = _landmark_targets()
    for _ in range(3):  # all but those on the cuts of eyes and mouth are put on the smooth surface first
        moved = targets - skin_distance(targets)[:, None] * skin_normal(targets)
        targets = np.where(np.isin(np.arange(68), ON_CUTS)[:, None], targets, moved)
    skin = mesh.of(Part.SKIN)[mesh.faces].all(1)
    side = mesh.side[mesh.faces]
    upper, lower = (side >= 0).all(1), (side <= 0).all(1)
    faces, barycentrics = np.zeros(68, np.int64), np.zeros((68, 3))
    for landmark, target in enumerate(targets):
        allowed = skin & (lower if landmark in LOWER_LIP else upper if landmark >= 48 else True)
        allowed &= (np.abs(mesh.vertices[mesh.faces] - target) < 40).all((1, 2))
        (near,) = np.nonzero(allowed)
        triangles = mesh.vertices[mesh.faces[near]]  # (N, 3, 3)
        points = np.broadcast_to(target, (len(near), 3)).copy()
        weights = closest_point_barycentrics(torch.from_numpy(points), torch.from_numpy(triangles)).numpy()
        best = np.square(np.einsum("nc,nci->ni", weights, triangles) - target).sum(1).argmin()
        faces[landmark], barycentrics[landmark] = near[best], weights[best]
    return faces, barycentrics


def _landmark_targets() -> np.ndarray:
    """(68, 3) millimeters: where the landmarks of iBUG are on the smooth head; the subject's right (x < 0) comes first."""
    jaw = [(-72, 14, 8), (-70, -8, 8), (-66, -28, 14), (-60, -48, 24)]  # from the ear down, then forward to the chin
    jaw += [(-51, -66, 40), (-39, -79, 58), (-26, -86, 76), (-13, -91, 87)]
    brow = [(-49, 34, 62), (-40, 40, 74), (-30, 42, 82), (-20, 40, 88), (-10, 36, 92)]
    eye = [
        (-45.5, 22.5, 73.7),
        (-35, 28, 82),
        (-26.5, 26.7, 82.4),
        (-17.6, 20.7, 81),
        (-26.5, 17.1, 82.4),
        (-35, 17, 82.5),
    ]
    upper = [(-25.1, -47, 84.7), (-14, -41, 96), (-4, -39, 100)]
    nose = [(0, 20, 88), (0, 8, 98), (0, -4, 106), (0, -16, 114)]
    under = [(-14, -25, 98), (-7, -28, 102), (0, -29, 104), (7, -28, 102), (14, -25, 98)]
    lower = [(14, -56, 94), (6, -58, 97), (0, -59, 98), (-6, -58, 97), (-14, -56, 94)]
    inner = [(-22.3, -48.1, 87), (-8.2, -47.8, 95.6), (0, -46.9, 96.9), (8.2, -47.8, 95.6), (22.3, -48.1, 87)]

    def mirrored(points: list) -> list:
        return [(-x, y, z) for x, y, z in points]

    left_eye = [mirrored(eye)[i] for i in (3, 2, 1, 0, 5, 4)]  # inner corner first, over the upper lid
    targets = [*jaw, (0, -91, 90), *mirrored(jaw)[::-1], *brow, *mirrored(brow)[::-1], *nose, *under, *eye, *left_eye]
    targets += [*upper, (0, -40, 100), *mirrored(upper)[::-1], *lower, *inner, *inner[3:0:-1]]
    return np.array(targets, np.float64)
