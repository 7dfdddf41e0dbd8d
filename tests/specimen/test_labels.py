"""Label volumes: what is whose, how large it is, and that it is where the potential is."""

import math

import pytest
import torch

from cryosim.core.rotation import random_rotations
from cryosim.io.examples import example_path
from cryosim.io.structure import read_atoms
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.labels import label_volumes
from cryosim.specimen.potential_volume import potential_volume
from cryosim.specimen.specimen import Poses, Specimen


def ball(radius=20.0, spacing=2.5, hollow=0.0):
    """Atoms on a cubic lattice within a ball, and densely on its surface."""
    along = torch.arange(-40, 41, dtype=torch.float64) * spacing
    places = torch.cartesian_prod(along, along, along)
    distance = places.norm(dim=1)
    places = places[(distance < radius) & (distance >= hollow)]
    n = round(4 * math.pi * radius**2)  # one an Å^2, on a spiral
    k = torch.arange(n, dtype=torch.float64) + 0.5
    z, turn = 1 - 2 * k / n, math.pi * (1 + 5**0.5) * k
    disc = torch.sqrt(1 - z**2)
    surface = radius * torch.stack([disc * torch.cos(turn), disc * torch.sin(turn), z], -1)
    places = torch.cat([places, surface])
    return Atoms(places, torch.full((len(places),), 6))


def at(*positions, instances=None, rotations=None):
    places = torch.tensor(positions, dtype=torch.float64).reshape(-1, 3)
    if rotations is None:
        rotations = torch.eye(3, dtype=torch.float64).expand(len(places), 3, 3)
    return Poses(rotations, places, instances)


