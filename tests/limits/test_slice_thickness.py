"""How thick slices may be: the error of multislice for a protein, by the thickness of its slices.

Ubiquitin at B = 0, the worst case, 0.5 Å pixels. Relative error of the exit wave, of all detail to 3 Å and of all that
the grid holds, to 1.5 Å, against slices of 0.125 Å. "Shared" is what `potential_slices` does: atoms between two slice
centres belong to both, linearly. "Nearest" gives them to the nearest centre whole. "Entry" lets all of a slice act
where the slice begins, without the half flight before and after it.

                          300 kV                                        100 kV
             shared      nearest        entry          shared      nearest        entry
      d    3 Å   all    3 Å   all    3 Å   all       3 Å   all    3 Å   all    3 Å   all
    0.5   2e-5  3e-5   2e-4  1e-3   5e-4  2e-3      6e-5  7e-5   5e-4  2e-3   9e-4  3e-3
    1     5e-5  6e-5   4e-4  2e-3   9e-4  4e-3      1e-4  1e-4   8e-4  4e-3   2e-3  7e-3
    2     9e-5  1e-4   9e-4  4e-3   2e-3  7e-3      2e-4  3e-4   2e-3  7e-3   4e-3  1e-2
    4     2e-4  3e-4   2e-3  8e-3   4e-3  1e-2      5e-4  8e-4   3e-3  1e-2   7e-3  3e-2
    8     4e-4  8e-4   4e-3  1e-2   8e-3  3e-2      1e-3  3e-3   7e-3  3e-2   1e-2  5e-2
    16    8e-4  3e-3   7e-3  3e-2   1e-2  6e-2      2e-3  1e-2   1e-2  6e-2   3e-2  1e-1

With B = 16 Å^2, as in a good crystal, the shared errors are three to four times smaller, the others two.

So atoms shared between slices need slices of 9 Å for 1e-3 over the whole band at 300 kV, 4.7 Å at 100 kV; to 3 Å
resolution 16 Å (8e-4) and 8 Å will do. 1e-2 is not reached by slices of 16 Å at either voltage. Acting in the middle
halves the error of an atom in one slice; to share it between two is worth another factor of 10 to 30. Both others are
of first order: for 1e-2 over the whole band they need slices of 5 and 2.8 Å at 300 kV.

The shared error is a sum of two. One is of second order in d and of first in the potential: an atom at the fraction s
between two centres is wrong by (pi lambda k^2 d)^2 s (1 - s) / 2, the root mean square of which over s is
(pi lambda k^2 d)^2 / sqrt(120). It alone is left when the potential is made a thousand times weaker, and rules beyond
4 Å. The other is of first order in d and of second in the potential: an atom shared between two slices scatters in
both, and what it scattered in the first flies d before it meets the second. It rules below, where all errors are small.

In flight through a slice at the edge of the band: 1e-3 is 0.25 rad at both voltages, so that

    d = min(10 Å, 0.25 / (pi lambda k_edge^2))

is enough for 1e-3 of the wave at 300 kV; the 0.1 rad of `sampling_for` gives 3e-4 at either voltage. The 10 Å guard the
part of first order, which the edge of the band does not know: 5e-5 per Å at 300 kV, 1.3e-4 at 100 kV.
"""

import math

import pytest
import torch

from cryosim.core.constants import wavelength
from cryosim.core.fourier import band_limit, squared_frequencies
from cryosim.io.examples import example_path
from cryosim.io.structure import read_atoms
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.potential import potential_slices

SHAPE, PIXEL_SIZE = (128, 128), 0.5
FINEST = 0.125
THICKNESSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def protein(b_factor=0.0, occupancy=1.0):
    atoms = read_atoms(example_path("ubiquitin")).centred()
    one = torch.ones_like(atoms.occupancies)
    return atoms.replace(b_factors=b_factor * one, occupancies=occupancy * one)


def wave_of(atoms, thickness, optics, assignment="shared"):
    """Exit wave; atoms shared between the two slices next to them, or all in the nearest, or acting where it begins."""
    if assignment != "shared":
        heights = atoms.positions[:, 2] / thickness
        heights = heights.round() if assignment == "nearest" else heights.floor()  # where they act
        positions = atoms.positions.clone()
        positions[:, 2] = heights * thickness
        atoms = atoms.replace(positions=positions)
    n_slices = 2 * math.ceil(24 / thickness) + 1
    return multislice(potential_slices(atoms, SHAPE, PIXEL_SIZE, thickness, n_slices), optics)


def error(wave, reference, resolution):
    """Relative error of all detail coarser than the resolution [Å]."""
    k2 = squared_frequencies(SHAPE, PIXEL_SIZE, dtype=torch.float64)
    inside = (k2 > 0) & (k2 <= resolution**-2) & (band_limit(SHAPE, dtype=torch.float64) > 0)
    return float(torch.fft.fft2(wave - reference)[inside].norm() / torch.fft.fft2(reference)[inside].norm())


