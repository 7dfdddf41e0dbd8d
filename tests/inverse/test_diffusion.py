"""Posterior samples against the posterior of a Gaussian prior, of which everything is known."""

import math

import pytest
import torch

from inverse.metrics.coverage import coverage
from inverse.metrics.fsc import measured_region
from inverse.physics.spectral import Grid
from inverse.physics.tilt import TiltProjection
from inverse.solvers.diffusion import diffusion
from inverse.solvers.split_gibbs import Shells, lag
from tests.inverse.gaussian_denoiser import GaussianDenoiser, smooth_spectrum

SHAPE, ANGLES = (8, 45, 12), torch.linspace(-60, 60, 11, dtype=torch.float64)


class Trained(GaussianDenoiser):
    """One that is good for some noise levels only, as a trained one."""

    noise_levels = (0.03, 10.0)


def scene(snr, generator, shape=SHAPE, grid: Grid = "stretched", dtype=torch.float64, kind=GaussianDenoiser):
    """Operator, exact denoiser, a volume (1, 1, z, y, x) of its prior, its images, and the variance of the noise."""
    denoiser = kind(smooth_spectrum(shape, length=12.0))
    physics = TiltProjection(ANGLES.to(dtype), shape, grid=grid)
    truth = denoiser.sample(1, generator).to(dtype)
    images = physics.A(truth)
    noise = float(images.var()) / snr
    images = images + noise**0.5 * torch.randn(images.shape, generator=generator, dtype=dtype)
    return physics, denoiser, truth, images, noise


def posterior(physics, denoiser, images, noise):
    """Of each frequency along y, the prior's and the operator's own: mean (ky, voxel of a row), covariance and
    A^T A / noise (ky, voxel, voxel)."""
    depth, _, width = physics.volume_shape
    row = TiltProjection(ANGLES, (depth, 1, width), grid=physics.geometry.grid)
    matrix = row.A(torch.eye(depth * width, dtype=torch.float64).reshape(-1, 1, depth, 1, width)).flatten(1).T
    variance = torch.as_tensor(noise, dtype=torch.float64).expand(len(ANGLES)).repeat_interleave(width)
    lags = torch.fft.ifft2(denoiser.spectrum.movedim(1, 0)).real  # covariance of a voxel and the one at (0, 0)
    z, x = (i.flatten() for i in torch.meshgrid(torch.arange(depth), torch.arange(width), indexing="ij"))
    prior = lags[:, (z[:, None] - z) % depth, (x[:, None] - x) % width]
    gain = torch.linalg.solve(matrix @ prior @ matrix.T + torch.diag(variance), matrix @ prior).mT
    seen = by_row_frequency(images[0, 0].double())
    return (gain.to(seen) @ seen[..., None])[..., 0], prior - gain @ matrix @ prior, matrix.T @ (matrix.T / variance).T


def by_row_frequency(volumes):
    """(..., z, y, x) as (..., ky, z x), complex."""
    return torch.fft.fft(volumes, dim=-2, norm="ortho").movedim(-2, -3).flatten(-2)


def errors_by_information(samples, mean, covariance, told):
    """Of the directions that the images tell nothing of, some, much and all: rms deviation from the samples' mean,
    and bias of that mean, both over the exact deviation.

    Off the bias is taken its own scatter with so few samples, and three times what that scatters by.
    """
    tiny = 1e-12 * covariance.diagonal(dim1=1, dim2=2).mean()
    root = torch.linalg.cholesky(covariance + tiny * torch.eye(covariance.shape[1]))
    share, axes = torch.linalg.eigh(root.mT @ told @ root)  # 0: the prior's alone, 1: the images'
    away = (by_row_frequency(samples.double()) - mean).movedim(0, -1)  # (ky, voxel, sample)
    whiten = axes.mT @ torch.linalg.inv(root)
    unit = torch.complex(whiten @ away.real, whiten @ away.imag)
    n, found = samples.shape[0], []
    for low, high in ((-1, 0.02), (0.02, 0.3), (0.3, 0.9), (0.9, 2)):
        chosen = unit[(share > low) & (share <= high)]
        if len(chosen) > 150:  # each and its conjugate: as many real numbers
            by_chance = (1 + 3 * (2 / len(chosen)) ** 0.5) / n
            bias = (chosen.mean(1).abs().square().mean() - by_chance).clamp_min(0).sqrt()
            found.append((float(chosen.var(1).mean().sqrt()), float(bias)))
    assert len(found) > 1
    return found


