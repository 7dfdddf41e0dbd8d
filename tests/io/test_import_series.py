"""Real series: whatever program aligned them, a point of the specimen is where that program sees it."""

import math
import re
import warnings

import pytest
import torch
from typer.testing import CliRunner

from cryosim.acquisition.series import Movie, TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import tilt_rotation
from cryosim.io.affine import resampled
from cryosim.io.aretomo import write_aln
from cryosim.io.files import FormatError
from cryosim.io.imod import write_xf
from cryosim.io.import_series import import_series
from cryosim.io.mrc import read_volume, write_stack
from cryosim.io.relion import write_relion
from cryosim.io.series import read_series, write_series
from cryosim.io.tilts import write_tlt
from cryosim.io.warp import write_warp
from cryosim.microscope.optics import Optics

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{said}") for said in ("order of exposure", "doses", "left out")]

PIXEL = 1.7  # [Å]
# x, y and z at different distances from the origin: no mirror image of it is itself
POINTS = torch.tensor([[0.0, 0, 0], [20, 0, 0], [0, 30, 0], [0, 0, 25], [13, -17, 11]], dtype=torch.float64)
NOMINAL = torch.tensor([0.0, 12.0, -12.0, -48.0, 48.0], dtype=torch.float64)  # in the order of exposure
FOUND = torch.tensor([0.3, 12.1, -11.7, -47.9, 48.2], dtype=torch.float64)
SHIFTS = torch.tensor([[3.1, -7.7], [0.0, 12.3], [-9.2, 5.0], [8.8, 8.1], [-1.0, -2.0]], dtype=torch.float64)
DOSES = torch.tensor([3.0, 2.0, 2.5, 4.0, 5.0], dtype=torch.float64)
SECTIONS = torch.argsort(NOMINAL)  # row of the scheme that stands in each section
PLACES = torch.argsort(SECTIONS)  # section of each row
OPTICS = Optics(voltage=300.0, defocus=20000.0, spherical_aberration=2.7, amplitude_contrast=0.07)


def truth(axis_angle=-83.4):
    return TiltScheme(FOUND, DOSES, SHIFTS, axis_angle=axis_angle)


