"""A specimen: molecules at their poses in a slab of ice, and its slices as seen at one tilt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cryosim.core.fourier import number
from cryosim.core.inelastic import ICE_INNER_POTENTIAL
from cryosim.core.record import Record, item
from cryosim.core.rotation import random_rotations, tilt_rotation
from cryosim.specimen.atoms import Atoms, concatenate
from cryosim.specimen.potential import AtomSlices, Slices, potential_slices
from cryosim.specimen.scattering_factors import Parametrization


class Ice(Record):
    """A slab of vitreous ice, wider than any field of view, normal to z at zero tilt.

    Atoms displace ice wherever they stand, so they belong inside the slab. With amplitude contrast A the ice weakens
    the beam by exp(-2 sigma A V t / cos(tilt)): a mean free path of 2400 Å at 300 kV for A = 0.07, 1700 Å for A = 0.1.

    Attributes
    ----------
    thickness : float or tensor ()
        [Å].
    inner_potential : float or tensor ()
        Constant potential of the ice [V]. Atoms displace it by their volumes.
    """

    thickness: float | torch.Tensor = item(0)
    inner_potential: float | torch.Tensor = item(0, default=ICE_INNER_POTENTIAL)


class Poses(Record):
    """Where the copies of one molecule stand: rotated by `rotations`, then moved to `positions`.

    Attributes
    ----------
    rotations : tensor (copy, 3, 3)
    positions : tensor (copy, 3)
        (x, y, z) [Å].
    """

    rotations: torch.Tensor = item(2)
    positions: torch.Tensor = item(1)


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

    Raises
    ------
    ValueError
        When molecules and poses differ in number.
    """

    molecules: tuple[Atoms, ...]
    poses: tuple[Poses, ...]
    size: tuple[float, float, float]
    ice: Ice | None = None

    def __post_init__(self) -> None:
        for name in ("molecules", "poses", "size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.molecules) != len(self.poses) or not self.molecules:
            raise ValueError(
                f"Specimen: expected one Poses for each molecule, got {len(self.molecules)} molecules and "
                f"{len(self.poses)} poses."
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
    if ice is not None and size[2] > number(ice.thickness):
        raise ValueError(
            f"place_randomly: a box {size[2]:g} Å deep does not lie inside ice {number(ice.thickness):g} Å thick. "
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


class ImmersedSlices(Record):
    """Source of slices: atoms, which displace the ice, and the ice itself, shared evenly by the slices.

    Ice of constant potential has no structure across the beam: it turns the phase of the wave and, with amplitude
    contrast, weakens it, by the same factor everywhere, at whatever height. Made by `tilted_slices`.
    """

    atoms: Slices | AtomSlices
    ice: torch.Tensor = item(0)

    @property
    def pixel_size(self) -> float | torch.Tensor:
        """[Å]."""
        return self.atoms.pixel_size

    @property
    def thickness(self) -> float | torch.Tensor:
        """Of a slice [Å]."""
        return self.atoms.thickness

    def __len__(self) -> int:
        return len(self.atoms)

    def __getitem__(self, i: int) -> torch.Tensor:
        potential = self.atoms[i]
        return potential + (self.ice / len(self.atoms)).to(potential)


def tilted_slices(
    specimen: Specimen,
    angle: float | torch.Tensor,
    shape: tuple[int, int],
    pixel_size: float | torch.Tensor,
    thickness: float | torch.Tensor,
    *,
    axis_angle: float | torch.Tensor = 0.0,
    shift: torch.Tensor | None = None,
    parametrization: Parametrization = "lobato",
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    atoms: Atoms | None = None,
) -> ImmersedSlices:
    """Slices of a specimen turned by R_z(axis_angle) R_y(angle) and displaced in the image plane.

    Parameters
    ----------
    specimen : Specimen
    angle, axis_angle : float or tensor ()
        [deg].
    shape : (int, int)
        (y, x) of the simulated field [px]; atoms beyond it are left out.
    pixel_size, thickness : float or tensor ()
        [Å].
    shift : tensor (2,), optional
        (x, y) displacement of the content [Å].
    parametrization, width, dtype
        As in `potential_slices`.
    atoms : Atoms, optional
        `assemble(specimen)`, where the caller has it already.

    Returns
    -------
    ImmersedSlices
        As many slices about z = 0 as the atoms reach; their ice amounts to inner potential * thickness / cos(angle).
    """
    atoms = assemble(specimen) if atoms is None else atoms
    atoms = atoms.moved(tilt_rotation(angle, axis_angle))
    if shift is not None:
        atoms = atoms.moved(shift=torch.cat([shift, shift.new_zeros(1)]))
    half = torch.tensor([0.5 * n * number(pixel_size) for n in (shape[1], shape[0])], dtype=atoms.positions.dtype)
    inside = (atoms.positions.detach()[:, :2].abs() <= half.to(atoms.positions.device)).all(1)
    ice = specimen.ice
    solvent = ice.inner_potential if ice else 0.0
    if inside.any():
        atoms = atoms.index(inside)
        reach = float(atoms.positions.detach()[:, 2].abs().max())
        n_slices = 2 * math.ceil(reach / number(thickness)) + 1  # the outermost centres lie beyond every atom
        source = potential_slices(
            atoms, shape, pixel_size, thickness, n_slices, parametrization, solvent=solvent, width=width, dtype=dtype
        )
    else:
        source = Slices(torch.zeros(1, *shape, dtype=dtype), pixel_size, thickness)
    cosine = torch.cos(torch.deg2rad(torch.as_tensor(angle, dtype=torch.float64)))
    column = ice.inner_potential * ice.thickness / cosine if ice else torch.zeros(())  # [V·Å]
    return ImmersedSlices(source, column)
