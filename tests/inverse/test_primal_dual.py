"""Minima with priors that are not smooth, by their optimality conditions, and the weight that the noise asks for."""

import math
from typing import Any

import pytest
import torch
from deepinv.models import TGVDenoiser
from deepinv.optim import FISTA, HQS, L2
from deepinv.optim.prior import PnP, TVPrior

import cryosim as cs
import inverse as inv
from inverse.priors.classic import (
    Constraint,
    GeneralizedVariation,
    Positivity,
    Support,
    TotalVariation,
    Wavelets,
)
from inverse.solvers.primal_dual import _largest_eigenvalue, primal_dual
from inverse.solvers.regularised import matching_weight

ANGLES = torch.linspace(-60, 60, 15, dtype=torch.float64)
SHAPE = (10, 17, 18)
LENS = cs.Optics(300.0, 8000.0, amplitude_contrast=0.07)
NORMS = [
    TotalVariation(),
    TotalVariation((0.5, 1.0, 2.0), isotropic=False),
    GeneralizedVariation(1.5),
    Wavelets("haar", 2),
]


def blocks(dtype=torch.float64):
    """Two boxes of constant density (1, 1, z, y, x)."""
    volume = torch.zeros(1, 1, *SHAPE, dtype=dtype)
    volume[..., 3:8, 3:9, 4:9] = 1.0
    volume[..., 2:6, 9:14, 8:15] = 0.6
    return volume


def noisy(physics, volume, generator, share=0.3):
    clean = physics.A(volume)
    sigma = share * clean.std()
    return clean + sigma * torch.randn(clean.shape, generator=generator, dtype=clean.dtype), float(sigma**2)


def distance(a, b):
    return float((a - b).norm() / b.norm())


# ---- the minimum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["camera", "stretched"])
@pytest.mark.parametrize("prior", NORMS, ids=repr)
def test_the_minimum_meets_its_optimality_conditions(prior, grid, generator):
    """Necessary and sufficient, whatever found it: the slopes balance, and each dual field is a subgradient.

    A^T (A x - y) / n + sum K^T u = 0; <u, K x> = weight g(K x) with u in the dual ball; and a constraint pushes only
    where it holds. What is left falls as 1 / iterations; measured after 400 of them, 7e-4 or less of each.
    """
    shape = (6, 7, 8)
    physics = inv.TiltProjection(ANGLES[::3], shape, grid=grid)
    truth = torch.zeros(1, 1, *shape, dtype=torch.float64)
    truth[..., 2:5, 2:5, 2:6] = 1.0
    images, noise = noisy(physics, truth, generator, 0.5)
    mask = torch.ones(shape)
    mask[:, :, 0] = 0
    positive, support = Constraint(Positivity()), Constraint(Support(mask))
    weight = 2.0
    priors = [(prior, weight), (positive, 1.0), (support, 1.0)]
    found = primal_dual(physics, images, priors, noise=noise, iterations=400, tolerance=1e-8)
    x, (w, *_) = found.volume, found.auxiliary
    u, push, side = found.fields[0], found.fields[1][0], found.fields[2][0]
    slope = physics.A_adjoint(physics.A(x) - images) / noise
    back, other = prior.adjoint(u)
    assert float((slope + back + push + side).norm()) < 1e-3 * float(slope.norm())
    assert other is None or float(other.norm()) < 1e-3 * math.sqrt(sum(float(f.square().sum()) for f in u))
    seen = prior.analyse(x, w)
    value = weight * float(prior.value(seen))
    assert sum(float((a * b).sum()) for a, b in zip(u, seen, strict=True)) == pytest.approx(value, rel=1e-3)
    nearest = prior.dual_step(u, 1.0, torch.tensor(weight))
    assert all(float((a - b).abs().max()) < 1e-3 * weight for a, b in zip(u, nearest, strict=True))
    assert float(x.min()) >= 0
    assert float((x * (1 - mask)).abs().max()) == 0
    assert float(push.max()) < 1e-3 * float(push.abs().max())
    assert float((push * x).abs().max()) < 1e-3 * float(push.abs().max() * x.max())
    assert float((side * mask).abs().max()) < 1e-3 * float(slope.abs().max())


