"""AreTomo's alignment, .aln: SEC, ROT and TILT [deg], TX and TY [px]; and AreTomo3's list of angles, _TLT.txt.

SEC is the section of the raw stack. AreTomo3 counts it from 1 (CAlignParam.cpp, CSaveXF.cpp), AreTomo2 from 0
(CLoadStack.cpp). Dark images are listed apart, "# DarkFrame = F S TILT", with S counted as SEC is and F the image's
place, from 0, among all by ascending angle (CSaveAlignFile.cpp). AlphaOffset is contained in TILT already
(CAlignParam::AddAlphaOffset); BetaOffset is a tilt about x.

ROT is the axis angle, TILT the angle, and TX, TY are how far the content is displaced: what RELION and Warp take them
for when they import the file.

AreTomo3's source does not fix its centre to better than half a pixel: it aligns about n / 2 of the raw and (n - 1) / 2
of the aligned image, with the nearest pixel (AreTomo/Correct/GCorrPatchShift.cu), and projects back about n / 2
(AreTomo/Recon/GBackProj.cu). So nothing is corrected for; the file holds the shifts of the convention with n // 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cryosim.acquisition.series import Stack
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import rotation_z
from cryosim.io.alignments import LARGEST, Geometry, needed, positive, sections_of, sizes
from cryosim.io.files import FormatError, existing_file, read_text, write_text
from cryosim.io.left_behind import LeftBehind, tilts_about_x
from cryosim.io.mdoc import LARGEST_DOSE

if TYPE_CHECKING:
    from cryoet_alignment.io.aretomo3 import AreTomo3ALN

_MOST = 100_000  # exposures
_HEAD = "# SEC     ROT         GMAG       TX          TY      SMEAN     SFIT    SCALE     BASE     TILT"


def write_aln(
    path: str | Path,
    tilts: TiltScheme,
    pixel_size: float,
    image_shape: tuple[int, int],
    *,
    nominal: torch.Tensor | Sequence[float] | None = None,
    stack: Stack | None = None,
) -> None:
    """Write the .aln of a tilt series, as AreTomo3 does but with more digits.

    Sections of the stack that the series leaves out are listed as dark.

    Parameters
    ----------
    path : str or path
    tilts : TiltScheme
        As the images truly were taken.
    pixel_size : float
        Of the images [Å].
    image_shape : (int, int)
        (y, x) [px].
    nominal : tensor (tilt,), optional
        Angles the stage was asked for [deg], in the order of exposure: they order the sections.
    stack : Stack, optional
        The file the images stand in, in place of `nominal`.

    Raises
    ------
    ValueError
        When a size or the nominal angles are not right.
    """
    pixel, (ny, nx) = positive(f"{path}: pixel_size", pixel_size), sizes(f"{path}: image_shape", image_shape, 2)
    sections = sections_of(tilts, nominal, stack)
    n, places = len(sections.rows), torch.argsort(torch.argsort(sections.nominal, stable=True)).tolist()
    lines = ["# AreTomo Alignment / Priims bprmMn", f"# RawSize = {nx} {ny} {n}", "# NumPatches = 0"]
    lines += [f"# DarkFrame ={places[z]:6d} {z + 1:4d} {sections.nominal[z]:8.2f}" for z in sections.left_out]
    lines += ["# AlphaOffset =     0.00", "# BetaOffset =     0.00", _HEAD]
    shifts = (sections.shifts / pixel).tolist()
    for z in sections.used:
        angle, (x, y) = float(sections.angles[z]), shifts[z]
        moved = f"{x + 0.0:12.6f} {y + 0.0:12.6f}"
        lines.append(
            f"{z + 1:5d} {sections.axis_angle + 0.0:12.6f} {1:10.5f} {moved} "
            f"{1:8.2f} {1:8.2f} {1:8.2f} {0:8.2f} {angle + 0.0:12.6f}"
        )
    write_text(path, "\n".join([*lines, "# Local Alignment", ""]))


def read_aln(path: str | Path, pixel_size: float | None) -> Geometry:
    """Geometry of an .aln, dark images last. Arguments and errors as in `read_alignment`.

    BetaOffset, GMAG and local patches are named in `left_behind`.
    """
    from cryoet_alignment.io.aretomo3 import AreTomo3ALN  # takes most of a second

    path = existing_file(path)
    pixel = positive(f"{path}: pixel_size", needed(path, "pixel_size", pixel_size, "that of the images [Å]"))
    try:
        content = AreTomo3ALN.from_string(read_text(path, LARGEST))
    except (ValueError, IndexError, TypeError) as error:
        raise FormatError(path, "content", "an alignment of AreTomo", str(error), "Write it again.") from error
    entries, dark = content.GlobalAlignments, content.DarkFrames
    nx, ny, n = content.RawSize
    sections = _sections(path, n, [e.sec for e in entries], [(d.section_idx, d.val2) for d in dark])
    rows = [[e.tilt, e.rot, e.tx, e.ty] for e in entries] + [[d.angle, 0.0, 0.0, 0.0] for d in dark]
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return Geometry(
        path,
        values[:, 0],
        rotation_z(values[:, 1])[:, :2, :2],
        pixel * values[:, 2:],
        torch.arange(len(rows)) < len(entries),
        sections=sections,
        stack_shape=(n, ny, nx),
        left_behind=_left_behind(path, content, pixel),
    )


def _left_behind(path: Path, content: AreTomo3ALN, pixel: float) -> tuple[LeftBehind, ...]:
    """BetaOffset, which is a tilt about x; GMAG; and the shifts of the patches that AreTomo takes to be reliable."""
    parts = tilts_about_x(path, "BetaOffset", torch.tensor([content.BetaOffset or 0.0], dtype=torch.float64))
    entries = content.GlobalAlignments
    wrong = next((entry for entry in entries if not 0 < entry.gmag < math.inf), None)
    if wrong is not None:
        raise FormatError(path, f"GMAG at SEC {wrong.sec}", "a positive number", f"{wrong.gmag:g}", "Correct it.")
    magnified = max(entries, key=lambda entry: abs(entry.gmag - 1), default=None)
    if magnified is not None and not abs(magnified.gmag - 1) <= 1e-6:
        said = f"a magnification of {magnified.gmag:g} at SEC {magnified.sec}"
        parts = (*parts, LeftBehind(path, "GMAG", said, stretch=magnified.gmag - 1))
    patches, n = content.LocalAlignments or [], content.NumPatches
    if len(patches) != n * len(entries):
        expected = f"{n * len(entries)} rows, one for each of {n} patches in each image"
        raise FormatError(path, "Local Alignment", expected, f"{len(patches)}", "Is the file whole?")
    if not patches:
        return parts
    largest = max(pixel * math.hypot(patch.shift_x, patch.shift_y) * bool(patch.is_reliable) for patch in patches)
    said = f"the shifts of {n} patches, up to {largest:.3g} Å,"
    return (*parts, LeftBehind(path, "Local Alignment", said, length=largest))


def read_tlt_txt(path: str | Path) -> tuple[list[float], list[int] | None, list[float] | None]:
    """Angle [deg], order of exposure and dose [e-/Å^2] of each section, from a list with one to three columns.

    That is IMOD's .tlt and .rawtlt, and AreTomo's -AngFile and _TLT.txt.

    Raises
    ------
    FormatError
        When a line is something else.
    """
    path, angles, orders, doses = existing_file(path), [], [], []
    for number, line in enumerate(read_text(path, LARGEST).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word) for word in words]
            if (
                len(values) > 3
                or not all(map(math.isfinite, values))
                or not -90 < values[0] < 90
                or not all(0 <= order <= _MOST and order == int(order) for order in values[1:2])
                or not all(0 <= dose <= LARGEST_DOSE for dose in values[2:])
            ):
                raise ValueError
        except ValueError as error:
            expected = "a tilt angle, -90 to 90 [deg], and no more than order (a whole number) and dose [e-/Å^2]"
            raise FormatError(path, f"line {number}", expected, repr(line.strip()), "Correct it.") from error
        angles.append(values[0])
        orders += [int(value) for value in values[1:2]]
        doses += values[2:]
    n = len(angles)
    if not n or len(orders) not in (0, n) or len(doses) not in (0, n):
        raise FormatError(path, "lines", "angles, as many columns in each line", f"{n} lines that differ", "")
    if len(set(orders)) < len(orders):
        raise FormatError(
            path, "order of exposure", "each number once", f"{orders[:100]}", "Correct the second column."
        )
    return angles, orders or None, doses or None


def _sections(path: Path, n: int, kept: list[int], dark: list[tuple[int, int]]) -> torch.Tensor:
    """Sections, counted from 0, of the rows and then of the dark images: all of the stack, each once."""
    trials = (
        (0, [second for _, second in dark]),  # AreTomo2
        (1, [second for _, second in dark]),  # AreTomo3
    )
    if dark and not any(second for _, second in dark):  # cryoet-alignment knows F alone
        trials = (*trials, (1, [first + 1 for first, _ in dark]))
    for first, others in trials:
        if len(kept) + len(others) == n and sorted([*kept, *others]) == list(range(first, first + n)):
            return torch.tensor([*kept, *others]) - first
    raise FormatError(
        path,
        "sections",
        f"all {n} of the stack (RawSize) once, in SEC or as DarkFrame",
        f"SEC {kept} and DarkFrame {dark}",
        "Is the file whole?",
    )
