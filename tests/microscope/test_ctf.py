"""The contrast transfer function: its value at zero, its zeros, its axes, its slopes."""

import math

import pytest
import torch

from cryosim.core.constants import wavelength
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics, aberration, ctf

FULL = {
    "voltage": 300.0,
    "defocus": 9000.0,
    "astigmatism": 700.0,
    "astigmatism_angle": 25.0,
    "spherical_aberration": 2.7,
    "phase_shift": 30.0,
    "amplitude_contrast": 0.07,
}


def along(optics, k, direction=(1, 0)):
    """ctf at the frequency k [1/Å] along (x, y), read off a grid made so that a sample stands there."""
    n = 8
    pixel_size = math.hypot(*direction) / (n * k)
    return float(ctf(optics, (n, n), pixel_size)[direction[1], direction[0]])


@pytest.mark.parametrize("contrast", [0.0, 0.07, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(9, 8), (8, 11)])
def test_at_zero_frequency_only_absorption_is_seen(contrast, shape):
    optics = Optics(**(FULL | {"amplitude_contrast": contrast}))
    assert float(ctf(optics, shape, 1.3)[0, 0]) == pytest.approx(-contrast, abs=1e-14)


@pytest.mark.parametrize("voltage", [100.0, 300.0])
def test_underfocus_is_dark_at_low_frequency(voltage):
    k = 0.5 / math.sqrt(wavelength(voltage) * 10000.0)
    assert along(Optics(voltage=voltage, defocus=10000.0, spherical_aberration=2.7), k) < -0.5
    assert along(Optics(voltage=voltage, defocus=-10000.0, spherical_aberration=2.7), k) > 0.5


@pytest.mark.parametrize("voltage", [200.0, 300.0])
@pytest.mark.parametrize("cs", [0.0, 2.7])
@pytest.mark.parametrize("contrast", [0.0, 0.1])
@pytest.mark.parametrize("phase_shift", [0.0, 90.0])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_thon_zeros_stand_where_the_formula_puts_them(voltage, cs, contrast, phase_shift, number):
    """pi lambda k^2 (defocus - Cs lambda^2 k^2 / 2) + phase shift + asin A = n pi, a quadratic in k^2."""
    wave, defocus = wavelength(voltage), 12000.0
    a, b = 0.5 * cs * 1e7 * wave**3, -wave * defocus
    c = number - (math.radians(phase_shift) + math.asin(contrast)) / math.pi
    k2 = -c / b if a == 0 else (-b - math.sqrt(b * b - 4 * a * c)) / (2 * a)
    optics = Optics(voltage, defocus, spherical_aberration=cs, phase_shift=phase_shift, amplitude_contrast=contrast)
    k = math.sqrt(k2)
    assert along(optics, k) == pytest.approx(0, abs=1e-9)
    assert along(optics, 0.99 * k) * along(optics, 1.01 * k) < 0


@pytest.mark.parametrize("astigmatism", [1500.0, -1500.0])
@pytest.mark.parametrize(
    ("angle", "direction"), [(0.0, (1, 0)), (90.0, (0, 1)), (45.0, (1, 1)), (135.0, (-1, 1)), (-45.0, (-1, 1))]
)
def test_astigmatism_angle_points_to_the_largest_underfocus(angle, direction, astigmatism):
    """From x towards y: along it the defocus is larger by half the astigmatism, across it smaller."""
    optics = Optics(defocus=9000.0, astigmatism=astigmatism, astigmatism_angle=angle, spherical_aberration=2.7)
    for k in (0.05, 0.11):
        for where, sign in ((direction, 1), ((-direction[1], direction[0]), -1)):
            round_one = Optics(defocus=9000.0 + sign * astigmatism / 2, spherical_aberration=2.7)
            assert along(optics, k, where) == pytest.approx(along(round_one, k), abs=1e-9)


def test_negative_astigmatism_is_astigmatism_at_right_angles():
    one = Optics(**(FULL | {"astigmatism": -700.0}))
    two = Optics(**(FULL | {"astigmatism_angle": 115.0}))
    torch.testing.assert_close(ctf(one, (15, 16), 1.1), ctf(two, (15, 16), 1.1))


