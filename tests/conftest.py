"""What tests of several packages share: a corpus of a few synthetic subjects, small enough to be built in seconds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gaussian_tokenizer.corpus_builder import build
from gaussian_tokenizer.corpus_plan import BuildSettings
from gaussian_tokenizer.head_model import HeadModel
from gaussian_tokenizer.synthesize import synthesize


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """Folder of a corpus: 12 subjects, 4 of them held out, about 60 points each on 600 faces, four pictures of 56 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    synthesize(folder / "avatars", num_subjects=12, image_size=56, num_points=60, views=2, timesteps=2)
    settings = BuildSettings(n_bins=64, image_size=56, num_validation=4)
    build(folder / "avatars", HeadModel.procedural(600), folder / "corpus", settings, progress=False)
    return folder / "corpus"


@pytest.fixture(scope="session")
def pictures():
    """Call it with a seed and a size."""

    def make(seed: int, size: tuple[int, int] = (40, 32)) -> tuple[torch.Tensor, torch.Tensor]:
        """Two pairs of smooth pictures (2, H, W, 3) with noise of different strength."""
        random = np.random.default_rng(seed)
        y, x = np.mgrid[: size[0], : size[1]] / 10
        truth = np.stack(
            [0.5 + 0.4 * np.sin(x[..., None] + y[..., None] * np.arange(1, 4) + phase) for phase in (0, 1)]
        )
        noise = np.array([0.02, 0.2])[:, None, None, None] * random.standard_normal(truth.shape)
        return torch.from_numpy(np.clip(truth + noise, 0, 1)).float(), torch.from_numpy(truth).float()

    return make
