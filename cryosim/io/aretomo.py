"""AreTomo's alignment, .aln: SEC counted from 1, ROT and TILT [deg], TX and TY [px].

ROT is the axis angle, TILT the angle, and TX, TY are how far the content is displaced: what RELION and Warp take them
for when they import the file.

AreTomo3's source does not fix its centre to better than half a pixel: it aligns about n / 2 of the raw and (n - 1) / 2
of the aligned image, with the nearest pixel (AreTomo/Correct/GCorrPatchShift.cu), and projects back about n / 2
(AreTomo/Recon/GBackProj.cu). So nothing is corrected for; the file holds the shifts of the convention with n // 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from cryosim.acquisition.tilts import TiltScheme
from cryosim.io.alignments import LARGEST, Alignment, alignment_of, needed, positive, sections_of, sizes
from cryosim.io.files import FormatError, existing_file, read_text, write_text

_HEAD = "# SEC     ROT         GMAG       TX          TY      SMEAN     SFIT    SCALE     BASE     TILT"


def write_aln(
    path: str | Path,
    tilts: TiltScheme,
    pixel_size: float,
    image_shape: tuple[int, int],
    *,
    nominal: torch.Tensor | Sequence[float] | None = None,
) -> None:
    """Write the .aln of a tilt series, as AreTomo3 does but with more digits.

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

    Raises
    ------
    ValueError
        When a size or the nominal angles are not right.
    """
    pixel, (ny, nx) = positive(f"{path}: pixel_size", pixel_size), sizes(f"{path}: image_shape", image_shape, 2)
    sections = sections_of(tilts, nominal)
    lines = ["# AreTomo Alignment / Priims bprmMn", f"# RawSize = {nx} {ny} {len(tilts)}", "# NumPatches = 0"]
    lines += ["# AlphaOffset =     0.00", "# BetaOffset =     0.00", _HEAD]
    for number, (angle, (x, y)) in enumerate(
        zip(sections.angles.tolist(), (sections.shifts / pixel).tolist(), strict=True), 1
    ):
        moved = f"{x + 0.0:12.6f} {y + 0.0:12.6f}"
        lines.append(
            f"{number:5d} {sections.axis_angle + 0.0:12.6f} {1:10.5f} {moved} "
            f"{1:8.2f} {1:8.2f} {1:8.2f} {0:8.2f} {angle + 0.0:12.6f}"
        )
    write_text(path, "\n".join([*lines, "# Local Alignment", ""]))


def read_aln(path: str | Path, pixel_size: float | None) -> Alignment:
    """Alignment of an .aln. Arguments and errors as in `read_alignment`.

    Warns
    -----
    UserWarning
        When the file has local patches, which are left behind.
    """
    from cryoet_alignment.io.aretomo3 import AreTomo3ALN  # takes most of a second

    path = existing_file(path)
    pixel = positive(f"{path}: pixel_size", needed(path, "pixel_size", pixel_size, "that of the images [Å]"))
    try:
        content = AreTomo3ALN.from_string(read_text(path, LARGEST))
    except (ValueError, IndexError, TypeError) as error:
        raise FormatError(path, "content", "an alignment of AreTomo", str(error), "Write it again.") from error
    entries = content.GlobalAlignments
    if content.DarkFrames or len(entries) != content.RawSize[2]:
        raise FormatError(
            path,
            "sections",
            f"all {content.RawSize[2]} of the stack",
            f"{len(entries)}",
            "Take the dark images out of the stack first.",
        )
    entries = sorted(entries, key=lambda entry: entry.sec)
    if any(abs(entry.gmag - 1) > 1e-6 for entry in entries) or content.BetaOffset:
        raise FormatError(path, "GMAG, BetaOffset", "1 and 0", "others", "A TiltScheme has neither.")
    if content.NumPatches:
        warnings.warn(f"{path}: the {content.NumPatches} local patches are left behind.", UserWarning, stacklevel=2)
    rows = torch.tensor([[e.tilt, e.rot, e.tx, e.ty] for e in entries], dtype=torch.float64).reshape(-1, 4)
    return alignment_of(path, rows[:, 0], rows[:, 1], pixel * rows[:, 2:])
