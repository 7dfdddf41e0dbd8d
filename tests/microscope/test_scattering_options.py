"""What the ladder of scattering functions is told: beam tilt, kind of flight, incident wave, absorption, limits."""

import functools
import itertools
import math

import pytest
import torch

from cryosim.core.constants import interaction_constant, wavelength
from cryosim.core.fourier import band_limit, frequencies, positions, squared_frequencies
from cryosim.core.record import Record
from cryosim.core.rotation import tilt_rotation
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import absorbed_depth, ewald, multislice, projection, propagator, rytov
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.potential import Slices, potential_slices

F, INVERSE = torch.fft.fft2, torch.fft.ifft2
LADDER = [projection, ewald, rytov, multislice]


def smooth(shape, generator, strength=10.0, pixel_size=1.0, decay=300.0):
    """Random slices (..., y, x) deep inside the band [V·Å]."""
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    k2 = squared_frequencies(tuple(shape[-2:]), dtype=torch.float64)
    field = INVERSE(F(noise) * torch.exp(-decay * k2)).real
    return strength * field / field.std()


def within(shape, generator, strength):
    """Random slices that fill the band, and nothing beyond [V·Å]."""
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    field = INVERSE(F(noise) * band_limit(tuple(shape[-2:]), dtype=torch.float64)).real
    return strength * field / field.std()


def relative(a, b, background=1.0):
    """Difference of two waves or images relative to what was scattered into the second."""
    return float((a - b).abs().pow(2).sum().sqrt() / (b - background).abs().pow(2).sum().sqrt())


def moved(wave, x, y, pixel_size):
    """Displaced by (x, y) [Å], by the shift theorem."""
    ky = frequencies(wave.shape[-2], pixel_size, dtype=torch.float64)[:, None]
    kx = frequencies(wave.shape[-1], pixel_size, dtype=torch.float64)
    return INVERSE(F(wave) * torch.exp(-2j * math.pi * (kx * x + ky * y)))


def slopes(errors, factor=2.0):
    return [math.log(a / b) / math.log(factor) for a, b in itertools.pairwise(errors)]


# beam tilt --------------------------------------------------------------------------------------------------------


def carrier(shape, pixel_size, m, voltage):
    """exp(2 pi i kt.r) of the grid frequency m = (x, y), and the tilt that it is [mrad]."""
    kx, ky = m[0] / (shape[1] * pixel_size), m[1] / (shape[0] * pixel_size)
    y = positions(shape[0], pixel_size, dtype=torch.float64)[:, None]
    x = positions(shape[1], pixel_size, dtype=torch.float64)
    tilt = (1e3 * wavelength(voltage) * kx, 1e3 * wavelength(voltage) * ky)
    return torch.exp(2j * math.pi * (kx * x + ky * y)), tilt


