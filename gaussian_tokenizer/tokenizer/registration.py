"""`GaussianTokenizer`, known to `AutoProcessor`: imported from here it is registered under the name in processor_config.json.

Not in the file that defines it, which travels with checkpoints: registered from there, the code of one checkpoint would be
taken for the tokenizer of all others. Not when the package is imported either: transformers takes seconds.
"""

from transformers import AutoProcessor

from .processing_gaussian_tokenizer import GaussianTokenizer

AutoProcessor.register("gaussian_tokenizer", GaussianTokenizer, exist_ok=True)

__all__ = ["GaussianTokenizer"]
