"""EER files put together by hand: those of another writer are read, and damaged ones are refused, not misread."""

import struct
import warnings

import numpy as np
import pytest
import tifffile
import torch

from cryosim.io.eer import eer_info, read_eer, render_eer, write_eer
from cryosim.io.eer_codec import Bits, encode, one_per_pixel
from cryosim.io.files import FormatError
from tests.io.test_eer import counts, random_events, rendered, same

USUAL = Bits()


@pytest.fixture(autouse=True)
def _small_sensors():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*read EER files of 4096")
        yield


def entry(tag, kind, count, value):
    return struct.pack("<HHQ", tag, kind, count) + (value if isinstance(value, bytes) else struct.pack("<Q", value))


def by_hand(path, streams, shape=(21, 18), compression=65001, extra=(), xml=None, leading=None, pieces=1):
    """One directory after all the strips: another order than ours."""
    body, tags = bytearray(16), []
    for stream in streams:
        parts = np.array_split(np.frombuffer(stream, np.uint8), pieces)
        offsets, sizes = [], []
        for part in parts:
            offsets.append(len(body))
            sizes.append(len(part))
            body += part.tobytes()
        if pieces > 1:
            at = len(body)
            body += struct.pack(f"<{2 * pieces}Q", *offsets, *sizes)
            offsets, sizes = [at], [at + 8 * pieces]
        found = [(256, 3, 1, shape[1]), (257, 4, 1, shape[0]), (258, 3, 1, 1), (259, 3, 1, compression)]
        found += [(262, 3, 1, 1), (273, 16, pieces, offsets[0]), (277, 3, 1, 1), (278, 3, 1, shape[0])]
        tags.append([*found, (279, 16, pieces, sizes[0]), *extra])
    if leading:
        tags.insert(
            0, [(256, 3, 1, 3), (257, 3, 1, 2), (258, 3, 1, 16), (259, 3, 1, 1), (273, 16, 1, 16), (279, 16, 1, 12)]
        )
    if xml is not None:
        tags[0] = sorted([*tags[0], (65001, 7, len(xml), len(body))])
        body += xml
    body[:16] = struct.pack("<2sHHHQ", b"II", 43, 8, 0, len(body))
    for i, found in enumerate(tags):
        after = len(body) + 16 + 20 * len(found)
        body += struct.pack("<Q", len(found)) + b"".join(entry(*tag) for tag in found)
        body += struct.pack("<Q", after if i + 1 < len(tags) else 0)
    path.write_bytes(body)
    return path


def stream_of(bits, seed=0, n=60, shape=(21, 18)):
    keys = one_per_pixel(np.random.default_rng(seed).integers(0, shape[0] * shape[1] << bits.sub, n), bits)
    return encode(keys, shape[0] * shape[1], bits)


