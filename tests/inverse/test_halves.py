"""Half maps by thinning: independent, and nothing lost."""

import math

import pytest
import torch

import cryosim as cs
from cryosim.acquisition.series import Movie
from inverse.metrics.fsc import fsc
from inverse.metrics.halves import half_maps, half_series


def make_series(images, movies=None):
    tilts = cs.TiltScheme(angles=torch.arange(len(images)) * 3.0, doses=torch.full((len(images),), 2.0))
    return cs.TiltSeries(images=images, pixel_size=2.0, tilts=tilts, movies=movies)


def counts(generator, mean, *shape, dtype=torch.float64):
    return torch.poisson(torch.full(shape, mean, dtype=torch.float64), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_halves_sum_to_the_counts(generator, dtype):
    series = make_series(counts(generator, 3.0, 3, 17, 20, dtype=dtype), (Movie("a", 4), Movie("b", 4), Movie("c", 4)))
    first, second = half_series(series, generator=generator)
    assert torch.equal(first.images + second.images, series.images)
    assert first.images.dtype == dtype and bool((first.images >= 0).all()) and bool((second.images >= 0).all())
    assert first.movies is second.movies is None and series.movies is not None
    assert torch.equal(first.tilts.doses, series.tilts.doses) and first.pixel_size == series.pixel_size


@pytest.mark.parametrize("mean", [0.1, 4.0])
def test_noise_of_the_halves_is_independent_poisson(generator, mean):
    """Mean and variance are half the series', the correlation 0, each within 4 standard errors of 300 000 pixels."""
    series = make_series(counts(generator, mean, 3, 250, 400))
    first, second = (half.images.flatten() - mean / 2 for half in half_series(series, generator=generator))
    n, var = first.numel(), mean / 2
    fourth = var + 3 * var**2  # central moment of Poisson
    for half in (first, second):
        assert abs(float(half.mean())) < 4 * math.sqrt(var / n)
        assert abs(float(half.square().mean()) - var) < 4 * math.sqrt((fourth - var**2) / n)
    assert abs(float((first * second).mean()) / var) < 4 / math.sqrt(n)


def test_the_whole_and_a_half_are_not_independent(generator):
    """That the test above can fail: a half and the sum correlate by sqrt(1/2)."""
    series = make_series(counts(generator, 4.0, 1, 300, 300))
    first, _ = half_series(series, generator=generator)
    both = torch.stack([first.images.flatten(), series.images.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(math.sqrt(0.5), abs=0.02)


def test_half_maps_of_nothing_but_noise_do_not_correlate(generator):
    """Any linear reconstruction, here a stack of the images: the mean over the outer shells is within 4 / sqrt(N)."""
    series = make_series(counts(generator, 1.0, 24, 24, 24))
    first, second = half_maps(series, lambda half: half.images - half.images.mean(), generator=generator)
    curve = fsc(first, second, 2.0)
    n = float(curve.samples[3:].sum())
    pooled = float((curve.correlation * curve.samples)[3:].sum()) / n
    assert abs(pooled) < 4 / math.sqrt(n)
    assert bool((curve.correlation[3:].abs() < 4 / curve.samples[3:].sqrt()).all())


def test_half_maps_keep_the_signal(generator):
    """A signal of variance s in the mean counts m: the halves correlate by (s/4) / (s/4 + m/2); measured 0.002 off."""
    signal = torch.randn(20, 40, 41, generator=generator, dtype=torch.float64)
    series = make_series(torch.poisson((10 + 2 * signal).clamp_min(0), generator=generator))
    first, second = half_maps(series, lambda half: half.images.flatten(), generator=generator)
    assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) == pytest.approx(1 / (1 + 5), abs=0.02)


def test_the_same_seed_gives_the_same_halves(generator):
    series = make_series(counts(generator, 2.0, 2, 9, 9))
    drawn = [half_series(series, generator=torch.Generator().manual_seed(s))[0].images for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_rendered_images_are_refused(generator):
    series = make_series(counts(generator, 2.0, 2, 9, 9) + 0.5)
    with pytest.raises(ValueError, match="whole numbers"):
        half_maps(series, lambda half: half, generator=generator)
