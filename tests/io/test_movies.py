"""Movies and gain references: the same image whichever file it comes from, and other programs see its rows in order."""

import struct

import mrcfile
import numpy as np
import pytest
import tifffile
import torch

from cryosim.io.files import FormatError
from cryosim.io.movies import read_movie, write_gain, write_movie
from cryosim.io.mrc import write_stack

SHAPE = (3, 17, 22)


@pytest.fixture
def movie(generator):
    return torch.randint(0, 9, SHAPE, generator=generator)


@pytest.mark.parametrize("suffix", [".mrc", ".mrcs", ".tif", ".tiff", ".TIF"])
@pytest.mark.parametrize("kind", [torch.int16, torch.uint8, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("streamed", [False, True])
def test_counts_come_back(tmp_path, movie, suffix, kind, streamed):
    path = tmp_path / f"a{suffix}"
    given = movie.to(kind)
    write_movie(path, iter(given) if streamed else given, 1.35)
    got, pixel_size = read_movie(path)
    assert (got.dtype, pixel_size) == (torch.float32, 1.35)
    assert torch.equal(got, movie.float())
    assert read_movie(path, pixel_size=2.0)[1] == 2.0


@pytest.mark.parametrize("suffix", [".mrc", ".tif"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 4), (4, 1, 7), (2, 64, 33)])
def test_images_come_back(tmp_path, suffix, shape, generator):
    frames = torch.randn(*shape, generator=generator, dtype=torch.float64)
    write_movie(tmp_path / f"a{suffix}", frames, 0.834567)
    got, pixel_size = read_movie(tmp_path / f"a{suffix}")
    assert torch.equal(got, frames.float())
    assert pixel_size == 0.834567


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float16", "float32"])
@pytest.mark.parametrize("streamed", [False, True])
def test_mrc_is_that_of_a_stack(tmp_path, movie, dtype, streamed):
    write_movie(tmp_path / "a.mrc", iter(movie) if streamed else movie, 1.35, dtype=dtype)
    write_stack(tmp_path / "b.mrc", movie, 1.35, dtype=dtype)
    assert mrcfile.validate(tmp_path / "a.mrc")
    ours, stack = (mrcfile.open(tmp_path / f"{name}.mrc") for name in "ab")
    assert np.array_equal(ours.data, stack.data)
    for name in stack.header.dtype.names:  # statistics apart, which are summed in another order
        if name in ("dmean", "rms"):
            assert float(ours.header[name]) == pytest.approx(float(stack.header[name]), rel=1e-6)
        else:
            assert np.array_equal(ours.header[name], stack.header[name]), name


def test_rows_of_a_tiff_file_are_reversed(tmp_path, movie):
    """As RELION's own conversion of an MRC file to TIFF has them."""
    write_movie(tmp_path / "a.tif", movie, 1.35)
    write_movie(tmp_path / "a.mrc", movie, 1.35)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), mrcfile.read(tmp_path / "a.mrc")[:, ::-1])


@pytest.mark.parametrize("pixel_size", [0.1, 0.5123456, 1.35, 834.1234, 1e6])
def test_resolution_tags(tmp_path, movie, pixel_size):
    write_movie(tmp_path / "a.tif", movie, pixel_size)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        for page in file.pages:
            assert page.tags["ResolutionUnit"].value == 3  # centimetre
            for axis in "XY":
                numerator, denominator = page.tags[f"{axis}Resolution"].value
                assert 1e8 * denominator / numerator == pytest.approx(pixel_size, rel=1e-8)
            assert "DateTime" not in page.tags
    assert read_movie(tmp_path / "a.tif")[1] == pixel_size


def test_inches_are_read(tmp_path):
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    tifffile.imwrite(tmp_path / "a.tif", image, resolution=(2.54e8 / 2, 2.54e8 / 2), resolutionunit="INCH")
    assert read_movie(tmp_path / "a.tif")[1] == 2.0


