"""Tomograms straight to a file: the same as in memory, whatever stops the run, in bounded memory."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import mrcfile
import numpy as np
import pytest
import torch

import inverse.streamed
from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.io.mrc import read_volume
from cryosim.io.slabs import MrcSlabs, ZarrSlabs
from cryosim.io.store import read_zarr, write_zarr
from cryosim.microscope.optics import Optics
from inverse.reconstruction import reconstruct
from inverse.streamed import reconstruct_to

METHODS = ["wbp", "least-squares"]
LENS = Optics(300.0, 15000.0, amplitude_contrast=0.07)


def series(generator, rows=150, width=40, counts=50.0, dtype=torch.float32):
    tilts = TiltScheme.dose_symmetric(60, 20, 100.0)
    images = torch.poisson(torch.full((len(tilts), rows, width), counts, dtype=dtype), generator=generator)
    return TiltSeries(images, 4.0, tilts, LENS)


def left_in(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- the same as in memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("suffix", [".mrc", ".zarr"])
@pytest.mark.parametrize(("rows", "width", "depth", "bin"), [(150, 40, 20, 1), (131, 33, 71, 1), (201, 67, 15, 3)])
def test_the_file_holds_what_memory_would(method, suffix, rows, width, depth, bin, generator, tmp_path):
    """Measured: equal to the bit in MRC; slabs of other heights, as Zarr has, differ by 3e-7 of the largest value."""
    given = series(generator, rows, width)
    arguments = {"thickness": 4.0 * bin * depth, "bin": bin, "low_pass": 30.0}
    reconstruct_to(tmp_path / f"t{suffix}", given, method, **arguments)
    made = read_volume(tmp_path / "t.mrc") if suffix == ".mrc" else read_zarr(tmp_path / "t.zarr")
    expected = reconstruct(given, method, **arguments).volume
    assert made.values.shape == expected.values.shape == (depth, rows // bin, width // bin)
    assert float(made.voxel_size) == float(expected.voxel_size)
    assert float((made.values - expected.values).abs().max()) < 1e-6 * float(expected.values.abs().max())
    assert left_in(tmp_path) == [f"t{suffix}"]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_header_tells_sizes_and_statistics(precision, generator, tmp_path):
    reconstruct_to(tmp_path / "t.mrc", series(generator), precision=precision, thickness=50.0)
    if precision == "float32":  # in float16 mrcfile's own sum of squares overflows
        assert mrcfile.validate(tmp_path / "t.mrc")
    with mrcfile.open(tmp_path / "t.mrc") as made:
        assert made.data is not None and made.header is not None
        values = made.data.astype(np.float64)
        assert made.data.dtype == precision
        assert made.data.shape == (12, 150, 40)
        told = [float(made.header[key]) for key in ("dmin", "dmax", "dmean", "rms")]
    known = [values.min(), values.max(), values.mean(), values.std()]
    assert told == pytest.approx(known, rel=1e-6, abs=1e-7 * values.std())


@pytest.mark.parametrize("suffix", [".mrc", ".zarr"])
def test_float16_rounds_float32(suffix, generator, tmp_path):
    given = series(generator)
    for precision in ("float16", "float32"):
        reconstruct_to(tmp_path / f"{precision}{suffix}", given, precision=precision, thickness=50.0)
    read = read_volume if suffix == ".mrc" else read_zarr
    half, single = (read(tmp_path / f"{precision}{suffix}").values for precision in ("float16", "float32"))
    assert torch.equal(half, single.half().float())


def test_the_levels_of_zarr_are_those_of_a_folder_written_at_once(generator, tmp_path):
    reconstruct_to(tmp_path / "t.zarr", series(generator, 300, 270), thickness=80.0)
    one, other = tmp_path / "t.zarr", tmp_path / "once" / "t.zarr"
    other.parent.mkdir()
    write_zarr(other, read_zarr(one))
    files = sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert len([f for f in files if f.parts[0] != "0"]) > 3
    assert files == sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert all((one / f).read_bytes() == (other / f).read_bytes() for f in files)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mrc", ".zarr"])
def test_processes_make_the_same_bytes(suffix, generator, cluster, tmp_path):
    """Also those of a cluster that somebody else has started."""
    given = series(generator, rows=300)
    for name, how in (("one", {}), ("two", {"workers": 2}), ("there", {"scheduler": cluster.scheduler_address})):
        reconstruct_to(tmp_path / f"{name}{suffix}", given, "least-squares", thickness=50.0, **how)
    assert content(tmp_path / f"one{suffix}") == content(tmp_path / f"two{suffix}")
    assert content(tmp_path / f"one{suffix}") == content(tmp_path / f"there{suffix}")


@pytest.mark.parametrize("method", ["tv", "wiener", "sirt"])
def test_rows_that_are_coupled_are_nearly_the_whole(method, generator, tmp_path):
    """By slabs with a halo, as `reconstruct` makes them at once: within 2 %."""
    given = series(generator, rows=130, width=24, counts=500.0)
    y, x = torch.arange(130)[:, None], torch.arange(24)
    ellipses = sum(torch.exp(-(((y - at) / 6) ** 2 + ((x - 12) / 4) ** 2)) for at in range(10, 130, 18))
    given = given.replace(images=given.images * (1 - 0.3 * ellipses))
    path = reconstruct_to(tmp_path / "t.mrc", given, method, thickness=40.0)
    whole = reconstruct(given, method, thickness=40.0, std=False).volume.values
    assert float((read_volume(path).values - whole).norm()) < 0.02 * float(whole.norm())


def content(path):
    """Of a file or of every file in a folder but the one that holds its name."""
    if path.is_file():
        return path.read_bytes()
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".zattrs"}


# ---- stopped and resumed -------------------------------------------------------------------------------------------


def killed_at(path, given, method, stage, done, resume=False):
    """Run in a process of its own that kills itself, as `kill -9` would, when `done` of `stage` is reported."""

    def progress(what, now, _):
        if (what, now) == (stage, done):
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        torch.set_num_threads(1)
        reconstruct_to(path, given, method, thickness=50.0, resume=resume, progress=progress)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("suffix", [".mrc", ".zarr"])
def test_a_killed_run_is_resumed_to_the_same_bytes(method, suffix, generator, tmp_path):
    given, path = series(generator, rows=300), tmp_path / f"t{suffix}"
    reconstruct_to(tmp_path / f"undisturbed{suffix}", given, method, thickness=50.0)
    killed_at(path, given, method, "preparing images", 3)
    killed_at(path, given, method, "preparing images", 7, resume=True)
    killed_at(path, given, method, method, 128, resume=True)
    killed_at(path, given, method, method, 256, resume=True)
    assert not path.exists()
    if suffix == ".zarr":  # what a kill leaves while a chunk is being written
        (tmp_path / f".t{suffix}.work" / "tomogram.zarr" / "0" / "0" / "0" / "0.5a1e.partial").write_bytes(b"half")
    seen = []
    reconstruct_to(
        path, given, method, thickness=50.0, resume=True, progress=lambda what, done, _: seen.append((what, done))
    )
    assert content(path) == content(tmp_path / f"undisturbed{suffix}")
    assert seen == [(method, 256), (method, 300)]  # what was on the disk, and the rest
    assert left_in(tmp_path) == [f"t{suffix}", f"undisturbed{suffix}"]


def test_without_resume_a_run_begins_anew_and_an_error_leaves_nothing(generator, tmp_path, monkeypatch):
    given, path = series(generator, rows=300), tmp_path / "t.mrc"
    killed_at(path, given, "wbp", "wbp", 128)
    assert left_in(tmp_path) == [".t.mrc.work"]
    reconstruct_to(path, given, thickness=50.0)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MrcSlabs, "write", full)
    with pytest.raises(OSError, match="No space left"):
        reconstruct_to(path, given, thickness=90.0)
    assert left_in(tmp_path) == ["t.mrc"]
    assert path.read_bytes() == before


def test_another_plan_is_not_resumed_and_not_destroyed(generator, tmp_path):
    given, path = series(generator, rows=300), tmp_path / "t.mrc"
    killed_at(path, given, "wbp", "wbp", 128)
    kept = content(tmp_path / ".t.mrc.work")
    others = [
        (given, {"thickness": 60.0}),
        (given, {"thickness": 50.0, "precision": "float16"}),
        (given, {"thickness": 50.0, "ctf": "none"}),
        (given.replace(images=given.images + 1), {"thickness": 50.0}),
        (given.replace(optics=LENS.replace(defocus=15001.0)), {"thickness": 50.0}),
    ]
    for other, arguments in others:
        with pytest.raises(ValueError, match=r"plan.json: --resume: expected the series and the arguments"):
            reconstruct_to(path, other, resume=True, **arguments)
    assert content(tmp_path / ".t.mrc.work") == kept
    reconstruct_to(path, given, resume=True, thickness=50.0)
    assert left_in(tmp_path) == ["t.mrc"]


def test_two_processes_do_not_write_the_same_file(generator, tmp_path):
    given, path = series(generator), tmp_path / "t.mrc"

    def again(what, *_):
        with pytest.raises(BlockingIOError, match="another process is at work"):
            reconstruct_to(path, given, thickness=50.0)
        tried.append(what)

    tried = []
    reconstruct_to(path, given, thickness=50.0, progress=again)
    assert "wbp" in tried
    assert left_in(tmp_path) == ["t.mrc"]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mrc", ".zarr"])
def test_a_disk_without_room_is_said_before_anything_is_written(suffix, generator, tmp_path, monkeypatch):
    given = series(generator)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(inverse.streamed.shutil, "disk_usage", lambda _: usage)
    size = 1000 * 150 * 40 * 4 / 2**30 * (1 if suffix == ".mrc" else 8 / 7)
    with pytest.raises(
        ValueError, match=rf"takes {size:.3g} GiB and .* 0.000156 GiB, but the disk has 0.000977 GiB left"
    ):
        reconstruct_to(tmp_path / f"t{suffix}", given, thickness=4000.0)
    assert left_in(tmp_path) == []


def test_what_cannot_be_meant_is_refused(generator, tmp_path):
    given = series(generator, 20, 20)
    for arguments, said in [
        ({"path": "t.tif"}, "ends in .mrc, .rec, .map or .zarr, got '.tif'"),
        ({"path": "none/t.mrc"}, "existing folder"),
        ({"precision": "int16"}, "float32 or float16, got 'int16'"),
        ({"method": "sart"}, "one of .*least-squares"),
        ({"thickness": -1.0}, "thickness"),
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "workers"),
    ]:
        chosen = {"path": "t.mrc"} | arguments
        with pytest.raises(ValueError, match=said):
            reconstruct_to(tmp_path / chosen.pop("path"), given, **chosen)
    assert left_in(tmp_path) == []


def test_values_beyond_float16_are_refused(generator, tmp_path):
    given = series(generator, 20, 20)
    strong = given.replace(pixel_size=1e-9)
    with pytest.raises(ValueError, match=r"float16: expected values that it can hold, got .* V. Take float32."):
        reconstruct_to(tmp_path / "t.mrc", strong, precision="float16", ctf="none", thickness=5e-9)
    assert left_in(tmp_path) == []


# ---- memory --------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch
from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from inverse.streamed import reconstruct_to
torch.set_num_threads(1)
tilts = TiltScheme.dose_symmetric(60, 20, 100.0)
image = torch.poisson(torch.full((int(sys.argv[2]), 512), 50.0), generator=torch.Generator().manual_seed(0))
series = TiltSeries(image.expand(len(tilts), -1, -1), 4.0, tilts)
reconstruct_to(sys.argv[1], series, sys.argv[3], thickness=4.0 * 160)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_rows(method, tmp_path):
    """Rows fourfold, 256 MB of tomogram in place of 64: the image that is prepared is all that grows."""
    peaks = []
    for rows in (192, 768):
        command = [sys.executable, "-W", "ignore", "-c", PEAK, tmp_path / "t.mrc", str(rows), method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    assert peaks[1] < peaks[0] + 40  # [MB]


def test_slab_files_are_plain_values():
    """They travel to other processes."""
    assert MrcSlabs.rows == 64
    assert ZarrSlabs.rows % 128 == 0  # whole chunks
