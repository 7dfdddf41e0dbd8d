"""Alignments on disk: every program's own projection, written out here, puts a chiral specimen where ours does."""

import math

import pytest
import starfile
import torch

from cryosim.acquisition.series import Movie
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import tilt_rotation
from cryosim.io.alignments import aligned, read_alignment
from cryosim.io.aretomo import write_aln
from cryosim.io.files import FormatError
from cryosim.io.imod import write_xf
from cryosim.io.relion import RelionTomogram, write_relion, write_relion_tomograms
from cryosim.io.warp import write_warp
from cryosim.microscope.optics import Optics

PIXEL, VOXEL = 1.7, 5.1  # [Å]; a tomogram binned three times
OPTICS = Optics(
    voltage=200.0,
    defocus=torch.tensor([21000.0, 20000.0, 19000.0, 22000.0, 18000.0], dtype=torch.float64),
    astigmatism=300.0,
    astigmatism_angle=25.0,
    spherical_aberration=2.6,
    amplitude_contrast=0.08,
)
# x, y and z at different distances from the origin: no mirror image of it is itself
CHIRAL = torch.tensor([[0.0, 0, 0], [40, 0, 0], [0, 60, 0], [0, 0, 90], [13, -27, 41]], dtype=torch.float64)


def example(axis_angle=-83.4):
    return TiltScheme(
        torch.tensor([0.3, 12.1, -11.7, -47.9, 48.2], dtype=torch.float64),
        torch.tensor([3.0, 2.0, 2.5, 4.0, 5.0], dtype=torch.float64),
        torch.tensor([[3.1, -7.7], [0.0, 12.3], [-20.2, 5.0], [8.8, 8.1], [-1.0, -2.0]], dtype=torch.float64),
        axis_angle=axis_angle,
    )


NOMINAL = torch.tensor([0.0, 12.0, -12.0, -48.0, 48.0], dtype=torch.float64)
ORDER = [3, 2, 0, 1, 4]


