"""What is known of the exposure that stands in each section of a stack: from its .mdoc, a list of angles, or both.

An .mdoc tells dose, order and tilt axis, but its ZValue numbers the sections only when it was written with the stack.
One that was written with the movies counts exposures, and then the list of the stack's own angles tells which is which.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from cryosim.acquisition.series import Movie
from cryosim.acquisition.tilts import TiltScheme
from cryosim.io.alignments import Geometry
from cryosim.io.aretomo import read_tlt_txt
from cryosim.io.files import FormatError, read_text
from cryosim.io.mdoc import Mdoc, read_mdoc
from cryosim.microscope.optics import Optics

CLOSE = 0.5  # [deg]: two nominal angles of one exposure
_COMPRESSED = (".gz", ".bz2")


class Companions(NamedTuple):
    """Files that belong to a stack; None where there is none."""

    mdoc: Path | None
    angles: Path | None
    alignment: Path | None


class Exposures(NamedTuple):
    """Exposures in the order of the sections.

    Attributes
    ----------
    tilts : TiltScheme
        With nominal angles and no shifts; doses are zero where unknown.
    order : tensor (section,) or None
        Numbers that ascend in the order of exposure.
    movies : tuple of Movie or None
    optics : Optics or None
    voltage : float or None
        Of the .mdoc [kV].
    target : tensor (section,) or None
        Defocus the microscope was asked for [Å].
    missing : float
        Dose of exposures that have no section [e-/Å^2].
    told : bool
        Whether the angles were found outside the alignment.
    """

    tilts: TiltScheme
    order: torch.Tensor | None = None
    movies: tuple[Movie, ...] | None = None
    optics: Optics | None = None
    voltage: float | None = None
    target: torch.Tensor | None = None
    missing: float = 0.0
    told: bool = True


def companions(
    stack: Path,
    mdoc: str | Path | None = None,
    angles: str | Path | None = None,
    alignment: str | Path | None = None,
) -> Companions:
    """Files given, and else those beside STEM.mrc: STEM.mrc.mdoc or STEM.mdoc; STEM.rawtlt, STEM_TLT.txt or, without an
    .mdoc, STEM.tlt; STEM.xf, STEM.aln, STEM.xml or STEM.star.

    Raises
    ------
    ValueError
        When there are several alignments to choose from.
    """
    plain = stack.with_suffix("") if stack.suffix.lower() in _COMPRESSED else stack
    stem = plain.with_suffix("")
    mdoc = _first(Path(f"{plain}.mdoc"), Path(f"{stem}.mdoc")) if mdoc is None else Path(mdoc)
    if angles is None:
        lists = (".rawtlt", "_TLT.txt", *(() if mdoc else (".tlt",)))
        angles = _first(*(Path(f"{stem}{end}") for end in lists))
    if alignment is None:
        found = [file for end in (".xf", ".aln", ".xml", ".star") if (file := Path(f"{stem}{end}")).exists()]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{stack}: alignment: expected one beside the stack, got {names}. Give it as alignment=.")
        alignment = found[0] if found else None
    return Companions(mdoc, None if angles is None else Path(angles), None if alignment is None else Path(alignment))


def exposures_of(stack: Path, n: int, files: Companions, mdoc: Mdoc | None) -> Exposures | None:
    """Exposures of the `n` sections of `stack`, None when neither .mdoc nor list tells them.

    Raises
    ------
    FormatError
        When numbers or angles disagree.
    """
    if files.angles is None:
        return None if mdoc is None or files.mdoc is None else _of_mdoc(stack, n, files.mdoc, mdoc)
    angles, orders, doses = read_tlt_txt(files.angles)
    if len(angles) != n:
        raise FormatError(files.angles, "lines", f"{n}, one for each section of {stack}", f"{len(angles)}", "")
    wanted = torch.tensor(angles, dtype=torch.float64)
    if mdoc is None or files.mdoc is None:
        known = torch.zeros(n, dtype=torch.float64) if doses is None else torch.tensor(doses, dtype=torch.float64)
        return Exposures(TiltScheme(wanted, known), None if orders is None else torch.tensor(orders))
    rows = _rows_by_number(mdoc, n)
    if rows is None or float((mdoc.tilts.angles[rows] - wanted).abs().max()) > CLOSE:
        rows = matched(wanted, mdoc.tilts.angles, CLOSE)
    if rows is None:
        raise FormatError(
            files.angles,
            "angles",
            f"each that of one exposure of {files.mdoc} within {CLOSE:g} degrees",
            f"{angles}, there {mdoc.tilts.angles.tolist()}",
            "Are both of this stack?",
        )
    found = _in_sections(mdoc, rows)
    return found._replace(tilts=found.tilts.replace(angles=wanted))


def exposures_of_alignment(geometry: Geometry, rows: torch.Tensor) -> Exposures:
    """Exposures of the sections whose rows (section,) an alignment tells; angles are 0 where it has none (-1)."""
    known = geometry.nominal is not None and bool((geometry.nominal.abs() < 90).all())
    asked = geometry.nominal if known and geometry.nominal is not None else geometry.angles
    angles = torch.where(rows < 0, 0.0, asked[rows])
    return Exposures(TiltScheme(angles, torch.zeros_like(angles)), told=False)


def matched(wanted: torch.Tensor, found: torch.Tensor, within: float) -> torch.Tensor | None:
    """Index into `found` (k,) of the one value `within` reach of each wanted (m,); None when not one to one."""
    near = (wanted[:, None] - found).abs() <= within
    if not bool((near.sum(1) == 1).all() and (near.sum(0) <= 1).all()):
        return None
    return near.int().argmax(1)


def told_image_shape(path: Path) -> tuple[int, int] | None:
    """(y, x) [px] of ImageSize in the head of an .mdoc, None where there is none."""
    found = re.search(r"^\s*ImageSize\s*=\s*(\d{1,6})\s+(\d{1,6})\s*$", read_text(path), re.MULTILINE)
    return None if found is None else (int(found.group(2)), int(found.group(1)))


def told_voltage(stack: Path) -> float | None:
    """Of the .mdoc beside a stack [kV]; None where there is none, or it does not tell."""
    plain = stack.with_suffix("") if stack.suffix.lower() in _COMPRESSED else stack
    path = _first(Path(f"{plain}.mdoc"), plain.with_suffix(".mdoc"))
    return None if path is None else read_mdoc(path).voltage


def mdoc_of(files: Companions) -> Mdoc | None:
    """What the .mdoc says, if there is one."""
    return None if files.mdoc is None else read_mdoc(files.mdoc)


def _of_mdoc(stack: Path, n: int, path: Path, mdoc: Mdoc) -> Exposures:
    rows = _rows_by_number(mdoc, n)
    if rows is None:
        numbers = "" if len(mdoc.tilts) != n else f", with ZValue {mdoc.sections.tolist()}"
        raise FormatError(
            path,
            "sections",
            f"{n} of ZValue 0 to {n - 1}, one for each section of {stack}",
            f"{len(mdoc.tilts)}{numbers}",
            "Give angles=, a list with the angle of each section of the stack.",
        )
    return _in_sections(mdoc, rows)


def _rows_by_number(mdoc: Mdoc, n: int) -> torch.Tensor | None:
    """Row of the .mdoc (section,) by ZValue, None when that does not number `n` sections."""
    if sorted(mdoc.sections.tolist()) != list(range(n)):
        return None
    return torch.argsort(mdoc.sections)


def _in_sections(mdoc: Mdoc, rows: torch.Tensor) -> Exposures:
    return Exposures(
        mdoc.tilts.index(rows),
        rows,  # of an .mdoc stand in the order of exposure
        None if mdoc.movies is None else tuple(mdoc.movies[row] for row in rows.tolist()),
        None if mdoc.optics is None else mdoc.optics.index(rows),
        mdoc.voltage,
        None if mdoc.defocus is None else mdoc.defocus[rows],
        float(mdoc.tilts.doses.sum() - mdoc.tilts.doses[rows].sum()),
    )


def _first(*files: Path) -> Path | None:
    return next((file for file in files if file.exists()), None)
