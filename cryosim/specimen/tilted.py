"""Slices of a specimen as it is seen at one tilt, after some electrons."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from cryosim.core.fourier import number
from cryosim.core.inelastic import absorption_potential, mean_free_path
from cryosim.core.record import differentiated, hidden
from cryosim.core.rotation import tilt_rotation
from cryosim.specimen.atoms import Atoms, Poses
from cryosim.specimen.damage import fading_of, water_decay
from cryosim.specimen.ice import ImmersedSlices, reach_of, surfaces
from cryosim.specimen.moment import Moment
from cryosim.specimen.motion import displaced, drift_at
from cryosim.specimen.portions import Copies, Portion, bodies, portions, slices_of, volumes_of
from cryosim.specimen.potential import SliceGrid, Slices, SummedSlices
from cryosim.specimen.scattering_factors import Parametrization
from cryosim.specimen.specimen import Specimen
from cryosim.specimen.water import WaterField


def tilted_slices(
    specimen: Specimen,
    angle: float | torch.Tensor,
    shape: tuple[int, int],
    pixel_size: float | torch.Tensor,
    thickness: float | torch.Tensor,
    *,
    axis_angle: float | torch.Tensor = 0.0,
    shift: torch.Tensor | None = None,
    parametrization: Parametrization = "lobato",
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    copies: Copies = "atoms",
    voltage: float | torch.Tensor | None = None,
    moment: Moment | Sequence[Moment] | None = None,
) -> ImmersedSlices:
    """Slices of a specimen turned by R_z(axis_angle) R_y(angle) and displaced in the image plane.

    Parameters
    ----------
    specimen : Specimen
    angle, axis_angle : float or tensor ()
        [deg].
    shape : (int, int)
        (y, x) of the simulated field [px]; atoms beyond it are left out.
    pixel_size, thickness : float or tensor ()
        [Å].
    shift : tensor (2,), optional
        (x, y) displacement of the content [Å].
    parametrization, width, dtype
        As in `potential_slices`.
    copies : {"atoms", "reference"}
        How copies of a molecule are placed: atom by atom, or, where that takes less time, by the points of a reference
        (`cryosim.specimen.references`): of many copies at pixels beyond 5 Å, with an error of about 1e-3. A
        reference has no gradient in its atoms; where one is asked for they are taken.
    voltage : float or tensor (), optional
        [kV]; needed where the specimen has an absorption or damage, which depend on it.
    moment : Moment or sequence of Moment, optional
        Which frame of which exposure, after how many electrons: damage and motion go by it, and the fluctuations of the
        ice. When left out, the specimen is fresh and stands still. Several frames of a specimen that stands still
        make slices (frame, y, x) for little more work than one.

    Returns
    -------
    ImmersedSlices
        As many slices about z = 0 as the atoms reach, and the ice where it has relief or structure; together they hold
        a column of ice of thickness / cos(angle).

    Raises
    ------
    ValueError
        When a slice is thicker than the specimen, the angle reaches 90 degrees, the voltage is missing, or a gradient
        in pixel_size or thickness is asked of structured ice.
    """
    if not hidden() and not abs(number(angle)) < 90:
        raise ValueError(f"tilted_slices: expected an angle between -90 and 90 [deg], got {number(angle):g}.")
    depth = max(specimen.size[2], number(specimen.ice.thickness) if specimen.ice else 0.0)
    if number(thickness) > depth:
        raise ValueError(
            f"tilted_slices: slices of {number(thickness):g} Å are thicker than the specimen, {depth:g} Å. Take "
            "thinner ones; 2 to 10 Å are usual."
        )
    structured = specimen.ice is not None and specimen.ice.structure == "water"
    if structured and (differentiated(pixel_size) or differentiated(thickness)):
        raise ValueError(
            "tilted_slices: the fluctuations of structured ice have no gradient in pixel_size or thickness; give "
            "them as numbers, or take Ice(structure='constant')."
        )
    moments = [Moment()] if moment is None else [moment] if isinstance(moment, Moment) else list(moment)
    if len(moments) != 1 and (not moments or structured or specimen.motion is not None):
        raise ValueError(
            "tilted_slices: expected one moment, or several of a specimen without motion in ice without structure, got "
            f"{len(moments)}. Ask for one at a time."
        )
    ice, motion = specimen.ice, None if moment is None else specimen.motion
    drift = drift_at(motion, moments[0])
    shift = _whole_shift(shift, drift)
    molecules, poses = bodies(specimen.molecules, specimen.poses)
    turn = tilt_rotation(angle, axis_angle)
    poses = [_turned(displaced(p, motion, moments[0]), turn, shift) for p in poses]
    device = molecules[0].positions.device
    seen = None
    if ice is not None and (structured or ice.relief is not None):
        seen = surfaces(ice, angle, axis_angle, shift, shape, pixel_size, device)
    half = torch.tensor([0.5 * n * number(pixel_size) for n in (shape[1], shape[0])], dtype=torch.float64)
    reach = max(reach_of(ice, seen), highest(molecules, poses, half))
    n_slices = 2 * math.ceil(reach / number(thickness)) + 1  # all lies within the centres
    grid = SliceGrid(shape, pixel_size, thickness, n_slices, width, dtype)
    potential = torch.as_tensor(ice.inner_potential if ice else 0.0, dtype=torch.float64)
    parts = portions(specimen.damage, molecules, poses)
    fadings = [fading_of(specimen.damage, moments, voltage, part.which) for part in parts]
    solvent = ice.inner_potential if ice else 0.0
    both = list(zip(parts, fadings, strict=True))
    sources = [slices_of(part, grid, copies, fading, parametrization, solvent) for part, fading in both]
    volumes = []
    if structured or specimen.absorption is not None:
        volumes = [volumes_of(part, grid, copies, fading) for part, fading in both]
    cosine = torch.cos(torch.deg2rad(torch.as_tensor(angle, dtype=torch.float64)))
    return ImmersedSlices(
        sources[0] if len(sources) == 1 else SummedSlices(tuple(sources)) if sources else _nothing(grid, device),
        potential,
        (ice.thickness if ice else 0.0) / cosine,
        tuple(volumes),
        None if specimen.absorption is None else _imaginary_potentials(specimen, parts, voltage),
        seen,
        _water(specimen, moments[0], voltage, parametrization, grid, device) if structured else None,
        drift[:2] if structured and drift is not None else None,
        tuple(part.in_ice for part in parts) if volumes else (),
    )


def _whole_shift(shift: torch.Tensor | None, drift: torch.Tensor | None) -> torch.Tensor | None:
    """Displacement (3,) [Å] in the frame of the microscope, of a shift (2,) and a drift (3,)."""
    if shift is None:
        return drift
    shift = torch.cat([shift, shift.new_zeros(1)])
    return shift if drift is None else shift + drift.to(shift.device)


def _turned(poses: Poses, turn: torch.Tensor, shift: torch.Tensor | None) -> Poses:
    """Poses in the frame of the microscope."""
    positions, turn = poses.positions.double(), turn.double().to(poses.positions.device)
    moved = positions @ turn.T
    return Poses(turn @ poses.rotations.double(), moved if shift is None else moved + shift.to(moved))


def highest(molecules: Sequence[Atoms], poses: Sequence[Poses], half: torch.Tensor) -> float:
    """Largest height |z| [Å] of an atom within +-`half` (x, y) [Å] of the origin; 0 where there is none."""
    found = 0.0
    for atoms, places in zip(molecules, poses, strict=True):
        if len(atoms) == 0 or len(places.positions) == 0:
            continue
        points, rotations, origins = (
            x.detach().double() for x in (atoms.positions, places.rotations, places.positions)
        )
        radius = float(points.norm(dim=1).max())
        most = origins[:, 2].abs() + radius
        near = (origins[:, :2].abs() <= half.to(origins) + radius).all(1)
        for i in torch.argsort(most, descending=True).tolist():
            if float(most[i]) <= found:
                break
            if not bool(near[i]):
                continue
            here = points @ rotations[i].T + origins[i]
            inside = (here[:, :2].abs() <= half.to(here)).all(1)
            found = max(found, float((here[:, 2].abs() * inside).max()))
    return found


def _nothing(grid: SliceGrid, device: torch.device) -> Slices:
    blank = torch.zeros(1, 1, 1, dtype=grid.dtype, device=device)
    return Slices(blank.expand(grid.n_slices, *grid.shape), grid.pixel_size, grid.thickness)


def _water(
    specimen: Specimen,
    moment: Moment,
    voltage: float | torch.Tensor | None,
    parametrization: Parametrization,
    grid: SliceGrid,
    device: torch.device,
) -> WaterField:
    """Fluctuations of the ice at a moment: those of two exposures are independent, those of two frames alike."""
    assert specimen.ice is not None
    digest = hashlib.blake2b(f"{specimen.ice.seed} {moment.tilt}".encode(), digest_size=8).digest()
    decay = 0.0 if specimen.damage is None else water_decay(specimen.damage, voltage) * number(moment.during)
    return WaterField(
        grid.shape,
        number(grid.pixel_size),
        number(grid.thickness),
        seed=int.from_bytes(digest, "big") >> 1,
        parametrization=parametrization,
        frame=moment.frame,
        decay=decay,
        dtype=grid.dtype,
        device=device,
    )


def _imaginary_potentials(
    specimen: Specimen, parts: Sequence[Portion], voltage: float | torch.Tensor | None
) -> torch.Tensor:
    """Of the ice (0 in vacuum) and of every portion (1 + portion,) [V]."""
    if voltage is None:
        raise ValueError("tilted_slices: expected the voltage [kV], as the specimen has an absorption; give voltage=.")
    assert specimen.absorption is not None
    paths = [specimen.absorption.medium, *(part.mean_free_path(specimen.absorption.molecules) for part in parts)]
    potentials = [
        torch.as_tensor(
            absorption_potential(mean_free_path(torch.as_tensor(path, dtype=torch.float64), voltage), voltage)
        )
        for path in paths
    ]
    return torch.stack([potentials[0] if specimen.ice else torch.zeros_like(potentials[0]), *potentials[1:]])
