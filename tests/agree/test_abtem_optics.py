"""The lens against abTEM's: every aberration by itself and all together, its envelopes and its aperture.

abTEM keeps arrays as (x, y), azimuths in rad, its focal spread as the 1/e width (sqrt(2) standard deviations), and its
angular spread as ours. Its older constants of nature make its wavelength 5e-9 shorter, which some hundred radians of
phase would show; so it is given the energy that has our wavelength.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from cryosim.core.constants import wavelength
from cryosim.microscope.optics import Optics, aperture_mask, envelope, transfer

abtem = pytest.importorskip("abtem")

SIZES = {
    "C10": -8000.0,
    "C12": 900.0,
    "C21": 2e4,
    "C23": -1.5e4,
    "C30": 2.7e7,
    "C32": 3e5,
    "C34": -2e5,
    "C41": 2e7,
    "C43": 1e7,
    "C45": -3e7,
    "C50": 4e9,
    "C52": 2e9,
    "C54": -1e9,
    "C56": 3e9,
}  # [Å]
SHAPES = [(64, 48), (45, 51)]  # (y, x)
PIXEL = 0.7


def theirs(shape, voltage=300.0, pixel_size=PIXEL, **values):
    """abTEM's transfer function as (y, x), double precision, azimuths given in deg."""
    ours, energy = wavelength(voltage), 1e3 * voltage
    energy = brentq(lambda e: abtem.core.energy.energy2wavelength(e) / ours - 1, 0.9 * energy, energy, xtol=1e-9)
    values = {name: math.radians(v) if name.startswith("phi") else v for name, v in values.items()}
    with abtem.config.set({"device": "cpu", "precision": "float64", "fft": "numpy", "dask.lazy": False}):
        lens = abtem.CTF(energy=energy, gpts=shape[::-1], sampling=pixel_size, **values)
        return torch.tensor(np.asarray(lens._evaluate_kernel()).T)


def difference(ours, theirs):
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 25.0, -70.0])
@pytest.mark.parametrize("name", SIZES)
def test_one_aberration(name, angle, shape):
    values = {name: SIZES[name]}
    if name[2] != "0":
        values[f"phi{name[1:]}"] = angle
    ours = transfer(Optics.from_polar(**values), shape, PIXEL)
    assert difference(ours, theirs(shape, **values)) < 1e-8
    assert difference(ours, torch.ones_like(ours)) > 0.1  # the aberration is seen


@pytest.mark.parametrize("voltage", [100.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_aberrations_envelopes_and_aperture(shape, voltage, generator):
    for _ in range(5):
        values = {name: size * float(torch.randn((), generator=generator)) for name, size in SIZES.items()}
        values |= {f"phi{n[1:]}": 360 * float(torch.rand((), generator=generator)) for n in SIZES if n[2] != "0"}
        optics = Optics.from_polar(voltage, **values)
        ours = transfer(optics, shape, PIXEL)
        assert difference(ours, theirs(shape, voltage, **values)) < 1e-8
        assert difference(theirs(shape, voltage, **(values | {"phi21": values["phi21"] + 1.0})), ours) > 1e-3

        optics = optics.replace(chromatic_aberration=2.7, energy_spread=0.4, voltage_ripple=3e-7, lens_ripple=2e-7)
        optics = optics.replace(convergence=0.03, aperture=10.0)
        relative = (0.4 / (1e3 * voltage)) ** 2 + 3e-7**2 + (2 * 2e-7) ** 2
        spreads = {
            "focal_spread": math.sqrt(2 * relative) * 2.7e7,
            "angular_spread": 0.03,
            "semiangle_cutoff": 10.0,
        }
        ours = transfer(optics, shape, PIXEL)
        assert difference(ours, theirs(shape, voltage, **values, **spreads)) < 1e-8
        assert float(envelope(optics, shape, PIXEL).min()) < 0.3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aperture", [2.0, 5.0, 10.3])
def test_soft_aperture(aperture, shape):
    ours = aperture_mask(Optics(aperture=aperture), shape, PIXEL)
    assert difference(ours, theirs(shape, semiangle_cutoff=aperture).real) < 1e-8
    assert ((ours > 0) & (ours < 1)).any()


@pytest.mark.parametrize("defocus", [8000.0, -8000.0])
def test_the_envelopes_of_a_defocused_lens(defocus):
    """The textbook forms: temporal in k^4, spatial in the displacement lambda defocus k."""
    shape, wave = (32, 33), wavelength(300.0)
    ky, kx = torch.fft.fftfreq(32, PIXEL, dtype=torch.float64), torch.fft.fftfreq(33, PIXEL, dtype=torch.float64)
    k2 = ky[:, None] ** 2 + kx**2
    optics = Optics(defocus=defocus, chromatic_aberration=2.0, energy_spread=0.6, convergence=0.1)
    spread = 2.0e7 * 0.6 / 3e5
    expected = torch.exp(-((math.pi * wave * spread * k2) ** 2) / 2 - (math.pi * 1e-4 * defocus) ** 2 * k2)
    assert difference(envelope(optics, shape, PIXEL), expected) < 1e-12
    both = theirs(shape, C10=-defocus, focal_spread=math.sqrt(2) * spread, angular_spread=0.1)
    assert difference(expected, both.abs()) < 1e-8
