"""Filaments: subunits along a helix, straight or bent as heat bends a rod, several of them side by side.

Subunit i of a helix is the first one turned by i * twist about z, right-handed, and moved by i * rise along z: a
positive twist is a right-handed helix. Bent, the axis becomes a worm-like chain (Kratky & Porod 1949,
doi:10.1002/recl.19490681203): the direction t of a centre line of persistence length P forgets itself as

    <t(s) . t(s')> = exp(-|s - s'| / P),     <R^2> = 2 P L (1 - (P / L) (1 - exp(-L / P)))

The frames along it do not turn about the line (Bishop 1975, doi:10.2307/2319846), so bending adds no twist.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from cryosim.core.rotation import rotation_z
from cryosim.specimen.atoms import Poses


class Helix(NamedTuple):
    """Symmetry and stiffness of a filament.

    Attributes
    ----------
    rise : float
        From one subunit to the next along the axis [Å].
    twist : float
        About it [deg]; positive is right-handed.
    cyclic : int
        Order of the rotational symmetry about the axis: that many subunits stand at every height.
    persistence : float
        Length [Å]; infinity is straight.
    """

    rise: float
    twist: float
    cyclic: int = 1
    persistence: float = math.inf


ACTIN = Helix(27.6, -166.6, 1, 9e4)
"""F-actin: rise and twist of the one-start, left-handed helix of Oda et al. 2009, doi:10.1038/nature07685 (-166.4 to
-166.7 deg are in use); persistence length 9 um, without phalloidin (Isambert et al. 1995, doi:10.1074/jbc.270.19.11437;
with it 17.7 um, Gittes et al. 1993, doi:10.1083/jcb.120.4.923)."""

MICROTUBULE_PERSISTENCE = 5.2e7
"""Of microtubules [Å], 5200 um: Gittes et al. 1993, doi:10.1083/jcb.120.4.923."""


class CentreLine(NamedTuple):
    """Curve made of short arcs, by arc length s from -length / 2 to length / 2; passes the origin along z at s = 0.

    Attributes
    ----------
    step : float
        Length of an arc [Å].
    points : tensor (arc, 3)
        Where each begins [Å].
    frames : tensor (arc, 3, 3)
        There; columns are the two normals and the direction.
    bends : tensor (arc, 2)
        Rotation per length about the two normals [rad/Å].
    """

    step: float
    points: torch.Tensor
    frames: torch.Tensor
    bends: torch.Tensor

    @property
    def length(self) -> float:
        """[Å]."""
        return self.step * len(self.points)


def helix(symmetry: Helix, *, n: int | None = None, length: float | None = None) -> Poses:
    """Straight filament along z, its middle at the origin.

    Parameters
    ----------
    symmetry : Helix
    n : int, optional
        Steps along the axis, each of `cyclic` subunits.
    length : float, optional
        Of the filament instead of n [Å]: as many steps as fit, each taking one rise.

    Returns
    -------
    Poses
        Of a monomer given in its helical frame: axis z through the origin. All of one instance.

    Raises
    ------
    ValueError
        When not exactly one of n and length is given, or a number is out of bounds.
    """
    _check_helix(symmetry)
    if (n is None) == (length is None):
        raise ValueError(f"helix: expected either n or length, got n={n} and length={length}.")
    count = n if n is not None else math.floor(float(length or 0) / abs(symmetry.rise) + 1e-9)
    if count < 1:
        raise ValueError(f"helix: expected at least one subunit, got n={n}, length={length}, rise {symmetry.rise:g}.")
    steps = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    around = 360.0 / symmetry.cyclic * torch.arange(symmetry.cyclic, dtype=torch.float64)
    angles = ((steps + (count - 1) / 2) * symmetry.twist)[:, None] + around
    heights = (steps * symmetry.rise)[:, None].expand_as(angles)
    return _about_z(angles.flatten(), heights.flatten())


def microtubule(length: float, *, protofilaments: int = 13, starts: int = 3, dimer: float = 82.0) -> Poses:
    """Straight microtubule along z, its middle at the origin: the B lattice, with its seam.

    Protofilaments stand side by side, each `starts` / `protofilaments` of a monomer above the one before, on a
    left-handed helix; the last and the first meet with a dimer and a half between them, which is the seam (Mandelkow
    et al. 1986, doi:10.1083/jcb.102.3.1067; Zhang et al. 2015, doi:10.1016/j.cell.2015.07.012).

    Parameters
    ----------
    length : float
        [Å].
    protofilaments, starts : int
        13 and 3 in cells: protofilaments then run straight.
    dimer : float
        Repeat along a protofilament [Å]; 82 with GDP, 83 to 84 with GMPCPP (Zhang et al. 2015).

    Returns
    -------
    Poses
        Of a dimer given about the axis z of the microtubule, some 110 Å from it. All of one instance.

    Raises
    ------
    ValueError
        When the length holds no dimer or a number is not positive.
    """
    if not (dimer > 0 and protofilaments >= 1 and starts >= 0 and length >= dimer):
        raise ValueError(
            "microtubule: expected a length of at least one dimer and positive numbers, got length "
            f"{length:g}, dimer {dimer:g}, {protofilaments} protofilaments, {starts} starts."
        )
    count = math.floor(length / dimer + 1e-9)
    which = torch.arange(protofilaments, dtype=torch.float64)
    aside = starts * dimer / 2 / protofilaments  # [Å] from one protofilament to the next
    offsets = torch.remainder(which * aside + dimer / 2, dimer) - dimer / 2  # the same lattice, with even ends
    steps = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * dimer
    heights = steps[:, None] + offsets
    angles = (-360.0 / protofilaments * which).expand_as(heights)
    return _about_z(angles.flatten(), heights.flatten())


def worm_like_chain(
    length: float, persistence: float, *, step: float = 20.0, generator: torch.Generator | None = None
) -> CentreLine:
    """Random centre line: arcs whose bends are independent, of variance 1 / (step persistence) about each normal.

    Parameters
    ----------
    length : float
        Along the curve [Å].
    persistence : float
        Length [Å]; infinity is straight.
    step : float
        Longest arc [Å].
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When a number is not positive, or an arc is longer than a tenth of the persistence length.
    """
    if not (0 < length < math.inf and persistence > 0 and step > 0):
        raise ValueError(
            f"worm_like_chain: expected positive lengths [Å], got length {length}, persistence {persistence} and step "
            f"{step}."
        )
    count = 2 * math.ceil(length / step / 2)
    step = length / count
    if step > persistence / 10:
        raise ValueError(
            "worm_like_chain: expected steps of at most a tenth of the persistence length, "
            f"{persistence / 10:g} Å, got {step:g} Å."
        )
    draws = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    bends = draws / math.sqrt(step * persistence)
    frame, point = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    frames, points = [frame], [point]
    turns, moves = _arc(bends, torch.full((count,), step, dtype=torch.float64))
    for turn, move in zip(turns, moves, strict=True):
        point = point + frame @ move
        frame = frame @ turn
        frames.append(frame)
        points.append(point)
    middle_frame, middle = frames[count // 2], points[count // 2]
    placed = (torch.stack(points[:-1]) - middle) @ middle_frame
    return CentreLine(step, placed, middle_frame.T @ torch.stack(frames[:-1]), bends)


def along(line: CentreLine, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (point, 3) [Å] and frames (point, 3, 3) of a centre line at arc lengths s (point,) [Å] from its middle.

    Beyond its ends the line goes on as its last arcs do.
    """
    place = s.double() + line.length / 2
    arc = (place / line.step).floor().long().clamp(0, len(line.points) - 1)
    turn, move = _arc(line.bends[arc], place - arc.double() * line.step)
    frame = line.frames[arc]
    return line.points[arc] + (frame @ move[:, :, None])[:, :, 0], frame @ turn


