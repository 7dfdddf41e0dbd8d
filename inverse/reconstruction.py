"""From a tilt series to a tomogram: prepare the images, then reconstruct slab by slab of rows.

Tilted about y, row y of the volume depends on row y of the images alone. So the images are prepared once, in two
dimensions, and the volume is made in slabs of rows whose memory does not grow with the tomogram.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional

from cryosim.acquisition.series import TiltSeries
from cryosim.core.constants import interaction_constant
from cryosim.core.fourier import (
    fast_length,
    frequencies,
    half_frequencies,
    resampling_matrix,
    shifted,
    squared_frequencies,
)
from cryosim.core.record import Record, item
from cryosim.core.volume import Volume
from cryosim.microscope.optics import ctf as contrast_transfer
from inverse.physics.closed_form import backproject_filtered, gram_solver
from inverse.physics.spectral import TiltGeometry, tilt_geometry
from inverse.solvers.linear import Filter, low_passed, wbp_filter

Method = Literal["wbp", "least-squares"]
Correction = Literal["flip", "wiener", "none"]
_ROWS = 64
_DEEPEST = 16384  # [voxel]: what is deeper was asked for in another unit


class Reconstruction(Record):
    """What `reconstruct` returns.

    Attributes
    ----------
    volume : Volume
        Potential above its surroundings [V], as far as the images carry it.
    damping : tensor ()
        That least squares used [voxel^2]; NaN for back-projection.
    """

    volume: Volume
    damping: torch.Tensor = item(0)


def reconstruct(
    series: TiltSeries,
    method: Method = "wbp",
    *,
    thickness: float | None = None,
    bin: int = 1,
    ctf: Correction = "flip",
    filter: Filter = "ramp",
    low_pass: float | None = None,
    weight: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Tomogram of a tilt series.

    Parameters
    ----------
    series : TiltSeries
        Counts, or any images whose mean is the unscattered intensity.
    method : {"wbp", "least-squares"}
        Weighted back-projection, or damped least squares in closed form.
    thickness : float, optional
        Of the volume along the beam [Å]; half the width of the images when left out.
    bin : int
        Image pixels to a voxel edge, by cutting in Fourier space.
    ctf : {"flip", "wiener", "none"}
        Correction of the contrast transfer, one defocus an image: its sign only, also its size where it is not small,
        or nothing. A series without optics is not corrected.
    filter : {"ramp", "exact"}
        Of the back-projection.
    low_pass : float, optional
        Finest period to keep [Å].
    weight : float, optional
        Of the damping, as in `inverse.least_squares` [voxel^2], positive; when left out, estimated from the images'
        noise and signal.
    progress : callable, optional
        Called with (rows done, rows in all).

    Returns
    -------
    Reconstruction

    Warns
    -----
    UserWarning
        When the series has no optics: not corrected, and scaled as for 300 kV.

    Raises
    ------
    ValueError
        For an unknown method, a number out of bounds, or images that hold no electrons.
    """
    if method not in ("wbp", "least-squares"):
        raise ValueError(f'reconstruct: expected the method "wbp" or "least-squares", got {method!r}.')
    if thickness is not None and not thickness > 0:
        raise ValueError(f"reconstruct: expected a positive thickness [Å], got {thickness}.")
    if low_pass is not None and not 0 < low_pass < math.inf:
        raise ValueError(f"reconstruct: expected a positive low_pass [Å], got {low_pass}. Leave it out to keep all.")
    if weight is not None and not 0 < weight < math.inf:
        raise ValueError(f"reconstruct: expected a positive weight [voxel^2], got {weight}.")
    images, noise = prepare(series, bin=bin, ctf=ctf)  # (tilt, y, x) [V·voxel], (tilt,) [V^2·voxel^2]
    voxel = float(series.pixel_size) * bin
    thickness = images.shape[2] * voxel / 2 if thickness is None else thickness
    if thickness > _DEEPEST * voxel:
        raise ValueError(
            f"reconstruct: expected a thickness of at most {_DEEPEST} voxels of {voxel:g} Å, got {thickness:g} Å. "
            "Check its unit, or raise bin."
        )
    if low_pass is not None:
        images = low_passed(images, low_pass / voxel)
    angles = series.tilts.angles
    depth, (rows, width) = max(1, round(thickness / voxel)), images.shape[1:]
    geometry = tilt_geometry(depth, width, width, "camera", float(angles.abs().max()))
    if method == "wbp":
        damping = torch.tensor(torch.nan)
        action = wbp_filter(angles, geometry, filter)
    else:
        damping = estimated_damping(images, noise, angles, geometry) if weight is None else torch.tensor(float(weight))
        action = gram_solver(angles, damping, geometry)
    values = images.new_empty(depth, rows, width)
    for start in range(0, rows, _ROWS):
        slab = slice(start, min(start + _ROWS, rows))
        values[:, slab] = backproject_filtered(images[:, slab], angles, geometry, action)
        if progress:
            progress(slab.stop, rows)
    return Reconstruction(Volume(values, voxel), damping)


