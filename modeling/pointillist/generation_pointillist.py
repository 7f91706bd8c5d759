"""`generate()` for point clouds: grammar, ring cache, point features and progress around transformers' generation.

`PointillistGenerationMixin` keeps the whole of `GenerationMixin`'s contract (configs, processors, stopping criteria, streamers,
caches) and replaces its inner loop by one made for sequences of 100,000 tokens: ids and features are written into buffers
made once, the condition is encoded once, and the cache never moves. Beyond the window it rolls (Meshtron) or, with
`window_policy="reprefill"`, restarts from the newest half (DeepMesh): past the window these are different models.

Axes: B batch, L tokens, N points, D width.
"""

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.masking_utils import create_sliding_window_causal_mask

from .generation_grammar import PointGrammar
from .generation_progress import GenerationProgress
from .generation_ring_cache import RingCache, ring_mask
from .generation_sampling import TokenSampler
from .generation_streamer import PointStreamer  # noqa: F401  (so that it travels with a checkpoint)
from .modeling_compatibility import (
    CACHE_NAME,
    forward_pass,
    holds_cache,
    named_as_here,
    synchronises_ranks,
    takes_cache,
)

PROGRESS_FROM = 2_000  # new tokens from which a progress bar is shown unless told otherwise
STOP_CHECK_EVERY = 16  # tokens between looks at "is every row finished?": each look waits for the device


@dataclass
@holds_cache
class PointillistGenerateOutput(GenerateDecoderOnlyOutput):
    """`generate(..., return_dict_in_generate=True)`: the usual fields (with `cache`, also as `past_key_values`) and

    point_features: (B, N, 4, D) last hidden states that predicted x, y, z and face of each new point, zero beyond a row's
    end, if `output_point_features=True`.
    num_points: (B,) new points in each row.
    """

    point_features: Tensor | None = None
    num_points: Tensor | None = None


