"""How likely counts and events are, how much they tell, and slopes of what is drawn at random.

With r the events per pixel and camera frame (`events_per_frame`), T frames and k counts, the detector's `counting` says
which distribution holds:

    poisson   k ~ Poisson(m),               m = T r
    binary    k ~ Binomial(T, 1 - exp(-r)): each frame tells only whether the pixel was hit

Pixels count as independent. Where coincidence couples neighbours (`coincidence_radius`), the mean follows it and the
likelihood is a composite one: its slope has the right mean, 0 at the truth, but the counts vary less at low frequencies
than it believes (of a flat image of 0.03 e-/px and frame with a radius of 2 px, 0.71 times as much).

Slopes of an average over random counts come in three kinds. Per pixel of mean m = 5 with the loss (k - 2)^2, whose mean
m + (m - 2)^2 has slope 7 (one draw; all of it is measured in tests/microscope/test_likelihood.py):

    expected counts      loss(m)                slope 6: short of loss'' / 2 for Poisson counts; no variance
    `gaussian_counts`    loss(m + sqrt(m) eps)  slope 7: exact up to quadratic losses; standard deviation 6.0
    `score_function`     loss * score           slope 7: exact for every loss; 19.5, or 15.8 with the mean as baseline
"""

from __future__ import annotations

import math

import torch

from cryosim.core.record import hidden
from cryosim.microscope.counting import events_per_frame, recorded_of
from cryosim.microscope.detector import Detector
from cryosim.microscope.events import Events
from cryosim.microscope.optics import is_zero, per_image, root


def negative_log_likelihood(
    counts: torch.Tensor, expected: torch.Tensor, detector: Detector, frames: int | torch.Tensor = 1
) -> torch.Tensor:
    """-log P(counts | expected), summed over the pixels of each image and over nothing else.

    Poisson: m - k log m + log k!. Binary: -k log(1 - exp(-r)) + (T - k) r - log C(T, k). Both are computed about their
    minimum, k (d - log(1 + d)) with d = (m - k) / k, where the large terms have already cancelled. Without electrons,
    m = 0 and k = 0 give 0 with a slope of 1 (Poisson), and k > 0 gives +inf. A negative mean is outside of the
    distribution: +inf, with slope -inf.

    The counts have to be those that the camera gives: what `movies` of `simulate` receives, or the images of a detector
    without gain. The gain is in `expected`. Images divided by the gain, their defects repaired, follow another
    distribution: neither the value nor the slope is right for them. A dead pixel (gain 0) expects 0, and counts above 0
    there give +inf: repaired images were given.

    Parameters
    ----------
    counts : tensor (..., y, x)
        As the camera gives them [counts/px]: whole numbers, not negative. Between whole numbers k! is the gamma
        function.
    expected : tensor (..., y, x)
        Electrons of the whole exposure as `expected_counts` returns them [e-/px].
    detector : Detector
        Its `counting` chooses the distribution.
    frames : int or tensor (...)
        Camera frames of the exposure, one number for all images or one for each.

    Returns
    -------
    tensor (...)

    Raises
    ------
    ValueError
        For counts that are negative, not finite or more than the frames of a binary camera, images of different sizes,
        or a detector with coloured noise.

    Notes
    -----
    Source: C. Loader, "Fast and Accurate Computation of Binomial Probabilities" (2000); for binary frames A. Zambon,
    Front. Phys. 12:1408430 (2024), DOI 10.3389/fphy.2024.1408430.
    """
    return _pixel_likelihood(counts, expected, detector, frames).sum((-2, -1))


def check_counts(counts: torch.Tensor, detector: Detector, frames: int | torch.Tensor = 1) -> None:
    """Raise ValueError unless counts (..., y, x) are finite, from 0 on, and of binary pixels at most the frames."""
    if hidden() or not counts.numel():
        return
    many = per_image(frames, torch.float64, counts.device)
    top = many if detector.counting == "binary" else math.inf
    if ((counts >= 0) & (counts <= top) & torch.isfinite(counts)).all():
        return
    low, high = (float(v) for v in torch.aminmax(counts.detach()))
    most = f" and at most the frames of a binary camera, {float(many.max()):g}" if detector.counting == "binary" else ""
    raise ValueError(
        f"counts: expected finite ones of at least 0{most}, got {low:g} to {high:g}. Were they normalised?"
    )


