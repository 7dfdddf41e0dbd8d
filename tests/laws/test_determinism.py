"""The same call gives the same bits and leaves nothing behind."""

import copy

import torch


def test_same_bits(case, dtype, draw):
    physics = case.make()
    x, y = draw(2, case.volume, dtype), draw(2, case.images, dtype)
    for act in (lambda: physics.A(x), lambda: physics.A_adjoint(y), lambda: physics.prox_l2(x, y, 0.1)):
        assert torch.equal(act(), act())


def test_solving_changes_nothing(case, draw):
    """prox_l2 and A_dagger keep no state: the choices of one call are not those of the next."""
    physics = case.make()
    z, y = draw(1, case.volume), draw(1, case.images)
    before = {k: copy.copy(v) for k, v in vars(physics).items() if not k.startswith("_")}
    first = physics.prox_l2(z, y, 0.1)
    physics.prox_l2(z, y, 5.0, tol=0.5, max_iter=30, solver="lsqr")
    physics.A_dagger(y, tol=0.5, solver="minres")
    assert torch.equal(physics.prox_l2(z, y, 0.1), first)
    after = {k: v for k, v in vars(physics).items() if not k.startswith("_")}
    assert all(after[k] == before[k] for k in ("tol", "max_iter", "solver"))


def test_inputs_are_left_alone(case, draw):
    physics = case.make()
    x, y = draw(1, case.volume), draw(1, case.images)
    kept = x.clone(), y.clone()
    physics.prox_l2(x, y, 0.3)
    physics.A(x)
    physics.A_adjoint(y)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1]) and not x.requires_grad
