"""EER files: electrons, each with its camera frame and its quarter of a pixel, as Falcon cameras write them.

A file is a little-endian BigTIFF with one directory a camera frame. Row 0 of a frame is row 0 of all that is read,
as in an MRC file. Written is the common kind (compression 65001: 7 bits of run, 2 + 2 of place); read is also the one
that names its widths (65002). The 8-bit kind (65000) is refused: readers disagree on what follows its longest run.

The specimen's pixel size and dose stand in items of our own, ``cryosim.pixelSize`` [Å] and ``cryosim.dose`` [e-/Å^2],
since a camera knows of neither. Its ``totalDose`` is the number of recorded events per physical pixel.

Source: "EER file format", Thermo Fisher Scientific, version 3.0 (2023); Guo et al. 2020, DOI 10.1107/S205225252000929X.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cryosim.io import eer_container as container
from cryosim.io.eer_codec import Bits
from cryosim.io.eer_container import Layout, decoded_frames, read_layout, xml_text
from cryosim.io.files import FormatError, atomic_write
from cryosim.microscope.events import Events

_BITS = Bits()
_USUAL_SIDE = 4096  # [px]
_MOST_FRAMES = torch.iinfo(torch.int16).max  # of one image: each adds at most one event to a pixel
_PIXEL_SIZE, _DOSE = "cryosim.pixelSize", "cryosim.dose"


@dataclass(frozen=True)
class EerInfo:
    """What an EER file says of itself; None where it does not.

    Attributes
    ----------
    n_frames : int
        Camera frames; a leading integrated image is none.
    shape : (int, int)
        (ny, nx), physical pixels of the sensor.
    compression : int
        65001 or 65002.
    bits : (int, int, int)
        Widths of run, place along x, and along y [bit].
    pixel_size : float or None
        Of a physical pixel, at the specimen [Å].
    dose : float or None
        On the specimen, in all frames [e-/Å^2].
    exposure_time : float or None
        [s].
    events_per_pixel : float or None
        Recorded in all frames [e-/px].
    metadata : dict
        Name and text of each item of the acquisition.
    """

    n_frames: int
    shape: tuple[int, int]
    compression: int
    bits: tuple[int, int, int]
    pixel_size: float | None
    dose: float | None
    exposure_time: float | None
    events_per_pixel: float | None
    metadata: dict[str, str]


def write_eer(
    path: str | Path,
    events: Events | Iterable[Events],
    *,
    pixel_size: float | None = None,
    dose: float | None = None,
    exposure_time: float | None = None,
    frame_rate: float = 240.0,
    sensor_pixel_size: float = 14e-6,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write electrons as an EER file; the same electrons give the same bytes.

    A frame holds at most one event a physical pixel, and an event's place to a quarter of a pixel. Of several in one
    pixel one is kept: a coincidence loss of the format.

    Parameters
    ----------
    path : str or path
    events : Events or iterable of Events
        Each of an iterable holds the next one or more frames of one camera, and one at a time is in memory.
    pixel_size : float, optional
        Of a physical pixel, at the specimen [Å].
    dose : float, optional
        On the specimen, in all frames [e-/Å^2].
    exposure_time : float, optional
        [s]; the number of frames over `frame_rate` when left out.
    frame_rate : float
        [1/s]; 240 is that of a Falcon 4.
    sensor_pixel_size : float
        Of the camera itself [m]; 14e-6 is that of a Falcon 4.
    metadata : mapping, optional
        Further items of the acquisition, name and value.

    Raises
    ------
    TypeError
        When `events` are none.
    ValueError
        When there are no frames, the frames differ in shape, or a number is out of range. The file is then left as it
        was.

    Warns
    -----
    UserWarning
        When events fell on one pixel, with their number, and when the sensor is one that few programs read.
    """
    given = {"pixel_size": pixel_size, "dose": dose, "exposure_time": exposure_time}
    given |= {"frame_rate": frame_rate, "sensor_pixel_size": sensor_pixel_size}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{path}: {name}: expected a positive number, got {value}. Leave it out if it is unknown.")
    chunks = iter([events] if isinstance(events, Events) else events)
    first = next(chunks, None)
    if first is None:
        raise ValueError(f"{path}: events: expected at least one frame, got none. Give empty frames as empty Events.")
    ny, nx = _sensor(path, first, None)

    def acquisition(n_frames: int, n_events: int) -> bytes:
        time = float(exposure_time or n_frames / frame_rate)
        per_pixel = n_events / (ny * nx)
        entries = {
            "cameraName": ("cryosim", ""),
            "commercialName": ("cryosim (simulated)", ""),
            "numberOfFrames": (n_frames, ""),
            "sensorImageHeight": (ny, "pixel"),
            "sensorImageWidth": (nx, "pixel"),
            "sensorPixelSize.height": (float(sensor_pixel_size), "m"),
            "sensorPixelSize.width": (float(sensor_pixel_size), "m"),
            "exposureTime": (time, "s"),
            "meanDoseRate": (per_pixel / time, "e/pixel/s"),
            "totalDose": (per_pixel, "e/pixel"),
            _PIXEL_SIZE: (pixel_size and float(pixel_size), "angstrom"),
            _DOSE: (dose and float(dose), "e/angstrom^2"),
        }
        if both := sorted(entries.keys() & (metadata or {}).keys()):
            raise ValueError(f"{path}: metadata: expected names of its own, got {', '.join(both)}. Use other names.")
        entries |= {name: (value, "") for name, value in (metadata or {}).items()}
        return xml_text({name: entry for name, entry in entries.items() if entry[0] is not None})

    acquisition(1, 0)  # what it cannot hold is refused before the work
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        writer = container.Writer(file, ny, nx)
        for chunk in itertools.chain([first], chunks):
            _sensor(path, chunk, (ny, nx))
            for keys in _frame_keys(chunk):
                writer.add(keys)
        writer.finish(acquisition(writer.n_frames, writer.n_events))
    if writer.n_merged:
        warnings.warn(
            f"{path}: {writer.n_merged} of {writer.n_events + writer.n_merged} events fell on a pixel that had one in "
            "the same frame, and an EER frame holds one a pixel: they are left out.",
            stacklevel=2,
        )
    if (ny, nx) != (_USUAL_SIDE, _USUAL_SIDE):
        warnings.warn(  # without the file's name: said once for all of a series
            f"write_eer: RELION, MotionCor and Warp read EER files of {_USUAL_SIDE} x {_USUAL_SIDE} pixels only, and "
            f"these have {ny} x {nx}.",
            stacklevel=2,
        )


