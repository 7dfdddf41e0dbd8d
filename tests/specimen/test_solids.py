"""Solids: atoms counted, mass densities, mean inner potentials, edges, grain, and where things stand."""

import math

import pytest
import torch
from scipy.spatial import KDTree

from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR
from cryosim.specimen.atoms import CLASSES, Poses
from cryosim.specimen.ice import Ice, Relief
from cryosim.specimen.potential_volume import potential_volume
from cryosim.specimen.scattering_factors import SOLID_VOLUMES, scattering_factor
from cryosim.specimen.solids import (
    CARBON_DENSITY,
    GOLD_LATTICE,
    ICE_CRYSTAL_DENSITY,
    PLATINUM_DENSITY,
    carbon_film,
    gold_bead,
    ice_crystals,
    platinum_layer,
    wedge,
)
from cryosim.specimen.specimen import Specimen

MASSES = {1: 1.008, 6: 12.011, 8: 15.999, 78: 195.084, 79: 196.967}  # [g/mol]
SOLID, DEPOSIT = CLASSES.index("solid"), CLASSES.index("deposit")


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def density(atoms, volume):
    """[g/cm^3]"""
    masses = torch.tensor([MASSES[z] for z in atoms.numbers.tolist()], dtype=torch.float64)
    return float(masses @ atoms.occupancies) / 0.602214 / volume


def inner_potential(atoms, volume):
    """Mean inner potential [V] of independent atoms."""
    factors = {z: float(scattering_factor(torch.tensor([z]), torch.zeros((), dtype=torch.float64))) for z in MASSES}
    total = sum(factors[z] * float(atoms.occupancies[atoms.numbers == z].sum()) for z in MASSES)
    return POTENTIAL_PER_FORM_FACTOR * total / volume


def alone(atoms, size):
    here = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    return Specimen((atoms,), (here,), (size, size, size))


# gold -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diameter", [51.0, 100.0])
def test_a_gold_bead_is_a_ball_of_its_lattice(diameter):
    bead = gold_bead(diameter, generator=seeded())
    volume = math.pi / 6 * diameter**3
    wanted = volume * 4 / GOLD_LATTICE**3
    surface = math.pi * diameter**2 * GOLD_LATTICE * 4 / GOLD_LATTICE**3  # atoms near the surface
    assert abs(len(bead) - wanted) < 3 * math.sqrt(surface)
    assert float(bead.positions.norm(dim=1).max()) <= diameter / 2 + 1e-9
    assert float(bead.positions.mean(0).norm()) < 0.5
    assert density(bead, volume) == pytest.approx(19.29, rel=0.01)
    assert inner_potential(bead, volume) == pytest.approx(29.86, rel=0.01)
    assert len(bead) * SOLID_VOLUMES[79] == pytest.approx(volume, rel=0.01)
    assert (bead.classes == SOLID).all() and (gold_bead(30.0, on_ice=True).classes == DEPOSIT).all()


def test_gold_has_twelve_neighbours_on_a_turned_lattice():
    one, other = (gold_bead(40.0, generator=seeded(s)) for s in (1, 2))
    inner = one.positions[one.positions.norm(dim=1) < 15]
    apart, _ = KDTree(one.positions).query(inner, k=14)
    assert apart[:, 1:13] == pytest.approx(GOLD_LATTICE / math.sqrt(2), abs=1e-9)
    assert (apart[:, 13] > GOLD_LATTICE - 1e-9).all()
    assert len(one) != len(other) or not torch.allclose(one.positions, other.positions)
    assert torch.equal(one.positions, gold_bead(40.0, generator=seeded(1)).positions)


# carbon ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
def test_density_and_inner_potential_of_carbon(explicit):
    size, thickness = (93.0, 71.0), 55.0
    film = carbon_film(size, thickness, z=-20.0, explicit=explicit, generator=seeded())
    volume = size[0] * size[1] * thickness
    assert density(film, volume) == pytest.approx(CARBON_DENSITY, rel=1e-3)
    assert inner_potential(film, volume) == pytest.approx(10.84, rel=2e-3)
    assert float(film.positions[:, 2].mean()) == pytest.approx(-20.0, abs=0.5)
    assert float(film.occupancies.sum()) * SOLID_VOLUMES[6] == pytest.approx(volume, rel=2e-3)
    assert (film.classes == SOLID).all()


def test_explicit_carbon_keeps_its_atoms_apart_and_in_the_film():
    film = carbon_film((61.0, 45.0), 31.0, explicit=True, least_distance=1.35, generator=seeded())
    assert KDTree(film.positions).query(film.positions, k=2)[0][:, 1].min() >= 1.35
    assert (film.positions.abs() <= torch.tensor([30.5, 22.5, 15.5])).all()
    half = (film.positions[:, 0] > 0).double().mean()  # uniform: both halves alike
    assert float(half) == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(len(film)))


