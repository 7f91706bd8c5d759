"""Synthetic subjects: complete avatars of subjects who do not exist, a function of a head model and a seed.

A seed gives an identity (the head's shape directions, normally distributed) and looks (skin, hair, beard, brows, eyes,
lips). Gaussians are laid on the canonical head where `synthetic_layout` says; hair and beard are lifted off the skin
into a smooth volume, long hair falls. The same recipe with more points is what an image shows, at rest or in another
moment. There is no noise per point: whoever sees shape, hair and beard can know where every point is. Light is baked
into the colors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gaussian_tokenizer.avatars.anchoring import Placed, face_frames, to_local
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import SH_DC
from gaussian_tokenizer.geometry.rotations import matrix_to_quaternion
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.synthetic.appearance import Appearance, colors_of, draw_appearance, smoothstep
from gaussian_tokenizer.synthetic.layout import (
    JAW_OPENING,
    MIN_POINTS_PER_FACE,
    FaceLayout,
    default_num_points,
    dense_counts,
    face_layout,
    points_of_faces,
    spacings,
    sparse_counts,
)

SHAPE_LIMIT = 2.5  # standard deviations
ROUNDING = 0.7  # of Phong tessellation: 0 keeps the flat faces, 1 the full tangent planes
OPACITY = 0.98
WIDTH, DENSE_WIDTH = 0.85, 0.75  # of a Gaussian (one standard deviation), relative to the distance of the points
# How far a random moment goes at most: axis-angle of the neck (nod, turn, tilt) and of the eyes, radians.
NECK_TURN, GAZE = np.array((0.15, 0.3, 0.08)), np.array((0.15, 0.3, 0.0))
EXPRESSIONS_AT_ONCE = 3
COLORED_REGIONS = (
    *("scalp", "beard", "brows", "lips", "eyes", "ears", "nose", "neck"),
    *("mouth_interior", "teeth", "tongue"),
)
FLAT = 0.25  # thickness of a Gaussian on the skin, relative to its width


@dataclass(frozen=True, eq=False)
class SyntheticSubject:
    """A person who does not exist: `avatar` has its head model attached and parameters of one neutral frame."""

    appearance: Appearance
    head: HeadModel
    params: HeadParameters
    avatar: GaussianAvatar


def synthesize_subject(
    head: HeadModel,
    seed: int | Sequence[int],
    num_points: int | None = None,
    identity_scale: float = 1.0,
    min_points_per_face: int = MIN_POINTS_PER_FACE,
) -> SyntheticSubject:
    """The subject of `seed` on `head`, the same for the same arguments.

    `num_points` is the number of Gaussians of a subject with average hair and beard (None: by the number of faces of
    the head, see `default_num_points`); the subject's own is up to a sixth more or less. Regions that the head lacks
    (no `scalp`: no hair) are left out. `identity_scale` multiplies the identity: 1 is a crowd, 2 a crowd of caricatures.
    An occupied face has at least `min_points_per_face` points.
    """
    if num_points is not None and num_points < 1:
        raise ValueError(f"{num_points} points asked for; expected at least 1")
    rng = np.random.default_rng(seed)
    appearance = draw_appearance(rng)
    # After the appearance, so that one seed looks alike on head models with any number of shape directions.
    shape = identity_scale * np.clip(rng.standard_normal(head.n_shape), -SHAPE_LIMIT, SHAPE_LIMIT)
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params.shape.copy_(torch.from_numpy(shape))
    layout = face_layout(head)
    num_points = default_num_points(head.n_faces) if num_points is None else num_points
    counts = sparse_counts(layout, num_points, appearance.hair_style, appearance.beard_style, min_points_per_face)
    return SyntheticSubject(appearance, head, params, _anchored(head, params, appearance, layout, counts, WIDTH))


def portrait_avatar(subject: SyntheticSubject, spacing: float) -> GaussianAvatar:
    """The subject with a point every `spacing` meters or closer, a closed surface: what a portrait shows."""
    layout = face_layout(subject.head)
    counts = dense_counts(layout, spacing, subject.appearance.hair_style)
    return _anchored(subject.head, subject.params, subject.appearance, layout, counts, DENSE_WIDTH)


def draw_timesteps(subject: SyntheticSubject, num_timesteps: int, seed: int | Sequence[int]) -> HeadParameters:
    """Head parameters of so many timesteps: at rest first, then random expressions and small turns of neck, jaw and eyes."""
    rng = np.random.default_rng(seed)
    n_expression = subject.head.n_expression
    moments = replace(
        HeadParameters.zeros(subject.head.n_shape, n_expression, num_timesteps), shape=subject.params.shape.clone()
    )
    for timestep in range(1, num_timesteps):
        chosen = rng.choice(n_expression, min(EXPRESSIONS_AT_ONCE, n_expression), replace=False)
        moments.expr[timestep, chosen] = torch.from_numpy(rng.uniform(0.3, 1.0, len(chosen))).float()
        turns = rng.uniform(-1, 1, 3) * NECK_TURN, (max(0.0, rng.uniform(-1, 1)) * JAW_OPENING, 0.0, 0.0)
        gaze = rng.uniform(-1, 1, 3) * GAZE
        for pose, turn in zip((moments.neck_pose, moments.jaw_pose, moments.eyes_pose), (*turns, (*gaze, *gaze))):
            pose[timestep] = torch.tensor(np.asarray(turn), dtype=torch.float32)
    return moments


def _anchored(
    head: HeadModel,
    params: HeadParameters,
    appearance: Appearance,
    layout: FaceLayout,
    counts: np.ndarray,
    width: float,
) -> GaussianAvatar:
    """The avatar with `counts` (F,) points on every face."""
    faces, gaussians = _dress(head, params, appearance, layout, counts, width)
    placed = Placed(gaussians["positions"], gaussians["scales"], gaussians["quats"])
    local = to_local(placed, faces, face_frames(head.canonical_vertices(params), head.faces))
    return GaussianAvatar(
        positions=local.positions,
        faces=faces,
        sh=((gaussians["colors"] - 0.5) / SH_DC)[:, None],
        opacities=gaussians["opacities"].logit(),
        scales=local.log_scales,
        quats=local.quats,
        params=params,
    ).with_head(head)


def _dress(
    head: HeadModel,
    params: HeadParameters,
    appearance: Appearance,
    layout: FaceLayout,
    counts: np.ndarray,
    width: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Faces (N,) and world-space Gaussians on the canonical head, `counts` (F,) on every face; float32."""
    faces, index, barycentrics = points_of_faces(counts)
    corners = head.faces.numpy()[faces]  # (N, 3)
    on_head = head.canonical_vertices(params)
    vertices, vertex_normals = on_head.double().numpy(), head.normals(on_head).double().numpy()
    masks = {name: mask.numpy() for name, mask in head.regions.items()}

    def at_points(per_vertex: np.ndarray) -> np.ndarray:
        return np.einsum("nc,nc...->n...", barycentrics, per_vertex[corners])

    def region(name: str) -> np.ndarray:
        """(N,) 1 inside a region, 0 outside or where the head has none, a soft border between."""
        return (
            smoothstep((at_points(masks[name].astype(float)) - 0.25) / 0.5) if name in masks else np.zeros(len(faces))
        )

    weights = {name: region(name) for name in COLORED_REGIONS}
    weights["brows"] = smoothstep(2 * weights["brows"] - 1)  # a thin thing, also where the triangles are large
    weights["beard"] *= 1 - weights["lips"]
    if "iris" in masks:
        weights["iris_distance"] = _iris_distance(head.template.double().numpy(), masks["iris"], at_points)
    if "mouth_interior" in masks:
        forward = head.template[:, 2].double().numpy()
        low, high = (bound(forward[masks["mouth_interior"]]) for bound in (np.min, np.max))
        weights["mouth_depth"] = np.clip((high - at_points(forward)) / (high - low), 0, 1)
    normal = _normalized(at_points(vertex_normals))
    # The walls of the mouth stay on their triangles: at the lips their normals are those of the skin.
    rounding = ROUNDING * (layout.zone[faces] != layout.zones.index("mouth_interior"))
    skin = _rounded_surface(vertices, vertex_normals, corners, barycentrics, rounding)
    # Position in the volume of hair or beard: how deep, and how far along the strand. Even over the points of a face
    # and over the faces, and like all else the same for everybody.
    depth = (0.5 + index * 0.6180339887498949 + faces * 0.7548776662466927) % 1
    along = (0.5 + index * 0.8191725133961645 + faces * 0.5698402909980532) % 1
    waves = np.sin(skin @ appearance.wave_vectors.T + appearance.wave_phases).mean(1)
    offsets = np.zeros_like(skin)
    if appearance.hair_thickness and masks.get("scalp", np.zeros(1)).any():
        offsets += _hair_offsets(
            appearance, skin, normal, weights["scalp"], vertices[masks["scalp"]], waves, depth, along
        )
    if appearance.beard_thickness and masks.get("beard", np.zeros(1)).any():
        offsets += _beard_offsets(appearance, skin, normal, weights["beard"], vertices[masks["beard"]], waves, depth)

    lift = np.linalg.norm(offsets, axis=1)
    lifted, hanging = smoothstep(lift / 0.006), smoothstep((lift - 0.03) / 0.05)
    widths = width * spacings(layout, counts)[faces]
    relative = np.stack((1 + 0.5 * lifted + 0.8 * hanging, FLAT + (0.8 - FLAT) * lifted, 1 + 0.2 * lifted), 1)
    arrays = {
        "positions": skin + offsets,
        "scales": widths[:, None] * relative,
        "quats": matrix_to_quaternion(torch.from_numpy(_axes(normal))).numpy(),
        "opacities": np.full(len(faces), OPACITY),
        "colors": colors_of(appearance, weights, normal, waves, depth),
    }
    return torch.from_numpy(faces), {name: torch.from_numpy(array).float() for name, array in arrays.items()}


