"""The specimen of a run description: film, membranes, filaments, beads, a crowd of molecules, what settled on it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.spatial import KDTree

from cryosim import config as configuration
from cryosim.config import RunConfig, SpecimenSection
from cryosim.contents import FilamentSection, InterfaceSection, MembraneSection
from cryosim.core.rotation import random_rotations
from cryosim.io.examples import example_path
from cryosim.io.structure import read_atoms
from cryosim.specimen.atoms import Atoms, Poses
from cryosim.specimen.crowding import Interface, Species, crowd
from cryosim.specimen.filaments import ACTIN, MICROTUBULE_PERSISTENCE, Helix, helix, microtubule, place_filaments
from cryosim.specimen.ice import Ice
from cryosim.specimen.lipids import POPC, half_thickness
from cryosim.specimen.membranes import cleared, embed, membrane
from cryosim.specimen.solids import carbon_film, gold_bead, ice_crystals, platinum_layer, surface_height
from cryosim.specimen.specimen import Specimen
from cryosim.specimen.surfaces import Ellipsoid, Surface, Torus, irregular_vesicle, patch, points_on, sphere

PARTICLES = ("protein", "filament", "gold")
"""Kinds of which single copies are of interest."""

MATTER = ("membrane", "gold bead", "carbon film", "platinum", "ice crystals")
"""Names of what is not read from a structure."""

_GAP = 20.0  # [Å] between things that are placed by their enclosing shapes
_TRIES = 2000

Progress = Callable[[str, int, int], None]


class Thing(NamedTuple):
    """What stands in the specimen: one molecule, where its copies are, its name and its kind."""

    atoms: Atoms
    poses: Poses
    name: str
    kind: str


def build_specimen(
    config: RunConfig, base: str | Path, generator: torch.Generator, progress: Progress | None = None
) -> Specimen:
    """The specimen of a configuration, everything in it drawn from one generator.

    Parameters
    ----------
    config : RunConfig
    base : str or path
        Folder that relative paths of structures start from.
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
    read = functools.cache(lambda name, assembly: _structure(name, assembly, base))
    standing = [*_film(section, generator), *_membranes(section, read, generator)]
    standing += _filaments(section, read, standing, generator)
    species = [
        Species(
            read(m.structure, m.assembly),
            m.name or _stem(m.structure),
            abundance=1.0 if m.abundance is None else m.abundance,
            copies=m.copies if m.abundance is None else None,
            interface=_interface(m.interface),
        )
        for m in section.molecules
    ]
    if section.gold.copies:
        bead = gold_bead(section.gold.diameter, generator=generator)
        species.append(Species(bead, "gold bead", "gold", copies=section.gold.copies))
    crowded = crowd(
        species,
        section.size,
        occupancy=section.occupancy,
        ice=ice,
        gap=section.gap,
        obstacles=_specimen(standing, section, ice) if standing else None,
        generator=generator,
        progress=None if progress is None else lambda done, total: progress("placing molecules", done, total),
    ).specimen
    things = [Thing(*x) for x in zip(crowded.molecules, crowded.poses, crowded.names, crowded.kinds, strict=True)]
    made = _specimen([*things, *_settled(section, ice, generator)], section, ice)
    return made.replace(
        absorption=configuration.absorption(section),
        damage=configuration.damage(config),
        motion=configuration.motion(config),
    )


def _specimen(things: Sequence[Thing], section: SpecimenSection, ice: Ice | None) -> Specimen:
    molecules, poses, names, kinds = zip(*things, strict=True)
    return Specimen(molecules, poses, section.size, ice, names=names, kinds=kinds)


def catalogue(config: RunConfig) -> dict[str, int]:
    """Number in masks of everything that a configuration may hold, by name: the same whatever of it there is."""
    section = config.specimen
    names = [m.name or _stem(m.structure) for m in section.molecules]
    names += [_stem(guest.structure) for kind in section.membranes for guest in kind.embedded]
    names += [kind.name or _stem(kind.structure) for kind in section.filaments]
    return {name: number for number, name in enumerate(dict.fromkeys([*MATTER, *names]), 1)}


def _stem(structure: str) -> str:
    return Path(structure).name.split(".")[0]


def _structure(name: str, assembly: int | None, base: str | Path) -> Atoms:
    path = example_path(name) if name in ("apoferritin", "ubiquitin") else Path(base) / name
    return read_atoms(path, assembly=assembly)


