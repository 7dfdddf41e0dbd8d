"""Membranes: lipid bilayers on surfaces, and proteins that stand in them.

A leaflet is a bilayer's profile (`cryosim.specimen.lipids`) laid along the normals of a surface. At the height d there
are (1 + 2 H d + K d^2) times as many atoms as on the surface itself, H and K its mean and Gaussian curvature, so that
their number density is that of a flat bilayer in both leaflets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy.spatial import KDTree

from cryosim.core.rotation import rotation_z
from cryosim.specimen.atoms import Atoms, Poses, concatenate
from cryosim.specimen.filaments import segment_distances
from cryosim.specimen.lipids import ELEMENTS, POPC, Lipid, centres, composition, half_thickness
from cryosim.specimen.surfaces import Surface, SurfacePoints, area, elements, equal_area, geometry, points_on

_LARGEST = 50_000_000  # sites of a membrane
_WANDER = 0.25  # of a site from its lipid, along the membrane [spacing]
_LAYERS = 3  # of sites in the core of a leaflet


def membrane(
    surface: Surface,
    *,
    lipid: Lipid = POPC,
    spacing: float | None = None,
    generator: torch.Generator | None = None,
) -> Atoms:
    """Lipid bilayer whose middle is a surface, as sites: each row of atoms stands for all atoms of an element there.

    Parameters
    ----------
    surface : Surface
    lipid : Lipid
    spacing : float, optional
        Of the columns of sites along each leaflet [Å]; one a lipid when left out (8 Å). A column has 16 rows: a vesicle
        of radius 300 Å has 5.6e5. Beyond 10 Å the columns can be told apart in images; below, density grows smoother
        than that of real lipids.
    generator : torch.Generator, optional

    Returns
    -------
    Atoms
        Centred on the origin of the surface. Sites are Gaussians of 2.4 Å; the order of the chains (a ring at 4.5 Å) is
        not in this model.

    Raises
    ------
    ValueError
        When the spacing is not positive, the surface bends more tightly than half the bilayer, or would need more than
        5e7 sites.
    """
    spacing = math.sqrt(lipid.area) if spacing is None else spacing
    _positive("membrane: spacing", spacing)
    whole = area(surface)
    n = max(1, round(whole / spacing**2))
    if n * 2 * 16 > _LARGEST:
        raise ValueError(
            f"membrane: {whole:.3g} Å^2 at a spacing of {spacing:g} Å need {n * 32:.2g} sites, more than "
            f"{_LARGEST:.0e}. Take a wider spacing or a smaller surface."
        )
    leaflets = []
    for side in (1, -1):
        places = points_on(surface, n, generator=generator)
        _check_curvature(places, side * half_thickness(lipid))
        leaflets += _leaflet(places, side, lipid, spacing, generator)
    return concatenate(leaflets)


def _leaflet(
    places: SurfacePoints, side: int, lipid: Lipid, spacing: float, generator: torch.Generator | None
) -> list[Atoms]:
    """Sites of one leaflet, outwards (+1) or inwards (-1)."""
    n = len(places.positions)
    parts = []
    for group in lipid.heads:
        wander = math.sqrt(group.width**2 - lipid.blur**2)
        heights = group.height + wander * torch.randn(n, generator=generator, dtype=torch.float64)
        amounts = torch.tensor(group.counts, dtype=torch.float64)[:, None].expand(-1, n) / lipid.area
        parts.append((heights, amounts))
    depth = lipid.core / _LAYERS
    layers = torch.arange(_LAYERS, dtype=torch.float64)[:, None]
    heights = (layers + torch.rand(_LAYERS, n, generator=generator, dtype=torch.float64)) * depth
    amounts = centres(lipid, heights) * depth  # (element, layer, site) [1/Å^2]
    heads = torch.tensor([g.counts for g in lipid.heads], dtype=torch.float64).sum(0)
    wanted = (composition(lipid) - heads) / lipid.area
    found = amounts.sum(1).mean(1)
    amounts = amounts * torch.where(found > 0, wanted / found.clamp_min(1e-30), 0.0)[:, None, None]
    parts += [(heights[i], amounts[:, i]) for i in range(_LAYERS)]
    return [_sites(places, side * h, a, lipid, _WANDER * spacing, generator) for h, a in parts]


def _sites(
    places: SurfacePoints,
    heights: torch.Tensor,
    amounts: torch.Tensor,
    lipid: Lipid,
    wander: float,
    generator: torch.Generator | None,
) -> Atoms:
    """Sites at `heights` (point,) [Å] along the normals, standing for `amounts` (element, point) of atoms [1/Å^2]."""
    x, n = places.positions, places.normals
    step = wander * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    step = step - (step * n).sum(1, keepdim=True) * n  # along the surface, which falls away from its tangent plane
    fall = 0.5 * step.square().sum(1) * places.mean_curvatures
    positions = x + step + (heights - fall)[:, None] * n
    stretch = 1 + 2 * places.mean_curvatures * heights + places.gaussian_curvatures * heights**2
    occupancies = amounts * (places.areas * stretch)
    present = [i for i in range(len(ELEMENTS)) if bool((amounts[i] != 0).any())]
    count = len(present) * len(x)
    return Atoms(
        positions.repeat(len(present), 1),
        torch.tensor([ELEMENTS[i] for i in present]).repeat_interleave(len(x)),
        torch.full((count,), 8 * math.pi**2 * lipid.blur**2, dtype=torch.float64),
        occupancies[present].flatten(),
    )


def _check_curvature(places: SurfacePoints, reach: float) -> None:
    """Refuse a surface whose radius of curvature, on the side of the height `reach` [Å], is less than that height."""
    h, k = places.mean_curvatures, places.gaussian_curvatures
    split = (h**2 - k).clamp_min(0).sqrt()
    tight = torch.minimum((h - split) * math.copysign(1, reach), (h + split) * math.copysign(1, reach)).min()
    if 1 + float(tight) * abs(reach) <= 0:
        raise ValueError(
            f"membrane: expected radii of curvature above {abs(reach):.0f} Å, half the bilayer, got "
            f"{-1 / float(tight):.0f} Å at one place. Take a larger or a smoother surface."
        )


# proteins in membranes ------------------------------------------------------------------------------------------------


def embed(
    surface: Surface,
    molecule: Atoms,
    copies: int,
    *,
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0),
    height: float = 0.0,
    gap: float = 5.0,
    beside: Sequence[tuple[Atoms, Poses]] = (),
    tries: int = 20000,
    generator: torch.Generator | None = None,
) -> Poses:
    """Copies of a molecule at random places on a surface, upright, that do not overlap.

    Each copy is held to be a cylinder about its axis, which stands along the normal.

    Parameters
    ----------
    surface : Surface
    molecule : Atoms
        About its own origin.
    copies : int
    axis : (float, float, float)
        Of the molecule, to be put along the outward normal.
    height : float
        Of the origin of the molecule above the surface, along the outward normal [Å].
    gap : float
        Least distance of two cylinders [Å].
    beside : sequence of (Atoms, Poses)
        What stands in the membrane already, with the same `axis`.
    tries : int
        Trials for a copy before giving up.
    generator : torch.Generator, optional

    Returns
    -------
    Poses
        In the frame of the surface.

    Raises
    ------
    ValueError
        When the axis has no length, there are no atoms, or the copies do not fit.
    """
    upright = _turned_to_z(axis)
    kinds = [(molecule, None), *beside]
    if not all(len(atoms) for atoms, _ in kinds):
        raise ValueError("embed: expected molecules with atoms, got one without.")
    ends, radii = zip(*(_cylinder(atoms.positions.double() @ upright.T) for atoms, _ in kinds), strict=True)
    taken = [torch.zeros(0, 2, 3, dtype=torch.float64)]
    taken_radii = [torch.zeros(0, dtype=torch.float64)]
    for (_, poses), span, radius in zip(kinds[1:], ends[1:], radii[1:], strict=True):
        assert poses is not None
        along = poses.rotations.double() @ upright.T[:, 2]
        taken.append(poses.positions.double()[:, None] + span[:, None] * along[:, None])
        taken_radii.append(torch.full((len(along),), radius, dtype=torch.float64))
    axes, sizes = torch.cat(taken), torch.cat(taken_radii)  # (copy, end, 3), (copy,) [Å]
    mapped = equal_area(elements(surface))
    rotations, positions = [], []
    tried = 0
    drawn, at = _drawn(surface, mapped, generator), 0
    while len(positions) < copies:
        if tried == tries:
            raise ValueError(
                f"embed: copy {len(positions) + 1} of {copies} (radius {radii[0]:.0f} Å) found no free place on the "
                "surface. Take a larger one or fewer copies."
            )
        if at == len(drawn.positions):
            drawn, at = _drawn(surface, mapped, generator), 0
        here, normal = drawn.positions[at], drawn.normals[at]
        here, at, tried = here + height * normal, at + 1, tried + 1
        mine = here + ends[0][:, None] * normal
        apart = segment_distances(mine[None, 0], mine[None, 1], axes[:, 0], axes[:, 1])[0]
        if not bool((apart >= sizes + radii[0] + gap).all()):
            continue
        turn = 360 * torch.rand((), generator=generator, dtype=torch.float64)
        rotations.append(_turned_to_z(normal.tolist()).T @ rotation_z(turn) @ upright)
        positions.append(here)
        axes, sizes = torch.cat([axes, mine[None]]), torch.cat([sizes, sizes.new_tensor([radii[0]])])
        tried = 0
    if not positions:
        return Poses(torch.zeros(0, 3, 3, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64))
    return Poses(torch.stack(rotations), torch.stack(positions))


def cleared(membrane: Atoms, molecule: Atoms, poses: Poses, *, distance: float = 3.0) -> Atoms:
    """The membrane without the sites that lie in a molecule's way.

    Parameters
    ----------
    membrane : Atoms
    molecule : Atoms
    poses : Poses
        In the frame of the membrane.
    distance : float
        From an atom of the molecule, within which there is no lipid [Å].

    Raises
    ------
    ValueError
        When the distance is not positive.
    """
    _positive("cleared: distance", distance)
    if len(molecule) == 0 or len(membrane) == 0:
        return membrane
    sites = membrane.positions.double()
    near, tree = KDTree(sites.numpy()), KDTree(molecule.positions.double().numpy())
    reach = float(molecule.positions.norm(dim=1).max()) + distance
    kept = torch.ones(len(membrane), dtype=torch.bool)
    for rotation, position in zip(poses.rotations.double(), poses.positions.double(), strict=True):
        which = torch.as_tensor(near.query_ball_point(position.numpy(), reach), dtype=torch.long)
        own = (sites[which] - position) @ rotation  # in the frame of the molecule
        apart, _ = tree.query(own.numpy(), distance_upper_bound=distance)
        kept[which[torch.as_tensor(apart) < distance]] = False
    return membrane.index(kept)


def _drawn(surface: Surface, mapped: Callable, generator: torch.Generator | None) -> SurfacePoints:
    return geometry(surface, mapped(torch.rand(256, 2, generator=generator, dtype=torch.float64)))


def _cylinder(positions: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Lowest and highest z (2,) and radius [Å] about the z axis of atoms (atom, 3)."""
    return torch.stack([positions[:, 2].min(), positions[:, 2].max()]), float(positions[:, :2].norm(dim=1).max())


def _turned_to_z(axis: Sequence[float]) -> torch.Tensor:
    """Rotation (3, 3) that puts a direction along z by the shortest way."""
    a = torch.tensor(list(axis), dtype=torch.float64)
    if not float(a.norm()) > 0:
        raise ValueError(f"embed: expected an axis with a length, got {tuple(axis)}.")
    x, y, z = (a / a.norm()).tolist()
    if z < -1 + 1e-12:
        return torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    k = 1 / (1 + z)
    rows = [[1 - k * x * x, -k * x * y, -x], [-k * x * y, 1 - k * y * y, -y], [x, y, z]]
    return torch.tensor(rows, dtype=torch.float64)


def _positive(name: str, *values: float) -> None:
    if not all(value > 0 for value in values):
        raise ValueError(f"{name}: expected positive numbers, got {', '.join(f'{value:g}' for value in values)}.")
