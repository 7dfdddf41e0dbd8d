"""Real tilt series: images, geometry and exposures from the files of SerialEM, IMOD, AreTomo, RELION 5 and Warp.

Each program numbers, orders and leaves out images in its own way. All are brought to the sections of the stack, counted
from 0 as ZValue is. What does not fit is an error that names it; what is left out is a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from cryosim.acquisition.series import Stack, TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import rotation_z
from cryosim.io.affine import resampled, resampled_optics
from cryosim.io.alignments import Geometry, positive
from cryosim.io.exposures import (
    Companions,
    Exposures,
    companions,
    exposures_of,
    exposures_of_alignment,
    mdoc_of,
    told_image_shape,
)
from cryosim.io.files import FormatError, existing_file
from cryosim.io.fitted_optics import check_complete, fitted_beside, optics_of_sections, say_poor_fits
from cryosim.io.left_behind import say_left_behind
from cryosim.io.mdoc import LARGEST_DOSE
from cryosim.io.mrc import read_stack
from cryosim.io.series import images_and_pixel_size
from cryosim.io.stack_geometry import check_angles, geometry_of_stack, rows_of_sections
from cryosim.microscope.optics import Optics

_STRETCH = 0.1  # of a matrix: what a microscope may do to an image, and binning does not
_MOVED = 1e-3  # [px] in the corner of an image: not worth a resampling


def import_series(
    stack: str | Path,
    *,
    mdoc: str | Path | None = None,
    angles: str | Path | None = None,
    alignment: str | Path | None = None,
    ctf_file: str | Path | None = None,
    name: str | None = None,
    pixel_size: float | None = None,
    alignment_pixel_size: float | None = None,
    voltage: float | None = None,
    optics: Optics | None = None,
    dose: float | Sequence[float] | None = None,
    exclude: Iterable[int] = (),
    darkest: float = 0.05,
) -> TiltSeries:
    """Tilt series of a stack with the geometry that another program has found for it.

    Left out are the sections named in `exclude`, those the alignment left out, and empty images. A magnification,
    stretch or tilt axis that changes from image to image is taken out of the images by exact resampling, and out of
    their optics. Tilts about x and local parts of an alignment (patches of AreTomo and IMOD, grids of Warp) are left
    behind, with a warning that tells how far they displace points.

    Parameters
    ----------
    stack : str or path
        MRC stack of the images, in any order.
    mdoc, angles, alignment : str or path, optional
        Files of the exposures (.mdoc), of the nominal angle of each section (.rawtlt, .tlt, or _TLT.txt with order and
        dose), and of the alignment (.xf with its .tlt beside it, .aln, .star, .xml). When left out, those beside
        the stack: see `companions`.
    ctf_file : str or path, optional
        CTF fits: .star of RELION 5, .xml of Warp, _CTF.txt of AreTomo3, .txt of CTFFIND, .defocus of IMOD. When left
        out, STEM.defocus or STEM_CTF.txt beside the stack, or the alignment where that holds them.
    name : str, optional
        rlnTomoName, where a tomograms.star has several.
    pixel_size : float, optional
        Of the stack [Å], in place of the files'.
    alignment_pixel_size : float, optional
        Of the images that were aligned [Å], where they were binned; the outlines of binned and unbinned images are
        taken to coincide in their middle. Not for .xml, which tells places in Å.
    voltage : float, optional
        Of the microscope [kV], in place of the .mdoc's.
    optics : Optics, optional
        In place of the files'; fields () or (section,). With `ctf_file`, for what that does not tell. Of the images as
        they are in the stack: where these are resampled, it is changed with them.
    dose : float or sequence (section,), optional
        Of each exposure [e-/Å^2], in place of the files'.
    exclude : iterable of int
        Sections, counted from 0.
    darkest : float
        An image is empty when its mean is below this fraction of the median one's; 0 leaves only constant ones out.

    Returns
    -------
    TiltSeries
        images (tilt, y, x) float32 in the order of exposure; optics None when no file tells a defocus, stack None when
        images were resampled.

    Warns
    -----
    UserWarning
        When images are left out or resampled, parts of the alignment are left behind, dose, order of exposure or
        constants of the microscope are unknown, the defocus is the target, or the .mdoc tells another size.

    Raises
    ------
    FormatError
        When a file is missing or malformed, or two disagree: which, where and by what is named.
    ValueError
        When an argument is wrong, a dose is zero among others, or no image is left.
    """
    path = existing_file(stack)
    files = companions(path, mdoc, angles, alignment)
    notes = mdoc_of(files)
    if notes is None:
        images, pixel = read_stack(path, pixel_size=pixel_size)  # (section, y, x), [Å]
    else:
        images, pixel = images_and_pixel_size(path, pixel_size, notes)
    n, shape = images.shape[0], (images.shape[1], images.shape[2])
    _same_image_shape(path, shape, files)
    geometry = None
    if files.alignment is not None:
        geometry = geometry_of_stack(files.alignment, (n, *shape), pixel, alignment_pixel_size, name)
    exposures = exposures_of(path, n, files, notes)
    rows = None if geometry is None else rows_of_sections(geometry, exposures, n)
    if exposures is None:
        if geometry is None or rows is None:
            raise FormatError(path, "tilt angles", "a file beside it", "no .mdoc, list of angles or alignment", "")
        exposures = exposures_of_alignment(geometry, rows)
    exposures = _with_doses(path, exposures, geometry, rows, dose)
    left_out = _left_out(path, images, exclude, geometry, rows, darkest)
    kept = _in_order(path, exposures, [z for z in range(n) if z not in left_out])
    _say_left_out(path, left_out, exposures)
    _no_zero_dose(path, exposures.tilts.doses, kept)
    tilts, images = exposures.tilts.index(kept), images[kept]
    where = Stack(str(path), kept, tuple(exposures.tilts.angles.tolist()))
    if voltage is not None:
        exposures = exposures._replace(voltage=positive(f"{path}: voltage", voltage, "kV"))
    if ctf_file is not None:
        fits = existing_file(ctf_file)
    else:
        fits = fitted_beside(path, files.alignment) if optics is None else None
    optics = optics_of_sections(
        path,
        n,
        pixel,
        exposures,
        given=optics,
        file=fits,
        asked=ctf_file is not None,
        alignment_rows=rows if fits == files.alignment else None,
        name=name,
    )
    if optics is not None:
        check_complete(fits or path, optics, kept.tolist())
        say_poor_fits(fits or path, optics, kept.tolist())
        optics = optics.index(kept)
    if geometry is not None and rows is not None:
        say_left_behind(geometry.left_behind, pixel * math.hypot(*shape) / 2)
        tilts, images, stretch = _aligned(images, tilts, geometry, rows[kept], kept, exposures.told, pixel)
        if stretch is not None:
            where = None
            optics = None if optics is None else resampled_optics(optics, stretch)
    movies = None if exposures.movies is None else tuple(exposures.movies[z] for z in kept.tolist())
    return TiltSeries(images, pixel, tilts, optics, movies, where)


def _with_doses(
    path: Path,
    exposures: Exposures,
    geometry: Geometry | None,
    rows: torch.Tensor | None,
    dose: float | Sequence[float] | None,
) -> Exposures:
    """Exposures with the doses given, or else those, and the order, that follow from an alignment's prior doses."""
    tilts, n = exposures.tilts, len(exposures.tilts)
    if dose is not None:
        doses = torch.as_tensor(dose, dtype=torch.float64)
        if doses.shape not in ((), (n,)) or not bool(((doses > 0) & torch.isfinite(doses)).all()):
            raise ValueError(f"{path}: dose: expected one or {n} positive numbers [e-/Å^2], got {dose}.")
        exposures = exposures._replace(tilts=tilts.replace(doses=doses.expand(n).clone()), missing=0.0)
    priors = None if geometry is None else geometry.prior_doses
    if priors is None or rows is None or len(priors.unique()) < len(priors) or not bool(torch.isfinite(priors).all()):
        return exposures
    if exposures.order is None:
        last = priors.max() + 1
        exposures = exposures._replace(order=torch.where(rows < 0, last, priors[rows]))
    if not bool((exposures.tilts.doses > 0).any()) and len(priors) > 1:
        steps = priors.sort().values.diff()  # of one exposure each, more where tilts are missing
        guess = float(steps.median())
        warnings.warn(
            f"{path}: no file tells doses; taken to be {guess:g} e-/Å^2 each, the usual step of the prior doses in "
            f"{geometry.path if geometry else path}. Give dose= where that is wrong.",
            UserWarning,
            stacklevel=3,
        )
        exposures = exposures._replace(tilts=tilts.replace(doses=torch.full((n,), guess, dtype=torch.float64)))
    return exposures


