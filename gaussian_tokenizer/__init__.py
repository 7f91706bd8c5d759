"""The ground floor of the AvatarPointillist toolkit: heads, avatars, tokens, corpora. No neural network lives here."""

from transformers import AutoProcessor

from .avatar import GaussianAvatar
from .corpus import load_corpus
from .head_model import HeadModel, load_head
from .head_parameters import HeadParameters
from .processing_gaussian_tokenizer import GaussianTokenizer

# `AutoProcessor.from_pretrained` finds the class by the name in processor_config.json among the registered ones.
AutoProcessor.register("gaussian_tokenizer", GaussianTokenizer, exist_ok=True)

__all__ = ["GaussianAvatar", "GaussianTokenizer", "HeadModel", "HeadParameters", "load_corpus", "load_head"]
