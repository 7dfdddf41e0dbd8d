"""From a description of scenes to a weights file: simulate the truth, train on it, write what was learned and its card.

Beside the file stands, while it is made, a folder `NAME.work` with one file for each scene and the state of the
training; a run that was stopped goes on from there. Only the potential of the scenes is computed, not their images.
"""

from __future__ import annotations

import hashlib
import math
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cryosim.cluster import outcomes
from cryosim.core.volume import Volume
from cryosim.description import Description, item_config, read_description
from cryosim.io.files import FormatError, write_text
from cryosim.run import true_volume
from cryosim.scene import Structures, build_specimen
from cryosim.training import TiltSeriesDataset
from inverse.priors.denoiser import NoiseConditionalUNet
from inverse.train import Plan, train_denoiser
from inverse.weights import read_tensors, write_network, write_tensors

Report = Callable[[str, int, int], None]

_AT_ONCE = 4  # scenes that one process makes of structures it has read
_FEWEST = 0.5  # of the scenes that must come about


class Scenes(NamedTuple):
    """What a process is told to make: items of a description, into a folder."""

    description: Description
    items: tuple[int, ...]
    folder: Path


def train_to(
    path: str | Path,
    source: str | Path,
    *,
    scenes: int = 60,
    plan: Plan | None = None,
    network: NoiseConditionalUNet | None = None,
    resume: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Report | None = None,
) -> Path:
    """Train a denoiser on simulated scenes, and write its weights.

    Parameters
    ----------
    path : str or path
        NAME.safetensors; NAME.md, its card, is written beside it.
    source : str or path
        Description of scenes (.yaml), as for `cryosim dataset`; or the folder of such a dataset, whose truth is taken.
    scenes : int
        How many to make of a description.
    plan : Plan, optional
        How to train.
    network : NoiseConditionalUNet, optional
        Anything but the usual widths.
    resume : bool
        Go on where a run with the same arguments was stopped.
    workers, scheduler
        Of the simulation, as in `cryosim.cluster.outcomes`.
    progress : callable, optional
        Called with (what, done, in all).

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        When fewer than half of the scenes come about, or volumes are smaller than a crop.
    cryosim.io.FormatError, cryosim.config.ConfigError
        For a source that cannot be used, or a state of another plan.
    """
    path, source, plan = Path(path), Path(source), plan or Plan()
    report = progress or (lambda what, done, total: None)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors.")
    work = path.with_suffix(".work")
    if not resume and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if source.is_dir():
        dataset = TiltSeriesDataset(source)
        volumes = [dataset.volume(i) for i in range(len(dataset))]
        made_of = f"{len(volumes)} volumes of the dataset {source.name}"
    else:
        volumes = scene_volumes(source, scenes, work, workers=workers, scheduler=scheduler, progress=report)
        digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
        made_of = f"{len(volumes)} of {scenes} scenes of {source.name} (SHA-256 {digest}...)"
    simulated = time.monotonic() - start
    network = network or new_network(volumes, plan.seed)
    trained = train_denoiser(
        network,
        [volume.values for volume in volumes],
        plan,
        state=work / "state.safetensors",
        resume=resume,
        progress=lambda done, total: report("training", done, total),
    )
    facts = {
        "data": made_of,
        "plan": repr(plan),
        "hours": f"{simulated / 3600:.2f} for the scenes, {(time.monotonic() - start - simulated) / 3600:.2f} to train",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }
    write_network(path, trained, facts)
    write_text(path.with_suffix(".md"), _card(path.stem, trained, facts))
    shutil.rmtree(work)
    return path


def new_network(volumes: list[Volume], seed: int) -> NoiseConditionalUNet:
    """The usual network for volumes of such contrast and voxel sizes, its weights drawn from `seed`."""
    variance = sum(float(volume.values.double().var()) for volume in volumes) / len(volumes)
    if not 0 < variance < math.inf:
        raise ValueError(f"train: expected volumes with something in them, got a variance of {variance}.")
    sizes = [float(volume.voxel_size) for volume in volumes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = variance**0.5
        levels = (0.04 * scale, 12 * scale)
        return NoiseConditionalUNet(scale=scale, voxel_sizes=(min(sizes), max(sizes)), noise_levels=levels)


def scene_volumes(
    source: str | Path,
    scenes: int,
    folder: Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Report | None = None,
) -> list[Volume]:
    """Potential [V] of the first `scenes` items of a description; what lies in `folder` already is not made again.

    Items whose contents do not go together are left out, with a warning.
    """
    description = read_description(source)
    missing = [i for i in range(scenes) if not _file(folder, i).exists()]
    tasks = [
        Scenes(description, tuple(missing[i : i + _AT_ONCE]), folder.resolve())
        for i in range(0, len(missing), _AT_ONCE)
    ]
    done, failed = scenes - len(missing), []
    for task, outcome in outcomes(make_scenes, tasks, workers=workers, scheduler=scheduler):
        if isinstance(outcome, Exception):
            raise outcome
        failed += outcome
        done += len(task.items)
        if progress:
            progress("simulating scenes", done, scenes)
    if failed:
        warnings.warn(
            f"train: {len(failed)} of {scenes} scenes left out; the first: {failed[0]}", UserWarning, stacklevel=3
        )
    if len(failed) > (1 - _FEWEST) * scenes:
        raise ValueError(
            f"train: expected scenes that come about, got {len(failed)} of {scenes} that do not: {failed[0]}"
        )
    return [_read(_file(folder, i)) for i in range(scenes) if _file(folder, i).exists()]


def make_scenes(task: Scenes) -> list[str]:
    """Make and write scenes, in whatever process; what kept some from coming about."""
    read, failed = Structures(task.description.base), []
    for i in task.items:
        config = item_config(task.description, i)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a crowd that is thinner than was asked for
                specimen = build_specimen(config, read, torch.Generator().manual_seed(config.seed))
        except FormatError:
            raise
        except ValueError as error:
            failed.append(f"scene {i}: {error}")
            continue
        volume = true_volume(config, specimen)
        text = {"voxel_size": repr(float(volume.voxel_size))}
        write_tensors(_file(task.folder, i), {"volume": volume.values.float()}, text)
    return failed


def _file(folder: Path, i: int) -> Path:
    return folder / f"scene_{i:05d}.safetensors"


def _read(path: Path) -> Volume:
    tensors, text = read_tensors(path)
    return Volume(tensors["volume"], float(text["voxel_size"]))


def _card(name: str, network: NoiseConditionalUNet, facts: dict[str, str]) -> str:
    """What a person should know of the weights, in Markdown."""
    low, high = network.voxel_sizes
    quiet, loud = network.noise_levels
    lines = [
        f"# {name}",
        "",
        f"A denoiser D(x, sigma) of volumes in volts, voxels of {low:.3g} to {high:.3g} Å, sigma of {quiet:.2g} to "
        f"{loud:.2g} V. `inverse.load_denoiser` reads it.",
        "",
        f"- Network: {type(network).__name__}, widths {tuple(network.widths)}, "
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} million weights, in float16.",
        *(f"- {key.capitalize()}: {value}." for key, value in facts.items()),
        "",
    ]
    return "\n".join(lines)
