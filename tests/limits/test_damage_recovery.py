"""The curve of damage that goes in comes out of the simulated frames."""

import pytest
import torch

import cryosim as cs
from cryosim import io
from cryosim.core.fourier import squared_frequencies
from cryosim.io.examples import example_path
from cryosim.microscope.likelihood import negative_log_likelihood
from cryosim.specimen.specimen import Poses

OPTICS = cs.Optics(300.0, 6000.0, spherical_aberration=2.7, amplitude_contrast=0.07)


def ubiquitins(damage, copies=1):
    """Copies of ubiquitin, one above the other, each turned another way."""
    atoms = io.read_atoms(example_path("ubiquitin")).centred()
    turns = cs.core.rotation.random_rotations(copies, torch.Generator().manual_seed(1))
    heights = 45.0 * (torch.arange(copies, dtype=torch.float64) - (copies - 1) / 2)
    places = torch.stack([torch.zeros_like(heights), torch.zeros_like(heights), heights], 1)
    return cs.Specimen((atoms,), (Poses(turns, places),), (60.0, 60.0, 45.0 * copies), damage=damage)


def test_critical_exposures_of_the_frames(generator):
    """Ring by ring the amplitude falls by exp(-N / 2 N_e): its slope gives N_e to 3 %, from 15 to 2.5 Å."""
    for voltage in (300.0, 200.0):
        optics = OPTICS.replace(voltage=voltage)
        tilts = cs.TiltScheme([0.0], [24.0], frames=12)
        detector = cs.Detector((72, 72), 1.0)
        sampling = cs.Sampling((150, 150), 0.6, 4.0, dtype=torch.float64)
        frames = cs.expected_frames(ubiquitins(cs.Damage()), tilts, optics, detector, 0, sampling=sampling)
        spectra = torch.fft.rfft2(frames - frames.mean((1, 2), keepdim=True))
        k = squared_frequencies((72, 72), 1.0, half=True, dtype=torch.float64).sqrt()
        doses = torch.arange(12, dtype=torch.float64) * 2.0
        for d in (15.0, 10.0, 7.0, 5.0, 4.0, 3.0, 2.5):
            ring = (k - 1 / d).abs() < 0.7 / 72
            left = (spectra[:, ring] * spectra[0, ring].conj()).real.sum(1)
            slope = torch.linalg.lstsq(torch.stack([doses, torch.ones(12)], 1).double(), left.log()[:, None]).solution[
                0
            ]
            weights = spectra[0, ring].abs().square()
            wanted = 1 / ((1 / cs.critical_exposure(k[ring], voltage)) * weights).sum() * weights.sum()
            assert float(-0.5 / slope) == pytest.approx(float(wanted), rel=0.03), (voltage, d)


def test_the_curve_from_counted_electrons():
    """Gradient descent on the likelihood of counted frames, from a start that is 40 % off, to 3 % of the truth."""
    tilts = cs.TiltScheme([0.0], [60.0], frames=6)
    detector = cs.Detector((40, 40), 1.5)
    sampling = cs.Sampling((120, 120), 0.8, 6.0, dtype=torch.float64)
    seen = cs.expected_frames(ubiquitins(cs.Damage(), 3), tilts, OPTICS, detector, 0, sampling=sampling)
    views = 4000  # as many images of the same view: in the sum of their counts the noise is that of so many molecules
    counts = torch.poisson(views * seen, generator=torch.Generator().manual_seed(2))
    log = torch.tensor([0.0, 0.0], dtype=torch.float64).requires_grad_()
    start = torch.tensor([0.24499 * 1.4, 2.8141 * 0.6], dtype=torch.float64)
    solver = torch.optim.LBFGS([log], lr=1.0, max_iter=12, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        scale, offset = start * torch.exp(log)
        damage = cs.Damage(cs.CriticalExposure(scale, 1.6649, offset))
        mean = cs.expected_frames(ubiquitins(damage, 3), tilts, OPTICS, detector, 0, sampling=sampling)
        value = negative_log_likelihood(counts, views * mean, detector).sum()
        value.backward()
        return value

    solver.step(loss)
    found = start * torch.exp(log.detach())
    damage = cs.CriticalExposure(float(found[0]), 1.6649, float(found[1]))
    for d in (20.0, 10.0, 5.0, 3.5):
        got, wanted = (float(cs.critical_exposure(1 / d, critical=c)) for c in (damage, None))
        assert got == pytest.approx(wanted, rel=0.03), d
