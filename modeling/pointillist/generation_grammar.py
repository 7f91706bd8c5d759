"""The grammar of a sequence, `bos, (x, y, z, face)*, eos` with points sorted by (y, z, x, face), as a logits processor."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .configuration_pointillist import PointillistConfig


class PointGrammar(LogitsProcessor):
    """Masks every token that the sequence so far does not allow.

    A wrong slot, a point before its predecessor (with `sorted_points`: Meshtron's order-enforced sampling), an end within a point
    or before `min_points`, or a point beyond `max_points` or `max_points_per_face`. There are no dead ends: a coordinate is allowed
    only if the point can still be completed, and where no further point fits the sequence must end. It is tensor arithmetic on
    the last eight ids: no host synchronization, any batch, prompts padded on the left.
    """

    def __init__(
        self,
        config: PointillistConfig,
        sorted_points: bool = True,
        min_points: int = 1,
        max_points: int | None = None,
        max_points_per_face: int | None = None,
    ):
        if min_points < 0 or (max_points is not None and max_points < max(min_points, 1)):
            raise ValueError(f"need 0 <= min_points <= max_points >= 1, found {min_points} and {max_points}")
        if max_points_per_face is not None and max_points_per_face < 1:
            raise ValueError(f"max_points_per_face must be at least 1, found {max_points_per_face}")
        self.n_bins, self.n_faces = config.n_bins, config.n_faces
        self.bos, self.eos = config.first_special, config.first_special + 1
        self.sorted_points = sorted_points
        self.min_points, self.max_points = min_points, max_points
        self.max_points_per_face = max_points_per_face

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B, L) so far, scores (B, vocabulary) of the next token -> scores with minus infinity on what is not allowed."""
        length = input_ids.shape[1]
        device = input_ids.device
        start = (input_ids == self.bos).int().argmax(1) + 1  # column after bos
        written = length - start  # tokens after bos
        slot, points = written % 4, written // 4

        # The last complete point and the coordinates written since, gathered by column (clamped: unused where points == 0).
        columns = (start + 4 * (points - 1))[:, None] + torch.arange(8, device=device)
        recent = input_ids.gather(1, columns.clamp(0, length - 1))
        (px, py, pz, pface), (x, y) = recent[:, :4].unbind(1), recent[:, 4:6].unbind(1)
        z = recent[:, 6]
        last = self.n_bins - 1
        has_previous = (points > 0) & self.sorted_points

        # At the place of the last point a face must not come before that point's.
        open_faces = self.open_faces(input_ids, start, points)  # (B or 1, F)
        face_ids = torch.arange(self.n_faces, device=device) + self.n_bins
        same_place = has_previous & (x == px) & (y == py) & (z == pz)
        face_from = torch.where(same_place, pface, self.n_bins)
        tie_possible = (open_faces & (face_ids >= pface[:, None])).any(1)

        # The least x, z, y that still allow a completion: ties reach down the order y, z, x, face.
        tie_x = px + (~tie_possible).long()  # least x on the last point's y and z
        tie_z = pz + (x < tie_x).long()  # least z on its y, given x
        tie_y = py + (tie_z > last).long()  # least y, given x
        x_from = tie_x.where(has_previous & (py == last) & (pz == last), 0)
        y_from = tie_y.where(has_previous, 0)
        z_from = tie_z.where(has_previous & (y == py), 0)

        low = torch.stack((x_from, y_from, z_from, face_from)).gather(0, slot[None])[0]
        high = torch.where(slot == 3, self.bos, self.n_bins)
        ids = torch.arange(scores.shape[1], device=device)
        allowed = (ids >= low[:, None]) & (ids < high[:, None])
        allowed[:, self.n_bins : self.bos] &= (slot != 3)[:, None] | open_faces

        # The end: between points only; the only way out when no further point is allowed.
        between = slot == 0
        room = open_faces.any(1) & (x_from <= last)
        if self.max_points is not None:
            room &= points < self.max_points
        allowed &= (~between | room)[:, None]
        # A finished row is padded by the caller whatever its scores are; keep one of them finite.
        finished = input_ids[:, -1] > self.bos
        allowed[:, self.eos] = between & ((points >= self.min_points) | ~room) | finished
        return scores.masked_fill(~allowed, -torch.inf)

    def open_faces(self, input_ids: Tensor, start: Tensor, points: Tensor) -> Tensor:
        """(B, F) True where a face may take another point, or (1, F) where faces have no limit."""
        if self.max_points_per_face is None:
            return torch.ones(1, self.n_faces, dtype=torch.bool, device=input_ids.device)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        offset = columns - start[:, None]
        is_face = (offset >= 0) & (offset % 4 == 3) & (offset < 4 * points[:, None])
        faces = (input_ids - self.n_bins).clamp(0, self.n_faces - 1)
        counts = torch.zeros(len(input_ids), self.n_faces, dtype=torch.long, device=input_ids.device)
        counts.scatter_add_(1, faces, is_face.long())
        return counts < self.max_points_per_face
