"""Vitreous water as a medium with structure: its power spectrum, a random field of it, and explicit molecules.

Let F be the scattering factor of one molecule about its oxygen, n the number density of molecules, S(k) the structure
factor of their oxygens. Each molecule is taken to be turned at random, independently of the others: hydrogen bonds are
not in this model. Then a molecule with itself contributes <F^2> to the power and with any other <F>^2,

    P(k) = K^2 n [ <F>^2 (S(k) - 1) + <F^2> ] exp(-B k^2 / 2)                                 [V^2 Å^3]

with K = h^2 / (2 pi m e). The means over orientations are (Debye 1915, doi:10.1002/andp.19153510606), with
j(r) = sin(2 pi k r) / (2 pi k r),

    <F>   = f_O + 2 f_H j(r_OH)
    <F^2> = f_O^2 + 2 f_H^2 + 4 f_O f_H j(r_OH) + 2 f_H^2 j(r_HH)

S(k) comes from a molecular dynamics model (`vitreous_water`). The rings of P lie at 3.70 and 2.08 Å; electrons show
those of vitreous water at 3.70 and 2.14 Å (Dubochet et al. 1988, doi:10.1017/S0033583500004297).

`WaterField` draws a Gaussian field of this spectrum, slice by slice. `water_molecules` gives the molecules themselves.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from typing import SupportsIndex

import numpy as np
import torch
from scipy.spatial import KDTree

from cryosim.core.constants import POTENTIAL_PER_FORM_FACTOR
from cryosim.core.decay import mean_decay
from cryosim.core.fourier import BAND, band_limit, frequencies, half_frequencies, squared_frequencies
from cryosim.core.permutation import permuted
from cryosim.core.rotation import random_rotations
from cryosim.specimen.atoms import CLASSES, Atoms
from cryosim.specimen.scattering_factors import Parametrization, scattering_factor

DENSITY = 0.93
"""Of vitreous water [g/cm^3], as in Vulović et al. 2013, doi:10.1016/j.jsb.2013.05.008."""

OXYGEN_HYDROGEN = 0.9572
"""Length of the bond [Å]; with the angle, of the free molecule (Benedict, Gailar & Plyler 1956,
doi:10.1063/1.1742731)."""

ANGLE = 104.52
"""Of the two bonds [deg]."""

CLOSEST = 2.4
"""Distance [Å] to which oxygens of two layers are pushed apart."""

_MOLAR_MASS = 18.015  # [g/mol]
_AVOGADRO = 6.02214076e23  # [1/mol]
_ELEMENTS = torch.tensor([1, 8])
_NODES = 512  # radii at which the kernel of a field is computed
_MEMORY = 512.0  # [Å] along z, beyond which water is taken to forget
_LARGEST = 2.5  # [1/Å] along z, beyond which water has no power worth folding
_CUT = 5e-4  # share of the kernel's energy that may be cut off
_PUSHES = 12
_64 = 0xFFFFFFFFFFFFFFFF


def number_density(density: float = DENSITY) -> float:
    """Molecules per volume [1/Å^3] of water of some density [g/cm^3]; 0.03109 at 0.93."""
    return density * _AVOGADRO / _MOLAR_MASS * 1e-24


def inner_potential(density: float = DENSITY, parametrization: Parametrization = "lobato") -> float:
    """Mean potential [V] of water of independent atoms: K n (2 f_H(0) + f_O(0)).

    Parameters
    ----------
    density : float
        [g/cm^3].
    parametrization : {"lobato", "kirkland", "peng"}
        Of the scattering factors.
    """
    hydrogen, oxygen = scattering_factor(_ELEMENTS, torch.zeros((), dtype=torch.float64), parametrization).tolist()
    return POTENTIAL_PER_FORM_FACTOR * number_density(density) * (2 * hydrogen + oxygen)


def structure_factor(k: torch.Tensor) -> torch.Tensor:
    """Structure factor S(k) (...) [1] of the oxygens of vitreous water at k (...) [1/Å]; 1 beyond the table."""
    table = _structure_table().to(k.device)
    values = interpolated(table[:, 1], k.abs().double() / float(table[1, 0] - table[0, 0]))
    return torch.where(k.abs() < float(table[-1, 0]), values.to(k), 1.0)


def power_spectrum(
    k: torch.Tensor,
    density: float = DENSITY,
    parametrization: Parametrization = "lobato",
    b_factor: float = 0.0,
) -> torch.Tensor:
    """Power spectrum of the potential of vitreous water about its mean.

    Parameters
    ----------
    k : tensor (...)
        Spatial frequency [1/Å].
    density : float
        [g/cm^3]; S(k) is that at 0.93 in any case.
    parametrization : {"lobato", "kirkland", "peng"}
        Of the scattering factors.
    b_factor : float
        Displacement common to the atoms, B = 8 pi^2 <u^2> [Å^2], over and above that of the model at 80 K.

    Returns
    -------
    tensor (...)
        [V^2 Å^3]; integrated over three-dimensional frequency it is the variance.
    """
    hydrogen, oxygen = scattering_factor(_ELEMENTS.to(k.device), k**2, parametrization)
    apart = 2 * OXYGEN_HYDROGEN * math.sin(math.radians(ANGLE / 2))  # of the hydrogens [Å]
    bond, across = torch.sinc(2 * k * OXYGEN_HYDROGEN), torch.sinc(2 * k * apart)
    mean = oxygen + 2 * hydrogen * bond
    mean_square = oxygen**2 + 2 * hydrogen**2 + 4 * oxygen * hydrogen * bond + 2 * hydrogen**2 * across
    per_molecule = mean**2 * (structure_factor(k) - 1) + mean_square
    strength = POTENTIAL_PER_FORM_FACTOR**2 * number_density(density)
    return strength * per_molecule * torch.exp(-0.5 * b_factor * k**2)


class WaterField:
    """Slices of a Gaussian random field with the power spectrum of vitreous water, without end along z.

    Slice i is the projection of the field between z = (i - 1/2) t and (i + 1/2) t, whose window has the transform
    t sinc(kz t). At one in-plane frequency q the slices are a stationary sequence. With f the frequency along it in
    cycles per slice, folded by the sampling, its spectrum is

        D(q, f) = t sum_m P(sqrt(q^2 + (f + m)^2 / t^2)) sinc^2(f + m)                        [V^2 Å^4]

    So it is a moving average of white noise w_j(q), with the kernel c whose transform is the root of D,

        slice_i(q) = sum_j c_{j - i}(q) w_j(q),      c_j(q) = integral of sqrt(D(q, f)) cos(2 pi f j) over one period.

    Water forgets within some 20 Å, so c ends after a few slices. What is cut off is put back at the frequency f = 0, so
    that a sum of many slices has the exact spectrum P(q) times the depth. Noise j comes from a generator seeded by
    (seed, j): any slice can be asked for at any time, and nothing is kept between two calls.

    In a beam water diffuses, and the field changes from frame to frame of an exposure. Each of its waves is taken as an
    Ornstein-Uhlenbeck process whose correlation falls as exp(-x n) over n frames, x = decay * q^2 (what moves along z
    is not seen). What a frame holds is the mean over its time; the covariance of two such means is

        C_nn = 2 (x - 1 + exp(-x)) / x^2,      C_nm = ((1 - exp(-x)) / x)^2 exp(-x (|n - m| - 1))

    so frame n is made of the white noises 0 to n, weighted by row n of the Cholesky factor of C: n + 1 times the work.

    The field is Gaussian: its spectrum is that of the molecules, its higher moments are not. It repeats at the edges of
    the image and holds what lies below two thirds of the Nyquist frequency, as the slices of atoms do.

    Parameters
    ----------
    shape : (int, int)
        (y, x) [px].
    pixel_size, thickness : float
        Of the grid and of a slice [Å].
    seed : int
        Fields of different seeds are independent. Devices of different kinds draw different noise.
    density : float
        [g/cm^3].
    parametrization : {"lobato", "kirkland", "peng"}
    b_factor : float
        As in `power_spectrum` [Å^2].
    frame : int
        Of the exposure.
    decay : float
        What a frame forgets of a wave, over the square of its frequency [Å^2]; at 0 all frames are the same.
    dtype : torch.dtype
        Of the slices. The noise is drawn in float32 in any case, so that it is the same field in either precision.
    device : torch.device, optional

    Attributes
    ----------
    reach : int
        Slices farther apart than twice this are independent.

    Raises
    ------
    ValueError
        When a size is not positive.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        pixel_size: float,
        thickness: float,
        *,
        seed: int,
        density: float = DENSITY,
        parametrization: Parametrization = "lobato",
        b_factor: float = 0.0,
        frame: int = 0,
        decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("pixel_size", pixel_size), ("thickness", thickness), ("density", density)):
            if not value > 0:
                raise ValueError(f"WaterField: expected a positive {name}, got {value}.")
        if min(shape) < 1:
            raise ValueError(f"WaterField: expected a shape (y, x) of at least 1 x 1 px, got {tuple(shape)}.")
        self.shape, self.pixel_size, self.thickness = (shape[0], shape[1]), pixel_size, thickness
        self.dtype, self.device = dtype, torch.device(device or "cpu")
        seeds = [_mixed(operator.index(seed))]
        q = squared_frequencies(self.shape, pixel_size, half=True, dtype=torch.float64).sqrt()
        inside = band_limit(self.shape, BAND, half=True, dtype=torch.float64) > 0
        self._columns = int(inside.any(0).sum())
        inside = inside[:, : self._columns]
        q = q[:, : self._columns][inside]
        spectrum = functools.partial(
            power_spectrum, density=density, parametrization=parametrization, b_factor=b_factor
        )
        nodes = torch.linspace(0, float(q.max()), _NODES, dtype=torch.float64)
        kernel = moving_average(spectrum, nodes, thickness)  # (lag, node)
        self.reach = len(kernel) - 1
        at = q * ((_NODES - 1) / max(float(q.max()), 1e-12))
        kernel = interpolated(kernel, at)
        if decay > 0:
            shares = interpolated(frame_shares(decay * nodes**2, frame), at).to(
                self.device, dtype
            )  # (noise, frequency)
            seeds += [_mixed(seeds[0] + n) for n in range(1, frame + 1)]
        else:
            shares = [None]
        self._parts = list(zip(seeds, shares, strict=True))
        # Noise of variance 1 / 2 in either part; irfft2 reads the columns that are their own conjugates as real parts,
        # which halves the variance of column 0. The last column of an even width lies beyond the band.
        own = torch.arange(self._columns).expand(inside.shape)[inside] == 0
        scale = torch.where(own, 1.0, math.sqrt(0.5)) * math.sqrt(shape[0] * shape[1]) / pixel_size
        self._kernel = (kernel * scale).to(self.device, dtype)  # (lag, frequency) [V·Å]
        self._where = inside.flatten().nonzero()[:, 0].to(self.device)

    def __getitem__(self, i: SupportsIndex) -> torch.Tensor:
        """Projected potential (y, x) [V·Å] about its mean of the slice centred at z = i * thickness, for any i."""
        return self.displaced(i)

    def displaced(self, i: SupportsIndex, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Slice i of the field as moved by `shift` (2,) [(x, y) Å] across the beam."""
        i = operator.index(i)
        return self._slice((self._noise(i + lag) for lag in range(-self.reach, self.reach + 1)), shift)

    def between(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """Slices first, first + 1, ..., last - 1 in turn: faster than one by one, as each noise is drawn once."""
        noises = deque((self._noise(j) for j in range(first - self.reach, first + self.reach)), 2 * self.reach + 1)
        for i in range(first, last):
            noises.append(self._noise(i + self.reach))
            yield self._slice(noises)

    def _slice(self, noises: Iterable[torch.Tensor], shift: torch.Tensor | None = None) -> torch.Tensor:
        """Slice (y, x) from the noises within `reach` of its own, in order."""
        total = torch.zeros(2, len(self._where), dtype=self.dtype, device=self.device)
        for lag, noise in enumerate(noises, -self.reach):
            total.addcmul_(noise, self._kernel[abs(lag)])
        ny, nx = self.shape
        spectrum = torch.zeros(ny * self._columns, dtype=self._kernel.dtype.to_complex(), device=self.device)
        waves = torch.complex(*total)
        if shift is not None:
            ky = frequencies(ny, self.pixel_size, dtype=torch.float64, device=self.device)
            kx = half_frequencies(nx, self.pixel_size, dtype=torch.float64, device=self.device)
            row, column = self._where // self._columns, self._where % self._columns
            turns = -2 * torch.pi * (kx[column] * shift[0] + ky[row] * shift[1])
            waves = waves * torch.polar(torch.ones_like(turns), turns).to(waves.dtype)
        spectrum = spectrum.index_copy(0, self._where, waves).view(ny, self._columns)
        return torch.fft.irfft(torch.fft.ifft(spectrum, dim=-2), n=nx)

    def _noise(self, j: int) -> torch.Tensor:
        """White noise (real or imaginary, frequency) number j, as this frame holds it."""
        parts = [
            white if share is None else white * share
            for white, share in ((self._white(j, seed), share) for seed, share in self._parts)
        ]
        return functools.reduce(torch.add, parts)

    def _white(self, j: int, mine: int) -> torch.Tensor:
        # A generator on the processor heeds the lower half of its seed only: there j is permuted, so no two are equal.
        seed = (_mixed(j ^ mine) & ~0xFFFFFFFF) | (permuted(permuted(j & 0xFFFFFFFF) ^ (mine >> 32)))
        generator = torch.Generator(self.device).manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        noise = torch.randn(2, len(self._where), generator=generator, dtype=torch.float32, device=self.device)
        return noise.to(self.dtype)


def frame_shares(x: torch.Tensor, frame: int) -> torch.Tensor:
    """Weights (frame + 1, ...) of independent noises in the mean over a frame of what forgets x (...) in each."""
    n = torch.arange(frame + 1, dtype=x.dtype, device=x.device)
    apart = (n[:, None] - n).abs()
    x = x[..., None, None]
    safe = x.clamp_min(1e-2)
    own = torch.where(x < 1e-2, 1 - x / 3 + x**2 / 12, 2 * (safe + torch.expm1(-safe)) / safe**2)
    covariance = torch.where(apart == 0, own, mean_decay(x) ** 2 * torch.exp(-x * (apart - 1)))
    slight = 1e-9 * torch.eye(frame + 1, dtype=x.dtype, device=x.device)  # what never changes has one noise only
    return torch.linalg.cholesky(covariance + slight)[..., -1, :].movedim(-1, 0)


def moving_average(spectrum: Callable[[torch.Tensor], torch.Tensor], q: torch.Tensor, thickness: float) -> torch.Tensor:
    """Kernel c (lag, frequency) [V Å^2] of `WaterField` for lags 0, 1, ...; that of lag -j is that of j.

    Parameters
    ----------
    spectrum : callable
        P [V^2 Å^3] at frequencies [1/Å].
    q : tensor (frequency,)
        In-plane frequencies [1/Å].
    thickness : float
        Of a slice [Å].
    """
    period = 2 ** math.ceil(math.log2(max(_MEMORY / thickness, 64)))  # [slices]
    f = torch.arange(period // 2 + 1, dtype=q.dtype) / period  # [cycles / slice]
    orders = math.ceil(_LARGEST * thickness)
    step = 5e-4  # [1/Å]
    largest = math.hypot(float(q.max()), (orders + 0.5) / thickness)
    table = spectrum(step * torch.arange(math.ceil(largest / step) + 2, dtype=q.dtype))
    folded = torch.zeros(len(f), len(q), dtype=q.dtype)
    for order in range(-orders, orders + 1):
        along = f[:, None] + order
        power = interpolated(table, torch.sqrt(q**2 + (along / thickness) ** 2) / step)
        folded += thickness * power * torch.sinc(along) ** 2
    root = folded.sqrt()  # (f, frequency), even and of period 1 in f
    kernel = torch.fft.irfft(root, n=period, dim=0)[: period // 2]  # (lag, frequency)
    twice = torch.full((len(kernel), 1), 2.0, dtype=q.dtype)
    twice[0] = 1.0
    energy = (twice * kernel**2).flip(0).cumsum(0).flip(0)  # of this lag and all beyond
    reach = int((energy > _CUT * energy[0]).any(1).sum()) - 1
    kernel, twice = kernel[: reach + 1], twice[: reach + 1]
    missing = root[0] - (twice * kernel).sum(0)
    return kernel + missing / twice.sum()


def interpolated(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Values (..., n) between their samples, linearly: (..., *at.shape) at the indices `at`, held at either end."""
    at = at.clamp(0, values.shape[-1] - 1)
    lower = at.long().clamp(max=max(values.shape[-1] - 2, 0))
    upper = (lower + 1).clamp(max=values.shape[-1] - 1)
    return values[..., lower] + (at - lower) * (values[..., upper] - values[..., lower])


def water_molecules(
    size: tuple[float, float, float],
    *,
    density: float = DENSITY,
    b_factor: float = 0.0,
    generator: torch.Generator | None = None,
) -> Atoms:
    """Molecules of vitreous water that fill a box.

    Layers about 30 Å deep are cut from the periodic box of the model, each turned and displaced at random in all three
    dimensions, so that no lattice shows. Where two layers join, molecules that come too close are pushed apart; none
    is taken away. What two layers hold does not match at their join: projected along z, the power below 0.15 1/Å is 1.2
    to 1.6 times `power_spectrum`; in the ring it is right. `WaterField` is right at all frequencies.

    Parameters
    ----------
    size : (float, float, float)
        (x, y, z) of the box about the origin that holds the oxygens [Å]; hydrogens reach 0.96 Å beyond.
    density : float
        [g/cm^3]; the box of the model is scaled to it.
    b_factor : float
        Of all atoms [Å^2].
    generator : torch.Generator, optional

    Returns
    -------
    Atoms
        O, H, H of the first molecule, O, H, H of the second, ...; molecules ordered by layer, positions in float64.

    Raises
    ------
    ValueError
        When a size is not positive.
    """
    if not min(size) > 0 or not density > 0:
        raise ValueError(f"water_molecules: expected a positive size and density, got {tuple(size)} and {density}.")
    fractions = _box()
    edge = (len(fractions) / number_density(density)) ** (1 / 3)  # [Å]
    layers = max(1, round(size[2] / (edge / 2)))
    depth = size[2] / layers
    heights = (torch.arange(layers, dtype=torch.float64) + 0.5) * depth - size[2] / 2
    rotations = random_rotations(layers, generator)
    shifts = torch.rand(layers, 3, generator=generator, dtype=torch.float64)
    half = torch.tensor([size[0] / 2, size[1] / 2, depth / 2], dtype=torch.float64)
    parts = []
    for height, rotation, shift in zip(heights.tolist(), rotations, shifts, strict=True):
        layer = _cut(fractions, shift, edge, rotation, half)
        layer[:, 2] += height
        parts.append(layer)
    oxygens = torch.cat(parts)
    joins = (torch.arange(1, layers, dtype=torch.float64)) * depth - size[2] / 2
    if layers > 1:
        oxygens = _pushed_apart(oxygens, joins, torch.tensor(size, dtype=torch.float64) / 2)
    n = len(oxygens)
    bonds = random_rotations(n, generator) @ _bonds().T  # (molecule, xyz, hydrogen) [Å]
    hydrogens = oxygens[:, None] + bonds.mT
    positions = torch.cat([oxygens[:, None], hydrogens], 1).flatten(0, 1)
    numbers = torch.tensor([8, 1, 1]).repeat(n)
    classes = torch.full((3 * n,), CLASSES.index("water"))
    return Atoms(positions, numbers, torch.full((3 * n,), b_factor, dtype=torch.float64), classes=classes)


def outside(water: Atoms, solute: Atoms, distance: float = 2.1) -> Atoms:
    """The molecules of `water` whose oxygens are at least `distance` [Å] from every atom of the solute.

    At 2.1 Å from its atoms other than hydrogen a protein displaces the volume that it has in solution (ubiquitin:
    10 400 Å^3, from 0.73 cm^3/g). Hydrogen bonds are 2.7 Å long, but the water about them is denser than water.

    Parameters
    ----------
    water : Atoms
        From `water_molecules`: O, H, H of one molecule after the other.
    solute : Atoms
    distance : float
        [Å].

    Raises
    ------
    ValueError
        When the atoms of `water` are not ordered so.
    """
    if len(water) % 3 or not torch.equal(water.numbers, water.numbers.new_tensor([8, 1, 1]).repeat(len(water) // 3)):
        raise ValueError(
            "outside: expected water as O, H, H of one molecule after the other, as water_molecules gives."
        )
    tree = KDTree(solute.positions.detach().cpu().numpy())
    nearest, _ = tree.query(water.positions[::3].detach().cpu().numpy(), distance_upper_bound=distance)
    free = torch.from_numpy(np.isinf(nearest)).to(water.positions.device)
    return water.index(free.repeat_interleave(3))


def _cut(
    fractions: torch.Tensor, shift: torch.Tensor, edge: float, rotation: torch.Tensor, half: torch.Tensor
) -> torch.Tensor:
    """Points (point, 3) [Å] of the periodic box, shifted by `shift` (3,) [edge] and turned, inside +-half (3,) [Å]."""
    reach = (rotation.T.abs() @ half) / edge  # of the region in cells
    axes = [torch.arange(-math.ceil(float(r)) - 2, math.ceil(float(r)) + 2, dtype=torch.float64) for r in reach]
    cells = torch.cartesian_prod(*axes)
    centres = edge * (cells + shift + 0.5) @ rotation.T
    cells = cells[(centres.abs() < half + 0.5 * edge * rotation.abs().sum(1)).all(1)]
    corners = edge * (cells + shift) @ rotation.T
    points = edge * fractions @ rotation.T
    kept = []
    for some in corners.split(64):
        x, y, z = (some.T[:, :, None] + points.T[:, None]).flatten(1)  # (cell * molecule,) each
        near = torch.nonzero((z >= -half[2]) & (z < half[2]))[:, 0]  # a thin layer: most fall out here
        x, y, z = x[near], y[near], z[near]
        inside = (x >= -half[0]) & (x < half[0]) & (y >= -half[1]) & (y < half[1])
        kept.append(torch.stack([x[inside], y[inside], z[inside]], 1))
    return torch.cat(kept)


def _pushed_apart(oxygens: torch.Tensor, joins: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Oxygens (molecule, 3) [Å] with those near a join moved until none is closer than about `CLOSEST`."""
    near = torch.nonzero(((oxygens[:, 2, None] - joins).abs() < 2 * CLOSEST).any(1))[:, 0]
    points = oxygens[near]
    for _ in range(_PUSHES):
        pairs = torch.from_numpy(KDTree(points.numpy()).query_pairs(CLOSEST, output_type="ndarray"))
        if len(pairs) == 0:
            break
        apart = points[pairs[:, 1]] - points[pairs[:, 0]]
        r = apart.norm(dim=1, keepdim=True).clamp_min(1e-6)
        push = 0.5 * (1.02 * CLOSEST - r) * apart / r
        points = points.index_add(0, pairs[:, 1], push).index_add(0, pairs[:, 0], -push)
        points = torch.minimum(torch.maximum(points, -half), half)
    return oxygens.index_copy(0, near, points)


def _bonds() -> torch.Tensor:
    """The two bonds (hydrogen, 3) [Å]."""
    turn = math.radians(ANGLE / 2)
    return OXYGEN_HYDROGEN * torch.tensor(
        [[math.sin(turn), math.cos(turn), 0.0], [-math.sin(turn), math.cos(turn), 0.0]], dtype=torch.float64
    )


def _mixed(x: int) -> int:
    """A permutation of the 64-bit numbers: SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195)."""
    x = (x + 0x9E3779B97F4A7C15) & _64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _64
    return x ^ x >> 31


@functools.cache
def _structure_table() -> torch.Tensor:
    """(frequency [1/Å], S)."""
    source = resources.files("cryosim.specimen").joinpath("tables", "vitreous_water_structure.csv")
    with source.open(encoding="utf-8") as file:
        rows = [line.split(",") for line in file if not line.startswith(("#", "k"))]
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


@functools.cache
def _box() -> torch.Tensor:
    """Fractional coordinates (molecule, 3) of the periodic box."""
    with resources.files("cryosim.specimen").joinpath("tables", "vitreous_water.npy").open("rb") as file:
        return torch.from_numpy(np.load(file, allow_pickle=False).astype(np.float64))
