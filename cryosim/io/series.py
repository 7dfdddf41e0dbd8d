"""Tilt series on disk: a stack of images and, beside it, the files that say what they are."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from cryosim.acquisition.series import Stack, TiltSeries
from cryosim.io.files import FormatError, atomic_write, existing_file
from cryosim.io.mdoc import Mdoc, read_mdoc, write_mdoc
from cryosim.io.mrc import read_stack, stack_dtype, write_stack
from cryosim.io.tilts import read_tilts, write_tlt
from cryosim.microscope.optics import Optics

_STACKS = (".mrc", ".mrcs", ".st", ".ali")
_COMPRESSED = (".gz", ".bz2")


def write_series(path: str | Path, series: TiltSeries, *, dtype: str | None = None) -> list[Path]:
    """Write the stack with sections by ascending angle, as IMOD expects, its .mdoc, .rawtlt and .tlt.

    All files are prepared first and then put in place, the stack last: whoever sees it finds the others. The shifts
    of the tilts are not written: they are what an alignment has to find.

    Parameters
    ----------
    path : str or path
        Of the stack; .mrc is appended when there is no suffix.
    series : TiltSeries
    dtype : str, optional
        As in `write_stack`.

    Returns
    -------
    list of Path
        Files written: stack, .mdoc, .rawtlt, .tlt.

    Raises
    ------
    ValueError
        When the suffix is another, or the images do not fit `dtype`. Nothing is written then.
    """
    stack = Path(path) if Path(path).suffix else Path(f"{path}.mrc")
    if stack.suffix not in _STACKS:
        raise ValueError(f"{stack}: suffix: expected one of {', '.join(_STACKS)}, got {stack.suffix!r}.")
    files = [stack, Path(f"{stack}.mdoc"), stack.with_suffix(".rawtlt"), stack.with_suffix(".tlt")]
    order = torch.argsort(series.tilts.angles, stable=True)
    dtype = dtype or stack_dtype(series.images)
    angles = series.tilts.angles[order]
    with ExitStack() as writing:  # closes in reverse: the stack comes last
        images, mdoc, *lists = (writing.enter_context(atomic_write(file)) for file in files)
        write_stack(images, series.images[order.to(series.images.device)], float(series.pixel_size), dtype=dtype)
        write_mdoc(mdoc, series, stack.name, order, dtype=dtype)
        for file in lists:
            write_tlt(file, angles)
    return files


def read_series(path: str | Path, *, pixel_size: float | None = None, optics: Optics | None = None) -> TiltSeries:
    """Read a stack and what stands beside it: <path>.mdoc, <stem>.mdoc, <stem>.tlt or <stem>.rawtlt, the first found.

    Parameters
    ----------
    path : str or path
        Of the stack, plain, .gz or .bz2.
    pixel_size : float, optional
        [Å] in place of the files'.
    optics : Optics, optional
        In place of the file's; fields () or (tilt,) in the order of exposure.

    Returns
    -------
    TiltSeries
        images (tilt, y, x) float32 in the order of exposure; shifts are zero; optics None when neither given nor in
        the .mdoc (only `write_series` puts all of them there).

    Warns
    -----
    UserWarning
        When the files do not tell dose or order.

    Raises
    ------
    FormatError
        When a file is missing or malformed, or the files disagree in the number of tilts or the pixel size.
    """
    path = existing_file(path)
    beside = _beside(path)
    if beside.suffix.lower() == ".mdoc":
        mdoc = read_mdoc(beside)
    else:
        tilts = read_tilts(beside)
        mdoc = Mdoc(tilts, torch.arange(len(tilts)))
    images, spacing = images_and_pixel_size(path, pixel_size, mdoc)
    n = images.shape[0]
    if len(mdoc.tilts) != n:
        raise FormatError(
            path,
            "sections",
            f"{len(mdoc.tilts)}, one for each tilt of {beside}",
            f"{n}",
            "Remove the tilts that are not in the stack, or name the right file.",
        )
    if sorted(mdoc.sections.tolist()) != list(range(n)):
        raise FormatError(
            beside,
            "ZValue",
            f"each of 0 to {n - 1} once",
            f"{mdoc.sections.tolist()}",
            f"They number the sections of {path}.",
        )
    optics = mdoc.optics if optics is None else optics
    stack = Stack(str(path), mdoc.sections, tuple(mdoc.tilts.angles[torch.argsort(mdoc.sections)].tolist()))
    return TiltSeries(images[mdoc.sections], spacing, mdoc.tilts, optics, mdoc.movies, stack)


def _beside(path: Path) -> Path:
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    names = [Path(f"{plain}.mdoc"), *(plain.with_suffix(suffix) for suffix in (".mdoc", ".tlt", ".rawtlt"))]
    for name in names:
        if name.exists():
            return name
    raise FormatError(
        path,
        "tilt angles",
        "a file beside it",
        f"none of {', '.join(name.name for name in names)}",
        "Copy the .mdoc or the list of angles into the folder.",
    )


def images_and_pixel_size(path: Path, pixel_size: float | None, mdoc: Mdoc) -> tuple[torch.Tensor, float]:
    """Images and pixel size; the .mdoc's, which has more digits, stands in for the header's or has to agree with it."""
    if pixel_size is not None or mdoc.pixel_size is None:
        return read_stack(path, pixel_size=pixel_size)
    try:
        images, spacing = read_stack(path)
    except FormatError as error:
        if not error.field.startswith("cella"):
            raise
        return read_stack(path, pixel_size=mdoc.pixel_size)
    if abs(spacing - mdoc.pixel_size) > 1e-3 * spacing:
        raise FormatError(
            path,
            "pixel size",
            f"{mdoc.pixel_size:g} Å as in its .mdoc",
            f"{spacing:g} Å",
            "Give the right one as pixel_size=.",
        )
    return images, mdoc.pixel_size