def _interface(section: InterfaceSection) -> Interface | None:
    if not section.fraction:
        return None
    return Interface(section.fraction, section.side, section.depth, section.axis, section.spread)


def _here() -> Poses:
    return Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))


def _film(section: SpecimenSection, generator: torch.Generator) -> list[Thing]:
    carbon = section.carbon
    if not carbon.thickness:
        return []
    atoms = carbon_film(
        section.size[:2],
        carbon.thickness,
        hole_radius=carbon.hole_radius,
        hole_centre=carbon.hole_centre,
        z=carbon.height,
        generator=generator,
    )
    return [Thing(atoms, _here(), "carbon film", "carbon")]


def _settled(section: SpecimenSection, ice: Ice | None, generator: torch.Generator) -> list[Thing]:
    """Platinum and ice crystals, which stand on the slab."""
    things = []
    if ice is None:
        return things
    field = section.size[:2]
    if section.lamella.platinum:
        layer = section.lamella.platinum
        atoms = platinum_layer(field, layer, z=layer / 2, grain=section.lamella.grain, generator=generator)
        lifted = atoms.positions.clone()
        lifted[:, 2] += surface_height(ice, lifted, 1.0)
        things.append(Thing(atoms.replace(positions=lifted), _here(), "platinum", "platinum"))
    if section.contamination.crystals:
        crystals = ice_crystals(
            section.contamination.crystals, section.contamination.radii, field, ice, generator=generator
        )
        things.append(Thing(crystals, _here(), "ice crystals", "ice"))
    return things


# membranes ------------------------------------------------------------------------------------------------------------


def _membranes(section: SpecimenSection, read: Callable, generator: torch.Generator) -> list[Thing]:
    """Bilayers at random places, cut off at the sides of the box, and the proteins that stand in them."""
    half = torch.tensor(section.size, dtype=torch.float64) / 2
    taken: list[tuple[torch.Tensor, float]] = []
    things: list[Thing] = []
    embedded: dict[str, list[tuple[Atoms, Poses]]] = {}
    for kind in section.membranes:
        for _ in range(kind.copies):
            surface = _surface(kind, generator)
            outline = points_on(surface, 2000, generator=generator).positions.norm(dim=1)
            reach = float(outline.max()) + half_thickness(POPC) + 10.0
            place = _free_place(half, reach, taken, generator)
            taken.append((place, reach))
            turn = random_rotations(1, generator)
            lipids = membrane(surface, spacing=kind.spacing, generator=generator)
            beside: list[tuple[Atoms, Poses]] = []
            for guest in kind.embedded:
                molecule = read(guest.structure, guest.assembly).centred()
                how = {"axis": guest.axis, "height": guest.height, "beside": beside, "generator": generator}
                poses = embed(surface, molecule, guest.copies, **how)
                beside.append((molecule, poses))
                lipids = cleared(lipids, molecule, poses)
                seen = _within(_carried(poses, turn[0], place), molecule, half)
                embedded.setdefault(_stem(guest.structure), []).append((molecule, seen))
            lipids = lipids.index(((lipids.positions @ turn[0].T + place).abs() <= half).all(1))
            if len(lipids):
                things.append(Thing(lipids, Poses(turn, place[None]), "membrane", "membrane"))
    for name, parts in embedded.items():
        poses = Poses(*(torch.cat([getattr(p, f) for _, p in parts]) for f in ("rotations", "positions")))
        things.append(Thing(parts[0][0], poses, name, "protein"))
    return things


def _surface(section: MembraneSection, generator: torch.Generator) -> Surface:
    radius = section.radius
    if section.shape == "sphere":
        return sphere(radius)
    if section.shape == "ellipsoid":
        x, y, z = section.aspect
        return Ellipsoid((x * radius, y * radius, z * radius))
    if section.shape == "torus":
        return Torus(radius, section.tube)
    if section.shape == "patch":
        return patch((2 * radius, 2 * radius), bending=section.bending, generator=generator)
    return irregular_vesicle(radius, bending=section.bending, amplitude=section.amplitude, generator=generator)


