"""Exposures in frames: doses in their order, damage and motion frame by frame, frames put together again."""

import warnings

import pytest
import torch

import cryosim as cs
from cryosim.microscope.events import histogram
from cryosim.specimen.motion import Motion
from cryosim.specimen.specimen import Poses

OPTICS = cs.Optics(300.0, 8000.0, amplitude_contrast=0.07)
SAMPLING = cs.Sampling((64, 64), 0.9, 5.0, dtype=torch.float64)
DETECTOR = cs.Detector((25, 24), 1.8)


def specimen(generator, damage=None, motion=None):
    atoms = cs.Atoms(20 * torch.rand(60, 3, generator=generator, dtype=torch.float64) - 10, [6] * 60)
    here = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    return cs.Specimen((atoms,), (here,), (40.0, 40.0, 40.0), damage=damage, motion=motion)


# the scheme -----------------------------------------------------------------------------------------------------------


def test_dose_follows_the_order_of_exposure():
    """In a dose-symmetric series the first tilt is fresh and the last, the steepest, has seen all the others."""
    tilts = cs.TiltScheme.dose_symmetric(60, 3, 120.0).replace(frames=4)
    dose = 120 / 41
    for which in (0, 7, 40, -1):
        for frame in (0, 3):
            moment = tilts.moment(which, frame)
            row = which % 41
            assert float(moment.start) == pytest.approx(row * dose + frame * dose / 4)
            assert float(moment.during) == pytest.approx(dose / 4)
            assert moment.tilt == row
    assert float(tilts.angles[0]) == 0 and abs(float(tilts.angles[-1])) == 60


