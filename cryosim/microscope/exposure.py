"""The waist: slices of potential in, expected counts out. Simulation and inversion both pass through here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cryosim.microscope.detector import Detector, detect
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics, per_image
from cryosim.microscope.scattering import SliceSource, multislice


def expected_counts(
    slices: SliceSource,
    optics: Optics,
    detector: Detector,
    *,
    dose: float | torch.Tensor,
    scattering: Callable[[SliceSource, Optics], torch.Tensor] = multislice,
) -> torch.Tensor:
    """Mean number of electrons that each pixel counts.

    Parameters
    ----------
    slices : source of slices (..., y, x)
        [V·Å].
    optics : Optics
    detector : Detector
    dose : float or tensor () or (...)
        Electrons that fall on the specimen [e-/Å^2].
    scattering : callable
        `multislice` or another function of (slices, optics) that returns an exit wave.

    Returns
    -------
    tensor (..., y, x)
        [e-/px], of the detector's shape.

    Raises
    ------
    ValueError
        When the detector is larger than the simulated field, or from `scattering`.
    """
    wave = scattering(slices, optics)  # (..., y, x)
    intensity = image(wave, optics, slices.pixel_size)  # (..., y, x) [1]
    seen = detect(intensity, slices.pixel_size, detector)  # (..., y, x) [1]
    return per_image(dose, seen.dtype, seen.device) * detector.pixel_size**2 * seen
