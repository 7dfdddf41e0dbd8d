"""Noise of tilt series for deepinv: each model draws data, and the fidelity built on it is the likelihood of that draw.

deepinv's own noise cannot differ between tilts, and its Poisson likelihood has a gradient off by the square of the
gain, a prox that is off at any gain, and a value that mixes the items of a batch. Here the fidelity holds the noise
model itself, so electrons, detector and frames stand in one place and `update` reaches both.

Data in counts: the operator predicts the contrast x = intensity - 1, and

    y ~ counts of the detector, expected electrons = electrons (1 + x) gain.

The blur of the camera, its MTF, belongs to the operator.

Of `prox` there are two. That of the distance in the data's own domain (`fidelity.prox_d`) is exact. That through an
operator (`fidelity.prox`) has no closed form; deepinv would run 50 steps of gradient descent of step 1, which diverge
unless gamma |A|^2 times the curvature is below 1, so it is refused here. PGD, FISTA and GD need the gradient only; PDCP
splits A off and calls `prox_conjugate`, which therefore acts on data.
"""

from __future__ import annotations

import math

import torch
from deepinv.optim import DataFidelity
from deepinv.optim.distance import Distance
from deepinv.physics import Denoising, NoiseModel, Physics

from cryosim.core.record import hidden
from cryosim.microscope.counting import events_per_frame, sample_counts
from cryosim.microscope.detector import Detector
from cryosim.microscope.likelihood import check_counts, negative_log_likelihood
from cryosim.microscope.optics import is_zero
from cryosim.microscope.proximal import binary_prox, poisson_prox