def eer_info(path: str | Path) -> EerInfo:
    """What the file says of itself, all of its directories checked, without decoding a frame.

    Raises
    ------
    FormatError
        When the file is no EER file or not whole.
    """
    layout = read_layout(path)
    return EerInfo(
        len(layout.strips),
        layout.shape,
        layout.compression,
        (layout.bits.run, layout.bits.x, layout.bits.y),
        _number(layout, _PIXEL_SIZE),
        _number(layout, _DOSE),
        _number(layout, "exposureTime"),
        _number(layout, "totalDose", zero=True),
        layout.metadata,
    )


def read_eer(path: str | Path, frames: tuple[int, int] | None = None) -> Events:
    """Electrons of an EER file, in memory at once; `iterate_eer` has one frame at a time.

    Parameters
    ----------
    path : str or path
    frames : (int, int), optional
        From the first to before the second camera frame; all when left out.

    Returns
    -------
    Events
        y, x (event,) float32 [px] at the centre of the part of a pixel where the camera found them; frame (event,)
        counted from the first that was asked for. Row by row within a frame.

    Raises
    ------
    FormatError
        When the file is no EER file or not whole.
    ValueError
        When the file does not have these frames.
    """
    layout = read_layout(path)
    start, stop = (0, len(layout.strips)) if frames is None else _range(layout, frames)
    numbers, ys, xs = [], [], []
    for i, decoded in enumerate(decoded_frames(layout, start, stop)):
        y, x = _places(layout, *decoded)
        numbers.append(torch.full((len(y),), i))
        ys.append(y)
        xs.append(x)
    return Events(torch.cat(numbers), torch.cat(ys), torch.cat(xs), (stop - start, *layout.shape))