@pytest.mark.parametrize("grid", ["camera", "stretched"])
def test_the_minimum_is_that_of_deepinv(grid, generator):
    """FISTA with deepinv's TV, run long: objectives differ by 3e-5 of them, with 300 iterations of ours."""
    physics = inv.TiltProjection(ANGLES[::2], (8, 9, 11), grid=grid, normalize=True)
    images, _ = noisy(physics, blocks()[..., :8, :9, :11].contiguous(), generator)
    weight, prior = 0.05, TotalVariation()

    def objective(x):
        return float((physics.A(x) - images).square().sum() / 2 + weight * prior.value(prior.analyse(x)))

    ours = primal_dual(physics, images, [(prior, weight)], iterations=300, tolerance=1e-7).volume
    model = FISTA(L2(), TVPrior(n_it_max=40), lambda_reg=weight, stepsize=1.0, max_iter=80, early_stop=False)
    theirs = model(images, physics)
    assert objective(ours) == pytest.approx(objective(theirs), rel=1e-4)
    assert distance(ours, theirs) < 0.01


def test_deepinv_tgv_runs_on_our_operators_too(generator):
    """Its denoiser of volumes, plugged into its own half-quadratic splitting with our closed form."""
    physics = inv.TiltProjection(ANGLES, SHAPE, normalize=True)
    images, _ = noisy(physics, blocks(), generator)
    prior = PnP(TGVDenoiser(n_it_max=10))
    model = HQS(L2(), prior, stepsize=20.0, sigma_denoiser=0.3, max_iter=6, early_stop=False)
    assert distance(model(images, physics), blocks()) < 0.9 * distance(physics.A_adjoint(images), blocks())


def test_where_it_ends_does_not_depend_on_the_units(generator):
    """Images s times as large, n by s^2, the weight over s: the same volume times s, also with constraints."""
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images, noise = noisy(physics, blocks(), generator)
    volumes = []
    for s in (1.0, 1e-6, 1e5):
        how: dict[str, Any] = {"noise": noise * s**2, "positivity": True, "iterations": 30, "tolerance": 1e-12}
        volumes.append(inv.tv(physics, s * images, 0.5 / s, **how) / s)
    assert distance(volumes[1], volumes[0]) < 1e-9
    assert distance(volumes[2], volumes[0]) < 1e-9


def test_where_it_went_on_from_is_left_alone_and_near(generator):
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images, noise = noisy(physics, blocks(), generator)
    for prior in (TotalVariation(), GeneralizedVariation(2.0)):
        first = primal_dual(physics, images, [(prior, 1.0)], noise=noise, iterations=200)
        copies = [first.volume.clone(), *(u.clone() for u in first.fields[0])]
        again = primal_dual(physics, images, [(prior, 1.0)], noise=noise, iterations=200, start=first)
        assert again.iterations <= 5 < first.iterations < 200
        assert all(torch.equal(a, b) for a, b in zip(copies, [first.volume, *first.fields[0]], strict=True))
        assert first.change.shape == (first.iterations, 1)


def test_constraints_alone(generator):
    """Least squares of volumes that are positive, in a support: the slope vanishes where the volume is free."""
    physics = inv.TiltProjection(ANGLES[::3], (4, 5, 6))
    images, noise = noisy(physics, blocks()[..., 2:6, 2:7, 3:9].contiguous(), generator)
    mask = torch.ones(4, 5, 6)
    mask[0] = 0
    priors = [(Constraint(Positivity()), 1.0), (Constraint(Support(mask)), 1.0)]
    x = primal_dual(physics, images, priors, noise=noise, iterations=300, tolerance=1e-9).volume
    slope = physics.A_adjoint(physics.A(x) - images) / physics.A_adjoint(images).abs().max()
    free = x > 1e-6
    assert 10 < int(free.sum()) < 80  # of 90 in the support
    assert float(slope[free].abs().max()) < 1e-6
    assert float(slope[~free & (mask > 0)].min()) > -1e-6


def test_it_stops_where_it_was_told_and_says_how_far_it_is(generator):
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images, noise = noisy(physics, blocks(), generator)
    said = []
    found = primal_dual(
        physics,
        images,
        [(TotalVariation(), 1.0)],
        noise=noise,
        tolerance=3e-3,
        progress=lambda *at: said.append(at),
    )
    assert found.iterations < 100
    assert said == [(i + 1, 100) for i in range(found.iterations)]
    assert float(found.change[-1]) <= 3e-3 < float(found.change[-2])