def prepare(series: TiltSeries, *, bin: int = 1, ctf: Correction = "flip") -> tuple[torch.Tensor, torch.Tensor]:
    """Images as line integrals of potential, in the frame whose tilt axis is y, and the variance of their noise.

    The contrast I / mean(I) - 1 of a weak object is 2 sigma ctf V (see `cryosim.microscope.optics`); here it is divided
    by 2 sigma and the voxel size, corrected for the sign of the ctf at least, turned and shifted back as
    `TiltScheme` says, cut to the bin, and faded out at the edges.

    Returns
    -------
    images : tensor (tilt, y, x)
        [V·voxel].
    noise : tensor (tilt,)
        Variance of a pixel by counting statistics [V^2·voxel^2].
    """
    if ctf not in ("flip", "wiener", "none"):
        raise ValueError(f'reconstruct: expected the ctf "flip", "wiener" or "none", got {ctf!r}.')
    counts, tilts, optics = series.images, series.tilts, series.optics
    counts = counts if counts.is_floating_point() else counts.float()
    ny, nx = counts.shape[1:]
    if not 1 <= bin <= min(ny, nx) or bin != int(bin):
        raise ValueError(f"reconstruct: expected a whole bin from 1 to {min(ny, nx)}, the image's side, got {bin}.")
    if not torch.isfinite(counts).all():
        raise ValueError("reconstruct: TiltSeries.images holds values that are not finite; leave those tilts out.")
    mean = counts.mean((1, 2), keepdim=True)
    if not (mean > 0).all():
        empty = [round(float(a), 2) for a in tilts.angles[(mean <= 0).flatten()]]
        raise ValueError(f"reconstruct: the images at {empty} degrees hold no electrons; leave those tilts out.")
    contrast = counts / mean - 1
    voltage = torch.as_tensor(300.0 if optics is None else optics.voltage, dtype=torch.float64)
    gain = 1 / (2 * interaction_constant(voltage) * series.pixel_size * bin).to(contrast)
    gain = gain.reshape(-1, 1, 1)
    spectra = torch.fft.rfft2(contrast)
    if optics is None:
        warnings.warn(
            "reconstruct: the series has no optics, so its contrast transfer is not corrected, and its volts are "
            "those of a 300 kV microscope. Set TiltSeries.optics.",
            UserWarning,
            stacklevel=3,
        )
    if optics is None or ctf == "none":
        correction = -contrast.new_ones(ny, nx)  # matter is dark in underfocus
    else:
        transfer = contrast_transfer(optics, (ny, nx), series.pixel_size)
        transfer = transfer.to(spectra.dtype if transfer.is_complex() else contrast.dtype).conj()
        correction = torch.sgn(transfer) if ctf == "flip" else transfer / (transfer.abs() ** 2 + 0.1)
    corrected = torch.fft.irfft2(spectra * correction[..., : spectra.shape[-1]], s=(ny, nx))
    noise = _kept_noise(correction, bin, float(tilts.axis_angle)) / mean.flatten() * gain.flatten() ** 2
    aligned = to_tilt_frame(corrected, tilts.shifts / series.pixel_size, float(tilts.axis_angle))
    if bin > 1:
        rows, columns = (resampling_matrix(n, n // bin, float(bin), dtype=aligned.dtype) for n in aligned.shape[1:])
        aligned = rows @ aligned @ columns.T
    return _faded(aligned * gain), noise


def to_tilt_frame(images: torch.Tensor, shifts: torch.Tensor, axis_angle: float) -> torch.Tensor:
    """Images (tilt, y, x) moved back by `shifts` (tilt, 2) [(x, y) px] and turned back so that the tilt axis is y.

    By Fourier interpolation: a shift is a phase, a turn is whole quarter turns and three shears (Unser, Thévenaz &
    Yaroslavsky 1995, doi:10.1109/83.465102). A quarter turn exchanges height and width.
    """
    if bool((shifts != 0).any()):
        images = shifted(images, -shifts)
    quarters = round(axis_angle / 90)
    images = _quarter_turns(images, -quarters)
    rest = torch.deg2rad(torch.tensor(-(axis_angle - 90 * quarters), dtype=torch.float64))
    if abs(float(rest)) < 1e-9:
        return images
    ny, nx = images.shape[1:]
    margin = [n // 2 + 1 for n in (ny, nx)]  # the shears push corners out before they bring them back
    wide = [fast_length(n + 2 * m) for n, m in zip((ny, nx), margin, strict=True)]
    before = [w // 2 - n // 2 for w, n in zip(wide, (ny, nx), strict=True)]
    after = [w - n - b for w, n, b in zip(wide, (ny, nx), before, strict=True)]
    padded = functional.pad(images, (before[1], after[1], before[0], after[0]))
    padded = _shear_x(padded, -float(torch.tan(rest / 2)))
    padded = _shear_x(padded.mT, float(torch.sin(rest))).mT
    padded = _shear_x(padded, -float(torch.tan(rest / 2)))
    return padded[:, before[0] : before[0] + ny, before[1] : before[1] + nx]


def _quarter_turns(images: torch.Tensor, quarters: int) -> torch.Tensor:
    """Images turned by `quarters` * 90 degrees from x towards y about sample n // 2."""
    for _ in range(quarters % 4):  # (x, y) -> (-y, x)
        images = images.mT.flip(-1)
        if images.shape[-1] % 2 == 0:
            images = images.roll(1, -1)
    return images


def _shear_x(images: torch.Tensor, slope: float) -> torch.Tensor:
    """Content at (x, y) moved to (x + slope y, y)."""
    ny, nx = images.shape[1:]
    y = torch.arange(ny, dtype=images.dtype, device=images.device) - ny // 2
    k = half_frequencies(nx, dtype=images.dtype, device=images.device)
    turns = -slope * y[:, None] * k
    phases = torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)
    return torch.fft.irfft(torch.fft.rfft(images) * phases, n=nx)


def _kept_noise(correction: torch.Tensor, bin: int, axis_angle: float) -> torch.Tensor:
    """Variance () or (tilt,) that white noise of variance 1 has after `correction` (..., y, x) and the cut to the bin.

    The mean, over all frequencies, of what the correction and the cut leave; the cut is square in the turned frame.
    """
    power = correction.abs().double().square()
    if bin > 1:
        ny, nx = power.shape[-2:]
        ky, kx = frequencies(ny, dtype=torch.float64)[:, None], frequencies(nx, dtype=torch.float64)
        turn = math.radians(-axis_angle)
        across, along = kx * math.cos(turn) - ky * math.sin(turn), kx * math.sin(turn) + ky * math.cos(turn)
        power = power * (torch.maximum(across.abs(), along.abs()) < 0.5 / bin - 1e-9).to(power)
    return power.mean((-2, -1)).to(correction.real.dtype)


def _faded(images: torch.Tensor, fraction: float = 0.05) -> torch.Tensor:
    """Images brought to zero by cosine edges, `fraction` of each side wide."""
    for axis in (-2, -1):
        n = images.shape[axis]
        edge = max(1, round(fraction * n))
        distance = torch.arange(n, dtype=images.dtype, device=images.device)
        distance = torch.minimum(distance, distance.flip(0)) + 0.5
        window = torch.sin(0.5 * torch.pi * (distance / edge).clamp_max(1)) ** 2
        images = images * (window[:, None] if axis == -2 else window)
    return images


def estimated_damping(
    images: torch.Tensor, noise: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry
) -> torch.Tensor:
    """Damping () [voxel^2]: the noise over the signal at the frequency where the specimen stands out most.

    A volume of power s in each layer shows depth / cos t times s in tilt t. So s is what the power of the images,
    averaged on rings, exceeds that of the noise by, over that factor. Structures of the strongest ring come back as a
    Wiener filter would have them, weaker ones less damped than that. At least a tenth of the noise counts as signal.
    """
    ny, nx = images.shape[1:]
    power = (torch.fft.rfft2(images).abs().square().double() / (ny * nx)).mean(0)  # (y, x // 2 + 1)
    ring = (squared_frequencies((ny, nx), half=True, dtype=torch.float64).sqrt() * min(ny, nx)).round().long()
    sums = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add(0, ring.flatten(), power.flatten())
    rings = (sums / torch.bincount(ring.flatten()))[2 : min(ny, nx) // 2]  # without the mean and the edges' own ring
    background = noise.double().mean()
    seen = (geometry.depth / torch.cos(torch.deg2rad(angles.double()))).mean()
    signal = (rings - background).max() if len(rings) else torch.zeros_like(background)
    return background * seen / signal.clamp_min(0.1 * background)


def back_projected(series: TiltSeries, thickness: float, bin: int) -> Volume:
    """Weighted back-projection (z, y, x) [V] of a tilt series, for datasets; `thickness` [Å] as in `reconstruct`."""
    return reconstruct(series, "wbp", thickness=thickness, bin=bin).volume
