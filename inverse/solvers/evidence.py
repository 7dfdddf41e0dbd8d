"""The variational bound of the evidence of images, for a Gaussian law of the volume."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from inverse.solvers.gaussian_law import LowRankGaussian
from inverse.solvers.informed import Sight

LogDensity = Callable[[torch.Tensor], torch.Tensor]
"""log p (batch,) of volumes (batch, 1, z, y, x), up to a constant; twice differentiable."""


def elbo(
    sight: Sight,
    images: torch.Tensor,
    law: LowRankGaussian,
    tau: torch.Tensor,
    draws: int,
    generator: torch.Generator,
    density: LogDensity | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1) and its standard error, both (batch,); without a density for the prior of `sight`.

    Of a draw u of N(0, Q^-1), <u, (H + tau - Q) u> goes into the trace of H Q^-1, and what log p at m + u and m - u
    differs by from the site's -<u, tau u> / 2 into the prior's term. The rest of both is known, and for a Gaussian
    prior and all directions there is nothing else.
    """
    values = []
    for _ in range(draws):
        apart = law.drawn(generator, law.mean)
        seen = sight.forward(apart).double().square().flatten(1).sum(1)
        site = (tau * apart.square()).double().flatten(1).sum(1)
        value = -0.5 * (seen + site - law.precision_form(apart))
        if density is not None:
            both = [density(law.prior.volume(law.mean + sign * apart)).double() for sign in (1, -1)]
            value = value + (both[0] + both[1] + site) / 2
        values.append(value)
    found, within = torch.stack(values), law.variances.double()
    trace = (tau * within).flatten(1).sum(1)
    if density is None:  # log p(u) under q, and the entropy, without what they share
        square = law.mean.double().square().flatten(1).sum(1) + within.flatten(1).sum(1)
        rest = -0.5 * (square - law.mean[0].numel() - law.log_determinant)
    else:
        rest = _entropy(law) - 0.5 * trace
    likelihood = _log_likelihood(sight, images, law) - 0.5 * (law.mean[0].numel() - trace)
    return likelihood + found.mean(0) + rest, found.std(0) / draws**0.5


def _log_likelihood(sight: Sight, images: torch.Tensor, law: LowRankGaussian) -> torch.Tensor:
    """log p(y | m) (batch,), float64."""
    rest = (sight.whitened(images) - sight.forward(law.mean)).double().square().flatten(1).sum(1)
    pixels = images[0, 0, 0].numel()
    logs = torch.log(2 * math.pi * sight.noise).expand(images.shape[2]).sum()
    return -0.5 * (rest + pixels * logs)


def _entropy(law: LowRankGaussian) -> torch.Tensor:
    """Of q in the volume (batch,), which has as many voxels as coordinates."""
    n = law.prior.spectrum.numel()
    size = law.prior.spectrum.double().log().sum()
    return 0.5 * (law.log_determinant + size + n * (1 + math.log(2 * math.pi)))