def test_weights_along_axes_act_along_axes(generator):
    """A dearer variation along z leaves less of it along z, and more along the others."""
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images, noise = noisy(physics, blocks(), generator)
    varied = []
    for weights in ((1.0, 1.0, 1.0), (4.0, 1.0, 1.0), (1.0, 1.0, 4.0)):
        volume = inv.tv(physics, images, 1.0, noise=noise, weights=weights, isotropic=False, iterations=60)
        varied.append([float(volume.diff(dim=axis).abs().sum()) for axis in (-3, -2, -1)])
    even, along_z, along_x = varied
    assert along_z[0] < 0.7 * even[0]
    assert along_x[2] < 0.7 * even[2]
    assert along_z[2] > 1.2 * along_x[2]
    assert along_x[0] > 1.2 * along_z[0]


def test_tgv_keeps_a_ramp_where_tv_makes_stairs(generator):
    shape = (8, 12, 24)
    ramp = torch.linspace(-1, 1, 24, dtype=torch.float64).expand(1, 1, *shape).contiguous()
    physics = inv.TiltProjection(ANGLES, shape, grid="stretched")
    images, noise = noisy(physics, ramp, generator, 0.1)
    bend = []
    for prior in (TotalVariation(), GeneralizedVariation(2.0)):
        found = primal_dual(physics, images, [(prior, 30.0)], noise=noise, iterations=200, tolerance=1e-5).volume
        middle = found[0, 0, 4, 6, 4:-4]
        bend.append(float(middle.diff().diff().abs().max()) / float(ramp[0, 0, 0, 0].diff()[0]))
    assert bend[1] < 0.1
    assert bend[0] > 3 * bend[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [inv.tv, inv.tgv, inv.wavelets])
def test_items_of_a_batch_are_solved_each_for_itself(method, dtype, generator):
    """With weights of their own; the steps are balanced for all together, so only where they end is the same."""
    shape = (6, 7, 9)
    physics = inv.TiltProjection(ANGLES[::2].to(dtype), shape)
    images, noise = noisy(physics, blocks(dtype)[..., 2:8, 2:9, 3:12].contiguous(), generator)
    both = torch.cat([images, images.flip(3)])
    how: dict[str, Any] = {"noise": noise, "iterations": 300 if method is inv.tgv else 100, "tolerance": 1e-5}
    together = method(physics, both, torch.tensor([1.0, 4.0]), **how)
    assert together.dtype == dtype
    assert together.shape == (2, 1, *shape)
    alone = method(physics, both[1, 0], 4.0, **how)
    assert alone.shape == shape
    assert distance(together[1, 0], alone) < 0.01


def test_through_the_lens_too(generator):
    """With the contrast transfer as operator: closer to the truth than damped least squares at its best."""
    physics = inv.ContrastProjection(ANGLES, SHAPE, 6.0, LENS, tolerance=1e-3)
    images, noise = noisy(physics, blocks(), generator, 0.5)
    norm = float(physics.squared_norm())
    smooth = [inv.least_squares(physics, images, share * norm) for share in (0.01, 0.05, 0.2, 1.0)]
    found = primal_dual(physics, images, [(TotalVariation(), 7.0)], noise=noise, iterations=60)
    assert distance(found.volume, blocks()) < 0.9 * min(distance(x, blocks()) for x in smooth)