def iterate_eer(path: str | Path) -> Iterator[Events]:
    """Electrons of one camera frame after the other, as from `read_eer`; the memory is that of one frame.

    The file's directories are checked at once, and the bits of a frame when its turn comes.
    """
    layout = read_layout(path)

    def frames() -> Iterator[Events]:
        for decoded in decoded_frames(layout, 0, len(layout.strips)):
            y, x = _places(layout, *decoded)
            yield Events(torch.zeros(len(y), dtype=torch.long), y, x, (1, *layout.shape))

    return frames()


def render_eer(
    path: str | Path,
    supersampling: int = 1,
    frames: int | Sequence[tuple[int, int]] | None = None,
    dose_per_frame: float | None = None,
) -> torch.Tensor:
    """Images of counts: groups of camera frames added up.

    An event counts in the one pixel that it lies in, without interpolation. The memory is that of the images and one
    frame.

    Parameters
    ----------
    path : str or path
    supersampling : {1, 2, 4}
        Pixels of the images along a physical pixel's side.
    frames : int or sequence of (int, int), optional
        Camera frames an image, where those left over at the end are dropped, as RELION does; or the first and one past
        the last camera frame of each image. All frames in one image when left out.
    dose_per_frame : float, optional
        In place of `frames`, the dose of an image [e-/Å^2]: as many camera frames as come nearest to it.

    Returns
    -------
    tensor (group, supersampling * ny, supersampling * nx) int16
        [e-/px].

    Raises
    ------
    FormatError
        When the file is no EER file or not whole, or a dose is asked for and the file has none.
    ValueError
        When the file does not have these frames or such small parts of a pixel.
    """
    layout = read_layout(path)
    level = {1: 0, 2: 1, 4: 2}.get(supersampling)
    if level is None:
        raise ValueError(f"{path}: supersampling: expected 1, 2 or 4, got {supersampling}.")
    if level > min(layout.bits.x, layout.bits.y):
        parts = f"{2**layout.bits.x} x {2**layout.bits.y}"
        raise ValueError(f"{path}: supersampling: expected no more than the file's {parts}, got {supersampling}.")
    if dose_per_frame is not None:
        if frames is not None:
            raise ValueError(f"{path}: frames: expected frames or dose_per_frame, got both. Leave one out.")
        frames = _frames_of_dose(layout, dose_per_frame)
    groups = _groups(layout, frames)
    ny, nx = (supersampling * n for n in layout.shape)
    images = torch.zeros((len(groups), ny, nx), dtype=torch.int16)
    for image, (start, stop) in zip(images, groups, strict=True):
        counts = image.view(-1).numpy()
        for pixel, sub_y, sub_x in decoded_frames(layout, start, stop):
            if level:
                y, x = np.divmod(pixel, layout.shape[1])
                y = (y << level) + (sub_y >> (layout.bits.y - level))
                pixel = y * nx + (x << level) + (sub_x >> (layout.bits.x - level))
            counts[pixel] += 1  # none comes twice in a frame
    return images


def _sensor(path: str | Path, events: object, shape: tuple[int, int] | None) -> tuple[int, int]:
    """(ny, nx) of `events`, which has to be `shape` unless that is None."""
    if not isinstance(events, Events):
        raise TypeError(f"{path}: events: expected Events or an iterable of them, got {type(events).__name__}.")
    ny, nx = events.shape[1:]
    if max(ny, nx) > container.LARGEST_SIDE:
        raise ValueError(
            f"{path}: events.shape: expected at most {container.LARGEST_SIDE} pixels a side, got {ny, nx}."
        )
    if shape is not None and (ny, nx) != shape:
        raise ValueError(f"{path}: events.shape: expected {shape} pixels as before, got {ny, nx}. Write two files.")
    return ny, nx