def event_negative_log_likelihood(events: Events, expected: torch.Tensor, detector: Detector) -> torch.Tensor:
    """-log likelihood of single electrons as a point process: -sum_i log lambda_i + integral of lambda.

    lambda [events per frame and px^2] is constant within each pixel of `expected`. On detector pixels the slope equals
    that of the counts of each group; finer pixels use the sub-pixel places. On a binary camera of pixel rate r, a pixel
    and frame with an event contributes -log[(1 - exp(-r)) lambda_i / (mean lambda of the pixel)], one without it r.

    Parameters
    ----------
    events : Events
        At most one for each pixel and frame on a binary camera; more in a group than it has frames are refused.
    expected : tensor (y, x) or (group, y, x)
        Electrons of the exposure, or of each of its groups of frames [e-/px]; on detector pixels or s times finer ones
        that add up to them. Group g covers the g-th equal share of the frames.
    detector : Detector

    Returns
    -------
    tensor ()

    Raises
    ------
    ValueError
        When shapes do not fit, the frames do not split into groups, a binary pixel has more events than frames, or the
        detector's noise is coloured.

    Notes
    -----
    Source: D. J. Daley and D. Vere-Jones, An Introduction to the Theory of Point Processes (2003), section 7.1,
    DOI 10.1007/b97277.
    """
    _refuse_coloured(detector)
    rates = expected[None] if expected.ndim == 2 else expected
    frames, *shape = events.shape
    fine = rates.shape[-1] // shape[-1]
    fits = tuple(shape) == tuple(detector.shape) and tuple(rates.shape[1:]) == tuple(fine * n for n in shape)
    if rates.ndim != 3 or not fits or fine < 1:
        raise ValueError(
            f"expected: expected (y, x) or (group, y, x) on the {tuple(detector.shape)} px of the detector and the "
            f"events' {tuple(shape)}, or on pixels a whole number of times finer, got {tuple(expected.shape)}."
        )
    groups = rates.shape[0]
    if frames % groups:
        raise ValueError(
            f"expected: {frames} frames do not split into {groups} equal groups. Leave the last frames and events out."
        )
    share = frames // groups
    rate = events_per_frame(rates, _finer(detector, fine), share)  # (group, y, x) [1 / (px frame)]
    group = events.frame.long() // share
    places = [
        (place * fine).floor().long().clamp_max(n * fine - 1)
        for place, n in zip((events.y, events.x), shape, strict=True)
    ]
    index = (group * rate.shape[1] + places[0]) * rate.shape[2] + places[1]
    counts = torch.bincount(index, minlength=rate.numel()).view(rate.shape).to(rate.dtype)
    log_rate = torch.log(torch.where(counts > 0, rate, 1.0)) + 2 * math.log(fine)
    told = (counts * log_rate).sum()
    if detector.counting != "binary":
        return _walled(share * rate, rate).sum() - told
    total, found, electrons = (_summed(t, fine) for t in (rate, counts, rates))
    if not hidden() and (found > share).any():
        raise ValueError(f"events: a binary camera finds at most {share} in a pixel within {share} frames.")
    pixel = events_per_frame(electrons, detector, share)
    some = (found > 0) & (total > 0) & (pixel > 0)
    total, safe = torch.where(some, total, 1.0), torch.where(some, pixel, 1.0)
    told = told + (found * (safe + _log_hit(safe) - torch.log(total))).sum()
    return _walled(share * pixel, pixel).sum() - told


def fisher_information(expected: torch.Tensor, detector: Detector, frames: int | torch.Tensor = 1) -> torch.Tensor:
    """What the counts of a pixel tell about its expected electrons: the mean of the likelihood's second derivative.

    Poisson: m'^2 / m; binary: T r'^2 / (exp(r) - 1), with m' = T r' and r' = 1 / T the derivatives by the expected
    electrons. Where coincidence thins the events, r' is the response to a change that the neighbours share.

    Parameters
    ----------
    expected : tensor (..., y, x)
        [e-/px]
    detector : Detector
    frames : int or tensor (...)

    Returns
    -------
    tensor (..., y, x)
        [px^2/e-^2]; infinite where nothing is expected.

    Raises
    ------
    ValueError
        For a detector with coloured noise.
    """
    _refuse_coloured(detector)
    rate, many = _rate(expected, detector, frames)
    slope = 1 / many
    if not is_zero(detector.coincidence_radius):
        pull = torch.func.vjp(lambda e: _rate(e, detector, frames)[0], expected)[1]
        push = torch.func.vjp(lambda v: pull(v)[0], torch.zeros_like(rate))[1]  # the transpose of the transpose
        (slope,) = push(torch.ones_like(expected))
    return many * slope**2 / (torch.expm1(rate) if detector.counting == "binary" else rate)


