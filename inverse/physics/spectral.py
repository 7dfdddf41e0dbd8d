"""Exact single-axis projection as matrix products; pure functions of volume, images and angles.

A volume V(z, y, x) is projected along the beam after a turn by t about y, which takes (x, z) to u = x cos t + z sin t.
With the volume as sum of its voxels, band-limited, the slice theorem on its own x frequencies k = m / N reads

    P^_t(k / cos t, y) = sum_z exp(-2 pi i z k tan t) V^(z, y, k)                                        (1)

one (tilts x depth) matrix for each k, applied to all rows y at once. N is the period of x. The image is

    p_t(u, y) = 1 / (N cos t) sum_m P^_t(m / (N cos t), y) exp(2 pi i m u / (N cos t))                   (2)

On the `stretched` grid u = j cos t, so (2) is a discrete Fourier transform and the whole operator is diagonal in k but
for the small matrices of (1). On the `camera` grid u = j, and (2) is one more matrix for each tilt; an image
magnified by m and displaced by s has u = (j - s) / m there. Frequencies beyond the Nyquist frequency of z (k tan t) or
of the image (k / (m cos t)) are not in the data and are left out.

Everything is real arithmetic: a complex number is a pair (Re, Im), so that all products are plain real matrix
products. Phases are reduced to one turn in float64 before they are rounded to the precision of the data.

Sources: Bracewell 1956, doi:10.1071/PH560198; the k tan t form is that of the linogram, Edholm & Herman 1987,
doi:10.1109/TMI.1987.4307847.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from cryosim.core.fourier import fast_length
from cryosim.core.record import Record, static

Grid = Literal["camera", "stretched"]
Pair = tuple[torch.Tensor, torch.Tensor]

_LARGEST_MATRIX_TRANSFORM = 768
"""Width up to which the transform along x is a matrix product rather than an FFT: measured, they meet near here."""


class Placement(NamedTuple):
    """Where the line integrals of the tilts fall on the camera along u; only on the camera grid.

    Attributes
    ----------
    offsets : tensor (tilt,)
        By which content is displaced [px].
    magnifications : tensor (tilt,)
    """

    offsets: torch.Tensor
    magnifications: torch.Tensor


class TiltGeometry(Record):
    """Sizes of a single-axis projection.

    Attributes
    ----------
    depth, width : int
        Of the volume along z and x [voxel].
    image_width : int
        Of the images along u [px].
    period : int
        N of x [voxel]; odd for the camera grid, `width` for the stretched one.
    grid : {"camera", "stretched"}
    """

    depth: int = static()
    width: int = static()
    image_width: int = static()
    period: int = static()
    grid: Grid = static()

    @property
    def n_frequencies(self) -> int:
        """How many k >= 0 there are; the unpaired one of an even period is left out."""
        return (self.period + 1) // 2


def tilt_geometry(
    depth: int, width: int, image_width: int | None, grid: Grid, steepest: float, reach: float = 0.0
) -> TiltGeometry:
    """Geometry whose period holds the volume's projection at every tilt up to `steepest` [deg] without wrapping.

    On the stretched grid the volume itself is periodic in x, and an image is as wide as it. `reach` [voxel] is how far
    images extend that are displaced or not of magnification 1, where that is more than their width.

    Raises
    ------
    ValueError
        For an unknown grid, an image width that the stretched grid cannot have, or a tilt of 90 degrees or more.
    """
    if grid not in ("camera", "stretched"):
        raise ValueError(f'grid: expected "camera" or "stretched", got {grid!r}.')
    if not 0 <= steepest < 89:
        raise ValueError(f"angles: expected tilts below 89 degrees, got {steepest}.")
    if grid == "stretched":
        if image_width not in (None, width):
            raise ValueError(
                f"image_shape: on the stretched grid an image is as wide as the volume, {width}, got {image_width}."
            )
        return TiltGeometry(depth, width, width, width, grid)
    image_width = width if image_width is None else image_width
    tan, cos = math.tan(math.radians(steepest)), math.cos(math.radians(steepest))
    least = math.ceil(max(width + depth * tan, max(image_width, reach) / cos)) + 2
    return TiltGeometry(depth, width, image_width, fast_length(least, odd=True), grid)


def shown_width(depth: int, image_width: int, steepest: float, most: float = 2.0) -> int:
    """Columns of a volume that images show at tilts up to `steepest` [deg], at most `most` times their own.

    With more than twice as many, plug-and-play on a wide specimen came no nearer to the truth.
    """
    sine, cosine = math.sin(math.radians(steepest)), math.cos(math.radians(steepest))
    return math.ceil(min(most * image_width, (image_width + depth * sine) / max(cosine, 1e-3)))


def project(
    volume: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry, placement: Placement | None = None
) -> torch.Tensor:
    """Line integrals (tilt, row, u) [unit of the volume · voxel] of a volume (z, row, x) at `angles` (tilt,) [deg]."""
    matrices = shear_matrices(angles, geometry, image_weights(angles, geometry, placement), volume)
    image = image_matrices(angles, geometry, volume, placement)
    images = []
    for rows in volume.split(_rows_at_once(volume, geometry), dim=1):
        seen = shear(matrices, transform_x(rows, geometry))  # (k, 2 tilt, z) @ (k, z, row)
        images.append(torch.bmm(tilts_first(seen).transpose(1, 2), image))  # (tilt, row, 2 k) @ (tilt, 2 k, u)
    return torch.cat(images, 1)


def backproject(
    images: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry, placement: Placement | None = None
) -> torch.Tensor:
    """Adjoint of `project`: volume (z, row, x) from images (tilt, row, u)."""
    matrices = shear_matrices(angles, geometry, image_weights(angles, geometry, placement), images)
    image = image_matrices(angles, geometry, images, placement)
    volume = []
    for rows in images.split(_rows_at_once(images, geometry), dim=1):
        seen = frequencies_first(torch.bmm(image, rows.transpose(1, 2)))  # (tilt, 2 k, u) @ (tilt, u, row)
        volume.append(transform_x_adjoint(shear_adjoint(matrices, seen), geometry))
    return torch.cat(volume, 1)


def shear_matrices(angles: torch.Tensor, geometry: TiltGeometry, weights: torch.Tensor, like: torch.Tensor) -> Pair:
    """Equation (1) times `weights` (k, tilt), for the real and for the imaginary part of the volume's transform.

    Each is a real matrix (k, 2 tilt, z) whose rows are the real and the imaginary part of the result, tilt by tilt.
    """
    k = frequencies(geometry, like.device)  # (k,) [1/voxel]
    kz = k[:, None] * slopes(angles)  # (k, tilt) [1/voxel]
    cosine, sine = _waves(kz, geometry.depth, like.dtype, weights)  # (k, tilt, z)
    # exp(-i phi) (a + i b): the real part is cos a + sin b, the imaginary part -sin a + cos b
    return torch.stack([cosine, -sine], 2).flatten(1, 2), torch.stack([sine, cosine], 2).flatten(1, 2)


def shear(matrices: Pair, spectra: Pair) -> torch.Tensor:
    """What the tilts see, (k, 2 tilt, row), of a volume's transform (Re, Im), each (k, z, row)."""
    return torch.baddbmm(torch.bmm(matrices[0], spectra[0]), matrices[1], spectra[1])


