"""A model whose points are spelled in another order: sorted as ever, features and losses by slot, against loops over tokens."""

import pytest
import torch
from tiny_model import TINY

from gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistConfig, PointillistForCausalLM, PointStreamer
from modeling.point_features import point_features
from modeling.pointillist import generation_progress
from modeling.ranking import mean_log_likelihood

LIMITS = dict(max_points=12, max_points_per_face=3, output_point_features=True)


@pytest.fixture(params=["yzxf", "fyzx", "zfxy"])
def model(request) -> PointillistForCausalLM:
    torch.manual_seed(0)
    return PointillistForCausalLM(PointillistConfig(**TINY, token_order=request.param, initializer_range=0.2)).eval()


@pytest.fixture
def written(model, condition):
    torch.manual_seed(3)
    return model.generate(condition_embeds=condition.repeat(3, 1, 1), **LIMITS)


def tokenizer_of(model) -> GaussianTokenizer:
    config = model.config
    return GaussianTokenizer(config.n_bins, config.n_faces, token_order=config.token_order)


def test_written_points_are_those_of_the_tokenizer_and_sorted(model, written):
    tokenizer = tokenizer_of(model)
    assert written.num_points.max() == 12 and written.num_points.min() < 12, "some rows are cut, some end"
    for ids, count in zip(written.sequences, written.num_points.tolist()):
        points = tokenizer.decode(ids)
        assert len(points["faces"]) == count
        assert torch.equal(
            torch.from_numpy(tokenizer(points)["input_ids"].astype(int))[: 1 + 4 * count], ids[: 1 + 4 * count]
        )
        assert torch.bincount(torch.from_numpy(points["faces"])).max() <= 3


def test_features_are_in_the_order_of_slots(model, condition, written):
    ids, order = written.sequences, model.config.token_order
    features = point_features(model, ids, condition_embeds=condition.repeat(3, 1, 1), chunk=24)
    torch.testing.assert_close(features, written.point_features, atol=1e-4, rtol=0)
    with torch.no_grad():
        states = model(ids, condition_embeds=condition.repeat(3, 1, 1)).last_hidden_state
    for row, count in enumerate(written.num_points.tolist()):
        for point in range(count):
            for slot, letter in enumerate("xyzf"):
                expected = states[row, 4 * point + order.index(letter)]
                torch.testing.assert_close(features[row, point, slot], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_likelihood_is_that_of_a_loop_over_the_tokens(model, condition, written):
    found, config = mean_log_likelihood(model, written), model.double().config
    for row, count in enumerate(written.num_points.tolist()):
        ids = written.sequences[row]
        logits = model(ids[None], condition_embeds=condition.repeat(3, 1, 1)[row : row + 1].double()).logits[0]
        total = 0.0
        for position in range(1, 1 + 4 * count):
            is_face = config.token_order[(position - 1) % 4] == "f"
            first, last = (config.n_bins, config.n_bins + config.n_faces) if is_face else (0, config.n_bins)
            total += float(logits[position - 1, first:last].log_softmax(0)[ids[position] - first])
        assert float(found[row]) == pytest.approx(total / (4 * count), rel=1e-4)


def test_within_slots_the_end_competes_with_the_token_whose_place_it_takes(model, condition, written):
    config = model.config
    ids = written.sequences.clone()
    ids[:, -1] = config.eos_token_id
    labels = torch.where(ids == config.pad_token_id, -100, ids)
    logits = model(ids, condition_embeds=condition.repeat(3, 1, 1)).logits[:, :-1].double()
    faces = set(range(config.n_bins, config.n_bins + config.n_faces))
    if config.token_order[0] == "f":
        faces |= {config.bos_token_id, config.eos_token_id, config.pad_token_id}
    expected = []
    for row, position in (labels[:, 1:] >= 0).nonzero().tolist():
        label = int(labels[row, position + 1])
        admitted = [i for i in range(config.vocab_size) if (i in faces) == (label in faces)]
        expected.append(logits[row, position, admitted].logsumexp(0) - logits[row, position, label])
    config.loss_within_slot = True
    found = model(ids, labels=labels, condition_embeds=condition.repeat(3, 1, 1)).loss
    torch.testing.assert_close(found.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_the_bar_shows_y_and_the_streamer_points(model, condition, monkeypatch):
    heights, points = [], []
    monkeypatch.setattr(generation_progress.tqdm, "set_postfix_str", lambda bar, text, refresh: heights.append(text))
    tokenizer = tokenizer_of(model)
    streamer = PointStreamer(tokenizer, callback=points.append)
    options = dict(min_points=9, max_points=9, progress=True, streamer=streamer)
    ids = model.generate(condition_embeds=condition[:1], **options)
    expected = tokenizer.decode(ids[0])
    assert [point["positions"][0].tolist() for point in points] == expected["positions"].tolist()
    column = 1 + model.config.token_order.index("y")
    assert heights == [f"height {100 * y // 16} %" for y in ids[0, column:37:4].tolist()]
