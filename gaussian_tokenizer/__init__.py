"""The ground floor of the AvatarPointillist toolkit: heads, avatars, tokens, corpora. No neural network lives here.

What the package offers stands in `__init__.pyi` and is imported when it is first used: transformers and datasets take seconds, and
looking at an avatar needs neither.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
