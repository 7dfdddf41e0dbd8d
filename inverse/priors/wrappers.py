"""Denoisers made of denoisers: tile by tile, in other units, and equal in all orientations.

Each is a deepinv `Denoiser` D(x, sigma) of volumes (batch, 1, z, y, x), sigma a number or one for each of the batch. It
carries on what the denoiser inside was trained for: `voxel_size` [Å], where that has one, and `noise_levels`, the
lowest and the highest.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from deepinv.models.base import Denoiser

Group = Literal["cube", "beam"]
Turn = tuple[tuple[int, int, int], tuple[int, ...]]


def known_levels(denoiser: torch.nn.Module) -> tuple[float, float]:
    """Lowest and highest noise level that a denoiser was made for; 0 and infinity where it does not tell."""
    low, high = getattr(denoiser, "noise_levels", (0.0, math.inf))
    return float(low), float(high)


class _Around(Denoiser):
    """What holds a denoiser and speaks for it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.noise_levels = known_levels(denoiser)
        if hasattr(denoiser, "voxel_size"):
            self.voxel_size = denoiser.voxel_size


class Affine(_Around):
    """A denoiser of values between 0 and 1, for volumes between `low` and `high`.

    With w = high - low, D'(v, s) = low + w D((v - low) / w, s / w): the denoiser meets what it was made for, and what
    measures the volume keeps its unit. If D is the posterior mean of some volumes u, D' is that of low + w u.

    Parameters
    ----------
    denoiser : Denoiser
    low, high : float
        What the denoiser is to see as 0 and as 1 [V]; values beyond them are not cut.

    Raises
    ------
    ValueError
        Unless both are finite and low < high.
    """

    def __init__(self, denoiser: Denoiser, low: float, high: float) -> None:
        super().__init__(denoiser)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"low, high: expected two finite numbers, the lower one first, got {low} and {high}.")
        self.low, self.width = float(low), float(high) - float(low)
        lowest, highest = self.noise_levels
        self.noise_levels = (lowest * self.width, highest * self.width)

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **_) -> torch.Tensor:
        """D'(x, sigma), both in the unit of `low` and `high`."""
        return self.low + self.width * self.denoiser((x - self.low) / self.width, sigma / self.width)


