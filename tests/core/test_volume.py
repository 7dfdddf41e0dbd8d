"""Volumes are records: batches are indexed, values converted."""

import torch

from cryosim.core.volume import Volume


def test_a_batch_of_volumes_is_indexed():
    batch = Volume(torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5), 1.3)
    one = batch.index(1)
    assert one.values.shape == (3, 4, 5)
    assert one.voxel_size == 1.3
    assert batch.to(dtype=torch.float64).values.dtype == torch.float64
