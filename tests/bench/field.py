"""Fields of many copies: sharing among copies, growth with the field, and the two large runs.

    python -m tests.bench copies field        the entries
    python -m tests.bench.field series        41 tilts of 1024^2 at 2 Å/px, 300 apoferritins in 150 nm
    python -m tests.bench.field large         one tilt of 4096^2 at 2 Å/px, ribosomes and proteins in 200 nm
    python -m tests.bench.field growth        one exposure with twice the atoms, the slices, the tilts

The large ones run once and print their time and peak memory. `large` takes the ribosome's file as an argument.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.bench.table import Entry


def apoferritins(copies: int, size: tuple[float, float, float], thickness: float) -> Any:
    """Specimen of apoferritins whose enclosing spheres do not overlap."""
    import torch

    import cryosim as cs
    from cryosim import io
    from cryosim.io.examples import example_path

    protein = io.read_atoms(example_path("apoferritin"), assembly=1)
    generator = torch.Generator().manual_seed(1)
    return cs.place_randomly([protein], [copies], size, ice=cs.Ice(thickness), gap=2.0, generator=generator)


def slices(copies: str, pixel_size: float, assembled: bool = False) -> Callable[[], object]:
    """All slices of one tilt of 60 apoferritins."""
    import torch

    import cryosim as cs
    from cryosim.specimen.specimen import assemble

    specimen = apoferritins(60, (1000, 1000, 700), 800.0)
    if assembled:
        here = cs.Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
        specimen = cs.Specimen((assemble(specimen),), (here,), specimen.size, specimen.ice)
    n = int(1100 / pixel_size) // 16 * 16

    def work() -> object:
        how: dict = {"width": 6, "copies": copies}
        with torch.no_grad():
            source = cs.tilted_slices(specimen, 30.0, (n, n), pixel_size, 25.0, **how)
            return sum(float(v[0, 0]) for v in source.in_order())

    return work


def exposure(length: int) -> Callable[[], object]:
    """One exposure of a square field at 2 Å/px, with as many apoferritins as fill a 14th of it."""
    import torch

    import cryosim as cs

    side = 2.0 * length
    specimen = apoferritins(round(300 * (length / 1024) ** 2), (side, side, 1370.0), 1500.0)
    tilts = cs.TiltScheme([0.0], [3.0])
    optics, detector = cs.Optics(300.0, 20000.0), cs.Detector((length, length), 2.0)
    sampling = cs.sampling_for(detector, optics, pixel_size=4 / 3, thickness=25.0, width=6)

    def work() -> object:
        with torch.no_grad():
            return cs.expected_exposure(specimen, tilts, optics, detector, 0, sampling=sampling)

    return work


ENTRIES = [
    Entry(
        "copies share their sites",
        "60 apoferritins, 1.33 Å px, 25 Å slices",
        lambda: slices("atoms", 4 / 3),
        lambda: slices("atoms", 4 / 3, assembled=True),
        peer_name="ourselves, all atoms assembled",
        threads=1,
    ),
    Entry(
        "copies by a reference",
        "60 apoferritins, 4.7 Å px, 25 Å slices",
        lambda: slices("reference", 4.714),
        lambda: slices("atoms", 4.714),
        peer_name="ourselves, atom by atom",
        threads=1,
    ),
    Entry(
        "copies by a reference, coarse",
        "60 apoferritins, 7.5 Å px, 25 Å slices",
        lambda: slices("reference", 7.5),
        lambda: slices("atoms", 7.5),
        peer_name="ourselves, atom by atom",
        threads=1,
    ),
    *(
        Entry(
            f"field {n}",
            f"one exposure of {n}² at 2 Å/px, {round(300 * (n / 1024) ** 2)} apoferritins in 150 nm",
            lambda n=n: exposure(n),
            threads=1,
            series="field",
            length=n,
        )
        for n in (256, 512, 1024)
    ),
]


def series() -> None:
    """41 tilts of 1024^2."""
    import torch

    import cryosim as cs

    torch.set_num_threads(1)
    specimen = apoferritins(300, (2048.0, 2048.0, 1370.0), 1500.0)
    tilts = cs.TiltScheme.dose_symmetric(60, 3, 120)
    optics, detector = cs.Optics(300.0, 20000.0), cs.Detector((1024, 1024), 2.0)
    sampling = cs.sampling_for(detector, optics, pixel_size=4 / 3, thickness=25.0, width=5)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(2)
    how: dict = {"sampling": sampling, "workers": 2, "generator": generator, "progress": _told(start)}
    cs.simulate(specimen, tilts, optics, detector, **how)
    _tell("41 tilts of 1024^2", start, sampling)


def large(ribosome: str) -> None:
    """One tilt of 4096^2."""
    import torch

    import cryosim as cs
    from cryosim import io
    from cryosim.io.examples import example_path

    torch.set_num_threads(2)
    big = io.read_atoms(ribosome)
    others = [io.read_atoms(example_path("apoferritin"), assembly=1), io.read_atoms(example_path("ubiquitin"))]
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(3)
    molecules, copies, size = [big, *others], [300, 1000, 2000], (8192.0, 8192.0, 1900.0)
    specimen = cs.place_randomly(molecules, copies, size, ice=cs.Ice(2000.0), gap=2.0, generator=generator)
    print(f"placed {copies} in {time.perf_counter() - start:.0f} s", flush=True)
    tilts = cs.TiltScheme([30.0], [3.0])
    optics, detector = cs.Optics(300.0, 20000.0), cs.Detector((4096, 4096), 2.0)
    sampling = cs.sampling_for(detector, optics, pixel_size=4 / 3, thickness=25.0, width=6)
    start = time.perf_counter()
    cs.simulate(specimen, tilts, optics, detector, sampling=sampling, generator=generator)
    _tell("one tilt of 4096^2", start, sampling)


def growth() -> None:
    """How one exposure of 512^2 grows with the copies, with the slices, and a series with the tilts."""
    import torch

    import cryosim as cs

    torch.set_num_threads(1)
    optics, detector = cs.Optics(300.0, 20000.0), cs.Detector((512, 512), 2.0)

    def timed(copies: int, thickness: float, tilts: int) -> float:
        specimen = apoferritins(copies, (1024.0, 1024.0, 1370.0), 1500.0)
        scheme = cs.TiltScheme([10.0] * tilts, [3.0] * tilts)
        sampling = cs.sampling_for(detector, optics, pixel_size=4 / 3, thickness=thickness, width=6)
        best = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            cs.simulate(specimen, scheme, optics, detector, sampling=sampling)
            best = min(best, time.perf_counter() - start)
        return best

    for what, cases in {
        "apoferritins": [(20, 25.0, 1), (40, 25.0, 1), (80, 25.0, 1)],
        "thickness of a slice [Å]": [(20, 24.0, 1), (20, 12.0, 1), (20, 6.0, 1)],
        "tilts": [(20, 25.0, 1), (20, 25.0, 2), (20, 25.0, 4)],
    }.items():
        print(what, *(f"{case}: {timed(*case):.2f} s" for case in cases), flush=True)


def _told(start: float) -> Callable[[int, int], None]:
    return lambda done, total: print(f"{done} of {total}, {time.perf_counter() - start:.0f} s", flush=True)


def _tell(what: str, start: float, sampling: Any) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - start:.0f} s, peak {peak:.2f} GB, {sampling}", flush=True)


if __name__ == "__main__":
    {"series": series, "large": large, "growth": growth}[sys.argv[1]](*sys.argv[2:])
