"""Drawing from the tokens of a slot alone is drawing from the whole vocabulary under the grammar."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from modeling import PointGrammar, PointillistConfig
from modeling.pointillist.generation_sampling import TokenSampler

SIZES = dict(n_bins=5, n_faces=7, use_vision_encoder=False, use_point_encoder=False)
CONFIG = PointillistConfig(**SIZES)
BOS, EOS, PAD = CONFIG.bos_token_id, CONFIG.eos_token_id, CONFIG.pad_token_id
POINT = [1, 1, 1, 6]
PROMPTS = [[BOS], [BOS, 1], [BOS, 1, 1, 1], [BOS, *POINT], [BOS, *POINT, 2, 2, 2], [BOS, *POINT, 2, 2, 2, 7]]


def processors(*others: LogitsProcessor) -> LogitsProcessorList:
    return LogitsProcessorList([PointGrammar(CONFIG), *others, TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.7)])


def expected_distribution(ids: torch.Tensor, logits: torch.Tensor, steps: LogitsProcessorList) -> torch.Tensor:
    return steps(ids, logits).softmax(-1)


def test_shares_of_many_draws_are_those_of_the_whole_vocabulary():
    torch.manual_seed(0)
    for prompt in PROMPTS:
        logits = torch.randn(1, CONFIG.vocab_size)
        ids = torch.tensor([prompt]).expand(20_000, -1)
        sample = TokenSampler(processors(), CONFIG, ids[:, :1], do_sample=True)
        assert sample.start == 1
        drawn = sample(ids, logits.expand(len(ids), -1))
        shares = torch.bincount(drawn, minlength=CONFIG.vocab_size) / len(ids)
        expected = expected_distribution(ids[:1], logits, processors())[0]
        assert (shares[expected == 0] == 0).all()
        assert (shares - expected).abs().max() < 0.02  # more than five standard deviations


@pytest.mark.parametrize("order", ["xyzf", "yfzx", "fyzx"])
def test_greedy_takes_the_likeliest_that_is_allowed(order):
    torch.manual_seed(1)
    config = PointillistConfig(**SIZES, token_order=order)
    point = [6 if letter == "f" else 1 for letter in order]
    for prompt in ([BOS, *point, *point][:length] for length in range(1, 10)):
        ids, logits = torch.tensor([prompt, prompt]), torch.randn(2, CONFIG.vocab_size)
        steps = LogitsProcessorList([PointGrammar(config), TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.7)])
        token = TokenSampler(steps, config, ids[:, :1], do_sample=False)(ids, logits)
        assert token.tolist() == expected_distribution(ids, logits, steps).argmax(-1).tolist()


def test_rows_in_different_slots_are_drawn_from_the_whole_vocabulary():
    torch.manual_seed(2)
    ids = torch.tensor([[BOS, 1, 1, 1], [PAD, BOS, 1, 1]])  # a face is next, a z is next
    logits = torch.randn(2, CONFIG.vocab_size)
    sample = TokenSampler(processors(), CONFIG, ids, do_sample=False)
    assert sample.start is None
    assert sample(ids, logits).tolist() == expected_distribution(ids, logits, processors()).argmax(-1).tolist()


def test_processors_of_ones_own_see_the_whole_vocabulary():
    seen = []

    class Favourite(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.shape[1])
            return scores.index_fill(1, torch.tensor([CONFIG.n_bins + 3]), 50.0)

    ids = torch.tensor([[BOS, 1, 1, 1]])
    sample = TokenSampler(processors(Favourite()), CONFIG, ids[:, :1], do_sample=True)
    assert sample(ids, torch.randn(1, CONFIG.vocab_size)).item() == CONFIG.n_bins + 3
    assert seen == [CONFIG.vocab_size]


def test_a_finished_row_does_not_disturb_the_others():
    ids = torch.tensor([[BOS, *POINT, EOS, PAD, PAD], [BOS, *POINT, 2, 2, 2]])
    sample = TokenSampler(processors(), CONFIG, ids[:, :1], do_sample=True)
    token = sample(ids, torch.randn(2, CONFIG.vocab_size))
    assert CONFIG.n_bins <= token[1] < CONFIG.n_bins + CONFIG.n_faces
