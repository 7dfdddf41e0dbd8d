"""The room left in a box: a grid of what is taken, kept so that no atom ever comes nearer to another than a gap.

A voxel is taken when any of its points lies within the gap of an atom that stands in the box. An atom in a voxel that
is not taken is therefore at least a gap away from all others, wherever it lies within the voxel.

Of a large molecule not every atom is entered or asked about: its *skin*, the atoms near its surface, with the gap, and
its *core*, a lattice of points within, each for the voxel it lies in. The lattice is so dense that each voxel well
inside holds one, and the skin so deep that the voxels near the other atoms are all well inside. So the promise holds
for all atoms: were an atom of one molecule and an atom of another nearer than the gap, then the voxel of the first
would be taken by skin or core of the other, and would hold an atom or a core point of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from cryosim.specimen.atoms import Atoms
from cryosim.specimen.molecular_shape import depth_at, inscribed_ball, molecular_shape, voxels_near

_SCOUTS = 32  # points of a molecule that are asked about first
_MOST_CELLS = 1_000_000
FIXED = 128  # far above the number of molecules that can come near one voxel
_SLACK = 0.01  # [Å] for rounding


class Room(NamedTuple):
    """A box about the origin and what of it is taken.

    Attributes
    ----------
    taken : array (z, y, x), uint8
        By how many molecules, or `FIXED` for what never moves. The one thing here that changes.
    size : array (3,)
        (x, y, z) [Å].
    voxel_size : float
        [Å].
    gap : float
        [Å].
    margin : int
        Voxels before the lower corner of the box, and at least as many beyond the upper one.
    """

    taken: np.ndarray
    size: np.ndarray
    voxel_size: float
    gap: float
    margin: int


class Footprint(NamedTuple):
    """What of a molecule is asked about and entered.

    Attributes
    ----------
    skin, core : array (point, 3)
        Atoms near the surface, the first few far apart from each other, and a lattice within [Å].
    hull : array (point, 3)
        Corners of the convex hull of the atoms [Å].
    volume : float
        Solvent-excluded [Å^3].
    centre : array (3,)
        Of the largest ball in the molecule [Å].
    radius : float
        About the centre, within which every voxel holds a point of the core [Å], if any.
    """

    skin: np.ndarray
    core: np.ndarray
    hull: np.ndarray
    volume: float
    centre: np.ndarray
    radius: float


class Standing(NamedTuple):
    """A copy that stands in a room.

    Attributes
    ----------
    rotation : array (3, 3)
    position : array (3,)
        [Å].
    low, high : array (3,)
        Corners of the box about its atoms [Å].
    holds, takes : array (voxel,)
        Flat indices of the voxels that hold its skin and core, and of those it takes from others.
    """

    rotation: np.ndarray
    position: np.ndarray
    low: np.ndarray
    high: np.ndarray
    holds: np.ndarray
    takes: np.ndarray


class Cells(NamedTuple):
    """Cubes that together hold every place where the centre of a molecule can stand.

    Attributes
    ----------
    corners : array (cell, 3), int
        (x, y, z) of the lower corners [cell].
    size : float
        [Å].
    origin : array (3,)
        Lower corner of cell 0 [Å].
    """

    corners: np.ndarray
    size: float
    origin: np.ndarray


def empty_room(size: tuple[float, float, float], voxel_size: float, gap: float) -> Room:
    """A box with nothing in it."""
    margin = int(np.ceil((gap + _SLACK) / voxel_size)) + 1
    shape = (np.array(size) / voxel_size).astype(int)[::-1] + 1 + 2 * margin
    taken = np.full(shape, FIXED, dtype=np.uint8)
    taken[margin:-margin, margin:-margin, margin:-margin] = 0
    return Room(taken, np.array(size, dtype=float), voxel_size, gap, margin)


def footprint(atoms: Atoms, voxel_size: float, gap: float) -> Footprint:
    """Footprint of a molecule in a room of such voxels and gap; errors as in `molecular_shape`."""
    shape = molecular_shape(atoms)
    places = atoms.positions.detach().double().cpu().numpy()
    within = 1.5 + shape.spacing  # depth from which on there is a core [Å]
    skin_depth = within + gap + 3**0.5 * (voxel_size + 2 * shape.spacing)
    skin = places[depth_at(shape, places) < skin_depth]
    spacing = voxel_size / 3**0.5  # no point is further than half a voxel from the lattice
    low, high = places.min(0), places.max(0)
    axes = [np.arange(a, b + spacing, spacing) for a, b in zip(low, high, strict=True)]
    lattice = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    core = lattice[depth_at(shape, lattice) >= within]
    centre, radius = inscribed_ball(shape)
    least = radius - within - 3**0.5 * shape.spacing
    return Footprint(_apart_first(skin), core, _hull(skin), shape.volume, centre, least)


def enter(room: Room, footprint: Footprint, rotation: np.ndarray, position: np.ndarray) -> Standing:
    """Put a molecule in the room."""
    skin = footprint.skin @ rotation.T + position
    core = footprint.core @ rotation.T + position
    low, high = skin.min(0), skin.max(0)
    first, last = (_index(room, corner) for corner in (low, high))
    first, last = first - room.margin, last + room.margin  # of the voxels that it can take
    nx, ny, nz = (int(n) for n in last - first + 1)
    shape = (nz, ny, nx)
    held = np.zeros(shape, dtype=bool)
    at = _index(room, skin) - first
    for index in (at, _index(room, core) - first):
        held[index[:, 2], index[:, 1], index[:, 0]] = True
    # an atom in a voxel with none but held ones about it takes nothing that is not taken anyhow
    amid = np.asarray(ndimage.minimum_filter(held, 2 * room.margin - 1, mode="constant"), dtype=bool)
    outer = skin[~amid[at[:, 2], at[:, 1], at[:, 0]]]
    local = held.copy()
    for where, _ in voxels_near(_fractional(room, outer) - first, _reach(room, room.gap), shape, box=0.5):
        local.reshape(-1)[where] = True
    holds, takes = (_flat(room, np.stack(np.nonzero(g)[::-1], -1) + first) for g in (held, local))
    room.taken.reshape(-1)[takes] += 1
    return Standing(rotation, position, low, high, holds, takes)


def enter_atoms(room: Room, places: np.ndarray, radius: float) -> None:
    """Take all voxels nearer than `radius` [Å] to `places` (place, 3) [Å], for good."""
    taken = room.taken.reshape(-1)
    for where, _ in voxels_near(_fractional(room, places), _reach(room, radius), room.taken.shape, box=0.5):  # type: ignore[arg-type]
        taken[where] = FIXED


def moved(room: Room, standing: Standing, steps: np.ndarray) -> Standing | None:
    """The copy moved by whole voxels `steps` (3,), or None where it does not fit there."""
    shift = steps * room.voxel_size
    low, high = standing.low + shift, standing.high + shift
    if (low < -room.size / 2).any() or (high > room.size / 2).any():
        return None
    taken = room.taken.reshape(-1)
    step = int((steps[2] * room.taken.shape[1] + steps[1]) * room.taken.shape[2] + steps[0])
    taken[standing.takes] -= 1
    holds = standing.holds + step
    if taken[holds].any():
        taken[standing.takes] += 1
        return None
    takes = standing.takes + step
    taken[takes] += 1
    return Standing(standing.rotation, standing.position + shift, low, high, holds, takes)


def fits(room: Room, footprint: Footprint, rotation: np.ndarray, position: np.ndarray) -> bool:
    """Whether a molecule stands in the box, and at least the gap away from all that is in it."""
    few, rest = footprint.skin[: 16 * _SCOUTS], footprint.skin[16 * _SCOUTS :]
    return all(
        len(part) == 0 or bool(_free(room, rotation @ part.T + position[:, None]).all())
        for part in (few, rest, footprint.core)
    )


def may_fit(room: Room, footprint: Footprint, rotations: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Indices of the poses that are not ruled out by a few atoms far apart from each other."""
    left = np.arange(len(positions))
    for scouts in (footprint.skin[:4], footprint.skin[4:_SCOUTS]):
        if len(scouts) and len(left):
            places = rotations[left] @ scouts.T + positions[left][:, :, None]  # (pose, 3, scout)
            left = left[_free(room, places.transpose(1, 0, 2)).all(1)]
    return left


