"""Jobs on several processes: nothing lost, nothing twice, in order, whether they go out one by one or in batches."""

from functools import partial

import pytest

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.utils.parallel import runner

TOLD = partial(str.format, "{0} on {1.name}")  # found by every process


@pytest.mark.distributed
def test_results_come_in_the_order_of_the_jobs_for_any_number_of_them(tmp_path, capsys):
    head = build_procedural_head(600)
    head.save(tmp_path / "head.safetensors")
    with runner(2, partial(HeadModel.load, tmp_path / "head.safetensors")) as run:
        for count in (0, 1, 128, 301, 2000):  # of 301 on, batches of 2 and 7, of which the last is not full
            jobs = [(number,) for number in range(count)]
            assert run(TOLD, jobs, "telling", False) == [f"{number} on procedural:600" for number in range(count)]
        run(TOLD, [(number,) for number in range(301)], "telling", True, done=5)
    assert "306/306" in capsys.readouterr().err


def test_one_process_is_this_one(tmp_path):
    head = build_procedural_head(600)
    with runner(1, lambda: head) as run:
        assert run(TOLD, [(1,), (2,)], "telling", False) == ["1 on procedural:600", "2 on procedural:600"]
    with pytest.raises(ValueError, match="num_proc is 0; expected at least 1"), runner(0, lambda: head):
        pass