MEASURED = {  # thickness [Å]: error to 3 Å and over the whole band, atoms shared
    300.0: {
        0.5: (2.30e-5, 3.01e-5),
        1.0: (5.02e-5, 5.80e-5),
        2.0: (9.27e-5, 1.08e-4),
        4.0: (1.89e-4, 2.58e-4),
        8.0: (3.79e-4, 8.05e-4),
        16.0: (8.10e-4, 2.85e-3),
    },
    100.0: {
        0.5: (5.87e-5, 6.97e-5),
        1.0: (1.29e-4, 1.41e-4),
        2.0: (2.42e-4, 2.89e-4),
        4.0: (4.96e-4, 7.75e-4),
        8.0: (9.98e-4, 2.67e-3),
        16.0: (2.14e-3, 9.90e-3),
    },
}
WHOLE = 1.4
"""Finer than the grid holds [Å]."""


def errors(atoms, optics, thicknesses=THICKNESSES, assignment="shared"):
    """Errors (thickness, 2) to 3 Å and over the whole band."""
    reference = wave_of(atoms, FINEST, optics)
    waves = [wave_of(atoms, d, optics, assignment) for d in thicknesses]
    return torch.tensor([[error(wave, reference, resolution) for resolution in (3.0, WHOLE)] for wave in waves])


@pytest.mark.parametrize("voltage", [300.0, 100.0])
def test_error_of_every_thickness(voltage):
    """No larger than measured; and nothing is measured that is not there: no smaller than half of it."""
    found = errors(protein(), Optics(voltage=voltage))
    measured = torch.tensor([MEASURED[voltage][d] for d in THICKNESSES])
    assert (found < 1.1 * measured).all(), found
    assert (found > 0.5 * measured).all(), found


@pytest.mark.parametrize("voltage", [300.0, 100.0])
def test_weak_matter_converges_with_the_square_of_the_thickness(voltage):
    """Fourfold per doubling, at every resolution; of the size that the fractions of the atoms' heights make."""
    found = errors(protein(occupancy=1e-3), Optics(voltage=voltage), (1.0, 2.0, 4.0, 8.0, 16.0))
    ratios = found[1:] / found[:-1]
    assert ((ratios > 3.6) & (ratios < 4.4)).all(), ratios
    k2 = squared_frequencies(SHAPE, PIXEL_SIZE, dtype=torch.float64)
    inside = (k2 > 0) & (band_limit(SHAPE, dtype=torch.float64) > 0)
    scattered = potential_slices(protein(), SHAPE, PIXEL_SIZE, 1.0, 49).total()
    energy = torch.fft.fft2(scattered).abs()[inside] ** 2
    each = (math.pi * wavelength(voltage) * k2[inside]) ** 2 / math.sqrt(120)  # error of a wave, per Å^2
    expected = float(((energy * each**2).sum() / energy.sum()).sqrt())
    assert float(found[3, 1]) == pytest.approx(expected * 8.0**2, rel=0.15)


def test_the_protein_itself_is_of_second_order_only_where_slices_are_thick():
    """At 100 kV, whole band: nearly fourfold from 8 to 16 Å; below 2 Å, from what scatters twice, twofold."""
    found = errors(protein(), Optics(voltage=100.0), (0.5, 1.0, 8.0, 16.0))[:, 1]
    assert 3.4 < float(found[3] / found[2]) < 4.1
    assert 1.7 < float(found[1] / found[0]) < 2.3


@pytest.mark.parametrize("thickness", [2.0, 8.0])
def test_sharing_pays_more_than_centring(thickness):
    atoms, optics = protein(), Optics()
    shared, nearest, entry = (errors(atoms, optics, (thickness,), how)[0] for how in ("shared", "nearest", "entry"))
    assert ((entry / nearest > 1.7) & (entry / nearest < 2.5)).all()
    assert (nearest / shared > 8).all()


@pytest.mark.parametrize("voltage", [300.0, 100.0])
def test_phase_of_flight_that_keeps_an_error(voltage):
    """0.25 rad over a slice at the edge of the band is 1e-3 of the wave, and 0.1 rad is 3e-4."""
    edge = 1 / (3 * PIXEL_SIZE)  # [1/Å]
    thicknesses = [phase / (math.pi * wavelength(voltage) * edge**2) for phase in (0.1, 0.25)]
    found = errors(protein(), Optics(voltage=voltage), thicknesses)[:, 1]
    assert float(found[0]) < 3e-4
    assert 7e-4 < float(found[1]) < 1.1e-3
