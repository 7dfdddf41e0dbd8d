"""The detector: which part of the image it sees, and with which pixels."""

from __future__ import annotations

import torch

from cryosim.core.fourier import number, resampling_matrix
from cryosim.core.record import Record, hidden, item, static


class Detector(Record):
    """An ideal counting detector: DQE = 1 up to its Nyquist frequency and 0 beyond.

    Attributes
    ----------
    shape : (int, int)
        (y, x) [px].
    pixel_size : float or tensor ()
        At the specimen [Å].

    Raises
    ------
    ValueError
        When there are no pixels, or their size is not positive.
    """

    shape: tuple[int, int] = static()
    pixel_size: float | torch.Tensor = item(0)

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"Detector.shape: expected two sizes (y, x) [px] of at least 1, got {tuple(self.shape)}.")
        if isinstance(self.pixel_size, (int, float)) and not self.pixel_size > 0:
            raise ValueError(f"Detector.pixel_size: expected a positive number [Å], got {self.pixel_size}.")


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
    if not hidden() and any(o * number(ratio) > n * (1 + 1e-9) for o, n in zip(out, given, strict=True)):
        raise ValueError(
            f"Detector: {tuple(out)} px of {number(detector.pixel_size):g} Å reach beyond the simulated field of "
            f"{tuple(given)} px of {number(pixel_size):g} Å. Simulate a larger field or use a smaller detector."
        )
    if not isinstance(ratio, torch.Tensor) and ratio == 1.0:
        y, x = (n // 2 - o // 2 for n, o in zip(given, out, strict=True))
        return intensity[..., y : y + out[0], x : x + out[1]]
    rows, columns = (
        resampling_matrix(n, o, ratio, dtype=intensity.dtype, device=intensity.device)
        for n, o in zip(given, out, strict=True)
    )
    return rows @ intensity @ columns.T
