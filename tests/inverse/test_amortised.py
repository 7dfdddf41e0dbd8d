"""A network taught to tell posteriors, against those of a Gaussian prior in dense linear algebra."""

import math

import pytest
import torch

from inverse.physics.tilt import TiltProjection
from inverse.priors.amortised import AmortisedGaussian, contrasts, evidence_bound
from inverse.solvers.amortised import amortised, scene
from inverse.solvers.gaussian_law import StationaryPrior, hartley
from inverse.train_amortised import AmortisedPlan, train_amortised
from tests.inverse.gaussian_denoiser import GaussianDenoiser, smooth_spectrum
from tests.inverse.test_variational import ALL, ANGLES, off, posterior


def make_taught(contrast, shape=(5, 6, 7), steps=500):
    generator = torch.Generator().manual_seed(3)
    denoiser = GaussianDenoiser(smooth_spectrum(shape, length=6.0))
    physics = TiltProjection(ANGLES, shape, grid="stretched")
    unit = float(physics.A(denoiser.sample(1, generator)).var()) * torch.linspace(0.5, 2, 7, dtype=torch.float64)
    prior = StationaryPrior.of(denoiser.spectrum)
    known = scene(physics, prior, noise=unit, rank=ALL, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AmortisedGaussian(contrast)
    return physics, denoiser, unit, known, train_amortised(network, known, AmortisedPlan(steps=steps))


def test_a_taught_network_tells_the_posterior_of_images_it_has_not_seen(generator):
    """The family holds the optimum: within 0.02 nat of the evidence, at noise over a hundredfold range."""
    physics, denoiser, unit, known, network = make_taught(0.0)
    images = physics.A(denoiser.sample(3, generator))
    for n in (0.1, 1.0, 10.0):
        white = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        noisy = images + (n * unit).sqrt()[:, None, None] * white
        found = amortised(known, noisy, network, n, generator=generator)
        for i in range(3):
            mean, std, evidence = posterior(physics, denoiser, noisy[i], n * unit)
            assert off(found.mean[i, 0], mean) < 0.01 and off(found.std[i, 0], std) < 0.005
            assert -1e-6 < float(evidence - found.elbo[i]) < 0.02
        one = amortised(known, noisy[0, 0].float(), network, n, generator=generator)
        assert one.mean.shape == (5, 6, 7) and off(one.mean, found.mean[0, 0]) < 1e-4


def test_a_taught_network_finds_the_contrast_of_a_volume(generator):
    """Almost as good as if it were known, and nearly all of the evidence."""
    _, _, _, known, network = make_taught(0.5)
    network = network.double()
    for n, most in ((0.1, 0.5), (1.0, 1.0), (10.0, 2.0)):
        s = (known.information / n).expand(400, -1)
        c = torch.exp(0.5 * torch.randn(400, 1, generator=generator, dtype=torch.float64))
        u = c * torch.randn(s.shape, generator=generator, dtype=torch.float64)
        o = s.sqrt() * u + torch.randn(s.shape, generator=generator, dtype=torch.float64)
        law = network(o, s)
        logs, weights = contrasts(known.n, 0.5, o)
        variance = 1 + s[:1] * (2 * logs).exp()[:, None]  # (node, direction)
        each = -0.5 * ((o**2) @ (1 / variance).T + (2 * math.pi * variance).log().sum(1))
        evidence = torch.logsumexp(each + weights.log(), 1)
        bound = evidence_bound(law, o, s, known.n, 0.5, generator, draws=8)
        assert 0 < float((evidence - bound).mean()) < most
        error, best, plain = (
            float((m - u).square().mean())
            for m in (law.mean, c**2 * s.sqrt() / (1 + s * c**2) * o, s.sqrt() / (1 + s) * o)
        )
        assert error < 1.02 * best and plain - error > 0.8 * (plain - best)


def test_volumes_to_teach_with_have_the_coordinates_of_their_images(generator):
    """Without noise, those along the directions."""
    physics, denoiser, _, known, network = make_taught(0.0, (3, 4, 5), steps=1)
    volumes = denoiser.sample(4, generator)[:, 0]
    u = (hartley(volumes) / denoiser.spectrum.sqrt()).flatten(1)
    seen = known.observed(physics.A(volumes[:, None])) * known.information.rsqrt()
    torch.testing.assert_close(seen, u @ known.directions.vectors.T)
    plan = AmortisedPlan(steps=3)
    train_amortised(network, known, plan, volumes=list(volumes))
    with pytest.raises(ValueError, match="one volume or more"):
        train_amortised(network, known, plan, volumes=[volumes[0, :2]])


def test_what_is_refused(generator):
    _, _, unit, known, network = make_taught(0.0, (3, 4, 5), steps=1)
    images = torch.zeros(7, 4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="positive information"):
        AmortisedGaussian()(torch.ones(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="a contrast from 0 to 2"):
        AmortisedGaussian(-1.0)
    with pytest.raises(ValueError, match="positive, finite noise"):
        amortised(known, images, network, 0.0, generator=generator)
    with pytest.raises(ValueError, match="expected images"):
        amortised(known, images[:3], network, 1.0, generator=generator)
    with pytest.raises(ValueError, match="least <= greatest"):
        train_amortised(network, known, AmortisedPlan(noise=(2.0, 1.0)))
    with pytest.raises(ValueError, match="a rank of 1 or more"):
        scene(known.sight.physics, known.sight.prior, noise=unit, rank=0, generator=generator)
