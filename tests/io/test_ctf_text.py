"""CTF fits in plain text as CTFFIND, AreTomo2 and IMOD write them: odd columns, and whose azimuth it is."""

import math
import warnings

import pytest
import torch

from cryosim.core.constants import wavelength
from cryosim.io.aretomo import read_tlt_txt
from cryosim.io.files import FormatError
from cryosim.io.fitted_optics import read_fitted_optics
from cryosim.io.import_series import import_series
from cryosim.io.mrc import write_stack
from cryosim.microscope.optics import Optics, ctf

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{said}") for said in ("order of exposure", "usual")]


def optics(path):
    """Of three images at 6, -3 and 3 degrees, in the order of the stack."""
    write_stack(path.with_name("s.mrc"), 20 + torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)), 2.0)
    path.with_name("s.rawtlt").write_text("6\n-3\n3\n")
    found = import_series(path.with_name("s.mrc"), ctf_file=path, voltage=300.0, dose=3.0).optics
    assert found is not None
    return found


def phase_flip(first, second, axis, shape, pixel, voltage, cs, contrast, phase):
    """Contrast transfer as IMOD's ctfphaseflip.cpp and readDefocusFile have it, written out anew; it makes -ctf."""
    if second > first:  # readDefocusFile puts the larger first
        first, second, axis = second, first, axis - 90
    ny, nx = shape
    ky = torch.fft.fftfreq(ny, pixel, dtype=torch.float64)[:, None]
    kx = torch.fft.fftfreq(nx, pixel, dtype=torch.float64)[None]
    k2 = kx**2 + ky**2
    along = math.cos(math.radians(axis)) * kx + math.sin(math.radians(axis)) * ky
    cosine = along / k2.sqrt().clamp_min(1e-30)
    focus = 0.5 * (first + second) + 0.5 * (first - second) * (2 * cosine**2 - 1)
    c1 = math.pi * float(wavelength(voltage))
    c2 = c1 * cs * 1e7 * float(wavelength(voltage)) ** 2 / 2
    wave = (c2 * k2 - c1 * focus) * k2 - math.radians(phase) * (k2 > 0).double()
    return torch.sin(wave - math.atan(contrast / math.sqrt(1 - contrast**2)))


@pytest.mark.parametrize(("first", "second"), [(2400.0, 2100.0), (2100.0, 2400.0)])
@pytest.mark.parametrize("shape", [(40, 48), (41, 47)])
def test_imods_azimuth_is_of_the_first_defocus(tmp_path, first, second, shape):
    """An astigmatic image is transferred as IMOD corrects it, whichever defocus comes first."""
    lines = [f"{view} {view} 0 0 {first} {second} {axis} 12.0" for view, axis in ((1, 31.0), (2, -70.0), (3, 85.0))]
    (tmp_path / "s.defocus").write_text("5 0 0. 0. 0. 3\n" + "\n".join(lines) + "\n")
    found = optics(tmp_path / "s.defocus")
    got = ctf(found, shape, 2.0)
    for image, axis in zip(got, (31.0, -70.0, 85.0), strict=True):
        expected = phase_flip(10 * first, 10 * second, axis, shape, 2.0, 300.0, 2.7, 0.07, 12.0)
        assert float((image - expected).abs().max()) < 1e-11  # measured: 1e-13
        turned = phase_flip(10 * first, 10 * second, axis + 90, shape, 2.0, 300.0, 2.7, 0.07, 12.0)
        assert float((image - turned).abs().max()) > 0.5
    assert bool((torch.as_tensor(found.astigmatism) > 0).all())  # largest less smallest, as `Optics` has it


def test_the_quality_of_a_fit_may_be_infinite(tmp_path):
    """CTFFIND 5 has ten columns, and inf where no ring was fitted; what is used has to be finite all the same."""
    rows = [f"{z} 20300.0 20000.0 31.0 0.0 -nan inf 176.2 12.1 950.0\n" for z in (1, 2, 3)]
    (tmp_path / "f.txt").write_text("# Output from CTFFind version 5.0\n" + "".join(rows))
    fit = read_fitted_optics(tmp_path / "f.txt")
    assert fit is not None and fit.defocus.tolist() == [20150.0] * 3 and not fit.ascending
    (tmp_path / "f.txt").write_text("".join(rows).replace("31.0", "inf"))
    with pytest.raises(FormatError, match="f.txt: line 1: expected a finite number, got 'inf'"):
        read_fitted_optics(tmp_path / "f.txt")
    (tmp_path / "f.txt").write_text("".join(rows).replace("176.2", "many"))
    with pytest.raises(FormatError, match="f.txt: line 1: expected a number, got 'many'"):
        read_fitted_optics(tmp_path / "f.txt")


