"""Synthetic subjects: heads, hair, skin and images from a seed."""

from .source import SyntheticSettings, SyntheticSource
from .subject import SyntheticSubject, synthesize_subject

__all__ = ["SyntheticSettings", "SyntheticSource", "SyntheticSubject", "synthesize_subject"]
