"""Masks: volumes of whole numbers as MRC, and a table of what each number is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas
import starfile
import torch

from cryosim.core.volume import Volume
from cryosim.io.files import FormatError, atomic_write, existing_file, read_text, write_text
from cryosim.io.mrc import read_volume, write_volume

_COLUMNS = ("cryosimLabel", "cryosimLabelName", "cryosimLabelKind")
_TABLE = 2**26  # [byte]


class Label(NamedTuple):
    """What a number of a mask is.

    Attributes
    ----------
    number : int
        0 to 65535; 0 is usually the background.
    name : str
        Such as that of a molecule or of one instance of it.
    kind : str
        As `Specimen.kinds`.
    """

    number: int
    name: str
    kind: str


def write_labels(path: str | Path, labels: torch.Tensor, voxel_size: float) -> None:
    """Write labels (z, y, x) as MRC: int16 up to 32767, uint16 up to 65535. MRC has no unsigned bytes.

    Parameters
    ----------
    path : str or path
    labels : tensor (z, y, x)
        Whole numbers of 0 to 65535.
    voxel_size : float
        [Å].

    Raises
    ------
    ValueError
        When a number is not whole, negative or too large for the format.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 3 or not labels.numel():
        raise ValueError(
            f"{path}: labels: expected whole numbers (z, y, x), none empty, got {labels.dtype} {tuple(labels.shape)}."
        )
    whole = labels.detach().cpu().to(torch.int64)
    low, high = int(whole.min()), int(whole.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"{path}: labels: expected 0 to 65535, got {low} to {high}. Number them anew, or take write_zarr."
        )
    write_volume(path, Volume(whole.to(torch.int32), voxel_size), dtype="int16" if high <= 32767 else "uint16")


def read_labels(path: str | Path) -> tuple[torch.Tensor, float]:
    """Labels (z, y, x) int32 and voxel size [Å] of an MRC file.

    Raises
    ------
    FormatError
        As `read_volume`, and when a number is not whole.
    """
    volume = read_volume(path)
    labels = volume.values.to(torch.int32)
    if not bool((labels == volume.values).all()):
        raise FormatError(path, "values", "whole numbers", "others", "Name a file of labels.")
    return labels, float(volume.voxel_size)


def write_label_table(path: str | Path, labels: Sequence[Label]) -> None:
    """Write what each number is, as JSON or STAR by the suffix of `path`.

    Raises
    ------
    ValueError
        When there is none, a number stands twice, or the suffix is another.
    """
    path = Path(path)
    numbers = [int(label.number) for label in labels]
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ValueError(f"{path}: labels: expected at least one, each number of 0 or more once, got {numbers}.")
    if path.suffix == ".json":
        write_text(path, json.dumps([dict(label._asdict()) for label in labels], indent=1, ensure_ascii=False) + "\n")
        return
    if path.suffix != ".star":
        raise ValueError(f"{path}: suffix: expected .json or .star, got {path.suffix!r}.")
    if any(mark in text for label in labels for text in (label.name, label.kind) for mark in "\"'\n") or not all(
        label.name and label.kind for label in labels
    ):
        raise ValueError(f"{path}: labels: expected names and kinds without quotes, none empty; or write JSON.")
    with atomic_write(path) as temporary:
        starfile.write({"labels": pandas.DataFrame(labels, columns=_COLUMNS)}, temporary)  # type: ignore[arg-type]
        _, _, body = temporary.read_text(encoding="utf-8").partition("\n")  # the first line tells the time
        temporary.write_text("# cryosim\n" + body, encoding="utf-8")


def read_label_table(path: str | Path) -> list[Label]:
    """What `write_label_table` wrote.

    Raises
    ------
    FormatError
        When the file is missing, damaged or of another kind.
    """
    path = existing_file(path)
    text = read_text(path, _TABLE)
    try:
        if path.suffix == ".json":
            return [Label(int(row["number"]), str(row["name"]), str(row["kind"])) for row in json.loads(text)]
        blocks = starfile.read(path, always_dict=True, parse_as_string=list(_COLUMNS[1:]))
        table = blocks["labels"]  # type: ignore[index, call-overload]
        return [
            Label(int(number), str(name), str(kind))
            for number, name, kind in zip(*(table[c] for c in _COLUMNS), strict=True)  # type: ignore[index]
        ]
    except Exception as error:  # starfile lets whatever its parser meets through
        raise FormatError(path, "content", "a table of labels", f"{type(error).__name__} {error}") from error
