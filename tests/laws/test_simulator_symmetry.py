"""The microscope has no preferred place or direction: move, turn or mirror the specimen, and the image follows."""

import pytest
import torch

from cryosim.core.rotation import rotation_z
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice, projection
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.potential import potential_slices

SCATTERING = {"multislice": multislice, "projection": projection}
PIXEL, THICKNESS, N_SLICES = 0.8, 3.0, 7
OPTICS = Optics(defocus=2000.0, spherical_aberration=2.7, amplitude_contrast=0.07)


@pytest.fixture(params=SCATTERING)
def scattering(request):
    return SCATTERING[request.param]


@pytest.fixture
def atoms(generator):
    positions = 3 * torch.randn(10, 3, generator=generator, dtype=torch.float64).clamp(-2, 2)
    b_factors = 10 + 40 * torch.rand(10, generator=generator, dtype=torch.float64)
    return Atoms(positions, torch.tensor([6, 7, 8, 16, 15] * 2), b_factors)


def seen(atoms, scattering, shape, optics=OPTICS, pixel_size=PIXEL):
    slices = potential_slices(atoms, shape, pixel_size, THICKNESS, N_SLICES, width=14)
    return image(scattering(slices, optics), optics, pixel_size)


def mirrored_x(picture):
    """Sample n // 2 stays; of an even size the first column has no partner and is left where it is."""
    n = picture.shape[-1]
    return picture.flip(-1).roll(1 - n % 2, -1)


def assert_same(one, two):
    """To 1e-5: the unpaired frequency of an even size has no direction to be turned to."""
    assert (one - 1).abs().max() > 1e-2, "nothing to see"
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(45, 48), (48, 45)])
@pytest.mark.parametrize("steps", [(3, -5), (-20, 22)])
def test_moving_the_specimen_moves_the_image(scattering, atoms, shape, steps):
    """Also across the border: the field is periodic."""
    moved = atoms.positions + PIXEL * torch.tensor([steps[1], steps[0], 0.0], dtype=torch.float64)
    extent = PIXEL * torch.tensor([shape[1], shape[0]], dtype=torch.float64)
    moved[:, :2] -= extent * torch.round(moved[:, :2] / extent)
    assert_same(
        seen(atoms.replace(positions=moved), scattering, shape), seen(atoms, scattering, shape).roll(steps, (0, 1))
    )


@pytest.mark.parametrize("n", [45, 48])
@pytest.mark.parametrize("astigmatism", [0.0, 400.0])
def test_turning_the_specimen_turns_the_image(scattering, atoms, n, astigmatism):
    """By a quarter turn, x towards y; the lens turns along with its astigmatism."""
    optics = OPTICS.replace(astigmatism=astigmatism, astigmatism_angle=20.0)
    still = seen(atoms, scattering, (n, n), optics)
    turned = seen(atoms.moved(rotation_z(90.0)), scattering, (n, n), optics.replace(astigmatism_angle=110.0))
    assert_same(turned, mirrored_x(still.mT))


@pytest.mark.parametrize("shape", [(45, 48), (48, 45)])
def test_mirroring_the_specimen_mirrors_the_image(scattering, atoms, shape):
    mirror = atoms.replace(positions=atoms.positions * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    assert_same(seen(mirror, scattering, shape), mirrored_x(seen(atoms, scattering, shape)))


def test_turning_the_specimen_over_is_seen_by_multislice_alone(atoms):
    """z -> -z leaves the projection alone, and multislice not: the beam has a direction."""
    over = atoms.replace(positions=atoms.positions * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert_same(seen(over, projection, (45, 48)), seen(atoms, projection, (45, 48)))
    difference = seen(over, multislice, (45, 48)) - seen(atoms, multislice, (45, 48))
    assert difference.abs().max() > 3e-4


@pytest.mark.parametrize("angle", [0.0, 30.0])
def test_independent_specimens_of_a_weak_kind_add(scattering, atoms, angle):
    """Far below one radian the contrast of two objects is the sum of theirs, to second order in the potential."""
    weak = atoms.replace(occupancies=torch.full((10,), 1e-3, dtype=torch.float64))
    first, second = weak.index(slice(0, 5)).moved(rotation_z(angle)), weak.index(slice(5, 10)).moved(rotation_z(angle))
    both = Atoms(
        *(
            torch.cat([getattr(first, f), getattr(second, f)])
            for f in ("positions", "numbers", "b_factors", "occupancies")
        )
    )
    together, one, two = (seen(a, scattering, (45, 48)) - 1 for a in (both, first, second))
    assert (together - one - two).norm() < 1e-3 * together.norm()
