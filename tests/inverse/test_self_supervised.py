"""Losses without truth against those with it, in dense linear algebra and on average; rotations; a series by itself."""

import math

import pytest
import torch
from deepinv.loss import EILoss, SplittingLoss
from deepinv.models.base import Denoiser

import cryosim as cs
from cryosim.core.rotation import random_rotations
from inverse.physics.tilt import TiltProjection
from inverse.physics.wedge import measured
from inverse.preparation import prepare
from inverse.priors.wrappers import rotated, rotated_back, rotations
from inverse.rotate import Rotate3D, TiltMaskGenerator, turned_by
from inverse.self_supervised import SelfSupervisedPlan, self_supervised, thinned
from inverse.self_supervised_losses import (
    Draw,
    equivariance_by,
    kept_tilts,
    missing_wedge,
    noise2noise,
    of_tilts,
    tilt_splitting,
)
from inverse.self_supervised_problem import Problem, coupled
from tests.inverse.gaussian_denoiser import GaussianDenoiser, smooth_spectrum

ANGLES = torch.linspace(-60, 60, 7, dtype=torch.float64)
SHAPE = (6, 5, 8)
NOISE = torch.linspace(4.0, 12.0, 7, dtype=torch.float64)


class Plain(Denoiser):
    """Gives back what it is given."""

    def __init__(self):
        super().__init__()

    def forward(self, x, sigma, **_):
        return x


class Shells(Denoiser):
    """A factor for each shell of frequency."""

    def __init__(self, shape, n, dtype=torch.float64):
        super().__init__()
        axes = [torch.fft.fftfreq(m, dtype=dtype) for m in shape]
        k = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
        self.shell = (k / 0.5 * n).long().clamp_max(n - 1)
        self.factors = torch.nn.Parameter(torch.zeros(n, dtype=dtype))

    def forward(self, x, sigma, **_):
        return torch.fft.ifftn(torch.fft.fftn(x, dim=(-3, -2, -1)) * self.factors[self.shell], dim=(-3, -2, -1)).real


def make_problem(generator, n=1, strength=0.5, grid="stretched"):
    physics = TiltProjection(ANGLES, SHAPE, grid=grid)
    prior = GaussianDenoiser(smooth_spectrum(SHAPE, length=6.0))
    truth = prior.sample(n, generator)
    clean = physics.A(truth)
    images = clean + NOISE.sqrt()[:, None, None] * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return Problem(physics, images, NOISE, strength=strength), prior, truth


def filtered(network, factors, x):
    return torch.func.functional_call(network, {"factors": factors}, (x, 0.0))


def matrix_of(act, shape):
    n = math.prod(shape)
    return act(torch.eye(n, dtype=torch.float64).reshape(n, 1, *shape)).reshape(n, -1).T


def is_zero_on_average(values, errors=4.0):
    """Whether the mean of draws (draw, ...) is 0 within so many of its standard errors, each component."""
    off = values.mean(0) / (values.std(0) / len(values) ** 0.5)
    return bool((off.abs() < errors).all())


# independence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.4, 1.0, 2.5])
def test_the_parts_of_gaussian_noise_are_uncorrelated_and_of_the_variances_they_should_have(generator, a):
    noise = NOISE.sqrt()[:, None, None] * torch.randn(7, 150, 150, generator=generator, dtype=torch.float64)
    first, second = coupled(noise, NOISE.sqrt()[:, None, None], a, generator)
    assert torch.allclose(first.var((1, 2)) / NOISE, torch.tensor(1 + a**2).double(), rtol=0.05)
    assert torch.allclose(second.var((1, 2)) / NOISE, torch.tensor(1 + a**-2).double(), rtol=0.05)
    correlation = (first * second).mean((1, 2)) / (first.square().mean((1, 2)) * second.square().mean((1, 2))).sqrt()
    assert correlation.abs().max() < 4 / 150


