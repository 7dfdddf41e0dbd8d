"""Molecules at their poses, seen at a tilt: where the atoms land, what the ice adds, what the ground truth holds."""

import math

import pytest
import torch

from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR
from cryosim.core.fourier import centre_phases, frequencies, positions
from cryosim.core.inelastic import ICE_INNER_POTENTIAL
from cryosim.core.rotation import random_rotations, rotation_z, tilt_rotation
from cryosim.specimen.atoms import Atoms, concatenate
from cryosim.specimen.ice import Ice
from cryosim.specimen.portions import bodies
from cryosim.specimen.potential_volume import potential_volume
from cryosim.specimen.scattering_factors import scattering_factor
from cryosim.specimen.specimen import (
    Poses,
    Specimen,
    assemble,
    place_randomly,
)
from cryosim.specimen.tilted import tilted_slices


def molecule(generator, n=12, spread=4.0, b=20.0, dtype=torch.float64):
    places = spread * torch.randn(n, 3, generator=generator, dtype=torch.float64).clamp(-2, 2)
    numbers = torch.tensor([6, 7, 8, 16])[torch.randint(4, (n,), generator=generator)]
    return Atoms(places, numbers, torch.full((n,), b, dtype=torch.float64)).to(dtype=dtype)


def alone(atoms, position=(0.0, 0.0, 0.0), ice=None, rotation=None):
    """A specimen of one molecule at one place."""
    rotation = torch.eye(3, dtype=torch.float64) if rotation is None else rotation
    poses = Poses(rotation[None], torch.tensor([position], dtype=torch.float64))
    return Specimen((atoms,), (poses,), (100.0, 100.0, 100.0), ice)


def one_atom(number=16, b=40.0):
    return Atoms(
        torch.zeros(1, 3, dtype=torch.float64), torch.tensor([number]), torch.full((1,), b, dtype=torch.float64)
    )


def forward(atoms):
    """Integral of the potential of some atoms [V·Å^3]."""
    factors = scattering_factor(atoms.numbers, torch.zeros((), dtype=torch.float64))
    return float((atoms.occupancies.double() * factors).sum()) * POTENTIAL_PER_FORM_FACTOR


def projected(source):
    return sum(source[i] for i in range(len(source)))


# atoms and poses ------------------------------------------------------------------------------------------------------


def test_centred_puts_the_mean_position_weighted_by_number_at_the_origin(generator):
    atoms = molecule(generator).moved(shift=torch.tensor([5.0, -3.0, 8.0])).centred()
    weights = atoms.numbers.double()
    assert (weights @ atoms.positions / weights.sum()).abs().max() < 1e-12


def test_moved_rotates_first_then_shifts(generator):
    atoms = molecule(generator)
    moved = atoms.moved(rotation_z(90.0), torch.tensor([1.0, 2.0, 3.0]))
    x, y, z = atoms.positions.T
    torch.testing.assert_close(moved.positions, torch.stack([1 - y, 2 + x, 3 + z], -1))


@pytest.mark.parametrize("copies", [1, 3])
def test_assemble_rotates_each_copy_then_moves_it(copies, generator):
    atoms = molecule(generator)
    specimen = place_randomly([atoms], [copies], (120.0, 130.0, 60.0), generator=generator)
    together = assemble(specimen)
    assert len(together) == copies * len(atoms)
    (poses,) = specimen.poses
    for i in range(copies):
        wanted = specimen.molecules[0].moved(poses.rotations[i], poses.positions[i])
        mine = together.index(slice(i * len(atoms), (i + 1) * len(atoms)))
        torch.testing.assert_close(mine.positions, wanted.positions)
        assert torch.equal(mine.numbers, wanted.numbers)
        assert torch.equal(mine.b_factors, wanted.b_factors)


def test_one_poses_for_each_molecule(generator):
    with pytest.raises(ValueError, match="one Poses"):
        Specimen((molecule(generator),), (), (10.0, 10.0, 10.0))


# random places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_places_do_not_overlap_and_stay_inside(dtype, generator):
    kinds = [molecule(generator, 8, 2.0, dtype=dtype), molecule(generator, 20, 5.0, dtype=dtype)]
    size, gap = (150.0, 110.0, 70.0), 7.0
    specimen = place_randomly(kinds, [12, 6], size, gap=gap, generator=generator)
    assert [len(p.positions) for p in specimen.poses] == [12, 6]
    radii = torch.cat(
        [
            m.positions.double().norm(dim=1).max().expand(len(p.positions))
            for m, p in zip(specimen.molecules, specimen.poses, strict=True)
        ]
    )
    centres = torch.cat([p.positions for p in specimen.poses])
    distances = torch.cdist(centres, centres) + 1e9 * torch.eye(len(centres), dtype=torch.float64)
    assert (distances > radii[:, None] + radii + gap - 1e-6).all()
    atoms = assemble(specimen).positions.double()
    assert (atoms.abs() <= torch.tensor(size, dtype=torch.float64) / 2 + 1e-5).all()


