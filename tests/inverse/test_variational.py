"""Gaussian laws fitted by the variational bound, against the posterior of a Gaussian prior in dense linear algebra."""

import math

import pytest
import torch

from inverse.physics.gaussian import marginal_log_likelihood
from inverse.physics.spectral import Grid, resolved
from inverse.physics.tilt import TiltProjection
from inverse.solvers.evidence import elbo
from inverse.solvers.gaussian_law import StationaryPrior, hartley, opposite
from inverse.solvers.informed import Sight, informed_directions, law_of
from inverse.solvers.variational import RegularisedByDenoising, variational
from inverse.solvers.wiener import posterior_std, wiener
from tests.inverse.gaussian_denoiser import GaussianDenoiser, smooth_spectrum
from tests.inverse.test_wiener import make_scene
from tests.inverse.test_wiener_lens import make_scene as make_scene_through_a_lens

ALL = 1000  # directions
ANGLES = torch.linspace(-60, 60, 7, dtype=torch.float64)


def make(shape, grid: Grid, generator, snr=3.0, items=1):
    """Operator, exact denoiser of the prior, images (item, 1, tilt, y, x), and the noise of each tilt."""
    denoiser = GaussianDenoiser(smooth_spectrum(shape, length=6.0))
    physics = TiltProjection(ANGLES, shape, grid=grid)
    images = physics.A(denoiser.sample(items, generator))
    noise = float(images.var()) / snr * torch.linspace(0.5, 2, len(ANGLES), dtype=torch.float64)
    white = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return physics, denoiser, images + noise.sqrt()[:, None, None] * white, noise


def matrices(physics, denoiser, noise):
    """A (pixel, voxel), the variances of the pixels, and the posterior covariance."""
    shape = physics.volume_shape
    n = math.prod(shape)
    matrix = physics.A(torch.eye(n, dtype=torch.float64).reshape(n, 1, *shape)).reshape(n, -1).T
    variance = noise.repeat_interleave(math.prod(physics.image_shape))
    prior = denoiser.covariance()
    gain = prior @ matrix.T @ torch.linalg.inv(matrix @ prior @ matrix.T + torch.diag(variance))
    return matrix, variance, prior - gain @ matrix @ prior


def posterior(physics, denoiser, images, noise):
    """Mean and standard deviation of the voxels, and log p(images), of one stack."""
    matrix, variance, covariance = matrices(physics, denoiser, noise)
    y = images.double().flatten()
    seen = matrix @ denoiser.covariance() @ matrix.T + torch.diag(variance)
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), seen).log_prob(y)
    mean = covariance @ (matrix.T @ (y / variance))
    shape = physics.volume_shape
    return mean.reshape(shape), covariance.diagonal().sqrt().reshape(shape), evidence


def dense_covariance(law):
    """Of the volume (voxel, voxel), column by column."""
    shape = law.prior.shape
    n = math.prod(shape)
    unit = torch.eye(n, dtype=law.diagonal.dtype).reshape(n, 1, *shape)
    return law.times(unit).reshape(n, n)


