"""Volumes that are functions: a neural field has a value at every point, and a few parameters instead of voxels.

What such a function can be is its prior: features of coarse grids cost fewer parameters than those of fine ones, and a
small network between them and the value is smooth before it is rough, so the specimen is fitted before the noise is.

Two fields stand here. `HashGrid` reads features from grids of several spacings and decodes them (Müller et al. 2022,
doi:10.1145/3528223.3530127); `Siren` is a network of sines (Sitzmann et al. 2020, arXiv:2006.09661).

Points are (x, y, z) about the centre of a box, in the unit of its `extent`; a volume (z, y, x) samples the whole box,
sample n // 2 at the centre. Where the voxels lie on straight axes, a dense grid is interpolated one axis at a time,
a product with one small matrix for each, which is the same function at a fraction of the cost of a look-up.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Interpolation = Literal["smoothstep", "trilinear"]
Axes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_PRIMES = (1, 2654435761, 805459861)  # of x, y, z: Müller et al. 2022, equation (4)

VOXELS_AT_ONCE = 2**17
"""Rendered together: what a network holds for each of them stays at some hundred megabytes."""


class Field(nn.Module):
    """A function of the points of a box.

    Parameters
    ----------
    extent : (float, float, float)
        Sizes (x, y, z) of the box; their unit is that of positions, such as [voxel] or [Å].
    scale : float
        Of its values [unit of the volume]: the network's own are of size one.

    Raises
    ------
    ValueError
        For numbers that are not positive.
    """

    extent: torch.Tensor

    def __init__(self, extent: Sequence[float], scale: float = 1.0) -> None:
        super().__init__()
        if len(extent) != 3 or not all(0 < size < math.inf for size in extent):
            raise ValueError(f"extent: expected three positive sizes (x, y, z), got {tuple(extent)}.")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {scale}.")
        self.register_buffer("extent", torch.tensor([float(size) for size in extent], dtype=torch.float64))
        self.scale = scale

    @abstractmethod
    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Values (n,) at positions (n, 3), differentiable in both positions and parameters."""

    def on_axes(self, axes: Axes) -> torch.Tensor:
        """Values (z, y, x) where the coordinates z (z,), y (y,) and x (x,) meet."""
        return _at_each(self, axes)

    def volume(self, shape: tuple[int, int, int], rows: torch.Tensor | None = None) -> torch.Tensor:
        """The box sampled by `shape` (z, y, x) voxels, as `rendered` has it; of the numbered rows (row,) of y only."""
        return rendered(self, self.axes(shape), rows)

    def axes(self, shape: tuple[int, int, int]) -> Axes:
        """Coordinates (z,), (y,), (x,) of the voxels of a volume that fills the box."""
        like = next(self.parameters())
        sizes = self.extent.flip(0).tolist()
        z, y, x = ((torch.arange(n, dtype=torch.float64) - n // 2) * (s / n) for n, s in zip(shape, sizes, strict=True))
        return z.to(like), y.to(like), x.to(like)


def rendered(field: nn.Module, axes: Axes, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Values (z, y, x) of a field, or of any module from positions (n, 3) to values (n,), where three axes meet.

    Blocks of no more than `VOXELS_AT_ONCE` are rendered one after another; where gradients are asked for and there are
    several, each is rendered anew on the way back, so that memory is that of one block and the volume.

    Parameters
    ----------
    field : Field or nn.Module
    axes : (tensor (z,), tensor (y,), tensor (x,))
    rows : tensor (row,), optional
        Numbers of the y to render, all when left out.
    """
    z, y, x = axes
    y = y if rows is None else y[rows]
    act: Callable[[Axes], torch.Tensor] = field.on_axes if isinstance(field, Field) else lambda a: _at_each(field, a)
    if len(z) * len(y) * len(x) <= VOXELS_AT_ONCE:
        return act((z, y, x))
    few = max(1, min(len(y), VOXELS_AT_ONCE // len(x)))
    layers = max(1, VOXELS_AT_ONCE // (len(x) * few))

    def block(some_z: torch.Tensor, some_y: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return checkpoint(lambda: act((some_z, some_y, x)), use_reentrant=False, preserve_rng_state=False)
        return act((some_z, some_y, x))

    return torch.cat([torch.cat([block(a, b) for b in y.split(few)], 1) for a in z.split(layers)])


def _at_each(field: Callable[[torch.Tensor], torch.Tensor], axes: Axes) -> torch.Tensor:
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return field(torch.stack([x, y, z], -1).flatten(0, 2)).unflatten(0, z.shape)


class HashGrid(Field):
    """Features of grids of several spacings, decoded by a small network (Müller et al. 2022).

    A level whose nodes fit into `table` has an entry for each; the nodes of a finer one share entries by a hash.

    Parameters
    ----------
    extent : (float, float, float)
        As in `Field`; beyond the box the value is that of its edge.
    finest, coarsest : float
        Spacings of the nodes [unit of extent]; those between are in geometric progression. 16 times the finest when
        left out, and the longest side at most.
    levels, features : int
        Number of grids, and of features at each of their nodes.
    table : int
        Most entries of a level, a power of two.
    hidden, layers : int
        Width and number of the hidden layers between features and value; without any, the field is linear in its
        features, and a least-squares fit is convex.
    interpolation : {"smoothstep", "trilinear"}
        The former has a continuous gradient in the positions.
    scale : float
        As in `Field`.
    generator : torch.Generator
        Of the first values.

    Raises
    ------
    ValueError
        For sizes or spacings that are not positive, a table that is no power of two, or an unknown interpolation.
    """

    def __init__(
        self,
        extent: Sequence[float],
        finest: float,
        *,
        coarsest: float | None = None,
        levels: int = 5,
        features: int = 2,
        table: int = 2**19,
        hidden: int = 32,
        layers: int = 1,
        interpolation: Interpolation = "smoothstep",
        scale: float = 1.0,
        generator: torch.Generator,
    ) -> None:
        super().__init__(extent, scale)
        coarsest = min(16 * finest, max(extent)) if coarsest is None else coarsest
        if not 0 < finest <= coarsest < math.inf or min(levels, features, hidden) < 1 or layers < 0:
            raise ValueError(
                f"HashGrid: expected spacings 0 < finest <= coarsest, one level, feature and hidden channel or more, "
                f"and 0 layers or more, got {finest}, {coarsest}, {levels}, {features}, {hidden} and {layers}."
            )
        if table < 2 or table & (table - 1):
            raise ValueError(f"table: expected a power of two, got {table}.")
        if interpolation not in ("smoothstep", "trilinear"):
            raise ValueError(f"interpolation: expected 'smoothstep' or 'trilinear', got {interpolation!r}.")
        self.smooth = interpolation == "smoothstep"
        steps = [finest * (coarsest / finest) ** (i / max(levels - 1, 1)) for i in reversed(range(levels))]
        self.grids = [_grid(self.extent.tolist(), step, table) for step in steps]
        self.tables = nn.ParameterList(_uniform((grid.entries, features), 1e-4, generator) for grid in self.grids)
        widths = [levels * features, *[hidden] * layers, 1]
        self.weights = nn.ParameterList(_uniform((b, a), math.sqrt(6 / a), generator) for a, b in pairwise(widths))
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(width, 1)) for width in widths[1:])

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        positions = _checked(positions)
        levels = zip(self.grids, self.tables, strict=True)
        return self._decoded(torch.cat([self._looked_up(grid, table, positions) for grid, table in levels], 1).T)

    def on_axes(self, axes: Axes) -> torch.Tensor:
        """See `Field`: dense levels one axis at a time, hashed ones by look-up."""
        shape = tuple(len(axis) for axis in axes)
        positions, seen = None, []
        for grid, table in zip(self.grids, self.tables, strict=True):
            if grid.hashed:
                if positions is None:
                    z, y, x = torch.meshgrid(*axes, indexing="ij")
                    positions = torch.stack([x, y, z], -1).flatten(0, 2)
                seen.append(self._looked_up(grid, table, positions).T)
            else:
                across = [self._matrix(axis, grid, 2 - i) for i, axis in enumerate(axes)]  # z, y, x
                nodes = table.T.unflatten(1, grid.nodes[::-1])  # (feature, z, y, x)
                values = across[1] @ (nodes @ across[2].T)  # (feature, node of z, y, x)
                seen.append((across[0] @ values.flatten(2)).flatten(1))
        return self._decoded(torch.cat(seen)).unflatten(0, shape)

    def _decoded(self, h: torch.Tensor) -> torch.Tensor:
        """Values (n,) of features (level feature, n)."""
        for i, (weight, offset) in enumerate(zip(self.weights, self.offsets, strict=True)):
            h = torch.addmm(offset, weight, torch.nn.functional.silu(h) if i else h)
        return self.scale * h[0]

    def _looked_up(self, grid: _Grid, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Interpolated features (n, feature) of one level."""
        low, share = zip(*(self._cell(positions[:, i], grid, i) for i in range(3)), strict=True)
        total = torch.zeros(())
        for corner in product((0, 1), repeat=3):
            at = [a + c for a, c in zip(low, corner, strict=True)]
            near = [s if c else 1 - s for s, c in zip(share, corner, strict=True)]
            total = total + (near[0] * near[1] * near[2])[:, None] * nn.functional.embedding(grid.entry(at), table)
        return total

    def _cell(self, coordinates: torch.Tensor, grid: _Grid, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Node below each coordinate (n,), and the share (n,) of the node above it."""
        nodes = grid.nodes[axis]
        u = (coordinates / grid.step + (nodes - 1) / 2).clamp(0, nodes - 1)
        low = u.detach().floor().clamp(max=nodes - 2)
        share = u - low
        return low.long(), share**2 * (3 - 2 * share) if self.smooth else share

    def _matrix(self, coordinates: torch.Tensor, grid: _Grid, axis: int) -> torch.Tensor:
        """Interpolation along one axis, (n, node)."""
        low, share = self._cell(coordinates, grid, axis)
        empty = share.new_zeros(len(low), grid.nodes[axis])
        return empty.scatter(1, low[:, None], 1 - share[:, None]).scatter(1, low[:, None] + 1, share[:, None])


class _Grid(NamedTuple):
    """One level: spacing of its nodes, how many there are along (x, y, z), and of entries."""

    step: float
    nodes: tuple[int, int, int]
    entries: int
    hashed: bool

    def entry(self, at: Sequence[torch.Tensor]) -> torch.Tensor:
        """Which entry (n,) belongs to the nodes (x, y, z), each (n,)."""
        x, y, z = at
        if not self.hashed:
            return (z * self.nodes[1] + y) * self.nodes[0] + x
        return (x * _PRIMES[0] ^ y * _PRIMES[1] ^ z * _PRIMES[2]) & (self.entries - 1)


def _grid(extent: Sequence[float], step: float, table: int) -> _Grid:
    """Nodes about the centre of the box that enclose it."""
    x, y, z = (max(2, math.ceil(size / step - 1e-9) + 1) for size in extent)
    return _Grid(step, (x, y, z), min(x * y * z, table), x * y * z > table)


class Siren(Field):
    """A network of sines: h -> sin(omega (W h + b)), from positions over half the longest side of the box.

    Weights are drawn as Sitzmann et al. (2020, section 3.2) have it, so that what comes out of each layer has the same
    distribution however many there are: uniform in +-1/3 in the first, in +-sqrt(6 / n) / omega after it.

    Parameters
    ----------
    extent : (float, float, float)
        As in `Field`.
    omega : float
        Angular frequency of the first layer [rad per half of the longest side]. Periods down to about
        pi · longest side / omega are there from the start, and finer ones are slow to come.
    hidden, layers : int
        Width and number of the layers of sines, the first among them.
    omega_hidden : float
        Of the later ones: their gradients grow with it.
    scale : float
        As in `Field`.
    generator : torch.Generator
        Of the first values.

    Raises
    ------
    ValueError
        For sizes that are not positive.
    """

    def __init__(
        self,
        extent: Sequence[float],
        *,
        omega: float = 30.0,
        hidden: int = 64,
        layers: int = 3,
        omega_hidden: float = 30.0,
        scale: float = 1.0,
        generator: torch.Generator,
    ) -> None:
        super().__init__(extent, scale)
        if not (0 < omega < math.inf and 0 < omega_hidden < math.inf) or min(hidden, layers) < 1:
            raise ValueError(
                f"Siren: expected positive frequencies, one hidden channel and one layer or more, got {omega}, "
                f"{omega_hidden}, {hidden} and {layers}."
            )
        self.omegas = [omega, *[omega_hidden] * (layers - 1)]
        widths = [3, *[hidden] * layers, 1]
        bounds = [1 / 3, *[math.sqrt(6 / hidden) / omega_hidden] * layers]
        sizes = list(zip(widths, widths[1:], bounds, strict=False))
        self.weights = nn.ParameterList(_uniform((b, a), bound, generator) for a, b, bound in sizes)
        self.offsets = nn.ParameterList(_uniform((b, 1), 1 / math.sqrt(a), generator) for a, b, _ in sizes)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        h = (_checked(positions) * (2 / float(self.extent.max()))).T
        for omega, weight, offset in zip(self.omegas, self.weights, self.offsets, strict=False):
            h = torch.sin(omega * torch.addmm(offset, weight, h))
        return self.scale * torch.addmm(self.offsets[-1], self.weights[-1], h)[0]


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> nn.Parameter:
    values = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return nn.Parameter(((2 * values - 1) * bound).to(torch.float32))


def _checked(positions: torch.Tensor) -> torch.Tensor:
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"positions: expected (n, 3) of (x, y, z), got {tuple(positions.shape)}.")
    return positions
