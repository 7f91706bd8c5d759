"""Locks: one holder at a time, and none on a file that is no longer there."""

import fcntl
import shutil
import subprocess
import sys

import pytest

from gaussian_tokenizer.utils import locks
from gaussian_tokenizer.utils.locks import exclusive


def test_a_lock_has_one_holder_and_is_free_after_it(tmp_path):
    path = tmp_path / "new folder" / "lock"
    for _ in range(2):
        with exclusive(path) as first, exclusive(path) as second:
            assert (first, second) == (True, False)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    words = (
        "import sys, pathlib\nfrom gaussian_tokenizer.utils.locks import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])) as mine:\n    print(mine, flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", words, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    with exclusive(tmp_path / "lock") as mine:
        assert not mine
    holder.kill()
    holder.communicate()
    with exclusive(tmp_path / "lock") as mine:
        assert mine


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_lock_that_its_holder_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch, what):
    path, removed = tmp_path / "folder" / "lock", []
    real = fcntl.flock

    def flock(file, operation):
        if not removed:  # the last holder, between our opening the file and our locking it
            removed.append(path.unlink() if what == "file" else shutil.rmtree(path.parent))
        real(file, operation)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with exclusive(path) as first:
        assert first and path.exists()
        monkeypatch.undo()
        with exclusive(path) as second:
            assert not second
