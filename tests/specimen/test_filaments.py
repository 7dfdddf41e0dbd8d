"""Filaments: the symmetry and the hand of helices, lengths and statistics of bent ones, room between several."""

import math

import pytest
import torch
from scipy.optimize import minimize

from cryosim.core.rotation import rotation_z
from cryosim.specimen.atoms import Poses
from cryosim.specimen.filaments import (
    ACTIN,
    Helix,
    along,
    bent,
    filament,
    helix,
    microtubule,
    place_filaments,
    segment_distances,
    worm_like_chain,
)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def seen(poses, point):
    """Where a point (x, y, z) of the monomer lies in each copy."""
    return poses.rotations @ torch.tensor(point, dtype=torch.float64) + poses.positions


@pytest.mark.parametrize("symmetry", [ACTIN, Helix(27.6, 166.6), Helix(14.0, -31.7, 3), Helix(9.3, 0.0)])
def test_one_step_of_the_helix_maps_each_subunit_to_the_next(symmetry):
    poses = helix(symmetry, n=25)
    places = seen(poses, (31.0, 4.0, -2.0)).unflatten(0, (25, symmetry.cyclic))
    step = rotation_z(symmetry.twist)
    moved = places[:-1] @ step.T + torch.tensor([0, 0, symmetry.rise], dtype=torch.float64)
    torch.testing.assert_close(moved, places[1:], rtol=0, atol=1e-9)
    turned = places @ rotation_z(360 / symmetry.cyclic).T
    torch.testing.assert_close(turned, places.roll(-1, 1), rtol=0, atol=1e-9)
    assert abs(float(poses.positions[:, 2].mean())) < 1e-9
    assert (poses.instances == 0).all()


def test_a_positive_twist_is_a_right_handed_helix():
    """Going up a right-handed screw turns anticlockwise seen from above: x towards y. Its torsion is positive."""
    for twist in (20.0, -20.0):
        r = seen(helix(Helix(5.0, twist), n=6), (10.0, 0.0, 0.0))
        first, second, third = r[1] - r[0], r[2] - 2 * r[1] + r[0], r[3] - 3 * r[2] + 3 * r[1] - r[0]
        torsion = torch.linalg.cross(first, second) @ third
        assert math.copysign(1, float(torsion)) == math.copysign(1, twist)


def test_actin_repeats_after_thirteen_subunits_in_six_left_handed_turns():
    """-166.6 deg * 13 = -2165.8, six turns to 6 deg: 359 Å, the crossover of the two long-pitch strands."""
    poses = helix(ACTIN, length=13 * 27.6)
    assert len(poses.positions) == 13
    places = seen(poses, (1.0, 0.0, 0.0))
    azimuth = torch.rad2deg(torch.atan2(places[:, 1], places[:, 0]))
    apart = float(torch.remainder(azimuth[2] - azimuth[0] + 180, 360) - 180)
    assert apart == pytest.approx(26.8, abs=1e-6)  # the two-start strands are right-handed


def test_the_lattice_of_a_microtubule():
    """13 straight protofilaments, neighbours 9.46 Å higher going left, but for the seam of a dimer and a half."""
    poses = microtubule(820.0)
    assert len(poses.positions) == 130
    places = seen(poses, (112.0, 0.0, 0.0)).unflatten(0, (10, 13))  # (dimer, protofilament, 3)
    torch.testing.assert_close(places[1:] - places[:-1], torch.tensor([0, 0, 82.0]).double().expand(9, 13, 3))
    azimuth = torch.rad2deg(torch.atan2(places[0, :, 1], places[0, :, 0]))
    steps = torch.remainder(azimuth.roll(-1) - azimuth, 360)
    torch.testing.assert_close(steps, torch.full_like(steps, 360 - 360 / 13))
    rises = torch.remainder(places[0].roll(-1, 0)[:, 2] - places[0, :, 2], 82)
    assert rises[:-1].tolist() == pytest.approx([3 * 41 / 13] * 12)
    assert float(rises[-1]) == pytest.approx(82 - 12 * 3 * 41 / 13 % 82)
    assert torch.remainder(rises.sum() - 3 * 41 / 13 * 13, 82) == pytest.approx(82 - 41, abs=1e-9)  # the seam: 41 off


