"""A scalar field on a grid."""

from __future__ import annotations

import torch

from cryosim.core.record import Record, item


class Volume(Record):
    """Values on a cubic grid whose sample n // 2 of each axis is the origin.

    Attributes
    ----------
    values : tensor (..., z, y, x)
        [V] for a potential.
    voxel_size : float or tensor ()
        [Å].
    """

    values: torch.Tensor = item(3)
    voxel_size: float | torch.Tensor = item(0)
