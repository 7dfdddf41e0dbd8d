"""The command `inverse`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cryosim.cli import clear_errors, progress_bars

app = typer.Typer(no_args_is_help=True, help="From tilt series to tomograms.", pretty_exceptions_enable=False)


class _Method(StrEnum):
    wbp = "wbp"
    least_squares = "least-squares"


class _Correction(StrEnum):
    flip = "flip"
    wiener = "wiener"
    none = "none"


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo"),
    description: Annotated[
        Path | None, typer.Option("--config", help="YAML file of another run; `cryosim config new` writes one.")
    ] = None,
) -> None:
    """The main job: a real protein, its tilt series, two tomograms and a report, in about two minutes."""
    with clear_errors(), progress_bars() as report:
        from cryosim.config import read_config
        from inverse.demo import demo as run_demo

        files = run_demo(output, read_config(description) if description else None, progress=report)
    for path in (files.series, files.truth, files.poses, files.parameters, *files.tomograms, files.report):
        typer.echo(path)


@app.command()
def reconstruct(
    series: Annotated[Path, typer.Argument(help="Tilt series (.mrc) with its .mdoc or .rawtlt beside it.")],
    thickness: Annotated[float, typer.Option(help="Of the tomogram along the beam [Å].")],
    method: Annotated[_Method, typer.Option(help="How.")] = _Method.wbp,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="MRC file; <series>_<method>.mrc.")] = None,
    bin: Annotated[int, typer.Option(min=1, help="Image pixels to a voxel edge.")] = 1,
    ctf: Annotated[_Correction, typer.Option(help="Correction of the contrast transfer.")] = _Correction.flip,
    low_pass: Annotated[float | None, typer.Option(min=0, help="Finest period to keep [Å].")] = None,
    pixel_size: Annotated[float | None, typer.Option(min=0, help="[Å], where the file has none.")] = None,
) -> None:
    """Reconstruct a tomogram."""
    with clear_errors(), progress_bars() as report:
        from cryosim.io.mrc import write_volume
        from cryosim.io.series import read_series
        from inverse.reconstruction import reconstruct as run_reconstruct

        made = run_reconstruct(
            read_series(series, pixel_size=pixel_size),
            method.value,
            thickness=thickness,
            bin=bin,
            ctf=ctf.value,
            low_pass=low_pass,
            progress=lambda done, total: report(method.value, done, total),
        )
        path = output or series.with_name(f"{series.stem}_{method.value}.mrc")
        write_volume(path, made.volume)
    typer.echo(path)
