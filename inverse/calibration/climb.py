"""The climb to the most likely alignment: shifts by Fisher scoring, with thickness and angles, the axis by trying.

The likelihood is that of `inverse.calibration.tilt_likelihood`. Low frequencies come first: their maxima are broad.
Shifts that a displacement of the specimen would make, (X cos t + Z sin t, Y), change nothing and are held at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cryosim.core.fourier import resampling_matrix
from cryosim.microscope.optics import Optics, aberration_at
from inverse.calibration.tilt_likelihood import Field, Geometry, Model, field_of, spectra_of
from inverse.physics.deformed import free_shifts

Progress = Callable[[int, int], None]

BANDS = {0.03: 1.0, 0.045: 0.5, 0.065: 0.25, 0.09: 0.1, 0.13: 0.03, 0.2: 0.0, 0.3: 0.0}
"""Frequencies |u| up to which images are used, one after another [1/px], each with `alone` of `Model`."""
_GROWN = 0.13  # [1/px]: up to here or a little more, tilts are placed one by one
_ALONE = 0.1  # of `Model` then
_AWAY = 0.06  # of the field, that shifts are expected to be off
_JUMPS = 0.1  # [1/px]: with coarser images, single tilts may go anywhere
_TURNS = ((-5.0, -2.5, 0.0, 2.5, 5.0), (-1.2, 0.0, 1.2), (-0.4, 0.0, 0.4))  # of the axis [deg]
_FINE = 0.15  # [1/px]: of images up to this frequency or more, the axis is told
_LOST = 0.2  # of what images have in common: less, and one is likely lost
OFF = 0.5  # [deg] that the angles are expected to be off


class Data(NamedTuple):
    """Images (tilt, y, x), the angles they came with, what the lens does to them, and what is fitted."""

    images: torch.Tensor
    angles: torch.Tensor
    optics: Optics | None
    pixel_size: float
    fit: tuple[str, ...]


class Fit(NamedTuple):
    """A geometry, the model it was found by, the amplitudes moved back (k, tilt), and their log-likelihood over that of
    tilts that have nothing to do with each other: other than the likelihood itself, it does not change with how much of
    an image a turn brings into the field."""

    geometry: Geometry
    model: Model
    x: torch.Tensor
    value: float


def binned(images: torch.Tensor, bin: int) -> torch.Tensor:
    """Contrast (tilt, y, x), float64: counts over their mean."""
    cut = [resampling_matrix(n, n // bin, float(bin), dtype=torch.float64) for n in images.shape[1:]]
    counts = bool((images.amin((1, 2)) >= 0).all())
    small = []
    for image in images:
        one = image.double() / image.double().mean() if counts else image.double()
        one = one - one.mean()
        small.append(one if bin == 1 else cut[0] @ one @ cut[1].T)
    return torch.stack(small)


def climbed(data: Data, geometry: Geometry, bands: dict[float, float], progress: Progress | None) -> tuple[Fit, float]:
    """The most likely geometry, and the standard error of the axis [deg]."""
    spread, found = math.inf, None
    turns = list(_TURNS) if "axis_angle" in data.fit else []
    fine = min((band for band in bands if band >= _GROWN), default=max(bands))
    grown = _grown(data, geometry, fine)
    for i, (band, alone) in enumerate(bands.items()):
        last = i == len(bands) - 1
        rounds = 4 if band < _JUMPS or last else 2
        found = settled(data, geometry, band, rounds, alone)
        if band == fine:
            other = settled(data, grown, band, rounds, alone)
            found = max(found, other, key=lambda fit: fit.value)
        geometry = found.geometry
        while turns and (last or (band >= _FINE and len(turns) > 1)):
            geometry, spread = turned(data, geometry, band, turns.pop(0), alone)
        if progress is not None:
            progress(i + 1, len(bands))
    assert found is not None
    if "axis_angle" in data.fit:
        found = settled(data, geometry, max(bands), 3)
    return found, spread


def _grown(data: Data, geometry: Geometry, band: float) -> Geometry:
    """Another start: tilt by tilt. Behind a lens there is little to go by in the low frequencies."""
    field = field_of(data.images, geometry, band)
    transfer = transfer_of(data, field, geometry.axis_angle)
    model = Model(field, spectra_of(field, geometry.angles, transfer), geometry, transfer, _ALONE)
    moves = model.grown(_AWAY * min(data.images.shape[1:]))
    return geometry._replace(shifts=geometry.shifts + taken(moves, geometry.axis_angle))


def lost_tilts(found: Fit) -> torch.Tensor:
    """Tilts (tilt,) that have little in common with the others."""
    common = found.model.agreement(found.x)
    return common < _LOST * common.median()


def settled(data: Data, geometry: Geometry, band: float, rounds: int, alone: float = 0.0, turn: float = 0.0) -> Fit:
    """The maximum near a geometry, with images up to one frequency."""
    found: Fit | None = None
    for _ in range(rounds):
        field = field_of(data.images, geometry, band, turn)
        transfer = transfer_of(data, field, geometry.axis_angle)
        spectra = spectra_of(field, geometry.angles, transfer)
        model = Model(field, spectra, geometry, transfer, alone)
        move = scored(model, model.jumped() if band < _JUMPS else torch.zeros_like(geometry.shifts))
        x = model.moved(move)
        geometry = geometry._replace(shifts=geometry.shifts + taken(move, geometry.axis_angle))
        found = Fit(geometry, model, x, model.log_likelihood(x) - model.apart_log_likelihood(x))
        if "thickness" in data.fit and band >= 0.09:
            slope, information = model.thickness_score(x)
            change = max(-0.3, min(0.3, slope / (information + 4)))  # log T is expected within a factor of two or so
            most = 0.9 * min(data.images.shape[1:])
            geometry = geometry._replace(thickness=min(most, max(2.0, geometry.thickness * math.exp(change))))
        if "angles" in data.fit and band >= 0.13:
            slope, information = model.angle_score(x)
            weight = information + torch.eye(len(slope), dtype=torch.float64) / OFF**2
            expected = (geometry.angles - data.angles) / OFF**2
            off = torch.linalg.solve(weight, slope - expected).clamp(-0.5, 0.5)
            geometry = geometry._replace(angles=geometry.angles + off - off.mean())
    assert found is not None
    return found._replace(geometry=geometry)


def scored(model: Model, shifts: torch.Tensor) -> torch.Tensor:
    """Shifts (tilt, 2) [px], in the frame whose axis is y, near some at which the likelihood is largest."""
    n = len(model.noise)
    information = model.shift_information()
    free = free_shifts(model.geometry.angles)
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


def taken(vectors: torch.Tensor, axis_angle: float) -> torch.Tensor:
    """Vectors (..., 2) of the frame whose axis is y, in the images as they were taken."""
    a = math.radians(axis_angle)
    turn = torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]], dtype=torch.float64)
    return vectors @ turn


def turned(data: Data, geometry: Geometry, band: float, turns: Sequence[float], alone: float) -> tuple[Geometry, float]:
    """The geometry at the best of some axes, and the standard error of a parabola through the best three [deg]."""
    tried, axis = [], geometry.axis_angle
    widest = max(abs(axis + turn - 90 * round(axis / 90)) for turn in turns)
    for turn in turns:
        one = settled(data, geometry._replace(axis_angle=axis + turn), band, 1, alone, widest)
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


def transfer_of(data: Data, field: Field, axis_angle: float) -> torch.Tensor | None:
    """The lens at the frequencies of a field (k, tilt), with its sign; None without optics."""
    if data.optics is None:
        return None
    columns = []
    for i in range(field.u.shape[1]):
        one = data.optics.index(i)
        k = taken(field.u[:, i], axis_angle) / data.pixel_size
        contrast = torch.asin(torch.as_tensor(one.amplitude_contrast, dtype=torch.float64))
        columns.append(torch.sin(aberration_at(one, k[:, 0], k[:, 1]) - contrast))
    return torch.stack(columns, 1)