def test_the_parts_of_counts_are_uncorrelated_and_of_the_variances_they_should_have(generator):
    a, mean = 0.5, 3.0
    images = torch.poisson(torch.full((5, 120, 120), mean, dtype=torch.float64), generator=generator)
    series = cs.TiltSeries(images=images, pixel_size=5.0, tilts=cs.TiltScheme(angles=ANGLES[1:6], doses=torch.ones(5)))
    with pytest.warns(UserWarning, match="optics"):
        first, second = thinned(series, a)(generator)
        _, noise = prepare(series)
    middle = (slice(None), slice(10, -10), slice(10, -10))
    first, second = first[middle], second[middle]
    assert torch.allclose(first.var((1, 2)) / noise, torch.tensor(1 + a**2).double(), rtol=0.06)
    assert torch.allclose(second.var((1, 2)) / noise, torch.tensor(1 + a**-2).double(), rtol=0.06)
    assert float((first * second).mean() / (first.std() * second.std())) == pytest.approx(0, abs=4 / 5**0.5 / 100)


# the losses ----------------------------------------------------------------------------------------------------------


def gradients(generator, target, n_draws):
    """Of the shells' factors, with `target` in place of the second part, less those with the clean images."""
    network, found = Shells(SHAPE, 4), []
    network.factors.data.copy_(torch.tensor([0.9, 0.7, 0.4, 0.1]))
    for _ in range(n_draws):
        problem, _, truth = make_problem(generator)
        draw = Draw(network, problem, generator)
        clean = problem.physics.A(truth)
        loss = problem.misfit(draw.restored, target(problem, draw)) - problem.misfit(draw.restored, clean)
        found.append(torch.autograd.grad(loss * problem.variance, network.factors)[0])
    return torch.stack(found)


def test_gradients_of_noise2noise_are_on_average_those_of_the_loss_with_the_truth(generator):
    """And of the images themselves they are not: the network would learn their noise."""
    assert is_zero_on_average(gradients(generator, lambda problem, draw: draw.parts[1], 150))
    assert not is_zero_on_average(gradients(generator, lambda problem, draw: problem.images, 150), 8.0)


def test_the_shell_filter_of_noise2noise_is_the_wiener_filter(generator):
    """Least squares over 1500 unknown volumes, against the optimum from the covariances of volume and noise."""
    problem, prior, _ = make_problem(generator, 1500)
    network = Shells(SHAPE, 4)
    y1, y2 = problem.split(generator)

    first = problem.first(y1)

    def loss(factors):
        return problem.misfit(filtered(network, factors, first), y2)

    zero, unit = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    base, each = loss(zero), [loss(one) for one in unit]  # a quadratic form, from its values
    twice = torch.stack([torch.stack([loss(one + other) for other in unit]) for one in unit])
    curvature = twice + base - torch.stack(each)[:, None] - torch.stack(each)
    found = torch.linalg.solve(curvature, curvature.diag() / 2 - torch.stack(each) + base)

    a, least = matrix_of(problem.physics.A, SHAPE), matrix_of(problem.first, (7, 5, 8))
    rows = torch.fft.fft(torch.eye(8, dtype=torch.float64), norm="ortho")
    two_sided = problem.weight[torch.tensor([0, 1, 2, 3, 4, 3, 2, 1])]
    h = torch.kron(torch.eye(35, dtype=torch.float64), (rows.mH @ (two_sided[:, None] * rows)).real)
    noise = NOISE.repeat_interleave(40)
    h = h / noise.sqrt()[:, None] / noise.sqrt()
    c = prior.covariance()
    c1 = a @ c @ a.T + torch.diag((1 + 0.5**2) * noise)
    filters = [a @ matrix_of(lambda x, one=one: filtered(network, one, x), SHAPE) @ least for one in unit]
    normal = torch.stack([torch.stack([(h @ f @ c1 * g).sum() for f in filters]) for g in filters])
    right = torch.stack([(h @ a @ c @ a.T * g).sum() for g in filters])
    expected = torch.linalg.solve(normal, right)
    assert expected[0] > 1.2 * expected[-1]  # there is something to find
    assert torch.allclose(found, expected, rtol=0.03, atol=0.01)