@pytest.mark.parametrize(
    ("change", "narrow", "mrc"),
    [
        (0, "uint8", "int16"),
        (248, "uint16", "int16"),
        (60_000, "uint16", "uint16"),
        (0.5, "float32", "float32"),
        (-9, "float32", "int16"),
        (70_000, "float32", "float32"),
    ],
)
def test_the_narrowest_type(tmp_path, movie, change, narrow, mrc):
    for suffix, wanted in ((".tif", narrow), (".mrc", mrc)):
        write_movie(tmp_path / f"a{suffix}", movie + change, 1.0)
        read = tifffile.imread if suffix == ".tif" else mrcfile.read
        assert read(tmp_path / f"a{suffix}").dtype == wanted
        assert torch.equal(read_movie(tmp_path / f"a{suffix}")[0], (movie + change).float())


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, movie):
    nan = torch.full((2, 4, 5), float("nan"))

    def breaks():
        yield movie[0]
        raise OSError("no space")

    for suffix in (".mrc", ".tif"):
        path = tmp_path / f"a{suffix}"
        write_movie(path, movie, 1.35)
        before = path.read_bytes()
        for frames, options, match in [
            (nan, {}, "finite values that float32 can hold"),
            (iter(nan), {}, "finite values that float32 can hold"),
            (iter([movie[0], movie[1, 1:]]), {}, "frame 1: expected real values"),
            (iter([movie[0], movie[0] + 40_000_000]), {}, "frame 1: expected finite values"),
            (movie.double() + 0.5, {"dtype": "uint16"}, "frame 0: expected finite values"),
            (movie + 0j, {"dtype": "float32"}, "expected real values"),
            (movie, {"dtype": "int32"}, "dtype: expected one of"),
            (movie[0], {}, "expected \\(frame, y, x\\)"),
            (movie[None], {}, "expected \\(frame, y, x\\)"),
            (movie[:0], {}, "at least one"),
            (movie[:, :0], {}, "none empty"),
            ([], {}, "at least one"),
            ([3], {}, "got int"),
        ]:
            with pytest.raises(ValueError, match=match):
                write_movie(path, frames, 1.35, **options)
        for size in (0.0, -1.0, 0.01, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="pixel_size: expected"):
                write_movie(path, movie, size)
        with pytest.raises(OSError, match="no space"):
            write_movie(path, breaks(), 1.0)
        assert path.read_bytes() == before
    with pytest.raises(ValueError, match="suffix"):
        write_movie(tmp_path / "a.eer", movie, 1.0)
    with pytest.raises(ValueError, match="suffix"):
        read_movie(tmp_path / "a.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mrc", "a.tif"]


def test_same_frames_same_bytes(tmp_path, movie):
    for suffix in (".mrc", ".tif"):
        for name in "ab":
            write_movie(tmp_path / f"{name}{suffix}", movie, 1.35)
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize(
    "options", [{"bigtiff": True}, {"byteorder": ">"}, {"compression": "zlib"}, {"rowsperstrip": 2}]
)
def test_tiff_of_other_writers(tmp_path, movie, options):
    data = movie.numpy().astype(np.int16)[:, ::-1]
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack", **options)
    with pytest.raises(FormatError, match="pixel size|XResolution|resolution"):
        read_movie(tmp_path / "a.tif")
    assert torch.equal(read_movie(tmp_path / "a.tif", pixel_size=1.0)[0], movie.float())


def test_tiff_that_is_no_movie(tmp_path, movie):
    path = tmp_path / "a.tif"
    cases = [
        (lambda: path.write_bytes(b""), "content"),
        (lambda: path.write_bytes(b"II"), "TIFF"),
        (lambda: path.write_bytes(b"This is a text."), "TIFF"),
        (lambda: tifffile.imwrite(path, np.zeros((5, 6, 3), np.uint8), photometric="rgb"), "frame 0"),
        (lambda: tifffile.imwrite(path, np.zeros((5, 6), np.complex64)), "frame 0"),
        (lambda: tifffile.imwrite(path, np.full((5, 6), np.nan, np.float32)), "NaN"),
    ]
    for make, match in cases:
        make()
        with pytest.raises(FormatError, match=match):
            read_movie(path, pixel_size=1.0)
    with tifffile.TiffWriter(path) as writer:
        for n in (5, 6):
            writer.write(np.zeros((n, 7), np.uint8), contiguous=False)
    with pytest.raises(FormatError, match="one shape and type"):
        read_movie(path, pixel_size=1.0)


