"""Gaussian model of a volume and of its tilt images: marginal likelihood, Fisher information, estimation.

The volume is stationary Gaussian noise g of radial power S(|k|), seen through a slab w(z). In plane, at one frequency
(kx, ky), its layers have the covariance

    L = w Phi diag(S) Phi^H w,        Phi_zm = exp(2 pi i z m / M) / sqrt(M),    S_m = S(|(kx, ky, m / M)|)      (1)

with M = 2 depth frequencies along z: twice the depth, so that the first layer does not touch the last. Let B(kx) be the
(tilts x depth) matrix of `inverse.physics.closed_form`, T the diagonal of what the lens makes of it in each tilt, at
(kx / cos t, ky) of the image (`inverse.physics.contrast_inverse`; T = 1 for line integrals), and n_t the variance of
white noise in tilt t. The images are jointly Gaussian, and on the stretched grid only the tilts at one (kx, ky) depend
on each other, by the small matrix

    C = T B L B^H T^H + diag(n) = V V^H,    V = [T B w Phi diag(S)^(1/2), diag(n)^(1/2)].                         (2)

Whatever is asked of the model is in these matrices. Each power p (one S_m or n_t) scales one column of V, so that with
X = V^H C^-1 V the log-likelihood of an amplitude y has the derivatives and the Fisher information

    d/d log p = |V^H C^-1 y|^2_p - X_pp,        I_pq = |X_pq|^2                                                  (3)

(Mardia & Marshall 1984, doi:10.1093/biomet/71.1.135). The transfer of an astigmatic or displaced image differs between
+ky and -ky, so with a lens each has its own C; without, one C serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from cryosim.core.fourier import frequencies as full_frequencies
from cryosim.core.record import Record, item
from inverse.physics.closed_form import edge_weights
from inverse.physics.spectral import TiltGeometry, frequencies, slopes

_BLOCK = 2**24
"""Bytes that the matrices of the frequencies worked on at once may fill."""


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
        Variance of a pixel, of images times the operator's `scale`: of line integrals [unit of the volume^2 · voxel^2],
        or of the contrast [1], with a spectrum in V^2.
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


class Sight(NamedTuple):
    """How the tilts see one column of layers at the frequencies kx >= 0 and ky of the plane."""

    angles: torch.Tensor
    """(tilt,) [deg]."""
    geometry: TiltGeometry
    heights: torch.Tensor
    """ky (h,) [1/voxel]: only those >= 0 without a lens, where +ky and -ky are seen alike; all of them with one."""
    transfer: torch.Tensor | None
    """T (k, h, tilt), or None for 1."""


def sight_of(angles: torch.Tensor, geometry: TiltGeometry, rows: int, transfer: torch.Tensor | None = None) -> Sight:
    """The `Sight` of images of so many rows, seen through a `transfer` (tilt, ky, kx) on the half plane, or none."""
    if transfer is None:
        return Sight(angles, geometry, _heights(rows, angles.device), None)
    expected = (len(angles), rows, geometry.period // 2 + 1)
    if tuple(transfer.shape) != expected:
        raise ValueError(f"transfer: expected (tilt, ky, kx) {expected}, got {tuple(transfer.shape)}.")
    passed = transfer.to(torch.complex128).permute(2, 1, 0)  # (k, ky, tilt)
    # an image is real: where k is its own mirror, of +ky and -ky only what is common to both passes
    mirrored = passed.index_select(1, -torch.arange(rows, device=passed.device) % rows).conj()
    k = torch.arange(len(passed), device=passed.device)[:, None, None]
    passed = torch.where((2 * k) % geometry.period == 0, (passed + mirrored) / 2, passed)
    ky = full_frequencies(rows, dtype=torch.float64, device=passed.device)
    return Sight(angles, geometry, ky, passed)


def marginal_log_likelihood(
    images: torch.Tensor,
    angles: torch.Tensor,
    geometry: TiltGeometry,
    model: GaussianModel,
    transfer: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logarithm () of the density of images (tilt, y, x) on the stretched grid, whatever the volume.

    Exact, and differentiable in the images, the angles, the model and the transfer, and so in the defocus.

    Parameters
    ----------
    images : tensor (tilt, y, x) or (item, tilt, y, x)
        Line integrals, or contrast; items are independent volumes.
    angles : tensor (tilt,)
        [deg].
    geometry : TiltGeometry
    model : GaussianModel
    transfer : tensor (tilt, ky, kx), optional
        T on the half plane, where the images are seen through a lens; see `transfer_of`.

    Raises
    ------
    ValueError
        On the camera grid, where it is no product over frequencies, or for images or a transfer of another shape.
    """
    return log_likelihood(on_stretched_grid(images, angles, geometry, transfer), model)


