"""The lens: a record of parameters, its phase, and the contrast transfer function.

With chi the aberration function and psi ~ exp(+2 pi i k.r), a wave at the reference plane is imaged through
H(k) = exp(-i chi(k)),

    chi(k) = pi lambda k^2 (C_s lambda^2 k^2 / 2 - defocus(alpha)) - phase_shift        (k > 0)
    defocus(alpha) = defocus + astigmatism / 2 * cos(2 (alpha - astigmatism_angle))

defocus > 0 is underfocus, which is propagation backwards (Kirkland 2020, eq. 2.22). A weak object of projected
potential V with absorption fraction A, psi = 1 + i sigma (sqrt(1 - A^2) + i A) V, then has the intensity

    I = 1 + 2 sigma F^-1[ctf V^],     ctf = sin(chi - asin A)

which is negative at low frequency in underfocus: matter is dark (Rohou & Grigorieff 2015,
doi:10.1016/j.jsb.2015.08.008).
Derivation: i e^{i a} e^{-i chi} - i e^{-i a} e^{+i chi} = 2 sin(chi - a), with a = asin A.
"""

from __future__ import annotations

import dataclasses

import torch

from cryosim.core.constants import wavelength
from cryosim.core.fourier import frequencies
from cryosim.core.record import Record, item

Number = float | torch.Tensor


class Optics(Record):
    """Parameters of the electron source and the objective lens.

    Every field is a number, a tensor () or a tensor (tilt,), and may require gradients.

    Attributes
    ----------
    voltage : [kV]
    defocus : [Å]
        Positive is underfocus; referred to the box centre, mean of the two astigmatic values.
    astigmatism : [Å]
        Largest minus smallest defocus.
    astigmatism_angle : [deg]
        Azimuth of the largest underfocus, from x towards y.
    spherical_aberration : [mm]
    phase_shift : [deg]
        Of the scattered against the unscattered wave, by a phase plate.
    amplitude_contrast : [1]
        Fraction A of the scattering that is absorption, between 0 and 1; used where the wave meets the specimen.
    """

    voltage: Number = item(default=300.0)
    defocus: Number = item(default=0.0)
    astigmatism: Number = item(default=0.0)
    astigmatism_angle: Number = item(default=0.0)
    spherical_aberration: Number = item(default=0.0)
    phase_shift: Number = item(default=0.0)
    amplitude_contrast: Number = item(default=0.0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not isinstance(value, (int, float, torch.Tensor)):  # a list or an array: one value per tilt
                object.__setattr__(self, field.name, torch.as_tensor(value, dtype=torch.float64))
        if isinstance(self.voltage, (int, float)) and not self.voltage > 0:
            raise ValueError(f"Optics.voltage: expected a positive number [kV], got {self.voltage}. 300 is usual.")
        if isinstance(self.amplitude_contrast, (int, float)) and not 0 <= self.amplitude_contrast <= 1:
            raise ValueError(
                f"Optics.amplitude_contrast: expected 0 to 1, got {self.amplitude_contrast}. 0.07 is usual."
            )


def check_per_tilt(optics: Optics, n_tilts: int) -> None:
    """Raise ValueError unless every field is one number or one for each of `n_tilts` tilts."""
    for field in dataclasses.fields(optics):  # type: ignore[arg-type]
        value = getattr(optics, field.name)
        if isinstance(value, torch.Tensor) and value.shape not in ((), (n_tilts,)):
            raise ValueError(
                f"Optics.{field.name}: expected one number or one for each of {n_tilts} tilts, got shape "
                f"{tuple(value.shape)}."
            )


def aberration(
    optics: Optics,
    shape: tuple[int, int],
    pixel_size: Number,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Aberration function chi, without amplitude contrast.

    Parameters
    ----------
    optics : Optics
    shape : (int, int)
        (y, x) [px].
    pixel_size : float or tensor ()
        [Å].
    dtype, device
        Of the result.

    Returns
    -------
    tensor (..., y, x)
        chi [rad], unshifted order; the leading axes are those of the optics' fields.
    """
    ky = frequencies(shape[0], pixel_size, dtype=dtype, device=device)[:, None]
    kx = frequencies(shape[1], pixel_size, dtype=dtype, device=device)[None, :]
    k2 = kx**2 + ky**2  # (y, x) [1/Å^2]
    voltage, defocus, astigmatism, angle, cs, plate = (
        per_image(value, dtype, device)
        for value in (
            optics.voltage,
            optics.defocus,
            optics.astigmatism,
            optics.astigmatism_angle,
            optics.spherical_aberration,
            optics.phase_shift,
        )
    )
    wave = wavelength(voltage)  # [Å]
    twice = 2 * torch.deg2rad(angle)
    # k^2 cos 2(alpha - angle), written without the azimuth so that its gradient is finite at k = 0
    two_fold = (kx**2 - ky**2) * torch.cos(twice) + 2 * kx * ky * torch.sin(twice)
    lens = torch.pi * wave * (0.5e7 * cs * wave**2 * k2**2 - defocus * k2 - 0.5 * astigmatism * two_fold)
    return lens - torch.deg2rad(plate) * (k2 > 0)


def ctf(
    optics: Optics,
    shape: tuple[int, int],
    pixel_size: Number,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Contrast transfer function of a weak object, sin(chi - asin A).

    Parameters
    ----------
    optics : Optics
        Its fields may be numbers or tensors (tilt,).
    shape : (int, int)
        (y, x) [px].
    pixel_size : float or tensor ()
        [Å].
    dtype, device
        Of the result.

    Returns
    -------
    tensor (..., y, x)
        [1], unshifted order. The image of a weak projected potential V [V·Å] is 1 + 2 sigma F^-1[ctf F[V]].

    Notes
    -----
    Rohou & Grigorieff 2015, doi:10.1016/j.jsb.2015.08.008, eqs. 2-5.
    """
    contrast = torch.asin(per_image(optics.amplitude_contrast, dtype, device))
    return torch.sin(aberration(optics, shape, pixel_size, dtype=dtype, device=device) - contrast)


def per_image(value: Number, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    """Parameter () or (...) as a tensor () or (..., 1, 1) that broadcasts against images (..., y, x)."""
    value = torch.as_tensor(value, dtype=dtype, device=device)
    return value[..., None, None] if value.ndim else value
