"""Proximal steps of the likelihoods of counts: each pixel alone, in closed form or by Newton steps that converge."""

from __future__ import annotations

import torch

from cryosim.core.record import hidden
from cryosim.microscope.optics import Number, root


def poisson_prox(
    z: torch.Tensor,
    counts: torch.Tensor,
    step: Number,
    scale: Number = 1.0,
    background: Number = 0.0,
) -> torch.Tensor:
    """argmin over x of step (m - k log m) + (x - z)^2 / 2 with m = scale x + background >= 0, for each element.

    Where the slope vanishes, m^2 - B m - step scale^2 k = 0 with B = background + scale z - step scale^2: its root that
    is not negative. Without counts that is max(B, 0).

    Parameters
    ----------
    z, counts : tensor
    step : float or tensor
        Positive.
    scale, background : float or tensor
        Not negative; all of them broadcast. A pixel with scale 0 (a dead one) tells nothing: x = z.

    Returns
    -------
    tensor
        Differentiable in every argument; at the kink B = 0 of k = 0 the slope is 1/2.

    Raises
    ------
    ValueError
        For a step that is not positive, or negative counts or scales.

    Notes
    -----
    Source: P. L. Combettes and J.-C. Pesquet, "Proximal Splitting Methods in Signal Processing" (2011), table 10.2 (the
    function -k log x + w x), DOI 10.1007/978-1-4419-9569-8_10.
    """
    step, scale, background = (torch.as_tensor(v, dtype=z.dtype, device=z.device) for v in (step, scale, background))
    _check(counts, step, scale)
    alive = scale > 0
    per = torch.where(alive, scale, 1.0)
    b = background + per * z - step * per**2
    c = step * per**2 * counts
    size = root(b**2 + 4 * c)
    away = torch.where(b < 0, size - b, 1.0)
    mean = torch.where(b < 0, 2 * c / away, (b + size) / 2)
    return torch.where(alive, (mean - background) / per, z)


def binary_prox(
    z: torch.Tensor,
    counts: torch.Tensor,
    step: Number,
    frames: Number,
    scale: Number = 1.0,
    background: Number = 0.0,
) -> torch.Tensor:
    """argmin over x of step [-k log(1 - exp(-r)) + (T - k) r] + (x - z)^2 / 2, r = (scale x + background) / T >= 0.

    The slope vanishes where g(r) = r - a - c / (exp(r) - 1) = 0, with s = step scale^2 / T^2, c = s k and
    a = (scale z + background) / T - s (T - k). For r > 0, g rises (g' >= 1) and is concave, so the tangent lies above
    it and a Newton step from the left of the root ends between the start and the root: the steps rise to the root,
    at last quadratically, and need no other safeguard than a start on that side. Since exp(r) - 1 >= r, the positive
    root U of r - a - c / r lies to the right; there exp(r) - 1 = c / (r - a) >= c / (U - a) = U at the root, so
    log(1 + U) lies to the left, as does a, where g < 0. The larger of them is the start. Where exp(-r) rules, a step is
    about 1: some log(c) / 2 of them are needed (35 for c = 1e30), otherwise 2 to 6; at most 100 are made.

    Parameters
    ----------
    z, counts : tensor
    step, frames : float or tensor
        Positive.
    scale, background : float or tensor
        Not negative; all of them broadcast. A pixel with scale 0 (a dead one) tells nothing: x = z.

    Returns
    -------
    tensor
        Differentiable in every argument, through the implicit function.

    Raises
    ------
    ValueError
        For a step that is not positive, negative counts or scales, or more counts than frames.
    """
    step, many, scale, background = (
        torch.as_tensor(v, dtype=z.dtype, device=z.device) for v in (step, frames, scale, background)
    )
    _check(counts, step, scale)
    if not hidden() and (counts > many).any():
        raise ValueError(f"counts: expected at most one for each frame, got {float(counts.detach().max()):g}.")
    alive = scale > 0
    per = torch.where(alive, scale, 1.0)
    strength = step * (per / many) ** 2
    a = (per * z + background) / many - strength * (many - counts)
    rate = _BinaryRate.apply(*torch.broadcast_tensors(a, strength * counts))
    return torch.where(alive, (many * rate - background) / per, z)


def _check(counts: torch.Tensor, step: torch.Tensor, scale: torch.Tensor) -> None:
    if hidden():
        return
    if not (step > 0).all():
        raise ValueError(f"step: expected positive numbers, got {float(step.detach().min()):g}.")
    for name, value in (("counts", counts), ("scale", scale)):
        if not (value >= 0).all():
            raise ValueError(f"{name}: expected numbers of at least 0, got {float(value.detach().min()):g}.")


class _BinaryRate(torch.autograd.Function):
    """Root r of r - a - c / (exp(r) - 1): dr/da = P / (P + r - a), dr/dc = exp(-r) / (P + r - a), P = 1 - exp(-r)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        some = c > 0
        size = torch.sqrt(a**2 + 4 * c)
        right = torch.where(a > 0, (a + size) / 2, 2 * c / torch.where(a > 0, 1.0, size - a))
        rate = torch.where(some, torch.maximum(torch.log1p(right), a), 1.0)
        tiny = 4 * torch.finfo(rate.dtype).eps
        for _ in range(100):
            odds = 1 / torch.expm1(rate)
            step = (c * odds - (rate - a)) / (1 + c * odds * (1 + odds))
            step = torch.where(some, step, 0.0)
            rate = rate + step
            if not hidden() and bool((step.abs() <= tiny * rate).all()):
                break
        return torch.where(some, rate, a.clamp_min(0))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        of_a, of_c = _BinaryRate._slopes(*ctx.saved_tensors)
        return gradient * of_a, gradient * of_c

    @staticmethod
    def jvp(ctx, tangent_a, tangent_c):  # type: ignore[override]
        of_a, of_c = _BinaryRate._slopes(*ctx.saved_tensors)
        zero = torch.zeros_like(of_a)
        return of_a * (zero if tangent_a is None else tangent_a) + of_c * (zero if tangent_c is None else tangent_c)

    @staticmethod
    def _slopes(a: torch.Tensor, rate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hit = -torch.expm1(-rate)
        below = hit + rate - a
        below = torch.where(below > 0, below, 1.0)  # a = c = 0: a kink
        return hit / below, torch.exp(-rate) / below
