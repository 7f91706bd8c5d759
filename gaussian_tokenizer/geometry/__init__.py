"""Rotations and triangles, batched and differentiable. Imports nothing of ours."""
