"""Volumes as OME-Zarr 0.4 (Zarr v2, "/" between the indices of a chunk): a folder with levels of halved size.

Metadata: ngff.openmicroscopy.org/0.4. Axes z, y, x in ångström. Sample i of level 0 stands at i * voxel_size, so the
corner's sample at 0 and the specimen's origin, sample n // 2, at (n // 2) * voxel_size. A sample of level l stands for
2^l of level 0 along each axis, and in their middle: a translation by (2^l - 1) / 2 voxels. What is left over at the end
of an axis is not in the coarser levels.

Images are averaged from level to level, labels take the number that most of the eight voxels have, never a mean. Every
chunk is on the disk, the same data give the same bytes, and a chunk that is missing is an error here, where a reader of
Zarr takes it to be empty.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from cryosim.core.volume import Volume
from cryosim.io.files import FormatError, read_text, sync

if TYPE_CHECKING:
    import zarr

Kind = Literal["image", "labels"]

LARGEST = 2**37  # [byte] of one level
LARGEST_CHUNK = 2**31 - 1  # [byte], what Blosc can hold

_CHUNK = 128
_COARSEST = 64  # longest axis of the last level
_TYPES = {
    "image": ("float16", "float32"),
    "labels": ("uint8", "uint16", "uint32", "int8", "int16", "int32", "int64"),
}
_READABLE = (*_TYPES["image"], "float64", *_TYPES["labels"])
_ANGSTROM = {"angstrom": 1.0, "nanometer": 10.0}
_META = 2**22  # [byte]


def write_zarr(
    path: str | Path,
    volume: Volume,
    *,
    kind: Kind = "image",
    levels: int | None = None,
    chunks: tuple[int, int, int] = (_CHUNK, _CHUNK, _CHUNK),
    dtype: str | None = None,
) -> None:
    """Write a volume (z, y, x) as an OME-Zarr folder, in place of an older one.

    Parameters
    ----------
    path : str or path
        Of the folder, usually NAME.zarr.
    volume : Volume
        Whole numbers where they are labels.
    kind : {"image", "labels"}
    levels : int, optional
        Each half as large as the one before; as many as bring the longest axis down to 64 when left out, while every
        axis has two samples or more.
    chunks : (int, int, int)
        (z, y, x).
    dtype : str, optional
        float32 or float16 of an image, float32 when left out. Of labels one of 8 to 64 bits; the smallest unsigned one
        that holds them, or else int32 or int64, when left out.

    Raises
    ------
    ValueError
        When the values are not finite, not whole, or `dtype` cannot hold them. The folder is then left as it was.
    """
    path = Path(path)
    values, voxel = _checked(path, volume, kind)
    name = _dtype(path, values, kind, dtype)
    if len(chunks) != 3 or min(chunks) < 1:
        raise ValueError(f"{path}: chunks: expected three sizes of 1 or more, got {chunks}.")
    deepest = _depth(values.shape)
    depth = _levels(values.shape) if levels is None else levels
    if not 1 <= depth <= deepest + 1:
        raise ValueError(f"{path}: levels: expected 1 to {deepest + 1} for {values.shape}, got {levels}.")
    with atomic_folder(path) as folder:
        for level in range(depth):
            if level:
                values = _halved(values, kind)
            _write_level(folder / str(level), values.astype(name, copy=False), chunks)
        _dump(folder / ".zgroup", {"zarr_format": 2})
        _dump(folder / ".zattrs", _metadata(path.stem, voxel, depth, kind))


def read_zarr(path: str | Path, level: int = 0) -> Volume:
    """Volume of one level of an OME-Zarr 0.4 folder with axes z, y, x.

    Returns
    -------
    Volume
        values (z, y, x) float32 of an image; labels keep whole numbers (uint16 become int32, uint32 int64).
        voxel_size [Å] of that level, whose origin is no longer at a sample for levels above 0.

    Raises
    ------
    FormatError
        When the folder is missing or not OME-Zarr 0.4, the level is not there, a chunk is missing or damaged, the voxel
        is not cubic, or an image holds NaN or infinity.
    """
    path = Path(path)
    scale, name = _level(path, level)
    folder = path / name
    shape, chunks, dtype = _check_chunks(folder)
    import zarr  # takes a third of a second

    values = np.empty(shape, dtype=dtype)
    try:
        array = zarr.open_array(folder, mode="r", zarr_format=2)
        for z in range(0, shape[0], chunks[0]):
            values[z : z + chunks[0]] = array[z : z + chunks[0]]
    except Exception as error:  # zarr and its codecs let whatever they meet through
        raise FormatError(folder, "chunks", "data that can be read", f"{type(error).__name__} {error}") from error
    if dtype.kind == "f":
        values = values.astype(np.float32, copy=False)
        if not all(np.isfinite(section).all() for section in values):
            raise FormatError(folder, "values", "finite numbers", "NaN or infinity", "Write the folder again.")
    wider = {"uint16": np.int32, "uint32": np.int64}.get(dtype.name)
    return Volume(torch.from_numpy(values if wider is None else values.astype(wider)), scale)


def new_level(folder: Path, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...] = (_CHUNK,) * 3) -> zarr.Array:
    """An array (z, y, x) without values yet, level 0 of an OME-Zarr folder; see `write_chunks`, `finish_levels`."""
    import numcodecs.blosc
    import zarr

    return zarr.create_array(
        folder,
        shape=shape,
        chunks=tuple(min(c, n) for c, n in zip(chunks, shape, strict=True)),
        dtype=dtype,
        compressors=numcodecs.blosc.Blosc(cname="zstd", clevel=3, shuffle=numcodecs.blosc.Blosc.SHUFFLE),
        fill_value=0,
        zarr_format=2,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        config={"write_empty_chunks": True},
    )


def write_chunks(array: zarr.Array, where: tuple[slice, ...], values: np.ndarray) -> None:
    """array[where] = values, with the same bytes every time. Two processes may write where they share no chunk."""
    import numcodecs.blosc

    threads = numcodecs.blosc.set_nthreads(1)  # several finish their blocks in any order, and the bytes with them
    try:
        array[where] = values
    finally:
        numcodecs.blosc.set_nthreads(threads)


def finish_levels(folder: Path, name: str, voxel_size: float) -> None:
    """Coarser levels and metadata of an image called `name`, from its level 0 in `folder`, some chunks at a time."""
    import zarr

    for left in (folder / "0").rglob("*.partial"):  # of a chunk that was being written when a process was killed
        left.unlink()
    array = zarr.open_array(folder / "0", mode="r", zarr_format=2)
    depth = _levels(array.shape)
    for level in range(1, depth):
        shutil.rmtree(folder / str(level), ignore_errors=True)
        coarse = new_level(folder / str(level), tuple(n // 2 for n in array.shape), array.dtype.name)
        for z, y in product(*(range(0, n, _CHUNK) for n in coarse.shape[:2])):
            fine = array[2 * z : 2 * (z + _CHUNK), 2 * y : 2 * (y + _CHUNK)]
            write_chunks(coarse, (slice(z, z + _CHUNK), slice(y, y + _CHUNK)), _halved(np.asarray(fine), "image"))
        array = zarr.open_array(folder / str(level), mode="r", zarr_format=2)
    _dump(folder / ".zgroup", {"zarr_format": 2})
    _dump(folder / ".zattrs", _metadata(name, voxel_size, depth, "image"))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that in the end takes its place, with all its files on the disk.

    When the block raises, it is removed and whatever stood at `path` stays as it was. A new folder appears in one step;
    an older one is set aside first and removed last, so that at no time a mixture of the two is seen.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise FormatError(target, "folder", "a folder or nothing", "a file of that name", "Choose another name.")
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(temporary: Path, target: Path) -> None:
    """Put the folder `temporary` in the place of `target`, on the same disk, as `atomic_folder` does in the end."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
    for folder, _, files in os.walk(temporary):
        for entry in (*(os.path.join(folder, file) for file in files), folder):
            sync(entry)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    sync(target.parent)
    with suppress(FileNotFoundError):
        shutil.rmtree(old)


