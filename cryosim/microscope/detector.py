"""The detector: which part of the image it sees, and with which pixels."""

from __future__ import annotations

import torch

from cryosim.core.fourier import positions
from cryosim.core.record import Record, item, static


class Detector(Record):
    """An ideal counting detector: DQE = 1 up to its Nyquist frequency and 0 beyond.

    Attributes
    ----------
    shape : (int, int)
        (y, x) [px].
    pixel_size : float or tensor ()
        At the specimen [Å].
    """

    shape: tuple[int, int] = static()
    pixel_size: float | torch.Tensor = item(0)


def detect(intensity: torch.Tensor, pixel_size: float | torch.Tensor, detector: Detector) -> torch.Tensor:
    """Intensity (..., y, x) on the pixels of the detector, centred on the box centre.

    The intensity, periodic and band-limited, is low-passed at the detector's Nyquist frequency and evaluated at its
    pixels, exactly, as two matrix products; where the pixels are the same, it is cropped.

    Parameters
    ----------
    intensity : tensor (..., y, x)
    pixel_size : float or tensor ()
        Of the intensity [Å].
    detector : Detector

    Raises
    ------
    ValueError
        When the detector is larger than the image.
    """
    out, given = detector.shape, intensity.shape[-2:]
    ratio = detector.pixel_size / pixel_size  # may carry gradients
    if any(o * float(ratio) > n * (1 + 1e-9) for o, n in zip(out, given, strict=True)):
        raise ValueError(
            f"Detector: {tuple(out)} px of {float(detector.pixel_size):g} Å reach beyond the simulated field of "
            f"{tuple(given)} px of {float(pixel_size):g} Å. Simulate a larger field or use a smaller detector."
        )
    if not isinstance(ratio, torch.Tensor) and ratio == 1.0:
        y, x = (n // 2 - o // 2 for n, o in zip(given, out, strict=True))
        return intensity[..., y : y + out[0], x : x + out[1]]
    rows, columns = (_resampling(n, o, ratio, intensity) for n, o in zip(given, out, strict=True))
    return rows @ intensity @ columns.T


def _resampling(n: int, out: int, ratio: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Real matrix (out, n) from n periodic samples to `out` samples `ratio` times as far apart, without aliasing."""
    cutoff = 0.5 / max(float(ratio), 1.0)  # [cycles / sample]
    m = torch.arange(1, int(cutoff * n - 1e-9) + 1, dtype=torch.float64, device=like.device)
    m = m[2 * m < n]  # the unpaired frequency of an even n has no phase of its own
    to = positions(out, ratio, dtype=torch.float64, device=like.device)
    at = positions(n, dtype=torch.float64, device=like.device)
    turns = 2 * torch.pi * m / n
    there, here = to[:, None] * turns, at[:, None] * turns  # (out, m), (n, m)
    matrix = 1 + 2 * (torch.cos(there) @ torch.cos(here).T + torch.sin(there) @ torch.sin(here).T)
    return (matrix / n).to(like.dtype)
