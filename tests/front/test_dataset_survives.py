"""Datasets after what happens to long computations: killed processes, full disks, the same shard started twice."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cryosim.dataset
import cryosim.io.locks
from cryosim.cli import app
from cryosim.dataset import complete_items, make_dataset
from cryosim.io.locks import held, made_aside, sweep
from tests.front.tiny_dataset import DESCRIPTION, TINY, N, content

fork = multiprocessing.get_context("fork")


def begun(folder: Path, shard=(0, 1), resume=True):
    """Another process that makes the dataset."""
    options = {"shard": shard, "resume": resume, "workers": 1}
    process = fork.Process(target=make_dataset, args=(DESCRIPTION, folder, N), kwargs=options)
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """Content of a dataset, and how long a process needs for it [s]."""
    folder, start = tmp_path_factory.mktemp("undisturbed"), time.perf_counter()
    process = begun(folder)
    process.join()
    assert process.exitcode == 0
    return content(folder), time.perf_counter() - start


@pytest.fixture
def copied(undisturbed, monkeypatch) -> None:
    """Items are written as they were, not simulated: what is tested comes before and after."""

    def write(config, folder, **_):
        for name, raw in undisturbed[0].items():
            if f"/{config.name}/" in name and not name.endswith("DONE.json"):
                (folder / Path(name).name).write_bytes(raw)

    monkeypatch.setattr(cryosim.dataset, "run", write)


# ---- kill -9 -------------------------------------------------------------------------------------------------------


def _killed(folder: Path, after: float) -> bool:
    """Whether the process was still at work when it was killed."""
    process = begun(folder)
    process.join(after)
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def _survives(folder: Path, kills: int, undisturbed, seed: int) -> None:
    """After each kill every item in place is whole; at the end everything is as if nothing had happened."""
    expected, lasts = undisturbed
    chance, struck = random.Random(seed), 0
    while struck < kills:
        struck += _killed(folder, chance.uniform(0, 1.2 * lasts / max(1, kills / 5)))
        items = folder / "ExperimentRuns"
        for item in items.iterdir() if items.exists() else ():
            for path in item.rglob("*"):
                assert path.read_bytes() == expected[str(path.relative_to(folder))]
            assert item in complete_items(folder)
        if len(complete_items(folder)) == N:
            for item in random.Random(struck).sample(complete_items(folder), 3):
                (item / "DONE.json").unlink()  # as if these had not been made
                for path in item.iterdir():
                    path.unlink()
                item.rmdir()
    make_dataset(DESCRIPTION, folder, N, resume=True, workers=1)
    assert content(folder) == expected


@pytest.mark.parametrize(
    ("kills", "seed"), [(6, 1), *(pytest.param(20, seed, marks=pytest.mark.slow) for seed in range(2, 7))]
)
def test_after_kills_at_random_the_dataset_is_bit_for_bit_the_undisturbed_one(kills, seed, tmp_path, undisturbed):
    _survives(tmp_path, kills, undisturbed, seed)


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize(
    ("when", "step"),
    [
        ("after", "mkdir"),
        ("before", "run"),
        ("before", "_flush"),
        ("before", "write_text"),
        ("after", "write_text"),
        ("before", "rename"),
        ("after", "rename"),
    ],
)
def test_a_kill_at_each_step_leaves_nothing_half(when, step, tmp_path, undisturbed):
    """The second item is killed there, by the process itself; what is aside afterwards is swept by the next run."""
    process = fork.Process(target=_kills_itself, args=(tmp_path, step, when))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert all(item in complete_items(tmp_path) for item in (tmp_path / "ExperimentRuns").iterdir())
    make_dataset(DESCRIPTION, tmp_path, N, resume=True, workers=1)
    assert content(tmp_path) == undisturbed[0]


def _kills_itself(folder: Path, step: str, when: str) -> None:
    home = Path if step in ("mkdir", "rename") else cryosim.dataset
    true = getattr(home, step)

    def struck(*args, **kwargs):
        if "tiny_000001" in str(args):
            if when == "after":
                true(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*args, **kwargs)

    setattr(home, step, struck)
    make_dataset(DESCRIPTION, folder, 2, resume=True, workers=1)


# ---- the disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB: room for two items."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_with_room_the_dataset_is_completed(small_disk, tmp_path, undisturbed):
    (tmp_path / "run.yaml").write_text(TINY, encoding="utf-8")
    arguments = ["dataset", str(tmp_path / "run.yaml"), "-n", str(N), "--out", str(small_disk / "out"), "-w", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    items = complete_items(small_disk / "out")
    assert 1 <= len(items) < N - 1
    failed = next(line for line in result.stderr.splitlines() if line.startswith("failed: "))
    assert f"tiny_{len(items):06d}" in failed
    assert "No space left" in failed or "requested and" in failed
    assert f"{N - len(items) - 1} items not begun: the disk is full" in " ".join(result.stderr.split())
    before = {path: path.read_bytes() for item in items for path in item.iterdir()}
    assert all(raw == undisturbed[0][str(path.relative_to(small_disk / "out"))] for path, raw in before.items())
    assert not list((small_disk / "out").glob(".tiny*"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0
    assert content(small_disk / "out") == undisturbed[0]


@pytest.mark.parametrize("strikes", [1, 4, 5, 10, 24])
def test_wherever_writing_fails_for_want_of_room_nothing_half_is_left(strikes, tmp_path, monkeypatch, undisturbed):
    true, count = os.fsync, [0]

    def full(handle):
        count[0] += 1
        if count[0] >= strikes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(handle)

    monkeypatch.setattr(os, "fsync", full)
    try:
        summary = make_dataset(DESCRIPTION, tmp_path / "out", N, workers=1)
        assert len(summary.failed) == 1 and "No space left on device" in summary.failed[0].error
        assert summary.made + summary.untried == N - 1 and summary.made <= 2
    except OSError as error:
        assert strikes <= 4 and "make room there" in str(error)  # README and description
    monkeypatch.undo()
    assert all(item in complete_items(tmp_path / "out") for item in (tmp_path / "out" / "ExperimentRuns").iterdir())
    make_dataset(DESCRIPTION, tmp_path / "out", N, resume=True, workers=1)
    assert content(tmp_path / "out") == undisturbed[0]


@pytest.fixture
def read_only(tmp_path):
    """A folder that cannot be written to, whoever runs the test."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
    elif subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode:
        pytest.skip("root may write everywhere, and may not mount here")
    yield folder
    if os.geteuid() == 0:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("below", [".", "new/folder"])
