"""What all tests share: one thread (small FFTs are slower with two) and a seeded source of randomness."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240117)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two processes, as someone else would have started them, of one thread as here: others round otherwise."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=":0",
        memory_limit=0,
        silence_logs=50,
        env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    ) as running:
        yield running
