"""Directional Fourier shell correlation: against direct sums, single cones, and volumes with a missing wedge."""

import math
import sys

import numpy
import pytest
import torch

from cryosim.core.volume import Volume
from inverse.metrics.directional import DirectionalCorrelation, directional_fsc
from inverse.metrics.fsc import fsc, measured_region

DIRECTIONS = torch.tensor(
    [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [-1, 0.5, 0.3], [0.2, -1, 0.4]], dtype=torch.float64
)


@pytest.fixture(scope="module", autouse=True)
def harmonics():
    """Loaded once, before the tests are timed: it takes seconds."""
    return pytest.importorskip("torch_harmonics")


def noise(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def sphere(n):
    """Directions (point, 3) and their weights (point,): Gauss and Legendre along y, even about it."""
    nodes, weights = (torch.from_numpy(v) for v in numpy.polynomial.legendre.leggauss(n))
    longitude = torch.arange(2 * n, dtype=torch.float64) * (math.pi / n)
    ring = (1 - nodes**2).sqrt()[:, None]
    parts = [ring * torch.sin(longitude), nodes[:, None].expand(n, 2 * n), ring * torch.cos(longitude)]
    return torch.stack(parts, -1).reshape(-1, 3), weights.repeat_interleave(2 * n)


def spectrum(volume, points):
    """Fourier transform at points (point, 3), (x, y, z) [1/voxel], by direct sums."""
    waves = []
    for axis, n in enumerate(volume.shape[::-1]):
        at = torch.arange(n, dtype=torch.float64) - n // 2
        waves.append(torch.exp(-2j * math.pi * at * points[:, axis, None]))
    planes = torch.einsum("px,zyx->pzy", waves[0], volume.to(torch.complex128))
    return torch.einsum("pz,py,pzy->p", waves[2], waves[1], planes)


def soft_cone(cosine, half_angle, blur):
    """Share of the cone about +-n after the blur: the cone's edge as an error function, its flat-space limit."""
    away = torch.arccos(cosine.abs().clamp_max(1))
    return 0.5 * torch.erfc((away - half_angle) / (blur * math.sqrt(2)))


@pytest.mark.parametrize("shape", [(14, 14, 14), (11, 16, 13)])
def test_against_direct_sums_over_cones(generator, shape):
    """Direct Fourier sums on a fine sphere, weighted with an explicit soft cone; measured: 0.008 rms, 0.021 at most.

    The explicit cone is the blurred one up to the curvature of the sphere.
    """
    s, first, second = (noise(generator, *shape) for _ in range(3))
    a, b = s + 0.7 * first, s + second
    found = directional_fsc(a, b, 1.0, half_angle=30.0)
    half = math.radians(30)
    points, weights = sphere(72)
    wanted, errors = (
        soft_cone(DIRECTIONS / DIRECTIONS.norm(dim=1, keepdim=True) @ points.T, half, half / 6) * weights,
        [],
    )
    for shell in (3, 5, max(shape) // 2):
        fa, fb = (spectrum(v, points * shell / max(shape)) for v in (a, b))
        cross, pa, pb = ((wanted * p).sum(1) for p in ((fa * fb.conj()).real, fa.abs() ** 2, fb.abs() ** 2))
        curves = torch.stack([found.along(n).correlation[shell] for n in DIRECTIONS])
        errors.append(curves - cross / (pa * pb).sqrt())
    assert float(torch.stack(errors).square().mean().sqrt()) < 0.012
    assert float(torch.stack(errors).abs().max()) < 0.03


def test_padding_brings_it_closer_to_the_direct_sums(generator):
    """At a node of the grid, where only the interpolation of the spectra errs; measured: 0.07, 0.003, 0.0006 rms."""
    s, first, second = (noise(generator, 12, 13, 14) for _ in range(3))
    reference = directional_fsc(s + first, s + second, 1.0, half_angle=40.0, padding=8).correlation[2:]
    errors = []
    for padding in (1, 2, 4):
        found = directional_fsc(s + first, s + second, 1.0, half_angle=40.0, padding=padding).correlation[2:]
        errors.append(float((found - reference).square().mean().sqrt()))
    assert errors[0] > 5 * errors[1] and errors[1] > 3 * errors[2] and errors[1] < 0.01


@pytest.mark.parametrize("shape", [(32, 32, 32), (17, 30, 25)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_volume_with_itself_and_its_negative(generator, shape, dtype, tolerance):
    v = noise(generator, *shape, dtype=dtype)
    same, opposite = directional_fsc(Volume(v, 2.0), 3 * v, 2.0), directional_fsc(v, -v, 2.0)
    assert same.correlation.dtype == dtype
    assert float((same.correlation - 1).abs().max()) < tolerance
    assert float((opposite.correlation + 1).abs().max()) < tolerance
    torch.testing.assert_close(same.resolution(), torch.full_like(same.resolution(), float(1 / same.frequency[-1])))
    assert bool(torch.isinf(opposite.resolution()).all())


def test_a_cone_of_90_degrees_is_the_shell_correlation(generator):
    """The same in every direction, but for the blur of the equator, and close to `fsc`, which takes thick shells."""
    s, first, second = (noise(generator, 32, 32, 32) for _ in range(3))
    curve, found = fsc(s + first, s + second, 1.0), directional_fsc(s + first, s + second, 1.0, half_angle=90.0)
    torch.testing.assert_close(found.frequency, curve.frequency)
    assert float(found.correlation[8:].std((1, 2)).max()) < 0.03
    assert float((found.correlation.mean((1, 2)) - curve.correlation)[6:].abs().mean()) < 0.03


def test_a_missing_wedge_shows_in_its_direction(generator):
    """Two volumes that share what tilts to +-50 degrees see, and else are independent noise."""
    shape = (48, 48, 48)
    shared, first, second = (torch.fft.rfftn(noise(generator, *shape)) for _ in range(3))
    seen = measured_region(shape, torch.tensor([-50.0, 50.0]))
    a, b = (torch.fft.irfftn(torch.where(seen, shared, own), s=shape) for own in (first, second))
    found = directional_fsc(a, b, 2.0, half_angle=15.0)
    means = [float(found.along(n).correlation[8:].mean()) for n in ((1, 0, 0), (1, 0, 1), (0, 0, 1), (-1, 0, 1))]
    assert means[0] > 0.99  # measured: 0.995 along x, 0.65 and 0.69 near the faces, 0.02 along the beam
    assert 0.4 < means[1] < 0.95 and 0.4 < means[3] < 0.95
    assert abs(means[2]) < 0.1
    assert 1 / found.along((1, 0, 0)).resolution(0.5) > 0.24
    assert found.along((0, 0, 1)).resolution(0.5) > 5 * found.along((1, 0, 0)).resolution(0.5)
    # by hand: the voxels of a hard cone about x, y and z
    k = [torch.fft.fftfreq(n, dtype=torch.float64) for n in shape]
    grid = torch.stack(torch.meshgrid(*k, indexing="ij"))  # (z, y, x)
    radius = grid.square().sum(0).sqrt()
    fa, fb = torch.fft.fftn(a), torch.fft.fftn(b)
    for axis, direction in ((2, (1, 0, 0)), (1, (0, 1, 0)), (0, (0, 0, 1))):
        cone = (grid[axis].abs() > math.cos(math.radians(15)) * radius) & (radius > 8 / 48) & (radius < 0.5)
        pa, pb = (float(f[cone].abs().square().sum()) for f in (fa, fb))
        by_hand = float((fa * fb.conj())[cone].real.sum()) / math.sqrt(pa * pb)
        assert float(found.along(direction).correlation[8:].mean()) == pytest.approx(by_hand, abs=0.08)


def test_the_directions_are_x_y_and_z(generator):
    """Volumes that agree in one octant of directions and its opposite only: signs and axes are told apart."""
    shape = (31, 32, 33)
    shared, first, second = (torch.fft.rfftn(noise(generator, *shape)) for _ in range(3))
    kz, ky = (torch.fft.fftfreq(n)[:, None] for n in shape[:2])
    kx = torch.fft.rfftfreq(shape[2])
    seen = (kz[..., None] * torch.ones(32, 1) > 0) & (ky < 0) & (kx > 0)  # (x, -y, z), up to its sign
    a, b = (torch.fft.irfftn(torch.where(seen, shared, own), s=shape) for own in (first, second))
    found = directional_fsc(a, b, 1.0, half_angle=20.0)
    for direction in ((1, -1, 1), (-1, 1, -1), (1, 1, 1), (-1, -1, 1), (1, -1, -1)):
        agree = direction in ((1, -1, 1), (-1, 1, -1))
        assert (float(found.along(direction).correlation[8:].mean()) > 0.9) == agree
    best = int(found.correlation[8:].mean(0).argmax())
    row, column = divmod(best, len(found.longitude))
    latitude, longitude = (math.radians(float(v)) for v in (found.latitude[row], found.longitude[column]))
    n = (math.cos(latitude) * math.sin(longitude), math.sin(latitude), math.cos(latitude) * math.cos(longitude))
    assert abs(sum(u * v for u, v in zip(n, (1, -1, 1), strict=True))) / math.sqrt(3) > 0.85


def test_variance_of_independent_noise_is_one_over_the_samples(generator):
    """Measured in 4 draws: variance times samples 0.67 to 0.73, for the blurred cone is wider than the sharp."""
    found = directional_fsc(noise(generator, 48, 48, 48), noise(generator, 48, 48, 48), 1.0)
    area = torch.cos(torch.deg2rad(found.latitude))[:, None].expand(found.correlation.shape[1:])
    variance = (found.correlation.square() * area).sum((1, 2)) / area.sum()
    assert float((variance * found.samples)[8:].mean()) == pytest.approx(0.72, abs=0.12)


def test_along_is_the_grid_at_its_nodes_and_knows_no_sign(generator):
    s, first, second = (noise(generator, 16, 17, 18) for _ in range(3))
    found = directional_fsc(s + first, s + second, 3.0)
    resolution = found.resolution(0.5)
    for row, column in ((0, 0), (10, 50), (40, 199), (len(found.latitude) - 1, 7)):
        latitude, longitude = (math.radians(float(v)) for v in (found.latitude[row], found.longitude[column]))
        n = torch.tensor(
            [math.cos(latitude) * math.sin(longitude), math.sin(latitude), math.cos(latitude) * math.cos(longitude)]
        )
        curve = found.along(7 * n)
        torch.testing.assert_close(curve.correlation, found.correlation[:, row, column], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.along(-n).correlation, curve.correlation, rtol=0, atol=1e-5)
        assert float(resolution[row, column]) == pytest.approx(curve.resolution(0.5), rel=1e-4)
    assert bool(torch.isfinite(found.along((0, 1, 0)).correlation).all())


def test_resolution_of_known_curves():
    """Falls linearly from 1 to 0 in one direction; never, always below, and without power in the others."""
    k = torch.linspace(0, 0.25, 6, dtype=torch.float64)
    fall = 1 - k / 0.25
    curves = torch.stack([fall, torch.ones(6), torch.zeros(6), torch.where(k > 0.12, torch.nan, 1.0)], -1)
    found = DirectionalCorrelation(k, curves[:, None], torch.zeros(1), torch.arange(4) * 90.0, torch.ones(6))
    resolution = found.resolution(0.5)[0].tolist()
    assert resolution[:3] == pytest.approx([8.0, 4.0, math.inf])
    assert 1 / 0.15 < resolution[3] < 1 / 0.1


def test_no_power_is_not_a_number(generator):
    """Nothing correlates with an empty volume; where a band was cut both are empty."""
    v = noise(generator, 16, 16, 16)
    assert bool(torch.isnan(directional_fsc(v, torch.zeros_like(v), 1.0).correlation).all())


def test_gradient(generator):
    """In both volumes, of the mean correlation about the beam, against central differences."""
    s, first, second = (noise(generator, 8, 7, 9) for _ in range(3))
    a, b = (s + first).requires_grad_(), (s + second).requires_grad_()

    def beam(a, b):
        return directional_fsc(a, b, 1.0, half_angle=45.0).correlation[2:, 20, 0].sum()

    gradients = torch.autograd.grad(beam(a, b), (a, b))
    step = noise(generator, 8, 7, 9) * 1e-5
    with torch.no_grad():
        for gradient, up, down in (
            (gradients[0], (a + step, b), (a - step, b)),
            (gradients[1], (a, b + step), (a, b - step)),
        ):
            assert float((gradient * step).sum()) == pytest.approx(float(beam(*up) - beam(*down)) / 2, rel=1e-4)


def test_bad_input(generator, monkeypatch):
    v = noise(generator, 8, 8, 8)
    with pytest.raises(ValueError, match="one shape"):
        directional_fsc(v, v[1:], 1.0)
    with pytest.raises(ValueError, match="not finite"):
        directional_fsc(v, v * torch.nan, 1.0)
    with pytest.raises(ValueError, match="half_angle"):
        directional_fsc(v, v, 1.0, half_angle=2.0)
    with pytest.raises(ValueError, match="padding"):
        directional_fsc(v, v, 1.0, padding=0)
    with pytest.raises(ValueError, match="voxel_size"):
        directional_fsc(v, v, -1.0)
    with pytest.raises(ValueError, match="direction"):
        directional_fsc(v, v, 1.0).along((0, 0, 0))
    monkeypatch.setitem(sys.modules, "torch_harmonics", None)
    with pytest.raises(ImportError, match="pip install"):
        directional_fsc(v, v, 1.0)
