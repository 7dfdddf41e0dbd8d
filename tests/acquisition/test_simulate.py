"""A simulated series: Poisson counts of a seed, and a defocus gradient under tilt without a formula for it."""

import math

import pytest
import torch

from cryosim.acquisition.simulate import Sampling, expected_exposure, sampling_for, simulate
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.constants import interaction_constant, wavelength
from cryosim.core.rotation import rotation_y, rotation_z
from cryosim.microscope.detector import Detector
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import projection
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.ice import Absorption, Ice
from cryosim.specimen.specimen import Poses, Specimen


def specimen_of(atoms, places=((0.0, 0.0, 0.0),), ice=None):
    places = torch.tensor(places, dtype=torch.float64)
    rotations = torch.eye(3, dtype=torch.float64).expand(len(places), 3, 3)
    return Specimen((atoms,), (Poses(rotations, places),), (200.0, 200.0, 60.0), ice)


def cluster(generator, n=8, b=80.0):
    positions = 2.5 * torch.randn(n, 3, generator=generator, dtype=torch.float64).clamp(-1.8, 1.8)
    return Atoms(positions, torch.tensor([6, 7, 8, 16])[torch.arange(n) % 4], torch.full((n,), b, dtype=torch.float64))


TILTS = TiltScheme(
    torch.tensor([0.0, 30.0, -45.0], dtype=torch.float64), torch.tensor([30.0, 10.0, 20.0], dtype=torch.float64)
)
OPTICS = Optics(defocus=8000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
DETECTOR = Detector((24, 21), 3.0)


def test_the_seed_decides_the_counts(generator):
    specimen = specimen_of(cluster(generator))
    one, same, other = (
        simulate(specimen, TILTS, OPTICS, DETECTOR, generator=torch.Generator().manual_seed(seed)).images
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("scattering", [None, projection])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_whole_and_follow_poisson(scattering, dtype, generator):
    specimen = specimen_of(cluster(generator), ice=Ice(300.0))
    choices = {} if scattering is None else {"scattering": scattering}
    sampling = sampling_for(DETECTOR, OPTICS, dtype=dtype)
    series = simulate(specimen, TILTS, OPTICS, DETECTOR, generator=generator, sampling=sampling, **choices)
    assert series.images.shape == (3, 24, 21)
    assert series.images.dtype == dtype
    assert (series.images >= 0).all()
    assert torch.equal(series.images, series.images.round())
    for i in range(3):
        mean = expected_exposure(specimen, TILTS, OPTICS, DETECTOR, i, sampling=sampling, **choices)
        z = (series.images[i] - mean).double() / mean.double().sqrt()
        assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
        assert float(z.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / z.numel()))


def test_vacuum_counts_are_the_dose(generator):
    vacuum = specimen_of(cluster(generator), places=((500.0, 0.0, 0.0),))
    series = simulate(vacuum, TILTS.index(slice(0, 1)), OPTICS, DETECTOR, generator=generator)
    per_pixel = 30.0 * 3.0**2
    assert float(series.images.mean()) == pytest.approx(per_pixel, abs=5 * math.sqrt(per_pixel / series.images.numel()))


@pytest.mark.parametrize("angle", [0.0, 60.0])
def test_ice_absorbs_more_the_longer_the_path(angle, generator):
    """exp(-2 sigma A V t / cos): the mean of a slab without molecules in view."""
    specimen = specimen_of(cluster(generator), places=((500.0, 0.0, 0.0),), ice=Ice(1000.0, inner_potential=4.5))
    tilts = TiltScheme(torch.tensor([angle], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64))
    mean = expected_exposure(
        specimen, tilts, OPTICS, DETECTOR, 0, sampling=sampling_for(DETECTOR, OPTICS, dtype=torch.float64)
    )
    path = 1000.0 / math.cos(math.radians(angle))
    wanted = 90 * math.exp(-2 * interaction_constant(300.0) * 0.07 * 4.5 * path)
    torch.testing.assert_close(mean, torch.full_like(mean, wanted), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("angle", "axis_angle"), [(45.0, 0.0), (-45.0, 0.0), (45.0, 90.0), (30.0, -85.0)])
@pytest.mark.parametrize("z", [0.0, 40.0])
def test_the_defocus_changes_across_a_tilted_image(angle, axis_angle, z, generator):
    """A cluster at (x, 0, z) is lifted to z cos t - x sin t, and seen as one in the middle at defocus + that.

    To 2e-3 of its contrast: the rest is the linear sharing of atoms between slices (here 2 Å).
    """
    t = math.radians(angle)
    pixel, half = 2.0, 16
    lands = 44 * pixel  # from the axis [Å]
    molecule = cluster(generator)
    optics = Optics(defocus=500.0, spherical_aberration=2.7, amplitude_contrast=0.07)
    sampling = Sampling(shape=(270, 270), pixel_size=4 / 3, thickness=2.0, dtype=torch.float64, width=10)

    def seen(place, defocus):
        tilts = TiltScheme(
            torch.tensor([angle], dtype=torch.float64), torch.ones(1, dtype=torch.float64), axis_angle=axis_angle
        )
        return expected_exposure(
            specimen_of(molecule, (place,)),
            tilts,
            optics.replace(defocus=defocus),
            Detector((180, 180), pixel),
            0,
            sampling=sampling,
        )

    wrong = []
    for u in (lands, -lands):
        x = (u - z * math.sin(t)) / math.cos(t)
        height = z * math.cos(t) - x * math.sin(t)
        # where it lands in the image plane, turned by the axis angle
        centre = rotation_z(axis_angle) @ rotation_y(angle) @ torch.tensor([x, 0.0, z], dtype=torch.float64)
        steps = centre[:2] / pixel
        rest = torch.tensor(
            [*((steps - steps.round()) * pixel), 0.0], dtype=torch.float64
        )  # where it lands between pixels
        place = (rotation_y(-angle) @ rotation_z(-axis_angle) @ rest).tolist()
        cx, cy = (int(s) + 90 for s in steps.round())
        patch = seen((x, 0.0, z), 500.0)[cy - half : cy + half, cx - half : cx + half]
        middle = (slice(90 - half, 90 + half),) * 2
        wanted = seen(place, 500.0 + height)[middle]
        contrast = (wanted - pixel**2).norm()
        assert (patch - wanted).norm() < 2e-3 * contrast
        wrong.append(float((patch - seen(place, 500.0 - height)[middle]).norm() / contrast))
    assert min(wrong) > 2e-2, "the test could not see a gradient of the wrong sign"


def test_shifts_displace_the_content(generator):
    """+x, +y by whole pixels, periodic field aside."""
    specimen = specimen_of(cluster(generator))
    sampling = Sampling(shape=(60, 66), pixel_size=2.0, thickness=4.0, dtype=torch.float64, width=14)
    tilts = TiltScheme(
        TILTS.angles, TILTS.doses, torch.tensor([[0.0, 0.0], [9.0, -6.0], [-3.0, 12.0]], dtype=torch.float64)
    )
    optics = OPTICS.replace(defocus=1000.0)
    for i, shift in enumerate(tilts.shifts.tolist()):
        moved = expected_exposure(specimen, tilts, optics, Detector((40, 44), 3.0), i, sampling=sampling)
        still = expected_exposure(specimen, TILTS, optics, Detector((40, 44), 3.0), i, sampling=sampling)
        back = torch.roll(moved, (-round(shift[1] / 3), -round(shift[0] / 3)), (0, 1))
        torch.testing.assert_close(back, still, rtol=1e-7, atol=0)


def test_optics_of_each_tilt(generator):
    specimen = specimen_of(cluster(generator))
    optics = OPTICS.replace(defocus=torch.tensor([2000.0, 4000.0, 6000.0], dtype=torch.float64))
    sampling = sampling_for(DETECTOR, optics)
    for i in range(3):
        one = OPTICS.replace(defocus=2000.0 * (i + 1))
        torch.testing.assert_close(
            expected_exposure(specimen, TILTS, optics, DETECTOR, i, sampling=sampling),
            expected_exposure(specimen, TILTS, one, DETECTOR, i, sampling=sampling),
        )


def test_expected_counts_are_differentiable_in_the_tilt(generator):
    """From one tilt angle and one shift, through specimen and microscope, to the counts."""
    specimen = specimen_of(cluster(generator), ((5.0, -4.0, 3.0),), Ice(200.0))
    weights = torch.randn(24, 21, generator=generator, dtype=torch.float64)
    sampling = Sampling(shape=(48, 45), pixel_size=2.0, thickness=4.0, dtype=torch.float64, width=14)

    def score(angle, x):
        shifts = torch.stack([x, torch.zeros_like(x)])[None]
        tilts = TiltScheme(angle[None], torch.ones(1, dtype=torch.float64), shifts)
        return (expected_exposure(specimen, tilts, OPTICS, DETECTOR, 0, sampling=sampling) * weights).sum()

    at = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (20.3, 1.4)]
    gradients = torch.autograd.grad(score(*at), at)
    with torch.no_grad():
        slopes = [
            (score(at[0] + a, at[1] + b) - score(at[0] - a, at[1] - b)) / (2 * (a + b))
            for a, b in ((1e-4, 0.0), (0.0, 1e-4))
        ]
    assert [float(g) for g in gradients] == pytest.approx([float(s) for s in slopes], rel=1e-5)


