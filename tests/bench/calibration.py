"""Alignment and CTF fits beside other programs', on images of known truth, in one run.

    python -m tests.bench.calibration align [EDGE]     torch-tiltxcorr: crowded slabs, 41 tilts, displaced by up to 6 px
    python -m tests.bench.calibration bend [EDGE]      none: slabs that bend in each tilt, before and after
    python -m tests.bench.calibration field [EDGE]     a neural field with displacements, ICE-TIDE's way
    python -m tests.bench.calibration ctf [CASES]      torch-ctf-estimation: simulated images, and the real micrograph

The peer gets the best of its settings, by the truth. Times are of one process each; peak memory is of both together.
"""

from __future__ import annotations

import math
import resource
import sys
import time

import torch

import inverse as inv
from cryosim import io
from cryosim.core.fourier import shifted
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


def likeness(volume: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest correlation of a volume (z, y, x) with the middle of a truth, over translations and signs."""
    inner = truth
    for axis, (n, wide) in enumerate(zip(volume.shape, truth.shape, strict=True)):
        if n < wide:
            inner = inner.narrow(axis, wide // 2 - n // 2, n)
    whole = torch.zeros_like(volume, dtype=torch.float64)
    whole[: inner.shape[0], : inner.shape[1], : inner.shape[2]] = inner - inner.mean()
    spectra = [torch.fft.fftn(v.double() - v.double().mean()) for v in (volume, whole)]
    correlation = torch.fft.ifftn(spectra[0] * spectra[1].conj()).real.abs()
    return float(correlation.max() / spectra[0].norm() / spectra[1].norm() * volume.numel())


def fields(edge: int) -> None:
    """The displacements that a neural field learns with the volume, in ICE-TIDE's way, and those of `align`."""
    bending, depth = Bending(edge, 16, 0.5, 5.0, 4), 28
    plain = inv.align(bending.images, ANGLES, 5.0, fit=("shifts", "thickness"))
    images = shifted(bending.images, -plain.shifts / 5)
    images = (images - images.mean((1, 2), keepdim=True)).float()
    noise = float(images.var()) / 1.5
    wide = edge + 2 * math.ceil(depth / 2 * math.tan(math.radians(60)))
    physics = inv.TiltProjection(ANGLES.float(), (depth, edge, wide), (edge, edge))
    generator = torch.Generator().manual_seed(0)
    for bends in (None, 4.0):
        start = time.perf_counter()
        made = inv.implicit(physics, images, noise, bends=bends, steps=200, generator=generator)
        took = time.perf_counter() - start
        left = bending.off(plain.shifts / 5, made.displacement, (edge, edge))
        alike = likeness(made.volume[:, :, wide // 2 - edge // 2 :][:, :, :edge], bending.volume)
        told = float(made.held_out_losses.nan_to_num().min())
        print(
            f"{edge} px: a field {'that bends' if bends else 'alone'}: {left:.3f} px rms left, likeness to the truth "
            f"{alike:.3f}, misfit of hidden pixels {told:.3f}, {took:.0f} s",
            flush=True,
        )
    start = time.perf_counter()
    found = inv.align(bending.images, ANGLES, 5.0, fit=("shifts", "thickness", "deformation"))
    left = bending.off(found.shifts / 5, bending.seen(found), (edge, edge))
    print(f"{edge} px: align {left:.3f} px rms left, {time.perf_counter() - start:.0f} s")


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
    {"align": alignments, "bend": bends, "field": fields, "ctf": lenses}[task](size or (10 if task == "ctf" else 256))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
