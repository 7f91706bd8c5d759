"""What a trained model's card says: the license, and how the model is used."""

import re
from types import SimpleNamespace

import pytest

from modeling import PointillistConfig
from training.common.model_card import hub_license, model_card


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


@pytest.mark.parametrize("reads", [True, False])
def test_the_example_of_a_point_model_makes_all_that_the_model_reads(reads):
    corpus = SimpleNamespace(
        path=SimpleNamespace(name="c"), avatars=lambda split: {"license": ["MIT"]},
        tokenizer=SimpleNamespace(head_name="h", slots=("x", "y", "z", "f")),
    )  # fmt: skip
    measures = [f"{name}_{slot}" for name in ("nll", "perplexity", "accuracy") for slot in "xyzf"]
    report = {f"heldout_{name}": 1.0 for name in ("nll", *measures)} | {"unigram_nll": 2.0, "uniform_nll": 3.0}
    report |= {"num_parameters": 1, "num_subjects": 2, "num_tokens": 3, "steps": 4}
    arguments = SimpleNamespace(learning_rate=1.0, per_device_train_batch_size=1, world_size=1)
    config = PointillistConfig(level="point", mesh_aware_faces=True, read_portrait=reads, sliding_window=384)
    card = model_card("point_model", corpus, config=config, report=report, arguments=arguments)
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(example, "card", "exec")
    assert ('inputs["face_pixels"] = ' in example) == reads and "| window | 1536 tokens |" in card
