"""Bilayers and the surfaces they lie on: areas, curvatures, atoms counted, potentials, proteins in their places."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from scipy.spatial import KDTree

from cryosim.core.inelastic import ICE_INNER_POTENTIAL
from cryosim.core.rotation import random_rotations
from cryosim.specimen.atoms import Atoms, Poses
from cryosim.specimen.ice import Ice
from cryosim.specimen.lipids import DOPC, ELEMENTS, POPC, bilayer_density, bilayer_potential, composition
from cryosim.specimen.membranes import cleared, embed, membrane
from cryosim.specimen.potential_volume import potential_volume
from cryosim.specimen.scattering_factors import DISPLACED_VOLUMES
from cryosim.specimen.specimen import Specimen
from cryosim.specimen.surfaces import (
    Ellipsoid,
    Torus,
    area,
    bounds,
    inside,
    irregular_vesicle,
    patch,
    points_on,
    sphere,
)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def heights(reach=60.0, n=6001):
    return torch.linspace(-reach, reach, n, dtype=torch.float64)


def filled(lipid, z):
    """Fraction of space that the lipid takes at heights z, by the volumes of its core and of its atoms in the heads."""
    volumes = [DISPLACED_VOLUMES[element] for element in ELEMENTS]
    core = torch.special.ndtr((z + lipid.core) / lipid.blur) - torch.special.ndtr((z - lipid.core) / lipid.blur)
    for group in lipid.heads:
        volume = sum(v * n for v, n in zip(volumes, group.counts, strict=True))
        for middle in (group.height, -group.height):
            bell = torch.exp(-0.5 * ((z - middle) / group.width) ** 2) / (group.width * math.sqrt(2 * math.pi))
            core = core + volume / lipid.area * bell
    return core


# the profile of a bilayer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lipid", "formula"), [(POPC, (82, 42, 1, 8, 1)), (DOPC, (84, 44, 1, 8, 1))])
def test_a_bilayer_holds_two_lipids_per_area(lipid, formula):
    z = heights()
    assert composition(lipid).tolist() == list(formula)  # H, C, N, O, P
    found = torch.trapezoid(bilayer_density(lipid, z), z) * lipid.area / 2
    torch.testing.assert_close(found, composition(lipid), rtol=1e-9, atol=0)
    torch.testing.assert_close(bilayer_density(lipid, z), bilayer_density(lipid, -z))


@pytest.mark.parametrize(("lipid", "distance"), [(POPC, 36.5), (DOPC, 36.7)])
def test_head_to_head_distance_of_the_electron_density(lipid, distance):
    """What X-rays see of the bilayer in water, 0.333 e/Å^3, which fills the space that the lipid leaves."""
    z = heights()
    numbers = torch.tensor(ELEMENTS, dtype=torch.float64)
    electrons = numbers @ bilayer_density(lipid, z) + 0.333 * (1 - filled(lipid, z))
    upper = z > 0
    assert 2 * float(z[upper][electrons[upper].argmax()]) == pytest.approx(distance, abs=0.15)
    assert float(filled(lipid, z).max()) < 1.005  # nothing is where something else is


@pytest.mark.parametrize("lipid", [POPC, DOPC])
def test_the_core_has_the_density_of_liquid_hydrocarbon(lipid):
    """C32H64 or C34H66 of one leaflet in area * D_C: 0.80 to 0.84 g/cm^3, with a dip where the chains end."""
    z = heights()
    n = bilayer_density(lipid, z)
    mass = (torch.tensor([1.008, 12.011, 14.007, 15.999, 30.974], dtype=torch.float64) @ n) / 0.602214
    assert float(mass[(z.abs() > 5) & (z.abs() < 7)].mean()) == pytest.approx(0.83, abs=0.04)
    assert float(mass[z.abs() < 0.5].mean()) < 0.75


# surfaces -------------------------------------------------------------------------------------------------------------


def test_areas_of_sphere_torus_and_ellipsoid():
    assert area(sphere(123.0)) == pytest.approx(4 * math.pi * 123.0**2, rel=1e-9)
    assert area(Torus(310.0, 90.0)) == pytest.approx(4 * math.pi**2 * 310 * 90, rel=1e-9)
    a, b, c = 120.0, 150.0, 260.0

    def element(phi, t):
        s = math.sin(t)
        return s * math.sqrt(
            (a * b * math.cos(t)) ** 2 + (c * s) ** 2 * ((a * math.sin(phi)) ** 2 + (b * math.cos(phi)) ** 2)
        )

    wanted = dblquad(element, 0, math.pi, 0, 2 * math.pi, epsrel=1e-7)[0]
    assert area(Ellipsoid((a, b, c))) == pytest.approx(wanted, rel=2e-5)


def test_curvatures_of_a_torus():
    """Outermost 1/r and 1/(R + r), innermost 1/r and -1/(R - r)."""
    points = points_on(Torus(300.0, 100.0), 4000, generator=seeded())
    out = (points.positions[:, :2].norm(dim=1) - 300) / 100  # cos of the angle around the tube
    across = out / (300 + 100 * out)
    torch.testing.assert_close(points.mean_curvatures, 0.5 * (1 / 100 + across), rtol=1e-6, atol=0)
    torch.testing.assert_close(points.gaussian_curvatures, across / 100, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("surface", "euler"),
    [
        (sphere(200.0), 2),
        (Ellipsoid((100.0, 150.0, 220.0)), 2),
        (Torus(250.0, 80.0), 0),
        (irregular_vesicle(200.0, amplitude=0.1, generator=seeded(4)), 2),
    ],
)
def test_total_curvature_is_that_of_the_topology(surface, euler):
    """Gauss and Bonnet: the integral of K is 2 pi times the Euler characteristic. Normals point outwards everywhere."""
    points = points_on(surface, 6000, generator=seeded())
    assert float((points.gaussian_curvatures * points.areas).sum()) == pytest.approx(2 * math.pi * euler, abs=0.02)
    assert inside(surface, points.positions - 0.1 * points.normals).all()
    assert not inside(surface, points.positions + 0.1 * points.normals).any()
    volume = float((points.positions * points.normals).sum(1) @ points.areas) / 3  # divergence theorem
    low, high = bounds(surface)
    box = low + (high - low) * torch.rand(40000, 3, generator=seeded(2), dtype=torch.float64)
    share = inside(surface, box).double().mean()
    assert volume == pytest.approx(float(share * (high - low).prod()), rel=0.03)


@pytest.mark.parametrize(
    "surface",
    [
        sphere(300.0),
        Ellipsoid((150.0, 200.0, 450.0)),
        Torus(300.0, 100.0),
        irregular_vesicle(300.0, generator=seeded()),
    ],
)
def test_points_are_spread_evenly(surface):
    """Counts in balls about points of the surface: the variance is far below that of random points, its mean."""
    n = 8000
    points = points_on(surface, n, generator=seeded())
    nearest = KDTree(points.positions).query(points.positions, k=2)[0][:, 1]
    assert nearest.min() > 0.25 * math.sqrt(area(surface) / n)
    at_random = points_on(surface, n, even=False, generator=seeded(2))
    centres = points_on(surface, 400, even=False, generator=seeded(3)).positions
    radius = math.sqrt(40 * area(surface) / n / math.pi)  # 40 points in a disc
    counts, random_counts = (
        np.array([len(i) for i in KDTree(p.positions).query_ball_point(centres, radius)]) for p in (points, at_random)
    )
    assert counts.mean() == pytest.approx(40, rel=0.05)
    assert random_counts.mean() == pytest.approx(40, rel=0.05)
    assert counts.var() < 0.25 * random_counts.var()


def test_an_irregular_vesicle_has_the_spectrum_of_a_membrane():
    """Variance of r / R over many shapes, at the pole and at the equator alike."""
    square = torch.tensor([[1e-6, 0.3], [0.5, 0.7]], dtype=torch.float64)
    generator = seeded()
    shapes = [irregular_vesicle(1.0, degree=8, tension=2.0, generator=generator) for _ in range(300)]
    found = torch.stack([vesicle.place(square).norm(dim=1) - 1 for vesicle in shapes])
    degrees = range(2, 9)
    wanted = sum((2 * i + 1) / (4 * math.pi) / (20 * (i - 1) * (i + 2) * (i * (i + 1) + 2)) for i in degrees)
    assert found.var(0).tolist() == pytest.approx([wanted, wanted], rel=0.25)  # 3 standard errors
    assert found.mean(0).abs().max() < 3 * math.sqrt(wanted / 300)


def test_an_irregular_vesicle_is_one_band_limited_field():
    """The double Fourier series agrees with the spherical harmonics it came from, at any place: here l = 2 alone."""
    vesicle = irregular_vesicle(1.0, degree=2, amplitude=0.1, generator=seeded(5))
    square = torch.rand(40, 2, generator=seeded(6), dtype=torch.float64)
    points = vesicle.place(square)
    r = points.norm(dim=1)
    x, y, z = (points / r[:, None]).T
    quadratic = torch.stack([x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1], 1)
    solution = torch.linalg.lstsq(quadratic, r - 1).solution
    torch.testing.assert_close(quadratic @ solution, r - 1, rtol=0, atol=1e-6)


def test_undulations_of_a_patch():
    """<h^2> is the sum of k T / (A kappa q^4) over the modes; inside is below."""
    generator = seeded()
    size = (900.0, 700.0)
    places = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    drawn = [patch(size, bending=20.0, shortest=200.0, generator=generator) for _ in range(200)]
    found = torch.stack([sheet.place(places)[:, 2] for sheet in drawn]).square().mean()
    wanted = 0.0
    for m in range(-5, 6):
        for k in range(-5, 6):
            q = 2 * math.pi * math.hypot(m / size[0], k / size[1])
            wanted += 1 / (size[0] * size[1] * 20 * q**4) if 0 < q <= 2 * math.pi / 200 else 0.0
    assert float(found) == pytest.approx(wanted, rel=0.2)
    points = points_on(drawn[0], 1000, generator=generator)
    assert inside(drawn[0], points.positions - 0.1 * points.normals).all()
    assert (points.normals[:, 2] > 0).all()


def test_inside_of_placed_copies():
    poses = Poses(random_rotations(2, seeded()), torch.tensor([[200.0, 0, 0], [0, -150.0, 40]], dtype=torch.float64))
    surface = Ellipsoid((30.0, 60.0, 90.0))
    own = torch.tensor([[0.0, 0.0, 85.0], [0.0, 0.0, 95.0]], dtype=torch.float64)
    for rotation, position in zip(poses.rotations, poses.positions, strict=True):
        assert inside(surface, own @ rotation.T + position, poses).tolist() == [True, False]


# bilayers on surfaces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "surface", [sphere(300.0), Torus(250.0, 80.0), irregular_vesicle(200.0, generator=seeded()), patch((500.0, 301.0))]
)
def test_atoms_of_a_membrane_are_those_of_its_lipids(surface):
    """Two leaflets of area / (area per lipid) each; curvature makes the sum of the leaflets larger by <K> d^2."""
    atoms = membrane(surface, generator=seeded())
    points = points_on(surface, 4000, generator=seeded(2))
    bent = 1 + float(points.gaussian_curvatures.mean()) * (19.18**2 + 1.0)
    lipids = 2 * area(surface) / POPC.area
    phosphorus = float(atoms.occupancies[atoms.numbers == 15].sum())
    assert phosphorus == pytest.approx(lipids * bent, rel=3e-3)
    assert phosphorus == pytest.approx(lipids, rel=0.01)
    for element, count in zip(ELEMENTS, composition(POPC).tolist(), strict=True):
        found = float(atoms.occupancies[atoms.numbers == element].sum())
        assert found == pytest.approx(lipids * count, rel=0.01)
    assert (atoms.occupancies > 0).all()
    assert (atoms.classes == 0).all()


def test_a_vesicle_of_300_angstrom_stays_below_700000_rows():
    assert len(membrane(sphere(300.0), generator=seeded())) < 7e5
    assert len(membrane(sphere(300.0), spacing=16.0, generator=seeded())) < 7e5 / 3.9


def test_radial_potential_of_a_vesicle():
    """The potential of the sites over that of the ice, averaged over shells, is the profile of a flat bilayer."""
    radius, voxel, n = 90.0, 2.5, 99
    atoms = membrane(sphere(radius), generator=seeded())
    pose = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    specimen = Specimen((atoms,), (pose,), (250.0, 250.0, 250.0), Ice(250.0))
    values = potential_volume(specimen, (n, n, n), voxel).values.double()
    axis = (torch.arange(n, dtype=torch.float64) - n // 2) * voxel
    r = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    shell = ((r - radius + 30) / 2).floor().long()  # of 2 Å
    kept = (shell >= 0) & (shell < 30)
    total = torch.zeros(30, dtype=torch.float64).index_add_(0, shell[kept], values[kept])
    places = torch.zeros(30, dtype=torch.float64).index_add_(0, shell[kept], r[kept])
    count = torch.bincount(shell[kept], minlength=30)
    wanted = bilayer_potential(POPC, places / count - radius, solvent=ICE_INNER_POTENTIAL)
    found = total / count
    assert (found - wanted).abs().max() < 0.04 * wanted.max()
    assert (found - wanted).square().mean().sqrt() < 0.015 * wanted.max()
    middles = places / count - radius
    inner, outer = (float(middles[side][found[side].argmax()]) for side in (middles < 0, middles > 0))
    assert outer - inner == pytest.approx(2 * 16.9, abs=3.0)  # two peaks at the heads
    assert float(found[(middles.abs() < 2)].mean()) < 0.7 * float(found.max())  # and a dip where the chains end


def test_heads_stand_at_their_heights_on_both_sides():
    atoms = membrane(sphere(250.0), generator=seeded())
    phosphorus = atoms.index(atoms.numbers == 15)
    r = phosphorus.positions.norm(dim=1)
    outer, inner = r > 250, r < 250
    weights = phosphorus.occupancies
    means = [float((weights * r)[side].sum() / weights[side].sum()) - 250 for side in (outer, inner)]
    assert means == pytest.approx([19.18, -19.18], abs=0.1)
    sums = [float(weights[side].sum()) for side in (outer, inner)]
    assert sums[0] / sums[1] == pytest.approx((269.18 / 230.82) ** 2, rel=5e-3)


def test_a_membrane_follows_its_seed():
    one, same, other = (membrane(sphere(60.0), generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one.positions, same.positions) and torch.equal(one.occupancies, same.occupancies)
    assert not torch.allclose(one.positions, other.positions)


def test_a_surface_bent_more_tightly_than_a_bilayer_is_refused():
    with pytest.raises(ValueError, match="radii of curvature"):
        membrane(sphere(20.0))
    with pytest.raises(ValueError, match="radii of curvature"):
        membrane(Torus(300.0, 22.0))
    with pytest.raises(ValueError, match="wider spacing"):
        membrane(sphere(3000.0))


# embedded proteins ----------------------------------------------------------------------------------------------------


def rod(dtype=torch.float64):
    """Atoms along x, 60 Å long and 20 Å wide: its axis is x."""
    x = torch.linspace(-20, 40, 31, dtype=dtype)
    ring = torch.linspace(0, 2 * math.pi, 9, dtype=dtype)[:-1]
    places = torch.stack([x.repeat_interleave(8), 10 * torch.cos(ring).repeat(31), 10 * torch.sin(ring).repeat(31)], -1)
    return Atoms(places, torch.full((len(places),), 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embedded_molecules_stand_upright_and_apart(dtype):
    surface = sphere(150.0)
    molecule = rod(dtype)
    poses = embed(surface, molecule, 40, axis=(1, 0, 0), height=5.0, gap=4.0, generator=seeded())
    normals = poses.positions / poses.positions.norm(dim=1, keepdim=True)
    torch.testing.assert_close(poses.positions.norm(dim=1), torch.full((40,), 155.0, dtype=torch.float64))
    torch.testing.assert_close(poses.rotations[:, :, 0], normals, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.linalg.det(poses.rotations), torch.ones(40, dtype=torch.float64))
    placed = torch.einsum("cij,aj->cai", poses.rotations, molecule.positions.double()) + poses.positions[:, None]
    trees = [KDTree(copy) for copy in placed]
    for i in range(40):
        for j in range(i):
            assert trees[i].query(placed[j])[0].min() >= 4.0
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    reference = torch.linalg.cross(normals, up.expand_as(normals))
    reference = reference / reference.norm(dim=1, keepdim=True)
    azimuths = torch.atan2(
        (torch.linalg.cross(reference, poses.rotations[:, :, 1]) * normals).sum(1),
        (reference * poses.rotations[:, :, 1]).sum(1),
    )
    resultant = torch.polar(torch.ones_like(azimuths), azimuths).mean().abs()
    assert resultant < 2.5 / math.sqrt(40)  # random azimuths: beyond it once in 500 seeds


def test_what_is_embedded_later_leaves_room_for_the_first():
    surface, molecule = sphere(120.0), rod()
    first = embed(surface, molecule, 12, axis=(1, 0, 0), generator=seeded())
    second = embed(surface, molecule, 12, axis=(1, 0, 0), beside=[(molecule, first)], generator=seeded())
    one, other = (
        (torch.einsum("cij,aj->cai", p.rotations, molecule.positions) + p.positions[:, None]).flatten(0, 1)
        for p in (first, second)
    )
    assert KDTree(one).query(other)[0].min() >= 5.0


def test_copies_that_do_not_fit_in_the_membrane():
    with pytest.raises(ValueError, match="no free place"):
        embed(sphere(40.0), rod(), 60, axis=(1, 0, 0), tries=500, generator=seeded())
    with pytest.raises(ValueError, match="axis with a length"):
        embed(sphere(40.0), rod(), 1, axis=(0, 0, 0))
    assert len(embed(sphere(40.0), rod(), 0).positions) == 0


def test_lipids_make_room_for_proteins():
    """Nothing within the distance, everything beyond it: a hole of the area of the rod and its rim."""
    surface, molecule = patch((200.0, 160.0)), rod()
    atoms = membrane(surface, generator=seeded())
    poses = embed(surface, molecule, 3, axis=(1, 0, 0), generator=seeded())
    left = cleared(atoms, molecule, poses, distance=4.0)
    placed = torch.einsum("cij,aj->cai", poses.rotations, molecule.positions) + poses.positions[:, None]
    tree = KDTree(placed.flatten(0, 1))
    assert tree.query(left.positions)[0].min() >= 4.0
    gone = torch.as_tensor(tree.query(atoms.positions)[0] < 4.0)
    assert len(left) == len(atoms) - int(gone.sum())
    assert 0.02 < float(gone.double().mean()) < 0.1