def test_the_misfit_does_not_see_what_no_tilt_sees(generator):
    problem, _, truth = make_problem(generator)
    _, rest = measured(
        torch.randn(truth.shape, generator=generator, dtype=torch.float64), ANGLES, problem.physics.geometry
    )
    here, there = (problem.misfit(v, problem.images) for v in (truth, truth + 10 * rest))
    assert float(rest.square().mean()) > 0.05
    assert float(there / here - 1) == pytest.approx(0, abs=1e-4)


def test_left_out_tilts_do_not_enter_what_is_compared_with_them(generator):
    problem, _, _ = make_problem(generator)
    kept = kept_tilts(7, torch.Generator().manual_seed(1))
    assert 0 < int(kept.sum()) < 7
    other = torch.where(kept[:, None, None], problem.images, 1e3)
    assert torch.equal(of_tilts(other, kept), of_tilts(problem.images, kept))
    volume = problem.first(problem.images)
    elsewhere = torch.where(kept[:, None, None], 1e3, problem.images)
    assert torch.equal(problem.misfit(volume, elsewhere, ~kept), problem.misfit(volume, problem.images, ~kept))
    assert float(tilt_splitting(Draw(Plain(), problem, generator))) > 0


def test_equivariance_costs_on_average_what_it_does_in_dense_algebra(generator):
    """|(L A - 1) T L y1|^2, and the noise of y1 and of the new images through L."""
    problem, _, _ = make_problem(generator)
    turn = next(t for t in rotations() if t[0] == (0, 1, 2) and len(t[1]) == 2)
    loss = equivariance_by(lambda v: rotated(v, turn))
    a, least = matrix_of(problem.physics.A, SHAPE), matrix_of(problem.first, (7, 5, 8))
    t = matrix_of(lambda v: rotated(v, turn), SHAPE)
    noise = torch.diag(NOISE.repeat_interleave(40))
    spread = least @ noise @ least.T
    off = (least @ a - torch.eye(len(a.T), dtype=torch.float64)) @ t
    volume = least @ problem.images.flatten()
    expected = (off @ volume).square().sum() + 0.25 * (off @ spread @ off.T).trace() + 1.25 * spread.trace()
    expected = float(expected / len(volume) / problem.variance)
    drawn = torch.stack([loss(Draw(Plain(), problem, generator)) for _ in range(400)])
    assert is_zero_on_average(drawn[:, None] - expected)


def test_a_missing_wedge_teaches_in_the_direction_that_the_turned_series_measured(generator):
    """Its gradient, turned back, lies in what the tilts see; before, much of it lies in the network's own wedge."""
    physics = TiltProjection(torch.linspace(-60, 60, 21, dtype=torch.float64), (16, 18, 20))
    images = torch.randn(1, 1, 21, 18, 20, generator=generator, dtype=torch.float64)
    problem = Problem(physics, images, 0.5)

    class Answer(Denoiser):
        def __init__(self):
            super().__init__()
            self.volume = torch.nn.Parameter(torch.zeros(1, 1, 16, 16, 16, dtype=torch.float64))

        def forward(self, x, sigma, **_):
            return self.volume if x.shape == self.volume.shape else x

    network = Answer()
    least, most = [], []
    for _ in range(6):
        gradient = torch.autograd.grad(missing_wedge(Draw(network, problem, generator)), network.volume)[0]
        turned = (rotated_back(gradient, t) for t in rotations()[1:])
        unseen = [float(measured(v, physics.angles[0])[1].norm() / v.norm()) for v in turned]
        least.append(min(unseen))  # turned back as it was turned
        most.append(max(unseen))
    assert max(least) < 0.2 and min(most) > 0.3


@pytest.mark.parametrize("before", [tilt_splitting, equivariance_by(), missing_wedge])
def test_a_loss_has_the_same_gradient_whichever_was_asked_before(generator, before):
    problem, _, _ = make_problem(generator, grid="camera")

    class Factor(Denoiser):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x, sigma, **_):
            return self.factor * x

    network, found = Factor(), []
    for losses in ((noise2noise,), (before, noise2noise)):
        draw = Draw(network, problem, torch.Generator().manual_seed(1))
        _ = draw.parts
        value = [loss(draw) for loss in losses][-1]
        found.append(torch.autograd.grad(value, network.factor)[0])
    assert torch.equal(*found)


