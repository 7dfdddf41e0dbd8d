"""The lens: a record of parameters, its phase, its damping, and the contrast transfer function.

With chi the aberration function and psi ~ exp(+2 pi i k.r), a wave at the reference plane is imaged through H(k),

    H(k)   = aperture(k) envelope(k) exp(-i chi(k))
    chi(k) = (2 pi / lambda) W(lambda k) - phase_shift                                          (k > 0)
    W(u)   = sum_nm C_nm |u|^(n+1) cos(m (phi - phi_nm)) / (n + 1)                              [Å]

the polar notation (Krivanek et al. 1999, doi:10.1016/S0304-3991(99)00013-3; Kirkland 2020, eq. 2.22), with phi the
azimuth from x towards y. C10 = -defocus, C12 = -astigmatism / 2, C30 = spherical_aberration, so without higher terms

    chi(k) = pi lambda k^2 (C_s lambda^2 k^2 / 2 - defocus(phi)) - phase_shift                  (k > 0)
    defocus(phi) = defocus + astigmatism / 2 * cos(2 (phi - astigmatism_angle))

defocus > 0 is underfocus, which is propagation backwards. The lens displaces what scatters to k by
grad_k chi / 2 pi = grad W [Å].

Beam tilt. When the electrons arrive along t, the wave is carried relative to the tilted plane wave exp(2 pi i t.r /
lambda), and what is called k here reaches the lens at the angle lambda k + t:

    chi_t(k) = chi(lambda k + t) - chi(t)

So an image in underfocus moves by -defocus * t, and C_s brings coma, astigmatism and defocus of its own.

Weak objects. A projected potential V with absorption fraction A, psi = 1 + i sigma e^{i a} V with a = asin A, has the
intensity

    I = 1 + 2 sigma F^-1[ctf V^],     ctf(k) = (i / 2) (e^{i a} H(k) - e^{-i a} conj H(-k))

(write 2 Re[i e^{i a} F^-1[H V^]] for a real V). Where chi is even this is aperture * envelope * sin(chi - a), negative
at low frequency in underfocus: matter is dark (Rohou & Grigorieff 2015, doi:10.1016/j.jsb.2015.08.008). With an odd
part, chi = chi_e + chi_o, it is complex: exp(-i chi_o) sin(chi_e - a), which displaces detail.

Envelopes (Frank 1973, Optik 38:519; Wade 1992, doi:10.1016/0304-3991(92)90011-8). A change d of the focus adds
-pi d (|u|^2 - |t|^2) / lambda to chi; its mean over a Gaussian of standard deviation Delta is

    exp(-(pi Delta (|u|^2 - |t|^2) / lambda)^2 / 2),     u = lambda k + t

Illumination from the angle t + q adds (2 pi / lambda) (grad W(u) - grad W(t)).q to first order in q; its mean over
exp(-|q|^2 / beta^2) is

    exp(-(pi beta / lambda)^2 |grad W(u) - grad W(t)|^2)

which without tilt is exp(-(beta / lambda)^2 |grad_k chi|^2 / 4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from cryosim.core.constants import wavelength
from cryosim.core.fourier import frequencies
from cryosim.core.record import Record, hidden, item

Number = float | torch.Tensor
Spacing = Number | tuple[Number, Number]
"""Of pixels [Å]: one number, or one along y and one along x; each () or (tilt,)."""

# (n, m) of C_nm, the field that holds it, C_nm [Å] per unit of that field, the field of its angle phi_nm
_POLAR = (
    (1, 0, "defocus", -1.0, None),
    (1, 2, "astigmatism", -0.5, "astigmatism_angle"),
    (2, 1, "coma", 1.0, "coma_angle"),
    (2, 3, "trefoil", 1.0, "trefoil_angle"),
    (3, 0, "spherical_aberration", 1e7, None),
    (3, 2, "C32", 1.0, "phi32"),
    (3, 4, "C34", 1.0, "phi34"),
    (4, 1, "C41", 1.0, "phi41"),
    (4, 3, "C43", 1.0, "phi43"),
    (4, 5, "C45", 1.0, "phi45"),
    (5, 0, "C50", 1.0, None),
    (5, 2, "C52", 1.0, "phi52"),
    (5, 4, "C54", 1.0, "phi54"),
    (5, 6, "C56", 1.0, "phi56"),
)
_ODD = tuple(field for n, _, field, _, _ in _POLAR if n % 2 == 0)
_NOT_NEGATIVE = ("energy_spread", "voltage_ripple", "lens_ripple", "convergence", "aperture", "slit")
_MAY_BE_INFINITE = ("aperture", "slit")


class Optics(Record):
    """Parameters of the electron source and the objective lens.

    Every field is a number, a tensor () or a tensor (tilt,), and may require gradients; `beam_tilt` is a pair of
    numbers, a tensor (2,) or a tensor (tilt, 2). Spreads and ripples are standard deviations: a full width at half
    maximum is 2.355 of them.

    Attributes
    ----------
    voltage : [kV]
    defocus : [Å]
        Positive is underfocus; referred to the box centre, mean of the two astigmatic values. -C10.
    astigmatism : [Å]
        Largest minus smallest defocus. -2 C12.
    astigmatism_angle : [deg]
        Azimuth of the largest underfocus, from x towards y.
    spherical_aberration : [mm]
        C30.
    phase_shift : [deg]
        Of the scattered against the unscattered wave, by a phase plate.
    amplitude_contrast : [1]
        Fraction A of the scattering that is absorption, between 0 and 1; used where the wave meets the specimen.
    coma, trefoil : [Å]
        C21 and C23.
    coma_angle, trefoil_angle : [deg]
        phi21 and phi23, from x towards y.
    C32, C34, C41, C43, C45, C50, C52, C54, C56 : [Å]
        Higher aberrations in the polar notation.
    phi32, phi34, phi41, phi43, phi45, phi52, phi54, phi56 : [deg]
        Their azimuths.
    chromatic_aberration : [mm]
        The coefficient that multiplies dE / E. Where a maker's figure leaves out the relativistic factor
        (1 + E / E0) / (1 + E / 2 E0), 1.23 at 300 kV (Reimer & Kohl 2008), multiply it in.
    energy_spread : [eV]
        Of the source, standard deviation.
    voltage_ripple : [1]
        Relative standard deviation of the accelerating voltage.
    lens_ripple : [1]
        Relative standard deviation of the lens current.
    convergence : [mrad]
        Half-angle of the illumination at which its intensity is 1/e of that on the axis.
    aperture : [mrad]
        Semi-angle of the objective aperture; inf is none.
    beam_tilt : [mrad]
        Direction (x, y) along which the electrons arrive.
    slit : [eV]
        Width of the energy slit, centred on zero loss: it passes losses up to half its width. 0 passes zero loss only,
        inf is no filter. What the amplitude contrast absorbs counts as lost energy too.
    """

    voltage: Number = item(default=300.0)
    defocus: Number = item(default=0.0)
    astigmatism: Number = item(default=0.0)
    astigmatism_angle: Number = item(default=0.0)
    spherical_aberration: Number = item(default=0.0)
    phase_shift: Number = item(default=0.0)
    amplitude_contrast: Number = item(default=0.0)
    coma: Number = item(default=0.0)
    coma_angle: Number = item(default=0.0)
    trefoil: Number = item(default=0.0)
    trefoil_angle: Number = item(default=0.0)
    C32: Number = item(default=0.0)
    phi32: Number = item(default=0.0)
    C34: Number = item(default=0.0)
    phi34: Number = item(default=0.0)
    C41: Number = item(default=0.0)
    phi41: Number = item(default=0.0)
    C43: Number = item(default=0.0)
    phi43: Number = item(default=0.0)
    C45: Number = item(default=0.0)
    phi45: Number = item(default=0.0)
    C50: Number = item(default=0.0)
    C52: Number = item(default=0.0)
    phi52: Number = item(default=0.0)
    C54: Number = item(default=0.0)
    phi54: Number = item(default=0.0)
    C56: Number = item(default=0.0)
    phi56: Number = item(default=0.0)
    chromatic_aberration: Number = item(default=0.0)
    energy_spread: Number = item(default=0.0)
    voltage_ripple: Number = item(default=0.0)
    lens_ripple: Number = item(default=0.0)
    convergence: Number = item(default=0.0)
    aperture: Number = item(default=math.inf)
    beam_tilt: tuple[float, float] | torch.Tensor = item(1, default=(0.0, 0.0))
    slit: Number = item(default=0.0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            given = getattr(self, field.name)
            value = _as_pair(given) if field.name == "beam_tilt" else _as_number(field.name, given)
            object.__setattr__(self, field.name, value)
            if not isinstance(given, torch.Tensor):  # a tensor may be one step of a fit: only what is written is judged
                _refuse(field.name, value)
        if isinstance(self.voltage, torch.Tensor) and not hidden() and not (self.voltage > 0).all():
            raise ValueError(_message("voltage", "positive numbers [kV]", self.voltage.tolist(), "300 is usual"))

    @classmethod
    def from_polar(cls, voltage: Number = 300.0, **values: Any) -> Self:
        """Optics from the aberration coefficients of the polar notation.

        Parameters
        ----------
        voltage : float or tensor
            [kV].
        **values
            C10, C12, C21, C23, C30, C32, C34, C41, C43, C45, C50, C52, C54, C56 [Å] and phi12, phi21, ... [deg]; any
            other field of `Optics` by its own name.

        Raises
        ------
        TypeError
            When a name is neither.
        """
        changes: dict[str, Any] = {}
        for n, m, field, scale, angle in _POLAR:
            if (value := values.pop(f"C{n}{m}", None)) is not None:
                changes[field] = _as_number(f"C{n}{m}", value) / scale + 0.0  # no -0.0
            if angle is not None and (turn := values.pop(f"phi{n}{m}", None)) is not None:
                changes[angle] = turn
        return cls(voltage=voltage, **changes, **values)

    @property
    def polar(self) -> dict[str, Number]:
        """All coefficients C_nm [Å] and azimuths phi_nm [deg] of the polar notation."""
        values = {}
        for n, m, field, scale, angle in _POLAR:
            values[f"C{n}{m}"] = scale * getattr(self, field) + 0.0
            if angle is not None:
                values[f"phi{n}{m}"] = getattr(self, angle)
        return values


def check_per_tilt(optics: Optics, n_tilts: int) -> None:
    """Raise ValueError unless every field is one value or one for each of `n_tilts` tilts."""
    for field in dataclasses.fields(optics):  # type: ignore[arg-type]
        value, one = getattr(optics, field.name), (2,) if field.name == "beam_tilt" else ()
        if isinstance(value, torch.Tensor) and value.shape not in (one, (n_tilts, *one)):
            noun = "pair (x, y)" if one else "number"
            raise ValueError(
                f"Optics.{field.name}: expected one {noun} or one for each of {n_tilts} tilts, got shape "
                f"{tuple(value.shape)}."
            )


def aberration(
    optics: Optics,
    shape: tuple[int, int],
    pixel_size: Spacing,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Aberration function chi, without amplitude contrast.

    Parameters
    ----------
    optics : Optics
        With a beam tilt t, the result is chi(lambda k + t) - chi(t): the lens acts at the angle of the tilted wave. It
        holds a shift of the image by -defocus * t, and coma, astigmatism and defocus from the spherical aberration.
    shape : (int, int)
        (y, x) [px].
    pixel_size : float or tensor (), or a pair of them
        [Å]; a pair is (y, x), and each of it may be one value or one per tilt (tilt,).
    dtype, device
        Of the result.

    Returns
    -------
    tensor (..., y, x)
        chi [rad], unshifted order; the leading axes are those of the optics' fields.
    """
    return aberration_at(optics, *_grid(shape, pixel_size, dtype, device))


