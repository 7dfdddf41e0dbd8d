"""Frames of an exposure of a fading specimen: side by side against one after the other."""

from __future__ import annotations

from collections.abc import Callable

from tests.bench.table import Entry

FRAMES = 8


def exposure(pixels: int) -> Callable[[], object]:
    import torch

    import cryosim as cs
    import cryosim.acquisition.simulate as simulation
    from cryosim import io
    from cryosim.io.examples import example_path

    simulation.LARGEST_BATCH = pixels
    protein = io.read_atoms(example_path("apoferritin"), assembly=1)
    generator = torch.Generator().manual_seed(1)
    specimen = cs.place_randomly([protein], [6], (700, 700, 300), ice=cs.Ice(400.0), generator=generator)
    specimen = specimen.replace(damage=cs.Damage())
    tilts = cs.TiltScheme([10.0], [3.0], frames=FRAMES)
    optics, detector = cs.Optics(300.0, 30000.0), cs.Detector((192, 192), 4.0)
    sampling = cs.sampling_for(detector, optics)

    def work() -> object:
        with torch.no_grad():
            return cs.expected_frames(specimen, tilts, optics, detector, 0, sampling=sampling)

    return work


ENTRIES = [
    Entry(
        "frames",
        f"{FRAMES} frames, 500 × 500 px, 6 apoferritins in 400 Å",
        lambda: exposure(2**23),
        lambda: exposure(1),
        peer_name="ourselves, one by one",
        reference_ratio="3.6 on one core",
        threads=1,
    ),
]