def _rounded_surface(
    vertices: np.ndarray, normals: np.ndarray, corners: np.ndarray, barycentrics: np.ndarray, rounding: np.ndarray
) -> np.ndarray:
    """(N, 3) points on the faces, moved by `rounding` (N,) towards the corners' tangent planes (Boubekeur and Alexa 2008)."""
    a, n = vertices[corners], normals[corners]  # (N, 3 corners, 3)
    flat = np.einsum("nc,nci->ni", barycentrics, a)
    heights = np.einsum("nci,nci->nc", a - flat[:, None], n)
    return flat + rounding[:, None] * np.einsum("nc,nc,nci->ni", barycentrics, heights, n)


def _hair_offsets(
    appearance: Appearance,
    roots: np.ndarray,
    normal: np.ndarray,
    scalp: np.ndarray,
    scalp_vertices: np.ndarray,
    waves: np.ndarray,
    depth: np.ndarray,
    along: np.ndarray,
) -> np.ndarray:
    """(N, 3) from the root of each point to where it is in the hair."""
    roughness = 0.7 if appearance.hair_style == "curly" else 0.35
    lift = appearance.hair_thickness * scalp * (1 + roughness * waves) * (0.3 + 0.7 * depth)
    offsets = lift[:, None] * _normalized(normal + np.array((0, 0.35, 0)))
    if appearance.hair_style != "long":
        return offsets
    # The lower a root and the farther from the forehead, the farther its hair falls.
    low, high = scalp_vertices.min(0), scalp_vertices.max(0)
    middle, radius = (low + high) / 2, (high - low) / 2
    from_front = np.arctan2(np.abs(roots[:, 0]), roots[:, 2] - middle[2])
    falls = smoothstep((from_front - 0.75) / 0.7) * smoothstep((high[1] - roots[:, 1]) / (1.4 * radius[1])) * scalp
    drop = appearance.hair_length * along * falls
    offsets[:, 1] -= drop
    # Outside the neck: what has fallen hangs from the widest outline of the skull.
    sideways = (roots + offsets - middle)[:, [0, 2]] / (radius[[0, 2]] + 0.5 * appearance.hair_thickness)
    inward = np.maximum(1 / np.maximum(np.linalg.norm(sideways, axis=1), 0.3) - 1, 0) * smoothstep(drop / 0.05)
    offsets[:, [0, 2]] += inward[:, None] * (roots + offsets - middle)[:, [0, 2]]
    return offsets


