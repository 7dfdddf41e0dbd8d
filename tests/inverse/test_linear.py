"""Weighted back-projection and least squares give back what was projected."""

import pytest
import torch

from inverse.metrics.fsc import measured_region
from inverse.physics.closed_form import largest_eigenvalue
from inverse.physics.tilt import TiltProjection
from inverse.solvers.linear import least_squares, wbp
from inverse.solvers.sirt import sirt

ANGLES = torch.linspace(-60, 60, 61, dtype=torch.float64)


def make_scene(depth):
    """A few blobs (z, y, x) near the centre of a volume of some depth, and the region the tilts measure."""
    generator = torch.Generator().manual_seed(1)
    shape = (depth, 6, 96)
    grid = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) - n // 2 for n in shape], indexing="ij")
    volume = torch.zeros(shape, dtype=torch.float64)
    for _ in range(12):
        c = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * torch.tensor([8.0, 2.0, 16.0])
        volume += torch.exp(-sum((g - x) ** 2 for g, x in zip(grid, c, strict=True)) / (2 * 1.6**2))
    return volume, measured_region(shape, ANGLES)


@pytest.fixture
def scene():
    return make_scene(33)


def measured_error(volume, truth, region):
    a, b = torch.fft.rfftn(volume) * region, torch.fft.rfftn(truth) * region
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("grid", ["camera", "stretched"])
@pytest.mark.parametrize("filter", ["ramp", "exact"])
def test_wbp_is_calibrated(grid, filter):
    """In the measured region the tomogram is the volume, in its own unit, to the coarseness of the tilts."""
    truth, region = make_scene(97)  # deep enough for the tails that the missing wedge draws out
    physics = TiltProjection(ANGLES, truth.shape, grid=grid)
    volume = wbp(physics, physics.A(truth[None, None])[0, 0], filter=filter)
    assert volume.shape == truth.shape
    assert measured_error(volume, truth, region) < 0.12


def test_exact_filter_forgives_uneven_tilts(scene):
    truth, region = scene
    uneven = torch.cat([ANGLES[:20:4], ANGLES[20:40], ANGLES[40::3]])
    physics = TiltProjection(uneven, truth.shape)
    images = physics.A(truth[None, None])[0, 0]
    ramp, exact = (measured_error(wbp(physics, images, filter=f), truth, region) for f in ("ramp", "exact"))
    assert exact < 0.2 and exact < ramp


@pytest.mark.parametrize("grid", ["camera", "stretched"])
def test_least_squares_beats_back_projection_without_noise(scene, grid):
    truth, region = scene
    physics = TiltProjection(ANGLES, truth.shape, grid=grid)
    images = physics.A(truth[None, None])[0, 0]
    fitted = least_squares(physics, images, 1e-4 * float(largest_eigenvalue(ANGLES, physics.geometry)))
    assert measured_error(fitted, truth, region) < min(0.02, measured_error(wbp(physics, images), truth, region))


@pytest.mark.parametrize("open_sides", [False, True])
def test_least_squares_normal_equations(scene, open_sides):
    """A^T (A x - y) + weight x = 0, in closed form."""
    truth, _ = scene
    physics = TiltProjection(ANGLES, truth.shape, grid="stretched")
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(1, 1, 61, 6, 96, generator=generator, dtype=torch.float64)
    x = least_squares(physics, y, 7.0, open_sides=open_sides)
    wrong = physics.A_adjoint(physics.A(x) - y) + 7.0 * x
    assert wrong.norm() < 1e-10 * physics.A_adjoint(y).norm()


