"""Many tasks at once: here, in processes of this machine, and on a running cluster; also when workers die."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cryosim.cluster import outcomes
from cryosim.dataset import complete_items, make_dataset
from tests.front.tiny_dataset import DESCRIPTION, TINY, N

distributed = pytest.importorskip("distributed")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """Content of the dataset that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    make_dataset(DESCRIPTION, folder, N, workers=1)
    return content(folder)


def inverted():
    """1 / x, which has an exception of its own; made here so that it is sent with its code."""

    def invert(x):
        return 1 / x

    return invert


@pytest.mark.parametrize("where", ["here", "there"])
def test_every_task_comes_back_with_its_result_or_its_exception(where, cluster):
    workers, scheduler = (1, None) if where == "here" else (None, cluster.scheduler_address)
    found = dict(outcomes(inverted(), [4, 2, 0, -1], workers=workers, scheduler=scheduler))
    assert isinstance(found.pop(0), ZeroDivisionError)
    assert found == {4: 0.25, 2: 0.5, -1: -1.0}
    assert list(outcomes(inverted(), [], workers=workers, scheduler=scheduler)) == []


def test_one_process_takes_the_tasks_in_their_order_and_stops_where_it_is_told():
    taken = []
    for task, _ in outcomes(taken.append, range(10), workers=0):
        if task == 3:
            break
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize(("workers", "scheduler"), [(-1, None), (2, "tcp://127.0.0.1:1")])
def test_workers_that_cannot_be_are_refused(workers, scheduler):
    with pytest.raises(ValueError, match="expected 0 or more, and none where a scheduler is given"):
        list(outcomes(inverted(), [1], workers=workers, scheduler=scheduler))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1:notaport"])
def test_a_scheduler_that_does_not_answer_is_told(address, monkeypatch):
    monkeypatch.setattr("cryosim.cluster.PATIENCE", 0.5)
    with pytest.raises(ConnectionError, match=f"{address}: expected the address of a running Dask scheduler"):
        list(outcomes(inverted(), [1], scheduler=address))


def test_a_cluster_makes_the_bytes_that_one_process_makes(cluster, tmp_path, alone):
    summary = make_dataset(DESCRIPTION, tmp_path, N, scheduler=cluster.scheduler_address)
    assert summary[:4] == (N, 0, 0, ())
    assert content(tmp_path) == alone


def test_tasks_of_a_worker_that_dies_go_to_another(cluster, tmp_path):
    def mortal(task):
        if task == 2 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task

    found = dict(outcomes(mortal, range(6), scheduler=cluster.scheduler_address))
    assert (tmp_path / "died").exists()
    assert found == {task: task * task for task in range(6)}


def test_a_task_that_kills_its_workers_is_given_up_and_the_others_are_not(cluster):
    def deadly(task):
        time.sleep(0.05)
        if task == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    found = dict(outcomes(deadly, range(4), scheduler=cluster.scheduler_address))
    assert isinstance(found.pop(1), distributed.KilledWorker)
    assert found == {0: 0, 2: 2, 3: 3}


def test_the_command_starts_its_own_processes_and_survives_the_death_of_one(tmp_path, alone):
    """The default way, from a shell: the first worker to make an item is killed while it does."""
    (tmp_path / "run.yaml").write_text(TINY, encoding="utf-8")
    code = "import sys; sys.argv[0] = 'cryosim'\nfrom cryosim.cli import app\nif __name__ == '__main__': app()\n"
    (tmp_path / "command.py").write_text(code)
    arguments = ["dataset", "run.yaml", "-n", str(N), "--out", "out", "-w", "2"]
    process = subprocess.Popen(
        [sys.executable, "command.py", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    victim = _at_work(tmp_path / "out", process)
    os.kill(victim, signal.SIGKILL)
    said, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert said == "out\n" and f"{N} made, 0 complete before, 0 failed" in told
    assert "Traceback" not in told and "distributed" not in told
    assert content(tmp_path / "out") == alone


def _at_work(folder: Path, process: subprocess.Popen) -> int:
    """Number of a process that holds the lock of an item it is making."""
    while process.poll() is None:
        time.sleep(0.02)
        for lock in folder.glob(".tiny_*/lock"):
            with suppress(OSError):
                inode = lock.stat().st_ino
                for line in Path("/proc/locks").read_text().splitlines():
                    fields = line.split()  # number: FLOCK ADVISORY WRITE pid major:minor:inode start end
                    if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
                        return int(fields[4])
    raise AssertionError("the command ended before any item was begun")


@pytest.mark.slow
def test_an_interrupt_from_the_terminal_ends_all_of_it_without_noise(tmp_path):
    """Ctrl-C reaches the workers too, while they are at work."""
    (tmp_path / "run.yaml").write_text(TINY, encoding="utf-8")
    code = "import sys; sys.argv[0] = 'cryosim'\nfrom cryosim.cli import app\nif __name__ == '__main__': app()\n"
    (tmp_path / "command.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "command.py", "dataset", "run.yaml", "-n", "500", "--out", "out", "-w", "2"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    _at_work(tmp_path / "out", process)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "stopped; every file" in told and "Traceback" not in told
    items = tmp_path / "out" / "ExperimentRuns"
    assert sorted(items.iterdir()) == complete_items(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".tiny*"))
