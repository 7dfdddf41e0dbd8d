"""The waist: slices of potential in, expected counts out. Simulation and inversion both pass through here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cryosim.core.slices import SliceSource
from cryosim.microscope.detector import Detector, detect, quantum_efficiency
from cryosim.microscope.energy_loss import ICE_LOSSES, LossSpectrum, energy_filtered_image
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics, is_zero, per_image
from cryosim.microscope.scattering import absorbed_depth, multislice


def expected_counts(
    slices: SliceSource,
    optics: Optics,
    detector: Detector,
    *,
    dose: float | torch.Tensor,
    scattering: Callable[[SliceSource, Optics], torch.Tensor] = multislice,
    losses: LossSpectrum = ICE_LOSSES,
    supersampling: int = 1,
) -> torch.Tensor:
    """Mean number of electrons that each pixel detects.

    What the camera makes of them, one frame after the other, is the matter of `cryosim.microscope.counting`: what it
    records is less where it is slow, and more where pixels are hot.

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
    losses : LossSpectrum
        Of the electrons that the slices absorb; used where `optics.slit` lets some of them pass.
    supersampling : int
        Places told apart along each side of a pixel.

    Returns
    -------
    tensor (..., y, x)
        [e-/px], of the detector's shape; with supersampling of its sub-pixels, whose sums are the pixels'.

    Raises
    ------
    ValueError
        When the detector is larger than the simulated field, or from `scattering`.
    """
    wave = scattering(slices, optics)  # (..., y, x)
    if not is_zero(optics.slit):
        # beside molecules in vacuum the band limit rings below zero, by 1e-4 or so
        depth = absorbed_depth(slices, optics).clamp_min(0)  # (..., y, x) [1]
        intensity = energy_filtered_image(wave, depth, optics, slices.pixel_size, losses=losses)
    else:
        intensity = image(wave, optics, slices.pixel_size)  # (..., y, x) [1]
    seen = detect(intensity, slices.pixel_size, detector, supersampling)  # (..., y, x) [1]
    flux = per_image(dose, seen.dtype, seen.device) * quantum_efficiency(detector)  # [e-/Å^2]
    counts = flux * (detector.pixel_size / supersampling) ** 2 * seen
    if detector.gain is None:
        return counts
    return counts * torch.kron(detector.gain.to(counts), counts.new_ones(supersampling, supersampling))
