"""What passes from specimen to microscope: a source of slices of projected potential."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch


class SliceSource(Protocol):
    """Anything that gives slices of projected potential one by one.

    A source may also have methods that do the same at less cost: `in_order()` yields all slices, first to last, and
    `total()` gives their sum, but for what of it averages out.
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


def column(slices: SliceSource) -> torch.Tensor:
    """All slices together (..., y, x) [V·Å], by the source's own `total()` where it has one."""
    return slices.total() if hasattr(slices, "total") else summed(slices)  # type: ignore[attr-defined]


def summed(slices: SliceSource) -> torch.Tensor:
    """Sum (..., y, x) [V·Å] of all slices, one after the other."""
    total = torch.zeros(())
    for i, v in enumerate(in_order(slices)):
        total = total + v if i else v
    return total
