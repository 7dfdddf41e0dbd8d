"""Many independent tasks at once, on the cores of one machine or on a cluster, by Dask.

On one machine `outcomes` starts a process for each core. `scheduler="tcp://host:8786"` takes a cluster that runs
already; its machines have to see the same folders under the same names and have the same versions installed.

On SLURM there are two ways. With dask-jobqueue (pip install dask-jobqueue), workers are jobs, started and replaced by a
small program that stays on the login node as long as the dataset is made::

    from dask_jobqueue import SLURMCluster

    if __name__ == "__main__":
        cluster = SLURMCluster(
            cores=16, processes=16, memory="64GB", walltime="12:00:00",
            job_script_prologue=[
                # Dask's own value gives memory back so eagerly that simulations take up to twice as long
                "export DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON__MALLOC_TRIM_THRESHOLD_=134217728",
            ],
        )
        cluster.adapt(maximum_jobs=20)  # at most 20 jobs of 16 processes
        print(cluster.scheduler_address, flush=True)
        input("Return ends it. ")

and then, in another shell, with the address that it prints::

    cryosim dataset run.yaml -n 1000 --out /shared/set --resume --scheduler tcp://10.0.0.1:40001

Or without a scheduler of our own, as an array of jobs that know nothing of each other; each makes every N-th item, and
the same script sent again goes on where time ran out::

    #!/bin/bash
    #SBATCH --array=0-19
    #SBATCH --cpus-per-task=16
    #SBATCH --mem=64G
    #SBATCH --time=12:00:00
    export OMP_NUM_THREADS=1
    cryosim dataset run.yaml -n 1000 --out /shared/set --resume \\
        --workers $SLURM_CPUS_PER_TASK --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

A program that calls `outcomes` with several workers has to keep what it does below `if __name__ == "__main__":`, as
each of them imports it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from distributed import Client

# Of a worker. Dask's own also has MALLOC_TRIM_THRESHOLD_, with which each array of a wave is asked of the system anew:
# a simulation then takes up to twice as long.
_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# Ctrl-C goes to every process of the terminal; workers end when this one tells them to.
_DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"

T = TypeVar("T")
R = TypeVar("R")

DEATHS = 2
"""Of workers that a task survives; after one more it is put back, as it may be what kills them."""

PATIENCE = 10.0
"""For the answer of a scheduler [s]."""


def outcomes(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    workers: int | None = None,
    scheduler: str | None = None,
) -> Iterator[tuple[T, R | Exception]]:
    """Each task with `function(task)`, or with the exception in its place, as they come to an end.

    When a worker dies its tasks go to others. One whose workers die again and again is tried once more when all others
    are done, with the cluster to itself. When the caller stops early, tasks that have not begun never do.

    Parameters
    ----------
    function : callable
        For processes, one that can be pickled.
    tasks : sequence
    workers : int, optional
        Processes on this machine: 0 or 1 works in this one, without Dask. One for each core when left out.
    scheduler : str, optional
        Address of a running Dask cluster, in place of processes on this machine.

    Raises
    ------
    ConnectionError
        When there is no scheduler at the address.
    ValueError
        For a negative number of workers, or workers and a scheduler both.
    """
    if workers is not None and (workers < 0 or scheduler is not None):
        raise ValueError(
            "workers: expected 0 or more, and none where a scheduler is given, which has its own, got "
            f"{workers}{f' and {scheduler}' if scheduler else ''}."
        )
    workers = min(cores() if workers is None else workers, len(tasks))
    if scheduler is None and workers <= 1:
        yield from _here(function, tasks)
        return
    with _client(workers, scheduler) as client:
        yield from _there(client, function, tasks)


def cores() -> int:
    """That this process may use, by its affinity and its control group."""
    from dask.system import cpu_count

    return cpu_count()


def _here(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
    for task in tasks:
        try:
            outcome = function(task)
        except Exception as error:
            outcome = error
        yield task, outcome


def _there(client: Client, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
    """All at once, and then one by one those whose workers have died: another task may have killed them."""
    from distributed import KilledWorker

    killed: list[T] = []
    for task, outcome in _at_once(client, function, tasks):
        if isinstance(outcome, KilledWorker):
            killed.append(task)
        else:
            yield task, outcome
    for task in killed:
        yield from _at_once(client, function, [task])


def _at_once(client: Client, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
    from distributed import as_completed

    futures = client.map(function, tasks, pure=False)
    which = {future.key: task for future, task in zip(futures, tasks, strict=True)}
    try:
        for future in as_completed(futures, loop=client.loop):
            if future.status == "finished":
                yield which[future.key], future.result()
            else:
                error = future.exception() if future.status == "error" else None
                yield which[future.key], error or ConnectionError(f"the cluster gave the task up ({future.status}).")
            future.release()
    finally:
        client.cancel(futures)


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Client]:
    """Of a running cluster, or of processes that end with the block."""
    import dask.config
    from distributed import Client, LocalCluster

    with ExitStack() as opened:
        if scheduler is not None:
            yield opened.enter_context(_connected(scheduler))
            return
        settings = {
            "distributed.scheduler.allowed-failures": DEATHS,
            "distributed.nanny.pre-spawn-environ": _ENVIRONMENT,
        }
        opened.enter_context(dask.config.set({f"distributed.{key}": value for key, value in settings.items()}))
        _ignore_semaphores_left()
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # none: a share for each would kill a worker while there is room beside it
            dashboard_address=":0",  # any that is free
            silence_logs=logging.CRITICAL,
            preload=[_DEAF],
        )
        yield opened.enter_context(Client(opened.enter_context(cluster), set_as_default=False))


def _ignore_semaphores_left() -> None:
    """Have Python's resource tracker remove what ended workers leave, and not warn of it."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker:UserWarning"]))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _connected(scheduler: str) -> Client:
    from distributed import Client

    try:
        return Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ConnectionError(
            f"{scheduler}: expected the address of a running Dask scheduler, such as tcp://10.0.0.1:8786, got {error}."
        ) from error
