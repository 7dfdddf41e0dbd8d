"""Powers of an image in polar cells: all that is known of the lens without knowing the specimen.

The Fourier transform of white or smooth noise, seen through a lens, has independent samples, whose powers |F|^2 are
exponentially distributed about their mean S(k) (Whittle 1953, doi:10.1007/BF02590998). A cell is a stretch of radius
and azimuth that holds n of them; their mean P is Gamma distributed, and

    log L = - sum over cells of n (log S + P / S)                                                            (1)

is what the image tells of S. The image is taken whole, or in tiles where the defocus changes across it: no tile is
averaged with another, so that rings as fine as the tile's own frequencies are kept, and samples stay independent but
for the fading of the edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cryosim.core.fourier import cosine_edges, frequencies

_EDGE = 0.06  # of each side of a tile, that fades


class Cells(NamedTuple):
    """Means of powers, each (cell,), in float64.

    Attributes
    ----------
    power : tensor
        Mean |F|^2 over its mean in white noise [square of the image's unit].
    samples : tensor
        Independent ones in it.
    radius, radius_spread : tensor
        Mean |k| of the samples, and its standard deviation [1/Å].
    azimuth, azimuth_spread : tensor
        Likewise from x towards y [rad].
    x, y : tensor
        Of the middle of the tile from that of the image [Å].
    span : tensor
        Edge of the tile, across which the heights of a tilted specimen change [Å].
    """

    power: torch.Tensor
    samples: torch.Tensor
    radius: torch.Tensor
    radius_spread: torch.Tensor
    azimuth: torch.Tensor
    azimuth_spread: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    span: torch.Tensor

    def where(self, keep: torch.Tensor) -> Cells:
        """Some of them."""
        return Cells(*(part[keep] for part in self))

    def within(self, coarsest: float, finest: float) -> Cells:
        """Those of radii between two periods [Å]."""
        return self.where((self.radius >= 1 / coarsest) & (self.radius < 1 / finest))


def polar_cells(image: torch.Tensor, pixel_size: float, finest: float) -> Cells:
    """Cells of an image (y, x) [any unit], taken whole, up to a period [Å]."""
    return _cells(image, pixel_size, finest, 36, (0.0, 0.0))


def tile_cells(image: torch.Tensor, pixel_size: float, finest: float, tile: int) -> list[Cells]:
    """The same of square tiles of an edge [px], which do not overlap; what they do not fill is left out all around."""
    starts = [[(n % tile) // 2 + i * tile for i in range(n // tile)] for n in image.shape]
    middles = [[(s + tile / 2 - n / 2) * pixel_size for s in line] for line, n in zip(starts, image.shape, strict=True)]
    return [
        _cells(image[j : j + tile, i : i + tile], pixel_size, finest, 18, (x, y))
        for j, y in zip(starts[0], middles[0], strict=True)
        for i, x in zip(starts[1], middles[1], strict=True)
    ]


def at_one_height(parts: Sequence[Cells], rise: tuple[float, float]) -> Cells:
    """Tiles of a tilted specimen, those of about one height averaged.

    Heights rise by `rise` along (x, y) [1], and differ by less than a quarter of what a tile spans where they are taken
    together. In what is returned x is the height, y is 0 and the span one of heights: of a rise of (1, 0).
    """
    climb = math.hypot(*rise)
    step = 0.25 * climb * float(parts[0].span[0])
    heights = torch.stack([rise[0] * part.x[0] + rise[1] * part.y[0] for part in parts])
    levels = torch.round(heights / max(step, 1e-3)).long()
    found = []
    for level in levels.unique().tolist():
        together = [part for part, own in zip(parts, levels.tolist(), strict=True) if own == level]
        one, n = together[0], torch.stack([part.samples for part in together]).sum(0)
        power = torch.stack([part.samples * part.power for part in together]).sum(0) / n
        height = heights[levels == level].mean().expand(len(n))
        found.append(one._replace(power=power, samples=n, x=height, y=torch.zeros_like(height), span=climb * one.span))
    return joined(found)


def joined(parts: Sequence[Cells]) -> Cells:
    """Of several tiles or images together."""
    return Cells(*(torch.cat(same) for same in zip(*parts, strict=True)))


def _cells(image: torch.Tensor, pixel_size: float, finest: float, sectors: int, middle: tuple[float, float]) -> Cells:
    power, kx, ky, independent = _powers(image.double(), pixel_size, finest)
    radius, azimuth = (kx.square() + ky.square()).sqrt(), torch.atan2(ky, kx).expand_as(power)
    # half of the plane, each sample once: -90 < azimuth <= 90 degrees
    ring, step = 1 / (min(image.shape) * pixel_size), math.pi / sectors
    keep = (radius >= 2 * ring) & (radius < 1 / finest) & ~((kx == 0) & (ky < 0))
    radius, azimuth, power = radius[keep], azimuth[keep], power[keep]
    label = (radius / ring).long() * sectors + ((azimuth + math.pi / 2) / step).long().clamp_max(sectors - 1)
    found, cell, count = torch.unique(label, return_inverse=True, return_counts=True)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(found), dtype=torch.float64).index_add(0, cell, values) / count

    means = [mean(values) for values in (radius, azimuth)]
    spreads = [mean((v - m[cell]).square()).sqrt() for v, m in zip((radius, azimuth), means, strict=True)]
    extent = min(image.shape) * pixel_size
    places = (torch.full((len(found),), at, dtype=torch.float64) for at in (*middle, extent))
    return Cells(mean(power), count.double() * independent, means[0], spreads[0], means[1], spreads[1], *places)


def _powers(
    image: torch.Tensor, pixel_size: float, finest: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """|F|^2 (y, x), kx >= 0, up to 1 / finest; kx (1, x) and ky (y, 1) [1/Å], and the share of independent samples."""
    ny, nx = image.shape
    edges = (cosine_edges(n, max(1, round(_EDGE * n)), dtype=image.dtype, device=image.device) for n in (ny, nx))
    window = torch.outer(*edges)
    contrast = (image - image.mean()) * window
    contrast = contrast - window * (contrast.sum() / window.sum())
    spectrum = torch.fft.rfft2(contrast)
    rows, columns = (min(n // 2, math.ceil(n * pixel_size / finest)) for n in (ny, nx))
    spectrum = torch.cat([spectrum[:rows], spectrum[ny - rows :]])[:, :columns]
    power = spectrum.abs().square() / window.square().sum()
    ky = frequencies(ny, pixel_size, dtype=torch.float64)
    kx = frequencies(nx, pixel_size, dtype=torch.float64)[None, :columns]
    independent = float(window.square().mean() ** 2 / window.pow(4).mean())
    return power, kx, torch.cat([ky[:rows], ky[ny - rows :]])[:, None], independent
