"""Multislice, its gradient and whole images against abTEM 1.0.11 and torch-scattering 0.6.0, at several sizes.

All get the same slices, in memory beforehand, in single precision. torch-scattering takes cubic voxels and flies with
the opposite sign, so it is fed the negative volume with voxels of one slice (tests/agree/test_torch_scattering.py); it
has no band limit, so it needs half of abTEM's transforms, as we do. abTEM has no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tests.bench.potential import configured_abtem
from tests.bench.table import Entry

N_SLICES, PIXEL, THICKNESS, DEFOCUS = 32, 1.0, 1.0, 10000.0
SIZES = (256, 512, 1024, 2048)


def smooth_slices(n: int) -> torch.Tensor:
    """Random slices (slice, y, x) [V·Å] with next to nothing beyond two thirds of Nyquist; four, displaced for more."""
    generator = torch.Generator().manual_seed(2)
    k = torch.fft.fftfreq(n)
    soft = torch.exp(-100 * (k[:, None] ** 2 + k**2))
    fields = [
        60 * torch.fft.ifft2(torch.fft.fft2(torch.randn(n, n, generator=generator)) * soft).real for _ in range(4)
    ]
    return torch.stack([fields[i % 4].roll((37 * i, 11 * i), (0, 1)) for i in range(N_SLICES)])


def our_wave(n: int) -> Callable[[], object]:
    from cryosim.microscope.optics import Optics
    from cryosim.microscope.scattering import multislice
    from cryosim.specimen.potential import Slices

    slices, optics = Slices(smooth_slices(n), PIXEL, THICKNESS), Optics(voltage=300.0)
    return torch.no_grad()(lambda: multislice(slices, optics))


def abtem_wave(n: int) -> Callable[[], object]:
    wave, potential = abtem_parts(n)
    return lambda: wave.multislice(potential).array


def abtem_parts(n: int):
    abtem = configured_abtem()
    values = smooth_slices(n).numpy().transpose(0, 2, 1).copy()
    potential = abtem.PotentialArray(values, slice_thickness=THICKNESS, sampling=(PIXEL, PIXEL))
    return abtem.PlaneWave(energy=300e3), potential


def torch_scattering_wave(n: int) -> Callable[[], object]:
    import torch_scattering

    volume = -smooth_slices(n) / PIXEL
    return torch.no_grad()(lambda: torch_scattering.multislice(volume, pixel_size=PIXEL, voltage=300.0).conj())


def our_gradient(n: int) -> Callable[[], object]:
    from cryosim.microscope.optics import Optics
    from cryosim.microscope.scattering import multislice
    from cryosim.specimen.potential import Slices

    optics = Optics(voltage=300.0)
    return gradient(smooth_slices(n), lambda values: multislice(Slices(values, PIXEL, THICKNESS), optics))


def torch_scattering_gradient(n: int) -> Callable[[], object]:
    import torch_scattering

    def wave(values: torch.Tensor) -> torch.Tensor:
        return torch_scattering.multislice(-values / PIXEL, pixel_size=PIXEL, voltage=300.0).conj()

    return gradient(smooth_slices(n), wave)


def gradient(values: torch.Tensor, wave: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    """Forward and backward of a sum of squares of the intensity."""
    values.requires_grad_()

    def work() -> torch.Tensor:
        seen = wave(values)
        (slope,) = torch.autograd.grad((seen.real**2 + seen.imag**2).square().sum(), values)
        return slope

    return work


def our_image(n: int) -> Callable[[], object]:
    from cryosim.microscope.imaging import image
    from cryosim.microscope.optics import Optics
    from cryosim.microscope.scattering import multislice
    from cryosim.specimen.potential import Slices

    slices = Slices(smooth_slices(n), PIXEL, THICKNESS)
    optics = Optics(voltage=300.0, defocus=min(DEFOCUS, 40.0 * n), spherical_aberration=2.7)
    return torch.no_grad()(lambda: image(multislice(slices, optics), optics, PIXEL))


def abtem_image(n: int) -> Callable[[], object]:
    abtem = configured_abtem()
    wave, potential = abtem_parts(n)
    lens = abtem.CTF(energy=300e3, Cs=2.7e7, defocus=min(DEFOCUS, 40.0 * n))
    return lambda: wave.multislice(potential).apply_ctf(lens).intensity().array


def torch_scattering_image(n: int) -> Callable[[], object]:
    """Its wave through our lens: it has none."""
    from cryosim.microscope.imaging import image
    from cryosim.microscope.optics import Optics

    wave = torch_scattering_wave(n)
    optics = Optics(voltage=300.0, defocus=min(DEFOCUS, 40.0 * n), spherical_aberration=2.7)
    return torch.no_grad()(lambda: image(wave(), optics, PIXEL))


PEERS = {
    "multislice": (our_wave, {"abTEM 1.0.11": abtem_wave, "torch-scattering 0.6.0": torch_scattering_wave}),
    "multislice and its gradient": (our_gradient, {"torch-scattering 0.6.0": torch_scattering_gradient}),
    "slices to image": (our_image, {"abTEM 1.0.11": abtem_image, "torch-scattering, our lens": torch_scattering_image}),
}

ENTRIES = [
    Entry(
        f"{what}, {n} px, {peer}",
        f"{n} x {n} x {N_SLICES}, complex64",
        partial(ours, n),
        partial(theirs, n),
        peer,
        series=f"{what}, {peer}",
        length=n,
    )
    for what, (ours, peers) in PEERS.items()
    for peer, theirs in peers.items()
    for n in SIZES
]
