"""What tests of several packages share: a corpus of a few synthetic subjects, small enough to be built in seconds."""

from pathlib import Path

import pytest

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
