"""The license that a trained model's card names."""

from types import SimpleNamespace

import pytest

from training.common.model_card import hub_license


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["CC0-1.0", "cc0-1.0"], "cc0-1.0"),
        (["CC-BY-4.0", "CC0-1.0"], "other"),  # whoever uses the model must read the card of its corpus
        (["for us alone"], "other"),
        (["unknown"], "other"),
    ],
)
def test_a_model_has_the_license_of_its_subjects_where_they_share_one(licenses, expected):
    corpus = SimpleNamespace(avatars=lambda split: {"license": licenses if split == "train" else ["MIT"]})
    assert hub_license(corpus) == expected
