"""Crowded specimens: molecules placed at random without overlap, by their shape.

Random sequential addition (Widom 1966, doi:10.1063/1.1726548): poses are proposed uniformly, and one that fits is kept
for good. It fills up near 0.38 of the volume for equal spheres (Talbot, Schaaf & Tarjus 1991,
doi:10.1080/00268979100100981) and above that for mixtures, the larger molecules placed first. So that few proposals
are made in vain when there is little room left, they are drawn only from cells that the largest ball in the molecule
does not rule out; what is left out could not have been kept. When fewer than one proposal in a hundred fits, the copies
that stand are moved at random without overlap, as hard bodies in a Monte Carlo simulation, to make room for more.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from cryosim.core.record import Record, static
from cryosim.core.rotation import random_rotations
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.free_room import (
    FIXED,
    Cells,
    Footprint,
    Room,
    Standing,
    cells_for,
    empty_room,
    enter,
    enter_atoms,
    fits,
    footprint,
    may_fit,
    moved,
)
from cryosim.specimen.ice import Ice, thinnest
from cryosim.specimen.molecular_shape import site_radii
from cryosim.specimen.specimen import Poses, Specimen

Allowed = Callable[[torch.Tensor], torch.Tensor] | torch.Tensor
"""Where atoms may be: a function of positions (n, 3) [Å] with values (n,) bool, or a volume (z, y, x) bool."""

_Where = Callable[[np.ndarray], np.ndarray]  # the same, of arrays

_FINEST, _COARSEST = 1.0, 8.0  # voxels [Å] that are chosen without being asked
_USUAL_VOXELS, _MOST_VOXELS = 270_000_000, 1_000_000_000
_AT_ONCE = 500_000
_FEWEST, _MOST_PROPOSALS = 16, 4096
_LOOKS, _SWEEPS = 4, 4  # looks at what is free during `tries`; moves of each copy in between
_A_MOVE = 200  # proposals that take as long as a few moves of one copy
_SCARCE = 0.01  # share of the proposals that fit below which room is made by moving


class Interface(Record):
    """How molecules stick to the air-water interfaces.

    Attributes
    ----------
    fraction : float
        Of the copies [1].
    side : {"both", "top", "bottom"}
        Top is at positive z, where the beam leaves; both is half each, the odd copy at the top.
    depth : float
        The atom nearest to the surface is uniformly 0 to `depth` away from it [Å].
    axis : (float, float, float)
        Of the molecule, that points out of the ice.
    spread : float
        Standard deviation [deg] of the axis about the normal along each of two directions: von Mises-Fisher with the
        concentration 1 / spread^2 [rad]. The turn about the axis and about the normal is uniform. inf has no
        preference.

    Raises
    ------
    ValueError
        When a number is out of bounds.
    """

    fraction: float = static(default=1.0)
    side: Literal["both", "top", "bottom"] = static(default="both")
    depth: float = static(default=20.0)
    axis: tuple[float, float, float] = static(default=(0.0, 0.0, 1.0))
    spread: float = static(default=15.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", tuple(float(a) for a in self.axis))
        length = math.hypot(*self.axis)
        if not (0 <= self.fraction <= 1 and self.depth >= 0 and self.spread > 0):
            raise ValueError(
                "Interface: expected a fraction from 0 to 1, a depth of 0 or more [Å] and a positive spread [deg], got "
                f"{self.fraction}, {self.depth} and {self.spread}."
            )
        if self.side not in ("both", "top", "bottom"):
            raise ValueError(f"Interface.side: expected 'both', 'top' or 'bottom', got {self.side!r}.")
        if len(self.axis) != 3 or not 0 < length < math.inf:
            raise ValueError(f"Interface.axis: expected a direction (x, y, z), got {self.axis}.")


class Species(Record):
    """A molecule, and how much of it there is.

    Attributes
    ----------
    atoms : Atoms
        Centred where it is placed, as by `Atoms.centred`.
    name, kind : str
        As in `Specimen`.
    abundance : float
        Number of copies relative to the other species.
    copies : int or None
        Exact number instead.
    interface : Interface or None

    Raises
    ------
    ValueError
        When the abundance is not positive or the copies are negative.
    """

    atoms: Atoms
    name: str = static()
    kind: str = static(default="protein")
    abundance: float = static(default=1.0)
    copies: int | None = static(default=None)
    interface: Interface | None = None

    def __post_init__(self) -> None:
        if not 0 < self.abundance < math.inf or (self.copies is not None and self.copies < 0):
            raise ValueError(
                f"Species {self.name}: expected a positive abundance, and 0 or more copies if any are given, got "
                f"{self.abundance} and {self.copies}."
            )


class Crowd(NamedTuple):
    """A crowded specimen.

    Attributes
    ----------
    specimen : Specimen
        The molecules of the obstacles first, then the species.
    occupancy : float
        Solvent-excluded volume of the copies placed over the volume of the box [1]; obstacles do not count.
    copies, asked : tuple of int
        Of each species: placed, and what the target or `Species.copies` ask for.
    adsorbed : tuple of int
        Of the copies, at the interfaces; they come first among the poses.
    stopped : str
        Why no more were placed.
    """

    specimen: Specimen
    occupancy: float
    copies: tuple[int, ...]
    asked: tuple[int, ...]
    adsorbed: tuple[int, ...]
    stopped: str


def crowd(
    species: Sequence[Species],
    size: tuple[float, float, float],
    *,
    occupancy: float | None = None,
    ice: Ice | None = None,
    gap: float = 3.0,
    voxel_size: float | None = None,
    obstacles: Specimen | None = None,
    allowed: Allowed | None = None,
    tries: int = 100_000,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Crowd:
    """Specimen crowded with molecules at random poses that do not overlap.

    The occupancy is made of numbers of copies in proportion to the abundances, each rounded to a whole one. The
    largest molecules are placed first, as they find room only while there is much. When a species finds no more room,
    all that go by abundance are held to the same share of their number, those already placed being thinned at random,
    so that the proportions stay as asked.

    Poses are uniform over all that fit: rotations in SO(3), positions over what is free at the time. Where room is
    scarce, the copies that stand are moved to make more. Cavities that no protein could have entered stay empty, the
    hollow of apoferritin for one. Two molecules come as near as `gap`: at 3 Å their atoms are in contact.

    Parameters
    ----------
    species : sequence of Species
    size : (float, float, float)
        (x, y, z) [Å] of the box about the origin that holds every atom.
    occupancy : float, optional
        Fraction of the box that the molecules fill [1], by solvent-excluded volume: cytoplasm has 0.2 to 0.3
        (Zimmerman & Trach 1991, doi:10.1016/0022-2836(91)90499-V). Species with exact copies count. Without it every
        species needs exact copies.
    ice : Ice, optional
        That of the obstacles when left out.
    gap : float
        Least distance [Å] between atoms of two molecules; 2 or more. Atoms of obstacles with large B-factors are kept
        clear by two standard deviations of their displacement, if that is more.
    voxel_size : float, optional
        Of the grid that tells what is free [Å]: atoms are kept apart by the gap and on average half a voxel. It takes
        one byte a voxel. When left out, it is an eighth of the smallest molecule's mean radius or a twenty-fifth of the
        largest one's, whichever is more, 1 to 8; and as coarse as it takes to make at most 270 million voxels.
    obstacles : Specimen, optional
        What is there already: membranes, filaments, gold. What of it lies beyond the box is no obstacle. Absorption,
        damage and motion are taken over from it.
    allowed : function or tensor (z, y, x), optional
        Where atoms of the species may be: a function of positions (n, 3) [Å] that gives (n,) bool, or a volume over the
        box, centred on sample n // 2, of which the nearest sample counts.
    tries : int
        Proposals for a copy, in the mean over the last twenty, above which there is said to be no room left.
    generator : torch.Generator, optional
    progress : function, optional
        Called with the copies placed and the copies asked for.

    Raises
    ------
    ValueError
        When exact copies do not fit, the box is deeper than the ice, an interface lies out of reach, or an argument
        is out of bounds.

    Warns
    -----
    UserWarning
        When the occupancy cannot be reached, with what was.
    """
    species = list(species)
    ice = ice if ice is not None or obstacles is None else obstacles.ice
    _check(species, size, occupancy, ice, gap, tries)
    centred = [s.atoms.centred() for s in species]
    room = empty_room(size, _voxel_size(centred, size, voxel_size), gap)
    prints = [footprint(atoms, room.voxel_size, gap) for atoms in centred]
    asked = _numbers(species, [p.volume for p in prints], occupancy, math.prod(size))
    none = [s.name for s, number in zip(species, asked, strict=True) if s.copies is None and number == 0]
    if none:
        warnings.warn(
            f"crowd: an occupancy of {occupancy} comes to less than half a copy of {', '.join(none)} in "
            f"{tuple(size)} Å, so there is none. Enlarge size, ask for more, or give exact copies.",
            UserWarning,
            stacklevel=2,
        )
    if obstacles is not None:
        _obstruct(room, obstacles)
    where = None if allowed is None else _region(allowed, size)
    if where is not None:
        _forbid(room, where)
    parts = _parts(species, asked, prints)
    surface = (thinnest(ice) if ice is not None else float(size[2])) / 2
    for part in parts:
        _check_reach(species[part.which], surface - size[2] / 2)
    tell = _Tally(progress, sum(asked))
    share, standing = 1.0, []
    for part in parts:
        one = species[part.which]
        wanted = part.number if one.copies is not None else round(share * part.number)
        standing.append([])
        _fill(room, prints, parts, standing, surface, wanted, tries, where, generator, tell)
        found = len(standing[-1])
        if found < wanted and one.copies is not None:
            raise ValueError(
                f"crowd: copy {found + 1} of {wanted} of {one.name} found no free place in {tuple(size)} Å. Enlarge "
                "size, take fewer copies, or more tries."
            )
        if found < wanted:
            share = found / part.number
    kept = [
        some if species[part.which].copies is not None else _thinned(some, round(share * part.number), generator)
        for part, some in zip(parts, standing, strict=True)
    ]
    return _crowd(species, centred, prints, parts, kept, asked, size, ice, obstacles, occupancy)


class _Part(NamedTuple):
    """Copies of a species that are placed in one way."""

    which: int
    number: int
    interface: Interface | None = None
    side: int = 0  # 1 is the top, -1 the bottom


class _Tally:
    """Tells how many copies stand."""

    def __init__(self, progress: Callable[[int, int], None] | None, asked: int) -> None:
        self.progress, self.asked, self.done = progress, asked, 0

    def __call__(self, more: int) -> None:
        self.done += more
        if self.progress is not None and more:
            self.progress(self.done, self.asked)


def _fill(
    room: Room,
    prints: list[Footprint],
    parts: list[_Part],
    standing: list[list[Standing]],
    surface: float,
    wanted: int,
    tries: int,
    where: _Where | None,
    generator: torch.Generator | None,
    tell: _Tally,
) -> None:
    """Add up to `wanted` copies of the last of the parts that have begun, until one takes more than `tries`."""
    part, mine = parts[len(standing) - 1], standing[-1]
    shape, adsorbed = prints[part.which], part.interface is not None
    cells = None if adsorbed or not wanted else cells_for(room, shape.radius)
    total, since, rate, reach, pressed = 0, 0, 0.5, [4.0] * len(standing), False
    when = deque([0], maxlen=20)  # the last copies were found, in proposals
    while len(mine) < wanted and total - when[0] <= tries * len(when) and (cells is None or len(cells.corners)):
        n = int(np.clip(8 / rate, _FEWEST, _MOST_PROPOSALS))
        turns, places = _proposed(room, shape, part, surface, cells, n, generator)
        before = len(mine)
        for i in may_fit(room, shape, turns, places):
            if len(mine) == wanted:
                break
            if fits(room, shape, turns[i], places[i]) and _allowed(where, shape, turns[i], places[i]):
                mine.append(enter(room, shape, turns[i], places[i]))
                when.append(total + int(i) + 1)
        kept = len(mine) - before
        tell(kept)
        total, since = total + n, since + n
        rate = 0.7 * rate + 0.3 * max(kept / n, 1e-4)
        if since > max(tries // _LOOKS, _A_MOVE * sum(map(len, standing))):
            if rate < _SCARCE:
                _shake(room, prints, parts, standing, reach, where, generator)
                pressed = True
            cells, since = None if adsorbed else cells_for(room, shape.radius), 0
    if pressed:
        _shake(room, prints, parts, standing, reach, where, generator, press=False)


def _shake(
    room: Room,
    prints: list[Footprint],
    parts: list[_Part],
    standing: list[list[Standing]],
    reach: list[float],
    where: _Where | None,
    generator: torch.Generator | None,
    press: bool = True,
) -> None:
    """Move every copy at random by whole voxels, a few times, where it fits: hard bodies in a Monte Carlo simulation.

    To press is to let them drift along a plane wave of random direction and phase towards its nodes, where they crowd
    and leave room elsewhere; the next wave is another. Copies at an interface keep their depth. `reach` [voxel] of
    each part is led to where a third of the moves fit.
    """
    longest = max(8 * float(np.linalg.norm(prints[parts[k].which].hull, axis=1).max()) for k in range(len(standing)))
    normal = torch.nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0).numpy()
    phase = 2 * math.pi * float(torch.rand((), generator=generator, dtype=torch.float64))
    for _ in range(_SWEEPS):
        for k, some in enumerate(standing):
            if not some:
                continue
            steps = 2 * torch.rand(len(some), 3, generator=generator, dtype=torch.float64).numpy() - 1
            if press:
                along = np.array([one.position for one in some]) @ normal
                steps += np.cos(2 * math.pi * along / longest + phase)[:, None] * normal
            steps = np.rint(steps * reach[k]).astype(int)
            if parts[k].interface is not None:
                steps[:, 2] = 0
            done = 0
            for i in torch.randperm(len(some), generator=generator).tolist():
                place = some[i].position + steps[i] * room.voxel_size
                if not steps[i].any() or not _allowed(where, prints[parts[k].which], some[i].rotation, place):
                    continue
                after = moved(room, some[i], steps[i])
                if after is not None:
                    some[i], done = after, done + 1
            reach[k] = min(max(reach[k] * (1.1 if 3 * done > len(some) else 0.9), 1.0), 40.0)


def _allowed(where: _Where | None, shape: Footprint, rotation: np.ndarray, position: np.ndarray) -> bool:
    return where is None or bool(where(shape.skin @ rotation.T + position).all())


def _proposed(
    room: Room,
    shape: Footprint,
    part: _Part,
    surface: float,
    cells: Cells | None,
    n: int,
    generator: torch.Generator | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (n, 3, 3) and positions (n, 3) [Å]: uniform over the cells, or at the interface."""
    if cells is not None:
        turns = random_rotations(n, generator).numpy()
        chosen = cells.corners[torch.randint(len(cells.corners), (n,), generator=generator).numpy()]
        within = torch.rand(n, 3, generator=generator, dtype=torch.float64).numpy()
        return turns, (chosen + within) * cells.size + cells.origin - turns @ shape.centre
    assert part.interface is not None
    turns = interface_rotations(n, part.interface, part.side, generator).numpy()
    across = torch.rand(n, 3, generator=generator, dtype=torch.float64).numpy()
    nearest = max(surface - room.size[2] / 2, 0.0)  # of what the box holds
    away = nearest + (part.interface.depth - nearest) * across[:, 2]
    reach = (part.side * (shape.hull @ turns[:, 2].T)).max(0)  # of the molecule towards the surface
    places = (across - 0.5) * room.size
    places[:, 2] = part.side * (surface - away - reach)
    return turns, places


