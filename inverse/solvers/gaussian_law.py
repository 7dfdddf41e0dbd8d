"""Gaussian laws of a volume: stationary priors, and posteriors that are diagonal plus low rank in Fourier space.

Let the prior be stationary of power S, seen through a window w(z), and let u be its white coordinates,

    v = L u,        L = w P F S^(1/2),        u ~ N(0, 1),                                               (1)

with F the orthonormal Hartley transform, which is real, symmetric and its own inverse, and P the first layers of a box
that may be deeper than the volume. F diag(d) F with d(k) = d(-k) is the same matrix as with the unitary Fourier
transform. A law of u of the precision Q, diagonal plus low rank, is handled by its covariance

    Q^-1 = D^1/2 (1 - U diag(mu / (1 + mu)) U^T) D^1/2,                                                  (2)

with D diagonal and U orthonormal: the logarithm of its determinant is a sum, and a draw costs one transform and two
products with U.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cryosim.core.fourier import frequencies
from inverse.physics.gaussian import GaussianModel, slab

_TOGETHER = 16
"""Volumes that are transformed at once."""


class StationaryPrior(NamedTuple):
    """A Gaussian prior of zero mean: stationary noise, seen through a window along z.

    Attributes
    ----------
    spectrum : tensor (layer, y, x)
        S: mean of |v^|^2 / voxels in the order of the FFT [unit of the volume^2], symmetric and not negative, on as
        many layers as the volume has, or more.
    window : tensor (z,)
        w [1].
    """

    spectrum: torch.Tensor
    window: torch.Tensor

    @classmethod
    def of(cls, spectrum: torch.Tensor) -> StationaryPrior:
        """That of periodic volumes of the shape of `spectrum` (z, y, x).

        Raises
        ------
        ValueError
            For a spectrum that is not three-dimensional, positive, finite and symmetric.
        """
        if spectrum.ndim != 3 or not ((spectrum > 0) & torch.isfinite(spectrum)).all():
            raise ValueError(
                f"StationaryPrior: expected a positive, finite spectrum (z, y, x), got {tuple(spectrum.shape)} from "
                f"{float(spectrum.min()):g} to {float(spectrum.max()):g}."
            )
        if not torch.allclose(spectrum, opposite(spectrum), rtol=1e-4):
            raise ValueError("StationaryPrior: expected S(k) = S(-k) in the order of the FFT, as of a real volume.")
        return cls(spectrum, spectrum.new_ones(spectrum.shape[0]))

    @classmethod
    def of_model(cls, model: GaussianModel, shape: tuple[int, int, int]) -> StationaryPrior:
        """The prior of a `GaussianModel` on volumes of a `shape` (z, y, x), float64."""
        depth, rows, width = shape
        device = model.spectrum.device
        kz, ky, kx = (frequencies(n, dtype=torch.float64, device=device) for n in (2 * depth, rows, width))
        power = model.power((kz[:, None, None] ** 2 + ky[:, None] ** 2 + kx**2).sqrt())
        return cls(power, slab(depth, model.thickness)[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x) of the volumes."""
        return len(self.window), self.spectrum.shape[1], self.spectrum.shape[2]

    def volume(self, u: torch.Tensor) -> torch.Tensor:
        """L u: volumes (..., z, y, x) of white coordinates (..., layer, y, x)."""
        layers = hartley(u * self.spectrum.sqrt().to(u))[..., : len(self.window), :, :]
        return (layers * self.window[:, None, None].to(u)).contiguous()

    def adjoint(self, v: torch.Tensor) -> torch.Tensor:
        """L^T v: (..., layer, y, x)."""
        wide = v.new_zeros(*v.shape[:-3], *self.spectrum.shape)
        wide[..., : len(self.window), :, :] = v * self.window[:, None, None].to(v)
        return hartley(wide) * self.spectrum.sqrt().to(v)

    def variance(self, d: torch.Tensor) -> torch.Tensor:
        """Diagonal (..., z, 1, 1) of L diag(d) L^T, for d (..., layer, y, x) with d(k) = d(-k)."""
        return (self.spectrum.to(d) * d).mean((-3, -2, -1), keepdim=True) * self.window.to(d)[:, None, None] ** 2