def test_a_compressed_tiff_may_not_unfold_without_bound(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2000, 2000), np.uint8), compression="zlib")
    monkeypatch.setattr("cryosim.io.movies.LARGEST_TIFF", 10**6)
    with pytest.raises(FormatError, match="at most 1000000 bytes"):
        read_movie(tmp_path / "a.tif", pixel_size=1.0)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_tiff_cut_short_at_any_byte(tmp_path, movie, bigtiff):
    path = tmp_path / "a.tif"
    write_movie(path, iter(movie) if bigtiff else movie, 1.35)
    content = path.read_bytes()
    assert content[2] == (43 if bigtiff else 42)
    for n in range(0, len(content), 11):
        path.write_bytes(content[:n])
        with pytest.raises(FormatError):
            read_movie(path)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_tiff_with_random_damage(tmp_path, movie, bigtiff):
    path = tmp_path / "a.tif"
    write_movie(path, iter(movie) if bigtiff else movie, 1.35)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(3)
    heads = np.flatnonzero(rng.random(len(content)) < 0.3)
    for _ in range(200):
        damaged = content.copy()
        damaged[rng.choice(heads, 2)] = rng.choice([0, 1, 128, 255, *rng.integers(0, 256, 2)], 2)
        path.write_bytes(damaged.tobytes())
        try:
            got, pixel_size = read_movie(path)
        except FormatError:
            continue
        assert bool(torch.isfinite(got).all())
        assert 0 < pixel_size <= 1e6


def test_directories_that_return_to_themselves(tmp_path, movie):
    path = tmp_path / "a.tif"
    write_movie(path, movie, 1.35)
    content = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", content, 4)
    (n,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * n, first)
    path.write_bytes(content)
    with pytest.raises(FormatError, match="directory 1"):
        read_movie(path)


def test_gain_references(tmp_path, generator):
    sensitivity = 0.8 + 0.4 * torch.rand(9, 12, generator=generator, dtype=torch.float64)
    sensitivity[2, 3] = 0
    write_gain(tmp_path / "a.mrc", sensitivity)
    write_gain(tmp_path / "a.gain", sensitivity)
    divided = mrcfile.read(tmp_path / "a.mrc")  # one image has two axes
    multiplied = tifffile.imread(tmp_path / "a.gain")  # RELION undoes its flip of TIFF rows for it
    assert (divided.dtype, multiplied.dtype) == (np.float32, np.float32)
    assert np.array_equal(divided, sensitivity.float().numpy())
    good = divided > 0
    mean = divided[good].mean(dtype=np.float64)
    assert (multiplied[~good].tolist(), good.sum()) == ([0.0], 9 * 12 - 1)
    assert multiplied[good] == pytest.approx(mean / divided[good], rel=1e-6)
    for movies in ("mrc", "tiff"):  # RELION multiplies these with an .mrc
        write_gain(tmp_path / "b.mrc", sensitivity, movies=movies)
        factors = mrcfile.read(tmp_path / "b.mrc")
        assert factors.dtype == np.float32 and np.array_equal(factors, multiplied)
        with pytest.raises(ValueError, match=f"suffix: expected .mrc for {movies} movies"):
            write_gain(tmp_path / "b.gain", sensitivity, movies=movies)
    with pytest.raises(ValueError, match='movies: expected "eer", "mrc" or "tiff", got \'tif\''):
        write_gain(tmp_path / "b.mrc", sensitivity, movies="tif")
    for wrong in (sensitivity[None], 0 * sensitivity, -sensitivity, sensitivity / 0, sensitivity[:0]):
        with pytest.raises(ValueError, match="gain: expected"):
            write_gain(tmp_path / "b.mrc", wrong)
    with pytest.raises(ValueError, match="suffix"):
        write_gain(tmp_path / "b.tif", sensitivity)
