"""Movies (frame, y, x) as MRC or TIFF files, and the gain references that go with EER files.

An MRC file has the bottom row first, and a TIFF file the top one. So the rows of a TIFF file are ours in reverse order,
as RELION and IMOD expect: they and `read_movie` see the same movie in both.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import tifffile
import torch
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.utils import mode_from_dtype

from cryosim.io.files import FormatError, atomic_write, existing_file
from cryosim.io.mrc import holds, read_stack, write_stack

LARGEST_TIFF = 2**34  # [byte] that a compressed file may unfold to

_MRC, _TIFF = (".mrc", ".mrcs"), (".tif", ".tiff")
_TYPES = {".mrc": ("int16", "uint16", "float16", "float32"), ".tif": ("uint8", "uint16", "float32")}
_READABLE = ("uint8", "int8", "uint16", "int16", "float16", "float32")
_LARGEST_CLASSIC = 2**32 - 2**25  # [byte] of TIFF files with offsets of 32 bits
_PER_CENTIMETRE = 10**8  # [Å]
_DAMAGED = "The file is damaged or cut off: copy it again."


def write_movie(
    path: str | Path, frames: torch.Tensor | Iterable[torch.Tensor], pixel_size: float, *, dtype: str | None = None
) -> None:
    """Write a movie as .mrc, .mrcs, .tif or .tiff; the same frames give the same bytes.

    Parameters
    ----------
    path : str or path
    frames : tensor (frame, y, x) or iterable of tensors (y, x)
        Of an iterable one frame at a time is in memory.
    pixel_size : float
        [Å].
    dtype : str, optional
        MRC: int16, uint16, float16 or float32; TIFF: uint8, uint16 or float32. When left out, the narrowest of them for
        whole numbers and float32 else, where the frames of an iterable count as whole if the first one's type is an
        integer, and take 16 bits.

    Raises
    ------
    ValueError
        When the suffix is another, there are no frames, their shapes differ, or a value is not finite or `dtype` cannot
        hold it. The file is then left as it was.
    """
    path = Path(path)
    kind = _kind(path)
    pixel_size = float(pixel_size)
    if not 0.1 <= pixel_size <= 1e6:
        raise ValueError(f"{path}: pixel_size: expected 0.1 to 1e6 Å, got {pixel_size}. Is it in Å?")
    first, rest, known = _started(path, frames)
    allowed = _TYPES[kind]
    dtype = dtype or _narrowest(frames if isinstance(frames, torch.Tensor) else first, allowed, streamed=known is None)
    if dtype not in allowed:
        raise ValueError(f"{path}: dtype: expected one of {', '.join(allowed)}, got {dtype!r}.")
    shape = tuple(first.shape)
    arrays = (_array(path, i, frame, shape, dtype) for i, frame in enumerate(chain([first], rest)))
    with atomic_write(path) as temporary:
        if kind == ".mrc":
            with temporary.open("w+b") as file:
                _stream_mrc(file, arrays, shape, dtype, pixel_size)
        else:
            size = math.inf if known is None else known * math.prod(shape) * np.dtype(dtype).itemsize
            with tifffile.TiffWriter(temporary, bigtiff=size > _LARGEST_CLASSIC) as writer:
                for array in arrays:
                    _write_page(writer, array[::-1], pixel_size)


def read_movie(path: str | Path, *, pixel_size: float | None = None) -> tuple[torch.Tensor, float]:
    """Frames (frame, y, x) float32 and their pixel size [Å], of an MRC or TIFF file.

    Parameters
    ----------
    path : str or path
        .mrc, .mrcs, .tif or .tiff.
    pixel_size : float, optional
        [Å] in place of the file's.

    Raises
    ------
    FormatError
        When the file is missing, damaged, of another type, holds NaN or infinity, or does not tell its pixel size.
    """
    path = Path(path)
    if _kind(path) == ".mrc":
        return read_stack(path, pixel_size=pixel_size)
    path = existing_file(path)
    if pixel_size is not None and not 0 < pixel_size < math.inf:
        raise ValueError(f"{path}: pixel_size: expected a positive number [Å], got {pixel_size}.")
    n = _count_directories(path)
    try:
        with tifffile.TiffFile(path) as file:
            if len(file.pages) != n:
                raise FormatError(path, "directories", f"{n}", f"{len(file.pages)} that can be read", _DAMAGED)
            pages = [_checked_page(path, i, page) for i, page in enumerate(file.pages)]
            if len(kinds := {(page.shape, page.dtype) for page in pages}) > 1:
                raise FormatError(path, "pages", "one shape and type", f"{kinds}", "Write one file a movie.")
            if sum(page.nbytes for page in pages) > (most := _most_bytes(path, pages)):
                raise FormatError(path, "size", f"at most {most} bytes of images", "more", _DAMAGED)
            spacing = _tiff_pixel_size(path, pages[0]) if pixel_size is None else float(pixel_size)
            movie = torch.empty((n, *pages[0].shape), dtype=torch.float32)
            for i, page in enumerate(pages):
                movie[i] = torch.from_numpy(page.asarray()[::-1].astype(np.float32))
                if not bool(torch.isfinite(movie[i]).all()):
                    raise FormatError(path, f"frame {i}", "finite values", "NaN or infinity", "Mend the file first.")
    except FormatError:
        raise
    except Exception as error:  # tifffile has no error of its own for what its decoders meet
        raise FormatError(path, "content", "TIFF", f"{type(error).__name__}: {error}", _DAMAGED) from error
    return movie, spacing


def write_gain(path: str | Path, gain: torch.Tensor, *, movies: Literal["eer", "mrc", "tiff"] = "eer") -> None:
    """Write the gain reference of movies, as RELION and Warp take it.

    RELION divides EER files by an .mrc, and multiplies MRC and TIFF files with it. So the .mrc holds the relative
    sensitivity for the first, and for the others the factors, mean over sensitivity, or 0 where a pixel is defect.

    Parameters
    ----------
    path : str or path
        .mrc, or for EER files .gain: a TIFF file of the factors, its rows in the order of the EER file's, since RELION
        does not reverse them.
    gain : tensor (y, x)
        Relative sensitivity of each pixel: recorded over true counts; 0 marks a pixel that is defect.
    movies : {"eer", "mrc", "tiff"}
        What the movies are written as.

    Raises
    ------
    ValueError
        When the suffix or the kind of movies is another, or `gain` is not an image of finite numbers of at least 0, not
        all of them 0.
    """
    path = Path(path)
    if movies not in ("eer", "mrc", "tiff"):
        raise ValueError(f'{path}: movies: expected "eer", "mrc" or "tiff", got {movies!r}.')
    suffixes = (".mrc", ".gain") if movies == "eer" else (".mrc",)
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: suffix: expected {' or '.join(suffixes)} for {movies} movies, got {path.suffix!r}.")
    gain = gain.detach().cpu()
    if gain.ndim != 2 or not gain.numel() or not bool((torch.isfinite(gain) & (gain >= 0)).all()) or not gain.any():
        raise ValueError(f"{path}: gain: expected (y, x), finite and at least 0, not all 0, got {tuple(gain.shape)}.")
    good = gain > 0
    factors = torch.where(good, gain[good].double().mean() / gain, 0.0)
    if path.suffix == ".mrc":
        return write_stack(path, (gain if movies == "eer" else factors)[None], 1.0, dtype="float32")
    with atomic_write(path) as temporary, tifffile.TiffWriter(temporary) as writer:
        _write_page(writer, factors.numpy().astype(np.float32), 1.0)


def _kind(path: Path) -> str:
    for kind in (_MRC, _TIFF):
        if path.suffix.lower() in kind:
            return kind[0]
    raise ValueError(f"{path}: suffix: expected one of {', '.join(_MRC + _TIFF)}, got {path.suffix!r}.")


def _started(
    path: Path, frames: torch.Tensor | Iterable[torch.Tensor]
) -> tuple[torch.Tensor, Iterator[torch.Tensor], int | None]:
    """First frame, those after it, and how many there are, None if that is not known."""
    if isinstance(frames, torch.Tensor) and frames.ndim != 3:
        raise ValueError(f"{path}: frames: expected (frame, y, x), got {tuple(frames.shape)}.")
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"{path}: frames: expected at least one, got none.")
    if not isinstance(first, torch.Tensor) or first.ndim != 2 or not first.numel():
        got = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        raise ValueError(f"{path}: frames: expected tensors (y, x), none empty, got {got}.")
    return first, rest, len(frames) if isinstance(frames, torch.Tensor) else None


def _narrowest(frames: torch.Tensor, allowed: tuple[str, ...], *, streamed: bool) -> str:
    integers = [name for name in allowed if not name.startswith("float")]
    if streamed:
        return "float32" if frames.is_floating_point() else integers[-1 if "uint8" in integers else 0]
    return next((name for name in integers if all(holds(name, frame.detach()) for frame in frames)), "float32")


def _array(path: Path, i: int, frame: torch.Tensor, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if tuple(frame.shape) != shape or frame.is_complex():
        raise ValueError(f"{path}: frame {i}: expected real values {shape}, got {tuple(frame.shape)} {frame.dtype}.")
    if not holds(dtype, frame.detach()):
        low, high = torch.aminmax(frame.detach())
        raise ValueError(
            f"{path}: frame {i}: expected finite values that {dtype} can hold, got {low:g} to {high:g} "
            f"({frame.dtype}). Write float32, or scale and round first."
        )
    return frame.detach().cpu().contiguous().numpy().astype(dtype, copy=False)


def _stream_mrc(
    file: BinaryIO, arrays: Iterator[np.ndarray], shape: tuple[int, ...], dtype: str, spacing: float
) -> None:
    """Frames behind a header that is filled in at the end, byte for byte what `write_stack` writes."""
    file.write(bytes(HEADER_DTYPE.itemsize))
    n, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    for array in arrays:
        file.write(array.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tobytes())
        n += 1
        total += float(array.sum(dtype=np.float64))
        squares += float(np.square(array, dtype=np.float64).sum())
        low, high = min(low, float(array.min())), max(high, float(array.max()))
    count = n * math.prod(shape)
    header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
    header["nx"], header["ny"], header["nz"] = shape[1], shape[0], n
    header["mode"] = mode_from_dtype(np.dtype(dtype))
    header["mx"], header["my"], header["mz"] = shape[1], shape[0], 1
    header["cella"] = (shape[1] * spacing, shape[0] * spacing, spacing)
    header["cellb"] = (90, 90, 90)
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    header["dmin"], header["dmax"], header["dmean"] = low, high, total / count
    header["rms"] = math.sqrt(max(0.0, squares / count - (total / count) ** 2))
    header["nversion"], header["map"], header["machst"] = 20141, b"MAP ", (0x44, 0x44, 0, 0)
    header["nlabl"] = 1
    header["label"][0] = b"cryosim"
    file.seek(0)
    file.write(header.tobytes())


def _write_page(writer: tifffile.TiffWriter, array: np.ndarray, pixel_size: float) -> None:
    density = _PER_CENTIMETRE / Fraction(f"{pixel_size:.9g}")
    density = density.limit_denominator(int(2**31 / density))  # both parts fit 32 bits
    per_centimetre = (density.numerator, density.denominator)
    writer.write(
        array,
        photometric="minisblack",
        resolution=(per_centimetre, per_centimetre),
        resolutionunit="CENTIMETER",
        metadata=None,
        software=False,
        contiguous=False,
    )


def _count_directories(path: Path) -> int:
    """Directories of a TIFF file, whose chain has to come to its end within the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(16).ljust(16, b"\0")
        order = {b"II": "<", b"MM": ">"}.get(start[:2])
        if order is None or (version := struct.unpack_from(order + "H", start, 2)[0]) not in (42, 43):
            raise FormatError(path, "header", "TIFF (II or MM, 42 or 43)", repr(start[:4]), "This is not TIFF.")
        number, pointer, entry = ("Q", "Q", 20) if version == 43 else ("H", "I", 12)
        (offset,) = struct.unpack_from(order + pointer, start, 8 if version == 43 else 4)
        seen: set[int] = set()
        taken = 0
        while offset or not seen:
            file.seek(min(offset, size))
            content = file.read(struct.calcsize(order + number))
            if offset in seen or len(content) < struct.calcsize(order + number):
                raise FormatError(path, f"directory {len(seen)}", "a new one in the file", f"byte {offset}", _DAMAGED)
            seen.add(offset)
            (n,) = struct.unpack(order + number, content)
            taken += n * entry
            if taken > size:
                raise FormatError(path, f"directory {len(seen) - 1}", "one within the file", f"{n} entries", _DAMAGED)
            file.seek(n * entry, 1)
            content = file.read(struct.calcsize(order + pointer))
            if len(content) < struct.calcsize(order + pointer):
                raise FormatError(path, f"directory {len(seen) - 1}", "one within the file", "its start", _DAMAGED)
            (offset,) = struct.unpack(order + pointer, content)
    return len(seen)


