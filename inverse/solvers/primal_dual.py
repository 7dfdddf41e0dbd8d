"""Least squares with priors that are not smooth: total variation, wavelets, constraints.

To minimise |A x - y|^2 / (2 n) + sum of weight_i g_i(K_i x), a dual field u_i is carried along for each prior:

    x+   = x - T (A^T (A x - y) / n + sum K_i^T u_i)                                                     (1)
    u_i+ = prox of sigma (weight_i g_i)* at u_i + sigma K_i (2 x+ - x)                                   (2)

where T is no number but

    T = (A^T A / n + 1 / tau)^-1,     sigma sum |K_i|^2 <= 1 / tau,                                      (3)

the inverse that least squares has in closed form. With it (1) is the proximal step of the data term itself, and the
whole is the method of Chambolle & Pock 2011, doi:10.1007/s10851-010-0251-1: tens of iterations, however badly
conditioned A is, each at the price of one projection, one back-projection and one closed form.

Where edges make the closed form an approximation T', it is divided by the largest eigenvalue of T' T^-1. Then
1 / T' - A^T A / n is still at least 1 / tau, and (1) is the proximal step of the data term in that metric, because the
term is quadratic: the same method, with a step that is somewhat shorter (Condat 2013, doi:10.1007/s10957-012-0245-9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from inverse.physics.base import TiltPhysics
from inverse.priors.classic import Constraint, Fields, Prior

_RELAXATION = 1.8
"""Of the steps of (1) and (2), which below 2 may be overdone."""
_BALANCE = 3.0
"""1 / tau over |K| |u| / |x|, of the dual fields and the volume where they come to rest. Measured with tilts alone and
through a lens, at 10 and 0 dB: the best is between 1.5 and 6."""
_SETTLED = 15
"""Iterations after which |u| / |x| is measured; the dual fields are then within a third of where they come to rest."""
_MARGIN = 1.15
"""Over the largest eigenvalue, which is estimated from below."""
_LEAST_DAMPING = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Of T, in units of |A|^2: with less, rounding errors grow from step to step. A larger one only shortens the steps."""

Progress = Callable[[int, int], None]
Weight = float | torch.Tensor


class Minimum(NamedTuple):
    """What `primal_dual` returns.

    Attributes
    ----------
    volume : tensor (batch, channel, z, y, x)
    iterations : int
    change : tensor (iteration, batch)
        How far volume and dual fields moved, over how far they are from zero, in the metric of their steps [1].
    fields : list of tuple of tensor
        Dual fields, to go on from.
    auxiliary : list of tensor or None
        Fields of the priors' own.
    """

    volume: torch.Tensor
    iterations: int
    change: torch.Tensor
    fields: list[Fields]
    auxiliary: list[torch.Tensor | None]


