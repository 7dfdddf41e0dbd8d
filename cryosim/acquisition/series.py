"""A tilt series: images with the geometry and optics under which they were taken."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.record import Record, item, static
from cryosim.microscope.optics import Optics, check_per_tilt


class Movie(NamedTuple):
    """File with the frames of one exposure: its path, seen from the folder of the stack, and how many it holds."""

    path: str
    frames: int


class TiltSeries(Record):
    """Images of one specimen, in the order of exposure.

    Attributes
    ----------
    images : tensor (tilt, y, x)
        [e-/px].
    pixel_size : float or tensor ()
        [Å].
    tilts : TiltScheme
        One row an image.
    optics : Optics or None
        Fields () or (tilt,); None when unknown.
    movies : tuple of Movie or None
        One an exposure, where the frames are kept.

    Raises
    ------
    ValueError
        When images, tilts or movies disagree in number.
    """

    images: torch.Tensor = item(2)
    pixel_size: float | torch.Tensor = item(0)
    tilts: TiltScheme = None  # type: ignore[assignment]
    optics: Optics | None = None
    movies: tuple[Movie, ...] | None = static(default=None)

    def __post_init__(self) -> None:
        if self.images.ndim != 3 or self.images.shape[0] != len(self.tilts):
            raise ValueError(
                f"TiltSeries: expected images (tilt, y, x) with {len(self.tilts)} tilts, one for each angle, got "
                f"{tuple(self.images.shape)}."
            )
        if self.optics is not None:
            check_per_tilt(self.optics, len(self.tilts))
        if self.movies is not None and len(self.movies) != len(self.tilts):
            raise ValueError(
                f"TiltSeries.movies: expected one for each of {len(self.tilts)} tilts, got {len(self.movies)}."
            )
