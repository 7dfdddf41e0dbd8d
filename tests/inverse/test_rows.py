"""Back-projection of rows by chirps and blocks of layers, against the same sums as plain matrix products."""

import pytest
import torch

import inverse.physics.rows
from inverse.physics.closed_form import backproject_filtered, gram_solver
from inverse.physics.rows import backproject_rows, row_backprojection
from inverse.physics.spectral import tilt_geometry
from inverse.solvers.linear import wbp_filter

ANGLES = torch.tensor([-60.0, -33.0, -10.0, 0.0, 5.0, 21.0, 58.0], dtype=torch.float64)


def both(images, depth, grid, method, layers):
    """Volumes (z, row, x) as matrix products and by blocks."""
    geometry = tilt_geometry(depth, images.shape[2], images.shape[2], grid, 60.0)
    damping = torch.tensor(0.3, dtype=torch.float64)
    action = wbp_filter(ANGLES, geometry) if method == "wbp" else gram_solver(ANGLES, damping, geometry)
    plan = row_backprojection(ANGLES, geometry, action, images.dtype, layers=layers)
    blocks = list(backproject_rows(plan, images))
    assert [b.start for b, _ in blocks] == [0, *(b.stop for b, _ in blocks[:-1])]
    return backproject_filtered(images, ANGLES, geometry, action), torch.cat([values for _, values in blocks])


@pytest.mark.parametrize("method", ["wbp", "least-squares"])
@pytest.mark.parametrize("grid", ["camera", "stretched"])
@pytest.mark.parametrize(("depth", "width", "rows"), [(13, 40, 5), (24, 31, 1), (131, 64, 3), (65, 33, 4), (1, 9, 2)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_blocks_are_the_matrix_products(method, grid, depth, width, rows, dtype, error, generator):
    """Measured, of the largest value: 1e-14 and 1.1e-6, which is how far float32 matrix products are off themselves."""
    images = torch.randn(len(ANGLES), rows, width, generator=generator, dtype=dtype)
    expected, found = both(images, depth, grid, method, layers=64)
    assert found.dtype == dtype
    assert float((found - expected).abs().max()) < error * float(expected.abs().max())


@pytest.mark.parametrize("layers", [1, 2, 7, 16, 200])
@pytest.mark.parametrize("at_once", [1, 10, 1000])
def test_the_size_of_the_blocks_does_not_matter(layers, at_once, generator, monkeypatch):
    monkeypatch.setattr(inverse.physics.rows, "_FREQUENCIES_AT_ONCE", at_once)
    images = torch.randn(len(ANGLES), 3, 30, generator=generator, dtype=torch.float64)
    expected, found = both(images, 29, "camera", "wbp", layers)
    assert float((found - expected).abs().max()) < 1e-13 * float(expected.abs().max())


def test_float32_is_as_exact_on_wide_images_as_matrix_products_are(generator):
    """Chirps wind thousands of times over a wide image: their phases are reduced before they are rounded."""
    images = torch.randn(len(ANGLES), 1, 1500, generator=generator, dtype=torch.float64)
    exact, _ = both(images, 64, "camera", "wbp", 64)
    plain, chirped = both(images.float(), 64, "camera", "wbp", 64)
    scale = float(exact.abs().max())
    assert float((chirped - exact).abs().max()) < 2e-6 * scale
    assert float((chirped - exact).norm()) < 2 * float((plain - exact).norm())
