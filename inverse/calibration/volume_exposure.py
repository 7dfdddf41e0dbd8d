"""Expected counts of a volume in volts, through the waist that images atoms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.fourier import fast_length, shifted
from cryosim.core.slices import SliceSource
from cryosim.core.volume import Volume
from cryosim.microscope.detector import Detector
from cryosim.microscope.exposure import expected_counts
from cryosim.microscope.optics import Optics, largest_displacement
from cryosim.specimen.potential import Slices
from inverse.physics.multislice import turned_slices
from inverse.physics.turn import turned_planes


def expected_of_volume(
    volume: Volume,
    tilts: TiltScheme,
    optics: Optics,
    detector: Detector,
    which: int,
    scattering: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Expected counts (frame, y, x) [e-/px] of exposure `which` of a volume (z, y, x) [V] in vacuum.

    Frames are alike. Differentiable in the volume, the angles, shifts, doses and the axis, lens and camera; its slices
    are one voxel thick.

    Raises
    ------
    ValueError
        For an axis that is 90 degrees or more from y, or an angle of 80 degrees or more.
    """
    angle, axis = tilts.angles[which], torch.as_tensor(tilts.axis_angle, dtype=torch.float64)
    size, lens = float(volume.voxel_size), optics.index(which)
    if abs(float(angle.detach())) >= 80 or abs(float(axis.detach())) >= 90:
        raise ValueError(
            "calibrate: expected angles below 80 degrees and an axis within 90 degrees of y for a volume, got "
            f"{float(angle.detach()):g} and {float(axis.detach()):g}. Turn images and volume."
        )
    field = _field(volume, lens, detector)
    slices, centre = turned_slices(volume.values, angle, size, 1, field)
    values = slices.values
    if float(axis.detach()) != 0 or axis.requires_grad or torch.autograd.forward_ad._current_level >= 0:
        values = turned_planes(values, -axis, *field)
    values = shifted(values, tilts.shifts[which] / size)

    def scattered(source: SliceSource, microscope: Optics) -> torch.Tensor:
        return scattering(source, microscope, plane=centre)

    dose = tilts.doses[which] / tilts.frames
    seen = expected_counts(Slices(values, size, size), lens, detector, dose=dose, scattering=scattered)
    return seen.expand(tilts.frames, *seen.shape)


def _field(volume: Volume, lens: Optics, detector: Detector) -> tuple[int, int]:
    """(y, x) [px] of the waves: a square that holds volume and image however they are turned, and a margin."""
    depth, rows, width = volume.values.shape
    across = max(math.hypot(*detector.shape) * float(detector.pixel_size) / float(volume.voxel_size), 1.0)
    with torch.no_grad():
        size = float(volume.voxel_size)
        margin = math.ceil(largest_displacement(lens, 0.5 / size) / size) + 2
    n = fast_length(math.ceil(max(across, math.hypot(rows, math.hypot(depth, width)))) + 2 * margin)
    return n, n
