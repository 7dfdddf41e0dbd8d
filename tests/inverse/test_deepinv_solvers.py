"""deepinv's own solvers, unchanged, on our operators: each lessens its objective and comes near the truth."""

import pytest
import torch
from deepinv.optim import ADMM, FISTA, HQS, L2, PGD, Tikhonov, TVPrior

import cryosim as cs
from inverse.physics.contrast import ContrastProjection, EwaldProjection
from inverse.physics.tilt import TiltProjection
from inverse.solvers.sirt import sirt

SHAPE, ANGLES = (12, 14, 24), torch.linspace(-60, 60, 21)
LENS = cs.Optics(300.0, torch.linspace(8000, 14000, 21))


def operator(name):
    if name == "TiltProjection":
        return TiltProjection(ANGLES, SHAPE, normalize=True)
    kind = {"ContrastProjection": ContrastProjection, "EwaldProjection": EwaldProjection}[name]
    return kind(ANGLES, SHAPE, 4.0, LENS, normalize=True, tolerance=1e-3)


def box():
    truth = torch.zeros(1, 1, *SHAPE)
    truth[..., 4:8, 5:9, 8:16] = 1.0
    return truth


@pytest.mark.parametrize("name", ["TiltProjection", "ContrastProjection", "EwaldProjection"])
@pytest.mark.parametrize("solver", [PGD, FISTA, HQS, ADMM], ids=lambda s: s.__name__)
def test_total_variation(solver, name, generator):
    physics, truth = operator(name), box()
    images = physics.A(truth)
    images = images + 0.05 * images.std() * torch.randn(images.shape, generator=generator)
    prior = TVPrior(n_it_max=15)
    splitting = solver in (HQS, ADMM)
    model = solver(L2(), prior, lambda_reg=2e-3, stepsize=20.0 if splitting else 1.0, max_iter=6 if splitting else 40)
    found = model(images, physics)
    adjoint = physics.A_adjoint(images)
    scaled = adjoint * (adjoint * truth).sum() / adjoint.square().sum()
    error = (found - truth).norm() / truth.norm()
    assert torch.isfinite(found).all() and error < 0.9 * (scaled - truth).norm() / truth.norm()


@pytest.mark.parametrize("name", ["TiltProjection", "ContrastProjection"])
def test_tikhonov_by_iterations_is_the_prox(name):
    """FISTA with a quadratic prior comes to where `prox_l2` goes at once."""
    physics = operator(name)
    physics.tol = 1e-6
    images = physics.A(box())
    model = FISTA(L2(), Tikhonov(), lambda_reg=0.05, stepsize=1.0, max_iter=150)
    direct = physics.prox_l2(None, images, 1 / 0.05)
    assert (model(images, physics) - direct).norm() < 1e-3 * direct.norm()


def test_sirt_comes_nearer_step_by_step():
    """And of an even slab, whose every ray has the mean that it should, the first step is right in the middle."""
    physics = TiltProjection(ANGLES, SHAPE)
    truth = box()
    images = physics.A(truth)
    errors = [float((sirt(physics, images, iterations=n) - truth).norm() / truth.norm()) for n in (1, 5, 20, 60)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.55
    slab = torch.ones(1, 1, *SHAPE)
    first = sirt(physics, physics.A(slab)[0, 0], iterations=1)
    assert first.shape == SHAPE and float((first[3:9, 3:11, 8:16] - 1).abs().max()) < 0.1


def test_sirt_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="expected a TiltProjection"):
        sirt(operator("ContrastProjection"), torch.zeros(21, 14, 24))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="iterations"):
        sirt(operator("TiltProjection"), torch.zeros(21, 14, 24), iterations=0)