# ------------------------------------------------------------------------------------------------------------ writing


def _checked(path: Path, volume: Volume, kind: Kind) -> tuple[np.ndarray, float]:
    if kind not in _TYPES:
        raise ValueError(f"{path}: kind: expected image or labels, got {kind!r}.")
    values, voxel = volume.values.detach().cpu(), float(volume.voxel_size)
    if values.ndim != 3 or not values.numel() or values.is_complex():
        raise ValueError(f"{path}: expected real values (z, y, x), none empty, got {tuple(values.shape)}.")
    if not 0 < voxel < math.inf:
        raise ValueError(f"{path}: voxel_size: expected a positive number [Å], got {voxel}.")
    if kind == "labels" and (values.is_floating_point() or values.dtype == torch.bool):
        raise ValueError(f"{path}: expected whole numbers as labels, got {values.dtype}. Use .long().")
    return values.numpy() if kind == "labels" else values.to(torch.float32).numpy(), voxel


def _dtype(path: Path, values: np.ndarray, kind: Kind, dtype: str | None) -> str:
    low, high = values.min(), values.max()  # a NaN comes out as NaN
    if dtype is None and kind == "labels":
        names = ("uint8", "uint16", "uint32", "int32", "int64")
        dtype = next(n for n in names if np.iinfo(n).min <= low and high <= np.iinfo(n).max)
    dtype = dtype or "float32"
    if dtype not in _TYPES[kind]:
        raise ValueError(f"{path}: dtype: expected one of {', '.join(_TYPES[kind])} for {kind}, got {dtype!r}.")
    limits = np.finfo(dtype) if kind == "image" else np.iinfo(dtype)
    if not (limits.min <= low and high <= limits.max):
        raise ValueError(f"{path}: expected finite values that {dtype} can hold, got {low:g} to {high:g}.")
    return dtype