def aberration_at(optics: Optics, kx: torch.Tensor, ky: torch.Tensor) -> torch.Tensor:
    """Aberration function chi [rad], as of `aberration`, at any frequencies.

    Parameters
    ----------
    optics : Optics
    kx, ky : tensor
        Frequencies, of shapes that broadcast [1/Å].

    Returns
    -------
    tensor
        Of the shape of kx and ky together.
    """
    wave, ux, uy, tilt = _angles(optics, kx, ky)
    path = _path(optics, ux, uy)
    if tilt is not None:
        path = path - _path(optics, *tilt)
    chi = (2 * torch.pi / wave) * path
    if is_zero(optics.phase_shift):
        return chi
    return chi - torch.deg2rad(per_image(optics.phase_shift, kx.dtype, kx.device)) * ((kx != 0) | (ky != 0))


def displacement(optics: Optics, kx: torch.Tensor, ky: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the lens displaces what scatters to k, grad_k chi / 2 pi.

    Parameters
    ----------
    optics : Optics
    kx, ky : tensor (y, x)
        Frequencies, or axes (1, x) and (y, 1) that broadcast to them [1/Å].

    Returns
    -------
    tensor (..., y, x), tensor (..., y, x)
        Along x and along y [Å].
    """
    _, ux, uy, _ = _angles(optics, kx, ky)
    return _slope(optics, ux, uy)


def largest_displacement(optics: Optics, edge: float) -> float:
    """How far [Å] the lens displaces detail of up to the frequency `edge` [1/Å], in any direction and image."""
    turns = torch.arange(16, dtype=torch.float64) * (math.pi / 8)
    radii = torch.linspace(0, edge, 9, dtype=torch.float64)[:, None]
    with torch.no_grad():
        moved = displacement(optics, radii * torch.cos(turns), radii * torch.sin(turns))
    return max(float(d.abs().max()) for d in moved)


def envelope(
    optics: Optics,
    shape: tuple[int, int],
    pixel_size: Spacing,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Damping by the spreads of energy, voltage, lens current and angle; exact for weak objects.

    The focal spread is Delta = Cc sqrt((dE / E)^2 + (dV / V)^2 + (2 dI / I)^2), of standard deviations; a full width at
    half maximum is 2.355 of them. Cc is the coefficient that multiplies dE / E: a relativistic factor belongs into it.

    Arguments as in `aberration`.

    Returns
    -------
    tensor (..., y, x)
        [1], unshifted order, between 0 and 1.

    Notes
    -----
    Frank 1973, Optik 38:519. Delta and the convergence enter squared only, so the slopes at zero are finite (and zero).
    The angular part takes chi as linear in the direction of the source. The curvature it leaves out adds a small phase:
    4 % of the damping for 2 Å detail with 4000 Å of defocus and 2.7 mm of spherical aberration, nothing without the
    latter. The two parts are taken as independent. `partially_coherent_image` sums over the source instead.
    """
    kx, ky = _grid(shape, pixel_size, dtype, device)
    damping = _envelope(optics, kx, ky)
    return torch.ones(shape, dtype=dtype, device=device) if damping is None else damping


def aperture_mask(
    optics: Optics,
    shape: tuple[int, int],
    pixel_size: Spacing,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Objective aperture: 1 inside, 0 outside, with an edge one frequency sample wide, differentiable in its angle.

    Arguments as in `aberration`; with a beam tilt the aperture stays on the axis of the lens.

    Returns
    -------
    tensor (..., y, x)
        [1], unshifted order.
    """
    kx, ky = _grid(shape, pixel_size, dtype, device)
    mask = _aperture(optics, kx, ky, shape, pixel_size)
    return torch.ones(shape, dtype=dtype, device=device) if mask is None else mask


def transfer(
    optics: Optics,
    shape: tuple[int, int],
    pixel_size: Spacing,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Transfer function of the wave, H = aperture * envelope * exp(-i chi).

    Arguments as in `aberration`; `dtype` is that of the real part.

    Returns
    -------
    tensor (..., y, x)
        Complex [1], unshifted order.
    """
    chi = aberration(optics, shape, pixel_size, dtype=dtype, device=device)
    real, imaginary = torch.cos(chi), -torch.sin(chi)
    damping = _damping(optics, shape, pixel_size, dtype, device)
    if damping is not None:
        real, imaginary = damping * real, damping * imaginary
    return torch.complex(real, imaginary)


def ctf(
    optics: Optics,
    shape: tuple[int, int],
    pixel_size: Spacing,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Contrast transfer function of a weak object.

    Parameters
    ----------
    optics : Optics
        Its fields may be numbers or tensors (tilt,).
    shape : (int, int)
        (y, x) [px].
    pixel_size : float or tensor (), or a pair of them
        [Å]; a pair is (y, x), and each of it may be one value or one per tilt (tilt,).
    dtype, device
        Of the result.

    Returns
    -------
    tensor (..., y, x)
        [1], unshifted order. The image of a weak projected potential V [V·Å] is 1 + 2 sigma F^-1[ctf F[V]]; where the
        aperture stops part of the unscattered beam, |H(0)|^2 in place of 1.
        Real, aperture * envelope * sin(chi - asin A), while every odd aberration and the beam tilt are the plain number
        0; else complex, exp(-i chi_o) sin(chi_e - asin A) under the same factors, with chi_e and chi_o the even and odd
        parts of chi.

    Notes
    -----
    Rohou & Grigorieff 2015, doi:10.1016/j.jsb.2015.08.008, eqs. 2-5; the head of this module for odd aberrations.
    """
    contrast = torch.asin(per_image(optics.amplitude_contrast, dtype, device))
    if tilt_of(optics) is None and all(is_zero(getattr(optics, field)) for field in _ODD):
        wave = torch.sin(aberration(optics, shape, pixel_size, dtype=dtype, device=device) - contrast)
        damping = _damping(optics, shape, pixel_size, dtype, device)
        return wave if damping is None else damping * damping[..., :1, :1] * wave
    lens = transfer(optics, shape, pixel_size, dtype=dtype, device=device)
    turn = torch.complex(-torch.sin(contrast), torch.cos(contrast)) * lens[..., :1, :1].conj() / 2  # i e^{ia} H(0)* / 2
    mirrored = lens.flip(-2, -1).roll((1, 1), (-2, -1))  # H(-k)
    return turn * lens + (turn * mirrored).conj()


def per_image(value: Number, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    """Parameter () or (...) as a tensor () or (..., 1, 1) that broadcasts against images (..., y, x)."""
    value = torch.as_tensor(value, dtype=dtype, device=device)
    return value[..., None, None] if value.ndim else value


def is_zero(value: Number) -> bool:
    """Whether a value is the plain number 0; a tensor never is, for its slope is wanted."""
    return not isinstance(value, torch.Tensor) and value == 0


def focal_variance(optics: Optics, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor | None:
    """Delta^2 () or (..., 1, 1) [Å^2] of the focal spread; None where plain numbers make it zero."""
    names = ("chromatic_aberration", "energy_spread", "voltage_ripple", "lens_ripple")
    given = [getattr(optics, name) for name in names]
    if not _any_tensor(given) and (given[0] == 0 or not any(given[1:])):
        return None
    cc, energy, voltage, current = (per_image(value, dtype, device) for value in given)
    relative = energy / (1e3 * per_image(optics.voltage, dtype, device))
    return (1e7 * cc) ** 2 * (relative**2 + voltage**2 + (2 * current) ** 2)


def root(square: torch.Tensor) -> torch.Tensor:
    """Square root whose slope at 0 is 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _spacings(pixel_size: Spacing, dtype: torch.dtype, device: torch.device | None) -> list[torch.Tensor]:
    """Pixel size along y and along x [Å], each () or (tilt, 1, 1)."""
    pair = pixel_size if isinstance(pixel_size, tuple) else (pixel_size, pixel_size)
    return [per_image(size, dtype, device) for size in pair]


def _grid(
    shape: tuple[int, int], pixel_size: Spacing, dtype: torch.dtype, device: torch.device | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies kx ([tilt,] 1, x) and ky ([tilt,] y, 1) [1/Å]."""
    along_y, along_x = _spacings(pixel_size, dtype, device)
    ky = frequencies(shape[0], dtype=dtype, device=device)[:, None] / along_y
    kx = frequencies(shape[1], dtype=dtype, device=device)[None, :] / along_x
    return kx, ky


def tilt_of(optics: Optics) -> tuple[Number, Number] | None:
    """Beam tilt along x and y, () or (tilt,) each [mrad]; None where it is the plain number 0."""
    pair = optics.beam_tilt.unbind(-1) if isinstance(optics.beam_tilt, torch.Tensor) else optics.beam_tilt
    return None if all(is_zero(value) for value in pair) else (pair[0], pair[1])


def _angles(
    optics: Optics, kx: torch.Tensor, ky: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Wavelength [Å], the angles ux and uy at which the wave k meets the lens [rad], and the tilt among them [rad]."""
    wave = wavelength(per_image(optics.voltage, kx.dtype, kx.device))
    tilt = tilt_of(optics)
    if tilt is None:
        return wave, wave * kx, wave * ky, None
    tx, ty = (1e-3 * per_image(value, kx.dtype, kx.device) for value in tilt)
    return wave, wave * kx + tx, wave * ky + ty, (tx, ty)


def _path(optics: Optics, ux: torch.Tensor, uy: torch.Tensor) -> torch.Tensor:
    """W(u) (..., y, x) [Å], as polynomials in the angle: without azimuth or root, so every slope is finite."""
    square, terms = ux**2 + uy**2, _terms(optics, ux.dtype, ux.device)
    powers, total = _powers(ux, uy, max(terms, default=0)), None
    for m, (even, odd) in terms.items():
        term = _series(even, square)
        if m > 0:
            term = term * powers[m][0] + _series(odd, square) * powers[m][1]
        total = term if total is None else total + term
    return 0 * square if total is None else total


def _slope(optics: Optics, ux: torch.Tensor, uy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of W(u) along x and y (..., y, x) [Å]."""
    square, terms = ux**2 + uy**2, _terms(optics, ux.dtype, ux.device)
    powers = _powers(ux, uy, max(terms, default=0))
    along_x = along_y = 0 * square
    for m, (even, odd) in terms.items():
        radial = 2 * _series(_derivative(even), square)  # of the polynomials in |u|^2, divided by u
        if m > 0:
            radial = radial * powers[m][0] + 2 * _series(_derivative(odd), square) * powers[m][1]
            a, b = m * _series(even, square), m * _series(odd, square)  # of the powers: d w^m = m w^(m-1) dw
            along_x = along_x + a * powers[m - 1][0] + b * powers[m - 1][1]
            along_y = along_y - a * powers[m - 1][1] + b * powers[m - 1][0]
        along_x = along_x + radial * ux
        along_y = along_y + radial * uy
    return along_x, along_y


def _terms(
    optics: Optics, dtype: torch.dtype, device: torch.device
) -> dict[int, tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]]:
    """For each m, the coefficients of |u|^2p Re (ux + i uy)^m and of |u|^2p Im (ux + i uy)^m, by p.

    C_nm |u|^(n+1) cos(m (phi - phi_nm)) = |u|^(n+1-m) C_nm (cos(m phi_nm) Re + sin(m phi_nm) Im) (ux + i uy)^m, and
    n + 1 - m is even. What plain numbers make zero is left out.
    """
    found: dict[int, tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]] = {}
    for n, m, field, scale, angle in _POLAR:
        value, turn = getattr(optics, field), 0.0 if angle is None else getattr(optics, angle)
        if is_zero(value) and not isinstance(turn, torch.Tensor):
            continue
        coefficient = (scale / (n + 1)) * per_image(value, dtype, device)
        even, odd = found.setdefault(m, ({}, {}))
        azimuth = m * torch.deg2rad(per_image(turn, dtype, device))
        even[(n + 1 - m) // 2] = coefficient * torch.cos(azimuth)
        odd[(n + 1 - m) // 2] = coefficient * torch.sin(azimuth)
    return found


def _series(coefficients: Mapping[int, torch.Tensor], square: torch.Tensor) -> torch.Tensor:
    """sum_p coefficients[p] square^p, by Horner's rule."""
    total = torch.zeros((), dtype=square.dtype, device=square.device)
    top = max(coefficients, default=-1)
    for p in range(top, -1, -1):
        total = total * square if p < top else total
        total = total + coefficients[p] if p in coefficients else total
    return total


def _derivative(coefficients: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {p - 1: p * value for p, value in coefficients.items() if p > 0}


def _powers(ux: torch.Tensor, uy: torch.Tensor, top: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Real and imaginary part of (ux + i uy)^m for m = 0 ... top."""
    powers = [(torch.ones_like(ux), torch.zeros_like(ux)), (ux, uy)]
    while len(powers) <= top:
        real, imaginary = powers[-1]
        powers.append((real * ux - imaginary * uy, real * uy + imaginary * ux))
    return powers


def _envelope(optics: Optics, kx: torch.Tensor, ky: torch.Tensor) -> torch.Tensor | None:
    """Envelope (..., y, x) at the frequencies k [1/Å]; None where plain numbers make it 1."""
    dtype, device = kx.dtype, kx.device
    variance = focal_variance(optics, dtype, device)
    spatial = not is_zero(optics.convergence)
    if variance is None and not spatial:
        return None
    wave, ux, uy, tilt = _angles(optics, kx, ky)
    exponent = torch.zeros((), dtype=dtype, device=device)
    if variance is not None:
        square = ux**2 + uy**2 - (0 if tilt is None else tilt[0] ** 2 + tilt[1] ** 2)
        exponent = exponent + 0.5 * (torch.pi / wave) ** 2 * variance * square**2
    if spatial:
        sx, sy = _slope(optics, ux, uy)
        if tilt is not None:
            at_tilt = _slope(optics, *tilt)
            sx, sy = sx - at_tilt[0], sy - at_tilt[1]
        beta = 1e-3 * per_image(optics.convergence, dtype, device)  # [rad]
        exponent = exponent + (torch.pi * beta / wave) ** 2 * (sx**2 + sy**2)
    return torch.exp(-exponent)


def _aperture(
    optics: Optics, kx: torch.Tensor, ky: torch.Tensor, shape: tuple[int, int], pixel_size: Spacing
) -> torch.Tensor | None:
    """Aperture (..., y, x); None where it is the plain number inf."""
    if not isinstance(optics.aperture, torch.Tensor) and math.isinf(optics.aperture):
        return None
    wave, ux, uy, _ = _angles(optics, kx, ky)
    edge = 1e-3 * per_image(optics.aperture, kx.dtype, kx.device).clamp(max=1e6)  # [rad]; inf has no slope
    radius = root(ux**2 + uy**2)
    # the angle between neighbouring samples along the direction of u; along x where u is zero
    along_y, along_x = _spacings(pixel_size, kx.dtype, kx.device)
    step_x, step_y = wave / (shape[1] * along_x), wave / (shape[0] * along_y)
    away = radius > 0
    step = root((step_x * ux) ** 2 + (step_y * uy) ** 2) / torch.where(away, radius, 1.0)
    return ((edge - radius) / torch.where(away, step, step_x) + 0.5).clamp(0, 1)


def _damping(
    optics: Optics, shape: tuple[int, int], pixel_size: Spacing, dtype: torch.dtype, device: torch.device | None
) -> torch.Tensor | None:
    """aperture * envelope (..., y, x); None where it is 1."""
    kx, ky = _grid(shape, pixel_size, dtype, device)
    mask, damping = _aperture(optics, kx, ky, shape, pixel_size), _envelope(optics, kx, ky)
    if mask is None or damping is None:
        return mask if damping is None else damping
    return mask * damping


def _any_tensor(values: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


def _as_number(name: str, given: Any) -> Number:
    """A number or a tensor as it is; a list or an array, one value per tilt, as a tensor of float64."""
    if isinstance(given, (int, float, torch.Tensor)):
        return given
    try:
        if isinstance(given, (tuple, list)) and _any_tensor(given):  # keeps their gradients
            return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in given])
        return torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        expected = "a number, a tensor, or a list with one number per tilt"
        raise TypeError(_message(name, expected, repr(given), "Give numbers")) from error


def _as_pair(given: Any) -> tuple[float, float] | torch.Tensor:
    """Two plain numbers as a tuple, everything else as a tensor (2,) or (tilt, 2)."""
    if isinstance(given, (tuple, list)) and len(given) == 2:
        if all(isinstance(value, (int, float)) for value in given):
            return float(given[0]), float(given[1])
        if _any_tensor(given):  # along x and along y, each () or (tilt,)
            parts = [torch.as_tensor(value, dtype=torch.float64) for value in given]
            if all(part.shape == (2,) for part in parts):
                expected = "a tensor (2, 2), as two pairs may be meant either way,"
                raise ValueError(
                    _message("beam_tilt", expected, "two tensors (2,)", "stack them: one row (x, y) a tilt")
                )
            return torch.stack(torch.broadcast_tensors(*parts), -1)
    pair = _as_number("beam_tilt", given)
    if not isinstance(pair, torch.Tensor) or pair.ndim not in (1, 2) or pair.shape[-1] != 2:
        got = f"shape {tuple(pair.shape)}" if isinstance(pair, torch.Tensor) else repr(given)
        expected = "a pair (x, y), or one for each tilt as a tensor (tilt, 2) [mrad]"
        raise ValueError(_message("beam_tilt", expected, got, "(0.0, 0.0) is no tilt"))
    return pair


def _refuse(name: str, value: Any) -> None:
    """Raise ValueError where a value that was written down (not computed) cannot be meant."""
    if isinstance(value, torch.Tensor):
        numbers = [] if hidden() else value.detach().reshape(-1).tolist()
    else:
        numbers = value if isinstance(value, tuple) else [value]
    for number in numbers:
        if math.isnan(number) or (math.isinf(number) and name not in _MAY_BE_INFINITE):
            raise ValueError(_message(name, "finite numbers", number, "Look where it comes from"))
        if name == "voltage" and not number > 0:
            raise ValueError(_message(name, "a positive number [kV]", number, "300 is usual"))
        if name == "amplitude_contrast" and not 0 <= number <= 1:
            raise ValueError(_message(name, "0 to 1", number, "0.07 is usual"))
        if name in _NOT_NEGATIVE and number < 0:
            raise ValueError(_message(name, "0 or more", number, "Give its size without sign"))


def _message(name: str, expected: str, got: Any, remedy: str) -> str:
    return f"Optics.{name}: expected {expected}, got {got}. {remedy}."