@pytest.mark.parametrize("explicit", [False, True])
def test_the_hole_has_its_radius_at_its_place(explicit):
    """Mass beyond the edge, and the distance at which the density reaches half."""
    size, thickness, radius, centre = (161.0, 141.0), 40.0, 120.0, (-100.0, 20.0)
    film = carbon_film(size, thickness, hole_radius=radius, hole_centre=centre, explicit=explicit, generator=seeded())
    fine = torch.cartesian_prod(
        *((torch.arange(n, dtype=torch.float64) + 0.5) / n * length - length / 2 for n, length in zip((500, 500), size))
    )
    outside = (fine - torch.tensor(centre)).norm(dim=1) > radius
    solid = float(outside.double().mean()) * size[0] * size[1] * thickness
    assert density(film, solid) == pytest.approx(CARBON_DENSITY, rel=0.02)
    r = (film.positions[:, :2] - torch.tensor(centre, dtype=torch.float64)).norm(dim=1)
    distance = (fine - torch.tensor(centre)).norm(dim=1)
    sigma = math.sqrt(float(film.b_factors[0]) / (8 * math.pi**2))
    # counts within a distance d of the edge, against the area there: the edge lies where they would begin
    counts = [float(film.occupancies[r < radius + d].sum()) for d in (12.0, 24.0)]
    areas = [float(((distance > radius) & (distance < radius + d)).double().mean()) for d in (12.0, 24.0)]
    per_area = float(film.occupancies.sum()) / float(outside.double().mean())
    shift = [24.0 * (c / per_area / a - 1) for c, a in zip(counts, areas, strict=True)]
    assert abs(shift[1]) < 1.5  # [Å]
    assert sigma < (5.0 if not explicit else 0.2)


def test_grain_of_coarse_carbon_is_that_of_atoms_at_random():
    """|sum N exp(2 pi i k.r)|^2 exp(-4 pi^2 sigma^2 k^2) / atoms: S (1 + x) exp(-x), as the module says."""
    size, thickness = (680.0, 680.0), 34.0
    power = {2: 0.0, 8: 0.0, 20: 0.0}
    seeds = range(6)
    for seed in seeds:
        film = carbon_film(size, thickness, generator=seeded(seed))
        for m in power:
            for i, j in ((m, 0), (0, m), (m, 1), (1, m), (-1, m), (m, -1)):  # whole periods of the field: no mean
                phase = 2 * math.pi * (film.positions[:, 0] * i + film.positions[:, 1] * j) / size[0]
                re, im = (film.occupancies @ f(phase) for f in (torch.cos, torch.sin))
                power[m] += float(re**2 + im**2) / float(film.occupancies.sum()) / (6 * len(seeds))
    sigma = 0.55 * 8.5
    for m, found in power.items():
        x = (2 * math.pi * sigma * m / size[0]) ** 2
        assert found == pytest.approx(1 + x, rel=0.5)  # 36 draws of an exponential: 3 standard errors
    smooth = carbon_film(size, thickness, structure_factor=0.0)
    assert float(smooth.occupancies.std()) < 1e-9


def test_ripple_of_the_sites_is_below_one_percent():
    """Potential inside a film without grain, at a fifth of the spacing."""
    film = carbon_film((85.0, 85.0), 85.0, structure_factor=0.0)
    values = potential_volume(alone(film, 85.0), (51, 51, 51), 1.7).values[15:36, 15:36, 15:36]
    assert float(values.mean()) == pytest.approx(10.84, rel=0.01)
    assert float(values.max() - values.min()) < 0.03 * 10.84


# platinum -------------------------------------------------------------------------------------------------------------


def test_density_and_grain_of_platinum():
    size, thickness = (300.0, 251.0), 80.0
    layer = platinum_layer(size, thickness, z=440.0, packing=0.7, grain=40.0, generator=seeded())
    volume = size[0] * size[1] * thickness
    assert density(layer, volume) == pytest.approx(0.7 * PLATINUM_DENSITY, rel=1e-6)
    assert inner_potential(layer, volume) == pytest.approx(0.7 * 35.44, rel=5e-3)
    assert (layer.classes == DEPOSIT).all()
    assert float(layer.positions[:, 2].min()) > 400 and float(layer.positions[:, 2].max()) < 480
    # grains: a filled site's neighbour is filled more often than by chance, up to about the size of a grain
    tree = KDTree(layer.positions)
    inner = layer.positions[(layer.positions[:, :2].abs() < 90).all(1) & ((layer.positions[:, 2] - 440).abs() < 20)]
    near = tree.count_neighbors(KDTree(inner), 7.5) / len(inner) - 1  # six neighbours at about 7 Å
    assert near > 1.1 * 0.7 * 6


