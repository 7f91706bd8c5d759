"""What depends on the version of transformers: since 5.24 it calls the key/value cache `cache`, before that `past_key_values`.

Our code says `cache`; both names are accepted as an argument and can be read from our outputs. `CACHE_NAME` is the one to pass to
transformers. Once 5.24 is the oldest version supported, everything here but `forward_pass` and `synchronizes_ranks` can go.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import get_annotations

import torch
from transformers import CompileConfig
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(GenerateDecoderOnlyOutput)})


def rename_cache(arguments: dict, name: str = "cache") -> dict:
    """Keyword arguments with the cache called `name`, whichever name it had. Raises `ValueError` if both are given."""
    given = [one for one in CACHE_NAMES if arguments.get(one) is not None]
    if len(given) > 1:
        raise ValueError("found cache and past_key_values, two names of one argument: give one of them")
    others = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    return others | {name: arguments[given[0]]} if given else others


def takes_cache(function: Callable) -> Callable:
    """Decorator of a function whose argument `cache` may also be given as `past_key_values`."""

    @wraps(function)
    def renamed(*args, **kwargs):
        return function(*args, **rename_cache(kwargs))

    return renamed


def holds_cache(output: type) -> type:
    """Decorator, below `@dataclass`, of a `ModelOutput` with a field `cache`, which gets transformers' name for it as well."""
    if CACHE_NAME != "cache":
        annotations = get_annotations(output)
        output.__annotations__ = {CACHE_NAME if name == "cache" else name: type_ for name, type_ in annotations.items()}
        if "cache" in annotations:
            setattr(output, CACHE_NAME, None)
        setattr(output, "cache", property(lambda self: getattr(self, CACHE_NAME)))  # noqa: B010  (unknown to type checkers)
    return output


def forward_pass(model, cache: Cache | None, generation_config, step: Callable | None = None) -> Callable:
    """What decodes a position, the call of `model` or a `step` made of parts of it: compiled where transformers would compile.

    `_valid_auto_compile_criteria` is private, but a copy of what it knows about quantizers, offloading and devices would age.
    """
    if cache is None or not model._valid_auto_compile_criteria({CACHE_NAME: cache}, generation_config):
        return step or model.__call__
    if step is None:
        return model.get_compiled_call(generation_config.compile_config)
    options = (generation_config.compile_config or CompileConfig()).to_dict()
    if options["dynamic"] is None:
        # Otherwise a second temperature or batch would become an input that is a number of the host: no CUDA graph.
        options["dynamic"] = False
    return torch.compile(step, **options)  # compiled code belongs to the function: it serves every generation


def synchronizes_ranks(model) -> bool:
    """Whether every rank must take part in each forward pass, because weights are sharded (ZeRO-3, FSDP)."""
    return torch.distributed.is_initialized() and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))
