"""`DeformedProjection`: what does not move is projected as before, matter is carried along, adjoint and gradients."""

import math

import pytest
import torch

import cryosim as cs
from cryosim.core.rotation import rotation_x
from inverse.physics.contrast import ContrastProjection, EwaldProjection
from inverse.physics.deformed import DeformedProjection, _spline

VOXEL = 4.0
OPTICS = cs.Optics(200.0, 8000.0)
ANGLES = torch.tensor([-50.0, 0.0, 35.0], dtype=torch.float64)
SHAPE = (14, 20, 26)


def blob(shape, centre, width=1.8):
    """Gaussian about a centre (x, y, z) [voxel]."""
    axes = [torch.arange(n, dtype=torch.float64) - n // 2 for n in shape]
    x, y, z = centre
    z, y, x = (torch.exp(-((a - c) ** 2) / (2 * width**2)) for a, c in zip(axes, (z, y, x), strict=True))
    return z[:, None, None] * y[:, None] * x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "image"), [((18, 26, 28), None), ((17, 27, 29), (30, 41))])
@pytest.mark.parametrize("heights", ["none", "plane", "all"])
def test_without_deformation_it_is_the_contrast_projection(shape, image, heights, dtype):
    volume = blob(shape, (2.3, -1.6, 0.7)).to(dtype)[None, None]
    plain = ContrastProjection(ANGLES, shape, VOXEL, OPTICS, image, heights=heights).A(volume)
    mine = DeformedProjection(ANGLES, shape, VOXEL, OPTICS, image, heights=heights).A(volume)
    assert (mine - plain).norm() <= 1e-4 * plain.norm()


def test_matter_is_carried_along():
    """By an even displacement, a turn and a magnification: as a blob placed there."""
    shape = (24, 24, 26)
    move = torch.tensor([6.0, -8.0, 10.0], dtype=torch.float64)  # (x, y, z) [Å]
    deformation = move[None, :, None, None, None].expand(3, 3, 2, 3, 2)
    physics = DeformedProjection(ANGLES, shape, VOXEL, OPTICS, (36, 40), heights="none", deformation=deformation)
    still = DeformedProjection(ANGLES, shape, VOXEL, OPTICS, (36, 40), heights="none")
    seen = physics.A(blob(shape, (0.0, 0.0, 0.0))[None, None])
    expected = still.A(blob(shape, (move / VOXEL).tolist())[None, None])
    assert (seen - expected).norm() <= 2e-4 * expected.norm()
    turn, size = torch.tensor([0.0, 30.0, 0.0]), torch.tensor([1.0, 1.1, 1.0])
    physics = DeformedProjection(
        ANGLES, shape, VOXEL, OPTICS, (36, 40), heights="none", axis_angles=turn, magnifications=size
    )
    x, y = 4.0, 2.0
    image = -physics.A(blob(shape, (x, y, 0.0))[None, None])[0, 0, 1]
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    image = image.clamp_min(0.3 * image.max()) - 0.3 * image.max()
    v = ((torch.arange(36) - 18)[:, None] * image).sum() / image.sum()
    u = ((torch.arange(40) - 20) * image).sum() / image.sum()
    assert (float(u), float(v)) == pytest.approx((1.1 * (x * c - y * s), 1.1 * (x * s + y * c)), abs=0.05)


def test_the_specimen_may_be_tilted_about_x():
    """A blob is seen where the blob at R_x r is seen, in each item of a batch by its own x-tilt."""
    shape, centre = (24, 26, 26), torch.tensor([3.0, -4.0, 2.0], dtype=torch.float64)
    tilts = torch.tensor([9.0, -30.0], dtype=torch.float64)
    physics = DeformedProjection(ANGLES, shape, VOXEL, OPTICS, (36, 40), heights="none", x_tilt=tilts)
    still = DeformedProjection(ANGLES, shape, VOXEL, OPTICS, (36, 40), heights="none")
    seen = physics.A(blob(shape, centre.tolist())[None, None].expand(2, 1, *shape))
    for i in range(2):
        expected = still.A(blob(shape, (rotation_x(tilts[i]) @ centre).tolist())[None, None])
        assert (seen[i] - expected[0]).norm() <= 2e-4 * expected.norm()
    with pytest.raises(ValueError, match="x_tilt: expected a finite number"):
        DeformedProjection(ANGLES, shape, VOXEL, OPTICS, x_tilt=float("nan"))


def test_no_matter_is_lost_where_the_specimen_is_stretched(generator):
    deformation = 8 * torch.randn(3, 3, 3, 3, 4, generator=generator, dtype=torch.float64)
    lens = OPTICS.replace(phase_shift=90.0)
    volume = blob(SHAPE, (1.0, 2.0, -1.0))[None, None]
    wide = (SHAPE[0], 40, 44)
    volume = torch.nn.functional.pad(volume, (9, 9, 10, 10))
    for given in (None, deformation):
        physics = DeformedProjection(ANGLES, wide, VOXEL, lens, deformation=given, heights="none")
        lines = physics._lines(volume[0], 0, 0)
        assert float(lines.sum()) == pytest.approx(float(volume.sum()), rel=1e-5)


