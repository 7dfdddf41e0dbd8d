"""The potential of atoms against the structure-factor sum written out, term by term.

V^(k) = K sum_a w_a f_a(k) exp(-B_a k^2 / 4) exp(-2 pi i k.r_a)        inside two thirds of the Nyquist frequency
"""

import math
import warnings

import pytest
import torch

from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR
from cryosim.core.fourier import SamplingWarning, band_limit, centre_phases, frequencies
from cryosim.specimen.atoms import Atoms, concatenate
from cryosim.specimen.potential import Slices, potential_slices
from cryosim.specimen.scattering_factors import scattering_factor

ELEMENTS = [1, 6, 7, 8, 11, 12, 15, 16, 19, 20, 25, 26, 30]  # H C N O Na Mg P S K Ca Mn Fe Zn
TABLES = ["lobato", "kirkland", "peng"]
SHAPES = [(48, 47), (63, 48), (40, 31)]  # odd and even


def random_atoms(
    shape, pixel_size, depth, generator, numbers=tuple(ELEMENTS) * 3, b_factors="varied", dtype=torch.float64
):
    """Atoms off the grid, anywhere in the box, with occupancies from 0.5 to 1."""
    n = len(numbers)
    half = 0.5 * torch.tensor([shape[1] * pixel_size, shape[0] * pixel_size, depth], dtype=torch.float64)
    positions = (2 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 1) * half
    if b_factors == "varied":
        b = 80 * torch.rand(n, generator=generator, dtype=torch.float64)
    else:
        b = torch.full((n,), float(b_factors), dtype=torch.float64)
    occupancies = 0.5 + 0.5 * torch.rand(n, generator=generator, dtype=torch.float64)
    return Atoms(positions, torch.tensor(numbers), b, occupancies).to(dtype=dtype)


def exact_transform(atoms, shape, pixel_size, table="lobato"):
    """The sum above (y, x) [V·Å·Å^2], origin at the box centre."""
    ky = frequencies(shape[0], pixel_size, dtype=torch.float64)[:, None]
    kx = frequencies(shape[1], pixel_size, dtype=torch.float64)[None, :]
    k2 = kx**2 + ky**2
    total = torch.zeros(shape, dtype=torch.complex128)
    for (x, y, _), number, b, weight in zip(
        atoms.positions.tolist(), atoms.numbers, atoms.b_factors.tolist(), atoms.occupancies.tolist(), strict=True
    ):
        factor = POTENTIAL_PER_FORM_FACTOR * scattering_factor(number[None], k2, table)[0]
        total += weight * factor * torch.exp(-b * k2 / 4) * torch.exp(-2j * math.pi * (kx * x + ky * y))
    return total


def transform(image, pixel_size):
    ny, nx = image.shape
    centre = centre_phases(ny, dtype=torch.float64)[:, None] * centre_phases(nx, dtype=torch.float64)
    return torch.fft.fft2(image.double()) * pixel_size**2 * centre


def stacked(source):
    return torch.stack([source[i] for i in range(len(source))])


