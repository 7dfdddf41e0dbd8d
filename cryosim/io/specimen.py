"""A specimen on disk: NumPy's .npz, without pickles, so that anything can read it.

Its records are written as they are, whatever their fields: specimen.json tells the tree, with numbers in full digits,
names and kinds, and each tensor is an array named by its place, such as molecules/0/positions. A record that a later
version has given another field is still read: the field takes its default. The same specimen gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosim.core.record import Record
from cryosim.io.files import FormatError, atomic_write, existing_file
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.damage import CriticalExposure, Damage
from cryosim.specimen.ice import Absorption, Ice, Relief
from cryosim.specimen.motion import Motion
from cryosim.specimen.specimen import Poses, Specimen

VERSION = 1
LARGEST = 2**34  # [byte] of arrays that a file may hold

_TREE = "specimen.json"
_LARGEST_TREE = 2**26  # [byte]
_WHEN = (1980, 1, 1, 0, 0, 0)  # the earliest a .zip can tell
_RECORDS = {
    record.__name__: record
    for record in (Specimen, Atoms, Poses, Ice, Relief, Absorption, Damage, CriticalExposure, Motion)
}
_TYPES = ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
_STRANGE = {"inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers


def write_specimen(path: str | Path, specimen: Specimen) -> None:
    """Write everything of a specimen, to the last bit; gradients and devices are left behind.

    Parameters
    ----------
    path : str or path
        .npz.
    specimen : Specimen

    Raises
    ------
    ValueError
        When a field holds NaN, or what this version does not know how to write.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: suffix: expected .npz, got {path.suffix!r}.")
    arrays: dict[str, np.ndarray] = {}
    tree = {"format": "cryosim specimen", "version": VERSION, "specimen": _told(path, "", specimen, arrays)}
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False)
        archive.writestr(zipfile.ZipInfo(_TREE, _WHEN), text.encode())
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _WHEN), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def read_specimen(path: str | Path) -> Specimen:
    """Read what `write_specimen` wrote.

    Raises
    ------
    FormatError
        When the file is missing, damaged, of another kind, of a later version, or larger than allowed.
    """
    path = existing_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > LARGEST or archive.getinfo(_TREE).file_size > _LARGEST_TREE:
                raise FormatError(path, "size", f"at most {LARGEST} bytes", f"{size}", "Is it a specimen?")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise FormatError(path, "content", "uncompressed entries", "others", "Write it with write_specimen.")
            tree = json.loads(archive.read(_TREE))
            _check_version(path, tree)
            specimen = _restored(path, "specimen", tree["specimen"], archive)
    except FormatError:
        raise
    except (ValueError, TypeError, OSError, EOFError, LookupError, zipfile.BadZipFile, RuntimeError) as error:
        raise FormatError(
            path, "content", "a specimen in .npz", f"{error}", "Write it again with write_specimen."
        ) from error
    if not isinstance(specimen, Specimen):
        raise FormatError(path, "content", "a specimen", type(specimen).__name__, "Name another file.")
    return specimen


# ------------------------------------------------------------------------------------------------------------ writing


def _told(path: Path, place: str, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """`value` in JSON's types; its tensors go into `arrays`, by their place."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError(f"{path}: {place}: expected a number, got NaN.")
        return value if math.isfinite(value) else {"number": str(value)}
    if isinstance(value, torch.Tensor):
        arrays[place] = _array(path, place, value)
        return {"array": place}
    if isinstance(value, (tuple, list)):
        return [_told(path, f"{place}/{i}", entry, arrays) for i, entry in enumerate(value)]
    if isinstance(value, Record) and type(value).__name__ in _RECORDS:
        fields = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
        inside = {name: _told(path, f"{place}/{name}".lstrip("/"), getattr(value, name), arrays) for name in fields}
        return {"record": type(value).__name__, "fields": inside}
    raise ValueError(
        f"{path}: {place}: expected tensors, numbers, text or one of {', '.join(_RECORDS)}, got {type(value).__name__}."
    )


def _array(path: Path, place: str, value: torch.Tensor) -> np.ndarray:
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in _TYPES:
        raise ValueError(f"{path}: {place}: expected one of {', '.join(_TYPES)}, got {kind}.")
    array = np.ascontiguousarray(value.detach().cpu().numpy()).reshape(value.shape)
    if array.dtype.kind == "f" and bool(np.isnan(array).any()):
        raise ValueError(f"{path}: {place}: expected numbers, got NaN.")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


# ------------------------------------------------------------------------------------------------------------ reading


def _check_version(path: Path, tree: Any) -> None:
    if not isinstance(tree, dict) or tree.get("format") != "cryosim specimen":
        raise FormatError(path, _TREE, "a cryosim specimen", "another file", "Name another file.")
    version = tree.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise FormatError(path, "version", f"1 to {VERSION}", f"{version}", "Read it with a later version of cryosim.")


def _restored(path: Path, place: str, told: Any, archive: zipfile.ZipFile) -> Any:
    if told is None or isinstance(told, (bool, int, float, str)):
        return told
    if isinstance(told, list):
        return tuple(_restored(path, f"{place}/{i}", entry, archive) for i, entry in enumerate(told))
    if "number" in told:
        return _STRANGE[told["number"]]
    if "array" in told:
        return _tensor(path, told["array"], archive)
    if told.get("record") not in _RECORDS:
        raise FormatError(path, place, f"one of {', '.join(_RECORDS)}", repr(told.get("record")), "Update cryosim.")
    record = _RECORDS[told["record"]]
    fields = {field.name for field in dataclasses.fields(record)}  # type: ignore[arg-type]
    unknown = set(told["fields"]) - fields
    if unknown:
        raise FormatError(path, place, f"fields among {', '.join(sorted(fields))}", ", ".join(sorted(unknown)))
    inside = {name: _restored(path, f"{place}/{name}", value, archive) for name, value in told["fields"].items()}
    return record(**inside)


def _tensor(path: Path, place: str, archive: zipfile.ZipFile) -> torch.Tensor:
    raw = archive.read(f"{place}.npy")  # checks the sum of the entry
    stream = io.BytesIO(raw)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise FormatError(path, place, "an array of .npy version 1.0", "another", "Write the file again.")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    start, size = stream.tell(), math.prod(shape) * dtype.itemsize
    if dtype.name not in _TYPES or fortran or len(raw) - start != size:
        raise FormatError(
            path,
            place,
            f"{shape} of {', '.join(_TYPES)}",
            f"{dtype}, {len(raw) - start} bytes",
            "Write the file again.",
        )
    array = np.frombuffer(raw, dtype, offset=start).reshape(shape)
    if dtype.kind == "f" and bool(np.isnan(array).any()):
        raise FormatError(path, place, "numbers", "NaN", "Write the file again.")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=True))
