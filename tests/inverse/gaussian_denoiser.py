"""The exact denoiser of a stationary Gaussian prior, of which everything is known in closed form."""

from __future__ import annotations

import torch
from deepinv.models.base import Denoiser


class GaussianDenoiser(Denoiser):
    """Posterior mean of periodic Gaussian volumes of zero mean: the Wiener filter D^ = S / (S + sigma^2) x^.

    It is the proximal operator of sigma^2 v^T C^-1 v / 2, too, C the covariance of the volumes.

    Parameters
    ----------
    spectrum : tensor (z, y, x)
        S, mean of |v^|^2 / voxels in the order of the FFT; symmetric and positive. White: the variance of a voxel.
    """

    spectrum: torch.Tensor

    def __init__(self, spectrum: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("spectrum", spectrum)

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **_) -> torch.Tensor:
        s = self.spectrum.to(x)
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1, 1)
        return torch.fft.ifftn(torch.fft.fftn(x, dim=(-3, -2, -1)) * (s / (s + level**2)), dim=(-3, -2, -1)).real

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draws (n, 1, z, y, x) from the prior."""
        s = self.spectrum
        white = torch.randn((n, 1, *s.shape), generator=generator, dtype=s.dtype)
        return torch.fft.ifftn(torch.fft.fftn(white, dim=(-3, -2, -1)) * s.sqrt(), dim=(-3, -2, -1)).real

    def covariance(self) -> torch.Tensor:
        """C (voxels, voxels), for volumes flattened in the order z, y, x."""
        n = self.spectrum.numel()
        deltas = torch.eye(n, dtype=self.spectrum.dtype).reshape(n, *self.spectrum.shape)
        return torch.fft.ifftn(torch.fft.fftn(deltas, dim=(1, 2, 3)) * self.spectrum, dim=(1, 2, 3)).real.flatten(1)


def smooth_spectrum(
    shape: tuple[int, int, int], *, variance: float = 1.0, length: float = 3.0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """A power spectrum (z, y, x) like that of matter: S ~ (1 + (length k)^2)^-2, of the given variance of a voxel."""
    axes = [torch.fft.fftfreq(n, dtype=torch.float64) for n in shape]
    k2 = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    s = (1 + length**2 * k2) ** -2
    return (s * variance / s.mean()).to(dtype)
