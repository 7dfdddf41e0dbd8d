"""Posterior sampling by alternating between the images and the prior: the split Gibbs sampler.

Beside the volume z stands a copy x of it with white noise of deviation rho (Vono et al. 2019,
doi:10.1109/TSP.2019.2894825), and the two are drawn in turn,

    x given z and the images      proportional to  exp(-|y - A x|^2 / 2 n - |x - z|^2 / 2 rho^2),          (1)
    z given x                     proportional to  p(z) exp(-|z - x|^2 / 2 rho^2),                        (2)

while rho falls (Wu et al. 2024, arXiv:2405.18782). Every law of (1) is Gaussian, and the minimiser of its exponent is a
draw from it once y and z carry a draw of their own noise. (2) is what a denoiser D is for: x is a volume with noise.

**The prior's step.** By Tweedie's formulas the law (2) has the mean D(x, rho) and the covariance rho^2 J, where J is
the Jacobian of D (Efron 2011, doi:10.1198/jasa.2011.tm11181). From the noise level s of x to a lower one s', with
q = s'^2 / s^2, a volume at s' given x has the mean and the covariance

    x + (1 - q) (D(x, s) - x),        s^2 (q (1 - q) + (1 - q)^2 J),                                       (3)

the step of Bao et al. 2022 (arXiv:2206.07309), who take the diagonal of J in voxels. Here it is that in Fourier space,
J(|k|), which is how J acts under a stationary Gaussian prior: for such a prior a single step to s' = 0 is exact. With
no J at all, steps would have to be many and short, for every step misses variance wherever noise and structure are of
like size.

**The lag.** At a fixed rho the volume z sees the images with the noise n + rho^2 A A^T, not n. As rho falls the excess
fades, but the sampler follows ever more slowly. Take one direction that the operator magnifies by a, of a wide prior;
then u = rho^2 a^2 / n, and steps (1) and (2) change v, the variance of z in units of n / a^2, to

    v / (1 + u)^2 + u / (1 + u) + u,                                                                       (4)

which stands at v = 1 + u for fixed u. When u falls by exp(-2 h) a step, v ends at 1 + h and not at 1, whatever the a:
the images have been taken as too noisy by a factor 1 + h in every direction. So (1) is given n over that factor, found
by (4).

Measured against the exact law of one direction, for prior variances of 1e-3 to 1e3 n / a^2 and h = 0.2: deviations 0.99
to 1.02 of the exact ones (1.13 without), means within 0.06 of one. On 12 x 17 x 24 voxels and 15 tilts, under noise of
20 times to a hundredth of the variance of what the images show, 44 calls of the denoiser a sample: deviations 0.98 to
1.00 of the exact ones, sorted by how much the images tell of a direction, the missing wedge among them.

**Where it fails.** Between states of the prior that lie wide apart the sampler decides when rho is near their distance,
and the noise it has then is n + rho^2. Of voxels that are 0 or about 2, each seen with noise of variance n, it found
the variance to 3 % and the mean to 0.09 deviations for n = 1 with 20 steps; for n = 1/4 the variance came out 1.17
times too large with 20 steps and 1.04 with 80, and the mean 0.35 and 0.24 deviations off, with the ambiguous voxels
drawn towards the prior. More steps of (3) between two draws of (1) make that no better. In a tilt series the noise of
what tells such states apart is large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from cryosim.core.fourier import frequencies, half_frequencies
from inverse.physics.base import TiltPhysics
from inverse.solvers.whitened import damped

Denoise = Callable[[torch.Tensor, float], torch.Tensor]
"""D(x, sigma) of volumes (batch, 1, z, y, x)."""

_END = 0.05
"""rho^2 |A|^2 / n at the lowest level: what is left of the excess of noise in the direction that is measured best."""

_WIDE_GAIN = 0.5
"""Gain of the denoiser in all shells below which a level is high enough to start from."""

_MOST_GAIN = 0.95
"""Gain up to which the power of the prior is told from the denoiser: above, what it takes away is next to nothing."""

_PROBE = 0.1
"""Size of the noise that the Jacobian is measured with, over that of the level."""


class Problem(NamedTuple):
    """What is sampled: volumes by the law of images = A volume + white noise, and by the prior of a denoiser.

    Attributes
    ----------
    physics : TiltPhysics
    images : tensor (batch, 1, tilt, y, x)
    noise : tensor () or (tilt,)
        Variance per pixel.
    denoise : callable
    """

    physics: TiltPhysics
    images: torch.Tensor
    noise: torch.Tensor
    denoise: Denoise


class Ladder(NamedTuple):
    """Noise levels [unit of the volume]: of each step the rho, and those between rho and 0 that (2) goes down by.

    Attributes
    ----------
    steps : list of (list of float)
        Each descending, its first rho.
    shells : Shells
    power : tensor (shell,)
        Of the prior per voxel, as the denoiser has it at the highest level.
    mean : tensor (1, 1, z, y, x)
        Likewise.
    """

    steps: list[list[float]]
    shells: Shells
    power: torch.Tensor
    mean: torch.Tensor

    @property
    def lag(self) -> float:
        """1 + h of the levels."""
        highest, lowest = self.steps[0][0], self.steps[-1][0]
        return lag(math.log(highest / lowest) / max(1, len(self.steps) - 1))

    @property
    def calls(self) -> int:
        """Of the denoiser, a sample; the first one takes twice as many."""
        return sum(len(levels) for levels in self.steps)


def ladder(problem: Problem, steps: int, range_: tuple[float, float], like: torch.Tensor) -> Ladder:
    """Levels for `steps` draws of (1), each followed by one step of (3), within what the denoiser is good for.

    From the highest level of `range_`, or where the denoiser lets pass less than half of white noise, down to where
    rho^2 |A|^2 is a twentieth of the noise. After the last draw (3) goes on by factors of 2 to a sixteenth of that, or
    to the lowest of `range_`: there no draw will mend what a single step to 0 makes of a prior that is not Gaussian.
    """
    shells = Shells.of(problem.physics.volume_shape, like)
    smallest = math.sqrt(_END * float(problem.noise.min() / problem.physics.squared_norm()))
    generator = torch.Generator(like.device).manual_seed(0)
    noise = white(like, generator)
    highest = range_[1] if math.isfinite(range_[1]) else max(8 * smallest, range_[0])
    while True:
        above, below = (problem.denoise(sign * highest * noise, highest) for sign in (1, -1))
        gain = shells.ratio((above - below) / (2 * highest), noise)
        if math.isfinite(range_[1]) or float(gain.max()) < _WIDE_GAIN:
            break
        highest *= 2
    lowest = min(max(smallest, range_[0]), highest)
    rate = math.log(highest / lowest) / max(1, steps - 1)
    rhos = [highest * math.exp(-rate * i) for i in range(steps)]
    floor = max(range_[0], lowest / 16)
    rows = [[rho] for rho in rhos]
    while rows[-1][-1] / 2 >= floor:
        rows[-1].append(rows[-1][-1] / 2)
    known = gain.clamp(0, _MOST_GAIN)
    return Ladder(rows, shells, highest**2 * known / (1 - known), (above + below)[:1] / 2)


def chain(
    problem: Problem,
    ladder: Ladder,
    gains: list[torch.Tensor],
    start: torch.Tensor | None,
    generator: torch.Generator,
    progress: Callable[[], None],
) -> torch.Tensor:
    """One sample (batch, 1, z, y, x): down the ladder once.

    Parameters
    ----------
    gains : list of tensor (shell,)
        J of equation (3) at each level of the ladder; measured and appended where the list ends.
    start : tensor (batch, 1, z, y, x), optional
        First z; a draw of the Gaussian that the denoiser takes the prior for at the highest level when left out.
    progress : callable
        Called after each step.
    """
    shells = ladder.shells
    shape = (len(problem.images), 1, *problem.physics.volume_shape)
    z = start
    if z is None:
        z = ladder.mean + shells.filtered(white(problem.images.new_empty(shape), generator), ladder.power)
    noise = problem.noise / ladder.lag
    at = 0
    for levels in ladder.steps:
        z = draw_volume(problem, levels[0], noise, z, generator)
        for level, lower in zip(levels, [*levels[1:], 0.0], strict=True):
            denoised = problem.denoise(z, level)
            if at == len(gains):
                probe = white(z, generator)
                change = problem.denoise(z + _PROBE * level * probe, level) - denoised
                gains.append(shells.ratio(change / (_PROBE * level), probe).clamp(0, 1))
            q = (lower / level) ** 2
            variance = level**2 * (1 - q) * (q + (1 - q) * gains[at])
            z = z + (1 - q) * (denoised - z) + shells.filtered(white(z, generator), variance)  # equation (3)
            at += 1
        progress()
    return z


def draw_volume(
    problem: Problem, rho: float, noise: torch.Tensor, z: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """One draw of equation (1): the minimiser of its exponent about y and z that carry a draw of their own noise."""
    centre = z + rho * white(z, generator)
    seen = problem.images + noise.sqrt().reshape(-1, 1, 1).to(z) * white(problem.images, generator)
    return damped(problem.physics, centre, seen, noise, rho**2)


def lag(rate: float) -> float:
    """1 + h, to all orders: the end of equation (4) where rho falls by the factor exp(-rate) a step.

    The mean over where on the ladder of u the steps fall.
    """
    if not rate > 0:
        return 1.0
    phases = torch.arange(8, dtype=torch.float64) / 8
    variance = torch.ones_like(phases)
    for i in range(math.ceil(math.log(1e9) / (2 * rate)) + 1):
        u = 100 * torch.exp(2 * rate * (phases - i))
        variance = variance / (1 + u) ** 2 + u / (1 + u) + u
    return float(variance.mean())


class Shells(NamedTuple):
    """Functions of |k| [cycles/voxel] on a volume's Fourier samples: linear between shells one sample wide.

    Attributes
    ----------
    shape : (int, int, int)
    below : tensor (z, y, x // 2 + 1)
        The shell at or below each sample, int64.
    share : tensor (z, y, x // 2 + 1)
        How far it lies towards the next, 0 to 1.
    """

    shape: tuple[int, int, int]
    below: torch.Tensor
    share: torch.Tensor

    @classmethod
    def of(cls, shape: tuple[int, int, int], like: torch.Tensor) -> Shells:
        """Of volumes (..., *shape), of the type and device of `like`."""
        kz, ky = (frequencies(n, dtype=like.dtype, device=like.device) for n in shape[:2])
        kx = half_frequencies(shape[2], dtype=like.dtype, device=like.device)
        at = (kz[:, None, None] ** 2 + ky[:, None] ** 2 + kx**2).sqrt() * max(shape)
        below = at.floor().long()
        return cls((shape[0], shape[1], shape[2]), below, at - below)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum (shell,) of values (z, y, x // 2 + 1), each shared between the two shells it lies between."""
        n = int(self.below.max()) + 2
        sums = values.new_zeros(n)
        sums.index_add_(0, self.below.flatten(), (values * (1 - self.share)).flatten())
        sums.index_add_(0, self.below.flatten() + 1, (values * self.share).flatten())
        return sums

    def ratio(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Regression (shell,) of the Fourier samples of volumes a on those of b, (batch, 1, z, y, x)."""
        fa, fb = (torch.fft.rfftn(v.detach()[:, 0], dim=(1, 2, 3)) for v in (a, b))
        half = torch.full_like(self.share, 2.0)  # samples of the half space stand for two, but for those on its edge
        half[..., 0] = 1
        if self.shape[2] % 2 == 0:
            half[..., -1] = 1
        cross = self.total(half * (fa * fb.conj()).real.sum(0))
        power = self.total(half * fb.abs().square().sum(0))
        return torch.where(power > 0, cross / power.clamp_min(torch.finfo(power.dtype).tiny), 0)

    def filtered(self, volume: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
        """Volumes (batch, 1, z, y, x), white noise before, with `power` (shell,) per voxel."""
        root = power.clamp_min(0).sqrt()
        weight = root[self.below] * (1 - self.share) + root[self.below + 1] * self.share
        return torch.fft.irfftn(torch.fft.rfftn(volume, dim=(-3, -2, -1)) * weight, s=self.shape, dim=(-3, -2, -1))


def white(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """White noise of variance 1."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
