"""Gold, carbon, platinum and frozen water in and on the ice: what electrons see of them, whatever the dose."""

import math
from pathlib import Path

import pytest
import torch

import cryosim
from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR, interaction_constant
from cryosim.core.fourier import positions
from cryosim.core.inelastic import CARBON, ICE, ICE_INNER_POTENTIAL, SOLID_PATHS, absorption_potential
from cryosim.io import read_atoms
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.atoms import CLASSES, Atoms
from cryosim.specimen.damage import Damage
from cryosim.specimen.ice import Absorption, Ice
from cryosim.specimen.moment import Moment
from cryosim.specimen.scattering_factors import SOLID_VOLUMES, scattering_factor
from cryosim.specimen.solids import carbon_film, gold_bead, ice_crystals, platinum_layer
from cryosim.specimen.specimen import Poses, Specimen
from cryosim.specimen.tilted import tilted_slices

PIXEL, SHAPE, THICK = 2.0, (61, 64), 150.0
V_GOLD, V_CARBON, V_PLATINUM = (
    float(POTENTIAL_PER_FORM_FACTOR * scattering_factor(torch.tensor([z]), torch.zeros(1, dtype=torch.float64)))
    / SOLID_VOLUMES[z]
    for z in (79, 6, 78)
)
"""Mean inner potentials [V] of independent atoms, each in the room of its own lattice."""


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


SLAB = Ice(THICK)


def alone(atoms, *, z=0.0, ice: Ice | None = SLAB, **more):
    here = Poses(torch.eye(3, dtype=torch.float64)[None], torch.tensor([[0.0, 0.0, z]], dtype=torch.float64))
    return Specimen((atoms,), (here,), (200.0, 200.0, THICK), ice, **more)


def total(specimen, angle=0.0, shape=SHAPE, **more):
    """Projected potential (y, x) [V·Å]."""
    return tilted_slices(specimen, angle, shape, PIXEL, 10.0, dtype=torch.float64, voltage=300.0, **more).total()


def disc(radius):
    """Pixels (y, x) within a distance [Å] of the origin."""
    y, x = (positions(n, PIXEL, dtype=torch.float64) for n in SHAPE)
    return torch.hypot(x[None], y[:, None]) < radius


def chord(diameter, radius):
    """Mean depth [Å] of a ball over the pixels within a distance of its middle."""
    y, x = (positions(n, PIXEL, dtype=torch.float64) for n in SHAPE)
    r2 = (x[None] ** 2 + y[:, None] ** 2)[disc(radius)]
    return float((2 * (diameter**2 / 4 - r2).sqrt()).mean())


# gold -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diameter", [60.0, 100.0])
def test_a_bead_shifts_the_phase_by_what_gold_has_over_ice(diameter):
    """Of its centre: sigma (V_gold - V_ice) diameter, to 2 %."""
    seen = total(alone(gold_bead(diameter, generator=seeded()))) - ICE_INNER_POTENTIAL * THICK
    middle = float(seen[disc(8)].mean())
    assert middle == pytest.approx((V_GOLD - ICE_INNER_POTENTIAL) * chord(diameter, 8), rel=0.02)
    assert middle == pytest.approx((V_GOLD - ICE_INNER_POTENTIAL) * diameter, rel=0.03)
    beyond = seen[~disc(diameter / 2 + 10)]  # the lattice, cut off at the Nyquist frequency, rings there
    assert float(beyond.mean().abs()) < 1e-3 * middle and float(beyond.std()) < 5e-3 * middle


def test_the_exit_wave_has_that_phase():
    """Of a small bead, through slices; the ice alone is taken off."""
    bead, optics = alone(gold_bead(30.0, generator=seeded())), Optics(voltage=300.0, amplitude_contrast=0.0)
    empty = alone(Atoms(torch.tensor([[4000.0, 0.0, 0.0]]), torch.tensor([1])))
    waves = [multislice(tilted_slices(s, 0.0, SHAPE, PIXEL, 10.0, dtype=torch.float64), optics) for s in (bead, empty)]
    phase = torch.angle(waves[0] * waves[1].conj())
    wanted = float(interaction_constant(300.0)) * (V_GOLD - ICE_INNER_POTENTIAL) * chord(30.0, 6)
    assert float(phase[disc(6)].mean()) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("angle", [0.0, 25.0, -60.0])
