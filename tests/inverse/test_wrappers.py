"""Denoisers made of denoisers: other units change nothing, tiles leave no trace, and no direction is preferred."""

import pytest
import torch
from deepinv.models import DRUNet
from deepinv.models.base import Denoiser
from torch import nn

from inverse.priors.wrappers import Affine, Equivariant, Tiled, rotated, rotated_back, rotations
from tests.inverse.gaussian_denoiser import GaussianDenoiser, smooth_spectrum


def random(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=dtype)


class Halving(Denoiser):
    """Two convolutions, one of them at an eighth of the resolution: reaches 15 voxels at most."""

    voxel_size = 4.0
    noise_levels = (0.1, 2.0)

    def __init__(self, generator):
        super().__init__()
        self.fine, self.coarse = (nn.Conv3d(1, 1, 3, padding=1, dtype=torch.float64) for _ in range(2))
        for p in self.parameters():
            p.data = random(p.shape, generator) / 5
        self.requires_grad_(False)
        self.largest = 0

    def forward(self, x, sigma, **_):
        self.largest = max(self.largest, x.numel())
        level = torch.as_tensor(sigma).to(x).reshape(-1, 1, 1, 1, 1)
        far = [size for n in reversed(x.shape[2:]) for size in (0, -n % 8)]
        h = torch.tanh(self.fine(x) / (1 + level))
        low = torch.tanh(self.coarse(nn.functional.avg_pool3d(nn.functional.pad(h, far), 8)))
        up = low.repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        return h + up[..., : x.shape[2], : x.shape[3], : x.shape[4]]


class Lopsided(Denoiser):
    """Prefers a direction, and one hand."""

    def forward(self, x, sigma, **_):
        y = x + 0.5 * x.roll(1, -1) - 0.3 * x.roll((1, 2), (-2, -1)) + 0.2 * x.roll((1, 2, 3), (-3, -2, -1))
        return torch.tanh(y / (1 + sigma))


# ------------------------------------------------------------------------------------------------------------- Affine


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_another_unit_is_another_prior(dtype, generator):
    """The mean of N(0, C), shifted and scaled, is that of N(low, w^2 C): a Wiener filter about `low`."""
    spectrum, low, high = smooth_spectrum((5, 6, 7), dtype=dtype), -1.5, 2.0
    x, sigma = random((2, 1, 5, 6, 7), generator, dtype), torch.tensor([0.3, 1.1], dtype=dtype)
    expected = low + GaussianDenoiser(spectrum * (high - low) ** 2)(x - low, sigma)
    found = Affine(GaussianDenoiser(spectrum), low, high)(x, sigma)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 if dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(Affine(GaussianDenoiser(spectrum), 0, 1)(x, 0.4), GaussianDenoiser(spectrum)(x, 0.4))


def test_what_is_known_of_the_denoiser_is_carried_on(generator):
    inner = Halving(generator)
    assert Affine(inner, -1.0, 4.0).noise_levels == (0.5, 10.0)
    assert Tiled(Affine(inner, -1.0, 4.0), 8, 8).noise_levels == (0.5, 10.0)
    assert Equivariant(inner).voxel_size == 4.0 and Equivariant(inner).noise_levels == (0.1, 2.0)
    assert not hasattr(Tiled(Lopsided(), 8, 8), "voxel_size")
    assert Tiled(Lopsided(), 8, 8).noise_levels == (0.0, float("inf"))


# -------------------------------------------------------------------------------------------------------------- Tiled


@pytest.mark.parametrize("shape", [(19, 33, 50), (8, 41, 64), (5, 7, 90)])
def test_tiles_leave_no_trace(shape, generator):
    """Sizes that are no multiples of 8, two items with levels of their own; and a halo that is too small is seen."""
    inner, x = Halving(generator), random((2, 1, *shape), generator)
    sigma = torch.tensor([0.2, 1.5], dtype=torch.float64)
    whole = inner(x, sigma)
    for tile in (8, (8, 24, 16), (64, 64, 96)):
        torch.testing.assert_close(Tiled(inner, tile, 16)(x, sigma), whole, rtol=0, atol=1e-13)
    assert float((Tiled(inner, 8, 0)(x, sigma) - whole).abs().max()) > 1e-3
    torch.testing.assert_close(Tiled(inner, 8, 9)(x, 0.2)[0], whole[0], rtol=0, atol=1e-13)  # 9 become 16


def test_a_tile_is_all_that_the_denoiser_sees(generator):
    inner, x = Halving(generator), random((2, 1, 16, 70, 130), generator)
    Tiled(inner, 16, 8)(x, 0.2)
    assert inner.largest == 16 * 32 * 32
    parts = Tiled(inner, (16, 16, 128), 8)
    assert [p[0].stop - p[0].start for p in parts._parts(130, 128)] == [72, 58]  # not 128 and 2


