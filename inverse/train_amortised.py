"""Teaching an `AmortisedGaussian` with images of our own making; it can be interrupted at any time and resumed.

Images are white beyond what they tell of the directions, so that all a network is given of them is drawn at once: the
coordinates of a volume along the directions, drawn from the prior with a random contrast, or those of given volumes,
and noise of a random strength. What is minimised is the negative bound of the evidence of each direction.

All that is random in step i is drawn from a generator seeded with (seed, i).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from inverse.priors.amortised import AmortisedGaussian, evidence_bound
from inverse.solvers.amortised import Scene
from inverse.train import Progress, fit


class AmortisedPlan(NamedTuple):
    """How a network is taught.

    Attributes
    ----------
    steps : int
    batch : int
        Sets of images a step.
    noise : (float, float)
        Least and greatest variance of a pixel over that of the scene, uniform in its logarithm.
    rate : float
        Learning rate of Adam at its highest.
    seed : int
    """

    steps: int = 2000
    batch: int = 32
    noise: tuple[float, float] = (0.1, 10.0)
    rate: float = 1e-2
    seed: int = 0


def train_amortised(
    network: AmortisedGaussian,
    scene: Scene,
    plan: AmortisedPlan,
    *,
    volumes: Sequence[torch.Tensor] | None = None,
    state: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> AmortisedGaussian:
    """Teach a network in place.

    Parameters
    ----------
    network : AmortisedGaussian
    scene : Scene
    plan : AmortisedPlan
    volumes : sequence of tensor (z, y, x), optional
        Whose images are used [unit of the prior's root]; draws of the prior when left out.
    state, resume, progress
        As in `train_denoiser`.

    Returns
    -------
    AmortisedGaussian
        The same, with the mean of its weights, for use.

    Raises
    ------
    ValueError
        For a range of noise that is not positive or rising, counts below 1, no volumes, or volumes that do not fit.
    cryosim.io.FormatError
        When the state is damaged or belongs to another plan or network.
    """
    low, high = plan.noise
    if not 0 < low <= high < float("inf") or plan.steps < 1 or plan.batch < 1:
        raise ValueError(
            f"train_amortised: expected noise of 0 < least <= greatest and counts of 1 or more, got {plan}."
        )
    like = next(network.parameters()).detach()
    clean = None if volumes is None else _coordinates(scene, volumes).to(like)
    information = scene.information.to(like)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator(like.device).manual_seed(plan.seed * 1_000_003 + step)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=like.dtype, device=like.device)

        n = low * (high / low) ** torch.rand(plan.batch, 1, generator=generator, dtype=like.dtype, device=like.device)
        if clean is None:
            u = normal(plan.batch, len(information))
        else:
            u = clean[torch.randint(len(clean), (plan.batch,), generator=generator, device=like.device)]
        u = u * torch.exp(network.contrast * normal(plan.batch, 1))
        s = information / n
        observed = s.sqrt() * u + normal(*s.shape)
        bound = evidence_bound(network(observed, s), observed, s, scene.n, network.contrast, generator)
        return -bound.mean() / s.shape[1]

    return fit(network, plan, loss, state, resume, progress)


@torch.no_grad()
def _coordinates(scene: Scene, volumes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Coordinates (volume, direction) that the images of volumes have: lambda^-1/2 times what is observed of them."""
    shape = tuple(scene.sight.physics.volume_shape)
    if not volumes or any(tuple(volume.shape) != shape for volume in volumes):
        found = [tuple(volume.shape) for volume in volumes]
        raise ValueError(f"train_amortised: expected one volume or more of the shape {shape}, got {found}.")
    vectors = scene.directions.vectors
    seen = [scene.observed(scene.sight.physics.A(volume.to(vectors)[None, None])) for volume in volumes]
    return torch.cat(seen) * scene.information.rsqrt().to(vectors)