class PointillistGenerationMixin(GenerationMixin):
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        pixel_values: Tensor | None = None,
        head_vertices: Tensor | None = None,
        head_normals: Tensor | None = None,
        condition_embeds: Tensor | None = None,
        condition_mask: Tensor | None = None,
        guidance_scale: float | None = None,
        grammar: bool = True,
        sorted_points: bool = True,
        min_points: int = 1,
        max_points: int | None = None,
        max_points_per_face: int | None = None,
        output_point_features: bool = False,
        window_policy: str = "rolling",
        progress: bool | None = None,
        **kwargs,
    ):
        """Write point clouds. Everything of `GenerationMixin.generate` works; the arguments below are ours.

        Args:
            inputs: (B, L) ids of a beginning, padded on the left; default `bos` for each condition.
            pixel_values, head_vertices, head_normals, condition_embeds, condition_mask: see `forward`.
            guidance_scale: classifier-free guidance; logits = empty + scale * (condition - empty). None or 1: off.
            grammar: False lets every token through (`sorted_points` False: only the order).
            min_points, max_points, max_points_per_face: limits that the grammar keeps, prompt included.
            output_point_features: also return the hidden states that predicted each point, from the same pass
                (implies `return_dict_in_generate`).
            window_policy: "rolling" (default) or "reprefill", see the module docstring.
            progress: show a progress bar; default: when more than 2,000 tokens may be written.
            cache (or past_key_values): a cache of transformers or a `RingCache`, empty or with the prompt's first tokens.

        Returns:
            ids (B, L), or `PointillistGenerateOutput` with `return_dict_in_generate=True`.
        """
        if window_policy not in ("rolling", "reprefill"):
            raise ValueError(f'window_policy must be "rolling" or "reprefill", found {window_policy!r}')
        kwargs = named_as_here(kwargs, CACHE_NAME)
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("found inputs_embeds, but a prompt is token ids (B, L): give them as inputs")
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if condition_embeds is None:
            with torch.no_grad():
                condition_embeds = self.encode_condition(pixel_values, head_vertices, head_normals)
        if inputs is None:
            rows = 1 if condition_embeds is None else len(condition_embeds)
            inputs = torch.full((rows, 1), self.config.bos_token_id, device=self.device)
        elif inputs.ndim != 2 or not (inputs == self.config.bos_token_id).any(1).all():
            raise ValueError(
                f"a prompt must be (B, L) ids that begin with bos ({self.config.bos_token_id}); found {inputs}"
            )
        if ((inputs == self.config.bos_token_id).cumsum(1).bool() & (inputs > self.config.bos_token_id)).any():
            raise ValueError(
                "a prompt must not hold eos or padding after bos: cut the end token off, and pad on the left"
            )
        if condition_embeds is None:
            condition_embeds = self.condition_encoder.or_empty(None, len(inputs), None)
        if len(condition_embeds) != len(inputs):
            raise ValueError(f"{len(inputs)} prompts but conditions for {len(condition_embeds)}")
        if "attention_mask" not in kwargs:
            kwargs["attention_mask"] = (inputs != self.config.pad_token_id).long()
        if not grammar and (min_points, max_points, max_points_per_face) != (1, None, None):
            raise ValueError(
                "min_points, max_points and max_points_per_face are kept by the grammar: leave grammar=True"
            )
        if grammar:
            if {"min_length", "min_new_tokens"} & kwargs.keys():
                raise ValueError(
                    "with the grammar a length is a number of points: give min_points instead of min_new_tokens"
                )
            limits = PointGrammar(self.config, sorted_points, min_points, max_points, max_points_per_face)
            logits_processor = LogitsProcessorList([limits, *(logits_processor or [])])
            begun = -(-int((inputs < self.config.bos_token_id).sum(1).max()) // 4)
            if max_points is not None and begun > max_points:
                raise ValueError(
                    f"found a prompt of {begun} points, but max_points={max_points} counts the prompt's points too: "
                    f"give max_points of {begun} or more, or a shorter prompt"
                )
            if max_points is not None and not {"max_new_tokens", "max_length"} & kwargs.keys():
                kwargs["max_length"] = (
                    4 * max_points + 2 + int((inputs != self.config.bos_token_id).long().argmin(1).max())
                )
                kwargs["max_new_tokens"] = None
        if output_point_features:
            kwargs["return_dict_in_generate"] = True
        if condition_mask is not None:
            kwargs["condition_mask"] = condition_mask

        options = dict(
            guidance_scale=None if guidance_scale in (None, 1) else float(guidance_scale),
            output_point_features=output_point_features,
            window_policy=window_policy,
        )
        if self._needs_library_loop(generation_config, kwargs):
            if options != dict(guidance_scale=None, output_point_features=False, window_policy="rolling"):
                raise ValueError(
                    "guidance_scale, output_point_features and window_policy do not combine with beams, custom_generate or "
                    "the per-step outputs (scores, logits, attentions, hidden states); leave one of the two out"
                )
        else:
            # `GenerationMixin.generate` does not hand these two on to a custom loop.
            synced_gpus = kwargs.get("synced_gpus")
            options.update(
                streamer=kwargs.get("streamer"),
                synced_gpus=synchronises_ranks(self) if synced_gpus is None else synced_gpus,
                ring=CACHE_NAME not in kwargs,
                progress=progress,
                max_points=max_points,
                sorted_points=grammar and sorted_points,
            )
            kwargs["custom_generate"] = partial(sample_points, **options)
        return super().generate(
            inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
            condition_embeds=condition_embeds,
            **kwargs,
        )

    def _needs_library_loop(self, generation_config, kwargs: dict) -> bool:
        """Whether something is asked for that only transformers' own loops do."""
        config = generation_config or self.generation_config
        per_step = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        return (
            kwargs.get("custom_generate") is not None
            or kwargs.get("assistant_model") is not None
            or (kwargs.get("num_beams", config.num_beams) or 1) > 1
            or any(kwargs.get(name, getattr(config, name)) for name in per_step)
        )

    @staticmethod
    @takes_cache
    def create_masks_for_generate(config, inputs_embeds, attention_mask, cache=None, **kwargs):
        """The mask a compiled step is given: a ring has its own; other caches get transformers' windowed mask."""
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if isinstance(cache, RingCache):
            if inputs_embeds.shape[1] > 1 or "flash" in config._attn_implementation:
                return attention_mask
            return ring_mask(cache, attention_mask, inputs_embeds.dtype, inputs_embeds.device)
        return create_sliding_window_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=kwargs.get("position_ids"),
            **{CACHE_NAME: cache},
        )


