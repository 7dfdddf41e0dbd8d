"""The potential of a specimen on a three-dimensional grid: the truth a tomogram is held against.

As in `potential`, but in three dimensions, so that an atom has its true extent along the beam too:

    V^(k) = K sum_a w_a f_{Z_a}(|k|) exp(-B_a |k|^2 / 4) exp(-2 pi i k.r_a)        [V Å^3]
"""

from __future__ import annotations

import torch

from cryosim.core.fourier import number
from cryosim.core.volume import Volume
from cryosim.specimen.grid import spectrum, volume_of
from cryosim.specimen.portions import portions
from cryosim.specimen.potential import potential_factors
from cryosim.specimen.scattering_factors import Parametrization
from cryosim.specimen.specimen import Specimen


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
    total = torch.zeros(())
    for portion in portions(None, specimen.molecules, specimen.poses):
        factors = potential_factors(parametrization, solvent if portion.in_ice else 0.0, portion.volume_factor)
        total = total + spectrum(portion.molecules, portion.poses, factors, shape, voxel_size, width, dtype)
    return Volume(volume_of(total, shape) if total.ndim else torch.zeros(shape, dtype=dtype), voxel_size)