@pytest.mark.parametrize("astigmatism", [0.0, -300.0, 300.0])
def test_gradients_are_finite_for_every_astigmatism(astigmatism):
    values = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in FULL.items()}
    values["astigmatism"] = torch.tensor(astigmatism, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(ctf(Optics(**values), (9, 10), 1.1).square().sum(), list(values.values()))
    assert all(torch.isfinite(g) for g in gradients)


STEPS = {
    "voltage": 1e-3,
    "defocus": 1e-2,
    "astigmatism": 1e-2,
    "astigmatism_angle": 1e-4,
    "spherical_aberration": 1e-5,
    "phase_shift": 1e-4,
    "amplitude_contrast": 1e-5,
}


@pytest.mark.parametrize("name", list(FULL))
@pytest.mark.parametrize("function", ["ctf", "image"])
def test_slope_of_every_field(name, function, generator):
    weights = torch.randn(3, 13, 12, generator=generator, dtype=torch.float64)
    wave = 1 + 0.2 * torch.randn(13, 12, generator=generator, dtype=torch.complex128)

    def score(value):
        optics = Optics(**(FULL | {name: value}))
        seen = ctf(optics, (13, 12), 1.4) if function == "ctf" else image(wave, optics, 1.4)
        return (seen * weights).sum()

    value = torch.tensor(FULL[name], dtype=torch.float64) * torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64)
    gradient = torch.func.grad(score)(value)
    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = STEPS[name]
        slope = float(score(value + step) - score(value - step)) / (2 * STEPS[name])
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_slope_in_the_pixel_size(generator):
    """Frequencies follow the pixel size; a package that detaches them has the wrong slope."""
    weights = torch.randn(13, 12, generator=generator, dtype=torch.float64)
    size = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: (ctf(Optics(**FULL), (13, 12), d) * weights).sum(), size, eps=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_transfer_function_for_each_tilt(dtype):
    defocus = torch.tensor([3000.0, 12000.0, 50000.0], dtype=dtype)
    optics = Optics(**(FULL | {"defocus": defocus}))
    together = ctf(optics, (15, 18), 1.2)
    assert together.shape == (3, 15, 18)
    assert together.dtype == torch.float64
    for i in range(3):
        one = ctf(Optics(**(FULL | {"defocus": float(defocus[i])})), (15, 18), 1.2)
        torch.testing.assert_close(together[i], one)


def test_single_precision_of_the_result():
    single = ctf(Optics(**FULL), (64, 63), 1.0, dtype=torch.float32)
    assert single.dtype == torch.float32
    assert (single.double() - ctf(Optics(**FULL), (64, 63), 1.0)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(16, 17), (15, 18)])
def test_the_lens_turns_only_phases(shape, generator):
    """|H| = 1 and chi(-k) = chi(k): the mean intensity stays, and a real even image stays even."""
    chi = aberration(Optics(**FULL), shape, 1.2)
    mirrored = chi.flip(0, 1).roll((1, 1), (0, 1))
    unpaired = torch.ones(shape, dtype=torch.bool)
    for axis, n in enumerate(shape):  # the Nyquist frequency of an even axis is its own partner only on that axis
        if n % 2 == 0:
            unpaired.select(axis, n // 2).fill_(False)
    torch.testing.assert_close(chi[unpaired], mirrored[unpaired])
    wave = 1 + 0.3 * torch.randn(*shape, generator=generator, dtype=torch.complex128)
    seen = image(wave, Optics(**FULL), 1.2)
    assert float(seen.mean()) == pytest.approx(float((wave.abs() ** 2).mean()), rel=1e-12)


@pytest.mark.parametrize("voltage", [0.0, -300.0])
def test_voltage_must_be_positive(voltage):
    with pytest.raises(ValueError, match="voltage"):
        Optics(voltage=voltage)


@pytest.mark.parametrize("contrast", [-0.1, 1.1])
def test_amplitude_contrast_is_a_fraction(contrast):
    with pytest.raises(ValueError, match="amplitude_contrast"):
        Optics(amplitude_contrast=contrast)


def test_one_value_per_tilt_as_a_list():
    listed, stacked = (
        Optics(defocus=[1e4, 2e4, 3e4]),
        Optics(defocus=torch.tensor([1e4, 2e4, 3e4], dtype=torch.float64)),
    )
    torch.testing.assert_close(ctf(listed, (8, 9), 2.0), ctf(stacked, (8, 9), 2.0))
    assert ctf(listed, (8, 9), 2.0).shape == (3, 8, 9)
