"""Lipid bilayers: how many atoms of each element stand at which height across the membrane.

A lipid is parsed into groups, as in the scattering density profile of Kučerka et al. 2008
(doi:10.1529/biophysj.108.132662). Groups of the head (choline methyls; phosphate with CH2CH2N; carbonyls with glycerol)
are Gaussians at +-height. The core, -D_C < z < D_C with edges blurred by a Gaussian, is filled by CH2, CH and CH3: CH
and CH3 are Gaussians, and CH2 takes the volume that they leave.

Every site that stands for a part of a lipid is a Gaussian of standard deviation `Lipid.blur`; `centres` says where the
middles of the sites stand, `bilayer_density` where the atoms then are, `bilayer_potential` what electrons see. One
leaflet holds exactly one lipid per `Lipid.area`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR
from cryosim.specimen.scattering_factors import Parametrization, displaced_solvent_factor, scattering_factor

ELEMENTS = (1, 6, 7, 8, 15)
"""Atomic numbers in phospholipids, in the order of every profile here."""

_METHYLENE = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


class Group(NamedTuple):
    """Part of a lipid at Gaussian heights above the middle of the bilayer.

    Attributes
    ----------
    counts : tuple of int (element,)
        Atoms of each of `ELEMENTS`.
    height : float
        Mean [Å].
    width : float
        Standard deviation [Å].
    """

    counts: tuple[int, int, int, int, int]
    height: float
    width: float


class Lipid(NamedTuple):
    """One kind of lipid in a fluid bilayer.

    Attributes
    ----------
    name : str
    area : float
        Of a lipid, in the middle of the bilayer [Å^2].
    core : float
        Half thickness D_C of the hydrocarbon core [Å].
    blur : float
        Standard deviation of every site, and so of the edges of the core [Å].
    heads : tuple of Group
    methylenes : int
        CH2 of the chains.
    double_bonds : Group
        All CH of the chains.
    methyls : Group
        The ends of the chains.
    volume_ratios : (float, float)
        Volume of a CH and of a CH3 over that of a CH2 [1].
    """

    name: str
    area: float
    core: float
    blur: float
    heads: tuple[Group, ...]
    methylenes: int
    double_bonds: Group
    methyls: Group
    volume_ratios: tuple[float, float] = (0.91, 1.93)


def _phosphatidylcholine(name: str, area: float, core: float, head: float, methylenes: int, bonds: int) -> Lipid:
    """A phosphatidylcholine with its phosphate at the height `head` [Å] and `bonds` CH in its two chains."""
    heads = (
        Group((9, 3, 0, 0, 0), head + 1.9, 3.0),  # three methyls of the choline
        Group((4, 2, 1, 4, 1), head, 2.6),  # PO4, CH2CH2N
        Group((5, 5, 0, 4, 0), head - 3.5, 2.5),  # two carboxyls, glycerol
    )
    ends = Group((bonds, bonds, 0, 0, 0), 9.6, 3.0), Group((6, 2, 0, 0, 0), 0.0, 2.9)
    return Lipid(name, area, core, 2.4, heads, methylenes, *ends)


POPC = _phosphatidylcholine("POPC", 64.3, 14.4, 19.18, 28, 2)
"""1-palmitoyl-2-oleoyl-phosphatidylcholine, C42H82NO8P, at 30 °C: area 64.3 Å^2, D_C 14.4 Å, distance of the peaks of
electron density 36.5 Å (Kučerka, Nieh & Katsaras 2011, doi:10.1016/j.bbamem.2011.07.022). Two conditions set the
heights of the groups here: that distance, and that core, heads and water fill space without overlap. Widths are round
numbers like those of such fits to fluid phosphatidylcholines (Kučerka et al. 2008), not taken from one table."""

DOPC = _phosphatidylcholine("DOPC", 67.4, 14.4, 19.28, 28, 4)
"""1,2-dioleoyl-phosphatidylcholine, C44H84NO8P, at 30 °C: area 67.4 Å^2, D_C 14.4 Å, distance of the peaks of electron
density 36.7 Å (Kučerka et al. 2008, doi:10.1529/biophysj.108.132662); groups as in `POPC`."""


def composition(lipid: Lipid) -> torch.Tensor:
    """Atoms (element,) of each of `ELEMENTS` in one lipid."""
    parts = [*(g.counts for g in lipid.heads), lipid.double_bonds.counts, lipid.methyls.counts]
    return torch.tensor(parts, dtype=torch.float64).sum(0) + lipid.methylenes * _METHYLENE


def half_thickness(lipid: Lipid) -> float:
    """Distance [Å] from the middle of the bilayer to where its matter has faded: 2.5 widths beyond the last group."""
    return max(g.height + 2.5 * g.width for g in lipid.heads)


def centres(lipid: Lipid, heights: torch.Tensor) -> torch.Tensor:
    """Atoms per volume whose sites stand at a height in the core.

    Parameters
    ----------
    lipid : Lipid
    heights : tensor (...)
        Above the middle of the bilayer [Å].

    Returns
    -------
    tensor (element, ...)
        [1/Å^3]; zero beyond the core. To be blurred by a Gaussian of `lipid.blur`.
    """
    inside = (heights.abs() <= lipid.core).to(heights)
    plain, bonds, ends = _core(lipid)
    density = plain.reshape(-1, *[1] * heights.ndim) * inside
    for group, amounts in ((lipid.double_bonds, bonds), (lipid.methyls, ends)):
        spread = math.sqrt(group.width**2 - lipid.blur**2)
        both = _normal(heights - group.height, spread) + _normal(heights + group.height, spread)
        density = density + amounts.reshape(-1, *[1] * heights.ndim) * both * inside / _kept(lipid, group)
    return density


def bilayer_density(lipid: Lipid, heights: torch.Tensor) -> torch.Tensor:
    """Number of atoms per volume across a flat bilayer.

    Parameters
    ----------
    lipid : Lipid
    heights : tensor (...)
        Above its middle [Å].

    Returns
    -------
    tensor (element, ...)
        Of each of `ELEMENTS` [1/Å^3]. Its integral is 2 `composition` / `area`.
    """
    blur, core = lipid.blur, lipid.core
    tail = [1] * heights.ndim
    edges = _below((heights + core) / blur) - _below((heights - core) / blur)
    plain, bonds, ends = _core(lipid)
    density = plain.reshape(-1, *tail) * edges
    for group, amounts in ((lipid.double_bonds, bonds), (lipid.methyls, ends)):
        both = _cut(lipid, group, heights) + _cut(lipid, group, -heights)
        density = density + amounts.reshape(-1, *tail) * both / _kept(lipid, group)
    for group in lipid.heads:
        amounts = torch.tensor(group.counts, dtype=torch.float64) / lipid.area
        both = _normal(heights - group.height, group.width) + _normal(heights + group.height, group.width)
        density = density + amounts.reshape(-1, *tail) * both
    return density


def bilayer_potential(
    lipid: Lipid,
    heights: torch.Tensor,
    *,
    solvent: float = 0.0,
    parametrization: Parametrization = "lobato",
) -> torch.Tensor:
    """Mean potential across a flat bilayer of independent atoms.

    Parameters
    ----------
    lipid : Lipid
    heights : tensor (z,)
        Above its middle, within 100 Å [Å].
    solvent : float
        Potential of the medium that the atoms displace by their volumes [V]; then the result is the difference from it.
    parametrization : {"lobato", "kirkland", "peng"}

    Returns
    -------
    tensor (z,)
        [V].

    Raises
    ------
    ValueError
        When a height is beyond 100 Å.
    """
    if len(heights) and float(heights.abs().max()) > 100:
        raise ValueError(f"bilayer_potential: expected heights within 100 Å, got {float(heights.abs().max()):g}.")
    n, spacing = 2048, 0.125
    z = (torch.arange(n, dtype=torch.float64) - n // 2) * spacing
    k = torch.fft.rfftfreq(n, spacing, dtype=torch.float64)
    numbers = torch.tensor(ELEMENTS)
    seen = POTENTIAL_PER_FORM_FACTOR * scattering_factor(numbers, k**2, parametrization)
    seen = seen - solvent * displaced_solvent_factor(numbers, k**2)
    profile = torch.fft.irfft((torch.fft.rfft(bilayer_density(lipid, z)) * seen).sum(0), n=n)  # (z,) [V]
    place = heights.double() / spacing + n // 2
    low = place.floor().long()
    return torch.lerp(profile[low], profile[low + 1], place - low)


def _core(lipid: Lipid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the core, as in `centres`: density of atoms [1/Å^3] of CH2 alone, and per area [1/Å^2] what CH and CH3 add."""
    ch, ch3 = (torch.tensor(g.counts, dtype=torch.float64) for g in (lipid.double_bonds, lipid.methyls))
    of_ch, of_ch3 = lipid.volume_ratios
    volumes = float(ch[1]) * of_ch, float(ch3[1]) * of_ch3  # in units of a CH2
    plain = _METHYLENE * (lipid.methylenes + sum(volumes)) / (lipid.area * lipid.core)
    return (
        plain,
        (ch - volumes[0] * _METHYLENE) / lipid.area,
        (ch3 - volumes[1] * _METHYLENE) / lipid.area,
    )


def _kept(lipid: Lipid, group: Group) -> float:
    """Share of a Gaussian of centres that lies inside the core."""
    spread = math.sqrt(2 * (group.width**2 - lipid.blur**2))
    ends = (lipid.core - group.height) / spread, (-lipid.core - group.height) / spread
    return 0.5 * (math.erf(ends[0]) - math.erf(ends[1]))


def _cut(lipid: Lipid, group: Group, z: torch.Tensor) -> torch.Tensor:
    """A Gaussian of centres, cut at the edges of the core and then blurred."""
    spread2, blur2 = group.width**2 - lipid.blur**2, lipid.blur**2
    middle = (group.height * blur2 + z * spread2) / group.width**2
    width = math.sqrt(spread2 * blur2) / group.width
    share = _below((lipid.core - middle) / width) - _below((-lipid.core - middle) / width)
    return _normal(z - group.height, group.width) * share


def _normal(x: torch.Tensor, width: float) -> torch.Tensor:
    return torch.exp(-0.5 * (x / width) ** 2) / (width * math.sqrt(2 * math.pi))


def _below(x: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(x)
