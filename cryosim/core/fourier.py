"""The one Fourier convention: frequencies in cycles/Å, unshifted order, forward phases exp(-2 pi i k.r).

Sample n // 2 of an axis is the origin of space, for odd and even n alike (`positions`). Sample 0 of a transform is
frequency zero (`frequencies`).
"""

from __future__ import annotations

import torch
from scipy.fft import next_fast_len

Size = float | torch.Tensor


BAND = 2 / 3
"""Fraction of the Nyquist frequency that waves and slices of potential fill: the largest at which the product of two
does not alias into it."""


class SamplingWarning(UserWarning):
    """A grid or a slice is too coarse or too small for what it is to hold; the message says what would be right."""


def fast_length(least: int, *, odd: bool = False) -> int:
    """Smallest length of at least `least` whose transform is fast; with `odd`, the smallest odd one."""
    if not odd:
        return int(next_fast_len(least, real=True) or least)
    n = least | 1
    while next_fast_len(n) != n:  # of factors up to 11: odd lengths of 3 and 5 alone lie far apart
        n += 2
    return n


def number(value: Size) -> float:
    """The value of a size, without its gradient: for choices (how many samples, is it inside) that have none."""
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def positions(n: int, spacing: Size = 1.0, *, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Coordinates (n,) [unit of `spacing`] of the samples of an axis; sample n // 2 is at 0."""
    return (torch.arange(n, dtype=dtype, device=device) - n // 2) * spacing


def frequencies(n: int, spacing: Size = 1.0, *, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Frequencies (n,) [cycles / unit of `spacing`] of an axis of n samples, unshifted."""
    return torch.fft.fftfreq(n, dtype=dtype, device=device) / spacing


def half_frequencies(
    n: int, spacing: Size = 1.0, *, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Frequencies (n // 2 + 1,) [cycles / unit of `spacing`] of the last axis of a real transform."""
    return torch.fft.rfftfreq(n, dtype=dtype, device=device) / spacing


def squared_frequencies(
    shape: tuple[int, int],
    spacing: Size = 1.0,
    *,
    half: bool = False,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """k^2 (y, x) [cycles^2 / unit^2] of an image; with `half`, (y, x // 2 + 1) as `torch.fft.rfft2` orders it."""
    along_x = half_frequencies if half else frequencies
    ky = frequencies(shape[0], spacing, dtype=dtype, device=device)
    kx = along_x(shape[1], spacing, dtype=dtype, device=device)
    return ky[:, None] ** 2 + kx[None, :] ** 2


def centre_phases(
    n: int, *, half: bool = False, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """exp(+2 pi i m (n // 2) / n), the factor that moves the origin of a transform from sample 0 to sample n // 2."""
    m = torch.arange(n // 2 + 1 if half else n, device=device)
    turns = (m * (n // 2)) % n
    return torch.polar(torch.ones(len(m), dtype=dtype, device=device), 2 * torch.pi * turns.to(dtype) / n)


def band_limit(
    shape: tuple[int, int],
    fraction: float = BAND,
    taper: float = 0.0,
    *,
    half: bool = False,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Circular low-pass (y, x), 1 inside `fraction` of the Nyquist frequency.

    Parameters
    ----------
    shape : (int, int)
        Image shape (y, x) [px].
    fraction : float
        Radius in units of the Nyquist frequency. Two thirds is the largest at which the product of two
        band-limited images does not alias (Kirkland 2020, section 6.8).
    taper : float
        Width of the cosine edge in units of the sampling frequency, inside the radius; 0 cuts sharply.
    """
    k = squared_frequencies(shape, half=half, dtype=torch.float64, device=device).sqrt()
    edge = fraction / 2
    inside = k < edge * (1 - 1e-12)  # the product of two waves on the edge itself aliases to the edge opposite
    if taper == 0:
        return inside.to(dtype)
    ramp = 0.5 * (1 + torch.cos(torch.pi * ((k - (edge - taper)) / taper).clamp(0, 1)))
    return (ramp * inside).to(dtype)


def shifted(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Images (..., y, x), periodic, with their content displaced by `shifts` (..., 2) [(x, y) px].

    Exact trigonometric interpolation: a phase ramp. The adjoint is the shift back; both arguments carry gradients.
    """
    ny, nx = images.shape[-2:]
    ky = frequencies(ny, dtype=images.dtype, device=images.device)[:, None]
    kx = half_frequencies(nx, dtype=images.dtype, device=images.device)
    move = shifts.to(images)
    turns = -2 * torch.pi * (ky * move[..., 1, None, None] + kx * move[..., 0, None, None])
    return torch.fft.irfft2(torch.fft.rfft2(images) * torch.polar(torch.ones_like(turns), turns), s=(ny, nx))


def cosine_edges(
    n: int, edge: float, *, empty: float = 0.0, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Window (n,) that rises as sin^2 over `edge` samples at either end, beyond `empty` ones, and is 1 between."""
    distance = torch.arange(n, dtype=dtype, device=device)
    distance = torch.minimum(distance, distance.flip(0)) + 0.5
    return torch.sin(0.5 * torch.pi * ((distance - empty) / edge).clamp(0, 1)).square()


def dirichlet_kernel(turns: torch.Tensor, odd: int | torch.Tensor) -> torch.Tensor:
    """sum of exp(2 pi i m turns) over the `odd` whole numbers m about 0: sin(pi odd turns) / sin(pi turns), float64."""
    fraction = turns - turns.detach().round()
    near = fraction.abs() < 1e-7
    away = torch.where(near, torch.full_like(fraction, 0.25), fraction)
    quotient = torch.sin(torch.pi * odd * away) / torch.sin(torch.pi * away)
    series = odd * (1 - (torch.pi * fraction) ** 2 * (odd * odd - 1) / 6)  # to second order in `fraction`
    return torch.where(near, series, quotient)


def resampling_matrix(
    n: int,
    out: int,
    ratio: Size,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Matrix (out, n) from n periodic samples to `out` samples `ratio` times as far apart, about the common origin.

    Trigonometric interpolation, low-passed at the Nyquist frequency of the coarser of the two grids.

    Parameters
    ----------
    n, out : int
        Numbers of samples.
    ratio : float or tensor ()
        New spacing over old spacing.
    """
    coarser = torch.as_tensor(ratio, dtype=torch.float64, device=device).detach().clamp_min(1.0)
    # without the unpaired frequency of an even n, which has no phase of its own
    kept = torch.floor(0.5 * n / coarser - 1e-9).clamp(0, (n - 1) // 2)
    new = positions(out, ratio, dtype=torch.float64, device=device)
    old = positions(n, dtype=torch.float64, device=device)
    matrix = dirichlet_kernel((new[:, None] - old) / n, 2 * kept + 1)
    return (matrix / n).to(dtype)


def ring_means(transfer: torch.Tensor, rings: int) -> torch.Tensor:
    """Mean (..., ring) of a transfer function (..., y, x) over rings of equal width, from 0 to half a cycle per pixel.

    The corners beyond belong to no ring; frequencies are unshifted.
    """
    squared = squared_frequencies((transfer.shape[-2], transfer.shape[-1]), dtype=torch.float64)
    ring = (2 * rings * squared.sqrt()).long().flatten().to(transfer.device)
    inside = (ring < rings).nonzero()[:, 0]
    count = torch.bincount(ring[inside], minlength=rings).clamp_min(1)
    sums = transfer.new_zeros(*transfer.shape[:-2], rings)
    return sums.index_add(-1, ring[inside], transfer.flatten(-2)[..., inside]) / count
