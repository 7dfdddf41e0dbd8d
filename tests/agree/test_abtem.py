"""Exit waves against abTEM's multislice, given the same slices.

abTEM keeps arrays as (slice, x, y) and refers its exit wave to one full thickness behind the last slice. Its own
potentials are not used: for atoms between grid points they are 1 to 50 % off, rising with frequency (1.0.11).
"""

import pytest
import torch

from cryosim.core.fourier import band_limit, squared_frequencies
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.potential import Slices

abtem = pytest.importorskip("abtem")

SHAPES = [(64, 64), (63, 48), (45, 51)]
PIXEL, THICKNESS = 0.5, 2.0


def slices_of(shape, n_slices, generator, smoothness=20.0):
    """Random smooth slices [V·Å] that scatter some percent of the wave each."""
    k2 = squared_frequencies(shape, PIXEL, dtype=torch.float64)
    noise = 200 * torch.randn(n_slices, *shape, generator=generator, dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-smoothness * k2)).real


def abtem_exit_wave(values, voltage, precision="float64"):
    with abtem.config.set({"device": "cpu", "precision": precision, "fft": "numpy", "dask.lazy": False}):
        potential = abtem.PotentialArray(
            values.numpy().transpose(0, 2, 1), slice_thickness=THICKNESS, sampling=(PIXEL, PIXEL)
        )
        wave = abtem.PlaneWave(energy=1e3 * voltage).multislice(potential)
        return torch.tensor(wave.array.T).to(torch.complex128)


def plane_of(n_slices):
    return (n_slices - 1 - n_slices // 2) * THICKNESS + THICKNESS


def inside_error(ours, theirs, fraction=0.9):
    """Difference relative to the wave, within a fraction of the band."""
    keep = squared_frequencies(theirs.shape, PIXEL, dtype=torch.float64).sqrt() < fraction * (2 / 3) / (2 * PIXEL)
    ours, theirs = (torch.fft.fft2(w.to(torch.complex128))[keep] for w in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_slices", [10, 11])
@pytest.mark.parametrize("voltage", [200.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_exit_wave_with_our_sharp_limit(shape, voltage, n_slices, dtype, generator):
    """Smooth slices leave nothing at the edge of the band, where the two programs cut differently."""
    values = slices_of(shape, n_slices, generator)
    ours = multislice(
        Slices(values, PIXEL, THICKNESS).to(dtype=dtype), Optics(voltage=voltage), plane=plane_of(n_slices)
    )
    assert ours.dtype == dtype.to_complex()
    assert inside_error(ours, abtem_exit_wave(values, voltage)) < 5e-6


@pytest.mark.parametrize(("smoothness", "tolerance"), [(20.0, 1e-9), (1.0, 1e-6)])
@pytest.mark.parametrize("n_slices", [10, 11])
@pytest.mark.parametrize("shape", SHAPES)
def test_exit_wave_with_abtems_taper(shape, n_slices, smoothness, tolerance, generator):
    """The same soft edge on every transmission and flight; looser where sharp slices fill that edge."""
    values = slices_of(shape, n_slices, generator, smoothness)
    taper = band_limit(shape, 2 / 3, 0.01, dtype=torch.float64)
    ours = multislice(
        Slices(values, PIXEL, THICKNESS), Optics(), plane=plane_of(n_slices), band_limit=taper, limit_transmission=True
    )
    assert inside_error(ours, abtem_exit_wave(values, 300.0), fraction=2.0) < tolerance


def test_the_comparison_sees_a_transposed_or_mirrored_wave(generator):
    values = slices_of((64, 64), 10, generator)
    taper = band_limit((64, 64), 2 / 3, 0.01, dtype=torch.float64)
    theirs = abtem_exit_wave(values, 300.0)
    for wrong in (values.mT, values.flip(0), -values):
        ours = multislice(
            Slices(wrong, PIXEL, THICKNESS), Optics(), plane=plane_of(10), band_limit=taper, limit_transmission=True
        )
        assert inside_error(ours, theirs) > 1e-3
