"""MRC files: volumes (z, y, x) and stacks of images (tilt, y, x), which differ in the header alone.

Nothing is allocated before the header's sizes are compared with the file's, the same data give the same bytes, and a
number that the file's type cannot hold is refused rather than wrapped. The header's origin and start fields are
written as 0 and not read: the origin is sample n // 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import mrcfile
import numpy as np
import torch
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.mrcinterpreter import MrcInterpreter
from mrcfile.utils import byte_order_from_machine_stamp

from cryosim.core.volume import Volume
from cryosim.io.files import (
    FormatError,
    atomic_write,
    existing_file,
    is_compressed,
    open_bytes,
    read_capped,
    read_exactly,
)

LARGEST_COMPRESSED = 2**34  # [byte] a compressed file may unfold to, whatever its header says

_TYPES = {0: "int8", 1: "int16", 2: "float32", 6: "uint16", 12: "float16"}  # MRC2014 modes
_WRITABLE = ("int16", "uint16", "float16", "float32")
LABEL = "cryosim"
_IMOD_STAMP, _IMOD_SIGNED_BYTES = 1146047817, 1


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, int, int]  # (section, row, column)
    type: str
    spacing: tuple[float, float, float]  # (x, y, z) [Å]
    size: int  # [byte] of the whole file


def read_volume(path: str | Path, *, pixel_size: float | None = None) -> Volume:
    """Volume of an MRC file (.mrc, .map, .rec, ...), plain, .gz or .bz2.

    Parameters
    ----------
    path : str or path
    pixel_size : float, optional
        [Å] in place of the header's.

    Returns
    -------
    Volume
        values (z, y, x) float32, voxel_size [Å] to the seven digits a header holds.

    Raises
    ------
    FormatError
        When the file is missing, not MRC, shorter than its header says, of another type than 8- or 16-bit integers
        or 16- or 32-bit floats, with axes in another order, without a cubic voxel, or holds NaN or infinity.
    """
    values, header = _read(path)
    return Volume(values, _pixel_size(Path(path), header.spacing, pixel_size))


def read_stack(path: str | Path, *, pixel_size: float | None = None) -> tuple[torch.Tensor, float]:
    """Images (tilt, y, x) float32 and their pixel size [Å], in the order of the file's sections.

    Parameters and errors as in `read_volume`, except that only x and y need to have one spacing.
    """
    values, header = _read(path)
    return values, _pixel_size(Path(path), header.spacing[:2], pixel_size)


def stack_shape(path: str | Path) -> tuple[int, int, int]:
    """(section, y, x) that the header of an MRC file tells; the images are not read. Errors as in `read_volume`."""
    path = existing_file(path)
    with open_bytes(path) as stream:
        return _header(path, read_exactly(stream, HEADER_DTYPE.itemsize, path)).shape


def write_volume(path: str | Path, volume: Volume, *, dtype: str = "float32") -> None:
    """Write a volume (z, y, x) as MRC2014.

    Parameters
    ----------
    path : str or path
    volume : Volume
    dtype : {"int16", "uint16", "float16", "float32"}

    Raises
    ------
    ValueError
        When the values are not finite or `dtype` cannot hold them. The file is then left as it was.
    """
    _write(path, volume.values, float(volume.voxel_size), dtype, stack=False)


def write_stack(path: str | Path, images: torch.Tensor, pixel_size: float, *, dtype: str | None = None) -> None:
    """Write images (tilt, y, x) as an MRC2014 image stack.

    Parameters
    ----------
    path : str or path
    images : tensor (tilt, y, x)
    pixel_size : float
        [Å].
    dtype : {"int16", "uint16", "float16", "float32"}, optional
        int16 when left out and the values are whole numbers that fit, as counts are; float32 otherwise.

    Raises
    ------
    ValueError
        When the values are not finite or `dtype` cannot hold them. The file is then left as it was.
    """
    _write(path, images, float(pixel_size), dtype or stack_dtype(images), stack=True)


def stack_dtype(images: torch.Tensor) -> str:
    """Type in which `write_stack` stores `images` when none is asked for."""
    return "int16" if images.numel() and holds("int16", images.detach()) else "float32"


def _write(path: str | Path, values: torch.Tensor, spacing: float, dtype: str, *, stack: bool) -> None:
    if dtype not in _WRITABLE:
        raise ValueError(f"{path}: dtype: expected one of {', '.join(_WRITABLE)}, got {dtype!r}.")
    if values.ndim != 3 or not values.numel() or values.is_complex():
        raise ValueError(f"{path}: expected real values with three axes, none empty, got {tuple(values.shape)}.")
    if not 0 < spacing < float("inf"):
        raise ValueError(f"{path}: pixel size: expected a positive number [Å], got {spacing}.")
    values = values.detach()
    if not holds(dtype, values):
        raise ValueError(
            f"{path}: expected finite values that {dtype} can hold, got {values.min():g} to {values.max():g} "
            f"({values.dtype}). Write float32, or scale and round first."
        )
    with atomic_write(path) as temporary, mrcfile.new(temporary) as mrc:
        mrc.set_data(values.cpu().contiguous().numpy().astype(dtype, copy=False))
        if stack:
            mrc.set_image_stack()
        mrc.voxel_size = spacing
        assert mrc.header is not None
        mrc.header.label[:] = b""  # mrcfile's own label tells the time
        mrc.header.label[0] = LABEL.encode()
        mrc.header.nlabl = 1


def holds(dtype: str, values: torch.Tensor) -> bool:
    """Whether `dtype` holds `values` without wrapping or overflow (a float may round them)."""
    low, high = (float(bound) for bound in torch.aminmax(values))  # a NaN comes out as NaN
    kind = getattr(torch, dtype)
    limits = torch.finfo(kind) if kind.is_floating_point else torch.iinfo(kind)
    if not (limits.min <= low and high <= limits.max):
        return False
    if kind.is_floating_point or not values.is_floating_point():
        return True
    sections = values if values.ndim == 3 else values[None]  # one at a time: copies are as large
    return all(bool((v == v.round()).all()) for v in sections)


def _read(path: str | Path) -> tuple[torch.Tensor, _Header]:
    path = existing_file(path)
    compressed = is_compressed(path)
    with open_bytes(path) as stream:
        start = read_exactly(stream, HEADER_DTYPE.itemsize, path)
        header = _header(path, start)
        if compressed and header.size > LARGEST_COMPRESSED:
            raise FormatError(
                path,
                "size",
                f"at most {LARGEST_COMPRESSED} bytes after decompression",
                f"{header.size}",
                "Decompress the file first if it is to be trusted.",
            )
        content = start + read_capped(stream, header.size - len(start), path) if compressed else b""
    actual = len(content) if compressed else path.stat().st_size
    if actual < header.size:
        raise FormatError(
            path,
            "size",
            f"{header.size} bytes for {header.shape} {header.type}",
            f"{actual}",
            "The file is cut off or its header is wrong: copy it again.",
        )
    try:
        if compressed:
            return _as_tensor(path, MrcInterpreter(BytesIO(content)).data, header), header
        with mrcfile.mmap(path, mode="r") as mrc:
            return _as_tensor(path, mrc.data, header), header
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(path, "content", "MRC2014", str(error)) from error


def _as_tensor(path: Path, data: np.ndarray | None, header: _Header) -> torch.Tensor:
    assert data is not None
    sections = data.reshape(header.shape)  # a single image comes with two axes
    values = torch.empty(header.shape, dtype=torch.float32)
    for i, section in enumerate(sections):  # one at a time: the file may be larger than what memory holds twice
        section = section.view(header.type) if header.type == "uint8" else section
        values[i] = torch.from_numpy(section.astype(np.float32))
        if not bool(torch.isfinite(values[i]).all()):
            raise FormatError(path, f"section {i}", "finite values", "NaN or infinity", "Mend the file first.")
    return values


def _header(path: Path, raw: bytes) -> _Header:
    if len(raw) < HEADER_DTYPE.itemsize:
        raise FormatError(path, "header", f"{HEADER_DTYPE.itemsize} bytes", f"{len(raw)}", "Copy the file again.")
    fields = np.frombuffer(raw, HEADER_DTYPE)[0]
    if bytes(fields["map"])[:3] != b"MAP":
        raise FormatError(path, "map (byte 208)", "'MAP '", repr(bytes(fields["map"])), "This is not an MRC file.")
    try:
        order = byte_order_from_machine_stamp(fields["machst"])
    except ValueError as error:
        raise FormatError(path, "machst (byte 212)", "a known machine stamp", str(error)) from error
    fields = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
    mode = int(fields["mode"])
    if mode not in _TYPES:
        known = ", ".join(f"{number} ({name})" for number, name in _TYPES.items())
        raise FormatError(path, "mode", f"one of {known}", f"{mode}", "Convert the file, e.g. with `newstack -mode 2`.")
    shape = tuple(int(fields[name]) for name in ("nz", "ny", "nx"))
    _check_geometry(path, fields, shape)
    counts = [int(fields[name]) for name in ("mx", "my", "mz")]
    cell = [float(fields["cella"][axis]) for axis in "xyz"]
    spacing = tuple(length / count if count > 0 else 0.0 for length, count in zip(cell, counts, strict=True))
    size = HEADER_DTYPE.itemsize + int(fields["nsymbt"]) + int(np.dtype(_TYPES[mode]).itemsize) * _product(shape)
    return _Header(shape, _byte_type(raw, order) if mode == 0 else _TYPES[mode], spacing, size)  # type: ignore[arg-type]


def _check_geometry(path: Path, fields: np.void, shape: tuple[int, ...]) -> None:
    if min(shape) < 1:
        raise FormatError(path, "nz, ny, nx", "positive sizes", f"{shape}", "The header is damaged.")
    if int(fields["nsymbt"]) < 0:
        raise FormatError(path, "nsymbt", "a size of 0 or more", f"{fields['nsymbt']}", "The header is damaged.")
    axes = tuple(int(fields[name]) for name in ("mapc", "mapr", "maps"))
    if axes not in ((1, 2, 3), (0, 0, 0)):  # zeros: left out
        raise FormatError(
            path, "mapc, mapr, maps", "1, 2, 3 (columns along x)", f"{axes}", "Transpose the file to the usual order."
        )
    if int(fields["ispg"]) >= 401:
        raise FormatError(path, "ispg", "one volume or image stack", f"{fields['ispg']}: many volumes", "Split it.")
    angles = tuple(float(angle) for angle in fields["cellb"])
    if any(abs(angle - 90) > 1e-3 for angle in angles) and any(angles):
        raise FormatError(path, "cellb", "angles of 90 degrees", f"{angles}", "Resample the map to a cubic grid.")


def _byte_type(raw: bytes, order: str) -> str:
    # IMOD before 4.2.23 wrote mode 0 as unsigned bytes, and says so by its stamp (byte 152) without flag 1 (byte 156).
    stamp, flags = np.frombuffer(raw, f"{order}i4", 2, 152)
    return "uint8" if stamp == _IMOD_STAMP and not flags & _IMOD_SIGNED_BYTES else "int8"


def _pixel_size(path: Path, spacing: tuple[float, ...], override: float | None) -> float:
    if override is not None:
        if not 0 < override < float("inf"):
            raise ValueError(f"{path}: pixel_size: expected a positive number [Å], got {override}.")
        return float(override)
    if not all(0 < length < float("inf") for length in spacing):
        raise FormatError(
            path, "cella / mx (voxel size)", "positive numbers [Å]", f"{spacing}", "Give the pixel size as pixel_size=."
        )
    if max(spacing) > (1 + 1e-3) * min(spacing):
        raise FormatError(
            path,
            "cella / mx (voxel size)",
            "the same along every axis",
            f"{spacing} Å",
            "Resample the file, or give pixel_size= if the header is wrong.",
        )
    return float(f"{spacing[0]:.7g}")  # what a float32 tells


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:  # in Python's integers, which do not wrap
        product *= n
    return product
