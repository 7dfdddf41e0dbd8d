"""Multislice as a chain of steps, and its gradient in constant memory.

One step takes the wave u in front of a slice to the wave in front of the next,

    z = t u,    t = exp(i (p + i q) v),    u' = F^-1[ D F[z] ]

D = P L being flight P and band limit L. Given g = dLoss/du' (conj. Wirtinger, as torch has it),

    dLoss/dz = F^-1[ conj(D) F[g] ],    dLoss/du = conj(t) dLoss/dz,    dLoss/d(ln t) = conj(u) dLoss/du

so the backward pass needs u at every slice, last slice first. Instead of keeping them it runs the steps in reverse,

    u = L t^-1 F^-1[ conj(D) F[u'] ]

side by side with the gradient, whose steps are the same but for L, and for conj(t) in place of t^-1.

This is exact but for what the band limit cut off z, less than 1e-6 of the wave a slice for molecules. It is tried on
the incident wave at four slices. Where u differs little from what it is before the last L, the product with the
gradient takes the latter, which saves a transform. Where the error is too large (rough slices, heavy atoms), where the
wave rebuilt in front of the first slice turns out not to be the incident one (strong absorbers), where the flights have
a gradient too (a sum in which much cancels, so that small errors count) and in double precision, the backward pass
starts from checkpoints at every sqrt(n)-th slice instead: exact always, at the price of 2 sqrt(n) waves. A gradient
that is to be differentiated again takes the whole graph.

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

from cryosim.core.record import Record, hidden
from cryosim.core.slices import in_order

_TOLERANCE = 3e-5
"""Of rebuilt waves, relative: beyond it the backward pass takes checkpoints."""

_ROUNDING = 2e-7
"""Of one step there and back in single precision."""


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

    def reverse_transmissions(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """conj(t) and 1 / t (..., y, x); the same tensor where nothing is damped."""
        phase, damping = self._exponent(v)
        back = torch.complex(torch.cos(phase), -torch.sin(phase))
        return (back, back) if damping is None else (back * torch.exp(-damping), back * torch.exp(damping))

    def _exponent(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if v.is_complex():
            return self.turn * v.real - self.damp * v.imag, self.damp * v.real + self.turn * v.imag
        return self.turn * v, None if self.lossless else self.damp * v

    def all(
        self, slices: Any, incident: torch.Tensor | None, watch: Callable[[int, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """Exit wave (..., y, x), by operations torch differentiates; `watch` sees u of every slice but the first."""
        n, wave = len(slices), incident
        for i, v in enumerate(in_order(slices)):
            wave = self.passed(wave, self.transmission(v), self.flight if i < n - 1 else self.back)
            if watch is not None and i < n - 1:
                watch(i + 1, wave)
        assert wave is not None
        return wave

    def passed(self, wave: torch.Tensor | None, t: torch.Tensor, flight: torch.Tensor) -> torch.Tensor:
        """The wave u' (..., y, x) behind a transmission t, which is used up, and a flight."""
        spectrum = torch.fft.fft2(t if wave is None else times(t, wave))
        return torch.fft.ifft2(times(spectrum, flight))


