"""Plug and play: deepinv's splitting methods, with a denoiser for the prior and exact steps on the data.

A denoiser D(x, s) answers white noise of deviation s; a method that splits the data from the prior puts to it what the
data leave open. With f(x) = |A x - y|^2 / (2 n), n the variance of a pixel, and l the `strength`, one iteration is

    hqs    x <- D(prox_(g f)(x), s),                 g = s^2 / l                                               (1)
    admm   u = prox_(g f)(x - z),  x <- D(u + z, s),  z <- z + u - x                                           (2)
    pgd    x <- D(x - g grad f(x), s),               g = n / |A|^2,  s^2 = l g                                 (3)
    red    x <- x - h (grad f(x) + l (x - D(x, s)) / s^2),   h = 1 / (|A|^2 / n + l / s^2)                     (4)

and prox_(g f) is damped least squares, of damping n / g = l n / s^2, by the operator's own `prox_l2`.

What they come to is plain for the denoiser of Gaussian volumes of covariance C, which is the proximal operator of
s^2 v^T C^-1 v / 2: (2) and (3) end at the most probable volume, the minimiser of f(x) + l x^T C^-1 x / 2; (1) at that
of g f(u) + |u - x|^2 / 2 + s^2 x^T C^-1 x / 2 over both, which tends there as s falls; (4) at that for volumes with the
noise s still in them, C + s^2. Therefore s falls from iteration to iteration, by equal factors, from the error of a
first volume to what a step on the data cannot tell from noise (Zhang et al. 2021, doi:10.1109/TPAMI.2021.3088914).
Other denoisers have no such objective, and need not converge; so the change of each iteration is recorded.
(1) to (4): Geman & Yang 1995, doi:10.1109/83.392335; Venkatakrishnan, Bouman & Wohlberg 2013,
doi:10.1109/GlobalSIP.2013.6737048; Kamilov, Mansour & Wohlberg 2017, doi:10.1109/LSP.2017.2763583; Romano, Elad &
Milanfar 2017, doi:10.1137/16M1102884, with the weight of Reehorst & Schniter 2019, doi:10.1109/TCI.2018.2880326.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from deepinv.models.base import Denoiser
from deepinv.optim import L2, RED, PnP
from deepinv.optim.optim_iterators import ADMMIteration, GDIteration, HQSIteration, OptimIterator, PGDIteration

from inverse.physics.base import TiltPhysics
from inverse.priors.wrappers import known_levels
from inverse.solvers.linear import as_batch
from inverse.solvers.primal_dual import Progress, expect_positive
from inverse.solvers.whitened import Whitened

Method = Literal["hqs", "admm", "pgd", "red"]
_ITERATORS: dict[str, type[OptimIterator]] = {
    "hqs": HQSIteration,
    "admm": ADMMIteration,
    "pgd": PGDIteration,
    "red": GDIteration,
}
_ITERATIONS = {"hqs": 20, "admm": 30, "pgd": 100, "red": 100}
_LEAST_FALL = 4.0
"""Of the level, from the first to the last."""
_SMALL_CHANGE = 0.05
"""Of a volume in an iteration, which falling levels bring about, and denoisers that draw at random."""


class PlugAndPlay(NamedTuple):
    """What `plug_and_play` returns.

    Attributes
    ----------
    volume : tensor (z, y, x) or (batch, 1, z, y, x)
        What the denoiser left last; of `red`, after the last step.
    residuals : tensor (iteration, batch)
        |x+ - x| / |x+| of each iteration [1].
    misfits : tensor (iteration, batch)
        Mean of (A x - images)^2 / noise over the pixels after each iteration [1]; 1 of the true volume.
    levels : tensor (iteration,)
        s, that the denoiser was told [unit of the volume].
    """

    volume: torch.Tensor
    residuals: torch.Tensor
    misfits: torch.Tensor
    levels: torch.Tensor


@torch.no_grad()
def plug_and_play(
    physics: TiltPhysics,
    images: torch.Tensor,
    denoiser: Denoiser,
    noise: float | torch.Tensor,
    *,
    method: Method = "hqs",
    iterations: int | None = None,
    strength: float = 1.0,
    noise_levels: float | tuple[float, float] | None = None,
    stop: Literal["iterations", "discrepancy"] = "iterations",
    init: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> PlugAndPlay:
    """Reconstruction with a denoiser for what is known of volumes.

    Parameters
    ----------
    physics : TiltProjection, ContrastProjection or another TiltPhysics
        As it is: nothing has to be normalised.
    images : tensor (tilt, y, x) or (batch, 1, tilt, y, x)
    denoiser : Denoiser
        D(x, sigma) in the unit of the volume; its `noise_levels`, if it has them, are kept to. Its weights must be of
        the type of the images. For one that expects values from 0 to 1, see `inverse.priors.wrappers.Affine`.
    noise : float or tensor (tilt,)
        Variance of a pixel [unit of the images, squared].
    method : {"hqs", "admm", "pgd", "red"}
        See the top of this file. "hqs" takes the fewest iterations; "admm" comes closer to the most probable volume;
        "pgd" and "red" need no least squares, but hundreds of iterations where tilts see little. "pgd" asks for a low
        level, next to |A|^-1 of the images' noise.
    iterations : int, optional
        At most; 20 of "hqs", 30 of "admm", and 100 of the others.
    strength : float
        l, of the prior [1]: 1 weighs data and prior as their noise has it; 2 trusts the data as if their noise had
        twice the variance. Trained denoisers smooth too much at 1: with the packaged one, 0.25 came nearest to unseen
        molecules at 10, 0 and -10 dB, and `reconstruct` takes that.
    noise_levels : float or (float, float), optional
        Of the denoiser, the same in each iteration, or the first and the last [unit of the volume]. When left out, from
        the noise and the operator. For "pgd", whose step is fixed, l = s^2 |A|^2 / noise follows from the level, and
        `strength` has to stay 1.
    stop : {"iterations", "discrepancy"}
        "discrepancy": an item of the batch is taken as it is in the first iteration that brings its misfit to 1 or
        below (Morozov 1966), and the iterations end with the last of them.
    init : tensor (z, y, x) or (batch, 1, z, y, x), optional
        Damped least squares when left out.
    progress : callable, optional
        Called with (iterations done, at most).

    Raises
    ------
    ValueError
        For images, an init or a noise that do not fit, numbers that are not positive, or an unknown choice.
    ArithmeticError
        Where the volume is not finite any more.

    Warns
    -----
    UserWarning
        When the changes do not lessen from iteration to iteration; when the level that "pgd" asks for is not one of the
        denoiser's; or when no iteration meets the discrepancy.
    """
    if method not in _ITERATORS or stop not in ("iterations", "discrepancy"):
        raise ValueError(
            f'method, stop: expected one of {", ".join(_ITERATORS)}, and "iterations" or "discrepancy", got {method!r} '
            f"and {stop!r}."
        )
    batch, flat = as_batch(physics, images)
    most = _ITERATIONS[method] if iterations is None else iterations
    expect_positive(iterations=most, strength=strength)
    if method == "pgd" and noise_levels is not None and strength != 1.0:
        raise ValueError("strength: expected 1 with noise_levels, which set the strength of pgd. Give one of them.")
    _expect_type(denoiser, batch)
    seen = Whitened(physics, noise, batch)
    y = seen.whiten(batch)
    first = Start(seen, y)
    x = first.volume() if init is None else _checked_init(init, batch, physics)
    levels = levels_of(method, noise_levels, denoiser, strength, first, seen, most)
    iterate, fidelity = _ITERATORS[method](has_cost=False), L2()
    prior = RED(denoiser) if method == "red" else PnP(denoiser)
    state = {"est": (x, torch.zeros_like(x))}
    kept, met = x, torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    residuals: list[torch.Tensor] = []
    misfits: list[torch.Tensor] = []
    for done, level in enumerate(levels, 1):
        if method == "admm" and done > 1:  # z stands for s^2 times a slope of the prior
            state = {"est": (x, state["est"][1] * (level / levels[done - 2]) ** 2)}
        parameters = _parameters(method, level, strength, seen)
        state = iterate(state, fidelity, prior, parameters, y, seen)
        before, x = x, state["est"][0]
        residuals.append(_lengths(x - before) / _lengths(x).clamp_min(torch.finfo(x.dtype).tiny))
        misfits.append((seen.A(x) - y).square().mean((1, 2, 3, 4)))
        if not (torch.isfinite(residuals[-1]) & torch.isfinite(misfits[-1])).all():
            raise ArithmeticError(
                f"plug_and_play: the volume is not finite after {done} iterations of {method}. Check that the denoiser "
                "is made for volumes of this unit and size, or take a larger strength."
            )
        kept = torch.where(met.view(-1, 1, 1, 1, 1), kept, x)
        met = met | (misfits[-1] <= 1)
        if progress:
            progress(done, most)
        if stop == "discrepancy" and met.all():
            break
    _warn_unless_settling(method, torch.stack(residuals), levels)
    if stop == "discrepancy" and not met.all():
        warnings.warn(
            f"plug_and_play: no iteration brought the misfit to 1; the last has {float(misfits[-1][~met].max()):.3g}. "
            "Allow more iterations, a smaller strength or lower noise levels, or check the noise.",
            UserWarning,
            stacklevel=2,
        )
    volume = kept if stop == "discrepancy" else x
    told = torch.tensor(levels[: len(residuals)], dtype=torch.float64)
    return PlugAndPlay(volume[0, 0] if flat else volume, torch.stack(residuals), torch.stack(misfits), told)


class Start:
    """What is expected before the first iteration, from how the operator sees white volumes and the images' power.

    Attributes
    ----------
    variance : float
        Of a voxel of white volumes whose images are as strong as these without their noise.
    seen : float
        Mean eigenvalue of A^T A.
    """

    def __init__(self, physics: Whitened, y: torch.Tensor) -> None:
        random = torch.Generator().manual_seed(0)
        shape = (1, 1, *physics.physics.volume_shape)
        self.physics, self.y = physics, y
        self._white = torch.randn(shape, generator=random, dtype=y.dtype).expand(len(y), *shape[1:]).to(y.device)
        self._images = physics.A(self._white)  # of each item: the parameters may differ
        self._noise = torch.randn(y.shape, generator=random, dtype=y.dtype).to(y.device)
        power = float(self._images.square().mean())
        if not power > 0:
            raise ValueError("physics: expected an operator that sees the volume; its images of one are all 0.")
        self.seen = power * y[0].numel() / self._white[0].numel()
        # where there is all but nothing but noise, a hundredth of it
        self.variance = max(float(y.double().square().mean()) - 1, 0.01) / power

    def volume(self) -> torch.Tensor:
        """Damped least squares (batch, 1, z, y, x): the posterior mean were the volume white."""
        return self.physics.prox_l2(torch.zeros_like(self._white), self.y, self.variance)

    def error(self) -> float:
        """Deviation of that from the volume, were it white: of one drawn, and its noise (Hoffman & Ribak 1991)."""
        drawn = self._white * self.variance**0.5
        images = self._images * self.variance**0.5 + self._noise
        found = self.physics.prox_l2(torch.zeros_like(drawn), images, self.variance)
        return float((found - drawn).square().mean().sqrt())


def levels_of(
    method: Method,
    given: float | tuple[float, float] | None,
    denoiser: Denoiser,
    strength: float,
    start: Start,
    physics: Whitened,
    n: int,
) -> list[float]:
    """s of each iteration.

    From the error of the first volume down to 1 / sqrt of the mean eigenvalue of A^T A / n, where a step on the data
    weighs them and the last volume alike; in any case to a fourth. Of pgd, what (3) ties to its step.
    """
    lowest, highest = known_levels(denoiser)
    if given is not None:
        pair = (given, given) if isinstance(given, int | float) else tuple(given)
        if len(pair) != 2 or not all(0 < level < math.inf for level in pair):
            raise ValueError(f"noise_levels: expected a positive number, or the first and the last, got {given}.")
        first, last = pair
        if min(pair) < lowest * (1 - 1e-6) or max(pair) > highest * (1 + 1e-6):
            raise ValueError(f"noise_levels: expected some of the denoiser's, {lowest:g} to {highest:g}, got {given}.")
    elif method == "pgd":
        asked = math.sqrt(strength / physics.squared_norm())
        first = last = min(max(asked, lowest), highest)
        if first != asked:
            warnings.warn(
                f"plug_and_play: pgd of strength {strength:g} asks for a noise level of {asked:.3g}, but the denoiser "
                f"is made for {lowest:g} to {highest:g}: the prior counts {(first / asked) ** 2:.3g} times what was "
                "asked. Take hqs or admm.",
                UserWarning,
                stacklevel=3,
            )
    else:
        first = min(max(start.error(), lowest), highest)
        last = min(max(min(start.seen**-0.5, first / _LEAST_FALL), lowest), first)
    return [first * (last / first) ** (i / max(n - 1, 1)) for i in range(n)]


def _parameters(method: Method, level: float, strength: float, physics: Whitened) -> dict[str, float]:
    """In deepinv's words, of equations (1) to (4) for noise of variance 1."""
    if method == "red":
        weight = strength / level**2
        return {"stepsize": 1 / (physics.squared_norm() + weight), "lambda": weight, "g_param": level, "beta": 1.0}
    step = 1 / physics.squared_norm() if method == "pgd" else level**2 / strength
    return {"stepsize": step, "lambda": 1.0, "g_param": level, "beta": 1.0}


