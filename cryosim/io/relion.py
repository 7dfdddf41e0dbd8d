"""Tilt series of RELION 5: tomograms.star with one row a tomogram, and a file with one row a tilt for each.

RELION projects (Tomogram::setProjectionMatrix) with right-handed rotations of pixel coordinates that count from 0,

    r = n // 2 + (XShiftAngst, YShiftAngst) / pixel_size + [R_z(ZRot) R_y(YTilt) R_x(XTilt) (q - N // 2)]_xy

which is `TiltScheme` as it stands, with XTilt = 0 and sizes N in pixels of the tilt series. It takes the defocus of a
place q to be that of the tilt + rlnTomoHand times the height of P q above the centre (Tomogram::getCtf). Ours is the
defocus of the tilt + that height, electrons travelling along +z, so rlnTomoHand = 1, unless the images say otherwise.
(RELION's documentation has -1 for the microscopes its authors have met: their z points the other way.)

Some places of RELION take the centre of a tomogram to be N / 2, others N // 2: the sizes written here are even.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas
import starfile
import torch

from cryosim.acquisition.series import Movie, Stack
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import rotation_z
from cryosim.io.alignments import Geometry, Sections, constant, positive, sections_of, sizes
from cryosim.io.files import FormatError, atomic_write, existing_file, read_text
from cryosim.io.left_behind import tilts_about_x
from cryosim.microscope.optics import Optics, check_per_tilt

HAND = 1
"""rlnTomoHand of this package: what lies further along the beam is more out of focus, in underfocus."""

_KNOWN = ("rlnTomoNominalStageTiltAngle", "rlnMicrographPreExposure")
_GEOMETRY = ("rlnTomoYTilt", "rlnTomoZRot", "rlnTomoXShiftAngst", "rlnTomoYShiftAngst")


class RelionTomogram(NamedTuple):
    """Row of a tomograms.star.

    Attributes
    ----------
    name : str
        rlnTomoName.
    tilt_series : str
        File with its tilts, seen from the folder of the tomograms.star.
    pixel_size : float
        Of the tilt series [Å].
    size : (int, int, int)
        (x, y, z) [px of the tilt series].
    voltage : float
        [kV].
    spherical_aberration : float
        [mm].
    amplitude_contrast : float
        [1].
    optics_group : str
        rlnOpticsGroupName.
    hand : int
        rlnTomoHand.
    """

    name: str
    tilt_series: str
    pixel_size: float
    size: tuple[int, int, int]
    voltage: float
    spherical_aberration: float
    amplitude_contrast: float
    optics_group: str = "opticsGroup1"
    hand: int = HAND


def write_relion(
    path: str | Path,
    tilts: TiltScheme,
    optics: Optics,
    pixel_size: float,
    volume_shape: tuple[int, int, int],
    *,
    name: str,
    stack: str | Stack,
    voxel_size: float | None = None,
    movies: Sequence[Movie] | None = None,
    nominal: torch.Tensor | Sequence[float] | None = None,
    optics_group: str = "opticsGroup1",
    hand: int = HAND,
) -> RelionTomogram:
    """Write the tomograms.star of one tilt series and, beside it, tilt_series/NAME.star.

    RELION reads both, and the images, from the folder it is started in: start it beside the tomograms.star.

    Parameters
    ----------
    path : str or path
        Of the tomograms.star.
    tilts : TiltScheme
        As the images truly were taken.
    optics : Optics
        Fields () or (tilt,) in the order of exposure.
    pixel_size : float
        Of the images [Å].
    volume_shape : (int, int, int)
        (z, y, x) of the tomogram.
    name : str
        rlnTomoName.
    stack : str or Stack
        File of the images, as RELION will find it; a mere name has its sections by ascending nominal angle.
    voxel_size : float, optional
        Of the tomogram [Å]; `pixel_size` when left out.
    movies : sequence of Movie, optional
        In the order of exposure, as RELION will find them.
    nominal : tensor (tilt,), optional
        Angles the stage was asked for [deg], in the order of exposure: they order the sections.
    optics_group : str
        rlnOpticsGroupName.
    hand : {1, -1}
        rlnTomoHand: -1 where the defocus of a point falls with its height along the beam of this geometry.

    Returns
    -------
    RelionTomogram
        The row, for a tomograms.star of many by `write_relion_tomograms`.

    Raises
    ------
    ValueError
        When a name holds a space, a size, the optics, the movies or the nominal angles are not right.
    """
    pixel = positive(f"{path}: pixel_size", pixel_size)
    voxel = pixel if voxel_size is None else positive(f"{path}: voxel_size", voxel_size)
    shape = sizes(f"{path}: volume_shape", volume_shape, 3)
    check_per_tilt(optics, len(tilts))
    constants = {
        field: constant(path, field, getattr(optics, field))
        for field in ("voltage", "spherical_aberration", "amplitude_contrast")
    }
    x, y, z = (2 * math.ceil(round(n * voxel / pixel / 2, 6)) for n in reversed(shape))
    row = RelionTomogram(
        name, f"tilt_series/{name}.star", pixel, (x, y, z), **constants, optics_group=optics_group, hand=hand
    )
    sections = sections_of(tilts, nominal, None if isinstance(stack, str) else stack)
    images = stack if isinstance(stack, str) else stack.path
    for what, text in {"name": name, "optics_group": optics_group, "stack": images}.items():
        _one_word(path, what, text)
    if set(name) & set("/\\"):
        raise ValueError(f"{path}: name: expected a name without / or \\, got {name!r}.")
    table = _tilt_table(path, tilts, optics, images, movies, sections)
    file = Path(path).parent / row.tilt_series
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as writing:  # closes in reverse: the tomograms.star comes last
        for target, blocks in ((Path(path), _table_of([row], path)), (file, {name: table})):
            _write(writing.enter_context(atomic_write(target)), blocks)
    return row


def write_relion_tomograms(path: str | Path, tomograms: Sequence[RelionTomogram]) -> None:
    """Write a tomograms.star of many tomograms, whose files of tilts are there already.

    Raises
    ------
    ValueError
        When there is none, two have one name, or a hand is neither 1 nor -1.
    """
    blocks = _table_of(tomograms, path)
    with atomic_write(path) as temporary:
        _write(temporary, blocks)


def _table_of(tomograms: Sequence[RelionTomogram], path: str | Path) -> dict[str, pandas.DataFrame]:
    """Blocks of a tomograms.star."""
    names = [tomogram.name for tomogram in tomograms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: tomograms: expected at least one, each with a name of its own, got {names}.")
    hands = [tomogram.hand for tomogram in tomograms]
    if not set(hands) <= {1, -1}:
        raise ValueError(f"{path}: hand: expected 1 or -1, got {hands}.")
    rows = [
        {
            "rlnTomoName": t.name,
            "rlnVoltage": t.voltage,
            "rlnSphericalAberration": t.spherical_aberration,
            "rlnAmplitudeContrast": t.amplitude_contrast,
            "rlnMicrographOriginalPixelSize": t.pixel_size,
            "rlnTomoHand": t.hand,
            "rlnOpticsGroupName": t.optics_group,
            "rlnTomoTiltSeriesPixelSize": t.pixel_size,
            "rlnTomoTiltSeriesStarFile": _one_word(path, "tilt_series", t.tilt_series),
            **dict(zip(("rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ"), t.size, strict=True)),
        }
        for t in tomograms
    ]
    return {"global": pandas.DataFrame(rows)}


def read_relion(path: str | Path, *, name: str | None = None) -> Geometry:
    """Geometry of a tomograms.star, or of the file of one tilt series. Arguments and errors as in `read_alignment`.

    Rows are of the sections their rlnMicrographName tells, where it does. Tilts that were left out have none.

    Warns
    -----
    UserWarning
        When rlnTomoHand is -1.
    """
    path, table, tomogram = tilt_table(existing_file(path), name)
    pixel = None
    if tomogram:
        known = pandas.DataFrame([{"rlnTomoHand": HAND} | tomogram])
        hand = float(_column(known, "rlnTomoHand"))
        if hand not in (-1, 1):
            raise FormatError(path, "_rlnTomoHand", "1 or -1", f"{tomogram['rlnTomoHand']}", "Correct it.")
        if "rlnTomoTiltSeriesPixelSize" in known:
            pixel = float(_column(known, "rlnTomoTiltSeriesPixelSize"))
            if not 0 < pixel < math.inf:
                got = f"{tomogram['rlnTomoTiltSeriesPixelSize']}"
                raise FormatError(path, "_rlnTomoTiltSeriesPixelSize", "a positive number [Å]", got, "Correct it.")
        if hand != HAND:
            warnings.warn(
                f"{path}: rlnTomoHand is {hand:g}: electrons travel along -z of this geometry. What "
                "is further up is less out of focus: images and tomogram are right, a defocus that varies with height "
                "is not.",
                UserWarning,
                stacklevel=4,
            )
    absent = [label for label in _GEOMETRY if label not in table]
    if absent:
        raise FormatError(path, f"_{absent[0]}", "a column", "none", "Name a tilt series that RELION 5 has aligned.")
    angles, axes, x, y = (_column(table, label) for label in _GEOMETRY)
    about_x = _column(table, "rlnTomoXTilt") if "rlnTomoXTilt" in table else torch.zeros_like(angles)
    sections = movies = None
    if "rlnMicrographName" in table:
        found = table["rlnMicrographName"].astype(str).str.extract(r"^(\d{1,9})@")[0]
        if not found.isna().any():
            sections = torch.tensor(found.astype(int).to_numpy()) - 1
    if "rlnMicrographMovieName" in table:
        movies = tuple(table["rlnMicrographMovieName"].astype(str))
    told = {label: _column(table, label) for label in _KNOWN if label in table}
    return Geometry(
        path,
        angles,
        rotation_z(axes)[:, :2, :2],
        torch.stack([x, y], 1),
        torch.ones(len(angles), dtype=torch.bool),
        sections=sections,
        nominal=told.get("rlnTomoNominalStageTiltAngle"),
        prior_doses=told.get("rlnMicrographPreExposure"),
        movies=movies,
        pixel_size=pixel,
        left_behind=tilts_about_x(path, "_rlnTomoXTilt", about_x),
    )


def tilt_table(path: Path, name: str | None) -> tuple[Path, pandas.DataFrame, dict[str, Any]]:
    """File and table with the tilts of tomogram `name`, and its row of the tomograms.star, empty where that is none."""
    blocks, tomogram = _blocks(path), {}
    if "global" in blocks:
        path, blocks, name, tomogram = _one_tomogram(path, blocks, name)
    table = blocks.get(str(name), next(iter(blocks.values())))
    if not len(table):
        raise FormatError(path, f"data_{name or ''}", "a table with a row for each tilt", "none", "Is the file whole?")
    return path, table, tomogram


def _column(table: pandas.DataFrame, label: str) -> torch.Tensor:
    """A column (row,) of numbers; what is none is NaN."""
    numbers = table[[label]].apply(pandas.to_numeric, errors="coerce").to_numpy(dtype=float)
    return torch.from_numpy(numbers[:, 0].copy())


def _tilt_table(
    path: str | Path,
    tilts: TiltScheme,
    optics: Optics,
    stack: str,
    movies: Sequence[Movie] | None,
    sections: Sections,
) -> pandas.DataFrame:
    n, used = len(tilts), sections.used
    rows = sections.rows[used].tolist()

    def of_tilt(value) -> torch.Tensor:  # in the order of the sections
        return torch.as_tensor(value, dtype=torch.float64).detach().cpu().expand(n)[rows]

    suffix = "" if PurePosixPath(stack).suffix == ".mrcs" else ":mrcs"  # RELION takes a plain .mrc for a volume
    table = pandas.DataFrame({"rlnMicrographName": [f"{z + 1:06d}@{stack}{suffix}" for z in used]})
    if movies is not None:
        if len(movies) != n:
            raise ValueError(f"{path}: movies: expected {n}, one a tilt, got {len(movies)}.")
        table["rlnMicrographMovieName"] = [_one_word(path, "movies", movies[row].path) for row in rows]
        table["rlnTomoTiltMovieFrameCount"] = [movies[row].frames for row in rows]
    defocus, astigmatism = of_tilt(optics.defocus), of_tilt(optics.astigmatism)
    columns = {
        "rlnTomoNominalStageTiltAngle": sections.nominal[used],
        "rlnTomoNominalTiltAxisAngle": torch.full((n,), sections.axis_angle, dtype=torch.float64),
        "rlnTomoNominalDefocus": -1e-4 * defocus,  # [µm], negative is underfocus
        "rlnMicrographPreExposure": of_tilt(tilts.accumulated_doses),
        "rlnTomoXTilt": torch.zeros(n),
        "rlnTomoYTilt": sections.angles[used],
        "rlnTomoZRot": torch.full((n,), sections.axis_angle, dtype=torch.float64),
        "rlnTomoXShiftAngst": sections.shifts[used, 0],
        "rlnTomoYShiftAngst": sections.shifts[used, 1],
        "rlnDefocusU": defocus + astigmatism / 2,
        "rlnDefocusV": defocus - astigmatism / 2,
        "rlnDefocusAngle": of_tilt(optics.astigmatism_angle),
        "rlnPhaseShift": of_tilt(optics.phase_shift),
    }
    for label, values in columns.items():
        table[label] = (values + 0.0).tolist()
    return table


def _one_word(path: str | Path, what: str, text: str) -> str:
    if not text or any(character.isspace() or character in "\"'#" for character in text):
        raise ValueError(f"{path}: {what}: expected text without spaces, quotes or #, got {text!r}.")
    return text


def _write(path: Path, blocks: dict) -> None:
    starfile.write(blocks, path, float_format="%.10g")
    _, _, body = path.read_text(encoding="utf-8").partition("\n")  # the first line tells the time
    path.write_text("# version 50001\n" + body, encoding="utf-8")


def _blocks(path: Path) -> dict:
    names = re.findall(r"^data_(\S*)", read_text(path), re.MULTILINE)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(path, f"data_{twice}", "each block once", f"{names.count(twice)} of that name", "Remove one.")
    try:
        blocks = starfile.read(path, always_dict=True, parse_as_string=["rlnTomoName"])
    except Exception as error:  # starfile lets whatever its parser meets through
        raise FormatError(path, "content", "a STAR file", f"{type(error).__name__} {error}") from error
    if not isinstance(blocks, dict) or not blocks:
        raise FormatError(path, "content", "data_ blocks of a STAR file", "none", "Name a tomograms.star.")
    return {  # a table of one row comes as a dictionary when it is not a loop
        key: block if isinstance(block, pandas.DataFrame) else pandas.DataFrame([block])
        for key, block in blocks.items()
    }


def _one_tomogram(path: Path, blocks: dict, name: str | None) -> tuple[Path, dict, str, dict[str, Any]]:
    """File and blocks with the tilts of tomogram `name` of a tomograms.star, its name, and its own row."""
    table = blocks["global"]
    if "rlnTomoName" not in table:
        raise FormatError(path, "_rlnTomoName", "a column", "none", "Name a tomograms.star of RELION 5.")
    names = [str(n) for n in table["rlnTomoName"]]
    if name not in names and (name is not None or len(names) != 1):
        raise FormatError(path, "_rlnTomoName", f"one of {', '.join(names[:8])}", repr(name), "Give it as name=.")
    which = names.index(name) if name is not None else 0
    row = table.iloc[which].to_dict()
    if "rlnTomoTiltSeriesStarFile" not in table:
        return path, {key: block for key, block in blocks.items() if key != "global"} or blocks, names[which], row
    told = Path(str(row["rlnTomoTiltSeriesStarFile"]))
    beside = path.parent / told  # RELION itself starts from its working folder
    file = existing_file(told if told.exists() and not beside.exists() else beside)
    return file, _blocks(file), names[which], row
