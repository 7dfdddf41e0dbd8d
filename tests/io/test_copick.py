"""copick projects: files where copick looks for them, and copick itself, in an environment of its own, reads them."""

import json
import subprocess
import sys

import pytest
import torch

from cryosim.core.rotation import random_rotations
from cryosim.core.volume import Volume
from cryosim.io.copick import (
    CopickObject,
    copick_name,
    write_copick_config,
    write_copick_picks,
    write_copick_segmentation,
    write_copick_tomogram,
)
from cryosim.io.store import read_zarr
from cryosim.specimen.specimen import Poses

VOXEL, SHAPE = 10.0, (20, 31, 42)
OBJECTS = [
    CopickObject("apoferritin", 1, radius=60.0, pdb_id="6Z6U", metadata={"copies": 3}),
    CopickObject("membrane", 2, is_particle=False),
]


def project(folder, generator):
    """A project of one run; returns its poses, tomogram and labels."""
    run = folder / "ExperimentRuns" / "item_0003"
    poses = Poses(random_rotations(3, generator), 50 * torch.randn(3, 3, generator=generator, dtype=torch.float64))
    tomogram = Volume(torch.randn(SHAPE, generator=generator), VOXEL)
    labels = torch.randint(3, SHAPE, generator=generator)
    write_copick_config(folder / "copick.json", OBJECTS, root=str(folder))
    write_copick_picks(run, "apoferritin", poses, voxel_size=VOXEL, volume_shape=SHAPE)
    write_copick_tomogram(run, tomogram, "wbp")
    write_copick_segmentation(run, Volume((labels == 2).long(), VOXEL), "membrane")
    write_copick_segmentation(run, Volume(labels, VOXEL), "truth", multilabel=True)
    return poses, tomogram, labels


def test_where_everything_stands(tmp_path, generator):
    _, tomogram, labels = project(tmp_path, generator)
    run = tmp_path / "ExperimentRuns" / "item_0003"
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.suffix in (".zarr", ".json")}
    assert found == {
        "Picks/cryosim_0_apoferritin.json",
        "VoxelSpacing10.000/wbp.zarr",
        "Segmentations/10.000_cryosim_0_membrane.zarr",
        "Segmentations/10.000_cryosim_0_truth-multilabel.zarr",
    }
    assert torch.equal(read_zarr(run / "VoxelSpacing10.000/wbp.zarr").values, tomogram.values)
    multilabel = read_zarr(run / "Segmentations/10.000_cryosim_0_truth-multilabel.zarr")
    assert torch.equal(multilabel.values.long(), labels) and multilabel.voxel_size == VOXEL
    config = json.loads((tmp_path / "copick.json").read_text())
    assert config["config_type"] == "filesystem" and config["overlay_root"] == f"local://{tmp_path}"
    assert [entry["label"] for entry in config["pickable_objects"]] == [1, 2]
    assert config["pickable_objects"][0]["metadata"] == {"copies": 3}


