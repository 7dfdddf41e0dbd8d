"""A noise-conditional network in three dimensions: the mean of volumes given one of them with white noise.

D(x, sigma) is trained to be the posterior mean E[v | v + sigma n = x]. By Tweedie's formula (Robbins 1956; Efron 2011,
doi:10.1198/jasa.2011.tm11181) it is a score too, of volumes with that noise:

    grad log p_sigma(x) = (D(x, sigma) - x) / sigma^2.                                                     (1)

The network F works on numbers of variance one whatever sigma (Karras et al. 2022, arXiv:2206.00364, table 1), with s
the deviation of the volumes it was trained on:

    D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma / s) / 4),                                           (2)
    c_skip = s^2 / (sigma^2 + s^2),  c_out = sigma s / sqrt(sigma^2 + s^2),  c_in = 1 / sqrt(sigma^2 + s^2).

F is a U-net whose finest level stands at half the resolution, two voxels along each edge gathered into eight channels
(Shi et al. 2016, doi:10.1109/CVPR.2016.207): a voxel costs an eighth of what it would, and loses nothing. It has no
normalisation across the volume, so that a part of it has the same output alone as among the rest, up to the reach of
the convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from deepinv.models.base import Denoiser
from torch import nn
from torch.nn import functional

_NOISE_FEATURES = 16


class NoiseConditionalUNet(Denoiser):
    """D(x, sigma) of volumes (batch, 1, z, y, x) of any size, in the unit of the volumes it was trained on [V].

    Parameters
    ----------
    widths : sequence of int
        Channels of the levels, the first of voxels twice as large, each next twice as large again.
    blocks : int
        Of two convolutions, at each level on the way down and on the way up.
    scale : float
        s, the deviation of the volumes it is trained on [V].
    voxel_sizes : (float, float)
        The smallest and the largest it is trained on [Å].
    noise_levels : (float, float)
        Likewise, of the noise [V].

    Raises
    ------
    ValueError
        For a volume that is not (batch, 1, z, y, x), or a noise level that is not positive.
    """

    def __init__(
        self,
        widths: Sequence[int] = (48, 96),
        blocks: int = 2,
        scale: float = 1.0,
        voxel_sizes: tuple[float, float] = (10.0, 10.0),
        noise_levels: tuple[float, float] = (0.03, 10.0),
    ) -> None:
        super().__init__()
        self.widths, self.blocks = tuple(widths), blocks
        self.scale, self.voxel_sizes, self.noise_levels = scale, voxel_sizes, noise_levels
        inner = 2 * widths[-1]
        self.told = nn.Sequential(nn.Linear(2 * _NOISE_FEATURES, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU())
        self.enter = nn.Conv3d(8, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_Level(width, blocks, inner) for width in widths)
        self.coarser = nn.ModuleList(nn.Conv3d(8 * a, b, 1) for a, b in pairwise(widths))
        self.finer = nn.ModuleList(nn.Conv3d(b, 8 * a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_Level(width, blocks, inner) for width in widths[:-1])
        self.leave = nn.Conv3d(widths[0], 8, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the constructor: what a weights file has to tell."""
        names = ("widths", "blocks", "scale", "voxel_sizes", "noise_levels")
        return {name: getattr(self, name) for name in names}

    @property
    def multiple(self) -> int:
        """Sizes that need no padding are multiples of it, and tiles that start there see the same grid [voxel]."""
        return 2 ** len(self.widths)

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **_) -> torch.Tensor:
        """D(x, sigma): x (batch, 1, z, y, x) [V]; sigma a number or one for each of the batch [V]."""
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"denoiser: expected volumes (batch, 1, z, y, x), got {tuple(x.shape)}.")
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(len(x))
        if not (level > 0).all():
            raise ValueError(f"denoiser: expected positive noise levels, got {level.tolist()}.")
        level = level[:, None, None, None, None]
        total = (level**2 + self.scale**2).sqrt()
        inside = self._network(x / total, (level / self.scale).log().flatten() / 4)
        return (self.scale / total) ** 2 * x + level * self.scale / total * inside

    def _network(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """F: x (batch, 1, z, y, x), noise (batch,)."""
        shape = x.shape[2:]
        far = [size for n in reversed(shape) for size in (0, -n % self.multiple)]
        x = functional.pad(x, far, mode="replicate") if any(far) else x
        rates = 2.0 ** torch.linspace(-4, 0, _NOISE_FEATURES, dtype=noise.dtype, device=noise.device)
        phases = 2 * math.pi * noise[:, None] * rates
        told = self.told(torch.cat([phases.cos(), phases.sin()], 1))
        h = self.enter(gathered(x).contiguous(memory_format=torch.channels_last_3d))
        passed: list[torch.Tensor] = []
        for level, coarser in zip(self.down, [*self.coarser, None], strict=True):
            h = level(h, told)
            if coarser is not None:
                passed.append(h)
                h = coarser(gathered(h))
        for level, finer in zip(reversed(self.up), reversed(self.finer), strict=True):
            h = level(passed.pop() + spread(finer(h)), told)
        return spread(self.leave(functional.silu(h)))[..., : shape[0], : shape[1], : shape[2]]


class _Level(nn.Module):
    """Residual blocks of one resolution."""

    def __init__(self, width: int, blocks: int, told: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, told) for _ in range(blocks))

    def forward(self, h: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = block(h, told)
        return h


class _Block(nn.Module):
    """h + convolution of a convolution of h, which the noise level scales and shifts channel by channel."""

    def __init__(self, width: int, told: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(width, width, 3, padding=1)
        self.told = nn.Linear(told, 2 * width)
        self.second = nn.Conv3d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, h: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        gain, shift = self.told(told)[:, :, None, None, None].chunk(2, 1)
        scaled = h * (h.square().mean(1, keepdim=True) + 1e-4).rsqrt()  # voxel by voxel, over the channels
        inner = self.first(scaled) * (1 + gain) + shift
        return h + self.second(functional.silu(inner))


def gathered(x: torch.Tensor) -> torch.Tensor:
    """(batch, channel, z, y, x) as (batch, 8 channel, z/2, y/2, x/2): the voxels of each 2 x 2 x 2 side by side."""
    b, c, nz, ny, nx = x.shape
    parts = x.reshape(b, c, nz // 2, 2, ny // 2, 2, nx // 2, 2)
    return parts.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, 8 * c, nz // 2, ny // 2, nx // 2)


def spread(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `gathered`."""
    b, c, nz, ny, nx = x.shape
    parts = x.reshape(b, c // 8, 2, 2, 2, nz, ny, nx).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return parts.reshape(b, c // 8, 2 * nz, 2 * ny, 2 * nx)
