"""Tomograms of any size: straight to a file, slab by slab, resumed where a run was stopped, on one machine or many.

Beside the file stands, while it is made, a folder `.NAME.work`:

    plan.json       what is made, of which series; another plan does not resume it
    images.f32      the prepared images (tilt, y, x), and prepared.json once they are whole
    finished/       one small file for each slab of rows that is on the disk
    tomogram.*      the file in the making, put in its place in one step at the end

A slab is the same whoever makes it and whenever, so a run that was killed and resumed gives the bytes of one that was
not (with as many threads: sums over more are rounded otherwise). While the disk takes one block, the next is computed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch.utils import _pytree

from cryosim.acquisition.series import TiltSeries
from cryosim.cluster import outcomes
from cryosim.io.files import FormatError, sync, write_text
from cryosim.io.slabs import MrcSlabs, Precision, Statistics, ZarrSlabs
from cryosim.io.store import replace_folder
from inverse.design import Design, Method, designed, fitted_design
from inverse.preparation import Correction, prepared_images
from inverse.slabs import slabs
from inverse.solvers.linear import Filter

_WAITING = 3  # blocks that are computed and not yet written
_SLABS_A_TASK = 8  # at most: so many share what does not depend on the rows
_MRC = (".mrc", ".rec", ".map")

Report = Callable[[str, int, int], None]


def reconstruct_to(
    path: str | Path,
    series: TiltSeries,
    method: Method = "wbp",
    *,
    precision: Precision = "float32",
    thickness: float | None = None,
    bin: int = 1,
    ctf: Correction = "flip",
    filter: Filter = "ramp",
    low_pass: float | None = None,
    weight: float | None = None,
    iterations: int | None = None,
    network: str | Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    bends: float | None = None,
    resume: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Report | None = None,
) -> Path:
    """Write the tomogram of a tilt series, in memory that does not grow with it.

    Parameters
    ----------
    path : str or path
        NAME.mrc (or .rec, .map) or NAME.zarr, on the disk where the work is done. What stands there is replaced at the
        end, and not before.
    series, method, thickness, bin, ctf, filter, low_pass, weight, iterations, network, samples, seed, bends
        As in `inverse.reconstruct`.
    precision : {"float32", "float16"}
        Of the values in the file. The images are prepared, and the sums made, in float32.
    resume : bool
        Go on where a run with the same arguments was stopped, and keep what this one has done if it is. Otherwise
        begin anew, and only a kill that cannot be caught leaves anything behind.
    workers : int, optional
        Processes of one thread each; this process with its own threads when left out.
    scheduler : str, optional
        Address of a running Dask cluster that sees the same folders.
    progress : callable, optional
        Called with (what, done, in all), the rows of the volume at the end.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    ValueError
        For what `inverse.reconstruct` refuses, another suffix or precision, values too large for float16, a disk
        without room (before anything is written), or a plan that is not the one to be resumed.
    BlockingIOError
        When another process is writing the same file.
    """
    target = Path(os.path.realpath(path))
    how: dict[str, Any] = {"bin": bin, "ctf": ctf, "low_pass": low_pass}
    chosen: Any = {
        "filter": filter,
        "weight": weight,
        "iterations": iterations,
        "samples": samples,
        "seed": seed,
        "bends": bends,
    }
    network = None if network is None else _network(network)
    design = designed(series, method, thickness=thickness, network=network, **chosen, **how)
    work = target.with_name(f".{target.name}.work")
    output = _output(target, work, design, precision)
    _check_room(target, work, output.size, _Images(work / "images.f32", _image_shape(design)).size)
    plan = {
        "design": _as_json(design),
        "precision": precision,
        "slab": [output.rows, output.layers],
        "images": how | {"series": _fingerprint(series)},
    }
    with _working(work, plan, resume):
        _prepare(work, series, design, plan["images"], progress)
        if not ((work / "started").exists() and output.path.exists()):
            for entry in (output.path, work / "finished"):
                _clear(entry)
            output.create()
            (work / "finished").mkdir()
            write_text(work / "started", "\n")
        _make_all(work, output, design, workers, scheduler, progress)
        parts = [json.loads(_mark(work, start).read_text()) for start in range(0, design.shape[1], output.rows)]
        output.finish(Statistics.joined(Statistics(*part) for part in parts))
        if isinstance(output, ZarrSlabs):
            replace_folder(output.path, target)
        else:
            os.replace(output.path, target)
            sync(target.parent)
    return Path(path)


# ------------------------------------------------------------------------------------------------------ before the work


def _output(target: Path, work: Path, design: Design, precision: Precision) -> MrcSlabs | ZarrSlabs:
    if precision not in get_args(Precision):
        raise ValueError(f"{target}: precision: expected float32 or float16, got {precision!r}.")
    if target.suffix.lower() == ".zarr":
        return ZarrSlabs(work / "tomogram.zarr", design.shape, design.voxel_size, precision, target.stem)
    if target.suffix.lower() in _MRC:
        return MrcSlabs(work / "tomogram.mrc", design.shape, design.voxel_size, precision)
    raise ValueError(f"{target}: expected a name that ends in .mrc, .rec, .map or .zarr, got {target.suffix!r}.")


def _network(path: str | Path) -> str:
    """Weights as other processes find them: by their whole path, or the name of some that come with the project."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