# bending --------------------------------------------------------------------------------------------------------------


def test_a_stiff_filament_is_straight():
    line = worm_like_chain(1000.0, math.inf)
    s = torch.linspace(-500, 500, 11, dtype=torch.float64)
    points, frames = along(line, s)
    torch.testing.assert_close(points[:, 2], s)
    assert points[:, :2].abs().max() == 0
    torch.testing.assert_close(frames, torch.eye(3, dtype=torch.float64).expand(11, 3, 3))


def test_arc_length_frames_and_direction_of_a_bent_line():
    line = worm_like_chain(801.0, 500.0, step=10.0, generator=seeded())
    s = torch.linspace(-400, 400, 80001, dtype=torch.float64)
    points, frames = along(line, s)
    assert float(points.diff(dim=0).norm(dim=1).sum()) == pytest.approx(800.0, rel=1e-7)
    torch.testing.assert_close(frames @ frames.mT, torch.eye(3, dtype=torch.float64).expand_as(frames))
    tangent = points.diff(dim=0) / 0.01
    torch.testing.assert_close(tangent, frames[:-1, :, 2], rtol=0, atol=5e-4)
    # a frame that does not turn about the line: d n / ds has no part along the other normal
    turning = (frames[:, :, 0].diff(dim=0) * frames[:-1, :, 1]).sum(1) / 0.01
    assert turning.abs().max() < 1e-4
    middle, frame = along(line, torch.zeros(1, dtype=torch.float64))
    assert middle.norm() < 1e-9
    torch.testing.assert_close(frame[0], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_end_to_end_distance_of_worm_like_chains(ratio):
    """<R^2> = 2 P L (1 - (P / L)(1 - exp(-L / P))), within three standard errors."""
    persistence = 1000.0
    length = ratio * persistence
    generator = seeded(3)
    ends = torch.tensor([-length / 2, length / 2], dtype=torch.float64)
    squares, cosines = [], []
    for _ in range(300):
        line = worm_like_chain(length, persistence, step=persistence / 200, generator=generator)
        points, frames = along(line, ends)
        squares.append(float((points[1] - points[0]).square().sum()))
        cosines.append(float(frames[0, :, 2] @ frames[1, :, 2]))
    for found, wanted in (
        (squares, 2 * persistence * length * (1 - (1 - math.exp(-ratio)) / ratio)),
        (cosines, math.exp(-ratio)),
    ):
        found = torch.tensor(found, dtype=torch.float64)
        assert abs(float(found.mean()) - wanted) < 3 * float(found.std()) / math.sqrt(300)


def test_bending_keeps_subunits_in_place_on_the_line_and_its_twist():
    straight = helix(ACTIN, n=60)
    line = worm_like_chain(60 * 27.6, 5000.0, generator=seeded())
    curved = bent(straight, line)
    points, frames = along(line, straight.positions[:, 2])
    torch.testing.assert_close(curved.positions, points)
    local = frames.mT @ curved.rotations
    torch.testing.assert_close(local, straight.rotations, rtol=0, atol=1e-9)
    steps = curved.positions.diff(dim=0).norm(dim=1)
    assert (steps <= 27.6 + 1e-9).all() and (steps > 27.6 * 0.995).all()


def test_a_filament_lies_where_it_is_put():
    straight = helix(Helix(10.0, 30.0), n=21)
    direction = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64) / 3
    laid = filament(straight, direction=(1, 2, -2), position=(5, -6, 7), instance=4, generator=seeded())
    along_line = (laid.positions - torch.tensor([5.0, -6, 7], dtype=torch.float64)) @ direction
    torch.testing.assert_close(along_line, straight.positions[:, 2])
    torch.testing.assert_close(laid.rotations[:, :, 2], direction.expand(21, 3))
    assert (laid.instances == 4).all()
    again = filament(straight, direction=(1, 2, -2), position=(5, -6, 7), instance=4, generator=seeded())
    assert torch.equal(laid.rotations, again.rotations)


