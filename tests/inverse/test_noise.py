"""Noise models and fidelities for deepinv: per tilt and item, exact gradients, at work in deepinv's own optimisers."""

import copy
import math

import deepinv
import pytest
import torch
from deepinv.optim.optimizers import GD, PDCP, PGD
from torch.autograd import gradcheck

from cryosim.microscope.detector import Detector
from cryosim.microscope.likelihood import negative_log_likelihood
from inverse.physics.noise import (
    CountingFidelity,
    CountingNoise,
    TiltGaussianFidelity,
    TiltGaussianNoise,
    counting_model,
)
from inverse.physics.tilt import TiltProjection

F64 = torch.float64
ELECTRONS = torch.tensor([[2.0, 3.0, 5.0], [1.0, 4.0, 8.0]], dtype=F64)
GAIN = torch.linspace(0, 2, 20, dtype=F64).reshape(5, 4)
MODELS = {
    "poisson": (Detector((5, 4), 1.0), 1),
    "binary": (Detector((5, 4), 1.0, counting="binary"), torch.tensor([10, 20, 30])),
    "gain": (Detector((5, 4), 1.0, gain=GAIN, dark=torch.full((5, 4), 0.01, dtype=F64)), 30),
    "binary gain": (
        Detector((5, 4), 1.0, counting="binary", gain=GAIN, dark=torch.full((5, 4), 0.01, dtype=F64)),
        torch.tensor([[10, 20, 30], [30, 30, 40]]),
    ),
}
COINCIDENCE = Detector((5, 4), 1.0, counting="binary", coincidence_radius=1.5), 12


def operator(**physics):
    return TiltProjection([-40.0, 0.0, 25.0], (3, 5, 4), normalize=True, **physics)


def volume(generator, batch=2):
    return 0.1 * torch.randn(batch, 1, 3, 5, 4, generator=generator, dtype=F64)


def gaussian(std=((0.1, 0.2, 0.4), (0.3, 0.2, 0.1)), **options):
    noise = TiltGaussianNoise(torch.tensor(std, dtype=F64), **options)
    return noise, TiltGaussianFidelity(noise)


def model(name, **options):
    if name == "gaussian":
        return gaussian(**options)
    detector, frames = COINCIDENCE if name == "coincidence" else MODELS[name]
    return counting_model(ELECTRONS, detector, frames, **options)


ALL = [*MODELS, "coincidence", "gaussian"]


# drawing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_counts_have_the_mean_and_variance_of_each_tilt(name, generator):
    noise, _ = model(name, rng=generator)
    contrast = torch.linspace(-0.5, 0.5, 2 * 3 * 20, dtype=F64).reshape(2, 1, 3, 5, 4)
    many = contrast.expand(2, 4000, 3, 5, 4)  # channels are drawn apart
    counts = noise(many)
    assert counts.shape == many.shape and (counts >= 0).all() and (counts == counts.round()).all()
    detector, frames = MODELS[name]
    mean = ELECTRONS[:, None, :, None, None] * (1 + contrast)
    if detector.gain is not None:
        mean = mean * GAIN
    frames = torch.as_tensor(frames, dtype=F64).expand(2, 3)[:, None, :, None, None]
    if detector.dark is not None:
        mean = mean + 0.01 * frames
    variance = mean
    if detector.counting == "binary":
        p = -torch.expm1(-mean / frames)
        mean, variance = frames * p, frames * p * (1 - p)
    error = (variance / 4000).sqrt()[:, 0]
    assert ((counts.mean(1) - mean[:, 0]).abs() <= 5 * error).all()
    torch.testing.assert_close(counts.var(1), variance[:, 0], rtol=0.25, atol=0.005)


def test_noise_of_a_physics(generator):
    noise, _ = model("poisson", rng=generator)
    physics, x = operator(noise_model=noise), volume(generator)
    first = physics(x, seed=3)
    assert (physics(x, seed=3) == first).all() and (physics(x, seed=4) != first).any()
    stronger = physics(x, electrons=100 * ELECTRONS)
    assert abs((stronger.sum() / first.sum()) / 100 - 1) < 0.3  # sums of about 460 counts
    assert (noise.electrons == 100 * ELECTRONS).all()
    physics.update(electrons=ELECTRONS, angles=torch.tensor([[-30.0, 0.0, 30.0]], dtype=F64), unknown=1.0)
    assert (noise.electrons == ELECTRONS).all() and physics.angles[0, 0] == -30
    assert set(noise.state_dict()) >= {"electrons", "frames"}


