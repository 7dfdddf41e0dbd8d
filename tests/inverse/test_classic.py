"""Priors: each map with its exact adjoint and bound, each dual step with what it minimises, each value by hand."""

import math

import pytest
import torch
from deepinv.models import TVDenoiser
from deepinv.optim.prior import TVPrior

from inverse.priors.classic import (
    Constraint,
    GeneralizedVariation,
    Positivity,
    Support,
    TotalVariation,
    Wavelets,
    gradient,
    lengths,
    symmetric_gradient,
    symmetric_gradient_adjoint,
)

NORMS = [
    TotalVariation(),
    TotalVariation((0.5, 1.0, 2.0), isotropic=False),
    GeneralizedVariation(1.5),
    Wavelets("haar", 2),
    Wavelets("db2", 2),
]
SHAPES = [(2, 1, 6, 7, 8), (1, 2, 5, 4, 9)]


def random(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=dtype)


def fields_like(fields, generator):
    return tuple(random(f.shape, generator, f.dtype) for f in fields)


def inner(a, b):
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True) if x is not None)


@pytest.mark.parametrize("prior", [*NORMS, Constraint(Positivity())], ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
def test_adjoints_and_bounds(prior, shape, generator):
    """<K x, u> = <x, K^T u> to rounding, and |K|^2 within its bound, by power iteration."""
    x, w = random(shape, generator), prior.start(random(shape, generator))
    w = None if w is None else random(w.shape, generator)
    seen = prior.analyse(x, w)
    u = fields_like(seen, generator)
    size = math.sqrt(inner(seen, seen) * inner(u, u))
    assert inner(seen, u) == pytest.approx(inner((x, w), prior.adjoint(u)), abs=1e-14 * size)
    (b, c), norm = prior.bounds, 0.0
    for _ in range(60):  # of K diag(1/b, 1/c) K^T
        back, other = prior.adjoint(u)
        u = prior.analyse(back / b, None if other is None else other / c)
        norm = math.sqrt(inner(u, u))
        u = tuple(f / norm for f in u)
    assert 0.5 < norm < 1 + 1e-9


def test_the_symmetric_gradient(generator):
    """Its adjoint, and its length, against a loop over the nine entries."""
    w, u = random((3, 5, 6, 7), generator), random((6, 5, 6, 7), generator)
    left = float((symmetric_gradient(w) * u).sum())
    assert left == pytest.approx(float((w * symmetric_gradient_adjoint(u)).sum()), rel=1e-12)
    full = torch.stack([gradient(part) for part in w])
    full = (full + full.transpose(0, 1)) / 2
    torch.testing.assert_close(lengths(symmetric_gradient(w)), full.flatten(0, 1).norm(dim=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_total_variation_is_that_of_deepinv(shape, generator):
    x, prior = random(shape, generator), TotalVariation()
    torch.testing.assert_close(prior.value(prior.analyse(x)), TVPrior().fn(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(x).movedim(0, -1), TVDenoiser.nabla(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["haar", "db2"])
def test_wavelets_are_a_tight_frame(name, generator):
    """K^T K = 1, also where filters are longer than the volume; db2 does not see a ramp, away from where it wraps."""
    prior = Wavelets(name, 3)
    x = random((2, 1, 6, 7, 5), generator)
    torch.testing.assert_close(prior.adjoint(prior.analyse(x))[0], x, rtol=0, atol=1e-13)
    ramp = torch.arange(24, dtype=torch.float64).expand(1, 1, 4, 4, 24)
    seen = Wavelets(name, 1).analyse(ramp)[0][..., :20].abs().amax()
    assert float(seen) == pytest.approx(0.5 if name == "haar" else 0.0, abs=1e-13)


@pytest.mark.parametrize("prior", NORMS, ids=repr)
def test_the_dual_step_is_a_projection_whose_complement_shrinks(prior, generator):
    """u - dual(u) is the proximal operator of the norm: no other point has a smaller g(p) + |p - u|^2 / 2."""
    x = random((2, 1, 4, 5, 6), generator)
    u = fields_like(prior.analyse(x, prior.start(x)), generator)
    weight = torch.tensor([0.4, 1.7], dtype=torch.float64)
    dual = prior.dual_step(u, 0.7, weight.view(-1, 1, 1, 1, 1))
    again = prior.dual_step(dual, 3.0, weight.view(-1, 1, 1, 1, 1))
    for a, b in zip(dual, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    shrunk = tuple(a - b for a, b in zip(u, dual, strict=True))

    def objective(p):
        away = sum(float((a - b).square().sum()) / 2 for a, b in zip(p, u, strict=True))
        return float((weight * prior.value(p)).sum()) + away

    least = objective(shrunk)
    for _ in range(20):
        step = fields_like(u, generator)
        assert objective(tuple(a + 1e-3 * b for a, b in zip(shrunk, step, strict=True))) > least


@pytest.mark.parametrize("which", [Positivity(), Positivity(-0.3), Support(torch.tensor([0, 1, 1, 0, 1, 1]))], ids=repr)
def test_constraints_by_moreau(which, generator):
    """u - dual(u) is sigma times the nearest point of the set to u / sigma."""
    prior, u = Constraint(which), random((1, 1, 4, 5, 6), generator)
    (dual,) = prior.dual_step((u,), 0.7, torch.tensor(1.0))
    inside = (u - dual) / 0.7
    torch.testing.assert_close(which.project(inside), inside, rtol=0, atol=1e-14)
    for _ in range(20):  # no other point of the set is nearer
        other = which.project(inside + 0.1 * random(u.shape, generator))
        assert float((other - u / 0.7).norm()) >= float((inside - u / 0.7).norm())


def test_values_of_known_volumes():
    flat = torch.full((1, 1, 6, 6, 6), 3.0, dtype=torch.float64)
    step = flat.clone()
    step[..., 3:] += 2.0  # a wall of 36 faces, height 2, across x
    ramp = flat + torch.arange(6, dtype=torch.float64)
    for prior in NORMS:
        assert float(prior.value(prior.analyse(flat, prior.start(flat)))) == pytest.approx(0, abs=1e-11)
    assert float(TotalVariation().value(TotalVariation().analyse(step))) == pytest.approx(72)
    weighted = TotalVariation((3.0, 1.0, 0.25), isotropic=False)
    assert float(weighted.value(weighted.analyse(step))) == pytest.approx(18)
    assert float(weighted.value(weighted.analyse(step.transpose(-1, -3)))) == pytest.approx(216)
    corner = torch.zeros(1, 1, 4, 4, 4, dtype=torch.float64)
    corner[..., 2, 1, 1] = 1.0  # six faces; one voxel has three of them, three have one
    assert float(TotalVariation().value(TotalVariation().analyse(corner))) == pytest.approx(3 + math.sqrt(3))
    assert float(TotalVariation(isotropic=False).value(TotalVariation().analyse(corner))) == pytest.approx(6)
    slope = torch.zeros(3, *ramp.shape, dtype=torch.float64)
    slope[2] = 1.0
    inside = GeneralizedVariation().analyse(ramp, slope)
    assert float(inside[0][..., :-1].norm()) == pytest.approx(0, abs=1e-12)  # w is the gradient, and does not bend
    assert float(inside[1].norm()) == pytest.approx(0, abs=1e-12)