def test_what_a_bead_adds_is_the_same_at_every_tilt(angle):
    """Its volume times the difference of the potentials, above a column of ice of thickness / cos."""
    bead = gold_bead(50.0, generator=seeded(3))
    seen = total(alone(bead), angle) - ICE_INNER_POTENTIAL * THICK / math.cos(math.radians(angle))
    volume = len(bead) * SOLID_VOLUMES[79]
    assert float(seen.sum()) * PIXEL**2 == pytest.approx((V_GOLD - ICE_INNER_POTENTIAL) * volume, rel=1e-3)


def test_dose_fades_protein_and_not_gold():
    bead = gold_bead(50.0, generator=seeded())
    protein = read_atoms(Path(cryosim.__file__).parent / "data" / "1ubi.pdb").centred()
    changes = {}
    for name, atoms in (("gold", bead), ("protein", protein)):
        specimen = alone(atoms, damage=Damage(b_growth=2.0))
        fresh, old = (total(specimen, moment=Moment(dose)) for dose in (0.0, 100.0))
        changes[name] = float((old - fresh).norm() / (fresh - fresh[0, 0]).norm())
    assert changes["gold"] == 0
    assert changes["protein"] > 0.3


def test_gold_stops_electrons_by_its_own_mean_free_path():
    """The imaginary part: V_im = 1 / (2 sigma path) of gold along the chord, of ice along the rest."""
    diameter, absorption = 60.0, Absorption(ICE, 1970.0)
    seen = total(alone(gold_bead(diameter, generator=seeded()), absorption=absorption)).imag
    of_ice, of_gold = (float(absorption_potential(path, 300.0)) for path in (ICE, SOLID_PATHS[79]))
    depth = chord(diameter, 8)
    assert float(seen[disc(8)].mean()) == pytest.approx(of_gold * depth + of_ice * (THICK - depth), rel=0.01)
    assert float(seen[~disc(40)].mean()) == pytest.approx(of_ice * THICK, rel=1e-4)
    kept = math.exp(-2 * float(interaction_constant(300.0)) * float(seen[disc(8)].mean()))
    assert kept == pytest.approx(math.exp(-depth / 1060 - (THICK - depth) / 3750), rel=0.002)


def test_a_bead_on_the_ice_displaces_none():
    """It stands in vacuum: all its potential, and all the ice below it, in what is delayed and what is stopped."""
    diameter = 60.0
    bead = gold_bead(diameter, on_ice=True, generator=seeded())
    assert (bead.classes == CLASSES.index("deposit")).all()
    specimen = alone(bead, z=(THICK + diameter) / 2, absorption=Absorption(ICE, 1970.0))
    seen, depth = total(specimen), chord(diameter, 8)
    assert float(seen.real[disc(8)].mean()) == pytest.approx(V_GOLD * depth + ICE_INNER_POTENTIAL * THICK, rel=0.015)
    of_ice, of_gold = (float(absorption_potential(path, 300.0)) for path in (ICE, SOLID_PATHS[79]))
    assert float(seen.imag[disc(8)].mean()) == pytest.approx(of_gold * depth + of_ice * THICK, rel=0.01)
    inside = total(alone(gold_bead(diameter, generator=seeded())))
    missing = (seen.real - inside)[disc(8)].mean()
    assert float(missing) == pytest.approx(ICE_INNER_POTENTIAL * depth, rel=0.02)


def test_solids_that_are_not_known_are_refused():
    iron = Atoms(torch.zeros(1, 3), torch.tensor([26]), classes=torch.tensor([CLASSES.index("solid")]))
    with pytest.raises(ValueError, match=r"carbon, platinum, gold or water .* got element 26"):
        total(alone(iron))


