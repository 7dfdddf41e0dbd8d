"""Alignments of tilt series: what IMOD, AreTomo, RELION 5 and Warp write down of the same projection.

A point p [Å] of the specimen, from its origin, is seen at the sample

    r = n // 2 + (shift + [R_z(axis_angle) R_y(angle) p]_xy) / pixel_size                          (x, y) [px]

counted from 0: `TiltScheme` and `tilt_rotation`. Each program has its own way to say it, and its own centre:

=========  =============================  ==============================  ==============================================
program    angles                         shift                           centre of an image, of a tomogram [sample]
=========  =============================  ==============================  ==============================================
RELION 5   YTilt, ZRot                    X, YShiftAngst = shift          n // 2, N // 2
AreTomo    TILT, ROT                      TX, TY = shift / pixel_size     n / 2 or (n - 1) / 2, see `cryosim.io.aretomo`
IMOD       .tlt; matrix R^T in the .xf    -R^T shift / pixel_size         (n - 1) / 2, see `cryosim.io.imod`
Warp       Angles = -angle, AxisAngle     AxisOffset = shift              n / 2, N / 2
=========  =============================  ==============================  ==============================================

The files of IMOD and Warp carry what their centres differ from ours by, so that the same voxel of their tomogram and
of the truth shows the same place. A file has a row for each section of the stack, which stand by ascending nominal
angle; rows of a `TiltScheme` stand in the order of exposure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cryosim.acquisition.series import Stack
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.record import Record, item
from cryosim.core.rotation import rotation_z, tilt_rotation
from cryosim.io.files import FormatError, existing_file
from cryosim.io.left_behind import LeftBehind, say_left_behind
from cryosim.io.mdoc import LARGEST_DOSE

LARGEST = 2**26  # [byte] of an alignment file

_SAME = 1e-3  # [deg], to which files tell the axis
_RIGID = 1e-3  # of a matrix: AreTomo writes three digits
_APART = 5.0  # [deg]: what an alignment may find between neighbouring tilts


class Alignment(Record):
    """What an alignment says of each section of a stack.

    Attributes
    ----------
    angles : tensor (section,)
        [deg].
    shifts : tensor (section, 2)
        (x, y) by which the content is displaced [Å].
    axis_angle : float
        In-plane angle of the tilt axis, from y, right-handed about z [deg].
    """

    angles: torch.Tensor = item(0)
    shifts: torch.Tensor = item(1)
    axis_angle: float = item(0, default=0.0)

    def __len__(self) -> int:
        return self.angles.shape[0]


class Geometry(NamedTuple):
    """What a file says of the sections of a stack, with all that an `Alignment` cannot hold.

    A point p [Å] is seen at the sample n // 2 + (shift + matrix [R_y(angle) p]_xy) / pixel_size.

    Attributes
    ----------
    path : Path
        The file.
    angles : tensor (row,)
        [deg].
    matrices : tensor (row, 2, 2)
        R_z(axis_angle), times magnification and stretch.
    shifts : tensor (row, 2)
        (x, y) [Å].
    used : tensor (row,)
        False where the program left the image out.
    sections : tensor (row,) or None
        Section of the stack, counted from 0; None when the file does not number them.
    nominal : tensor (row,) or None
        Angles the stage was asked for [deg].
    prior_doses : tensor (row,) or None
        What the specimen had seen before [e-/Å^2].
    movies : tuple of str or None
        File with the frames of each.
    stack_shape : (int or None, float, float) or None
        Sections, and (y, x) of an image, of the stack that was aligned; numbers of images of Warp are not told.
    pixel_size : float or None
        Of that stack, if the shifts in the file are in Å and it is told nevertheless.
    left_behind : tuple of LeftBehind
        What the file tells and no field here holds.
    """

    path: Path
    angles: torch.Tensor
    matrices: torch.Tensor
    shifts: torch.Tensor
    used: torch.Tensor
    sections: torch.Tensor | None = None
    nominal: torch.Tensor | None = None
    prior_doses: torch.Tensor | None = None
    movies: tuple[str, ...] | None = None
    stack_shape: tuple[int | None, float, float] | None = None
    pixel_size: float | None = None
    left_behind: tuple[LeftBehind, ...] = ()

    @property
    def axis_angles(self) -> torch.Tensor:
        """In-plane angle of the tilt axis (row,) [deg]: of the rotation nearest to the matrix."""
        m = self.matrices
        return torch.rad2deg(torch.atan2(m[:, 1, 0] - m[:, 0, 1], m[:, 0, 0] + m[:, 1, 1]))


class Sections(NamedTuple):
    """Rows of a `TiltScheme` in the order of the stack, in float64.

    Attributes
    ----------
    rows : tensor (section,)
        Row of the scheme that stands in each section, -1 where the series leaves it out.
    angles, nominal : tensor (section,)
        True angles, and those the stage was asked for, which stand for both where a section is left out [deg].
    shifts : tensor (section, 2)
        [Å]; 0 where a section is left out.
    rotations : tensor (section, 3, 3)
        R_z(axis_angle) R_y(angle).
    axis_angle : float
        [deg].
    """

    rows: torch.Tensor
    angles: torch.Tensor
    nominal: torch.Tensor
    shifts: torch.Tensor
    rotations: torch.Tensor
    axis_angle: float

    @property
    def used(self) -> list[int]:
        """Sections that the series has."""
        return (self.rows >= 0).nonzero().flatten().tolist()

    @property
    def left_out(self) -> list[int]:
        """Sections that the series leaves out."""
        return (self.rows < 0).nonzero().flatten().tolist()


def sections_of(
    tilts: TiltScheme, nominal: torch.Tensor | Sequence[float] | None = None, stack: Stack | None = None
) -> Sections:
    """Rows of `tilts` as they stand in a stack: by ascending nominal angle, as `write_series` puts them, or as told.

    Parameters
    ----------
    tilts : TiltScheme
        As the images truly were taken.
    nominal : tensor (tilt,), optional
        Angles the stage was asked for [deg], in the order of exposure; `tilts.angles` when left out.
    stack : Stack, optional
        The file the images stand in, in place of `nominal`.

    Raises
    ------
    ValueError
        When the nominal angles or the sections are not one a tilt.
    """
    if stack is not None:
        return _sections_of_stack(tilts, stack)
    true, shifts = (value.detach().cpu().to(torch.float64) for value in (tilts.angles, tilts.shifts))
    asked = true if nominal is None else torch.as_tensor(nominal, dtype=torch.float64).detach().cpu()
    if asked.shape != true.shape or not bool(torch.isfinite(asked).all()):
        raise ValueError(f"nominal: expected {len(true)} angles [deg], one a tilt, got {asked.tolist()}.")
    rows, axis = torch.argsort(asked, stable=True), float(tilts.axis_angle)
    return Sections(rows, true[rows], asked[rows], shifts[rows], tilt_rotation(true[rows], axis), axis)


def _sections_of_stack(tilts: TiltScheme, stack: Stack) -> Sections:
    places = stack.sections.cpu()
    if len(places) != len(tilts):
        raise ValueError(f"stack: expected {len(tilts)} sections, one a tilt, got {len(places)}.")
    nominal = torch.tensor(stack.angles, dtype=torch.float64)
    rows, angles, shifts = torch.full((len(nominal),), -1), nominal.clone(), nominal.new_zeros(len(nominal), 2)
    rows[places] = torch.arange(len(places))
    angles[places] = tilts.angles.detach().cpu().to(torch.float64)
    shifts[places] = tilts.shifts.detach().cpu().to(torch.float64)
    axis = float(tilts.axis_angle)
    return Sections(rows, angles, nominal, shifts, tilt_rotation(angles, axis), axis)


def read_alignment(
    path: str | Path,
    *,
    pixel_size: float | None = None,
    image_shape: tuple[int, int] | None = None,
    volume_shape: tuple[int, int, int] | None = None,
    voxel_size: float | None = None,
    name: str | None = None,
) -> Alignment:
    """Alignment of an IMOD .xf (with its .tlt beside it), an AreTomo .aln, a RELION-5 .star or a Warp .xml.

    Refused are a changing axis, a changing magnification, and dark images that were taken out. A tilt about x and local
    parts (patches of AreTomo and IMOD, grids of Warp) are left behind, with a warning that tells how much they move.

    Parameters
    ----------
    path : str or path
        Of RELION the tomograms.star, or the file of one tilt series.
    pixel_size : float, optional
        Of the tilt series [Å]; needed for .xf and .aln, whose shifts are in pixels. RELION's and Warp's files tell it.
    image_shape : (int, int), optional
        (y, x) of an image [px]; needed for .xf and .xml, whose programs have another centre where it is even or odd.
    volume_shape : (int, int, int), optional
        (z, y, x) of the tomogram in which sample n // 2 is the origin; when left out it is the program's own centre.
    voxel_size : float, optional
        Of that tomogram [Å]; `pixel_size` when left out.
    name : str, optional
        rlnTomoName, where the file has several.

    Raises
    ------
    FormatError
        When the file is missing, damaged, of another kind, or says what is refused.
    ValueError
        When the pixel size or image shape is needed and missing.
    """
    found = read_geometry(
        path,
        pixel_size=pixel_size,
        image_shape=image_shape,
        volume_shape=volume_shape,
        voxel_size=voxel_size,
        name=name,
    )
    shape = image_shape if image_shape is not None or found.stack_shape is None else found.stack_shape[1:]
    pixel = pixel_size or found.pixel_size
    say_left_behind(found.left_behind, None if shape is None or pixel is None else pixel * math.hypot(*shape) / 2)
    return alignment_of(found)


def read_geometry(
    path: str | Path,
    *,
    pixel_size: float | None = None,
    image_shape: tuple[int, int] | None = None,
    volume_shape: tuple[int, int, int] | None = None,
    voxel_size: float | None = None,
    name: str | None = None,
) -> Geometry:
    """All that an alignment file says of its sections. Arguments and errors as in `read_alignment`.

    Sections that were left out, a changing axis and a changing magnification are kept. What is not, tilts about x and
    local parts, is named in `left_behind`.
    """
    from cryosim.io import aretomo, imod, relion, warp  # each imports this module

    path = existing_file(path)
    if path.stat().st_size > LARGEST:
        raise FormatError(path, "size", f"at most {LARGEST} bytes", f"{path.stat().st_size}", "Is it an alignment?")
    suffix = path.suffix.lower()
    there = {"volume_shape": volume_shape, "voxel_size": voxel_size}
    if suffix == ".xf":
        found = imod.read_xf(path, pixel_size, image_shape, **there)
    elif suffix == ".aln":
        found = aretomo.read_aln(path, pixel_size)
    elif suffix == ".star":
        found = relion.read_relion(path, name=name)
    elif suffix == ".xml":
        found = warp.read_warp(path, image_shape, pixel_size=pixel_size, **there)
    else:
        raise FormatError(path, "suffix", "one of .xf, .aln, .star, .xml", repr(suffix), "Rename the file.")
    return _checked(found)


def aligned(tilts: TiltScheme, alignment: Alignment) -> TiltScheme:
    """`tilts` with the angles, shifts and axis of an alignment of its stack.

    Parameters
    ----------
    tilts : TiltScheme
        With nominal angles, as `read_series` gives it; its rows keep their order, doses and frames.
    alignment : Alignment

    Raises
    ------
    ValueError
        When the numbers of tilts differ, or the angles are those of a stack in another order.
    """
    if len(tilts) != len(alignment):
        raise ValueError(f"aligned: expected {len(tilts)} sections, one a tilt, got {len(alignment)}.")
    nominal = tilts.angles.detach().cpu().to(torch.float64)
    rows = torch.argsort(nominal, stable=True)
    apart = alignment.angles - nominal[rows]
    if float((apart - apart.median()).abs().max()) > _APART:  # a common offset is the pre-tilt of a lamella
        raise ValueError(
            f"aligned: expected sections by ascending angle within {_APART:g} degrees of {nominal[rows].tolist()}, got "
            f"{alignment.angles.tolist()}. Is it an alignment of this stack?"
        )
    places = torch.argsort(rows)
    return tilts.replace(
        angles=alignment.angles[places], shifts=alignment.shifts[places], axis_angle=float(alignment.axis_angle)
    )


def alignment_of(geometry: Geometry) -> Alignment:
    """The geometry as an `Alignment` of all sections.

    Raises
    ------
    FormatError
        When sections were left out, or magnification or axis change.
    """
    path, used = geometry.path, geometry.used
    if not bool(used.all()):
        raise FormatError(
            path,
            "sections",
            f"all {len(used)} of the stack",
            f"{int(used.sum())}",
            "Take the dark images out of the stack first, or use import_series, which leaves them out.",
        )
    order = torch.arange(len(used)) if geometry.sections is None else torch.argsort(geometry.sections, stable=True)
    axes = geometry.axis_angles[order]
    stretch = geometry.matrices[order] @ rotation_z(-axes)[:, :2, :2]
    worst = (stretch - torch.eye(2, dtype=stretch.dtype)).abs().amax((1, 2))
    if float(worst.max()) > _RIGID:
        section = int(worst.argmax())
        raise FormatError(
            path,
            f"section {section}, matrix",
            "a rotation",
            f"a change of magnification, stretch or mirror: {_rounded(stretch[section])} after the rotation",
            "A TiltScheme has none: use import_series, which resamples the images.",
        )
    turned = torch.remainder(axes - axes[0] + 180, 360) - 180  # about the first, across +-180
    if float(turned.max() - turned.min()) > _SAME:
        raise FormatError(
            path,
            "axis angle",
            "one for all sections",
            f"{float(axes.min()):g} to {float(axes.max()):g} degrees",
            "A TiltScheme has one axis: use import_series, which turns the images.",
        )
    return Alignment(geometry.angles[order], geometry.shifts[order], float(axes[0] + turned.mean()))


def _checked(geometry: Geometry) -> Geometry:
    """`geometry`, if it has rows, finite numbers, and tilts below 90 degrees."""
    path = geometry.path
    if not len(geometry.angles):
        raise FormatError(path, "sections", "at least one", "none", "Is it an alignment?")
    for field in ("angles", "matrices", "shifts"):
        if not bool(torch.isfinite(getattr(geometry, field)).all()):
            raise FormatError(path, field, "finite numbers", "NaN or infinity", "Correct the entry.")
    if not bool((geometry.angles.abs() < 90).all()):
        raise FormatError(
            path, "angles", "tilts between -90 and 90 degrees", f"{geometry.angles.tolist()}", "Correct them."
        )
    for field, values, least, most in (
        ("nominal angles", geometry.nominal, -90.0, 90.0),
        ("prior doses", geometry.prior_doses, 0.0, LARGEST_DOSE),
    ):
        if values is not None and not bool(((values >= least) & (values <= most)).all()):
            raise FormatError(
                path, field, f"numbers from {least:g} to {most:g}", f"{values.tolist()[:100]}", "Correct the entry."
            )
    return geometry


def _rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[round(float(value), 5) for value in row] for row in matrix]


def needed(path: Path, name: str, value, meaning: str):
    """`value`, or a ValueError that says what the reader of `path` lacks."""
    if value is None:
        raise ValueError(f"{path}: {name}: expected {meaning}, got none. The file does not tell it: give {name}=.")
    return value


def positive(what: str, value: float, unit: str = "Å") -> float:
    """`value` as a float, or a ValueError where it is not a positive number."""
    if not 0 < float(value) < float("inf"):
        raise ValueError(f"{what}: expected a positive number [{unit}], got {value}.")
    return float(value)


def sizes(what: str, shape: Sequence[int], axes: int) -> tuple[int, ...]:
    """`shape` as whole numbers, or a ValueError where it has another number of axes or an empty one."""
    shape = tuple(int(n) for n in shape)
    if len(shape) != axes or min(shape) < 1:
        raise ValueError(f"{what}: expected {axes} sizes of 1 or more, got {shape}.")
    return shape


def constant(path: str | Path, field: str, value) -> float:
    """`value` as a float, or a ValueError where it changes from tilt to tilt; `field` of `Optics`."""
    values = torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1)
    if not bool((values == values[0]).all()):
        raise ValueError(f"{path}: Optics.{field}: expected one value for the series, got {values.tolist()}.")
    return float(values[0])