def bent(straight: Poses, line: CentreLine) -> Poses:
    """A straight filament along z, laid on a centre line: each subunit goes with the frame at its height."""
    x, y, z = straight.positions.double().unbind(1)
    points, frames = along(line, z)
    sideways = torch.stack([x, y, torch.zeros_like(x)], -1)
    positions = points + (frames @ sideways[:, :, None])[:, :, 0]
    return straight.replace(rotations=frames @ straight.rotations.double(), positions=positions)


def filament(
    straight: Poses,
    *,
    persistence: float = math.inf,
    direction: tuple[float, float, float] = (0.0, 0.0, 1.0),
    position: tuple[float, float, float] = (0.0, 0.0, 0.0),
    instance: int = 0,
    step: float = 20.0,
    generator: torch.Generator | None = None,
) -> Poses:
    """One filament at a place, bent at random and turned at random about itself.

    Parameters
    ----------
    straight : Poses
        Along z, as from `helix` or `microtubule`.
    persistence : float
        Length [Å]; infinity is straight.
    direction, position : (float, float, float)
        Of its middle; [Å].
    instance : int
        Number that all its subunits have.
    step : float
        As in `worm_like_chain`.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When the direction has no length; as `worm_like_chain`.
    """
    return _laid(straight, _line_of(straight, persistence, step, generator), direction, position, instance, generator)


