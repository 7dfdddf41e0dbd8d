"""Energy losses: how many, how much, through which slit, and the image of the electrons that had them."""

import math

import pytest
import torch
from scipy.integrate import quad

from cryosim.core.constants import interaction_constant
from cryosim.core.fourier import positions, squared_frequencies
from cryosim.core.inelastic import (
    ICE,
    ICE_INNER_POTENTIAL,
    PROTEIN,
    PROTEIN_INNER_POTENTIAL,
    absorption_potential,
    inelastic_contrast,
    log_ratio_thickness,
    mean_free_path,
)
from cryosim.microscope.energy_loss import (
    ICE_LOSSES,
    LossSpectrum,
    defocus_change,
    energy_filtered_image,
    loss_probabilities,
)
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.potential import Slices

# Losses of 100 eV and more lie 10000 Å and more from focus: they would need larger fields than a test can afford.
pytestmark = pytest.mark.filterwarnings("ignore::cryosim.core.fourier.SamplingWarning")


def drude(energy, plasmon=22.0, width=15.0):
    return energy / ((energy**2 - plasmon**2) ** 2 + (energy * width) ** 2)


def moment(order, largest=200.0):
    """Mean of E^order over the loss distribution of ice [eV^order]."""
    weighted = quad(lambda e: e**order * drude(e), 0, largest, limit=200)[0]
    return weighted / quad(drude, 0, largest, limit=200)[0]


