"""Bells on grids: the same sum in tiles and point by point, in one to three dimensions."""

import math

import pytest
import torch

import cryosim.specimen.bells as bells
from cryosim.specimen.bells import BETA, bell_transform, spread

CASES = [((50,), 40), ((33, 47), 300), ((20, 64), 12), ((19, 22, 25), 2000), ((19, 22, 25), 9)]


def points(shape, n, columns, dtype, generator):
    """Centres, some of whose bells reach over an edge, and strengths."""
    half = torch.tensor([s / 2 for s in shape], dtype=torch.float64)
    centres = (2 * torch.rand(n, len(shape), generator=generator, dtype=torch.float64) - 1) * half
    return centres, torch.randn(n, columns, generator=generator, dtype=torch.float64).to(dtype)


def one_by_one(centres, strengths, shape, width):
    """Every bell at every sample, at the distance on the ring: (column, sample)."""
    total = torch.ones(len(centres), 1, dtype=torch.float64)
    for centre, n in zip(centres.unbind(1), shape, strict=True):
        away = torch.arange(n, dtype=torch.float64) - n // 2 - centre[:, None]
        z = 2 * (away - n * torch.round(away / n)) / width
        bell = torch.where(z.abs() < 1, torch.exp(BETA * width * (torch.sqrt((1 - z * z).clamp_min(0)) - 1)), 0.0)
        total = (total[:, :, None] * bell[:, None]).flatten(1)
    return strengths.double().T @ total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize(("shape", "n"), CASES)
def test_grids_hold_the_sum_of_all_bells(shape, n, width, dtype, generator):
    centres, strengths = points(shape, n, 6, dtype, generator)
    grids = [torch.zeros(3, math.prod(shape), dtype=dtype) for _ in range(2)]
    spread(grids, centres, strengths, shape, width)
    expected = one_by_one(centres, strengths, shape, width)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (torch.cat(grids).double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_both_ways_are_taken(generator, monkeypatch):
    """Tiles where points are close together, else point by point; and with the other choice the sum is the same."""
    shape, sums, chosen = (33, 47), {}, {}
    centres, strengths = points(shape, 300, 2, torch.float64, generator)
    usual = bells._samples

    def noted(corners, side, shape):
        chosen[bells._CROWDED] = side
        return usual(corners, side, shape)

    monkeypatch.setattr(bells, "_samples", noted)
    for crowded in (1, 1000):
        monkeypatch.setattr(bells, "_CROWDED", crowded)
        sums[crowded] = torch.zeros(2, math.prod(shape), dtype=torch.float64)
        spread([sums[crowded]], centres, strengths, shape, 6)
    assert chosen == {1: 8 + 6 - 1, 1000: 6}
    torch.testing.assert_close(sums[1], sums[1000], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "n"), [((24, 17), 60), ((24, 17), 5), ((9, 8, 10), 120)])
def test_gradients_of_places_and_strengths(shape, n, generator):
    centres, strengths = points(shape, n, 2, torch.float64, generator)

    def total(places, weights):
        grid = torch.zeros(2, math.prod(shape), dtype=torch.float64)
        spread([grid], places, weights, shape, 6)
        return (grid**2).sum()

    inputs = (centres.requires_grad_(), strengths.requires_grad_())
    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(total, inputs, fast_mode=True)


def test_no_points_leave_nothing():
    grid = torch.zeros(1, 12, dtype=torch.float64)
    spread([grid], torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64), (3, 4), 2)
    assert not grid.any()


@pytest.mark.parametrize("n", [32, 33])
def test_transform_of_a_bell(n):
    """In the middle of a grid its discrete transform is real, and aliases are below what a bell leaves out."""
    width, grid = 8, torch.zeros(1, n, dtype=torch.float64)
    spread([grid], torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), (n,), width)
    seen = torch.fft.fft(torch.fft.ifftshift(grid[0]))
    inside = torch.fft.fftfreq(n).abs() < 1 / 3
    expected = bell_transform(n, width)
    assert ((seen - expected).abs()[inside] < 5e-6 * expected[inside]).all()