def interface_rotations(n: int, interface: Interface, side: int, generator: torch.Generator | None) -> torch.Tensor:
    """Rotations (n, 3, 3) that turn the axis out of the ice at the top (side 1) or the bottom (side -1).

    The cosine of a von Mises-Fisher direction about its mean has the distribution function
    (e^(k c) - e^-k) / (e^k - e^-k), which is inverted (Fisher 1953, doi:10.1098/rspa.1953.0064).
    """
    u, turn, spin = torch.rand(3, n, generator=generator, dtype=torch.float64)
    k = 1 / math.radians(interface.spread) ** 2 if math.isfinite(interface.spread) else 0.0
    cosine = 2 * u - 1 if k < 1e-6 else 1 + torch.log(u + (1 - u) * math.exp(-2 * k)) / k
    cosine = cosine.clamp(-1, 1)
    sine, turn = torch.sqrt(1 - cosine**2), 2 * torch.pi * turn
    outwards = torch.stack([sine * torch.cos(turn), sine * torch.sin(turn), side * cosine], -1)
    axis = torch.tensor(interface.axis, dtype=torch.float64)
    return _frames(outwards, 2 * torch.pi * spin) @ _frames(axis[None], torch.zeros(1, dtype=torch.float64)).mT


def _frames(third: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotations (n, 3, 3) whose third column lies along `third` (n, 3), turned about it by `turn` (n,) [rad]."""
    w = third / third.norm(dim=-1, keepdim=True)
    across = torch.zeros_like(w).scatter(1, w.abs().argmin(1, keepdim=True), 1.0)
    u = torch.linalg.cross(across, w)
    u = u / u.norm(dim=-1, keepdim=True)
    v = torch.linalg.cross(w, u)
    c, s = torch.cos(turn)[:, None], torch.sin(turn)[:, None]
    return torch.stack([c * u + s * v, c * v - s * u, w], -1)


def _numbers(
    species: list[Species], volumes: list[float], occupancy: float | None, box_volume: float
) -> tuple[int, ...]:
    """Copies asked for of each species."""
    exact = [s.copies or 0 for s in species]
    left = 0.0 if occupancy is None else occupancy * box_volume - sum(map(math.prod, zip(exact, volumes, strict=True)))
    free = [s.copies is None for s in species]
    if any(free) and not left > 0:
        raise ValueError(
            f"crowd: the exact copies alone fill more than the occupancy {occupancy}. Take fewer, or a higher one."
        )
    one_round = sum(s.abundance * v for s, v, f in zip(species, volumes, free, strict=True) if f)
    return tuple(
        round(left * s.abundance / one_round) if f else n for s, f, n in zip(species, free, exact, strict=True)
    )


def _parts(species: list[Species], asked: tuple[int, ...], prints: list[Footprint]) -> list[_Part]:
    """In the order of placing: the largest first, and of each those at the interfaces first."""
    parts = []
    for i in sorted(range(len(species)), key=lambda i: (-prints[i].volume, i)):
        interface, stuck = species[i].interface, 0
        if interface is not None:
            stuck = round(interface.fraction * asked[i])
            top = {"both": stuck - stuck // 2, "top": stuck, "bottom": 0}[interface.side]
            parts += [_Part(i, top, interface, 1), _Part(i, stuck - top, interface, -1)]
        parts.append(_Part(i, asked[i] - stuck))
    return [part for part in parts if part.number]


def _thinned(some: list[Standing], number: int, generator: torch.Generator | None) -> list[Standing]:
    """That many of the copies, at random."""
    if number >= len(some):
        return some
    return [some[i] for i in sorted(torch.randperm(len(some), generator=generator)[:number].tolist())]


def _obstruct(room: Room, obstacles: Specimen) -> None:
    """Take the room of what is there already, copy by copy."""
    for molecule, poses in zip(obstacles.molecules, obstacles.poses, strict=True):
        radii = site_radii(molecule, room.gap)
        own = molecule.positions.detach().double().cpu().numpy()
        for rotation, position in zip(poses.rotations.detach(), poses.positions.detach(), strict=True):
            places = own @ rotation.double().cpu().numpy().T + position.double().cpu().numpy()
            for radius in np.unique(radii):
                near = (radii == radius) & (np.abs(places) < room.size / 2 + room.voxel_size + radius).all(1)
                enter_atoms(room, places[near], float(radius))


def _region(allowed: Allowed, size: tuple[float, float, float]) -> _Where:
    """Whether places (n, 3) [Å] are allowed (n,)."""
    if not isinstance(allowed, torch.Tensor):
        return lambda places: _whether(allowed(torch.from_numpy(places)), len(places))
    if allowed.ndim != 3 or allowed.dtype != torch.bool:
        raise ValueError(f"crowd: expected allowed to be bool (z, y, x), got {allowed.dtype} {tuple(allowed.shape)}.")
    volume = allowed.cpu().numpy()
    n = np.array(volume.shape[::-1])

    def within(places: np.ndarray) -> np.ndarray:
        at = np.clip(np.rint(places * n / np.array(size)).astype(int) + n // 2, 0, n - 1)
        return volume[at[:, 2], at[:, 1], at[:, 0]]

    return within


def _whether(answer: torch.Tensor, n: int) -> np.ndarray:
    if not isinstance(answer, torch.Tensor) or answer.dtype != torch.bool or tuple(answer.shape) != (n,):
        raise ValueError(f"crowd: expected allowed(positions) to be bool ({n},), got {answer!r:.100}.")
    return answer.cpu().numpy()


def _forbid(room: Room, where: _Where) -> None:
    """Take all voxels whose centre is not allowed."""
    x, y = (
        room.voxel_size * (np.arange(n) - room.margin + 0.5) - s / 2
        for n, s in zip(room.taken.shape[:0:-1], room.size[:2])
    )
    for k, plane in enumerate(room.taken):
        z = room.voxel_size * (k - room.margin + 0.5) - room.size[2] / 2
        places = np.stack(np.broadcast_arrays(x, y[:, None], z), -1).reshape(-1, 3)
        outside = np.concatenate([~where(part) for part in np.array_split(places, len(places) // _AT_ONCE + 1)])
        plane[outside.reshape(plane.shape)] = FIXED


def _crowd(
    species: list[Species],
    centred: list[Atoms],
    prints: list[Footprint],
    parts: list[_Part],
    standing: list[list[Standing]],
    asked: tuple[int, ...],
    size: tuple[float, float, float],
    ice: Ice | None,
    obstacles: Specimen | None,
    occupancy: float | None,
) -> Crowd:
    """What was placed, as a specimen; a warning when that is too little."""
    mine: list[list[Standing]] = [[] for _ in species]
    adsorbed = [0] * len(species)
    for part, some in zip(parts, standing, strict=True):
        mine[part.which] += some
        adsorbed[part.which] += len(some) if part.side else 0
    placed = tuple(
        Poses(
            torch.from_numpy(np.array([s.rotation for s in some]).reshape(-1, 3, 3)),
            torch.from_numpy(np.array([s.position for s in some]).reshape(-1, 3)),
        )
        for some in mine
    )
    copies = tuple(len(p.positions) for p in placed)
    reached = sum(n * p.volume for n, p in zip(copies, prints, strict=True)) / math.prod(size)
    before = (obstacles.molecules, obstacles.poses, obstacles.names, obstacles.kinds) if obstacles else ((),) * 4
    specimen = Specimen(
        (*before[0], *centred),
        (*before[1], *placed),
        size,
        ice,
        names=(*before[2], *(s.name for s in species)),
        kinds=(*before[3], *(s.kind for s in species)),
    )
    if obstacles is not None:
        specimen = specimen.replace(absorption=obstacles.absorption, damage=obstacles.damage, motion=obstacles.motion)
    if copies == asked:
        return Crowd(specimen, reached, copies, asked, tuple(adsorbed), "all that was asked for is placed")
    short = ", ".join(f"{n} of {m} {s.name}" for n, m, s in zip(copies, asked, species, strict=True))
    stopped = f"no room left: {short}"
    warnings.warn(
        f"crowd: reached an occupancy of {reached:.3f}, not {occupancy}; {stopped}.", UserWarning, stacklevel=3
    )
    return Crowd(specimen, reached, copies, asked, tuple(adsorbed), stopped)


def _voxel_size(molecules: list[Atoms], size: tuple[float, float, float], given: float | None) -> float:
    """Of the grid [Å]."""
    volume = math.prod(size)
    if given is None:
        radii = [float(m.positions.detach().norm(dim=1).mean()) for m in molecules]
        fine = min(max(min(radii) / 8, max(radii) / 25, _FINEST), _COARSEST)
        return max(fine, (volume / _USUAL_VOXELS) ** (1 / 3))
    if not 0 < given < math.inf or volume / given**3 > _MOST_VOXELS:
        raise ValueError(
            f"crowd: expected a voxel_size of at least {(volume / _MOST_VOXELS) ** (1 / 3):.2g} Å, which makes "
            f"{_MOST_VOXELS} voxels, got {given}."
        )
    return given


def _check(
    species: list[Species],
    size: tuple[float, float, float],
    occupancy: float | None,
    ice: Ice | None,
    gap: float,
    tries: int,
) -> None:
    if not species or len(size) != 3 or not all(0 < s < math.inf for s in size):
        raise ValueError(f"crowd: expected species and a positive size (x, y, z) [Å], got {len(species)} and {size}.")
    if not (2 <= gap < math.inf and tries >= 1):
        raise ValueError(
            f"crowd: expected a gap of 2 Å or more, as atoms in contact are 3 to 4 Å apart, and at least 1 try, got "
            f"{gap} and {tries}."
        )
    if (occupancy is None) != all(s.copies is not None for s in species):
        raise ValueError(
            "crowd: expected an occupancy where species go by abundance, and none where all have exact copies, got "
            f"{occupancy} and copies of {[s.copies for s in species]}."
        )
    if occupancy is not None and not 0 < occupancy < 1:
        raise ValueError(f"crowd: expected an occupancy between 0 and 1, got {occupancy}.")
    if ice is not None and size[2] > thinnest(ice):
        raise ValueError(
            f"crowd: a box {size[2]:g} Å deep does not lie inside ice {thinnest(ice):g} Å thick. Make the ice thicker "
            "or the box flatter."
        )


def _check_reach(one: Species, beyond: float) -> None:
    if one.interface is not None and beyond > one.interface.depth:
        raise ValueError(
            f"crowd: the box ends {beyond:g} Å below the surface of the ice, so {one.name} cannot lie within "
            f"{one.interface.depth:g} Å of it. Make the box as deep as the ice, or the depth of the interface larger."
        )
