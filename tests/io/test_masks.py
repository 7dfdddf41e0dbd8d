"""Masks on disk: numbers come back as they were, other programs read them, and a table says what they are."""

import mrcfile
import numpy as np
import pytest
import starfile
import torch

from cryosim.io.files import FormatError
from cryosim.io.labels import Label, read_label_table, read_labels, write_label_table, write_labels

TABLE = [Label(0, "ice", "ice"), Label(1, "apoferritin", "protein"), Label(40000, "vesicle of 80 nm", "membrane")]


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, np.int16), (32767, np.int16), (32768, np.uint16), (65535, np.uint16)]
)
def test_numbers_come_back(tmp_path, largest, dtype):
    labels = torch.zeros(5, 6, 7, dtype=torch.long)
    labels[1:3, 2, 3:] = largest
    write_labels(tmp_path / "m.mrc", labels, 6.8)
    assert mrcfile.validate(tmp_path / "m.mrc")
    with mrcfile.open(tmp_path / "m.mrc") as mrc:
        assert mrc.data.dtype == dtype and np.array_equal(mrc.data, labels.numpy())
        assert float(mrc.voxel_size.x) == pytest.approx(6.8)
    again, voxel = read_labels(tmp_path / "m.mrc")
    assert torch.equal(again.long(), labels) and voxel == pytest.approx(6.8)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.bool])
def test_of_any_whole_type(tmp_path, kind):
    labels = torch.ones(2, 3, 4).to(kind)
    write_labels(tmp_path / "m.mrc", labels, 1.0)
    assert torch.equal(read_labels(tmp_path / "m.mrc")[0], labels.to(torch.int32))


def test_what_does_not_fit_is_refused(tmp_path):
    for labels, match in (
        (torch.full((2, 2, 2), 65536), "got 65536 to 65536"),
        (torch.full((2, 2, 2), -1), "got -1"),
        (torch.ones(2, 2, 2), "whole numbers"),
        (torch.ones(2, 2, dtype=torch.long), "whole numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            write_labels(tmp_path / "m.mrc", labels, 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["json", "star"])
def test_the_table_comes_back(tmp_path, suffix):
    path = tmp_path / f"labels.{suffix}"
    write_label_table(path, TABLE)
    assert read_label_table(path) == TABLE
    first = path.read_bytes()
    write_label_table(path, TABLE)
    assert path.read_bytes() == first


def test_starfile_reads_the_table(tmp_path):
    write_label_table(tmp_path / "labels.star", TABLE)
    table = starfile.read(tmp_path / "labels.star")
    assert table["cryosimLabel"].tolist() == [0, 1, 40000]
    assert table["cryosimLabelName"].tolist()[2] == "vesicle of 80 nm"


def test_tables_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="each number of 0 or more once"):
        write_label_table(tmp_path / "labels.json", [TABLE[1], TABLE[1]])
    with pytest.raises(ValueError, match="expected .json or .star"):
        write_label_table(tmp_path / "labels.txt", TABLE)
    with pytest.raises(ValueError, match="without quotes"):
        write_label_table(tmp_path / "labels.star", [Label(1, "5'-end", "protein")])
    for name, text in (("a.json", "[1]"), ("b.json", "{"), ("c.star", "data_x\n_a 1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(FormatError, match="a table of labels"):
            read_label_table(tmp_path / name)
