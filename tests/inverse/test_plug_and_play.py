"""Plug and play with the exact denoiser of Gaussian volumes: each method ends where linear algebra says it does."""

import math

import pytest
import torch
from deepinv.models.base import Denoiser
from deepinv.optim import HQS, L2, PnP

import cryosim as cs
from inverse.physics.contrast import ContrastProjection
from inverse.physics.deformed import DeformedProjection
from inverse.physics.tilt import TiltProjection
from inverse.solvers.linear import least_squares
from inverse.solvers.plug_and_play import Whitened, plug_and_play
from tests.inverse.gaussian_denoiser import GaussianDenoiser, smooth_spectrum

SHAPE, TILTS = (5, 4, 9), 7
ANGLES = torch.linspace(-60, 50, TILTS, dtype=torch.float64)
METHODS = ["hqs", "admm", "pgd", "red"]


def random(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=dtype)


def dense(physics):
    """A (pixels, voxels)."""
    n = math.prod(physics.volume_shape)
    return physics.A(torch.eye(n, dtype=torch.float64).reshape(n, 1, *physics.volume_shape)).flatten(1).T


def spread_noise(physics, share):
    """Variances (tilt,) from a share of |A|^2 to twice that: high tilts are noisier."""
    return share * float(physics.squared_norm()) * torch.linspace(1, 2, TILTS, dtype=torch.float64)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# ------------------------------------------------------------------------------------- where each of the methods ends


@pytest.mark.parametrize(("grid", "even"), [("stretched", True), ("stretched", False), ("camera", True)])
@pytest.mark.parametrize("method", METHODS)
def test_fixed_points(method, grid, even, generator):
    """Of the four iterations with the level held, by dense matrices; strength 2.5, one variance or several."""
    physics = TiltProjection(ANGLES, SHAPE, grid=grid, tolerance=1e-10)
    denoiser, strength, s = GaussianDenoiser(smooth_spectrum(SHAPE)), 2.5, 1.6
    noise = spread_noise(physics, 0.3)
    noise = float(noise[0]) if even else noise
    images = random((TILTS, *SHAPE[1:]), generator) * 5
    a, covariance = dense(physics), denoiser.covariance()
    weights = (torch.ones(TILTS, dtype=torch.float64) / noise).repeat_interleave(SHAPE[1] * SHAPE[2])
    h, b = a.T * weights @ a, a.T @ (weights * images.flatten())
    eye, precision = torch.eye(len(h), dtype=torch.float64), torch.linalg.inv(covariance)
    if method == "hqs":
        half, d = torch.linalg.inv(s**2 / strength * h + eye), torch.linalg.inv(eye + s**2 * precision)
        expected = torch.linalg.solve(eye - d @ half, d @ half @ b * s**2 / strength)
    elif method == "red":
        expected = torch.linalg.solve(h + strength * torch.linalg.inv(covariance + s**2 * eye), b)
    else:
        expected = torch.linalg.solve(h + strength * precision, b)
    how = {"iterations": {"hqs": 60, "admm": 80, "pgd": 200, "red": 300}[method], "strength": strength}
    levels = None if method == "pgd" else s
    found = plug_and_play(physics, images, denoiser, noise, method=method, noise_levels=levels, **how)
    assert relative(found.volume.flatten(), expected) < 1e-8
    assert found.residuals[-1] < 1e-8 < found.residuals[0]
    left = ((a @ expected - images.flatten()) ** 2 * weights).mean()
    assert float(found.misfits[-1]) == pytest.approx(float(left), rel=1e-7)


def test_pgd_of_a_given_level_has_its_strength(generator):
    """l = s^2 |A|^2 / n: the level says all."""
    physics, denoiser = TiltProjection(ANGLES, SHAPE, grid="stretched"), GaussianDenoiser(smooth_spectrum(SHAPE))
    images, norm = random((TILTS, *SHAPE[1:]), generator), float(physics.squared_norm())
    level, noise = 1.0, 0.4 * norm
    found = plug_and_play(physics, images, denoiser, noise, method="pgd", noise_levels=level, iterations=200)
    how = {"strength": level**2 * norm / noise, "noise_levels": 1.6, "iterations": 100}
    assert relative(found.volume, plug_and_play(physics, images, denoiser, noise, method="admm", **how).volume) < 1e-9
    with pytest.raises(ValueError, match="strength"):
        plug_and_play(physics, images, denoiser, noise, method="pgd", noise_levels=level, strength=2.0)


