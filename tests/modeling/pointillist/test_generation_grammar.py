"""The grammar against brute force: a token is allowed exactly if some complete, sorted, permitted point begins with it."""

from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling import PointGrammar, PointillistConfig

SIZES = dict(n_bins=3, n_faces=4, use_vision_encoder=False, use_point_encoder=False)
CONFIG = PointillistConfig(**SIZES)
ORDERS = ["".join(order) for order in permutations("xyzf")]


def allowed_by_brute_force(token_order, tokens, sorted_points, min_points, max_points, max_points_per_face):
    """Ids that may follow `tokens` (without bos), by listing every point there is."""
    n, faces, face_place = CONFIG.n_bins, CONFIG.n_faces, token_order.index("f")

    def order(point):
        return [point[token_order.index(letter)] for letter in "yzxf"]

    points = [tuple(tokens[i : i + 4]) for i in range(0, len(tokens) - len(tokens) % 4, 4)]
    begun = tuple(tokens[4 * len(points) :])
    candidates = [
        point
        for point in product(*(range(n, n + faces) if letter == "f" else range(n) for letter in token_order))
        if point[: len(begun)] == begun
        and (not sorted_points or not points or order(point) >= order(points[-1]))
        and (
            max_points_per_face is None or sum(p[face_place] == point[face_place] for p in points) < max_points_per_face
        )
        and (max_points is None or len(points) < max_points)
    ]
    allowed = {point[len(begun)] for point in candidates}
    if not begun and (len(points) >= min_points or not candidates):
        allowed.add(CONFIG.eos_token_id)
    return allowed


@settings(max_examples=120, deadline=None)
@given(
    token_order=st.sampled_from(["xyzf", "yzxf", *ORDERS]),
    seed=st.integers(0, 2**31),
    sorted_points=st.booleans(),
    min_points=st.integers(0, 6),
    max_points=st.one_of(st.none(), st.integers(6, 12)),
    max_points_per_face=st.one_of(st.none(), st.integers(1, 4)),
    high_end=st.booleans(),
    follow=st.booleans(),
)
def test_allowed_tokens_are_those_of_brute_force(
    token_order, seed, sorted_points, min_points, max_points, max_points_per_face, high_end, follow
):
    generator = torch.Generator().manual_seed(seed)
    limits = (sorted_points, min_points, max_points, max_points_per_face)
    grammar = PointGrammar(PointillistConfig(**SIZES, token_order=token_order), *limits)
    grammar.follow = follow
    tokens = []
    for _ in range(60):
        scores = torch.zeros(1, CONFIG.vocab_size)
        masked = grammar(torch.tensor([[CONFIG.bos_token_id, *tokens]]), scores)[0]
        allowed = masked.isfinite().nonzero().flatten().tolist()
        assert set(allowed) == allowed_by_brute_force(token_order, tokens, *limits), tokens
        assert allowed, f"dead end after {tokens}"
        # The upper corner of the cube is where dead ends would be: go there in half of the examples.
        weights = torch.tensor([3.0**token if high_end and token < CONFIG.n_bins else 1.0 for token in allowed])
        token = allowed[torch.multinomial(weights, 1, generator=generator).item()]
        if token == CONFIG.eos_token_id:
            break
        tokens.append(token)


def test_rows_of_a_padded_batch_are_judged_each_by_its_own_words():
    config = CONFIG
    rows = [[config.bos_token_id, 1, 2, 0, 4, 0], [config.bos_token_id, 2], [config.bos_token_id]]
    length = max(map(len, rows))
    padded = torch.tensor([[config.pad_token_id] * (length - len(row)) + row for row in rows])
    together = PointGrammar(config)(padded, torch.zeros(3, config.vocab_size))
    for row, scores in zip(rows, together):
        alone = PointGrammar(config)(torch.tensor([row]), torch.zeros(1, config.vocab_size))[0]
        assert torch.equal(alone, scores)


def test_a_finished_row_keeps_one_finite_score():
    ids = torch.tensor([[CONFIG.bos_token_id, 0, 0, 0, 3, CONFIG.eos_token_id, CONFIG.pad_token_id]])
    assert PointGrammar(CONFIG)(ids, torch.zeros(1, CONFIG.vocab_size)).isfinite().any()


@pytest.mark.parametrize("limits", [dict(min_points=5, max_points=4), dict(min_points=-1), dict(max_points_per_face=0)])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ValueError, match="found"):
        PointGrammar(CONFIG, **limits)


def test_points_up_to_64_bits_are_sorted_and_more_are_refused():
    config = PointillistConfig(n_bins=2**20, n_faces=7, use_vision_encoder=False, use_point_encoder=False)
    last, first = config.n_bins - 1, config.n_bins
    ids = torch.tensor([[config.bos_token_id, 5, last, last, first + 6, 5, last]])  # only x may still grow
    allowed = PointGrammar(config)(ids, torch.zeros(1, config.vocab_size))[0].isfinite().nonzero().flatten()
    assert allowed.tolist() == [last]
    with pytest.raises(ValueError, match="64 bits"):
        PointGrammar(PointillistConfig(n_bins=2**20, n_faces=8, use_vision_encoder=False, use_point_encoder=False))
