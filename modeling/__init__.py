"""The neural half of the AvatarPointillist toolkit: the autoregressive point model, its generation, the Gaussian decoder."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import gaussian_tokenizer.tokenizer.registration  # noqa: F401  (AutoProcessor then knows the tokenizer that lies beside the models)
from gaussian_tokenizer.rendering.portrait_points import Reference

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

for _auto, _config, _model in (
    (AutoModel, PointillistConfig, PointillistModel),
    (AutoModelForCausalLM, PointillistConfig, PointillistForCausalLM),
    (AutoModel, GaussianDecoderConfig, GaussianDecoder),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _auto.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class(_auto.__name__)

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
    "Reference",
    "RingCache",
    "to_gaussians",
]