def times(fresh: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Product with a tensor that nobody else holds: in place where no gradient asks for it."""
    grows = torch.broadcast_shapes(fresh.shape, factor.shape) != fresh.shape
    return fresh * factor if grows or torch.is_grad_enabled() or hidden() else fresh.mul_(factor)


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
    of_values = next((j for j, x in enumerate(tensors) if x is values and _are_the_slices(x, slices)), None)
    source = _Source(leaves, at, structure, of_values)
    return _Multislice.apply(source, invertible, step.lossless, *inputs)  # type: ignore[return-value]


def _are_the_slices(values: torch.Tensor, slices: Any) -> bool:
    """Whether slice i is nothing but values[..., i, :, :]: the same memory, seen the same way."""
    if values.ndim < 3 or values.shape[-3] != len(slices):
        return False
    pairs = [(values[..., i, :, :], slices[i]) for i in (0, len(slices) - 1)]
    return all(a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() for a, b in pairs)


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
        ctx.source, ctx.lossless, ctx.n_inputs = source, lossless, len(inputs)
        of_flights = any(ctx.needs_input_grad[5:7])  # sums in which much cancels: small errors would count
        ctx.reversible, ctx.masked = (
            _is_reversible(step, slices, incident) if invertible and not of_flights else (False, False)
        )
        checkpoints = _Checkpoints(len(slices), incident)
        exit_wave = step.all(slices, incident, None if ctx.reversible else checkpoints)
        ctx.save_for_backward(exit_wave, *inputs, *checkpoints.waves[1:])
        return exit_wave

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        exit_wave, *saved = ctx.saved_tensors
        inputs, kept = saved[: ctx.n_inputs], saved[ctx.n_inputs :]
        if torch.is_grad_enabled():  # the gradient is to be differentiated again: that takes the whole graph
            inputs = [x.view_as(x) for x in inputs]  # apart: one may come twice, or be made from another
        turn, damp, flight, back, incident, *tensors = inputs
        step, slices = Step(turn, damp, flight, back, None, ctx.lossless), ctx.source.rebuilt(tensors)
        if torch.is_grad_enabled():
            asked = [x for x, need in zip(inputs, ctx.needs_input_grad[3:], strict=True) if need]
            found = iter(
                torch.autograd.grad(step.all(slices, incident), asked, gradient, create_graph=True, allow_unused=True)
            )
            return None, None, None, *(next(found) if need else None for need in ctx.needs_input_grad[3:])
        collect = functools.partial(_collect, step, ctx.source, incident, tensors, ctx.needs_input_grad[3:])
        grads = collect(_Reversed(step, exit_wave, gradient, ctx.masked)) if ctx.reversible else None
        if grads is None:
            checkpoints = _Checkpoints(len(slices), incident)
            checkpoints.waves += kept
            if ctx.reversible:  # none were kept
                step.all(slices, incident, checkpoints)
            grads = collect(_Replayed(step, slices, checkpoints, gradient))
        return None, None, None, *(grads or ())


def _is_reversible(step: Step, slices: Any, incident: torch.Tensor) -> tuple[bool, bool]:
    """Whether waves rebuilt in reverse may be expected to stay within the tolerance, by four slices taken alone.

    All slices make three times the error at most that this allows for one after the other. The second value says
    whether the last band limit must be applied before the wave is used.
    """
    if incident.dtype != torch.complex64:
        return False, True
    inside, rebuilt, cut = _inside(step), 0.0, 0.0
    for i in {i * len(slices) // 4 for i in range(4)}:
        t = step.transmission(slices[i])
        wave = torch.fft.ifft2(torch.fft.fft2(t * incident) * inside) * step.reverse_transmissions(slices[i])[1]
        cut = max(cut, _difference(wave, incident))
        rebuilt = max(rebuilt, _difference(torch.fft.ifft2(torch.fft.fft2(wave) * inside), incident))
    systematic = max(rebuilt**2 - _ROUNDING**2, 0.0) ** 0.5
    return len(slices) * systematic <= 3 * _TOLERANCE, cut > _TOLERANCE


class _Checkpoints:
    """Keeps the wave in front of every `spacing`-th slice."""

    def __init__(self, n: int, incident: torch.Tensor) -> None:
        self.spacing, self.waves = math.isqrt(n - 1) + 1, [incident]

    def __call__(self, i: int, wave: torch.Tensor) -> None:
        if i % self.spacing == 0:
            self.waves.append(wave)


class _Reversed:
    """Waves and gradients in front of the slices, last first, both by the steps in reverse."""

    def __init__(self, step: Step, exit_wave: torch.Tensor, gradient: torch.Tensor, masked: bool) -> None:
        self._step, self._masked, self._inside = step, masked, _inside(step)
        self._spectra = torch.fft.fft2(torch.stack([exit_wave, gradient]))  # (2, ..., y, x)

    @property
    def spectrum(self) -> torch.Tensor:
        """F[g] (..., y, x) behind the slice that comes next."""
        return self._spectra[1]

    def before(self, i: int, v: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u and dLoss / du (..., y, x) in front of slice i; `back` is conj(D) behind it."""
        both = torch.fft.ifft2(self._spectra.mul_(back))
        conjugate, inverse = self._step.reverse_transmissions(v)
        if conjugate is inverse:
            both.mul_(conjugate)
        else:
            both[0].mul_(inverse)
            both[1].mul_(conjugate)
        self._spectra = torch.fft.fft2(both)
        self._spectra[0].mul_(self._inside)
        wave = torch.fft.ifft2(self._spectra[0]) if self._masked or i == 0 else both[0]
        return wave, both[1]

    def agrees(self, wave: torch.Tensor, incident: torch.Tensor) -> bool:
        """Whether the wave rebuilt in front of slice 0 is the incident one."""
        return _difference(wave, incident) <= _TOLERANCE


def _inside(step: Step) -> torch.Tensor:
    return (step.flight.abs() > 0.5).to(step.turn.dtype)


def _difference(wave: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square over the image, relative; the largest of the batch."""
    error, size = (
        torch.view_as_real(x).square().sum(-1).mean((-2, -1)).sqrt() for x in (wave - other, other.expand_as(wave))
    )
    return float((error / size).max())


class _Replayed:
    """The same from checkpoints: the waves by running forward again, the gradient in reverse."""

    def __init__(self, step: Step, slices: Any, checkpoints: _Checkpoints, gradient: torch.Tensor) -> None:
        self._step, self._slices, self._checkpoints = step, slices, checkpoints
        self._kept: list[torch.Tensor] = []
        self.spectrum = torch.fft.fft2(gradient)

    def before(self, i: int, v: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._kept:
            self._kept.append(self._checkpoints.waves.pop())
            for j in range(i // self._checkpoints.spacing * self._checkpoints.spacing, i):
                again = self._step.transmission(self._slices[j].detach())
                self._kept.append(self._step.passed(self._kept[-1], again, self._step.flight))
        conjugate, _ = self._step.reverse_transmissions(v)
        gradient = times(torch.fft.ifft2(times(self.spectrum, back)), conjugate)
        self.spectrum = torch.fft.fft2(gradient)
        return self._kept.pop(), gradient

    def agrees(self, wave: torch.Tensor, incident: torch.Tensor) -> bool:
        return True


def _collect(
    step: Step,
    source: _Source,
    incident: torch.Tensor,
    tensors: list[torch.Tensor],
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
    behind, of_flight = step.back.conj().resolve_conj(), of_back
    gradient = torch.zeros(())
    for i in reversed(range(len(slices))):
        with torch.set_grad_enabled(bool(wanted)):
            slice_ = slices[i]
        v = slice_.detach()
        spectrum = None if of_flight is None else waves.spectrum.clone()
        wave, gradient = waves.before(i, v, behind)
        if i == 0 and not waves.agrees(wave, incident):
            return None
        if of_flight is not None and spectrum is not None:
            pixels = spectrum.shape[-1] * spectrum.shape[-2]
            scattered = torch.fft.fft2(step.transmission(v) * wave)
            of_flight += (scattered.conj() * spectrum).sum_to_size(of_flight.shape) / pixels
        if i == len(slices) - 1:
            behind, of_flight = step.flight.conj().resolve_conj(), of_between
        if whole is None and not slice_.requires_grad and turn is None and damp is None:
            continue
        of_slice = _of_slice(step, v, wave, gradient, turn, damp)
        if whole is not None:
            whole[..., i, :, :] = of_slice
        if slice_.requires_grad:
            parts = torch.autograd.grad(slice_, [local[j] for j in wanted], of_slice, allow_unused=True)
            for j, part in zip(wanted, parts, strict=True):
                if part is not None:
                    of_tensors[j] += part  # type: ignore[operator]
    if grads[4] is not None:
        grads[4] += gradient.sum_to_size(incident.shape)
    return [*grads[:5], *of_tensors]


def _of_slice(
    step: Step,
    v: torch.Tensor,
    wave: torch.Tensor,
    gradient: torch.Tensor,
    turn: torch.Tensor | None,
    damp: torch.Tensor | None,
) -> torch.Tensor:
    """dLoss / dv of a slice v (..., y, x), given u and dLoss / du; adds to the gradients of p and q where asked for."""
    if step.lossless and turn is None and damp is None and not v.is_complex():
        imaginary = (wave.real * gradient.imag).addcmul_(wave.imag, gradient.real, value=-1)
        return (step.turn * imaginary).sum_to_size(v.shape)
    of_log = wave.conj() * gradient  # dLoss / d ln t
    for of_coupling, part in ((turn, torch.imag), (damp, lambda x: -x.real)):
        if of_coupling is not None:
            terms = part(v.conj() * of_log).double()
            of_coupling += terms.sum_to_size(of_coupling.shape).to(of_coupling.dtype)
    if v.is_complex():
        return (torch.complex(-step.damp, -step.turn) * of_log).sum_to_size(v.shape)
    return (step.turn * of_log.imag - step.damp * of_log.real).sum_to_size(v.shape)
