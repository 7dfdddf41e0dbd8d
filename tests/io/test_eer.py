"""EER files: outside readers find each electron where it was put, and a damaged file is refused, not misread."""

import re
import tracemalloc
import warnings

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch

from cryosim.io.eer import eer_info, iterate_eer, read_eer, render_eer, write_eer
from cryosim.io.eer_codec import Bits, StreamError, decode, encode, one_per_pixel
from cryosim.io.files import FormatError
from cryosim.microscope.events import Events

USUAL = Bits()
WORKED = [(0, 3, 1, 0), (0, 4, 3, 2), (10, 12, 0, 3)]  # (y, x, quarter along y, along x), on 16 x 16 pixels
SHAPES = [(16, 16), (13, 22), (1, 127), (127, 1), (1, 128), (1, 1), (40, 33)]


@pytest.fixture(autouse=True)
def _small_sensors():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*read EER files of 4096")
        yield


def at_quarters(quarters, n_frames, shape, dtype=torch.float32):
    """Events in the middle of quarters (frame, 4 y, 4 x)."""
    quarters = torch.as_tensor(quarters).reshape(-1, 3)
    y, x = ((quarters[:, i].to(dtype) + 0.5) / 4 for i in (1, 2))
    return Events(quarters[:, 0], y, x, (n_frames, *shape))


def random_events(generator, n_frames, shape, share=0.1, dtype=torch.float32):
    """Events of about `share` a pixel and frame, one a pixel at most."""
    hit = torch.rand(n_frames, *shape, generator=generator) < share
    frame, y, x = hit.nonzero().unbind(1)
    y, x = (4 * v + torch.randint(4, v.shape, generator=generator) for v in (y, x))
    return at_quarters(torch.stack([frame, y, x], 1), n_frames, shape, dtype)


def same(a, b):
    return a.shape == b.shape and all(torch.equal(getattr(a, n), getattr(b, n).to(getattr(a, n))) for n in "yx")


def rendered(path, level):
    """By tifffile and imagecodecs."""
    with tifffile.TiffFile(path, superres=level) as file:
        assert file.is_eer
        return np.stack([page.asarray() for page in file.pages]).astype(int)


def counts(events, supersampling):
    frames, ny, nx = events.shape
    image = np.zeros((frames, ny * supersampling, nx * supersampling), int)
    y, x = ((v.double() * supersampling).floor().long().numpy() for v in (events.y, events.x))
    np.add.at(image, (events.frame.numpy(), y, x), 1)
    return image


def keys_of(events, nx, bits=USUAL):
    return np.array([(y * nx + x) << bits.sub | sy << bits.x | sx for y, x, sy, sx in events], np.int64)


def test_worked_example_byte_for_byte(tmp_path):
    wanted = bytes.fromhex("0307d01f95530000")
    assert encode(keys_of(WORKED, 16), 256, USUAL) == wanted
    quarters = [(0, 4 * y + sy, 4 * x + sx) for y, x, sy, sx in WORKED]
    write_eer(tmp_path / "a.eer", at_quarters(quarters, 1, (16, 16)))
    with tifffile.TiffFile(tmp_path / "a.eer") as file:
        page = file.pages[0]
        assert page.databytecounts == (8,)
        assert file.filehandle.path
        raw = (tmp_path / "a.eer").read_bytes()
        assert raw[page.dataoffsets[0] :][:8] == wanted
    lit = imagecodecs.eer_decode(wanted, (64, 64), 7, 2, 2, superres=2)
    assert np.argwhere(lit).tolist() == [[1, 12], [3, 18], [40, 51]]


def test_vector_of_the_specification():
    # it ends with the event in the last of 312 pixels and five bits that are no code
    pixel, sub_y, sub_x = decode(bytes.fromhex("031bfcb135fb"), 312, Bits(7, 1, 1))
    assert pixel.tolist() == [3, 17, 233, 311]
    assert (sub_y.tolist(), sub_x.tolist()) == ([0, 1, 1, 1], [1, 1, 0, 0])  # fields with their top bit changed


