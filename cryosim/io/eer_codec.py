"""Bit stream of one EER frame: sorted events to bytes and back, in NumPy.

Pixels are visited row by row. An event is the number of empty pixels since the one before it (`run` bits), then where
in its pixel it lies along x and along y, all least significant bit first. The largest run is no event: it means that
many empty pixels, and no sub-pixel bits follow it. After the last event comes the number of pixels that are left, so
the count of pixels ends at that of the frame. A place in the pixel is stored from its middle, as a two's complement.

Source: "EER file format", Thermo Fisher Scientific, version 3.0 (2023), as read by RELION's renderEER.cpp (Nakane et
al. 2020, DOI 10.1038/s41586-020-2829-0) and imagecodecs' eer.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_RUN_BITS, LARGEST_SUB_BITS = 16, 4

_CHUNK = 2**16  # [byte] decoded in one piece: its arrays fit a cache
_LARGEST_PADDING = 16  # [byte] after the end of the frame that may hold anything
_SPARE = 4  # [byte] read beyond a chunk, as many as the widest code and its shift


class StreamError(ValueError):
    """A bit stream is not that of a frame; the message reads "expected ..., got ..."."""


@dataclass(frozen=True)
class Bits:
    """Widths [bit] of the fields of a code: the run of empty pixels, and the places along x and y in the pixel."""

    run: int = 7
    x: int = 2
    y: int = 2

    def __post_init__(self) -> None:
        if not (1 <= self.run <= LARGEST_RUN_BITS and all(0 <= n <= LARGEST_SUB_BITS for n in (self.x, self.y))):
            raise StreamError(
                f"expected widths of 1 to {LARGEST_RUN_BITS} (run) and 0 to {LARGEST_SUB_BITS} (x, y) bits, "
                f"got {self.run}, {self.x}, {self.y}"
            )

    @property
    def sub(self) -> int:
        """Of both places together."""
        return self.x + self.y

    @property
    def event(self) -> int:
        """Of an event."""
        return self.run + self.sub

    @property
    def skip(self) -> int:
        """Pixels that a code without an event passes over."""
        return 2**self.run - 1

    @property
    def flips(self) -> int:
        """What changes places counted from the pixel's edge to places counted from its middle."""
        return ((1 << self.x) >> 1) | ((1 << self.y) >> 1) << self.x


def one_per_pixel(keys: np.ndarray, bits: Bits) -> np.ndarray:
    """Sorted keys with one event a pixel, as many as a frame can hold.

    Which of several is kept depends on the pixel alone, evenly, so that no side of the pixel is preferred and the
    order of the events does not matter.

    Parameters
    ----------
    keys : array (event,)
        Whole numbers, ``pixel << bits.sub | sub_y << bits.x | sub_x``.
    bits : Bits

    Returns
    -------
    array (event,)
    """
    keys = np.sort(keys)
    pixels = keys >> bits.sub
    is_first = np.ones(len(keys), bool)
    np.not_equal(pixels[1:], pixels[:-1], out=is_first[1:])
    if is_first.all():
        return keys
    first = np.flatnonzero(is_first)
    several = np.diff(first, append=len(keys))
    scattered = (pixels[first].astype(np.uint64) * np.uint64(2654435761)) >> np.uint64(16)  # Knuth's hash
    return keys[first + (scattered % several.astype(np.uint64)).astype(np.int64)]