def test_the_iterations_are_those_of_deepinv(generator):
    physics, denoiser = TiltProjection(ANGLES, SHAPE, grid="stretched"), GaussianDenoiser(smooth_spectrum(SHAPE))
    images, noise = random((2, 1, TILTS, *SHAPE[1:]), generator), 3.0
    model = HQS(L2(), PnP(denoiser), stepsize=0.3**2 / noise, sigma_denoiser=0.3, max_iter=7)
    found = plug_and_play(
        physics, images, denoiser, noise, noise_levels=0.3, iterations=7, init=physics.A_adjoint(images)
    )
    torch.testing.assert_close(found.volume, model(images, physics), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("grid", "snr"), [("stretched", 10.0), ("camera", 0.1)])
def test_left_to_itself_it_comes_near_the_most_probable_volume(snr, grid, method, generator):
    """Levels and iterations as they are by default, float32; the most probable volume of a Gaussian is the best.

    Measured: an error at most 1.5 % above that of the most probable volume.
    """
    shape = (12, 10, 24)
    physics = TiltProjection(torch.linspace(-60, 60, 21), shape, grid=grid)
    denoiser = GaussianDenoiser(smooth_spectrum(shape, length=6.0, dtype=torch.float32))
    truth = denoiser.sample(1, generator)
    images = physics.A(truth)
    noise = float(images.square().mean()) / snr
    images = images + noise**0.5 * random(images.shape, generator, torch.float32)
    level = (3 * noise / float(physics.squared_norm())) ** 0.5
    best = plug_and_play(physics, images, denoiser, noise, method="admm", iterations=40, noise_levels=level).volume
    found = plug_and_play(physics, images, denoiser, noise, method=method)
    assert relative(found.volume, truth) < 1.02 * relative(best, truth)
    assert relative(least_squares(physics, images, noise), truth) > 1.02 * relative(best, truth)
    assert found.volume.dtype == torch.float32 and found.residuals.shape == (len(found.levels), 1)


# ---------------------------------------------------------------------------------------------------- units and levels


