"""The Gaussian decoder: padding that changes nothing, Gaussians in their ranges, saved and loaded whole."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModel, Dinov2Model

from gaussian_tokenizer.avatars.gaussians import SH_DC
from modeling import GaussianDecoder, GaussianDecoderConfig, to_gaussians
from modeling.gaussian_decoder.modeling_gaussian_decoder import HeldExp, JointBlock, positional_encoding

VISION = dict(hidden_size=24, num_hidden_layers=5, num_attention_heads=3, image_size=28, patch_size=14)
TINY = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    point_feature_size=20,
    vision_config=VISION,
    initializer_range=0.2,  # large: attention is then far from uniform, so that a wrong key shows
)


def build(**fields) -> GaussianDecoder:
    torch.manual_seed(0)
    return GaussianDecoder(GaussianDecoderConfig(**{**TINY, **fields})).eval()


def stir(decoder: GaussianDecoder) -> GaussianDecoder:
    """Heads that start at zero would hide what reaches them."""
    generator = torch.Generator().manual_seed(5)
    for layer in decoder.head.children():
        if isinstance(layer, nn.Linear):
            layer.weight.data.add_(torch.randn(layer.weight.shape, generator=generator) * 0.1)
    return decoder


def batch_of(batch: int = 2, count: int = 7, size: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return dict(
        positions=torch.randn(batch, count, 3, generator=generator) * 0.1,
        point_features=torch.randn(batch, count, 4, size, generator=generator),
        pixel_values=torch.randn(batch, 3, 28, 28, generator=generator),
    )


# ---- what goes in ----


def test_the_positional_encoding_is_sines_then_cosines_axis_by_axis_then_the_point():
    encoded = positional_encoding(torch.tensor([0.3, -0.7, 0.9]), 8)
    sines = [math.sin(math.pi * 2**k * v) for v in (0.3, -0.7, 0.9) for k in range(8)]
    cosines = [math.cos(math.pi * 2**k * v) for v in (0.3, -0.7, 0.9) for k in range(8)]
    torch.testing.assert_close(encoded, torch.tensor([*sines, *cosines, 0.3, -0.7, 0.9]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_portrait_tokens_are_the_patches_of_the_chosen_layers():
    decoder = build(vision_layers=[1, 4])
    pixels = batch_of()["pixel_values"]
    seen = {}
    for i, layer in enumerate(decoder.vision.encoder.layer):
        layer.register_forward_hook(lambda module, args, output, i=i: seen.__setitem__(i, output))
    embeds = decoder.encode_image(pixels)
    assert embeds.shape == (2, 4, 48)
    expected = torch.cat([decoder.vision.layernorm(seen[i])[:, 1:] for i in (1, 4)], -1)
    assert torch.equal(embeds, expected)
    assert torch.equal(embeds[..., 24:], decoder.vision(pixels).last_hidden_state[:, 1:])


@torch.no_grad()
def test_a_portrait_encoded_before_gives_the_same_gaussians():
    decoder, batch = stir(build()), batch_of()
    expected = decoder(**batch)
    batch["image_embeds"] = decoder.encode_image(batch.pop("pixel_values"))
    assert torch.equal(decoder(**batch).sh, expected.sh)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "moved_by_positions", "moved_by_features"),
    [("full", True, True), ("ar_feature", False, True), ("position", True, False), ("flame_position", True, False)],
)
def test_each_mode_reads_its_inputs_and_has_no_parameters_for_others(mode, moved_by_positions, moved_by_features):
    decoder, batch = stir(build(mode=mode)), batch_of()
    names = {name.split(".")[1] for name, _ in decoder.named_parameters() if name.startswith("embed.")}
    assert ("position_mlp" in names, "feature_mlp" in names) == (moved_by_positions, moved_by_features)
    base = decoder(**batch).sh
    elsewhere = decoder(**{**batch, "positions": batch["positions"] + 0.01}).sh
    other = decoder(**{**batch, "point_features": batch["point_features"] + 0.1}).sh
    assert (not torch.equal(base, elsewhere), not torch.equal(base, other)) == (moved_by_positions, moved_by_features)


@torch.no_grad()
def test_coordinates_are_normalized_by_the_configured_box():
    batch = batch_of()
    here = stir(build(mode="position"))
    there = stir(build(mode="position", point_center=[0.0, 1.5, 0.0], point_extent=0.4))
    moved = {**batch, "positions": 2 * batch["positions"] + torch.tensor([0.0, 1.5, 0.0])}
    torch.testing.assert_close(there(**moved).sh, here(**batch).sh, atol=1e-4, rtol=1e-4)


# ---- anchors ----


def anchored(batch: dict) -> dict:
    return {**batch, "anchors": batch["positions"] + torch.tensor([0.0, 0.01, 0.02])}


@torch.no_grad()
def test_a_new_decoder_that_reads_anchors_puts_points_half_way_to_them():
    batch = anchored(batch_of())
    output = build(read_anchors=True)(**batch)
    torch.testing.assert_close(output.positions, (batch["positions"] + batch["anchors"]) / 2)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "position"])
def test_anchors_move_what_each_point_becomes_and_padding_does_not(mode):
    decoder, batch = stir(build(read_anchors=True, mode=mode)), anchored(batch_of())
    batch["point_mask"] = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    base, moved = decoder(**batch), decoder(**{**batch, "anchors": batch["anchors"] + 0.01})
    assert not torch.equal(base.sh, moved.sh) and not torch.equal(base.positions, moved.positions)
    batch["anchors"][1, 4:] = math.nan
    assert torch.equal(decoder(**batch).positions[1, :4], base.positions[1, :4])
    assert all(value.isfinite().all() for value in decoder(**batch).values())


def test_missing_anchors_are_named():
    with pytest.raises(ValueError, match=r"read_anchors needs anchors \(B, N, 3\) = \(2, 7, 3\), found None"):
        build(read_anchors=True)(**batch_of())


# ---- padding and attention implementations ----


def padded(batch: dict, counts: list[int], filling: float) -> dict:
    mask = torch.arange(batch["positions"].shape[1]) < torch.tensor(counts)[:, None]
    return dict(
        positions=batch["positions"].masked_fill(~mask[..., None], filling),
        point_features=batch["point_features"].masked_fill(~mask[..., None, None], filling),
        pixel_values=batch["pixel_values"],
        point_mask=mask,
    )


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_row_is_the_row_alone_whatever_stands_in_the_padding(implementation):
    decoder, batch, counts = stir(build(sh_degree=1)), batch_of(3, 9), [9, 4, 0]
    decoder.set_attn_implementation(implementation)
    together = decoder(**padded(batch, counts, 0.5))
    poisoned = decoder(**padded(batch, counts, math.nan))
    for name, value in together.items():
        assert torch.equal(value, poisoned[name]), name
    for row, count in enumerate(counts[:2]):
        alone = decoder(
            **{n: v[row : row + 1, :count] if n != "pixel_values" else v[row : row + 1] for n, v in batch.items()}
        )
        for name, value in alone.items():
            torch.testing.assert_close(together[name][row, :count], value[0], atol=2e-6, rtol=1e-5, msg=name)
    assert not together.opacities[1, 4:].any() and not together.offsets[1, 4:].any()


@torch.no_grad()
def test_an_unmasked_key_would_be_noticed():
    """The test above can fail: without the mask the padding does change the real points."""
    decoder, batch = stir(build()), batch_of(1, 9)
    inputs = padded(batch, [4], 0.0)
    with_mask = decoder(**inputs).sh[:, :4]
    del inputs["point_mask"]
    assert (decoder(**inputs).sh[:, :4] - with_mask).abs().max() > 1e-3


def test_padding_keeps_out_of_the_gradients():
    decoder, batch, counts = stir(build()).train(), batch_of(2, 9), [9, 4]

    def gradients(filling):
        decoder.zero_grad()
        output = decoder(**padded(batch, counts, filling))
        sum((output[name][row, :count] ** 2).sum() for name in output for row, count in enumerate(counts)).backward()
        return {n: p.grad.clone() for n, p in decoder.named_parameters() if p.requires_grad}

    expected, poisoned = gradients(0.1), gradients(math.nan)
    assert all(torch.equal(expected[name], poisoned[name]) for name in expected)


@torch.no_grad()
def test_eager_and_sdpa_agree():
    decoder, batch = stir(build()), batch_of()
    expected = decoder(**batch)
    decoder.set_attn_implementation("eager")
    for name, value in decoder(**batch).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_flash_attention_gets_no_mask_without_padding_and_a_two_dimensional_one_with_it():
    masks = []

    def stand_in(module, query, key, value, attention_mask, scaling, **kwargs):
        masks.append(attention_mask)
        assert not module.is_causal and query.shape[2] == key.shape[2]  # what transformers' unpadding needs
        rows = []
        for row in range(len(query)):  # as flash attention: the padding is removed, then put back
            kept = slice(None) if attention_mask is None else attention_mask[row].bool()
            q, k, v = (x[row][:, kept] for x in (query, key, value))
            out = torch.zeros_like(query[row])
            out[:, kept] = (q @ k.mT * scaling).softmax(-1) @ v
            rows.append(out)
        return torch.stack(rows).transpose(1, 2), None

    AttentionInterface.register("stand_in_for_flash", stand_in)
    decoder, batch = stir(build()), batch_of(2, 9)
    inputs = padded(batch, [9, 4], 0.0)
    expected, alone = decoder(**inputs), decoder(**batch)
    embeds = decoder.encode_image(batch.pop("pixel_values"))
    inputs.pop("pixel_values")
    decoder.config._attn_implementation = "stand_in_for_flash"
    flash = decoder(**inputs, image_embeds=embeds)
    assert [tuple(m.shape) for m in masks] == [(2, 9 + 4)] * 3
    for name, value in flash.items():
        torch.testing.assert_close(value[0], expected[name][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value[1, :4], expected[name][1, :4], atol=1e-5, rtol=1e-5)
    masks.clear()
    everything_real = torch.ones(2, 9, dtype=torch.bool)
    output = decoder(**batch, image_embeds=embeds, point_mask=everything_real)
    assert masks == [None] * 3
    torch.testing.assert_close(output.sh, alone.sh, atol=1e-5, rtol=1e-5)


# ---- what comes out ----


@torch.no_grad()
def test_a_new_decoder_puts_small_faint_unturned_gaussians_on_the_points():
    batch = batch_of()
    output = build(sh_degree=2)(**batch)
    assert torch.equal(output.positions, batch["positions"]) and not output.offsets.any()
    torch.testing.assert_close(output.scales, torch.full((2, 7, 3), math.exp(-5)))
    torch.testing.assert_close(output.opacities, torch.full((2, 7), 0.1))
    assert torch.equal(output.quats, torch.tensor([1.0, 0, 0, 0]).expand(2, 7, 4))
    assert output.sh.shape == (2, 7, 9, 3) and not output.sh[:, :, 1:].any()
    colors = output.sh[:, :, 0] * SH_DC + 0.5
    assert colors.std() > 0.01, "colors tell points apart from the start"


@torch.no_grad()
def test_every_attribute_is_activated_as_written():
    decoder = stir(build(sh_degree=1, max_scale=0.007, max_offset=0.3))
    seen = {}
    decoder.head.mlp.register_forward_hook(lambda module, args, output: seen.__setitem__("x", output.double()))
    batch = batch_of()
    output = decoder(**batch)

    def raw(layer):
        return seen["x"] @ layer.weight.double().T + layer.bias.double()

    head = decoder.head
    offsets = (1 / (1 + (-raw(head.offset)).exp()) - 0.5) * 0.6
    quats = raw(head.quat)
    expected = dict(
        offsets=offsets,
        positions=batch["positions"] + offsets,
        scales=raw(head.scale).exp().clamp(max=0.007),
        quats=quats / quats.norm(dim=-1, keepdim=True),
        opacities=1 / (1 + (-raw(head.opacity)[..., 0]).exp()),
    )
    for name, value in expected.items():
        torch.testing.assert_close(output[name].double(), value.double(), atol=1e-5, rtol=1e-4, msg=name)
    colors = 1 / (1 + (-raw(head.color)).exp())
    torch.testing.assert_close(output.sh[:, :, 0].double() * SH_DC + 0.5, colors, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.sh[:, :, 1:].double().flatten(2), raw(head.sh_rest), atol=1e-5, rtol=1e-4)
    assert (output.scales == output.scales.max()).sum() > 1 and (output.scales < 0.0069).any(), (
        "both sides of the limit are seen"
    )


def test_the_gradient_of_a_scale_is_that_of_exp_below_the_limit_and_zero_not_nan_above():
    x = torch.tensor([-5.0, -4.0, 200.0], requires_grad=True)
    HeldExp.apply(x).clamp(max=0.01).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([math.exp(-5), 0.0, 0.0]))
    y = torch.tensor([3.0, 16.0], requires_grad=True)
    HeldExp.apply(y).sum().backward()
    torch.testing.assert_close(y.grad, torch.tensor([math.exp(3), math.exp(15)]))


@torch.no_grad()
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_gaussians_are_float32_and_positions_are_not_rounded_in_bfloat16(how):
    decoder, batch = build(), batch_of()
    if how == "weights":
        decoder = decoder.bfloat16()
        output = decoder(**batch)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            output = decoder(**batch)
    assert {value.dtype for value in output.values()} == {torch.float32}
    assert torch.equal(output.positions, batch["positions"])
    torch.testing.assert_close(output.sh, build()(**batch).sh, atol=0.1, rtol=0.1)


@torch.no_grad()
def test_a_row_becomes_gaussians_without_its_padding():
    output = stir(build(sh_degree=1))(**padded(batch_of(2, 9), [9, 4], 0.0))
    gaussians = to_gaussians(output, 1, 4)
    assert (len(gaussians), gaussians.num_frames, gaussians.sh_degree) == (4, 1, 1)
    assert torch.equal(gaussians.positions[0], output.positions[1, :4])
    assert torch.equal(gaussians.scales[0], output.scales[1, :4])
    assert torch.equal(gaussians.quats[0], output.quats[1, :4])
    assert torch.equal(gaussians.opacities, output.opacities[1, :4])
    assert torch.equal(gaussians.sh, output.sh[1, :4])
    assert len(to_gaussians(output)) == 9
    with pytest.raises(ValueError, match="row 2 with 4 Gaussians of an output of 2 rows with 9 Gaussians"):
        to_gaussians(output, 2, 4)
    with pytest.raises(ValueError, match="10 Gaussians"):
        to_gaussians(output, 0, 10)


# ---- training ----


def loss_of(output) -> torch.Tensor:
    """A target for each attribute."""
    return (
        (output.sh - 0.5).square().mean()
        + (output.offsets * 10 - 0.3).square().mean()
        + (output.scales * 100 - 0.3).square().mean()
        + (output.quats - 0.5).square().mean()
        + (output.opacities - 0.7).square().mean()
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_every_trainable_parameter_and_checkpointing_keeps_them(frozen):
    decoder, batch = stir(build(freeze_vision_encoder=frozen, sh_degree=1)).train(), batch_of()
    loss_of(decoder(**batch)).backward()
    trainable = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None or not p.grad.abs().sum()] == []
    still = {n.split(".")[0] for n, p in decoder.named_parameters() if not p.requires_grad}
    assert still == {"vision", "blocks"}
    last = {n for n, p in decoder.blocks.named_parameters() if not p.requires_grad}
    assert last == {f"2.attn.q_{x}" for x in ("proj_context.weight", "proj_context.bias", "norm_context.weight")}
    assert any(n.startswith("vision.") for n in trainable) is not frozen
    expected = {n: p.grad.clone() for n, p in trainable.items()}
    decoder.zero_grad()
    decoder.gradient_checkpointing_enable()
    loss_of(decoder(**batch)).backward()
    for name, p in trainable.items():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_block_keeps_the_bytes_for_the_backward_pass_that_the_documentation_counts():
    """42 D a token, and on the CPU up to 16 D more: float32 copies of q and k, where RMSNorm is not one kernel."""
    width, tokens = 64, 1000
    block = JointBlock(GaussianDecoderConfig(**{**TINY, "hidden_size": width}), 0, context_pre_only=False).train()
    block.attn.config._attn_implementation = "sdpa"
    kept = {}

    def keep(tensor):
        if tensor.numel() >= 0.1 * tokens * width:  # neither weights nor statistics of norms
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, tokens - 300, width, requires_grad=True)
    c = torch.randn(1, 300, width, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, c, None)
    weights = {p.numel() for p in block.parameters()}
    total = sum(t.untyped_storage().nbytes() for t in kept.values() if t.numel() not in weights)
    assert 42 <= total / (tokens * width) <= 58.5


def test_a_pretrained_portrait_encoder_is_taken_and_frozen():
    decoder = build()
    vision = Dinov2Model(decoder.config.vision_config)
    decoder.use_vision(vision)
    assert decoder.vision is vision and not any(p.requires_grad for p in vision.parameters())
    trained = build(freeze_vision_encoder=False)
    trained.use_vision(vision)
    assert [n for n, p in vision.named_parameters() if not p.requires_grad] == ["embeddings.mask_token"]


@pytest.mark.slow
def test_the_papers_decoder_trains_a_step_on_two_thousand_points_on_a_cpu():
    vision = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, image_size=56, patch_size=14)
    torch.manual_seed(0)
    decoder = GaussianDecoder(GaussianDecoderConfig(vision_config=vision)).train()
    assert len(decoder.blocks) == 12 and decoder.config.hidden_size == 1024
    batch = batch_of(1, 2000, 1024) | dict(pixel_values=torch.randn(1, 3, 56, 56))
    trainable = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    few = {name: value[:, :200] if name != "pixel_values" else value for name, value in batch.items()}
    with torch.no_grad():
        first = loss_of(decoder(**few))
    loss_of(decoder(**batch)).backward()
    torch.optim.AdamW(trainable.values(), lr=1e-4, weight_decay=0.0).step()
    assert [n for n, p in trainable.items() if torch.equal(p, before[n])] == []
    with torch.no_grad():  # on a tenth of the points, for speed
        assert loss_of(decoder(**few)) < first


# ---- files and errors ----


def test_a_saved_decoder_loads_through_the_auto_class_with_the_same_gaussians(tmp_path):
    decoder, batch = stir(build(sh_degree=1, mode="full")), batch_of()
    decoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is GaussianDecoder
    with torch.no_grad():
        for name, value in decoder(**batch).items():
            assert torch.equal(loaded(**batch)[name], value), name
    frozen = {n for n, p in decoder.named_parameters() if not p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == frozen


def test_a_pushed_folder_loads_where_the_toolkit_is_not_installed(tmp_path):
    decoder, batch = stir(build()), batch_of()
    decoder.save_pretrained(tmp_path / "model")
    torch.save(batch, tmp_path / "batch.pt")
    program = f"""