def _free_place(
    half: torch.Tensor, reach: float, taken: Sequence[tuple[torch.Tensor, float]], generator: torch.Generator
) -> torch.Tensor:
    """Centre (3,) [Å] of a ball of radius `reach` apart from others: within the depth of the box, if it fits there."""
    room = half.clone()
    room[2] = max(float(half[2]) - reach, 0.0)
    for _ in range(_TRIES):
        place = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * room
        if all(float((place - other).norm()) >= reach + radius + _GAP for other, radius in taken):
            return place
    raise ValueError(
        f"specimen.membranes: number {len(taken) + 1}, {reach:.0f} Å in radius, found no free place in a box of "
        f"{tuple((2 * half).tolist())} Å. Enlarge specimen.size, or take fewer or smaller ones."
    )


def _carried(poses: Poses, turn: torch.Tensor, place: torch.Tensor) -> Poses:
    return poses.replace(rotations=turn @ poses.rotations, positions=poses.positions @ turn.T + place)


def _within(poses: Poses, molecule: Atoms, half: torch.Tensor) -> Poses:
    """Those copies that lie in the box with all their atoms."""
    spread = (poses.rotations.abs() @ molecule.positions.double().abs().amax(0)).expand(len(poses.positions), 3)
    return poses.index(((poses.positions.abs() + spread) <= half).all(1))


# filaments ------------------------------------------------------------------------------------------------------------


def _filaments(
    section: SpecimenSection, read: Callable, standing: Sequence[Thing], generator: torch.Generator
) -> list[Thing]:
    """Filaments that cross neither each other nor what stands already."""
    things: list[Thing] = []
    for kind in section.filaments:
        monomer = read(kind.structure, kind.assembly)
        if kind.offset is not None:
            monomer = monomer.centred().moved(shift=torch.tensor([kind.offset, 0.0, 0.0], dtype=torch.float64))
        straight, persistence = _straight(kind)
        radius = float(monomer.positions[:, :2].norm(dim=1).max())
        poses = _free_filaments(section, kind, straight, persistence, radius, [*standing, *things], generator)
        if len(poses.positions):
            things.append(Thing(monomer, poses, kind.name or _stem(kind.structure), "filament"))
    return things


def _straight(section: FilamentSection) -> tuple[Poses, float]:
    """Poses of a straight filament, and its persistence length [Å]."""
    if section.symmetry == "microtubule":
        return microtubule(section.length), MICROTUBULE_PERSISTENCE
    if section.symmetry == "actin":
        return helix(ACTIN, length=section.length), ACTIN.persistence
    persistence = math.inf if section.persistence is None else section.persistence
    return helix(Helix(section.rise, section.twist, section.cyclic), length=section.length), persistence


def _free_filaments(
    section: SpecimenSection,
    kind: FilamentSection,
    straight: Poses,
    persistence: float,
    radius: float,
    standing: Sequence[Thing],
    generator: torch.Generator,
) -> Poses:
    """Filaments drawn until as many as are asked for lie clear of everything else; each of its own instance."""
    tree = KDTree(_places(standing).numpy()) if standing else None
    for _ in range(_TRIES // 20):
        extra = 0 if tree is None else kind.copies
        drawn = place_filaments(
            straight,
            kind.copies + extra,
            section.size,
            radius=radius,
            persistence=persistence,
            crossing=True,
            generator=generator,
        )
        if tree is None or drawn.instances is None:
            return drawn
        apart, _ = tree.query(drawn.positions.numpy(), distance_upper_bound=2 * radius + section.gap)
        meets = drawn.instances[torch.as_tensor(apart) < 2 * radius + section.gap].unique()
        clear = [i for i in drawn.instances.unique().tolist() if i not in meets.tolist()]
        if len(clear) >= kind.copies:
            return drawn.index(torch.isin(drawn.instances, torch.tensor(clear[: kind.copies], dtype=torch.long)))
    raise ValueError(
        f"specimen.filaments: {kind.copies} filaments of {kind.length:g} Å do not lie clear of the membranes and films "
        f"in a box of {section.size} Å. Enlarge specimen.size, or take fewer or shorter ones."
    )


def _places(things: Sequence[Thing]) -> torch.Tensor:
    """Points (point, 3) [Å] no farther apart than lipids: atoms of what is large, centres of the copies of the rest."""
    parts = []
    for thing in things:
        rotations, origins = thing.poses.rotations, thing.poses.positions
        some = thing.atoms.positions.double()[:: 1 if len(origins) > 1 else 7]
        parts += [some @ r.T + o for r, o in zip(rotations, origins, strict=True)]
    return torch.cat(parts)
