"""Files: one kind of error, writing that either happens or does not, and reading with an upper bound."""

from __future__ import annotations

import bz2
import gzip
import math
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LARGEST_TEXT = 2**30  # [byte] of text after decompression; the largest structures of the PDB have 0.3 GiB

_CHUNK = 2**20
_MAGIC = ((b"\x1f\x8b\x08", gzip.open), (b"BZh", bz2.open))


class FormatError(ValueError):
    """A file is not what it should be.

    Parameters
    ----------
    path : str or path
        The file.
    field : str
        Which part of it: a line, a column, a header entry.
    expected, got : str
        What should stand there and what does; the middle of a text beyond 1000 characters is left out.
    advice : str
        What to do.

    Attributes
    ----------
    path : Path
    field : str
    """

    def __init__(self, path: str | Path, field: str, expected: str, got: str, advice: str = "") -> None:
        self.path, self.field = Path(path), field
        expected, got = _shortened(expected), _shortened(got)
        self._parts = (path, field, expected, got, advice)
        super().__init__(f"{path}: {field}: expected {expected}, got {got}." + (f" {advice}" if advice else ""))

    def __reduce__(self):  # the exception must survive the way back from another process
        return type(self), self._parts


def _shortened(text: str) -> str:
    """`text`, which may be a line of a damaged file, of a length that a terminal can show."""
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}"


def existing_file(path: str | Path) -> Path:
    """`path` as a Path, if it is a file with something in it.

    Raises
    ------
    FormatError
        When it is missing, a folder, or empty.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(path, "file", "an existing file", "nothing of that name", "Check spelling and folder.")
    if not path.is_file():
        raise FormatError(path, "file", "a file", "a folder", "Name one file inside it.")
    if path.stat().st_size == 0:
        raise FormatError(path, "file", "content", "0 bytes", "Copy or download it again.")
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end it takes the place of `path` in one step.

    The temporary keeps the suffix. When the block raises, it is removed and whatever stood at `path` stays as it was.
    After a return the new content is on the disk, and so is the folder's entry for it.

    Parameters
    ----------
    path : str or path
        A symbolic link is followed, so the link stays and its target is replaced.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise FormatError(target, "file", "a file or nothing", "a folder of that name", "Choose another name.")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode())


def read_text(path: str | Path, largest: int = LARGEST_TEXT) -> str:
    """Text of a plain, .gz or .bz2 file of at most `largest` [byte]; what is not UTF-8 becomes a question mark.

    A byte order mark is left out.

    Raises
    ------
    FormatError
        When the file is missing, empty, damaged or larger than allowed.
    """
    path = existing_file(path)
    with open_bytes(path) as stream:
        raw = read_capped(stream, largest, path)
    return raw.decode("utf-8-sig", errors="replace")


def finite_number(path: Path, where: str, text: str, advice: str) -> float:
    """The number that a text file states, in a field `where`; FormatError with `advice` unless it is finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FormatError(path, where, "a finite number", repr(text[:40]), advice)
    return value


def is_compressed(path: Path) -> bool:
    """Whether the file begins like gzip or bzip2, whatever its name."""
    with path.open("rb") as stream:
        start = stream.read(3)
    return any(start.startswith(magic) for magic, _ in _MAGIC)


def open_bytes(path: Path) -> IO[bytes]:
    """Binary stream of the content, decompressed where the file begins like gzip or bzip2."""
    with path.open("rb") as stream:
        start = stream.read(3)
    for magic, opener in _MAGIC:
        if start.startswith(magic):
            return opener(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def read_capped(stream: IO[bytes], largest: int, path: Path) -> bytearray:
    """All bytes that are left in `stream`, but never more than `largest` [byte] in memory.

    Raises
    ------
    FormatError
        When there are more, or when the compressed stream is damaged.
    """
    content = bytearray()
    while chunk := read_exactly(stream, min(_CHUNK, largest + 1 - len(content)), path):
        content += chunk
        if len(content) > largest:
            raise FormatError(
                path, "size", f"at most {largest} bytes", "more", "If the file is to be trusted, cut it into parts."
            )
    return content


def read_exactly(stream: IO[bytes], n: int, path: Path) -> bytes:
    """Up to `n` bytes of `stream`, a damaged compressed stream reported as a FormatError."""
    try:
        return stream.read(n)
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(path, "compressed data", "a whole stream", str(error), "Copy it again.") from error


def sync(path: str | Path) -> None:
    """Have a file, or a folder's list of names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
