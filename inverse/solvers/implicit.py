"""Fits of functions instead of voxels: neural fields and deep image priors, stopped before they learn the noise.

The volume is what a network makes of its parameters p, x = f(p), and what is minimised over p by Adam (Kingma & Ba
2015, arXiv:1412.6980) is how far its images are from the measured ones,

    1/2 (A x - y)^T M^T W M (A x - y),                                                                   (1)

M the pixels that are fitted, all but a random few. Those left out say when to stop: their misfit falls while the
network learns the specimen and rises once it learns the noise of the others (ICE-TIDE fits a field to tilt series
with a fixed number of steps: Debarnot, Kishore, Righetto, Khorashadizadeh & Dokmanić 2024).

W = 1 / noise is the likelihood, but slow: A A^T is largest at low frequency, by as much as a ramp filter lifts what is
high, and gradient steps learn in that order. Were what the network still lacks white, of variance v a voxel, the
residual's own covariance would make it

    W = (v A A^T + noise)^-1,                                                                              (2)

whose gradient is that of a reconstruction rather than of a back-projection. For tilts about y it is at hand in closed
form, see `inverse.physics.closed_form`. For any other `TiltPhysics` the gradient in the volume, which is

    A^T (v A A^T + n)^-1 = (n/v) (A^T A + n/v)^-1 A^T / n                                                  (3)

for a noise n, is taken with the operator's own approximate inverse: a step that goes down whether or not it is exact.

Where the specimen bends from tilt to tilt, its displacements are learned with the field, see
`inverse.solvers.implicit_bent`.

A plain `TiltProjection` sees each row y for itself, so a step may render some rows only, drawn anew from step to step:
the mean of their gradients is the whole one. Any other operator is shown the whole volume in each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from deepinv.models import ConvDecoder
from torch import nn

from inverse.priors.implicit import VOXELS_AT_ONCE, HashGrid, Siren, rendered
from inverse.solvers.implicit_bent import BentMisfit
from inverse.solvers.implicit_misfit import ForwardOperator, RowMisfit, WholeMisfit, misfit_of
from inverse.solvers.linear import as_batch
from inverse.solvers.primal_dual import Progress, expect_positive

Metric = Literal["covariance", "likelihood"]

_LACKING = 0.1
"""Share of a voxel's variance that equation (2) takes the network to lack while it learns."""

_VOXELS_OF_A_STEP = 2**14
"""Rendered at once by sines, they stay in cache, and there are many steps in a pass over the rows."""


class Implicit(NamedTuple):
    """What `implicit` and `deep_image_prior` return.

    Attributes
    ----------
    volume : tensor (z, y, x)
        [unit of the volume].
    field : nn.Module
        Whose parameters are those of the volume.
    losses, held_out_losses : tensor (epoch,)
        Mean of (A x - y)^2 / noise over the pixels that are fitted, and over those that are not: 1 where all that is
        left is the noise. Of each pass over the rows, each row before the step it took part in.
    epoch : int
        Which one the volume is from, the mean of its parameters before each of its steps: that of the least held-out
        loss, or the last one where none is held out.
    displacement : tensor (tilt, 2, y, x), or None
        Of the specimen in each tilt, across and along the axis [px], at the control points of cubic B-splines from end
        to end of the field; where `bends` was given.
    straight : tensor (tilt, y, x), or None
        The images, had it not bent: those of the volume, and what that leaves of the measured ones.
    """

    volume: torch.Tensor
    field: nn.Module
    losses: torch.Tensor
    held_out_losses: torch.Tensor
    epoch: int
    displacement: torch.Tensor | None = None
    straight: torch.Tensor | None = None


