"""Priors that are not smooth: their maps, their minima, and the weight that the noise asks for."""

import math

import pytest
import torch
from deepinv.optim import L2, PGD
from deepinv.optim.prior import TVPrior

import inverse as inv
from inverse.priors.classic import (
    Constraint,
    GeneralizedVariation,
    Positivity,
    Support,
    TotalVariation,
    Wavelets,
    symmetric_gradient,
    symmetric_gradient_adjoint,
)
from inverse.solvers.primal_dual import matching_weight, primal_dual

ANGLES = torch.linspace(-60, 60, 15, dtype=torch.float64)
PRIORS = [
    TotalVariation(),
    TotalVariation((0.5, 1.0, 2.0), isotropic=False),
    GeneralizedVariation(1.5),
    Wavelets("haar", 2),
    Wavelets("db2", 2),
    Constraint(Positivity()),
]


def blocks(shape=(10, 17, 18), dtype=torch.float64):
    """Two boxes of constant density (1, 1, z, y, x)."""
    volume = torch.zeros(1, 1, *shape, dtype=dtype)
    volume[..., 3:8, 3:9, 4:9] = 1.0
    volume[..., 2:6, 9:14, 8:15] = 0.6
    return volume


def noisy(physics, volume, generator, share=0.3):
    clean = physics.A(volume)
    sigma = share * clean.std()
    return clean + sigma * torch.randn(clean.shape, generator=generator, dtype=clean.dtype), float(sigma**2)


def fields_like(fields, generator):
    return tuple(torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in fields)


def inner(a, b):
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True) if x is not None)


# ---- the maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize("shape", [(2, 1, 6, 7, 8), (1, 1, 5, 4, 9)])
def test_adjoints_and_bounds(prior, shape, generator):
    """<K x, u> = <x, K^T u> to rounding, and |K|^2 within its bound, by power iteration."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    w = prior.start(x)
    w = None if w is None else torch.randn(w.shape, generator=generator, dtype=torch.float64)
    seen = prior.analyse(x, w)
    u = fields_like(seen, generator)
    assert inner(seen, u) == pytest.approx(inner((x, w), prior.adjoint(u)), rel=1e-12)
    b, c = prior.bounds
    for _ in range(60):  # of K diag(1/b, 1/c) K^T
        back, other = prior.adjoint(u)
        u = prior.analyse(back / b, None if other is None else other / c)
        norm = math.sqrt(inner(u, u))
        u = tuple(f / norm for f in u)
    assert 0.5 < norm < 1 + 1e-9


def test_the_symmetric_gradient_and_its_adjoint(generator):
    w = torch.randn(3, 5, 6, 7, generator=generator, dtype=torch.float64)
    u = torch.randn(6, 5, 6, 7, generator=generator, dtype=torch.float64)
    left = float((symmetric_gradient(w) * u).sum())
    assert left == pytest.approx(float((w * symmetric_gradient_adjoint(u)).sum()), rel=1e-12)


@pytest.mark.parametrize("prior", PRIORS[:5], ids=repr)
def test_the_dual_step_is_a_projection_whose_complement_shrinks(prior, generator):
    """u - dual(u) is the proximal operator of the norm: no other point has a smaller g(p) + |p - u|^2 / 2."""
    x = torch.randn(1, 1, 4, 5, 6, generator=generator, dtype=torch.float64)
    u = fields_like(prior.analyse(x, prior.start(x)), generator)
    dual = prior.dual_step(u, 0.7, torch.tensor(0.4))
    shrunk = tuple(a - b for a, b in zip(u, dual, strict=True))

    def objective(p):
        return 0.4 * float(prior.value(p)) + sum(float((a - b).square().sum()) / 2 for a, b in zip(p, u, strict=True))

    least = objective(shrunk)
    for _ in range(20):
        step = fields_like(u, generator)
        assert objective(tuple(a + 1e-3 * b for a, b in zip(shrunk, step, strict=True))) > least


def test_values_of_known_volumes():
    flat = torch.full((1, 1, 6, 6, 6), 3.0, dtype=torch.float64)
    step = flat.clone()
    step[..., 3:] += 2.0  # a wall of 36 faces, height 2, across x
    ramp = flat + torch.arange(6, dtype=torch.float64)
    for prior in PRIORS[:5]:
        assert float(prior.value(prior.analyse(flat, prior.start(flat)))) == pytest.approx(0, abs=1e-12)
    assert float(TotalVariation().value(TotalVariation().analyse(step))) == pytest.approx(72)
    weighted = TotalVariation((1.0, 1.0, 0.25), isotropic=False)
    assert float(weighted.value(weighted.analyse(step))) == pytest.approx(18)
    slope = torch.zeros(3, *ramp.shape, dtype=torch.float64)
    slope[2] = 1.0
    inside = GeneralizedVariation().analyse(ramp, slope)
    assert float(inside[0][..., :-1].norm()) == pytest.approx(0, abs=1e-12)  # w is the gradient, and does not bend
    assert float(inside[1].norm()) == pytest.approx(0, abs=1e-12)


# ---- the minimum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["camera", "stretched"])
def test_the_minimum_is_that_of_deepinv(grid, generator):
    """Proximal gradient steps with deepinv's TV, run long, end at the same volume."""
    physics = inv.TiltProjection(ANGLES, (10, 17, 18), grid=grid, normalize=True)
    images, _ = noisy(physics, blocks(), generator)
    weight = 0.05

    def objective(x):
        data = float((physics.A(x) - images).square().sum()) / 2
        return data + weight * float(TotalVariation().value(TotalVariation().analyse(x)))

    ours = primal_dual(physics, images, [(TotalVariation(), weight)], iterations=300, tolerance=1e-7).volume
    model = PGD(L2(), TVPrior(n_it_max=60), lambda_reg=weight, stepsize=1.0, max_iter=80, early_stop=False)
    theirs = model(images, physics)
    assert objective(ours) == pytest.approx(objective(theirs), rel=2e-4)
    assert float((ours - theirs).norm()) < 0.01 * float(ours.norm())


