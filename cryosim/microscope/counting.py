"""Counting: from the electrons that a camera can detect to the events and counts that it records."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from cryosim.core.decay import mean_decay
from cryosim.core.fourier import SamplingWarning, number, squared_frequencies
from cryosim.core.record import differentiated, hidden
from cryosim.microscope.coincidence import draw_events
from cryosim.microscope.detector import Detector, nps
from cryosim.microscope.draws import refuse_transforms, without_derivative
from cryosim.microscope.events import Events, histogram
from cryosim.microscope.optics import is_zero


def events_per_frame(expected: torch.Tensor, detector: Detector, frames: int = 1) -> torch.Tensor:
    """Mean number of events per pixel and camera frame, before a binary pixel saturates.

    Of n electrons per pixel and frame, the fraction (1 - exp(-n A)) / (n A) is counted, A = pi r^2: those of which no
    electron that came earlier in the frame lies within the coincidence radius r (Matérn 1960, hard core of type II).
    n is the mean over the disc; beyond the border the image goes on as at the border. Dark events come on top.

    A binary pixel tells 1 - exp(-m) of m events. Electrons that survive a coincidence lie apart: they share pixels less
    often than independent events do, and never where r >= sqrt(2) px. So m is raised for 1 - exp(-m) to be the chance
    of a hit all the same: to -log(1 - s) of s survivors per pixel that never share it, as a series in s.

    Parameters
    ----------
    expected : tensor (..., y, x)
        Detectable electrons of the whole exposure: after quantum efficiency, MTF and gain, as `expected_counts` returns
        them [e-/px].
    detector : Detector
    frames : int
        Camera frames of the exposure.

    Returns
    -------
    tensor (..., y, x)
        [1 / (px · frame)], differentiable.

    Raises
    ------
    ValueError
        When there are no frames.
    """
    return _rate(expected if detector.nps is None else expected / detector.nps[0].to(expected), detector, frames)


def recorded_counts(expected: torch.Tensor, detector: Detector, frames: int = 1) -> torch.Tensor:
    """Mean counts that the camera records in an exposure: frames · m, or frames (1 - exp(-m)) of binary pixels.

    Parameters
    ----------
    expected : tensor (..., y, x)
        Detectable electrons of the whole exposure, as `expected_counts` returns them [e-/px].
    detector : Detector
    frames : int
        Camera frames of the exposure.

    Returns
    -------
    tensor (..., y, x)
        [counts/px], differentiable.

    Raises
    ------
    ValueError
        When there are no frames.

    Source
    ------
    Zambon 2024, DOI 10.3389/fphy.2024.1408430, of pixels that are read sparsely as hit or not.
    """
    recorded = recorded_of(events_per_frame(expected, detector, frames), detector, frames)
    return recorded if detector.nps is None else recorded * detector.nps[0].to(recorded)


def sample_counts(
    expected: torch.Tensor, detector: Detector, frames: int = 1, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One draw of the counts of an exposure; its mean is `recorded_counts`.

    Poisson counts, or of binary pixels binomial ones of all frames. With a coincidence radius the electrons are
    drawn one by one (`sample_events`), since those that are lost leave gaps about the others.

    With a noise power spectrum the counts are rendered as such a camera renders its events: each is spread over
    pixels, so that signal and noise are both filtered. With h = sqrt(NPS NPS(0)) the events are drawn from
    the mean over h, and h gives their noise its colour; an event adds NPS(0) counts. Counts are then no whole numbers
    and may be negative. The mean is filtered as if mirrored at the borders, the noise as if periodic.

    Parameters
    ----------
    expected : tensor (..., y, x)
        Detectable electrons of the whole exposure, as `expected_counts` returns them [e-/px]. Negative values, from
        rounding or ringing, count as 0.
    detector : Detector
    frames : int
        Camera frames of the exposure.
    generator : torch.Generator, optional
        The same seed gives the same counts.

    Returns
    -------
    tensor (..., y, x)
        [counts/px]. A draw has no derivative: where one is asked for, RuntimeError says what to use.

    Raises
    ------
    ValueError
        When there are no frames, or `expected` is not finite, or negative without a positive value.

    Warns
    -----
    SamplingWarning
        When `expected` rings to less than -5 % of its largest value.
    """
    _check_expected("sample_counts", expected)
    electrons = _electrons(expected, detector).clamp_min(0)
    rate = _rate(electrons, detector, frames)
    with torch.no_grad():
        drawn = _draw(electrons.detach(), rate.detach(), detector, frames, generator)
        if detector.nps is not None:
            mean = recorded_counts(expected.detach().clamp_min(0), detector, frames)
            noise = drawn - recorded_of(rate.detach(), detector, frames)
            drawn = torch.where(mean > 0, mean + _coloured(noise, detector), 0.0)
    return without_derivative(drawn, rate)


