"""Synthetic subjects: complete avatars that are a function of a head model and a seed.

A seed gives an identity (normally distributed coefficients of the shape basis), an appearance and, on the canonical head, the
places of the Gaussians: random ones (`captured`) or those that all subjects share (`layout`). Hair and beard are lifted off
the skin into a smooth volume, long hair falls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from gaussian_tokenizer.avatars.anchoring import Placed, face_frames, to_local
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import SH_DC
from gaussian_tokenizer.geometry.rotations import matrix_to_quaternion
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.synthetic.appearance import Appearance, colors_of, detailed, draw_appearance
from gaussian_tokenizer.synthetic.captured import captured_points
from gaussian_tokenizer.synthetic.details import Glasses, brow_weights, face_coordinates
from gaussian_tokenizer.synthetic.glasses import glasses_points
from gaussian_tokenizer.synthetic.haircuts import bob_length, bun, fringe_offsets, hair_mask, volume
from gaussian_tokenizer.synthetic.layout import (
    JAW_OPENING,
    MIN_POINTS_PER_FACE,
    ZONES,
    SurfacePoints,
    default_num_points,
    dense_counts,
    face_layout,
    regular_points,
    sparse_counts,
)
from gaussian_tokenizer.synthetic.light import LIGHTS, draw_light
from gaussian_tokenizer.synthetic.mixing import smoothstep

PLACEMENTS, LOOKS = ("captured", "regular"), ("varied", "plain")
DETAILS, LIGHT = 2, 3  # numbers of the random streams, after the seed
SHAPE_LIMIT = 2.5  # standard deviations
ROUNDING = 0.7  # of Phong tessellation: 0 keeps the flat faces, 1 the full tangent planes
OPACITY = 0.98
WIDTH, DENSE_WIDTH = 0.85, 0.75  # standard deviation of a Gaussian, relative to the distance of the points
# Largest turns of a random timestep: axis-angle of the neck (nod, turn, tilt) and of the eyes, radians.
NECK_TURN, GAZE = np.array((0.15, 0.3, 0.08)), np.array((0.15, 0.3, 0.0))
EXPRESSIONS_AT_ONCE = 3
THICK = 0.1  # meters: hair of varied looks this thick would be twice as far apart, and so wide
FLAT = 0.25  # thickness of a Gaussian on the skin, relative to its width


@dataclass(frozen=True, eq=False)
class SyntheticSubject:
    """`avatar` has the head model attached and the parameters of one neutral frame."""

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
    placement: str = "captured",
    look: str = "plain",
    light: str = "plain",
) -> SyntheticSubject:
    """The subject of `seed` on `head`, the same for the same arguments.

    `num_points` is the number of Gaussians of a subject with average hair and beard (None: `default_num_points`); the
    subject's own is up to a sixth more or less. Regions that the head lacks (no `scalp`: no hair) are left out.
    `identity_scale` multiplies the identity: 1 gives natural heads, 2 caricatures. `placement`: "captured" puts the points of
    every subject on faces and at places of its own, with noise, as a fit does; "regular" has them where all subjects have them.
    `look` "varied" adds the details of `details` and haircuts to the plain subject of the seed; `light` "varied" or "hard"
    lights it by a draw of its own.
    """
    for name, value, known in (("placement", placement, PLACEMENTS), ("look", look, LOOKS), ("light", light, LIGHTS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")
    num_points = default_num_points(head.n_faces) if num_points is None else num_points
    if num_points < 1:
        raise ValueError(f"{num_points} points asked for; expected at least 1")
    rng = np.random.default_rng(seed)
    appearance = draw_appearance(rng)
    own = (*np.atleast_1d(seed).tolist(),)
    if look == "varied":
        appearance = detailed(appearance, np.random.default_rng((*own, DETAILS)))
    appearance = replace(appearance, light=draw_light(np.random.default_rng((*own, LIGHT)), light))
    # After the appearance, so that a seed has the same appearance on head models with any number of shape directions.
    shape = identity_scale * np.clip(rng.standard_normal(head.n_shape), -SHAPE_LIMIT, SHAPE_LIMIT)
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params.shape.copy_(torch.from_numpy(shape))
    styles = appearance.hair_style, appearance.beard_style
    layout = face_layout(head)
    if placement == "regular":
        points = regular_points(layout, sparse_counts(layout, num_points, *styles, min_points_per_face))
    else:
        contrast = _contrast(head, params, appearance)
        points = captured_points(layout, contrast, num_points, *styles, min_points_per_face, rng)
    return SyntheticSubject(appearance, head, params, _build_avatar(head, params, appearance, points, WIDTH))


def portrait_avatar(subject: SyntheticSubject, spacing: float) -> GaussianAvatar:
    """The subject as portraits show it: a closed surface with a point at least every `spacing` meters."""
    layout = face_layout(subject.head)
    points = regular_points(layout, dense_counts(layout, spacing, subject.appearance.hair_style))
    return _build_avatar(subject.head, subject.params, subject.appearance, points, DENSE_WIDTH)


def draw_timesteps(
    subject: SyntheticSubject, num_timesteps: int, seed: int | Sequence[int], at_rest: bool = True
) -> HeadParameters:
    """Head parameters: first `at_rest`, or not, then random expressions and small turns of neck, jaw and eyes."""
    rng = np.random.default_rng(seed)
    n_expression = subject.head.n_expression
    motion = HeadParameters.zeros(subject.head.n_shape, n_expression, num_timesteps)
    motion.shape.copy_(subject.params.shape)
    for timestep in range(int(at_rest), num_timesteps):
        chosen = rng.choice(n_expression, min(EXPRESSIONS_AT_ONCE, n_expression), replace=False)
        motion.expr[timestep, chosen] = torch.from_numpy(rng.uniform(0.3, 1.0, len(chosen))).float()
        turns = rng.uniform(-1, 1, 3) * NECK_TURN, (max(0.0, rng.uniform(-1, 1)) * JAW_OPENING, 0.0, 0.0)
        gaze = rng.uniform(-1, 1, 3) * GAZE
        for pose, turn in zip((motion.neck_pose, motion.jaw_pose, motion.eyes_pose), (*turns, (*gaze, *gaze))):
            pose[timestep] = torch.tensor(np.asarray(turn), dtype=torch.float32)
    return motion


class _Points(NamedTuple):
    """N points on the skin of a canonical head; arrays of length N."""

    skin: np.ndarray  # (N, 3) meters
    normals: np.ndarray  # (N, 3)
    weights: dict[str, np.ndarray]  # by region, see `appearance.colors_of`
    waves: np.ndarray  # slow variation of hair and beard, -1..1
    depth: np.ndarray  # in the volume of hair or beard, 0..1
    along: np.ndarray  # position along the strand, 0..1


def _build_avatar(
    head: HeadModel, params: HeadParameters, appearance: Appearance, where: SurfacePoints, width: float
) -> GaussianAvatar:
    """The avatar with its points `where` the placement says, Gaussians `width` times as wide as the points are apart."""
    vertices = head.canonical_vertices(params)
    points = _points_on_skin(head, vertices, appearance, where)
    offsets = np.zeros_like(points.skin)
    for name, thickness, lift in (
        ("scalp", appearance.hair_thickness, _hair_offsets),
        ("beard", appearance.beard_thickness, _beard_offsets),
    ):
        region = head.regions.get(name)
        if thickness and region is not None and region.any():
            offsets += lift(appearance, points, vertices[region].double().numpy())
    length = np.linalg.norm(offsets, axis=1)
    lifted, hanging = smoothstep(length / 0.006), smoothstep((length - 0.03) / 0.05)
    relative = np.stack((1 + 0.5 * lifted + 0.8 * hanging, FLAT + (0.8 - FLAT) * lifted, 1 + 0.2 * lifted), 1)
    offsets += ((1 + lifted) * where.heights)[:, None] * points.normals  # hair and beard are noisier than skin
    widths = width * where.spacing
    if appearance.details is not None:
        widths = widths * (1 + np.minimum(length / THICK, 0.6))
    colors = colors_of(appearance, points.weights, points.normals, points.waves, points.depth)
    faces, frames = torch.from_numpy(where.faces), face_frames(vertices, head.faces)
    placed = Placed(
        torch.from_numpy(points.skin + offsets).float(),
        torch.from_numpy(widths[:, None] * relative).float(),
        matrix_to_quaternion(torch.from_numpy(_axes(points.normals))).float(),
    )
    glasses = None if appearance.details is None else appearance.details.glasses
    if glasses is not None:
        placed, faces, colors = _with_glasses(head, appearance, glasses, vertices, where, placed, colors)
    local = to_local(placed, faces, frames)
    return GaussianAvatar(
        positions=local.positions,
        faces=faces,
        sh=((torch.from_numpy(colors).float() - 0.5) / SH_DC)[:, None],
        opacities=torch.full((len(faces),), OPACITY).logit(),
        scales=local.log_scales,
        quats=local.quats,
        params=params,
    ).with_head(head)


def _with_glasses(
    head: HeadModel,
    appearance: Appearance,
    glasses: Glasses,
    vertices: torch.Tensor,
    where: SurfacePoints,
    placed: Placed,
    colors: np.ndarray,
) -> tuple[Placed, torch.Tensor, np.ndarray]:
    """The points `placed` `where` the placement says, their faces and colors (N, 3), and those of the glasses after them."""
    layout, faces = face_layout(head), where.faces
    spacing = 0.6 * float(np.median(where.spacing[layout.zone[faces] == layout.zones.index("skin")]))
    added = glasses_points(glasses, head, vertices.double().numpy(), layout, faces, spacing)
    if added is None:
        return placed, torch.from_numpy(faces), colors
    shade = appearance.light.on(np.array([[0.0, 0.0, 1.0]]), np.zeros(1)) if appearance.light is not None else 1.0
    own = np.broadcast_to(np.clip(glasses.color * shade, 0, 1), (len(added.faces), 3))
    quats = matrix_to_quaternion(torch.from_numpy(added.axes)).float()
    tensors = torch.from_numpy(added.positions).float(), torch.from_numpy(added.scales).float(), quats
    return (
        Placed(*(torch.cat(pair) for pair in zip(placed, tensors, strict=True))),
        torch.from_numpy(np.concatenate((faces, added.faces))),
        np.concatenate((colors, own)),
    )


def _contrast(head: HeadModel, params: HeadParameters, appearance: Appearance) -> np.ndarray:
    """(F,) largest distance between the colors (RGB in 0..1) of two corners of each face."""
    faces, corners = np.repeat(np.arange(head.n_faces), 3), np.tile(np.eye(3), (head.n_faces, 1))
    nothing, middle = np.zeros(len(faces)), np.full(len(faces), 0.5)
    where = SurfacePoints(faces, corners, spacing=nothing, heights=nothing, depth=middle, along=middle)
    points = _points_on_skin(head, head.canonical_vertices(params), appearance, where)
    colors = colors_of(appearance, points.weights, points.normals, points.waves, points.depth).reshape(-1, 3, 3)
    return np.linalg.norm(colors - np.roll(colors, 1, axis=1), axis=2).max(1)


def _points_on_skin(head: HeadModel, canonical: torch.Tensor, appearance: Appearance, where: SurfacePoints) -> _Points:
    """Points on the faces of a head with vertices `canonical` (V, 3)."""
    layout, faces, barycentrics = face_layout(head), where.faces, where.barycentrics
    corners = head.faces.numpy()[faces]  # (N, 3)
    vertices, vertex_normals = canonical.double().numpy(), head.normals(canonical).double().numpy()

    def at_points(per_vertex: np.ndarray) -> np.ndarray:
        return np.einsum("nc,nc...->n...", barycentrics, per_vertex[corners])

    # The walls of the mouth stay on their triangles: at the lips their normals are those of the skin.
    rounding = ROUNDING * (layout.zone[faces] != layout.zones.index("mouth_interior"))
    skin = _rounded_surface(vertices, vertex_normals, corners, barycentrics, rounding)
    weights, details = _region_weights(head, at_points, len(faces)), appearance.details
    if details is not None:
        coordinates = face_coordinates(head, at_points(head.template.double().numpy()))
        if coordinates:
            weights["brows"] = brow_weights(details, coordinates, head)
            weights["scalp"] = weights["scalp"] * hair_mask(details, coordinates)
            coordinates["blotches"] = np.sin(skin @ details.blotch_vectors.T + details.blotch_phases).mean(1)
            weights |= coordinates
    return _Points(
        skin=skin,
        normals=_normalized(at_points(vertex_normals)),
        weights=weights,
        waves=np.sin(skin @ appearance.wave_vectors.T + appearance.wave_phases).mean(1),
        depth=where.depth,
        along=where.along,
    )


def _region_weights(
    head: HeadModel, at_points: Callable[[np.ndarray], np.ndarray], num_points: int
) -> dict[str, np.ndarray]:
    """(N,) by region: 1 inside, 0 outside or if the head lacks the region, with a soft border."""
    masks = {name: mask.numpy() for name, mask in head.regions.items()}
    weights = {name: np.zeros(num_points) for name in ZONES}
    for name in masks.keys() & weights.keys():
        weights[name] = smoothstep((at_points(masks[name].astype(float)) - 0.25) / 0.5)
    weights["brows"] = smoothstep(2 * weights["brows"] - 1)  # thin, even where the triangles are large
    weights["beard"] *= 1 - weights["lips"]
    template = head.template.double().numpy()
    if "iris" in masks:
        weights["iris_distance"] = _iris_distance(template, masks["iris"], at_points)
    if "mouth_interior" in masks:
        forward = template[:, 2]
        low, high = (bound(forward[masks["mouth_interior"]]) for bound in (np.min, np.max))
        weights["mouth_depth"] = np.clip((high - at_points(forward)) / (high - low), 0, 1)
    return weights


def _rounded_surface(
    vertices: np.ndarray, normals: np.ndarray, corners: np.ndarray, barycentrics: np.ndarray, rounding: np.ndarray
) -> np.ndarray:
    """(N, 3) points on the faces, moved by `rounding` (N,) towards the corners' tangent planes (Boubekeur and Alexa 2008)."""
    a, n = vertices[corners], normals[corners]  # (N, 3 corners, 3)
    flat = np.einsum("nc,nci->ni", barycentrics, a)
    heights = np.einsum("nci,nci->nc", a - flat[:, None], n)
    return flat + rounding[:, None] * np.einsum("nc,nc,nci->ni", barycentrics, heights, n)


