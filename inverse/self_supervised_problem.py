"""What is worked out once of images whose truth is not known, and the misfit that losses without truth are made of.

For a volume v and images y with noise of variances N,

    M(v, y) = (A v - y)^T N^(-1/2) H N^(-1/2) (A v - y),    H = 1 / (mu(u) + lambda),                      (1)

u the frequency along a row of an image. With mu the eigenvalues of A A^T and lambda = N / s^2, s^2 the variance of a
voxel, H^(-1) is about the covariance of the images: an error of the volume counts alike at all frequencies that are
measured, in place of as often as tilts meet there. mu is taken as 1 / (u step), step the mean angle between two tilts,
between the depth and the depth times the number of tilts, as it is for many tilts of a thin slab. Of an operator of
another unit, or with a lens, it is scaled to its norm. What is learned does not hang on this: see (2) in
`inverse.self_supervised_losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch

from inverse.physics.base import TiltPhysics
from inverse.physics.tilt import TiltProjection
from inverse.solvers.linear import as_batch, least_squares
from inverse.solvers.whitened import Whitened

Split = Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]


class Problem:
    """Images of which the truth is not known, and what is worked out of them once.

    Parameters
    ----------
    physics : TiltPhysics
    images : tensor (tilt, y, x) or (batch, 1, tilt, y, x)
        Each of the batch one tilt series.
    noise : float or tensor (tilt,)
        Variance of a pixel.
    strength : float
        a of `coupled`.
    split : callable, optional
        generator -> two independent sets of images, of variances (1 + a^2) noise and (1 + a^-2) noise; `coupled` of the
        images when left out.

    Attributes
    ----------
    variance : float
        s^2, of a voxel [square of the unit of the volume].
    level : float
        Deviation of first volumes from the truth, were that white: noise, and what no tilt sees [unit of the volume].

    Raises
    ------
    ValueError
        For images or noise that do not fit, more than one channel, or a strength that is not positive.
    """

    def __init__(
        self,
        physics: TiltPhysics,
        images: torch.Tensor,
        noise: float | torch.Tensor,
        *,
        strength: float = 0.5,
        split: Split | None = None,
    ) -> None:
        self.images, self.flat = as_batch(physics, images)
        if self.images.shape[1] != 1:
            raise ValueError(f"images: expected one channel, (batch, 1, tilt, y, x), got {tuple(images.shape)}.")
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength: expected a positive number, got {strength}.")
        self.physics, self.strength, self._split = physics, strength, split
        self.seen = Whitened(physics, noise, self.images)
        self.deviation = self.seen.std.expand(self.images.shape[2], 1, 1)  # (tilt, 1, 1)
        self.mean_noise = float(self.deviation.double().square().mean())
        self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        random = torch.Generator().manual_seed(0)
        white = torch.randn(1, 1, *self.physics.volume_shape, generator=random, dtype=torch.float64).to(self.images)
        power = float(self.physics.A(white.expand(len(self.images), *white.shape[1:])).square().mean())
        if not power > 0:
            raise ValueError("physics: expected an operator that sees the volume; its images of one are all 0.")
        noise = self.deviation.double().square().reshape(-1, 1, 1)
        self.variance = isotropic_variance(self.images.double(), noise) / power
        drawn = self.variance**0.5 * white
        seen = self.noisy(drawn.expand(len(self.images), *white.shape[1:]), random)
        self.level = float((self.first(seen) - drawn).double().square().mean().sqrt())

    def first(self, images: torch.Tensor) -> torch.Tensor:
        """L images: damped least squares (batch, 1, z, y, x), in closed form where the operator has one."""
        damping = self.mean_noise / self.variance
        return least_squares(self.physics, images, damping, open_sides=_is_plain(self.physics))  # type: ignore[arg-type]

    def split(self, generator: torch.Generator, which: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Two independent sets of images (item, 1, tilt, y, x) of some of the series."""
        if self._split is None:
            return coupled(self.images[which], self.deviation, self.strength, generator)
        first, second = (as_batch(self.physics, part)[0].to(self.images) for part in self._split(generator))
        return first[which], second[which]

    def one(self, generator: torch.Generator) -> slice:
        """One of the series, at random."""
        i = int(torch.randint(len(self.images), (), generator=generator))
        return slice(i, i + 1)

    def noisy(self, volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Images of a volume, with noise of the variance of first sets of images."""
        white = white_like(self.images[: len(volume)], generator)
        return self.physics.A(volume) + (1 + self.strength**2) ** 0.5 * self.deviation * white

    def misfit(self, volume: torch.Tensor, images: torch.Tensor, tilts: torch.Tensor | None = None) -> torch.Tensor:
        """M of equation (1) over s^2 N and the number of voxels, (), of all tilts or of those that `tilts` (tilt,) has.

        It is that of the given images, noise and all: the noise's part is not known to the network and stays.
        """
        residual = (self.physics.A(volume) - images) / self.deviation * self.mean_noise**0.5
        if tilts is not None:
            residual = residual * tilts.to(residual)[:, None, None] * (len(tilts) / tilts.sum())
        return weighed_power(residual, self.weight) / (self.variance * volume.numel())

    @cached_property
    def weight(self) -> torch.Tensor:
        """H (u,) [1/voxel^2], of images as the operator has them."""
        return image_weight(self.physics, self.mean_noise / self.variance)

    def apart(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """|a - b|^2 over s^2 and the number of voxels, ()."""
        return (a - b).square().mean() / self.variance


def isotropic_variance(images: torch.Tensor, noise: torch.Tensor) -> float:
    """Variance of a voxel, of isotropic volumes of which the images show one layer [square of the images' unit].

    An image has the spectrum of its central section, so the mean over the frequencies of a volume, with its k^2 dk, is
    that over the frequencies q of the images, weighed by q; of the cube, a sphere of radius 1/2 holds pi / 6. A
    hundredth of what the noise has is the least.

    Parameters
    ----------
    images : tensor (..., tilt, y, x)
    noise : tensor (tilt, 1, 1)
        Variance of a pixel.
    """
    ny, nx = images.shape[-2:]
    ky, kx = (torch.fft.fftfreq(n, dtype=images.dtype, device=images.device) for n in (ny, nx))
    q = (ky[:, None].square() + kx.square()).sqrt()
    q = q * (q < 0.5)
    power = torch.fft.fft2(images, norm="ortho").abs().square() - noise
    mean = (power * q).sum((-2, -1)) / q.sum().clamp_min(1e-9)
    return math.pi / 6 * max(float(mean.mean()), 0.01 * float(noise.mean()))


def weighed_power(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum over images (..., x) and frequencies u of `weight` (u,) times |spectrum|^2, ()."""
    spectrum = torch.fft.rfft(images, norm="ortho")
    squares = spectrum.real.square() + spectrum.imag.square()
    pairs = torch.full_like(squares[(0,) * (squares.ndim - 1)], 2.0)  # of +u and -u
    pairs[0] = 1.0
    if images.shape[-1] % 2 == 0:
        pairs[-1] = 1.0
    return (squares * (pairs * weight.to(pairs))).sum()


def image_weight(physics: TiltPhysics, damping: float) -> torch.Tensor:
    """H (u,) of equation (1), float64, for frequencies u of `torch.fft.rfft` of the image rows."""
    angles = physics.angles[0].detach().double()
    depth, width, n = physics.volume_shape[0], physics.image_shape[1], len(angles)
    step = float(torch.deg2rad(angles.max() - angles.min())) / max(n - 1, 1)
    u = torch.fft.rfftfreq(width, dtype=torch.float64, device=angles.device)
    often = (1 / (u * max(step, 1e-3)).clamp_min(1e-9)).clamp(depth, n * depth)
    scale = float(physics.squared_norm()) / (n * depth)  # of the operator's own unit, whatever lens or norm it has
    return 1 / (often * scale + damping)


def coupled(
    images: torch.Tensor, deviation: torch.Tensor, strength: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """y + a w and y - w / a, with w as the noise of y: independent, of (1 + a^2) and (1 + a^-2) times its variance.

    Their covariance is N - N = 0. w may be drawn anew in each step: the mean over w of a loss (2) has the same
    expectation as with one w, and less variance (Rao 1945, Blackwell 1947); as a falls to 0 it tends to Stein's
    unbiased estimate of the risk (Oliveira, Lei & Tibshirani 2024).
    """
    w = deviation * white_like(images, generator)
    return images + strength * w, images - w / strength


def _is_plain(physics: TiltPhysics) -> bool:
    """Whether `least_squares` with open sides has a closed form for the operator."""
    if type(physics) is not TiltProjection:
        return False
    try:
        return physics.geometry.grid == "camera"
    except ValueError:
        return False


def white_like(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """White noise of variance 1 in the shape, type and place of images."""
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)
