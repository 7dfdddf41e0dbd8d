"""What passes from specimen to microscope: a source of slices of projected potential."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch


class SliceSource(Protocol):
    """Anything that gives slices of projected potential one by one.

    A source may also have a method `in_order()` that yields all of them, first to last, at less cost.
    """

    @property
    def pixel_size(self) -> float | torch.Tensor: ...

    @property
    def thickness(self) -> float | torch.Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> torch.Tensor: ...


def in_order(slices: SliceSource) -> Iterator[torch.Tensor]:
    """All slices (..., y, x) [V·Å], first to last."""
    if hasattr(slices, "in_order"):
        return slices.in_order()  # type: ignore[attr-defined]
    return (slices[i] for i in range(len(slices)))
