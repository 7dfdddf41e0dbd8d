"""Likelihoods of counts and events against their closed forms, sums over all outcomes and finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cryosim.microscope.counting import sample_counts, sample_events
from cryosim.microscope.detector import Detector
from cryosim.microscope.events import Events
from cryosim.microscope.gain import gain_corrected
from cryosim.microscope.likelihood import (
    event_negative_log_likelihood,
    fisher_information,
    negative_log_likelihood,
)

F64 = torch.float64


def camera(counting="poisson", shape=(5, 4), **fields):
    return Detector(shape, 1.0, counting=counting, **fields)


CAMERAS = {
    "poisson": (camera(), 1),
    "binary": (camera("binary"), 12),
    "dark": (camera(dark=torch.linspace(0, 0.02, 20, dtype=F64).reshape(5, 4)), 12),
    "coincidence": (camera("binary", coincidence_radius=1.7), 12),
}


def pixels(values, dtype=F64):
    return torch.as_tensor(values, dtype=dtype)[:, None, None]


# values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e-12, 1e-3, 0.7, 5.0, 40.0])
def test_poisson_probabilities_add_up_to_one(mean):
    k = pixels(range(200))
    log = negative_log_likelihood(k, torch.full_like(k, mean), camera(shape=(1, 1)))
    torch.testing.assert_close(torch.exp(-log).sum(), torch.tensor(1.0, dtype=F64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("frames", [1, 3, 14, 15, 60, 1000])
@pytest.mark.parametrize("rate", [1e-12, 1e-3, 0.3, 0.69, 0.7, 4.0, 40.0])
def test_binary_probabilities_add_up_to_one(rate, frames):
    k = pixels(range(frames + 1))
    log = negative_log_likelihood(k, torch.full_like(k, rate * frames), camera("binary", (1, 1)), frames)
    torch.testing.assert_close(torch.exp(-log).sum(), torch.tensor(1.0, dtype=F64), rtol=1e-12, atol=0)


def test_values_are_those_of_torch_distributions(generator):
    expected = 6 * torch.rand(3, 2, 5, 4, generator=generator, dtype=F64)
    counts = torch.poisson(expected, generator=generator)
    wanted = -torch.distributions.Poisson(expected).log_prob(counts).sum((-2, -1))
    torch.testing.assert_close(negative_log_likelihood(counts, expected, camera()), wanted, rtol=1e-12, atol=0)
    wanted = -torch.distributions.Binomial(40, 1 - torch.exp(-expected / 40)).log_prob(counts).sum((-2, -1))
    found = negative_log_likelihood(counts, expected, camera("binary"), 40)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)


def test_many_frames_turn_a_binary_camera_into_a_poisson_one():
    k, expected = pixels([0.0, 1.0, 4.0, 9.0]), pixels([0.3, 0.3, 5.0, 5.0])
    poisson = negative_log_likelihood(k, expected, camera(shape=(1, 1)))
    gaps = [
        (negative_log_likelihood(k, expected, camera("binary", (1, 1)), n) - poisson).abs().max()
        for n in (10**3, 10**5)
    ]
    assert 50 < gaps[0] / gaps[1] < 200 and gaps[1] < 1e-3  # the difference falls as 1 / frames


def test_nothing_expected():
    k = pixels([0.0, 1.0])
    for detector, frames in ((camera(shape=(1, 1)), 1), (camera("binary", (1, 1)), 7)):
        expected = torch.zeros_like(k, requires_grad=True)
        value = negative_log_likelihood(k, expected, detector, frames)
        assert value.tolist() == [0.0, math.inf]
        (slope,) = torch.autograd.grad(value.sum(), expected)
        assert slope.flatten().tolist() == [1.0, -math.inf]


@pytest.mark.parametrize("name", CAMERAS)
def test_negative_means_are_outside(name):
    detector, frames = CAMERAS[name]
    expected = torch.full((5, 4), 0.5, dtype=F64)
    expected[2, 1] = -1.0
    expected.requires_grad_()
    value = negative_log_likelihood(torch.zeros(5, 4), expected, detector, frames)
    (slope,) = torch.autograd.grad(value, expected)
    assert value == math.inf and not slope[2, 1].isfinite()
    if name != "coincidence":
        assert slope[2, 1] == -math.inf and slope.isfinite().sum() == 19


@pytest.mark.parametrize("rate", [1e-12, 1e-7, 1e-3])
def test_tiny_rates_keep_their_precision(rate):
    for dtype, tolerance in ((F64, 1e-13), (torch.float32, 2e-6)):
        k, expected = pixels([0, 1], dtype), pixels([328 * rate] * 2, dtype).requires_grad_()
        value = negative_log_likelihood(k, expected, camera("binary", (1, 1)), 328)
        wanted = [328 * rate, -math.log(-math.expm1(-rate)) + 327 * rate - math.log(328)]
        torch.testing.assert_close(value.double(), torch.tensor(wanted, dtype=F64), rtol=tolerance, atol=0)
        (slope,) = torch.autograd.grad(value.sum(), expected)
        wanted = pixels([1.0, (-1 / math.expm1(rate) + 327) / 328])
        torch.testing.assert_close(slope.double(), wanted, rtol=tolerance, atol=0)


def test_many_counts_are_precise_in_float32():
    k = pixels([999_000.0, 1_000_000.0, 1_002_500.0], torch.float32)
    expected = torch.full_like(k, 1e6)
    detector, binary = camera(shape=(1, 1)), camera("binary", (1, 1))
    single = negative_log_likelihood(k, expected, detector)
    double = negative_log_likelihood(k.double(), expected.double(), detector)
    direct = -torch.distributions.Poisson(expected.double()).log_prob(k.double()).flatten()
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)  # terms of 1e7 cancel
    torch.testing.assert_close(double, direct, rtol=1e-7, atol=0)
    single = negative_log_likelihood(k, 2 * expected, binary, 2_000_000)
    double = negative_log_likelihood(k.double(), 2 * expected.double(), binary, 2_000_000)
    assert single.dtype == torch.float32 and double.dtype == F64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CAMERAS)
def test_items_do_not_mix_and_frames_may_differ(name, generator):
    detector, frames = CAMERAS[name]
    expected = torch.rand(2, 3, 5, 4, generator=generator, dtype=F64)
    counts = torch.poisson(expected, generator=generator)
    many = frames * torch.tensor([1, 2, 3])
    value = negative_log_likelihood(counts, expected, detector, many)
    assert value.shape == (2, 3)
    for i in range(2):
        for t in range(3):
            alone = negative_log_likelihood(counts[i, t], expected[i, t], detector, frames * (t + 1))
            torch.testing.assert_close(value[i, t], alone, rtol=1e-13, atol=1e-13)
    expected[1, 1:] += 1
    changed = negative_log_likelihood(counts, expected, detector, many)
    assert (changed[0] == value[0]).all() and changed[1, 0] == value[1, 0]
    assert (changed[1, 1:] != value[1, 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_precision_follows_the_electrons(dtype, generator):
    expected = torch.rand(3, 5, 4, generator=generator, dtype=F64) * 8
    counts = torch.poisson(expected, generator=generator)
    exact = negative_log_likelihood(counts, expected, camera())
    found = negative_log_likelihood(counts.to(torch.int32), expected.to(dtype), camera())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=1e-12 if dtype == F64 else 1e-6, atol=0)


def test_the_gamma_function_between_whole_numbers():
    expected = torch.full((1, 1), 3.0, dtype=F64, requires_grad=True)
    value = negative_log_likelihood(torch.tensor([[2.5]], dtype=F64), expected, camera(shape=(1, 1)))
    torch.testing.assert_close(value.item(), 3 - 2.5 * math.log(3) + math.lgamma(3.5))
    torch.testing.assert_close(torch.autograd.grad(value, expected)[0].item(), 1 - 2.5 / 3)


def test_the_gain_belongs_to_the_expected_counts(generator):
    # electrons e of a flat image: the slope of the camera's own counts is a score, of mean 0 and with the variance that
    # the likelihood believes; that of images divided by the gain is off by g - 1 of each pixel
    n, shape = 4000, (3, 2)
    gain = torch.tensor([[0.4, 1.3], [1.0, 0.8], [1.5, 1.0]], dtype=F64)
    detector = camera(shape=shape, gain=gain)
    electrons = torch.full(shape, 5.0, dtype=F64, requires_grad=True)
    counts = sample_counts((gain * electrons.detach()).expand(n, *shape), detector, generator=generator)

    def slope(images):  # mean over the draws
        value = negative_log_likelihood(images, (gain * electrons).expand(n, *shape), detector).mean()
        return torch.autograd.grad(value, electrons)[0]

    error = (gain / 5 / n).sqrt()
    assert ((slope(counts) / error).abs() < 5).all()
    divided = gain_corrected(counts, detector)
    assert (((slope(divided) - (gain - 1)) * gain / error).abs() < 5).all()


def test_a_dead_pixel_tells_repaired_images():
    gain = torch.ones(5, 4, dtype=F64)
    gain[2, 1] = 0
    detector = camera(gain=gain)
    counts = 3 * gain
    assert negative_log_likelihood(counts, 3 * gain, detector).isfinite()
    repaired = gain_corrected(counts, detector)
    assert negative_log_likelihood(repaired, 3 * gain, detector) == math.inf


def test_most_likely_rate_of_a_binary_camera():
    frames, k = 50, pixels([1.0, 20.0, 49.0])
    best = (-frames * torch.log1p(-k / frames)).requires_grad_()
    value = negative_log_likelihood(k, best, camera("binary", (1, 1)), frames)
    slope, curvature = torch.func.grad, lambda f: torch.func.grad(torch.func.grad(f))

    def one(e, counts):
        return negative_log_likelihood(counts, e[None, None], camera("binary", (1, 1)), frames)

    for e, counts, v in zip(best.flatten(), k, value, strict=True):
        assert abs(slope(one)(e, counts)) < 1e-13
        assert v < one(1.01 * e, counts) and v < one(0.99 * e, counts)
        information = fisher_information(e[None, None], camera("binary", (1, 1)), frames)
        torch.testing.assert_close(curvature(one)(e, counts), information[0, 0])  # counts at their mean


# slopes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAMERAS)
def test_slopes_against_finite_differences(name, generator):
    detector, frames = CAMERAS[name]
    expected = (0.2 + 3 * torch.rand(2, 5, 4, generator=generator, dtype=F64)).requires_grad_()
    counts = torch.poisson(expected.detach(), generator=generator)
    counts[0, 0, 0], counts[0, 0, 1] = 0, 12

    def value(e):
        return negative_log_likelihood(counts, e, detector, frames)

    assert gradcheck(value, expected, check_forward_ad=name != "coincidence")
    if name != "coincidence":
        assert gradgradcheck(value, expected)


@pytest.mark.parametrize("rate", [1e-4, 0.6931, 0.6932, 3.0, 30.0])
def test_binary_slopes_at_both_ends(rate):
    frames = 9
    k = pixels([0.0, 9.0])
    expected = torch.full_like(k, rate * frames, requires_grad=True)
    value = negative_log_likelihood(k, expected, camera("binary", (1, 1)), frames)
    wanted = torch.tensor([9 * rate, -9 * math.log1p(-math.exp(-rate))], dtype=F64)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-17)
    (slope,) = torch.autograd.grad(value.sum(), expected)
    torch.testing.assert_close(slope.flatten()[1].item(), -1 / math.expm1(rate), rtol=1e-10, atol=1e-16)


def test_slopes_in_the_coincidence_radius_and_dark_events():
    expected = torch.full((5, 4), 2.0, dtype=F64)
    counts = torch.arange(20.0).reshape(5, 4) % 3

    def value(radius, dark):
        return negative_log_likelihood(counts, expected, camera(coincidence_radius=radius, dark=dark), 12)

    radius = torch.tensor(1.2, dtype=F64, requires_grad=True)
    dark = torch.full((5, 4), 0.01, dtype=F64, requires_grad=True)
    assert gradcheck(value, (radius, dark))


@pytest.mark.parametrize("name", CAMERAS)
def test_vmap_over_images(name, generator):
    detector, frames = CAMERAS[name]
    expected = torch.rand(3, 5, 4, generator=generator, dtype=F64)
    counts = torch.poisson(expected, generator=generator)
    found = torch.func.vmap(torch.func.grad(lambda e, k: negative_log_likelihood(k, e, detector, frames)))(
        expected, counts
    )
    expected.requires_grad_()
    (wanted,) = torch.autograd.grad(negative_log_likelihood(counts, expected, detector, frames).sum(), expected)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["poisson", "binary", "dark"])  # with coincidence, pixels are not independent
def test_fisher_information_is_the_variance_of_the_score(name, generator):
    detector, frames = CAMERAS[name]
    expected = torch.linspace(0.3, 4, 20, dtype=F64).reshape(5, 4)
    many = expected.expand(20000, 5, 4).clone().requires_grad_()
    counts = sample_counts(many.detach(), detector, frames, generator=generator)
    (score,) = torch.autograd.grad(negative_log_likelihood(counts, many, detector, frames).sum(), many)
    information = fisher_information(expected, detector, frames)
    # the variance of 20000 draws has a relative error of sqrt((kurtosis - 1) / n), at most 1.6 % here; 5 of them
    torch.testing.assert_close(score.var(0), information, rtol=0.08, atol=0)
    error = (information / 20000).sqrt()
    assert (score.mean(0).abs() < 5 * error).all()


@pytest.mark.parametrize("counting", ["poisson", "binary"])
def test_coincidence_leaves_the_score_without_bias_but_calmer_than_it_says(counting, generator):
    detector = camera(counting, (24, 24), coincidence_radius=2.0)
    expected = torch.full((400, 24, 24), 20 * 0.03, dtype=F64, requires_grad=True)
    counts = sample_counts(expected.detach(), detector, 20, generator=generator)
    (score,) = torch.autograd.grad(negative_log_likelihood(counts, expected, detector, 20).sum(), expected)
    total = score.sum((1, 2))
    assert abs(total.mean()) < 5 * total.std() / 20
    ratio = total.var() / fisher_information(expected.detach()[:1], detector, 20).sum()
    # 0.71 and 0.83 found; the dip of the noise of such a camera is 0.70, and 400 draws know it to 7 %
    assert 0.5 < ratio < 1


def test_fisher_information_in_closed_form():
    expected = pixels([0.5, 2.0, 20.0])
    torch.testing.assert_close(fisher_information(expected, camera(shape=(1, 1))), 1 / expected)
    wanted = 1 / (10 * torch.expm1(expected / 10))
    torch.testing.assert_close(fisher_information(expected, camera("binary", (1, 1)), 10), wanted)
    slow = camera(shape=(7, 7), coincidence_radius=2.0)
    flat = torch.full((7, 7), 0.6, dtype=F64)
    n, area = 0.06, 4 * math.pi
    rate, slope = -math.expm1(-n * area) / area, math.exp(-n * area)
    found = fisher_information(flat, slow, 10)[3, 3].item()
    assert abs(found / (slope**2 / (10 * rate)) - 1) < 1e-10


# events ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counting", ["poisson", "binary"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("fields", [{}, {"coincidence_radius": 1.2}, {"dark": torch.full((5, 4), 0.01, dtype=F64)}])
def test_events_on_pixels_have_the_slope_of_counts(counting, groups, fields, generator):
    detector, frames = camera(counting, **fields), 12
    expected = (0.2 + torch.rand(groups, 5, 4, generator=generator, dtype=F64)).requires_grad_()
    parts = [sample_events(e, detector, frames // groups, generator=generator) for e in expected.detach()]
    frame = torch.cat([part.frame + g * (frames // groups) for g, part in enumerate(parts)])
    events = Events(frame, torch.cat([p.y for p in parts]), torch.cat([p.x for p in parts]), (frames, 5, 4))
    counts = torch.zeros(groups, 5, 4, dtype=F64)
    for f, y, x in zip(events.frame, events.y, events.x, strict=True):
        counts[int(f) * groups // frames, int(y), int(x)] += 1
    one = event_negative_log_likelihood(events, expected if groups > 1 else expected[0], detector)
    binned = negative_log_likelihood(counts, expected, detector, frames // groups)
    slopes = [torch.autograd.grad(v.sum(), expected)[0] for v in (one, binned)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-12)
    share = frames // groups  # which frames within a group is a matter of chance alone
    if counting == "poisson":
        chance = counts * math.log(share) - torch.lgamma(counts + 1)
    else:
        chance = math.lgamma(share + 1) - torch.lgamma(counts + 1) - torch.lgamma(share - counts + 1)
    torch.testing.assert_close(one, binned.sum() + chance.sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("counting", ["poisson", "binary"])
def test_finer_pixels_that_are_flat_add_nothing(counting, generator):
    detector = camera(counting, dark=torch.full((5, 4), 0.01, dtype=F64))
    expected = 0.2 + torch.rand(5, 4, generator=generator, dtype=F64)
    events = sample_events(expected, detector, 20, generator=generator)
    coarse = event_negative_log_likelihood(events, expected, detector)
    for s in (2, 3):
        fine = torch.kron(expected, torch.full((s, s), 1 / s**2, dtype=F64))
        torch.testing.assert_close(event_negative_log_likelihood(events, fine, detector), coarse)


@pytest.mark.parametrize("counting", ["poisson", "binary"])
def test_finer_pixels_use_the_places_within(counting, generator):
    shape, s = (9, 8), 3
    detector = camera(counting, shape)
    fine = torch.full((27, 24), 1.0, dtype=F64)
    fine[1::3, 1::3] = 6.0  # most electrons come to the middle of each pixel: flat, once it is summed
    events = sample_events(fine, detector, 400, supersampling=s, generator=generator)
    flat = torch.full_like(fine, float(fine.mean()))
    gain = event_negative_log_likelihood(events, flat, detector) - event_negative_log_likelihood(events, fine, detector)
    n = len(events)
    divergence = sum(p * math.log(9 * p) for p in [6 / 14] + [1 / 14] * 8)
    spread = math.sqrt(sum(p * math.log(9 * p) ** 2 for p in [6 / 14] + [1 / 14] * 8) - divergence**2)
    assert abs(gain.item() - n * divergence) < 5 * spread * math.sqrt(n)
    fine.requires_grad_()
    (slope,) = torch.autograd.grad(event_negative_log_likelihood(events, fine, detector), fine)
    middle, rest = slope[1::3, 1::3].sum(), slope.sum() - slope[1::3, 1::3].sum()
    assert middle.abs() < 5 * math.sqrt(72 / 6) and rest.abs() < 5 * math.sqrt(72 * 8)  # a score: mean 0


@pytest.mark.parametrize("counting", ["poisson", "binary"])
def test_event_slopes_against_finite_differences(counting, generator):
    detector = camera(counting, (3, 2), coincidence_radius=0.8, dark=torch.full((3, 2), 0.02, dtype=F64))
    fine = (0.1 + 0.2 * torch.rand(2, 6, 4, generator=generator, dtype=F64)).requires_grad_()
    events = sample_events(fine.detach()[0], detector, 6, supersampling=2, generator=generator)
    assert len(events) > 2
    assert gradcheck(lambda e: event_negative_log_likelihood(events, e, detector), fine)


def test_an_event_where_none_is_expected():
    events = Events(torch.tensor([0]), torch.tensor([1.5]), torch.tensor([0.5]), (2, 5, 4))
    expected = torch.ones(5, 4, dtype=F64)
    expected[1, 0] = 0
    for counting in ("poisson", "binary"):
        assert event_negative_log_likelihood(events, expected, camera(counting)) == math.inf


def test_no_events_leave_the_integral():
    none = torch.zeros(0)
    events = Events(none.long(), none, none, (10, 5, 4))
    expected = torch.full((10, 8), 0.25, dtype=F64)
    for counting in ("poisson", "binary"):
        value = event_negative_log_likelihood(events, expected, camera(counting))
        torch.testing.assert_close(value.item(), 20.0)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected", "detector", "frames", "message"),
    [
        (-torch.ones(5, 4), torch.ones(5, 4), camera(), 1, "at least 0, got -1"),
        (torch.full((5, 4), math.nan), torch.ones(5, 4), camera(), 1, "finite"),
        (torch.full((5, 4), math.inf), torch.ones(5, 4), camera(), 1, "finite"),
        (torch.full((5, 4), 13.0), torch.ones(5, 4), camera("binary"), 12, "frames of a binary camera, 12"),
        (torch.ones(5, 3), torch.ones(5, 4), camera(), 1, "counts"),
        (torch.ones(5, 4), torch.ones(5, 4), camera(), 0, "frames"),
        (torch.ones(5, 4), torch.ones(5, 4), camera(), 1.5, "frames"),
        (torch.ones(5, 4), torch.ones(5, 4), camera(nps=torch.tensor([1.0, 0.5])), 1, "coloured"),
    ],
)
def test_what_no_likelihood_is_for(counts, expected, detector, frames, message):
    with pytest.raises(ValueError, match=message):
        negative_log_likelihood(counts, expected, detector, frames)


@pytest.mark.parametrize(
    ("expected", "detector", "message"),
    [
        (torch.ones(5, 5), camera(), "whole number of times finer"),
        (torch.ones(10, 4), camera(), "whole number of times finer"),
        (torch.ones(2, 2), camera(), "whole number of times finer"),
        (torch.ones(1, 1, 5, 4), camera(), "whole number of times finer"),
        (torch.ones(5, 4), camera(shape=(4, 5)), "whole number of times finer"),
        (torch.ones(3, 5, 4), camera(), "equal groups"),
        (torch.ones(5, 4), camera("binary"), "at most 4"),
    ],
)
def test_events_that_do_not_fit(expected, detector, message):
    events = Events(torch.zeros(5, dtype=torch.long), torch.ones(5), torch.ones(5), (4, 5, 4))
    with pytest.raises(ValueError, match=message):
        event_negative_log_likelihood(events, expected, detector)
