"""Whether an alignment is of this very stack: its sizes, its binning, its angles, and which row tells which section."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch

from cryosim.io.alignments import Geometry, positive, read_geometry
from cryosim.io.exposures import CLOSE, Exposures, matched
from cryosim.io.files import FormatError

_APART = 5.0  # [deg]: what an alignment may find between neighbouring tilts


def geometry_of_stack(
    path: Path, stack_shape: tuple[int, int, int], pixel: float, aligned_pixel: float | None, name: str | None
) -> Geometry:
    """Geometry of an alignment for images of `pixel` [Å], its own sizes compared with the stack's."""
    n, shape = stack_shape[0], stack_shape[1:]
    binned = pixel if aligned_pixel is None else positive("import_series: alignment_pixel_size", aligned_pixel)
    own = (round(shape[0] * pixel / binned), round(shape[1] * pixel / binned))
    if min(own) < 1:
        raise ValueError(f"import_series: alignment_pixel_size: expected less than the image, got {binned} Å.")
    in_angstrom = path.suffix.lower() == ".xml"
    found = read_geometry(
        path, pixel_size=pixel if in_angstrom else binned, image_shape=shape if in_angstrom else own, name=name
    )
    advice = "Name the alignment of this stack, or, if it was made on binned images, give alignment_pixel_size=."
    if found.pixel_size is not None and abs(found.pixel_size - binned) > 1e-3 * binned:
        raise FormatError(found.path, "pixel size", f"{binned:g} Å", f"{found.pixel_size:g} Å", advice)
    if found.stack_shape is not None:
        sections, *told = found.stack_shape
        if sections not in (None, n):
            raise FormatError(found.path, "sections", f"{n}, as the stack has", f"{sections}", advice)
        expected = shape if in_angstrom else own
        most = 1.0 if in_angstrom else 0.5
        if not all(abs(a - b) <= most for a, b in zip(told, expected, strict=True)):
            got = f"{tuple(round(size, 2) for size in told)}"
            raise FormatError(found.path, "size of an image (y, x)", f"{expected}", got, advice)
    if in_angstrom or binned == pixel:
        return found
    # sample i of a binned image has its middle at i + 1/2 of n: the middles of both images are one place
    places = [binned * (m // 2 + 0.5 - m / 2) - pixel * (k // 2 + 0.5 - k / 2) for m, k in zip(own, shape, strict=True)]
    return found._replace(shifts=found.shifts + torch.tensor(places[::-1], dtype=torch.float64))


class Rows(Protocol):
    """A file with rows for some sections of a stack: an alignment, or CTF fits. Attributes as in `Geometry`."""

    @property
    def path(self) -> Path: ...
    @property
    def used(self) -> torch.Tensor: ...
    @property
    def sections(self) -> torch.Tensor | None: ...
    @property
    def nominal(self) -> torch.Tensor | None: ...
    @property
    def movies(self) -> tuple[str, ...] | None: ...


def rows_of_sections(geometry: Rows, exposures: Exposures | None, n: int) -> torch.Tensor:
    """Row of the file (section,) that tells each section, -1 where none does.

    By the sections it names; else by movie; else by nominal angle; else in the order of the file, all or those it uses.
    """
    path, k = geometry.path, len(geometry.used)
    sections = geometry.sections
    if sections is None:
        sections = _sections_of_rows(geometry, exposures, n)
    if sections is None:
        raise FormatError(
            path,
            "rows",
            f"one for each of the {n} sections, or angles and movies that tell of which",
            f"{k}",
            "Give the .mdoc or list of angles of this very stack.",
        )
    numbers = [z for z in sections.tolist() if z >= 0]
    if len(set(numbers)) < len(numbers) or max(numbers, default=0) >= n:
        raise FormatError(path, "sections", f"each of 0 to {n - 1} at most once", f"{numbers}", "Is it of this stack?")
    rows = torch.full((n,), -1)
    known = sections >= 0
    rows[sections[known]] = torch.arange(k)[known]
    return rows


def _sections_of_rows(geometry: Rows, exposures: Exposures | None, n: int) -> torch.Tensor | None:
    """Section (row,) of rows that carry no number, -1 for those that are in no section."""
    k = len(geometry.used)
    if exposures is not None and exposures.movies is not None and geometry.movies is not None:
        names, wanted = _stems(movie.path for movie in exposures.movies), _stems(geometry.movies)
        if len(set(names)) == n and len(set(wanted)) == k and set(names) & set(wanted):
            return torch.tensor([names.index(name) if name in names else -1 for name in wanted])
    if exposures is not None and geometry.nominal is not None:
        found = matched(geometry.nominal, exposures.tilts.angles, CLOSE)
        if found is not None:
            return found
    if k == n:
        return torch.arange(n)
    if int(geometry.used.sum()) == n:
        return torch.where(geometry.used, torch.cumsum(geometry.used.int(), 0) - 1, -1)
    return None


def _stems(paths: Iterable[str]) -> list[str]:
    """Names without folder and last suffix: a program may have written the movie anew."""
    return [PurePosixPath(path.replace("\\", "/")).stem for path in paths]


def check_angles(path: Path, nominal: torch.Tensor, found: torch.Tensor, sections: torch.Tensor) -> None:
    """The angles found are the nominal ones, but for a common offset (the pre-tilt of a lamella)."""
    apart, opposite = ((sign * found - nominal) for sign in (1, -1))
    worst = (apart - apart.median()).abs()
    if not float(worst.max()) > _APART:
        return
    section = int(sections[int(worst.argmax())])
    mirrored = float((opposite - opposite.median()).abs().max()) <= _APART
    raise FormatError(
        path,
        "angles",
        f"those of the stack within {_APART:g} degrees, {[round(a, 2) for a in nominal.tolist()]}",
        f"{[round(a, 2) for a in found.tolist()]}, off by {float(worst.max()):.1f} degrees at section {section}",
        "They have the other sign: Warp writes such beside its stacks. Give angles= of the microscope's own."
        if mirrored
        else "Is it an alignment of this stack, in this order?",
    )
