"""Labels: which voxel belongs to which molecule, for training and testing segmentation and picking.

A voxel belongs to the copy that has a site nearest to its centre, and within the radius of that site. Sites are the
atoms, and points that fill the gaps between them, so that a molecule is solid whatever the voxel size (see
`molecular_shape`); its clefts and cavities, where there is water, belong to nobody. A coarse site, which stands for
many atoms, reaches two standard deviations of its Gaussian. Copies are entered one by one: memory is that of the
volumes, six bytes a voxel, and of one copy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from cryosim.specimen.atoms import Atoms
from cryosim.specimen.molecular_shape import ATOM, fillers, site_radii, voxels_near, without_hydrogens
from cryosim.specimen.specimen import Specimen


class Label(NamedTuple):
    """One thing in the volume.

    Attributes
    ----------
    instance : int
        Its number in `Labels.instances`.
    semantic : int
        Number of its molecule in `Labels.semantic`.
    molecule, kind : str
    copy : int
        The first of its copies among the poses of the molecule, from 0.
    copies : int
        How many it consists of: 1, or the subunits of a filament.
    position : (float, float, float)
        (x, y, z) [Å], mean of the positions of its copies; possibly outside the volume.
    volume : float
        Of its voxels [Å^3]; 0 where it lies outside the volume or has no voxel of its own.
    """

    instance: int
    semantic: int
    molecule: str
    kind: str
    copy: int
    copies: int
    position: tuple[float, float, float]
    volume: float


class Labels(NamedTuple):
    """Masks of a specimen.

    Attributes
    ----------
    instances : tensor (z, y, x), int32
        0 is nothing; things are numbered from 1, molecule by molecule.
    semantic : tensor (z, y, x), uint8
        0 is nothing; molecules are numbered from 1 in the order of the specimen.
    table : tuple of Label
        Row i is that of instance i + 1.
    kinds : dict of str to tuple of int
        Semantic numbers of each kind.
    voxel_size : float
        [Å].
    """

    instances: torch.Tensor
    semantic: torch.Tensor
    table: tuple[Label, ...]
    kinds: dict[str, tuple[int, ...]]
    voxel_size: float


def label_volumes(
    specimen: Specimen, shape: tuple[int, int, int], voxel_size: float, *, radius: float = ATOM
) -> Labels:
    """Instance and semantic labels of a specimen, untilted, on the grid of `potential_volume`.

    Parameters
    ----------
    specimen : Specimen
    shape : (int, int, int)
        (z, y, x) [voxel]; the origin is sample n // 2. What lies beyond is cut off.
    voxel_size : float
        [Å].
    radius : float
        Of an atom [Å]. 1.8 gives the van der Waals surface; a larger one a looser mask.

    Raises
    ------
    ValueError
        When a number is not positive, there are more than 255 molecules, or instances of a molecule are not one whole
        number a copy.
    """
    if len(shape) != 3 or min(shape) < 1 or not (0 < voxel_size < math.inf and 0 < radius < math.inf):
        raise ValueError(
            "label_volumes: expected a shape (z, y, x) of 1 or more voxels, a positive voxel_size and radius [Å], got "
            f"{tuple(shape)}, {voxel_size} and {radius}."
        )
    if len(specimen.molecules) > 255:
        raise ValueError(
            f"label_volumes: expected at most 255 molecules in 8 bits, got {len(specimen.molecules)}. Join those of "
            "one kind."
        )
    instances = np.zeros(shape, dtype=np.int32)
    nearness = np.zeros(shape, dtype=np.uint8)
    rows: list[Label] = []
    semantic_of = [0]
    for number, (molecule, poses) in enumerate(zip(specimen.molecules, specimen.poses, strict=True), 1):
        groups = _groups(poses.instances, len(poses.positions), specimen.names[number - 1])
        sites = _sites(molecule, radius) if groups else []
        for copies in groups:
            rows.append(_row(specimen, number, copies, len(rows) + 1))
            semantic_of.append(number)
            for copy in copies:
                rotation, position = (_array(of[copy]) for of in (poses.rotations, poses.positions))
                _enter(instances, nearness, sites, rotation, position, voxel_size, len(rows))
    counts = np.zeros(len(rows) + 1, dtype=np.int64)
    semantic = np.empty(shape, dtype=np.uint8)
    for plane, labels in zip(semantic, instances, strict=True):
        plane[:] = np.array(semantic_of, dtype=np.uint8)[labels]
        counts += np.bincount(labels.ravel(), minlength=len(counts))
    table = tuple(row._replace(volume=float(counts[row.instance]) * voxel_size**3) for row in rows)
    kinds: dict[str, tuple[int, ...]] = {}
    for number, kind in enumerate(specimen.kinds, 1):
        kinds[kind] = (*kinds.get(kind, ()), number)
    return Labels(torch.from_numpy(instances), torch.from_numpy(semantic), table, kinds, voxel_size)


def _enter(
    instances: np.ndarray,
    nearness: np.ndarray,
    sites: list[tuple[np.ndarray, float]],
    rotation: np.ndarray,
    position: np.ndarray,
    voxel_size: float,
    instance: int,
) -> None:
    """Give a copy the voxels to which it is nearer than the copies before it.

    Nearness is 255 at a site and 1 at its radius: of two copies that are equally near to 1/250 of it, the first stays.
    """
    shape = instances.shape
    half = np.array([n // 2 for n in shape[::-1]])
    flat, near = instances.reshape(-1), nearness.reshape(-1)
    for places, radius in sites:
        reach = radius / voxel_size
        at = (places @ rotation.T + position) / voxel_size + half
        for where, squared in voxels_near(at, reach, shape):
            value = (255 - 254 * np.sqrt(squared) / np.float32(reach)).astype(np.uint8)
            nearer = value > near[where]
            where, value = where[nearer], value[nearer]
            flat[where] = instance
            np.maximum.at(near, where, value)


def _sites(molecule: Atoms, radius: float) -> list[tuple[np.ndarray, float]]:
    """Places (site, 3) [Å] of each radius [Å]: atoms, then what fills the gaps between them."""
    molecule = without_hydrogens(molecule)
    places, radii = _array(molecule.positions), site_radii(molecule, radius)
    groups = [(places[radii == r], float(r)) for r in np.unique(radii)]
    filling = fillers(molecule, radius)
    return groups if filling is None else [*groups, filling]


def _groups(instances: torch.Tensor | None, n: int, name: str) -> list[list[int]]:
    """Copies of each thing, things in the order of their first copies."""
    if instances is None:
        return [[i] for i in range(n)]
    if tuple(instances.shape) != (n,) or instances.is_floating_point():
        raise ValueError(
            f"label_volumes: expected a whole number for each of {n} copies of {name}, got {tuple(instances.shape)} "
            f"{instances.dtype}."
        )
    groups: dict[int, list[int]] = {}
    for copy, instance in enumerate(instances.tolist()):
        groups.setdefault(instance, []).append(copy)
    return list(groups.values())


def _row(specimen: Specimen, number: int, copies: list[int], instance: int) -> Label:
    x, y, z = _array(specimen.poses[number - 1].positions)[copies].mean(0).tolist()
    name, kind = specimen.names[number - 1], specimen.kinds[number - 1]
    return Label(instance, number, name, kind, copies[0], len(copies), (x, y, z), 0.0)


def _array(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
