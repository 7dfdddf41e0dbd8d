"""Particle files: RELION's numbers in RELION's convention."""

import math
import os

import pytest
import starfile
import torch

from cryosim.core.rotation import random_rotations, rotation_y, rotation_z
from cryosim.io.files import FormatError
from cryosim.io.star import read_poses, write_poses

SHAPE = (31, 40, 51)  # (z, y, x), odd and even


def poses(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions = 100 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return random_rotations(n, generator), positions


def write(path, particles, **changes):
    write_poses(path, particles, **({"pixel_size": 1.35, "volume_shape": SHAPE, "tomogram_name": "tomo_1"} | changes))


def relion_matrix(rot, tilt, psi):
    """Euler_angles2matrix of RELION, entry by entry; its tomography maps particle to tomogram space with it."""
    (sa, ca), (sb, cb), (sg, cg) = ((math.sin(math.radians(a)), math.cos(math.radians(a))) for a in (rot, tilt, psi))
    return torch.tensor(
        [
            [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
            [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
            [sb * ca, sb * sa, cb],
        ],
        dtype=torch.float64,
    )


def test_round_trip(tmp_path):
    upright = torch.stack([torch.eye(3, dtype=torch.float64), rotation_z(30.0), rotation_y(180.0), rotation_y(0.001)])
    wanted = [("1e5", *poses(5)), ("two words", *poses(1, 1)), ("upright", upright, poses(4, 2)[1])]
    write(tmp_path / "a.star", wanted)
    got = read_poses(tmp_path / "a.star")
    assert [name for name, _, _ in got] == ["1e5", "two words", "upright"]
    for (_, rotations, positions), (_, r, p) in zip(wanted, got, strict=True):
        torch.testing.assert_close(r, rotations, rtol=0, atol=1e-6)
        torch.testing.assert_close(p, positions, rtol=0, atol=1e-6)


def test_relions_matrix_of_the_angles_is_the_rotation_itself(tmp_path):
    rotations, positions = poses(6)
    write(tmp_path / "a.star", [("a", rotations, positions)])
    table = starfile.read(tmp_path / "a.star")["particles"]
    angles = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    for row, rotation in zip(angles, rotations, strict=True):
        torch.testing.assert_close(relion_matrix(*row), rotation, rtol=0, atol=1e-6)


def test_coordinates_are_pixels_from_the_corner_and_angstroms_from_the_centre(tmp_path):
    position = torch.tensor([[0.0, 0.0, 0.0], [2.7, -1.35, 13.5]], dtype=torch.float64)
    write(tmp_path / "a.star", [("a", poses(2)[0], position)])
    table = starfile.read(tmp_path / "a.star")["particles"]
    pixels = table[["rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ"]].to_numpy().tolist()
    assert pixels[0] == [25, 20, 15]  # n // 2
    assert pixels[1] == pytest.approx([27, 19, 25])
    assert table.rlnCenteredCoordinateZAngst.tolist() == [0, 13.5]
    assert set(table.rlnTomoName) == {"tomo_1"}


def test_one_particle_and_same_bytes(tmp_path):
    for name in ("a.star", "b.star"):
        write(tmp_path / name, [("a", *poses(1))])
    assert (tmp_path / "a.star").read_bytes() == (tmp_path / "b.star").read_bytes()
    assert (tmp_path / "a.star").read_text().startswith("# cryosim\n\n")  # and not the hour
    assert read_poses(tmp_path / "a.star")[0][1].shape == (1, 3, 3)


def test_a_file_of_relion_alone(tmp_path):
    labels = ["rlnTomoName", *(f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ")]
    labels += ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    head = "\n".join(f"_{label} #{i}" for i, label in enumerate(labels, 1))
    path = tmp_path / "a.star"
    path.write_text(f"data_particles\n\nloop_\n{head}\nTS_1 1 2 3 10 20 30\nTS_1 4 5 6 0 0 0\n")
    [(name, rotations, positions)] = read_poses(path)
    assert name == "1"
    assert positions.tolist() == [[1, 2, 3], [4, 5, 6]]
    torch.testing.assert_close(rotations[0], relion_matrix(10, 20, 30), rtol=0, atol=1e-12)
    path.write_text(path.read_text().replace(" 20 ", " nan "))
    with pytest.raises(FormatError, match="_rlnAngleTilt, row 1"):
        read_poses(path)
    path.write_text(path.read_text().replace("_rlnAnglePsi", "_rlnOther"))
    with pytest.raises(FormatError, match="_rlnAnglePsi: expected a column"):
        read_poses(path)


@pytest.mark.parametrize("text", ["", "no star\n", "data_particles\n", "data_optics\n\nloop_\n_rlnOpticsGroup #1\n1\n"])
def test_files_without_particles_are_refused(tmp_path, text):
    (tmp_path / "a.star").write_text(text)
    with pytest.raises(FormatError, match=r"a\.star"):
        read_poses(tmp_path / "a.star")


@pytest.mark.parametrize(
    "particles",
    [
        [],
        [("a", torch.zeros(0, 3, 3), torch.zeros(0, 3))],
        [("a", poses(2)[0], poses(3)[1])],
        [("a", -poses(2)[0], poses(2)[1])],
        [("a", 2 * poses(2)[0], poses(2)[1])],
        [("a", poses(2)[0], poses(2)[1] * float("nan"))],
    ],
)
def test_what_is_no_pose_is_refused(tmp_path, particles):
    with pytest.raises(ValueError, match=r"a\.star"):
        write(tmp_path / "a.star", particles)
    assert not os.listdir(tmp_path)
