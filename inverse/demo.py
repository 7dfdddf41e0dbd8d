"""The main job, end to end: a real protein to a tilt series, its files to tomograms, and a report on what came back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from cryosim import config as configuration
from cryosim.acquisition.frames import dose_weights, sum_frames
from cryosim.acquisition.series import TiltSeries
from cryosim.config import RunConfig
from cryosim.io.eer import render_eer
from cryosim.io.files import atomic_write
from cryosim.io.mrc import read_volume, write_volume
from cryosim.io.series import read_series
from cryosim.microscope.detector import Detector
from cryosim.microscope.gain import gain_corrected
from cryosim.plot import ortho_slices, to_png
from cryosim.run import Progress, run
from cryosim.specimen.damage import Damage
from inverse.metrics.fsc import ShellCorrelation, fsc, measured_region
from inverse.reconstruction import Method, Reconstruction, reconstruct
from inverse.report import write_report

DETAIL = 16.0
"""Finest period [Å] of the tomograms from electrons, whose pixels are finer than anything they can show."""

METHODS: dict[str, Method] = {"weighted back-projection": "wbp", "least squares": "least-squares"}


class DemoFiles(NamedTuple):
    """Where the demo's results lie."""

    series: Path
    truth: Path
    poses: Path
    parameters: Path
    tomograms: tuple[Path, ...]
    picture: Path
    report: Path


def demo(
    folder: str | Path,
    config: RunConfig | None = None,
    *,
    events: bool = False,
    base: str | Path = ".",
    progress: Progress | None = None,
) -> DemoFiles:
    """Simulate, write, read back, reconstruct in two ways, compare with the truth, report.

    Parameters
    ----------
    folder : str or path
        Made if missing.
    config : RunConfig, optional
        A dozen apoferritins and ubiquitins in ice when left out; with `events` a few, larger on a Falcon 4i.
    events : bool
        Write every electron to EER files, and begin again from them: frames, gain, weights by dose, their sum.
    base : str or path
        Folder that relative paths of structures start from.
    progress : callable, optional
        Called with (what, done, in all).

    Returns
    -------
    DemoFiles
    """
    config = config or (events_config() if events else RunConfig(name="demo"))
    if events:
        config = configuration.changed(config, output={"movies": "eer"})
    report = progress or (lambda what, done, total: None)
    files = run(config, folder, base=base, progress=report)
    series, truth = read_series(files.series), read_volume(files.truth)
    if events:
        series = from_events(
            series,
            Path(folder),
            frames=config.tilts.frames,
            gain=None if files.gain is None else read_volume(files.gain, pixel_size=1.0).values[0],
            damage=configuration.damage(config),
            progress=lambda done, total: report("reading electrons", done, total),
        )
    voxel = float(series.pixel_size)
    depth, rows, width = truth.values.shape
    thickness = depth * voxel
    region = measured_region((depth, rows, width), series.tilts.angles)
    results: dict[str, Reconstruction] = {}
    measured: dict[str, ShellCorrelation] = {}
    whole: dict[str, ShellCorrelation] = {}
    paths = []
    for name, method in METHODS.items():
        made = reconstruct(
            series,
            method,
            thickness=thickness,
            low_pass=DETAIL if events else None,
            progress=lambda done, total, name=name: report(name, done, total),
        )
        results[name] = made
        paths.append(Path(folder) / f"{config.name}_{method}.mrc")
        write_volume(paths[-1], made.volume)
        pair = (made.volume.values, truth.values, voxel)
        measured[name] = fsc(*pair, region=region, thickness=thickness)
        whole[name] = fsc(*pair, thickness=thickness)
    report("report", 0, 1)
    picture = Path(folder) / f"{config.name}_slices.png"
    with atomic_write(picture) as temporary:
        volumes = {"truth": truth} | {name: made.volume for name, made in results.items()}
        temporary.write_bytes(to_png(ortho_slices(volumes, slab=5)))
    page = Path(folder) / "report.html"
    write_report(
        page,
        title=f"{config.name}: a simulated tilt series and its tomograms",
        series=series,
        truth=truth,
        reconstructions=results,
        curves=measured,
        whole=whole,
        summary={"Pixel": f"{config.detector.pixel_size:g} Å", "Molecules": _molecules(config)},
        parameters=yaml.safe_load(files.parameters.read_text(encoding="utf-8")),
        files=[(path.name, what) for path, what in _described(files, paths)],
    )
    report("report", 1, 1)
    assert files.poses is not None  # as there are molecules
    return DemoFiles(files.series, files.truth, files.poses, files.parameters, tuple(paths), picture, page)


def events_config() -> RunConfig:
    """A field as a Falcon 4i sees it: 2 Å pixels, 4 electrons a pixel and second, detail fading frame by frame."""
    return RunConfig.model_validate(
        {
            "name": "demo",
            "specimen": {
                "molecules": [
                    {"structure": "apoferritin", "assembly": 1, "copies": 5},
                    {"structure": "ubiquitin", "copies": 4},
                ],
                "size": (500, 500, 250),
                "ice": {"thickness": 300},
            },
            "tilts": {"step": 6, "total_dose": 80, "frames": 2, "dose_rate": 1.0},
            "detector": {"shape": (256, 256), "pixel_size": 2.0, "camera": "falcon4i", "gain_variation": 0.03},
        }
    )


def from_events(
    series: TiltSeries,
    folder: Path,
    *,
    frames: int,
    gain: torch.Tensor | None = None,
    damage: Damage | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TiltSeries:
    """The series whose images are made anew from its EER files.

    The camera frames of each exposure are added up in groups and divided by the gain; the groups are weighted at each
    frequency by what the dose has left there, and summed.

    Parameters
    ----------
    series : TiltSeries
        With movies.
    folder : Path
        From which their paths start.
    frames : int
        How many groups an exposure is divided into.
    gain : tensor (y, x), optional
        Relative sensitivity of the pixels, 0 where one is dead or hot.
    damage : Damage, optional
        Of the specimen; without it the groups have equal weights.
    progress : callable, optional
        Called with (exposures done, exposures in all).
    """
    if series.movies is None:
        raise ValueError("from_events: expected a series with movies. Its .mdoc has to name them (SubFramePath).")
    tilts, (ny, nx) = series.tilts.replace(frames=frames), series.images.shape[1:]
    voltage = 300.0 if series.optics is None else series.optics.voltage
    camera = Detector((ny, nx), series.pixel_size, gain=gain)
    images = []
    for i, movie in enumerate(series.movies):
        groups = render_eer(folder / movie.path, frames=movie.frames // frames).to(series.images)
        moments = [tilts.moment(i, f) for f in range(frames)]
        weights = None
        if damage is not None:
            weights = dose_weights(moments, (ny, nx), series.pixel_size, voltage, damage)
        images.append(sum_frames(gain_corrected(groups, camera), weights=weights))
        if progress:
            progress(i + 1, len(tilts))
    return series.replace(images=torch.stack(images))


def _molecules(config: RunConfig) -> str:
    return ", ".join(f"{m.copies} × {m.structure}" for m in config.specimen.molecules)


def _described(files, tomograms: list[Path]) -> list[tuple[Path, str]]:
    return [
        (files.series, "tilt series [e-/px], sections by tilt angle; .mdoc, .rawtlt and .tlt beside it"),
        (files.truth, "potential above the ice, the truth [V]"),
        (files.poses, "where every molecule stands, and how it is turned"),
        (files.parameters, "every parameter, the seed, the versions"),
        *((path, f"tomogram by {name} [V]") for path, name in zip(tomograms, METHODS, strict=True)),
    ]
