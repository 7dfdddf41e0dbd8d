"""Gain and defects of a camera: measured on flat images, taken out of others."""

from __future__ import annotations

import torch

from cryosim.microscope.detector import Detector

HOT = 1e-3
"""Dark events [1 / (px · camera frame)] above which a pixel is hot: 6 % of the 0.017 electrons of usual exposures."""


def gain_corrected(counts: torch.Tensor, detector: Detector) -> torch.Tensor:
    """Counts over the gain; dead and hot pixels become the mean of their good neighbours.

    Dead pixels have gain 0, hot ones dark events above `HOT`. The neighbours are the 3 x 3 pixels about one; where none
    of them is good, 5 x 5, then 9 x 9, and so on, the reach doubled each time.

    Parameters
    ----------
    counts : tensor (..., y, x)
        [counts/px].
    detector : Detector

    Returns
    -------
    tensor (..., y, x)
        [counts/px].

    Raises
    ------
    ValueError
        When no pixel is good, or a count is not finite.
    """
    good = torch.ones(counts.shape[-2:], dtype=torch.bool, device=counts.device)
    counts = counts if counts.is_floating_point() else counts.to(torch.get_default_dtype())
    corrected = counts
    if detector.gain is not None:
        gain = detector.gain.to(counts)
        good = good & (gain > 0)
        corrected = counts / torch.where(gain > 0, gain, 1.0)
    if detector.dark is not None:
        good = good & (detector.dark.to(counts.device) <= HOT)
    if not good.any():
        raise ValueError(
            "gain_corrected: expected some good pixels, got none. Look at Detector.gain and Detector.dark."
        )
    y, x = (~good).nonzero(as_tuple=True)
    if not len(y):
        return corrected
    if not bool(torch.isfinite(counts).all()):
        raise ValueError("gain_corrected.counts: expected finite numbers, got NaN or infinity. Mend the image first.")
    least = counts.detach().amin().clamp_max(0)  # sums of sums round: what was empty stays so
    tables = [_sums(values) for values in (good, torch.where(good, corrected, 0.0))]
    corrected, reach = corrected.clone(), 1
    while len(y):
        near, total = (_box_sum(table, y, x, reach) for table in tables)
        found = near > 0
        mean = (total[..., found] / near[found]).to(corrected.dtype)
        corrected[..., y[found], x[found]] = mean.clamp_min(least) if least == 0 else mean
        y, x, reach = y[~found], x[~found], 2 * reach
    return corrected


def measure_gain(flats: torch.Tensor) -> torch.Tensor:
    """Gain reference (y, x): the mean of flat exposures (image, y, x) over its own mean.

    Parameters
    ----------
    flats : tensor (image, y, x)
        Counts of evenly lit exposures [counts/px].

    Raises
    ------
    ValueError
        When they hold no counts.
    """
    mean = flats.mean(0)
    if not float(mean.mean()) > 0:
        raise ValueError(f"measure_gain.flats: expected counts, got a mean of {float(mean.mean()):g}. Expose longer.")
    return mean / mean.mean()


def _sums(image: torch.Tensor) -> torch.Tensor:
    """Sums (..., y + 1, x + 1) float64 over all the pixels before each corner of pixels."""
    return torch.nn.functional.pad(image.double().cumsum(-2).cumsum(-1), (1, 0, 1, 0))


def _box_sum(sums: torch.Tensor, y: torch.Tensor, x: torch.Tensor, reach: int) -> torch.Tensor:
    """Sum (..., n) over the (2 reach + 1)^2 pixels about the pixels y, x (n,), as far as they lie in the image."""
    top, left = (v.sub(reach).clamp_min(0) for v in (y, x))
    bottom, right = (v.add(reach + 1).clamp_max(n - 1) for v, n in zip((y, x), sums.shape[-2:], strict=True))
    return sums[..., bottom, right] - sums[..., top, right] - sums[..., bottom, left] + sums[..., top, left]