def implicit(
    physics: ForwardOperator,
    images: torch.Tensor,
    noise: float | torch.Tensor,
    *,
    field: Literal["hash", "siren"] | nn.Module = "siren",
    finest: float | None = None,
    steps: int = 600,
    rows: int | None = None,
    rate: float | None = None,
    metric: Metric | None = None,
    bends: float | None = None,
    held_out: float = 0.1,
    patience: int = 20,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Implicit:
    """Fit a neural field to the images of a tilt series.

    Parameters
    ----------
    physics : TiltProjection, ContrastProjection, DeformedProjection or another operator of tilt series
    images : tensor (tilt, y, x)
    noise : float or tensor (tilt,)
        Variance of a pixel.
    field : {"siren", "hash"} or nn.Module
        `Siren`, `HashGrid`, or any map from positions (n, 3) [voxel], (x, y, z) about the centre n // 2, to values (n,)
        [unit of the volume]; the module is trained as it is handed over.
    finest : float, optional
        Half the finest period that a `Siren` begins with, 5 when left out, or spacing of the finest nodes of a
        `HashGrid`, 2 when left out [voxel].
    steps : int
        Of Adam, at most, in whole passes over the rows.
    rows : int, optional
        Rendered in one step, for a `TiltProjection` of nothing but angles; when left out, 4 or more, that have some
        16000 voxels for a `Siren` and 130000 for any other field. Any other operator takes all.
    rate : float, optional
        Of Adam; 0.01 when left out, 0.001 for a `Siren`.
    metric : {"covariance", "likelihood"}, optional
        Equation (2), v a tenth of a voxel's variance, or 1 / noise, which any operator but a `TiltPhysics` is given.
        When left out the former for a `Siren`, which learns fast by it, and the latter for any other field: measured,
        a `HashGrid` stopped by what is held out is then closer to the truth.
    bends : float, optional
        How far control points of a specimen that bends from tilt to tilt are expected to be displaced [px]; when left
        out it does not bend. For a `TiltProjection` of nothing but angles.
    held_out : float
        Share of the pixels that are not fitted, 0 for none: then all steps are made.
    patience : int
        Epochs without a smaller held-out loss before the fit ends.
    generator : torch.Generator
        Of the field, of which pixels are held out, and of the rows of each step; one of the images' device.
    progress : callable (done, most), optional
        Told after each step.

    Returns
    -------
    Implicit

    Raises
    ------
    ValueError
        For images that do not fit, a noise that is not positive, or settings out of range.
    """
    stack, variances, mask = _prepared(physics, images, noise, held_out, generator)
    if finest is not None:
        expect_positive(finest=finest)
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected 1 or more, got {rows}.")
    variance = _voxel_variance(physics, stack, variances, generator)
    depth, n_rows, width = physics.volume_shape
    extent, scale = (width, n_rows, depth), math.sqrt(variance)
    if isinstance(field, nn.Module):
        network = field
    elif field == "hash":
        network = HashGrid(extent, finest or 2.0, scale=scale, generator=generator)
    elif field == "siren":
        omega = math.pi * max(extent) / (2 * (finest or 5.0))
        network = Siren(extent, omega=omega, omega_hidden=20.0, scale=scale, generator=generator)
    else:
        raise ValueError(f"field: expected 'hash', 'siren' or a module, got {field!r}.")
    network = network.to(stack)
    axes = tuple(torch.arange(n, dtype=stack.dtype, device=stack.device) - n // 2 for n in physics.volume_shape)

    def render(some: torch.Tensor | None = None) -> torch.Tensor:
        return rendered(network, axes, some)  # type: ignore[arg-type]

    sines = isinstance(network, Siren)
    metric = metric or ("covariance" if sines else "likelihood")
    lacking = _lacking(variance, metric)
    if bends is None:
        misfit = misfit_of(physics, stack, variances, mask, lacking)
    else:
        misfit = BentMisfit(physics, stack, variances, mask, lacking, bends)
    if isinstance(misfit, WholeMisfit):
        if rows not in (None, n_rows):
            raise ValueError("rows: expected a TiltProjection of nothing but angles, whose rows are independent.")
        rows = n_rows
    elif rows is None:
        rows = max(4, (_VOXELS_OF_A_STEP if sines else VOXELS_AT_ONCE) // (depth * width))
    rate = (1e-3 if sines else 1e-2) if rate is None else rate
    fit = _Fit(steps, rate, patience, generator, progress)
    return fit.run(network, render, misfit, rows)


def deep_image_prior(
    physics: ForwardOperator,
    images: torch.Tensor,
    noise: float | torch.Tensor,
    *,
    channels: int = 16,
    layers: int = 4,
    steps: int = 200,
    rate: float = 1e-2,
    metric: Metric = "likelihood",
    held_out: float = 0.1,
    patience: int = 20,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Implicit:
    """Fit the weights of a convolutional decoder whose output is the volume (Ulyanov et al. 2018, arXiv:1711.10925).

    The decoder is deepinv's ConvDecoder (Darestani & Heckel 2021, doi:10.1109/TCI.2021.3097596) in three dimensions,
    of a fixed random input an eighth as wide as the volume, its buffer `seed`. `field` of the result makes the volume
    anew, without an argument.

    Parameters
    ----------
    channels, layers : int
        Of the decoder.
    physics, images, noise, steps, rate, metric, held_out, patience, generator, progress
        As in `implicit`.

    Returns
    -------
    Implicit

    Raises
    ------
    ValueError
        As `implicit`.
    """
    stack, variances, mask = _prepared(physics, images, noise, held_out, generator)
    variance = _voxel_variance(physics, stack, variances, generator)
    if channels < 1 or layers < 2:
        raise ValueError(f"channels, layers: expected 1 and 2 or more, got {channels} and {layers}.")
    network = _Decoder(physics.volume_shape, channels, layers, math.sqrt(variance), generator).to(stack)
    misfit = misfit_of(physics, stack, variances, mask, _lacking(variance, metric))
    return _Fit(steps, rate, patience, generator, progress).run(network, lambda _=None: network(), misfit, None)


class _Decoder(nn.Module):
    """deepinv's ConvDecoder with its input: () -> volume (z, y, x)."""

    seed: torch.Tensor

    def __init__(
        self, shape: tuple[int, int, int], channels: int, layers: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        small = tuple(max(2, math.ceil(n / 8)) for n in shape)
        with torch.random.fork_rng(devices=[]):  # deepinv draws weights from the global generator, which stays as it is
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            self.decoder = ConvDecoder((1, *shape), small, layers, channels)
        for layer in self.decoder.modules():
            if isinstance(layer, nn.BatchNorm3d):  # normalised by the one volume there is, whenever it is made
                layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        seed = torch.randn(1, channels, *small, generator=generator, device=generator.device)
        self.register_buffer("seed", seed)
        self.scale = scale

    def forward(self) -> torch.Tensor:
        return self.decoder(self.seed, self.scale)[0, 0]


class _Fit:
    """Adam with early stopping."""

    def __init__(
        self, steps: int, rate: float, patience: int, generator: torch.Generator, progress: Progress | None
    ) -> None:
        if min(steps, patience) < 1:
            raise ValueError(f"steps, patience: expected 1 or more, got {steps} and {patience}.")
        expect_positive(rate=rate)
        self.steps, self.rate, self.patience = steps, rate, patience
        self.generator, self.progress = generator, progress

    def run(
        self,
        network: nn.Module,
        render: Callable[[torch.Tensor | None], torch.Tensor],
        misfit: WholeMisfit | RowMisfit,
        rows: int | None,
    ) -> Implicit:
        """Fit the parameters of a network by what `render` makes of it, some rows or all (None) at a time."""
        n_fitted, n_held_out = float(misfit.fitted.sum()), float((misfit.measured - misfit.fitted).sum())
        if not n_fitted:
            raise ValueError("held_out: expected to leave pixels to be fitted, and left none.")
        batches = 1 if rows is None else -(-misfit.n_rows // rows)
        bending = misfit.bending if isinstance(misfit, BentMisfit) else None
        groups: list[dict] = [{"params": list(network.parameters())}]
        if bending is not None:
            groups.append({"params": list(bending.parameters()), "lr": bending.rate})
        learned = [p for group in groups for p in group["params"]]
        adam = torch.optim.Adam(groups, lr=self.rate, betas=(0.9, 0.99), eps=1e-15)
        epochs = -(-self.steps // batches)
        losses, others, best, kept = [], [], 0, []
        for epoch in range(epochs):
            fitted = held_out = 0.0
            mean = [torch.zeros_like(p) for p in learned]
            for i, some in enumerate(self._batches(misfit.n_rows, batches), 1):
                for total, p in zip(mean, learned, strict=True):
                    total.add_(p.detach(), alpha=1 / batches)
                with torch.enable_grad():
                    found = misfit(render(some), some)
                    adam.zero_grad()
                    found.loss.backward()
                adam.step()
                fitted, held_out = fitted + found.fitted, held_out + found.held_out
                if self.progress is not None:
                    self.progress(epoch * batches + i, epochs * batches)
            if not math.isfinite(fitted):
                raise ValueError(f"rate: the fit diverged at {self.rate:g}. Give a lower one.")
            losses.append(fitted / n_fitted)
            others.append(held_out / n_held_out if n_held_out else math.nan)
            if not n_held_out or others[-1] <= min(others):
                best, kept = epoch, mean
            if epoch - best >= self.patience:
                break
        with torch.no_grad():
            for p, value in zip(learned, kept, strict=True):
                p.copy_(value)
            volume = render(None).clone()
            if isinstance(misfit, BentMisfit):
                bent = misfit.bending.displacement().clone(), misfit.straight(volume)
            else:
                bent = None, None
        like = misfit.images
        return Implicit(volume, network, like.new_tensor(losses), like.new_tensor(others), best, *bent)

    def _batches(self, n_rows: int, batches: int) -> list[torch.Tensor | None]:
        """Numbers of the rows of each step of an epoch."""
        if batches == 1:
            return [None]
        drawn = torch.randperm(n_rows, generator=self.generator, device=self.generator.device)
        return list(drawn.tensor_split(batches))


def _prepared(
    physics: ForwardOperator,
    images: torch.Tensor,
    noise: float | torch.Tensor,
    held_out: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (tilt, y, x), their noise (tilt, 1, 1), and 1 where a pixel is fitted (tilt, y, x)."""
    batch, flat = as_batch(physics, images)
    if not flat:
        raise ValueError(
            f"images: expected one stack (tilt, y, x), got {tuple(images.shape)}. Fit the items of a batch one by one."
        )
    stack = batch[0, 0].detach()
    variances = torch.as_tensor(noise).detach().to(stack)
    if variances.shape not in ((), (len(stack),)) or not ((variances > 0) & variances.isfinite()).all():
        raise ValueError(
            f"noise: expected a positive variance, or one for each of {len(stack)} tilts, got {variances.tolist()}."
        )
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: expected a share from 0 to less than 1, got {held_out}.")
    drawn = torch.rand(stack.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return stack, variances.expand(len(stack))[:, None, None], (drawn >= held_out).to(stack)


def _lacking(variance: float, metric: Metric) -> float:
    """v of equation (2): what the network still lacks of a voxel's variance, 0 for a metric without it."""
    if metric not in ("covariance", "likelihood"):
        raise ValueError(f"metric: expected 'covariance' or 'likelihood', got {metric!r}.")
    return _LACKING * variance if metric == "covariance" else 0.0


def _voxel_variance(
    physics: ForwardOperator, images: torch.Tensor, noise: torch.Tensor, generator: torch.Generator
) -> float:
    """v: the variance of a white volume whose images would be as strong as these, less their noise.

    From the mean of the diagonal of A A^T, by one random volume (Hutchinson 1990, doi:10.1080/03610919008812866), and
    at least a hundredth of what the noise alone would give. Images are taken about that of nothing.
    """
    volume = torch.randn(physics.volume_shape, generator=generator, dtype=torch.float64, device=generator.device)
    with torch.no_grad():
        gain = float(physics.A(volume.to(images)[None, None]).var(unbiased=False))
        empty = physics.A(images.new_zeros(1, 1, *physics.volume_shape))[0, 0]
    strong = float(((images - empty).square() - noise).mean())
    return max(strong, 0.01 * float(noise.mean())) / gain
