"""Crowding by molecular shape: nothing overlaps, what was asked for stands there, and chance is what it should be."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from scipy.stats import chi2

from cryosim.core.rotation import random_rotations
from cryosim.io.examples import example_path
from cryosim.io.structure import read_atoms
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.crowding import Interface, Species, crowd, interface_rotations
from cryosim.specimen.free_room import cells_for, empty_room, enter, fits, footprint
from cryosim.specimen.ice import Ice
from cryosim.specimen.molecular_shape import ATOM, inscribed_ball, molecular_shape
from cryosim.specimen.specimen import Poses, Specimen


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def spheroid(a, c, hollow=0.0, spacing=2.4):
    """Atoms on a lattice within a spheroid of half axes a, a, c [Å]."""
    along = torch.arange(-30, 31, dtype=torch.float64) * spacing
    places = torch.cartesian_prod(along, along, along)
    r = (places / torch.tensor([a, a, c], dtype=torch.float64)).norm(dim=1)
    places = places[(r <= 1) & (r >= hollow)]
    return Atoms(places, torch.full((len(places),), 6))


def each_copy(specimen):
    """Atoms (atom, 3) of each copy, and the molecule it is of."""
    for number, (molecule, poses) in enumerate(zip(specimen.molecules, specimen.poses, strict=True)):
        own = molecule.positions.double()
        for rotation, position in zip(poses.rotations, poses.positions, strict=True):
            yield number, (own @ rotation.T + position).numpy()


def least_distance(specimen):
    """Least distance [Å] between atoms of two copies, by brute force."""
    copies = [places for _, places in each_copy(specimen)]
    whose = np.repeat(np.arange(len(copies)), [len(c) for c in copies])
    places = np.concatenate(copies)
    pairs = KDTree(places).query_pairs(6.0, output_type="ndarray")
    pairs = pairs[whose[pairs[:, 0]] != whose[pairs[:, 1]]]
    return np.linalg.norm(places[pairs[:, 0]] - places[pairs[:, 1]], axis=1).min() if len(pairs) else np.inf


# shape ----------------------------------------------------------------------------------------------------------------


def test_volume_of_a_ball_of_atoms_whatever_the_grid():
    n = 3200  # one an Å^2 of a sphere of 16 Å
    k = torch.arange(n, dtype=torch.float64) + 0.5
    z, turn = 1 - 2 * k / n, math.pi * (1 + 5**0.5) * k
    surface = torch.stack([(1 - z**2).sqrt() * torch.cos(turn), (1 - z**2).sqrt() * torch.sin(turn), z], -1)
    places = torch.cat([spheroid(15.9, 15.9).positions, 16.0 * surface])
    atoms = Atoms(places, torch.full((len(places),), 6))
    for spacing in (0.7, 1.0, 1.6):
        assert molecular_shape(atoms, spacing=spacing).volume == pytest.approx(4 / 3 * math.pi * 17.6**3, rel=0.03)


def test_volume_of_ubiquitin_is_that_of_its_mass():
    """Proteins have 1.21 Å^3/Da (Harpaz, Gerstein & Chothia 1994, doi:10.1016/S0969-2126(00)00065-4); 8565 Da."""
    shape = molecular_shape(read_atoms(example_path("ubiquitin")))
    assert shape.volume == pytest.approx(1.21 * 8565, rel=0.05)


def test_apoferritin_is_hollow_and_its_hollow_is_closed():
    """474 kDa of protein; an outer diameter of 120 Å and a hollow of 80 Å (Theil 1987), so 1.21 Å^3/Da and a closed
    ball of some 60 Å radius."""
    shape = molecular_shape(read_atoms(example_path("apoferritin"), assembly=1).centred(), spacing=1.6)
    assert shape.volume == pytest.approx(1.21 * 474e3, rel=0.08)
    _, radius = inscribed_ball(shape)
    assert 48 < radius < 62
    hollow = float(((shape.depth > 0) & ~shape.solid).sum()) * shape.spacing**3
    assert hollow > 4 / 3 * math.pi * 38**3


# room -----------------------------------------------------------------------------------------------------------------


def test_cells_hold_every_centre_that_fits(generator):
    """A pose that fits has its centre in one of the cells: they rule nothing out that is possible."""
    room = empty_room((171.0, 153.0, 120.0), 3.0, 3.0)
    big, small = (footprint(spheroid(a, c), 3.0, 3.0) for a, c in ((30.0, 22.0), (13.0, 9.0)))
    enter(room, big, np.eye(3), np.array([20.0, -10.0, 5.0]))
    enter(room, small, np.eye(3), np.array([-60.0, 50.0, 0.0]))
    turns = random_rotations(4000, generator).numpy()
    places = (torch.rand(4000, 3, generator=generator, dtype=torch.float64).numpy() - 0.5) * room.size
    for shape in (big, small):
        cells = cells_for(room, shape.radius)
        known = {tuple(corner) for corner in cells.corners.tolist()}
        fitting = [i for i in range(4000) if fits(room, shape, turns[i], places[i])]
        assert len(fitting) > 20
        for i in fitting:
            centre = places[i] + turns[i] @ shape.centre
            assert tuple(np.floor((centre - cells.origin) / cells.size).astype(int).tolist()) in known
        if shape is big:
            assert len(known) * cells.size**3 < 0.6 * np.prod(room.size)


# crowding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "dtype"), [(1, torch.float64), (2, torch.float32)])
def test_no_atoms_come_nearer_than_the_gap_and_all_are_inside(seed, dtype):
    size, gap = (181.0, 167.0, 133.0), 3.3
    species = [
        Species(spheroid(24.0, 15.0).to(dtype=dtype), "large", abundance=1.0),
        Species(spheroid(8.0, 12.0).to(dtype=dtype), "small", abundance=9.0, interface=Interface(0.3)),
    ]
    found = crowd(species, size, occupancy=0.2, gap=gap, voxel_size=2.7, generator=seeded(seed))
    assert found.copies == found.asked and sum(found.copies) > 40
    assert gap <= least_distance(found.specimen) < gap + 1.5
    for _, places in each_copy(found.specimen):
        assert (np.abs(places) <= np.array(size) / 2).all()


def test_shaken_until_nothing_more_fits_there_is_still_no_overlap_and_proportions_hold():
    species = [Species(spheroid(20.0, 20.0), "large"), Species(spheroid(12.0, 12.0), "small", abundance=3.0)]
    size = (150.0, 150.0, 150.0)
    with pytest.warns(UserWarning, match=r"reached an occupancy of 0\.\d+, not 0\.7"):
        found = crowd(species, size, occupancy=0.7, voxel_size=2.5, tries=2000, generator=seeded())
    assert least_distance(found.specimen) >= 3.0
    shares = [n / m for n, m in zip(found.copies, found.asked, strict=True)]
    assert all(n < m for n, m in zip(found.copies, found.asked, strict=True))
    assert abs(shares[0] - shares[1]) <= 0.5 / min(found.asked) + 0.5 / max(found.asked)
    assert "no room" in found.stopped


def test_occupancy_is_what_random_points_find(generator):
    """Points within the radius of an atom of a dense body, which has no gaps to fill."""
    size = (160.0, 140.0, 120.0)
    species = [Species(spheroid(15.0, 21.0, spacing=1.6), "body")]
    found = crowd(species, size, occupancy=0.22, generator=generator)
    points = (torch.rand(60_000, 3, generator=generator, dtype=torch.float64).numpy() - 0.5) * size
    inside = np.zeros(len(points), dtype=bool)
    for _, places in each_copy(found.specimen):
        inside |= KDTree(places).query(points, distance_upper_bound=ATOM)[0] < np.inf
    assert found.occupancy == pytest.approx(0.22, abs=0.005)
    assert inside.mean() == pytest.approx(found.occupancy, rel=0.03)


def test_half_of_what_equal_balls_can_fill_is_filled_without_pressing():
    """Random sequential addition of balls ends at 0.38 of the volume; walls and the grid take some of it."""
    atoms = spheroid(14.0, 14.0, spacing=2.0)
    found = crowd([Species(atoms, "ball")], (260.0, 260.0, 260.0), occupancy=0.25, voxel_size=2.0, generator=seeded())
    assert found.copies == found.asked
    assert found.stopped == "all that was asked for is placed"


def test_numbers_go_by_abundance_and_exact_copies_stay_exact():
    species = [
        Species(spheroid(9.0, 9.0), "common", abundance=8.0),
        Species(spheroid(9.0, 14.0), "rare", abundance=2.0),
        Species(spheroid(20.0, 20.0), "counted", copies=3, kind="complex"),
    ]
    found = crowd(species, (200.0, 200.0, 150.0), occupancy=0.1, generator=seeded())
    assert found.copies == found.asked and found.copies[2] == 3
    assert found.copies[0] / found.copies[1] == pytest.approx(4.0, rel=0.05)
    assert found.occupancy == pytest.approx(0.1, rel=0.02)
    assert found.specimen.names == ("common", "rare", "counted")
    assert found.specimen.kinds == ("protein", "protein", "complex")


def test_rotations_and_positions_are_uniform():
    atoms = spheroid(6.0, 9.0)
    size = (400.0, 400.0, 200.0)
    found = crowd([Species(atoms, "small", copies=600)], size, generator=seeded(8))
    (poses,) = found.specimen.poses
    n = len(poses.positions)
    for axis in poses.rotations.unbind(-1):  # columns: where the axes of the molecule point
        assert float(axis.mean(0).norm()) < 3.6 / math.sqrt(3 * n)  # 3 n |mean|^2 is chi^2 of 3, 13 at 0.5 %
        second = axis.mT @ axis / n - torch.eye(3, dtype=torch.float64) / 3
        assert float(second.abs().max()) < 4 * math.sqrt(4 / 45 / n)
    reach = size[2] / 2 - 9.0 - 2.0
    z = poses.positions[:, 2]
    counts = torch.histc(z[z.abs() < reach], 10, -reach, reach)
    expected = counts.sum() / 10
    assert float(((counts - expected) ** 2 / expected).sum()) < chi2.ppf(0.995, 9)
    assert not torch.allclose(poses.positions % 1.0, torch.zeros(n, 3, dtype=torch.float64), atol=0.01)


def test_the_same_seed_gives_the_same_crowd():
    species = [Species(spheroid(9.0, 14.0), "one", interface=Interface(0.5)), Species(spheroid(7.0, 7.0), "two")]
    one, same, other = (
        crowd(species, (120.0, 110.0, 90.0), occupancy=0.12, generator=seeded(s)).specimen.poses for s in (4, 4, 5)
    )
    for a, b in zip(one, same, strict=True):
        assert torch.equal(a.positions, b.positions) and torch.equal(a.rotations, b.rotations)
    assert not torch.equal(one[0].positions, other[0].positions)


def test_a_closed_hollow_stays_empty():
    """A ball of 8 Å would fit into the hollow of 25 Å, but not through its wall."""
    species = [
        Species(spheroid(34.0, 34.0, hollow=0.74), "shell", copies=1),
        Species(spheroid(8.0, 8.0), "small", copies=60),
    ]
    found = crowd(species, (150.0, 150.0, 100.0), generator=seeded())
    shell = found.specimen.poses[0].positions
    assert float((found.specimen.poses[1].positions - shell).norm(dim=1).min()) > 34.0


# interface ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("spread", [5.0, 20.0, 90.0, math.inf])
def test_directions_at_an_interface_are_von_mises_fisher(side, spread):
    """Mean cosine coth k - 1/k, of variance 1 - coth^2 k + 1/k^2; uniform about the normal and about the axis."""
    axis = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    n = 20_000
    turns = interface_rotations(n, Interface(1.0, axis=tuple(axis.tolist()), spread=spread), side, seeded())
    eye = torch.eye(3, dtype=torch.float64).expand(n, 3, 3)
    torch.testing.assert_close(turns @ turns.mT, eye, atol=1e-9, rtol=0)
    assert torch.linalg.det(turns).min() > 0
    out = turns @ (axis / axis.norm())
    cosine = side * out[:, 2]
    k = 1 / math.radians(spread) ** 2 if math.isfinite(spread) else 1e-4
    mean = 1 / math.tanh(k) - 1 / k if k > 0.01 else 0.0
    deviation = math.sqrt(1 - 1 / math.tanh(k) ** 2 + 1 / k**2) if k > 0.01 else 3**-0.5
    assert abs(float(cosine.mean()) - mean) < 4 * deviation / math.sqrt(n)
    if spread <= 20:
        assert float(torch.rad2deg(out[:, 0]).std()) == pytest.approx(spread, rel=0.07)
    about = torch.linalg.cross(axis, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    for direction in (out[:, :2], (turns @ about)[:, :2]):
        angles = torch.atan2(direction[:, 1], direction[:, 0])
        assert float(torch.polar(torch.ones_like(angles), angles).mean().abs()) < 4 / math.sqrt(n)


def test_adsorbed_molecules_stand_at_the_surfaces_with_their_axis_out_of_the_ice():
    size, ice = (500.0, 500.0, 200.0), Ice(210.0)
    stuck = Interface(0.5, depth=12.0, axis=(0.0, 0.0, -1.0), spread=10.0)
    species = [Species(spheroid(9.0, 16.0), "rod", copies=81, interface=stuck)]
    found = crowd(species, size, ice=ice, generator=seeded())
    assert found.adsorbed == (40,)
    poses = found.specimen.poses[0].index(slice(0, 40))
    side = torch.sign(poses.positions[:, 2])
    assert int((side > 0).sum()) == 20
    out = -side * poses.rotations[:, 2, 2]
    assert float(torch.rad2deg(torch.arccos(out.clamp(-1, 1))).max()) < 45 and float(out.mean()) > 0.95
    for i, (_, places) in enumerate(each_copy(found.specimen)):
        away = 105.0 - np.abs(places[:, 2]).max()  # of the nearest atom from the ice's surface
        assert away >= 5.0 - 1e-9  # where the box ends
        assert i >= 40 or away <= 12.0 + 1e-9


def test_one_side_only():
    stuck = Interface(1.0, side="bottom", depth=5.0)
    found = crowd([Species(spheroid(9.0, 9.0), "rod", copies=12, interface=stuck)], (200.0, 200.0, 90.0))
    assert bool((found.specimen.poses[0].positions[:, 2] < -25).all())


# obstacles and regions ------------------------------------------------------------------------------------------------


def test_obstacles_stay_where_they_are_and_clear():
    eye = torch.eye(3, dtype=torch.float64)[None]
    bead = Poses(eye, torch.tensor([[10.0, 5.0, 0.0]], dtype=torch.float64))
    sigma = 6.0  # a plane of coarse sites
    along = torch.arange(-60, 61, 8, dtype=torch.float64)
    sheet = torch.cartesian_prod(along, along, torch.zeros(1, dtype=torch.float64))
    lipid = Atoms(sheet, torch.full((len(sheet),), 6), torch.full((len(sheet),), 8 * math.pi**2 * sigma**2))
    plane = Poses(eye, torch.tensor([[0.0, 0.0, -35.0]], dtype=torch.float64))
    there = Specimen(
        (spheroid(20.0, 20.0), lipid), (bead, plane), (130.0, 130.0, 130.0), Ice(140.0), names=("bead", "sheet")
    )
    found = crowd([Species(spheroid(7.0, 7.0), "small", copies=80)], (121.0, 121.0, 121.0), obstacles=there)
    assert found.specimen.names == ("bead", "sheet", "small") and found.specimen.ice is there.ice
    assert torch.equal(found.specimen.poses[0].positions, bead.positions)
    obstacle = [places for which, places in each_copy(found.specimen) if which < 2]
    mine = np.concatenate([places for which, places in each_copy(found.specimen) if which == 2])
    assert KDTree(obstacle[0]).query(mine)[0].min() >= 3.0
    assert KDTree(obstacle[1]).query(mine)[0].min() >= 2 * sigma


@pytest.mark.parametrize("form", ["function", "volume"])
def test_atoms_stay_in_the_region_that_is_allowed(form):
    size = (140.0, 130.0, 120.0)

    def within(places):
        return places.norm(dim=1) <= 50.0

    allowed = within
    if form == "volume":
        n = (61, 65, 70)
        z, y, x = ((torch.arange(m) - m // 2) * s / m for m, s in zip(n, size[::-1], strict=True))
        allowed = (x**2 + y[:, None] ** 2 + z[:, None, None] ** 2) <= 50.0**2
    found = crowd([Species(spheroid(8.0, 8.0), "small", copies=30)], size, allowed=allowed, generator=seeded())
    farthest = max(np.linalg.norm(places, axis=1).max() for _, places in each_copy(found.specimen))
    assert 40 < farthest <= (50.0 if form == "function" else 51.8)  # half a diagonal of a sample


# what is refused ------------------------------------------------------------------------------------------------------


def test_exact_copies_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"of 40 of large found no free place"):
        crowd([Species(spheroid(20.0, 20.0), "large", copies=40)], (100.0, 100.0, 100.0), tries=500, generator=seeded())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (100.0, 0.0, 100.0)}, "size"),
        ({"occupancy": 1.2}, "occupancy"),
        ({"occupancy": None}, "occupancy"),
        ({"gap": 0.5}, "gap"),
        ({"tries": 0}, "try"),
        ({"voxel_size": 0.01}, "voxel_size"),
        ({"ice": Ice(50.0)}, "ice"),
        ({"allowed": torch.ones(4, 4, dtype=torch.bool)}, "allowed"),
        ({"allowed": lambda places: places[:, 0]}, "allowed"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    given = {"size": (100.0, 100.0, 100.0), "occupancy": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        crowd([Species(spheroid(9.0, 9.0), "one")], given.pop("size"), **given)


def test_bad_species_and_interfaces_are_refused():
    with pytest.raises(ValueError, match="abundance"):
        Species(spheroid(5.0, 5.0), "one", abundance=0.0)
    changes: list[dict] = [{"fraction": 1.5}, {"side": "left"}, {"axis": (0, 0, 0)}, {"spread": 0.0}, {"depth": -1.0}]
    for change in changes:
        with pytest.raises(ValueError, match="Interface"):
            Interface(**change)
    one = Species(spheroid(9.0, 9.0), "one", copies=1, interface=Interface(depth=5.0))
    with pytest.raises(ValueError, match="below the surface"):
        crowd([one], (100.0, 100.0, 60.0), ice=Ice(100.0))


def test_progress_counts_up_to_all():
    heard = []
    crowd(
        [Species(spheroid(9.0, 9.0), "one", copies=20)],
        (120.0, 120.0, 120.0),
        generator=seeded(),
        progress=lambda done, asked: heard.append((done, asked)),
    )
    assert heard[-1] == (20, 20) and all(a[0] < b[0] for a, b in itertools.pairwise(heard))
