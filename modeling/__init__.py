"""The neural half of the AvatarPointillist toolkit: the autoregressive point model, its generation, the Gaussian decoder."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import gaussian_tokenizer.tokenizer.registration  # noqa: F401  (AutoProcessor then knows the tokenizer that lies beside the models)

from .configuration_gaussian_decoder import GaussianDecoderConfig
from .configuration_pointillist import PointillistConfig
from .decoding import to_gaussians
from .generation_grammar import PointGrammar
from .generation_pointillist import PointillistGenerateOutput
from .generation_ring_cache import RingCache
from .generation_streamer import PointStreamer
from .modeling_gaussian_decoder import GaussianDecoder, GaussianDecoderOutput
from .modeling_pointillist import PointillistForCausalLM, PointillistModel, PointillistOutput
from .pipeline import AvatarPipeline

AutoConfig.register(PointillistConfig.model_type, PointillistConfig, exist_ok=True)
AutoModel.register(PointillistConfig, PointillistModel, exist_ok=True)
AutoModelForCausalLM.register(PointillistConfig, PointillistForCausalLM, exist_ok=True)
PointillistConfig.register_for_auto_class()
PointillistModel.register_for_auto_class("AutoModel")
PointillistForCausalLM.register_for_auto_class("AutoModelForCausalLM")

AutoConfig.register(GaussianDecoderConfig.model_type, GaussianDecoderConfig, exist_ok=True)
AutoModel.register(GaussianDecoderConfig, GaussianDecoder, exist_ok=True)
GaussianDecoderConfig.register_for_auto_class()
GaussianDecoder.register_for_auto_class("AutoModel")

__all__ = [
    "AvatarPipeline",
    "GaussianDecoder",
    "GaussianDecoderConfig",
    "GaussianDecoderOutput",
    "PointGrammar",
    "PointStreamer",
    "PointillistConfig",
    "PointillistForCausalLM",
    "PointillistGenerateOutput",
    "PointillistModel",
    "PointillistOutput",
    "RingCache",
    "to_gaussians",
]
