"""OME-Zarr: volumes come back, levels say where they stand, and a folder is whole or not there."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from cryosim.core.volume import Volume
from cryosim.io import store
from cryosim.io.files import FormatError
from cryosim.io.store import atomic_folder, read_zarr, write_zarr


def files(folder):
    return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("shape", [(1, 5, 7), (8, 16, 32), (33, 70, 65)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_image_comes_back(tmp_path, generator, shape, dtype):
    volume = Volume(torch.randn(shape, generator=generator).to(getattr(torch, dtype)), 7.25)
    write_zarr(tmp_path / "v.zarr", volume, chunks=(16, 32, 24), dtype=dtype)
    again = read_zarr(tmp_path / "v.zarr")
    assert again.values.dtype == torch.float32 and again.voxel_size == 7.25
    assert torch.equal(again.values, volume.values.float())


@pytest.mark.parametrize(("largest", "dtype"), [(255, "uint8"), (256, "uint16"), (70000, "uint32")])
def test_labels_come_back(tmp_path, largest, dtype):
    labels = torch.zeros(9, 10, 11, dtype=torch.long)
    labels[4:, 3:7, 2] = largest
    write_zarr(tmp_path / "l.zarr", Volume(labels, 10.0), kind="labels")
    assert json.loads((tmp_path / "l.zarr/0/.zarray").read_text())["dtype"].lstrip("<|") == np.dtype(dtype).str[1:]
    assert torch.equal(read_zarr(tmp_path / "l.zarr").values.long(), labels)


def test_a_level_is_the_mean_of_the_one_before_and_stands_in_its_middle(tmp_path):
    """Of a volume that grows along each axis, the value at a sample tells the place of the sample."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (9, 17, 33)), indexing="ij")
    places = 3.0 * (z + 100 * y + 10000 * x)  # [Å], linear in the place
    write_zarr(tmp_path / "v.zarr", Volume(places, 3.0), levels=3)
    datasets = json.loads((tmp_path / "v.zarr/.zattrs").read_text())["multiscales"][0]["datasets"]
    for level, shape in enumerate([(9, 17, 33), (4, 8, 16), (2, 4, 8)]):
        got = read_zarr(tmp_path / "v.zarr", level)
        assert got.values.shape == shape and got.voxel_size == 3.0 * 2**level
        scale, translation = (step[step["type"]] for step in datasets[level]["coordinateTransformations"])
        at = [torch.arange(n, dtype=torch.float64) * s + t for n, s, t in zip(shape, scale, translation, strict=True)]
        expected = at[0][:, None, None] + 100 * at[1][:, None] + 10000 * at[2]
        torch.testing.assert_close(got.values.double(), expected, rtol=1e-6, atol=0)


def test_labels_are_never_averaged(tmp_path, generator):
    """No number appears that was not there; where eight are alike they stay; of halves the label wins."""
    labels = torch.tensor([0, 3, 900])[torch.randint(3, (16, 16, 16), generator=generator)]
    labels[:4, :4, :4] = 900
    labels[4:6, 4:6, 4] = 3
    labels[4:6, 4:6, 5] = 0
    write_zarr(tmp_path / "l.zarr", Volume(labels, 1.0), kind="labels", levels=2)
    halved = read_zarr(tmp_path / "l.zarr", 1).values
    assert set(halved.unique().tolist()) <= {0, 3, 900}
    assert bool((halved[:2, :2, :2] == 900).all()) and halved[2, 2, 2] == 3
    for z, y, x in ((5, 6, 7), (7, 1, 0)):
        eight = labels[2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten()
        assert (eight == halved[z, y, x]).sum() == torch.bincount(eight).max()


def test_the_same_bytes(tmp_path, generator):
    volume = Volume(torch.randn(40, 90, 100, generator=generator), 7.25)
    write_zarr(tmp_path / "v.zarr", volume)
    first = files(tmp_path / "v.zarr")
    write_zarr(tmp_path / "v.zarr", volume)
    assert files(tmp_path / "v.zarr") == first
    assert [f.name for f in tmp_path.iterdir()] == ["v.zarr"]


def test_an_older_folder_is_replaced_whole(tmp_path):
    write_zarr(tmp_path / "v.zarr", Volume(torch.ones(100, 8, 8), 1.0), chunks=(4, 8, 8))
    write_zarr(tmp_path / "v.zarr", Volume(torch.zeros(4, 8, 8), 2.0))
    again = read_zarr(tmp_path / "v.zarr")
    assert again.values.shape == (4, 8, 8) and not again.values.any() and again.voxel_size == 2.0
    assert len(list((tmp_path / "v.zarr/0").rglob("0"))) == 3  # z, y and x of one chunk


def test_what_fails_leaves_the_older_folder(tmp_path, monkeypatch):
    write_zarr(tmp_path / "v.zarr", Volume(torch.ones(4, 8, 8), 1.0))
    before = files(tmp_path / "v.zarr")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_level", full)
    with pytest.raises(OSError, match="No space left"):
        write_zarr(tmp_path / "v.zarr", Volume(torch.zeros(4, 8, 8), 1.0))
    assert files(tmp_path / "v.zarr") == before and len(os.listdir(tmp_path)) == 1
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="a folder or nothing"), atomic_folder(tmp_path / "file"):
        pass


