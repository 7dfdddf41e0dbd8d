"""Langevin dynamics: a random walk up the posterior's slope, to check the std of other methods by.

With the law pi(v) of a volume given its images, g = d log pi / dv, and any covariance M, the walk

    v' = v + h / 2 M g(v) + h^1/2 M^1/2 e,        e ~ N(0, 1),                                           (1)

has pi as its law in the limit h -> 0 ("ULA"). With finite h it has another one: of a Gaussian direction with the
precision p in units of M, the variance

    1 / p (1 - h p / 4),                                                                                 (2)

and it diverges for h p >= 4. Taking the step only with the probability min(1, a),

    log a = log pi(v') - log pi(v) - <v' - v, g + g'> / 2 - h (<g', M g'> - <g, M g>) / 8,                (3)

the law is pi for every h ("MALA": Roberts & Tweedie 1996, doi:10.2307/3318418; (3) is their ratio with the inverse of
M cancelled). That needs log p of the prior, where (1) makes do with its slope, the score. In n dimensions alike the
best h falls as n^-1/3, where 57.4 % of the steps are taken (Roberts & Rosenthal 1998, doi:10.1111/1467-9868.00123); h
is sought in the burn-in and fixed after it, since a walk that is adapted all along need not have pi as its law.

How long the walk takes is the ratio of the largest to the smallest p. M close to the posterior's own covariance makes
them all 1: `Damped` is that of white volumes, in closed form; the law of `inverse.solvers.variational` is that of
stationary ones. Whatever M is, (3) holds.

The errors of mean and std come from the walks themselves: `inverse.metrics.walks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from cryosim.core.record import Record, item
from inverse.metrics.walks import WalkMoments
from inverse.physics.base import TiltPhysics
from inverse.solvers.informed import checked
from inverse.solvers.split_gibbs import white
from inverse.solvers.variational import LogDensity
from inverse.solvers.whitened import damped

Score = Callable[[torch.Tensor], torch.Tensor]
"""d log p / dv of volumes (batch, 1, z, y, x)."""

_TARGET = 0.574
"""Share of steps taken that the burn-in aims at."""

_FIRST_STEP = 0.2
"""h of ULA: 2.5 % too much std where M is the posterior's covariance."""


class Preconditioner(Protocol):
    """A covariance M of volumes (batch, 1, z, y, x)."""

    def times(self, v: torch.Tensor, /) -> torch.Tensor:
        """M v."""
        ...

    def noise(self, like: torch.Tensor, generator: torch.Generator, /) -> torch.Tensor:
        """Independent draws of N(0, M) of the shape of `like`."""
        ...


