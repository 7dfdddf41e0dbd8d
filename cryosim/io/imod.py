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

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import rotation_y, rotation_z
from cryosim.io.alignments import Alignment, alignment_of, needed, positive, sections_of, sizes
from cryosim.io.files import FormatError, atomic_write, existing_file, read_text

_RIGID = 1e-3  # of the matrix in a file: AreTomo writes three digits
_LIST = 2**22  # [byte]


def write_xf(
    path: str | Path,
    tilts: TiltScheme,
    pixel_size: float,
    image_shape: tuple[int, int],
    *,
    nominal: torch.Tensor | Sequence[float] | None = None,
    volume_shape: tuple[int, int, int] | None = None,
    voxel_size: float | None = None,
) -> list[Path]:
    """Write the .xf of a tilt series, the .tlt of its true angles and the .rawtlt of the nominal ones.

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
    volume_shape : (int, int, int), optional
        (z, y, x) of the tomogram, after `trimvol -rx`, whose sample n // 2 shall show the specimen's origin; when left
        out the point does that `tilt` turns about, half a sample before it where sizes are even.
    voxel_size : float, optional
        Of that tomogram [Å]; `pixel_size` when left out.

    Returns
    -------
    list of Path
        Files written: .xf, .tlt, .rawtlt.

    Raises
    ------
    ValueError
        When the suffix, a size or the nominal angles are not right.
    """
    path = Path(path)
    if path.suffix != ".xf":
        raise ValueError(f"{path}: suffix: expected .xf, got {path.suffix!r}.")
    sections, pixel = sections_of(tilts, nominal), positive(f"{path}: pixel_size", pixel_size)
    half, middle = _half_pixels(path, image_shape), _middle(path, pixel, volume_shape, voxel_size)
    back = rotation_z(-sections.axis_angle)[:2, :2]
    moved = (half + sections.shifts / pixel) @ back.T + _seen(sections.angles, middle)
    rows = torch.cat([back.flatten().expand(len(moved), 4), -moved], 1).tolist()
    text = {path: "".join(" ".join(f"{v + 0.0:14.8f}" for v in row) + "\n" for row in rows)}
    for suffix, angles in ((".tlt", sections.angles), (".rawtlt", sections.nominal)):
        text[path.with_suffix(suffix)] = "".join(f"{angle + 0.0:.10g}\n" for angle in angles.tolist())
    with ExitStack() as writing:
        for file, content in text.items():
            writing.enter_context(atomic_write(file)).write_bytes(content.encode())
    return list(text)


def read_xf(
    path: str | Path,
    pixel_size: float | None,
    image_shape: tuple[int, int] | None,
    *,
    volume_shape: tuple[int, int, int] | None = None,
    voxel_size: float | None = None,
) -> Alignment:
    """Alignment of an .xf and the .tlt, or else .rawtlt, beside it. Arguments and errors as in `read_alignment`."""
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
    axis = torch.rad2deg(torch.atan2(back[:, 0, 1], back[:, 0, 0]))
    forth = rotation_z(axis)[:, :2, :2]
    if float((back @ forth - torch.eye(2, dtype=torch.float64)).abs().max()) > _RIGID:
        raise FormatError(
            path,
            "matrices",
            "rotations",
            "a change of magnification, stretch or mirror",
            "A TiltScheme has none: align again with a fixed magnification.",
        )
    shifts = -torch.einsum("sij,sj->si", forth, moved + _seen(angles, middle)) - half
    return alignment_of(path, angles, axis, pixel * shifts)


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
