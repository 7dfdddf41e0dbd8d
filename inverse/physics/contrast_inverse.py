"""Damped least squares of projections seen through a contrast transfer function, one defocus an image.

Let T be, for each frequency (k, ky) of the volume, the diagonal matrix of what the lens makes of it in each tilt, at
(k / cos t, ky) of the image. With B and G as in `inverse.physics.closed_form`, and F also along y,

    A = S^H T B F,      A A^H = S^H T G T^H S,

    x = z + F^H B^H T^H (lambda + T G T^H)^-1 (S y - T B F z)                                            (1)

one (tilts x tilts) system for each (k, ky). That is exact on the stretched grid, periodic in x and y. On the camera's,
and where the defocus varies within an image, the inverse of the operator without edges,

    (lambda + F^H B^H T^H T B F)^-1 = (1 - F^H B^H T^H (lambda + T G T^H)^-1 T B F) / lambda             (2)

is the preconditioner of conjugate gradients. The small systems are factored in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

from cryosim.microscope.optics import Optics
from inverse.physics.closed_form import edge_weights, gram_matrices, largest_eigenvalue
from inverse.physics.heights import Fading, transfers
from inverse.physics.spectral import (
    TiltGeometry,
    pair_weights,
    shear,
    shear_adjoint,
    shear_matrices,
    transform_x,
    transform_x_adjoint,
)

Action = Callable[[torch.Tensor], torch.Tensor]
"""Of frequencies (k, tilt, row), complex128, to the same."""

PRECONDITIONER_FLOOR = 0.1
"""Least damping of the preconditioner, in units of |A|^2: the lens carries much across the edges of image and volume.
Measured at a damping of 0.01: 25 to 36 iterations, and 31 to 49 with a tenth of it."""

_NUMBERS_KEPT = 2**26  # of factors, 1 GB; beyond, they are made anew each time


class LensOperator(Protocol):
    """What `lens_transfer` asks of a `ContrastProjection`."""

    parameter_names: ClassVar[tuple[str, ...]]
    optics: Optics
    angles: torch.Tensor
    shifts: torch.Tensor
    voxel_size: float
    fading: Fading | None

    @property
    def geometry(self) -> TiltGeometry: ...


def lens_transfer(physics: LensOperator, rows: int, item: int = 0) -> torch.Tensor:
    """T (tilt, ky, k) of one defocus an image, that at the box centre, with the shifts and the fading.

    At the frequencies of the volume, (k / cos t, ky) of the image, on the half plane of an axis x of the operator's
    period and an axis y of `rows`; differentiable in the operator's parameters.
    """
    g = physics.geometry
    periodic = TiltGeometry(g.depth, g.width, g.period, g.period, "stretched")
    own = {name: getattr(physics, name).double() for name in physics.parameter_names}
    own = {name: values[item if len(values) > 1 else 0] for name, values in own.items()}
    angles, shifts = own["angles"], own["shifts"]
    own = {name: value for name, value in own.items() if hasattr(physics.optics, name)}
    focus = angles.new_zeros(1, len(angles))
    how = {"focus": focus, "shifts": shifts, "fading": physics.fading}
    return transfers(physics.optics.replace(**own), angles, periodic, rows, physics.voxel_size, **how)[0]


def small_solver(angles: torch.Tensor, damping: torch.Tensor, geometry: TiltGeometry, transfer: torch.Tensor) -> Action:
    """(damping + T G T^H)^-1 on frequencies (k, tilt, ky); `transfer` (k, tilt, ky) is the diagonal of T."""
    gram = gram_matrices(angles, geometry)  # (k, tilt, tilt)
    eye = torch.eye(len(angles), dtype=gram.dtype, device=gram.device)
    chunk = max(1, _NUMBERS_KEPT // 4 // (transfer.shape[2] * len(angles) ** 2))

    def factor(k: slice) -> torch.Tensor:
        t = transfer[k].to(gram.dtype).transpose(1, 2)  # (k, ky, tilt)
        system = t[..., :, None] * gram[k, None] * t[..., None, :].conj()
        return torch.linalg.cholesky(system + damping.double() * eye)

    slices = [slice(i, min(i + chunk, len(gram))) for i in range(0, len(gram), chunk)]
    keep = transfer.shape[2] * gram.numel() <= _NUMBERS_KEPT
    factors = [factor(k) for k in slices] if keep else None

    def solve(seen: torch.Tensor) -> torch.Tensor:
        parts = []
        for i, k in enumerate(slices):
            right = seen[k].transpose(1, 2)[..., None]
            parts.append(torch.cholesky_solve(right, factors[i] if factors else factor(k))[..., 0].transpose(1, 2))
        return torch.cat(parts)

    return solve


def contrast_solver(
    angles: torch.Tensor, damping: torch.Tensor, geometry: TiltGeometry, transfer: torch.Tensor
) -> Action:
    """T^H (damping + T G T^H)^-1 of equation (1) on frequencies (k, tilt, row), for `backproject_filtered`."""
    solve = small_solver(angles, damping, geometry, transfer)
    return lambda seen: torch.fft.ifft(transfer.conj() * solve(torch.fft.fft(seen, dim=2)), dim=2)


def edgeless_inverse(
    angles: torch.Tensor, damping: torch.Tensor, geometry: TiltGeometry, transfer: torch.Tensor, like: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Equation (2) as a function of a volume (z, row, x)."""
    strongest = largest_eigenvalue(angles, geometry) * transfer.abs().square().max()
    damping = torch.maximum(damping.double(), PRECONDITIONER_FLOOR * strongest)
    matrices = shear_matrices(angles, geometry, edge_weights(angles, geometry), like)
    solve = small_solver(angles, damping, geometry, transfer)
    weights = (pair_weights(geometry, like.device) / geometry.period)[:, None, None]

    def apply(volume: torch.Tensor) -> torch.Tensor:
        pairs = shear(matrices, transform_x(volume, geometry))  # (k, 2 tilt, row)
        seen = torch.fft.fft(torch.complex(pairs[:, 0::2].double(), pairs[:, 1::2].double()), dim=2)
        seen = torch.fft.ifft(weights * transfer.conj() * solve(transfer * seen), dim=2)
        pairs = torch.stack([seen.real, seen.imag], 2).flatten(1, 2).to(volume.dtype)
        return (volume - transform_x_adjoint(shear_adjoint(matrices, pairs), geometry)) / damping.to(volume)

    return apply
