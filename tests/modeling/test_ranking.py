"""Of several clouds the likeliest: as the model itself counts it, token by token over the whole sequence."""

import pytest
import torch

from modeling.ranking import likeliest, mean_log_likelihood

OPTIONS = dict(output_point_features=True, return_dict_in_generate=True, max_points=12, top_k=5)
CANDIDATES = 8


@pytest.fixture
def written(tiny_model, condition):
    torch.manual_seed(2)
    return tiny_model.generate(condition_embeds=condition.repeat_interleave(CANDIDATES, 0), **OPTIONS)


def by_loop(model, ids, count, condition) -> float:
    """Mean log-probability of each token among those of its slot, from one forward over the sequence."""
    config = model.double().config
    logits = model(ids[None], condition_embeds=condition[None].double()).logits[0]
    total = 0.0
    for position in range(1, 1 + 4 * count):
        face = (position - 1) % 4 == 3
        first, last = (config.n_bins, config.n_bins + config.n_faces) if face else (0, config.n_bins)
        scores = logits[position - 1, first:last]
        total += float(scores[ids[position] - first] - scores.exp().sum().log())
    return total / (4 * count)


@torch.no_grad()
def test_likelihood_is_that_of_a_loop_over_the_tokens(tiny_model, written, condition):
    found = mean_log_likelihood(tiny_model, written)
    for row in range(len(found)):
        count = min(int(written.num_points[row]), 8)  # a full forward is banded like generation within a window
        if count == int(written.num_points[row]):
            assert float(found[row]) == pytest.approx(
                by_loop(tiny_model, written.sequences[row], count, condition[row // CANDIDATES]), rel=1e-4
            )
    assert (written.num_points <= 8).any()


def test_the_likeliest_of_each_person_is_kept(tiny_model, written):
    score = mean_log_likelihood(tiny_model, written)
    kept = likeliest(tiny_model, written, CANDIDATES)
    for person in range(2):
        first = CANDIDATES * person
        best = first + int(score[first : first + CANDIDATES].argmax())
        assert torch.equal(kept.sequences[person], written.sequences[best])
        assert torch.equal(kept.point_features[person], written.point_features[best])
        assert kept.num_points[person] == written.num_points[best]


def test_a_sequence_without_points_is_never_the_likeliest(tiny_model, written):
    written.num_points[0] = 0
    assert mean_log_likelihood(tiny_model, written)[0] == -torch.inf
