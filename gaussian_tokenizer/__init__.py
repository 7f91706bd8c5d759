"""The ground floor of the AvatarPointillist toolkit: heads, avatars, tokens, corpora. No neural network lives here.

`__init__.pyi` lists what it offers; transformers and datasets are imported on first use, because they take seconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
