"""Synthetic subjects: heads, hair, skin and images from a seed."""