def _frame_keys(events: Events) -> Iterator[np.ndarray]:
    """Keys, as `one_per_pixel` takes them, of one frame after the other."""
    n_frames, ny, nx = events.shape
    frame, y, x = (v.detach().cpu() for v in (events.frame, events.y, events.x))
    if n_frames > 1 and bool((frame[1:] < frame[:-1]).any()):
        frame, order = torch.sort(frame, stable=True)
        y, x = y[order], x[order]
    bounds = torch.searchsorted(frame.contiguous(), torch.arange(n_frames + 1, dtype=frame.dtype)).tolist()
    kind = torch.int32 if ny * nx << _BITS.sub < 2**31 else torch.int64
    for start, stop in itertools.pairwise(bounds):
        sub_y, sub_x = (_parts(v[start:stop]).to(kind).numpy() for v in (y, x))
        pixel = (sub_y >> _BITS.y) * nx + (sub_x >> _BITS.x)
        yield pixel << _BITS.sub | (sub_y & 3) << _BITS.x | (sub_x & 3)


def _parts(places: torch.Tensor) -> torch.Tensor:
    """Places [px] in quarters of a pixel."""
    return 4 * places if places.dtype in (torch.float32, torch.float64) else 4 * places.double()


def _places(layout: Layout, pixel: np.ndarray, sub_y: np.ndarray, sub_x: np.ndarray) -> tuple[torch.Tensor, ...]:
    """(y, x) float32 [px] at the middle of the parts of a pixel; exact, as all of it fits 24 bits."""
    y, x = np.divmod(pixel, layout.shape[1])
    places = []
    for i, sub, bits in ((y, sub_y, layout.bits.y), (x, sub_x, layout.bits.x)):
        within = (sub.astype(np.float32) + np.float32(0.5)) * np.float32(0.5**bits)
        places.append(torch.from_numpy(i.astype(np.float32) + within))
    return tuple(places)


def _number(layout: Layout, name: str, *, zero: bool = False) -> float | None:
    """Value of an item, None where there is none."""
    if name not in layout.metadata:
        return None
    try:
        value = float(layout.metadata[name])
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf or (zero and value == 0)):
        got = repr(layout.metadata[name][:40])
        raise FormatError(layout.path, f"item {name}", "a positive number", got, "The metadata are damaged.")
    return value


def _groups(layout: Layout, frames: int | Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    n = len(layout.strips)
    if frames is None:
        frames = n
    if isinstance(frames, int | np.integer):
        if not 1 <= frames <= n:
            raise ValueError(f"{layout.path}: frames: expected 1 to {n} camera frames an image, got {frames}.")
        frames = [(start, start + frames) for start in range(0, n - frames + 1, frames)]
    try:
        ranges = list(frames)
    except TypeError:
        ranges = []
    if not ranges:
        raise ValueError(f"{layout.path}: frames: expected a whole number or ranges (start, stop), got {frames!r}.")
    groups = [_range(layout, each) for each in ranges]
    if (longest := max(stop - start for start, stop in groups)) > _MOST_FRAMES:
        raise ValueError(
            f"{layout.path}: frames: expected at most {_MOST_FRAMES} in an image, got {longest}. Add up parts of them."
        )
    return groups


def _range(layout: Layout, frames: tuple[int, int]) -> tuple[int, int]:
    """The first and one past the last camera frame, if the file has them."""
    n = len(layout.strips)
    try:
        start, stop = (operator.index(i) for i in frames)
    except (TypeError, ValueError):
        start, stop = 0, 0
    if not 0 <= start < stop <= n:
        raise ValueError(f"{layout.path}: frames: expected whole (start, stop) within 0 to {n}, got {frames!r}.")
    return start, stop


def _frames_of_dose(layout: Layout, dose: float) -> int:
    total = _number(layout, _DOSE)
    if total is None:
        raise FormatError(
            layout.path, f"item {_DOSE}", "the dose on the specimen", "none", "Give frames in place of dose_per_frame."
        )
    n = len(layout.strips)
    if not 0.5 * total / n <= dose <= total * (1 + 0.5 / n):
        raise ValueError(
            f"{layout.path}: dose_per_frame: expected {total / n:.4g} (a camera frame's) to {total:.4g} (all of them) "
            f"e-/Å^2, got {dose}."
        )
    return max(1, round(dose * n / total))
