"""What depends on the version of transformers, and the internals of transformers that are used; nothing else of ours does either.

Since 5.24 transformers calls the key/value cache `cache` where it was `past_key_values`: as an argument of `forward` and
`generate`, as a field of outputs, and as a name in its own layers. Our code says `cache`; both names are taken as an argument and
can be read from our outputs, and `CACHE_NAME` is the one to pass to transformers. Once 5.24 is the oldest version supported, all
of this but `forward_pass` and `synchronises_ranks` can go.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import get_annotations

import torch
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(GenerateDecoderOnlyOutput)})


def named_as_here(arguments: dict, name: str = "cache") -> dict:
    """Keyword arguments with the cache, under whichever name, as `name`.

    Raises `ValueError` where both names are given.
    """
    given = [one for one in CACHE_NAMES if arguments.get(one) is not None]
    if len(given) > 1:
        raise ValueError("found cache and past_key_values, two names of one argument: give one of them")
    others = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    return others | {name: arguments[given[0]]} if given else others


def takes_cache(function: Callable) -> Callable:
    """Decorator of a function with an argument `cache`: it may be called `past_key_values` too."""

    @wraps(function)
    def renamed(*args, **kwargs):
        return function(*args, **named_as_here(kwargs))

    return renamed


def holds_cache(output: type) -> type:
    """Decorator, below `@dataclass`, of a `ModelOutput` with a field `cache`: transformers finds it, whatever its name for it."""
    if CACHE_NAME != "cache":
        annotations = get_annotations(output)
        output.__annotations__ = {
            CACHE_NAME if name == "cache" else name: annotation for name, annotation in annotations.items()
        }
        if "cache" in annotations:
            setattr(output, CACHE_NAME, None)
        output.cache = property(lambda self: getattr(self, CACHE_NAME))
    return output


def forward_pass(model, cache: Cache | None, generation_config) -> Callable:
    """The call that decodes a token: compiled where the cache has fixed shapes and transformers finds the hardware fit for it.

    `_valid_auto_compile_criteria` is private, but what it knows of quantizers, offloading and devices would have to be copied, and
    `cache_implementation="static"` is to compile where it does in every other model.
    """
    if cache is not None and model._valid_auto_compile_criteria({CACHE_NAME: cache}, generation_config):
        return model.get_compiled_call(generation_config.compile_config)
    return model.__call__


def synchronises_ranks(model) -> bool:
    """Whether every rank must take part in each forward pass, because weights are spread over ranks (ZeRO-3, FSDP).

    `GenerationMixin.generate` finds this out too, but does not hand it on to a decoding loop of one's own.
    """
    return torch.distributed.is_initialized() and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))
