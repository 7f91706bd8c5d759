"""How loops become machine code and run on several threads.

`compiled` is numba's compiler with the settings of this package, `in_threads` calls a compiled loop for one part of its
range after the other, on as many threads as torch uses. The threads are Python's: compiled loops release the interpreter's
lock. numba's own threads are not used, because the portable kind must not be entered by two threads at once and does not
survive a fork. What a part computes depends on that part alone, so results have the same bits for any number of threads.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numba
import torch

# IEEE arithmetic, but a product and a sum may be rounded once (a fused multiply-add); division by zero gives inf.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def compiled(function: Callable) -> Callable:
    """Machine code of a function for each combination of argument types, made at its first call and kept on disk.

    numba keeps it beside the source file or else in the user's cache folder (or where NUMBA_CACHE_DIR says). Where it can
    write to neither, every process compiles for itself.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        return numba.njit(**_OPTIONS)(function)


def inlined(function: Callable) -> Callable:
    """A part of compiled functions of the same file, copied to where it is called."""
    return numba.njit(forceinline=True, error_model="numpy", fastmath=_OPTIONS["fastmath"])(function)


def in_threads(loop: Callable, count: int, size: int, *arguments: Any) -> None:
    """Call loop(start, end, *arguments) for the parts of `size` of 0..count; a free thread takes the next part.

    The calling thread works too and does not wait for helpers that have not begun, so that on a busy machine it does
    everything itself. It also does where no thread can be started.
    """
    helpers = min(torch.get_num_threads(), -(-count // size)) - 1
    if helpers <= 0:
        loop(0, count, *arguments)
        return
    starts = iter(range(0, count, size))

    def work() -> None:
        for start in starts:
            loop(start, min(start + size, count), *arguments)

    begun: list[Future] = []
    with contextlib.suppress(RuntimeError):  # no more threads, or the interpreter is ending
        begun.extend(_pool(helpers).submit(work) for _ in range(helpers))
    work()
    for helper in begun:
        if not helper.cancel():
            helper.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "rasterizer")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of these threads
