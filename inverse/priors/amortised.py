"""A network that tells the posterior of a volume from its images at once: one fit for all images and all noise.

Along the directions that images tell of (`inverse.solvers.informed`), with information lambda at unit noise, images of
noise n say of the white coordinates u

    o_i = s_i^1/2 u_i + e_i,        s = lambda / n,        e ~ N(0, 1),                                  (1)

and of all others nothing. The prior is u = c u', u' ~ N(0, 1) in all n_u coordinates, with a contrast c of the volume
that is not known: log c ~ N(0, kappa^2). For a given c the posterior is independent in each direction, of mean and
variance

    p o_i / s_i^1/2,        p / s_i,        p = s_i c^2 / (1 + s_i c^2) = sigmoid(log s_i + 2 log c),    (2)

and c is to be seen from how strong o is where s is large. The network is given log s_i, and how much power o has in
bands of s over what is expected at c = 1, and returns the logits of p for the mean and for the variance: for kappa = 0
the posterior is in its family, and for kappa > 0 all but the correlations that an uncertain c brings.

It is taught by the bound E_q[log p(o | u) + log p(u)] + entropy of q, the divergence of q from the posterior but for a
constant (amortised inference: Kingma & Welling 2014, arXiv:1312.6114); no posterior need be known for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

_BANDS = (-4.0, 12.0, 9)
"""Centres of the bands of log s: first, last and number."""

_NOTHING = -8.0
"""log s that stands for a direction the images tell nothing of."""


class Coordinates(NamedTuple):
    """A Gaussian law of white coordinates, independent in each direction.

    Attributes
    ----------
    mean : tensor (batch, direction)
    log_variance : tensor (batch, direction)
    rest : tensor (batch,)
        Logarithm of the variance of all other coordinates, of zero mean.
    """

    mean: torch.Tensor
    log_variance: torch.Tensor
    rest: torch.Tensor


class AmortisedGaussian(nn.Module):
    """Observations (batch, direction) and their information to a Gaussian law of the white coordinates.

    Parameters
    ----------
    contrast : float
        kappa, the deviation of the logarithm of the volumes' contrast [1].
    width : int
        Of its two hidden layers.
    """

    def __init__(self, contrast: float = 0.0, width: int = 48) -> None:
        super().__init__()
        if not 0 <= contrast < 2 or width < 1:
            raise ValueError(
                f"AmortisedGaussian: expected a contrast from 0 to 2 and a width of 1 or more, got {contrast}, {width}."
            )
        self.contrast, self.width = float(contrast), int(width)
        features = 1 + _BANDS[2]
        self.straight = nn.Linear(features, 2)
        self.bent = nn.Sequential(
            nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    @property
    def arguments(self) -> dict[str, float | int]:
        """Of the constructor, for `inverse.weights`."""
        return {"contrast": self.contrast, "width": self.width}

    def forward(self, observed: torch.Tensor, information: torch.Tensor) -> Coordinates:
        """The law given o and s > 0, both (batch, direction).

        Raises
        ------
        ValueError
            For shapes that do not fit, or information that is not positive.
        """
        if observed.ndim != 2 or observed.shape != information.shape or not bool((information > 0).all()):
            raise ValueError(
                f"AmortisedGaussian: expected observations (batch, direction) and positive information of that shape, "
                f"got {tuple(observed.shape)} and {tuple(information.shape)} from {float(information.min()):g}."
            )
        logs = information.log()
        context = _context(observed, information)
        at = torch.cat([logs, logs.new_full((len(logs), 1), _NOTHING)], 1).clamp_min(_NOTHING)
        features = torch.cat([at[..., None] / 4, context[:, None].expand(-1, at.shape[1], -1)], 2)
        kept, spread = (4 * self.straight(features) + self.bent(features)).unbind(2)
        mean = torch.sigmoid(kept[:, :-1]) * observed * information.rsqrt()
        log_variance = functional.logsigmoid(spread) - at
        return Coordinates(mean, log_variance[:, :-1], log_variance[:, -1])


def evidence_bound(
    law: Coordinates,
    observed: torch.Tensor,
    information: torch.Tensor,
    n: int,
    contrast: float,
    generator: torch.Generator,
    draws: int = 1,
) -> torch.Tensor:
    """E_q[log p(o | u) + log p(u)] + entropy of q (batch,), at most log p(o).

    Parameters
    ----------
    law : Coordinates
    observed, information : tensor (batch, direction)
        o and s of equation (1).
    n : int
        Number of white coordinates, those along the directions included.
    contrast : float
        kappa.
    generator : torch.Generator
    draws : int
        Of u, for the prior's term; not used for kappa = 0, where it has a closed form.
    """
    variance, others = law.log_variance.exp(), n - observed.shape[1]
    misfit = (observed - information.sqrt() * law.mean) ** 2 + information * variance
    likelihood = -0.5 * (misfit + math.log(2 * math.pi)).sum(1)
    entropy = 0.5 * (law.log_variance.sum(1) + others * law.rest + n * (1 + math.log(2 * math.pi)))
    if contrast == 0:
        square = (law.mean**2 + variance).sum(1) + others * law.rest.exp()
        return likelihood + entropy - 0.5 * (square + n * math.log(2 * math.pi))
    total = torch.zeros_like(likelihood)
    for _ in range(draws):
        noise = torch.randn(len(observed), n, generator=generator, dtype=observed.dtype, device=observed.device)
        u = law.mean + variance.sqrt() * noise[:, others:]
        square = (u**2).sum(1) + law.rest.exp() * (noise[:, :others] ** 2).sum(1)
        total = total + log_prior(square, n, contrast)
    return likelihood + entropy + total / draws


def log_prior(square: torch.Tensor, n: int, contrast: float) -> torch.Tensor:
    """log p(u) (batch,) of n coordinates of the sum of squares `square` (batch,)."""
    logs, weights = contrasts(n, contrast, square)
    each = weights.log() - n * (logs + 0.5 * math.log(2 * math.pi)) - 0.5 * square[:, None] * (-2 * logs).exp()
    return torch.logsumexp(each, 1)


def contrasts(n: int, contrast: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log c (node,) and weights for integrals over it, close enough for what n coordinates tell of c."""
    if contrast == 0:
        return like.new_zeros(1), like.new_ones(1)
    nodes = 2 * math.ceil(5 * contrast * (2 * n) ** 0.5) + 33
    x = torch.linspace(-5, 5, nodes, dtype=like.dtype, device=like.device)
    weights = torch.exp(-0.5 * x**2)
    return contrast * x, weights / weights.sum()


def _context(observed: torch.Tensor, information: torch.Tensor) -> torch.Tensor:
    """Power of o over what is expected of it, (batch, band), as logarithms; 0 where a band is empty."""
    first, last, number = _BANDS
    centres = torch.linspace(first, last, number, dtype=observed.dtype, device=observed.device)
    away = (information.log()[..., None].clamp(first, last) - centres) * (number - 1) / (last - first)
    share = (1 - away.abs()).clamp_min(0)  # (batch, direction, band)
    found = (share * (observed**2)[..., None]).sum(1)
    expected = (share * (1 + information)[..., None]).sum(1)
    return ((found + 1) / (expected + 1)).log()
