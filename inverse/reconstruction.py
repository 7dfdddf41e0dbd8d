"""From a tilt series to a tomogram: prepare the images, then reconstruct slab by slab of rows.

Tilted about y, row y of the volume depends on row y of the images alone. So the images are prepared once, in two
dimensions and tilt by tilt, and the volume is made in slabs of rows whose memory does not grow with the tomogram.
Neither method couples rows once the images are prepared, so slabs need no margin.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch.nn import functional

from cryosim.acquisition.series import TiltSeries
from cryosim.core.constants import interaction_constant
from cryosim.core.fourier import (
    fast_length,
    frequencies,
    half_frequencies,
    resampling_matrix,
    shifted,
    squared_frequencies,
)
from cryosim.core.record import Record, item
from cryosim.core.volume import Volume
from cryosim.microscope.optics import ctf as contrast_transfer
from inverse.physics.closed_form import gram_solver
from inverse.physics.rows import LAYERS, backproject_rows, row_backprojection
from inverse.physics.spectral import TiltGeometry, tilt_geometry
from inverse.solvers.linear import Filter, low_passed, wbp_filter

Method = Literal["wbp", "least-squares"]
Correction = Literal["flip", "wiener", "none"]
_ROWS = 64
_DEEPEST = 16384  # [voxel]: what is deeper was asked for in another unit


class Reconstruction(Record):
    """What `reconstruct` returns.

    Attributes
    ----------
    volume : Volume
        Potential above its surroundings [V], as far as the images carry it.
    damping : tensor ()
        That least squares used [voxel^2]; NaN for back-projection.
    """

    volume: Volume
    damping: torch.Tensor = item(0)


def reconstruct(
    series: TiltSeries,
    method: Method = "wbp",
    *,
    thickness: float | None = None,
    bin: int = 1,
    ctf: Correction = "flip",
    filter: Filter = "ramp",
    low_pass: float | None = None,
    weight: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Tomogram of a tilt series. It has no gradients: for those use the operators.

    Parameters
    ----------
    series : TiltSeries
        Counts, or any images whose mean is the unscattered intensity.
    method : {"wbp", "least-squares"}
        Weighted back-projection, or damped least squares in closed form.
    thickness : float, optional
        Of the volume along the beam [Å]; half the width of the images when left out.
    bin : int
        Image pixels to a voxel edge, by cutting in Fourier space.
    ctf : {"flip", "wiener", "none"}
        Correction of the contrast transfer, one defocus an image: its sign only, also its size where it is not small,
        or nothing. A series without optics is not corrected.
    filter : {"ramp", "exact"}
        Of the back-projection.
    low_pass : float, optional
        Finest period to keep [Å].
    weight : float, optional
        Of the damping, as in `inverse.least_squares` [voxel^2], positive; when left out, estimated from the images'
        noise and signal.
    progress : callable, optional
        Called with (rows done, rows in all).

    Returns
    -------
    Reconstruction

    Warns
    -----
    UserWarning
        When the series has no optics: not corrected, and scaled as for 300 kV.

    Raises
    ------
    ValueError
        For an unknown method, a number out of bounds, or images that hold no electrons.
    """
    design = designed(
        series, method, thickness=thickness, bin=bin, ctf=ctf, filter=filter, low_pass=low_pass, weight=weight
    )
    images, noise = prepare(series, bin=bin, ctf=ctf, low_pass=low_pass)  # (tilt, y, x) [V·voxel], (tilt,)
    design = damped(design, images, noise)
    values = images.new_empty(design.shape)
    for rows, layers, block in slabs(images, design):
        values[layers, rows] = block
        if progress and layers.stop == design.shape[0]:
            progress(rows.stop, design.shape[1])
    return Reconstruction(Volume(values, design.voxel_size), torch.tensor(design.damping, dtype=torch.float64))