def ours(tilts, image_shape):
    """Samples (section, point, 2) (x, y) at which the chiral points are seen, counted from 0."""
    turned = torch.einsum("tij,pj->tpi", tilt_rotation(tilts.angles, tilts.axis_angle), CHIRAL)[..., :2]
    centre = torch.tensor([n // 2 for n in reversed(image_shape)], dtype=torch.float64)
    return (centre + (turned + tilts.shifts[:, None]) / PIXEL)[ORDER]


def rotation(axis, degrees):
    """Right-handed, written out anew."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = {"y": [[c, 0, s], [0, 1, 0], [-s, 0, c]], "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]]}[axis]
    return torch.tensor(rows, dtype=torch.float64)


def voxels(volume_shape):
    """Samples (point, 3) (x, y, z) of the tomogram that show the points, counted from 0."""
    return CHIRAL / VOXEL + torch.tensor([n // 2 for n in reversed(volume_shape)], dtype=torch.float64)


def half(shape, less=0):
    return torch.tensor([(n - less) / 2 for n in reversed(shape)], dtype=torch.float64)


def imod(path, image_shape, volume_shape):
    """newstack, tilt and trimvol -rx, pixels counted from 1 as they do (cubinterp.c, tilt.f90, clip_proc.c)."""
    nz, ny, nx = volume_shape
    x, y, z = (voxels(volume_shape) + 1).T  # counted from 1
    thick = nz + 1 - z  # before -rx
    xcen, ycen, slices = nx // 2 + 0.5, nz // 2 + 0.5, ny / 2 + 0.5
    seen = []
    for line, angle in zip(path.read_text().splitlines(), path.with_suffix(".tlt").read_text().split(), strict=True):
        a11, a12, a21, a22, dx, dy = map(float, line.split())
        matrix = torch.tensor([[a11, a12], [a21, a22]], dtype=torch.float64)
        cos, sin = math.cos(math.radians(float(angle))), -math.sin(math.radians(float(angle)))
        u = (x - xcen) * cos + (thick - ycen) * sin
        a = torch.stack([u, y - slices], 1) * VOXEL / PIXEL  # in the aligned image, from its middle
        seen.append((a - torch.tensor([dx, dy], dtype=torch.float64)) @ torch.linalg.inv(matrix).T)
    return torch.stack(seen) + half(image_shape, 1)


def warp(path, image_shape, volume_shape):
    """GetPositionsInOneTilt: Å from the first voxel, dimensions halved as they are."""
    from xml.etree import ElementTree

    root = ElementTree.parse(path).getroot()
    columns = [
        list(map(float, root.find(c).text.split())) for c in ("Angles", "AxisAngle", "AxisOffsetX", "AxisOffsetY")
    ]
    image, volume = (
        torch.tensor(list(map(float, root.get(f"{what}DimensionsAngstrom").split(","))), dtype=torch.float64)
        for what in ("Image", "Volume")
    )
    seen = []
    for angle, axis, x, y in zip(*columns, strict=True):
        turned = (voxels(volume_shape) * VOXEL - volume / 2) @ (rotation("z", axis) @ rotation("y", -angle)).T
        seen.append(turned[:, :2] + torch.tensor([x, y], dtype=torch.float64) + image / 2)
    return torch.stack(seen) / PIXEL


SHAPES = [((48, 64), (30, 32, 40)), ((49, 63), (31, 33, 41)), ((48, 63), (31, 32, 41)), ((49, 64), (30, 33, 40))]


@pytest.mark.parametrize(("image_shape", "volume_shape"), SHAPES)
@pytest.mark.parametrize("axis_angle", [0.0, -83.4, 178.9])
def test_imod_and_warp_see_what_we_see(tmp_path, image_shape, volume_shape, axis_angle):
    """In their own arithmetic, with their own centres, for even and odd sizes."""
    tilts = example(axis_angle)
    there = {"volume_shape": volume_shape, "voxel_size": VOXEL}
    files = write_xf(tmp_path / "s.xf", tilts, PIXEL, image_shape, nominal=NOMINAL, **there)
    assert [f.name for f in files] == ["s.xf", "s.tlt", "s.rawtlt"]
    write_warp(tmp_path / "s.xml", tilts, PIXEL, image_shape, volume_shape, voxel_size=VOXEL, nominal=NOMINAL)
    wanted = ours(tilts, image_shape)
    assert float((imod(tmp_path / "s.xf", image_shape, volume_shape) - wanted).abs().max()) < 1e-5
    assert float((warp(tmp_path / "s.xml", image_shape, volume_shape) - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize(("image_shape", "volume_shape"), SHAPES)
def test_every_file_comes_back(tmp_path, image_shape, volume_shape):
    tilts = example()
    there = {"volume_shape": volume_shape, "voxel_size": VOXEL}
    write_xf(tmp_path / "s.xf", tilts, PIXEL, image_shape, nominal=NOMINAL, **there)
    write_aln(tmp_path / "s.aln", tilts, PIXEL, image_shape, nominal=NOMINAL)
    write_warp(tmp_path / "s.xml", tilts, PIXEL, image_shape, volume_shape, voxel_size=VOXEL, nominal=NOMINAL)
    write_relion(
        tmp_path / "tomograms.star", tilts, OPTICS, PIXEL, volume_shape, name="s", stack="s.mrc", nominal=NOMINAL
    )
    acquired = TiltScheme(NOMINAL, tilts.doses, frames=3)
    for name in ("s.xf", "s.aln", "s.xml", "tomograms.star", "tilt_series/s.star"):
        found = read_alignment(tmp_path / name, pixel_size=PIXEL, image_shape=image_shape, **there)
        got = aligned(acquired, found)
        torch.testing.assert_close(got.angles, tilts.angles, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(got.shifts, tilts.shifts, atol=1e-5, rtol=0, msg=name)
        assert got.axis_angle == pytest.approx(tilts.axis_angle, abs=1e-6), name
        assert got.frames == 3 and torch.equal(got.doses, tilts.doses)


def test_nominal_angles_order_the_sections(tmp_path):
    """Also where the true ones would stand in another order."""
    tilts = TiltScheme(torch.tensor([0.2, 0.1]), torch.ones(2), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    write_xf(tmp_path / "s.xf", tilts, 1.0, (9, 9), nominal=[0.0, 0.15])
    assert (tmp_path / "s.tlt").read_text().split() == ["0.200000003", "0.1000000015"]
    assert (tmp_path / "s.rawtlt").read_text().split() == ["0", "0.15"]
    assert [float(line.split()[4]) for line in (tmp_path / "s.xf").read_text().splitlines()] == [-1.0, -2.0]


def test_imods_axis_lies_half_a_pixel_before_ours(tmp_path):
    """No tilt, no shift, an even image: D is the half pixel; an odd one has none."""
    still = TiltScheme(torch.zeros(1), torch.ones(1))
    for n, expected in ((64, -0.5), (63, 0.0)):
        write_xf(tmp_path / "s.xf", still, 1.0, (n, n))
        assert list(map(float, (tmp_path / "s.xf").read_text().split()))[4:] == [expected, expected]
    write_xf(tmp_path / "s.xf", still, 1.0, (64, 64), volume_shape=(8, 8, 8))  # its middle is off by as much
    assert list(map(float, (tmp_path / "s.xf").read_text().split()))[4:] == [0.0, 0.0]


def test_what_relion_is_told(tmp_path):
    tilts = example()
    movies = [Movie(f"frames/{i}.eer", 100 + i) for i in range(5)]
    row = write_relion(
        tmp_path / "tomograms.star",
        tilts,
        OPTICS,
        PIXEL,
        (31, 33, 41),
        name="item_0007",
        stack="tilts/s.mrc",
        voxel_size=VOXEL,
        movies=movies,
        nominal=NOMINAL,
        optics_group="krios",
    )
    assert row.size == (124, 100, 94)  # 41, 33, 31 voxels of three pixels, and even
    told = starfile.read(tmp_path / "tomograms.star", always_dict=True)["global"]
    assert told["rlnTomoTiltSeriesStarFile"].tolist() == ["tilt_series/item_0007.star"]
    assert told["rlnTomoHand"].tolist() == [1] and told["rlnVoltage"].tolist() == [200]
    table = starfile.read(tmp_path / "tilt_series/item_0007.star", always_dict=True)["item_0007"]
    assert table["rlnMicrographName"].tolist()[0] == "000001@tilts/s.mrc:mrcs"
    assert table["rlnMicrographMovieName"].tolist() == [movies[i].path for i in ORDER]
    assert table["rlnTomoTiltMovieFrameCount"].tolist() == [movies[i].frames for i in ORDER]
    assert table["rlnMicrographPreExposure"].tolist() == [7.5, 5.0, 0.0, 3.0, 11.5]
    assert table["rlnTomoNominalStageTiltAngle"].tolist() == NOMINAL[ORDER].tolist()
    assert table["rlnTomoYTilt"].tolist() == tilts.angles[ORDER].tolist()
    assert table["rlnDefocusU"].tolist() == [22150.0, 19150.0, 21150.0, 20150.0, 18150.0]
    assert (table["rlnDefocusU"] - table["rlnDefocusV"]).tolist() == [300.0] * 5
    assert set(table["rlnDefocusAngle"]) == {25.0}


def test_many_tomograms(tmp_path):
    """One tomograms.star of several; a name tells which is meant."""
    rows = []
    for i, axis in enumerate((10.0, 20.0)):
        rows.append(
            write_relion(
                tmp_path / "tomograms.star", example(axis), OPTICS, 2.0, (8, 8, 8), name=f"t{i}", stack="s.mrcs"
            )
        )
    assert isinstance(rows[0], RelionTomogram)
    write_relion_tomograms(tmp_path / "tomograms.star", rows)
    assert read_alignment(tmp_path / "tomograms.star", name="t1").axis_angle == pytest.approx(20.0)
    with pytest.raises(FormatError, match="one of t0, t1"):
        read_alignment(tmp_path / "tomograms.star")
    with pytest.raises(ValueError, match="name of its own"):
        write_relion_tomograms(tmp_path / "tomograms.star", [rows[0], rows[0]])


def test_what_is_written_wrongly(tmp_path):
    tilts = example()
    with pytest.raises(ValueError, match="expected 5 angles"):
        write_aln(tmp_path / "s.aln", tilts, 1.0, (9, 9), nominal=[1.0])
    with pytest.raises(ValueError, match="pixel_size: expected a positive"):
        write_xf(tmp_path / "s.xf", tilts, 0.0, (9, 9))
    with pytest.raises(ValueError, match="without spaces"):
        write_relion(tmp_path / "t.star", tilts, OPTICS, 1.0, (8, 8, 8), name="a b", stack="s.mrc")
    with pytest.raises(ValueError, match="expected 5, one a tilt"):
        write_warp(tmp_path / "s.xml", tilts, 1.0, (9, 9), (8, 8, 8), movies=[Movie("a", 1)])
    with pytest.raises(ValueError, match="one value for the series"):
        write_relion(
            tmp_path / "t.star",
            tilts,
            OPTICS.replace(voltage=torch.tensor([200.0] * 4 + [300.0])),
            1.0,
            (8, 8, 8),
            name="a",
            stack="s.mrc",
        )
    assert not list(tmp_path.iterdir())


def test_what_no_tilt_scheme_can_hold(tmp_path):
    def refused(name, text, match, **told):
        (tmp_path / name).write_text(text)
        with pytest.raises(FormatError, match=match):
            read_alignment(tmp_path / name, pixel_size=1.0, image_shape=(9, 9), **told)

    write_xf(tmp_path / "s.xf", example(), 1.0, (9, 9))
    line = (tmp_path / "s.xf").read_text().splitlines()[0]
    rest = (tmp_path / "s.xf").read_text().split("\n", 1)[1]
    refused("s.xf", "1.02 0 0 1.02 0 0\n" + rest, "a change of magnification")
    refused("s.xf", "0 1 -1 0 0 0\n" + rest, "axis angle: expected one for all")
    refused("s.xf", "1 0 0 1 0 0\n" + rest, "sections: expected all 5 of the stack, got 4")  # AreTomo's for dark ones
    refused("s.xf", "0 0 0 1 0 0\n" + rest, "a matrix that has an inverse")
    refused("s.xf", line + "\n", "lines: expected 5")
    refused("s.xf", "a b c d e f\n" + rest, "the numbers of an IMOD file")
    write_aln(tmp_path / "s.aln", example(), 1.0, (9, 9))
    text = (tmp_path / "s.aln").read_text()
    refused("s.aln", text.replace("RawSize = 9 9 5", "RawSize = 9 9 6"), "all 6 of the stack")
    refused("s.aln", text.replace("1.00000", "1.10000", 1), "GMAG: expected what displaces by")
    refused("s.aln", "nothing", "an alignment of AreTomo")
    write_warp(tmp_path / "s.xml", example(), 1.0, (9, 9), (8, 8, 8))
    text = (tmp_path / "s.xml").read_text()
    refused("s.xml", text.replace("<TiltSeries ", '<TiltSeries LevelAngleX="91" '), "LevelAngleX: expected angles")
    refused("s.xml", text[:200], "a tilt series of Warp")
    write_relion(tmp_path / "t.star", example(), OPTICS, 1.0, (8, 8, 8), name="s", stack="s.mrc")
    star = tmp_path / "tilt_series/s.star"
    refused("r.star", star.read_text().replace("_rlnTomoZRot", "_rlnOther"), "_rlnTomoZRot: expected a column")
    refused("r.star", "data_x\n_a 1\n", "_rlnTomoYTilt: expected a column")
    with pytest.raises(FormatError, match="one of .xf, .aln"):
        read_alignment(star.rename(tmp_path / "s.txt"))
    (tmp_path / "empty.xf").touch()
    with pytest.raises(FormatError, match="content"):
        read_alignment(tmp_path / "empty.xf", pixel_size=1.0)
    with pytest.raises(ValueError, match="give pixel_size="):
        read_alignment(tmp_path / "s.aln")


def test_patches_are_left_behind(tmp_path):
    write_aln(tmp_path / "s.aln", example(), 1.0, (9, 9))
    text = (tmp_path / "s.aln").read_text().replace("NumPatches = 0", "NumPatches = 4")
    rows = [f"{z:4d}{p:4d}     1.00      2.00      0.12      0.16   1.0\n" for z in range(5) for p in range(4)]
    rows[7] = "   1   3     1.00      2.00     50.00     50.00   0.0\n"  # AreTomo itself does not rely on it
    (tmp_path / "s.aln").write_text(text + "".join(rows))
    with pytest.warns(UserWarning, match="Local Alignment: the shifts of 4 patches, up to 0.2 Å, is left behind"):
        read_alignment(tmp_path / "s.aln", pixel_size=1.0)
    (tmp_path / "s.aln").write_text(text + "".join(rows[:-1]))
    with pytest.raises(FormatError, match="Local Alignment: expected 20 rows, one for each of 4 patches .* got 19"):
        read_alignment(tmp_path / "s.aln", pixel_size=1.0)


def test_an_alignment_of_another_stack(tmp_path):
    write_aln(tmp_path / "s.aln", example(), 1.0, (9, 9), nominal=[0.0, 1.0, 2.0, 3.0, 4.0])  # in order of exposure
    found = read_alignment(tmp_path / "s.aln", pixel_size=1.0)
    with pytest.raises(ValueError, match="Is it an alignment of this stack"):
        aligned(TiltScheme(NOMINAL, torch.ones(5)), found)
    with pytest.raises(ValueError, match="expected 4 sections"):
        aligned(TiltScheme(NOMINAL[:4], torch.ones(4)), found)


def test_a_pretilted_lamella_is_taken(tmp_path):
    """All angles off by the same."""
    tilts = TiltScheme(NOMINAL + 9.0, torch.ones(5))
    write_aln(tmp_path / "s.aln", tilts, 1.0, (9, 9), nominal=NOMINAL)
    got = aligned(TiltScheme(NOMINAL, torch.ones(5)), read_alignment(tmp_path / "s.aln", pixel_size=1.0))
    torch.testing.assert_close(got.angles, tilts.angles)