@pytest.mark.parametrize("base", ["plane", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adjoint(base, dtype, generator):
    deformation = 10 * torch.randn(3, 3, 2, 3, 4, generator=generator, dtype=torch.float64)
    physics = DeformedProjection(
        ANGLES, SHAPE, VOXEL, OPTICS, (21, 25), heights=base, deformation=deformation, axis_angles=ANGLES / 10
    )
    x = torch.randn(2, 1, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(2, 1, 3, 21, 25, generator=generator, dtype=torch.float64).to(dtype)
    seen, back = physics.A(x), physics.A_adjoint(y)
    left, right = (seen.double() * y.double()).sum(), (x.double() * back.double()).sum()
    assert abs(left - right) <= (1e-12 if dtype == torch.float64 else 1e-6) * seen.double().norm() * y.double().norm()


@pytest.mark.parametrize("method", ["A", "A_adjoint"])
@pytest.mark.parametrize(
    "name", ["deformation", "axis_angles", "magnifications", "shifts", "angles", "defocus", "x_tilt"]
)
def test_gradients(name, method, generator):
    shape = (5, 8, 9)
    physics = DeformedProjection(ANGLES, shape, VOXEL, OPTICS, deformation=torch.zeros(3, 3, 2, 2, 3))
    x = torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64)
    y = torch.randn(1, 1, 3, *shape[1:], generator=generator, dtype=torch.float64)
    own = getattr(physics, name)
    start = own + 0.01 * torch.randn(own.shape, generator=generator, dtype=torch.float64)
    along = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    physics.update(angles=ANGLES * 1.1)  # room for steeper tilts
    physics.update(angles=ANGLES)

    def act(value):
        if method == "A":
            return (physics.A(x, **{name: value}) * y).sum()
        return (physics.A_adjoint(y, **{name: value}) * x).sum()

    value = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(act(value), value)
    with torch.no_grad():
        difference = (act(start + 1e-5 * along) - act(start - 1e-5 * along)) / 2e-5
    assert float((slope * along).sum()) == pytest.approx(float(difference), rel=1e-5, abs=1e-9)


def test_least_squares_with_the_right_deformation_is_sharper(generator):
    """Bent by some 10 Å rms, tilt by tilt: knowing it brings back what is blurred without."""
    shape, angles = (12, 24, 28), torch.linspace(-60, 60, 15, dtype=torch.float64)
    deformation = 20 * torch.randn(15, 3, 2, 3, 3, generator=generator, dtype=torch.float64)
    centres = (12 * torch.rand(8, 3, generator=generator) - 6) * torch.tensor([1, 1, 0.5])
    truth = torch.stack([blob(shape, c, 1.0) for c in centres.tolist()]).sum(0)
    truth = truth[None, None].float()
    lens = cs.Optics(300.0, torch.linspace(10000, 16000, 15))
    physics = DeformedProjection(angles, shape, VOXEL, lens, deformation=deformation, tolerance=1e-2)
    images = physics.A(truth)
    gamma = 100 / float(physics.squared_norm())
    errors = {}
    for name, given in (
        ("known", physics),
        ("unknown", ContrastProjection(angles, shape, VOXEL, lens, tolerance=1e-2)),
    ):
        errors[name] = float((given.prox_l2(None, images, gamma) - truth).norm() / truth.norm())
    assert errors["known"] < 0.7 * errors["unknown"], errors


@pytest.mark.parametrize(("n", "control"), [(1, 2), (9, 2), (10, 5)])
def test_spline_is_a_partition_of_one(n, control):
    basis = _spline(n, control)
    torch.testing.assert_close(basis.sum(1), torch.ones(n, dtype=torch.float64))
    assert (basis >= 0).all()


def test_bad_input():
    with pytest.raises(ValueError, match="deformation: expected"):
        DeformedProjection(ANGLES, SHAPE, VOXEL, OPTICS, deformation=torch.zeros(2, 3, 2, 2, 2))
    with pytest.raises(ValueError, match="axis_angles"):
        DeformedProjection(ANGLES, SHAPE, VOXEL, OPTICS, axis_angles=torch.zeros(4))
    with pytest.raises(ValueError, match="camera grid"):
        DeformedProjection(ANGLES, SHAPE, VOXEL, OPTICS, grid="stretched")


def test_it_takes_the_other_options():
    physics = DeformedProjection(ANGLES, SHAPE, VOXEL, OPTICS, heights="all", hand=-1)
    volume = blob(SHAPE, (1.0, 2.0, 1.5))[None, None]
    plain = EwaldProjection(ANGLES, SHAPE, VOXEL, OPTICS, hand=-1).A(volume)
    assert (physics.A(volume) - plain).norm() <= 1e-4 * plain.norm()
