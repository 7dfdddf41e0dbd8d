"""The Gaussian model of images seen through a lens: likelihood, its derivatives, filter, interval and samples."""

import math

import pytest
import torch

from cryosim.microscope.optics import Optics
from inverse.physics.contrast import ContrastProjection, EwaldProjection
from inverse.physics.contrast_inverse import lens_transfer
from inverse.physics.gaussian import (
    GaussianModel,
    marginal_log_likelihood,
    prior_sample,
    score_and_information,
)
from inverse.physics.gaussian_estimate import estimate_model, transfer_of
from inverse.physics.tilt import TiltProjection
from inverse.solvers.wiener import posterior_samples, posterior_std, wiener
from tests.inverse.dense_gaussian import dense

VOXEL = 8.0  # [Å]
NODES = math.sqrt(0.75) * torch.linspace(0, 1, 20, dtype=torch.float64) ** 2


def make_optics(tilts, defocus=20000.0):
    """An astigmatic lens, whose transfer differs between +ky and -ky, with a defocus that differs from tilt to tilt."""
    steps = torch.linspace(-1, 1, tilts, dtype=torch.float64)
    return Optics(300.0, defocus + 1500 * steps, astigmatism=2000.0, astigmatism_angle=30.0, amplitude_contrast=0.1)


def make_scene(shape, tilts, thickness, generator, *, noise=1.0, displaced=False, spread=60.0):
    """Operator, model, a volume drawn from it (z, y, x) [V], and its noisy images (tilt, y, x) [1].

    The noise is `noise` times the mean power of the clean images.
    """
    shifts = 12.0 * torch.randn(tilts, 2, generator=generator, dtype=torch.float64) if displaced else None
    angles = torch.linspace(-spread, spread, tilts, dtype=torch.float64)
    how = {"grid": "stretched", "heights": "none", "shifts": shifts}
    physics = ContrastProjection(angles, shape, VOXEL, make_optics(tilts), **how)
    model = GaussianModel(
        4 / (1 + (NODES / 0.06) ** 2) ** 1.2,
        NODES,
        torch.ones(tilts, dtype=torch.float64),
        torch.tensor(float(thickness), dtype=torch.float64),
    )
    volume = prior_sample(model, shape, generator)
    clean = physics.A(volume[None, None])[0, 0]
    level = float(clean.square().mean()) * noise
    model = model.replace(noise=level * (1 + 0.5 * torch.linspace(-1, 1, tilts, dtype=torch.float64) ** 2))
    white = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return physics, model, volume, clean + white * model.noise.sqrt()[:, None, None]


def covered(error, std):
    return float((error.abs() < 1.6449 * std).double().mean())


@pytest.mark.parametrize("displaced", [False, True])
@pytest.mark.parametrize(
    ("shape", "thickness"), [((4, 5, 6), 2.7), ((3, 6, 7), 3.0), ((3, 4, 6), 4.0), ((1, 2, 5), 1.0)]
)
def test_likelihood_filter_and_std_are_those_of_the_dense_gaussian(shape, thickness, displaced, generator):
    physics, model, _, images = make_scene(shape, 4, thickness, generator, noise=0.1, displaced=displaced)
    matrix, prior, seen = dense(physics, model)
    y = images.flatten()
    expected = torch.distributions.MultivariateNormal(torch.zeros_like(y), seen).log_prob(y)
    found = marginal_log_likelihood(images, physics.angles[0], physics.geometry, model, transfer_of(physics))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    gain = prior @ matrix.T @ torch.linalg.inv(seen)
    torch.testing.assert_close(wiener(physics, images, model).volume.flatten(), gain @ y, rtol=1e-9, atol=1e-10)
    left = torch.diagonal(prior - gain @ matrix @ prior).reshape(shape).sqrt()
    torch.testing.assert_close(posterior_std(physics, model), left, rtol=1e-9, atol=1e-7)


