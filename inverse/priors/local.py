"""A network that makes each voxel from its surroundings in the filtered tilts, whatever their number and angles.

A voxel at (x, z) is seen at u = x cos t + z sin t in the image of tilt t. Kishore et al. (CryoLithe, 2025) give the
patches around these places, of ramp-filtered images, to a network that is averaged over the tilts. Here the same is
done for all voxels together, in convolutions and one sparse matrix product:

    1. feature images f_t = F2(c_t; t), by a small network of convolutions shared by the tilts;
    2. for each voxel the sums over t of a(t) f_t(u) and of f_t(u)^2, with learned weights a of the angle: a set has
       no order and any size (Zaheer et al. 2017, arXiv:1703.06114);
    3. volume = (1 + G3) v + s F3, convolutions G3 and F3 of the sums and v in the volume.

c_t is what tilt t adds to the weighted back-projection, s the deviation of the volumes the network is taught on, and v
damped least squares, the best linear estimate of white volumes of that deviation. F3 and G3 are zero before the network
is taught; where there is nothing G3 comes to -1, and the noise of v goes. F2, F3 and G3 are told, tilt by tilt, the
angle, the noise, and what lens and dose have left of the potential.

Measured on unseen molecules at 10 dB, as `weights/local.md` does, the error is below that of back-projection by 1.4 dB
with back-projection for v and without G3, by 2.9 dB with least squares for v, and by 3.7 dB with G3 too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from inverse.priors.denoiser import gathered, spread

MULTIPLE = 4
"""Blocks of rows that start at multiples of it see the same coarse voxels as the whole volume does."""

REACH = 36
"""Rows that a voxel depends on, on either side: 32 through F3 and 4 through F2."""

RINGS = 6
"""Of frequency, as in `cryosim.core.fourier.ring_means`: it is told what lens and dose have left in each."""

_CONDITIONS = 5 + RINGS
_TOLD = 32


class FilteredTilts(NamedTuple):
    """What the network is given of a tilt series, or of a block of its rows.

    Attributes
    ----------
    images : tensor (tilt, y, u)
        c_t, which back-projected and summed are the weighted back-projection [V].
    angles : tensor (tilt,)
        [deg].
    shares : tensor (tilt,)
        Angle that each tilt stands for [rad].
    noise : tensor (tilt,)
        Deviation of the noise of c_t [V].
    transfer : tensor (tilt, ring)
        Share of the potential that an image shows, in each of `RINGS` rings of frequency [1].
    volume : tensor (z, y, x)
        Damped least squares [V].
    """

    images: torch.Tensor
    angles: torch.Tensor
    shares: torch.Tensor
    noise: torch.Tensor
    transfer: torch.Tensor
    volume: torch.Tensor

    def rows(self, first: int, last: int) -> FilteredTilts:
        """Rows first to last - 1."""
        return self._replace(images=self.images[:, first:last], volume=self.volume[:, first:last])


class LocalNetwork(nn.Module):
    """Volume (z, y, x) and the logarithm of its variance, from `FilteredTilts`.

    Parameters
    ----------
    features : int
        Of an image, per pixel.
    width : int
        Channels of the voxels of double size; twice as many of those twice as large again.
    scale : float
        s, the deviation of the volumes it is taught on [V].
    voxel_sizes : (float, float)
        The smallest and the largest it is taught on [Å].
    """

    def __init__(
        self,
        features: int = 8,
        width: int = 32,
        scale: float = 1.0,
        voxel_sizes: tuple[float, float] = (10.0, 10.0),
    ) -> None:
        super().__init__()
        self.features, self.width, self.scale, self.voxel_sizes = features, width, scale, voxel_sizes
        self.told = nn.Sequential(nn.Linear(_CONDITIONS, _TOLD), nn.SiLU(), nn.Linear(_TOLD, _TOLD), nn.SiLU())
        self.first = nn.Conv2d(1, 2 * features, 5, padding=2)
        self.first_told = nn.Linear(_TOLD, 4 * features)
        self.second = nn.Conv2d(2 * features, 2 * features, 3, padding=1)
        self.third = nn.Conv2d(2 * features, features, 3, padding=1)
        self.weight = nn.Linear(_TOLD, features)
        self.enter = nn.Conv3d(8 * (2 * features + 2), width, 3, padding=1)
        self.fine = nn.ModuleList(_Block(width) for _ in range(2))
        self.coarser = nn.Conv3d(8 * width, 2 * width, 1)
        self.coarse = nn.ModuleList(_Block(2 * width) for _ in range(2))
        self.finer = nn.Conv3d(2 * width, 8 * width, 1)
        self.leave = nn.Conv3d(width, 24, 3, padding=1)
        for last in (self.leave.weight, self.leave.bias):
            nn.init.zeros_(last)  # type: ignore[arg-type]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the constructor: what a weights file has to tell."""
        return {name: getattr(self, name) for name in ("features", "width", "scale", "voxel_sizes")}

    def forward(self, tilts: FilteredTilts) -> tuple[torch.Tensor, torch.Tensor]:
        """Volume (z, y, x) [V] and the logarithm of its variance (z, y, x) [ln V^2]."""
        n_tilts = len(tilts.angles)
        noise = tilts.noise.square().sum()  # of the back-projection
        total = (self.scale**2 + noise).sqrt()
        told = self.told(self._conditions(tilts, total))  # (tilt, told)
        features = self._features(tilts.images[:, None] * (n_tilts**0.5 / total), told)
        weighted = features * (1 + self.weight(told)[:, :, None, None])
        sums, seen = pooled(torch.cat([weighted, features.square()], 1), tilts.angles, tilts.volume.shape)
        linear, squares = sums.split(self.features)
        seen_by = seen.clamp_min(1)
        inside = [linear / seen_by.sqrt(), squares / seen_by, (seen / n_tilts)[None], tilts.volume[None] / self.scale]
        correction, spread_of, gain = self._volume(torch.cat(inside)[None], told.mean(0))
        # before it is taught: as uncertain as a Wiener filter of white signal in white noise, and never surer than 1 %
        start = (noise / total**2).clamp_min(1e-4).log()
        return (1 + gain) * tilts.volume + self.scale * correction, start + spread_of + 2 * math.log(self.scale)

    def _conditions(self, tilts: FilteredTilts, total: torch.Tensor) -> torch.Tensor:
        """(tilt, condition): the angle, the angle it stands for, how many there are, its noise, its transfer."""
        angles, n_tilts = torch.deg2rad(tilts.angles), len(tilts.angles)
        many = torch.full_like(angles, math.log(n_tilts / 40))
        noise = (tilts.noise * n_tilts**0.5 / total + 1e-3).log()
        geometry = torch.stack([angles.sin(), angles.cos(), 10 * tilts.shares, many, noise], 1)
        return torch.cat([geometry, 1 - tilts.transfer], 1)

    def _features(self, images: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """(tilt, feature, y, u) of images (tilt, 1, y, u)."""
        gain, shift = self.first_told(told)[:, :, None, None].chunk(2, 1)
        h = functional.silu(self.first(images) * (1 + gain) + shift)
        return self.third(functional.silu(h + self.second(h)))

    def _volume(self, h: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """Three channels (3, z, y, x) of a volume, from channels (1, channel, z, y, x)."""
        shape = h.shape[2:]
        far = [size for n in reversed(shape) for size in (0, -n % MULTIPLE)]
        h = functional.pad(h, far, mode="replicate") if any(far) else h
        h = self.fine[0](self.enter(gathered(h).contiguous(memory_format=torch.channels_last_3d)), told)
        inner = self.coarser(gathered(h))
        for block in self.coarse:
            inner = block(inner, told)
        h = self.fine[1](h + spread(self.finer(inner)), told)
        return spread(self.leave(functional.silu(h)))[0, :, : shape[0], : shape[1], : shape[2]]


class _Block(nn.Module):
    """h + convolution of a convolution of h, which is told of the whole series channel by channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(width, width, 3, padding=1)
        self.told = nn.Linear(_TOLD, 2 * width)
        self.second = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, h: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        gain, shift = self.told(told)[None, :, None, None, None].chunk(2, 1)
        scaled = h * (h.square().mean(1, keepdim=True) + 1e-4).rsqrt()  # voxel by voxel, over the channels
        return h + self.second(functional.silu(self.first(scaled) * (1 + gain) + shift))


def pooled(
    features: torch.Tensor, angles: torch.Tensor, shape: tuple[int, ...] | torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the tilts of feature images at the projection of each voxel, interpolated linearly.

    Parameters
    ----------
    features : tensor (tilt, channel, y, u)
    angles : tensor (tilt,)
        [deg].
    shape : (int, int, int)
        Of the volume (z, y, x); as many rows as the images have.

    Returns
    -------
    sums : tensor (channel, z, y, x)
    seen : tensor (z, y, x)
        How many images hold the voxel.
    """
    n_tilts, channels, rows, length = features.shape
    depth, _, width = shape
    radians = torch.deg2rad(angles)
    x = torch.arange(width, dtype=features.dtype, device=features.device) - width // 2
    z = torch.arange(depth, dtype=features.dtype, device=features.device) - depth // 2
    u = z[:, None, None] * radians.sin() + x[:, None] * radians.cos() + length // 2  # (z, x, tilt) [px]
    low = u.floor()
    places = torch.stack([low, low + 1], -1)
    shares = torch.stack([1 - (u - low), u - low], -1)
    shares = shares * ((places >= 0) & (places < length))
    columns = torch.arange(n_tilts, device=u.device)[:, None] * length + places.clamp(0, length - 1).long()
    table = features.permute(0, 3, 2, 1).reshape(n_tilts * length, rows * channels)
    bags, weights = columns.flatten(0, 1).flatten(1), shares.flatten(0, 1).flatten(1)  # (z x, 2 tilt)
    sums = functional.embedding_bag(bags, table, per_sample_weights=weights, mode="sum")
    sums = sums.view(depth, width, rows, channels).permute(3, 0, 2, 1)
    return sums, shares.sum((-1, -2))[:, None, :].expand(depth, rows, width)