def sample_points(
    model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria,
    generation_config,
    synced_gpus: bool = False,
    streamer=None,
    guidance_scale: float | None = None,
    output_point_features: bool = False,
    window_policy: str = "rolling",
    ring: bool = True,
    progress: bool | None = None,
    max_points: int | None = None,
    sorted_points: bool = True,
    **model_kwargs,
) -> Tensor | PointillistGenerateOutput:
    """The decoding loop behind `generate()`: greedy or sampled, one token a step for every row.

    Takes what `GenerationMixin` hands to a custom loop, the options of `PointillistGenerationMixin.generate`, and `ring`: whether
    the cache is ours to choose.
    """
    batch, prompt = input_ids.shape
    limit, device, config = generation_config.max_length, input_ids.device, model.config
    ids = torch.full((batch, limit), config.pad_token_id, device=device)
    ids[:, :prompt] = input_ids
    if (output_point_features or window_policy == "reprefill") and ((input_ids < config.bos_token_id).sum(1) % 4).any():
        raise ValueError("point features and reprefill need prompts of whole points (a multiple of 4 tokens after bos)")
    if output_point_features:
        features = model.lm_head.weight.new_zeros(batch, limit - prompt, config.hidden_size)
    unfinished = torch.ones(batch, dtype=torch.bool, device=device)
    ends = torch.full((batch,), prompt, device=device)

    sample = TokenSampler(logits_processor, config, input_ids, generation_config.do_sample)
    cache = cache_of_generation(model, generation_config, model_kwargs, ring)
    steps = DecodingSteps(model, generation_config, model_kwargs, cache, guidance_scale is not None, window_policy)
    outputs = steps.first(input_ids)
    shown = limit - prompt > PROGRESS_FROM if progress is None else progress
    peer_finished = False
    with GenerationProgress(config, input_ids, max_points, sorted_points, shown) as bar:
        for column in range(prompt, limit):
            if not peer_finished:
                logits = outputs.logits[:, -1].float()
                if guidance_scale is not None:
                    guided, empty = logits.chunk(2)
                    logits = empty + guidance_scale * (guided - empty)
                token = sample(ids[:, :column], logits)
                ids[:, column] = torch.where(unfinished, token, config.pad_token_id)
                if output_point_features:
                    features[:, column - prompt] = outputs.last_hidden_state[:batch, -1] * unfinished[:, None]
                ends = torch.where(unfinished, column + 1, ends)
                unfinished = unfinished & ~stopping_criteria(ids[:, : column + 1], None)
                if streamer is not None:
                    streamer.put(ids[:, column].cpu())
            look = device.type == "cpu" or streamer is not None or (column - prompt) % STOP_CHECK_EVERY == 0
            if look:
                bar.update(ids[:, : column + 1], unfinished)
                peer_finished = peer_finished or not bool(unfinished.any())
            if column + 1 == limit or every_rank_finished(peer_finished, synced_gpus, device):
                break
            outputs = steps.next(ids, column + 1)
        bar.finish(ids)
    if streamer is not None:
        streamer.end()

    last = int(ends.max())
    ids = ids[:, :last]
    if not generation_config.return_dict_in_generate:
        return ids
    new = ids[:, prompt:]
    num_points = (new < config.bos_token_id).sum(1) // 4
    if output_point_features:
        # Complete points only: a row that stopped in mid-point, or at its end token, leaves up to three positions over.
        longest = int(num_points.max())
        features = rearrange(features[:, : 4 * longest], "b (n t) d -> b n t d", t=4)
        complete = torch.arange(longest, device=device) < num_points[:, None]
        features = features * complete[:, :, None, None]
    return PointillistGenerateOutput(
        sequences=ids,
        point_features=features if output_point_features else None,
        num_points=num_points,
        **{CACHE_NAME: steps.cache},
    )


def cache_of_generation(model, generation_config, model_kwargs: dict, ring: bool) -> EncoderDecoderCache | None:
    """The cache of tokens, beside one of the condition's keys and values; None without `use_cache`.

    Default and "static": a ring, unless the caller brought a cache. Otherwise what is in `model_kwargs`.
    """
    if not model_kwargs["use_cache"]:
        return None
    cache: Cache = model_kwargs[CACHE_NAME]
    if ring and generation_config.cache_implementation in (None, "static"):
        longest = max(generation_config.max_length - 1, generation_config.max_cache_len or 0)
        static = generation_config.cache_implementation == "static"
        cache = RingCache(model.config.num_hidden_layers, model.config.sliding_window, longest, static)
    return cache if isinstance(cache, EncoderDecoderCache) else EncoderDecoderCache(cache, DynamicCache())


