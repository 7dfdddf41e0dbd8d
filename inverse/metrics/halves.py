"""Two independent volumes of one tilt series, by dealing out its electrons: no even and odd frames are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.microscope.counting import thin

Result = TypeVar("Result")


def half_series(series: TiltSeries, *, generator: torch.Generator | None = None) -> tuple[TiltSeries, TiltSeries]:
    """Two series of counts that sum to the given one, each electron in either with probability 1/2.

    Poisson counts fall into independent halves: see `cryosim.thin`, also for cameras where that is not so.

    Parameters
    ----------
    series : TiltSeries
        Whole counts, as a camera without rendering gives them [counts/px].
    generator : torch.Generator, optional

    Returns
    -------
    (TiltSeries, TiltSeries)
        The specimen had the same dose in both: only their images differ from the series'. They have no movies, whose
        electrons they would share.

    Raises
    ------
    ValueError
        When the images are not whole numbers of at least 0.
    """
    halves = thin(series.images, 0.5, generator=generator)
    return tuple(series.replace(images=images, movies=None) for images in halves)  # pyright: ignore[reportReturnType]


def half_maps(
    series: TiltSeries,
    reconstruct: Callable[[TiltSeries], Result],
    *,
    generator: torch.Generator | None = None,
) -> tuple[Result, Result]:
    """`reconstruct` of the two halves of a series: volumes whose noise is independent, for `fsc` and its like.

    Whatever the reconstruction adds to both alike, a prior's knowledge or a missing wedge, correlates too.

    Parameters
    ----------
    series : TiltSeries
        Whole counts.
    reconstruct : callable
        A series -> a volume, or whatever else; give options with a lambda, as in
        `half_maps(series, lambda half: reconstruct(half, "wbp", bin=4).volume)`.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        As `half_series`.
    """
    first, second = half_series(series, generator=generator)
    return reconstruct(first), reconstruct(second)
