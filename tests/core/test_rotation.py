"""Rotations: right-handed, on columns (x, y, z), uniform when random."""

import math

import pytest
import torch

from cryosim.core.rotation import (
    euler_zyz,
    random_rotations,
    rotation_from_euler_zyz,
    rotation_x,
    rotation_y,
    rotation_z,
    tilt_rotation,
)

X, Y, Z = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rotation", "start", "end"), [(rotation_x, Y, Z), (rotation_y, Z, X), (rotation_z, X, Y)], ids=["x", "y", "z"]
)
def test_a_quarter_turn_is_right_handed(rotation, start, end):
    torch.testing.assert_close(rotation(90.0) @ start, end)


@pytest.mark.parametrize("angle", [-60.0, -3.0, 0.0, 45.0, 60.0])
def test_tilt_lands_a_point_at_x_cos_plus_z_sin(angle, generator):
    x, y, z = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    got = tilt_rotation(angle) @ torch.tensor([x, y, z], dtype=torch.float64)
    torch.testing.assert_close(got, torch.tensor([x * c + z * s, y, z * c - x * s], dtype=torch.float64))


def test_tilt_axis_turns_from_y_in_the_image_plane():
    """The axis is the direction the tilt leaves alone: y turned by axis_angle, towards -x."""
    axis = rotation_z(30.0) @ Y
    torch.testing.assert_close(axis, torch.tensor([-0.5, math.sqrt(0.75), 0.0], dtype=torch.float64))
    torch.testing.assert_close(tilt_rotation(50.0, 30.0) @ Y, axis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_of_angles(dtype):
    angles = torch.tensor([[-60.0, 0.0, 33.0], [10.0, 20.0, 60.0]], dtype=dtype)
    batch = tilt_rotation(angles, 7.0)
    assert batch.shape == (2, 3, 3, 3)
    assert batch.dtype == dtype
    for i in range(2):
        for j in range(3):
            one = tilt_rotation(float(angles[i, j]), 7.0)
            torch.testing.assert_close(
                batch[i, j].double(), one, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14
            )


def test_gradient_in_the_angles(generator):
    weights = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    angles = torch.tensor([20.0, -70.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: (tilt_rotation(a[0], a[1]) * weights).sum(), angles)


SPECIAL = torch.tensor(
    [[0, 0, 0], [0, 0, 40], [70, 0, 0], [0, 180, 25], [30, 180, -50], [180, 180, 90], [10, 90, -170], [-180, 45, 180]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_angles_give_the_rotation_back(dtype, generator):
    rotations = torch.cat([random_rotations(200, generator), rotation_from_euler_zyz(SPECIAL)]).to(dtype)
    again = rotation_from_euler_zyz(euler_zyz(rotations))
    torch.testing.assert_close(again, rotations, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turn", [0.0, 180.0])
@pytest.mark.parametrize("tilt", [1e-10, 1e-8, 1e-6, 1e-3])
def test_euler_angles_next_to_gimbal_lock(dtype, turn, tilt, generator):
    """Rounding makes an upright rotation nearly upright; the two angles about z may differ, not the rotation."""
    angles = 360 * torch.rand(50, 3, generator=generator, dtype=torch.float64)
    angles[:, 1] = turn + tilt
    rotations = rotation_from_euler_zyz(angles).to(dtype)
    there = random_rotations(50, generator).to(dtype)
    rotations = there.mT @ (there @ rotations)  # noise of rounding in every entry
    again = rotation_from_euler_zyz(euler_zyz(rotations))
    torch.testing.assert_close(again, rotations, rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-12)


def test_euler_angles_are_rot_tilt_psi():
    rot, tilt, psi = 20.0, 70.0, -110.0
    torch.testing.assert_close(
        euler_zyz(rotation_z(rot) @ rotation_y(tilt) @ rotation_z(psi)), torch.tensor([rot, tilt, psi]).double()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_rotations_are_rotations(dtype, generator):
    r = random_rotations(100, generator, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(r @ r.mT, torch.eye(3, dtype=dtype).expand(100, 3, 3), rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(100, dtype=dtype), rtol=0, atol=tolerance)


def test_random_rotations_are_uniform(generator):
    """Haar measure: E[R] = 0, E[R_ij R_kl] = delta_ik delta_jl / 3, E[tr^4] = 3; angle density (1 - cos) / pi."""
    n = 40000
    r = random_rotations(n, generator)
    five_sigma = 5 / math.sqrt(n)
    assert r.mean(0).abs().max() < five_sigma * math.sqrt(1 / 3)
    flat = r.reshape(n, 9)
    assert (flat.T @ flat / n - torch.eye(9, dtype=r.dtype) / 3).abs().max() < five_sigma * 0.5
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert float((trace**4).mean()) == pytest.approx(3.0, abs=five_sigma * 10)
    turn = torch.acos(((trace - 1) / 2).clamp(-1, 1))
    expected = [(t - math.sin(t)) / math.pi for t in (0.5, 1.0, 2.0, 3.0)]
    for t, share in zip((0.5, 1.0, 2.0, 3.0), expected, strict=True):
        assert float((turn < t).double().mean()) == pytest.approx(share, abs=five_sigma * 0.5)


def test_random_rotations_follow_the_seed():
    one, same, other = (random_rotations(3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
