"""Saved specimens: every bit comes back, the same bytes are written, damaged files are refused."""

import json
import math
import os
import zipfile

import numpy as np
import pytest
import torch
from torch.utils import _pytree

import cryosim as cs
from cryosim.io.files import FormatError
from cryosim.io.specimen import read_specimen, write_specimen

DOSES = torch.tensor([3.0, 2.0], dtype=torch.float64)


def rich(generator):
    """Something in every field, float32 beside float64, numbers that have no end in decimals."""
    atoms = cs.Atoms(
        8 * torch.randn(40, 3, generator=generator, dtype=torch.float64),
        torch.randint(1, 30, (40,), generator=generator),
        torch.rand(40, generator=generator, dtype=torch.float64) * 50,
        torch.rand(40, generator=generator, dtype=torch.float64),
        torch.randint(0, 6, (40,), generator=generator),
    )
    ice = cs.Ice(200 / 3, relief=cs.rough_relief(400.0, 2.0, 50.0, generator=generator), structure="water", seed=7)
    specimen = cs.place_randomly([atoms, atoms], [3, 1], (200.0, 200.0, 60.0), gap=0.1, generator=generator)
    chain = specimen.poses[0].replace(instances=torch.tensor([4, 4, 9]))
    motion = cs.stage_drift(DOSES, 2, distance=2.0, settling=1.0, generator=generator)
    return specimen.replace(
        molecules=(specimen.molecules[0], specimen.molecules[1].to(dtype=torch.float32)),
        poses=(chain, specimen.poses[1]),
        ice=ice,
        absorption=cs.Absorption(3750.0, math.inf),
        damage=cs.Damage(
            cs.CriticalExposure(offset=2.5), b_growth=torch.rand(8, generator=generator, dtype=torch.float64), loss=1e-3
        ),
        motion=motion + cs.beam_induced_motion(DOSES, 2, 1000.0, generator=generator),
        names=("chaperone, α", "other_one"),
        kinds=("filament", "protein"),
    )


