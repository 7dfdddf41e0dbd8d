"""Multislice: nothing in, nothing out; matter focuses; height is defocus; thin is a phase grating; flux is kept."""

import math

import pytest
import torch

from cryosim.core.constants import interaction_constant, wavelength
from cryosim.core.fourier import band_limit, positions, squared_frequencies
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics, ctf
from cryosim.microscope.scattering import multislice, projection, transmission
from cryosim.specimen.potential import Slices

F, INVERSE = torch.fft.fft2, torch.fft.ifft2


def blob(shape, pixel_size, width, x=0.0, y=0.0):
    """Gaussian of peak 1 and standard deviation `width` [Å] at (x, y) [Å]."""
    dy = positions(shape[0], pixel_size, dtype=torch.float64)[:, None] - y
    dx = positions(shape[1], pixel_size, dtype=torch.float64)[None, :] - x
    return torch.exp(-(dx**2 + dy**2) / (2 * width**2))


def smooth(shape, n_slices, pixel_size, generator, strength=10.0, batch=()):
    """Random slices with nothing, to 1e-7, beyond two thirds of Nyquist [V·Å]."""
    noise = torch.randn(*batch, n_slices, *shape, generator=generator, dtype=torch.float64)
    k2 = squared_frequencies(shape, pixel_size, dtype=torch.float64)
    field = INVERSE(F(noise) * torch.exp(-150 * pixel_size**2 * k2)).real
    return strength * field / field.std()


def solid(shape, pixel_size, n_slices, depth, strength, centre=0.0):
    """A smooth 3-D object over `depth` [Å] in n slices: two Gaussian blobs side by side at different heights."""
    thickness = depth / n_slices
    heights = positions(n_slices, thickness, dtype=torch.float64) - centre
    parts = [(-4.0, 2.0, -0.1 * depth), (3.0, -3.0, 0.12 * depth)]
    values = sum(
        torch.exp(-((heights - z) ** 2) / (2 * (depth / 12) ** 2))[:, None, None] * blob(shape, pixel_size, 3.0, x, y)
        for x, y, z in parts
    )
    return Slices(strength * thickness * values, pixel_size, thickness)


def relative(a, b, background=1.0):
    """Difference of two waves or images relative to what was scattered into the second."""
    return float((a - b).abs().pow(2).sum().sqrt() / (b - background).abs().pow(2).sum().sqrt())


# nothing in, nothing out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scattering", [multislice, projection])
@pytest.mark.parametrize("n_slices", [1, 4, 5])
def test_vacuum_leaves_the_wave_alone(scattering, n_slices, dtype):
    optics = Optics(defocus=12000.0, astigmatism=300.0, spherical_aberration=2.7, amplitude_contrast=0.1)
    slices = Slices(torch.zeros(2, n_slices, 15, 16, dtype=dtype), 1.1, 3.0)
    wave = scattering(slices, optics)
    assert wave.dtype == dtype.to_complex()
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(wave, torch.ones_like(wave), rtol=0, atol=rounding)
    torch.testing.assert_close(image(wave, optics, 1.1), torch.ones(2, 15, 16, dtype=dtype), rtol=0, atol=rounding)


def test_a_uniform_potential_only_turns_the_phase():
    slices = Slices(torch.full((5, 15, 16), 7.0, dtype=torch.float64), 1.1, 3.0)
    wave = multislice(slices, Optics(voltage=200.0))
    phase = 5 * 7.0 * interaction_constant(200.0)
    torch.testing.assert_close(wave, torch.full_like(wave, complex(math.cos(phase), math.sin(phase))))


# signs --------------------------------------------------------------------------------------------------------------


def fly(wave, distance, pixel_size, voltage, sign=-1):
    """Fresnel propagation written out: exp(-i pi lambda d k^2), or the opposite sign."""
    k2 = squared_frequencies(tuple(wave.shape[-2:]), pixel_size, dtype=torch.float64)
    return INVERSE(F(wave) * torch.exp(sign * 1j * math.pi * wavelength(voltage) * distance * k2))


