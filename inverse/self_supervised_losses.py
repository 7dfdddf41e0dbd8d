"""What a network can be taught by images alone: losses whose expectation is that of losses with the truth, and more.

The network D restores a first volume L y, damped least squares of images y = A x + n with noise of variances N; R(y) is
D(L y). Each loss compares it with images that it has not seen, in the form

    M(v, y) = (A v - y)^T N^(-1/2) H N^(-1/2) (A v - y),    H = 1 / (mu(u) + lambda),                      (1)

u the frequency along a row of an image. With mu the eigenvalues of A A^T and lambda = N / s^2, s^2 the variance of a
voxel, H^(-1) is about the covariance of the images: an error of the volume counts alike at all frequencies that are
measured, in place of as often as tilts meet there. mu is taken as 1 / (u step), step the mean angle between two tilts,
between the depth and the depth times the number of tilts, as it is for infinitely many tilts of a thin slab. Nothing
hangs on this: if y2 is independent of y1, then for any H, and any D,

    E M(R(y1), y2) = E M(R(y1), A x) + E n2^T N^(-1/2) H N^(-1/2) n2,                                      (2)

and the last term does not know D: gradients are those of a loss with the truth, weighed by A^T H A. It is blind to what
no tilt sees. That, only equivariance and missing wedges teach: molecules lie any way round, so what one tilt series
lacks of one molecule it shows of another.

Sources: Noise2Noise, Lehtinen et al. 2018, arXiv:1803.04189, and on tomograms Buchholz et al. 2019,
arXiv:1810.05420; independent parts of one Gaussian measurement, Pang et al. 2021, doi:10.1109/CVPR46437.2021.00208, and
Oliveira, Lei & Tibshirani 2024, arXiv:2111.09447; left-out angles, Hendriksen, Pelt & Batenburg 2020,
doi:10.1109/TCI.2020.3019647; equivariance, Chen, Tachella & Davies 2021, arXiv:2103.14756; missing wedges, Liu et al.
2022, doi:10.1038/s41467-022-33957-8, and Wiesner et al. 2024, doi:10.1038/s41467-024-52421-5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from deepinv.models.base import Denoiser

from inverse.physics.base import TiltPhysics
from inverse.physics.spectral import fitted
from inverse.physics.tilt import TiltProjection
from inverse.priors.wrappers import rotated, rotated_back, rotations
from inverse.solvers.linear import as_batch, least_squares
from inverse.solvers.plug_and_play import Start
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
        Deviation of the noise of a first volume [unit of the volume].

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
        """s^2 by its own fixed point: what a first volume has of variance, less that of its noise."""
        centred = self.images - self.images.mean((-2, -1), keepdim=True)
        self.variance = Start(self.seen, self.seen.whiten(centred)).variance
        random = torch.Generator().manual_seed(0)
        white = torch.randn(self.images.shape, generator=random, dtype=torch.float64).to(self.images)
        for _ in range(3):
            self.level = float(self.first(white * self.deviation).double().var().sqrt())
            both = float(self.first(centred).double().var())
            self.variance = max(both - self.level**2, 0.01 * both)
        self.level = float(self.first(white * self.deviation * (1 + self.strength**2) ** 0.5).double().var().sqrt())

    def first(self, images: torch.Tensor) -> torch.Tensor:
        """L images: damped least squares (batch, 1, z, y, x), in closed form where the operator has one."""
        damping = self.mean_noise / self.variance
        return least_squares(self.physics, images, damping, open_sides=_has_open_sides(self.physics))  # type: ignore[arg-type]

    def split(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Two independent sets of images (batch, 1, tilt, y, x)."""
        if self._split is None:
            return coupled(self.images, self.deviation, self.strength, generator)
        first, second = self._split(generator)
        return as_batch(self.physics, first)[0].to(self.images), as_batch(self.physics, second)[0].to(self.images)

    def noisy(self, volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Images of a volume, with noise of the variance of first sets of images."""
        white = _white(self.images[: len(volume)], generator)
        return self.physics.A(volume) + (1 + self.strength**2) ** 0.5 * self.deviation * white

    def misfit(self, volume: torch.Tensor, images: torch.Tensor, tilts: torch.Tensor | None = None) -> torch.Tensor:
        """M of equation (1) over s^2 N and the number of voxels, (), of all tilts or of those that `tilts` (tilt,) has.

        It is that of the given images, noise and all: the noise's part is not known to the network and stays.
        """
        residual = (self.physics.A(volume) - images) / self.deviation * self.mean_noise**0.5
        if tilts is not None:
            residual = residual * tilts.to(residual)[:, None, None] * (len(tilts) / tilts.sum())
        spectrum = torch.fft.rfft(residual, norm="ortho")
        ends = spectrum.shape[-1] - (residual.shape[-1] + 1) % 2
        squares = spectrum.real.square() + spectrum.imag.square()
        pairs = squares.new_full(squares.shape[-1:], 2.0)  # of +u and -u
        pairs[0] = 1.0
        pairs[ends:] = 1.0
        return (squares * pairs * self.weight.to(squares)).sum() / (self.variance * volume.numel())

    @cached_property
    def weight(self) -> torch.Tensor:
        """H (u,) [1/voxel^2], of images as the operator has them."""
        return image_weight(self.physics, self.mean_noise / self.variance)

    def apart(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """|a - b|^2 over s^2 and the number of voxels, ()."""
        return (a - b).square().mean() / self.variance


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
    w = deviation * _white(images, generator)
    return images + strength * w, images - w / strength


class Draw:
    """What the losses of one step have in common: data, restored once.

    Attributes
    ----------
    network : Denoiser
        D(volume, level).
    problem : Problem
    generator : torch.Generator
    """

    def __init__(self, network: Denoiser, problem: Problem, generator: torch.Generator) -> None:
        self.network, self.problem, self.generator = network, problem, generator

    def restore(self, images: torch.Tensor) -> torch.Tensor:
        """R(images) (batch, 1, z, y, x)."""
        with torch.no_grad():
            first = self.problem.first(images)
        return self.network(first, self.problem.level)

    @cached_property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two independent sets of images of one of the series, (1, 1, tilt, y, x)."""
        first, second = self.problem.split(self.generator)
        one = int(torch.randint(len(first), (), generator=self.generator))
        return first[one : one + 1], second[one : one + 1]

    @cached_property
    def restored(self) -> torch.Tensor:
        """R of the first of them."""
        return self.restore(self.parts[0])


Loss = Callable[[Draw], torch.Tensor]
LossName = Literal["noise2noise", "tilt_splitting", "equivariance", "missing_wedge"]


def noise2noise(draw: Draw) -> torch.Tensor:
    """M(R(y1), y2) of two independent parts of the electrons, or of the noise."""
    return draw.problem.misfit(draw.restored, draw.parts[1])


def tilt_splitting(draw: Draw) -> torch.Tensor:
    """M on tilts that the network was not shown, a fourth of them, drawn at random."""
    one = int(torch.randint(len(draw.problem.images), (), generator=draw.generator))
    images = draw.problem.images[one : one + 1]
    kept = kept_tilts(images.shape[2], draw.generator).to(images.device)
    return draw.problem.misfit(draw.restore(of_tilts(images, kept)), images, ~kept)


def equivariance(draw: Draw) -> torch.Tensor:
    """|R(A v' + n) - v'|^2 with v' = T R(y1), T a rotation: a turned specimen is restored as well as it stood before.

    T is one of the 24 rotations of the cube, which interpolate nothing; what it turns out of the box is cut off, and the
    images are those of what is left. Gradients go through both R.
    """
    turns = rotations()[1:]
    turn = turns[int(torch.randint(len(turns), (), generator=draw.generator))]
    turned = fitted_box(rotated(draw.restored, turn), draw.problem.physics.volume_shape)
    return draw.problem.apart(draw.restore(draw.problem.noisy(turned, draw.generator)), turned)


def missing_wedge(draw: Draw) -> torch.Tensor:
    """|W (T^-1 D(L' A' T v1) - v2)|^2 on cubes of first volumes of two parts, W weighing what the tilts measure.

    A' and L' are projection and least squares of the cube: they take the same wedge, in another direction, from a
    volume that has lost one already. The first volumes are damped, and so are those that D learns to give: with what
    noise drowns, it loses contrast. Noise that the cube is given in addition makes up for what L' A' takes.
    """
    problem = draw.problem
    with torch.no_grad():
        first, second = (problem.first(part) for part in draw.parts)
        edge = min(problem.physics.volume_shape)
        corner = [
            int(torch.randint(n - edge + 1, (), generator=draw.generator)) for n in problem.physics.volume_shape
        ]
        box = (..., *(slice(c, c + edge) for c in corner))
        turns = rotations()[1:]
        turn = turns[int(torch.randint(len(turns), (), generator=draw.generator))]
        cube = TiltProjection(problem.physics.angles[0].detach(), (edge, edge, edge))
        weight = problem.mean_noise / problem.variance
        turned = rotated(first[box], turn).contiguous()
        shown = least_squares(cube, cube.A(turned), 1e-2 * cube.squared_norm(), open_sides=True)
    residual = rotated_back(draw.network(shown, problem.level), turn) - second[box]
    spectrum = torch.fft.rfft(cube.A(residual.contiguous()), norm="ortho")
    shares = image_weight(cube, weight).to(residual)
    squares = spectrum.real.square() + spectrum.imag.square()
    return 2 * (squares * shares).sum() / (problem.variance * residual.numel())


LOSSES: dict[str, Loss] = {
    "noise2noise": noise2noise,
    "tilt_splitting": tilt_splitting,
    "equivariance": equivariance,
    "missing_wedge": missing_wedge,
}


def kept_tilts(n: int, generator: torch.Generator) -> torch.Tensor:
    """Three of four tilts, at random, and at least one of either kind: bool (tilt,)."""
    kept = torch.ones(n, dtype=torch.bool)
    kept[torch.randperm(n, generator=generator)[: max(1, n // 4)]] = False
    return kept


def of_tilts(images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Images (..., tilt, y, x) of some tilts, the others 0, and as much the brighter."""
    return images * kept.to(images)[:, None, None] * (len(kept) / kept.sum())


def fitted_box(volume: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Volume (..., z, y, x) cut, or padded with zeros, to a shape, about its centre n // 2."""
    for axis, n in zip((-3, -2, -1), shape, strict=True):
        volume = fitted(volume, n, axis)
    return volume.contiguous()


def _has_open_sides(physics: TiltPhysics) -> bool:
    """Whether `least_squares` has a closed form for the operator on the camera grid."""
    try:
        geometry = physics.geometry  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False
    return geometry.grid == "camera" and type(physics) is TiltProjection


def _white(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)
