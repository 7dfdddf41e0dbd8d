"""A specimen that bends from tilt to tilt: its parts, seen through windows, are aligned each for itself.

In tilt t the matter at (x, y) of the specimen is seen displaced by e_t(x, y), in the frame whose axis is y, a cubic
B-spline over control points that span the field,

    e_t(x, y) = sum over c of B_c(x, y) D_tc.                                                                 (1)

The windows about the places p, which follow these through the tilts at (x cos t, y), have shifts s_p and their Fisher
information J_p, by the likelihood of `inverse.calibration.tilt_likelihood`. B_p are the means of B over
the window, which is what all tilts see alike. All D together minimise

    sum over p of (s_p - B_p D)^T J_p (s_p - B_p D) + |D|^2 / w^2,                                              (2)

with w the width that makes all s_p likeliest.

What a displacement of each part of the specimen would make, the same in all tilts, is not told, and is 0; so is the
mean over the field in each tilt, which is the shift of the image. Images are straightened, and what is left of it is
looked for again, with finer detail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.ndimage import map_coordinates

from inverse.calibration.climb import Data, Fit, settled, taken
from inverse.calibration.tilt_likelihood import Geometry
from inverse.physics.deformed import displacement, free_shifts, spline_basis, twice

CONTROL = 4  # points along each side of the field
_PLACES = 4  # windows along each side
_SHARE = 0.42  # of the field, that a window spans
_LEAST = 56  # [px]: smaller windows hold too few frequencies
_WIDEST = 4.0  # [px] that control points are expected to be displaced, to begin with
ROUNDS = ((0.1, 0.25), (0.2, 0.0), (0.3, 0.0))  # frequencies up to [1/px], and `alone` of `Model`


class Bent(NamedTuple):
    """What was found.

    Attributes
    ----------
    fit : Fit
        Of the straightened images.
    field : tensor (tilt, 2, y, x)
        D of the displacements across and along the axis [px].
    errors : tensor (tilt, 2, y, x)
        Standard errors of e at the control points [px].
    """

    fit: Fit
    field: torch.Tensor
    errors: torch.Tensor


def bent(data: Data, found: Fit, limit: float, progress: Callable[[int], None]) -> Bent:
    """The field of displacements, with images up to the frequency `limit` [1/px]; `progress` is told of each round.

    Raises
    ------
    ValueError
        For images that are too small for windows.
    """
    n = len(data.angles)
    window = max(_LEAST, 2 * round(_SHARE * min(data.images.shape[1:]) / 2))
    if window > 0.75 * min(data.images.shape[1:]):
        raise ValueError(
            f"align: expected images of {round(_LEAST / 0.75)} pixels or more for a deformation, got "
            f"{tuple(data.images.shape[1:])}. Take a smaller bin."
        )
    field = torch.zeros(n, 2, CONTROL, CONTROL, dtype=torch.float64)
    errors, geometry = torch.zeros_like(field), found.geometry
    straight = data
    for i, (band, alone) in enumerate(ROUNDS):
        field, errors = _from_windows(straight, geometry, field, window, min(band, limit), alone)
        straight = data._replace(images=straightened(data.images, geometry, field))
        found = settled(straight, geometry, min(max(band, 0.13), limit), 2)
        geometry = found.geometry
        straight = data._replace(images=straightened(data.images, geometry, field))
        progress(i + 1)
    return Bent(settled(straight, geometry, limit, 2), field, errors)


def straightened(images: torch.Tensor, geometry: Geometry, field: torch.Tensor) -> torch.Tensor:
    """Images (tilt, y, x) as they were, had nothing bent: each pixel from where its matter is seen."""
    ny, nx = images.shape[1:]
    y, x = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (ny, nx))
    a = math.radians(geometry.axis_angle)
    cosines = torch.cos(torch.deg2rad(geometry.angles))
    made = []
    for image, shift, cosine, control in zip(images, geometry.shifts, cosines, field, strict=True):
        px, py = x - shift[0], y[:, None] - shift[1]
        u, v = px * math.cos(a) + py * math.sin(a), -px * math.sin(a) + py * math.cos(a)  # in the frame of the axis
        e = displacement(control, u / cosine, v.expand_as(u), (ny, nx))  # (2, y, x)
        off = taken(e.permute(1, 2, 0), geometry.axis_angle)
        places = torch.stack([y[:, None] + off[..., 1] + ny // 2, x + off[..., 0] + nx // 2])
        # splines of twice as many samples: 1e-4 of what images up to 0.3 [1/px] hold
        seen = map_coordinates(twice(image.double()).numpy(), 2 * places.numpy(), order=3, mode="mirror")
        made.append(torch.from_numpy(seen))
    return torch.stack(made)


def _from_windows(
    data: Data, geometry: Geometry, field: torch.Tensor, window: int, band: float, alone: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (2) of images straightened by `field`: D (tilt, 2, y, x) [px] in all, and standard errors of e there."""
    ny, nx = data.images.shape[1:]
    n = len(geometry.angles)
    free = free_shifts(geometry.angles).reshape(2, n, -1)  # (2, tilt, parameter)
    points, size = CONTROL * CONTROL, free.shape[2]
    normal = torch.zeros(points * size, points * size, dtype=torch.float64)
    right = torch.zeros(points * size, dtype=torch.float64)
    # windows overlap, and what they share is not to count twice
    own = min(1.0, ny * nx / (_PLACES * window) ** 2)
    reach = [(m - window) / 2 - 2 for m in (ny, nx)]
    for y in torch.linspace(-reach[0], reach[0], _PLACES).tolist():
        for x in torch.linspace(-reach[1], reach[1], _PLACES).tolist():
            moves, told = _window_shifts(data, geometry, (x, y), window, band, alone)
            basis = _mean_basis((ny, nx), (x, y), (window, window))
            moves = moves + field.flatten(2) @ basis
            moved = torch.einsum("p,cti->ctpi", basis, free).reshape(2 * n, points * size)
            normal += own * moved.T @ told @ moved
            right += own * moved.T @ (told @ moves.T.flatten())
    solved, covariance = _shrunk(normal, right)
    solved = torch.einsum("cti,pi->tcp", free, solved.reshape(points, size))
    covariance = covariance.reshape(points, size, points, size)
    line = torch.linspace(-0.5, 0.5, CONTROL).tolist()
    mean = _mean_basis((ny, nx), (0.0, 0.0), (ny, nx))
    at = torch.stack([_mean_basis((ny, nx), (x * (nx - 1), y * (ny - 1)), (0, 0)) for y in line for x in line])
    spread = torch.einsum("pa,aibj,pb->pij", at - mean, covariance, at - mean)  # less the mean over the field
    variance = torch.einsum("cti,pij,ctj->tcp", free, spread, free)
    solved = solved - (solved @ mean)[..., None]
    field, errors = (v.reshape(n, 2, CONTROL, CONTROL) for v in (solved, variance.clamp_min(0).sqrt()))
    return field, errors


