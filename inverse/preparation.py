"""Images of a tilt series made ready for reconstruction: line integrals of potential about a tilt axis along y.

Tilt by tilt and in two dimensions: contrast, correction of the lens, alignment, bin, faded edges, low pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.core.constants import interaction_constant
from cryosim.core.fourier import cosine_edges, frequencies, resampling_matrix, ring_means, squared_frequencies
from cryosim.microscope.optics import Optics
from cryosim.microscope.optics import ctf as contrast_transfer
from cryosim.specimen.damage import Damage, fading
from inverse.physics.turn import to_tilt_frame
from inverse.solvers.linear import low_passed

Correction = Literal["flip", "wiener", "none"]

_SAMPLES = 256  # along both frequencies, of a transfer that is averaged on rings


def frame_shape(series: TiltSeries, bin: int) -> tuple[int, int]:
    """(y, x) of the prepared images: a tilt axis nearer to x than to y exchanges the two."""
    ny, nx = series.images.shape[1:]
    if not 1 <= bin <= min(ny, nx) or bin != int(bin):
        raise ValueError(f"reconstruct: expected a whole bin from 1 to {min(ny, nx)}, the image's side, got {bin}.")
    if round(float(series.tilts.axis_angle) / 90) % 2:
        ny, nx = nx, ny
    return ny // int(bin), nx // int(bin)


def prepare(
    series: TiltSeries, *, bin: int = 1, ctf: Correction = "flip", low_pass: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All of `prepared_images` at once: images (tilt, y, x) [V·voxel] and noise (tilt,) [V^2·voxel^2]."""
    images, noise = None, []
    for i, (image, variance) in enumerate(prepared_images(series, bin=bin, ctf=ctf, low_pass=low_pass)):
        images = image.new_empty(len(series.tilts), *image.shape) if images is None else images
        images[i] = image
        noise.append(variance)
    assert images is not None
    return images, torch.stack(noise)