def _lengths(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3, 4))


def _warn_unless_settling(method: Method, residuals: torch.Tensor, levels: list[float]) -> None:
    """Iterations that settle lose half of their relative change, or it is small; those that run away do not.

    While levels fall, the volume follows them: then only a change that grows is one of the iterations' own.
    """
    third = len(residuals) // 3
    if third < 2:
        return
    early, late = residuals[1 : 1 + third].amax(0), residuals[-third:].amax(0)  # the first is the way from the start
    allowed = early if levels[-1] < levels[0] else early / 2
    if (late > allowed.clamp_min(_SMALL_CHANGE)).any():
        worst = int((late / early).argmax())
        warnings.warn(
            f"plug_and_play: {method} does not settle: the volume changed by {float(early[worst]):.2g} of itself in an "
            f"iteration at first, and by {float(late[worst]):.2g} at the end. Check that the denoiser is made for "
            "volumes of this unit, allow more iterations, take lower noise levels, or another method.",
            UserWarning,
            stacklevel=4,  # above `no_grad`
        )


def _expect_type(denoiser: Denoiser, images: torch.Tensor) -> None:
    if images.shape[1] != 1:
        raise ValueError(f"images: expected one channel, (batch, 1, tilt, y, x), got {tuple(images.shape)}.")
    weights = next((p for p in denoiser.parameters() if p.is_floating_point()), images)
    if weights.dtype != images.dtype or weights.device != images.device:
        raise ValueError(
            f"denoiser: expected weights like the images, {images.dtype} on {images.device}, got {weights.dtype} on "
            f"{weights.device}. Convert one of them."
        )


def _checked_init(init: torch.Tensor, images: torch.Tensor, physics: TiltPhysics) -> torch.Tensor:
    batch = init[None, None] if init.ndim == 3 else init
    shape = (len(images), 1, *physics.volume_shape)
    if batch.shape != shape or not torch.isfinite(batch).all():
        raise ValueError(f"init: expected finite numbers {shape}, or those of one, got {tuple(init.shape)}.")
    return batch.to(images)
