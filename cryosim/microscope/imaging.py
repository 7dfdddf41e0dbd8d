"""From the exit wave to the intensity that falls on the detector."""

from __future__ import annotations

import math
import warnings

import torch

from cryosim.core.constants import wavelength
from cryosim.core.fourier import BAND, SamplingWarning, number
from cryosim.core.record import hidden
from cryosim.microscope.optics import Optics, displacement, transfer


def image(
    wave: torch.Tensor, optics: Optics, pixel_size: float | torch.Tensor, *, linear: bool = False
) -> torch.Tensor:
    """Intensity of a wave seen through the lens.

    Parameters
    ----------
    wave : tensor (..., y, x)
        Exit wave, referred to the box centre; relative to the tilted plane wave where the beam is tilted.
    optics : Optics
        Its aberrations, phase plate, aperture and envelopes; the amplitude contrast acts in the specimen, not here.
    pixel_size : float or tensor ()
        [Å].
    linear : bool
        Keep only the interference with the unscattered beam psi0, the mean of the wave as it is imaged:
        |psi0|^2 + 2 Re[conj(psi0) (psi - psi0)]. Left out is |psi - psi0|^2, what scattered waves make together.

    Returns
    -------
    tensor (..., y, x)
        |F^-1[H F[wave]]|^2, 1 where the incident wave is undisturbed (Kirkland 2020, eq. 3.38).

    Warns
    -----
    SamplingWarning
        When the field is too small or the pixels are too large for the lens.

    Notes
    -----
    The envelopes multiply the wave (quasi-coherent, Frank 1973): exact where scattered waves interfere with the
    unscattered one only, too small a background where they are strong. `partially_coherent_image` has no such limit.
    """
    check_sampling(optics, (wave.shape[-2], wave.shape[-1]), pixel_size)
    if not linear:
        return unchecked_image(wave, optics, pixel_size)
    seen = _seen(wave, optics, pixel_size)
    beam = seen.mean((-2, -1), keepdim=True)  # (..., 1, 1)
    return 2 * (beam.conj() * seen).real - (beam.real**2 + beam.imag**2)


def unchecked_image(wave: torch.Tensor, optics: Optics, pixel_size: float | torch.Tensor) -> torch.Tensor:
    """`image` that never warns."""
    seen = _seen(wave, optics, pixel_size)
    return seen.real**2 + seen.imag**2


def _seen(wave: torch.Tensor, optics: Optics, pixel_size: float | torch.Tensor) -> torch.Tensor:
    """Wave (..., y, x) in the plane of the image."""
    shape = (wave.shape[-2], wave.shape[-1])
    lens = transfer(optics, shape, pixel_size, dtype=torch.float64, device=wave.device)
    return torch.fft.ifft2(torch.fft.fft2(wave) * lens.to(wave.real.dtype.to_complex()))


def check_sampling(
    optics: Optics, shape: tuple[int, int], pixel_size: float | torch.Tensor, stacklevel: int = 3
) -> None:
    """Warn where a picture of this shape and pixel size would be aliased; nothing inside transforms of torch.func.

    Neighbouring frequencies lie 1 / field apart, so the phase chi turns by more than pi between them where the lens
    displaces grad_k chi / 2 pi by more than half the field: what leaves the field on one side comes in on the other. It
    is looked for along the axes and diagonals, out to the aperture or two thirds of the Nyquist frequency.

    Warns
    -----
    SamplingWarning
        With the sizes that would be right.
    """
    if hidden():
        return
    with torch.no_grad():
        messages = _sampling_faults(optics, shape, number(pixel_size))
    for message in messages:
        warnings.warn(f"image: {message}", SamplingWarning, stacklevel=stacklevel)


def _sampling_faults(optics: Optics, shape: tuple[int, int], size: float) -> list[str]:
    faults = []
    edge = BAND / (2 * size)  # [1/Å]
    voltage, aperture = (
        torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (optics.voltage, optics.aperture)
    )
    opening = float((1e-3 * aperture / wavelength(voltage)).max())  # [1/Å]
    if edge < opening < math.inf:
        faults.append(
            f"the aperture ends at {opening:.3g} /Å, beyond two thirds of the Nyquist frequency, {edge:.3g} /Å, where "
            f"the wave ends. It has room with pixels of {BAND / (2 * opening):.3g} Å or less."
        )
    radii = torch.linspace(0, min(edge, opening), 65, dtype=torch.float64)[1:]
    azimuths = torch.arange(8, dtype=torch.float64)[:, None] * (torch.pi / 4)
    moved = displacement(optics, radii * torch.cos(azimuths), radii * torch.sin(azimuths))  # (..., azimuth, radius)
    # largest displacement up to each radius, along x and along y [Å]
    across, down = (d.abs().reshape(-1, len(radii)).amax(0).cummax(0).values.tolist() for d in moved)
    field = (shape[1] * size, shape[0] * size)  # (x, y) [Å]
    if 2 * across[-1] > field[0] or 2 * down[-1] > field[1]:
        # with larger pixels of the same number the field grows and the band shrinks
        turns = [
            max(dx / shape[1], dy / shape[0]) * 4 * k for k, dx, dy in zip(radii.tolist(), across, down, strict=True)
        ]
        good = [k for k, turn in zip(radii.tolist(), turns, strict=True) if turn <= BAND]
        larger = f", or pixels of {BAND / (2 * good[-1]):.3g} Å" if good else ""
        faults.append(
            f"the lens displaces the finest detail by {across[-1]:.4g} Å along x and {down[-1]:.4g} Å along y, more "
            f"than half the field of {field[0]:.4g} x {field[1]:.4g} Å: it comes in again on the other side. Right is "
            f"a field of {2 * across[-1]:.4g} x {2 * down[-1]:.4g} Å{larger}."
        )
    return faults