class CountingNoise(NoiseModel):
    """Counts of a detector, drawn from the contrast (batch, channel, tilt, y, x) that an operator predicts.

    Parameters
    ----------
    electrons : float, tensor (tilt,) or (batch, tilt)
        That a pixel detects without a specimen: dose times pixel area times quantum efficiency [e-/px]. Kept as the
        buffer `electrons` (1 or batch, tilt), which `update(electrons=...)` changes.
    detector : Detector
        Its `counting`, gain, dark events and coincidence decide how counts fall.
    frames : int, tensor (tilt,) or (batch, tilt)
        Camera frames of each tilt; the buffer `frames`.
    clip : bool
        Draw from max(1 + x, 0) instead of refusing negative intensities, as linear operators may predict them.
    rng : torch.Generator, optional
        On the device of the data.

    Raises
    ------
    ValueError
        For electrons or frames that are not positive, or of another shape.
    """

    electrons: torch.Tensor
    frames: torch.Tensor

    def __init__(
        self,
        electrons: float | torch.Tensor,
        detector: Detector,
        frames: int | torch.Tensor = 1,
        *,
        clip: bool = False,
        rng: torch.Generator | None = None,
    ) -> None:
        super().__init__(rng=rng)  # type: ignore[arg-type]  # None is none
        self.detector, self.clip = detector, clip
        self.register_buffer("electrons", _per_tilt("electrons", electrons))
        self.register_buffer("frames", _per_tilt("frames", frames, whole=True))

    def update_parameters(
        self, electrons: float | torch.Tensor | None = None, frames: int | torch.Tensor | None = None, **kwargs
    ) -> None:
        """Take new electrons or frames of the shapes of the constructor; deepinv's other keywords pass by."""
        if electrons is not None:
            self.electrons = _per_tilt("electrons", electrons)
        if frames is not None:
            self.frames = _per_tilt("frames", frames, whole=True)

    def __mul__(self, other) -> NoiseModel:
        """Refused: deepinv would compose functions that these models do not have, and return no noise at all."""
        raise NotImplementedError("CountingNoise cannot be composed with another noise by `*`; apply one to the other.")

    def forward(
        self,
        input: torch.Tensor,
        seed: int | None = None,
        electrons: float | torch.Tensor | None = None,
        frames: int | torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Counts of the contrast `input`, both (batch, channel, tilt, y, x).

        Raises
        ------
        ValueError
            For negative intensities, unless they are clipped.
        """
        self.update_parameters(electrons=electrons, frames=frames, **kwargs)
        self.rng_manual_seed(seed)  # type: ignore[arg-type]  # None keeps the state
        if not self.clip and not hidden() and (input < -1).any():
            raise ValueError(
                f"CountingNoise: expected a contrast of at least -1, got {float(input.detach().min()):g}: a linear "
                "operator has left its range. Use a weaker specimen, or clip=True to take the intensity as 0."
            )
        expected = self.expected(input.clamp_min(-1))
        many = self.frames_of(expected).flatten(1, 2).long().tolist()
        if all(n == many[0][0] for row in many for n in row):
            return sample_counts(expected, self.detector, many[0][0], generator=self.rng)
        drawn = [
            torch.stack(
                [
                    sample_counts(images, self.detector, n, generator=self.rng)
                    for images, n in zip(item.unbind(1), row, strict=True)
                ],
                1,
            )
            for item, row in zip(expected, many * (len(expected) // len(many)), strict=True)
        ]
        return torch.stack(drawn)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """Expected electrons (batch, channel, tilt, y, x) [e-/px] of the contrast x of the same shape."""
        return self.scale(x) * (1 + x)

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """Electrons that a pixel detects without a specimen, gain included, which broadcast against x [e-/px]."""
        electrons = _against(self.electrons, x)
        return electrons if self.detector.gain is None else electrons * self.detector.gain.to(x)

    def frames_of(self, x: torch.Tensor) -> torch.Tensor:
        """Frames (1 or batch, 1, tilt) of images (batch, channel, tilt, y, x)."""
        return _against(self.frames, x)[..., 0, 0].expand(-1, 1, x.shape[2])


class _Likelihood(DataFidelity):
    """What the fidelities share: PDCP's step on the data."""

    def prox_conjugate(self, x, y, physics, *args, gamma=1.0, lamb=1.0, **kwargs) -> torch.Tensor:
        """prox of the conjugate of the distance, for dual variables x of the shape of the data, as PDCP wants it."""
        return self.d.prox_conjugate(x, y, gamma=gamma, lamb=lamb)


class CountingFidelity(_Likelihood):
    """-log P(counts | contrast) of a `CountingNoise`: one value for each item of the batch.

    Parameters
    ----------
    noise : CountingNoise
        Held, not copied: what `update` changes there holds here.

    Raises
    ------
    ValueError
        For a detector with coloured noise.

    Notes
    -----
    A contrast below -1 has the value +inf and the gradient -inf, and a fixed step that lands there ends in NaN: the
    curvature, electrons^2 counts / mean^2, has no bound towards a mean of 0. deepinv's `backtracking=True` turns back
    from such a step, and a prox keeps to the inside.
    """

    def __init__(self, noise: CountingNoise) -> None:
        super().__init__()
        if noise.detector.nps is not None:
            raise ValueError(
                "CountingFidelity: expected a detector of white noise, got one with nps: its pixels are not "
                "independent. Use TiltGaussianFidelity, or detector.replace(nps=None) as an approximation."
            )
        self.d = _CountingDistance(noise)

    @property
    def noise(self) -> CountingNoise:
        """The noise model whose likelihood this is."""
        return self.d.noise

    def prox(self, x: torch.Tensor, y: torch.Tensor, physics: Physics, *args, gamma=1.0, **kwargs) -> torch.Tensor:
        """prox of the distance where the operator is the identity.

        Raises
        ------
        NotImplementedError
            Through any other operator.
        """
        if isinstance(physics, Denoising):
            return self.d.prox(x, y, gamma=gamma)
        raise NotImplementedError(
            f"CountingFidelity.prox: expected the identity (deepinv's Denoising), got {type(physics).__name__}: "
            "through an operator there is no closed form. Use the gradient (GD, PGD, FISTA), or PDCP with K=physics.A."
        )


class _CountingDistance(Distance):
    def __init__(self, noise: CountingNoise) -> None:
        super().__init__()
        self.noise = noise

    def fn(self, x: torch.Tensor, y: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        _expect_like(x, y)
        value = negative_log_likelihood(y, self.noise.expected(x), self.noise.detector, self.noise.frames_of(x))
        return value.sum((1, 2))

    def grad(self, x: torch.Tensor, y: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        check_counts(y, self.noise.detector, self.noise.frames_of(x))
        return torch.func.grad(lambda u: self.fn(u, y).sum())(x)

    def prox(self, x: torch.Tensor, y: torch.Tensor, *args, gamma: float | torch.Tensor = 1.0, **kwargs):
        """Minimiser v of gamma d(v, y) + |v - x|^2 / 2; gamma one number or one for each item."""
        _expect_like(x, y)
        noise, detector = self.noise, self.noise.detector
        check_counts(y, detector, noise.frames_of(x))
        radius = detector.coincidence_radius
        if not is_zero(radius):
            raise NotImplementedError(
                f"CountingFidelity.prox: expected pixels that do not depend on each other, got a coincidence radius of "
                f"{float(radius):g} px. Use the gradient, or detector.replace(coincidence_radius=0.0)."
            )
        many, scale, step = noise.frames_of(x)[..., None, None], noise.scale(x), _per_item(gamma, x)
        background = scale if detector.dark is None else scale + many * detector.dark.to(x)
        y = y.to(x.dtype)
        if detector.counting == "binary":
            v = binary_prox(x, y, step, many, scale, background)
        else:
            v = poisson_prox(x, y, step, scale, background)
        below = events_per_frame(noise.expected(v.detach()) / many, detector) < 0  # of a mean of 0, by rounding
        return torch.where(below, v + 8 * torch.finfo(v.dtype).eps * v.detach().abs(), v)


class TiltGaussianNoise(NoiseModel):
    """y = x + std eps with a standard deviation for each tilt of (batch, channel, tilt, y, x).

    Parameters
    ----------
    std : float, tensor (tilt,) or (batch, tilt)
        In units of the data; kept as the buffer `std` (1 or batch, tilt), which `update(std=...)` changes.
    rng : torch.Generator, optional
        On the device of the data.

    Raises
    ------
    ValueError
        For standard deviations that are not positive, or of another shape.
    """

    std: torch.Tensor

    def __init__(self, std: float | torch.Tensor, *, rng: torch.Generator | None = None) -> None:
        super().__init__(rng=rng)  # type: ignore[arg-type]  # None is none
        self.register_buffer("std", _per_tilt("std", std))

    def update_parameters(self, std: float | torch.Tensor | None = None, **kwargs) -> None:
        """Take new standard deviations of the shapes of the constructor; deepinv's other keywords pass by."""
        if std is not None:
            self.std = _per_tilt("std", std)

    def forward(
        self, input: torch.Tensor, seed: int | None = None, std: float | torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """Noisy images (batch, channel, tilt, y, x); differentiable in `input` and std."""
        self.update_parameters(std=std, **kwargs)
        self.rng_manual_seed(seed)  # type: ignore[arg-type]  # None keeps the state
        return input + _against(self.std, input) * self.randn_like(input)


class TiltGaussianFidelity(_Likelihood):
    """-log of the normal density of a `TiltGaussianNoise`, constants included: one value for each item of the batch.

    Parameters
    ----------
    noise : TiltGaussianNoise
        Held, not copied: what `update` changes there holds here.
    """

    def __init__(self, noise: TiltGaussianNoise) -> None:
        super().__init__()
        self.d = _TiltGaussianDistance(noise)

    @property
    def noise(self) -> TiltGaussianNoise:
        """The noise model whose likelihood this is."""
        return self.d.noise

    def prox(self, x: torch.Tensor, y: torch.Tensor, physics: Physics, *args, gamma=1.0, **kwargs) -> torch.Tensor:
        """prox through the operator, by its own `prox_l2`, where all tilts of an item have one standard deviation.

        Raises
        ------
        NotImplementedError
            Where they differ between tilts.
        """
        if isinstance(physics, Denoising):
            return self.d.prox(x, y, gamma=gamma)
        std = self.noise.std
        if not (std == std[:, :1]).all():
            raise NotImplementedError(
                "TiltGaussianFidelity.prox: expected one standard deviation for all tilts, got several. Use the "
                "gradient (GD, PGD, FISTA), or PDCP with K=physics.A."
            )
        gamma = torch.as_tensor(gamma, dtype=x.dtype, device=x.device).reshape(-1)
        return physics.prox_l2(x, y, gamma / std[:, 0].to(x) ** 2)  # type: ignore[attr-defined]


class _TiltGaussianDistance(Distance):
    def __init__(self, noise: TiltGaussianNoise) -> None:
        super().__init__()
        self.noise = noise

    def fn(self, x: torch.Tensor, y: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        _expect_like(x, y)
        std = _against(self.noise.std, x)
        return (((x - y) / std) ** 2 / 2 + torch.log(std) + math.log(2 * math.pi) / 2).flatten(1).sum(1)

    def grad(self, x: torch.Tensor, y: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return (x - y) / _against(self.noise.std, x) ** 2

    def prox(self, x: torch.Tensor, y: torch.Tensor, *args, gamma: float | torch.Tensor = 1.0, **kwargs):
        weight = _per_item(gamma, x) / _against(self.noise.std, x) ** 2
        return (x + weight * y) / (1 + weight)


def counting_model(
    electrons: float | torch.Tensor,
    detector: Detector,
    frames: int | torch.Tensor = 1,
    *,
    clip: bool = False,
    rng: torch.Generator | None = None,
) -> tuple[CountingNoise, CountingFidelity]:
    """Noise and its likelihood as one model: the fidelity holds the noise, so that they cannot disagree.

    Parameters
    ----------
    electrons, detector, frames, clip, rng
        As of `CountingNoise`.

    Returns
    -------
    noise : CountingNoise
        For `TiltProjection(..., noise_model=noise)`.
    fidelity : CountingFidelity
        For deepinv's optimisers.

    Raises
    ------
    ValueError
        From either of them.
    """
    noise = CountingNoise(electrons, detector, frames, clip=clip, rng=rng)
    return noise, CountingFidelity(noise)


def _per_tilt(name: str, value: float | torch.Tensor, whole: bool = False) -> torch.Tensor:
    """A positive number or tensor (tilt,) or (batch, tilt), as (1 or batch, 1 or tilt)."""
    if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
        value = torch.as_tensor(value, dtype=torch.float64)
    if value.ndim > 2 or not value.numel():
        raise ValueError(f"{name}: expected a number, (tilt,) or (batch, tilt), got the shape {tuple(value.shape)}.")
    if not hidden() and not ((value > 0) & torch.isfinite(value) & ((value == value.round()) | (not whole))).all():
        kind = "positive whole numbers" if whole else "positive numbers"
        raise ValueError(f"{name}: expected {kind}, got {value.detach().flatten().tolist()[:3]}.")
    return value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)


def _against(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values (1 or batch, 1 or tilt) as (1 or batch, 1, 1 or tilt, 1, 1), to go with (batch, channel, tilt, y, x)."""
    if x.ndim != 5 or value.shape[0] not in (1, x.shape[0]) or value.shape[1] not in (1, x.shape[2]):
        raise ValueError(
            f"noise: expected images (batch, channel, tilt, y, x) for values of (batch, tilt) = {tuple(value.shape)}, "
            f"got {tuple(x.shape)}."
        )
    return value.to(x)[:, None, :, None, None]


def _per_item(gamma: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gamma = torch.as_tensor(gamma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1, 1)
    if gamma.shape[0] not in (1, x.shape[0]) or (not hidden() and not (gamma > 0).all()):
        raise ValueError(f"gamma: expected a positive number, or one for each of {x.shape[0]} items.")
    return gamma


def _expect_like(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"fidelity: expected data of the shape of the images, {tuple(x.shape)}, got {tuple(y.shape)}.")
