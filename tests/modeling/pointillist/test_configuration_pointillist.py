"""The configuration: the paper's sizes by default, contradictions refused."""

import math

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


OUT_OF_RANGE: list[tuple[str, float]] = [
    ("n_bins", 0),
    ("n_faces", 0),
    ("point_samples", 0),
    *((name, size) for name in ("hidden_size", "intermediate_size", "point_hidden_size") for size in (0, -1)),
    *((name, 0) for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "point_attention_heads")),
    *((name, -1) for name in ("num_hidden_layers", "point_layers", "point_latents", "point_frequencies")),
    *((name, value) for name in ("point_extent", "rope_theta") for value in (math.nan, -math.inf, math.inf, 0.0)),
    *((name, value) for name in ("partial_rotary_factor", "attention_dropout") for value in (math.inf, -0.5, 1.5)),
    *((name, math.nan) for name in ("rms_norm_eps", "initializer_range")),
]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(sliding_window=30), "multiple of 4"),
        (dict(sliding_window=0), "multiple of 4"),
        (dict(vocab_size=100), "vocab_size 100 is not n_bins"),
        (dict(num_key_value_heads=3), "not a multiple"),
        (dict(partial_rotary_factor=0.3), "even whole number"),
        *(({name: value}, f"{name} is {value}, expected") for name, value in OUT_OF_RANGE),
        (dict(num_hidden_layers=10**400), "num_hidden_layers is 10+, expected 1 to 10000"),
        (dict(vision_config=dict(num_hidden_layers=10**9)), "vision_config has num_hidden_layers 1000000000"),
        (dict(dtype="float99"), "dtype is .float99., expected one of torch.s"),
        (dict(point_center=[0.0, 0.0]), r"point_center is \[0.0, 0.0\], expected x, y and z"),
        (dict(point_center=[0.0, 0.0, math.nan]), "point_center is .*nan"),
        (dict(point_hidden_size=100, point_attention_heads=3), "not a multiple"),
        *(
            (dict(token_order=order), f"token_order is '{order}', expected the letters")
            for order in ("", "yzx", "yzxb")
        ),
        (dict(level="point", token_order="yzxf"), "found token_order 'yzxf': its heads spell a point in slot_order"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        PointillistConfig(**fields)


def test_a_number_that_goes_wrong_later_is_refused_when_the_configuration_is_saved(tmp_path):
    config = PointillistConfig()
    config.num_key_value_heads = 0
    with pytest.raises((ValueError, StrictDataclassError), match="num_key_value_heads is 0, expected 1 to"):
        config.save_pretrained(tmp_path)