@pytest.mark.parametrize("m", [(2, 0), (-1, 3), (0, -2)])
@pytest.mark.parametrize("n_slices", [1, 4, 5])
@pytest.mark.parametrize("flight", ["fresnel", "exact"])
def test_a_tilted_beam_is_a_carrier_wave(flight, n_slices, m, generator):
    """The tilted wave times its carrier is what untilted multislice makes of the carrier itself.

    The carrier's own flight, from half a slice above the first one's middle to the plane, is one phase for all.
    """
    shape, pixel_size, voltage, thickness, plane = (45, 48), 0.9, 200.0, 8.0, 21.0
    tilting, tilt = carrier(shape, pixel_size, m, voltage)
    slices = Slices(smooth((2, n_slices, *shape), generator, 30.0, decay=600.0), pixel_size, thickness)
    options = {"flight": flight, "plane": plane}
    tilted = multislice(slices, Optics(voltage=voltage, beam_tilt=tilt), **options)
    carried = multislice(slices, Optics(voltage=voltage), incident=tilting, **options)
    distance = (n_slices // 2 + 0.5) * thickness + plane
    kt2, wave = sum((1e-3 * t / wavelength(voltage)) ** 2 for t in tilt), wavelength(voltage)
    if flight == "fresnel":
        phase = -math.pi * wave * distance * kt2
    else:
        phase = 2 * math.pi * distance * (math.sqrt(wave**-2 - kt2) - 1 / wave)
    flown = tilting * complex(math.cos(phase), math.sin(phase))
    torch.testing.assert_close(tilted * flown, carried, rtol=0, atol=1e-9)
    assert relative(tilted, multislice(slices, Optics(voltage=voltage), **options)) > 1e-4


@pytest.mark.parametrize("m", [(2, 0), (-1, 2)])
def test_the_lens_sees_the_carrier(m, generator):
    """Aberrations and aperture act at the angle of the tilted wave; the intensity knows no carrier."""
    shape, pixel_size = (45, 48), 0.9
    tilting, tilt = carrier(shape, pixel_size, m, 300.0)
    slices = Slices(smooth((4, *shape), generator, 30.0, decay=600.0), pixel_size, 8.0)
    lens = Optics(defocus=500.0, astigmatism=200.0, astigmatism_angle=25.0, spherical_aberration=2.7, coma=3000.0)
    lens = lens.replace(aperture=7.0)
    tilted = image(multislice(slices, lens.replace(beam_tilt=tilt)), lens.replace(beam_tilt=tilt), pixel_size)
    carried = image(multislice(slices, lens, incident=tilting), lens, pixel_size)
    torch.testing.assert_close(tilted, carried, rtol=0, atol=1e-9)
    assert relative(image(multislice(slices, lens), lens, pixel_size), carried) > 0.1


@pytest.mark.parametrize("scattering", [multislice, ewald, rytov])
def test_tilting_the_beam_shears_the_specimen(scattering, generator):
    """What stands at height z is seen, in the plane z = 0, displaced by -t z: the beam carries it backwards along t."""
    shape, pixel_size, thickness, n = (45, 48), 0.9, 20.0, 5
    tilt = (7.0, -4.0)
    values = smooth((n, *shape), generator, 30.0)
    heights = [(i - n // 2) * thickness for i in range(n)]
    sheared, opposite = (
        torch.stack(
            [moved(v, s * 1e-3 * tilt[0] * z, s * 1e-3 * tilt[1] * z, pixel_size).real for v, z in zip(values, heights)]
        )
        for s in (-1, 1)
    )
    tilted = scattering(Slices(values, pixel_size, thickness), Optics(beam_tilt=tilt))
    torch.testing.assert_close(tilted, scattering(Slices(sheared, pixel_size, thickness), Optics()), rtol=0, atol=1e-9)
    assert relative(scattering(Slices(opposite, pixel_size, thickness), Optics()), tilted) > 0.02


def test_tilting_the_beam_is_tilting_the_specimen_the_other_way(generator):
    """To first order: R_y(a) moves an atom at height z by a z along x, so it is R_y(-t) that a beam tilt t equals."""
    positions_ = torch.randn(12, 3, generator=generator, dtype=torch.float64).clamp(-2, 2) * torch.tensor([1, 2, 25.0])
    atoms = Atoms(positions_, torch.full((12,), 7), torch.full((12,), 40.0, dtype=torch.float64))
    tilt = 6.0  # [mrad]

    def wave(turn, beam):
        mine = atoms.moved(tilt_rotation(math.degrees(1e-3 * turn)))
        return multislice(potential_slices(mine, (45, 40), 0.8, 4.0, 31), Optics(beam_tilt=(beam, 0.0)))

    tilted = wave(0.0, tilt)
    right, wrong = (relative(wave(turn, 0.0), tilted) for turn in (-tilt, tilt))
    assert right < 5e-4
    assert wrong > 0.05


def test_tilts_of_each_image():
    """The image of a particle in underfocus moves by -defocus times the tilt."""
    pixel_size, shape = 1.5, (64, 75)
    y = positions(shape[0], pixel_size, dtype=torch.float64)[:, None]
    x = positions(shape[1], pixel_size, dtype=torch.float64)
    blob = Slices(0.1 * torch.exp(-(x**2 + y**2) / 100.0)[None], pixel_size, 1.0)
    tilts = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, -4.0]], dtype=torch.float64)
    optics = Optics(defocus=1000.0, beam_tilt=tilts, amplitude_contrast=1.0)
    dark = 1 - image(multislice(blob, optics), optics, pixel_size)
    for seen, tilt in zip(dark, tilts):
        centre = [float((seen * axis).sum() / seen.sum()) for axis in (x, y)]
        assert centre == pytest.approx((-1.0 * tilt).tolist(), abs=0.05)


# flight -----------------------------------------------------------------------------------------------------------


