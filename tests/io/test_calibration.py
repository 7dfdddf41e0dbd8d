"""Alignments and CTF fits written for other programs, and what libraries that are not ours read in them.

The geometry is of no symmetry: an axis beside 0 and 90 degrees, shifts that differ along x and y, images that are not
square, an azimuth of its own for each tilt; and the stack stands neither in the order of exposure nor by angle.
"""

import math
import warnings
from xml.etree import ElementTree

import mrcfile
import numpy
import pytest
import starfile
import torch

from cryosim.acquisition.series import Movie, Stack, TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.io.calibration import calibration_path, write_calibration
from cryosim.io.import_series import import_series
from cryosim.io.mrc import write_stack
from cryosim.io.series import read_series, write_series
from cryosim.microscope.optics import Optics, ctf
from tests.io.test_ctf_text import phase_flip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cryoet_alignment.io.aretomo3 import AreTomo3ALN
    from cryoet_alignment.io.aretomo3.ctf import AreTomo3CTF
    from cryoet_alignment.io.imod import ImodAlignment
    from cryoet_alignment.io.relion import RelionAlignment
    from cryoet_alignment.io.warp import WarpAlignment

PIXEL, SHAPE = 2.5, (49, 64)
NOMINAL = torch.tensor([0.0, 12.0, -12.0, -24.0, 24.0, 36.0, -36.0], dtype=torch.float64)  # in the order of exposure
FOUND = NOMINAL + torch.tensor([0.3, 0.1, -0.2, 0.4, -0.1, 0.2, -0.3], dtype=torch.float64)
SHIFTS = torch.tensor(
    [[3.1, -7.7], [0.5, 12.3], [-20.2, 5.0], [8.8, 8.1], [-1.0, -2.0], [6.4, -0.3], [-11.0, 4.5]], dtype=torch.float64
)
AXIS = -83.4
OPTICS = Optics(
    voltage=200.0,
    defocus=torch.tensor([21000.0, 22000.0, 19000.0, 18000.0, 24000.0, 20500.0, 23000.0], dtype=torch.float64),
    astigmatism=torch.tensor([300.0, 700.0, 500.0, 900.0, 400.0, 600.0, 800.0], dtype=torch.float64),
    astigmatism_angle=torch.tensor([-83.0, 31.0, 12.0, 75.0, -20.0, 50.0, -45.0], dtype=torch.float64),
    phase_shift=torch.tensor([10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0], dtype=torch.float64),
    spherical_aberration=2.6,
    amplitude_contrast=0.08,
)
N = len(NOMINAL)
ORDERS = {  # section of each exposure
    "by angle": torch.argsort(torch.argsort(NOMINAL)),
    "by exposure": torch.arange(N),
    "in none": torch.tensor([4, 0, 6, 2, 5, 1, 3]),
}
BOTH = (".star", ".xml")
ALIGNMENTS, FITS = (".xf", ".aln", *BOTH), (".defocus", ".txt", *BOTH)


def acquired(folder, order="in none", movies=False):
    """A stack with its exposures beside it, whose images have the mean 20 + exposure; the series as it is read."""
    places = ORDERS[order]
    images = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1)) + 19.5 + torch.arange(N)[:, None, None]
    at = torch.argsort(places)  # exposure of each section
    if movies:
        given = TiltSeries(images, PIXEL, TiltScheme(NOMINAL, torch.full((N,), 2.0), axis_angle=85.0))
        write_series(folder / "s.mrc", given.replace(movies=tuple(Movie(f"frames/{i}.eer", 9) for i in range(N))))
        return import_series(folder / "s.mrc")
    write_stack(folder / "s.mrc", images[at], PIXEL)
    rows = zip(NOMINAL[at].tolist(), at.tolist(), strict=True)
    (folder / "s_TLT.txt").write_text("".join(f"{angle} {exposure + 1} 2.0\n" for angle, exposure in rows))
    return import_series(folder / "s.mrc")


def found(series):
    """The series with what was found of it."""
    kept = [NOMINAL.tolist().index(angle) for angle in series.tilts.angles.tolist()]
    tilts = series.tilts.replace(angles=FOUND[kept], shifts=SHIFTS[kept], axis_angle=AXIS)
    return series.replace(tilts=tilts, optics=OPTICS.index(torch.tensor(kept)))


