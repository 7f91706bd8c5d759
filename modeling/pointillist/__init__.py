"""The autoregressive point model and its generation. These files travel with checkpoints: third-party imports and siblings only."""

from .configuration_pointillist import PointillistConfig
from .generation_grammar import PointGrammar
from .generation_pointillist import PointillistGenerateOutput
from .generation_ring_cache import RingCache
from .generation_streamer import PointStreamer
from .modeling_pointillist import PointillistForCausalLM, PointillistModel, PointillistOutput

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
