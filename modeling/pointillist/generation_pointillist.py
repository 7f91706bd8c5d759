"""`generate()` for point clouds: transformers' generation with an inner loop made for sequences of 100,000 tokens.

Ids and features go into buffers allocated once, the condition is encoded once, and the cache never moves.

Axes: B batch, L tokens, N points, D width.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .configuration_pointillist import FACE_INPUTS, PointillistConfig
from .generation_grammar import PointGrammar
from .generation_progress import GenerationProgress
from .generation_ring_cache import RingCache, self_attention_mask
from .generation_sampling import TokenSampler
from .generation_streamer import PointStreamer  # noqa: F401  (so that it travels with a checkpoint)
from .modeling_compatibility import (
    CACHE_NAME,
    forward_pass,
    holds_cache,
    rename_cache,
    synchronizes_ranks,
    takes_cache,
)
from .modeling_condition import ConditionEncoder

PROGRESS_FROM = 2_000  # new tokens from which a progress bar is shown unless told otherwise
STOP_CHECK_EVERY = 16  # steps between checks whether every row is finished: each waits for the device
SHARED = ("condition_embeds", *FACE_INPUTS)  # of all sequences of one condition


@dataclass
@holds_cache
class PointillistGenerateOutput(GenerateDecoderOnlyOutput):
    """`generate(..., return_dict_in_generate=True)`: the usual fields (with `cache`, also as `past_key_values`) and

    point_features: (B, N, 4, D) last hidden states that predicted x, y, z and face of each new point, zero beyond a row's
    end, if `output_point_features=True`; in this order of slots, whatever `token_order` is.
    num_points: (B,) new points in each row.
    """

    point_features: Tensor | None = None
    num_points: Tensor | None = None


class PointillistGenerationMixin(GenerationMixin):
    """`generate` for points, with the contract of `GenerationMixin`: configs, processors, stopping criteria, streamers, caches."""

    config: PointillistConfig
    condition_encoder: ConditionEncoder
    loop_class: "type[PointLoop]"  # PointLoop, or PointLevelLoop at the point level

    def generate(  # type: ignore[override]  # fewer positional arguments: the others are keywords here
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        pixel_values: Tensor | None = None,
        head_vertices: Tensor | None = None,
        head_normals: Tensor | None = None,
        face_centers: Tensor | None = None,
        face_normals: Tensor | None = None,
        face_pixels: Tensor | None = None,
        condition_embeds: Tensor | None = None,
        guidance_scale: float | None = None,
        grammar: bool = True,
        sorted_points: bool = True,
        min_points: int = 1,
        max_points: int | None = None,
        max_points_per_face: int | None = None,
        output_point_features: bool = False,
        window_policy: str = "rolling",
        progress: bool | None = None,
        **kwargs: Any,
    ):
        """Generate point clouds. Everything of `GenerationMixin.generate` works; the arguments below are ours.

        Args:
            inputs: (B, L) ids of a beginning, padded on the left; default `bos` for each condition.
            pixel_values to condition_embeds: the condition, see `forward`; also condition_mask. The sequences of one condition
                (`num_return_sequences`, or more prompts than conditions) share its keys and values and its faces.
            guidance_scale: classifier-free guidance; logits = empty + scale * (condition - empty). None or 1: off.
            grammar: False lets every token through, at `level="point"` every value of a slot; `sorted_points` False: any order.
            min_points, max_points, max_points_per_face: limits that the grammar keeps, prompt included.
            output_point_features: return the hidden states that predicted each point too (implies `return_dict_in_generate`).
            window_policy: beyond the window, "rolling" (default) drops the oldest token at each step (Meshtron), "reprefill"
                restarts from the newest half (DeepMesh): there these are different models.
            progress: show a progress bar; default: if more than 2,000 tokens may be generated.
            cache (or past_key_values): a cache of transformers or a `RingCache`, empty or with the prompt's first tokens.

        Returns:
            ids (B, L), or `PointillistGenerateOutput` with `return_dict_in_generate=True`.
        """
        kwargs = rename_cache(kwargs, CACHE_NAME)
        if condition_embeds is None:
            with torch.no_grad():
                condition_embeds = self.condition_encoder(pixel_values, head_vertices, head_normals)
        if face_centers is not None and self.config.mesh_aware_faces:
            of_faces = dict(zip(FACE_INPUTS, (face_centers, face_normals, face_pixels)))
            kwargs |= {name: value for name, value in of_faces.items() if value is not None}
        inputs, kwargs["condition_embeds"] = self._prompts(inputs, condition_embeds, kwargs)
        limits = PointGrammar(self.config, sorted_points, min_points, max_points, max_points_per_face)
        if grammar:
            if self.config.level == "token":
                logits_processor = LogitsProcessorList([limits, *(logits_processor or [])])
            self._set_length(limits, inputs, kwargs)
        elif (min_points, max_points, max_points_per_face) != (1, None, None):
            raise ValueError("min_points, max_points and max_points_per_face need the grammar: leave grammar=True")
        scale = None if guidance_scale in (None, 1) else float(guidance_scale)
        loop = self.loop_class(scale, output_point_features, window_policy, progress, limits if grammar else None)
        self._choose_loop(loop, generation_config or self.generation_config, kwargs)
        if kwargs.get("custom_generate") is loop:  # transformers would copy these for each of `num_return_sequences`
            loop.shared = {name: kwargs.pop(name) for name in SHARED if name in kwargs}
        else:
            embeds = kwargs["condition_embeds"]
            kwargs["condition_embeds"] = embeds.repeat_interleave(len(inputs) // len(embeds), 0)
        return super().generate(  # type: ignore[misc]  # declared for models, not for their mixins
            inputs, generation_config, logits_processor, **kwargs
        )

    def _prompts(self, inputs: Tensor | None, condition: Tensor | None, kwargs: dict) -> tuple[Tensor, Tensor]:
        """Prompts (B, L) and conditions (B, M, D), by default `bos` and the empty condition; the prompts' mask in `kwargs`."""
        bos = self.config.first_special
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("found inputs_embeds, but a prompt is token ids (B, L): give them as inputs")
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None:
            known = kwargs.get("face_centers") if condition is None else condition
            rows = 1 if known is None else len(known)
            inputs = torch.full((rows, 1), bos, device=self.condition_encoder.empty.device)
        elif inputs.ndim != 2 or not (inputs == bos).any(1).all():
            raise ValueError(f"a prompt must be (B, L) ids that begin with bos ({bos}); found {inputs}")
        if ((inputs == bos).cumsum(1).bool() & (inputs > bos)).any():
            raise ValueError("a prompt must not hold eos or padding after bos: cut the end token off, pad on the left")
        condition = self.condition_encoder.or_empty(condition, len(inputs), None)
        kwargs.setdefault("attention_mask", (inputs != bos + 2).long())  # padding
        return inputs, condition

    @staticmethod
    def _set_length(limits: PointGrammar, inputs: Tensor, kwargs: dict) -> None:
        """Set the length of the longest sequence that `max_points` admits, unless `kwargs` gives a length."""
        if {"min_length", "min_new_tokens"} & kwargs.keys():
            raise ValueError("the grammar limits the number of points: give min_points instead of min_new_tokens")
        if limits.max_points is not None:
            prompted = math.ceil(int((inputs < limits.bos).sum(1).max()) / 4)
            if prompted > limits.max_points:
                raise ValueError(
                    f"found a prompt of {prompted} points, but max_points={limits.max_points} counts the prompt's points too: "
                    f"give max_points of {prompted} or more, or a shorter prompt"
                )
            if not {"max_new_tokens", "max_length"} & kwargs.keys():
                padding = int((inputs != limits.bos).long().argmin(1).max())
                kwargs |= {"max_length": padding + 4 * limits.max_points + 2, "max_new_tokens": None}

    def _choose_loop(self, loop: "PointLoop", config: GenerationConfig, kwargs: dict) -> None:
        """Let `GenerationMixin.generate` use `loop`, except for what only its own loops do."""
        if loop.window_policy not in ("rolling", "reprefill"):
            raise ValueError(f'window_policy must be "rolling" or "reprefill", found {loop.window_policy!r}')
        if loop.output_point_features:
            kwargs["return_dict_in_generate"] = True
        per_step = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if (
            kwargs.get("custom_generate") is None
            and kwargs.get("assistant_model") is None
            and (kwargs.get("num_beams", config.num_beams) or 1) == 1
            and not any(kwargs.get(name, getattr(config, name)) for name in per_step)
        ):
            # transformers does not pass these two to a custom loop
            loop.streamer, synced_gpus = kwargs.get("streamer"), kwargs.get("synced_gpus")
            loop.synced_gpus = synchronizes_ranks(self) if synced_gpus is None else synced_gpus
            loop.ring = CACHE_NAME not in kwargs
            kwargs["custom_generate"] = loop
        elif self.config.level == "point":
            raise ValueError(
                'level="point" spells whole points, so beams, assistant models, custom_generate and the per-step outputs (scores, '
                'logits, attentions, hidden states) do not work: leave them out, or take a model of level="token"'
            )
        elif loop.guidance_scale is not None or loop.output_point_features or loop.window_policy != "rolling":
            raise ValueError(
                "guidance_scale, output_point_features and window_policy do not combine with beams, custom_generate or "
                "the per-step outputs (scores, logits, attentions, hidden states); leave one of the two out"
            )

    @staticmethod
    @takes_cache
    def create_masks_for_generate(config, inputs_embeds, attention_mask, cache=None, position_ids=None, **kwargs):
        """The mask that a compiled step is given, of fixed shape where the cache is a static ring."""
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if isinstance(own, RingCache) and "flash" in config._attn_implementation:
            return attention_mask  # of two axes, like the one that the forward pass makes of it
        return self_attention_mask(config, inputs_embeds, attention_mask, own, position_ids)