def test_a_read_only_target_is_told_before_anything_is_simulated(below, read_only, tmp_path, monkeypatch):
    monkeypatch.setattr(cryosim.dataset, "make_item", lambda *_: pytest.fail("simulated"))
    (tmp_path / "run.yaml").write_text(TINY, encoding="utf-8")
    arguments = ["dataset", str(tmp_path / "run.yaml"), "-n", "2", "--out", str(read_only / below), "-w", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert str(read_only) in result.stderr and "Name another folder" in " ".join(result.stderr.split())


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="expected a folder for the dataset, got a file"):
        make_dataset(DESCRIPTION, tmp_path / "out", 1, workers=1)
    with pytest.raises(OSError, match="Name another folder"):
        make_dataset(DESCRIPTION, tmp_path / "out" / "deeper", 1, workers=1)
    assert (tmp_path / "out").read_text() == "mine"


# ---- several processes at once -------------------------------------------------------------------------------------


def test_two_shards_started_twice_do_each_other_no_harm(tmp_path, undisturbed):
    processes = [begun(tmp_path, shard) for shard in ((0, 2), (1, 2)) * 2]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert content(tmp_path) == undisturbed[0]


def test_who_comes_second_leaves_what_is_in_place(tmp_path, monkeypatch):
    """Both made the item; the first is in place, and stays."""
    true, inner = cryosim.dataset._put_in_place, []

    def late(*arguments):
        if not inner:
            inner.append(True)
            inner.append(make_dataset(DESCRIPTION, tmp_path, 1, resume=True, workers=1))
        return true(*arguments)

    monkeypatch.setattr(cryosim.dataset, "_put_in_place", late)
    outer = make_dataset(DESCRIPTION, tmp_path, 1, workers=1)
    assert (inner[1].made, outer.made, outer.skipped) == (1, 0, 1)
    assert not list(tmp_path.glob(".tiny*"))


def test_an_interrupt_leaves_whole_items_only(tmp_path, monkeypatch, undisturbed):
    true = cryosim.dataset.make_item

    def interrupted(description, config, folder, numbers):
        true(description, config, folder, numbers)
        if config.name.endswith("1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(cryosim.dataset, "make_item", interrupted)
    (tmp_path / "run.yaml").write_text(TINY, encoding="utf-8")
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["dataset", str(tmp_path / "run.yaml"), "-n", str(N), "--out", str(out), "-w", "1"]
    )
    assert result.exit_code == 130 and "stopped" in result.stderr
    assert len(complete_items(out)) == 1 and not list(out.glob(".tiny*"))
    monkeypatch.undo()
    make_dataset(DESCRIPTION, out, N, resume=True, workers=1)
    assert content(out) == undisturbed[0]


# ---- what is aside -------------------------------------------------------------------------------------------------


def test_a_sweep_takes_what_nobody_works_on(tmp_path):
    left, mine = tmp_path / f".tiny_000001.{'0' * 16}", tmp_path / ".tiny_000001.notes"
    for folder in (left, mine):
        folder.mkdir()
        (folder / "x").write_text("x")
    (tmp_path / ".dataset.12-0123abcd.tmp.yaml").write_text("half")
    (tmp_path / ".hidden").write_text("mine")
    with made_aside(tmp_path, "tiny_000002") as at_work:
        with held(tmp_path):
            sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {at_work.name, mine.name, ".hidden", ".lock"}
    assert not at_work.exists()


def test_where_there_are_no_locks_nothing_is_swept_and_items_are_made(tmp_path, monkeypatch, undisturbed):
    def unsupported(handle, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(cryosim.io.locks.fcntl, "flock", unsupported)
    left = tmp_path / f".tiny_000001.{'0' * 16}"
    left.mkdir()
    make_dataset(DESCRIPTION, tmp_path, N, workers=1)
    assert left.exists()
    left.joinpath("lock").unlink()
    left.rmdir()
    assert content(tmp_path) == undisturbed[0]
