"""Forecasts of tilt series: against simulated series that are aligned, fitted and reconstructed, and in limits."""

from __future__ import annotations

import math

import pytest
import torch

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.core.fourier import shifted, squared_frequencies
from cryosim.core.inelastic import ICE_INNER_POTENTIAL
from cryosim.core.rotation import random_rotations
from cryosim.io.examples import example_path
from cryosim.specimen.atoms import concatenate
from cryosim.specimen.potential import potential_slices
from inverse.calibration.ctf_fit import lens_of
from inverse.calibration.ring_model import RingModel
from inverse.calibration.thon_rings import at_one_height, tile_cells
from inverse.physics.deformed import free_shifts

ANGLES = torch.arange(-60.0, 61.0, 5.0, dtype=torch.float64)
CLEAR = cs.Optics(300.0, amplitude_contrast=1.0)
"""A lens that shows everything: its CTF is -1 at all frequencies."""
IDEAL = {"damage": None, "mean_free_path": math.inf}
KRIOS = cs.Optics(300.0, 30_000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
CAMERA = cs.Detector((128, 128), 3.0)


def coarse(k: torch.Tensor) -> torch.Tensor:
    """S of a specimen that is strong at low frequency [V^2 Å^3]."""
    return 1e5 * torch.exp(-150 * k) + 1


def fine(k: torch.Tensor) -> torch.Tensor:
    """S that falls slowly [V^2 Å^3]."""
    return 2e4 * torch.exp(-40 * k) + 60


def even(doses: float, angles: torch.Tensor = ANGLES) -> cs.TiltScheme:
    return cs.TiltScheme(angles, torch.full_like(angles, doses))


def random_volume(spectrum, shape: tuple[int, int, int], voxel: float, generator: torch.Generator) -> torch.Tensor:
    """Stationary Gaussian potential (z, y, x) [V] of power S, periodic in y and x, not in z."""
    white = torch.randn(2 * shape[0], *shape[1:], generator=generator, dtype=torch.float64)
    kz, ky, kx = (torch.fft.fftfreq(n, voxel, dtype=torch.float64) for n in white.shape)
    power = spectrum((kz[:, None, None] ** 2 + ky[:, None] ** 2 + kx**2).sqrt()) / voxel**3
    return torch.fft.ifftn(torch.fft.fftn(white) * power.sqrt()).real[: shape[0]]


def seen(
    spectrum, layers: int, side: int, pixel: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian slab (z, y, x) [V] twice as wide as its images (tilt, y, x), and these, through a clear lens [1]."""
    volume = torch.zeros(layers + 8, side, 2 * side, dtype=torch.float64)
    volume[4:-4] = random_volume(spectrum, (layers, side, 2 * side), pixel, generator)
    images = inv.TiltProjection(ANGLES, volume.shape, (side, side)).A(volume[None, None])[0, 0]
    return volume, -2 * float(cs.interaction_constant(300.0)) * pixel * images


# against series that are simulated -----------------------------------------------------------------------------------


def test_shifts_are_off_by_as_much_as_told():
    """Of a Gaussian specimen, wider than the images, that `align` knows nothing of."""
    n, layers, pixel, dose, off = 96, 30, 8.0, 2.0, []
    told = inv.forecast(even(dose), CLEAR, cs.Detector((n, n), pixel), coarse, thickness=layers * pixel, **IDEAL)
    free = free_shifts(ANGLES)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        _, contrast = seen(coarse, layers, n + 24, pixel, generator)
        moved = (2 * torch.rand(len(ANGLES), 2, generator=generator, dtype=torch.float64) - 1) * 4
        contrast = shifted(contrast, moved)[:, 12:-12, 12:-12]
        noise = torch.randn(contrast.shape, generator=generator, dtype=torch.float64) / (dose * pixel**2) ** 0.5
        found = inv.align(contrast + noise, ANGLES, pixel, fit=("shifts",), thickness=layers * pixel)
        errors = free @ (free.T @ (found.shifts - pixel * moved).T.flatten())
        off.append(errors.reshape(2, -1).T / told.standard_errors["shifts"])
    assert 1 / 1.3 < float(torch.stack(off).square().mean().sqrt()) < 1.3  # found 1.09


def test_defoci_are_off_by_as_much_as_told():
    """Of images with known lenses, fitted as those of a series are, and one of them blind."""
    n, pixel, dose = 320, 2.5, 4.0
    lens = cs.Optics(300.0, 20_000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
    level = even(dose, torch.tensor([0.0, 30.0, 60.0], dtype=torch.float64))
    told = inv.forecast(level, lens, cs.Detector((n, n), pixel), fine, thickness=200.0, **IDEAL)
    expected, off = float(told.standard_errors["defocus"][0]), []
    k = squared_frequencies((n, n), pixel, dtype=torch.float64).sqrt()
    signal = 2 * float(cs.interaction_constant(300.0)) * cs.ctf(lens, (n, n), pixel) * (fine(k) * 200.0).sqrt() / pixel
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
        image = torch.fft.ifft2(torch.fft.fft2(drawn[0]) * signal).real + drawn[1] / (dose * pixel**2) ** 0.5
        model = RingModel(at_one_height(tile_cells(image, pixel, 5.6, n // 2), (0.0, 0.0)).within(32.0, 5.6), lens)
        fitted = model.climbed(model.begun(lens_of(lens) | {"defocus": 20_050.0}), ["defocus"], 100)
        off.append(fitted.lens["defocus"] - 20_000.0)
        if seed == 0:
            blind = inv.fit_ctf(image, pixel, 300.0, thickness=0.0)
            assert abs(float(blind.optics.defocus) - 20_000.0) < 4 * expected
    assert 1 / 1.5 < math.sqrt(sum(x**2 for x in off) / len(off)) / expected < 1.5  # found 1.32


def test_a_tomogram_agrees_with_the_truth_as_far_as_told():
    """The best linear one, of a Gaussian specimen whose spectrum is known."""
    n, layers, pixel, dose = 120, 30, 8.0, 2.0
    told = inv.forecast(even(dose), CLEAR, cs.Detector((n, n), pixel), coarse, thickness=layers * pixel, **IDEAL)
    generator = torch.Generator().manual_seed(0)
    volume, contrast = seen(coarse, layers, n, pixel, generator)
    scale = -2 * float(cs.interaction_constant(300.0)) * pixel  # of contrast over V·voxel
    variance = 1 / (dose * pixel**2 * scale**2)
    drawn = torch.randn(contrast.shape, generator=generator, dtype=torch.float64)
    k = torch.linspace(0, 0.87, 60, dtype=torch.float64)  # [1/voxel]
    model = inv.GaussianModel(
        coarse(k / pixel) / pixel**3, k, torch.full_like(ANGLES, variance), torch.tensor(30.0, dtype=torch.float64)
    )
    physics = inv.TiltProjection(ANGLES, (layers + 8, n, n), (n, n))
    found = inv.wiener(physics, contrast / scale + variance**0.5 * drawn, model).volume
    inner = found[4:-4, 12:-12, 24:-24], volume[4:-4, 12:-12, n // 2 + 24 : -n // 2 - 24]
    curve = inv.fsc(*inner, pixel, region=inv.measured_region(inner[0].shape, ANGLES))
    for low in (0.012, 0.017, 0.022, 0.027, 0.032, 0.037, 0.042):
        means = [
            float(one.correlation[(one.frequency >= low) & (one.frequency < low + 0.005)].mean())
            for one in (curve, told.truth)
        ]
        assert abs(means[0] - means[1]) < 0.08


def test_half_tomograms_agree_as_far_as_told():
    """Counted images of proteins that fade, behind the lens, and absorption: no number is fitted."""
    generator = torch.Generator().manual_seed(0)
    protein, deep = io.read_atoms(example_path("ubiquitin")), 300.0
    size, copies, pixel = (1800.0, 900.0, deep), 1500, 8.0
    specimen = cs.place_randomly([protein], [copies], size, ice=cs.Ice(320.0), gap=2.0, generator=generator)
    specimen = specimen.replace(damage=cs.Damage(), absorption=cs.Absorption())
    tilts = cs.TiltScheme.dose_symmetric(54, 9, 130)
    detector, lens = cs.Detector((80, 80), pixel), KRIOS.replace(amplitude_contrast=0.0)
    sampling = cs.sampling_for(detector, lens, thickness=320.0, width=4)
    series = cs.simulate(
        specimen, tilts, lens, detector, sampling=sampling, scattering=cs.projection, generator=generator
    )
    molecules = inv.molecules_in_ice(protein, finest=2 * pixel)._replace(density=copies / math.prod(size))
    told = inv.forecast(tilts, lens, detector, molecules, thickness=deep)
    halves = inv.half_maps(series, lambda half: inv.reconstruct(half, "wbp", thickness=320.0), generator=generator)
    inner = [half.volume.values[:, 6:-6, 12:-12] for half in halves]
    found = inv.fsc(*inner, pixel, region=inv.measured_region(inner[0].shape, tilts.angles))
    for low in (0.006, 0.01, 0.014, 0.018, 0.022, 0.026, 0.032, 0.04):
        means = [
            float(one.correlation[(one.frequency >= low) & (one.frequency < low + 0.004)].mean())
            for one in (found, told.halves)
        ]
        assert abs(means[0] - means[1]) < 0.12  # found 0.08


def test_the_spectrum_of_molecules_is_that_of_an_image_of_many():
    """Random places in a plane, each molecule turned in its own way."""
    generator, n, pixel = torch.Generator().manual_seed(4), 200, 3.0
    protein = io.read_atoms(example_path("ubiquitin")).centred()
    places = (torch.rand(300, 3, generator=generator, dtype=torch.float64) - 0.5) * n * pixel * 0.92
    places[:, 2] = 0
    turns = random_rotations(300, generator)
    crowd = concatenate([protein.moved(turn, place) for turn, place in zip(turns, places, strict=True)])
    field = potential_slices(crowd, (n, n), pixel, 100.0, 1, solvent=ICE_INNER_POTENTIAL, width=6).total()
    power = torch.fft.fft2(field).abs().square() * pixel**4 / 300  # of one molecule [V^2 Å^6]
    k = squared_frequencies((n, n), pixel, dtype=torch.float64).sqrt()
    molecules = inv.molecules_in_ice(protein, 0.2, finest=9.5)
    for low in (0.03, 0.05, 0.07, 0.09):
        ring = (k > low) & (k < low + 0.01)
        assert float(power[ring].mean()) == pytest.approx(float(molecules.of_one(k[ring]).mean()), rel=0.12)
    assert molecules(torch.tensor([0.05])).item() == pytest.approx(
        molecules.density * molecules.of_one(torch.tensor([0.05])).item()
    )


# limits --------------------------------------------------------------------------------------------------------------


def test_the_order_matters_by_damage_alone():
    schemes = [cs.TiltScheme.dose_symmetric(60, 6, 60), cs.TiltScheme.bidirectional(60, 6, 60)]
    still = [inv.forecast(one, KRIOS, CAMERA, fine, thickness=600.0, damage=None) for one in schemes]
    torch.testing.assert_close(still[0].ssnr, still[1].ssnr, rtol=1e-9, atol=0)
    places = [one.angles.argsort() for one in schemes]
    shifts = [one.standard_errors["shifts"][at] for one, at in zip(still, places, strict=True)]
    torch.testing.assert_close(*shifts, rtol=1e-6, atol=0)
    assert still[0].resolution == pytest.approx(still[1].resolution, rel=1e-9)


def test_dose_symmetric_is_better_through_thick_ice():
    """Hagen, Wan & Briggs 2017: the fresh specimen is seen where the path is shortest, and from both sides alike."""
    molecules = inv.molecules_in_ice(io.read_atoms(example_path("ubiquitin")), finest=5.0)
    schemes = {
        "symmetric": cs.TiltScheme.dose_symmetric(60, 6, 120),
        "both ways": cs.TiltScheme.bidirectional(60, 6, 120),
        "both ways from 18": cs.TiltScheme.bidirectional(60, 6, 120, start=18),
        "one way": cs.TiltScheme.unidirectional(60, 6, 120),
    }
    camera, gain = cs.Detector((64, 64), 2.5), {}
    for deep in (500.0, 3000.0):
        told = {name: inv.forecast(one, KRIOS, camera, molecules, thickness=deep) for name, one in schemes.items()}
        best = told["symmetric"]
        for name, one in told.items():
            gain[name, deep] = [one.molecules_for(d) / best.molecules_for(d) for d in (6.0, 10.0)]
        low = [one.snr[one.angles.abs() < 13].amin(0)[-5] for one in (best, told["both ways"])]
        assert low[0] > 100 * low[1]  # of detail at 5 Å in the worst of the five lowest tilts
    for name in ("both ways", "both ways from 18", "one way"):
        for thin, thick in zip(gain[name, 500.0], gain[name, 3000.0], strict=True):
            assert 1.0 < thin < thick
    assert gain["both ways", 3000.0][1] > 1.02  # found 1.03
    assert gain["both ways from 18", 3000.0][1] > 1.1  # found 1.12
    assert gain["one way", 3000.0][1] > 1.4  # found 1.57


def test_noise_dominated_variances_fall_as_the_dose():
    faint = [inv.forecast(even(d), KRIOS, CAMERA, fine, thickness=300.0, **IDEAL) for d in (1e-4, 2e-4)]
    # of one tilt against another the information goes as the square of the dose: of both
    for name, power in (("shifts", 2.0), ("thickness", 2.0), ("defocus", 2.0)):
        ratio = faint[0].standard_errors[name] / faint[1].standard_errors[name]
        assert float(ratio.mean()) == pytest.approx(power, rel=0.05)
    torch.testing.assert_close(faint[1].ssnr, 2 * faint[0].ssnr, rtol=0.02, atol=1e-12)
    molecules = inv.molecules_in_ice(io.read_atoms(example_path("ubiquitin")), finest=6.0)
    once, twice = (inv.forecast(even(d), KRIOS, CAMERA, molecules, thickness=300.0, **IDEAL) for d in (1.0, 2.0))
    assert once.molecules_for(8.0) == pytest.approx(2 * twice.molecules_for(8.0))


def test_with_a_known_signal_variances_of_shifts_fall_as_the_dose():
    """Where the signal is far above the noise, of what tilts share only the noise is in the way."""
    bright = [
        inv.forecast(even(d), CLEAR, cs.Detector((64, 64), 8.0), coarse, thickness=17.0, **IDEAL) for d in (500.0, 1e3)
    ]
    ratio = bright[0].standard_errors["shifts"] / bright[1].standard_errors["shifts"]
    assert 1.2 < float(ratio.mean()) < 1.45


def test_a_tilt_without_dose_is_as_one_left_out():
    keep = torch.arange(len(ANGLES)) != 3
    whole = even(2.0)
    dark = whole.replace(doses=whole.doses * keep)
    less = cs.TiltScheme(ANGLES[keep], whole.doses[keep])
    told = [inv.forecast(one, KRIOS, CAMERA, fine, thickness=300.0) for one in (dark, less)]
    torch.testing.assert_close(told[0].ssnr, told[1].ssnr, rtol=1e-9, atol=0)
    for name in ("shifts", "angles", "defocus"):
        torch.testing.assert_close(
            told[0].standard_errors[name][keep], told[1].standard_errors[name], rtol=1e-7, atol=0
        )
        assert bool(torch.isinf(told[0].standard_errors[name][3]).all())
    assert float(told[0].snr[3].abs().max()) == 0


def test_one_tilt_alone_has_the_snr_of_its_image():
    """Of tilts so far apart that they share nothing, halves correlate as r / (1 + r), r of half of the dose."""
    scheme = even(1.0, torch.tensor([-40.0, 0.0, 40.0], dtype=torch.float64))
    told = inv.forecast(scheme, CLEAR, cs.Detector((64, 64), 16.0), lambda k: 5e3 + 0 * k, thickness=400.0, **IDEAL)
    # S T / cos t (2 sigma)^2 n, by hand
    cosines = torch.cos(torch.deg2rad(scheme.angles))
    r = 5e3 * 400 * (2 * float(cs.interaction_constant(300.0))) ** 2 / cosines
    torch.testing.assert_close(told.snr[:, 20], r, rtol=2e-3, atol=0)
    # a shell of an image has cos t times as many of the columns that tilts share
    g, n = (cosines * r / 2 / (1 + r / 2)).sum(), (cosines * r / 2 / (1 + r / 2) ** 2).sum()
    assert float(told.halves.correlation[-10:].mean()) == pytest.approx(float(1 - n / g), rel=0.02)


def test_a_defocus_for_each_tilt_is_each_tilts_own():
    angles = torch.tensor([-40.0, 0.0, 40.0], dtype=torch.float64)
    defoci = torch.tensor([1e4, 2e4, 3e4], dtype=torch.float64)
    told = inv.forecast(even(2.0, angles), KRIOS.replace(defocus=defoci), CAMERA, fine, thickness=300.0)
    for i, defocus in enumerate(defoci.tolist()):
        alone = inv.forecast(even(2.0, angles), KRIOS.replace(defocus=defocus), CAMERA, fine, thickness=300.0)
        torch.testing.assert_close(told.snr[i], alone.snr[i])
        torch.testing.assert_close(told.standard_errors["defocus"][i], alone.standard_errors["defocus"][i])


def test_the_slit_and_the_ice_take_electrons():
    flat = even(1.0, torch.tensor([-30.0, 0.0, 30.0], dtype=torch.float64))
    camera = cs.Detector((64, 64), 4.0)
    given = {"thickness": 1000.0, "damage": None, "mean_free_path": 2000.0}
    filtered = inv.forecast(flat, CLEAR, camera, fine, **given)
    bare = inv.forecast(flat, CLEAR, camera, fine, **(given | {"mean_free_path": math.inf}))
    kept = torch.exp(-0.5 / torch.cos(torch.deg2rad(flat.angles)))
    torch.testing.assert_close(filtered.snr, kept[:, None] * bare.snr, rtol=1e-9, atol=0)
    unfiltered = inv.forecast(flat, CLEAR.replace(slit=math.inf), camera, fine, **given)
    torch.testing.assert_close(unfiltered.snr, kept[:, None] ** 2 * bare.snr, rtol=1e-6, atol=0)


def test_lines_and_what_molecules_are_asked_for():
    told = inv.forecast(
        even(2.0), KRIOS, CAMERA, io.read_atoms(example_path("ubiquitin")), thickness=300.0, occupied=0.1
    )
    text = "\n".join(told.lines())
    assert text.count("tilt ") == len(ANGLES) and "molecules to average for 10 Å" in text
    assert told.molecules_for(20.0) < told.molecules_for(7.0)
    with pytest.raises(ValueError, match="expected a period of 6"):
        told.molecules_for(5.0)
    with pytest.raises(ValueError, match="forecast of molecules"):
        inv.forecast(even(2.0), KRIOS, CAMERA, fine, thickness=300.0).molecules_for(10.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thickness": 5.0}, "thickness above two pixels"),
        ({"thickness": math.inf}, "thickness above two pixels"),
        ({"mean_free_path": -1.0}, "positive mean_free_path"),
        ({"specimen": lambda k: -k}, "power of 0 or more"),
        ({"specimen": lambda k: 1.0}, "power of 0 or more"),
        ({"tilts": even(0.0)}, "3 or more tilts with a dose"),
        ({"tilts": even(1.0, torch.tensor([0.0, 50.0, 88.0]))}, "within 85 degrees"),
        ({"detector": cs.Detector((16, 64), 3.0)}, "32 pixels or more"),
        ({"optics": KRIOS.replace(defocus=torch.ones(4))}, "one for each of 25 tilts"),
        ({"finest": 1e4}, "finest period below"),
    ],
)
def test_what_is_refused(changes, message):
    given = {"tilts": even(1.0), "optics": KRIOS, "detector": CAMERA, "specimen": fine, "thickness": 300.0} | changes
    with pytest.raises(ValueError, match=message):
        inv.forecast(**given)


@pytest.mark.parametrize(("changes", "message"), [({"occupied": 1.0}, "occupied share"), ({"finest": 0.0}, "finest")])
def test_what_molecules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        inv.molecules_in_ice(io.read_atoms(example_path("ubiquitin")), **changes)