def test_frames_can_be_updated_and_survive_a_copy(generator):
    noise, fidelity = model("binary")
    noise.update_parameters(frames=7)
    assert noise(torch.ones(2, 1, 3, 5, 4) * 50).max() == 7
    x, y = torch.zeros(2, 1, 3, 5, 4, dtype=F64), torch.full((2, 1, 3, 5, 4), 7.0, dtype=F64)
    assert torch.isfinite(fidelity.d(x, y)).all()  # the fidelity has them at once
    twin = copy.deepcopy(fidelity)
    noise.update_parameters(frames=6)
    assert torch.isfinite(twin.d(x, y)).all()
    with pytest.raises(ValueError, match="frames of a binary camera, 6"):
        fidelity.d(x, y)


def test_negative_intensities():
    x = torch.full((2, 1, 3, 5, 4), -1.2, dtype=F64)
    with pytest.raises(ValueError, match="at least -1, got -1.2"):
        model("poisson")[0](x)
    assert model("poisson", clip=True)[0](x).sum() == 0
    value = model("poisson")[1].d(x, torch.zeros_like(x))
    assert (value == math.inf).all()


def test_a_draw_has_no_silent_slope(generator):
    x = volume(generator).requires_grad_()
    y = operator(noise_model=model("binary")[0])(x)
    with pytest.raises(RuntimeError, match="estimator"):
        y.sum().backward()


def test_gaussian_noise_of_each_tilt(generator):
    noise, _ = gaussian(rng=generator)
    x = torch.zeros(2, 2000, 3, 5, 4, dtype=F64)
    torch.testing.assert_close(noise(x).std((1, 3, 4)), noise.std, rtol=5 / math.sqrt(2 * 40000), atol=0)
    assert (noise(x, seed=1) == noise(x, seed=1)).all()
    assert noise(x.float()).dtype == torch.float32
    std = torch.tensor([0.1, 0.2, 0.3], dtype=F64, requires_grad=True)
    assert noise(x, std=std).pow(2).sum().backward() is None and std.grad is not None and (std.grad > 0).all()


# likelihood -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["poisson", "binary", "coincidence"])
def test_value_is_that_of_the_detector(name, generator):
    noise, fidelity = model(name)
    physics, x = operator(), volume(generator)
    y = noise(physics.A(x))
    detector, frames = COINCIDENCE if name == "coincidence" else MODELS[name]
    value = fidelity(x, y, physics)
    assert value.shape == (2,)
    expected = ELECTRONS[:, :, None, None] * (1 + physics.A(x)[:, 0])
    wanted = negative_log_likelihood(y[:, 0], expected, detector, frames).sum(1)
    torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_items_do_not_mix(name, generator):
    noise, fidelity = model(name)
    physics, x = operator(), volume(generator)
    y = noise(physics.A(x))
    value, slope = fidelity(x, y, physics), fidelity.grad(x, y, physics)
    x[1] *= 2
    y[1] = y[1].flip(-1)
    assert fidelity(x, y, physics)[0] == value[0] and fidelity(x, y, physics)[1] != value[1]
    assert (fidelity.grad(x, y, physics)[0] == slope[0]).all()


@pytest.mark.parametrize("name", ALL)
def test_gradient_against_finite_differences(name, generator):
    noise, fidelity = model(name)
    physics, x = operator(), volume(generator)
    y = noise(physics.A(x))
    slope = fidelity.grad(x, y, physics)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=generator, dtype=F64)
        h = 1e-5
        difference = (fidelity(x + h * direction, y, physics) - fidelity(x - h * direction, y, physics)) / (2 * h)
        torch.testing.assert_close((slope * direction).flatten(1).sum(1), difference, rtol=1e-7, atol=1e-7)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(fidelity(x, y, physics).sum(), x)
    torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-12)


