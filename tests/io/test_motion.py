"""Motion on disk: it comes back, in NumPy's own hands too, and damaged files are refused."""

import numpy as np
import pytest
import torch

import cryosim as cs
from cryosim.io.files import FormatError
from cryosim.io.motion import read_motion, write_motion
from cryosim.specimen.motion import Motion

DOSES = torch.tensor([3.0, 2.0], dtype=torch.float64)


def some(generator):
    drift = cs.stage_drift(DOSES, 3, distance=2.0, settling=1.0, generator=generator)
    return drift + cs.beam_induced_motion(DOSES, 3, 1000.0, generator=generator)


def test_it_comes_back(tmp_path, generator):
    motion = some(generator)
    write_motion(tmp_path / "m.npz", motion)
    again = read_motion(tmp_path / "m.npz")
    assert torch.equal(again.drift, motion.drift) and torch.equal(again.field, motion.field)
    assert again.spacing == motion.spacing
    with np.load(tmp_path / "m.npz", allow_pickle=False) as content:
        assert content["drift"].shape == (2, 3, 3) and content["field"].shape[:3] == (2, 3, 3)
    first = (tmp_path / "m.npz").read_bytes()
    write_motion(tmp_path / "m.npz", motion)
    assert (tmp_path / "m.npz").read_bytes() == first


def test_without_a_field(tmp_path):
    write_motion(tmp_path / "m.npz", Motion(torch.ones(1, 2, 3)))
    again = read_motion(tmp_path / "m.npz")
    assert again.field is None and bool((again.drift == 1).all())


def test_what_is_no_motion(tmp_path, generator):
    path = tmp_path / "m.npz"
    with pytest.raises(FormatError, match="an existing file"):
        read_motion(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(FormatError, match="expected drift"):
        read_motion(path)
    np.savez(path, drift=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FormatError, match="in .npz"):
        read_motion(path)
    np.savez(path, drift=np.full((1, 1, 3), np.nan))
    with pytest.raises(FormatError, match="drift: expected finite"):
        read_motion(path)
    np.savez(path, drift=np.zeros((1, 3)))
    with pytest.raises(FormatError, match="Motion.drift"):
        read_motion(path)
    write_motion(path, some(generator))
    whole = path.read_bytes()
    for cut in range(1, len(whole), len(whole) // 23):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            read_motion(path)


def test_bytes_that_changed(tmp_path, generator):
    """Each is refused, or leaves a motion of finite numbers."""
    path = tmp_path / "m.npz"
    write_motion(path, Motion(torch.ones(2, 2, 3)))
    whole = bytearray(path.read_bytes())
    places = torch.randint(len(whole), (200,), generator=generator).tolist()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert bool(torch.isfinite(read_motion(path).drift).all())
        except FormatError:
            pass
