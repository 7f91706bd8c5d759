"""The autoregressive point model: a causal transformer decoder that generates a canonical point cloud token by token.

Axes: B batch, S conditions (of B / S successive sequences each), L tokens, M condition tokens, H heads, D width, W window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_pointillist import FACE_INPUTS, PointillistConfig
from .generation_pointillist import PointillistGenerationMixin, PointLoop
from .generation_points import PointLevelLoop
from .generation_ring_cache import additive_mask, self_attention_mask
from .modeling_compatibility import CACHE_NAME, CACHE_NAMES, holds_cache, takes_cache
from .modeling_condition import ConditionEncoder, attend_sharing
from .modeling_points import Faces, PointEmbedding, SlotAttention, SlotHead, SlotHeads, group_tokens, smooth_rows

T = TypeVar("T")


@dataclass
@holds_cache
class PointillistOutput(ModelOutput):
    """What a forward pass returns.

    loss: mean cross-entropy of `labels` in nats, if they were given.
    logits: (B, L', vocabulary), L' = L or `logits_to_keep`; None beside a loss within slots.
    last_hidden_state: (B, L', D) after the final norm; position t is the feature that predicts token t + 1.
    cache: keys and values so far, if `use_cache=True`; also as `past_key_values`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


def rotary_embedding(config: PointillistConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, L, half of the rotated channels) in float32 of positions (B, L)."""
    channels = int(config.head_dim * config.partial_rotary_factor)
    exponent = torch.arange(0, channels, 2, device=position_ids.device, dtype=torch.float32) / channels
    angles = position_ids[:, None, :, None].float() * config.rope_theta**-exponent
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of x (B, H, L, head_dim), channel i paired with i + half; the rest pass unchanged."""
    half = cos.shape[-1]
    first, second, passed = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    first, second = first.float(), second.float()
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in rotated), passed), dim=-1)


