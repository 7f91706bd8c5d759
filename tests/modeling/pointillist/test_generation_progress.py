"""The bar of generation: points and not tokens, a total only where there is one, and a height that only rises."""

import io
import re
from contextlib import closing
from itertools import groupby

import pytest
import torch

from modeling.pointillist import generation_progress

POINT = re.compile(
    r"generating: .*?(\d+)(?:/(\d+))? points \[\d\d:\d\d(?:<[\d:?]+)?, +[\d.?]+ points/s(?:, height (\d+) %)?\]"
)


@pytest.fixture
def shown(monkeypatch):
    """Every state of the bar, as text; call it after generation."""
    screen = io.StringIO()
    bar = generation_progress.tqdm
    monkeypatch.setattr(
        generation_progress,
        "tqdm",
        lambda **options: bar(**options, file=screen, mininterval=0, miniters=1, ascii=True),
    )

    def states() -> list[tuple[int, int | None, int | None]]:
        """(points, total, height) of every line that was drawn."""
        lines = [line for line in re.split(r"[\r\n]+", screen.getvalue()) if line.strip()]
        matches = [POINT.fullmatch(line.strip()) for line in lines]
        assert all(matches), lines
        drawn = [tuple(None if part is None else int(part) for part in match.groups()) for match in matches]
        return [state for state, _ in groupby(drawn)]

    return states


def y_of_points(row, config) -> list[int]:
    return row[row < config.bos_token_id].tolist()[1::4]


def test_without_a_limit_points_are_counted_and_no_total_is_made_up(tiny_model, condition, shown):
    torch.manual_seed(3)
    ids = tiny_model.generate(condition_embeds=condition[:1], progress=True)
    states, heights = shown(), y_of_points(ids[0], tiny_model.config)
    assert [points for points, _, _ in states if points] == list(range(1, len(heights) + 1))
    assert {total for _, total, _ in states} == {None}
    assert [height for points, _, height in states if points] == [100 * y // 16 for y in heights]


def test_with_max_points_they_are_the_total_and_the_prompt_counts(tiny_model, condition, shown):
    bos = tiny_model.config.bos_token_id
    prompt = torch.tensor([[bos, 1, 2, 3, 20, 4, 5, 6, 21]])
    tiny_model.generate(
        prompt, condition_embeds=condition[:1], min_points=9, max_points=9, do_sample=False, progress=True
    )
    states = shown()
    assert [points for points, _, _ in states] == list(range(2, 10)) and {total for _, total, _ in states} == {9}


def test_of_a_batch_the_longest_row_counts_and_the_lowest_gives_the_height(tiny_model, condition, shown):
    torch.manual_seed(3)
    ids = tiny_model.generate(condition_embeds=condition.repeat(3, 1, 1), max_points=30, progress=True)
    rows = [y_of_points(row, tiny_model.config) for row in ids]
    assert len({len(row) for row in rows}) > 1, "rows of one length show nothing"
    for points, _, height in [state for state in shown() if state[0]]:
        ended = [row for row in rows if len(row) < points]
        assert height == min(100 * row[points - 1] // 16 for row in rows if row not in ended)
    assert points == max(map(len, rows))


def test_points_in_no_order_have_no_height(tiny_model, condition, shown):
    tiny_model.generate(condition_embeds=condition, sorted_points=False, max_points=5, progress=True)
    assert {height for _, _, height in shown()} == {None}


def test_rare_looks_leave_no_point_out(tiny_model, shown):
    """As on a GPU, where every look waits for the device."""
    config, unfinished = tiny_model.config, torch.ones(1, dtype=torch.bool)
    ids = torch.tensor([[config.bos_token_id, *[3, 8, 3, 20] * 7, config.eos_token_id]])
    with closing(generation_progress.GenerationProgress(config, ids[:, :1], None, True, True)) as bar:
        bar.update(ids[:, :18], unfinished)
        bar.finish(ids)
    assert [state[::2] for state in shown()] == [(0, None), (4, 50), (7, 50)]


def test_nothing_is_shown_unless_it_may_take_long(tiny_model, condition, capsys):
    tiny_model.generate(condition_embeds=condition, max_points=5)
    assert capsys.readouterr().err == ""
    torch.manual_seed(3)
    tiny_model.generate(condition_embeds=condition)
    assert re.search(r"generating: \d+ points \[", capsys.readouterr().err)
