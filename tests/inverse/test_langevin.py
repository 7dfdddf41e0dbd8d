"""Langevin walks against the posterior of a Gaussian prior, and as a check of what other methods say of the std."""

import math

import pytest
import torch

from inverse.metrics.walks import WalkMoments
from inverse.physics.gaussian import GaussianModel
from inverse.physics.tilt import TiltProjection
from inverse.solvers.gaussian_law import StationaryPrior
from inverse.solvers.langevin import Damped, langevin, score_of
from inverse.solvers.variational import variational
from inverse.solvers.wiener import posterior_std, wiener
from tests.inverse.dense_gaussian import dense
from tests.inverse.test_variational import ALL, ANGLES, gaussian_density, make, matrices, posterior
from tests.inverse.test_wiener import make_scene


def pulls(found, mean, std, covariance):
    """Mean squares of what mean and std are off by, over what they say they are off by.

    That of the mean over all directions alike, in units of the posterior's own deviations: neighbouring voxels err
    together, and a few smooth directions would decide.
    """
    away = (found.mean - mean).double().flatten()
    of_mean = away @ torch.linalg.solve(covariance, away) / away.numel() / (1 / found.ess).double().mean()
    return float(of_mean), float(((found.std - std) / found.std_error).square().mean())


@pytest.mark.parametrize(
    ("shape", "grid", "dtype", "rank", "steps"),
    [
        ((4, 5, 7), "stretched", torch.float64, ALL, 640),
        ((5, 4, 6), "camera", torch.float32, ALL, 640),
        ((5, 4, 6), "camera", torch.float64, 0, 960),  # M is diagonal in Fourier space: a longer memory
    ],
)
def test_adjusted_walks_have_the_mean_and_std_of_the_posterior(shape, grid, dtype, rank, steps, generator):
    physics, denoiser, images, noise = make(shape, grid, generator)
    mean, std, _ = posterior(physics, denoiser, images, noise)
    prior = StationaryPrior.of(denoiser.spectrum)
    law = variational(physics, images.to(dtype), prior, noise, rank=rank, generator=generator).law
    found = langevin(
        physics,
        images[0, 0].to(dtype),
        None,
        noise,
        log_density=gaussian_density(denoiser),
        steps=steps,
        walks=8,
        precondition=law,
        generator=generator,
    )
    assert found.mean.dtype == found.std.dtype == dtype and found.mean.shape == shape
    assert ((found.acceptance > 0.4) & (found.acceptance < 0.8)).all() and found.acceptance.shape == (8,)
    assert float(found.rhat.max()) < 1.1 and float(found.ess.min()) > 200
    of_mean, of_std = pulls(found, mean, std, matrices(physics, denoiser, noise)[2])
    assert 0.5 < of_mean < 2 and 0.5 < of_std < 2
    assert abs(float((found.std / std).mean()) - 1) < 0.03


def test_items_of_a_batch_walk_by_themselves(generator):
    physics, denoiser, images, noise = make((4, 3, 5), "stretched", generator, items=2)
    density = gaussian_density(denoiser)
    each = variational(physics, images, density, noise, rank=ALL, steps=4, generator=generator).law
    assert len(each.diagonal) == 2  # a covariance for each item; the first serves both, too
    for law in (each, each._replace(**{name: getattr(each, name)[:1] for name in each._fields[2:]})):
        found = langevin(
            physics,
            images,
            None,
            noise,
            log_density=density,
            steps=320,
            walks=6,
            precondition=law,
            generator=generator,
        )
        assert found.mean.shape == found.std.shape == (2, 1, 4, 3, 5) and found.acceptance.shape == (6, 2)
        for i in range(2):
            mean, std, _ = posterior(physics, denoiser, images[i], noise)
            parts = {name: getattr(found, name)[i, 0] for name in ("mean", "std", "std_error", "ess")}
            covariance = matrices(physics, denoiser, noise)[2]
            assert all(0.4 < pull < 2.5 for pull in pulls(found.replace(**parts), mean, std, covariance))


