"""Proximal steps: stationary, minimal against a fine search, right at every edge, differentiable."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.autograd import gradcheck, gradgradcheck

from cryosim.microscope.proximal import binary_prox, poisson_prox

F64 = torch.float64


def grid(*axes):
    return [t.flatten() for t in torch.meshgrid(*(torch.as_tensor(a, dtype=F64) for a in axes), indexing="ij")]


def test_poisson_prox_has_no_slope_left():
    z, k, step, scale, background = grid([-9, -1, 0, 2, 50], [0, 1, 7, 1e4], [1e-3, 1, 40], [0.3, 1, 6], [0, 0.5, 6])
    x = poisson_prox(z, k, step, scale, background)
    mean = scale * x + background
    slope = step * scale * (1 - k / mean) + x - z
    size = step * scale * (1 + k / mean) + x.abs() + z.abs()
    assert (slope[k > 0].abs() <= 1e-9 * size[k > 0]).all()
    none = k == 0
    wall = none & (mean.abs() <= 1e-12 * (background + 1))  # the mean stops at 0, where the slope pushes against it
    assert wall.any() and (slope := step * scale + x - z)[wall].min() >= -1e-9
    assert slope[none & ~wall].abs().max() <= 1e-12 * 300


def binary_slope(r, z, k, step, frames, scale, background):
    return step * scale / frames * ((frames - k) - k / torch.expm1(r)) + (frames * r - background) / scale - z


@pytest.mark.parametrize("frames", [1, 40, 1000])
def test_binary_prox_converges_everywhere(frames):
    shares = torch.tensor([0, 1 / frames, 0.5, 1 - 1 / frames, 1.0], dtype=F64)
    z, k, step, scale, background = grid(
        [-1e3, -3, 0, 0.1, 5, 1e3], (shares * frames).round().unique(), [1e-6, 1e-2, 1, 1e6], [1e-2, 1, 30], [0, 1, 30]
    )
    x = binary_prox(z, k, step, frames, scale, background)
    rate = (scale * x + background) / frames
    assert torch.isfinite(x).all()
    some = k > 0
    # the rate itself, not x, is what converges: compare with bisection of the same slope in log r
    low, high = torch.full_like(rate, -80), torch.full_like(rate, 80)
    for _ in range(200):
        middle = (low + high) / 2
        rising = binary_slope(middle.exp(), z, k, step, frames, scale, background) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    wanted = (frames * low.exp() - background) / scale
    spacing = 1e-12 * ((frames * low.exp() + background) / scale + z.abs())  # what x, z and the background resolve
    assert ((x - wanted).abs() <= spacing)[some].all()
    wall = torch.clamp((scale * z + background) / frames - step * scale**2 / frames, min=0)
    torch.testing.assert_close(rate[~some], wall[~some], rtol=1e-9, atol=1e-11 * (1 + wall.max().item()))


def test_binary_rates_converge_to_rounding():
    a, c = grid([-1e6, -30, -1, -1e-3, 0, 1e-9, 0.5, 4, 300], 10.0 ** torch.arange(-20, 31, 2))
    rate = binary_prox(a, torch.ones_like(a), c, 1, 1, 0)  # frames = counts = 1: c is the step, the rate is x
    low, high = torch.full_like(a, -90), torch.full_like(a, 90)
    for _ in range(200):
        middle = (low + high) / 2
        r = middle.exp()
        rising = r - a - c / torch.expm1(r) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    torch.testing.assert_close(rate, low.exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("frames", [None, 5])
def test_minimal_against_a_search(frames):
    for z in (-4.0, 0.3, 6.0):
        for k in (0.0, 2.0, 5.0):

            def objective(x, z=z, k=k):
                mean = 1.5 * x + 2.0
                if mean <= 0:
                    return math.inf
                if frames is None:
                    value = mean - (k * math.log(mean) if k else 0.0)
                else:
                    r = mean / frames
                    value = (frames - k) * r - (k * math.log(-math.expm1(-r)) if k else 0.0)
                return 0.7 * value + (x - z) ** 2 / 2

            found = minimize_scalar(objective, bounds=(-2 / 1.5, 20), method="bounded", options={"xatol": 1e-10}).x
            arguments = torch.tensor(z, dtype=F64), torch.tensor(k, dtype=F64), 0.7
            if frames is None:
                x = poisson_prox(*arguments, 1.5, 2.0)
            else:
                x = binary_prox(*arguments, frames, 1.5, 2.0)
            assert abs(x.item() - found) < 1e-5


def test_many_frames_turn_the_binary_prox_into_the_poisson_one():
    z, k = grid([-3.0, 0.0, 5.0], [0.0, 1.0, 9.0])
    wanted = poisson_prox(z, k, 0.8, 2.0, 3.0)
    errors = [(binary_prox(z, k, 0.8, n, 2.0, 3.0) - wanted).abs().max().item() for n in (10**3, 10**5)]
    assert 30 < errors[0] / errors[1] < 300 and errors[1] < 1e-3


def test_long_steps_reach_the_most_likely_mean():
    z, k = torch.zeros(3, dtype=F64), torch.tensor([1.0, 4.0, 9.0], dtype=F64)
    torch.testing.assert_close(poisson_prox(z, k, 1e9, 2.0, 0.5), (k - 0.5) / 2, rtol=1e-7, atol=0)
    most = -10 * torch.log1p(-k / 10)
    torch.testing.assert_close(binary_prox(z, k, 1e9, 10, 2.0, 0.5), (most - 0.5) / 2, rtol=1e-7, atol=0)


def test_short_steps_stay():
    z = torch.tensor([0.3, 2.0], dtype=F64)
    for x in (poisson_prox(z, torch.ones(2), 1e-12), binary_prox(z, torch.ones(2, dtype=F64), 1e-12, 4)):
        torch.testing.assert_close(x, z, rtol=1e-10, atol=0)


def test_dead_pixels_stay():
    z, k = torch.tensor([[-0.3, 2.0]], dtype=F64, requires_grad=True), torch.zeros(1, 2, dtype=F64)
    scale = torch.tensor([0.0, 1.0], dtype=F64)
    for x in (poisson_prox(z, k, 1.0, scale, 0.1), binary_prox(z, k, 1.0, 4, scale, 0.1)):
        assert x[0, 0] == z[0, 0] and x[0, 1] == 1.0
        torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], torch.ones_like(z), rtol=1e-14, atol=0)


@pytest.mark.parametrize("k", [0.0, 1.0, 6.0])
def test_slopes_against_finite_differences(k):
    # away from the kink of k = 0
    z = torch.tensor([-6.0, 0.2, 4.0], dtype=F64, requires_grad=True)
    counts = torch.full((3,), k, dtype=F64)
    step, scale, background = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.7, 1.5, 2.0))
    if k:
        counts.requires_grad_()
    for prox in (poisson_prox, lambda z, n, step, *rest: binary_prox(z, n, step, 6.5, *rest)):
        assert gradcheck(prox, (z, counts, step, scale, background))
        assert gradgradcheck(prox, (z, counts, step, scale, background))


def test_forward_slopes_and_vmap():
    z, k = torch.linspace(-2, 3, 12, dtype=F64).reshape(4, 3), (torch.arange(12, dtype=F64) % 5).reshape(4, 3)

    def prox(z, k):
        return binary_prox(z, k, 0.7, 5, 1.5, 2.0)

    together = prox(z, k)
    torch.testing.assert_close(torch.func.vmap(prox)(z, k), together, rtol=1e-13, atol=1e-13)
    _, forward = torch.func.jvp(lambda z: prox(z, k), (z,), (torch.ones_like(z),))
    z.requires_grad_()
    torch.testing.assert_close(forward, torch.autograd.grad(prox(z, k).sum(), z)[0])


def test_the_kink_has_a_finite_slope():
    z = torch.tensor([1.0], dtype=F64, requires_grad=True)
    for x in (poisson_prox(z, torch.zeros(1), 1.0), binary_prox(z, torch.zeros(1, dtype=F64), 1.0, 1.0)):
        assert x.item() == 0
        assert 0 <= torch.autograd.grad(x.sum(), z)[0].item() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_precision_follows_z(dtype):
    z, k = grid([-3, 0.0, 5.0, 40.0], [0.0, 1.0, 9.0])
    for prox in (poisson_prox, lambda z, k, *rest: binary_prox(z, k, rest[0], 9, *rest[1:])):
        found = prox(z.to(dtype), k.to(dtype), 0.8, 2.0, 3.0)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), prox(z, k, 0.8, 2.0, 3.0), rtol=1e-5, atol=2e-6)


def test_nonexpansive():
    z, k, step = grid(torch.linspace(-5, 20, 101), [0, 1, 5, 9], [0.1, 3.0])
    for prox in (poisson_prox, lambda *a: binary_prox(*a[:3], 9, *a[3:])):
        x = prox(z, k, step, 2.0, 0.5).reshape(101, -1)
        moved = x.diff(dim=0)
        assert (moved >= -1e-12).all() and (moved <= 0.25 + 1e-12).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0.0}, "step"),
        ({"step": -1.0}, "step"),
        ({"scale": -1.0}, "scale"),
        ({"counts": torch.tensor([-1.0])}, "counts"),
    ],
)
def test_what_has_no_prox(arguments, message):
    arguments = {"z": torch.zeros(1), "counts": torch.ones(1), "step": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        poisson_prox(**arguments)
    with pytest.raises(ValueError, match=message):
        binary_prox(**arguments, frames=4)
    with pytest.raises(ValueError, match="one for each frame"):
        binary_prox(torch.zeros(1), torch.full((1,), 5.0), 1.0, 4)
