"""The detector sees a centred part of the image, on its own pixels, up to its own Nyquist frequency."""

import math

import pytest
import torch

from cryosim.core.fourier import positions
from cryosim.microscope.detector import Detector, detect


@pytest.mark.parametrize("given", [(16, 17), (15, 18)])
@pytest.mark.parametrize("out", [(8, 9), (9, 8), (15, 17)])
@pytest.mark.parametrize("pixel_size", [1.3, torch.tensor(1.3, dtype=torch.float64)], ids=["number", "tensor"])
def test_same_pixels_are_cropped_about_the_centre(given, out, pixel_size):
    image = torch.zeros(2, *given, dtype=torch.float64)
    image[:, given[0] // 2, given[1] // 2] = 1
    seen = detect(image, pixel_size, Detector(out, 1.3))
    assert seen.shape == (2, *out)
    assert (seen[0].argmax() == (out[0] // 2) * out[1] + out[1] // 2).all()


def waves(shape, top):
    """An image of all frequencies (m_y, m_x) / (n_y, n_x) up to `top`, as (y, x) -> values."""

    def function(y, x):
        total = torch.zeros(len(y), len(x), dtype=torch.float64)
        for my in range(top + 1):
            for mx in range(-top, top + 1):
                turns = my * y[:, None] / shape[0] + mx * x[None, :] / shape[1]
                total += math.cos(3 * my + mx) * torch.cos(2 * math.pi * turns + my - 2 * mx)
        return total

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 27), (25, 30)])
@pytest.mark.parametrize("ratio", [1.5, 1.3, 3.0])
def test_coarser_pixels_sample_what_they_can_hold(shape, ratio, dtype):
    function = waves(shape, 3)
    image = function(*(positions(n, dtype=torch.float64) for n in shape)).to(dtype)
    out = tuple(int(n / ratio) - 1 for n in shape)
    seen = detect(torch.stack([image, 2 * image]), 0.8, Detector(out, 0.8 * ratio))
    wanted = function(*(positions(n, ratio, dtype=torch.float64) for n in out))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(seen.double(), torch.stack([wanted, 2 * wanted]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("given", [(24, 27), (48, 30)])
@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_coarser_pixels_keep_the_mean(given, ratio, generator):
    image = torch.rand(3, *given, generator=generator, dtype=torch.float64)
    seen = detect(image, 1.0, Detector(tuple(round(n / ratio) for n in given), ratio))
    torch.testing.assert_close(seen.mean((-2, -1)), image.mean((-2, -1)))


@pytest.mark.parametrize("detector", [Detector((17, 16), 1.0), Detector((16, 18), 1.0), Detector((10, 10), 1.7)])
def test_detector_larger_than_the_field(detector):
    with pytest.raises(ValueError, match="beyond the simulated field"):
        detect(torch.ones(16, 17), 1.0, detector)


def test_gradients_in_both_pixel_sizes(generator):
    image = torch.randn(2, 14, 13, generator=generator, dtype=torch.float64)
    weights = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([0.9, 1.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: (detect(image, s[0], Detector((7, 6), s[1])) * weights).sum(), sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 4), 1.0), "Detector.shape"),
        (((4,), 1.0), "Detector.shape"),
        (((4, 4), 0.0), "Detector.pixel_size"),
        (((4, 4), -1.0), "Detector.pixel_size"),
    ],
)
def test_a_detector_has_pixels(arguments, message):
    with pytest.raises(ValueError, match=message):
        Detector(*arguments)
