"""Synthetic subjects: heads, hair, skin and images from a seed."""

from .source import SyntheticSource
from .subject import SyntheticSubject, synthesize_subject

__all__ = ["SyntheticSource", "SyntheticSubject", "synthesize_subject"]
