"""Solids: gold beads, carbon films, sputtered platinum, the wedge of a lamella, crystals of ice on its surface.

Beads, and films where they are asked for, are made of single atoms. The rest is coarse: a lattice of sites, each a
Gaussian that stands for the N atoms of its cell. Three numbers decide what such a lattice shows:

- a Gaussian of 0.55 spacings leaves a ripple of 2 exp(-2 pi^2 0.55^2) = 0.5 % of the mean potential along each axis;
- atoms at random have a flat spectrum of density fluctuations. Cells get it by occupancies with the variance
  S N, S the structure factor at long wavelengths (1 for atoms at random, less for a dense amorphous network);
- shifting every site at random by sigma sqrt(S / N) along each axis, sigma the Gaussian's, makes up for its fading
  exp(-4 pi^2 sigma^2 k^2) to first order: with x = 4 pi^2 sigma^2 k^2 the spectrum is S (1 + x) exp(-x), nine tenths of
  flat at k = 0.12 / sigma (a period of 40 Å for sites 8.5 Å apart), a quarter at 0.26 / sigma (18 Å).

Finer grain, down to the atoms that make the Thon rings, needs a finer spacing or explicit atoms.

All are of class "solid": they do not fade with dose and displace the ice they stand in; or "deposit": they stand on the
ice, in vacuum.
"""

from __future__ import annotations

import math

import torch
from scipy.spatial import KDTree

from cryosim.core.fourier import number, positions
from cryosim.core.rotation import random_rotations
from cryosim.specimen.atoms import CLASSES, Atoms, concatenate
from cryosim.specimen.ice import Ice, Relief

GOLD_LATTICE = 4.0782
"""Lattice constant of gold at room temperature [Å]; face-centred cubic, 4 atoms a cell (Wyckoff 1963, Crystal
Structures, vol. 1)."""
GOLD_B_FACTOR = 0.21
"""Of gold at 90 K [Å^2], by the Debye model at 165 K; 0.63 at room temperature."""
CARBON_DENSITY = 1.8
"""Of evaporated carbon films [g/cm^3]; films of 1.75 had a mean inner potential of 9.09 V (Wanner et al. 2006,
doi:10.1016/j.ultramic.2005.10.004). Independent atoms have 10.8 V at 1.8 g/cm^3, 10.5 V at 1.75."""
PLATINUM_DENSITY = 21.45
"""Of solid platinum [g/cm^3]."""
ICE_CRYSTAL_DENSITY = 0.917
"""Of hexagonal ice [g/cm^3], at 0 °C."""

_ATOMS_PER_GRAM = 6.02214076e23 / 1e24  # times g/cm^3 over g/mol is 1/Å^3
_CARBON, _PLATINUM, _WATER = 12.011, 195.084, 18.015  # [g/mol]
_WIDTH = 0.55  # standard deviation of a site [spacing]
_LARGEST = 50_000_000  # atoms of one solid
_FACETS = 24  # planes that cut a crystal


def gold_bead(
    diameter: float,
    *,
    b_factor: float = GOLD_B_FACTOR,
    on_ice: bool = False,
    generator: torch.Generator | None = None,
) -> Atoms:
    """Sphere cut from a single crystal of gold, turned and shifted at random.

    Parameters
    ----------
    diameter : float
        [Å]; fiducials have 50 to 200.
    b_factor : float
        [Å^2].
    on_ice : bool
        Whether it stands on the ice rather than in it.
    generator : torch.Generator, optional

    Returns
    -------
    Atoms
        About the middle of the sphere.

    Raises
    ------
    ValueError
        When the diameter is not positive, or the bead has more than 5e7 atoms.
    """
    _positive("gold_bead", diameter=diameter)
    _check_number("gold_bead", math.pi / 6 * diameter**3 * 4 / GOLD_LATTICE**3)
    cells = math.ceil(diameter / 2 / GOLD_LATTICE) + 1
    corner = torch.arange(-cells, cells + 1, dtype=torch.float64)
    basis = torch.tensor([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], dtype=torch.float64)
    basis = basis + torch.rand(3, generator=generator, dtype=torch.float64) - 0.5
    places = []
    for x in corner:  # sheet by sheet: the cube of cells is twice the sphere
        sheet = torch.cartesian_prod(x[None], corner, corner)
        atoms = GOLD_LATTICE * (sheet[:, None] + basis).flatten(0, 1)
        places.append(atoms[atoms.norm(dim=1) <= diameter / 2])
    turned = torch.cat(places) @ random_rotations(1, generator)[0].T
    return _solid(turned, 79, b_factor, 1.0, on_ice)


