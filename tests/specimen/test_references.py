"""Copies by a reference: the same images as atom by atom, to a stated error, at any rotation."""

import math

import pytest
import torch

from cryosim.core.fourier import band_limit
from cryosim.core.rotation import random_rotations
from cryosim.io.examples import example_path
from cryosim.io.structure import read_atoms
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.atoms import Poses
from cryosim.specimen.damage import Damage
from cryosim.specimen.ice import Absorption, Ice
from cryosim.specimen.moment import Moment
from cryosim.specimen.references import pays, reference
from cryosim.specimen.specimen import Specimen
from cryosim.specimen.tilted import tilted_slices


def crowd_of_three(dtype=torch.float64):
    """Apoferritins, turned at random, off the samples of any grid."""
    generator = torch.Generator().manual_seed(4)
    places = torch.tensor([[-120.0, 33.3, 21.1], [110.0, -71.7, -30.2], [15.9, 140.1, 44.4]], dtype=torch.float64)
    poses = Poses(random_rotations(3, generator), places)
    protein = read_atoms(example_path("apoferritin"), assembly=1).centred()
    return Specimen((protein,), (poses,), (500.0, 500.0, 240.0), Ice(400.0), Absorption(), Damage())


def wave(specimen, pixel_size, copies, moment=None, shape=None, thickness=20.0):
    n = math.ceil(520 / pixel_size)
    slices = tilted_slices(
        specimen,
        -37.0,
        shape or (n, n + 1),
        pixel_size,
        thickness,
        axis_angle=21.0,
        copies=copies,
        voltage=300.0,
        moment=moment or Moment(20.0, 3.0),
    )
    return multislice(slices, Optics())


def error(a, b):
    """Of the scattered wave."""
    return float((a - b).norm() / (b - b.mean()).norm())


@pytest.fixture
def always(monkeypatch):
    """References are taken of however few copies."""
    monkeypatch.setattr("cryosim.specimen.portions.pays", lambda *given: True)


@pytest.mark.parametrize(("pixel_size", "most"), [(7.5, 2e-3), (4.7, 1.1e-3)])
def test_wave_by_reference(pixel_size, most, always):
    """Tilted, faded, absorbing: the wave behind three apoferritins in ice is as the docstring says."""
    specimen = crowd_of_three()
    found = error(wave(specimen, pixel_size, "reference"), wave(specimen, pixel_size, "atoms"))
    assert 1e-5 < found < most  # and it is another way


def test_a_reference_is_not_taken_where_atoms_are_fewer():
    specimen = crowd_of_three()
    protein = specimen.molecules[0]
    assert pays(protein, 100, 7.5) and pays(protein, 30, 6.0)
    assert not pays(protein, 1000, 3.0) and not pays(protein, 3, 7.5) and not pays(protein, 0, 7.5)
    assert torch.equal(wave(specimen, 3.0, "reference", thickness=40.0), wave(specimen, 3.0, "atoms", thickness=40.0))


def test_the_docstring_counts_the_points():
    protein = crowd_of_three().molecules[0]
    from cryosim.specimen.potential import potential_factors

    counts = [
        len(reference(protein, potential_factors("lobato", 4.53), p, 6, torch.float32).positions) for p in (7.5, 4.714)
    ]
    assert counts == pytest.approx([9000, 23400], rel=0.05)


def test_positions_of_copies_keep_their_gradient(always):
    """Poses are differentiated."""
    specimen = crowd_of_three()
    places = specimen.poses[0].positions.clone().requires_grad_()
    moved = specimen.replace(poses=(specimen.poses[0].replace(positions=places),))
    (gradient,) = torch.autograd.grad(wave(moved, 7.5, "reference", shape=(60, 61)).abs().square().sum(), places)
    assert bool((gradient != 0).any(1).all())


def test_atoms_with_a_gradient_are_placed_atom_by_atom():
    protein = crowd_of_three().molecules[0]
    assert not pays(protein.replace(b_factors=protein.b_factors.clone().requires_grad_()), 100, 7.5)


def test_total_matter_of_a_reference_is_that_of_its_atoms():
    """The transform at k = 0: to 1e-4, whatever the rotation."""
    from cryosim.specimen.potential import potential_factors

    protein = crowd_of_three().molecules[0]
    factors = potential_factors("lobato", 4.53)
    sites = reference(protein, factors, 5.0, 6, torch.float64)
    elements = torch.unique(protein.numbers)
    each = factors(elements, torch.zeros(1, dtype=torch.float64))[:, 0]
    whole = sum(
        float(each[i]) * float((protein.occupancies[protein.numbers == z]).sum()) for i, z in enumerate(elements)
    )
    assert float(sites.strengths.sum()) == pytest.approx(whole, rel=3e-4)
    middle = (sites.strengths * sites.positions).sum(0) / sites.strengths.sum()
    weights = torch.stack([each[elements == z][0] for z in protein.numbers])[:, None] * protein.occupancies[:, None]
    assert float((middle - (weights * protein.positions).sum(0) / weights.sum()).abs().max()) < 0.02


def test_the_band_of_a_slice_is_filled_as_by_atoms(always):
    """Ring by ring to the edge of the band, the slices together differ by less than 1 % of their amplitude."""
    specimen = crowd_of_three().replace(damage=None, absorption=None)
    totals = [
        tilted_slices(specimen, 12.0, (112, 112), 4.7, 20.0, copies=copies).atoms.total()
        for copies in ("atoms", "reference")
    ]
    one, other = (torch.fft.fft2(t) for t in totals)
    k = torch.fft.fftfreq(112)
    radius = (k[:, None] ** 2 + k**2).sqrt()
    inside = band_limit((112, 112), dtype=torch.float64) > 0
    for low in torch.arange(0.02, 0.32, 0.03).tolist():
        ring = (radius >= low) & (radius < low + 0.03) & inside
        assert float((one - other)[ring].norm() / one[ring].norm()) < 0.01