@torch.no_grad()
def prepared_images(
    series: TiltSeries, *, bin: int = 1, ctf: Correction = "flip", low_pass: float | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images as line integrals of potential, in the frame whose tilt axis is y, and the variance of their noise.

    The contrast I / mean(I) - 1 of a weak object is 2 sigma ctf V (see `cryosim.microscope.optics`); here it is divided
    by 2 sigma and the voxel size, corrected for the sign of the ctf at least, turned and shifted back as
    `TiltScheme` says, cut to the bin, faded out at the edges, and cut at `low_pass` [Å].

    Yields
    ------
    image : tensor (y, x)
        Of one tilt [V·voxel].
    noise : tensor ()
        Variance of its pixels by counting statistics, before the edges fade and `low_pass` [V^2·voxel^2].
    """
    if ctf not in get_args(Correction):
        raise ValueError(f'reconstruct: expected the ctf "flip", "wiener" or "none", got {ctf!r}.')
    frame_shape(series, bin)
    _check_counts(series)
    if series.optics is None:
        warnings.warn(
            "reconstruct: the series has no optics, so its contrast transfer is not corrected, and its volts are "
            "those of a 300 kV microscope. Set TiltSeries.optics.",
            UserWarning,
            stacklevel=2,
        )
    dtype = torch.float64 if series.images.dtype == torch.float64 else torch.float32
    sides = frame_shape(series, 1)
    cut = [resampling_matrix(n, n // bin, float(bin), dtype=dtype) for n in sides] if bin > 1 else []
    correction = None
    for i in range(len(series.tilts)):
        one = series.replace(movies=None).index(slice(i, i + 1))
        if correction is None or correction.ndim == 3:  # one for all tilts, where they share the optics
            correction = _correction(one, ctf, dtype)
        image, noise = _line_integrals(one, correction, bin, dtype)
        image = faded_edges(cut[0] @ image @ cut[1].T if cut else image)
        yield image if low_pass is None else low_passed(image, low_pass / (float(series.pixel_size) * bin)), noise


def _check_counts(series: TiltSeries) -> None:
    finite = [bool(torch.isfinite(image).all()) for image in series.images]
    if not all(finite):
        raise ValueError("reconstruct: TiltSeries.images holds values that are not finite; leave those tilts out.")
    means = [float(image.sum(dtype=torch.float64)) for image in series.images]
    empty = [round(float(a), 2) for a, mean in zip(series.tilts.angles, means, strict=True) if not mean > 0]
    if empty:
        raise ValueError(f"reconstruct: the images at {empty} degrees hold no electrons; leave those tilts out.")


def _correction(one: TiltSeries, ctf: Correction, dtype: torch.dtype) -> torch.Tensor:
    """What the spectrum of a contrast is multiplied with, (y, x), or (1, y, x) where the optics belong to the tilt."""
    if one.optics is None:
        return -torch.ones(one.images.shape[1:], dtype=dtype)  # matter is dark in underfocus
    transfer = contrast_transfer(one.optics, (one.images.shape[1], one.images.shape[2]), one.pixel_size)
    return _inverted(transfer.to(dtype.to_complex() if transfer.is_complex() else dtype), ctf)


def _inverted(transfer: torch.Tensor, ctf: Correction) -> torch.Tensor:
    """What corrects for a contrast transfer (..., y, x), by the sign or more."""
    if ctf == "none":
        return -torch.ones_like(transfer)
    return torch.sgn(transfer.conj()) if ctf == "flip" else transfer.conj() / (transfer.abs() ** 2 + 0.1)


def carried(series: TiltSeries, rings: int, *, bin: int = 1, ctf: Correction = "flip") -> torch.Tensor:
    """Share of the potential that prepared images show in rings of frequency (tilt, ring) [1].

    What the lens lets through and its correction makes of that, times what the dose of Grant & Grigorieff's critical
    exposure leaves (2015, doi:10.7554/eLife.06980), in `cryosim.core.fourier.ring_means`. A series
    without optics is taken to have a perfect lens, and a series without doses (all zero) not to fade.
    """
    voxel, shape = float(series.pixel_size) * bin, (_SAMPLES, _SAMPLES)
    square, shares = squared_frequencies(shape, voxel, dtype=torch.float64), []
    for i in range(len(series.tilts)):
        left = fading(Damage(), square, series.tilts.moment(i), _voltage(series.optics))
        optics = series.replace(movies=None).index(slice(i, i + 1)).optics
        if optics is not None:
            transfer = contrast_transfer(optics, shape, voxel).reshape(shape)
            left = left * (transfer * _inverted(transfer, ctf)).real
        shares.append(left)
    return ring_means(torch.stack(shares), rings)


def _voltage(optics: Optics | None) -> torch.Tensor:
    return torch.as_tensor(300.0 if optics is None else optics.voltage, dtype=torch.float64)


def _line_integrals(
    one: TiltSeries, correction: torch.Tensor, bin: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (y, x) of a series of one tilt, not yet cut to the bin, and the variance () of its noise when it is."""
    counts, tilts, axis_angle = one.images.to(dtype), one.tilts, float(one.tilts.axis_angle)
    mean = counts.mean()
    contrast = counts / mean - 1
    gain = 1 / (2 * interaction_constant(_voltage(one.optics)) * one.pixel_size * bin).to(dtype).reshape(())
    spectrum = torch.fft.rfft2(contrast)
    corrected = torch.fft.irfft2(spectrum * correction[..., : spectrum.shape[-1]], s=contrast.shape[1:])
    noise = _kept_noise(correction, bin, axis_angle).reshape(()) / mean * gain**2
    return to_tilt_frame(corrected, tilts.shifts / one.pixel_size, axis_angle)[0] * gain, noise


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


def faded_edges(images: torch.Tensor, fraction: float = 0.05) -> torch.Tensor:
    """Images brought to zero by cosine edges, `fraction` of each side wide."""
    for axis in (-2, -1):
        n = images.shape[axis]
        if n == 1:
            continue
        window = cosine_edges(n, max(1, round(fraction * n)), dtype=images.dtype, device=images.device)
        images = images * (window[:, None] if axis == -2 else window)
    return images


def kept_variance(shape: tuple[int, int], low_pass: float | None) -> float:
    """Share [1] of the variance of white noise that faded edges and a low pass [px] leave of images (y, x)."""
    share = float(faded_edges(torch.ones(shape, dtype=torch.float64)).square().mean())
    if low_pass is None:
        return share
    point = torch.zeros(shape, dtype=torch.float64)
    point[0, 0] = 1
    return share * float(low_passed(point, low_pass).square().sum())
