"""Tilt series: what is written comes back in the order of exposure, and other programs can read it."""

import os
import warnings
from pathlib import Path

import mdocfile
import mrcfile
import numpy as np
import pytest
import torch

from cryosim.acquisition.series import Movie, TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.io import series as series_module
from cryosim.io.files import FormatError
from cryosim.io.mdoc import read_mdoc, write_mdoc
from cryosim.io.mrc import write_stack
from cryosim.io.series import read_series, write_series
from cryosim.io.tilts import read_tilts, write_tlt
from cryosim.microscope.optics import Optics


def example(optics=None, axis_angle=85.3, **changes):
    tilts = TiltScheme.dose_symmetric(extent=9.0, step=3.0, total_dose=21.0, axis_angle=axis_angle)
    images = torch.arange(7 * 5 * 6, dtype=torch.float32).reshape(7, 5, 6)  # rows in the order of exposure
    return TiltSeries(images, 1.3501234567, tilts, optics).replace(**changes)


FULL = Optics(voltage=300.0, defocus=25000.0, spherical_aberration=2.7, amplitude_contrast=0.07, phase_shift=90.0)
VARYING = FULL.replace(
    defocus=torch.linspace(20000, 32000, 7, dtype=torch.float64),
    astigmatism=torch.linspace(100, 700, 7, dtype=torch.float64),
)


