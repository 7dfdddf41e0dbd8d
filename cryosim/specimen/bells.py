"""Points on a grid: each adds a narrow bell around its place, whose transform is known.

The bell is exp(beta (sqrt(1 - (2 x / w)^2) - 1)), w samples wide (Barnett, Magland & af Klinteberg 2019,
doi:10.1137/18M120885X). Of points that lie close together, a product of matrices makes the sum: for those whose bells
begin in one tile of the grid

    patch(y, x, j) = sum_a bell(y - y_a) bell(x - x_a) s_aj

has the bells along y as its left matrix and those along x, each times all strengths, as its right one. A patch is added
to the grid once, where points alone would each add w^d samples to it. Where there are but few points to a tile, every
point is a patch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

BETA = 2.05
"""Shape of the bell per sample of its width; exp(-BETA width) is what the bell leaves out."""

_TILE = {1: 16, 2: 8, 3: 4}  # side [samples], by dimensions
_BLOCK = 16  # points of one tile that are multiplied at once
_CROWDED = 8  # points in a tile, on average, from which on matrices are faster
_AT_ONCE = 2**13  # points, so that all of this stays in the processor's cache


def spread(
    grids: Sequence[torch.Tensor], centres: torch.Tensor, strengths: torch.Tensor, shape: Sequence[int], width: int
) -> None:
    """Add bells to the grids, in place; what reaches beyond an edge comes in again on the other side.

    Parameters
    ----------
    grids : sequence of tensor (j, sample)
        Of samples in the order of an array of `shape`.
    centres : tensor (point, d)
        [samples from the centre], axes as in `shape`.
    strengths : tensor (point, grids * j)
        Of each bell in the first grid, then in the second.
    shape : sequence of int
        Of d axes.
    width : int
        Of a bell [samples].
    """
    if len(centres) == 0:
        return
    for some in torch.arange(len(centres), device=centres.device).split(_AT_ONCE):
        first, bells = _bells(centres[some], shape, width, strengths.dtype)
        corners, patches = _patches(first, bells, strengths[some], shape)
        where = _samples(corners, patches.shape[-1], shape)
        values = patches.movedim(-2, 0).reshape(-1, len(where))
        for grid, mine in zip(grids, values.split(len(grids[0])), strict=True):
            grid.index_add_(1, where, mine)


def bell_tolerance(width: int) -> float:
    """What a bell leaves out, relative to one."""
    return 10 * math.exp(-BETA * width)


def bell_transform(n: int, width: int) -> torch.Tensor:
    """Fourier transform (n,) of the bell [px] at the frequencies of n samples, by Gauss-Chebyshev quadrature."""
    m = 200
    theta = (torch.arange(m, dtype=torch.float64) + 0.5) * torch.pi / m
    z, weights = torch.cos(theta), torch.sin(theta) * torch.pi / m  # integral over -1 < z < 1
    bell = torch.exp(BETA * width * (torch.sin(theta) - 1)) * weights * width / 2
    return torch.cos(torch.pi * width * torch.fft.fftfreq(n, dtype=torch.float64)[:, None] * z) @ bell


def _bells(
    centres: torch.Tensor, shape: Sequence[int], width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """First sample (point, d) of each bell, from 0 on, and the bells (point, d, width)."""
    first = torch.ceil(centres.detach() - width / 2)
    steps = torch.arange(width, dtype=dtype, device=centres.device)
    z = ((first - centres).to(dtype)[:, :, None] + steps) * (2 / width)
    bells = torch.exp(BETA * width * (torch.sqrt((1 - z * z).clamp_min(1e-10)) - 1))
    sides = torch.tensor(shape, device=centres.device)
    return (first.long() + sides // 2) % sides, bells


def _patches(
    first: torch.Tensor, bells: torch.Tensor, strengths: torch.Tensor, shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corners (patch, d) and patches (patch, ..., strength, side) whose sum is that of all points."""
    tile = torch.div(first, _TILE[len(shape)], rounding_mode="floor")
    key = torch.zeros_like(tile[:, 0])
    for mine, n in zip(tile.unbind(1), shape, strict=True):
        key = key * n + mine
    key, order = torch.sort(key, stable=True)
    _, which, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    if len(key) < _CROWDED * len(counts):
        left, right = _factors(bells, strengths)
        return first, (left[:, :, None] * right[:, None]).unflatten(2, (strengths.shape[1], -1))
    blocks = torch.div(counts + _BLOCK - 1, _BLOCK, rounding_mode="floor")
    start = torch.cumsum(blocks, 0) - blocks  # of each tile [blocks]
    begin = torch.cumsum(counts, 0) - counts  # [points]
    seat = torch.arange(len(key), device=key.device) + (start * _BLOCK - begin)[which]
    seated = torch.full((int(blocks.sum()) * _BLOCK,), len(key), device=key.device).index_copy(0, seat, order)
    wide = _in_tiles(first - tile * _TILE[len(shape)], bells)
    left, right = _factors(wide.index_select(0, seated), _and_blank(strengths).index_select(0, seated))
    patches = left.unflatten(0, (-1, _BLOCK)).mT @ right.unflatten(0, (-1, _BLOCK))
    whose = torch.repeat_interleave(torch.arange(len(counts), device=key.device), blocks)
    sums = patches.new_zeros(len(counts), *patches.shape[1:]).index_add(0, whose, patches)
    return tile[order[begin]] * _TILE[len(shape)], sums.unflatten(2, (strengths.shape[1], -1))


def _factors(bells: torch.Tensor, strengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Products (point, ...) of the bells along all axes but the last, and of the strengths with those along it."""
    *across, last = bells.unbind(1)
    left = torch.ones_like(last[:, :1])
    for bell in across:
        left = (left[:, :, None] * bell[:, None]).flatten(1)
    return left, (strengths[:, :, None] * last[:, None]).flatten(1)


def _in_tiles(offset: torch.Tensor, bells: torch.Tensor) -> torch.Tensor:
    """Bells (point + 1, d, tile + width - 1) that begin at an offset (point, d), and an empty one after them."""
    points, d, width = bells.shape
    side = _TILE[d] + width - 1
    row = torch.arange(points * d, device=bells.device).view(points, d) * side + offset
    where = row[:, :, None] + torch.arange(width, device=bells.device)
    blank = bells.new_zeros((points + 1) * d * side)
    return blank.index_copy(0, where.flatten(), bells.flatten()).view(points + 1, d, side)


def _and_blank(strengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([strengths, strengths.new_zeros(1, strengths.shape[1])])


def _samples(corners: torch.Tensor, side: int, shape: Sequence[int]) -> torch.Tensor:
    """Numbers (patch * side^d,) of the samples in patches, wrapped."""
    steps = torch.arange(side, device=corners.device)
    where = torch.zeros_like(corners[:, :1])
    for corner, n in zip(corners.unbind(1), shape, strict=True):
        where = (where[:, :, None] * n + ((corner[:, None] + steps) % n)[:, None]).flatten(1)
    return where.flatten()
