"""A camera measured as in the laboratory gives the curves that were put in, and loses what theory says."""

import math

import pytest
import torch
from scipy import integrate

from cryosim.core.fourier import positions
from cryosim.microscope.camera_curves import measured_mtf, measured_nps
from cryosim.microscope.counting import recorded_counts, sample_counts, sample_events, thin
from cryosim.microscope.detector import Detector, detect, dqe, mtf, nps, quantum_efficiency
from cryosim.microscope.events import histogram

SHAPE = (180, 201)
R = 2.394


def edges(generator):
    """Edges in all directions: 0.2 or 1.8 where smooth noise is negative or positive, periodic (y, x)."""
    y, x = (positions(n, dtype=torch.float64) for n in SHAPE)
    spot = torch.fft.rfft2(torch.exp(-(y[:, None] ** 2 + x**2) / (2 * 0.8**2)))
    smooth = torch.fft.irfft2(spot * torch.fft.rfft2(torch.randn(SHAPE, generator=generator).double()), s=SHAPE)
    return 1 + 0.8 * torch.sign(smooth)


CAMERAS = {
    # of the Falcon 4i without coincidence loss, whose own noise is below
    "falcon4i": (Detector.falcon4i(SHAPE, 1.3).replace(coincidence_radius=0.0, counting="poisson"), 1, 20.0),
    "falcon4i, 200 kV": (Detector.falcon4i(SHAPE, 1.3, 200).replace(coincidence_radius=0.0), 1000, 5.0),
    "falcon4i, binary": (Detector.falcon4i(SHAPE, 1.3).replace(coincidence_radius=0.0), 1000, 5.0),
    "falcon3": (Detector.falcon3(SHAPE, 1.3), 1, 20.0),
    "twice too many counts": (Detector(SHAPE, 1.3, torch.tensor([0.8, 0.4]), torch.tensor([2.0, 1.0])), 1, 20.0),
}


@pytest.mark.parametrize("name", CAMERAS)
def test_measured_curves_are_those_put_in(name, generator):
    detector, frames, incident = CAMERAS[name]  # the binary ones at 0.005 e-/(px frame): 0.25 % are lost
    n = 100
    scale = incident * quantum_efficiency(detector)
    flat = scale * detect(torch.ones(n, *SHAPE, dtype=torch.float64), 1.3, detector)
    flats = sample_counts(flat, detector, frames, generator=generator)
    scene = edges(generator)
    seen = (scale * detect(scene, 1.3, detector)).expand(n, -1, -1)
    images = sample_counts(seen, detector, frames, generator=generator)

    at, noise = measured_nps(flats, bins=10)
    there, transfer = measured_mtf(images.mean(0), scene, bins=10)
    efficiency = float(flats.mean()) / incident
    # noise of the NPS: the first ring holds 100 x 142 independent amplitudes, 0.8 %, the others 0.5 % to 0.2 %
    torch.testing.assert_close(noise[1:], nps(detector, at)[1:], rtol=0.02, atol=0)
    torch.testing.assert_close(noise[:1], nps(detector, at)[:1], rtol=0.04, atol=0)
    torch.testing.assert_close(transfer, mtf(detector, there), rtol=0.02, atol=0)
    assert efficiency == pytest.approx(float(quantum_efficiency(detector)), rel=0.005)
    made, wanted = efficiency * transfer**2 / noise, dqe(detector, (at + there) / 2)
    torch.testing.assert_close(made[1:], wanted[1:], rtol=0.02, atol=0)
    torch.testing.assert_close(made[:1], wanted[:1], rtol=0.04, atol=0)


