"""The description of a dataset: a run description, in which distributions stand for values, and a section of its own.

Item i is simulated from a run description like any other. The distributions are drawn for it, and its seed is made of
the whole description and i alone, so it does not matter which machine makes which item, nor in which order.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cryosim import distributions as distribution
from cryosim.config import ConfigError, RunConfig, explain, read_yaml
from cryosim.core.permutation import permuted
from cryosim.distributions import Distribution, Place

LONGEST_NAME = 80
"""Of a dataset [character]."""

_NAME = r"\w[\w.-]*"

TRIALS = 64
"""Draws that are looked at before anything is simulated."""

NEW_DATASET = """\
# A dataset for `cryosim dataset`. Every key of a run may stand here (`cryosim config new` shows all of them with their
# units and defaults), and in place of a value a distribution:
#   {uniform: [a, b]}   {log_uniform: [a, b]}   {normal: [mean, deviation], between: [a, b]}
#   {integers: [a, b]}, both ends included      {choice: [x, y, z], weights: [2, 1, 1]}
seed: 1
specimen:
  molecules:
    # one of the 24 subunits; `assembly: 1` makes the whole cage, with seconds more an item
    - structure: apoferritin
      name: ferritin subunit
      copies: {integers: [2, 12]}
    - structure: ubiquitin
      copies: {integers: [2, 12]}
  membranes:
    - shape: sphere
      # [Å]
      radius: {uniform: [90, 120]}
      # between the sites that stand for lipids [Å]; null is finer and takes longer
      spacing: 12
  # (x, y, z) [Å]
  size: [700, 600, 300]
  ice:
    # [Å]
    thickness: {normal: [340, 20], between: [300, 400]}
tilts:
  # [deg]
  extent: 60
  step: 20
  # [e-/Å^2]
  total_dose: {uniform: [80, 140]}
  # standard deviations about what the stage tells [deg] and [Å]
  angle_error: 0.2
  shift_error: {uniform: [0, 20]}
optics:
  # underfocus [Å]
  defocus: {uniform: [20000, 50000]}
  # fraction [1]
  amplitude_contrast: {uniform: [0.05, 0.1]}
detector:
  # (y, x) [px]
  shape: [60, 70]
  # [Å]
  pixel_size: 10
sampling:
  # of a slice [Å]; enough for pixels of 10 Å
  thickness: 40
output:
  # beside the tilt series, its truth and its poses; the README of the dataset tells what each is
  files: [alignments, halves, clean, labels, tomogram, zarr, copick, specimen]
dataset:
  # of the items, before their numbers
  name: series
"""
"""A small one: a few seconds an item."""


class DatasetSection(BaseModel):
    """What concerns the dataset alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str | None = Field(default=None, pattern=rf"^{_NAME}$", max_length=LONGEST_NAME)
    """Of the items, before their numbers; null takes the run's."""


class Description(NamedTuple):
    """A dataset of any number of items.

    Attributes
    ----------
    template : dict
        Keys and values of the run, as they were given; distributions as they were declared.
    distributions : dict
        The distributions at their places in it.
    section : DatasetSection
    base : Path
        Folder that relative paths of structures start from.
    sources : dict
        SHA-256 of each file that the template names.
    """

    template: dict[str, Any]
    distributions: dict[Place, Distribution]
    section: DatasetSection
    base: Path
    sources: dict[str, str]


