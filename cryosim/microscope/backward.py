"""Multislice as a chain of steps, and its gradient in constant memory.

One step takes the wave u in front of a slice to the wave in front of the next,

    z = t u,    t = exp(i (p + i q) v),    u' = F^-1[ D F[z] ]

D = P L being flight P and band limit L. Given g = dLoss/du' (conj. Wirtinger, as torch has it),

    lambda = F^-1[ conj(D) F[g] ],    dLoss/du = conj(t) lambda,    dLoss/d(ln t) = conj(z) lambda

so the backward pass needs u at every slice, last slice first. Instead of keeping them it runs the steps in reverse,

    u = L t^-1 F^-1[ conj(P) F[u'] ]

which is exact but for what the band limit cut off z, less than 1e-6 of the wave a slice for molecules. The forward
pass tries it at four slices. Where the error is too large (rough slices, heavy atoms), where the wave rebuilt in front
of the first slice turns out not to be the incident one (strong absorbers), and in double precision, the backward pass
starts from checkpoints at every sqrt(n)-th slice instead: exact always, at the price of 2 sqrt(n) waves.

The slices themselves are asked for again, one by one, and torch differentiates each slice's own small graph. So a
source must be a tensor of slices or a record (a pytree) whose tensors it depends on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from cryosim.core.record import Record

_TOLERANCE = 3e-5
"""Of rebuilt waves, relative: beyond it the backward pass takes checkpoints."""

_ROUNDING = 2e-7
"""Of one step there and back in single precision."""


Watch = Callable[[int, torch.Tensor | None, torch.Tensor, torch.Tensor], None]
"""Sees (i, u, t, F[z]) of every slice."""


class Step(NamedTuple):
    """What all steps share.

    Attributes
    ----------
    turn, damp : tensor () or (..., 1, 1)
        p and q [rad/(V·Å)].
    flight : tensor (..., y, x)
        D from one slice to the next.
    back : tensor (..., y, x)
        D from the last slice to the plane the wave is referred to.
    limit : tensor (y, x), optional
        Low-pass of the transmission.
    lossless : bool
        Whether q is known to be 0.
    """

    turn: torch.Tensor
    damp: torch.Tensor
    flight: torch.Tensor
    back: torch.Tensor
    limit: torch.Tensor | None = None
    lossless: bool = False

    def transmission(self, v: torch.Tensor) -> torch.Tensor:
        """t (..., y, x) of a slice v (..., y, x) [V·Å]."""
        phase, damping = self._exponent(v)
        t = torch.complex(torch.cos(phase), torch.sin(phase))
        t = t if damping is None else t * torch.exp(-damping)
        return t if self.limit is None else torch.fft.ifft2(torch.fft.fft2(t) * self.limit)

    def inverse_transmission(self, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """1 / t, without a division."""
        _, damping = self._exponent(v)
        return t.conj() if damping is None else t.conj() * torch.exp(2 * damping)

    def _exponent(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if v.is_complex():
            return self.turn * v.real - self.damp * v.imag, self.damp * v.real + self.turn * v.imag
        return self.turn * v, None if self.lossless else self.damp * v

    def all(self, slices: Any, incident: torch.Tensor | None, watch: Watch | None = None) -> torch.Tensor:
        """Exit wave (..., y, x), by operations that torch differentiates."""
        n, wave = len(slices), incident
        for i in range(n):
            t = self.transmission(slices[i])
            spectrum = torch.fft.fft2(t if wave is None else t * wave)
            if watch is not None:
                watch(i, wave, t, spectrum)
            wave = torch.fft.ifft2(spectrum * (self.flight if i < n - 1 else self.back))
        assert wave is not None
        return wave


def constant_memory_multislice(
    slices: Any, step: Step, incident: torch.Tensor | None, *, invertible: bool
) -> torch.Tensor:
    """`Step.all` with a backward pass in constant memory, where the source allows it.

    Parameters
    ----------
    slices : source of slices
    step : Step
        Without a limit on the transmission.
    incident : tensor (..., y, x), optional
    invertible : bool
        Whether the flights have modulus 1 or 0 everywhere; else checkpoints are used.
    """
    if not isinstance(slices, Record) or not torch.is_grad_enabled():
        return step.all(slices, incident)
    leaves, structure = _pytree.tree_flatten(slices)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[i] for i in at]
    if incident is None:
        incident = torch.ones((), dtype=step.flight.dtype, device=step.flight.device)
    inputs = [*step[:4], incident, *tensors]
    if not any(x.requires_grad for x in inputs):
        return step.all(slices, incident)
    values = getattr(slices, "values", None)  # of `Slices`: a tensor whose slices need no graph of their own
    source = _Source(leaves, at, structure, next((j for j, x in enumerate(tensors) if x is values), None))
    return _Multislice.apply(source, invertible, step.lossless, *inputs)  # type: ignore[return-value]


class _Source(NamedTuple):
    """A source of slices taken apart into tensors, to be put together again from others."""

    leaves: list[Any]
    at: list[int]  # which leaves are tensors
    structure: Any
    values: int | None  # which of the tensors holds all slices, if one does

    def rebuilt(self, tensors: Any) -> Any:
        leaves = list(self.leaves)
        for i, tensor in zip(self.at, tensors, strict=True):
            leaves[i] = tensor
        return _pytree.tree_unflatten(leaves, self.structure)


class _Multislice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: _Source, invertible: bool, lossless: bool, *inputs: torch.Tensor) -> torch.Tensor:
        turn, damp, flight, back, incident, *tensors = inputs
        step, slices = Step(turn, damp, flight, back, None, lossless), source.rebuilt(tensors)
        trial = _Trial(step, slices) if invertible and flight.dtype == torch.complex64 else None
        exit_wave = step.all(slices, incident, trial)
        ctx.save_for_backward(exit_wave, *inputs)
        ctx.source, ctx.lossless = source, lossless
        ctx.reversible = trial is not None and trial.succeeds()
        return exit_wave

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        exit_wave, *inputs = ctx.saved_tensors
        turn, damp, flight, back, incident, *tensors = inputs
        step = Step(turn, damp, flight, back, None, ctx.lossless)
        collect = functools.partial(_collect, step, ctx.source, incident, tensors, gradient, ctx.needs_input_grad[3:])
        grads = collect(_Reversed(step, exit_wave)) if ctx.reversible else None
        if grads is None:
            grads = collect(_Replayed(step, ctx.source.rebuilt(tensors), incident))
        return None, None, None, *(grads or ())


class _Trial:
    """Rebuilds the wave in front of four slices from the wave behind them, while both are at hand."""

    def __init__(self, step: Step, slices: Any) -> None:
        self._step, self._slices, self._inside = step, slices, _inside(step)
        self._chosen, self._largest = {i * len(slices) // 4 for i in range(4)}, 0.0

    def __call__(self, i: int, wave: torch.Tensor | None, t: torch.Tensor, spectrum: torch.Tensor) -> None:
        if i in self._chosen and wave is not None:
            inverse = self._step.inverse_transmission(self._slices[i], t)
            rebuilt = torch.fft.ifft2(_before(inverse, spectrum, self._inside))
            self._largest = max(self._largest, _difference(rebuilt, wave))

    def succeeds(self) -> bool:
        """Whether the errors of all slices, less what is rounding, may be expected to stay within the tolerance.

        They add up to a third at most of what the largest would make of all slices.
        """
        systematic = max(self._largest**2 - _ROUNDING**2, 0.0) ** 0.5
        return len(self._slices) * systematic <= 3 * _TOLERANCE


class _Reversed:
    """Waves in front of the slices, last first, by the steps in reverse."""

    def __init__(self, step: Step, exit_wave: torch.Tensor) -> None:
        self._step, self._flown, self._inside = step, step.back, _inside(step)
        self._spectrum = torch.fft.fft2(exit_wave)

    def before(self, i: int, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inverse = self._step.inverse_transmission(v, t)
        self._spectrum = _before(inverse, self._spectrum * self._flown.conj(), self._inside)
        self._flown = self._step.flight
        return torch.fft.ifft2(self._spectrum)

    def agrees(self, wave: torch.Tensor, incident: torch.Tensor) -> bool:
        """Whether the wave rebuilt in front of slice 0 is the incident one."""
        return _difference(wave, incident) <= _TOLERANCE


def _inside(step: Step) -> torch.Tensor:
    return (step.flight.abs() > 0.5).to(step.turn.dtype)


def _before(inverse: torch.Tensor, behind: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """L F[t^-1 F^-1[behind]]."""
    return torch.fft.fft2(inverse * torch.fft.ifft2(behind * inside)) * inside


def _difference(wave: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square, relative."""
    return float(
        torch.view_as_real(wave - other).square().mean().sqrt() / torch.view_as_real(other).square().mean().sqrt()
    )


