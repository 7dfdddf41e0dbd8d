"""CTF fits in the files of RELION 5 and Warp, which hold the geometry of a series as well.

RELION's rlnDefocusU, rlnDefocusV [Å], rlnDefocusAngle, rlnPhaseShift [deg] stand with the tilts, and rlnVoltage [kV],
rlnSphericalAberration [mm], rlnAmplitudeContrast in the tomograms.star.

Warp's grids hold a node for each tilt of the file: GridCTF, the mean defocus [µm]; GridCTFDefocusDelta, the largest
less the smallest [µm]; GridCTFDefocusAngle [deg]; GridCTFPhase [pi] (WarpLib: TiltSeries.GetTiltDefocus and its
neighbours). The others have one value, a Param of the element CTF, where they have no grid. GridCTF is 0 where Warp
has not fitted; the Param Defocus then holds what the user set at first, and is not read.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pandas
import torch

from cryosim.io.alignments import LARGEST
from cryosim.io.files import FormatError, existing_file, finite_number, read_text
from cryosim.io.fitted_optics import FittedOptics
from cryosim.io.relion import tilt_table

_DEFOCI = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
_CONSTANTS = {
    "voltage": "rlnVoltage",
    "spherical_aberration": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
}
_GRIDS = {  # quantity: element, Param, factor to this package's unit
    "defocus": ("GridCTF", "Defocus", 1e4),
    "astigmatism": ("GridCTFDefocusDelta", "DefocusDelta", 1e4),
    "astigmatism_angle": ("GridCTFDefocusAngle", "DefocusAngle", 1.0),
    "phase_shift": ("GridCTFPhase", "PhaseShift", 180.0),
}


def read_relion_ctf(path: str | Path, *, name: str | None = None) -> FittedOptics | None:
    """CTF fits of a tomograms.star, or of the file of one tilt series; None where there are none.

    Errors as in `read_fitted_optics`.
    """
    path, table, tomogram = tilt_table(existing_file(path), name)
    found = [label for label in _DEFOCI if label in table]
    if not found:
        return None
    if len(found) < len(_DEFOCI):
        raise FormatError(path, f"_{next(x for x in _DEFOCI if x not in found)}", "a column", "none", "Fit the CTF.")
    u, v, angle = (_column(path, table, label) for label in _DEFOCI)
    movies = tuple(table["rlnMicrographMovieName"].astype(str)) if "rlnMicrographMovieName" in table else None
    nominal = "rlnTomoNominalStageTiltAngle"
    constants = {}
    for field, label in _CONSTANTS.items():
        if label in tomogram:
            constants[field] = _value(path, f"_{label}", str(tomogram[label]))
        elif label in table:
            values = _column(path, table, label)
            if not bool((values == values[0]).all()):
                raise FormatError(path, f"_{label}", "one value for the series", f"{values.tolist()}", "Correct it.")
            constants[field] = float(values[0])
    return FittedOptics(
        path,
        (u + v) / 2,
        u - v,
        angle,
        _column(path, table, "rlnPhaseShift") if "rlnPhaseShift" in table else torch.zeros_like(u),
        torch.ones(len(u), dtype=torch.bool),
        sections=_numbered(table),
        nominal=_column(path, table, nominal) if nominal in table else None,
        movies=movies,
    )._replace(**constants)


def read_warp_ctf(path: str | Path) -> FittedOptics | None:
    """CTF fits of a Warp XML; None where there are none. Errors as in `read_fitted_optics`."""
    path = existing_file(path)
    try:
        root = ElementTree.fromstring(read_text(path, LARGEST).lstrip("\ufeff"))
    except ElementTree.ParseError as error:
        raise FormatError(path, "content", "a tilt series of Warp", str(error), "Write it again.") from error
    params = {p.get("Name", ""): p.get("Value", "") for p in root.findall("./CTF/Param")}
    n = len((root.findtext("Angles") or "").split())
    if n == 0:
        raise FormatError(path, "Angles", "one a tilt", "none", "Is it a tilt series of Warp?")
    otherwise = {name: _value(path, f"CTF, {name}", params.get(name, "0")) for _, name, _ in _GRIDS.values()}
    otherwise["Defocus"] = 0.0
    values = {
        field: factor * _grid(path, root, grid, n, otherwise[name]) for field, (grid, name, factor) in _GRIDS.items()
    }
    if not bool((values["defocus"] != 0).any()):
        return None
    values["defocus"] = torch.where(values["defocus"] == 0, torch.nan, values["defocus"])
    used = (root.findtext("UseTilt") or "").split() or ["True"] * n
    movies = (root.findtext("MoviePath") or "").strip().splitlines()
    for name, lines in (("UseTilt", used), ("MoviePath", movies or used)):
        if len(lines) != n:
            raise FormatError(path, name, f"{n} lines, one a tilt", f"{len(lines)}", "Write it again.")
    told = {"voltage": "Voltage", "spherical_aberration": "Cs", "amplitude_contrast": "Amplitude"}
    constants = {f: _value(path, f"CTF, {name}", params[name]) for f, name in told.items() if name in params}
    return FittedOptics(
        path,
        *(values[field] for field in _GRIDS),
        used=torch.tensor([word.lower() != "false" for word in used]),
        movies=tuple(line.strip() for line in movies) or None,
    )._replace(**constants)


def _grid(path: Path, root: ElementTree.Element, name: str, n: int, otherwise: float) -> torch.Tensor:
    """Values (tilt,) of a grid with one node for each of `n` tilts, or for all; one value where there is none."""
    grid = root.find(name)
    if grid is None:
        return torch.full((n,), otherwise, dtype=torch.float64)
    found: dict[int, float] = {}
    for node in grid.iter("Node"):
        x, y, z = (int(_value(path, f"{name}, {axis}", node.get(axis, "0"))) for axis in "XYZ")
        if x or y or z in found:
            raise FormatError(path, name, "one node a tilt", f"several at Z {z}", "A defocus has one value an image.")
        found[z] = _value(path, f"{name}, Z {z}", node.get("Value", ""))
    if sorted(found) == [0]:
        return torch.full((n,), found[0] or otherwise, dtype=torch.float64)
    if sorted(found) != list(range(n)):
        raise FormatError(path, name, f"nodes at Z 0 to {n - 1}, one a tilt, or one", f"{sorted(found)}", "Fit again.")
    return torch.tensor([found[z] for z in range(n)], dtype=torch.float64)


def _numbered(table: pandas.DataFrame) -> torch.Tensor | None:
    """Sections (row,) of images that are named NUMBER@STACK, from 0; None where one is not."""
    if "rlnMicrographName" not in table:
        return None
    found = table["rlnMicrographName"].astype(str).str.extract(r"^(\d{1,9})@")[0]
    return None if found.isna().any() else torch.tensor(found.astype(int).to_numpy()) - 1


def _column(path: Path, table: pandas.DataFrame, label: str) -> torch.Tensor:
    return torch.tensor(
        [_value(path, f"_{label}, row {i}", str(text)) for i, text in enumerate(table[label], 1)], dtype=torch.float64
    )


def _value(path: Path, where: str, text: str) -> float:
    return finite_number(path, where, text, "Correct the entry.")