def _left_out(
    path: Path,
    images: torch.Tensor,
    exclude: Iterable[int],
    geometry: Geometry | None,
    rows: torch.Tensor | None,
    darkest: float,
) -> dict[int, str]:
    """Why each section that is left out is."""
    n, asked = len(images), list(exclude)
    wrong = [z for z in asked if z not in range(n)]
    if wrong:
        raise ValueError(f"{path}: exclude: expected sections, counted from 0, up to {n - 1}, got {wrong}.")
    if not 0 <= darkest < 1:
        raise ValueError(f"{path}: darkest: expected a fraction from 0 to 1, got {darkest}.")
    reasons: dict[int, str] = {}
    means = images.mean((1, 2))
    bright = darkest * means.median() if bool((means >= 0).all()) else means.new_tensor(-torch.inf)
    for z in range(n):
        low, high = torch.aminmax(images[z])
        if low == high or means[z] < bright:
            reasons[z] = "an empty image"
        if geometry is not None and rows is not None:
            if rows[z] < 0:
                reasons[z] = f"not in {geometry.path.name}"
            elif not geometry.used[rows[z]]:
                reasons[z] = f"left out in {geometry.path.name}"
        if z in asked:
            reasons[z] = "asked for"
    if len(reasons) == n:
        told = "; ".join(f"section {z}: {reason}" for z, reason in reasons.items())
        raise ValueError(f"{path}: expected at least one image that is not left out, got none. {told}.")
    return reasons


