"""A model small enough for seconds, and a condition for it."""

import pytest
import torch
from tiny_model import TINY

from modeling import PointillistConfig, PointillistForCausalLM


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
