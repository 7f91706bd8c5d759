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

from .generation_pointillist import PointillistGenerateOutput, PointLoop, every_rank_finished, whole_points
from .generation_sampling import Sampler
from .modeling_compatibility import CACHE_NAME, forward_pass
from .modeling_points import FACE, Faces, Y


@dataclass
class PointLevelLoop(PointLoop):
    """`PointLoop` for `level="point"`."""

    tokens_per_position: ClassVar[int] = 4

    def begin(self, model, input_ids: Tensor, limit: int) -> int:
        """Set up what is written for prompts (B, L); returns how many points there may be up to `limit` tokens."""
        config, (batch, prompt) = model.config, input_ids.shape
        start = (input_ids == config.bos_token_id).int().argmax(1) + 1
        begun = (prompt - start) % 4  # tokens of a point that the prompt leaves to be completed
        self.check_prompts(begun)
        least, most = (int(count) for count in begun.aminmax())
        self.shortest = prompt - most
        steps = -(-(limit - self.shortest) // 4)
        self.ids = input_ids.new_full((batch, prompt - least + 4 * steps), config.pad_token_id)
        self.ids[:, :prompt] = input_ids
        self.prompted = prompt
        self.first_columns = (prompt - begun)[:, None] + torch.arange(4, device=input_ids.device)
        self.points = (prompt - start) // 4  # whole points so far
        self.groups = whole_groups(input_ids, start, self.points, config.pad_token_id)
        if self.grammar is not None:
            self.grammar.count(self.groups.flatten(1), 4 * self.points)
        kept = (batch, steps * self.output_point_features, 4, config.hidden_size)
        self.features = model.lm_head.heads[0].norm.weight.new_zeros(kept)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        self.ends = torch.full((batch,), prompt, device=input_ids.device)
        self.slot_index = torch.arange(4, device=input_ids.device)[:, None]
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
        with closing(self.progress_bar(model.config, input_ids, limit)) as bar:
            for step in range(steps):
                length = self.shortest + 4 * (step + 1)  # ids up to which every row is written
                if not finished:
                    self.write(step, *self.spell(hidden, *self.known(step)))
                    self.unfinished = self.unfinished & ~stopping_criteria(self.ids[:, :length], None)
                if device.type == "cpu" or self.streamer is not None or step % 4 == 0:
                    bar.update(self.ids[:, :length], self.unfinished)
                    finished = finished or not bool(self.unfinished.any())
                if self.streamer is not None:
                    reached = min(limit, int(self.ends.max()) if finished or step + 1 == steps else length)
                    for column in range(shown, reached):
                        self.streamer.put(self.ids[:, column].cpu())
                    shown = max(shown, reached)
                if step + 1 == steps or every_rank_finished(finished, self.synced_gpus, device):
                    break
                hidden = self.next(self.groups, self.prompt + step + 1)
            bar.finish(self.ids)
        if self.streamer is not None:
            self.streamer.end()
        ids = self.ids[:, : min(limit, int(self.ends.max()))]
        if not generation_config.return_dict_in_generate:
            return ids
        num_points = (ids[:, prompt:] < model.config.bos_token_id).sum(1) // 4
        features = whole_points(self.features.flatten(1, 2), num_points) if self.output_point_features else None
        fields = dict(sequences=ids, point_features=features, num_points=num_points, **{CACHE_NAME: self.cache})
        return PointillistGenerateOutput(**fields)

    def known(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classes (B, 4) of the last point and of the next, which of the latter the prompt gives, and the ids (B, L) so far."""
        last = self.groups[:, self.prompt + step - 1]  # of a finished row: padding
        previous = self.classes(last, (last[:, FACE] < self.model.config.first_special)[:, None])
        columns = self.first_columns + 4 * step
        given = columns < self.prompted
        point = self.classes(self.ids.gather(1, columns), given)
        return previous, point, given, self.ids[:, : self.shortest + 4 * step]

    def write(self, step: int, point: Tensor, states: Tensor, ended: Tensor) -> None:
        """Write the ids (B, 4) of unfinished rows and the states (B, 4, D) behind them; rows that `ended` (B,) are finished."""
        config, columns = self.model.config, self.first_columns + 4 * step
        point = torch.where(self.unfinished[:, None], point, config.pad_token_id)
        self.groups[:, self.prompt + step] = point
        self.ids.scatter_(1, columns, point)
        if self.output_point_features:
            self.features[:, step] = states * self.unfinished[:, None, None]
        end = torch.where(ended, columns[:, 0], columns[:, 3]) + 1
        self.ends = torch.where(self.unfinished, end, self.ends)
        self.unfinished = self.unfinished & ~ended
        self.points = self.points + self.unfinished
        if self.grammar is not None:
            self.grammar.add(point[:, FACE] - config.n_bins, self.unfinished)

    def prepare(self, model, prompt: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        self.faces = model.model.embed_tokens.faces(model_kwargs.get("face_centers"), model_kwargs.get("face_normals"))
        self.slot_faces = self.faces if self.guidance_scale is None else twice(self.faces)
        real = prompt[:, :, FACE] != model.config.pad_token_id
        mask = None if bool(real.all()) else real.long()
        return model_kwargs | {"attention_mask": mask, "position_ids": real.long().cumsum(1) - 1}

    def calls(self, generation_config: GenerationConfig) -> tuple[Callable, Callable]:
        decoder = self.model.model
        return decoder.__call__, forward_pass(self.model, self.cache, generation_config, decoder)

    def run(self, ids: Tensor, begin: int, length: int) -> Tensor:  # type: ignore[override]  # its result goes to `spell`
        """Read groups [begin, length) of (B, G, 4); hidden states (B, 1, D) for the next, twice as many rows with guidance."""
        embeds = self.doubled(self.model.model.embed_tokens(ids[:, begin:length], self.faces))
        positions, mask = self.positions_and_mask(embeds, begin, length)
        call = self.step if length - begin == 1 else self.forward
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

    def spell(
        self, hidden: Tensor, previous: Tensor, point: Tensor, known: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next point's ids (B, 4), the states (B, 4, D) behind them, and which rows end (B,): these are eos and padding.

        From hidden states (B or 2 B, 1, D); `previous` and `point` (B, 4) are classes, of which `known` (B, 4) are given.
        """
        config, heads = self.model.config, self.model.lm_head
        begun, batch = known.any(1), len(point)
        context, states = hidden, {}
        ended = torch.zeros_like(begun)
        for place, slot in enumerate(heads.order):
            head, is_first = heads.heads[slot], place == 0
            state = head.state(context)
            states[slot] = state[:batch, 0]
            origin = head.origin(self.slot_faces, self.doubled(point[:, FACE:]), self.doubled(previous[:, Y : Y + 1]))
            scores = head.scores(state, self.slot_faces.embeds, origin)[:, 0].float()
            if self.guidance_scale is not None:
                guided, empty = scores.chunk(2)
                scores = empty + self.guidance_scale * (guided - empty)
            count = scores.shape[1] - head.has_end
            if self.grammar is not None:
                allowed = self.grammar.allowed(slot, is_first, previous, self.points, point, known)
                scores = scores.masked_fill(~allowed, -torch.inf)
            elif is_first:
                scores[:, count].masked_fill_(begun, -torch.inf)
            value = self.sampler.choose(ids, self.processed(ids, scores, slot, count))
            value = torch.where(known[:, slot], point[:, slot], value)
            if is_first:
                ended = value == count
                value = torch.where(ended, 0, value)
            point = point.index_copy(1, self.slot_index[slot], value[:, None])
            known = known.index_fill(1, self.slot_index[slot], True)
            if not head.is_last:
                context = context + head.read(self.doubled(value[:, None]), self.slot_faces.embeds, origin)
        point = point + torch.tensor([0, 0, 0, config.n_bins], device=point.device)
        end = torch.tensor([config.eos_token_id, *[config.pad_token_id] * 3], device=point.device)
        return torch.where(ended[:, None], end, point), torch.stack([states[slot] for slot in range(4)], 1), ended

    def processed(self, ids: Tensor, scores: Tensor, slot: int, count: int) -> Tensor:
        """Scores (B, C) after the caller's processors, which read the whole vocabulary."""
        if not self.sampler.has_processors:
            return scores
        config = self.model.config
        begin = config.n_bins if slot == FACE else 0
        full = scores.new_full((len(scores), config.vocab_size), -torch.inf)
        full[:, begin : begin + count] = scores[:, :count]
        full[:, config.eos_token_id : config.eos_token_id + scores.shape[1] - count] = scores[:, count:]
        full = self.sampler.processors(ids, full)
        end = full[:, config.eos_token_id : config.eos_token_id + scores.shape[1] - count]
        return torch.cat((full[:, begin : begin + count], end), dim=1)

    def doubled(self, rows: Tensor) -> Tensor:
        return rows if self.guidance_scale is None else torch.cat((rows, rows))

    def classes(self, ids: Tensor, known: Tensor) -> Tensor:
        """Ids (B, 4) of points -> bins and faces from zero; zero where not `known` (B, 4)."""
        return torch.where(known, ids - torch.tensor([0, 0, 0, self.model.config.n_bins], device=ids.device), 0)


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
