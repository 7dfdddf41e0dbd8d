"""Images as a microscope of one magnification and one tilt axis would have taken them: exact affine resampling.

An image I that shows at L v what it ought to show at v, both counted from sample n // 2, becomes

    J(v) = I(L v),     L = [[a, b], [c, d]]

in two passes of trigonometric interpolation, each along one axis (Catmull & Smith 1980, doi:10.1145/800250.807505):

    K(x, y) = I(x, e x + f y),   e = c / a,   f = d - b c / a          then          J(x, y) = K(a x + b y, y)

A row of n samples with spectrum F(k) is wanted at the positions s x + o. With k x = (k^2 + x^2 - (x - k)^2) / 2,

    sum_k F(k) e^(2 pi i k (s x + o) / n) = w(x) sum_k [F(k) e^(2 pi i k o / n) w(k)] / w(x - k),
    w(m) = e^(pi i s m^2 / n)

which is a convolution: n log n operations and no approximation (chirp-z transform, Rabiner, Schafer & Rader 1969,
doi:10.1109/TAU.1969.1162034). Frequencies that the new samples cannot hold are left out, as is the unpaired one of an
even n, which has no phase of its own.
"""

from __future__ import annotations

import torch

from cryosim.core.fourier import fast_length, positions
from cryosim.microscope.optics import Optics

_HIGHER = {  # field of C_nm: n + 1, azimuth
    "spherical_aberration": (4, None),
    "chromatic_aberration": (2, None),
    "coma": (3, "coma_angle"),
    "trefoil": (3, "trefoil_angle"),
    **{f"C{n}{m}": (n + 1, f"phi{n}{m}" if m else None) for n, m in ((3, 2), (3, 4), (4, 1), (4, 3), (4, 5))},
    **{f"C5{m}": (6, f"phi5{m}" if m else None) for m in (0, 2, 4, 6)},
}


