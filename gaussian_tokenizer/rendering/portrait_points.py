"""Where the points of an avatar are in a portrait, and whether they can be seen there: what a decoder that reads it is given.

    canonical points, faces, portrait (camera, head parameters) -> pose -> project -> depth test -> `COLUMNS` of each point

The same is computed for the mirror image of each point across the head's sagittal plane, whose color is the best guess where
the point itself is hidden.

Axes: N points, M of them and of their mirror images together, F faces, V vertices, H W pixels.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gaussian_tokenizer.avatars.anchoring import Placed
from gaussian_tokenizer.avatars.skinning import Skinning, retarget
from gaussian_tokenizer.geometry.rotations import axis_angle_to_matrix
from gaussian_tokenizer.geometry.triangles import nearest_on_faces
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras, default_camera
from gaussian_tokenizer.rendering.compiling import compiled
from gaussian_tokenizer.tokenizer.processing_conditions import portrait_rgba

# u, v: -1 to 1 from the left and upper edge of the image to the right and lower one (torch's grid_sample, align_corners=False).
# depth: meters along the optical axis. facing: cosine between the normal of the point's face and the direction to the camera.
# behind_head, behind_points: meters by which the posed head mesh, and the foremost other point nearby, lie in front of it,
# negative behind it, within +-LIMIT. on_head: 1 where the pixel shows the mesh. visible: 1 if nothing hides the point.
COLUMNS = ("u", "v", "depth", "facing", "behind_head", "behind_points", "on_head", "visible")
LIMIT = 0.05  # meters
TOLERANCE = 0.005  # meters that a visible point may lie behind the mesh: points of a fit are not exactly on it
NEAREST = 0.01  # meters; nothing nearer to the camera is seen, as in `render`
POINTS_PER_CELL = 4
ROWS_AT_ONCE = 1024
SAGITTAL = (-1.0, 1.0, 1.0)  # times a canonical position: its mirror image


class Reference(NamedTuple):
    """A further image of the subject of a portrait: another view, another expression."""

    image: Any  # as the tokenizer takes it
    head_params: HeadParameters  # of the image in the first frame; shape and static offset are the portrait's instead
    camera: Cameras  # C = 1; its size is in proportion to the image's


@dataclass(frozen=True, eq=False)
class Portrait:
    """An image of a subject, with what it takes to find the points of the subject in it, and further ones to read."""

    image: Tensor  # (4, H, W) float32: red, green, blue and alpha in 0..1; alpha is 1 everywhere if it is not known
    camera: Cameras  # C = 1; its size is in proportion to the image's
    params: HeadParameters  # T = 1: shape and static offset of the subject, expression and pose of this moment
    references: tuple["Portrait", ...] = ()  # in any order; of their `params`, shape and static offset are not used

    @classmethod
    def of(
        cls,
        image: Any,
        params: HeadParameters,
        camera: Cameras | None,
        head: HeadModel,
        size: int,
        references: Sequence[Reference] = (),
    ) -> "Portrait":
        """The portrait of any image, its longer side resized to `size` pixels, at the first frame of `params`.

        `camera` (C = 1) is that of the image, or None: then `default_camera`, with a warning. `ValueError` for one of another
        aspect than the image's, and for a reference that is none, lacks a camera or has parameters of another head model.
        """
        pixels = torch.from_numpy(portrait_rgba(image, size)).to(head.device)
        pixels[:3] = pixels[:3] * pixels[3] + 1 - pixels[3]  # on white, as the decoder's evaluation has it
        height, width = pixels.shape[1:]
        if camera is None:
            warnings.warn(
                "no camera was given for the portrait: a head that fills two thirds of its height, seen from a meter in front, is "
                "assumed; where the head is elsewhere, colors come from the wrong pixels",
                stacklevel=2,
            )
            camera = default_camera(head, width, height)
        if abs(camera.width * height - camera.height * width) > 2 * max(camera.width, camera.height):
            raise ValueError(
                f"the camera is for images of {camera.width} x {camera.height} pixels, the portrait has the aspect of {width} x "
                f"{height}; crop portrait and camera alike"
            )
        further = [cls._of_reference(i, each, head, size) for i, each in enumerate(references)]
        return cls(pixels, camera, params.frame(0).to(head.device), tuple(further))

    @classmethod
    def _of_reference(cls, index: int, reference: Any, head: HeadModel, size: int) -> "Portrait":
        if not isinstance(reference, tuple) or len(reference) != len(Reference._fields):
            found = type(reference).__name__
            raise ValueError(f"reference {index} is a {found}, expected Reference(image, head_params, camera)")
        image, own, camera = reference
        if own is None or camera is None:
            raise ValueError(
                f"reference {index} has no {'head_params' if own is None else 'camera'}: a point is found in it only by both; "
                "track the image together with the portrait, or leave it out"
            )
        try:
            head.check(own)
            return cls.of(image, own, camera, head, size)
        except ValueError as error:
            raise ValueError(f"reference {index}: {error}") from None

    def inputs(self, positions: Tensor, faces: Tensor, head: HeadModel) -> dict[str, Tensor]:
        """`portrait` (K, 4, H, W), `portrait_points` and `mirror_points` (N, K, 8) for a decoder with `read_portrait`.

        Of the portrait and its references, which are stretched to its size: places in an image are shares of its sides.
        """
        every, size = (self, *self.references), list(self.image.shape[1:])
        bound = _bound(positions, faces, self.params, head)
        read = [_seen(bound, own.params, own.camera) for own in every]
        points, mirror = (torch.stack(each, dim=1) for each in zip(*read))
        images = [own.image for own in every]
        for i, image in enumerate(images):
            if list(image.shape[1:]) != size:
                images[i] = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        return {
            "portrait": torch.stack(images).to(positions.device),
            "portrait_points": points,
            "mirror_points": mirror,
        }


def portrait_points(
    positions: Tensor, faces: Tensor, params: HeadParameters, head: HeadModel, camera: Cameras
) -> tuple[Tensor, Tensor]:
    """`COLUMNS` (N, 8) float32 of canonical points in a portrait, and of their mirror images.

    `positions` (N, 3) meters and `faces` (N,) on the canonical head of `params`, of whose one frame the portrait is. ValueError
    for more frames or cameras, or parameters of another head model.
    """
    return _seen(_bound(positions, faces, params, head), params, camera)


@torch.no_grad()
def _bound(positions: Tensor, faces: Tensor, params: HeadParameters, head: HeadModel) -> Skinning:
    """Canonical points and, after them, their mirror images, on the head of `params`."""
    params, points = params.to(positions.device).to(torch.float64), positions.double()
    mirrored, mirrored_faces = mirror_images(points, faces, params, head)
    both, both_faces = torch.cat((points, mirrored)), torch.cat((faces, mirrored_faces))
    return Skinning(
        Placed(both, torch.ones_like(both), both.new_zeros(len(both), 4)), both_faces, params, head,
        opacities=both.new_zeros(len(both)), sh=both.new_zeros(len(both), 1, 3),
    )  # fmt: skip


@torch.no_grad()
def _seen(bound: Skinning, params: HeadParameters, camera: Cameras) -> tuple[Tensor, Tensor]:
    if (params.num_frames, len(camera)) != (1, 1):
        raise ValueError(f"a portrait has 1 frame and 1 camera, found {params.num_frames} and {len(camera)}")
    device, count = bound.faces.device, len(bound.faces) // 2
    params, camera = params.to(device).to(torch.float64), camera.to(device, torch.float64)
    seen = _project(bound.positions(params)[0], camera)
    mesh = _project(bound.head.pose(retarget(bound.own, params, bound.head)).vertices[0], camera)
    columns = _columns(seen, bound.faces, mesh, bound.head_faces, camera, count).float()
    return columns[:count], columns[count:]


# Places where a face reads the portrait: meters above it along its normal, and below that on the upright head. Hair stands off
# the skin, long hair hangs from it.
PLACES = ((0.0, 0.0), (0.01, 0.0), (0.025, 0.0), (0.045, 0.0), (0.01, 0.04), (0.01, 0.08), (0.01, 0.13))


@torch.no_grad()
def face_pixels(portrait: Portrait, head: HeadModel) -> Tensor:
    """What a point model with `read_portrait` is told of each face: (F, 74) float32.

    At each of `PLACES` above the posed face: red, green and blue times alpha, alpha, and how far the place lies behind the posed
    head mesh there in units of `LIMIT`. Then the cosine between the face's normal and the direction to the camera, and whether
    nothing hides the face. Then all of it for the mirrored face. Places outside the image read zeros.
    """
    params, camera = portrait.params.to(torch.float64), portrait.camera.to(head.device, torch.float64)
    faces = head.faces.to(head.device)
    vertices = head.pose(params).vertices[0]
    corners = vertices[faces]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = normals / normals.norm(dim=-1, keepdim=True).clamp(min=1e-20)
    up = axis_angle_to_matrix(params.rotation[0])[:, 1]
    places = [corners.mean(1) + height * normals - below * up for height, below in PLACES]
    seen, mesh = _project(torch.cat(places), camera), _project(vertices, camera)
    surface = mesh_depths(seen.pixels, mesh.pixels[faces], mesh.depths[faces])
    behind = ((seen.depths - surface).clamp(-LIMIT, LIMIT) / LIMIT)[:, None]
    size = seen.pixels.new_tensor((camera.width, camera.height))
    where = (2 * seen.pixels / size - 1).where(seen.depths[:, None] > NEAREST, -2.0)
    image = portrait.image.to(where)
    read = F.grid_sample(
        torch.cat((image[:3] * image[3:], image[3:]))[None], where[None, :, None], align_corners=False
    )[0, :, :, 0].T  # fmt: skip
    columns = torch.cat((read, behind), 1).unflatten(0, (len(PLACES), -1)).transpose(0, 1).flatten(1)
    to_camera = -seen.in_camera[: len(faces)] @ camera.viewmats[0, :3, :3]
    facing = F.cosine_similarity(normals, to_camera, dim=-1, eps=1e-30)
    inside = (where[: len(faces)].abs() < 1).all(1)
    visible = inside & (facing > 0) & (behind[: len(faces), 0] < TOLERANCE / LIMIT)
    own = torch.cat((columns, facing[:, None], visible[:, None].to(columns)), 1)
    return torch.cat((own, own[mirrored_faces(head).to(own.device)]), 1).float()


def mirror_images(positions: Tensor, faces: Tensor, params: HeadParameters, head: HeadModel) -> tuple[Tensor, Tensor]:
    """The mirror images (N, 3) of canonical points (N, 3), on the subject's own other side, and their faces (N,).

    The nearest point on the point's face is mirrored and moved to the nearest place on the mirrored face, and the point keeps its
    mirrored distance from there: a head need not be symmetric.
    """
    vertices, flip = head.canonical_vertices(params), positions.new_tensor(SAGITTAL)
    other = mirrored_faces(head).to(faces.device)[faces]
    anchors = nearest_on_faces(positions, faces, vertices, head.faces)
    return nearest_on_faces(anchors * flip, other, vertices, head.faces) + (positions - anchors) * flip, other


@functools.lru_cache(maxsize=4)
def mirrored_faces(head: HeadModel) -> Tensor:
    """(F,) the face of the template whose center is nearest to the mirrored center of each face."""
    centers = head.template.cpu().double()[head.faces.cpu()].mean(1)
    mirrored = centers * centers.new_tensor(SAGITTAL)
    return torch.cat([torch.cdist(rows, centers).argmin(1) for rows in mirrored.split(ROWS_AT_ONCE)])


class _Projected(NamedTuple):
    """Points before a camera."""

    in_camera: Tensor  # (N, 3) meters
    pixels: Tensor  # (N, 2)

    @property
    def depths(self) -> Tensor:
        return self.in_camera[:, 2]


def _project(points: Tensor, camera: Cameras) -> _Projected:
    viewmat, K = camera.viewmats[0], camera.Ks[0]
    in_camera = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    return _Projected(in_camera, (in_camera / in_camera[:, 2:].clamp(min=NEAREST)) @ K[:2].T)


def _columns(
    seen: _Projected, faces: Tensor, mesh: _Projected, head_faces: Tensor, camera: Cameras, count: int
) -> Tensor:
    """(M, 8) of M points, the first `count` of which are the avatar's and hide others."""
    corners = mesh.in_camera[head_faces[faces]]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    facing = -F.cosine_similarity(normals, seen.in_camera, dim=-1, eps=1e-30)
    surface = mesh_depths(seen.pixels, mesh.pixels[head_faces], mesh.depths[head_faces])
    behind_head = (seen.depths - surface).clamp(-LIMIT, LIMIT)
    behind_points = (seen.depths - _foremost(seen, count)).clamp(-LIMIT, LIMIT)
    u, v = (2 * seen.pixels / seen.pixels.new_tensor((camera.width, camera.height)) - 1).unbind(-1)
    in_image = (u.abs() < 1) & (v.abs() < 1) & (seen.depths > NEAREST)
    # A point that stands off the mesh, as hair does, is seen whatever the normal of its face.
    visible = in_image & (behind_head < TOLERANCE) & ((facing > 0) | (behind_head < -TOLERANCE))
    nowhere = torch.full_like(u, -2.0)
    u, v = (torch.where(seen.depths > NEAREST, axis, nowhere) for axis in (u, v))
    return torch.stack(
        (u, v, seen.depths, facing, behind_head, behind_points, surface.isfinite().to(u), visible.to(u)), -1
    )


