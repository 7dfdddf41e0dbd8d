"""The missing wedge in closed form: against dense matrices, the operator itself, moments and drawn noise."""

import math

import pytest
import torch

from inverse.physics.closed_form import backproject_filtered, gram_solver, largest_eigenvalue
from inverse.physics.spectral import frequencies, pair_weights, project, tilt_geometry
from inverse.physics.tilt import TiltProjection
from inverse.physics.wedge import (
    crowther_resolution,
    elongation,
    gram_eigenvalues,
    measured,
    measured_share,
    noise_gain,
    null_space_dimension,
    projector,
    transfer,
)

ANGLES = torch.linspace(-60, 60, 21, dtype=torch.float64)
UNEVEN = torch.tensor([-55.0, -31.0, -30.5, -8.0, 0.0, 17.0, 48.0], dtype=torch.float64)


def stretched(depth, width):
    return tilt_geometry(depth, width, None, "stretched", 60.0)


def dense_projection(angles, geometry):
    """A as a matrix (tilt u, z x): every row of the volume is another unit vector."""
    size = geometry.depth * geometry.width
    units = torch.eye(size, dtype=torch.float64).view(size, geometry.depth, geometry.width).movedim(0, 1)
    return project(units.contiguous(), angles, geometry).movedim(1, 0).flatten(1).T


