"""EER frames: reading against imagecodecs, which renders an image and keeps no list of events; writing has no peer."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.table import Entry

SIDE, N_FRAMES, N_EVENTS = 4096, 4, 340_000


def frames():
    """Events uniform on the sensor."""
    from cryosim.microscope.events import Events

    generator = torch.Generator().manual_seed(1)
    n = N_FRAMES * N_EVENTS
    y, x = (torch.rand(n, generator=generator, dtype=torch.float64) * SIDE for _ in range(2))
    return Events(torch.arange(N_FRAMES).repeat_interleave(N_EVENTS), y, x, (N_FRAMES, SIDE, SIDE))


def new_file() -> Path:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "movie.eer"


def written() -> Path:
    from cryosim.io.eer import write_eer

    path = new_file()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of events in one pixel
        write_eer(path, frames())
    return path


def our_writing() -> Callable[[], object]:
    from cryosim.io.eer import write_eer

    events, path = frames(), new_file()
    warnings.simplefilter("ignore")
    return lambda: write_eer(path, events)


def our_reading() -> Callable[[], object]:
    from cryosim.io.eer import read_eer

    path = written()
    return lambda: read_eer(path)


def our_rendering(supersampling: int) -> Callable[[], object]:
    from cryosim.io.eer import render_eer

    path = written()
    return lambda: render_eer(path, supersampling)


def tifffile_rendering(level: int) -> Callable[[], object]:
    import tifffile

    path = written()

    def work():
        with tifffile.TiffFile(path, superres=level) as file:
            image = file.pages[0].asarray().astype("int16")
            for page in file.pages[1:]:
                image += page.asarray()
        return image

    return work


SIZE = f"{N_FRAMES} frames of {SIDE} x {SIDE}, {N_EVENTS} events each"
PEER = "tifffile and imagecodecs, images added up"

ENTRIES = [
    Entry("write EER", SIZE, our_writing, threads=1),
    Entry(
        "read EER as events", SIZE, our_reading, lambda: tifffile_rendering(0), PEER + ", no events", "0.6", threads=1
    ),
    Entry("render EER, 4K", SIZE, lambda: our_rendering(1), lambda: tifffile_rendering(0), PEER, "0.5", threads=1),
    Entry("render EER, 8K", SIZE, lambda: our_rendering(2), lambda: tifffile_rendering(1), PEER, "1.4", threads=1),
]
