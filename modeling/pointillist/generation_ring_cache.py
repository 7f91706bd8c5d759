"""A key/value cache for sliding windows that never moves what it holds, and the masks of self-attention.

Keys are rotated when written, so their order in memory does not matter: each new token overwrites the one that just left the
window. A decoding step writes one row (transformers' sliding caches copy all W rows every step). Window and rolling: Meshtron.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .modeling_compatibility import CACHE_NAME


class RingLayer(CacheLayerMixin):
    """Keys and values (B, H, W, D) of one layer's last W tokens, token p in slot p mod W."""

    is_sliding = True
    keys: Tensor
    values: Tensor
    position: Tensor  # (1,) tokens seen, on the device: what a compiled step reads

    def __init__(self, capacity: int, static: bool):
        super().__init__()
        self.capacity = capacity
        self.static = self.is_compileable = static
        self.counted: int | None = 0  # tokens seen, on the host; None after compiled steps

    @property
    def length(self) -> int:
        """Tokens seen; after compiled steps it is fetched from the device."""
        if self.counted is None:
            self.counted = int(self.position)
        return self.counted

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        states = (key_states, value_states)
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.capacity, x.shape[-1]) for x in states)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        if not torch.compiler.is_compiling():
            for buffer in (self.keys, self.values, self.position):
                torch._dynamo.mark_static_address(buffer)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store new keys and values (B, H, L, D); return those the new tokens may attend to.

        For L = 1 the slots come in ring order; for L > 1 (a prompt) the kept tokens come in time order, then the new ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if new == 1:
            slot = torch.remainder(self.position, self.capacity)
            self.keys.index_copy_(2, slot, key_states)
            self.values.index_copy_(2, slot, value_states)
            self.position.add_(1)
            if self.static and torch.compiler.is_compiling():
                self.counted = None  # a number of the host would be an input of the step: a CUDA graph for each value
                return self.keys, self.values
            self.counted = self.length + 1
            if self.static:
                return self.keys, self.values
            filled = min(self.length, self.capacity)
            return self.keys[:, :, :filled], self.values[:, :, :filled]

        # A prompt: attend to the previous W - 1 tokens in time order; overwrite the slots of those that left the window.
        kept = min(self.length, self.capacity - 1)
        old = torch.arange(self.length - kept, self.length, device=self.device) % self.capacity
        keys = torch.cat((self.keys[:, :, old], key_states), dim=2) if kept else key_states
        values = torch.cat((self.values[:, :, old], value_states), dim=2) if kept else value_states
        stored = min(new, self.capacity)
        slots = torch.arange(self.length + new - stored, self.length + new, device=self.device) % self.capacity
        self.keys[:, :, slots] = key_states[:, :, -stored:]
        self.values[:, :, slots] = value_states[:, :, -stored:]
        self.position.add_(new)
        self.counted = self.length + new
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, time of the first) for the prompt mask; a single query has its own mask (`ring_mask`)."""
        kept = min(self.length, self.capacity - 1)
        return kept + query_length, self.length - kept

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        super().reset()
        self.counted = 0
        if self.is_initialized:
            self.position.zero_()


class RingCache(Cache):
    """A ring for each layer of the decoder.

    A query attends to `window` tokens, itself included (`config.sliding_window`). No sequence may exceed `max_length`, if given,
    which limits the memory. `static`: full buffers and a mask, fixed shapes for `torch.compile`; else what is filled.
    """

    def __init__(self, num_layers: int, window: int, max_length: int | None = None, static: bool = False):
        capacity = window if max_length is None else min(window, max_length)
        super().__init__(layers=[RingLayer(capacity, static) for _ in range(num_layers)])
        self.capacity, self.window, self.static = capacity, window, static

    def check_room(self, length: int) -> None:
        """Raise `ValueError` if `length` tokens would overwrite some that are still in the window."""
        if self.capacity < min(length, self.window):
            raise ValueError(
                f"this cache was made for {self.capacity} tokens and is full, but the window is {self.window}: "
                "make it with a larger max_length"
            )


def self_attention_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None,
) -> Any:
    """The mask of new tokens (B, L, D) before `cache`, as the configured attention function takes it; None: no mask needed.

    attention_mask (B, columns) is 0 on padding, the new tokens included; one of four axes is a finished mask and returned.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(cache, RingCache) or inputs_embeds.shape[1] > 1:
        inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, CACHE_NAME: cache}
        # Nothing leaves the window of a training sequence. transformers makes a mask at a length of exactly the window, and with
        # a mask the attention functions also compute what it hides: the same numbers in up to twice the time.
        whole = cache is None and inputs_embeds.shape[1] <= config.sliding_window
        create_mask = create_causal_mask if whole else create_sliding_window_causal_mask
        return create_mask(config=config, position_ids=position_ids, **inputs)
    mask = ring_mask(cache, attention_mask, inputs_embeds.dtype, inputs_embeds.device)
    if mask is None or "flash" not in str(config._attn_implementation):
        return mask
    return (mask[:, 0, 0] == 0).expand(len(inputs_embeds), -1)  # flash attention reads (B, slots), true where visible


def ring_mask(
    cache: RingCache,
    attention_mask: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    first: Tensor | int = 0,
) -> Tensor | None:
    """Additive mask (B or 1, 1, 1, slots) of the single token that is about to be stored, or None where all slots count.

    Padding is what `attention_mask` says, or for a static cache the columns of each row before its `first` (B, 1), zero or more.
    """
    layer = cache.layers[0]
    assert isinstance(layer, RingLayer)
    if not torch.compiler.is_compiling() and layer.counted is not None:  # a loop of compiled steps counts itself
        cache.check_room(layer.counted + 1)
    if attention_mask is None and not cache.static:
        return None
    now = layer.position if layer.is_initialized else torch.zeros(1, dtype=torch.long, device=device)
    slots = torch.arange(layer.capacity if cache.static else min(layer.length + 1, layer.capacity), device=device)
    column = now - (now - slots) % layer.capacity  # the latest column written to each slot, the new token's included
    visible = column[None] >= first
    if attention_mask is not None:
        visible = visible & attention_mask[:, column.clamp(min=0)].bool()
    return additive_mask(visible, dtype)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, keys) bool -> (B, 1, 1, keys), zero where True and the least finite number elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None, None]