def test_the_largest_eigenvalue(generator):
    """Of a product of two random positive matrices, and 1 at once for a matrix and its inverse."""
    a, b = (torch.randn(40, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = a @ a.T / 40, b @ b.T / 40 + 0.1 * torch.eye(40)
    like = torch.zeros(40, dtype=torch.float64)
    exact = float(torch.linalg.eigvals(b @ a).real.max())
    assert _largest_eigenvalue(lambda x: a @ x, lambda x: b @ x, like, 20) == pytest.approx(exact, rel=1e-3)
    assert _largest_eigenvalue(lambda x: a @ x, lambda x: b @ x, like, 6) == pytest.approx(exact, rel=0.1)
    counted = []
    inverse = torch.linalg.inv(b)
    one = _largest_eigenvalue(lambda x: counted.append(x) or b @ x, lambda x: inverse @ x, like)
    assert one == pytest.approx(1, rel=1e-6)
    assert len(counted) == 1


# ---- the weight ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [TotalVariation(), Wavelets("haar", 2)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_the_weight_meets_the_noise(prior, share, generator):
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images, noise = noisy(physics, blocks(), generator, share)
    weight, found = matching_weight(physics, images, prior, noise)
    assert weight.shape == (1,)
    assert float(weight) > 0
    assert float((physics.A(found.volume) - images).square().mean()) == pytest.approx(noise, rel=0.01)


def test_each_item_has_the_weight_its_noise_asks_for(generator):
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images, noise = noisy(physics, blocks(), generator, 0.5)
    both = torch.cat([images, physics.A(3 * blocks()) + (images - physics.A(blocks()))])
    weight, found = matching_weight(physics, both, TotalVariation(), noise)
    left = (physics.A(found.volume) - both).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(left, torch.full_like(left, noise), rtol=0.01, atol=0)
    alone, _ = matching_weight(physics, both[1:], TotalVariation(), noise)
    assert float(weight[1]) == pytest.approx(float(alone), rel=0.15)  # the misfit hardly depends on it, 1 % of it does


def test_total_variation_beats_the_best_damping_on_blocks(generator):
    """Noise as strong as the signal; the weight from the noise alone, the damping an oracle's."""
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images, noise = noisy(physics, blocks(), generator, 1.0)
    truth, norm = blocks(), float(physics.squared_norm())

    def correlation(volume):
        a, b = volume - volume.mean(), truth - truth.mean()
        return float((a * b).sum() / (a.norm() * b.norm()))

    damped = max(correlation(inv.least_squares(physics, images, share * norm)) for share in (0.01, 0.03, 0.1, 0.3, 1))
    assert correlation(inv.tv(physics, images, noise=noise)) > damped + 0.02


def test_bad_numbers_are_refused(generator):
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images, _ = noisy(physics, blocks(), generator)
    broken = images.clone()
    broken[0, 0, 0, 0, 0] = math.nan
    cases: list[tuple[Any, torch.Tensor, dict[str, Any], str]] = [
        (inv.tv, images, {}, "weight, noise"),
        (inv.tv, images, {"weight": 0.0}, "weight"),
        (inv.tv, images, {"weight": torch.ones(3)}, "weight"),
        (inv.tv, images, {"weight": 1.0, "noise": -1.0}, "noise"),
        (inv.tv, images, {"noise": 0.0}, "noise"),
        (inv.tv, images, {"weight": math.nan}, "weight"),
        (inv.tv, images, {"weight": 1.0, "iterations": 0}, "iterations"),
        (inv.tv, images, {"weight": 1.0, "weights": (1.0, -1.0, 1.0)}, "weights"),
        (inv.tv, images, {"weight": 1.0, "support": torch.ones(3, 4)}, "support"),
        (inv.tv, images, {"weight": 1.0, "support": torch.full(SHAPE, 0.5)}, "support"),
        (inv.tgv, images, {"weight": 1.0, "ratio": 0.0}, "ratio"),
        (inv.wavelets, images, {"weight": 1.0, "levels": 0}, "levels"),
        (inv.wavelets, images, {"weight": 1.0, "wavelet": "db7"}, "wavelet"),
        (inv.tv, images[..., 1:], {"weight": 1.0}, "images"),
        (inv.tv, broken, {"weight": 1.0}, "finite"),
        (inv.tv, broken, {"noise": 1.0}, "finite"),
    ]
    for method, given, how, said in cases:
        with pytest.raises(ValueError, match=said):
            method(physics, given, **how)
    with pytest.raises(ValueError, match="priors"):
        primal_dual(physics, images, [])
    with pytest.warns(UserWarning, match="nothing but noise"):
        inv.tv(physics, images, noise=100.0 * float(images.square().mean()), iterations=5)


def test_empty_images_give_an_empty_volume():
    physics = inv.TiltProjection(ANGLES, SHAPE)
    images = torch.zeros(len(ANGLES), *SHAPE[1:], dtype=torch.float64)
    for method in (inv.tv, inv.tgv, inv.wavelets):
        assert float(method(physics, images, 1.0, iterations=3).abs().max()) == 0