def _foremost(seen: _Projected, count: int) -> Tensor:
    """(M,) the least depth of the first `count` points in the same cell of a grid, a few points in each."""
    own = seen.pixels[:count]
    if count == 0:
        return seen.depths
    low, high, side = own.amin(0), own.amax(0), max(1, math.isqrt(count // POINTS_PER_CELL))
    cells = ((seen.pixels - low) / (high - low).clamp(min=1e-9) * side).long().clamp(0, side - 1)
    index = cells[:, 0] * side + cells[:, 1]
    least = seen.depths.new_full((side * side,), math.inf)
    return least.scatter_reduce(0, index[:count], seen.depths[:count], "amin")[index]


def mesh_depths(pixels: Tensor, triangles: Tensor, depths: Tensor) -> Tensor:
    """(M,) depth of the nearest triangle at each of `pixels` (M, 2), inf where there is none.

    Exactly there, not at the middle of a pixel: `triangles` (F, 3, 2) pixels, `depths` (F, 3) meters, of which the inverses are
    linear in the image. Triangles that reach behind the camera are left out.
    """
    points, corners, inverse = (x.detach().double().cpu().numpy() for x in (pixels, triangles, 1 / depths))
    low, high = (points.min(0), points.max(0)) if len(points) else (np.zeros(2), np.zeros(2))
    side = max(1, math.isqrt(len(points)))
    step = np.maximum((high - low) / side, 1e-9)
    cells = np.clip((points - low) // step, 0, side - 1).astype(np.int64)
    index = cells[:, 1] * side + cells[:, 0]
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(side * side + 1))
    found = np.zeros(len(points))  # inverse depth
    _fill_inverse_depths(points, order, starts, low, step, side, np.ascontiguousarray(corners), inverse, found)
    with np.errstate(divide="ignore"):
        return torch.from_numpy(1 / found).to(pixels)


@compiled
def _fill_inverse_depths(points, order, starts, low, step, side, corners, inverse, found):
    """Write the largest inverse depth of the triangles over each point; cell c holds the points order[starts[c]:starts[c + 1]]."""
    for face in range(len(corners)):
        if min(inverse[face, 0], inverse[face, 1], inverse[face, 2]) <= 0:
            continue
        ax, ay, bx, by, cx, cy = (
            corners[face, 0, 0], corners[face, 0, 1], corners[face, 1, 0], corners[face, 1, 1], corners[face, 2, 0],
            corners[face, 2, 1],
        )  # fmt: skip
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0:
            continue
        left = max(0, min(side - 1, math.floor((min(ax, bx, cx) - low[0]) / step[0])))
        right = max(0, min(side - 1, math.floor((max(ax, bx, cx) - low[0]) / step[0])))
        top = max(0, min(side - 1, math.floor((min(ay, by, cy) - low[1]) / step[1])))
        bottom = max(0, min(side - 1, math.floor((max(ay, by, cy) - low[1]) / step[1])))
        for row in range(top, bottom + 1):
            for place in range(starts[row * side + left], starts[row * side + right + 1]):
                point = order[place]
                x, y = points[point, 0], points[point, 1]
                b = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) / area
                c = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / area
                a = 1 - b - c
                if min(a, b, c) >= -1e-9:  # no crack between neighbors
                    depth = a * inverse[face, 0] + b * inverse[face, 1] + c * inverse[face, 2]
                    found[point] = max(found[point], depth)
