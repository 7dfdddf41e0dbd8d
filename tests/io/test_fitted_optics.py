"""CTF fits of other programs: the lens they describe is the one the images were taken with."""

import math

import numpy
import pytest
import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.constants import wavelength
from cryosim.io.affine import resampled, resampled_optics
from cryosim.io.files import FormatError
from cryosim.io.fitted_optics import read_fitted_optics
from cryosim.io.import_series import import_series
from cryosim.io.mrc import write_stack
from cryosim.io.relion import write_relion
from cryosim.io.series import write_series
from cryosim.io.tilts import write_tlt
from cryosim.io.warp import write_warp
from cryosim.microscope.optics import Optics, aberration, ctf

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{said}") for said in ("order of exposure", "doses", "left out", "usual")
]

PIXEL, SHAPE = 2.5, (48, 64)
NOMINAL = torch.tensor([0.0, 12.0, -12.0, -48.0, 48.0], dtype=torch.float64)  # in the order of exposure
SECTIONS = torch.argsort(NOMINAL)  # row of the scheme that stands in each section
DEFOCUS = torch.tensor([21000.0, 22000.0, 19000.0, 18000.0, 24000.0], dtype=torch.float64)
ASTIGMATISM = torch.tensor([300.0, 700.0, 500.0, 900.0, 400.0], dtype=torch.float64)
AZIMUTH = torch.tensor([-83.0, 31.0, 12.0, 75.0, -20.0], dtype=torch.float64)
PHASE = torch.tensor([10.0, 12.0, 14.0, 16.0, 18.0], dtype=torch.float64)
TRUTH = Optics(
    voltage=200.0,
    defocus=DEFOCUS,
    astigmatism=ASTIGMATISM,
    astigmatism_angle=AZIMUTH,
    phase_shift=PHASE,
    spherical_aberration=2.7,
    amplitude_contrast=0.07,
)
COLUMNS = (  # section, first and second defocus [Å], azimuth [deg], phase shift [deg], by ascending angle
    torch.arange(5.0).double(),
    (DEFOCUS + ASTIGMATISM / 2)[SECTIONS],
    (DEFOCUS - ASTIGMATISM / 2)[SECTIONS],
    AZIMUTH[SECTIONS],
    PHASE[SECTIONS],
)


def series(folder, voltage: float | None = 200.0):
    """Five images as a microscope leaves them, with an .mdoc that tells the voltage alone."""
    images = torch.poisson(torch.full((5, *SHAPE), 20.0), generator=torch.Generator().manual_seed(3))
    write_series(folder / "s.mrc", TiltSeries(images, PIXEL, TiltScheme(NOMINAL, torch.ones(5))))
    text = (folder / "s.mrc.mdoc").read_text()
    if voltage is not None:
        (folder / "s.mrc.mdoc").write_text(f"Voltage = {voltage:g}\n{text}")
    return images


def ctffind(folder, name="s_fit.txt", header=True, hand=None):
    head = (
        "# Output from CTFFind version 4.1.14, run on 2024-01-01 10:00:00\n"
        "# Input file: s.mrc ; Number of micrographs: 5\n"
        "# Pixel size: 2.500 Angstroms ; acceleration voltage: 200.0 keV ; spherical aberration: 2.70 mm ; amplitude "
        "contrast: 0.07\n"
    )
    lines = [
        f"{z + 1:.6f} {u:.6f} {v:.6f} {a:.6f} {math.radians(p):.9f} 0.030650 5.279412"
        + ("" if hand is None else f" {hand}")
        for z, u, v, a, p in zip(*(column.tolist() for column in COLUMNS), strict=True)
    ]
    (folder / name).write_text((head if header else "# Columns: #1 micrograph number\n") + "\n".join(lines) + "\n")
    return folder / name


