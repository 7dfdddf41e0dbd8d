"""Copies of a molecule by one reference: its potential on a lattice, whose points are turned and placed like atoms.

At coarse pixels a molecule has far more atoms than its image has numbers. Let V^(k) be its transform and k_b the edge
of the band that slices keep. A window T takes away what lies beyond k_t = 2 k_b, without touching what lies below k_b,
and the potential T V^ is sampled on a cubic lattice of the spacing h = 1 / (k_b + k_t). The points carry

    V_ref(r) = h^3 sum_g V_T(g) delta(r - g),    V_ref^(k) = sum_G (T V^)(k - G),    |G| >= 1 / h,

so that inside the band V_ref^ = V^ to what T and the points left out make of it, in any direction: the sum of all
slices is right at every rotation. Along the beam a point has the height of its lattice plane, which moves matter
between neighbouring slices by less than h. Points are spread with the same bells as atoms, but one radial function is
enough for all of them, and there are fewer.

Of apoferritin (32,616 atoms) at simulated pixels of 7.5 and 4.7 Å there are 9,000 and 23,000 points; the image is
1.5e-3 and 8e-4 off (`tests/specimen/test_references.py`). Of 60 copies, the reference included, they take half and 1.2
times as long as the atoms (`python -m tests.bench copies`). Below that, atoms are the better points: at 4 Å resolution
an image of a protein has as many numbers as the protein has atoms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cryosim.core.fourier import BAND, fast_length, number
from cryosim.core.record import differentiated
from cryosim.specimen.atoms import Atoms, Poses, unmoved
from cryosim.specimen.grid import spectrum, squared_frequency, volume_of
from cryosim.specimen.potential import AtomSlices, Factors, Fading, Sites, SliceGrid, slices_of_sites

WINDOW = 2.0
"""k_t / k_b."""

LEAST = 3e-3
"""Points weaker than this, relative to the strongest, are left out."""

_FEWEST, _COARSE = 5000, 300.0  # atoms; B-factor [Å^2]
_MARGIN = 6.0  # [1 / k_b] / 2 pi, on either side of the atoms: how far the window spreads them


def spacing(pixel_size: float | torch.Tensor) -> float:
    """Of the lattice [Å], for slices of a pixel size [Å]."""
    return 1 / ((1 + WINDOW) * _edge(pixel_size))


def pays(atoms: Atoms, copies: int, pixel_size: float | torch.Tensor) -> bool:
    """Whether copies are placed in less time by a reference than atom by atom.

    A point takes a little longer than an atom, and to make a reference as long as to place 20 copies of it. There is no
    reference of atoms that derivatives are asked of, none of molecules so small that the window's ripples count
    (ubiquitin would be 5e-3 off), and none of coarse sites, which are few already.
    """
    coarse = len(atoms) > 0 and float(atoms.b_factors.detach().max()) > _COARSE
    if (
        copies == 0
        or len(atoms) < _FEWEST
        or coarse
        or any(differentiated(x) for x in (atoms.positions, atoms.b_factors, atoms.occupancies, pixel_size))
    ):
        return False
    size = number(pixel_size)
    points = 50.0 * len(atoms) / size**3 + 200.0 * len(atoms) ** (2 / 3) / size**2  # found with proteins
    return (1.2 + 20.0 / copies) * points < len(atoms)


def reference_slices(
    molecules: Sequence[Atoms],
    poses: Sequence[Poses],
    factors: Factors,
    grid: SliceGrid,
    *,
    fading: Fading | None = None,
) -> AtomSlices:
    """Slices of molecules by their references; arguments as in `placed_slices`."""
    sites = [reference(atoms, factors, grid.pixel_size, grid.width, grid.dtype) for atoms in molecules]
    return slices_of_sites(sites, poses, lambda k2: torch.ones_like(k2)[None], grid, fading)


def reference(
    atoms: Atoms, factors: Factors, pixel_size: float | torch.Tensor, width: int, dtype: torch.dtype
) -> Sites:
    """Points of a molecule about its origin, with one strength each [V Å^3, or what the factors are].

    Parameters
    ----------
    atoms : Atoms
    factors : callable
        As in `placed_slices`.
    pixel_size : float or tensor ()
        Of the slices [Å].
    width : int
        Samples of a bell.
    dtype : torch.dtype
        Of the strengths.
    """
    edge, h = _edge(pixel_size), spacing(pixel_size)
    centre = (atoms.positions.amax(0) + atoms.positions.amin(0)) / 2
    spread = 5 * float(atoms.b_factors.max().clamp_min(0).sqrt()) / (8**0.5 * math.pi)  # of the widest site
    span = atoms.positions.amax(0) - atoms.positions.amin(0) + 2 * (_MARGIN / (2 * math.pi * edge) + spread) + 2 * h
    n_x, n_y, n_z = (2 * fast_length(math.ceil(float(x) / h)) for x in span)
    shape = (n_z, n_y, n_x)  # twice as fine as the lattice, so that it holds all that the window lets pass
    band = spectrum([atoms.moved(shift=-centre)], [unmoved()], factors, shape, h / 2, max(width, 6), torch.float32)
    values = volume_of(band * _window(squared_frequency(shape, h / 2).sqrt() / edge).to(band.dtype), shape)
    lattice = values[::2, ::2, ::2] * h**3
    kept = (lattice.abs() >= LEAST * lattice.abs().max()).nonzero()
    middle = torch.tensor([n // 2 for n in shape], dtype=torch.float64) / 2  # the origin, in points
    positions = (kept - middle).flip(1) * h + centre
    strengths = lattice[tuple(kept.T)][:, None]
    return Sites(positions, strengths.to(dtype), float(positions.norm(dim=1).max()))


def _edge(pixel_size: float | torch.Tensor) -> float:
    """k_b [1/Å]."""
    return BAND / (2 * number(pixel_size))


def _window(k: torch.Tensor) -> torch.Tensor:
    """T at k [k_b]: 1 up to a little beyond the band, 0 from k_t on, smooth between."""
    x = ((k - 1.05) / (WINDOW - 1.05)).clamp(0, 1)
    return 0.5 * torch.erfc(3.2 * (2 * x - 1)) * (x < 1)
