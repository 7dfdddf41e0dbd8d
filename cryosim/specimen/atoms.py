"""Atoms, the only thing a structure file is turned into, and where copies of them stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cryosim.core.record import Record, hidden, item

CLASSES = ("other", "carboxyl", "sulfur", "metal", "nucleic acid", "water", "solid", "deposit")
"""Kinds of atoms that the beam treats differently, as `read_atoms` tells them: side-chain carboxyl groups, the sulfur
of cysteine, metals, all of nucleic acids, water, and the rest. A solid (a film of carbon, a bead of gold) does not fade
and takes the room of its own lattice; a deposit is a solid that stands on the ice and displaces none of it."""


class Atoms(Record):
    """Point scatterers.

    Attributes
    ----------
    positions : tensor (atom, 3)
        (x, y, z) [Å], origin at the box centre.
    numbers : tensor (atom,)
        Atomic numbers, 1 to 98.
    b_factors : tensor (atom,)
        Isotropic displacement B = 8 pi^2 <u^2> [Å^2]; zeros when left out.
    occupancies : tensor (atom,)
        [1]; ones when left out.
    classes : tensor (atom,)
        Whole numbers, a row of `CLASSES` or your own, by which `Damage` tells atoms apart; zeros when left out.

    Raises
    ------
    ValueError
        When the shapes disagree.
    """

    positions: torch.Tensor = item(1)
    numbers: torch.Tensor = item(0)
    b_factors: torch.Tensor = item(0, default=None)
    occupancies: torch.Tensor = item(0, default=None)
    classes: torch.Tensor = item(0, default=None)

    def __post_init__(self) -> None:
        for name, dtype in (("positions", torch.float64), ("numbers", torch.long)):
            if not isinstance(getattr(self, name), torch.Tensor):
                object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=dtype))
        if self.numbers.is_floating_point():
            raise ValueError(f"Atoms.numbers: expected whole numbers, got {self.numbers.dtype}.")
        if self.positions.ndim != 2 or self.positions.shape[1] != 3:
            raise ValueError(f"Atoms.positions: expected shape (atom, 3), got {tuple(self.positions.shape)}.")
        n = self.positions.shape[0]
        for name, blank in (("b_factors", torch.zeros), ("occupancies", torch.ones)):
            like = {"dtype": self.positions.dtype, "device": self.positions.device}
            given = getattr(self, name)
            if not isinstance(given, torch.Tensor):
                value = blank(n, **like) if given is None else torch.as_tensor(given, **like)
                object.__setattr__(self, name, value)
        if not isinstance(self.classes, torch.Tensor):
            object.__setattr__(self, "classes", self._whole(self.classes, n))
        for name in ("numbers", "b_factors", "occupancies", "classes"):
            shape = tuple(getattr(self, name).shape)
            if shape != (n,):
                raise ValueError(f"Atoms.{name}: expected shape ({n},) as positions has {n} atoms, got {shape}.")

    def _whole(self, given, n: int) -> torch.Tensor:
        if given is None:
            return torch.zeros(n, dtype=torch.long, device=self.positions.device)
        return torch.as_tensor(given, dtype=torch.long, device=self.positions.device)

    def __len__(self) -> int:
        return self.positions.shape[0]

    def moved(self, rotation: torch.Tensor | None = None, shift: torch.Tensor | None = None) -> Atoms:
        """Copy rotated by `rotation` (3, 3) and then shifted by `shift` (3,) [Å]."""
        positions = self.positions
        if rotation is not None:
            positions = positions @ rotation.to(positions).T
        if shift is not None:
            positions = positions + shift.to(positions)
        return self.replace(positions=positions)

    def centred(self) -> Atoms:
        """Copy with the mean position, weighted by atomic number, at the origin."""
        weights = self.numbers.to(self.positions.dtype)[:, None]
        return self.moved(shift=-(weights * self.positions).sum(0) / weights.sum())


class Poses(Record):
    """Where the copies of one molecule stand: rotated by `rotations`, then moved to `positions`.

    Raises
    ------
    ValueError
        When the shapes disagree or a number is not finite.

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

    def __post_init__(self) -> None:
        shapes = tuple(self.rotations.shape), tuple(self.positions.shape)
        n = shapes[1][0] if shapes[1] else 0
        mine = (n,) if self.instances is None else tuple(self.instances.shape)
        if shapes != ((n, 3, 3), (n, 3)) or mine != (n,):
            raise ValueError(
                f"Poses: expected rotations (copy, 3, 3), positions (copy, 3) and instances (copy,) if any, got "
                f"{shapes[0]}, {shapes[1]} and {mine}."
            )
        if hidden():
            return
        for name in ("rotations", "positions"):
            if not bool(torch.isfinite(getattr(self, name).detach()).all()):
                raise ValueError(f"Poses.{name}: expected finite numbers, got NaN or infinity.")


def unmoved(device: torch.device | None = None) -> Poses:
    """The pose of one copy that stands as it is."""
    return Poses(
        torch.eye(3, dtype=torch.float64, device=device)[None], torch.zeros(1, 3, dtype=torch.float64, device=device)
    )


def concatenate(parts: Sequence[Atoms]) -> Atoms:
    """All atoms of `parts` as one record."""
    return Atoms(
        positions=torch.cat([p.positions for p in parts]),
        numbers=torch.cat([p.numbers for p in parts]),
        b_factors=torch.cat([p.b_factors for p in parts]),
        occupancies=torch.cat([p.occupancies for p in parts]),
        classes=torch.cat([p.classes for p in parts]),
    )