def _in_order(path: Path, exposures: Exposures, kept: list[int]) -> torch.Tensor:
    """Sections `kept` in the order of exposure."""
    sections = torch.tensor(kept)
    if exposures.order is None:
        if len(kept) > 1:
            warnings.warn(
                f"{path}: no file tells the order of exposure; that of the stack is kept. Use the .mdoc if there is "
                "one.",
                UserWarning,
                stacklevel=3,
            )
        return sections
    return sections[torch.argsort(exposures.order[sections], stable=True)]


def _say_left_out(path: Path, left_out: dict[int, str], exposures: Exposures) -> None:
    doses, angles = exposures.tilts.doses, exposures.tilts.angles
    lost = exposures.missing + float(doses[list(left_out)].sum())
    found = [
        f"section {z} at {float(angles[z]):g} degrees ({reason})"
        for z, reason in left_out.items()
        if reason != "asked for" or lost
    ]
    if found or exposures.missing > 1e-6:
        said = "; ".join(found) or "exposures that are not in the stack"
        end = f" Their dose of {lost:g} e-/Å^2 is not in the accumulated doses of the others." if lost > 1e-6 else ""
        warnings.warn(f"{path}: left out: {said}.{end}", UserWarning, stacklevel=3)


def _no_zero_dose(path: Path, doses: torch.Tensor, kept: torch.Tensor) -> None:
    """Doses are of all images or of none, which is said."""
    if float(doses[kept].sum()) > LARGEST_DOSE:
        got = f"{[round(float(dose), 3) for dose in doses[kept]]}"
        raise ValueError(f"{path}: dose: expected less than {LARGEST_DOSE:g} e-/Å^2 for the series, got {got}.")
    zero = kept[doses[kept] == 0].tolist()
    if len(zero) == len(kept):
        warnings.warn(f"{path}: no file tells doses; they are zero. Give dose=.", UserWarning, stacklevel=3)
    elif zero:
        raise ValueError(
            f"{path}: dose: expected more than 0 e-/Å^2 at every section, got 0 at {sorted(zero)}. Give dose= or "
            "exclude= these."
        )


