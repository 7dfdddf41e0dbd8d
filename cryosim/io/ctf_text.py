"""CTF fits in plain text: CTFFIND 4 and 5, AreTomo (_CTF.txt) and IMOD (.defocus).

CTFFIND writes a line for each image of the stack: its number from 1, two defoci [Å], the azimuth of the first [deg],
the phase shift [rad], then how good the fit was; CTFFIND 5 goes on with tilt and thickness. A comment tells voltage
[keV], spherical aberration [mm] and amplitude contrast. AreTomo3 (CSaveCtfResults.cpp) has the same columns, an eighth
with the hand of the tilt, no such comment, and numbers all images of the stack by ascending angle, dark ones included.
AreTomo2 has no eighth column and leaves dark images out; it, too, sorts the stack by angle (CLoadMain.cpp).

IMOD (man ctfphaseflip) has ranges of views, counted from 1, and angles they span [deg]:

    version 2    start end angle angle defocus [nm]                                          "2" ends the first line
    version 3    start end angle angle defocus [defocus azimuth] [phase] [cut-on]            after a line that holds
                 flags 0 0 0 0 3

where flags is the sum of 1 (astigmatism), 2 (its azimuth in radians), 4 (phase shift), 8 (that in radians), 16 (angles
are inverted), 32 (cut-on frequency). A value belongs to the middle of its range; between, it is interpolated here.
The azimuth is one of the raw images, of the first defocus (ctfphaseflip.cpp: 0.5 (df1 + df2 + (df1 - df2) cos(2 (angle
- axis))), and ctfutils.cpp turns it by 90 degrees where it exchanges the two): ctfphaseflip turns it with the
transforms of an aligned stack. AreTomo3's _CTF_Imod.txt has the smaller defocus first but the azimuth of the larger,
as in its _CTF.txt, which is the one to read.

None of them but AreTomo3 tells the hand. ctfphaseflip takes the defocus to rise along +x of the aligned image at a
positive angle (ctfphaseflip.cpp: deltaZ = (nx / 2 - x) tan(angle), and "the defocus is higher with negative deltaZ"),
where ours falls: of a series whose hand is ours it needs its option -invert. Flag 16 is of the file's own angles alone.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import numpy
import torch

from cryosim.acquisition.series import Stack
from cryosim.acquisition.tilts import TiltScheme
from cryosim.io.alignments import LARGEST, Sections, constant, positive, sections_of
from cryosim.io.files import FormatError, existing_file, read_text, write_text
from cryosim.io.fitted_optics import FittedOptics
from cryosim.microscope.optics import Optics, check_per_tilt

_CONSTANTS = {
    "pixel_size": r"Pixel size:\s*(\S+)\s*Angstroms",
    "voltage": r"acceleration voltage:\s*(\S+)\s*keV",
    "spherical_aberration": r"spherical aberration:\s*(\S+)\s*mm",
    "amplitude_contrast": r"amplitude contrast:\s*([^\s;]+)",
}
_ASTIGMATISM, _AZIMUTH_RADIANS, _PHASE, _PHASE_RADIANS, _INVERTED, _CUT_ON = (2**bit for bit in range(6))
_MOST_VIEWS = 100_000


def read_ctffind(path: str | Path) -> FittedOptics:
    """CTF fits of a diagnostic .txt of CTFFIND, or a _CTF.txt of AreTomo3. Errors as in `read_fitted_optics`.

    Warns
    -----
    UserWarning
        When AreTomo3 found that electrons travel along -z of its geometry (dfHand -1).
    """
    path = existing_file(path)
    text = read_text(path, LARGEST).lstrip("\ufeff")
    rows = _rows(path, text, 6, math.inf, comment="#", finite=5)
    hands = [row[7] for row in rows if len(row) == 8]
    numbers = [row[0] for row in rows]
    if len(hands) not in (0, len(rows)) or any(hand not in (-1, 0, 1) for hand in hands):
        raise FormatError(path, "columns", "7, or 8 with a hand of 1 or -1, in each row", f"hands {hands}", "")
    first = min(numbers)
    if first not in (0, 1) or any(number != int(number) for number in numbers) or len(set(numbers)) < len(numbers):
        raise FormatError(path, "numbers of images", "each once, from 1", f"{numbers[:50]}", "Is the file whole?")
    if -1 in hands:
        warnings.warn(
            f"{path}: dfHand is -1: electrons travel along -z of this geometry. What is further up is less out of "
            "focus: images and tomogram are right, a defocus that varies with height is not.",
            UserWarning,
            stacklevel=5,
        )
    values = torch.tensor([row[:5] for row in rows], dtype=torch.float64)
    constants = {}
    for field, pattern in _CONSTANTS.items():
        if found := re.search(pattern, text):
            constants[field] = _number(path, f"comment, {field}", found.group(1))
    return FittedOptics(
        path,
        values[:, 1:3].mean(1),
        values[:, 1] - values[:, 2],
        values[:, 3],
        torch.rad2deg(values[:, 4]),
        torch.ones(len(rows), dtype=torch.bool),
        sections=(values[:, 0] - first).long(),
        ascending=bool(hands) or "#1 micrograph number" in text,  # CTFFIND has "#1 - micrograph number"
    )._replace(**constants)


def read_imod_defocus(path: str | Path) -> FittedOptics:
    """CTF fits of IMOD's ctfplotter, a row for each view up to the last. Errors as in `read_fitted_optics`.

    Warns
    -----
    UserWarning
        When the file has ranges of views, between which is interpolated, or a cut-on frequency, which is ignored.
    """
    path = existing_file(path)
    rows = _rows(path, read_text(path, LARGEST).lstrip("\ufeff"), 5, 10)
    head = rows[0]
    version = head[5] if len(head) == 6 else None
    if version not in (2, 3):
        raise FormatError(path, "line 1, version", "2 or 3 as the sixth number", f"{head}", "Write it with a new IMOD.")
    flags = int(head[0]) if version == 3 else 0
    rows = rows[1:] if version == 3 else [head[:5], *rows[1:]]
    if not 0 <= flags < 64 or not rows:
        raise FormatError(path, "line 1, flags", "a sum of 1 to 32, and lines after it", f"{head}", "Is it whole?")
    columns = 5 + 2 * bool(flags & _ASTIGMATISM) + bool(flags & _PHASE) + bool(flags & _CUT_ON)
    for number, row in enumerate(rows, 1):
        if len(row) != columns or not 1 <= row[0] <= row[1] <= _MOST_VIEWS or row[0] % 1 or row[1] % 1:
            expected = f"{columns} numbers, the first two views from 1"
            raise FormatError(path, f"entry {number}", expected, f"{row}", "Correct the entry.")
    if flags & _CUT_ON:
        warnings.warn(f"{path}: the cut-on frequency of the phase shift is ignored.", UserWarning, stacklevel=5)
    table = torch.tensor(rows, dtype=torch.float64)
    first, second = table[:, 4], table[:, 5] if flags & _ASTIGMATISM else table[:, 4]
    azimuth = table[:, 6] if flags & _ASTIGMATISM else torch.zeros_like(first)
    phase = table[:, 7 if flags & _ASTIGMATISM else 5] if flags & _PHASE else torch.zeros_like(first)
    if float(azimuth.abs().max()) > 3600 or float(table[:, 4:].abs().max()) > 1e6:
        got = f"{azimuth.tolist()[:50]}, of {table[:, 4:].abs().max():g} at most"
        raise FormatError(path, "defocus, azimuth", "numbers up to 1e6, angles up to 3600", got, "Correct the entry.")
    azimuth = torch.rad2deg(azimuth) if flags & _AZIMUTH_RADIANS else azimuth
    phase = torch.rad2deg(phase) if flags & _PHASE_RADIANS else phase
    return _of_views(path, table[:, :2], 5 * (first + second), 10 * (first - second), azimuth, phase)


def write_ctffind(
    path: str | Path, tilts: TiltScheme, optics: Optics, pixel_size: float, *, stack: Stack | None = None
) -> None:
    """Write CTF fits in the columns of CTFFIND 4, with 0 for the quality of the fits, which `Optics` does not tell.

    Parameters
    ----------
    path : str or path
    tilts : TiltScheme
    optics : Optics
        Fields () or (tilt,).
    pixel_size : float
        Of the images [Å].
    stack : Stack, optional
        The file the images stand in; by ascending angle when left out. Sections it leaves out have no line.

    Raises
    ------
    ValueError
        When voltage, spherical aberration or amplitude contrast change from tilt to tilt.
    """
    pixel, sections = positive(f"{path}: pixel_size", pixel_size), sections_of(tilts, stack=stack)
    voltage, aberration, contrast = (
        constant(path, field, getattr(optics, field))
        for field in ("voltage", "spherical_aberration", "amplitude_contrast")
    )
    lines = [
        "# CTF fits of cryosim, in the columns of CTFFIND 4",
        f"# Pixel size: {pixel:.10g} Angstroms ; acceleration voltage: {voltage:.10g} keV ; spherical aberration: "
        f"{aberration:.10g} mm ; amplitude contrast: {contrast:.10g}",
        "# Columns: #1 - micrograph number; #2 - defocus 1 [Angstroms]; #3 - defocus 2; #4 - azimuth of astigmatism; "
        "#5 - additional phase shift [radians]; #6 - cross correlation; #7 - spacing (in Angstroms) up to which CTF "
        "rings were fit successfully",
    ]
    for z, first, second, azimuth, phase in _fits(sections, optics, len(tilts)):
        lines.append(f"{z + 1:4d} {first:14.4f} {second:14.4f} {azimuth:12.6f} {math.radians(phase):12.8f} 0.0 0.0")
    write_text(path, "\n".join([*lines, ""]))


def write_imod_defocus(path: str | Path, tilts: TiltScheme, optics: Optics, *, stack: Stack | None = None) -> None:
    """Write CTF fits as IMOD's ctfplotter does: version 3, with astigmatism, and a phase shift where there is one.

    Parameters
    ----------
    path : str or path
    tilts : TiltScheme
        As the images truly were taken, if that is known.
    optics : Optics
        Fields () or (tilt,).
    stack : Stack, optional
        The file the images stand in; by ascending angle when left out. Between the views that have a line, IMOD
        interpolates.
    """
    sections = sections_of(tilts, stack=stack)
    fits = _fits(sections, optics, len(tilts))
    shifted = any(phase for *_, phase in fits)
    lines = [f"{_ASTIGMATISM + _PHASE * shifted}\t0\t0.0\t0.0\t0.0\t3"]
    for z, first, second, azimuth, phase in fits:
        values = [sections.angles[z], sections.angles[z], first / 10, second / 10, azimuth, *([phase] * shifted)]
        lines.append("\t".join([str(z + 1), str(z + 1), *(f"{float(value) + 0.0:.10g}" for value in values)]))
    write_text(path, "\n".join([*lines, ""]))


def _fits(sections: Sections, optics: Optics, n: int) -> list[tuple[int, float, float, float, float]]:
    """Section, larger and smaller defocus [Å], azimuth of the larger within -90 to 90, phase shift [deg]."""
    check_per_tilt(optics, n)
    defocus, astigmatism, azimuth, phase = (
        torch.as_tensor(getattr(optics, field), dtype=torch.float64).detach().cpu().expand(n)
        for field in ("defocus", "astigmatism", "astigmatism_angle", "phase_shift")
    )
    azimuth = torch.remainder(torch.where(astigmatism < 0, azimuth + 180, azimuth + 90), 180) - 90
    values = torch.stack([defocus + astigmatism.abs() / 2, defocus - astigmatism.abs() / 2, azimuth, phase], 1)
    rows = sections.rows.tolist()
    return [(z, *values[rows[z]].tolist()) for z in sections.used]


def _of_views(
    path: Path,
    ranges: torch.Tensor,
    defocus: torch.Tensor,
    astigmatism: torch.Tensor,
    azimuth: torch.Tensor,
    phase: torch.Tensor,
) -> FittedOptics:
    """Fits of all views in or between `ranges` (range, 2), from values (range,) at the ranges' middles.

    Astigmatism is a tensor, so its two components are interpolated, as cos and sin of twice the azimuth.
    """
    middles = ranges.mean(1)
    order = torch.argsort(middles, stable=True)
    if len(set(middles.tolist())) < len(middles):
        raise FormatError(path, "views", "ranges that do not repeat", f"middles {middles[order].tolist()}", "")
    if (
        bool((ranges[:, 0] != ranges[:, 1]).any())
        or float(middles[order].diff().abs().amax().item() if len(order) > 1 else 1) > 1
    ):
        warnings.warn(
            f"{path}: ranges of several views; the defocus is interpolated between their middles.",
            UserWarning,
            stacklevel=6,
        )
    views = numpy.arange(int(ranges.min()), int(ranges.max()) + 1)

    def at_views(values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(numpy.interp(views, middles[order].numpy(), values[order].numpy()))

    double = torch.deg2rad(2 * azimuth)
    along, across = at_views(astigmatism * torch.cos(double)), at_views(astigmatism * torch.sin(double))
    return FittedOptics(
        path,
        at_views(defocus),
        torch.hypot(along, across),
        torch.rad2deg(torch.atan2(across, along)) / 2,
        at_views(phase),
        torch.ones(len(views), dtype=torch.bool),
        sections=torch.from_numpy(views - 1),
    )


def _rows(
    path: Path, text: str, least: int, most: float, *, comment: str | None = None, finite: int | None = None
) -> list[list[float]]:
    """Numbers of each line that is neither empty nor a comment, the first `finite` of them (else all) finite.

    CTFFIND writes inf and nan for the quality of a poor fit.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or (comment is not None and words[0].startswith(comment)):
            continue
        if not least <= len(words) <= most:
            raise FormatError(path, f"line {number}", f"{least} numbers or more", repr(line.strip()[:200]), "")
        row = [_number(path, f"line {number}", word) for word in words[:finite]]
        row += [] if finite is None else [_number(path, f"line {number}", w, infinite=True) for w in words[finite:]]
        rows.append(row)
    if not rows:
        raise FormatError(path, "lines", "at least one CTF fit", "none", "Is the file whole?")
    return rows


def _number(path: Path, where: str, text: str, *, infinite: bool = False) -> float:
    try:
        value = float(text)
        good = infinite or math.isfinite(value)
    except ValueError:
        value, good = math.nan, False
    if not good:
        expected = "a number" if infinite else "a finite number"
        raise FormatError(path, where, expected, repr(text[:40]), "Correct the entry.")
    return value
