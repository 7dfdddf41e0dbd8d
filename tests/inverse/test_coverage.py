"""Coverage of draws whose law is known."""

import math

import pytest
import torch

from inverse.metrics.coverage import _independent, coverage, interval_coverage, spread_skill
from inverse.metrics.fsc import measured_region

SHAPE = (10, 13, 16)


def draws(n, generator, width=1.0, shape=SHAPE, dtype=torch.float64):
    """n samples of the law that the truth is of, but `width` times as wide about its mean; and the truth."""
    made = torch.randn((n + 1, *shape), generator=generator, dtype=dtype)
    centre = 3.0 + torch.arange(shape[-1], dtype=dtype)
    return centre + width * made[1:], centre + made[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [SHAPE, (9, 12, 15)])
@pytest.mark.parametrize(("n", "level"), [(2, 0.9), (5, 0.9), (30, 0.5)])
def test_draws_of_the_truth_s_own_law_cover_as_often_as_the_level_says(n, level, shape, dtype, generator):
    samples, truth = draws(n, generator, shape=shape, dtype=dtype)
    found = coverage(samples, truth, level, measured_region(shape, [-60.0, 60.0]))
    scatter = math.sqrt(level * (1 - level) / truth.numel())
    assert abs(float(found.voxels) - level) < 4 * scatter
    assert abs(float(found.inside) - level) < 5.7 * scatter  # of half of the numbers, or so
    assert abs(float(found.outside) - level) < 8 * scatter
    assert abs(float(found.spread_skill) - 1) < 4 / math.sqrt(truth.numel())
    assert found.level == level


def test_frequencies_cover_alike(generator):
    """White draws: each shell within five times the scatter of the numbers in it, 4 pi r^2 of a 16-sample cube's."""
    samples, truth = draws(12, generator)
    found = coverage(samples, truth, 0.9, torch.ones(10, 13, 9, dtype=torch.bool))
    assert found.outside.isnan() and abs(float(found.inside) - 0.9) < 0.03
    assert torch.equal(found.frequency, torch.arange(9, dtype=torch.float64) / 16)
    radius = torch.arange(3, 6)  # whole shells: the shortest axis ends at 5 samples of 1 / 10, 8 of 1 / 16
    count = 4 * torch.pi * radius**2 * truth.numel() / 16**3
    assert ((found.by_frequency[radius] - 0.9).abs() < 5 * (0.09 / count).sqrt()).all()
    assert ((found.spread_skill_by_frequency[radius] - 1).abs() < 5 * (0.5 / count).sqrt()).all()


@pytest.mark.parametrize("shape", [(4, 5, 6), (3, 4, 7), (1, 1, 8)])
def test_a_volume_s_numbers_are_counted_once(shape):
    """Its Fourier samples are as many independent real numbers as it has voxels."""
    assert float(_independent(torch.Size(shape), torch.device("cpu")).sum()) == math.prod(shape)


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_too_narrow_and_too_wide(width, generator):
    """With many samples the interval is mean +- 1.645 width, and the truth is inside as erf has it.

    Measured at 0.5: 0.588 of 0.589. The mean of n samples adds width^2 / n to the variance of the difference.
    """
    n = 200
    samples, truth = draws(n, generator, width)
    found = coverage(samples, truth)
    expected = math.erf(1.6448536 * width / math.sqrt(2))
    assert abs(float(found.voxels) - expected) < 0.02
    assert abs(float(found.inside.nan_to_num(expected)) - expected) < 0.02
    assert abs(float(found.spread_skill) * width - 1) < 0.06
    tails = float(found.ranks[0] + found.ranks[-1]) * (n + 1) / 2
    assert tails > 5 if width < 1 else tails < 0.5


def test_ranks_are_even_for_any_law(generator):
    """Of an exponential law too, of which Student's interval is but an approximation."""
    made = torch.empty(10, 20, 20, 20, dtype=torch.float64).exponential_(generator=generator)
    found = coverage(made[1:], made[0])
    assert found.ranks.shape == (10,) and abs(float(found.ranks.sum()) - 1) < 1e-6
    assert ((found.ranks - 0.1).abs() < 4 * math.sqrt(0.09 / 8000)).all()


def test_a_shift_of_one_frequency_shows_there_alone(generator):
    samples, truth = draws(20, generator)
    wave = torch.cos(2 * torch.pi * 6 * torch.arange(16) / 16)
    shifted = coverage(samples + 3 * wave, truth)
    plain = coverage(samples, truth)
    away = [i for i in range(9) if i != 6]
    assert torch.allclose(shifted.by_frequency[away], plain.by_frequency[away], atol=1e-12)
    assert shifted.spread_skill_by_frequency[6] > 1.5 * plain.spread_skill_by_frequency[6]


def test_interval_of_a_known_deviation(generator):
    truth = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    zero, one = torch.zeros_like(truth), torch.ones_like(truth)
    assert abs(float(interval_coverage(zero, one, truth, 0.9)) - 0.9) < 0.03
    half = float(interval_coverage(zero, 0.5 * one, truth, 0.9))
    assert abs(half - math.erf(0.5 * 1.6448536 / math.sqrt(2))) < 0.045
    assert interval_coverage(zero, one, truth, 0.9, samples=3) > interval_coverage(zero, one, truth, 0.9)


def test_what_cannot_be_judged(generator):
    samples, truth = draws(3, generator)
    with pytest.raises(ValueError, match="two samples"):
        coverage(samples[:1], truth)
    with pytest.raises(ValueError, match="two samples or more"):
        spread_skill(samples, truth[1:])
    with pytest.raises(ValueError, match="not finite"):
        coverage(samples / 0, truth)
    with pytest.raises(ValueError, match="level between"):
        coverage(samples, truth, 90)
    with pytest.raises(ValueError, match="region"):
        coverage(samples, truth, region=torch.ones(SHAPE))
    with pytest.raises(ValueError, match="one shape"):
        interval_coverage(truth, truth[1:], truth)
    with pytest.raises(ValueError, match="no negative std"):
        interval_coverage(truth, -truth.abs(), truth)
