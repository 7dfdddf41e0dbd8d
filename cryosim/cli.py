"""The command `cryosim`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from cryosim.dataset import Summary

LISTED = 20
"""Failed items that are shown; a file tells all."""

app = typer.Typer(no_args_is_help=True, help="From atoms to cryo-electron tilt series.", pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Descriptions of runs.")
app.add_typer(config_app, name="config")
console = Console(stderr=True)


@app.command()
def simulate(
    description: Annotated[Path, typer.Argument(help="YAML file; `cryosim config new` writes one.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("."),
) -> None:
    """Simulate the tilt series that a YAML file describes."""
    with clear_errors(), progress_bars() as report:
        from cryosim.config import read_config
        from cryosim.run import run

        files = run(read_config(description), output, base=description.parent, progress=report)
    for path in files.written():
        typer.echo(path)


_RECIPES = """\
\b
On SLURM, as an array of jobs that know nothing of each other; sent again,
it goes on where time ran out:
\b
  #SBATCH --array=0-19
  #SBATCH --cpus-per-task=16
  export OMP_NUM_THREADS=1
  cryosim dataset run.yaml -n 1000 --out DIR --resume \\
    --workers $SLURM_CPUS_PER_TASK \\
    --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
\b
With dask-jobqueue: start a SLURMCluster and give its scheduler_address as
--scheduler. `python -m pydoc cryosim.cluster` shows both in full.
"""


@app.command(epilog=_RECIPES)
def dataset(
    description: Annotated[Path, typer.Argument(help="YAML file; `cryosim config new --dataset` prints one.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder of the dataset.")],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Items of all shards together.")],
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Items I, I + N, I + 2 N, ... only; I is 0 to N - 1.")
    ] = "0/1",
    resume: Annotated[bool, typer.Option("--resume", help="Keep complete items and make the others.")] = False,
    verify: Annotated[
        Literal["checksums", "sizes"], typer.Option(help="What of complete items is compared with their DONE.json.")
    ] = "checksums",
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", min=0, help="Processes; one for each core if not given.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Dask cluster, in place of processes here.")
    ] = None,
) -> None:
    """Simulate many tilt series, with values drawn from the distributions that a YAML file declares.

    An item is a folder in DIR/ExperimentRuns that is whole or is not there. The same description and number of an item
    give the same bytes, whoever makes it.
    """
    with clear_errors():
        from cryosim.dataset import make_dataset, shard_of
        from cryosim.description import read_description

        described, part = read_description(description), shard_of(shard)
        with progress_bars() as report:
            summary = make_dataset(
                described,
                output,
                number,
                shard=part,
                resume=resume,
                verify=verify,
                workers=workers,
                scheduler=scheduler,
                progress=report,
            )
        _tell_summary(summary)
    if summary.failed or summary.untried:
        raise typer.Exit(1)
    if summary.made:
        console.print("README.md in the folder tells what every file is.")
    typer.echo(output)


@config_app.command("new")
def new(
    path: Annotated[Path | None, typer.Argument(help="File to write; - is the standard output.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    dataset: Annotated[
        bool, typer.Option("--dataset", help="Of a small dataset, with distributions; printed if no file is named.")
    ] = False,
) -> None:
    """Write a run description with every key, its unit and its default (to run.yaml if no file is named)."""
    with clear_errors():
        from cryosim.config import RunConfig, config_text
        from cryosim.description import NEW_DATASET
        from cryosim.io.files import write_text

        text = NEW_DATASET if dataset else config_text(RunConfig())
        path = path or Path("-" if dataset else "run.yaml")
        if str(path) == "-":
            typer.echo(text, nl=False)
            return
        if path.exists() and not force:
            raise ValueError(f"{path}: is there already. Choose another name, or replace it with --force.")
        write_text(path, text)
    typer.echo(path)


def _tell_summary(summary: Summary) -> None:
    """How many items, how long, how large; what was warned of, and what failed."""
    for text, times in summary.warnings.items():
        _tell("warning", "yellow", f"{text} ({times} items)" if times > 1 else text)
    for outcome in summary.failed[:LISTED]:
        _tell("failed", "bold red", f"{outcome.item}: {outcome.error}")
    if len(summary.failed) > LISTED:
        _tell("failed", "bold red", f"and {len(summary.failed) - LISTED} more.")
    if summary.untried:
        _tell("stopped", "bold red", f"{summary.untried} items not begun: the disk is full. Make room, then --resume.")
    console.print(
        f"{summary.made} made, {summary.skipped} complete before, {len(summary.failed)} failed"
        + (f"; {summary.seconds:.1f} s and {summary.size / summary.made / 1e6:.1f} MB an item" if summary.made else "")
    )
    if summary.failed:
        console.print("failed*.json in the folder lists the failed ones; --resume tries them again.", markup=False)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Bad input ends in one message and exit status 2, not in a traceback; a warning is one message too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _tell("warning", "yellow", str(message))
            yield
    except (ValueError, OSError) as error:
        _tell("error", "bold red", str(error))
        raise typer.Exit(2) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        _tell("error", "bold red", f"there is not enough memory. Take fewer or larger pixels. ({error})")
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("stopped; every file that was written is whole, the others are as they were.")
        raise typer.Exit(130) from None


@contextmanager
def progress_bars() -> Iterator:
    """A function (what, done, total) that draws one bar with the time left for each `what`."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=3600) as bars:  # [s]; an item may take minutes
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield report


def _tell(kind: str, style: str, message: str) -> None:
    readable = message.encode("utf-8", "backslashreplace").decode()  # a file's name may hold bytes that are not UTF-8
    console.print(Text.assemble((kind, style), ": ", readable), soft_wrap=True)