def gaussian_counts(
    expected: torch.Tensor,
    detector: Detector,
    frames: int | torch.Tensor = 1,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Normal numbers with the mean and the variance of the counts, as smooth functions of the expected electrons.

    mean + sqrt(variance) eps. The slope of an average is exact for losses up to quadratic in the counts; for k^3 it is
    short by 1 (Poisson), the slope of the third cumulant. One draw of (k - 2)^2 at 5 electrons: mean slope 7,
    standard deviation 6.0. Few electrons give negative numbers, which `negative_log_likelihood` refuses. The slope
    grows as 1 / sqrt(variance) towards no electrons; at none, that of the root is 0.

    Parameters
    ----------
    expected : tensor (..., y, x)
        [e-/px]
    detector : Detector
    frames : int or tensor (...)
    generator : torch.Generator, optional

    Returns
    -------
    tensor (..., y, x)

    Raises
    ------
    ValueError
        For a negative mean, or a detector with coloured noise.

    Notes
    -----
    Source: D. P. Kingma and M. Welling, "Auto-Encoding Variational Bayes" (2014), arXiv 1312.6114, section 2.4.
    """
    _refuse_coloured(detector)
    rate, many = _rate(expected, detector, frames)
    if not hidden() and (rate < 0).any():
        low = float((many * rate.detach()).min())
        raise ValueError(f"expected: expected no negative mean counts, got {low:g}. Clip the electrons at 0.")
    mean = recorded_of(rate, detector, many)
    variance = mean * torch.exp(-rate) if detector.counting == "binary" else mean
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + root(variance) * noise


def score_function(
    loss: torch.Tensor,
    counts: torch.Tensor,
    expected: torch.Tensor,
    detector: Detector,
    frames: int | torch.Tensor = 1,
    baseline: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Surrogate with the value of the loss, whose slope estimates that of the loss's mean over counts.

    d/de E[loss(k, e)] = E[(loss - baseline) d log P(k | e) / de + d loss / de]: without bias for any loss, whole-number
    counts and all, at the price of variance. One draw of (k - 2)^2 at 5 electrons: mean slope 7.0, standard deviation
    19.5; 15.8 with the mean loss, 14, as baseline. The variance grows with the number of pixels that share one loss.

    Parameters
    ----------
    loss : tensor () or (...) or (..., y, x)
        Of `counts`: one number for all images, one for each, or one for each pixel that depends on its own count only.
    counts : tensor (..., y, x)
        Drawn from `expected`, by `sample_counts`.
    expected : tensor (..., y, x)
        [e-/px]
    detector : Detector
    frames : int or tensor (...)
    baseline : float or tensor like loss, optional
        Near the mean loss. It must not depend on these counts, or bias comes back.

    Returns
    -------
    tensor ()
        The sum of the losses.

    Raises
    ------
    ValueError
        For a loss of another shape, or from `negative_log_likelihood`.

    Notes
    -----
    Source: R. J. Williams, Machine Learning 8:229 (1992), DOI 10.1007/BF00992696.
    """
    log_likelihood = -_pixel_likelihood(counts.detach(), expected, detector, frames)
    shape = tuple(log_likelihood.shape)
    if tuple(loss.shape) not in ((), shape[:-2], shape):
        raise ValueError(f"loss: expected the shape (), {shape[:-2]} or {shape}, got {tuple(loss.shape)}.")
    while log_likelihood.ndim > loss.ndim:
        log_likelihood = log_likelihood.sum(-1)
    weight = (loss if baseline is None else loss - baseline).detach()
    return (loss + weight * (log_likelihood - log_likelihood.detach())).sum()


def _pixel_likelihood(
    counts: torch.Tensor, expected: torch.Tensor, detector: Detector, frames: int | torch.Tensor
) -> torch.Tensor:
    """-log P of each pixel (..., y, x)."""
    _refuse_coloured(detector)
    if counts.shape[-2:] != expected.shape[-2:]:
        raise ValueError(
            f"counts: expected images of the size of the expected ones, {tuple(expected.shape[-2:])} [px], got "
            f"{tuple(counts.shape[-2:])}."
        )
    binary = detector.counting == "binary"
    rate, many = _rate(expected, detector, frames)
    counts = counts.to(torch.promote_types(rate.dtype, counts.dtype))
    check_counts(counts, detector, frames)
    inside = torch.where(rate < 0, 0.0, rate)
    safe = torch.where((counts > 0) | (inside > 0), inside, 1.0)
    if not binary:
        mean = many * inside
        value = _deviance(counts, mean, mean - counts, torch.log(many * safe)) + _stirling_error(counts)
        return _walled(value, rate)
    # a binomial: Poisson counts of hits and of misses, given their sum
    hit, miss, empty = -torch.expm1(-inside), torch.exp(-inside), many - counts
    excess = torch.where(inside < math.log(2), many * hit - counts, empty - many * miss)
    hits = _deviance(counts, many * hit, excess, torch.log(many) + _log_hit(safe))
    misses = _deviance(empty, many * miss, -excess, torch.log(many) - inside)
    ways = _stirling_error(counts) + _stirling_error(empty) - _stirling_error(many)
    return _walled(hits + misses + ways, rate)


def _rate(expected: torch.Tensor, detector: Detector, frames: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Events per pixel and frame (..., y, x), and the frames () or (..., 1, 1), which may differ between images."""
    many = per_image(frames, expected.dtype, expected.device)
    if not hidden() and not ((many >= 1) & (many == many.round())).all():
        raise ValueError(f"frames: expected whole numbers of at least 1, got {many.flatten().tolist()[:3]}.")
    return events_per_frame(expected / many, detector), many


def _deviance(counts: torch.Tensor, mean: torch.Tensor, excess: torch.Tensor, log_mean: torch.Tensor) -> torch.Tensor:
    """m - k - k log(m / k) = k (d - log(1 + d)), d = excess / k, from excess = m - k: small where m is near k."""
    some = counts > 0
    k = torch.where(some, counts, 1.0)
    d = torch.where(some, excess, 0.0) / k
    near = d > -0.5
    log_ratio = torch.where(near, torch.log1p(torch.where(near, d, 0.0)), log_mean - torch.log(k))
    return torch.where(some, k * (d - log_ratio), mean - counts * log_mean)


def _stirling_error(n: torch.Tensor) -> torch.Tensor:
    """log n! - n log n + n; from 15 on by its series, to 2e-14."""
    large, some = n >= 15, n > 0
    many, few, positive = torch.where(large, n, 15.0), torch.where(large, 1.0, n), torch.where(some & ~large, n, 1.0)
    u = 1 / many**2
    series = 0.5 * torch.log(2 * math.pi * many) + (1 / 12 - u * (1 / 360 - u * (1 / 1260 - u / 1680))) / many
    direct = torch.lgamma(few + 1) - torch.where(some, few * (torch.log(positive) - 1), 0.0)
    return torch.where(large, series, direct)


def _log_hit(rate: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(-r)), to full precision from r = 0 on."""
    small = rate < math.log(2)
    near = torch.log(-torch.expm1(-torch.where(small, rate, 1.0)))
    return torch.where(small, near, torch.log1p(-torch.exp(-torch.where(small, 1.0, rate))))


def _walled(value: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """The value; where the rate is negative, +inf with slope -inf."""
    return torch.where(rate < 0, torch.where(rate < 0, rate, -1.0) * -math.inf, value)


def _summed(values: torch.Tensor, fine: int) -> torch.Tensor:
    """Values (..., fine y, fine x) summed over the finer pixels of each pixel (..., y, x)."""
    return values.unflatten(-1, (-1, fine)).unflatten(-3, (-1, fine)).sum((-3, -1))


def _finer(detector: Detector, fine: int) -> Detector:
    """The detector with pixels `fine` times smaller; its gain is already in the expected electrons."""
    dark = detector.dark
    if dark is not None:
        dark = dark.repeat_interleave(fine, -2).repeat_interleave(fine, -1) / fine**2
    return detector.replace(
        shape=(detector.shape[0] * fine, detector.shape[1] * fine),
        pixel_size=detector.pixel_size / fine,
        coincidence_radius=detector.coincidence_radius * fine,
        gain=None,
        dark=dark,
        counting="poisson",  # sub-pixels only share out what the pixel tells
    )


def _refuse_coloured(detector: Detector) -> None:
    if detector.nps is not None:
        raise ValueError(
            "Detector.nps: expected None, got a power spectrum: pixels of coloured noise are not independent. "
            "Compare events, or counts before rendering, with detector.replace(nps=None)."
        )
