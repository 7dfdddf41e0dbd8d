"""Alignment and CTF fits beside other programs', on images of known truth, in one run.

    python -m tests.bench.calibration align [EDGE]     torch-tiltxcorr: crowded slabs, 41 tilts, displaced by up to 6 px
    python -m tests.bench.calibration bend [EDGE]      none: slabs that bend in each tilt, before and after
    python -m tests.bench.calibration ctf [CASES]      torch-ctf-estimation: simulated images, and the real micrograph

The peer gets the best of its settings, by the truth. Times are of one process each; peak memory is of both together.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

import inverse as inv
from cryosim import io
from tests.inverse.test_alignment import ANGLES, Bending, Taken, rms
from tests.inverse.test_ctf_fit import MICROGRAPH, drawn, imaged


def alignments(edge: int) -> None:
    from torch_tiltxcorr import tiltxcorr  # pyright: ignore[reportMissingImports]

    for filled in (edge // 6, edge // 4):
        for snr in (1.0, 0.5, 0.1):
            taken = Taken(edge, filled, snr, filled)
            start = time.perf_counter()
            found = inv.align(taken.images, ANGLES, 5.0, fit=("shifts", "thickness"))
            took = time.perf_counter() - start
            errors = taken.off(found.shifts / 5.0)
            ratio = rms(errors / (found.standard_errors["shifts"] / 5.0))
            theirs, start = [], time.perf_counter()
            for period in (None, 15.0, 25.0, 40.0, 60.0):
                moved = tiltxcorr(taken.images.float(), ANGLES, 0.0, 5.0, period).double()
                theirs += [rms(taken.off(sign * order)) for sign in (1, -1) for order in (moved, moved.flip(-1))]
            peer = (time.perf_counter() - start) / 5
            print(
                f"{edge} px, slab {filled}, SNR {snr:g}: ours {rms(errors):.3f} px rms, error over standard error "
                f"{ratio:.2f}, thickness {found.thickness / 5 / filled - 1:+.1%}, {took:.1f} s; torch-tiltxcorr at its "
                f"best {min(theirs):.3f} px, {peer:.1f} s",
                flush=True,
            )


def bends(edge: int) -> None:
    for snr in (0.5, 0.1):
        bending = Bending(edge, edge // 6, snr, 4.0, 4)
        told = []
        for fit in (("shifts", "thickness"), ("shifts", "thickness", "deformation")):
            start = time.perf_counter()
            found = inv.align(bending.images, ANGLES, 5.0, fit=fit)
            took = time.perf_counter() - start
            left = bending.off(found.shifts / 5, bending.seen(found), (edge, edge))
            told.append(f"{left:.3f} px rms left, {took:.0f} s")
        print(f"{edge} px, SNR {snr:g}: shifts alone {told[0]}; with the deformation {told[1]}", flush=True)


def lenses(cases: int) -> None:
    for seed in range(cases):
        case = drawn(seed)
        image = imaged(case, torch.Generator().manual_seed(seed))
        optics = case.optics
        _compared(image, case.pixel_size, float(optics.voltage), float(optics.defocus), f"{optics.astigmatism:.0f}")
    image, pixel_size = io.read_stack(MICROGRAPH)
    _compared(image[0], pixel_size, 300.0, 27_210.0, "below 250")


def _compared(image: torch.Tensor, pixel_size: float, voltage: float, defocus: float, astigmatism: str) -> None:
    from torch_ctf_estimation import (  # pyright: ignore[reportMissingImports]
        CTFFittingParams,
        OpticalParams,
        estimate_ctf,
    )

    start = time.perf_counter()
    found = inv.fit_ctf(image, pixel_size, voltage)
    took = time.perf_counter() - start
    start = time.perf_counter()
    optics = OpticalParams(
        pixel_spacing_angstroms=pixel_size,
        voltage_kev=voltage,
        spherical_aberration_mm=2.7,
        amplitude_contrast_fraction=0.07,
    )
    fitting = CTFFittingParams(defocus_grid_resolution=(1, 1, 1), frequency_fit_range_angstroms=(30.0, 4.8))
    _, _, two = estimate_ctf(image[None].float(), optics, fitting)
    theirs = 0.5 * (float(two.defocus_u) + float(two.defocus_v))
    theirs = 1e4 * theirs if theirs < 100 else theirs  # [um] or [Å]
    print(
        f"true {defocus:.0f} Å, astigmatism {astigmatism}: ours {found.optics.defocus - defocus:+.0f} ± "
        f"{found.standard_errors['defocus']:.0f} Å, {found.optics.astigmatism:.0f} Å, {took:.1f} s; "
        f"torch-ctf-estimation {theirs - defocus:+.0f} Å, {two.astigmatism}, {time.perf_counter() - start:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    task, size = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    {"align": alignments, "bend": bends, "ctf": lenses}[task](size or (10 if task == "ctf" else 256))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