class Damped(NamedTuple):
    """(A^T N^-1 A + 1 / spread^2)^-1: the posterior covariance of white volumes.

    A draw of it is the damped least squares of noise, in images and volume (perturbation and optimisation: Papandreou &
    Yuille 2010).

    Attributes
    ----------
    physics : TiltPhysics
    variance : tensor () or (tilt,)
        Of the noise of a pixel.
    spread : float
        Deviation of a voxel [unit of the volume].
    """

    physics: TiltPhysics
    variance: torch.Tensor
    spread: float

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """M v."""
        return self._least_squares(self.spread**2 * v, self._images(v))

    def noise(self, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draws of N(0, M)."""
        images = self.variance.sqrt().reshape(-1, 1, 1).to(like) * white(self._images(like), generator)
        return self._least_squares(self.spread * white(like, generator), images)

    def _images(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(len(like), 1, self.physics.angles.shape[-1], *self.physics.image_shape)

    def _least_squares(self, centre: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """All items as channels of one, which are solved together."""
        centre, images = centre.transpose(0, 1), images.transpose(0, 1)
        return damped(self.physics, centre, images, self.variance, self.spread**2).transpose(0, 1).contiguous()


class Langevin(Record):
    """What `langevin` returns; volumes (z, y, x) of one stack, or (batch, 1, z, y, x).

    Attributes
    ----------
    mean : tensor (z, y, x) or (batch, 1, z, y, x)
    std : tensor (z, y, x) or (batch, 1, z, y, x)
        [unit of the volume].
    mean_error, std_error : tensor (z, y, x) or (batch, 1, z, y, x)
        Their standard errors for the finite number of steps; NaN with fewer than two batches of them.
    ess : tensor (z, y, x) or (batch, 1, z, y, x)
        Effective number of independent samples, for the mean [1].
    rhat : tensor (z, y, x) or (batch, 1, z, y, x)
        [1]; above 1.1 or so the walks have not met.
    acceptance : tensor (walk,) or (walk, batch)
        Share of the steps taken after the burn-in; 1 without a choice.
    step_size : float
        h.
    """

    mean: torch.Tensor = item(3)
    std: torch.Tensor = item(3)
    mean_error: torch.Tensor = item(3)
    std_error: torch.Tensor = item(3)
    ess: torch.Tensor = item(3)
    rhat: torch.Tensor = item(3)
    acceptance: torch.Tensor
    step_size: float


@torch.no_grad()
def langevin(
    physics: TiltPhysics,
    images: torch.Tensor,
    score: Score | None,
    noise: float | torch.Tensor,
    *,
    log_density: LogDensity | None = None,
    adjust: bool = True,
    steps: int = 2000,
    burn_in: int | None = None,
    step_size: float | None = None,
    walks: int = 4,
    precondition: Preconditioner | None = None,
    start: torch.Tensor | None = None,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> Langevin:
    """Mean and standard deviation of the posterior by Langevin walks.

    Parameters
    ----------
    physics : TiltProjection, ContrastProjection or DeformedProjection
        Of one operator for all items.
    images : tensor (tilt, y, x) or (batch, 1, tilt, y, x)
    score : callable or None
        d log p / dv of the prior, of volumes (batch, 1, z, y, x), as `score_of` makes it of a denoiser; the derivative
        of `log_density` when None.
    noise : float or tensor (tilt,)
        Variance of a pixel.
    log_density : callable, optional
        log p (batch,) of such volumes, up to a constant.
    adjust : bool
        MALA, which needs the log density; else ULA, whose std is too large by (2).
    steps, burn_in : int
        After the burn-in, and in it; a quarter as many when left out.
    step_size : float, optional
        h, in units of M: the first one of MALA, and that of ULA, 0.2 when left out.
    walks : int
        Run side by side, from draws of M of four times its variance about the start.
    precondition : Preconditioner, optional
        M: `Damped`, or the law of `variational`. `Damped` with the mean precision of the prior at the start when left
        out.
    start : tensor (z, y, x) or (batch, 1, z, y, x), optional
        Damped least squares when left out.
    generator : torch.Generator
        Of the images' device.
    progress : callable (done, all), optional
        Called after each step.

    Raises
    ------
    ValueError
        For images, noise or a start that do not fit, an operator that is not one linear operator for all items, counts
        below 1, a step size that is not positive, no prior, MALA without a log density, or a walk that diverges.
    """
    batch, variance, flat = checked("langevin", physics, images, noise)
    burn_in = max(1, steps // 4) if burn_in is None else burn_in
    for name, value in (("steps", steps), ("walks", walks), ("burn_in", burn_in)):
        if value < 1:
            raise ValueError(f"langevin: expected {name} of 1 or more, got {value}.")
    if step_size is not None and not 0 < step_size < float("inf"):
        raise ValueError(f"langevin: expected a positive, finite step_size, got {step_size}.")
    if log_density is None and (adjust or score is None):
        raise ValueError("langevin: expected a log_density. With adjust=False a score will do.")
    slope = _slope_of(log_density) if score is None and log_density is not None else score
    assert slope is not None
    if isinstance(variance, torch.Tensor) and variance.ndim == 1 and bool((variance == variance[0]).all()):
        variance = variance[0]
    target = _Target(physics, batch.repeat(walks, 1, 1, 1, 1), variance, slope, log_density if adjust else None)
    centre = _centre(target, batch, start, flat)
    covariance = precondition or Damped(physics, variance, _spread(target, centre, generator))
    v = centre.repeat(walks, 1, 1, 1, 1)
    v = v + 2 * covariance.noise(v, generator)
    size = step_size or (_FIRST_STEP if not adjust else 1.65**2 * v[0].numel() ** (-1 / 3))
    late = 0.0  # sum of log h over the second half of the burn-in, whose mean is kept
    state, record = _state(target, covariance, v), WalkMoments.empty(v, centre.repeat(walks, 1, 1, 1, 1), steps)
    taken = torch.zeros(len(v), dtype=torch.float64, device=v.device)
    for step in range(burn_in + steps):
        state, accepted, likely = _walked(target, covariance, state, size, generator)
        if not bool(torch.isfinite(state.value).all()):
            raise ValueError(
                f"langevin: the walk diverged at step {step} with a step size of {size:g}. Take a smaller one, or a "
                "preconditioner closer to the posterior's covariance."
            )
        if step < burn_in:
            if adjust:
                size *= float(torch.exp((likely.mean() - _TARGET) / (1 + step) ** 0.5))
                late += math.log(size) * (2 * step >= burn_in)
            if adjust and step + 1 == burn_in:
                size = math.exp(late / (burn_in - (burn_in + 1) // 2)) if burn_in > 1 else size
        else:
            taken += accepted
            record.add(state.v, step - burn_in)
        if progress:
            progress(step + 1, burn_in + steps)
    found = record.summary(walks)
    found = [volume[0, 0] if flat else volume for volume in found]
    share = (taken / steps).unflatten(0, (walks, -1))
    return Langevin(*found, acceptance=share[:, 0] if flat else share, step_size=size)


def score_of(denoiser: Callable[[torch.Tensor, float], torch.Tensor], sigma: float) -> Score:
    """(D(v, sigma) - v) / sigma^2: the score of volumes with noise of deviation sigma (Efron 2011, after Tweedie)."""
    return lambda v: (denoiser(v, sigma) - v) / sigma**2


class _Target(NamedTuple):
    """pi: `density` is None where only its slope is known."""

    physics: TiltPhysics
    images: torch.Tensor
    noise: torch.Tensor
    score: Score
    density: LogDensity | None

    def value_and_slope(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi (batch,), float64, that of the likelihood alone without a density; and g."""
        rest = self.images - self.physics.A(v)
        weighted = rest / self.noise.reshape(-1, 1, 1).to(rest)
        value = -0.5 * (rest.double() * weighted.double()).flatten(1).sum(1)
        slope = self.physics.A_adjoint(weighted) + self.score(v).detach()
        return value if self.density is None else value + self.density(v).detach().double(), slope


class _State(NamedTuple):
    v: torch.Tensor
    value: torch.Tensor
    slope: torch.Tensor
    drift: torch.Tensor
    """M g."""
    steepness: torch.Tensor
    """<g, M g> (batch,)."""


def _state(target: _Target, covariance: Preconditioner, v: torch.Tensor) -> _State:
    value, slope = target.value_and_slope(v)
    drift = covariance.times(slope)
    return _State(v, value, slope, drift, _product(slope, drift))


def _walked(
    target: _Target, covariance: Preconditioner, now: _State, h: float, generator: torch.Generator
) -> tuple[_State, torch.Tensor, torch.Tensor]:
    """The next state, which walks took the step, and with what probability."""
    change = h / 2 * now.drift + h**0.5 * covariance.noise(now.v, generator)
    new = _state(target, covariance, now.v + change)
    if target.density is None:
        certain = torch.ones_like(now.value)
        return new, certain, certain
    log_ratio = new.value - now.value - _product(change, now.slope + new.slope) / 2
    log_ratio = log_ratio - h / 8 * (new.steepness - now.steepness)  # equation (3)
    likely = torch.nan_to_num(log_ratio.clamp_max(0).exp(), nan=0.0)
    uniform = torch.rand(likely.shape, generator=generator, dtype=likely.dtype, device=likely.device)
    accepted = uniform < likely

    def chosen(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(accepted.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return _State(*(chosen(a, b) for a, b in zip(new, now, strict=True))), accepted.double(), likely


def _slope_of(density: LogDensity) -> Score:
    def score(v: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            v = v.detach().requires_grad_(True)
            return torch.autograd.grad(density(v).sum(), v)[0]

    return score


def _centre(target: _Target, images: torch.Tensor, start: torch.Tensor | None, flat: bool) -> torch.Tensor:
    """Where the walks begin about (batch, 1, z, y, x)."""
    shape = (len(images), 1, *target.physics.volume_shape)
    if start is None:
        return target.physics.prox_l2(None, images, 100 / float(target.physics.squared_norm()))
    if tuple(start.shape) != (shape[2:] if flat else shape):
        raise ValueError(f"langevin: expected a start {shape[2:] if flat else shape}, got {tuple(start.shape)}.")
    return start.to(images).reshape(shape)


def _spread(target: _Target, centre: torch.Tensor, generator: torch.Generator) -> float:
    """1 / precision^1/2 of the prior at the start, the mean over directions, from the change of the score along one."""
    step = 0.01 * float(centre.std()) or 1.0
    apart = white(centre, generator)
    change = target.score(centre + step * apart) - target.score(centre - step * apart)
    precision = -float(_product(apart, change).sum()) / (2 * step * centre.numel())
    if not 0 < precision < float("inf"):
        raise ValueError(f"langevin: the prior's precision at the start is {precision:g}; give a preconditioner.")
    return precision**-0.5


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)
