"""The atoms of a specimen in portions that fade, absorb and displace ice alike.

Atoms of molecules take the room in the ice that they take in solution, and absorb by it. Solids take that of their own
lattice, absorb with their own mean free path, and do not fade; deposits, which stand on the ice, displace none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from cryosim.core.inelastic import SOLID_PATHS
from cryosim.core.record import differentiated, hidden
from cryosim.specimen.atoms import CLASSES, Atoms, Poses
from cryosim.specimen.damage import Damage, alike
from cryosim.specimen.potential import (
    AtomSlices,
    Factors,
    Fading,
    SliceGrid,
    SummedSlices,
    placed_slices,
    potential_factors,
)
from cryosim.specimen.references import pays, reference_slices
from cryosim.specimen.scattering_factors import (
    Parametrization,
    displaced_solvent_factor,
    solid_volume_factor,
)

Copies = Literal["atoms", "reference"]
"""How copies of a molecule are placed: every atom, or the points of a reference where those are fewer."""

_SOLID, _DEPOSIT = CLASSES.index("solid"), CLASSES.index("deposit")
_SUBSTANCE_OF = {1: 8}  # hydrogens of a solid are those of frozen water
_LARGEST = 250.0  # [Å] across a body that moves as one


class Portion(NamedTuple):
    """Some atoms of every molecule.

    Attributes
    ----------
    molecules : list of Atoms
    poses : list of Poses
    which : int
        A class that fades as all of them do.
    solid : int or None
        Atomic number that stands for the substance of a solid; None is anything else.
    in_ice : bool
        Whether they displace ice.
    """

    molecules: list[Atoms]
    poses: list[Poses]
    which: int
    solid: int | None = None
    in_ice: bool = True

    @property
    def volume_factor(self) -> Factors:
        """Transform (element, ...) [Å^3] of the room that each atom takes."""
        return displaced_solvent_factor if self.solid is None else solid_volume_factor

    def mean_free_path(self, molecules: float | torch.Tensor) -> float | torch.Tensor:
        """Inelastic, at 300 kV [Å]; `molecules` for what is not a solid."""
        return molecules if self.solid is None else SOLID_PATHS[self.solid]


def portions(damage: Damage | None, molecules: Sequence[Atoms], poses: Sequence[Poses]) -> list[Portion]:
    """All portions of a specimen.

    Raises
    ------
    ValueError
        When a solid is made of an element whose volume and mean free path are not known here.
    """
    found: dict[object, Portion] = {}
    for atoms, places in zip(molecules, poses, strict=True):
        if len(atoms) == 0 or len(places.positions) == 0:
            continue
        _check_finite(atoms)
        soft = (atoms.classes != _SOLID) & (atoms.classes != _DEPOSIT)
        parts: list[tuple[object, Atoms, Portion]] = []
        for key, part, which in alike(damage, atoms.index(soft) if not bool(soft.all()) else atoms):
            parts.append((key, part, Portion([], [], which)))
        for which in (_SOLID, _DEPOSIT):
            mine = atoms.classes == which
            for number in torch.unique(atoms.numbers[mine]).tolist():
                substance = _substance(number)
                blank = Portion([], [], which, substance, which == _SOLID)
                parts.append(((which, substance), atoms.index(mine & (atoms.numbers == number)), blank))
        for key, part, blank in parts:
            portion = found.setdefault(key, blank)
            portion.molecules.append(part)
            portion.poses.append(places)
    return list(found.values())


def _check_finite(atoms: Atoms) -> None:
    """What is not a number would be left out, as it lies nowhere."""
    if hidden():
        return
    for name in ("positions", "b_factors", "occupancies"):
        if not bool(torch.isfinite(getattr(atoms, name).detach()).all()):
            raise ValueError(f"Specimen.molecules: expected atoms with finite {name}, got NaN or infinity.")


def _substance(number: int) -> int:
    substance = _SUBSTANCE_OF.get(number, number)
    if substance not in SOLID_PATHS:
        raise ValueError(
            f"tilted_slices: expected solids of carbon, platinum, gold or water (elements {sorted(SOLID_PATHS)}), got "
            f"element {number}. Give its atoms another of the classes in cryosim.specimen.atoms.CLASSES."
        )
    return substance


Source = AtomSlices | SummedSlices


def slices_of(
    portion: Portion,
    grid: SliceGrid,
    copies: Copies,
    fading: Fading | None,
    parametrization: Parametrization,
    solvent: float | torch.Tensor,
) -> Source:
    """Slices of the potential [V·Å] of a portion above that of the ice it displaces."""
    volume = portion.volume_factor
    factors = potential_factors(parametrization, solvent if portion.in_ice else 0.0, volume)
    slopes = volume if portion.in_ice and differentiated(solvent) else None
    return _placed(portion, grid, copies, fading, factors, slopes)


def volumes_of(portion: Portion, grid: SliceGrid, copies: Copies, fading: Fading | None) -> Source:
    """Slices of the depth [Å] that a portion takes."""
    return _placed(portion, grid, copies, fading, portion.volume_factor, None)


def _placed(
    portion: Portion,
    grid: SliceGrid,
    copies: Copies,
    fading: Fading | None,
    factors: Factors,
    slopes: Factors | None,
) -> Source:
    """Slices of a portion: atom by atom, and where it is asked for and pays, by references."""
    by_atoms, by_reference = [], []
    for atoms, poses in zip(portion.molecules, portion.poses, strict=True):
        refers = copies == "reference" and slopes is None and pays(atoms, len(poses.positions), grid.pixel_size)
        (by_reference if refers else by_atoms).append((atoms, poses))
    parts = []
    if by_atoms:
        molecules, poses = zip(*by_atoms, strict=True)
        parts.append(placed_slices(molecules, poses, factors, grid, slopes=slopes, fading=fading))
    if by_reference:
        molecules, poses = zip(*by_reference, strict=True)
        parts.append(reference_slices(molecules, poses, factors, grid, fading=fading))
    return parts[0] if len(parts) == 1 else SummedSlices(tuple(parts))


def bodies(molecules: Sequence[Atoms], poses: Sequence[Poses]) -> tuple[list[Atoms], list[Poses]]:
    """Molecules and poses, with what is larger than a body cut into cells, each about an origin of its own."""
    cut, placed = [], []
    for atoms, places in zip(molecules, poses, strict=True):
        positions = atoms.positions.detach()
        if len(atoms) == 0 or float(positions.abs().max()) <= _LARGEST:
            cut.append(atoms)
            placed.append(places)
            continue
        whole = float((positions.amax(0) - positions.amin(0)).max()) <= 2 * _LARGEST  # but far from its origin
        cells = torch.zeros_like(positions).long() if whole else torch.floor(positions / _LARGEST).long()
        _, which = torch.unique(cells, dim=0, return_inverse=True)
        order = torch.argsort(which, stable=True)
        for mine in order.split(torch.bincount(which).tolist()):
            centre = (positions[mine].amax(0) + positions[mine].amin(0)) / 2
            cut.append(atoms.index(mine).moved(shift=-centre))
            placed.append(places.replace(positions=places.positions + (places.rotations @ centre.to(places.rotations))))
    return cut, placed
