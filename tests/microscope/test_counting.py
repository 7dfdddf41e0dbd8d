"""Counting: means against closed forms, draws against their theory, no derivative without an estimator."""

import math
import warnings

import pytest
import torch
from scipy.spatial import KDTree

from cryosim.core.fourier import SamplingWarning
from cryosim.microscope.camera_curves import measured_mtf, measured_nps
from cryosim.microscope.coincidence import _coincident
from cryosim.microscope.counting import events_per_frame, recorded_counts, sample_counts, sample_events, thin
from cryosim.microscope.detector import Detector, detect
from cryosim.microscope.events import histogram
from cryosim.microscope.gain import HOT, gain_corrected, measure_gain

BINARY = {"counting": "binary"}
R = 2.394
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def tolerance(dtype):
    return {"rtol": 2e-6 if dtype == torch.float32 else 1e-13, "atol": 0}


# means ----------------------------------------------------------------------------------------------------------------


@DTYPES
def test_an_ideal_camera_records_what_is_expected(dtype, generator):
    expected = 5 * torch.rand(2, 9, 8, generator=generator, dtype=dtype)
    detector = Detector((9, 8), 1.0)
    torch.testing.assert_close(events_per_frame(expected, detector, 4), expected / 4, **tolerance(dtype))
    torch.testing.assert_close(recorded_counts(expected, detector, 4), expected, **tolerance(dtype))
    hits = recorded_counts(expected, detector.replace(counting="binary"), 4)
    torch.testing.assert_close(hits, 4 * (1 - torch.exp(-expected / 4)), **tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("shape", [(9, 8), (1, 3)])
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.02, 0.1, 3.0])
def test_coincidence_of_a_flat_image_is_the_closed_form(rate, shape, dtype):
    detector = Detector(shape, 1.0, coincidence_radius=R)
    neighbours = rate * math.pi * R**2
    wanted = rate * -math.expm1(-neighbours) / neighbours
    got = events_per_frame(torch.full((2, *shape), 7 * rate, dtype=dtype), detector, 7)
    torch.testing.assert_close(got, torch.full_like(got, wanted), **tolerance(dtype))


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.05])
def test_binary_pixels_lose_no_electron_that_coincidence_left_alone(rate):
    # survivors at least 2.394 px apart never share a pixel: a binary camera counts all of them
    expected = torch.full((6, 7), 10 * rate, dtype=torch.float64)
    counted = recorded_counts(expected, Detector((6, 7), 1.0, coincidence_radius=R), 10)
    binary = recorded_counts(expected, Detector((6, 7), 1.0, coincidence_radius=R, counting="binary"), 10)
    torch.testing.assert_close(binary, counted, rtol=1e-5, atol=0)
    # and the smallest radius changes nothing
    tiny = recorded_counts(expected, Detector((6, 7), 1.0, coincidence_radius=1e-6, counting="binary"), 10)
    torch.testing.assert_close(tiny, recorded_counts(expected, Detector((6, 7), 1.0, **BINARY), 10), rtol=1e-9, atol=0)


def test_dark_events_come_in_every_frame():
    dark = torch.zeros(5, 6, dtype=torch.float64)
    dark[2, 3] = 0.3
    expected = torch.full((5, 6), 0.2, dtype=torch.float64)
    mean = recorded_counts(expected, Detector((5, 6), 1.0, dark=dark, coincidence_radius=R), 10)
    torch.testing.assert_close((mean - mean[0, 0])[2, 3], torch.tensor(3.0, dtype=torch.float64))
    rate = events_per_frame(expected, Detector((5, 6), 1.0, dark=dark, **BINARY), 10)
    hits = recorded_counts(expected, Detector((5, 6), 1.0, dark=dark, **BINARY), 10)
    torch.testing.assert_close(hits, 10 * (1 - torch.exp(-rate)))


