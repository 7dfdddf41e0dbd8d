"""Data keep their precision and their size: no float32 forced on float64, no dependence on the unit."""

import torch


def test_dtype_follows_the_data(case, dtype, draw):
    physics = case.make()
    x, y = draw(1, case.volume, dtype), draw(1, case.images, dtype)
    for out in (physics.A(x), physics.A_adjoint(y), physics.prox_l2(x, y, 0.1), physics.A_dagger(y)):
        assert out.dtype == dtype and out.is_contiguous()


def test_float32_agrees_with_float64(case, draw):
    physics = case.make()
    x, y = draw(1, case.volume), draw(1, case.images)
    for method, given in (("A", x), ("A_adjoint", y)):
        exact = getattr(physics, method)(given)
        single = getattr(physics, method)(given.float()).double()
        assert (single - exact).norm() <= 2e-6 * exact.norm()


def test_scale_of_the_data_does_not_matter(case, draw):
    """A power of two changes no digit: nothing absolute (an epsilon, a tolerance) stands in the solvers."""
    physics = case.make()
    z, y = draw(1, case.volume), draw(1, case.images)
    for method in (lambda s: physics.prox_l2(s * z, s * y, 0.1), lambda s: physics.A_dagger(s * y, tol=1e-2)):
        torch.testing.assert_close(method(2.0**-40) * 2.0**40, method(1.0), rtol=1e-12, atol=0)
