"""Tokenized avatars with their conditions as a Hugging Face dataset: built, checked, read."""
