"""Projections through the lens against analytic images, multislice, the normal equations, and each other."""

import math
import warnings

import pytest
import torch

import cryosim as cs
from cryosim.core.fourier import band_limit
from cryosim.microscope.optics import ctf
from inverse.metrics.fsc import fsc
from inverse.physics.contrast import ContrastProjection, EwaldProjection, fading_by_tilt
from inverse.solvers.linear import least_squares

VOXEL = 2.0  # [Å]
WIDTH = 3.0  # of a blob [Å]
ANGLES = torch.tensor([-55.0, -20.0, 0.0, 35.0, 60.0], dtype=torch.float64)
OPTICS = cs.Optics(60.0, 1500.0, astigmatism=300.0, astigmatism_angle=25.0, amplitude_contrast=0.07)


def blobs(shape, generator, n=6, flat=False):
    """Volume (z, y, x) [V] of n Gaussian blobs well inside the box, their centres (n, 3) [Å] and heights [V]."""
    half = torch.tensor([s * VOXEL / 2 for s in shape[::-1]], dtype=torch.float64) - 6 * WIDTH
    centres = (2 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 1) * half.clamp_min(0)
    if flat:
        centres[:, 2] = 0
    heights = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    axes = [(torch.arange(m, dtype=torch.float64) - m // 2) * VOXEL for m in shape[::-1]]
    x, y, z = (torch.exp(-((a - c[:, None]) ** 2) / (2 * WIDTH**2)) for a, c in zip(axes, centres.T, strict=True))
    return torch.einsum("n,nz,ny,nx->zyx", heights, z, y, x), centres, heights


def turned(centres, angle):
    t = math.radians(angle)
    x, y, z = centres.T
    return x * math.cos(t) + z * math.sin(t), y, -x * math.sin(t) + z * math.cos(t)


def analytic(centres, heights, shape, optics, angle, hand=1, shift=(0.0, 0.0)):
    """Contrast (y, x): a Gaussian column has the phase pi lambda w k^2 of its height, and the mean over its length."""
    u, v, w = turned(centres, angle)
    ky = torch.fft.fftfreq(shape[0], VOXEL, dtype=torch.float64)[:, None]
    kx = torch.fft.fftfreq(shape[1], VOXEL, dtype=torch.float64)
    k2, wave = kx**2 + ky**2, cs.wavelength(optics.voltage)
    spectrum = torch.zeros(shape, dtype=torch.complex128)
    for height, x, y, z in zip(heights, u + shift[0], v + shift[1], w, strict=True):
        column = height * (2 * math.pi) ** 1.5 * WIDTH**3 * torch.exp(-2 * math.pi**2 * WIDTH**2 * k2)
        column = column * torch.exp(-((math.pi * wave * k2 * WIDTH) ** 2) / 2)
        place = torch.polar(torch.ones_like(k2), -2 * math.pi * (kx * x + ky * y))
        spectrum += column * place * ctf(optics.replace(defocus=optics.defocus + hand * float(z)), shape, VOXEL)
    image = torch.fft.ifft2(spectrum).real / VOXEL**2
    return 2 * cs.interaction_constant(optics.voltage) * torch.fft.fftshift(image)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "image"), [((28, 40, 48), None), ((27, 39, 47), (45, 51))])
@pytest.mark.parametrize("hand", [1, -1])
def test_blobs_have_the_defocus_of_their_height(shape, image, dtype, hand, generator):
    """In the middle of a field so wide that what the lens carries to its edges does not come back."""
    volume, centres, heights = blobs(shape, generator)
    physics = EwaldProjection(ANGLES, shape, VOXEL, OPTICS, image, hand=hand)
    seen = physics.A(volume.to(dtype)[None, None])[0, 0].double()
    ny, nx = physics.image_shape
    wide = (ny + 160, nx + 160)
    for angle, mine in zip(ANGLES.tolist(), seen, strict=True):
        whole = analytic(centres, heights, wide, OPTICS, angle, hand)
        y, x = wide[0] // 2 - ny // 2, wide[1] // 2 - nx // 2
        expected = whole[y : y + ny, x : x + nx]
        assert (mine - expected).norm() <= (2e-5 if dtype == torch.float64 else 3e-5) * expected.norm()


def test_the_plane_explains_a_flat_specimen_and_one_defocus_does_not(generator):
    volume, centres, heights = blobs((24, 40, 96), generator, flat=True)
    error = {}
    for name in ("none", "plane", "all"):
        physics = ContrastProjection(ANGLES, (24, 40, 96), VOXEL, OPTICS, (40, 96), heights=name)
        seen = physics.A(volume[None, None])[0, 0, -1]
        expected = analytic(centres, heights, (200, 256), OPTICS, 60.0)[80:120, 80:176]
        error[name] = float((seen - expected).norm() / expected.norm())
    assert error["all"] < 1e-5 and error["plane"] < 0.005 and error["none"] > 0.025


