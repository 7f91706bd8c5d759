"""Builds killed before each of their file-system operations, and two at once: never success with another corpus."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from gaussian_tokenizer.corpus.corpus import staging_folder
from gaussian_tokenizer.synthesize import synthesize


@dataclass(frozen=True)
class Command:
    """What is asked for; `subjects` is a folder, or how many synthetic ones."""

    subjects: str | int
    settings: dict[str, Any] = field(default_factory=lambda: {"num_validation": 1, "n_bins": 32})
    overwrite: bool = False


class Builds:
    """Builds of one output folder, each in a process of its own; see `killed_builds`."""

    def __init__(self, folder: Path):
        self.output = folder / "corpus"
        words = [sys.executable, str(Path(__file__).with_name("killed_builds.py")), str(folder)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, command: Command, at: int = 0, signal: str = "SIGKILL", exchange: bool = True) -> dict[str, Any]:
        """`at`: send `signal` right before this operation, the first is 1."""
        return self._ask(
            command.__dict__ | {"output": str(self.output), "at": at, "signal": signal, "exchange": exchange}
        )

    def go_on(self, stopped: dict[str, Any]) -> dict[str, Any]:
        return self._ask({"continue": stopped["process"]})

    def clear(self) -> None:
        for folder in (self.output, staging_folder(self.output)):
            shutil.rmtree(folder, ignore_errors=True)

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["outcome"] != "failed", answer
        return answer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> dict[int, str]:
    """Folders of three and of four subjects."""
    folder = tmp_path_factory.mktemp("subjects")
    synthesize(folder / "4", 4, image_size=16, num_points=20)
    shutil.copytree(folder / "4", folder / "3")
    shutil.rmtree(folder / "3" / "synthetic-0-000003")
    return {count: str(folder / str(count)) for count in (3, 4)}


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    builds = Builds(tmp_path_factory.mktemp("builds"))
    yield builds
    builds.process.stdin.close()
    builds.process.wait()


SETTINGS, OTHERS = {"num_validation": 1, "n_bins": 32}, {"num_validation": 1, "n_bins": 64}


@pytest.fixture(scope="module")
def commands(subjects):
    return {
        "three": Command(subjects[3]),
        "four": Command(subjects[4]),
        "four, other settings": Command(subjects[4], OTHERS),
        "synthetic": Command(3),
        "old": Command(subjects[4], {"num_validation": 2, "n_bins": 16}),
    }


@pytest.fixture(scope="module")
def bytes_of(builds, commands):
    """Command -> what an undisturbed build of it leaves."""
    found = {}

    def of(command: Command) -> dict[str, bytes]:
        key = json.dumps([command.subjects, command.settings])
        if key not in found:
            builds.clear()
            assert builds.run(command)["outcome"] == "built"
            found[key] = contents(builds.output)
        return found[key]

    return of


STRIDE = int(os.environ.get("KILL_STRIDE", "8"))  # 1: a kill before every single operation, which takes minutes
# Whether there is a corpus to replace, what is killed, what comes next, and whether the system can exchange two folders.
SCENARIOS = [
    (False, "three", "four", True),
    (False, "synthetic", "four", True),
    (True, "three", "four", True),
    (True, "three", "four, other settings", False),
]


def kill_at(step, builds, bytes_of, commands, over_an_old_one, first, then, exchange) -> bool:
    """Whether there was such a step; what must be true whatever it is."""
    old = commands["old"]
    expected = {name: bytes_of(commands[name]) for name in (first, then)}
    before = bytes_of(old) if over_an_old_one else {}
    builds.clear()
    for name, content in before.items():
        (builds.output / name).parent.mkdir(parents=True, exist_ok=True)
        (builds.output / name).write_bytes(content)
    killed = builds.run(replace(commands[first], overwrite=over_an_old_one), step, exchange=exchange)
    left = contents(builds.output)
    assert left in ({}, before, expected[first])
    answer = builds.run(commands[then], exchange=exchange)
    if answer["outcome"] == "refused":
        assert "exists already" in answer["message"] or "half-built corpus of other settings" in answer["message"]
        assert contents(builds.output) == left
        if "exists already" in answer["message"]:
            assert left
        # Either the first command goes on or, if its corpus is in its place, it is told so.
        answer = builds.run(replace(commands[first], overwrite=over_an_old_one), exchange=exchange)
        assert answer["outcome"] == "built" or (left == expected[first] and "exists already" in answer["message"])
        assert contents(builds.output) == expected[first]
        answer = builds.run(replace(commands[then], overwrite=True), exchange=exchange)
    assert answer["outcome"] == "built" and contents(builds.output) == expected[then]
    assert not staging_folder(builds.output).exists()
    return killed["outcome"] == "killed"


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_build_killed_before_any_operation_is_followed_by_the_right_corpus_or_a_refusal(
    builds, bytes_of, commands, scenario
):
    step = 1 + SCENARIOS.index(scenario)
    while kill_at(step, builds, bytes_of, commands, *scenario):
        step += STRIDE
    assert step > 50


@pytest.mark.parametrize("step", [20, 45])
def test_a_build_killed_half_way_is_followed_by_the_right_corpus_or_a_refusal(builds, bytes_of, commands, step):
    assert kill_at(step, builds, bytes_of, commands, *SCENARIOS[-1])


def test_a_build_killed_with_only_its_lock_made_is_not_taken_for_a_finished_one(builds, bytes_of, commands):
    expected = bytes_of(commands["four"])
    builds.clear()
    builds.run(commands["three"])
    for step in range(1, 9):
        assert builds.run(replace(commands["three"], overwrite=True), step)["outcome"] == "killed"
        if [path.name for path in staging_folder(builds.output).glob("*")] == ["lock"]:
            break
    else:
        pytest.fail("the lock is no longer what a build makes first")
    assert builds.run(replace(commands["four"], overwrite=True))["outcome"] == "built"
    assert contents(builds.output) == expected


def test_a_build_killed_while_it_cleans_up_leaves_a_corpus_that_is_not_taken_for_another(builds, bytes_of, commands):
    three = bytes_of(commands["three"])
    builds.clear()
    steps = builds.run(commands["three"])["steps"]
    for before_the_end in (0, 1, 6):
        builds.clear()
        assert builds.run(commands["three"], steps - before_the_end)["outcome"] == "killed"
        assert contents(builds.output) == three and staging_folder(builds.output).exists()
        answer = builds.run(commands["four, other settings"])
        assert answer["outcome"] == "refused" and "exists already" in answer["message"]
        assert contents(builds.output) == three and not staging_folder(builds.output).exists()


@pytest.mark.parametrize("step", [5, 30, -2])
def test_a_second_build_is_refused_and_touches_nothing_of_the_first(builds, bytes_of, commands, step):
    expected = bytes_of(commands["three"])
    builds.clear()
    steps = builds.run(commands["three"])["steps"]
    builds.clear()
    stopped = builds.run(commands["three"], step % steps, signal="SIGSTOP")
    before = contents(builds.output.parent)
    for overwrite in (False, True):
        answer = builds.run(replace(commands["four"], overwrite=overwrite))
        assert answer["outcome"] == "refused" and "another process is building this corpus" in answer["message"]
        assert contents(builds.output.parent) == before
    assert builds.go_on(stopped)["outcome"] == "built"
    assert contents(builds.output) == expected and not staging_folder(builds.output).exists()


def test_what_appears_at_the_output_during_a_build_is_not_replaced(builds, commands):
    builds.clear()
    stopped = builds.run(commands["three"], 30, signal="SIGSTOP")
    builds.output.mkdir()
    (builds.output / "thesis.txt").write_text("precious")
    answer = builds.go_on(stopped)
    assert answer["outcome"] == "refused" and "exists already" in answer["message"]
    assert contents(builds.output) == {"thesis.txt": b"precious"}
    shutil.rmtree(builds.output)
    assert builds.run(commands["three"])["outcome"] == "built"  # what was finished is kept
