"""Alignment of a tilt series without markers and without a volume: shifts, tilt axis, angles, thickness.

What is made large is the likelihood of `inverse.calibration.tilt_likelihood`, by Fisher scoring, from low frequencies
to high ones. Shifts that a displacement of the specimen would make, (X cos t + Z sin t, Y), change nothing and are held
at 0; so is the mean of the angles, which a turned specimen would change. The axis is found by trying: at each of a few
angles the shifts are found anew, and a parabola through the likelihoods has its maximum and its standard error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.core.fourier import resampling_matrix
from cryosim.microscope.optics import Optics, aberration_at
from inverse.calibration.tilt_likelihood import Field, Geometry, Model, field_of, spectra_of

Parameter = Literal["shifts", "axis_angle", "angles", "thickness"]
Progress = Callable[[int, int], None]

_BANDS = {0.03: 1.0, 0.045: 0.5, 0.065: 0.25, 0.09: 0.1, 0.13: 0.03, 0.2: 0.0, 0.3: 0.0}
"""Frequencies |u| up to which images are used, one after another [1/px], each with `alone` of `Model`."""
_JUMPS = 0.1  # [1/px]: with coarser images, single tilts may go anywhere
_WIDTH = 256  # [px] to which images are binned
_TURNS = ((-5.0, -2.5, 0.0, 2.5, 5.0), (-1.2, 0.0, 1.2), (-0.4, 0.0, 0.4))  # of the axis [deg]
_FINE = 0.15  # [1/px]: of images up to this frequency or more, the axis is told
_LOST = 0.2  # of what images have in common: less, and one is likely lost
_OFF = 0.5  # [deg] that the angles are expected to be off


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
    deformation : None
        Not estimated.
    standard_errors : dict of str to tensor
        Of "shifts" (tilt, 2) [Å], "axis_angle" [deg], "angles" (tilt,) [deg], "thickness" [Å]; of what was fitted.
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
    deformation: None
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
        return [*told, f"images to {self.finest:.1f} Å; {self.gained:,.0f} nat more likely than as they came"]


class _Data(NamedTuple):
    """Images (tilt, y, x), the angles they came with, what the lens does to them, and what is fitted."""

    images: torch.Tensor
    angles: torch.Tensor
    optics: Optics | None
    pixel_size: float
    fit: tuple[str, ...]


class _Fit(NamedTuple):
    """A geometry, the model it was found by, the amplitudes moved back (k, tilt), and their log-likelihood over that of
    tilts that have nothing to do with each other: other than the likelihood itself, it does not change with how much of
    an image a turn brings into the field."""

    geometry: Geometry
    model: Model
    x: torch.Tensor
    value: float


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
        Of "shifts", "axis_angle", "angles" and "thickness".
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
    data = _Data(_binned(images, bin), turned, optics, step, tuple(fit))
    begun = torch.zeros(len(turned), 2) if shifts is None else torch.as_tensor(shifts) / step
    start = Geometry(
        begun.double(),
        turned,
        0.0 if axis_angle is None else axis_angle,
        (0.2 * min(data.images.shape[1:]) if thickness is None else thickness / step),
    )
    limit = max(_BANDS) if finest is None else min(max(_BANDS), step / finest)
    least = 2.8 / min(data.images.shape[1:])  # a handful of frequencies
    if limit < least:
        raise ValueError(f"align: expected a finest period below {step / least:.3g} Å, got {finest} Å.")
    bands = {band: alone for band, alone in _BANDS.items() if least < band < limit} | {limit: 0.0}
    found, spread = _climbed(data, start, bands, progress)
    return _result(data, start, found, spread, limit)


def _expect(images: torch.Tensor, angles: torch.Tensor, pixel_size: float, fit: Sequence[str]) -> None:
    if images.ndim != 3 or len(images) != len(angles) or len(angles) < 3 or min(images.shape[1:]) < 32:
        raise ValueError(
            f"align: expected images (tilt, y, x) of 3 or more tilts and 32 or more pixels, and as many angles, got "
            f"{tuple(images.shape)} and {len(angles)} angles."
        )
    if not bool((angles.abs() < 85).all()) or not 0 < pixel_size < math.inf:
        raise ValueError("align: expected angles within 85 degrees, and a positive pixel_size [Å].")
    unknown = sorted(set(fit) - {"shifts", "axis_angle", "angles", "thickness"})
    if unknown or "shifts" not in fit:
        raise ValueError(
            f'align: expected fit with "shifts", and "axis_angle", "angles", "thickness", got {list(fit)}.'
        )
    bad = [i for i, image in enumerate(images) if not bool(torch.isfinite(image).all()) or float(image.std()) == 0]
    if bad:
        raise ValueError(f"align: the images {bad} are constant or not finite. Leave those tilts out.")


def _binned(images: torch.Tensor, bin: int) -> torch.Tensor:
    """Contrast (tilt, y, x), float64: counts over their mean."""
    cut = [resampling_matrix(n, n // bin, float(bin), dtype=torch.float64) for n in images.shape[1:]]
    counts = bool((images.amin((1, 2)) >= 0).all())
    small = []
    for image in images:
        one = image.double() / image.double().mean() if counts else image.double()
        one = one - one.mean()
        small.append(one if bin == 1 else cut[0] @ one @ cut[1].T)
    return torch.stack(small)


# the climb ------------------------------------------------------------------------------------------------------------


def _climbed(
    data: _Data, geometry: Geometry, bands: dict[float, float], progress: Progress | None
) -> tuple[_Fit, float]:
    """The most likely geometry, and the standard error of the axis [deg]."""
    spread, found = math.inf, None
    turns = list(_TURNS) if "axis_angle" in data.fit else []
    for i, (band, alone) in enumerate(bands.items()):
        last = i == len(bands) - 1
        found = _settled(data, geometry, band, 4 if band < _JUMPS or last else 2, alone)
        geometry = found.geometry
        while turns and (last or (band >= _FINE and len(turns) > 1)):
            geometry, spread = _turned(data, geometry, band, turns.pop(0), alone)
        if progress is not None:
            progress(i + 1, len(bands))
    assert found is not None
    if "axis_angle" in data.fit:
        found = _settled(data, geometry, max(bands), 3)
    return found, spread


def _lost(found: _Fit) -> torch.Tensor:
    """Tilts (tilt,) that have little in common with the others."""
    common = found.model.agreement(found.x)
    return common < _LOST * common.median()


def _settled(data: _Data, geometry: Geometry, band: float, rounds: int, alone: float = 0.0, turn: float = 0.0) -> _Fit:
    """The maximum near a geometry, with images up to one frequency."""
    found: _Fit | None = None
    for _ in range(rounds):
        field = field_of(data.images, geometry, band, turn)
        transfer = _transfer(data, field, geometry.axis_angle)
        spectra = spectra_of(field, geometry.angles, transfer)
        model = Model(field, spectra, geometry, transfer, alone)
        move = _scored(model, model.jumped() if band < _JUMPS else torch.zeros_like(geometry.shifts))
        x = model.moved(move)
        geometry = geometry._replace(shifts=geometry.shifts + _taken(move, geometry.axis_angle))
        found = _Fit(geometry, model, x, model.log_likelihood(x) - model.apart_log_likelihood(x))
        if "thickness" in data.fit and band >= 0.09:
            slope, information = model.thickness_score(x)
            change = max(-0.3, min(0.3, slope / (information + 4)))  # log T is expected within a factor of two or so
            most = 0.9 * min(data.images.shape[1:])
            geometry = geometry._replace(thickness=min(most, max(2.0, geometry.thickness * math.exp(change))))
        if "angles" in data.fit and band >= 0.13:
            slope, information = model.angle_score(x)
            weight = information + torch.eye(len(slope), dtype=torch.float64) / _OFF**2
            expected = (geometry.angles - data.angles) / _OFF**2
            off = torch.linalg.solve(weight, slope - expected).clamp(-0.5, 0.5)
            geometry = geometry._replace(angles=geometry.angles + off - off.mean())
    assert found is not None
    return found._replace(geometry=geometry)


def _scored(model: Model, shifts: torch.Tensor) -> torch.Tensor:
    """Shifts (tilt, 2) [px], in the frame whose axis is y, near some at which the likelihood is largest."""
    n = len(model.noise)
    information = model.shift_information()
    free = _free(model.geometry.angles)
    projected = free.T @ information @ free
    damping = 1e-3
    x = model.moved(shifts)
    value = model.log_likelihood(x)
    for _ in range(20):
        slope = free.T @ model.shift_score(x)
        gained = 0.0
        for _ in range(6):
            step = free @ torch.linalg.solve(projected + damping * torch.diag(projected.diagonal()), slope)
            trial = shifts + step.clamp(-6, 6).reshape(2, n).T
            moved = model.moved(trial)
            new = model.log_likelihood(moved)
            if new > value:
                gained, shifts, x, value, damping = new - value, trial, moved, new, damping / 4
                break
            damping *= 8
        if gained < 0.01:
            break
    return shifts


def _free(angles: torch.Tensor) -> torch.Tensor:
    """Directions (2 tilt, parameter), all x and then all y, that no displacement of the specimen makes."""
    n, t = len(angles), torch.deg2rad(angles)
    held = torch.zeros(2 * n, 3, dtype=torch.float64)
    held[:n, 0], held[:n, 1], held[n:, 2] = torch.cos(t), torch.sin(t), 1.0
    basis = torch.linalg.qr(torch.cat([held, torch.eye(2 * n, dtype=torch.float64)], 1))[0]
    return basis[:, 3 : 2 * n]


def _taken(vectors: torch.Tensor, axis_angle: float) -> torch.Tensor:
    """Vectors (..., 2) of the frame whose axis is y, in the images as they were taken."""
    a = math.radians(axis_angle)
    turn = torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]], dtype=torch.float64)
    return vectors @ turn


def _turned(
    data: _Data, geometry: Geometry, band: float, turns: Sequence[float], alone: float
) -> tuple[Geometry, float]:
    """The geometry at the best of some axes, and the standard error of a parabola through the best three [deg]."""
    tried, axis = [], geometry.axis_angle
    widest = max(abs(axis + turn - 90 * round(axis / 90)) for turn in turns)
    for turn in turns:
        one = _settled(data, geometry._replace(axis_angle=axis + turn), band, 1, alone, widest)
        tried.append((one.value, turn, one.geometry))
    best = max(range(len(tried)), key=lambda i: tried[i][0])
    middle = min(max(best, 1), len(tried) - 2)
    (low, _, _), (here, turn, _), (high, _, _) = tried[middle - 1 : middle + 2]
    width = turns[1] - turns[0]
    bend = (2 * here - low - high) / width**2
    if bend <= 0:
        return tried[best][2], math.inf
    top = max(-1.5 * width, min(1.5 * width, 0.5 * (high - low) / (bend * width)))
    return tried[best][2]._replace(axis_angle=axis + turn + top), bend**-0.5


def _transfer(data: _Data, field: Field, axis_angle: float) -> torch.Tensor | None:
    """The lens at the frequencies of a field (k, tilt), with its sign; None without optics."""
    if data.optics is None:
        return None
    columns = []
    for i in range(field.u.shape[1]):
        one = data.optics.index(i)
        k = _taken(field.u[:, i], axis_angle) / data.pixel_size
        contrast = torch.asin(torch.as_tensor(one.amplitude_contrast, dtype=torch.float64))
        columns.append(torch.sin(aberration_at(one, k[:, 0], k[:, 1]) - contrast))
    return torch.stack(columns, 1)


# the result -----------------------------------------------------------------------------------------------------------


def _result(data: _Data, start: Geometry, found: _Fit, spread: float, band: float) -> Alignment:
    geometry, model, n = found.geometry, found.model, len(found.geometry.angles)
    free = _free(geometry.angles)
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
        weight = information + torch.eye(n, dtype=torch.float64) / _OFF**2
        told["angles"] = torch.linalg.inv(weight).diagonal().sqrt()
    first = start._replace(thickness=geometry.thickness)
    before = field_of(data.images, first, band)
    transfer = _transfer(data, before, first.axis_angle)
    old = Model(before, spectra_of(before, first.angles, transfer)._replace(noise=model.noise), first, transfer)
    gained = found.value - (old.log_likelihood(before.seen) - old.apart_log_likelihood(before.seen))
    lost = [round(float(t), 1) for t in geometry.angles[_lost(found)]]
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
        deformation=None,
        standard_errors=told,
        log_likelihood=found.value,
        gained=gained,
        finest=data.pixel_size / band,
    )
