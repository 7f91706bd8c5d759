"""Metrics against loops in float64 written from their definitions, and FLOPs against PyTorch's own counter."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistConfig, PointillistForCausalLM
from training.pretraining.metrics import baselines, flops_per_token, slot_metrics, slot_sums

SLOTS = ("x", "y", "z", "face")


def loop_sums(logits, labels):
    """(3, 4) NLL, hits and tokens by slot, token by token."""
    sums = [[0.0] * 4 for _ in range(3)]
    for row in range(len(labels)):
        for t in range(1, labels.shape[1]):
            target = int(labels[row, t])
            if target == -100:
                continue
            scores = [float(v) for v in logits[row, t - 1]]
            top = max(scores)
            log_sum = top + math.log(sum(math.exp(s - top) for s in scores))
            slot = (t - 1) % 4
            sums[0][slot] += log_sum - scores[target]
            sums[1][slot] += scores.index(top) == target
            sums[2][slot] += 1
    return sums


SIZES = dict(n_bins=4, n_faces=4, use_vision_encoder=False, use_point_encoder=False)
CONFIG = PointillistConfig(**SIZES)


def random_case(rows=3, length=15, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, length, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[:, 1:4] = logits[:, 0:3].argmax(-1)  # some hits
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return logits, labels


def test_slot_sums_are_those_of_a_loop_over_tokens():
    logits, labels = random_case()
    sums = slot_sums(logits, labels, CONFIG)
    assert sums.shape == (3, 3, 4)
    assert np.allclose(sums.sum(0), loop_sums(logits.double(), labels), rtol=1e-6)
    for row in range(3):
        assert np.allclose(sums[row], loop_sums(logits[row : row + 1].double(), labels[row : row + 1]), rtol=1e-6)


@pytest.mark.parametrize("order", ["yzxf", "fyzx", "zfxy"])
def test_slots_keep_their_sums_wherever_they_stand(order):
    logits, labels = random_case()
    expected = np.array(loop_sums(logits.double(), labels))[:, [order.index(letter) for letter in "xyzf"]]
    found = slot_sums(logits, labels, PointillistConfig(**SIZES, token_order=order)).sum(0)
    assert np.allclose(found, expected, rtol=1e-6)


def test_windows_of_the_point_level_begin_with_a_whole_group():
    logits, labels = random_case()
    config = PointillistConfig(**SIZES, level="point")
    groups = F.pad(labels, (3, 0), value=-100)
    groups[:, 3] = -100  # bos, at the end of the first group
    sums = slot_sums(F.pad(logits, (0, 0, 3, 0)), groups, config)
    assert np.allclose(sums.sum(0), loop_sums(logits.double(), labels), rtol=1e-6)


def test_a_model_that_learns_within_slots_is_judged_within_them():
    logits, labels = random_case()
    config = PointillistConfig(**SIZES, loss_within_slot=True)
    narrowed = logits.clone()
    for row, position in (labels[:, 1:] >= 0).nonzero().tolist():
        label = int(labels[row, position + 1])
        others = [i for i in range(11) if (4 <= i < 8) != (4 <= label < 8)]  # 4 bins, 4 faces, 3 special tokens
        narrowed[row, position, others] = -math.inf
    expected = loop_sums(narrowed.double(), labels)
    assert np.allclose(slot_sums(logits, labels, config).sum(0), expected, rtol=1e-6)
    assert sum(expected[0]) < sum(loop_sums(logits.double(), labels)[0])


def test_metrics_are_means_over_tokens_not_over_slots_or_rows():
    logits, labels = random_case()
    (nll, hits, counted), metrics = (
        loop_sums(logits.double(), labels),
        slot_metrics(slot_sums(logits, labels, CONFIG).sum(0)),
    )
    assert metrics["nll"] == pytest.approx(sum(nll) / sum(counted), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(sum(hits) / sum(counted))
    for i, slot in enumerate(SLOTS):
        assert metrics[f"nll_{slot}"] == pytest.approx(nll[i] / counted[i], rel=1e-6)
        assert metrics[f"accuracy_{slot}"] == pytest.approx(hits[i] / counted[i])
        assert metrics[f"perplexity_{slot}"] == pytest.approx(math.exp(nll[i] / counted[i]), rel=1e-5)


def test_a_slot_without_tokens_has_finite_metrics():
    metrics = slot_metrics(torch.zeros(3, 4))
    assert metrics["nll"] == 0 and all(math.isfinite(value) for value in metrics.values())


class Rows:
    """A split in memory."""

    def __init__(self, tokenizer, clouds):
        self.tokenizer, self.sequences = tokenizer, [tokenizer(cloud)["input_ids"].astype(np.int64) for cloud in clouds]

    def __len__(self):
        return len(self.sequences)

    def sequence(self, row):
        return self.sequences[row]


def cloud(random, count):
    positions = random.normal(0, 0.3, (count, 3)).clip(-0.9, 0.9).astype(np.float32)
    return {"positions": positions, "faces": random.integers(0, 6, count) ** 2 % 7}


@pytest.mark.parametrize("order", ["xyzf", "yzxf", "fyzx"])
def test_baselines_are_those_of_a_loop_over_the_sequences(order):
    tokenizer = GaussianTokenizer(n_bins=8, n_faces=7, bounds=[[-1, -1, -1], [1, 1, 1]], token_order=order)
    random = np.random.default_rng(0)
    train = Rows(tokenizer, [cloud(random, n) for n in (3, 9, 14)])
    heldout = Rows(tokenizer, [cloud(random, n) for n in (5, 11)])

    possible = [list(range(8, 15) if letter == "f" else range(8)) for letter in order]
    possible[0] = [*possible[0], tokenizer.eos_token_id]
    counts = [{token: 1 for token in tokens} for tokens in possible]
    for sequence in train.sequences:
        for t, token in enumerate(sequence[1:]):
            counts[t % 4][int(token)] += 1
    unigram = uniform = total = 0.0
    for sequence in heldout.sequences:
        for t, token in enumerate(sequence[1:]):
            slot = counts[t % 4]
            unigram -= math.log(slot[int(token)] / sum(slot.values()))
            uniform += math.log(len(slot))
            total += 1
    found = baselines(train, heldout)
    assert found["unigram_nll"] == pytest.approx(unigram / total, rel=1e-12)
    assert found["uniform_nll"] == pytest.approx(uniform / total, rel=1e-12)


def test_flops_a_token_are_those_that_pytorch_counts():
    config = PointillistConfig(
        n_bins=64, n_faces=200, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=256, use_vision_encoder=False, use_point_encoder=False,
    )  # fmt: skip
    length, condition_tokens = 256, 40
    model = PointillistForCausalLM(config)
    model.set_attn_implementation("eager")  # matrix products that the counter sees
    ids = torch.randint(0, 64, (1, length))
    condition = torch.randn(1, condition_tokens, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, condition_embeds=condition).loss.backward()
    counted = counter.get_total_flops()
    # The counter sees the whole square of self-attention scores, causal or not: twice what has to be done.
    square = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2 * length
    # Keys and values of the condition are made once for each of its tokens, not for each token of the sequence.
    projected = config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * config.hidden_size
    once = 6 * projected * (length - condition_tokens)
    expected = length * flops_per_token(config, model.num_decoder_parameters(), length, condition_tokens)
    assert counted == pytest.approx(expected + square - once, rel=0.02)
    assert counted == pytest.approx(expected, rel=0.15)
