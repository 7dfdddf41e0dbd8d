"""One run from its description to its files: structures, specimen, tilt series, truth, poses, parameters."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from cryosim import config as configuration
from cryosim.acquisition.series import Movie, TiltSeries
from cryosim.acquisition.simulate import simulate
from cryosim.acquisition.tilts import TiltScheme
from cryosim.config import RunConfig
from cryosim.core.volume import Volume
from cryosim.io.eer import write_eer
from cryosim.io.files import atomic_write
from cryosim.io.motion import write_motion
from cryosim.io.movies import write_gain, write_movie
from cryosim.io.mrc import write_volume
from cryosim.io.series import write_series
from cryosim.io.star import write_poses
from cryosim.microscope.detector import Detector
from cryosim.microscope.events import Events
from cryosim.microscope.gain import HOT
from cryosim.products import ENDINGS, Made, check_products, particles, write_alignments, write_products
from cryosim.scene import build_specimen, catalogue
from cryosim.specimen.potential_volume import potential_volume
from cryosim.specimen.specimen import Specimen

Progress = Callable[[str, int, int], None]

EER_PARTS = 4
"""Places that an EER file tells apart along each side of a pixel."""


class RunFiles(NamedTuple):
    """Where a run's results lie; None for what the description does not ask for."""

    series: Path
    truth: Path
    poses: Path | None
    parameters: Path
    movies: Path | None = None
    gain: Path | None = None
    motion: Path | None = None
    products: tuple[Path, ...] = ()

    def written(self) -> list[Path]:
        """Those that there are."""
        return [*(path for path in self[:-1] if isinstance(path, Path)), *self.products]


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    base: str | Path = ".",
    numbers: dict[str, int] | None = None,
    progress: Progress | None = None,
) -> RunFiles:
    """Simulate the tilt series a configuration describes and write everything about it.

    Parameters
    ----------
    config : RunConfig
    folder : str or path
        Made if missing. It receives <name>.mrc with .mdoc, .rawtlt and .tlt beside it, <name>_truth.mrc (the potential
        above the ice [V]), <name>_poses.star and <name>_parameters.yaml; where they are asked for, a folder
        <name>_frames with a movie of each exposure, <name>_gain.mrc, <name>_motion.npz with what moved, and the
        `config.output.files`. The same configuration gives the same bytes.
    base : str or path
        Folder that relative paths of structures start from.
    numbers : dict of str to int, optional
        Of everything in masks, by name, where several runs share them; `scene.catalogue` when left out.
    progress : callable, optional
        Called with (what, done, in all).

    Returns
    -------
    RunFiles

    Raises
    ------
    cryosim.io.FormatError
        For a structure file that cannot be used.
    ValueError
        When the molecules do not fit.
    OSError
        When the folder cannot be made or written to: before anything is simulated.
    """
    report = progress or (lambda what, done, total: None)
    folder = Path(folder)
    numbers = catalogue(config) if numbers is None else numbers
    check_products(config, numbers)
    generator = torch.Generator().manual_seed(config.seed)
    specimen = build_specimen(config, base, generator, report)
    _prepare(folder)
    detector = configuration.detector(config)
    tilts = configuration.true_tilts(config)
    means: list[torch.Tensor] = []
    movies = _Movies(config, folder, tilts, detector)
    try:
        with _single_threads() as workers:
            series = tilt_series(
                config,
                specimen,
                generator,
                movies=movies.write if movies.asked_for else None,
                means=(lambda _, mean: means.append(mean)) if "clean" in config.output.files else None,
                workers=workers,
                progress=lambda done, total: report("simulating tilts", done, total),
            )
        report("writing files", 0, 1)
        return _written(config, folder, specimen, detector, series, means, numbers, movies, report)
    finally:
        movies.close()


