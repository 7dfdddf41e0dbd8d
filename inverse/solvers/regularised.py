"""Least squares with total variation, its generalisation or wavelets, and the weight that the noise asks for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from inverse.physics.base import TiltPhysics
from inverse.priors.classic import (
    FILTERS,
    Constraint,
    Fields,
    GeneralizedVariation,
    Positivity,
    Prior,
    Support,
    TotalVariation,
    Wavelets,
)
from inverse.solvers.linear import as_batch
from inverse.solvers.primal_dual import Minimum, Progress, Weight, expect_positive, primal_dual, roughly_damped

_ROUGH_ITERATIONS = 30
"""While the weight is still far from where the noise is met: enough to tell on which side it is."""


def tv(
    physics: TiltPhysics,
    images: torch.Tensor,
    weight: Weight | None = None,
    *,
    noise: float | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    isotropic: bool = True,
    positivity: bool = False,
    support: torch.Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-3,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Least squares with total variation: the minimiser of |A x - images|^2 / (2 noise) + weight · TV(x).

    Parameters
    ----------
    physics : TiltProjection, ContrastProjection or another TiltPhysics
    images : tensor (tilt, y, x) or (batch, channel, tilt, y, x)
    weight : float or tensor (batch,), optional
        [1 / unit of the volume]; when left out, so large that the images are met as closely as their noise allows
        (Morozov's discrepancy principle), by a few solutions one after another.
    noise : float, optional
        Variance of a pixel; 1 when left out, but the weight must then be given.
    weights, isotropic
        As in `inverse.priors.classic.TotalVariation`.
    positivity : bool
        No voxel below 0.
    support : tensor (z, y, x), optional
        True or 1 where the volume may be other than 0.
    iterations, tolerance, progress
        As in `primal_dual`.

    Returns
    -------
    tensor (z, y, x) or (batch, channel, z, y, x)
        Without gradients.

    Raises
    ------
    ValueError
        For neither weight nor noise, numbers that are not positive, or shapes that do not fit.
    """
    if len(weights) != 3 or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(f"weights: expected three numbers of 0 or more, not all 0, for z, y, x, got {weights}.")
    prior = TotalVariation(weights, isotropic)
    return _regularised(physics, images, prior, weight, noise, positivity, support, iterations, tolerance, progress)


def tgv(
    physics: TiltPhysics,
    images: torch.Tensor,
    weight: Weight | None = None,
    *,
    noise: float | None = None,
    ratio: float = 2.0,
    positivity: bool = False,
    support: torch.Tensor | None = None,
    iterations: int = 150,
    tolerance: float = 1e-3,
    progress: Progress | None = None,
) -> torch.Tensor:
    """As `tv`, with total generalised variation of second order: smooth densities stay smooth, edges sharp.

    `ratio` as in `inverse.priors.classic.GeneralizedVariation`; all else as in `tv`.
    """
    expect_positive(ratio=ratio)
    prior = GeneralizedVariation(ratio)
    return _regularised(physics, images, prior, weight, noise, positivity, support, iterations, tolerance, progress)


def wavelets(
    physics: TiltPhysics,
    images: torch.Tensor,
    weight: Weight | None = None,
    *,
    noise: float | None = None,
    wavelet: str = "haar",
    levels: int = 3,
    positivity: bool = False,
    support: torch.Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-3,
    progress: Progress | None = None,
) -> torch.Tensor:
    """As `tv`, with few details of undecimated wavelets.

    `wavelet` and `levels` as in `inverse.priors.classic.Wavelets`; ValueError for an unknown one or none.
    """
    if wavelet not in FILTERS or levels < 1 or 2**levels > 2 * max(physics.volume_shape):
        raise ValueError(
            f"wavelet, levels: expected one of {', '.join(FILTERS)} and 1 level or more, of details no longer than the "
            f"volume {physics.volume_shape}, got {wavelet!r} and {levels}."
        )
    prior = Wavelets(wavelet, levels)
    return _regularised(physics, images, prior, weight, noise, positivity, support, iterations, tolerance, progress)


def _regularised(
    physics: TiltPhysics,
    images: torch.Tensor,
    prior: Prior,
    weight: Weight | None,
    noise: float | None,
    positivity: bool,
    support: torch.Tensor | None,
    iterations: int,
    tolerance: float,
    progress: Progress | None,
) -> torch.Tensor:
    batch, flat = as_batch(physics, images)
    if weight is None and noise is None:
        raise ValueError("weight, noise: expected one of them at least. Give the variance of a pixel, or the weight.")
    rest: list[tuple[Prior, Weight]] = [(Constraint(Positivity()), 1.0)] if positivity else []
    if support is not None:
        if support.shape != physics.volume_shape or not ((support == 0) | (support == 1)).all():
            raise ValueError(
                f"support: expected a mask {physics.volume_shape} of zeros and ones, got {tuple(support.shape)} of "
                f"{support.dtype}."
            )
        rest.append((Constraint(Support(support)), 1.0))
    how = {"iterations": iterations, "tolerance": tolerance, "progress": progress}
    if weight is None:
        assert noise is not None
        _, found = matching_weight(physics, batch, prior, noise, constraints=rest, **how)
    else:
        given = 1.0 if noise is None else noise
        found = primal_dual(physics, batch, [(prior, weight), *rest], noise=given, **how)
    return found.volume[0, 0] if flat else found.volume


