"""What all tests share: one thread (small FFTs are slower with two) and a seeded source of randomness."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240117)
