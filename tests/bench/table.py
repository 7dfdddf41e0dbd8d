"""A benchmark is data: what is done, how large, by us and by a peer, side by side on the same machine.

    python -m tests.bench                        every entry, as a table
    python -m tests.bench "multislice" ...       the entries whose name contains a text
    python -m tests.bench --json out.json        and their figures in a file
    python -m tests.bench --side ours NAME       one side of one entry, in this process, as a line of JSON

An entry names two functions. Each prepares one side (imports, arrays; not timed) and returns what is timed.
Both sides get the same number of threads and a fresh process each time, in turns (ours, peer, ours, peer), so that peak
memory belongs to one side and a busy moment of the machine does not. Within a process the function runs once to warm up
and then three times; the best counts. Peak memory is that of the whole process, interpreter and imports included.

Entries of one series at several lengths are followed by how time grows with the length. The entries are the lists
`ENTRIES` of `tests.bench.potential`, `tests.bench.scattering` and `tests.bench.inverse`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MODULES = (
    "tests.bench.potential",
    "tests.bench.scattering",
    "tests.bench.inverse",
    "tests.bench.eer",
    "tests.bench.frames",
    "tests.bench.field",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One comparison.

    Attributes
    ----------
    name : str
        What is done.
    size : str
        How large, in words.
    ours, peer : callable () -> (callable () -> object)
        Prepares a side and returns what is timed; `peer` may be None.
    peer_name : str
        With its version or setting.
    reference_ratio : str
        The ratio once measured, in words: "3.1 on 2 cores".
    threads : int
        Of either side.
    series : str
        Entries of one series differ in their length only.
    length : int
        Side of the image [px].
    """

    name: str
    size: str
    ours: Callable[[], Callable[[], object]]
    peer: Callable[[], Callable[[], object]] | None = None
    peer_name: str = ""
    reference_ratio: str = ""
    threads: int = 2
    series: str = ""
    length: int = 0


@dataclasses.dataclass(frozen=True)
class Side:
    """What one side took: best time [s] and peak memory [MB]."""

    seconds: float
    peak: float


def entries() -> list[Entry]:
    """Every entry of the modules that exist."""
    found: list[Entry] = []
    for name in MODULES:
        if importlib.util.find_spec(name):
            found += importlib.import_module(name).ENTRIES
    return found


def measure_here(entry: Entry, side: str, repeats: int = 3) -> Side:
    """One side in this process."""
    import torch

    torch.set_num_threads(entry.threads)
    prepare = getattr(entry, side)
    work = prepare()
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return Side(best, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(entry: Entry, rounds: int = 2) -> dict[str, Side]:
    """Both sides, each `rounds` times in a fresh process, in turns; the best time and the largest peak of each."""
    sides = ["ours"] + (["peer"] if entry.peer else [])
    taken: dict[str, list[Side]] = {side: [] for side in sides}
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(entry.threads))
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, "-m", "tests.bench", "--side", side, entry.name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{entry.name}, {side}: the benchmark failed.\n{done.stderr[-2000:]}")
            taken[side].append(Side(**json.loads(done.stdout.splitlines()[-1])))
    return {side: Side(min(s.seconds for s in took), max(s.peak for s in took)) for side, took in taken.items()}


def show(results: Sequence[tuple[Entry, dict[str, Side]]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"best of three, in turns; {os.cpu_count()} cores")
    for column in (
        "what",
        "size",
        "threads",
        "peer",
        "ours [s]",
        "peer [s]",
        "peer / ours",
        "once",
        "peak ours / peer [MB]",
    ):
        table.add_column(column, justify="right" if "[" in column or "/" in column else "left")
    for entry, sides in results:
        ours, peer = sides["ours"], sides.get("peer")
        table.add_row(
            entry.name,
            entry.size,
            str(entry.threads),
            entry.peer_name or "none",
            f"{ours.seconds:.3g}",
            f"{peer.seconds:.3g}" if peer else "",
            f"{peer.seconds / ours.seconds:.2f}" if peer else "",
            entry.reference_ratio,
            f"{ours.peak:.0f} / {peer.peak:.0f}" if peer else f"{ours.peak:.0f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    for series, (ours, peer) in growth(results).items():
        console.print(
            f"{series}: time grows as length^{ours:.2f}" + (f", the peer's as length^{peer:.2f}" if peer else "")
        )


def growth(results: Sequence[tuple[Entry, dict[str, Side]]]) -> dict[str, tuple[float, float | None]]:
    """Of each series, the slope of log time over log length, by least squares: (ours, peer's)."""
    found = {}
    for series in dict.fromkeys(entry.series for entry, _ in results if entry.series):
        of_series = [(entry.length, sides) for entry, sides in results if entry.series == series]
        if len({length for length, _ in of_series}) < 2:
            continue
        slopes = []
        for side in ("ours", "peer"):
            points = [(math.log(length), math.log(sides[side].seconds)) for length, sides in of_series if side in sides]
            slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None)
        found[series] = (slopes[0], slopes[1])
    return found


def as_json(results: Sequence[tuple[Entry, dict[str, Side]]]) -> str:
    """The figures, one object an entry."""
    rows = []
    for entry, sides in results:
        fields = {key: getattr(entry, key) for key in ("name", "size", "threads", "peer_name", "reference_ratio")}
        rows.append(fields | {side: dataclasses.asdict(took) for side, took in sides.items()})
    return json.dumps(rows, indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Benchmarks, side by side.")
    parser.add_argument("names", nargs="*", help="run only the entries whose name contains one of these")
    parser.add_argument(
        "--side", choices=("ours", "peer"), help="one side of the entry with this name, in this process"
    )
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes for each side")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args(arguments)
    known = entries()
    if given.side:
        (entry,) = (e for e in known if e.name == given.names[0])
        print(json.dumps(dataclasses.asdict(measure_here(entry, given.side))))
        return
    chosen = [e for e in known if not given.names or any(name in e.name for name in given.names)]
    if not chosen:
        parser.error(f"no entry is named like {given.names}; there are: {', '.join(e.name for e in known)}")
    results = []
    for entry in chosen:
        print(f"{entry.name} ...", file=sys.stderr, flush=True)
        results.append((entry, measure(entry, given.rounds)))
    show(results)
    if given.json:
        given.json.write_text(as_json(results), encoding="utf-8")