class LowRankGaussian(NamedTuple):
    """N(m, Q^-1) in white coordinates, of one or each item of a batch; see equation (2).

    Attributes
    ----------
    prior : StationaryPrior
        What the coordinates are white in.
    mean : tensor (batch, 1, layer, y, x)
    diagonal : tensor (1 or batch, 1, layer, y, x)
        D.
    directions : tensor (1 or batch, direction, n)
        U^T, orthonormal.
    gains : tensor (1 or batch, direction)
        mu.
    """

    prior: StationaryPrior
    mean: torch.Tensor
    diagonal: torch.Tensor
    directions: torch.Tensor
    gains: torch.Tensor

    def covariance(self, u: torch.Tensor) -> torch.Tensor:
        """Q^-1 u of coordinates (batch, 1, layer, y, x)."""
        return self._root(self._changed(u * self.diagonal.sqrt(), 1 / (1 + self.gains)))

    def precision_form(self, u: torch.Tensor) -> torch.Tensor:
        """<u, Q u> (batch,) of coordinates (batch, 1, layer, y, x), float64."""
        unit = (u / self.diagonal.sqrt()).double().flatten(1)
        along = (self.directions.double() @ unit[..., None])[..., 0]
        return unit.square().sum(1) + (self.gains.double() * along.square()).sum(1)

    def drawn(self, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
        """A draw of N(0, Q^-1) of the shape of `like`."""
        noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return self._root(self._changed(noise, (1 + self.gains).rsqrt()))

    def _root(self, u: torch.Tensor) -> torch.Tensor:
        return u * self.diagonal.sqrt()

    def _changed(self, u: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """u with its parts along U times `factors`."""
        along = self.directions @ u.flatten(-4)[..., None]  # (..., batch, direction, 1)
        return u + (self.directions.mT @ (along * (factors - 1)[..., None])).reshape(u.shape)

    @property
    def variances(self) -> torch.Tensor:
        """Diagonal of Q^-1 (1 or batch, 1, layer, y, x)."""
        less = (self.directions**2 * (self.gains / (1 + self.gains))[..., None]).sum(1)
        return self.diagonal * (1 - less.reshape(self.diagonal.shape))

    @property
    def log_determinant(self) -> torch.Tensor:
        """Of Q^-1 (1 or batch,), float64."""
        return self.diagonal.double().log().flatten(1).sum(1) - self.gains.double().log1p().sum(1)

    def voxel_mean(self) -> torch.Tensor:
        """Mean (batch, 1, z, y, x) of the volume."""
        return self.prior.volume(self.mean)

    def voxel_std(self) -> torch.Tensor:
        """Standard deviation (1 or batch, 1, z, y, x) of each voxel."""
        variance = self.prior.variance(self.diagonal).expand(*self.diagonal.shape[:2], *self.prior.shape).clone()
        if not self.gains.numel():
            return variance.sqrt()
        for item, (rows, gains) in enumerate(zip(self.directions, self.gains, strict=True)):
            shares = gains / (1 + gains)
            for some, share in zip(rows.split(_TOGETHER), shares.split(_TOGETHER), strict=True):
                u = some.reshape(-1, *self.diagonal.shape[2:]) * self.diagonal[item, 0].sqrt()
                variance[item, 0] -= (self.prior.volume(u) ** 2 * share[:, None, None, None]).sum(0)
        return variance.clamp_min(0).sqrt()

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """Covariance of the volume times v (batch, 1, z, y, x): a preconditioner for `langevin`."""
        u = self.prior.adjoint(v).to(self.diagonal).unflatten(0, (-1, len(self.diagonal)))  # items one after another
        return self.prior.volume(self.covariance(u).flatten(0, 1)).to(v)

    def noise(self, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A draw of zero mean and that covariance, of the shape of `like` (batch, 1, z, y, x)."""
        u = self.diagonal.new_empty(len(like), 1, *self.prior.spectrum.shape)
        drawn = self.drawn(generator, u.unflatten(0, (-1, len(self.diagonal)))).flatten(0, 1)
        return self.prior.volume(drawn).to(like)

    def samples(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draws (sample, batch, 1, z, y, x) of the volume."""
        draws = [self.prior.volume(self.mean + self.drawn(generator, self.mean)) for _ in range(n)]
        return torch.stack(draws)


def hartley(u: torch.Tensor) -> torch.Tensor:
    """Orthonormal Hartley transform of the last three axes: sum of u (cos + sin); its own inverse."""
    waves = torch.fft.fftn(u.contiguous(), dim=(-3, -2, -1), norm="ortho")
    return waves.real - waves.imag


def opposite(values: torch.Tensor) -> torch.Tensor:
    """Values (..., z, y, x) at -k, in the order of the FFT."""
    return values.flip((-3, -2, -1)).roll((1, 1, 1), (-3, -2, -1))