def imod(folder, name="s.defocus", flags=5, ranges=None):
    """Version 3 with astigmatism and phase shift; nm."""
    lines = [f"{flags}  0 0. 0. 0.  3"]
    for i, (_, u, v, a, p) in enumerate(zip(*(column.tolist() for column in COLUMNS), strict=True)):
        first, last = (i + 1, i + 1) if ranges is None else ranges[i]
        a = math.radians(a) if flags & 2 else a
        p = math.radians(p) if flags & 8 else p
        lines.append(
            f"{first}\t{last}\t-1.0\t1.0\t{u / 10:.4f}\t{v / 10:.4f}\t{a:.8f}\t{p:.8f}" + " 0.01" * bool(flags & 32)
        )
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def files(folder, kind):
    tilts = TiltScheme(NOMINAL, torch.ones(5))
    if kind == "ctffind":
        return ctffind(folder)
    if kind == "aretomo":
        return ctffind(folder, "s_CTF.txt", header=False, hand=1)
    if kind == "imod":
        return imod(folder)
    if kind == "imod radians":
        return imod(folder, flags=1 + 2 + 4 + 8 + 32)
    if kind == "warp":
        write_warp(folder / "w.xml", tilts, PIXEL, SHAPE, (30, 32, 40), optics=TRUTH)
        return folder / "w.xml"
    write_relion(folder / "r.star", tilts, TRUTH, PIXEL, (30, 32, 40), name="s", stack="s.mrc")
    return folder / "r.star"


KINDS = ["ctffind", "aretomo", "imod", "imod radians", "warp", "relion"]


@pytest.mark.filterwarnings("ignore:.*cut-on")
@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_is_the_one_of_the_file(tmp_path, kind):
    """Every file gives the same transfer function of each image, in the order of exposure."""
    series(tmp_path)
    got = import_series(tmp_path / "s.mrc", ctf_file=files(tmp_path, kind)).optics
    assert got is not None
    apart = (ctf(got, SHAPE, PIXEL) - ctf(TRUTH, SHAPE, PIXEL)).abs().max()
    assert float(apart) < 1e-5  # measured: 2e-7 at most, of the digits written
    assert float(got.voltage) == 200 and float(got.spherical_aberration) == 2.7


def test_another_astigmatism_is_another_image(tmp_path):
    """The test above can fail: an azimuth of the other sign, or a turn by 90 degrees, is far off."""
    for angle in (-AZIMUTH, AZIMUTH + 90):
        other = TRUTH.replace(astigmatism_angle=angle)
        assert float((ctf(other, SHAPE, PIXEL) - ctf(TRUTH, SHAPE, PIXEL)).abs().amax((1, 2)).min()) > 0.1


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_axis_of_the_astigmatism_in_an_image(tmp_path, kind):
    """The transfer function written out as the programs have it: the azimuth runs from columns to rows of the array."""
    series(tmp_path)
    got = import_series(tmp_path / "s.mrc", ctf_file=files(tmp_path, kind)).optics
    assert got is not None
    n, row = 128, 1
    ky, kx = (numpy.fft.fftfreq(n, PIXEL)[:, None], numpy.fft.fftfreq(n, PIXEL)[None])
    u, v, azimuth = (float(column[3]) for column in COLUMNS[1:4])  # section 3 is row 1
    lam = float(wavelength(200.0))
    k2, phi = kx**2 + ky**2, numpy.arctan2(ky, kx)
    focus = (u + v) / 2 + (u - v) / 2 * numpy.cos(2 * (phi - math.radians(azimuth)))
    chi = math.pi * lam * k2 * (0.5 * 2.7e7 * lam**2 * k2 - focus) - math.radians(12.0) * (k2 > 0)
    expected = numpy.sin(chi - math.asin(0.07))
    found = ctf(got.index(torch.tensor([row])), (n, n), PIXEL)[0].numpy()
    assert numpy.abs(found - expected).max() < 1e-4  # measured: 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_rows_follow_their_images(tmp_path, kind):
    """What is excluded takes its own row along."""
    series(tmp_path)
    got = import_series(tmp_path / "s.mrc", ctf_file=files(tmp_path, kind.removesuffix(" radians")), exclude=[0, 3])
    kept = [0, 2, 4]  # section 0 is row 3 of the scheme, section 3 is row 1
    assert got.optics is not None and got.tilts.angles.tolist() == NOMINAL[kept].tolist()
    assert torch.as_tensor(got.optics.defocus).tolist() == pytest.approx(DEFOCUS[kept].tolist(), abs=1e-2)