def every_rank_finished(finished: bool, synced_gpus: bool, device: torch.device) -> bool:
    """Whether there is nothing left to do: on this rank, or where all must run on together (`synced_gpus`) on any."""
    if not synced_gpus:
        return finished
    unfinished_ranks = torch.tensor(0 if finished else 1, device=device)
    torch.distributed.all_reduce(unfinished_ranks)
    return int(unfinished_ranks) == 0


class DecodingSteps:
    """Forward passes of one generation: the prompt, then a token at a time, whatever cache there is.

    With guidance every row runs twice, the second time under the empty condition.
    """

    def __init__(
        self,
        model,
        generation_config,
        model_kwargs: dict,
        cache: EncoderDecoderCache | None,
        guided: bool,
        window_policy: str,
    ):
        self.model, self.generation_config, self.cache, self.guided = model, generation_config, cache, guided
        self.reprefill = window_policy == "reprefill"
        if self.reprefill and self.cache is None:
            raise ValueError('window_policy="reprefill" refills a cache: leave use_cache=True')
        self.kwargs = model_kwargs
        self.first_column = 0  # column of the oldest token the cache has seen
        if guided:
            empty = model.condition_encoder.or_empty(None, 1, None).expand_as(model_kwargs["condition_embeds"])
            model_kwargs["condition_embeds"] = torch.cat((model_kwargs["condition_embeds"], empty))
            for name in ("attention_mask", "position_ids", "condition_mask"):
                if model_kwargs.get(name) is not None:
                    model_kwargs[name] = torch.cat((model_kwargs[name],) * 2)
        self.condition = {name: model_kwargs.get(name) for name in ("condition_embeds", "condition_mask")}
        self.mask = model_kwargs.get("attention_mask")  # (B, prompt) or None where nothing is padded

    def first(self, input_ids: Tensor):
        """The prompt, without what the cache holds of it, at once or in pieces of `prefill_chunk_size`."""
        self.prompt = input_ids.shape[1]
        # Positions count from bos; a row's are its columns less its padding.
        positions = self.kwargs["position_ids"]
        self.shift = positions[:, -1:] - (self.prompt - 1)
        if self.mask is not None:
            grown = self.mask.new_ones(len(self.mask), self.generation_config.max_length)
            grown[:, : self.prompt] = self.mask
            self.mask = grown
        held = 0 if self.cache is None else self.cache.get_seq_length()
        if held >= self.prompt:
            raise ValueError(
                f"found a cache of {held} tokens and a prompt of {self.prompt}: a prompt is all tokens so far, the cache's first"
            )
        piece = (self.cache is not None and self.generation_config.prefill_chunk_size) or self.prompt
        self.forward = self.model.__call__
        for begin in range(held, self.prompt, piece):
            outputs = self.run(input_ids, begin, min(begin + piece, self.prompt))
        self.forward = forward_pass(self.model, self.cache, self.generation_config)
        return outputs

    def next(self, ids: Tensor, length: int):
        """The newest token, at column length - 1."""
        window = self.model.config.sliding_window
        if self.cache is None:
            return self.run(ids, 0, length)
        if self.reprefill and length - self.first_column > window:
            begin = length - window // 2
            self.first_column = begin - (begin - self.prompt + 1) % 4  # a face, as the windows of training begin
            self.cache.self_attention_cache.reset()
            return self.run(ids, self.first_column, length)
        return self.run(ids, length - 1, length)

    def run(self, ids: Tensor, begin: int, length: int):
        """Columns [begin, length) with the mask that the cache needs for them."""
        tokens = ids[:, begin:length].contiguous()
        tokens = torch.cat((tokens, tokens)) if self.guided else tokens
        mask = None if self.mask is None else self.mask[:, self.first_column : length]
        if self.cache is not None and self.cache.is_compileable and length - begin == 1:
            metadata = torch.empty(*tokens.shape, 0, dtype=self.model.dtype, device=ids.device)
            mask = self.model.create_masks_for_generate(self.model.config, metadata, mask, self.cache)
        step = self.forward if length - begin == 1 else self.model.__call__
        return step(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=torch.arange(begin, length, device=ids.device)[None] + self.shift,
            cache=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=1,
            return_dict=True,
            **self.condition,
        )