# -------------------------------------------------------------------------------------------------------- Equivariant


def test_the_turns_are_the_rotations_of_a_cube(generator):
    """24 different ones, closed, each a matrix of determinant 1 with its inverse beside it."""
    x = random((2, 3, 4, 5), generator)
    cube = random((3, 3, 3), generator)
    turned = [rotated(cube, t) for t in rotations()]
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 24
    assert all(any(torch.equal(rotated(a, t), b) for b in turned) for a in turned for t in rotations())
    assert not any(torch.equal(cube.flip(0), t) for t in turned)
    for order, backwards in rotations():
        torch.testing.assert_close(rotated_back(rotated(x, (order, backwards)), (order, backwards)), x, rtol=0, atol=0)
        matrix = torch.eye(3)[list(order)]
        matrix[list(backwards)] *= -1
        assert float(torch.linalg.det(matrix)) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(4, 5, 6), (5, 5, 5)])
def test_all_orientations_are_equal(shape, generator):
    """The mean over the group commutes with each turn, to the order of its sum; the denoiser does not, nor a mirror."""
    x, inner = random((2, 1, *shape), generator), Lopsided()
    mean, plain = Equivariant(inner), []
    found = mean(x, 0.3)
    for turn in rotations():
        torch.testing.assert_close(mean(rotated(x, turn), 0.3), rotated(found, turn), rtol=0, atol=1e-15)
        plain.append(float((inner(rotated(x, turn), 0.3) - rotated(inner(x, 0.3), turn)).abs().max()))
    assert sorted(plain)[1] > 0.01
    assert float((mean(x.flip(-1), 0.3) - found.flip(-1)).abs().max()) > 0.01


def test_about_the_beam(generator):
    """The four turns about z are equal, and others are not; the axis of the beam stays what it is."""
    x, mean = random((1, 1, 4, 5, 6), generator), Equivariant(Lopsided(), "beam")
    assert [t[0][0] for t in mean.turns] == [0] * 4
    quarter = x.transpose(-1, -2).flip(-1)
    torch.testing.assert_close(mean(quarter, 0.3), mean(x, 0.3).transpose(-1, -2).flip(-1), rtol=0, atol=1e-15)
    over = x.flip(-3, -1)
    assert float((mean(over, 0.3) - mean(x, 0.3).flip(-3, -1)).abs().max()) > 0.01


def test_one_turn_at_random(generator):
    """Each draw is one of the 24, all occur, and a seed repeats them."""
    x = random((1, 1, 3, 4, 5), generator)
    each = [rotated_back(Lopsided()(rotated(x, t), 0.3), t) for t in rotations()]
    drawn = Equivariant(Lopsided(), generator=torch.Generator().manual_seed(3))
    first = [drawn(x, 0.3) for _ in range(200)]
    which = [[torch.equal(y, e) for e in each].index(True) for y in first]
    assert set(which) == set(range(24))
    again = Equivariant(Lopsided(), generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(y, again(x, 0.3)) for y in first[:20])


# --------------------------------------------------------------------------------------------------- deepinv's network


def test_a_network_of_deepinv_tile_by_tile(generator):
    """Of random weights, on volts: with a halo, what it makes of a volume in tiles is what it makes of it whole."""
    torch.manual_seed(0)
    inner = DRUNet(1, 1, nc=(2, 3, 4, 5), nb=1, pretrained=None, dim=3)  # type: ignore[arg-type]
    inside = Affine(inner.double().requires_grad_(False), -1.0, 5.0)
    x = 2 * random((1, 1, 16, 16, 100), generator)
    whole = inside(x, 0.5)
    off = [float((Tiled(inside, (16, 16, 32), halo)(x, 0.5) - whole).norm() / (whole - x).norm()) for halo in (0, 16)]
    assert off[0] > 1e-3 and off[1] < 1e-8  # measured: 5e-3 and 1e-10


def test_bad_input_is_refused(generator):
    inner = Halving(generator)
    for low, high in ((1.0, 1.0), (2.0, -1.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="low, high"):
            Affine(inner, low, high)
    for tile in (0, 12, (8, 8, 9), -8):
        with pytest.raises(ValueError, match="multiples of the step"):
            Tiled(inner, tile, 8)
    with pytest.raises(ValueError, match="step, halo"):
        Tiled(inner, 8, -1)
    with pytest.raises(ValueError, match="batch, channel, z, y, x"):
        Tiled(inner, 8, 8)(torch.zeros(3, 4, 5), 0.1)
    with pytest.raises(ValueError, match="group"):
        Equivariant(inner, "mirror")  # type: ignore[arg-type]