def _aligned(
    images: torch.Tensor,
    tilts: TiltScheme,
    geometry: Geometry,
    rows: torch.Tensor,
    sections: torch.Tensor,
    told: bool,
    pixel: float,
) -> tuple[TiltScheme, torch.Tensor, torch.Tensor | None]:
    """Tilts and images (tilt, y, x) of `sections` with the geometry of `rows`, `images` changed in place.

    Also the matrices L (tilt, 2, 2) with which images were resampled, None when none was.

    Where a point is seen at c + shift + L R_z(axis_angle) v, the resampled image shows it at c + L^-1 shift + R_z v.
    """
    angles, shifts, matrices = geometry.angles[rows], geometry.shifts[rows], geometry.matrices[rows]
    if told:
        check_angles(geometry.path, tilts.angles, angles, sections)
    axes = torch.deg2rad(geometry.axis_angles[rows])
    axis = float(torch.rad2deg(torch.atan2(torch.sin(axes).mean(), torch.cos(axes).mean())))
    stretch = matrices @ rotation_z(-axis)[:2, :2]  # L (tilt, 2, 2)
    off = (stretch - torch.eye(2, dtype=stretch.dtype)).abs().amax((1, 2))
    if float(off.max()) > _STRETCH:
        worst = int(off.argmax())
        raise FormatError(
            geometry.path,
            f"section {int(sections[worst])}, matrix",
            f"a turn by the mean axis angle of {axis:g} degrees, and at most {_STRETCH:.0%} of stretch",
            f"{[[round(v, 4) for v in row] for row in stretch[worst].tolist()]} after that turn",
            "Is the image mirrored, or was the alignment made on binned images?",
        )
    field = pixel * math.hypot(*images.shape[1:])
    away = shifts.norm(dim=1)
    if float(away.max()) > field:
        worst = int(away.argmax())
        raise FormatError(
            geometry.path,
            f"section {int(sections[worst])}, shift",
            f"at most the diagonal of an image, {field:.0f} Å",
            f"{float(away[worst]):.4g} Å",
            "Is it in the pixels of this stack?",
        )
    moved = off * max(images.shape[1:]) > _MOVED
    applied = None
    if bool(moved.any()):
        applied = torch.where(moved[:, None, None], stretch, torch.eye(2, dtype=stretch.dtype))
        sizes = torch.linalg.det(stretch).sqrt()
        warnings.warn(
            f"{geometry.path}: {int(moved.sum())} images are resampled: magnifications of {float(sizes.min()):.5g} to "
            f"{float(sizes.max()):.5g}, axis angles of {_span(torch.rad2deg(axes), axis)} degrees.",
            UserWarning,
            stacklevel=3,
        )
        shifts = torch.linalg.solve(stretch, shifts[..., None])[..., 0]
        for tilt in moved.nonzero().flatten().tolist():  # one at a time: spectra are larger than images
            images[tilt] = resampled(images[tilt], stretch[tilt])
    return tilts.replace(angles=angles, shifts=shifts, axis_angle=axis), images, applied


def _same_image_shape(path: Path, shape: tuple[int, int], files: Companions) -> None:
    told = None if files.mdoc is None else told_image_shape(files.mdoc)
    if told is not None and told != shape:
        warnings.warn(
            f"{path}: images of {shape} px (y, x), but {files.mdoc} tells {told}. Is the pixel size that of the stack?",
            UserWarning,
            stacklevel=3,
        )


def _span(axes: torch.Tensor, axis: float) -> str:
    turned = torch.remainder(axes - axis + 180, 360) - 180 + axis
    return f"{float(turned.min()):.5g} to {float(turned.max()):.5g}"
