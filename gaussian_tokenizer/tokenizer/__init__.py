"""GaussianTokenizer: points to token ids and back, imported on first use. These files travel with checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"registration": ["GaussianTokenizer"]})
