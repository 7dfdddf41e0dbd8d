"""Estimation of the Gaussian model of a volume from its tilt images, by Fisher scoring.

In the symbols of `inverse.physics.gaussian`. On the camera grid the images' edges couple the frequencies: there the
model is estimated on the field that all tilts share, resampled to the stretched grid and faded out, and good away from
the edges only; with a lens that is not offered.
"""

from __future__ import annotations

import math
import warnings

import torch

from cryosim.core.fourier import cosine_edges, resampling_matrix
from cryosim.core.record import Record, item
from inverse.physics.contrast import ContrastProjection
from inverse.physics.contrast_inverse import lens_transfer
from inverse.physics.gaussian import (
    Amplitudes,
    GaussianModel,
    Sight,
    amplitudes,
    information_of,
    log_likelihood,
    on_stretched_grid,
    sight_of,
)
from inverse.physics.spectral import TiltGeometry, cosines, slopes
from inverse.physics.tilt import TiltProjection

_SLOPE, _BEND = 0.5, 0.2
"""Deviations of the first and second differences of log S from ring to ring that a spectrum is expected to have."""
_HEIGHTS, _FEW_HEIGHTS = 20, 5
"""Frequencies of the rows that a model is estimated with, and that its start is sought with."""
_LEAST_NOISE = 1e-6
"""Of an image's power: images without noise would have none, and an infinite likelihood."""
_FADE = 0.1
"""Part of each side over which images of the camera are faded out before the model is estimated from them."""

Projection = TiltProjection | ContrastProjection
"""What sees the volume: line integrals, or images of one defocus each on the stretched grid."""


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