class PointillistAttention(nn.Module):
    """Self-attention (rotary, causal, windowed) or, with `is_cross`, attention to the condition tokens."""

    def __init__(self, config: PointillistConfig, layer_idx: int, is_cross: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross = is_cross
        self.is_causal = not is_cross
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        key_value_heads = (not is_cross and config.num_key_value_heads) or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // key_value_heads
        inner, key_value_inner = config.num_attention_heads * config.head_dim, key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, H * d) -> (B, H, L, d)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None = None,
        condition: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        query = self.heads(self.q_proj(hidden_states))
        if rotary is None:
            assert cache is None or isinstance(cache, EncoderDecoderCache)
            key, value = self.condition_keys_values(condition, cache)
        else:
            key, value = self.heads(self.k_proj(hidden_states)), self.heads(self.v_proj(hidden_states))
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        window = None if self.is_cross else self.config.sliding_window
        options = dict(dropout=dropout, scaling=self.scaling, sliding_window=window)
        output, weights = attend_sharing(attend, self, query, key, value, attention_mask, **options, **kwargs)
        return self.o_proj(output.flatten(-2)), weights

    def condition_keys_values(
        self, condition: Tensor | None, cache: EncoderDecoderCache | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the condition; with a cache they are computed once for a sequence."""
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        if condition is None:
            raise ValueError("the decoder reads a condition: give `condition` (B, M, D), or use PointillistForCausalLM")
        key, value = self.heads(self.k_proj(condition)), self.heads(self.v_proj(condition))
        if cache is not None:
            cache.is_updated[self.layer_idx] = True
            return cache.cross_attention_cache.update(key, value, self.layer_idx)
        return key, value


class PointillistLayer(GradientCheckpointingLayer):
    """Pre-normalized self-attention, cross-attention and feed-forward, each with a residual connection."""

    def __init__(self, config: PointillistConfig, layer_idx: int):
        super().__init__()
        self.self_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = PointillistAttention(config, layer_idx, is_cross=False)
        self.cross_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cross_attn = PointillistAttention(config, layer_idx, is_cross=True)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        condition: Tensor,
        attention_mask: Tensor | None,
        condition_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> Tensor:
        self_cache = None if cache is None else cache.self_attention_cache
        x, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask, rotary, cache=self_cache, **kwargs)
        hidden_states = hidden_states + x
        x = self.cross_attn_norm(hidden_states)
        x, _ = self.cross_attn(x, condition_mask, condition=condition, cache=cache, **kwargs)
        hidden_states = hidden_states + x
        return hidden_states + self.fc2(self.act(self.fc1(self.mlp_norm(hidden_states))))


class VocabularyHead(nn.Linear):
    """Hidden states (..., D) -> logits (..., vocabulary), or those of some rows of the vocabulary only."""

    def forward(self, hidden_states: Tensor, rows: tuple[slice, ...] | None = None) -> Tensor:
        weight = self.weight if rows is None else torch.cat([self.weight[part] for part in rows])
        return F.linear(hidden_states, weight)


class PointillistPreTrainedModel(PreTrainedModel):
    """Weight initialization and what transformers needs to know of the point model."""

    config: PointillistConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["PointillistLayer", "Dinov2Layer"]
    _skip_keys_device_placement = [*CACHE_NAMES]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PointillistLayer,
        "attentions": OutputRecorder(PointillistAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(PointillistAttention, index=1, layer_name="cross_attn"),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (ConditionEncoder, PointEmbedding, SlotAttention, SlotHead)):
            module.init_weights(std)
        elif isinstance(module, (nn.Embedding, VocabularyHead)):
            bins = smooth_rows(
                self.config.n_bins, module.weight.shape[1], self.config.n_bins, std, module.weight.device
            )
            init.copy_(module.weight, torch.cat((bins.to(module.weight), module.weight[self.config.n_bins :])))

    def save_pretrained(self, *args, **kwargs):
        # transformers registers the class it saves; the one of AutoModel is in the same file.
        known = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {"AutoModel": f"{__name__.rpartition('.')[2]}.PointillistModel"} | known
        super().save_pretrained(*args, **kwargs)


class PointillistModel(PointillistPreTrainedModel):
    """The decoder without its head: embeddings, blocks, final norm. Its condition (B, M, D) is already encoded.

    A position is a token or, at the point level, a group of four (`group_tokens`).

    Each block is self-attention with rotary positions and a sliding window, cross-attention to the condition, and a GELU
    feed-forward, all pre-normalized by RMSNorm: x-transformers' `Decoder(cross_attend=True)` (supplementary, section D).
    """

    _keys_to_ignore_on_load_unexpected = [r"^condition_encoder\.", r"^lm_head\."]  # of PointillistForCausalLM

    def __init__(self, config: PointillistConfig):
        super().__init__(config)
        if config.level == "point":
            self.embed_tokens: nn.Module = PointEmbedding(config)
        else:
            self.embed_tokens = nn.Embedding(config.first_special + 3, config.hidden_size)
        self.layers = nn.ModuleList(PointillistLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
        use_cache: bool | None = None,
        face_centers: Tensor | None = None,
        face_normals: Tensor | None = None,
        face_pixels: Tensor | None = None,
        faces: Faces | None = None,
        **kwargs,
    ) -> PointillistOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            x = inputs_embeds
        elif isinstance(self.embed_tokens, PointEmbedding):
            assert input_ids is not None
            faces = faces or self.embed_tokens.faces(face_centers, face_normals, face_pixels)
            x = self.embed_tokens(
                group_tokens(input_ids, self.config.first_special + 2, self.config.first_special), faces
            )
            if attention_mask is not None and attention_mask.ndim == 2:
                attention_mask = group_tokens(attention_mask, 0).amax(-1)
        else:
            x = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            cache = EncoderDecoderCache(cache, DynamicCache())

        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(start, start + x.shape[1], device=x.device)[None]
        mask = self_attention_mask(self.config, x, attention_mask, cache, position_ids)
        if condition_mask is not None:
            if "flash" in str(self.config._attn_implementation):
                raise ValueError('condition_mask does not work with flash attention: use attn_implementation="sdpa"')
            condition_mask = condition_mask.repeat_interleave(len(x) // len(condition_mask), 0)
            condition_mask = additive_mask(condition_mask.bool(), x.dtype).expand(-1, 1, x.shape[1], -1)

        rotary = rotary_embedding(self.config, position_ids)
        own: dict[str, Any] = {CACHE_NAME: cache}
        for layer in self.layers:
            x = layer(x, condition, mask, condition_mask, rotary, **own, **kwargs)
        return PointillistOutput(last_hidden_state=self.norm(x), **own)


class PointillistForCausalLM(PointillistPreTrainedModel, PointillistGenerationMixin):
    """The decoder, its vocabulary head and the encoders of its condition.

    The condition is given as `pixel_values` and/or `head_vertices` with `head_normals`, or already encoded as `condition_embeds`.
    Without any of them the learned empty condition is read, which `drop_condition` also selects row by row.
    """

    def __init__(self, config: PointillistConfig):
        super().__init__(config)
        self.model = PointillistModel(config)
        self.condition_encoder = ConditionEncoder(config)
        if config.level == "point":
            self.lm_head: nn.Module = SlotHeads(config)
        else:
            self.lm_head = VocabularyHead(config.hidden_size, config.first_special + 3, bias=False)
        self.loop_class = PointLevelLoop if config.level == "point" else PointLoop
        self.post_init()
        self.generation_config.do_sample = True
        self.generation_config.top_k = 0  # transformers would keep the 50 most likely tokens
        self.generation_config.max_new_tokens = 4 * 32_768 + 1

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        absent = sorted(name for name in info["missing_keys"] if name.startswith(("lm_head.", "model.embed_tokens.")))
        if absent:
            config = model.config
            raise ValueError(
                f"{args[0] if args else 'the checkpoint'}: config.json says level={config.level!r}, mesh_aware_faces="
                f"{config.mesh_aware_faces}, slot_order={config.slot_order!r}, slot_head={config.slot_head!r}, but the weights "
                f"lack {', '.join(absent)}: restore the config.json that was saved with them"
            )
        model.condition_encoder.freeze()  # its parameters are new, all of them trainable
        return (model, info) if output_loading_info else model

    @property
    def input_names(self) -> tuple[str, ...]:
        """What this model reads beside ids, of pixel_values, head_vertices, head_normals and those of the faces."""
        names = ("pixel_values",) * self.config.use_vision_encoder
        names += ("head_vertices", "head_normals") * self.config.use_point_encoder
        faces = FACE_INPUTS[: 3 if self.config.read_portrait else 2]
        return names + faces * self.config.mesh_aware_faces

    def select_inputs(self, inputs: Mapping[str, T]) -> dict[str, T]:
        """Those of `inputs` that this model reads."""
        return {name: inputs[name] for name in self.input_names if name in inputs}

    def encode_condition(
        self,
        pixel_values: Tensor | None = None,
        head_vertices: Tensor | None = None,
        head_normals: Tensor | None = None,
    ) -> Tensor | None:
        """Condition tokens (B, M, D) of a portrait (B, 3, h, w) and/or a head mesh (B, V, 3) with its normals (B, V, 3)."""
        return self.condition_encoder(pixel_values, head_vertices, head_normals)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        head_vertices: Tensor | None = None,
        head_normals: Tensor | None = None,
        face_centers: Tensor | None = None,
        face_normals: Tensor | None = None,
        face_pixels: Tensor | None = None,
        condition_embeds: Tensor | None = None,
        condition_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> PointillistOutput:
        """One pass.

        At the point level ids are whole points (`group_tokens`), and what is predicted of a token also knows the slots of its own
        point that are spelled before it. Positions and cache count points, and there are no logits beside a loss.

        Args:
            input_ids: (B, L) ids of `GaussianTokenizer`, or `inputs_embeds` (B, L, D).
            attention_mask: (B, L) with 0 on padding; needed for padding on the left only.
            labels: (B, L) ids, -100 where there is nothing to learn; shifted here.
            pixel_values: (B, 3, h, w) portrait, ImageNet-normalized. head_vertices, head_normals: (B, V, 3), meters.
            face_centers, face_normals: (B, F, 3), bins and unit vectors; what `mesh_aware_faces` reads.
            face_pixels: (B, F, 74) what the portrait shows at the faces and above them, see
                `gaussian_tokenizer.rendering.face_pixels`; what `read_portrait` reads.
            condition_embeds: (B, M, D) from `encode_condition`; condition_mask: (B, M), 0 on padding. Of fewer rows S of any of
                these six, B / S successive sequences share each, without copies of it.
            drop_condition: (B,) bool, True for rows that read the empty condition instead (training of guidance).
            cache: keys and values of the tokens before, from the output of the last pass; also as `past_key_values`.
            logits_to_keep: how many last positions to keep (0: all), or which.
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if condition_embeds is None:
            condition_embeds = self.encode_condition(pixel_values, head_vertices, head_normals)
        condition = self.condition_encoder.or_empty(condition_embeds, len(tokens), drop_condition)
        options: dict[str, Any] = dict(
            cache=cache, use_cache=use_cache, condition=condition, condition_mask=condition_mask
        )
        inputs = input_ids, attention_mask, position_ids
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if isinstance(self.lm_head, SlotHeads):
            of_faces = face_centers, face_normals, face_pixels
            return self.forward_points(inputs, labels, of_faces, kept, **options, **kwargs)
        outputs = self.model(*inputs, inputs_embeds=inputs_embeds, **options, **kwargs)
        outputs["last_hidden_state"] = hidden = outputs.last_hidden_state[:, kept]
        if labels is not None and self.config.loss_within_slot:
            own = self.loss_within_slot(hidden, labels, kwargs.get("num_items_in_batch"))
            return PointillistOutput(loss=own, **outputs)
        loss, logits = None, self.lm_head(hidden)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return PointillistOutput(loss=loss, logits=logits, **outputs)

    def forward_points(
        self,
        inputs: tuple,
        labels: Tensor | None,
        of_faces: tuple[Tensor | None, ...],
        kept: slice | Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> PointillistOutput:
        """`forward` at the point level; `inputs` are those of the decoder, ids (B, L) first."""
        ids, pad = inputs[0], self.config.first_special + 2
        heads: Any = self.lm_head
        if ids is None:
            raise ValueError(
                'level="point" reads input_ids: their embedding (B, L, D) does not tell which faces they name'
            )
        embed: Any = self.model.embed_tokens
        faces = embed.faces(*of_faces)
        outputs = self.model(*inputs, faces=faces, **kwargs)
        groups = group_tokens(ids, pad)
        # What is spelled of a point before its other slots comes from the labels: the ids that are read may be disturbed.
        known = groups if labels is None else group_tokens(labels, -100)
        known = torch.where(known < 0, groups, known)
        targets = heads.targets(F.pad(known[:, 1:], (0, 0, 0, 1), value=pad), known)
        states = heads.states(outputs.last_hidden_state, targets, faces)

        def of_tokens(x: Tensor) -> Tensor:
            """(B, G, 4, C) of what predicts each group -> (B, L, C) of what predicts each token; zero before the second group."""
            lead = 3 if ids.shape[1] % 4 else 0
            return F.pad(x.flatten(1, 2), (0, 0, 3, 0))[:, lead : lead + ids.shape[1]][:, kept]

        outputs["last_hidden_state"] = of_tokens(states)
        if labels is None:
            return PointillistOutput(logits=of_tokens(heads.logits(states, targets, faces)), **outputs)
        own = F.pad(heads.classes(group_tokens(labels, -100)[:, 1:]), (0, 0, 0, 1), value=-100)
        count = (own >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        return PointillistOutput(loss=heads.nll(states, own, targets, faces).sum() / count, **outputs)

    def loss_within_slot(
        self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Cross-entropy of hidden states (B, L, D) and labels (B, L) over the tokens that a label's slot admits.

        These are the faces for a face, coordinates and special tokens for all else, as in generation under the grammar. Only their
        logits are computed, so three in four tokens need none of the faces.
        """
        hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        faces, others = self.config.slot_tokens()
        is_face = (labels >= faces[0].start) & (labels < faces[0].stop)
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, chosen in ((faces, is_face), (others, (labels >= 0) & ~is_face)):
            targets = labels[chosen] - rows[0].start
            if rows is others:
                targets = torch.where(targets >= faces[0].stop, targets - self.config.n_faces, targets)
            total = total + F.cross_entropy(self.lm_head(hidden[chosen], rows).float(), targets, reduction="sum")
        return total / ((labels >= 0).sum() if num_items_in_batch is None else num_items_in_batch)

    def point_nll(
        self,
        features: Tensor,
        points: Tensor,
        face_centers: Tensor | None = None,
        face_normals: Tensor | None = None,
        face_pixels: Tensor | None = None,
    ) -> Tensor:
        """Nats (B, N, 4) of the ids of points (B, N, 4), given the features (B, N, 4, D) that predicted them; zero where negative.

        Faces (B, F, 3), or (S, F, 3) for B / S successive sequences each.
        A token competes with those of its slot, at the point level also with the end in the slot that is spelled first.
        """
        if isinstance(self.lm_head, SlotHeads):
            embed: Any = self.model.embed_tokens
            known = torch.where(points < 0, self.config.first_special + 2, points)
            own = self.lm_head.targets(known, F.pad(known[:, :-1], (0, 0, 1, 0), value=self.config.first_special))
            return self.lm_head.nll(features, own.classes, own, embed.faces(face_centers, face_normals, face_pixels))
        config, nll = self.config, []
        for rows, slots in (
            (slice(0, config.n_bins), slice(0, 3)),
            (slice(config.n_bins, config.first_special), slice(3, 4)),
        ):
            scores = self.lm_head(features[:, :, slots], (rows,)).float()
            targets = torch.where(points[..., slots] < 0, -100, points[..., slots] - rows.start)
            nll.append(F.cross_entropy(scores.permute(0, 3, 1, 2), targets, reduction="none"))
        return torch.cat(nll, dim=-1)

    def num_decoder_parameters(self) -> int:
        """Parameters without the encoders of the condition, as the paper counts them."""
        return sum(p.numel() for module in (self.model, self.lm_head) for p in module.parameters())