def _shrunk(normal: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and covariance where all have one prior width, by expectation-maximisation (Dempster 1977)."""
    eigen, vectors = torch.linalg.eigh(normal)
    along, width = vectors.T @ right, _WIDEST**2
    for _ in range(50):
        variance = 1 / (eigen.clamp_min(0) + 1 / width)
        width = float(((variance * along) ** 2 + variance).mean())
    variance = 1 / (eigen.clamp_min(0) + 1 / width)
    return vectors @ (variance * along), (vectors * variance) @ vectors.T


def _mean_basis(shape: tuple[int, int], place: tuple[float, float], width: tuple[float, float]) -> torch.Tensor:
    """Mean of B (point,) over `width` (y, x) [px] about a place (x, y) [px] from the middle of a field."""
    lines = []
    for n, p, wide in zip(shape, place[::-1], width, strict=True):
        at = p + wide * (torch.arange(33, dtype=torch.float64) / 32 - 0.5)
        at = ((at + n // 2) / (n - 1)).clamp(0, 1) * (CONTROL - 1)
        lines.append(spline_basis(at, CONTROL).mean(0))
    return torch.outer(*lines).flatten()


def _window_shifts(
    data: Data, geometry: Geometry, place: tuple[float, float], window: int, band: float, alone: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifts (tilt, 2) [px] of what stands about a place, in the frame of the axis, and their information."""
    ny, nx = data.images.shape[1:]
    cosines = torch.cos(torch.deg2rad(geometry.angles))
    across = torch.stack([place[0] * cosines, torch.full_like(cosines, place[1])], 1)
    middle = taken(across, geometry.axis_angle) + geometry.shifts  # (tilt, 2) from the middle of the image
    start = (middle.round() + torch.tensor([nx // 2, ny // 2]) - window // 2).long()
    start = torch.stack([start[:, 0].clamp(0, nx - window), start[:, 1].clamp(0, ny - window)], 1)
    cut = torch.stack(
        [image[j : j + window, i : i + window] for image, (i, j) in zip(data.images, start.tolist(), strict=True)]
    )
    cut = cut - cut.mean((1, 2), keepdim=True)
    begun = middle - (start + window // 2 - torch.tensor([nx // 2, ny // 2]))
    thickness = min(geometry.thickness, 0.8 * window)
    own = geometry._replace(shifts=begun, thickness=thickness)
    found = settled(data._replace(images=cut, fit=("shifts",)), own, band, 2, alone)
    turned = found.geometry.shifts - begun
    a = math.radians(geometry.axis_angle)
    turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
    return turned @ turn, found.model.shift_information()
