"""Samples of the posterior of a volume under a learned prior: what the images leave open, the prior fills in.

The prior is a denoiser D(x, sigma), the mean of volumes given one of them with white noise. Each sample is a volume
that both the images and the prior hold possible; their mean is the best estimate in the squared error, and their spread
says how far to trust it, voxel by voxel. Four ways to draw them, by the law that is meant and the one that is sampled:

"split-gibbs"
    The posterior itself, up to the number of steps, where the prior is Gaussian or nearly so at the scale of the noise
    levels: `inverse.solvers.split_gibbs`, which says what was measured.
"moment-matching"
    Rozet et al. 2024 (arXiv:2405.13712), deepinv's: reverse diffusion with the likelihood of a Gaussian whose
    covariance is the denoiser's Jacobian. It takes the gradient of the denoiser a dozen times a step.
"diffpir"
    Zhu et al. 2023 (arXiv:2305.08995), deepinv's: as fast as the first, and made for good pictures; nothing says what
    law its samples have.
"dps"
    Chung et al. 2023 (arXiv:2209.14687), deepinv's, with the likelihood of variance n + sigma^2 |A|^2: it solves
    nothing, needs the denoiser's gradient once a step, and takes the images for noisier than they are.

Measured with the exact denoiser of a Gaussian prior, on 12 x 17 x 24 voxels and 15 tilts of the stretched grid with
noise of a twentieth of the variance of what the images show, of 8 samples: error of the mean over the size of the
volume, share of the voxels in their 90 % interval, and rms error over the spread,

    split-gibbs 0.506, 0.892, 1.03    moment-matching 0.509, 0.868, 1.09    diffpir 0.537, 0.878, 1.06
    dps 0.635, 0.905, 0.97

with DiffPIR's spread 4 to 30 times too wide in the two lowest shells.

deepinv's ways know white noise of one level and operators of norm 1: they are given the operator and the images over
the noise of each tilt and over the norm. The caller's operator is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from deepinv.models.base import Denoiser
from deepinv.optim import L2
from deepinv.physics import GaussianNoise, LinearPhysics
from deepinv.sampling import (
    AncestralSolver,
    DiffPIR,
    DPSDataFidelity,
    MomentMatchingDataFidelity,
    PosteriorDiffusion,
    VarianceExplodingDiffusion,
)

from cryosim.core.record import Record, item
from inverse.physics.base import TiltPhysics
from inverse.priors.wrappers import Affine, known_levels
from inverse.solvers.linear import as_batch
from inverse.solvers.split_gibbs import Problem, chain, ladder, white
from inverse.solvers.whitened import damped

Method = Literal["split-gibbs", "moment-matching", "diffpir", "dps"]

_STEPS: dict[str, int] = {"split-gibbs": 40, "moment-matching": 40, "diffpir": 40, "dps": 200}

_MOST_ITERATIONS = 12
"""Of conjugate gradients in a step of moment matching, each of which takes the denoiser's gradient once."""


class Diffusion(Record):
    """What `diffusion` returns; volumes (z, y, x) of one stack, or (batch, 1, z, y, x).

    Attributes
    ----------
    mean : tensor (z, y, x) or (batch, 1, z, y, x)
        Of the samples: of n of them, sqrt(1 + 1 / n) times as far from the truth as that of many would be.
    std : tensor (z, y, x) or (batch, 1, z, y, x)
        Of the samples, from their own mean with n - 1; NaN with a single sample. Its own relative error is about
        1 / sqrt(2 n - 2) in each voxel.
    samples : tensor (sample, z, y, x) or (sample, batch, 1, z, y, x)
    levels : tensor (step,)
        Noise levels that the sampler went down by [unit of the volume].
    """

    mean: torch.Tensor = item(3)
    std: torch.Tensor = item(3)
    samples: torch.Tensor = item(3)
    levels: torch.Tensor