def test_deepinv_has_the_gradient_off_by_the_gain():
    """What ours is for: deepinv's Poisson gradient against the slope of its own value."""
    theirs = deepinv.optim.PoissonLikelihood(gain=0.25)
    x = torch.full((1, 1, 1, 1, 1), 2.0, dtype=F64, requires_grad=True)
    y = torch.full_like(x, 3.0).detach()
    (slope,) = torch.autograd.grad(theirs.d.fn(x, y).sum(), x)
    off = (theirs.d.grad(x, y) / slope).item()
    _, ours = counting_model(1.0, Detector((1, 1), 1.0, gain=torch.full((1, 1), 0.25, dtype=F64)))
    (slope,) = torch.autograd.grad(ours.d(x - 1, y).sum(), x)
    assert abs((ours.d.grad(x - 1, y) / slope).item() - 1) < 1e-12
    if abs(off - 1) < 1e-12:
        pytest.skip("deepinv has mended it")
    assert abs(off - 0.25**2) < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_second_slopes_and_slopes_in_the_noise(name, generator):
    noise, fidelity = model(name)
    physics, x = operator(), volume(generator)
    u = physics.A(x)
    y = noise(u)
    parameter = "std" if name == "gaussian" else "electrons"
    value = getattr(noise, parameter).clone().requires_grad_()

    def slope(u, value):
        noise.update_parameters(**{parameter: value})
        return fidelity.d.grad(u, y)

    assert gradcheck(slope, (u.clone().requires_grad_(), value))
    noise.update_parameters(**{parameter: value.detach()})
    with torch.no_grad():  # as deepinv's optimisers call it
        assert not fidelity.grad(x, y, physics).requires_grad


# proximal steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS, "gaussian"])
@pytest.mark.parametrize("gamma", [0.05, torch.tensor([0.02, 1.3], dtype=F64)], ids=["one", "each"])
def test_prox_in_the_data_domain(name, gamma, generator):
    noise, fidelity = model(name)
    u = 0.3 * torch.randn(2, 1, 3, 5, 4, generator=generator, dtype=F64)
    y = noise(u.clamp_min(-1)) if name != "gaussian" else noise(u)
    v = fidelity.prox_d(u, y, gamma=gamma)
    steps = torch.as_tensor(gamma, dtype=F64).reshape(-1, 1, 1, 1, 1)
    assert torch.isfinite(fidelity.d(v, y)).all()
    inside = torch.ones_like(v, dtype=torch.bool)
    if name != "gaussian":  # a pixel without counts may rest where its mean ends
        many = noise.frames_of(v)[..., None, None]
        mean = noise.expected(v) + (0 if noise.detector.dark is None else 0.01 * many)
        inside = (mean > 1e-9) | (noise.scale(v) == 0)
    residual = (v - u) + steps * fidelity.d.grad(v, y)
    assert inside.double().mean() > 0.7 and residual[inside].abs().max() < 1e-9
    assert (residual[~inside] > -1e-9).all() and (y[~inside] == 0).all()
    denoising = deepinv.physics.Denoising()
    torch.testing.assert_close(fidelity.prox(u, y, denoising, gamma=gamma), v, rtol=0, atol=0)


def test_prox_through_an_operator_is_refused(generator):
    noise, fidelity = model("poisson")
    physics, x = operator(), volume(generator)
    y = noise(physics.A(x))
    with pytest.raises(NotImplementedError, match="PDCP"):
        fidelity.prox(x, y, physics)
    with pytest.raises(NotImplementedError, match="coincidence radius"):
        model("coincidence")[1].prox_d(physics.A(x), torch.zeros_like(y))


def test_gaussian_prox_through_an_operator(generator):
    noise, fidelity = gaussian(((0.2, 0.2, 0.2), (0.5, 0.5, 0.5)))
    physics, x = TiltProjection([-40.0, 0.0, 25.0], (3, 5, 4), grid="stretched", normalize=True), volume(generator)
    y = noise(physics.A(x))
    found = fidelity.prox(x, y, physics, gamma=0.1)
    residual = found - x + 0.1 * fidelity.grad(found, y, physics)
    assert residual.abs().max() < 1e-9
    with pytest.raises(NotImplementedError, match="several"):
        gaussian()[1].prox(x, y, physics)


# deepinv's optimisers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gradient_descent_of_deepinv(name, generator):
    noise, fidelity = model(name)
    physics, truth = operator(noise_model=noise), volume(generator)
    y = physics(truth)
    start = torch.zeros_like(truth)
    values = [fidelity(start, y, physics)]
    for n in (5, 20):
        solver = GD(data_fidelity=fidelity, stepsize=0.002, max_iter=n)
        values.append(fidelity(solver(y, physics, init=start), y, physics))
    assert (values[1] < values[0]).all() and (values[2] < values[1]).all()