def test_what_cannot_be_written(tmp_path):
    def refused(match, values, **told):
        with pytest.raises(ValueError, match=match):
            write_zarr(tmp_path / "v.zarr", Volume(values, told.pop("voxel", 1.0)), **told)

    refused("finite values", torch.full((2, 2, 2), torch.nan))
    refused("float16 can hold, got 1e", torch.full((2, 2, 2), 1e6), dtype="float16")
    refused("uint8 can hold", torch.full((2, 2, 2), 256), kind="labels", dtype="uint8")
    refused("whole numbers as labels", torch.ones(2, 2, 2), kind="labels")
    refused("none empty", torch.ones(2, 2))
    refused("levels: expected 1 to 2", torch.ones(4, 40, 40), levels=3)
    refused("voxel_size", torch.ones(2, 2, 2), voxel=0.0)
    refused("chunks", torch.ones(2, 2, 2), chunks=(0, 1, 1))
    assert not list(tmp_path.iterdir())


def test_a_missing_chunk_is_an_error(tmp_path):
    """Where zarr itself reads zeros; also one that holds nothing but zeros has to be there."""
    write_zarr(tmp_path / "v.zarr", Volume(torch.zeros(8, 8, 8), 1.0), chunks=(4, 8, 8))
    (tmp_path / "v.zarr/0/1/0/0").unlink()
    with pytest.raises(FormatError, match="was not copied whole"):
        read_zarr(tmp_path / "v.zarr")


def test_what_cannot_be_read(tmp_path, generator):
    path = tmp_path / "v.zarr"
    write_zarr(path, Volume(torch.randn(8, 8, 8, generator=generator), 1.0))
    shutil.copytree(path, tmp_path / "whole")

    def refused(match, file, change, level=0):
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "whole", path)
        content = json.loads((path / file).read_text())
        change(content)
        (path / file).write_text(json.dumps(content))
        with pytest.raises(FormatError, match=match):
            read_zarr(path, level)

    scale = [{"type": "scale", "scale": [1.0, 1.0, 2.0]}]
    refused("level: expected 0 to 0", ".zattrs", lambda c: None, level=1)
    refused("those of OME-Zarr 0.4", ".zattrs", lambda c: c.clear())
    refused("angstrom or nanometer", ".zattrs", lambda c: c["multiscales"][0]["axes"].pop())
    refused("a folder inside", ".zattrs", lambda c: c["multiscales"][0]["datasets"][0].update(path="../v.zarr/0"))
    refused(
        "same positive", ".zattrs", lambda c: c["multiscales"][0]["datasets"][0].update(coordinateTransformations=scale)
    )
    refused("size: expected at most", "0/.zarray", lambda c: c.update(shape=[2**20] * 3))
    refused("size: expected at most", "0/.zarray", lambda c: c.update(chunks=[2**12] * 3))
    refused("was not copied whole", "0/.zarray", lambda c: c.update(shape=[9, 8, 8]))
    refused("once unpacked", "0/.zarray", lambda c: c.update(chunks=[8, 8, 16]))
    refused("dtype", "0/.zarray", lambda c: c.update(dtype="|O"))
    refused("three sizes", "0/.zarray", lambda c: c.update(shape=[8, 8]))
    with pytest.raises(FormatError, match="none of that name"):
        read_zarr(tmp_path / "other.zarr")
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "whole", path)
    chunk = path / "0/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(FormatError, match="data that can be read"):
        read_zarr(path)
    (path / ".zattrs").write_text("{")
    with pytest.raises(FormatError, match="JSON"):
        read_zarr(path)