def cells_for(room: Room, radius: float) -> Cells:
    """Cells that hold every centre of a molecule whose voxels within `radius` [Å] must not be taken.

    A cell whose voxels are all taken must be further than the radius from the centre. Both are known to half the
    diagonal of a cell.
    """
    h = room.voxel_size
    m = max(1, int(radius / (6 * h)), int(np.ceil((room.taken.size / _MOST_CELLS) ** (1 / 3))))
    full = room.taken != 0
    if m > 1:
        for axis in range(3):
            full = np.logical_and.reduceat(full, np.arange(0, full.shape[axis], m), axis=axis)
    away = ndimage.distance_transform_edt(np.pad(~full, 1))  # nothing is free beyond the grid
    assert isinstance(away, np.ndarray)
    size = m * h
    least = max(radius - 0.5 * h - 3**0.5 * (size if m > 1 else 0.5 * h), 0.0)
    z, y, x = np.nonzero((away[1:-1, 1:-1, 1:-1] * size > least) & ~full)
    return Cells(np.stack([x, y, z], -1), size, -room.size / 2 - room.margin * h)


def _reach(room: Room, radius: float) -> float:
    return (radius + _SLACK) / room.voxel_size


def _fractional(room: Room, places: np.ndarray) -> np.ndarray:
    """`places` (place, 3) [Å] in voxels, whose centres are whole numbers."""
    return (places + room.size / 2) / room.voxel_size + (room.margin - 0.5)


