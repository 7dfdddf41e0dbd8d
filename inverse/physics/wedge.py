"""What a tilt scheme measures, in closed form: transfer, measured part, resolution and noise.

In the notation of `inverse.physics.closed_form` the projection is A = S^H B F, where B(k), tilts x depth, shows to the
tilts the column of the volume at one frequency k along x, and G = B B^H. With the singular vectors of B,

    B = U mu^(1/2) V^H,     G = U mu U^H,     V = B^H U mu^(-1/2),                                       (1)

everything a linear reconstruction can know is said by the columns of V (depth x tilts) and by the eigenvalues mu:

    least squares damped by lambda     A^H (A A^H + lambda)^-1 A = F^H V mu / (mu + lambda) V^H F        (2)
    the projector on what is measured  A^+ A                     = F^H V [mu > cutoff] V^H F             (3)
    its noise, for white images        A^H (A A^H + lambda)^-2 A = F^H V mu / (mu + lambda)^2 V^H F      (4)

The missing wedge is the complement of V. It is no sharp wedge: a slab of finite depth blurs its faces by 1 / depth, and
between two tilts further apart than 1 / depth there are gaps of the same kind.

All holds for the period of a `TiltGeometry` and without edges: exactly on the stretched grid; on the camera grid away
from the sides of the volume, where the image is as wide as what it shows.

Sources: Crowther, DeRosier & Klug 1970, doi:10.1098/rspa.1970.0119; Radermacher & Hoppe 1980, 7th European Congress on
Electron Microscopy 1, 132, and Radermacher 1992 in Frank (ed.), Electron Tomography, doi:10.1007/978-1-4757-2163-8_5;
eigenvalues and null space of limited angles: Davison 1983, doi:10.1137/0143028.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from inverse.physics.closed_form import edge_weights, gram_matrices, largest_eigenvalue
from inverse.physics.spectral import (
    TiltGeometry,
    frequencies,
    pair_weights,
    slopes,
    tilt_geometry,
    transform_x,
    transform_x_adjoint,
)

Angles = torch.Tensor | Sequence[float]

LEAST_CUTOFF = 1e-10
"""Least eigenvalue, over the largest of its k, that counts as measured: with smaller ones V is no longer orthonormal to
1e-6 in float64."""


def transfer(angles: Angles, geometry: TiltGeometry, damping: float | torch.Tensor | None = None) -> torch.Tensor:
    """How much damped least squares gives back of each frequency: the diagonal of equation (2) in the basis of kz.

    Parameters
    ----------
    angles : tensor (tilt,)
        [deg]; differentiable.
    geometry : TiltGeometry
        Of the projection, as `TiltProjection.geometry`.
    damping : float or tensor (), optional
        lambda [voxel^2], as the weight of `least_squares`; a hundredth of |A|^2 when left out. Small: the diagonal of
        the projector on the measured space.

    Returns
    -------
    tensor (kz, kx)
        [1], 0 to 1, float64; the same for every ky. kz = m / depth in the order of `torch.fft.fftfreq`, kx those of
        `spectral.frequencies`, which leaves out the unpaired one of an even period.

    Raises
    ------
    ValueError
        For angles that are not a list of finite numbers, or a damping that is not positive.
    """
    angles = _angles(angles)
    damping = _damping(damping, angles, geometry, 1e-2)
    eye = torch.eye(len(angles), dtype=torch.complex128, device=angles.device)
    factor = torch.linalg.cholesky(gram_matrices(angles, geometry) + damping * eye)
    spectra = torch.fft.ifft(_beam_matrices(angles, geometry, slice(None)), norm="ortho")  # (k, tilt, kz)
    whitened = torch.linalg.solve_triangular(factor, spectra, upper=False)
    return whitened.abs().square().sum(1).T  # (kz, k)


def measured(
    volume: torch.Tensor,
    angles: Angles,
    geometry: TiltGeometry | None = None,
    cutoff: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a volume, whatever made it, into the part that the tilts determine and the rest, which they do not see.

    The first is A^+ A v, what noise-free images of v would tell of it; the second is what the prior or the network
    added. They sum to v.

    Parameters
    ----------
    volume : tensor (..., z, y, x)
        Differentiable.
    angles : tensor (tilt,)
        [deg]; taken as constants.
    geometry : TiltGeometry, optional
        Of the projection; the camera grid, with images as wide as the volume, when left out.
    cutoff : float or tensor (), optional
        Eigenvalues of A A^H up to here [voxel^2] do not count as measured; 1e-6 |A|^2 when left out. With noise take
        its variance over that of a voxel, the weight of `least_squares`: what is weaker drowns.

    Returns
    -------
    determined, rest : tensor (..., z, y, x)

    Raises
    ------
    ValueError
        For a volume that does not fit the geometry, angles that are not finite, or a cutoff below `LEAST_CUTOFF` |A|^2.

    Notes
    -----
    On the stretched grid an orthogonal projector. On the camera grid the volume is continued with zeros to the period,
    projected there, and cut to its box again; the streaks that leave the box through its sides are lost. Measured with
    32 x 128 voxels and 21 tilts, the operator then sees of the rest 1 % (a blob at the centre) to 10 % (noise that
    fills the box) of what it sees of the volume. That nothing stands beyond the sides is knowledge too, which is not
    used here, for it is wrong of a specimen: `A_dagger(A(v))` of the operator uses it, and iterates.
    """
    angles = _angles(angles)
    if volume.ndim < 3 or not volume.is_floating_point():
        raise ValueError(f"measured: expected real floats (..., z, y, x), got {tuple(volume.shape)} of {volume.dtype}.")
    depth, rows, width = volume.shape[-3:]
    if geometry is None:
        geometry = tilt_geometry(depth, width, None, "camera", float(angles.detach().abs().max()))
    if (depth, width) != (geometry.depth, geometry.width):
        raise ValueError(
            f"measured: expected volumes with depth and width ({geometry.depth}, {geometry.width}), those of the "
            f"geometry, got ({depth}, {width}). Give the geometry of the operator that made the images."
        )
    act = projector(angles, geometry, cutoff, volume.dtype)
    stack = volume.reshape(-1, depth, rows, width).movedim(0, 1).flatten(1, 2)  # (z, volume row, x)
    found = act(stack).unflatten(1, (-1, rows)).movedim(1, 0).reshape(volume.shape)
    return found, volume - found