@pytest.mark.parametrize("angle", [0.0, 40.0])
@pytest.mark.parametrize("voltage", [15.0, 60.0])
def test_ewald_is_weak_multislice(angle, voltage, generator):
    """Slices of the turned blobs, thin and weak, sent through multislice."""
    optics, n, thin = cs.Optics(voltage, 400.0, spherical_aberration=0.0), 96, 1.0
    volume, centres, heights = blobs((32, 40, 40), generator)
    weak = 1e-4
    u, v, w = turned(centres, angle)
    axis = (torch.arange(n, dtype=torch.float64) - n // 2) * VOXEL
    levels = (torch.arange(121, dtype=torch.float64) - 60) * thin
    edges = torch.cat([levels - thin / 2, levels[-1:] + thin / 2])
    share = 0.5 * torch.erf((edges - w[:, None]) / (WIDTH * 2**0.5)).diff(dim=1) * WIDTH * (2 * math.pi) ** 0.5
    x, y = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * WIDTH**2)) for c in (u, v))
    slices = cs.Slices(weak * torch.einsum("n,nz,ny,nx->zyx", heights, share, y, x), VOXEL, thin)
    expected = (cs.image(cs.multislice(slices, optics), optics, VOXEL) - 1) / weak
    kept = band_limit((n, n), dtype=torch.float64)  # all that multislice keeps

    def off(**options):
        physics = ContrastProjection([angle], (32, 40, 40), VOXEL, optics, (n, n), **options)
        rest = torch.fft.fft2(physics.A(volume[None, None])[0, 0, 0] - expected) * kept
        return float(rest.norm() / (torch.fft.fft2(expected) * kept).norm())

    assert off(heights="all") <= 2e-6 and off(heights="none") > 0.01


def test_the_other_hand_is_the_mirrored_specimen(generator):
    shape = (15, 12, 21)
    volume = torch.randn(shape, generator=generator, dtype=torch.float64)[None, None]
    one = EwaldProjection(ANGLES, shape, VOXEL, OPTICS, hand=-1).A(volume)
    other = EwaldProjection(-ANGLES, shape, VOXEL, OPTICS).A(volume.flip(2))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_shifts_displace_the_content(generator):
    volume, centres, heights = blobs((24, 32, 40), generator)
    shifts = torch.tensor([3.3, -5.1], dtype=torch.float64).expand(len(ANGLES), 2)
    physics = EwaldProjection(ANGLES, (24, 32, 40), VOXEL, OPTICS, (60, 60), shifts=shifts)
    seen = physics.A(volume[None, None])[0, 0, 3]
    expected = analytic(centres, heights, (220, 220), OPTICS, 35.0, shift=(3.3, -5.1))[80:140, 80:140]
    assert (seen - expected).norm() <= 2e-5 * expected.norm()


def test_what_fades_is_weaker(generator):
    volume = torch.randn(8, 12, 16, generator=generator, dtype=torch.float64)[None, None]
    strengths = torch.linspace(1, 0.2, len(ANGLES), dtype=torch.float64)
    plain = ContrastProjection(ANGLES, (8, 12, 16), VOXEL, OPTICS)
    faded = ContrastProjection(ANGLES, (8, 12, 16), VOXEL, OPTICS, fading=lambda k2: 0 * k2 + strengths[:, None, None])
    torch.testing.assert_close(faded.A(volume), plain.A(volume) * strengths[:, None, None], rtol=0, atol=1e-12)


def test_damage_fades_each_tilt_by_the_dose_before_it():
    """A plane wave along y at the height 0 comes out weaker by what `cryosim.fading` leaves of its frequency."""
    tilts = cs.TiltScheme.dose_symmetric(60, 30, 100.0)
    damage, n, m = cs.Damage(), 16, 3
    wave = torch.cos(2 * torch.pi * m * torch.arange(n, dtype=torch.float64) / n)
    volume = torch.zeros(1, 1, 8, n, n, dtype=torch.float64)
    volume[0, 0, 4] = wave[:, None]
    left = fading_by_tilt(damage, tilts, 300.0)
    plain, faded = (
        ContrastProjection(tilts.angles, (8, n, n), VOXEL, OPTICS, grid="stretched", heights="none", fading=f).A(volume)
        for f in (None, left)
    )
    k2 = torch.tensor((m / (n * VOXEL)) ** 2, dtype=torch.float64)
    expected = torch.stack([cs.fading(damage, k2, tilts.moment(i), 300.0) for i in range(len(tilts))])
    ratio = (faded * plain).sum((0, 1, 3, 4)) / plain.square().sum((0, 1, 3, 4))
    torch.testing.assert_close(ratio, expected, rtol=1e-9, atol=0)
    assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize(("shape", "odd"), [((10, 12, 32), False), ((9, 11, 31), True)])
def test_closed_form_solves_the_normal_equations(shape, odd, generator):
    optics = OPTICS.replace(coma=2e4, coma_angle=30.0) if odd else OPTICS
    physics = ContrastProjection(ANGLES, shape, VOXEL, optics, grid="stretched", heights="none")
    z = torch.randn(2, 1, *shape, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 1, len(ANGLES), *shape[1:], generator=generator, dtype=torch.float64)
    gamma = 3 / float(physics.squared_norm())
    x = physics.prox_l2(z, y, gamma)
    rest = gamma * physics.A_adjoint(physics.A(x) - y) + x - z
    assert rest.norm() <= 1e-9 * (gamma * physics.A_adjoint(y)).norm()


