"""Fields of the nouns by name: "optics.defocus", "specimen.damage.b_growth", "specimen.poses.0.positions"."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch

from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.record import Record
from cryosim.core.volume import Volume
from cryosim.microscope.detector import Detector
from cryosim.microscope.optics import Optics
from cryosim.specimen.specimen import Specimen

Kind = Literal["common", "tilt", "frame", "pixel"]

_OF_TILTS = ("tilts.angles", "tilts.shifts")
_OF_FRAMES = ("specimen.motion.drift",)
_OF_PIXELS = ("detector.gain", "detector.dark")


class Setting(NamedTuple):
    """All that an exposure depends on."""

    specimen: Specimen | Volume
    tilts: TiltScheme
    optics: Optics
    detector: Detector


class Parameter(NamedTuple):
    """A field that is fitted.

    Attributes
    ----------
    name : str
        Whole, from "specimen", "tilts", "optics" or "detector" on.
    value : tensor
        To begin with, float64, in the unit of the field.
    kind : {"common", "tilt", "frame", "pixel"}
        What one value of it acts on: all images; one tilt, the first axis; one frame of one tilt, the first two; one
        pixel of all images.
    """

    name: str
    value: torch.Tensor
    kind: Kind


def parameter_of(setting: Setting, name: str) -> Parameter:
    """The field of a name, or of the end of one where that is enough.

    Raises
    ------
    ValueError
        For a name that no field or several have, or a field that has no value yet or holds no real numbers.
    """
    whole = _whole_name(setting, name)
    value = field_at(setting, whole)
    if isinstance(value, tuple):
        value = torch.stack([torch.as_tensor(part, dtype=torch.float64) for part in value])
    if isinstance(value, int):
        value = float(value)
    if not isinstance(value, (float, torch.Tensor)):
        what = "None" if value is None else type(value).__name__
        raise ValueError(f"calibrate: {whole} is {what}. Give it a value to begin with, a number or a tensor.")
    value = torch.as_tensor(value).detach()
    if not (value.is_floating_point() and bool(torch.isfinite(value).all())):
        raise ValueError(f"calibrate: expected finite real numbers in {whole}, got {value.flatten()[:3].tolist()}.")
    return Parameter(whole, value.double(), _kind(setting, whole, value))


def _kind(setting: Setting, name: str, value: torch.Tensor) -> Kind:
    if name in _OF_TILTS or (name.startswith("optics.") and value.ndim > _item_ndim(setting.optics, name)):
        return "tilt"
    if name in _OF_FRAMES:
        return "frame"
    return "pixel" if name in _OF_PIXELS else "common"


def _item_ndim(optics: Optics, name: str) -> int:
    fields = {field.name: field for field in dataclasses.fields(optics)}  # type: ignore[arg-type]
    return fields[name.removeprefix("optics.")].metadata.get("item_ndim", 0)


def _whole_name(setting: Setting, name: str) -> str:
    known = [path for noun in setting._fields for path in _paths(getattr(setting, noun), noun)]
    if name in known:
        return name
    found = [path for path in known if path.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"calibrate: several fields are called {name!r}: {', '.join(found)}. Give one of these.")
    near = ", ".join(path for path in known if path.rsplit(".", 1)[0] == name.rsplit(".", 1)[0])
    roots = ", ".join(f"{noun}.*" for noun in setting._fields)
    raise ValueError(f"calibrate: expected the name of a field of {near or roots}, got {name!r}.")


def _paths(value: Any, name: str) -> Iterator[str]:
    """Names of the fields below a value that may be fitted."""
    if isinstance(value, Record):
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            if not field.metadata.get("static"):
                yield from _paths(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, tuple) and any(isinstance(part, Record) for part in value):
        for i, part in enumerate(value):
            yield from _paths(part, f"{name}.{i}")
    else:
        yield name


def field_at(setting: Setting, name: str) -> Any:
    """The value of a field."""
    value: Any = setting
    for part in name.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


def with_fields(setting: Setting, values: dict[str, torch.Tensor]) -> Setting:
    """A setting with other values of some fields, in the precision of the old ones."""
    for name, value in values.items():
        old = field_at(setting, name)
        if isinstance(old, torch.Tensor):
            value = value.to(old.dtype)
        setting = _put(setting, name.split("."), value)
    return setting


def _put(holder: Any, parts: list[str], value: torch.Tensor) -> Any:
    if not parts:
        return value
    first, *rest = parts
    if first.isdigit():
        i = int(first)
        return (*holder[:i], _put(holder[i], rest, value), *holder[i + 1 :])
    inner = _put(getattr(holder, first), rest, value)
    return holder._replace(**{first: inner}) if isinstance(holder, Setting) else holder.replace(**{first: inner})
