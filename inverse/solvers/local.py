"""Reconstruction by a network that is taught to look at the surroundings of each voxel in the tilts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cryosim.core.record import Record
from inverse.physics.spectral import shown_width
from inverse.physics.tilt import TiltProjection
from inverse.priors.local import MULTIPLE, REACH, RINGS, FilteredTilts, LocalNetwork
from inverse.solvers.linear import as_batch, least_squares

_ROWS = 64  # that least squares is made for at once
_LEAST_DAMPING = 1e-3  # of |A|^2


class Local(Record):
    """What `local` returns.

    Attributes
    ----------
    volume : tensor (z, y, x) or (batch, channel, z, y, x)
        [V].
    std : tensor, as volume
        Deviation that the network expects of its own error, voxel by voxel [V].
    """

    volume: torch.Tensor
    std: torch.Tensor


class _Span(NamedTuple):
    """Rows of a block: those kept, and those that are needed for them."""

    first: int
    last: int
    from_row: int
    to_row: int


@torch.no_grad()
def local(
    physics: TiltProjection,
    images: torch.Tensor,
    network: LocalNetwork,
    *,
    noise: float | torch.Tensor,
    transfer: torch.Tensor | None = None,
    rows: int = 64,
) -> Local:
    """The volume that a `LocalNetwork` makes of a tilt series, block by block.

    Split it by `inverse.measured` into what the images determine and what the network has added.

    Parameters
    ----------
    physics : TiltProjection
        On the camera grid, tilted about y and no more; images have as many rows as the volume.
    images : tensor (tilt, y, x) or (batch, 1, tilt, y, x)
        Aligned line integrals [V · voxel], over `physics.scale`, corrected for the sign of the CTF.
    network : LocalNetwork
    noise : float or tensor (tilt,)
        Variance of their white noise, per pixel, in the square of their unit.
    transfer : tensor (tilt, ring), optional
        Share of the potential that lens and dose have left in each image, in the rings of
        `cryosim.core.fourier.ring_means` [1]; all of it when left out.
    rows : int
        Of a block, rounded up to a multiple of 4; time and memory go with this and 72 rows more.

    Returns
    -------
    Local

    Raises
    ------
    ValueError
        For images or noise that do not fit, or an operator other than said.
    """
    batch, flat = as_batch(physics, images)
    if batch.shape[1] != 1:
        raise ValueError(f"local: expected images of one channel, got {tuple(batch.shape)}.")
    if rows < 1:
        raise ValueError(f"local: expected blocks of one row or more, got {rows}.")
    parameter = next(network.parameters())
    angles = physics.angles.expand(len(batch), -1)
    results = []
    for item, own in zip(batch, angles, strict=True):
        one = physics if len(physics.angles) == 1 else _of_angles(physics, own)
        tilts = filtered_tilts(one, item[0].to(parameter), noise, network.scale, transfer)
        parts = [_of_rows(network, tilts, span) for span in _spans(tilts.volume.shape[1], rows)]
        volume, deviation = (torch.cat(part, 1).to(images.dtype) for part in zip(*parts, strict=True))
        results.append((volume, deviation))
    volume, std = (torch.stack(part)[:, None] for part in zip(*results, strict=True))
    return Local(volume[0, 0], std[0, 0]) if flat else Local(volume, std)


@torch.no_grad()
def filtered_tilts(
    physics: TiltProjection,
    images: torch.Tensor,
    noise: float | torch.Tensor,
    deviation: float,
    transfer: torch.Tensor | None = None,
) -> FilteredTilts:
    """What a `LocalNetwork` is given of images (tilt, y, x) with white noise of a variance.

    `deviation` is that of a voxel [V]; the other arguments are as in `local`.
    """
    angles = physics.angles[0].to(images)
    if physics.geometry.grid != "camera" or physics.image_shape[0] != physics.volume_shape[1]:
        raise ValueError(
            "local: expected the camera grid and images with the rows of the volume, got the "
            f"{physics.geometry.grid} grid, images {tuple(physics.image_shape)}, volume {physics.volume_shape}."
        )
    variance = torch.as_tensor(noise, dtype=images.dtype, device=images.device)
    if variance.ndim > 1 or (variance.ndim == 1 and len(variance) != len(angles)):
        raise ValueError(f"noise: expected one variance or {len(angles)}, got {tuple(variance.shape)}.")
    if not bool((variance >= 0).all() & torch.isfinite(variance).all()):
        raise ValueError(f"noise: expected variances of zero or more, got {variance.tolist()}.")
    transfer = images.new_ones(len(angles), RINGS) if transfer is None else transfer.to(images)
    if transfer.shape != (len(angles), RINGS) or not bool(torch.isfinite(transfer).all()):
        raise ValueError(f"transfer: expected ({len(angles)}, {RINGS}) finite numbers, got {tuple(transfer.shape)}.")
    scale, shares = physics.scale.to(images), angular_shares(angles)
    point = torch.zeros_like(images)
    point[:, images.shape[1] // 2, images.shape[2] // 2] = 1
    response = ramp_filtered(point, shares).square().sum((1, 2))
    start = _start(physics, images, float(variance.mean()) / deviation**2)
    ramped = ramp_filtered(images, shares) * scale
    return FilteredTilts(ramped, angles, shares, (variance * response).sqrt() * scale, transfer, start)


def _start(physics: TiltProjection, images: torch.Tensor, weight: float) -> torch.Tensor:
    """Damped least squares (z, y, x) on the width that the images show, of which the middle is kept."""
    (depth, height, width), angles = physics.volume_shape, physics.angles
    wide = max(width, shown_width(depth, width, float(angles.abs().max())))
    first, parts = wide // 2 - width // 2, []
    for row in range(0, height, _ROWS):
        seen = images[:, row : row + _ROWS]
        part = TiltProjection(angles, (depth, seen.shape[1], wide), (seen.shape[1], images.shape[2]))
        damping = max(weight * float(physics.scale) ** 2, _LEAST_DAMPING * float(part.squared_norm()))
        found = least_squares(part, seen * physics.scale.to(seen), damping)
        parts.append(found[..., first : first + width])
    return torch.cat(parts, 1)


def ramp_filtered(images: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """c_t (tilt, y, u) of line integrals (tilt, y, u) and the angle (tilt,) [rad] each stands for, not wrapping."""
    length = images.shape[-1]
    q = torch.fft.rfftfreq(2 * length, dtype=images.dtype, device=images.device)
    q[0] = 1 / (8 * length)  # the mean of |q| over its sample
    spectrum = torch.fft.rfft(images, n=2 * length) * q * shares[:, None, None]
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].contiguous()


def angular_shares(angles: torch.Tensor) -> torch.Tensor:
    """Angle [rad] that each of the tilts (tilt,) [deg] stands for: half the way to each neighbour."""
    if len(angles) == 1:
        return torch.full_like(angles, torch.pi)
    order = torch.argsort(angles)
    between = torch.deg2rad(angles[order]).diff()
    shares = torch.empty_like(angles)
    shares[order] = (torch.cat([between[:1], between]) + torch.cat([between, between[-1:]])) / 2
    return shares


def _of_angles(physics: TiltProjection, angles: torch.Tensor) -> TiltProjection:
    one = TiltProjection(angles, physics.volume_shape, physics.image_shape)
    one.scale = physics.scale
    return one


def _spans(n_rows: int, rows: int) -> list[_Span]:
    """Blocks that begin at multiples of `MULTIPLE`, with what the network reaches on either side."""
    step = -(-rows // MULTIPLE) * MULTIPLE
    firsts = range(0, n_rows, step)
    return [_Span(i, min(i + step, n_rows), max(0, i - REACH), min(n_rows, i + step + REACH)) for i in firsts]


def _of_rows(network: LocalNetwork, tilts: FilteredTilts, span: _Span) -> tuple[torch.Tensor, torch.Tensor]:
    volume, log_variance = network(tilts.rows(span.from_row, span.to_row))
    keep = slice(span.first - span.from_row, span.last - span.from_row)
    return volume[:, keep], (log_variance[:, keep] / 2).exp()
