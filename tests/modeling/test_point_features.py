"""Point features by teacher forcing: those of generation, in any pieces, far beyond the window; and their cache on disk."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gaussian_tokenizer.utils import atomic
from modeling import PointillistForCausalLM
from modeling.point_features import FeatureCache, fingerprint, point_features

POINTS = 20  # 82 tokens: two and a half windows of 32


def written(model, condition, **options):
    """Sequences that the model wrote itself, with the features of that pass."""
    torch.manual_seed(3)
    return model.generate(condition_embeds=condition, output_point_features=True, **options)


@pytest.mark.newest
def test_they_are_the_features_of_generation_far_beyond_the_window(tiny_model, condition):
    result = written(tiny_model, condition, do_sample=False, min_points=POINTS, max_points=POINTS)
    features = point_features(tiny_model, result.sequences, condition_embeds=condition)
    assert features.shape == (2, POINTS, 4, 64)
    torch.testing.assert_close(features, result.point_features, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 4, 7, 32, 33, 50, 80, 1000])
@torch.no_grad()
def test_they_do_not_depend_on_the_pieces_and_are_those_of_one_banded_pass(tiny_model, condition, chunk):
    ids = written(tiny_model, condition, do_sample=False, min_points=POINTS, max_points=POINTS).sequences
    states = tiny_model(ids, condition_embeds=condition).last_hidden_state
    for n, token in (
        (0, 0),
        (5, 2),
        (POINTS - 1, 3),
    ):  # of point n, token t is predicted where 4 n + t tokens stand behind bos
        assert torch.equal(states[:, : 4 * POINTS].unflatten(1, (POINTS, 4))[:, n, token], states[:, 4 * n + token])
    features = point_features(tiny_model, ids, condition_embeds=condition, chunk=chunk)
    torch.testing.assert_close(features.flatten(1, 2), states[:, : 4 * POINTS], atol=1e-4, rtol=0)


def test_rows_of_other_lengths_are_the_rows_alone_and_zero_beyond_their_end(tiny_model, condition):
    condition = condition.repeat(4, 1, 1)
    result = written(tiny_model, condition, max_points=50)
    assert len(set(result.num_points.tolist())) > 1
    features = point_features(tiny_model, result.sequences, condition_embeds=condition, chunk=24)
    torch.testing.assert_close(features, result.point_features, atol=1e-4, rtol=0)
    for row, count in enumerate(result.num_points.tolist()):
        sequence = result.sequences[row : row + 1, : 4 * count + 2]
        alone = point_features(tiny_model, sequence, condition_embeds=condition[row : row + 1])
        torch.testing.assert_close(features[row, :count], alone[0], atol=1e-4, rtol=0)
        assert not features[row, count:].any()


def test_a_head_mesh_is_encoded_once_and_gives_what_its_tokens_give(tiny_model):
    vertices, normals = torch.randn(2, 30, 3) * 0.1, torch.randn(2, 30, 3)
    ids = sequences(tiny_model, 2)
    calls = []
    tiny_model.condition_encoder.points.register_forward_hook(lambda *_: calls.append(1))
    features = point_features(tiny_model, ids, head_vertices=vertices, head_normals=normals, chunk=8)
    assert len(calls) == 1
    with torch.no_grad():
        embeds = tiny_model.encode_condition(head_vertices=vertices, head_normals=normals)
    assert torch.equal(features, point_features(tiny_model, ids, condition_embeds=embeds, chunk=8))
    assert not torch.allclose(features, point_features(tiny_model, ids), atol=1e-3), "the condition matters"


def test_the_model_is_left_in_the_mode_it_was_in(tiny_model):
    tiny_model.config.attention_dropout = 0.5
    tiny_model.train()
    tiny_model.condition_encoder.eval()
    before = [module.training for module in tiny_model.modules()]
    ids = sequences(tiny_model, 1)
    first = point_features(tiny_model, ids)
    assert torch.equal(first, point_features(tiny_model, ids)), "no dropout"
    assert not first.requires_grad
    assert [module.training for module in tiny_model.modules()] == before
    with pytest.raises(ValueError, match="condition for 3"):
        point_features(tiny_model, ids, condition_embeds=torch.zeros(3, 5, 64))
    assert [module.training for module in tiny_model.modules()] == before


def sequences(model, batch: int, points: int = 12, seed: int = 0) -> torch.Tensor:
    """(B, 4 N + 2) random sequences."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    coordinates = torch.randint(0, config.n_bins, (batch, points, 3), generator=generator)
    faces = torch.randint(config.n_bins, config.bos_token_id, (batch, points, 1), generator=generator)
    begin, end = (torch.full((batch, 1), i) for i in (config.bos_token_id, config.eos_token_id))
    return torch.cat((begin, torch.cat((coordinates, faces), -1).flatten(1), end), 1)