@torch.no_grad()
def diffusion(
    physics: TiltPhysics,
    images: torch.Tensor,
    denoiser: Denoiser,
    noise: float | torch.Tensor,
    *,
    samples: int = 8,
    steps: int | None = None,
    method: Method = "split-gibbs",
    start: torch.Tensor | None = None,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> Diffusion:
    """Samples of the volume given the images, their mean and their spread.

    Parameters
    ----------
    physics : TiltProjection, ContrastProjection or DeformedProjection
    images : tensor (tilt, y, x) or (batch, 1, tilt, y, x)
        Of white noise.
    denoiser : Denoiser
        D(x, sigma), x (batch, 1, z, y, x) and sigma in the unit of the volume; not used outside its `noise_levels`,
        where it has them.
    noise : float or tensor (tilt,)
        Variance of a pixel.
    samples : int
        Drawn one after another; each is independent of how many there are.
    steps : int, optional
        40 when left out, 200 of "dps". The denoiser is called about as often, but for "moment-matching".
    method : {"split-gibbs", "moment-matching", "diffpir", "dps"}
        See the top of this file.
    start : tensor (z, y, x) or (batch, 1, z, y, x), optional
        What the highest noise is added to. When left out: a draw of the prior's power for "split-gibbs", else damped
        least squares.
    generator : torch.Generator
        Of the images' device; one number is taken from it.
    progress : callable (done, all), optional
        Called after each step, or each sample of deepinv's methods.

    Returns
    -------
    Diffusion

    Raises
    ------
    ValueError
        For images or a start that do not fit, noise that is not positive, counts below 1, an unknown method, or an
        operator that is not linear.
    """
    problem, flat = _problem(physics, images, denoiser, noise)
    if method not in get_args(Method):
        raise ValueError(f"diffusion: expected a method of {', '.join(get_args(Method))}, got {method!r}.")
    steps = _STEPS[method] if steps is None else steps
    for name, value, least in (("samples", samples, 1), ("steps", steps, 2)):
        if value < least:
            raise ValueError(f"diffusion: expected {least} {name} or more, got {value}.")
    shape = (len(problem.images), 1, *problem.physics.volume_shape)
    if start is not None:
        if tuple(start.shape) != (shape[2:] if flat else shape):
            raise ValueError(f"start: expected {shape[2:] if flat else shape}, got {tuple(start.shape)}.")
        start = start.to(problem.images).reshape(shape)
    range_ = _noise_levels(denoiser)
    prepare = _split_gibbs if method == "split-gibbs" else _deepinv
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    draw, levels, each = prepare(method, problem, start, steps, range_)

    found = problem.images.new_empty(samples, *shape)
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, samples * each)

    for i in range(samples):
        own = torch.Generator(problem.images.device).manual_seed(seed + i)
        found[i] = draw(own, tell)
    found = found[:, 0, 0] if flat else found
    std = found.std(0) if samples > 1 else torch.full_like(found[0], torch.nan)
    return Diffusion(found.mean(0), std, found, torch.tensor(levels, dtype=torch.float64))


Draw = Callable[[torch.Generator, Callable[[], None]], torch.Tensor]


def _problem(
    physics: TiltPhysics, images: torch.Tensor, denoiser: Denoiser, noise: float | torch.Tensor
) -> tuple[Problem, bool]:
    """Checked, and whether the images came as one stack."""
    if not isinstance(physics, TiltPhysics):
        raise ValueError(f"diffusion: expected a linear operator of tilt series, got {type(physics).__name__}.")
    batch, flat = as_batch(physics, images)
    if batch.shape[1] != 1:
        raise ValueError(f"diffusion: expected images of one channel, got {batch.shape[1]}. Make them a batch.")
    variance = torch.as_tensor(noise, dtype=torch.float64, device=batch.device)
    if variance.ndim > 1 or (variance.ndim == 1 and len(variance) != batch.shape[2]):
        raise ValueError(f"noise: expected a number or one for each of {batch.shape[2]} tilts, got {variance.shape}.")
    if not ((variance > 0) & torch.isfinite(variance)).all():
        raise ValueError(f"noise: expected positive, finite variances, got {variance.tolist()}.")
    if variance.ndim == 1 and bool((variance == variance[0]).all()):
        variance = variance[0]
    return Problem(physics, batch.detach(), variance, denoiser), flat


def _noise_levels(denoiser: Denoiser) -> tuple[float, float]:
    low, high = known_levels(denoiser)
    if not 0 <= low < high:
        raise ValueError(f"denoiser.noise_levels: expected (lowest, highest), got {(low, high)}.")
    return float(low), float(high)


def _split_gibbs(
    method: str,
    problem: Problem,
    start: torch.Tensor | None,
    steps: int,
    range_: tuple[float, float],
) -> tuple[Draw, Sequence[float], int]:
    like = problem.images.new_empty(1, 1, *problem.physics.volume_shape)
    levels = ladder(problem, steps, range_, like)
    gains: list[torch.Tensor] = []  # measured by the first sample, and used by all

    def draw(generator: torch.Generator, tell: Callable[[], None]) -> torch.Tensor:
        return chain(problem, levels, gains, start, generator, tell)

    return draw, [row[0] for row in levels.steps], len(levels.steps)