@pytest.mark.parametrize(
    "prior", [*PRIORS[:2], GeneralizedVariation(1.5), Wavelets("haar", 2)], ids=lambda p: type(p).__name__
)
def test_nothing_near_the_minimum_is_lower(prior, generator):
    """Also with constraints, which hold exactly; at 20 random points a little way off, inside them."""
    physics = inv.TiltProjection(ANGLES, (10, 17, 18))
    images, noise = noisy(physics, blocks(), generator)
    mask = torch.zeros(10, 17, 18)
    mask[1:9, 2:15, 3:16] = 1
    priors = [(prior, 0.3), (Constraint(Positivity()), 1.0), (Constraint(Support(mask)), 1.0)]
    found = primal_dual(physics, images, priors, noise=noise, iterations=600, tolerance=1e-8)
    x = found.volume
    assert float(x.min()) >= 0
    assert float((x * (1 - mask)).abs().max()) == 0
    if prior.start(x) is not None:
        return  # its value needs the field w that the solver keeps to itself

    def objective(x):
        data = float((physics.A(x) - images).square().sum()) / (2 * noise)
        return data + 0.3 * float(prior.value(prior.analyse(x, None)))

    least = objective(x)
    for _ in range(20):
        other = (x + 0.02 * x.max() * torch.randn(x.shape, generator=generator, dtype=x.dtype)).clamp_min(0) * mask
        assert objective(other) > least
        nearer = x + 0.05 * (other - x)
        assert objective(nearer) > least * (1 - 1e-5)


def test_tgv_keeps_a_ramp_where_tv_makes_stairs(generator):
    shape = (8, 16, 24)
    ramp = torch.linspace(-1, 1, 24, dtype=torch.float64).expand(1, 1, *shape).contiguous()
    physics = inv.TiltProjection(ANGLES, shape, grid="stretched")
    images, noise = noisy(physics, ramp, generator, 0.1)
    bend = []
    for prior in (TotalVariation(), GeneralizedVariation(2.0)):
        found = primal_dual(physics, images, [(prior, 30.0)], noise=noise, iterations=300, tolerance=1e-6).volume
        middle = found[0, 0, 4, 8, 4:-4]
        bend.append(float(middle.diff().diff().abs().max()) / float(ramp[0, 0, 0, 0].diff()[0]))
    assert bend[1] < 0.1
    assert bend[0] > 3 * bend[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [inv.tv, inv.tgv, inv.wavelets])
