"""The detector sees a centred part of the image, on its own pixels, up to its own Nyquist frequency."""

import math

import pytest
import torch
from scipy.interpolate import CubicSpline

from cryosim.core.fourier import positions
from cryosim.microscope.detector import Detector, detect, dqe, mtf, nps, quantum_efficiency


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
        (((4, 4), 1.0, 0.0), "Detector.dqe: expected finite values above 0 and at most 1, got 0"),
        (((4, 4), 1.0, 1.2), "Detector.dqe"),
        (((4, 4), 1.0, torch.tensor([0.9, math.nan])), "Detector.dqe"),
        (((4, 4), 1.0, torch.ones(2, 2)), r"Detector.dqe: expected a number or a tensor \(\) or a tensor \(n,\)"),
        (((4, 4), 1.0, torch.ones(0)), "Detector.dqe"),
        (((4, 4), 1.0, (0.9, 0.5)), "Detector.dqe"),
        (((4, 4), 1.0, 1.0, torch.tensor([1.0, 0.0])), "Detector.nps"),
        (((4, 4), 1.0, 1.0, torch.tensor(1.0)), "Detector.nps"),
        (((4, 4), 1.0, 1.0, None, torch.ones(4, 5)), "Detector.gain: expected one value per pixel"),
        (((4, 4), 1.0, 1.0, None, -torch.ones(4, 4)), "Detector.gain"),
        (((4, 4), 1.0, 1.0, None, None, torch.ones(3)), "Detector.dark"),
        (((4, 4), 1.0, 1.0, None, None, torch.full((4, 4), math.inf)), "Detector.dark"),
        (((4, 4), 1.0, 1.0, None, None, None, -1.0), "Detector.coincidence_radius"),
        (((4, 4), 1.0, 1.0, None, None, None, 0.0, 0.0), "Detector.frame_rate"),
        (((4, 4), 1.0, 1.0, None, None, None, 0.0, 240.0, "linear"), "Detector.counting"),
    ],
)
def test_a_detector_has_pixels(arguments, message):
    with pytest.raises(ValueError, match=message):
        Detector(*arguments)


# curves ---------------------------------------------------------------------------------------------------------------