def _checked_page(path: Path, i: int, page) -> tifffile.TiffPage:
    """Page `i`, if it is an image of numbers and its data lie in the file."""
    page = page.aspage()
    if len(page.shape) != 2 or page.dtype is None or page.dtype.name not in _READABLE or min(page.shape) < 1:
        got = f"{page.shape} {page.dtype}"
        raise FormatError(path, f"frame {i}", f"(y, x) of {', '.join(_READABLE)}", got, "Convert the file.")
    size = path.stat().st_size
    if any(offset + n > size for offset, n in zip(page.dataoffsets, page.databytecounts, strict=True)):
        raise FormatError(path, f"frame {i}", f"data within the {size} bytes of the file", "data beyond", _DAMAGED)
    if page.compression == 1 and sum(page.databytecounts) != page.nbytes:
        raise FormatError(path, f"frame {i}", f"{page.nbytes} bytes", f"{sum(page.databytecounts)}", _DAMAGED)
    return page


def _most_bytes(path: Path, pages: list[tifffile.TiffPage]) -> int:
    """Largest size [byte] of all images together: the file's, unless they are compressed."""
    return path.stat().st_size if all(page.compression == 1 for page in pages) else LARGEST_TIFF


def _tiff_pixel_size(path: Path, page: tifffile.TiffPage) -> float:
    unit = page.tags.valueof("ResolutionUnit", 2)
    length = {2: 2.54 * _PER_CENTIMETRE, 3: _PER_CENTIMETRE}.get(int(unit))
    spacings = []
    for name in ("XResolution", "YResolution"):
        numerator, denominator = page.tags.valueof(name, (0, 1))
        if length is None or not numerator or not denominator:
            raise FormatError(path, name, "pixels an inch or centimetre", "none", "Give the pixel size as pixel_size=.")
        spacings.append(length * denominator / numerator)
    if max(spacings) > (1 + 1e-3) * min(spacings):
        raise FormatError(path, "resolution", "the same along x and y", f"{spacings} Å", "Give pixel_size=.")
    if min(spacings) > 1e6:  # 0.1 mm: the resolution of a screen or of paper, not of a specimen
        raise FormatError(path, "resolution", "that of a specimen", f"{spacings[0]:g} Å", "Give pixel_size=.")
    return float(f"{spacings[0]:.7g}")