def place_filaments(
    straight: Poses,
    copies: int,
    size: tuple[float, float, float],
    *,
    radius: float,
    persistence: float = math.inf,
    gap: float = 10.0,
    crossing: bool = False,
    step: float = 20.0,
    tries: int = 2000,
    generator: torch.Generator | None = None,
) -> Poses:
    """Several filaments in a box that do not overlap: chains of capsules of a radius, at random places and directions.

    Parameters
    ----------
    straight : Poses
        Along z, as from `helix` or `microtubule`.
    copies : int
    size : (float, float, float)
        (x, y, z) [Å] of the box about the origin.
    radius : float
        From the centre line to the outermost atom [Å].
    persistence : float
        Length [Å]; infinity is straight.
    gap : float
        Least distance of two filaments [Å].
    crossing : bool
        Whether filaments may cross the sides of the box in x and y; subunits whose centres lie outside are left out.
    step : float
        As in `worm_like_chain`.
    tries : int
        Trials for a filament before giving up.
    generator : torch.Generator, optional

    Returns
    -------
    Poses
        Instances 0, 1, ... tell the filaments apart. Directions are uniform on the sphere among those that the depth of
        the box lets through.

    Raises
    ------
    ValueError
        When the filaments do not fit, or a number is out of bounds.
    """
    if not (radius > 0 and gap >= 0 and copies >= 0 and len(straight.positions)):
        raise ValueError(
            f"place_filaments: expected subunits, a positive radius, a gap and copies of 0 or more, got "
            f"{len(straight.positions)}, {radius}, {gap} and {copies}."
        )
    half = torch.tensor(size, dtype=torch.float64) / 2
    room = half - radius
    length = float(straight.positions[:, 2].max() - straight.positions[:, 2].min())
    steepest = min(1.0, max(0.0, 2 * float(room[2]) / length)) if length > 0 else 1.0
    limit = torch.tensor([math.inf, math.inf, float(room[2])]) if crossing else room
    starts = ends = torch.zeros(0, 3, dtype=torch.float64)
    placed: list[Poses] = []
    for copy in range(copies):
        line = _line_of(straight, persistence, step, generator)
        for attempt in range(tries if bool((room > 0).all()) else 0):
            if attempt % 20 == 19:
                line = _line_of(straight, persistence, step, generator)
            u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            rise, azimuth = steepest * (2 * u - 1), 2 * math.pi * v
            flat = math.sqrt(1 - rise**2)
            direction = (flat * math.cos(azimuth), flat * math.sin(azimuth), rise)
            middle = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * (half if crossing else room)
            nodes = _nodes(straight, line, direction, middle)
            if bool((nodes.abs() > limit).any()):
                continue
            apart = segment_distances(nodes[:-1], nodes[1:], starts, ends)
            if not bool((apart >= 2 * radius + gap).all()):
                continue
            break
        else:
            raise ValueError(
                f"place_filaments: filament {copy + 1} of {copies}, {length:.0f} Å long and {2 * radius:.0f} Å wide, "
                f"found no free place in {tuple(size)} Å. Enlarge size, or take fewer, shorter or crossing filaments."
            )
        starts, ends = torch.cat([starts, nodes[:-1]]), torch.cat([ends, nodes[1:]])
        placed.append(_laid(straight, line, direction, middle.tolist(), copy, generator))
    if not placed:
        return straight.index(slice(0, 0))
    together = Poses(*(torch.cat([getattr(p, f) for p in placed]) for f in ("rotations", "positions", "instances")))
    return together.index((together.positions.abs() <= half).all(1)) if crossing else together


def segment_distances(
    starts: torch.Tensor, ends: torch.Tensor, other_starts: torch.Tensor, other_ends: torch.Tensor
) -> torch.Tensor:
    """Least distances (n, m) [Å] of n line segments from m others.

    Parameters
    ----------
    starts, ends : tensor (n, 3)
        [Å].
    other_starts, other_ends : tensor (m, 3)
        [Å].

    Notes
    -----
    The nearest two points lie inside both segments, or one of them is an end (Ericson 2005, Real-Time Collision
    Detection, section 5.1.9): the least of the inner solution, where there is one, and of four ends is taken.
    """
    p, q = starts[:, None], other_starts[None]
    d, e = (ends - starts)[:, None], (other_ends - other_starts)[None]
    least = torch.minimum(
        torch.minimum(_from_segment(q, p, d), _from_segment(q + e, p, d)),
        torch.minimum(_from_segment(p, q, e), _from_segment(p + d, q, e)),
    )
    r = p - q
    dd, ee, de = (d * d).sum(-1), (e * e).sum(-1), (d * e).sum(-1)
    dr, er = (d * r).sum(-1), (e * r).sum(-1)
    determinant = dd * ee - de**2
    crossed = determinant > 1e-12 * (dd * ee).clamp_min(1e-300)
    safe = torch.where(crossed, determinant, 1.0)
    s, t = (de * er - ee * dr) / safe, (dd * er - de * dr) / safe
    within = crossed & (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)
    apart = (r + s[..., None] * d - t[..., None] * e).norm(dim=-1)
    return torch.where(within, torch.minimum(apart, least), least)


