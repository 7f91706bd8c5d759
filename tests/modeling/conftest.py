"""A model small enough for seconds, and a condition for it."""

import pytest
import torch

from modeling import PointillistConfig, PointillistForCausalLM

TINY = dict(
    n_bins=16,
    n_faces=20,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    sliding_window=32,
    use_vision_encoder=False,
    point_latents=8,
    point_hidden_size=32,
    point_layers=1,
    point_attention_heads=4,
)


@pytest.fixture
def tiny_config() -> PointillistConfig:
    return PointillistConfig(**TINY)


@pytest.fixture
def tiny_model(tiny_config) -> PointillistForCausalLM:
    torch.manual_seed(0)
    # Large initial weights: attention is then far from uniform, so that a wrong mask or position shows.
    tiny_config.initializer_range = 0.2
    return PointillistForCausalLM(tiny_config).eval()


@pytest.fixture
def condition() -> torch.Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