@torch.no_grad()
def primal_dual(
    physics: TiltPhysics,
    images: torch.Tensor,
    priors: Sequence[tuple[Prior, Weight]],
    *,
    noise: float = 1.0,
    iterations: int = 100,
    tolerance: float = 1e-3,
    start: Minimum | None = None,
    progress: Progress | None = None,
) -> Minimum:
    """Minimise |A x - images|^2 / (2 noise) + sum of weight · prior(x), for each item of a batch.

    Parameters
    ----------
    physics : TiltPhysics
        Linear.
    images : tensor (batch, channel, tilt, y, x)
    priors : sequence of (prior, weight)
        See `inverse.priors.classic`; the weights are positive, a number or one for each item (batch,).
    noise : float
        n, variance of a pixel.
    iterations : int
        At most.
    tolerance : float
        Of the relative change from one iteration to the next, below which to stop; of the item that changes most.
    start : Minimum, optional
        Where to begin, such as the minimum for other weights.
    progress : callable, optional
        Called with (iterations done, at most).

    Returns
    -------
    Minimum
        Its volume satisfies constraints exactly.

    Raises
    ------
    ValueError
        For images that do not fit or are not finite, numbers that are not positive, or no prior.
    ArithmeticError
        Where numbers exceed the precision.
    """
    weights = _checked(physics, images, priors, noise=noise, iterations=iterations, tolerance=tolerance)
    terms = [prior for prior, _ in priors]
    x, auxiliary, duals = _started(physics, images, terms, start)
    rate = _measured_rate(terms, duals, x) or _expected_rate(physics, images, terms, weights, noise)  # 1 / tau
    bounds = sum(prior.bounds[0] for prior in terms)
    sigma, inverse = rate / bounds, _metric(physics, x, rate, noise)
    pulls = physics.A_adjoint(images) / noise
    changes: list[torch.Tensor] = []
    for done in range(1, iterations + 1):
        slope = physics.A_adjoint(physics.A(x)) / noise - pulls
        backs = [prior.adjoint(u) for prior, u in zip(terms, duals, strict=True)]
        for back, _ in backs:
            slope += back
        step = inverse(slope).neg_()  # x+ - x
        moved, reached = rate * _squares(step), rate * _squares(x)
        ahead = x.add(step, alpha=2)
        for i, (prior, weight) in enumerate(zip(terms, weights, strict=True)):
            w, back, w_ahead = auxiliary[i], backs[i][1], None
            if w is not None and back is not None:
                bound = sigma * prior.bounds[1]
                w_step = back / -bound
                w_ahead = w.add(w_step, alpha=2)
                moved, reached = moved + bound * _squares(w_step), reached + bound * _squares(w)
                w.add_(w_step, alpha=_RELAXATION)
            seen = prior.analyse(ahead, w_ahead)
            found = prior.dual_step(
                tuple(u.add(k, alpha=sigma) for u, k in zip(duals[i], seen, strict=True)), sigma, weight
            )
            for u, u_next in zip(duals[i], found, strict=True):
                reached = reached + _squares(u) / sigma
                u_step = u_next.sub_(u)
                moved = moved + _squares(u_step) / sigma
                u.add_(u_step, alpha=_RELAXATION)
        x.add_(step, alpha=_RELAXATION)
        changes.append((moved / reached.clamp_min(1e-30)).sqrt())
        if progress:
            progress(done, iterations)
        if not torch.isfinite(changes[-1]).all():
            raise ArithmeticError(
                f"primal_dual: the volume is not finite after {done} iterations; the images reach to "
                f"{float(images.abs().max()):.3g}. Bring them to a size near 1, or take float64."
            )
        if float(changes[-1].max()) <= tolerance:
            break
        if done == _SETTLED:
            measured = _measured_rate(terms, duals, x) or rate
            if not 1 / 1.5 < measured / rate < 1.5:
                rate = measured
                sigma, inverse = rate / bounds, _metric(physics, x, rate, noise)
    for prior in terms:
        if isinstance(prior, Constraint):
            x = prior.set.project(x)
    return Minimum(x, len(changes), torch.stack(changes), duals, auxiliary)


def roughly_damped(physics: TiltPhysics, images: torch.Tensor) -> torch.Tensor:
    """A rough volume: the approximate inverse of least squares damped by a tenth of |A|^2."""
    damping = 0.1 * float(physics.squared_norm())
    return physics.approximate_inverse(damping, images)(physics.A_adjoint(images))


def _measured_rate(terms: Sequence[Prior], duals: Sequence[Fields], x: torch.Tensor) -> float | None:
    """1 / tau from how far dual fields and volume are from zero, the mean over the items; None while they are there."""
    size = _squares(x)
    norms = [(p, u) for p, u in zip(terms, duals, strict=True) if not isinstance(p, Constraint)]
    reaches = [p.bounds[0] * torch.stack([_squares(f) for f in u]).sum(0) for p, u in norms]
    if not reaches:
        return None
    ratio = (torch.stack(reaches).amax(0) / size).sqrt()
    ratio = ratio[torch.isfinite(ratio) & (ratio > 0)]
    return _BALANCE * float(ratio.double().log().mean().exp()) if len(ratio) else None


def _expected_rate(
    physics: TiltPhysics, images: torch.Tensor, terms: Sequence[Prior], weights: Sequence[torch.Tensor], noise: float
) -> float:
    """The same before the first iteration: dual fields at the edge of their ball, and a rough volume.

    Of constraints alone, a tenth of what the data term's slope grows by.
    """
    voxels = math.prod(physics.volume_shape) * images.shape[1]
    size = (_squares(roughly_damped(physics, images)) / voxels).sqrt().cpu().double()
    reaches = [
        weight.flatten().cpu().double() * prior.bounds[0] ** 0.5
        for prior, weight in zip(terms, weights, strict=True)
        if not isinstance(prior, Constraint)
    ]
    if not reaches:
        return 0.1 * float(physics.squared_norm()) / noise
    if not (size > 0).any():
        return 1.0
    reach = torch.stack([r.expand(len(size)) for r in reaches]).amax(0)
    return 0.8 * _BALANCE * float((reach / size)[size > 0].log().mean().exp())


