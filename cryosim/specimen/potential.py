"""Slices of projected potential: the only thing that passes from specimen to microscope.

The potential of atoms, sampled without aliasing. With K = h^2 / (2 pi m e), the two-dimensional transform of one
slice is the structure factor

    V^(k) = K sum_a w_a f_{Z_a}(k) exp(-B_a k^2 / 4) exp(-2 pi i k.r_a)        [V Å · Å^2]

evaluated here for |k| below two thirds of the Nyquist frequency, which is all that multislice may keep, in three steps.

1. *Few radial functions.* The factors g_a(k) = f_Z(k) exp(-B k^2 / 4) of all atoms together span, to 1e-7, a space of
   only 4 to 15 functions phi_j(k): g_a = sum_j c_aj phi_j (a singular value decomposition of the family sampled at
   Chebyshev nodes in k^2). So every atom may have its own B-factor at no cost in transforms.
2. *Spread.* Each atom adds c_aj times a narrow bell, w samples wide, to grid j (`bells`). Inside two thirds of Nyquist
   the grid itself is a 1.5-fold oversampled one, hence beta = 2.05 w and no larger grid.
3. *Transform.* V^ = sum_j phi_j(k) FFT[grid_j] / (transform of the bell).

Along z an atom between two slice centres is shared between them linearly, so that its height, and with it its defocus,
enters exactly to first order, and smoothly. Beyond the outermost centres the line is continued (shares below 0 and
above 1), which keeps the total and the height right there too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR
from cryosim.core.fourier import BAND, SamplingWarning, band_limit, number, squared_frequencies
from cryosim.core.record import Record, differentiated, hidden, item, static
from cryosim.specimen.atoms import Atoms, Poses, concatenate, unmoved
from cryosim.specimen.bells import bell_tolerance, bell_transform, spread
from cryosim.specimen.scattering_factors import Parametrization, displaced_solvent_factor, scattering_factor


class Slices(Record):
    """Slices of projected potential held in memory, the first one hit by the electrons at index 0.

    Slice n // 2 is centred on the box centre. Anything with the same `pixel_size`, `thickness`, `__len__` and
    `__getitem__(i) -> (..., y, x)` is a source of slices too and may build slice i only when it is asked for.

    Attributes
    ----------
    values : tensor (..., slice, y, x)
        [V·Å]; complex where the imaginary part is absorption.
    pixel_size : float or tensor ()
        [Å].
    thickness : float or tensor ()
        Of one slice [Å].
    """

    values: torch.Tensor = item(3)
    pixel_size: float | torch.Tensor = item(0)
    thickness: float | torch.Tensor = item(0)

    def __post_init__(self) -> None:
        if not isinstance(self.values, torch.Tensor) or self.values.ndim < 3:
            got = tuple(self.values.shape) if hasattr(self.values, "shape") else type(self.values).__name__
            raise ValueError(f"Slices.values: expected a tensor (..., slice, y, x) [V·Å], got {got}.")

    def __len__(self) -> int:
        return self.values.shape[-3]

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.values[..., i, :, :]


class Sites(Record):
    """The atoms of one molecule, about its own origin, as points that carry radial functions.

    Attributes
    ----------
    positions : tensor (site, 3)
        [Å].
    strengths : tensor (site, j)
        Coefficients of each in the radial functions [1].
    radius : float
        Of the sphere about the origin that holds them [Å].
    """

    positions: torch.Tensor = item(1)
    strengths: torch.Tensor = item(1)
    radius: float = static()


class AtomSlices(Record):
    """Source of the slices of atoms; slice i is computed when asked for. Made by `potential_slices`.

    Copies of one molecule share its sites and are turned and placed one by one, so that all atoms are never in memory
    together. A copy is small beside the field, hence what it touches of the grid stays in the processor's cache.

    Attributes
    ----------
    sites : tuple of Sites
        One a molecule.
    poses : tuple of Poses
        Where its copies stand, in the frame of the slices.
    transfer : tensor (..., j, y, x)
        Each radial function over the transform of the bell, on the half plane inside the band [V Å^2]; where atoms
        fade, one for each state they are seen in.
    pixel_size, thickness : float or tensor ()
        [Å].
    shape : (int, int)
        (y, x) [px]; atoms beyond it are left out.
    n_slices, width : int
        As in `potential_slices`.
    dtype : torch.dtype
    """

    sites: tuple[Sites, ...]
    poses: tuple[Poses, ...]
    transfer: torch.Tensor = item(3)
    pixel_size: float | torch.Tensor = item(0)
    thickness: float | torch.Tensor = item(0)
    shape: tuple[int, int] = static()
    n_slices: int = static()
    width: int = static()
    dtype: torch.dtype = static()

    def __len__(self) -> int:
        return self.n_slices

    def __getitem__(self, i: int) -> torch.Tensor:
        """Projected potential (y, x) [V·Å] of slice i."""
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"slice {i} of {n}")
        i %= n
        grid = self._empty()
        found = [self._spread({True: grid}, self._between(i - 1)), self._spread({False: grid}, self._between(i))]
        return self._slice(grid, any(found))

    def in_order(self) -> Iterator[torch.Tensor]:
        """All slices, first to last; each atom is spread once, for both slices that share it."""
        grid, above, carried = self._empty(), self._empty(), False
        for i in range(len(self)):
            found = self._spread({False: grid, True: above}, self._between(i))
            yield self._slice(grid, found or carried)
            blank = self._empty() if torch.is_grad_enabled() or hidden() else grid.zero_()
            grid, above, carried = above, blank, found

    def total(self) -> torch.Tensor:
        """Projected potential (y, x) [V·Å] of all slices together, at the cost of one."""
        grid = self._empty()
        return self._slice(grid, self._spread({None: grid}, (0, -math.inf, math.inf)))

    def _empty(self) -> torch.Tensor:
        """Blank grid (j, pixel) for every radial function."""
        ny, nx = self.shape
        return torch.zeros(self.transfer.shape[-3], ny * nx, dtype=self.dtype, device=self.transfer.device)

    def _between(self, i: int) -> _Between | None:
        """Slice centre i and the heights of the atoms between it and the next; None where there are none.

        Those beyond the outermost centres belong to the outermost pairs.
        """
        last = max(len(self) - 2, 0)
        if not 0 <= i <= last:
            return None
        return i, -math.inf if i == 0 else i, math.inf if i == last else i + 1

    def _spread(self, grids: _Grids, between: _Between | None) -> bool:
        """Add the atoms between two slice centres to the grids; whether there were any."""
        found = False
        if between is not None:
            for sites, poses in zip(self.sites, self.poses, strict=True):
                for copies in self._in_reach(sites, poses, between):
                    found |= self._spread_copies(
                        grids, sites, poses.rotations[copies], poses.positions[copies], between
                    )
        return found

    def _in_reach(self, sites: Sites, poses: Poses, between: _Between) -> Sequence[torch.Tensor]:
        """Numbers (copy,) of the copies that may have atoms there, some at a time."""
        centres = poses.positions.detach()
        reach = sites.radius + number(self.pixel_size)
        half = 0.5 * number(self.pixel_size) * centres.new_tensor([self.shape[1], self.shape[0]])
        heights, far = centres[:, 2] / number(self.thickness) + len(self) // 2, reach / number(self.thickness)
        near = (centres[:, :2].abs() <= half + reach).all(1)
        near &= (heights + far >= between[1]) & (heights - far <= between[2])
        return near.nonzero()[:, 0].split(max(1, _SITES_AT_ONCE // max(1, len(sites.positions))))

    def _spread_copies(
        self, grids: _Grids, sites: Sites, rotations: torch.Tensor, origins: torch.Tensor, between: _Between
    ) -> bool:
        """The same for some copies of one molecule: rotations (copy, 3, 3) and origins (copy, 3) [Å]."""
        x, y, z = (rotations @ sites.positions.T + origins[:, :, None]).unbind(1)  # (copy, site) [Å]
        height = z / self.thickness + len(self) // 2  # [slices]
        ny, nx = (0.5 * number(self.pixel_size) * n for n in self.shape)
        here = (height.detach() >= between[1]) & (height.detach() < between[2])
        here &= (x.detach().abs() <= nx) & (y.detach().abs() <= ny)
        here = here.flatten().nonzero()[:, 0]
        centres = torch.stack([y.flatten()[here], x.flatten()[here]], 1) / self.pixel_size
        strengths = sites.strengths.index_select(0, here % len(sites.positions))  # (atom, j)
        upper = (height.flatten()[here] - between[0]).to(strengths)[:, None] if len(self) > 1 else 0.0
        shares = {None: 1.0, False: 1 - upper, True: upper}  # of the centre below, and of that above
        strengths = torch.cat([strengths * shares[which] for which in grids], 1)
        spread(list(grids.values()), centres, strengths, self.shape, self.width)
        return len(here) > 0

    def _slice(self, grid: torch.Tensor, filled: bool) -> torch.Tensor:
        """Slice (..., y, x) [V·Å] of the grids (j, pixel)."""
        ny, nx = self.shape
        if not filled:
            return torch.zeros(*self.transfer.shape[:-3], ny, nx, dtype=self.dtype, device=grid.device)
        total = torch.zeros(())
        for values, transfer in zip(grid.view(-1, ny, nx), self.transfer.unbind(-3), strict=True):
            spectrum = torch.view_as_real(torch.fft.rfft2(values)[:, : transfer.shape[-1]])
            term = transfer[..., None]
            total = torch.addcmul(total, spectrum, term) if total.ndim else spectrum * term
        return torch.fft.irfft(torch.fft.ifft(torch.view_as_complex(total), dim=-2), n=nx)


_Between = tuple[int, float, float]
"""A slice centre, and the least and largest height [slices] of the atoms shared by it and the next."""

_Grids = dict[bool | None, torch.Tensor]
"""Grids (j, pixel) for what of each atom belongs to the slice centre below (False), above (True), or is all of it."""

_SITES_AT_ONCE = 2**15
"""Copies of small molecules are placed together; [sites]."""

_NUMBERS_AT_ONCE = 2**13
"""Frequencies at which radial functions are summed together."""


class SummedSlices(Record):
    """Source of slices that are the sums of those of several sources on one grid.

    Attributes
    ----------
    parts : tuple of AtomSlices or SummedSlices
    """

    parts: tuple[AtomSlices | SummedSlices, ...]

    @property
    def pixel_size(self) -> float | torch.Tensor:
        """[Å]."""
        return self.parts[0].pixel_size

    @property
    def thickness(self) -> float | torch.Tensor:
        """Of a slice [Å]."""
        return self.parts[0].thickness

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, i: int) -> torch.Tensor:
        """Projected potential (y, x) [V·Å] of slice i."""
        return sum((part[i] for part in self.parts[1:]), start=self.parts[0][i])

    def in_order(self) -> Iterator[torch.Tensor]:
        """All slices, first to last."""
        for first, *rest in zip(*(part.in_order() for part in self.parts), strict=True):
            yield torch.stack([first, *rest]).sum(0) if rest else first

    def total(self) -> torch.Tensor:
        """Projected potential (y, x) [V·Å] of all slices together."""
        return sum((part.total() for part in self.parts[1:]), start=self.parts[0].total())


class RadialBasis(Record):
    """A few functions phi_j(k) that span the scattering factors of all atoms, and every atom's coefficients in them.

    Made by `radial_basis`.

    Attributes
    ----------
    element_of : tensor (number,)
        Row of each atomic number in `node_factors`.
    nodes : tensor (node,)
        Chebyshev nodes in k^2 [1/Å^2].
    node_factors : tensor (element, node)
        The elements' factors there.
    vectors : tensor (j, node)
        phi_j there, orthonormal.
    series : tensor (j, degree)
        Their Chebyshev series.
    limit : float
        Largest k^2 [1/Å^2].
    """

    element_of: torch.Tensor = item(1)
    nodes: torch.Tensor = item(1)
    node_factors: torch.Tensor = item(2)
    vectors: torch.Tensor = item(2)
    series: torch.Tensor = item(2)
    limit: float = static()

    @property
    def rank(self) -> int:
        """How many functions there are."""
        return self.vectors.shape[0]

    def coefficients(self, atoms: Atoms) -> torch.Tensor:
        """c (atom, j), differentiable in the B-factors; in float64."""
        damping = torch.exp(-0.25 * atoms.b_factors.double()[:, None] * self.nodes)
        return (self.node_factors[self.element_of[atoms.numbers]] * damping) @ self.vectors.T

    def __call__(self, squared_frequency: torch.Tensor) -> torch.Tensor:
        """phi (j, ...) [V Å^2 (the factor K included)] at k^2 (...) up to the limit, by Clenshaw's recurrence."""
        return self._series(self.series, squared_frequency)

    def function(self, j: int, squared_frequency: torch.Tensor) -> torch.Tensor:
        """phi_j (...) alone."""
        return self._series(self.series[j : j + 1], squared_frequency)[0]

    def _series(self, series: torch.Tensor, squared_frequency: torch.Tensor) -> torch.Tensor:
        parts = [self._clenshaw(series, x) for x in squared_frequency.flatten().split(_NUMBERS_AT_ONCE)]
        return torch.cat(parts, 1).unflatten(1, squared_frequency.shape)

    def _clenshaw(self, series: torch.Tensor, squared_frequency: torch.Tensor) -> torch.Tensor:
        """Sum (j, k) of the series (j, degree) at k^2 (k,), few enough to stay in the processor's cache."""
        x = 2 * squared_frequency / self.limit - 1
        b1 = b2 = torch.zeros_like(x)
        for degree in range(series.shape[1] - 1, 0, -1):
            b1, b2 = 2 * x * b1 - b2 + series[:, degree, None], b1
        return x * b1 - b2 + series[:, 0, None]