def sample_events(
    expected: torch.Tensor,
    detector: Detector,
    frames: int = 1,
    *,
    supersampling: int = 1,
    generator: torch.Generator | None = None,
) -> Events:
    """One draw of the electrons of an exposure, one by one, in the order of their frame and pixel.

    Each falls into any frame and anywhere in its (sub-)pixel. Then, within each frame: an electron is lost if one
    that came earlier lies within the coincidence radius; dark events are added; of those in one binary pixel the first
    is kept. Electrons just beyond the border, as many as at the border, take part in the coincidences.

    With a noise power spectrum these are the events before they are rendered: drawn from `expected` over the
    filter h of `sample_counts`.

    Sub-pixels carry detail beyond the pixels' own Nyquist frequency, as a camera's electrons do, and sums of events
    over pixels are aliased by it; pixels (supersampling 1) are cut there. The two differ by 3 to 20 % rms of the
    contrast of a bare protein at the curve of Falcon 4i, and by more for an ideal detector.

    Parameters
    ----------
    expected : tensor (y, x) or (supersampling * y, supersampling * x)
        Detectable electrons of the whole exposure [e-/px] or [e-/sub-pixel]; the sub-pixels of a pixel sum to it, but
        for the detail beyond its Nyquist frequency. Negative values, from rounding or ringing, count as 0.
    detector : Detector
    frames : int
        Camera frames of the exposure.
    supersampling : int
        Sub-pixels of `expected` along the side of a pixel.
    generator : torch.Generator, optional
        The same seed gives the same events.

    Returns
    -------
    Events
        A draw has no derivative: where one is asked for, RuntimeError says what to use.

    Raises
    ------
    ValueError
        When the shape does not fit, there are no frames, `expected` is not finite, or negative without a positive
        value, or so many electrons fall in one frame that their coincidences cannot be listed.

    Warns
    -----
    SamplingWarning
        When `expected` rings to less than -5 % of its largest value.
    """
    refuse_transforms("sample_events")
    _check_expected("sample_events", expected)
    if frames < 1 or frames != int(frames):
        raise ValueError(f"sample_events.frames: expected a whole number of at least 1, got {frames}.")
    if expected.ndim != 2 or supersampling < 1 or any(n % supersampling for n in expected.shape):
        raise ValueError(
            f"sample_events.expected: expected one image, of shape (y, x) or {supersampling} times (y, x), got "
            f"{tuple(expected.shape)}. Give one image at a time, and its supersampling."
        )
    electrons = _electrons(expected, detector, supersampling)
    with torch.no_grad():
        events = draw_events(electrons.detach(), detector, frames, supersampling, generator)
    if not differentiated(electrons):
        return events
    y, x = (without_derivative(at, electrons) for at in (events.y, events.x))
    return events.replace(y=y, x=x)


