"""The image of a partially coherent source, summed over the source point by point.

Electrons of different energy or direction do not interfere: their images add. With the focal change d of standard
deviation Delta and the source direction q of density exp(-|q|^2 / beta^2) / (pi beta^2),

    I(r) = <|F^-1[A(lambda k + t + q) exp(-i chi_(defocus + d, t + q)(k)) F[psi]]|^2>_(d, q)

where chi_t(k) = chi(lambda k + t) - chi(t). The envelopes of `image` are this mean for a weak object, to first order in
q, and without the coupling of d and q (Frank 1973, Optik 38:519). Here neither is assumed. The mean is a Gauss-Hermite
sum: with n points per axis it is exact for polynomials of degree 2 n - 1 in d and in each part of q.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from cryosim.microscope.imaging import check_sampling
from cryosim.microscope.optics import Optics, focal_variance, is_zero, root, transfer


def partially_coherent_image(
    wave: torch.Tensor,
    optics: Optics,
    pixel_size: float | torch.Tensor,
    *,
    focus_points: int = 9,
    source_points: int = 5,
) -> torch.Tensor:
    """Intensity as the sum of the images of all points of the source; for waves of any strength.

    Parameters
    ----------
    wave : tensor (..., y, x)
        Exit wave, referred to the box centre. It is taken to be the same for every direction of the source, as in a
        specimen thinner than detail / convergence.
    optics : Optics
        Its spreads act by the sum, not by envelopes.
    pixel_size : float or tensor ()
        [Å].
    focus_points : int
        Points of the quadrature over the focal spread. More are needed where the phase pi lambda Delta k^2 is large:
        5, 9, 17 and 25 points are exact to 1e-4 up to 1.1, 2.4, 4.4 and 6.1 rad.
    source_points : int
        Points along x and along y of the quadrature over the directions of the source; as above, for the phase
        sqrt(2) pi beta D / lambda with D the displacement of the detail [Å].

    Returns
    -------
    tensor (..., y, x)
        [1], 1 where the incident wave is undisturbed; at the cost of focus_points * source_points^2 images.

    Raises
    ------
    ValueError
        When a number of points is not positive.

    Warns
    -----
    SamplingWarning
        As `image`.
    """
    for name, points in (("focus_points", focus_points), ("source_points", source_points)):
        if points < 1:
            raise ValueError(
                f"partially_coherent_image: expected {name} of 1 or more, got {points}. 9 and 5 are usual."
            )
    check_sampling(optics, (wave.shape[-2], wave.shape[-1]), pixel_size)
    variance = focal_variance(optics, torch.float64, wave.device)  # () or (..., 1, 1) [Å^2]
    if variance is None:
        foci = [(optics.defocus, 1.0)]
    else:
        spread = root(variance if variance.ndim == 0 else variance[..., 0, 0])
        foci = [(optics.defocus + node * spread, weight) for node, weight in _normal(focus_points)]
    still = optics.replace(chromatic_aberration=0.0, convergence=0.0)  # no envelopes
    spectrum, total = torch.fft.fft2(wave), None
    for tilt, share in _directions(optics, source_points, wave.device):
        for defocus, weight in foci:
            point = still.replace(defocus=defocus, beam_tilt=tilt)
            seen = torch.fft.ifft2(spectrum * _lens(point, wave, pixel_size))
            intensity = share * weight * (seen.real**2 + seen.imag**2)
            total = intensity if total is None else total + intensity
    assert total is not None
    return total


def _lens(optics: Optics, wave: torch.Tensor, pixel_size: float | torch.Tensor) -> torch.Tensor:
    lens = transfer(optics, (wave.shape[-2], wave.shape[-1]), pixel_size, dtype=torch.float64, device=wave.device)
    return lens.to(wave.real.dtype.to_complex())


def _normal(points: int) -> list[tuple[float, float]]:
    """Nodes and weights of the mean over a normal distribution of standard deviation 1."""
    nodes, weights = np.polynomial.hermite.hermgauss(points)
    return [(math.sqrt(2) * float(x), float(w) / math.sqrt(math.pi)) for x, w in zip(nodes, weights, strict=True)]


def _directions(optics: Optics, points: int, device: torch.device) -> list[tuple[torch.Tensor | tuple, float]]:
    """Directions t + q of the source, (2,) or (..., 2) [mrad], and their weights."""
    if is_zero(optics.convergence):
        return [(optics.beam_tilt, 1.0)]
    tilt = torch.as_tensor(optics.beam_tilt, dtype=torch.float64, device=device)
    spread = torch.as_tensor(optics.convergence, dtype=torch.float64, device=device) / math.sqrt(2)  # [mrad]
    found = []
    for (x, wx), (y, wy) in itertools.product(_normal(points), repeat=2):
        away = torch.tensor([x, y], dtype=torch.float64, device=device)
        found.append((tilt + spread[..., None] * away, wx * wy))
    return found