class Stack(Protocol):
    """Prepared images (tilt, y, x): a tensor, or what reads them from a file image by image and slab by slab."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __getitem__(self, which: Any, /) -> torch.Tensor: ...


class Design(NamedTuple):
    """What a tomogram will be and how it is made of prepared images.

    Attributes
    ----------
    shape : (int, int, int)
        (z, y, x) [voxel].
    voxel_size : float
        [Å].
    angles : tuple of float
        Of the tilts [deg].
    method : {"wbp", "least-squares"}
    filter : {"ramp", "exact"}
        Of the back-projection.
    damping : float
        Of least squares [voxel^2]; NaN for back-projection, and as long as it is to be estimated.
    """

    shape: tuple[int, int, int]
    voxel_size: float
    angles: tuple[float, ...]
    method: Method
    filter: Filter
    damping: float

    @property
    def geometry(self) -> TiltGeometry:
        """Of the projection of one row."""
        depth, _, width = self.shape
        return tilt_geometry(depth, width, width, "camera", max(abs(angle) for angle in self.angles))


def designed(
    series: TiltSeries,
    method: Method,
    *,
    thickness: float | None,
    bin: int,
    ctf: Correction,
    filter: Filter,
    low_pass: float | None,
    weight: float | None,
) -> Design:
    """What `reconstruct` would make, with the arguments checked and nothing computed. Errors are its own."""
    if method not in get_args(Method):
        raise ValueError(f'reconstruct: expected the method "wbp" or "least-squares", got {method!r}.')
    if filter not in get_args(Filter):
        raise ValueError(f'reconstruct: expected the filter "ramp" or "exact", got {filter!r}.')
    if ctf not in get_args(Correction):
        raise ValueError(f'reconstruct: expected the ctf "flip", "wiener" or "none", got {ctf!r}.')
    if thickness is not None and not thickness > 0:
        raise ValueError(f"reconstruct: expected a positive thickness [Å], got {thickness}.")
    if low_pass is not None and not 0 < low_pass < math.inf:
        raise ValueError(f"reconstruct: expected a positive low_pass [Å], got {low_pass}. Leave it out to keep all.")
    if weight is not None and not 0 < weight < math.inf:
        raise ValueError(f"reconstruct: expected a positive weight [voxel^2], got {weight}.")
    rows, width = frame_shape(series, bin)
    voxel = float(series.pixel_size) * bin
    thickness = width * voxel / 2 if thickness is None else thickness
    if thickness > _DEEPEST * voxel:
        raise ValueError(
            f"reconstruct: expected a thickness of at most {_DEEPEST} voxels of {voxel:g} Å, got {thickness:g} Å. "
            "Check its unit, or raise bin."
        )
    shape = (max(1, round(thickness / voxel)), rows, width)
    damping = math.nan if weight is None or method == "wbp" else float(weight)
    return Design(shape, voxel, tuple(series.tilts.angles.tolist()), method, filter, damping)


def damped(design: Design, images: Stack, noise: torch.Tensor) -> Design:
    """`design` with the damping that least squares needs, where none was asked for, from the prepared images."""
    if design.method == "wbp" or not math.isnan(design.damping):
        return design
    angles = torch.tensor(design.angles, dtype=torch.float64)
    return design._replace(damping=float(estimated_damping(images, noise, angles, design.geometry)))


@torch.no_grad()
def slabs(
    images: Stack,
    design: Design,
    *,
    starts: Sequence[int] | None = None,
    rows: int | None = None,
    layers: int = LAYERS,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """The tomogram of prepared images (tilt, y, x) in slabs of `rows`, each in blocks of `layers`, from the first up.

    Parameters
    ----------
    starts : sequence of int, optional
        First rows of the slabs to make; all when left out.

    Yields
    ------
    rows, layers : slice
        Of the volume's y and z.
    values : tensor (layer, row, x)
        [V].
    """
    height, step, geometry = design.shape[1], rows or _ROWS, design.geometry
    angles = torch.tensor(design.angles, dtype=torch.float64)
    if design.method == "wbp":
        action = wbp_filter(angles, geometry, design.filter)
    else:
        action = gram_solver(angles, torch.tensor(design.damping, dtype=torch.float64), geometry)
    plan = row_backprojection(angles, geometry, action, images.dtype, layers=layers)
    for start in range(0, height, step) if starts is None else starts:
        slab = slice(start, min(start + step, height))
        for block, values in backproject_rows(plan, images[:, slab]):
            yield slab, block, values


def frame_shape(series: TiltSeries, bin: int) -> tuple[int, int]:
    """(y, x) of the prepared images: a tilt axis nearer to x than to y exchanges the two."""
    ny, nx = series.images.shape[1:]
    if not 1 <= bin <= min(ny, nx) or bin != int(bin):
        raise ValueError(f"reconstruct: expected a whole bin from 1 to {min(ny, nx)}, the image's side, got {bin}.")
    if round(float(series.tilts.axis_angle) / 90) % 2:
        ny, nx = nx, ny
    return ny // int(bin), nx // int(bin)


def prepare(
    series: TiltSeries, *, bin: int = 1, ctf: Correction = "flip", low_pass: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All of `prepared_images` at once: images (tilt, y, x) [V·voxel] and noise (tilt,) [V^2·voxel^2]."""
    images, noise = None, []
    for i, (image, variance) in enumerate(prepared_images(series, bin=bin, ctf=ctf, low_pass=low_pass)):
        images = image.new_empty(len(series.tilts), *image.shape) if images is None else images
        images[i] = image
        noise.append(variance)
    assert images is not None
    return images, torch.stack(noise)


