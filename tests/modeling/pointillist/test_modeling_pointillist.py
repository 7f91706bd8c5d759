"""The decoder: windowed, causal, the same through every attention implementation, saved and loaded whole."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_model import TINY
from transformers import AutoModel, AutoModelForCausalLM, Dinov2Config

from modeling import PointillistConfig, PointillistForCausalLM, PointillistModel
from modeling.pointillist import modeling_pointillist
from modeling.pointillist.modeling_condition import ConditionEncoder

pytestmark = pytest.mark.newest


def random_ids(config, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, config.bos_token_id, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_token_sees_exactly_its_window(tiny_model, condition):
    window = tiny_model.config.sliding_window
    tiny_model.model.layers = tiny_model.model.layers[:1]  # one layer: no relaying of older tokens
    tiny_model.config.num_hidden_layers = 1
    ids = random_ids(tiny_model.config, 2, 3 * window)
    base = tiny_model(ids, condition_embeds=condition).logits
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 16
    moved = (tiny_model(changed, condition_embeds=condition).logits - base).abs().amax((0, 2)) > 1e-5
    assert moved.nonzero().flatten().tolist() == list(range(10, 10 + window))


def test_a_sequence_as_long_as_the_window_needs_no_mask_and_gives_the_same_bits(tiny_model, condition, monkeypatch):
    window = tiny_model.config.sliding_window
    ids = random_ids(tiny_model.config, 2, window)

    def loss_and_gradients(ids):
        tiny_model.zero_grad()
        loss = tiny_model(ids, condition_embeds=condition, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in tiny_model.model.parameters() if p.grad is not None)]

    masks = []
    original = modeling_pointillist.self_attention_mask
    monkeypatch.setattr(modeling_pointillist, "self_attention_mask", lambda *a: masks.append(original(*a)) or masks[-1])
    found = loss_and_gradients(ids)
    loss_and_gradients(torch.cat((ids, ids[:, :4]), 1))
    assert masks[0] is None and masks[1] is not None
    triangle = torch.ones(window, window, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    monkeypatch.setattr(modeling_pointillist, "self_attention_mask", lambda *a: triangle)
    assert all(torch.equal(a, b) for a, b in zip(found, loss_and_gradients(ids), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_every_attention_implementation_gives_the_same_logits(tiny_model, condition, implementation):
    ids = random_ids(tiny_model.config, 2, 50)
    expected = tiny_model(ids, condition_embeds=condition).logits
    tiny_model.set_attn_implementation(implementation)
    torch.testing.assert_close(tiny_model(ids, condition_embeds=condition).logits, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(tiny_model, condition):
    config = tiny_model.config
    ids = random_ids(config, 2, 9)
    padded = torch.cat((torch.full((2, 3), config.pad_token_id), ids), 1)
    mask = (padded != config.pad_token_id).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with_padding = tiny_model(padded, attention_mask=mask, position_ids=positions, condition_embeds=condition).logits
    torch.testing.assert_close(
        with_padding[:, 3:], tiny_model(ids, condition_embeds=condition).logits, atol=1e-5, rtol=1e-4
    )


def test_neighboring_bins_of_a_new_model_start_alike_and_all_tokens_equally_large(tiny_config):
    tiny_config.n_bins, tiny_config.vocab_size, tiny_config.initializer_range = 128, 128 + 20 + 3, 0.05
    model = PointillistForCausalLM(tiny_config)
    for weight in (model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()):
        similar = torch.nn.functional.cosine_similarity(weight[:127], weight[1:128], dim=1)
        far = torch.nn.functional.cosine_similarity(weight[:64], weight[64:128], dim=1)
        assert similar.min() > 0.7 and far.abs().mean() < 0.4
        assert weight[:128].std() == pytest.approx(0.05, rel=0.1) and weight[128:].std() == pytest.approx(0.05, rel=0.1)
        faces = torch.nn.functional.cosine_similarity(weight[128:147], weight[129:148], dim=1)
        assert faces.abs().mean() < 0.3
    assert not torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)


def test_loss_within_slots_is_cross_entropy_of_logits_without_the_other_slots(tiny_model, condition):
    config = tiny_model.config
    labels = random_ids(config, 2, 41)
    labels[0, 5:9] = -100
    labels[1, 40] = config.eos_token_id
    ids = labels.clamp(min=0)
    logits = tiny_model(ids, condition_embeds=condition).logits[:, :-1].double()
    expected = []
    for row, position in (labels[:, 1:] >= 0).nonzero().tolist():
        label, values = int(labels[row, position + 1]), logits[row, position]
        faces = range(config.n_bins, config.n_bins + config.n_faces)
        admitted = [i for i in range(config.vocab_size) if (i in faces) == (label in faces)]
        expected.append(values[admitted].logsumexp(0) - values[label])
    config.loss_within_slot = True
    found = tiny_model(ids, labels=labels, condition_embeds=condition)
    assert found.logits is None
    torch.testing.assert_close(found.loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    shared = tiny_model(ids, labels=labels, condition_embeds=condition, num_items_in_batch=1000)
    torch.testing.assert_close(shared.loss, found.loss * len(expected) / 1000)


def test_gradients_reach_every_trainable_parameter_and_checkpointing_keeps_them():
    config = PointillistConfig(
        n_bins=16, n_faces=20, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        sliding_window=32, freeze_vision_encoder=False, point_latents=8, point_hidden_size=32, point_layers=1,
        point_attention_heads=4,
        vision_config=dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, image_size=28, patch_size=14),
    )  # fmt: skip
    torch.manual_seed(0)
    model = PointillistForCausalLM(config).train()
    batch = dict(
        input_ids=random_ids(config, 2, 32),
        labels=random_ids(config, 2, 32),
        pixel_values=torch.randn(2, 3, 28, 28),
        head_vertices=torch.randn(2, 30, 3) * 0.1,
        head_normals=torch.randn(2, 30, 3),
        drop_condition=torch.tensor([True, False]),
    )
    model(**batch).loss.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None or not p.grad.abs().sum()] == []
    expected = {n: p.grad.clone() for n, p in trainable.items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    for name, p in trainable.items():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_loss_is_the_cross_entropy_of_the_next_token(tiny_model, condition):
    ids = random_ids(tiny_model.config, 2, 20)
    labels = ids.clone()
    labels[:, :5] = -100
    output = tiny_model(ids, condition_embeds=condition, labels=labels)
    log_probabilities = output.logits.double().log_softmax(-1)
    terms = [-log_probabilities[b, t - 1, ids[b, t]] for b in range(2) for t in range(5, 20)]
    torch.testing.assert_close(output.loss.double(), torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dropped_rows_read_the_empty_condition(tiny_model, condition):
    ids = random_ids(tiny_model.config, 2, 12)
    empty = tiny_model(ids).logits
    mixed = tiny_model(ids, condition_embeds=condition, drop_condition=torch.tensor([True, False])).logits
    torch.testing.assert_close(mixed[0], empty[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], tiny_model(ids, condition_embeds=condition).logits[1])
    assert (mixed[1] - empty[1]).abs().max() > 1e-2


def test_a_saved_model_loads_through_auto_classes_with_the_same_logits(tiny_model, condition, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PointillistForCausalLM
    assert loaded.generation_config.do_sample and loaded.generation_config.max_new_tokens == 4 * 32768 + 1
    ids = random_ids(tiny_model.config, 2, 20)
    with torch.no_grad():
        assert torch.equal(
            loaded(ids, condition_embeds=condition).logits, tiny_model(ids, condition_embeds=condition).logits
        )


def test_auto_model_is_the_decoder_without_its_head_and_wants_a_condition(tiny_model, condition, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    classes = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert classes["AutoModel"] == "modeling_pointillist.PointillistModel"
    assert classes["AutoModelForCausalLM"] == "modeling_pointillist.PointillistForCausalLM"
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is PointillistModel
    ids = random_ids(tiny_model.config, 2, 8)
    with torch.no_grad():
        hidden = decoder(ids, condition=condition).last_hidden_state
        expected = tiny_model.model(ids, condition=condition).last_hidden_state
    assert torch.equal(hidden, expected)
    with pytest.raises(ValueError, match="give `condition`"):
        decoder(ids)


def test_a_pushed_folder_loads_where_the_toolkit_is_not_installed(tiny_model, condition, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    torch.save(condition, tmp_path / "condition.pt")
    program = f"""
