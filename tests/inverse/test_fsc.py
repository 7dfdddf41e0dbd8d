"""Fourier shell correlation: known answers."""

import math

import pytest
import torch

from inverse.metrics.fsc import fsc, measured_region


def noise(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(32, 32, 32), (15, 33, 64), (31, 40, 17)])
def test_a_volume_with_itself_and_its_negative(shape):
    v = noise(shape, 0)
    same, opposite = fsc(v, 3 * v, 2.0), fsc(v, -v, 2.0)
    frequency, correlation = same
    assert torch.equal(frequency, same.frequency) and torch.equal(correlation, same.correlation)
    filled = same.samples > 0
    torch.testing.assert_close(same.correlation[filled], torch.ones_like(same.correlation[filled]))
    torch.testing.assert_close(opposite.correlation[filled], -torch.ones_like(opposite.correlation[filled]))
    assert same.resolution() == pytest.approx(1 / float(same.frequency[filled][-1]))


def test_independent_noise_has_the_variance_of_its_samples():
    """Uncorrelated volumes: the mean is 0 and the variance 1 / samples."""
    curves = [fsc(noise((24, 24, 24), 2 * i), noise((24, 24, 24), 2 * i + 1), 1.0) for i in range(40)]
    shells = torch.stack([c.correlation for c in curves])[:, 4:]
    expected = 1 / curves[0].samples[4:]
    assert abs(float((shells.var(0) / expected).mean()) - 1) < 0.25
    assert abs(float(shells.mean())) < 0.01


@pytest.mark.parametrize("snr", [0.5, 2.0])
def test_noise_of_known_strength(snr):
    """Signal plus noise against the signal: sqrt(snr / (1 + snr)) in every shell."""
    s, n = noise((40, 40, 40), 0), noise((40, 40, 40), 1)
    curve = fsc(s + n / math.sqrt(snr), s, 1.0)
    assert float((curve.correlation[6:] - math.sqrt(snr / (1 + snr))).abs().mean()) < 0.02


def test_frequencies_are_in_cycles_per_angstrom():
    """Volumes that agree only below a known frequency lose their correlation there."""
    v, w, voxel = noise((64, 64, 64), 0), noise((64, 64, 64), 1), 2.5
    k = torch.fft.fftfreq(64, voxel, dtype=torch.float64)
    radius = (k[:, None, None] ** 2 + k[:, None] ** 2 + torch.fft.rfftfreq(64, voxel, dtype=torch.float64) ** 2).sqrt()
    mixed = torch.fft.irfftn(torch.where(radius < 0.1, torch.fft.rfftn(v), torch.fft.rfftn(w)), s=v.shape)
    assert fsc(mixed, v, voxel).resolution(0.5) == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("shape", [(32, 8, 48), (33, 7, 47)])
def test_only_the_region_counts(shape):
    """What differs inside the missing wedge alone is invisible outside it."""
    v, w = noise(shape, 0), noise(shape, 1)
    region = measured_region(shape, torch.tensor([-60.0, 60.0]))
    mixed = torch.fft.irfftn(torch.where(region, torch.fft.rfftn(v), torch.fft.rfftn(w)), s=shape)
    inside, whole = fsc(mixed, v, 1.0, region=region), fsc(mixed, v, 1.0)
    strict = (inside.samples > 0) & (inside.frequency < 0.45)
    assert float(inside.correlation[strict].min()) > 0.99
    assert float(whole.correlation[strict].mean()) < 0.9


def test_measured_region_is_where_the_tilts_are():
    """kz between kx tan(-40) and kx tan(60); the share of a full circle is 100 / 180 of the disk."""
    region = measured_region((129, 1, 129), torch.tensor([-40.0, 0.0, 60.0]))[:, 0]
    kz = torch.fft.fftfreq(129)[:, None]
    kx = torch.fft.rfftfreq(129)[None]
    disk = kz**2 + kx**2 < 0.25
    share = (region & disk)[:, 1:].sum() / disk[:, 1:].sum()
    assert float(share) == pytest.approx(100 / 180, abs=0.01)
    assert bool(region[5, 4]) and not bool(region[-5, 4])  # kz / kx = 1.25: tan 51 is measured, tan -51 is not


def test_shells_below_the_thickness_are_marked():
    curve = fsc(noise((20, 40, 40), 0), noise((20, 40, 40), 0), 2.0, thickness=40.0)
    assert torch.equal(curve.reliable, curve.frequency >= 1 / 40)


def test_bad_input():
    with pytest.raises(ValueError, match="one shape"):
        fsc(torch.zeros(4, 4, 4), torch.zeros(4, 4, 5), 1.0)
    with pytest.raises(ValueError, match="not finite"):
        fsc(torch.full((4, 4, 4), torch.nan), torch.zeros(4, 4, 4), 1.0)
