"""The Gaussian decoder. These files travel with checkpoints: third-party imports and siblings only."""

from .configuration_gaussian_decoder import GaussianDecoderConfig
from .modeling_gaussian_decoder import GaussianDecoder, GaussianDecoderOutput

__all__ = ["GaussianDecoder", "GaussianDecoderConfig", "GaussianDecoderOutput"]
