"""Random draws: they have no derivative, and say so."""

from __future__ import annotations

import torch

from cryosim.core.record import differentiated, hidden

_NO_DERIVATIVE = (
    "A draw of counts or events has no derivative with respect to its mean. Use an estimator of "
    "cryosim.microscope.likelihood instead: the expected counts themselves, `gaussian_counts` (noise that follows the "
    "mean), or `score_function` (the derivative of an expectation over draws)."
)


class _Drawn(torch.autograd.Function):
    """A draw, that refuses derivatives instead of returning zeros as torch.poisson does."""

    generate_vmap_rule = True

    @staticmethod
    def forward(drawn: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return drawn.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(_NO_DERIVATIVE)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_NO_DERIVATIVE)


def without_derivative(drawn: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The draw; where derivatives by its mean may be asked for, one that raises RuntimeError when they are."""
    return _Drawn.apply(drawn, mean) if differentiated(mean) else drawn  # type: ignore[return-value]


def refuse_transforms(name: str) -> None:
    """RuntimeError inside torch.func, for draws whose number is random."""
    if hidden():
        raise RuntimeError(
            f"{name}: electrons cannot be drawn one by one inside torch.func or a compiled graph. Draw outside of it. "
            + _NO_DERIVATIVE
        )
