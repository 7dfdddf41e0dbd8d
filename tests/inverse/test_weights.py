"""Weights files: what was written comes back, and what is damaged, foreign or a pickle is refused."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from cryosim.io.files import FormatError
from inverse.priors.denoiser import NoiseConditionalUNet
from inverse.weights import load_denoiser, read_network, read_tensors, write_network

ARGUMENTS = {"widths": (4, 6), "blocks": 1, "scale": 0.7, "voxel_sizes": (8.0, 10.0), "noise_levels": (0.02, 9.0)}


@pytest.fixture
def written(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = NoiseConditionalUNet(**ARGUMENTS)
        torch.nn.init.normal_(network.leave.weight, std=0.1)
    write_network(tmp_path / "small.safetensors", network, {"data": "none"}, torch.float32)
    return tmp_path / "small.safetensors", network


def test_a_network_comes_back_with_all_it_is_for(written, generator):
    path, network = written
    back = load_denoiser(path)
    assert (back.scale, tuple(back.voxel_sizes), tuple(back.noise_levels)) == (0.7, (8.0, 10.0), (0.02, 9.0))
    x = torch.randn(1, 1, 8, 8, 8, generator=generator)
    assert torch.equal(back(x, 0.3), network(x, 0.3))
    assert not back.training and not any(p.requires_grad for p in back.parameters())


def test_half_precision_costs_little(written, tmp_path, generator):
    _, network = written
    write_network(tmp_path / "half.safetensors", network, {})
    x = torch.randn(1, 1, 8, 8, 8, generator=generator)
    whole, half = network(x, 0.3), read_network(tmp_path / "half.safetensors")(x, 0.3)
    assert 0 < float((whole - half).norm() / whole.norm()) < 1e-3


def test_another_voxel_size_is_warned_of_with_both(written):
    path, _ = written
    with pytest.warns(UserWarning, match=r"trained at voxels of 8 to 10 Å is used at 4 Å"):
        load_denoiser(path, voxel_size=4.0)


@pytest.mark.filterwarnings("error")
def test_a_voxel_size_near_those_is_not_warned_of(written):
    load_denoiser(written[0], voxel_size=10.6)


def test_a_pickle_is_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was run",))

    (tmp_path / "old.safetensors").write_bytes(pickle.dumps(Trap()))
    torch.save({"a": torch.zeros(1)}, tmp_path / "new.safetensors")
    for name in ("old", "new"):
        with pytest.raises(FormatError, match="a pickle, which can run any program"):
            load_denoiser(tmp_path / f"{name}.safetensors")


def test_a_file_cut_anywhere_is_refused(written):
    path, _ = written
    whole = path.read_bytes()
    for kept in (1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(FormatError, match="small.safetensors"):
            load_denoiser(path)


def test_sizes_that_a_header_only_declares_are_not_allocated(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 2**60) + text)
    for name in ("huge", "long"):
        with pytest.raises(FormatError, match="whole safetensors"):
            load_denoiser(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "network: expected one of NoiseConditionalUNet, LocalNetwork"),
        ({"network": "os.system"}, "network: expected one of"),
        ({"network": "NoiseConditionalUNet", "arguments": "{"}, "arguments"),
        ({"network": "NoiseConditionalUNet", "arguments": "[1]"}, "arguments"),
        ({"network": "NoiseConditionalUNet", "arguments": '{"widths": [4, 6], "depth": 3}'}, "arguments"),
        ({"network": "NoiseConditionalUNet", "arguments": '{"widths": [1e9], "blocks": 1}'}, "arguments"),
        ({"network": "NoiseConditionalUNet", "arguments": '{"widths": [4], "blocks": 1e12}'}, "arguments"),
        ({"network": "NoiseConditionalUNet", "arguments": '{"widths": [], "blocks": 1}'}, "arguments"),
        ({"network": "NoiseConditionalUNet", "arguments": '{"widths": [4], "blocks": 2, "scale": NaN}'}, "arguments"),
    ],
)
def test_what_names_no_network_is_refused(tmp_path, facts, said):
    save_file({"a": torch.zeros(2)}, tmp_path / "odd.safetensors", facts)
    with pytest.raises(FormatError, match=said):
        load_denoiser(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("enter.weight"), "tensors: expected the .* others: enter.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "others: extra"),
        (lambda t: t.update({"enter.weight": torch.zeros(3, 3)}), r"tensor enter.weight: expected the shape \(4, 8"),
        (lambda t: t["enter.weight"].fill_(float("nan")), "tensor enter.weight: expected finite numbers"),
        (lambda t: t.update({"enter.bias": torch.zeros(4, dtype=torch.int64)}), "tensor enter.bias: expected finite"),
    ],
)
def test_wrong_tensors_are_named(written, change, said):
    path, _ = written
    tensors, facts = read_tensors(path)
    change(tensors)
    save_file(tensors, path, facts)
    with pytest.raises(FormatError, match=said):
        load_denoiser(path)


def test_a_missing_file_is_named():
    with pytest.raises(FormatError, match="nowhere.safetensors: file: expected an existing file"):
        load_denoiser("nowhere.safetensors")
