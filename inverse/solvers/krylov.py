"""Conjugate gradients stopped early: least squares regularised by the number of steps.

The steps are deepinv's. From zero, the first few take up what the tilts determine well, and noise only later (Hansen
1998, doi:10.1137/1.9780898719697); how many to take is a matter of the noise, as for `sirt`, but each goes further.
"""

from __future__ import annotations

import torch
from deepinv.optim.linear import conjugate_gradient
from deepinv.optim.linear import lsqr as golub_kahan

from inverse.physics.base import TiltPhysics
from inverse.solvers.linear import as_batch

_NEVER = 1e-30
"""Tolerance of deepinv's solvers, which here stop by their count."""


@torch.no_grad()
def cgls(physics: TiltPhysics, images: torch.Tensor, *, iterations: int = 5) -> torch.Tensor:
    """Conjugate gradients on the normal equations A^T A x = A^T images, from zero (Hestenes & Stiefel 1952).

    Parameters
    ----------
    physics : TiltPhysics
        Linear.
    images : tensor (tilt, y, x) or (batch, channel, tilt, y, x)
    iterations : int
        2 to 10 are usual.

    Returns
    -------
    tensor (z, y, x) or (batch, channel, z, y, x)
        Without gradients; for those use `least_squares`.

    Raises
    ------
    ValueError
        For images that do not fit, or a number of iterations below 1.
    """
    batch, flat = _checked(physics, images, iterations)
    # deepinv adds a constant to its denominators, which matters to small numbers: let the images be of size 1
    size = batch.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(1e-30)
    norm = physics.squared_norm().to(batch)
    volume = conjugate_gradient(
        lambda x: physics.A_adjoint(physics.A(x)) / norm,
        physics.A_adjoint(batch / size) / norm**0.5,
        max_iter=iterations,
        tol=_NEVER,
        eps=_NEVER,
    )
    volume = volume * size / norm**0.5
    return volume[0, 0] if flat else volume


@torch.no_grad()
def lsqr(physics: TiltPhysics, images: torch.Tensor, *, iterations: int = 5) -> torch.Tensor:
    """The same volumes as `cgls`, by the recursion of Paige & Saunders 1982, doi:10.1145/355984.355989.

    To be stopped before the directions run out: deepinv's recursion has no guard against what rounding leaves of the
    residual then. Arguments, result and errors as there.
    """
    batch, flat = _checked(physics, images, iterations)
    # an item that is empty, or of which the volume sees nothing, would end deepinv's iterations for all
    seen = physics.A_adjoint(batch).flatten(1).any(1).view(-1, 1, 1, 1, 1)
    if not seen.all():
        batch = torch.where(seen, batch, torch.ones_like(batch))
    rounding = torch.finfo(batch.dtype).eps  # where directions run out, what is left is normalised noise
    volume = golub_kahan(physics.A, physics.A_adjoint, batch, tol=rounding, conlim=1 / rounding, max_iter=iterations)
    volume = volume[0] if isinstance(volume, tuple) else volume
    volume = torch.where(seen, volume, torch.zeros_like(volume))
    return volume[0, 0] if flat else volume


def _checked(physics: TiltPhysics, images: torch.Tensor, iterations: int) -> tuple[torch.Tensor, bool]:
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}.")
    return as_batch(physics, images)