@pytest.mark.parametrize("counting", ["poisson", "binary"])
@pytest.mark.parametrize("radius", [0.6, 1.2, R])
def test_means_are_differentiable(counting, radius, generator):
    values = [
        0.5 + torch.rand(2, 6, 7, generator=generator, dtype=torch.float64),
        torch.tensor(radius, dtype=torch.float64),
        0.1 * torch.rand(6, 7, generator=generator, dtype=torch.float64),
        torch.tensor([1.2, 0.5], dtype=torch.float64),
    ]

    def mean(expected, radius, dark, noise):
        detector = Detector((6, 7), 1.0, nps=noise, dark=dark, coincidence_radius=radius, counting=counting)
        return recorded_counts(expected, detector, 9)

    assert torch.autograd.gradcheck(mean, [v.requires_grad_() for v in values])


# draws ----------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("counting", ["poisson", "binary"])
def test_moments_of_the_counts(counting, dtype, generator):
    shape, frames, n = (33, 34), 12, 400
    expected = torch.linspace(0.2, 9, shape[0] * shape[1], dtype=dtype).reshape(shape)
    detector = Detector(shape, 1.0, counting=counting, dark=torch.full(shape, 0.02))
    counts = sample_counts(expected.expand(n, -1, -1), detector, frames, generator=generator).double()
    assert counts.shape == (n, *shape)
    assert (counts == counts.round()).all()
    mean = recorded_counts(expected.double(), detector, frames)
    variance = mean if counting == "poisson" else mean * (1 - mean / frames)
    z = (counts.mean(0) - mean) / (variance / n).sqrt()
    # 1122 pixels: mean of z 0 +- 0.03, mean of z^2 1 +- 0.042; five sigma
    assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / z.numel())
    ratio = counts.var(0) / variance  # each 1 +- 0.07 (a little more of few counts)
    assert abs(float(ratio.mean()) - 1) < 5 * 0.08 / math.sqrt(z.numel())


@pytest.mark.parametrize("camera", ["plain", "binary", "falcon4i", "falcon3"])
def test_the_same_seed_gives_the_same_counts(camera, generator):
    shape = (17, 12)
    detector = {
        "plain": Detector(shape, 1.0),
        "binary": Detector(shape, 1.0, **BINARY),
        "falcon4i": Detector.falcon4i(shape, 1.0),
        "falcon3": Detector.falcon3(shape, 1.0),
    }[camera]
    expected = torch.full((2, 2, *shape), 4.0)
    draws = [sample_counts(expected, detector, 100, generator=generator.manual_seed(s)) for s in (3, 3, 4)]
    assert draws[0].shape == expected.shape and draws[0].dtype == expected.dtype
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])
    events = [sample_events(expected[0, 0], detector, 100, generator=generator.manual_seed(s)) for s in (3, 3)]
    assert all(torch.equal(getattr(events[0], name), getattr(events[1], name)) for name in ("frame", "y", "x"))


def test_nothing_in_nothing_out(generator):
    for detector in (Detector.falcon4i((7, 6), 1.0), Detector.falcon3((7, 6), 1.0), Detector((7, 6), 1.0)):
        assert not sample_counts(torch.zeros(2, 7, 6), detector, 3, generator=generator).any()
        events = sample_events(torch.zeros(7, 6), detector, 3, generator=generator)
        assert len(events) == 0 and events.shape == (3, 7, 6)


@pytest.mark.parametrize("zero", [1.0, 1.5])
def test_rendered_counts_have_the_mean_of_the_recorded_ones(zero, generator):
    noise = zero * torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    shape, n = (20, 21), 500
    detector = Detector(shape, 1.0, nps=noise)
    y = torch.arange(20, dtype=torch.float64)[:, None]
    expected = (6 + 3 * torch.sin(y / 3)).expand(shape)  # not periodic
    torch.testing.assert_close(recorded_counts(expected, detector), expected)
    counts = sample_counts(expected.expand(n, -1, -1), detector, generator=generator)
    # of each pixel the variance is near the mean times the mean of the NPS over all frequencies, 0.5 or so
    spread = counts.std(0) / math.sqrt(n)
    z = (counts.mean(0) - expected) / spread
    assert float(z.abs().max()) < 5
    assert float(counts.var(0).mean() / expected.mean()) < 0.6 * zero