class _Replayed:
    """Waves in front of the slices, last first, by running forward again from checkpoints."""

    def __init__(self, step: Step, slices: Any, incident: torch.Tensor) -> None:
        self._step, self._slices = step, slices
        self._length = math.isqrt(len(slices) - 1) + 1
        self._kept, self._checkpoints = [], [incident]
        for i in range((len(slices) - 1) // self._length * self._length):
            incident = self._next(incident, i)
            if (i + 1) % self._length == 0:
                self._checkpoints.append(incident)

    def _next(self, wave: torch.Tensor, i: int) -> torch.Tensor:
        behind = wave * self._step.transmission(self._slices[i].detach())
        return torch.fft.ifft2(torch.fft.fft2(behind) * self._step.flight)

    def before(self, i: int, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if not self._kept:
            self._kept.append(self._checkpoints.pop())
            for j in range(i // self._length * self._length, i):
                self._kept.append(self._next(self._kept[-1], j))
        return self._kept.pop()

    def agrees(self, wave: torch.Tensor, incident: torch.Tensor) -> bool:
        return True


def _collect(
    step: Step,
    source: _Source,
    incident: torch.Tensor,
    tensors: list[torch.Tensor],
    gradient: torch.Tensor,
    needed: tuple[bool, ...],
    waves: _Reversed | _Replayed,
) -> list[torch.Tensor | None] | None:
    """Gradients of turn, damp, flight, back, incident and the tensors; None where the waves turn out to be wrong."""
    inputs = [*step[:4], incident, *tensors]
    grads = [torch.zeros_like(x) if need else None for x, need in zip(inputs, needed, strict=True)]
    turn, damp, of_between, of_back, _, *of_tensors = grads
    wanted = [j for j, grad in enumerate(of_tensors) if grad is not None and j != source.values]
    whole = None if source.values is None else of_tensors[source.values]
    local = [x.detach().requires_grad_(j in wanted) for j, x in enumerate(tensors)]
    slices = source.rebuilt(local)
    flown, of_flight = step.back, of_back
    for i in reversed(range(len(slices))):
        with torch.set_grad_enabled(bool(wanted)):
            slice_ = slices[i]
        v = slice_.detach()
        t = step.transmission(v)
        wave = waves.before(i, v, t)
        if i == 0 and not waves.agrees(wave, incident):
            return None
        z = t * wave
        spectrum = torch.fft.fft2(gradient)
        if of_flight is not None:
            pixels = spectrum.shape[-1] * spectrum.shape[-2]
            of_flight += (torch.fft.fft2(z).conj() * spectrum).sum_to_size(of_flight.shape) / pixels
        arriving = torch.fft.ifft2(spectrum * flown.conj())
        of_log = z.conj() * arriving  # dLoss / d ln t
        gradient = t.conj() * arriving
        flown, of_flight = step.flight, of_between
        for of_coupling, part in ((turn, torch.imag), (damp, lambda x: -x.real)):
            if of_coupling is not None:
                terms = part(v.conj() * of_log).double()
                of_coupling += terms.sum_to_size(of_coupling.shape).to(of_coupling.dtype)
        if whole is None and not slice_.requires_grad:
            continue
        if v.is_complex():
            of_slice = torch.complex(-step.damp, -step.turn) * of_log
        else:
            of_slice = step.turn * of_log.imag - step.damp * of_log.real
        of_slice = of_slice.sum_to_size(v.shape)
        if whole is not None:
            whole[..., i, :, :] += of_slice
        if slice_.requires_grad:
            parts = torch.autograd.grad(slice_, [local[j] for j in wanted], of_slice, allow_unused=True)
            for j, part in zip(wanted, parts, strict=True):
                if part is not None:
                    of_tensors[j] += part  # type: ignore[operator]
    if grads[4] is not None:
        grads[4] += gradient.sum_to_size(incident.shape)
    return [*grads[:5], *of_tensors]
