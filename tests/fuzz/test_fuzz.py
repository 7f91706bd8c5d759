"""A few hundred damaged files of every format; `make fuzz` reads them for minutes."""

import json
import os
import signal
import stat
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import runner
from tests.fuzz.formats import Format
from tests.fuzz.mutations import ANY, damage, json_value, number_in_text, pickle_opcodes, safetensors_header, zip_member
from tests.fuzz.runner import Finding, fuzz


def test_damaged_files_are_refused_in_one_way_or_read(tmp_path):
    count, findings = fuzz(tmp_path, seed=0, minutes=10, count=600)
    assert findings == []
    assert count == 600


@pytest.mark.parametrize("mutation", [*ANY, json_value, number_in_text, pickle_opcodes, safetensors_header, zip_member])
def test_a_seed_names_a_damaged_file_for_good(mutation):
    content = b'{"a": [1, 2, {"b": "text"}], "c": 1.5}\n' * 5
    files = [damage(content, [content], Random("1 7"), [mutation]) for _ in range(2)]
    assert files[0] == files[1]


def outcome(tmp_path, read, allowed=()):
    signal.signal(signal.SIGPROF, runner._hang)
    return runner._outcome(Format((tmp_path,), read, (), allowed=allowed), tmp_path)


def test_only_the_allowed_exceptions_are_no_findings(tmp_path):
    def raises(error):
        def read(path):
            raise error

        return read

    for error in (ValueError("x"), UnicodeDecodeError("utf-8", b"", 0, 0, "x"), FileNotFoundError("x")):
        assert outcome(tmp_path, raises(error)) == ("", "")
    for error in (KeyError("x"), RecursionError("x"), OSError("x"), MemoryError("x"), AssertionError("x")):
        what, where = outcome(tmp_path, raises(error))
        assert what.startswith(f"{type(error).__name__}: ") and where.startswith("test_fuzz.py:")
        assert outcome(tmp_path, raises(error), (type(error),)) == ("", "")


def test_a_reader_that_does_not_end_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SECONDS", 0.05)

    def endless(path):
        while True:
            try:
                Path()
            except Exception:  # a hang is not one
                return

    assert outcome(tmp_path, endless)[0].startswith("Hang: ")


def test_a_crash_is_a_finding_with_its_file_and_the_run_goes_on(tmp_path, monkeypatch):
    """In place of the interpreter stands a script that crashes on case 3 and then does the rest."""
    script = tmp_path / "child"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, signal, sys\n"
        "option = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        "folder = pathlib.Path(option('--folder'))\n"
        "(folder / 'progress').write_text('3 FLAME' if option('--start') == '0' else option('--stop') + ' ')\n"
        "(folder / 'current').write_bytes(b'damaged')\n"
        "option('--start') == '0' and os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", os.fspath(script))
    count, findings = fuzz(tmp_path, seed=5, minutes=1, count=10)
    assert count == 10
    assert findings == [Finding(5, 3, "FLAME", "crash (status -11)", "", str(tmp_path / "findings" / "5-3"))]
    assert Path(findings[0].file).read_bytes() == b"damaged"


def test_what_a_foreign_package_raises_from_its_own_lines_is_not_ours(tmp_path):
    signal.signal(signal.SIGPROF, runner._hang)

    def read(path):
        return json.loads(5)  # a TypeError of the package json

    assert runner._outcome(Format((tmp_path,), read, (), foreign="json"), tmp_path) == ("", "")
    assert runner._outcome(Format((tmp_path,), read, (), foreign="transformers"), tmp_path)[0].startswith("TypeError")
