"""Higher aberrations, beam tilt, aperture and envelopes: laws of the lens, slopes of every field, refusals."""

import dataclasses
import math
import warnings

import pytest
import torch
from torch.utils import _pytree

from cryosim.core.constants import wavelength
from cryosim.core.fourier import SamplingWarning, squared_frequencies
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import (
    Optics,
    aberration,
    aperture_mask,
    check_per_tilt,
    ctf,
    displacement,
    envelope,
    transfer,
)

pytestmark = pytest.mark.filterwarnings("ignore::cryosim.core.fourier.SamplingWarning")

FULL = {
    "voltage": 300.0,
    "defocus": 900.0,
    "astigmatism": 170.0,
    "astigmatism_angle": 25.0,
    "spherical_aberration": 2.7,
    "phase_shift": 30.0,
    "amplitude_contrast": 0.07,
    "coma": 2e4,
    "coma_angle": 40.0,
    "trefoil": -1.5e4,
    "trefoil_angle": 15.0,
    "C32": 3e5,
    "phi32": 70.0,
    "C34": -2e5,
    "phi34": -20.0,
    "C41": 2e7,
    "phi41": 100.0,
    "C43": 1e7,
    "phi43": 33.0,
    "C45": -3e7,
    "phi45": 12.0,
    "C50": 4e9,
    "C52": 2e9,
    "phi52": 81.0,
    "C54": -1e9,
    "phi54": 5.0,
    "C56": 3e9,
    "phi56": 44.0,
    "chromatic_aberration": 2.7,
    "energy_spread": 0.4,
    "voltage_ripple": 1e-6,
    "lens_ripple": 7e-7,
    "convergence": 0.4,
    "aperture": 9.13,
    "beam_tilt": (0.7, -0.4),
    "slit": 10.0,
}
# beside each value, a step for central differences
STEPS = {
    "voltage": 1e-3,
    "defocus": 1e-2,
    "astigmatism": 1e-2,
    "spherical_aberration": 1e-4,
    "phase_shift": 1e-3,
    "amplitude_contrast": 1e-5,
    "coma": 1.0,
    "trefoil": 1.0,
    "C32": 1e1,
    "C34": 1e1,
    "C41": 1e3,
    "C43": 1e3,
    "C45": 1e3,
    "C50": 1e5,
    "C52": 1e5,
    "C54": 1e5,
    "C56": 1e5,
    "chromatic_aberration": 1e-4,
    "energy_spread": 1e-4,
    "voltage_ripple": 1e-10,
    "lens_ripple": 1e-10,
    "convergence": 1e-5,
    "aperture": 1e-5,
    "beam_tilt": 1e-5,
} | {name: 1e-3 for name in FULL if name.startswith("phi") or name.endswith("angle")}
FUNCTIONS = {"transfer": transfer, "ctf": ctf, "envelope": envelope, "aperture": aperture_mask}
SHAPE, PIXEL = (9, 12), 0.9