def test_a_pick_counts_from_the_corner(tmp_path):
    """The specimen's origin is sample n // 2, for even and odd n; the rotation is that of the pose."""
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]], dtype=torch.float64)
    poses = Poses(turn, torch.tensor([[1.5, 0.0, -2.0]], dtype=torch.float64))
    path = write_copick_picks(tmp_path / "run", "a", poses, voxel_size=VOXEL, volume_shape=SHAPE)
    (point,) = json.loads(path.read_text())["points"]
    assert point["location"] == {"x": 211.5, "y": 150.0, "z": 98.0}
    assert point["transformation_"] == [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert point["instance_id"] == 0
    assert json.loads(path.read_text())["run_name"] == "run"


def test_instances(tmp_path):
    """Subunits of one filament share a number of 1 or more, as copick has it."""
    poses = Poses(torch.eye(3).expand(3, 3, 3), torch.zeros(3, 3), torch.tensor([0, 0, 1]))

    def numbers(**given):
        path = write_copick_picks(tmp_path / "run", "a", poses, voxel_size=1.0, volume_shape=SHAPE, **given)
        return [point["instance_id"] for point in json.loads(path.read_text())["points"]]

    assert numbers() == [1, 1, 2]
    assert numbers(instances=torch.tensor([7, 8, 9])) == [7, 8, 9]
    with pytest.raises(ValueError, match="3 whole numbers of 0 or more"):
        numbers(instances=torch.tensor([7, 8]))


def test_names():
    assert copick_name("molecule 1") == "molecule-1"
    assert copick_name("_6Z6U: a/b ") == "6Z6U--a-b"
    with pytest.raises(ValueError, match="a letter or digit"):
        copick_name("_ _")


def test_what_copick_would_refuse(tmp_path):
    poses = Poses(torch.eye(3)[None], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="See copick_name"):
        write_copick_picks(tmp_path / "run", "molecule 1", poses, voxel_size=1.0, volume_shape=SHAPE)
    with pytest.raises(ValueError, match="0 is background"):
        write_copick_config(tmp_path / "c.json", [CopickObject("a", 0)])
    with pytest.raises(ValueError, match="a label for each"):
        write_copick_config(tmp_path / "c.json", [CopickObject("a", 1), CopickObject("b", 1)])
    with pytest.raises(ValueError, match="got NaN or infinity"):
        broken = poses.replace(positions=torch.full((1, 3), torch.nan))
        write_copick_picks(tmp_path / "run", "a", broken, voxel_size=1.0, volume_shape=SHAPE)
    with pytest.raises(ValueError, match="0 and 1, got others"):
        write_copick_segmentation(tmp_path / "run", Volume(torch.full((2, 2, 2), 5), 1.0), "a")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


SCRIPT = """
import json, sys
import copick, numpy as np
root = copick.from_file(sys.argv[1])
(run,) = root.runs
(picks,) = run.get_picks("apoferritin")
places, transforms = picks.numpy()
(tomogram,) = run.get_voxel_spacing(10.0).get_tomograms("wbp")
(membrane,) = run.get_segmentations(name="membrane")
(truth,) = run.get_segmentations(name="truth", is_multilabel=True)
np.savez(
    sys.argv[2], places=places, transforms=transforms, tomogram=tomogram.numpy(), membrane=membrane.numpy(),
    truth=truth.numpy(), name=run.name,
    objects=json.dumps({o.name: [o.label, o.is_particle, o.radius, o.pdb_id] for o in root.pickable_objects}),
    unit=picks.meta.unit, masks=json.dumps([membrane.is_multilabel, truth.is_multilabel, truth.voxel_size]),
)
"""


@pytest.mark.slow
def test_copick_reads_it(tmp_path, generator):
    """copick wants another zarr than ours, so it lives elsewhere."""
    numpy = pytest.importorskip("numpy")
    (tmp_path / "project with a space").mkdir()
    poses, tomogram, labels = project(tmp_path / "project with a space", generator)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "copick>=1.31,<2"], check=True)
    config = tmp_path / "project with a space" / "copick.json"
    subprocess.run([python, "-c", SCRIPT, config, tmp_path / "got.npz"], check=True, cwd=tmp_path)
    with numpy.load(tmp_path / "got.npz", allow_pickle=False) as got:
        origin = torch.tensor([n // 2 * VOXEL for n in reversed(SHAPE)], dtype=torch.float64)
        torch.testing.assert_close(torch.from_numpy(got["places"]), poses.positions + origin)
        torch.testing.assert_close(torch.from_numpy(got["transforms"])[:, :3, :3], poses.rotations)
        assert numpy.array_equal(got["tomogram"], tomogram.values.numpy())
        assert numpy.array_equal(got["membrane"], (labels == 2).numpy())
        assert numpy.array_equal(got["truth"], labels.numpy())
        assert str(got["name"]) == "item_0003" and str(got["unit"]) == "angstrom"
        assert json.loads(str(got["masks"])) == [False, True, 10.0]
        assert json.loads(str(got["objects"])) == {
            "apoferritin": [1, True, 60.0, "6Z6U"],
            "membrane": [2, False, None, None],
        }