def test_random_places_follow_the_seed(generator):
    kind = molecule(generator)
    one, same, other = (
        assemble(
            place_randomly([kind], [3], (150.0, 150.0, 80.0), generator=torch.Generator().manual_seed(s))
        ).positions
        for s in (5, 5, 6)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(("copies", "size"), [(200, (60.0, 60.0, 60.0)), (1, (60.0, 60.0, 5.0))])
def test_copies_that_do_not_fit(copies, size, generator):
    with pytest.raises(ValueError, match="no free place"):
        place_randomly([molecule(generator)], [copies], size, tries=200, generator=generator)


def test_no_copies_of_one_kind(generator):
    specimen = place_randomly([molecule(generator), one_atom()], [0, 2], (60.0, 60.0, 60.0), generator=generator)
    assert len(assemble(specimen)) == 2


# tilted slices --------------------------------------------------------------------------------------------------------


def centre_of_mass(image, pixel_size):
    """(x, y) [Å] of a positive blob, read from the phase of the lowest frequencies."""
    found = []
    for axis, n in ((-1, image.shape[-1]), (-2, image.shape[-2])):
        line = image.sum(-2 if axis == -1 else -1)
        angle = torch.angle((line * torch.exp(-2j * math.pi * positions(n, dtype=torch.float64) / n)).sum())
        found.append(float(-angle / (2 * math.pi) * n * pixel_size))
    return found


@pytest.mark.parametrize("shape", [(96, 81), (75, 90)])
@pytest.mark.parametrize("angle", [-60.0, 0.0, 35.0])
@pytest.mark.parametrize("axis_angle", [0.0, -85.0, 12.0])
def test_an_atom_lands_where_the_tilt_says(shape, angle, axis_angle):
    """u = x cos t + z sin t, v = y, both turned in the image plane by axis_angle, then shifted."""
    x, y, z = 11.0, -6.0, 13.0
    shift = (2.3, -3.1)
    source = tilted_slices(
        alone(one_atom(), (x, y, z)),
        angle,
        shape,
        0.8,
        2.0,
        axis_angle=axis_angle,
        shift=torch.tensor(shift, dtype=torch.float64),
        dtype=torch.float64,
    )
    t, a = math.radians(angle), math.radians(axis_angle)
    u, v = x * math.cos(t) + z * math.sin(t), y
    wanted = (u * math.cos(a) - v * math.sin(a) + shift[0], u * math.sin(a) + v * math.cos(a) + shift[1])
    values = torch.stack([source[i] for i in range(len(source))])
    assert centre_of_mass(values.sum(0), 0.8) == pytest.approx(wanted, abs=1e-4)
    heights = positions(len(source), 2.0, dtype=torch.float64)
    weights = values.sum((1, 2))
    assert float(heights @ weights / weights.sum()) == pytest.approx(z * math.cos(t) - x * math.sin(t), abs=1e-6)


def stacked(source):
    return torch.stack([source[i] for i in range(len(source))])


def test_copies_are_seen_as_their_assembled_atoms(generator):
    """Several molecules, B-factors and copies, tilted and shifted, some beyond the field: the same to rounding."""
    molecules = [molecule(generator, 12, b=20.0), molecule(generator, 5, b=70.0)]
    specimen = place_randomly(molecules, [3, 7], (60.0, 60.0, 40.0), gap=0.0, generator=generator)
    origin = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    whole = specimen.replace(molecules=(assemble(specimen),), poses=(origin,), names=(), kinds=())
    shift = torch.tensor([3.3, -1.2], dtype=torch.float64)
    how = {"axis_angle": 31.0, "shift": shift, "dtype": torch.float64, "width": 12}
    one, two = (tilted_slices(x, -35.0, (45, 52), 1.0, 4.0, **how) for x in (specimen, whole))
    assert len(one) == len(two)
    values = stacked(two)
    torch.testing.assert_close(stacked(one), values, rtol=0, atol=1e-8 * float(values.abs().max()))


def test_slices_in_order_are_those_asked_for_one_by_one(generator):
    specimen = place_randomly([molecule(generator)], [4], (40.0, 40.0, 40.0), gap=0.0, generator=generator)
    source = tilted_slices(specimen, 20.0, (50, 51), 1.0, 3.0, dtype=torch.float64)
    ordered = torch.stack(list(source.in_order()))
    torch.testing.assert_close(ordered, stacked(source), rtol=0, atol=1e-12 * float(ordered.abs().max()))


def test_large_molecules_are_cut_into_bodies_that_hold_every_atom(generator):
    """A line of atoms 1500 Å long, in two copies: seen as if it were not cut."""
    places = torch.rand(400, 3, generator=generator, dtype=torch.float64) * torch.tensor([1500.0, 40.0, 90.0]) - 20
    line = Atoms(places, torch.full((400,), 6), torch.full((400,), 30.0, dtype=torch.float64)).centred()
    poses = Poses(random_rotations(2, generator), torch.tensor([[0.0, 3.0, 0.0], [10.0, 0.0, -5.0]]).double())
    cut, placed = bodies([line], [poses])
    assert len(cut) > 5
    assert sum(map(len, cut)) == 400
    found = torch.cat([assemble(Specimen((a,), (p,), (9.0,) * 3)).positions for a, p in zip(cut, placed, strict=True)])
    expected = assemble(Specimen((line,), (poses,), (9.0,) * 3)).positions
    order, same = (torch.argsort(x[:, 0]) for x in (found, expected))
    torch.testing.assert_close(found[order], expected[same], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_atoms_beyond_the_field_are_left_out(dtype):
    near, far = one_atom(), one_atom().moved(shift=torch.tensor([60.0, 0.0, 0.0]))
    both = tilted_slices(alone(concatenate([near, far])), 0.0, (40, 41), 1.0, 2.0, dtype=dtype)
    only = tilted_slices(alone(near), 0.0, (40, 41), 1.0, 2.0, dtype=dtype)
    assert both[0].dtype == dtype
    torch.testing.assert_close(projected(both), projected(only))


def test_a_field_without_atoms_is_vacuum():
    source = tilted_slices(alone(one_atom(), (90.0, 0.0, 0.0)), 0.0, (20, 21), 1.0, 2.0)
    assert len(source) == 1
    assert (source[0] == 0).all()


@pytest.mark.parametrize("angle", [0.0, 45.0, -60.0])
def test_ice_is_a_slab(angle):
    """Far from the atoms the projected potential is inner potential times thickness over cos(tilt)."""
    ice = Ice(thickness=800.0)
    source = tilted_slices(alone(one_atom(), ice=ice), angle, (64, 63), 1.0, 4.0, dtype=torch.float64)
    wanted = ICE_INNER_POTENTIAL * 800.0 / math.cos(math.radians(angle))
    difference = forward(one_atom()) - ICE_INNER_POTENTIAL * 19.86  # sulphur displaces 19.86 Å^3
    total = float(projected(source).mean()) - difference / (64 * 63)
    assert total == pytest.approx(wanted, rel=1e-7)
    assert float(projected(source)[0, 0]) == pytest.approx(wanted, rel=1e-4)


def test_gradients_pass_the_tilt(generator):
    """Angle, axis angle, shift, ice thickness, and the poses themselves."""
    weights = torch.randn(48, 47, generator=generator, dtype=torch.float64)
    atoms = molecule(generator, 5, 3.0)
    rotation = tilt_rotation(10.0, 20.0)

    def score(angle, axis, shift, thickness, place):
        specimen = Specimen((atoms,), (Poses(rotation[None], place),), (30.0, 30.0, 30.0), Ice(thickness))
        source = tilted_slices(
            specimen, angle, (48, 47), 0.9, 3.0, axis_angle=axis, shift=shift, width=14, dtype=torch.float64
        )
        return (projected(source) * weights).sum() + 1e-3 * (source[0] * weights).sum()

    given = [torch.tensor(v, dtype=torch.float64) for v in (25.0, -80.0, [1.2, 0.7], 300.0, [[2.0, 1.0, -3.0]])]
    gradients = torch.autograd.grad(score(*(v.requires_grad_() for v in given)), given)
    for i, (value, gradient) in enumerate(zip(given, gradients, strict=True)):
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (score(*given[:i], value + s * 1e-4 * direction, *given[i + 1 :]) for s in (1, -1))
        assert float((gradient * direction).sum()) == pytest.approx(float(up - down) / 2e-4, rel=1e-5)


# the ground truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 26, 24), (21, 25, 27)])
@pytest.mark.parametrize("ice", [None, Ice(300.0)])
def test_integral_of_the_volume(shape, ice, generator):
    """sum of K f(0), less the potential of the displaced ice, in V·Å^3."""
    atoms = molecule(generator, 10, 2.0)
    volume = potential_volume(alone(atoms, ice=ice), shape, 1.2, dtype=torch.float64)
    assert tuple(volume.values.shape) == shape
    wanted = forward(atoms)
    if ice:
        displaced = {6: 16.44, 7: 2.49, 8: 9.13, 16: 19.86}
        wanted -= ICE_INNER_POTENTIAL * sum(displaced[z] for z in atoms.numbers.tolist())
    assert float(volume.values.sum()) * 1.2**3 == pytest.approx(wanted, rel=1e-3, abs=1e-3 * forward(atoms))


@pytest.mark.parametrize("shape", [(24, 26, 28), (25, 23, 27)])
def test_an_atom_stands_in_the_volume_where_it_should(shape):
    place = (3.1, -2.2, 4.3)  # (x, y, z) [Å]
    values = potential_volume(alone(one_atom(), place), shape, 1.2, dtype=torch.float64).values
    x, y = centre_of_mass(values.sum(0), 1.2)
    z, _ = centre_of_mass(values.sum(1).T, 1.2)
    assert (x, y, z) == pytest.approx(place, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 22, 24), (21, 23, 19)])
