"""Operators whose images have noise of each tilt's own, and least squares that weighs them by it."""

from __future__ import annotations

import math
import warnings

import torch

from inverse.physics.base import TiltPhysics
from inverse.physics.closed_form import conjugate_gradients


def damped(
    physics: TiltPhysics,
    centre: torch.Tensor,
    images: torch.Tensor,
    noise: torch.Tensor,
    gamma: float | torch.Tensor,
) -> torch.Tensor:
    """Minimiser of gamma / 2 sum over tilts of |A x - images|^2 / noise + |x - centre|^2 / 2.

    Of one variance by the operator's own `prox_l2`; of several by conjugate gradients on the change from the centre,
    preconditioned with what it would be were the variance their geometric mean. On the stretched grid their number
    grows with the ratio of the variances only.

    Parameters
    ----------
    physics : TiltPhysics
    centre : tensor (batch, 1, z, y, x)
    images : tensor (batch, 1, tilt, y, x)
    noise : tensor () or (tilt,)
        Variance of a pixel.
    gamma : float or tensor ()
        Variance of the volume about `centre`.

    Warns
    -----
    UserWarning
        When the operator's `max_iter` does not suffice for its `tol`.
    """
    if noise.ndim == 0:
        return physics.prox_l2(centre, images, gamma / float(noise))
    typical = math.exp(float(noise.double().log().mean()))
    share = (typical / noise).to(centre)[:, None, None]
    damping = typical / gamma

    def normal(x: torch.Tensor) -> torch.Tensor:
        return physics.A_adjoint(share * physics.A(x)) + damping * x

    residual = physics.A_adjoint(share * (images - physics.A(centre)))
    nearby = physics.approximate_inverse(float(damping), centre)
    change, iterations = conjugate_gradients(normal, nearby, residual, physics.tol, physics.max_iter)
    if iterations > physics.max_iter:
        warnings.warn(
            f"{physics.max_iter} iterations of damped least squares did not reach the tolerance {physics.tol:g}. Allow "
            "the operator more iterations, or take higher noise levels.",
            UserWarning,
            stacklevel=2,
        )
    return centre + change


class Whitened:
    """An operator of images over the deviation of their noise, so that the noise of each pixel is 1.

    It has of deepinv's linear operators what its iterations ask for, and no state but the operator's own.

    Parameters
    ----------
    physics : TiltPhysics
    noise : float or tensor (tilt,)
        Variance of a pixel.
    like : tensor
        Images.

    Raises
    ------
    ValueError
        For a noise that is not positive or not of this many tilts.
    """

    def __init__(self, physics: TiltPhysics, noise: float | torch.Tensor, like: torch.Tensor) -> None:
        variance = torch.as_tensor(noise, dtype=torch.float64, device=like.device)
        n_tilts = like.shape[2]
        if variance.ndim > 1 or variance.numel() not in (1, n_tilts):
            raise ValueError(f"noise: expected a number or ({n_tilts},), got the shape {tuple(variance.shape)}.")
        if not (torch.isfinite(variance) & (variance > 0)).all():
            raise ValueError(f"noise: expected positive numbers, got {variance.flatten().tolist()[:3]}.")
        self.physics = physics
        self.std = variance.sqrt().to(like).reshape(-1, 1, 1)
        even = bool((variance == variance.flatten()[0]).all())
        self.variance = variance.flatten()[0] if even else variance

    def whiten(self, images: torch.Tensor) -> torch.Tensor:
        """Images (batch, channel, tilt, y, x) over the deviation of their noise."""
        return images / self.std

    def A(self, x: torch.Tensor) -> torch.Tensor:
        """Whitened images of volumes."""
        return self.physics.A(x) / self.std

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Volumes from whitened images."""
        return self.physics.A_adjoint(y / self.std)

    def A_vjp(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The adjoint, in deepinv's words."""
        return self.A_adjoint(v)

    def squared_norm(self) -> float:
        """|A|^2, or, of several variances, a bound."""
        return float(self.physics.squared_norm()) / float(self.std.min()) ** 2

    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
        """Minimiser of gamma / 2 |A x - y|^2 + 1/2 |x - z|^2.

        See `damped`.
        """
        return damped(self.physics, z, y * self.std, self.variance.to(z), gamma)
