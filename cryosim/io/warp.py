"""Warp's tilt series: an XML file with angles, axis, offsets, doses and defocus of each tilt.

Warp projects (WarpLib, TiltSeries.GetPositionsInOneTilt), with angles as its Matrix3.Euler(0, Angles, -AxisAngle),

    r = image / 2 + AxisOffset + R_z(AxisAngle) R_y(-Angles - LevelAngleY) (q - volume / 2)        (x, y) [Å]

so Angles = -angle, which its own importer does too. q counts from the first voxel, and dimensions are halved as they
are: the centre of an image of n pixels is the sample n / 2. Where n or N is odd, ours lies half a sample before it, and

    AxisOffset = shift + pixel_size (n // 2 - n / 2) - [R_z R_y w]_xy,     w = voxel_size (N // 2 - N / 2)

The defocus of a place is that of GridCTF [µm] plus its height along the beam after this rotation, as ours is, so
AreAnglesInverted is False, unless the images were found to be of the other hand. Warp itself was not run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from cryosim.acquisition.series import Movie, Stack
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import rotation_z, tilt_rotation
from cryosim.io.alignments import LARGEST, Geometry, Sections, needed, positive, sections_of, sizes
from cryosim.io.files import FormatError, existing_file, finite_number, read_text, write_text
from cryosim.io.left_behind import LeftBehind, tilts_about_x
from cryosim.microscope.optics import Optics, check_per_tilt

_GRIDS = (
    *("GridMovementX", "GridMovementY", "GridAngleX", "GridAngleY", "GridAngleZ"),
    *("GridVolumeWarpX", "GridVolumeWarpY", "GridVolumeWarpZ"),
)


def write_warp(
    path: str | Path,
    tilts: TiltScheme,
    pixel_size: float,
    image_shape: tuple[int, int],
    volume_shape: tuple[int, int, int],
    *,
    voxel_size: float | None = None,
    optics: Optics | None = None,
    movies: Sequence[Movie] | None = None,
    nominal: torch.Tensor | Sequence[float] | None = None,
    stack: Stack | None = None,
    hand: int = 1,
) -> None:
    """Write the XML of a tilt series. Warp looks for its stack at tiltstack/NAME/NAME.st beside NAME.xml.

    Parameters
    ----------
    path : str or path
    tilts : TiltScheme
        As the images truly were taken.
    pixel_size : float
        Of the images [Å].
    image_shape : (int, int)
        (y, x) [px].
    volume_shape : (int, int, int)
        (z, y, x) of the tomogram whose sample n // 2 shows the specimen's origin.
    voxel_size : float, optional
        Of that tomogram [Å]; `pixel_size` when left out.
    optics : Optics, optional
        Fields () or (tilt,) in the order of exposure.
    movies : sequence of Movie, optional
        In the order of exposure, seen from the folder of the file.
    nominal : tensor (tilt,), optional
        Angles the stage was asked for [deg], in the order of exposure: they order the sections.
    stack : Stack, optional
        The file the images stand in, in place of `nominal`. Sections that the series leaves out have UseTilt False, and
        movies are not told then.
    hand : {1, -1}
        -1 where the defocus of a point falls with its height along the beam of this geometry: AreAnglesInverted.

    Raises
    ------
    ValueError
        When a size, the optics, the movies, the hand or the nominal angles are not right.
    """
    if hand not in (1, -1):
        raise ValueError(f"{path}: hand: expected 1 or -1, got {hand}.")
    pixel = positive(f"{path}: pixel_size", pixel_size)
    voxel = pixel if voxel_size is None else positive(f"{path}: voxel_size", voxel_size)
    image, volume = sizes(f"{path}: image_shape", image_shape, 2), sizes(f"{path}: volume_shape", volume_shape, 3)
    sections = sections_of(tilts, nominal, stack)
    n, used = len(sections.rows), (sections.rows >= 0).tolist()
    root = ElementTree.Element("TiltSeries", AreAnglesInverted=str(hand < 0))
    root.set("ImageDimensionsAngstrom", _row(n * pixel for n in reversed(image)))
    root.set("VolumeDimensionsAngstrom", _row(n * voxel for n in reversed(volume)))
    offsets = sections.shifts + _centres(sections.rotations, image, pixel, volume, voxel)
    doses = torch.cat([tilts.accumulated_doses, tilts.doses.sum()[None]]).detach().cpu()
    columns = {"Angles": -sections.angles, "Dose": doses[sections.rows]}  # -1 is the end of the series
    for name, values in columns.items():
        _column(root, name, values.tolist())
    _column(root, "UseTilt", [str(one) for one in used])
    _column(root, "AxisAngle", [sections.axis_angle] * n)
    for name, values in zip(("AxisOffsetX", "AxisOffsetY"), offsets.T, strict=True):
        _column(root, name, values.tolist())
    if movies is not None:
        if len(movies) != len(tilts):
            raise ValueError(f"{path}: movies: expected {len(tilts)}, one a tilt, got {len(movies)}.")
        if all(used):
            _column(root, "MoviePath", [movies[row].path for row in sections.rows.tolist()])
    _ctf(root, pixel, sections, optics, len(tilts))
    ElementTree.indent(root)
    write_text(path, '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n")


def read_warp(
    path: str | Path,
    image_shape: tuple[int, int] | None = None,
    *,
    pixel_size: float | None = None,
    volume_shape: tuple[int, int, int] | None = None,
    voxel_size: float | None = None,
) -> Geometry:
    """Geometry of a Warp XML. Arguments and errors as in `read_alignment`; `pixel_size` takes the place of the file's.

    Rows stand as the tilts of the file do; Warp's own stack holds those of them it uses (TiltSeries.StackTilts).

    Warns
    -----
    UserWarning
        When the file has AreAnglesInverted.
    """
    from cryoet_alignment.io.warp import WarpAlignment  # takes most of a second

    path = existing_file(path)
    try:
        text = read_text(path, LARGEST)
        root = ElementTree.fromstring(text.lstrip("\ufeff"))
        content = WarpAlignment.from_string(text, pixel_size_a=pixel_size)
        level_x, level_y = (float(root.get(name, "0")) for name in ("LevelAngleX", "LevelAngleY"))
        magnification = [float(word) for word in root.get("MagnificationCorrection", "1, 0, 0, 1").split(",")]
    except (ValueError, IndexError, TypeError, ElementTree.ParseError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, "content", "a tilt series of Warp", str(error), "Write it again.") from error
    _warn_of_hand(path, root)
    pixel = positive(f"{path}: pixel_size", content.pixel_size_a)
    image = sizes(f"{path}: image_shape", needed(path, "image_shape", image_shape, "(y, x) of an image [px]"), 2)
    entries = content.entries
    angles = -torch.tensor([e.tilt_angle + level_y for e in entries], dtype=torch.float64)
    axes = torch.tensor([e.tilt_axis_angle for e in entries], dtype=torch.float64)
    offsets = torch.tensor([[e.tilt_axis_offset_x, e.tilt_axis_offset_y] for e in entries], dtype=torch.float64)
    volume = (2, 2, 2) if volume_shape is None else sizes(f"{path}: volume_shape", volume_shape, 3)
    voxel = pixel if voxel_size is None else positive(f"{path}: voxel_size", voxel_size)
    shifts = offsets - _centres(tilt_rotation(angles, axes), image, pixel, volume, voxel)
    used, doses, movies = (_list(path, root, name, len(entries)) for name in ("UseTilt", "Dose", "MoviePath"))
    width, height = content.image_dimensions_physical
    if not (0 <= width < math.inf and 0 <= height < math.inf):
        raise FormatError(path, "ImageDimensionsAngstrom", "two sizes [Å]", f"{width:g}, {height:g}", "Correct them.")
    return Geometry(
        path,
        angles,
        rotation_z(axes)[:, :2, :2],
        shifts,
        torch.tensor([word.lower() != "false" for word in used or ["true"] * len(entries)]),
        prior_doses=None
        if doses is None
        else torch.tensor([finite_number(path, "Dose", word, "Write it again.") for word in doses]).double(),
        movies=None if movies is None else tuple(movies),
        stack_shape=(None, height / pixel, width / pixel) if min(width, height) > 0 else None,
        left_behind=_left_behind(path, root, level_x, magnification),
    )


def _list(path: Path, root: ElementTree.Element, name: str, n: int) -> list[str] | None:
    """The lines of an element with one line a tilt; None where there is no such element."""
    lines = (root.findtext(name) or "").strip().splitlines()
    if lines and len(lines) != n:
        raise FormatError(path, name, f"{n} lines, one a tilt", f"{len(lines)}", "Write it again.")
    return [line.strip() for line in lines] or None


def _left_behind(
    path: Path, root: ElementTree.Element, level: float, magnification: list[float]
) -> tuple[LeftBehind, ...]:
    """The tilt about x, the magnification, and the grids of shifts [Å] and angles [deg]."""
    parts = tilts_about_x(path, "LevelAngleX", torch.tensor([level], dtype=torch.float64))
    if magnification != [1, 1, 0]:  # Warp 1 wrote that in place of the identity
        if len(magnification) != 4:
            raise FormatError(path, "MagnificationCorrection", "a matrix of 4 numbers", f"{magnification}", "")
        matrix = torch.tensor(magnification, dtype=torch.float64).reshape(2, 2)
        off = float(torch.linalg.matrix_norm(matrix - torch.eye(2, dtype=torch.float64), 2))
        parts = (*parts, LeftBehind(path, "MagnificationCorrection", f"the matrix {magnification}", stretch=off))
    for name in _GRIDS:
        nodes = [] if (grid := root.find(name)) is None else list(grid.iter("Node"))
        largest = max(
            (abs(finite_number(path, name, node.get("Value", "0"), "Write it again.")) for node in nodes), default=0.0
        )
        if "Angle" in name:
            parts = (*parts, LeftBehind(path, name, f"a grid of angles up to {largest:.3g}°", angle=largest))
        else:
            parts = (*parts, LeftBehind(path, name, f"a grid of shifts up to {largest:.3g} Å", length=largest))
    return parts


def _warn_of_hand(path: Path, root: ElementTree.Element) -> None:
    """Say that a defocus has the other sign."""
    if root.get("AreAnglesInverted", "False").lower() == "true":
        warnings.warn(
            f"{path}: AreAnglesInverted: electrons travel along -z of this geometry. What is further up is less out of "
            "focus: images and tomogram are right, a defocus that varies with height is not.",
            UserWarning,
            stacklevel=5,
        )


def _centres(
    rotations: torch.Tensor, image: tuple[int, ...], pixel: float, volume: tuple[int, ...], voxel: float
) -> torch.Tensor:
    """What is added to the shifts because Warp's centres are n / 2 (section, 2) [Å]."""
    here = torch.tensor([n // 2 - n / 2 for n in reversed(image)], dtype=torch.float64) * pixel
    there = torch.tensor([n // 2 - n / 2 for n in reversed(volume)], dtype=torch.float64) * voxel
    return here - (rotations @ there)[:, :2]


def _ctf(root: ElementTree.Element, pixel: float, sections: Sections, optics: Optics | None, n: int) -> None:
    ctf = ElementTree.SubElement(root, "CTF")
    values = {"PixelSize": pixel}
    if optics is not None:
        check_per_tilt(optics, n)
        rows = {  # name, field, Warp's unit
            "Voltage": ("voltage", 1.0),
            "Cs": ("spherical_aberration", 1.0),
            "Amplitude": ("amplitude_contrast", 1.0),
            "Defocus": ("defocus", 1e-4),  # [µm]
            "DefocusDelta": ("astigmatism", 1e-4),  # [µm]
            "DefocusAngle": ("astigmatism_angle", 1.0),
            "PhaseShift": ("phase_shift", 1 / 180),  # [pi]
        }
        of_tilt = {
            name: unit * torch.as_tensor(getattr(optics, field), dtype=torch.float64).detach().cpu().expand(n)
            for name, (field, unit) in rows.items()
        }
        values |= {name: float(value.mean()) for name, value in of_tilt.items()}
        grids = (
            ("GridCTF", "Defocus"),
            ("GridCTFDefocusDelta", "DefocusDelta"),
            ("GridCTFDefocusAngle", "DefocusAngle"),
            ("GridCTFPhase", "PhaseShift"),
        )
        for grid, name in grids:
            nodes = ElementTree.SubElement(root, grid, Width="1", Height="1", Depth=str(len(sections.rows)))
            known = torch.cat([of_tilt[name], of_tilt[name].mean()[None]])  # the mean where a section is left out
            for z, value in enumerate(known[sections.rows].tolist()):
                ElementTree.SubElement(nodes, "Node", X="0", Y="0", Z=str(z), Value=_text(value))
    for name, value in values.items():
        ElementTree.SubElement(ctf, "Param", Name=name, Value=_text(value))


def _column(root: ElementTree.Element, name: str, values: Sequence) -> None:
    ElementTree.SubElement(root, name).text = "\n".join(v if isinstance(v, str) else _text(v) for v in values)


def _row(values) -> str:
    return ", ".join(_text(value) for value in values)


def _text(value: float) -> str:
    return f"{value + 0.0:.10g}"
