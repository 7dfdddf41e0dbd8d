"""What was found of a series, in the file of the program that shall read it, which the suffix tells.

========  ==============  =========  ========  =================================================================
suffix    program         alignment  CTF fits  beside it, and the hand
========  ==============  =========  ========  =================================================================
.xf       IMOD            yes        no        .tlt (true angles), .rawtlt (nominal ones)
.aln      AreTomo         yes        no
.star     RELION 5        yes        yes       tilt_series/NAME.star; rlnTomoHand
.xml      Warp            yes        yes       AreAnglesInverted
.defocus  IMOD            no         yes       none: see `cryosim.io.ctf_text`
.txt      CTFFIND         no         yes       none
========  ==============  =========  ========  =================================================================

Rows of a series stand in the order of exposure, lines of a file in that of the stack: `TiltSeries.stack` tells it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cryosim.acquisition.series import Movie, TiltSeries
from cryosim.io.aretomo import write_aln
from cryosim.io.ctf_text import write_ctffind, write_imod_defocus
from cryosim.io.imod import write_xf
from cryosim.io.relion import write_relion
from cryosim.io.warp import write_warp

Part = Literal["alignment", "ctf"]

_HOLDS: dict[str, tuple[str, tuple[Part, ...]]] = {
    ".xf": ("IMOD", ("alignment",)),
    ".aln": ("AreTomo", ("alignment",)),
    ".star": ("RELION 5", ("alignment", "ctf")),
    ".xml": ("Warp", ("alignment", "ctf")),
    ".defocus": ("IMOD", ("ctf",)),
    ".txt": ("CTFFIND", ("ctf",)),
}
_TELL_OPTICS = (".star", ".defocus", ".txt")
_WORDS = {"alignment": "an alignment", "ctf": "CTF fits"}


def calibration_path(path: str | Path, part: Part | None = None) -> Path:
    """`path`, if `write_calibration` can write `part` there: found out before that is computed.

    Parameters
    ----------
    path : str or path
    part : {"alignment", "ctf"}, optional
        What the file shall hold.

    Raises
    ------
    ValueError
        When no program has files of this suffix that hold it, or there is no such folder.
    """
    path = Path(path)
    known = {suffix: program for suffix, (program, parts) in _HOLDS.items() if part is None or part in parts}
    if path.suffix.lower() not in known:
        what = "" if part is None else f", which hold {_WORDS[part]}"
        names = ", ".join(f"{suffix} ({program})" for suffix, program in known.items())
        raise ValueError(
            f"{path}: suffix: expected one of {names}{what}, got {path.suffix!r}. Name the file after the program that "
            "shall read it."
        )
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path}: expected a file in an existing folder. Make the folder first.")
    return path


def check_optics(path: str | Path, series: TiltSeries) -> None:
    """Raise ValueError where a file of this suffix tells of a lens and the series does not."""
    suffix = Path(path).suffix.lower()
    if series.optics is None and suffix in _TELL_OPTICS:
        raise ValueError(
            f"{path}: optics: expected a series with voltage and defocus, of which such a file of {_HOLDS[suffix][0]} "
            "tells, got none. Fit the CTF first, or give the file of its fits."
        )


def write_calibration(path: str | Path, series: TiltSeries, *, hand: int = 1) -> list[Path]:
    """Write angles, shifts and axis of a series, or its optics, or both, as the suffix tells.

    Every file is written whole or stays as it was. RELION's and Warp's files name a tomogram as wide as the images and
    half as thick, at the pixel size of the images, whose sample n // 2 is the specimen's origin.

    Parameters
    ----------
    path : str or path
        .xf, .aln, .star, .xml, .defocus or .txt.
    series : TiltSeries
        With the geometry and optics found. Lines stand as `series.stack` tells, by ascending angle when it is None.
    hand : {1, -1}
        -1 where the defocus of a point falls with its height along the beam of this geometry; see `fit_series_ctf`.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    ValueError
        When the suffix is another, or the series lacks what such a file tells. Nothing is written then.

    Warns
    -----
    UserWarning
        When sections are left out of an .xf, which cannot tell it.
    """
    path, tilts, stack = calibration_path(path), series.tilts, series.stack
    check_optics(path, series)
    pixel, (ny, nx), suffix = float(series.pixel_size), series.images.shape[1:], path.suffix.lower()
    volume = (2 * math.ceil(nx / 4), 2 * math.ceil(ny / 2), 2 * math.ceil(nx / 2))  # even, as RELION has them
    if suffix == ".xf":
        return write_xf(path, tilts, pixel, (ny, nx), stack=stack)
    if suffix == ".aln":
        write_aln(path, tilts, pixel, (ny, nx), stack=stack)
        return [path]
    if suffix == ".xml":
        given = {"optics": series.optics, "movies": _movies(path, series), "stack": stack, "hand": hand}
        write_warp(path, tilts, pixel, (ny, nx), volume, **given)
        return [path]
    optics = series.optics
    assert optics is not None
    if suffix == ".star":
        name = path.stem if stack is None else Path(stack.path).stem
        images = f"{name}.mrc" if stack is None else stack.replace(path=os.path.relpath(stack.path, path.parent))
        how = {"name": name, "stack": images, "movies": _movies(path, series), "hand": hand}
        row = write_relion(path, tilts, optics, pixel, volume, **how)
        return [path, path.parent / row.tilt_series]
    if suffix == ".defocus":
        write_imod_defocus(path, tilts, optics, stack=stack)
    else:
        write_ctffind(path, tilts, optics, pixel, stack=stack)
    return [path]


def _movies(path: Path, series: TiltSeries) -> Sequence[Movie] | None:
    """Movies as seen from the folder of `path`; None where they are known by the names of the microscope's computer."""
    if series.movies is None or any(set("\\\"'# ") & set(m.path) or m.path.startswith("/") for m in series.movies):
        return None
    folder = path.parent if series.stack is None else Path(series.stack.path).parent
    return [movie._replace(path=os.path.relpath(folder / movie.path, path.parent)) for movie in series.movies]