def _depth(shape: tuple[int, ...]) -> int:
    """How often the shortest axis can be halved and keep two samples, at least none."""
    return max(0, min(shape).bit_length() - 2)


def _levels(shape: tuple[int, ...]) -> int:
    """As many as bring the longest axis down to that of the coarsest, while every axis has two samples or more."""
    return min(_depth(shape), max(0, math.ceil(math.log2(max(shape) / _COARSEST)))) + 1


def _write_level(folder: Path, values: np.ndarray, chunks: tuple[int, int, int]) -> None:
    write_chunks(new_level(folder, values.shape, values.dtype.name, chunks), (slice(None),) * 3, values)


def _halved(values: np.ndarray, kind: Kind) -> np.ndarray:
    shape = tuple(n // 2 for n in values.shape)
    out = np.empty(shape, dtype=values.dtype)
    for z in range(shape[0]):  # a pair of sections at a time
        slab = values[2 * z : 2 * z + 2, : 2 * shape[1], : 2 * shape[2]].reshape(2, shape[1], 2, shape[2], 2)
        eight = slab.transpose(0, 2, 4, 1, 3).reshape(8, *shape[1:])
        out[z] = eight.mean(0, dtype=np.float64) if kind == "image" else _most(eight)
    return out


def _most(eight: np.ndarray) -> np.ndarray:
    """The most frequent of eight labels (8, y, x), the larger where two are as frequent: labels before the ground."""
    votes = np.stack([(eight == each).sum(0) for each in eight])
    return np.where(votes == votes.max(0), eight, np.iinfo(eight.dtype).min).max(0)


def _metadata(name: str, voxel: float, depth: int, kind: Kind) -> dict[str, Any]:
    axes = [{"name": axis, "type": "space", "unit": "angstrom"} for axis in "zyx"]
    datasets = []
    for level in range(depth):
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": [voxel * 2**level] * 3}]
        steps.append({"type": "translation", "translation": [voxel * (2**level - 1) / 2] * 3})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    way = {"image": "mean of 2 x 2 x 2", "labels": "most frequent of 2 x 2 x 2"}[kind]
    scales = {"version": "0.4", "name": name, "axes": axes, "datasets": datasets, "type": way}
    return {"multiscales": [scales], **({"image-label": {"version": "0.4"}} if kind == "labels" else {})}


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes((json.dumps(content, indent=2) + "\n").encode())


# ------------------------------------------------------------------------------------------------------------ reading


def _level(path: Path, level: int) -> tuple[float, str]:
    """Voxel size [Å] and folder of a level, from the metadata."""
    if not path.is_dir():
        raise FormatError(path, "folder", "an OME-Zarr folder", "none of that name", "Check spelling and folder.")
    scales: Any = _json(path / ".zattrs").get("multiscales")
    try:
        axes, datasets = scales[0]["axes"], scales[0]["datasets"]
        names = [axis["name"] for axis in axes]
        units = [_ANGSTROM.get(axis.get("unit", "")) for axis in axes]
        found = [(str(d["path"]), d["coordinateTransformations"][0]["scale"]) for d in datasets]
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise FormatError(path / ".zattrs", "multiscales", "those of OME-Zarr 0.4", repr(error)) from error
    if names != ["z", "y", "x"] or None in units:
        raise FormatError(
            path / ".zattrs", "axes", "z, y, x in angstrom or nanometer", f"{axes}", "Take one channel and time first."
        )
    if not 0 <= level < len(found):
        raise FormatError(path, "level", f"0 to {len(found) - 1}", f"{level}", "Ask for another.")
    name, scale = found[level]
    try:
        voxel = [float(s) * float(unit or 0) for s, unit in zip(scale, units, strict=True)]
    except (TypeError, ValueError) as error:
        raise FormatError(path / ".zattrs", "scale", "three numbers", f"{scale}") from error
    if not all(0 < v < math.inf for v in voxel) or max(voxel) > (1 + 1e-3) * min(voxel):
        raise FormatError(path / ".zattrs", "scale", "the same positive one along every axis", f"{voxel} Å")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise FormatError(path / ".zattrs", "path", "a folder inside", repr(name))
    return voxel[0], name


def _check_chunks(folder: Path) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype]:
    """Shape, chunks and type of an array all of whose chunks are there and as large as they say."""
    meta = _json(folder / ".zarray")
    try:
        shape, chunks = (tuple(int(n) for n in meta[key]) for key in ("shape", "chunks"))
        dtype, separator = np.dtype(meta["dtype"]), meta.get("dimension_separator", ".")
        codec = (meta.get("compressor") or {}).get("id")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise FormatError(folder / ".zarray", "metadata", "those of Zarr v2", repr(error)) from error
    if len(shape) != 3 or len(chunks) != 3 or min(*shape, *chunks) < 1 or separator not in (".", "/"):
        raise FormatError(folder / ".zarray", "shape, chunks", "three sizes of 1 or more", f"{shape}, {chunks}")
    if dtype.name not in _READABLE:
        raise FormatError(folder / ".zarray", "dtype", f"one of {', '.join(_READABLE)}", f"{dtype}")
    size, one = math.prod(shape) * dtype.itemsize, math.prod(chunks) * dtype.itemsize
    if size > LARGEST or one > LARGEST_CHUNK:
        raise FormatError(
            folder / ".zarray", "size", f"at most {LARGEST} bytes in chunks of {LARGEST_CHUNK}", f"{size}, {one}"
        )
    for index in product(*(range(math.ceil(n / c)) for n, c in zip(shape, chunks, strict=True))):
        chunk = folder / separator.join(map(str, index))
        if not chunk.is_file():
            raise FormatError(chunk, "chunk", "a file", "none", "The folder was not copied whole: copy it again.")
        with chunk.open("rb") as stream:
            start = stream.read(16)
        told = int.from_bytes(start[4:8], "little") if codec == "blosc" else one
        if len(start) == 0 or told != one:
            raise FormatError(chunk, "chunk", f"{one} bytes once unpacked", f"{told}", "Copy the folder again.")
    return shape, chunks, dtype


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path, _META))
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "content", "JSON", str(error)) from error
    if not isinstance(content, dict):
        raise FormatError(path, "content", "a JSON object", type(content).__name__)
    return content