def errors(atoms, shape, pixel_size, table="lobato", **choices):
    """Relative error inside the band (L2) and of the mean potential."""
    values = stacked(potential_slices(atoms, shape, pixel_size, 2.0, 6, table, **choices)).sum(0)
    inside = band_limit(shape, dtype=torch.float64)
    wanted = exact_transform(atoms, shape, pixel_size, table) * inside
    got = transform(values, pixel_size)
    scale = wanted[0, 0].abs()
    assert (got * (1 - inside)).abs().max() < 1e-6 * scale, "something stands outside the band"
    return float((got * inside - wanted).norm() / wanted.norm()), float((got - wanted)[0, 0].abs() / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("b_factors", [0, 20, "varied"])
@pytest.mark.parametrize("pixel_size", [0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_structure_factor_sum(shape, pixel_size, b_factors, table, dtype, generator):
    atoms = random_atoms(shape, pixel_size, 12.0, generator, b_factors=b_factors, dtype=dtype)
    inside, mean = errors(atoms, shape, pixel_size, table)
    assert inside < (4e-6 if dtype == torch.float32 else 2e-6)
    assert mean < 1e-6


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("width", "tolerance"), [(6, 6e-5), (7, 1e-5), (8, 2e-6), (12, 1e-9), (14, 1e-10)])
def test_wider_bells_are_as_exact_as_promised(width, tolerance, table, generator):
    atoms = random_atoms((48, 47), 0.5, 12.0, generator)
    inside, mean = errors(atoms, (48, 47), 0.5, table, width=width)
    assert inside < tolerance
    assert mean < tolerance


@pytest.mark.parametrize("table", TABLES)
def test_every_element_of_a_ribosome_entry(table, generator):
    numbers = (6, 7, 8, 15, 16, 12, 30) * 20
    inside, mean = errors(random_atoms((81, 70), 1.0, 12.0, generator, numbers), (81, 70), 1.0, table)
    assert inside < 2e-6
    assert mean < 1e-6


@pytest.mark.parametrize("n_slices", [1, 2, 3, 8, 9])
def test_the_projection_does_not_know_the_slices(n_slices, generator):
    atoms = random_atoms((31, 40), 0.7, 10.0, generator)
    one = potential_slices(atoms, (31, 40), 0.7, 30.0, 1)[0]
    many = stacked(potential_slices(atoms, (31, 40), 0.7, 12.0 / n_slices, n_slices)).sum(0)
    torch.testing.assert_close(many, one, rtol=0, atol=1e-11 * float(one.abs().max()))


@pytest.mark.parametrize("n_slices", [6, 7])
@pytest.mark.parametrize("height", [-5.9, -1.3, 0.0, 0.7, 3.99])
def test_the_first_moment_along_the_beam_is_the_height(n_slices, height):
    thickness = 2.0
    atom = Atoms(torch.tensor([[0.3, -0.4, height]], dtype=torch.float64), torch.tensor([8]))
    weights = stacked(potential_slices(atom, (16, 17), 0.5, thickness, n_slices)).sum((1, 2))
    heights = (torch.arange(n_slices, dtype=torch.float64) - n_slices // 2) * thickness
    assert float((weights @ heights) / weights.sum()) == pytest.approx(height, abs=1e-10)


@pytest.mark.parametrize("shape", [(24, 24), (25, 23)])
def test_an_atom_on_a_sample_is_symmetric_about_it(shape):
    atom = Atoms(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([6]))
    image = potential_slices(atom, shape, 0.8, 2.0, 1)[0]
    y, x = shape[0] // 2, shape[1] // 2
    assert image[y, x] == image.max()
    tolerance = 1e-6 * float(image.max())
    for step in range(1, 6):
        assert float(image[y, x + step]) == pytest.approx(float(image[y, x - step]), abs=tolerance)
        assert float(image[y + step, x]) == pytest.approx(float(image[y - step, x]), abs=tolerance)


def test_potential_is_linear_in_the_atoms(generator):
    a, b = (random_atoms((32, 33), 0.6, 8.0, generator, (6, 8, 16)) for _ in range(2))
    both, first, second = (
        stacked(potential_slices(x, (32, 33), 0.6, 2.0, 5, width=14)) for x in (concatenate([a, b]), a, b)
    )
    torch.testing.assert_close(both, first + second, rtol=0, atol=1e-8 * float(both.abs().max()))
    halved = stacked(potential_slices(a.replace(occupancies=a.occupancies / 2), (32, 33), 0.6, 2.0, 5, width=14))
    torch.testing.assert_close(halved, first / 2, rtol=0, atol=1e-12 * float(first.abs().max()))


def test_slices_are_built_only_when_asked_for(generator, monkeypatch):
    from cryosim.specimen.potential import AtomSlices

    built = []
    spread = AtomSlices._spread_copies
    monkeypatch.setattr(AtomSlices, "_spread_copies", lambda *given: built.append(1) or spread(*given))
    atoms = random_atoms((32, 31), 0.6, 12.0, generator)
    source = potential_slices(atoms, (32, 31), 0.6, 2.0, 7)
    assert not built
    backwards = [source[i] for i in reversed(range(7))][::-1]
    assert built
    fresh = potential_slices(atoms, (32, 31), 0.6, 2.0, 7)[3]
    assert torch.equal(fresh, backwards[3])
    assert torch.equal(source[3], backwards[3])
    assert torch.equal(source[-1], backwards[6])


def test_an_empty_slice_is_empty():
    atom = Atoms(torch.tensor([[0.0, 0.0, 4.0]], dtype=torch.float64), torch.tensor([6]))
    source = potential_slices(atom, (16, 16), 0.6, 2.0, 7)
    assert (stacked(source).abs().sum((1, 2)) > 0).tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize("index", [7, -8])
def test_no_slice_beyond_the_last(index, generator):
    with pytest.raises(IndexError):
        potential_slices(random_atoms((32, 31), 0.6, 8.0, generator), (32, 31), 0.6, 2.0, 7)[index]


# gradients ------------------------------------------------------------------------------------------------------------


def projected(atoms, weights, pixel_size=0.5, thickness=2.0):
    """A number that depends on every slice."""
    source = potential_slices(atoms, tuple(weights.shape[1:]), pixel_size, thickness, len(weights), width=14)
    return (stacked(source) * weights).sum()


@pytest.fixture
def weights(generator):
    return torch.randn(5, 25, 24, generator=generator, dtype=torch.float64)


def check_slope(function, value, step, tolerance=1e-4):
    """Autograd against central differences, entry by entry, relative to the largest."""
    value = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(value), value)
    value = value.detach()
    slopes = torch.zeros_like(value)
    for i in range(value.numel()):
        shift = torch.zeros(value.numel(), dtype=value.dtype)
        shift[i] = step
        shift = shift.reshape(value.shape)
        slopes.view(-1)[i] = (function(value + shift) - function(value - shift)) / (2 * step)
    assert (gradient - slopes).abs().max() < tolerance * slopes.abs().max()


@pytest.mark.parametrize("b_factors", [0, "varied"])
def test_gradient_in_the_positions(b_factors, weights, generator):
    atoms = random_atoms((22, 21), 0.5, 7.0, generator, (1, 6, 8, 16), b_factors)
    check_slope(lambda p: projected(atoms.replace(positions=p), weights), atoms.positions, 1e-4)


@pytest.mark.parametrize("b_factors", [0, 20, "varied"])
@pytest.mark.parametrize("numbers", [(6,), (1, 6, 8, 16)])
def test_gradient_in_the_b_factors(numbers, b_factors, weights, generator):
    """Also where all are equal, as at the start of a refinement."""
    atoms = random_atoms((22, 21), 0.5, 7.0, generator, numbers, b_factors)
    check_slope(lambda b: projected(atoms.replace(b_factors=b), weights), atoms.b_factors, 1e-2)


def test_gradient_in_the_occupancies(weights, generator):
    atoms = random_atoms((22, 21), 0.5, 7.0, generator, (1, 6, 8, 16))
    check_slope(lambda w: projected(atoms.replace(occupancies=w), weights), atoms.occupancies, 1e-3)


def test_gradient_in_the_pixel_size(weights, generator):
    atoms = random_atoms((22, 21), 0.5, 7.0, generator, (1, 6, 8, 16))
    check_slope(lambda d: projected(atoms, weights, pixel_size=d), torch.tensor(0.5, dtype=torch.float64), 1e-4)


def test_gradient_in_the_thickness(weights, generator):
    atoms = random_atoms((22, 21), 0.5, 7.0, generator, (1, 6, 8, 16))
    check_slope(lambda d: projected(atoms, weights, thickness=d), torch.tensor(2.03, dtype=torch.float64), 1e-4)


# errors ---------------------------------------------------------------------------------------------------------------

BOX = {"shape": (32, 31), "pixel_size": 0.5, "thickness": 2.0, "n_slices": 5}


def one_atom(x=0.0, y=0.0, z=0.0, number=6):
    return Atoms(torch.tensor([[x, y, z]], dtype=torch.float64), torch.tensor([number]))


@pytest.mark.parametrize("place", [{"x": 9.0}, {"y": -9.0}, {"z": 7.0}])
def test_atom_outside_the_box(place):
    with pytest.raises(ValueError, match="outside the box"):
        potential_slices(one_atom(**place), **BOX)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_positions_must_be_finite(value):
    with pytest.raises(ValueError, match="finite"):
        potential_slices(one_atom(x=value), **BOX)


def test_no_atoms():
    with pytest.raises(ValueError, match="no atoms"):
        potential_slices(Atoms(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), **BOX)


def test_unknown_element_and_table():
    with pytest.raises(ValueError, match="no element"):
        potential_slices(one_atom(number=110), **BOX)
    with pytest.raises(ValueError, match="parametrization"):
        potential_slices(one_atom(), **BOX, parametrization="muller")


@pytest.mark.parametrize("bad", [{"n_slices": 0}, {"shape": (6, 31)}, {"pixel_size": 0.0}, {"thickness": -1.0}])
def test_sizes_must_be_positive(bad):
    with pytest.raises(ValueError, match="expected"):
        potential_slices(one_atom(), **(BOX | bad))


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": torch.zeros(4, 2)},
        {"numbers": torch.ones(3, dtype=torch.long)},
        {"b_factors": torch.zeros(5)},
        {"occupancies": torch.zeros(1)},
    ],
)
def test_atoms_of_one_number(fields):
    given = {"positions": torch.zeros(4, 3), "numbers": torch.ones(4, dtype=torch.long)} | fields
    with pytest.raises(ValueError, match="expected shape"):
        Atoms(**given)


