"""Schemes of tilts: their order is the order of exposure, their doses add up."""

import itertools

import pytest
import torch

from cryosim.acquisition.tilts import TiltScheme


def test_dose_symmetric_is_hagens_order():
    scheme = TiltScheme.dose_symmetric()
    assert scheme.angles[:12].tolist() == [0, 3, -3, -6, 6, 9, -9, -12, 12, 15, -15, -18]
    assert len(scheme) == 41
    assert sorted(scheme.angles.tolist()) == list(range(-60, 61, 3))
    assert float(scheme.doses.sum()) == pytest.approx(120)
    assert scheme.doses.unique().numel() == 1


def test_groups_of_one_alternate():
    scheme = TiltScheme.dose_symmetric(12, 3, 30, group=1)
    assert scheme.angles.tolist() == [0, 3, -3, 6, -6, 9, -9, 12, -12]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 30])
@pytest.mark.parametrize(("extent", "step"), [(60, 3), (50, 2), (51, 1.5), (0, 3), (3, 3)])
def test_every_angle_is_taken_once_and_each_side_climbs(group, extent, step):
    angles = TiltScheme.dose_symmetric(extent, step, group=group).angles
    n = round(extent / step)
    torch.testing.assert_close(angles.sort().values, torch.arange(-n, n + 1, dtype=torch.float64) * step)
    assert angles[0] == 0
    for side in (angles[angles >= 0], -angles[angles <= 0]):
        assert (side.diff() > 0).all()


@pytest.mark.parametrize("group", [2, 3, 5])
def test_the_stage_crosses_only_after_a_group(group):
    signs = TiltScheme.dose_symmetric(60, 3, group=group).angles[1:].sign().tolist()
    runs = [1]
    for one, two in itertools.pairwise(signs):
        runs = [*runs[:-1], runs[-1] + 1] if one == two else [*runs, 1]
    assert runs[0] == group - 1
    assert set(runs[1:-2]) == {group}


def test_bidirectional():
    scheme = TiltScheme.bidirectional(9, 3, 70)
    assert scheme.angles.tolist() == [0, 3, 6, 9, -3, -6, -9]
    assert scheme.doses.tolist() == pytest.approx([10] * 7)
    assert TiltScheme.bidirectional(9, 3, start=-6).angles.tolist() == [-6, -3, 0, 3, 6, 9, -9]
    assert TiltScheme.bidirectional(9, 3, start=3).angles.tolist() == [3, 6, 9, 0, -3, -6, -9]


def test_unidirectional():
    scheme = TiltScheme.unidirectional(6, 3, 50, axis_angle=-85.0)
    assert scheme.angles.tolist() == [-6, -3, 0, 3, 6]
    assert scheme.axis_angle == -85.0


@pytest.mark.parametrize("make", [TiltScheme.dose_symmetric, TiltScheme.bidirectional, TiltScheme.unidirectional])
def test_accumulated_dose_is_what_the_specimen_has_seen_before(make):
    scheme = make(60, 3, 123)
    seen = scheme.accumulated_doses
    assert seen[0] == 0
    torch.testing.assert_close(seen[1:], torch.cumsum(scheme.doses, 0)[:-1])
    assert float(seen[-1] + scheme.doses[-1]) == pytest.approx(123)


@pytest.mark.parametrize("make", [TiltScheme.dose_symmetric, TiltScheme.bidirectional, TiltScheme.unidirectional])
@pytest.mark.parametrize(("extent", "step"), [(60, 0), (60, -3), (61, 3), (-60, 3), (60, 7)])
def test_the_step_must_divide_the_extent(make, extent, step):
    with pytest.raises(ValueError, match="divides the extent"):
        make(extent, step)


def test_group_must_hold_a_tilt():
    with pytest.raises(ValueError, match="group"):
        TiltScheme.dose_symmetric(group=0)


@pytest.mark.parametrize("angle", [90.0, -90.0, 120.0, float("nan")])
def test_angles_stay_below_ninety_degrees(angle):
    with pytest.raises(ValueError, match="between -90 and 90"):
        TiltScheme(torch.tensor([0.0, angle]), torch.ones(2))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        TiltScheme(torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match="shifts"):
        TiltScheme(torch.zeros(3), torch.ones(3), torch.zeros(3))


def test_shifts_are_zero_when_left_out_and_follow_an_index():
    scheme = TiltScheme(torch.tensor([0.0, 3.0, -3.0]), torch.ones(3))
    assert torch.equal(scheme.shifts, torch.zeros(3, 2))
    some = scheme.replace(shifts=torch.arange(6.0).reshape(3, 2)).index(torch.tensor([2, 0]))
    assert some.angles.tolist() == [-3, 0]
    assert some.shifts.tolist() == [[4, 5], [0, 1]]