def test_a_lens_that_passes_all_alike_is_none(generator):
    physics, model, _, images = make_scene((4, 6, 9), 5, 3.2, generator)
    place = (images, physics.angles[0], physics.geometry)
    unit = torch.ones(5, 6, 9 // 2 + 1, dtype=torch.float64)
    for function in (marginal_log_likelihood, score_and_information):
        torch.testing.assert_close(function(*place, model, unit), function(*place, model), rtol=1e-11, atol=1e-9)


def test_score_is_the_gradient_of_the_likelihood(generator):
    physics, model, _, images = make_scene((5, 6, 8), 5, 3.6, generator, displaced=True)
    place, lens = (physics.angles[0], physics.geometry), transfer_of(physics)

    def likelihood(spectrum, noise, thickness):
        changed = model.replace(spectrum=spectrum.exp(), noise=noise.exp(), thickness=thickness.exp())
        return marginal_log_likelihood(images, *place, changed, lens)

    parameters = (model.spectrum.log(), model.noise.log(), model.thickness.log())
    gradients = torch.func.grad(likelihood, (0, 1, 2))(*parameters)
    score, information = score_and_information(images, *place, model, lens)
    torch.testing.assert_close(score, torch.cat([g.reshape(-1) for g in gradients]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(information, information.T)
    assert float(torch.linalg.eigvalsh(information).min()) > -1e-9 * float(information.max())


def test_gradient_in_the_defocus_and_the_shifts(generator):
    """Against central differences; and the likelihood of many images is greatest near the true defocus."""
    physics, model, _, images = make_scene((5, 12, 13), 5, 3.6, generator, noise=0.1, displaced=True)

    def likelihood(defocus, shifts):
        physics.defocus, physics.shifts = defocus[None], shifts[None]
        return marginal_log_likelihood(images, physics.angles[0], physics.geometry, model, transfer_of(physics))

    at = [physics.defocus[0].clone(), physics.shifts[0].clone()]
    for value in at:
        value.requires_grad_()
    gradients = torch.autograd.grad(likelihood(*at), at)
    for i, size in ((0, 5.0), (1, 1e-3)):
        way = torch.randn(at[i].shape, generator=generator, dtype=torch.float64)
        ends = [[v.detach() + (s * size * way if j == i else 0) for j, v in enumerate(at)] for s in (1, -1)]
        change = (likelihood(*ends[0]) - likelihood(*ends[1])) / (2 * size)
        torch.testing.assert_close((gradients[i] * way).sum(), change, rtol=1e-5, atol=0)
    defocus, shifts = (value.detach() for value in at)
    true = float(likelihood(defocus, shifts))
    assert all(float(likelihood(defocus + by, shifts)) < true for by in (-2000.0, 2000.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 40, 40), (11, 39, 41)])
def test_interval_covers(shape, dtype, generator):
    """Of the voxels 88 to 92 % lie in the 90 % interval, with the true model."""
    physics, model, volume, images = make_scene(shape, 21, 9, generator, displaced=True)
    result = wiener(physics, images.to(dtype), model)
    assert result.volume.dtype == dtype and result.volume.shape == shape
    inside = volume.abs().amax((1, 2)) > 0
    error, std = (result.volume.double() - volume)[inside], posterior_std(physics, model)[inside]
    assert 0.88 < covered(error, std) < 0.92
    assert abs(float((error / std).square().mean()) - 1) < 0.08


def test_better_than_flipping_the_phases(generator):
    """With each its own model estimated from the same images; the flipped images' amplitude fitted to the truth."""
    physics, truth, volume, images = make_scene((10, 36, 36), 17, 8, generator)
    estimate = estimate_model(physics, images)
    assert (estimate.log_likelihood.diff() > 0).all()
    result = wiener(physics, images, estimate.model)
    inside = volume.abs().amax((1, 2)) > 0
    error = (result.volume - volume)[inside]
    assert 0.88 < covered(error, posterior_std(physics, estimate.model)[inside]) < 0.92
    assert abs(float((estimate.model.noise / truth.noise).mean()) - 1) < 0.03
    sign = lens_transfer(physics, 36).real.sign()
    flipped = torch.fft.irfft2(torch.fft.rfft2(images) * sign, s=images.shape[1:])
    plain = wiener(TiltProjection(physics.angles[0], physics.volume_shape, grid="stretched"), flipped).volume
    best = float((plain * volume).sum() / plain.square().sum())
    assert float(error.square().mean()) < 0.9 * float((best * plain - volume)[inside].square().mean())  # measured: 0.81
    oracle = (wiener(physics, images, truth).volume - volume)[inside]
    # the true model is the best on average over volumes, not for each
    assert abs(float(error.square().mean() / oracle.square().mean()) - 1) < 0.03


def test_samples_have_the_mean_and_deviation_of_the_posterior(generator):
    physics, model, _, images = make_scene((7, 10, 12), 9, 5.5, generator, displaced=True)
    n = 200
    samples = posterior_samples(physics, images, model, n, generator)
    mean, std = wiener(physics, images, model).volume, posterior_std(physics, model)
    inside = std > 1e-6
    off = ((samples.mean(0) - mean) / std * math.sqrt(n))[inside]
    assert abs(float(off.square().mean()) - 1) < 0.3  # neighbours are correlated: few of these numbers are independent
    assert abs(float((samples.std(0) / std)[inside].mean()) - 1) < 0.02


def test_unit_norm_changes_nothing(generator):
    plain, model, _, images = make_scene((5, 9, 10), 6, 4.0, generator)
    how = {"grid": "stretched", "heights": "none", "normalize": True}
    unit = ContrastProjection(plain.angles[0], plain.volume_shape, VOXEL, plain.optics, **how)
    result = wiener(plain, images, model).volume
    torch.testing.assert_close(wiener(unit, images / unit.scale, model).volume, result)
    batch = torch.stack([images, -2 * images])[:, None]
    torch.testing.assert_close(wiener(plain, batch, model).volume, torch.stack([result, -2 * result])[:, None])


def test_transfer_is_that_of_the_operator(generator):
    """The images of an operator are the line integrals times it; so `prox_l2` and the filter see one lens."""
    physics, _, volume, _ = make_scene((4, 6, 9), 5, 3.2, generator, displaced=True)
    lines = TiltProjection(physics.angles[0], (4, 6, 9), grid="stretched").A(volume[None, None])[0, 0]
    seen = torch.fft.irfft2(torch.fft.rfft2(lines) * lens_transfer(physics, 6), s=(6, 9))
    torch.testing.assert_close(seen, physics.A(volume[None, None])[0, 0], rtol=1e-12, atol=1e-14)
    own = physics._constant().permute(1, 2, 0)  # (tilt, ky, k)
    torch.testing.assert_close(lens_transfer(physics, 6), own, rtol=1e-12, atol=1e-15)


def test_bad_arguments(generator):
    physics, model, _, images = make_scene((4, 6, 8), 3, 3.0, generator)
    given = (physics.angles[0], (4, 6, 8), VOXEL, physics.optics)
    for other in (
        ContrastProjection(*given, heights="none"),
        ContrastProjection(*given, grid="stretched", heights="plane"),
        EwaldProjection(*given, grid="stretched"),
    ):
        with pytest.raises(ValueError, match=r'or a ContrastProjection with grid="stretched"'):
            wiener(other, images, model)
    tall = ContrastProjection(*given, image_shape=(10, 8), grid="stretched", heights="none")
    with pytest.raises(ValueError, match="images of the volume's 6 rows, got 10"):
        posterior_std(tall, model)
    with pytest.raises(ValueError, match=r"transfer: expected \(tilt, ky, kx\) \(3, 6, 5\), got \(3, 6, 8\)"):
        marginal_log_likelihood(images, physics.angles[0], physics.geometry, model, torch.ones(3, 6, 8))
    physics.update(defocus=physics.defocus.expand(2, -1))
    with pytest.raises(ValueError, match="defocus: expected one row that all items share, got 2"):
        wiener(physics, images.expand(2, 1, -1, -1, -1), model)