def same(one, other):
    """Whether two records have the same structure, types and bits."""
    ours, structure = _pytree.tree_flatten(one)
    theirs, its = _pytree.tree_flatten(other)

    def alike(a, b):
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return type(a) is type(b) and a == b

    return structure == its and all(alike(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_bit_comes_back(tmp_path, generator):
    specimen = rich(generator)
    write_specimen(tmp_path / "s.npz", specimen)
    again = read_specimen(tmp_path / "s.npz")
    assert same(again, specimen)
    assert again.names == specimen.names and again.ice.structure == "water" and again.ice.seed == 7
    assert again.absorption.molecules == math.inf and again.molecules[1].positions.dtype == torch.float32
    assert not same(again, specimen.replace(names=("a", "b")))  # and `same` can tell


def test_the_least_specimen(tmp_path):
    """In vacuum, with a molecule of which there is no copy, and gradients left behind."""
    atoms = cs.Atoms(torch.zeros(1, 3, dtype=torch.float64, requires_grad=True), [6])
    poses = cs.Poses(torch.zeros(0, 3, 3), torch.zeros(0, 3))
    write_specimen(tmp_path / "s.npz", cs.Specimen((atoms,), (poses,), (10, 10, 10.5)))
    again = read_specimen(tmp_path / "s.npz")
    assert again.ice is again.motion is None and again.size == (10, 10, 10.5)
    assert again.poses[0].rotations.shape == (0, 3, 3) and not again.molecules[0].positions.requires_grad


def test_it_gives_the_same_images(tmp_path, generator):
    specimen = rich(generator).replace(motion=None).to(dtype=torch.float64)
    write_specimen(tmp_path / "s.npz", specimen)
    tilts = cs.TiltScheme(torch.tensor([0.0, 30.0]), DOSES)
    optics, detector = cs.Optics(voltage=300.0, defocus=20000.0), cs.Detector((24, 24), 4.0)
    series = [
        cs.simulate(s, tilts, optics, detector, generator=torch.Generator().manual_seed(3))
        for s in (specimen, read_specimen(tmp_path / "s.npz"))
    ]
    assert torch.equal(series[0].images, series[1].images) and bool(series[0].images.any())


def test_the_same_bytes(tmp_path, generator):
    """Whenever they are written."""
    specimen = rich(generator)
    write_specimen(tmp_path / "s.npz", specimen)
    first = (tmp_path / "s.npz").read_bytes()
    os.utime(tmp_path / "s.npz", (0, 0))
    write_specimen(tmp_path / "s.npz", read_specimen(tmp_path / "s.npz"))
    assert (tmp_path / "s.npz").read_bytes() == first
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_numpy_reads_it(tmp_path, generator):
    specimen = rich(generator)
    write_specimen(tmp_path / "s.npz", specimen)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as content:
        assert np.array_equal(content["molecules/0/positions"], specimen.molecules[0].positions.numpy())
        assert np.array_equal(content["ice/relief/heights"], specimen.ice.relief.heights.numpy())
        tree = json.loads(content["specimen.json"])
    assert tree["specimen"]["fields"]["names"] == ["chaperone, α", "other_one"]


def test_what_cannot_be_written(tmp_path, generator):
    specimen = rich(generator)
    atoms = specimen.molecules[0]
    with pytest.raises(ValueError, match="molecules/1/positions: expected numbers, got NaN"):
        broken = atoms.replace(positions=atoms.positions * torch.nan)
        write_specimen(tmp_path / "s.npz", specimen.replace(molecules=(atoms, broken)))
    with pytest.raises(ValueError, match="damage: expected tensors"):
        write_specimen(tmp_path / "s.npz", specimen.replace(damage=object()))
    with pytest.raises(ValueError, match="expected .npz"):
        write_specimen(tmp_path / "s.dat", specimen)
    assert not list(tmp_path.iterdir())


def rewritten(path, change):
    """The file with its tree changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    tree = json.loads(entries["specimen.json"])
    change(tree, entries)
    entries["specimen.json"] = json.dumps(tree).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_versions(tmp_path, generator):
    """A field that an older file lacks takes its default; one this version does not know, and a later file, do not."""
    path = tmp_path / "s.npz"
    write_specimen(path, rich(generator))
    rewritten(path, lambda tree, _: tree["specimen"]["fields"].pop("kinds"))
    assert read_specimen(path).kinds == ("protein", "protein")
    rewritten(path, lambda tree, _: tree["specimen"]["fields"].update(charge=1.0))
    with pytest.raises(FormatError, match="fields among .* got charge"):
        read_specimen(path)
    rewritten(path, lambda tree, _: tree.update(version=99))
    with pytest.raises(FormatError, match="later version of cryosim"):
        read_specimen(path)


def test_what_is_no_specimen(tmp_path, generator):
    path = tmp_path / "s.npz"
    with pytest.raises(FormatError, match="an existing file"):
        read_specimen(path)
    np.savez(path, positions=np.zeros(3))
    with pytest.raises(FormatError, match="a specimen in .npz"):
        read_specimen(path)

    def refused(match, change):
        write_specimen(path, rich(generator))
        rewritten(path, change)
        with pytest.raises(FormatError, match=match):
            read_specimen(path)

    place = "molecules/0/positions"
    header = b"\x93NUMPY\x01\x00"
    claims = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 3), }".ljust(117) + b"\n"
    pickled = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    for text in (claims, pickled):
        raw = header + len(text).to_bytes(2, "little") + text
        refused("got .* bytes", lambda tree, entries, raw=raw: entries.update({f"{place}.npy": raw}))
    refused("a specimen in .npz", lambda tree, entries: entries.pop(f"{place}.npy"))
    refused("one of Specimen", lambda tree, entries: tree["specimen"].update(record="Popen"))
    refused("a specimen, got Ice", lambda tree, entries: tree.update(specimen=tree["specimen"]["fields"]["ice"]))
    refused("one Poses for each", lambda tree, entries: tree["specimen"]["fields"]["poses"].pop())


def test_every_changed_byte_is_noticed_or_harmless(tmp_path, generator):
    path = tmp_path / "s.npz"
    specimen = rich(generator).replace(motion=None, ice=cs.Ice(70.0))
    write_specimen(path, specimen)
    whole = path.read_bytes()
    for place in torch.randint(len(whole), (300,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert same(read_specimen(path), specimen)  # a date, say
        except FormatError:
            pass
    for cut in range(1, len(whole), len(whole) // 23):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            read_specimen(path)
