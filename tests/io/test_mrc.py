"""MRC files: other readers accept them, and nothing is read that the file does not hold."""

import bz2
import gzip
import os

import mrcfile
import numpy as np
import pytest
import torch

from cryosim.core.volume import Volume
from cryosim.io.files import FormatError
from cryosim.io.mrc import read_stack, read_volume, write_stack, write_volume

SHAPE = (3, 5, 7)  # odd, and no two alike
FIELDS = {"nx": 0, "nz": 8, "mode": 12, "mx": 28, "cella_x": 40, "cellb": 52, "mapc": 64, "ispg": 88, "nsymbt": 92}


def values(dtype="float32", shape=SHAPE):
    numbers = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    return numbers if "int" in dtype else numbers / 8 - 3


def poke(path, offset, *numbers, kind="<i4"):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.array(numbers, dtype=kind).tobytes())


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float16", "float32"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 6), (4, 1, 1)])
@pytest.mark.parametrize("stack", [True, False])
def test_round_trip_and_validation(tmp_path, dtype, shape, stack):
    path = tmp_path / "a.mrc"
    wanted = values(dtype, shape)
    if stack:
        write_stack(path, wanted, 1.35, dtype=dtype)
        got, spacing = read_stack(path)
    else:
        write_volume(path, Volume(wanted, 1.35), dtype=dtype)
        volume = read_volume(path)
        got, spacing = volume.values, volume.voxel_size
    assert mrcfile.validate(path)
    assert spacing == 1.35
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert torch.equal(got, wanted)
    with mrcfile.open(path) as mrc:
        assert mrc.is_image_stack() == stack or shape[0] == 1
        assert (int(mrc.header.ispg), int(mrc.header.mz)) == ((0, 1) if stack else (1, shape[0]))
        assert mrc.data.dtype == dtype
        assert mrc.voxel_size.x == mrc.voxel_size.y == mrc.voxel_size.z == pytest.approx(1.35)


def test_axes_are_section_row_column(tmp_path):
    write_volume(tmp_path / "a.mrc", Volume(values(), 2.0))
    raw = np.fromfile(tmp_path / "a.mrc", "<f4", offset=1024)
    assert np.fromfile(tmp_path / "a.mrc", "<i4", count=3).tolist() == [7, 5, 3]  # nx, ny, nz
    assert raw[1] == values()[0, 0, 1]  # x is fastest


def test_counts_are_stored_as_integers_where_they_fit(tmp_path):
    for numbers, dtype in ((values("int16"), "int16"), (values("int16") + 40000, "float32"), (values(), "float32")):
        write_stack(tmp_path / "a.mrc", numbers, 1.0)
        with mrcfile.open(tmp_path / "a.mrc") as mrc:
            assert mrc.data.dtype == dtype


def test_same_data_same_bytes(tmp_path):
    for name in ("a.mrc", "b.mrc"):
        write_stack(tmp_path / name, values(), 1.35)
        os.utime(tmp_path / name, (0, 0))
    assert (tmp_path / "a.mrc").read_bytes() == (tmp_path / "b.mrc").read_bytes()
    assert b"20" not in (tmp_path / "a.mrc").read_bytes()[224:1024]  # no date in the labels


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        (values() + 0.5, "int16"),
        (values("int16") + 32700, "int16"),
        (values("int16") - 1, "uint16"),
        (values("int16") + 65500, "float16"),
        (values() * float("nan"), "float32"),
        (values().double() * 1e300, "float32"),
        (values(), "int8"),
        (values()[0], "float32"),
        (values()[:0], "float32"),
    ],
)
def test_nothing_wraps_and_the_old_file_stays(tmp_path, numbers, dtype):
    path = tmp_path / "a.mrc"
    path.write_text("old")
    with pytest.raises(ValueError, match="a.mrc"):
        write_stack(path, numbers, 1.0, dtype=dtype)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.mrc"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_files_are_read(tmp_path, compress):
    write_stack(tmp_path / "a.mrc", values(), 1.35)
    (tmp_path / "b.mrc").write_bytes(compress((tmp_path / "a.mrc").read_bytes()))
    assert torch.equal(read_stack(tmp_path / "b.mrc")[0], values())


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
@pytest.mark.parametrize("extra", [-10, 10_000_000])
def test_a_compressed_file_holds_what_its_header_says(tmp_path, compress, extra):
    write_stack(tmp_path / "a.mrc", values(), 1.35)
    raw = (tmp_path / "a.mrc").read_bytes()
    (tmp_path / "b.mrc.gz").write_bytes(compress(raw + bytes(extra) if extra > 0 else raw[:extra]))
    with pytest.raises(FormatError, match=r"b\.mrc\.gz: size"):
        read_stack(tmp_path / "b.mrc.gz")


