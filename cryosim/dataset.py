"""Datasets: many tilt series of one description, each in a folder of its own that is whole or is not there.

    DIR/dataset.yaml                          the description
    DIR/README.md                             what every file is, in which units, and which program reads it
    DIR/copick.json                           objects of a copick project, where one is asked for
    DIR/ExperimentRuns/<name>_<index>/...     an item: its files, and DONE.json, written last
    DIR/failed.json                           items that could not be made, and why (failed_<i>_of_<N>.json of a shard)
    DIR/.<name>_<index>.<random>/             an item that is being made
    DIR/.lock                                 held while something is put in place

An item is made aside, flushed to the disk and renamed. Whatever is in place with a valid DONE.json is complete, and
whatever is aside and not locked was left by a process that is no more. Nothing in an item tells the time or the
machine: the same description and index give the same bytes with the same versions on the same kind of processor.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cryosim.cluster import outcomes
from cryosim.config import RunConfig
from cryosim.dataset_readme import Inventory, inventory, readme_text, write_copick_project
from cryosim.description import (
    Description,
    configuration_hash,
    description_text,
    item_config,
    item_name,
    item_seed,
    read_description,
)
from cryosim.io.files import FormatError, read_text, write_text
from cryosim.io.locks import held, made_aside, sweep
from cryosim.run import run

RUNS = "ExperimentRuns"
"""Folder of the items, as copick names it."""

DONE = "DONE.json"

LARGEST_DONE = 2**26  # [byte]

Verify = Literal["sizes", "checksums"]
Progress = Callable[[str, int, int], None]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what the next item would meet as well


@dataclass(frozen=True)
class Done:
    """What DONE.json says of an item.

    Attributes
    ----------
    item : str
    index, seed : int
    configuration : str
        Hash of the description.
    versions : dict
        Of the software that made it.
    files : dict
        {path in the item: {"size": [byte], "sha256": hexadecimal}}.
    """

    item: str
    index: int
    seed: int
    configuration: str
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of one item; seconds [s] and size [byte] of one that was made, the error of one that failed."""

    index: int
    item: str
    status: Literal["made", "skipped", "failed"]
    seconds: float = 0.0
    size: int = 0
    error: str = ""
    hopeless: bool = False
    warnings: tuple[str, ...] = ()


class Summary(NamedTuple):
    """What became of all.

    Attributes
    ----------
    made, skipped, untried : int
        Items: new, in place before, and not begun because the disk was full.
    failed : tuple of Outcome
    seconds : float
        Mean for an item that was made [s].
    size : int
        Of the items that were made [byte].
    warnings : dict
        {what was warned of: how many items}.
    """

    made: int
    skipped: int
    untried: int
    failed: tuple[Outcome, ...]
    seconds: float
    size: int
    warnings: dict[str, int]


