"""Poses of particles as a RELION-5 particle file.

What stands in the file, for a particle that is the reference turned by R and then put at `position`:

- rlnCenteredCoordinate{X,Y,Z}Angst: `position` [Å] from the tomogram's centre, sample n // 2;
- rlnCoordinate{X,Y,Z}: position / pixel_size + n // 2 [px], counted from 0;
- rlnAngle{Rot,Tilt,Psi}: RELION's matrix of these angles (Heymann, Chagoyen & Belnap 2005,
  doi:10.1016/j.jsb.2005.06.001), A = R_z(-psi) R_y(-tilt) R_z(-rot) in right-handed rotations, is the one its
  tomography programs call the map from particle to tomogram space. So A = R, and the angles are those of the inverse,
  R^T = R_z(rot) R_y(tilt) R_z(psi);
- rlnClassNumber: which molecule, counted from 1; the block data_molecules, which RELION skips, gives its name.

RELION names particles and optics groups itself when it imports the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas
import starfile
import torch

from cryosim.core.rotation import euler_zyz, rotation_from_euler_zyz
from cryosim.io.files import FormatError, atomic_write, existing_file, read_text

_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
_CENTRED = ("rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst")
_PIXELS = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ")
_CLASS = "rlnClassNumber"
_NAME = "cryosimMoleculeName"

Particles = tuple[str, torch.Tensor, torch.Tensor]


def write_poses(
    path: str | Path,
    particles: Sequence[Particles],
    *,
    pixel_size: float,
    volume_shape: tuple[int, int, int],
    tomogram_name: str,
) -> None:
    """Write poses of particles.

    Parameters
    ----------
    path : str or path
        .star.
    particles : sequence of (name, rotations, positions)
        For each molecule its name, rotations (n, 3, 3) from the reference into the tomogram, and positions (n, 3)
        (x, y, z) [Å] from the box centre.
    pixel_size : float
        Of the tomogram [Å].
    volume_shape : (int, int, int)
        (z, y, x) of the tomogram [px].
    tomogram_name : str
        rlnTomoName.

    Raises
    ------
    ValueError
        When there is no particle, shapes disagree, a number is not finite or a matrix is not a rotation.
    """
    tables = [_table(path, i, *entry) for i, entry in enumerate(particles, 1)]
    table = pandas.concat(tables, ignore_index=True) if tables else pandas.DataFrame()
    if not len(table):
        raise ValueError(f"{path}: particles: expected at least one, got none; RELION refuses an empty file.")
    for pixels, centred, n in zip(_PIXELS, _CENTRED, reversed(volume_shape), strict=True):
        table[pixels] = table[centred] / float(pixel_size) + n // 2
    table.insert(0, "rlnTomoName", tomogram_name)
    names = pandas.DataFrame({_CLASS: range(1, len(particles) + 1), _NAME: [name for name, _, _ in particles]})
    with atomic_write(path) as temporary:
        starfile.write({"molecules": names, "particles": table}, temporary, float_format="%.9g")
        _, _, body = temporary.read_text(encoding="utf-8").partition("\n")  # the first line tells the time
        temporary.write_text("# cryosim\n" + body, encoding="utf-8")


def read_poses(path: str | Path) -> list[Particles]:
    """Poses of a file that `write_poses` or RELION 5 wrote: (name, rotations (n, 3, 3), positions (n, 3) [Å]).

    One entry a molecule. Without a block of names the class number is the name.

    Raises
    ------
    FormatError
        When the file is missing, empty, not STAR, without poses, or a value is not a finite number.
    """
    path = existing_file(path)
    blocks = _blocks(path)
    table = next(iter(blocks.values())) if len(blocks) == 1 else blocks.get("particles")
    if not isinstance(table, pandas.DataFrame) or table.empty:
        raise FormatError(path, "data_particles", "a table of particles", "none", "Name a particle file.")
    if _CLASS not in table:
        table = table.assign(**{_CLASS: 1})
    numbers = _columns(path, table, (_CLASS,))[:, 0].long()
    rotations = rotation_from_euler_zyz(_columns(path, table, _ANGLES)).mT
    positions = _columns(path, table, _CENTRED)
    classes = _names(path, blocks.get("molecules"), sorted(set(numbers.tolist())))
    return [(name, rotations[numbers == number], positions[numbers == number]) for number, name in classes.items()]


def _table(
    path: str | Path, number: int, name: str, rotations: torch.Tensor, positions: torch.Tensor
) -> pandas.DataFrame:
    n = rotations.shape[0]
    if tuple(rotations.shape) != (n, 3, 3) or tuple(positions.shape) != (n, 3):
        raise ValueError(
            f"{path}: {name}: expected rotations (n, 3, 3) and positions (n, 3), got {tuple(rotations.shape)} and "
            f"{tuple(positions.shape)}."
        )
    rotations, positions = (value.detach().cpu().to(torch.float64) for value in (rotations, positions))
    off = (rotations @ rotations.mT - torch.eye(3, dtype=torch.float64)).abs()
    if not bool(torch.isfinite(positions).all()):
        raise ValueError(f"{path}: {name}: expected finite positions, got NaN or infinity.")
    if not bool((off < 1e-4).all()) or not bool((torch.linalg.det(rotations) > 0).all()):
        raise ValueError(f"{path}: {name}: expected right-handed rotation matrices, got something else.")
    angles = euler_zyz(rotations.mT)
    table = pandas.DataFrame(torch.cat([positions, angles], 1).numpy(), columns=[*_CENTRED, *_ANGLES])  # type: ignore
    table[_CLASS] = number
    return table


def _blocks(path: Path) -> dict:
    read_text(path)  # missing, empty, too large
    try:
        blocks = starfile.read(path, always_dict=True, parse_as_string=[_NAME])
    except Exception as error:  # starfile lets whatever its parser meets through
        raise FormatError(path, "content", "a STAR file", f"{type(error).__name__} {error}") from error
    if not isinstance(blocks, dict) or not blocks:
        raise FormatError(path, "content", "data_ blocks of a STAR file", "none", "Name a particle file.")
    return blocks


def _names(path: Path, named: pandas.DataFrame | None, numbers: list[int]) -> dict[int, str]:
    if named is None:
        return {number: str(number) for number in numbers}
    if not isinstance(named, pandas.DataFrame) or not {_CLASS, _NAME} <= set(named):
        raise FormatError(path, "data_molecules", f"columns {_CLASS} and {_NAME}", "others")
    classes = {int(number): str(name) for number, name in zip(named[_CLASS], named[_NAME], strict=True)}
    missing = set(numbers) - set(classes)
    if missing:
        raise FormatError(path, "data_molecules", f"a name for class {min(missing)}", f"{sorted(classes)}", "Add it.")
    return classes


def _columns(path: Path, table: pandas.DataFrame, labels: Sequence[str]) -> torch.Tensor:
    """Columns `labels` as float64 (row, label)."""
    absent = [label for label in labels if label not in table]
    if absent:
        raise FormatError(path, f"_{absent[0]}", "a column", "none", "Read a RELION-5 particle file.")
    numbers = table[list(labels)].apply(pandas.to_numeric, errors="coerce").to_numpy(dtype=float)
    values = torch.tensor(numbers, dtype=torch.float64)
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise FormatError(
            path,
            f"_{labels[column]}, row {row + 1}",
            "a finite number",
            repr(table[labels[column]].iloc[row]),
            "Correct the entry.",
        )
    return values
