"""Many independent jobs on several processes, with progress, and results that do not depend on the number of processes.

All processes, the calling one included, use one torch thread, so that sums have one order everywhere.
"""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import torch
from tqdm.auto import tqdm

MAX_BATCH = 8  # jobs: dispatching one takes a tenth of the time of the smallest
BATCHES_PER_PROCESS = 64  # at least, if there are enough jobs, so that the processes end together
RunAll = Callable[[Callable, Sequence[tuple]], Iterator[Any]]


@contextlib.contextmanager
def runner(num_proc: int, load_shared: Callable[[], Any], preload: Sequence[str] = ()) -> Iterator[Callable]:
    """`run(function, jobs, description, progress, done=0)` on `num_proc` processes, or in this one for 1.

    It calls `function(*job, shared)`, a top-level function, for every job and returns the results in the order of the jobs. Every
    process calls `load_shared`, which must be picklable, once. `preload` names modules to import once for all processes.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; expected at least 1 process")
    with _serial(load_shared) if num_proc == 1 else _parallel(num_proc, load_shared, preload) as run_all:

        def run(function: Callable, jobs: Sequence[tuple], description: str, progress: bool, done: int = 0) -> list:
            results = run_all(function, jobs)
            return list(tqdm(results, description, len(jobs) + done, initial=done, disable=not progress))

        yield run


@contextlib.contextmanager
def _serial(load_shared: Callable[[], Any]) -> Iterator[RunAll]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shared = load_shared()
    try:
        yield lambda function, jobs: (function(*job, shared) for job in jobs)
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _parallel(num_proc: int, load_shared: Callable[[], Any], preload: Sequence[str]) -> Iterator[RunAll]:
    # Never a plain fork: torch's threads do not survive it. A fork server imports everything once.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__, *preload])
    pool = ProcessPoolExecutor(num_proc, context, initializer=_start_process, initargs=(load_shared,))

    def run_all(function: Callable, jobs: Sequence[tuple]) -> Iterator[Any]:
        batch = min(MAX_BATCH, max(1, len(jobs) // (BATCHES_PER_PROCESS * num_proc)))
        return pool.map(_call, [function] * len(jobs), jobs, chunksize=batch)

    try:
        yield run_all
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of the {num_proc} processes was killed, often because memory ran out; run again with a lower --num_proc, "
            'finished jobs are kept (a script that starts several processes needs `if __name__ == "__main__":`)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_shared: Any  # of this process


def _start_process(load_shared: Callable[[], Any]) -> None:
    global _shared
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _shared = load_shared()


def _call(function: Callable, job: tuple) -> Any:
    return function(*job, _shared)


def _end_with_parent() -> None:
    """A killed parent cannot stop its processes, which would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