def make_dataset(
    description: Description,
    folder: str | Path,
    n: int,
    *,
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    verify: Verify = "checksums",
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Make items 0 to n - 1 of a dataset, or those of one shard.

    Parameters
    ----------
    description : Description
    folder : str or path
        Made if missing.
    n : int
        Items of all shards together.
    shard : (int, int)
        (i, N) makes items i, i + N, i + 2 N, ...
    resume : bool
        Keep items that are complete and make the others: those that are missing, of another description, damaged, or
        without a valid DONE.json.
    verify : {"checksums", "sizes"}
        What of a complete item is compared with its DONE.json: every byte, or only which files there are, how large.
    workers, scheduler
        As in `cryosim.cluster.outcomes`.
    progress : callable, optional
        Called with (what, done, in all).

    Returns
    -------
    Summary

    Raises
    ------
    ValueError
        For a number or shard that is none, and when an item that the description may give cannot be made: a structure
        file is missing, or two things have one name.
    FileExistsError
        Without `resume`, when one of the items, or another dataset, is there already. Nothing is touched.
    OSError
        When the folder cannot be written to: before anything is simulated.
    """
    tasks, holdings = _indices(n, shard), inventory(description)
    folder = _prepared(description, Path(folder), tasks, resume, holdings)
    make = functools.partial(complete_item, description, folder, verify, holdings.numbers)
    found: list[Outcome] = []
    report = progress or (lambda what, done, total: None)
    report("items", 0, len(tasks))
    running = outcomes(make, tasks, workers=workers, scheduler=scheduler)
    try:
        for index, outcome in running:
            if isinstance(outcome, Exception):
                outcome = Outcome(index, item_name(description, index), "failed", error=_said(outcome))
            found.append(outcome)
            report("items", len(found), len(tasks))
            if outcome.hopeless:
                break
    finally:
        running.close()  # type: ignore[attr-defined]  # workers end before what they left is swept
        _settle(folder, shard, found)
    return _summary(found, len(tasks))


def make_item(description: Description, config: RunConfig, folder: Path, numbers: dict[str, int]) -> None:
    """Write all that belongs to an item into a folder, with these numbers in its masks."""
    run(config, folder, base=description.base, numbers=numbers)


def complete_item(
    description: Description, folder: Path, verify: Verify, numbers: dict[str, int], index: int
) -> Outcome:
    """Make an item, unless it is complete. A fault of the item is part of the outcome."""
    item, begun = item_name(description, index), time.perf_counter()
    place, configuration = folder / RUNS / item, configuration_hash(description)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            if is_complete(place, configuration, verify):
                return Outcome(index, item, "skipped", warnings=_of_other_versions(place))
            with made_aside(folder, item) as aside:
                made = aside / item
                made.mkdir()
                make_item(description, item_config(description, index), made, numbers)
                size = _finish(made, Done(item, index, item_seed(description, index), configuration, versions(), {}))
                new = _put_in_place(made, place, configuration, verify)
        except Exception as error:
            said = _said(error).replace(f"{folder}{os.sep}", "")
            return Outcome(index, item, "failed", error=said, hopeless=_hopeless(error, folder))
    seconds, texts = (
        time.perf_counter() - begun,
        tuple(sorted({str(w.message) for w in told if issubclass(w.category, UserWarning)})),
    )
    return Outcome(index, item, "made", seconds, size, warnings=texts) if new else Outcome(index, item, "skipped")


def _of_other_versions(place: Path) -> tuple[str, ...]:
    made_with, here = read_done(place).versions, versions()
    others = [f"{name} {made_with.get(name)}" for name in here if made_with.get(name) != here[name]]
    told = f"complete, but made with {', '.join(others)}: what is made now may differ in its last digits."
    return (told,) if others else ()


def is_complete(place: Path, configuration: str | None = None, verify: Verify = "sizes") -> bool:
    """Whether an item is in place as its DONE.json says, and of this configuration where one is given."""
    try:
        done = read_done(place)
        if done.item != place.name or configuration not in (None, done.configuration):
            return False
        return all(
            (place / name).is_file()
            and (place / name).stat().st_size == file["size"]
            and (verify == "sizes" or _checksum(place / name) == file["sha256"])
            for name, file in done.files.items()
        )
    except (OSError, ValueError):
        return False


def read_done(place: Path) -> Done:
    """What the DONE.json in an item's folder says.

    Raises
    ------
    FormatError
        When there is none, or it is damaged.
    """
    path = place / DONE
    advice = "Make the item again with `cryosim dataset --resume`."
    try:
        given = json.loads(read_text(path, LARGEST_DONE))
        done = Done(**given)
        sound = (
            isinstance(done.item, str)
            and type(done.index) is type(done.seed) is int
            and isinstance(done.configuration, str)
            and isinstance(done.versions, dict)
            and bool(done.files)
            and all(_is_file_of_item(name, file) for name, file in done.files.items())
        )
    except FormatError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise FormatError(path, "content", "JSON with what belongs to the item", f"{error}", advice) from error
    if not sound:
        raise FormatError(path, "content", "files with sizes and checksums, seed and versions", "others", advice)
    return done


def complete_items(folder: str | Path) -> list[Path]:
    """Folders of the items of a dataset that are complete, in the order of their names; sizes are compared."""
    return [place for place in sorted((Path(folder) / RUNS).glob("[!.]*")) if is_complete(place)]


def versions() -> dict[str, str]:
    """Of what has a part in the bytes of an item."""
    packages = ("cryosim", "torch", "numpy", "scipy", "gemmi", "mrcfile")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def shard_of(text: str) -> tuple[int, int]:
    """(i, N) of the text i/N.

    Raises
    ------
    ValueError
        For another text, or an i that is not from 0 to N - 1.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(
            f"shard: expected i/N with i from 0 to N - 1, such as 0/4 for the first of four, got {text!r}."
        )
    return int(match[1]), int(match[2])


def _indices(n: int, shard: tuple[int, int]) -> range:
    if n < 1:
        raise ValueError(f"n: expected at least one item, got {n}.")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard: expected (i, N) with i from 0 to N - 1, got {shard}.")
    return range(shard[0], n, shard[1])


def _prepared(description: Description, folder: Path, tasks: range, resume: bool, holdings: Inventory) -> Path:
    """The folder, with a description in it and nothing left of earlier runs; errors before anything is changed."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder for the dataset, got a file. Name another one.")
    folder = folder.resolve()
    if not resume:
        _refuse_losses(description, folder, tasks)
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
        with held(folder):  # shows that the folder can be written to
            sweep(folder)
            _introduce(description, folder, holdings)
    except OSError as error:
        raise type(error)(error.errno, f"{error.strerror}. Name another folder, or make room there", str(folder)) from (
            error
        )
    return folder


def _introduce(description: Description, folder: Path, holdings: Inventory) -> None:
    """Write README, copick project and, last, the description. Of the project only one of another is replaced."""
    path = folder / "dataset.yaml"
    changed = path.is_file() and not _describes(path, description)
    if changed:
        warnings.warn(
            f"{path}: was of another description. Its items are made anew as far as they are asked for; others "
            "stay as they are.",
            UserWarning,
            stacklevel=4,
        )
    _write_new(folder / "README.md", readme_text(description, holdings, versions()))
    if "copick" in holdings.kinds and (changed or not (folder / "copick.json").exists()):
        write_copick_project(folder / "copick.json", description, holdings.numbers)
    _write_new(path, description_text(description))


def _write_new(path: Path, text: str) -> None:
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def _refuse_losses(description: Description, folder: Path, tasks: range) -> None:
    there = [name for i in tasks if (folder / RUNS / (name := item_name(description, i))).exists()]
    if there:
        raise FileExistsError(
            f"{folder}: {len(there)} of the {len(tasks)} items are there already, {there[0]} for one. Keep those that "
            "are complete and make the others with --resume, or name another folder."
        )
    path = folder / "dataset.yaml"
    if path.is_file() and not _describes(path, description):
        raise FileExistsError(
            f"{path}: is of another description. Name another folder; --resume would make its items anew."
        )


def _describes(path: Path, description: Description) -> bool:
    """Whether a file holds the description; what its structures contain aside, which may lie elsewhere now."""
    with suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = read_description(path)._replace(sources=description.sources)
        return configuration_hash(there) == configuration_hash(description)
    return False


def _finish(made: Path, done: Done) -> int:
    """Flush the files of an item to the disk, write its DONE.json last; how large it is [byte]."""
    paths = sorted(path for path in made.rglob("*") if path.is_file())
    files = {
        path.relative_to(made).as_posix(): {"size": path.stat().st_size, "sha256": _checksum(path, flush=True)}
        for path in paths
    }
    for path in [*(path for path in made.rglob("*") if path.is_dir()), made]:
        _flush(path)
    text = json.dumps(asdict(replace(done, files=files)), indent=1, sort_keys=True) + "\n"
    write_text(made / DONE, text)
    return sum(file["size"] for file in files.values()) + len(text)


def _put_in_place(made: Path, place: Path, configuration: str, verify: Verify) -> bool:
    """Rename an item to where it belongs; False when another process was first."""
    with held(place.parents[1]):
        if place.exists():
            if is_complete(place, configuration, verify):
                return False
            place.rename(made.parent / "replaced")  # goes with what else is aside
        made.rename(place)
        _flush(place.parent)
    return True


def _settle(folder: Path, shard: tuple[int, int], found: list[Outcome]) -> None:
    """Remove what dead workers left, and list what failed."""
    which = "" if shard == (0, 1) else f"_{shard[0]}_of_{shard[1]}"
    path = folder / f"failed{which}.json"
    failed = [
        {"index": o.index, "item": o.item, "error": o.error}
        for o in sorted(found, key=lambda o: o.index)
        if o.status == "failed"
    ]
    with suppress(OSError), held(folder):  # on a full disk the summary tells
        sweep(folder)
        if failed:
            write_text(path, json.dumps(failed, indent=1, ensure_ascii=False) + "\n")
        else:
            path.unlink(missing_ok=True)


def _summary(found: list[Outcome], n: int) -> Summary:
    status = Counter(outcome.status for outcome in found)
    made = [outcome for outcome in found if outcome.status == "made"]
    return Summary(
        status["made"],
        status["skipped"],
        n - len(found),
        tuple(sorted((o for o in found if o.status == "failed"), key=lambda o: o.index)),
        sum(outcome.seconds for outcome in made) / max(1, len(made)),
        sum(outcome.size for outcome in made),
        dict(Counter(text for outcome in found for text in outcome.warnings)),
    )


def _said(error: Exception) -> str:
    """In one line; a fault of the program, not of what it was given, with its kind."""
    said = " ".join(str(error).split())
    return said if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}".rstrip(": ")


def _hopeless(error: BaseException | None, folder: Path) -> bool:
    """Whether the next item would fail likewise, as there is no room on the disk."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return True
    if isinstance(error, OSError) and error.errno is None:  # NumPy tells no number
        return "requested and" in str(error) and shutil.disk_usage(folder).free < 2**20
    return error is not None and _hopeless(error.__cause__, folder)


def _is_file_of_item(name: Any, file: Any) -> bool:
    inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(file, dict) and type(file["size"]) is int and isinstance(file["sha256"], str)


def _checksum(path: Path, *, flush: bool = False) -> str:
    with path.open("rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