# lamellae -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_angle", [0.0, 90.0, -30.0])
def test_a_wedge_thickens_evenly(axis_angle):
    extent, thin, thick = 3000.0, 900.0, 1800.0
    relief = wedge(extent, thin, thick, axis_angle=axis_angle)
    depth = (thin + thick) / 2 + relief.heights.sum(0)
    assert torch.equal(relief.heights[0], relief.heights[1])
    n = depth.shape[0]
    middle = n // 2
    assert float(depth[middle, middle]) == pytest.approx(1350.0)
    step = torch.tensor([math.cos(math.radians(axis_angle)), math.sin(math.radians(axis_angle))])
    gradient = [
        float(depth.diff(dim=axis)[middle - 2 : middle + 2, middle - 2 : middle + 2].mean()) / relief.spacing
        for axis in (1, 0)
    ]
    assert gradient == pytest.approx((step * 900 / 3000).tolist(), abs=1e-6)
    assert float(depth.min()) >= 900 - 1e-9 and float(depth.max()) <= 1800 + 1e-9
    Ice(1350.0, relief=relief)


def test_a_wedge_by_its_angle_and_with_curtains():
    by_angle = wedge(2000.0, 1000.0, angle=6.0)
    assert float(by_angle.heights.sum(0)[0, -1] - by_angle.heights.sum(0)[0, 0]) == pytest.approx(
        2 * 2000 * math.tan(math.radians(3))
    )
    marks = [
        wedge(4000.0, 1000.0, 1000.0, curtains=15.0, curtain_width=200.0, generator=seeded(s)).heights for s in range(8)
    ]
    assert all(float(m.std(2).max()) < 1e-9 for m in marks)  # ridges run along the mill, x
    lines = torch.stack([m[:, :, 0] for m in marks]).flatten(0, 1)  # (surface, y)
    assert float(lines.square().mean().sqrt()) == pytest.approx(15.0, rel=0.15)
    lag = 200.0 / (4000.0 / (lines.shape[1] - 1))
    assert lag == pytest.approx(round(lag))
    correlation = (lines[:, : -round(lag)] * lines[:, round(lag) :]).mean() / lines.square().mean()
    assert float(correlation) == pytest.approx(math.exp(-1), abs=0.12)
    with pytest.raises(ValueError, match="either thick or angle"):
        wedge(1000.0, 100.0)


# contamination --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relief", [False, True])
def test_ice_crystals_stand_on_the_ice(relief):
    ice = Ice(500.0, relief=wedge(1500.0, 400.0, 600.0) if relief else None)
    atoms = ice_crystals(9, (60.0, 120.0), (901.0, 700.0), ice, generator=seeded())
    assert (atoms.classes == DEPOSIT).all()
    oxygen, hydrogen = (atoms.index(atoms.numbers == z) for z in (8, 1))
    torch.testing.assert_close(oxygen.positions, hydrogen.positions)
    assert float(hydrogen.occupancies.sum()) == pytest.approx(2 * float(oxygen.occupancies.sum()))
    x, z = oxygen.positions[:, 0], oxygen.positions[:, 2]
    surface = 250 + (50 * (x / 750).clamp(-1, 1) if relief else 0.0)
    assert (z.abs() > surface).all()
    assert (z > 0).any() and (z < 0).any()
    cell = 8.5**3
    assert density(atoms.index(slice(0, len(oxygen))), cell * len(oxygen)) + density(
        hydrogen, cell * len(oxygen)
    ) == pytest.approx(ICE_CRYSTAL_DENSITY, rel=1e-3)
    assert KDTree(oxygen.positions).query(oxygen.positions, k=2)[0][:, 1].min() > 0.6 * 8.5  # nothing twice
    assert float(oxygen.occupancies.sum()) * SOLID_VOLUMES[8] == pytest.approx(cell * len(oxygen), rel=5e-3)


def test_volume_of_one_crystal_lies_between_that_of_its_balls():
    ice = Ice(100.0)
    counts = [len(ice_crystals(1, (100.0, 100.0), (10.0, 10.0), ice, generator=seeded(s))) / 2 for s in range(6)]
    ball = 4 / 3 * math.pi * 100.0**3 / 8.5**3
    assert all(0.5 * 0.7**3 * ball < count < ball for count in counts)
    assert len(ice_crystals(0, (10.0, 20.0), (10.0, 10.0), ice)) == 0


def test_what_solids_refuse():
    with pytest.raises(ValueError, match="rows are more than"):
        gold_bead(5000.0)
    with pytest.raises(ValueError, match="leaves nothing"):
        carbon_film((50.0, 50.0), 20.0, hole_radius=500.0)
    with pytest.raises(ValueError, match="least distance"):
        carbon_film((50.0, 50.0), 20.0, explicit=True, least_distance=3.0)
    with pytest.raises(ValueError, match="packing"):
        platinum_layer((50.0, 50.0), 20.0, z=0.0, packing=1.5)
    with pytest.raises(ValueError, match="positive"):
        ice_crystals(1, (-1.0, 3.0), (10.0, 10.0), Ice(50.0))
    assert isinstance(wedge(100.0, 50.0, 60.0), Relief)
