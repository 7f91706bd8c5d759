"""Signals that ask a training to stop, and processes that were asked for and do not run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from training.common import process
from training.common.arguments import exit_on_user_error
from training.common.process import Interrupted, StopSignals, warn_of_missing_processes


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_answered_and_twice_in_a_second_is_once(clock, number, capfd):
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        clock[0] += 0.9
        os.kill(os.getpid(), number)
        assert signals.received == [number]
    assert capfd.readouterr().err.count("the current step is finished and saved") == 1


def test_a_second_ctrl_c_interrupts_at_once(clock):
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # the tests themselves may run in the background of a shell
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1.0
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_of_an_earlier_block_is_forgotten():
    signals = StopSignals()
    with signals:
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received
    with signals:
        assert not signals.received


def test_handlers_are_those_of_before_when_the_block_is_over():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_worker_that_inherits_it_outlives_ctrl_c_and_can_be_terminated(number, status):
    code = (
        "import os, sys\nfrom training.common.process import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    worker = os.fork()\n"
        "    if worker == 0:\n"
        "        os.kill(os.getpid(), int(sys.argv[1]))\n"
        "        os._exit(len(signals.received))\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))"
    )
    printed = subprocess.run([sys.executable, "-c", code, str(int(number))], cwd=ROOT, capture_output=True, text=True)
    assert printed.stdout.strip() == str(int(status)), printed.stderr


def test_a_stop_is_one_line_and_the_status_of_its_signal(capsys):
    def stopped():
        raise Interrupted("saved; run the same command again", signal.SIGINT)

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(stopped)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "\nsaved; run the same command again\n"


def test_ctrl_c_before_anything_could_be_saved_is_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(interrupted)
    assert caught.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


# ---- accelerate's launcher


def launched(tmp_path: Path, *arguments: str, code: str) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--num_machines", "1", *arguments, script]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "MASTER"))}
    return subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_processes_that_accelerate_does_not_start_are_missed(tmp_path):
    code = "import os\nfrom training.common.process import warn_of_missing_processes\n"
    code += "warn_of_missing_processes(int(os.environ.get('WORLD_SIZE', 1)))"
    said = launched(tmp_path, "--cpu", "--num_processes", "2", code=code).stderr
    assert "warning: accelerate launch was asked for more than one process, but 1 runs" in said
    assert "torchrun --nproc_per_node N" in said


def test_no_process_is_missed_where_none_was_asked_for_or_all_run(capsys):
    launcher = {"ACCELERATE_MIXED_PRECISION": "no"}
    warn_of_missing_processes(1, launcher)
    warn_of_missing_processes(2, launcher | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"})
    warn_of_missing_processes(1, {"MASTER_ADDR": "node7"})  # no launcher of accelerate's, say a job's own setting
    assert capsys.readouterr().err == ""


def test_our_line_of_an_error_comes_before_the_launchers_traceback(tmp_path):
    code = "from training.common.arguments import exit_on_user_error\n"
    code += "def main():\n    print('printed before')\n    raise ValueError('our line')\nexit_on_user_error(main)"
    both = launched(tmp_path, "--cpu", "--num_processes", "1", code=code)
    assert both.stderr.index("error: our line") < both.stderr.index("Traceback")
    assert both.stderr.count("Traceback") == 1