@pytest.mark.parametrize("step_size", [0.2, 0.8])
def test_the_bias_of_unadjusted_walks_is_that_of_the_step_size(step_size, generator):
    """With M the posterior's covariance every direction has p = 1 in equation (2)."""
    physics, denoiser, images, noise = make((4, 5, 7), "stretched", generator)
    _, std, _ = posterior(physics, denoiser, images, noise)
    prior = StationaryPrior.of(denoiser.spectrum)
    law = variational(physics, images, prior, noise, rank=ALL, generator=generator).law

    def score(v):
        waves = torch.fft.fftn(v, dim=(2, 3, 4)) / denoiser.spectrum
        return -torch.fft.ifftn(waves, dim=(2, 3, 4)).real

    found = langevin(
        physics,
        images[0, 0],
        score,
        noise,
        adjust=False,
        step_size=step_size,
        steps=int(120 / step_size),
        walks=8,
        precondition=law,
        generator=generator,
    )
    assert (found.acceptance == 1).all() and found.step_size == step_size
    expected = std * (1 - step_size / 4) ** -0.5
    assert abs(float((found.std / expected).mean()) - 1) < 0.02
    assert 0.5 < float(((found.std - expected) / found.std_error).square().mean()) < 2


def test_a_denoiser_s_score_serves_unadjusted_walks(generator):
    """Tweedie's score at sigma is that of the spectrum S + sigma^2."""
    physics, denoiser, images, noise = make((4, 5, 6), "stretched", generator)
    prior = StationaryPrior.of(denoiser.spectrum + 0.25)
    exact = variational(physics, images[0, 0], prior, noise, rank=ALL, generator=generator)
    found = langevin(
        physics,
        images[0, 0],
        score_of(denoiser, 0.5),
        noise,
        adjust=False,
        step_size=0.2,
        steps=640,
        walks=8,
        precondition=exact.law,
        generator=generator,
    )
    assert abs(float((found.std / exact.std).mean()) / (1 - 0.05) ** -0.5 - 1) < 0.02
    denoiser.spectrum = prior.spectrum
    covariance = matrices(physics, denoiser, noise)[2]
    assert 0.5 < pulls(found, exact.mean, exact.std, covariance)[0] < 2


@pytest.mark.parametrize("grid", ["stretched", "camera"])
def test_the_damped_inverse_and_its_draws_are_one_covariance(grid, generator):
    shape = (3, 2, 5)
    physics = TiltProjection(ANGLES, shape, grid=grid, tolerance=1e-11)
    n = math.prod(shape)
    unit = torch.eye(n, dtype=torch.float64).reshape(n, 1, *shape)
    matrix = physics.A(unit).reshape(n, -1).T
    for noise in (torch.tensor(2.0), torch.linspace(1.0, 4.0, 7)):
        variance = noise.double().expand(7).repeat_interleave(10)
        covariance = torch.linalg.inv(matrix.T @ (matrix / variance[:, None]) + torch.eye(n) / 0.8**2)
        damped = Damped(physics, noise.double(), 0.8)
        torch.testing.assert_close(damped.times(unit).reshape(n, n), covariance, rtol=1e-7, atol=1e-9)
        draws = damped.noise(torch.zeros(6000, 1, *shape, dtype=torch.float64), generator).flatten(1)
        scale = covariance.diagonal().sqrt()
        scatter = (1 + (covariance / scale / scale[:, None]) ** 2).sqrt() / 6000**0.5
        pull = (draws.T.cov() - covariance) / scale / scale[:, None] / scatter
        assert abs(float(pull.square().mean()) - 1) < 0.25