def test_proximal_gradient_and_primal_dual_find_the_same_minimum(generator):
    noise, fidelity = counting_model(torch.tensor([30.0, 40.0, 50.0]), Detector((5, 4), 1.0), rng=generator)
    physics, truth = operator(noise_model=noise), volume(generator)
    y = physics(truth)
    prior, start = deepinv.optim.Tikhonov(), torch.zeros_like(truth)
    common = {"data_fidelity": fidelity, "prior": prior, "lambda_reg": 10.0, "early_stop": False}
    pgd = PGD(stepsize=0.02, max_iter=150, **common)(y, physics, init=start)
    zero = {"est": (start, start, torch.zeros_like(y))}
    pdcp = PDCP(
        K=physics.A, K_adjoint=physics.A_adjoint, stepsize=0.1, stepsize_dual=9.0, max_iter=250,
        custom_init=lambda y, physics: zero, **common,
    )(y, physics)  # fmt: skip
    slope = fidelity.grad(pgd, y, physics) + 10.0 * pgd
    assert slope.abs().max() < 1e-6
    torch.testing.assert_close(pdcp, pgd, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["poisson", "binary", "coincidence"])
def test_backtracking_turns_back_at_the_wall(name, generator):
    noise, fidelity = model(name, rng=generator)
    physics, truth = operator(noise_model=noise), volume(generator)
    y, start = physics(truth), torch.zeros_like(truth)
    common = {"data_fidelity": fidelity, "prior": deepinv.optim.Tikhonov(), "stepsize": 3.0, "max_iter": 30}
    assert not torch.isfinite(fidelity(PGD(**common)(y, physics, init=start), y, physics)).all()
    found = PGD(backtracking=True, **common)(y, physics, init=start)
    assert (fidelity(found, y, physics) < fidelity(start, y, physics) - 1).all()


@pytest.mark.parametrize("name", ["poisson", "binary"])
def test_single_precision(name, generator):
    noise, fidelity = model(name)
    physics, x = operator(), volume(generator)
    y = noise(physics.A(x))
    wanted, slope = fidelity(x, y, physics), fidelity.grad(x, y, physics)
    found = fidelity(x.float(), y.float(), physics)
    assert found.dtype == torch.float32 and fidelity.grad(x.float(), y.float(), physics).dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(fidelity.grad(x.float(), y.float(), physics).double(), slope, rtol=1e-4, atol=1e-4)
    assert noise(physics.A(x.float())).dtype == torch.float32


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CountingNoise(-1.0, MODELS["poisson"][0]), "electrons"),
        (lambda: CountingNoise(torch.ones(1, 2, 3), MODELS["poisson"][0]), "electrons"),
        (lambda: CountingNoise(1.0, MODELS["poisson"][0], 0), "frames"),
        (lambda: CountingNoise(1.0, MODELS["poisson"][0], torch.tensor([1.5])), "frames: expected positive whole"),
        (lambda: TiltGaussianNoise(0.0), "std"),
        (lambda: CountingNoise(torch.ones(4), MODELS["poisson"][0])(torch.zeros(1, 1, 3, 5, 4)), r"\(1, 4\)"),
        (lambda: CountingNoise(torch.ones(3, 3), MODELS["poisson"][0])(torch.zeros(2, 1, 3, 5, 4)), r"\(3, 3\)"),
        (lambda: CountingNoise(1.0, MODELS["poisson"][0])(torch.zeros(3, 5, 4)), "batch, channel, tilt"),
        (lambda: counting_model(1.0, Detector((5, 4), 1.0, nps=torch.tensor([1.0, 0.5]))), "white noise"),
        (lambda: model("poisson")[1].d(torch.zeros(2, 1, 3, 5, 4), torch.zeros(1, 1, 3, 5, 4)), "shape"),
        (lambda: model("poisson")[1].d(torch.zeros(2, 1, 3, 5, 4), -torch.ones(2, 1, 3, 5, 4)), "at least 0"),
        (lambda: model("poisson")[1].d.grad(torch.zeros(2, 1, 3, 5, 4), -torch.ones(2, 1, 3, 5, 4)), "at least 0"),
        (lambda: model("poisson")[1].prox_d(*torch.zeros(2, 2, 1, 3, 5, 4), gamma=-1.0), "gamma"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_fidelity_holds_the_noise():
    noise, fidelity = model("poisson")
    assert fidelity.noise is noise and CountingFidelity(noise).noise is noise


def test_composition_is_refused_rather_than_lost():
    noise = CountingNoise(3.0, Detector((4, 4), 1.0))
    with pytest.raises(NotImplementedError, match="composed"):
        noise * deepinv.physics.GaussianNoise(0.1)