@pytest.mark.parametrize("n", [0, 1, 300_000])
def test_whole_sensor_against_imagecodecs(n):
    rng = np.random.default_rng(n)
    keys = one_per_pixel(np.append(rng.integers(0, 2**28, n), [2**28 - 6][: bool(n)]).astype(np.int32), USUAL)
    data = encode(keys, 4096**2, USUAL)
    pixel, sub_y, sub_x = decode(data, 4096**2, USUAL)
    assert np.array_equal(pixel << 4 | sub_y << 2 | sub_x, keys)
    lit = np.flatnonzero(imagecodecs.eer_decode(data, (4096, 4096), 7, 2, 2))
    assert np.array_equal(lit, pixel)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("n", [0, 1, 300_000])
def test_whole_sensor_file_against_tifffile(tmp_path, generator, n, level):
    places = torch.rand(2, n, generator=generator, dtype=torch.float64) * 4096
    places[:, : min(n, 1)] = 4095.9  # the last pixel
    events = Events(torch.zeros(n, dtype=torch.long), *places, (1, 4096, 4096))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_eer(tmp_path / "a.eer", events)
    theirs = rendered(tmp_path / "a.eer", level)[0]
    assert np.array_equal(theirs, render_eer(tmp_path / "a.eer", 2**level)[0].numpy())
    merged = counts(events, 1).clip(max=1).sum()
    assert theirs.sum() == merged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_small_sensors_against_tifffile(tmp_path, generator, shape, share):
    events = random_events(generator, 3, shape, share)
    write_eer(tmp_path / "a.eer", events)
    got = read_eer(tmp_path / "a.eer")
    assert same(got, events)
    assert torch.equal(got.frame, events.frame)
    for level in (0, 1, 2):
        wanted = counts(events, 2**level)
        if all(n << level & 3 == 0 for n in shape) or not level:  # others imagecodecs does not read
            assert np.array_equal(rendered(tmp_path / "a.eer", level), wanted)
        assert np.array_equal(render_eer(tmp_path / "a.eer", 2**level, frames=1).numpy(), wanted)


@pytest.mark.parametrize("bits", [Bits(7, 1, 1), Bits(7, 2, 2), Bits(8, 2, 1), Bits(9, 1, 2), Bits(12, 2, 2)])
@pytest.mark.parametrize("n", [0, 1, 7, 200])
def test_other_widths_against_imagecodecs(bits, n):
    rng = np.random.default_rng(n)
    shape = (21, 18)
    keys = one_per_pixel(rng.integers(0, 21 * 18 << bits.sub, n), bits)
    data = encode(keys, 21 * 18, bits)
    pixel, sub_y, sub_x = decode(data, 21 * 18, bits)
    assert np.array_equal(pixel << bits.sub | sub_y << bits.x | sub_x, keys)
    lit = imagecodecs.eer_decode(data, shape, bits.run, bits.x, bits.y)
    assert np.array_equal(np.flatnonzero(lit), pixel)
    parts = (shape[0] << bits.y, shape[1] << bits.x)
    y, x = np.divmod(pixel, 18)
    fine = np.zeros(parts, int)
    fine[(y << bits.y) + sub_y, (x << bits.x) + sub_x] = 1
    if bits.x == bits.y:
        lit = imagecodecs.eer_decode(data, parts, bits.run, bits.x, bits.y, superres=bits.x)
        assert np.array_equal(lit, fine)


@pytest.mark.parametrize("run", range(1, 17))
def test_every_width_comes_back(run):
    rng = np.random.default_rng(run)
    for x, y in np.ndindex(5, 5):
        bits = Bits(run, x, y)
        for n in (0, 1, 60):
            keys = one_per_pixel(rng.integers(0, 143 << bits.sub, n), bits)
            pixel, sub_y, sub_x = decode(encode(keys, 143, bits), 143, bits)
            assert np.array_equal(pixel << bits.sub | sub_y << bits.x | sub_x, keys)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.9])
