"""Tilt series for training: finished datasets read as they are asked for, or series simulated on the fly.

Both give pairs (volume, images) with a channel in front: (1, z, y, x) and (1, tilt, y, x), the images in the order of
exposure. With `as_dict=True` they give {"x": volume, "y": images, "params": {"angles": (tilt,)}}, the form that
deepinv's Trainer prefers; it updates its operator, such as an `inverse.TiltProjection`, with the angles of each item.

Angles and shifts are those at which the images truly were taken, which is what an inversion needs. Where a description
has errors of the stage (`tilts.angle_error`, `shift_error`), what the stage told stands in the .mdoc and .rawtlt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch.utils.data import Dataset

from cryosim import config as configuration
from cryosim.acquisition.series import TiltSeries
from cryosim.config import RunConfig
from cryosim.core.volume import Volume
from cryosim.dataset import RUNS, complete_items
from cryosim.description import Description, describe, item_config, read_description
from cryosim.io.files import FormatError, read_text
from cryosim.io.mdoc import read_mdoc
from cryosim.io.mrc import read_stack, read_volume
from cryosim.run import tilt_series, true_volume
from cryosim.scene import build_specimen

Pair = tuple[torch.Tensor, torch.Tensor]
Transform = Callable[[torch.Tensor, torch.Tensor], Pair]


class TiltSeriesDataset(Dataset):
    """The complete items of a dataset on disk, read when they are asked for.

    Parameters
    ----------
    folder : str or path
        That `cryosim dataset` wrote to. Items without a valid DONE.json are left out.
    volume : str
        Which one: "truth" is <item>_truth.mrc [V]; another name another file of that pattern.
    images : str
        Which ones: "series" is <item>.mrc [e-/px]; another name, such as "even", <item>_<name>.mrc.
    as_dict : bool
        Whether to give {"x": volume, "y": images, "params": {"angles": (tilt,)}}, angles in [deg], in place of a pair.
    transform : callable, optional
        (volume, images) -> (volume, images), the last thing done to a pair: a crop, a normalisation.

    Attributes
    ----------
    folders : tuple of Path
        Of the items, in the order of their names. An item is `volume(i)` and `series(i)`, the latter with tilts and
        optics.

    Raises
    ------
    FormatError
        When there is no complete item, or, from an item, when one of its files is missing or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        volume: str = "truth",
        images: str = "series",
        as_dict: bool = False,
        transform: Transform | None = None,
    ) -> None:
        self.folders = tuple(complete_items(folder))
        if not self.folders:
            raise FormatError(
                Path(folder) / RUNS,
                "items",
                "one or more with a valid DONE.json",
                "none",
                "Is this a dataset's folder?",
            )
        self._names, self._as_dict, self._transform = (volume, images), as_dict, transform

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, i: int) -> Any:
        """(volume (1, z, y, x), images (1, tilt, y, x)), float32; or the dictionary with both, where asked for."""
        return _sample(self.volume(i), self.series(i), self._as_dict, self._transform)

    def volume(self, i: int) -> Volume:
        """The volume of item `i`."""
        folder = self.folders[i]
        return read_volume(folder / f"{folder.name}_{self._names[0]}.mrc")

    def series(self, i: int) -> TiltSeries:
        """The images of item `i` with what is known of them: true angles and shifts, doses, optics."""
        folder, images = self.folders[i], self._names[1]
        config = _parameters(folder / f"{folder.name}_parameters.yaml")
        beside = read_mdoc(folder / f"{folder.name}.mrc.mdoc")  # holds for every stack of an item
        stack = folder / (f"{folder.name}.mrc" if images == "series" else f"{folder.name}_{images}.mrc")
        values, pixel_size = read_stack(stack, pixel_size=config.detector.pixel_size)
        if len(values) != len(beside.sections):
            raise FormatError(stack, "sections", f"{len(beside.sections)}, one for each tilt", f"{len(values)}")
        tilts, optics = configuration.true_tilts(config), configuration.optics(config.optics)
        return TiltSeries(values[beside.sections], pixel_size, tilts, optics, beside.movies)


class SimulatedTiltSeries(Dataset):
    """The items of a dataset, simulated when they are asked for: no files, and as many as are wanted.

    Item i is what `cryosim dataset` writes, but for rounding to the types of files; of a description with movies it has
    other counts of the same expectation. Give a DataLoader workers, which simulate ahead of the training.

    Parameters
    ----------
    description : str or path, Description, or RunConfig
    length : int
        Items that there are; their description would give any number.
    start : int
        Index of the first: others than those that are kept for validation.
    as_dict, transform
        As in `TiltSeriesDataset`.

    Raises
    ------
    ConfigError
        For a description that cannot be used; from an item, when what was drawn for it does not go together.
    ValueError
        For a length or start that is none; from an item, when its molecules do not fit.
    """

    def __init__(
        self,
        description: str | Path | Description | RunConfig,
        length: int,
        *,
        start: int = 0,
        as_dict: bool = False,
        transform: Transform | None = None,
    ) -> None:
        if length < 1 or start < 0:
            raise ValueError(f"expected at least one item, from 0 or a later one on, got {length} from {start}.")
        if isinstance(description, RunConfig):
            description = describe(description.model_dump(exclude_unset=True))
        self.description = description if isinstance(description, Description) else read_description(description)
        self._indices, self._as_dict, self._transform = range(start, start + length), as_dict, transform

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Any:
        """(volume (1, z, y, x), images (1, tilt, y, x)), float32; or the dictionary with both, where asked for."""
        return _sample(*simulated(self.config(i), self.description.base), self._as_dict, self._transform)

    def config(self, i: int) -> RunConfig:
        """The run that makes item `i`."""
        return item_config(self.description, self._indices[i])


def simulated(config: RunConfig, base: str | Path = ".") -> tuple[Volume, TiltSeries]:
    """Potential [V] and images [e-/px] that `cryosim.run.run` would write, of a configuration without movies."""
    generator = torch.Generator().manual_seed(config.seed)
    specimen = build_specimen(config, base, generator)
    series = tilt_series(config, specimen, generator)
    return true_volume(config, specimen), series


def _parameters(path: Path) -> RunConfig:
    """The run that made an item."""
    try:
        given = yaml.safe_load(read_text(path))
        return RunConfig.model_validate({key: given[key] for key in RunConfig.model_fields})
    except (yaml.YAMLError, ValidationError, KeyError, TypeError) as error:
        advice = "Read the item with the version that made it, or make it again."
        raise FormatError(path, "content", "the parameters of a run", f"{error}", advice) from error


def _sample(volume: Volume, series: TiltSeries, as_dict: bool, transform: Transform | None) -> Any:
    pair = volume.values[None].float(), series.images[None].float()
    x, y = pair if transform is None else transform(*pair)
    return {"x": x, "y": y, "params": {"angles": series.tilts.angles.clone()}} if as_dict else (x, y)