@pytest.mark.parametrize("shape", [(64, 64), (65, 81)])
@pytest.mark.parametrize("voltage", [100.0, 300.0])
def test_matter_is_a_lens(shape, voltage):
    """An attractive blob, then free flight: the intensity on the axis rises. A flipped propagator would lower it."""
    pixel_size, depth, thickness = 1.0, 1000.0, 50.0
    attractive = 60.0 * blob(shape, pixel_size, 4.0)
    values = torch.zeros(21, *shape, dtype=torch.float64)
    values[0] = attractive
    optics = Optics(voltage=voltage)
    end = 10 * thickness  # the last slice stands there, the first 1000 Å before it
    wave = multislice(Slices(values, pixel_size, thickness), optics, plane=end)
    centre = (shape[0] // 2, shape[1] // 2)
    assert wave.abs()[centre] ** 2 > 1.01
    assert wave.abs()[centre] == wave.abs().max()
    grating = torch.exp(1j * interaction_constant(voltage) * attractive)
    right, wrong = (fly(grating, depth, pixel_size, voltage, sign) for sign in (-1, 1))
    assert wrong.abs()[centre] ** 2 < 0.99, "the test could not see a wrong sign"
    torch.testing.assert_close(wave, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("defocus", [-8000.0, 8000.0])
def test_underfocus_makes_matter_dark(defocus):
    weak = Slices(0.1 * blob((65, 64), 2.0, 12.0)[None], 2.0, 2.0)
    seen = image(multislice(weak, Optics(defocus=defocus)), Optics(defocus=defocus), 2.0)
    assert float((1 - seen[32, 32]) * defocus) > 0


def test_the_lens_undoes_flight():
    """Underfocus d images the plane d before the reference plane: defocus -z sharpens an object at height z."""
    optics = Optics()
    strong = Slices(
        torch.stack([30 * blob((48, 49), 1.0, 3.0), *torch.zeros(8, 48, 49, dtype=torch.float64)]), 1.0, 100.0
    )
    wave = multislice(strong, optics)  # slice 0 of 9 stands at z = -400 Å
    sharp = image(wave, optics.replace(defocus=400.0), 1.0)
    assert (sharp - 1).abs().max() < 1e-6
    assert (image(wave, optics.replace(defocus=-400.0), 1.0) - 1).abs().max() > 1e-2


# height is defocus --------------------------------------------------------------------------------------------------


def linear_image(projected, optics, pixel_size):
    """1 + 2 sigma F^-1[ctf F[V]]."""
    transfer = ctf(optics, tuple(projected.shape[-2:]), pixel_size)
    return 1 + 2 * interaction_constant(optics.voltage) * INVERSE(transfer * F(projected)).real


@pytest.mark.parametrize("n_slices", [8, 9])
@pytest.mark.parametrize("index", [0, 2, 4, 5, 7])
@pytest.mark.parametrize("defocus", [-3000.0, 0.0, 6000.0])
def test_height_adds_to_the_defocus(n_slices, index, defocus):
    """A weak blob at height z in a stack of empty slices is seen at defocus + z."""
    shape, pixel_size, thickness = (57, 64), 1.0, 60.0
    weak = 1e-2 * blob(shape, pixel_size, 3.0, 3.0, -5.0)
    values = torch.zeros(n_slices, *shape, dtype=torch.float64)
    values[index] = weak
    optics = Optics(defocus=defocus, spherical_aberration=2.7, astigmatism=500.0, astigmatism_angle=20.0)
    seen = image(multislice(Slices(values, pixel_size, thickness), optics), optics, pixel_size)
    z = (index - n_slices // 2) * thickness
    assert relative(seen, linear_image(weak, optics.replace(defocus=defocus + z), pixel_size)) < 1e-4
    if z:
        assert relative(seen, linear_image(weak, optics.replace(defocus=defocus - z), pixel_size)) > 1e-2


OPTICS = [
    Optics(defocus=9000.0, spherical_aberration=2.7),
    Optics(voltage=200.0, defocus=9000.0, astigmatism=-1500.0, astigmatism_angle=-35.0, spherical_aberration=2.7),
    Optics(defocus=9000.0, amplitude_contrast=0.1),
    Optics(voltage=100.0, defocus=-400.0, phase_shift=90.0, amplitude_contrast=0.07, spherical_aberration=0.01),
]


@pytest.mark.parametrize("optics", OPTICS, ids=["cs", "astigmatism", "amplitude contrast", "phase plate"])
@pytest.mark.parametrize("n_slices", [1, 5, 6])
def test_weak_limit_is_the_contrast_transfer_function(optics, n_slices, generator):
    """Every slice at its own defocus; what is left is of second order: it halves, relatively, with the potential."""
    shape, pixel_size, thickness = (48, 45), 1.2, 25.0
    values = smooth(shape, n_slices, pixel_size, generator, 0.2)
    errors = []
    for strength in (1.0, 0.5, 0.25):
        seen = image(multislice(Slices(strength * values, pixel_size, thickness), optics), optics, pixel_size)
        wanted = 1 + sum(
            linear_image(
                strength * v, optics.replace(defocus=optics.defocus + (i - n_slices // 2) * thickness), pixel_size
            )
            - 1
            for i, v in enumerate(values)
        )
        errors.append(relative(seen, wanted))
    assert errors[0] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


# limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "order"), [(0.4, 2), (2000.0, 1)])
def test_thin_specimens_are_phase_gratings(strength, order):
    """Equal slices about z = 0 become their projection as the thickness d vanishes.

    With A the grating and T the flight, the difference is d^2 [[A, T], T] and d [A, [A, T]]: of second order for a weak
    object, seen as if it stood at z = 0; of first order, and quadratic in the potential, for a strong one, a lens.
    """
    shape, pixel_size = (64, 63), 0.6
    one = blob(shape, pixel_size, 3.0) + 0.5 * blob(shape, pixel_size, 2.0, 6.0, 4.0)
    values = (strength / 5) * one.expand(5, *shape)
    grating = projection(Slices(values, pixel_size, 1.0), Optics())
    torch.testing.assert_close(grating, torch.exp(1j * interaction_constant(300.0) * strength * one))
    thicknesses = (16.0, 8.0, 4.0) if order == 2 else (2.0, 1.0, 0.5)
    errors = [relative(multislice(Slices(values, pixel_size, d), Optics()), grating) for d in thicknesses]
    assert errors[-1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.1)


def test_slices_converge_with_the_square_of_their_thickness():
    """A slice acts at its middle (half a flight before and after), which is of second order (Strang splitting)."""
    shape, pixel_size, depth, optics = (48, 49), 0.8, 240.0, Optics()
    waves = {n: multislice(solid(shape, pixel_size, n, depth, 12.0), optics) for n in (13, 25, 49, 193)}
    coarse, middle, fine = (relative(waves[n], waves[193]) for n in (13, 25, 49))
    assert coarse / middle == pytest.approx((25 / 13) ** 2, rel=0.15)
    assert middle / fine == pytest.approx((49 / 25) ** 2, rel=0.15)


@pytest.mark.parametrize("n_slices", [24, 25])
def test_even_and_odd_numbers_of_slices_agree(n_slices):
    shape, pixel_size, optics = (48, 49), 0.8, Optics()
    reference = multislice(solid(shape, pixel_size, 193, 240.0, 12.0), optics)
    assert relative(multislice(solid(shape, pixel_size, n_slices, 240.0, 12.0), optics), reference) < 5e-3


# electrons are kept, or absorbed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 48), (45, 50)])
def test_flux_is_conserved(shape, generator):
    slices = Slices(smooth(shape, 9, 0.9, generator, 10.0), 0.9, 4.0)
    wave = multislice(slices, Optics())
    assert (wave - 1).abs().mean() > 0.01
    assert float((wave.abs() ** 2).mean()) == pytest.approx(1, abs=1e-9)
    seen = image(wave, Optics(defocus=5000.0, spherical_aberration=2.7), 0.9)
    assert float(seen.mean()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("contrast", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("voltage", [200.0, 300.0])
def test_a_slab_absorbs_exponentially(contrast, voltage):
    """exp(-2 sigma A V t) of the electrons pass a slab of potential V and thickness t."""
    potential, thickness, n = 5.0, 40.0, 6
    slices = Slices(torch.full((n, 12, 11), potential * thickness, dtype=torch.float64), 1.0, thickness)
    optics = Optics(voltage=voltage, amplitude_contrast=contrast)
    passed = image(multislice(slices, optics), optics, 1.0)
    wanted = math.exp(-2 * interaction_constant(voltage) * contrast * potential * thickness * n)
    torch.testing.assert_close(passed, torch.full_like(passed, wanted))


def test_imaginary_potential_is_absorption(generator):
    """The amplitude contrast A is the same as slices multiplied by sqrt(1 - A^2) + i A."""
    values, contrast = smooth((24, 25), 4, 1.0, generator, 10.0).abs(), 0.2
    complex_values = values * complex(math.sqrt(1 - contrast**2), contrast)
    one = multislice(Slices(values, 1.0, 5.0), Optics(amplitude_contrast=contrast))
    two = multislice(Slices(complex_values, 1.0, 5.0), Optics())
    torch.testing.assert_close(one, two)
    assert (transmission(complex_values, Optics()).abs() <= 1).all()


# the reference plane, batches, precision -------------------------------------------------------------------------


@pytest.mark.parametrize("n_slices", [4, 5])
@pytest.mark.parametrize("plane", [-35.0, 12.5, 1000.0])
def test_another_plane_is_free_flight(n_slices, plane, generator):
    slices = Slices(smooth((32, 31), n_slices, 1.0, generator), 1.0, 20.0)
    optics = Optics(voltage=200.0)
    torch.testing.assert_close(
        multislice(slices, optics, plane=plane), fly(multislice(slices, optics), plane, 1.0, 200.0), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("scattering", [multislice, projection])
def test_batches_of_slices_equal_loops(scattering, generator):
    batch = Slices(smooth((20, 21), 3, 1.0, generator, batch=(2, 2)), 1.0, 10.0)
    optics = Optics(amplitude_contrast=0.1)
    together = scattering(batch, optics)
    assert together.shape == (2, 2, 20, 21)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(together[i, j], scattering(Slices(batch.values[i, j], 1.0, 10.0), optics))


@pytest.mark.parametrize("scattering", [multislice, projection])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_optics_of_each_tilt_equal_loops(scattering, batch, generator):
    slices = Slices(smooth((20, 21), 3, 1.0, generator, batch=batch), 1.0, 10.0)
    optics = Optics(
        voltage=torch.tensor([100.0, 200.0, 300.0]),
        defocus=torch.tensor([5000.0, -800.0, 20000.0]),
        astigmatism=torch.tensor([0.0, 300.0, -300.0]),
        astigmatism_angle=torch.tensor([0.0, 30.0, 60.0]),
        spherical_aberration=2.7,
        phase_shift=torch.tensor([0.0, 45.0, 90.0]),
        amplitude_contrast=torch.tensor([0.0, 0.07, 0.2]),
    ).to(dtype=torch.float64)
    together = image(scattering(slices, optics), optics, 1.0)
    for i in range(3):
        one, mine = optics.index(i), slices.index(i) if batch else slices
        torch.testing.assert_close(together[i], image(scattering(mine, one), one, 1.0))


@pytest.mark.parametrize("scattering", [multislice, projection])
def test_single_precision_is_enough(scattering):
    """The root mean square over many specimens: in any one, the rounding of the mean alone moves it twofold."""
    optics = Optics(defocus=15000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
    errors = []
    for seed in range(20):
        slices = Slices(smooth((48, 45), 12, 0.8, torch.Generator().manual_seed(seed), 40.0), 0.8, 4.0)
        double, single = (image(scattering(s, optics), optics, 0.8) for s in (slices, slices.to(dtype=torch.float32)))
        assert single.dtype == torch.float32
        errors.append(relative(single.double(), double))
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) < 1e-5


def test_the_wave_stays_inside_two_thirds_of_nyquist(generator):
    noise = Slices(30 * torch.randn(5, 32, 33, generator=generator, dtype=torch.float64), 1.0, 10.0)
    beyond = 1 - band_limit((32, 33), dtype=torch.float64)
    assert (F(multislice(noise, Optics())) * beyond).abs().max() < 1e-9


@pytest.mark.parametrize("amplitude_contrast", [0.0, 0.1])
def test_gradient_in_the_slices(amplitude_contrast, generator):
    values = smooth((12, 11), 3, 1.0, generator, 30.0).requires_grad_()
    weights = torch.randn(12, 11, generator=generator, dtype=torch.float64)
    optics = Optics(defocus=700.0, amplitude_contrast=amplitude_contrast)

    def score(v):
        return (image(multislice(Slices(v, 1.0, 10.0), optics), optics, 1.0) * weights).sum()

    assert torch.autograd.gradcheck(score, values, eps=1e-3, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scattering", [multislice, projection])
def test_no_slices(scattering):
    with pytest.raises(ValueError, match="no slices"):
        scattering(Slices(torch.zeros(0, 8, 8), 1.0, 1.0), Optics())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scattering", [multislice, projection])
def test_slices_must_be_finite(scattering, bad):
    values = torch.zeros(3, 8, 9)
    values[1, 2, 3] = bad
    with pytest.raises(ValueError, match="slice 1"):
        scattering(Slices(values, 1.0, 1.0), Optics())