import sys, importlib.util
sys.path = [p for p in sys.path if p]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
assert importlib.util.find_spec("modeling") is None, "the toolkit is importable: this test shows nothing"
import torch
from transformers import AutoModel, AutoModelForCausalLM, Dinov2Config
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
condition = torch.load({str(tmp_path / "condition.pt")!r}, weights_only=True)
ids = model.generate(condition_embeds=condition, do_sample=False, min_points=6, max_points=6)
print(ids.tolist())
"""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    here = tiny_model.generate(condition_embeds=condition, do_sample=False, min_points=6, max_points=6)
    assert result.stdout.strip().splitlines()[-1] == str(here.tolist())


def test_a_folder_without_weights_is_named(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=str(tmp_path)):
        PointillistForCausalLM.from_pretrained(tmp_path)


def test_a_mesh_without_normals_is_refused(tiny_model):
    with pytest.raises(ValueError, match="head_normals"):
        tiny_model.encode_condition(head_vertices=torch.zeros(1, 4, 3))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_sequences_that_share_a_condition_are_as_with_copies_of_it(tiny_model, condition, implementation):
    """The first three of six sequences read one condition, the others another; in two passes, with a cache."""
    ids = random_ids(tiny_model.config, 6, 40)
    masks = {"condition_mask": torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1]])}
    if (
        implementation == "flex_attention"
    ):  # has no backward on a CPU, where a mask added to the scores makes torch 2.13 abort
        tiny_model.requires_grad_(False)
        masks = {}
    tiny_model.set_attn_implementation(implementation)

    def outputs(**given):
        tiny_model.zero_grad()
        first = tiny_model(ids[:, :30], use_cache=True, **given)
        later = tiny_model(ids[:, 30:], past_key_values=first.past_key_values, **given)
        dropped = tiny_model(ids, drop_condition=torch.arange(6) % 4 == 0, **given)
        if implementation != "flex_attention":
            tiny_model(ids, labels=ids, **given).loss.backward()
        keys = later.past_key_values.cross_attention_cache.layers[0].keys
        gradients = [p.grad.clone() for p in tiny_model.parameters() if p.grad is not None]
        weights = tiny_model(ids, output_attentions=True, **given).cross_attentions if implementation == "eager" else ()
        return keys, [first.logits, later.logits, dropped.logits, *gradients, *weights]

    for given in (dict(condition_embeds=condition, **masks), dict(condition_embeds=condition)):
        keys, shared = outputs(**given)
        copied_keys, copied = outputs(**{name: value.repeat_interleave(3, 0) for name, value in given.items()})
        assert len(keys) == 2 and len(copied_keys) == 6
        assert len(shared) == len(copied)
        for a, b in zip(shared, copied):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    swapped = tiny_model(ids[:, :30], condition_embeds=condition.flip(0)).logits
    assert not torch.allclose(swapped, shared[0], atol=1e-2), "the condition matters"


def test_a_condition_for_another_batch_size_is_refused(tiny_model, condition):
    with pytest.raises(ValueError, match="2 sequences, but 3"):
        tiny_model(random_ids(tiny_model.config, 3, 8), condition_embeds=condition)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_frozen_is_frozen_after_loading_too(tmp_path, frozen):
    vision = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28)
    config = PointillistConfig(
        **TINY | dict(use_vision_encoder=True, vision_config=vision, freeze_vision_encoder=frozen)
    )
    model = PointillistForCausalLM(config)
    model.save_pretrained(tmp_path)
    for each in (model, PointillistForCausalLM.from_pretrained(tmp_path)):
        trainable = {name for name, value in each.condition_encoder.vision.named_parameters() if value.requires_grad}
        assert "embeddings.mask_token" not in trainable
        assert bool(trainable) != frozen
        assert all(value.requires_grad for value in each.model.parameters())


def test_of_a_fine_mesh_evenly_spaced_vertices_are_read():
    config = PointillistConfig(
        use_vision_encoder=False, point_samples=10, point_latents=4, point_hidden_size=32, point_layers=1,
        point_attention_heads=4, hidden_size=32, num_hidden_layers=1,
    )  # fmt: skip
    encoder = ConditionEncoder(config).eval()
    encoder.init_weights(0.02)
    vertices, normals = torch.randn(2, 2, 30, 3)
    torch.testing.assert_close(
        encoder(None, vertices, normals), encoder(None, vertices[:, ::3].contiguous(), normals[:, ::3])
    )
    config.point_samples = 31
    assert not torch.allclose(encoder(None, vertices, normals), encoder(None, vertices[:, ::3], normals[:, ::3]))


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("mesh", [True, False])
def test_of_all_inputs_a_model_selects_those_that_its_encoders_read(vision, mesh):
    small = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=28)
    config = PointillistConfig(**TINY | dict(use_vision_encoder=vision, use_point_encoder=mesh, vision_config=small))
    given = dict.fromkeys(("input_ids", "pixel_values", "head_vertices", "head_normals"), 0)
    selected = set(PointillistForCausalLM(config).select_inputs(given))
    assert ("pixel_values" in selected, "head_vertices" in selected, "head_normals" in selected) == (vision, mesh, mesh)
    assert "input_ids" not in selected