def _beard_offsets(
    appearance: Appearance,
    roots: np.ndarray,
    normal: np.ndarray,
    beard: np.ndarray,
    beard_vertices: np.ndarray,
    waves: np.ndarray,
    depth: np.ndarray,
) -> np.ndarray:
    """(N, 3) from the skin into the beard, longest at the chin."""
    low, high = beard_vertices[:, 1].min(), beard_vertices[:, 1].max()
    length = 0.5 + 0.9 * smoothstep((high - roots[:, 1]) / max(high - low, 1e-6))
    lift = appearance.beard_thickness * beard * length * (1 + 0.35 * waves) * (0.3 + 0.7 * depth)
    return lift[:, None] * _normalized(normal + np.array((0, -0.5, 0.15)))


def _iris_distance(template: np.ndarray, iris: np.ndarray, at_points: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(N,) distance from the middle of the nearer iris, 1 at its rim, seen from the front."""
    positions = at_points(template)
    distance = np.full(len(positions), np.inf)
    for side in (iris & (template[:, 0] > 0), iris & (template[:, 0] < 0)):
        if side.any():
            center = template[side].mean(0)
            radius = np.linalg.norm((template[side] - center)[:, :2], axis=1).max()
            distance = np.minimum(distance, np.linalg.norm((positions - center)[:, :2], axis=1) / max(radius, 1e-9))
    return distance


def _axes(normal: np.ndarray) -> np.ndarray:
    """(N, 3, 3) rotations whose columns are: down along the surface, the normal, across."""
    down = np.array((0.0, -1.0, 0.0)) + 0.3 * normal * np.array((1, 0, 1))
    along = _normalized(down - (down * normal).sum(1, keepdims=True) * normal + np.array((1e-6, 0, 1e-6)))
    across = _normalized(np.cross(along, normal))
    return np.stack((np.cross(normal, across), normal, across), -1)


def _normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
