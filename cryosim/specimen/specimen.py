"""A specimen: molecules at their poses in a slab of ice, and its slices as seen at one tilt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cryosim.core.fourier import number
from cryosim.core.inelastic import absorption_potential, mean_free_path
from cryosim.core.record import Record, differentiated, hidden, item, static
from cryosim.core.rotation import random_rotations, tilt_rotation
from cryosim.specimen.atoms import Atoms, concatenate
from cryosim.specimen.damage import Damage, alike, fading_of, water_decay
from cryosim.specimen.ice import Absorption, Ice, ImmersedSlices, reach_of, surfaces, thinnest
from cryosim.specimen.moment import Moment
from cryosim.specimen.motion import Motion, displaced, drift_at
from cryosim.specimen.potential import AtomSlices, Slices, SummedSlices, displaced_volume_slices, potential_slices
from cryosim.specimen.scattering_factors import Parametrization
from cryosim.specimen.water import WaterField, outside, water_molecules


class Poses(Record):
    """Where the copies of one molecule stand: rotated by `rotations`, then moved to `positions`.

    Attributes
    ----------
    rotations : tensor (copy, 3, 3)
    positions : tensor (copy, 3)
        (x, y, z) [Å].
    instances : tensor (copy,) or None
        Whole numbers: copies of one number belong to one thing, as the subunits of a filament do. None is each its own.
    """

    rotations: torch.Tensor = item(2)
    positions: torch.Tensor = item(1)
    instances: torch.Tensor | None = item(0, default=None)


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
    voltage: float | torch.Tensor | None = None,
    moment: Moment | Sequence[Moment] | None = None,
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
    voltage : float or tensor (), optional
        [kV]; needed where the specimen has an absorption or damage, which depend on it.
    moment : Moment or sequence of Moment, optional
        Which frame of which exposure, after how many electrons: damage and motion go by it, and the fluctuations of the
        ice. When left out, the specimen is fresh and stands still. Several frames of a specimen that stands still
        make slices (frame, y, x) for little more work than one.

    Returns
    -------
    ImmersedSlices
        As many slices about z = 0 as the atoms reach, and the ice where it has relief or structure; together they hold
        a column of ice of thickness / cos(angle).

    Raises
    ------
    ValueError
        When a slice is thicker than the specimen, the angle reaches 90 degrees, the voltage is missing, or a gradient
        in pixel_size or thickness is asked of structured ice.
    """
    if not hidden() and not abs(number(angle)) < 90:
        raise ValueError(f"tilted_slices: expected an angle between -90 and 90 [deg], got {number(angle):g}.")
    depth = max(specimen.size[2], number(specimen.ice.thickness) if specimen.ice else 0.0)
    if number(thickness) > depth:
        raise ValueError(
            f"tilted_slices: slices of {number(thickness):g} Å are thicker than the specimen, {depth:g} Å. Take "
            "thinner ones; 2 to 10 Å are usual."
        )
    structured = specimen.ice is not None and specimen.ice.structure == "water"
    if structured and (differentiated(pixel_size) or differentiated(thickness)):
        raise ValueError(
            "tilted_slices: the fluctuations of structured ice have no gradient in pixel_size or thickness; give "
            "them as numbers, or take Ice(structure='constant')."
        )
    moments = [Moment()] if moment is None else [moment] if isinstance(moment, Moment) else list(moment)
    if len(moments) != 1 and (not moments or structured or specimen.motion is not None):
        raise ValueError(
            "tilted_slices: expected one moment, or several of a specimen without motion in ice without structure, got "
            f"{len(moments)}. Ask for one at a time."
        )
    motion = None if moment is None else specimen.motion
    moment = moments[0]
    atoms = displaced(assemble(specimen) if atoms is None else atoms, motion, moment)
    drift = drift_at(motion, moment)
    shift = _whole_shift(shift, drift)
    atoms = atoms.moved(tilt_rotation(angle, axis_angle), shift)
    half = torch.tensor([0.5 * n * number(pixel_size) for n in (shape[1], shape[0])], dtype=atoms.positions.dtype)
    inside = (atoms.positions.detach()[:, :2].abs() <= half.to(atoms.positions.device)).all(1)
    atoms = atoms.index(inside)
    ice, absorption = specimen.ice, specimen.absorption
    seen = None
    if ice is not None and (structured or ice.relief is not None):
        seen = surfaces(ice, angle, axis_angle, shift, shape, pixel_size, atoms.positions.device)
    reach = max(reach_of(ice, seen), float(atoms.positions.detach()[:, 2].abs().max()) if len(atoms) else 0.0)
    n_slices = 2 * math.ceil(reach / number(thickness)) + 1  # all lies within the centres
    grid = _Grid(shape, pixel_size, thickness, n_slices, parametrization, width, dtype)
    potential = torch.as_tensor(ice.inner_potential if ice else 0.0, dtype=torch.float64)
    source, volume = _molecules(specimen, atoms, grid, moments, voltage, structured or absorption is not None)
    cosine = torch.cos(torch.deg2rad(torch.as_tensor(angle, dtype=torch.float64)))
    return ImmersedSlices(
        source,
        potential,
        (ice.thickness if ice else 0.0) / cosine,
        volume,
        None if absorption is None else _imaginary_potentials(absorption, ice, voltage),
        seen,
        _water(specimen, moment, voltage, grid, atoms.positions.device) if structured else None,
        drift[:2] if structured and drift is not None else None,
    )


