"""Conjugate gradients by name: the minimum over the Krylov space, whatever the scale of the images."""

import pytest
import torch

import cryosim as cs
import inverse as inv

ANGLES = torch.linspace(-60, 60, 9, dtype=torch.float64)


def best_in_krylov_space(physics, images, iterations):
    """Least squares over the span of (A^T A)^i A^T y, i < iterations, from an orthonormal basis."""
    basis = []
    v = physics.A_adjoint(images)
    for _ in range(iterations):
        for q in basis + basis:
            v = v - (q * v).sum() * q
        basis.append(v / v.norm())
        v = physics.A_adjoint(physics.A(basis[-1]))
    seen = torch.stack([physics.A(q).flatten() for q in basis], 1)
    weights = torch.linalg.lstsq(seen, images.flatten()[:, None]).solution[:, 0]
    return torch.stack([w * q for w, q in zip(weights, basis, strict=True)]).sum(0)


@pytest.mark.parametrize("solver", [inv.cgls, inv.lsqr])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_each_is_the_best_of_its_krylov_space(solver, size, generator):
    physics = inv.TiltProjection(ANGLES, (7, 5, 12))
    images = size * torch.randn(1, 1, 9, 5, 12, generator=generator, dtype=torch.float64)
    for iterations in (1, 4, 8):
        expected = best_in_krylov_space(physics, images, iterations)
        found = solver(physics, images, iterations=iterations)
        assert float((found - expected).norm()) < 1e-6 * float(expected.norm())
        assert torch.equal(found[0, 0], solver(physics, images[0, 0], iterations=iterations))


@pytest.mark.parametrize("solver", [inv.cgls, inv.lsqr])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_items_of_a_batch_do_not_mix(solver, dtype, generator):
    physics = inv.TiltProjection(ANGLES.to(dtype), (7, 5, 12))
    images = torch.randn(3, 1, 9, 5, 12, generator=generator, dtype=dtype) * torch.tensor([1.0, 1e-4, 1e3]).view(
        3, 1, 1, 1, 1
    ).to(dtype)
    together = solver(physics, images, iterations=4)
    for one, image in zip(together, images, strict=True):
        alone = solver(physics, image[None], iterations=4)[0]
        assert one.dtype == dtype
        assert float((one - alone).norm()) < (1e-3 if dtype == torch.float32 else 1e-9) * float(alone.norm())


@pytest.mark.parametrize("solver", [inv.cgls, inv.lsqr])
def test_an_empty_item_stays_empty_and_leaves_the_others_alone(solver, generator):
    physics = inv.TiltProjection(ANGLES, (7, 5, 12))
    images = torch.randn(3, 1, 9, 5, 12, generator=generator, dtype=torch.float64)
    images[1] = 0
    found = solver(physics, images, iterations=4)
    assert float(found[1].abs().max()) == 0
    for i in (0, 2):
        torch.testing.assert_close(found[i], solver(physics, images[i : i + 1], iterations=4)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [inv.cgls, inv.lsqr])
def test_through_the_lens_too(solver, generator):
    """With the contrast transfer as operator, the residual falls with the iterations."""
    optics = cs.Optics(300.0, 8000.0, amplitude_contrast=0.07)
    physics = inv.ContrastProjection(ANGLES, (6, 7, 12), 6.0, optics)
    images = 1e-3 * torch.randn(9, 7, 12, generator=generator, dtype=torch.float64)
    left = [
        float((physics.A(solver(physics, images, iterations=n)[None, None]) - images).norm()) for n in (1, 2, 4, 8, 16)
    ]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.9 * float(images.norm())


def test_bad_input_is_refused():
    physics = inv.TiltProjection(ANGLES, (7, 5, 12))
    with pytest.raises(ValueError, match="iterations"):
        inv.cgls(physics, torch.zeros(9, 5, 12), iterations=0)
    with pytest.raises(ValueError, match="finite"):
        inv.lsqr(physics, torch.full((9, 5, 12), torch.nan))
    with pytest.raises(ValueError, match="images"):
        inv.lsqr(physics, torch.zeros(9, 5, 11))
