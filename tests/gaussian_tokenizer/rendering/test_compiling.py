import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from gaussian_tokenizer.rendering import compiling
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.compiling import in_threads
from gaussian_tokenizer.rendering.rasterizer import rasterize

ROOT = Path(__file__).parents[3]
DRAW = """
import torch
from gaussian_tokenizer.rendering.rasterizer import rasterize

eye = torch.eye(4)[None]
means = torch.tensor([[0.0, 0, 1], [0.1, 0, 2]])
color, alpha, depth = rasterize(
    means, torch.ones(2, 4), torch.full((2, 3), 0.1), torch.ones(2), torch.ones(2, 1, 3), eye, eye[:, :3, :3] * 9, 40, 30
)
print(float(alpha.sum()) > 0)
"""


@pytest.fixture(autouse=True)
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def draw(seed=0, size=150):
    random = torch.Generator().manual_seed(seed)
    camera = Cameras.look_at((0, 0, 1.0), (0, 0, 0), focal=size, width=size, height=size)
    return rasterize(
        0.2 * torch.randn(3000, 3, generator=random),
        torch.randn(3000, 4, generator=random),
        0.01 * torch.rand(3000, 3, generator=random),
        torch.rand(3000, generator=random),
        torch.randn(3000, 1, 3, generator=random),
        camera.viewmats,
        camera.Ks,
        size,
        size,
    )[0].numpy()


def run(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_every_number_is_in_one_part(threads, count):
    torch.set_num_threads(threads)
    times = np.zeros(count, int)

    def loop(start, end, array):
        array[start:end] += 1

    in_threads(loop, count, 3, times)
    assert (times == 1).all()


def test_an_error_in_another_thread_is_raised():
    torch.set_num_threads(2)
    caller, other_works = threading.get_ident(), threading.Event()

    def loop(start, end):
        if threading.get_ident() != caller:
            other_works.set()
            raise ZeroDivisionError
        assert other_works.wait(60)

    with pytest.raises(ZeroDivisionError):
        in_threads(loop, 2, 1)


def test_without_more_threads_the_calling_one_draws(monkeypatch):
    expected = draw()

    def none_left(threads):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(compiling, "_pool", none_left)
    torch.set_num_threads(4)
    assert np.array_equal(draw(), expected)


def test_several_threads_draw_at_once():
    torch.set_num_threads(3)
    expected = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(draw, [0, 1, 2, 3] * 10))
    assert all(np.array_equal(image, expected[i % 4]) for i, image in enumerate(drawn))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_draws_after_its_parent_did():
    code = """
import os, signal, torch
torch.set_num_threads(2)
import test_compiling
expected = test_compiling.draw()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if (test_compiling.draw() == expected).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run(code, PYTHONPATH=os.pathsep.join((str(ROOT), str(Path(__file__).parent))))
    assert done.stdout.strip() == "0", done.stderr


def test_without_a_folder_for_the_cache_it_compiles_and_draws():
    code = "from numba.core import caching\ncaching.CacheImpl._locator_classes.clear()\n"
    done = run(code + DRAW)
    assert done.stdout.strip() == "True", done.stderr


def test_a_second_process_does_not_compile_again(tmp_path):
    code = (
        DRAW + "from gaussian_tokenizer.rendering import blending as b\nprint(sum(b.blend.stats.cache_misses.values()))"
    )
    counts = [run(code, NUMBA_CACHE_DIR=str(tmp_path)).stdout.split()[-1] for _ in range(2)]
    assert counts == ["1", "0"]


def test_looking_at_an_avatar_does_not_import_numba():
    done = run("import sys, gaussian_tokenizer, training.command; print('numba' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
