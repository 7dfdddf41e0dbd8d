"""Slopes of averages over random counts: bias and variance of every estimator against exact averages."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from cryosim.microscope.counting import events_per_frame, sample_counts
from cryosim.microscope.detector import Detector
from cryosim.microscope.likelihood import gaussian_counts, score_function

F64 = torch.float64


def camera(counting="poisson", shape=(5, 4), **fields):
    return Detector(shape, 1.0, counting=counting, **fields)


CAMERAS = {
    "poisson": (camera(), 1),
    "binary": (camera("binary"), 12),
    "dark": (camera(dark=torch.linspace(0, 0.02, 20, dtype=F64).reshape(5, 4)), 12),
    "coincidence": (camera("binary", coincidence_radius=1.7), 12),
}


def slopes_of(estimator, mean=5.0, n=200_000):
    """Mean and standard deviation of single-pixel estimates of the slope of E[(k - 2)^2]."""
    expected = torch.full((n, 1, 1), mean, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(estimator(expected), expected)
    return slope.mean().item(), slope.std().item()


def test_slope_of_the_loss_of_expected_counts():
    slope, spread = slopes_of(lambda e: ((e - 2) ** 2).sum())
    assert abs(slope - 6) < 1e-12 and spread < 1e-12  # 7 is right: loss'' / 2 is missing


def test_slope_of_gaussian_counts(generator):
    one = camera(shape=(1, 1))
    slope, spread = slopes_of(lambda e: ((gaussian_counts(e, one, generator=generator) - 2) ** 2).sum())
    wanted = math.sqrt(4 * ((3 / (2 * math.sqrt(5)) + math.sqrt(5)) ** 2 + 1 / 2))  # 5.98, by hand
    assert abs(slope - 7) < 5 * wanted / math.sqrt(200_000)
    assert abs(spread / wanted - 1) < 0.02


def test_gaussian_counts_miss_the_third_cumulant(generator):
    one = camera(shape=(1, 1))
    slope, spread = slopes_of(lambda e: (gaussian_counts(e, one, generator=generator) ** 3).sum(), n=2_000_000)
    assert abs(slope - (3 * 25 + 6 * 5)) < 5 * spread / math.sqrt(2_000_000)  # of Poisson counts it is 1 more
    assert 5 * spread / math.sqrt(2_000_000) < 0.5


@pytest.mark.parametrize(("baseline", "wanted"), [(None, 19.48), (14.0, 15.76)])
def test_slope_of_the_score_function(baseline, wanted, generator):
    one = camera(shape=(1, 1))

    def estimate(e):
        counts = sample_counts(e.detach(), one, generator=generator)
        return score_function(((counts - 2) ** 2)[:, 0, 0], counts, e, one, baseline=baseline)

    k = torch.arange(100, dtype=F64)
    p = torch.exp(torch.distributions.Poisson(torch.tensor(5.0, dtype=F64)).log_prob(k))
    single = ((k - 2) ** 2 - (baseline or 0.0)) * (k / 5 - 1)
    exact = math.sqrt((p * single**2).sum() - (p * single).sum() ** 2)
    assert abs((p * single).sum() - 7) < 1e-10 and abs(exact / wanted - 1) < 0.01
    slope, spread = slopes_of(estimate)
    assert abs(slope - 7) < 5 * exact / math.sqrt(200_000)
    assert abs(spread / exact - 1) < 0.04


@pytest.mark.parametrize("name", ["binary", "dark"])
@pytest.mark.parametrize("per", ["pixel", "image", "all"])
def test_score_function_of_other_cameras(name, per, generator):
    detector, frames = CAMERAS[name]
    expected = torch.linspace(0.4, 3, 20, dtype=F64).reshape(5, 4).requires_grad_()

    def exact(e):  # of the sum over pixels of sqrt(k), from the probabilities of each count
        mean = events_per_frame(e, detector, frames)
        k = torch.arange(60, dtype=F64)[:, None, None]
        if detector.counting == "binary":
            distribution = torch.distributions.Binomial(frames, -torch.expm1(-mean))
            k = k[: frames + 1]
        else:
            distribution = torch.distributions.Poisson(frames * mean)
        return (k.sqrt() * torch.exp(distribution.log_prob(k))).sum()

    (wanted,) = torch.autograd.grad(exact(expected), expected)
    n = 20_000
    many = expected.detach().expand(n, 5, 4).clone().requires_grad_()
    counts = sample_counts(many.detach(), detector, frames, generator=generator)
    loss = counts.sqrt()
    loss = {"pixel": loss, "image": loss.sum((-2, -1)), "all": loss.sum()}[per]
    baseline = {"pixel": counts.sqrt().mean(0), "image": loss.mean(), "all": loss}[per]
    value = score_function(loss, counts, many, detector, frames, baseline=baseline)
    torch.testing.assert_close(value, loss.sum())
    if per == "all":  # one number for all: of the baseline itself nothing is left
        assert torch.autograd.grad(value, many)[0].abs().max() == 0
        return
    (slope,) = torch.autograd.grad(value, many)
    error = slope.std(0) / math.sqrt(n)
    assert ((slope.mean(0) - wanted).abs() < 5 * error).all()
    assert (error < (0.02 if per == "pixel" else 0.05)).all()


def test_score_function_keeps_the_slope_of_the_loss_itself(generator):
    one, expected = camera(shape=(1, 1)), torch.full((1, 1), 5.0, dtype=F64, requires_grad=True)
    counts = sample_counts(expected.detach(), one, generator=generator)
    loss = (counts - expected).square().sum()
    (slope,) = torch.autograd.grad(score_function(loss, counts, expected, one), expected)
    k = counts.item()
    torch.testing.assert_close(slope.item(), (k - 5) ** 2 * (k / 5 - 1) - 2 * (k - 5))


@pytest.mark.parametrize("name", ["poisson", "binary", "dark"])
def test_gaussian_counts_have_the_moments_of_counts(name, generator):
    detector, frames = CAMERAS[name]
    expected = torch.linspace(0.3, 6, 20, dtype=F64).reshape(5, 4).expand(40_000, 5, 4)
    smooth = gaussian_counts(expected, detector, frames, generator=generator)
    counts = sample_counts(expected, detector, frames, generator=generator)
    error = (counts.var(0) * 2 / 40_000).sqrt()
    assert ((smooth.mean(0) - counts.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(smooth.var(0), counts.var(0), rtol=0.08, atol=0)


@pytest.mark.parametrize("name", CAMERAS)
def test_gaussian_counts_against_finite_differences(name, generator):
    detector, frames = CAMERAS[name]
    expected = (0.2 + torch.rand(2, 5, 4, generator=generator, dtype=F64)).requires_grad_()
    state = generator.get_state()

    def draw(e):
        return gaussian_counts(e, detector, frames, generator=generator.set_state(state))

    assert gradcheck(draw, expected)
    assert gaussian_counts(expected.float(), detector, frames).dtype == torch.float32


def test_gaussian_counts_of_nothing_have_a_finite_slope():
    for value in (0.0, 1e-12):
        expected = torch.full((5, 4), value, dtype=F64, requires_grad=True)
        (slope,) = torch.autograd.grad(gaussian_counts(expected, camera()).sum(), expected)
        assert torch.isfinite(slope).all()


def test_what_no_draw_is_for():
    with pytest.raises(ValueError, match="no negative"):
        gaussian_counts(torch.tensor([[-1.0]]), camera(shape=(1, 1)))
    with pytest.raises(ValueError, match="loss"):
        score_function(torch.ones(3), torch.ones(2, 5, 4), torch.ones(2, 5, 4), camera())