# the medium -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slices", [1, 5])
def test_atoms_displace_the_medium(n_slices, generator):
    """The total of the difference: K f(0) of every atom, less the medium's potential times the volume it gave way."""
    volumes = {1: 5.15, 6: 16.44, 7: 2.49, 8: 9.13, 16: 19.86}  # [Å^3], Fraser, MacRae & Suzuki 1978
    inner_potential = 4.53  # [V]
    numbers = tuple(volumes) * 2
    atoms = random_atoms((40, 41), 0.6, 8.0, generator, numbers)
    source = potential_slices(atoms, (40, 41), 0.6, 10.0 / n_slices, n_slices, solvent=inner_potential)
    forward = POTENTIAL_PER_FORM_FACTOR * scattering_factor(atoms.numbers, torch.zeros((), dtype=torch.float64))
    displaced = inner_potential * torch.tensor([volumes[z] for z in numbers], dtype=torch.float64)
    wanted = float((atoms.occupancies * (forward - displaced)).sum())
    assert float(stacked(source).sum() * 0.6**2) == pytest.approx(wanted, rel=1e-6)


def test_slices_in_memory_are_a_source_too(generator):
    values = torch.randn(2, 5, 7, 6, generator=generator)
    slices = Slices(values, 1.0, 2.0)
    assert len(slices) == 5
    assert torch.equal(slices[3], values[:, 3])


