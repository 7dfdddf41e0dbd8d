"""Local resolution: known places, known answers."""

import math

import pytest
import torch

from cryosim.core.volume import Volume
from inverse.metrics.fsc import squared_frequencies_3d
from inverse.metrics.local_resolution import local_correlation, local_resolution


def low_passed(volume, period):
    kept = squared_frequencies_3d(volume.shape, 1.0, volume.device) < 1 / period**2
    return torch.fft.irfftn(torch.fft.rfftn(volume) * kept, s=volume.shape)


def noise(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "window"), [((40, 40, 80), 10.0), ((41, 39, 81), 16.0)])
def test_two_halves_of_a_volume_with_two_resolutions(generator, shape, window, dtype):
    """16 Å on the left and 6 Å on the right, away from the seam; measured medians: 15.2 to 16.4 and 5.9 Å."""
    s, first, second = (noise(generator, *shape) for _ in range(3))
    left = torch.arange(shape[2]) < shape[2] // 2
    signal = torch.where(left, low_passed(s, 8.0), low_passed(s, 3.0))  # [voxel], of 2 Å
    a, b = (signal + first / 2).to(dtype), (3 * (signal + second / 2)).to(dtype)
    found = local_resolution(a, b, 2.0, window=window)
    assert found.shape == a.shape and found.dtype == dtype
    quarter = shape[2] // 4
    coarse, fine = found[..., quarter - 8 : quarter + 8], found[..., -quarter - 8 : 8 - quarter]
    assert float(coarse.median()) == pytest.approx(16.0, rel=0.15)
    assert float(fine.median()) == pytest.approx(6.0, rel=0.15)
    assert float((coarse / 16 - 1).abs().lt(0.25).double().mean()) > 0.95
    assert float((fine / 6 - 1).abs().lt(0.15).double().mean()) > 0.99


def test_a_volume_with_itself_reaches_the_nyquist_frequency(generator):
    v = noise(generator, 17, 24, 20)
    found = local_resolution(Volume(v, 1.5), -2 * -v, 1.5)
    torch.testing.assert_close(found, torch.full_like(v, 3.0))
    assert bool(torch.isinf(local_resolution(v, -v, 1.5)).all())


def test_the_mean_over_a_wide_window_is_the_shell_correlation(generator):
    """Signal and noise of equal power correlate by 1 / 2 in every band; measured: within 0.026, by chance."""
    s, first, second = (noise(generator, 32, 33, 34) for _ in range(3))
    for k, correlation in local_correlation(s + first, s + second, 1.0, window=12.0, bands=8):
        if k > 0.15:
            assert float(correlation.mean()) == pytest.approx(0.5, abs=0.035)


def test_bands_are_where_they_say(generator):
    """A wave of 5 Å is in the bands next to 1 / 5 Å and in no other."""
    x = 1.25 * torch.arange(40, dtype=torch.float64)
    wave = torch.cos(2 * torch.pi * x / 5).expand(24, 24, 40)
    shares = {k: float(c.mean()) for k, c in local_correlation(wave, wave, 1.25, window=8.0, bands=16)}
    full = [k for k, c in shares.items() if c > 0.5]
    assert full and all(abs(k - 0.2) < 0.4 / 16 for k in full)
    assert all(c == 0 for k, c in shares.items() if abs(k - 0.2) > 0.4 / 16)


def test_variance_of_independent_noise_is_one_over_the_samples():
    """Equation (2), in the middle of the box, over bands and draws; measured with 8 draws: 0.86 to 0.93 of 1 / N."""
    shares = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        a, b = noise(generator, 64, 64, 64), noise(generator, 64, 64, 64)
        for k, correlation in local_correlation(a, b, 1.0, window=5.0, bands=8):
            samples = (4 * math.pi) ** 1.5 * 5**3 * 4 * math.pi * k**2 * 4 / 3 * 0.5 / 8
            if 0.15 < k < 0.45:
                shares.append(float(correlation[12:-12, 12:-12, 12:-12].square().mean()) * samples)
    assert sum(shares) / len(shares) == pytest.approx(0.9, abs=0.15)


def test_faces_do_not_see_the_opposite_face(generator):
    """A disagreement at one face leaves the other alone, although the Fourier transform is periodic."""
    v = noise(generator, 24, 24, 64)
    other = v.clone()
    other[..., :12] = noise(generator, 24, 24, 12)
    found = local_resolution(v, other, 1.0, window=4.0)
    assert float(found[..., -4:].median()) < 2.2
    assert float(found[..., :4].median()) > 3.0


def test_an_empty_place_is_not_resolved(generator):
    v = noise(generator, 16, 16, 96)
    v[..., 48:] = 0
    assert bool(torch.isfinite(local_resolution(v, v, 1.0, window=3.0)[..., :40]).all())
    for _, correlation in local_correlation(v, torch.zeros_like(v), 1.0):
        assert float(correlation.abs().max()) == 0


def test_gradient(generator):
    a, b = (noise(generator, 6, 7, 8).requires_grad_() for _ in range(2))

    def one_band(a, b):
        return next(iter(local_correlation(a, b, 1.0, window=2.0, bands=4)))[1]

    assert torch.autograd.gradcheck(one_band, (a, b), fast_mode=True)


def test_bad_input(generator):
    v = noise(generator, 6, 7, 8)
    with pytest.raises(ValueError, match="one shape"):
        local_resolution(v, v[1:], 1.0)
    with pytest.raises(ValueError, match="not finite"):
        local_resolution(v, v * torch.nan, 1.0)
    with pytest.raises(ValueError, match="voxel_size"):
        local_resolution(v, v, 0.0)
    with pytest.raises(ValueError, match="window"):
        local_resolution(v, v, 4.0, window=2.0)
    with pytest.raises(ValueError, match="bands"):
        local_resolution(v, v, 4.0, bands=1)
