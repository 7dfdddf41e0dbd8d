"""The sum over the source against the envelopes that stand for it, and against what no envelope can do."""

import math

import pytest
import torch

from cryosim.core.constants import wavelength
from cryosim.core.fourier import SamplingWarning, squared_frequencies
from cryosim.microscope.coherence import partially_coherent_image
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics

pytestmark = pytest.mark.filterwarnings("ignore::cryosim.core.fourier.SamplingWarning")

LENS = {"defocus": 4000.0, "astigmatism": 300.0, "astigmatism_angle": 20.0, "spherical_aberration": 2.7}
ENERGY = {"chromatic_aberration": 2.7, "energy_spread": 2.0, "lens_ripple": 2e-6}
PIXEL = 1.2


def detail(shape, generator, blur=8.0):
    """Random image (y, x) of mean 0 and largest value 1, damped towards the Nyquist frequency."""
    noise = torch.fft.fft2(torch.randn(*shape, generator=generator, dtype=torch.float64))
    noise = noise * torch.exp(-blur * squared_frequencies(shape, PIXEL, dtype=torch.float64))
    noise[0, 0] = 0
    seen = torch.fft.ifft2(noise).real
    return seen / seen.abs().max()


def linear_part(function, scattered, optics, **points):
    """What is of first order in the scattered wave: the half of the difference between wave and opposite wave."""
    up, down = (function(1 + sign * 1e-2 * scattered, optics, PIXEL, **points) for sign in (1, -1))
    return (up - down) / 2e-2


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("shape", [(32, 32), (27, 30)])
@pytest.mark.parametrize("tilt", [(0.0, 0.0), (0.6, -0.3)])
def test_focal_spread_of_a_weak_object_is_an_envelope(shape, tilt, generator):
    """Exactly, with enough points, also for a tilted beam."""
    optics = Optics(**LENS, **ENERGY, beam_tilt=tilt)
    scattered = (1j - 0.1) * detail(shape, generator)
    enveloped = linear_part(image, scattered, optics)
    assert relative(linear_part(partially_coherent_image, scattered, optics, focus_points=41), enveloped) < 1e-9
    without = linear_part(image, scattered, optics.replace(chromatic_aberration=0.0))
    assert relative(without, enveloped) > 0.05
    usual = optics.replace(energy_spread=0.7, lens_ripple=0.0)  # the phase pi lambda Delta k^2 reaches 1.3 rad
    nine_points = linear_part(partially_coherent_image, scattered, usual)
    assert relative(nine_points, linear_part(image, scattered, usual)) < 1e-6


@pytest.mark.parametrize("tilt", [(0.0, 0.0), (0.6, -0.3)])
@pytest.mark.parametrize("changes", [{}, {"coma": 3e4, "coma_angle": 35.0, "C34": 1e6}])
def test_a_wide_source_of_a_weak_object_is_nearly_an_envelope(changes, tilt, generator):
    """What the envelope leaves out, the curvature of chi over the source, is a small part of what it does."""
    scattered = 1j * detail((32, 30), generator)
    apart = {}
    for convergence in (0.01, 0.02, 0.04, 0.2):
        optics = Optics(**LENS, **changes, beam_tilt=tilt, convergence=convergence)
        enveloped = linear_part(image, scattered, optics)
        summed = linear_part(partially_coherent_image, scattered, optics, source_points=9)
        apart[convergence] = relative(summed, enveloped)
        damped = relative(linear_part(image, scattered, optics.replace(convergence=0.0)), enveloped)
        assert apart[convergence] < 0.08 * damped
    assert apart[0.01] < 5e-5
    assert math.log2(apart[0.04] / apart[0.01]) / 2 == pytest.approx(2, abs=0.1)


def test_defocus_alone_makes_the_spatial_envelope_exact(generator):
    """chi is a parabola then, whose change with the direction is linear."""
    scattered = 1j * detail((32, 30), generator)
    optics = Optics(defocus=4000.0, astigmatism=800.0, convergence=0.3)
    enveloped = linear_part(image, scattered, optics)
    assert relative(linear_part(partially_coherent_image, scattered, optics, source_points=21), enveloped) < 1e-9
    assert relative(linear_part(image, scattered, optics.replace(convergence=0.0)), enveloped) > 0.05


def test_envelopes_lose_electrons_that_the_sum_keeps(generator):
    """Every point of the source makes an image of all electrons; envelopes damp what scattered waves make together."""
    wave = torch.exp(1j * detail((32, 30), generator))
    optics = Optics(**LENS, **ENERGY, convergence=0.2)
    summed, enveloped = partially_coherent_image(wave, optics, PIXEL), image(wave, optics, PIXEL)
    assert float(summed.mean()) == pytest.approx(1.0, abs=1e-12)
    assert float(enveloped.mean()) < 0.97
    assert relative(enveloped, summed) > 0.03
    weak = torch.exp(1e-3j * detail((32, 30), generator))
    assert relative(image(weak, optics, PIXEL), partially_coherent_image(weak, optics, PIXEL)) < 1e-5