def carbon_film(
    size: tuple[float, float],
    thickness: float,
    *,
    hole_radius: float = 0.0,
    hole_centre: tuple[float, float] = (0.0, 0.0),
    z: float = 0.0,
    density: float = CARBON_DENSITY,
    spacing: float = 8.5,
    structure_factor: float = 1.0,
    explicit: bool = False,
    least_distance: float = 1.3,
    on_ice: bool = False,
    generator: torch.Generator | None = None,
) -> Atoms:
    """Film of amorphous carbon normal to z, with a round hole.

    Parameters
    ----------
    size : (float, float)
        (x, y) [Å], about the origin.
    thickness : float
        [Å]; 100 to 300 are usual.
    hole_radius : float
        [Å]; 0 for none.
    hole_centre : (float, float)
        (x, y) [Å]; outside the field, so that the edge crosses it, or in it.
    z : float
        Of the middle of the film [Å].
    density : float
        [g/cm^3].
    spacing : float
        Of coarse sites [Å]; edges are as sharp as 0.55 of it.
    structure_factor : float
        Of the coarse sites at long wavelengths [1]: 1 is atoms at random. Without a source for carbon films.
    explicit : bool
        Single atoms at random, no two nearer than `least_distance`, instead of sites; for small fields.
    least_distance : float
        [Å]; bonds are 1.34 to 1.54 Å long.
    on_ice : bool
        Whether it stands on the ice rather than in it.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When a number is out of bounds, nothing is left beside the hole, or the film has more than 5e7 rows.
    """
    _positive("carbon_film", size_x=size[0], size_y=size[1], thickness=thickness, density=density, spacing=spacing)
    if hole_radius < 0 or not 0 <= structure_factor:
        raise ValueError(
            "carbon_film: expected a hole radius [Å] and a structure factor [1] of 0 or more, got "
            f"{hole_radius:g} and {structure_factor:g}."
        )
    atoms = density * _ATOMS_PER_GRAM / _CARBON  # [1/Å^3]
    extent = (size[0], size[1], thickness)
    if explicit:
        places = _packed(extent, atoms, least_distance, generator)
        share = torch.ones(len(places), dtype=torch.float64)
        if hole_radius > 0:
            places = places[_from_hole(places, hole_radius, hole_centre) >= 0]
            share = share[: len(places)]
        b_factor = 0.5  # of the order of graphite's
    else:
        places, cell = _lattice("carbon_film", extent, spacing)
        share = torch.ones(len(places), dtype=torch.float64)
        if hole_radius > 0:
            share = (0.5 + _from_hole(places, hole_radius, hole_centre) / spacing).clamp(0, 1)
            places, share = places[share > 0], share[share > 0]
        sites = atoms * cell
        places, grain = _random_network(places, sites, spacing, structure_factor, generator)
        share, b_factor = sites * share * grain, _site_b_factor(spacing)
    if len(places) == 0:
        raise ValueError(f"carbon_film: the hole of radius {hole_radius:g} Å leaves nothing of {tuple(size)} Å.")
    return _solid(places + places.new_tensor([0.0, 0.0, z]), 6, b_factor, share, on_ice)


