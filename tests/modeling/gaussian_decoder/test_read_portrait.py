"""A decoder that reads the portrait where its points are: what is read, what hides it, and attention linear in points."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gaussian_tokenizer.avatars.gaussians import SH_DC
from modeling import GaussianDecoder, GaussianDecoderConfig
from modeling.gaussian_decoder.modeling_portrait import COLUMNS, VISIBLE, sample

VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14)
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, point_feature_size=20, portrait_channels=8,
            vision_config=VISION, initializer_range=0.2, read_portrait=True)  # fmt: skip
MODES = ("full", "ar_feature", "position", "flame_position")


def build(**fields) -> GaussianDecoder:
    torch.manual_seed(0)
    return GaussianDecoder(GaussianDecoderConfig(**{**TINY, **fields})).eval()


def stir(decoder: GaussianDecoder) -> GaussianDecoder:
    """Heads that start at zero would hide what reaches them."""
    generator = torch.Generator().manual_seed(5)
    for layer in decoder.head.children():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data.add_(torch.randn(layer.weight.shape, generator=generator) * 0.1)
    return decoder


def seen(u, v, visible=1.0) -> torch.Tensor:
    """(B, N, 8) of u and v (B, N), a meter away and facing the camera."""
    columns = dict(u=u, v=v, depth=1.0, facing=1.0, behind_head=0.0, behind_points=0.0, on_head=1.0, visible=visible)
    return torch.stack([torch.as_tensor(columns[name]).expand(u.shape) for name in COLUMNS], -1)


def batch_of(batch: int = 2, count: int = 7, size: int = 28) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    u, v, w = 2 * torch.rand(3, batch, count, generator=random) - 1
    return dict(
        positions=torch.randn(batch, count, 3, generator=random) * 0.1,
        point_features=torch.randn(batch, count, 4, 20, generator=random),
        pixel_values=torch.randn(batch, 3, 28, 28, generator=random),
        portrait=torch.rand(batch, 4, size, size, generator=random),
        portrait_points=seen(u, v),
        mirror_points=seen(w, v, (w > 0).float()),
    )


def colors(output) -> torch.Tensor:
    return output.sh[:, :, 0] * SH_DC + 0.5


# ---- what is read ----


def test_maps_are_sampled_bilinearly_at_pixel_centers_and_are_zero_outside():
    random = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 2, 5, 7, generator=random)
    u, v = 2.6 * torch.rand(2, 1, 40, generator=random) - 1.3
    read = sample(maps, seen(u, v))

    def pixel(channel: int, row: int, column: int) -> float:
        return float(maps[0, channel, row, column]) if 0 <= row < 5 and 0 <= column < 7 else 0.0

    for point in range(40):
        x, y = (float(u[0, point]) + 1) / 2 * 7 - 0.5, (float(v[0, point]) + 1) / 2 * 5 - 0.5
        column, row = math.floor(x), math.floor(y)
        for channel in range(2):
            expected = sum(
                (1 - abs(x - i)) * (1 - abs(y - j)) * pixel(channel, j, i)
                for i in (column, column + 1)
                for j in (row, row + 1)
            )
            assert float(read[0, point, channel]) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_new_decoder_takes_the_color_of_the_pixel_that_shows_the_point():
    """Shares: e^3 for a point that is seen, e^-3 for one that is not, e for its mirror image, 1 for none."""
    portrait = torch.ones(1, 4, 8, 8)
    portrait[0, :3, :, :4] = torch.tensor([0.8, 0.2, 0.4])[:, None, None]  # left half
    portrait[0, :3, :, 4:] = torch.tensor([0.1, 0.6, 0.3])[:, None, None]
    left, right = torch.full((1, 3), -0.5), torch.full((1, 3), 0.5)
    batch = batch_of(1, 3) | dict(
        portrait=portrait,
        portrait_points=seen(left, left, torch.tensor([[1.0, 0.0, 0.0]])),
        mirror_points=seen(right, left, torch.tensor([[1.0, 1.0, 0.0]])),
    )
    found = colors(build()(**batch))
    own, other = torch.tensor([0.8, 0.2, 0.4]).logit(), torch.tensor([0.1, 0.6, 0.3]).logit()
    e = math.e
    expected = [
        (e**3 * own + e * other) / (1 + e**3 + e),
        (e**-3 * own + e * other) / (1 + e**-3 + e),
        e**-3 * own / (1 + e**-3),
    ]
    torch.testing.assert_close(found[0], torch.stack(expected).sigmoid(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_background_gives_no_color_and_does_not_bleed_into_an_edge():
    portrait = torch.full((1, 4, 8, 8), 0.9)  # the background is bright
    portrait[0, :, :, :4] = torch.tensor([0.2, 0.2, 0.2, 1.0])[:, None, None]
    portrait[0, 3, :, 4:] = 0
    edge, outside = 0.06, 0.7
    u = torch.tensor([[edge, outside, 3.0]])
    batch = batch_of(1, 3) | dict(portrait=portrait, portrait_points=seen(u, 0 * u), mirror_points=seen(u, 0 * u, 0.0))
    found = colors(build()(**batch))[0]
    alpha = 0.5 - edge * 4  # of the sample
    share = alpha * math.e**3 / (1 + alpha * math.e**3)
    torch.testing.assert_close(found[0], (share * torch.full((3,), 0.2).logit()).sigmoid(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1:], torch.full((2, 3), 0.5))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["joint", "portrait"])
def test_every_mode_reads_the_portrait_and_alpha_reaches_the_opacity(mode, attention):
    decoder, batch = stir(build(mode=mode, attention=attention)), batch_of()
    base = decoder(**batch)
    darker = decoder(**{**batch, "portrait": batch["portrait"] * torch.tensor([0.5, 0.5, 0.5, 1.0])[:, None, None]})
    clear = decoder(**{**batch, "portrait": batch["portrait"] * torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]})
    assert (base.sh - darker.sh).abs().min() > 1e-5 and (base.opacities - clear.opacities).abs().min() > 1e-5


@torch.no_grad()
def test_a_hidden_mirror_image_is_not_read():
    decoder, batch = stir(build()), batch_of()
    hidden = batch["mirror_points"][..., -1] == 0
    moved = batch["mirror_points"] + 0.3 * torch.nn.functional.one_hot(torch.tensor(0), len(COLUMNS))
    where = decoder(**{**batch, "mirror_points": torch.where(hidden[..., None], moved, batch["mirror_points"])})
    assert hidden.any() and torch.equal(where.sh, decoder(**batch).sh)
    assert not torch.equal(decoder(**{**batch, "mirror_points": moved}).sh, where.sh)


def test_recoloring_the_portrait_recolors_the_gaussians():
    """Trained on points that take the next channel of their pixel, a decoder does so for a portrait it has never seen."""
    decoder = build(
        mode="position", attention="portrait", num_hidden_layers=1, hidden_size=64, initializer_range=0.1
    ).train()
    optimizer = torch.optim.Adam([p for p in decoder.parameters() if p.requires_grad], 3e-3)

    def loss(seed: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(seed)
        portrait = torch.nn.functional.interpolate(torch.rand(4, 4, 4, 4, generator=random), size=16, mode="bilinear")
        portrait[:, 3] = 1
        u, v = 1.8 * torch.rand(2, 4, 50, generator=random) - 0.9
        batch = batch_of(4, 50) | dict(portrait=portrait, portrait_points=seen(u, v), mirror_points=seen(u, v, 0.0))
        return (colors(decoder(**batch)) - sample(portrait[:, [1, 2, 0]], seen(u, v))).abs().mean()

    first = float(loss(10**6).detach())
    for step in range(100):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    assert float(loss(10**6).detach()) < first / 3


# ---- several images of a person ----


def batch_of_several(images: int = 4) -> dict[str, torch.Tensor]:
    """Each point is hidden in about half of the images, and seen from any side."""
    batches, random = [batch_of() for _ in range(images)], torch.Generator().manual_seed(2)
    several = dict(batches[0], portrait=torch.rand(2, images, 4, 28, 28, generator=random))
    for name in ("portrait_points", "mirror_points"):
        places = torch.stack([batch[name] for batch in batches], 2)
        places[..., :2] = 2 * torch.rand(places[..., :2].shape, generator=random) - 1
        places[..., COLUMNS.index("facing")] = 2 * torch.rand(places.shape[:-1], generator=random) - 1
        places[..., VISIBLE] = (torch.rand(places.shape[:-1], generator=random) > 0.5).float()
        several[name] = places
    return several


def images_of(batch: dict[str, torch.Tensor], chosen: list[int]) -> dict[str, torch.Tensor]:
    axes = dict(portrait=1, portrait_points=2, mirror_points=2)
    return {n: v.index_select(axes[n], torch.tensor(chosen)) if n in axes else v for n, v in batch.items()}


@torch.no_grad()
def test_a_point_takes_its_color_from_the_images_that_show_it_those_from_the_front_first():
    tones, facing, visible = [0.2, 0.5, 0.9], [0.9, 0.1, 0.6], [[1, 1, 0], [0, 1, 1], [0, 0, 0]]  # of three points
    portrait = torch.ones(1, 3, 4, 8, 8)
    portrait[0, :, :3] = torch.tensor(tones)[:, None, None, None]
    places = seen(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), torch.tensor([visible]).float())
    places[..., COLUMNS.index("facing")] = torch.tensor(facing)
    hidden = places * (torch.arange(len(COLUMNS)) != VISIBLE)
    found = colors(build()(**batch_of(1, 3) | dict(portrait=portrait, portrait_points=places, mirror_points=hidden)))
    for point, shown in enumerate(visible):
        weights = [math.exp(8 * cosine) if yes else 0.0 for cosine, yes in zip(facing, shown)]
        if not any(shown):  # the portrait alone, as if there were no other
            weights = [1.0, 0.0, 0.0]
        tone = sum(weight * each for weight, each in zip(weights, tones)) / sum(weights)
        trusted = math.exp(3) if any(shown) else math.exp(-3)
        expected = 1 / (1 + math.exp(-trusted / (1 + trusted) * math.log(tone / (1 - tone))))
        torch.testing.assert_close(found[0, point], torch.full((3,), expected), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["joint", "portrait"])
def test_the_order_of_the_further_images_does_not_matter(attention):
    decoder, batch = stir(build(attention=attention)), batch_of_several()
    expected = decoder(**batch)
    for order in ([0, 2, 3, 1], [0, 3, 2, 1]):
        for name, value in decoder(**images_of(batch, order)).items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    assert (decoder(**images_of(batch, [0, 1, 2])).sh - expected.sh).abs().max() > 1e-2, "all are read"


@torch.no_grad()
def test_an_image_changes_only_the_points_that_it_shows():
    """Also an image and places of zeros, which is what fills a batch of subjects with unequal numbers of images."""
    decoder, several = stir(build(attention="portrait")), batch_of_several()
    base, more = decoder(**images_of(several, [0, 1, 2])), decoder(**several)
    shown = torch.stack([several[name][:, :, 3, VISIBLE] for name in ("portrait_points", "mirror_points")]).any(0)
    assert 2 < shown.sum() < 14
    for name, value in more.items():
        torch.testing.assert_close(value[~shown], base[name][~shown], atol=1e-6, rtol=1e-6)
    assert ((more.sh - base.sh).abs().amax((2, 3)) > 1e-4)[shown].all()
    for name in ("portrait_points", "mirror_points"):
        several[name][:, :, 3] = 0
    several["portrait"][:, 3] = 0
    for name, value in decoder(**several).items():
        torch.testing.assert_close(value, base[name], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_one_image_is_the_portrait_bit_for_bit():
    decoder, batch = stir(build()), batch_of()
    several = dict(batch, portrait=batch["portrait"][:, None])
    several |= {name: batch[name][:, :, None] for name in ("portrait_points", "mirror_points")}
    expected = decoder(**batch)
    assert all(torch.equal(value, expected[name]) for name, value in decoder(**several).items())


def test_gradients_of_a_point_reach_the_shared_weights_through_the_image_that_shows_it_and_no_other():
    decoder, batch = stir(build(attention="portrait")), images_of(batch_of_several(), [0, 1])
    batch["portrait"].requires_grad_()
    for name in ("portrait_points", "mirror_points"):
        batch[name][:, :, :, VISIBLE] = torch.tensor([0.0, 1.0])
    (decoder(**batch).sh ** 2).sum().backward()
    portrait, further = batch["portrait"].grad.abs().sum((0, 2, 3, 4))
    assert further > 0 and portrait < 1e-4 * further
    assert all(weight.grad.abs().sum() > 0 for weight in decoder.reader.parameters())


@pytest.mark.parametrize(
    ("images", "expected"), [(2, r"needs portrait_points \(2, 7, 2, 8\)"), (0, r"needs portrait \(2, 1, 4")]
)
def test_places_for_another_number_of_images_are_refused(images, expected):
    with pytest.raises(ValueError, match=expected):
        several = batch_of_several()
        build()(**{**several, "portrait": several["portrait"][:, :images]})


# ---- what does not matter ----


@torch.no_grad()
@pytest.mark.parametrize("attention", ["joint", "portrait"])
def test_the_order_of_the_points_does_not_matter(attention):
    decoder, batch = stir(build(attention=attention)), batch_of()
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    moved = {name: value if name in ("pixel_values", "portrait") else value[:, order] for name, value in batch.items()}
    expected = decoder(**batch)
    for name, value in decoder(**moved).items():
        torch.testing.assert_close(value, expected[name][:, order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["joint", "portrait"])
def test_a_padded_row_is_the_row_alone_whatever_stands_in_the_padding(attention):
    decoder, batch = stir(build(attention=attention)), batch_of()
    alone = decoder(**{n: v[1:] if n in ("pixel_values", "portrait") else v[1:, :4] for n, v in batch.items()})
    batch["point_mask"] = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    for name in ("portrait_points", "mirror_points"):
        batch[name][1, 4:] = math.nan
    output = decoder(**batch)
    for name, value in output.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value[1, :4], alone[name][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_points_that_read_only_the_portrait_do_not_see_each_other():
    batch = batch_of()
    for attention, alike in (("portrait", True), ("joint", False)):
        decoder = stir(build(attention=attention))
        few = {n: v if n in ("pixel_values", "portrait") else v[:, :3] for n, v in batch.items()}
        change = (decoder(**few).sh - decoder(**batch).sh[:, :3]).abs().max()
        assert (change < 1e-5) == alike


# ---- cost ----


def cost(decoder: GaussianDecoder, count: int) -> tuple[int, int]:
    """Operations of a pass forward, and bytes kept for the one backward."""
    kept: dict[int, torch.Tensor] = {}  # by address, which stays taken while a tensor is here

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        decoder(**batch_of(1, count))
    return counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("attention", ["portrait", "joint"])
def test_operations_and_memory_are_linear_in_points_if_they_read_only_the_portrait(attention):
    decoder = build(attention=attention).train()
    decoder.set_attn_implementation("eager")  # whose products are counted
    (a, x), (b, y), (c, z) = (cost(decoder, count) for count in (200, 400, 800))
    if attention == "portrait":
        assert c - b == 2 * (b - a) and z - y == pytest.approx(2 * (y - x), rel=1e-3)
    else:
        assert c - b > 2.5 * (b - a) and z - y > 2.5 * (y - x)


# ---- training, files, errors ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["joint", "portrait"])
def test_gradients_reach_every_trainable_parameter_and_checkpointing_keeps_them(mode, attention):
    decoder, batch = stir(build(mode=mode, attention=attention)).train(), batch_of()

    def gradients() -> dict[str, torch.Tensor | None]:
        decoder.zero_grad()
        sum(((value - 0.5) ** 2).sum() for value in decoder(**batch).values()).backward()
        return {n: p.grad for n, p in decoder.named_parameters() if p.requires_grad}

    expected = gradients()
    assert not [name for name, gradient in expected.items() if gradient is None or not gradient.any()]
    decoder.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["joint", "portrait"])
def test_it_is_float32_outside_and_works_in_bfloat16(attention):
    decoder, batch = build(attention=attention), batch_of()
    expected = decoder(**batch)
    output = decoder.bfloat16()(**batch)
    assert {value.dtype for value in output.values()} == {torch.float32}
    torch.testing.assert_close(output.sh, expected.sh, atol=0.1, rtol=0.1)


@torch.no_grad()
def test_it_is_saved_and_loaded_whole(tmp_path):
    decoder, batch = stir(build(attention="portrait")), batch_of()
    decoder.save_pretrained(tmp_path)
    loaded = GaussianDecoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).sh, decoder(**batch).sh)
    assert {"modeling_portrait.py", "modeling_blocks.py"} <= {path.name for path in tmp_path.iterdir()}


@torch.no_grad()
def test_a_checkpoint_from_before_loads_as_before(tmp_path):
    decoder, batch = stir(build(read_portrait=False)), batch_of()
    decoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("read_portrait", "portrait_channels", "attention"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = GaussianDecoder.from_pretrained(tmp_path)
    assert not any("reader" in name or "trust" in name for name, _ in loaded.named_parameters())
    inputs = {name: batch[name] for name in ("positions", "point_features", "pixel_values")}
    assert torch.equal(loaded(**inputs).sh, decoder(**inputs).sh)


@pytest.mark.parametrize("name", ["portrait", "portrait_points", "mirror_points"])
def test_a_missing_input_is_named_with_what_to_do(name):
    batch = batch_of()
    expected = r"\(2, 4, 'H', 'W'\)" if name == "portrait" else r"\(2, 7, 8\)"
    with pytest.raises(ValueError, match=rf"needs {name} {expected}, found None; give the portrait's camera"):
        build()(**{**batch, name: None})
    with pytest.raises(ValueError, match=rf"needs {name}"):
        build()(**{**batch, name: batch[name][:, :3]})
