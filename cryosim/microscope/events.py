"""Events: single electrons, each with the camera frame it came in and the place where it was found."""

from __future__ import annotations

import torch

from cryosim.core.record import Record, hidden, item, static


class Events(Record):
    """Electrons that a camera counted.

    Attributes
    ----------
    frame : tensor (event,)
        Camera frame, from 0; whole numbers.
    y, x : tensor (event,)
        Place [px], sub-pixel: pixel i covers [i, i + 1).
    shape : (int, int, int)
        (frames, ny, nx): how many frames were taken, and the camera's pixels.

    Raises
    ------
    ValueError
        When the lengths disagree, or an event lies outside of the frames or of the pixels.
    """

    frame: torch.Tensor = item(0)
    y: torch.Tensor = item(0)
    x: torch.Tensor = item(0)
    shape: tuple[int, int, int] = static()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"Events.shape: expected (frames, ny, nx) of at least 1 each, got {self.shape}.")
        lengths = tuple(tuple(getattr(self, name).shape) for name in ("frame", "y", "x"))
        if len(set(lengths)) != 1 or len(lengths[0]) != 1:
            raise ValueError(
                f"Events: expected frame, y and x of one shape (event,), got {', '.join(map(str, lengths))}."
            )
        if self.frame.is_floating_point():
            raise ValueError(f"Events.frame: expected whole numbers, got {self.frame.dtype}.")
        if hidden() or not len(self):
            return
        for name, n in zip(("frame", "y", "x"), self.shape, strict=True):
            low, high = (float(v) for v in torch.aminmax(getattr(self, name).detach()))
            if not (low >= 0 and high < n):  # a NaN is outside too
                raise ValueError(f"Events.{name}: expected values from 0 to below {n}, got {low:g} to {high:g}.")

    def __len__(self) -> int:
        return self.frame.shape[0]


def histogram(events: Events, supersampling: int = 1) -> torch.Tensor:
    """Counts (y, x) of all events on pixels, or on sub-pixels of 1 / supersampling of their side; whole numbers."""
    _, ny, nx = events.shape
    rows, columns = (torch.floor(at * supersampling).long() for at in (events.y, events.x))
    flat = rows * (nx * supersampling) + columns
    size = ny * nx * supersampling**2
    return torch.bincount(flat, minlength=size).view(ny * supersampling, nx * supersampling)


def alternating(events: Events, parts: int = 2) -> tuple[Events, ...]:
    """Events of every `parts`-th camera frame, from the first on, from the second on, ...: independent of each other.

    A camera begins anew with every frame, so this holds whatever it does to electrons that come together.

    Raises
    ------
    ValueError
        When there are fewer frames than parts.
    """
    if not 1 <= parts <= events.shape[0]:
        raise ValueError(f"alternating.parts: expected 1 to {events.shape[0]}, the frames there are, got {parts}.")
    return tuple(events.index(events.frame % parts == part) for part in range(parts))
