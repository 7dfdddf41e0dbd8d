"""copick projects: the folder layout of copick's filesystem backend (copick.github.io/copick, version 1.31).

    copick.json                                                          objects, and where the project lies
    ExperimentRuns/RUN/VoxelSpacing10.000/TYPE.zarr                      tomograms, OME-Zarr 0.4
    ExperimentRuns/RUN/Picks/USER_SESSION_OBJECT.json                    points of one kind of object
    ExperimentRuns/RUN/Segmentations/10.000_USER_SESSION_OBJECT.zarr     mask of one kind of object: 0 and 1
    ExperimentRuns/RUN/Segmentations/10.000_USER_SESSION_NAME-multilabel.zarr     masks of all, by their labels

Locations [Å] count from the first sample of the tomogram, so the specimen's origin is at (n // 2) * voxel_size. The
rotation of a pick takes the reference to the tomogram, as that of `Poses` does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cryosim.core.volume import Volume
from cryosim.io.files import write_text
from cryosim.io.store import write_zarr
from cryosim.specimen.specimen import Poses

_FORBIDDEN = r'[<>:"/\\|?*\x00-\x1F\x7F\s_]'  # in names, as copick has it: they are joined by underscores
_COLOURS = (
    (230, 159, 0, 255),
    (86, 180, 233, 255),
    (0, 158, 115, 255),
    (240, 228, 66, 255),
    (0, 114, 178, 255),
    (213, 94, 0, 255),
    (204, 121, 167, 255),
)
"""Okabe & Ito 2008, colours that most people can tell apart: jfly.uni-koeln.de/color."""


class CopickObject(NamedTuple):
    """A kind of object of a copick project.

    Attributes
    ----------
    name : str
        See `copick_name`.
    label : int
        Its number in masks of several kinds, 1 or more.
    is_particle : bool
        Whether it is picked by points; otherwise by a mask.
    radius : float or None
        At which it is shown [Å].
    pdb_id : str or None
    metadata : dict or None
        Anything else worth keeping, of numbers and text.
    """

    name: str
    label: int
    is_particle: bool = True
    radius: float | None = None
    pdb_id: str | None = None
    metadata: dict[str, Any] | None = None


def copick_name(text: str) -> str:
    """`text` as copick allows it for names: spaces, underscores and the like become dashes.

    Raises
    ------
    ValueError
        When nothing is left.
    """
    name = re.sub(_FORBIDDEN, "-", text).strip("-")
    if not name:
        raise ValueError(f"copick_name: expected a letter or digit at least, got {text!r}.")
    return name


def write_copick_config(
    path: str | Path,
    objects: Sequence[CopickObject],
    *,
    name: str = "cryosim",
    description: str = "Simulated by cryosim",
    user: str = "cryosim",
    session: str = "0",
    root: str = ".",
) -> None:
    """Write the configuration of a project.

    Parameters
    ----------
    path : str or path
        Usually copick.json.
    objects : sequence of CopickObject
    name, description : str
    user, session : str
        Under which whoever opens the project picks, unless they say otherwise.
    root : str
        Folder that holds ExperimentRuns. copick takes "." for the folder it is started in: start it beside the file,
        or give the whole path.

    Raises
    ------
    ValueError
        When a name is not allowed, or two objects have one name or label.
    """
    for what, text in (("user", user), ("session", session), *(("object", entry.name) for entry in objects)):
        _allowed(path, what, text)
    for what, values in (("name", [e.name for e in objects]), ("label", [e.label for e in objects])):
        if len(set(values)) < len(values):
            raise ValueError(f"{path}: objects: expected a {what} for each, got {values}.")
    for entry in objects:
        if entry.label < 1:
            raise ValueError(
                f"{path}: {entry.name}: expected a label of 1 or more, got {entry.label}; 0 is background."
            )
    content = {
        "config_type": "filesystem",
        "name": name,
        "description": description,
        "version": "1.0.0",
        "user_id": user,
        "session_id": session,
        "pickable_objects": [_object(entry, i) for i, entry in enumerate(objects)],
        "overlay_root": f"local://{root}",
        "overlay_fs_args": {"auto_mkdir": True},
    }
    _dump(path, content)


def write_copick_picks(
    run: str | Path,
    name: str,
    poses: Poses,
    *,
    voxel_size: float,
    volume_shape: tuple[int, int, int],
    user: str = "cryosim",
    session: str = "0",
    instances: torch.Tensor | None = None,
) -> Path:
    """Write the copies of one kind of object as picks of a run.

    Parameters
    ----------
    run : str or path
        Folder of the run, ExperimentRuns/RUN.
    name : str
        Of the object, as in the configuration.
    poses : Poses
        In the specimen.
    voxel_size : float
        Of the tomogram [Å].
    volume_shape : (int, int, int)
        (z, y, x) of the tomogram.
    user, session : str
        Who has picked.
    instances : tensor (copy,), optional
        Whole numbers of 0 or more; when left out those of the poses, counted from 1 (0 is none in copick), and 0 where
        they have none.

    Returns
    -------
    Path
        File written.

    Raises
    ------
    ValueError
        When a name is not allowed, a number is not finite, or shapes disagree.
    """
    path = _place(run, "Picks", f"{_names(run, user, session, name)}.json")
    voxel = _voxel(path, voxel_size)
    rotations, positions = (t.detach().cpu().to(torch.float64) for t in (poses.rotations, poses.positions))
    if rotations.shape != (len(positions), 3, 3) or positions.shape[1:] != (3,):
        raise ValueError(
            f"{path}: poses: expected rotations (copy, 3, 3) and positions (copy, 3), got {tuple(rotations.shape)} and "
            f"{tuple(positions.shape)}."
        )
    if not bool(torch.isfinite(rotations).all()) or not bool(torch.isfinite(positions).all()):
        raise ValueError(f"{path}: poses: expected finite numbers, got NaN or infinity.")
    origin = torch.tensor([n // 2 * voxel for n in reversed(volume_shape)], dtype=torch.float64)
    numbers = _instances(path, poses, instances)
    points = [
        {
            "location": dict(zip("xyz", (place + 0.0).tolist(), strict=True)),
            "transformation_": [[*row, 0.0] for row in turn.tolist()] + [[0.0, 0.0, 0.0, 1.0]],
            "instance_id": number,
            "score": 1.0,
        }
        for place, turn, number in zip(positions + origin, rotations, numbers, strict=True)
    ]
    content = {
        "pickable_object_name": name,
        "user_id": user,
        "session_id": session,
        "run_name": Path(run).name,
        "voxel_spacing": round(voxel, 3),
        "unit": "angstrom",
        "points": points,
        "trust_orientation": True,
    }
    _dump(path, content)
    return path


def write_copick_tomogram(run: str | Path, volume: Volume, tomogram_type: str, *, dtype: str | None = None) -> Path:
    """Write a tomogram (z, y, x) of a run; `dtype` and errors as in `write_zarr`. Returns the folder."""
    _allowed(run, "tomogram_type", tomogram_type)
    voxel = _voxel(run, volume.voxel_size)
    path = _place(run, f"VoxelSpacing{voxel:.3f}", f"{tomogram_type}.zarr")
    write_zarr(path, volume, dtype=dtype)
    return path


def write_copick_segmentation(
    run: str | Path,
    labels: Volume,
    name: str,
    *,
    multilabel: bool = False,
    user: str = "cryosim",
    session: str = "0",
) -> Path:
    """Write a mask of a run.

    Parameters
    ----------
    run : str or path
        Folder of the run, ExperimentRuns/RUN.
    labels : Volume
        Whole numbers (z, y, x): 0 and 1, or, with `multilabel`, the labels of the objects.
    name : str
        Of the object, as in the configuration; with `multilabel` any other name.
    multilabel : bool
    user, session : str
        Who has drawn it.

    Returns
    -------
    Path
        Folder written.

    Raises
    ------
    ValueError
        When a name is not allowed or a number is another.
    """
    names, voxel = _names(run, user, session, name), _voxel(run, labels.voxel_size)
    suffix = "-multilabel" if multilabel else ""
    path = _place(run, "Segmentations", f"{voxel:.3f}_{names}{suffix}.zarr")
    if labels.values.numel() and not multilabel and not bool(((labels.values == 0) | (labels.values == 1)).all()):
        raise ValueError(f"{path}: labels: expected 0 and 1, got others. Give multilabel=True for several objects.")
    write_zarr(path, labels, kind="labels")
    return path


def _object(entry: CopickObject, which: int) -> dict[str, Any]:
    told = {"radius": entry.radius, "pdb_id": entry.pdb_id, "metadata": entry.metadata}
    return {
        "name": entry.name,
        "is_particle": entry.is_particle,
        "label": entry.label,
        "color": list(_COLOURS[which % len(_COLOURS)]),
        **{key: value for key, value in told.items() if value is not None},
    }


def _instances(path: Path, poses: Poses, instances: torch.Tensor | None) -> list[int]:
    n = len(poses.positions)
    if instances is None:
        instances = torch.zeros(n, dtype=torch.long) if poses.instances is None else poses.instances + 1
    if instances.shape != (n,) or instances.is_floating_point() or bool((instances < 0).any()):
        raise ValueError(
            f"{path}: instances: expected {n} whole numbers of 0 or more, got {instances.dtype} "
            f"{tuple(instances.shape)}."
        )
    return instances.tolist()


def _names(run: str | Path, user: str, session: str, name: str) -> str:
    parts = {"user": user, "session": session, "name": name}
    return "_".join(_allowed(run, what, text) for what, text in parts.items())


def _allowed(path: str | Path, what: str, text: str) -> str:
    if not text or re.search(_FORBIDDEN, text) or text.strip("-") != text:
        raise ValueError(
            f'{path}: {what}: expected a name without spaces, underscores and any of < > : " / \\ | ? *, got {text!r}. '
            "See copick_name."
        )
    return text


def _voxel(path: str | Path, voxel_size: float | torch.Tensor) -> float:
    voxel = float(voxel_size)
    if not 0 < voxel < math.inf:
        raise ValueError(f"{path}: voxel_size: expected a positive number [Å], got {voxel}.")
    return voxel


def _place(run: str | Path, folder: str, name: str) -> Path:
    path = Path(run) / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _dump(path: str | Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