import sys, importlib.util
sys.path = [p for p in sys.path if p]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
assert importlib.util.find_spec("modeling") is None, "the toolkit is importable: this test shows nothing"
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
batch = torch.load({str(tmp_path / "batch.pt")!r}, weights_only=True)
with torch.no_grad():
    print(model(**batch).sh.flatten().tolist())
"""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        here = decoder(**batch).sh.flatten()
    there = torch.tensor([float(x) for x in result.stdout.strip().splitlines()[-1].strip("[]").split(",")])
    torch.testing.assert_close(there, here, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(positions=torch.zeros(2, 7, 2)), r"positions must be \(B, N, 3\), found \(2, 7, 2\)"),
        (dict(positions=torch.zeros(7, 3)), r"found \(7, 3\)"),
        (dict(point_features=None), r'mode "full" needs point_features .*\(2, 7, 4, 20\), found None'),
        (dict(point_features=torch.zeros(2, 7, 4, 16)), r"found \(2, 7, 4, 16\)"),
        (dict(point_features=torch.zeros(2, 6, 4, 20)), r"found \(2, 6, 4, 20\)"),
        (dict(pixel_values=None), "exactly one of pixel_values and image_embeds"),
        (dict(image_embeds=torch.zeros(2, 4, 96)), "exactly one of pixel_values and image_embeds"),
        (dict(pixel_values=None, image_embeds=torch.zeros(2, 4, 24)), r"image_embeds must be \(B, M, 96\)"),
        (dict(pixel_values=torch.zeros(2, 28, 28)), r"pixel_values must be \(B, 3, h, w\), found \(2, 28, 28\)"),
        (dict(pixel_values=torch.zeros(3, 3, 28, 28)), "2 point clouds, but 3 portraits"),
        (
            dict(point_mask=torch.ones(2, 6, dtype=torch.bool)),
            r"point_mask must be \(B, N\) = \(2, 7\), found \(2, 6\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build()(**{**batch_of(), **change})