def quietly(*arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return import_series(*arguments, **named)


def expect_same(got, series, *, alignment, fits):
    assert torch.equal(got.images, series.images)
    if alignment:
        torch.testing.assert_close(got.tilts.angles, series.tilts.angles, atol=1e-6, rtol=0)
        torch.testing.assert_close(got.tilts.shifts, series.tilts.shifts, atol=1e-5, rtol=0)
        assert got.tilts.axis_angle == pytest.approx(AXIS, abs=1e-6)
    if fits:
        assert float((ctf(got.optics, SHAPE, PIXEL) - ctf(series.optics, SHAPE, PIXEL)).abs().max()) < 1e-5


# --------------------------------------------------------------------------------------------------- and read again


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("suffix", sorted({*ALIGNMENTS, *FITS}))
def test_what_is_written_comes_back(tmp_path, suffix, order):
    """Of the same sections, with the same units and signs, in the order of exposure."""
    series = found(acquired(tmp_path, order))
    with mrcfile.open(tmp_path / "s.mrc") as stack:
        for image, section in zip(series.images, series.stack.sections.tolist(), strict=True):
            assert numpy.array_equal(stack.data[section], image.numpy())
    (tmp_path / "out").mkdir()
    files = write_calibration(tmp_path / "out" / f"found{suffix}", series)
    assert all(file.is_file() for file in files)
    alignment, fits = suffix in ALIGNMENTS, suffix in FITS
    named = {"alignment": files[0]} if alignment else {"ctf_file": files[0], "voltage": 200.0}
    if suffix == ".defocus":
        named["optics"] = Optics(200.0, spherical_aberration=2.6, amplitude_contrast=0.08)
    expect_same(quietly(tmp_path / "s.mrc", **named), series, alignment=alignment, fits=fits)


@pytest.mark.parametrize("suffix", sorted({*ALIGNMENTS, *FITS}))
def test_sections_that_were_left_out_stay_so(tmp_path, suffix):
    acquired(tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        series = found(import_series(tmp_path / "s.mrc", exclude=[1, 3]))
    path = tmp_path / f"found{suffix}"
    if suffix == ".xf":
        with pytest.warns(UserWarning, match=r"`EXCLUDELIST 2,4` in tilt.com"):
            write_calibration(path, series)
        assert path.read_text().splitlines()[1].split()[:2] == ["1.00000000", "0.00000000"]
        assert float(path.with_suffix(".tlt").read_text().split()[3]) == float(NOMINAL[6])
    else:
        write_calibration(path, series)
    alignment, fits = suffix in ALIGNMENTS, suffix in FITS
    named = {"alignment": path} if alignment else {"ctf_file": path, "voltage": 200.0, "exclude": [1, 3]}
    if suffix == ".defocus":
        named["optics"] = Optics(200.0, spherical_aberration=2.6, amplitude_contrast=0.08)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = import_series(tmp_path / "s.mrc", **named)
    expect_same(got, series, alignment=alignment, fits=fits)


def test_both_parts_of_one_series(tmp_path):
    """An .xf beside a .defocus is what one .star has."""
    series = found(acquired(tmp_path))
    for name in ("found.xf", "found.defocus"):
        write_calibration(tmp_path / name, series)
    constants = Optics(200.0, spherical_aberration=2.6, amplitude_contrast=0.08)
    named = {"alignment": tmp_path / "found.xf", "ctf_file": tmp_path / "found.defocus", "optics": constants}
    expect_same(quietly(tmp_path / "s.mrc", **named), series, alignment=True, fits=True)


# ------------------------------------------------------------------------------------------------ libraries not ours


def test_relions_file_in_other_hands(tmp_path):
    series = found(acquired(tmp_path))
    write_calibration(tmp_path / "found.star", series, hand=-1)
    outside = RelionAlignment.from_file(tmp_path / "found.star")
    assert outside.hand == -1 and outside.voltage == 200.0 and outside.spherical_aberration == 2.6
    told = starfile.read(tmp_path / "found.star", always_dict=True)["global"]
    assert told["rlnTomoTiltSeriesStarFile"].tolist() == ["tilt_series/s.star"]
    assert [told[f"rlnTomoSize{x}"].item() for x in "XYZ"] == [64, 50, 32]  # even; half as thick as wide
    table = starfile.read(tmp_path / "tilt_series/s.star", always_dict=True)["s"]
    numbers = [int(name.split("@")[0]) - 1 for name in table["rlnMicrographName"]]
    assert {name.split("@")[1] for name in table["rlnMicrographName"]} == {"s.mrc:mrcs"}
    assert numbers == list(range(N))
    rows = torch.argsort(ORDERS["in none"])  # exposure of each line
    assert table["rlnTomoYTilt"].tolist() == pytest.approx(FOUND[rows].tolist())
    assert table["rlnTomoNominalStageTiltAngle"].tolist() == NOMINAL[rows].tolist()
    assert table["rlnTomoXShiftAngst"].tolist() == pytest.approx(SHIFTS[rows, 0].tolist())
    assert table["rlnTomoYShiftAngst"].tolist() == pytest.approx(SHIFTS[rows, 1].tolist())
    assert table["rlnMicrographPreExposure"].tolist() == (2.0 * rows).tolist()
    lens = zip(*(table[f"rln{label}"] for label in ("DefocusU", "DefocusV", "DefocusAngle", "PhaseShift")), strict=True)
    expect_transfer([(u, v, azimuth, phase) for u, v, azimuth, phase in lens], rows)


def test_warps_file_in_other_hands(tmp_path):
    series = found(acquired(tmp_path))
    write_calibration(tmp_path / "found.xml", series, hand=-1)
    root = ElementTree.parse(tmp_path / "found.xml").getroot()
    assert root.get("AreAnglesInverted") == "True"
    outside, rows = WarpAlignment.from_file(tmp_path / "found.xml"), torch.argsort(ORDERS["in none"])
    assert [entry.tilt_angle for entry in outside.entries] == pytest.approx((-FOUND[rows]).tolist())
    assert {entry.tilt_axis_angle for entry in outside.entries} == {AXIS}
    offsets = [(entry.tilt_axis_offset_x, entry.tilt_axis_offset_y) for entry in outside.entries]
    half = torch.tensor([0.0, -PIXEL / 2], dtype=torch.float64)  # its centre of 49 rows is 24.5
    torch.testing.assert_close(torch.tensor(offsets).double(), SHIFTS[rows] + half, atol=1e-5, rtol=0)
    grids = [
        [float(node.get("Value", "")) for node in root.findall(f"{name}/Node")]
        for name in ("GridCTF", "GridCTFDefocusDelta", "GridCTFDefocusAngle", "GridCTFPhase")
    ]
    lens = [
        (1e4 * (mean + delta / 2), 1e4 * (mean - delta / 2), azimuth, 180 * phase)  # [µm], [µm], [deg], [pi]
        for mean, delta, azimuth, phase in zip(*grids, strict=True)
    ]
    expect_transfer(lens, rows)
    constants = {param.get("Name"): float(param.get("Value", "")) for param in root.findall("CTF/Param")}
    assert constants["Voltage"] == 200.0 and constants["Cs"] == 2.6 and constants["Amplitude"] == 0.08


def test_aretomos_and_imods_alignment_in_other_hands(tmp_path):
    acquired(tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        series = found(import_series(tmp_path / "s.mrc", exclude=[3]))
    write_calibration(tmp_path / "found.aln", series)
    outside, rows = AreTomo3ALN.from_file(tmp_path / "found.aln"), torch.argsort(ORDERS["in none"]).tolist()
    kept = [0, 1, 2, 4, 5, 6]
    assert outside.RawSize == (64, 49, N)
    assert [entry.sec for entry in outside.GlobalAlignments] == [z + 1 for z in kept]
    for z, entry in zip(kept, outside.GlobalAlignments, strict=True):
        expected = [float(FOUND[rows[z]]), AXIS, *(SHIFTS[rows[z]] / PIXEL).tolist()]
        assert [entry.tilt, entry.rot, entry.tx, entry.ty] == pytest.approx(expected, abs=1e-5)
    (dark,) = outside.DarkFrames  # place by angle, section, angle
    assert (dark.section_idx, dark.val2, dark.angle) == (0, 4, -36.0)
    series = found(acquired(tmp_path))
    files = write_calibration(tmp_path / "found.xf", series)
    imod = ImodAlignment.read(xf_path=files[0], tlt_path=files[1])
    assert imod.tlt.numpy().tolist() == pytest.approx(FOUND[rows].tolist())
    for line, row in zip(imod.xf.numpy().tolist(), rows, strict=True):
        cos, sin = math.cos(math.radians(AXIS)), math.sin(math.radians(AXIS))
        assert line[:4] == pytest.approx([cos, sin, -sin, cos], abs=1e-7)
        x, y = (SHIFTS[row] / PIXEL + torch.tensor([0.5, 0.0])).tolist()  # 64 columns: its centre is 31.5
        assert line[4:] == pytest.approx([-cos * x - sin * y, sin * x - cos * y], abs=1e-6)


def test_fits_in_text_in_other_hands(tmp_path):
    series, rows = found(acquired(tmp_path)), torch.argsort(ORDERS["in none"])
    write_calibration(tmp_path / "found.txt", series)
    outside = AreTomo3CTF.from_file(tmp_path / "found.txt").rows
    assert [row.micrograph for row in outside] == list(range(1, N + 1))
    expect_transfer([(r.df_max_a, r.df_min_a, r.azimuth_deg, math.degrees(r.phase_rad)) for r in outside], rows)
    write_calibration(tmp_path / "found.defocus", series)
    head, *lines = ([float(w) for w in line.split()] for line in (tmp_path / "found.defocus").read_text().splitlines())
    assert head == [5, 0, 0, 0, 0, 3]  # astigmatism and phase shift, both in degrees; version 3
    assert [line[:2] for line in lines] == [[view, view] for view in range(1, N + 1)]
    assert [line[2] for line in lines] == pytest.approx(FOUND[rows].tolist())
    expect_transfer([(10 * u, 10 * v, azimuth, phase) for *_, u, v, azimuth, phase in lines], rows)  # [nm]


def expect_transfer(lens, rows):
    """Lenses (section,) of two defoci [Å], azimuth and phase shift [deg] image as those of the exposures do."""
    for (first, second, azimuth, phase), row in zip(lens, rows.tolist(), strict=True):
        assert first > second
        expected = phase_flip(first, second, azimuth, SHAPE, PIXEL, 200.0, 2.6, 0.08, phase)
        got = ctf(OPTICS.index(torch.tensor([row])), SHAPE, PIXEL)[0]
        assert float((got - expected).abs().max()) < 1e-5  # measured: 4e-7 at most, of the digits written
        turned = phase_flip(first, second, -azimuth, SHAPE, PIXEL, 200.0, 2.6, 0.08, phase)
        assert float((got - turned).abs().max()) > 0.05


# ------------------------------------------------------------------------------------------------------ files, errors


def test_a_series_that_was_never_read_stands_by_angle(tmp_path):
    """As `write_series` puts it."""
    series = TiltSeries(torch.zeros(N, *SHAPE), PIXEL, TiltScheme(FOUND, torch.ones(N), SHIFTS, AXIS), OPTICS)
    write_calibration(tmp_path / "s.star", series)
    table = starfile.read(tmp_path / "tilt_series/s.star", always_dict=True)["s"]
    assert table["rlnTomoYTilt"].tolist() == sorted(FOUND.tolist())
    negative = OPTICS.replace(astigmatism=-torch.as_tensor(OPTICS.astigmatism), phase_shift=0.0)
    write_calibration(tmp_path / "s.defocus", series.replace(optics=negative))
    head, line, *_ = (tmp_path / "s.defocus").read_text().splitlines()
    assert head.split()[0] == "1" and len(line.split()) == 7  # no phase shift
    assert float(line.split()[6]) == pytest.approx(45.0)  # -45 of the smaller defocus


def test_movies_are_seen_from_the_file(tmp_path):
    series = found(acquired(tmp_path, movies=True))
    (tmp_path / "out").mkdir()
    write_calibration(tmp_path / "out" / "s.star", series)
    table = starfile.read(tmp_path / "out/tilt_series/s.star", always_dict=True)["s"]
    assert table["rlnMicrographMovieName"][0] == "../frames/6.eer"
    assert table["rlnMicrographName"][0] == "000001@../s.mrc:mrcs"
    away = series.replace(movies=tuple(Movie(rf"D:\my data\{i}.eer", 9) for i in range(N)))
    write_calibration(tmp_path / "out" / "s.star", away)  # a path of the microscope's own computer
    assert "rlnMicrographMovieName" not in (tmp_path / "out/tilt_series/s.star").read_text()


def test_a_list_that_tells_doses_is_kept(tmp_path):
    series = acquired(tmp_path, "by angle")
    lines = "".join(f"{angle} {i} 2.0\n" for i, angle in enumerate(sorted(NOMINAL.tolist())))
    (tmp_path / "s.rawtlt").write_text(lines)
    write_calibration(tmp_path / "s.xf", found(series))
    assert (tmp_path / "s.rawtlt").read_text() == lines
    (tmp_path / "s.rawtlt").write_text("1\n2\n")  # of another series
    write_calibration(tmp_path / "s.xf", found(series))
    assert [float(word) for word in (tmp_path / "s.rawtlt").read_text().split()] == sorted(NOMINAL.tolist())


@pytest.mark.parametrize("suffix", sorted({*ALIGNMENTS, *FITS}))
def test_a_write_that_fails_leaves_the_old_files(tmp_path, suffix, monkeypatch):
    series = found(acquired(tmp_path))
    write_calibration(tmp_path / f"found{suffix}", series)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("cryosim.io.files.sync", full)
    moved = series.replace(tilts=series.tilts.replace(shifts=-SHIFTS), optics=OPTICS.replace(defocus=1e4))
    with pytest.raises(OSError, match="no space"):
        write_calibration(tmp_path / f"found{suffix}", moved)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_what_is_refused(tmp_path):
    series = acquired(tmp_path)
    with pytest.raises(ValueError, match=r"found.csv: suffix: expected one of .xf \(IMOD\), .aln .*, got '.csv'. Name"):
        write_calibration(tmp_path / "found.csv", series)
    with pytest.raises(ValueError, match=r".defocus \(IMOD\), .txt \(CTFFIND\), which hold CTF fits, got '.xf'"):
        calibration_path(tmp_path / "found.xf", "ctf")
    with pytest.raises(ValueError, match=r".xml \(Warp\), which hold an alignment, got '.defocus'"):
        calibration_path(tmp_path / "found.defocus", "alignment")
    with pytest.raises(ValueError, match="existing folder"):
        calibration_path(tmp_path / "nowhere" / "found.xf")
    for suffix in (".star", ".defocus", ".txt"):
        with pytest.raises(ValueError, match="optics: expected a series with voltage and defocus.* Fit the CTF first"):
            write_calibration(tmp_path / f"found{suffix}", series)
    for suffix in BOTH:
        with pytest.raises(ValueError, match="hand: expected 1 or -1, got"):
            write_calibration(tmp_path / f"found{suffix}", found(series), hand=0)
    volts = OPTICS.replace(voltage=torch.linspace(200, 300, N))
    with pytest.raises(ValueError, match="Optics.voltage: expected one value for the series"):
        write_calibration(tmp_path / "found.txt", series.replace(optics=volts))
    assert not list(tmp_path.glob("found*"))


def test_where_images_stand(tmp_path):
    """A stack is told by both readers, goes along with what is picked out, and has to fit."""
    series = acquired(tmp_path)
    assert series.stack.sections.tolist() == ORDERS["in none"].tolist()
    assert series.stack.angles == tuple(NOMINAL[torch.argsort(ORDERS["in none"])].tolist())
    assert series.index([2, 0]).stack.sections.tolist() == [6, 4]
    write_series(tmp_path / "t.mrc", series)
    again = read_series(tmp_path / "t.mrc")
    assert again.stack.sections.tolist() == ORDERS["by angle"].tolist()
    assert again.stack.angles == tuple(sorted(NOMINAL.tolist()))
    with pytest.raises(ValueError, match="each at most once"):
        Stack("s.mrc", torch.tensor([1, 1]), (0.0, 1.0))
    with pytest.raises(ValueError, match="sections from 0 to 1"):
        Stack("s.mrc", torch.tensor([2]), (0.0, 1.0))
    with pytest.raises(ValueError, match="TiltSeries.stack: expected a section for each of 7 tilts"):
        series.replace(stack=Stack("s.mrc", torch.tensor([1]), (0.0, 1.0)))