def projector(
    angles: Angles, geometry: TiltGeometry, cutoff: float | torch.Tensor | None, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Equation (3) as a function of volumes (z, row, x) of `dtype`: small matrix products for each k, all rows at once.

    Rows are independent, so large volumes may come in slabs. Holds V, k · depth · tilts complex numbers. Arguments as
    in `measured`.
    """
    angles = _angles(angles).detach()
    cutoff = _damping(cutoff, angles, geometry, 1e-6, least=LEAST_CUTOFF)
    part = max(1, 2**22 // (geometry.depth * len(angles)))  # of the k, so that complex128 stays within 64 MB
    steps = range(0, geometry.n_frequencies, part)
    bases = [_measured_basis(angles, geometry, cutoff, slice(k, k + part)).to(dtype.to_complex()) for k in steps]
    seen = torch.cat(bases)  # (k, z, tilt)
    share = (pair_weights(geometry, angles.device) / geometry.period).to(dtype)[:, None, None]

    def act(volume: torch.Tensor) -> torch.Tensor:
        parts = []
        for rows in volume.split(64, dim=1):
            spectra = torch.complex(*transform_x(rows, geometry))  # (k, z, row)
            spectra = seen @ (seen.mH @ spectra) * share
            parts.append(transform_x_adjoint((spectra.real, spectra.imag), geometry))
        return torch.cat(parts, 1)

    return act


def gram_eigenvalues(angles: Angles, geometry: TiltGeometry) -> torch.Tensor:
    """mu (k, tilt) [voxel^2] of equation (1), ascending, k >= 0; those of -k are the same. Differentiable."""
    return torch.linalg.eigvalsh(gram_matrices(_angles(angles), geometry)).clamp_min(0)


def null_space_dimension(
    angles: Angles, geometry: TiltGeometry, cutoff: float | torch.Tensor | None = None
) -> torch.Tensor:
    """How many of the `depth` unknowns of a column at each k the tilts leave open, int64 (k,); arguments as `measured`.

    Where the tilts lie densely the others number about depth · 2 k tan(steepest) (Slepian's count of what a limited
    band holds), and never more than there are tilts that resolve k.
    """
    angles = _angles(angles)
    cutoff = _damping(cutoff, angles, geometry, 1e-6, least=LEAST_CUTOFF)
    return geometry.depth - (gram_eigenvalues(angles, geometry) > cutoff).sum(1)


def measured_share(angles: Angles, geometry: TiltGeometry, cutoff: float | torch.Tensor | None = None) -> float:
    """Share [1] of the degrees of freedom of a volume over the period that the tilts determine: see `measured`."""
    angles = _angles(angles)
    pairs = pair_weights(geometry, angles.device)
    open_ = (pairs * null_space_dimension(angles, geometry, cutoff)).sum()
    return float(1 - open_ / (pairs.sum() * geometry.depth))


def noise_gain(angles: Angles, geometry: TiltGeometry, damping: float | torch.Tensor | None = None) -> torch.Tensor:
    """Variance of a voxel for white noise of variance 1 per pixel, through damped least squares: equation (4).

    Its mean over z is sum of mu / (mu + lambda)^2 over all eigenvalues, over the number of voxels of a row.

    Parameters
    ----------
    angles : tensor (tilt,)
        [deg]; differentiable.
    geometry : TiltGeometry
    damping : float or tensor (), optional
        lambda [voxel^2]; a hundredth of |A|^2 when left out.

    Returns
    -------
    tensor (z,)
        [1/voxel^2], float64; the same for all x and y, on the camera grid away from the sides.

    Raises
    ------
    ValueError
        As `transfer`.
    """
    angles = _angles(angles)
    damping = _damping(damping, angles, geometry, 1e-2)
    eye = torch.eye(len(angles), dtype=torch.complex128, device=angles.device)
    factor = torch.linalg.cholesky(gram_matrices(angles, geometry) + damping * eye)
    response = torch.cholesky_solve(_beam_matrices(angles, geometry, slice(None)), factor)  # (k, tilt, z)
    pairs = pair_weights(geometry, angles.device) / geometry.period
    return (response.abs().square().sum(1) * pairs[:, None]).sum(0)


def crowther_resolution(angles: Angles, thickness: float | torch.Tensor) -> torch.Tensor:
    """Finest period [Å] that tilts sample without gaps, () : thickness times the largest step [rad].

    Central sections a step apart separate by k · step at the frequency k, and a slab's spectrum is known 1 / thickness
    about each. For even steps over 180 degrees this is pi D / N. Uneven ones are as good as their largest gap; the
    missing wedge is no gap, but see `elongation`.

    Parameters
    ----------
    angles : tensor (tilt,)
        [deg], in any order.
    thickness : float or tensor ()
        Of the slab, or diameter of the object [Å].

    Raises
    ------
    ValueError
        For fewer than two tilts, or a thickness that is not positive.
    """
    angles = _angles(angles)
    thickness = torch.as_tensor(thickness)
    if len(angles) < 2 or not float(thickness.detach()) > 0:
        raise ValueError(
            f"crowther_resolution: expected two tilts or more and a positive thickness [Å], got {len(angles)} and "
            f"{float(thickness):g}."
        )
    return thickness * torch.deg2rad(angles.sort().values.diff().max())


def elongation(angles: Angles) -> torch.Tensor:
    """How much wider a point becomes along the beam (of the middle tilt) than across, () [1].

    sqrt((a + sin a cos a) / (a - sin a cos a)), a half the range of tilts: the root of the second moments of kx over
    kz in the measured sector (Radermacher & Hoppe 1980). 1 for 90 degrees, 1.55 for 60, infinite for a single tilt.
    """
    angles = _angles(angles)
    half = torch.deg2rad(angles.max() - angles.min()) / 2
    if not float(half.detach()) > 0:
        return torch.full_like(half, torch.inf)
    mixed = torch.sin(half) * torch.cos(half)
    return ((half + mixed) / (half - mixed)).sqrt()


def _measured_basis(angles: torch.Tensor, geometry: TiltGeometry, cutoff: torch.Tensor, k: slice) -> torch.Tensor:
    """V (k, z, tilt) of equation (1), zero in the columns that do not exceed the cutoff, complex128."""
    beams = _beam_matrices(angles, geometry, k)  # (k, tilt, z)
    mu, vectors = torch.linalg.eigh(beams @ beams.mH)
    scale = torch.where(mu > cutoff, mu.clamp_min(1e-300).rsqrt(), 0)
    return beams.mH @ (vectors * scale[:, None, :])


def _beam_matrices(angles: torch.Tensor, geometry: TiltGeometry, k: slice) -> torch.Tensor:
    """B (k, tilt, z) at some of the frequencies, complex128."""
    z = torch.arange(geometry.depth, dtype=torch.float64, device=angles.device) - geometry.depth // 2
    turns = (frequencies(geometry, angles.device)[k, None] * slopes(angles))[..., None] * z
    weights = edge_weights(angles, geometry)[k, :, None].expand_as(turns)
    return torch.polar(weights, -2 * math.pi * turns)


def _angles(angles: Angles) -> torch.Tensor:
    angles = torch.as_tensor(angles)
    if angles.ndim != 1 or len(angles) == 0 or not torch.isfinite(angles).all():
        raise ValueError(f"angles: expected finite numbers of shape (tilt,) [deg], got {tuple(angles.shape)}.")
    return angles.double()


def _damping(
    given: float | torch.Tensor | None, angles: torch.Tensor, geometry: TiltGeometry, share: float, least: float = 0.0
) -> torch.Tensor:
    """What is given, or a share of |A|^2 [voxel^2]."""
    if not float(angles.detach().abs().max()) < 89:
        raise ValueError(f"angles: expected tilts below 89 degrees, got {float(angles.detach().abs().max()):g}.")
    norm = largest_eigenvalue(angles, geometry)
    if given is None:
        return share * norm
    value = torch.as_tensor(given, dtype=torch.float64, device=angles.device)
    known, floor = float(value.detach()) if value.ndim == 0 else math.nan, least * float(norm.detach())
    if not 0 < known < math.inf or known < floor:
        raise ValueError(
            f"damping, cutoff: expected a positive number of at least {floor:g} voxel^2 ({least:g} |A|^2), got {given}."
        )
    return value
