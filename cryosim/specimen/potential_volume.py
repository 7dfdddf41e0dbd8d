"""The potential of a specimen on a three-dimensional grid: the truth a tomogram is held against.

As in `potential`, but in three dimensions, so that an atom has its true extent along the beam too:

    V^(k) = K sum_a w_a f_{Z_a}(|k|) exp(-B_a |k|^2 / 4) exp(-2 pi i k.r_a)        [V Å^3]

Bells are spread on a grid of two thirds of the voxel size, transformed, and cut to the band of the volume.
"""

from __future__ import annotations

import math

import torch

from cryosim.core.fourier import frequencies, number
from cryosim.core.volume import Volume
from cryosim.specimen.atoms import concatenate
from cryosim.specimen.portions import Portion, portions
from cryosim.specimen.potential import (
    RadialBasis,
    bell_tolerance,
    bell_transform,
    bells_at,
    potential_factors,
    radial_basis,
)
from cryosim.specimen.scattering_factors import Parametrization
from cryosim.specimen.specimen import Specimen

_ATOMS_AT_ONCE = 2048
_NUMBERS_AT_ONCE = 2**27


def potential_volume(
    specimen: Specimen,
    shape: tuple[int, int, int],
    voxel_size: float,
    parametrization: Parametrization = "lobato",
    *,
    width: int = 6,
    dtype: torch.dtype = torch.float32,
) -> Volume:
    """Potential of a specimen as its difference from the ice, untilted.

    Parameters
    ----------
    specimen : Specimen
        Atoms beyond the volume are left out.
    shape : (int, int, int)
        (z, y, x) [voxel].
    voxel_size : float
        [Å].
    parametrization : {"lobato", "kirkland", "peng"}
    width : int
        Samples a bell covers: relative error 5e-5 for 6, 1e-6 for 8, below the Nyquist frequency of every axis; the
        unpaired frequency of an even axis is left out.
    dtype : torch.dtype

    Returns
    -------
    Volume
        [V].
    """
    solvent = number(specimen.ice.inner_potential) if specimen.ice else 0.0
    grid = [max(width, math.ceil(1.5 * n)) for n in shape]  # over the same field, so rarely of exactly 2/3 voxel
    kept = [_paired(n) for n in shape]
    kept[2] = kept[2][: (shape[2] + 1) // 2]  # the half space of a real transform
    k2 = torch.as_tensor(sum(((m / (n * voxel_size)) ** 2)[at] for m, n, at in zip(kept, shape, _AXES, strict=True)))
    total = torch.zeros([len(m) for m in kept], dtype=dtype.to_complex())
    for portion in portions(None, specimen.molecules, specimen.poses):
        factors = potential_factors(parametrization, solvent if portion.in_ice else 0.0, portion.volume_factor)
        limit = 0.75 / voxel_size**2
        radial = radial_basis(concatenate(portion.molecules), factors, limit, bell_tolerance(width), None)
        together = max(1, _NUMBERS_AT_ONCE // math.prod(grid))  # radial functions
        for some in torch.arange(radial.rank).split(together):
            spread = _spread(portion, radial, some, shape, grid, voxel_size, width, dtype)
            for j, values in zip(some.tolist(), spread, strict=True):
                spectrum = torch.fft.rfftn(values)[kept[0]][:, kept[1]][:, :, kept[2]]
                total += spectrum * radial.function(j, k2).to(dtype)
    for m, g, n, at in zip(kept, grid, shape, _AXES, strict=True):
        moved = 2 * torch.pi * m * (g // 2 / g - n // 2 / n)  # from one grid's centre sample to the other's
        bell = bell_transform(g, width)[m]
        total = total * (torch.polar(1 / bell, moved.double())[at]).to(total.dtype)
    whole = torch.zeros(shape[0], shape[1], shape[2] // 2 + 1, dtype=total.dtype)
    whole[kept[0][:, None, None], kept[1][:, None], kept[2]] = total / voxel_size**3
    return Volume(torch.fft.irfftn(whole, s=shape), voxel_size)


def _spread(
    portion: Portion,
    radial: RadialBasis,
    some: torch.Tensor,
    shape: tuple[int, int, int],
    grid: list[int],
    voxel_size: float,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Grids (j, z, y, x) of the bells of a portion, copy by copy, for some of the radial functions."""
    half = torch.tensor([0.5 * n * voxel_size for n in shape[::-1]], dtype=torch.float64)
    finer = torch.tensor([g / (n * voxel_size) for g, n in zip(grid, shape, strict=True)], dtype=torch.float64)
    spread = torch.zeros(math.prod(grid), len(some), dtype=dtype)
    for atoms, poses in zip(portion.molecules, portion.poses, strict=True):
        strengths = (radial.coefficients(atoms)[:, some] * atoms.occupancies.double()[:, None]).to(dtype)
        reach = float(atoms.positions.norm(dim=1).max())
        for rotation, origin in zip(poses.rotations.double(), poses.positions.double(), strict=True):
            if bool((origin.abs() > half + reach).any()):
                continue
            places = atoms.positions.double() @ rotation.T + origin
            for part in (places.abs() <= half).all(1).nonzero()[:, 0].split(_ATOMS_AT_ONCE):
                where, bells = bells_at(places[part].flip(1) * finer, grid, width, dtype)
                values = bells[:, :, None] * strengths[part][:, None, :]
                spread.index_add_(0, where.flatten(), values.flatten(0, 1))
    return spread.T.reshape(len(some), *grid)


_AXES = ((slice(None), None, None), (slice(None), None), (slice(None),))


def _paired(n: int) -> torch.Tensor:
    """Signed indices (m,) of the frequencies of an axis, without the unpaired one of an even n."""
    m = (frequencies(n, dtype=torch.float64) * n).round().long()
    return m[2 * m.abs() < n]
