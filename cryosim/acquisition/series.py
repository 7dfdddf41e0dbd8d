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


class Stack(Record):
    """The file that images stand in, as sections in an order of its own.

    Attributes
    ----------
    path : str
    sections : tensor (tilt,)
        Section of each image, counted from 0.
    angles : tuple of float (section,)
        The stage was asked for [deg], of all sections, those included that the series leaves out.

    Raises
    ------
    ValueError
        When a section is not one of the file's, or stands twice.
    """

    path: str = static()
    sections: torch.Tensor = item(0)
    angles: tuple[float, ...] = static()

    def __post_init__(self) -> None:
        numbers, n = self.sections.reshape(-1).tolist(), len(self.angles)
        if len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(n)):
            raise ValueError(f"Stack: expected sections from 0 to {n - 1}, each at most once, got {numbers}.")


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
    stack : Stack or None
        The file the images were read from, by which others that tell of its sections are written; None where they are
        of no file.

    Raises
    ------
    ValueError
        When images, tilts, movies or sections disagree in number.
    """

    images: torch.Tensor = item(2)
    pixel_size: float | torch.Tensor = item(0)
    tilts: TiltScheme = None  # type: ignore[assignment]
    optics: Optics | None = None
    movies: tuple[Movie, ...] | None = static(default=None)
    stack: Stack | None = None

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
        if self.stack is not None and self.stack.sections.shape != (len(self.tilts),):
            raise ValueError(
                f"TiltSeries.stack: expected a section for each of {len(self.tilts)} tilts, got "
                f"{tuple(self.stack.sections.shape)}. Pick tilts out with index(), or give stack=None."
            )
