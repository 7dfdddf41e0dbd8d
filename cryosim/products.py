"""What is written of a run beside its tilt series: alignments, halves, images without noise, labels, stores."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NamedTuple

import torch

from cryosim import config as configuration
from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.simulate import projected_potential
from cryosim.config import RunConfig
from cryosim.core.fourier import number
from cryosim.core.volume import Volume
from cryosim.io.aretomo import write_aln
from cryosim.io.copick import (
    CopickObject,
    copick_name,
    write_copick_picks,
    write_copick_segmentation,
    write_copick_tomogram,
)
from cryosim.io.imod import write_xf
from cryosim.io.labels import Label, write_label_table, write_labels
from cryosim.io.mrc import write_stack, write_volume
from cryosim.io.relion import write_relion
from cryosim.io.specimen import write_specimen
from cryosim.io.store import write_zarr
from cryosim.io.warp import write_warp
from cryosim.microscope.counting import recorded_counts, thin
from cryosim.microscope.gain import gain_corrected
from cryosim.scene import PARTICLES, catalogue
from cryosim.specimen.atoms import Poses
from cryosim.specimen.labels import Labels, label_volumes
from cryosim.specimen.specimen import Specimen

TOMOGRAM = "cryosim.tomogram"
"""Entry points that make a tomogram (z, y, x) of (series, thickness [Å], binning)."""


ENDINGS = (
    ".xf",
    ".aln",
    ".xml",
    "_even.mrc",
    "_odd.mrc",
    "_noiseless.mrc",
    "_projections.mrc",
    "_instances.mrc",
    "_instances.json",
    "_semantic.mrc",
    "_semantic.json",
    "_tomogram.mrc",
    "_truth.zarr",
    "_tomogram.zarr",
    "_instances.zarr",
    "_semantic.zarr",
    "_specimen.npz",
)
"""Of what may be written here, after the name of the run."""


class Made(NamedTuple):
    """What a run has made.

    Attributes
    ----------
    config : RunConfig
    folder : Path
    specimen : Specimen
    series : TiltSeries
        With the tilts and shifts as they truly were.
    nominal : tensor (tilt,)
        Angles that the stage told [deg].
    truth : Volume
    means : list of tensor (y, x)
        Expected counts of each exposure, as `expected_counts` has them [e-/px]; empty where nobody asked for them.
    numbers : dict of str to int
        Of everything in masks, by name.
    """

    config: RunConfig
    folder: Path
    specimen: Specimen
    series: TiltSeries
    nominal: torch.Tensor
    truth: Volume
    means: list[torch.Tensor]
    numbers: dict[str, int]

    def path(self, ending: str) -> Path:
        """Of a file of this run."""
        return self.folder / f"{self.config.name}{ending}"

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        """(z, y, x) [voxel]."""
        return configuration.volume_grid(self.config)[0]

    @property
    def voxel_size(self) -> float:
        """[Å]."""
        return configuration.volume_grid(self.config)[1]


def check_products(config: RunConfig, numbers: dict[str, int]) -> None:
    """Whether all that a configuration asks for can be written, before anything is simulated.

    Raises
    ------
    ValueError
        When there is nothing that makes tomograms, two molecules have one name in a copick project, or a molecule has
        no number.
    """
    without = [name for name in catalogue(config) if name not in numbers]
    if without:
        raise ValueError(f"numbers: expected one for everything in masks, got none for {', '.join(without)}.")
    if "tomogram" in config.output.files:
        _tomogram_maker()
    if "copick" in config.output.files:
        names: dict[str, str] = {}
        for name in numbers:
            other = names.setdefault(copick_name(name), name)
            if other != name:
                raise ValueError(
                    f"specimen: expected names that differ in copick too, which has no spaces and underscores, got "
                    f"{other!r} and {name!r}. Name one of them otherwise."
                )


def write_products(made: Made) -> list[Path]:
    """Everything that the configuration asks for, but the alignments; returns the files and folders written.

    Raises
    ------
    ValueError
        When something that was asked for cannot be made of this run.
    """
    asked, written = made.config.output.files, []
    labels = None
    if "labels" in asked or "copick" in asked:
        labels = _semantic(made, label_volumes(made.specimen, made.volume_shape, made.voxel_size))
    tomogram = tomogram_of(made) if "tomogram" in asked else None
    writers: dict[str, Callable[[], list[Path]]] = {
        "halves": lambda: write_halves(made),
        "clean": lambda: write_clean(made),
        "labels": lambda: _write_labels(made, labels),
        "tomogram": lambda: _write_tomogram(made, tomogram),
        "zarr": lambda: _write_zarr(made, tomogram, labels),
        "copick": lambda: _write_copick(made, tomogram, labels),
        "specimen": lambda: _write_specimen(made),
    }
    for name, write in writers.items():
        if name in asked:
            written += write()
    return written


def write_alignments(made: Made) -> list[Path]:
    """IMOD's .xf, .tlt and .rawtlt, AreTomo's .aln, RELION's tomograms.star and Warp's .xml: the true geometry.

    The .tlt of the true angles takes the place of the one that stands beside a series, of the nominal angles.
    """
    series, config = made.series, made.config
    pixel, shape = float(series.pixel_size), config.detector.shape
    grid = {"volume_shape": made.volume_shape, "voxel_size": made.voxel_size}
    written = write_xf(made.path(".xf"), series.tilts, pixel, shape, nominal=made.nominal, **grid)
    aln, star, xml = made.path(".aln"), made.folder / "tomograms.star", made.path(".xml")
    write_aln(aln, series.tilts, pixel, shape, nominal=made.nominal)
    assert series.optics is not None
    stack = f"{config.name}.mrc"
    how = {"name": config.name, "stack": stack, "movies": series.movies, "nominal": made.nominal}
    write_relion(star, series.tilts, series.optics, pixel, made.volume_shape, voxel_size=made.voxel_size, **how)
    given = {"optics": series.optics, "movies": series.movies, "nominal": made.nominal}
    write_warp(xml, series.tilts, pixel, shape, made.volume_shape, voxel_size=made.voxel_size, **given)
    return [*written, aln, star, made.folder / "tilt_series" / f"{config.name}.star", xml]


def write_halves(made: Made) -> list[Path]:
    """Two stacks whose electrons were dealt out at random: independent noise, and they sum to the series.

    Warns
    -----
    UserWarning
        When the camera misses electrons that arrive near to others, as then the noise is not independent.
    """
    if number(configuration.detector(made.config).coincidence_radius):
        warnings.warn(
            "output.files: the noise of the halves of a camera with coincidence is anticorrelated, see "
            "cryosim.microscope.counting.thin. Set detector.coincidence_radius to 0, or write movies and take their "
            "frames by turns.",
            UserWarning,
            stacklevel=2,
        )
    generator = torch.Generator().manual_seed(made.config.seed ^ 0x4A1F)
    halves = thin(made.series.images, 0.5, generator=generator)
    return [_write_stack(made, f"_{name}.mrc", half) for name, half in zip(("even", "odd"), halves, strict=True)]


def write_clean(made: Made) -> list[Path]:
    """The images that the camera would give without noise, and projected potential, without a lens either."""
    detector, sampling = configuration.detector(made.config), configuration.sampling(made.config)
    with torch.no_grad():
        projected = [
            projected_potential(made.specimen, made.series.tilts, detector, i, sampling=sampling)
            for i in range(len(made.series.tilts))
        ]
    tilts = made.series.tilts.replace(frames=1)
    recorded = [
        gain_corrected(recorded_counts(mean, detector, tilts.camera_frames(i, detector.frame_rate)), detector)
        for i, mean in enumerate(made.means)
    ]
    return [
        _write_stack(made, "_noiseless.mrc", torch.stack(recorded).float()),
        _write_stack(made, "_projections.mrc", torch.stack(projected).float()),
    ]


def _write_stack(made: Made, ending: str, images: torch.Tensor) -> Path:
    """Images (tilt, y, x) in the order of exposure, with their sections as those of the series."""
    order = torch.argsort(made.nominal, stable=True)
    write_stack(made.path(ending), images[order], float(made.series.pixel_size))
    return made.path(ending)


def tomogram_of(made: Made) -> Volume:
    """Back-projection of the series, by whichever package offers one.

    Raises
    ------
    ValueError
        When there is none.
    """
    depth = made.volume_shape[0] * made.voxel_size
    return _tomogram_maker().load()(made.series, depth, made.config.output.binning)


def _tomogram_maker() -> EntryPoint:
    offered = sorted(entry_points(group=TOMOGRAM), key=lambda point: point.name)
    if not offered:
        raise ValueError(
            "output.files: expected an installed package that makes tomograms, got none. Install the project as a "
            "whole (pip install .), or leave tomogram out."
        )
    return offered[0]


def _write_tomogram(made: Made, tomogram: Volume | None) -> list[Path]:
    assert tomogram is not None
    write_volume(made.path("_tomogram.mrc"), tomogram)
    return [made.path("_tomogram.mrc")]


# labels and stores ----------------------------------------------------------------------------------------------------


def _semantic(made: Made, labels: Labels) -> Labels:
    """The labels, with the numbers of this run or dataset for what everything is."""
    lookup = torch.tensor([0, *(made.numbers[name] for name in made.specimen.names)], dtype=torch.uint8)
    return labels._replace(semantic=lookup[labels.semantic.long()])


def _write_labels(made: Made, labels: Labels | None) -> list[Path]:
    assert labels is not None
    files = [made.path(x) for x in ("_instances.mrc", "_instances.json", "_semantic.mrc", "_semantic.json")]
    write_labels(files[0], labels.instances, made.voxel_size)
    if labels.table:
        write_label_table(files[1], [Label(row.instance, row.molecule, row.kind) for row in labels.table])
    write_labels(files[2], labels.semantic, made.voxel_size)
    kinds: dict[str, list[str]] = {}
    for name, kind in zip(made.specimen.names, made.specimen.kinds, strict=True):
        kinds.setdefault(name, []).append(kind)
    said = {name: " and ".join(dict.fromkeys(those)) for name, those in kinds.items()}  # one name may be of two kinds
    rows = [Label(number, name, said.get(name, "none here")) for name, number in made.numbers.items()]
    write_label_table(files[3], rows)
    return [file for file in files if file.exists()]


def _write_zarr(made: Made, tomogram: Volume | None, labels: Labels | None) -> list[Path]:
    volumes = {"truth": made.truth, "tomogram": tomogram}
    written = []
    for name, volume in volumes.items():
        if volume is not None:
            write_zarr(made.path(f"_{name}.zarr"), volume)
            written.append(made.path(f"_{name}.zarr"))
    if labels is not None and "labels" in made.config.output.files:
        for name in ("instances", "semantic"):
            write_zarr(made.path(f"_{name}.zarr"), Volume(getattr(labels, name), made.voxel_size), kind="labels")
            written.append(made.path(f"_{name}.zarr"))
    return written


def _write_copick(made: Made, tomogram: Volume | None, labels: Labels | None) -> list[Path]:
    """Volumes, masks and picks at the places where copick looks for them in the folder of a run."""
    assert labels is not None
    written = [write_copick_tomogram(made.folder, made.truth, "truth")]
    if tomogram is not None:
        written.append(write_copick_tomogram(made.folder, tomogram, "wbp"))
    semantic = Volume(labels.semantic, made.voxel_size)
    written.append(write_copick_segmentation(made.folder, semantic, "all", multilabel=True))
    for name, poses in particles(made.specimen).items():
        grid = {"voxel_size": made.voxel_size, "volume_shape": made.volume_shape}
        written.append(write_copick_picks(made.folder, copick_name(name), poses, **grid))
    return written


def _write_specimen(made: Made) -> list[Path]:
    write_specimen(made.path("_specimen.npz"), made.specimen)
    return [made.path("_specimen.npz")]


def particles(specimen: Specimen) -> dict[str, Poses]:
    """Poses of the particles, by name. The subunits of a filament have its number, counted from 0."""
    found: dict[str, list[Poses]] = {}
    for poses, name, kind in zip(specimen.poses, specimen.names, specimen.kinds, strict=True):
        if kind in PARTICLES and len(poses.positions):
            found.setdefault(name, []).append(poses)
    return {name: parts[0] if len(parts) == 1 else _joined(parts) for name, parts in found.items()}


def _joined(parts: list[Poses]) -> Poses:
    """Copies of several molecules; instances are counted on, and copies on their own are instances then."""
    numbers: list[torch.Tensor] = []
    begin = 0
    for part in parts:
        mine = torch.arange(len(part.positions)) if part.instances is None else part.instances
        numbers.append(mine + begin)
        begin = int(numbers[-1].max()) + 1
    single = all(part.instances is None for part in parts)
    rotations, positions = (torch.cat([getattr(part, name) for part in parts]) for name in ("rotations", "positions"))
    return Poses(rotations, positions, None if single else torch.cat(numbers))


def copick_objects(numbers: dict[str, int], particles: set[str]) -> list[CopickObject]:
    """Objects of a copick project, of a catalogue of names and numbers."""
    return [CopickObject(copick_name(name), number, name in particles) for name, number in numbers.items()]
