"""Electrons one by one: where and when each falls, and which of them a camera tells apart."""

from __future__ import annotations

import math

import torch

from cryosim.core.fourier import number
from cryosim.microscope.detector import Detector
from cryosim.microscope.events import Events

_EVENTS_AT_ONCE = 2**18
_PIXELS_AT_ONCE = 2**22
_MOST_PAIRS = 2**24


def draw_events(
    electrons: torch.Tensor, detector: Detector, frames: int, s: int, generator: torch.Generator | None
) -> Events:
    """Events of an exposure, some frames at a time; see `sample_events`.

    Parameters
    ----------
    electrons : tensor (s y, s x)
        Mean of the exposure [e-/sub-pixel].
    detector : Detector
    frames : int
    s : int
        Sub-pixels along the side of a pixel.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When too many electrons fall in one frame.
    """
    ny, nx = (n // s for n in electrons.shape)
    radius = number(detector.coincidence_radius)
    border = math.ceil(radius) if radius > 0 else 0
    dark = None if detector.dark is None else detector.dark.to(electrons)
    total = float(electrons.sum(dtype=torch.float64)) / frames + (0.0 if dark is None else float(dark.sum()))
    _check_pairs(float(electrons.max()) / frames if electrons.numel() else 0.0, total, radius, s)
    at_once = max(_EVENTS_AT_ONCE, electrons.numel() // 32)  # large images are not worth drawing for few events
    together = min(frames, max(1, int(at_once / max(total, 1e-9))))
    parts = []
    for start in range(0, frames, together):
        count = min(together, frames - start)
        drawn = _scattered(electrons, 1 / frames, count, s, border, generator)  # frame, row, column, y, x, moment
        if border:
            frame, row, column, y, x, moment = drawn
            inside = (row >= 0) & (row < ny) & (column >= 0) & (column < nx)
            kept = inside & ~_coincident(frame, row + y.double(), column + x.double(), moment, radius)
            drawn = tuple(v[kept] for v in drawn)
        if dark is not None:
            more = _scattered(dark, 1.0, count, 1, 0, generator)
            drawn = tuple(torch.cat(v) for v in zip(drawn, more, strict=True))
        frame, row, column, y, x, moment = drawn
        order = moment.argsort()
        pixel = ((frame * ny + row) * nx + column)[order]
        pixel, by_pixel = pixel.sort(stable=True)
        order = order[by_pixel]
        if detector.counting == "binary" and len(pixel):
            first = torch.cat([torch.ones_like(pixel[:1], dtype=torch.bool), pixel[1:] != pixel[:-1]])
            order = order[first]
        frame, row, column, y, x = (v[order] for v in (frame, row, column, y, x))
        parts.append((frame + start, _within(row, y), _within(column, x)))
    frame, y, x = (torch.cat(v) for v in zip(*parts, strict=True))
    return Events(frame, y, x, (frames, ny, nx))


def _scattered(
    electrons: torch.Tensor, share: float, frames: int, s: int, border: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, ...]:
    """Frame, row, column, place in the pixel (y, x) and moment in the frame of each electron of a Poisson process.

    Of `electrons` (s y, s x) each frame has a `share`. The image goes on for `border` pixels as at its edges, at rows
    and columns from -border. Drawn some rows at a time: nothing as large as the image is made.
    """
    device, edge = electrons.device, border * s
    ny, nx = electrons.shape
    columns = torch.arange(-edge, nx + edge, device=device).clamp(0, nx - 1)
    band = max(1, _PIXELS_AT_ONCE // len(columns))
    found = []
    for start in range(-edge, ny + edge, band):
        rows = torch.arange(start, min(start + band, ny + edge), device=device).clamp(0, ny - 1)
        means = electrons[rows][:, columns] if border else electrons[rows]
        hits = torch.poisson(means.clamp_min(0) * (share * frames), generator=generator).flatten()
        which = hits.nonzero()[:, 0]
        which = which.repeat_interleave(hits[which].long())
        found.append(which + (start + edge) * len(columns))
    which = torch.cat(found)
    n, where = len(which), {"dtype": electrons.dtype, "device": device}
    frame = torch.randint(frames, (n,), generator=generator, device=device)
    down, along = which // len(columns), which % len(columns)  # sub-pixels
    y = (down % s + torch.rand(n, generator=generator, **where)) / s
    x = (along % s + torch.rand(n, generator=generator, **where)) / s
    moment = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
    return frame, down // s - border, along // s - border, y, x, moment


def _coincident(
    frame: torch.Tensor, y: torch.Tensor, x: torch.Tensor, moment: torch.Tensor, radius: float
) -> torch.Tensor:
    """Whether an electron (event,) has an earlier one of its frame within the radius."""
    if not len(moment):
        return torch.zeros_like(moment, dtype=torch.bool)
    # events in the order of square cells; those near one lie in its own cell or the eight about it
    row, column = ((at / max(radius, 1.0)).floor().long() for at in (y, x))
    row, column = row - row.min(), column - column.min() + 1
    rows, columns = int(row.max()) + 2, int(column.max()) + 2  # with an empty row, and columns at both ends
    cell, order = ((frame * rows + row) * columns + column).sort()
    y, x, moment = y[order], x[order], moment[order]
    one = torch.arange(len(cell), device=cell.device)
    lost = torch.zeros_like(moment, dtype=torch.bool)
    for low, high in (
        (one + 1, torch.searchsorted(cell, cell + 1, right=True)),  # the rest of the cell and the next
        (torch.searchsorted(cell, cell + columns - 1), torch.searchsorted(cell, cell + columns + 1, right=True)),
    ):
        many = high - low
        a = one.repeat_interleave(many)
        b = torch.arange(len(a), device=cell.device) + (low - many.cumsum(0) + many).repeat_interleave(many)
        near = (y[a] - y[b]) ** 2 + (x[a] - x[b]) ** 2 <= radius**2
        a, b = a[near], b[near]
        lost[torch.where(moment[a] > moment[b], a, b)] = True
    return torch.empty_like(lost).index_copy(0, order, lost)


def _within(pixel: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Pixel plus an offset below 1, not rounded up to the next pixel."""
    left = pixel.to(offset.dtype)
    return torch.minimum(left + offset, torch.nextafter(left + 1, left))


def _check_pairs(most: float, total: float, radius: float, s: int) -> None:
    neighbours = math.pi * (radius * s) ** 2 * most
    if neighbours * total / 2 > _MOST_PAIRS:
        raise ValueError(
            f"sample_events.frames: expected few electrons of a frame within the coincidence radius of another, got "
            f"{neighbours:.3g}. Divide the exposure among more camera frames: Detector.frame_rate times its seconds."
        )
