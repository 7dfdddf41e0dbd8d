"""The command `cryosim`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

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


@config_app.command("new")
def new(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a run description with every key, its unit and its default."""
    with clear_errors():
        from cryosim.config import RunConfig, config_text
        from cryosim.io.files import atomic_write

        if path.exists() and not force:
            raise ValueError(f"{path}: is there already. Choose another name, or replace it with --force.")
        with atomic_write(path) as temporary:
            temporary.write_text(config_text(RunConfig()), encoding="utf-8")
    typer.echo(path)


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
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield report


def _tell(kind: str, style: str, message: str) -> None:
    readable = message.encode("utf-8", "backslashreplace").decode()  # a file's name may hold bytes that are not UTF-8
    console.print(Text.assemble((kind, style), ": ", readable), soft_wrap=True)
