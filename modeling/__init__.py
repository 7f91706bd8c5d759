"""The neural half of the AvatarPointillist toolkit: the autoregressive point model, its generation, the Gaussian decoder."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import gaussian_tokenizer.tokenizer.registration  # noqa: F401  (AutoProcessor then knows the tokenizer that lies beside the models)

from .conversion import to_gaussians
from .gaussian_decoder import GaussianDecoder, GaussianDecoderConfig, GaussianDecoderOutput
from .pipeline import AvatarPipeline
from .pointillist import (
    PointGrammar,
    PointillistConfig,
    PointillistForCausalLM,
    PointillistGenerateOutput,
    PointillistModel,
    PointillistOutput,
    PointStreamer,
    RingCache,
)

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
