"""A specimen: molecules at their poses in a slab of ice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cryosim.core.fourier import number
from cryosim.core.record import Record, static
from cryosim.core.rotation import random_rotations
from cryosim.specimen.atoms import Atoms, Poses, concatenate, unmoved
from cryosim.specimen.damage import Damage
from cryosim.specimen.ice import Absorption, Ice, thinnest
from cryosim.specimen.motion import Motion
from cryosim.specimen.water import outside, water_molecules


class Specimen(Record):
    """Molecules at their poses, in ice or in vacuum.

    Attributes
    ----------
    molecules : tuple of Atoms
        Each about its own origin.
    poses : tuple of Poses
        One a molecule.
    size : (float, float, float)
        Extent (x, y, z) of the region that holds the molecules [Å].
    ice : Ice or None
    absorption : Absorption or None
        By inelastic scattering; None leaves it to `Optics.amplitude_contrast`. Give one of the two.
    damage : Damage or None
        By the electrons; None is a specimen that does not change.
    motion : Motion or None
        Of what is seen, frame by frame; None stands still.
    names : tuple of str
        Of the molecules; "molecule 1" and so on when left out.
    kinds : tuple of str
        What each is, for labels: "protein", "membrane", "filament", "gold", ...; "protein" when left out.

    Raises
    ------
    ValueError
        When molecules, poses, names and kinds differ in number.
    """

    molecules: tuple[Atoms, ...]
    poses: tuple[Poses, ...]
    size: tuple[float, float, float]
    ice: Ice | None = None
    absorption: Absorption | None = None
    damage: Damage | None = None
    motion: Motion | None = None
    names: tuple[str, ...] = static(default=())
    kinds: tuple[str, ...] = static(default=())

    def __post_init__(self) -> None:
        for name in ("molecules", "poses", "size", "names", "kinds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        n = len(self.molecules)
        if n != len(self.poses) or not self.molecules:
            raise ValueError(
                f"Specimen: expected one Poses for each molecule, got {n} molecules and {len(self.poses)} poses."
            )
        if not self.names:
            object.__setattr__(self, "names", tuple(f"molecule {i}" for i in range(1, n + 1)))
        if not self.kinds:
            object.__setattr__(self, "kinds", ("protein",) * n)
        if not n == len(self.names) == len(self.kinds):
            raise ValueError(
                f"Specimen: expected a name and a kind for each of {n} molecules, got {len(self.names)} and "
                f"{len(self.kinds)}."
            )


def assemble(specimen: Specimen) -> Atoms:
    """All atoms of a specimen at their places, untilted."""
    parts = []
    for molecule, poses in zip(specimen.molecules, specimen.poses, strict=True):
        turned = torch.einsum("cij,aj->cai", poses.rotations.to(molecule.positions), molecule.positions)
        placed = turned + poses.positions.to(molecule.positions)[:, None, :]  # (copy, atom, 3) [Å]
        copies = placed.shape[0]
        parts.append(
            Atoms(
                placed.flatten(0, 1),
                molecule.numbers.repeat(copies),
                molecule.b_factors.repeat(copies),
                molecule.occupancies.repeat(copies),
                molecule.classes.repeat(copies),
            )
        )
    return concatenate(parts)


def place_randomly(
    molecules: Sequence[Atoms],
    copies: Sequence[int],
    size: tuple[float, float, float],
    *,
    ice: Ice | None = None,
    gap: float = 10.0,
    tries: int = 20000,
    generator: torch.Generator | None = None,
) -> Specimen:
    """Specimen with molecules at uniformly random rotations and places, whose enclosing spheres do not overlap.

    Parameters
    ----------
    molecules : sequence of Atoms
        Centred here on their mean position.
    copies : sequence of int
        How many of each; the largest molecules are placed first.
    size : (float, float, float)
        (x, y, z) [Å] of the box about the origin that holds every atom.
    ice : Ice, optional
    gap : float
        Least distance of two spheres [Å].
    tries : int
        Trials for a copy before giving up.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When the copies do not fit, or the box is deeper than the ice.
    """
    centred = [molecule.centred() for molecule in molecules]
    radii = [float(m.positions.norm(dim=1).max()) for m in centred]
    if ice is not None and size[2] > thinnest(ice):
        raise ValueError(
            f"place_randomly: a box {size[2]:g} Å deep does not lie inside ice {thinnest(ice):g} Å thick. "
            "Make the ice thicker or the box flatter."
        )
    box = torch.tensor(size, dtype=torch.float64)
    taken = torch.empty(0, 3, dtype=torch.float64)
    taken_radii = torch.empty(0, dtype=torch.float64)
    places: dict[int, torch.Tensor] = {}
    for which in sorted(range(len(centred)), key=lambda i: -radii[i]):
        half = box / 2 - radii[which]
        mine = []
        for copy in range(copies[which]):
            for _ in range(tries if (half > 0).all() else 0):
                here = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * half
                if ((taken - here).norm(dim=1) > taken_radii + radii[which] + gap).all():
                    break
            else:
                raise ValueError(
                    f"place_randomly: copy {copy + 1} of {copies[which]} of molecule {which} (radius "
                    f"{radii[which]:.0f} Å) found no free place in {tuple(size)} Å. Enlarge size or take fewer copies."
                )
            mine.append(here)
            taken = torch.cat([taken, here[None]])
            taken_radii = torch.cat([taken_radii, torch.tensor([radii[which]], dtype=torch.float64)])
        places[which] = torch.stack(mine) if mine else torch.empty(0, 3, dtype=torch.float64)
    poses = [Poses(random_rotations(copies[i], generator), places[i]) for i in range(len(centred))]
    return Specimen(tuple(centred), tuple(poses), size, ice)


def flooded(specimen: Specimen, *, b_factor: float = 0.0, generator: torch.Generator | None = None) -> Specimen:
    """The specimen with its ice made of explicit molecules, for small fields: 0.093 atoms of water per Å^3.

    Parameters
    ----------
    specimen : Specimen
        With ice; the water fills its `size` in x and y and the thickness of the ice, without relief.
    b_factor : float
        Of the water [Å^2].
    generator : torch.Generator, optional

    Returns
    -------
    Specimen
        One more molecule, the water outside all others, and no ice: beyond its size there is vacuum. Without
        `Absorption`, which tells molecules from a medium. Damage and motion stay; but explicit water fades to its mean
        with the dose, where real water finds new places: structured ice does that.

    Raises
    ------
    ValueError
        When there is no ice.
    """
    if specimen.ice is None:
        raise ValueError("flooded: expected a specimen with ice. Give it one: specimen.replace(ice=Ice(400.0)).")
    thickness = number(specimen.ice.thickness)
    water = water_molecules((*specimen.size[:2], thickness), b_factor=b_factor, generator=generator)
    water = outside(water, assemble(specimen))
    size = (*specimen.size[:2], thickness)
    everything = ((*specimen.molecules, water), (*specimen.poses, unmoved()), size)
    labels: dict = {"names": (*specimen.names, "water"), "kinds": (*specimen.kinds, "water")}
    return Specimen(*everything, damage=specimen.damage, motion=specimen.motion, **labels)