def _metric(
    physics: TiltPhysics, like: torch.Tensor, rate: float, noise: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """T of equation (3) as a function of volumes."""
    damping = rate * noise
    least = _LEAST_DAMPING[like.dtype] * float(physics.squared_norm())
    inverse = physics.approximate_inverse(max(damping, least), like)
    largest = _largest_eigenvalue(lambda x: physics.A_adjoint(physics.A(x)) + damping * x, inverse, like)
    scale = noise / max(_MARGIN * largest, 1.0) if largest > 1.001 else noise
    return lambda slope: inverse(slope).mul_(scale)


def _largest_eigenvalue(
    system: Callable[[torch.Tensor], torch.Tensor],
    inverse: Callable[[torch.Tensor], torch.Tensor],
    like: torch.Tensor,
    steps: int = 6,
) -> float:
    """Of inverse · system, both symmetric and positive: from below, by Lanczos steps.

    The steps are those of conjugate gradients preconditioned with the inverse (Golub & Van Loan 2013, section 11.3).
    One suffices where the inverse is exact.
    """
    random = torch.Generator().manual_seed(0)
    residual = torch.randn(like.shape, generator=random, dtype=like.dtype).to(like.device)
    direction = near = inverse(residual)
    product = float((residual * near).sum())
    lengths, ratios = [], []
    for _ in range(steps):
        image = system(direction)
        lengths.append(product / float((direction * image).sum()))
        residual = residual - lengths[-1] * image
        near = inverse(residual)
        before, product = product, float((residual * near).sum())
        ratios.append(product / before)
        if ratios[-1] < 1e-6:
            break
        direction = near + ratios[-1] * direction
    diagonal = [1 / a + (ratios[i - 1] / lengths[i - 1] if i else 0.0) for i, a in enumerate(lengths)]
    beside = torch.diag(torch.tensor([ratios[i] ** 0.5 / a for i, a in enumerate(lengths[:-1])]), 1)
    small = torch.diag(torch.tensor(diagonal)) + beside + beside.T
    return float(torch.linalg.eigvalsh(small)[-1])


def _started(
    physics: TiltPhysics, images: torch.Tensor, terms: Sequence[Prior], start: Minimum | None
) -> tuple[torch.Tensor, list[torch.Tensor | None], list[Fields]]:
    """Volume, auxiliary and dual fields to begin with, which may be written to."""
    if start is not None:
        auxiliary = [None if w is None else w.clone() for w in start.auxiliary]
        return start.volume.clone(), auxiliary, [tuple(u.clone() for u in fields) for fields in start.fields]
    x = images.new_zeros(*images.shape[:2], *physics.volume_shape)
    auxiliary = [prior.start(x) for prior in terms]
    return x, auxiliary, [prior.analyse(x.clone(), w) for prior, w in zip(terms, auxiliary, strict=True)]


def _squares(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each item (batch,) of fields (..., batch, channel, z, y, x)."""
    items = [torch.linalg.vector_norm(values.select(-5, i)) for i in range(values.shape[-5])]
    return torch.stack(items).square()


def _checked(
    physics: TiltPhysics, images: torch.Tensor, priors: Sequence[tuple[Prior, Weight]], **numbers: float
) -> list[torch.Tensor]:
    """Weights (1 or batch, 1, 1, 1, 1) of the priors."""
    physics.expect_images(images)
    expect_positive(**numbers)
    if not priors:
        raise ValueError("priors: expected one at least, got none; without a prior use least_squares.")
    if not torch.isfinite(images).all():
        raise ValueError("images: expected finite numbers; some are not. Correct or leave out the images they are in.")
    weights = [torch.as_tensor(weight, dtype=images.dtype, device=images.device).reshape(-1) for _, weight in priors]
    for weight in weights:
        if len(weight) not in (1, len(images)) or not (torch.isfinite(weight) & (weight > 0)).all():
            raise ValueError(
                f"weight: expected a positive number, or one for each of {len(images)} items, got {weight.tolist()}."
            )
    return [weight.view(-1, 1, 1, 1, 1) for weight in weights]


def expect_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {number}.")