def test_a_compressed_file_with_a_giant_header_is_not_unfolded(tmp_path):
    write_stack(tmp_path / "a.mrc", values(), 1.35)
    poke(tmp_path / "a.mrc", FIELDS["nx"], 30000, 30000, 30000)
    (tmp_path / "a.mrc").write_bytes(gzip.compress((tmp_path / "a.mrc").read_bytes()))
    with pytest.raises(FormatError, match="after decompression"):
        read_stack(tmp_path / "a.mrc")


def test_other_writers_files(tmp_path):
    """Big-endian, signed and IMOD's unsigned bytes, an extended header."""
    numbers = np.arange(105, dtype=">f4").reshape(SHAPE)
    mrcfile.write(tmp_path / "big.mrc", numbers, voxel_size=2.0)
    assert np.array_equal(read_volume(tmp_path / "big.mrc").values, numbers.astype("f4"))
    with mrcfile.new(tmp_path / "bytes.mrc", np.full(SHAPE, -56, "i1")) as mrc:
        mrc.voxel_size = 2.0
        mrc.set_extended_header(np.zeros(128, "V1"))
    assert read_volume(tmp_path / "bytes.mrc").values.unique().tolist() == [-56]
    poke(tmp_path / "bytes.mrc", 152, 1146047817, 0)
    assert read_volume(tmp_path / "bytes.mrc").values.unique().tolist() == [200]


@pytest.mark.parametrize(
    ("offset", "numbers", "kind", "field"),
    [
        (FIELDS["nx"], [100_000, 100_000, 100_000], "<i4", "size"),  # 4 PB are not asked for
        (FIELDS["nx"], [2**31 - 1] * 3, "<i4", "size"),
        (FIELDS["nx"], [-7], "<i4", "nz, ny, nx"),
        (FIELDS["nz"], [0], "<i4", "nz, ny, nx"),
        (FIELDS["nsymbt"], [2**31 - 1], "<i4", "size"),
        (FIELDS["nsymbt"], [-1], "<i4", "nsymbt"),
        (FIELDS["mode"], [4], "<i4", "mode"),
        (FIELDS["mode"], [99], "<i4", "mode"),
        (FIELDS["mapc"], [3, 2, 1], "<i4", "mapc, mapr, maps"),
        (FIELDS["ispg"], [401], "<i4", "ispg"),
        (FIELDS["mx"], [0], "<i4", "cella"),
        (FIELDS["cella_x"], [0, 0, 0], "<f4", "cella"),
        (FIELDS["cella_x"], [float("nan")], "<f4", "cella"),
        (FIELDS["cella_x"], [9.0], "<f4", "cella"),
        (FIELDS["cellb"], [120.0], "<f4", "cellb"),
        (208, [0], "<i4", "map"),
        (212, [7], "<i4", "machst"),
        (1024 + 4 * 40, [float("nan")], "<f4", "section 1"),
        (1024 + 4 * 80, [float("inf")], "<f4", "section 2"),
    ],
)
def test_bad_headers_and_values_are_named(tmp_path, offset, numbers, kind, field):
    path = tmp_path / "a.mrc"
    write_volume(path, Volume(values(), 1.35))
    poke(path, offset, *numbers, kind=kind)
    with pytest.raises(FormatError, match=r"a\.mrc") as caught:
        read_volume(path)
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("length", [1, 1023, 1024, 1443])
def test_cut_files_are_refused(tmp_path, length):
    path = tmp_path / "a.mrc"
    write_volume(path, Volume(values(), 1.35))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FormatError, match=r"a\.mrc: (size|header): expected"):
        read_volume(path)


def test_a_given_pixel_size_replaces_a_missing_one(tmp_path):
    write_volume(tmp_path / "a.mrc", Volume(values(), 1.35))
    poke(tmp_path / "a.mrc", FIELDS["cella_x"], 0, 0, 0, kind="<f4")
    assert read_volume(tmp_path / "a.mrc", pixel_size=3.5).voxel_size == 3.5
    with pytest.raises(ValueError, match="pixel_size"):
        read_volume(tmp_path / "a.mrc", pixel_size=0.0)