class _Grid(NamedTuple):
    """Where slices are sampled, and how."""

    shape: tuple[int, int]
    pixel_size: float | torch.Tensor
    thickness: float | torch.Tensor
    n_slices: int
    parametrization: Parametrization
    width: int
    dtype: torch.dtype


def _whole_shift(shift: torch.Tensor | None, drift: torch.Tensor | None) -> torch.Tensor | None:
    """Displacement (3,) [Å] in the frame of the microscope, of a shift (2,) and a drift (3,)."""
    if shift is None:
        return drift
    shift = torch.cat([shift, shift.new_zeros(1)])
    return shift if drift is None else shift + drift.to(shift.device)


def _molecules(
    specimen: Specimen,
    atoms: Atoms,
    grid: _Grid,
    moments: Sequence[Moment],
    voltage: float | torch.Tensor | None,
    volumes: bool,
) -> tuple[Slices | AtomSlices | SummedSlices, Slices | AtomSlices | SummedSlices | None]:
    """Slices of the molecules, and of the depth of ice they displace where `volumes` asks for it."""
    if len(atoms) == 0:
        nothing = torch.zeros(1, 1, 1, dtype=grid.dtype, device=atoms.positions.device)
        empty = Slices(nothing.expand(grid.n_slices, *grid.shape), grid.pixel_size, grid.thickness)
        return empty, empty if volumes else None
    solvent = specimen.ice.inner_potential if specimen.ice else 0.0
    where = (grid.shape, grid.pixel_size, grid.thickness, grid.n_slices)
    potentials, displaced_volumes = [], []
    for part, which in alike(specimen.damage, atoms):
        fading = fading_of(specimen.damage, moments, voltage, which)
        how: dict = {"fading": fading, "width": grid.width, "dtype": grid.dtype}
        potentials.append(potential_slices(part, *where, grid.parametrization, solvent=solvent, **how))
        if volumes:
            displaced_volumes.append(displaced_volume_slices(part, *where, **how))
    source, volume = (
        parts[0] if len(parts) == 1 else SummedSlices(tuple(parts)) if parts else None
        for parts in (potentials, displaced_volumes)
    )
    assert source is not None
    return source, volume


def _water(
    specimen: Specimen,
    moment: Moment,
    voltage: float | torch.Tensor | None,
    grid: _Grid,
    device: torch.device,
) -> WaterField:
    """Fluctuations of the ice at a moment: those of two exposures are independent, those of two frames alike."""
    assert specimen.ice is not None
    digest = hashlib.blake2b(f"{specimen.ice.seed} {moment.tilt}".encode(), digest_size=8).digest()
    decay = 0.0 if specimen.damage is None else water_decay(specimen.damage, voltage) * number(moment.during)
    return WaterField(
        grid.shape,
        number(grid.pixel_size),
        number(grid.thickness),
        seed=int.from_bytes(digest, "big") >> 1,
        parametrization=grid.parametrization,
        frame=moment.frame,
        decay=decay,
        dtype=grid.dtype,
        device=device,
    )


def _imaginary_potentials(
    absorption: Absorption, ice: Ice | None, voltage: float | torch.Tensor | None
) -> torch.Tensor:
    """Of the ice (0 in vacuum) and of the molecules (2,) [V]."""
    if voltage is None:
        raise ValueError("tilted_slices: expected the voltage [kV], as the specimen has an absorption; give voltage=.")
    paths = (
        mean_free_path(torch.as_tensor(x, dtype=torch.float64), voltage)
        for x in (absorption.medium, absorption.molecules)
    )
    medium, molecules = (torch.as_tensor(absorption_potential(path, voltage)) for path in paths)
    return torch.stack([medium if ice else torch.zeros_like(medium), molecules])


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
    here = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    size = (*specimen.size[:2], thickness)
    everything = ((*specimen.molecules, water), (*specimen.poses, here), size)
    return Specimen(*everything, damage=specimen.damage, motion=specimen.motion)
