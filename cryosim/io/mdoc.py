"""SerialEM's .mdoc: what was done for each section of a tilt stack.

Layout and meaning: SerialEM help, "File Formats" (bio3d.colorado.edu/SerialEM/hlp/html/about_formats.htm). A value here
differs from this package's in three ways:

- TargetDefocus [µm] is negative for underfocus;
- "Tilt axis angle" in the title is `TiltScheme.axis_angle`, but a section's RotationAngle is the angle of the image's
  x axis, 90 degrees more;
- PriorRecordDose [e-/Å^2] is the dose before the section, so it also tells the order of exposure.

SerialEM has no place for the remaining optics. They go into a title line of their own, which other programs skip.
The text is written here and not by mdocfile, whose writer merges blank-separated titles and reorders the header.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import warnings
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from mdocfile import data_models

from cryosim.acquisition.series import Movie, TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.io.files import FormatError, read_text, write_text
from cryosim.microscope.optics import Optics

logging.getLogger("mdocfile").setLevel(logging.ERROR)  # it warns of every other spelling of a name, section by section

_UNITS = {
    "spherical_aberration": "mm",
    "astigmatism": "A",
    "astigmatism_angle": "deg",
    "phase_shift": "deg",
}
# fmt: off
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]  # whatever the locale
# fmt: on
_FIRST = datetime(2000, 1, 1)
_TITLE = "cryosim: optics"
_PREFIX = "Optics"

LARGEST_DOSE = 1e9
"""Of a series [e-/Å^2]: beyond what any simulation of a noiseless image asks for."""
_MODES = {"int16": 1, "float32": 2, "uint16": 6, "float16": 12}


@dataclasses.dataclass(frozen=True)
class Mdoc:
    """What an .mdoc says, rows in the order of exposure.

    Attributes
    ----------
    tilts : TiltScheme
        With zero shifts, which an .mdoc does not know.
    sections : tensor (tilt,)
        Section of the stack that holds each row.
    pixel_size : float or None
        [Å].
    voltage : float or None
        [kV].
    defocus : tensor (tilt,) or None
        Target [Å], positive is underfocus.
    optics : Optics or None
        None unless the file tells all of it, as `write_mdoc` does: the aberrations are in no other .mdoc.
    movies : tuple of Movie or None
        SubFramePath and NumSubFrames of each row, as they stand there; None unless every section has them.
    """

    tilts: TiltScheme
    sections: torch.Tensor
    pixel_size: float | None = None
    voltage: float | None = None
    defocus: torch.Tensor | None = None
    optics: Optics | None = None
    movies: tuple[Movie, ...] | None = None


def write_mdoc(
    path: str | Path,
    series: TiltSeries,
    image_file: str,
    order: Sequence[int] | torch.Tensor,
    *,
    dtype: str = "float32",
) -> None:
    """Write the .mdoc of a stack.

    Parameters
    ----------
    path : str or path
    series : TiltSeries
    image_file : str
        Name of the stack, without a folder.
    order : sequence or tensor (tilt,)
        Row of `series` that stands in each section: section z holds row order[z].
    dtype : str
        Type of the stack, see `write_stack`.

    Raises
    ------
    ValueError
        When `order` is not a permutation, `image_file` holds what an .mdoc cannot, or the voltage changes.
    """
    rows = [int(row) for row in order]
    if sorted(rows) != list(range(len(series.tilts))):
        raise ValueError(f"{path}: order: expected each of the {len(series.tilts)} rows once, got {rows}.")
    if set(image_file) & set("=[]\n/\\"):
        raise ValueError(f"{path}: ImageFile: expected a name without = [ ] / or \\, got {image_file!r}.")
    constant, varying, voltage, defocus = _optics_text(path, series)
    _, ny, nx = series.images.shape
    head = [f"PixelSpacing = {_text(float(series.pixel_size))}"]
    head += [f"Voltage = {_text(voltage)}"] if voltage is not None else []
    head += [f"ImageFile = {image_file}", f"ImageSize = {nx} {ny}", f"DataMode = {_MODES[dtype]}", ""]
    axis = float(series.tilts.axis_angle)
    head += ["[T = SerialEM layout, written by cryosim]", ""]
    head += [f"[T =     Tilt axis angle = {_text(axis)}, binning = 1  spot = 1  camera = 0]", ""]
    head += [f"[T = {_TITLE}, {constant}]", ""] if constant is not None else []
    parts = [_section_text(z, row, series, defocus, varying) for z, row in enumerate(rows)]
    write_text(path, "\n".join([*head, *parts]))


def read_mdoc(path: str | Path) -> Mdoc:
    """Read an .mdoc; rows are put in the order of exposure, by PriorRecordDose and then by DateTime.

    A dose beyond the sections' own (focusing, tracking) has no place in a `TiltScheme` and is not kept.

    Warns
    -----
    UserWarning
        When order or dose is not in the file: rows then stand in the file's order, doses are zero.

    Raises
    ------
    FormatError
        When the file is missing, empty, or a value cannot be read.
    """
    path = Path(path)
    parsed = _parse(path, read_text(path))
    sections, head = parsed.section_data, parsed.global_data
    zs = [_needed(path, i, "ZValue", section.ZValue) for i, section in enumerate(sections)]
    order = _exposure_order(path, sections)
    sections = [sections[i] for i in order]
    angles = [_needed(path, z, "TiltAngle", s.TiltAngle) for z, s in zip(order, sections, strict=True)]
    tilts = scheme(path, angles, _doses(path, sections), _axis_angle(path, parsed.titles, sections))
    tilts = _timed(tilts, [s.ExposureTime for s in sections])
    voltage = _first_of(head.Voltage, *(s.Voltage for s in sections))
    targets = [s.TargetDefocus for s in sections]
    defocus = None if None in targets else torch.tensor([-1e4 * t + 0.0 for t in targets], dtype=torch.float64)  # type: ignore[operator]
    return Mdoc(
        tilts=tilts,
        sections=torch.tensor([zs[i] for i in order]),
        pixel_size=_pixel_size(path, head.PixelSpacing, *(s.PixelSpacing for s in sections)),
        voltage=voltage,
        defocus=defocus,
        optics=_optics(path, parsed.titles, sections, voltage, defocus),
        movies=_movies(sections),
    )


def scheme(path: Path, angles: list[float], doses: list[float] | None = None, axis_angle: float = 0.0) -> TiltScheme:
    """TiltScheme of what was read from `path`, its own complaints turned into a FormatError."""
    doses = [0.0] * len(angles) if doses is None else doses
    try:
        return TiltScheme(
            torch.tensor(angles, dtype=torch.float64),
            torch.tensor(doses, dtype=torch.float64),
            axis_angle=axis_angle,
        )
    except ValueError as error:
        raise FormatError(path, "tilt angles", "angles of a tilt series", str(error)) from error


# ------------------------------------------------------------------------------------------------------------ writing


def _optics_text(
    path: str | Path, series: TiltSeries
) -> tuple[str | None, dict[str, torch.Tensor], float | None, torch.Tensor | None]:
    """The optics as a title, the fields that vary (tilt, item), the voltage [kV], the defocus (tilt,) [Å]."""
    if series.optics is None:
        return None, {}, None, None
    n, constant, varying = len(series.tilts), [], {}
    for field in dataclasses.fields(series.optics):  # type: ignore[arg-type]
        value = getattr(series.optics, field.name)
        if value is None:
            continue
        value = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        rows = value.expand(n, *value.shape[value.ndim - field.metadata.get("item_ndim", 0) :]).reshape(n, -1)
        varying[field.name] = rows
        if bool((rows == rows[:1]).all()) and field.name not in ("voltage", "defocus"):
            unit = _UNITS.get(field.name, "")
            constant.append(f"{field.name}: {' '.join(map(_text, rows[0].tolist()))} {unit}".strip())
            del varying[field.name]
    voltage, defocus = varying.pop("voltage"), varying.pop("defocus")
    if not bool((voltage == voltage[0]).all()):
        raise ValueError(f"{path}: Voltage: expected one value for the series, got {voltage[:, 0].tolist()}.")
    return ", ".join(constant), varying, float(voltage[0, 0]), defocus[:, 0]


def _section_text(
    z: int, row: int, series: TiltSeries, defocus: torch.Tensor | None, varying: dict[str, torch.Tensor]
) -> str:
    tilts = series.tilts
    lines = [f"[ZValue = {z}]", f"TiltAngle = {_text(float(tilts.angles[row]))}"]
    lines += [f"ExposureDose = {_text(float(tilts.doses[row]))}", f"PixelSpacing = {_text(float(series.pixel_size))}"]
    if defocus is not None:
        lines += [f"{name} = {_text(-1e-4 * float(defocus[row]))}" for name in ("Defocus", "TargetDefocus")]
    lines += [f"RotationAngle = {_text(_within_180(float(tilts.axis_angle) + 90))}"]
    lines += [f"PriorRecordDose = {_text(float(tilts.accumulated_doses[row]))}"]
    lines += [f"ExposureTime = {_text(float(tilts.exposure_times[row]))}"]
    if series.movies is not None:
        path, frames = series.movies[row]
        lines += [f"SubFramePath = {path}", f"NumSubFrames = {frames}"]
        lines += [f"FrameDosesAndNumbers = {_text(float(tilts.doses[row]) / frames)} {frames}"]
    lines += [f"{_PREFIX}.{name} = {' '.join(map(_text, v[row].tolist()))}" for name, v in varying.items()]
    time = _FIRST + timedelta(minutes=row)  # a fixed clock: the same series gives the same bytes
    lines += [f"DateTime = {time:%d}-{_MONTHS[time.month - 1]}-{time:%y  %H:%M:%S}", ""]
    return "\n".join(lines) + "\n"


def _text(number: float) -> str:
    return f"{number + 0.0:.10g}"  # no "-0"


def _within_180(angle: float) -> float:
    return angle - 360 * math.ceil((angle - 180) / 360)


# ------------------------------------------------------------------------------------------------------------ reading


def _parse(path: Path, text: str) -> data_models.Mdoc:
    try:
        parsed = data_models.Mdoc.from_string(text)
    except IndexError as error:
        raise FormatError(path, "sections", "at least one line [ZValue = ...]", "none", "Is it an .mdoc?") from error
    except ValueError as error:  # pydantic's error is one, too
        head = re.split(r"^\s*\[(?!T\s*=)", text, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
        for number, line in enumerate(head, 1):
            if line.strip() and not line.strip().startswith("[") and line.count("=") != 1:
                expected = "one 'name = value' before the first section"
                raise FormatError(path, f"line {number}", expected, repr(line.strip()), "Correct it.") from error
        raise FormatError(path, "entries", "'name = value' lines of an .mdoc", _one_line(error)) from error
    if not parsed.section_data:
        raise FormatError(path, "sections", "at least one line [ZValue = ...]", "none", "Is it an .mdoc?")
    return parsed


def _one_line(error: ValueError) -> str:
    return re.sub(r"\s+", " ", re.sub(r"For further information.*", "", str(error))).strip()


def _needed(path: Path, section: int, name: str, value):
    if value is None or not math.isfinite(value):
        raise FormatError(path, f"section {section}, {name}", "a number", repr(value), "Every section needs it.")
    return value


def _pixel_size(path: Path, *values: float | None) -> float | None:
    """The first that is told [Å]; 0 is what SerialEM writes where it has no calibration."""
    for value in values:
        if value is not None and not 0 <= value < math.inf:
            raise FormatError(path, "PixelSpacing", "a positive number [Å]", f"{value:g}", "Correct the entry.")
    return _first_of(*values)


def _first_of(*values: float | None) -> float | None:
    return next((float(value) for value in values if value is not None and value > 0), None)


def _exposure_order(path: Path, sections: Sequence) -> list[int]:
    n, keys = len(sections), []
    priors = [section.PriorRecordDose for section in sections]
    if None not in priors:
        keys.append([_needed(path, i, "PriorRecordDose", prior) for i, prior in enumerate(priors)])
        wrong = next((i for i, prior in enumerate(keys[0]) if not 0 <= prior <= LARGEST_DOSE), None)
        if wrong is not None:
            expected = f"a dose from 0 to {LARGEST_DOSE:g} e-/Å^2"
            raise FormatError(path, f"section {wrong}, PriorRecordDose", expected, f"{priors[wrong]:g}", "Correct it.")
    times = [section.DateTime for section in sections]
    if None not in times:
        keys.append([_time(path, i, time) for i, time in enumerate(times)])
    if n > 1 and len(set(zip(*keys, strict=True))) < n:  # also when there is no key
        warnings.warn(
            f"{path}: PriorRecordDose and DateTime do not tell the order of exposure; the order of the file is kept.",
            UserWarning,
            stacklevel=3,
        )
    return sorted(range(n), key=lambda i: tuple(key[i] for key in keys))


def _time(path: Path, section: int, text: str) -> datetime:
    found = re.fullmatch(r"(\d{1,2})-([A-Za-z]{3})-(\d{4}|\d{2})\s+(\d{1,2}):(\d{2}):(\d{2})", text.strip())
    try:
        if found is None:
            return datetime.fromisoformat(text.strip()).replace(tzinfo=None)
        day, month, year, hour, minute, second = (str(part) for part in found.groups())
        century = 2000 if len(year) == 2 else 0
        number = _MONTHS.index(month.capitalize()) + 1
        return datetime(century + int(year), number, int(day), int(hour), int(minute), int(second))
    except ValueError as error:
        raise FormatError(
            path, f"section {section}, DateTime", "a time such as 01-Jan-24  12:00:00", repr(text), "Correct the entry."
        ) from error


def _doses(path: Path, sections: Sequence) -> list[float] | None:
    doses = [section.ExposureDose for section in sections]
    if all(dose is None or dose == 0 for dose in doses):
        warnings.warn(f"{path}: ExposureDose is missing; doses are set to zero.", UserWarning, stacklevel=3)
        return None
    for i, (section, dose) in enumerate(zip(sections, doses, strict=True)):
        if dose is None or not 0 <= dose <= LARGEST_DOSE:
            name = f"section {section.ZValue if section.ZValue is not None else i}, ExposureDose"
            raise FormatError(
                path, name, f"a number, not negative, up to {LARGEST_DOSE:g}", repr(dose), "Correct the entry."
            )
    return doses


def _axis_angle(path: Path, titles: Sequence[str], sections: Sequence) -> float:
    for title in titles:
        found = re.search(r"tilt\s*axis\s*angle\s*=\s*([^\s,\]]+)", title, re.IGNORECASE)
        if found:
            return _turn(path, "title, Tilt axis angle", _number(path, "title, Tilt axis angle", found.group(1)))
    rotation = sections[0].RotationAngle
    if rotation is None:
        return 0.0
    return _within_180(_turn(path, "section 0, RotationAngle", _needed(path, 0, "RotationAngle", rotation)) - 90)


def _turn(path: Path, name: str, angle: float) -> float:
    if not abs(angle) <= 360:
        raise FormatError(path, name, "an angle from -360 to 360 [deg]", f"{angle:g}", "Correct the entry.")
    return angle


def _timed(tilts: TiltScheme, times: Sequence[float | None]) -> TiltScheme:
    """The scheme with the mean dose rate, where the file tells how long the exposures took."""
    known = [time for time in times if time is not None and 0 < time < math.inf]
    if len(known) < len(tilts) or not bool((tilts.doses > 0).all()):
        return tilts
    return tilts.replace(dose_rate=float(tilts.doses.sum()) / sum(known))


def _movies(sections: Sequence) -> tuple[Movie, ...] | None:
    found = [(section.SubFramePath, section.NumSubFrames) for section in sections]
    if any(path is None or frames is None for path, frames in found):
        return None
    return tuple(Movie(path.as_posix(), int(frames)) for path, frames in found)  # also of Windows


def _optics(path: Path, titles: Sequence[str], sections: Sequence, voltage, defocus) -> Optics | None:
    title = next((title for title in titles if _TITLE in title), None)
    if title is None or voltage is None or defocus is None:
        return None
    known = {field.name: field.metadata.get("item_ndim", 0) for field in dataclasses.fields(Optics)}  # type: ignore[arg-type]
    values = {"voltage": voltage, "defocus": _shared(defocus)}
    entries = title.split(_TITLE, 1)[1].strip(" ,]")
    for entry in filter(None, (entry.strip() for entry in entries.split(","))):
        name, _, text = entry.partition(":")
        numbers = text.removesuffix(_UNITS.get(name, "")).split()
        values[name] = _item(path, f"title, {name}", [numbers], known.get(name, 0))[0]
    for key in sections[0].model_extra or {}:
        if key.startswith(_PREFIX + "."):
            name = key.removeprefix(_PREFIX + ".")
            rows = [(section.model_extra or {}).get(key, "").split() for section in sections]
            values[name] = _item(path, key, rows, known.get(name, 0))
    unknown = set(values) - set(known)
    if unknown:
        raise FormatError(path, "optics", f"fields among {', '.join(known)}", ", ".join(sorted(unknown)))
    fields: dict[str, Any] = {
        name: float(v) if isinstance(v, torch.Tensor) and not v.ndim else v for name, v in values.items()
    }
    return Optics(**fields)


def _item(path: Path, name: str, rows: list[list[str]], ndim: int) -> torch.Tensor:
    """Values (row,) or (row, component) of texts, as the field's items have no or one axis."""
    values = torch.tensor(
        [[_number(path, name, text, infinite=True) for text in row] for row in rows], dtype=torch.float64
    )
    if ndim == 0 and values.shape[1:] != (1,):
        raise FormatError(path, name, "one number", repr(" ".join(rows[0])), "Correct the entry.")
    return values if ndim else values[:, 0]


def _shared(values: torch.Tensor) -> torch.Tensor:
    return values[0] if bool((values == values[0]).all()) else values


def _number(path: Path, name: str, text: str, *, infinite: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or (math.isinf(value) and not infinite):
        raise FormatError(path, name, "a number", repr(text), "Correct the entry.")
    return value