def _index(room: Room, places: np.ndarray) -> np.ndarray:
    """(x, y, z) of the voxels that hold `places` (..., 3) [Å] in the box."""
    return np.floor((places + room.size / 2) / room.voxel_size).astype(np.int64) + room.margin


def _flat(room: Room, index: np.ndarray) -> np.ndarray:
    flat = (index[:, 2] * room.taken.shape[1] + index[:, 1]) * room.taken.shape[2] + index[:, 0]
    return flat.astype(np.int32 if room.taken.size < 2**31 else np.int64)


def _free(room: Room, places: np.ndarray) -> np.ndarray:
    """Whether `places` (3, ...) [Å] are in the box and in voxels that are not taken."""
    inside = np.ones(places.shape[1:], dtype=bool)
    flat = np.zeros(places.shape[1:], dtype=np.int64)
    for axis in (2, 1, 0):
        along = places[axis]
        inside &= np.abs(along) <= room.size[axis] / 2
        index = ((along + room.size[axis] / 2) / room.voxel_size + room.margin).astype(np.int64)
        flat = flat * room.taken.shape[2 - axis] + index
    flat[~inside] = 0
    return (room.taken.reshape(-1)[flat] == 0) & inside


def _hull(places: np.ndarray) -> np.ndarray:
    """Corners of the convex hull; all places where they lie in a plane."""
    try:
        return places[ConvexHull(places).vertices]
    except QhullError:
        return places


def _apart_first(places: np.ndarray) -> np.ndarray:
    """The same places; each of the first few is the one furthest from those before it."""
    order = np.arange(len(places))
    if len(places) > _SCOUTS:
        away = ((places - places.mean(0)) ** 2).sum(1)
        chosen = []
        for _ in range(_SCOUTS):
            chosen.append(int(away.argmax()))
            new = ((places - places[chosen[-1]]) ** 2).sum(1)
            away = new if len(chosen) == 1 else np.minimum(away, new)
        rest = np.setdiff1d(order, chosen)
        order = np.concatenate([chosen, rest[np.argsort((rest * 7919) % len(places), kind="stable")]])
    return places[order].astype(float)
