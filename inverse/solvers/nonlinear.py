"""Least squares of a nonlinear physics by Gauss-Newton steps from a linear start.

At x the images are linearised, A(x + d) = A(x) + J d, and the step solves

    (J^H J + lambda) d = J^H (y - A(x)) - lambda x                                                       (1)

by conjugate gradients, with J d by forward and J^H v by reverse differentiation. A step that does not lessen the
objective is halved (Nocedal & Wright 2006, doi:10.1007/978-0-387-40065-5, section 10.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from cryosim.core.record import Record, item
from inverse.physics.closed_form import conjugate_gradients


class NonlinearPhysics(Protocol):
    """What is asked of an operator."""

    def A(self, x: torch.Tensor, /) -> torch.Tensor: ...
    def A_vjp(self, x: torch.Tensor, v: torch.Tensor, /) -> torch.Tensor: ...


class GaussNewton(Record):
    """What `gauss_newton` returns.

    Attributes
    ----------
    volume : tensor (batch, channel, z, y, x)
    objective : tensor (step + 1,)
        |A x - y|^2 + weight |x|^2 at the start and after each step.
    """

    volume: torch.Tensor = item(5)
    objective: torch.Tensor = item(1)


def gauss_newton(
    physics: NonlinearPhysics,
    images: torch.Tensor,
    start: torch.Tensor,
    weight: float | torch.Tensor,
    *,
    steps: int = 4,
    iterations: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> GaussNewton:
    """Minimiser of |A x - images|^2 + weight |x|^2 near a start.

    Parameters
    ----------
    physics : MultisliceProjection or another nonlinear physics
    images : tensor (batch, channel, tilt, y, x)
    start : tensor (batch, channel, z, y, x)
        Such as `physics.A_dagger(images)`.
    weight : float or tensor ()
        As in `least_squares`.
    steps, iterations : int
        Gauss-Newton steps, and conjugate gradients in each.
    progress : callable, optional
        Called with (steps done, steps in all).

    Raises
    ------
    ValueError
        When the weight is not positive.
    """
    if not float(weight) > 0:
        raise ValueError(f"gauss_newton: expected a positive weight, got {float(weight)}.")
    weight = torch.as_tensor(weight).to(start)

    def objective(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return (physics.A(x) - images).square().sum() + weight * x.square().sum()

    x, values = start.detach(), [objective(start.detach())]
    for step in range(steps):
        with torch.no_grad():
            rest = images - physics.A(x)
        target = physics.A_vjp(x, rest) - weight * x

        def normal(d: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return physics.A_vjp(x, pushed(physics, x, d)) + weight * d

        d, _ = conjugate_gradients(normal, lambda r: r, target, 1e-3, iterations)
        length, value = 1.0, objective(x + d)
        while not value < values[-1] and length > 1e-3:
            length /= 2
            value = objective(x + length * d)
        if not value < values[-1]:
            break
        x = x + length * d
        values.append(value)
        if progress:
            progress(step + 1, steps)
    return GaussNewton(x, torch.stack(values))


def pushed(physics: NonlinearPhysics, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """J d: the change of A(x) along d, by forward differentiation."""
    return torch.func.jvp(physics.A, (x,), (d,))[1]
