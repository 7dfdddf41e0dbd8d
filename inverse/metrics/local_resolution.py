"""Local resolution: Fourier shell correlation in a soft window about every voxel.

Let a_k be the part of a volume in a band about the frequency k. In a window g about r two volumes correlate as

    c(k, r) = (g * a_k b_k) / sqrt((g * a_k^2) (g * b_k^2))                                              (1)

which by Parseval's theorem is their shell correlation within the window, the shell blurred by the window's transform.
The bands cos(pi / 2 (|k| - k_i) / step) overlap by half, and their squares sum to one. g is a Gaussian, and what lies
beyond the box counts for nothing: the window of a voxel at a face is the half inside.

A window of deviation sigma holds about

    N = (4 pi)^(3/2) sigma^3 · 4 pi k^2 · 4/3 step                                                       (2)

Fourier samples of a band, both signs counted, and up to 1.6 times as many where sigma step is small; c of independent
noise has the variance 1 / N. Bands with N < 20 are left out. A broad window averages over what it should tell apart,
and a strong neighbour is felt to two sigma and more. A sigma near the coarsest period of interest is a fair start.

Source: Cardone, Heymann & Steven 2013, doi:10.1016/j.jsb.2013.08.002.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from cryosim.core.volume import Volume
from inverse.metrics.fsc import squared_frequencies_3d, two_volumes

_FEWEST_SAMPLES = 20
"""A correlation of fewer tells too little to call a place unresolved by it."""


def local_resolution(
    a: torch.Tensor | Volume,
    b: torch.Tensor | Volume,
    voxel_size: float,
    *,
    window: float | None = None,
    threshold: float = 0.5,
    bands: int = 24,
) -> torch.Tensor:
    """Resolution about every voxel: where the local shell correlation of two volumes first falls below a threshold.

    Parameters
    ----------
    a, b : tensor (z, y, x) or Volume
        Any common unit; they need not be cubes.
    voxel_size : float
        [Å].
    window : float, optional
        Standard deviation of the Gaussian window [Å]; 5 voxels when left out.
    threshold : float
        0.5 for a volume against the truth or for cautious half maps; 0.143 is usual for halves, but falls below the
        noise of a small window.
    bands : int
        Shells from 0 to the Nyquist frequency; fewer where they would be narrower than 1 / (2 pi sigma), which is what
        the window resolves.

    Returns
    -------
    tensor (z, y, x)
        [Å], linear in frequency between bands. The period of the last band where the correlation never falls, infinity
        where it is below the threshold in the first band with enough samples, or a volume is empty about the voxel.

    Raises
    ------
    ValueError
        When the volumes differ in shape or hold values that are not finite, or a number is out of bounds.
    """
    curve = local_correlation(a, b, voxel_size, window=window, bands=bands)
    last, previous = next(curve)
    found = torch.where(previous >= threshold, 0.0, torch.inf)  # 0: not fallen yet
    for k, correlation in curve:
        drop = (previous - correlation).clamp_min(torch.finfo(correlation.dtype).tiny)
        crossing = last + (k - last) * ((previous - threshold) / drop).clamp(0, 1)
        found = torch.where((found == 0) & (correlation < threshold), 1 / crossing, found)
        last, previous = k, correlation
    return torch.where(found == 0, 1 / last, found)


def local_correlation(
    a: torch.Tensor | Volume,
    b: torch.Tensor | Volume,
    voxel_size: float,
    *,
    window: float | None = None,
    bands: int = 24,
) -> Iterator[tuple[float, torch.Tensor]]:
    """Equation (1), band by band: frequency [1/Å] and correlation (z, y, x), 0 where a volume is empty.

    Arguments and errors as in `local_resolution`. Differentiable.
    """
    a, b = two_volumes("local_resolution", a, b)
    if not 0 < voxel_size < math.inf:
        raise ValueError(f"local_resolution.voxel_size: expected a positive length [Å], got {voxel_size}.")
    sigma = 5.0 if window is None else window / voxel_size  # [voxel]
    if not 1 <= sigma < math.inf:
        raise ValueError(
            f"local_resolution.window: expected at least the voxel size, {voxel_size:g} Å, got {window}. Give the "
            "standard deviation of the window in Å."
        )
    if bands < 2 or bands != int(bands):
        raise ValueError(f"local_resolution.bands: expected a whole number from 2 on, got {bands}.")
    return _bands(a, b, voxel_size, sigma, max(2, min(bands, math.floor(math.pi * sigma))))


def _bands(
    a: torch.Tensor, b: torch.Tensor, voxel_size: float, sigma: float, bands: int
) -> Iterator[tuple[float, torch.Tensor]]:
    """As `local_correlation`, sigma in voxels."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    spectra = torch.fft.rfftn(torch.stack([a.to(dtype), b.to(dtype)]), dim=(1, 2, 3))
    radius = squared_frequencies_3d(a.shape, voxel_size, a.device).sqrt()
    along_z, along_y, along_x = (_window(n, sigma, dtype, a.device) for n in a.shape)
    floors = [1e-10 * v.detach().to(dtype).square().mean() for v in (a, b)]
    step = 0.5 / (bands * voxel_size)  # [1/Å]
    samples = (4 * math.pi) ** 1.5 * sigma**3 * 16 / 3 * math.pi * (0.5 / bands) ** 3  # equation (2), of the first band
    first = min(bands, max(1, math.ceil(math.sqrt(_FEWEST_SAMPLES / samples))))
    for i in range(first, bands + 1):
        away = ((radius - i * step) / step).clamp(-1, 1)
        kept = torch.fft.irfftn(spectra * torch.cos(torch.pi / 2 * away).to(dtype), s=a.shape, dim=(1, 2, 3))
        products = torch.stack([kept[0] * kept[1], kept[0] ** 2, kept[1] ** 2])
        means = along_y @ (products @ along_x.mT)
        cross, power_a, power_b = (along_z @ means.flatten(2)).view_as(products)
        full = (power_a > floors[0]) & (power_b > floors[1])
        power_a, power_b = (torch.where(full, p, 1.0) for p in (power_a, power_b))
        yield i * step, torch.where(full, cross / (power_a.sqrt() * power_b.sqrt()), 0.0)


def _window(n: int, sigma: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Gaussian means (n, n) along an axis, of what lies inside; unlike those by an FFT they need no padding."""
    position = torch.arange(n, dtype=torch.float64, device=device)
    weights = torch.exp(-((position[:, None] - position) ** 2) / (2 * sigma**2))
    return (weights / weights.sum(1, keepdim=True)).to(dtype)
