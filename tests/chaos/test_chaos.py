"""A few rounds of `make chaos`, and that it would see what it is looking for."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("chaos.py")
# Writes 20 lines, one at a time, and goes on after those that are there.
COUNTING = """
import os, time
open("out/lines", "a").close()
for number in range(len(open("out/lines").readlines()), 20):
    time.sleep(0.02)
    with open("out/lines", "a") as file:
        {write}
"""
IN_ONE_PIECE = 'file.write(f"{number}\\n")'
WITH_ITS_PROCESS = 'file.write(f"{number} {os.getpid()}\\n")'


@pytest.fixture(scope="module")
def chaos():
    specification = importlib.util.spec_from_file_location("chaos", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["chaos"] = module  # dataclasses look it up
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def round_of(chaos, tmp_path):
    """Run code undisturbed, then with two kills; returns the figures."""

    def run(code: str):
        kind = chaos.Kind("code", (sys.executable, "-S", "-c", code))
        tally = chaos.Tally(rounds=1)
        tally.seconds, tally.changes = chaos.undisturbed(kind, chaos.reference_of(tmp_path, "code"))
        tally.changes = 8  # kills come early enough to be kills
        chaos.disturbed(kind, tmp_path, tally, 2, random.Random(1))
        return tally

    return run


@pytest.mark.slow
def test_killed_commands_end_with_the_bytes_of_undisturbed_ones():
    words = [sys.executable, SCRIPT, "--kills", "3", "--only", "synthesize", "corpus", "fit"]
    printed = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stdout + printed.stderr
    assert "3 kills, 0 findings" in printed.stdout


def test_a_command_that_goes_on_where_it_was_is_equal(round_of):
    tally = round_of(COUNTING.format(write=IN_ONE_PIECE))
    assert tally.kills == 2 and tally.starts == 3


def test_a_command_that_leaves_other_bytes_is_a_finding(round_of):
    with pytest.raises(RuntimeError, match=r"round 1 left something else: lines$"):
        round_of(COUNTING.format(write=WITH_ITS_PROCESS))


def test_a_command_that_fails_when_run_again_is_a_finding(round_of):
    code = "import os\nif os.path.exists('out/lines'): raise SystemExit('is there already')\n"
    with pytest.raises(RuntimeError, match=r"exited with 1 in .*\n.*is there already"):
        round_of(code + COUNTING.format(write=IN_ONE_PIECE))


def test_children_in_sessions_of_their_own_die_too(chaos, tmp_path):
    child = "import os, time; os.setsid(); open('out/child', 'w').close(); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    run = chaos.Run(chaos.Kind("code", (sys.executable, "-S", "-c", code)), tmp_path)
    run.watch(chaos.Moment(1, 0.0))
    assert len(list(run.family())) == 2
    run.kill()
    assert not list(run.family())


def test_files_that_one_folder_lacks_or_adds_or_has_otherwise_are_named(chaos, tmp_path):
    for folder, names in (("a", ("same", "lacking", "other")), ("b", ("same", "added", "other"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(folder if name == "other" else "text")
    assert chaos.differences(tmp_path / "a", tmp_path / "b") == ["added", "lacking", "other"]


def test_only_the_time_is_left_out_of_json(chaos):
    log = [{"loss": 1.5, "tokens_per_second": 3}, {"train_runtime": 2.0, "train_loss": 1}]
    assert chaos.timeless(json.loads(json.dumps({"log": log, "seconds": 4, "steps": 5}))) == {
        "log": [{"loss": 1.5}],
        "steps": 5,
    }
