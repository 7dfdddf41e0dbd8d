"""What an import leaves behind is said with its size, and the size is right."""

import math
import warnings

import pytest
import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import tilt_rotation
from cryosim.io.aretomo import write_aln
from cryosim.io.files import FormatError
from cryosim.io.imod import write_xf
from cryosim.io.import_series import import_series
from cryosim.io.left_behind import GROSS, LeftBehind, say_left_behind, tilts_about_x
from cryosim.io.series import write_series
from cryosim.io.warp import write_warp

PIXEL, SHAPE = 10.0, (300, 400)
CORNER = PIXEL * 250.0  # [Å]: half the diagonal
ANGLES = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64)
TILTS = TiltScheme(ANGLES, torch.ones(3), axis_angle=85.0)


def about_x(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[1.0, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64)


@pytest.fixture
def folder(tmp_path):
    images = torch.poisson(torch.full((3, *SHAPE), 20.0), generator=torch.Generator().manual_seed(3))
    write_series(tmp_path / "s.mrc", TiltSeries(images, PIXEL, TILTS))
    return tmp_path


def said(folder, **named):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import_series(folder / "s.mrc", **named)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("angle", [0.3, 1.2, -2.5, 40.0])
def test_a_tilt_about_x_displaces_by_what_is_said(angle, generator):
    """Points at the distance of the corner, projected with and without it: the bound holds, and is reached."""
    points = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    points = CORNER * points / points.norm(dim=1, keepdim=True)
    view = tilt_rotation(torch.linspace(-60, 60, 9, dtype=torch.float64), 85.0)
    moved = torch.einsum("tij,pj->tpi", view, points @ about_x(angle).T - points)[..., :2].norm(dim=-1)
    bound = LeftBehind(None, "", "", angle=angle).displacement(CORNER)  # type: ignore[arg-type]
    assert 0.98 * bound < float(moved.max()) <= bound  # measured: 0.9995 to 0.99999 of it


def test_a_tilt_about_x_of_all_images_is_a_turn_of_the_specimen(generator):
    """P = R_z R_y R_x: the specimen turned by R_x is seen at the same places by a TiltScheme without R_x."""
    points = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    angles = torch.deg2rad(ANGLES)
    for t, view in zip(angles.tolist(), tilt_rotation(ANGLES, 85.0), strict=True):
        y = torch.tensor([[math.cos(t), 0, math.sin(t)], [0, 1, 0], [-math.sin(t), 0, math.cos(t)]]).double()
        a = math.radians(85.0)
        z = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]).double()
        torch.testing.assert_close(
            points @ (z @ y @ about_x(3.0)).T, (points @ about_x(3.0).T) @ view.T, atol=1e-6, rtol=0
        )
    parts = tilts_about_x(None, "x", torch.tensor([3.0, 3.0, 3.0]))  # type: ignore[arg-type]
    assert len(parts) == 1 and parts[0].rigid
    with pytest.warns(UserWarning, match="the tomogram comes out turned by it, which displaces by up to 131 Å in the"):
        say_left_behind(parts, CORNER)


def test_only_what_changes_blurs_and_is_refused():
    """5 % of 2500 Å are 125 Å: 2.865 degrees about the mean."""
    limit = math.degrees(2 * math.asin(GROSS / 2))
    for spread, refused in ((0.999 * limit, False), (1.001 * limit, True)):
        parts = tilts_about_x("f.xtilt", "x", torch.tensor([20.0 - spread, 20.0 + spread], dtype=torch.float64))  # type: ignore[arg-type]
        assert [part.rigid for part in parts] == [True, False]
        with pytest.warns(UserWarning):
            if refused:
                with pytest.raises(FormatError, match="f.xtilt: x: expected what displaces by 125 Å at most"):
                    say_left_behind(parts, CORNER)
            else:
                say_left_behind(parts, CORNER)


