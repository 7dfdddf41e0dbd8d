"""Training of denoisers on volumes of our own making; it can be interrupted at any time and resumed.

What is minimised is E lambda(sigma) |D(v + sigma n, sigma) - v|^2 over crops v, white n and levels sigma, with
lambda = 1 / c_out^2, so that every level counts alike (Karras et al. 2022, arXiv:2206.00364, equation 8). The logarithm
of sigma is uniform over all levels of the network in one crop of five, and in the others over those that are like the
volumes' own deviation: there structure can be told from noise, and there is most to be learned. With all crops over all
levels, 2800 steps did no better there than 240 of these. Crops are turned by the 24 rotations of the cube, never
mirrored, since molecules have a hand; some are lifted by a constant, since a tomogram does not tell the mean of a
specimen, and scaled, since its contrast is not known exactly. What is kept is the running mean of the weights.

All that is random in step i is drawn from a generator seeded with (seed, i): a run that was stopped and resumed makes
the steps of one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from cryosim.io.files import FormatError
from inverse.priors.denoiser import NoiseConditionalUNet
from inverse.priors.wrappers import rotated, rotations
from inverse.weights import read_tensors, write_tensors

Progress = Callable[[int, int], None]

_SAVED_EVERY = 200  # steps
_USUAL, _LIKE = 0.8, (0.15, 4.0)  # share of the crops with levels like the deviation of the volumes, and how like


class Plan(NamedTuple):
    """How a denoiser is trained.

    Attributes
    ----------
    steps : int
    batch : int
        Crops a step.
    crop : int
        Their edge [voxel].
    rate : float
        Learning rate of Adam at its highest; it rises over the first steps and falls as a half cosine to a hundredth.
    offset : float
        Deviation of the constant that half the crops are lifted by, over that of the volumes [1].
    contrast : float
        Deviation of the logarithm of the factor they are scaled by [1].
    seed : int
    """

    steps: int = 6000
    batch: int = 4
    crop: int = 32
    rate: float = 1e-3
    offset: float = 0.3
    contrast: float = 0.15
    seed: int = 0


def train_denoiser(
    network: NoiseConditionalUNet,
    volumes: Sequence[torch.Tensor],
    plan: Plan,
    *,
    state: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> NoiseConditionalUNet:
    """Train a network in place on volumes (z, y, x) [V].

    Parameters
    ----------
    network : NoiseConditionalUNet
        Its `scale` is that of the volumes.
    volumes : sequence of tensor (z, y, x)
        [V]; none smaller than a crop.
    plan : Plan
    state : str or path, optional
        File that the state of the training is kept in, every 200 steps and at the end.
    resume : bool
        Go on from that file, if it is there.
    progress : callable, optional
        Called with (steps done, in all).

    Returns
    -------
    NoiseConditionalUNet
        The same, with the mean of its weights, for use.

    Raises
    ------
    ValueError
        When there is no volume, or one smaller than a crop.
    cryosim.io.FormatError
        When the state is damaged or belongs to another plan or network.
    """
    if not volumes or any(min(volume.shape) < plan.crop for volume in volumes):
        smallest = min((tuple(volume.shape) for volume in volumes), key=min, default="none")
        raise ValueError(f"train: expected volumes of at least {plan.crop} voxels along each axis, got {smallest}.")
    network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return fit(network, plan, lambda step: _loss(network, volumes, plan, step), state, resume, progress)


class Schedule(Protocol):
    """What `fit` asks of a plan; its text tells one from another."""

    @property
    def steps(self) -> int: ...
    @property
    def rate(self) -> float: ...


N = TypeVar("N", bound=nn.Module)


def fit(
    network: N,
    plan: Schedule,
    loss_of: Callable[[int], torch.Tensor],
    state: str | Path | None,
    resume: bool,
    progress: Progress | None,
) -> N:
    """The network with the running mean of its weights, for use, after steps of Adam on loss_of(step).

    `state`, `resume`, `progress` and the errors of a state are those of `train_denoiser`.
    """
    network = network.train().requires_grad_(True)
    optimiser = torch.optim.Adam(network.parameters(), lr=plan.rate, betas=(0.9, 0.99))
    mean = {name: value.detach().clone() for name, value in network.named_parameters()}
    first = _restored(Path(state), plan, network, optimiser, mean) if state and resume and Path(state).exists() else 0
    for step in range(first, plan.steps):
        for group in optimiser.param_groups:
            group["lr"] = plan.rate * _share_of_rate(step, plan.steps)
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            kept = min(0.999, (step + 1) / (step + 10))
            for name, value in network.named_parameters():
                mean[name].lerp_(value, 1 - kept)
        if state and ((step + 1) % _SAVED_EVERY == 0 or step + 1 == plan.steps):
            _save(Path(state), plan, step + 1, network, optimiser, mean)
        if progress:
            progress(step + 1, plan.steps)
    network.load_state_dict(mean)
    return network.eval().requires_grad_(False)


def _loss(network: NoiseConditionalUNet, volumes: Sequence[torch.Tensor], plan: Plan, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)

    def uniform(n: int = 1) -> torch.Tensor:
        return torch.rand(n, generator=generator)

    crops, turns = [], rotations()
    for _ in range(plan.batch):
        volume = volumes[int(torch.randint(len(volumes), (1,), generator=generator))]
        corner = [int(u * (n - plan.crop + 1)) for u, n in zip(uniform(3).tolist(), volume.shape, strict=True)]
        crop = volume[tuple(slice(c, c + plan.crop) for c in corner)]
        crop = rotated(crop, turns[int(torch.randint(24, (1,), generator=generator))]).float()
        crop = crop * torch.exp(plan.contrast * torch.randn(1, generator=generator))
        lift = plan.offset * network.scale * torch.randn(1, generator=generator)
        crops.append(crop + lift * (uniform() < 0.5))
    x = torch.stack(crops)[:, None]
    sigma = torch.stack([_level(network, *uniform(2)) for _ in crops])[:, None, None, None, None]
    noisy = x + sigma * torch.randn(x.shape, generator=generator)
    weight = 1 / sigma**2 + 1 / network.scale**2
    return (weight * (network(noisy, sigma.flatten()) - x) ** 2).mean()


def _level(network: NoiseConditionalUNet, among: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """A noise level () [V], by two numbers that are uniform in [0, 1)."""
    low, high = network.noise_levels
    if among < _USUAL:
        low, high = max(low, _LIKE[0] * network.scale), min(high, _LIKE[1] * network.scale)
    return low * (high / low) ** where


def _share_of_rate(step: int, steps: int) -> float:
    return min((step + 1) / max(1, min(200, steps // 10)), 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


# the state of a training ----------------------------------------------------------------------------------------------


def _save(path: Path, plan: Schedule, step: int, network: nn.Module, optimiser: torch.optim.Adam, mean: dict) -> None:
    tensors = {f"mean.{name}": value for name, value in mean.items()}
    for name, value in network.named_parameters():
        tensors[f"network.{name}"] = value
        for part in ("exp_avg", "exp_avg_sq"):
            tensors[f"{part}.{name}"] = optimiser.state[value][part]
    write_tensors(path, tensors, {"plan": repr(plan), "step": str(step)})


def _restored(path: Path, plan: Schedule, network: nn.Module, optimiser: torch.optim.Adam, mean: dict) -> int:
    """Number of steps done; network, optimiser and mean are as they were then."""
    tensors, text = read_tensors(path)
    advice = "Give the same arguments as before, or begin anew without --resume."
    if text.get("plan") != repr(plan) or not text.get("step", "").isdecimal():
        raise FormatError(path, "plan", repr(plan), text.get("plan", "none"), advice)
    step = int(text["step"])
    with torch.no_grad():
        for name, value in network.named_parameters():
            names = [f"{part}.{name}" for part in ("network", "mean", "exp_avg", "exp_avg_sq")]
            if any(key not in tensors or tensors[key].shape != value.shape for key in names):
                raise FormatError(path, f"tensor {name}", f"the shape {tuple(value.shape)}", "none or another", advice)
            current, average, first, second = (tensors[key] for key in names)
            value.copy_(current)
            mean[name].copy_(average)
            optimiser.state[value] = {
                "step": torch.tensor(float(step)),
                "exp_avg": first.clone(),
                "exp_avg_sq": second.clone(),
            }
    return step
