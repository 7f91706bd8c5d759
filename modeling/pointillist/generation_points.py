"""The decoding loop of the point level: a step of the decoder a point, whose tokens the slot heads spell one after the other.

Ids, arguments and results are those of the token level. Logits processors of the caller see the sequence up to the last whole
point, and scores that are minus infinity outside of a slot.

Axes: B batch, L tokens, G groups of four tokens (bos, then the points), C classes of a slot, D width.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from .configuration_pointillist import FACE_INPUTS
from .generation_pointillist import (
    STOP_CHECK_EVERY,
    PointillistGenerateOutput,
    PointLoop,
    every_rank_finished,
    whole_points,
)
from .generation_ring_cache import RingCache, ring_mask
from .generation_sampling import Sampler
from .modeling_compatibility import CACHE_NAME, forward_pass
from .modeling_points import FACE, Faces, Y


@dataclass
class PointLevelLoop(PointLoop):
    """`PointLoop` for `level="point"`."""

    tokens_per_position: ClassVar[int] = 4

    def begin(self, model, input_ids: Tensor, limit: int) -> int:
        """Set up what is written for prompts (B, L); returns how many points there may be up to `limit` tokens."""
        config, (batch, prompt), device = model.config, input_ids.shape, input_ids.device
        start = (input_ids == config.bos_token_id).int().argmax(1) + 1
        begun = (prompt - start) % 4  # tokens of a point that the prompt leaves to be completed
        self.check_prompts(begun)
        least, most = (int(count) for count in begun.aminmax())
        self.written = prompt - most  # ids up to which every row is written
        steps = -(-(limit - self.written) // 4)
        self.ids = input_ids.new_full((batch, prompt - least + 4 * steps), config.pad_token_id)
        self.ids[:, :prompt] = input_ids
        self.columns = (prompt - begun)[:, None] + torch.arange(4, device=device)  # (B, 4) of the next points
        self.points = (prompt - start) // 4  # whole points so far
        self.groups = whole_groups(input_ids, start, self.points, config.pad_token_id)
        self.last = self.groups[:, -1].clone()
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        if self.grammar is not None:
            self.grammar.count(self.groups.flatten(1), 4 * self.points)
        kept = (batch, steps * self.output_point_features, 4, config.hidden_size)
        self.features = model.lm_head.heads[0].state_norm.weight.new_zeros(kept)
        # What every step reads is made once: a number that the host makes in a step waits for the device.
        self.slot_index = torch.arange(4, device=device)[:, None]
        self.offset = torch.tensor([0, 0, 0, config.n_bins], device=device)
        self.end = torch.tensor([config.eos_token_id, *[config.pad_token_id] * 3], device=device)
        return steps

    def __call__(
        self,
        model,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | PointillistGenerateOutput:
        """Sequences for prompts (B, L); called by `GenerationMixin.generate`."""
        prompt, limit, device = input_ids.shape[1], generation_config.max_length, input_ids.device
        steps = self.begin(model, input_ids, limit)
        self.sampler = Sampler(logits_processor, generation_config.do_sample)
        hidden = self.read_prompt(model, self.groups, self.groups.shape[1] + steps, generation_config, model_kwargs)
        self.groups = F.pad(self.groups, (0, 0, 0, steps), value=model.config.pad_token_id)
        shown, finished = prompt, False
        given = self.columns < prompt
        point, states = self.spell(hidden, self.classes(self.ids.gather(1, self.columns), given), given)
        with closing(self.progress_bar(model.config, input_ids, limit)) as bar:
            for step in range(steps):
                if not finished:
                    self.write(step, point, states)
                    self.unfinished.logical_and_(~stopping_criteria(self.ids[:, : self.written], None))
                if device.type == "cpu" or self.streamer is not None or step % STOP_CHECK_EVERY == 0:
                    bar.update(self.ids[:, : self.written], self.unfinished)
                    finished = finished or not bool(self.unfinished.any())
                if self.streamer is not None:
                    reached = min(limit, self.length() if finished or step + 1 == steps else self.written)
                    for column in range(shown, reached):
                        self.streamer.put(self.ids[:, column].cpu())
                    shown = max(shown, reached)
                if step + 1 == steps or every_rank_finished(finished, self.synced_gpus, device):
                    break
                point, states = self.next(self.groups, self.prompt + step + 1)
            bar.finish(self.ids)
        if self.streamer is not None:
            self.streamer.end()
        ids = self.ids[:, : min(limit, self.length())]
        if not generation_config.return_dict_in_generate:
            return ids
        num_points = (ids[:, prompt:] < model.config.bos_token_id).sum(1) // 4
        features = whole_points(self.features.flatten(1, 2), num_points) if self.output_point_features else None
        fields = dict(sequences=ids, point_features=features, num_points=num_points, **{CACHE_NAME: self.cache})
        return PointillistGenerateOutput(**fields)

    def write(self, step: int, point: Tensor, states: Tensor) -> None:
        """Write the ids (B, 4) of the next points and the states (B, 4, D) behind them."""
        self.groups[:, self.prompt + step] = point
        self.ids.scatter_(1, self.columns, point)
        self.columns += 4
        self.written += 4
        if self.output_point_features:
            self.features[:, step] = states

    def length(self) -> int:
        """The length of the longest row."""
        return int((self.ids != self.model.config.pad_token_id).any(0).nonzero().max()) + 1

    def prepare(self, model, prompt: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        self.faces = model.model.embed_tokens.faces(*(model_kwargs.get(name) for name in FACE_INPUTS))
        self.slot_faces = self.faces if self.guidance_scale is None else twice(self.faces)
        self.keys = model.lm_head.heads[FACE].keys(self.slot_faces.embeds)
        real = prompt[:, :, FACE] != model.config.pad_token_id
        mask = None if bool(real.all()) else real.long()
        return model_kwargs | {"attention_mask": mask, "position_ids": real.long().cumsum(1) - 1}

    def calls(self, generation_config: GenerationConfig) -> tuple[Callable, Callable]:
        decoder = self.model.model
        return decoder.__call__, forward_pass(self.model, self.cache, generation_config, decoder.__call__)

    def read_prompt(
        self, model, prompt: Tensor, limit: int, generation_config: GenerationConfig, model_kwargs
    ) -> Tensor:
        hidden = super().read_prompt(model, prompt, limit, generation_config, model_kwargs)
        self.first = -self.shift  # (B, 1) column of a row's bos, counted from the oldest that the cache has seen
        ring = None if self.cache is None else self.cache.self_attention_cache
        has_mask = isinstance(ring, RingCache) and ring.static and "flash" not in str(model.config._attn_implementation)
        self.whole_step = None
        if has_mask and not self.sampler.has_processors:  # these read what has been written
            self.whole_step = forward_pass(model, self.cache, generation_config, self.advance)
            self.keep_in_place()
        return hidden

    def keep_in_place(self) -> None:
        """Have CUDA graphs read and write what a step needs where it is, without copies."""
        cache: Any = self.cache
        tensors = [self.last, self.points, self.unfinished, self.first, self.keys, *self.slot_faces, *self.faces]
        tensors += [x for layer in cache.cross_attention_cache.layers for x in (layer.keys, layer.values)]
        for tensor in tensors if self.grammar is None else [*tensors, self.grammar.left]:
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    def next(self, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Read the newest points of groups (B, G, 4), at length - 1; ids (B, 4) and states (B, 4, D) of the next."""
        begin = self.unread(length)
        if begin == self.first_column:  # the cache begins anew
            self.first.copy_(-self.shift - begin)
        if self.whole_step is not None and length - begin == 1:
            return self.whole_step()
        return self.spell(self.run(ids, begin, length))

    def advance(self) -> tuple[Tensor, Tensor]:
        """`next` with a static ring: its input and its result but for the returned tensors are state on the device.

        Shapes, addresses and the numbers of the host are the same at every step: it may be compiled, and be a CUDA graph.
        """
        cache: Any = self.cache
        ring = cache.self_attention_cache
        embeds = self.doubled(self.model.model.embed_tokens(self.last[:, None], self.faces))
        positions = ring.layers[0].position - self.first
        mask = ring_mask(ring, None, embeds.dtype, embeds.device, self.first.clamp(min=0))
        return self.spell(self.decode(self.model.model, embeds, positions, mask))

    def run(self, ids: Tensor, begin: int, length: int) -> Tensor:  # type: ignore[override]  # its result goes to `spell`
        """Read groups [begin, length) of (B, G, 4); hidden states (B, 1, D) for the next, twice as many rows with guidance."""
        embeds = self.doubled(self.model.model.embed_tokens(ids[:, begin:length], self.faces))
        positions, mask = self.positions_and_mask(embeds, begin, length)
        return self.decode(self.step if length - begin == 1 else self.forward, embeds, positions, mask)

    def decode(self, call: Callable, embeds: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        outputs = call(
            attention_mask=mask,
            position_ids=positions,
            cache=self.cache,
            inputs_embeds=embeds,
            condition=self.condition["condition_embeds"],
            condition_mask=self.condition.get("condition_mask"),
            use_cache=self.cache is not None,
            return_dict=True,
        )
        return outputs.last_hidden_state[:, -1:]

    def spell(self, hidden: Tensor, point: Tensor | None = None, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next point's ids (B, 4) and the states (B, 4, D) behind them, from hidden states (B or 2 B, 1, D).

        `point` (B, 4) are classes, of which `known` (B, 4) are given by a prompt. An end is eos and padding; finished rows are
        padding and zeros.
        """
        heads, batch = self.model.lm_head, len(self.last)
        is_point = self.last[:, FACE] < self.model.config.first_special
        previous = self.classes(self.last, is_point[:, None])
        point = torch.zeros_like(self.last) if point is None else point
        known = torch.zeros_like(point, dtype=torch.bool) if known is None else known
        begun = known.any(1)
        inputs, states, ended = [hidden], {}, begun
        room: Any = None if self.grammar is None else self.grammar.room()
        for place, slot in enumerate(heads.order):
            head, is_first = heads.heads[slot], place == 0
            *_, context = heads.contexts(inputs)
            state = head.state(context)
            states[slot] = state[:batch, 0]
            origin = head.origin(self.slot_faces, self.doubled(point[:, FACE:]), self.doubled(previous[:, Y : Y + 1]))
            scores = head.scores(state, self.slot_faces.embeds, origin, self.keys)[:, 0].float()
            if self.guidance_scale is not None:
                guided, empty = scores.chunk(2)
                scores = empty + self.guidance_scale * (guided - empty)
            count = scores.shape[1] - head.has_end
            if self.grammar is not None:
                allowed = self.grammar.allowed(slot, is_first, room, previous, self.points, point, known)
                scores = torch.where(allowed, scores, -torch.inf)
            elif is_first:
                scores[:, count].masked_fill_(begun, -torch.inf)
            value = self.sampler.choose(self.processed(scores, slot, count))
            value = torch.where(known[:, slot], point[:, slot], value)
            if is_first:
                ended = value == count
                value = torch.where(ended, 0, value)
            point = point.index_copy(1, self.slot_index[slot], value[:, None])
            known = known.index_fill(1, self.slot_index[slot], True)
            if not head.is_last:
                inputs.append(head.read(self.doubled(value[:, None]), self.slot_faces.embeds, origin))
        point = torch.where(ended[:, None], self.end, point + self.offset)
        return self.settle(point, torch.stack([states[slot] for slot in range(4)], 1), ended)

    def settle(self, point: Tensor, states: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Count the points (B, 4), finish the rows that `ended` (B,), and pad what comes after."""
        point = torch.where(self.unfinished[:, None], point, self.model.config.pad_token_id)
        states = states * self.unfinished[:, None, None]
        self.last.copy_(point)
        self.unfinished.logical_and_(~ended)
        self.points.add_(self.unfinished)
        if self.grammar is not None:
            self.grammar.add(point[:, FACE] - self.model.config.n_bins, self.unfinished)
        return point, states

    def processed(self, scores: Tensor, slot: int, count: int) -> Tensor:
        """Scores (B, C) after the caller's processors, which read the whole vocabulary."""
        if not self.sampler.has_processors:
            return scores
        config = self.model.config
        begin = config.n_bins if slot == FACE else 0
        full = scores.new_full((len(scores), config.vocab_size), -torch.inf)
        full[:, begin : begin + count] = scores[:, :count]
        full[:, config.eos_token_id : config.eos_token_id + scores.shape[1] - count] = scores[:, count:]
        full = self.sampler.processors(self.ids[:, : self.written], full)
        end = full[:, config.eos_token_id : config.eos_token_id + scores.shape[1] - count]
        return torch.cat((full[:, begin : begin + count], end), dim=1)

    def doubled(self, rows: Tensor) -> Tensor:
        return rows if self.guidance_scale is None else torch.cat((rows, rows))

    def classes(self, ids: Tensor, known: Tensor) -> Tensor:
        """Ids (B, 4) of points -> bins and faces from zero; zero where not `known` (B, 4)."""
        return torch.where(known, ids - self.offset, 0)


def whole_groups(ids: Tensor, start: Tensor, points: Tensor, pad: int) -> Tensor:
    """Prompts (B, L) with bos before column `start` (B,) and whole `points` (B,) -> groups (B, G, 4), padded on the left."""
    count = int(points.max()) + 1
    place = torch.arange(4 * count, device=ids.device) - 4 * (count - 1 - points[:, None]) - 4  # of a token, bos at -1
    groups = ids.gather(1, (start[:, None] + place).clamp(0, ids.shape[1] - 1))
    return torch.where(place >= -1, groups, pad).unflatten(1, (count, 4))


def twice(faces: Faces) -> Faces:
    embeds, bins = faces
    if len(embeds) == 1:
        return faces
    return Faces(torch.cat((embeds, embeds)), bins if bins is None else torch.cat((bins, bins)))
