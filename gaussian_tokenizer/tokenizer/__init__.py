"""GaussianTokenizer: clouds of face-anchored points to token ids and back. These files travel with checkpoints.

`GaussianTokenizer` is imported and registered with `AutoProcessor` on first use: importing transformers takes seconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"registration": ["GaussianTokenizer"]})
