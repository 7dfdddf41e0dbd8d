"""Vitreous water: the molecular model, its spectrum, the random field of it, and the explicit molecules."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from scipy.spatial import KDTree

import cryosim
from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR
from cryosim.core.fourier import band_limit, squared_frequencies
from cryosim.core.inelastic import ICE_INNER_POTENTIAL
from cryosim.io import read_atoms
from cryosim.specimen import vitreous_water as model
from cryosim.specimen import water
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.potential import potential_slices
from cryosim.specimen.scattering_factors import scattering_factor
from cryosim.specimen.water import WaterField, outside, power_spectrum, structure_factor, water_molecules

FIELD = {"shape": (48, 45), "pixel_size": 1.25, "thickness": 2.0, "seed": 3}


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def shells(shape, pixel_size, edges):
    """Which of the half-plane frequencies (shell, y, x) lie between neighbouring edges [1/Å], column 0 left out."""
    q = squared_frequencies(shape, pixel_size, half=True, dtype=torch.float64).sqrt()
    q[:, 0] = -1
    return q, [(q >= low) & (q < high) for low, high in itertools.pairwise(edges)]


def transform(images, pixel_size):
    """Fourier transform (..., y, x // 2 + 1) per root of the area, so that its square is the power spectrum."""
    ny, nx = images.shape[-2:]
    return torch.fft.rfft2(images.double()) * pixel_size / math.sqrt(ny * nx)


# ---------------------------------------------------------------------------------------------- the molecular model


def test_the_perfect_tetrahedral_crystal_has_two_bonds_a_molecule():
    """Stillinger & Weber 1985: no strain, no second neighbours in reach, so E / N = -2 eps at r = 2^(1/6) sigma."""
    cell = 4 / math.sqrt(3) * 2 ** (1 / 6) * model.SIGMA
    corners = torch.tensor([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]], dtype=torch.float64) / 4
    basis = torch.cat([corners, corners + 0.25])
    cells = torch.cartesian_prod(*[torch.arange(3, dtype=torch.float64)] * 3)
    positions = cell * (cells[:, None] + basis).flatten(0, 1)
    energy, forces = model.energy_and_forces(positions, model.neighbours(positions, 3 * cell), 3 * cell)
    assert float(energy) / len(positions) == pytest.approx(-2 * model.EPSILON, rel=1e-5)
    assert forces.abs().max() < 1e-5


def test_energy_is_the_sum_over_pairs_and_angles_and_forces_are_its_slope():
    edge = 14.0
    grid = torch.cartesian_prod(*[torch.arange(4, dtype=torch.float64)] * 3) * edge / 4
    positions = (grid + torch.rand(64, 3, generator=generator(), dtype=torch.float64)).requires_grad_()
    table = model.neighbours(positions.detach(), edge)
    energy, forces = model.energy_and_forces(positions, table, edge)
    (slope,) = torch.autograd.grad(energy, positions)
    assert torch.allclose(forces, -slope, atol=1e-12)

    apart = positions.detach()[None] - positions.detach()[:, None]
    apart = apart - edge * torch.round(apart / edge)
    r = apart.norm(dim=2) / model.SIGMA
    total = 0.0
    for i in range(64):
        near = [j for j in range(64) if j != i and r[i, j] < model.REACH]
        for a, j in enumerate(near):
            gap = 1 / (r[i, j] - model.REACH)
            total += 0.5 * model.A * (model.B * r[i, j] ** -4 - 1) * torch.exp(gap)
            for k in near[:a]:
                cosine = apart[i, j] @ apart[i, k] / (apart[i, j].norm() * apart[i, k].norm())
                other = 1 / (r[i, k] - model.REACH)
                total += model.LAMBDA * (cosine + 1 / 3) ** 2 * torch.exp(model.GAMMA * (gap + other))
    assert float(energy.detach()) == pytest.approx(float(total) * model.EPSILON, rel=1e-9)


