"""The point level: the decoder runs once a point, and small heads spell the four tokens of that point.

Ids are those of the token level. In groups of four, `[pad, pad, pad, bos], [x, y, z, face], ..., [eos, pad, pad, pad]`, each group
is one position of the decoder, whose hidden state predicts the next group. A trunk with a small causal network behind it: FACE
(CVPR 2026) for meshes, RQ-Transformer, Moshi and CSM for audio and images.

The heads spell the slots in `config.slot_order`, each from the hidden state and the slots spelled before it, so the order inside a
point is free while the sequence stays sorted: by an MLP for each slot, which reads their sum, or by one transformer block over them
for all slots (`config.slot_head`). With `mesh_aware_faces` a face is described by where it lies on the subject's own mesh, both as
input and as key of the output; coordinates spelled after the face are offsets from its center.

Axes: B batch, S meshes, L tokens, G groups, F faces, C classes of a slot, D width. S divides B: B / S successive sequences have the
same mesh.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .configuration_pointillist import FACE_PIXELS, PointillistConfig

Y, FACE = 1, 3  # slots are x, y, z, face
LARGE = 2**26  # scores over faces beyond which they are computed row by row, and again for the gradient


class Faces(NamedTuple):
    """The faces of each subject's mesh."""

    embeds: Tensor  # (S, F, D), unit mean square before the learned gain
    bins: Tensor | None  # (S, F, 3) bins of their centers, with `mesh_aware_faces`


def group_tokens(ids: Tensor, fill: int, bos: int | None = None) -> Tensor:
    """Ids, labels or a mask (B, L) -> groups (B, G, 4) filled up with `fill`.

    A length that is a multiple of 4 means whole groups; otherwise bos is in the first column. Raises `ValueError` where `bos` is
    given and found elsewhere than at the end of a group.
    """
    lead = 3 if ids.shape[1] % 4 else 0
    groups = F.pad(ids, (lead, -(ids.shape[1] + lead) % 4), value=fill).unflatten(1, (-1, 4))
    if (
        bos is not None
        and not torch.compiler.is_compiling()
        and ids.device.type == "cpu"
        and (groups[..., :3] == bos).any()
    ):
        raise ValueError(
            'level="point" reads whole points: give ids that begin with bos and end after a face or eos, or groups of four '
            f"tokens with bos ({bos}) in the last place of its group; found {ids.tolist() if ids.numel() < 32 else ids.shape}"
        )
    return groups


