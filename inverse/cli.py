"""The command `inverse`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cryosim.cli import clear_errors, progress_bars

if TYPE_CHECKING:
    from cryosim.acquisition.series import TiltSeries

app = typer.Typer(no_args_is_help=True, help="From tilt series to tomograms.", pretty_exceptions_enable=False)


class _Method(StrEnum):
    wbp = "wbp"
    least_squares = "least-squares"
    sirt = "sirt"
    tv = "tv"
    wiener = "wiener"
    pnp = "pnp"
    diffusion = "diffusion"
    local = "local"
    implicit = "implicit"


class _Correction(StrEnum):
    flip = "flip"
    wiener = "wiener"
    none = "none"


class _Precision(StrEnum):
    float32 = "float32"
    float16 = "float16"


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo"),
    description: Annotated[
        Path | None, typer.Option("--config", help="YAML file of another run; `cryosim config new` writes one.")
    ] = None,
    events: Annotated[
        bool,
        typer.Option("--events", help="Write every electron to EER files, reconstruct from those (2 to 4 minutes)."),
    ] = False,
) -> None:
    """The main job: a real protein, its tilt series, two tomograms and a report, in about two minutes."""
    with clear_errors(), progress_bars() as report:
        from cryosim.config import read_config
        from inverse.demo import demo as run_demo

        config, base = (read_config(description), description.parent) if description else (None, Path())
        files = run_demo(output, config, events=events, base=base, progress=report)
    for path in (
        files.series,
        files.truth,
        files.poses,
        files.parameters,
        *files.tomograms,
        files.picture,
        files.report,
    ):
        typer.echo(path)


@app.command()
def reconstruct(
    series: Annotated[Path, typer.Argument(help="Tilt series (.mrc) with its .mdoc or .rawtlt beside it.")],
    thickness: Annotated[
        float | None, typer.Option(help="Of the tomogram along the beam [Å]; else half the images' width.")
    ] = None,
    method: Annotated[_Method, typer.Option(help="How.")] = _Method.wbp,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="NAME.mrc or NAME.zarr (OME-Zarr); else <series>_<method>.mrc beside it."),
    ] = None,
    bin: Annotated[int, typer.Option(min=1, help="Image pixels to a voxel edge.")] = 1,
    ctf: Annotated[_Correction, typer.Option(help="Correction of the contrast transfer.")] = _Correction.flip,
    low_pass: Annotated[float | None, typer.Option(min=0, help="Finest period to keep [Å].")] = None,
    weight: Annotated[
        float | None, typer.Option(min=0, help="Of damping, in voxel^2, of variation, or the strength of pnp.")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Of sirt (else 10), pnp (20); at most of tv (100) and implicit (400).")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="Weights of pnp, diffusion or local (.safetensors); else those that come along.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Of diffusion (else 8), whose mean is written.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of diffusion and implicit.")] = 0,
    bends: Annotated[
        float | None, typer.Option(min=0, help="How far parts are displaced from tilt to tilt [Å]; of implicit.")
    ] = None,
    pixel_size: Annotated[float | None, typer.Option(min=0, help="[Å], where the file has none.")] = None,
    alignment: Annotated[
        Path | None, typer.Option(help="Of the series: .xf (IMOD), .aln (AreTomo), .star (RELION 5) or .xml (Warp).")
    ] = None,
    angles: Annotated[Path | None, typer.Option(help="List with the angle of each section.")] = None,
    ctf_file: Annotated[
        Path | None, typer.Option(help="CTF fits: .defocus (IMOD), .txt (AreTomo, CTFFIND), .star or .xml.")
    ] = None,
    voltage: Annotated[float | None, typer.Option(min=0, help="In kV, where no file tells it.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Sections to leave out, counted from 0, such as 3,17.")] = None,
    precision: Annotated[_Precision, typer.Option(help="Of the values in the file.")] = _Precision.float32,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run was stopped; keep what this one has done if it is.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", min=1, help="Processes; one that uses all cores if not given.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Dask cluster, in place of processes here.")
    ] = None,
) -> None:
    """Reconstruct a tomogram, of any size: it is written slab by slab.

    With --alignment, --angles, --ctf-file, --voltage or --exclude, empty images are left out, and what is not given is
    taken from the files beside the series.
    """
    with clear_errors(), progress_bars() as report:
        from inverse.streamed import reconstruct_to

        given = _read(series, pixel_size, alignment, angles, ctf_file, voltage, exclude)
        path = _writable(output or series.with_name(f"{_stem(series)}_{method.value}.mrc"), series)
        reconstruct_to(
            path,
            given,
            method.value,
            precision=precision.value,
            thickness=thickness,
            bin=bin,
            ctf=ctf.value,
            low_pass=low_pass,
            weight=weight,
            iterations=iterations,
            network=network,
            samples=samples,
            seed=seed,
            bends=bends,
            resume=resume,
            workers=workers,
            scheduler=scheduler,
            progress=report,
        )
    typer.echo(path)


@app.command("fit-ctf")
def fit_ctf(
    image: Annotated[Path, typer.Argument(help="Image or tilt series (.mrc); a series with its angles beside it.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            "-o",
            help="NAME.defocus (IMOD), NAME.txt (CTFFIND), NAME.star (RELION 5) or NAME.xml (Warp); of an image .txt.",
        ),
    ] = None,
    voltage: Annotated[float | None, typer.Option(min=1, help="In kV; else that of the .mdoc, else 300.")] = None,
    spherical_aberration: Annotated[
        float | None, typer.Option("--cs", help="In mm; else that of the .mdoc, else 2.7.")
    ] = None,
    amplitude_contrast: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="Share; else that of the .mdoc, else 0.07.")
    ] = None,
    fit: Annotated[
        str, typer.Option(help="What else to fit: phase_shift,thickness,tilt,spherical_aberration,pixel_size ...")
    ] = "",
    tilt: Annotated[float, typer.Option(min=-85, max=85, help="Of the specimen, in deg.")] = 0.0,
    axis_angle: Annotated[float, typer.Option(help="Of the tilt axis, from y, in deg.")] = 0.0,
    movie: Annotated[bool, typer.Option("--movie", help="The file's sections are frames of one image.")] = False,
    pixel_size: Annotated[float | None, typer.Option(min=0, help="[Å], where the file has none.")] = None,
    angles: Annotated[Path | None, typer.Option(help="List with the angle of each section.")] = None,
    alignment: Annotated[
        Path | None, typer.Option(help="Of the series: .xf, .aln, .star or .xml, which a .star or .xml takes over.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Sections to leave out, counted from 0, such as 3,17.")] = None,
    plot: Annotated[Path | None, typer.Option(help="NAME.png: rings of the image beside those of the fit.")] = None,
) -> None:
    """Fit defocus and astigmatism to an image or to each image of a tilt series, with standard errors."""
    with clear_errors():
        from cryosim.io.calibration import calibration_path, write_calibration
        from cryosim.io.exposures import told_voltage
        from cryosim.io.mrc import read_stack, stack_shape
        from cryosim.microscope.optics import Optics

        path = None if output is None else calibration_path(output, "ctf")
        kv = voltage or told_voltage(image) or 300.0
        told = {"spherical_aberration": spherical_aberration, "amplitude_contrast": amplitude_contrast}
        given = {"voltage": kv} | {name: value for name, value in told.items() if value is not None}
        usual = Optics(spherical_aberration=2.7, amplitude_contrast=0.07)
        if stack_shape(image)[0] > 1 and not movie:
            from inverse.calibration.applied import applied
            from inverse.calibration.series_ctf import fit_series_ctf

            asked = alignment is not None or angles is not None or exclude is not None
            series = _read(image, pixel_size, alignment, angles, None, kv if asked else None, exclude)
            _expect_unchanged(path, image, series)
            series = series.replace(optics=(series.optics or usual).replace(**given))
            fit_of_all = fit_series_ctf(series)
            lines = fit_of_all.lines(series.tilts.angles)
            if path is not None:
                files = write_calibration(path, applied(series, ctf=fit_of_all), hand=fit_of_all.hand or 1)
                lines += [str(file) for file in files]
        else:
            from inverse.calibration.ctf_fit import fit_ctf as fitted

            if path is not None and path.suffix.lower() != ".txt":
                raise ValueError(f"{path}: --output: expected NAME.txt for one image, got {path.suffix!r}.")
            stack, pixel = read_stack(image, pixel_size=pixel_size)
            lens = usual.replace(**given)
            found = fitted(
                stack,
                pixel,
                kv,
                float(lens.spherical_aberration),
                float(lens.amplitude_contrast),
                fit=tuple(fit.replace(",", " ").split()),  # type: ignore[arg-type]
                tilt=tilt,
                axis_angle=axis_angle,
            )
            lines = found.lines()
            if path is not None:
                import torch

                from cryosim.acquisition.tilts import TiltScheme
                from cryosim.io.ctf_text import write_ctffind

                write_ctffind(path, TiltScheme(torch.tensor([tilt]), torch.zeros(1)), found.optics, pixel)
                lines.append(str(path))
            if plot is not None:
                from cryosim.io.files import atomic_write
                from cryosim.plot import to_png
                from inverse.ctf_pictures import ctf_fit_figure

                with atomic_write(plot) as temporary:
                    temporary.write_bytes(to_png(ctf_fit_figure(stack, pixel, found)))
    typer.echo("\n".join(lines))


@app.command("check-conventions")
def check_conventions(
    series: Annotated[Path, typer.Argument(help="Tilt series (.mrc) with its .mdoc or .rawtlt beside it.")],
    report: Annotated[Path | None, typer.Option(help="NAME.html: a page with the verdict and its evidence.")] = None,
    pixel_size: Annotated[float | None, typer.Option(min=0, help="[Å], where the file has none.")] = None,
    alignment: Annotated[Path | None, typer.Option(help="Whose axis and angles are checked: .xf, .aln ...")] = None,
    angles: Annotated[Path | None, typer.Option(help="List with the angle of each section.")] = None,
    voltage: Annotated[float | None, typer.Option(min=1, help="In kV; else that of the .mdoc, else 300.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Sections to leave out, counted from 0, such as 3,17.")] = None,
) -> None:
    """Tell from the images whether angles, tilt axis and defocus of a tilt series have the right signs."""
    with clear_errors(), progress_bars() as told:
        from cryosim.io.exposures import told_voltage
        from cryosim.microscope.optics import Optics
        from inverse.calibration.conventions import check_conventions as checked
        from inverse.conventions_page import write_conventions_page

        kv = voltage or told_voltage(series) or 300.0
        asked = alignment is not None or angles is not None or exclude is not None
        given = _read(series, pixel_size, alignment, angles, None, kv if asked else None, exclude)
        usual = Optics(spherical_aberration=2.7, amplitude_contrast=0.07)
        given = given.replace(optics=(given.optics or usual).replace(voltage=kv))
        found = checked(given, progress=lambda done, total: told("fit both signs of the defocus", done, total))
        lines = found.lines()
        if report is not None:
            lines.append(str(write_conventions_page(report, given, found, f"Is {series.name} the right way round?")))
    typer.echo("\n".join(lines))


@app.command()
def align(
    series: Annotated[Path, typer.Argument(help="Tilt series (.mrc) with its .mdoc or .rawtlt beside it.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            "-o",
            help="NAME.xf (IMOD, with .tlt), NAME.aln (AreTomo), NAME.star (RELION 5) or NAME.xml (Warp); else .xf.",
        ),
    ] = None,
    thickness: Annotated[float | None, typer.Option(min=0, help="Of the specimen, to begin with, in Å.")] = None,
    axis_angle: Annotated[float | None, typer.Option(help="Of the tilt axis, from y, right to 5 deg.")] = None,
    fit_angles: Annotated[bool, typer.Option("--fit-angles", help="Correct the angle of each tilt, too.")] = False,
    fit_axis: Annotated[bool, typer.Option(help="Correct the angle of the axis.")] = True,
    finest: Annotated[float | None, typer.Option(min=0, help="Period beyond which images are not used, in Å.")] = None,
    bin: Annotated[int | None, typer.Option(min=1, help="Pixels to one; else so that about 256 are left.")] = None,
    pixel_size: Annotated[float | None, typer.Option(min=0, help="[Å], where the file has none.")] = None,
    angles: Annotated[Path | None, typer.Option(help="List with the angle of each section.")] = None,
    ctf_file: Annotated[
        Path | None, typer.Option(help="CTF fits, which tell the sign of what is seen: .defocus, .txt, .star or .xml.")
    ] = None,
    voltage: Annotated[float | None, typer.Option(min=0, help="In kV, where no file tells it.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Sections to leave out, counted from 0, such as 3,17.")] = None,
    hand: Annotated[int, typer.Option(help="1 or -1, as fit-ctf tells it; for a .star or .xml.")] = 1,
) -> None:
    """Find shifts, tilt axis and thickness of a tilt series, without markers, with standard errors."""
    path = output or series.with_name(f"{_stem(series)}.xf")
    with clear_errors(), progress_bars() as report:
        from cryosim.io.calibration import calibration_path, check_optics, write_calibration
        from inverse.calibration.alignment import align as aligned
        from inverse.calibration.applied import applied

        calibration_path(path, "alignment")
        if hand not in (1, -1):
            raise ValueError(f"--hand: expected 1 or -1, got {hand}.")
        given = _read(series, pixel_size, None, angles, ctf_file, voltage, exclude)
        _expect_unchanged(path, series, given)
        check_optics(path, given)
        names = ["shifts", "thickness", *(["axis_angle"] if fit_axis else []), *(["angles"] if fit_angles else [])]
        found = aligned(
            given,
            thickness=thickness,
            axis_angle=axis_angle,
            finest=finest,
            bin=bin,
            fit=names,  # type: ignore[arg-type]
            progress=lambda done, total: report("align", done, total),
        )
        files = write_calibration(path, applied(given, alignment=found), hand=hand)
    typer.echo("\n".join([*found.lines(), *map(str, files)]))


@app.command()
def train(
    source: Annotated[
        Path,
        typer.Argument(help="Description of scenes (.yaml), as for `cryosim dataset`, or the folder of a dataset."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="NAME.safetensors; its card NAME.md stands beside it.")
    ],
    scenes: Annotated[int, typer.Option(min=1, help="To simulate of a description.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Of the training.")] = 6000,
    batch: Annotated[int, typer.Option(min=1, help="Crops a step.")] = 4,
    crop: Annotated[int, typer.Option(min=16, help="Their edge in voxels.")] = 32,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate at its highest.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, crops and noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped.")] = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-w", min=1, help="Processes that simulate; one for each core if not given."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Dask cluster that simulates instead.")
    ] = None,
) -> None:
    """Train a denoiser on simulated scenes, for plug-and-play and diffusion. With the usual numbers it takes hours."""
    with clear_errors(), progress_bars() as report:
        from inverse.train import Plan
        from inverse.train_scenes import train_to

        plan = Plan(steps=steps, batch=batch, crop=crop, rate=rate, seed=seed)
        many = {"resume": resume, "workers": workers, "scheduler": scheduler, "progress": report}
        path = train_to(output, source, scenes=scenes, plan=plan, **many)
    typer.echo(path)


def _read(
    series: Path,
    pixel_size: float | None,
    alignment: Path | None,
    angles: Path | None,
    ctf_file: Path | None,
    voltage: float | None,
    exclude: str | None,
) -> TiltSeries:
    if all(given is None for given in (alignment, angles, ctf_file, voltage, exclude)):
        from cryosim.io.series import read_series

        return read_series(series, pixel_size=pixel_size)
    from cryosim.io.import_series import import_series

    sections = (exclude or "").replace(",", " ").split()
    if not all(section.isdecimal() for section in sections):
        raise ValueError(f"--exclude: expected sections such as 3,17, counted from 0, got {exclude!r}.")
    return import_series(
        series,
        pixel_size=pixel_size,
        alignment=alignment,
        angles=angles,
        ctf_file=ctf_file,
        voltage=voltage,
        exclude=[int(s) for s in sections],
    )


def _expect_unchanged(path: Path | None, stack: Path, series: TiltSeries) -> None:
    """Raise where a file at `path` would be taken to be of the stack and is of images that were resampled."""
    if path is not None and series.stack is None:
        raise ValueError(
            f"{path}: --output: expected the images of {stack} as they stand, but they were resampled to one axis and "
            "magnification. Write them anew first (import_series, write_series), or give another alignment."
        )


def _stem(series: Path) -> str:
    return Path(series.stem).stem if series.suffix.lower() in (".gz", ".bz2") else series.stem


def _writable(path: Path, series: Path) -> Path:
    """`path`, if a tomogram can be written there: found out before it is made."""
    suffix = path.suffix.lower()
    if suffix not in (".mrc", ".rec", ".map", ".zarr"):
        raise ValueError(f"{path}: --output: expected a name that ends in .mrc, .rec, .map or .zarr, got {suffix!r}.")
    if path.resolve() == series.resolve():
        raise ValueError(f"{path}: --output: expected another file than the tilt series itself.")
    if suffix == ".zarr" and path.exists() and not (path / ".zattrs").is_file():
        raise ValueError(f"{path}: --output: expected an OME-Zarr folder to replace, or nothing of that name.")
    if (suffix != ".zarr" and path.is_dir()) or not path.parent.is_dir():
        raise ValueError(f"{path}: --output: expected a file in an existing folder. Make the folder first.")
    return path