def test_open_sides_let_the_specimen_reach_on(scene):
    """What stands beside the volume, in view of the tilts, must not be folded into it."""
    truth, _ = scene
    wide = torch.zeros(33, 6, 192, dtype=torch.float64)
    wide[:, :, 48:144] = truth
    wide[12:21, :, 150:160] = 4.0  # beyond the volume's edge at x = 144, seen by the tilted images
    seen = TiltProjection(ANGLES, (33, 6, 192), image_shape=(6, 96)).A(wide[None, None])[0, 0]
    physics = TiltProjection(ANGLES, (33, 6, 96))
    weight = 1e-2 * float(largest_eigenvalue(ANGLES, physics.geometry))
    errors = [
        float((least_squares(physics, seen, weight, open_sides=o) - truth).norm() / truth.norm()) for o in (False, True)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("solver", [wbp, lambda p, y: least_squares(p, y, 0.5 / p.scale**2, open_sides=True)])
def test_unit_norm_changes_nothing(scene, solver):
    truth, _ = scene
    plain, unit = (TiltProjection(ANGLES, truth.shape, normalize=n) for n in (False, True))
    images = plain.A(truth[None, None])[0, 0]
    torch.testing.assert_close(solver(unit, images / unit.scale), solver(plain, images), rtol=1e-6, atol=1e-9)


def test_low_pass_removes_what_is_finer(scene):
    truth, _ = scene
    generator = torch.Generator().manual_seed(2)
    physics = TiltProjection(ANGLES, truth.shape)
    noise = torch.randn(61, 6, 96, generator=generator, dtype=torch.float64)
    window = torch.hann_window(96, dtype=torch.float64)  # the volume's sharp sides have a spectrum of their own

    def power(volume):
        return torch.fft.rfft(volume * window).abs().square().mean((0, 1))

    kept, whole = power(wbp(physics, noise, low_pass=8.0)), power(wbp(physics, noise))
    assert kept[20:].mean() < 1e-5 * whole[20:].mean()
    assert abs(float(kept[2:8].mean() / whole[2:8].mean()) - 0.25) < 0.15  # of the rows' frequencies too, a quarter


def test_bad_arguments(scene):
    truth, _ = scene
    physics = TiltProjection(ANGLES, truth.shape)
    images = torch.zeros(61, 6, 96, dtype=torch.float64)
    with pytest.raises(ValueError, match='expected the filter "ramp" or "exact", got \'hann\''):
        wbp(physics, images, filter="hann")
    with pytest.raises(ValueError, match="positive weight"):
        least_squares(physics, images, 0.0)
    with pytest.raises(ValueError, match=r"images: expected \(tilt, y, x\)"):
        wbp(physics, images[0])


@pytest.mark.parametrize(("angle", "shape"), [(-50.0, (8, 16, 16)), (-32.0, (16, 1, 64))])
def test_sirt_converges_for_a_single_tilt_too(angle, shape, generator):
    """Ripples of one view add up in one direction; the residual falls all the same."""
    physics = TiltProjection([angle], shape)
    volume = torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64)
    images = physics.A(volume)
    left = [float((physics.A(sirt(physics, images, iterations=n)) - images).norm()) for n in (1, 10, 60)]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("solver", [wbp, least_squares, sirt])
def test_images_that_no_solver_can_use_are_refused(solver):
    physics = TiltProjection([-40.0, 0.0, 30.0], (4, 3, 8))
    for images, said in (
        (torch.full((3, 3, 8), float("nan")), "finite"),
        (torch.ones(3, 3, 8, dtype=torch.int32), "float32 or float64"),
        (torch.ones(3, 3, 8).half(), "float32 or float64"),
    ):
        with pytest.raises(ValueError, match=said):
            solver(physics, images)


def test_a_refused_update_changes_nothing(generator):
    physics = TiltProjection([-40.0, 0.0, 30.0], (4, 3, 8))
    volume = torch.randn(1, 1, 4, 3, 8, generator=generator, dtype=torch.float64)
    before = physics.A(volume)
    with pytest.raises(ValueError, match="below 89"):
        physics.update(angles=torch.tensor([-40.0, 0.0, 89.7], dtype=torch.float64))
    assert torch.equal(physics.A(volume), before)
    physics.update(axis_angle=0.0)
    assert torch.equal(physics.A(volume), before)
