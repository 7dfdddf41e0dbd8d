"""Alignment of a tilt series without markers and without a volume: shifts, tilt axis, angles, thickness.

What is made large is the likelihood of `inverse.calibration.tilt_likelihood`, by Fisher scoring, from low frequencies
to high ones. Shifts that a displacement of the specimen would make, (X cos t + Z sin t, Y), change nothing and are held
at 0; so is the mean of the angles, which a turned specimen would change. The axis is found by trying: at each of a few
angles the shifts are found anew, and a parabola through the likelihoods has its maximum and its standard error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.microscope.optics import Optics
from inverse.calibration.climb import (
    BANDS,
    OFF,
    Data,
    Fit,
    Progress,
    binned,
    climbed,
    free_shifts,
    lost_tilts,
    transfer_of,
)
from inverse.calibration.local_alignment import ROUNDS, Bent, bent
from inverse.calibration.tilt_likelihood import Geometry, Model, field_of, spectra_of

Parameter = Literal["shifts", "axis_angle", "angles", "thickness", "deformation"]
_PARAMETERS = ("shifts", "axis_angle", "angles", "thickness", "deformation")

_WIDTH = 256  # [px] to which images are binned


class Alignment(NamedTuple):
    """What `align` returns.

    Attributes
    ----------
    shifts : tensor (tilt, 2)
        By which the content of each image is displaced, (x, y) in the image as it was taken [Å].
    axis_angle : float
        [deg].
    angles : tensor (tilt,)
        [deg].
    thickness : float
        Of the specimen [Å].
    deformation : tensor (tilt, 3, 2, y, x) or None
        Displacements (x, y, z) [Å] in each tilt at control points from end to end of the images' field, for
        `DeformedProjection` of a volume as wide; None where not fitted. Of what a tilt shows, the shortest; none is the
        same in all tilts, and none moves an image as a whole.
    standard_errors : dict of str to tensor
        Of "shifts" (tilt, 2) [Å], "axis_angle" [deg], "angles" (tilt,) [deg], "thickness" [Å], "deformation"
        (tilt, 2, y, x) across and along the axis [Å]; of what was fitted.
    log_likelihood : float
        Of the images, over that of tilts that have nothing to do with each other [nat].
    gained : float
        Log-likelihood over that of the alignment it began with, at the same frequencies [nat].
    finest : float
        Period up to which images were used [Å].
    """

    shifts: torch.Tensor
    axis_angle: float
    angles: torch.Tensor
    thickness: float
    deformation: torch.Tensor | None
    standard_errors: dict[str, torch.Tensor]
    log_likelihood: float
    gained: float
    finest: float

    def lines(self) -> list[str]:
        """The figures, for people."""
        error = self.standard_errors
        told = [
            f"tilt {angle:7.2f} deg  shift {x:9.2f} ± {ex:.2f} Å along x, {y:9.2f} ± {ey:.2f} Å along y"
            for angle, (x, y), (ex, ey) in zip(
                self.angles.tolist(), self.shifts.tolist(), error["shifts"].tolist(), strict=True
            )
        ]
        for name, value, unit in (("axis_angle", self.axis_angle, "deg"), ("thickness", self.thickness, "Å")):
            margin = f" ± {float(error[name]):.2f}" if name in error else ", as given"
            told.append(f"{name.replace('_', ' ')} {value:.2f}{margin} {unit}")
        if self.deformation is not None:
            size, margin = (
                float(v.square().mean().sqrt()) for v in (self.deformation.sum(2) / 2, error["deformation"])
            )
            told.append(f"deformation {3**0.5 * size:.2f} Å rms, ± {2**0.5 * margin:.2f} Å at the control points")
        return [*told, f"images to {self.finest:.1f} Å; {self.gained:,.0f} nat more likely than as they came"]


@torch.no_grad()
def align(
    images: torch.Tensor | TiltSeries,
    angles: torch.Tensor | Sequence[float] | None = None,
    pixel_size: float | None = None,
    *,
    axis_angle: float | None = None,
    thickness: float | None = None,
    shifts: torch.Tensor | None = None,
    optics: Optics | None = None,
    fit: Sequence[Parameter] = ("shifts", "axis_angle", "thickness"),
    bin: int | None = None,
    finest: float | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Align a tilt series.

    Parameters
    ----------
    images : TiltSeries, or tensor (tilt, y, x)
        Counts or contrast, in any unit.
    angles : tensor (tilt,)
        [deg]; those of a series come with it, as do pixel size, axis, shifts and optics.
    pixel_size : float
        [Å].
    axis_angle : float, optional
        Of the tilt axis, from y, right to about 5 degrees [deg]; 0 when left out.
    thickness : float, optional
        Of the specimen, to begin with [Å]; a fifth of the images' side when left out.
    shifts : tensor (tilt, 2), optional
        To begin with [Å].
    optics : Optics, optional
        Fields () or (tilt,); the images are taken as they are, with the sign of the lens in them.
    fit : sequence of str
        Of "shifts", "axis_angle", "angles", "thickness" and "deformation", which is smooth and different in each tilt;
        it takes images of 75 pixels or more after binning.
    bin : int, optional
        Pixels to one; when left out, so that about 256 are left.
    finest : float, optional
        Period beyond which images are not used [Å].
    progress : callable, optional
        Called with the steps done and their number.

    Returns
    -------
    Alignment

    Raises
    ------
    ValueError
        For images or angles that do not fit, are constant or not finite, or unknown names.

    Warns
    -----
    UserWarning
        When images have little in common with the others, or were more likely as they came.
    """
    if isinstance(images, TiltSeries):
        series = images
        images, pixel_size = series.images, float(series.pixel_size)
        angles = series.tilts.angles if angles is None else angles
        axis_angle = float(series.tilts.axis_angle) if axis_angle is None else axis_angle
        shifts = series.tilts.shifts if shifts is None else shifts
        optics = series.optics if optics is None else optics
    if angles is None or pixel_size is None:
        raise ValueError("align: expected angles [deg] and pixel_size [Å] with images that are not a TiltSeries.")
    turned = torch.as_tensor(angles, dtype=torch.float64)
    _expect(images, turned, pixel_size, fit)
    bin = max(1, round(min(images.shape[1:]) / _WIDTH)) if bin is None else bin
    step = pixel_size * bin
    data = Data(binned(images, bin), turned, optics, step, tuple(fit))
    begun = torch.zeros(len(turned), 2) if shifts is None else torch.as_tensor(shifts) / step
    start = Geometry(
        begun.double(),
        turned,
        0.0 if axis_angle is None else axis_angle,
        (0.2 * min(data.images.shape[1:]) if thickness is None else thickness / step),
    )
    limit = max(BANDS) if finest is None else min(max(BANDS), step / finest)
    least = 2.8 / min(data.images.shape[1:])  # a handful of frequencies
    if limit < least:
        raise ValueError(f"align: expected a finest period below {step / least:.3g} Å, got {finest} Å.")
    bands = {band: alone for band, alone in BANDS.items() if least < band < limit} | {limit: 0.0}
    steps = len(bands) + ("deformation" in fit) * len(ROUNDS)

    def report(done: int, _: int = 0) -> None:
        if progress is not None:
            progress(done, steps)

    found, spread = climbed(data, start, bands, report)
    bend = bent(data, found, limit, lambda i: report(len(bands) + i)) if "deformation" in fit else None
    return _result(data, start, found if bend is None else bend.fit, spread, limit, bend)


