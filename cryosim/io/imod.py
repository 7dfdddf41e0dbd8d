"""IMOD's alignment: the .xf that takes raw images to aligned ones, and the lists of tilt angles.

A line of an .xf, A11 A12 A21 A22 DX DY, takes the sample r of an image to the sample a of the aligned one,

    a - g = A (r - g) + D,     g = (n - 1) / 2                                                     (x, y) [px]

for IMOD's images reach from 0 to n with the centre at n / 2, and pixel i, counted from 0, stands at i + 1/2
(libcfshr/cubinterp.c: "xcen = nxb / 2. + xt + 0.5" of pixels that are counted from 1). With A = R_z(axis_angle)^T the
tilt axis of the aligned images is y. The tomogram of `tilt`, turned by `trimvol -rx`, is projected as

    a - g = [R_y(angle) (q - c)]_xy,     c = (N // 2 - 1/2, (N - 1) / 2, N - N // 2 - 1/2)                (x, y, z)

of its samples q (flib/tilt/tilt.f90: u = (ix - xcenOut) cos - (i - ycenOut) sin + xcenIn, with the integer divisions
xcenOut = iwidth / 2 + 0.5 and ycenOut = ithickBP / 2 + 0.5; clip/clip_proc.c: -rx reverses the thickness). So its hand
is ours, and where n and N are even its centres lie half a sample before ours.

Our specimen is seen at r = n // 2 + shift + [R_z R_y p]_xy, and shall stand at q = N // 2 + p:

    D = -R_z^T (n // 2 - g + shift) - [R_y (c - N // 2)]_xy

Without the half pixels this is the conversion of AreTomo's -OutImod and of cryoet-alignment, D = -R_z^T shift, which
leaves the axis up to 0.7 px beside the specimen's. Read in IMOD's source of 2014; the programs were not run.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from cryosim.acquisition.series import Stack
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import rotation_y, rotation_z
from cryosim.io.alignments import LARGEST, Geometry, needed, positive, sections_of, sizes
from cryosim.io.aretomo import read_tlt_txt
from cryosim.io.files import FormatError, atomic_write, existing_file, read_text
from cryosim.io.left_behind import LeftBehind, tilts_about_x

_LIST = 2**22  # [byte]
_TILT = "tilt.com"


def write_xf(
    path: str | Path,
    tilts: TiltScheme,
    pixel_size: float,
    image_shape: tuple[int, int],
    *,
    nominal: torch.Tensor | Sequence[float] | None = None,
    stack: Stack | None = None,
    volume_shape: tuple[int, int, int] | None = None,
    voxel_size: float | None = None,
) -> list[Path]:
    """Write the .xf of a tilt series, the .tlt of its true angles and the .rawtlt of the nominal ones.

    A .rawtlt that has these angles already is left as it is: it may tell doses, too.

    Parameters
    ----------
    path : str or path
        Of the .xf; the lists stand beside it.
    tilts : TiltScheme
        As the images truly were taken.
    pixel_size : float
        Of the images [Å].
    image_shape : (int, int)
        (y, x) [px].
    nominal : tensor (tilt,), optional
        Angles the stage was asked for [deg], in the order of exposure: they order the sections. `tilts.angles` when
        left out.
    stack : Stack, optional
        The file the images stand in, in place of `nominal`.
    volume_shape : (int, int, int), optional
        (z, y, x) of the tomogram, after `trimvol -rx`, whose sample n // 2 shall show the specimen's origin; when left
        out the point does that `tilt` turns about, half a sample before it where sizes are even.
    voxel_size : float, optional
        Of that tomogram [Å]; `pixel_size` when left out.

    Returns
    -------
    list of Path
        The files: .xf, .tlt, .rawtlt.

    Warns
    -----
    UserWarning
        When the stack has sections that the series leaves out: their lines are the identity, which IMOD has to be told.

    Raises
    ------
    ValueError
        When the suffix, a size or the nominal angles are not right.
    """
    path = Path(path)
    if path.suffix.lower() != ".xf":
        raise ValueError(f"{path}: suffix: expected .xf, got {path.suffix!r}.")
    sections, pixel = sections_of(tilts, nominal, stack), positive(f"{path}: pixel_size", pixel_size)
    half, middle = _half_pixels(path, image_shape), _middle(path, pixel, volume_shape, voxel_size)
    back = rotation_z(-sections.axis_angle)[:2, :2]
    moved = (half + sections.shifts / pixel) @ back.T + _seen(sections.angles, middle)
    lines = torch.cat([back.flatten().expand(len(moved), 4), -moved], 1)
    lines[sections.left_out] = torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=lines.dtype)
    rows = lines.tolist()
    text = {path: "".join(" ".join(f"{v + 0.0:14.8f}" for v in row) + "\n" for row in rows)}
    for suffix, angles in ((".tlt", sections.angles), (".rawtlt", sections.nominal)):
        text[path.with_suffix(suffix)] = "".join(f"{angle + 0.0:.10g}\n" for angle in angles.tolist())
    raw = path.with_suffix(".rawtlt")
    with ExitStack() as writing:
        for file, content in text.items():
            if file != raw or not _has_angles(file, sections.nominal):
                writing.enter_context(atomic_write(file)).write_bytes(content.encode())
    if sections.left_out:
        views = ",".join(str(z + 1) for z in sections.left_out)
        warnings.warn(
            f"{path}: the views {views} are left out. Have IMOD know it: `EXCLUDELIST {views}` in tilt.com.",
            UserWarning,
            stacklevel=2,
        )
    return list(text)


def read_xf(
    path: str | Path,
    pixel_size: float | None,
    image_shape: tuple[int, int] | None,
    *,
    volume_shape: tuple[int, int, int] | None = None,
    voxel_size: float | None = None,
) -> Geometry:
    """Geometry of an .xf and the .tlt, or else .rawtlt, beside it. Arguments and errors as in `read_alignment`.

    Left out are the views in the exclude lists of a tilt.com beside it, which `tiltalign` gives the transform of a
    neighbour, and those with the identity in the midst of turned images, which AreTomo writes for dark ones.
    """
    from cryoet_alignment.io.imod import ImodTLT, ImodXF  # takes most of a second

    path = existing_file(path)
    pixel = positive(f"{path}: pixel_size", needed(path, "pixel_size", pixel_size, "that of the images [Å]"))
    half = _half_pixels(path, needed(path, "image_shape", image_shape, "(y, x) of an image [px]"))
    middle = _middle(path, pixel, volume_shape, voxel_size)
    beside = next((f for s in (".tlt", ".rawtlt") if (f := path.with_suffix(s)).exists()), path.with_suffix(".tlt"))
    rows, angles = (
        _parsed(file, kind) for file, kind in ((path, ImodXF), (existing_file(beside), ImodTLT))
    )  # (section, 6), (section,)
    if len(rows) != len(angles):
        raise FormatError(path, "lines", f"{len(angles)}, as {beside.name} has", f"{len(rows)}", "Name the right file.")
    back, moved = rows[:, :4].reshape(-1, 2, 2), rows[:, 4:]
    flat = torch.linalg.det(back).abs() < 1e-3
    if bool(flat.any()) or not bool(torch.isfinite(rows).all()):
        which = int(flat.int().argmax())
        raise FormatError(path, f"line {which + 1}", "a matrix that has an inverse", f"{rows[which].tolist()}", "")
    forth = _forth(back)
    shifts = -torch.einsum("sij,sj->si", forth, moved + _seen(angles, middle)) - half
    used = ~_identity(rows)
    for first, last in _excluded_views(path):
        if not 1 <= first <= last <= len(used):
            raise FormatError(path.with_name(_TILT), "exclude list", f"views 1 to {len(used)}", f"{first}-{last}", "")
        used[first - 1 : last] = False
    left_behind = (*_turns_of_all(path), *_tilts_about_x(path, len(rows)), *_local(path, pixel))
    return Geometry(
        path, angles, forth, pixel * shifts, used, sections=torch.arange(len(rows)), left_behind=left_behind
    )


def _has_angles(path: Path, angles: torch.Tensor) -> bool:
    """Whether a list of angles is there, and has these (section,) [deg]."""
    if not path.exists():
        return False
    try:
        found, _, _ = read_tlt_txt(path)
    except FormatError:
        return False
    return len(found) == len(angles) and float((torch.tensor(found) - angles).abs().max()) < 1e-3


def _forth(back: torch.Tensor) -> torch.Tensor:
    """Inverses (section, 2, 2) of the matrices; of those with three digits, the rotations they stand for."""
    forth = torch.linalg.inv(back)
    short = float((1e3 * back - (1e3 * back).round()).abs().max()) < 1e-6
    axis = torch.rad2deg(torch.atan2(back[:, 0, 1] - back[:, 1, 0], back[:, 0, 0] + back[:, 1, 1]))
    turned = rotation_z(axis)[:, :2, :2]
    return turned if short and float((forth - turned).abs().max()) < 1e-3 else forth


def _identity(rows: torch.Tensor) -> torch.Tensor:
    """Which (section,) of rows (section, 6) leave the image as it is although most others turn it."""
    same = (rows == torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=rows.dtype)).all(1)
    return same if bool(rows[:, 1].abs().median() > 0.02) else torch.zeros_like(same)  # a degree


def _excluded_views(path: Path) -> list[tuple[int, int]]:
    """First and last views, counted from 1, in the exclude lists of a tilt.com of the same series beside `path`."""
    file, text = _tilt_com(path)
    views: list[tuple[int, int]] = []
    for entries in re.findall(r"^\s*EXCLUDELIST2?[ \t]+(.*)$", text, re.IGNORECASE | re.MULTILINE):
        for entry in re.split(r"[,\s]+", entries.strip()):
            found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", entry)
            if found is None:
                raise FormatError(file, "exclude list", "views such as 1,2,38-41", repr(entries), "Correct it.")
            views.append((int(found.group(1)), int(found.group(2) or found.group(1))))
    return views


def _tilt_com(path: Path) -> tuple[Path, str]:
    """The tilt.com beside `path` and its text, empty where there is none or it is of another series."""
    file = path.with_name(_TILT)
    text = read_text(file, _LIST) if file.exists() else ""
    if "\0" in text or "\ufffd" in text:
        raise FormatError(file, "content", "plain text", "other bytes", "Save it as UTF-8.")
    images = re.search(r"^\s*InputProjections\s+(\S+)", text, re.IGNORECASE | re.MULTILINE)
    return file, "" if images and not Path(images.group(1)).name.startswith(path.stem) else text


def _entry(text: str, name: str) -> str | None:
    """What follows `name` in the lines of a tilt.com."""
    found = re.search(rf"^[ \t]*{name}[ \t]+(\S+)", text, re.IGNORECASE | re.MULTILINE)
    return None if found is None else found.group(1)


def _turns_of_all(path: Path) -> list[LeftBehind]:
    """XAXISTILT and OFFSET of a tilt.com: turns of the tomogram about x and y."""
    file, text = _tilt_com(path)
    parts = []
    for name, axis in (("XAXISTILT", "x"), ("OFFSET", "y")):
        word = _entry(text, name)
        try:
            angle = 0.0 if word is None else float(word)
        except ValueError:
            angle = math.nan
        if not abs(angle) < 90:
            raise FormatError(file, name, "an angle between -90 and 90 degrees", repr(word), "Correct it.")
        if angle:
            parts.append(LeftBehind(file, name, f"a tilt about {axis} of {angle:g}° in all images", angle, rigid=True))
    return parts


def _tilts_about_x(path: Path, n: int) -> tuple[LeftBehind, ...]:
    """The .xtilt beside the .xf."""
    from cryoet_alignment.io.imod import ImodXTILT

    file = path.with_suffix(".xtilt")
    if not file.exists() or not file.stat().st_size:
        return ()
    angles = _parsed(file, ImodXTILT)
    if len(angles) != n:
        raise FormatError(file, "lines", f"{n}, as {path.name} has", f"{len(angles)}", "Is it of this series?")
    return tilts_about_x(file, "tilts about x", angles)


def _local(path: Path, pixel: float) -> list[LeftBehind]:
    """The local alignment that a tilt.com names or that stands beside the .xf.

    After a line with the grid of areas come, for each area, lists of angles and a transform for each view. The shifts
    of those are measured: lines of six numbers of which four are a matrix close to the identity.
    """
    _, text = _tilt_com(path)
    named = _entry(text, "LOCALFILE")
    local = path.with_name(f"{path.stem}local.xf") if named is None else path.with_name(Path(named).name)
    if not local.exists():
        return []
    shifts = []
    for line in read_text(local, LARGEST).splitlines()[1:]:
        try:
            a, b, c, d, x, y = (float(word) for word in line.split())
        except ValueError:
            continue
        if max(abs(a - 1), abs(b), abs(c), abs(d - 1)) < 0.2:
            shifts.append(math.hypot(x, y))
    if not shifts:
        said = "local transforms of unknown size (none could be read)"
        warnings.warn(f"{local}: {said} are left behind.", UserWarning, stacklevel=5)
        return []
    largest = pixel * max(shifts)
    return [LeftBehind(local, "local transforms", f"local shifts up to {largest:.3g} Å", length=largest)]


def _half_pixels(path: Path, image_shape: tuple[int, int]) -> torch.Tensor:
    """n // 2 - (n - 1) / 2 (x, y) [px] of an image."""
    shape = sizes(f"{path}: image_shape", image_shape, 2)
    return torch.tensor([n // 2 - (n - 1) / 2 for n in reversed(shape)], dtype=torch.float64)


def _middle(
    path: Path, pixel: float, volume_shape: tuple[int, int, int] | None, voxel_size: float | None
) -> torch.Tensor:
    """c - N // 2 (x, y, z) [px of an image]: the place of the specimen that `tilt` turns about."""
    if volume_shape is None:
        return torch.zeros(3, dtype=torch.float64)
    voxel = pixel if voxel_size is None else positive(f"{path}: voxel_size", voxel_size)
    nz, ny, _ = sizes(f"{path}: volume_shape", volume_shape, 3)
    samples = [-0.5, (ny - 1) / 2 - ny // 2, nz % 2 - 0.5]
    return torch.tensor(samples, dtype=torch.float64) * voxel / pixel


def _seen(angles: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[R_y(angle) place]_xy (section, 2)."""
    return (rotation_y(angles) @ place)[:, :2]


def _parsed(path: Path, kind) -> torch.Tensor:
    text = "\n".join(line for line in read_text(path, _LIST).splitlines() if line.strip())
    try:
        return torch.from_numpy(kind.from_string(text).numpy()).to(torch.float64)
    except (ValueError, IndexError, TypeError) as error:
        raise FormatError(path, "lines", "the numbers of an IMOD file", str(error), "Write it again.") from error
