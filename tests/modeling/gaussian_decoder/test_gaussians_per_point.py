"""Several Gaussians for each point: rows point by point, starts that differ, and one that is as before."""

import pytest
import torch
import torch.nn.functional as F

from gaussian_tokenizer.avatars.gaussians import SH_DC
from modeling import GaussianDecoder, GaussianDecoderConfig

VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14)
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, point_feature_size=20, portrait_channels=4,
            vision_config=VISION, initializer_range=0.2, sh_degree=1, read_anchors=True)  # fmt: skip
ATTRIBUTES = ("color", "scale", "offset", "opacity", "quat", "sh_rest")


def build(count: int, **fields) -> GaussianDecoder:
    torch.manual_seed(0)
    return GaussianDecoder(GaussianDecoderConfig(**TINY | fields, gaussians_per_point=count)).eval()


def stir(decoder: GaussianDecoder) -> GaussianDecoder:
    """Heads that start at zero would hide what reaches them."""
    generator = torch.Generator().manual_seed(5)
    for layer in decoder.head.children():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data.add_(torch.randn(layer.weight.shape, generator=generator) * 0.1)
    return decoder


def batch_of(batch: int = 2, count: int = 7) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    seen = torch.rand(2, batch, count, 8, generator=random)
    positions = torch.randn(batch, count, 3, generator=random) * 0.1
    return dict(
        positions=positions,
        anchors=positions + 0.01,
        point_features=torch.randn(batch, count, 4, 20, generator=random),
        pixel_values=torch.randn(batch, 3, 28, 28, generator=random),
        portrait=torch.rand(batch, 4, 28, 28, generator=random),
        portrait_points=seen[0],
        mirror_points=seen[1],
    )


@torch.no_grad()
def test_one_gaussian_per_point_has_the_layers_and_values_of_the_formula():
    """Checkpoints from before the option: one linear layer an attribute, read without any axis of Gaussians."""
    decoder, batch, seen = stir(build(1)), batch_of(), {}
    head, config = decoder.head, decoder.config
    sizes = {name: tuple(getattr(head, name).weight.shape) for name in (*ATTRIBUTES, "pull")}
    channels = {"color": 3, "scale": 3, "offset": 3, "opacity": 1, "quat": 4, "sh_rest": 9, "pull": 1}
    assert sizes == {name: (count, 32) for name, count in channels.items()}
    assert torch.equal(build(1).head.offset.bias, torch.zeros(3))
    head.mlp.register_forward_hook(lambda module, args, output: seen.update(x=output))
    output = decoder(**batch)
    v = {name: F.linear(seen["x"], getattr(head, name).weight, getattr(head, name).bias) for name in channels}
    offsets = (v["offset"].sigmoid() - 0.5) * (2 * config.max_offset)
    pulled = batch["positions"] + v["pull"].sigmoid() * (batch["anchors"] - batch["positions"])
    sh = torch.cat((((v["color"].sigmoid() - 0.5) / SH_DC)[:, :, None], v["sh_rest"].reshape(2, 7, 3, 3)), 2)
    expected = dict(
        positions=pulled + offsets, offsets=offsets, scales=v["scale"].exp().clamp(max=config.max_scale),
        quats=F.normalize(v["quat"], dim=-1), opacities=v["opacity"].sigmoid()[..., 0], sh=sh,
    )  # fmt: skip
    for name, value in expected.items():
        assert torch.equal(output[name], value), name


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, dict(read_portrait=True, attention="portrait")])
def test_row_n_g_is_what_a_decoder_of_that_gaussian_alone_gives(fields):
    """Against three decoders of one Gaussian, each with a third of the rows of every attribute's layer, and padding."""
    decoder, batch = stir(build(3, **fields)), batch_of()
    batch["point_mask"] = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    output = decoder(**batch)
    for value, rest in zip(output.values(), ((3,), (3,), (3,), (4,), (), (4, 3))):
        assert value.shape == (2, 21, *rest)
    assert (
        not output.opacities[1, 12:].any() and not output.offsets[1, 12:].any() and (output.opacities[1, :12] > 0).all()
    )
    for g in range(3):
        alone, state = build(1, **fields), decoder.state_dict()
        for name in ATTRIBUTES:
            for kind in ("weight", "bias"):
                state[f"head.{name}.{kind}"] = state[f"head.{name}.{kind}"].chunk(3)[g]
        alone.load_state_dict(state)
        for name, value in alone(**batch).items():
            for n in range(7):
                torch.testing.assert_close(output[name][:, 3 * n + g], value[:, n], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_gaussians_follow_their_points_when_these_are_reordered():
    decoder, batch = stir(build(3, read_portrait=True)), batch_of()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    of_points = ("positions", "anchors", "point_features", "portrait_points", "mirror_points")
    moved = decoder(**batch | {name: batch[name][:, order] for name in of_points})
    for found, before in zip(moved.values(), decoder(**batch).values()):
        expected = torch.stack([before[:, 3 * n + g] for n in order.tolist() for g in range(3)], 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 4, 10])
@pytest.mark.parametrize("fields", [{}, dict(max_offset=0.001)])
def test_new_gaussians_lie_apart_around_their_point(count, fields):
    decoder, batch = build(count, **fields), batch_of()
    config = decoder.config
    offsets = decoder(**batch).offsets.unflatten(1, (7, count))
    torch.testing.assert_close(offsets, offsets[:1, :1].expand_as(offsets))
    torch.testing.assert_close(offsets.mean(2), torch.zeros(2, 7, 3), atol=1e-6, rtol=0)
    radius = min(config.init_scale, config.max_offset)
    assert offsets.norm(dim=-1).max() < radius
    if count > 1:
        assert torch.pdist(offsets[0, 0]).min() > radius / 2 / count


def test_every_gaussian_of_a_point_learns_in_its_own_way():
    decoder, batch = stir(build(3, read_portrait=True)), batch_of()
    target = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(3))
    output = decoder(**batch)
    loss = (
        (output.positions - target).norm(dim=-1).sum() + output.sh.square().sum() + output.scales.prod(-1).sqrt().sum()
    )
    (loss + output.opacities.square().sum() + output.quats[..., 0].sum()).backward()
    for name in ATTRIBUTES:
        parts = getattr(decoder.head, name).weight.grad.chunk(3)
        assert all(part.abs().sum() > 0 for part in parts), name
        assert not any(torch.allclose(parts[i], parts[j], rtol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2))), name


def test_the_faces_of_points_become_those_of_their_gaussians():
    config = GaussianDecoderConfig(**TINY, gaussians_per_point=3)
    assert config.per_gaussian(torch.tensor([5, 2])).tolist() == [5, 5, 5, 2, 2, 2]
    assert config.per_gaussian(torch.tensor([[True, False]]), 1).tolist() == [[True] * 3 + [False] * 3]


def test_a_configuration_from_before_the_option_has_one_and_a_saved_one_comes_back(tmp_path):
    old = GaussianDecoderConfig(**TINY).to_dict()
    del old["gaussians_per_point"]
    assert GaussianDecoderConfig.from_dict(old).gaussians_per_point == 1
    decoder, batch = stir(build(2)), batch_of()
    decoder.save_pretrained(tmp_path)
    loaded = GaussianDecoder.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).positions, decoder(**batch).positions)