@pytest.mark.parametrize("camera", ["poisson", "binary", "coincident", "coloured"])
def test_a_draw_has_no_silent_derivative(camera):
    detector = {
        "poisson": Detector((5, 6), 1.0),
        "binary": Detector((5, 6), 1.0, **BINARY),
        "coincident": Detector((5, 6), 1.0, coincidence_radius=R),
        "coloured": Detector.falcon3((5, 6), 1.0),
    }[camera]
    expected = torch.full((5, 6), 2.0, requires_grad=True)
    message = "expected counts.*gaussian_counts.*score_function"
    with pytest.raises(RuntimeError, match=message):
        sample_counts(expected, detector, 9).sum().backward()
    with pytest.raises(RuntimeError, match=message):
        sample_events(expected, detector, 9).y.sum().backward()
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda e: sample_counts(e, detector, 9).sum())(expected.detach())
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda e: sample_counts(e, detector, 9), (expected.detach(),), (torch.ones(5, 6),))
    assert not sample_counts(expected.detach(), detector, 9).requires_grad


def test_a_draw_has_no_silent_derivative_in_the_camera():
    dark = torch.full((5, 6), 0.1, requires_grad=True)
    counts = sample_counts(torch.ones(5, 6), Detector((5, 6), 1.0, dark=dark), 9)
    with pytest.raises(RuntimeError, match="gaussian_counts"):
        counts.sum().backward()


def ringing(dtype=torch.float64):
    """A bright line between two columns of pixels, as the detector's sharp cut leaves it: a third of it below 0."""
    image = torch.zeros(32, 40, dtype=dtype)
    image[:, 21] = 100
    return detect(image, 1.0, Detector((16, 20), 2.0))


@DTYPES
def test_ringing_counts_as_no_electrons_and_is_told(dtype, generator):
    detector, expected = Detector((16, 20), 2.0), ringing(dtype)
    assert float(expected.min()) < -0.3 * float(expected.max())
    share = 100 * float(expected.clamp_max(0).sum().abs() / expected.clamp_min(0).sum())
    for sample in (sample_counts, sample_events):
        with pytest.warns(SamplingWarning, match=f"{sample.__name__}.*Nyquist.* {share:.2g} % of .*finer"):
            drawn = sample(expected, detector, 5, generator=generator.manual_seed(1))
        clamped = sample(expected.clamp_min(0), detector, 5, generator=generator.manual_seed(1))
        counts, wanted = (v if isinstance(v, torch.Tensor) else histogram(v) for v in (drawn, clamped))
        assert torch.equal(counts, wanted) and counts.sum() > 100 and not counts[expected <= 0].any()


