"""Figures of textbooks, reproduced through the public functions."""

import math

import pytest
import torch

from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR, interaction_constant, wavelength
from cryosim.core.fourier import frequencies, positions, squared_frequencies
from cryosim.core.inelastic import ICE_INNER_POTENTIAL
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice, projection
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.potential import Slices, potential_slices
from cryosim.specimen.scattering_factors import scattering_factor


def test_five_atoms_of_kirkland():
    """Kirkland 2020, figure 5.12: C, Si, Cu, Au, U in bright field, 200 kV, Cs 1.3 mm, 700 Å, 10.37 mrad, 50 Å wide.

    The book gives a range from 0.72 to 1.03. The five values are those of an independent spectral calculation. The
    aperture commutes with the lens, so it may act on the wave.
    """
    n, width = 512, 50.0
    x = torch.tensor([-20.0, -10.0, 0.0, 10.0, 20.0], dtype=torch.float64)
    atoms = Atoms(torch.stack([x, 0 * x, 0 * x], -1), torch.tensor([6, 14, 29, 79, 92]))
    optics = Optics(voltage=200.0, defocus=700.0, spherical_aberration=1.3)
    wave = projection(potential_slices(atoms, (n, n), width / n, 1.0, 1, "kirkland"), optics)
    k = squared_frequencies((n, n), width / n, dtype=torch.float64).sqrt()
    aperture = k * wavelength(200.0) <= 10.37e-3
    seen = image(torch.fft.ifft2(torch.fft.fft2(wave) * aperture), optics, width / n)
    assert float(seen.min()) == pytest.approx(0.72, abs=0.01)
    assert float(seen.max()) == pytest.approx(1.03, abs=0.01)
    at_atoms = [float(seen[n // 2, round(float(u) / width * n) + n // 2]) for u in x]
    assert at_atoms == pytest.approx([0.9486, 0.8973, 0.8908, 0.8011, 0.7243], abs=5e-3)


@pytest.mark.parametrize("side", [1, -1])
def test_pendelloesung_of_two_beams(side):
    """A crystal turned by the Bragg angle hands the wave to one diffracted beam and back: I_g = sin^2(pi z / xi).

    xi = pi / (sigma V_g), 963 Å for V_g = 5 V at 300 kV. Turned about y by +asin(lambda g / 2), the planes
    cos(2 pi g x) become cos(2 pi (g x - lambda g^2 z / 2)): then +g is lit, and -g stays dark. A flipped propagator
    lights the other one. (Hirsch et al. 1977, chapter 8; the 0.3 % left are the other beams.)
    """
    strength, g, voltage, nx, thickness = 5.0, 0.996, 300.0, 32, 2.0
    pixel_size = 4 / g / nx  # four periods
    xi = math.pi / (interaction_constant(voltage) * strength)
    assert xi == pytest.approx(962.77, abs=0.01)
    for part in (0.25, 0.5, 0.75, 1.0):
        n = round(part * xi / thickness)
        depth = part * xi / n
        x = positions(nx, pixel_size, dtype=torch.float64)
        z = positions(n, depth, dtype=torch.float64)
        tilted = g * x - side * wavelength(voltage) * g**2 / 2 * z[:, None]
        values = 2 * strength * depth * torch.cos(2 * math.pi * tilted)
        wave = multislice(Slices(values[:, None].expand(n, 8, nx), pixel_size, depth), Optics(voltage=voltage))
        beams = (torch.fft.fft2(wave).abs() / (8 * nx)) ** 2
        k = frequencies(nx, pixel_size, dtype=torch.float64)
        lit, dark = (float(beams[0, (k - s * g).abs().argmin()]) for s in (side, -side))
        assert lit == pytest.approx(math.sin(math.pi * part) ** 2, abs=5e-3)
        assert dark < 5e-3
        assert float(beams[0, 0]) == pytest.approx(1 - lit, abs=1e-2)


def test_talbot_distance():
    """A grating of period p repeats itself after 2 p^2 / lambda, and half a period aside after one half of that."""
    nx, period, pixel_size = 40, 20.0, 2.0
    optics = Optics(voltage=100.0)
    fringes = 300.0 * torch.cos(2 * math.pi * positions(nx, pixel_size, dtype=torch.float64) / period)
    slices = Slices(fringes.expand(1, 9, nx), pixel_size, 1.0)
    distance = 2 * period**2 / wavelength(100.0)
    start = multislice(slices, optics)
    torch.testing.assert_close(multislice(slices, optics, plane=distance), start)
    half = multislice(slices, optics, plane=distance / 2)
    torch.testing.assert_close(half, start.roll(int(period / pixel_size / 2), -1))
    quarter = multislice(slices, optics, plane=distance / 4)  # there the phase has become amplitude
    assert (start.abs() - 1).abs().max() < 1e-3
    assert (quarter.abs() - 1).abs().max() > 0.1


def test_ice_of_independent_atoms():
    """K n (2 f_H(0) + f_O(0)) at 0.93 g/cm^3 lies within 2 % of the value in use (Vulović et al. 2013)."""
    molecules = 0.93 / 18.015 * 0.602214  # [1/Å^3]
    hydrogen, oxygen = scattering_factor(torch.tensor([1, 8]), torch.zeros((), dtype=torch.float64)).tolist()
    mean = POTENTIAL_PER_FORM_FACTOR * molecules * (2 * hydrogen + oxygen)
    assert mean == pytest.approx(ICE_INNER_POTENTIAL, rel=0.02)
