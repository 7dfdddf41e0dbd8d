"""`TiltProjection` against what is known without it: analytic projections, normal equations, its own promises."""

import math

import numpy as np
import pytest
import torch

from inverse.physics.closed_form import gram_matrices, largest_eigenvalue, solve
from inverse.physics.tilt import TiltProjection

ANGLES = torch.linspace(-60, 60, 41, dtype=torch.float64)


def gaussian_blobs(shape, sigma, reach, generator, n=12):
    """Volume (z, y, x) of n blobs of width sigma [voxel], with centres (n, 3) (x, y, z) and heights (n,)."""
    sizes = torch.tensor(shape[::-1], dtype=torch.float64)
    centres = (2 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 1) * (sizes / 2 - reach * sigma)
    heights = torch.randn(n, generator=generator, dtype=torch.float64)
    axes = [torch.arange(m, dtype=torch.float64) - m // 2 for m in shape[::-1]]
    x, y, z = (torch.exp(-((a - c[:, None]) ** 2) / (2 * sigma**2)) for a, c in zip(axes, centres.T, strict=True))
    return torch.einsum("n,nz,ny,nx->zyx", heights, z, y, x), centres, heights


def analytic_projections(centres, heights, sigma, angles, image_shape, grid):
    """Line integrals (tilt, y, x) of the blobs: the point (x, z) lands at u = x cos t + z sin t."""
    images = []
    for t in torch.deg2rad(angles).tolist():
        y, u = (torch.arange(n, dtype=torch.float64) - n // 2 for n in image_shape)
        u = u * math.cos(t) if grid == "stretched" else u
        at = centres[:, 0] * math.cos(t) + centres[:, 2] * math.sin(t)
        rows = torch.exp(-((y - centres[:, 1:2]) ** 2) / (2 * sigma**2))
        columns = torch.exp(-((u - at[:, None]) ** 2) / (2 * sigma**2))
        images.append(torch.einsum("n,ny,nu->yu", heights * sigma * math.sqrt(2 * math.pi), rows, columns))
    return torch.stack(images)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("shape", "image", "grid"),
    [
        ((48, 30, 96), None, "camera"),
        ((47, 31, 95), None, "camera"),
        ((48, 31, 96), (25, 71), "camera"),
        ((31, 30, 64), (40, 101), "camera"),
        ((40, 30, 160), None, "stretched"),
        ((41, 29, 161), None, "stretched"),
    ],
)
def test_projections_of_gaussian_blobs(shape, image, grid, dtype, generator):
    sigma = 2.0
    confined = (shape[0], shape[1], 40) if grid == "stretched" else shape  # wholly in view at every tilt
    _, centres, heights = gaussian_blobs(confined, sigma, 6.0, generator)
    axes = [torch.arange(m, dtype=torch.float64) - m // 2 for m in shape[::-1]]
    x, y, z = (torch.exp(-((a - c[:, None]) ** 2) / (2 * sigma**2)) for a, c in zip(axes, centres.T, strict=True))
    volume = torch.einsum("n,nz,ny,nx->zyx", heights, z, y, x)
    physics = TiltProjection(ANGLES, shape, image, grid=grid)
    images = physics.A(volume.to(dtype)[None, None])[0, 0].double()
    expected = analytic_projections(centres, heights, sigma, ANGLES, physics.image_shape, grid)
    assert (images - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-7) * expected.norm()


def test_the_fft_and_the_matrix_transform_are_the_same(generator, monkeypatch):
    volume = torch.randn(9, 4, 63, generator=generator, dtype=torch.float64)[None, None]
    physics = TiltProjection(ANGLES, (9, 4, 63))
    images, back = physics.A(volume), physics.A_adjoint(physics.A(volume))
    monkeypatch.setattr("inverse.physics.spectral._LARGEST_MATRIX_TRANSFORM", 0)
    torch.testing.assert_close(physics.A(volume), images, rtol=0, atol=1e-11)
    torch.testing.assert_close(physics.A_adjoint(images), back, rtol=0, atol=1e-9)


def test_sign_of_the_tilt():
    """A point above the centre (z > 0) moves to +x at a positive tilt, one at x > 0 moves inwards."""
    volume = torch.zeros(1, 1, 33, 1, 65, dtype=torch.float64)
    volume[0, 0, 16 + 10, 0, 32] = 1.0
    physics = TiltProjection([30.0], (33, 1, 65))
    assert physics.A(volume)[0, 0, 0, 0].argmax() == 32 + 5  # 10 sin 30
    volume = volume.zero_()
    volume[0, 0, 16, 0, 32 + 20] = 1.0
    assert physics.A(volume)[0, 0, 0, 0].argmax() == 32 + 17  # 20 cos 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(16, 3, 48), (15, 4, 47)])
@pytest.mark.parametrize("grid", ["stretched", "camera"])
@pytest.mark.parametrize("strength", [0.1, 10.0, 1000.0])
def test_prox_satisfies_its_optimality_condition(shape, grid, dtype, strength, generator):
    """gamma A^T (A x - y) + x - z = 0, with gamma = strength / |A|^2."""
    physics = TiltProjection(ANGLES, shape, grid=grid)
    z = torch.randn(2, 1, *shape, generator=generator, dtype=torch.float64)
    y = physics.A(z) + physics.A(z).std() * torch.randn(2, 1, 41, *shape[1:], generator=generator, dtype=torch.float64)
    z, y = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(dtype), y.to(dtype)
    gamma = strength / float(largest_eigenvalue(ANGLES, physics.geometry))
    x = physics.prox_l2(z, y, gamma, tol=1e-6).double()
    z, y = z.double(), y.double()
    wrong = gamma * physics.A_adjoint(physics.A(x) - y) + x - z
    right = gamma * physics.A_adjoint(y) + z
    bound = 3e-6 if grid == "camera" else (1e-5 if dtype == torch.float32 else 1e-12)
    assert wrong.norm() <= bound * right.norm()


@pytest.mark.parametrize(("strength", "most"), [(1.0, 3), (10.0, 5), (50.0, 8), (100.0, 10), (1000.0, 20)])
def test_prox_on_the_camera_grid_takes_few_iterations(strength, most, generator):
    """Preconditioned with the closed form, to 1e-4: at most 8 iterations for gamma |A|^2 up to 50, 20 for 1000."""
    physics = TiltProjection(ANGLES, (32, 3, 64))
    volume = torch.randn(32, 3, 64, generator=generator, dtype=torch.float64)
    y = physics.A(volume[None, None])[0, 0]
    y = y + 0.3 * y.std() * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    damping = largest_eigenvalue(ANGLES, physics.geometry) / strength
    _, iterations = solve(torch.zeros_like(volume), y, ANGLES, damping, physics.geometry, 1e-4, 50)
    assert iterations <= most


def test_gram_matrices_are_a_a_transposed():
    """On the stretched grid A A^T, formed column by column, is S^H G S."""
    physics = TiltProjection(ANGLES[::5], (7, 1, 15), grid="stretched")
    tilts, n = 9, 15
    unit = torch.eye(tilts * n, dtype=torch.float64).reshape(tilts * n, 1, tilts, 1, n)
    product = physics.A(physics.A_adjoint(unit)).reshape(tilts * n, tilts, n).reshape(tilts, n, tilts, n)
    spectrum = torch.fft.fft(torch.fft.ifft(product.to(torch.complex128), dim=1), dim=3)  # (tilt, k, tilt, k')
    gram = gram_matrices(ANGLES[::5], physics.geometry)
    for k in range(gram.shape[0]):
        torch.testing.assert_close(spectrum[:, k, :, k].mT, gram[k], rtol=0, atol=1e-10)


def test_unit_norm_keeps_the_scale_apart(generator):
    plain, unit = (TiltProjection(ANGLES, (16, 3, 40), normalize=n) for n in (False, True))
    x = torch.randn(1, 1, 16, 3, 40, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(unit.A(x) * unit.scale, plain.A(x))
    for _ in range(300):
        x = unit.A_adjoint(unit.A(x / x.norm()))
    assert abs(x.norm() - 1) < 1e-6
    assert "scale" in unit.state_dict()


@pytest.mark.parametrize("grid", ["camera", "stretched"])
def test_pseudo_inverse_gives_back_what_the_data_determine(grid, generator):
    physics = TiltProjection(ANGLES, (12, 2, 40), grid=grid, max_iterations=300)
    x = physics.A_adjoint(physics.A(torch.randn(1, 1, 12, 2, 40, generator=generator, dtype=torch.float64)))
    back = physics.A_dagger(physics.A(x), tol=1e-8)
    assert (back - x).norm() <= (1e-2 if grid == "camera" else 1e-8) * x.norm()


def test_too_few_iterations_are_not_silent(generator):
    physics = TiltProjection(ANGLES, (12, 2, 40))
    y = torch.randn(1, 1, 41, 2, 40, generator=generator, dtype=torch.float64)
    with pytest.warns(UserWarning, match="did not reach the tolerance"):
        physics.prox_l2(None, y, 1.0, max_iter=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"angles": [0.0, 90.0]}, "below 89 degrees"),
        ({"angles": [0.0, float("nan")]}, "angles: expected finite"),
        ({"angles": torch.zeros(1, 2, 3)}, "angles: expected finite"),
        ({"grid": "polar"}, "grid: expected"),
        ({"volume_shape": (8, 8)}, "volume_shape: expected three"),
        ({"grid": "stretched", "image_shape": (6, 9)}, "image_shape: on the stretched grid"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TiltProjection(**({"angles": [0.0, 10.0], "volume_shape": (4, 6, 8)} | arguments))


def test_bad_shapes():
    physics = TiltProjection([0.0, 10.0], (4, 6, 8))
    with pytest.raises(ValueError, match=r"expected a volume .* got \(1, 1, 4, 8, 6\)"):
        physics.A(torch.zeros(1, 1, 4, 8, 6))
    with pytest.raises(ValueError, match="expected images"):
        physics.A_adjoint(torch.zeros(1, 1, 3, 6, 8))
    with pytest.raises(ValueError, match="one for each of 2 items"):
        physics.A(torch.zeros(2, 1, 4, 6, 8), angles=torch.zeros(3, 2))


def test_steeper_angles_do_not_wrap(generator):
    """An operator made for low tilts and updated to steep ones is the operator made for steep ones."""
    x = torch.randn(1, 1, 24, 2, 40, generator=generator, dtype=torch.float64)
    steep = torch.tensor([-60.0, 0.0, 60.0], dtype=torch.float64)
    physics = TiltProjection([-10.0, 0.0, 10.0], (24, 2, 40))
    torch.testing.assert_close(physics.A(x, angles=steep), TiltProjection(steep, (24, 2, 40)).A(x))


@pytest.mark.parametrize("grid", ["camera", "stretched"])
@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), torch.tensor([1.0, 1.0, 1.0])])
def test_gamma_is_positive_and_one_for_each_item(grid, gamma, generator):
    physics = TiltProjection([-10.0, 0.0, 10.0], (8, 2, 20), grid=grid)
    with pytest.raises(ValueError, match="positive gamma"):
        physics.prox_l2(None, torch.zeros(2, 1, 3, 2, 20), gamma)


@pytest.mark.parametrize("angles", [[0, 10], range(0, 20, 10), torch.tensor([0, 10]), np.array([0.0, 10.0])])
def test_angles_in_any_form(angles, generator):
    x = torch.randn(1, 1, 8, 2, 20, generator=generator, dtype=torch.float64)
    expected = TiltProjection(torch.tensor([0.0, 10.0], dtype=torch.float64), (8, 2, 20)).A(x)
    torch.testing.assert_close(TiltProjection(angles, (8, 2, 20)).A(x), expected)