def test_the_table_is_the_structure_of_the_box():
    """The box kept is one of those that S(k) is the mean of."""
    positions = water._box()
    edge = (len(positions) / water.number_density()) ** (1 / 3)
    assert len(positions) >= 1728 and positions.min() >= 0 and positions.max() < 1
    index = torch.randint(-22, 23, (1500, 3), generator=generator()).double()
    k = index.norm(dim=1) / edge
    turns = 2 * math.pi * index @ positions.T
    s = (torch.cos(turns).sum(1) ** 2 + torch.sin(turns).sum(1) ** 2) / len(positions)
    for low, high in ((0.08, 0.2), (0.24, 0.3), (0.32, 0.42)):
        shell = (k > low) & (k < high)
        expected = structure_factor(k[shell])
        error = 1.5 * float(expected.square().sum().sqrt() / expected.sum())  # of a mean of exponential variates
        assert float(s[shell].mean()) == pytest.approx(float(expected.mean()), rel=0.05 + 2 * error)


# -------------------------------------------------------------------------------------------------- means and spectra


def test_number_density():
    assert water.number_density() == pytest.approx(0.03109, abs=5e-6)
    assert water.number_density(1.86) == pytest.approx(2 * water.number_density(0.93))


@pytest.mark.parametrize("table", ["lobato", "kirkland", "peng"])
def test_inner_potential_is_that_of_ice(table):
    """Vulović et al. 2013: 4.5301 V; the three tables differ by 1.5 % at f(0)."""
    assert water.inner_potential(0.93, table) == pytest.approx(ICE_INNER_POTENTIAL, rel=0.02)


def test_structure_factor_lies_between_order_and_chance():
    k = torch.linspace(0, 3, 601, dtype=torch.float64)
    s = structure_factor(k)
    assert s.dtype == torch.float64 and structure_factor(k.float()).dtype == torch.float32
    assert (s > 0).all() and float(s[0]) < 0.1  # hardly compressible
    assert ((s[k > 2.01] - 1).abs() == 0).all() and float((s[(k > 1.6) & (k < 2)] - 1).abs().max()) < 0.1
    assert s.argmax() == s[(k > 0.4)].argmax() + int(
        (k <= 0.4).sum()
    )  # as in water, the second ring of S is the higher


def test_rings_are_those_that_electrons_show():
    """Dubochet et al. 1988, doi:10.1017/S0033583500004297: diffraction rings of vitreous water at 3.70 and 2.14 Å."""
    k = torch.arange(0.2, 0.6, 5e-4, dtype=torch.float64)
    p, s = power_spectrum(k), structure_factor(k)
    for spacing, low, high in ((3.70, 0.2, 0.35), (2.14, 0.4, 0.6)):
        some = (k > low) & (k < high)
        assert 1 / float(k[some][p[some].argmax()]) == pytest.approx(spacing, rel=0.04)
        # before the fall of the scattering factors is multiplied in, the rings lie a little farther out
        assert 1 / float(k[some][s[some].argmax()]) == pytest.approx(spacing, rel=0.06)


def test_spectrum_of_one_molecule_is_that_of_its_atoms():
    """<|F|^2> of a molecule turned at random, by turning it: the spectrum where S = 1."""
    k = torch.tensor([2.2], dtype=torch.float64)
    directions = torch.nn.functional.normalize(
        torch.randn(200000, 3, generator=generator(), dtype=torch.float64), dim=1
    )
    f_h, f_o = scattering_factor(torch.tensor([1, 8]), k**2)
    turns = 2 * math.pi * k * directions @ water._bonds().T
    amplitude = f_o + f_h * torch.polar(torch.ones_like(turns), turns).sum(1)
    expected = POTENTIAL_PER_FORM_FACTOR**2 * water.number_density() * amplitude.abs().square().mean()
    assert float(power_spectrum(k)) == pytest.approx(float(expected), rel=0.01)


def test_b_factor_and_density():
    k = torch.tensor([0.3], dtype=torch.float64)
    assert float(power_spectrum(k, b_factor=20.0) / power_spectrum(k)) == pytest.approx(math.exp(-10 * 0.09))
    assert float(power_spectrum(k, density=0.465) / power_spectrum(k)) == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------------- the random field