def thin(
    counts: torch.Tensor | Events, fraction: float = 0.5, *, generator: torch.Generator | None = None
) -> tuple[Any, Any]:
    """Counts or events dealt out at random into two that sum to them.

    Each electron goes into the first with probability `fraction`. Both parts of Poisson counts are Poisson and
    independent (Kingman 1993, Poisson Processes, section 5.1). Those of a camera with coincidence are not: electrons
    that it keeps lie apart, so the noise of the halves is anticorrelated at low frequencies, by 0.2 on a Falcon 4i at
    0.03 electrons per pixel and frame. Coincidence acts within a frame, so there take frames by turns: `alternating`.

    Parameters
    ----------
    counts : tensor (...) or Events
        Whole numbers [counts/px], or events.
    fraction : float
        Between 0 and 1.
    generator : torch.Generator, optional

    Returns
    -------
    (tensor (...), tensor (...)) or (Events, Events)
        Kept and rest.

    Raises
    ------
    ValueError
        When the fraction is not one, or the counts are not whole numbers.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"thin.fraction: expected a number from 0 to 1, got {fraction}.")
    if isinstance(counts, Events):
        mask = torch.rand(len(counts), generator=generator, dtype=torch.float64, device=counts.frame.device) < fraction
        return counts.index(mask), counts.index(~mask)
    real = counts.detach() if counts.is_floating_point() else counts.double()
    if not hidden() and not ((real >= 0) & (real == real.floor())).all():
        raise ValueError(
            "thin.counts: expected whole numbers of at least 0. Thin before counts are rendered or scaled."
        )
    kept = torch.binomial(real, torch.full_like(real, fraction), generator=generator)
    kept = without_derivative(kept.to(counts.dtype), counts)
    return kept, counts - kept


def _draw(
    electrons: torch.Tensor, rate: torch.Tensor, detector: Detector, frames: int, generator: torch.Generator | None
) -> torch.Tensor:
    """Events (..., y, x) per pixel, before they are rendered."""
    if not is_zero(detector.coincidence_radius):
        refuse_transforms("sample_counts")
        images = [
            histogram(draw_events(image, detector, frames, 1, generator)).to(image)
            for image in electrons.reshape(-1, *electrons.shape[-2:])
        ]
        return torch.stack(images).reshape(electrons.shape)
    if detector.counting == "binary":
        return torch.binomial(torch.full_like(rate, frames), -torch.expm1(-rate), generator=generator)
    return torch.poisson(frames * rate, generator=generator)


def recorded_of(rate: torch.Tensor, detector: Detector, frames: int | torch.Tensor) -> torch.Tensor:
    """Mean counts in so many frames of `events_per_frame`, of which a binary pixel tells one a frame."""
    return frames * (-torch.expm1(-rate) if detector.counting == "binary" else rate)


def _rate(electrons: torch.Tensor, detector: Detector, frames: int) -> torch.Tensor:
    """Events per pixel and camera frame (..., y, x) of electrons (..., y, x) per pixel and exposure."""
    if frames < 1 or frames != int(frames):
        raise ValueError(f"frames: expected a whole number of at least 1, got {frames}.")
    rate = electrons / frames
    if not is_zero(detector.coincidence_radius):
        radius = torch.as_tensor(detector.coincidence_radius, dtype=rate.dtype, device=rate.device)
        rate = rate * mean_decay(math.pi * radius**2 * _disc_mean(rate, radius))
        if detector.counting == "binary":
            rate = rate + _apart(radius) * rate**2 * (1 / 2 + rate / 3 + rate**2 / 4)
    return rate if detector.dark is None else rate + detector.dark.to(rate)


def _disc_mean(image: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Mean (..., y, x) over a disc of pixels about each one; the border is repeated."""
    reach = math.ceil(number(radius) + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    distance = (offsets[:, None] ** 2 + offsets[None, :] ** 2).sqrt()
    disc = (radius + 0.5 - distance).clamp(0, 1)  # how much of a pixel lies inside
    flat = image.reshape(-1, 1, *image.shape[-2:])
    padded = torch.nn.functional.pad(flat, (reach,) * 4, mode="replicate")
    return torch.nn.functional.conv2d(padded, (disc / disc.sum())[None, None]).reshape(image.shape)


def _apart(radius: torch.Tensor) -> torch.Tensor:
    """Chance that two random points of a unit square are nearer than `radius` (Philip 2007, square line picking)."""
    u = radius**2
    near = math.pi * u - 8 / 3 * u * radius + u**2 / 2
    v = (u - 1).clamp_min(1e-12)
    root = v.sqrt()
    far = 1 / 3 + 8 / 3 * v * root - u**2 / 2 - (2 - math.pi) * u - 4 * u * root.atan() + 4 * root
    return torch.where(radius <= 1, near, torch.where(u < 2, far, 1.0))


# rendering ------------------------------------------------------------------------------------------------------------


def _electrons(expected: torch.Tensor, detector: Detector, s: int = 1) -> torch.Tensor:
    """Electrons (..., y, x) before they are rendered: `expected` over h, the image mirrored at its borders."""
    if detector.nps is None:
        return expected
    ny, nx = expected.shape[-2:]
    mirrored = torch.cat([expected, expected.flip(-2)], -2)
    mirrored = torch.cat([mirrored, mirrored.flip(-1)], -1)
    filtered = torch.fft.rfft2(mirrored) / _rendering(mirrored, detector, s)
    return torch.fft.irfft2(filtered, s=(2 * ny, 2 * nx))[..., :ny, :nx]


def _coloured(noise: torch.Tensor, detector: Detector) -> torch.Tensor:
    """White noise (..., y, x) times h."""
    filtered = torch.fft.rfft2(noise) * _rendering(noise, detector, 1)
    return torch.fft.irfft2(filtered, s=(noise.shape[-2], noise.shape[-1]))


def _rendering(image: torch.Tensor, detector: Detector, s: int) -> torch.Tensor:
    """h = sqrt(NPS NPS(0)) (y, x // 2 + 1) at the frequencies of an image; held beyond the corners of the band."""
    shape = (image.shape[-2], image.shape[-1])
    radius = squared_frequencies(shape, half=True, dtype=image.dtype, device=image.device).sqrt()
    power = nps(detector, (2 * s * radius).clamp_max(math.sqrt(2)))
    return (power * power[0, 0]).sqrt()


def _check_expected(name: str, expected: torch.Tensor) -> None:
    if hidden() or not expected.numel():
        return
    low, high = (float(v) for v in torch.aminmax(expected.detach()))
    rings = low < -1e-6 - 0.05 * max(high, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)) or (rings and high <= 0):
        raise ValueError(
            f"{name}.expected: expected finite mean counts of at least 0 [e-/px], got {low:g} to {high:g}. "
            "Give what `expected_counts` returns."
        )
    if rings:
        values = expected.detach()
        share = float(values.clamp_max(0).sum(dtype=torch.float64) / values.clamp_min(0).sum(dtype=torch.float64))
        warnings.warn(
            f"{name}.expected: detail beyond the pixels' Nyquist frequency rings, down to {low:.3g} e-/px under a top "
            f"of {high:.3g}. Negative values, {-100 * share:.2g} % of the electrons, are set to 0. Use finer pixels.",
            SamplingWarning,
            stacklevel=3,
        )