def platinum_layer(
    size: tuple[float, float],
    thickness: float,
    *,
    z: float,
    grain: float = 30.0,
    packing: float = 0.8,
    spacing: float = 7.0,
    on_ice: bool = True,
    generator: torch.Generator | None = None,
) -> Atoms:
    """Sputtered platinum: grains with voids between them.

    Grains are the cells about random points (Voronoi). The voids take the places that lie most nearly halfway between
    two grains, as many as `packing` leaves.

    Parameters
    ----------
    size : (float, float)
        (x, y) [Å], about the origin.
    thickness : float
        [Å]; lamellae carry 20 to 200.
    z : float
        Of the middle of the layer [Å]: on a lamella, (its thickness + that of the layer) / 2.
    grain : float
        Cube root of the volume of a grain [Å]. Grain and packing are without a source.
    packing : float
        Fraction of the volume that is metal [1].
    spacing : float
        Of the sites [Å].
    on_ice : bool
        Whether it stands on the ice rather than in it.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When a number is out of bounds or the layer has more than 5e7 sites.
    """
    _positive("platinum_layer", size_x=size[0], size_y=size[1], thickness=thickness, grain=grain, spacing=spacing)
    if not 0 < packing <= 1:
        raise ValueError(f"platinum_layer: expected a packing above 0 and up to 1, got {packing:g}.")
    extent = (size[0], size[1], thickness)
    places, cell = _lattice("platinum_layer", extent, spacing)
    beyond = torch.tensor(extent, dtype=torch.float64) + 4 * grain  # so that grains at the faces are like the others
    seeds = max(2, round(float(beyond.prod()) / grain**3))
    middles = (torch.rand(seeds, 3, generator=generator, dtype=torch.float64) - 0.5) * beyond
    nearest, _ = KDTree(middles.numpy()).query(places.numpy(), k=2)
    depth = torch.as_tensor(nearest[:, 1] - nearest[:, 0])  # in the grain, from its boundary
    metal = max(1, round(packing * len(places)))
    kept = depth.topk(metal).indices.sort().values
    share = packing * len(places) / metal
    sites = PLATINUM_DENSITY * _ATOMS_PER_GRAM / _PLATINUM * cell
    places, grains = _random_network(places[kept], sites, spacing, 0.0, generator)
    occupancies = sites * share * grains
    return _solid(places + places.new_tensor([0.0, 0.0, z]), 78, _site_b_factor(spacing), occupancies, on_ice)


def wedge(
    extent: float,
    thin: float,
    thick: float | None = None,
    *,
    angle: float | None = None,
    axis_angle: float = 0.0,
    curtains: float = 0.0,
    curtain_width: float = 300.0,
    generator: torch.Generator | None = None,
) -> Relief:
    """Lamella whose thickness grows evenly in one direction, half of it on either side, with the marks of the mill.

    It is a relief of an ice of the mean thickness: `Ice((thin + thick) / 2, relief=wedge(extent, thin, thick))`.

    Parameters
    ----------
    extent : float
        Width of the grid [Å].
    thin, thick : float
        Thickness at either end, extent / 2 before and behind the origin [Å].
    angle : float, optional
        Between the two surfaces [deg] instead of `thick`: thick = thin + 2 extent tan(angle / 2).
    axis_angle : float
        Direction in which it thickens, from x towards y [deg]: that of the ion beam, which mills the far end less.
    curtains : float
        Standard deviation of the height of ridges that run along that direction [Å], different on the two surfaces.
    curtain_width : float
        Distance across them at which their correlation falls to 1/e [Å]; without a source.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When not exactly one of thick and angle is given, or a number is out of bounds.
    """
    if (thick is None) == (angle is None):
        raise ValueError(f"wedge: expected either thick or angle, got thick={thick} and angle={angle}.")
    _positive("wedge", extent=extent, thin=thin, curtain_width=curtain_width)
    if angle is not None:
        if not -90 < angle < 90:
            raise ValueError(f"wedge: expected an angle between -90 and 90 [deg], got {angle:g}.")
        thick = thin + 2 * extent * math.tan(math.radians(angle) / 2)
    assert thick is not None
    _positive("wedge", thick=thick)
    if curtains < 0:
        raise ValueError(f"wedge: expected curtains of 0 or more [Å], got {curtains:g}.")
    n = 65 if curtains == 0 else max(65, 2 * math.ceil(2 * extent / curtain_width) + 1)
    spacing = extent / (n - 1)
    x = positions(n, spacing, dtype=torch.float64)
    turn = math.radians(axis_angle)
    forward = x * math.cos(turn) + x[:, None] * math.sin(turn)  # (y, x) [Å]
    across = x[:, None] * math.cos(turn) - x * math.sin(turn)
    slope = 0.5 * (thick - thin) * (forward / extent).clamp(-0.5, 0.5)
    heights = slope.expand(2, n, n).clone()
    if curtains > 0:
        heights += torch.stack([_ridges(across, curtains, curtain_width, generator) for _ in range(2)])
    return Relief(heights, spacing)


