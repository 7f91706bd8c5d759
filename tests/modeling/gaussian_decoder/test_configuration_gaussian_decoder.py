"""The configuration of the Gaussian decoder: the paper's sizes by default, contradictions refused."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError

from modeling import GaussianDecoderConfig, PointillistConfig
from modeling.gaussian_decoder.configuration_gaussian_decoder import spread_layers

VISION = dict(hidden_size=24, num_hidden_layers=5, num_attention_heads=3, image_size=28, patch_size=14)
TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, point_feature_size=20, vision_config=VISION)


def test_a_saved_configuration_loads_equal(tmp_path):
    config = GaussianDecoderConfig(**TINY, mode="position", vision_layers=[0, 4], sh_degree=3)
    config.save_pretrained(tmp_path)
    loaded = GaussianDecoderConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and loaded.vision_config.hidden_size == 24


def test_the_defaults_are_the_papers():
    config = GaussianDecoderConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 12, 16)
    assert (config.mode, config.vision_layers, config.image_embed_size) == ("full", [4, 11, 17, 23], 4096)
    assert (config.max_scale, config.max_offset, config.init_opacity) == (0.01, 0.1, 0.1)
    assert config.init_scale == pytest.approx(math.exp(-5))


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "point_feature_size")
LENGTHS = ("point_extent", "init_scale", "max_scale", "max_offset")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mode="flame"), "found 'flame'"),
        (dict(num_attention_heads=5), "multiple of num_attention_heads 5"),
        *(({name: 0}, f"{name} is 0, expected 1 to") for name in SIZES),
        *(({name: math.nan}, f"{name} is nan, expected") for name in LENGTHS),
        (dict(num_hidden_layers=10**400), "num_hidden_layers is 10+, expected 1 to 10000"),
        (dict(point_frequencies=-1), "point_frequencies is -1, expected 0 to 64"),
        (dict(point_extent=-math.inf), "point_extent is -inf, expected"),
        (dict(point_center=[0.0, 0.0, math.inf]), "point_center is .*inf"),
        (dict(vision_layers=[0, 5]), "ascending layers of the 5"),
        (dict(vision_layers=[3, 1]), "ascending"),
        (dict(vision_layers=[]), "ascending"),
        (dict(vision_layers=[0, 2], freeze_vision_encoder=False), "read to its last layer"),
        (dict(sh_degree=4), "sh_degree must be 0 to 3"),
        (dict(init_scale=0.01), "gradient is zero"),
        (dict(init_opacity=1.0), "init_opacity"),
        (dict(point_extent=0.0), "point_extent is 0.0, expected"),
        (dict(gaussians_per_point=0), "gaussians_per_point is 0, expected 1 to 1000; correct config.json"),
        (dict(gaussians_per_point=-2), "gaussians_per_point is -2, expected 1"),
        (dict(attention="local"), "attention must be one of joint, portrait; found 'local'"),
        (dict(mode="ar_feature", read_anchors=True), "read_anchors is for the modes full and position"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        GaussianDecoderConfig(**{**TINY, **fields})


def test_the_layers_read_are_lams():
    assert spread_layers(24) == [4, 11, 17, 23]
    assert spread_layers(12) == [2, 5, 8, 11]
    assert spread_layers(40) == [9, 19, 29, 39]
    assert spread_layers(1) == [0]


@pytest.mark.parametrize("config_class", [GaussianDecoderConfig, PointillistConfig])
def test_a_portrait_encoder_that_is_none_is_named(config_class):
    settings = config_class().to_dict()
    settings["vision_config"]["id2label"] = 5
    with pytest.raises(ValueError, match="vision_config is no configuration of DINOv2"):
        config_class.from_dict(settings)