@dataclass
class PointLoop:
    """The decoding loop behind `generate()`: greedy or sampled, one token a step for every row.

    With guidance every row runs twice, the second time under the empty condition. The options are those of `generate`, `ring`:
    whether the cache is ours to choose, and `shared`: tensors (S, ...) of which B / S successive rows of the batch share each.
    """

    tokens_per_position: ClassVar[int] = 1  # of the decoder

    guidance_scale: float | None
    output_point_features: bool
    window_policy: str
    progress: bool | None
    grammar: PointGrammar | None
    streamer: Any = None
    synced_gpus: bool = False
    ring: bool = True
    shared: dict[str, Tensor] = field(default_factory=dict)

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
        batch, prompt = input_ids.shape
        limit, device, config = generation_config.max_length, input_ids.device, model.config
        self.check_prompts((input_ids < config.bos_token_id).sum(1) % 4)
        if self.grammar is not None:
            self.grammar.follow = True
        ids = torch.full((batch, limit), config.pad_token_id, device=device)
        ids[:, :prompt] = input_ids
        kept = 4 * math.ceil((limit - prompt) / 4) * self.output_point_features
        features = model.lm_head.weight.new_zeros(batch, kept, config.hidden_size)
        unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        ends = torch.full((batch,), prompt, device=device)
        sample = TokenSampler(logits_processor, config, input_ids, generation_config.do_sample)
        logits, hidden = self.read_prompt(model, input_ids, limit, generation_config, model_kwargs)
        finished = False
        with closing(self.progress_bar(config, input_ids, limit)) as bar:
            for column in range(prompt, limit):
                if not finished:
                    token = sample(ids[:, :column], logits)
                    ids[:, column] = torch.where(unfinished, token, config.pad_token_id)
                    if self.output_point_features:
                        point, place = divmod(column - prompt, 4)
                        features[:, 4 * point + config.slots[place]] = hidden * unfinished[:, None]
                    ends = torch.where(unfinished, column + 1, ends)
                    unfinished = unfinished & ~stopping_criteria(ids[:, : column + 1], None)
                    if self.streamer is not None:
                        self.streamer.put(ids[:, column].cpu())
                if device.type == "cpu" or self.streamer is not None or (column - prompt) % STOP_CHECK_EVERY == 0:
                    bar.update(ids[:, : column + 1], unfinished)
                    finished = finished or not bool(unfinished.any())
                if column + 1 == limit or every_rank_finished(finished, self.synced_gpus, device):
                    break
                logits, hidden = self.next(ids, column + 1)
            bar.finish(ids)
        if self.streamer is not None:
            self.streamer.end()
        ids = ids[:, : int(ends.max())]
        if not generation_config.return_dict_in_generate:
            return ids
        num_points = (ids[:, prompt:] < config.bos_token_id).sum(1) // 4
        own = whole_points(features, num_points) if self.output_point_features else None
        fields = dict(sequences=ids, point_features=own, num_points=num_points, **{CACHE_NAME: self.cache})
        return PointillistGenerateOutput(**fields)

    def check_prompts(self, begun: Tensor) -> None:
        """Raise `ValueError` for prompts that end within a point, of which `begun` (B,) tokens are there, where they must not."""
        if (self.output_point_features or self.window_policy == "reprefill") and begun.any():
            raise ValueError("point features and reprefill need prompts of whole points (4 tokens each, after bos)")

    def progress_bar(self, config, prompt: Tensor, limit: int) -> GenerationProgress:
        shown = limit - prompt.shape[1] > PROGRESS_FROM if self.progress is None else self.progress
        limits = self.grammar
        is_sorted = limits is not None and limits.sorted_points
        return GenerationProgress(config, prompt, limits.max_points if limits else None, is_sorted, shown)

    def prepare(self, model, prompt: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """`model_kwargs` with attention_mask and position_ids for the positions of the decoder."""
        return model_kwargs

    def calls(self, generation_config: GenerationConfig) -> tuple[Callable, Callable]:
        """The forward pass of a prompt, and that of one position."""
        return self.model.__call__, forward_pass(self.model, self.cache, generation_config)

    def read_prompt(
        self, model, prompt: Tensor, limit: int, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Any:
        """Read the prompt (B, L, ...) without what the cache holds, at once or in pieces of `prefill_chunk_size` tokens.

        `limit`: positions of the decoder in the longest sequence.
        """
        self.model, self.prompt = model, prompt.shape[1]
        self.cache = cache_of_generation(model, generation_config, model_kwargs, self.ring, limit)
        if self.window_policy == "reprefill" and self.cache is None:
            raise ValueError('window_policy="reprefill" refills a cache: leave use_cache=True')
        model_kwargs = self.prepare(model, prompt, model_kwargs | self.shared)
        names = ("condition_embeds", "condition_mask", "attention_mask", "position_ids")
        self.condition = {name: model_kwargs[name] for name in names if model_kwargs.get(name) is not None}
        if self.guidance_scale is not None:
            embeds = self.condition["condition_embeds"]
            empty = model.condition_encoder.or_empty(None, 1, None).expand_as(embeds)
            self.condition = {name: torch.cat((value, value)) for name, value in self.condition.items()}
            self.condition["condition_embeds"] = torch.cat((embeds, empty))
        # Positions count from bos; a row's are its columns less its padding.
        self.shift = self.condition.pop("position_ids")[:, -1:] - (self.prompt - 1)
        self.mask = self.condition.pop("attention_mask", None)
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, limit - self.prompt), value=1)
        self.first_column = 0  # column of the oldest position the cache has seen
        held = 0 if self.cache is None else self.cache.get_seq_length()
        if held >= self.prompt:
            raise ValueError(
                f"found a cache of {self.tokens_per_position * held} tokens and a prompt of "
                f"{self.tokens_per_position * self.prompt}, expected a longer prompt"
            )
        piece = self.prompt
        if self.cache is not None and generation_config.prefill_chunk_size:
            piece = -(-generation_config.prefill_chunk_size // self.tokens_per_position)
        self.forward, step = self.calls(generation_config)
        self.step = self.forward
        for begin in range(held, self.prompt, piece):
            outputs = self.run(prompt, begin, min(begin + piece, self.prompt))
        self.step = step
        return outputs

    def next(self, ids: Tensor, length: int) -> Any:
        """Read the newest position, at column length - 1."""
        return self.run(ids, self.unread(length), length)

    def unread(self, length: int) -> int:
        """The column from which to read, up to the newest position at column length - 1: the cache holds those before."""
        window = self.model.config.sliding_window
        if self.cache is None:
            return 0
        cache = self.cache.self_attention_cache
        if self.window_policy == "reprefill" and length - self.first_column > window:
            begin = length - window // 2
            # the last token of a point, as the windows of training begin
            self.first_column = begin - (begin - self.prompt + 1) % (4 // self.tokens_per_position)
            cache.reset()
            return self.first_column
        if isinstance(cache, RingCache):
            cache.check_room(length - self.first_column)
        return length - 1

    def run(self, ids: Tensor, begin: int, length: int) -> tuple[Tensor, Tensor]:
        """Read columns [begin, length); next logits (B, vocabulary) in float32 and the hidden states (B, D) behind them."""
        # A copy even where a view is contiguous: its strides are those of `ids`, and a compiled step is made for its strides.
        tokens = ids[:, begin:length].clone(memory_format=torch.contiguous_format)
        tokens = tokens if self.guidance_scale is None else torch.cat((tokens, tokens))
        positions, mask = self.positions_and_mask(tokens, begin, length)
        call = self.step if length - begin == 1 else self.forward
        options = dict(cache=self.cache, use_cache=self.cache is not None, logits_to_keep=1, return_dict=True)
        outputs = call(tokens, mask, positions, **options, **self.condition)
        logits, hidden = outputs.logits[:, -1].float(), outputs.last_hidden_state[: len(ids), -1]
        if self.guidance_scale is not None:
            guided, empty = logits.chunk(2)
            logits = empty + self.guidance_scale * (guided - empty)
        return logits, hidden

    def positions_and_mask(self, inputs: Tensor, begin: int, length: int) -> tuple[Tensor, Tensor | None]:
        """position_ids (1 or B, L) and attention_mask of inputs (B, L, ...), which are the columns [begin, length)."""
        mask = None if self.mask is None else self.mask[:, self.first_column : length]
        if self.cache is not None and self.cache.is_compileable and length - begin == 1:
            metadata = torch.empty(*inputs.shape[:2], 0, dtype=self.model.dtype, device=inputs.device)
            mask = self.model.create_masks_for_generate(self.model.config, metadata, mask, self.cache)
        return torch.arange(begin, length, device=inputs.device)[None] + self.shift, mask


def whole_points(features: Tensor, num_points: Tensor) -> Tensor:
    """(B, L, D) -> (B, N, 4, D), zero beyond a row's `num_points` (B,): at its end may stand an end token or part of a point."""
    longest = int(num_points.max())
    features = rearrange(features[:, : 4 * longest], "b (n t) d -> b n t d", t=4)
    return features * (torch.arange(longest, device=features.device) < num_points[:, None])[:, :, None, None]


def every_rank_finished(finished: bool, synced_gpus: bool, device: torch.device) -> bool:
    """Whether nothing is left to do on this rank or, where all must run together (`synced_gpus`), on any rank."""
    if not synced_gpus:
        return finished
    unfinished_ranks = torch.tensor(0 if finished else 1, device=device)
    torch.distributed.all_reduce(unfinished_ranks)
    return int(unfinished_ranks) == 0


def cache_of_generation(
    model, generation_config: GenerationConfig, model_kwargs: dict, ring: bool, limit: int
) -> EncoderDecoderCache | None:
    """A ring for `limit` positions by default and for "static", unless the caller brought a cache; else that of the arguments."""
    if not model_kwargs["use_cache"]:
        return None
    cache = model_kwargs[CACHE_NAME]
    if ring and generation_config.cache_implementation in (None, "static"):
        longest = max(limit - 1, generation_config.max_cache_len or 0)
        static = generation_config.cache_implementation == "static"
        cache = RingCache(model.config.num_hidden_layers, model.config.sliding_window, longest, static)
    return cache if isinstance(cache, EncoderDecoderCache) else EncoderDecoderCache(cache, DynamicCache())