@pytest.mark.parametrize(
    "fault",
    ["no bos", "mid-point", "padding before the end", "points after the end", "two ends", "no axis"],
)
def test_what_is_no_sequence_is_refused(tiny_model, fault):
    config = tiny_model.config
    bos, eos, pad = config.bos_token_id, config.eos_token_id, config.pad_token_id
    row = {
        "no bos": [1, 2, 3, 17, 1, 2, 3, 17, eos],
        "mid-point": [bos, 1, 2, 3, 17, 4, eos, pad, pad],
        "padding before the end": [bos, pad, 1, 2, 3, 17, eos, pad, pad],
        "points after the end": [bos, 1, 2, 3, 17, eos, 1, 2, 3],
        "two ends": [bos, 1, 2, 3, 17, eos, eos, pad, pad],
        "no axis": [],
    }[fault]
    ids = torch.tensor([[bos, 1, 2, 3, 17, 4, 5, 6, 18], row]) if row else torch.tensor([bos, eos])
    with pytest.raises(ValueError, match="row 1 of input_ids is not a whole sequence" if row else r"\(B, L\)"):
        point_features(tiny_model, ids)


def test_an_empty_sequence_has_no_features(tiny_model):
    config = tiny_model.config
    ids = torch.tensor([[config.bos_token_id, config.eos_token_id]])
    assert point_features(tiny_model, ids).shape == (1, 0, 4, 64)


# ---- the cache ----


def features_read(cache, model, ids, condition):
    """Features, and how many rows had to be computed."""
    passes = []
    hook = model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    features = cache.features(model, ids, condition_embeds=condition)
    hook.remove()
    return features, len(passes)


def test_a_second_pass_reads_what_the_first_computed_row_by_row(tiny_model, condition, tmp_path):
    cache = FeatureCache(tmp_path / "features", tiny_model)
    ids = sequences(tiny_model, 2)
    expected = point_features(tiny_model, ids, condition_embeds=condition)
    first, computed = features_read(cache, tiny_model, ids, condition)
    assert computed == 2 and len(list((tmp_path / "features").iterdir())) == 2
    torch.testing.assert_close(first, expected, atol=3e-3, rtol=1e-3)
    again, computed = features_read(FeatureCache(tmp_path / "features", tiny_model), tiny_model, ids, condition)
    assert computed == 0 and torch.equal(again, first)
    swapped, computed = features_read(cache, tiny_model, ids.flip(0), condition.flip(0))
    assert computed == 0 and torch.equal(swapped, first.flip(0))
    stored = load_file(next((tmp_path / "features").iterdir()))["features"]
    assert stored.dtype == torch.float16 and first.dtype == torch.float32


def test_padding_of_the_batch_does_not_change_the_key(tiny_model, condition, tmp_path):
    cache = FeatureCache(tmp_path, tiny_model)
    short, pad = sequences(tiny_model, 1, points=5), tiny_model.config.pad_token_id
    features_read(cache, tiny_model, short, condition[:1])
    longer = torch.nn.functional.pad(short, (0, 28), value=pad)
    both = torch.cat((longer, sequences(tiny_model, 1, points=12)))
    features, computed = features_read(cache, tiny_model, both, condition)
    assert computed == 1
    assert features.shape == (2, 12, 4, 64) and not features[0, 5:].any()


