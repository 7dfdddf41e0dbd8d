"""Rows of a full-size tomogram: time, rates and memory, by either method, to a file.

    python -m tests.bench.reconstruct_rows 4096 64          41 images 4096 wide, 2048 deep, 64 rows
    python -m tests.bench.reconstruct_rows 4096 64 128 256  three heights, and how the time grows with them
    python -m tests.bench.reconstruct_rows 4096 128 --output t.zarr --precision float16

Each method and height runs in a process of its own, so that the peak of memory is its own. `compute` are the slabs of
prepared images without any file; `file` is `reconstruct_to`, which prepares the images, computes, writes and waits for
the disk. The rates of `compute` count the work that the method needs, from the sizes alone:

    products   8 tilts depth k operations a row: (cos, sin) by half the layers, on (Re, Im), 2 operations each
    FFTs       2.5 n log2 n operations for each of depth real lines of n samples, 10 n log2 n for a chirp of each tilt
    bytes      that must pass through memory: lines' spectra written and read, their transforms, the rows written
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cryosim.io.slabs import Precision
    from inverse.design import Design, Method

TILTS, EXTENT, COUNTS, PIXEL = 41, 60.0, 20.0, 1.5


def measure(
    width: int, rows: int, method: Method, output: str, precision: Precision, workers: int | None
) -> dict[str, float]:
    """Seconds of preparing and computing and of a whole run to a file, and the peak of memory [MB], in this process."""
    from cryosim.acquisition.series import TiltSeries
    from cryosim.acquisition.tilts import TiltScheme
    from cryosim.microscope.optics import Optics
    from inverse.design import designed, fitted_design
    from inverse.preparation import prepare
    from inverse.slabs import slabs
    from inverse.streamed import reconstruct_to

    angles = torch.linspace(-EXTENT, EXTENT, TILTS, dtype=torch.float64)
    tilts = TiltScheme(angles, torch.full_like(angles, 3.0), torch.zeros(TILTS, 2, dtype=torch.float64), 0.0)
    counts = torch.poisson(torch.full((TILTS, rows, width), COUNTS), generator=torch.Generator().manual_seed(0))
    series = TiltSeries(counts, PIXEL, tilts, Optics(300.0, 30000.0, amplitude_contrast=0.07))
    thickness = width // 2 * PIXEL
    found: dict[str, float] = {}

    start = time.perf_counter()
    how: Any = {"bin": 1, "ctf": "flip", "low_pass": None}
    design = designed(series, method, thickness=thickness, filter="ramp", weight=None, iterations=None, **how)
    images, noise = prepare(series, **how)
    design = fitted_design(design, images, noise)
    found["prepare"] = time.perf_counter() - start
    start = time.perf_counter()
    for _ in slabs(images, design):
        pass
    found["compute"] = time.perf_counter() - start
    del images
    with tempfile.TemporaryDirectory(dir=Path(output).parent) as folder:
        start = time.perf_counter()
        path = Path(folder) / Path(output).name
        reconstruct_to(path, series, method, thickness=thickness, precision=precision, workers=workers)
        found["file"] = time.perf_counter() - start
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return found | {"peak": max(peaks)} | work(design)


def work(design: Design) -> dict[str, float]:
    """Operations and bytes of one row, as the head of this file counts them."""
    depth, _, width = design.shape
    period, n_k = design.geometry.period, design.geometry.n_frequencies
    chirp = width + n_k
    return {
        "products": 8.0 * TILTS * depth * n_k,
        "ffts": 2.5 * depth * period * math.log2(period) + 10 * TILTS * chirp * math.log2(chirp),
        "bytes": depth * (3 * 8 * n_k + 4 * period + 2 * 4 * width),
    }


def main() -> None:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.reconstruct_rows", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("width", type=int, help="of the images [px]; the tomogram is half as deep")
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--method", choices=("wbp", "least-squares"), action="append", help="both when left out")
    parser.add_argument("--output", default="tomogram.mrc", help="kind of file, and on which disk; removed in the end")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, help="processes that make the file; the threads of one when left out")
    parser.add_argument("--here", action="store_true", help="one measurement, in this process, as a line of JSON")
    given = parser.parse_args()
    if given.here:
        torch.set_num_threads(given.threads)
        how = (given.method[0], given.output, given.precision, given.workers)
        print(json.dumps(measure(given.width, given.rows[0], *how)))
        return
    print(f"{TILTS} images {given.width} wide, depth {given.width // 2}, {given.precision}, {given.threads} threads")
    for method in given.method or ("wbp", "least-squares"):
        times = []
        for rows in given.rows:
            command = [sys.executable, "-m", "tests.bench.reconstruct_rows", str(given.width), str(rows), "--here"]
            command += ["--method", method, "--output", given.output, "--precision", given.precision]
            command += ["--threads", str(given.threads)]
            command += ["--workers", str(given.workers)] if given.workers else []
            environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{method}, {rows} rows: the benchmark failed.\n{done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            times.append(found["compute"])
            show(method, rows, given.width, found, 4 if given.precision == "float32" else 2)
        if len(given.rows) > 1:
            slope = statistics.linear_regression([math.log(r) for r in given.rows], [math.log(t) for t in times]).slope
            print(f"{method}: compute grows as rows^{slope:.2f}")


def show(method: str, rows: int, width: int, found: dict[str, float], itemsize: int) -> None:
    """One line of figures."""
    rate = rows / found["compute"] / 1e9
    volume = rows * width * width // 2 * itemsize
    per_row = {what: 1e3 * found[what] / rows for what in ("compute", "file")}
    print(
        f"{method:13} {rows:5} rows: prepare {found['prepare']:.2f} s, compute {found['compute']:.2f} s "
        f"({per_row['compute']:.1f} ms/row; products {rate * found['products']:.1f} and FFTs "
        f"{rate * found['ffts']:.1f} GFlop/s, memory {rate * found['bytes']:.1f} GB/s), file {found['file']:.2f} s "
        f"({per_row['file']:.1f} ms/row; {volume / found['file'] / 1e6:.0f} MB/s), peak {found['peak']:.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
