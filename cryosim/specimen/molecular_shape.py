"""The shape of a molecule: the solid its atoms make, without the gaps between them.

The solid is the solvent-excluded volume (Richards 1977, doi:10.1146/annurev.bb.06.060177.001055; Connolly 1983,
doi:10.1126/science.6879170): all places that no part of a probe the size of a water molecule can reach without
cutting into an atom. It is what stays after the atoms, as balls, have been grown by the radius of the probe and the
grown body shrunk by the same. Clefts, channels and cavities that hold a water are outside it: the hollow of
apoferritin is no part of its volume.

Other molecules do not get everywhere a water does. A place is *narrow* where a ball of 6 Å, a thin helix, does not get
from outside, and *closed* where a ball of 10 Å, less than any folded protein, has room but does not get: the hollow of
apoferritin is closed by pores 4 Å wide. The envelope is the solid with its narrow and its closed places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage

from cryosim.core.record import Record, static
from cryosim.specimen.atoms import Atoms

ATOM = 1.8
"""Radius of an atom with its hydrogens [Å]: the united atoms of proteins have 1.4 to 1.9 (Tsai, Taylor, Chothia &
Gerstein 1999, doi:10.1006/jmbi.1999.2829, table 2)."""

PROBE = 1.4
"""Radius of a water molecule [Å] (Lee & Richards 1971, doi:10.1016/0022-2836(71)90324-X)."""

COARSE = 300.0
"""B-factor [Å^2] above which an atom is a coarse site that stands for many: 2 <u^2>^(1/2) is then 3.9 Å."""

NARROW, INTRUDER = 6.0, 10.0
"""Radii of the balls that tell what is narrow and what is closed [Å]."""

_FINEST, _MOST_VOXELS = 0.9, 3_000_000
_LARGEST = 1e8  # box about a molecule [Å^3] that is looked through for gaps, four times that of a ribosome
_AT_ONCE = 300_000  # pairs of a point and a voxel


class MolecularShape(Record):
    """A molecule as a solid on a grid of its own.

    Attributes
    ----------
    solid : tensor (z, y, x), bool
        Voxels whose centre lies in the solvent-excluded volume.
    depth : tensor (z, y, x)
        Of the centres below the surface of the envelope [Å]; 0 outside.
    first : tensor (3,)
        (x, y, z) of the centre of voxel 0 [Å].
    spacing : float
        Of the voxels [Å].
    """

    solid: torch.Tensor
    depth: torch.Tensor
    first: torch.Tensor
    spacing: float = static()

    @property
    def volume(self) -> float:
        """Solvent-excluded volume [Å^3]."""
        return float(self.solid.sum()) * self.spacing**3


def molecular_shape(atoms: Atoms, *, radius: float = ATOM, spacing: float | None = None) -> MolecularShape:
    """Shape of a molecule.

    A coarse site reaches two standard deviations of the Gaussian it stands for, if that is more than `radius`.

    Parameters
    ----------
    atoms : Atoms
        Hydrogens are left out where there are other atoms: the radius of these holds them.
    radius : float
        Of an atom with its hydrogens [Å].
    spacing : float, optional
        Of the voxels [Å]; 0.9, or what makes three million of them, when left out.

    Raises
    ------
    ValueError
        When there are no atoms, positions are not finite, or the spacing makes more than 48 million voxels.
    """
    solid, first, spacing = _solid(atoms, radius, spacing)
    depth = _depth(_envelope(solid, spacing), spacing).astype(np.float32)
    return MolecularShape(torch.from_numpy(solid), torch.from_numpy(depth), torch.from_numpy(first), spacing)


def _solid(atoms: Atoms, radius: float, spacing: float | None) -> tuple[np.ndarray, np.ndarray, float]:
    """Solid (z, y, x), centre (3,) of voxel 0 [Å] and spacing [Å], as `molecular_shape` has them."""
    atoms = without_hydrogens(atoms)
    places, radii = atoms.positions.detach().double().cpu().numpy(), site_radii(atoms, radius)
    if len(places) == 0 or not np.isfinite(places).all():
        raise ValueError(f"molecular_shape: expected atoms at finite positions, got {atoms!r}.")
    margin = float(radii.max()) + PROBE
    extent = np.ptp(places, axis=0) + 2 * margin
    if spacing is None:
        spacing = max(_FINEST, float(np.prod(extent) / _MOST_VOXELS) ** (1 / 3))
    nx, ny, nz = (int(n) for n in np.ceil(extent / spacing) + 5)
    shape = (nz, ny, nx)
    if not spacing > 0 or math.prod(shape) > 16 * _MOST_VOXELS:
        raise ValueError(
            f"molecular_shape: expected a spacing [Å] that makes at most {16 * _MOST_VOXELS} voxels of the molecule, "
            f"{extent.max():.0f} Å wide, got {spacing}. Take a coarser one."
        )
    first = places.min(0) - margin - 2 * spacing
    room = np.full(math.prod(shape), np.inf, dtype=np.float32)  # to the surface of the nearest atom [Å]
    for r in np.unique(radii):
        centres, reach = (places[radii == r] - first) / spacing, (r + PROBE) / spacing + 2
        for where, squared in voxels_near(centres, reach, shape):
            np.minimum.at(room, where, np.sqrt(squared) * np.float32(spacing) - np.float32(r))
    return _excluded(room.reshape(shape), spacing), first, spacing


def without_hydrogens(atoms: Atoms) -> Atoms:
    """Atoms without hydrogens; all where there is nothing else."""
    heavy = atoms.numbers > 1
    return atoms.index(heavy) if bool(heavy.any()) else atoms


def site_radii(atoms: Atoms, radius: float) -> np.ndarray:
    """Radii (atom,) [Å]: `radius`, but for coarse sites two standard deviations, rounded up to 0.5 Å, if more."""
    b_factors = atoms.b_factors.detach().double().cpu().numpy()
    twice = np.sqrt(np.maximum(b_factors, 0.0) / (2 * math.pi**2))  # 2 <u^2>^(1/2) [Å]
    return np.where(b_factors > COARSE, np.maximum(np.ceil(2 * twice - 1e-3) / 2, radius), radius)


def fillers(atoms: Atoms, radius: float) -> tuple[np.ndarray, float] | None:
    """Points (point, 3) [Å] that fill what balls of `radius` [Å] about the atoms leave of the solid, and their radius.

    None where the gaps are none of its own: of coarse sites, and of a thing too large for a grid.
    """
    if len(atoms) == 0 or bool((atoms.b_factors > COARSE).any()):
        return None
    places = atoms.positions.detach().double().cpu().numpy()
    if np.prod(np.ptp(places, axis=0) + 2 * ATOM) > _LARGEST:
        return None
    left, first, spacing = _solid(atoms, radius, None)
    for where, _ in voxels_near((places - first) / spacing, radius / spacing, left.shape):
        left.reshape(-1)[where] = False
    points = np.stack(np.nonzero(left)[::-1], -1) * spacing + first
    return points, 0.5 * 3**0.5 * spacing


def depth_at(shape: MolecularShape, places: np.ndarray) -> np.ndarray:
    """Depth (place,) [Å] of `places` (place, 3) [(x, y, z) Å], that of the nearest voxel."""
    depth = shape.depth.numpy()
    at = np.rint((places - shape.first.numpy()) / shape.spacing).astype(np.int64)
    at = np.clip(at, 0, np.array(depth.shape[::-1]) - 1)  # the outermost voxels are outside
    return depth[at[:, 2], at[:, 1], at[:, 0]]


def inscribed_ball(shape: MolecularShape) -> tuple[np.ndarray, float]:
    """Centre (3,) [(x, y, z) Å] and radius [Å] of the largest ball within the envelope."""
    depth = shape.depth.numpy()
    at = np.unravel_index(int(depth.argmax()), depth.shape)
    return shape.first.numpy() + shape.spacing * np.array(at[::-1], dtype=float), float(depth[at])


def voxels_near(
    places: np.ndarray, radius: float, shape: tuple[int, int, int], *, box: float = 0.0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Voxels of a grid near some places, in parts.

    Parameters
    ----------
    places : array (place, 3)
        (x, y, z) [voxel]: voxel i has its centre at i.
    radius : float
        [voxel].
    shape : (int, int, int)
        (z, y, x) of the grid; nothing beyond it is given.
    box : float
        0 measures the distance to the centre of a voxel, 0.5 that to the nearest point of it.

    Yields
    ------
    where : array (pair,)
        Flat indices; a voxel near several places comes several times.
    squared : array (pair,)
        Squared distances [voxel^2].
    """
    n = int(2 * (radius + box)) + 1
    steps = np.arange(n, dtype=np.int32)
    index = np.int32 if math.prod(shape) < 2**31 else np.int64
    places = places[((places > -radius - 1) & (places < np.array(shape[::-1]) + radius)).all(1)]
    at_once = max(1, _AT_ONCE // n**3)
    for part in range(0, len(places), at_once):
        along, squares = [], []
        for axis, length in ((2, shape[0]), (1, shape[1]), (0, shape[2])):
            p = places[part : part + at_once, axis, None]
            k = np.ceil(p - (radius + box)).astype(np.int32) + steps  # (place, n)
            away = np.maximum(np.abs(k - p) - box, 0.0).astype(np.float32)
            squares.append(np.where((k >= 0) & (k < length), away * away, np.float32(np.inf)))
            along.append(k.astype(index))
        (kz, ky, kx), (dz, dy, dx) = along, squares
        squared = (dz[:, :, None] + dy[:, None, :])[..., None] + dx[:, None, None, :]
        flat = ((kz[:, :, None] * shape[1] + ky[:, None, :]) * shape[2])[..., None] + kx[:, None, None, :]
        near = squared <= np.float32(radius * radius)
        yield flat[near], squared[near]


def _excluded(room: np.ndarray, spacing: float) -> np.ndarray:
    """Voxels that no probe reaches, where `room` [Å] is the radius of the largest ball about each that cuts no atom.

    A probe reaches all of every such ball larger than itself: balls that just touch an atom give its surface exactly,
    wherever the grid lies. The tightest places have no grid point at their middle, for which a fifth of a voxel is
    allowed: with it the volumes of ubiquitin, apoferritin and the ribosome change by 2 % between 0.8 and 1.6 Å.
    """
    n = int(PROBE / spacing + 1)
    solid = np.ones(room.shape, dtype=bool)
    for step in np.ndindex(2 * n + 1, 2 * n + 1, 2 * n + 1):
        offset = np.array(step) - n
        distance = spacing * float(np.sqrt((offset**2).sum()))
        if distance <= PROBE + spacing:
            here = tuple(slice(max(o, 0), min(m, m + o)) for o, m in zip(offset, room.shape, strict=True))
            there = tuple(slice(max(-o, 0), min(m, m - o)) for o, m in zip(offset, room.shape, strict=True))
            solid[here] &= room[there] < max(PROBE, distance) - 0.2 * spacing
    return solid


def _depth(solid: np.ndarray, spacing: float) -> np.ndarray:
    """Depth [Å] of the centre of each voxel of a solid: to the nearest centre outside, less half a voxel."""
    depth = ndimage.distance_transform_edt(solid)
    assert isinstance(depth, np.ndarray)
    return np.maximum(depth - 0.5, 0.0) * spacing


def _envelope(solid: np.ndarray, spacing: float) -> np.ndarray:
    """The solid, its narrow places and its closed places."""
    wide = math.ceil(INTRUDER / spacing) + 2
    free = _depth(np.pad(~solid, wide, constant_values=True), spacing)  # [Å] of room about each voxel
    reached = _grown(_parts(free > NARROW)[0], NARROW, spacing)
    shut = _grown(_parts(free > INTRUDER)[1], INTRUDER + NARROW, spacing)
    return (~reached | shut)[wide:-wide, wide:-wide, wide:-wide]


def _parts(room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is connected with the corner of the grid, and what is not."""
    parts, _ = ndimage.label(room)  # type: ignore[misc]
    outside = parts == parts[0, 0, 0]
    return outside, room & ~outside


def _grown(room: np.ndarray, by: float, spacing: float) -> np.ndarray:
    if not room.any():
        return room
    away = ndimage.distance_transform_edt(~room)
    assert isinstance(away, np.ndarray)
    return away * spacing <= by + 0.5 * spacing
