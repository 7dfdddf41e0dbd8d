"""Motion: what the field and the drift do to atoms and images, and what the random ones are drawn from."""

import math

import pytest
import torch

import cryosim as cs
from cryosim.core.fourier import frequencies
from cryosim.specimen.motion import Motion, displaced, drift_at, field_at
from cryosim.specimen.specimen import Poses
from cryosim.specimen.tilted import tilted_slices

DOSES = torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64)


def at(tilt=0, frame=0, frames=1):
    return cs.Moment(tilt=tilt, frame=frame, frames=frames)


def field_of(function, n=9, spacing=50.0):
    """Motion of one exposure and frame whose field is (x, y) -> (u, v, w)."""
    along = (torch.arange(n, dtype=torch.float64) - n // 2) * spacing
    y, x = torch.meshgrid(along, along, indexing="ij")
    return Motion(torch.zeros(1, 1, 3, dtype=torch.float64), torch.stack(function(x, y))[None, None], spacing)


def places(generator, n=50, reach=140.0):
    return reach * (2 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1)


@pytest.mark.parametrize("n", [8, 9])
def test_parabolas_are_followed_exactly(n, generator):
    def bowl(x, y):
        return 1e-2 * x + 3, 2e-5 * x * y - 1e-2 * y, 1e-4 * (x**2 + y**2)

    where = places(generator, reach=90.0)
    moved = field_at(field_of(bowl, n), at(), where)
    torch.testing.assert_close(moved, torch.stack(bowl(*where.T), 1), rtol=0, atol=1e-12)


def test_beyond_the_nodes_the_field_is_held():
    motion = field_of(lambda x, y: (x, y, 0 * x))
    moved = field_at(motion, at(), torch.tensor([[1e4, 0.0], [0.0, -1e4]], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([[200.0, 0, 0], [0, -200.0, 0]], dtype=torch.float64))


def test_molecules_go_along(generator):
    origins = torch.cat([places(generator), torch.rand(50, 1, generator=generator, dtype=torch.float64)], 1)
    poses = cs.Poses(torch.eye(3, dtype=torch.float64).expand(50, 3, 3), origins)
    motion = field_of(lambda x, y: (0.1 * x, 2 + 0 * x, -0.05 * y))
    moved = displaced(poses, motion, at()).positions - origins
    x, y, _ = origins.T
    torch.testing.assert_close(moved, torch.stack([0.1 * x, 2 + 0 * x, -0.05 * y], 1))


def block(generator):
    return cs.Atoms(24 * torch.rand(30, 3, generator=generator, dtype=torch.float64) - 12, [6] * 30)


def of(atoms, motion):
    here = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    return cs.Specimen((atoms,), (here,), (60.0, 60.0, 60.0), motion=motion)


def test_drift_is_a_shift_of_the_image_whatever_the_tilt(generator):
    """Against the Fourier shift of the projection; along the beam nothing moves across it."""
    atoms, moved = block(generator), torch.tensor([3.1, -1.7, 9.0], dtype=torch.float64)
    motion = Motion(moved.expand(1, 1, 3))
    how = {"axis_angle": 30.0, "dtype": torch.float64}
    still, drifted = (
        tilted_slices(of(atoms, m), 40.0, (64, 63), 0.9, 4.0, moment=at(), **how).total() for m in (None, motion)
    )
    torch.testing.assert_close(
        drifted, cs.shifted(still, moved[:2] / 0.9), rtol=0, atol=3e-6 * float(still.abs().max())
    )


def test_drift_along_the_beam_is_defocus(generator):
    """An image of a specimen lifted by 300 Å is one at 300 Å more underfocus."""
    atoms = block(generator)
    optics = cs.Optics(300.0, 5000.0, amplitude_contrast=0.0)
    lifted = Motion(torch.tensor([[[0.0, 0.0, 300.0]]], dtype=torch.float64))

    def image(motion, optics):
        slices = tilted_slices(of(atoms, motion), 0.0, (96, 96), 1.0, 4.0, moment=at(), dtype=torch.float64)
        return cs.image(cs.multislice(slices, optics), optics, 1.0)

    other = image(None, optics.replace(defocus=5300.0))
    difference = image(lifted, optics) - other
    assert float(difference.norm() / (other - 1).norm()) < 2e-3


def test_a_lift_of_the_field_shows_across_the_axis(generator):
    """At tilt t the axis of y: x moves by w sin t."""
    atoms = block(generator)
    motion = field_of(lambda x, y: (0 * x, 0 * x, 10 + 0 * x))
    still, moved = (
        tilted_slices(of(atoms, m), 30.0, (64, 63), 0.9, 4.0, moment=at(), dtype=torch.float64).total()
        for m in (None, motion)
    )
    shift = torch.tensor([10 * math.sin(math.radians(30.0)) / 0.9, 0.0])
    torch.testing.assert_close(moved, cs.shifted(still, shift), rtol=0, atol=3e-6 * float(still.abs().max()))


def test_images_drift_by_the_truth(generator):
    """Of two frames the phase of the cross spectrum is the difference of their drifts."""
    drift = torch.tensor([[[0.0, 0.0, 0.0], [4.0, -6.0, 0.0]]], dtype=torch.float64)
    specimen = of(block(generator), Motion(drift))
    tilts = cs.TiltScheme([20.0], [10.0], frames=2)
    optics, detector = cs.Optics(300.0, 10000.0), cs.Detector((33, 32), 2.0)
    sampling = cs.Sampling((108, 108), 1.0, 4.0, dtype=torch.float64)
    first, second = torch.fft.fft2(cs.expected_frames(specimen, tilts, optics, detector, 0, sampling=sampling))
    ky, kx = frequencies(33, 2.0, dtype=torch.float64), frequencies(32, 2.0, dtype=torch.float64)
    low = ((ky[:, None] ** 2 + kx**2) < 0.06**2) & ((ky[:, None] ** 2 + kx**2) > 0)
    turns = -(ky[:, None] * -6.0 + kx * 4.0)
    back = second * first.conj() * torch.polar(torch.ones_like(turns), -2 * torch.pi * turns)
    assert float((back[low].sum()).angle()) == pytest.approx(0, abs=0.05)
    assert float(back[low].real.sum() / back[low].abs().sum()) > 0.95


# what is drawn --------------------------------------------------------------------------------------------------------


def test_velocity_and_correlation_of_beam_induced_motion(generator):
    """Over many draws: standard deviation of the velocity, its correlation in place and in dose."""
    doses, draws = torch.full((2,), 2.0, dtype=torch.float64), 600
    velocities = []
    for _ in range(draws):
        motion = cs.beam_induced_motion(
            doses, 2, 4000.0, velocity=0.3, correlation=1500.0, memory=3.0, nodes=9, generator=generator
        )
        middle = motion.field.flatten(0, 1)  # (frame, 3, y, x), of frames of 1 e-/Å^2
        first, second = 2 * middle[0], middle[1] - middle[0]  # over half a dose, and over a whole one
        velocities.append(torch.stack([first, second]))
    v = torch.stack(velocities)  # (draw, frame, 3, y, x) [Å per e-/Å^2]
    assert motion.spacing == 500.0
    assert float(v.std()) == pytest.approx(0.3, rel=0.04)
    here, there = v[:, 0, :, 5, 3], v[:, 0, :, 5, 6]  # 1500 Å apart
    assert float((here * there).mean() / 0.09) == pytest.approx(math.exp(-0.5), abs=0.08)
    across = v[:, 0, 0, 5, 5] * v[:, 0, 1, 5, 5]
    assert float(across.mean() / 0.09) == pytest.approx(0, abs=0.15)
    assert float((v[:, 0] * v[:, 1]).mean() / 0.09) == pytest.approx(math.exp(-0.75 / 3), abs=0.05)


def test_motion_goes_on_from_one_exposure_to_the_next(generator):
    """The accumulated displacement is continuous: as over one long exposure with the same frames."""
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    parts = cs.beam_induced_motion(torch.full((3,), 2.0), 2, 1000.0, generator=seeds[0]).field.flatten(0, 1)
    whole = cs.beam_induced_motion(torch.full((1,), 6.0), 6, 1000.0, generator=seeds[1]).field.flatten(0, 1)
    torch.testing.assert_close(parts, whole)


def test_the_number_of_frames_does_not_change_what_moves():
    """However long a frame is against the memory: the spread in the end, over many draws."""
    spreads = []
    for frames in (1, 8):
        seed, ends = torch.Generator().manual_seed(3), []
        for _ in range(150):
            field = cs.beam_induced_motion(torch.full((5,), 12.0), frames, 900.0, nodes=3, generator=seed).field
            ends.append(field[-1, -1] - field[0, 0])
        spreads.append(float(torch.stack(ends).std()))
    dose = [48.0, 48.0 + 12.0 * 7 / 8]
    for spread, n in zip(spreads, dose, strict=True):  # variance of an integrated Ornstein-Uhlenbeck process
        assert spread == pytest.approx(0.2 * math.sqrt(2 * 4.0 * (n - 4.0 * (1 - math.exp(-n / 4.0)))), rel=0.06)


def test_structured_ice_drifts_with_the_specimen():
    """Frames of one exposure hold the same water, displaced: by the shift of the truth."""
    nothing = cs.Atoms(torch.zeros(1, 3, dtype=torch.float64), [6], occupancies=torch.zeros(1, dtype=torch.float64))
    drift = torch.tensor([[[0.0, 0.0, 0.0], [5.4, -3.3, 0.0]]], dtype=torch.float64)
    ice = cs.Ice(60.0, structure="water", seed=2)
    seen = []
    for f in (0, 1):
        specimen = of(nothing, Motion(drift)).replace(ice=ice)
        slices = tilted_slices(specimen, 0.0, (64, 63), 0.9, 8.0, moment=at(0, f, 2), dtype=torch.float64)
        seen.append(sum(slices[i] for i in range(len(slices))))
    moved = cs.shifted(seen[0], drift[0, 1, :2] / 0.9)
    torch.testing.assert_close(seen[1], moved, rtol=0, atol=1e-6 * float(seen[0].std()))
    assert float((seen[1] - seen[0]).std() / seen[0].std()) > 1


def test_drift_comes_to_rest(generator):
    motion = cs.stage_drift(torch.full((500,), 8.0), 8, distance=5.0, settling=1.0, generator=generator)
    assert float(motion.drift[:, -1, :2].std()) == pytest.approx(5.0, rel=0.1)
    ratio = motion.drift[:, 0, 0] / motion.drift[:, -1, 0]
    wanted = (1 - math.exp(-0.5)) / (1 - math.exp(-7.5))
    torch.testing.assert_close(ratio, torch.full_like(ratio, wanted))
    assert not motion.drift[..., 2].any()


def test_a_dome_has_its_height_and_its_rim():
    motion = cs.doming(DOSES, 2, 2000.0, height=100.0, radius=800.0, settling=2.0)
    where = torch.tensor([[0.0, 0.0], [400.0, 0.0], [0.0, -560.0], [900.0, 0.0]], dtype=torch.float64)
    bulge = field_at(motion, at(2, 1, 2), where)
    grown = 100 * (1 - math.exp(-(5.0 + 3.0) / 2.0))  # 5 before, and in the middle of the second half of 4
    wanted = grown * torch.tensor([1.0, 0.75, 1 - 0.49, 0.0], dtype=torch.float64)
    torch.testing.assert_close(bulge[:, 2], wanted, rtol=0, atol=0.01 * grown)
    assert not bulge[:, :2].any()


def test_motions_add(generator):
    drift = cs.stage_drift(DOSES, 2, distance=1.0, settling=1.0, generator=generator)
    dome = cs.doming(DOSES, 2, 2000.0, height=100.0, radius=800.0)
    wander = cs.beam_induced_motion(DOSES, 2, 2000.0, generator=generator)
    together = drift + dome + wander
    torch.testing.assert_close(together.field, dome.field + wander.field)
    torch.testing.assert_close(drift_at(together, at(1, 1, 2)), drift.drift[1, 1])
    with pytest.raises(ValueError, match="same tilts, frames, nodes"):
        dome + cs.doming(DOSES, 3, 2000.0, height=100.0, radius=800.0)


def test_motion_made_for_another_scheme(generator):
    motion = cs.stage_drift(DOSES, 2, distance=1.0, settling=1.0, generator=generator)
    for moment in (at(3, 0, 2), at(0, 0, 1)):
        with pytest.raises(ValueError, match="Make it for this TiltScheme"):
            drift_at(motion, moment)


def test_numbers_that_cannot_be():
    with pytest.raises(ValueError, match="at least 21 nodes"):
        cs.beam_induced_motion(DOSES, 2, 2000.0, correlation=100.0)
    with pytest.raises(ValueError, match="Motion.drift"):
        Motion(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Motion.field"):
        Motion(torch.zeros(2, 1, 3), torch.zeros(2, 2, 3, 4, 4), 10.0)
    with pytest.raises(ValueError, match="Motion.drift: expected finite"):
        Motion(torch.full((1, 2, 3), float("nan")))
    with pytest.raises(ValueError, match="positive settling"):
        cs.stage_drift(DOSES, 2, distance=1.0, settling=0.0)
