"""Folders that several processes write to: a lock while something is put in place, and folders made aside.

Locks are `flock`, so they end with the process that holds them, however it ends. A file system without them (some
Lustre) is written to without: two processes that replace the same thing there at the same moment may leave neither.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)
_ASIDE = re.compile(r"\.\w[\w.-]*\.[0-9a-f]{16}")
_TEMPORARY = re.compile(r"\.[\w-]+\.\d+-[0-9a-f]{8}\.tmp(\.\w+)?")  # of `atomic_write`


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While the block runs no other process is in one of the same folder.

    Raises
    ------
    OSError
        When the folder cannot be written to.
    """
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


@contextmanager
def made_aside(folder: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `folder`, locked, and removed at the end with all that is still in it."""
    while True:
        aside = folder / f".{name}.{secrets.token_hex(8)}"
        aside.mkdir()
        handle = _locked(aside)
        if handle is not None:
            break  # else a sweep came between
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove from `folder` what `made_aside` and `atomic_write` left in processes that are no more.

    To be called within `held`, and what `atomic_write` writes straight into the folder is to be written within `held`
    too.
    """
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
        elif _ASIDE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            handle = _locked(path, sure=True)
            if handle is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


def _locked(aside: Path, *, sure: bool = False) -> int | None:
    """Handle of the lock of a folder made aside; None when it is another's, or, to be `sure`, cannot be known."""
    path = aside / "lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    with suppress(OSError):
        ours = _lock(handle, wait=False)
        if (ours or (ours is None and not sure)) and path.stat().st_ino == os.fstat(handle).st_ino:
            return handle
    os.close(handle)
    return None


def _lock(handle: int, *, wait: bool) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True
