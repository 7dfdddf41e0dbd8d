"""<A x, y> = <x, A^T y>."""

import torch


def test_adjoint(case, dtype, draw):
    physics = case.make()
    x, y = draw(3, case.volume, dtype), draw(3, case.images, dtype)
    seen, back = physics.A(x), physics.A_adjoint(y)
    assert seen.shape == y.shape and back.shape == x.shape
    left, right = (seen.double() * y.double()).sum(), (x.double() * back.double()).sum()
    scale = seen.double().norm() * y.double().norm()
    assert abs(left - right) <= (1e-12 if dtype == torch.float64 else 1e-6) * scale


def test_a_wrong_adjoint_would_be_caught(case, draw):
    """The law above can fail: the adjoint at angles 1e-6 degrees off breaks it."""
    physics = case.make()
    if case.volume[0] == 1:
        return  # one layer at z = 0 sees the angle in second order only
    x, y = draw(3, case.volume), draw(3, case.images)
    left = (physics.A(x) * y).sum()
    right = (x * physics.A_adjoint(y, angles=physics.angles + 1e-6)).sum()
    assert abs(left - right) > 1e-12 * physics.A(x).norm() * y.norm()