@pytest.mark.parametrize("rate", [0.001, 0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("counting", ["poisson", "binary"])
def test_coincidence_loss_is_the_closed_form(rate, counting, generator):
    shape = (250, 251)
    detector = Detector(shape, 1.0, coincidence_radius=R, counting=counting)
    frames = math.ceil(2.5e5 / (rate * shape[0] * shape[1]))
    incident = torch.full(shape, frames * rate, dtype=torch.float64)
    counts = sample_counts(incident, detector, frames, generator=generator)
    neighbours = rate * math.pi * R**2
    survival = -math.expm1(-neighbours) / neighbours
    # 116,000 counts or more: 0.3 % or less
    assert float(counts.mean() / incident.mean()) == pytest.approx(survival, rel=0.01)
    assert float(counts.sum()) == pytest.approx(float(recorded_counts(incident, detector, frames).sum()), rel=0.01)
    edge = torch.cat([counts[0], counts[-1], counts[1:-1, 0], counts[1:-1, -1]])  # the border is like the interior
    wanted = frames * rate * survival
    assert abs(float(edge.mean()) - wanted) < 5 * math.sqrt(wanted / edge.numel())


@pytest.mark.parametrize("mean", [0.01, 0.3, 2.0])
def test_a_binary_pixel_tells_whether_it_was_hit(mean, generator):
    shape, frames = (120, 121), 40
    detector = Detector(shape, 1.0, counting="binary")
    expected = torch.full(shape, frames * mean, dtype=torch.float64)
    chance, trials = 1 - math.exp(-mean), frames * shape[0] * shape[1]
    drawn = sample_counts(expected, detector, frames, generator=generator)
    events = sample_events(expected, detector, frames, generator=generator)
    for counts in (drawn, histogram(events).double()):
        assert abs(float(counts.sum()) / trials - chance) < 5 * math.sqrt(chance * (1 - chance) / trials)
        variance = frames * chance * (1 - chance)
        assert float(counts.var()) == pytest.approx(variance, rel=5 * math.sqrt(2.5 / counts.numel()))


def structure_factor(rate: float, radius: float, frequency: float) -> float:
    """1 + 2 pi / rho int (rho2 - rho^2) J0(2 pi f d) d dd of Matérn's second process (Stoyan et al. 1995, section 5.4).

    rho2(d) = 2 (U (1 - exp(-n A)) - A (1 - exp(-n U))) / (A U (U - A)), U the union of two discs d apart; 0 within r.
    """
    area = math.pi * radius**2
    rho = -math.expm1(-rate * area) / area
    j0 = torch.special.bessel_j0

    def excess(d):
        lens = 2 * radius**2 * math.acos(min(1, d / (2 * radius))) - d / 2 * math.sqrt(max(0, 4 * radius**2 - d**2))
        u = 2 * area - lens
        both = 2 * (u * -math.expm1(-rate * area) - area * -math.expm1(-rate * u)) / (area * u * (u - area))
        wave = float(j0(torch.tensor(2 * math.pi * frequency * d, dtype=torch.float64)))
        return ((both if d >= radius else 0) - rho**2) * d * wave

    parts = (integrate.quad(excess, low, high)[0] for low, high in ((0, radius), (radius, 2 * radius)))
    return 1 + 2 * math.pi / rho * sum(parts)


@pytest.mark.parametrize("rate", [0.03, 0.015])
def test_coincidence_takes_noise_from_low_frequencies(rate, generator):
    shape, n, frames = (90, 101), 300, 12
    detector = Detector(shape, 1.0, coincidence_radius=2.0)
    flats = torch.full((n, *shape), frames * rate, dtype=torch.float64)
    at, noise = measured_nps(sample_counts(flats, detector, frames, generator=generator), bins=12)
    # at low frequencies, where binning into pixels does no more than mix in 1 - sinc^2 of white noise
    for ring in (0, 1, 2):
        cycles = float(at[ring]) / 2
        seen = float(torch.sinc(torch.tensor(cycles / math.sqrt(2))) ** 4)
        wanted = 1 + (structure_factor(rate, 2.0, cycles) - 1) * seen
        assert float(noise[ring]) == pytest.approx(wanted, abs=0.03)
    assert float(noise[0]) < 1 - 8 * rate
    assert abs(float(noise[-3:].mean()) - 1) < 0.06


def test_sub_pixel_events_make_the_coarse_image(generator):
    shape, s, frames = (40, 45), 4, 30
    y, x = (positions(n, dtype=torch.float64) for n in (96, 96))
    wave = torch.cos(2 * math.pi * (9 * y[:, None] + 5 * x) / 96) + torch.cos(2 * math.pi * 20 * x / 96 + 0.4)
    detector = Detector.falcon4i(shape, 2.0).replace(coincidence_radius=0.0, counting="poisson")
    fine, coarse = (
        200 * quantum_efficiency(detector) * detect(1 + 0.3 * wave, 1.0, detector, k) / k**2 for k in (s, 1)
    )
    torch.testing.assert_close(fine.reshape(40, s, 45, s).sum((1, 3)), coarse)
    counts = histogram(sample_events(fine, detector, frames, supersampling=s, generator=generator))
    z = (counts - coarse) / coarse.sqrt()
    assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / z.numel())


def test_halves_of_an_exposure_share_no_noise(generator):
    scene = 4 * edges(generator)
    counts = sample_counts(scene.expand(20, -1, -1), Detector(SHAPE, 1.0), generator=generator)
    kept, rest = thin(counts, generator=generator)
    product = (kept - scene / 2) * (rest - scene / 2)  # mean 0, variance (scene / 2)^2
    sigma = float((scene / 2).square().mean() / product.numel()) ** 0.5
    assert abs(float(product.mean())) < 5 * sigma