@pytest.mark.parametrize(
    ("shape", "pixel_size", "thickness"), [((64, 64), 1.0, 2.0), ((63, 61), 1.1, 8.0), ((60, 65), 1.0, 8.0)]
)
def test_a_deep_stack_has_the_projected_spectrum(shape, pixel_size, thickness):
    """P(q, kz = 0) times the depth, shell by shell, and on the column of real coefficients too."""
    n, power = round(400 / thickness), 0.0
    for seed in range(24):
        field = WaterField(shape, pixel_size, thickness, seed=seed)
        power = power + transform(sum(field.between(-5, n - 5)), pixel_size).abs().square() / 24
    q, rings = shells(shape, pixel_size, torch.linspace(0.03, 0.65 / (2 * pixel_size), 6).tolist())
    for ring in rings:
        expected = power_spectrum(q[ring]) * n * thickness
        assert float((power[ring] / expected).mean()) == pytest.approx(1, abs=0.1)
    some = torch.stack(rings).any(0)
    assert float((power[some] / (power_spectrum(q[some]) * n * thickness)).mean()) == pytest.approx(1, abs=0.03)
    ky = torch.fft.fftfreq(shape[0], pixel_size, dtype=torch.float64).abs()
    along = (ky > 0.03) & (ky < 0.65 / (2 * pixel_size))
    column = power[along, 0] / (power_spectrum(ky[along]) * n * thickness)
    assert float(column.mean()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("thickness", [2.0, 8.0])
def test_slices_are_correlated_as_those_of_one_field(thickness):
    """C_m(q) = integral of P(sqrt(q^2 + kz^2)) (t sinc(kz t))^2 cos(2 pi kz m t) over kz, by plain quadrature."""
    pixel_size, shape = 1.25, (48, 45)
    field = WaterField(shape, pixel_size, thickness, seed=8)
    slices = transform(torch.stack(list(field.between(0, 600))), pixel_size)
    q, rings = shells(shape, pixel_size, [0.05, 0.12, 0.19, 0.26])
    kz = torch.arange(-4, 4, 2e-3, dtype=torch.float64)
    for ring in rings:
        p = (
            power_spectrum(torch.sqrt(q[ring][:, None] ** 2 + kz**2)).mean(0)
            * (thickness * torch.sinc(kz * thickness)) ** 2
        )
        variance = float(p.sum() * 2e-3)
        for lag in (0, 1, 2, 3, 5):
            expected = float((p * torch.cos(2 * torch.pi * kz * lag * thickness)).sum() * 2e-3)
            pairs = slices[: len(slices) - lag].conj() * slices[lag:]
            assert float(pairs[:, ring].real.mean()) == pytest.approx(expected, abs=0.03 * variance)


def test_the_ring_shows_in_slices():
    field = WaterField((96, 96), 1.0, 8.0, seed=2)
    power = transform(sum(field.between(0, 200)), 1.0).abs().square()
    q, _ = shells((96, 96), 1.0, [0, 1])
    edges = torch.arange(0.05, 0.32, 0.015).tolist()
    means = torch.stack([power[(q >= a) & (q < b)].mean() for a, b in itertools.pairwise(edges)])
    assert edges[int(means.argmax())] + 0.0075 == pytest.approx(1 / 3.7, abs=0.02)


def test_slices_are_reproducible_and_need_no_order():
    field, again = WaterField(**FIELD), WaterField(**FIELD)
    late = field[7].clone()
    _ = field[-100], field[6], field[10**9]
    assert torch.equal(field[7], late) and torch.equal(again[7], late)
    assert torch.equal(again[-100], field[-100])
    assert all(torch.equal(a, field[i]) for i, a in zip(range(-2, 4), again.between(-2, 4), strict=True))


def test_other_seeds_and_far_slices_are_independent():
    field = WaterField(**FIELD)
    other = WaterField(**{**FIELD, "seed": 4})

    def correlation(pairs):
        a, b = (torch.stack(images) for images in zip(*pairs, strict=True))
        return float((a * b).mean() / (a.std() * b.std()))

    far = 2 * field.reach + 1
    assert abs(correlation([(field[i], other[i]) for i in range(20)])) < 0.03
    assert abs(correlation([(field[far * i], field[far * (i + 1)]) for i in range(20)])) < 0.03
    noises = {field._noise(j)[0, 0].item() for j in range(-500, 500)}
    assert len(noises) == 1000


def test_field_is_gaussian_of_mean_zero():
    field = WaterField((64, 64), 1.0, 8.0, seed=1)
    values = torch.stack([field[i] for i in range(0, 80, 4)])
    assert float(values.mean().abs()) < 0.02 * float(values.std())
    assert float((values / values.std()).pow(4).mean()) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("shape", [(48, 48), (47, 45)])
def test_nothing_beyond_the_band(shape):
    slice_ = WaterField(shape, 1.0, 4.0, seed=1, dtype=torch.float64)[0]
    beyond = band_limit(shape, half=True, dtype=torch.float64) == 0
    spectrum = torch.fft.rfft2(slice_).abs()
    assert slice_.shape == shape
    assert float(spectrum[beyond].max()) < 1e-10 * float(spectrum.max())


def test_precisions_hold_the_same_field():
    single, double = (WaterField(**FIELD, dtype=d) for d in (torch.float32, torch.float64))
    assert single[4].dtype == torch.float32 and double[4].dtype == torch.float64
    assert torch.allclose(single[4].double(), double[4], atol=1e-4 * float(double[4].std()))


@pytest.mark.parametrize("wrong", [{"pixel_size": 0.0}, {"thickness": -1.0}, {"density": 0.0}, {"shape": (0, 4)}])
def test_field_refuses_sizes_that_are_not(wrong):
    with pytest.raises(ValueError, match="expected"):
        WaterField(**{**FIELD, **wrong})


# ------------------------------------------------------------------------------------------------------ the molecules


def test_molecules_are_rigid_and_dense_and_turned_at_random():
    size = (90.0, 70.0, 130.0)
    atoms = water_molecules(size, generator=generator(), b_factor=3.0)
    n = len(atoms) // 3
    assert n / math.prod(size) == pytest.approx(water.number_density(), rel=0.005)
    oxygen, first, second = atoms.positions.reshape(n, 3, 3).unbind(1)
    assert atoms.numbers[:6].tolist() == [8, 1, 1, 8, 1, 1] and (atoms.b_factors == 3).all()
    assert (oxygen.abs() <= torch.tensor(size) / 2).all()
    for hydrogen in (first, second):
        assert torch.allclose((hydrogen - oxygen).norm(dim=1), torch.full((n,), 0.9572, dtype=torch.float64))
    cosine = ((first - oxygen) * (second - oxygen)).sum(1) / 0.9572**2
    assert torch.allclose(cosine, torch.full_like(cosine, math.cos(math.radians(104.52))))
    dipole = (first + second - 2 * oxygen) / (first + second - 2 * oxygen).norm(dim=1, keepdim=True)
    assert torch.allclose(dipole.T @ dipole / n, torch.eye(3, dtype=torch.float64) / 3, atol=0.01)
    assert float(dipole.mean(0).abs().max()) < 0.02
    profile = torch.histc(oxygen[:, 2], 13, -65, 65) / (90 * 70 * 10)
    assert float((profile / water.number_density() - 1).abs().max()) < 0.06


def test_no_two_molecules_overlap_not_even_where_layers_join():
    oxygen = water_molecules((80.0, 80.0, 160.0), generator=generator()).positions[::3].numpy()
    nearest = KDTree(oxygen).query(oxygen, k=2)[0][:, 1]
    assert nearest.min() > 2.2


def test_molecules_follow_the_density_and_the_generator():
    a, b = (water_molecules((60.0, 60.0, 60.0), density=0.85, generator=generator(2)) for _ in range(2))
    assert torch.equal(a.positions, b.positions)
    assert len(a) / 3 / 60**3 == pytest.approx(water.number_density(0.85), rel=0.01)
    with pytest.raises(ValueError, match="positive"):
        water_molecules((60.0, 0.0, 60.0))


def test_no_lattice_shows_in_projection():
    """The autocorrelation of the projected oxygens has no peak but the one at 0."""
    oxygen = water_molecules((160.0, 160.0, 200.0), generator=generator()).positions[::3]
    where = (oxygen[:, :2] + 80).div(1.25).long().clamp(0, 127)
    image = torch.zeros(128 * 128, dtype=torch.float64).index_add(
        0, where[:, 1] * 128 + where[:, 0], torch.ones(len(where), dtype=torch.float64)
    )
    image = image.reshape(128, 128) - image.mean()
    spectrum = torch.fft.rfft2(image).abs().square()
    ring = squared_frequencies((128, 128), 1.25, half=True, dtype=torch.float64).sqrt()
    spectrum = spectrum * ((ring > 0.08) & (ring < 0.38))
    correlation = torch.fft.irfft2(spectrum, s=(128, 128))
    correlation = correlation / correlation[0, 0]
    far = squared_frequencies((128, 128), 1 / 160, dtype=torch.float64).sqrt() > 15  # [Å]
    assert far.any() and float(correlation[far].abs().max()) < 0.1


def test_field_and_molecules_have_the_same_power():
    """Projected potential of explicit molecules, windowed, against the field's: the ring and its flanks."""
    depth, n = 150.0, 160  # pixels of 1 Å
    fade = ((73 - (torch.arange(n, dtype=torch.float64) - n // 2).abs()) / 15).clamp(0, 1)
    window = torch.sin(torch.pi / 2 * fade[:, None]) ** 2 * torch.sin(torch.pi / 2 * fade) ** 2
    q, rings = shells((n, n), 1.0, [0.18, 0.24, 0.27, 0.30, 0.33])

    def power(image):
        flat = (image - (image * window).sum() / window.sum()) * window
        square = torch.fft.rfft2(flat).abs().square() / window.square().sum() / depth
        return torch.stack([square[ring].mean() for ring in rings])

    explicit, drawn = 0.0, 0.0
    for seed in range(2):
        atoms = water_molecules((150.0, 150.0, depth), generator=generator(seed))
        projection = potential_slices(atoms, (n, n), 1.0, 200.0, 1)[0]
        explicit = explicit + power(projection) / 2
        field = WaterField((n, n), 1.0, 2.0, seed=seed, dtype=torch.float64)
        drawn = drawn + power(sum(field.between(0, 75))) / 2
    expected = torch.stack([power_spectrum(q[ring]).mean() for ring in rings])
    assert float(explicit.sum() / drawn.sum()) == pytest.approx(1, abs=0.06)
    assert float((explicit / drawn - 1).abs().max()) < 0.15
    assert float((explicit / expected - 1).abs().max()) < 0.12
    mean = float((projection * window).sum() / window.sum()) / depth
    assert mean == pytest.approx(water.inner_potential(), rel=0.01)


def test_a_protein_displaces_its_volume():
    """Ubiquitin, 8565 g/mol, at the usual partial specific volume of proteins, 0.73 cm^3/g."""
    protein = read_atoms(Path(cryosim.__file__).parent / "data" / "1ubi.pdb").centred()
    ice = water_molecules((80.0, 80.0, 80.0), generator=generator())
    displaced = (len(ice) - len(outside(ice, protein))) / 3 / water.number_density()
    assert displaced == pytest.approx(8565 * 0.73 / 0.602214, rel=0.06)


def test_outside_leaves_whole_molecules_away_from_the_solute():
    ice = water_molecules((50.0, 50.0, 50.0), generator=generator())
    solute = Atoms(20 * torch.rand(30, 3, generator=generator(), dtype=torch.float64) - 10, torch.full((30,), 6))
    left = outside(ice, solute, 3.0)
    assert 0 < len(left) < len(ice) and left.numbers[:3].tolist() == [8, 1, 1]
    apart = torch.cdist(left.positions[::3], solute.positions)
    assert float(apart.min()) >= 3.0
    gone = torch.cdist(ice.positions[::3], solute.positions).amin(1) < 3.0
    assert len(left) == len(ice) - 3 * int(gone.sum())
    assert len(outside(left, solute, 3.0)) == len(left)
    with pytest.raises(ValueError, match="O, H, H"):
        outside(ice.index(slice(1, None)), solute, 3.0)
