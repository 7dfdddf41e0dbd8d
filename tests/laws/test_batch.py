"""A batch is its items, side by side; rows, items and channels do not know each other."""

import torch


def test_batch_is_items(case, draw):
    physics = case.make()
    x, y = draw(3, case.volume), draw(3, case.images)
    for method, given in (("A", x), ("A_adjoint", y)):
        act = getattr(physics, method)
        torch.testing.assert_close(act(given), torch.cat([act(item[None]) for item in given]), rtol=1e-12, atol=1e-12)
    whole = physics.prox_l2(x, y, 0.1, tol=1e-12)
    parts = torch.cat([physics.prox_l2(a[None], b[None], 0.1, tol=1e-12) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)


def test_each_item_may_have_its_own_angles(case, draw):
    physics = case.make()
    x, y = draw(2, case.volume), draw(2, case.images)
    angles = torch.cat([physics.angles, physics.angles - 1.5])
    both, back = physics.A(x, angles=angles), physics.A_adjoint(y, angles=angles)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], physics.A(x[i : i + 1], angles=angles[i : i + 1]))
        torch.testing.assert_close(back[i : i + 1], physics.A_adjoint(y[i : i + 1], angles=angles[i : i + 1]))


def test_channels_are_items(case, draw):
    physics = case.make()
    x = draw(2, case.volume)
    torch.testing.assert_close(physics.A(x.movedim(0, 1)), physics.A(x).movedim(0, 1))


def test_linear(case, draw):
    physics = case.make()
    a, b = draw(1, case.volume), draw(1, case.volume)
    torch.testing.assert_close(physics.A(2 * a - 3 * b), 2 * physics.A(a) - 3 * physics.A(b))
    assert physics.A(torch.zeros_like(a)).abs().max() == 0