def tilt_series(
    config: RunConfig,
    specimen: Specimen,
    generator: torch.Generator,
    *,
    movies: Callable[[int, list[Events] | torch.Tensor], None] | None = None,
    means: Callable[[int, torch.Tensor], None] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TiltSeries:
    """Images of a specimen as a configuration has them taken; angles and shifts are the true ones.

    Parameters
    ----------
    config : RunConfig
    specimen : Specimen
        That `scene.build_specimen` made of the configuration.
    generator : torch.Generator
        The one that the specimen was drawn from.
    movies, means, workers, progress
        As in `simulate`.
    """
    return simulate(
        specimen,
        configuration.true_tilts(config),
        configuration.optics(config.optics),
        configuration.detector(config),
        generator=generator,
        sampling=configuration.sampling(config),
        movies=movies,
        means=means,
        supersampling=EER_PARTS if movies is not None and config.output.movies == "eer" else None,
        workers=workers,
        progress=progress,
    )


def _written(
    config: RunConfig,
    folder: Path,
    specimen: Specimen,
    detector: Detector,
    series: TiltSeries,
    means: list[torch.Tensor],
    numbers: dict[str, int],
    movies: _Movies,
    report: Progress,
) -> RunFiles:
    """Write everything but the frames of the movies, the stack last; then the alignments, with a .tlt of their own."""
    gain, nominal, found = _gain(detector), configuration.tilt_scheme(config.tilts), particles(specimen)
    files = RunFiles(
        folder / f"{config.name}.mrc",
        folder / f"{config.name}_truth.mrc",
        folder / f"{config.name}_poses.star" if found else None,
        folder / f"{config.name}_parameters.yaml",
        movies.folder if movies.asked_for else None,
        None if gain is None else folder / f"{config.name}_gain.mrc",
        None if specimen.motion is None else folder / f"{config.name}_motion.npz",
    )
    if files.gain is not None and gain is not None:
        write_gain(files.gain, gain, movies="eer" if config.output.movies == "none" else config.output.movies)
    if files.motion is not None and specimen.motion is not None:
        write_motion(files.motion, specimen.motion)
    truth = true_volume(config, specimen)
    write_volume(files.truth, truth)
    if files.poses is not None:
        listed = [(name, poses.rotations, poses.positions) for name, poses in found.items()]
        grid, voxel = configuration.volume_grid(config)
        write_poses(files.poses, listed, pixel_size=voxel, volume_shape=grid, tomogram_name=config.name)
    with atomic_write(files.parameters) as path:
        path.write_text(yaml.safe_dump(parameters(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    if movies.asked_for:
        movies.put_in_place()
        series = series.replace(movies=tuple(movies.written))
    made = Made(config, folder, specimen, series, nominal.angles, truth, means, numbers)
    products = write_products(made)
    write_series(files.series, series.replace(tilts=nominal))
    if "alignments" in config.output.files:
        products += write_alignments(made)
    files = files._replace(products=tuple(products))
    _tell_of_others(files, folder, config.name)
    report("writing files", 1, 1)
    return files


def _tell_of_others(files: RunFiles, folder: Path, name: str) -> None:
    """Warn of files that an earlier run of this name left and this one does not replace."""
    left = [folder / f"{name}{ending}" for ending in ("_frames", "_gain.mrc", "_motion.npz", *ENDINGS)]
    left = [path for path in left if path.exists() and path not in files.written()]
    if left:
        warnings.warn(
            f"{', '.join(map(str, left))}: of an earlier run, and not of this one. Remove what is not needed.",
            UserWarning,
            stacklevel=4,
        )


def _gain(detector: Detector) -> torch.Tensor | None:
    """Sensitivity of the pixels with 0 for dead and for hot ones, as a gain reference marks them."""
    if detector.gain is None and detector.dark is None:
        return None
    gain = torch.ones(detector.shape) if detector.gain is None else detector.gain
    return gain if detector.dark is None else gain * (detector.dark <= HOT)


class _Movies:
    """Writes the frames of each exposure as it is counted, aside, and puts them in place when all of them are there."""

    def __init__(self, config: RunConfig, folder: Path, tilts: TiltScheme, detector: Detector) -> None:
        self.asked_for = config.output.movies != "none"
        self.folder = folder / f"{config.name}_frames"
        self.written: list[Movie] = []
        self._config, self._tilts, self._detector = config, tilts, detector
        self._aside = folder / f".{config.name}_frames.{secrets.token_hex(4)}"
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder}: expected a folder for the movies, got a file. Remove it.")
        if self.asked_for:
            self._aside.mkdir()

    def write(self, which: int, frames: list[Events] | torch.Tensor) -> None:
        """The frames of one exposure."""
        suffix = {"eer": "eer", "mrc": "mrc", "tiff": "tif"}[self._config.output.movies]
        path = self._aside / f"{self._config.name}_{which:03d}_{float(self._tilts.angles[which]):.2f}.{suffix}"
        pixel_size = self._config.detector.pixel_size
        if isinstance(frames, torch.Tensor):
            write_movie(path, frames, pixel_size)
            number = len(frames)
        else:
            number = sum(events.shape[0] for events in frames)
            write_eer(
                path,
                frames,
                pixel_size=pixel_size,
                dose=float(self._tilts.doses[which]),
                exposure_time=float(self._tilts.exposure_times[which]),
                frame_rate=self._detector.frame_rate,
            )
        self.written.append(Movie(f"{self.folder.name}/{path.name}", number))

    def put_in_place(self) -> None:
        """In one step each: the movies of an earlier run out of the way, these in."""
        old = self._aside.with_name(f"{self._aside.name}.old")
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(self._aside, self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Nothing stays behind of a run that did not come to its end."""
        shutil.rmtree(self._aside, ignore_errors=True)


@contextmanager
def _single_threads() -> Iterator[int]:
    """Torch on one thread, and how many it had: small transforms gain nothing from more, exposures side by side do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def true_volume(config: RunConfig, specimen: Specimen) -> Volume:
    """Potential [V] of the specimen, on the grid of `volume_grid`."""
    shape, voxel = configuration.volume_grid(config)
    return potential_volume(specimen, shape, voxel, config.sampling.parametrization)


def parameters(config: RunConfig) -> dict[str, Any]:
    """Every parameter, the grid chosen for it, and the versions of what computed with them."""
    grid = configuration.sampling(config)
    packages = ("cryosim", "torch", "numpy", "scipy", "gemmi", "mrcfile")
    return {
        **config.model_dump(mode="json"),
        "simulated_grid": {
            "shape [px]": list(grid.shape),
            "pixel_size [Å]": grid.pixel_size,
            "slice_thickness [Å]": grid.thickness,
        },
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def _prepare(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder for the results, got a file. Name another one.")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: cannot be written to. Name another folder.")
