"""Simultaneous iterative reconstruction.

deepinv's own divides by the sum of every row, however small. The entries of our exact projection are those of a
band-limited line, positive but for ripples; a ray that misses the volume has a sum near zero of either sign, and the
iteration diverges. Here such rays count for nothing, and where ripples still make an eigenvalue larger than 1, as for
a single tilt, steps are shorter by it.
"""

from __future__ import annotations

import torch

from inverse.physics.tilt import TiltProjection
from inverse.solvers.linear import as_batch

_LEAST = 0.02  # of the largest sum: less is a ray that all but misses


def sirt(
    physics: TiltProjection, images: torch.Tensor, *, iterations: int = 20, relaxation: float = 1.0
) -> torch.Tensor:
    """Simultaneous iterative reconstruction from zero: x <- x + relaxation V A^T W (images - A x).

    W and V are the inverses of the sums of the rows and of the columns of A, so each step averages residuals over rays
    (Gilbert 1972, doi:10.1016/0022-5193(72)90180-4). Where it stops decides how much of the noise it takes up: 4 to 20
    iterations are usual.

    Parameters
    ----------
    physics : TiltProjection
        On the camera grid.
    images : tensor (tilt, y, x) or (batch, channel, tilt, y, x)
        Line integrals [unit of the volume · voxel], over `physics.scale`.
    iterations : int
    relaxation : float
        Between 0 and 2.

    Returns
    -------
    tensor (z, y, x) or (batch, channel, z, y, x)

    Raises
    ------
    TypeError
        For an operator with negative entries, whose sums mean nothing: a contrast transfer function.
    ValueError
        For a number of iterations below 1, or a relaxation out of bounds.
    """
    if not isinstance(physics, TiltProjection):
        raise TypeError(
            f"sirt: expected a TiltProjection, got {type(physics).__name__}, whose rows may sum to nothing. Correct "
            "the contrast of the images first, or use least_squares."
        )
    if iterations < 1 or not 0 < relaxation < 2:
        raise ValueError(
            f"sirt: expected 1 of the iterations or more and a relaxation between 0 and 2, got {iterations} and "
            f"{relaxation}."
        )
    batch, flat = as_batch(physics, images)
    with torch.no_grad():
        volume = batch.new_zeros((*batch.shape[:2], *physics.volume_shape))
        rows = _inverse(physics.A(torch.ones_like(volume)))
        columns = _inverse(physics.A_adjoint(torch.ones_like(batch)))
        relaxation = relaxation / max(1.0, _largest(physics, rows, columns))
        for _ in range(iterations):
            volume = volume + relaxation * columns * physics.A_adjoint(rows * (batch - physics.A(volume)))
    return volume[0, 0] if flat else volume


def _largest(physics: TiltProjection, rows: torch.Tensor, columns: torch.Tensor, iterations: int = 8) -> float:
    """Largest eigenvalue of V A^T W A, from below: 1 for positive entries, more where ripples of few tilts add up."""
    x = torch.rand(columns[:1].shape, generator=torch.Generator().manual_seed(0), dtype=columns.dtype).to(columns)
    if physics.angles.shape[0] > 1:  # an operator for each item
        x = x.expand_as(columns)
    w, v, value = rows[: len(x)], columns[: len(x)], 1.0
    for _ in range(iterations):
        x = x / x.norm().clamp_min(1e-30)
        x = v * physics.A_adjoint(w * physics.A(x))
        value = float(x.norm())
    return 1.05 * value if value > 1.001 else 1.0


def _inverse(sums: torch.Tensor) -> torch.Tensor:
    """1 / sums, and 0 where there is next to nothing."""
    some = sums > _LEAST * sums.amax()
    return torch.where(some, 1 / torch.where(some, sums, torch.ones_like(sums)), torch.zeros_like(sums))
