"""How far the images of a volume are from the measured ones, where some pixels are left out: see `implicit`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from inverse.physics.base import TiltPhysics
from inverse.physics.closed_form import gram_matrices
from inverse.physics.spectral import (
    TiltGeometry,
    cosines,
    frequencies_first,
    image_matrices,
    image_weights,
    pair_weights,
    resolved,
    shear,
    shear_matrices,
    tilts_first,
    transform_x,
)
from inverse.physics.tilt import TiltProjection
from inverse.solvers.linear import ImageOperator


class ForwardOperator(ImageOperator, Protocol):
    """Any operator of a tilt series, linear or not."""

    volume_shape: tuple[int, int, int]

    def A(self, x: torch.Tensor, /) -> torch.Tensor: ...


class Misfit(NamedTuple):
    """Of some rows: what is differentiated (), and sums over pixels fitted and held out of (A x - y)^2 / noise."""

    loss: torch.Tensor
    fitted: float
    held_out: float


class WholeMisfit:
    """Misfit of a whole volume under any operator.

    With v > 0 the loss has the gradient of equation (3), and no other meaning.

    Parameters
    ----------
    physics : operator
    images : tensor (tilt, y, x)
    noise : tensor (tilt, 1, 1)
    fitted : tensor (tilt, y, x)
        1 for the pixels that are fitted, 0 for those that are not.
    variance : float
        v of equation (2), for a `TiltPhysics`; 0 for W = 1 / noise.
    """

    def __init__(
        self, physics: ForwardOperator, images: torch.Tensor, noise: torch.Tensor, fitted: torch.Tensor, variance: float
    ) -> None:
        self.physics, self.images, self.noise, self.fitted = physics, images, noise, fitted
        self.n_rows = physics.volume_shape[1]
        self.measured = torch.ones_like(images)
        self.nearby = None
        if variance > 0 and isinstance(physics, TiltPhysics):
            self.damping = float(noise.mean()) / variance
            self.nearby = physics.approximate_inverse(self.damping, images.new_zeros(1, 1, *physics.volume_shape))

    def __call__(self, volume: torch.Tensor, rows: torch.Tensor | None = None) -> Misfit:
        """Of a volume (z, y, x), differentiable; there are no rows to choose."""
        if self.nearby is None:
            residual = self.physics.A(volume[None, None])[0, 0] - self.images
            loss = 0.5 * (residual.square() * self.fitted / self.noise).sum()
        else:
            assert isinstance(self.physics, TiltPhysics)
            with torch.no_grad():
                residual = self.physics.A(volume[None, None])[0, 0] - self.images
                back = self.physics.A_adjoint((residual * self.fitted / self.noise)[None, None])
                gradient = self.damping * self.nearby(back)[0, 0]
            loss = (volume * gradient).sum()
        return self.found(loss, residual)

    def found(self, loss: torch.Tensor, residual: torch.Tensor) -> Misfit:
        """Of a loss () for each pixel, and residuals (tilt, y, x)."""
        squares = residual.detach().square() / self.noise
        parts = ((squares * part).sum() for part in (self.fitted, 1 - self.fitted))
        return Misfit(loss / residual.numel(), *(float(part) for part in parts))


class RowMisfit:
    """Misfit of some rows of a volume, under a `TiltProjection` that is tilted about y and no more.

    Parameters as in `WholeMisfit`. Rows of the volume that no image shows are not measured.
    """

    def __init__(
        self,
        physics: TiltProjection,
        images: torch.Tensor,
        noise: torch.Tensor,
        fitted: torch.Tensor,
        variance: float,
    ) -> None:
        scale = physics.scale.to(images)
        self.noise, self.n_rows, self.geometry = noise * scale**2, physics.volume_shape[1], physics.geometry
        self.images, self.fitted = physics.fit_rows(images * scale), physics.fit_rows(fitted)
        self.measured = physics.fit_rows(torch.ones_like(images))
        angles, geometry = physics.angles[0].detach(), physics.geometry
        self.shear = shear_matrices(angles, geometry, image_weights(angles, geometry), images)
        self.waves = image_matrices(angles, geometry, images)  # (tilt, 2 k, u)
        self.white = None if variance == 0 else _whitening(angles, geometry, self.noise, variance)

    def __call__(self, volume: torch.Tensor, rows: torch.Tensor | None = None) -> Misfit:
        """Of rows (z, row, x) of a volume, all or those numbered; differentiable."""
        some = slice(None) if rows is None else rows
        fitted, measured = self.fitted[:, some], self.measured[:, some]
        seen = shear(self.shear, transform_x(volume, self.geometry))  # (k, 2 tilt, row)
        projected = torch.bmm(tilts_first(seen).transpose(1, 2), self.waves)  # (tilt, row, u)
        residual = projected - self.images[:, some]
        squares = residual.detach().square() / self.noise
        if self.white is None:
            loss = (residual.square() * fitted / self.noise).sum()
        else:
            lines = torch.bmm(self.waves, (residual * fitted).transpose(1, 2))  # (tilt, 2 k, row)
            loss = torch.bmm(self.white, frequencies_first(lines)).square().sum()
        parts = ((squares * part).sum() for part in (fitted, measured - fitted))
        return Misfit(0.5 * loss / residual.numel(), *(float(part) for part in parts))


def _whitening(angles: torch.Tensor, geometry: TiltGeometry, noise: torch.Tensor, variance: float) -> torch.Tensor:
    """L^-1 (k, 2 tilt, 2 tilt), on pairs (Re, Im), with L L^H = v G + noise at each frequency.

    r^T (v A A^T + noise)^-1 r is the sum over frequencies of |L^-1 S r|^2, in the symbols of
    `inverse.physics.closed_form`: exactly on the stretched grid, and on the camera's up to the edges of the images.
    Frequencies that no voxel has are left out.
    """
    gram = variance * gram_matrices(angles, geometry)
    factor = torch.linalg.cholesky(gram + torch.diag(noise.flatten().to(gram)))
    eye = torch.eye(len(angles), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)  # (k, tilt, tilt)
    length = geometry.period * (cosines(angles) if geometry.grid == "camera" else torch.ones_like(cosines(angles)))
    unitary = resolved(angles, geometry) * pair_weights(geometry, angles.device).sqrt()[:, None] / length.sqrt()
    inverse = inverse * unitary[:, None, :]
    turned = torch.stack([inverse, 1j * inverse], -1)  # of a real and of an imaginary part
    return torch.stack([turned.real, turned.imag], 2).flatten(3).flatten(1, 2).to(noise)


def misfit_of(
    physics: ForwardOperator, images: torch.Tensor, noise: torch.Tensor, fitted: torch.Tensor, variance: float
) -> WholeMisfit | RowMisfit:
    """The misfit that suits an operator; parameters as in `WholeMisfit`."""
    if isinstance(physics, TiltProjection) and len(physics.angles) == 1:
        try:
            return RowMisfit(physics, images, noise, fitted, variance)
        except ValueError:
            pass
    return WholeMisfit(physics, images, noise, fitted, variance)
