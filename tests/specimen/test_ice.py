"""Ice about the molecules: its surfaces, its structure, what it displaces and what it takes from the beam."""

import itertools
import math
import warnings
from pathlib import Path

import pytest
import torch

import cryosim
from cryosim.core.fourier import SamplingWarning, positions, squared_frequencies
from cryosim.core.inelastic import ICE, ICE_INNER_POTENTIAL, PROTEIN, mean_free_path
from cryosim.core.rotation import tilt_rotation
from cryosim.io import read_atoms
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import absorbed_depth, multislice, projection
from cryosim.specimen.atoms import Atoms
from cryosim.specimen.ice import Absorption, Ice, Relief, meniscus, rough_relief, surfaces
from cryosim.specimen.moment import Moment
from cryosim.specimen.specimen import Poses, Specimen, assemble, flooded
from cryosim.specimen.tilted import tilted_slices
from cryosim.specimen.water import inner_potential, number_density, power_spectrum

ORIGIN = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
SIDES = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None, None]
MOVED = torch.tensor([13.0, -7.0], dtype=torch.float64)


def around(atoms, ice, absorption=None):
    """A specimen of one molecule at the origin."""
    return Specimen((atoms,), (ORIGIN,), (100.0, 100.0, 100.0), ice, absorption)


def bare(ice, absorption=None):
    """Ice alone: its one atom stands outside every field."""
    return around(Atoms([[4000.0, 0.0, 0.0]], [1]), ice, absorption)


def ubiquitin():
    return read_atoms(Path(cryosim.__file__).parent / "data" / "1ubi.pdb").centred()


def block(width, depth, spacing=16.44 ** (1 / 3)):
    """Carbon at the density at which its atoms displace all ice, width x width x depth Å."""
    axes = (positions(round(w / spacing), spacing, dtype=torch.float64) for w in (width, width, depth))
    places = torch.cartesian_prod(*axes)
    return Atoms(places - places.mean(0), torch.full((len(places),), 6))


def summed(source):
    return sum(source[i] for i in range(len(source)))


def structured(thickness, **more):
    return Ice(thickness, structure="water", **more)


# reliefs --------------------------------------------------------------------------------------------------------------


def test_rough_relief_has_the_roughness_and_the_correlation(generator):
    """Of heights h: <h> = 0, <h^2> = roughness^2, <h(0) h(r)> = roughness^2 exp(-r^2 / correlation^2)."""
    relief = rough_relief(5000.0, 12.0, 60.0, generator=generator)
    n = relief.heights.shape[-1]
    assert n * relief.spacing >= 5000
    assert relief.heights.std((1, 2)).tolist() == pytest.approx([12.0, 12.0], rel=0.04)
    assert relief.heights.mean((1, 2)).abs().max() < 0.6
    power = torch.fft.rfft2(relief.heights).abs().square()
    correlation = torch.fft.irfft2(power, s=(n, n)).mean(0) / relief.heights.square().mean() / n**2  # (y, x)
    steps = torch.arange(9)  # of a quarter of the correlation length
    for line, step in ((correlation[0, :9], 1.0), (correlation[:9, 0], 1.0), (correlation[steps, steps], 2**0.5)):
        r = step * relief.spacing * steps.double()
        torch.testing.assert_close(line, torch.exp(-((r / 60) ** 2)), rtol=0, atol=0.05)
    one, other = relief.heights
    assert abs(float((one * other).mean())) < 0.05 * 144