class Tiled(_Around):
    """A denoiser of limited reach, applied part by part: a volume of any size in the memory of one tile.

    A tile is denoised together with `halo` voxels around it, of which nothing is kept: where the denoiser reaches no
    farther, the result is that of the whole volume, and there is nothing to blend. No volume is padded: a tile at an
    edge of the volume has no halo there, and meets the edge as the whole volume would.

    Networks that halve their grid n times treat the samples of a block of 2^n differently. So what a tile is denoised
    with begins at a multiple of `step`, and ends at one unless the volume ends before; with `step` = 2^n, or a multiple
    of it, the tiles see the same grid as the whole.

    Parameters
    ----------
    denoiser : Denoiser
    tile : int or (int, int, int)
        Largest size (z, y, x) of what is kept of a tile [voxel], multiples of `step`.
    halo : int
        At least how far the denoiser reaches [voxel].
    step : int
        [voxel].

    Raises
    ------
    ValueError
        For sizes that are not positive, or tiles that are not multiples of the step.
    """

    def __init__(self, denoiser: Denoiser, tile: int | tuple[int, int, int], halo: int, *, step: int = 8) -> None:
        super().__init__(denoiser)
        depth, rows, width = (tile,) * 3 if isinstance(tile, int) else tile
        if step < 1 or halo < 0:
            raise ValueError(f"step, halo: expected 1 or more and 0 or more, got {step} and {halo}.")
        if min(depth, rows, width) < 1 or any(n % step for n in (depth, rows, width)):
            raise ValueError(f"tile: expected positive multiples of the step, {step}, got {(depth, rows, width)}.")
        self.tile, self.halo, self.step = (depth, rows, width), halo, step

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **_) -> torch.Tensor:
        """D(x, sigma) of volumes (batch, channel, z, y, x), one tile of one item at a time."""
        if x.ndim != 5:
            raise ValueError(f"Tiled: expected volumes (batch, channel, z, y, x), got {tuple(x.shape)}.")
        levels = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(len(x))
        out = torch.empty_like(x)
        along = [list(self._parts(n, tile)) for n, tile in zip(x.shape[2:], self.tile, strict=True)]
        for i, parts in itertools.product(range(len(x)), itertools.product(*along)):
            core, seen, inside = zip(*parts, strict=True)
            found = self.denoiser(x[i : i + 1, :, *seen], levels[i : i + 1])
            out[i : i + 1, :, *core] = found[:, :, *inside]
        return out

    def _parts(self, n: int, tile: int):
        """Of an axis of n voxels: what is kept of each tile, what it is denoised with, and the former in the latter."""
        size = self._up(math.ceil(n / math.ceil(n / tile)))  # as few tiles, and of one size
        for start in range(0, n, size):
            stop = min(start + size, n)
            first, last = max(start - self._up(self.halo), 0), min(self._up(stop + self.halo), n)
            yield slice(start, stop), slice(first, last), slice(start - first, stop - first)

    def _up(self, n: int) -> int:
        """The next multiple of the step."""
        return -(-n // self.step) * self.step


class Equivariant(_Around):
    """A denoiser that treats a volume alike however it lies: the mean over turns g of g^-1 D(g x).

    Molecules lie in the ice any way round, and white noise has no direction: the best estimate of a turned volume is
    the best estimate, turned. A trained network obeys that only roughly. The mean obeys it exactly, loses the errors
    that depend on the orientation, and steadies the iterations of plug and play (Terris et al. 2024,
    doi:10.1109/CVPR52733.2024.02386). Only proper rotations serve: molecules are chiral, and a mirror would denoise an
    alpha helix with what is known of left-handed ones.

    Parameters
    ----------
    denoiser : Denoiser
        Of volumes of any shape, since a turn may exchange the axes.
    group : {"cube", "beam"}
        "cube": the 24 rotations of a cube. "beam": the 4 about z, where the volume, or what it was trained on, is not
        alike along the beam and across it, as with membranes that lie in the plane of the ice.
    generator : torch.Generator, optional
        Draws one turn for each call, at the cost of the denoiser itself, instead of the mean over all. The volumes then
        do not settle, but for their average.

    Raises
    ------
    ValueError
        For another group.
    """

    def __init__(self, denoiser: Denoiser, group: Group = "cube", generator: torch.Generator | None = None) -> None:
        super().__init__(denoiser)
        if group not in ("cube", "beam"):
            raise ValueError(f'group: expected "cube" or "beam", got {group!r}.')
        turns = rotations()
        self.turns: list[Turn] = [t for t in turns if t[0][0] == 0 and 0 not in t[1]] if group == "beam" else turns
        self.generator = generator

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **_) -> torch.Tensor:
        """The mean, or one draw, over turns of volumes (batch, channel, z, y, x)."""
        if self.generator is not None:
            which = torch.randint(len(self.turns), (), generator=self.generator, device=self.generator.device)
            return self._turned(x, sigma, self.turns[int(which)])
        total = torch.zeros_like(x)
        for turn in self.turns:
            total = total + self._turned(x, sigma, turn)
        return total / len(self.turns)

    def _turned(self, x: torch.Tensor, sigma: float | torch.Tensor, turn: Turn) -> torch.Tensor:
        return rotated_back(self.denoiser(rotated(x, turn).contiguous(), sigma), turn)


def rotations() -> list[Turn]:
    """The 24 rotations of a cube: an order of the axes (z, y, x), and which of them then run backwards.

    A permutation of the axes with some reversed is a rotation where its determinant, the sign of the permutation times
    -1 for each reversal, is 1; else it is a mirror. The first is the identity.
    """
    found: list[Turn] = []
    for order in ((a, b, 3 - a - b) for a, b in itertools.permutations(range(3), 2)):
        swaps = sum(order[i] > order[j] for i, j in itertools.combinations(range(3), 2))
        for n in range(4):
            if (swaps + n) % 2 == 0:
                found += [(order, reversed_) for reversed_ in itertools.combinations(range(3), n)]
    return found


def rotated(x: torch.Tensor, turn: Turn) -> torch.Tensor:
    """Volumes (..., z, y, x), turned about their middle; for an even size that lies between two samples."""
    order, backwards = turn
    leading = range(x.ndim - 3)
    x = x.permute(*leading, *(x.ndim - 3 + axis for axis in order))
    return x.flip([axis - 3 for axis in backwards])


def rotated_back(x: torch.Tensor, turn: Turn) -> torch.Tensor:
    """The inverse of `rotated`."""
    order, backwards = turn
    back = sorted(range(3), key=lambda axis: order[axis])
    x = x.flip([axis - 3 for axis in backwards])
    return x.permute(*range(x.ndim - 3), *(x.ndim - 3 + axis for axis in back))
