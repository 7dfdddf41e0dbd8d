"""Projections against ASTRA's `linear` projector: the same geometry and hand, to the accuracy of a linear kernel."""

import numpy as np
import pytest
import torch

from inverse.physics.tilt import TiltProjection
from tests.bench.astra_rows import Rows

ANGLES = torch.tensor([-60.0, -33.0, 0.0, 12.5, 48.0], dtype=torch.float64)


def smooth_volume(shape, generator):
    """A few blobs (z, y, x), wide beside a voxel."""
    axes = [torch.arange(n, dtype=torch.float64) - n // 2 for n in shape]
    volume = torch.zeros(shape, dtype=torch.float64)
    for _ in range(6):
        centre = (torch.rand(3, generator=generator, dtype=torch.float64) - 0.5) * torch.tensor([18.0, 8.0, 40.0])
        volume += torch.einsum(
            "z,y,x->zyx", *(torch.exp(-((a - c) ** 2) / 18) for a, c in zip(axes, centre, strict=True))
        )
    return volume


@pytest.mark.parametrize("shape", [(41, 5, 81), (61, 3, 95)])  # odd: ASTRA's centre (n - 1) / 2 is then ours, n // 2
def test_projections_agree(shape):
    volume = smooth_volume(shape, torch.Generator().manual_seed(0))
    ours = TiltProjection(ANGLES, shape).A(volume[None, None])[0, 0].numpy()
    projector = Rows(shape[0], shape[2], ANGLES.numpy())
    for row in range(shape[1]):
        theirs = projector.project(volume[:, row].numpy())
        error, mirrored = (
            np.linalg.norm(images[:, row] - theirs) / np.linalg.norm(theirs) for images in (ours, ours[::-1])
        )
        assert error < 0.01 < 0.2 < mirrored