def smooth(shape, generator, strength=0.3, pixel_size=2.0):
    """Random phases with nothing beyond two thirds of Nyquist [rad]."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    k2 = squared_frequencies(shape[-2:], pixel_size, dtype=torch.float64)
    field = torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-150 * pixel_size**2 * k2)).real
    return strength * field / field.std()


def elastic(phase, depth):
    """Exit wave of electrons without a loss."""
    return torch.exp(1j * phase) * torch.exp(-torch.as_tensor(depth, dtype=phase.dtype) / 2)


# the spectrum ------------------------------------------------------------------------------------------------------


def test_spectrum_of_ice():
    """Maximum near 20 eV, 12 to 20 eV wide; 99 % of all electrons lose less than 200 eV in two mean free paths."""
    passed = torch.tensor([2 * e for e in range(1, 101)], dtype=torch.float64)
    cumulative = loss_probabilities(1e-9, slit=passed)[1].sum(0) / 1e-9
    density = torch.diff(cumulative)  # [1/eV] at 1.5, 2.5, ... eV
    peak = density.argmax()
    assert 19 < 1.5 + float(peak) < 22
    assert 12 < float((density > density[peak] / 2).sum()) < 20
    for depth, least in ((1.0, 0.998), (2.0, 0.99)):
        assert math.exp(-depth) + float(loss_probabilities(depth, slit=400.0)[1].sum()) > least


@pytest.mark.parametrize("depth", [0.0, 1e-6, 0.3, 1.0, 2.0, 6.0])
def test_without_a_filter_all_losses_pass(depth):
    assert float(loss_probabilities(depth)[1].sum()) == pytest.approx(-math.expm1(-depth), rel=1e-12, abs=1e-15)
    assert float(loss_probabilities(depth, slit=0.0)[1].abs().max()) == 0


@pytest.mark.parametrize("depth", [1e-3, 0.5, 2.0])
def test_moments_are_those_of_a_compound_poisson_process(depth):
    """Mean t / Lambda <E>, variance t / Lambda <E^2>: n losses have n times the mean and the variance of one."""
    energy = torch.arange(0, 1600, 0.25, dtype=torch.float64)
    cumulative = loss_probabilities(depth, LossSpectrum(bins=2), 2 * energy)[1].sum(0)
    missing = -math.expm1(-depth) - cumulative  # probability of a larger loss
    mean, square = torch.trapezoid(missing, energy), torch.trapezoid(2 * energy * missing, energy)
    assert float(mean) == pytest.approx(depth * moment(1), rel=1e-4)
    assert float(square - mean**2) == pytest.approx(depth * moment(2), rel=2e-4)


def test_losses_against_the_characteristic_function():
    """The transform of the compound Poisson distribution is exp(depth (S^ - 1)), here on a grid five times finer."""
    depth, step, n = 1.7, 0.05, 2**16
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) * step
    once = torch.fft.rfft(drude(grid) / drude(grid).sum(), n)
    # points at (i + 1/2) step: n losses lie n / 2 steps beyond the index, so the phase goes with every loss
    k = torch.fft.rfftfreq(n, dtype=torch.float64)
    law = torch.exp(depth * (once * torch.exp(-1j * math.pi * k) - 1))
    law = torch.fft.irfft(law, n)
    cumulative = torch.cumsum(law, 0) - law / 2 - math.exp(-depth)  # at i step, without the electrons that lost nothing
    for energy in (5.0, 12.0, 21.0, 40.0, 75.0, 150.0, 300.0):
        passed = float(loss_probabilities(depth, slit=2 * energy)[1].sum())
        assert passed == pytest.approx(float(cumulative[round(energy / step)]), abs=2e-4)


@pytest.mark.parametrize("depth", [0.0, 0.4, 2.0])
def test_energies_are_means_of_their_bins(depth):
    energies, weights = loss_probabilities(depth)
    edges = torch.tensor(ICE_LOSSES.edges, dtype=torch.float64)
    assert (energies >= edges).all()
    assert (energies[:-1] <= edges[1:]).all()
    assert float((energies * weights).sum()) == pytest.approx(depth * moment(1), rel=1e-4)


def test_slit_cuts_the_bins():
    """A slit of 20 eV passes losses up to 10 eV: few. What a wider slit passes includes what a narrower one does."""
    slits = torch.tensor([0.0, 7.0, 20.0, 40.0, 100.0, 400.0, math.inf], dtype=torch.float64)
    energies, weights = loss_probabilities(1.0, slit=slits)
    assert energies.shape == weights.shape == (ICE_LOSSES.bins, 7)
    assert (torch.diff(weights, dim=1) >= 0).all()
    assert (torch.diff(weights.sum(0)) > 0).all()
    assert (energies <= slits / 2).all()
    assert 0.01 < float(weights[:, 2].sum()) < 0.04
    for i, slit in enumerate(slits.tolist()):
        one = loss_probabilities(1.0, slit=slit)
        torch.testing.assert_close(energies[:, i], one[0])
        torch.testing.assert_close(weights[:, i], one[1])


def test_map_of_depths_equals_numbers(generator):
    depth = 2 * torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    energies, weights = loss_probabilities(depth, slit=60.0)
    assert energies.shape == (ICE_LOSSES.bins, 2)
    assert weights.shape == (ICE_LOSSES.bins, 2, 3, 4)
    for i in range(2):
        for y, x in ((0, 0), (2, 3)):
            torch.testing.assert_close(weights[:, i, y, x], loss_probabilities(float(depth[i, y, x]), slit=60.0)[1])


# the image: electrons are counted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("reference", "thickness"), [(ICE, 1500.0), (PROTEIN, 2000.0), (3150.0, 6000.0)])
@pytest.mark.parametrize("voltage", [100.0, 300.0])
def test_slab_of_matter(voltage, reference, thickness):
    """Slices with the absorption potential pass exp(-t / Lambda); two exposures give the thickness back."""
    n, length = 30, mean_free_path(reference, voltage)
    projected = (4.53 + 1j * absorption_potential(length, voltage)) * thickness / n  # [V·Å]
    slices = Slices(torch.full((n, 12, 13), projected, dtype=torch.complex128), 2.0, thickness / n)
    optics = Optics(voltage=voltage, defocus=5000.0, spherical_aberration=2.7, chromatic_aberration=2.7)
    wave, depth = multislice(slices, optics), thickness / length
    zero_loss, unfiltered = (
        float(energy_filtered_image(wave, depth, optics.replace(slit=slit), 2.0).mean()) for slit in (0.0, math.inf)
    )
    assert zero_loss == pytest.approx(math.exp(-depth), rel=0.02)
    assert unfiltered == pytest.approx(1, rel=1e-9)
    assert log_ratio_thickness(zero_loss, unfiltered, length) == pytest.approx(thickness, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(32, 33), (2, 31, 30)])
def test_no_electron_is_missing_without_a_filter(shape, dtype, generator):
    depth = 0.8 + smooth(shape, generator, 0.2)
    wave = elastic(smooth(shape, generator), depth).to(dtype.to_complex())
    optics = Optics(defocus=8000.0, chromatic_aberration=2.7, slit=math.inf)
    seen = energy_filtered_image(wave, depth.to(dtype), optics, 2.0)
    assert seen.dtype == dtype
    assert seen.shape == shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(seen.mean((-2, -1)), torch.ones(shape[:-2], dtype=dtype), rtol=0, atol=tolerance)
    assert float(seen.std()) > 0.01


def test_slit_of_zero_is_the_zero_loss_image(generator):
    depth = 0.5 + smooth((24, 25), generator, 0.1)
    wave = elastic(smooth((24, 25), generator), depth)
    optics = Optics(defocus=6000.0, chromatic_aberration=2.7)
    assert optics.slit == 0
    plain = image(wave, optics, 2.0)
    for slit in (0, 0.0, torch.tensor(0.0)):
        assert torch.equal(energy_filtered_image(wave, depth, optics.replace(slit=slit), 2.0), plain)
    vacuum = energy_filtered_image(wave, 0.0, optics.replace(slit=math.inf), 2.0)
    torch.testing.assert_close(vacuum, plain, rtol=0, atol=1e-15)  # no matter, no loss


def test_slit_between():
    """The slit counts what loss_probabilities says."""
    wave = elastic(torch.zeros(8, 9, dtype=torch.float64), 1.2)
    passed = [
        float(energy_filtered_image(wave, 1.2, Optics(slit=slit, chromatic_aberration=2.7), 2.0).mean())
        for slit in (0.0, 10.0, 20.0, 50.0, 1e3, math.inf)
    ]
    assert passed == sorted(passed)
    for slit, fraction in zip((0.0, 10.0, 20.0, 50.0, 1e3, math.inf), passed):
        wanted = math.exp(-1.2) + float(loss_probabilities(1.2, slit=slit)[1].sum())
        assert fraction == pytest.approx(wanted, rel=1e-12)
    assert passed[2] < 1.1 * passed[0]  # a usual slit passes nearly nothing but zero loss


# the image: focus --------------------------------------------------------------------------------------------------


def test_focus_of_a_loss():
    """Slower electrons are focused more strongly: 20 eV are 1800 Å less underfocus at Cc 2.7 mm and 300 kV."""
    assert defocus_change(20.0, Optics(chromatic_aberration=2.7)) == pytest.approx(-1800.0)
    assert defocus_change(20.0, Optics(voltage=100.0, chromatic_aberration=2.0)) == pytest.approx(-4000.0)


def test_losses_are_seen_at_their_focus(generator):
    """Each bin is the unabsorbed wave at the focus of its loss; near 20 eV a defocus of 1800 Å brings it to focus."""
    phase = smooth((40, 41), generator)
    optics = Optics(defocus=4000.0, chromatic_aberration=2.7, slit=math.inf)
    seen = energy_filtered_image(elastic(phase, 0.9), 0.9, optics, 2.0)
    wanted = math.exp(-0.9) * image(torch.exp(1j * phase), optics, 2.0)
    for energy, weight in zip(*loss_probabilities(0.9)):
        wanted = wanted + weight * image(torch.exp(1j * phase), Optics(defocus=4000.0 - 90.0 * float(energy)), 2.0)
    torch.testing.assert_close(seen, wanted)


@pytest.mark.parametrize("defocus", [10000.0, -10000.0])
def test_chromatic_blur(defocus, generator):
    """Coarse detail of a weak phase object is seen at the mean focus of all losses, fine detail is blurred.

    Far below the first zero the contrast is proportional to the defocus, so it weakens in underfocus and grows in
    overfocus: this pins the sign.
    """
    shape = (96, 96)
    phase = smooth(shape, generator, 0.1)
    optics = Optics(defocus=defocus, slit=math.inf)
    sharp = energy_filtered_image(elastic(phase, 1.0), 1.0, optics, 2.0)
    torch.testing.assert_close(sharp, image(torch.exp(1j * phase), optics, 2.0))  # without Cc nothing is lost
    blurred = energy_filtered_image(elastic(phase, 1.0), 1.0, optics.replace(chromatic_aberration=2.7), 2.0)
    spectra = [torch.fft.fft2(seen - 1).abs() ** 2 for seen in (sharp, blurred)]
    k = squared_frequencies(shape, 2.0, dtype=torch.float64).sqrt()
    coarse, fine = (k > 0) & (k < 0.015), (k > 0.08) & (k < 0.1)
    left = [float(spectra[1][band].sum() / spectra[0][band].sum()) for band in (coarse, fine)]
    mean = moment(1) * 90.0  # [Å] at one mean free path
    assert left[0] == pytest.approx(((defocus - mean) / defocus) ** 2, rel=0.02)
    assert left[1] < 0.5


@pytest.mark.parametrize(("bins", "error"), [(16, 0.06), (32, 0.015), (128, 3e-3)])
def test_accuracy_of_the_bins(bins, error, generator):
    """Error of the image relative to its contrast, 2 µm underfocus, one mean free path, no filter."""
    wave = elastic(smooth((128, 128), generator), 1.0)
    optics = Optics(defocus=20000.0, chromatic_aberration=2.7, slit=math.inf)
    fine, coarse = (energy_filtered_image(wave, 1.0, optics, 2.0, losses=LossSpectrum(bins=n)) for n in (400, bins))
    assert float((coarse - fine).std() / fine.std()) < error


# the image: contrast -----------------------------------------------------------------------------------------------


def protein_in_ice(voltage=300.0, n=48, pixel_size=4.0, size=30.0, height=100.0, ice=1000.0):
    """Wave and depth (y, x) of a Gaussian body of protein in a slab of ice, and its projected potential [V·Å]."""
    r2 = sum(positions(n, pixel_size, dtype=torch.float64).reshape(s) ** 2 for s in ((-1, 1), (1, -1)))
    filled = height * torch.exp(-r2 / (2 * size**2))  # [Å] of protein instead of ice
    body, medium = mean_free_path(PROTEIN, voltage), mean_free_path(ICE, voltage)
    potential = (PROTEIN_INNER_POTENTIAL - ICE_INNER_POTENTIAL) * filled
    depth = ice / medium + filled * (1 / body - 1 / medium)
    return elastic(interaction_constant(voltage) * potential, depth), depth, potential


@pytest.mark.parametrize("voltage", [100.0, 300.0])
def test_filter_makes_the_amplitude_contrast(voltage):
    """In focus the zero-loss image shows -2 sigma tan(asin A) V; without the filter there is nothing to see."""
    wave, depth, potential = protein_in_ice(voltage)
    optics = Optics(voltage=voltage)
    zero_loss = energy_filtered_image(wave, depth, optics, 4.0)
    a = inelastic_contrast(voltage)
    background = math.exp(-1000.0 / mean_free_path(ICE, voltage))
    wanted = torch.exp(-2 * interaction_constant(voltage) * a / math.sqrt(1 - a**2) * potential)
    torch.testing.assert_close(zero_loss / background, wanted)
    unfiltered = energy_filtered_image(wave, depth, optics.replace(slit=math.inf), 4.0)
    assert float((unfiltered - 1).abs().max()) < 1e-7
    assert float(1 - (zero_loss / background).min()) > 0.02


def test_losses_alone_show_matter_bright():
    """Protein makes more losses than ice: in focus the electrons with a loss have the opposite amplitude contrast.

    As seen by Wu et al. 2025, PMC12290466.
    """
    wave, depth, _ = protein_in_ice()
    optics = Optics(chromatic_aberration=2.7)
    lost = energy_filtered_image(wave, depth, optics.replace(slit=60.0), 4.0) - image(wave, optics, 4.0)
    assert float(lost[24, 24]) > 1.02 * float(lost[0, 0])


# shapes ------------------------------------------------------------------------------------------------------------


def test_constant_map_equals_number(generator):
    wave = elastic(smooth((20, 21), generator), 0.7)
    optics = Optics(defocus=5000.0, chromatic_aberration=2.7, slit=50.0)
    number = energy_filtered_image(wave, 0.7, optics, 2.0)
    for depth in (torch.tensor(0.7), torch.full((20, 21), 0.7), torch.full((1, 1), 0.7)):
        torch.testing.assert_close(energy_filtered_image(wave, depth.double(), optics, 2.0), number)


@pytest.mark.parametrize("kind", ["number", "one for each", "map"])
def test_tilts_equal_loops(kind, generator):
    depth = {"number": 0.6, "one for each": torch.tensor([0.4, 0.6, 1.2], dtype=torch.float64)}.get(
        kind, 0.6 + smooth((3, 20, 21), generator, 0.1)
    )
    wave = elastic(smooth((3, 20, 21), generator), 0.6)
    optics = Optics(
        voltage=torch.tensor([100.0, 200.0, 300.0]),
        defocus=torch.tensor([3000.0, 4000.0, 5000.0]),
        chromatic_aberration=torch.tensor([2.0, 2.7, 1.0]),
        slit=torch.tensor([20.0, 75.0, math.inf]),
    ).to(dtype=torch.float64)
    together = energy_filtered_image(wave, depth, optics, 2.0)
    for i in range(3):
        mine = depth if isinstance(depth, float) else depth[i]
        torch.testing.assert_close(together[i], energy_filtered_image(wave[i], mine, optics.index(i), 2.0))


def test_edge_of_vacuum():
    """Beside a hole in the specimen the image is that of the plain square roots."""
    depth = torch.zeros(64, 64, dtype=torch.float64)
    depth[:, 20:45] = 0.8
    wave = elastic(torch.zeros(64, 64, dtype=torch.float64), depth)
    optics = Optics(defocus=5000.0, chromatic_aberration=2.7, slit=math.inf)
    wanted = image(wave, optics, 2.0)
    energies, weights = loss_probabilities(depth)
    for energy, weight in zip(energies, weights):
        focused = optics.replace(defocus=5000.0 + defocus_change(energy, optics))
        wanted = wanted + image(wave * torch.exp(depth / 2) * weight.sqrt(), focused, 2.0)
    torch.testing.assert_close(energy_filtered_image(wave, depth, optics, 2.0), wanted, rtol=0, atol=5e-5)


def test_another_lens_may_be_given(generator):
    wave = elastic(smooth((12, 13), generator), 0.5)
    optics = Optics(defocus=4000.0, chromatic_aberration=2.7, slit=math.inf)
    twice = energy_filtered_image(wave, 0.5, optics, 2.0, image=lambda *a: 2 * image(*a))
    torch.testing.assert_close(twice, 2 * energy_filtered_image(wave, 0.5, optics, 2.0))


# slopes ------------------------------------------------------------------------------------------------------------

BASE = {"plasmon_energy": 22.0, "width": 15.0, "slit": 75.3, "chromatic_aberration": 2.7, "defocus": 3000.0} | {
    "voltage": 300.0,
    "depth": 0.7,
}


def score_of(name, generator, varying=False, depth=None):
    """A weighted sum of the image as a function of one parameter; `varying` multiplies a map of depths."""
    wave = elastic(smooth((13, 14), generator), 0.6)
    pattern = 1 + smooth((13, 14), generator, 0.2) if varying else 1.0
    weights = torch.randn(13, 14, generator=generator, dtype=torch.float64)

    def score(value):
        values = BASE | ({} if depth is None else {"depth": depth}) | {name: value}
        spectrum = LossSpectrum(plasmon_energy=values.pop("plasmon_energy"), width=values.pop("width"), bins=8)
        seen = energy_filtered_image(wave, values.pop("depth") * pattern, Optics(**values), 2.0, losses=spectrum)
        return (seen * weights).sum()

    return score


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("name", list(BASE))
def test_slope_of_every_parameter(name, varying, generator):
    score = score_of(name, generator, varying)
    value = torch.tensor(BASE[name], dtype=torch.float64)
    gradient = torch.func.grad(score)(value)
    step = 1e-5 * BASE[name]
    slope = (score(value + step) - score(value - step)) / (2 * step)
    assert float(gradient.abs()) > 1e-7
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("varying", [False, True])
def test_slope_at_depth_zero(varying, generator):
    score = score_of("depth", generator, varying=False)
    start = torch.zeros(13, 14, dtype=torch.float64) if varying else torch.zeros((), dtype=torch.float64)
    gradient = torch.func.grad(score)(start)
    assert torch.isfinite(gradient).all()
    at = [score(start + step) for step in (0.0, 1e-4, 2e-4)]
    slope = (-3 * at[0] + 4 * at[1] - at[2]) / 2e-4
    torch.testing.assert_close(gradient.sum(), slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["slit", "plasmon_energy", "width", "chromatic_aberration", "defocus"])
def test_slopes_where_nothing_is_lost(name, generator):
    gradient = torch.func.grad(score_of(name, generator, depth=0.0))(torch.tensor(BASE[name], dtype=torch.float64))
    assert torch.isfinite(gradient)
    assert (float(gradient.abs()) < 1e-12) == (name != "defocus")


def test_slope_of_a_map_with_a_hole(generator):
    """Vacuum beside matter: the slope is finite at every pixel, and right where matter becomes thicker."""
    score = score_of("depth", generator)
    depth = 0.5 + smooth((13, 14), generator, 0.1)
    depth[3:6, 4:9] = 0
    gradient = torch.func.grad(score)(depth)
    assert torch.isfinite(gradient).all()
    step = 1e-5 * depth
    slope = (score(depth + step) - score(depth - step)) / 2e-5
    torch.testing.assert_close((gradient * depth).sum(), slope, rtol=1e-4, atol=0)


def test_slope_of_the_wave(generator):
    depth = 0.6 + 0.2 * torch.rand(6, 7, generator=generator, dtype=torch.float64)
    wave = elastic(smooth((6, 7), generator), 0.7).requires_grad_()
    optics = Optics(defocus=2000.0, chromatic_aberration=2.7, slit=60.0)
    assert torch.autograd.gradcheck(
        lambda w: energy_filtered_image(w, depth, optics, 2.0, losses=LossSpectrum(bins=4)), wave
    )


def test_forward_mode_and_vmap(generator):
    score = score_of("depth", generator)
    values = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    _, slopes = torch.func.vmap(lambda v: torch.func.jvp(score, (v,), (torch.ones_like(v),)))(values)
    torch.testing.assert_close(slopes, torch.stack([torch.func.grad(score)(v) for v in values]))


# refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-0.1, math.nan, torch.tensor([[0.5, -0.5]])])
def test_depth_must_not_be_negative(bad):
    with pytest.raises(ValueError, match="^depth: "):
        loss_probabilities(bad)
    with pytest.raises(ValueError, match="^depth: "):
        energy_filtered_image(torch.ones(1, 2, dtype=torch.complex64), bad, Optics(), 1.0)


def test_slit_must_not_be_negative():
    with pytest.raises(ValueError, match="^slit: "):
        loss_probabilities(0.5, slit=-20.0)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("plasmon_energy", 0.0),
        ("width", -1.0),
        ("largest", 4.0),
        ("largest", math.inf),
        ("bins", 1),
        ("most_events", 1),
    ],
)
def test_impossible_spectra(name, bad):
    with pytest.raises(ValueError, match=f"LossSpectrum.{name}: "):
        LossSpectrum(**{name: bad})
