"""`TiltProjection` against what is known without it: analytic projections, normal equations, its own promises."""

import math

import numpy as np
import pytest
import torch

from cryosim.core.rotation import rotation_x, tilt_rotation
from inverse.physics.closed_form import block_conjugate_gradients, gram_matrices, largest_eigenvalue, solve
from inverse.physics.spectral import backproject, project
from inverse.physics.tilt import TiltProjection
from inverse.physics.turn import to_tilt_frame

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


UNEVEN = torch.tensor(
    [-58, -57, -49, -44, -43, -40, -31, -24, -22, -15, -3, -1, 4, 11, 12, 20, 33, 38, 47, 50, 56],
    dtype=torch.float64,
)


def noisy_images(angles, shape, dtype, generator):
    """Images (tilt, row, u) of white noise (z, row, x), with noise, and the geometry."""
    geometry = TiltProjection(angles, shape).geometry
    y = project(torch.randn(shape, generator=generator, dtype=torch.float64), angles, geometry)
    return (y + 0.3 * y.std() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).to(dtype), geometry


def optimality(x, y, angles, geometry, damping):
    """|A^T (A x - y) + damping x| / |A^T y| in float64, of the operator itself."""
    x, y = x.double(), y.double()
    wrong = backproject(project(x, angles, geometry) - y, angles, geometry) + damping * x
    return float(wrong.norm() / backproject(y, angles, geometry).norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("angles", [ANGLES, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("rows", "damping", "most"), [(64, 1.0, 3), (64, 0.1, 4), (64, 0.01, 7), (128, 0.1, 4), (128, 0.01, 5)]
)
def test_many_rows_solve_each_other(rows, damping, most, angles, dtype, generator):
    """To a true residual of 1e-5 in at most 5 iterations: 128 rows from a damping of 0.01 |A|^2 on, 64 from 0.1."""
    y, geometry = noisy_images(angles, (32, rows, 48), dtype, generator)
    damping = damping * largest_eigenvalue(angles, geometry)
    x, iterations = solve(torch.zeros(32, rows, 48, dtype=dtype), y, angles, damping, geometry, 1e-5, 50)
    assert iterations <= most
    assert optimality(x, y, angles, geometry, damping) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_are_zero_equal_or_weak_do_no_harm(dtype, generator):
    y, geometry = noisy_images(UNEVEN, (15, 9, 31), dtype, generator)
    y[:, 1] = 0
    y[:, 2] = y[:, 3] = y[:, 4]
    y[:, 5] = y[:, 6] - y[:, 7]
    y[:, 8] *= 2.0**-20
    damping = 0.02 * largest_eigenvalue(UNEVEN, geometry)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    zero = torch.zeros(15, 9, 31, dtype=dtype)
    x, iterations = solve(zero, y, UNEVEN, damping, geometry, tolerance, 60)
    assert iterations <= 60 and bool(torch.isfinite(x).all())
    assert x[:, 1].abs().max() == 0
    torch.testing.assert_close(x[:, 2], x[:, 4], rtol=0, atol=float(10 * tolerance * x.abs().max()))
    assert optimality(x, y, UNEVEN, geometry, damping) <= tolerance
    nothing, iterations = solve(zero, torch.zeros_like(y), UNEVEN, damping, geometry, tolerance, 60)
    assert iterations == 0 and nothing.abs().max() == 0


def test_more_rows_than_a_block(generator):
    """130 rows go in two blocks of 65, and each row gets what it gets alone."""
    y, geometry = noisy_images(UNEVEN, (4, 130, 12), torch.float64, generator)
    damping = 0.1 * largest_eigenvalue(UNEVEN, geometry)
    x, _ = solve(torch.zeros(4, 130, 12, dtype=torch.float64), y, UNEVEN, damping, geometry, 1e-12, 50)
    alone, _ = solve(x.new_zeros(4, 1, 12), y[:, 129:], UNEVEN, damping, geometry, 1e-12, 50)
    torch.testing.assert_close(x[:, 129:], alone, rtol=0, atol=1e-10 * float(x.abs().max()))


def test_block_conjugate_gradients_solve_a_matrix_in_as_many_steps_as_its_rows_allow(generator):
    """24 unknowns and 8 right-hand sides span everything after 3 iterations, whatever the condition."""
    basis, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.logspace(0, 2, 24, dtype=torch.float64)) @ basis.T
    target = torch.randn(4, 8, 6, generator=generator, dtype=torch.float64)

    def operator(volume):
        return (matrix @ volume.transpose(0, 1).flatten(1).T).T.unflatten(1, (4, 6)).transpose(0, 1)

    x, iterations = block_conjugate_gradients(operator, lambda v: v, target, 1e-8, 20)
    exact = torch.linalg.solve(matrix, target.transpose(0, 1).flatten(1).T).T.unflatten(1, (4, 6)).transpose(0, 1)
    assert iterations == 3
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-7)


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


# ------------------------------------------------------------------------------------- the microscope's whole geometry