def flight_of(voltage, distance, flight, tilt=(0.0, 0.0), shape=(31, 34), pixel_size=0.5):
    slices = Slices(torch.zeros(1, *shape, dtype=torch.float64), pixel_size, 1.0)
    optics = Optics(voltage=voltage, beam_tilt=tilt)
    return propagator(slices, optics, distance, shape, torch.float64, torch.device("cpu"), flight)


@pytest.mark.parametrize("tilt", [(0.0, 0.0), (12.0, -5.0)])
@pytest.mark.parametrize("voltage", [30.0, 300.0])
def test_exact_flight_is_the_angular_spectrum(voltage, tilt):
    """exp(2 pi i d kz), kz^2 = 1 / lambda^2 - |k + kt|^2, less the phase of the beam (Goodman 2005, eq. 3-70)."""
    distance, wave = 40.0, wavelength(voltage)
    ky = frequencies(31, 0.5, dtype=torch.float64)[:, None] + 1e-3 * tilt[1] / wave
    kx = frequencies(34, 0.5, dtype=torch.float64) + 1e-3 * tilt[0] / wave
    kz = torch.sqrt(wave**-2 - kx**2 - ky**2)
    wanted = torch.exp(2j * math.pi * distance * (kz - kz[0, 0]))
    torch.testing.assert_close(flight_of(voltage, distance, "exact", tilt), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("flight", ["fresnel", "exact"])
def test_flight_is_unitary_and_composes(flight):
    one, two, three = (flight_of(100.0, d, flight, (3.0, 2.0)) for d in (17.0, -40.0, -23.0))
    torch.testing.assert_close(one.abs(), torch.ones_like(one.real))
    torch.testing.assert_close(one * two, three, rtol=0, atol=1e-12)


def test_both_flights_agree_at_small_angles():
    """They part by pi lambda^3 d k^4 / 4: with the fourth power of the frequency."""
    distance, voltage = 10000.0, 300.0
    phases = []
    for pixel_size in (1.0, 2.0, 4.0):
        exact, fresnel = (flight_of(voltage, distance, f, pixel_size=pixel_size) for f in ("exact", "fresnel"))
        k2 = squared_frequencies((31, 34), pixel_size, dtype=torch.float64)
        phases.append(float((exact * fresnel.conj()).angle().abs().max()))
        assert phases[-1] == pytest.approx(
            float(math.pi / 4 * wavelength(voltage) ** 3 * distance * k2.max() ** 2), rel=1e-3
        )
    assert slopes(phases) == pytest.approx([4, 4], abs=0.01)


@pytest.mark.parametrize("scattering", [ewald, rytov, multislice])
def test_both_flights_serve_every_function(scattering, generator):
    """At 10 kV and 1 Å they differ, at 300 kV hardly."""
    slices = Slices(smooth((2, 5, 31, 30), generator, 1.0, decay=20.0), 0.5, 20.0)
    fast, slow = (
        relative(scattering(slices, o, flight="exact"), scattering(slices, o)) for o in (Optics(), Optics(voltage=10.0))
    )
    assert fast < 0.03 * slow
    assert slow > 1e-3


@pytest.mark.parametrize("scattering", [ewald, rytov, multislice])
def test_unknown_flight(scattering):
    with pytest.raises(ValueError, match="flight: expected 'fresnel' or 'exact', got 'straight'"):
        scattering(Slices(torch.zeros(2, 8, 9), 1.0, 1.0), Optics(), flight="straight")


# the incident wave --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_slices", [4, 5])
@pytest.mark.parametrize("at", [-15.0, 0.0, 30.0])
def test_a_converging_probe_focuses(at, n_slices, dtype):
    """A disk of waves, set to meet at height `at`, is sharpest there, and is the transform of the disk there."""
    shape, pixel_size, thickness, voltage = (63, 60), 0.7, 10.0, 300.0
    entry = -(n_slices // 2 + 0.5) * thickness  # the top of slice 0
    k2 = squared_frequencies(shape, pixel_size, dtype=torch.float64)
    disk = (wavelength(voltage) ** 2 * k2 < (8e-3) ** 2).double()  # of 8 mrad
    probe = INVERSE(disk * torch.exp(1j * math.pi * wavelength(voltage) * (at - entry) * k2)).to(dtype.to_complex())
    vacuum = Slices(torch.zeros(n_slices, *shape, dtype=dtype), pixel_size, thickness)
    through = functools.partial(multislice, vacuum, Optics(voltage=voltage), incident=probe)
    sharp = through(plane=at)
    assert sharp.dtype == dtype.to_complex()
    torch.testing.assert_close(sharp, INVERSE(disk.to(dtype)).to(sharp), rtol=0, atol=1e-6 * float(sharp.abs().max()))
    peaks = [float(through(plane=at + d).abs().square().max()) for d in (-200.0, -100.0, 0.0, 100.0, 200.0)]
    assert peaks[0] < peaks[1] < peaks[2] > peaks[3] > peaks[4]
    assert peaks[1] == pytest.approx(peaks[3], rel=1e-3)
    assert peaks[0] < 0.8 * peaks[2]


def test_waves_add(generator):
    """Scattering is linear in the incident wave, and a batch of waves equals a loop."""
    shape = (21, 20)
    slices = Slices(smooth((4, *shape), generator, 50.0), 1.0, 5.0)
    waves = torch.complex(smooth((3, *shape), generator, 1.0), smooth((3, *shape), generator, 1.0))
    together = multislice(slices, Optics(amplitude_contrast=0.1), incident=waves)
    alone = [multislice(slices, Optics(amplitude_contrast=0.1), incident=w) for w in waves]
    torch.testing.assert_close(together, torch.stack(alone))
    added = multislice(slices, Optics(amplitude_contrast=0.1), incident=waves[0] + 2j * waves[1])
    torch.testing.assert_close(added, alone[0] + 2j * alone[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_incident_plane_wave_is_none(dtype, generator):
    slices = Slices(smooth((2, 3, 21, 20), generator).to(dtype), 1.0, 5.0)
    ones = torch.ones(21, 20, dtype=torch.complex128)
    optics = Optics(beam_tilt=(3.0, 1.0))
    with_, without = multislice(slices, optics, incident=ones), multislice(slices, optics)
    torch.testing.assert_close(with_, without, rtol=0, atol=10 * torch.finfo(dtype).eps)


# absorption ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scattering", LADDER)
@pytest.mark.parametrize("depth", [0.5, 3.0])
def test_a_mean_free_path(depth, scattering, dtype):
    """exp(-t / Lambda) passes, on every step of the ladder."""
    free_path, n, thickness = 2000.0, 6, 13.0
    sigma = interaction_constant(300.0)
    each = depth * free_path / n / (2 * sigma * free_path)  # imaginary potential [V·Å] that makes 2 sigma v n the depth
    values = torch.full((2, n, 12, 11), 1j * each, dtype=dtype.to_complex())
    slices, optics = Slices(values, 1.0, thickness), Optics()
    torch.testing.assert_close(absorbed_depth(slices, optics), torch.full((2, 12, 11), depth, dtype=dtype))
    passed = image(scattering(slices, optics), optics, 1.0)
    wanted = math.exp(-depth)
    torch.testing.assert_close(passed, torch.full_like(passed, wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lazy", [False, True])
def test_absorbed_depth(lazy, generator):
    """2 sigma (Im c v summed): of the imaginary potential and of the amplitude contrast, for each voltage."""
    contrast, voltages = 0.2, torch.tensor([100.0, 300.0], dtype=torch.float64)
    optics = Optics(voltage=voltages, amplitude_contrast=contrast)
    if lazy:
        spots = 5 * torch.randn(8, 3, generator=generator, dtype=torch.float64).clamp(-1, 1)
        slices = potential_slices(Atoms(spots, torch.full((8,), 8)), (20, 21), 0.9, 3.0, 5)
        total = sum(slices[i] for i in range(5))
        wanted = contrast * total
    else:
        real, imaginary = smooth((2, 4, 20, 21), generator)
        slices = Slices(torch.complex(real, imaginary), 1.0, 5.0)
        wanted = contrast * real.sum(0) + math.sqrt(1 - contrast**2) * imaginary.sum(0)
    wanted = 2 * interaction_constant(voltages)[:, None, None] * wanted
    torch.testing.assert_close(absorbed_depth(slices, optics), wanted)


# the band ---------------------------------------------------------------------------------------------------------


def finer(values, times=3):
    """The same potential on a grid `times` as fine, for odd sizes."""
    ny, nx = values.shape[-2:]
    out = torch.zeros(*values.shape[:-2], times * ny, times * nx, dtype=torch.complex128)
    spectrum = torch.fft.fftshift(F(values), dim=(-2, -1))
    y, x = (times * ny) // 2 - ny // 2, (times * nx) // 2 - nx // 2
    out[..., y : y + ny, x : x + nx] = spectrum
    return INVERSE(torch.fft.ifftshift(out, dim=(-2, -1))).real * times**2


def coarse_spectrum(wave, ny, nx):
    """F of a wave on the coarser grid (y, x), inside its band."""
    times = wave.shape[-1] // nx
    spectrum = torch.fft.fftshift(F(wave), dim=(-2, -1)) / times**2
    y, x = wave.shape[-2] // 2 - ny // 2, wave.shape[-1] // 2 - nx // 2
    inside = torch.fft.ifftshift(spectrum[..., y : y + ny, x : x + nx], dim=(-2, -1))
    return inside * band_limit((ny, nx), dtype=torch.float64)


def test_limiting_the_transmission_is_of_third_order(generator):
    """What the limit cuts is of second order in the phase, and returns to the band with a scattered wave."""
    values = within((5, 33, 35), generator, 200.0)
    errors = []
    for strength in (1.0, 0.5, 0.25, 0.125):
        slices = Slices(strength * values, 1.0, 10.0)
        free, limited = (multislice(slices, Optics(), limit_transmission=choice) for choice in (False, True))
        errors.append(float((free - limited).abs().square().mean().sqrt()))
    assert errors[0] > 1e-4
    assert slopes(errors) == pytest.approx([3, 3, 3], abs=0.15)


def test_with_and_without_the_limit_are_equally_right(generator):
    """Against a grid three times as fine, on which what either cuts off is still there."""
    values, pixel_size = within((5, 33, 35), generator, 100.0), 1.0
    truth = coarse_spectrum(multislice(Slices(finer(values), pixel_size / 3, 10.0), Optics()), 33, 35)
    errors = []
    for choice in (False, True):
        wave = multislice(Slices(values, pixel_size, 10.0), Optics(), limit_transmission=choice)
        errors.append(float((F(wave) - truth).norm() / truth[..., 1:].norm()))
    assert errors[0] < 1.1 * errors[1]
    assert errors[1] < 1.5 * errors[0]
    assert max(errors) < 0.1


def test_a_band_limit_may_be_given(generator):
    """A smaller circle: nothing beyond, and inside it the exit wave of a weak object is unchanged to second order."""
    values, narrow = within((4, 33, 30), generator, 1.0), band_limit((33, 30), 0.4, dtype=torch.float64)
    slices = Slices(values, 1.0, 10.0)
    wave = multislice(slices, Optics(), band_limit=narrow)
    assert (F(wave) * (1 - narrow)).abs().max() < 1e-9
    whole = F(multislice(slices, Optics())) * narrow
    assert relative(INVERSE(F(wave)), INVERSE(whole)) < 0.02


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_precision_is_that_of_the_slices(dtype, gradients, generator):
    """Whatever that of the band limit, the incident wave and the optics, with and without gradients."""
    other = torch.float32 if dtype == torch.float64 else torch.float64
    slices = Slices(smooth((3, 15, 14), generator).to(dtype).requires_grad_(gradients), 1.0, 5.0)
    optics = Optics(voltage=torch.tensor(200.0, dtype=other))
    for options in (
        {"band_limit": band_limit((15, 14), dtype=other)},
        {"incident": torch.ones(15, 14, dtype=other.to_complex())},
        {"plane": torch.tensor(3.0, dtype=other)},
    ):
        for memory in ("constant", "graph"):
            wave = multislice(slices, optics, memory=memory, **options)
            assert wave.dtype == dtype.to_complex(), (list(options), memory)


# slices -----------------------------------------------------------------------------------------------------------


def test_slices_of_any_thickness(generator):
    """Thicknesses that are no multiple of the pixel: the wave converges with their square."""
    atoms = Atoms(
        torch.randn(40, 3, generator=generator, dtype=torch.float64).clamp(-2, 2) * torch.tensor([4.0, 4.0, 15.0]),
        torch.full((40,), 7),
        torch.full((40,), 30.0, dtype=torch.float64),
    )

    def wave(thickness):
        n = 2 * math.ceil(31 / thickness) + 1
        return multislice(potential_slices(atoms, (45, 44), 0.8, thickness, n, width=12), Optics(voltage=100.0))

    truth = wave(0.31)
    errors = [relative(wave(thickness), truth) for thickness in (9.4, 4.7, 2.35)]
    assert slopes(errors) == pytest.approx([2, 2], abs=0.3)
    assert errors[-1] < 2e-3


# errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*LADDER, absorbed_depth])
def test_no_slices(function):
    with pytest.raises(ValueError, match="there are no slices"):
        function(Slices(torch.zeros(0, 8, 8), 1.0, 1.0), Optics())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, complex(0, math.nan)])
@pytest.mark.parametrize("scattering", LADDER)
def test_the_slice_that_is_not_finite_is_named(scattering, bad):
    values = torch.zeros(2, 5, 8, 9, dtype=torch.complex64 if isinstance(bad, complex) else torch.float32)
    values[1, 3, 2, 3] = bad
    with pytest.raises(ValueError, match="slice 3 of 5 holds values that are not finite"):
        scattering(Slices(values, 1.0, 1.0), Optics())


@pytest.mark.parametrize("scattering", LADDER)
def test_other_numbers_that_are_not_finite(scattering):
    slices = Slices(torch.ones(3, 8, 9, dtype=torch.complex128) * -1e9j, 1.0, 1.0)
    if scattering is not ewald:
        with pytest.raises(ValueError, match="amplifies the wave"):
            scattering(slices, Optics())
    with pytest.raises(ValueError, match="not finite although every slice is"):
        scattering(
            Slices(torch.ones(3, 8, 9), 1.0, 1.0),
            Optics(voltage=torch.tensor(300.0), amplitude_contrast=torch.tensor(math.nan)),
        )


def test_an_incident_wave_that_is_not_finite():
    incident = torch.full((8, 9), math.nan, dtype=torch.complex64)
    with pytest.raises(ValueError, match="the incident wave"):
        multislice(Slices(torch.zeros(3, 8, 9), 1.0, 1.0), Optics(), incident=incident)


@pytest.mark.parametrize("voltage", [-300.0, 0.0, torch.tensor(-300.0), torch.tensor([300.0, 0.0])])
def test_voltages_are_positive(voltage):
    with pytest.raises(ValueError, match="voltage: expected (a )?positive number"):
        Optics(voltage=voltage)


# the ladder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [0.0, 0.1])
@pytest.mark.parametrize(("scattering", "order"), [(projection, 1), (ewald, 1), (rytov, 2)])
def test_weak_and_thin_all_agree(scattering, order, contrast, generator):
    """With potential and thickness halved together: Rytov's wave lacks their product, the others lack one of them."""
    values, optics = smooth((2, 3, 25, 24), generator, 20.0), Optics(amplitude_contrast=contrast)
    errors = []
    for small in (1.0, 0.5, 0.25):
        slices = Slices(small * values, 1.0, 10.0 * small)
        errors.append(relative(scattering(slices, optics), multislice(slices, optics)))
    assert errors[-1] < 0.01
    assert slopes(errors) == pytest.approx([order, order], abs=0.01)


def test_ewald_is_linear(generator):
    """In the potential, real or complex, and each slice adds its own field."""
    values = torch.complex(smooth((4, 25, 24), generator), smooth((4, 25, 24), generator))
    optics = Optics(voltage=200.0, amplitude_contrast=0.1, beam_tilt=(2.0, -3.0))

    values = values - values.mean((-2, -1), keepdim=True)  # the mean turns and damps the wave as a whole

    def field(v):
        return ewald(Slices(v, 1.0, 30.0), optics) - 1

    torch.testing.assert_close(field(-7.5 * values), -7.5 * field(values))
    alone = [field(values * (torch.arange(4) == i).to(values)[:, None, None]) for i in range(4)]
    torch.testing.assert_close(sum(alone), field(values))


@pytest.mark.parametrize("n_slices", [4, 5])
@pytest.mark.parametrize("scattering", [ewald, rytov])
@pytest.mark.parametrize("options", [{}, {"beam_tilt": (5.0, -3.0)}, {"amplitude_contrast": 0.2}])
def test_weak_and_thick(options, scattering, n_slices, generator):
    """Ewald and Rytov are multislice to first order in the potential: what is left is of second."""
    values, optics = smooth((n_slices, 31, 30), generator, 40.0, decay=60.0), Optics(**options)
    errors = []
    for strength in (1.0, 0.5, 0.25, 0.125):
        slices = Slices(strength * values, 1.0, 60.0)
        errors.append(float((scattering(slices, optics) - multislice(slices, optics)).abs().max()))
    assert slopes(errors)[1:] == pytest.approx([2, 2], abs=0.1)
    flat = [
        float(
            (projection(Slices(s * values, 1.0, 60.0), optics) - multislice(Slices(s * values, 1.0, 60.0), optics))
            .abs()
            .max()
        )
        for s in (0.25, 0.125)
    ]
    assert slopes(flat) == pytest.approx([1], abs=0.1), "the test could not see a wrong height"


@pytest.mark.parametrize("contrast", [0.0, 0.3])
@pytest.mark.parametrize("scattering", [projection, rytov, multislice])
def test_a_uniform_slab(scattering, contrast):
    """However thick and strong: the wave turns by sigma V t, and fades."""
    values = torch.full((2, 7, 15, 16), 900.0, dtype=torch.float64)
    optics = Optics(voltage=120.0, amplitude_contrast=contrast)
    depth = 7 * 900.0 * interaction_constant(120.0)
    wanted = complex(math.cos(depth * math.sqrt(1 - contrast**2)), math.sin(depth * math.sqrt(1 - contrast**2)))
    wanted *= math.exp(-depth * contrast)
    wave = scattering(Slices(values, 1.0, 40.0), optics)
    torch.testing.assert_close(wave, torch.full_like(wave, wanted))


def test_rytov_is_nearer_than_ewald_where_the_phase_is_large_and_smooth(generator):
    slices = Slices(smooth((5, 31, 30), generator, 300.0, decay=600.0), 2.0, 10.0)
    truth = multislice(slices, Optics())
    assert relative(rytov(slices, Optics()), truth) < 0.05 * relative(ewald(slices, Optics()), truth)


# batches, precision -------------------------------------------------------------------------------------------------


PER_TILT = {
    "voltage": torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64),
    "amplitude_contrast": torch.tensor([0.0, 0.07, 0.2], dtype=torch.float64),
    "beam_tilt": torch.tensor([[0.0, 0.0], [3.0, -2.0], [-5.0, 8.0]], dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scattering", LADDER)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1)])
def test_batches_and_optics_of_each_tilt_equal_loops(batch, scattering, dtype, generator):
    slices = Slices(smooth((*batch, 4, 21, 20), generator, 60.0).to(dtype), 1.0, 12.0)
    optics = Optics(**PER_TILT)
    together = scattering(slices, optics)
    shape = torch.broadcast_shapes(batch, (3,))
    assert together.shape == (*shape, 21, 20)
    assert together.dtype == dtype.to_complex()
    every = slices.values.expand(*shape, 4, 21, 20).reshape(-1, 3, 4, 21, 20)
    for mine, waves in zip(every, together.reshape(-1, 3, 21, 20)):
        for i in range(3):
            alone = scattering(slices.replace(values=mine[i]), optics.index(i))
            torch.testing.assert_close(waves[i], alone, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scattering", LADDER)
@pytest.mark.parametrize("options", [{}, {"beam_tilt": (4.0, -3.0)}, {"amplitude_contrast": 0.1}])
def test_single_precision(options, scattering, generator):
    """Phases of the flight are made in double precision: single is as good after a thousand Å."""
    slices = Slices(smooth((2, 20, 33, 30), generator, 40.0), 1.0, 50.0)
    optics = Optics(**options)
    double, single = scattering(slices, optics), scattering(slices.to(dtype=torch.float32), optics)
    assert single.dtype == torch.complex64
    assert relative(single.to(torch.complex128), double) < 2e-5


class Shown(Record):
    """A source that is a record and nothing else: slices that are not held together."""

    first: torch.Tensor
    second: torch.Tensor
    pixel_size: float = 1.0
    thickness: float = 9.0

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return (self.first, self.second)[i]


@pytest.mark.parametrize("scattering", LADDER)
def test_any_source_of_slices(scattering, generator):
    values = smooth((2, 21, 20), generator)
    torch.testing.assert_close(
        scattering(Shown(*values), Optics()), scattering(Slices(values, 1.0, 9.0), Optics()), rtol=0, atol=0
    )
