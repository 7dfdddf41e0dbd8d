"""Reconstruction by a network that is taught by the tilt series itself: without truth, and without other data.

The losses stand in `inverse.self_supervised_losses`. What teaches is as little as one series holds; what is gained over
a classical reconstruction is what its own molecules have in common. Nothing is invented that the series does not show
from some side; what is filled into the missing wedge is a guess all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepinv.models.base import Denoiser

from cryosim.acquisition.series import TiltSeries
from cryosim.microscope.counting import thin
from inverse.physics.base import TiltPhysics
from inverse.preparation import prepare
from inverse.priors.denoiser import NoiseConditionalUNet
from inverse.self_supervised_losses import LOSSES, Draw, Loss, LossName, kept_tilts, of_tilts
from inverse.self_supervised_problem import Problem, Split
from inverse.train import Progress, fit


class SelfSupervisedPlan(NamedTuple):
    """How a network is taught by images.

    Attributes
    ----------
    steps : int
    rate : float
        Learning rate of Adam at its highest.
    strength : float
        a: the network is shown images of 1 + a^2 times the noise, and judged by ones of 1 + a^-2 times. A small one
        shows it all but what there is, and is the noisier teacher.
    averages : int
        Of how many splits the volume is the mean.
    seed : int
    """

    steps: int = 300
    rate: float = 1e-3
    strength: float = 0.5
    averages: int = 8
    seed: int = 0


_USUAL = SelfSupervisedPlan()
_EQUIVARIANCE = 0.2  # weight: a network that is asked for its own answers alone gives nothing


class SelfSupervised(NamedTuple):
    """What `self_supervised` returns.

    Attributes
    ----------
    volume : tensor (z, y, x) or (batch, 1, z, y, x)
        [unit of the volume].
    network : Denoiser
        D(volume, level), for other images of the same kind: see `restored`.
    losses : tensor (step, loss)
        Of each step that was made in this call; the noise of the images is in them.
    variance : float
        That a voxel was taken to have [square of the unit].
    level : float
        That of the first volume from the truth, about, which the network is told [unit of the volume].
    """

    volume: torch.Tensor
    network: Denoiser
    losses: torch.Tensor
    variance: float
    level: float


def self_supervised(
    physics: TiltPhysics,
    images: torch.Tensor,
    noise: float | torch.Tensor,
    *,
    losses: Sequence[LossName | Loss] = ("noise2noise", "equivariance"),
    weights: Sequence[float] | None = None,
    plan: SelfSupervisedPlan = _USUAL,
    network: Denoiser | None = None,
    split: Split | None = None,
    state: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> SelfSupervised:
    """Teach a network by images alone, and reconstruct them with it.

    Parameters
    ----------
    physics : TiltPhysics
    images : tensor (tilt, y, x) or (batch, 1, tilt, y, x)
        One series, or several of the same operator, which teach the better.
    noise : float or tensor (tilt,)
        Variance of a pixel [unit of the images, squared].
    losses : sequence of str or callable
        Names of `inverse.self_supervised_losses`, or functions of its `Draw`.
    weights : sequence of float, optional
        Of the losses; when left out 1 each, and 0.2 of equivariance.
    plan : SelfSupervisedPlan
    network : Denoiser, optional
        D(x, sigma), trained in place, in float32 as the images; a small `NoiseConditionalUNet` when left out.
    split : callable, optional
        generator -> two independent sets of images, as `thinned` makes them of counts. When left out, Gaussian noise of
        the given variance is split.
    state, resume, progress
        As in `inverse.train.train_denoiser`.

    Raises
    ------
    ValueError
        For unknown losses, weights that do not fit, no loss that knows the data, or images or noise that do not fit.
    cryosim.io.FormatError
        When the state is damaged or belongs to another plan or network.
    """
    chosen, scales = _chosen(losses, weights)
    if plan.steps < 1 or plan.averages < 1:
        raise ValueError(f"plan: expected one step and one of averages at least, got {plan}.")
    problem = Problem(physics, images, noise, strength=plan.strength, split=split)
    if network is None:
        network = small_network(problem, plan.seed)
    history: list[list[float]] = []

    def loss_of(step: int) -> torch.Tensor:
        draw = Draw(network, problem, torch.Generator().manual_seed(plan.seed * 1_000_003 + step))
        parts = [loss(draw) for loss in chosen]
        history.append([float(part.detach()) for part in parts])
        return torch.stack([scale * part for scale, part in zip(scales, parts, strict=True)]).sum()

    taught = fit(network, plan, loss_of, state, resume, progress)
    volume = restored(taught, problem, plan, by_tilts="noise2noise" not in losses and "tilt_splitting" in losses)
    table = torch.tensor(history, dtype=torch.float64).reshape(-1, len(chosen))
    return SelfSupervised(volume, taught, table, problem.variance, problem.level)


@torch.no_grad()
def restored(network: Denoiser, problem: Problem, plan: SelfSupervisedPlan, *, by_tilts: bool = False) -> torch.Tensor:
    """Mean of R over splits of the images: each is what the network was taught on, and their mean knows all images.

    With `by_tilts`, over three in four of the tilts in place of first parts. Shaped as in `self_supervised`.
    """
    random = torch.Generator().manual_seed(plan.seed * 1_000_003 - 1)
    total = torch.zeros(())
    for _ in range(plan.averages):
        if by_tilts:
            kept = kept_tilts(problem.images.shape[2], random).to(problem.images.device)
            images = of_tilts(problem.images, kept)
        else:
            images = problem.split(random)[0]
        found = [network(problem.first(one[None]), problem.level) for one in images]
        total = total + torch.cat(found) / plan.averages
    return total[0, 0] if problem.flat else total


def small_network(problem: Problem, seed: int = 0) -> NoiseConditionalUNet:
    """A network of 4e5 weights in the unit of the problem, which begins as a mere factor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = NoiseConditionalUNet((32, 64), 1, scale=problem.variance**0.5)
    network = network.to(problem.images.device, problem.images.dtype)
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def thinned(series: TiltSeries, strength: float = _USUAL.strength, **preparation: Any) -> Split:
    """A `split` of a series of counts: its electrons dealt out, and either part prepared as `prepare` does.

    Poisson counts fall into independent parts exactly, whatever the dose (see `cryosim.thin`); with the share
    1 / (1 + a^2) the first has 1 + a^2 times the noise. Dealt out anew in each step, for the reason given at
    `inverse.self_supervised_problem.coupled`.

    Parameters
    ----------
    series : TiltSeries
        Whole counts [counts/px].
    strength : float
        a, that of the plan.
    **preparation
        `bin`, `ctf`, `low_pass` of `inverse.preparation.prepare`.
    """
    share = 1 / (1 + strength**2)

    def split(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = thin(series.images, share, generator=generator)
        return tuple(prepare(series.replace(images=part, movies=None), **preparation)[0] for part in (first, second))  # type: ignore[return-value]

    return split


def _chosen(
    losses: Sequence[LossName | Loss], weights: Sequence[float] | None
) -> tuple[list[Callable[[Draw], torch.Tensor]], list[float]]:
    unknown = [name for name in losses if isinstance(name, str) and name not in LOSSES]
    if unknown or not losses or isinstance(losses, str):
        raise ValueError(f"losses: expected some of {', '.join(LOSSES)}, or functions, got {losses!r}.")
    if list(losses) == ["equivariance"]:
        raise ValueError(
            "losses: equivariance alone is met by a network that gives nothing. Add a loss that knows the images, such "
            "as noise2noise."
        )
    usual = [_EQUIVARIANCE if loss == "equivariance" else 1.0 for loss in losses]
    scales = usual if weights is None else [float(w) for w in weights]
    if len(scales) != len(losses) or not all(0 < w < float("inf") for w in scales):
        raise ValueError(f"weights: expected {len(losses)} positive numbers, one for each loss, got {weights}.")
    return [LOSSES[loss] if isinstance(loss, str) else loss for loss in losses], scales