def around(labels, positions, radius):
    """Mask of the voxels whose centre lies within a radius of one of some places."""
    z, y, x = ((torch.arange(n, dtype=torch.float64) - n // 2) * labels.voxel_size for n in labels.instances.shape)
    grid = torch.stack(torch.broadcast_tensors(x, y[:, None], z[:, None, None]), -1)
    return (torch.cdist(grid.reshape(-1, 3), positions) <= radius).any(1).reshape(labels.instances.shape)


@pytest.mark.parametrize(("shape", "voxel_size"), [((57, 61, 55), 1.0), ((27, 31, 28), 2.0), ((12, 11, 13), 5.3)])
def test_a_ball_of_atoms_has_its_volume_and_no_holes(shape, voxel_size):
    atoms = ball(20.0)
    where = (1.3, -0.4, 2.1)
    labels = label_volumes(Specimen((atoms,), (at(where),), (50.0, 50.0, 50.0)), shape, voxel_size, radius=2.0)
    wanted = around(labels, torch.tensor([where], dtype=torch.float64), 22.0)
    assert float((labels.instances == 1).sum()) == pytest.approx(float(wanted.sum()), rel=0.03)
    assert labels.table[0].volume == pytest.approx(4 / 3 * math.pi * 22.0**3, rel=0.03 if voxel_size < 5 else 0.1)
    assert labels.table[0].volume == float((labels.instances == 1).sum()) * voxel_size**3
    assert labels.table[0].position == pytest.approx(where)


def test_a_sparse_lattice_is_solid_and_a_hollow_stays_hollow():
    """Balls of 1.8 Å on a lattice of 3 Å leave room in which no water fits: it is filled. A hollow of 10 Å is not."""
    labels = label_volumes(
        Specimen((ball(19.0, 3.0, hollow=11.0),), (at((0, 0, 0)),), (50.0, 50.0, 50.0)), (51, 51, 51), 1.0
    )
    distance = torch.cdist(
        torch.cartesian_prod(*[torch.arange(51, dtype=torch.float64) - 25] * 3), torch.zeros(1, 3, dtype=torch.float64)
    ).reshape(51, 51, 51)
    assert (labels.instances[(distance > 13) & (distance < 17)] == 1).all()
    assert (labels.instances[(distance < 7) | (distance > 21)] == 0).all()


def test_a_coarse_site_reaches_two_standard_deviations():
    sigma = 5.0
    site = Atoms(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([6]), torch.tensor([8 * math.pi**2 * sigma**2]))
    labels = label_volumes(Specimen((site,), (at((0, 0, 0)),), (50.0, 50.0, 50.0)), (31, 33, 35), 1.0)
    assert labels.table[0].volume == pytest.approx(4 / 3 * math.pi * (2 * sigma) ** 3, rel=0.03)


def test_copies_molecules_and_kinds_are_numbered_in_order():
    specimen = Specimen(
        (ball(6.0), ball(9.0)),
        (at((-30, 0, 0), (30, 0, 0)), at((0, 30, 0))),
        (100.0, 100.0, 100.0),
        names=("small", "large"),
        kinds=("gold", "protein"),
    )
    labels = label_volumes(specimen, (15, 45, 45), 2.0)
    middle = (7, 22, 22)
    assert int(labels.instances[7, 22, 22 - 15]) == 1 and int(labels.semantic[7, 22, 22 - 15]) == 1
    assert int(labels.instances[7, 22, 22 + 15]) == 2 and int(labels.semantic[7, 22, 22 + 15]) == 1
    assert int(labels.instances[7, 22 + 15, 22]) == 3 and int(labels.semantic[7, 22 + 15, 22]) == 2
    assert int(labels.instances[middle]) == 0
    assert [(r.instance, r.molecule, r.kind, r.copy) for r in labels.table] == [
        (1, "small", "gold", 0),
        (2, "small", "gold", 1),
        (3, "large", "protein", 0),
    ]
    assert labels.kinds == {"gold": (1,), "protein": (2,)}
    assert labels.instances.dtype == torch.int32 and labels.semantic.dtype == torch.uint8


def test_what_lies_beyond_the_volume_is_cut_off_and_stays_in_the_table():
    specimen = Specimen((ball(10.0, 1.0),), (at((20.0, 0, 0), (200.0, 0, 0)),), (100.0, 100.0, 100.0))
    labels = label_volumes(specimen, (41, 41, 41), 1.0, radius=1.0)
    # the last voxel, at 20 Å, has its centre at that of the ball: half of it and half a voxel of its widest disc
    wanted = 2 / 3 * math.pi * 11**3 + 0.5 * math.pi * 11**2
    assert labels.table[0].volume == pytest.approx(wanted, rel=0.03)
    assert labels.table[1].volume == 0 and labels.table[1].position == (200.0, 0, 0)


def test_subunits_of_one_instance_are_one_thing():
    chain = at(*[(0.0, 12.0 * i - 30, 0.0) for i in range(6)], instances=torch.tensor([7, 7, 7, 2, 2, 2]))
    labels = label_volumes(Specimen((ball(5.0),), (chain,), (100.0, 100.0, 100.0)), (15, 51, 15), 2.0)
    assert [(r.instance, r.copy, r.copies) for r in labels.table] == [(1, 0, 3), (2, 3, 3)]
    assert labels.table[0].position == pytest.approx((0.0, -18.0, 0.0))
    assert labels.instances.unique().tolist() == [0, 1, 2]
    assert labels.table[0].volume == pytest.approx(labels.table[1].volume, rel=0.1)


def test_a_voxel_between_two_goes_to_the_nearer_whichever_comes_first():
    for order in ((0, 1), (1, 0)):
        ends = [(-9.0, 0.0, 0.0), (9.0, 0.0, 0.0)]
        specimen = Specimen((ball(8.0, 1.0),), (at(*[ends[i] for i in order]),), (60.0, 60.0, 60.0))
        labels = label_volumes(specimen, (25, 25, 41), 1.0, radius=3.0)
        left, right = (1 + order.index(i) for i in (0, 1))
        assert (labels.instances[:, :, :20] != right).all()
        assert (labels.instances[:, :, 21:] != left).all()


@pytest.mark.parametrize("voxel_size", [2.0, 3.1])
def test_labels_lie_where_the_potential_is(voxel_size, generator):
    """The voxels above half its mean potential, are its own."""
    atoms = read_atoms(example_path("ubiquitin")).centred()
    atoms = atoms.replace(b_factors=torch.full_like(atoms.b_factors, 150.0))
    poses = at((-21.0, 3.0, 1.0), (19.0, -2.0, -3.0), rotations=random_rotations(2, generator))
    specimen = Specimen((atoms,), (poses,), (100.0, 60.0, 60.0))
    n = 2 * round(32 / voxel_size) + 1
    shape = (n, n, 2 * round(50 / voxel_size) + 1)
    labels = label_volumes(specimen, shape, voxel_size)
    mask = labels.instances > 0
    potential = potential_volume(specimen, shape, voxel_size).values
    dense = potential > 0.5 * potential[mask].mean()
    dice = 2 * float((mask & dense).sum()) / float(mask.sum() + dense.sum())
    assert dice > 0.9
    assert labels.table[0].volume == pytest.approx(labels.table[1].volume, rel=0.05)
    assert labels.table[0].volume == pytest.approx(1.21 * 8565, rel=0.1)  # specific volume, molar mass


def test_float32_and_no_copies_are_served():
    specimen = Specimen((ball(6.0).to(dtype=torch.float32), ball(6.0)), (at((0, 0, 0)), at()), (40.0, 40.0, 40.0))
    labels = label_volumes(specimen, (15, 15, 15), 2.0)
    assert len(labels.table) == 1 and int(labels.instances.max()) == 1
    assert labels.kinds == {"protein": (1, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (0, 5, 5)}, "shape"),
        ({"voxel_size": 0.0}, "voxel_size"),
        ({"radius": -1.0}, "radius"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    given = {"shape": (5, 5, 5), "voxel_size": 2.0, "radius": 2.0} | changes
    with pytest.raises(ValueError, match=message):
        label_volumes(
            Specimen((ball(6.0),), (at((0, 0, 0)),), (40.0, 40.0, 40.0)),
            given["shape"],
            given["voxel_size"],
            radius=given["radius"],
        )


def test_instances_must_be_one_a_copy():
    poses = at((0, 0, 0), (9, 0, 0), instances=torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="whole number"):
        label_volumes(Specimen((ball(3.0),), (poses,), (40.0, 40.0, 40.0)), (9, 9, 9), 2.0)