def resampled(image: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`image` (y, x) at the places `matrix` v, where v runs over its own samples, counted from n // 2.

    Places outside the image get its mean.

    Parameters
    ----------
    image : tensor (y, x)
        Real.
    matrix : tensor (2, 2)
        On (x, y), close to the identity.

    Returns
    -------
    tensor (y, x)
        Of the same type.

    Raises
    ------
    ValueError
        When the matrix has an element more than a half off the identity.
    """
    matrix = matrix.to(torch.float64)
    if not float((matrix - torch.eye(2, dtype=torch.float64)).abs().max()) < 0.5:
        raise ValueError(f"resampled: expected a matrix close to the identity, got {matrix.tolist()}.")
    (a, b), (c, d) = matrix.tolist()
    mean = image.mean()
    values = _rows_at((image - mean).mT, d - b * c / a, c / a).mT
    values = _rows_at(values, a, b) + mean
    y, x = (positions(n, dtype=torch.float64, device=image.device) for n in image.shape)
    inside = _within(a * x + b * y[:, None], len(x)) & _within(c * x + d * y[:, None], len(y))
    return torch.where(inside, values, mean)


def resampled_optics(optics: Optics, matrices: torch.Tensor) -> Optics:
    """Optics of images that were `resampled` with `matrices`, each from those of the image as it was taken.

    J(v) = I(L v) holds at the frequency k what I holds at L^-T k. So the quadratic form of the defocus and its
    astigmatism, k^T Q k, becomes k^T L^-1 Q L^-T k, which is exact. Of the higher aberrations the azimuths turn with
    the image, and C_nm is divided by the (n + 1)th power of its magnification m = sqrt(det L); angles of the beam are
    multiplied by m; the chromatic coefficient, of a defocus, is divided by m^2.

    Parameters
    ----------
    optics : Optics
        Fields () or (tilt,).
    matrices : tensor (tilt, 2, 2)
        On (x, y), close to the identity.

    Returns
    -------
    Optics
        Fields that change are (tilt,).
    """
    matrices = matrices.to(torch.float64)
    n, size = len(matrices), torch.linalg.det(matrices).sqrt()
    turn = torch.rad2deg(torch.atan2(matrices[:, 1, 0] - matrices[:, 0, 1], matrices[:, 0, 0] + matrices[:, 1, 1]))
    fields: dict[str, torch.Tensor] = {}
    for name, (power, azimuth) in _HIGHER.items():
        value = torch.as_tensor(getattr(optics, name), dtype=torch.float64)
        if bool((value != 0).any()):
            fields[name] = value / size**power
            if azimuth is not None:
                fields[azimuth] = torch.as_tensor(getattr(optics, azimuth), dtype=torch.float64) - turn
    for name in ("convergence", "aperture"):
        fields[name] = size * torch.as_tensor(getattr(optics, name), dtype=torch.float64)
    tilt = torch.as_tensor(optics.beam_tilt, dtype=torch.float64).expand(n, 2)
    fields["beam_tilt"] = (matrices.mT @ tilt[..., None])[..., 0]
    return optics.replace(**fields, **_defocus(optics, torch.linalg.inv(matrices)))


def _defocus(optics: Optics, back: torch.Tensor) -> dict[str, torch.Tensor]:
    """Defocus, astigmatism and its azimuth (tilt,) of the form B Q B^T, with matrices B (tilt, 2, 2)."""
    names = ("defocus", "astigmatism", "astigmatism_angle")
    mean, difference, azimuth = (
        torch.as_tensor(getattr(optics, name), dtype=torch.float64).expand(len(back)) for name in names
    )
    double = torch.deg2rad(2 * azimuth)
    along, across = difference / 2 * torch.cos(double), difference / 2 * torch.sin(double)
    form = torch.stack([mean + along, across, across, mean - along], -1).reshape(-1, 2, 2)
    form = back @ form @ back.mT
    along, across = (form[:, 0, 0] - form[:, 1, 1]) / 2, (form[:, 0, 1] + form[:, 1, 0]) / 2
    values = (
        (form[:, 0, 0] + form[:, 1, 1]) / 2,
        2 * torch.hypot(along, across),
        torch.rad2deg(torch.atan2(across, along)) / 2,
    )
    return dict(zip(names, values, strict=True))


def _rows_at(rows: torch.Tensor, scale: float, slope: float) -> torch.Tensor:
    """Periodic `rows` (y, x) at the positions scale x + slope y, counted from n // 2."""
    if abs(scale - 1) < 1e-12 and abs(slope) < 1e-12:
        return rows
    ny, n = rows.shape
    k = torch.arange(-((n - 1) // 2), (n - 1) // 2 + 1, dtype=torch.float64, device=rows.device)  # (frequency,)
    x, y = (positions(m, dtype=torch.float64, device=rows.device) for m in (n, ny))
    kind = torch.complex128 if rows.dtype == torch.float64 else torch.complex64
    spectrum = torch.fft.fft(rows)[:, k.long() % n]
    spectrum = spectrum * (_phase(-k * float(x[0]) / n) * (k.abs() * max(1.0, scale) < n / 2)).to(kind)
    spectrum = spectrum * _phase(k * slope * y[:, None] / n).to(kind) * _phase(scale * k**2 / (2 * n)).to(kind)
    apart = torch.arange(float(x[0] - k[-1]), float(x[-1] - k[0]) + 1, dtype=torch.float64, device=rows.device)
    length = fast_length(len(apart) + len(k) - 1)
    chirp = torch.fft.fft(_phase(-scale * apart**2 / (2 * n)).to(kind), length)
    summed = torch.fft.ifft(torch.fft.fft(spectrum, length) * chirp)[:, len(k) - 1 : len(k) - 1 + n]
    return (summed * _phase(scale * x**2 / (2 * n)).to(kind)).real / n


def _phase(turns: torch.Tensor) -> torch.Tensor:
    """e^(2 pi i turns), of the turns' fraction: they reach thousands."""
    turns = 2 * torch.pi * (turns - turns.round())
    return torch.polar(torch.ones_like(turns), turns)


def _within(places: torch.Tensor, n: int) -> torch.Tensor:
    return (places > -(n // 2) - 0.5) & (places < n - n // 2 - 0.5)