def seen(tilts, image_shape, pixel=PIXEL):
    """Samples (tilt, point, 2) (x, y) at which the points are seen, counted from 0."""
    turned = torch.einsum("tij,pj->tpi", tilt_rotation(tilts.angles, tilts.axis_angle), POINTS)[..., :2]
    centre = torch.tensor([n // 2 for n in reversed(image_shape)], dtype=torch.float64)
    return centre + (turned + tilts.shifts[:, None]) / pixel


def acquired(folder, shape=(48, 64), name="s.mrc", axis_angle=85.3, **changes):
    """A series with nominal angles on disk, as a microscope leaves it; its images in the order of exposure."""
    images = torch.poisson(torch.full((5, *shape), 20.0), generator=torch.Generator().manual_seed(3))
    series = TiltSeries(images, PIXEL, TiltScheme(NOMINAL, DOSES, axis_angle=axis_angle)).replace(**changes)
    write_series(folder / name, series)
    return series


def quietly(*arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return import_series(*arguments, **named)


# ------------------------------------------------------------------------------------------- what this package writes


@pytest.mark.parametrize("shape", [(48, 64), (49, 63), (48, 63)])
@pytest.mark.parametrize("axis_angle", [0.0, -83.4, 178.9])
@pytest.mark.parametrize("kind", ["xf", "aln", "star", "xml"])
def test_what_is_written_comes_back(tmp_path, kind, axis_angle, shape):
    """Found beside the stack; the same points at the same places; images in the order of exposure."""
    series, tilts = acquired(tmp_path, shape), truth(axis_angle)
    if kind == "xf":
        write_xf(tmp_path / "s.xf", tilts, PIXEL, shape, nominal=NOMINAL)
    elif kind == "aln":
        write_aln(tmp_path / "s.aln", tilts, PIXEL, shape, nominal=NOMINAL)
    elif kind == "xml":
        write_warp(tmp_path / "s.xml", tilts, PIXEL, shape, (30, 32, 40), nominal=NOMINAL)
    else:
        write_relion(tmp_path / "s.star", tilts, OPTICS, PIXEL, (30, 32, 40), name="s", stack="s.mrc", nominal=NOMINAL)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    got = quietly(tmp_path / "s.mrc")
    assert (
        float((seen(got.tilts, shape) - seen(tilts, shape)).abs().max()) < 1e-6
    )  # measured: 5e-7 at most, in the digits of an .aln
    assert torch.equal(got.images, series.images) and got.pixel_size == pytest.approx(PIXEL)
    assert torch.equal(got.tilts.doses, DOSES)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_without_an_alignment_it_is_read_series(tmp_path):
    acquired(tmp_path, optics=OPTICS, movies=tuple(Movie(f"{i}.tif", 8) for i in range(5)))
    got, expected = quietly(tmp_path / "s.mrc"), read_series(tmp_path / "s.mrc")
    assert torch.equal(got.images, expected.images) and torch.equal(got.tilts.angles, expected.tilts.angles)
    assert got.tilts.axis_angle == 85.3 and got.tilts.dose_rate == expected.tilts.dose_rate
    assert got.movies == expected.movies and got.optics is not None and got.optics.defocus == 20000.0


def test_the_outside_package_agrees(tmp_path):
    """cryoet-alignment takes our RELION file to AreTomo's, IMOD's and Warp's; all of them say the same (even sizes)."""
    from cryoet_alignment.io.cryoet_data_portal import Alignment

    series, tilts, shape = acquired(tmp_path), truth(), (48, 64)
    write_relion(tmp_path / "t.star", tilts, OPTICS, PIXEL, (32, 32, 40), name="s", stack="s.mrc", nominal=NOMINAL)
    outside = Alignment.from_relion_file(tmp_path / "t.star")
    outside.to_aretomo((64, 48, 5)).to_file(tmp_path / "t.aln")
    outside.to_warp(PIXEL, (64, 48)).to_file(tmp_path / "t.xml")
    imod = outside.to_imod((64, 48, 5))
    imod.xf.to_file(tmp_path / "t.xf")
    imod.tlt.to_file(tmp_path / "t.tlt")
    wanted = seen(tilts, shape)
    # it knows no half pixels: IMOD turns about (n - 1) / 2, see cryosim.io.imod
    for name, off, digits in (("t.aln", 0.0, 6e-4), ("t.xml", 0.0, 1e-6), ("t.xf", -0.5, 6e-4)):
        got = quietly(tmp_path / "s.mrc", alignment=tmp_path / name)
        assert torch.equal(got.images, series.images)
        assert float((got.tilts.angles - FOUND).abs().max()) < 6e-3  # two digits in an .aln
        tilts_found = got.tilts.replace(angles=tilts.angles)
        assert float((seen(tilts_found, shape) - wanted - off).abs().max()) < digits, name


# ---------------------------------------------------------------------------------- what each program writes, by hand


def stack(folder, sections, name="s.mrc", shape=(48, 64), pixel=PIXEL):
    """A stack whose section z has the mean 20 + z, unless it is dark, with nothing beside it."""
    noise = torch.rand(len(sections), *shape, generator=torch.Generator().manual_seed(1)) - 0.5
    images = torch.stack([20.0 + z + noise[z] if alive else 0 * noise[z] for z, alive in enumerate(sections)])
    write_stack(folder / name, images, pixel)
    return images


def which(series):
    """Sections of the images of `stack`."""
    return (series.images.mean((1, 2)) - 20).round().int().tolist()


HEAD = "# SEC     ROT         GMAG       TX          TY      SMEAN     SFIT    SCALE     BASE     TILT\n"


def aln(folder, rows, dark, n, size="64 48", name="s.aln", alpha=0.0, beta=0.0, gmag=1.0):
    lines = ["# AreTomo Alignment / Priims bprmMn\n", f"# RawSize = {size} {n}\n", "# NumPatches = 0\n"]
    lines += [f"# DarkFrame =  {f:4d} {s:4d} {tilt:8.2f}\n" for f, s, tilt in dark]
    lines += [f"# AlphaOffset = {alpha:8.2f}\n", f"# BetaOffset = {beta:8.2f}\n", "# Thickness = 300\n", HEAD]
    for sec, rot, x, y, tilt in rows:
        lines.append(
            f"{sec:5d}  {rot:9.4f}  {gmag:9.5f}  {x:9.3f}  {y:9.3f}  "
            f"{1:7.2f}  {1:7.2f}  {1:7.2f}  {0:7.2f}  {tilt:8.2f}\n"
        )
    (folder / name).write_text("".join(lines))


def test_aretomo3_counts_from_1_in_a_sorted_stack(tmp_path):
    """Its _TLT.txt tells order and dose; AlphaOffset is contained in TILT."""
    stack(tmp_path, [1, 1, 0, 1, 1])
    (tmp_path / "s_TLT.txt").write_text(
        "  -24.00     4   3.1000\n  -12.00     2   3.0000\n    0.00     1   2.9000\n   12.00     3   3.0500\n"
        "   24.00     5   3.2000\n"
    )
    rows = [(1, 85.0, 3.0, 0.0, -15.0), (2, 85.0, 0.5, -4.25, -3.0), (4, 85.0, 1.0, 1.0, 21.0), (5, 85.0, 0, 0, 33.0)]
    aln(tmp_path, rows, [(2, 3, 9.0)], 5, alpha=9.0)
    with pytest.warns(UserWarning, match=r"left out: section 2 at 0 degrees \(left out in s.aln\).* 2.9 e-"):
        got = import_series(tmp_path / "s.mrc")
    assert which(got) == [1, 3, 0, 4]
    assert got.tilts.angles.tolist() == [-3.0, 21.0, -15.0, 33.0]
    assert got.tilts.doses.tolist() == pytest.approx([3.0, 3.05, 3.1, 3.2])
    torch.testing.assert_close(got.tilts.shifts, PIXEL * torch.tensor([[0.5, -4.25], [1, 1], [3, 0], [0, 0]]).double())
    assert got.tilts.axis_angle == pytest.approx(85.0)


def test_aretomo2_counts_from_0_in_the_order_of_the_stack(tmp_path):
    """A stack in the order of exposure, rows by ascending angle, F of a DarkFrame the place among these."""
    stack(tmp_path, [1] * 5)
    write_tlt(tmp_path / "s.rawtlt", [0.0, 3.0, -3.0, -6.0, 6.0])
    rows = [(3, -2.0, 30, 3, -6.0), (2, -2.0, 20, 2, -3.0), (0, -2.0, 0, 0, 0.0), (4, -2.0, 40, 4, 6.0)]
    aln(tmp_path, rows, [(3, 1, 3.0)], 5)
    with pytest.warns(UserWarning) as caught:
        got = import_series(tmp_path / "s.mrc", dose=2.0)
    assert [re.split("[;:]", str(w.message))[1].split()[0] for w in caught] == ["no", "left"]
    assert "section 1 at 3 degrees" in str(caught[1].message)
    assert which(got) == [0, 2, 3, 4]
    torch.testing.assert_close(got.tilts.shifts[:, 0], PIXEL * torch.tensor([0.0, 20, 30, 40], dtype=torch.float64))
    assert got.tilts.angles.tolist() == [0.0, -3.0, -6.0, 6.0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dark": [(1, 1, 0.0)]}, r"all 3 of the stack \(RawSize\) once, in SEC or as DarkFrame, got SEC \[1, 3\]"),
        ({"dark": []}, "RawSize"),
        ({"n": 10**12}, "RawSize"),
        ({"gmag": 1.08}, "GMAG: expected what displaces by 3.4 Å at most .* magnification of 1.08 at SEC 1"),
        ({"beta": math.nan}, "BetaOffset: expected angles between"),
        ({"n": 4, "dark": [(1, 2, 0.0), (3, 4, 9.0)]}, "sections: expected 3, as the stack has, got 4"),
        ({"size": "32 24"}, r"size of an image \(y, x\): expected \(48, 64\), got .* give alignment_pixel_size="),
    ],
)
def test_what_is_wrong_in_an_aln_is_named(tmp_path, changes, match):
    stack(tmp_path, [1] * 3)
    aln(tmp_path, [(1, 5.0, 0, 0, -9.0), (3, 5.0, 0, 0, 9.0)], **({"dark": [(1, 2, 0.0)], "n": 3} | changes))
    with pytest.raises(FormatError, match=match):
        import_series(tmp_path / "s.mrc")


def spot_stack(folder, places, shape, name="s.mrc"):
    """Images with one Gaussian spot at each of places (section, 2) [px]."""
    y, x = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    away = [(x - px) ** 2 + (y - py) ** 2 for px, py in places.tolist()]
    write_stack(folder / name, torch.stack([10 + 100 * torch.exp(-d / (2 * 2.0**2)) for d in away]), PIXEL)


def centroids(images):
    """Places (section, 2) of the spots [px], of the pixels nearby: an edge is filled with the mean."""
    y, x = torch.arange(images.shape[1])[:, None], torch.arange(images.shape[2])
    found = []
    for image in images.double() - 10:
        row, column = divmod(int(image.argmax()), image.shape[1])
        weights = image * (((x - column) ** 2 + (y - row) ** 2) < 12**2)
        found.append(torch.stack([(weights * x).sum(), (weights * y).sum()]) / weights.sum())
    return torch.stack(found)


@pytest.mark.parametrize("shape", [(96, 110), (97, 109)])
def test_imods_magnification_and_turning_axis_are_taken_out(tmp_path, shape):
    """newstack's A (r - g) + D for a spot of the specimen, against where the imported tilts say that it is."""
    angles = torch.tensor([-40.0, 0.0, 35.0], dtype=torch.float64)
    point = torch.tensor([14.0, 9.0, 12.0], dtype=torch.float64)  # [px]
    turns, sizes = (84.0, 84.6, 83.7), (1.012, 0.995, 1.003)
    lines, places = [], []
    for angle, turn, size, move in zip(angles.tolist(), turns, sizes, ((3.5, -2.25), (0, 4), (-1, 0.5)), strict=True):
        stretch = torch.tensor([[1.0, 0.004], [0.004, 0.998]], dtype=torch.float64)
        back = torch.linalg.inv(size * stretch @ rotation(turn))
        moved = torch.tensor(move, dtype=torch.float64)
        lines.append(" ".join(f"{v:11.7f}" for v in [*back.flatten().tolist(), *moved.tolist()]))
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        wanted = torch.stack([point[0] * c + point[2] * s, point[1]])  # in the aligned image, from its middle
        places.append(torch.linalg.solve(back, wanted - moved) + torch.tensor([(n - 1) / 2 for n in shape[::-1]]))
    (tmp_path / "s.xf").write_text("\n".join(lines) + "\n")
    write_tlt(tmp_path / "s.tlt", angles)
    spot_stack(tmp_path, torch.stack(places), shape)
    with pytest.warns(UserWarning, match=r"3 images are resampled: magnifications of 0.994\d* to 1.01\d*, axis"):
        got = import_series(tmp_path / "s.mrc", dose=3.0)
    turned = (tilt_rotation(got.tilts.angles, got.tilts.axis_angle) @ point)[:, :2]
    told = torch.tensor([n // 2 for n in shape[::-1]]) + turned + got.tilts.shifts / PIXEL
    assert got.tilts.axis_angle == pytest.approx(84.1, abs=0.02)
    assert float((centroids(got.images) - told).abs().max()) < 1e-4  # measured: 5e-6


def test_points_are_reconstructed_where_they_are(tmp_path):
    """Spots of a chiral specimen through IMOD's transforms, with a magnification, to a tomogram: place and hand."""
    from inverse.reconstruction import reconstruct

    points = torch.tensor([[0.0, 0, 0], [12, 0, 3], [0, -14, -9], [-9, 11, 8]], dtype=torch.float64)
    angles, size = torch.arange(-60.0, 61, 4, dtype=torch.float64), 1.01
    back, moved = rotation(-84.0) / size, torch.tensor([1.5, -2.0], dtype=torch.float64)
    turned = torch.einsum("tij,pj->tpi", tilt_rotation(angles), points)[..., :2]
    seen_at = (turned - moved) @ torch.linalg.inv(back).T + 31.5  # (tilt, point, 2) [px]
    y, x = torch.arange(64)[:, None], torch.arange(64)
    away = (x - seen_at[..., 0, None, None]) ** 2 + (y - seen_at[..., 1, None, None]) ** 2
    write_stack(tmp_path / "s.mrc", 100 - 20 * torch.exp(-away / (2 * 1.5**2)).sum(1), PIXEL)
    line = " ".join(f"{v:.7f}" for v in [*back.flatten().tolist(), *moved.tolist()])
    (tmp_path / "s.xf").write_text(f"{line}\n" * len(angles))
    write_tlt(tmp_path / "s.tlt", angles)
    with pytest.warns(UserWarning, match="31 images are resampled: magnifications of 1.01 to 1.01"):
        series = import_series(tmp_path / "s.mrc", dose=1.0)
    values = reconstruct(series, thickness=48 * PIXEL, ctf="none").volume.values  # (z, y, x), density is positive
    for point in points.round().long().tolist():
        near = values[
            tuple(slice(n // 2 + c - 3, n // 2 + c + 4) for n, c in zip(values.shape, point[::-1], strict=True))
        ]
        z, y, x = (int(i) for i in torch.unravel_index(near.argmax(), near.shape))
        assert max(abs(z - 3), abs(y - 3), abs(x - 3)) <= 1 and near.max() > 0.5 * values.max(), point


def test_imod_leaves_views_out(tmp_path):
    """EXCLUDELIST2 counts from 1; AreTomo's -OutImod writes the identity, and three digits, for dark images."""
    stack(tmp_path, [1] * 6)
    c, s = math.cos(math.radians(84.3)), math.sin(math.radians(84.3))
    line = f"{c:9.3f} {s:9.3f} {-s:9.3f} {c:9.3f} {2:9.2f} {-1:9.2f}\n"
    (tmp_path / "s.xf").write_text(
        line * 3 + "    1.000     0.000     0.000     1.000      0.00      0.00\n" + line * 2
    )
    write_tlt(tmp_path / "s.tlt", [-10, -5, 0, 5, 10, 15])
    (tmp_path / "tilt.com").write_text("$tilt -StandardInput\nInputProjections s_ali.mrc\nEXCLUDELIST2 1-2,6\n$if\n")
    with pytest.warns(UserWarning, match=r"left out: section 0 .* section 1 .* section 3 .* section 5 "):
        got = import_series(tmp_path / "s.mrc", dose=1.0)
    assert which(got) == [2, 4] and got.tilts.angles.tolist() == [0, 10]
    assert got.tilts.axis_angle == pytest.approx(84.3, abs=0.02)
    (tmp_path / "tilt.com").write_text("InputProjections other_ali.mrc\nEXCLUDELIST2 1-2\n")
    with pytest.warns(UserWarning, match="left out: section 3 at 5 degrees"):
        assert which(import_series(tmp_path / "s.mrc", dose=1.0)) == [0, 1, 2, 4, 5]
    for wrong, match in (("1,two", "views such as"), ("7", "views 1 to 6"), ("0-2", "views 1 to 6")):
        (tmp_path / "tilt.com").write_text(f"EXCLUDELIST {wrong}\n")
        with pytest.raises(FormatError, match=f"exclude list: expected {match}"):
            import_series(tmp_path / "s.mrc")
    (tmp_path / "tilt.com").unlink()
    (tmp_path / "slocal.xf").write_text("local\n")
    with pytest.warns(UserWarning, match="slocal.xf: local transforms of unknown size .* are left behind"):
        import_series(tmp_path / "s.mrc", dose=1.0)
    write_tlt(tmp_path / "s.xtilt", [0, 0, 0, 0, -0.75, 0])
    with pytest.warns(UserWarning, match=r"s.xtilt: tilts about x: .* changes by ±0.625° is left behind: ignored"):
        import_series(tmp_path / "s.mrc", dose=1.0)
    write_tlt(tmp_path / "s.xtilt", [0, 0, 0, 0, -9, 0])
    with (
        pytest.warns(UserWarning),
        pytest.raises(FormatError, match=r"s.xtilt: tilts about x: expected what displaces by 3.4 Å at most .*±7.5°"),
    ):
        import_series(tmp_path / "s.mrc", dose=1.0)


def test_imods_mirror_image_is_refused(tmp_path):
    stack(tmp_path, [1] * 2)
    (tmp_path / "s.xf").write_text("-1 0 0 1 0 0\n" * 2)
    write_tlt(tmp_path / "s.tlt", [0, 3])
    with pytest.raises(FormatError, match=r"section 0, matrix: .* Is the image mirrored"):
        import_series(tmp_path / "s.mrc")


STAR = """
data_global

loop_
_rlnTomoName #1
_rlnTomoHand #2
_rlnTomoTiltSeriesPixelSize #3
_rlnTomoTiltSeriesStarFile #4
TS_01 -1.000000 {pixel} tilt_series/TS_01.star
"""
TILTS = """
data_TS_01

loop_
_rlnMicrographMovieName #1
_rlnTomoNominalStageTiltAngle #2
_rlnMicrographPreExposure #3
_rlnMicrographName #4
_rlnTomoXTilt #5
_rlnTomoYTilt #6
_rlnTomoZRot #7
_rlnTomoXShiftAngst #8
_rlnTomoYShiftAngst #9
frames/TS_01_3.tif -6.01 9.0 MotionCorr/TS_01_3.mrc {about_x} -5.8 85.1 10.0 -4.0
frames/TS_01_2.tif -3.00 6.0 MotionCorr/TS_01_2.mrc 0.0 -2.9 85.1 20.0 -5.0
frames/TS_01_0.tif  0.01 0.0 MotionCorr/TS_01_0.mrc 0.0  0.1 85.1 30.0 -6.0
frames/TS_01_4.tif  6.00 12. MotionCorr/TS_01_4.mrc 0.0  6.2 85.1 50.0 -8.0
"""


def relion5(folder, pixel=PIXEL, about_x=0.0):
    (folder / "tilt_series").mkdir(exist_ok=True)
    (folder / "tomograms.star").write_text(STAR.format(pixel=pixel))
    (folder / "tilt_series/TS_01.star").write_text(TILTS.format(about_x=about_x))
    return folder / "tomograms.star"


def test_relion_5_has_no_rows_for_what_it_leaves_out(tmp_path):
    """Its images are files of their own, so nominal angles tell the sections; prior doses tell order and dose."""
    stack(tmp_path, [1] * 5)
    write_tlt(tmp_path / "s.rawtlt", [0.0, 3.0, -3.0, -6.0, 6.0])
    with pytest.warns(UserWarning) as caught:
        got = import_series(tmp_path / "s.mrc", alignment=relion5(tmp_path))
    said = " ".join(str(w.message) for w in caught)
    assert "rlnTomoHand is -1" in said and "taken to be 3 e-/Å^2 each" in said
    assert "left out: section 1 at 3 degrees (not in TS_01.star). Their dose of 3 e-/Å^2" in said and len(caught) == 3
    assert which(got) == [0, 2, 3, 4] and got.tilts.angles.tolist() == [0.1, -2.9, -5.8, 6.2]
    assert got.tilts.shifts.tolist() == [[30, -6], [20, -5], [10, -4], [50, -8]]
    assert got.tilts.axis_angle == pytest.approx(85.1) and got.tilts.doses.tolist() == [3.0] * 4


def test_what_is_wrong_in_a_star_is_named(tmp_path):
    stack(tmp_path, [1] * 5)
    write_tlt(tmp_path / "s.rawtlt", [0.0, 3.0, -3.0, -6.0, 6.0])
    for changes, match in (
        ({"pixel": 6.8}, "pixel size: expected 1.7 Å, got 6.8 Å.* alignment_pixel_size="),
        ({"about_x": -10.0}, "_rlnTomoXTilt: expected what displaces by 3.4 Å at most .*changes by ±7.5°"),
    ):
        with pytest.warns(UserWarning, match="Hand"), pytest.raises(FormatError, match=match):
            import_series(tmp_path / "s.mrc", alignment=relion5(tmp_path, **changes))
    write_tlt(tmp_path / "s.rawtlt", [0.0, 3.0, -3.0, -16.0, 6.0])
    with pytest.warns(UserWarning, match="Hand"), pytest.raises(FormatError, match="rows: expected one for each of"):
        import_series(tmp_path / "s.mrc", alignment=relion5(tmp_path))


def warp(folder, attributes="", extra="", dims="108.8, 81.6", name="s.xml"):
    """Five tilts in the order of their .tomostar, the second not used; angles are negated."""

    def column(tag, *values):
        return f"  <{tag}>" + "\n".join(map(str, values)) + f"</{tag}>\n"

    (folder / name).write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<TiltSeries DataDirectory="" AreAnglesInverted="False" '
        f'ImageDimensionsAngstrom="{dims}" VolumeDimensionsAngstrom="100, 100, 100" {attributes}>\n'
        + column("Angles", 6.2, 3.1, 0.1, -2.9, -5.8)
        + column("Dose", 9.0, 6.0, 0.0, 3.0, 12.0)
        + column("UseTilt", "True", "False", "True", "True", "True")
        + column("AxisAngle", *[85.5] * 5)
        + column("AxisOffsetX", 1, 2, 3, 4, 5)
        + column("AxisOffsetY", 0, 0, 0, 0, -1.7)
        + column("MoviePath", *(f"../frames/t_{i}.eer" for i in (3, 2, 0, 1, 4)))
        + extra
        + '  <CTF>\n    <Param Name="PixelSize" Value="0.85" />\n  </CTF>\n</TiltSeries>\n'
    )


@pytest.mark.parametrize("alive", [5, 4])
def test_warps_stack_of_all_or_of_the_used_tilts(tmp_path, alive):
    """Alone, without .mdoc or list: the XML has angles, order and doses."""
    stack(tmp_path, [1] * alive)
    warp(tmp_path, 'LevelAngleX="0" LevelAngleY="0.5" MagnificationCorrection="1, 0, 0, 1"')
    with pytest.warns(UserWarning) as caught:
        got = import_series(tmp_path / "s.mrc")
    said = " ".join(str(w.message) for w in caught)
    assert "taken to be 3 e-/Å^2 each" in said and ("left out: section 1" in said) is (alive == 5)
    assert which(got) == ([2, 3, 0, 4] if alive == 5 else [1, 2, 0, 3])
    assert got.tilts.angles.tolist() == pytest.approx([-0.6, 2.4, -6.7, 5.3])  # -(Angles + LevelAngleY)
    assert got.tilts.shifts[:, 0].tolist() == pytest.approx([3, 4, 1, 5])
    assert got.tilts.shifts[3, 1] == pytest.approx(-1.7)


def test_warp_is_matched_by_movie(tmp_path):
    """A stack in the order of exposure, whose .mdoc names the movies; Warp's rows stand otherwise."""
    angles = torch.tensor([0.0, 3.0, -3.0, -6.0, 6.0])
    movies = tuple(Movie(f"D:\\data\\t_{i}.tif", 8) for i in range(5))
    images = stack(tmp_path, [1] * 5)
    series = TiltSeries(images, PIXEL, TiltScheme(angles, torch.ones(5)), movies=movies)
    write_series(tmp_path / "s.mrc", series)
    warp(tmp_path)
    with pytest.warns(UserWarning, match=r"left out: section 1 at -3 degrees \(left out in s.xml\)"):
        got = import_series(tmp_path / "s.mrc")
    assert got.tilts.angles.tolist() == pytest.approx([-0.1, 2.9, -6.2, 5.8])
    assert got.tilts.shifts[:, 0].tolist() == pytest.approx([3, 4, 1, 5])
    assert which(got) == [0, 1, 3, 4] and got.movies == tuple(Movie(f"D:/data/t_{i}.tif", 8) for i in (0, 1, 3, 4))


def test_what_is_wrong_in_an_xml_is_named(tmp_path):
    stack(tmp_path, [1] * 5)
    for attributes, match in (
        ('MagnificationCorrection="1.1, 0, 0, 0.998"', r"MagnificationCorrection: expected what .* matrix \[1.1, 0"),
        ('MagnificationCorrection="1.1"', r"MagnificationCorrection: expected a matrix of 4 numbers"),
        ('LevelAngleX="nan"', "LevelAngleX: expected angles between"),
    ):
        warp(tmp_path, attributes)
        with pytest.raises(FormatError, match=match):
            import_series(tmp_path / "s.mrc")
    warp(tmp_path, dims="217.6, 163.2")
    with pytest.raises(FormatError, match=r"size of an image \(y, x\): expected \(48, 64\), got \(96.0, 128.0\)"):
        import_series(tmp_path / "s.mrc")
    grid = '<GridMovementX Width="1" Height="1" Depth="2"><Node X="0" Y="0" Z="0" Value="0.7" /></GridMovementX>'
    warp(tmp_path, extra=grid)
    with pytest.warns(UserWarning, match="GridMovementX: a grid of shifts up to 0.7 Å is left behind"):
        import_series(tmp_path / "s.mrc", dose=1.0)
    warp(tmp_path)
    write_tlt(tmp_path / "s.rawtlt", [6.0, 3.0, 0.0, -3.0, -6.0])
    with pytest.raises(FormatError, match=r"angles: expected those of the stack .* They have the other sign: Warp"):
        import_series(tmp_path / "s.mrc", dose=1.0)


# --------------------------------------------------------------------------------------------- exposures and sections


def test_an_mdoc_of_the_movies_counts_exposures(tmp_path):
    """The stack's own angles tell which is which; one exposure is not in the stack."""
    stack(tmp_path, [1] * 4)
    text = (
        "PixelSpacing = 1.7\nVoltage = 300\n\n[T =     Tilt axis angle = 85.3, binning = 1  spot = 8  camera = 0]\n\n"
    )
    for z, angle in enumerate((0.01, 3.0, -3.0, -6.02, 5.99)):
        text += f"[ZValue = {z}]\nTiltAngle = {angle}\nExposureDose = {2.5 + z}\nPriorRecordDose = {5 * z}\n\n"
    (tmp_path / "s.mdoc").write_text(text)
    with pytest.raises(FormatError, match=r"4 of ZValue 0 to 3, one for each section .* got 5. Give angles="):
        import_series(tmp_path / "s.mrc")
    write_tlt(tmp_path / "s.rawtlt", [-6.0, -3.0, 0.0, 6.0])
    with pytest.warns(UserWarning, match=r"exposures that are not in the stack. Their dose of 3.5 e-/Å\^2"):
        got = import_series(tmp_path / "s.mrc")
    assert which(got) == [2, 1, 0, 3] and got.tilts.doses.tolist() == [2.5, 4.5, 5.5, 6.5]
    assert got.tilts.axis_angle == 85.3
    write_tlt(tmp_path / "s.rawtlt", [-6.0, -3.0, 1.0, 6.0])
    with pytest.raises(FormatError, match="angles: expected each that of one exposure of"):
        import_series(tmp_path / "s.mrc")


def test_an_alignment_of_binned_images(tmp_path):
    """Averaged over 4 x 4 pixels: sample i of the small image has its middle at 4 i + 3 / 2 of the large one."""
    tilts, shape, small = truth(), (48, 64), (12, 16)
    acquired(tmp_path)
    in_small = (seen(tilts, shape) - 1.5) / 4
    shifts = 4 * PIXEL * (in_small - seen(tilts.replace(shifts=0 * SHIFTS), small, 4 * PIXEL))[:, 0]
    binned = tilts.replace(shifts=shifts)
    write_xf(tmp_path / "b.xf", binned, 4 * PIXEL, small, nominal=NOMINAL)
    write_aln(tmp_path / "b.aln", binned, 4 * PIXEL, small, nominal=NOMINAL)
    write_relion(tmp_path / "b.star", binned, OPTICS, 4 * PIXEL, (8, 8, 8), name="b", stack="b.mrc", nominal=NOMINAL)
    for name in ("b.xf", "b.aln", "b.star"):
        got = quietly(tmp_path / "s.mrc", alignment=tmp_path / name, alignment_pixel_size=4 * PIXEL)
        assert float((seen(got.tilts, shape) - seen(tilts, shape)).abs().max()) < 1e-5, name
    for name in ("b.aln", "b.star"):
        with pytest.raises(FormatError, match="alignment_pixel_size"):
            import_series(tmp_path / "s.mrc", alignment=tmp_path / name)


def test_what_is_left_out(tmp_path):
    """By name, and empty images; constant ones, or of too few electrons. The others keep their own exposures."""
    series = acquired(tmp_path)
    images = series.images[SECTIONS].clone()
    images[0], images[3] = 7.0, images[3] * 0.01
    write_stack(tmp_path / "s.mrc", images, PIXEL)
    write_aln(tmp_path / "s.aln", truth(), PIXEL, (48, 64), nominal=NOMINAL)
    with pytest.warns(UserWarning, match=r"section 0 at -48 degrees \(an empty image\); section 2 at 0 .*asked.* 9 e-"):
        got = import_series(tmp_path / "s.mrc", exclude=[2])
    rows = [row for row in range(5) if PLACES[row] not in (0, 2, 3)]
    assert torch.equal(got.images, series.images[rows]) and torch.equal(got.tilts.doses, DOSES[rows])
    torch.testing.assert_close(got.tilts.shifts, SHIFTS[rows], atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match="section 0"):
        assert len(import_series(tmp_path / "s.mrc", darkest=0.0).images) == 4


def test_optics_follow_their_images(tmp_path):
    series = acquired(tmp_path)
    defocus = 1e4 + torch.arange(5.0)  # of the sections
    with pytest.warns(UserWarning, match="left out"):
        got = import_series(tmp_path / "s.mrc", exclude=[1], optics=OPTICS.replace(defocus=defocus))
    assert got.optics is not None and torch.as_tensor(got.optics.defocus).tolist() == [
        1e4 + int(PLACES[row]) for row in range(5) if PLACES[row] != 1
    ]
    assert len(got.images) == len(series.images) - 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_input_is_named(tmp_path):
    def refused(match, kind: type[ValueError] = FormatError, **named):
        with pytest.raises(kind, match=match):
            import_series(tmp_path / "s.mrc", **named)

    stack(tmp_path, [1] * 3)
    refused("tilt angles: expected a file beside it, got no .mdoc, list of angles or alignment")
    (tmp_path / "s.rawtlt").write_text("0\nnan\n3\n")
    refused("s.rawtlt: line 2: expected a tilt angle")
    write_tlt(tmp_path / "s.rawtlt", [0, 3])
    refused("s.rawtlt: lines: expected 3, one for each section of .*s.mrc, got 2")
    write_tlt(tmp_path / "s.rawtlt", [0, 3, 6])
    refused("exclude: expected sections, counted from 0, up to 2, got .3.", ValueError, exclude=[3])
    refused(r"at least one image .* section 0: asked for; section 1", ValueError, exclude=[0, 1, 2])
    refused("dose: expected one or 3 positive", ValueError, dose=0.0)
    refused("dose: expected one or 3 positive", ValueError, dose=[1.0, 2.0])
    refused("nothing of that name", alignment=tmp_path / "none.aln")
    (tmp_path / "s_TLT.txt").write_text("0 1 3.0\n3 2 0.0\n6 3 3.0\n")
    refused(r"dose: expected more than 0 .* got 0 at \[1\]", ValueError, angles=tmp_path / "s_TLT.txt")
    assert len(import_series(tmp_path / "s.mrc", angles=tmp_path / "s_TLT.txt", exclude=[1]).images) == 2
    aln(tmp_path, [(z + 1, 5.0, 0, 0, 3.0 * z) for z in range(3)], [], 3)
    aln(tmp_path, [(z + 1, 5.0, 0, 0, 30.0 * z) for z in range(3)], [], 3, name="s.xml")
    refused("expected one beside the stack, got s.aln, s.xml. Give it as alignment=", ValueError)
    (tmp_path / "s.xml").rename(tmp_path / "o.aln")
    refused("angles: expected those of the stack within 5 degrees", alignment=tmp_path / "o.aln")
    acquired(tmp_path, name="m.mrc")
    write_stack(tmp_path / "m.mrc", torch.rand(5, 8, 8), 2 * PIXEL)
    with pytest.raises(FormatError, match="pixel size: expected 1.7 Å as in its .mdoc, got 3.4"):
        import_series(tmp_path / "m.mrc")
    with pytest.warns(UserWarning, match=r"images of \(8, 8\) px .* tells \(48, 64\)"):
        import_series(tmp_path / "m.mrc", pixel_size=3.4)


def test_images_that_are_no_numbers_are_named(tmp_path):
    images = stack(tmp_path, [1] * 3)
    write_tlt(tmp_path / "s.rawtlt", [0, 3, 6])
    raw = bytearray((tmp_path / "s.mrc").read_bytes())
    start = 1024 + 4 * images[0].numel()
    raw[start : start + 4] = b"\x00\x00\xc0\x7f"
    (tmp_path / "s.mrc").write_bytes(raw)
    with pytest.raises(FormatError, match="section 1: expected finite values, got NaN"):
        import_series(tmp_path / "s.mrc")


# --------------------------------------------------------------------------------------------------------- resampling


def rotation(degrees):
    """In the plane, written out anew."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(64, 80), (65, 79), (64, 79)])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_resampling_is_exact(shape, dtype, off):
    """A sum of Gaussian spots, whose value at any place is known; measured 2e-11 and 2e-7."""
    matrix = 1.015 * rotation(1.2) @ torch.tensor([[1.0, 0.01], [0.0, 0.97]], dtype=torch.float64)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - n // 2 for n in shape), indexing="ij")

    def spots(x, y):
        places = ((1.0, 9.0, -7.0), (0.5, -15.0, 12.0), (-0.8, 3.0, 14.0))
        values = [w * torch.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 2.2**2)) for w, a, b in places]
        return torch.stack(values).sum(0)

    got = resampled(spots(x, y).to(dtype), matrix)
    (a, b), (c, d) = matrix.tolist()
    wanted = spots(a * x + b * y, c * x + d * y)
    inside = (x.abs() < 30) & (y.abs() < 25)  # the rest may lie outside the image
    assert got.dtype == dtype
    assert float((got - wanted)[inside].abs().max()) < off
    same = resampled(spots(x, y).to(dtype), torch.eye(2))
    assert float((same - spots(x, y)).abs().max()) < off
    with pytest.raises(ValueError, match="close to the identity"):
        resampled(spots(x, y), 2 * matrix)


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_takes_an_alignment(tmp_path):
    from inverse.cli import app

    acquired(tmp_path, (24, 32))
    write_aln(tmp_path / "found.aln", truth(0.0), PIXEL, (24, 32), nominal=NOMINAL)
    common = ["reconstruct", str(tmp_path / "s.mrc"), "--thickness", "20", "--ctf", "none"]
    asked = ["--alignment", str(tmp_path / "found.aln"), "--exclude", "0,4", "-o", str(tmp_path / "t.mrc")]
    result = CliRunner().invoke(app, [*common, *asked])
    assert result.exit_code == 0, result.output
    assert read_volume(tmp_path / "t.mrc").values.shape == (12, 24, 32)
    result = CliRunner().invoke(app, [*common, "--exclude", "one"])
    assert result.exit_code == 2
