"""What the CTF fits of other programs say of the lens: defocus, astigmatism and phase shift of each image.

All of them write two defoci along perpendicular directions and the azimuth of the first, as

    defocus(phi) = (first + second) / 2 + (first - second) / 2 * cos(2 (phi - azimuth))

with phi from x towards y of the rows and columns in the file and underfocus positive (Rohou & Grigorieff 2015,
doi:10.1016/j.jsb.2015.08.008): `Optics` with defocus (first + second) / 2, astigmatism first - second and the same
azimuth. The phase shift delays the scattered wave in all of them, as ours does. Only units differ:

==================  =================  =============  ===============  ===============================================
file                defocus            azimuth        phase shift      voltage, spherical aberration, amplitude contrast
==================  =================  =============  ===============  ===============================================
RELION 5 .star      U, V [Å]           [deg]          [deg]            in the tomograms.star
Warp .xml           mean, U - V [µm]   [deg]          [pi]             in the element CTF
AreTomo _CTF.txt    U, V [Å]           [deg]          [rad]            none
CTFFIND .txt        U, V [Å]           [deg]          [rad]            in a comment
IMOD .defocus       U, V [nm]          [deg or rad]   [deg or rad]     none
==================  =================  =============  ===============  ===============================================
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from cryosim.io.exposures import Exposures
from cryosim.io.files import FormatError, existing_file
from cryosim.io.stack_geometry import rows_of_sections
from cryosim.microscope.optics import Optics, check_per_tilt

SPHERICAL_ABERRATION = 2.7  # [mm]
AMPLITUDE_CONTRAST = 0.07

_LARGEST = 2e5  # [Å]: 20 µm; a defocus beyond is of another unit
_POOR = 0.5  # of the median defocus
_MEASURED = ("defocus", "astigmatism", "astigmatism_angle", "phase_shift")


class FittedOptics(NamedTuple):
    """Rows of a file with CTF fits.

    Attributes
    ----------
    path : Path
        The file.
    defocus, astigmatism : tensor (row,)
        [Å], as in `Optics`; a defocus of NaN where there is no fit.
    astigmatism_angle, phase_shift : tensor (row,)
        [deg].
    used : tensor (row,)
        False where the program left the image out.
    sections : tensor (row,) or None
        Section of the stack, counted from 0; None when the file does not number them.
    ascending : bool
        Whether those are places among all images by ascending angle, and not in the stack.
    nominal : tensor (row,) or None
        Angles the stage was asked for [deg].
    movies : tuple of str or None
        File with the frames of each.
    voltage : float or None
        [kV].
    spherical_aberration : float or None
        [mm].
    amplitude_contrast : float or None
        [1].
    pixel_size : float or None
        Of the images that were fitted [Å].
    """

    path: Path
    defocus: torch.Tensor
    astigmatism: torch.Tensor
    astigmatism_angle: torch.Tensor
    phase_shift: torch.Tensor
    used: torch.Tensor
    sections: torch.Tensor | None = None
    ascending: bool = False
    nominal: torch.Tensor | None = None
    movies: tuple[str, ...] | None = None
    voltage: float | None = None
    spherical_aberration: float | None = None
    amplitude_contrast: float | None = None
    pixel_size: float | None = None


def read_fitted_optics(path: str | Path, *, name: str | None = None) -> FittedOptics | None:
    """CTF fits of a .star of RELION 5, .xml of Warp, .defocus of IMOD or .txt of AreTomo3 or CTFFIND.

    Parameters
    ----------
    path : str or path
    name : str, optional
        rlnTomoName, where a tomograms.star has several.

    Returns
    -------
    FittedOptics or None
        None where a .star or .xml, which has much besides, holds no defocus.

    Raises
    ------
    FormatError
        When the file is missing, damaged or of another kind, or a value is beyond what a microscope does.
    """
    from cryosim.io import ctf_tables, ctf_text  # each imports this module

    path = existing_file(path)
    suffix = path.suffix.lower()
    if suffix == ".star":
        found = ctf_tables.read_relion_ctf(path, name=name)
    elif suffix == ".xml":
        found = ctf_tables.read_warp_ctf(path)
    elif suffix == ".defocus":
        found = ctf_text.read_imod_defocus(path)
    elif suffix == ".txt":
        found = ctf_text.read_ctffind(path)
    else:
        raise FormatError(path, "suffix", "one of .star, .xml, .defocus, .txt", repr(suffix), "Is it of CTF fits?")
    return None if found is None else _checked(found)


def fitted_beside(stack: Path, alignment: Path | None) -> Path | None:
    """The file of CTF fits beside STEM.mrc: STEM.defocus or STEM_CTF.txt, or else the alignment, which may hold them.

    Raises
    ------
    ValueError
        When there are several to choose from.
    """
    plain = stack.with_suffix("") if stack.suffix.lower() in (".gz", ".bz2") else stack
    stem = plain.with_suffix("")
    found = [file for end in (".defocus", "_CTF.txt") if (file := Path(f"{stem}{end}")).exists()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{stack}: ctf_file: expected one beside the stack, got {names}. Give it as ctf_file=.")
    if found:
        return found[0]
    return alignment if alignment is not None and alignment.suffix.lower() in (".star", ".xml") else None


def optics_of_sections(
    stack: Path,
    n: int,
    pixel: float,
    exposures: Exposures,
    *,
    given: Optics | None = None,
    file: Path | None = None,
    asked: bool = False,
    alignment_rows: torch.Tensor | None = None,
    name: str | None = None,
) -> Optics | None:
    """Optics of the `n` sections of `stack`, NaN where a section has no fit.

    What `file` does not tell is taken from what is given, and else from the .mdoc.

    Parameters
    ----------
    stack : Path
    n : int
    pixel : float
        Of the stack [Å]. A defocus fitted with a wrong one is off by the square of their ratio.
    exposures : Exposures
    given : Optics, optional
        Fields () or (section,).
    file : Path, optional
        Of CTF fits.
    asked : bool
        Whether the user named the file: it has to hold a defocus then.
    alignment_rows : tensor (section,), optional
        Row of the alignment that tells each section, where `file` is that alignment.
    name : str, optional
        rlnTomoName.

    Warns
    -----
    UserWarning
        When a value is not measured but the target, or taken to be the usual one.

    Raises
    ------
    FormatError
        When files disagree, or none tells the voltage.
    """
    if given is not None:
        check_per_tilt(given, n)
    if file is None:
        return given or exposures.optics or _of_target(stack, exposures)
    fit = read_fitted_optics(file, name=name)
    if fit is None:
        if asked:
            raise FormatError(file, "defocus", "CTF fits", "none", "Fit the CTF first, or name another file.")
        return given or exposures.optics or _of_target(stack, exposures)
    _same_pixel_size(fit, pixel)
    rows = alignment_rows if alignment_rows is not None else _rows(fit, exposures, n)
    measured = {field: torch.where(rows < 0, torch.nan, getattr(fit, field)[rows.clamp_min(0)]) for field in _MEASURED}
    base = given or exposures.optics
    told = {
        "voltage": _agreed(fit, exposures, base),
        "spherical_aberration": fit.spherical_aberration,
        "amplitude_contrast": fit.amplitude_contrast,
    }
    if base is not None:
        return base.replace(**measured, **{field: value for field, value in told.items() if value is not None})
    return Optics().replace(**_completed(fit.path, told), **measured)


def check_complete(path: Path, optics: Optics, sections: list[int]) -> None:
    """Raise FormatError unless each of `sections`, which `optics` of all sections is asked for, has a defocus."""
    values = torch.as_tensor(optics.defocus)
    lacking = [z for z in sections if values.ndim and not bool(torch.isfinite(values[z]))]
    if lacking:
        raise FormatError(
            path, "rows", "one for each image", f"none for sections {lacking}", "Fit these too, or exclude= them."
        )


def say_poor_fits(path: Path, optics: Optics, sections: list[int]) -> None:
    """Warn of those of `sections` whose fit has probably failed.

    That is, whose defocus is half as far from the median one, or whose astigmatism is half as large, as that median.
    """
    fields = (torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in (optics.defocus, optics.astigmatism))
    defocus, astigmatism = (v[sections] if v.ndim else v.expand(len(sections)) for v in fields)
    usual = defocus.median()
    most = _POOR * usual.abs()
    poor = (((defocus - usual).abs() > most) | (astigmatism.abs() > most)).nonzero().flatten().tolist()
    if poor:
        said = "; ".join(
            f"section {sections[i]}: defocus {float(defocus[i]):.0f} Å, astigmatism {float(astigmatism[i]):.0f} Å"
            for i in poor[:8]
        )
        more = f" and {len(poor) - 8} more" if len(poor) > 8 else ""
        warnings.warn(
            f"{path}: fits that have probably failed, as the median defocus is {float(usual):.0f} Å: {said}{more}. "
            "Correct them, or exclude= these.",
            UserWarning,
            stacklevel=3,
        )


def _rows(fit: FittedOptics, exposures: Exposures, n: int) -> torch.Tensor:
    """Row of the fits (section,) that tells each section, -1 where none does."""
    if fit.sections is not None and fit.ascending:
        if sorted(fit.sections.tolist()) != list(range(n)):
            raise FormatError(
                fit.path, "rows", f"one for each of the {n} sections", f"{len(fit.sections)}", "Is it of this stack?"
            )
        places = torch.argsort(exposures.tilts.angles, stable=True)  # section of each place by ascending angle
        fit = fit._replace(sections=places[fit.sections])
    return rows_of_sections(fit, exposures, n)


def _same_pixel_size(fit: FittedOptics, pixel: float) -> None:
    """Raise FormatError unless the images that were fitted are those of the stack, or these binned, or those binned."""
    if fit.pixel_size is None:
        return
    ratio = max(fit.pixel_size / pixel, pixel / fit.pixel_size)
    if abs(ratio - round(ratio)) > 0.02 * ratio:
        expected, got = f"{pixel:g} Å, or a binning of it", f"{fit.pixel_size:g} Å"
        raise FormatError(fit.path, "pixel size", expected, got, "Fit the CTF of this stack with its own pixel size.")


def _agreed(fit: FittedOptics, exposures: Exposures, base: Optics | None) -> float | None:
    """The voltage of the fits or else of the .mdoc [kV], if they agree."""
    known = exposures.voltage if base is None else float(torch.as_tensor(base.voltage).reshape(-1)[0])
    if fit.voltage is not None and known is not None and abs(fit.voltage - known) > 0.01 * known:
        raise FormatError(
            fit.path, "voltage", f"{known:g} kV, as elsewhere", f"{fit.voltage:g} kV", "Is it of this series?"
        )
    return fit.voltage if fit.voltage is not None else known


def _of_target(stack: Path, exposures: Exposures) -> Optics | None:
    """Optics of the defocus the microscope was asked for, which is said, or None where nothing was."""
    target, voltage = exposures.target, exposures.voltage
    if target is None or voltage is None or not bool((target != 0).all()):
        return None
    warnings.warn(
        f"{stack}: no file of CTF fits: the defocus is the TargetDefocus of the .mdoc, {float(target.min()):.0f} to "
        f"{float(target.max()):.0f} Å, which images may miss by thousands. Give ctf_file=.",
        UserWarning,
        stacklevel=4,
    )
    return Optics(defocus=target).replace(**_completed(stack, {"voltage": voltage}))


def _completed(path: Path, told: dict[str, float | None]) -> dict[str, float]:
    """The constants of the microscope, usual ones, which is said, in place of those that no file tells."""
    values = {field: value for field, value in told.items() if value is not None}
    if "voltage" not in values:
        raise FormatError(path, "voltage", "one [kV]", "none here or in an .mdoc", "Give voltage=.")
    usual = {"spherical_aberration": SPHERICAL_ABERRATION, "amplitude_contrast": AMPLITUDE_CONTRAST}
    taken = {field: value for field, value in usual.items() if field not in values}
    if taken:
        said = " and ".join(f"{field} {value:g}" for field, value in taken.items())
        warnings.warn(f"{path}: not told, so taken to be the usual: {said}. Give optics=.", UserWarning, stacklevel=5)
    return values | taken


def _checked(fit: FittedOptics) -> FittedOptics:
    """`fit`, if its values are a microscope's, with the larger defocus first."""
    if not len(fit.defocus):
        raise FormatError(fit.path, "rows", "at least one CTF fit", "none", "Is the file whole?")
    limits = {"defocus": _LARGEST, "astigmatism": _LARGEST, "astigmatism_angle": 3600.0, "phase_shift": 360.0}
    for field, most in limits.items():
        values = getattr(fit, field)
        wrong = (values.abs() > most).nonzero().flatten().tolist()
        if wrong:
            unit = "deg" if most == 360 or most == 3600 else "Å"
            raise FormatError(
                fit.path,
                f"row {wrong[0] + 1}, {field}",
                f"a number up to {most:g} {unit}",
                f"{float(values[wrong[0]]):g}",
                "Is the file in the units of its program?",
            )
    for field, least, most in (
        ("voltage", 10.0, 3000.0),
        ("spherical_aberration", -100.0, 100.0),
        ("amplitude_contrast", 0.0, 1.0),
        ("pixel_size", 1e-3, 1e4),
    ):
        value = getattr(fit, field)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise FormatError(fit.path, field, f"a number from {least:g} to {most:g}", f"{value:g}", "Correct it.")
    smaller_first = fit.astigmatism < 0  # the azimuth of `Optics` is that of the largest underfocus
    azimuth = torch.where(smaller_first, fit.astigmatism_angle + 90, fit.astigmatism_angle)
    return fit._replace(astigmatism=fit.astigmatism.abs(), astigmatism_angle=azimuth)
