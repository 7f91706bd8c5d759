"""Writes that leave either the old state or the new one, never a mix, whenever they fail or are killed.

Everything is written under a hidden temporary name beside its target, flushed to the disk, and renamed.
"""

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a new binary file that becomes `path` when the block ends without an exception.

    To replace several files together, open them in one `with`, write all, and call `flush_to_disk` on each before the block ends:
    whatever can fail has then failed before the first rename.
    """
    path = Path(path)
    _require_folder(path.parent)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file name to write to")
    temporary = _temporary_name(path)
    try:
        # Not `tempfile`: its files are private to the user, ours follow the umask like any other file.
        with open(temporary, "x+b") as file:
            yield file
            flush_to_disk(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a new empty folder that becomes `path`, in place of a folder there, when the block ends without an exception."""
    path = Path(path)
    _require_folder(path.parent)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file, expected a folder name to write to")
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync_folder(Path(folder))
        if not path.exists():
            os.rename(temporary, path)
        elif not exchange_names(temporary, path):
            old = _temporary_name(path)  # not atomic, but only outside Linux and where the file system has no exchange
            os.rename(path, old)
            os.rename(temporary, path)
            os.rename(old, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # what was at `path` before, if anything


def flush_to_disk(file: BinaryIO) -> None:
    """Return only when the bytes written so far are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder to write into; create it first")


def _sync_folder(folder: Path) -> None:
    # A rename is part of the folder's own data. Not every system lets a folder be opened; the rename itself is done.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def exchange_names(first: Path, second: Path) -> bool:
    """Swap two names in one step. False where the system or its file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