@pytest.mark.slow
def test_a_poor_preconditioner_costs_steps_but_no_truth(generator):
    """A prior of nearly even power, so that the default, of white volumes, is not far off."""
    physics, denoiser, images, noise = make((4, 3, 6), "stretched", generator)
    denoiser.spectrum = 0.3 * denoiser.spectrum.mean() + 0.2 * denoiser.spectrum
    noise = noise.mean()
    mean, std, _ = posterior(physics, denoiser, images, noise.expand(7))
    how = {"log_density": gaussian_density(denoiser), "steps": 1600, "walks": 8, "generator": generator}
    found = langevin(physics, images[0, 0], None, noise, **how)
    covariance = matrices(physics, denoiser, noise.expand(7))[2]
    assert all(0.4 < pull < 2.5 for pull in pulls(found, mean, std, covariance))
    assert float(found.rhat.max()) < 1.1


def smoothed_variation(weight, width):
    """log p of volumes whose gradient is sparse, by a root that is round at 0, with a weak Gaussian beside it."""

    def density(v):
        v = v.double()
        steps = sum((v.roll(-1, axis) - v).square() for axis in (-1, -2, -3))
        length = (steps + width**2).sqrt() - width
        return -weight * length.flatten(1).sum(1) - 0.05 * v.square().flatten(1).sum(1)

    return density


@pytest.mark.parametrize(
    ("snr", "width", "steps", "together"),
    [
        (1.0, 0.3, 640, 1.1),
        pytest.param(1.0, 0.3, 6000, 1.02, marks=pytest.mark.slow),
        pytest.param(10.0, 0.1, 6000, 1.02, marks=pytest.mark.slow),
    ],
)
def test_walks_confirm_the_variational_law_of_a_prior_that_is_not_gaussian(snr, width, steps, together, generator):
    """Total variation: means within a tenth of a deviation, and the std to 3 % on average over the voxels.

    Not in each voxel: the site is the same everywhere, and a voxel by an edge is less certain than it says.
    """
    shape = (5, 6, 7)
    physics = TiltProjection(ANGLES, shape, grid="stretched")
    truth = torch.zeros(1, 1, *shape, dtype=torch.float64)
    truth[..., 1:4, 2:5, 2:5] = 2.0
    clean = physics.A(truth)
    noise = float(clean.var()) / snr
    images = clean + noise**0.5 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    density = smoothed_variation(2.0, width)
    found = variational(physics, images[0, 0], density, noise, rank=ALL, generator=generator)
    how = {"log_density": density, "steps": steps, "walks": 8, "precondition": found.law, "generator": generator}
    walked = langevin(physics, images[0, 0], None, noise, **how)
    assert float(walked.rhat.max()) < together
    away = (((found.mean - walked.mean) / walked.std) ** 2).mean().sqrt()
    assert float(away) < 0.1
    ratio = found.std / walked.std
    assert abs(float(ratio.mean()) - 1) < 0.03 and 0.6 < float(ratio.min()) < float(ratio.max()) < 1.25
    last = found.history[-10:]
    assert float(last.mean()) > float(found.history[0]) and float(last.std()) < 0.01 * float(last.mean().abs())


def test_walks_confirm_the_std_of_the_wiener_filter(generator):
    """And of the variational law: one scene, three ways."""
    shape = (4, 5, 6)
    physics, model, _, images = make_scene(shape, 4, 5.0, generator)
    assert isinstance(model, GaussianModel)
    matrix, covariance, seen = dense(physics, model)
    precision = torch.linalg.inv(covariance)

    def density(v):
        v = v.double().flatten(1)
        return -0.5 * ((v @ precision) * v).sum(1)

    prior = StationaryPrior.of_model(model, shape)
    law = variational(physics, images, prior, model.noise, rank=20, generator=generator)
    found = langevin(
        physics,
        images,
        None,
        model.noise,
        log_density=density,
        steps=800,
        walks=8,
        precondition=law.law,
        generator=generator,
    )
    expected = posterior_std(physics, model)
    left = covariance - covariance @ matrix.T @ torch.linalg.solve(seen, matrix @ covariance)
    assert all(0.5 < pull < 2 for pull in pulls(found, wiener(physics, images, model).volume, expected, left))
    assert abs(float((found.std / expected).mean()) - 1) < 0.02
    assert abs(float((law.std / found.std).mean()) - 1) < 0.03


