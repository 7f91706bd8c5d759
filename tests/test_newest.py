"""The run on the newest releases: when it fails, when it warns, and what it says."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT

TESTED = {"torch": "2.15", "transformers": "5.24"}


@pytest.fixture
def newest(monkeypatch, tmp_path):
    """The script as a module, with an environment that is not there."""
    spec = importlib.util.spec_from_file_location("newest", ROOT / ".ci" / "newest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / "venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / "venv" / "bin" / "python")
    return module


def run(newest, monkeypatch, tmp_path, capsys, passed: bool, **versions: str) -> tuple[int, str, str]:
    """Exit status, everything printed and the line for CI, with these releases installed."""
    monkeypatch.setattr(newest, "tested_versions", lambda: TESTED)
    monkeypatch.setattr(newest, "install", lambda packages: None)
    monkeypatch.setattr(newest, "installed_versions", lambda packages: versions)
    monkeypatch.setattr(
        newest, "run_tests", lambda: (passed, "9 passed in 1.00s" if passed else "1 failed, 8 passed in 1.00s")
    )
    status = newest.main(tmp_path / "line")
    return status, capsys.readouterr().out, (tmp_path / "line").read_text()


def test_releases_that_were_tested_must_pass(newest, monkeypatch, tmp_path, capsys):
    status, out, line = run(newest, monkeypatch, tmp_path, capsys, False, torch="2.15.3+cpu", transformers="5.24.1")
    assert status == 1 and line.startswith("FAILED") and "1 failed, 8 passed" in line and "!!! FAILED" in out
    status, out, line = run(newest, monkeypatch, tmp_path, capsys, True, torch="2.9.0", transformers="5.24.1")
    assert status == 0 and "!!!" not in out and "9 passed" in line and "transformers 5.24.1" in line


def test_newer_releases_that_break_it_are_a_warning_that_names_them(newest, monkeypatch, tmp_path, capsys):
    status, out, line = run(newest, monkeypatch, tmp_path, capsys, False, torch="2.15.0", transformers="5.100.0.dev0")
    assert status == 0 and line.startswith("WARNING: BROKEN ON THE NEWEST RELEASES")
    assert (
        "!!! The tests fail on releases newer than any that was tested: transformers 5.100.0.dev0 (tested: 5.24)."
        in out
    )


def test_newer_releases_that_pass_ask_for_a_higher_bound(newest, monkeypatch, tmp_path, capsys):
    status, out, line = run(newest, monkeypatch, tmp_path, capsys, True, torch="3.0.0", transformers="5.24.0")
    assert status == 0 and "pass" in line and "!!! Raise [tool.newest]" in out and "torch 3.0.0" in out


def test_no_network_and_no_space_are_a_warning_and_leave_nothing(newest, monkeypatch, tmp_path, capsys):
    def no_network(command, **options):
        newest.VENV.mkdir(exist_ok=True)
        failed = "pip" in command
        return subprocess.CompletedProcess(command, int(failed), stderr="trying again\nERROR: no such host\n")

    monkeypatch.setattr(newest.subprocess, "run", no_network)
    assert newest.main(tmp_path / "line") == 0
    out = capsys.readouterr().out
    assert "!!! WARNING: NOT TESTED ON THE NEWEST RELEASES" in out and out.count("ERROR: no such host") == 1
    assert not newest.VENV.exists() and "NOT TESTED" in (tmp_path / "line").read_text()
    monkeypatch.setattr(newest.shutil, "disk_usage", lambda path: SimpleNamespace(free=3e9))
    assert newest.main() == 0
    assert "!!! 3.0 GB free" in capsys.readouterr().out


def test_pytests_counts_are_found_and_only_marked_tests_run(newest, monkeypatch, capsys):
    started = []

    class Process:
        stdout = ["..F\n", "====== 1 failed, 2 passed in 0.10s ======\n", "\n"]

        def __init__(self, command, **options):
            started.extend(command)

        def wait(self):
            return 1

    monkeypatch.setattr(newest.subprocess, "Popen", Process)
    assert newest.run_tests() == (False, "1 failed, 2 passed in 0.10s") and "..F" in capsys.readouterr().out
    files = [Path(word) for word in started if word.endswith(".py")]
    assert (
        ROOT / "tests" / "modeling" / "pointillist" / "test_modeling_compatibility.py" in files
        and ROOT / "tests" / "conftest.py" not in files
    )
    assert 1 < len(files) < 20


def test_the_bound_on_transformers_is_what_was_tested(newest):
    with open(ROOT / "pyproject.toml", "rb") as file:
        (bound,) = [one for one in tomllib.load(file)["project"]["dependencies"] if one.startswith("transformers")]
    major, minor = map(int, newest.tested_versions()["transformers"].split("."))
    assert re.fullmatch(rf"transformers>=[\d.]+,<{major}\.{minor + 1}", bound)
