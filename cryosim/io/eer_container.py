"""Container of EER files: where in the file the camera frames lie, and what the file says about them.

Nothing here trusts the file: each size and offset is compared with the file's size before anything is allocated, and a
chain of directories that returns to itself, overlaps, or ends early is refused.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from cryosim.io.eer_codec import Bits, StreamError, decode, encode, largest_size, least_size, one_per_pixel
from cryosim.io.files import FormatError, existing_file

LARGEST_SIDE = 16384  # [px] of a sensor
LARGEST_TEXT = 2**20  # [byte] of XML; a Falcon's has some thousand

COMMON, NAMED_WIDTHS, OLD = 65001, 65002, 65000  # compressions: 7 + 2 + 2 bits, widths in tags, 8 bits of run
WIDTH, HEIGHT, BITS, COMPRESSION, OFFSETS, ROWS, SIZES = 256, 257, 258, 259, 273, 278, 279
ACQUISITION, FRAME, RUN_BITS, X_BITS, Y_BITS = 65001, 65002, 65007, 65008, 65009

_WHOLE = {3: "H", 4: "I", 16: "Q"}  # SHORT, LONG, LONG8
_UNDEFINED = 7
_MOST_ENTRIES = 256  # of a directory; a Falcon's has about fifteen
_DAMAGED = "The file is damaged or cut off: copy it again."


@dataclass(frozen=True)
class Layout:
    """Where things lie in a file.

    Attributes
    ----------
    path : Path
    shape : (int, int)
        (ny, nx) of the sensor.
    compression : int
    bits : Bits
    strips : list of tuples of (int, int)
        Of each camera frame, (offset, size) [byte] of its parts.
    metadata : dict
        Name and value of each item of the acquisition.
    """

    path: Path
    shape: tuple[int, int]
    compression: int
    bits: Bits
    strips: list[tuple[tuple[int, int], ...]]
    metadata: dict[str, str]


def read_layout(path: str | Path) -> Layout:
    """Layout of a file, all of its directories checked.

    Raises
    ------
    FormatError
        When the file is missing or anything but an EER file that is whole.
    """
    path = existing_file(path)
    with path.open("rb") as file:
        source = _Source(path, file)
        directories = list(_directories(source))
        if text := directories[0].get(ACQUISITION):
            metadata = _metadata(source, *text)
        else:
            metadata = {}
        leading = _is_integrated(source, directories[0])
        kinds, strips = set(), []
        for i, directory in enumerate(directories[leading:]):
            kind, parts = _frame(source, directory, f"frame {i}")
            kinds.add(kind)
            strips.append(parts)
            if len(kinds) > 1:
                got = " and ".join(f"{shape}, {compression}, {bits}" for shape, compression, bits in kinds)
                raise FormatError(path, f"frame {i}", "the shape and code of the frames before", got, _DAMAGED)
    if not strips:
        raise FormatError(path, "frames", "at least one camera frame", "an integrated image only", "Use the raw file.")
    _check_number(path, metadata, len(strips), leading)
    ((shape, compression, bits),) = kinds
    return Layout(path, shape, compression, bits, strips, metadata)


def decoded_frames(layout: Layout, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(pixel, sub_y, sub_x) as `decode` returns them, of one camera frame after the other.

    Raises
    ------
    FormatError
        When the bits of a frame do not make a frame.
    """
    n_pixels = layout.shape[0] * layout.shape[1]
    with layout.path.open("rb") as file:
        source = _Source(layout.path, file)
        for i in range(start, stop):
            data, left = bytearray(), largest_size(n_pixels, layout.bits)
            for offset, size in layout.strips[i]:
                data += source.read(offset, min(size, left), f"frame {i}: strip")
                left -= min(size, left)
            try:
                yield decode(bytes(data), n_pixels, layout.bits)
            except StreamError as error:
                expected, got = str(error).removeprefix("expected ").split(", got ")
                raise FormatError(layout.path, f"frame {i}", expected, got, _DAMAGED) from error