@pytest.mark.parametrize("heights", ["none", "plane", "all"])
@pytest.mark.parametrize(("damping", "iterations"), [(0.1, 15), (0.01, 35)])
def test_prox_on_the_camera_grid_in_few_iterations(heights, damping, iterations, generator):
    """In units of |A|^2. Half the lines of so small an image lie within reach of its edges."""
    physics = ContrastProjection(
        torch.linspace(-60, 60, 21), (24, 32, 48), 4.0, cs.Optics(300.0, 20000.0), heights=heights, tolerance=1e-5
    )
    y = torch.randn(1, 1, 21, 32, 48, generator=generator, dtype=torch.float64)
    gamma = 1 / (damping * float(physics.squared_norm()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = physics.prox_l2(None, y, gamma, max_iter=iterations)  # warns where they do not suffice
    rest = gamma * physics.A_adjoint(physics.A(x) - y) + x
    assert rest.norm() <= 2e-5 * (gamma * physics.A_adjoint(y)).norm()


def test_the_curved_sphere_gives_back_what_straight_slices_lose(generator):
    """At 10 kV and 72 Å, beyond d = sqrt(lambda t / 0.7) = 3.5 Å; the wrong hand is worse than none."""
    shape, voxel = (48, 10, 40), 1.5
    angles = torch.linspace(-60, 60, 31, dtype=torch.float64)
    focus = torch.tensor([200.0, 350.0, 500.0]).repeat(11)[:31]  # no frequency is lost in all tilts
    lens = cs.Optics(10.0, focus, spherical_aberration=0.0)
    truth = torch.zeros(shape, dtype=torch.float64)
    truth[:, 2:8, 8:32] = torch.randn(48, 6, 24, generator=generator, dtype=torch.float64)
    seen = EwaldProjection(angles, shape, voxel, lens).A(truth[None, None])
    found = {}
    for name, options in {
        "curved": {"heights": "all"},
        "straight": {"heights": "none"},
        "wrong": {"heights": "all", "hand": -1},
    }.items():
        physics = ContrastProjection(angles, shape, voxel, lens, tolerance=1e-3, **options)
        back = least_squares(physics, seen, 0.01 * physics.squared_norm())[0, 0]
        shells = fsc(truth, back, voxel)
        fine = (shells.frequency > 1 / 3.5) & (shells.frequency < 1 / 3.1)
        found[name] = float(shells.correlation[fine].mean())
    assert found["curved"] > found["straight"] + 0.1 and found["straight"] > found["wrong"] + 0.05, found


PARAMETERS = ["angles", "defocus", "astigmatism", "astigmatism_angle", "phase_shift", "shifts"]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("method", ["A", "A_adjoint", "prox"])
def test_gradients_in_the_parameters(name, method, generator):
    shape = (5, 6, 9)
    physics = EwaldProjection(ANGLES[:3], shape, VOXEL, OPTICS, tolerance=1e-12, max_iterations=60)
    volume = torch.randn(2, 1, *shape, generator=generator, dtype=torch.float64)
    images = torch.randn(2, 1, 3, *shape[1:], generator=generator, dtype=torch.float64)
    norm = float(physics.squared_norm()) ** 0.5
    own = getattr(physics, name)
    physics.update(angles=torch.cat([physics.angles - 2, physics.angles + 2]))  # the field holds steeper tilts
    physics.update(angles=ANGLES[:3])
    start = torch.cat([own, own + 0.7])  # each item its own
    weights, along = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (volume.shape, start.shape))

    def act(value):
        if method == "prox":
            physics.update(**{name: value})
            return (physics.prox_l2(volume, images / norm, 1 / norm**2) * weights).sum()
        if method == "A":
            return (physics.A(volume, **{name: value}) * images).sum()
        return (physics.A_adjoint(images, **{name: value}) * weights).sum()

    value = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(act(value), value)
    step = 1e-4
    with torch.no_grad():
        difference = (act(start + step * along) - act(start - step * along)) / (2 * step)
    assert float((slope * along).sum()) == pytest.approx(float(difference), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voxel_size": 0.0}, "voxel_size: expected a positive"),
        ({"heights": "slabs"}, "heights: expected"),
        ({"hand": 0}, "hand: expected"),
        ({"shifts": torch.zeros(4, 2)}, "shifts: expected"),
        ({"optics": cs.Optics(300.0, torch.zeros(4))}, "Optics.defocus"),
        ({"accuracy": 0.0}, "accuracy"),
    ],
)
def test_bad_input(options, message):
    given = {"voxel_size": VOXEL, "optics": OPTICS} | options
    with pytest.raises(ValueError, match=message):
        ContrastProjection(ANGLES, (4, 5, 6), **given)


def test_parameters_of_another_number_of_tilts():
    physics = ContrastProjection(ANGLES, (4, 5, 6), VOXEL, OPTICS)
    with pytest.raises(ValueError, match="defocus: expected"):
        physics.update(defocus=torch.zeros(3))