def shear_adjoint(matrices: Pair, seen: torch.Tensor) -> Pair:
    """Adjoint of `shear`."""
    return torch.bmm(matrices[0].mT, seen), torch.bmm(matrices[1].mT, seen)


def image_matrices(
    angles: torch.Tensor, geometry: TiltGeometry, like: torch.Tensor, placement: Placement | None = None
) -> torch.Tensor:
    """Waves of equation (2) as real matrices (tilt, 2 k, u), pairs (Re, Im) of rows k-major."""
    k, offsets = frequencies(geometry, like.device), None  # (k,)
    if geometry.grid == "camera":
        k = k / cosines(angles)[:, None]  # (tilt, k) [1/px]
    if placement is not None:
        k, offsets = k / placement.magnifications.double()[:, None], placement.offsets.double()[:, None]
    cosine, sine = _waves(k, geometry.image_width, like.dtype, offsets=offsets)  # ([tilt,] k, u)
    pairs = torch.stack([cosine, -sine], -2).flatten(-3, -2)
    return pairs.expand(len(angles), -1, -1)


def _rows_at_once(like: torch.Tensor, geometry: TiltGeometry) -> int:
    """Rows whose spectra fill about 16 MB: they stay in cache, and memory does not grow with the number of rows."""
    row = 2 * geometry.depth * geometry.n_frequencies * like.element_size()
    return max(16, 2**24 // row // 16 * 16)


def transform_x(volume: torch.Tensor, geometry: TiltGeometry) -> Pair:
    """Transform along x of a volume (z, row, x), at the frequencies k >= 0: (Re, Im), each (k, z, row).

    As a matrix product where that is faster: the cosines meet only the even part about x = 0, the sines the odd part.
    """
    depth, rows, width = volume.shape
    if width <= _LARGEST_MATRIX_TRANSFORM:
        cosines_, sines_ = _fourier_matrices(geometry, volume)
        even, odd = (part.reshape(depth * rows, -1) for part in _fold(volume))
        return (cosines_ @ even.T).view(-1, depth, rows), (sines_ @ odd.T).view(-1, depth, rows)
    spectrum = torch.fft.rfft(volume, n=geometry.period)[..., : geometry.n_frequencies]
    spectrum = (spectrum * _centre(geometry, volume)).permute(2, 0, 1)
    return spectrum.real.contiguous(), spectrum.imag.contiguous()


def transform_x_adjoint(spectra: Pair, geometry: TiltGeometry) -> torch.Tensor:
    """Adjoint of `transform_x`: a volume (z, row, x)."""
    depth, rows, width = geometry.depth, spectra[0].shape[2], geometry.width
    if width <= _LARGEST_MATRIX_TRANSFORM:
        cosines_, sines_ = _fourier_matrices(geometry, spectra[0])
        even, odd = (part.reshape(-1, depth * rows).T @ m for part, m in zip(spectra, (cosines_, sines_), strict=True))
        return _unfold(even, odd, width).reshape(depth, rows, width)
    spectrum = torch.complex(*spectra).permute(1, 2, 0) * _centre(geometry, spectra[0]).conj()
    spectrum = torch.nn.functional.pad(spectrum, (0, geometry.period - spectrum.shape[-1]))
    return torch.fft.fft(spectrum.conj())[..., :width].real.contiguous()


def _fold(lines: torch.Tensor) -> Pair:
    """Even and odd part (..., .) of lines (..., x) about x = 0; an even width's unpaired first sample in both."""
    width = lines.shape[-1]
    centre, pairs = width // 2, (width - 1) // 2
    right, left = lines[..., centre + 1 :], lines[..., centre - pairs : centre].flip(-1)
    alone = lines[..., : centre - pairs]  # one column or none
    return torch.cat([lines[..., centre : centre + 1], right + left, alone], -1), torch.cat([right - left, alone], -1)


def _unfold(even: torch.Tensor, odd: torch.Tensor, width: int) -> torch.Tensor:
    """Adjoint of `_fold`."""
    pairs = (width - 1) // 2
    e, o = even[:, 1 : pairs + 1], odd[:, :pairs]
    return torch.cat([even[:, pairs + 1 :] + odd[:, pairs:], (e - o).flip(1), even[:, :1], e + o], 1)


def _fourier_matrices(geometry: TiltGeometry, like: torch.Tensor) -> Pair:
    """cos and -sin of 2 pi k x (k, x) at the positions that `_fold` leaves for each."""
    pairs = (geometry.width - 1) // 2
    x = torch.arange(1, pairs + 1, dtype=torch.float64, device=like.device)
    alone = x.new_full((geometry.width // 2 - pairs,), -(geometry.width // 2))
    k = frequencies(geometry, like.device)[:, None]
    cosine, _ = _turn(k * torch.cat([x.new_zeros(1), x, alone]), like.dtype)
    _, sine = _turn(k * torch.cat([x, alone]), like.dtype)
    return cosine, -sine


def _centre(geometry: TiltGeometry, like: torch.Tensor) -> torch.Tensor:
    """exp(+2 pi i k (width // 2)) (k,): the origin of x is its sample width // 2."""
    cosine, sine = _turn(frequencies(geometry, like.device) * (geometry.width // 2), like.dtype)
    return torch.complex(cosine, sine)


def tilts_first(seen: torch.Tensor) -> torch.Tensor:
    """(k, 2 tilt, row), tilt-major pairs, as (tilt, 2 k, row), k-major pairs, without a copy."""
    k, pairs, rows = seen.shape
    return seen.view(k, pairs // 2, 2, rows).permute(1, 0, 2, 3).reshape(pairs // 2, 2 * k, rows)


def frequencies_first(seen: torch.Tensor) -> torch.Tensor:
    """Inverse of `tilts_first`."""
    tilts, pairs, rows = seen.shape
    return seen.view(tilts, pairs // 2, 2, rows).permute(1, 0, 2, 3).reshape(pairs // 2, 2 * tilts, rows)


def image_weights(angles: torch.Tensor, geometry: TiltGeometry, placement: Placement | None = None) -> torch.Tensor:
    """Weight (k, tilt) of each frequency in equation (2), 0 where volume or image do not resolve it."""
    paired = pair_weights(geometry, angles.device)[:, None]
    return resolved(angles, geometry, placement) * paired / (geometry.period * cosines(angles))


def resolved(angles: torch.Tensor, geometry: TiltGeometry, placement: Placement | None = None) -> torch.Tensor:
    """1 at the frequencies (k, tilt) below the Nyquist frequencies of z and of the image, else 0."""
    k, t = frequencies(geometry, angles.device)[:, None], torch.deg2rad(angles.detach().double())
    kept = (k * torch.tan(t)).abs() <= 0.5
    if geometry.grid == "camera":
        size = 1.0 if placement is None else placement.magnifications.detach().double()
        kept = kept & (k / (torch.cos(t) * size) <= 0.5)
    return kept.double()


def pair_weights(geometry: TiltGeometry, device: torch.device) -> torch.Tensor:
    """2 for the frequencies (k,) that stand for a pair +-k, 1 for k = 0."""
    return 2.0 - (frequencies(geometry, device) == 0).double()


def frequencies(geometry: TiltGeometry, device: torch.device) -> torch.Tensor:
    """The frequencies k = m / N >= 0 (k,) [1/voxel], float64."""
    return torch.arange(geometry.n_frequencies, dtype=torch.float64, device=device) / geometry.period


def slopes(angles: torch.Tensor) -> torch.Tensor:
    """tan of `angles` (tilt,) [deg], float64."""
    return torch.tan(torch.deg2rad(angles.double()))


def cosines(angles: torch.Tensor) -> torch.Tensor:
    """cos of `angles` (tilt,) [deg], float64."""
    return torch.cos(torch.deg2rad(angles.double()))


def _waves(
    frequency: torch.Tensor,
    n: int,
    dtype: torch.dtype,
    weights: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> Pair:
    """cos and sin (..., n) of 2 pi `frequency` (...) times the positions of n samples, times `weights` (...).

    `offsets` (...) are taken from the positions. By the addition theorem from two short tables, of the position's
    multiples of 16 and of the rest: each is exact, and the long axis costs products only.
    """
    step = 16
    start = -(n // 2)
    far = torch.arange(-(-n // step), dtype=torch.float64, device=frequency.device) * step + start
    near = torch.arange(step, dtype=torch.float64, device=frequency.device)
    far = far if offsets is None else far - offsets[..., None]
    far_cos, far_sin = _turn(frequency[..., None] * far, dtype)
    if weights is not None:
        scale = weights.to(dtype)[..., None]
        far_cos, far_sin = far_cos * scale, far_sin * scale
    near_cos, near_sin = (t[..., None, :] for t in _turn(frequency[..., None] * near, dtype))
    far_cos, far_sin = far_cos[..., None], far_sin[..., None]
    cosine = torch.addcmul(far_cos * near_cos, far_sin, near_sin, value=-1)
    sine = torch.addcmul(far_sin * near_cos, far_cos, near_sin)
    return cosine.flatten(-2)[..., :n], sine.flatten(-2)[..., :n]


def _turn(turns: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2 pi `turns` (float64) in `dtype`, reduced to half a turn first."""
    phase = ((turns - turns.detach().round()) * (2 * torch.pi)).to(dtype)
    return torch.cos(phase), torch.sin(phase)


def fitted(values: torch.Tensor, n: int, axis: int) -> torch.Tensor:
    """Values cut or padded with zeros to `n` samples along the axis -2 or -1, about the centre n // 2."""
    before = n // 2 - values.shape[axis] // 2
    after = n - values.shape[axis] - before
    if not (before or after):
        return values
    return torch.nn.functional.pad(values, (before, after) if axis == -1 else (0, 0, before, after))