def drawn(problem, n, generator, **options):
    physics, denoiser, _, images, noise = problem
    return diffusion(physics, images[0, 0], denoiser, noise, samples=n, generator=generator, **options).samples


@pytest.mark.parametrize(
    ("snr", "kind"), [(0.05, Trained), (0.5, GaussianDenoiser), (5.0, Trained), (50.0, GaussianDenoiser)]
)
def test_split_gibbs_samples_the_exact_posterior(snr, kind, generator):
    """Inside and outside the missing wedge: deviations within 5 %, means within a tenth of one."""
    problem = scene(snr, generator, kind=kind)
    samples = drawn(problem, 8, generator)
    physics, denoiser, _, images, noise = problem
    for deviation, bias in errors_by_information(samples, *posterior(physics, denoiser, images, noise)):
        assert abs(deviation - 1) < 0.05 and bias < 0.1


@pytest.mark.parametrize("shape", [(7, 33, 12), (6, 32, 11)])
def test_on_the_camera_grid_in_single_precision(shape, generator):
    problem = scene(2.0, generator, shape, "camera", torch.float32, Trained)
    samples = drawn(problem, 4, generator, steps=25)
    assert samples.dtype == torch.float32
    physics, denoiser, _, images, noise = problem
    for deviation, bias in errors_by_information(samples, *posterior(physics, denoiser, images, noise)):
        assert abs(deviation - 1) < 0.08 and bias < 0.1


def test_noise_of_each_tilt_its_own(generator):
    problem = scene(1.0, generator)
    physics, denoiser, truth, _, noise = problem
    each = noise * torch.linspace(0.2, 3.0, len(ANGLES), dtype=torch.float64)
    images = physics.A(truth)
    images = images + each.sqrt()[:, None, None] * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    samples = drawn((physics, denoiser, truth, images, each), 3, generator, steps=20)
    for deviation, bias in errors_by_information(samples, *posterior(physics, denoiser, images, each)):
        assert abs(deviation - 1) < 0.06 and bias < 0.1


def test_coverage_is_what_the_level_says_and_a_wrong_prior_shows(generator):
    """Ten samples. A prior of a tenth of the power holds what it does not know for small."""
    physics, denoiser, truth, images, noise = scene(0.5, generator, (12, 48, 16))
    region = measured_region((12, 48, 16), ANGLES)

    def shares(prior):
        samples = drawn((physics, prior, truth, images, noise), 10, generator, steps=20)
        found = coverage(samples, truth[0, 0], 0.9, region)
        return [float(share) for share in (found.voxels, found.inside, found.outside)]

    assert all(0.88 < share < 0.92 for share in shares(denoiser))
    assert shares(GaussianDenoiser(denoiser.spectrum / 10))[0] < 0.8


@pytest.mark.parametrize("method", ["split-gibbs", "diffpir", "moment-matching", "dps"])
def test_samples_are_those_of_the_generator_however_many(method, generator):
    physics, denoiser, _, images, noise = scene(1.0, generator, (5, 4, 8), dtype=torch.float32, kind=Trained)
    before = torch.random.get_rng_state()

    def run(samples, seed):
        own = torch.Generator().manual_seed(seed)
        return diffusion(physics, images[0, 0], denoiser, noise, samples=samples, steps=6, method=method, generator=own)

    four, one, other = run(4, 5), run(1, 5), run(1, 6)
    assert four.samples.shape == (4, 5, 4, 8) and four.mean.shape == four.std.shape == (5, 4, 8)
    assert torch.equal(four.samples[0], one.samples[0]) and not torch.equal(one.samples, other.samples)
    assert not torch.equal(four.samples[0], four.samples[1])
    assert torch.allclose(four.std, four.samples.std(0)) and one.std.isnan().all()
    assert torch.equal(before, torch.random.get_rng_state())
    assert four.levels[0] <= 10.0 * (1 + 1e-6) and (four.levels.diff() < 0).all()