def _expect(images: torch.Tensor, angles: torch.Tensor, pixel_size: float, fit: Sequence[str]) -> None:
    if images.ndim != 3 or len(images) != len(angles) or len(angles) < 3 or min(images.shape[1:]) < 32:
        raise ValueError(
            f"align: expected images (tilt, y, x) of 3 or more tilts and 32 or more pixels, and as many angles, got "
            f"{tuple(images.shape)} and {len(angles)} angles."
        )
    if not bool((angles.abs() < 85).all()) or not 0 < pixel_size < math.inf:
        raise ValueError("align: expected angles within 85 degrees, and a positive pixel_size [Å].")
    unknown = sorted(set(fit) - set(_PARAMETERS))
    if unknown or "shifts" not in fit:
        raise ValueError(
            f'align: expected fit with "shifts", and some of {", ".join(_PARAMETERS[1:])}, got {list(fit)}.'
        )
    bad = [i for i, image in enumerate(images) if not bool(torch.isfinite(image).all()) or float(image.std()) == 0]
    if bad:
        raise ValueError(f"align: the images {bad} are constant or not finite. Leave those tilts out.")


# the result -----------------------------------------------------------------------------------------------------------


def _result(data: Data, start: Geometry, found: Fit, spread: float, band: float, bend: Bent | None) -> Alignment:
    geometry, model, n = found.geometry, found.model, len(found.geometry.angles)
    free = free_shifts(geometry.angles)
    covariance = free @ torch.linalg.inv(free.T @ model.shift_information() @ free) @ free.T
    errors = covariance.diagonal().sqrt().reshape(2, n).T
    a = math.radians(geometry.axis_angle)
    squares = torch.tensor([[math.cos(a) ** 2, math.sin(a) ** 2], [math.sin(a) ** 2, math.cos(a) ** 2]])
    told = {"shifts": (errors.square() @ squares.double()).sqrt() * data.pixel_size}
    if "axis_angle" in data.fit:
        told["axis_angle"] = torch.tensor(spread, dtype=torch.float64)
    if "thickness" in data.fit:
        _, information = model.thickness_score(found.x)
        told["thickness"] = torch.tensor(geometry.thickness * information**-0.5 * data.pixel_size, dtype=torch.float64)
    if "angles" in data.fit:
        _, information = model.angle_score(found.x)
        weight = information + torch.eye(n, dtype=torch.float64) / OFF**2
        told["angles"] = torch.linalg.inv(weight).diagonal().sqrt()
    if bend is not None:
        told["deformation"] = bend.errors * data.pixel_size
    first = start._replace(thickness=geometry.thickness)
    before = field_of(data.images, first, band)
    transfer = transfer_of(data, before, first.axis_angle)
    old = Model(before, spectra_of(before, first.angles, transfer)._replace(noise=model.noise), first, transfer)
    gained = found.value - (old.log_likelihood(before.seen) - old.apart_log_likelihood(before.seen))
    lost = [round(float(t), 1) for t in geometry.angles[lost_tilts(found)]]
    if lost:
        warnings.warn(
            f"align: the images at {lost} degrees have little in common with the others, and their shifts are likely "
            "wrong. Leave them out, or give shifts, thickness or axis_angle to begin with.",
            UserWarning,
            stacklevel=3,
        )
    if gained < 0:
        warnings.warn(
            "align: the images were more likely as they came. Give a better axis_angle or thickness, or larger images.",
            UserWarning,
            stacklevel=3,
        )
    return Alignment(
        shifts=geometry.shifts * data.pixel_size,
        axis_angle=geometry.axis_angle,
        angles=geometry.angles,
        thickness=geometry.thickness * data.pixel_size,
        deformation=None if bend is None else _shortest(bend.field, geometry.angles) * data.pixel_size,
        standard_errors=told,
        log_likelihood=found.value,
        gained=gained,
        finest=data.pixel_size / band,
    )


def _shortest(field: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Displacements (tilt, 3, 2, y, x) of the specimen, the shortest that show as (tilt, 2, y, x) in the frame of the
    axis: across it x cos t + z sin t."""
    t = torch.deg2rad(angles)[:, None, None]
    across, along = field[:, 0], field[:, 1]
    seen = torch.stack([across * torch.cos(t), along, across * torch.sin(t)], 1)
    return seen[:, :, None].expand(-1, -1, 2, -1, -1).contiguous()
