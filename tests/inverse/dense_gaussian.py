"""The Gaussian model of volume and images written out as matrices."""

import math

import torch

from inverse.physics.gaussian import slab


def dense(physics, model):
    """A as a matrix (pixel, voxel), and the covariances of voxels and of pixels, from their definitions."""
    shape = physics.volume_shape
    n = math.prod(shape)
    matrix = physics.A(torch.eye(n, dtype=torch.float64).reshape(n, 1, *shape)).reshape(n, -1).T
    deep = (2 * shape[0], *shape[1:])
    k = torch.stack(torch.meshgrid(*[torch.fft.fftfreq(m, dtype=torch.float64) for m in deep], indexing="ij"))
    acf = torch.fft.ifftn(model.power(k.square().sum(0).sqrt())).real
    at = torch.stack(torch.meshgrid(*[torch.arange(m) for m in shape], indexing="ij")).flatten(1)
    lag = at[:, :, None] - at[:, None]
    window = slab(shape[0], model.thickness)[0][at[0]]
    prior = acf[tuple(d % m for d, m in zip(lag, deep, strict=True))] * window[:, None] * window
    noise = model.noise.repeat_interleave(math.prod(shape[1:]))
    return matrix, prior, matrix @ prior @ matrix.T + torch.diag(noise)