@pytest.mark.parametrize(("x", "y"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_named_widths_of_another_writer(tmp_path, x, y, pieces):
    bits = Bits(7, x, y)
    widths = [(65007, 3, 1, 7), (65008, 3, 1, x), (65009, 3, 1, y)]
    xml = b"<metadata><item name='numberOfFrames'>2</item></metadata>"
    streams = [stream_of(bits, i) for i in range(2)]
    path = by_hand(tmp_path / "a.eer", streams, compression=65002, extra=widths, xml=xml, pieces=pieces)
    info = eer_info(path)
    assert (info.compression, info.bits, info.n_frames) == (65002, (7, x, y), 2)
    events = read_eer(path)
    for level in range(x + 1):
        assert np.array_equal(counts(events, 2**level), render_eer(path, 2**level, frames=1).numpy())
        if pieces == 1 and all((n << level) % 2**x == 0 for n in (21, 18)):
            assert np.array_equal(rendered(path, level), counts(events, 2**level))
    parts = events.y * 2**y
    assert torch.equal(parts - parts.floor(), torch.full_like(parts, 0.5))  # at the middle
    with pytest.raises(ValueError, match="supersampling: expected"):
        render_eer(path, 2 ** (x + 1))
    early = by_hand(tmp_path / "b.eer", streams, compression=65002, extra=widths[:2])
    assert same(read_eer(early), events)  # one width for both
    assert eer_info(early).metadata == {}


def test_a_leading_integrated_image_is_no_frame(tmp_path):
    streams = [stream_of(USUAL, i) for i in range(2)]
    for told in (2, 3):
        xml = f"<metadata><item name='numberOfFrames'>{told}</item></metadata>\0".encode()
        path = by_hand(tmp_path / "a.eer", streams, xml=xml, leading=True)
        assert eer_info(path).n_frames == 2
        assert len(read_eer(path)) == len(
            read_eer(by_hand(tmp_path / "b.eer", [stream_of(USUAL, i) for i in range(2)]))
        )


WIDTHS = [(65007, 3, 1, 7), (65008, 3, 1, 2), (65009, 3, 1, 2)]
GOOD = stream_of(USUAL)


def wide(tag, value, kind=3):
    return {"compression": 65002, "extra": [(tag, kind, 1, value) if tag == t[0] else t for t in WIDTHS]}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compression": 65000}, "65000, which readers understand differently.*Convert"),
        ({"compression": 5}, "65001 or 65002, got 5"),
        ({"compression": 65002}, "tag 65007: expected an entry, got none"),
        (wide(65007, 0), "tags 65007 to 65009: expected widths of 1 to 16"),
        (wide(65007, 60000), "expected widths"),
        (wide(65008, 5), "expected widths"),
        (wide(65009, 7, 2), "tag 65009: expected type SHORT, LONG or LONG8, got type 2"),
        (wide(65009, 7, 99), "got type 99"),
        ({"shape": (0, 18)}, "width, height"),
        ({"shape": (21, 0)}, "width, height"),
        ({"shape": (2**31, 60000)}, "width, height"),
        ({"shape": (16384, 16384)}, "frame 0: strip: expected at least 1849"),
        ({"shape": (22, 18)}, "frame 0: expected a count of pixels that ends at 396, got"),
        ({"shape": (20, 18)}, "frame 0: expected a count of pixels that ends at 360, got"),
        ({"streams": [b""]}, "frame 0: strip: expected at least"),
        ({"streams": [GOOD, GOOD[:20]]}, "frame 1: expected a count of pixels"),
        ({"streams": [b"\xff" * 200]}, "frame 0: expected a count of pixels"),
        ({"xml": b"<metadata><item></metadata>"}, "acquisition metadata.*expected XML"),
        ({"xml": b"<!DOCTYPE a><metadata/>"}, "<metadata> at its start"),
        ({"xml": b"<metadata><!DOCTYPE a [<!ENTITY b 'c'>]>&b;</metadata>"}, "expected XML"),
        ({"xml": b"<metadata>&b;</metadata>"}, "expected XML"),
        ({"xml": b"<metadata>" + b"<a>" * 100_000}, "expected XML"),
        ({"xml": b"<metadata>" + b" " * 2**20 + b"</metadata>"}, "at most 1048576 bytes"),
        ({"xml": b"<metadata>\xff</metadata>"}, "expected XML"),
        ({"xml": b"<metadata><item name='numberOfFrames'>4</item></metadata>"}, "'4' .item numberOfFrames., got 1"),
        ({"extra": [(65001, 2, 8, b"<metadat")]}, "expected type UNDEFINED, got type 2"),
        ({"extra": [(65001, 7, 2**60, 16)]}, "at most 1048576 bytes, got"),
        ({"extra": [(65001, 7, 2**19, 16)]}, "within the"),
        ({"extra": [(279, 16, 1, 5)]}, "each tag once"),
    ],
)
def test_damage_is_named(tmp_path, options, match):
    path = by_hand(tmp_path / "a.eer", **({"streams": [GOOD]} | options))
    with pytest.raises(FormatError, match=f"(?s)a.eer: .*{match}"):
        read_eer(path)


@pytest.fixture
def small(tmp_path, generator):
    path = tmp_path / "a.eer"
    write_eer(path, random_events(generator, 3, (21, 18)), pixel_size=1.5)
    return path


@pytest.mark.parametrize(
    ("offset", "kind", "value", "match"),
    [
        (0, "<H", 0x4D4D, "little-endian BigTIFF"),
        (2, "<H", 42, "little-endian BigTIFF"),
        (4, "<H", 16, "little-endian BigTIFF"),
        (8, "<Q", 0, "directory 0: expected 1 to 256 entries|directory 0"),
        (8, "<Q", 2**63, "directory 0: expected a place within"),
        (16, "<Q", 2**62, "1 to 256 entries"),
        (16, "<Q", 0, "1 to 256 entries"),
        (16 + 8 + 20 * 11, "<Q", 16, "directory 1: expected a new directory"),
        (16 + 8 + 20 * 11, "<Q", 2**64 - 1, "directory 1: expected a place within"),
        (16 + 8 + 20 * 11, "<Q", 0, "numberOfFrames"),
    ],
)
def test_broken_chains(small, offset, kind, value, match):
    content = bytearray(small.read_bytes())
    struct.pack_into(kind, content, offset, value)
    small.write_bytes(content)
    with pytest.raises(FormatError, match=match):
        read_eer(small)


