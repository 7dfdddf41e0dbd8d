"""Datasets for training: what a pair is, and that deepinv's Trainer takes it."""

import pickle
import shutil

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from cryosim.config import ConfigError, RunConfig, true_tilts
from cryosim.dataset import make_dataset
from cryosim.description import describe, item_config
from cryosim.io.files import FormatError
from cryosim.io.mrc import write_volume
from cryosim.io.series import read_series, write_series
from cryosim.training import SimulatedTiltSeries, TiltSeriesDataset

TINY = """
name: tiny
specimen: {molecules: [{structure: ubiquitin}], size: [70, 70, 70], ice: {thickness: 120}}
tilts: {extent: 20, step: 20, total_dose: 60, angle_error: 0.4, shift_error: 6}
output: {files: [halves]}
optics: {defocus: {uniform: [10000, 20000]}}
detector: {shape: [30, 32], pixel_size: 4}
sampling: {thickness: 30, width: 6}
"""
DESCRIPTION = describe(yaml.safe_load(TINY))
N = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    make_dataset(DESCRIPTION, folder, N, workers=1)
    return folder


def halved(volume, images):
    return volume[..., ::2], images / 2


def test_a_pair_is_the_truth_and_the_counts_in_order_of_exposure(folder):
    data = TiltSeriesDataset(folder, as_dict=True)
    assert len(data) == N and [path.name for path in data.folders] == [f"tiny_{i:06d}" for i in range(N)]
    x, y, parameters = data[1].values()
    assert x.shape == (1, 30, 30, 32) and y.shape == (1, 3, 30, 32)
    assert x.dtype == y.dtype == torch.float32
    assert parameters["angles"].tolist() == pytest.approx([0, 20, -20], abs=2)
    assert float(x.max()) > 1  # [V]
    assert y.mean((0, 2, 3)).tolist() == pytest.approx([20 * 16] * 3, rel=0.1)  # [e-/px], less what the ice takes
    optics = data.series(1).optics
    assert optics and float(optics.defocus) == pytest.approx(item_config(DESCRIPTION, 1).optics.defocus)
    assert data.volume(1).voxel_size == 4 and data.series(1).pixel_size == 4
    assert len(TiltSeriesDataset(folder)[0]) == 2


def test_angles_and_shifts_are_the_true_ones(folder):
    """The stage tells 0, 20, -20 and no shifts; a small error of the angles is in the images, and so in the dataset."""
    read, made = TiltSeriesDataset(folder), SimulatedTiltSeries(DESCRIPTION, N)
    for i, item in enumerate(read.folders):
        told, tilts, true = (
            read_series(item / f"{item.name}.mrc").tilts,
            read.series(i).tilts,
            true_tilts(made.config(i)),
        )
        assert told.angles.tolist() == [0, 20, -20] and not told.shifts.any()
        assert torch.equal(tilts.angles, true.angles) and torch.equal(tilts.shifts, true.shifts)
        torch.testing.assert_close(tilts.doses, told.doses, rtol=1e-6, atol=0)
        assert not torch.equal(tilts.angles, told.angles) and float(tilts.shifts.abs().max()) > 1


def test_halves_are_in_the_same_order_and_sum_to_the_series(folder):
    even, odd, both = (TiltSeriesDataset(folder, images=name)[0][1] for name in ("even", "odd", "series"))
    assert torch.equal(even + odd, both) and not torch.equal(even, odd)


