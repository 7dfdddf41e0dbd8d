"""What a network can be taught by images alone: losses whose expectation is that of losses with the truth, and more.

The network D restores a first volume L y, damped least squares of images y = A x + n; R(y) is D(L y). Each loss
compares it with images that it has not seen, by the misfit M of `inverse.self_supervised_problem`, (1) there, a weighed
square of A v - y. If y2 is independent of y1, then whatever the weights, and whatever D,

    E M(R(y1), y2) = E M(R(y1), A x) + E n2^T N^(-1/2) H N^(-1/2) n2,                                      (2)

and the last term does not know D: gradients are those of a loss with the truth, weighed by A^T H A. It is blind to what
no tilt sees. That, only equivariance and missing wedges teach: molecules lie any way round, so what one tilt series
lacks of one molecule it shows of another.

Sources: Noise2Noise, Lehtinen et al. 2018, arXiv:1803.04189, and on tomograms Buchholz et al. 2019,
arXiv:1810.05420; independent parts of one Gaussian measurement, Pang et al. 2021 (CVPR), and
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

from inverse.physics.tilt import TiltProjection
from inverse.priors.wrappers import Turn, rotated, rotated_back, rotations
from inverse.rotate import fitted_box
from inverse.self_supervised_problem import Problem
from inverse.solvers.linear import least_squares


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
        return self.problem.split(self.generator, self.problem.one(self.generator))

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
    images = draw.problem.images[draw.problem.one(draw.generator)]
    kept = kept_tilts(images.shape[2], draw.generator).to(images.device)
    return draw.problem.misfit(draw.restore(of_tilts(images, kept)), images, ~kept)


def equivariance_by(transform: Callable[[torch.Tensor], torch.Tensor] | None = None, *, through: bool = False) -> Loss:
    """|R(A v' + n) - v'|^2 with v' = T R(y1), T a rotation: a turned specimen is restored as well as it stood before.

    What T turns out of the box is cut off, and the images are those of what is left.

    Parameters
    ----------
    transform : callable, optional
        T of volumes (batch, 1, z, y, x), such as `inverse.rotate.Rotate3D`; one of the 23 turns of the cube, which
        interpolate nothing, when left out.
    through : bool
        Let gradients go through v', too, as Chen et al. do. Then v' may come nearer to R(A v' + n) as well, which it
        does by being smoother; where noise is strong that outweighs the data.
    """

    def loss(draw: Draw) -> torch.Tensor:
        if transform is None:
            turned = rotated(draw.restored, _turn(draw.generator))
        else:
            turned = transform(draw.restored)
        turned = turned if through else turned.detach()
        turned = fitted_box(turned, draw.problem.physics.volume_shape)
        return draw.problem.apart(draw.restore(draw.problem.noisy(turned, draw.generator)), turned)

    return loss


def missing_wedge(draw: Draw) -> torch.Tensor:
    """M of a volume that holds T^-1 D(L' A' T c), c a cube of the first volume of one part, against the other part.

    A' and L' are projection and least squares of the cube: they take the same wedge, in another direction, from a
    volume that has lost one already, and the network is asked for what the first wedge has not. Around the cube stands
    R(y1), without gradients, where a box is no cube. In the two sources the other part is compared as a volume; as
    images its noise is white, and its contrast whole.
    """
    problem = draw.problem
    shape = problem.physics.volume_shape
    turn, around = _turn(draw.generator), draw.restored.detach().clone()
    with torch.no_grad():
        edge = min(shape)
        corner = [int(torch.randint(n - edge + 1, (), generator=draw.generator)) for n in shape]
        box = (..., *(slice(c, c + edge) for c in corner))
        cube = TiltProjection(problem.physics.angles[0].detach(), (edge, edge, edge))
        turned = rotated(problem.first(draw.parts[0])[box], turn).contiguous()
        shown = least_squares(cube, cube.A(turned), 1e-2 * cube.squared_norm(), open_sides=True)
        around[box] = 0
    pads = [size for c, n in zip(reversed(corner), reversed(shape), strict=True) for size in (c, n - c - edge)]
    found = rotated_back(draw.network(shown, problem.level), turn)
    return problem.misfit(around + torch.nn.functional.pad(found, pads), draw.parts[1])


LOSSES: dict[str, Loss] = {
    "noise2noise": noise2noise,
    "tilt_splitting": tilt_splitting,
    "equivariance": equivariance_by(),
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


def _turn(generator: torch.Generator) -> Turn:
    """One of the 23 rotations of the cube that are not the identity."""
    turns = rotations()[1:]
    return turns[int(torch.randint(len(turns), (), generator=generator))]
