"""How a specimen sits in the microscope: tilted about x before it is projected, and its images placed on the camera.

The image of a tilt is T P X volume: X turns the specimen about x, P is the projection of `inverse.physics.spectral`,
and T magnifies by m, turns by phi from x towards y and displaces by s. A point at r is seen at

    (u, v) = m R(phi) [first two of R_y(t) R_x(chi) r] + s = R(phi) (m [...] + s'),   s' = R(-phi) s         (1)

so magnification and shift can be had before the turn, in a frame large enough to hold the turned camera: along x they
stand in the waves of the projection itself, along y in one matrix for each tilt, the trigonometric interpolation of
rows that are zero beyond the volume,

    M_vy = 1 / N sum_{|l| <= L} exp(2 pi i l ((v - s'_y) / m - y) / N)                                       (2)

with the frequencies that volume and image both resolve. Turns are those of `inverse.physics.turn`. A magnified image
shows the line integrals of the specimen at another scale; their values stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cryosim.core.fourier import dirichlet_kernel, positions
from inverse.physics.spectral import Placement, TiltGeometry, backproject, fitted, project, tilt_geometry
from inverse.physics.turn import quarter_turns, turned_planes

LEAST_MAGNIFICATION = 0.1
"""So that a wrong one does not ask for a frame of any size."""

Volumes = Callable[[torch.Tensor], torch.Tensor]


class Setting(NamedTuple):
    """How one specimen is seen in each tilt.

    Attributes
    ----------
    angles, axis_angle : tensor (tilt,)
        t and phi [deg].
    shifts : tensor (tilt, 2)
        s, (x, y) [voxel].
    magnifications : tensor (tilt,)
        m.
    x_tilt : tensor ()
        chi [deg].
    """

    angles: torch.Tensor
    axis_angle: torch.Tensor
    shifts: torch.Tensor
    magnifications: torch.Tensor
    x_tilt: torch.Tensor

    def in_frame(self) -> torch.Tensor:
        """s' (tilt, 2) of equation (1), float64."""
        phi, (x, y) = torch.deg2rad(self.axis_angle.double()), self.shifts.double().unbind(-1)
        c, s = torch.cos(phi), torch.sin(phi)
        return torch.stack([c * x + s * y, -s * x + c * y], -1)

    def placement(self) -> Placement:
        """What the projection along x has to know of it."""
        return Placement(self.in_frame()[:, 0], self.magnifications)


class Field(NamedTuple):
    """Sizes [voxel]: of the volume (z, y, x), of the camera (y, x), and between them.

    Attributes
    ----------
    volume, image : tuple of int
    geometry : TiltGeometry
        Of the specimen turned about x, and of the frame along x.
    turned_rows, frame_rows, period : int
        Rows of the turned specimen, of the frame, and N of equation (2).
    """

    volume: tuple[int, int, int]
    image: tuple[int, int]
    geometry: TiltGeometry
    turned_rows: int
    frame_rows: int
    period: int


def field(
    volume: tuple[int, int, int], image: tuple[int, int], settings: Sequence[Setting], before: Field | None = None
) -> Field:
    """Sizes that hold the specimen and the camera in every setting, and are no less than those `before`.

    Raises
    ------
    ValueError
        For tilts about y of 89 degrees or more.
    """
    (depth, rows, width), (ny, nx) = volume, image
    frame, reach, steepest, (deep, tall), least = [ny, nx], [0.0, 0.0], 0.0, (depth, rows), (0, 0)
    if before is not None:
        frame = [before.frame_rows, before.geometry.image_width]
        deep, tall, least = before.geometry.depth, before.turned_rows, (before.period, before.geometry.period)
    for one in settings:
        steepest = max(steepest, float(one.angles.detach().abs().max()))
        chi = math.radians(float(one.x_tilt.detach()))
        if chi:
            deep = max(deep, math.ceil(depth * math.cos(chi) + rows * abs(math.sin(chi))) + 2)
            tall = max(tall, math.ceil(rows * math.cos(chi) + depth * abs(math.sin(chi))) + 2)
        phi = torch.deg2rad(one.axis_angle.detach().double())
        c, s = torch.cos(phi).abs(), torch.sin(phi).abs()
        spare = 2.0 * (phi != 0)  # turned content must find its place to the last sample
        for axis, side in enumerate((nx * s + ny * c + spare, nx * c + ny * s + spare)):
            frame[axis] = max(frame[axis], math.ceil(float(side.max()) - 1e-9))
        moved = one.in_frame().detach().abs()
        for axis in (0, 1):
            far = (frame[axis] + 2 * moved[:, 1 - axis]) / one.magnifications.detach().double().clamp_min(
                LEAST_MAGNIFICATION
            )
            reach[axis] = max(reach[axis], float(far.max()))
    geometry = tilt_geometry(deep, width, frame[1], "camera", steepest, reach[1])
    period = (math.ceil(0.5 * (tall + max(reach[0], tall))) + 2) | 1
    geometry = geometry.replace(period=max(geometry.period, least[1]))
    return Field(volume, image, geometry, tall, frame[0], max(period, least[0]))


