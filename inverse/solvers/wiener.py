"""The Wiener filter without a knob: its Gaussian model is estimated from the images, and its posterior is exact.

The volume is stationary Gaussian noise g of radial power S(|k|), seen through a slab w(z). In plane, at one frequency
(kx, ky), its layers have the covariance

    L = w Phi diag(S) Phi^H w,        Phi_zm = exp(2 pi i z m / M) / sqrt(M),    S_m = S(|(kx, ky, m / M)|)      (1)

with M = 2 depth frequencies along z: twice the depth, so that the first layer does not touch the last. With B(kx) the
(tilts x depth) matrix of `inverse.physics.closed_form` and white noise of variance n_t in tilt t, the images are
jointly Gaussian, and on the stretched grid only the tilts at one (kx, ky) depend on each other, by the small matrix

    C = B L B^H + diag(n) = V V^H,    V = [B w Phi diag(S)^(1/2), diag(n)^(1/2)].                                 (2)

Whatever is asked of the model is in these matrices. Each power p (one S_m or n_t) scales one column of V, so that with
X = V^H C^-1 V the log-likelihood of an amplitude y has the derivatives and the Fisher information

    d/d log p = |V^H C^-1 y|^2_p - X_pp,        I_pq = |X_pq|^2                                                  (3)

(Mardia & Marshall 1984, doi:10.1093/biomet/71.1.135). The posterior of the layers is Gaussian, of mean and covariance

    L B^H C^-1 y,        L - L B^H C^-1 B L,                                                                     (4)

and a draw from it is a draw of the prior, corrected by the mean that belongs to what its own noisy images lack of the
measured ones (Hoffman & Ribak 1991, doi:10.1086/186160).

On the camera grid the images' edges couple the frequencies. There the model is estimated on the field that all tilts
share, resampled to the stretched grid and faded out, and the filter lets the specimen reach on in x as
`least_squares(open_sides=True)` does: both are good away from the edges only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from cryosim.core.fourier import frequencies as full_frequencies
from cryosim.core.fourier import resampling_matrix
from cryosim.core.record import Record, item
from inverse.physics.closed_form import edge_weights, image_frequencies
from inverse.physics.spectral import (
    TiltGeometry,
    cosines,
    frequencies,
    pair_weights,
    project,
    slopes,
    transform_x_adjoint,
)
from inverse.solvers.linear import TiltOperator

_BLOCK = 2**24
"""Bytes that the matrices of the frequencies worked on at once may fill."""
_SLOPE, _BEND = 0.5, 0.2
"""Deviations of the first and second differences of log S from ring to ring that a spectrum is expected to have."""
_LEAST_NOISE = 1e-6
"""Of an image's power: images without noise would have none, and an infinite likelihood."""
_FADE = 0.1
"""Part of each side over which images of the camera are faded out before the model is estimated from them."""


class VolumeOperator(TiltOperator, Protocol):
    """A `TiltProjection` that also tells the size of its volume."""

    volume_shape: tuple[int, ...]


