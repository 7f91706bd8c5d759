"""`GaussianTokenizer`, registered with `AutoProcessor` under the name in processor_config.json.

Not in the file that defines it: the copy in one checkpoint would become the tokenizer of all others.
"""

from transformers import AutoProcessor

from .processing_gaussian_tokenizer import GaussianTokenizer

AutoProcessor.register("gaussian_tokenizer", GaussianTokenizer, exist_ok=True)
