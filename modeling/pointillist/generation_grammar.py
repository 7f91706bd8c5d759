"""The grammar of a sequence, `bos, (x, y, z, face)*, eos` with points sorted by (y, z, x, face), at both levels of the model.

A point's tokens may stand in another order (`token_order`); the sorting is the same.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .configuration_pointillist import PointillistConfig

SORTED = (1, 2, 0, 3)  # slots y, z, x, face: most significant first


class Room(NamedTuple):
    """What the points so far leave to the next."""

    open_faces: Tensor | None  # (B, F) faces that may take another point; None: all
    most: Tensor  # (B or 1, 4) greatest value of each slot, -1 where no face is open


class PointGrammar(LogitsProcessor):
    """Masks every token that the sequence so far does not allow.

    A wrong slot, a point before its predecessor (with `sorted_points`: Meshtron's order-enforced sampling), an end within a point
    or before `min_points`, or a point beyond `max_points` or `max_points_per_face`. There are no dead ends: a value is allowed only
    if the point can still be completed, and where no further point fits the sequence must end. It is tensor arithmetic on the
    last eight ids: no host synchronization, any batch, prompts padded on the left.

    Points are sorted by a number of which their slots are the digits. With the greatest values in all slots that are not known yet
    a point's number exceeds that of the point before by its slack: by so much, in units of its digit, may a slot be lowered.

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
        if config.n_bins**3 * config.n_faces >= 2**63:
            raise ValueError(
                f"n_bins={config.n_bins} and n_faces={config.n_faces} make more points than 64 bits can "
                "number, by which they are sorted: take fewer bins"
            )
        self.n_bins, self.n_faces = config.n_bins, config.n_faces
        self.bos, self.eos = config.first_special, config.first_special + 1
        self.slots, self.slot_columns, self.face_column = config.slots, config.slot_columns, config.slot_columns[3]
        self.sorted_points = sorted_points
        self.min_points, self.max_points = min_points, max_points
        self.max_points_per_face = max_points_per_face
        self.follow = False
        self.start: Tensor | None = None  # (B,) column after bos
        self.left: Tensor | None = None  # (B, F) points that each face may still take, where that is limited
        self.sizes = config.n_bins, config.n_bins, config.n_bins, config.n_faces
        self.units = tuple(math.prod(self.sizes[i] for i in SORTED[SORTED.index(slot) + 1 :]) for slot in range(4))
        self.device: torch.device | None = None  # that of the constants

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B, L) so far, scores (B, vocabulary) of the next token -> scores with minus infinity on what is not allowed."""
        length = input_ids.shape[1]
        if self.start is None or not self.follow:
            self.start = (input_ids == self.bos).int().argmax(1) + 1
            written = length - self.start
            self.count(input_ids, written)
        else:
            written = length - self.start
            is_face = (written - 1) % 4 == self.face_column
            self.add(input_ids[:, -1] - self.n_bins, is_face & (input_ids[:, -1] < self.bos))
        place, points = (written % 4)[:, None], (written // 4)[:, None]
        slot = self.slot_of_place[place]

        # The last complete point and the tokens since, gathered by column (clamped: unused where points == 0), slot by slot.
        columns = self.start[:, None] + 4 * (points - 1) + self.columns
        ids = input_ids.gather(1, columns.clamp(0, length - 1)).unflatten(1, (2, 4)) - self.offset
        previous, point = ids.unbind(1)
        room = self.room()
        best, slack = self.slack(room, torch.where(points > 0, previous, 0), point, self.columns[:4] < place)
        least = (best.gather(1, slot) - slack[:, None] // self.unit_of_slot[slot]).clamp(min=0)

        is_face = slot == 3
        low, high = torch.where(is_face, least + self.n_bins, least), torch.where(is_face, self.bos, self.n_bins)
        allowed = (self.tokens >= low) & (self.tokens < high)
        if room.open_faces is not None:
            allowed[:, self.n_bins : self.bos] &= ~is_face | room.open_faces
        has_room = self.has_room(room, slack, points[:, 0])
        between = place[:, 0] == 0
        allowed &= (~between | has_room)[:, None]
        # A finished row is padded by the caller whatever its scores are; keep one of them finite.
        finished = input_ids[:, -1] > self.bos
        allowed[:, self.eos] = (between & ((points[:, 0] >= self.limits[0]) | ~has_room)) | finished
        return scores.masked_fill(~allowed, -torch.inf)

    def allowed(
        self, slot: int, is_first: bool, room: Room, previous: Tensor, points: Tensor, point: Tensor, known: Tensor
    ) -> Tensor:
        """What a slot may hold at the point level: (B, C) bool over bins or faces, and the end if the slot `is_first` spelled.

        `previous` and `point` (B, 4) are bins and faces from zero: the last of the `points` (B,) so far, zero if there is none, and
        the next, of which `known` (B, 4) says which slots are there. Room is that before the point.
        """
        best, slack = self.slack(room, previous, point, known)
        allowed = self.tokens[: self.sizes[slot]] >= (best[:, slot] - slack // self.units[slot])[:, None]
        if slot == 3 and room.open_faces is not None:
            allowed = allowed & room.open_faces
        if not is_first:
            return allowed
        has_room = self.has_room(room, slack, points)
        begun = known.any(1)  # by the prompt: such a point cannot be the end
        may_end = ((points >= self.limits[0]) | ~has_room) & ~begun
        return torch.cat((allowed & (has_room | begun)[:, None], may_end[:, None]), dim=1)

    def slack(self, room: Room, previous: Tensor, point: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The greatest point (B, 4) with the `known` slots, and by how much (B,) its number exceeds that of `previous`."""
        best = torch.where(known, point, room.most)
        return best, ((best - previous if self.sorted_points else best) * self.unit_of_slot).sum(1)

    def has_room(self, room: Room, slack: Tensor, points: Tensor) -> Tensor:
        """Whether one more point may follow (B,)."""
        fits = (slack >= 0) & (points < self.limits[1])
        return fits if room.open_faces is None else fits & (room.most[:, 3] >= 0)

    def count(self, ids: Tensor, written: Tensor) -> None:
        """Begin with sequences (B, L) of which the last `written` (B,) ids come after bos: count the points of each face."""
        self.place_constants(ids.device)
        if self.max_points_per_face is None:
            return
        place = torch.arange(ids.shape[1], device=ids.device) - (ids.shape[1] - written)[:, None]
        is_face = (place >= 0) & (place % 4 == self.face_column)
        self.left = torch.full((len(ids), self.n_faces), self.max_points_per_face, device=ids.device)
        self.left.scatter_add_(1, (ids - self.n_bins).clamp(0, self.n_faces - 1), -is_face.long())

    def place_constants(self, device: torch.device) -> None:
        """Make what every step reads once: a number that the host makes in a step waits for the device."""
        if device == self.device:
            return
        self.device = device
        self.tokens = torch.arange(self.eos + 2, device=device)
        self.columns = torch.tensor([place + point for point in (0, 4) for place in self.slot_columns], device=device)
        self.slot_of_place = torch.tensor(self.slots, device=device)
        self.offset = torch.tensor([0, 0, 0, self.n_bins], device=device)
        self.unit_of_slot = torch.tensor(self.units, device=device)
        most = torch.iinfo(torch.long).max if self.max_points is None else self.max_points
        self.limits = torch.tensor([self.min_points, most], device=device)
        self.most = torch.tensor([[size - 1 for size in self.sizes]], device=device)

    def add(self, face: Tensor, is_new: Tensor) -> None:
        """Count one more point on `face` (B,) where `is_new` (B,)."""
        if self.left is not None:
            self.left.scatter_add_(1, face.clamp(0, self.n_faces - 1)[:, None], -is_new.long()[:, None])

    def room(self) -> Room:
        if self.left is None:
            return Room(None, self.most)
        open_faces = self.left > 0
        face = torch.where(open_faces, self.tokens[: self.n_faces], -1).amax(1, keepdim=True)
        return Room(open_faces, torch.cat((self.most[:, :3].expand(len(face), -1), face), dim=1))