# several --------------------------------------------------------------------------------------------------------------


def test_distances_of_segments_against_a_minimiser():
    generator = seeded()
    p, q, a, b = 10 * torch.randn(4, 12, 3, generator=generator, dtype=torch.float64)
    b[3], q[4] = a[3] + (q[3] - p[3]), p[4]  # parallel ones, and a point
    found = segment_distances(p, q, a, b)

    for i in range(12):

        def apart(share, i=i):
            one, other = p[i] + share[0] * (q[i] - p[i]), a[i] + share[1] * (b[i] - a[i])
            return float((one - other).square().sum())

        starts = [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)]
        least = min(minimize(apart, s, bounds=[(0, 1), (0, 1)]).fun for s in starts)
        assert float(found[i, i]) == pytest.approx(math.sqrt(least), abs=1e-4)


@pytest.mark.parametrize("persistence", [math.inf, 3000.0])
def test_filaments_in_a_box_keep_apart_and_inside(persistence):
    size, radius, gap = (701.0, 550.0, 150.0), 20.0, 6.0
    straight = helix(Helix(10.0, 25.0), length=300.0)
    poses = place_filaments(straight, 7, size, radius=radius, persistence=persistence, gap=gap, generator=seeded(2))
    assert poses.instances is not None
    assert poses.instances.bincount().tolist() == [30] * 7
    ring = [seen(poses, (radius * math.cos(a), radius * math.sin(a), 0.0)) for a in (0.0, 1.6, 3.1, 4.7)]
    assert all((points.abs() <= torch.tensor(size) / 2 + 1e-9).all() for points in ring)
    for i in range(7):
        for j in range(i):
            one, other = poses.index(poses.instances == i), poses.index(poses.instances == j)
            assert float(torch.cdist(one.positions, other.positions).min()) >= 2 * radius + gap - 1.0


def test_filaments_that_cross_the_box_are_cut_at_its_sides():
    size = (300.0, 331.0, 80.0)
    straight = helix(Helix(10.0, 25.0), length=1000.0)
    poses = place_filaments(straight, 3, size, radius=15.0, crossing=True, generator=seeded())
    assert poses.instances is not None
    counts = poses.instances.bincount()
    assert (counts > 5).all() and (counts < 100).all()
    assert (poses.positions.abs() <= torch.tensor(size) / 2).all()
    assert (poses.positions[:, 2].abs() <= 25.0).all()


def test_filaments_that_do_not_fit():
    straight = helix(Helix(10.0, 25.0), length=300.0)
    with pytest.raises(ValueError, match="no free place"):
        place_filaments(straight, 40, (320.0, 320.0, 60.0), radius=20.0, tries=50, generator=seeded())
    with pytest.raises(ValueError, match="no free place"):
        place_filaments(straight, 1, (400.0, 400.0, 30.0), radius=20.0, generator=seeded())
    assert isinstance(place_filaments(straight, 0, (400.0, 400.0, 60.0), radius=20.0), Poses)


def test_what_helices_refuse():
    with pytest.raises(ValueError, match="either n or length"):
        helix(ACTIN)
    with pytest.raises(ValueError, match="at least one subunit"):
        helix(ACTIN, length=20.0)
    with pytest.raises(ValueError, match="positive rise"):
        helix(Helix(-5.0, 10.0), n=3)
    with pytest.raises(ValueError, match="tenth of the persistence"):
        worm_like_chain(1000.0, 100.0)
