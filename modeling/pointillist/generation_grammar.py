"""The grammar of a sequence, `bos, (x, y, z, face)*, eos` with points sorted by (y, z, x, face), at both levels of the model.

A point's tokens may stand in another order (`token_order`); the sorting is the same.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .configuration_pointillist import PointillistConfig

SORTED = (1, 2, 0, 3)  # slots y, z, x, face: most significant first


def least_value(slot: int, previous: Tensor, point: Tensor, known: Tensor, most: Tensor) -> Tensor:
    """Least values (B,) of a slot with which a point can still be completed to one that is not before `previous`.

    `previous` and `point` (B, 4) are bins and faces from zero, `known` (B, 4) says which of `point` are there, `most` (B, 4) are
    the greatest values of the others. Where no value will do, the result is beyond all of them.
    """
    best = torch.where(known, point, most)
    ahead, level = best > previous, best == previous
    place = SORTED.index(slot)
    reached = torch.ones_like(ahead[:, 0])
    for other in reversed(SORTED[place + 1 :]):
        reached = ahead[:, other] | (level[:, other] & reached)
    least = previous[:, slot] + (~reached).long()
    for other in reversed(SORTED[:place]):
        least = torch.where(level[:, other], least, torch.where(ahead[:, other], 0, torch.iinfo(torch.long).max))
    return least


class PointGrammar(LogitsProcessor):
    """Masks every token that the sequence so far does not allow.

    A wrong slot, a point before its predecessor (with `sorted_points`: Meshtron's order-enforced sampling), an end within a point
    or before `min_points`, or a point beyond `max_points` or `max_points_per_face`. There are no dead ends: a value is allowed only
    if the point can still be completed, and where no further point fits the sequence must end. It is tensor arithmetic on the
    last eight ids: no host synchronization, any batch, prompts padded on the left.

    Every call reads the sequence anew, unless `follow` is set: then calls are for one token more each, and the work does not grow
    with the sequence.
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
        self.slots, self.face_column = config.slots, config.slot_columns[3]
        self.columns, self.first_ids = torch.tensor(config.slot_columns), torch.tensor([0, 0, 0, config.n_bins])
        self.sorted_points = sorted_points
        self.min_points, self.max_points = min_points, max_points
        self.max_points_per_face = max_points_per_face
        self.follow = False
        self.start: Tensor | None = None  # (B,) column after bos
        self.counts: Tensor | None = None  # (B, F) points of each face, where that is limited

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B, L) so far, scores (B, vocabulary) of the next token -> scores with minus infinity on what is not allowed."""
        length, device = input_ids.shape[1], input_ids.device
        if self.start is None or not self.follow:
            self.start = (input_ids == self.bos).int().argmax(1) + 1
            written = length - self.start
            self.count(input_ids, written)
            self.columns, self.first_ids = self.columns.to(device), self.first_ids.to(device)
        else:
            written = length - self.start
            is_face = (written - 1) % 4 == self.face_column
            self.add(input_ids[:, -1] - self.n_bins, is_face & (input_ids[:, -1] < self.bos))
        place, points = written % 4, written // 4

        # The last complete point and the tokens since, gathered by column (clamped: unused where points == 0), slot by slot.
        columns = (self.start + 4 * (points - 1))[:, None] + torch.cat((self.columns, self.columns + 4))
        own = input_ids.gather(1, columns.clamp(0, length - 1)).unflatten(1, (2, 4)) - self.first_ids
        previous, point = own.unbind(1)
        previous = torch.where((points > 0)[:, None], previous, 0)
        known = self.columns < place[:, None]
        open_faces = self.open_faces(len(input_ids), device)
        most = self.most(open_faces)
        previous = previous if self.sorted_points else torch.zeros_like(previous)
        least = torch.stack([least_value(slot, previous, point, known, most) for slot in self.slots], 1)
        least = least.gather(1, place[:, None])

        ids = torch.arange(scores.shape[1], device=device)
        is_face = (place == self.face_column)[:, None]
        allowed = torch.where(is_face, ids - self.n_bins >= least, (ids >= least) & (ids < self.n_bins)) & (
            ids < self.bos
        )
        allowed[:, self.n_bins : self.bos] &= ~is_face | open_faces
        room = open_faces.any(1) & (least[:, 0] <= most[:, self.slots[0]])
        if self.max_points is not None:
            room &= points < self.max_points
        between = place == 0
        allowed &= (~between | room)[:, None]
        # A finished row is padded by the caller whatever its scores are; keep one of them finite.
        finished = input_ids[:, -1] > self.bos
        allowed[:, self.eos] = (between & ((points >= self.min_points) | ~room)) | finished
        return scores.masked_fill(~allowed, -torch.inf)

    def allowed(
        self, slot: int, is_first: bool, previous: Tensor, points: Tensor, point: Tensor, known: Tensor
    ) -> Tensor:
        """What a slot may hold at the point level: (B, C) bool over bins or faces, and the end if the slot `is_first` spelled.

        `previous` (B, 4) is the last of the `points` (B,) so far, zero if there is none; the others are as in `least_value`.
        """
        open_faces = self.open_faces(len(point), point.device)
        most = self.most(open_faces)
        previous = previous if self.sorted_points else torch.zeros_like(previous)
        least = least_value(slot, previous, point, known, most)
        count = self.n_faces if slot == 3 else self.n_bins
        allowed = torch.arange(count, device=point.device) >= least[:, None]
        if slot == 3:
            allowed = allowed & open_faces
        if not is_first:
            return allowed
        room = open_faces.any(1) & (least <= most[:, slot])
        if self.max_points is not None:
            room = room & (points < self.max_points)
        begun = known.any(1)  # by the prompt: such a point cannot be the end
        may_end = ((points >= self.min_points) | ~room) & ~begun
        return torch.cat((allowed & (room | begun)[:, None], may_end[:, None]), dim=1)

    def count(self, ids: Tensor, written: Tensor) -> None:
        """Count the points of each face in sequences (B, L) of which the last `written` (B,) ids come after bos."""
        if self.max_points_per_face is None:
            return
        place = torch.arange(ids.shape[1], device=ids.device) - (ids.shape[1] - written)[:, None]
        is_face = (place >= 0) & (place % 4 == self.face_column)
        self.counts = torch.zeros(len(ids), self.n_faces, dtype=torch.long, device=ids.device)
        self.counts.scatter_add_(1, (ids - self.n_bins).clamp(0, self.n_faces - 1), is_face.long())

    def add(self, face: Tensor, is_new: Tensor) -> None:
        """Count one more point on `face` (B,) where `is_new` (B,)."""
        if self.counts is not None:
            self.counts.scatter_add_(1, face.clamp(0, self.n_faces - 1)[:, None], is_new.long()[:, None])

    def open_faces(self, batch: int, device: torch.device) -> Tensor:
        """(B, F) True where a face may take another point."""
        if self.counts is None or self.max_points_per_face is None:
            return torch.ones(1, self.n_faces, dtype=torch.bool, device=device).expand(batch, -1)
        return self.counts < self.max_points_per_face

    def most(self, open_faces: Tensor) -> Tensor:
        """The greatest value (B, 4) of each slot; -1 where no face is open."""
        faces = torch.arange(self.n_faces, device=open_faces.device)
        most = torch.where(open_faces, faces, -1).amax(1)
        return torch.stack([torch.full_like(most, self.n_bins - 1)] * 3 + [most], 1)