def encode(keys: np.ndarray, n_pixels: int, bits: Bits) -> bytes:
    """Bit stream of the events of one frame.

    Parameters
    ----------
    keys : array (event,)
        As `one_per_pixel` returns them: ascending, each pixel once, all below `n_pixels`.
    n_pixels : int
    bits : Bits

    Returns
    -------
    bytes
        A multiple of 8, with at least one bit more than an event has left at the end: readers look ahead.
    """
    pixels = np.append(keys >> bits.sub, n_pixels).astype(np.int64)  # the end of the frame is coded like an event
    runs = np.diff(pixels, prepend=-1) - 1
    skips = runs // bits.skip
    runs -= skips * bits.skip
    n_skips = int(skips.sum())
    n_bits = bits.event * len(keys) + bits.run * (n_skips + 1)
    words = np.zeros(-(-(n_bits + bits.event + 1) // 64), "<u8")

    skips_before = np.cumsum(skips)  # of each event
    places = np.arange(len(pixels)) * bits.event + skips_before * bits.run
    codes = runs.astype(np.uint64)
    fields = (keys & (2**bits.sub - 1)) ^ bits.flips
    codes[:-1] |= fields.astype(np.uint64) << np.uint64(bits.run)
    _deposit(words, places, codes)
    if n_skips:
        events_before = np.repeat(np.arange(len(pixels)), skips)  # of each skip
        skip_places = events_before * bits.event + np.arange(n_skips) * bits.run
        _deposit(words, skip_places, np.full(n_skips, bits.skip, np.uint64))
    return words.tobytes()


def _deposit(words: np.ndarray, places: np.ndarray, codes: np.ndarray) -> None:
    """Or each code into the bits that begin at its place; places ascend and codes do not overlap."""
    word = places >> 6
    shift = (places & 63).astype(np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))  # code of each word
    words[word[first]] |= np.bitwise_or.reduceat(codes << shift, first)
    last = np.append(first[1:], len(word)) - 1  # only a word's last code may reach into the next word
    last = last[shift[last] > 0]
    over = codes[last] >> (np.uint64(64) - shift[last])
    reaches = over > 0
    words[word[last[reaches]] + 1] |= over[reaches]


def least_size(n_pixels: int, bits: Bits) -> int:
    """Smallest possible stream [byte] of a frame: one without events."""
    return n_pixels // bits.skip * bits.run // 8


def largest_size(n_pixels: int, bits: Bits) -> int:
    """Largest possible stream [byte] of a frame, padding apart; what lies behind it is never read."""
    return (n_pixels * bits.event + (n_pixels // bits.skip + 1) * bits.run) // 8 + 8


def decode(data: bytes, n_pixels: int, bits: Bits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events of the bit stream of one frame.

    Parameters
    ----------
    data : bytes
        Some bytes of padding may follow the frame's end.
    n_pixels : int
    bits : Bits

    Returns
    -------
    pixels : array (event,) int64
        Ascending.
    sub_y, sub_x : array (event,) int64
        Place in the pixel, from 0 to below 2^bits.y and 2^bits.x.

    Raises
    ------
    StreamError
        When the count of pixels does not end at `n_pixels`, or codes follow.
    """
    n_bits = 8 * len(data)
    padded = np.zeros(len(data) + _CHUNK + 2 * _SPARE, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    pixels, fields, places = [], [], np.zeros(0, np.int64)
    count, start, place = 0, 0, 0  # pixels passed, first bit of the next code in its chunk, chunk's first byte
    end = n_bits - bits.run + 1  # no code begins here or later
    while count <= n_pixels and 8 * place + start < end:
        chunk = padded[place : place + _CHUNK + 2 * _SPARE]
        found, codes, places, count, start = _decode_chunk(chunk, start, min(8 * _CHUNK, end - 8 * place), count, bits)
        pixels.append(found)
        fields.append(codes)
        place, start = place + _CHUNK, start - 8 * _CHUNK
    pixel = np.concatenate(pixels) if pixels else np.zeros(0, np.int64)
    field = np.concatenate(fields) if fields else np.zeros(0, np.int64)
    kept = int(np.searchsorted(pixel, n_pixels))
    is_closed = kept < len(pixel)  # otherwise there is no room for the number of pixels left, which has to be 0
    if (reached := int(pixel[kept]) if is_closed else count) != n_pixels:
        raise StreamError(f"expected a count of pixels that ends at {n_pixels}, got {reached}")
    if is_closed:
        closing = 8 * (place - _CHUNK) + int(places[kept - len(pixel)])
        if padded[(closing + bits.run) // 8 + _LARGEST_PADDING :].any():
            raise StreamError("expected nothing after the last pixel, got more codes")
    elif kept and 8 * place + start > n_bits:
        raise StreamError(f"expected an event of {bits.event} bits at the end, got fewer")
    field = field[:kept] ^ bits.flips
    return pixel[:kept], field >> bits.x, field & (2**bits.x - 1)


def _decode_chunk(
    chunk: np.ndarray, start: int, end: int, count: int, bits: Bits
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Codes of which the first begins at bit `start` and none at or after `end`.

    Between skips events follow each other at equal distances. So event i lies at ``start + i * event + s * run``, where
    s skips come before it, and all that has to be found one after the other are the skips.

    Returns
    -------
    pixels, fields, places : array (event,)
    count : int
        Pixels passed.
    start : int
        Where the next code begins.
    """
    skips = _skips(chunk, start, end, bits)
    before = (skips - start - np.arange(len(skips)) * bits.run) // bits.event  # events before each skip
    behind = start if not len(skips) else int(skips[-1]) + bits.run  # first bit after the last skip
    n_last = max(0, -(-(end - behind) // bits.event))  # events after it
    n_events = (int(before[-1]) if len(skips) else 0) + n_last
    skips_before = np.repeat(np.arange(len(skips) + 1), np.diff(before, prepend=0, append=n_events))
    places = start + np.arange(n_events) * bits.event + skips_before * bits.run
    words = np.ndarray(len(chunk) - 3, "<u4", chunk.tobytes(), strides=(1,))
    codes = (words[places >> 3] >> (places & 7).astype(np.uint32)).astype(np.int64)
    runs = codes & bits.skip
    pixels = np.cumsum(runs + 1) + (count - 1) + skips_before * bits.skip
    events = n_events + int(runs.sum())
    fields = (codes >> bits.run) & (2**bits.sub - 1)
    return pixels, fields, places, count + events + len(skips) * bits.skip, behind + n_last * bits.event


def _skips(chunk: np.ndarray, start: int, end: int, bits: Bits) -> np.ndarray:
    """Places of the skips from bit `start` to below `end`.

    A skip can only be where `run` ones stand in a row, and what follows in that row is skips too. Behind the last of
    them is an event, and the next skip that counts is the first possible one a whole number of events further on. So
    all are linked at once, and then the links are followed from the start. Only the first `event` places of a row of
    ones can be reached from outside.
    """
    ones = np.unpackbits(chunk, bitorder="little")[: end + bits.run - 1]
    ones[:start] = 0
    width = 1
    while width < bits.run:  # ones[i]: `width` ones from bit i on
        step = min(width, bits.run - width)
        ones = ones[:-step] & ones[step:]
        width += step
    places = np.flatnonzero(ones.view(bool))
    if not len(places):
        return places
    is_first = np.diff(places, prepend=-2) > 1
    first = np.flatnonzero(is_first)
    row = np.cumsum(is_first) - 1
    kept = places - places[first][row] < bits.event
    ends = places[np.append(first[1:], len(places)) - 1] + bits.run  # first zero after each row of ones
    places, row = places[kept], row[kept]

    shift = (8 * len(chunk)).bit_length()  # also of the number of skips in a row, so three numbers make one to sort by
    packed = np.sort(((places % bits.event << shift | places) << shift) | (ends[row] - places) // bits.run)
    keys, numbers = packed >> shift, packed & (1 << shift) - 1  # by the remainder, then by place
    places = keys & (1 << shift) - 1
    targets = np.append(places + numbers * bits.run, start)
    targets |= targets % bits.event << shift
    following = np.searchsorted(keys, targets)
    same = np.append(keys, -1)[following] >> shift == targets >> shift
    links = np.where(same, following, -1).tolist()
    chain, link = [], links[-1]
    while link >= 0:
        chain.append(link)
        link = links[link]
    followed = np.array(chain, dtype=np.int64)
    places, numbers = places[followed], numbers[followed]
    starts = np.cumsum(numbers) - numbers
    return np.repeat(places - starts * bits.run, numbers) + np.arange(int(numbers.sum())) * bits.run
