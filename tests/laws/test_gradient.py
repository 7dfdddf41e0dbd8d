"""Every derivative, with respect to volume, data and parameters, equals its finite difference."""

import pytest
import torch


def check(function, *inputs):
    inputs = [t.clone().requires_grad_(True) for t in inputs]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("method", ["A", "A_adjoint"])
def test_projections(case, draw, method):
    physics = case.make()
    given = draw(2, case.volume if method == "A" else case.images)
    check(lambda x, angles: getattr(physics, method)(x, angles=angles), given, physics.angles)


def test_prox(case, draw):
    physics = case.make(tolerance=1e-13)
    z, y = draw(2, case.volume), draw(2, case.images)
    gamma = torch.tensor([0.02, 0.3], dtype=torch.float64)

    def prox(z, y, gamma, angles):
        physics.update(angles=angles)
        return physics.prox_l2(z, y, gamma)

    check(prox, z, y, gamma, physics.angles)


def test_angles_by_forward_mode_and_vmap(case, draw):
    """torch.func sees through the projection: jvp agrees with a difference, vmap with a loop."""
    physics = case.make()
    x, angles = draw(1, case.volume), physics.angles.clone()

    def images(a):
        return torch.func.functional_call(physics, {"angles": a}, (x,))

    turn = torch.ones_like(angles)
    _, slope = torch.func.jvp(images, (angles,), (turn,))
    difference = (images(angles + 1e-5 * turn) - images(angles - 1e-5 * turn)) / 2e-5
    assert (slope - difference).norm() <= 1e-6 * max(1.0, float(difference.norm()))
    several = torch.stack([angles, angles + 0.5])
    torch.testing.assert_close(torch.func.vmap(images)(several), torch.stack([images(a) for a in several]))