# films ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
def test_the_edge_of_a_carbon_film(explicit):
    """(V_carbon - V_ice) thickness on the film, nothing in the hole, half of it at the hole's radius."""
    thickness, edge = 60.0, 11.0
    centre = (edge - 5000.0, 0.0)  # a hole so large that its edge is straight
    how = {"hole_radius": 5000.0, "hole_centre": centre, "explicit": explicit, "generator": seeded()}
    film = carbon_film((220.0, 220.0), thickness, **how)
    absorption = Absorption(ICE, 1970.0)
    seen = total(alone(film, absorption=absorption))
    profile = seen.real.mean(0) - ICE_INNER_POTENTIAL * THICK
    x = positions(SHAPE[1], PIXEL, dtype=torch.float64)
    step = (V_CARBON - ICE_INNER_POTENTIAL) * thickness
    on_it = (x > edge + 12) & (x < 55)
    assert float(profile[on_it].mean()) == pytest.approx(step, rel=0.04)  # grain: some 1000 atoms a pixel column
    hole = profile[(x > -40) & (x < edge - 15)]  # the field is periodic: the film comes in again at its left
    assert float(hole.mean().abs()) < 0.005 * step and float(hole.std()) < 0.03 * step
    assert float(profile[(x > -40) & (x < 55)].sum()) * PIXEL / step == pytest.approx(55 - edge, abs=3)
    imaginary = float(seen.imag.mean(0)[on_it].mean())
    of_ice, of_carbon = (float(absorption_potential(path, 300.0)) for path in (ICE, CARBON))
    assert imaginary == pytest.approx(of_carbon * thickness + of_ice * (THICK - thickness), rel=0.02)


def test_platinum_on_the_ice_adds_all_of_itself():
    """Packed to 0.8: V_platinum times 0.8 of its thickness, and the ice below it is whole."""
    thickness = 42.0
    layer = platinum_layer((260.0, 260.0), thickness, z=(THICK + thickness) / 2, generator=seeded())
    specimen = alone(layer, absorption=Absorption(ICE, 1970.0))
    inner = total(specimen)[5:-5, 5:-5]
    assert float(inner.real.mean()) == pytest.approx(
        0.8 * V_PLATINUM * thickness + ICE_INNER_POTENTIAL * THICK, rel=0.03
    )
    of_ice, of_metal = (float(absorption_potential(path, 300.0)) for path in (ICE, SOLID_PATHS[78]))
    assert float(inner.imag.mean()) == pytest.approx(0.8 * of_metal * thickness + of_ice * THICK, rel=0.03)
    assert float(inner.real.std()) > 0.02 * V_PLATINUM * thickness  # grains


def test_a_crystal_of_ice_adds_ice():
    """Frozen water has the potential and the path of the vitreous, by its density; nothing is displaced."""
    ice = Ice(THICK)
    crystal = ice_crystals(1, (40.0, 40.0), (10.0, 10.0), ice, generator=seeded())
    seen = total(alone(crystal, ice=ice, absorption=Absorption(ICE, 1970.0)))
    molecules = float(crystal.occupancies[crystal.numbers == 8].sum())
    volume = molecules * SOLID_VOLUMES[8]
    added = (seen.real - ICE_INNER_POTENTIAL * THICK).sum() * PIXEL**2
    assert float(added) / volume == pytest.approx(ICE_INNER_POTENTIAL * 0.917 / 0.93, rel=0.02)
    of_ice = float(absorption_potential(ICE, 300.0))
    assert float((seen.imag - of_ice * THICK).sum()) * PIXEL**2 == pytest.approx(of_ice * volume, rel=1e-3)


def test_in_vacuum_nothing_is_displaced():
    bead = gold_bead(60.0, generator=seeded())
    seen = total(alone(bead, ice=None))
    assert float(seen[disc(8)].mean()) == pytest.approx(V_GOLD * chord(60.0, 8), rel=0.02)


def test_structured_ice_fluctuates_around_a_bead_and_not_in_it():
    """Slices in the middle of the bead: those of water and of gold in ice differ by gold alone, outside they do not."""
    bead = gold_bead(70.0, generator=seeded())
    water, flat = (alone(bead, ice=Ice(THICK, structure=s)) for s in ("water", "constant"))
    how = {"dtype": torch.float64, "voltage": 300.0, "moment": Moment(0.0)}
    one, other = (tilted_slices(s, 0.0, SHAPE, PIXEL, 10.0, **how) for s in (water, flat))
    rough = one[len(one) // 2] - other[len(other) // 2]
    assert float(rough[disc(22)].std()) < 0.15 * float(rough[~disc(50)].std())
