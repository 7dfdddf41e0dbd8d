"""`MultisliceProjection` against the turned analytic specimen, its linearisation, and finite differences."""

import math

import pytest
import torch

import cryosim as cs
from cryosim.core.fourier import band_limit
from inverse.physics.contrast import EwaldProjection
from inverse.physics.multislice import MultisliceProjection
from inverse.physics.turn import turned
from inverse.solvers.nonlinear import gauss_newton, pushed

VOXEL, WIDTH = 2.0, 3.5
OPTICS = cs.Optics(80.0, 900.0, amplitude_contrast=0.05)


def blobs(shape, generator, height=1.0, n=5):
    half = torch.tensor([s * VOXEL / 2 for s in shape[::-1]], dtype=torch.float64) - 5.5 * WIDTH
    centres = (2 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 1) * half.clamp_min(0)
    heights = height * (0.5 + torch.rand(n, generator=generator, dtype=torch.float64))
    return sampled(centres, heights, shape), centres, heights


def sampled(centres, heights, shape):
    axes = [(torch.arange(m, dtype=torch.float64) - m // 2) * VOXEL for m in shape[::-1]]
    x, y, z = (torch.exp(-((a - c[:, None]) ** 2) / (2 * WIDTH**2)) for a, c in zip(axes, centres.T, strict=True))
    return torch.einsum("n,nz,ny,nx->zyx", heights, z, y, x)


def after(centres, angle):
    t = math.radians(angle)
    x, y, z = centres.T
    return torch.stack([x * math.cos(t) + z * math.sin(t), y, -x * math.sin(t) + z * math.cos(t)], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("angle", [-70.0, -33.0, 0.0, 58.0])
@pytest.mark.parametrize("shape", [(30, 24, 41), (31, 25, 40)])
def test_a_turned_volume_is_the_volume_of_the_turned_blobs(shape, angle, dtype, generator):
    volume, centres, heights = blobs(shape, generator)
    seen = turned(volume.to(dtype), torch.tensor(angle, dtype=torch.float64), 50, 51)
    expected = sampled(after(centres, angle), heights, (50, shape[1], 51))
    assert (seen.double() - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("angle", [0.0, -40.0])
def test_images_are_multislice_through_the_turned_specimen(layers, angle, generator):
    """Strong blobs, sampled anew in the frame of the beam in the same slices."""
    shape = (24, 28, 30)
    volume, centres, heights = blobs(shape, generator, height=30.0)
    physics = MultisliceProjection([angle], shape, VOXEL, OPTICS, (40, 44), slice_thickness=layers * VOXEL)
    slices, centre = physics.slices(volume, 0)
    n, (rows, columns) = len(slices), slices.values.shape[1:]
    fine = sampled(after(centres, angle), heights, (n * layers, rows, columns))
    own = cs.Slices(fine.unflatten(0, (n, layers)).sum(1) * VOXEL, VOXEL, layers * VOXEL)
    expected = cs.image(cs.multislice(own, OPTICS, plane=centre), OPTICS, VOXEL)
    expected = expected[rows // 2 - 20 : rows // 2 + 20, columns // 2 - 22 : columns // 2 + 22]
    seen = physics.A(volume[None, None])[0, 0, 0]
    assert (expected - 1).abs().max() > 0.3
    assert (seen - expected).norm() <= 1e-4 * (expected - 1).norm()


def test_slices_of_any_thickness_have_their_centre_at_the_same_height(generator):
    """A thin specimen is seen alike, whatever the slices: the defocus is that of the volume's centre."""
    volume = torch.zeros(9, 30, 30, dtype=torch.float64)
    volume[4] = 1e-3 * sampled(torch.zeros(1, 3, dtype=torch.float64), torch.ones(1), (1, 30, 30))[0]
    images = [
        MultisliceProjection([0.0], (9, 30, 30), VOXEL, OPTICS, slice_thickness=m * VOXEL).A(volume[None, None]) - 1
        for m in (1, 2, 4)
    ]
    for other in images[1:]:
        assert (other - images[0]).norm() < 0.02 * images[0].norm()  # 4 Å off in 900 would be a few times as much
    moved = MultisliceProjection([0.0], (9, 30, 30), VOXEL, OPTICS.replace(defocus=908.0)).A(volume[None, None]) - 1
    assert (moved - images[0]).norm() > 0.0


def test_weak_specimens_are_linear(generator):
    shape, weak = (24, 28, 30), 1e-4
    volume, *_ = blobs(shape, generator)
    angles = [-45.0, 0.0, 30.0]
    physics = MultisliceProjection(angles, shape, VOXEL, OPTICS, (60, 60))
    seen = (physics.A(weak * volume[None, None]) - 1) / weak
    linear = EwaldProjection(angles, shape, VOXEL, OPTICS, (60, 60)).A(volume[None, None])
    kept = band_limit((60, 60), dtype=torch.float64)
    off = torch.fft.fft2(seen - linear) * kept
    assert off.norm() <= 3e-3 * (torch.fft.fft2(linear) * kept).norm()


def test_vjp_is_the_gradient_and_jvp_its_adjoint(generator):
    shape = (8, 12, 13)
    physics = MultisliceProjection([-30.0, 20.0], shape, VOXEL, OPTICS)
    x, d = (5 * torch.randn(2, 1, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 1, 2, *shape[1:], generator=generator, dtype=torch.float64)
    gradient = physics.A_vjp(x, v)
    difference = (physics.A(x + 1e-5 * d) - physics.A(x - 1e-5 * d)) / 2e-5
    assert float((gradient * d).sum()) == pytest.approx(float((difference * v).sum()), rel=1e-6)
    torch.testing.assert_close(pushed(physics, x, d), difference, rtol=0, atol=1e-6 * float(difference.abs().max()))


@pytest.mark.parametrize("name", ["angles", "defocus", "astigmatism", "astigmatism_angle", "phase_shift"])
def test_gradients_in_the_parameters(name, generator):
    shape = (6, 10, 11)
    lens = OPTICS.replace(astigmatism=100.0, astigmatism_angle=20.0)
    physics = MultisliceProjection([-30.0, 0.5, 25.0], shape, VOXEL, lens)
    x = 5 * torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64)
    v = torch.randn(1, 1, 3, *shape[1:], generator=generator, dtype=torch.float64)
    start = getattr(physics, name).clone()
    along = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    value = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad((physics.A(x, **{name: value}) * v).sum(), value)
    with torch.no_grad():
        ends = [(physics.A(x, **{name: start + s * along}) * v).sum() for s in (1e-4, -1e-4)]
    assert float((slope * along).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-4, rel=1e-5, abs=1e-8)


def test_gauss_newton_finds_a_strong_specimen_that_the_linear_start_does_not(generator):
    """As near to the truth as linear images of the same specimen bring it; the linear start is far off."""
    shape = (12, 20, 24)
    volume, *_ = blobs(shape, generator, height=150.0, n=2)
    angles = torch.linspace(-60, 60, 9, dtype=torch.float64)
    lens = cs.Optics(80.0, torch.linspace(600, 1400, 9), spherical_aberration=0.0)
    physics = MultisliceProjection(angles, shape, VOXEL, lens, slice_thickness=4.0)
    truth = volume[None, None]
    images = physics.A(truth)
    weight = 1e-3 * physics.linear.squared_norm()
    start = physics.linear.prox_l2(None, images - 1, 1 / weight)
    found = gauss_newton(physics, images, start, weight, steps=2, iterations=10)
    assert len(found.objective) == 3 and bool((found.objective.diff() < 0).all())

    def error(volume):
        return float((volume - truth).norm() / truth.norm())

    best = error(physics.linear.prox_l2(None, physics.linear.A(truth), 1 / weight))
    assert error(found.volume) < 1.06 * best and error(start) > 1.3 * best


def test_bad_input():
    with pytest.raises(ValueError, match="slice_thickness"):
        MultisliceProjection([0.0], (4, 5, 6), VOXEL, OPTICS, slice_thickness=0.5)
    with pytest.raises(ValueError, match="below 80"):
        MultisliceProjection([85.0], (4, 5, 6), VOXEL, OPTICS)
    with pytest.raises(ValueError, match="expected a volume"):
        MultisliceProjection([0.0], (4, 5, 6), VOXEL, OPTICS).A(torch.zeros(4, 5, 6))
