"""What deepinv's losses ask of their surroundings, in three dimensions: rotations of volumes, and masks of tilts.

deepinv's own rotations take a volume for a film and turn its frames in their plane, and its splitting masks are those
of one image, the same in every tilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from deepinv.physics.generator import BernoulliSplittingMaskGenerator
from deepinv.transform.base import Transform, TransformParam

from cryosim.core.rotation import random_rotations
from inverse.physics.turn import turned_planes
from inverse.priors.wrappers import Turn, rotated, rotations


class Rotate3D(Transform):
    """Volumes (batch, channel, z, y, x) turned at random about their centre, with deepinv's `EILoss` and the like.

    A rotation R of SO(3) is the rotation C of the cube that is nearest, which only reorders samples, and what is left,
    R C^-1, at most 63 degrees about some axis, as turns in the planes (y, x), (z, x) and (z, y), each by band-limited
    shears (`inverse.physics.turn`). Differentiable. What leaves the box is cut off, and what comes in is empty. The
    inverse is that of the rotation: exact in the cube for boxes with three equal sides, else but for the edges.

    Parameters
    ----------
    group : {"cube", "any"}
        The 24 rotations of the cube, about the middle of the box, or all of SO(3), uniformly, about sample n // 2.
    n_trans : int
        Rotations in one call, one behind the other along the batch.
    rng : torch.Generator, optional

    Raises
    ------
    ValueError
        For another group, or a tensor that is not of volumes.

    Notes
    -----
    The parameter `rotation` (n_trans, 3, 3) acts on columns (x, y, z).
    """

    def __init__(
        self, group: Literal["cube", "any"] = "cube", n_trans: int = 1, rng: torch.Generator | None = None
    ) -> None:
        super().__init__(n_trans=n_trans, rng=torch.Generator() if rng is None else rng, flatten_video_input=False)
        if group not in ("cube", "any"):
            raise ValueError(f'Rotate3D: expected the group "cube" or "any", got {group!r}.')
        self.group = group

    def _get_params(self, x: torch.Tensor) -> dict:
        if self.group == "cube":
            turns = rotations()
            drawn = torch.randint(len(turns), (self.n_trans,), generator=self.rng, device=self.rng.device)
            matrices = torch.stack([_matrix(turns[int(i)]).flip(0, 1) for i in drawn])
        else:
            matrices = random_rotations(self.n_trans, generator=self.rng)
        return {"rotation": TransformParam(matrices, neg=lambda matrix: matrix.mT)}

    def _transform(self, x: torch.Tensor, rotation: torch.Tensor | None = None, **_) -> torch.Tensor:
        if x.ndim != 5 or rotation is None:
            raise ValueError(f"Rotate3D: expected volumes (batch, channel, z, y, x), got {tuple(x.shape)}.")
        given = torch.as_tensor(rotation).as_subclass(torch.Tensor).double().reshape(-1, 3, 3)
        return torch.cat([turned_by(x, one, exact=self.group == "cube") for one in given])


class TiltMaskGenerator(BernoulliSplittingMaskGenerator):
    """Masks (batch, 1, tilt, y, x) that keep whole tilts, for deepinv's `SplittingLoss`.

    Parameters
    ----------
    img_size : (int, int, int, int)
        (1, tilt, y, x).
    split_ratio : float
        Share of the tilts that are kept; at least one is, and at least one is not.
    rng : torch.Generator, optional

    Raises
    ------
    ValueError
        For a share that is not between 0 and 1, or fewer than two tilts.
    """

    def __init__(
        self, img_size: tuple[int, int, int, int], split_ratio: float = 0.75, rng: torch.Generator | None = None
    ) -> None:
        if len(img_size) != 4 or img_size[1] < 2 or not 0 < split_ratio < 1:
            raise ValueError(
                "TiltMaskGenerator: expected (1, tilt, y, x) of two tilts or more, and a share between 0 and 1, got "
                f"{img_size} and {split_ratio}."
            )
        super().__init__(img_size, split_ratio, rng=rng)  # type: ignore[arg-type]

    def batch_step(self, input_mask: torch.Tensor | None = None, img_size: tuple | None = None) -> dict:
        """One mask (1, tilt, y, x); of an `input_mask`, what is left of it."""
        n = tuple(self.img_size)[1]
        left_out = min(max(round(n * (1 - float(self.split_ratio))), 1), n - 1)
        mask = torch.ones(self.img_size, **self.factory_kwargs)  # type: ignore[arg-type]
        mask[:, torch.randperm(n, generator=self.rng, device=self.rng.device)[:left_out]] = 0
        return mask if input_mask is None else mask * input_mask  # type: ignore[return-value]


def turned_by(volume: torch.Tensor, matrix: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """Volumes (..., z, y, x) of which what was at r stands at `matrix` (3, 3) r, r = (x, y, z), in a box of its shape.

    About sample n // 2; with `exact`, for rotations of the cube, about the middle of the box, between two samples where
    a side is even.
    """
    shape = volume.shape[-3:]
    r = matrix.detach().double().cpu().flip(0, 1)  # on (z, y, x)
    turn = max(rotations(), key=lambda one: float((r * _matrix(one)).sum()))
    if exact:
        return fitted_box(rotated(volume, turn), shape)
    volume = rotated(volume, turn)
    volume = volume.roll([1 - volume.shape[axis - 3] % 2 for axis in turn[1]], [axis - 3 for axis in turn[1]])
    left = r @ _matrix(turn).T
    angles = torch.stack([left[2, 1].atan2(left[2, 2]), left[2, 0].clamp(-1, 1).asin(), left[1, 0].atan2(left[0, 0])])
    for (row, column), angle in zip(((-2, -1), (-3, -1), (-3, -2)), torch.rad2deg(angles), strict=True):
        planes = volume.movedim((row, column), (-2, -1))
        planes = turned_planes(planes, angle.to(volume.device), planes.shape[-2], planes.shape[-1])
        volume = planes.movedim((-2, -1), (row, column))
    return fitted_box(volume, shape)


def fitted_box(volume: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Volume (..., z, y, x) cut, or padded with zeros, to a shape, about its centre n // 2."""
    pads: list[int] = []
    for n, old in zip(reversed(shape), reversed(volume.shape[-3:]), strict=True):
        before = n // 2 - old // 2
        pads += [before, n - old - before]
    return torch.nn.functional.pad(volume, pads).contiguous()


def _matrix(turn: Turn) -> torch.Tensor:
    """Of `rotated`, on columns (z, y, x)."""
    order, backwards = turn
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    for new, old in enumerate(order):
        matrix[new, old] = -1.0 if new in backwards else 1.0
    return matrix
