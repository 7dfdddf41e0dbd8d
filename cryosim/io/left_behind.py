"""What an alignment tells and a `TiltScheme` cannot hold: said with its size, refused where it is gross.

A tilt about x of all images alike is only a turn of the specimen, P = R_z R_y(angle) [R_x p]: the tomogram comes out
turned by it, and as sharp. One that changes from image to image, a magnification and local shifts displace points of
an image against those of others, which blurs. At the distance d from the middle they do by, at most,

    tilt by an angle   2 d sin(angle / 2)          magnification m    d |m - 1|          local shift    itself

and d is half the diagonal of the field, its corner.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cryosim.io.files import FormatError

GROSS = 0.05
"""Of the corner's distance from the middle: to ignore more than that is refused."""

_WORTH = 1e-6  # of the corner's distance: less is the rounding of a file


class LeftBehind(NamedTuple):
    """Part of an alignment that is not carried.

    Attributes
    ----------
    path : Path
        The file.
    field : str
        Its name there.
    said : str
        How large it is, in the file's terms.
    angle : float
        Largest angle by which it turns [deg].
    stretch : float
        Largest magnification less 1.
    length : float
        Largest displacement that does not depend on the place [Å].
    rigid : bool
        Whether it turns the specimen as a whole, which does not blur.
    """

    path: Path
    field: str
    said: str
    angle: float = 0.0
    stretch: float = 0.0
    length: float = 0.0
    rigid: bool = False

    def displacement(self, distance: float) -> float:
        """Of a point at `distance` from the middle, at most [Å]."""
        turned = 2 * distance * math.sin(min(abs(math.radians(self.angle)) / 2, math.pi / 2))
        return turned + distance * abs(self.stretch) + self.length


def tilts_about_x(path: Path, field: str, angles: torch.Tensor) -> tuple[LeftBehind, ...]:
    """The part that is common to all `angles` (row,) [deg], and what is left of it."""
    if not bool(torch.isfinite(angles).all()) or float(angles.abs().max()) >= 90:
        raise FormatError(
            path, field, "angles between -90 and 90 degrees", f"{angles.tolist()[:50]}", "Correct the entry."
        )
    mean = float(angles.mean())
    rest = float((angles - mean).abs().max())
    parts = (
        LeftBehind(path, field, f"a tilt about x of {mean:.4g}° in all images", angle=mean, rigid=True),
        LeftBehind(path, field, f"a tilt about x that changes by ±{rest:.3g}°", angle=rest),
    )
    return tuple(part for part in parts if abs(part.angle) > 1e-6)


def say_left_behind(parts: Sequence[LeftBehind], corner: float | None, *, stacklevel: int = 3) -> None:
    """Warn of each part that is not carried.

    Parameters
    ----------
    parts : sequence of LeftBehind
    corner : float or None
        Half the diagonal of the field [Å]; None when unknown, which counts as 1000 Å.

    Raises
    ------
    FormatError
        When a part that is not rigid displaces the corner by more than `GROSS` of its distance.
    """
    distance = 1000.0 if corner is None else corner
    where = "1000 Å from the middle" if corner is None else f"in the corner of the field, {corner:.0f} Å off"
    for part in parts:
        if not math.isfinite(part.displacement(distance)):
            raise FormatError(part.path, part.field, "finite numbers", part.said, "Correct the entry.")
        moved = part.displacement(distance)
        if moved <= _WORTH * distance:
            continue
        if not part.rigid and moved > GROSS * distance:
            raise FormatError(
                part.path,
                part.field,
                f"what displaces by {GROSS * distance:.3g} Å at most {where}",
                f"{part.said}, which displaces by up to {moved:.3g} Å",
                "A TiltScheme cannot hold it, and images without it would not fit together.",
            )
        effect = "the tomogram comes out turned by it, which" if part.rigid else "ignored, it"
        warnings.warn(
            f"{part.path}: {part.field}: {part.said} is left behind: {effect} displaces by up to {moved:.3g} Å "
            f"{where}.",
            UserWarning,
            stacklevel=stacklevel,
        )
