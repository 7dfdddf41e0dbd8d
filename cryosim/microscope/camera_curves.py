"""The curves of a camera measured on its images, as a laboratory would."""

from __future__ import annotations

import torch

from cryosim.core.fourier import squared_frequencies


def measured_nps(flats: torch.Tensor, bins: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise power spectrum of flat images, relative to white noise of the same mean counts.

    The mean over the images is taken off, and with it the pattern of the gain; the power lost with it is made up.

    Parameters
    ----------
    flats : tensor (image, y, x)
        Two or more exposures to an even beam [counts/px].
    bins : int
        Rings between frequency 0, which is left out, and the Nyquist frequency.

    Returns
    -------
    frequency : tensor (bin,)
        [fraction of the Nyquist frequency].
    nps : tensor (bin,)
        [1].

    Raises
    ------
    ValueError
        When there are fewer than two images, or they hold no counts.
    """
    if flats.ndim != 3 or len(flats) < 2:
        raise ValueError(f"measured_nps.flats: expected two or more images (image, y, x), got {tuple(flats.shape)}.")
    mean = flats.mean()
    if not float(mean) > 0:
        raise ValueError(f"measured_nps.flats: expected counts, got a mean of {float(mean):g}. Expose longer.")
    n = len(flats)
    noise = torch.fft.fft2(flats - flats.mean(0)).abs().square().sum(0) / (n - 1)  # (y, x)
    power = noise / (mean * noise.numel())
    radius = _radius(power)
    one, at, total = (_ring_sums(v, radius, bins) for v in (torch.ones_like(power), radius, power))
    return at / one, total / one


def measured_mtf(image: torch.Tensor, ideal: torch.Tensor, bins: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Modulation transfer from the image of an edge and the same edge as an ideal camera sees it.

    The spectra I and J are fitted by I = a MTF J in rings, least squares: Re(I J*) over |J|^2, with a from the means.

    Parameters
    ----------
    image : tensor (..., y, x)
        Measured [counts/px]; more than one image are fitted together.
    ideal : tensor (..., y, x)
        Known, of any scale. Its edges lie inside of the image: opposite borders are equally bright.
    bins : int
        Rings between frequency 0, which is left out, and the Nyquist frequency.

    Returns
    -------
    frequency : tensor (bin,)
        Mean over each ring, weighted with the power of the ideal image [fraction of the Nyquist frequency].
    mtf : tensor (bin,)
        [1].

    Raises
    ------
    ValueError
        When the shapes differ.

    Source
    ------
    Meyer & Kirkland 2000, Microscopy Research and Technique 49, 269.
    """
    if image.shape[-2:] != ideal.shape[-2:]:
        raise ValueError(f"measured_mtf.ideal: expected {tuple(image.shape[-2:])} px, got {tuple(ideal.shape[-2:])}.")
    scale = image.mean() / ideal.mean()
    seen, known = torch.fft.fft2(image / scale), torch.fft.fft2(ideal)
    cross = (seen * known.conj()).real
    power = known.abs().square().expand_as(cross)
    cross, power = (v.reshape(-1, *v.shape[-2:]).sum(0) for v in (cross, power))  # (y, x)
    radius = _radius(power)
    total, at, passed = (_ring_sums(v, radius, bins) for v in (power, power * radius, cross))
    return at / total, passed / total


def _radius(like: torch.Tensor) -> torch.Tensor:
    """Frequency (y, x) [fraction of the Nyquist frequency]."""
    shape = (like.shape[-2], like.shape[-1])
    return 2 * squared_frequencies(shape, dtype=like.dtype, device=like.device).sqrt()


def _ring_sums(values: torch.Tensor, radius: torch.Tensor, bins: int) -> torch.Tensor:
    """Sums (bin,) over rings of equal width in (0, 1]."""
    ring = (radius * bins).ceil().long() - 1
    inside = (ring >= 0) & (ring < bins)
    return values.new_zeros(bins).index_add(0, ring[inside], values[inside])
