"""The specimen of a run description: film, membranes, filaments, beads, a crowd of molecules, what settled on it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial import KDTree

from cryosim import config as configuration
from cryosim.config import RunConfig, SpecimenSection
from cryosim.contents import Embedded, FilamentSection, InterfaceSection, MembraneSection, Molecule
from cryosim.core.fourier import number
from cryosim.core.rotation import random_rotations, rotation_y, rotation_z
from cryosim.io.examples import example_path
from cryosim.io.structure import read_atoms
from cryosim.specimen.atoms import Atoms, Poses, unmoved
from cryosim.specimen.crowding import Interface, Species, crowd
from cryosim.specimen.filaments import ACTIN, MICROTUBULE_PERSISTENCE, Helix, helix, microtubule, place_filaments
from cryosim.specimen.ice import Ice, Relief
from cryosim.specimen.lipids import POPC, half_thickness
from cryosim.specimen.membranes import cleared, embed, membrane
from cryosim.specimen.solids import carbon_film, gold_bead, ice_crystals, platinum_layer, surface_height
from cryosim.specimen.specimen import Specimen
from cryosim.specimen.surfaces import Ellipsoid, Surface, Torus, irregular_vesicle, patch, points_on, sphere

PARTICLES = ("protein", "filament", "gold")
"""Kinds of which single copies are of interest."""

MATTER = ("membrane", "gold bead", "carbon film", "platinum", "ice crystals")
"""Names of what is not read from a structure."""

_GAP = 20.0  # [Å] between membranes, which are placed by the balls about them, and from a film
_CONTACT = 3.0  # [Å] from an atom of a protein in a membrane to a lipid
_TRIES = 2000
_REDRAWN = 10  # times an irregular surface is drawn anew
_MOST_NAMES = 255
_FINEST = 2048  # places along a side of the box at which the surface of the ice is looked at

Progress = Callable[[str, int, int], None]


class Thing(NamedTuple):
    """What stands in the specimen: one molecule, where its copies are, its name and its kind."""

    atoms: Atoms
    poses: Poses
    name: str
    kind: str


class Structures:
    """Structure files of run descriptions, each read once: give one to many scenes.

    Parameters
    ----------
    base : str or path
        Folder that relative paths start from.
    """

    def __init__(self, base: str | Path) -> None:
        self._read = functools.cache(
            lambda name, assembly, chains: read_atoms(_file(name, base), assembly=assembly, chains=chains)
        )

    def __call__(self, part: Molecule | Embedded | FilamentSection) -> Atoms:
        """Atoms of what a description names. Raises `cryosim.io.FormatError` for a file that cannot be used."""
        return self._read(*_named(part))


def build_specimen(
    config: RunConfig,
    base: str | Path | Structures,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Specimen:
    """The specimen of a configuration, everything in it drawn from one generator.

    Parameters
    ----------
    config : RunConfig
    base : str, path or Structures
        Folder that relative paths of structures start from, or what has read some already.
    generator : torch.Generator
    progress : callable, optional
        Called with (what, done, in all).

    Raises
    ------
    cryosim.io.FormatError
        For a structure file that cannot be used.
    ValueError
        When what is asked for does not fit.
    """
    section, ice = config.specimen, configuration.ice(config)
    catalogue(config)  # complains about names before anything is placed
    read = base if isinstance(base, Structures) else Structures(base)
    for part in _from_structures(section):
        read(part)  # complains about files likewise
    standing = _film(section, ice, generator)
    standing += _membranes(section, read, standing, generator)
    standing += _filaments(section, read, standing, generator)
    standing += _beads(section, standing, ice, generator)
    species = [
        Species(
            read(m),
            _name(m),
            abundance=1.0 if m.abundance is None else m.abundance,
            copies=m.copies if m.abundance is None else None,
            interface=_interface(m.interface),
        )
        for m in section.molecules
    ]
    tell = None if progress is None else lambda done, total: progress("placing molecules", done, total)
    things = _crowded(species, standing, section, ice, generator, occupancy=section.occupancy, progress=tell)
    made = _specimen([*things, *_settled(section, ice, generator)], section, ice)
    return made.replace(
        absorption=configuration.absorption(section),
        damage=configuration.damage(config),
        motion=configuration.motion(config),
    )


def _specimen(things: Sequence[Thing], section: SpecimenSection, ice: Ice | None) -> Specimen:
    molecules, poses, names, kinds = zip(*things, strict=True)
    return Specimen(molecules, poses, section.size, ice, names=names, kinds=kinds)


def _crowded(
    species: Sequence[Species],
    standing: Sequence[Thing],
    section: SpecimenSection,
    ice: Ice | None,
    generator: torch.Generator,
    **choices: Any,
) -> list[Thing]:
    """What stands already, and the species among it."""
    obstacles = _specimen(standing, section, ice) if standing else None
    slab = None if ice is None else _slab(ice, section.size)
    how = {"ice": slab, "gap": section.gap, "tries": section.tries, "obstacles": obstacles, "generator": generator}
    made = crowd(species, section.size, **how, **choices).specimen
    return [Thing(*x) for x in zip(made.molecules, made.poses, made.names, made.kinds, strict=True)]


def _slab(ice: Ice, size: tuple[float, float, float]) -> Ice:
    """The flat slab that lies in the ice all over the box: a relief goes on where only high tilts look."""
    if ice.relief is None:
        return ice
    spacing = ice.relief.spacing / 2
    axes = [torch.linspace(-s / 2, s / 2, min(2 + int(s / spacing), _FINEST), dtype=torch.float64) for s in size[:2]]
    places = torch.cartesian_prod(*axes)
    return Ice(2 * min(float(surface_height(ice, places, side).min()) for side in (1.0, -1.0)))


def catalogue(config: RunConfig) -> dict[str, int]:
    """Number in masks of everything that a configuration may hold, by name: the same whatever of it there is.

    What has one name has one number: so has a protein that stands in a membrane as well as in the ice.

    Raises
    ------
    ValueError
        When a molecule has the name of one of `MATTER`, or there are more names than eight bits can tell apart.
    """
    names = [_name(part) for part in _from_structures(config.specimen)]
    taken = next((name for name in names if name in MATTER), None)
    if taken is not None:
        raise ValueError(f"specimen: expected molecules of other names than {', '.join(MATTER)}, got {taken!r}.")
    numbers = {name: number for number, name in enumerate(dict.fromkeys([*MATTER, *names]), 1)}
    if len(numbers) > _MOST_NAMES:
        raise ValueError(
            f"specimen: expected at most {_MOST_NAMES - len(MATTER)} names of molecules, got {len(names)}."
        )
    return numbers


def _from_structures(section: SpecimenSection) -> list[Molecule | Embedded | FilamentSection]:
    """Everything that is read from a structure."""
    guests = [guest for kind in section.membranes for guest in kind.embedded]
    return [*section.molecules, *guests, *section.filaments]


def _name(part: Molecule | Embedded | FilamentSection) -> str:
    return (None if isinstance(part, Embedded) else part.name) or _stem(part.structure)


def _stem(structure: str) -> str:
    return Path(structure).name.split(".")[0]


def structure_files(config: RunConfig, base: str | Path) -> list[Path]:
    """Files that a configuration is made of."""
    return [_file(part.structure, base) for part in _from_structures(config.specimen)]


def _named(part: Molecule | Embedded | FilamentSection) -> tuple[str, int | None, tuple[str, ...] | None]:
    """What of which file."""
    return part.structure, part.assembly, None if part.chains is None else tuple(part.chains)


def _file(name: str, base: str | Path) -> Path:
    return example_path(name) if name in ("apoferritin", "ubiquitin") else Path(base) / name


def _interface(section: InterfaceSection) -> Interface | None:
    if not section.fraction:
        return None
    return Interface(section.fraction, section.side, section.depth, section.axis, section.spread)


def _film(section: SpecimenSection, ice: Ice | None, generator: torch.Generator) -> list[Thing]:
    carbon = section.carbon
    if not carbon.thickness:
        return []
    deep = math.inf if ice is None else number(_slab(ice, section.size).thickness)
    if 2 * abs(carbon.height) + carbon.thickness > deep:
        raise ValueError(
            f"specimen.carbon: a film of {carbon.thickness:g} Å about {carbon.height:g} Å does not lie in ice that is "
            f"{deep:g} Å thick where it is thinnest. Make the ice thicker."
        )
    atoms = carbon_film(
        section.size[:2],
        carbon.thickness,
        hole_radius=carbon.hole_radius,
        hole_centre=carbon.hole_centre,
        z=carbon.height,
        generator=generator,
    )
    return [Thing(atoms, unmoved(), "carbon film", "carbon")]


def _beads(
    section: SpecimenSection, standing: Sequence[Thing], ice: Ice | None, generator: torch.Generator
) -> list[Thing]:
    """Beads of gold beside what stands already; the occupancy is that of molecules, so they do not count."""
    if not section.gold.copies:
        return []
    bead = gold_bead(section.gold.diameter, generator=generator)
    beads = Species(bead, "gold bead", "gold", copies=section.gold.copies)
    return _crowded([beads], standing, section, ice, generator)[len(standing) :]


def _settled(section: SpecimenSection, ice: Ice | None, generator: torch.Generator) -> list[Thing]:
    """Platinum, which stands on the slab, and ice crystals, which stand on both."""
    things = []
    if ice is None:
        return things
    field, layer = section.size[:2], section.lamella.platinum
    if layer:
        atoms = platinum_layer(field, layer, z=layer / 2, grain=section.lamella.grain, generator=generator)
        lifted = atoms.positions.clone()
        lifted[:, 2] += surface_height(ice, lifted, 1.0)
        things.append(Thing(atoms.replace(positions=lifted), unmoved(), "platinum", "platinum"))
    if section.contamination.crystals:
        count, radii = section.contamination.crystals, section.contamination.radii
        crystals = ice_crystals(count, radii, field, _covered(ice, layer), generator=generator)
        things.append(Thing(crystals, unmoved(), "ice crystals", "ice"))
    return things


def _covered(ice: Ice, layer: float) -> Ice:
    """The slab, its upper surface raised by a layer [Å]."""
    relief = ice.relief or Relief(torch.zeros(2, 2, 2, dtype=torch.float64), 1.0)
    added = relief.heights.new_tensor([0.0, layer])[:, None, None]
    return ice.replace(relief=relief.replace(heights=relief.heights + added))


# room -----------------------------------------------------------------------------------------------------------------


class _Obstacle(NamedTuple):
    """What stands somewhere: its atoms, and how far from them nothing else may be [Å]."""

    atoms: KDTree
    gap: float


def _obstacle(thing: Thing, gap: float) -> _Obstacle:
    """A thing as an obstacle; coarse sites reach two standard deviations of their Gaussians, as in `crowd`."""
    rotations, origins = thing.poses.rotations, thing.poses.positions
    atoms = thing.atoms
    if thing.kind == "membrane":
        atoms = atoms.index(atoms.numbers == 6)  # which every site has
    places = torch.einsum("cij,aj->cai", rotations, atoms.positions.double()) + origins[:, None]
    spread = 2 * float(atoms.b_factors.max().clamp_min(0).sqrt()) / math.sqrt(8 * math.pi**2) if len(atoms) else 0.0
    return _Obstacle(KDTree(places.reshape(-1, 3).numpy()), max(gap, spread))


def _is_clear(obstacles: Sequence[_Obstacle], centres: torch.Tensor, radius: float) -> bool:
    """Whether balls about `centres` (ball, 3) [Å] touch no obstacle."""
    return all(
        bool(np.isinf(o.atoms.query(centres.numpy(), distance_upper_bound=radius + o.gap)[0]).all())
        for o in obstacles
        if o.atoms.n
    )


def _within(poses: Poses, molecule: Atoms, half: torch.Tensor) -> Poses:
    """Those copies that lie in the box with all their atoms."""
    positions = molecule.positions.double()
    inside = [
        bool(((positions @ rotation.T + origin).abs() <= half).all())
        for rotation, origin in zip(poses.rotations, poses.positions, strict=True)
    ]
    return poses.index(torch.tensor(inside, dtype=torch.bool))


# membranes ------------------------------------------------------------------------------------------------------------


def _membranes(
    section: SpecimenSection, read: Callable, standing: Sequence[Thing], generator: torch.Generator
) -> list[Thing]:
    """Bilayers at random places, cut off at the sides of the box, and the proteins that stand in them."""
    half = torch.tensor(section.size, dtype=torch.float64) / 2
    obstacles = [_obstacle(thing, _GAP) for thing in standing]
    taken: list[tuple[torch.Tensor, float]] = []
    things: list[Thing] = []
    embedded: dict[Hashable, list[Thing]] = {}
    for kind in section.membranes:
        for _ in range(kind.copies):
            surface, lipids = _bilayer(kind, generator)
            outline = points_on(surface, 2000, generator=generator).positions.norm(dim=1)
            heights = [half_thickness(POPC) + 10.0, *(_height(guest, read) for guest in kind.embedded)]
            reach = float(outline.max()) + max(heights)
            place = _free_place(half, reach, taken, obstacles, generator)
            taken.append((place, reach))
            turn = random_rotations(1, generator)
            beside: list[tuple[Atoms, Poses]] = []
            for guest in kind.embedded:
                molecule, upright = read(guest).centred(), _upright(guest.axis)
                standing_up = molecule.moved(upright)
                how = {"height": guest.height, "gap": section.gap, "beside": beside, "generator": generator}
                poses = embed(surface, standing_up, guest.copies, **how)
                beside.append((standing_up, poses))
                poses = _within(_carried(poses, turn[0], place), standing_up, half)
                lipids = cleared(lipids, standing_up, _carried_back(poses, turn[0], place), distance=_CONTACT)
                poses = poses.replace(rotations=poses.rotations @ upright)
                same = embedded.setdefault(_named(guest), [])
                same.append(Thing(molecule, poses, _name(guest), "protein"))
            lipids = lipids.index(((lipids.positions @ turn[0].T + place).abs() <= half).all(1))
            if len(lipids):
                things.append(Thing(lipids, Poses(turn, place[None]), "membrane", "membrane"))
    for same in embedded.values():
        poses = Poses(*(torch.cat([getattr(one.poses, f) for one in same]) for f in ("rotations", "positions")))
        things.append(same[0]._replace(poses=poses))
    return things


def _bilayer(section: MembraneSection, generator: torch.Generator) -> tuple[Surface, Atoms]:
    """A surface and the lipids on it; an irregular one is drawn anew where it bends too tightly for them."""
    for _ in range(_REDRAWN if section.shape in ("vesicle", "patch") else 0):
        with suppress(ValueError):
            surface = _surface(section, generator)
            return surface, membrane(surface, spacing=section.spacing, generator=generator)
    surface = _surface(section, generator)
    return surface, membrane(surface, spacing=section.spacing, generator=generator)


def _surface(section: MembraneSection, generator: torch.Generator) -> Surface:
    radius, how = section.radius, {"bending": section.bending, "generator": generator}
    if section.shape == "sphere":
        return sphere(radius)
    if section.shape == "ellipsoid":
        x, y, z = section.aspect
        return Ellipsoid((x * radius, y * radius, z * radius))
    if section.shape == "torus":
        return Torus(radius, section.tube)
    if section.shape == "patch":
        return patch((2 * radius, 2 * radius), **how)
    return irregular_vesicle(radius, amplitude=section.amplitude, degree=section.degree, **how)


def _free_place(
    half: torch.Tensor,
    reach: float,
    taken: Sequence[tuple[torch.Tensor, float]],
    obstacles: Sequence[_Obstacle],
    generator: torch.Generator,
) -> torch.Tensor:
    """Centre (3,) [Å] of a ball of radius `reach` apart from others: within the depth of the box, if it fits there."""
    room = half.clone()
    room[2] = max(float(half[2]) - reach, 0.0)
    for _ in range(_TRIES):
        place = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * room
        apart = all(float((place - other).norm()) >= reach + radius + _GAP for other, radius in taken)
        if apart and _is_clear(obstacles, place[None], reach):
            return place
    raise ValueError(
        f"specimen.membranes: number {len(taken) + 1}, {reach:.0f} Å in radius, found no free place in a box of "
        f"{tuple((2 * half).tolist())} Å. Enlarge specimen.size, or take fewer or smaller ones."
    )


def _height(guest: Embedded, read: Callable) -> float:
    """How far from a place on the membrane a protein reaches that stands there [Å]."""
    upright = read(guest).centred().moved(_upright(guest.axis))
    return float((upright.positions + upright.positions.new_tensor([0, 0, guest.height])).norm(dim=1).max())


def _carried(poses: Poses, turn: torch.Tensor, place: torch.Tensor) -> Poses:
    return poses.replace(rotations=turn @ poses.rotations, positions=poses.positions @ turn.T + place)


def _carried_back(poses: Poses, turn: torch.Tensor, place: torch.Tensor) -> Poses:
    return poses.replace(rotations=turn.T @ poses.rotations, positions=(poses.positions - place) @ turn)


def _upright(axis: tuple[float, float, float]) -> torch.Tensor:
    """Rotation (3, 3) that puts a direction along z."""
    x, y, z = axis
    azimuth, polar = math.degrees(math.atan2(y, x)), math.degrees(math.atan2(math.hypot(x, y), z))
    return rotation_y(-polar) @ rotation_z(-azimuth)


# filaments ------------------------------------------------------------------------------------------------------------


def _filaments(
    section: SpecimenSection, read: Callable, standing: Sequence[Thing], generator: torch.Generator
) -> list[Thing]:
    """Filaments that cross neither each other nor what stands already, each an instance of its own.

    Of those that reach beyond the box only the subunits within it are kept. Poses are those of the subunits' centres.
    """
    half = torch.tensor(section.size, dtype=torch.float64) / 2
    obstacles = [_obstacle(thing, section.gap) for thing in standing] if section.filaments else []
    things: list[Thing] = []
    for kind in section.filaments:
        file = read(kind)
        subunit = file.centred()
        centre = file.positions[0].double() - subunit.positions[0].double()  # from the axis of the filament
        centre = (
            centre * centre.new_tensor([1, 1, 0]) if kind.offset is None else centre.new_tensor([kind.offset, 0, 0])
        )
        straight, persistence = _straight(kind)
        found: list[Poses] = []
        for which in range(kind.copies):
            poses = _free_filament(
                section, kind, straight, persistence, subunit.moved(shift=centre), obstacles, generator
            )
            poses = poses.replace(
                positions=poses.positions + poses.rotations @ centre,
                instances=torch.full((len(poses.positions),), which, dtype=torch.long),
            )
            found.append(_within(poses, subunit, half))
            obstacles.append(_obstacle(Thing(subunit, found[-1], "", "filament"), section.gap))
        if found:
            joined = (torch.cat([getattr(p, f) for p in found]) for f in ("rotations", "positions", "instances"))
            things.append(Thing(subunit, Poses(*joined), _name(kind), "filament"))
    return things


def _straight(section: FilamentSection) -> tuple[Poses, float]:
    """Poses of a straight filament, and its persistence length [Å]."""
    if section.symmetry == "microtubule":
        return microtubule(section.length), MICROTUBULE_PERSISTENCE
    if section.symmetry == "actin":
        return helix(ACTIN, length=section.length), ACTIN.persistence
    persistence = math.inf if section.persistence is None else section.persistence
    return helix(Helix(section.rise, section.twist, section.cyclic), length=section.length), persistence


def _free_filament(
    section: SpecimenSection,
    kind: FilamentSection,
    straight: Poses,
    persistence: float,
    subunit: Atoms,
    obstacles: Sequence[_Obstacle],
    generator: torch.Generator,
) -> Poses:
    """A filament of subunits about its axis, some of them whole in the box and none near anything else."""
    radius = float(subunit.positions.norm(dim=1).max())
    half = torch.tensor(section.size, dtype=torch.float64) / 2
    if float(half.min()) <= radius:
        raise ValueError(
            f"specimen.filaments: a filament {2 * radius:.0f} Å wide does not lie in a box of {section.size} Å. "
            "Enlarge specimen.size, or give an offset: the axis of the filament is the z axis of the structure file."
        )
    for _ in range(_TRIES // 4):
        how = {"radius": radius, "persistence": persistence, "crossing": True, "generator": generator}
        poses = place_filaments(straight, 1, section.size, **how)
        if _is_clear(obstacles, poses.positions, radius) and len(_within(poses, subunit, half).positions):
            return poses
    raise ValueError(
        f"specimen.filaments: one of {kind.copies} filaments of {kind.length:g} Å finds no place clear of everything "
        f"else in a box of {section.size} Å. Enlarge specimen.size, or take fewer or shorter ones."
    )
