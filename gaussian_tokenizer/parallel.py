"""Many independent jobs on several processes, with progress, and results that do not depend on how many there are.

A job is a top-level function with its arguments; every one also gets the head model, which each process loads once.
All processes compute with one torch thread, the calling one included: sums are then made in one order everywhere.
"""

import contextlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from gaussian_tokenizer.head_model import HeadModel

AHEAD = 4  # batches handed out for each process: none waits for the next one, and few are in memory
BATCH = 8  # at most so many jobs in one: handing out takes as long as a tenth of the smallest jobs
BATCHES = 64  # for each process, if the jobs suffice: the processes end together


class Runner(Protocol):
    """Call `function(*job, head=head)` for every job; the results in the order of the jobs."""

    def __call__(
        self, function: Callable, jobs: Sequence[tuple], description: str, progress: bool, done: int = 0
    ) -> list[Any]: ...


@contextlib.contextmanager
def runner(num_proc: int, head: HeadModel, head_file: Path) -> Iterator[Runner]:
    """A `Runner` on `num_proc` processes, or in this one for 1; `head_file` holds `head` for the others."""
    if num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; expected at least 1 process")

    def here(function: Callable, jobs: Sequence[tuple], description: str, progress: bool, done: int = 0) -> list[Any]:
        bar = tqdm(jobs, description, len(jobs) + done, initial=done, disable=not progress)
        return [function(*job, head=head) for job in bar]

    if num_proc == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield here
        finally:
            torch.set_num_threads(threads)
        return

    # Never a plain fork: torch's threads do not survive it. A fork server imports everything once.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__, "gaussian_tokenizer.corpus_shards"])
    pool = ProcessPoolExecutor(num_proc, context, initializer=_start_process, initargs=(head_file,))

    def there(function: Callable, jobs: Sequence[tuple], description: str, progress: bool, done: int = 0) -> list[Any]:
        size = min(BATCH, max(1, len(jobs) // (BATCHES * num_proc)))
        waiting, running = iter(range(0, len(jobs), size)), dict[Future, slice]()
        results: list[Any] = [None] * len(jobs)
        with tqdm(desc=description, total=len(jobs) + done, initial=done, disable=not progress) as bar:
            while True:
                for start in itertools.islice(waiting, AHEAD * num_proc - len(running)):
                    batch = slice(start, min(start + size, len(jobs)))
                    running[pool.submit(_call, function, jobs[batch])] = batch
                if not running:
                    return results
                for future in wait_for(running, return_when=FIRST_COMPLETED).done:
                    batch = running.pop(future)
                    results[batch] = future.result()
                    bar.update(batch.stop - batch.start)

    try:
        yield there
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of the {num_proc} processes was killed, often for want of memory; run again with a lower --num_proc, "
            "what is finished is kept (a script that asks for several processes begins under `if __name__ == "
            '"__main__":`)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_head: HeadModel  # of this process


def _start_process(head_file: Path) -> None:
    global _head
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _head = HeadModel.load(head_file)


def _call(function: Callable, jobs: Sequence[tuple]) -> list[Any]:
    return [function(*job, head=_head) for job in jobs]


def _end_with_parent() -> None:
    """A killed parent cannot stop its processes, which would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