def test_aretomo_counts_by_angle_and_ctffind_by_section(tmp_path):
    """Of a stack in the order of exposure, with its angles in a list."""
    write_stack(tmp_path / "s.mrc", 20 + torch.rand(5, *SHAPE), PIXEL)
    write_tlt(tmp_path / "s.rawtlt", NOMINAL)
    by_angle = import_series(tmp_path / "s.mrc", ctf_file=ctffind(tmp_path, "s_CTF.txt", False, 1), voltage=200.0)
    by_section = import_series(tmp_path / "s.mrc", ctf_file=ctffind(tmp_path))
    assert by_angle.optics is not None and by_section.optics is not None
    assert torch.as_tensor(by_angle.optics.defocus).tolist() == pytest.approx(DEFOCUS.tolist())
    assert torch.as_tensor(by_section.optics.defocus).tolist() == pytest.approx(DEFOCUS[SECTIONS].tolist())
    with pytest.warns(UserWarning, match="dfHand is -1"):
        read_fitted_optics(ctffind(tmp_path, hand=-1))


def test_found_beside_the_stack(tmp_path):
    series(tmp_path)
    assert import_series(tmp_path / "s.mrc").optics is None
    imod(tmp_path)
    got = import_series(tmp_path / "s.mrc").optics
    assert got is not None and torch.as_tensor(got.defocus).tolist() == pytest.approx(DEFOCUS.tolist())
    given = Optics(voltage=200.0, defocus=1e4)
    kept = import_series(tmp_path / "s.mrc", optics=given).optics
    assert kept is not None and float(torch.as_tensor(kept.defocus)) == 1e4  # in place of what is beside
    both = import_series(tmp_path / "s.mrc", optics=given.replace(convergence=0.1), ctf_file=tmp_path / "s.defocus")
    assert both.optics is not None and both.optics.convergence == 0.1
    assert torch.as_tensor(both.optics.defocus).tolist() == pytest.approx(DEFOCUS.tolist())
    ctffind(tmp_path, "s_CTF.txt")
    with pytest.raises(
        ValueError, match="expected one beside the stack, got s.defocus, s_CTF.txt. Give it as ctf_file="
    ):
        import_series(tmp_path / "s.mrc")


def test_imods_ranges_of_views(tmp_path):
    """Version 2: one defocus a range, at its middle; between middles it is interpolated, beyond them constant."""
    (tmp_path / "s.defocus").write_text("1 2 -50 -40 2000 2\n3 5 0 20 2400\n")
    with pytest.warns(UserWarning, match="ranges of several views"):
        fit = read_fitted_optics(tmp_path / "s.defocus")
    assert fit is not None and fit.defocus.tolist() == pytest.approx([20000, 20800, 22400, 24000, 24000])
    assert fit.sections is not None and fit.sections.tolist() == [0, 1, 2, 3, 4]
    series(tmp_path)
    with pytest.warns(UserWarning, match="spherical_aberration 2.7 and amplitude_contrast 0.07. Give optics="):
        got = import_series(tmp_path / "s.mrc").optics
    assert got is not None and torch.as_tensor(got.defocus).tolist() == pytest.approx(
        [22400, 24000, 20800, 20000, 24000]
    )
    # two views whose axes differ by 90 degrees: between them the astigmatism vanishes, and does not turn
    (tmp_path / "a.defocus").write_text("1 0 0 0 0 3\n1 1 0 0 2100 2000 10\n3 3 0 0 2100 2000 100\n")
    with pytest.warns(UserWarning, match="interpolated"):
        fit = read_fitted_optics(tmp_path / "a.defocus")
    assert fit is not None and fit.astigmatism.tolist() == pytest.approx([1000, 0, 1000], abs=1e-9)