def _hair_offsets(appearance: Appearance, points: _Points, scalp: np.ndarray) -> np.ndarray:
    """(N, 3) from the root of each point to its place in the hair; `scalp` (K, 3) are the vertices of the scalp."""
    roots, weight = points.skin, points.weights["scalp"]
    roughness = 0.7 if appearance.hair_style == "curly" else 0.35
    lift = appearance.hair_thickness * weight * (1 + roughness * points.waves) * (0.3 + 0.7 * points.depth)
    details = appearance.details if "across" in points.weights else None
    if details is not None:
        lift = lift * volume(details, points.weights)
    offsets = lift[:, None] * _normalized(points.normals + np.array((0, 0.35, 0)))
    if details is not None and details.cut == "fringe":
        offsets += weight[:, None] * fringe_offsets(details, points.weights, roots, points.along)
    if details is not None and details.cut == "bun":
        ball, inside = bun(details, points.weights, (points.along, points.depth), scalp)
        return np.where((inside & (weight > 0.5))[:, None], ball - roots, offsets)
    if appearance.hair_style != "long":
        return offsets
    # The lower a root and the farther from the forehead, the farther its hair falls.
    low, high = scalp.min(0), scalp.max(0)
    middle, radius = (low + high) / 2, (high - low) / 2
    from_front = np.arctan2(np.abs(roots[:, 0]), roots[:, 2] - middle[2])
    falls = smoothstep((from_front - 0.75) / 0.7) * smoothstep((high[1] - roots[:, 1]) / (1.4 * radius[1])) * weight
    length: float | np.ndarray = appearance.hair_length
    if details is not None and details.cut == "bob":
        length = bob_length(details, points.weights, roots)
    drop = length * points.along * falls
    offsets[:, 1] -= drop
    # Outside the neck: what has fallen hangs from the widest outline of the skull.
    sideways = (roots + offsets - middle)[:, [0, 2]] / (radius[[0, 2]] + 0.5 * appearance.hair_thickness)
    inward = np.maximum(1 / np.maximum(np.linalg.norm(sideways, axis=1), 0.3) - 1, 0) * smoothstep(drop / 0.05)
    offsets[:, [0, 2]] += inward[:, None] * (roots + offsets - middle)[:, [0, 2]]
    return offsets


def _beard_offsets(appearance: Appearance, points: _Points, beard: np.ndarray) -> np.ndarray:
    """(N, 3) from the skin into the beard, longest at the chin; `beard` (K, 3) are the vertices of the beard."""
    low, high = beard[:, 1].min(), beard[:, 1].max()
    length = 0.5 + 0.9 * smoothstep((high - points.skin[:, 1]) / max(high - low, 1e-6))
    lift = appearance.beard_thickness * points.weights["beard"] * length
    lift = lift * (1 + 0.35 * points.waves) * (0.3 + 0.7 * points.depth)
    return lift[:, None] * _normalized(points.normals + np.array((0, -0.5, 0.15)))


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
