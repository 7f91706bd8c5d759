"""`GaussianTokenizer`, known to `AutoProcessor`: imported from here it is registered under the name in processor_config.json.

Not in the file that defines it, which travels with checkpoints: the code of one checkpoint would become the tokenizer of all
others. Not in the package's `__init__` either: importing transformers takes seconds.
"""

from transformers import AutoProcessor

from .processing_gaussian_tokenizer import GaussianTokenizer

AutoProcessor.register("gaussian_tokenizer", GaussianTokenizer, exist_ok=True)

__all__ = ["GaussianTokenizer"]