def test_moments_of_a_walk_know_their_own_error(generator):
    """Autoregressive walks of memory a: effective samples n (1 - a) / (1 + a), and errors that hold."""
    a, steps, walks = 0.8, 4000, 4
    v = torch.randn(walks, 1, 5, 6, 7, generator=generator, dtype=torch.float64)
    record = WalkMoments.empty(v, torch.full_like(v, 0.5), steps)
    for step in range(steps):
        v = a * v + (1 - a**2) ** 0.5 * torch.randn(v.shape, generator=generator, dtype=torch.float64)
        record.add(v, step)
    mean, std, mean_error, std_error, ess, rhat = record.summary(walks)
    assert mean.shape == (1, 1, 5, 6, 7)
    assert abs(float(ess.median()) / (walks * steps * (1 - a) / (1 + a)) - 1) < 0.1
    assert abs(float((mean / mean_error).square().mean()) - 1) < 0.3
    assert abs(float(((std - 1) / std_error).square().mean()) - 1) < 0.3
    assert float(rhat.max()) < 1.02


def test_walks_that_have_not_met_are_told(generator):
    v = torch.zeros(2, 1, 1, 1, 1, dtype=torch.float64)
    record = WalkMoments.empty(v, v, 320)
    for step in range(320):
        noise = torch.randn(v.shape, generator=generator, dtype=torch.float64)
        record.add(noise + torch.tensor([0.0, 3.0]).reshape(2, 1, 1, 1, 1), step)
    assert float(record.summary(2)[-1]) > 1.5


def test_the_same_generator_walks_the_same_way_and_progress_is_told(generator):
    physics, denoiser, images, noise = make((3, 2, 5), "stretched", generator)
    before, told = torch.random.get_rng_state(), []

    def run(**changed):
        own = torch.Generator().manual_seed(1)
        given = {"log_density": gaussian_density(denoiser), "steps": 8, "burn_in": 4, "generator": own}
        return langevin(physics, images[0, 0], None, noise, **(given | changed))

    one, other = run(progress=lambda *at: told.append(at)), run()
    assert torch.equal(one.mean, other.mean) and told == [(i, 12) for i in range(1, 13)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert run(start=torch.zeros(3, 2, 5)).mean.shape == (3, 2, 5)


def test_what_is_refused(generator):
    physics, denoiser, images, noise = make((3, 2, 5), "stretched", generator)

    def run(**changed):
        given = {"score": score_of(denoiser, 0.5), "steps": 50, "adjust": False, "generator": generator}
        given |= {"physics": physics, "images": images[0, 0], "noise": noise}
        return langevin(**(given | changed))

    with pytest.raises(ValueError, match="expected a log_density"):
        run(adjust=True)
    with pytest.raises(ValueError, match="expected a log_density"):
        run(score=None)
    with pytest.raises(ValueError, match="steps of 1 or more"):
        run(steps=0)
    with pytest.raises(ValueError, match="positive, finite step_size"):
        run(step_size=-0.1)
    with pytest.raises(ValueError, match=r"a start \(3, 2, 5\)"):
        run(start=torch.zeros(3, 2, 4))
    with pytest.raises(ValueError, match="one operator for all items"):
        run(physics=TiltProjection(ANGLES.expand(2, -1), (3, 2, 5), grid="stretched"))
    with pytest.raises(ValueError, match="diverged at step"):
        run(step_size=1e4, steps=50)
    with pytest.raises(ValueError, match="the prior's precision at the start"):
        run(score=lambda v: v)
