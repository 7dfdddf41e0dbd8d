"""Right-handed rotation matrices that act on column vectors (x, y, z).

`tilt_rotation` is the one place that says how a specimen is turned in the microscope: R_z(axis_angle) R_y(angle).
"""

from __future__ import annotations

import torch

Degrees = float | torch.Tensor


def rotation_x(angle: Degrees) -> torch.Tensor:
    """Rotation (..., 3, 3) about x by `angle` (...) [deg]: y turns towards z."""
    return _about(0, angle)


def rotation_y(angle: Degrees) -> torch.Tensor:
    """Rotation (..., 3, 3) about y by `angle` (...) [deg]: a point lands at x cos + z sin."""
    return _about(1, angle)


def rotation_z(angle: Degrees) -> torch.Tensor:
    """Rotation (..., 3, 3) about z by `angle` (...) [deg]: x turns towards y."""
    return _about(2, angle)


def tilt_rotation(angle: Degrees, axis_angle: Degrees = 0.0) -> torch.Tensor:
    """Rotation (..., 3, 3) of the specimen: about y by `angle` [deg], then in the image plane by `axis_angle` [deg].

    Source: the convention of RELION 5 (Burt et al. 2024, doi:10.1002/2211-5463.13873), P = R_z R_y.
    """
    turn, in_plane = rotation_y(angle), rotation_z(axis_angle)
    return in_plane.to(turn.dtype) @ turn if in_plane.dtype != turn.dtype else in_plane @ turn


def random_rotations(
    n: int, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Rotations (n, 3, 3) drawn uniformly from SO(3), as normalised Gaussian quaternions (Shoemake 1992)."""
    q = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2).to(dtype)


def euler_zyz(rotation: torch.Tensor) -> torch.Tensor:
    """Angles (rot, tilt, psi) (..., 3) [deg] with `rotation` = R_z(rot) R_y(tilt) R_z(psi).

    RELION's angles of a pose are those of its transpose: its matrices act on coordinate frames (Heymann, Chagoyen &
    Belnap 2005, doi:10.1016/j.jsb.2005.06.001).
    """
    tilt = torch.atan2(torch.hypot(rotation[..., 0, 2], rotation[..., 1, 2]), rotation[..., 2, 2])
    rot = torch.atan2(rotation[..., 1, 2], rotation[..., 0, 2])
    c, s = torch.cos(rot), torch.sin(rot)  # psi of R_z(-rot) R, which is R_y(tilt) R_z(psi): right at any tilt
    r = rotation
    psi = torch.atan2(c * r[..., 1, 0] - s * r[..., 0, 0], c * r[..., 1, 1] - s * r[..., 0, 1])
    return torch.rad2deg(torch.stack([rot, tilt, psi], -1))


def rotation_from_euler_zyz(angles: torch.Tensor) -> torch.Tensor:
    """Inverse of `euler_zyz`: angles (..., 3) [deg] to rotations (..., 3, 3)."""
    rot, tilt, psi = angles.unbind(-1)
    return rotation_z(rot) @ rotation_y(tilt) @ rotation_z(psi)


def _about(axis: int, angle: Degrees) -> torch.Tensor:
    angle = torch.deg2rad(torch.as_tensor(angle, dtype=None if isinstance(angle, torch.Tensor) else torch.float64))
    c, s, one, zero = torch.cos(angle), torch.sin(angle), torch.ones_like(angle), torch.zeros_like(angle)
    rows = (
        [[one, zero, zero], [zero, c, -s], [zero, s, c]],
        [[c, zero, s], [zero, one, zero], [-s, zero, c]],
        [[c, -s, zero], [s, c, zero], [zero, zero, one]],
    )[axis]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
