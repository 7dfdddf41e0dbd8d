"""Exit waves against torch-scattering 0.6.0, given the same volume.

Its flight has the opposite sign of its transmission, so an attractive volume defocuses. Fed with the negative volume,
it returns the conjugate of the right wave. It has no band limit, cubic voxels, and refers its wave to one full
thickness behind the last slice.
"""

import pytest
import torch

from cryosim.core.fourier import squared_frequencies
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.potential import Slices

torch_scattering = pytest.importorskip("torch_scattering")

PIXEL = 0.8


def smooth(shape, generator):
    """Slices [V·Å] with nothing, to 1e-7, beyond two thirds of Nyquist."""
    k2 = squared_frequencies(shape[1:], PIXEL, dtype=torch.float64)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    field = torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-150 * PIXEL**2 * k2)).real
    return 15 * field / field.std()


@pytest.mark.parametrize("voltage", [100.0, 300.0])
@pytest.mark.parametrize("shape", [(16, 48, 48), (17, 45, 52)])
def test_the_conjugate_of_the_wave_of_the_negative_volume(shape, voltage, generator):
    values = smooth(shape, generator)
    n = shape[0]
    ours = multislice(Slices(values, PIXEL, PIXEL), Optics(voltage=voltage), plane=(n - n // 2) * PIXEL)
    scattered = (ours - 1).norm()

    def difference(volume, turn):
        return (turn(torch_scattering.multislice(volume, pixel_size=PIXEL, voltage=voltage)) - ours).norm() / scattered

    assert difference(-values / PIXEL, torch.conj) < 2e-5  # single precision in its wavelength, and no band limit
    assert difference(values / PIXEL, torch.clone) > 1e-3, "as it comes, it differs"