def score_and_information(
    images: torch.Tensor,
    angles: torch.Tensor,
    geometry: TiltGeometry,
    model: GaussianModel,
    transfer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient (parameter,) of `marginal_log_likelihood`, and Fisher information (parameter, parameter).

    The parameters are the logarithms of spectrum, noise and thickness, in this order. Arguments as there.
    """
    return information_of(on_stretched_grid(images, angles, geometry, transfer), model)


def prior_sample(model: GaussianModel, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """A volume (z, y, x) drawn from the prior, float64, periodic in y and x."""
    depth, rows, width = shape
    white = torch.randn(2 * depth, rows, width, generator=generator, dtype=torch.float64, device=generator.device)
    kz, ky, kx = (full_frequencies(n, dtype=torch.float64, device=white.device) for n in white.shape)
    power = model.power((kz[:, None, None] ** 2 + ky[:, None] ** 2 + kx**2).sqrt())
    drawn = torch.fft.ifftn(torch.fft.fftn(white) * power.sqrt()).real[:depth]
    return drawn * slab(depth, model.thickness)[0][:, None, None]


class Amplitudes(NamedTuple):
    """Amplitudes of images at kx, ky >= 0, and how much each counts."""

    seen: torch.Tensor
    """(k, h, tilt, column), complex128; the columns are the items, without a lens +ky and -ky of each."""
    weight: torch.Tensor
    """(k, h): for how many frequencies of the plane a column stands."""
    measured: torch.Tensor
    """(k, tilt): 1, or 0 where a tilt's amplitude is unknown."""
    sight: Sight


def on_stretched_grid(
    images: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry, transfer: torch.Tensor | None
) -> Amplitudes:
    """Amplitudes of images ([item,] tilt, y, x), with the unpaired column of an even width."""
    if geometry.grid != "stretched":
        raise ValueError(f'geometry: expected the grid "stretched", got "{geometry.grid}"; see `estimate_model`.')
    if images.ndim not in (3, 4) or images.shape[-1] != geometry.period:
        raise ValueError(
            f"images: expected ([item,] tilt, y, x) of width {geometry.period}, got {tuple(images.shape)}."
        )
    measured = torch.ones(geometry.period // 2 + 1, images.shape[-3]).to(images.device)
    return amplitudes(images, sight_of(angles, geometry, images.shape[-2], transfer), measured)


def amplitudes(images: torch.Tensor, sight: Sight, measured: torch.Tensor) -> Amplitudes:
    images = images.double() if images.ndim == 4 else images[None].double()
    seen = torch.fft.rfft2(images, norm="ortho").permute(3, 2, 1, 0)  # (k, row, tilt, item)
    rows, width = images.shape[2:]
    measured = measured.double()
    columns = as_columns(seen, sight) * measured[:, None, :, None]
    weight = pairs(width, images.device)[:, None] * counts(rows, sight) * len(images) / columns.shape[3]
    return Amplitudes(columns, weight, measured, sight)


def pairs(n: int, device: torch.device) -> torch.Tensor:
    """(k,): 2 for the frequencies k >= 0 of an axis of n samples that stand for a pair +-k, else 1."""
    k = torch.arange(n // 2 + 1, device=device)
    return torch.where((2 * k) % n == 0, 1.0, 2.0).double()


def _heights(rows: int, device: torch.device) -> torch.Tensor:
    """The frequencies ky >= 0 (h,) of an axis of `rows` [1/voxel]."""
    return torch.arange(rows // 2 + 1, dtype=torch.float64, device=device) / rows


def counts(rows: int, sight: Sight) -> torch.Tensor:
    """(h,): for how many ky a height stands: 2 without a lens, 1 where +ky and -ky are the same, and with a lens."""
    if sight.transfer is not None:
        return torch.ones_like(sight.heights)
    h = torch.arange(rows // 2 + 1, device=sight.heights.device)
    return torch.where((2 * h) % rows == 0, 1.0, 2.0).double()


def as_columns(values: torch.Tensor, sight: Sight) -> torch.Tensor:
    """Values (k, ky, tilt, item), ky unshifted, at the heights of `sight`, (k, h, tilt, column).

    Without a lens, the columns of +ky stand before those of -ky.
    """
    if sight.transfer is not None:
        return values
    rows = values.shape[1]
    h = torch.arange(rows // 2 + 1, device=values.device)
    return torch.cat([values.index_select(1, h), values.index_select(1, -h % rows)], -1)


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


def blocks(sight: Sight, model: GaussianModel) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Slices of kx >= 0 small enough for the memory, each with T B w Phi and S^(1/2).

    Of shapes (k, h, tilt, m), with 1 for h where there is no lens, and (k, h, 1, m).
    """
    layers, _ = layer_waves(sight.geometry.depth, model.thickness)
    seen = shears(sight)
    k = torch.arange(len(seen), dtype=torch.float64, device=seen.device) / sight.geometry.period
    tilts, powers = len(sight.angles), layers.shape[1] + len(sight.angles)
    step = max(1, _BLOCK // (16 * len(sight.heights) * powers * (powers + tilts)))
    for start in range(0, len(k), step):
        block = slice(start, start + step)
        root = model.power(_lengths(k[block], sight.heights, sight.geometry.depth)).sqrt()
        yield block, through(sight, block, seen[block] @ layers), root[:, :, None]


def shears(sight: Sight) -> torch.Tensor:
    """B (k, tilt, z), complex128; zeros for the unpaired frequency of an even period, which no tilt sees."""
    angles, geometry = sight.angles, sight.geometry
    k = frequencies(geometry, angles.device)
    z = torch.arange(geometry.depth, device=angles.device).double() - geometry.depth // 2
    turns = (k[:, None] * slopes(angles))[:, :, None] * z
    turns = turns - turns.detach().round()
    weights = edge_weights(angles, geometry)[:, :, None]
    turned = weights * torch.polar(torch.ones_like(turns), -2 * torch.pi * turns)
    unpaired = turned.new_zeros(1 - geometry.period % 2, *turned.shape[1:])
    return torch.cat([turned, unpaired])


def through(sight: Sight, block: slice, seen: torch.Tensor) -> torch.Tensor:
    """T times (k, tilt, m) of a slice of frequencies: (k, h, tilt, m), or (k, 1, tilt, m) without a lens."""
    return seen[:, None] if sight.transfer is None else sight.transfer[block][..., None] * seen[:, None]


def factor_of(seen: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Cholesky factor (k, h, tilt, tilt) of C, from T B w Phi S^(1/2) and the noise (tilt,) or (k, tilt)."""
    noise = noise.expand(len(seen), noise.shape[-1])
    return torch.linalg.cholesky(seen @ seen.mH + torch.diag_embed(noise)[:, None])


def log_likelihood(data: Amplitudes, model: GaussianModel) -> torch.Tensor:
    columns = data.seen.shape[3]
    total = -0.5 * math.log(2 * math.pi) * columns * (data.weight.sum(1) * data.measured.sum(1)).sum()
    for block, waves, root in blocks(data.sight, model):
        measured, weight = data.measured[block], data.weight[block]
        seen = waves * root * measured[:, None, :, None]
        factor = factor_of(seen, model.noise.double() * measured + (1 - measured))
        white = torch.linalg.solve_triangular(factor, data.seen[block], upper=False)
        misfit = white.abs().square().sum((2, 3))
        volume = 2 * torch.diagonal(factor, dim1=2, dim2=3).real.log().sum(2)  # log det C
        total = total - 0.5 * (weight * (misfit + columns * volume)).sum()
    return total


def information_of(data: Amplitudes, model: GaussianModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (3), and for the thickness the same with the matrix E of dC / d log thickness."""
    sight, columns = data.sight, data.seen.shape[3]
    rings, tilts = len(model.spectrum), len(sight.angles)
    score = torch.zeros(rings + tilts + 1, dtype=torch.float64, device=sight.angles.device)
    information = score.new_zeros(len(score), len(score))
    change = model.thickness.double() * layer_waves(sight.geometry.depth, model.thickness)[1]
    turned = shears(sight)
    for block, waves, root in blocks(sight, model):
        measured, weight = data.measured[block], data.weight[block]
        known = model.noise.double() * measured
        seen = waves * root * measured[:, None, :, None]
        factor = factor_of(seen, known + (1 - measured))

        def whitened(values: torch.Tensor, factor: torch.Tensor = factor) -> torch.Tensor:
            return torch.linalg.solve_triangular(factor, values, upper=False)

        y = whitened(data.seen[block])  # (k, h, tilt, column)
        noise = torch.diag_embed(known.sqrt())[:, None].expand(*seen.shape[:2], tilts, tilts)
        v = whitened(torch.cat([seen, noise.to(seen)], 3))  # (k, h, tilt, power)
        numbers = columns * weight[:, :, None]  # real numbers in the columns
        x = (v.mH @ v).abs().square()
        found = (v.mH @ y).abs().square().sum(3) * weight[:, :, None]
        excess = found - numbers * v.abs().square().sum(2)  # (k, h, power)
        to_parameters = _to_parameters(model, block, sight)  # (k, h, power, parameter)
        bent = through(sight, block, measured[..., None] * turned[block] @ change)
        edge = whitened(bent * root) @ v[..., : seen.shape[3]].mH
        edge = edge + edge.mH  # (k, h, tilt, tilt)
        crossed = (v.conj() * (edge @ v)).real.sum(2)  # (k, h, power)
        score[:-1] += 0.5 * torch.einsum("khp,khpa->a", excess, to_parameters)
        pull = (y.conj() * (edge @ y)).real.sum((2, 3)) * weight
        trace = torch.diagonal(edge, dim1=2, dim2=3).real.sum(2)
        score[-1] += 0.5 * (pull - numbers[..., 0] * trace).sum()
        half = to_parameters.mT @ x @ to_parameters
        information[:-1, :-1] += 0.5 * (numbers[..., None] * half).sum((0, 1))
        information[:-1, -1] += 0.5 * torch.einsum("khp,khpa->a", numbers * crossed, to_parameters)
        information[-1, -1] += 0.5 * (numbers[..., 0] * edge.abs().square().sum((2, 3))).sum()
    information[-1, :-1] = information[:-1, -1]
    return score, information


def _to_parameters(model: GaussianModel, block: slice, sight: Sight) -> torch.Tensor:
    """d log p / d parameter (k, h, power, parameter): S between two rings depends on both, a noise on itself."""
    geometry, heights, tilts = sight.geometry, sight.heights, len(sight.angles)
    k = torch.arange(geometry.period // 2 + 1, dtype=torch.float64, device=heights.device)[block] / geometry.period
    lower, share = model.between(_lengths(k, heights, geometry.depth))
    rings, powers = len(model.spectrum), lower.shape[2]
    out = share.new_zeros(*lower.shape[:2], powers + tilts, rings + tilts)
    out[:, :, :powers].scatter_add_(3, lower[..., None], (1 - share)[..., None])
    out[:, :, :powers].scatter_add_(3, lower[..., None] + 1, share[..., None])
    out[:, :, powers:, rings:] = torch.eye(tilts, dtype=out.dtype, device=out.device)
    return out
