"""A volume turned about y, by band-limited interpolation: three shears, each a phase in Fourier space.

A turn by t takes (x, z) to u = x cos t + z sin t, w = -x sin t + z cos t. In the plane of x and z it is

    [cos t, sin t; -sin t, cos t] = X(tan(t / 2)) Z(-sin t) X(tan(t / 2))

with X(a): x -> x + a z and Z(b): z -> z + b x (Unser, Thévenaz & Yaroslavsky 1995, doi:10.1109/83.465102). Nothing is
lost to interpolation of what is band-limited; room is made for the corners that shears push out before they bring them
back. Differentiable in volume and angle.
"""

from __future__ import annotations

import math

import torch

from cryosim.core.fourier import fast_length
from inverse.physics.base import fitted


def turned(volume: torch.Tensor, angle: torch.Tensor, depth: int, width: int) -> torch.Tensor:
    """Volume (w, y, u), `depth` and `width` samples, from a volume (z, y, x) and an angle () [deg], |angle| < 90.

    What of the turned volume lies beyond those samples is cut off.
    """
    z, _, x = volume.shape
    radians = torch.deg2rad(angle.double())
    half, full = torch.tan(radians / 2), torch.sin(radians)
    a, b = abs(float(half.detach())), abs(float(full.detach()))
    reach_x = max(x + a * z, width)  # after the first shear
    reach_z = max(z + b * reach_x, depth)
    reach_x = max(reach_x, x + a * (z + reach_z))
    planes = volume.transpose(0, 1)  # (y, z, x)
    planes = fitted(planes, fast_length(math.ceil(reach_x) + 2), -1)
    planes = fitted(planes, fast_length(math.ceil(reach_z) + 2), -2)
    planes = _sheared(planes, half)
    planes = _sheared(planes.mT, -full).mT
    planes = _sheared(planes, half)
    return fitted(fitted(planes, depth, -2), width, -1).transpose(0, 1)


def _sheared(planes: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Content of (..., z, x) at (x, z) moved to (x + slope z, z)."""
    rows, columns = planes.shape[-2:]
    z = torch.arange(rows, dtype=torch.float64, device=planes.device) - rows // 2
    k = torch.fft.rfftfreq(columns, dtype=torch.float64, device=planes.device)
    turns = -slope * z[:, None] * k
    phase = (2 * torch.pi * (turns - turns.detach().round())).to(planes.dtype)
    return torch.fft.irfft(torch.fft.rfft(planes) * torch.polar(torch.ones_like(phase), phase), n=columns)