def test_rough_relief_follows_the_generator():
    one, same, other = (
        rough_relief(500.0, 5.0, 50.0, generator=torch.Generator().manual_seed(s)).heights for s in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_a_meniscus_deepens_as_the_square_of_the_distance():
    relief = meniscus(4000.0, 600.0, 1500.0, centre=(250.0, -500.0))
    both = relief.heights.sum(0)
    n, spacing = both.shape[-1], relief.spacing
    place = positions(n, spacing, dtype=torch.float64)
    row, column = divmod(int(both.argmin()), n)
    assert (float(place[column]), float(place[row])) == (250.0, -500.0)
    assert float(both.min()) == 0.0
    assert float(both[row, column + 24]) == pytest.approx(600.0)  # 1500 Å away
    assert float(both[row + 12, column]) == pytest.approx(150.0)  # 750 Å away
    assert torch.equal(relief.heights[0], relief.heights[1])


def test_a_relief_too_steep_for_the_tilt_is_warned_of(generator):
    ice = Ice(300.0, relief=rough_relief(900.0, 20.0, 100.0, generator=generator))
    specimen = around(block(30.0, 30.0), ice)
    with pytest.warns(SamplingWarning, match="nearly graze"):
        tilted_slices(specimen, 60.0, (40, 40), 2.0, 10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tilted_slices(specimen, 10.0, (40, 40), 2.0, 10.0)


def test_a_relief_longer_than_the_field_is_rough_all_the_same():
    """Its grid is as wide as many correlations: the heights of many surfaces together have the roughness."""
    heights = [rough_relief(200.0, 20.0, 300.0, generator=torch.Generator().manual_seed(i)).heights for i in range(8)]
    assert float(torch.stack(heights).square().mean().sqrt()) == pytest.approx(20.0, rel=0.15)
    assert float(torch.stack(heights).std((-2, -1)).mean()) > 15.0


@pytest.mark.parametrize("angle", [90.0, -100.0, 180.0])
def test_a_slab_is_not_seen_edge_on(angle):
    with pytest.raises(ValueError, match="angle between -90 and 90"):
        tilted_slices(around(block(30.0, 30.0), Ice(90.0)), angle, (40, 40), 2.0, 10.0)


def test_structured_ice_refuses_slopes_it_has_not():
    specimen = around(block(30.0, 30.0), Ice(90.0, structure="water"))
    with pytest.raises(ValueError, match="no gradient in pixel_size or thickness"):
        tilted_slices(specimen, 0.0, (40, 40), torch.tensor(2.0, dtype=torch.float64, requires_grad=True), 10.0)


def test_seeds_of_the_ice_do_not_meet_those_of_the_exposures():
    first, second = (
        tilted_slices(
            around(block(30.0, 30.0), Ice(90.0, structure="water", seed=seed)),
            0.0,
            (40, 40),
            2.0,
            10.0,
            moment=Moment(tilt=f),
        )
        for seed, f in ((2**32, 0), (0, 1))
    )
    assert not torch.equal(first[4], second[4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Relief(torch.zeros(3, 4, 4), 1.0), "heights (2, y, x)"),
        (lambda: Relief(torch.zeros(2, 4, 4), 0.0), "positive spacing"),
        (lambda: Ice(40.0, relief=Relief(torch.full((2, 4, 4), -20.0), 1.0)), "surfaces that do not meet"),
        (lambda: Absorption(medium=-3750.0), "Absorption.medium"),
        (lambda: Absorption(molecules=math.nan), "Absorption.molecules"),
        (lambda: rough_relief(0.0, 1.0, 10.0), "positive extent"),
        (lambda: rough_relief(100.0, 1.0, -10.0), "positive extent and correlation"),
        (lambda: Ice(0.0), "Ice.thickness"),
        (lambda: Ice(100.0, structure="snow"), "Ice.structure"),
    ],
)
def test_impossible_ice(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


# where the surfaces are seen ------------------------------------------------------------------------------------------


def height_of(relief, x, y):
    """Bilinear interpolation (2, y, x) [Å] at points x, y (2, y, x), held beyond the edge."""
    ny, nx = relief.heights.shape[1:]
    column = (x / relief.spacing + nx // 2).clamp(0, nx - 1)
    row = (y / relief.spacing + ny // 2).clamp(0, ny - 1)
    i, j = column.long().clamp(max=nx - 2), row.long().clamp(max=ny - 2)
    a, b, side = column - i, row - j, torch.arange(2)[:, None, None]
    lower = relief.heights[side, j, i] * (1 - a) + relief.heights[side, j, i + 1] * a
    upper = relief.heights[side, j + 1, i] * (1 - a) + relief.heights[side, j + 1, i + 1] * a
    return lower * (1 - b) + upper * b


def met_by_rays(ice, angle, axis_angle, shift, shape, pixel_size):
    """Heights w (2, y, x) [Å] at which the ray of each pixel meets either surface, by bisection.

    A point (u, v, w) of the ray stands at R^T ((u, v, w) - shift) in the specimen.
    """
    v, u = (positions(n, pixel_size, dtype=torch.float64) for n in shape)
    rotation = tilt_rotation(angle, axis_angle)
    low = torch.full((2, *shape), -3e3, dtype=torch.float64)
    high = -low
    for _ in range(60):
        w = (low + high) / 2
        point = torch.stack([(u - shift[0]).expand_as(w), (v - shift[1])[:, None].expand_as(w), w], -1)
        x, y, z = (point @ rotation).unbind(-1)
        raised = 0.0 if ice.relief is None else height_of(ice.relief, x, y)
        above = z > SIDES * (ice.thickness / 2 + raised)
        low, high = torch.where(above, low, w), torch.where(above, w, high)
    return w


@pytest.mark.parametrize("shape", [(31, 40), (28, 33)])
@pytest.mark.parametrize(("angle", "axis_angle"), [(0.0, 30.0), (40.0, -85.0), (-60.0, 12.0)])
def test_surfaces_are_where_rays_meet_them(shape, angle, axis_angle, generator):
    shift = torch.tensor([13.0, -7.0], dtype=torch.float64)
    flat, rough = Ice(400.0), Ice(400.0, relief=rough_relief(1600.0, 8.0, 200.0, generator=generator))
    wanted = [met_by_rays(ice, angle, axis_angle, shift, shape, 8.0) for ice in (flat, rough)]
    plane = surfaces(flat, angle, axis_angle, shift, shape, 8.0)
    torch.testing.assert_close(plane.heights, wanted[0], rtol=0, atol=1e-9)
    assert (plane.depths == 0).all()
    seen = surfaces(rough, angle, axis_angle, shift, shape, 8.0)
    torch.testing.assert_close(seen.heights, wanted[1], rtol=0, atol=0.02)
    torch.testing.assert_close(seen.depths, SIDES * (wanted[1] - wanted[0]), rtol=0, atol=0.02)
    assert seen.depths.std() > 5


def test_a_slab_without_shift_is_one_with_a_shift_of_zero():
    ice = Ice(300.0, relief=meniscus(2000.0, 100.0, 500.0))
    one = surfaces(ice, 30.0, 20.0, None, (20, 21), 5.0)
    two = surfaces(ice, 30.0, 20.0, torch.zeros(2, dtype=torch.float64), (20, 21), 5.0)
    assert torch.equal(one.heights, two.heights) and torch.equal(one.depths, two.depths)


# reliefs in slices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.0, 45.0, -60.0])
def test_the_column_is_thickness_and_reliefs_over_cos(angle, dtype):
    """(t + h(x, y)) / cos(angle) where the relief is nearly level, and what rays say, where it is not."""
    ice = Ice(500.0, relief=meniscus(8000.0, 200.0, 2000.0))
    shape, pixel = (45, 48), 6.0
    source = tilted_slices(bare(ice), angle, shape, pixel, 20.0, axis_angle=25.0, shift=MOVED, dtype=dtype)
    assert source[0].dtype == dtype
    heights = met_by_rays(ice, angle, 25.0, MOVED, shape, pixel)
    wanted = ICE_INNER_POTENTIAL * (heights[1] - heights[0])
    torch.testing.assert_close(summed(source).double(), wanted, rtol=2e-5, atol=0)
    v, u = (positions(n, pixel, dtype=torch.float64) - s for n, s in zip(shape, (MOVED[1], MOVED[0]), strict=True))
    a, t = math.radians(25.0), math.radians(angle)
    across, along = u * math.cos(a) + v[:, None] * math.sin(a), v[:, None] * math.cos(a) - u * math.sin(a)
    deeper = 200.0 * ((across / math.cos(t)) ** 2 + (500 / 2 * math.tan(t)) ** 2 + along**2) / 2000.0**2
    direct = ICE_INNER_POTENTIAL * (500.0 + deeper) / math.cos(t)
    torch.testing.assert_close(summed(source).double(), direct, rtol=4e-3, atol=0)


@pytest.mark.parametrize("angle", [0.0, 50.0])
@pytest.mark.parametrize("which", [0, 1])
def test_a_relief_stands_at_the_height_of_its_surface(which, angle):
    """First moment of what it adds along the beam, pixel by pixel."""
    raised = torch.zeros(2, 2, 2, dtype=torch.float64)
    raised[which] = 6.0
    ice, shape = Ice(400.0, relief=Relief(raised, 50.0)), (21, 24)
    with_relief, without = (
        tilted_slices(bare(i), angle, shape, 5.0, 10.0, dtype=torch.float64) for i in (ice, ice.replace(relief=None))
    )
    n = len(with_relief)
    added = torch.stack([with_relief[i] for i in range(n)])
    added = added - summed(without) / n
    w = positions(n, 10.0, dtype=torch.float64)[:, None, None]
    mean = (w * added).sum(0) / added.sum(0)
    depth = 6.0 / math.cos(math.radians(angle))
    torch.testing.assert_close(added.sum(0), torch.full_like(mean, depth * ICE_INNER_POTENTIAL))
    wanted = met_by_rays(ice, angle, 0.0, torch.zeros(2), shape, 5.0)[which]
    torch.testing.assert_close(mean, wanted, rtol=0, atol=depth / 2 + 1e-6)
    assert int((added.abs() > 1e-9).sum(0).max()) <= 2  # at most two slices share it


@pytest.mark.parametrize("absorption", [None, Absorption()])
@pytest.mark.parametrize("relief", [False, True])
def test_the_total_is_the_sum_of_the_slices(relief, absorption, generator):
    ice = Ice(120.0, relief=rough_relief(400.0, 4.0, 60.0, generator=generator) if relief else None)
    specimen = around(ubiquitin(), ice, absorption)
    source = tilted_slices(specimen, 35.0, (48, 45), 1.5, 6.0, voltage=300.0, dtype=torch.float64)
    torch.testing.assert_close(source.total(), summed(source), rtol=1e-10, atol=1e-8)
    assert source.total().is_complex() == (absorption is not None)


def test_the_total_leaves_out_the_fluctuations():
    smooth, rough = (
        tilted_slices(around(ubiquitin(), ice), 20.0, (48, 45), 1.5, 6.0, dtype=torch.float64)
        for ice in (Ice(80.0), structured(80.0))
    )
    torch.testing.assert_close(rough.total(), summed(smooth), rtol=1e-10, atol=1e-8)
    assert (summed(rough) - rough.total()).std() > 1


# structure ------------------------------------------------------------------------------------------------------------


def power(images, pixel_size):
    """Power spectrum (..., y, x // 2 + 1) [V^2 Å^4], or [Å^2] of a contrast."""
    ny, nx = images.shape[-2:]
    return torch.fft.rfft2(images.double()).abs().square() * pixel_size**2 / (ny * nx)


@pytest.mark.parametrize(("angle", "shape"), [(0.0, (72, 75)), (50.0, (75, 70))])
def test_fluctuations_have_the_spectrum_of_water(angle, shape):
    """Mean zero, and P(k) * thickness / cos(angle) in projection.

    Surfaces cut sharply carry a little of the ring to low frequency: 4 % of the spectrum there for 400 Å at 50 degrees.
    """
    pixel, frames, thickness = 1.1, 24, 400.0
    fluctuations = []
    for frame in range(frames):
        specimen = bare(structured(thickness, seed=5))
        source = tilted_slices(
            specimen, angle, shape, pixel, 8.0, axis_angle=-80.0, moment=Moment(tilt=frame), dtype=torch.float64
        )
        fluctuations.append(summed(source) - source.total())
    images = torch.stack(fluctuations)
    column = thickness / math.cos(math.radians(angle))
    assert abs(float(images.mean())) < 0.01 * float(images.std())
    found = power(images, pixel).mean(0)
    q = squared_frequencies(shape, pixel, half=True, dtype=torch.float64).sqrt()
    q[:, 0] = -1  # each pair of frequencies once
    edges = torch.linspace(0.04, 0.29, 6).tolist()
    ratio = [
        float((found[ring] / (power_spectrum(q[ring]) * column)).mean())
        for ring in ((q >= low) & (q < high) for low, high in itertools.pairwise(edges))
    ]
    assert ratio == pytest.approx([1.0] * 5, abs=0.1)
    assert sum(ratio) / 5 == pytest.approx(1.0, abs=0.03)


def ring_of(contrast, pixel_size):
    """Distance [Å] of the strongest ring of images (image, y, x), by a parabola through the top of the radial mean."""
    q = squared_frequencies(contrast.shape[-2:], pixel_size, half=True, dtype=torch.float64).sqrt()
    spectrum = power(contrast, pixel_size).mean(0)
    middles = torch.arange(0.2, 0.345, 0.01, dtype=torch.float64)
    radial = torch.stack([spectrum[(q - k).abs() < 0.01].mean() for k in middles])
    top = int(radial.argmax())
    assert 2 <= top < len(middles) - 2, "no ring"
    k, p = middles[top - 2 : top + 3] - middles[top], radial[top - 2 : top + 3]
    c = torch.linalg.lstsq(torch.stack([torch.ones_like(k), k, k**2], 1), p).solution
    return 1 / float(middles[top] - c[1] / (2 * c[2]))


SCHERZER = Optics(defocus=350.0, amplitude_contrast=0.07)  # its transfer is largest at 3.7 Å and flat about it


@pytest.mark.parametrize("angle", [0.0, 45.0])
def test_the_image_of_bare_ice_has_a_ring(angle):
    """At 3.7 Å, as micrographs of vitreous water have."""
    images = []
    for frame in range(6):
        source = tilted_slices(bare(structured(150.0)), angle, (128, 125), 0.9, 5.0, moment=Moment(tilt=frame))
        images.append(image(multislice(source, SCHERZER), SCHERZER, 0.9))
    seen = torch.stack(images)
    assert float(seen.std()) > 0.01
    assert ring_of(seen / seen.mean() - 1, 0.9) == pytest.approx(3.7, rel=0.04)


def test_ice_of_constant_potential_shows_nothing():
    seen = image(multislice(tilted_slices(bare(Ice(150.0)), 30.0, (40, 41), 1.0, 5.0), SCHERZER), SCHERZER, 1.0)
    assert float(seen.std()) < 1e-5


def test_molecules_displace_the_structure():
    """A block through the whole slab: within it there is none, beside it as much as without it."""
    ice = structured(60.0)
    full, empty = (
        tilted_slices(specimen, 0.0, (80, 80), 1.0, 4.0, dtype=torch.float64)
        for specimen in (around(block(40.0, 80.0), ice), bare(ice))
    )
    left, whole = (torch.stack([s[i] for i in range(len(s))]) for s in (full, empty))
    left = left - torch.stack([full.atoms[i] for i in range(len(full))])
    left, whole = left[len(full) // 2], whole[len(empty) // 2]
    left, whole = left - full.column * full.potential / len(full), whole - empty.column * empty.potential / len(empty)
    assert float(left[28:52, 28:52].std() / whole[28:52, 28:52].std()) < 0.08
    assert float((left - whole)[:, :8].std() / whole[:, :8].std()) < 0.02


def test_a_protein_displaces_the_structure():
    """A slice of which a fraction f is ice keeps f of its fluctuations, so f^2 of their variance."""
    ice, fields = structured(40.0), []
    for specimen in (around(ubiquitin(), ice), bare(ice)):
        frames = [
            tilted_slices(specimen, 0.0, (64, 64), 1.2, 8.0, dtype=torch.float64, moment=Moment(tilt=f))
            for f in range(16)
        ]
        fields.append(torch.stack([summed(s) - s.total() for s in frames]))
    (parts,) = tilted_slices(around(ubiquitin(), ice), 0.0, (64, 64), 1.2, 8.0, dtype=torch.float64).volumes
    filled = torch.stack([(1 - parts[i] / 8).clamp_min(0) for i in range(len(parts) // 2 - 2, len(parts) // 2 + 3)])
    core = (slice(None), slice(28, 36), slice(28, 36))
    variance, whole = (f[core].square().mean() for f in fields)
    kept = float(filled[core].square().mean())
    assert 0.2 < kept < 0.7
    assert float(variance / whole) == pytest.approx(kept, abs=0.12)


def test_frames_differ_and_one_frame_is_always_the_same():
    specimen = around(ubiquitin(), structured(60.0, seed=3))

    def seen(frame, mine=specimen):
        return summed(tilted_slices(mine, 10.0, (48, 48), 1.2, 4.0, moment=Moment(tilt=frame)))

    assert torch.equal(seen(4), seen(4))
    other_seed = around(ubiquitin(), structured(60.0, seed=4))
    for other in (seen(5), seen(4, other_seed)):
        assert not torch.allclose(seen(4), other)
    fluctuation = [seen(frame, bare(structured(60.0, seed=3))) for frame in (4, 5)]
    one, two = (f - f.mean() for f in fluctuation)
    assert abs(float((one * two).mean() / (one.std() * two.std()))) < 0.06


def test_there_is_no_ice_outside_the_slab():
    """At 60 degrees a slab 30 Å thick crosses a slice in a stripe: |z| < 15 Å with z = u sin t + w cos t."""
    shape, pixel, thickness, t = (60, 120), 1.5, 4.0, math.radians(60.0)
    source = tilted_slices(bare(structured(30.0)), 60.0, shape, pixel, thickness, dtype=torch.float64)
    slices = torch.stack([source[i] for i in range(len(source))])
    slices = slices - source.column * source.potential / len(source)
    w = positions(len(source), thickness, dtype=torch.float64)[:, None]
    z = positions(shape[1], pixel, dtype=torch.float64) * math.sin(t) + w * math.cos(t)
    margin = thickness / 2 * math.cos(t)
    stripes = slices.square().mean(1)
    assert stripes[z.abs() > 15 + margin + 1e-6].max() == 0
    inside = z.abs() < 15 - margin
    assert inside.any(1).sum() > 20 and (stripes[inside] > 0).all()
    assert float(stripes[inside].mean()) > 5 * float(stripes.mean())


def test_slices_reach_every_surface():
    """No ice is missing at the edges of a wide field at high tilt: its height there is far above the molecules."""
    source = tilted_slices(bare(structured(200.0)), 60.0, (32, 200), 2.0, 10.0)
    reach = (len(source) // 2) * 10.0
    assert 200 * math.tan(math.radians(60)) + 200 <= reach + 1e-6 < 200 * math.tan(math.radians(60)) + 200 + 12
    assert len(tilted_slices(bare(Ice(200.0)), 60.0, (32, 200), 2.0, 10.0)) == 1


# inner potential ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["constant", "water"])
def test_inner_potential_of_ice(structure):
    """4.53 V (Vulović et al. 2013), which is that of independent atoms at 0.93 g/cm^3."""
    source = tilted_slices(bare(Ice(200.0, structure=structure)), 0.0, (96, 96), 1.0, 10.0)
    assert float(summed(source).mean()) / 200 == pytest.approx(4.53, rel=0.02)
    assert inner_potential() == pytest.approx(4.53, rel=0.02)


@pytest.fixture(scope="module")
def pool():
    """Ubiquitin in a box of explicit water, and the specimen it was made of."""
    dry = Specimen((ubiquitin(),), (ORIGIN,), (76.0, 76.0, 60.0), Ice(60.0))
    return dry, flooded(dry, generator=torch.Generator().manual_seed(2))


def test_a_flooded_box_holds_as_much_water_as_fits(pool):
    dry, wet = pool
    assert wet.ice is None and wet.size == (76.0, 76.0, 60.0)
    water = wet.molecules[-1]
    assert water.numbers.reshape(-1, 3).unique(dim=0).tolist() == [[8, 1, 1]]
    free = 76 * 76 * 60 - 10_400  # [Å^3]; ubiquitin displaces 0.73 cm^3/g
    assert len(water) / 3 / number_density() == pytest.approx(free, rel=0.005)
    oxygen = water.positions[::3]
    assert (oxygen.abs() <= torch.tensor([38.0, 38.0, 30.0])).all()
    assert torch.cdist(oxygen, assemble(dry).positions).min() >= 2.1


def test_mean_potential_of_a_flooded_box(pool):
    """Away from the protein it is that of ice."""
    _, wet = pool
    seen = summed(tilted_slices(wet, 0.0, (80, 80), 1.0, 5.0, dtype=torch.float64))
    y, x = (positions(80, 1.0, dtype=torch.float64).reshape(s) for s in ((-1, 1), (1, -1)))
    beside = ((y**2 + x**2).sqrt() > 24) & (y.abs() < 35) & (x.abs() < 35)
    assert float(seen[beside].mean()) / 60 == pytest.approx(4.53, rel=0.02)


def test_the_image_of_a_flooded_box_has_a_ring():
    """At 3.7 Å, over six boxes. A window hides their edges."""
    fade = torch.sin(torch.pi * (torch.arange(88) + 0.5) / 88)
    window = fade[:, None] * fade
    dry = Specimen((Atoms([[0.0, 0.0, 0.0]], [1]),), (ORIGIN,), (90.0, 90.0, 90.0), Ice(90.0))
    flat = []
    for seed in range(6):
        source = tilted_slices(flooded(dry, generator=torch.Generator().manual_seed(seed)), 0.0, (112, 112), 0.9, 5.0)
        seen = image(multislice(source, SCHERZER), SCHERZER, 0.9)[12:100, 12:100]
        flat.append((seen - (seen * window).sum() / window.sum()) * window)
    assert ring_of(torch.stack(flat), 0.9) == pytest.approx(3.7, rel=0.04)


def test_flooding_needs_ice():
    with pytest.raises(ValueError, match="expected a specimen with ice"):
        flooded(around(ubiquitin(), None))


# absorption -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattering", [multislice, projection])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("voltage", "angle", "structure"), [(300.0, 0.0, "constant"), (100.0, 55.0, "water")])
def test_ice_lets_pass_what_its_mean_free_path_says(voltage, angle, structure, dtype, scattering):
    """|wave|^2 = exp(-t / (Lambda cos(angle))) behind a zero-loss filter."""
    specimen = bare(Ice(900.0, structure=structure), Absorption())
    source = tilted_slices(specimen, angle, (24, 25), 3.0, 30.0, voltage=voltage, dtype=dtype)
    assert source[0].dtype == dtype.to_complex()
    passed = scattering(source, Optics(voltage=voltage)).abs().square()
    depth = 900.0 / math.cos(math.radians(angle)) / mean_free_path(ICE, voltage)
    assert float(passed.mean()) == pytest.approx(math.exp(-depth), rel=0.02)
    assert float(absorbed_depth(source, Optics(voltage=voltage)).mean()) == pytest.approx(depth, rel=1e-5)


def test_mean_free_paths_may_be_given():
    source = tilted_slices(bare(Ice(600.0), Absorption(2000.0)), 0.0, (20, 20), 3.0, 30.0, voltage=300.0)
    assert float(multislice(source, Optics()).abs().square().mean()) == pytest.approx(math.exp(-0.3), rel=1e-4)


def test_slower_electrons_are_absorbed_sooner():
    depths = [
        float(
            absorbed_depth(
                tilted_slices(bare(Ice(600.0), Absorption()), 0.0, (20, 20), 3.0, 30.0, voltage=voltage),
                Optics(voltage=voltage),
            ).mean()
        )
        for voltage in (300.0, 200.0, 100.0)
    ]
    wanted = [600 / mean_free_path(ICE, v) for v in (300.0, 200.0, 100.0)]
    assert depths == pytest.approx(wanted, rel=1e-5)
    assert depths[0] < depths[1] < depths[2]


@pytest.mark.parametrize("ice", [Ice(90.0), None])
def test_molecules_absorb_by_their_own_mean_free_path(ice):
    """A block of d = 60 Å: exp(-(t - d) / Lambda_ice - d / Lambda_molecules) within it, darker than beside it."""
    specimen = around(block(50.0, 60.0), ice, Absorption())
    source = tilted_slices(specimen, 0.0, (70, 70), 1.5, 6.0, voltage=300.0, dtype=torch.float64)
    depth = absorbed_depth(source, Optics())
    medium = 90.0 if ice else 0.0
    within, beside = depth[27:43, 27:43].mean(), depth[:6].mean()
    displaced = round(60.0 / 16.44 ** (1 / 3)) * 16.44 ** (1 / 3)  # [Å]
    more = displaced * (1 / PROTEIN - (1 / ICE if ice else 0.0))
    assert float(beside) == pytest.approx(medium / ICE, rel=1e-3, abs=1e-5)
    assert float(within - beside) == pytest.approx(more, rel=0.02)
    passed = multislice(source, Optics()).abs().square()
    assert float(passed[27:43, 27:43].mean()) < float(passed[:6].mean())


def test_a_protein_absorbs_by_its_volume():
    """In all: its displaced volume over the difference of the mean free paths."""
    source = tilted_slices(
        around(ubiquitin(), Ice(60.0), Absorption()), 0.0, (64, 64), 1.2, 4.0, voltage=300.0, dtype=torch.float64
    )
    beyond = absorbed_depth(source, Optics()) - 60 / ICE
    volume = float(beyond.sum()) * 1.2**2 / (1 / PROTEIN - 1 / ICE)
    assert volume == pytest.approx(float(source.volumes[0].total().sum()) * 1.2**2, rel=1e-6)
    assert 5000 < volume < 12000


def test_absorption_leaves_the_real_part_alone():
    ice = structured(60.0)
    with_, without = (
        tilted_slices(around(ubiquitin(), ice, a), 20.0, (48, 48), 1.5, 6.0, voltage=300.0)
        for a in (Absorption(), None)
    )
    torch.testing.assert_close(summed(with_).real, summed(without))
    assert (summed(with_).imag > 0).all()


def test_absorption_asks_for_the_voltage():
    with pytest.raises(ValueError, match="expected the voltage"):
        tilted_slices(bare(Ice(100.0), Absorption()), 0.0, (20, 20), 2.0, 5.0)


def test_slices_thicker_than_the_specimen_are_refused():
    """A number of Å^2 or of nm in the wrong place must not make one slice of everything."""
    with pytest.raises(ValueError, match="slices of 150 Å are thicker than the specimen, 120 Å"):
        tilted_slices(bare(Ice(120.0)), 0.0, (20, 20), 2.0, 150.0)
    with pytest.raises(ValueError, match="thicker than the specimen, 100 Å"):
        tilted_slices(around(ubiquitin(), None), 0.0, (40, 40), 2.0, 100.5)


# precision ------------------------------------------------------------------------------------------------------------


def test_both_precisions_see_the_same_specimen(generator):
    ice = structured(60.0, relief=rough_relief(300.0, 3.0, 50.0, generator=generator))
    specimen = around(ubiquitin(), ice, Absorption())
    single, double = (
        tilted_slices(specimen, 35.0, (48, 45), 1.5, 6.0, voltage=300.0, dtype=d)
        for d in (torch.float32, torch.float64)
    )
    assert (single[3].dtype, double[3].dtype) == (torch.complex64, torch.complex128)
    for i in range(len(double)):
        torch.testing.assert_close(single[i].to(torch.complex128), double[i], rtol=1e-4, atol=2e-4)
