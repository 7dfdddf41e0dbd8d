"""The cost of every step down the ladder: what it is defined as, what is known of it, what is refused."""

import math

import pytest
import torch

from cryosim.core.constants import wavelength
from cryosim.core.fourier import band_limit, positions, squared_frequencies
from cryosim.io.examples import example_path
from cryosim.io.structure import read_atoms
from cryosim.microscope.ladder import MergedSlices, ScatteringError, depth_of_field, scattering_error
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import ewald, multislice, projection, rytov
from cryosim.specimen.potential import Slices, potential_slices

STEPS = {"projection": projection, "ewald": ewald, "rytov": rytov}


def specimen(n_slices=12, thickness=3.0, shape=(64, 63), pixel_size=0.8, batch=(), strength=1.0):
    """Smooth random slices, all different [V·Å]."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(*batch, n_slices, *shape, generator=generator, dtype=torch.float64)
    k2 = squared_frequencies(shape, pixel_size, dtype=torch.float64)
    field = torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-60 * pixel_size**2 * k2)).real
    return Slices(strength * 20 * field / field.std(), pixel_size, thickness)


def ubiquitin(thickness, n_slices, shape=(96, 99), occupancy=1.0):
    atoms = read_atoms(example_path("ubiquitin")).centred()
    return potential_slices(atoms.replace(occupancies=occupancy * atoms.occupancies), shape, 0.6, thickness, n_slices)


# depth of field -----------------------------------------------------------------------------------------------------


def test_depth_of_field():
    assert depth_of_field(3.0, 300.0) == pytest.approx(0.7 * 9 / 0.019687489)
    assert depth_of_field(6.0, 300.0) == pytest.approx(4 * depth_of_field(3.0, 300.0))
    d = torch.tensor([3.0, 10.0], dtype=torch.float64)
    both = depth_of_field(d, torch.tensor([[100.0], [300.0]], dtype=torch.float64))
    assert both.shape == (2, 2)
    assert float(both[1, 0]) == pytest.approx(depth_of_field(3.0, 300.0))
    for bad in (0.0, -3.0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            depth_of_field(bad, 300.0)


@pytest.mark.parametrize("voltage", [100.0, 300.0])
@pytest.mark.parametrize("depth", [200.0, 1200.0])
def test_weak_matter_spread_evenly_is_flat_to_the_depth_of_field(voltage, depth):
    """error of projection = sqrt(2 - 2 sin(a) / a), a = pi lambda k^2 t / 2; 0.62 at d where t = 0.7 d^2 / lambda.

    The mean over 30 specimens.
    """
    slices = specimen(50, depth / 50, batch=(30,), strength=1e-4)
    found = scattering_error(slices, Optics(voltage=voltage))
    a = math.pi * wavelength(voltage) * found.frequency**2 * depth / 2
    inside = (found.frequency > 0.07) & (found.frequency < 0.35)
    expected = (2 - 2 * torch.sin(a) / a).sqrt()
    mean = ((found.projection**2 * found.energy).sum(0) / found.energy.sum(0)).sqrt()
    torch.testing.assert_close(mean[inside], expected[inside], rtol=0.1, atol=0)
    a = math.pi * 0.7 / 2
    assert math.sqrt(2 - 2 * math.sin(a) / a) == pytest.approx(0.62, abs=0.01)
    assert found.ewald[:, inside].max() < 1e-3
    assert found.rytov[:, inside].max() < 1e-3


# merged slices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slices", [18, 19, 20, 21])
@pytest.mark.parametrize("thickness", [3.0, 4.0])
def test_merged_slices_are_those_of_twice_the_thickness(n_slices, thickness):
    """Atoms shared linearly over d and then merged are atoms shared linearly over 2 d, at the same heights."""
    merged = MergedSlices(ubiquitin(thickness, n_slices))
    wanted = ubiquitin(2 * thickness, len(merged))
    assert merged.thickness == 2 * thickness
    assert merged.pixel_size == wanted.pixel_size
    for j in range(len(merged)):
        torch.testing.assert_close(merged[j], wanted[j], rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(merged[j - len(merged)], merged[j])
    with pytest.raises(IndexError):
        merged[len(merged)]


@pytest.mark.parametrize("n_slices", [1, 2, 3, 4, 5, 6, 7, 8])
def test_merging_keeps_the_total_and_the_mean_height(n_slices):
    slices = specimen(n_slices, 2.0, shape=(8, 9))
    merged = MergedSlices(slices)
    rows = torch.stack([merged[j] for j in range(len(merged))])
    torch.testing.assert_close(rows.sum(0), slices.values.sum(0))
    heights, old = positions(len(merged), 4.0, dtype=torch.float64), positions(n_slices, 2.0, dtype=torch.float64)
    torch.testing.assert_close(
        torch.einsum("z,zyx->yx", heights, rows), torch.einsum("z,zyx->yx", old, slices.values), rtol=1e-9, atol=1e-9
    )


def test_sums_of_two_would_be_of_first_order():
    """Why hats: the waves of boxes differ from those at hand by far more than three times the error of these."""
    slices = ubiquitin(2.0, 24, occupancy=1e-3)
    pairs = Slices(torch.stack([slices[2 * j] + slices[2 * j + 1] for j in range(12)]), 0.6, 4.0)
    wave, hats = multislice(slices, Optics()), multislice(MergedSlices(slices), Optics())
    boxes = multislice(pairs, Optics(), plane=-1.0)  # slice 12 of 24 stood at 0, what is now slice 6 of 12 at 1 Å
    true = multislice(ubiquitin(0.125, 401, occupancy=1e-3), Optics())
    error = (wave - true).abs().pow(2).sum().sqrt()
    assert float((hats - wave).abs().pow(2).sum().sqrt() / error) == pytest.approx(3, rel=0.2)
    assert (boxes - wave).abs().pow(2).sum().sqrt() > 30 * error


# errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optics", [Optics(), Optics(voltage=100.0, amplitude_contrast=0.1, beam_tilt=(2.0, -1.0))])
@pytest.mark.parametrize("shape", [(40, 40), (41, 56)])
def test_errors_ring_by_ring(optics, shape):
    """As defined: in each ring the norm of the difference over the norm of what multislice scatters."""
    slices = specimen(shape=shape)
    found = scattering_error(slices, optics)
    step = 1 / (min(shape) * 0.8)
    k = squared_frequencies(shape, 0.8, dtype=torch.float64).sqrt()
    inside = band_limit(shape, dtype=torch.float64) > 0
    wave = torch.fft.fft2(multislice(slices, optics))
    waves = {name: torch.fft.fft2(step_(slices, optics)) for name, step_ in STEPS.items()}
    assert len(found.frequency) == int((k / step).round()[inside].max())
    for i, middle in enumerate(found.frequency):
        assert float(middle) == pytest.approx((i + 1) * step)
        ring = inside & ((k - middle).abs() < step / 2)
        assert ring.any()
        norm = wave[ring].norm()
        assert float(found.energy[i]) == pytest.approx(float((norm / k.numel()) ** 2))
        for name, other in waves.items():
            assert float(getattr(found, name)[i]) == pytest.approx(float((other - wave)[ring].norm() / norm), rel=1e-6)
    within = inside & (k > 0) & (k < 8.5 * step)
    total = found.at(1 / (8 * step))
    for name, other in waves.items():
        wanted = float((other - wave)[within].norm() / wave[within].norm())
        assert float(total[name]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("flight", ["fresnel", "exact"])
def test_flight_is_handed_on(flight):
    found = scattering_error(specimen(thickness=40.0), Optics(voltage=30.0), flight=flight)
    other = scattering_error(specimen(thickness=40.0), Optics(voltage=30.0))
    assert torch.equal(found.projection, other.projection) == (flight == "fresnel")
    assert found.ewald.max() < 1  # or ewald would fly otherwise than multislice


@pytest.mark.parametrize("voltage", [100.0, 300.0])
@pytest.mark.parametrize("occupancy", [1.0, 1e-2])
@pytest.mark.parametrize("thickness", [1.0, 2.0, 4.0])
def test_estimate_of_slicing(voltage, occupancy, thickness):
    """Right to a third, where the error is of first order (strong, thin slices) as where it is of second."""
    optics = Optics(voltage=voltage)
    slices = ubiquitin(thickness, 2 * math.ceil(24 / thickness) + 1, occupancy=occupancy)
    found = scattering_error(slices, optics)
    wave = torch.fft.fft2(multislice(slices, optics))
    true = torch.fft.fft2(multislice(ubiquitin(0.125, 401, occupancy=occupancy), optics))
    k = squared_frequencies((96, 99), 0.6, dtype=torch.float64).sqrt()
    for resolution in (3.0, 10.0):
        within = (k > 0) & (k < 1 / resolution)
        wanted = float((wave - true)[within].norm() / true[within].norm())
        assert float(found.at(resolution)["slicing"]) == pytest.approx(wanted, rel=0.35), (resolution, wanted)


def test_cheapest():
    """A protein at 300 kV: flat to 10 Å; finer, or a thicker one, takes more."""
    slices = ubiquitin(2.0, 25)
    found = scattering_error(slices, Optics())
    assert found.cheapest(10.0, 0.01) == "projection"
    assert found.cheapest(2.0, 0.01) == "rytov"  # ewald is 7 % off
    assert found.cheapest(2.0, 2e-4) == "multislice"
    thick = slices.values if isinstance(slices, Slices) else torch.stack([slices[i] for i in range(25)])
    apart = torch.zeros(401, *thick.shape[1:], dtype=torch.float64)
    apart[:25], apart[-25:] = thick, thick.flip(-1)  # two of them, 750 Å apart
    assert scattering_error(Slices(1e-2 * apart, 0.6, 2.0), Optics()).cheapest(4.0, 0.01) == "ewald"
    with pytest.raises(ValueError, match="thinner slices"):
        found.cheapest(3.0, 1e-6)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive tolerance"):
            found.cheapest(3.0, bad)


def test_resolutions_outside_the_rings():
    found = scattering_error(specimen(), Optics())
    finest, coarsest = 1 / float(found.frequency[-1]), 1 / float(found.frequency[0])
    assert 0.8 * 3 * 0.9 < finest < 0.8 * 3 * 1.1  # two thirds of Nyquist
    for good in (finest, coarsest, 5.0):
        assert all(math.isfinite(float(v)) for v in found.at(good).values())
    for bad in (0.9 * finest, 1.1 * coarsest, 0.0, -3.0, math.nan):
        with pytest.raises(ValueError, match="expected a resolution from"):
            found.at(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_in(dtype):
    for value in (0.0, 5.0):  # vacuum, and the same everywhere
        with pytest.raises(ValueError, match="slices that scatter"):
            scattering_error(Slices(torch.full((4, 16, 15), value, dtype=dtype), 1.0, 2.0), Optics())


@pytest.mark.parametrize("n_slices", [0, 1])
def test_too_few_slices(n_slices):
    with pytest.raises(ValueError, match="two slices or more"):
        scattering_error(Slices(torch.ones(n_slices, 8, 9), 1.0, 1.0), Optics())


def test_bad_slices():
    slices = specimen()
    slices.values[5, 3, 3] = math.nan
    with pytest.raises(ValueError, match="slice 5"):
        scattering_error(slices, Optics())


def test_it_keeps_no_graph():
    slices = specimen()
    slices.values.requires_grad_()
    found = scattering_error(slices, Optics(amplitude_contrast=torch.tensor(0.1, requires_grad=True)))
    assert isinstance(found, ScatteringError)
    assert not any(getattr(found, name).requires_grad for name in ("energy", "rytov", "slicing"))


def test_batches_equal_loops():
    batch = specimen(batch=(2,))
    optics = Optics(voltage=torch.tensor([100.0, 300.0]))
    together = scattering_error(batch, optics)
    assert together.projection.shape == (2, len(together.frequency))
    for i in range(2):
        one = scattering_error(Slices(batch.values[i], 0.8, 3.0), optics.index(i))
        torch.testing.assert_close(together.index(i).rytov, one.rytov, rtol=1e-6, atol=0)
        torch.testing.assert_close(together.at(5.0)["slicing"][i], one.at(5.0)["slicing"], rtol=1e-6, atol=0)
    assert together.cheapest(5.0, 1.0) == "projection"


def test_single_precision():
    slices = specimen()
    single = scattering_error(slices.to(dtype=torch.float32), Optics()).at(4.0)
    double = scattering_error(slices, Optics()).at(4.0)
    for name, value in double.items():
        assert float(single[name]) == pytest.approx(float(value), rel=0.01, abs=3e-6)