def ice_crystals(
    n: int,
    radii: tuple[float, float],
    size: tuple[float, float],
    ice: Ice,
    *,
    spacing: float = 8.5,
    generator: torch.Generator | None = None,
) -> Atoms:
    """Contamination: crystals of hexagonal ice that sit on either surface of the slab.

    Each is a ball cut by planes at random into facets, its middle within half a radius above the surface and nothing
    of it below. Coarse sites of water, so they have the mass and the shape of crystals but not their Bragg reflections.

    Parameters
    ----------
    n : int
        Number of crystals.
    radii : (float, float)
        Least and largest [Å]; uniform between.
    size : (float, float)
        (x, y) [Å] of the field about the origin that holds their middles.
    ice : Ice
        The slab; its relief counts.
    spacing : float
        Of the sites [Å].
    generator : torch.Generator, optional

    Returns
    -------
    Atoms
        Two rows a site, O and H, of class "deposit".

    Raises
    ------
    ValueError
        When a number is out of bounds, or the crystals have more than 5e7 sites.
    """
    _positive("ice_crystals", least_radius=radii[0], size_x=size[0], size_y=size[1], spacing=spacing)
    if n < 0 or radii[1] < radii[0]:
        raise ValueError(f"ice_crystals: expected n of 0 or more and radii in order, got {n} and {tuple(radii)}.")
    _check_number("ice_crystals", 4 * n * (2 * radii[1] / spacing) ** 3)
    lumps: list[torch.Tensor] = []
    for _ in range(n):
        draw = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        radius = radii[0] + (radii[1] - radii[0]) * draw[0]
        side = 1.0 if draw[1] < 0.5 else -1.0
        x, y = ((draw[2 + axis] - 0.5) * size[axis] for axis in (0, 1))
        sites = _faceted(radius, spacing, generator)
        start = sites.new_tensor([x, y, 0.0])
        start[2] = side * (float(surface_height(ice, start[None], side)) + 0.5 * draw[4] * radius)
        sites = sites + start
        above = side * sites[:, 2] - surface_height(ice, sites, side)
        sites = sites[above >= 0.5 * spacing]  # the cell of a site reaches half a spacing further down
        lumps.append(_apart_from(lumps, sites, spacing))
    places = torch.cat(lumps) if lumps else torch.zeros(0, 3, dtype=torch.float64)
    molecules = ICE_CRYSTAL_DENSITY * _ATOMS_PER_GRAM / _WATER * spacing**3
    b_factor = _site_b_factor(spacing)
    parts = [_solid(places, z, b_factor, count * molecules, True) for z, count in ((8, 1), (1, 2))]
    return concatenate(parts)


# parts ----------------------------------------------------------------------------------------------------------------