def estimate_model(
    physics: Projection,
    images: torch.Tensor,
    *,
    thickness: float | None = None,
    rings: int = 20,
    every: int | None = None,
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
    physics : TiltProjection or ContrastProjection
        With one row of parameters for all items; with a lens on the stretched grid and of one defocus an image.
    images : tensor (tilt, y, x) or (batch, channel, tilt, y, x)
        Items and channels share the model.
    thickness : float, optional
        Of the slab [voxel]; estimated when left out.
    rings : int
        Of the spectrum, at least 3.
    every : int, optional
        Use each so many-th frequency of the rows only: so much faster, and standard errors larger by the root of it.
        When left out, so that 20 to 40 are used; a start is sought with 5 to 10.
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
    n_heights = images.shape[-2] // 2 + 1
    every = max(1, n_heights // _HEIGHTS) if every is None else every
    if not (every == 1 or 1 < every <= images.shape[-2] // 4):
        raise ValueError(f"estimate_model: expected every from 1 to a quarter of the rows, got {every}.")
    stack = line_integrals(physics, images)
    if not torch.isfinite(stack).all():
        raise ValueError("estimate_model: images hold values that are not finite; leave those tilts out.")
    constant = stack.std((0, 2, 3)) == 0
    if constant.any():
        which = constant.nonzero().flatten().tolist()
        raise ValueError(f"estimate_model: the images of the tilts {which} are constant; leave those tilts out.")
    transfer = transfer_of(physics)
    transfer = None if transfer is None else transfer.detach()
    if physics.geometry.grid == "stretched":
        data = on_stretched_grid(stack, angles, physics.geometry, transfer)
    else:
        data = _shared_field(stack, angles, physics.geometry)
    data.weight[0, 0] = 0.0
    model = _start(_thinned(data, every), rings, 0.8 * depth if thickness is None else thickness)
    if n_heights > 2 * _FEW_HEIGHTS * every:
        few = _thinned(data, n_heights // _FEW_HEIGHTS)
        model = _scored(few, model, thickness is None, max_steps, 0.1).model
    return _scored(_thinned(data, every), model, thickness is None, max_steps, tolerance)


def transfer_of(physics: Projection) -> torch.Tensor | None:
    """T (tilt, ky, kx) of an operator on the half plane, of the images times its scale; None for line integrals.

    Raises
    ------
    ValueError
        Where the lens is no diagonal: but for one defocus an image, on the stretched grid.
    """
    if not isinstance(physics, ContrastProjection):
        return None
    if type(physics) is not ContrastProjection or physics.grid != "stretched" or physics.heights != "none":
        raise ValueError(
            'physics: expected a TiltProjection, or a ContrastProjection with grid="stretched" and heights="none", got '
            f'{type(physics).__name__} with grid="{physics.grid}" and heights="{physics.heights}"; else flip '
            "the phases of the images and take a TiltProjection."
        )
    rows = physics.volume_shape[1]
    if physics.image_shape[0] != rows:
        raise ValueError(
            f"image_shape: with a lens, expected images of the volume's {rows} rows, got {physics.image_shape[0]}."
        )
    return lens_transfer(physics, rows)


def line_integrals(physics: Projection, images: torch.Tensor) -> torch.Tensor:
    """Line integrals, or contrast, (item, tilt, y, u), float64, of images with or without batch and channel."""
    if images.ndim not in (3, 5):
        raise ValueError(f"images: expected (tilt, y, x) or (batch, channel, tilt, y, x), got {tuple(images.shape)}.")
    batch = images[None, None] if images.ndim == 3 else images
    physics.expect_images(batch)
    if not images.is_floating_point():
        raise ValueError(f"images: expected floating point numbers, got {images.dtype}. Convert them.")
    for name in getattr(physics, "parameter_names", ("angles",)):
        if len(getattr(physics, name)) != 1:
            raise ValueError(
                f"{name}: expected one row that all items share, got {len(getattr(physics, name))}; filter them one by "
                "one."
            )
    return batch.flatten(0, 1).double() * physics.scale.double()


def checked(model: GaussianModel, physics: Projection) -> GaussianModel:
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


def _shared_field(images: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry) -> Amplitudes:
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
    return amplitudes(field, sight_of(angles, shared, rows), measured)


def _fade(n: int, device: torch.device) -> torch.Tensor:
    """Window (n,) with cosine edges and a mean square of 1."""
    window = cosine_edges(n, _FADE * n, dtype=torch.float64, device=device)
    return window / window.square().mean().sqrt()


def _thinned(data: Amplitudes, every: int) -> Amplitudes:
    """Each so many-th of the heights."""
    heights, transfer = data.sight.heights[::every], data.sight.transfer
    sight = data.sight._replace(heights=heights, transfer=None if transfer is None else transfer[:, ::every])
    return data._replace(seen=data.seen[:, ::every], weight=data.weight[:, ::every], sight=sight)


def _gain(sight: Sight) -> torch.Tensor:
    """Power of an image over that of one layer, (1, 1, tilt), or (k, h, tilt) with a lens."""
    gain = cosines(sight.angles)[None, None] ** (-2.0 if sight.geometry.grid == "stretched" else -1.0)
    return gain if sight.transfer is None else gain * sight.transfer.abs().square()


def _start(data: Amplitudes, rings: int, thickness: float) -> GaussianModel:
    """Noise from each tilt's power at high frequency, S from what the power on rings exceeds it by."""
    geometry, device = data.sight.geometry, data.seen.device
    k = torch.arange(len(data.seen), dtype=torch.float64, device=device) / geometry.period
    length = (k[:, None] ** 2 + data.sight.heights**2).sqrt()[:, :, None]  # (k, h, 1)
    power = data.seen.abs().square().mean(3)  # (k, h, tilt)
    weight = data.weight[:, :, None] * data.measured[:, None]

    def mean(values: torch.Tensor, where: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return (weight * where * values).sum(axes) / (weight * where).sum(axes).clamp_min(1e-12)

    limit = 0.75 * float(length[(weight.sum(2) > 0)[..., None]].max())
    noise = mean(power, length >= limit, (0, 1))
    noise = torch.maximum(noise, 2 * _LEAST_NOISE * mean(power, length >= 0, (0, 1)))
    gain = thickness * _gain(data.sight)
    nodes = math.sqrt(0.75) * torch.linspace(0, 1, rings, dtype=torch.float64, device=device) ** 2
    spectrum = []
    for i, node in enumerate(nodes.tolist()):
        width = max(2 / geometry.period, float(nodes[max(i, 1)] - nodes[max(i, 1) - 1]))
        near = (length - min(node, limit)).abs() <= width
        seen = mean(gain.expand_as(power), near, (0, 1, 2))  # a lens passes next to nothing here and there
        signal = mean(power - noise, near, (0, 1, 2)) / seen
        spectrum.append(signal.clamp_min(0.05 * float(noise.mean() / seen)))
    size = torch.tensor(thickness, dtype=torch.float64, device=device)
    return GaussianModel(torch.stack(spectrum), nodes, noise, size)


def _scored(
    data: Amplitudes, model: GaussianModel, thickness_free: bool, max_steps: int, tolerance: float
) -> ModelEstimate:
    """Fisher scoring in the logarithms of the parameters, each step at most a factor e and halved until it climbs."""
    sizes = [len(model.spectrum), len(model.noise), 1]
    roughness = _roughness(sizes[0], sum(sizes), model.noise.device)
    least, most = _bounds(data, model)

    def as_model(values: torch.Tensor) -> GaussianModel:
        spectrum, noise, thickness = values.split(sizes)
        return model.replace(spectrum=spectrum, noise=noise, thickness=thickness[0])

    def objective(values: torch.Tensor) -> torch.Tensor:
        return log_likelihood(data, as_model(values)) - 0.5 * values.log() @ roughness @ values.log()

    at = torch.cat([model.spectrum, model.noise, model.thickness[None]])
    heights, rise = [objective(at)], math.inf
    while True:
        score, information = information_of(data, as_model(at))
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


def _bounds(data: Amplitudes, model: GaussianModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest values (parameter,): C stays invertible, and the likelihood still feels the thickness."""
    weight = data.weight[:, :, None] * data.measured[:, None]
    unseen = (weight.sum((0, 1)) == 0).nonzero().flatten().tolist()
    if unseen:
        raise ValueError(
            f"estimate_model: the images are too small: no frequency of the tilts {unseen} can be used. Give larger "
            "images, or leave out those tilts."
        )
    power = (weight * data.seen.abs().square().mean(3)).sum((0, 1)) / weight.sum((0, 1))
    passed = 1.0 if data.sight.transfer is None else float(data.sight.transfer.abs().square().mean())
    signal = float(power.mean()) / data.sight.geometry.depth / passed
    thickest = model.thickness.clamp_min(data.sight.geometry.depth + 0.5)
    least = torch.cat([torch.full_like(model.spectrum, 1e-9 * signal), _LEAST_NOISE * power, power.new_ones(1)])
    most = torch.cat([torch.full_like(model.spectrum, torch.inf), 10 * power, thickest[None]])
    return least, most
