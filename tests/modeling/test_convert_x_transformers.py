"""Parity with x-transformers: same weights, same logits; same parameter count at the paper's size."""

import pytest
import torch
from x_transformers import Decoder, TransformerWrapper

from modeling import PointillistConfig, PointillistForCausalLM, convert_x_transformers
from modeling.convert_x_transformers import convert_state_dict, load_x_transformers


def x_transformers_model(config: PointillistConfig) -> TransformerWrapper:
    return TransformerWrapper(
        num_tokens=config.vocab_size,
        max_seq_len=config.sliding_window,
        use_abs_pos_emb=False,
        attn_layers=Decoder(
            dim=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            attn_dim_head=config.head_dim,
            cross_attend=True,
            rotary_pos_emb=True,
            rotary_emb_dim=int(config.head_dim * config.partial_rotary_factor),
            use_rmsnorm=True,
            attn_flash=True,
        ),
    )


@pytest.mark.parametrize("partial_rotary_factor", [0.5, 1.0])
def test_logits_agree_with_x_transformers(partial_rotary_factor):
    config = PointillistConfig(
        n_bins=64, n_faces=100, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2,
        head_dim=64, sliding_window=128, use_vision_encoder=False, use_point_encoder=False,
        partial_rotary_factor=partial_rotary_factor,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = x_transformers_model(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # norms too: gains away from one
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = PointillistForCausalLM(config).eval()
    load_x_transformers(model, reference.state_dict())
    ids = torch.randint(0, config.vocab_size, (3, 128))
    context = torch.randn(3, 17, 128)
    with torch.no_grad():
        ours, theirs = model(ids, condition_embeds=context).logits, reference(ids, context=context)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_papers_configuration_has_exactly_x_transformers_parameter_count():
    config = PointillistConfig(use_vision_encoder=False, use_point_encoder=False)
    with torch.device("meta"):
        reference = x_transformers_model(config)
        model = PointillistForCausalLM(config)
    count = sum(p.numel() for p in reference.parameters())
    assert model.num_decoder_parameters() == count == 425_729_024


def test_weights_of_another_depth_are_refused(tiny_config):
    weights = x_transformers_model(tiny_config).state_dict()
    tiny_config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"lack 'attn_layers\.layers\.6"):
        convert_state_dict(weights, tiny_config)
    tiny_config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="no counterpart"):
        convert_state_dict(weights, tiny_config)


def test_a_single_head_which_has_no_output_projection_converts():
    config = PointillistConfig(
        n_bins=64, n_faces=100, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
        head_dim=64, sliding_window=32, use_vision_encoder=False, use_point_encoder=False,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = x_transformers_model(config).eval()
    assert not any("to_out" in name for name in reference.state_dict())
    model = PointillistForCausalLM(config).eval()
    load_x_transformers(model, reference.state_dict())
    ids, context = torch.randint(0, config.vocab_size, (2, 32)), torch.randn(2, 7, 64)
    with torch.no_grad():
        ours, theirs = model(ids, condition_embeds=context).logits, reference(ids, context=context)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_missing_weights_are_said_with_the_sizes_that_were_expected(tiny_config):
    weights = x_transformers_model(tiny_config).state_dict()
    del weights["attn_layers.layers.0.1.to_out.weight"]
    heads = tiny_config.num_attention_heads
    with pytest.raises(ValueError, match=rf"lack 'attn_layers\.layers\.0\.1\.to_out.*heads={heads}, .*--config"):
        convert_state_dict(weights, tiny_config)


def test_the_command_says_in_one_line_what_is_wrong_with_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "damaged").write_bytes(b"x" * 20)
    for name, message in (("damaged", "not a whole safetensors file"), ("missing", "no such file")):
        arguments = ["convert", str(tmp_path / name), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit):
            convert_x_transformers.main()
        printed = capsys.readouterr().err
        assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1