@pytest.mark.parametrize("method", METHODS)
def test_units_do_not_matter(method, generator):
    """Nor does the norm: volumes a thousand times as strong, or images divided by the norm of A, change nothing."""
    plain = TiltProjection(ANGLES, SHAPE, grid="stretched")
    unit = TiltProjection(ANGLES, SHAPE, grid="stretched", normalize=True)
    images, noise, spectrum = random((TILTS, *SHAPE[1:]), generator) * 9, 7.0, smooth_spectrum(SHAPE)
    first = plug_and_play(plain, images, GaussianDenoiser(spectrum), noise, method=method, iterations=9)
    large = plug_and_play(
        plain, images * 1e3, GaussianDenoiser(spectrum * 1e6), noise * 1e6, method=method, iterations=9
    )
    torch.testing.assert_close(large.volume, first.volume * 1e3, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(large.levels, first.levels * 1e3, rtol=1e-9, atol=0)
    scale = float(unit.scale)
    assert scale > 2
    same = plug_and_play(
        unit, images / scale, GaussianDenoiser(spectrum), noise / scale**2, method=method, iterations=9
    )
    torch.testing.assert_close(same.volume, first.volume, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(same.misfits, first.misfits, rtol=1e-6, atol=0)


def test_levels_fall_by_equal_factors_within_what_the_denoiser_knows(generator):
    physics, denoiser = TiltProjection(ANGLES, SHAPE), GaussianDenoiser(smooth_spectrum(SHAPE))
    truth = denoiser.sample(1, generator)
    images = physics.A(truth) + 0.1**0.5 * random((1, 1, TILTS, *SHAPE[1:]), generator)
    levels = plug_and_play(physics, images, denoiser, 0.1).levels
    assert len(levels) == 20 and 0.3 < float(levels[0]) < 1.5 and float(levels[0] / levels[-1]) > 3.99
    ratios = levels[1:] / levels[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(19), rtol=1e-12, atol=0)
    denoiser.noise_levels = (0.25, 0.3)
    within = plug_and_play(physics, images, denoiser, 0.1, iterations=4).levels
    assert within.tolist() == pytest.approx([0.3, 0.3 * (5 / 6) ** (1 / 3), 0.3 * (5 / 6) ** (2 / 3), 0.25])
    with pytest.warns(UserWarning, match="pgd of strength 1 asks"):
        told = plug_and_play(physics, images, denoiser, 0.1, method="pgd", iterations=2)
    assert told.levels.tolist() == [0.25, 0.25]
    with pytest.raises(ValueError, match="0.25 to 0.3"):
        plug_and_play(physics, images, denoiser, 0.1, noise_levels=(1.0, 0.25))


# -------------------------------------------------------------------------------------------------- the data's own side


@pytest.mark.parametrize("grid", ["stretched", "camera"])
def test_least_squares_of_several_variances(grid, generator):
    """The proximal step weighs each tilt by its noise, from high levels to low, against a dense solve."""
    physics = TiltProjection(ANGLES, SHAPE, grid=grid, tolerance=1e-10, max_iterations=400)
    noise = torch.tensor([0.5, 1.0, 8.0, 1.0, 2.0, 0.3, 4.0], dtype=torch.float64)
    y, z = random((2, 1, TILTS, *SHAPE[1:]), generator), random((2, 1, *SHAPE), generator)
    a, weights = dense(physics), (1 / noise).repeat_interleave(SHAPE[1] * SHAPE[2])
    seen = Whitened(physics, noise, y)
    for gamma in (1e-3, 0.1, 3.0):
        h = gamma * (a.T * weights) @ a + torch.eye(a.shape[1], dtype=torch.float64)
        right = gamma * a.T @ (weights[:, None] * y.flatten(1).T) + z.flatten(1).T
        found = seen.prox_l2(z, seen.whiten(y), gamma)
        assert relative(found.flatten(1).T, torch.linalg.solve(h, right)) < 1e-9
    u = random((2, 1, TILTS, *SHAPE[1:]), generator)
    left, right = (seen.A(z) * u).sum(), (z * seen.A_adjoint(u)).sum()
    torch.testing.assert_close(left, right, rtol=1e-11, atol=0)
    assert float(torch.linalg.matrix_norm(a * weights.sqrt()[:, None], 2)) ** 2 < seen.squared_norm()


@pytest.mark.parametrize("even", [True, False])
def test_items_do_not_mix(even, generator):
    """Two stacks at once are the two one by one, at levels given; float32 is float64 to its precision."""
    physics, denoiser = TiltProjection(ANGLES, SHAPE, tolerance=1e-9), GaussianDenoiser(smooth_spectrum(SHAPE))
    noise = 2.0 if even else spread_noise(physics, 0.05)
    images = random((2, 1, TILTS, *SHAPE[1:]), generator) * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1, 1)
    init = random((2, 1, *SHAPE), generator)
    how = {"noise_levels": (1.0, 0.2), "iterations": 5}
    both = plug_and_play(physics, images, denoiser, noise, init=init, **how)  # type: ignore[arg-type]
    assert both.volume.shape == (2, 1, *SHAPE) and both.misfits.shape == (5, 2)
    for i in range(2):
        alone = plug_and_play(physics, images[i, 0], denoiser, noise, init=init[i, 0], **how)
        assert alone.volume.shape == SHAPE
        torch.testing.assert_close(both.volume[i, 0], alone.volume, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(both.residuals[:, i], alone.residuals[:, 0], rtol=1e-5, atol=1e-7)
    physics.tol = 1e-6
    single = plug_and_play(physics, images.float(), denoiser, noise, init=init.float(), **how)
    assert single.volume.dtype == torch.float32 and relative(single.volume, both.volume) < 1e-4


@pytest.mark.parametrize("kind", ["contrast", "deformed"])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("method", ["hqs", "pgd"])
def test_through_the_lens(method, even, kind, generator):
    """The volume is nearer the truth than least squares, and the misfit of what it is said to be."""
    shape, optics = (8, 9, 16), cs.Optics(300.0, torch.linspace(9000, 14000, TILTS, dtype=torch.float64))
    kinds = {"contrast": ContrastProjection, "deformed": DeformedProjection}
    physics = kinds[kind](ANGLES, shape, 6.0, optics, tolerance=1e-3)
    denoiser = GaussianDenoiser(smooth_spectrum(shape, length=4.0))
    truth = denoiser.sample(1, generator)
    images = physics.A(truth)
    noise = 0.5 * float(images.square().mean()) * torch.linspace(0.7, 1.5, TILTS, dtype=torch.float64)
    images = images + noise.sqrt()[:, None, None] * random(images.shape, generator)
    given = float(noise.mean()) if even else noise
    found = plug_and_play(physics, images, denoiser, given, method=method, iterations=4 if method == "hqs" else 40)
    left = (physics.A(found.volume) - images).square() / torch.as_tensor(given, dtype=torch.float64).reshape(-1, 1, 1)
    assert float(found.misfits[-1]) == pytest.approx(float(left.mean()), rel=1e-9)
    assert 0.5 < float(found.misfits[-1]) < 1.2
    assert relative(found.volume, truth) < 0.95 * relative(least_squares(physics, images, float(noise.mean())), truth)


# ------------------------------------------------------------------------------------------------- how the end is found


def test_the_discrepancy_stops_each_item_where_it_is_met(generator):
    """Falling levels meet the images more and more closely; each item is that of its own first misfit below 1."""
    physics = TiltProjection(ANGLES, SHAPE)
    denoiser = GaussianDenoiser(smooth_spectrum(SHAPE, variance=0.02))  # expects less than there is: misfits begin high
    truth = random((2, 1, *SHAPE), generator) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    noise = 2.0
    images = physics.A(truth) + noise**0.5 * random((2, 1, TILTS, *SHAPE[1:]), generator)
    how = {"noise_levels": (2.0, 0.005), "iterations": 40, "init": torch.zeros(2, 1, *SHAPE)}
    found = plug_and_play(physics, images, denoiser, noise, strength=1e-3, stop="discrepancy", **how)
    n = len(found.levels)
    assert n < 40 and (found.misfits[-1] <= 1).all() and (found.misfits[0] > 1).all()
    first = [int((found.misfits[:, i] <= 1).int().argmax()) for i in range(2)]
    assert max(first) == n - 1 > min(first)
    left = (physics.A(found.volume) - images).square().mean((1, 2, 3, 4)) / noise
    torch.testing.assert_close(left, torch.stack([found.misfits[k, i] for i, k in enumerate(first)]))
    with pytest.warns(UserWarning, match="no iteration brought the misfit to 1"):
        plug_and_play(physics, images, denoiser, noise * 1e-3, strength=30.0, stop="discrepancy", **how)


class Exaggerating(Denoiser):
    """Not the denoiser of anything: it adds to what it is given."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, sigma, **_):
        return self.factor * x.roll(1, -1)


def test_iterations_that_do_not_settle_are_told(generator):
    physics, images = TiltProjection(ANGLES, SHAPE), random((TILTS, *SHAPE[1:]), generator)
    with pytest.warns(UserWarning, match="admm does not settle"):
        plug_and_play(physics, images, Exaggerating(-1.2), 1.0, method="admm", noise_levels=0.3, iterations=30)
    stretched = TiltProjection(ANGLES, SHAPE, grid="stretched")
    with pytest.raises(ArithmeticError, match="not finite after"):
        plug_and_play(stretched, images, Exaggerating(1e30), 1.0, method="pgd", noise_levels=1.0)


@pytest.mark.filterwarnings("error")
def test_nothing_in_nothing_out_and_no_warnings():
    physics, denoiser = TiltProjection(ANGLES, SHAPE), GaussianDenoiser(smooth_spectrum(SHAPE))
    seen: list[tuple[int, int]] = []
    for method in METHODS:
        images = torch.zeros(TILTS, *SHAPE[1:], dtype=torch.float64)
        found = plug_and_play(
            physics, images, denoiser, 1.0, method=method, iterations=7, progress=lambda a, b: seen.append((a, b))
        )
        assert not found.volume.any() and not found.misfits.any()
    assert seen == 4 * [(i, 7) for i in range(1, 8)]


def test_bad_input_is_refused(generator):
    physics, denoiser = TiltProjection(ANGLES, SHAPE), GaussianDenoiser(smooth_spectrum(SHAPE))
    images = random((TILTS, *SHAPE[1:]), generator)

    def refused(match, images=images, noise: object = 1.0, denoiser: Denoiser = denoiser, **how):
        with pytest.raises(ValueError, match=match):
            plug_and_play(physics, images, denoiser, noise, **how)  # type: ignore[arg-type]

    refused("method, stop", method="fista")
    refused("method, stop", stop="never")
    refused("iterations", iterations=0)
    refused("strength", strength=-1.0)
    refused("noise: expected positive", noise=0.0)
    refused("noise: expected positive", noise=torch.tensor([1.0] * 6 + [float("nan")]))
    refused("noise: expected a number", noise=torch.ones(TILTS - 1))
    refused("noise_levels", noise_levels=(1.0, 0.0))
    refused("noise_levels", noise_levels=(1.0, 0.5, 0.1))
    refused("init", init=torch.zeros(2, 1, *SHAPE))
    refused("init", init=torch.full(SHAPE, float("inf")))
    refused("images", images=images[:, :-1])
    refused("images", images=images / 0)
    refused("one channel", images=images.expand(1, 2, *images.shape))
    network = Exaggerating(1.0)
    network.weight = torch.nn.Parameter(torch.ones(1))
    refused("denoiser: expected weights like the images", denoiser=network)