def noise(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


# transfer -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "width"), [(8, 12), (7, 13), (9, 10)])
@pytest.mark.parametrize("damping", [1e-3, 5.0])
def test_transfer_is_the_diagonal_of_dense_least_squares(depth, width, damping):
    """(A^T A + lambda)^-1 A^T A by dense algebra, turned into the Fourier basis; measured: 6e-12, 1e-15."""
    geometry = stretched(depth, width)
    matrix = dense_projection(UNEVEN, geometry)
    normal = matrix.T @ matrix
    back = torch.linalg.solve(normal + damping * torch.eye(len(normal), dtype=torch.float64), normal)
    waves = torch.fft.fft2(torch.eye(len(normal)).double().view(-1, depth, width), norm="ortho").flatten(1)
    diagonal = torch.einsum("pm,pq,qm->m", waves.conj(), back.to(waves), waves).real.view(depth, width)
    torch.testing.assert_close(
        transfer(UNEVEN, geometry, damping), diagonal[:, : geometry.n_frequencies], rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("grid", ["camera", "stretched"])
@pytest.mark.parametrize("depth", [16, 17])
def test_transfer_lies_in_0_to_1_and_sums_to_what_the_eigenvalues_say(grid, depth):
    geometry = tilt_geometry(depth, 32, None, grid, 60.0)
    damping = 0.3
    found, mu = transfer(ANGLES, geometry, damping), gram_eigenvalues(ANGLES, geometry)
    assert found.shape == (depth, geometry.n_frequencies)
    assert 0 <= float(found.min()) and float(found.max()) <= 1
    torch.testing.assert_close(found.sum(0), (mu / (mu + damping)).sum(1), rtol=1e-10, atol=1e-12)


def test_transfer_is_the_wedge_where_the_tilts_are_dense():
    """Near 1 inside |kz| < kx tan 60, near 0 outside; the slab's sharp ends blur the faces as 1 / (depth kz).

    Measured more than 1.5 / depth from them: at least 0.951 and 0.994 on average inside, 0.052 on average outside,
    which has fallen to 0.030 from 4.5 / depth on.
    """
    geometry = stretched(48, 64)
    angles = torch.linspace(-60, 60, 121, dtype=torch.float64)
    found = transfer(angles, geometry, 1e-4 * largest_eigenvalue(angles, geometry))
    kx, kz = frequencies(geometry, found.device), torch.fft.fftfreq(48, dtype=torch.float64)[:, None].abs()
    beyond = 48 * (kz - kx * math.tan(math.radians(60)))
    assert float(found[beyond < -1.5].min()) > 0.95
    assert float(found[beyond < -1.5].mean()) > 0.99
    assert float(found[beyond > 1.5].mean()) < 0.055
    assert float(found[beyond > 4.5].mean()) < 0.032


@pytest.mark.parametrize("function", [transfer, noise_gain])
def test_gradients_in_the_angles(function):
    """Against central differences."""
    geometry = stretched(9, 14)
    angles = UNEVEN.clone().requires_grad_()
    weights = noise(torch.Generator().manual_seed(3), *function(UNEVEN, geometry, 2.0).shape)
    (gradient,) = torch.autograd.grad((weights * function(angles, geometry, 2.0)).sum(), angles)
    for i in range(len(UNEVEN)):
        step = torch.zeros_like(UNEVEN)
        step[i] = 1e-4
        up, down = (float((weights * function(UNEVEN + s, geometry, 2.0)).sum()) for s in (step, -step))
        assert float(gradient[i]) == pytest.approx((up - down) / 2e-4, rel=1e-5, abs=1e-9)


# the measured part ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
@pytest.mark.parametrize("shape", [(16, 5, 24), (2, 1, 17, 4, 25)])
def test_measured_part_is_an_orthogonal_projection(generator, shape, dtype, tolerance):
    """It sums to v with the rest, has nothing of it, and is its own measured part; measured: 9e-13, 2e-7."""
    geometry = stretched(shape[-3], shape[-1])
    v, w = noise(generator, *shape, dtype=dtype), noise(generator, *shape, dtype=dtype)
    known, rest = measured(v, ANGLES, geometry)
    assert known.shape == rest.shape == v.shape and known.dtype == dtype
    torch.testing.assert_close(known + rest, v)
    again, none = measured(known, ANGLES, geometry)
    assert float((again - known).norm()) < tolerance * float(known.norm())
    assert float(none.norm()) < tolerance * float(known.norm())
    assert abs(float((known * rest).sum())) < tolerance * float((v * v).sum())
    other, _ = measured(w, ANGLES, geometry)
    assert float((known * w).sum()) == pytest.approx(float((v * other).sum()), abs=tolerance * v.numel())


@pytest.mark.parametrize("width", [24, 25])
def test_the_tilts_do_not_see_the_rest(generator, width):
    """|A rest| <= sqrt(cutoff) |rest|, the bound that the singular values set."""
    physics = TiltProjection(UNEVEN, (16, 5, width), grid="stretched")
    v = noise(generator, 2, 1, 16, 5, width)
    for share in (1e-2, 1e-6, 1e-9):
        cutoff = share * float(physics.squared_norm())
        known, rest = measured(v, UNEVEN, physics.geometry, cutoff)
        assert float(physics.A(rest).norm()) <= math.sqrt(cutoff) * float(rest.norm())
    assert float(physics.A(rest).norm()) < 1e-5 * float(physics.A(v).norm())
    torch.testing.assert_close(physics.A(known), physics.A(v), rtol=0, atol=1e-4)


def test_measured_part_is_what_the_pseudo_inverse_finds(generator):
    """A^+ A v by dense singular values."""
    geometry = stretched(9, 12)
    v = noise(generator, 9, 1, 12)
    matrix, cutoff = dense_projection(UNEVEN, geometry), 1e-6 * float(largest_eigenvalue(UNEVEN, geometry))
    _, sigma, vectors = torch.linalg.svd(matrix, full_matrices=False)
    seen = vectors[sigma**2 > cutoff]
    expected = (seen.T @ (seen @ v.flatten())).view(9, 1, 12)
    torch.testing.assert_close(measured(v, UNEVEN, geometry)[0], expected, rtol=0, atol=1e-9)


def test_a_volume_in_the_missing_wedge_is_all_invented():
    """Waves along the beam are seen by no tilt but for their mean and the ends of the slab."""
    geometry = stretched(64, 64)
    z = torch.arange(64, dtype=torch.float64) - 32
    x = torch.arange(64, dtype=torch.float64) - 32
    window = torch.exp(-(z**2) / (2 * 10**2))
    along = (window * torch.cos(2 * torch.pi * 0.3 * z))[:, None, None].expand(64, 2, 64)
    across = window[:, None, None] * torch.cos(2 * torch.pi * x * 10 / 64).expand(64, 2, 64)
    dense = torch.linspace(-60, 60, 61, dtype=torch.float64)
    assert float(measured(along, dense, geometry)[0].norm() / along.norm()) < 1e-4
    assert float(measured(across, dense, geometry)[1].norm() / across.norm()) < 1e-4


def test_on_the_camera_grid_only_the_sides_disagree(generator):
    """A rest over A v: 0.09 for noise that fills the box, 0.013 for a blob whose streaks alone reach the sides."""
    physics = TiltProjection(ANGLES, (32, 4, 128))
    z, x = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (32, 128))
    blob = torch.exp(-(z[:, None, None] ** 2 + x**2) / (2 * 2.0**2)).expand(1, 1, 32, 4, 128)
    shares = []
    for v in (noise(generator, 1, 1, 32, 4, 128), blob):
        known, rest = measured(v, ANGLES)
        torch.testing.assert_close(known + rest, v)
        shares.append(float(physics.A(rest).norm() / physics.A(v).norm()))
    assert shares[0] < 0.13 and shares[1] < 0.016


def test_gradient_of_the_measured_part(generator):
    """The projector is its own adjoint; gradcheck at odd sizes."""
    geometry = stretched(5, 7)
    v = noise(generator, 5, 2, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: measured(t, UNEVEN, geometry), v)


def test_rows_may_come_in_slabs(generator):
    geometry = stretched(8, 12)
    v = noise(generator, 8, 70, 12)
    act = projector(ANGLES, geometry, None, v.dtype)
    slabs = torch.cat([act(part) for part in v.split(13, dim=1)], 1)
    torch.testing.assert_close(slabs, measured(v, ANGLES, geometry)[0], rtol=0, atol=1e-12)


# counting -------------------------------------------------------------------------------------------------------------


def test_dimensions_follow_slepians_count():
    """Dense tilts hold depth · 2 k tan(60) dimensions at k, a logarithm more, up to all; measured: 0 to 2.9 more."""
    geometry = stretched(64, 128)
    angles = torch.linspace(-60, 60, 241, dtype=torch.float64)
    cutoff = 1e-3 * largest_eigenvalue(angles, geometry)
    known = 64 - null_space_dimension(angles, geometry, cutoff)
    k = frequencies(geometry, known.device)
    count = (64 * 2 * k * math.tan(math.radians(60))).clamp_max(64)
    assert float((known - count).min()) >= -0.5 and float((known - count).max()) < 3.5
    assert int(known[0]) == 1  # at k = 0 all tilts see the same line


def test_measured_share_of_dense_tilts_is_the_area_of_the_wedge():
    """Of the square |kx|, |kz| < 1/2 the wedge leaves out 1 / (2 tan 60)."""
    geometry = stretched(96, 96)
    angles = torch.linspace(-60, 60, 241, dtype=torch.float64)
    share = measured_share(angles, geometry, 1e-3 * largest_eigenvalue(angles, geometry))
    assert share == pytest.approx(1 - 1 / (2 * math.tan(math.radians(60))), abs=0.02)  # measured: +0.010


def test_few_tilts_measure_no_more_than_their_number():
    geometry = stretched(64, 64)
    known = 64 - null_space_dimension(UNEVEN, geometry)
    assert int(known.max()) == len(UNEVEN) and int(known[0]) == 1


# resolution -----------------------------------------------------------------------------------------------------------


def test_crowther_resolution():
    """pi D / N for N tilts over 180 degrees; the largest gap counts."""
    even = torch.arange(-88, 92, 4, dtype=torch.float64)
    assert float(crowther_resolution(even, 500.0)) == pytest.approx(math.pi * 500 / 45)
    shuffled = torch.tensor([0.0, 3.0, -3.0, 12.0, -6.0], dtype=torch.float64, requires_grad=True)
    found = crowther_resolution(shuffled, 2000.0)
    assert float(found.detach()) == pytest.approx(2000 * math.radians(9))
    found.backward()
    assert shuffled.grad is not None and float(shuffled.grad[3]) == pytest.approx(2000 * math.pi / 180)


def test_beyond_crowthers_frequency_there_are_gaps_between_the_tilts():
    """Tilts 4 degrees apart and a slab of 48 voxels: no gaps up to 1 / 3.35 voxels; measured: 0.999, 0.47."""
    angles = torch.arange(-20, 21, 4, dtype=torch.float64)
    geometry = tilt_geometry(48, 96, None, "stretched", 20.0)
    limit = 1 / float(crowther_resolution(angles, 48.0))
    found = transfer(angles, geometry, 1e-5 * largest_eigenvalue(angles, geometry))
    kx, kz = frequencies(geometry, found.device), torch.fft.fftfreq(48, dtype=torch.float64)[:, None].abs()
    inside = (kz < kx * math.tan(math.radians(18)) - 1 / 48) & (kx > 0.1)
    worst = torch.where(inside, found, torch.ones_like(found)).min(0).values
    below, beyond = worst[(kx > 0.1) & (kx < 0.85 * limit)], worst[kx > 1.3 * limit]
    assert float(below.min()) > 0.99
    assert len(beyond) and float(beyond.max()) < 0.5


@pytest.mark.parametrize(("steepest", "expected"), [(60.0, 1.55), (70.0, 1.31), (45.0, 2.12), (88.9, 1.01)])
def test_elongation_is_the_ratio_of_the_moments_of_the_measured_sector(steepest, expected):
    angle = torch.deg2rad(torch.linspace(-steepest, steepest, 20001, dtype=torch.float64))
    moments = torch.trapezoid(angle.cos() ** 2, angle) / torch.trapezoid(angle.sin() ** 2, angle)
    found = float(elongation(torch.linspace(-steepest, steepest, 41, dtype=torch.float64)))
    assert found == pytest.approx(math.sqrt(float(moments)), rel=1e-6)
    assert found == pytest.approx(expected, abs=0.006)


def test_a_single_tilt_has_no_depth():
    assert float(elongation([7.0])) == math.inf


# noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "depth", "width"), [("stretched", 12, 24), ("stretched", 11, 25), ("camera", 10, 91)])
def test_noise_gain_is_what_drawn_noise_gives(generator, grid, depth, width):
    """Variance of the voxels of 3000 rows: each z within 5 standard errors, their mean within 4.

    A slice's voxels are correlated along x, so its standard error is that of the means of the rows. On the camera grid
    in the middle of the volume, with images that reach far beyond it.
    """
    geometry = tilt_geometry(depth, width, None, grid, 60.0)
    damping = 0.02 * largest_eigenvalue(ANGLES, geometry)
    images = noise(generator, len(ANGLES), 3000, geometry.image_width)
    volume = backproject_filtered(images, ANGLES, geometry, gram_solver(ANGLES, damping, geometry))
    if grid == "camera":
        volume = volume[:, :, width // 2 - 8 : width // 2 + 8]
    rows = volume.square().mean(2)  # (z, row)
    error = (rows.mean(1) - noise_gain(ANGLES, geometry, damping)) / (rows.std(1) / math.sqrt(3000))
    assert float(error.abs().max()) < 5
    total = rows.mean(0)
    mean = float(noise_gain(ANGLES, geometry, damping).mean())
    assert abs(float(total.mean()) - mean) < 4 * float(total.std()) / math.sqrt(3000)


@pytest.mark.parametrize("width", [24, 25])
def test_mean_noise_gain_is_a_sum_over_eigenvalues(width):
    geometry = stretched(13, width)
    mu = gram_eigenvalues(UNEVEN, geometry)
    pairs = pair_weights(geometry, mu.device)[:, None]
    for damping in (0.01, 1.0, 100.0):
        expected = float((pairs * mu / (mu + damping) ** 2).sum() / (13 * width))
        assert float(noise_gain(UNEVEN, geometry, damping).mean()) == pytest.approx(expected, rel=1e-10)


# bad input ------------------------------------------------------------------------------------------------------------


def test_bad_input(generator):
    geometry, v = stretched(8, 12), noise(generator, 8, 3, 12)
    with pytest.raises(ValueError, match="finite"):
        transfer([0.0, math.nan], geometry)
    with pytest.raises(ValueError, match=r"shape \(tilt,\)"):
        measured(v, ANGLES[None], geometry)
    with pytest.raises(ValueError, match="89 degrees"):
        noise_gain([0.0, 90.0], geometry)
    with pytest.raises(ValueError, match="damping"):
        transfer(ANGLES, geometry, 0.0)
    with pytest.raises(ValueError, match="cutoff"):
        measured(v, ANGLES, geometry, 1e-16)
    with pytest.raises(ValueError, match="depth and width"):
        measured(v, ANGLES, stretched(8, 13))
    with pytest.raises(ValueError, match="real floats"):
        measured(v.to(torch.int64), ANGLES, geometry)
    with pytest.raises(ValueError, match="two tilts"):
        crowther_resolution([3.0], 100.0)
    with pytest.raises(ValueError, match="positive thickness"):
        crowther_resolution([3.0, 6.0], 0.0)