def test_items_of_a_batch_are_solved_each_for_itself(method, dtype, generator):
    physics = inv.TiltProjection(ANGLES.to(dtype), (10, 17, 18))
    images, noise = noisy(physics, blocks(dtype=dtype), generator)
    both = torch.cat([images, images.flip(3)])
    how = {"weight": 0.3, "noise": noise, "iterations": 40, "tolerance": 1e-12}
    together = method(physics, both, **how)
    alone = method(physics, both[1, 0], **how)
    assert together.dtype == dtype
    assert together.shape == (2, 1, 10, 17, 18)
    assert alone.shape == (10, 17, 18)
    # the balance of the steps follows the batch, so the paths differ and only their end is the same
    assert float((together[1, 0] - alone).norm()) < 0.05 * float(alone.norm())


def test_through_the_lens_too(generator):
    """With the contrast transfer as operator: closer to the truth than damped least squares at its best."""
    import cryosim as cs

    optics = cs.Optics(300.0, 8000.0, amplitude_contrast=0.07)
    physics = inv.ContrastProjection(ANGLES, (10, 17, 18), 6.0, optics, tolerance=1e-3)
    images, noise = noisy(physics, blocks(), generator, 0.5)
    truth = blocks()[0, 0]
    norm = float(physics.squared_norm())

    def error(volume):
        return float((volume - truth).norm() / truth.norm())

    smooth = min(error(inv.least_squares(physics, images[0, 0], share * norm)) for share in (0.01, 0.05, 0.2, 1.0))
    assert error(inv.tv(physics, images[0, 0], noise=noise, iterations=60)) < 0.9 * smooth


# ---- the weight ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [TotalVariation(), Wavelets("haar", 2)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_weight_meets_the_noise(prior, share, generator):
    physics = inv.TiltProjection(ANGLES, (10, 17, 18))
    images, noise = noisy(physics, blocks(), generator, share)
    weight, found = matching_weight(physics, images, prior, noise)
    assert weight > 0
    assert float((physics.A(found.volume) - images).square().mean()) == pytest.approx(noise, rel=0.02)


def test_total_variation_beats_the_best_damping_on_blocks(generator):
    """Noise as strong as the signal; the weight from the noise alone, the damping an oracle's."""
    physics = inv.TiltProjection(ANGLES, (10, 17, 18))
    images, noise = noisy(physics, blocks(), generator, 1.0)
    truth, norm = blocks(), float(physics.squared_norm())

    def correlation(volume):
        a, b = volume - volume.mean(), truth - truth.mean()
        return float((a * b).sum() / (a.norm() * b.norm()))

    damped = max(correlation(inv.least_squares(physics, images, share * norm)) for share in (0.01, 0.03, 0.1, 0.3, 1))
    assert correlation(inv.tv(physics, images, noise=noise)) > damped + 0.02


def test_bad_numbers_are_refused(generator):
    physics = inv.TiltProjection(ANGLES, (10, 17, 18))
    images, _ = noisy(physics, blocks(), generator)
    for how, said in (
        ({}, "weight, noise"),
        ({"weight": 0.0}, "weight"),
        ({"weight": 1.0, "noise": -1.0}, "noise"),
        ({"weight": math.nan}, "weight"),
        ({"weight": 1.0, "iterations": 0}, "iterations"),
        ({"weight": 1.0, "support": torch.ones(3, 4)}, "support"),
    ):
        with pytest.raises(ValueError, match=said):
            inv.tv(physics, images, **how)
    with pytest.raises(ValueError, match="images"):
        inv.tv(physics, images[..., 1:], weight=1.0)
    with pytest.warns(UserWarning, match="nothing but noise"):
        inv.tv(physics, images, noise=100.0 * float(images.square().mean()), iterations=5)
