"""How the electron wave passes the specimen. Each function takes (slices, optics) and returns the exit wave.

One electron moves along +z through the slices: transmission, then free flight,

    t_i = exp(i sigma v_i),  v_i complex where there is absorption
    P   = exp(-i pi lambda d k^2)

(Kirkland 2020, eqs. 6.5 and 6.65; Cowley & Moodie 1957, doi:10.1107/S0365110X57002194.) The signs belong together: so
matter, whose potential is positive, focuses electrons. The potential of a slice acts at its middle, so the
flight between two slices is one thickness, and half of one before the first and after the last.

The exit wave is referred to a plane: z = 0, the box centre, unless another is asked for. What flew
beyond that plane flies back, by the same propagator, so that the defocus of the lens counts from the box centre.
"""

from __future__ import annotations

from typing import Protocol

import torch

from cryosim.core.constants import interaction_constant, wavelength
from cryosim.core.fourier import band_limit as circular_band_limit
from cryosim.core.fourier import squared_frequencies
from cryosim.microscope.optics import Optics, per_image


class SliceSource(Protocol):
    """Anything that gives slices of projected potential one by one."""

    @property
    def pixel_size(self) -> float | torch.Tensor: ...

    @property
    def thickness(self) -> float | torch.Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> torch.Tensor: ...


def multislice(
    slices: SliceSource, optics: Optics, *, plane: float | torch.Tensor = 0.0, band_limit: torch.Tensor | None = None
) -> torch.Tensor:
    """Exit wave of a thick specimen: every slice scatters, and the wave spreads between slices.

    Parameters
    ----------
    slices : source of slices (..., y, x)
        [V·Å], real, or complex with the absorption as imaginary part; slice 0 is hit first.
    optics : Optics
        Its voltage, and its amplitude contrast A as absorption: the potential is multiplied by sqrt(1 - A^2) + i A.
    plane : float or tensor ()
        Height the wave is referred to [Å]; the box centre is 0, the end of the last slice (n - n // 2 - 1/2) thickness.
    band_limit : tensor (y, x), optional
        Low-pass on every transmission and every flight, unshifted order. When left out, a sharp circle at two thirds of
        the Nyquist frequency, the largest that keeps the products free of aliasing.

    Returns
    -------
    tensor (..., y, x)
        Complex wave; the incident one has modulus 1.

    Raises
    ------
    ValueError
        When there are no slices, or a slice holds values that are not finite.
    """
    n = len(slices)
    if n == 0:
        raise ValueError("multislice: there are no slices.")
    first = _finite_slice(slices, 0)
    dtype = first.real.dtype if first.is_complex() else first.dtype
    shape, device = (first.shape[-2], first.shape[-1]), first.device
    limit = circular_band_limit(shape, dtype=dtype, device=device) if band_limit is None else band_limit
    flight = propagator(slices, optics, slices.thickness, shape, dtype, device) * limit
    wave = torch.fft.ifft2(torch.fft.fft2(transmission(first, optics)) * limit)
    for i in range(1, n):
        arriving = torch.fft.ifft2(torch.fft.fft2(wave) * flight)
        wave = arriving * torch.fft.ifft2(torch.fft.fft2(transmission(_finite_slice(slices, i), optics)) * limit)
    last = (n - 1 - n // 2) * slices.thickness  # height at which the last slice acted [Å]
    back = propagator(slices, optics, plane - last, shape, dtype, device) * limit
    return torch.fft.ifft2(torch.fft.fft2(wave) * back)


def projection(slices: SliceSource, optics: Optics) -> torch.Tensor:
    """Exit wave of a thin specimen (phase grating): all slices act together at the box centre.

    Arguments and result as in `multislice`.
    """
    if len(slices) == 0:
        raise ValueError("projection: there are no slices.")
    total = _finite_slice(slices, 0)
    for i in range(1, len(slices)):
        total = total + _finite_slice(slices, i)
    return transmission(total, optics)


def _finite_slice(slices: SliceSource, i: int) -> torch.Tensor:
    v = slices[i]
    if not torch.isfinite(v).all():
        raise ValueError(f"slice {i} of {len(slices)} holds values that are not finite [V·Å]; mend its source.")
    return v


def transmission(potential: torch.Tensor, optics: Optics) -> torch.Tensor:
    """exp(i sigma (sqrt(1 - A^2) + i A) v) (..., y, x) of a slice v (..., y, x) [V·Å]."""
    real = potential.real.dtype if potential.is_complex() else potential.dtype
    sigma = interaction_constant(per_image(optics.voltage, torch.float64, potential.device))  # [rad/(V·Å)]
    absorbed = per_image(optics.amplitude_contrast, torch.float64, potential.device)
    phase = (sigma * torch.sqrt(1 - absorbed**2)).to(real) * potential
    damping = (sigma * absorbed).to(real) * potential
    if potential.is_complex():
        return torch.exp(1j * phase - damping)
    return torch.polar(torch.exp(-damping), phase)


def propagator(
    slices: SliceSource,
    optics: Optics,
    distance: float | torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """exp(-i pi lambda d k^2) (..., y, x), the flight over `distance` d [Å], unshifted order."""
    k2 = squared_frequencies(shape, slices.pixel_size, dtype=torch.float64, device=device)
    wave = wavelength(per_image(optics.voltage, torch.float64, device))
    phase = -torch.pi * wave * distance * k2
    return torch.polar(torch.ones_like(phase), phase).to(dtype.to_complex())