@pytest.mark.parametrize("pixel", [1 / 3, 0.5, 1.0])
def test_one_atom_with_a_huge_b_factor_does_not_spoil_the_others(pixel):
    """Whatever the spread of the B-factors, each atom has its own: here the best ordered of 0, 37 and 999 Å^2."""
    atoms = Atoms(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([6]), torch.zeros(1, dtype=torch.float64))
    far = torch.tensor([[-4.0, 3.0, 0.0], [4.0, -3.0, 0.0]], dtype=torch.float64)
    crowd = Atoms(
        torch.cat([atoms.positions, far]),
        torch.full((3,), 6),
        torch.tensor([0.0, 37.0, 999.0], dtype=torch.float64),
        torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
    )
    alone, among = (potential_slices(a, (48, 48), pixel, 2.0, 1)[0] for a in (atoms, crowd))
    assert (alone - among).norm() <= 3e-6 * alone.norm()


def test_slices_thicker_than_the_specimen_are_warned_of():
    atoms = Atoms(torch.tensor([[0.0, 0.0, -3.0], [1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor([6, 8]))
    with pytest.warns(SamplingWarning, match="6 Å that the atoms reach"):
        potential_slices(atoms, (24, 24), 0.5, 8.0, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        potential_slices(atoms, (24, 24), 0.5, 2.0, 7)
        potential_slices(atoms, (24, 24), 0.5, 8.0, 1)  # a projection, and meant to be one
