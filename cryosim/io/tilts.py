"""Tilt angles: IMOD's lists (.tlt, .rawtlt) and, through `mdoc`, SerialEM's .mdoc."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from cryosim.acquisition.tilts import TiltScheme
from cryosim.io.files import FormatError, existing_file, read_text, write_text
from cryosim.io.mdoc import read_mdoc, scheme

_LISTS = (".tlt", ".rawtlt")


def read_tilts(path: str | Path) -> TiltScheme:
    """TiltScheme of an .mdoc, .tlt or .rawtlt file.

    Rows stand in the order of exposure when the file is an .mdoc. A list of angles knows neither order nor dose.

    Warns
    -----
    UserWarning
        When order and dose are unknown: rows stand in the file's order, doses are zero, the tilt axis is along y.

    Raises
    ------
    FormatError
        When the file is missing, empty, of another kind, or a value cannot be read.
    """
    path = existing_file(path)
    suffix = path.suffix.lower()
    if suffix == ".mdoc":
        return read_mdoc(path).tilts
    if suffix not in _LISTS:
        raise FormatError(path, "suffix", f"one of .mdoc, {', '.join(_LISTS)}", repr(suffix), "Rename the file.")
    warnings.warn(
        f"{path}: a list of angles tells neither dose nor order of exposure nor the tilt axis; the order of the file "
        "is kept, doses are zero, the axis is along y. Use the .mdoc if there is one.",
        UserWarning,
        stacklevel=2,
    )
    lines = enumerate(read_text(path).splitlines(), 1)
    return scheme(path, [_angle(path, number, line) for number, line in lines if line.strip()])


def write_tlt(path: str | Path, angles: torch.Tensor | Iterable[float]) -> None:
    """Write `angles` (tilt,) [deg], one a line, in the order given; IMOD expects that of the stack's sections."""
    write_text(path, "".join(f"{float(angle) + 0.0:.10g}\n" for angle in angles))


def _angle(path: Path, number: int, line: str) -> float:
    try:
        angle = float(line)
    except ValueError:
        angle = math.nan
    if not -90 < angle < 90:
        raise FormatError(path, f"line {number}", "one tilt angle, -90 to 90 [deg]", repr(line.strip()), "Correct it.")
    return angle
