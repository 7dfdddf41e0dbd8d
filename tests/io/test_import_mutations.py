"""Real files come cut, doubled, in other units and with other people's edits: each is refused with file and field."""

import re
import shutil

import pytest
import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.io.aretomo import write_aln
from cryosim.io.files import FormatError
from cryosim.io.imod import write_xf
from cryosim.io.import_series import import_series
from cryosim.io.relion import write_relion
from cryosim.io.series import write_series
from cryosim.io.tilts import write_tlt
from cryosim.io.warp import write_warp
from cryosim.microscope.optics import Optics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PIXEL, SHAPE = 1.7, (24, 32)
NOMINAL = torch.tensor([0.0, 12.0, -12.0, -48.0, 48.0], dtype=torch.float64)  # in the order of exposure
TILTS = TiltScheme(
    NOMINAL + 0.1,
    torch.full((5,), 3.0),
    torch.tensor([[3.1, -7.7], [0, 12.3], [-9, 5], [8, 8], [-1, -2]]).double(),
    85.0,
)
OPTICS = Optics(voltage=200.0, defocus=20000.0, astigmatism=300.0, spherical_aberration=2.7, amplitude_contrast=0.07)
FITS = "".join(f"{z} 20300.0 20000.0 31.0 0.0 0.03 5.3\n" for z in range(1, 6))
GIVEN = {  # what a file is given as; the others are found beside it
    "a.xf": {"alignment": "a.xf"},
    "a.tlt": {"alignment": "a.xf"},
    "a.xtilt": {"alignment": "a.xf"},
    "tilt.com": {"alignment": "a.xf"},
    "a.aln": {"alignment": "a.aln"},
    "a.xml": {"alignment": "a.xml"},
    "a.star": {"alignment": "a.star"},
    "tilt_series/s.star": {"alignment": "a.star"},
    "a.defocus": {"ctf_file": "a.defocus"},
    "fit.txt": {"ctf_file": "fit.txt"},
    "a.rawtlt": {"angles": "a.rawtlt"},
    "a_TLT.txt": {"angles": "a_TLT.txt"},
    "s.mrc.mdoc": {},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a series and the files of every program, all of them right."""
    folder = tmp_path_factory.mktemp("série ü")
    images = torch.poisson(torch.full((5, *SHAPE), 20.0), generator=torch.Generator().manual_seed(3))
    write_series(folder / "s.mrc", TiltSeries(images, PIXEL, TILTS.replace(angles=NOMINAL)))
    (folder / "s.mrc.mdoc").write_text("Voltage = 200\n" + (folder / "s.mrc.mdoc").read_text())
    write_xf(folder / "a.xf", TILTS, PIXEL, SHAPE, nominal=NOMINAL)
    write_tlt(folder / "a.xtilt", [0.0] * 5)
    (folder / "tilt.com").write_text(
        "$tilt -StandardInput\nInputProjections a_ali.mrc\nXAXISTILT 0.0\nEXCLUDELIST2 5\n"
    )
    write_aln(folder / "a.aln", TILTS, PIXEL, SHAPE, nominal=NOMINAL)
    write_warp(folder / "a.xml", TILTS, PIXEL, SHAPE, (30, 32, 40), nominal=NOMINAL, optics=OPTICS)
    write_relion(folder / "a.star", TILTS, OPTICS, PIXEL, (30, 32, 40), name="s", stack="s.mrc", nominal=NOMINAL)
    views = "".join(f"{view} {view} 0 0 2000 1990 31\n" for view in range(1, 6))
    (folder / "a.defocus").write_text("1 0 0. 0. 0. 3\n" + views)
    (folder / "fit.txt").write_text("# spherical aberration: 2.70 mm ; amplitude contrast: 0.07\n" + FITS)
    write_tlt(folder / "a.rawtlt", sorted(NOMINAL.tolist()))
    (folder / "a_TLT.txt").write_text("".join(f"{a} {i + 1} 3.0\n" for i, a in enumerate(sorted(NOMINAL.tolist()))))
    return folder


def imported(folder, name):
    return import_series(folder / "s.mrc", **{key: folder / file for key, file in GIVEN[name].items()})


def half(text):
    return text[: len(text) // 2]


def blank(text):
    return " \n\n"


def twice(text):
    return text + text


def last_line_lost(text):
    return "\n".join(text.rstrip().splitlines()[:-1]) + "\n"


def last_line_twice(text):
    return text.rstrip() + "\n" + text.rstrip().splitlines()[-1] + "\n"


def exchanged(pattern, replacement, count=1):
    def change(text):
        changed, n = re.subn(pattern, replacement, text, count=count, flags=re.MULTILINE)
        assert n, f"{pattern} is not in the file"
        return changed

    return change


CUTS = [
    *((name, change) for name in ("a.xf", "a.tlt", "a.xtilt", "a.rawtlt", "fit.txt") for change in (half, twice)),
    *((name, change) for name in ("a.xf", "a.xml", "a.rawtlt", "a_TLT.txt", "a.xtilt") for change in (last_line_lost,)),
    *((name, change) for name in ("a.xf", "a.tlt", "a.xml", "a_TLT.txt", "fit.txt") for change in (last_line_twice,)),
    *((name, change) for name in GIVEN if name != "tilt.com" for change in (blank,)),
    *((name, change) for name in ("a.aln", "a.xml", "a.star", "tilt_series/s.star", "a_TLT.txt") for change in (half,)),
    *((name, change) for name in ("a.aln", "a.xml", "a.star", "s.mrc.mdoc", "a.defocus") for change in (twice,)),
]
WRONG = [  # file, change, field that is named
    ("a.xf", exchanged(r"^\s*\S+", "nan"), "line 1"),
    ("a.xf", exchanged(r"(\S+)$", "1e300"), "section 0, shift"),
    ("a.xf", exchanged(r"(\S+)$", "-1e9"), "section 0, shift"),
    ("a.xf", exchanged(r"^\s*\S+\s+\S+", "5 0"), "matrix"),
    ("a.xf", exchanged(r"(\S+)$", ""), "lines"),
    ("a.tlt", exchanged(r"^-47\S*", "inf"), "angles"),
    ("a.tlt", exchanged(r"^-47\S*", "-148"), "angles"),
    ("a.tlt", exchanged(r"^-47\S*", "48"), "angles"),
    ("a.xtilt", exchanged(r"^0", "nan"), "tilts about x"),
    ("a.xtilt", exchanged(r"^0", "12"), "tilts about x"),
    ("tilt.com", exchanged("XAXISTILT 0.0", "XAXISTILT many"), "XAXISTILT"),
    ("tilt.com", exchanged("XAXISTILT 0.0", "OFFSET 1e300"), "OFFSET"),
    ("tilt.com", exchanged("LIST2 5", "LIST2 1-5"), "at least one image"),
    ("tilt.com", exchanged("LIST2 5", "LIST2 5-1"), "exclude list"),
    ("tilt.com", exchanged(" ", "\0"), "content"),
    ("a.aln", exchanged(r"RawSize = 32 24 5", "RawSize = 32 24 999999999999"), "sections"),
    ("a.aln", exchanged(r"RawSize = 32 24 5", "RawSize = 320 240 5"), "size of an image"),
    ("a.aln", exchanged(r"RawSize = .*", "RawSize = 32"), "content"),
    ("a.aln", exchanged(r"NumPatches = 0", "NumPatches = 9"), "Local Alignment"),
    ("a.aln", exchanged(r"(^ +2 +\S+ +)1.00000", r"\1nan"), "GMAG at SEC 2"),
    ("a.aln", exchanged(r"(^ +2 +)\S+", r"\1nan"), "matrices"),
    ("a.aln", exchanged(r"^ +2 ", " 3 "), "sections"),
    ("a.aln", exchanged(r"^ +2 .*\n", ""), "sections"),
    ("a.aln", exchanged(r"^( +2 .*\n)", r"\1\1"), "sections"),
    ("a.aln", exchanged(r"BetaOffset =.*", "BetaOffset = -1e9"), "BetaOffset"),
    ("a.xml", exchanged("Angles>-?[\\d.]+", "Angles>nan"), "angles"),
    ("a.xml", exchanged("<Dose>[\\d.]+", "<Dose>-3"), "prior doses"),
    ("a.xml", exchanged("<AxisOffsetX>[-\\d.]+", "<AxisOffsetX>1e300"), "section 0, shift"),
    ("a.xml", exchanged("True", "False", 5), "at least one image"),
    ("a.xml", exchanged('ImageDimensionsAngstrom="[^"]*"', 'ImageDimensionsAngstrom="nan, 2"'), "ImageDimensionsAngs"),
    ("a.xml", exchanged('(GridCTF W.*\\n.*Value=")[^"]*', "\\1inf"), "GridCTF"),
    ("a.xml", exchanged('(GridCTF W.*\\n.*Z=")0', "\\g<1>1"), "GridCTF"),
    ("a.xml", exchanged('"Voltage" Value="[^"]*"', '"Voltage" Value="200000"'), "voltage"),
    ("a.star", exchanged("\t1.7\ttilt", "\t0\ttilt"), "_rlnTomoTiltSeriesPixelSize"),
    ("a.star", exchanged("\t1.7\ttilt", "\t-1.7\ttilt"), "_rlnTomoTiltSeriesPixelSize"),
    ("a.star", exchanged("tilt_series/s.star", "tilt_series/none.star"), "file"),
    ("a.star", exchanged("\t0.07\t", "\t7\t"), "amplitude_contrast"),
    ("tilt_series/s.star", exchanged("000002@", "000001@"), "sections"),
    ("tilt_series/s.star", exchanged("000005@", "000009@"), "sections"),
    ("tilt_series/s.star", exchanged("_rlnTomoZRot", "_rlnTomoYTilt"), "_rlnTomoZRot"),
    ("tilt_series/s.star", exchanged("\t20150\t", "\tnan\t"), "_rlnDefocusU"),
    ("tilt_series/s.star", exchanged("\t20150\t", "\t2e9\t"), "defocus"),
    ("tilt_series/s.star", exchanged("_rlnDefocusV", "_rlnOther"), "_rlnDefocusV"),
    ("a.defocus", exchanged("3$", "1"), "version"),
    ("a.defocus", exchanged("^1 1 .*", "1 999999999 0 0 2000 1990 31"), "entry 1"),
    ("a.defocus", exchanged("^2 2 ", "2 1 "), "entry 2"),
    ("a.defocus", exchanged(" 31$", ""), "entry 1"),
    ("a.defocus", exchanged("2000 ", "20000000 "), "defocus"),
    ("fit.txt", exchanged("^2 ", "1 "), "numbers of images"),
    ("fit.txt", exchanged("20300.0", "nan"), "line 2"),
    ("fit.txt", exchanged("20300.0", "-1e9"), "row 1, defocus"),
    ("fit.txt", exchanged("^5 ", "6 "), "sections"),
    ("a.rawtlt", exchanged("^-48", "minus"), "line 1"),
    ("a.rawtlt", exchanged("^-48", "-12"), "angles"),
    ("a_TLT.txt", exchanged("^-48.0 1 ", "-48.0 2 "), "order of exposure"),
    ("a_TLT.txt", exchanged("^-48.0 1 3.0", "-48.0 1 -3.0"), "line 1"),
    ("a_TLT.txt", exchanged("^-48.0 1 3.0", "-48.0 1"), "lines"),
    ("s.mrc.mdoc", exchanged("PixelSpacing = 1.7", "PixelSpacing = -1.7"), "PixelSpacing"),
    ("s.mrc.mdoc", exchanged("^Voltage = 200", "Voltage = 200\nNote = a = b"), "line 2"),
    ("s.mrc.mdoc", exchanged("^Voltage = 200", "Voltage\n"), "line 1"),
    ("s.mrc.mdoc", exchanged("^Voltage = 200", "Voltage = high"), "Voltage"),
    ("fit.txt", exchanged(" 0.03 5.3$", ""), "line 2"),
    ("fit.txt", exchanged(" 5.3$", " 5.3 2"), "columns"),
    ("s.mrc.mdoc", exchanged("PixelSpacing = 1.7", "PixelSpacing = 3.4"), "pixel size"),
    ("s.mrc.mdoc", exchanged("axis angle = 85", "axis angle = 1e300"), "Tilt axis angle"),
    ("s.mrc.mdoc", exchanged("^ExposureDose = 3", "ExposureDose = -3"), "ExposureDose"),
    ("s.mrc.mdoc", exchanged("PriorRecordDose = 0", "PriorRecordDose = -1e9"), "PriorRecordDose"),
    ("s.mrc.mdoc", exchanged("TiltAngle = -48", "TiltAngle = -12"), "angles"),
    ("s.mrc.mdoc", exchanged("TiltAngle = -48", "TiltAngle = 200"), "tilt angles"),
    ("s.mrc.mdoc", exchanged("DateTime = 01-Jan", "DateTime = 41-Jan"), "DateTime"),
]


def refused(whole, tmp_path, name, change):
    folder = tmp_path / "ordner ß"
    shutil.copytree(whole, folder)
    (folder / name).write_text(change((whole / name).read_text()), newline="")
    with pytest.raises(ValueError) as caught:
        imported(folder, name)
    assert str(folder) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", GIVEN)
def test_whole_files_are_taken(whole, name):
    assert imported(whole, name).images.shape[1:] == SHAPE


@pytest.mark.parametrize(("name", "change"), CUTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_cut_or_doubled_file(whole, tmp_path, name, change):
    assert isinstance(refused(whole, tmp_path, name, change), FormatError)


@pytest.mark.parametrize(("name", "change", "field"), WRONG, ids=[f"{i}-{n}-{f}" for i, (n, _, f) in enumerate(WRONG)])
def test_a_wrong_entry(whole, tmp_path, name, change, field):
    assert field in str(refused(whole, tmp_path, name, change))


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("change", [lambda s: s.replace("\n", "\r\n"), lambda s: "\ufeff" + s], ids=["crlf", "bom"])
def test_other_line_ends_and_byte_order_marks_change_nothing(whole, tmp_path, name, change):
    folder = tmp_path / "d"
    shutil.copytree(whole, folder)
    (folder / name).write_text(change((whole / name).read_text()), newline="")
    got, expected = imported(folder, name), imported(whole, name)
    assert torch.equal(got.images, expected.images) and torch.equal(got.tilts.shifts, expected.tilts.shifts)
    assert torch.equal(got.tilts.angles, expected.tilts.angles)
    assert (got.optics is None) is (expected.optics is None)
