"""Plug and play with few iterations, all of whose numbers are learned.

With D a denoiser, the iterations are those of `inverse.solvers.plug_and_play`, of "hqs" (1) or "pgd" (2),

    x <- D(prox_(g f)(x), s),           g = s^2 / l                                                        (1)
    x <- D(x - g grad f(x), s),         g = t n / |A|^2                                                    (2)

on f(x) = |A x - y|^2 / (2 n), with s, and l or t, of each iteration learned beside the weights of D. s is learned as a
factor to what plug-and-play would take for these images, so that a network that was taught at one noise, with some
tilts, means something at others; and before it is taught it is plug-and-play. The step on the data is the operator's
own (Zhang, Van Gool & Timofte 2020, arXiv:2003.10428; Gregor & LeCun 2010 for the idea of unrolling).

All of it is differentiable, also in the parameters of the operator: angles, shifts, defocus. What the data say of them
is then asked through the volume that they and the prior make together.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from deepinv.models.base import Denoiser
from torch import nn
from torch.utils.checkpoint import checkpoint

from inverse.physics.base import TiltPhysics
from inverse.priors.wrappers import known_levels
from inverse.solvers.linear import as_batch
from inverse.solvers.plug_and_play import Start, levels_of
from inverse.solvers.primal_dual import expect_positive
from inverse.solvers.whitened import Whitened

Method = Literal["hqs", "pgd"]


class Schedule(NamedTuple):
    """What the learned numbers are factors to.

    Attributes
    ----------
    levels : tuple of float
        Of the denoiser in each iteration [unit of the volume].
    variance : float
        Of a voxel, for the first volume [square of the unit].
    norm : float
        |A|^2 / n.
    """

    levels: tuple[float, ...]
    variance: float
    norm: float


class Unrolled(nn.Module):
    """Volumes of images, in iterations of learned steps.

    Parameters
    ----------
    denoiser : Denoiser
        D(x, sigma) in the unit of the volume; its weights are learned, too.
    iterations : int
    method : {"hqs", "pgd"}
        (1) or (2).
    strength : float
        l, to begin with.
    frugal : bool
        Keep of each iteration its volume only, and compute the rest anew on the way back: half as fast, and the memory
        of one iteration.

    Attributes
    ----------
    level, step : Parameter (iteration,)
        Logarithms of the factor to s, and of 1 / l or t.

    Raises
    ------
    ValueError
        For an unknown method, or numbers that are not positive.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        iterations: int = 6,
        *,
        method: Method = "hqs",
        strength: float = 0.25,
        frugal: bool = False,
    ) -> None:
        super().__init__()
        if method not in ("hqs", "pgd"):
            raise ValueError(f'Unrolled: expected the method "hqs" or "pgd", got {method!r}.')
        expect_positive(iterations=iterations, strength=strength)
        self.denoiser, self.method, self.frugal, self.strength = denoiser, method, frugal, strength
        start = -math.log(strength) if method == "hqs" else 0.0
        like = next((p for p in denoiser.parameters() if p.is_floating_point()), torch.empty(0))
        self.level = nn.Parameter(like.new_zeros(iterations))
        self.step = nn.Parameter(like.new_full((iterations,), start))

    @torch.no_grad()
    def schedule(self, physics: TiltPhysics, images: torch.Tensor, noise: float | torch.Tensor) -> Schedule:
        """What plug-and-play would take for these images; the arguments are those of a call."""
        batch, _ = as_batch(physics, images)
        seen = Whitened(physics, noise, batch)
        first = Start(seen, seen.whiten(batch))
        levels = levels_of("hqs", None, self.denoiser, self.strength, first, seen, len(self.level))
        return Schedule(tuple(levels), first.variance, seen.squared_norm())

    def forward(
        self,
        physics: TiltPhysics,
        images: torch.Tensor,
        noise: float | torch.Tensor,
        schedule: Schedule | None = None,
    ) -> torch.Tensor:
        """Volumes (z, y, x) or (batch, 1, z, y, x) of images (tilt, y, x) or (batch, 1, tilt, y, x).

        Parameters
        ----------
        physics : TiltProjection, ContrastProjection or another TiltPhysics
        images : tensor
        noise : float or tensor (tilt,)
            Variance of a pixel.
        schedule : Schedule, optional
            That of these images when left out. It has no gradients: hold it while parameters of the operator are
            fitted, so that what is made small stays the same function.

        Raises
        ------
        ValueError
            For images or noise that do not fit.
        """
        batch, flat = as_batch(physics, images)
        plan = self.schedule(physics, images, noise) if schedule is None else schedule
        seen = Whitened(physics, noise, batch)
        y = seen.whiten(batch)
        x = seen.prox_l2(batch.new_zeros(len(batch), 1, *physics.volume_shape), y, plan.variance)
        for i, level in enumerate(plan.levels):
            s, step = self._level(i, level), self.step[i].exp()
            if self.frugal and torch.is_grad_enabled():
                x = checkpoint(self._iteration, seen, x, y, s, step, plan.norm, use_reentrant=False)
            else:
                x = self._iteration(seen, x, y, s, step, plan.norm)
        return x[0, 0] if flat else x

    def _level(self, i: int, level: float) -> torch.Tensor:
        """s of an iteration, within the denoiser's levels."""
        low, high = known_levels(self.denoiser)
        return (level * self.level[i].exp()).clamp(low, high)

    def _iteration(
        self, seen: Whitened, x: torch.Tensor, y: torch.Tensor, s: torch.Tensor, step: torch.Tensor, norm: float
    ) -> torch.Tensor:
        if self.method == "hqs":
            u = seen.prox_l2(x, y, s**2 * step)
        else:
            u = x - step / norm * seen.A_adjoint(seen.A(x) - y)
        return self.denoiser(u, s)
