"""What we write, in the hands of libraries that are not ours."""

import warnings

import numpy as np
import pytest
import torch

import cryosim as cs
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.rotation import tilt_rotation
from cryosim.core.volume import Volume
from cryosim.io.aretomo import write_aln
from cryosim.io.imod import write_xf
from cryosim.io.relion import HAND, write_relion
from cryosim.io.store import write_zarr
from cryosim.io.warp import write_warp
from cryosim.microscope.optics import Optics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cryoet_alignment.io.aretomo3 import AreTomo3ALN
    from cryoet_alignment.io.cryoet_data_portal import Alignment
    from cryoet_alignment.io.imod import ImodAlignment
    from cryoet_alignment.io.relion import RelionAlignment
    from cryoet_alignment.io.relion.alignment import projection_matrix
    from cryoet_alignment.io.warp import WarpAlignment

PIXEL = 1.7
OPTICS = Optics(voltage=300.0, defocus=20000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
CHIRAL = np.array([[0.0, 0, 0], [40, 0, 0], [0, 60, 0], [0, 0, 90], [13, -27, 41]])  # [Å]


def example():
    return TiltScheme(
        torch.tensor([0.3, 12.1, -11.7, -57.9], dtype=torch.float64),
        torch.full((4,), 3.0, dtype=torch.float64),
        torch.tensor([[3.1, -7.7], [0.0, 12.3], [-20.2, 5.0], [8.8, 8.1]], dtype=torch.float64),
        axis_angle=-83.4,
    )


def matrices(alignment, image_shape, volume_shape):
    """RELION's matrices (section, 4, 4) of a canonical alignment."""
    (ny, nx), (nz, my, mx) = image_shape, volume_shape
    entries = alignment.to_relion("t", PIXEL).entries
    return np.stack(
        [
            projection_matrix(
                e.x_tilt, e.y_tilt, e.z_rot, e.x_shift_angst, e.y_shift_angst, (mx, my, nz), (nx, ny), PIXEL
            )
            for e in entries
        ]
    )


def seen(matrices, volume_shape):
    """Samples (section, point, 2) of the chiral points."""
    points = CHIRAL / PIXEL + np.array([n // 2 for n in reversed(volume_shape)])
    return np.einsum("sij,pj->spi", matrices[:, :2, :3], points) + matrices[:, None, :2, 3]


@pytest.mark.parametrize(("image_shape", "volume_shape"), [((49, 63), (31, 33, 41)), ((48, 64), (30, 32, 40))])
def test_cryoet_alignment_projects_as_we_do(tmp_path, image_shape, volume_shape):
    """It copies angles and shifts from one program to another and knows no half pixels.

    So odd images agree in IMOD's files, whose centre (n - 1) / 2 is ours there, and even ones in Warp's, with n / 2.
    """
    tilts, order, odd = example(), [3, 2, 0, 1], bool(image_shape[0] % 2)
    write_aln(tmp_path / "s.aln", tilts, PIXEL, image_shape)
    write_xf(tmp_path / "s.xf", tilts, PIXEL, image_shape)
    write_warp(tmp_path / "s.xml", tilts, PIXEL, image_shape, volume_shape)
    write_relion(tmp_path / "t.star", tilts, OPTICS, PIXEL, volume_shape, name="s", stack="s.mrc")
    relion = RelionAlignment.from_file(tmp_path / "t.star")
    found = {
        "relion": Alignment.from_relion(relion),
        "aretomo": Alignment.from_aretomo3(AreTomo3ALN.from_file(tmp_path / "s.aln")),
        "imod": Alignment.from_imod(ImodAlignment.read(xf_path=tmp_path / "s.xf", tlt_path=tmp_path / "s.tlt")),
        "warp": Alignment.from_warp(WarpAlignment.from_file(tmp_path / "s.xml")),
    }
    turned = torch.einsum("tij,pj->tpi", tilt_rotation(tilts.angles, tilts.axis_angle), torch.from_numpy(CHIRAL))
    centre = torch.tensor([n // 2 for n in reversed(image_shape)])
    wanted = (centre + (turned[..., :2] + tilts.shifts[:, None]) / PIXEL)[order].numpy()
    for name in ("relion", "aretomo", "imod" if odd else "warp"):
        got = seen(matrices(found[name], image_shape, volume_shape), volume_shape)
        assert np.abs(got - wanted).max() < 1e-3, name
    for name in found:  # the rotations of all, whatever the size
        got = matrices(found[name], image_shape, volume_shape)[:, :3, :3]
        assert np.abs(got - tilt_rotation(tilts.angles, tilts.axis_angle)[order].numpy()).max() < 1e-6, name
    assert relion.hand == HAND and relion.voltage == 300.0 and relion.spherical_aberration == 2.7


def test_relions_hand_is_that_of_the_images(tmp_path):
    """Atoms beside the axis of a tilted specimen look as they would on it, at the defocus RELION works out for them.

    RELION: defocus + rlnTomoHand * height of P r (Tomogram::getCtf).
    """
    tilts = TiltScheme(torch.tensor([50.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    write_relion(tmp_path / "t.star", tilts, OPTICS, 2.0, (64, 64, 64), name="s", stack="s.mrc")
    relion = RelionAlignment.from_file(tmp_path / "t.star")
    e = relion.entries[0]
    matrix = projection_matrix(
        e.x_tilt, e.y_tilt, e.z_rot, e.x_shift_angst, e.y_shift_angst, (64, 64, 64), (192, 192), 2.0
    )[:3, :3]
    for place in ([150.0, 0.0, 0.0], [-150.0, 20.0, 30.0]):  # [Å], right and left of the axis
        x, y, height = (matrix @ np.array(place)).tolist()
        assert abs(height) > 80
        tilted = image_of_an_atom(place, 50.0, 4000.0)
        right, mirrored = (image_of_an_atom([x, y, 0.0], 0.0, 4000.0 + h * height) for h in (relion.hand, -relion.hand))
        assert float((tilted - right).norm() / right.norm()) < 1e-4
        assert float((tilted - mirrored).norm() / right.norm()) > 0.1


def image_of_an_atom(place, angle, defocus):
    """Contrast (192, 192) of a carbon atom at `place` [Å] of a specimen tilted by `angle` [deg]."""
    atom = cs.Atoms(torch.zeros(1, 3, dtype=torch.float64), [6], b_factors=[20.0])
    poses = cs.Poses(torch.eye(3, dtype=torch.float64)[None], torch.tensor([place], dtype=torch.float64))
    specimen = cs.Specimen((atom,), (poses,), (400.0, 400.0, 400.0))
    optics = cs.Optics(voltage=300.0, defocus=defocus)
    slices = cs.tilted_slices(specimen, angle, (192, 192), 2.0, 8.0, dtype=torch.float64)
    return cs.image(cs.multislice(slices, optics), optics, 2.0) - 1


def test_ome_zarr_and_zarr_read_our_folders(tmp_path, generator):
    import zarr
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    volume = Volume(torch.randn(37, 130, 141, generator=generator), 2.5)
    write_zarr(tmp_path / "v.zarr", volume, chunks=(16, 64, 64))
    (node,) = Reader(parse_url(tmp_path / "v.zarr"))()
    assert [level.shape for level in node.data] == [(37, 130, 141), (18, 65, 70), (9, 32, 35)]
    assert np.array_equal(node.data[0].compute(), volume.values.numpy())
    assert [axis["unit"] for axis in node.metadata["axes"]] == ["angstrom"] * 3
    array = zarr.open_group(tmp_path / "v.zarr", mode="r")["0"]
    assert array.metadata.zarr_format == 2 and array.chunks == (16, 64, 64)
    assert np.array_equal(array[:], volume.values.numpy())


def test_ome_zarr_models_accepts_our_metadata(tmp_path, generator):
    """A strict reading of the specification, version 0.4."""
    models = pytest.importorskip("ome_zarr_models.v04")
    import zarr

    for kind in ("image", "labels"):
        values = torch.randint(9, (20, 21, 22), generator=generator)
        write_zarr(tmp_path / f"{kind}.zarr", Volume(values, 10.0), kind=kind, levels=3)
        group = models.Image.from_zarr(zarr.open_group(tmp_path / f"{kind}.zarr", mode="r"))
        datasets = group.attributes.multiscales[0].datasets
        steps = [d.coordinateTransformations for d in datasets]
        assert [s[0].scale for s in steps] == [[10.0] * 3, [20.0] * 3, [40.0] * 3]
        assert [s[1].translation for s in steps] == [[0.0] * 3, [5.0] * 3, [15.0] * 3]
