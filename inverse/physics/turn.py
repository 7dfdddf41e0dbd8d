"""Planes, images and volumes turned by band-limited interpolation: three shears, each a phase in Fourier space.

A turn by t takes (x, z) to u = x cos t + z sin t, w = -x sin t + z cos t, in the plane of any two axes:

    [cos t, sin t; -sin t, cos t] = X(tan(t / 2)) Z(-sin t) X(tan(t / 2))

with X(a): x -> x + a z and Z(b): z -> z + b x (Unser, Thévenaz & Yaroslavsky 1995, doi:10.1109/83.465102). Nothing is
lost to interpolation of what is band-limited; room is made for the corners that shears push out before they bring them
back. On lines of odd length a shear is an orthogonal matrix, so the adjoint of a turn is the turn back, to rounding.
Differentiable in values and angle.
"""

from __future__ import annotations

import math

import torch

from cryosim.core.fourier import fast_length, shifted
from inverse.physics.spectral import fitted


def turned(volume: torch.Tensor, angle: torch.Tensor, depth: int, width: int) -> torch.Tensor:
    """Volume (w, y, u), `depth` and `width` samples, from a volume (z, y, x) turned about y by `angle` () [deg].

    What of the turned volume lies beyond those samples is cut off. |angle| < 90.
    """
    return turned_planes(volume.transpose(0, 1), angle, depth, width).transpose(0, 1)


def turned_planes(planes: torch.Tensor, angle: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Planes (..., w, u), `rows` times `columns`, from planes (..., z, x) turned by `angle` () [deg], |angle| < 90.

    Content at (x, z) comes to (x cos + z sin, -x sin + z cos). The adjoint is the turn by -angle to the old sizes.
    """
    z, x = planes.shape[-2:]
    radians = torch.deg2rad(angle.double())
    half, full = torch.tan(radians / 2), torch.sin(radians)
    a, b = abs(float(half.detach())), abs(float(full.detach()))
    reach_z = max(z, rows) + b * max(x + a * z, columns + a * rows)
    reach_x = max(x, columns) + a * (z + rows)
    planes = fitted(planes, fast_length(math.ceil(reach_x) + 2, odd=True), -1)
    planes = fitted(planes, fast_length(math.ceil(reach_z) + 2, odd=True), -2)
    planes = _sheared(planes, half)
    planes = _sheared(planes.mT, -full).mT
    planes = _sheared(planes, half)
    return fitted(fitted(planes, rows, -2), columns, -1)


def to_tilt_frame(images: torch.Tensor, shifts: torch.Tensor, axis_angle: float) -> torch.Tensor:
    """Images (tilt, y, x) moved back by `shifts` (tilt, 2) [(x, y) px] and turned back so that the tilt axis is y.

    A shift is a phase; a turn is whole quarter turns, which exchange height and width, and three shears.
    """
    if bool((shifts != 0).any()):
        images = shifted(images, -shifts)
    quarters = round(axis_angle / 90)
    images = quarter_turns(images, -quarters)
    rest = axis_angle - 90 * quarters
    if abs(rest) < 1e-7:
        return images
    return turned_planes(images, torch.tensor(rest, dtype=torch.float64), images.shape[-2], images.shape[-1])


def quarter_turns(images: torch.Tensor, quarters: int) -> torch.Tensor:
    """Images (..., y, x) turned by `quarters` * 90 degrees from x towards y about sample n // 2: only reordered."""
    for _ in range(quarters % 4):  # (x, y) -> (-y, x)
        images = images.mT.flip(-1)
        if images.shape[-1] % 2 == 0:
            images = images.roll(1, -1)
    return images


def _sheared(planes: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Content of (..., z, x) at (x, z) moved to (x + slope z, z)."""
    rows, columns = planes.shape[-2:]
    z = torch.arange(rows, dtype=torch.float64, device=planes.device) - rows // 2
    k = torch.fft.rfftfreq(columns, dtype=torch.float64, device=planes.device)
    turns = -slope * z[:, None] * k
    phase = (2 * torch.pi * (turns - turns.detach().round())).to(planes.dtype)
    return torch.fft.irfft(torch.fft.rfft(planes) * torch.polar(torch.ones_like(phase), phase), n=columns)