@pytest.mark.parametrize(
    ("tag", "changes", "match"),
    [
        (273, {"value": 2**63}, "frame 0: strip: expected within"),
        (279, {"value": 2**40}, "frame 0: strip: expected within"),
        (273, {"count": 2**40}, "expected 1 to 21 numbers"),
        (279, {"count": 20}, "tag 279: expected a place within|as many offsets"),
        (273, {"kind": 5}, "got type 5"),
        (257, {"value": 22}, "frame 1: expected the shape and code of the frames before"),
        (259, {"value": 1}, "image 0: expected 8 or more bits a pixel, got 1"),
        (256, {"tag": 255}, "tag 256: expected an entry, got none"),
    ],
)
def test_broken_entries(small, tag, changes, match):
    content = bytearray(small.read_bytes())
    at = next(a for a in range(24, 24 + 20 * 12, 20) if struct.unpack_from("<H", content, a)[0] == tag)
    fields = dict(zip(("tag", "kind", "count", "value"), struct.unpack_from("<HHQQ", content, at), strict=True))
    struct.pack_into("<HHQQ", content, at, *(fields | changes).values())
    small.write_bytes(content)
    with pytest.raises(FormatError, match=match):
        read_eer(small)


def test_directories_and_strips_that_overlap(tmp_path):
    path = by_hand(tmp_path / "a.eer", [GOOD] * 3)
    content = bytearray(path.read_bytes())
    first = content.index(struct.pack("<HHQQ", 273, 16, 1, 16))
    for i in (1, 2):  # three frames of one strip that is most of the file
        at = first + i * (16 + 20 * 9)
        struct.pack_into("<Q", content, at + 12, 16)
    for i in range(3):
        struct.pack_into("<Q", content, first + i * (16 + 20 * 9) + 3 * 20 + 12, len(content) - 16)
    path.write_bytes(content)
    with pytest.raises(FormatError, match="strip: expected parts that do not overlap"):
        read_eer(path)


def test_not_files(tmp_path):
    for name, content in (("empty", b""), ("short", b"II"), ("text", b"This is a text of some length.")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=name):
            eer_info(tmp_path / name)
    with pytest.raises(FormatError, match="existing file"):
        read_eer(tmp_path / "none.eer")
    tifffile.imwrite(tmp_path / "big.tif", np.zeros((4, 5), np.uint8), bigtiff=True)
    with pytest.raises(FormatError, match="an integrated image only"):
        read_eer(tmp_path / "big.tif")


def read_all(path):
    """Events or a FormatError, and nothing else."""
    try:
        info = eer_info(path)
        events = read_eer(path)
        render_eer(path)
    except FormatError:
        return None
    assert events.shape == (info.n_frames, *info.shape)
    return events


def test_cut_short_at_any_byte(small):
    content = small.read_bytes()
    wanted = read_eer(small)
    for n in [*range(0, len(content), 7), *range(len(content) - 30, len(content))]:
        small.write_bytes(content[:n])
        assert read_all(small) is None
    small.write_bytes(content)
    assert same(read_all(small), wanted)


def test_random_damage(small):
    rng = np.random.default_rng(8)
    content = np.frombuffer(small.read_bytes(), np.uint8)
    wanted = read_eer(small)
    kept = 0
    for i in range(600):
        damaged = content.copy()
        where = rng.integers(0, len(content), 1 + i % 3)
        damaged[where] = rng.choice([0, 255, 1, 128, *rng.integers(0, 256, 4)], len(where))
        if i % 5 == 0:  # a piece moved
            (a, b), n = rng.integers(0, len(content) - 40, 2), int(rng.integers(1, 40))
            damaged[a : a + n] = content[b : b + n]
        small.write_bytes(damaged.tobytes())
        events = read_all(small)
        kept += events is not None and events.shape == wanted.shape
    assert kept > 10  # frame texts, places within a pixel, padding