class GaussianModel(Record):
    """Prior of the volume and noise of the images.

    Attributes
    ----------
    spectrum : tensor (ring,)
        S at `frequencies`: variance of a Fourier amplitude of the volume, under the unitary transform, so that the
        mean of S over all frequencies is the variance of a voxel [unit of the volume^2]. Between rings log S is linear.
    frequencies : tensor (ring,)
        Rising [1/voxel].
    noise : tensor (tilt,)
        Variance of a pixel, of line integrals (images times the operator's `scale`) [unit of the volume^2 · voxel^2].
    thickness : tensor ()
        Of the slab that holds the specimen, in the middle of the volume; at most depth + 1, which fills it [voxel].
    """

    spectrum: torch.Tensor = item(1)
    frequencies: torch.Tensor = item(1)
    noise: torch.Tensor = item(1)
    thickness: torch.Tensor = item(0)

    def power(self, frequency: torch.Tensor) -> torch.Tensor:
        """S (...) at a `frequency` (...) [1/voxel]."""
        lower, share = self.between(frequency)
        logs = self.spectrum.double().log()
        return torch.exp((1 - share) * logs[lower] + share * logs[lower + 1])

    def between(self, frequency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ring below each `frequency` (...), and how far it lies on the way to the next one, 0 to 1."""
        rings = self.frequencies.double()
        lower = (torch.searchsorted(rings, frequency.contiguous(), right=True) - 1).clamp(0, len(rings) - 2)
        return lower, ((frequency - rings[lower]) / (rings[lower + 1] - rings[lower])).clamp(0, 1)


class ModelEstimate(Record):
    """What `estimate_model` returns.

    Attributes
    ----------
    model : GaussianModel
    standard_errors : GaussianModel
        Of the model's values, in their place, from the Fisher information; 0 for what was given.
    log_likelihood : tensor (step + 1,)
        At the start and after each step, with the weak preference for smooth spectra.
    """

    model: GaussianModel
    standard_errors: GaussianModel
    log_likelihood: torch.Tensor = item(1)


class Wiener(Record):
    """What `wiener` returns.

    Attributes
    ----------
    volume : tensor (z, y, x) or (batch, channel, z, y, x)
        Posterior mean.
    model : GaussianModel
    """

    volume: torch.Tensor = item(3)
    model: GaussianModel


def wiener(physics: TiltOperator, images: torch.Tensor, model: GaussianModel | None = None) -> Wiener:
    """Posterior mean of the volume under a Gaussian model: the linear estimate of least mean squared error.

    Parameters
    ----------
    physics : TiltProjection
        On the stretched grid the result is exact; for the camera grid see the top of this file.
    images : tensor (tilt, y, x) or (batch, channel, tilt, y, x)
        Line integrals [unit of the volume · voxel], over `physics.scale`; the surroundings of the specimen at 0.
    model : GaussianModel, optional
        Estimated from the images when left out.

    Raises
    ------
    ValueError
        For images that do not fit, or a model that does not fit or is not positive.
    """
    stack = physics.fit_rows(_stack(physics, images))
    model = _checked(estimate_model(physics, images).model if model is None else model, physics)
    correct = _correction(physics.angles[0].detach(), physics.geometry, model)
    volume = torch.stack([correct(one) for one in stack]).to(images.dtype)
    return Wiener(volume[0] if images.ndim == 3 else volume.unflatten(0, images.shape[:2]), model)


def posterior_samples(
    physics: TiltOperator, images: torch.Tensor, model: GaussianModel, n: int, generator: torch.Generator
) -> torch.Tensor:
    """Draws (sample, z, y, x) from the posterior of the volume, given images (tilt, y, x).

    Each is a draw of the prior, projected with noise, corrected by the filter. The generator is one of the images'
    device.

    Raises
    ------
    ValueError
        As `wiener`.
    """
    if images.ndim != 3:
        raise ValueError(f"posterior_samples: expected images (tilt, y, x), got {tuple(images.shape)}.")
    measured = physics.fit_rows(_stack(physics, images))[0]
    model = _checked(model, physics)
    angles, geometry = physics.angles[0].detach(), physics.geometry
    # on the camera grid the specimen reaches on in x over the whole period
    wide = TiltGeometry(geometry.depth, geometry.period, geometry.image_width, geometry.period, geometry.grid)
    correct = _correction(angles, wide, model)
    start = wide.width // 2 - geometry.width // 2
    samples = images.new_empty(n, geometry.depth, measured.shape[1], geometry.width)
    for sample in samples:
        drawn = prior_sample(model, (geometry.depth, measured.shape[1], wide.width), generator)
        noise = torch.randn(measured.shape, generator=generator, dtype=torch.float64, device=generator.device)
        seen = project(drawn, angles, wide) + noise * model.noise.double().sqrt()[:, None, None]
        sample.copy_((drawn + correct(measured - seen))[..., start : start + geometry.width])
    return samples


def posterior_std(physics: VolumeOperator, model: GaussianModel) -> torch.Tensor:
    """Standard deviation (z, y, x) of each voxel of the posterior [unit of the volume], float64.

    It depends on z only, and not on the images; on the camera grid it holds away from the edges of the field.
    It takes the model for certain: where an estimated power is not, because the noise hides it, nor is this.

    Raises
    ------
    ValueError
        For a model that does not fit or is not positive.
    """
    model = _checked(model, physics)
    angles, geometry, rows = physics.angles[0].detach(), physics.geometry, physics.volume_shape[1]
    layers, _ = layer_waves(geometry.depth, model.thickness)
    variance = torch.zeros(geometry.depth, dtype=torch.float64, device=angles.device)
    heights, each = _heights(rows, angles.device), 2 * _share(rows, angles.device)
    pairs = _pairs(geometry.period, angles.device)
    for block, waves, root in _blocks(angles, geometry, model, heights):
        seen, prior = waves * root, layers * root
        white = torch.linalg.solve_triangular(_factor(seen, model.noise.double()), seen, upper=False)
        left = prior.abs().square().sum(3) - (prior @ white.mH).abs().square().sum(3)  # (k, h, z)
        variance += torch.einsum("k,h,khz->z", pairs[block], each, left)
    std = (variance.clamp_min(0) / (rows * geometry.period)).sqrt()
    return std[:, None, None].expand(physics.volume_shape)


def prior_sample(model: GaussianModel, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """A volume (z, y, x) drawn from the prior, float64, periodic in y and x."""
    depth, rows, width = shape
    white = torch.randn(2 * depth, rows, width, generator=generator, dtype=torch.float64, device=generator.device)
    kz, ky, kx = (full_frequencies(n, dtype=torch.float64, device=white.device) for n in white.shape)
    power = model.power((kz[:, None, None] ** 2 + ky[:, None] ** 2 + kx**2).sqrt())
    drawn = torch.fft.ifftn(torch.fft.fftn(white) * power.sqrt()).real[:depth]
    return drawn * slab(depth, model.thickness)[0][:, None, None]


def marginal_log_likelihood(
    images: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry, model: GaussianModel
) -> torch.Tensor:
    """Logarithm () of the density of images (tilt, y, x) on the stretched grid, whatever the volume.

    Exact, and differentiable in the images, the angles and the model.

    Parameters
    ----------
    images : tensor (tilt, y, x) or (item, tilt, y, x)
        Line integrals; items are independent volumes.
    angles : tensor (tilt,)
        [deg].
    geometry : TiltGeometry
    model : GaussianModel

    Raises
    ------
    ValueError
        On the camera grid, where it is no product over frequencies, or for images of another width.
    """
    return _log_likelihood(_on_stretched_grid(images, geometry), angles, model)


def score_and_information(
    images: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry, model: GaussianModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient (parameter,) of `marginal_log_likelihood`, and Fisher information (parameter, parameter).

    The parameters are the logarithms of spectrum, noise and thickness, in this order. Arguments as there.
    """
    return _score_and_information(_on_stretched_grid(images, geometry), angles, model)


def estimate_model(
    physics: TiltOperator,
    images: torch.Tensor,
    *,
    thickness: float | None = None,
    rings: int = 20,
    every: int = 1,
    max_steps: int = 50,
    tolerance: float = 1e-3,
) -> ModelEstimate:
    """The Gaussian model under which the images are most probable, by Fisher scoring.

    The mean of the images is not used. The rings lie ever denser towards frequency 0; where the images say little of
    them, a weak preference holds log S flat and straight: its first and second differences from ring to ring are
    expected to be normal of deviation 0.5 and 0.2. On the camera grid the standard errors know nothing of what the fade
    at the edges takes from the data, and are a little small.

    Parameters
    ----------
    physics : TiltProjection
        With one row of angles for all items.
    images : tensor (tilt, y, x) or (batch, channel, tilt, y, x)
        Items and channels share the model.
    thickness : float, optional
        Of the slab [voxel]; estimated when left out.
    rings : int
        Of the spectrum, at least 3.
    every : int
        Use each so many-th frequency of the rows only: so much faster, and standard errors larger by the root of it.
    max_steps : int
        A warning says so when they do not suffice.
    tolerance : float
        Rise of the log-likelihood below which to stop [1]; 0.5 is one standard error of one parameter.

    Raises
    ------
    ValueError
        For images that do not fit, are constant or not finite, or numbers out of bounds.
    """
    angles, depth = physics.angles[0].detach(), physics.geometry.depth
    if thickness is not None and not 1 <= thickness <= depth + 1:
        raise ValueError(
            f"estimate_model: expected a thickness from 1 to the depth + 1, {depth + 1} [voxel], got {thickness}."
        )
    if rings < 3:
        raise ValueError(f"estimate_model: expected at least 3 rings, got {rings}.")
    if not 1 <= every <= images.shape[-2] // 4:
        raise ValueError(f"estimate_model: expected every from 1 to a quarter of the rows, got {every}.")
    stack = _stack(physics, images)
    if not torch.isfinite(stack).all():
        raise ValueError("estimate_model: images hold values that are not finite; leave those tilts out.")
    constant = stack.std((0, 2, 3)) == 0
    if constant.any():
        which = constant.nonzero().flatten().tolist()
        raise ValueError(f"estimate_model: the images of the tilts {which} are constant; leave those tilts out.")
    if physics.geometry.grid == "stretched":
        data = _on_stretched_grid(stack, physics.geometry)
    else:
        data = _shared_field(stack, angles, physics.geometry)
    data.weight[0, 0] = 0.0
    data = data._replace(seen=data.seen[:, ::every], weight=data.weight[:, ::every], heights=data.heights[::every])
    model = _start(data, angles, rings, 0.8 * depth if thickness is None else thickness)
    return _scored(data, angles, model, thickness is None, max_steps, tolerance)


class _Data(NamedTuple):
    """Amplitudes of images at kx, ky >= 0, and how much each counts."""

    seen: torch.Tensor
    """(k, h, tilt, column), complex128; the columns are +ky and -ky of each item."""
    weight: torch.Tensor
    """(k, h): for how many frequencies of the plane a column stands."""
    measured: torch.Tensor
    """(k, tilt): 1, or 0 where a tilt's amplitude is unknown."""
    heights: torch.Tensor
    """ky (h,) [1/voxel]."""
    geometry: TiltGeometry


def _on_stretched_grid(images: torch.Tensor, geometry: TiltGeometry) -> _Data:
    """Amplitudes of images ([item,] tilt, y, x), with the unpaired column of an even width."""
    if geometry.grid != "stretched":
        raise ValueError(f'geometry: expected the grid "stretched", got "{geometry.grid}"; see `estimate_model`.')
    if images.ndim not in (3, 4) or images.shape[-1] != geometry.period:
        raise ValueError(
            f"images: expected ([item,] tilt, y, x) of width {geometry.period}, got {tuple(images.shape)}."
        )
    return _amplitudes(images, geometry, torch.ones(geometry.period // 2 + 1, images.shape[-3]).to(images.device))


def _shared_field(images: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry) -> _Data:
    """Amplitudes of camera images (item, tilt, y, u) at pixels cos t apart, so that all see the same x.

    A tilt holds nothing beyond its own Nyquist frequency: not measured. The factor cos^(1/2) t keeps noise white of the
    same variance, and goes with the weights of the camera grid.
    """
    n, rows = geometry.image_width, images.shape[-2]
    images = images - images.mean((-2, -1), keepdim=True)  # the fade must not turn it into structure
    fade = [_fade(size, images.device) for size in (rows, n)]
    stretched = []
    for t, cos in enumerate(cosines(angles)):
        matrix = resampling_matrix(n, n, cos, dtype=torch.float64, device=images.device)
        stretched.append(images[:, t].double() @ matrix.T * cos.sqrt())
    field = torch.stack(stretched, 1) * fade[0][:, None] * fade[1]
    shared = TiltGeometry(geometry.depth, n, n, n, "camera")
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device=images.device)[:, None] / n
    margin = 2 / n  # over which the window blurs the band's edge
    measured = (k + margin <= 0.5 * cosines(angles)) & ((k + margin) * slopes(angles).abs() <= 0.5)
    return _amplitudes(field, shared, measured)


def _fade(n: int, device: torch.device) -> torch.Tensor:
    """Window (n,) with cosine edges and a mean square of 1."""
    at = torch.arange(n, dtype=torch.float64, device=device) + 0.5
    window = torch.sin(0.5 * torch.pi * (torch.minimum(at, n - at) / (_FADE * n)).clamp_max(1)) ** 2
    return window / window.square().mean().sqrt()


def _amplitudes(images: torch.Tensor, geometry: TiltGeometry, measured: torch.Tensor) -> _Data:
    images = images.double() if images.ndim == 4 else images[None].double()
    seen = torch.fft.rfft2(images, norm="ortho").permute(3, 2, 1, 0)  # (k, row, tilt, item)
    rows, width = images.shape[2:]
    measured = measured.double()
    columns = _split(seen, 1) * measured[:, None, :, None]
    weight = _pairs(width, images.device)[:, None] * _share(rows, images.device)
    return _Data(columns, weight, measured, _heights(rows, images.device), geometry)


def _pairs(n: int, device: torch.device) -> torch.Tensor:
    """(k,): 2 for the frequencies k >= 0 of an axis of n samples that stand for a pair +-k, else 1."""
    k = torch.arange(n // 2 + 1, device=device)
    return torch.where((2 * k) % n == 0, 1.0, 2.0).double()


def _heights(rows: int, device: torch.device) -> torch.Tensor:
    """The frequencies ky >= 0 (h,) of an axis of `rows` [1/voxel]."""
    return torch.arange(rows // 2 + 1, dtype=torch.float64, device=device) / rows


def _share(rows: int, device: torch.device) -> torch.Tensor:
    """(h,): 1 where +ky and -ky differ, 1/2 where they are the same frequency."""
    h = torch.arange(rows // 2 + 1, device=device)
    return torch.where((2 * h) % rows == 0, 0.5, 1.0).double()


def _split(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Unshifted frequencies of the rows as ky >= 0 along `axis`, with columns +ky and -ky on the last."""
    rows = values.shape[axis]
    h = torch.arange(rows // 2 + 1, device=values.device)
    return torch.cat([values.index_select(axis, h), values.index_select(axis, -h % rows)], -1)


def slab(depth: int, thickness: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w (z,) and its derivative by the thickness: a slab about the box's middle with smooth edges two voxels wide.

    A thickness of depth + 1 fills the box. Narrower edges would leave the likelihood with kinks in the thickness.
    """
    z = torch.arange(depth, dtype=torch.float64, device=thickness.device)
    inside = ((thickness.double() / 2 + 1 - (z - (depth - 1) / 2).abs()) / 2).clamp(0, 1)
    return inside**2 * (3 - 2 * inside), 1.5 * inside * (1 - inside)


def layer_waves(depth: int, thickness: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w Phi (z, m) of equation (1), complex128, and its derivative by the thickness."""
    z = torch.arange(depth, dtype=torch.float64, device=thickness.device) - depth // 2
    turns = z[:, None] * full_frequencies(2 * depth, dtype=torch.float64, device=z.device)
    phi = torch.polar(torch.full_like(turns, (2 * depth) ** -0.5), 2 * torch.pi * turns)
    inside, change = slab(depth, thickness)
    return inside[:, None] * phi, change[:, None] * phi


def _lengths(k: torch.Tensor, heights: torch.Tensor, depth: int) -> torch.Tensor:
    """|(kx, ky, kz)| (k, h, m) [1/voxel]."""
    kz = full_frequencies(2 * depth, dtype=torch.float64, device=k.device)
    return (k[:, None, None] ** 2 + heights[:, None] ** 2 + kz**2).sqrt()


def _blocks(
    angles: torch.Tensor, geometry: TiltGeometry, model: GaussianModel, heights: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Slices of kx >= 0 small enough for the memory, each with B w Phi (k, 1, tilt, m) and S^(1/2) (k, h, 1, m)."""
    layers, _ = layer_waves(geometry.depth, model.thickness)
    shears = _shears(angles, geometry)
    k = torch.arange(len(shears), dtype=torch.float64, device=angles.device) / geometry.period
    tilts, powers = len(angles), layers.shape[1] + len(angles)
    step = max(1, _BLOCK // (16 * len(heights) * powers * (powers + tilts)))
    for start in range(0, len(k), step):
        block = slice(start, start + step)
        root = model.power(_lengths(k[block], heights, geometry.depth)).sqrt()
        yield block, (shears[block] @ layers)[:, None], root[:, :, None]


def _shears(angles: torch.Tensor, geometry: TiltGeometry) -> torch.Tensor:
    """B (k, tilt, z), complex128; zeros for the unpaired frequency of an even period, which no tilt sees."""
    k = frequencies(geometry, angles.device)
    z = torch.arange(geometry.depth, device=angles.device).double() - geometry.depth // 2
    turns = (k[:, None] * slopes(angles))[:, :, None] * z
    turns = turns - turns.detach().round()
    weights = edge_weights(angles, geometry)[:, :, None]
    shears = weights * torch.polar(torch.ones_like(turns), -2 * torch.pi * turns)
    unpaired = shears.new_zeros(1 - geometry.period % 2, *shears.shape[1:])
    return torch.cat([shears, unpaired])


def _factor(seen: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Cholesky factor (k, h, tilt, tilt) of C, from B w Phi S^(1/2) and the noise (tilt,) or (k, tilt)."""
    noise = noise.expand(len(seen), noise.shape[-1])
    return torch.linalg.cholesky(seen @ seen.mH + torch.diag_embed(noise)[:, None])


def _log_likelihood(data: _Data, angles: torch.Tensor, model: GaussianModel) -> torch.Tensor:
    items = data.seen.shape[3] // 2
    total = -math.log(2 * math.pi) * items * (data.weight.sum(1) * data.measured.sum(1)).sum()
    for block, waves, root in _blocks(angles, data.geometry, model, data.heights):
        measured, weight = data.measured[block], data.weight[block]
        seen = waves * root * measured[:, None, :, None]
        factor = _factor(seen, model.noise.double() * measured + (1 - measured))
        white = torch.linalg.solve_triangular(factor, data.seen[block], upper=False)
        misfit = white.abs().square().sum((2, 3))
        volume = 2 * torch.diagonal(factor, dim1=2, dim2=3).real.log().sum(2)  # log det C
        total = total - 0.5 * (weight * (misfit + 2 * items * volume)).sum()
    return total


def _score_and_information(
    data: _Data, angles: torch.Tensor, model: GaussianModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (3), and for the thickness the same with the matrix E of dC / d log thickness."""
    rings, tilts, items = len(model.spectrum), len(angles), data.seen.shape[3] // 2
    score = torch.zeros(rings + tilts + 1, dtype=torch.float64, device=angles.device)
    information = score.new_zeros(len(score), len(score))
    change = model.thickness.double() * layer_waves(data.geometry.depth, model.thickness)[1]
    shears = _shears(angles, data.geometry)
    for block, waves, root in _blocks(angles, data.geometry, model, data.heights):
        measured, weight = data.measured[block], data.weight[block]
        known = model.noise.double() * measured
        seen = waves * root * measured[:, None, :, None]
        factor = _factor(seen, known + (1 - measured))

        def whitened(values: torch.Tensor, factor: torch.Tensor = factor) -> torch.Tensor:
            return torch.linalg.solve_triangular(factor, values, upper=False)

        y = whitened(data.seen[block])  # (k, h, tilt, column)
        noise = torch.diag_embed(known.sqrt())[:, None].expand(*seen.shape[:2], tilts, tilts)
        v = whitened(torch.cat([seen, noise.to(seen)], 3))  # (k, h, tilt, power)
        counts = 2 * items * weight[:, :, None]  # real numbers in the columns
        x = (v.mH @ v).abs().square()
        found = (v.mH @ y).abs().square().sum(3) * weight[:, :, None]
        excess = found - counts * v.abs().square().sum(2)  # (k, h, power)
        to_parameters = _to_parameters(model, block, data.geometry, data.heights, tilts)  # (k, h, power, parameter)
        edge = whitened((measured[..., None] * shears[block] @ change)[:, None] * root) @ v[..., : seen.shape[3]].mH
        edge = edge + edge.mH  # (k, h, tilt, tilt)
        crossed = (v.conj() * (edge @ v)).real.sum(2)  # (k, h, power)
        score[:-1] += 0.5 * torch.einsum("khp,khpa->a", excess, to_parameters)
        bent = (y.conj() * (edge @ y)).real.sum((2, 3)) * weight
        trace = torch.diagonal(edge, dim1=2, dim2=3).real.sum(2)
        score[-1] += 0.5 * (bent - counts[..., 0] * trace).sum()
        half = to_parameters.mT @ x @ to_parameters
        information[:-1, :-1] += 0.5 * (counts[..., None] * half).sum((0, 1))
        information[:-1, -1] += 0.5 * torch.einsum("khp,khpa->a", counts * crossed, to_parameters)
        information[-1, -1] += 0.5 * (counts[..., 0] * edge.abs().square().sum((2, 3))).sum()
    information[-1, :-1] = information[:-1, -1]
    return score, information


def _to_parameters(
    model: GaussianModel, block: slice, geometry: TiltGeometry, heights: torch.Tensor, tilts: int
) -> torch.Tensor:
    """d log p / d parameter (k, h, power, parameter): S between two rings depends on both, a noise on itself."""
    k = torch.arange(geometry.period // 2 + 1, dtype=torch.float64, device=heights.device)[block] / geometry.period
    lower, share = model.between(_lengths(k, heights, geometry.depth))
    rings, powers = len(model.spectrum), lower.shape[2]
    out = share.new_zeros(*lower.shape[:2], powers + tilts, rings + tilts)
    out[:, :, :powers].scatter_add_(3, lower[..., None], (1 - share)[..., None])
    out[:, :, :powers].scatter_add_(3, lower[..., None] + 1, share[..., None])
    out[:, :, powers:, rings:] = torch.eye(tilts, dtype=out.dtype, device=out.device)
    return out


def _start(data: _Data, angles: torch.Tensor, rings: int, thickness: float) -> GaussianModel:
    """Noise from each tilt's power at high frequency, S from what the power on rings exceeds it by."""
    k = torch.arange(len(data.seen), dtype=torch.float64, device=angles.device) / data.geometry.period
    length = (k[:, None] ** 2 + data.heights**2).sqrt()[:, :, None]  # (k, h, 1)
    power = data.seen.abs().square().mean(3)  # (k, h, tilt)
    weight = data.weight[:, :, None] * data.measured[:, None]

    def mean(values: torch.Tensor, where: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return (weight * where * values).sum(axes) / (weight * where).sum(axes).clamp_min(1e-12)

    limit = 0.75 * float(length[(weight.sum(2) > 0)[..., None]].max())
    noise = mean(power, length >= limit, (0, 1))
    noise = torch.maximum(noise, 2 * _LEAST_NOISE * mean(power, length >= 0, (0, 1)))
    gain = thickness * cosines(angles) ** (-2.0 if data.geometry.grid == "stretched" else -1.0)
    nodes = math.sqrt(0.75) * torch.linspace(0, 1, rings, dtype=torch.float64, device=angles.device) ** 2
    spectrum = []
    for i, node in enumerate(nodes.tolist()):
        width = max(2 / data.geometry.period, float(nodes[max(i, 1)] - nodes[max(i, 1) - 1]))
        near = (length - min(node, limit)).abs() <= width
        signal = mean((power - noise) / gain, near, (0, 1, 2))
        spectrum.append(signal.clamp_min(0.05 * float((noise / gain).mean())))
    size = torch.tensor(thickness, dtype=torch.float64, device=angles.device)
    return GaussianModel(torch.stack(spectrum), nodes, noise, size)


def _scored(
    data: _Data, angles: torch.Tensor, model: GaussianModel, thickness_free: bool, max_steps: int, tolerance: float
) -> ModelEstimate:
    """Fisher scoring in the logarithms of the parameters, each step at most a factor e and halved until it climbs."""
    sizes = [len(model.spectrum), len(angles), 1]
    roughness = _roughness(sizes[0], sum(sizes), angles.device)
    least, most = _bounds(data, model)

    def as_model(values: torch.Tensor) -> GaussianModel:
        spectrum, noise, thickness = values.split(sizes)
        return model.replace(spectrum=spectrum, noise=noise, thickness=thickness[0])

    def objective(values: torch.Tensor) -> torch.Tensor:
        return _log_likelihood(data, angles, as_model(values)) - 0.5 * values.log() @ roughness @ values.log()

    at = torch.cat([model.spectrum, model.noise, model.thickness[None]])
    heights, rise = [objective(at)], math.inf
    while True:
        score, information = _score_and_information(data, angles, as_model(at))
        score, information = score - roughness @ at.log(), information + roughness
        free = ~((at <= least) & (score <= 0) | (at >= most) & (score >= 0))
        free[-1] &= thickness_free
        covariance = torch.zeros_like(information)
        covariance[free[:, None] & free] = torch.linalg.inv(information[free][:, free]).flatten()
        step = covariance @ score
        rise = float(0.5 * score @ step)
        if rise <= tolerance or len(heights) > max_steps:
            break
        step = step / step.abs().max().clamp_min(1)
        while not (height := objective(after := (at * step.exp()).clamp(least, most))) > heights[-1]:
            step = step / 2
            if step.abs().max() < 1e-6:
                break
        if not height > heights[-1]:
            break
        at = after
        heights.append(height)
    if rise > tolerance:
        warnings.warn(
            f"estimate_model: stopped after {len(heights) - 1} steps with the log-likelihood still {rise:.2g} below "
            "its maximum; allow more steps, or give the thickness.",
            stacklevel=3,
        )
    errors = as_model(torch.diagonal(covariance).sqrt() * at)
    return ModelEstimate(as_model(at), errors, torch.stack(heights))


def _roughness(rings: int, parameters: int, device: torch.device) -> torch.Tensor:
    """Matrix (parameter, parameter) of the preference for a log S that is flat and straight."""
    eye = torch.eye(parameters, dtype=torch.float64, device=device)[:rings]
    slope, bend = (torch.diff(eye, n, 0) / size for n, size in ((1, _SLOPE), (2, _BEND)))
    return slope.T @ slope + bend.T @ bend


def _bounds(data: _Data, model: GaussianModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest values (parameter,): C stays invertible, and the likelihood still feels the thickness."""
    weight = data.weight[:, :, None] * data.measured[:, None]
    power = (weight * data.seen.abs().square().mean(3)).sum((0, 1)) / weight.sum((0, 1))
    signal = float((power / data.geometry.depth).mean())
    thickest = model.thickness.clamp_min(data.geometry.depth + 0.5)
    least = torch.cat([torch.full_like(model.spectrum, 1e-9 * signal), _LEAST_NOISE * power, power.new_ones(1)])
    most = torch.cat([torch.full_like(model.spectrum, torch.inf), 10 * power, thickest[None]])
    return least, most


def _correction(
    angles: torch.Tensor, geometry: TiltGeometry, model: GaussianModel
) -> Callable[[torch.Tensor], torch.Tensor]:
    """L B^H C^-1 as a map from images (tilt, row, u) to volumes (z, row, x), float64."""
    layers, _ = layer_waves(geometry.depth, model.thickness)

    def correct(images: torch.Tensor) -> torch.Tensor:
        rows = images.shape[1]
        seen = image_frequencies(images.double(), angles, geometry)  # (k, tilt, row)
        seen = torch.fft.fft(seen, norm="ortho").permute(0, 2, 1)[..., None]  # (k, ky, tilt, 1)
        columns = _split(seen, 1)  # (k, h, tilt, 2)
        volume = seen.new_zeros(len(seen), rows, geometry.depth)
        h = torch.arange(rows // 2 + 1, device=images.device)
        for block, waves, root in _blocks(angles, geometry, model, _heights(rows, images.device)):
            here = columns[block]
            waves, root = waves[: len(here)], root[: len(here)]  # without the unpaired frequency
            b = waves * root
            white = torch.cholesky_solve(here, _factor(b, model.noise.double()))
            found = layers @ (root.mT * (b.mH @ white))  # (k, h, z, 2)
            volume[block, h], volume[block, -h % rows] = found[..., 0], found[..., 1]
        pairs = pair_weights(geometry, images.device) / geometry.period**0.5
        spectrum = torch.fft.ifft(volume.transpose(1, 2), norm="ortho") * pairs[:, None, None]  # (k, z, row)
        return transform_x_adjoint((spectrum.real.contiguous(), spectrum.imag.contiguous()), geometry)

    return correct


def _stack(physics: TiltOperator, images: torch.Tensor) -> torch.Tensor:
    """Line integrals (item, tilt, y, u), float64, of images with or without batch and channel."""
    if images.ndim not in (3, 5):
        raise ValueError(f"images: expected (tilt, y, x) or (batch, channel, tilt, y, x), got {tuple(images.shape)}.")
    batch = images[None, None] if images.ndim == 3 else images
    physics.expect_images(batch)
    if physics.angles.shape[0] != 1:
        raise ValueError(
            f"angles: expected one row that all items share, got {physics.angles.shape[0]}; filter them one by one."
        )
    return batch.flatten(0, 1).double() * physics.scale.double()


def _checked(model: GaussianModel, physics: TiltOperator) -> GaussianModel:
    """The model in float64 on the operator's device; ValueError unless it is one of these tilts and this volume."""
    tilts, depth = physics.angles.shape[-1], physics.geometry.depth
    for name in ("spectrum", "noise"):
        values = getattr(model, name)
        if not bool((torch.isfinite(values) & (values > 0)).all()):
            raise ValueError(f"GaussianModel.{name}: expected positive finite numbers, got {values.tolist()}.")
    if model.noise.shape != (tilts,):
        raise ValueError(f"GaussianModel.noise: expected one number for each of {tilts} tilts, got {len(model.noise)}.")
    if model.spectrum.shape != model.frequencies.shape or len(model.frequencies) < 2:
        raise ValueError(
            "GaussianModel: expected a spectrum and frequencies of one length, at least 2, got "
            f"{tuple(model.spectrum.shape)} and {tuple(model.frequencies.shape)}."
        )
    if not bool((model.frequencies.diff() > 0).all()):
        raise ValueError(f"GaussianModel.frequencies: expected rising numbers, got {model.frequencies.tolist()}.")
    if not 1 <= float(model.thickness) <= depth + 1:
        raise ValueError(
            f"GaussianModel.thickness: expected 1 to the depth + 1, {depth + 1} [voxel], got {float(model.thickness)}."
        )
    return model.to(physics.angles.device, torch.float64)