NODES = torch.tensor([0.9, 0.85, 0.7, 0.52, 0.3], dtype=torch.float64)
NOISE = torch.tensor([1.1, 0.9, 0.6, 0.4, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_dqe_is_the_cubic_spline_of_the_logarithm(n):
    nodes = NODES[:n]
    detector = Detector((4, 4), 1.0, nodes)
    at = torch.linspace(0, 1, 61, dtype=torch.float64)
    spline = CubicSpline(torch.linspace(0, 1, n).double().numpy(), nodes.log().numpy(), bc_type=((1, 0.0), (2, 0.0)))
    torch.testing.assert_close(dqe(detector, at), torch.from_numpy(spline(at.numpy())).exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(dqe(detector, torch.linspace(0, 1, n)).double(), nodes, rtol=1e-6, atol=0)
    torch.testing.assert_close(dqe(detector, -at), dqe(detector, at))
    beyond = torch.tensor([1.0, 1.2, 1.4], dtype=torch.float64)  # a straight line of the logarithm, of the last slope
    wanted = nodes[-1] * torch.exp(float(spline(1.0, 1)) * (beyond - 1))
    torch.testing.assert_close(dqe(detector, beyond), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [0.8, torch.tensor(0.8), torch.tensor([0.8], dtype=torch.float64)])
def test_one_value_holds_at_all_frequencies(value):
    detector = Detector((4, 4), 1.0, value)
    at = torch.linspace(0, 1.4, 7)
    assert dqe(detector, at).dtype == at.dtype
    torch.testing.assert_close(dqe(detector, at), torch.full_like(at, 0.8))
    torch.testing.assert_close(mtf(detector, at), torch.ones_like(at))
    assert float(quantum_efficiency(detector)) == pytest.approx(0.8)


@pytest.mark.parametrize("noise", [None, NOISE, torch.tensor([1.3], dtype=torch.float64)])
def test_efficiency_mtf_and_noise_make_the_dqe(noise):
    detector = Detector((4, 4), 1.0, NODES, noise)
    at = torch.linspace(0, 1.4, 29, dtype=torch.float64)
    made = quantum_efficiency(detector) * mtf(detector, at) ** 2 / nps(detector, at)
    torch.testing.assert_close(made, dqe(detector, at), rtol=1e-12, atol=0)
    assert float(mtf(detector, 0.0)) == pytest.approx(1)


def test_published_cameras():
    camera = Detector.falcon4i((12, 13), 1.2)
    torch.testing.assert_close(dqe(camera, torch.tensor([0, 0.5, 1.0])), torch.tensor([0.92, 0.72, 0.50]))
    assert (camera.counting, camera.frame_rate, camera.coincidence_radius) == ("binary", 240.0, 2.394)
    torch.testing.assert_close(Detector.falcon4i((2, 2), 1.0, 200).dqe, torch.tensor([0.91, 0.62, 0.33]).double())
    with pytest.raises(ValueError, match="200 kV and 300 kV, got 120 kV"):
        Detector.falcon4i((2, 2), 1.0, voltage=120)
    old = Detector.falcon3((12, 13), 1.2)
    at = torch.linspace(0, 1, 5)
    torch.testing.assert_close(dqe(old, at), torch.tensor([0.889, 0.885, 0.792, 0.541, 0.288]))
    torch.testing.assert_close(mtf(old, at), torch.tensor([1, 0.861, 0.582, 0.307, 0.150]))
    assert float(nps(old, 0.0)) == 1 and float(quantum_efficiency(old)) == pytest.approx(0.889)


# the MTF in the image -------------------------------------------------------------------------------------------------


def test_a_constant_dqe_leaves_the_image_as_it_is(generator):
    image = torch.rand(16, 17, generator=generator)
    for pixel in (1.0, 1.3):
        ideal, lossy = Detector((8, 9), pixel), Detector((8, 9), pixel, torch.tensor([0.5]), gain=torch.ones(8, 9))
        assert torch.equal(detect(image, 1.0, ideal), detect(image, 1.0, lossy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1.0, 1.6])
@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("shape", [(32, 39), (33, 40)])
def test_a_wave_is_damped_by_the_mtf_at_its_frequency(shape, noise, ratio, dtype):
    out = tuple(int(n / ratio) for n in shape)
    detector = Detector(out, 0.9 * ratio, NODES, noise).to(dtype=dtype)
    for my, mx in ((3, 0), (0, -5), (7, 4)):

        def wave(shape, spacing, my=my, mx=mx, n=shape):
            y, x = (positions(m, spacing, dtype=torch.float64) for m in shape)
            return torch.cos(2 * math.pi * (my * y[:, None] / n[0] + mx * x / n[1]) + 0.7)

        image = torch.stack([wave(shape, 1.0), 2 + wave(shape, 1.0)]).to(dtype)
        frequency = 2 * ratio * math.hypot(my / shape[0], mx / shape[1])
        wanted = mtf(Detector((1, 1), 1.0, NODES, noise), frequency) * wave(out, ratio)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        seen = detect(image, 0.9, detector)
        assert seen.dtype == dtype
        torch.testing.assert_close(seen.double(), torch.stack([wanted, 2 + wanted]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("curve", [1.0, NODES], ids=["ideal", "dqe"])
@pytest.mark.parametrize("s", [2, 3, 4])
@pytest.mark.parametrize(("shape", "out"), [((40, 45), (13, 14)), ((41, 44), (14, 11))])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 2.3])
def test_sub_pixels_tile_the_pixels(ratio, shape, out, s, curve):
    image = waves(shape, 4)(*(positions(n, dtype=torch.float64) for n in shape))  # below the Nyquist frequency
    detector = Detector(out, 1.1 * ratio, curve)
    fine = detect(image, 1.1, detector, supersampling=s)
    assert fine.shape == (s * out[0], s * out[1])
    means = fine.reshape(out[0], s, out[1], s).mean((1, 3))
    torch.testing.assert_close(means, detect(image, 1.1, detector), rtol=0, atol=1e-10)


@pytest.mark.parametrize("out", [(9, 10), (10, 9)])
def test_sub_pixels_see_more_than_the_pixels(out):
    # a wave of 0.7 cycles per pixel: pixels of Nyquist frequency 0.5 see nothing, halves of them see it where it is
    x = positions(40, 1.0, dtype=torch.float64)
    image = (1 + torch.cos(2 * math.pi * 14 * x / 40)).expand(40, 40)
    detector = Detector(out, 2.0)
    torch.testing.assert_close(detect(image, 1.0, detector), torch.ones(out, dtype=torch.float64))
    fine = detect(image, 1.0, detector, supersampling=2)
    sub = torch.arange(2 * out[1], dtype=torch.float64) / 2 - 0.25 - out[1] // 2  # [px]
    wanted = 1 + math.sqrt(2) * torch.cos(2 * math.pi * 0.7 * sub)  # the divisor at 1/2: sin(pi/2) / (2 sin(pi/4))
    torch.testing.assert_close(fine, wanted.expand(2 * out[0], -1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("s", [1, 2])
def test_gradients_in_the_curves_and_the_sizes(s, generator):
    image = torch.randn(2, 14, 13, generator=generator, dtype=torch.float64)
    weights = torch.randn(s * 7, s * 6, generator=generator, dtype=torch.float64)
    given = torch.tensor([0.9, 1.4], dtype=torch.float64), NODES[:3].clone(), NOISE[:4].clone()

    def total(sizes, curve, noise):
        detector = Detector((7, 6), sizes[1], curve, noise)
        return (quantum_efficiency(detector) * detect(image, sizes[0], detector, s) * weights).sum()

    assert torch.autograd.gradcheck(total, [v.requires_grad_() for v in given])
    batch = NODES[:3] * torch.tensor([[1.0], [0.9]], dtype=torch.float64)
    together = torch.func.vmap(lambda curve: total(*(given[0].detach(), curve, given[2].detach())))(batch)
    one_by_one = torch.stack([total(given[0].detach(), curve, given[2].detach()) for curve in batch])
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("s", [2, 4])
def test_sums_of_sub_pixels_are_aliased_where_pixels_are_cut(s):
    # 0.75 cycles per pixel: nothing on pixels, and on sub-pixels the frequency 0.25, times the response of their mean
    # over the divisor, which is held at that of half a cycle
    x = positions(48, dtype=torch.float64)
    image = torch.cos(2 * math.pi * 0.25 * x).expand(24, 48)
    camera = Detector((8, 16), 3.0)
    assert detect(image, 1.0, camera).abs().max() < 1e-12
    mean = detect(image, 1.0, camera, supersampling=s).unflatten(-1, (16, s)).unflatten(-3, (8, s)).mean((-1, -3))
    response, divisor = (math.sin(math.pi * f) / (s * math.sin(math.pi * f / s)) for f in (0.75, 0.5))
    wanted = response / divisor * torch.cos(2 * math.pi * 0.25 * positions(16, dtype=torch.float64))
    torch.testing.assert_close(mean, wanted.expand(8, 16), rtol=0, atol=1e-12)


def test_supersampling_is_a_whole_number():
    for s in (0, 1.5):
        with pytest.raises(ValueError, match="detect.supersampling"):
            detect(torch.ones(8, 8), 1.0, Detector((4, 4), 1.0), supersampling=s)