PLACED = {
    "shifts": {"shifts": torch.tensor([[3.0, -2.0], [-1.4, 4.3], [0.6, 0.2]], dtype=torch.float64)},
    "magnifications": {"magnifications": torch.tensor([0.93, 1.0, 1.06], dtype=torch.float64)},
    "x_tilt": {"x_tilt": 7.0},
    "small turn": {"axis_angle": -33.0},
    "quarter turn": {"axis_angle": 90.0},
    "half turn": {"axis_angle": 180.0},
    "turns": {"axis_angle": torch.tensor([84.0, -91.0, 128.0], dtype=torch.float64)},
}
PLACED["all"] = PLACED["shifts"] | PLACED["magnifications"] | PLACED["turns"] | {"x_tilt": -8.0}


def seen_blobs(physics, centres, heights, sigma):
    """Line integrals (tilt, y, x) of Gaussians (x, y, z) at R_z R_y R_x r, magnified, displaced."""
    images = []
    v, u = (torch.arange(n, dtype=torch.float64) - n // 2 for n in physics.image_shape)
    for t, angle in enumerate(physics.angles[0]):
        turn = tilt_rotation(angle, physics.axis_angle[0, t]) @ rotation_x(physics.x_tilt[0])
        m = physics.magnifications[0, t]
        at = m * (centres @ turn.T)[:, :2] + physics.shifts[0, t]
        columns, rows = (
            torch.exp(-((a - c[:, None]) ** 2) / (2 * (m * sigma) ** 2)) for a, c in ((u, at[:, 0]), (v, at[:, 1]))
        )
        images.append(torch.einsum("n,ny,nu->yu", heights * sigma * math.sqrt(2 * math.pi), rows, columns))
    return torch.stack(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "image"), [((32, 44, 46), (60, 64)), ((31, 45, 43), (61, 57))])
@pytest.mark.parametrize("name", PLACED)
def test_the_whole_geometry_on_gaussian_blobs(name, shape, image, dtype, generator):
    """Measured: 2e-8 in float64, 5e-7 in float32."""
    sigma = 2.0
    _, centres, heights = gaussian_blobs((20, 32, 32), sigma, 3.0, generator, n=8)
    axes = [torch.arange(m, dtype=torch.float64) - m // 2 for m in shape[::-1]]
    x, y, z = (torch.exp(-((a - c[:, None]) ** 2) / (2 * sigma**2)) for a, c in zip(axes, centres.T, strict=True))
    volume = torch.einsum("n,nz,ny,nx->zyx", heights, z, y, x)
    physics = TiltProjection([-55.0, 3.0, 50.0], shape, image, **PLACED[name])
    expected = seen_blobs(physics, centres, heights, sigma)
    seen = physics.A(volume.to(dtype)[None, None])[0, 0]
    assert seen.dtype == dtype
    assert (seen.double() - expected).norm() <= (2e-6 if dtype == torch.float32 else 1e-7) * expected.norm()


@pytest.mark.parametrize("method", ["A", "A_adjoint", "prox_l2"])
@pytest.mark.parametrize("name", ["angles", "axis_angle", "shifts", "magnifications", "x_tilt"])
@pytest.mark.parametrize("where", ["usual", "all"])
def test_gradients_of_every_parameter(where, name, method, generator):
    """Against differences, also about the usual values, where the operator takes its short way."""
    shape = (4, 5, 6)
    physics = TiltProjection([-40.0, 5.0, 30.0], shape, tolerance=1e-13, **(PLACED["all"] if where == "all" else {}))
    x = torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64)
    y = torch.randn(1, 1, 3, *shape[1:], generator=generator, dtype=torch.float64)
    start = getattr(physics, name).clone()
    along = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    aside = torch.tensor(0.01 if where == "usual" and name != "angles" else 0.0)
    start = start + aside * along
    physics.update(**{name: start + 0.3 * along})  # room, so that no size changes on the way

    def act(value):
        physics.update(**{name: value})
        if method == "A":
            return (physics.A(x) * y).sum()
        return ((physics.A_adjoint(y) if method == "A_adjoint" else physics.prox_l2(x, y, 0.05)) * x).sum()

    value = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(act(value), value)
    with torch.no_grad():
        difference = (act(start + 1e-5 * along) - act(start - 1e-5 * along)) / 2e-5
    assert float((slope * along).sum()) == pytest.approx(float(difference), rel=1e-5, abs=1e-8)


def test_usual_values_are_the_short_way(generator):
    """Given as what they are anyway, the parameters change no bit; next to it, next to nothing."""
    x = torch.randn(1, 1, 8, 7, 20, generator=generator, dtype=torch.float64)
    plain = TiltProjection([-30.0, 0.0, 40.0], (8, 7, 20)).A(x)
    usual = {"axis_angle": 0.0, "shifts": torch.zeros(3, 2), "magnifications": 1.0, "x_tilt": torch.tensor(0.0)}
    assert torch.equal(TiltProjection([-30.0, 0.0, 40.0], (8, 7, 20), **usual).A(x), plain)
    near = TiltProjection([-30.0, 0.0, 40.0], (8, 7, 20), shifts=torch.full((3, 2), 1e-9)).A(x)
    assert not torch.equal(near, plain)
    assert (near - plain).norm() <= 1e-7 * plain.norm()