@torch.no_grad()
def prepared_images(
    series: TiltSeries, *, bin: int = 1, ctf: Correction = "flip", low_pass: float | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images as line integrals of potential, in the frame whose tilt axis is y, and the variance of their noise.

    The contrast I / mean(I) - 1 of a weak object is 2 sigma ctf V (see `cryosim.microscope.optics`); here it is divided
    by 2 sigma and the voxel size, corrected for the sign of the ctf at least, turned and shifted back as
    `TiltScheme` says, cut to the bin, faded out at the edges, and cut at `low_pass` [Å].

    Yields
    ------
    image : tensor (y, x)
        Of one tilt [V·voxel].
    noise : tensor ()
        Variance of its pixels by counting statistics [V^2·voxel^2].
    """
    if ctf not in get_args(Correction):
        raise ValueError(f'reconstruct: expected the ctf "flip", "wiener" or "none", got {ctf!r}.')
    frame_shape(series, bin)
    _check_counts(series)
    if series.optics is None:
        warnings.warn(
            "reconstruct: the series has no optics, so its contrast transfer is not corrected, and its volts are "
            "those of a 300 kV microscope. Set TiltSeries.optics.",
            UserWarning,
            stacklevel=2,
        )
    dtype = series.images.dtype if series.images.is_floating_point() else torch.float32
    correction = None
    for i in range(len(series.tilts)):
        one = series.replace(movies=None).index(slice(i, i + 1))
        if correction is None or correction.ndim == 3:  # one for all tilts, where they share the optics
            correction = _correction(one, ctf, dtype)
        image, noise = _line_integrals(one, correction, bin, dtype)
        yield image if low_pass is None else low_passed(image, low_pass / (float(series.pixel_size) * bin)), noise


def _check_counts(series: TiltSeries) -> None:
    finite = [bool(torch.isfinite(image).all()) for image in series.images]
    if not all(finite):
        raise ValueError("reconstruct: TiltSeries.images holds values that are not finite; leave those tilts out.")
    means = [float(image.sum(dtype=torch.float64)) for image in series.images]
    empty = [round(float(a), 2) for a, mean in zip(series.tilts.angles, means, strict=True) if not mean > 0]
    if empty:
        raise ValueError(f"reconstruct: the images at {empty} degrees hold no electrons; leave those tilts out.")


def _correction(one: TiltSeries, ctf: Correction, dtype: torch.dtype) -> torch.Tensor:
    """What the spectrum of a contrast is multiplied with, (y, x), or (1, y, x) where the optics belong to the tilt."""
    if ctf == "none" or one.optics is None:
        return -torch.ones(one.images.shape[1:], dtype=dtype)  # matter is dark in underfocus
    transfer = contrast_transfer(one.optics, (one.images.shape[1], one.images.shape[2]), one.pixel_size)
    transfer = transfer.to(dtype.to_complex() if transfer.is_complex() else dtype).conj()
    return torch.sgn(transfer) if ctf == "flip" else transfer / (transfer.abs() ** 2 + 0.1)


def _line_integrals(
    one: TiltSeries, correction: torch.Tensor, bin: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepared image (y, x) and the variance () of its noise, of a series of one tilt; without the low pass."""
    counts, tilts, axis_angle = one.images.to(dtype), one.tilts, float(one.tilts.axis_angle)
    mean = counts.mean()
    contrast = counts / mean - 1
    voltage = torch.as_tensor(300.0 if one.optics is None else one.optics.voltage, dtype=torch.float64)
    gain = 1 / (2 * interaction_constant(voltage) * one.pixel_size * bin).to(dtype).reshape(())
    spectrum = torch.fft.rfft2(contrast)
    corrected = torch.fft.irfft2(spectrum * correction[..., : spectrum.shape[-1]], s=contrast.shape[1:])
    noise = _kept_noise(correction, bin, axis_angle).reshape(()) / mean * gain**2
    aligned = to_tilt_frame(corrected, tilts.shifts / one.pixel_size, axis_angle)
    if bin > 1:
        rows, columns = (resampling_matrix(n, n // bin, float(bin), dtype=dtype) for n in aligned.shape[1:])
        aligned = rows @ aligned @ columns.T
    return _faded(aligned[0] * gain), noise


def to_tilt_frame(images: torch.Tensor, shifts: torch.Tensor, axis_angle: float) -> torch.Tensor:
    """Images (tilt, y, x) moved back by `shifts` (tilt, 2) [(x, y) px] and turned back so that the tilt axis is y.

    By Fourier interpolation: a shift is a phase, a turn is whole quarter turns and three shears (Unser, Thévenaz &
    Yaroslavsky 1995, doi:10.1109/83.465102). A quarter turn exchanges height and width.
    """
    if bool((shifts != 0).any()):
        images = shifted(images, -shifts)
    quarters = round(axis_angle / 90)
    images = _quarter_turns(images, -quarters)
    rest = torch.deg2rad(torch.tensor(-(axis_angle - 90 * quarters), dtype=torch.float64))
    if abs(float(rest)) < 1e-9:
        return images
    ny, nx = images.shape[1:]
    margin = [n // 2 + 1 for n in (ny, nx)]  # the shears push corners out before they bring them back
    wide = [fast_length(n + 2 * m) for n, m in zip((ny, nx), margin, strict=True)]
    before = [w // 2 - n // 2 for w, n in zip(wide, (ny, nx), strict=True)]
    after = [w - n - b for w, n, b in zip(wide, (ny, nx), before, strict=True)]
    padded = functional.pad(images, (before[1], after[1], before[0], after[0]))
    padded = _shear_x(padded, -float(torch.tan(rest / 2)))
    padded = _shear_x(padded.mT, float(torch.sin(rest))).mT
    padded = _shear_x(padded, -float(torch.tan(rest / 2)))
    return padded[:, before[0] : before[0] + ny, before[1] : before[1] + nx]


def _quarter_turns(images: torch.Tensor, quarters: int) -> torch.Tensor:
    """Images turned by `quarters` * 90 degrees from x towards y about sample n // 2."""
    for _ in range(quarters % 4):  # (x, y) -> (-y, x)
        images = images.mT.flip(-1)
        if images.shape[-1] % 2 == 0:
            images = images.roll(1, -1)
    return images


def _shear_x(images: torch.Tensor, slope: float) -> torch.Tensor:
    """Content at (x, y) moved to (x + slope y, y)."""
    ny, nx = images.shape[1:]
    y = torch.arange(ny, dtype=images.dtype, device=images.device) - ny // 2
    k = half_frequencies(nx, dtype=images.dtype, device=images.device)
    turns = -slope * y[:, None] * k
    phases = torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)
    return torch.fft.irfft(torch.fft.rfft(images) * phases, n=nx)


def _kept_noise(correction: torch.Tensor, bin: int, axis_angle: float) -> torch.Tensor:
    """Variance () or (tilt,) that white noise of variance 1 has after `correction` (..., y, x) and the cut to the bin.

    The mean, over all frequencies, of what the correction and the cut leave; the cut is square in the turned frame.
    """
    power = correction.abs().double().square()
    if bin > 1:
        ny, nx = power.shape[-2:]
        ky, kx = frequencies(ny, dtype=torch.float64)[:, None], frequencies(nx, dtype=torch.float64)
        turn = math.radians(-axis_angle)
        across, along = kx * math.cos(turn) - ky * math.sin(turn), kx * math.sin(turn) + ky * math.cos(turn)
        power = power * (torch.maximum(across.abs(), along.abs()) < 0.5 / bin - 1e-9).to(power)
    return power.mean((-2, -1)).to(correction.real.dtype)


def _faded(images: torch.Tensor, fraction: float = 0.05) -> torch.Tensor:
    """Images brought to zero by cosine edges, `fraction` of each side wide."""
    for axis in (-2, -1):
        n = images.shape[axis]
        edge = max(1, round(fraction * n))
        distance = torch.arange(n, dtype=images.dtype, device=images.device)
        distance = torch.minimum(distance, distance.flip(0)) + 0.5
        window = torch.sin(0.5 * torch.pi * (distance / edge).clamp_max(1)) ** 2
        images = images * (window[:, None] if axis == -2 else window)
    return images


def estimated_damping(images: Stack, noise: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry) -> torch.Tensor:
    """Damping () [voxel^2]: the noise over the signal at the frequency where the specimen stands out most.

    A volume of power s in each layer shows depth / cos t times s in tilt t. So s is what the power of the images,
    averaged on rings, exceeds that of the noise by, over that factor. Structures of the strongest ring come back as a
    Wiener filter would have them, weaker ones less damped than that. At least a tenth of the noise counts as signal.
    """
    ny, nx = images.shape[1:]
    power = torch.zeros(ny, nx // 2 + 1, dtype=torch.float64)  # mean over the tilts
    for tilt in range(images.shape[0]):
        power += torch.fft.rfft2(images[tilt]).abs().square().double() / (ny * nx * images.shape[0])
    ring = (squared_frequencies((ny, nx), half=True, dtype=torch.float64).sqrt() * min(ny, nx)).round().long()
    sums = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add(0, ring.flatten(), power.flatten())
    rings = (sums / torch.bincount(ring.flatten()))[2 : min(ny, nx) // 2]  # without the mean and the edges' own ring
    background = noise.double().mean()
    seen = (geometry.depth / torch.cos(torch.deg2rad(angles.double()))).mean()
    signal = (rings - background).max() if len(rings) else torch.zeros_like(background)
    return background * seen / signal.clamp_min(0.1 * background)


def back_projected(series: TiltSeries, thickness: float, bin: int) -> Volume:
    """Weighted back-projection (z, y, x) [V] of a tilt series, for datasets; `thickness` [Å] as in `reconstruct`."""
    return reconstruct(series, "wbp", thickness=thickness, bin=bin).volume