def _from_segment(point: torch.Tensor, start: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    share = ((point - start) * way).sum(-1) / (way * way).sum(-1).clamp_min(1e-300)
    return (point - start - share.clamp(0, 1)[..., None] * way).norm(dim=-1)


def _check_helix(symmetry: Helix) -> None:
    if not (symmetry.rise > 0 and symmetry.cyclic >= 1 and math.isfinite(symmetry.twist) and symmetry.persistence > 0):
        raise ValueError(
            "helix: expected a positive rise and persistence, a finite twist and a cyclic order of 1 or more, got "
            f"{symmetry}. A left-handed helix has a negative twist."
        )


def _about_z(angles: torch.Tensor, heights: torch.Tensor) -> Poses:
    """Copies (copy,) turned by `angles` [deg] about z and moved by `heights` [Å] along it, one instance."""
    nothing = torch.zeros_like(heights)
    instances = torch.zeros(len(heights), dtype=torch.long)
    return Poses(rotation_z(angles), torch.stack([nothing, nothing, heights], -1), instances)


def _arc(bends: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation (n, 3, 3) and way (n, 3) [Å] along arcs of bends (n, 2) [rad/Å] after lengths s (n,) [Å]."""
    bend = bends.norm(dim=1)
    angle = bend * s
    half = torch.sinc(angle / (2 * torch.pi))  # sin(angle / 2) / (angle / 2)
    sine, versine = s * torch.sinc(angle / torch.pi), 0.5 * s**2 * half**2  # sin / bend, (1 - cos) / bend^2
    b1, b2 = bends.unbind(1)
    t = 1 - versine * bend**2
    rows = [
        [1 - versine * b2**2, versine * b1 * b2, sine * b2],
        [versine * b1 * b2, 1 - versine * b1**2, -sine * b1],
        [-sine * b2, sine * b1, t],
    ]  # exp of the rotation vector (b1, b2, 0) s
    turn = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return turn, torch.stack([versine * b2, -versine * b1, sine], -1)


def _line_of(straight: Poses, persistence: float, step: float, generator: torch.Generator | None) -> CentreLine:
    z = straight.positions[:, 2]
    length = 2 * float(z.abs().max()) + 1.0 if len(z) else 1.0
    return worm_like_chain(length, persistence, step=step, generator=generator)


def _towards(direction: tuple[float, float, float]) -> torch.Tensor:
    """Some rotation (3, 3) that puts z along a direction."""
    way = torch.tensor(direction, dtype=torch.float64)
    if not float(way.norm()) > 0:
        raise ValueError(f"filament: expected a direction with a length, got {direction}.")
    way = way / way.norm()
    across = torch.linalg.cross(torch.eye(3, dtype=torch.float64)[int(way.abs().argmin())], way)
    across = across / across.norm()
    return torch.stack([across, torch.linalg.cross(way, across), way], 1)


def _nodes(
    straight: Poses, line: CentreLine, direction: tuple[float, float, float], middle: torch.Tensor
) -> torch.Tensor:
    """Points (node, 3) [Å] of a placed centre line, at most 100 Å apart; their polygon follows it within 1 Å."""
    z = straight.positions[:, 2]
    low, high = float(z.min()), float(z.max())
    s = torch.linspace(low, high, max(2, math.ceil((high - low) / 100) + 1), dtype=torch.float64)
    return along(line, s)[0] @ _towards(direction).T + middle


def _laid(
    straight: Poses,
    line: CentreLine,
    direction: tuple[float, float, float],
    position: tuple[float, float, float] | list[float],
    instance: int,
    generator: torch.Generator | None,
) -> Poses:
    spin = rotation_z(360 * torch.rand((), generator=generator, dtype=torch.float64))
    turned = straight.replace(
        rotations=spin @ straight.rotations.double(), positions=straight.positions.double() @ spin.T
    )
    on = bent(turned, line)
    turn = _towards(direction)
    return Poses(
        turn @ on.rotations,
        on.positions @ turn.T + torch.tensor(list(position), dtype=torch.float64),
        torch.full((len(on.positions),), instance, dtype=torch.long),
    )