@pytest.mark.parametrize(
    ("method", "steps", "most"), [("moment-matching", 20, 1.15), ("diffpir", 40, 1.3), ("dps", 60, 1.4)]
)
def test_deepinv_s_samplers_come_near_the_exact_mean(method, steps, most, generator):
    """Root mean square error over that of the exact posterior mean, of the mean of 4 samples."""
    problem = scene(1.0, generator, dtype=torch.float32, kind=Trained)
    physics, denoiser, truth, images, noise = problem
    mean, _, _ = posterior(physics, denoiser, images, noise)
    samples = drawn(problem, 4, generator, method=method, steps=steps)
    truth = by_row_frequency(truth[0, 0].double())
    best = (mean - truth).norm()
    assert (by_row_frequency(samples.double().mean(0)) - truth).norm() < most * best


def test_start_progress_and_levels(generator):
    physics, denoiser, truth, images, noise = scene(1.0, generator, (5, 4, 8))
    told = []
    found = diffusion(
        physics,
        images,
        denoiser,
        noise,
        samples=2,
        steps=5,
        start=torch.zeros_like(truth),
        generator=generator,
        progress=lambda done, most: told.append((done, most)),
    )
    assert told == [(i, 10) for i in range(1, 11)]
    assert found.samples.shape == (2, 1, 1, 5, 4, 8) and len(found.levels) == 5
    assert abs(float(found.levels[-1]) ** 2 * float(physics.squared_norm()) / noise - 0.05) < 1e-6


def test_the_lag_is_one_step_s_factor():
    """The factor by which rho falls, to second order; and a ladder of no height lags by nothing."""
    assert lag(0.0) == 1.0
    for rate in (0.05, 0.1, 0.2):
        assert abs(lag(rate) - math.exp(rate)) < 0.5 * rate**3


def test_shells_measure_and_apply_the_same_filter(generator):
    shape = (6, 7, 10)
    volume = torch.randn(2, 1, *shape, generator=generator, dtype=torch.float64)
    shells = Shells.of(shape, volume)
    n = int(shells.below.max()) + 2
    power = torch.linspace(1, 3, n, dtype=torch.float64) ** 2
    filtered = shells.filtered(volume, power)
    assert torch.allclose(shells.ratio(filtered, volume)[1:8], power.sqrt()[1:8], rtol=0.05)
    assert torch.allclose(shells.filtered(volume, torch.full_like(power, 4.0)), 2 * volume)


def test_what_cannot_be_sampled(generator):
    physics, denoiser, _, images, noise = scene(1.0, generator, (5, 4, 8))

    def run(**changed):
        given = {"physics": physics, "images": images, "denoiser": denoiser, "noise": noise}
        return diffusion(**(given | {"generator": generator} | changed))

    with pytest.raises(ValueError, match="positive, finite"):
        run(noise=-1.0)
    with pytest.raises(ValueError, match="each of 11 tilts"):
        run(noise=torch.ones(4))
    with pytest.raises(ValueError, match="expected 1 samples"):
        run(samples=0)
    with pytest.raises(ValueError, match="expected 2 steps"):
        run(steps=1)
    with pytest.raises(ValueError, match="method"):
        run(method="ddrm")
    with pytest.raises(ValueError, match="start"):
        run(start=torch.zeros(3, 4, 8))
    with pytest.raises(ValueError, match="one channel"):
        run(images=images.expand(1, 2, -1, -1, -1))
    with pytest.raises(ValueError, match="linear operator"):
        run(physics=denoiser)