def read_description(path: str | Path) -> Description:
    """The description of a dataset in a YAML file; a run description is one of a dataset whose items differ by chance.

    Raises
    ------
    ConfigError
        As `describe`, and when the file is missing or is not YAML.
    """
    try:
        return describe(read_yaml(path), Path(path).parent)
    except ConfigError as error:
        lines = [line if line.startswith(f"{path}: ") else f"{path}: {line}" for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from error


def describe(given: dict[str, Any], base: str | Path = ".") -> Description:
    """The dataset that keys and values describe, if it can be made.

    The ends of each distribution and a number of draws of all of them are looked at.

    Parameters
    ----------
    given : dict
        Keys of a `RunConfig`, with distributions, and `dataset`.
    base : str or path
        Folder that relative paths of structures start from.

    Warns
    -----
    UserWarning
        When some draws break a rule between keys: these items will fail.

    Raises
    ------
    ConfigError
        For an unknown key, a wrong value, a distribution that can leave the bounds of its key, or when no draw is
        valid.
    """
    given = dict(given)
    section = _section(given.pop("dataset", {}))
    distributions = _distributions(given)
    config = _tried(given, distributions)
    template = distribution.replaced(
        config.model_dump(mode="json", exclude_unset=True),
        {place: drawn.model_dump(mode="json", exclude_unset=True) for place, drawn in distributions.items()},
    )
    base = Path(base).resolve()
    description = Description(template, distributions, section, base, _sources(template, base))
    if not re.fullmatch(_NAME, name(description)) or len(name(description)) > LONGEST_NAME:
        raise ConfigError(
            f"name: expected a letter or digit first and at most {LONGEST_NAME} characters, got "
            f"{short_repr(name(description))}. Give dataset.name."
        )
    return description


def name(description: Description) -> str:
    """Of the items, before their numbers."""
    default = RunConfig.model_fields["name"].default
    return description.section.name or description.template.get("name", default)


def item_name(description: Description, index: int) -> str:
    """Of item `index`: of its folder, and of the files in it."""
    return f"{name(description)}_{index:06d}"


def item_seed(description: Description, index: int) -> int:
    """Seed of item `index`: a hash of the description of the run and of the index.

    No two items share its lowest 32 bits (up to 4e9 items), the only ones that torch's generators on a CPU take: of
    random ones, among 1e5 items, two would, with the same noise in both.
    """
    return _hashed(description, index, b"")


def item_config(description: Description, index: int) -> RunConfig:
    """The run that makes item `index`.

    Raises
    ------
    ConfigError
        When what was drawn does not go together.
    """
    generator = torch.Generator().manual_seed(_hashed(description, index, b"draws"))  # not the numbers of the run
    values = distribution.drawn(description.distributions, generator)
    own: dict[Place, Any] = {(): distribution.replaced(description.template, values)}
    given = own[()] | {"seed": item_seed(description, index), "name": item_name(description, index)}
    try:
        return RunConfig.model_validate(given)
    except ValidationError as error:
        said = " ".join(explain(e) for e in error.errors())
        shown = ", ".join(f"{_dotted(place)} {value}" for place, value in values.items())
        raise ConfigError(f"{said} Drawn were {shown or 'no values'}.") from error


def possible_configs(description: Description) -> Iterator[RunConfig]:
    """Runs of which one has whatever an item may have: the ends of each distribution, all of each choice.

    Their order is that of the places of the distributions, whatever the order of keys in a file.
    """
    own, template = description.distributions, description.template
    groups: list[tuple[Place, ...]] = [(place,) for place in sorted(own, key=distribution.order)]
    for place in sorted(own, key=distribution.order):
        beside = (*place[:-1], "name")
        if place[-1] == "structure" and beside in own:  # a name that may be null is the structure's
            groups.append((place, beside))
    for group in groups or [()]:
        for corner in product(*(own[place].corners() for place in group)):
            changes = dict(zip(group, corner, strict=True))
            for others in _others(own):
                with suppress(ValidationError):
                    yield RunConfig.model_validate(distribution.replaced(template, others | changes))
                    break


def _others(distributions: dict[Place, Distribution]) -> Iterator[dict[Place, Any]]:
    """Values to go with: the first of each distribution, or, where these do not go together, some draws."""
    yield {place: drawn.corners()[0] for place, drawn in distributions.items()}
    for k in range(TRIALS if distributions else 0):
        yield distribution.drawn(distributions, torch.Generator().manual_seed(k))


def configuration_hash(description: Description) -> str:
    """SHA-256 of all that decides what is in an item besides its index and the versions of the software."""
    content = [description.template, description.section.model_dump(mode="json"), description.sources]
    return hashlib.sha256(_canonical(content)).hexdigest()


def description_text(description: Description) -> str:
    """The description as YAML that `read_description` takes back."""
    section = description.section.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(description.template | {"dataset": section}, sort_keys=False, allow_unicode=True)


def _hashed(description: Description, index: int, purpose: bytes) -> int:
    """31 bits of BLAKE2b of description and index, above 32 bits that are a permutation of the indices."""
    content = _canonical(description.template)
    high = hashlib.blake2b(content + b"\n%d" % index, digest_size=4, person=purpose).digest()
    key = hashlib.blake2b(content, digest_size=8, person=purpose).digest()
    low = permuted(index ^ int.from_bytes(key[:4])) ^ int.from_bytes(key[4:])
    return int.from_bytes(high) % 2**31 * 2**32 + low


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class _Own(BaseModel):
    """The keys that a dataset has besides those of a run."""

    dataset: DatasetSection


def _section(given: Any) -> DatasetSection:
    try:
        return _Own.model_validate({"dataset": {} if given is None else given}).dataset
    except ValidationError as error:
        raise ConfigError("\n".join(explain(e, _Own) for e in error.errors())) from error


def _distributions(given: dict[str, Any]) -> dict[Place, Distribution]:
    """The distributions that keys and values declare, at their places."""
    found, complaints = {}, []
    for place, declaration in distribution.find(given):
        if place in ((), ("seed",), ("name",)):
            complaints.append(f"{_dotted(place) or 'the description'}: expected a plain value, got a distribution.")
            continue
        try:
            found[place] = distribution.declared(declaration)
        except ValidationError as error:
            complaints += [_of_distribution(place, e, declaration) for e in error.errors()]
        except ValueError as error:
            complaints.append(f"{_dotted(place)}: {error}.")
    if complaints:
        raise ConfigError("\n".join(complaints))
    return found


def _of_distribution(place: Place, error: Any, declaration: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        kind = next(kind for key, kind in distribution.KINDS.items() if key in declaration)
        key = str(error["loc"][-1])
        near = get_close_matches(key, kind.model_fields, n=1) or list(kind.model_fields)
        return f"{_dotted(place)}: unknown key {key}; did you mean {near[0]}?"
    return f"{_dotted(place)}: {explain(error)}"


def _tried(given: dict[str, Any], distributions: dict[Place, Distribution]) -> RunConfig:
    """One valid draw, if there is one and no distribution leaves the bounds of its key."""
    trials = [
        distribution.drawn(distributions, torch.Generator().manual_seed(k))
        for k in range(TRIALS if distributions else 1)
    ]
    failed: list[ValidationError] = []
    values, config = {}, None
    for trial in trials:
        try:
            validated = RunConfig.model_validate(distribution.replaced(given, trial))
        except ValidationError as error:
            _refuse_leaving(error, distributions)
            failed.append(error)
        else:
            values, config = (trial, validated) if config is None else (values, config)
    if config is None:
        often = f" None of {TRIALS} draws is valid." if distributions else ""
        complaints = [_explained(e) + often * (e["type"] == "value_error") for e in failed[0].errors()]
        raise ConfigError("\n".join(complaints))
    for place, drawn in distributions.items():
        for corner in drawn.corners():
            try:
                RunConfig.model_validate(distribution.replaced(given, values | {place: corner}))
            except ValidationError as error:
                _refuse_leaving(error, {place: drawn})
    if failed:
        example = " ".join(_explained(e) for e in failed[0].errors())
        warnings.warn(
            f"about {round(100 * len(failed) / len(trials))} % of the draws break a rule between keys; these items "
            f"will be listed as failed. For instance: {example}",
            UserWarning,
            stacklevel=3,
        )
    return config


def _refuse_leaving(error: ValidationError, distributions: dict[Place, Distribution]) -> None:
    """Raise ConfigError if the fault lies in the value at one of the places, not in how values go together."""
    complaints = [
        f"{_explained(e)} {drawn} can give that, and the key does not take it."
        for e in error.errors()
        for place, drawn in distributions.items()
        if _concerns(place, e["loc"]) and e["type"] != "extra_forbidden"
    ]
    if complaints:
        raise ConfigError("\n".join(complaints)) from error


def _concerns(place: Place, location: tuple[str | int, ...]) -> bool:
    """Whether pydantic's `location`, which also tells kinds of sections, lies at or below `place`."""
    parts = iter(location)
    return all(part in parts for part in place)


def _explained(error: Any) -> str:
    """As `explain`, with the nearest name where a distribution seems to be meant."""
    value, location = error["input"], tuple(map(str, error["loc"]))
    unknown = error["type"] == "extra_forbidden"
    keys = location[-1:] if unknown else [str(key) for key in value] if isinstance(value, dict) else []
    for key in keys:
        near = get_close_matches(key, distribution.KINDS, n=1)
        if near and key not in distribution.KINDS:
            where = ".".join(location[:-1] if unknown else location)
            return f"{where}: unknown distribution {key}; did you mean {near[0]}?"
    return explain(error)


def _sources(template: dict[str, Any], base: Path) -> dict[str, str]:
    """SHA-256 of the files that values name, structures above all."""
    names = {text for key, value in template.items() if key != "name" for text in _texts(value)}
    found = {}
    for text in sorted(names):
        with suppress(OSError, ValueError):  # no name of a file
            if (base / text).is_file():
                with (base / text).open("rb") as stream:
                    found[text] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for entry in (value.values() if isinstance(value, dict) else value) for text in _texts(entry)]
    return [value] if isinstance(value, str) else []


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))