Factors = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(elements (element,), k^2 (...)) -> factor (element, ...) of each element's radial function."""

Fading = Callable[[torch.Tensor], torch.Tensor]
"""k^2 (k,) [1/Å^2] -> amplitude (..., k) that is left there, in one state or in several."""


def radial_basis(atoms: Atoms, factors: Factors, limit: float, tolerance: float, slopes: Factors | None) -> RadialBasis:
    """Few functions that span `factors` times exp(-B k^2 / 4) for the elements and B-factors of `atoms`.

    Parameters
    ----------
    atoms : Atoms
    factors : callable
    limit : float
        Largest k^2 [1/Å^2].
    tolerance : float
        What the span may leave out of any factor, relative to it.
    slopes : callable, optional
        Further functions to span: what `factors` would change by, where it depends on a parameter with a gradient.
    """
    elements = torch.unique(atoms.numbers)
    element_of = torch.full((int(elements.max()) + 1,), -1, device=atoms.numbers.device)
    element_of[elements] = torch.arange(len(elements), device=atoms.numbers.device)
    n = 32  # nodes in k^2, doubled until the family's Chebyshev series end
    nodes, family = _family(n, atoms, elements, factors, slopes, limit)
    while not _ends(family, n) and n < 512:
        n *= 2
        nodes, family = _family(n, atoms, elements, factors, slopes, limit)
    _, sizes, vectors = torch.linalg.svd(family, full_matrices=False)
    rank = 1
    while rank < len(sizes):
        rest = family - (family @ vectors[:rank].T) @ vectors[:rank]
        if rest.norm(dim=1).max() < tolerance:
            break
        rank += 1
    series = vectors[:rank] @ _chebyshev_transform(n).to(nodes.device).T
    return RadialBasis(element_of, nodes, factors(elements, nodes), vectors[:rank], series, limit)