def _solid(
    places: torch.Tensor, element: int, b_factor: float, occupancies: float | torch.Tensor, on_ice: bool
) -> Atoms:
    n = len(places)
    if not isinstance(occupancies, torch.Tensor):
        occupancies = torch.full((n,), occupancies, dtype=torch.float64)
    return Atoms(
        places,
        torch.full((n,), element),
        torch.full((n,), b_factor, dtype=torch.float64),
        occupancies,
        torch.full((n,), CLASSES.index("deposit" if on_ice else "solid")),
    )


def _site_b_factor(spacing: float) -> float:
    """8 pi^2 sigma^2 of a site [Å^2]."""
    return 8 * math.pi**2 * (_WIDTH * spacing) ** 2


def _lattice(name: str, extent: tuple[float, float, float], spacing: float) -> tuple[torch.Tensor, float]:
    """Middles (site, 3) of as many cells as fill a box evenly, at about a spacing, and the volume of one [Å^3]."""
    counts = [max(1, round(length / spacing)) for length in extent]
    _check_number(name, math.prod(counts))
    axes = [
        (torch.arange(n, dtype=torch.float64) + 0.5) * (length / n) - length / 2
        for n, length in zip(counts, extent, strict=True)
    ]
    return torch.cartesian_prod(*axes), math.prod(extent) / math.prod(counts)


