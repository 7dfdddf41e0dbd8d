"""Potentials of many atoms against abTEM 1.0.11.

abTEM runs as it comes (its default transform, single precision, no lazy graph). Its potential takes no B-factors, and
is less exact: see `tests/agree/test_abtem.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.bench.table import Entry

N_ATOMS, SHAPE, N_SLICES, PIXEL, THICKNESS = 75_000, (512, 512), 96, 0.5, 2.0
COMPOSITION = {6: 0.482, 7: 0.182, 8: 0.298, 15: 0.030, 16: 0.003, 12: 0.005}  # about that of a ribosome, no hydrogen


def random_atoms(b_factors: bool = False):
    """Atoms uniform in the box of the slices."""
    from cryosim.specimen.atoms import Atoms

    generator = torch.Generator().manual_seed(1)
    extent = torch.tensor([SHAPE[1] * PIXEL, SHAPE[0] * PIXEL, (N_SLICES - 1) * THICKNESS], dtype=torch.float64)
    positions = (torch.rand(N_ATOMS, 3, generator=generator, dtype=torch.float64) - 0.5) * extent
    positions[:, 2] -= THICKNESS / 2  # slice n // 2 of an even number stands at z = 0
    weights = torch.tensor(list(COMPOSITION.values()))
    kinds = torch.multinomial(weights, N_ATOMS, replacement=True, generator=generator)
    numbers = torch.tensor(list(COMPOSITION))[kinds]
    b = 100 * torch.rand(N_ATOMS, generator=generator, dtype=torch.float64) if b_factors else None
    return Atoms(positions, numbers, b)


def our_potential(b_factors: bool) -> Callable[[], object]:
    from cryosim.specimen.potential import potential_slices

    atoms = random_atoms(b_factors)

    def work():
        source = potential_slices(atoms, SHAPE, PIXEL, THICKNESS, N_SLICES, dtype=torch.float32)
        return torch.stack([source[i] for i in range(N_SLICES)])

    return work


def configured_abtem():
    import abtem

    abtem.config.set({"device": "cpu", "precision": "float32", "dask.lazy": False})
    return abtem


def abtem_potential() -> Callable[[], object]:
    import ase

    abtem = configured_abtem()
    atoms = random_atoms()
    extent = (SHAPE[1] * PIXEL, SHAPE[0] * PIXEL, N_SLICES * THICKNESS)
    positions = atoms.positions.numpy() + [e / 2 for e in extent]
    crystal = ase.Atoms(numbers=atoms.numbers.numpy(), positions=positions, cell=extent, pbc=True)

    def work():
        potential = abtem.Potential(
            crystal,
            gpts=(SHAPE[1], SHAPE[0]),
            slice_thickness=THICKNESS,
            parametrization="lobato",
            projection="infinite",
        )
        return potential.build(lazy=False)

    return work


BOX = f"{SHAPE[0]} x {SHAPE[1]} x {N_SLICES}"

ENTRIES = [
    Entry(
        "potential of atoms, B = 0",
        f"{N_ATOMS} atoms, {BOX}, float32",
        lambda: our_potential(False),
        abtem_potential,
        "abTEM 1.0.11, projection='infinite'",
        "2.9 on 2 cores",
    ),
    Entry("potential of atoms, each its own B", f"{N_ATOMS} atoms, {BOX}, float32", lambda: our_potential(True)),
]