def _family(
    n: int, atoms: Atoms, elements: torch.Tensor, factors: Factors, slopes: Factors | None, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """n nodes in k^2, and there every element's factor at a range of B-factors (sample, node), of norm one."""
    b = atoms.b_factors.detach().double()
    nodes = 0.5 * limit * (1 + chebyshev_nodes(n).to(b.device))
    samples = factors(elements, nodes).detach()
    if slopes is not None:
        samples = torch.cat([samples, slopes(elements, nodes)])
    span, scale = b.max() - b.min(), 0.25 * limit
    steps = 0.5 * (1 + chebyshev_nodes(1 if span == 0 else 64).to(b.device))
    b_nodes = b.min() + torch.expm1(steps * torch.log1p(span * scale)) / scale  # as close as exp(-B k^2 / 4) changes
    family = (samples[:, None] * torch.exp(-0.25 * b_nodes[:, None] * nodes)).flatten(0, 1)
    if differentiated(atoms.b_factors):  # and the slopes in B, d g / d B = -k^2 g / 4, and theirs
        family = torch.cat([family, family * nodes, family * nodes**2])
    return nodes, family / family.norm(dim=1, keepdim=True).clamp_min(1e-30)


def potential_factors(
    parametrization: Parametrization, solvent: float | torch.Tensor, volume: Factors = displaced_solvent_factor
) -> Factors:
    """Potential [V Å^3] of an atom less that of the medium whose `volume` it displaces, by element and k^2."""

    def factors(elements: torch.Tensor, squared_frequency: torch.Tensor) -> torch.Tensor:
        potential = POTENTIAL_PER_FORM_FACTOR * scattering_factor(elements, squared_frequency, parametrization)
        return potential - solvent * volume(elements, squared_frequency)

    return factors


def _ends(family: torch.Tensor, n: int) -> bool:
    """Whether the Chebyshev series of all functions (sample, node) at n nodes have ended."""
    return bool(((family @ _chebyshev_transform(n).to(family.device).T)[:, -3:].abs() < 1e-11).all())


def potential_slices(
    atoms: Atoms,
    shape: tuple[int, int],
    pixel_size: float | torch.Tensor,
    thickness: float | torch.Tensor,
    n_slices: int,
    parametrization: Parametrization = "lobato",
    *,
    solvent: float | torch.Tensor = 0.0,
    fading: Fading | None = None,
    width: int = 8,
    dtype: torch.dtype | None = None,
) -> AtomSlices:
    """Projected potential of independent atoms, slice by slice, exact below two thirds of the Nyquist frequency.

    Parameters
    ----------
    atoms : Atoms
        Inside the box; differentiable in positions, B-factors and occupancies.
    shape : (int, int)
        (y, x) [px].
    pixel_size, thickness : float or tensor ()
        Of the grid and of one slice [Å].
    n_slices : int
        Slice n_slices // 2 is centred on z = 0.
    parametrization : {"lobato", "kirkland", "peng"}
        Of the scattering factors.
    solvent : float or tensor ()
        Inner potential of the medium that the atoms displace [V]; 0 in vacuum. With it the slices hold the difference
        from the undisturbed medium.
    fading : callable, optional
        k^2 (k,) [1/Å^2] -> amplitude (..., k) that is left of all atoms there, by damage: in several states at once the
        slices are (..., y, x), for little more work than in one.
    width : int
        Samples a bell covers; relative error 5e-5 for 6, 8e-6 for 7, 1.3e-6 for 8.
    dtype : torch.dtype, optional
        Of the slices; that of the positions when left out. Give positions in float64 in any case: float32 rounds
        1000 Å to 6e-5 Å.

    Returns
    -------
    AtomSlices
        A source of slices (y, x) [V·Å].

    Raises
    ------
    ValueError
        When atoms lie outside the box or are not finite, an element is not in the table, or a size is not positive.
    """
    pixel, thin = number(pixel_size), number(thickness)
    for name, value in (("pixel_size", pixel), ("thickness", thin)):
        if not value > 0:
            raise ValueError(f"potential_slices: expected a positive {name} [Å], got {value}.")
    if n_slices < 1 or min(shape) < width:
        raise ValueError(
            f"potential_slices: expected n_slices >= 1 and a shape of at least {width} x {width} px (the width of a "
            f"bell), got {n_slices} and {tuple(shape)}."
        )
    _check_inside(atoms, shape, pixel, thin, n_slices)
    depth = float(atoms.positions.detach()[:, 2].max() - atoms.positions.detach()[:, 2].min())
    if n_slices > 1 and 0 < depth < thin:
        warnings.warn(
            f"potential_slices: slices of {thin:g} Å are thicker than the {depth:.3g} Å that the atoms reach along z: "
            "they do not resolve it. 2 to 10 Å are usual.",
            SamplingWarning,
            stacklevel=3,
        )
    factors = potential_factors(parametrization, solvent)
    slopes = displaced_solvent_factor if differentiated(solvent) else None
    grid = SliceGrid(shape, pixel_size, thickness, n_slices, width, dtype or atoms.positions.dtype)
    return placed_slices([atoms], [unmoved(atoms.positions.device)], factors, grid, slopes=slopes, fading=fading)


class SliceGrid(NamedTuple):
    """Where slices are sampled, and how; fields as in `potential_slices`."""

    shape: tuple[int, int]
    pixel_size: float | torch.Tensor
    thickness: float | torch.Tensor
    n_slices: int
    width: int
    dtype: torch.dtype


def placed_slices(
    molecules: Sequence[Atoms],
    poses: Sequence[Poses],
    factors: Factors,
    grid: SliceGrid,
    *,
    slopes: Factors | None = None,
    fading: Fading | None = None,
) -> AtomSlices:
    """Slices of any radial functions of the elements, of molecules at their poses.

    Parameters
    ----------
    molecules : sequence of Atoms
    poses : sequence of Poses
        In the frame of the slices; atoms beyond the field are left out.
    factors : callable
        Of each element.
    grid : SliceGrid
    slopes : callable, optional
        As in `radial_basis`.
    fading : callable, optional
        As in `potential_slices`.
    """
    everything = concatenate(molecules)
    limit = (BAND / (2 * number(grid.pixel_size))) ** 2
    radial = radial_basis(everything, factors, limit, bell_tolerance(grid.width), slopes)
    return slices_of_sites([_sites(radial, atoms, grid.dtype) for atoms in molecules], poses, radial, grid, fading)


def slices_of_sites(
    sites: Sequence[Sites],
    poses: Sequence[Poses],
    radial: Callable[[torch.Tensor], torch.Tensor],
    grid: SliceGrid,
    fading: Fading | None,
) -> AtomSlices:
    """Slices of points that carry the radial functions k^2 (k,) -> (j, k)."""
    transfer = _bell_quotient(radial, grid, fading, sites[0].positions.device)
    return AtomSlices(
        tuple(sites),
        tuple(poses),
        transfer.to(grid.dtype).contiguous(),
        grid.pixel_size,
        grid.thickness,
        (grid.shape[0], grid.shape[1]),
        grid.n_slices,
        grid.width,
        grid.dtype,
    )


def _bell_quotient(
    radial: Callable[[torch.Tensor], torch.Tensor], grid: SliceGrid, fading: Fading | None, device: torch.device
) -> torch.Tensor:
    """`AtomSlices.transfer` (..., j, y, x) of radial functions."""
    shape, pixel_size, width = grid.shape, grid.pixel_size, grid.width
    k2 = squared_frequencies(shape, pixel_size, half=True, dtype=torch.float64, device=device)
    inside = band_limit(shape, BAND, half=True, dtype=torch.float64, device=device) > 0
    bell_y, bell_x = (bell_transform(n, width).to(device) for n in shape)
    bell = bell_y[:, None] * bell_x[None, : shape[1] // 2 + 1]
    columns = int(inside.any(0).sum())
    inside, k2, bell = (values[:, :columns] for values in (inside, k2, bell))
    factor = 1 / bell[inside] if fading is None else fading(k2[inside]) / bell[inside]  # (..., k)
    values = radial(k2[inside]) * factor[..., None, :]  # (..., j, k) [V Å^2]
    transfer = torch.zeros(*values.shape[:-1], k2.numel(), dtype=torch.float64, device=device)
    transfer = transfer.index_copy(-1, inside.flatten().nonzero()[:, 0], values).unflatten(-1, k2.shape)
    return transfer / pixel_size**2  # a delta on the grid has weight 1 / pixel area


def _sites(radial: RadialBasis, atoms: Atoms, dtype: torch.dtype) -> Sites:
    strengths = radial.coefficients(atoms) * atoms.occupancies.double()[:, None]
    return Sites(atoms.positions.double(), strengths.to(dtype), float(atoms.positions.detach().norm(dim=1).max()))


def chebyshev_nodes(n: int) -> torch.Tensor:
    """Zeros (n,) of the Chebyshev polynomial of degree n; for n = 1 the left end -1 instead of the middle."""
    if n == 1:
        return torch.tensor([-1.0], dtype=torch.float64)
    return torch.cos((torch.arange(n, dtype=torch.float64) + 0.5) * torch.pi / n)


def _chebyshev_transform(n: int) -> torch.Tensor:
    """Matrix (degree, node) from values at the n nodes to coefficients of the Chebyshev series."""
    theta = (torch.arange(n, dtype=torch.float64) + 0.5) * torch.pi / n
    matrix = torch.cos(torch.arange(n, dtype=torch.float64)[:, None] * theta) * 2 / n
    matrix[0] /= 2
    return matrix


def _check_inside(atoms: Atoms, shape: tuple[int, int], pixel_size: float, thickness: float, n_slices: int) -> None:
    positions = atoms.positions.detach()
    if len(atoms) == 0:
        raise ValueError("potential_slices: there are no atoms.")
    if not torch.isfinite(positions).all():
        raise ValueError("potential_slices: Atoms.positions holds values that are not finite.")
    # half a sample of slack: n samples reach from -n/2 to n/2, whichever sample is called the centre
    half = [0.5 * (n + 1) * d for n, d in ((shape[1], pixel_size), (shape[0], pixel_size), (n_slices, thickness))]
    outside = (positions.abs() > torch.tensor(half, dtype=positions.dtype, device=positions.device)).any(1)
    if outside.any():
        reach = positions.abs().amax(0).tolist()
        raise ValueError(
            f"potential_slices: {int(outside.sum())} of {len(atoms)} atoms lie outside the box of "
            f"+-({half[0]:.1f}, {half[1]:.1f}, {half[2]:.1f}) Å in (x, y, z); the farthest reach "
            f"({reach[0]:.1f}, {reach[1]:.1f}, {reach[2]:.1f}) Å. Centre them (atoms.centred()), enlarge shape or "
            "n_slices, or select those inside."
        )
