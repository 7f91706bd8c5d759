"""A run of the bench in this process, and clips with other images."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import reenactment_bench
from eval.reenactment.clips import Clip


def run_bench(words: list[str], output: Path, *more: str) -> dict:
    """What a run in this process writes to results.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reenactment_bench.py", *words, "--output_dir", str(output), *more])
        reenactment_bench.main()
    return json.loads((output / "results.json").read_text())


def repainted(clip: Clip, gray: int) -> Clip:
    """The same clip with other images, all of one gray."""
    return replace(clip, read=lambda row: Image.new("RGBA", clip.size, (gray, gray, gray, 255)))


def same_avatar(first, second) -> bool:
    return all(torch.equal(value, second.tensors()[name]) for name, value in first.tensors().items())


def noise(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
