"""How the electron wave passes the specimen: a ladder of four functions of (slices, optics), each an exit wave.

    projection   all slices act at once, at the box centre                 (phase grating)
    ewald        every slice scatters the incident beam once, from its own height     (first Born approximation)
    rytov        the same field, as the logarithm of the wave
    multislice   every slice scatters all that arrives: transmission, then free flight

With v_i the projected potential of slice i at height z_i, c = i sigma (sqrt(1 - A^2) + i A) its coupling to the wave,
and kt = beam tilt / lambda,

    t_i  = exp(c v_i)                                          transmission
    P(d) = exp(-i pi lambda d (k^2 + 2 k.kt))                  flight over d, relative to the tilted beam

(Kirkland 2020, eqs. 6.5 and 6.65; Cowley & Moodie 1957, doi:10.1107/S0365110X57002194; tilt: Ishizuka 1982,
doi:10.1107/S0567739482001600.) The signs belong together: so matter, whose potential is positive, focuses electrons.
The first Born field is u = sum_i P(-z_i) c v_i: both side-bands of the curved Ewald sphere, for |1 + u|^2 holds u and
its conjugate (its mean u0 scatters nothing, so the wave is exp(u0) (1 + u - u0)); Rytov's wave is exp(u) (Rytov,
Kravtsov & Tatarskii 1989).

A slice acts at its middle (Strang splitting, second order in the thickness): between two slices lies one thickness of
flight, and half of one before the first and after the last. The exit wave is referred to a plane: z = 0, the box
centre, unless another is asked for. What flew beyond that plane flies back, by the same propagator, so that the
defocus of the lens counts from the box centre.

Every flight keeps only |k| below two thirds of the Nyquist frequency: so the product of a wave with a potential that
is limited likewise does not alias into the band. The transmission itself is not limited (Kirkland, section 6.8, does
both): what it holds beyond the band is of second order in c v, and what of it comes back is of third; against a
threefold finer grid both are equally right, and the second pair of transforms is saved.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch

from cryosim.core.constants import interaction_constant, wavelength
from cryosim.core.fourier import BAND, SamplingWarning, frequencies, number
from cryosim.core.fourier import band_limit as circular_band_limit
from cryosim.core.record import hidden
from cryosim.core.slices import SliceSource, column, in_order, summed
from cryosim.microscope.backward import Step, constant_memory_multislice
from cryosim.microscope.optics import Optics, is_zero, per_image, tilt_of

Flight = Literal["fresnel", "exact"]


def multislice(
    slices: SliceSource,
    optics: Optics,
    *,
    plane: float | torch.Tensor = 0.0,
    incident: torch.Tensor | None = None,
    flight: Flight = "fresnel",
    band_limit: torch.Tensor | None = None,
    limit_transmission: bool = False,
    memory: Literal["constant", "graph"] = "constant",
) -> torch.Tensor:
    """Exit wave of a thick specimen: every slice scatters, and the wave spreads between slices.

    Parameters
    ----------
    slices : source of slices (..., y, x)
        [V·Å], real, or complex with the absorption as imaginary part; slice 0 is hit first. Of any thickness.
    optics : Optics
        Its voltage, its beam tilt, and its amplitude contrast A as absorption: the potential is multiplied by
        sqrt(1 - A^2) + i A.
    plane : float or tensor ()
        Height the wave is referred to [Å]; the box centre is 0, the end of the last slice (n - n // 2 - 1/2) thickness.
    incident : tensor (..., y, x), optional
        Complex wave that enters the first slice, half a thickness above its middle, relative to the tilted plane wave;
        1 when left out.
    flight : {"fresnel", "exact"}
        Paraxial, as the lens is, or the angular spectrum exp(2 pi i d (sqrt(1 / lambda^2 - |k + kt|^2) - ...)).
    band_limit : tensor (y, x), optional
        Low-pass on every flight, unshifted order. When left out, a sharp circle at two thirds of the Nyquist frequency.
    limit_transmission : bool
        Whether to low-pass every transmission too; see the top of this file.
    memory : {"constant", "graph"}
        How gradients are made. "constant" holds a few waves, however many slices there are, and rebuilds the others
        backwards (2 sqrt(n) in float64, with strong scatterers, or where the flight has a gradient too). It works for
        tensors of slices (`Slices`) and for sources that are records (`potential_slices`, `tilted_slices`). "graph"
        keeps every slice; so do other sources, second derivatives, torch.func transforms and limits on the
        transmission.

    Returns
    -------
    tensor (..., y, x)
        Complex wave, relative to the tilted plane wave; the incident one has modulus 1.

    Raises
    ------
    ValueError
        When there are no slices, or a slice holds values that are not finite.

    Warns
    -----
    SamplingWarning
        When the field is too small for the length of the flight. Specimens that are periodic may ignore it.
    """
    first = _first(slices, "multislice")
    shape, dtype, device = (first.shape[-2], first.shape[-1]), first.real.dtype, first.device
    limit = circular_band_limit(shape, dtype=dtype, device=device) if band_limit is None else band_limit.to(dtype)
    for name, given in (("incident", incident), ("band_limit", band_limit)):
        if given is not None and given.shape[-2:] != shape:
            raise ValueError(
                f"multislice: expected {name} (..., y, x) like the slices {shape}, got {tuple(given.shape)}."
            )
    if memory not in ("constant", "graph"):
        raise ValueError(f"multislice: expected memory 'constant' or 'graph', got {memory!r}.")
    n, thickness = len(slices), slices.thickness
    along = propagator(slices, optics, thickness, shape, dtype, device, flight) * limit
    last = (n - 1 - n // 2) * thickness  # height at which the last slice acts [Å]
    back = propagator(slices, optics, plane - last, shape, dtype, device, flight) * limit
    if incident is not None:
        half = propagator(slices, optics, 0.5 * thickness, shape, dtype, device, flight) * limit
        incident = torch.fft.ifft2(torch.fft.fft2(incident.to(dtype.to_complex())) * half)
    _check_flight("multislice", slices, optics, shape, plane)
    turn, damp = coupling(optics, dtype, device)
    step = Step(turn, damp, along, back, limit if limit_transmission else None, is_zero(optics.amplitude_contrast))
    if memory == "constant" and not limit_transmission and not hidden():
        wave = constant_memory_multislice(slices, step, incident, invertible=band_limit is None)
    else:
        wave = step.all(slices, incident)
    return _finite(wave, slices)


def projection(slices: SliceSource, optics: Optics) -> torch.Tensor:
    """Exit wave of a thin specimen (phase grating): all slices act together at the box centre.

    Arguments and result as in `multislice`.
    """
    return _finite(transmission(_sum(slices, "projection"), optics), slices)


def ewald(slices: SliceSource, optics: Optics, *, flight: Flight = "fresnel") -> torch.Tensor:
    """Exit wave of a weak specimen of any thickness: the beam and what every slice scatters once, from its own height.

    Arguments and result as in `multislice`. Curved Ewald sphere, both side-bands (DeRosier 2000,
    doi:10.1016/S0304-3991(99)00120-5). The mean potential, which scatters nothing, turns and damps the whole wave as it
    does in `multislice`, however thick the ice. `image(..., linear=True)` drops the square of the scattered wave.
    Uneven absorption is kept to first order only, so an open energy slit does not conserve electrons with it.
    """
    return _finite(once_scattered(born_field(slices, optics, flight)), slices)


def rytov(slices: SliceSource, optics: Optics, *, flight: Flight = "fresnel") -> torch.Tensor:
    """Exit wave exp(u) of a specimen whose phase may be large but changes slowly; u as in `ewald`.

    Arguments and result as in `multislice`.
    """
    return _finite(torch.exp(born_field(slices, optics, flight)), slices)


def once_scattered(field: torch.Tensor) -> torch.Tensor:
    """The wave exp(u0) (1 + u - u0) (..., y, x) of a first Born field u (..., y, x) of mean u0."""
    mean = field.mean((-2, -1), keepdim=True)
    return torch.exp(mean) * (1 + field - mean)


def born_field(slices: SliceSource, optics: Optics, flight: Flight = "fresnel") -> torch.Tensor:
    """First Born field u (..., y, x) at z = 0, summed in the order of the slices: u <- P(thickness) u + c v_i."""
    first = _first(slices, "first Born field")
    shape, dtype, device = (first.shape[-2], first.shape[-1]), first.real.dtype, first.device
    n, thickness = len(slices), slices.thickness
    _check_flight("first Born field", slices, optics, shape, 0.0)
    along = propagator(slices, optics, thickness, shape, dtype, device, flight)
    total = torch.zeros(())
    for i, v in enumerate(in_order(slices)):
        total = total * along + torch.fft.fft2(v) if i else torch.fft.fft2(v)
    back = propagator(slices, optics, (n // 2 - n + 1) * thickness, shape, dtype, device, flight)
    limit = circular_band_limit(shape, dtype=dtype, device=device)
    turn, damp = coupling(optics, dtype, device)
    return torch.fft.ifft2(total * (back * limit)) * torch.complex(-damp, turn)


def _check_flight(
    name: str, slices: SliceSource, optics: Optics, shape: tuple[int, int], plane: float | torch.Tensor
) -> None:
    """Warn where waves at the edge of the band fly, in all, farther than half the field to the side."""
    if hidden():
        return
    n, thickness, size = len(slices), number(slices.thickness), number(slices.pixel_size)
    heights = [-(n // 2) * thickness, (n - 1 - n // 2) * thickness, number(plane)]
    distance = max(heights) - min(heights)
    wave = float(wavelength(torch.as_tensor(optics.voltage, dtype=torch.float64).detach()).max())
    aside, field = wave * distance * BAND / (2 * size), min(shape) * size  # the edge of the band flies at lambda k
    if 2 * aside > field:
        warnings.warn(
            f"{name}: over {distance:.4g} Å the finest detail flies {aside:.4g} Å aside, more than half the field "
            f"of {field:.4g} Å: it comes in again on the other side. Right is a field of {2 * aside:.4g} Å, or as many "
            f"pixels of {size * math.sqrt(2 * aside / field):.3g} Å.",
            SamplingWarning,
            stacklevel=3,
        )


def _first(slices: SliceSource, name: str) -> torch.Tensor:
    if len(slices) == 0:
        raise ValueError(f"{name}: there are no slices.")
    for size in ("pixel_size", "thickness"):
        value = getattr(slices, size)
        if not hidden() and not number(value) > 0:
            raise ValueError(f"{name}: expected slices of positive {size} [Å], got {number(value)}.")
    first = slices[0]
    if not (first.is_floating_point() or first.is_complex()):
        raise ValueError(f"{name}: expected slices of real or complex numbers [V·Å], got {first.dtype}.")
    return first


def _sum(slices: SliceSource, name: str) -> torch.Tensor:
    """All slices together (..., y, x) [V·Å]."""
    _first(slices, name)
    return summed(slices)


def _finite(wave: torch.Tensor, slices: SliceSource) -> torch.Tensor:
    """The wave; where it is not finite, the error names the slice that is at fault."""
    if hidden() or torch.isfinite(torch.view_as_real(wave.detach()).sum()):
        return wave
    for i in range(len(slices)):
        if not torch.isfinite(slices[i]).all():
            raise ValueError(f"slice {i} of {len(slices)} holds values that are not finite [V·Å]; mend its source.")
    raise ValueError(
        "the wave is not finite although every slice is: the incident wave, the voltage, the beam tilt, the pixel size "
        "or the thickness is not a finite number, the amplitude contrast is not between 0 and 1, or an imaginary "
        "potential is negative and amplifies the wave."
    )


def coupling(optics: Optics, dtype: torch.dtype, device: torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma sqrt(1 - A^2) and sigma A, () or (..., 1, 1) [rad/(V·Å)]: how potential turns and how it damps the wave."""
    sigma = interaction_constant(per_image(optics.voltage, torch.float64, device))
    absorbed = per_image(optics.amplitude_contrast, torch.float64, device)
    return (sigma * torch.sqrt(1 - absorbed**2)).to(dtype), (sigma * absorbed).to(dtype)


def transmission(potential: torch.Tensor, optics: Optics) -> torch.Tensor:
    """exp(i sigma (sqrt(1 - A^2) + i A) v) (..., y, x) of a slice v (..., y, x) [V·Å]."""
    turn, damp = coupling(optics, potential.real.dtype, potential.device)
    return Step(turn, damp, turn, turn, None, is_zero(optics.amplitude_contrast)).transmission(potential)


def absorbed_depth(slices: SliceSource, optics: Optics) -> torch.Tensor:
    """Thickness in mean free paths, t / Lambda (..., y, x) [1], along each column: -ln of what passes.

    The absorption is the imaginary part of the potential and the optics' amplitude contrast. A source may have a
    method `total()` -> (..., y, x) [V·Å] that sums its slices at less cost.
    """
    if len(slices) == 0:
        raise ValueError("absorbed_depth: there are no slices.")
    total = column(slices)
    turn, damp = coupling(optics, total.real.dtype, total.device)
    return 2 * (turn * total.imag + damp * total.real if total.is_complex() else damp * total)


def propagator(
    slices: SliceSource,
    optics: Optics,
    distance: float | torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    flight: Flight = "fresnel",
) -> torch.Tensor:
    """Flight (..., y, x) over `distance` [Å], relative to the tilted beam, unshifted order; see the top of this file.

    Raises
    ------
    ValueError
        For an unknown kind of flight.
    """
    wave = wavelength(per_image(optics.voltage, torch.float64, device))  # [Å]
    tilt_x, tilt_y = (1e-3 * per_image(t, torch.float64, device) / wave for t in tilt_of(optics) or (0.0, 0.0))  # [1/Å]
    ky = frequencies(shape[0], slices.pixel_size, dtype=torch.float64, device=device)[:, None]
    kx = frequencies(shape[1], slices.pixel_size, dtype=torch.float64, device=device)[None, :]
    longer = kx * (kx + 2 * tilt_x) + ky * (ky + 2 * tilt_y)  # |k + kt|^2 - |kt|^2
    if flight == "exact":
        straight = wave**-2 - tilt_x**2 - tilt_y**2
        mean = 0.5 * (torch.sqrt((straight - longer).clamp_min(0)) + torch.sqrt(straight))
        phase = -torch.pi * distance * longer / mean
    elif flight == "fresnel":
        phase = -torch.pi * wave * distance * longer
    else:
        raise ValueError(f"flight: expected 'fresnel' or 'exact', got {flight!r}.")
    return torch.complex(torch.cos(phase), torch.sin(phase)).to(dtype.to_complex())
