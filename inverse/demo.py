"""The main job, end to end: a real protein to a tilt series, its files to tomograms, and a report on what came back."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from cryosim.config import RunConfig
from cryosim.core.volume import Volume
from cryosim.io.files import atomic_write
from cryosim.io.mrc import read_volume, write_volume
from cryosim.io.series import read_series
from cryosim.plot import ortho_slices, to_png
from cryosim.run import Progress, run
from inverse.metrics.fsc import ShellCorrelation, fsc, measured_region
from inverse.reconstruction import Method, reconstruct
from inverse.report import write_report

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
    folder: str | Path, config: RunConfig | None = None, *, base: str | Path = ".", progress: Progress | None = None
) -> DemoFiles:
    """Simulate, write, read back, reconstruct in two ways, compare with the truth, report.

    Parameters
    ----------
    folder : str or path
        Made if missing.
    config : RunConfig, optional
        A dozen apoferritins and ubiquitins in ice when left out.
    base : str or path
        Folder that relative paths of structures start from.
    progress : callable, optional
        Called with (what, done, in all).

    Returns
    -------
    DemoFiles
    """
    config = config or RunConfig(name="demo")
    report = progress or (lambda what, done, total: None)
    files = run(config, folder, base=base, progress=report)
    series, truth = read_series(files.series), read_volume(files.truth)
    voxel = float(series.pixel_size)
    depth, rows, width = truth.values.shape
    thickness = depth * voxel
    region = measured_region((depth, rows, width), series.tilts.angles)
    volumes: dict[str, Volume] = {}
    measured: dict[str, ShellCorrelation] = {}
    whole: dict[str, ShellCorrelation] = {}
    paths = []
    for name, method in METHODS.items():
        made = reconstruct(
            series,
            method,
            thickness=thickness,
            progress=lambda done, total, name=name: report(name, done, total),
        )
        volumes[name] = made.volume
        paths.append(Path(folder) / f"{config.name}_{method}.mrc")
        write_volume(paths[-1], made.volume)
        pair = (made.volume.values, truth.values, voxel)
        measured[name] = fsc(*pair, region=region, thickness=thickness)
        whole[name] = fsc(*pair, thickness=thickness)
    report("report", 0, 1)
    picture = Path(folder) / f"{config.name}_slices.png"
    with atomic_write(picture) as temporary:
        temporary.write_bytes(to_png(ortho_slices({"truth": truth, **volumes}, slab=5)))
    page = Path(folder) / "report.html"
    write_report(
        page,
        title=f"{config.name}: a simulated tilt series and its tomograms",
        series=series,
        truth=truth,
        reconstructions=volumes,
        curves=measured,
        whole=whole,
        summary={"Pixel": f"{config.detector.pixel_size:g} Å", "Molecules": _molecules(config)},
        parameters=yaml.safe_load(files.parameters.read_text(encoding="utf-8")),
        files=[(path.name, what) for path, what in _described(files, paths)],
    )
    report("report", 1, 1)
    return DemoFiles(*files, tuple(paths), picture, page)


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
