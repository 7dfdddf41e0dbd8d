"""The Fourier convention: where the origin is, which way the phases turn, what a band limit and a resampling keep."""

import math

import pytest
import torch

from cryosim.core.fourier import (
    band_limit,
    centre_phases,
    frequencies,
    half_frequencies,
    positions,
    resampling_matrix,
    squared_frequencies,
)

SIZES = [7, 8, 9, 48]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_origin_is_sample_n_over_2(n, half, dtype):
    point = torch.zeros(n, dtype=dtype)
    point[n // 2] = 1
    assert positions(n, 1.3, dtype=dtype)[n // 2] == 0
    transform = (torch.fft.rfft if half else torch.fft.fft)(point) * centre_phases(n, half=half, dtype=dtype)
    torch.testing.assert_close(
        transform, torch.ones_like(transform), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-14
    )


@pytest.mark.parametrize("n", SIZES)
def test_forward_phases_are_minus_2_pi_k_r(n):
    spacing, steps = 1.3, 2
    point = torch.zeros(n, dtype=torch.float64)
    point[n // 2 + steps] = 1
    transform = torch.fft.fft(point) * centre_phases(n, dtype=torch.float64)
    k = frequencies(n, spacing, dtype=torch.float64)
    torch.testing.assert_close(transform, torch.exp(-2j * math.pi * k * steps * spacing))


@pytest.mark.parametrize("shape", [(8, 7), (9, 12)])
def test_half_frequencies_are_the_first_columns(shape):
    whole = squared_frequencies(shape, 0.7, dtype=torch.float64)
    half = squared_frequencies(shape, 0.7, half=True, dtype=torch.float64)
    torch.testing.assert_close(half, whole[:, : shape[1] // 2 + 1])
    k = frequencies(shape[1], 0.7, dtype=torch.float64)
    torch.testing.assert_close(half_frequencies(shape[1], 0.7, dtype=torch.float64), k[: shape[1] // 2 + 1].abs())


@pytest.mark.parametrize("shape", [(48, 48), (63, 45), (75, 96), (120, 150)])
@pytest.mark.parametrize("fraction", [2 / 3, 0.5])
def test_band_limit_keeps_the_same_circle_in_every_precision(shape, fraction):
    """Frequencies exactly on the circle, as sizes divisible by three have them, are not left to rounding."""
    double = band_limit(shape, fraction, dtype=torch.float64)
    assert torch.equal(band_limit(shape, fraction, dtype=torch.float32).double(), double)
    assert torch.equal(band_limit(shape, fraction, half=True, dtype=torch.float64), double[:, : shape[1] // 2 + 1])
    assert double.sum() == pytest.approx(math.pi / 4 * fraction**2 * shape[0] * shape[1], rel=0.05)


@pytest.mark.parametrize("shape", [(24, 27), (25, 32), (45, 36)])
def test_products_of_images_inside_two_thirds_do_not_alias_into_the_band(shape, generator):
    keep = band_limit(shape, dtype=torch.float64)
    spectra = torch.fft.fft2(torch.randn(2, *shape, generator=generator, dtype=torch.float64)) * keep
    direct = torch.fft.fft2(torch.fft.ifft2(spectra).prod(0)) * keep
    # the same product on a grid with room for every frequency of it
    room = tuple(2 * n for n in shape)
    k = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64).round().long() for n in shape]
    wide = torch.zeros(2, *room, dtype=torch.complex128)
    wide[:, k[0][:, None], k[1][None, :]] = spectra * 4
    product = torch.fft.fft2(torch.fft.ifft2(wide).prod(0))[k[0][:, None], k[1][None, :]] / 4 * keep
    torch.testing.assert_close(direct, product)


def test_taper_falls_from_one_to_zero_inside_the_circle():
    shape, fraction, taper = (64, 65), 2 / 3, 0.1
    k = squared_frequencies(shape, dtype=torch.float64).sqrt()
    soft = band_limit(shape, fraction, taper, dtype=torch.float64)
    assert (soft[k <= fraction / 2 - taper] == 1).all()
    assert (soft[k > fraction / 2] == 0).all()
    order = k.flatten().argsort()
    assert (soft.flatten()[order].diff() <= 1e-12).all()


def waves(n, top, generator):
    """A random real function of period n [px] with frequencies up to `top` / n, as (x) -> values."""
    m = torch.arange(top + 1, dtype=torch.float64)
    amplitudes = torch.randn(2, top + 1, generator=generator, dtype=torch.float64)

    def function(x):
        turns = 2 * math.pi * x[:, None] * m / n
        return torch.cos(turns) @ amplitudes[0] + torch.sin(turns) @ amplitudes[1]

    return function


@pytest.mark.parametrize("n", [48, 45])
@pytest.mark.parametrize("ratio", [2 / 3, 1.0, 1.5, math.sqrt(2), 4.0])
@pytest.mark.parametrize("odd", [0, 1])
def test_resampling_is_exact_below_both_nyquist_frequencies(n, ratio, odd, generator):
    out = int(n / ratio) - odd
    function = waves(n, math.ceil(n / (2 * max(ratio, 1.0))) - 1, generator)
    matrix = resampling_matrix(n, out, ratio, dtype=torch.float64)
    assert matrix.shape == (out, n)
    wanted = function(positions(out, ratio, dtype=torch.float64))
    torch.testing.assert_close(matrix @ function(positions(n, dtype=torch.float64)), wanted, rtol=0, atol=1e-11)
    single = resampling_matrix(n, out, torch.tensor(ratio, dtype=torch.float64), dtype=torch.float32)
    torch.testing.assert_close(single.double(), matrix, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_resampling_removes_what_the_coarser_grid_cannot_hold(ratio):
    n = 48
    m = int(n / (2 * ratio)) + 1
    wave = torch.cos(2 * math.pi * m * positions(n, dtype=torch.float64) / n)
    assert (resampling_matrix(n, int(n / ratio), ratio, dtype=torch.float64) @ wave).abs().max() < 1e-12


@pytest.mark.parametrize(("n", "out"), [(24, 17), (25, 12)])
def test_gradient_in_the_ratio(n, out, generator):
    weights = torch.randn(out, n, generator=generator, dtype=torch.float64)
    ratio = torch.tensor(1.37, dtype=torch.float64, requires_grad=True)

    def score(r):
        return (resampling_matrix(n, out, r, dtype=torch.float64) * weights).sum()

    assert torch.autograd.gradcheck(score, ratio, rtol=1e-6)
