"""Signals that stop a training process after its current step is saved, and a check of how many processes run."""

import os
import signal
import sys
import time
from collections.abc import Mapping

SECONDS_OF_ONE_REQUEST = 1.0


class Interrupted(Exception):
    """A signal, `number`, asked the process to stop. The text says how to resume; empty if another process says it."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.number = number


class StopSignals:
    """Within the block, SIGTERM and SIGINT are recorded in `received`; a second one has its usual effect.

    Two signals within a second are one request: a launcher forwards a signal that was sent to the whole job.
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
            # A worker of the data loader has inherited the handler. Ctrl-C reaches it too, while the step still needs its data.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not self.received:
            self._first = time.monotonic()
            self.received.append(number)
            # Immediately, as a launcher may exit before the step is saved. Not by print, which must not interrupt itself.
            name = signal.Signals(number).name
            said = f"\n{name}: the current step is finished and saved; a second {name} ends the process at once\n"
            os.write(2, said.encode())
        elif time.monotonic() - self._first >= SECONDS_OF_ONE_REQUEST:
            self.__exit__()
            os.kill(os.getpid(), number)


def warn_of_missing_processes(running: int, environment: Mapping[str, str] = os.environ) -> None:
    """Warn on stderr if `accelerate launch` was asked for several processes and started one, as without GPUs.

    It then sets the address of the group, but not its size.
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
