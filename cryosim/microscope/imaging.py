"""From the exit wave to the intensity that falls on the detector."""

from __future__ import annotations

import torch

from cryosim.microscope.optics import Optics, aberration


def image(wave: torch.Tensor, optics: Optics, pixel_size: float | torch.Tensor) -> torch.Tensor:
    """Intensity of a wave seen through the lens.

    Parameters
    ----------
    wave : tensor (..., y, x)
        Exit wave, referred to the box centre.
    optics : Optics
        Its aberrations and phase plate; the amplitude contrast acts in the specimen, not here.
    pixel_size : float or tensor ()
        [Å].

    Returns
    -------
    tensor (..., y, x)
        |F^-1[exp(-i chi) F[wave]]|^2, 1 where the incident wave is undisturbed (Kirkland 2020, eq. 3.38).
    """
    real = wave.real.dtype
    chi = aberration(optics, (wave.shape[-2], wave.shape[-1]), pixel_size, dtype=torch.float64, device=wave.device)
    lens = torch.polar(torch.ones_like(chi), -chi).to(wave.dtype)
    seen = torch.fft.ifft2(torch.fft.fft2(wave) * lens)
    return (seen.real**2 + seen.imag**2).to(real)