# rotations and masks for deepinv -------------------------------------------------------------------------------------


def blob(shape, at, width=2.0):
    axes = [torch.arange(n, dtype=torch.float64) - n // 2 for n in shape]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2) / (2 * width**2))


@pytest.mark.parametrize("shape", [(25, 25, 25), (24, 26, 27)])
def test_any_rotation_takes_a_point_where_its_matrix_does(generator, shape):
    at = torch.tensor([3.0, -2.0, 4.0], dtype=torch.float64)
    for matrix in random_rotations(12, generator):
        found = turned_by(blob(shape, at)[None, None], matrix)[0, 0]
        assert torch.allclose(found, blob(shape, matrix @ at), atol=2e-3)


def test_rotations_of_the_cube_lose_nothing_and_the_others_little(generator):
    volume = torch.randn(2, 1, 9, 9, 9, generator=generator)
    for group, x, allowed in (("cube", volume, 0.0), ("any", blob((25,) * 3, (2.0, 3.0, -1.0))[None, None], 2e-3)):
        turn = Rotate3D(group, rng=torch.Generator().manual_seed(3))
        parameters = turn.get_params(x)
        assert not torch.allclose(turn(x, **parameters), x, atol=0.1)
        assert float((turn.inverse(turn(x, **parameters), **parameters) - x).abs().max()) <= allowed
        assert turn(x).dtype == x.dtype
    many = Rotate3D("cube", n_trans=3)(volume)
    assert many.shape == (6, 1, 9, 9, 9)
    symmetric = Rotate3D("cube", n_trans=2).symmetrize(lambda v: v, average=True)(volume)
    assert torch.equal(symmetric, volume)


@pytest.mark.parametrize("group", ["cube", "any"])
def test_equivariant_imaging_of_deepinv_works_in_three_dimensions(generator, group):
    physics = TiltProjection(ANGLES, (9, 9, 9))
    volume = torch.randn(2, 1, 9, 9, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    turn = Rotate3D(group, rng=torch.Generator().manual_seed(0))
    loss = EILoss(turn, apply_noise=False)(volume, physics, lambda y, p: p.A_adjoint(y) / 50)
    turned = Rotate3D(group, rng=torch.Generator().manual_seed(0))(volume)
    assert float(loss) == pytest.approx(float((physics.A_adjoint(physics.A(turned)) / 50 - turned).square().mean()))
    assert float(torch.autograd.grad(loss.sum(), volume)[0].norm()) > 0


def test_splitting_of_deepinv_leaves_out_whole_tilts(generator):
    physics = TiltProjection(ANGLES, (6, 5, 8))
    images = torch.randn(2, 1, 7, 5, 8, generator=generator)
    physics = physics.float()
    masks = TiltMaskGenerator((1, 7, 5, 8), 0.7, rng=torch.Generator().manual_seed(0))
    mask = masks.step(2)["mask"]
    assert mask.shape == images.shape and mask.std((-2, -1)).max() == 0
    assert (mask[:, 0, :, 0, 0].sum(1) == 5).all() and not torch.equal(mask[0], mask[1])
    loss = SplittingLoss(mask_generator=masks)
    model = loss.adapt_model(Backprojection()).train()
    volume = model(images, physics, update_parameters=True)
    kept = model.get_masks()[0]
    assert torch.allclose(volume, physics.A_adjoint(kept * images), atol=1e-4)
    expected = ((1 - kept) * (physics.A(volume) - images)).square().mean() / (1 - kept).mean()
    assert torch.allclose(loss(volume, images, physics, model), expected)


class Backprojection(torch.nn.Module):
    def forward(self, y, physics):
        return physics.A_adjoint(y)


# a series by itself --------------------------------------------------------------------------------------------------


def make_scene(generator, n=1, dtype=torch.float32):
    shape = (16, 20, 24)
    physics = TiltProjection(torch.linspace(-60, 60, 31), shape)
    volumes = torch.zeros(n, 1, *shape)
    for volume in volumes:
        for _ in range(12):
            at = [float(torch.rand((), generator=generator) - 0.5) * 0.8 * m for m in (24, 20, 16)]
            volume[0] += blob(shape, at, 1.5)
    clean = physics.A(volumes)
    noise = float(clean.var())
    images = clean + noise**0.5 * torch.randn(clean.shape, generator=generator)
    return physics.to(dtype), images.to(dtype), noise, volumes.to(dtype)


def off(found, truth):
    found, truth = (v - v.mean((-3, -2, -1), keepdim=True) for v in (found, truth))
    return float((found - truth).norm() / truth.norm())


def test_a_series_teaches_a_network_that_is_better_than_least_squares(generator):
    physics, images, noise, truth = make_scene(generator)
    made = self_supervised(physics, images[0, 0], noise, plan=SelfSupervisedPlan(steps=40, averages=2))
    first = Problem(physics, images, noise).first(images)
    assert made.volume.shape == (16, 20, 24) and made.losses.shape == (40, 2)
    assert off(made.volume, truth[0, 0]) < 0.9 * off(first, truth)


def test_the_variance_of_a_voxel_is_found_from_the_images(generator):
    physics = TiltProjection(torch.linspace(-60, 60, 21), (32, 48, 48), grid="stretched")
    for level in (0.1, 10.0):
        truth = 1.7 * GaussianDenoiser(smooth_spectrum((32, 48, 48), length=8.0, dtype=torch.float32)).sample(
            1, generator
        )
        clean = physics.A(truth)
        noise = level * float(clean.var())
        images = clean + noise**0.5 * torch.randn(clean.shape, generator=generator)
        assert Problem(physics, images, noise).variance == pytest.approx(1.7**2, rel=0.3)


def test_all_losses_take_several_series_in_double_precision_and_a_run_can_be_resumed(generator, tmp_path):
    physics, images, noise, _ = make_scene(generator, 2, torch.float64)
    losses = ("noise2noise", "tilt_splitting", "equivariance", "missing_wedge", equivariance_by(Rotate3D("any")))
    how = {"losses": losses[:4], "weights": (1.0, 0.5, 0.2, 0.5), "plan": SelfSupervisedPlan(steps=3, averages=1)}
    whole = self_supervised(physics, images, noise, **how)
    assert whole.volume.shape == (2, 1, 16, 20, 24) and whole.volume.dtype == torch.float64

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop

    state = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        self_supervised(physics, images, noise, state=state, progress=stop, **how)
    again = self_supervised(physics, images, noise, state=state, resume=True, **how)
    assert torch.equal(again.volume, whole.volume)
    one = self_supervised(physics, images, noise, losses=losses[::4], plan=SelfSupervisedPlan(steps=1, averages=1))
    assert torch.isfinite(one.volume).all()


def test_what_does_not_fit_is_refused(generator):
    physics, images, noise, _ = make_scene(generator)
    for wrong, words in (
        ({"losses": ("equivariance",)}, "alone"),
        ({"losses": ("noise2nose",)}, "expected some of"),
        ({"losses": ()}, "expected some of"),
        ({"weights": (1.0,)}, "weights: expected 2"),
        ({"weights": (1.0, -1.0)}, "weights: expected 2"),
        ({"plan": SelfSupervisedPlan(strength=0.0)}, "strength"),
        ({"plan": SelfSupervisedPlan(averages=0)}, "averages"),
    ):
        with pytest.raises(ValueError, match=words):
            self_supervised(physics, images, noise, **wrong)
    with pytest.raises(ValueError, match="one channel"):
        Problem(physics, images.expand(1, 2, -1, -1, -1), noise)
    with pytest.raises(ValueError, match="group"):
        Rotate3D("beam")
    with pytest.raises(ValueError, match="two tilts"):
        TiltMaskGenerator((1, 1, 5, 5))
    assert float(noise2noise(Draw(Plain(), Problem(physics, images, noise), generator))) > 0
