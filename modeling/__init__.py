"""The neural half of the AvatarPointillist toolkit: the autoregressive point model and its generation."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_pointillist import PointillistConfig
from .generation_grammar import PointGrammar
from .generation_pointillist import PointillistGenerateOutput
from .generation_ring_cache import RingCache
from .generation_streamer import PointStreamer
from .modeling_pointillist import PointillistForCausalLM, PointillistModel, PointillistOutput

AutoConfig.register(PointillistConfig.model_type, PointillistConfig, exist_ok=True)
AutoModelForCausalLM.register(PointillistConfig, PointillistForCausalLM, exist_ok=True)
PointillistConfig.register_for_auto_class()
PointillistForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "PointGrammar",
    "PointStreamer",
    "PointillistConfig",
    "PointillistForCausalLM",
    "PointillistGenerateOutput",
    "PointillistModel",
    "PointillistOutput",
    "RingCache",
]
