"""Reconstruction that is linear in the images: weighted back-projection and damped least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch

from cryosim.core.fourier import band_limit
from inverse.physics.closed_form import backproject_filtered, gram_matrices, gram_solver
from inverse.physics.spectral import TiltGeometry, cosines, frequencies, resolved

Filter = Literal["ramp", "exact"]


class ImageOperator(Protocol):
    """Any operator that knows its images."""

    def expect_images(self, images: torch.Tensor, /) -> None: ...


class TiltOperator(ImageOperator, Protocol):
    """What the solvers ask of a `TiltProjection`."""

    angles: torch.Tensor
    scale: torch.Tensor

    @property
    def geometry(self) -> TiltGeometry: ...

    def fit_rows(self, images: torch.Tensor, /) -> torch.Tensor: ...
    def squared_norm(self) -> torch.Tensor: ...
    def prox_l2(self, z: None, y: torch.Tensor, gamma: float | torch.Tensor, /) -> torch.Tensor: ...


def wbp(
    physics: TiltOperator, images: torch.Tensor, *, filter: Filter = "ramp", low_pass: float | None = None
) -> torch.Tensor:
    """Weighted (filtered) back-projection.

    Parameters
    ----------
    physics : TiltProjection
    images : tensor (tilt, y, x) or (batch, channel, tilt, y, x)
        Line integrals [unit of the volume · voxel], over `physics.scale`.
    filter : {"ramp", "exact"}
        "ramp": |q| times the angle each tilt stands for (Ramachandran & Lakshminarayanan 1971,
        doi:10.1073/pnas.68.9.2236). "exact": the inverse of how often the tilts together sample each frequency, from
        the Gram matrices of the projection (Harauz & van Heel 1986, Optik 73, 146): right for uneven angles too.
    low_pass : float, optional
        Finest period to keep [voxel], with a cosine edge.

    Returns
    -------
    tensor (z, y, x) or (batch, channel, z, y, x)
    """
    batch, flat = as_batch(physics, images)
    if low_pass is not None:
        batch = low_passed(batch, low_pass)
    volume = _each_item(physics, batch, lambda angles: wbp_filter(angles, physics.geometry, filter))
    return volume[0, 0] if flat else volume


def least_squares(
    physics: TiltOperator, images: torch.Tensor, weight: float | torch.Tensor | None = None, *, open_sides: bool = False
) -> torch.Tensor:
    """Damped (Tikhonov) least squares: the minimiser of |A x - images|^2 + weight |x|^2.

    In closed form on the stretched grid; on the camera grid by few preconditioned iterations, or, with `open_sides`,
    in closed form again.

    Parameters
    ----------
    physics : TiltProjection or ContrastProjection
    images : tensor (tilt, y, x) or (batch, channel, tilt, y, x)
    weight : float or tensor (), optional
        Variance of the noise over the variance of a voxel, in the operator's own units; a hundredth of |A|^2 when left
        out.
    open_sides : bool
        Let the specimen reach on in x beyond the volume, as it does in a real tilt series: solved on the whole period,
        the images taken as zero beyond their edges, then cut to the volume. Camera grid only. Of a
        `ContrastProjection`, each image is taken as one of the defocus at the box centre, whatever its `heights`; the
        specimen reaches on in y too, as far as the lens displaces.

    Returns
    -------
    tensor (z, y, x) or (batch, channel, z, y, x)

    Raises
    ------
    ValueError
        When the weight is not positive; with open sides, for a `DeformedProjection`.
    """
    batch, flat = as_batch(physics, images)
    if weight is None:
        weight = 0.01 * physics.squared_norm()
    if not float(weight) > 0:
        raise ValueError(f"least_squares: expected a positive weight, got {float(weight)}.")
    damping = torch.as_tensor(weight, dtype=torch.float64) * physics.scale**2
    through_the_lens = getattr(physics, "open_sided", None)
    if open_sides and through_the_lens and physics.geometry.grid == "camera":
        volume = through_the_lens(batch, damping)
    elif open_sides and physics.geometry.grid == "camera":
        volume = _each_item(physics, batch, lambda angles: gram_solver(angles, damping, physics.geometry))
    else:
        volume = physics.prox_l2(None, batch, 1 / weight)
    return volume[0, 0] if flat else volume


def wbp_filter(
    angles: torch.Tensor, geometry: TiltGeometry, filter: Filter = "ramp"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The filter as an action on frequencies (k, tilt, row): `backproject_filtered` with it is the back-projection."""
    if filter not in ("ramp", "exact"):
        raise ValueError(f'wbp: expected the filter "ramp" or "exact", got {filter!r}.')
    weights = (_ramp if filter == "ramp" else _exact)(angles, geometry)[:, :, None]
    return lambda seen: seen * weights


