"""Unrolled iterations: plug-and-play before they are taught, better after, and differentiable to the operator."""

import pytest
import torch
from deepinv.optim import L2, PnP
from deepinv.optim.optimizers import HQS

from cryosim.microscope.optics import Optics
from inverse.physics.contrast import ContrastProjection
from inverse.physics.tilt import TiltProjection
from inverse.priors.denoiser import NoiseConditionalUNet
from inverse.solvers.plug_and_play import plug_and_play
from inverse.solvers.unrolled import Unrolled
from inverse.train_local import LocalPlan, example
from inverse.train_unrolled import train_unrolled, unrolled_loss
from tests.inverse.gaussian_denoiser import GaussianDenoiser, smooth_spectrum
from tests.inverse.test_local import blobs

SHAPE = (7, 12, 15)
ANGLES = torch.linspace(-60, 60, 13, dtype=torch.float64)


def images_of(physics, volume, noise, generator):
    clean = physics.A(volume)
    return clean + noise**0.5 * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)


@pytest.fixture
def denoiser():
    return GaussianDenoiser(smooth_spectrum(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("noise", [0.5, "by tilt"])
def test_before_it_is_taught_it_is_plug_and_play(denoiser, noise, dtype, generator):
    physics = TiltProjection(ANGLES.to(dtype), SHAPE, tolerance=1e-6)
    variance = torch.linspace(0.3, 0.9, len(ANGLES)).to(dtype) if noise == "by tilt" else noise
    images = images_of(physics, denoiser.sample(2, generator).to(dtype), 0.5, generator)
    denoiser = denoiser.to(dtype)
    with torch.no_grad():
        found = Unrolled(denoiser, 6, strength=0.5).to(dtype)(physics, images, variance)
    expected = plug_and_play(physics, images, denoiser, variance, iterations=6, strength=0.5).volume
    assert found.shape == expected.shape == (2, 1, *SHAPE) and found.dtype == dtype
    assert (found - expected).abs().max() <= (1e-9 if dtype == torch.float64 else 2e-4) * expected.abs().max()
    with torch.no_grad():
        one = Unrolled(denoiser, 6, strength=0.5).to(dtype)(physics, images[0, 0], variance)
    assert one.shape == SHAPE


def test_deepinvs_own_unfolding_gives_the_same(denoiser, generator):
    """Of deepinv 0.5, with the levels and steps that ours took."""
    physics = TiltProjection(ANGLES, SHAPE, tolerance=1e-9)
    images = images_of(physics, denoiser.sample(1, generator), 0.5, generator)
    ours = Unrolled(denoiser.double(), 4, strength=1.0).double()
    with torch.no_grad():
        ours.level += 0.3 * torch.randn(4, generator=generator, dtype=torch.float64)
    levels = plug_and_play(physics, images, denoiser, 0.5, iterations=4).levels * ours.level.detach().exp()
    model = HQS(
        data_fidelity=L2(),
        prior=PnP(denoiser),
        stepsize=[float(level) ** 2 / 0.5 for level in levels],
        sigma_denoiser=[float(level) for level in levels],
        max_iter=4,
        unfold=True,
        trainable_params=["stepsize", "sigma_denoiser"],
        custom_init=lambda y, physics: {"est": (start, start)},
    )
    start = physics.prox_l2(None, images, ours.schedule(physics, images, 0.5).variance / 0.5)
    with torch.no_grad():
        expected = model.double()(images, physics)
        found = ours(physics, images, 0.5)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("method", ["hqs", "pgd"])
def test_gradients_are_those_of_differences(method, denoiser, generator):
    """To the learned numbers, and through them to angles and shifts, of a loss of the volume."""
    truth = denoiser.sample(1, generator)
    images = images_of(TiltProjection(ANGLES, SHAPE), truth, 0.5, generator)
    network = Unrolled(denoiser, 3, method=method, frugal=method == "hqs").double()
    weights = torch.randn(1, 1, *SHAPE, generator=generator, dtype=torch.float64)
    physics = TiltProjection(ANGLES, SHAPE, shifts=torch.zeros(len(ANGLES), 2), tolerance=1e-10, max_iterations=400)

    schedule = network.schedule(physics, images, 0.5)

    def value(angles, shifts):
        physics.update(angles=angles, shifts=shifts)
        return (weights * network(physics, images, 0.5, schedule)).sum()

    angles = ANGLES[None].clone().requires_grad_(True)
    shifts = (0.3 * torch.randn(1, len(ANGLES), 2, generator=generator, dtype=torch.float64)).requires_grad_(True)
    expect_slopes(lambda: value(angles, shifts), [angles, shifts, network.level, network.step], generator)


def test_gradients_to_the_defocus(denoiser, generator):
    physics = ContrastProjection(
        ANGLES, SHAPE, 10.0, Optics(300.0, torch.full((len(ANGLES),), 2e4, dtype=torch.float64)), tolerance=1e-10
    )
    truth = denoiser.sample(1, generator)
    clean = physics.A(truth)
    noise = 0.1 * float(clean.square().mean())
    images = clean + noise**0.5 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    network = Unrolled(denoiser, 2).double()
    weights = torch.randn(1, 1, *SHAPE, generator=generator, dtype=torch.float64)
    schedule = network.schedule(physics, images, noise)
    defocus = (2e4 + 500 * torch.randn(1, len(ANGLES), generator=generator, dtype=torch.float64)).requires_grad_(True)

    def value():
        physics.update(defocus=defocus)
        return (weights * network(physics, images, noise, schedule)).sum()

    expect_slopes(value, [defocus], generator, step=1.0)


def expect_slopes(value, parameters, generator, step=1e-4):
    """The gradient along a random direction of each parameter against central differences."""
    slopes = torch.autograd.grad(value(), parameters)
    with torch.no_grad():
        for parameter, slope in zip(parameters, slopes, strict=True):
            towards, ends = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), []
            for sign in (1, -1):
                parameter += sign * step * towards
                ends.append(float(value()))
                parameter -= sign * step * towards
            assert float((slope * towards).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-4)


@pytest.mark.slow
def test_shifts_are_found_through_the_volume(denoiser, generator):
    """Three tilts are displaced by up to 1.5 voxels: the volume of each half of the tilts has to predict the other."""
    truth = denoiser.sample(1, generator)
    true = torch.zeros(len(ANGLES), 2, dtype=torch.float64)
    true[[2, 6, 9]] = torch.tensor([[1.5, -1.0], [-1.2, 0.8], [0.9, 1.3]], dtype=torch.float64)
    images = images_of(TiltProjection(ANGLES, SHAPE, shifts=true), truth, 0.05, generator)
    network, shifts = Unrolled(denoiser, 2).double().requires_grad_(False), torch.zeros_like(true).requires_grad_(True)
    halves = [torch.arange(k, len(ANGLES), 2) for k in (0, 1)]
    operators = [TiltProjection(ANGLES[half], SHAPE, shifts=torch.zeros(len(half), 2)) for half in halves]
    schedules = [
        network.schedule(physics, images[:, :, half], 0.05) for physics, half in zip(operators, halves, strict=True)
    ]
    optimiser = torch.optim.Adam([shifts], lr=0.1)
    for _ in range(60):
        loss = torch.zeros((), dtype=torch.float64)
        for k in (0, 1):
            for physics, half in zip(operators, halves, strict=True):
                physics.update(shifts=shifts[half][None])
            found = network(operators[k], images[:, :, halves[k]], 0.05, schedules[k])
            loss = loss + (operators[1 - k].A(found) - images[:, :, halves[1 - k]]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def error(some: torch.Tensor) -> float:
        """Without what a displacement of the specimen would do: x and z along the tilts, y alike in all."""
        t = torch.deg2rad(ANGLES)
        waves = torch.stack([t.cos(), t.sin()], 1)
        off = some - true
        across = off[:, 0] - waves @ torch.linalg.lstsq(waves, off[:, :1]).solution[:, 0]
        return float(torch.stack([across, off[:, 1] - off[:, 1].mean()]).square().mean().sqrt())

    assert error(shifts.detach()) < 0.3 * error(torch.zeros_like(true))


def test_teaching_lowers_the_error_of_what_was_not_shown(generator):
    volumes = [blobs(generator, (12, 12, 24), 4) for _ in range(4)]
    plan = LocalPlan(steps=40, crop=12, rate=1e-2, step=(8.0, 12.0), snr=(0.5, 2.0))
    torch.manual_seed(1)
    network = Unrolled(NoiseConditionalUNet((8,), 1, 1.0, (10.0, 10.0), (0.01, 30.0)), 2)
    shown = [example(volumes, plan, 1000 + i) for i in range(4)]
    before = sum(float(unrolled_loss(network, one).detach()) for one in shown)
    taught = train_unrolled(network, volumes, plan)
    with torch.no_grad():
        assert sum(float(unrolled_loss(taught, one)) for one in shown) < 0.6 * before


def test_what_does_not_fit_is_refused(denoiser, generator):
    with pytest.raises(ValueError, match='"hqs" or "pgd"'):
        Unrolled(denoiser, method="admm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="iterations"):
        Unrolled(denoiser, 0)
    with pytest.raises(ValueError, match="noise: expected positive"):
        Unrolled(denoiser)(TiltProjection(ANGLES, SHAPE), torch.zeros(len(ANGLES), *SHAPE[1:]).double(), -1.0)
    with pytest.raises(ValueError, match="volumes"):
        train_unrolled(Unrolled(denoiser), [], LocalPlan())
