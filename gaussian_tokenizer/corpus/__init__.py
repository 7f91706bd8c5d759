"""Tokenized avatars with their conditions as a Hugging Face dataset: built, checked, read."""

from .building import build
from .corpus import Corpus, load_corpus
from .options import BuildSettings

__all__ = ["BuildSettings", "Corpus", "build", "load_corpus"]