def _check_room(target: Path, work: Path, tomogram: int, images: int) -> None:
    """That the disk has room for the tomogram and the prepared images [byte], with what is there of them already."""
    if not target.parent.is_dir():
        raise ValueError(f"{target}: expected a file in an existing folder. Make the folder first.")
    there = sum(p.stat().st_blocks * 512 for p in work.rglob("*") if p.is_file())
    free = shutil.disk_usage(target.parent).free + there
    if tomogram + images > free:
        gib = 2**30
        raise ValueError(
            f"{target}: the tomogram takes {tomogram / gib:.3g} GiB and its prepared images {images / gib:.3g} GiB, "
            f"but the disk has {free / gib:.3g} GiB left. Make room, choose another disk, raise bin, lower the "
            "thickness or take float16."
        )


def _fingerprint(series: TiltSeries) -> str:
    """Of everything in a series that a tomogram depends on."""
    digest = hashlib.blake2b(digest_size=16)
    for image in series.images:
        digest.update(image.detach().cpu().contiguous().numpy().data)
    for leaf in _pytree.tree_leaves((series.pixel_size, series.tilts, series.optics)):
        digest.update(repr(leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf).encode())
    return digest.hexdigest()


def _as_json(design: Design) -> dict[str, Any]:
    fields = design._asdict()  # NaN is not JSON
    return fields | ({"weight": None} if math.isnan(design.weight) else {})


def _from_json(fields: dict[str, Any]) -> Design:
    fields = fields | ({"weight": math.nan} if fields["weight"] is None else {})
    fields |= {n: tuple(fields[n]) for n in ("shape", "angles", "noise")}
    fields["transfer"] = tuple(tuple(tilt) for tilt in fields["transfer"])
    if fields["levels"] is not None:
        fields["levels"] = tuple(fields["levels"])
    if fields["model"] is not None:
        fields["model"] = tuple(tuple(part) for part in fields["model"])
    return Design(**fields)


@contextmanager
def _working(work: Path, plan: dict[str, Any], resume: bool) -> Iterator[None]:
    """While the block runs the folder `work` is ours, with what a run of the same plan left there, if it is resumed."""
    work.mkdir(exist_ok=True)
    lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{work}: another process is at work here. Wait for it, or end it.") from error
        except OSError:
            pass  # a file system without locks
        text = json.dumps(plan, indent=1) + "\n"
        file = work / "plan.json"
        if resume and file.is_file() and file.read_text() != text:
            raise ValueError(
                f"{file}: --resume: expected the series and the arguments of the run that was stopped, got others. "
                "Give the same ones, or begin anew without --resume."
            )
        try:
            if not (resume and file.is_file()):
                for entry in work.iterdir():
                    if entry.name != "lock":
                        _clear(entry)
                write_text(file, text)
            yield
        except BaseException:
            if not resume:
                shutil.rmtree(work)
            raise
        shutil.rmtree(work)
    finally:
        os.close(lock)


def _clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- prepared images


@dataclass(frozen=True)
class _Images:
    """Prepared images (tilt, y, x) float32 in a file, read image by image and slab by slab."""

    path: Path
    sides: tuple[int, int, int]  # (tilt, y, x)

    @property
    def shape(self) -> Sequence[int]:
        return self.sides

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def size(self) -> int:
        return 4 * math.prod(self.sides)

    def __getitem__(self, which: int | tuple[slice, slice]) -> torch.Tensor:
        """Image (y, x), or rows (tilt, row, x) of all images."""
        tilts, ny, _ = self.sides
        if isinstance(which, int):
            return self._read(which * ny, ny)
        start, stop, _ = which[1].indices(ny)
        return torch.stack([self._read(tilt * ny + start, stop - start) for tilt in range(tilts)])

    def _read(self, row: int, n: int) -> torch.Tensor:
        # no map, as its pages count as memory; memory of torch, as the last bit of a transform depends on its alignment
        values = torch.empty(n, self.sides[2])
        with self.path.open("rb") as file:
            file.seek(4 * row * self.sides[2])
            if file.readinto(values.numpy().data.cast("B")) != 4 * values.numel():
                raise FormatError(self.path, "size", f"{self.size} bytes", "fewer", "Begin anew without --resume.")
        return values


