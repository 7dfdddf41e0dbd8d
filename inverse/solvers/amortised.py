"""The posterior of volumes by a network that was taught once: what `variational` finds for one set of images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from inverse.physics.base import TiltPhysics
from inverse.priors.amortised import AmortisedGaussian, Coordinates, evidence_bound
from inverse.solvers.gaussian_law import LowRankGaussian, StationaryPrior
from inverse.solvers.informed import Directions, Sight, checked, informed_directions
from inverse.solvers.variational import Variational


class Scene(NamedTuple):
    """One operator and prior, and what images of any noise n times `sight.noise` tell of.

    Attributes
    ----------
    sight : Sight
        Its noise is that of n = 1.
    directions : Directions
    """

    sight: Sight
    directions: Directions

    @property
    def information(self) -> torch.Tensor:
        """lambda (direction,) at n = 1."""
        return self.directions.information

    @property
    def n(self) -> int:
        """Number of white coordinates."""
        return self.sight.prior.spectrum.numel()

    def observed(self, images: torch.Tensor) -> torch.Tensor:
        """lambda^-1/2 W^T L^T A^T N^-1 y (batch, direction) of images (batch, 1, tilt, y, x).

        In the directions' type.
        """
        back = self.sight.adjoint(self.sight.whitened(images)).flatten(1).to(self.directions.vectors)
        return back @ self.directions.vectors.T * self.information.rsqrt().to(back)


def scene(
    physics: TiltPhysics,
    prior: StationaryPrior,
    *,
    noise: torch.Tensor | None = None,
    rank: int = 256,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    """What a network is taught on and used with.

    Parameters
    ----------
    physics : TiltProjection, ContrastProjection or DeformedProjection
    prior : StationaryPrior
    noise : tensor (tilt,), optional
        Variance of a pixel at n = 1; 1 for all when left out.
    rank : int
        Most directions. What the others tell is lost to the network: take as many as the images have Fourier samples
        that are not drowned in noise.
    generator : torch.Generator
        Of the operator's device.
    dtype : torch.dtype
        In which the directions are kept.

    Raises
    ------
    ValueError
        For a prior or noise that does not fit, or a rank below 1.
    """
    like = torch.empty(0, dtype=dtype, device=physics.angles.device)
    tilts = physics.angles.shape[-1]
    empty = like.new_zeros(1, 1, tilts, *physics.image_shape)
    _, variance, _ = checked("scene", physics, empty, 1.0 if noise is None else noise)
    if prior.shape != tuple(physics.volume_shape) or rank < 1:
        raise ValueError(
            f"scene: expected a prior of volumes {tuple(physics.volume_shape)} and a rank of 1 or more, got "
            f"{prior.shape} and {rank}."
        )
    with torch.no_grad():
        sight = Sight(physics, prior, variance)
        return Scene(sight, informed_directions(sight, rank, generator, like))


@torch.no_grad()
def amortised(
    scene: Scene,
    images: torch.Tensor,
    network: AmortisedGaussian,
    noise: float,
    *,
    generator: torch.Generator,
    draws: int = 16,
) -> Variational:
    """Gaussian law of the volume in one pass of a network.

    Parameters
    ----------
    scene : Scene
    images : tensor (tilt, y, x) or (batch, 1, tilt, y, x)
    network : AmortisedGaussian
        Taught on this scene by `train_amortised`.
    noise : float
        n: variance of a pixel over that of the scene.
    generator : torch.Generator
    draws : int
        For the bound, where the contrast is uncertain.

    Returns
    -------
    Variational
        Its `information` is at this noise.

    Raises
    ------
    ValueError
        For images that do not fit, or noise that is not positive.
    """
    if not 0 < noise < math.inf:
        raise ValueError(f"amortised: expected a positive, finite noise, got {noise}.")
    sight = scene.sight
    batch, _, flat = checked("amortised", sight.physics, images, sight.noise)
    observed = scene.observed(batch) / noise**0.5
    information = (scene.information / noise).to(observed).expand(len(batch), -1)
    weight = next(network.parameters())
    told = network(observed.to(weight), information.to(weight))
    wide = Coordinates(*(part.double() for part in told))
    law = _law(scene, wide)
    values = torch.stack(
        [
            evidence_bound(wide, observed.double(), information.double(), scene.n, network.contrast, generator)
            for _ in range(draws)
        ]
    )
    # of the images, what no direction explains is noise alone
    variance = (noise * sight.noise).expand(batch.shape[2])
    square = (batch.double() ** 2 / variance[:, None, None]).flatten(1).sum(1) - observed.double().square().sum(1)
    pixels, tilts = batch[0, 0, 0].numel(), batch.shape[2]
    constant = pixels * variance.log().sum() + (pixels * tilts - observed.shape[1]) * math.log(2 * math.pi)
    bound = values.mean(0) - 0.5 * (square + constant)
    error = values.std(0) / draws**0.5
    mean, std = law.voxel_mean().to(batch), law.voxel_std().to(batch)
    found = Variational(mean, std, bound, error, bound.new_zeros(0, len(bound)), information[0], law)
    if not flat:
        return found
    return found.replace(
        mean=mean[0, 0], std=std[0, 0], elbo=bound[0], elbo_error=error[0], history=found.history[:, 0]
    )


def _law(scene: Scene, told: Coordinates) -> LowRankGaussian:
    """The law of the white coordinates, in the directions' type."""
    vectors, shape = scene.directions.vectors, scene.sight.prior.spectrum.shape
    mean, log_variance, rest = (part.to(vectors) for part in told)
    diagonal = rest.exp()[:, None, None, None, None].expand(-1, 1, *shape).contiguous()
    gains = (rest[:, None] - log_variance).expm1()
    placed = (mean @ vectors).reshape(len(mean), 1, *shape)
    return LowRankGaussian(scene.sight.prior, placed, diagonal, vectors.expand(len(mean), -1, -1), gains)
