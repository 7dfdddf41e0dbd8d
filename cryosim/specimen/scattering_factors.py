"""Electron scattering factors of neutral atoms, f(g) [Å], where g = 2 sin(theta) / lambda is the spatial frequency.

Three parametrizations, each a table in `tables/` with its source in the first line. They agree at f(0) to 2 % for
light atoms; Lobato's alone has the right asymptote (Mott-Bethe, f ~ 1/g^2).
"""

from __future__ import annotations

import csv
import functools
from importlib import resources
from typing import Literal, get_args

import torch

Parametrization = Literal["lobato", "kirkland", "peng"]

# Volume that an atom of a macromolecule displaces from its solvent [Å^3]: Fraser, MacRae & Suzuki 1978,
# doi:10.1107/S0021889878014296 (H, C, N, O, S); Svergun, Barberato & Koch 1995,
# doi:10.1107/S0021889895007047 (the rest).
DISPLACED_VOLUMES = {
    1: 5.15,
    6: 16.44,
    7: 2.49,
    8: 9.13,
    15: 5.73,
    16: 19.86,
    12: 17.16,
    20: 31.89,
    25: 9.20,
    26: 7.99,
    30: 9.85,
}
OTHER_DISPLACED_VOLUME = 15.0

# Volume of an atom in its own solid [Å^3]: amorphous carbon of 1.8 g/cm^3, frozen water of 0.917 g/cm^3 (all of it with
# the oxygen), platinum and gold from their lattice constants, a^3 / 4 with a = 3.9242 and 4.0782 Å.
SOLID_VOLUMES = {1: 0.0, 6: 11.08, 8: 32.62, 78: 15.108, 79: 16.957}


def scattering_factor(
    numbers: torch.Tensor, squared_frequency: torch.Tensor, parametrization: Parametrization = "lobato"
) -> torch.Tensor:
    """Elastic electron scattering factors.

    Parameters
    ----------
    numbers : tensor (element,)
        Atomic numbers.
    squared_frequency : tensor (...)
        g^2 [1/Å^2].
    parametrization : {"lobato", "kirkland", "peng"}

    Returns
    -------
    tensor (element, ...)
        f [Å]; without the relativistic factor, which stands in the interaction constant.

    Raises
    ------
    ValueError
        For an unknown parametrization or an element that its table lacks.
    """
    columns = [
        c.to(squared_frequency).reshape(*c.shape, *[1] * squared_frequency.ndim)
        for c in _coefficients(tuple(numbers.tolist()), parametrization)
    ]  # each (term, element, 1...)
    g2 = squared_frequency
    if parametrization == "lobato":
        a, b = columns
        return (a * (2 + b * g2) / (1 + b * g2) ** 2).sum(0)
    if parametrization == "kirkland":
        a, b, c, d = columns
        return (a / (g2 + b) + c * torch.exp(-d * g2)).sum(0)
    a, b = columns
    return (a * torch.exp(-0.25 * b * g2)).sum(0)


def displaced_solvent_factor(numbers: torch.Tensor, squared_frequency: torch.Tensor) -> torch.Tensor:
    """Fourier transform (element, ...) [Å^3] of the solvent volume each atom displaces, a Gaussian of that volume.

    v exp(-pi v^(2/3) g^2), Fraser, MacRae & Suzuki 1978, doi:10.1107/S0021889878014296.
    """
    volumes = [DISPLACED_VOLUMES.get(z, OTHER_DISPLACED_VOLUME) for z in numbers.tolist()]
    return _of_volumes(volumes, squared_frequency)


def solid_volume_factor(numbers: torch.Tensor, squared_frequency: torch.Tensor) -> torch.Tensor:
    """The same (element, ...) [Å^3] of atoms of a solid, which fill it.

    Raises
    ------
    ValueError
        For an element whose solid is not known here.
    """
    if not set(numbers.tolist()) <= SOLID_VOLUMES.keys():
        raise ValueError(f"solids: expected elements of {sorted(SOLID_VOLUMES)}, got {sorted(set(numbers.tolist()))}.")
    return _of_volumes([SOLID_VOLUMES[z] for z in numbers.tolist()], squared_frequency)


def _of_volumes(volumes: list[float], squared_frequency: torch.Tensor) -> torch.Tensor:
    v = torch.tensor(volumes).to(squared_frequency).reshape(-1, *[1] * squared_frequency.ndim)
    return v * torch.exp(-torch.pi * v ** (2 / 3) * squared_frequency)


def _coefficients(numbers: tuple[int, ...], parametrization: str) -> list[torch.Tensor]:
    if parametrization not in get_args(Parametrization):
        raise ValueError(
            f"parametrization: expected one of {', '.join(get_args(Parametrization))}, got {parametrization!r}."
        )
    table = _table(parametrization)
    missing = sorted(set(numbers) - table.keys())
    if missing:
        raise ValueError(
            f"numbers: the table of {parametrization!r} ends at element {max(table)} and has no element {missing}. "
            "Choose another parametrization or leave these atoms out."
        )
    groups = 4 if parametrization == "kirkland" else 2
    rows = torch.tensor([table[z] for z in numbers], dtype=torch.float64)
    return list(rows.reshape(len(numbers), groups, -1).permute(1, 2, 0))  # groups of (term, element)


@functools.cache
def _table(parametrization: str) -> dict[int, list[float]]:
    source = resources.files("cryosim.specimen").joinpath("tables", f"{parametrization}.csv")
    with source.open(encoding="utf-8") as file:
        rows = csv.reader(line for line in file if not line.startswith(("#", "number")))
        return {int(row[0]): [float(x) for x in row[1:]] for row in rows}