def test_doses_of_times():
    tilts = cs.TiltScheme.timed([0.0, 3.0, -3.0], [1.0, 2.0, 0.5], 2.5, frames=2)
    torch.testing.assert_close(tilts.doses, torch.tensor([2.5, 5.0, 1.25], dtype=torch.float64))
    torch.testing.assert_close(tilts.exposure_times, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    assert [tilts.camera_frames(i, 240.0) for i in range(3)] == [120, 240, 60]
    assert cs.TiltScheme([0.0], [1e-6]).camera_frames(0, 240.0) == 1


def test_as_many_times_as_tilts():
    with pytest.raises(ValueError, match="expected 2 times"):
        cs.TiltScheme.timed([0.0, 3.0], [1.0, 1.0, 1.0], 3.0)
    with pytest.raises(ValueError, match="divides the extent"):
        cs.TiltScheme.dose_symmetric(extent=float("inf"))


def test_steep_tilts_get_more_where_it_is_asked_for():
    tilts = cs.TiltScheme.dose_symmetric(60, 30, 50.0)
    even = tilts.thickness_compensated(2000.0, 3000.0)
    passed = even.doses * torch.exp(-2000 / 3000 / torch.cos(torch.deg2rad(even.angles)))
    torch.testing.assert_close(passed, passed[:1].expand(5))
    for made in (even, tilts.cosine_compensated(1.5)):
        assert float(made.doses.sum()) == pytest.approx(50.0)
    by_cosine = tilts.cosine_compensated()
    assert float(by_cosine.doses[-1] / by_cosine.doses[0]) == pytest.approx(2.0)
    torch.testing.assert_close(tilts.cosine_compensated(0.0).doses, tilts.doses)


@pytest.mark.parametrize(
    "fields",
    [
        {"frames": 0},
        {"frames": 1.5},
        {"frames": 2.0},
        {"frames": float("nan")},
        {"dose_rate": 0.0},
        {"dose_rate": float("inf")},
    ],
)
def test_schemes_that_cannot_be(fields):
    with pytest.raises(ValueError, match=f"TiltScheme.{next(iter(fields))}"):
        cs.TiltScheme([0.0], [1.0], **fields)


@pytest.mark.parametrize("doses", [[1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_doses_that_cannot_be(doses):
    with pytest.raises(ValueError, match="TiltScheme.doses"):
        cs.TiltScheme([0.0, 3.0], doses)


def test_a_camera_that_is_too_slow_is_said(generator):
    """12 e-/px and second on a Falcon 4i: 0.05 a frame, of which (1 - exp(-nA)) / nA = 68 % are told apart."""
    tilts = cs.TiltScheme([0.0], [1.0], dose_rate=3.0)
    camera = cs.Detector.falcon4i((25, 24), 2.0)
    with pytest.warns(cs.SamplingWarning, match=r"records 6[0-9]% .*set TiltScheme.dose_rate"):
        cs.simulate(specimen(generator), tilts, OPTICS, camera, sampling=SAMPLING, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dose_rate")
        slower = tilts.replace(dose_rate=1.0)
        cs.simulate(specimen(generator), slower, OPTICS, camera, sampling=SAMPLING, generator=generator)
        cs.simulate(specimen(generator), tilts, OPTICS, DETECTOR, sampling=SAMPLING, generator=generator)


def test_motion_that_frames_cannot_follow_is_said(generator):
    tilts = cs.TiltScheme([0.0], [4.0], frames=4)
    drift = torch.tensor([1.0, 0.0, 0.0]) * torch.arange(4.0)[None, :, None]
    how = {"sampling": SAMPLING, "generator": generator}
    with pytest.warns(cs.SamplingWarning, match=r"up to 3 Å .* Right would be 7 frames"):
        cs.simulate(specimen(generator, motion=Motion(3 * drift)), tilts, OPTICS, DETECTOR, **how)
    with pytest.warns(cs.SamplingWarning, match="exposures have one frame"):
        cs.simulate(specimen(generator, motion=Motion(drift[:, 1:2])), tilts.replace(frames=1), OPTICS, DETECTOR, **how)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="simulate: the specimen")
        cs.simulate(specimen(generator, motion=Motion(drift)), tilts, OPTICS, DETECTOR, **how)
        cs.simulate(
            specimen(generator, motion=Motion(0 * drift[:, :1])), tilts.replace(frames=1), OPTICS, DETECTOR, **how
        )


def test_frames_that_are_not_there():
    tilts = cs.TiltScheme([0.0, 3.0], [1.0, 1.0], frames=2)
    with pytest.raises(ValueError, match=r"Moment.frame: expected 0 to 1"):
        tilts.moment(0, 2)
    with pytest.raises(IndexError):
        tilts.moment(2)


# expected frames ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3])
def test_a_specimen_that_does_not_change_is_shared_evenly(frames, generator):
    tilts = cs.TiltScheme([10.0, -20.0], [4.0, 6.0], frames=frames)
    seen = cs.expected_frames(specimen(generator), tilts, OPTICS, DETECTOR, 1, sampling=SAMPLING)
    assert seen.shape == (frames, 25, 24)
    torch.testing.assert_close(seen, seen[:1].expand(frames, -1, -1))
    once = tilts.replace(frames=1)
    generator.manual_seed(20240117)
    whole = cs.expected_exposure(specimen(generator), once, OPTICS, DETECTOR, 1, sampling=SAMPLING)
    torch.testing.assert_close(seen.sum(0), whole)


def test_the_number_of_frames_hardly_matters_to_a_weak_specimen(generator):
    """A frame holds the mean of its amplitudes, so their number enters in second order of the potential alone."""
    fading = specimen(generator, cs.Damage())
    images = [
        cs.expected_exposure(fading, cs.TiltScheme([0.0], [30.0], frames=n), OPTICS, DETECTOR, 0, sampling=SAMPLING)
        for n in (1, 2, 6)
    ]
    contrast = images[2] - images[2].mean()
    for image in images[:2]:
        assert float((image - images[2]).norm() / contrast.norm()) < 0.02
    assert float((images[0] - images[2]).norm()) > float((images[1] - images[2]).norm())


def test_later_exposures_are_weaker(generator):
    """Of two exposures at one angle the second has seen the dose of the first: its detail is the weaker."""
    tilts = cs.TiltScheme([0.0, 0.0], [40.0, 40.0], frames=2)
    seen = [
        cs.expected_frames(
            specimen(torch.Generator().manual_seed(1), cs.Damage()), tilts, OPTICS, DETECTOR, i, sampling=SAMPLING
        )
        for i in (0, 1)
    ]
    strengths = [float(frame.std()) for exposure in seen for frame in exposure]
    assert strengths == sorted(strengths, reverse=True)
    torch.testing.assert_close(seen[0].mean(), seen[1].mean(), rtol=1e-3, atol=0)


def test_some_frames_alone(generator):
    tilts = cs.TiltScheme([15.0], [40.0], frames=4)
    fading = specimen(generator, cs.Damage())
    every = cs.expected_frames(fading, tilts, OPTICS, DETECTOR, 0, sampling=SAMPLING)
    some = cs.expected_frames(fading, tilts, OPTICS, DETECTOR, 0, [3, 1], sampling=SAMPLING)
    torch.testing.assert_close(some, every[[3, 1]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_side_by_side_are_those_one_by_one(dtype, generator, monkeypatch):
    """Also with absorption, and for all classes of atoms."""
    atoms = specimen(generator).molecules[0].replace(classes=torch.arange(60) % 6)
    damage = cs.Damage(cs.CriticalExposure(), 1.0, torch.tensor([0, 0.1, 0.2, 0.3, 0, 0.1]))
    fading = specimen(generator, damage).replace(molecules=(atoms,), ice=cs.Ice(45.0), absorption=cs.Absorption())
    optics, sampling = OPTICS.replace(amplitude_contrast=0.0), SAMPLING.replace(dtype=dtype)
    tilts = cs.TiltScheme([25.0], [30.0], frames=5)
    seen = []
    for pixels in (1, 2 * 64 * 64, 2**23):
        monkeypatch.setattr("cryosim.acquisition.simulate.LARGEST_BATCH", pixels)
        seen.append(cs.expected_frames(fading, tilts, optics, DETECTOR, 0, sampling=sampling))
    assert not torch.allclose(seen[0][0], seen[0][4], rtol=1e-3)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=tolerance, atol=0)


# the series -----------------------------------------------------------------------------------------------------------


def test_frames_do_not_change_a_series_that_does_not_change():
    """The same seed gives the same counts, whether or not an exposure is cut into frames."""
    still, counted = specimen(torch.Generator().manual_seed(1)), []
    for frames in (1, 5):
        tilts = cs.TiltScheme([0.0, 30.0], [10.0, 10.0], frames=frames)
        seed = torch.Generator().manual_seed(2)
        counted.append(cs.simulate(still, tilts, OPTICS, DETECTOR, sampling=SAMPLING, generator=seed).images)
    assert torch.equal(*counted)


@pytest.mark.parametrize("workers", [1, 3])
def test_movies_add_up_to_the_images(workers, generator):
    tilts = cs.TiltScheme([0.0, 30.0, -30.0], [10.0, 12.0, 14.0], frames=3)
    kept = {}
    series = cs.simulate(
        specimen(generator, cs.Damage()),
        tilts,
        OPTICS,
        DETECTOR,
        sampling=SAMPLING,
        generator=generator,
        movies=lambda i, frames: kept.__setitem__(i, frames),
        workers=workers,
    )
    assert sorted(kept) == [0, 1, 2]
    for i, frames in kept.items():
        assert frames.shape == (3, 25, 24)
        assert torch.equal(frames.sum(0), series.images[i])


def test_electrons_add_up_to_the_images(generator):
    """Every electron told one by one: frames of the camera, places within pixels, one hit a frame and pixel at most."""
    tilts = cs.TiltScheme([0.0, 30.0], [10.0, 12.0], frames=2, dose_rate=20.0)
    camera = cs.Detector.falcon4i((25, 24), 1.8)
    kept = []
    series = cs.simulate(
        specimen(generator, cs.Damage()),
        tilts,
        OPTICS,
        camera,
        sampling=SAMPLING,
        generator=generator,
        movies=lambda i, frames: kept.append(frames),
        supersampling=4,
    )
    for i, frames in enumerate(kept):
        assert [events.shape for events in frames] == [(tilts.camera_frames(i, 240.0), 25, 24)] * 2
        assert torch.equal(sum(histogram(events) for events in frames).to(series.images), series.images[i])
        for events in frames:
            pixel = (events.frame * 25 + events.y.floor().long()) * 24 + events.x.floor().long()
            assert len(pixel.unique()) == len(pixel)


def test_gain_and_defects_are_taken_out(generator):
    """Flat images of an uneven camera come back flat, but for the noise."""
    gain = 1 + 0.2 * torch.rand(25, 24, generator=generator, dtype=torch.float64)
    gain = gain / gain.mean()
    gain[3, 4] = 0
    dark = torch.zeros(25, 24)
    dark[10, 11] = 0.5
    camera = DETECTOR.replace(gain=gain, dark=dark)
    empty = specimen(generator).replace(molecules=(cs.Atoms(torch.full((1, 3), 500.0), [6]),))
    tilts = cs.TiltScheme([0.0], [4000.0])
    (image,) = cs.simulate(empty, tilts, OPTICS, camera, sampling=SAMPLING, generator=generator).images
    mean = 4000 * 1.8**2
    assert float(image.mean()) == pytest.approx(mean, rel=2e-3)
    assert float(((image - mean) / mean).abs().max()) < 5 / mean**0.5 * 1.2


# frames put together --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 25), (25, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shift_and_its_adjoint(shape, dtype, generator):
    images = torch.randn(2, 3, *shape, generator=generator, dtype=dtype)
    other = torch.randn(2, 3, *shape, generator=generator, dtype=dtype)
    shifts = 5 * torch.randn(2, 3, 2, generator=generator, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    whole = torch.tensor([3.0, -2.0], dtype=dtype)
    torch.testing.assert_close(cs.shifted(images, whole), images.roll((-2, 3), (-2, -1)), rtol=0, atol=tolerance * 10)
    left, right = (cs.shifted(images, shifts) * other).sum(), (images * cs.shifted(other, -shifts)).sum()
    assert float((left - right).abs()) < tolerance * float(images.norm() * other.norm())


def test_gradient_of_a_shift(generator):
    images = torch.randn(2, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    shifts = torch.randn(2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cs.shifted, (images, shifts))


def test_drifting_frames_are_brought_back(generator):
    drift = 4 * torch.randn(1, 4, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.0])
    tilts = cs.TiltScheme([25.0], [20.0], frames=4)
    sampling = cs.Sampling((108, 108), 0.9, 5.0, dtype=torch.float64)
    detector = cs.Detector((48, 47), 1.8)
    images = {}
    for name, motion in (("still", None), ("moving", Motion(drift))):
        seed = torch.Generator().manual_seed(1)
        optics = OPTICS.replace(defocus=2000.0)
        images[name] = cs.expected_frames(specimen(seed, motion=motion), tilts, optics, detector, 0, sampling=sampling)
    blurred = cs.sum_frames(images["moving"], 1.8)
    aligned = cs.sum_frames(images["moving"], 1.8, shifts=drift[0, :, :2])
    wanted = images["still"].sum(0)
    inner = (slice(12, -12), slice(12, -12))  # what came in over the border is wrapped
    error = [
        float((image - wanted)[inner].norm() / (wanted - wanted.mean())[inner].norm()) for image in (blurred, aligned)
    ]
    assert error[1] < 0.05 < 0.3 < error[0]


def test_weights_are_the_best():
    """Of signals that fade in equal noise, no other weights have a better signal-to-noise ratio than those."""
    moments = [cs.Moment(5.0 * i, 5.0) for i in range(8)]
    left = cs.dose_weights(moments, (32, 33), 1.0, dtype=torch.float64)  # (frame, y, x)

    def ratio(w: torch.Tensor) -> torch.Tensor:
        return (w * left).sum(0) ** 2 / (w**2).sum(0)

    best = ratio(left)
    for other in (torch.ones_like(left), left**2, left.sqrt()):
        assert bool((ratio(other) <= best * (1 + 1e-12)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
def test_frames_with_next_to_nothing_left(dtype, generator):
    """Where the weights are so small that their squares are 0, or are 0 themselves, the noise keeps its power."""
    frames = torch.poisson(torch.full((4, 64, 63), 20.0), generator=generator).to(dtype)
    for damage, start in ((cs.Damage(), 500.0), (cs.Damage(None, b_growth=4.0), 120.0), (cs.Damage(), 1e5)):
        moments = [cs.Moment(start, 3.0, frame=f, frames=4) for f in range(4)]
        weights = cs.dose_weights(moments, (64, 63), 1.0, damage=damage)
        weighted, plain = cs.sum_frames(frames, weights=weights), cs.sum_frames(frames)
        assert float(weighted.std() / plain.std()) == pytest.approx(1, rel=0.05)
        assert float(weighted.mean()) == pytest.approx(float(plain.mean()), rel=1e-5)


def test_weights_of_a_specimen_that_loses_mass_keep_the_mean(generator):
    frames = torch.poisson(torch.full((4, 24, 25), 20.0), generator=generator)
    damage = cs.Damage(cs.CriticalExposure(), loss=0.1)
    weights = cs.dose_weights([cs.Moment(5.0 * i, 5.0) for i in range(4)], (24, 25), 1.0, damage=damage)
    assert float(cs.sum_frames(frames, weights=weights).mean()) == pytest.approx(float(frames.sum(0).mean()), rel=1e-5)


def test_one_shift_and_one_weight_a_frame():
    frames = torch.ones(4, 8, 9)
    with pytest.raises(ValueError, match="sum_frames.shifts"):
        cs.sum_frames(frames, shifts=torch.zeros(2))
    with pytest.raises(ValueError, match="sum_frames.weights"):
        cs.sum_frames(frames, weights=torch.ones(1, 8, 5))
    with pytest.raises(ValueError, match="numbers of 0 or more"):
        cs.sum_frames(frames, weights=torch.full((4, 8, 5), float("nan")))


def test_weighted_sums_keep_mean_and_noise(generator):
    frames = 5 + torch.randn(6, 64, 63, generator=generator, dtype=torch.float64)
    weights = cs.dose_weights([cs.Moment(9.0 * i, 9.0) for i in range(6)], (64, 63), 1.0)
    plain, weighted = cs.sum_frames(frames), cs.sum_frames(frames, weights=weights)
    assert float(weighted.mean()) == pytest.approx(float(plain.mean()))
    power = [torch.fft.rfft2(image).abs().square()[1:].mean() for image in (plain, weighted)]
    assert float(power[1] / power[0]) == pytest.approx(1, rel=0.05)