def test_sampling_reaches_the_corners_of_the_detectors_band():
    detector, optics = Detector((100, 81), 1.8), Optics(defocus=30000.0)
    sampling = sampling_for(detector, optics)
    edge = (2 / 3) / (2 * sampling.pixel_size)
    assert edge == pytest.approx(math.sqrt(2) / (2 * 1.8))
    margin = wavelength(300.0) * 30000.0 / (2 * 1.8)  # how far along an axis the defocus carries such a wave
    for n, m in zip(sampling.shape, detector.shape, strict=True):
        assert n * sampling.pixel_size >= m * 1.8 + 2 * margin
    assert math.pi * wavelength(300.0) * sampling.thickness * edge**2 <= 0.1 + 1e-12


def test_sampling_choices_are_kept_and_checked():
    assert sampling_for(DETECTOR, OPTICS, thickness=1.0, shape=(64, 60)).shape == (64, 60)
    with pytest.raises(TypeError):
        sampling_for(DETECTOR, OPTICS, slice_thickness=1.0)


def test_progress_counts_exposures(generator):
    seen = []
    simulate(
        specimen_of(cluster(generator)),
        TILTS,
        OPTICS,
        DETECTOR,
        generator=generator,
        progress=lambda *n: seen.append(n),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_doses_can_be_counted(generator):
    tilts = TILTS.replace(doses=torch.tensor([1.0, 1e18, 1.0]))
    with pytest.raises(ValueError, match="doses between 0 and"):
        simulate(specimen_of(cluster(generator)), tilts, OPTICS, DETECTOR, generator=generator)


def test_a_detector_larger_than_the_sampling(generator):
    sampling = Sampling(shape=(24, 24), pixel_size=2.0, thickness=4.0)
    with pytest.raises(ValueError, match="beyond the simulated field"):
        simulate(specimen_of(cluster(generator)), TILTS, OPTICS, DETECTOR, generator=generator, sampling=sampling)


def test_optics_fit_the_tilts(generator):
    nine = OPTICS.replace(defocus=torch.linspace(1e3, 2e3, 9))
    with pytest.raises(ValueError, match="Optics.defocus: expected one number or one for each of 3 tilts"):
        simulate(specimen_of(cluster(generator)), TILTS, nine, DETECTOR, generator=generator)


def test_a_tilted_beam_finds_its_field_in_the_sampling():
    """It moves the image by defocus * tilt: the field grows by that much, so that nothing comes in again beside it."""
    detector, optics = Detector((32, 32), 4.0), Optics(defocus=20000.0)
    straight, tilted = (sampling_for(detector, o) for o in (optics, optics.replace(beam_tilt=(4.0, 0.0))))
    grown = (tilted.shape[1] - straight.shape[1]) * straight.pixel_size
    assert grown > 2 * 0.95 * 80.0
    lossy = optics.replace(chromatic_aberration=2.7, slit=math.inf)
    assert sampling_for(detector, lossy).shape[0] > straight.shape[0]


def test_absorbing_twice_is_warned_of():
    atom = Atoms([[0.0, 0.0, 0.0]], [6])
    here = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    specimen = Specimen((atom,), (here,), (20.0, 20.0, 20.0), Ice(100.0), Absorption())
    tilts, detector = TiltScheme.dose_symmetric(0, 1, 10), Detector((12, 12), 2.0)
    with pytest.warns(UserWarning, match="give one of the two"):
        expected_exposure(specimen, tilts, Optics(amplitude_contrast=0.07), detector, 0)