def xml_text(entries: Mapping[str, tuple[object, str]]) -> bytes:
    """XML of items, each name with its value and unit.

    Raises
    ------
    ValueError
        When XML cannot hold a name or a value.
    """
    lines = []
    for name, (value, unit) in entries.items():
        of = f" unit={quoteattr(unit)}" if unit else ""
        lines.append(f"<item name={quoteattr(name)}{of}>{escape(str(value))}</item>")
    text = ("<metadata>\n" + "\n".join(lines) + "\n</metadata>\n").encode()
    try:
        same = _items(text) == {name: str(value) for name, (value, _) in entries.items()}
    except ElementTree.ParseError:
        same = False
    if not same or len(text) > LARGEST_TEXT:
        raise ValueError(
            f"metadata: expected names and values that XML of {LARGEST_TEXT} bytes can hold, got others. "
            "Leave out control characters, and write long tables to a file of their own."
        )
    return text


class Writer:
    """Frames one after the other, each a directory with its text and its bits; the acquisition's text comes last."""

    def __init__(self, file: BinaryIO, ny: int, nx: int) -> None:
        self.file, self.ny, self.nx, self.bits = file, ny, nx, Bits()
        self.n_frames = self.n_events = self.n_merged = 0
        self.place = 16  # [byte] of the next directory
        self.next_at = 8  # [byte] of the last pointer to a next directory
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, self.place))

    def add(self, keys: np.ndarray) -> None:
        kept = one_per_pixel(keys, self.bits)
        stream = encode(kept, self.ny * self.nx, self.bits)
        dose = len(kept) / (self.ny * self.nx)
        entries = {"frameID": (self.n_frames, ""), "dose": (dose, "e/pixel"), "pixelFormat": ("EerEncoding", "")}
        entries |= {"rleCodeLength": (self.bits.run, ""), "nrOfSubPixelPerDirection": (2**self.bits.x, "")}
        text = xml_text(entries)
        tags = [(WIDTH, 4, 1, self.nx), (HEIGHT, 4, 1, self.ny), (BITS, 3, 1, 1)]
        tags += [(COMPRESSION, 3, 1, COMMON), (262, 3, 1, 1)]  # 0 is black
        tags += [(OFFSETS, 16, 1, 0), (277, 3, 1, 1), (ROWS, 4, 1, self.ny)]
        tags += [(SIZES, 16, 1, len(stream))]
        if not self.n_frames:
            self.acquisition_at = self.place + 8 + 20 * len(tags)
            tags += [(ACQUISITION, 7, 0, 0)]
        tags += [(FRAME, 7, len(text), self.place + _padded(16 + 20 * (len(tags) + 1)))]
        start = tags[-1][3] + _padded(len(text))  # of the bits
        tags[5] = (OFFSETS, 16, 1, start)
        directory = struct.pack("<Q", len(tags)) + b"".join(struct.pack("<HHQQ", *tag) for tag in tags)
        self.next_at, self.place = self.place + len(directory), start + len(stream)
        directory += struct.pack("<Q", self.place)
        for content in (directory, text, stream):
            self.file.write(content.ljust(_padded(len(content)), b"\0"))
        self.n_frames += 1
        self.n_events += len(kept)
        self.n_merged += len(keys) - len(kept)

    def finish(self, text: bytes) -> None:
        self.file.write(text)
        self.file.seek(self.acquisition_at + 4)
        self.file.write(struct.pack("<QQ", len(text), self.place))
        self.file.seek(self.next_at)
        self.file.write(struct.pack("<Q", 0))