def test_volume_equals_direct_fourier_synthesis(shape, dtype, generator):
    """Every coefficient up to the Nyquist frequency of each axis, to 3 % of the transform's own size, 1 % over all."""
    voxel = 1.5
    atoms = molecule(generator, 8, 2.5, b=30.0)
    got = potential_volume(alone(atoms), shape, voxel, dtype=dtype).values.double()
    kz, ky, kx = torch.meshgrid(*(frequencies(n, voxel, dtype=torch.float64) for n in shape), indexing="ij")
    centres = [centre_phases(n, dtype=torch.float64) for n in shape]
    spectrum = torch.fft.fftn(got) * voxel**3 * centres[0][:, None, None] * centres[1][:, None] * centres[2]
    k2 = kx**2 + ky**2 + kz**2
    wanted = torch.zeros(shape, dtype=torch.complex128)
    for (x, y, z), number, b in zip(atoms.positions.tolist(), atoms.numbers, atoms.b_factors.tolist(), strict=True):
        factor = POTENTIAL_PER_FORM_FACTOR * scattering_factor(number[None], k2)[0] * torch.exp(-b * k2 / 4)
        wanted += factor * torch.exp(-2j * math.pi * (kx * x + ky * y + kz * z))
    unpaired = [
        2 * k.abs() * voxel < 1 - 1e-9 for k in (kz, ky, kx)
    ]  # the Nyquist frequency of an even axis is left out
    keep = unpaired[0] & unpaired[1] & unpaired[2]
    assert ((got_minus := (spectrum - wanted)[keep]).norm() / wanted[keep].norm()) < 1e-2
    shells = (k2[keep].sqrt() * voxel * 8).long()  # eighths of 1 / voxel
    for shell in shells.unique():
        here = shells == shell
        assert got_minus[here].norm() < 0.03 * wanted[keep][here].norm(), f"shell {int(shell)}"


def test_molecules_are_placed_inside_the_ice(generator):
    with pytest.raises(ValueError, match="does not lie inside ice 20 Å thick"):
        place_randomly([cluster_of_two()], [1], (60.0, 60.0, 30.0), ice=Ice(20.0), generator=generator)


def cluster_of_two() -> Atoms:
    return Atoms([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [6, 8])


def test_gradient_in_the_inner_potential_of_the_ice():
    """Through the solvent that atoms displace, not only through the column of ice."""
    pose = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))

    def contrast(potential):
        specimen = Specimen((cluster_of_two(),), (pose,), (20.0, 20.0, 20.0), Ice(30.0, potential))
        slices = tilted_slices(specimen, 20.0, (24, 24), 1.0, 4.0, dtype=torch.float64)
        return sum(slices[i] for i in range(len(slices))).var()

    value = torch.tensor(4.5, dtype=torch.float64, requires_grad=True)
    contrast(value).backward()
    difference = (contrast(4.5 + 1e-4) - contrast(4.5 - 1e-4)) / 2e-4
    assert abs(float(value.grad) - float(difference)) <= 1e-4 * abs(float(difference))