def fourier(x: Tensor, octaves: int) -> Tensor:
    """(..., 3), about [-1, 1] -> sines and cosines (..., 6 * octaves)."""
    angles = (x[..., None] * (math.pi * 2.0 ** torch.arange(octaves, device=x.device))).flatten(-2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def smooth_rows(count: int, width: int, num_levels: int, std: float, device: torch.device) -> Tensor:
    """Rows (count, width) for levels in their order, neighbors alike: random Fourier features.

    Every channel is a wave over the levels with half a period up to a period in five of `num_levels`.
    """
    channels = torch.rand(2, width, device=device, dtype=torch.float32)
    periods = 0.5 * (0.4 * num_levels) ** channels[0]
    levels = torch.arange(count, device=device)[:, None] / num_levels
    return 2**0.5 * std * torch.cos(2 * math.pi * (periods * levels + channels[1]))


class PointEmbedding(nn.Module):
    """Groups (B, G, 4) of ids -> (B, G, D): the vector of the face plus a network of the coordinates; bos has its own vector."""

    def __init__(self, config: PointillistConfig):
        super().__init__()
        self.config = config
        self.octaves = (config.n_bins - 1).bit_length()
        width = config.hidden_size
        self.bos = nn.Parameter(torch.empty(width))
        self.face_rows = nn.Parameter(torch.empty(config.n_faces, width))
        self.face_norm = nn.RMSNorm(width, eps=1e-6)
        parts = 2 if config.mesh_aware_faces else 1  # coordinates, and their offsets from the face
        self.coordinates = network(6 * self.octaves * parts, width)
        self.coordinate_norm = nn.RMSNorm(width, eps=1e-6)
        if config.mesh_aware_faces:
            self.face_network = network(6 * self.octaves + 6 + FACE_PIXELS * config.read_portrait, width)

    def init_weights(self, std: float) -> None:
        init.normal_(self.bos)
        init.normal_(self.face_rows, std=std)

    def faces(
        self, face_centers: Tensor | None, face_normals: Tensor | None, face_pixels: Tensor | None = None
    ) -> Faces:
        """The faces of meshes with centers (S, F, 3) in bins and unit normals (S, F, 3); both None unless `mesh_aware_faces`.

        `face_pixels` (S, F, FACE_PIXELS): what they read of the portrait, with `read_portrait`.
        """
        rows = self.face_rows[None]
        if not self.config.mesh_aware_faces:
            return Faces(self.face_norm(rows), None)
        if face_centers is None or face_normals is None:
            raise ValueError(
                "this model has mesh_aware_faces: give face_centers and face_normals (B, F, 3), which "
                "tokenizer(head_vertices=..., head_faces=...) makes"
            )
        expected = (len(face_centers), self.config.n_faces, 3)
        if tuple(face_centers.shape) != expected or tuple(face_normals.shape) != expected:
            raise ValueError(
                f"face_centers {tuple(face_centers.shape)} and face_normals {tuple(face_normals.shape)} are not those of the "
                f"{self.config.n_faces} faces of this model's head, {expected}: give the head model it was trained on"
            )
        unit = face_centers.float() * (2 / self.config.n_bins) - 1
        described = torch.cat((fourier(unit, self.octaves), unit, face_normals.float()), dim=-1)
        if self.config.read_portrait:
            if face_pixels is None or tuple(face_pixels.shape) != (*expected[:2], FACE_PIXELS):
                found = None if face_pixels is None else tuple(face_pixels.shape)
                raise ValueError(
                    f"this model reads the portrait at the faces: give face_pixels {(*expected[:2], FACE_PIXELS)}, which "
                    f"gaussian_tokenizer.rendering.face_pixels makes, found {found}"
                )
            described = torch.cat((described, face_pixels.float()), dim=-1)
        bins = face_centers.floor().long().clamp(0, self.config.n_bins - 1)
        return Faces(self.face_norm(rows + self.face_network(described.to(rows.dtype))), bins)

    def forward(self, groups: Tensor, faces: Faces) -> Tensor:
        config = self.config
        is_point = groups[..., FACE] < config.first_special
        points = torch.where(is_point[..., None], groups, 0)
        face = (points[..., FACE] - config.n_bins).clamp(min=0)
        bins = points[..., :FACE].clamp(max=config.n_bins - 1)
        described = fourier((2 * bins + 1) / config.n_bins - 1, self.octaves)
        if faces.bins is not None:
            offset = bins - rows_of(faces.bins, face)
            described = torch.cat((described, fourier(2 * offset / config.n_bins, self.octaves)), dim=-1)
        coordinates = self.coordinate_norm(self.coordinates(described.to(self.bos.dtype)))
        return torch.where(is_point[..., None], rows_of(faces.embeds, face) + coordinates, self.bos)


class SlotHead(nn.Module):
    """One slot: context (..., D) -> state (..., D) -> scores (..., C), and a value to a vector (..., D) for the slots after it.

    Classes are bins or faces, and the end as one more in the slot that is spelled first. A coordinate spelled after the face of a
    mesh-aware model is scored by its offset from the bin of that face's center, any other y by its offset from the y of the
    previous point, which it mostly repeats: points are sorted by y first.
    """

    def __init__(self, config: PointillistConfig, slot: int):
        super().__init__()
        place, face_place = config.slots.index(slot), config.slots.index(FACE)
        self.config, self.slot = config, slot
        self.has_end, self.is_last = place == 0, place == FACE
        self.from_face = config.mesh_aware_faces and place > face_place
        self.is_offset = self.from_face or slot == Y
        width = config.hidden_size
        self.has_network = config.slot_head == "mlp"
        if self.has_network:
            self.norm = nn.RMSNorm(width, eps=1e-6)
            self.network = network(width, width)
        self.state_norm = nn.RMSNorm(width, eps=1e-6)
        classes = 0 if slot == FACE else 2 * config.n_bins - 1 if self.is_offset else config.n_bins
        if classes + self.has_end:
            self.weight = nn.Parameter(torch.empty(classes + self.has_end, width))
        if not self.is_last:
            self.read_norm = nn.RMSNorm(width, eps=1e-6)

    def init_weights(self, std: float) -> None:
        if hasattr(self, "weight"):
            count, width = self.weight.shape
            rows = smooth_rows(count, width, self.config.n_bins, std, self.weight.device)
            init.copy_(self.weight, rows.to(self.weight))

    def state(self, context: Tensor) -> Tensor:
        return self.state_norm(context + self.network(self.norm(context)) if self.has_network else context)

    def keys(self, embeds: Tensor) -> Tensor:
        """What a state is multiplied by to score faces with the vectors (B or 1, F, D); computed once for a generation."""
        return embeds * self.config.hidden_size**-0.5

    def scores(self, state: Tensor, embeds: Tensor, origin: Tensor, keys: Tensor | None = None) -> Tensor:
        """States (B, G, D), the faces' vectors and the bin (B, G) that offsets count from -> scores (B, G, C)."""
        if self.slot == FACE:
            keys = self.keys(embeds) if keys is None else keys
            together = state.reshape(len(keys), -1, state.shape[-1])  # one product for all that have the same mesh
            scores = (together @ keys.mT).view(*state.shape[:-1], -1)
            return torch.cat((scores, F.linear(state, self.weight)), dim=-1) if self.has_end else scores
        scores = F.linear(state, self.weight)
        if not self.is_offset:
            return scores
        n_bins = self.config.n_bins
        levels = torch.arange(n_bins, device=state.device) + n_bins - 1 - origin[..., None]
        bins = scores.gather(-1, levels)
        return torch.cat((bins, scores[..., -1:]), dim=-1) if self.has_end else bins

    def read(self, value: Tensor, embeds: Tensor, origin: Tensor) -> Tensor:
        """The vector (B, G, D) of classes (B, G); the end is read as class 0, since nothing is spelled after it."""
        if self.slot == FACE:
            return self.read_norm(rows_of(embeds, value % self.config.n_faces))
        value = value % self.config.n_bins
        if self.is_offset:
            value = value + self.config.n_bins - 1 - origin
        return self.read_norm(F.embedding(value, self.weight))

    def origin(self, faces: Faces, face: Tensor, previous_y: Tensor) -> Tensor:
        """The bin (B, G) that offsets count from, given the point's face, if it is spelled already, and the last point's y."""
        if not self.from_face:
            return previous_y
        assert faces.bins is not None
        return rows_of(faces.bins, face % self.config.n_faces)[..., self.slot]

    def nll(self, state: Tensor, target: Tensor, embeds: Tensor, origin: Tensor) -> Tensor:
        """Cross-entropy (B, G) of classes (B, G), zero where a class is negative."""

        def of(state: Tensor, target: Tensor, embeds: Tensor) -> Tensor:
            scores = self.scores(state, embeds, origin).float()
            return F.cross_entropy(scores.mT, target, ignore_index=-100, reduction="none")

        if self.slot != FACE or target.numel() * self.config.n_faces <= LARGE:
            return of(state, target, embeds)
        own = [table for table in embeds.split(1) for _ in range(len(state) // len(embeds))]
        rows = zip(state.split(1), target.split(1), own)
        return torch.cat([checkpoint(of, *row, use_reentrant=False) for row in rows])


class SlotAttention(nn.Module):
    """`slot_head="attention"`: a causal pre-norm transformer block over the inputs (..., P, D), P up to 4, of a point's slots.

    The MLP alone has about as many parameters as those of the four slots together, which this block takes the place of.
    """

    def __init__(self, config: PointillistConfig):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        inner = self.num_heads * config.head_dim
        self.places = nn.Parameter(torch.empty(4, width))
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def init_weights(self, std: float) -> None:
        init.normal_(self.places, std=std)

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs + self.places[: inputs.shape[-2]]
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (each.transpose(-3, -2) for each in qkv.unbind(-3))  # (..., H, P, head_dim)
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        x = x + self.output((scores.softmax(-1).to(v.dtype) @ v).transpose(-3, -2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class SlotHeads(nn.Module):
    """The four heads in the order in which they spell: what follows the decoder in place of a vocabulary head."""

    def __init__(self, config: PointillistConfig):
        super().__init__()
        self.config = config
        self.order = config.slots
        self.heads: Any = nn.ModuleList(SlotHead(config, slot) for slot in range(4))
        self.attention = SlotAttention(config) if config.slot_head == "attention" else None

    def classes(self, groups: Tensor) -> Tensor:
        """Ids or labels of points (B, G, 4) -> classes (B, G, 4), the end in the slot spelled first; -100 where there is none."""
        offset = torch.tensor([0, 0, 0, self.config.n_bins], device=groups.device)
        classes = torch.where((groups >= 0) & (groups < self.config.first_special), groups - offset, -100)
        end = self.config.n_faces if self.order[0] == FACE else self.config.n_bins
        first = classes[..., self.order[0]].masked_fill(groups[..., 0] == self.config.first_special + 1, end)
        return classes.index_copy(-1, torch.tensor([self.order[0]], device=groups.device), first[..., None])

    def contexts(self, inputs: Iterable[Tensor]) -> Iterable[Tensor]:
        """Hidden state and vectors of the slots spelled so far, each (B, G, D) -> contexts (B, G, D) of these and of the next."""
        if self.attention is None:
            return accumulate(inputs)
        return self.attention(torch.stack(tuple(inputs), dim=-2)).unbind(-2)

    def states(self, hidden: Tensor, targets: "Targets", faces: Faces) -> Tensor:
        """Hidden states (B, G, D) and the groups they predict -> states (B, G, 4, D), by teacher forcing."""

        def inputs() -> Iterator[Tensor]:
            yield hidden
            for slot in self.order[:-1]:
                head = self.heads[slot]
                origin = head.origin(faces, targets.face, targets.previous_y)
                yield head.read(targets.classes[..., slot].clamp(min=0), faces.embeds, origin)

        states = {slot: self.heads[slot].state(context) for slot, context in zip(self.order, self.contexts(inputs()))}
        return torch.stack([states[slot] for slot in range(4)], dim=-2)

    def targets(self, following: Tensor, groups: Tensor) -> "Targets":
        """What the groups (B, G, 4) before `following` (B, G, 4) predict."""
        classes = self.classes(following)
        previous_y = torch.where(groups[..., FACE] < self.config.first_special, groups[..., Y], 0)
        return Targets(classes, classes[..., FACE].clamp(min=0), previous_y)

    def nll(self, states: Tensor, labels: Tensor, targets: "Targets", faces: Faces) -> Tensor:
        """Cross-entropy (B, G, 4) of states (B, G, 4, D) and the classes of labels (B, G, 4), zero where one is negative."""
        nll = []
        for slot, head in enumerate(self.heads):
            origin = head.origin(faces, targets.face, targets.previous_y)
            nll.append(head.nll(states[..., slot, :], labels[..., slot], faces.embeds, origin))
        return torch.stack(nll, dim=-1)

    def logits(self, states: Tensor, targets: "Targets", faces: Faces) -> Tensor:
        """States (B, G, 4, D) -> (B, G, 4, vocabulary), minus infinity outside of a slot.

        The end is in slot x, where its token is, whichever slot is spelled first.
        """
        config = self.config
        logits = states.new_full((*states.shape[:3], config.first_special + 3), -torch.inf)
        for slot, head in enumerate(self.heads):
            scores = head.scores(
                states[..., slot, :], faces.embeds, head.origin(faces, targets.face, targets.previous_y)
            )
            begin, count = (config.n_bins, config.n_faces) if slot == FACE else (0, config.n_bins)
            logits[..., slot, begin : begin + count] = scores[..., :count]
            if head.has_end:
                ended = targets.classes[..., self.order[0]] == count
                logits[..., slot, config.first_special + 1] = scores[..., count]
                # An end is the token of slot x, so its distribution is that of the slot in which it is decided.
                logits[..., 0, :] = torch.where(ended[..., None], logits[..., slot, :], logits[..., 0, :])
        return logits


class Targets(NamedTuple):
    """The groups that are predicted."""

    classes: Tensor  # (B, G, 4), the end in the slot spelled first; -100 where there is none
    face: Tensor  # (B, G)
    previous_y: Tensor  # (B, G) bin of the point before, zero if there is none


def network(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows (B, G, D) of tables (S, F, D) at indices (B, G), B / S successive rows of indices into the same table."""
    if len(table) == 1:
        return F.embedding(index, table[0])
    together = index.reshape(len(table), -1, 1).expand(-1, -1, table.shape[-1])
    return table.gather(1, together).view(*index.shape, -1)