def test_parameters_of_another_program_are_told(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    path = own / "ExperimentRuns" / "tiny_000000" / "tiny_000000_parameters.yaml"
    path.write_text("x".ljust(path.stat().st_size))
    with pytest.raises(FormatError, match=r"parameters.yaml: content: expected the parameters of a run"):
        TiltSeriesDataset(own).series(0)


def test_simulated_on_the_fly_is_what_the_files_hold(folder):
    read, made = TiltSeriesDataset(folder, as_dict=True), SimulatedTiltSeries(DESCRIPTION, 2, start=1, as_dict=True)
    assert len(made) == 2
    for i in range(2):
        torch.testing.assert_close(made[i], read[i + 1], rtol=1e-6, atol=1e-6)
    with pytest.raises(IndexError):
        made[2]


def test_one_description_may_be_given_in_four_ways(folder):
    config = RunConfig.model_validate(
        {
            "detector": {"shape": [16, 16], "pixel_size": 8},
            "tilts": {"extent": 0},
            "specimen": {"molecules": [{"structure": "ubiquitin"}]},
        }
    )
    assert SimulatedTiltSeries(config, 1)[0][0].shape == (1, 50, 16, 16)
    for given in (DESCRIPTION, folder / "dataset.yaml", str(folder / "dataset.yaml")):
        assert SimulatedTiltSeries(given, 1).config(0) == item_config(DESCRIPTION, 0)


@pytest.mark.parametrize("kind", ["read", "simulated"])
def test_workers_of_a_loader_give_the_same_batches(kind, folder):
    options = {"transform": halved, "as_dict": True}
    data = TiltSeriesDataset(folder, **options) if kind == "read" else SimulatedTiltSeries(DESCRIPTION, N, **options)
    here = next(iter(DataLoader(data, batch_size=N)))
    there = next(iter(DataLoader(data, batch_size=N, num_workers=1, multiprocessing_context="fork")))
    torch.testing.assert_close(here, there, rtol=0, atol=0)
    assert here["x"].shape == (N, 1, 30, 30, 16) and here["params"]["angles"].shape == (N, 3)
    plain = TiltSeriesDataset(folder)
    assert torch.equal(pickle.loads(pickle.dumps(plain))[1][1], plain[1][1])  # as a worker that is spawned gets it


def test_transform_is_the_last_thing_done(folder):
    plain, changed = TiltSeriesDataset(folder)[0], TiltSeriesDataset(folder, transform=halved)[0]
    assert torch.equal(changed[0], plain[0][..., ::2]) and torch.equal(changed[1], plain[1] / 2)


def test_other_volumes_and_images_go_by_their_names(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    data = TiltSeriesDataset(own)
    series, volume = data.series(0), data.volume(0)
    write_series(data.folders[0] / "tiny_000000_even.mrc", series.replace(images=series.images + 1))
    write_volume(data.folders[0] / "tiny_000000_labels.mrc", volume.replace(values=torch.ones_like(volume.values)))
    x, y = TiltSeriesDataset(own, volume="labels", images="even")[0]
    assert bool((x == 1).all()) and torch.equal(y, series.images[None] + 1)
    with pytest.raises(FormatError, match="tiny_000001_labels.mrc: file: expected an existing file"):
        TiltSeriesDataset(own, volume="labels")[1]


def test_only_items_with_a_valid_done_are_given(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "ExperimentRuns" / "tiny_000001" / "DONE.json").unlink()
    assert [path.name for path in TiltSeriesDataset(own).folders] == ["tiny_000000", "tiny_000002"]
    for nothing in (tmp_path, tmp_path / "none"):
        with pytest.raises(FormatError, match=r"expected one or more with a valid DONE.json, got none"):
            TiltSeriesDataset(nothing)


@pytest.mark.parametrize("numbers", [{"length": 0}, {"length": 3, "start": -1}])
def test_a_length_that_is_none_is_refused(numbers):
    with pytest.raises(ValueError, match="expected at least one item, from 0 or a later one on"):
        SimulatedTiltSeries(DESCRIPTION, **numbers)


def test_a_draw_that_cannot_be_is_told_with_its_values():
    with pytest.warns(UserWarning, match="break a rule between keys"):
        description = describe(yaml.safe_load(TINY) | {"optics": {"voltage": {"choice": [300, 400]}}})
    data = SimulatedTiltSeries(description, 30)
    wrong = next(i for i in range(30) if _fails(data, i))
    with pytest.raises(ConfigError, match="Drawn were optics.voltage 400"):
        data[wrong]


def _fails(data, i):
    try:
        data.config(i)
    except ConfigError:
        return True
    return False


class Scaled(torch.nn.Module):
    """Back-projection with a gain to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1e-3))

    def forward(self, y, physics, **kwargs):
        return self.gain * physics.A_adjoint(y)


@pytest.mark.parametrize("kind", ["read", "simulated"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_deepinv_trains_on_it(kind, as_dict, folder, tmp_path):
    """One epoch with the exact projection; as dictionaries the operator begins with others and gets the item's own."""
    deepinv = pytest.importorskip("deepinv")
    from inverse import TiltProjection

    read, simulated = TiltSeriesDataset(folder, as_dict=as_dict), SimulatedTiltSeries(DESCRIPTION, 2, as_dict=as_dict)
    data = read if kind == "read" else simulated
    physics = TiltProjection([1.0, 2.0, 3.0] if as_dict else [0.0, 20.0, -20.0], volume_shape=(30, 30, 32))
    model = Scaled()
    trainer = deepinv.Trainer(
        model=model,
        physics=physics,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-9),
        train_dataloader=DataLoader(data, batch_size=1),
        epochs=1,
        losses=deepinv.loss.SupLoss(),
        save_path=str(tmp_path),
        device="cpu",
        verbose=False,
        show_progress_bar=False,
    )
    trainer.train()
    assert torch.isfinite(model.gain) and model.gain.item() != pytest.approx(1e-3, rel=1e-6)
    last = data[len(data) - 1]["params"]["angles"].tolist() if as_dict else [0, 20, -20]
    assert physics.angles.flatten().tolist() == pytest.approx(last, rel=1e-6)