def _random_network(
    places: torch.Tensor, sites: float, spacing: float, structure_factor: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifted sites and occupancies of mean 1 with the fluctuations of `sites` atoms each; see above."""
    if structure_factor == 0:
        return places, torch.ones(len(places), dtype=torch.float64)
    relative = math.sqrt(structure_factor / sites)  # standard deviation of the number of atoms over its mean
    shape = 1 / relative**2  # of a gamma distribution, which is never negative
    grain = _gamma(shape, len(places), generator)
    jitter = torch.randn(places.shape, generator=generator, dtype=torch.float64)
    return places + _WIDTH * spacing * relative * jitter, grain


def _gamma(shape: float, n: int, generator: torch.Generator | None) -> torch.Tensor:
    """Positive numbers (n,) of mean 1 and variance 1 / shape: a gamma distribution by Wilson & Hilferty 1931
    (doi:10.1073/pnas.17.12.684), whose cube root is normal; made to have the mean 1 exactly."""
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    drawn = (1 - 1 / (9 * shape) + normal / (3 * math.sqrt(shape))).clamp_min(0) ** 3
    return drawn / drawn.mean().clamp_min(1e-12) if n else drawn


def _from_hole(places: torch.Tensor, radius: float, centre: tuple[float, float]) -> torch.Tensor:
    """Distance (site,) [Å] from the edge of a hole, negative in it."""
    return (places[:, :2] - places.new_tensor(centre)).norm(dim=1) - radius


def _packed(
    extent: tuple[float, float, float], density: float, least: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Places (atom, 3) in a box about the origin, uniform but for a least distance [Å], one after the other.

    Random sequential adsorption fills up to 38 % of space with balls of the least distance (Widom 1966,
    doi:10.1063/1.1726548; Torquato, Uche & Stillinger 2006, doi:10.1103/PhysRevE.74.061308).
    """
    box = torch.tensor(extent, dtype=torch.float64)
    target = round(density * float(box.prod()))
    _check_number("carbon_film", target)
    if not 0 <= density * math.pi / 6 * least**3 < 0.3:
        raise ValueError(
            f"carbon_film: {density:.3g} atoms/Å^3 do not fit at random with a least distance of {least:g} Å. Take "
            "a shorter one."
        )
    places = torch.zeros(0, 3, dtype=torch.float64)
    while len(places) < target:
        missing = target - len(places)
        drawn = (torch.rand(math.ceil(1.5 * missing) + 16, 3, generator=generator, dtype=torch.float64) - 0.5) * box
        if len(places):
            near, _ = KDTree(places.numpy()).query(drawn.numpy(), distance_upper_bound=least)
            drawn = drawn[torch.isinf(torch.as_tensor(near))]
        pairs = torch.as_tensor(KDTree(drawn.numpy()).query_pairs(least, output_type="ndarray"))
        kept = torch.ones(len(drawn), dtype=torch.bool)
        kept[pairs.amax(1)] = False  # the later one of each pair gives way
        places = torch.cat([places, drawn[kept]])[:target]
    return places


def _ridges(across: torch.Tensor, height: float, correlation: float, generator: torch.Generator | None) -> torch.Tensor:
    """Gaussian heights (y, x) [Å] that depend on `across` alone, with the correlation exp(-d^2 / correlation^2)."""
    modes = 64
    waves = torch.randn(modes, generator=generator, dtype=torch.float64) * math.sqrt(2) / correlation  # [rad/Å]
    a, b = torch.randn(2, modes, generator=generator, dtype=torch.float64)
    phase = across[..., None] * waves
    return height / math.sqrt(modes) * (a * torch.cos(phase) + b * torch.sin(phase)).sum(-1)


def _faceted(radius: float, spacing: float, generator: torch.Generator | None) -> torch.Tensor:
    """Sites (site, 3) of a turned lattice within a ball that random planes have cut."""
    n = math.ceil(radius / spacing)
    axis = torch.arange(-n, n + 1, dtype=torch.float64) * spacing
    grid = torch.cartesian_prod(axis, axis, axis)
    grid = grid + spacing * (torch.rand(3, generator=generator, dtype=torch.float64) - 0.5)
    grid = grid[grid.norm(dim=1) <= radius] @ random_rotations(1, generator)[0].T
    planes = torch.randn(_FACETS, 3, generator=generator, dtype=torch.float64)
    planes = planes / planes.norm(dim=1, keepdim=True)
    depths = radius * (0.7 + 0.3 * torch.rand(_FACETS, generator=generator, dtype=torch.float64))
    kept = torch.ones(len(grid), dtype=torch.bool)
    for plane, depth in zip(planes, depths, strict=True):
        kept &= grid @ plane <= depth
    return grid[kept]


def surface_height(ice: Ice, places: torch.Tensor, side: float) -> torch.Tensor:
    """Height |z| (site,) [Å] of the surface of the slab at places (site, 3): side +1 is the one the beam leaves by."""
    flat = torch.full((len(places),), number(ice.thickness) / 2, dtype=torch.float64)
    if ice.relief is None:
        return flat
    heights = ice.relief.heights[1 if side > 0 else 0].double()
    at = torch.stack(
        [
            (2 * (places[:, axis] / ice.relief.spacing + heights.shape[1 - axis] // 2) + 1) / heights.shape[1 - axis]
            - 1
            for axis in (0, 1)
        ],
        -1,
    )
    found = torch.nn.functional.grid_sample(
        heights[None, None], at[None, None], padding_mode="border", align_corners=False
    )
    return flat + found[0, 0, 0]


def _apart_from(lumps: list[torch.Tensor], sites: torch.Tensor, spacing: float) -> torch.Tensor:
    """The sites (site, 3) that do not stand in earlier lumps."""
    earlier = [lump for lump in lumps if len(lump)]
    if not earlier or len(sites) == 0:
        return sites
    near, _ = KDTree(torch.cat(earlier).numpy()).query(sites.numpy(), distance_upper_bound=0.7 * spacing)
    return sites[torch.isinf(torch.as_tensor(near))]


def _positive(name: str, **values: float) -> None:
    wrong = {key: value for key, value in values.items() if not 0 < value < math.inf}
    if wrong:
        raise ValueError(
            f"{name}: expected positive numbers, got {', '.join(f'{key} {value:g}' for key, value in wrong.items())}."
        )


def _check_number(name: str, count: float) -> None:
    if count > _LARGEST:
        raise ValueError(
            f"{name}: {count:.2g} rows are more than {_LARGEST:.0e}. Take a wider spacing, coarse sites or less of it."
        )