def test_other_weights_conditions_and_precisions_are_never_read(tiny_model, condition, tmp_path):
    ids = sequences(tiny_model, 1)
    features_read(FeatureCache(tmp_path, tiny_model), tiny_model, ids, condition[:1])
    assert features_read(FeatureCache(tmp_path, tiny_model), tiny_model, ids, condition[1:])[1] == 1
    assert features_read(FeatureCache(tmp_path, tiny_model), tiny_model, ids, None)[1] == 1
    bfloat16 = FeatureCache(tmp_path, tiny_model, dtype=torch.bfloat16)
    assert features_read(bfloat16, tiny_model, ids, condition[:1])[1] == 1
    tiny_model.model.norm.weight.data[3] += 1e-3
    fresh, computed = features_read(FeatureCache(tmp_path, tiny_model), tiny_model, ids, condition[:1])
    assert computed == 1
    torch.testing.assert_close(
        fresh, point_features(tiny_model, ids, condition_embeds=condition[:1]), atol=3e-3, rtol=1e-3
    )


def test_a_fingerprint_survives_saving_and_tells_weights_and_windows_apart(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = PointillistForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(loaded) == fingerprint(tiny_model)
    loaded.config.sliding_window = 16
    assert fingerprint(loaded) != fingerprint(tiny_model)


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "no checksum"])
def test_a_damaged_file_is_computed_again_and_said(tiny_model, condition, tmp_path, caplog, damage):
    cache = FeatureCache(tmp_path, tiny_model)
    ids = sequences(tiny_model, 1)
    expected, _ = features_read(cache, tiny_model, ids, condition[:1])
    path = next(tmp_path.iterdir())
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[-5] ^= 1
    path.write_bytes(
        {"cut": data[:-100], "empty": b"", "one bit": data, "no checksum": data.replace(b"crc32", b"other")}[damage]
    )
    features, computed = features_read(cache, tiny_model, ids, condition[:1])
    assert computed == 1 and torch.equal(features, expected)
    assert path.name in caplog.text and "damaged" in caplog.text
    assert features_read(cache, tiny_model, ids, condition[:1])[1] == 0, "and written whole again"


def test_a_failed_write_leaves_nothing(tiny_model, condition, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, tiny_model)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.features(tiny_model, sequences(tiny_model, 1), condition_embeds=condition[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_write_killed_half_way_is_not_read(tiny_model, condition, tmp_path):
    ids = sequences(tiny_model, 1)
    tiny_model.save_pretrained(tmp_path / "model")
    torch.save({"ids": ids, "condition": condition[:1]}, tmp_path / "inputs.pt")
    program = f"""
import os, signal, torch
from gaussian_tokenizer.utils import atomic
from modeling import PointillistForCausalLM
from modeling.point_features import FeatureCache
model = PointillistForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
inputs = torch.load({str(tmp_path / "inputs.pt")!r}, weights_only=True)
atomic.flush_to_disk = lambda file: (file.truncate(1000), os.kill(os.getpid(), signal.SIGKILL))
FeatureCache({str(tmp_path / "cache")!r}, model).features(model, inputs["ids"], condition_embeds=inputs["condition"])
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=240)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".safetensors"]
    cache = FeatureCache(tmp_path / "cache", tiny_model)
    features, computed = features_read(cache, tiny_model, ids, condition[:1])
    assert computed == 1
    torch.testing.assert_close(
        features, point_features(tiny_model, ids, condition_embeds=condition[:1]), atol=3e-3, rtol=1e-3
    )


def test_what_the_cache_cannot_keep_is_refused(tiny_model, condition, tmp_path):
    with pytest.raises(ValueError, match=r"float16 or torch\.bfloat16, found torch\.float32"):
        FeatureCache(tmp_path, tiny_model, dtype=torch.float32)
    cache = FeatureCache(tmp_path, tiny_model)
    with pytest.raises(ValueError, match=r"up to 1e\+05 do not fit torch\.float16"):
        cache.get(torch.tensor([[36]]), {}, lambda: torch.full((1, 1, 4, 64), 1e5))
    with pytest.raises(ValueError, match="condition_embeds for 2 sequences, but 1"):
        cache.features(tiny_model, sequences(tiny_model, 1), condition_embeds=condition)
    with pytest.raises(ValueError, match="another model"):
        cache.features(PointillistForCausalLM(tiny_model.config), sequences(tiny_model, 1))
    assert list(tmp_path.iterdir()) == []