def see(volume: torch.Tensor, setting: Setting, field: Field) -> torch.Tensor:
    """Images (channel, tilt, y, x) of a volume (channel, z, y, x)."""
    depth, _, width = field.geometry.depth, field.turned_rows, field.geometry.width
    planes = _about_x(volume, setting.x_tilt, depth, field.turned_rows)  # (channel, z, row, x)
    stacked = planes.transpose(0, 1).reshape(depth, -1, width)
    lines = project(stacked, setting.angles, field.geometry, setting.placement())  # (tilt, channel row, u)
    images = []
    for lines_of_tilt, matrix, phi in zip(
        lines, _row_matrices(setting, field, volume), setting.axis_angle, strict=True
    ):
        image = matrix @ lines_of_tilt.unflatten(0, (len(volume), -1))  # (channel, v, u)
        images.append(_on_camera(image, phi, field))
    return torch.stack(images, 1)


def see_adjoint(images: torch.Tensor, setting: Setting, field: Field) -> torch.Tensor:
    """Adjoint of `see`: volume (channel, z, y, x) from images (channel, tilt, y, x)."""
    lines = []
    for image, matrix, phi in zip(
        images.unbind(1), _row_matrices(setting, field, images), setting.axis_angle, strict=True
    ):
        lines.append((matrix.T @ _on_frame(image, phi, field)).flatten(0, 1))  # (channel row, u)
    planes = backproject(torch.stack(lines), setting.angles, field.geometry, setting.placement())
    planes = planes.unflatten(1, (len(images), field.turned_rows)).transpose(0, 1)
    return _about_x(planes, -setting.x_tilt, *field.volume[:2])


def lifted(act: Volumes, setting: Setting, field: Field) -> Volumes:
    """X^H act X: a function of volumes (channel, z, y, x) from one of turned volumes (z, row, x)."""

    def apply(volume: torch.Tensor) -> torch.Tensor:
        planes = _about_x(volume, setting.x_tilt, field.geometry.depth, field.turned_rows).transpose(0, 1)
        planes = act(planes.flatten(1, 2)).unflatten(1, (len(volume), field.turned_rows)).transpose(0, 1)
        return _about_x(planes, -setting.x_tilt, *field.volume[:2])

    return apply


def _about_x(volume: torch.Tensor, chi: torch.Tensor, depth: int, rows: int) -> torch.Tensor:
    """Volume (channel, depth, rows, x) from (channel, z, y, x), turned by `chi` () [deg] from y towards z.

    The adjoint is the turn back.
    """
    if _is(chi, 0.0):
        return fitted(fitted(volume.movedim(3, 1), depth, -2), rows, -1).movedim(1, 3)
    return turned_planes(volume.movedim(3, 1), -chi, depth, rows).movedim(1, 3)


def _on_camera(images: torch.Tensor, phi: torch.Tensor, field: Field) -> torch.Tensor:
    """Images (channel, y, x) of the camera from those (channel, v, u) of the frame, turned by phi () from x to y."""
    quarters = round(float(phi.detach()) / 90)
    images = quarter_turns(images, quarters)
    if _is(phi, 90.0 * quarters):
        return fitted(fitted(images, field.image[0], -2), field.image[1], -1)
    return turned_planes(images, 90.0 * quarters - phi, *field.image)


def _on_frame(images: torch.Tensor, phi: torch.Tensor, field: Field) -> torch.Tensor:
    """Adjoint of `_on_camera`."""
    quarters = round(float(phi.detach()) / 90)
    frame = field.frame_rows, field.geometry.image_width
    rows, columns = frame[::-1] if quarters % 2 else frame
    if _is(phi, 90.0 * quarters):
        images = fitted(fitted(images, rows, -2), columns, -1)
    else:
        images = turned_planes(images, phi - 90.0 * quarters, rows, columns)
    return quarter_turns(images, -quarters)


def _row_matrices(setting: Setting, field: Field, like: torch.Tensor) -> torch.Tensor:
    """M (tilt, v, y) of equation (2)."""
    size = setting.magnifications.double()[:, None, None]
    v, y = (positions(n, dtype=torch.float64, device=like.device) for n in (field.frame_rows, field.turned_rows))
    at = (v[:, None] - setting.in_frame()[:, 1, None, None]) / size - y  # (tilt, v, y)
    largest = torch.floor(0.5 * field.period * size.detach().clamp_max(1.0))
    return (dirichlet_kernel(at / field.period, 2 * largest + 1) / field.period).to(like)


def _is(value: torch.Tensor, usual: float) -> bool:
    """Whether a parameter () has its usual value, and no derivative with respect to it may be asked for."""
    return not may_vary(value) and float(value) == usual


def may_vary(value: torch.Tensor) -> bool:
    """Whether derivatives with respect to a parameter may be asked for, in reverse or in forward mode."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped or value.requires_grad or torch.autograd.forward_ad.unpack_dual(value).tangent is not None