def tensors(values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def mirrored(values):
    """values(-k) of unshifted (..., y, x)."""
    return values.flip(-2, -1).roll((1, 1), (-2, -1))


def smooth(shape, pixel_size, generator, blur=30.0):
    """Random real image without frequencies near Nyquist, of mean 0."""
    noise = torch.fft.fft2(torch.randn(*shape, generator=generator, dtype=torch.float64))
    noise = noise * torch.exp(-blur * squared_frequencies(shape, pixel_size, dtype=torch.float64))
    noise[0, 0] = 0
    seen = torch.fft.ifft2(noise).real
    return seen / seen.abs().max()


def test_every_field_is_known_here():
    assert list(FULL) == [field.name for field in dataclasses.fields(Optics)]
    assert set(STEPS) == set(FULL) - {"slit"}


# --- the polar notation


def test_polar_coefficients_there_and_back():
    optics = Optics(**FULL)
    polar = optics.polar
    assert polar["C10"] == -900
    assert polar["C12"] == -85
    assert polar["phi12"] == 25
    assert polar["C30"] == 2.7e7
    assert len(polar) == 25
    own = {"defocus", "astigmatism", "astigmatism_angle", "spherical_aberration", "coma", "coma_angle", "trefoil"}
    others = {name: FULL[name] for name in FULL if name not in {*polar, *own, "trefoil_angle"}}
    again = Optics.from_polar(**polar, **others)
    for name, value in FULL.items():
        assert getattr(again, name) == pytest.approx(value)
    assert str(Optics.from_polar(C10=0.0).defocus) == "0.0"
    assert str(Optics().polar["C10"]) == "0.0"


def test_a_wrong_coefficient_is_refused():
    with pytest.raises(TypeError, match="C99"):
        Optics.from_polar(C99=1.0)
    with pytest.raises(TypeError, match="defocus"):
        Optics.from_polar(C10=1.0, defocus=1.0)


@pytest.mark.parametrize("shape", [(9, 12), (10, 7)])
def test_odd_orders_are_odd_and_even_ones_even(shape):
    inner = torch.ones(shape, dtype=torch.bool)  # the Nyquist frequency of an even axis is its own partner
    for axis, n in enumerate(shape):
        if n % 2 == 0:
            inner.select(axis, n // 2).fill_(False)
    for name, angle in [("coma", "coma_angle"), ("trefoil", "trefoil_angle")] + [
        (f"C{i}", f"phi{i}") for i in (41, 43, 45)
    ]:
        chi = aberration(Optics(**{name: FULL[name], angle: 20.0}), shape, 1.0)
        torch.testing.assert_close(chi[inner], -mirrored(chi)[inner])
        assert chi.abs().max() > 0.01
    for i in (32, 34, 52, 54, 56):
        chi = aberration(Optics(**{f"C{i}": FULL[f"C{i}"], f"phi{i}": 20.0}), shape, 1.0)
        torch.testing.assert_close(chi[inner], mirrored(chi)[inner])
        assert chi.abs().max() > 0.01


def test_displacement_is_the_slope_of_the_aberration():
    optics = Optics(**FULL)
    k = torch.tensor([[0.13, -0.07, 0.02], [-0.11, 0.05, 0.21]], dtype=torch.float64)  # (x | y, point) [1/Å]
    along = displacement(optics, k[0], k[1])
    for axis in range(2):
        step = torch.zeros(2, 1, dtype=torch.float64)
        step[axis] = 1e-5

        def phase(at):
            """chi at single frequencies: the lens is turned until each lies along x, on sample 1 of a row."""
            found = []
            for kx, ky in at.T.tolist():
                size = 1 / (8 * math.hypot(kx, ky))
                turned = rotated(optics, -math.degrees(math.atan2(ky, kx)))
                found.append(aberration(turned, (1, 8), size)[0, 1])
            return torch.stack(found)

        slope = (phase(k + step) - phase(k - step)) / (2e-5 * 2 * math.pi)
        torch.testing.assert_close(along[axis], slope, rtol=1e-6, atol=1e-5)


def rotated(optics, degrees):
    """The same lens turned about its axis."""
    angles = {n: getattr(optics, n) + degrees for n in FULL if n.startswith("phi") or n.endswith("_angle")}
    (x, y), t = optics.beam_tilt, math.radians(degrees)
    tilt = (x * math.cos(t) - y * math.sin(t), x * math.sin(t) + y * math.cos(t))
    return optics.replace(**angles, beam_tilt=tilt)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_lens_turned_by_a_right_angle_turns_its_image(function):
    one = FUNCTIONS[function](Optics(**FULL), (9, 9), 0.9)
    turned = FUNCTIONS[function](rotated(Optics(**FULL), 90.0), (9, 9), 0.9)
    expected = mirrored_x(one.mT)  # (kx, ky) -> (-ky, kx)
    torch.testing.assert_close(turned, expected)


def mirrored_x(values):
    return values.flip(-1).roll(1, -1)


# --- beam tilt


@pytest.mark.parametrize("shape", [(64, 60), (63, 55)])
@pytest.mark.parametrize("steps", [(2, 0), (0, -3), (-2, 1)])
def test_tilted_beam_is_a_carrier_before_an_upright_lens(shape, steps, generator):
    """exp(2 pi i kt.r) psi through H(k), seen as intensity, is psi through the lens of the tilted beam."""
    size = 1.1
    lens = FULL | {"phase_shift": 0.0, "beam_tilt": (0.0, 0.0), "aperture": 7.0}
    lens |= {"chromatic_aberration": 0.0, "convergence": 0.0}  # envelopes are no filters of the carried wave
    phase = smooth(shape, size, generator)
    wave = torch.exp((0.4j - 0.1) * phase)
    spectrum = torch.fft.fft2(wave) * (squared_frequencies(shape, size, dtype=torch.float64) < 0.3**2)
    wave = torch.fft.ifft2(spectrum)
    y, x = torch.arange(shape[0], dtype=torch.float64)[:, None], torch.arange(shape[1], dtype=torch.float64)
    carrier = torch.exp(2j * math.pi * (steps[0] * x / shape[1] + steps[1] * y / shape[0]))
    mrad = tuple(1e3 * wavelength(300.0) * step / (n * size) for step, n in zip(steps, shape[::-1], strict=True))
    carried = image(wave * carrier, Optics(**lens), size)
    tilted = image(wave, Optics(**(lens | {"beam_tilt": mrad})), size)
    assert float((carried - tilted).abs().max()) < 1e-10
    assert float((image(wave, Optics(**lens), size) - tilted).abs().max()) > 1e-2


@pytest.mark.parametrize("defocus", [6000.0, -6000.0])
@pytest.mark.parametrize("tilt", [(3.0, 0.0), (0.0, 2.0), (-2.0, 1.0)])
def test_tilted_beam_moves_a_defocused_image(defocus, tilt):
    """Underfocus sees the wave as it was before: by -defocus * tilt from where it stands."""
    n, size = 64, 2.0
    y = (torch.arange(n, dtype=torch.float64) - n // 2) * size
    blob = 1e-3 * torch.exp(-(y[:, None] ** 2 + y**2) / (2 * 8.0**2))
    seen = image(1 - blob.to(torch.complex128), Optics(defocus=defocus, beam_tilt=tilt), size)
    upright = image(1 - blob.to(torch.complex128), Optics(defocus=defocus), size)
    ratio = torch.fft.fft2(seen - 1) / torch.fft.fft2(upright - 1)
    turn = 2 * math.pi / (n * size)  # phase of the first frequency per Å
    moved = [-float(ratio[0, 1].angle()) / turn, -float(ratio[1, 0].angle()) / turn]
    assert moved == pytest.approx([-defocus * 1e-3 * t for t in tilt], abs=1e-6)
    weight = (1 - seen).clamp(min=5e-5) - 5e-5  # what is darker than the fringes around it
    place = [float((weight * y).sum() / weight.sum()), float((weight * y[:, None]).sum() / weight.sum())]
    assert place == pytest.approx(moved, abs=1.0)


@pytest.mark.parametrize("tilt", [(0.8, 0.0), (-0.5, 1.1)])
def test_tilt_of_a_spherical_lens_is_coma_astigmatism_defocus_and_a_shift(tilt):
    """|u + t|^4 expanded: C21 = 3 C30 t, C12 = C30 t^2, C10 = 2 C30 t^2, and what is linear in u."""
    shape, size = (31, 34), 0.8
    tilted = Optics(defocus=3000.0, spherical_aberration=2.7, beam_tilt=tilt)
    t, azimuth = 1e-3 * math.hypot(*tilt), math.degrees(math.atan2(tilt[1], tilt[0]))
    c30 = 2.7e7
    explicit = Optics.from_polar(
        C10=-3000.0 + 2 * c30 * t**2, C12=c30 * t**2, phi12=azimuth, C21=3 * c30 * t, phi21=azimuth, C30=c30
    )
    ky, kx = (torch.fft.fftfreq(n, size, dtype=torch.float64) for n in shape)
    zero = torch.zeros((), dtype=torch.float64)
    dx, dy = displacement(tilted, zero, zero)
    assert [float(dx), float(dy)] == pytest.approx([1e-3 * a * (-3000.0 + c30 * t**2) for a in tilt])
    shift = 2 * math.pi * (kx * dx + ky[:, None] * dy)
    torch.testing.assert_close(aberration(tilted, shape, size), aberration(explicit, shape, size) + shift)


def test_without_tilt_nothing_changes():
    values = FULL | {"beam_tilt": (0.0, 0.0)}
    for function in FUNCTIONS.values():
        plain = function(Optics(**values), SHAPE, PIXEL)
        tensor = function(Optics(**(values | {"beam_tilt": torch.zeros(2, dtype=torch.float64)})), SHAPE, PIXEL)
        torch.testing.assert_close(plain, tensor)


def test_the_tilted_envelope_follows_the_lens():
    """It is 1 at k = 0, and damps by how differently the lens displaces k and the beam."""
    optics = Optics(**(FULL | {"chromatic_aberration": 0.0}))
    damping = envelope(optics, SHAPE, PIXEL)
    assert float(damping[0, 0]) == 1.0
    ky, kx = (torch.fft.fftfreq(n, PIXEL, dtype=torch.float64) for n in SHAPE)
    dx, dy = displacement(optics, kx[None, :], ky[:, None])
    apart = (dx - dx[0, 0]) ** 2 + (dy - dy[0, 0]) ** 2
    torch.testing.assert_close(damping, torch.exp(-apart * (math.pi * 0.4e-3 / wavelength(300.0)) ** 2))
    assert float(damping.min()) < 0.5


# --- weak objects


@pytest.mark.parametrize("shape", [(24, 21), (15, 16)])
@pytest.mark.parametrize(
    "changes", [{}, {"aperture": math.inf}, {"beam_tilt": (0.0, 0.0)}, {"amplitude_contrast": 0.0}]
)
def test_ctf_is_the_linear_image_of_a_weak_object(shape, changes, generator):
    """Also where odd aberrations make it complex, and at the Nyquist frequency."""
    optics = Optics(**(FULL | changes))
    v = torch.randn(*shape, generator=generator, dtype=torch.float64)
    v = 0.01 * (v - v.mean())
    contrast = optics.amplitude_contrast
    wave = 1 + 1j * (math.sqrt(1 - contrast**2) + 1j * contrast) * v  # sigma = 1
    beam = float(aperture_mask(optics, shape, PIXEL)[0, 0]) ** 2
    transferred = torch.fft.ifft2(ctf(optics, shape, PIXEL) * torch.fft.fft2(v))
    assert float(transferred.imag.abs().max()) < 1e-15
    torch.testing.assert_close(image(wave, optics, PIXEL, linear=True), beam + 2 * transferred.real, rtol=0, atol=1e-14)


def test_linear_image_leaves_out_what_scattered_waves_make_together(generator):
    phase = smooth((32, 30), 1.0, generator)
    optics = Optics(defocus=300.0, spherical_aberration=2.7)
    left_out = []
    for strength in (1e-2, 1e-1):
        wave = torch.exp(1j * strength * phase)
        whole, linear = (image(wave, optics, 1.0, linear=linear) for linear in (False, True))
        assert float(linear.mean()) == pytest.approx(float(wave.mean().abs() ** 2))
        left_out.append(float((whole - linear).abs().max()))
        assert (whole - linear).min() >= -1e-14
    assert left_out[1] == pytest.approx(100 * left_out[0], rel=0.05)


def test_ctf_is_real_while_the_lens_is_even():
    even = Optics(defocus=900.0, C32=1e5, C56=1e9, convergence=0.1, aperture=9.0, amplitude_contrast=0.1)
    plain = ctf(even, SHAPE, PIXEL)
    assert not plain.is_complex()
    damping = envelope(even, SHAPE, PIXEL) * aperture_mask(even, SHAPE, PIXEL)
    torch.testing.assert_close(plain, damping * torch.sin(aberration(even, SHAPE, PIXEL) - math.asin(0.1)))
    for name in ("coma", "trefoil", "C41", "C43", "C45"):
        fitted = ctf(even.replace(**{name: torch.zeros(())}), SHAPE, PIXEL)
        assert fitted.is_complex()
        inner = (slice(None), [i for i in range(12) if i != 6])  # each but Nyquist has a partner
        torch.testing.assert_close(fitted[inner], plain[inner].to(fitted.dtype))


def test_an_odd_aberration_turns_the_phase_of_the_ctf():
    even = Optics(defocus=900.0, spherical_aberration=2.7, amplitude_contrast=0.1)
    both = even.replace(coma=2e4, coma_angle=30.0, C43=1e7, phi43=10.0)
    shape = (15, 11)
    odd = aberration(both, shape, PIXEL) - aberration(even, shape, PIXEL)
    torch.testing.assert_close(ctf(both, shape, PIXEL), torch.exp(-1j * odd) * ctf(even, shape, PIXEL))


# --- aperture


@pytest.mark.parametrize("shape", [(40, 40), (41, 28)])
def test_aperture_passes_what_is_inside_it(shape):
    size, angle = 1.2, 5.0
    mask = aperture_mask(Optics(aperture=angle), shape, size)
    theta = 1e3 * wavelength(300.0) * squared_frequencies(shape, size, dtype=torch.float64).sqrt()
    sample = 1e3 * wavelength(300.0) / (min(shape) * size)
    assert (mask[theta < angle - sample / 2] == 1).all()
    assert (mask[theta > angle + sample / 2] == 0).all()
    # the edge keeps the area of the disk
    area = math.pi * angle**2 / (1e3 * wavelength(300.0) / size) ** 2 * shape[0] * shape[1]
    assert float(mask.sum()) == pytest.approx(area, rel=0.01)


def test_no_aperture_passes_everything():
    assert (aperture_mask(Optics(), SHAPE, PIXEL) == 1).all()
    size = torch.tensor(PIXEL, dtype=torch.float64, requires_grad=True)
    infinite = torch.tensor(math.inf, dtype=torch.float64, requires_grad=True)
    mask = aperture_mask(Optics(aperture=infinite), SHAPE, size)
    assert (mask == 1).all()
    assert torch.autograd.grad(mask.sum(), [infinite, size]) == (0, 0)


def test_beam_outside_the_aperture_is_a_dark_field(generator):
    wave = 1 + 0.1j * smooth((32, 32), 1.0, generator)
    assert float(image(torch.ones_like(wave), Optics(aperture=3.0, beam_tilt=(5.0, 0.0)), 1.0).max()) == 0
    dark = image(wave, Optics(aperture=3.0, beam_tilt=(5.0, 0.0)), 1.0)
    assert 0 < float(dark.mean()) < 0.01


# --- slopes


def slope_and_difference(function, values, name, generator, wave):
    """Derivative of a weighted sum with respect to each element of a field, and central differences."""

    def score(value):
        optics = Optics(**(values | {name: value}))
        seen = image(wave, optics, PIXEL) if function == "image" else FUNCTIONS[function](optics, SHAPE, PIXEL)
        seen = seen.real + 0.3 * seen.imag if seen.is_complex() else seen
        return (seen * weights).sum()

    weights = torch.randn(*SHAPE, generator=generator, dtype=torch.float64)
    value = torch.tensor(values[name], dtype=torch.float64, requires_grad=True)
    total = score(value)
    if not total.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(total, value)
    flat, differences = value.detach().reshape(-1), []
    for i in range(len(flat)):
        step = torch.zeros_like(flat)
        step[i] = STEPS[name]
        up, down = (score((flat + sign * step).reshape(value.shape)) for sign in (1, -1))
        differences.append(float(up - down) / (2 * STEPS[name]))
    return gradient.reshape(-1).tolist(), differences


ZERO = dict.fromkeys(FULL, 0.0) | {"voltage": 300.0, "defocus": 900.0, "aperture": 9.13, "beam_tilt": (0.0, 0.0)}
NEGATIVE = FULL | {name: tuple(-v for v in FULL[name]) if name == "beam_tilt" else -FULL[name] for name in FULL}
NEGATIVE |= {n: FULL[n] for n in ("voltage", "amplitude_contrast", "energy_spread", "voltage_ripple", "lens_ripple")}
NEGATIVE |= {n: FULL[n] for n in ("convergence", "aperture", "slit")}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("function", [*FUNCTIONS, "image"])
@pytest.mark.parametrize("values", [FULL, ZERO, NEGATIVE], ids=["full", "zero", "negative"])
def test_slope_of_every_field(values, function, name, generator):
    wave = 1 + 0.2 * torch.randn(*SHAPE, generator=generator, dtype=torch.complex128)
    found = slope_and_difference(function, values, name, generator, wave)
    if found is None:
        assert function in ("envelope", "aperture") or name == "amplitude_contrast"
        return
    gradient, differences = found
    assert gradient == pytest.approx(differences, rel=2e-6, abs=1e-7 * max(1.0, *map(abs, differences)))
    if values is FULL and function == "ctf":
        assert all(abs(g) > 0 for g in gradient)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("values", [FULL, ZERO, NEGATIVE], ids=["full", "zero", "negative"])
def test_slope_in_the_pixel_size(values, function, generator):
    weights = torch.randn(*SHAPE, generator=generator, dtype=torch.float64)
    size = torch.tensor(PIXEL, dtype=torch.float64, requires_grad=True)

    def score(d):
        seen = FUNCTIONS[function](Optics(**tensors(values)), SHAPE, d)
        return (seen.abs() ** 2 * weights).sum() + (seen.real * weights).sum()

    assert torch.autograd.gradcheck(score, size, eps=1e-7, atol=1e-4, rtol=1e-5)


def test_transforms_walk_through_the_whole_record(generator):
    """grad with respect to an Optics whose leaves are all tensors, and vmap over tilts."""
    wave = 1 + 0.2 * torch.randn(*SHAPE, generator=generator, dtype=torch.complex128)
    optics = _pytree.tree_map(lambda leaf: torch.tensor(leaf, dtype=torch.float64), Optics(**FULL))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SamplingWarning)
        gradient = torch.func.grad(lambda lens: image(wave, lens, PIXEL)[2, 3])(optics)
        assert all(torch.isfinite(leaf).all() for leaf in _pytree.tree_leaves(gradient))
        tilts = torch.tensor([[0.5, 0.0], [0.0, 0.0], [-0.2, 0.3]], dtype=torch.float64)
        lens = Optics(**(FULL | {"beam_tilt": tilts}))
        each = torch.func.vmap(lambda t: image(wave, Optics(**(FULL | {"beam_tilt": t})), PIXEL))(tilts)
    torch.testing.assert_close(each, image(wave, lens, PIXEL))


# --- one value per tilt, precision


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("function", [*FUNCTIONS, "image"])
def test_optics_of_each_tilt_equal_loops(function, name, generator):
    factors = torch.tensor([0.9, 1.0, 1.2], dtype=torch.float64)
    value = torch.tensor(FULL[name], dtype=torch.float64)
    optics = Optics(**(FULL | {name: factors[:, None] * value if name == "beam_tilt" else factors * value}))
    check_per_tilt(optics, 3)
    wave = 1 + 0.2 * torch.randn(3, *SHAPE, generator=generator, dtype=torch.complex128)

    def call(optics, wave):
        return image(wave, optics, PIXEL) if function == "image" else FUNCTIONS[function](optics, SHAPE, PIXEL)

    together = call(optics, wave).expand(3, *SHAPE)
    for i in range(3):
        torch.testing.assert_close(together[i], call(optics.index(i), wave[i]))


def test_all_fields_per_tilt_at_once(generator):
    factors = torch.tensor([0.9, 1.0, 1.2], dtype=torch.float64)
    values = {n: factors[:, None] * v if n == "beam_tilt" else factors * v for n, v in tensors(FULL).items()}
    optics = Optics(**values)
    for function in FUNCTIONS.values():
        together = function(optics, SHAPE, PIXEL)
        assert together.shape == (3, *SHAPE)
        for i in range(3):
            torch.testing.assert_close(together[i], function(optics.index(i), SHAPE, PIXEL))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_single_precision(function):
    double = FUNCTIONS[function](Optics(**FULL), (64, 63), 1.0)
    single = FUNCTIONS[function](Optics(**FULL), (64, 63), 1.0, dtype=torch.float32)
    assert single.dtype == (torch.complex64 if double.is_complex() else torch.float32)
    assert (single.to(double.dtype) - double).abs().max() < 1e-4


# --- refusals and warnings


@pytest.mark.parametrize(
    "name", ["energy_spread", "voltage_ripple", "lens_ripple", "convergence", "aperture", "slit", "voltage"]
)
@pytest.mark.parametrize("value", [-0.1, [0.2, -0.1]])
def test_what_has_no_sign_is_refused_below_zero(name, value):
    with pytest.raises(ValueError, match=rf"Optics.{name}: expected .*, got -0.1"):
        Optics(**{name: value})


@pytest.mark.parametrize("name", FULL)
def test_what_is_not_a_number_is_refused(name):
    nan, wrong = ((0.0, math.nan), "five") if name == "beam_tilt" else (math.nan, "five")
    with pytest.raises(ValueError, match=rf"Optics.{name}: expected .*, got nan"):
        Optics(**{name: nan})
    with pytest.raises((TypeError, ValueError), match=rf"Optics.{name}: expected .*five"):
        Optics(**{name: wrong})
    if name not in ("aperture", "slit"):
        with pytest.raises(ValueError, match=rf"Optics.{name}: expected .*, got inf"):
            Optics(**{name: (math.inf, 0.0) if name == "beam_tilt" else math.inf})


def test_a_tensor_of_voltages_must_be_positive():
    with pytest.raises(ValueError, match="voltage"):
        Optics(voltage=torch.tensor([300.0, -300.0]))
    with pytest.raises(ValueError, match="voltage"):
        Optics(voltage=torch.tensor(math.nan))
    torch.func.vmap(lambda v: aberration(Optics(voltage=v), SHAPE, PIXEL))(torch.tensor([200.0, 300.0]))


def test_beam_tilt_takes_pairs_in_every_form():
    assert Optics(beam_tilt=[1, 2]).beam_tilt == (1.0, 2.0)
    assert Optics(beam_tilt=[[1, 2], [3, 4], [5, 6]]).beam_tilt.shape == (3, 2)
    x = torch.tensor(1.0, requires_grad=True)
    pair = Optics(beam_tilt=(x, 2.0)).beam_tilt
    assert pair.tolist() == [1.0, 2.0]
    assert pair.requires_grad
    assert Optics(beam_tilt=(torch.ones(3), 0.0)).beam_tilt.shape == (3, 2)
    for wrong in (1.0, (1.0,), (1.0, 2.0, 3.0), torch.ones(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"Optics.beam_tilt: expected a pair"):
            Optics(beam_tilt=wrong)


def test_number_of_tilts_is_checked():
    check_per_tilt(Optics(beam_tilt=torch.zeros(2), coma=[1.0, 2.0, 3.0]), 3)
    check_per_tilt(Optics(beam_tilt=torch.zeros(3, 2)), 3)
    with pytest.raises(ValueError, match=r"beam_tilt: expected one pair \(x, y\) or one for each of 3 tilts"):
        check_per_tilt(Optics(beam_tilt=torch.zeros(4, 2)), 3)
    with pytest.raises(ValueError, match="coma: expected one number or one for each of 3 tilts"):
        check_per_tilt(Optics(coma=torch.zeros(2)), 3)


@pytest.mark.filterwarnings("default::cryosim.core.fourier.SamplingWarning")
class TestSamplingWarnings:
    def silent(self, optics, shape, size):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image(torch.ones(shape, dtype=torch.complex128), optics, size)

    def test_a_small_field_is_named(self):
        optics = Optics(defocus=30000.0)
        moved = wavelength(300.0) * 30000.0 / 3.0  # at two thirds of Nyquist of 1 Å pixels
        with pytest.warns(SamplingWarning, match=rf"{moved:.4g} Å along x .* field of 128 x 256 Å") as caught:
            image(torch.ones(256, 128, dtype=torch.complex128), optics, 1.0)
        assert caught[0].filename == __file__
        field = math.ceil(2 * moved)
        self.silent(optics, (field, field), 1.0)
        size = float(str(caught[0].message).split("pixels of ")[1].split()[0])
        self.silent(optics, (256, 128), size * 1.01)
        with pytest.warns(SamplingWarning):
            image(torch.ones(256, 128, dtype=torch.complex128), optics, size * 0.95)

    def test_a_narrow_aperture_mends_it(self):
        self.silent(Optics(defocus=30000.0, aperture=2.0), (256, 128), 1.0)

    def test_a_wide_aperture_is_named(self):
        with pytest.warns(SamplingWarning, match="aperture ends at 0.508 /Å.* 0.333 /Å.*pixels of 0.656 Å or less"):
            image(torch.ones(64, 64, dtype=torch.complex128), Optics(aperture=10.0), 1.0)
        self.silent(Optics(aperture=10.0), (64, 64), 0.65)

    def test_each_tilt_is_looked_at(self):
        optics = Optics(defocus=torch.tensor([100.0, 30000.0]), beam_tilt=torch.zeros(2, 2))
        with pytest.warns(SamplingWarning, match="displaces"):
            image(torch.ones(2, 128, 128, dtype=torch.complex128), optics, 1.0)
        self.silent(optics.index(0), (128, 128), 1.0)