def test_two_beams_make_fringes_of_known_contrast():
    """Waves +k and -k of one strength have no path difference in focus, so the spread leaves their fringes alone."""
    n, m = 32, 6
    x = torch.arange(n, dtype=torch.float64) * PIXEL
    k = m / (n * PIXEL)
    wave = (1 + 2j * 0.3 * torch.cos(2 * math.pi * k * x)).expand(n, n).contiguous()
    optics = Optics(defocus=2000.0, **ENERGY)
    delta = 2.7e7 * math.sqrt((2.0 / 3e5) ** 2 + (2 * 2e-6) ** 2)
    chi = -math.pi * wavelength(300.0) * 2000.0 * k**2
    damping = math.exp(-((math.pi * wavelength(300.0) * delta * k**2) ** 2) / 2)
    fringes = torch.fft.fft(partially_coherent_image(wave, optics, PIXEL, focus_points=25)[0]) / n
    assert float(fringes[m].real) == pytest.approx(0.6 * math.sin(chi) * damping, abs=1e-9)
    assert float(fringes[2 * m].real) == pytest.approx(0.3**2, abs=1e-9)  # an envelope would take damping^2 of it
    assert damping < 0.96
    enveloped = torch.fft.fft(image(wave, optics, PIXEL)[0]) / n
    assert float(enveloped[2 * m].real) == pytest.approx((0.3 * damping) ** 2, abs=1e-9)


def test_more_points_change_nothing(generator):
    wave = torch.exp(0.5j * detail((24, 27), generator))
    optics = Optics(**LENS, chromatic_aberration=2.7, energy_spread=0.7, convergence=0.05)
    usual = partially_coherent_image(wave, optics, PIXEL)
    assert relative(usual, partially_coherent_image(wave, optics, PIXEL, focus_points=15, source_points=9)) < 1e-5


def test_a_point_source_makes_one_image(generator):
    wave = torch.exp(0.5j * detail((24, 27), generator))
    optics = Optics(**LENS, coma=1e4, beam_tilt=(0.3, 0.2), aperture=8.0)
    torch.testing.assert_close(partially_coherent_image(wave, optics, PIXEL), image(wave, optics, PIXEL))
    assert partially_coherent_image(wave.to(torch.complex64), optics, PIXEL).dtype == torch.float32


def test_optics_of_each_tilt_equal_loops(generator):
    wave = torch.exp(0.5j * detail((12, 15), generator))
    optics = Optics(
        defocus=[1000.0, 2000.0],
        chromatic_aberration=2.7,
        energy_spread=torch.tensor([0.5, 1.0], dtype=torch.float64),
        convergence=torch.tensor([0.05, 0.1], dtype=torch.float64),
        beam_tilt=[[0.1, 0.0], [0.0, -0.2]],
    )
    together = partially_coherent_image(wave, optics, PIXEL, focus_points=3, source_points=3)
    for i in range(2):
        one = partially_coherent_image(wave, optics.index(i), PIXEL, focus_points=3, source_points=3)
        torch.testing.assert_close(together[i], one)


SLOPES = {
    "defocus": [1e-2, 4000.0],
    "chromatic_aberration": [1e-4, 2.7, 0.0],
    "energy_spread": [1e-4, 2.0, 0.0],
    "voltage_ripple": [1e-10, 1e-6, 0.0],
    "convergence": [1e-5, 0.2, 0.0],
    "aperture": [1e-5, 9.13],
    "coma": [1.0, 0.0],
    "voltage": [1e-3, 300.0],
}


@pytest.mark.parametrize(("name", "step", "value"), [(n, s, v) for n, (s, *values) in SLOPES.items() for v in values])
def test_slopes(name, step, value, generator):
    wave = torch.exp(0.5j * detail((9, 12), generator))
    weights = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    base = LENS | {"chromatic_aberration": 2.7, "energy_spread": 2.0, "convergence": 0.2, "aperture": 9.0}

    def score(given):
        seen = partially_coherent_image(wave, Optics(**(base | {name: given})), PIXEL, focus_points=3, source_points=3)
        return (seen * weights).sum()

    at = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(at), at)
    with torch.no_grad():
        difference = float(score(at + step) - score(at - step)) / (2 * step)
    assert float(gradient) == pytest.approx(difference, rel=2e-6, abs=1e-7)
    assert float(torch.func.grad(score)(at.detach())) == pytest.approx(float(gradient))


def test_points_of_the_source_lie_where_the_illumination_is_one_over_e(generator):
    """Directions of density exp(-q^2 / beta^2) displace an image by (beta defocus)^2 / 2 per axis, in variance."""
    optics = Optics(defocus=5000.0, convergence=0.4)
    wave = 1 + 1e-2 * torch.exp(-squared_distance(48) / (2 * 6.0**2)).to(torch.complex128)
    still = image(wave, optics.replace(convergence=0.0), PIXEL)
    summed = partially_coherent_image(wave, optics, PIXEL, source_points=15)
    k = 1 / (48 * PIXEL)
    ratio = (torch.fft.fft2(summed)[0, 1] / torch.fft.fft2(still)[0, 1]).real
    variance = -math.log(float(ratio)) / (2 * math.pi**2 * k**2)
    assert variance == pytest.approx((0.4e-3 * 5000.0) ** 2 / 2, rel=1e-2)


def squared_distance(n):
    x = (torch.arange(n, dtype=torch.float64) - n // 2) * PIXEL
    return x**2 + x[:, None] ** 2


@pytest.mark.parametrize("points", [{"focus_points": 0}, {"source_points": -1}])
def test_no_points_are_refused(points):
    with pytest.raises(ValueError, match=f"expected {next(iter(points))} of 1 or more"):
        partially_coherent_image(torch.ones(8, 8, dtype=torch.complex128), Optics(**ENERGY), PIXEL, **points)


@pytest.mark.filterwarnings("default::cryosim.core.fourier.SamplingWarning")
def test_a_small_field_is_named():
    with pytest.warns(SamplingWarning, match="more than half the field"):
        partially_coherent_image(torch.ones(8, 8, dtype=torch.complex128), Optics(defocus=20000.0), PIXEL)