def test_streams_longer_than_a_piece(monkeypatch, share):
    rng = np.random.default_rng(5)
    n = 30_001
    keys = one_per_pixel(np.flatnonzero(rng.random(n) < share) << 4 | 7, USUAL)
    data = encode(keys, n, USUAL)
    whole = decode(data, n, USUAL)
    for size in (8, 9, 64):
        monkeypatch.setattr("cryosim.io.eer_codec._CHUNK", size)
        for ours, wanted in zip(decode(data, n, USUAL), whole, strict=True):
            assert np.array_equal(ours, wanted)


def slow_decode(data, n, bits):
    """The format's definition, one code after the other."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(int)
    place, count, found = 0, 0, []

    def take(width):
        nonlocal place
        place += width
        if place > len(stream):
            raise StreamError("expected more, got less")
        return int((stream[place - width : place] << np.arange(width)).sum())

    while place + bits.run <= len(stream):
        run = take(bits.run)
        if run < bits.skip and count + run >= n:
            if count + run > n or stream[(place // 8 + 16) * 8 :].any():
                raise StreamError("expected an end, got more")
            return found
        count += run
        if run < bits.skip:
            sub_x, sub_y = take(bits.x), take(bits.y)
            found.append((count, sub_y ^ (1 << bits.y) >> 1, sub_x ^ (1 << bits.x) >> 1))
            count += 1
    if count != n:
        raise StreamError("expected a count, got another")
    return found


@pytest.mark.parametrize("bits", [USUAL, Bits(3, 1, 1), Bits(2, 2, 0), Bits(1, 0, 0)])
def test_any_bits_mean_what_the_definition_says(bits):
    rng = np.random.default_rng(11)
    refused = 0
    for i in range(600):
        data = rng.integers(0, 256, 40, np.uint8)
        data[rng.random(40) < 0.4] = 255
        data[(i % 40) :] = 0
        data = data.tobytes()
        n = int(rng.integers(1, 200))
        try:
            wanted = slow_decode(data, n, bits)
        except StreamError:
            refused += 1
            with pytest.raises(StreamError):
                decode(data, n, bits)
        else:
            assert list(zip(*(v.tolist() for v in decode(data, n, bits)), strict=True)) == wanted
    assert 20 < refused < 600 or bits.run == 1


def test_of_several_events_in_a_pixel_one_is_kept_without_favour(tmp_path, generator):
    n = 200
    pixels = torch.arange(n * n).repeat(2)
    quarters = torch.randint(4, (2, len(pixels)), generator=generator)
    events = at_quarters(
        torch.stack([0 * pixels, 4 * (pixels // n) + quarters[0], 4 * (pixels % n) + quarters[1]], 1), 1, (n, n)
    )
    with pytest.warns(UserWarning, match=f"{n * n} of {2 * n * n} events"):
        write_eer(tmp_path / "a.eer", events)
    order = torch.randperm(len(events), generator=generator)
    with pytest.warns(UserWarning, match="events fell"):
        write_eer(tmp_path / "b.eer", Events(events.frame, events.y[order], events.x[order], events.shape))
    assert (tmp_path / "a.eer").read_bytes() == (tmp_path / "b.eer").read_bytes()
    got = read_eer(tmp_path / "a.eer")
    assert len(got) == n * n
    for v in (got.y, got.x):  # uniform: deviation of the mean from the middle below 4 standard errors
        assert abs(float((v % 1).mean()) - 0.5) < 4 * np.sqrt(1.25) / 4 / n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_event_keeps_its_quarter_at_its_very_edge(tmp_path, dtype):
    low = torch.arange(4 * 50, dtype=dtype) / 4
    high = torch.nextafter(low + 0.25, torch.zeros_like(low))
    y = torch.stack([low, high]).flatten()
    frame = torch.arange(len(y))
    write_eer(tmp_path / "a.eer", Events(frame, y, y.flip(0), (len(y), 50, 50)))
    got = read_eer(tmp_path / "a.eer")
    assert torch.equal(got.y.to(dtype), (4 * y).floor() / 4 + 0.125)
    assert torch.equal(got.x, got.y.flip(0))


def test_order_and_pieces_do_not_matter(tmp_path, generator):
    events = random_events(generator, 5, (30, 41), dtype=torch.float64)
    order = torch.randperm(len(events), generator=generator)
    mixed = Events(events.frame[order], events.y[order].requires_grad_(), events.x[order], events.shape)

    def piece(start, stop):
        chosen = (events.frame >= start) & (events.frame < stop)
        return Events(events.frame[chosen] - start, events.y[chosen], events.x[chosen], (stop - start, 30, 41))

    write_eer(tmp_path / "a.eer", events, pixel_size=1.2)
    write_eer(tmp_path / "b.eer", mixed, pixel_size=1.2)
    write_eer(tmp_path / "c.eer", (piece(*p) for p in ((0, 1), (1, 4), (4, 5))), pixel_size=1.2)
    write_eer(tmp_path / "d.eer", iterate_eer(tmp_path / "a.eer"), pixel_size=1.2)
    wanted = (tmp_path / "a.eer").read_bytes()
    assert all((tmp_path / f"{name}.eer").read_bytes() == wanted for name in "bcd")
    assert same(read_eer(tmp_path / "a.eer", (1, 4)), piece(1, 4))
    assert torch.equal(read_eer(tmp_path / "a.eer", (1, 4)).frame, piece(1, 4).frame)


def test_what_the_file_says_of_itself(tmp_path, generator):
    events = random_events(generator, 6, (20, 30))
    write_eer(tmp_path / "a.eer", events, pixel_size=1.35, dose=3.1, frame_rate=120.0, metadata={"n": 7, "a<b": "&é"})
    info = eer_info(tmp_path / "a.eer")
    assert (info.n_frames, info.shape, info.compression, info.bits) == (6, (20, 30), 65001, (7, 2, 2))
    assert (info.pixel_size, info.dose, info.exposure_time) == (1.35, 3.1, 6 / 120)
    assert info.events_per_pixel == len(events) / 600
    assert (info.metadata["n"], info.metadata["a<b"]) == ("7", "&é")
    with tifffile.TiffFile(tmp_path / "a.eer") as file:
        theirs = file.eer_metadata
        assert theirs["numberOfFrames"] == 6
        assert theirs["totalDose"] == info.events_per_pixel
        assert theirs["meanDoseRate"] == pytest.approx(info.events_per_pixel / 0.05)
        assert (theirs["sensorImageHeight"], theirs["sensorPixelSize.width"]) == (20, 14e-6)
        assert file.pages[4].tags[65002].value.startswith(b"<metadata>")
    write_eer(tmp_path / "b.eer", events, exposure_time=2.5)
    info = eer_info(tmp_path / "b.eer")
    assert (info.pixel_size, info.dose, info.exposure_time) == (None, None, 2.5)


def test_groups_of_frames(tmp_path, generator):
    events = random_events(generator, 7, (11, 14), 0.4)
    write_eer(tmp_path / "a.eer", events, dose=14.0)  # 2 a camera frame
    each = counts(events, 2)

    def images(**options):
        return render_eer(tmp_path / "a.eer", 2, **options).numpy()

    assert np.array_equal(images(), each.sum(0, keepdims=True))
    threes = np.stack([each[:3].sum(0), each[3:6].sum(0)])  # the seventh is left over
    assert np.array_equal(images(frames=3), threes)
    assert np.array_equal(images(dose_per_frame=5.5), threes)  # 3 frames, 6 e-/Å^2, come nearest
    assert np.array_equal(images(dose_per_frame=14), each.sum(0, keepdims=True))
    assert np.array_equal(images(frames=[(2, 4), (0, 7)]), np.stack([each[2:4].sum(0), each.sum(0)]))
    assert images().dtype == np.int16


def test_wrong_requests(tmp_path, generator):
    path = tmp_path / "a.eer"
    write_eer(path, random_events(generator, 3, (5, 6)))
    for options in ({"frames": 4}, {"frames": 0}, {"frames": [(1, 1)]}, {"frames": [(0, 4)]}, {"frames": []}):
        with pytest.raises(ValueError, match="frames: expected"):
            render_eer(path, **options)
    with pytest.raises(ValueError, match="1, 2 or 4"):
        render_eer(path, 3)
    with pytest.raises(ValueError, match="both"):
        render_eer(path, frames=1, dose_per_frame=1.0)
    with pytest.raises(FormatError, match="cryosim.dose"):
        render_eer(path, dose_per_frame=1.0)
    for frames in (1.0, (0, 2), [(0, 1.5)], [(0, 1, 2)], [3], "ab", torch.tensor(2)):
        with pytest.raises(ValueError, match="a.eer: frames: expected .*stop.*got"):
            render_eer(path, frames=frames)
    for frames in (3, (0,), (0, 1, 2), (0.0, 2), (0, 2.5), "ab", (2, 5), (-1, 2)):
        with pytest.raises(ValueError, match=re.escape(f"within 0 to 3, got {frames!r}.")):
            read_eer(path, frames)
    assert read_eer(path, (np.int64(1), torch.tensor(3))).shape == (2, 5, 6)
    assert render_eer(path, frames=np.array([[0, 2], [1, 3]])).shape == (2, 5, 6)
    write_eer(path, random_events(generator, 3, (5, 6)), dose=3.0)
    for dose in (0.4, 5.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="dose_per_frame: expected 1 "):
            render_eer(path, dose_per_frame=dose)


def test_a_failed_write_leaves_the_old_file(tmp_path, generator):
    path = tmp_path / "a.eer"
    events = random_events(generator, 2, (5, 6))
    write_eer(path, events)
    before = path.read_bytes()

    def breaks():
        yield events
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_eer(path, breaks())
    with pytest.raises(ValueError, match="expected \\(5, 6\\) pixels"):
        write_eer(path, [events, random_events(generator, 2, (6, 5))])
    with pytest.raises(ValueError, match="at least one frame"):
        write_eer(path, [])
    with pytest.raises(TypeError, match="got Tensor"):
        write_eer(path, [events.y])
    with pytest.raises(TypeError, match="got Tensor"):
        write_eer(path, [events, events.y])
    for name in ("pixel_size", "dose", "exposure_time", "frame_rate", "sensor_pixel_size"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name}: expected a positive"):
                write_eer(path, events, **{name: value})
    for metadata in ({"totalDose": 3}, {"cryosim.dose": 3}, {"note": "\x00"}, {"\x01": 3}, {"n": "a" * 2**20}):
        with pytest.raises(ValueError, match="metadata: expected"):
            write_eer(path, events, metadata=metadata)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.eer"]


def test_sensors_that_few_programs_read(tmp_path, generator):
    with pytest.warns(UserWarning, match="RELION, MotionCor and Warp read EER files of 4096 x 4096 pixels only"):
        write_eer(tmp_path / "a.eer", random_events(generator, 1, (5, 6)))
    empty = torch.zeros(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_eer(tmp_path / "b.eer", Events(empty.long(), empty, empty, (1, 4096, 4096)))
    with pytest.raises(ValueError, match="at most 16384"):
        write_eer(tmp_path / "b.eer", Events(empty.long(), empty, empty, (1, 2, 16385)))


def test_memory_is_that_of_a_frame(tmp_path, generator):
    one = random_events(generator, 1, (256, 256), 0.3)
    peaks = []
    for n in (2, 60):
        tracemalloc.start()
        write_eer(tmp_path / "a.eer", (one for _ in range(n)))
        for _ in iterate_eer(tmp_path / "a.eer"):
            pass
        render_eer(tmp_path / "a.eer")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