def test_imods(folder):
    write_xf(folder / "a.xf", TILTS, PIXEL, SHAPE)
    header = "InputProjections a_ali.mrc\n"
    (folder / "tilt.com").write_text(header + "XAXISTILT 1.2\nOFFSET\t-2.0\n")
    told = said(folder, alignment=folder / "a.xf")
    assert len(told) == 2
    assert (
        "XAXISTILT: a tilt about x of 1.2°" in told[0] and "up to 52.4 Å in the corner of the field, 2500 Å" in told[0]
    )
    assert "OFFSET: a tilt about y of -2°" in told[1]
    transforms = "1 0 0 1 1.5 -2.0\n" * 3 + "1.001 0 0 0.999 3.0 4.0\n" * 3
    (folder / "loc.xf").write_text("2 1 100 100 200 200 0 10.0\n0.1 0.2 0.3\n0.0 0.0 0.0\n" + transforms)
    (folder / "tilt.com").write_text(header + "LOCALFILE loc.xf\n")
    (told,) = said(folder, alignment=folder / "a.xf")
    assert (
        "loc.xf: local transforms: local shifts up to 50 Å is left behind: ignored, it displaces by up to 50 Å" in told
    )
    (folder / "loc.xf").write_text(transforms.replace("3.0 4.0", "30 40"))
    with pytest.raises(
        FormatError, match="loc.xf: local transforms: expected what displaces by 125 Å at most .* 500 Å"
    ):
        import_series(folder / "s.mrc", alignment=folder / "a.xf")


def test_aretomos(folder):
    write_aln(folder / "a.aln", TILTS, PIXEL, SHAPE)
    text = (folder / "a.aln").read_text().replace("BetaOffset =     0.00", "BetaOffset =     1.20")
    text = text.replace("NumPatches = 0", "NumPatches = 2").replace("1.00000", "1.01000", 1)
    patches = "".join(f"{z} {p} 1.0 2.0 {z}.0 {p}.0 1.0\n" for z in range(3) for p in range(2))
    (folder / "a.aln").write_text(text + patches)
    beta, size, local = said(folder, alignment=folder / "a.aln")
    assert "BetaOffset" in beta and "52.4 Å" in beta
    assert "GMAG: a magnification of 1.01 at SEC 1" in size and "up to 25 Å" in size
    assert "up to 22.4 Å" in local  # (2, 1) px


def test_warps(folder):
    write_warp(folder / "a.xml", TILTS, PIXEL, SHAPE, (30, 40, 40))
    text = (folder / "a.xml").read_text()
    grid = '<{0} Width="1" Height="1" Depth="2"><Node X="0" Y="0" Z="0" Value="{1}" /></{0}>'
    grids = grid.format("GridVolumeWarpY", -17.5) + grid.format("GridAngleX", 0.5) + grid.format("GridMovementX", 0)
    matrix = 'LevelAngleX="1.2" MagnificationCorrection="1.002, 0, 0, 0.998"'
    (folder / "a.xml").write_text(
        text.replace("<TiltSeries", f"<TiltSeries {matrix}").replace("<CTF>", grids + "<CTF>")
    )
    level, size, angle, shift = said(folder, alignment=folder / "a.xml")
    assert "LevelAngleX" in level and "52.4 Å" in level
    assert "MagnificationCorrection" in size and "up to 5 Å" in size
    assert "GridVolumeWarpY: a grid of shifts up to 17.5 Å" in shift
    assert "GridAngleX: a grid of angles up to 0.5°" in angle and "up to 21.8 Å" in angle


def test_nothing_is_said_of_nothing(folder):
    write_xf(folder / "a.xf", TILTS, PIXEL, SHAPE)
    (folder / "tilt.com").write_text("XAXISTILT 0\nOFFSET 0.0\nLOCALFILE none.xf\n")
    write_aln(folder / "a.aln", TILTS, PIXEL, SHAPE)
    write_warp(folder / "a.xml", TILTS, PIXEL, SHAPE, (30, 40, 40))
    for name in ("a.xf", "a.aln", "a.xml"):
        assert said(folder, alignment=folder / name) == []
