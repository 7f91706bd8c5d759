"""The configuration: the paper's sizes by default, contradictions refused."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from modeling import PointillistConfig


def test_defaults_are_the_papers():
    config = PointillistConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert (config.n_bins, config.n_faces, config.sliding_window) == (1024, 10144, 12000)
    assert config.vocab_size == 11171
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (11168, 11169, 11170)


def test_a_saved_configuration_loads_equal(tmp_path):
    config = PointillistConfig(n_bins=64, n_faces=600, vision_config={"hidden_size": 96, "num_attention_heads": 3})
    config.save_pretrained(tmp_path)
    loaded = PointillistConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.vision_config.hidden_size == 96


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(sliding_window=30), "multiple of 4"),
        (dict(sliding_window=0), "multiple of 4"),
        (dict(vocab_size=100), "vocab_size 100 is not n_bins"),
        (dict(num_key_value_heads=3), "not a multiple"),
        (dict(partial_rotary_factor=0.3), "even whole number"),
        (dict(n_faces=0), "must be positive"),
        (dict(point_samples=0), "point_samples must be positive"),
        (dict(point_hidden_size=100, point_attention_heads=3), "not a multiple"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        PointillistConfig(**fields)
