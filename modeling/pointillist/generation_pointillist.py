"""`generate()` for point clouds: transformers' generation with an inner loop of our own.

Axes: B batch, L tokens, N points, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.cache_utils import EncoderDecoderCache

from .configuration_pointillist import PointillistConfig
from .generation_grammar import PointGrammar
from .generation_loop import (
    PointillistGenerateOutput,  # noqa: F401  (named in annotations of its users)
    PointLoop,
)
from .generation_points import PointLevelLoop
from .generation_ring_cache import RingCache, self_attention_mask
from .generation_streamer import PointStreamer  # noqa: F401  (so that it travels with a checkpoint)
from .modeling_compatibility import CACHE_NAME, rename_cache, synchronizes_ranks, takes_cache
from .modeling_condition import ConditionEncoder


class PointillistGenerationMixin(GenerationMixin):
    """`generate` for points, with the contract of `GenerationMixin`: configs, processors, stopping criteria, streamers, caches."""

    config: PointillistConfig
    condition_encoder: ConditionEncoder

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
            pixel_values, head_vertices, head_normals, face_centers, face_normals, condition_embeds, condition_mask: see
                `forward`.
            guidance_scale: classifier-free guidance; logits = empty + scale * (condition - empty). None or 1: off.
            grammar: False lets every token through, or at `level="point"` every value of a slot (`sorted_points` False: only
                the order).
            min_points, max_points, max_points_per_face: limits that the grammar keeps, prompt included.
            output_point_features: also return the hidden states that predicted each point, from the same pass
                (implies `return_dict_in_generate`).
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
            kwargs |= {"face_centers": face_centers, "face_normals": face_normals}
        inputs, condition_embeds = self._prompts(inputs, condition_embeds, kwargs)
        limits = PointGrammar(self.config, sorted_points, min_points, max_points, max_points_per_face)
        if grammar:
            if self.config.level == "token":
                logits_processor = LogitsProcessorList([limits, *(logits_processor or [])])
            self._set_length(limits, inputs, kwargs)
        elif (min_points, max_points, max_points_per_face) != (1, None, None):
            raise ValueError("min_points, max_points and max_points_per_face need the grammar: leave grammar=True")
        scale = None if guidance_scale in (None, 1) else float(guidance_scale)
        loop_class = PointLevelLoop if self.config.level == "point" else PointLoop
        loop = loop_class(scale, output_point_features, window_policy, progress, limits if grammar else None)
        self._choose_loop(loop, generation_config or self.generation_config, kwargs)
        return super().generate(  # type: ignore[misc]  # declared for models, not for their mixins
            inputs, generation_config, logits_processor, condition_embeds=condition_embeds, **kwargs
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
