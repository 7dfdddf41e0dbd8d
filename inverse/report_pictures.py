"""Pictures and sliders of the report: files inside the page, with their sizes and alternative texts."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.core.volume import Volume
from cryosim.plot import binned, robust_window, signed_degrees, to_jpeg, visible

FILM_BUDGET = 1_000_000  # [byte] of the JPEG files of one slider
MOST_SLICES = 40  # heights that the slider through z stops at
SLAB = 20.0  # [Å] that the sections of the tomograms are averaged over

_FRAME_CHOICES = ((256, 80), (256, 65), (256, 50), (192, 60), (128, 60), (96, 50), (64, 50))  # width [px], quality


@dataclass(frozen=True)
class Picture:
    """An image of the page: its file as a data URI, width and height [px], alternative text."""

    source: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Track:
    """Frames, data URIs of one width and height [px], that a slider runs through."""

    title: str
    alt: str
    frames: list[str]
    width: int
    height: int


@dataclass(frozen=True)
class Film:
    """Tracks beside each other under one slider, which has a label for each frame and begins at `start`."""

    name: str
    label: str
    labels: list[str]
    tracks: list[Track]
    start: int


def png(content: bytes, alt: str) -> Picture:
    """Picture of the page from a PNG file."""
    width, height = struct.unpack(">II", content[16:24])
    return Picture(_data_uri("image/png", content), width, height, alt)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def in_slab(voxel_size: float) -> int:
    """Voxels of `voxel_size` [Å] in the slab that sections are averaged over."""
    return max(1, round(SLAB / voxel_size))


def tilt_film(series: TiltSeries, order: list[int], start: int) -> Film:
    """The images of a series in `order`, from the frame `start`."""
    tilts = series.tilts
    doses = tilts.accumulated_doses
    labels = [
        f"{signed_degrees(float(tilts.angles[i]))}, exposure {i + 1} of {len(order)}, after {float(doses[i]):.0f} e⁻/Å²"
        for i in order
    ]

    def draw(width: int) -> list[list[np.ndarray]]:
        return [[np.flipud(visible(series.images[i], width)) for i in order]]

    windows = [[robust_window(picture) for picture in draw(_FRAME_CHOICES[0][0])[0]]]
    (track,) = _tracks({"All tilts, sorted by angle": "One image of the tilt series"}, draw, windows)
    return Film("tilt-film", "Tilt", labels, [track], start)


def slice_film(volumes: Mapping[str, Volume]) -> Film:
    """Planes normal to the beam of volumes beside each other, at the same heights."""
    heights, thickness = _heights(volumes.values())
    stacks = [[_plane(volume, z, thickness) for z in heights] for volume in volumes.values()]

    def draw(width: int) -> list[list[np.ndarray]]:
        return [[np.flipud(binned(plane, width)) for plane in stack] for stack in stacks]

    windows = [[robust_window(torch.stack(stack).numpy())] * len(heights) for stack in stacks]
    tracks = _tracks({name: f"{name}, a plane normal to the beam" for name in volumes}, draw, windows)
    labels = [f"z = {z / 10:.1f} nm".replace("-", "−") for z in heights]
    return Film("slice-film", "Height along the beam", labels, tracks, int(np.argmin(np.abs(heights))))


def _tracks(
    titles: Mapping[str, str],
    draw: Callable[[int], list[list[np.ndarray]]],
    windows: list[list[tuple[float, float]]],
) -> list[Track]:
    """Tracks by title and alternative text, as wide and as fine as `FILM_BUDGET` allows.

    `draw` makes the pictures (row, column) of each track for a width [px]; `windows` are their ranges of grey.
    """
    tracks: list[Track] = []
    for width, quality in _FRAME_CHOICES:
        tracks, size = [], 0
        for (title, alt), pictures, ranges in zip(titles.items(), draw(width), windows, strict=True):
            frames = [to_jpeg(picture, window, quality) for picture, window in zip(pictures, ranges, strict=True)]
            height, columns = pictures[0].shape
            tracks.append(Track(title, alt, [_data_uri("image/jpeg", frame) for frame in frames], columns, height))
            size += sum(len(frame) for frame in frames)
        if size <= FILM_BUDGET:
            break
    return tracks


def _heights(volumes: Iterable[Volume]) -> tuple[list[float], float]:
    """Heights [Å] that all volumes reach, in steps of whole coarsest voxels through 0, and the step [Å]."""
    volumes = list(volumes)
    voxel = max(float(volume.voxel_size) for volume in volumes)
    low = max(-(v.values.shape[0] // 2) * float(v.voxel_size) for v in volumes)
    high = min((v.values.shape[0] - 1 - v.values.shape[0] // 2) * float(v.voxel_size) for v in volumes)
    step = voxel * math.ceil(((high - low) / voxel + 1) / MOST_SLICES)
    return [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)], step


def _plane(volume: Volume, z: float, thickness: float) -> torch.Tensor:
    """Plane (y, x) at height z [Å], averaged over `thickness` [Å]."""
    values, voxel = volume.values.detach(), float(volume.voxel_size)
    n, count = values.shape[0], max(1, round(thickness / voxel))
    first = values.shape[0] // 2 + round(z / voxel) - count // 2
    return values[max(first, 0) : min(first + count, n)].float().mean(0).cpu()