def _padded(size: int) -> int:
    return -(-size // 8) * 8


class _Source:
    """A file that is read only where it has bytes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.claimed = 0

    def read(self, offset: int, size: int, what: str) -> bytes:
        if offset + size > self.size:
            got = f"{size} bytes from byte {offset} on"
            raise FormatError(self.path, what, f"a place within the {self.size} bytes of the file", got, _DAMAGED)
        self.file.seek(offset)
        content = self.file.read(size)
        if len(content) < size:
            raise FormatError(self.path, what, f"{size} bytes", f"{len(content)}", "The file changed: read it again.")
        return content

    def claim(self, size: int, what: str) -> None:
        """Count bytes as taken: were many parts in one place, a small file would need much memory."""
        self.claimed += size
        if self.claimed > self.size:
            raise FormatError(self.path, what, "parts that do not overlap", "some that do", _DAMAGED)


_Directory = dict[int, tuple[int, int, bytes]]  # tag -> type, count, value or offset


def _directories(source: _Source) -> Iterator[_Directory]:
    start = source.read(0, min(16, source.size), "header")
    if start[:4] != b"II\x2b\x00" or len(start) < 16 or start[4:8] != b"\x08\x00\x00\x00":
        raise FormatError(
            source.path, "header", "a little-endian BigTIFF (II, 43, 8)", repr(start[:8]), "This is not an EER file."
        )
    (offset,) = struct.unpack_from("<Q", start, 8)
    seen: set[int] = set()
    while offset or not seen:
        what = f"directory {len(seen)}"
        if offset in seen:
            raise FormatError(source.path, what, "a new directory", f"the one at byte {offset} again", _DAMAGED)
        seen.add(offset)
        (n,) = struct.unpack("<Q", source.read(offset, 8, what))
        if not 1 <= n <= _MOST_ENTRIES:
            raise FormatError(source.path, what, f"1 to {_MOST_ENTRIES} entries", f"{n}", _DAMAGED)
        content = source.read(offset + 8, 20 * n + 8, what)
        source.claim(8 + len(content), what)
        entries = list(struct.iter_unpack("<HHQ8s", content[:-8]))
        if len({entry[0] for entry in entries}) < n:
            raise FormatError(source.path, what, "each tag once", "a tag again", _DAMAGED)
        yield {tag: (kind, count, value) for tag, kind, count, value in entries}
        (offset,) = struct.unpack("<Q", content[-8:])


def _is_integrated(source: _Source, directory: _Directory) -> bool:
    """Whether the first image is the sum of the frames that follow, and no frame."""
    if _whole(source, directory, COMPRESSION, "image 0") != 1:
        return False
    n_bits = _whole(source, directory, BITS, "image 0")
    if n_bits < 8:
        raise FormatError(source.path, "image 0", "8 or more bits a pixel", f"{n_bits}", _DAMAGED)
    return True


def _frame(source: _Source, directory: _Directory, what: str) -> tuple[tuple, tuple[tuple[int, int], ...]]:
    """((shape, compression, bits), strips) of one camera frame."""
    nx, ny = (_whole(source, directory, tag, what) for tag in (WIDTH, HEIGHT))
    if not (1 <= nx <= LARGEST_SIDE and 1 <= ny <= LARGEST_SIDE):
        raise FormatError(source.path, f"{what}: width, height", f"1 to {LARGEST_SIDE}", f"{nx}, {ny}", _DAMAGED)
    compression = _whole(source, directory, COMPRESSION, what)
    if compression == OLD:
        raise FormatError(
            source.path,
            f"{what}: compression",
            f"{COMMON} or {NAMED_WIDTHS}",
            f"{OLD}, which readers understand differently",
            "Convert the movie, e.g. with relion_convert_to_tiff.",
        )
    if compression not in (COMMON, NAMED_WIDTHS):
        raise FormatError(
            source.path,
            f"{what}: compression",
            f"{COMMON} or {NAMED_WIDTHS}",
            f"{compression}",
            "This is not an EER file.",
        )
    bits = Bits() if compression == COMMON else _named_widths(source, directory, what)
    offsets, sizes = (_numbers(source, directory, tag, what, ny) for tag in (OFFSETS, SIZES))
    if len(offsets) != len(sizes):
        raise FormatError(
            source.path, f"{what}: strips", "as many offsets as sizes", f"{len(offsets)}, {len(sizes)}", _DAMAGED
        )
    for offset, size in zip(offsets, sizes, strict=True):
        if offset + size > source.size:
            got = f"{size} bytes from byte {offset} on"
            raise FormatError(source.path, f"{what}: strip", f"within {source.size} bytes", got, _DAMAGED)
    source.claim(sum(sizes), f"{what}: strip")
    least = least_size(nx * ny, bits)
    if sum(sizes) < least:
        raise FormatError(
            source.path, f"{what}: strip", f"at least {least} bytes for {ny} x {nx}", f"{sum(sizes)}", _DAMAGED
        )
    return ((ny, nx), compression, bits), tuple(zip(offsets, sizes, strict=True))


def _named_widths(source: _Source, directory: _Directory, what: str) -> Bits:
    run, x = (_whole(source, directory, tag, what) for tag in (RUN_BITS, X_BITS))
    y = _whole(source, directory, Y_BITS, what) if Y_BITS in directory else x  # early files name one for both
    try:
        return Bits(run, x, y)
    except StreamError as error:
        expected, got = str(error).removeprefix("expected ").split(", got ")
        tags = f"{what}: tags {RUN_BITS} to {Y_BITS}"
        raise FormatError(source.path, tags, expected, got, _DAMAGED) from error


def _whole(source: _Source, directory: _Directory, tag: int, what: str) -> int:
    return _numbers(source, directory, tag, what, 1)[0]


def _numbers(source: _Source, directory: _Directory, tag: int, what: str, most: int) -> tuple[int, ...]:
    """Whole numbers of a tag, at most `most` of them."""
    what = f"{what}: tag {tag}"
    if tag not in directory:
        raise FormatError(source.path, what, "an entry", "none", "This is not an EER file, or it is damaged.")
    kind, count, value = directory[tag]
    if kind not in _WHOLE:
        raise FormatError(source.path, what, "type SHORT, LONG or LONG8", f"type {kind}", _DAMAGED)
    if not 1 <= count <= most:
        raise FormatError(source.path, what, f"1 to {most} numbers", f"{count}", _DAMAGED)
    size = struct.calcsize("<" + _WHOLE[kind]) * count
    if size > 8:
        value = source.read(*struct.unpack("<Q", value), size, what)
        source.claim(size, what)
    return struct.unpack(f"<{count}{_WHOLE[kind]}", value[:size])


def _metadata(source: _Source, kind: int, size: int, value: bytes) -> dict[str, str]:
    what = f"acquisition metadata (tag {ACQUISITION})"
    if kind != _UNDEFINED:
        raise FormatError(source.path, what, "type UNDEFINED", f"type {kind}", _DAMAGED)
    if size > LARGEST_TEXT:
        raise FormatError(source.path, what, f"at most {LARGEST_TEXT} bytes", f"{size}", _DAMAGED)
    text = value[:size] if size <= 8 else source.read(*struct.unpack("<Q", value), size, what)
    if not text.startswith(b"<metadata>"):  # no prolog, so no encoding but UTF-8 and no entities of its own
        raise FormatError(source.path, what, "<metadata> at its start", repr(text[:16]), _DAMAGED)
    try:
        return _items(text)
    except ElementTree.ParseError as error:
        raise FormatError(source.path, what, "XML", str(error), _DAMAGED) from error


def _items(text: bytes) -> dict[str, str]:
    root = ElementTree.fromstring(text.rstrip(b"\0 \t\r\n"))
    return {item.get("name", ""): item.text or "" for item in root.findall("item")}


def _check_number(path: Path, metadata: Mapping[str, str], n: int, leading: bool) -> None:
    """A chain of directories that lost its end is a whole chain, so what the camera counted is compared."""
    told = metadata.get("numberOfFrames", str(n))
    if told.strip() not in (str(n), str(n + leading)):
        raise FormatError(path, "frames", f"{told!r} (item numberOfFrames)", f"{n}", _DAMAGED)