def _image_shape(design: Design) -> tuple[int, int, int]:
    return len(design.angles), design.shape[1], design.shape[2]


def _prepare(work: Path, series: TiltSeries, design: Design, how: dict[str, Any], progress: Report | None) -> None:
    """Write images.f32, and the design fitted to them as prepared.json; nothing where that is there."""
    if (work / "prepared.json").is_file():
        return
    images, noise = _Images(work / "images.f32", _image_shape(design)), []
    prepared = prepared_images(series, bin=how["bin"], ctf=how["ctf"], low_pass=how["low_pass"])
    with images.path.open("wb") as file:
        for i, (image, variance) in enumerate(prepared):
            file.write(image.float().contiguous().numpy().data)
            noise.append(variance)
            if progress:
                progress("preparing images", i + 1, images.shape[0])
    sync(images.path)
    write_text(work / "prepared.json", json.dumps(_as_json(fitted_design(design, images, torch.stack(noise)))) + "\n")


# -------------------------------------------------------------------------------------------------------------- slabs


class _Task(NamedTuple):
    output: MrcSlabs | ZarrSlabs
    starts: tuple[int, ...]  # first rows of slabs


def _make_all(
    work: Path,
    output: MrcSlabs | ZarrSlabs,
    design: Design,
    workers: int | None,
    scheduler: str | None,
    progress: Report | None,
) -> None:
    """All slabs that are not finished."""
    height = design.shape[1]
    todo = [s for s in range(0, height, output.rows) if not _mark(work, s).is_file()]

    done = height - sum(min(output.rows, height - s) for s in todo)

    def report(starts: Sequence[int]) -> None:
        nonlocal done
        done += sum(min(output.rows, height - s) for s in starts)
        if progress:
            progress(design.method, done, height)

    report([])
    if workers is None and scheduler is None:
        for start in _slabs_to_file(_Task(output, tuple(todo))):
            report([start])
        return
    share = max(1, min(_SLABS_A_TASK, len(todo) // (4 * (workers or 1))))
    tasks = [_Task(output, tuple(todo[i : i + share])) for i in range(0, len(todo), share)]
    for task, outcome in outcomes(_finish_task, tasks, workers=workers, scheduler=scheduler):
        if isinstance(outcome, Exception):
            raise outcome
        report(task.starts)


def _finish_task(task: _Task) -> int:
    """Make the slabs of a task, in whatever process; how many."""
    return sum(1 for _ in _slabs_to_file(task))


def _slabs_to_file(task: _Task) -> Iterator[int]:
    """Make slabs, write them, and yield the first row of each when it is on the disk."""
    output, work = task.output, task.output.path.parent
    design = _from_json(json.loads((work / "prepared.json").read_text()))
    images = _Images(work / "images.f32", _image_shape(design))
    waiting: deque[Future[int | None]] = deque()
    parts: list[Statistics] = []

    def write(rows: slice, layers: slice, values: torch.Tensor) -> int | None:
        stored = _stored(values[..., design.columns].contiguous(), output)
        parts.append(Statistics.of(stored))
        output.write(rows, layers, stored.numpy())
        if layers.stop < design.shape[0]:
            return None
        output.sync(rows)
        write_text(_mark(work, rows.start), json.dumps(Statistics.joined(parts)) + "\n")
        parts.clear()
        return rows.start

    with ThreadPoolExecutor(1) as disk:  # one thread, so that blocks are written in the order they come
        made = slabs(images, design, starts=task.starts, rows=output.rows, layers=output.layers)
        for block in made:
            waiting.append(disk.submit(write, *block))
            while len(waiting) > _WAITING:
                finished = waiting.popleft().result()
                if finished is not None:
                    yield finished
        for future in waiting:
            finished = future.result()
            if finished is not None:
                yield finished


def _stored(values: torch.Tensor, output: MrcSlabs | ZarrSlabs) -> torch.Tensor:
    """`values` in the type of the file, which must hold them."""
    low, high = (float(bound) for bound in values.aminmax())
    if not max(-low, high) <= torch.finfo(getattr(torch, output.precision)).max:
        raise ValueError(
            f"{output.precision}: expected values that it can hold, got {low:g} to {high:g} V. Take float32."
        )
    return values.to(getattr(torch, output.precision))


def _mark(work: Path, start: int) -> Path:
    return work / "finished" / f"{start:06d}.json"
