"""Signs of angles, defocus and axis: all eight combinations are told apart as far as images can."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import cryosim as cs
import inverse as inv
from cryosim.core.fourier import frequencies
from cryosim.core.rotation import tilt_rotation
from cryosim.microscope.optics import Optics, ctf
from inverse.calibration.conventions import _mirrored, _underfocus_by_density
from inverse.calibration.ctf_fit import rise_of
from inverse.conventions_page import write_conventions_page

ANGLES = torch.tensor([-50.0, -25.0, 0.0, 25.0, 50.0])
AXIS, PIXEL, SHAPE, DOSE = 12.0, 2.5, (448, 512), 5.0


def lens(defocus: float) -> Optics:
    return Optics(300.0, defocus=defocus, spherical_aberration=2.7, amplitude_contrast=0.07)


def molecules(density: float, generator: torch.Generator) -> torch.Tensor:
    """Contrast of sparse blobs (y, x), from 3 Å to the size of molecules, before the lens."""
    white = torch.poisson(torch.full(SHAPE, density, dtype=torch.float64), generator=generator) - density
    ky, kx = (frequencies(m, PIXEL, dtype=torch.float64) for m in SHAPE)
    square = ky[:, None].square() + kx.square()
    shape = torch.exp(-30.0 / 4 * square) * (1 + 8 / (1 + square * 40.0**2))
    return torch.fft.ifft2(torch.fft.fft2(white / density**0.5) * shape).real * 0.12


def taken(defocus: float, seed: int = 0) -> torch.Tensor:
    """Counts (tilt, y, x) of a tilted plane of molecules: each height through the lens of its own defocus."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(SHAPE[0]) - SHAPE[0] // 2).double()[:, None] * PIXEL
    x = (torch.arange(SHAPE[1]) - SHAPE[1] // 2).double() * PIXEL
    images = []
    for angle in ANGLES.tolist():
        seen = torch.fft.fft2(molecules(0.002, generator))
        rise_x, rise_y = rise_of(angle, AXIS)
        plane = rise_x * x + rise_y * y
        steps = torch.linspace(float(plane.min()), float(plane.max()), 25, dtype=torch.float64)
        contrast = torch.zeros(SHAPE, dtype=torch.float64)
        for step in steps.tolist():
            share = (1 - (plane - step).abs() / (steps[1] - steps[0]).clamp_min(1.0)).clamp_min(0)
            contrast += share * torch.fft.ifft2(seen * ctf(lens(defocus + step), SHAPE, PIXEL)).real
            if angle == 0:
                break
        images.append(torch.poisson(DOSE * PIXEL**2 * (1 + contrast).clamp_min(0), generator=generator))
    return torch.stack(images)


@pytest.fixture(scope="module")
def images() -> dict[int, torch.Tensor]:
    return {sign: taken(sign * 22_000.0) for sign in (1, -1)}


def declared(images: torch.Tensor, angles: int, defocus: int, axis: int) -> cs.TiltSeries:
    tilts = cs.TiltScheme(
        angles=angles * ANGLES, doses=torch.full_like(ANGLES, DOSE), axis_angle=AXIS + (180.0 if axis < 0 else 0.0)
    )
    return cs.TiltSeries(images=images, pixel_size=PIXEL, tilts=tilts, optics=lens(defocus * 20_000.0))


EIGHT = list(itertools.product((1, -1), repeat=3))
SLOW = [pytest.param(flips, marks=pytest.mark.slow) for flips in EIGHT[1:6] + EIGHT[7:]]


@pytest.mark.parametrize("flips", [*EIGHT[:1], *EIGHT[6:7], *SLOW])
def test_what_is_flipped_is_found(flips, images):
    angles, defocus, axis = flips
    # half of the flips of the defocus are of the image, half of what is declared
    sign = defocus if axis == 1 else 1
    found = inv.check_conventions(
        declared(images[sign], angles, defocus * sign, axis), defocus_range=(15_000.0, 35_000.0)
    )
    assert found.decided and found.margin > 10
    assert set(found.best) == {(angles, defocus, axis), (-angles, defocus, -axis)}
    assert abs(found.rise - angles * axis * defocus) < 3 * found.rise_error < 1
    assert ("angles" in found.verdict) == (angles * axis == -1)
    assert ("defocus" in found.verdict) == (defocus == -1)
    assert float((found.defoci - sign * 22_000).abs().max()) < 600


def test_the_axis_turned_and_the_angles_negated_are_one_specimen_turned_about_the_beam():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    turned = points * torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    for angle in (-50.0, 20.0):
        one, other = (
            tilt_rotation(torch.tensor(a, dtype=torch.float64), b) for a, b in ((angle, 12.0), (-angle, 192.0))
        )
        torch.testing.assert_close(points @ one.mT, turned @ other.mT, rtol=0, atol=1e-12)


def test_a_mirrored_lens_has_the_rings_of_the_other_defocus():
    one = lens(18_000.0).replace(phase_shift=20.0, astigmatism=700.0, astigmatism_angle=25.0)
    other = _mirrored(one).replace(defocus=-18_000.0, astigmatism_angle=115.0)
    torch.testing.assert_close(ctf(one, (64, 65), 1.5).square(), ctf(other, (64, 65), 1.5).square(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_dense_and_sparse_molecules_tell_the_sign_and_noise_does_not(sign, images):
    series = declared(images[sign], 1, 1, 1)
    assert sign * _underfocus_by_density(series, lens(22_000.0)) > 5
    generator = torch.Generator().manual_seed(5)
    told = []
    for _ in range(8):
        noise = torch.poisson(torch.full((3, *SHAPE), 4.0, dtype=torch.float64), generator=generator)
        tilts = series.tilts.index(slice(1, 4))
        told.append(_underfocus_by_density(series.replace(images=noise, tilts=tilts), lens(22_000.0)))
    # of a probability that is uniform, log-odds have the mean 0 and the standard deviation pi / sqrt(3)
    assert abs(sum(told) / 8) < 3 * math.pi / math.sqrt(24) and max(map(abs, told)) < 6


def test_noise_is_undecidable_and_the_page_says_so(generator, tmp_path):
    noise = torch.poisson(torch.full((5, 256, 300), 9.0), generator=generator)
    series = declared(noise, 1, 1, 1)
    found = inv.check_conventions(series)
    assert not found.decided and found.verdict.startswith("undecidable")
    path = write_conventions_page(tmp_path / "c.html", series, found, "<noise> & series")
    text = path.read_text(encoding="utf-8")
    assert "The images do not decide" in text and "&lt;noise&gt; &amp; series" in text
    assert "<script" not in text and "http://" not in text and text.count("data:image/png") == 1