def off(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


def gaussian_density(denoiser):
    """log p of the prior as a function, normalised."""
    precision, n = torch.linalg.inv(denoiser.covariance()), denoiser.spectrum.numel()
    constant = -0.5 * (denoiser.spectrum.log().sum() + n * math.log(2 * math.pi))

    def density(v):
        v = v.double().flatten(1)
        return constant - 0.5 * ((v @ precision) * v).sum(1)

    return density


CASES = [
    ((5, 4, 7), "stretched", torch.float64, 3.0, 1e-9),
    ((6, 5, 8), "camera", torch.float64, 300.0, 1e-8),
    ((5, 4, 7), "camera", torch.float32, 3.0, 1e-4),
    ((6, 5, 8), "stretched", torch.float32, 100.0, 1e-3),
]


@pytest.mark.parametrize(("shape", "grid", "dtype", "snr", "tolerance"), CASES)
def test_with_all_directions_it_is_the_posterior_and_the_bound_is_the_evidence(
    shape, grid, dtype, snr, tolerance, generator
):
    physics, denoiser, images, noise = make(shape, grid, generator, snr)
    mean, std, evidence = posterior(physics, denoiser, images, noise)
    prior = StationaryPrior.of(denoiser.spectrum)
    found = variational(physics, images[0, 0].to(dtype), prior, noise, rank=ALL, generator=generator)
    assert found.mean.dtype == found.std.dtype == dtype and found.mean.shape == shape
    assert off(found.mean, mean) < tolerance and off(found.std, std) < tolerance
    assert float((found.elbo - evidence).abs() / evidence.abs()) < tolerance


@pytest.mark.parametrize(("shape", "grid", "dtype", "snr", "tolerance"), CASES)
def test_a_log_density_that_is_gaussian_leads_to_the_same_by_draws(shape, grid, dtype, snr, tolerance, generator):
    """From a white reference, and with draws for all that is asked of the prior."""
    physics, denoiser, images, noise = make(shape, grid, generator, snr)
    mean, std, evidence = posterior(physics, denoiser, images, noise)
    density, told = gaussian_density(denoiser), []
    found = variational(
        physics,
        images[0, 0].to(dtype),
        density,
        noise,
        rank=ALL,
        steps=6,
        generator=generator,
        progress=lambda *at: told.append(at),
    )
    assert off(found.mean, mean) < tolerance and off(found.std, std) < tolerance
    assert float((found.elbo - evidence).abs() / evidence.abs()) < tolerance
    assert float(found.history[0]) < float(found.history[1]) and found.history.shape == (6,)
    assert told == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("thickness", [2.7, 5.0])
def test_the_gaussian_model_of_a_slab_and_its_marginal_likelihood(thickness, generator):
    shape = (4, 5, 6)
    physics, model, _, images = make_scene(shape, 4, thickness, generator)
    prior = StationaryPrior.of_model(model, shape)
    found = variational(physics, images, prior, model.noise, rank=ALL, generator=generator)
    assert off(found.mean, wiener(physics, images, model).volume) < 1e-9
    assert off(found.std, posterior_std(physics, model)) < 1e-7
    evidence = marginal_log_likelihood(images, physics.angles[0], physics.geometry, model)
    torch.testing.assert_close(found.elbo, evidence, rtol=1e-10, atol=0)


def test_through_a_lens(generator):
    physics, model, _, images = make_scene_through_a_lens((4, 6, 7), 5, 4.0, generator)
    prior = StationaryPrior.of_model(model, (4, 6, 7))
    found = variational(physics, images, prior, model.noise, rank=ALL, generator=generator)
    assert off(found.mean, wiener(physics, images, model).volume) < 1e-8
    assert off(found.std, posterior_std(physics, model)) < 1e-7


@pytest.mark.parametrize("grid", ["stretched", "camera"])
def test_items_of_a_batch_are_independent(grid, generator):
    physics, denoiser, images, noise = make((4, 5, 7), grid, generator, items=3)
    prior = StationaryPrior.of(denoiser.spectrum)
    found = variational(physics, images, prior, noise, rank=ALL, generator=generator)
    by_draws = variational(physics, images, gaussian_density(denoiser), noise, rank=ALL, steps=4, generator=generator)
    assert found.mean.shape == found.std.shape == (3, 1, 4, 5, 7) and found.elbo.shape == (3,)
    assert by_draws.law.samples(2, generator).shape == (2, 3, 1, 4, 5, 7)
    for i in range(3):
        mean, std, evidence = posterior(physics, denoiser, images[i], noise)
        for result in (found, by_draws):
            assert off(result.mean[i, 0], mean) < 1e-8 and off(result.std[i, 0], std) < 1e-8
            assert abs(float(result.elbo[i] / evidence) - 1) < 1e-8


def test_a_denoiser_as_prior_is_what_its_potential_says(generator):
    """The exact denoiser at sigma is the prior of the spectrum S + sigma^2."""
    physics, denoiser, images, noise = make((5, 6, 7), "camera", generator)
    sigma = 0.7
    red = RegularisedByDenoising(denoiser, sigma)
    found = variational(physics, images, red, noise, rank=ALL, steps=4, generator=generator)
    prior = StationaryPrior.of(denoiser.spectrum + sigma**2)
    expected = variational(physics, images, prior, noise, rank=ALL, generator=generator)
    assert off(found.mean, expected.mean) < 1e-8 and off(found.std, expected.std) < 1e-8
    with pytest.raises(ValueError, match="positive, finite sigma"):
        RegularisedByDenoising(denoiser, 0.0)


def test_without_directions_each_fourier_sample_has_the_inverse_of_its_own_precision(generator):
    """Which is less than its variance: a diagonal cannot say that the tilts confuse samples with each other."""
    shape = (5, 4, 7)
    physics, denoiser, images, noise = make(shape, "stretched", generator)
    _, std, _ = posterior(physics, denoiser, images, noise)
    covariance = matrices(physics, denoiser, noise)[2].to(torch.complex128)
    n = math.prod(shape)
    unit = torch.eye(n, dtype=torch.complex128).reshape(n, *shape)
    waves = torch.fft.fftn(unit, dim=(1, 2, 3), norm="ortho").flatten(1)
    alone = 1 / (waves @ torch.linalg.inv(covariance) @ waves.mH).diagonal().real
    own = (waves @ covariance @ waves.mH).diagonal().real
    prior = StationaryPrior.of(denoiser.spectrum)
    found = variational(physics, images[0, 0], prior, noise, rank=0, generator=generator)
    variances = (denoiser.spectrum * found.law.diagonal[0, 0]).flatten()
    torch.testing.assert_close(variances, alone, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.std, alone.mean().sqrt().expand(shape), rtol=1e-10, atol=0)
    assert (alone <= own * (1 + 1e-9)).all() and float((alone / own).min()) < 0.6
    assert float(found.std.square().mean()) < float(std.square().mean())
    assert len(found.information) == 0


@pytest.mark.parametrize("grid", ["stretched", "camera"])
def test_what_the_bound_lacks_is_the_divergence_from_the_posterior(grid, generator):
    """At any rank; and the law's own numbers are those of its dense covariance."""
    physics, denoiser, images, noise = make((5, 4, 7), grid, generator)
    _, _, evidence = posterior(physics, denoiser, images, noise)
    precision = torch.linalg.inv(matrices(physics, denoiser, noise)[2])
    for rank in (0, 15, 60, ALL):
        prior = StationaryPrior.of(denoiser.spectrum)
        found = variational(physics, images[0, 0], prior, noise, rank=rank, generator=generator)
        law = found.law
        covariance = dense_covariance(law)
        size = denoiser.spectrum.log().sum() + law.log_determinant[0]
        torch.testing.assert_close(torch.logdet(covariance), size, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(covariance.diagonal().sqrt().reshape(5, 4, 7), found.std, rtol=1e-9, atol=0)
        lacking = 0.5 * (torch.trace(precision @ covariance) - 140 - torch.logdet(precision @ covariance))
        assert abs(float(evidence - found.elbo - lacking)) < 4 * float(found.elbo_error) + 1e-8
        assert float(lacking) < (1e-9 if rank == ALL else 8)


def test_the_remainder_on_the_diagonal_is_worth_having(generator):
    """Against the best update of the prior of the same rank alone; and the bound of both is off by the divergence."""
    physics, denoiser, images, noise = make((6, 5, 8), "camera", generator, snr=30.0)
    precision = torch.linalg.inv(matrices(physics, denoiser, noise)[2])
    sight = Sight(physics, StationaryPrior.of(denoiser.spectrum), noise)
    directions = informed_directions(sight, 20, generator, images)
    mean, _, evidence = posterior(physics, denoiser, images, noise)
    best = (hartley(mean) / denoiser.spectrum.sqrt())[None, None]

    def lacking(remainder):
        tau = torch.ones_like(best)
        law = law_of(sight.prior, best, tau, directions._replace(remainder=remainder))
        product = precision @ dense_covariance(law)
        divergence = 0.5 * (torch.trace(product) - 240 - torch.logdet(product))
        bound, error = elbo(sight, images, law, tau, 600, generator)
        assert abs(float(evidence - divergence - bound)) < 4 * float(error) < 0.1 * float(divergence) + 2
        return float(divergence)

    assert lacking(directions.remainder) < 0.05 * lacking(torch.zeros_like(directions.remainder))


@pytest.mark.parametrize(("shape", "tilts"), [((5, 4, 7), 3), ((4, 3, 8), 3), ((3, 5, 6), 7)])
def test_as_many_directions_are_informed_as_the_images_have_independent_fourier_samples(shape, tilts, generator):
    """Of every ky on the stretched grid: one at kx = 0, else as many as there are tilts that resolve kx, or layers."""
    angles = torch.linspace(-50, 50, tilts, dtype=torch.float64)
    physics = TiltProjection(angles, shape, grid="stretched")
    prior = StationaryPrior.of(torch.ones(shape, dtype=torch.float64))
    sight = Sight(physics, prior, torch.tensor(1e-3, dtype=torch.float64))
    found = informed_directions(sight, ALL, generator, torch.zeros(1, dtype=torch.float64))
    n = math.prod(shape)
    matrix = physics.A(torch.eye(n, dtype=torch.float64).reshape(n, 1, *shape)).reshape(n, -1)
    values = torch.linalg.svdvals(matrix) ** 2 / 1e-3
    seeing = resolved(angles, physics.geometry).sum(1).clamp_max(shape[0])  # (k,)
    assert len(found.information) == shape[1] * int(1 + 2 * seeing[1:].sum())
    torch.testing.assert_close(found.information, values[: len(found.information)], rtol=1e-8, atol=1e-9)
    gram = found.vectors @ found.vectors.T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-10)


def test_few_directions_are_the_largest(generator):
    physics, denoiser, images, noise = make((6, 9, 11), "camera", generator)
    sight = Sight(physics, StationaryPrior.of(denoiser.spectrum), noise)
    everything = informed_directions(sight, ALL, generator, images).information
    few = informed_directions(sight, 24, generator, images).information
    torch.testing.assert_close(few[:16], everything[:16], rtol=1e-3, atol=0)


def test_draws_have_the_covariance_of_the_law(generator):
    physics, denoiser, images, noise = make((3, 2, 5), "camera", generator)
    prior = StationaryPrior.of(denoiser.spectrum)
    found = variational(physics, images[0, 0], prior, noise, rank=8, generator=generator)
    draws = found.law.samples(6000, generator).flatten(1)
    covariance = dense_covariance(found.law)
    scale = covariance.diagonal().sqrt()
    scatter = (1 + (covariance / scale / scale[:, None]) ** 2).sqrt() / 6000**0.5
    pull = (draws.T.cov() - covariance) / scale / scale[:, None] / scatter
    assert abs(float(pull.square().mean()) - 1) < 0.25
    assert float(((draws.mean(0) - found.mean.flatten()) / scale).abs().max()) < 5 / 6000**0.5


@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 3, 7), (1, 1, 9), (3, 45, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hartley_transform_is_its_own_inverse_and_diagonalises_what_is_stationary(shape, dtype, generator):
    v = torch.randn(2, *shape, generator=generator, dtype=dtype)
    torch.testing.assert_close(hartley(hartley(v)), v)
    strided = torch.randn(2, shape[2], shape[1], shape[0], generator=generator, dtype=dtype).permute(0, 3, 2, 1)
    torch.testing.assert_close(hartley(hartley(strided)), strided.contiguous())
    s = torch.rand(shape, generator=generator, dtype=dtype)
    s = s + opposite(s)
    filtered = torch.fft.ifftn(torch.fft.fftn(v, dim=(1, 2, 3)) * s, dim=(1, 2, 3)).real
    torch.testing.assert_close(hartley(hartley(v) * s), filtered)


def test_what_is_refused(generator):
    physics, denoiser, images, noise = make((4, 3, 5), "stretched", generator)
    prior = StationaryPrior.of(denoiser.spectrum)

    def run(**changed):
        given = {"physics": physics, "images": images, "prior": prior, "noise": noise, "generator": generator}
        return variational(**(given | changed))

    with pytest.raises(ValueError, match="each of 7 tilts"):
        run(noise=noise[:3])
    with pytest.raises(ValueError, match="positive, finite variances"):
        run(noise=-noise)
    with pytest.raises(ValueError, match="one channel"):
        run(images=images.expand(1, 2, -1, -1, -1))
    with pytest.raises(ValueError, match="one operator for all items"):
        run(
            physics=TiltProjection(ANGLES.expand(2, -1), (4, 3, 5), grid="stretched"),
            images=images.repeat(2, 1, 1, 1, 1),
        )
    with pytest.raises(ValueError, match="linear operator of tilt series"):
        run(physics=denoiser)
    with pytest.raises(ValueError, match=r"a prior of volumes \(4, 3, 5\)"):
        run(prior=StationaryPrior.of(torch.ones(4, 3, 6)))
    with pytest.raises(ValueError, match="a reference of the shape"):
        run(prior=gaussian_density(denoiser), reference=StationaryPrior.of(torch.ones(4, 3, 6)))
    with pytest.raises(ValueError, match="a finite number for each of 1 volumes"):
        run(prior=lambda v: v.sum())
    with pytest.raises(ValueError, match="rank of 0 or more"):
        run(rank=-1)
    with pytest.raises(ValueError, match="positive, finite spectrum"):
        StationaryPrior.of(torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match=r"S\(k\) = S\(-k\)"):
        StationaryPrior.of(torch.arange(1.0, 28.0).reshape(3, 3, 3))