def low_passed(images: torch.Tensor, period: float) -> torch.Tensor:
    """Images (..., y, x) without what is finer than `period` [px], by a cosine edge a quarter of the band wide."""
    shape = (images.shape[-2], images.shape[-1])
    keep = band_limit(shape, 2 / period, 0.25 / period, half=True, dtype=images.dtype, device=images.device)
    return torch.fft.irfft2(torch.fft.rfft2(images) * keep, s=shape)


def _ramp(angles: torch.Tensor, geometry: TiltGeometry) -> torch.Tensor:
    """|q| (k, tilt) [1/voxel] times the angle of each tilt [rad]; at q = 0 the mean of |q| over that sample.

    On the stretched grid a line integral counts for 1 / cos t samples of the camera, so that |q| becomes k = |q| cos t.
    """
    cos = cosines(angles) if geometry.grid == "camera" else torch.ones_like(cosines(angles))
    q = frequencies(geometry, angles.device)[:, None] / cos
    q = torch.where(q == 0, 1 / (4 * geometry.period * cos), q)
    order = torch.argsort(angles)
    radians = torch.deg2rad(angles.double())[order]
    share = torch.empty_like(radians)
    if len(angles) == 1:
        share[order] = torch.pi
    else:
        between = radians.diff()
        share[order] = (torch.cat([between[:1], between]) + torch.cat([between, between[-1:]])) / 2
    return q * share * resolved(angles, geometry)


def _exact(angles: torch.Tensor, geometry: TiltGeometry) -> torch.Tensor:
    """1 / sum over the tilts of G (k, tilt): what all tilts together would give back of a sample they agree on."""
    gram = gram_matrices(angles, geometry).real  # (k, tilt, tilt)
    own = torch.diagonal(gram, dim1=1, dim2=2)
    total = torch.maximum(gram.sum(2), own)
    return torch.where(own > 0, 1 / total.clamp_min(1e-30), torch.zeros_like(own))


def _each_item(
    physics: TiltOperator,
    batch: torch.Tensor,
    action_for: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """Volumes of all items by `backproject_filtered` with action_for(angles); channels are more rows of one problem."""
    angles = physics.angles.expand(len(batch), -1)
    volumes = []
    for item, tilts in zip(physics.fit_rows(batch), angles, strict=True):
        rows = item.movedim(0, 1).flatten(1, 2)  # (tilt, channel row, u)
        volume = backproject_filtered(rows, tilts, physics.geometry, action_for(tilts))
        volumes.append(volume.unflatten(1, (item.shape[0], -1)).movedim(1, 0))
    return torch.stack(volumes) * physics.scale.to(batch)


def as_batch(physics: ImageOperator, images: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Images (batch, channel, tilt, y, x) that fit the operator, and whether they came as one stack (tilt, y, x)."""
    if images.ndim not in (3, 5):
        raise ValueError(f"images: expected (tilt, y, x) or (batch, channel, tilt, y, x), got {tuple(images.shape)}.")
    batch = images[None, None] if images.ndim == 3 else images
    physics.expect_images(batch)
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images: expected float32 or float64, got {images.dtype}. Convert them.")
    if not torch.isfinite(images.detach()).all():
        raise ValueError("images: expected finite numbers; some are not. Leave out the images they are in.")
    return batch, images.ndim == 3