def _deepinv(
    method: str,
    problem: Problem,
    start: torch.Tensor | None,
    steps: int,
    range_: tuple[float, float],
) -> tuple[Draw, Sequence[float], int]:
    """deepinv's samplers: volumes in their own unit, images in units of |A| and of the noise."""
    white_physics = _White(problem)
    images = problem.images / white_physics.unit.to(problem.images)
    typical = float(problem.noise.log().mean().exp())  # of the noise
    first = problem.physics.prox_l2(None, problem.images, 1 / typical) if start is None else start
    highest = range_[1] if math.isfinite(range_[1]) else 10 * float(first.std())
    lowest = max(range_[0], 1e-3 * highest)
    if method == "diffpir":
        return _diffpir(problem, white_physics, images, first, steps, (lowest, highest))
    levels = torch.logspace(math.log10(highest), math.log10(lowest), steps, dtype=torch.float64).tolist()
    if method == "dps":
        fidelity = DPSDataFidelity(guidance="annealed")
    else:
        fidelity = MomentMatchingDataFidelity(cg_max_iter=_MOST_ITERATIONS)

    def draw(generator: torch.Generator, tell: Callable[[], None]) -> torch.Tensor:
        sampler = PosteriorDiffusion(
            data_fidelity=fidelity,
            denoiser=problem.denoise,  # type: ignore[arg-type]
            sde=VarianceExplodingDiffusion(sigma_min=lowest, sigma_max=highest, alpha=1.0, device=images.device),
            solver=AncestralSolver(torch.linspace(1, 0, steps, dtype=torch.float64), rng=generator),
            device=images.device,
            minus_one_one=False,
        )
        begin = first + highest * white(first, generator)
        found = sampler(images.float(), white_physics, x_init=begin.double())  # deepinv denoises in float32
        tell()
        return found.detach().to(images)

    return draw, levels, 1


def _diffpir(
    problem: Problem,
    physics: _White,
    images: torch.Tensor,
    first: torch.Tensor,
    steps: int,
    range_: tuple[float, float],
) -> tuple[Draw, Sequence[float], int]:
    """DiffPIR takes volumes for images between 0 and 1, and clips them: they are mapped to it and back."""
    low, high = float(first.min()), float(first.max())
    low, span = low - (high - low), 3 * (high - low)  # peaks of a volume rise above those of damped least squares
    between = (-low / span, (1 - low) / span)  # what 0 and 1 of the volume become
    denoiser = Affine(problem.denoise, *between)  # type: ignore[arg-type]
    offset = physics.A(torch.full_like(first, low))
    physics.noise_model = GaussianNoise(physics.level / span)  # as deepinv reads it: of images over the span
    sampler = _TruncatedDiffPIR(
        denoiser,
        L2(),
        sigma=physics.level / span,
        max_iter=steps,
        device=str(images.device),
        highest=2 * range_[1] / span,
    )

    def draw(generator: torch.Generator, tell: Callable[[], None]) -> torch.Tensor:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # deepinv's draws come from torch's own generator
            found = sampler((images - offset) / span, physics, seed=seed, x_init=(first - low) / span)
        tell()
        return (low + span * found).to(images)

    levels = [float(sampler.sigmas[i]) * span / 2 for i in sampler.seq]
    return draw, levels, 1


class _White(LinearPhysics):
    """The operator over the noise of each image, and over its norm: white noise of deviation `level`, |A| about 1."""

    def __init__(self, problem: Problem) -> None:
        physics, noise = problem.physics, problem.noise
        norm = physics.squared_norm().to(noise)
        typical = noise.log().mean().exp()
        super().__init__(img_size=(1, *physics.volume_shape))
        self.inside, self.level = physics, float((typical / norm).sqrt())
        self.noise_model = GaussianNoise(self.level)
        self.unit = (norm * noise / typical).sqrt().reshape(-1, 1, 1)  # (tilt or 1, 1, 1)

    def A(self, x: torch.Tensor, **_) -> torch.Tensor:
        return self.inside.A(x) / self.unit.to(x)

    def A_adjoint(self, y: torch.Tensor, **_) -> torch.Tensor:
        return self.inside.A_adjoint(y / self.unit.to(y))

    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma: float | torch.Tensor, *_, **__) -> torch.Tensor:
        noise = self.unit.double().flatten() ** 2 / float(gamma)
        return damped(self.inside, z, y * self.unit.to(y), noise if len(noise) > 1 else noise[0], 1.0)


class _TruncatedDiffPIR(DiffPIR):
    """deepinv's DiffPIR, begun where its noise is at most `highest` and not at 150 times the size of a volume."""

    def __init__(self, model: torch.nn.Module, fidelity: L2, sigma: float, max_iter: int, device: str, highest: float):
        super().__init__(model, fidelity, sigma=sigma, max_iter=max_iter, device=device)
        self.num_train_timesteps = int((self.reduced_alpha_cumprod <= highest).sum())
        if self.num_train_timesteps < 2:
            raise ValueError(f"diffpir: its levels end at 0.01 of the volume's half range, above {highest:g} of it.")
        self.beta_end = float(self.betas[self.num_train_timesteps - 1])
        parts = self.get_alpha_beta()
        self.sqrt_1m_alphas_cumprod, self.reduced_alpha_cumprod, self.sqrt_alphas_cumprod = parts[:3]
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod, self.betas = parts[3:]
        self.rhos, self.sigmas, self.seq = self.get_noise_schedule(sigma)

    def get_alpha_prod(self, *_) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