@torch.no_grad()
def matching_weight(
    physics: TiltPhysics,
    images: torch.Tensor,
    prior: Prior,
    noise: float,
    *,
    constraints: Sequence[tuple[Prior, Weight]] = (),
    iterations: int = 100,
    tolerance: float = 1e-3,
    attempts: int = 10,
    progress: Progress | None = None,
) -> tuple[torch.Tensor, Minimum]:
    """The weight of a prior at which the volume's images differ from `images` by as much as their noise.

    The mean square of A x - images rises with the weight; where it equals `noise` is found by bisection of log weight
    with secants, each solution begun where the last one ended (Morozov 1966).

    Returns
    -------
    weight : tensor (batch,)
    minimum : Minimum
        At the last weight tried.

    Warns
    -----
    UserWarning
        When the noise is more than all there is in the images, or less than any volume leaves.
    """
    expect_positive(noise=noise, attempts=attempts)
    total = images.double().square().mean((1, 2, 3, 4)).cpu()
    if (total <= noise).any():
        warnings.warn(
            f"noise: expected less than the mean square of the images, {float(total.min()):.3g}, got {noise:.3g}: "
            "there is nothing but noise in them, and the volume is all but empty. Check its unit.",
            UserWarning,
            stacklevel=3,
        )
    allowed = (0.02 * (total - noise)).clamp(0.001 * noise, 0.01 * noise)
    weight = _first_weight(physics, images, prior)
    points: list[list[tuple[float, float]]] = [[] for _ in images]  # (log weight, log of mean square over noise)
    found, left, met = None, total, total <= noise
    most = min(iterations, _ROUGH_ITERATIONS)
    for attempt in range(attempts):
        found = primal_dual(
            physics,
            images,
            [(prior, weight), *constraints],
            noise=noise,
            iterations=most,
            tolerance=tolerance,
            start=found,
            progress=_later(progress, attempt, attempts),
        )
        left = (physics.A(found.volume) - images).double().square().mean((1, 2, 3, 4)).cpu()
        rough = found.iterations == most < iterations
        met = (left - noise).abs() <= (2 if rough else 1) * allowed
        if (met.all() and not rough) or attempt == attempts - 1:
            break
        if met.all() or attempt >= attempts // 2:
            most = iterations
        following = weight.clone()
        for i in range(len(images)):
            if not met[i]:
                points[i].append((math.log(float(weight[i])), math.log(max(float(left[i]), 1e-30) / noise)))
                following[i] = math.exp(_next(points[i]))
        _stretch(found.fields[0], following / weight)
        weight = following
    assert found is not None
    if not (met | (total <= noise)).all():
        warnings.warn(
            f"noise: no volume was found that differs from the images by {noise:.3g} in the mean square; the last one "
            f"does by {float(left[~met][0]):.3g}. Check the noise, allow more iterations, or give a weight.",
            UserWarning,
            stacklevel=3,
        )
    return weight, found


def _later(progress: Progress | None, attempt: int, attempts: int) -> Progress | None:
    """Progress of one of several solutions, as that of all."""
    return progress and (lambda done, most: progress(attempt * most + done, attempts * most))


def _next(points: list[tuple[float, float]]) -> float:
    """Log weight to try: between the closest below and above, or a factor of 3 beyond where one side is missing."""
    below = max((p for p in points if p[1] < 0), default=None)
    above = min((p for p in points if p[1] >= 0), default=None)
    if below is None or above is None:
        only = below or above
        assert only is not None
        return only[0] + math.copysign(math.log(3.0), -only[1])
    share = -below[1] / max(above[1] - below[1], 1e-12)
    return below[0] + min(max(share, 0.15), 0.85) * (above[0] - below[0])


def _stretch(fields: Fields, factor: torch.Tensor) -> None:
    """Dual fields for another weight: what was at the edge of the dual norm's ball stays there."""
    for u in fields:
        u.mul_(factor.to(u).view(-1, 1, 1, 1, 1))


def _first_weight(physics: TiltPhysics, images: torch.Tensor, prior: Prior) -> torch.Tensor:
    """That of the most probable Laplacian, 1 / mean size of what the prior sees, of damped least squares; half of it.

    Measured on blobs of 20 to -10 dB: 0.6 to 2 times what the noise asks for.
    """
    x = roughly_damped(physics, images)
    seen = prior.value(prior.analyse(x, prior.start(x))).double().cpu()
    return torch.where(seen > 0, 0.5 * x[0].numel() / seen.clamp_min(1e-30), torch.ones_like(seen))