def test_a_little_ringing_is_not_told(generator):
    expected = ringing() - 1.05 * float(ringing().min())
    expected[0, 0] = -0.04 * float(expected.max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample_counts(expected, Detector((16, 20), 2.0), generator=generator)[0, 0] == 0
        sample_events(expected, Detector((16, 20), 2.0), generator=generator)


# events ---------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("s", [1, 3, 4])
def test_events_fall_where_the_electrons_are_expected(s, dtype, generator):
    shape, frames = (13, 16), 50
    expected = 200 / s**2 * torch.rand(13 * s, 16 * s, generator=generator, dtype=dtype)
    events = sample_events(expected, Detector(shape, 1.0), frames, supersampling=s, generator=generator)
    assert events.shape == (frames, *shape) and events.y.dtype == dtype
    fine = histogram(events, s)
    z = (fine - expected) / expected.sqrt()
    z = z[expected > 10 / s**2]
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(3 / z.numel())
    coarse = expected.reshape(13, s, 16, s).sum((1, 3))
    z = (histogram(events) - coarse) / coarse.sqrt()
    assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
    # evenly over the frames and within the pixels: chi^2 of 49 and of 9 degrees of freedom, five sigma
    for values, bins in ((events.frame, frames), (events.x.sub(events.x.floor()).mul(10 * s).long() % 10, 10)):
        counts = torch.bincount(values, minlength=bins).double()
        mean = len(events) / bins
        assert float(((counts - mean) ** 2).sum() / mean) < bins - 1 + 5 * math.sqrt(2 * (bins - 1))


def test_events_stand_in_the_order_of_frame_and_pixel(generator):
    for detector in (Detector((9, 11), 1.0), Detector.falcon4i((9, 11), 1.0)):
        events = sample_events(torch.full((9, 11), 20.0), detector, 400, generator=generator)
        key = (events.frame * 9 + events.y.long()) * 11 + events.x.long()
        assert (key.diff() >= 0).all() and len(events) > 500


def test_chunks_of_frames_make_no_difference(monkeypatch, generator):
    detector = Detector((20, 21), 1.0, coincidence_radius=R, dark=torch.full((20, 21), 0.004))
    expected = torch.full((20, 21), 40.0)
    wanted = float(recorded_counts(expected, detector, 400).sum())
    for most in (2**21, 100):
        monkeypatch.setattr("cryosim.microscope.coincidence._EVENTS_AT_ONCE", most)
        events = sample_events(expected, detector, 400, generator=generator)
        assert (events.frame.diff() >= 0).all() and int(events.frame.max()) == 399
        assert abs(len(events) - wanted) < 5 * math.sqrt(wanted)  # the variance is below that of Poisson


def test_no_two_survivors_of_a_frame_are_near(generator):
    events = sample_events(
        torch.full((30, 31), 30.0), Detector((30, 31), 1.0, coincidence_radius=R), 60, generator=generator
    )
    places = torch.stack([events.y, events.x, 1000.0 * events.frame], 1).double()
    distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    assert len(events) > 1000 and float(distances.min()) > R - 1e-4


@pytest.mark.parametrize("radius", [0.3, 1.0, R, 7.0])
def test_coincidences_are_those_that_a_tree_finds(radius, generator):
    n = 3000
    frame = torch.randint(20, (n,), generator=generator)
    y, x, moment = (torch.rand(n, generator=generator, dtype=torch.float64) * size for size in (41, 37, 1))
    y, x = y - 3, x - 5
    tree = KDTree(torch.stack([y, x, 100.0 * frame], 1).numpy())
    wanted = torch.zeros(n, dtype=torch.bool)
    for a, b in tree.query_pairs(radius):
        wanted[a if moment[a] > moment[b] else b] = True
    assert 0 < int(wanted.sum()) < n
    assert torch.equal(_coincident(frame, y, x, moment, radius), wanted)


def test_a_binary_pixel_is_hit_once_in_a_frame(generator):
    dark = torch.full((16, 15), 0.2)
    detector = Detector((16, 15), 1.0, dark=dark, **BINARY)
    events = sample_events(torch.full((16, 15), 90.0), detector, 200, generator=generator)
    key = (events.frame * 16 + events.y.long()) * 15 + events.x.long()
    assert (key.diff() > 0).all()
    chance = 1 - math.exp(-0.65)
    trials = 200 * 16 * 15
    assert abs(len(events) - trials * chance) < 5 * math.sqrt(trials * chance * (1 - chance))


def test_places_are_not_rounded_into_the_next_pixel(generator):
    detector = Detector((1, 4096), 1.0)
    expected = torch.zeros(1, 4096)
    expected[0, -1] = 30000
    events = sample_events(expected, detector, generator=generator)  # Events refuses x = 4096
    assert (events.x.long() == 4095).all() and len(events) > 29000


# thinning, gain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.5, 0.2])
def test_parts_of_poisson_counts_are_independent(fraction, generator):
    expected = torch.full((200, 201), 3.0, dtype=torch.float64)
    counts = sample_counts(expected, Detector((200, 201), 1.0), generator=generator)
    kept, rest = thin(counts, fraction, generator=generator)
    assert torch.equal(kept + rest, counts)
    for part, share in ((kept, fraction), (rest, 1 - fraction)):
        mean, n = 3 * share, counts.numel()
        assert abs(float(part.mean()) - mean) < 5 * math.sqrt(mean / n)
        assert abs(float(part.var()) - mean) < 5 * math.sqrt((mean + 2 * mean**2) / n)  # of a Poisson variance
    correlation = torch.corrcoef(torch.stack([kept.flatten(), rest.flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(counts.numel())


def test_events_are_dealt_out(generator):
    events = sample_events(torch.full((30, 31), 20.0), Detector((30, 31), 1.0), 50, generator=generator)
    kept, rest = thin(events, 0.3, generator=generator)
    assert kept.shape == rest.shape == events.shape
    assert torch.equal(histogram(kept) + histogram(rest), histogram(events))
    assert abs(len(kept) - 0.3 * len(events)) < 5 * math.sqrt(0.21 * len(events))


def test_gain_is_measured_and_taken_out(generator):
    shape = (24, 25)
    gain = 0.8 + 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64)
    gain[3, 4] = gain[0, 0] = 0
    gain = gain / gain.mean()
    dark = torch.zeros(shape, dtype=torch.float64)
    dark[10, 11] = 0.5
    detector = Detector(shape, 1.0, gain=gain, dark=dark)
    flats = sample_counts((100 * gain).expand(400, -1, -1), detector.replace(dark=None), generator=generator)
    found = measure_gain(flats)
    assert float((found - gain).abs().max()) < 5 * math.sqrt(1.3 / 40000)
    ramp = (5 + torch.arange(25, dtype=torch.float64)).expand(2, *shape)
    seen = recorded_counts(ramp * gain, detector, 10)
    corrected = gain_corrected(seen, detector)
    torch.testing.assert_close(corrected[:, :, 1:], ramp[:, :, 1:])  # the mean of a ramp's neighbours is the ramp
    torch.testing.assert_close(corrected[:, 0, 0], torch.full((2,), 5 + 2 / 3, dtype=torch.float64))
    assert torch.equal(gain_corrected(ramp, Detector(shape, 1.0)), ramp)
    mild = Detector(shape, 1.0, dark=torch.full(shape, HOT / 2))
    assert torch.equal(gain_corrected(ramp, mild), ramp)


def test_holes_of_any_size_are_filled():
    gain = torch.ones(12, 13)
    gain[2:9, 3:10] = 0
    corrected = gain_corrected(3 * gain, Detector((12, 13), 1.0, gain=gain))
    torch.testing.assert_close(corrected, torch.full((12, 13), 3.0))
    with pytest.raises(ValueError, match="good pixels"):
        gain_corrected(gain, Detector((12, 13), 1.0, gain=0 * gain))


@DTYPES
@pytest.mark.parametrize("shape", [(512, 500), (90, 107)])
def test_dead_areas_are_filled_by_ever_larger_boxes(shape, dtype):
    # of a ramp along y each is the mean of the rows that its reach finds, the least power of 2 that finds some
    gain = torch.ones(shape, dtype=dtype)
    gain[:80] = 0
    ramp = torch.arange(shape[0], dtype=dtype)[:, None].expand(2, *shape)
    corrected = gain_corrected(ramp * gain, Detector(shape, 1.0, gain=gain))
    assert corrected.dtype == dtype
    for row in (0, 16, 17, 47, 48, 63, 64, 71, 75, 78, 79):
        reach = next(2**n for n in range(8) if row + 2**n >= 80)
        wanted = torch.arange(80, min(row + reach + 1, shape[0]), dtype=dtype).mean()
        torch.testing.assert_close(corrected[:, row], wanted.expand(2, shape[1]))
    assert torch.equal(corrected[:, 80:], ramp[:, 80:])


def test_the_fill_is_the_mean_of_the_good_pixels_about_one(generator):
    shape = (31, 26)
    gain = (torch.rand(shape, generator=generator, dtype=torch.float64) > 0.9).double()
    counts = torch.rand(3, *shape, generator=generator, dtype=torch.float64) + 1e3 * (gain == 0)
    corrected = gain_corrected(counts, Detector(shape, 1.0, gain=gain))
    for y in range(shape[0]):
        for x in range(shape[1]):
            reach = 0 if gain[y, x] else 1
            while not gain[(box := tuple(slice(max(0, v - reach), v + reach + 1) for v in (y, x)))].any():
                reach *= 2
            wanted = counts[:, *box][:, gain[box] > 0].mean(-1)
            torch.testing.assert_close(corrected[:, y, x], wanted, rtol=1e-12, atol=0)


def test_filled_counts_are_differentiable(generator):
    gain = torch.ones(7, 6, dtype=torch.float64)
    gain[1:6, :4] = 0
    counts = torch.rand(2, 7, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: gain_corrected(k, Detector((7, 6), 1.0, gain=gain)), counts)


# refusals -------------------------------------------------------------------------------------------------------------


def test_clear_refusals(generator):
    camera, flat = Detector((4, 5), 1.0), torch.ones(4, 5)
    refusals = [
        (lambda: events_per_frame(flat, camera, 0), "frames: expected a whole number"),
        (lambda: sample_counts(flat, camera, 1.5), "frames: expected a whole number"),
        (lambda: sample_events(flat, camera, 0), "sample_events.frames"),
        (lambda: sample_counts(-flat, camera), "sample_counts.expected"),
        (lambda: sample_counts(torch.tensor([[-1.0, 0.0]]).expand(4, 2), camera), "sample_counts.expected"),
        (lambda: sample_counts(flat * math.nan, camera), "sample_counts.expected"),
        (lambda: sample_events(flat * math.inf, camera), "sample_events.expected"),
        (lambda: sample_events(flat[None], camera), "one image"),
        (lambda: sample_events(flat, camera, supersampling=3), "3 times"),
        (lambda: thin(0.5 * flat), "whole numbers"),
        (lambda: thin(flat, 1.5), "thin.fraction"),
        (lambda: measure_gain(torch.zeros(2, 4, 5)), "Expose longer"),
        (lambda: measured_nps(torch.zeros(1, 4, 5)), "two or more"),
        (lambda: measured_nps(torch.zeros(2, 4, 5)), "Expose longer"),
        (lambda: measured_mtf(flat, torch.ones(5, 4)), "measured_mtf.ideal"),
    ]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message):
            call()
    crowded = Detector((64, 64), 1.0, coincidence_radius=20.0)
    with pytest.raises(ValueError, match="more camera frames"):
        sample_events(torch.full((64, 64), 200.0), crowded, 1, generator=generator)
    with pytest.raises(RuntimeError, match="Draw outside of it"):
        torch.func.vmap(lambda e: sample_counts(e, Detector.falcon4i((4, 5), 1.0), 9), randomness="different")(
            flat[None]
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_to_be_repaired_are_finite(value):
    gain = torch.ones(9, 8)
    gain[4, 4] = 0
    counts = torch.ones(2, 9, 8)
    counts[1, 0, 0] = value
    with pytest.raises(ValueError, match=r"gain_corrected.counts: expected finite"):
        gain_corrected(counts, Detector((9, 8), 1.0, gain=gain))


def test_repaired_pixels_of_an_empty_image_are_empty(generator):
    gain = 0.8 + 0.4 * torch.rand(64, 64, generator=generator, dtype=torch.float64)
    gain[torch.rand(64, 64, generator=generator) < 0.3] = 0
    counts = torch.poisson(torch.full((64, 64), 0.05, dtype=torch.float64), generator=generator)
    assert bool((gain_corrected(counts, Detector((64, 64), 1.0, gain=gain)) >= 0).all())
