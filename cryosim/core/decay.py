"""The mean of what decays exponentially, over the time in which it does."""

from __future__ import annotations

import torch


def mean_decay(x: torch.Tensor) -> torch.Tensor:
    """(1 - exp(-x)) / x (...), the mean of exp(-x t) for t from 0 to 1; 1 at x = 0, with all derivatives."""
    small = x.abs() < 1e-3
    safe = torch.where(small, 1.0, x)
    return torch.where(small, 1 - x / 2 * (1 - x / 3 * (1 - x / 4)), -torch.expm1(-safe) / safe)