def test_the_target_is_the_last_resort(tmp_path):
    series(tmp_path)
    text = (tmp_path / "s.mrc.mdoc").read_text().replace("TiltAngle", "TargetDefocus = -3.5\nTiltAngle")
    (tmp_path / "s.mrc.mdoc").write_text(text)
    with pytest.warns(UserWarning, match="the defocus is the TargetDefocus of the .mdoc, 35000 to 35000 Å"):
        got = import_series(tmp_path / "s.mrc").optics
    assert got is not None and torch.as_tensor(got.defocus).tolist() == [35000.0] * 5


def test_what_does_not_fit_is_named(tmp_path):
    series(tmp_path)
    with pytest.raises(FormatError, match="s_fit.txt: voltage: expected 300 kV, as elsewhere, got 200 kV"):
        import_series(tmp_path / "s.mrc", ctf_file=ctffind(tmp_path), voltage=300.0)
    text = ctffind(tmp_path).read_text()
    (tmp_path / "s_fit.txt").write_text(text.replace("2.500 Ang", "2.100 Ang"))
    with pytest.raises(FormatError, match="pixel size: expected 2.5 Å, or a binning of it, got 2.1 Å"):
        import_series(tmp_path / "s.mrc", ctf_file=tmp_path / "s_fit.txt")
    (tmp_path / "s_fit.txt").write_text(text.replace("2.500 Ang", "0.625 Ang"))
    assert import_series(tmp_path / "s.mrc", ctf_file=tmp_path / "s_fit.txt").optics is not None
    text = ctffind(tmp_path).read_text().splitlines()
    (tmp_path / "s_fit.txt").write_text("\n".join(text[:-1]))
    with pytest.raises(FormatError, match=r"s_fit.txt: rows: expected one for each image, got none for sections \[4\]"):
        import_series(tmp_path / "s.mrc", ctf_file=tmp_path / "s_fit.txt")
    got = import_series(tmp_path / "s.mrc", ctf_file=tmp_path / "s_fit.txt", exclude=[4])
    assert got.optics is not None and len(torch.as_tensor(got.optics.defocus)) == 4
    series(tmp_path, voltage=None)
    with pytest.raises(
        FormatError, match="s.defocus: voltage: expected one .kV., got none here or in an .mdoc. Give volt"
    ):
        import_series(tmp_path / "s.mrc", ctf_file=imod(tmp_path))
    write_warp(tmp_path / "w.xml", TiltScheme(NOMINAL, torch.ones(5)), PIXEL, SHAPE, (30, 32, 40))
    with pytest.raises(FormatError, match="w.xml: defocus: expected CTF fits, got none"):
        import_series(tmp_path / "s.mrc", ctf_file=tmp_path / "w.xml")
    (tmp_path / "s.tlt2").write_text("1\n")
    with pytest.raises(FormatError, match="suffix: expected one of .star"):
        import_series(tmp_path / "s.mrc", ctf_file=tmp_path / "s.tlt2")


# ------------------------------------------------------------------------------------------------- resampled images


