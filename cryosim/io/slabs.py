"""Volumes too large for memory, written block by block in any order, by one process or by several: MRC and OME-Zarr.

`create` makes a file or folder of the full size, `write` puts a block of layers and rows in its place, `sync` brings a
slab of rows to the disk, and `finish` writes what depends on all of it. Who calls them keeps count of what is written.
Values are float32 or float16.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import mrcfile
import numpy as np
import torch
from mrcfile.dtypes import HEADER_DTYPE

from cryosim.io.files import sync
from cryosim.io.mrc import LABEL
from cryosim.io.store import finish_levels, new_level, write_chunks

Precision = Literal["float32", "float16"]

_MODES = {"float32": 2, "float16": 12}


class Statistics(NamedTuple):
    """Of some values: how many, the smallest, the largest, their sum and that of their squares."""

    number: int
    smallest: float
    largest: float
    total: float
    squares: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Statistics:
        """Those of a block (layer, row, x)."""
        sections = [section.float().flatten() for section in values]  # few enough values for sums in float32
        total, squares = sum(float(s.sum()) for s in sections), sum(float(s @ s) for s in sections)
        smallest, largest = (float(bound) for bound in values.aminmax())
        return cls(values.numel(), smallest, largest, total, squares)

    @classmethod
    def joined(cls, parts: Iterable[Statistics]) -> Statistics:
        """Those of all parts together."""
        numbers, smallest, largest, totals, squares = zip(*parts, strict=True)
        return cls(sum(numbers), min(smallest), max(largest), math.fsum(totals), math.fsum(squares))


class MrcSlabs(NamedTuple):
    """An MRC file (z, y, x) in the making.

    Attributes
    ----------
    path : Path
    shape : (int, int, int)
        (z, y, x).
    voxel_size : float
        [Å].
    precision : {"float32", "float16"}
    """

    path: Path
    shape: tuple[int, int, int]
    voxel_size: float
    precision: Precision

    rows = 64  # of a slab: 1 MB of each layer of a row 4096 wide
    layers = 64

    @property
    def size(self) -> int:
        """Of the whole file [byte]."""
        return HEADER_DTYPE.itemsize + math.prod(self.shape) * np.dtype(self.precision).itemsize

    def create(self) -> None:
        """Header and full size; what is not written yet takes no room on most disks."""
        with mrcfile.new_mmap(self.path, self.shape, _MODES[self.precision], overwrite=True) as mrc:
            mrc.voxel_size = self.voxel_size
            assert mrc.header is not None
            mrc.header.label[:] = b""  # mrcfile's own label tells the time
            mrc.header.label[0] = LABEL.encode()
            mrc.header.nlabl = 1

    def write(self, rows: slice, layers: slice, values: np.ndarray) -> None:
        """Put `values` (layer, row, x), of the type of the file, in their place."""
        _, ny, nx = self.shape
        handle = os.open(self.path, os.O_WRONLY)
        try:
            for layer, section in zip(range(layers.start, layers.stop), values, strict=True):
                at = HEADER_DTYPE.itemsize + (layer * ny + rows.start) * nx * values.itemsize
                left = np.ascontiguousarray(section).data.cast("B")
                while left:  # a call may write less than all
                    n = os.pwrite(handle, left, at)
                    left, at = left[n:], at + n
        finally:
            os.close(handle)

    def sync(self, rows: slice) -> None:
        """Bring what is written to the disk."""
        sync(self.path)

    def finish(self, statistics: Statistics) -> None:
        """The header's statistics."""
        mean = statistics.total / statistics.number
        with mrcfile.mmap(self.path, mode="r+") as mrc:
            assert mrc.header is not None
            mrc.header.dmin, mrc.header.dmax, mrc.header.dmean = statistics.smallest, statistics.largest, mean
            mrc.header.rms = math.sqrt(max(0.0, statistics.squares / statistics.number - mean**2))
        sync(self.path)


class ZarrSlabs(NamedTuple):
    """An OME-Zarr folder (z, y, x) in the making; the attributes are those of `MrcSlabs`, and `name`, of the image."""

    path: Path
    shape: tuple[int, int, int]
    voxel_size: float
    precision: Precision
    name: str = "tomogram"

    rows = 128  # whole chunks, as several processes must not share one
    layers = 128

    @property
    def size(self) -> int:
        """Of all levels [byte], at most: compression takes off what it can."""
        return math.prod(self.shape) * np.dtype(self.precision).itemsize * 8 // 7

    def create(self) -> None:
        """The array of level 0 without chunks."""
        self.path.mkdir()
        new_level(self.path / "0", self.shape, self.precision)

    def write(self, rows: slice, layers: slice, values: np.ndarray) -> None:
        """Put `values` (layer, row, x), of the type of the folder, in their place."""
        import zarr

        write_chunks(zarr.open_array(self.path / "0", mode="r+", zarr_format=2), (layers, rows), values)

    def sync(self, rows: slice) -> None:
        """Bring the slab `rows` to the disk."""
        for folder in (self.path / "0").glob(f"*/{rows.start // self.rows}"):
            for chunk in folder.iterdir():
                sync(chunk)
            sync(folder)

    def finish(self, statistics: Statistics) -> None:
        """The coarser levels and the metadata."""
        finish_levels(self.path, self.name, self.voxel_size)
