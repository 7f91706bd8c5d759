"""Closest points on triangles, their barycentric coordinates, and what is interpolated with them."""

import torch
from torch import Tensor


def closest_point_barycentrics(points: Tensor, triangles: Tensor) -> Tensor:
    """Barycentric coordinates (N, 3) of the point of each triangle (N, 3, 3) that is closest to `points` (N, 3).

    All three are >= 0 and sum to 1. Degenerate triangles (a line, a point) are answered too.
    """
    candidates = [_edge_barycentrics(points, triangles, start) for start in range(3)]
    inside = _plane_barycentrics(points, triangles)
    is_inside = (inside >= 0).all(-1)
    # Where the foot on the plane is outside, it stands in for a candidate that the edges must beat.
    candidates.append(torch.where(is_inside[:, None], inside, candidates[0]))
    stacked = torch.stack(candidates, dim=1)  # (N, 4, 3)
    feet = torch.einsum("nkc,nci->nki", stacked, triangles)
    best = (feet - points[:, None]).square().sum(-1).argmin(1)
    return stacked[torch.arange(len(points), device=points.device), best]


def nearest_on_faces(points: Tensor, point_faces: Tensor, vertices: Tensor, faces: Tensor) -> Tensor:
    """The nearest point (N, 3) on the face that each of `points` (N, 3) is bound to, of the mesh `vertices` (V, 3)."""
    triangles = vertices[faces[point_faces]]  # (N, 3, 3)
    return torch.einsum("nc,nci->ni", closest_point_barycentrics(points, triangles), triangles)


def interpolate(per_vertex: Tensor, head_faces: Tensor, point_faces: Tensor, barycentrics: Tensor) -> Tensor:
    """(V, ...) values of vertices -> (N, ...) of points: `head_faces` (F, 3), `point_faces` (N,), `barycentrics` (N, 3)."""
    corners = per_vertex[head_faces[point_faces]]  # (N, 3, ...)
    return torch.einsum("nc,nc...->n...", barycentrics, corners)


def _edge_barycentrics(points: Tensor, triangles: Tensor, start: int) -> Tensor:
    """Barycentrics of the closest point of the edge from corner `start` to the next one."""
    end = (start + 1) % 3
    edge = triangles[:, end] - triangles[:, start]
    along = ((points - triangles[:, start]) * edge).sum(-1) / edge.square().sum(-1).clamp(min=1e-20)
    along = along.clamp(0, 1)
    corners = [torch.zeros_like(along)] * 3
    corners[start], corners[end] = 1 - along, along
    return torch.stack(corners, dim=-1)


def _plane_barycentrics(points: Tensor, triangles: Tensor) -> Tensor:
    """Barycentrics of the foot of each point on its triangle's plane; of a degenerate triangle, ones outside it."""
    first, second = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    normal = torch.linalg.cross(first, second)
    offset = points - triangles[:, 0]
    area = normal.square().sum(-1)
    flat = area <= 1e-30
    area = torch.where(flat, torch.ones_like(area), area)
    b1 = (torch.linalg.cross(offset, second) * normal).sum(-1) / area
    b2 = (torch.linalg.cross(first, offset) * normal).sum(-1) / area
    inside = torch.stack((1 - b1 - b2, b1, b2), dim=-1)
    return torch.where(flat[:, None], -torch.ones_like(inside), inside)