@pytest.mark.parametrize("n", [192, 193])
@pytest.mark.parametrize(
    "matrix",
    [
        [[math.cos(0.05), -math.sin(0.05)], [math.sin(0.05), math.cos(0.05)]],
        [[1.02, 0.0], [0.0, 1.02]],
        [[1.01, 0.01], [-0.015, 0.99]],
    ],
)
def test_optics_turn_with_a_resampled_image(n, matrix):
    """The point spread of an astigmatic lens, resampled, is that of the lens resampled: its axis turns along."""
    before = Optics(defocus=9000.0, astigmatism=3000.0, astigmatism_angle=20.0, spherical_aberration=0.0)
    matrix = torch.tensor(matrix, dtype=torch.float64)
    after = resampled_optics(before, matrix[None]).index(torch.tensor([0]))
    ky, kx = (
        torch.fft.fftfreq(n, PIXEL, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(n, PIXEL, dtype=torch.float64)[None],
    )
    spread = torch.exp(-0.5 * (2 * math.pi * 6.0) ** 2 * (kx**2 + ky**2))  # a scatterer 6 Å wide
    image = torch.fft.fftshift(torch.fft.ifft2(ctf(before, (n, n), PIXEL) * spread).real)
    back = torch.linalg.inv(matrix)  # what is at k was at L^-T k: the scatterer itself is deformed, too
    qx, qy = back[0, 0] * kx + back[1, 0] * ky, back[0, 1] * kx + back[1, 1] * ky
    deformed = torch.exp(-0.5 * (2 * math.pi * 6.0) ** 2 * (qx**2 + qy**2)) / torch.linalg.det(matrix)
    got = resampled(image, matrix)
    wanted = torch.fft.fftshift(torch.fft.ifft2(ctf(after, (n, n), PIXEL)[0] * deformed).real)
    unturned = torch.fft.fftshift(torch.fft.ifft2(ctf(before, (n, n), PIXEL) * deformed).real)
    middle = slice(n // 2 - 40, n // 2 + 40)
    off = float((got - wanted)[middle, middle].abs().max() / wanted.abs().max())
    wrong = float((got - unturned)[middle, middle].abs().max() / wanted.abs().max())
    assert off < 1e-12 and wrong > 5e-3  # measured: 6e-14 at most, and 5e-3 to 2e-2


def test_every_aberration_turns_with_the_image():
    """chi after, at k, is chi before at R k: coma, trefoil, higher terms and the tilt of the beam included."""
    names = ("astigmatism", "coma", "trefoil", "C32", "C34", "C41", "C43", "C45", "C52", "C54", "C56")
    sizes = {name: 10.0 ** (3 + (i > 0) + 2 * (i > 2) + (i > 4)) for i, name in enumerate(names)}
    angles = {name: 7.0 * i for i, name in enumerate(("astigmatism_angle", "coma_angle", "trefoil_angle"), 1)}
    angles |= {f"phi{name[1:]}": 11.0 * i for i, name in enumerate(names[3:], 1)}
    before = Optics(defocus=1e4, spherical_aberration=2.7, beam_tilt=(3.0, -1.0)).replace(**sizes, **angles)
    n = 64
    for quarter in (1, 2, 3):
        angle = math.pi / 2 * quarter
        matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        after = resampled_optics(before, matrix[None]).index(torch.tensor([0]))
        chi, other = aberration(before, (n, n), PIXEL), aberration(after, (n, n), PIXEL)[0]
        k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
        inside = (k.abs() < n // 2) & (k[:, None].abs() < n // 2)
        kx, ky = k.expand(n, n)[inside], k[:, None].expand(n, n)[inside]
        there = (matrix @ torch.stack([kx, ky])).round().long() % n
        torch.testing.assert_close(other[inside], chi[there[1], there[0]], atol=1e-6, rtol=1e-9)


def test_the_command_takes_a_ctf_file(tmp_path):
    from typer.testing import CliRunner

    from inverse.cli import app

    series(tmp_path, voltage=None)
    asked = [
        "reconstruct",
        str(tmp_path / "s.mrc"),
        "--thickness",
        "40",
        "--ctf-file",
        str(imod(tmp_path, "a.defocus")),
    ]
    result = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "t.mrc")])
    assert result.exit_code != 0 and "Give voltage=." in result.output.replace("\n", " ")
    result = CliRunner().invoke(app, [*asked, "--voltage", "200", "-o", str(tmp_path / "t.mrc")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "t.mrc").exists()
