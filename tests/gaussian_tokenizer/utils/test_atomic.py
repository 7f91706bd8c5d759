"""What a save leaves behind when it succeeds, when it fails, and when the disk fills."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from gaussian_tokenizer.utils import atomic
from gaussian_tokenizer.utils.atomic import atomic_file, atomic_folder, flush_to_disk


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_appears_whole_and_follows_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a.bin") as file:
            file.write(b"new")
            assert not (tmp_path / "a.bin").exists()
    finally:
        os.umask(previous)
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["a.bin"]


def test_an_exception_leaves_the_old_file_and_no_temporary(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.bin") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_disk_that_refuses_to_sync_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_while_writing_leaves_the_old_file_and_no_temporary(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    # A file size limit fails the write itself, in the kernel, as a full disk does.
    script = f"""
        import resource, signal
        from gaussian_tokenizer.utils.atomic import atomic_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with atomic_file({str(tmp_path / "a.bin")!r}) as file:
            for _ in range(1000):
                file.write(b"x" * 1000)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.returncode != 0 and "File too large" in result.stderr
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    script = f"""
        import os, signal
        from gaussian_tokenizer.utils.atomic import atomic_file, flush_to_disk
        with atomic_file({str(tmp_path / "a.bin")!r}) as file:
            file.write(b"new")
            flush_to_disk(file)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -9
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_files_written_together_are_all_old_if_one_of_them_fails(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").write_bytes(b"old")
    with (
        pytest.raises(OSError, match="full"),
        atomic_file(tmp_path / "a") as a,
        atomic_file(tmp_path / "b") as b,
    ):
        a.write(b"new")
        b.write(b"new")
        flush_to_disk(a)
        raise OSError("full")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"old"
    assert names(tmp_path) == ["a", "b"]


def test_a_file_in_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"), atomic_file(tmp_path / "nowhere" / "a"):
        pass


def test_a_new_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "corpus") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_bytes(b"1")
        assert not (tmp_path / "corpus").exists()
    assert (tmp_path / "corpus" / "deep" / "a").read_bytes() == b"1"
    assert names(tmp_path) == ["corpus"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(atomic, "exchange_names", lambda first, second: False)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "old").write_bytes(b"0")
    with atomic_folder(tmp_path / "corpus") as folder:
        (folder / "new").write_bytes(b"1")
        assert names(tmp_path / "corpus") == ["old"]
    assert names(tmp_path / "corpus") == ["new"]
    assert names(tmp_path) == ["corpus"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_on_linux_two_names_are_exchanged_in_one_step(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "was_a").touch()
    if not atomic.exchange_names(tmp_path / "a", tmp_path / "b"):
        pytest.skip("the file system of the temporary folder cannot exchange names")
    assert names(tmp_path / "b") == ["was_a"] and names(tmp_path / "a") == []


def test_an_exception_leaves_the_old_folder_and_no_temporary(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "old").write_bytes(b"0")
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "corpus") as folder:
        (folder / "new").write_bytes(b"1")
        raise OSError("full")
    assert names(tmp_path / "corpus") == ["old"]
    assert names(tmp_path) == ["corpus"]
