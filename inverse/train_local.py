"""Teaching a `LocalNetwork` with volumes of known truth; it can be interrupted at any time and resumed.

In each step a crop of a volume, turned by one of the rotations of the cube, is projected at tilts of random number,
extent and step, some left out; many of the series are seen through a lens that has lost the sign of its contrast
transfer, and fade with the dose; white noise of random strength is added, more of it the longer the way through the
specimen; and the network compares what it makes of it with the truth. The crop reaches on in x beyond the images where
the volume is wide enough, as the specimen does. What is minimised is

    |v - truth|^2 / s^2 + (|v - truth|^2 exp(-l) + l) / 2,

the second with v held fixed: the mean is that of least squares, and l the logarithm of the variance that makes its
errors most likely (the case beta = 1 of Seitzer et al. 2022, arXiv:2203.09168, in two parts).

All that is random in step i is drawn from a generator seeded with (seed, i).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cryosim.core.fourier import ring_means, squared_frequencies
from cryosim.microscope.optics import Optics, ctf
from cryosim.specimen.damage import Damage, fading
from cryosim.specimen.moment import Moment
from inverse.physics.tilt import TiltProjection
from inverse.priors.local import RINGS, LocalNetwork
from inverse.priors.wrappers import rotated, rotations
from inverse.solvers.local import filtered_tilts
from inverse.train import Progress, fit

Uniform = Callable[[float, float], float]


class LocalPlan(NamedTuple):
    """How a local network is taught.

    Attributes
    ----------
    steps : int
    crop : int
        Edge of the volumes [voxel], less where a volume is thinner.
    rate : float
        Learning rate of Adam at its highest; it rises over the first steps and falls as a half cosine to a hundredth.
    extent : (float, float)
        Least and greatest highest tilt [deg].
    step : (float, float)
        Likewise of the angle between tilts [deg].
    left_out : float
        Largest share of the tilts that are missing.
    snr : (float, float)
        Mean variance of the images over that of their noise, uniform in its logarithm.
    lens : float
        Share of the series that are seen through a lens and fade.
    defocus : (float, float)
        Least and greatest [Å], at 300 kV.
    dose : (float, float)
        Likewise of a whole series, which begins with the low tilts [e-/Å^2].
    voxel_size : float
        Of the volumes, for lens and dose [Å].
    seed : int
    """

    steps: int = 6000
    crop: int = 48
    rate: float = 1e-3
    extent: tuple[float, float] = (40.0, 70.0)
    step: tuple[float, float] = (2.0, 5.0)
    left_out: float = 0.2
    snr: tuple[float, float] = (0.05, 10.0)
    lens: float = 0.0
    defocus: tuple[float, float] = (10_000.0, 60_000.0)
    dose: tuple[float, float] = (60.0, 160.0)
    voxel_size: float = 9.0
    seed: int = 0


class Example(NamedTuple):
    """Images (tilt, y, x) [V · voxel] with noise of variances (tilt,), the operator of that, the truth (z, y, x) [V],
    and what lens and dose have left (tilt, ring) [1]."""

    physics: TiltProjection
    images: torch.Tensor
    noise: torch.Tensor
    truth: torch.Tensor
    transfer: torch.Tensor


def train_local(
    network: LocalNetwork,
    volumes: Sequence[torch.Tensor],
    plan: LocalPlan,
    *,
    state: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> LocalNetwork:
    """Teach a network in place on volumes (z, y, x) [V], of one voxel size.

    Parameters
    ----------
    network : LocalNetwork
        Its `scale` is that of the volumes.
    volumes : sequence of tensor (z, y, x)
        [V].
    plan : LocalPlan
    state : str or path, optional
        File that the state is kept in, every 200 steps and at the end.
    resume : bool
        Go on from that file, if it is there.
    progress : callable, optional
        Called with (steps done, in all).

    Returns
    -------
    LocalNetwork
        The same, with the running mean of its weights, for use.

    Raises
    ------
    ValueError
        When there is no volume, or one that is not (z, y, x) or has less than 8 voxels along an axis.
    cryosim.io.FormatError
        When the state is damaged or belongs to another plan or network.
    """
    expect_volumes("train_local", volumes)
    return fit(network, plan, lambda step: local_loss(network, example(volumes, plan, step)), state, resume, progress)


def expect_volumes(name: str, volumes: Sequence[torch.Tensor]) -> None:
    """Raise ValueError unless there are volumes (z, y, x) that are large enough to be shown in part."""
    wrong = [tuple(v.shape) for v in volumes if v.ndim != 3 or min(v.shape) < 8]
    if not volumes or wrong:
        raise ValueError(f"{name}: expected volumes (z, y, x) of 8 voxels or more, got {wrong or 'none'}.")


def local_loss(network: LocalNetwork, shown: Example) -> torch.Tensor:
    """What training makes small, of one example: ()."""
    tilts = filtered_tilts(shown.physics, shown.images, shown.noise, network.scale, shown.transfer)
    volume, log_variance = network(tilts)
    squares = (volume - shown.truth).square() / network.scale**2
    log_variance = (log_variance - 2 * math.log(network.scale)).clamp(-12, 12)
    return (squares + (squares.detach() * torch.exp(-log_variance) + log_variance) / 2).mean()


@torch.no_grad()
def example(volumes: Sequence[torch.Tensor], plan: LocalPlan, step: int) -> Example:
    """What is shown in a step."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    turns = rotations()
    volume = volumes[int(torch.randint(len(volumes), (), generator=generator))]
    volume = rotated(volume, turns[int(torch.randint(len(turns), (), generator=generator))])
    shape = [min(plan.crop, n) for n in volume.shape]
    wide = [*shape[:2], min(2 * plan.crop, volume.shape[2])]
    corner = [int(uniform(0, n - size + 1)) for n, size in zip(volume.shape, wide, strict=True)]
    scene = volume[tuple(slice(c, c + size) for c, size in zip(corner, wide, strict=True))].float()
    angles = _tilts(plan, generator, uniform)
    images = TiltProjection(angles, (wide[0], wide[1], wide[2]), (shape[1], shape[2])).A(scene[None, None])[0, 0]
    transfer = torch.ones(len(angles), RINGS)
    if uniform(0, 1) < plan.lens:
        left = _left(plan, angles, (shape[1], shape[2]), uniform)
        spectra = torch.fft.rfft2(images) * left[..., : shape[2] // 2 + 1]
        images, transfer = torch.fft.irfft2(spectra, s=images.shape[1:]), ring_means(left, RINGS)
    variance = float(images.var(dim=(1, 2)).mean().clamp_min(1e-12)) / math.exp(uniform(*map(math.log, plan.snr)))
    noise = torch.exp(uniform(0, 1) / torch.deg2rad(angles).cos())  # exp(way over mean free path), fewer electrons
    noise = variance * noise / noise.mean()
    images = images + noise.sqrt()[:, None, None] * torch.randn(images.shape, generator=generator)
    left = wide[2] // 2 - shape[2] // 2  # centres fall on each other
    physics = TiltProjection(angles, (shape[0], shape[1], shape[2]))
    return Example(physics, images, noise, scene[:, :, left : left + shape[2]], transfer)


def _left(plan: LocalPlan, angles: torch.Tensor, shape: tuple[int, int], uniform: Uniform) -> torch.Tensor:
    """Share (tilt, y, x) of the potential that lens and dose leave in images of which only the sign is corrected."""
    optics = Optics(300.0, defocus=uniform(*plan.defocus), amplitude_contrast=uniform(0.05, 0.12))
    transfer = ctf(optics, shape, plan.voxel_size).abs().float()
    dose, order = uniform(*plan.dose) / len(angles), angles.abs().argsort().argsort()
    square = squared_frequencies(shape, plan.voxel_size, dtype=torch.float32)
    moments = (Moment(dose * float(before), dose) for before in order)
    return torch.stack([transfer * fading(Damage(), square, moment, 300.0) for moment in moments])


def _tilts(plan: LocalPlan, generator: torch.Generator, uniform: Uniform) -> torch.Tensor:
    """Angles (tilt,) [deg]: a regular scheme about a somewhat inclined specimen, some of them missing."""
    extent, step = uniform(*plan.extent), uniform(*plan.step)
    n = int(2 * extent / step) + 1
    angles = (torch.arange(n) - (n - 1) / 2) * step + uniform(-step, step)
    kept = torch.rand(n, generator=generator) >= uniform(0, plan.left_out)
    return angles[kept] if int(kept.sum()) >= 2 else angles
