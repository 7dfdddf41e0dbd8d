"""Radial functions of atoms on a three-dimensional grid, by their transform.

    F^(k) = sum_a w_a f_a(|k|) exp(-2 pi i k.r_a)

Bells are spread on a grid of two thirds of the voxel size, transformed, and cut to the band of the volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cryosim.core.fourier import frequencies
from cryosim.specimen.atoms import Atoms, Poses, concatenate
from cryosim.specimen.bells import bell_tolerance, bell_transform, spread
from cryosim.specimen.potential import Factors, RadialBasis, radial_basis

_NUMBERS_AT_ONCE = 2**27


def spectrum(
    molecules: Sequence[Atoms],
    poses: Sequence[Poses],
    factors: Factors,
    shape: tuple[int, int, int],
    voxel_size: float,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Transform of a volume of radial functions at the paired frequencies of a half space; see `volume_of`."""
    grid = [max(width, math.ceil(1.5 * n)) for n in shape]  # over the same field, so rarely of exactly 2/3 voxel
    kept = _kept(shape)
    k2 = squared_frequency(shape, voxel_size)
    total = torch.zeros([len(m) for m in kept], dtype=dtype.to_complex())
    radial = radial_basis(concatenate(molecules), factors, 0.75 / voxel_size**2, bell_tolerance(width), None)
    together = max(1, _NUMBERS_AT_ONCE // math.prod(grid))  # radial functions
    for some in torch.arange(radial.rank).split(together):
        found = _spread(molecules, poses, radial, some, shape, grid, voxel_size, width, dtype)
        for j, values in zip(some.tolist(), found, strict=True):
            total += torch.fft.rfftn(values)[kept[0]][:, kept[1]][:, :, kept[2]] * radial.function(j, k2).to(dtype)
    for m, g, n, at in zip(kept, grid, shape, _AXES, strict=True):
        moved = 2 * torch.pi * m * (g // 2 / g - n // 2 / n)  # from one grid's centre sample to the other's
        bell = bell_transform(g, width)[m]
        total = total * (torch.polar(1 / bell, moved.double())[at]).to(total.dtype)
    return total / voxel_size**3


def squared_frequency(shape: tuple[int, int, int], voxel_size: float) -> torch.Tensor:
    """k^2 [1/Å^2] of what `spectrum` gives."""
    axes = [(m / (n * voxel_size)) ** 2 for m, n in zip(_kept(shape), shape, strict=True)]
    return torch.as_tensor(sum(squares[at] for squares, at in zip(axes, _AXES, strict=True)))


def volume_of(spectrum: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Values (z, y, x) of a `spectrum`."""
    kept = _kept(shape)
    whole = torch.zeros(shape[0], shape[1], shape[2] // 2 + 1, dtype=spectrum.dtype)
    whole[kept[0][:, None, None], kept[1][:, None], kept[2]] = spectrum
    return torch.fft.irfftn(whole, s=shape)


def _kept(shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Signed indices of the paired frequencies of each axis, of the last one those of a real transform."""
    kept = [_paired(n) for n in shape]
    return [*kept[:2], kept[2][: (shape[2] + 1) // 2]]


def _spread(
    molecules: Sequence[Atoms],
    placed: Sequence[Poses],
    radial: RadialBasis,
    some: torch.Tensor,
    shape: tuple[int, int, int],
    grid: list[int],
    voxel_size: float,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Grids (j, z, y, x) of the bells of all atoms, copy by copy, for some of the radial functions."""
    half = torch.tensor([0.5 * n * voxel_size for n in shape[::-1]], dtype=torch.float64)
    finer = torch.tensor([g / (n * voxel_size) for g, n in zip(grid, shape, strict=True)], dtype=torch.float64)
    values = torch.zeros(len(some), math.prod(grid), dtype=dtype)
    for atoms, poses in zip(molecules, placed, strict=True):
        strengths = (radial.coefficients(atoms)[:, some] * atoms.occupancies.double()[:, None]).to(dtype)
        reach = float(atoms.positions.norm(dim=1).max())
        for rotation, origin in zip(poses.rotations.double(), poses.positions.double(), strict=True):
            if bool((origin.abs() > half + reach).any()):
                continue
            places = atoms.positions.double() @ rotation.T + origin
            seen = (places.abs() <= half).all(1)
            spread([values], places[seen].flip(1) * finer, strengths[seen], grid, width)
    return values.unflatten(1, grid)


_AXES = ((slice(None), None, None), (slice(None), None), (slice(None),))


def _paired(n: int) -> torch.Tensor:
    """Signed indices (m,) of the frequencies of an axis, without the unpaired one of an even n."""
    m = (frequencies(n, dtype=torch.float64) * n).round().long()
    return m[2 * m.abs() < n]
