"""A training process among others: signals that ask it to stop, and how many processes run.

SIGTERM and Ctrl-C (SIGINT) are noted, the step that is being done is finished and saved, and `Interrupted` says how to go on.
Pre-training, the decoder's training and fitting share this rule; `arguments.exit_on_user_error` turns it into one line.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping

SECONDS_OF_ONE_REQUEST = 1.0


class Interrupted(Exception):
    """A signal asked the process to stop, and what it was at is saved.

    Args:
        text: what was saved and how to go on; empty in a process that leaves saying so to another.
        number: the signal.
    """

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.number = number


class StopSignals:
    """While the block lasts, SIGTERM and SIGINT are noted in `received`; a second one has its usual effect.

    A signal that comes twice within a second is one request: a launcher passes on what the whole job was sent.
    """

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> "StopSignals":
        self.received.clear()
        self._owner = os.getpid()
        self._first = 0.0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if os.getpid() != self._owner:
            # A worker of the data loader has inherited this. Ctrl-C reaches it too, while the step still needs its data.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not self.received:
            self._first = time.monotonic()
            self.received.append(number)
            # At once, as a launcher may be gone before the step is saved. Not by print, which must not interrupt itself.
            name = signal.Signals(number).name
            os.write(
                2,
                f"\n{name}: the step that is being done is finished and saved; a second one ends it at once\n".encode(),
            )
        elif time.monotonic() - self._first >= SECONDS_OF_ONE_REQUEST:
            for name, handler in self._before.items():
                signal.signal(name, handler)
            os.kill(os.getpid(), number)


def warn_of_missing_processes(running: int, environment: Mapping[str, str] = os.environ) -> None:
    """Say on stderr if `accelerate launch` was asked for several processes and started one.

    Without GPUs it does so whatever `--num_processes` says, unless DeepSpeed or MPI is asked for. It then still sets the
    address at which several would meet, and leaves out how many there are.
    """
    asked = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if running == 1 and asked and "WORLD_SIZE" not in environment:
        print(
            "warning: accelerate launch was asked for more than one process, but 1 runs: without GPUs it starts no others. "
            "For N processes on CPUs: torchrun --nproc_per_node N SCRIPT ..., or accelerate launch --config_file "
            "training/configs/accelerate/cpu_zero2.yaml --num_processes N SCRIPT ...",
            file=sys.stderr,
            flush=True,
        )