def test_aretomo2_counts_by_angle(tmp_path):
    head = "# Columns: #1 micrograph number; #2 - defocus 1 [A]; #3 - defocus 2; #4 - azimuth of astigmatism\n"
    rows = [f"   {z}   {2e4 + 1000 * z:.2f}  {2e4 + 1000 * z:.2f}  31.00  0.00  0.10  10.0000\n" for z in (1, 2, 3)]
    (tmp_path / "s_ctf.txt").write_text(head + "".join(rows))
    assert torch.as_tensor(optics(tmp_path / "s_ctf.txt").defocus).tolist() == [23000.0, 21000.0, 22000.0]
    (tmp_path / "s_ctf.txt").write_text(head + "".join(rows[:2]))  # it leaves dark images out: which is not told
    with pytest.raises(FormatError, match="s_ctf.txt: rows: expected one for each of the 3 sections, got 2"):
        optics(tmp_path / "s_ctf.txt")


def test_fits_that_have_failed_are_named(tmp_path):
    """Section 1 has 0.5 of the median less 1 Å of astigmatism, section 2 is off by half of the median and 1 Å."""
    rows = [(20000, 20000), (24999, 15000), (9998, 9998)]
    (tmp_path / "f.txt").write_text("".join(f"{z} {u} {v} 0 0 0 5\n" for z, (u, v) in enumerate(rows, 1)))
    with pytest.warns(UserWarning, match=r"f.txt: fits that .* 20000 Å: section 2: defocus 9998 Å, astigmatism 0 Å. C"):
        optics(tmp_path / "f.txt")
    rows = [(20000, 20000), (25002, 15000), (10010, 10010)]
    (tmp_path / "f.txt").write_text("".join(f"{z} {u} {v} 0 0 0 5\n" for z, (u, v) in enumerate(rows, 1)))
    with pytest.warns(UserWarning, match=r"20000 Å: section 1: defocus 20001 Å, astigmatism 10002 Å. Correct"):
        optics(tmp_path / "f.txt")
    (tmp_path / "f.txt").write_text("".join(f"{z} {2e4 + 900 * z} {2e4 - 900 * z} 0 0 0 5\n" for z in (1, 2, 3)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optics(tmp_path / "f.txt")
    assert not [w for w in caught if "probably failed" in str(w.message)]


def test_a_long_line_of_a_damaged_file_is_shortened(tmp_path):
    (tmp_path / "s.rawtlt").write_text("9" * 200_000)
    with pytest.raises(FormatError, match=r"line 1: expected a tilt angle") as caught:
        read_tlt_txt(tmp_path / "s.rawtlt")
    assert len(str(caught.value)) < 1500 + len(str(tmp_path))


@pytest.mark.parametrize("text", ["1 0 0.0 0.0 0.0 3\n1 1 0 0 2000 2100 31\n2 2 3 3 2000 2100 31\n"])
def test_a_file_of_imod_that_is_called_txt_is_refused(tmp_path, text):
    """AreTomo3's _CTF_Imod.txt: the azimuth there is not of the first defocus."""
    (tmp_path / "s_CTF_Imod.txt").write_text(text)
    with pytest.raises(FormatError, match="s_CTF_Imod.txt: numbers of images"):
        read_fitted_optics(tmp_path / "s_CTF_Imod.txt")


def test_the_reference_is_not_blind():
    """The formula above and `ctf` agree without a file, so the tests measure the reading alone."""
    lens = Optics(
        300.0,
        defocus=22500.0,
        astigmatism=3000.0,
        astigmatism_angle=31.0,
        spherical_aberration=2.7,
        phase_shift=12.0,
        amplitude_contrast=0.07,
    )
    expected = phase_flip(24000.0, 21000.0, 31.0, (41, 48), 2.0, 300.0, 2.7, 0.07, 12.0)
    assert float((ctf(lens, (41, 48), 2.0) - expected).abs().max()) < 1e-11  # measured: 1e-13