def test_each_item_may_have_its_own_setting(generator):
    shape, angles = (5, 6, 7), [-30.0, 0.0, 40.0]
    x = torch.randn(2, 1, *shape, generator=generator, dtype=torch.float64)
    turns = torch.tensor([[5.0, 6.0, 7.0], [84.0, 85.0, 86.0]], dtype=torch.float64)
    tilts = torch.tensor([3.0, -4.0], dtype=torch.float64)
    physics = TiltProjection(angles, shape, axis_angle=turns, x_tilt=tilts)
    both = physics.A(x)
    for i in range(2):
        alone = physics.A(x[i : i + 1], axis_angle=turns[i : i + 1], x_tilt=tilts[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone)
    with pytest.raises(ValueError, match="one for each of 3 items"):
        physics.A(torch.cat([x, x[:1]]), axis_angle=turns)


@pytest.mark.parametrize("name", PLACED)
def test_prox_in_the_whole_geometry_satisfies_its_optimality_condition(name, generator):
    physics = TiltProjection([-50.0, -20.0, 30.0], (6, 9, 12), (11, 10), **PLACED[name])
    z = torch.randn(1, 2, 6, 9, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(1, 2, 3, 11, 10, generator=generator, dtype=torch.float64)
    gamma = 20 / float(physics.squared_norm())
    x = physics.prox_l2(z, y, gamma)
    wrong = gamma * physics.A_adjoint(physics.A(x) - y) + x - z
    assert wrong.norm() <= 1.1e-5 * (gamma * physics.A_adjoint(y) + z).norm()


@pytest.mark.parametrize("shape", [(6, 8, 16), (7, 9, 15)])
def test_shifts_on_the_stretched_grid(shape, generator):
    """By whole pixels, images are rolled, and least squares stays a closed form."""
    angles, whole = torch.tensor([-50.0, 0.0, 30.0], dtype=torch.float64), torch.tensor([2, -1, 3])
    voxels = torch.stack([whole * torch.cos(torch.deg2rad(angles)), whole.double()], 1)
    plain = TiltProjection(angles, shape, grid="stretched")
    moved = TiltProjection(angles, shape, grid="stretched", shifts=voxels)
    x = torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64)
    x = plain.A_adjoint(plain.A(x))
    if shape[1] % 2 == 0:  # without the frequency that has no partner
        x = x - torch.fft.irfft(
            torch.fft.rfft(x, dim=-2)[..., -1:, :].expand(1, 1, 6, 5, 16) * torch.tensor([0, 0, 0, 0, 1])[:, None],
            n=8,
            dim=-2,
        )
    seen, rolled = moved.A(x)[0, 0], plain.A(x)[0, 0]
    for t in range(3):
        torch.testing.assert_close(seen[t], rolled[t].roll((int(whole[t]), int(whole[t])), (0, 1)), rtol=0, atol=1e-9)
    back = moved.prox_l2(x, moved.A(x), 1e3)
    assert (back - x).norm() <= 1e-10 * x.norm()


def test_the_frame_of_the_tilt_axis_undoes_turn_and_shift(generator):
    """Images of a turned, displaced geometry, brought back, are those of the plain one."""
    sigma, shape = 2.0, (24, 40, 44)
    volume, _, _ = gaussian_blobs(shape, sigma, 6.0, generator, n=5)
    for axis in (84.0, -3.0, 180.0):
        shifts = torch.tensor([[2.0, -1.0], [0.5, 3.0]], dtype=torch.float64)
        physics = TiltProjection([-20.0, 35.0], shape, (72, 72), axis_angle=axis, shifts=shifts)
        expected = TiltProjection([-20.0, 35.0], shape, (72, 72)).A(volume[None, None])[0, 0]
        back = to_tilt_frame(physics.A(volume[None, None])[0, 0], shifts, axis)
        assert (back - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"axis_angle": torch.zeros(4)}, r"axis_angle: expected \(2,\)"),
        ({"shifts": torch.zeros(2)}, r"shifts: expected \(2, 2\)"),
        ({"shifts": torch.full((2, 2), float("nan"))}, "shifts: expected finite"),
        ({"magnifications": -1.0}, "magnifications: expected 0.1 or more"),
        ({"x_tilt": 61.0}, "x_tilt: expected less than 60"),
        ({"x_tilt": 1.0, "grid": "stretched"}, "x_tilt: not on the stretched grid"),
        ({"axis_angle": 1.0, "grid": "stretched"}, "axis_angle: not on the stretched grid"),
        ({"magnifications": 1.1, "grid": "stretched"}, "magnifications: not on the stretched grid"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ValueError, match=message):
        TiltProjection([0.0, 10.0], (4, 6, 8), **given)


def test_solvers_of_the_plain_projection_refuse_another():
    """What takes the operator to pieces must not overlook that its images are displaced."""
    with pytest.raises(ValueError, match="expected tilts about y alone"):
        _ = TiltProjection([0.0, 10.0], (4, 6, 8), x_tilt=1.0).geometry
