"""From a tilt series to a tomogram: where things land, how large they are, and what is refused."""

import math

import pytest
import torch

import inverse.reconstruction
import inverse.slabs
from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.simulate import simulate
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.constants import interaction_constant
from cryosim.core.rotation import rotation_z, tilt_rotation
from cryosim.microscope.detector import Detector
from cryosim.microscope.optics import Optics, ctf
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.specimen import Poses, Specimen
from inverse.design import designed, estimated_damping, fitted_design
from inverse.physics.spectral import tilt_geometry
from inverse.physics.tilt import TiltProjection
from inverse.preparation import prepare, to_tilt_frame
from inverse.reconstruction import reconstruct
from inverse.slabs import slabs

TWICE_SIGMA = 2 * float(interaction_constant(torch.tensor(300.0, dtype=torch.float64)))  # [rad/(V·Å)]
LENS = Optics(300.0, 20000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
PLATE = Optics(300.0, phase_shift=90.0)  # in focus: its ctf is -1 at every frequency


def axis(n, spacing=1.0):
    return (torch.arange(n, dtype=torch.float64) - n // 2) * spacing


def blob(shape, x, y, width, pixel=1.0):
    """Gaussian (y, x) of height 1 centred on (x, y)."""
    squared = (axis(shape[0], pixel)[:, None] - y) ** 2 + (axis(shape[1], pixel) - x) ** 2
    return torch.exp(-squared / (2 * width**2))


def scheme(*angles, dose=1.0, **more):
    angles = torch.tensor(angles, dtype=torch.float64)
    return TiltScheme(angles, torch.full_like(angles, dose), **more)


def weak_series(line_integrals, tilts, optics, pixel, counts=1e8):
    """Noiseless series whose contrast is exactly 2 sigma ctf V of the line integrals V (tilt, y, x) [V·Å]."""
    transfer = ctf(optics, tuple(line_integrals.shape[1:]), pixel)
    contrast = TWICE_SIGMA * torch.fft.ifft2(transfer * torch.fft.fft2(line_integrals)).real
    return TiltSeries(counts * (1 + contrast), pixel, tilts, optics)


def centre_of_mass(volume, near, radius=6):
    """(x, y, z) [voxel] of the brightest part of a volume (z, y, x) within `radius` of the point `near`."""
    z, y, x = torch.meshgrid(*(axis(n) for n in volume.shape), indexing="ij")
    at = torch.stack([x, y, z], -1)
    weight = volume.double().clamp_min(0.5 * float(volume.max())) - 0.5 * float(volume.max())
    weight = weight * ((at - torch.as_tensor(near, dtype=torch.float64)).norm(dim=-1) < radius)
    return (at * weight[..., None]).sum((0, 1, 2)) / weight.sum()


# ---- the frame of the tilt axis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 48), (49, 49), (48, 61), (61, 48)])
def test_the_frame_turns_and_moves_back(shape):
    """Content stands where R_z(axis_angle) and the shift put it; R_z(-axis_angle) of what is left is the answer."""
    shifts = torch.tensor([[2.3, -1.7], [0.0, 3.1]], dtype=torch.float64)
    points = torch.tensor([[9.0, 4.0], [-5.0, 8.0]], dtype=torch.float64)
    seen = torch.stack([sum(blob(shape, *(p + shift).tolist(), 3.0) for p in points) for shift in shifts])
    for angle in range(-170, 171, 10):
        frame = to_tilt_frame(seen, shifts, float(angle))
        back = points @ rotation_z(-float(angle))[:2, :2].T
        expected = sum(blob(tuple(frame.shape[1:]), *p.tolist(), 3.0) for p in back)
        assert float((frame - expected).abs().max()) < 3e-4, angle  # what a blob of 3 px has beyond the square's edge


@pytest.mark.parametrize("shape", [(7, 9), (8, 9), (9, 8), (8, 10)])
@pytest.mark.parametrize("quarters", range(-4, 5))
def test_quarter_turns_are_exact(shape, quarters, generator):
    images = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    turned = to_tilt_frame(images, torch.zeros(2, 2, dtype=torch.float64), 90.0 * quarters)
    rotation = rotation_z(-90.0 * quarters)[:2, :2].round()
    assert turned.shape[1:] == (shape if quarters % 2 == 0 else shape[::-1])
    for y in range(-(shape[0] // 2) + 1, (shape[0] + 1) // 2):  # but the first sample of an even axis: its partner
        for x in range(-(shape[1] // 2) + 1, (shape[1] + 1) // 2):  # beyond the other edge is not there
            u, v = (rotation @ torch.tensor([x, y], dtype=torch.float64)).int().tolist()
            here = images[:, shape[0] // 2 + y, shape[1] // 2 + x]
            assert torch.equal(turned[:, turned.shape[1] // 2 + v, turned.shape[2] // 2 + u], here)


# ---- prepared images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "flip", "wiener"])
@pytest.mark.parametrize("shape", [(64, 64), (63, 70)])
@pytest.mark.parametrize("per_tilt", [False, True])
def test_prepared_images_are_line_integrals(correction, shape, per_tilt):
    """What the lens made of V comes back as -ctf V, |ctf| V or ctf^2 / (ctf^2 + 1/10) V, in V times voxel."""
    pixel, defocus = 4.0, torch.tensor([8000.0, 20000.0], dtype=torch.float64)
    optics = LENS.replace(defocus=defocus if per_tilt else 20000.0)
    v = torch.stack([blob(shape, 20.0, -12.0, w, pixel) - 1.5 * blob(shape, -20.0, 8.0, w, pixel) for w in (9.0, 13.0)])
    v = v - v.mean((1, 2), keepdim=True)  # the mean of an image stands for the unscattered beam
    images, _ = prepare(weak_series(v, scheme(0.0, 10.0), optics, pixel), ctf=correction)
    transfer = ctf(optics, shape, pixel)
    through = {"none": -transfer, "flip": transfer.abs(), "wiener": transfer**2 / (transfer**2 + 0.1)}[correction]
    expected = torch.fft.ifft2(through * torch.fft.fft2(v)).real / pixel
    inside = (slice(None), slice(8, -8), slice(8, -8))  # the edges are faded
    assert images.shape == v.shape
    assert float((images - expected)[inside].abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_phase_plate_gives_the_line_integrals_themselves():
    pixel = 4.0
    v = torch.stack([blob((64, 64), 20.0, -12.0, w, pixel) - blob((64, 64), -20.0, 8.0, w, pixel) for w in (9.0, 13.0)])
    for correction, gain in {"none": 1.0, "flip": 1.0, "wiener": 1 / 1.1}.items():
        for bin in (1, 2):
            images, _ = prepare(weak_series(v, scheme(0.0, 10.0), PLATE, pixel), ctf=correction, bin=bin)
            expected = gain * v[:, ::bin, ::bin] / (bin * pixel)
            inside = (slice(None), slice(5, -5), slice(5, -5))
            assert float((images - expected)[inside].abs().max()) < 2e-3 * float(expected.abs().max())


@pytest.mark.parametrize("bin", [1, 2, 3])
@pytest.mark.parametrize("correction", ["flip", "wiener", "none"])
@pytest.mark.parametrize("axis_angle", [0.0, 37.0])
def test_the_noise_is_as_large_as_predicted(bin, correction, axis_angle, generator):
    """Also per tilt: at 5000 Å a Wiener filter amplifies what bin 3 keeps twice as much as the rest."""
    counts, per_defocus, side = 30.0, 8, 192
    defocus = torch.tensor([5000.0, 30000.0], dtype=torch.float64).repeat_interleave(per_defocus)
    flat = torch.poisson(torch.full((2 * per_defocus, side, side), counts), generator=generator)
    tilts = scheme(*range(2 * per_defocus), axis_angle=axis_angle)
    images, predicted = prepare(TiltSeries(flat, 3.0, tilts, LENS.replace(defocus=defocus)), bin=bin, ctf=correction)
    margin = round((0.07 if axis_angle == 0 else 0.16) * images.shape[1])  # without faded edges and empty corners
    measured = images[:, margin:-margin, margin:-margin].double().var((1, 2))
    ratio = (measured / predicted).unflatten(0, (2, per_defocus)).mean(1)
    assert ratio.tolist() == pytest.approx([1.0, 1.0], abs=0.05)


def test_the_edges_fade_to_nothing(generator):
    counts = torch.poisson(torch.full((1, 40, 60), 50.0), generator=generator)
    images = prepare(TiltSeries(counts, 3.0, scheme(0.0)), ctf="none")[0][0]
    spread = images.abs().mean()
    for edge in (images[0], images[-1], images[:, 0], images[:, -1]):
        assert float(edge.abs().mean()) < 0.3 * float(spread)


# ---- tomograms -----------------------------------------------------------------------------------------------------


def blob_series(tilts, optics, shape=(60, 60), pixel=6.0, at=(48.0, -30.0, 36.0), width=18.0, height=0.5, **more):
    """Noiseless series of one Gaussian blob of potential `height` [V] at `at` (x, y, z) [Å]."""
    images = []
    for angle, shift in zip(tilts.angles, tilts.shifts, strict=True):
        x, y, _ = (tilt_rotation(angle, tilts.axis_angle) @ torch.tensor(at, dtype=torch.float64)).tolist()
        seen = blob(shape, x + float(shift[0]), y + float(shift[1]), width, pixel)
        images.append(height * width * math.sqrt(2 * math.pi) * seen)
    return weak_series(torch.stack(images), tilts, optics, pixel, **more)


@pytest.mark.parametrize("method", ["wbp", "least-squares"])
@pytest.mark.parametrize(("extent", "step"), [(60, 3), (80, 2)])
def test_values_are_volts(method, extent, step):
    """A smooth blob keeps the share of its height that the tilts see of all directions, over the filter's 1.1.

    At +-80 degrees that is within 25 % of the truth. Back-projection cannot do better: an isotropic blob has as much of
    its transform inside the wedge that no tilt sees as in any other direction. Least squares knows how thick the
    volume is and so fills some of the wedge, where the noise is as low as here.
    """
    tilts = TiltScheme.dose_symmetric(extent, step, 100.0)
    made = reconstruct(blob_series(tilts, PLATE), method, thickness=240.0, ctf="wiener")
    value = float(made.volume.values[40 // 2 + 6, 60 // 2 - 5, 60 // 2 + 8])
    seen = min(1.0, (2 * extent + step) / 180)
    if method == "wbp":
        assert value == pytest.approx(0.5 * seen / 1.1, rel=0.04)
    else:
        assert 0.5 * seen / 1.1 < value < 0.5
    assert value == pytest.approx(0.5, rel=0.25 if extent == 80 else 0.45)


@pytest.mark.parametrize("shape", [(48, 48), (49, 55), (48, 61)])
@pytest.mark.parametrize("axis_angle", [0.0, 40.0])
def test_a_simulated_blob_lands_where_it_stands(shape, axis_angle, generator):
    """Within half a voxel, displaced images and turned axis notwithstanding."""
    pixel, place = 6.0, torch.tensor([40.0, -34.0, 52.0], dtype=torch.float64)
    # not on a voxel, so that a lost half voxel would show
    heavy = Atoms(
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([79]),
        torch.tensor([800.0], dtype=torch.float64),
        torch.tensor([60.0], dtype=torch.float64),
    )
    specimen = Specimen((heavy,), (Poses(torch.eye(3, dtype=torch.float64)[None], place[None]),), (290.0, 290.0, 240.0))
    angles = torch.arange(-60.0, 61.0, 6.0, dtype=torch.float64)
    shifts = 15 * torch.randn(len(angles), 2, generator=generator, dtype=torch.float64)
    tilts = TiltScheme(angles, torch.full_like(angles, 2e4), shifts, axis_angle)
    optics = LENS.replace(defocus=15000.0)
    series = simulate(specimen, tilts, optics, Detector(shape, pixel), generator=generator)
    volume = reconstruct(series, "wbp", thickness=41 * pixel, low_pass=24.0).volume
    found = pixel * centre_of_mass(volume.values, place / pixel)
    assert float((found - place).abs().max()) < 0.5 * pixel


@pytest.mark.parametrize("method", ["wbp", "least-squares"])
def test_slabs_are_the_whole(method, monkeypatch):
    series = blob_series(TiltScheme.dose_symmetric(40, 10, 10.0), LENS, shape=(31, 40))
    whole = reconstruct(series, method, thickness=100.0)
    monkeypatch.setattr(inverse.slabs, "ROWS", 7)
    seen = []
    slabs = reconstruct(series, method, thickness=100.0, progress=lambda done, total: seen.append((done, total)))
    assert torch.allclose(slabs.volume.values, whole.volume.values, rtol=0, atol=1e-12)
    assert seen == [(n, 31) for n in (7, 14, 21, 28, 31)]


@pytest.mark.parametrize("thickness", [3.0, 50.0, 100.0])
@pytest.mark.parametrize("bin", [1, 2, 3])
def test_thickness_and_bin_give_the_grid(thickness, bin):
    series = blob_series(TiltScheme.dose_symmetric(20, 10, 10.0), LENS, shape=(31, 40), pixel=5.0)
    volume = reconstruct(series, thickness=thickness, bin=bin).volume
    assert tuple(volume.values.shape) == (max(1, round(thickness / (5.0 * bin))), 31 // bin, 40 // bin)
    assert float(volume.voxel_size) == 5.0 * bin


@pytest.mark.parametrize("bin", [1, 2, 3])
def test_binning_moves_nothing(bin):
    series = blob_series(TiltScheme.dose_symmetric(60, 4, 10.0), PLATE, shape=(61, 66), pixel=6.0)
    volume = reconstruct(series, thickness=200.0, bin=bin).volume
    found = 6.0 * bin * centre_of_mass(volume.values, torch.tensor([48.0, -30.0, 36.0]) / (6.0 * bin))
    assert found.tolist() == pytest.approx([48.0, -30.0, 36.0], abs=2.0)


@pytest.mark.parametrize("method", ["wbp", "least-squares"])
def test_the_order_of_the_exposures_does_not_matter(method, generator):
    series = blob_series(TiltScheme.unidirectional(40, 8, 10.0), LENS, shape=(30, 40))
    order = torch.randperm(len(series.tilts), generator=generator)
    one, other = (reconstruct(s, method, thickness=100.0).volume.values for s in (series, series.index(order)))
    assert float((one - other).abs().max()) < 1e-9 * float(one.abs().max())


@pytest.mark.parametrize("method", ["wbp", "least-squares"])
def test_images_without_optics_are_not_corrected(method):
    series = blob_series(TiltScheme.dose_symmetric(40, 8, 10.0), LENS, shape=(30, 40))
    bare = series.replace(optics=None)
    expected = reconstruct(series, method, thickness=100.0, ctf="none").volume.values
    assert torch.equal(reconstruct(bare, method, thickness=100.0, ctf="none").volume.values, expected)
    for correction in ("flip", "wiener"):
        with pytest.warns(UserWarning, match="no optics"):
            made = reconstruct(bare, method, thickness=100.0, ctf=correction).volume.values
        assert torch.equal(made, expected)


def test_low_pass_leaves_coarse_things_alone():
    series = blob_series(TiltScheme.dose_symmetric(60, 4, 10.0), PLATE)
    sharp, soft, softest = (reconstruct(series, thickness=200.0, low_pass=p).volume.values for p in (None, 24.0, 200.0))
    assert float((sharp - soft).norm()) < 0.05 * float(sharp.norm())
    assert float(softest.max()) < 0.5 * float(sharp.max())


@pytest.mark.parametrize("correction", ["flip", "wiener"])
def test_damping_grows_as_the_dose_falls(correction, generator):
    tilts = TiltScheme.dose_symmetric(60, 6, 100.0)
    mean = blob_series(tilts, LENS, width=12.0, height=4.0).images / 1e8
    geometry = tilt_geometry(40, 60, 60, "camera", 60.0)
    found = []
    for counts in (1e5, 1e4, 1e3, 1e2):
        noisy = TiltSeries(torch.poisson(counts * mean, generator=generator), 6.0, tilts, LENS)
        images, noise = prepare(noisy, ctf=correction)
        found.append(float(estimated_damping(images, noise, tilts.angles, geometry)))
        assert float(reconstruct(noisy, "least-squares", thickness=240.0, ctf=correction).weight) == found[-1]
    assert found == sorted(found)
    assert found[1] > 3 * found[0]  # noise ten times as large against the same signal, where the signal is seen


# ---- what a reconstruction says of itself --------------------------------------------------------------------------


def noisy_series(generator, shape=(48, 56), counts=100.0, height=3.0):
    tilts = TiltScheme.dose_symmetric(60, 6, 100.0)
    mean = blob_series(tilts, PLATE, shape=shape, height=height).images / 1e8
    return TiltSeries(torch.poisson(counts * mean, generator=generator), 6.0, tilts, PLATE)


@pytest.mark.parametrize("method", ["wbp", "least-squares", "sirt"])
@pytest.mark.parametrize(("ctf", "low_pass", "bin"), [("flip", None, 1), ("wiener", 40.0, 1), ("none", None, 2)])
def test_std_is_that_of_noise_alone(method, ctf, low_pass, bin, generator):
    """Of 20 series of nothing but electrons, layer by layer; by least squares it falls towards the faces."""
    tilts = TiltScheme.dose_symmetric(60, 12, 100.0)
    how = {"thickness": 120.0, "ctf": ctf, "low_pass": low_pass, "bin": bin}
    how |= {"weight": 30.0} if method == "least-squares" else {}
    squares, said = 0.0, None
    for _ in range(20):
        counts = torch.poisson(torch.full((len(tilts), 48, 64), 40.0), generator=generator)
        made = reconstruct(TiltSeries(counts, 6.0, tilts, LENS), method, std=said is None, **how)
        said = made.std if said is None else said
        middle = made.volume.values[:, 10 // bin : 38 // bin, 16 // bin : 48 // bin]
        squares = squares + middle.double().square().mean((1, 2)) / 20
    ratio = squares.sqrt() / said[:, 0, 0]
    assert said.shape == made.volume.values.shape
    assert ratio.tolist() == pytest.approx([1.0] * len(ratio), abs=0.08)


def test_the_posterior_deviation_is_that_of_the_error(generator):
    """The Wiener filter's volume differs from the truth by its std, where the specimen is as Gaussian as its model."""
    shape, tilts = (20, 64, 72), TiltScheme.dose_symmetric(60, 6, 100.0)
    k = [torch.fft.fftfreq(n, dtype=torch.float64) for n in shape]
    squared = k[0][:, None, None] ** 2 + k[1][:, None] ** 2 + k[2] ** 2
    truth = torch.randn(shape, generator=generator, dtype=torch.float64)
    truth = 3 * torch.fft.ifftn(torch.fft.fftn(truth) / (1 + squared / 0.1**2)).real
    truth = truth - truth.mean()
    lines = TiltProjection(tilts.angles, shape).A(truth[None, None])[0, 0]
    mean = weak_series(6.0 * lines, tilts, PLATE, 6.0, counts=1.0).images
    series = TiltSeries(torch.poisson(500.0 * mean.clamp_min(0), generator=generator), 6.0, tilts, PLATE)
    made = reconstruct(series, "wiener", thickness=120.0)
    middle = (slice(None), slice(8, -8), slice(24, -24))  # high tilts see past the sides
    error = (made.volume.values - truth)[middle]
    assert made.std is not None
    assert float(error.square().mean().sqrt()) == pytest.approx(float(made.std[middle].square().mean().sqrt()), rel=0.1)
    assert float(error.norm()) < 0.8 * float(truth[middle].norm())


def test_what_is_not_measured_leaves_little_trace(generator):
    """A good part of a volume by total variation is the method's own, and yet is faint in the images."""
    made = reconstruct(noisy_series(generator, shape=(24, 40)), "tv", thickness=120.0, std=False)
    rest = made.volume.values - made.measured.values
    physics = TiltProjection(made.angles, tuple(rest.shape))
    share = float(rest.norm() / made.volume.values.norm())
    seen = float(physics.A(rest[None, None]).norm() / physics.A(made.volume.values[None, None]).norm())
    assert share > 0.2
    assert seen < 0.45 * share


@pytest.mark.parametrize("method", ["least-squares", "sirt", "tv", "wiener"])
def test_the_misfit_tells_noise_from_structure(method, generator):
    """About 1 for the volume itself, and far above for one that explains half of the images."""
    made = reconstruct(noisy_series(generator, shape=(40, 52), counts=2e4), method, thickness=180.0)
    half = made.replace(volume=made.volume.replace(values=made.volume.values / 2), mismatch=None)
    assert 0.4 < float(made.misfit.mean()) < 1.6
    assert float(half.misfit.mean()) > 2 * float(made.misfit.mean())


@pytest.mark.parametrize("low_pass", [None, 30.0])
def test_the_misfit_of_an_empty_volume_is_one(low_pass, generator):
    """Of noise alone, faded edges and a low pass notwithstanding."""
    tilts = TiltScheme.dose_symmetric(60, 6, 100.0)
    counts = torch.poisson(torch.full((len(tilts), 64, 72), 60.0), generator=generator)
    made = reconstruct(TiltSeries(counts, 6.0, tilts, LENS), "wbp", thickness=60.0, low_pass=low_pass, std=False)
    empty = made.replace(volume=made.volume.replace(values=torch.zeros_like(made.volume.values)))
    assert float(empty.misfit.mean()) == pytest.approx(1.0, abs=0.03)


def test_one_row_is_as_any_other(generator):
    """Its single sample along y is not faded."""
    series = noisy_series(generator, shape=(1, 40))
    row = reconstruct(series, thickness=60.0, std=False).volume.values
    many = series.replace(images=series.images.expand(-1, 40, -1))
    middle = reconstruct(many, thickness=60.0, std=False, ctf="none").volume.values[:, 20]
    alone = reconstruct(series, thickness=60.0, std=False, ctf="none").volume.values[:, 0]
    assert row.shape[1] == 1
    assert float((alone - middle).norm()) < 1e-4 * float(middle.norm())


@pytest.mark.parametrize(("method", "most"), [("sirt", 1e-12), ("tv", 0.02), ("wiener", 0.02)])
def test_slabs_with_a_halo_are_nearly_the_whole(method, most, generator):
    """Within 2 % where rows are coupled; the same where they are not."""
    series = noisy_series(generator, shape=(96, 24))
    images, noise = prepare(series)
    how = {"thickness": 60.0, "bin": 1, "ctf": "flip", "filter": "ramp", "low_pass": None, "weight": None}
    design = fitted_design(designed(series, method, **how, iterations=None), images, noise)
    whole, parts = torch.empty(design.shape), torch.empty(design.shape)
    for values, rows in ((whole, 96), (parts, 48)):
        for row, layer, block in slabs(images, design, rows=rows, layers=7):
            values[layer, row] = block[..., design.columns]
    assert float((parts - whole).norm()) <= most * float(whole.norm())


# ---- what is refused -----------------------------------------------------------------------------------------------

SERIES = blob_series(scheme(-20.0, 0.0, 20.0), LENS, shape=(16, 18))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "sart"}, "\"local\", got 'sart'"),
        ({"thickness": 0.0}, "thickness"),
        ({"thickness": -10.0}, "thickness"),
        ({"thickness": math.nan}, "thickness"),
        ({"thickness": math.inf}, "thickness"),
        ({"thickness": 1e9}, "thickness"),
        ({"bin": 0}, "bin"),
        ({"bin": -2}, "bin"),
        ({"bin": 1.5}, "bin"),
        ({"bin": 17}, "bin"),
        ({"low_pass": 0.0}, "low_pass"),
        ({"low_pass": -4.0}, "low_pass"),
        ({"low_pass": math.nan}, "low_pass"),
        ({"weight": 0.0, "method": "least-squares"}, "weight"),
        ({"weight": math.nan, "method": "least-squares"}, "weight"),
        ({"weight": -1.0, "method": "tv"}, "weight"),
        ({"iterations": 0, "method": "sirt"}, "iterations"),
        ({"iterations": 2.5, "method": "sirt"}, "iterations"),
        ({"weight": 1.0, "method": "wiener"}, "expected no weight"),
        ({"iterations": 5, "method": "wbp"}, "expected no iterations"),
        ({"iterations": math.inf, "method": "sirt"}, "iterations"),
        ({"low_pass": 30.0, "method": "tv"}, "expected no low_pass"),
        ({"low_pass": 30.0, "method": "wiener"}, "expected no low_pass"),
        ({"filter": "hann"}, "filter"),
        ({"ctf": "Wiener"}, "ctf"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        reconstruct(SERIES, **({"thickness": 60.0} | arguments))


def test_a_slab_that_would_not_fit_is_refused_before_anything_is_made():
    wide = TiltSeries(torch.empty(1, 1, 1).expand(3, 200, 4096), 2.0, scheme(-20.0, 0.0, 20.0), LENS)
    for method in ("sirt", "tv", "wiener"):
        with pytest.raises(ValueError, match="Raise bin, or lower"):
            reconstruct(wide, method, thickness=4096.0 * 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite_are_refused(value):
    images = SERIES.images.clone()
    images[1, 3, 4] = value
    with pytest.raises(ValueError, match="TiltSeries.images holds values that are not finite"):
        reconstruct(SERIES.replace(images=images), thickness=60.0)


def test_an_image_without_electrons_is_named_by_its_angle():
    images = SERIES.images.clone()
    images[2] = 0
    with pytest.raises(ValueError, match=r"\[20.0\] degrees hold no electrons"):
        reconstruct(SERIES.replace(images=images), thickness=60.0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 4), (7, 9)])
@pytest.mark.parametrize("method", ["wbp", "least-squares"])
def test_the_smallest_images_and_a_single_tilt_work(shape, method, generator):
    counts = torch.poisson(torch.full((1, *shape), 50.0), generator=generator) + 1
    made = reconstruct(TiltSeries(counts, 3.0, scheme(0.0), LENS), method, thickness=12.0)
    assert tuple(made.volume.values.shape) == (4, *shape)
    assert bool(torch.isfinite(made.volume.values).all())