@pytest.mark.parametrize("optics", [None, FULL, VARYING])
def test_round_trip(tmp_path, optics):
    wanted = example(optics)
    files = write_series(tmp_path / "a.mrc", wanted)
    assert sorted(os.listdir(tmp_path)) == sorted(f.name for f in files) == ["a.mrc", "a.mrc.mdoc", "a.rawtlt", "a.tlt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read_series(tmp_path / "a.mrc")
    assert torch.equal(got.images, wanted.images)
    assert got.pixel_size == pytest.approx(wanted.pixel_size, rel=1e-9)
    torch.testing.assert_close(got.tilts.angles, wanted.tilts.angles)
    torch.testing.assert_close(got.tilts.doses, wanted.tilts.doses)
    assert got.tilts.axis_angle == 85.3
    if optics is None:
        assert got.optics is None
        return
    for name in ("voltage", "defocus", "astigmatism", "spherical_aberration", "amplitude_contrast", "phase_shift"):
        expected = torch.as_tensor(getattr(optics, name), dtype=torch.float64)
        torch.testing.assert_close(torch.as_tensor(getattr(got.optics, name), dtype=torch.float64), expected, msg=name)


def test_movies_come_back_in_the_order_of_exposure(tmp_path):
    """And mdocfile, which is not ours, reads the same."""
    series = example()
    series = series.replace(tilts=series.tilts.replace(dose_rate=1.5))
    movies = tuple(Movie(f"frames/tilt {i}.eer", 100 + i) for i in range(len(series.tilts)))
    write_series(tmp_path / "s.mrc", series.replace(movies=movies))
    assert read_series(tmp_path / "s.mrc").movies == movies
    table = mdocfile.read(tmp_path / "s.mrc.mdoc").sort_values("PriorRecordDose")
    assert [Path(path).name for path in table.SubFramePath] == [Path(movie.path).name for movie in movies]
    assert table.NumSubFrames.tolist() == [movie.frames for movie in movies]
    for (doses,), movie, dose in zip(table.FrameDosesAndNumbers, movies, series.tilts.doses, strict=True):
        assert doses[1] == movie.frames and doses[0] * doses[1] == pytest.approx(float(dose))
    assert read_series(tmp_path / "s.mrc").tilts.dose_rate == pytest.approx(1.5)
    assert table.ExposureTime.tolist() == pytest.approx(series.tilts.exposure_times.tolist())


def test_dose_rate_comes_back(tmp_path):
    """Also without movies; of exposures without a time it is not guessed."""
    series = example()
    write_series(tmp_path / "s.mrc", series.replace(tilts=series.tilts.replace(dose_rate=0.2)))
    assert read_series(tmp_path / "s.mrc").tilts.dose_rate == pytest.approx(0.2)
    mdoc = tmp_path / "s.mrc.mdoc"
    mdoc.write_text(mdoc.read_text().replace("ExposureTime = 15", "ExposureTime = 0", 1))
    assert read_series(tmp_path / "s.mrc").tilts.dose_rate == example().tilts.dose_rate


def test_movies_of_a_windows_microscope(tmp_path, capsys):
    """SerialEM's paths, and its other spelling of a name, without a word."""
    series = example()
    movies = tuple(Movie("x", 8) for _ in series.tilts.angles)
    write_series(tmp_path / "s.mrc", series.replace(movies=movies))
    mdoc = tmp_path / "s.mrc.mdoc"
    text = mdoc.read_text().replace("SubFramePath = x", r"SubFramePath = D:\data\x_001[0.00].tif")
    mdoc.write_text(text.replace("FrameDosesAndNumbers", "FrameDosesAndNumber"))
    assert {movie.path for movie in read_series(tmp_path / "s.mrc").movies} == {"D:/data/x_001[0.00].tif"}
    assert capsys.readouterr().err == ""


def test_as_many_movies_as_tilts():
    with pytest.raises(ValueError, match="TiltSeries.movies"):
        example(movies=(Movie("x", 1),))


def test_other_programs_see_ascending_angles_and_serialems_signs(tmp_path):
    wanted = example(FULL)
    write_series(tmp_path / "a.mrc", wanted)
    assert mrcfile.validate(tmp_path / "a.mrc")
    angles = np.loadtxt(tmp_path / "a.rawtlt")
    assert angles.tolist() == np.loadtxt(tmp_path / "a.tlt").tolist() == [-9, -6, -3, 0, 3, 6, 9]
    table = mdocfile.read(tmp_path / "a.mrc.mdoc")
    assert table.TiltAngle.tolist() == angles.tolist()
    assert table.ZValue.tolist() == list(range(7))
    assert set(table.TargetDefocus) == {-2.5}  # [µm], negative is underfocus
    assert set(table.RotationAngle) == {175.3}  # SerialEM: the tilt axis + 90
    assert (table.Voltage[0], table.ImageSize[0], str(table.ImageFile[0])) == (300, (6, 5), "a.mrc")
    assert any("Tilt axis angle = 85.3, binning = 1" in title for title in table.titles[0])
    exposed = table.sort_values("PriorRecordDose")
    assert exposed.TiltAngle.tolist() == wanted.tilts.angles.tolist()
    assert exposed.PriorRecordDose.tolist() == pytest.approx([0, 3, 6, 9, 12, 15, 18])
    assert set(table.ExposureDose) == {3.0}
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        assert mrc.data.dtype == "int16"
        assert np.array_equal(mrc.data[3], wanted.images[0])  # 0 degrees, exposed first, stands in the middle


def test_same_series_same_bytes(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_series(tmp_path / folder / "a.mrc", example(VARYING))
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_failure_leaves_every_old_file(tmp_path, monkeypatch):
    write_series(tmp_path / "a.mrc", example())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(series_module, "write_tlt", fail)
    with pytest.raises(OSError, match="disk full"):
        write_series(tmp_path / "a.mrc", example(FULL))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_stack_is_put_in_place_last(tmp_path, monkeypatch):
    placed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (placed.append(os.path.basename(b)), replace(a, b)))
    write_series(tmp_path / "a", example())
    outer = [name for name in placed if not name.startswith(".")]
    assert outer[-1] == "a.mrc"
    assert len(outer) == 4


@pytest.mark.parametrize("name", ["a.png", "a.mrc.gz"])
def test_only_stacks_are_written(tmp_path, name):
    with pytest.raises(ValueError, match="suffix"):
        write_series(tmp_path / name, example())
    assert not os.listdir(tmp_path)


def test_without_mdoc_the_list_of_angles_is_used_and_says_so(tmp_path):
    write_series(tmp_path / "a.st", example())
    (tmp_path / "a.st.mdoc").unlink()
    with pytest.warns(UserWarning, match="neither dose nor order"):
        got = read_series(tmp_path / "a.st", optics=FULL)
    assert got.tilts.angles.tolist() == [-9, -6, -3, 0, 3, 6, 9]
    assert got.tilts.doses.tolist() == [0.0] * 7
    assert got.pixel_size == pytest.approx(1.3501234567, rel=1e-6)
    assert got.optics is FULL
    assert torch.equal(got.images[3], example().images[0])
    (tmp_path / "a.tlt").unlink()
    (tmp_path / "a.rawtlt").unlink()
    with pytest.raises(FormatError, match=r"a\.st\.mdoc, a\.mdoc, a\.tlt, a\.rawtlt"):
        read_series(tmp_path / "a.st")


def test_numbers_of_tilts_must_agree(tmp_path):
    write_series(tmp_path / "a.mrc", example())
    write_stack(tmp_path / "a.mrc", torch.zeros(6, 5, 6), 1.3501234567)
    with pytest.raises(FormatError, match=r"a\.mrc: sections: expected 7, one for each tilt of .*a\.mrc\.mdoc, got 6"):
        read_series(tmp_path / "a.mrc")


def test_pixel_sizes_must_agree(tmp_path):
    write_series(tmp_path / "a.mrc", example())
    write_stack(tmp_path / "a.mrc", torch.zeros(7, 5, 6), 2.7)
    with pytest.raises(FormatError, match="pixel size: expected 1.35012"):
        read_series(tmp_path / "a.mrc")
    assert read_series(tmp_path / "a.mrc", pixel_size=2.7).pixel_size == 2.7


SERIALEM = """PixelSpacing = 5.4
Voltage = 300
ImageFile = TS_01.mrc
ImageSize = 924 956
DataMode = 1

[T = SerialEM: Digitized on a microscope   30-Nov-15  15:14:20 ]

{title}

"""
SECTION = """[ZValue = {z}]
TiltAngle = {angle}
ExposureDose = {dose}
Defocus = 2.68083
RotationAngle = 175.3
TargetDefocus = -4
SubFramePath = D:\\DATA\\frames\\TS_01.mrc
DateTime = {time}

"""
TITLE = "[T =     Tilt axis angle = 85.3, binning = 1  spot = 8  camera = 0]"


def serialem(folder, title=TITLE, times=("30-Nov-15  15:21:38", "30-Nov-15  15:20:01"), dose="2.5", angle="-3.01"):
    path = folder / "a.mdoc"
    first = SECTION.format(z=0, angle=angle, dose=dose, time=times[0])
    second = SECTION.format(z=1, angle=0.01, dose=dose, time=times[1])
    path.write_text(SERIALEM.format(title=title) + first + second)
    return path


@pytest.mark.parametrize("title", [TITLE, ""])
def test_serialems_own_layout(tmp_path, title):
    mdoc = read_mdoc(serialem(tmp_path, title))
    assert mdoc.tilts.angles.tolist() == [0.01, -3.01]  # by time
    assert mdoc.sections.tolist() == [1, 0]
    assert mdoc.tilts.axis_angle == pytest.approx(85.3)  # also from RotationAngle alone
    assert mdoc.defocus.tolist() == [40000, 40000]
    assert (mdoc.voltage, mdoc.pixel_size, mdoc.optics) == (300, 5.4, None)
    assert read_tilts(tmp_path / "a.mdoc").doses.tolist() == [2.5, 2.5]


def test_unknown_order_and_dose_are_said(tmp_path):
    path = serialem(tmp_path, times=("30-Nov-15  15:20:01",) * 2, dose="0")
    with pytest.warns(UserWarning) as caught:
        tilts = read_tilts(path)
    assert sorted(str(w.message).split(": ")[1].split()[0] for w in caught) == ["ExposureDose", "PriorRecordDose"]
    assert tilts.angles.tolist() == [-3.01, 0.01]


@pytest.mark.parametrize(
    "change",
    [{"angle": "three"}, {"angle": "nan"}, {"angle": "95"}, {"dose": "-1"}, {"dose": "x"}, {"times": ("noon", "one")},
     {"title": "[T = Tilt axis angle = about 85]"}, {"title": "Note = a = b"}],
)  # fmt: skip
def test_bad_mdocs_are_refused(tmp_path, change):
    with pytest.raises(FormatError, match=r"a\.mdoc"):
        read_tilts(serialem(tmp_path, **change))


@pytest.mark.parametrize("text", ["", "PixelSpacing = 1\n", "no mdoc at all\n", "[ZValue = 0]\nTiltAngle =\n"])
def test_mdocs_without_sections_are_refused(tmp_path, text):
    (tmp_path / "a.mdoc").write_text(text)
    with pytest.raises(FormatError, match=r"a\.mdoc"):
        read_mdoc(tmp_path / "a.mdoc")


def test_sections_must_number_the_stack(tmp_path):
    write_series(tmp_path / "a.mrc", example())
    mdoc = tmp_path / "a.mrc.mdoc"
    mdoc.write_text(mdoc.read_text().replace("[ZValue = 6]", "[ZValue = 5]"))
    with pytest.raises(FormatError, match="ZValue: expected each of 0 to 6 once"):
        read_series(tmp_path / "a.mrc")


@pytest.mark.parametrize(("name", "order"), [("a=b.mrc", range(7)), ("a.mrc", [0, 0, 1, 2, 3, 4, 5])])
def test_what_an_mdoc_cannot_hold_is_refused(tmp_path, name, order):
    with pytest.raises(ValueError, match=r"a\.mdoc"):
        write_mdoc(tmp_path / "a.mdoc", example(), name, order)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", [".tlt", ".rawtlt"])
def test_lists_of_angles(tmp_path, suffix):
    wanted = torch.tensor([-60.0, -0.0, 1 / 3, 59.99], dtype=torch.float64)
    write_tlt(tmp_path / f"a{suffix}", wanted)
    assert (tmp_path / f"a{suffix}").read_text().splitlines()[1] == "0"
    with pytest.warns(UserWarning, match="doses are zero"):
        got = TiltScheme.from_file(tmp_path / f"a{suffix}")
    torch.testing.assert_close(got.angles, wanted)


@pytest.mark.parametrize(
    ("name", "text", "field"),
    [
        ("a.tlt", "1.0\n\ntwo\n", "line 3"),
        ("a.tlt", "1.0 2.0\n", "line 1"),
        ("a.rawtlt", "0\nnan\n", "line 2"),
        ("a.tlt", "90\n", "line 1"),
        ("a.tlt", "", "file"),
        ("a.txt", "1.0\n", "suffix"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_lists_are_refused(tmp_path, name, text, field):
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=name) as caught:
        read_tilts(tmp_path / name)
    assert caught.value.field == field
