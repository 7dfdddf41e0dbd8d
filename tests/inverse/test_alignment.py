"""Alignment of simulated series, of which the truth is known, and the likelihood it climbs."""

from __future__ import annotations

import math

import pytest
import torch

import cryosim as cs
import inverse as inv
from cryosim.core.fourier import shifted
from cryosim.microscope.optics import Optics, ctf
from inverse.calibration.alignment import _shortest
from inverse.calibration.climb import Data, transfer_of
from inverse.calibration.local_alignment import displacement, straightened
from inverse.calibration.tilt_likelihood import Field, Geometry, Model, Spectra, field_of, spectra_of
from inverse.physics.deformed import free_shifts, spline_basis
from inverse.physics.turn import turned_planes

ANGLES = torch.arange(-60.0, 61.0, 3.0)


def crowd(shape: tuple[int, int, int], filled: int, generator: torch.Generator) -> torch.Tensor:
    """Blobs of several sizes (z, y, x) in the middle `filled` layers, as wide as the box."""
    volume = torch.zeros(shape)
    z = torch.arange(-6, 7)
    for _ in range(filled * shape[1] * shape[2] // 900):
        size = 1.2 + 1.8 * float(torch.rand((), generator=generator))
        middle = torch.rand(3, generator=generator) * torch.tensor([filled, *shape[1:]], dtype=torch.float32)
        at, rest = middle.long(), middle - middle.floor()
        parts = [torch.exp(-((z - r) ** 2) / (2 * size**2)) for r in rest]
        places = [(z + a + off) % n for a, off, n in zip(at, ((shape[0] - filled) // 2, 0, 0), shape, strict=True)]
        blob = parts[0][:, None, None] * parts[1][:, None] * parts[2]
        volume[places[0][:, None, None], places[1][:, None], places[2]] += blob
    return volume


class Taken:
    """A series of images (tilt, y, x) cut from a wider field, displaced and turned, with noise."""

    def __init__(
        self, n: int, filled: int, snr: float, seed: int, axis: float = 0.0, lens: Optics | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        side = n + 24
        volume = crowd((filled + 8, side, 2 * side), filled, generator)
        images = (
            inv.TiltProjection(ANGLES, (filled + 8, side, 2 * side), (side, side)).A(volume[None, None])[0, 0].double()
        )
        if lens is not None:
            images = torch.fft.ifft2(torch.fft.fft2(images) * ctf(lens, (side, side), 5.0)).real
        self.shifts = (2 * torch.rand(len(ANGLES), 2, generator=generator, dtype=torch.float64) - 1) * 6
        if axis:
            images = turned_planes(images, torch.tensor(-axis, dtype=torch.float64), side, side)
        images = shifted(images, self.shifts)[:, 12:-12, 12:-12]
        noise = float(images.var(dim=(1, 2)).mean()) / snr
        drawn = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        self.images = images + noise**0.5 * drawn

    def off(self, shifts: torch.Tensor, axis: float = 0.0) -> torch.Tensor:
        """Errors of shifts (tilt, 2), less what a displaced specimen makes, along and across the axis."""
        a = math.radians(axis)
        turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
        free, errors = free_shifts(ANGLES.double()), ((shifts - self.shifts) @ turn).T.flatten()
        return (free @ (free.T @ errors)).reshape(2, -1).T


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


# the likelihood ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen() -> tuple[Field, Spectra, Geometry]:
    """Amplitudes of a small series, odd in y, aligned."""
    taken = Taken(60, 20, 0.5, 3)
    images = taken.images[:, :59] - taken.images.mean((1, 2), keepdim=True)
    geometry = Geometry(taken.shifts, ANGLES.double(), 0.0, 18.0)
    field = field_of(images, geometry, 0.3)
    return field, spectra_of(field, geometry.angles, None), geometry


def slope_of(values: list[float], step: float) -> float:
    return (values[0] - values[1]) / (2 * step)


def test_scores_are_slopes_of_the_log_likelihood(seen):
    field, spectra, geometry = seen
    model = Model(field, spectra, geometry)
    scores = model.shift_score(field.seen)
    for i, axis in ((5, 0), (30, 1)):
        move = torch.zeros(len(ANGLES), 2, dtype=torch.float64)
        move[i, axis] = 1e-4
        found = [model.log_likelihood(model.moved(sign * move)) for sign in (1, -1)]
        assert float(scores[axis * len(ANGLES) + i]) == pytest.approx(slope_of(found, 1e-4), rel=1e-4)
    off = geometry._replace(thickness=26.0)  # far from the maximum, where the slope is large
    model = Model(field, spectra, off)
    around = [off._replace(thickness=26.0 * math.exp(h)) for h in (1e-3, -1e-3)]
    found = [Model(field, spectra, one).log_likelihood(field.seen) for one in around]
    assert model.thickness_score(field.seen)[0] == pytest.approx(slope_of(found, 1e-3), rel=0.02)


def test_scores_have_the_variance_that_the_information_says(seen):
    """Over amplitudes drawn from the model itself."""
    field, spectra, geometry = seen
    model = Model(field, spectra, geometry)
    factor = torch.linalg.cholesky(model.covariance(slice(0, None)))
    generator = torch.Generator().manual_seed(1)
    shift, angle, thickness = [], [], []
    for _ in range(60):
        white = torch.randn(*field.seen.shape, 2, generator=generator, dtype=torch.float64) / 2**0.5
        x = torch.view_as_complex((factor @ white).contiguous())
        shift.append(model.shift_score(x))
        angle.append(model.angle_score(x)[0])
        thickness.append(model.thickness_score(x)[0])
    # a field counts `share` of its frequencies: slopes of all of them scatter by its square, information by itself
    for drawn, information in (
        (torch.stack(shift), model.shift_information().diagonal()),
        (torch.stack(angle), model.angle_score(field.seen)[1].diagonal()),
        (torch.tensor(thickness)[:, None], torch.tensor([model.thickness_score(field.seen)[1]])),
    ):
        ratio = float((drawn.square().mean(0) / (information * field.share)).mean())
        assert 0.6 < ratio < 1.5 if len(information) == 1 else 0.85 < ratio < 1.15


def test_without_edges_the_kernel_is_a_sinc(seen):
    field, spectra, geometry = seen
    plain = field._replace(window=torch.ones(4000, dtype=torch.float64))
    thin = geometry._replace(thickness=4.0)
    model = Model(plain, spectra, thin)
    kx = torch.arange(int(field.column.max()) + 1, dtype=torch.float64)[:, None, None] / 4000
    torch.testing.assert_close(model.kernel, torch.sinc(kx * model.apart), atol=5e-3, rtol=0)


def test_a_displaced_specimen_changes_nothing_that_is_fitted():
    free, t = free_shifts(ANGLES.double()), torch.deg2rad(ANGLES.double())
    assert free.shape == (2 * len(ANGLES), 2 * len(ANGLES) - 3)
    moved = torch.cat([3 * torch.cos(t) + 2 * torch.sin(t), torch.full_like(t, -1.5)])
    assert float((free.T @ moved).abs().max()) < 1e-10


# alignments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("snr", "most"), [(0.5, 0.15), (0.1, 0.2)])
def test_shifts_are_found_to_a_fraction_of_a_pixel(snr, most):
    taken = Taken(128, 30, snr, 0)
    found = inv.align(taken.images, ANGLES, 5.0, fit=("shifts", "thickness"))
    errors = taken.off(found.shifts / 5.0)
    assert rms(errors) < most
    assert 1 / 1.5 < rms(errors / (found.standard_errors["shifts"] / 5.0)) < 1.5
    assert found.thickness == pytest.approx(150.0, rel=0.15)
    assert found.gained > 1000


def test_an_image_of_something_else_is_named():
    taken = Taken(96, 20, 0.5, 4)
    images, generator = taken.images.clone(), torch.Generator().manual_seed(2)
    images[7] = images[7].std() * torch.randn(96, 96, generator=generator, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"-39.0.* little in common"):
        inv.align(images, ANGLES, 5.0, fit=("shifts", "thickness"))


@pytest.mark.slow
def test_the_axis_is_found():
    taken = Taken(192, 30, 0.5, 2, axis=3.0)
    found = inv.align(taken.images, ANGLES, 5.0)
    assert abs(found.axis_angle - 3.0) < 3 * float(found.standard_errors["axis_angle"]) < 0.5
    assert rms(taken.off(found.shifts / 5.0, 3.0)) < 0.15


def test_a_series_through_a_lens():
    """The sign of the lens changes with the frequency, and with it the sign by which tilts agree."""
    lens = Optics(300.0, defocus=40_000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
    taken = Taken(96, 20, 0.5, 4, lens=lens)
    tilts = cs.TiltScheme(angles=ANGLES, doses=torch.full_like(ANGLES, 3.0))
    series = cs.TiltSeries(images=taken.images.float(), pixel_size=5.0, tilts=tilts, optics=lens)
    each = lens.replace(defocus=torch.full((len(ANGLES),), 40_000.0))  # as `fit_series_ctf` gives it
    of_each = inv.align(series.replace(optics=each), fit=("shifts", "thickness"), thickness=100.0)
    seen = inv.align(series, fit=("shifts", "thickness"), thickness=100.0)
    assert rms(taken.off(seen.shifts / 5.0)) < 0.25
    torch.testing.assert_close(of_each.shifts, seen.shifts, atol=1e-3, rtol=0)


def test_the_lens_does_not_turn_with_the_frame(seen):
    """Astigmatism along the image's x lies along -y of a frame that is turned by 90 degrees."""
    field, _, geometry = seen
    astigmatic = Optics(300.0, defocus=30_000.0, astigmatism=9_000.0, astigmatism_angle=10.0)
    data = Data(field.seen, geometry.angles, astigmatic, 8.0, ())
    turned = data._replace(optics=astigmatic.replace(astigmatism_angle=-80.0))
    torch.testing.assert_close(transfer_of(data, field, 90.0), transfer_of(turned, field, 0.0), atol=1e-9, rtol=0)
    assert rms(transfer_of(data, field, 90.0) - transfer_of(data, field, 0.0)) > 0.1


def test_images_that_are_aligned_stay_so_in_any_unit_and_bin(generator):
    taken = Taken(64, 14, 1.0, 6)
    straight = shifted(taken.images, -taken.shifts)
    for images in (straight.float(), 40 * straight + 3, straight.repeat_interleave(2, 1).repeat_interleave(2, 2)):
        size = 5.0 * 64 / images.shape[1]
        found = inv.align(images, ANGLES.tolist(), size, bin=images.shape[1] // 64, fit=("shifts",), thickness=70.0)
        errors = found.shifts / 5.0
        free = free_shifts(ANGLES.double())
        assert rms(free.T @ errors.T.flatten()) < 0.3


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (torch.rand(41, 20, 64), {}, "32 or more pixels"),
        (torch.rand(40, 64, 64), {}, "as many angles"),
        (torch.ones(41, 64, 64), {}, "constant"),
        (torch.full((41, 64, 64), torch.nan), {}, "not finite"),
        (torch.rand(41, 64, 64), {"fit": ("axis_angle",)}, 'fit with "shifts"'),
        (torch.rand(41, 64, 64), {"angles": None}, "expected angles"),
        (torch.rand(41, 64, 64), {"pixel_size": -1.0}, "positive pixel_size"),
    ],
)
def test_what_is_refused(images, changes, message):
    with pytest.raises(ValueError, match=message):
        inv.align(images, **({"angles": ANGLES, "pixel_size": 5.0} | changes))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("snr", [0.1, 0.03])
def test_behind_a_lens_that_hides_the_low_frequencies_tilts_are_placed_one_by_one(known, snr):
    """4 µm of defocus pass little that is coarser than 150 Å; there, where shifts of 6 px would not matter, is nothing
    to begin with."""
    lens = Optics(300.0, defocus=40_000.0, spherical_aberration=2.7, amplitude_contrast=0.07)
    taken = Taken(128, 32, snr, 1, lens=lens)
    found = inv.align(taken.images, ANGLES, 5.0, fit=("shifts", "thickness"), optics=lens if known else None)
    errors = taken.off(found.shifts / 5)
    assert rms(errors) < (0.2 if snr == 0.1 else 0.3)
    assert 1 / 1.5 < rms(errors / (found.standard_errors["shifts"] / 5)) < 1.5


# deformation ---------------------------------------------------------------------------------------------------------


class Bending:
    """A series of a specimen that bends in each tilt by `size` [px] rms at its control points, by another operator."""

    def __init__(self, n: int, filled: int, snr: float, size: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.side, depth = n + 16, filled + 6
        shape = (depth, self.side, 2 * self.side)
        self.volume = volume = crowd(shape, filled, generator)
        control = torch.randn(len(ANGLES), 3, 1, 4, 7, generator=generator, dtype=torch.float64) * size
        self.control = control.expand(-1, -1, 2, -1, -1)
        lens = Optics(300.0, defocus=100.0, spherical_aberration=0.0, amplitude_contrast=1.0)
        physics = inv.DeformedProjection(
            ANGLES, shape, 5.0, lens, (self.side, self.side), deformation=5.0 * self.control
        )
        images = physics.A(volume[None, None])[0, 0].double()
        self.shifts = 4 * torch.rand(len(ANGLES), 2, generator=generator, dtype=torch.float64) - 2
        images = shifted(images, self.shifts)[:, 8:-8, 8:-8]
        drawn = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        self.images = images + (float(images.var(dim=(1, 2)).mean()) / snr) ** 0.5 * drawn
        line = torch.linspace(-0.36 * n, 0.36 * n, 7, dtype=torch.float64)
        self.y, self.x = (v.flatten() for v in torch.meshgrid(line, line, indexing="ij"))

    @staticmethod
    def seen(found: inv.Alignment) -> torch.Tensor | None:
        """Displacements (tilt, 2, y, x) [px] across and along the axis at the control points."""
        if found.deformation is None:
            return None
        t = torch.deg2rad(ANGLES.double())[:, None, None]
        across = found.deformation[:, 0, 0] * torch.cos(t) + found.deformation[:, 2, 0] * torch.sin(t)
        return torch.stack([across, found.deformation[:, 1, 0]], 1) / 5

    def off(self, shifts: torch.Tensor, field: torch.Tensor | None, shape: tuple[int, int]) -> float:
        """Error [px] rms of where things are seen, less what a displaced specimen makes of each place."""
        y, x = (self.y + self.side // 2) / (self.side - 1), (self.x + self.side) / (2 * self.side - 1)
        moved = torch.einsum("pa,pb,tcab->tcp", spline_basis(3 * y, 4), spline_basis(6 * x, 7), self.control[:, :, 0])
        t = torch.deg2rad(ANGLES.double())[:, None]
        true = torch.stack([moved[:, 0] * torch.cos(t) + moved[:, 2] * torch.sin(t), moved[:, 1]], 1)
        error = shifts[:, :, None] - self.shifts[:, :, None] - true
        if field is not None:
            error = error + torch.stack([displacement(one, self.x, self.y, shape) for one in field])
        free = free_shifts(ANGLES.double())
        return rms(free.T @ error.permute(1, 0, 2).flatten(0, 1)) * (free.shape[1] / len(free)) ** 0.5


@pytest.mark.slow
def test_a_smooth_deformation_is_found_and_most_of_it_is_gone():
    bending = Bending(192, 32, 0.5, 5.0, 4)
    plain = inv.align(bending.images, ANGLES, 5.0, fit=("shifts", "thickness"))
    found = inv.align(bending.images, ANGLES, 5.0, fit=("shifts", "thickness", "deformation"))
    assert found.deformation is not None and found.deformation.shape[:3] == (len(ANGLES), 3, 2)
    before = bending.off(plain.shifts / 5, None, (192, 192))
    after = bending.off(found.shifts / 5, bending.seen(found), (192, 192))
    inner = rms(found.standard_errors["deformation"][:, :, 1:3, 1:3]) / 5
    assert before > 1.5 and after < before / 4
    assert 1 / 2 < after / inner < 2
    assert found.gained > plain.gained + 1000


def test_images_are_straightened_by_what_bent_them(generator):
    """Smooth images, bent here by their formula, are those that were not bent; and so is the axis of each vector."""
    y, x = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (70, 81))
    control = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64)
    geometry = Geometry(torch.tensor([[3.0, -2.0], [0.5, 1.0]]).double(), torch.tensor([0.0, 40.0]).double(), 25.0, 9.0)

    def scene(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.exp(-((u - 4) ** 2 + (v + 6) ** 2) / 90) * (1 + torch.cos(0.4 * u - 0.3 * v))

    a = math.radians(25.0)
    flat, bent_ones = [], []
    for shift, angle, points in zip(geometry.shifts, geometry.angles, control, strict=True):
        place = torch.stack(torch.broadcast_tensors(x - shift[0], (y - shift[1])[:, None]), -1)
        u = place[..., 0] * math.cos(a) + place[..., 1] * math.sin(a)
        v = place[..., 1] * math.cos(a) - place[..., 0] * math.sin(a)
        flat.append(scene(u, v))
        seen_u, seen_v = u.clone(), v.clone()
        for _ in range(30):  # what is seen at (u, v) stood at w with w + e(w) = (u, v)
            e = displacement(points, seen_u / torch.cos(torch.deg2rad(angle)), seen_v, (70, 81))
            seen_u, seen_v = u - e[0], v - e[1]
        bent_ones.append(scene(seen_u, seen_v))
    made = straightened(torch.stack(bent_ones), geometry, control)
    error = (made - torch.stack(flat))[:, 12:-12, 12:-12]
    assert float((torch.stack(bent_ones) - torch.stack(flat)).abs().max()) > 0.15
    assert float(error.abs().max()) < 2e-3


def test_a_place_is_displaced_as_the_operator_of_deformed_specimens_has_it(generator):
    control = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    deformation = _shortest(control, torch.tensor([35.0]))
    lens = Optics(300.0, defocus=100.0, spherical_aberration=0.0, amplitude_contrast=1.0)
    still, moved = (
        inv.DeformedProjection([35.0], (5, 20, 21), 1.0, lens, deformation=d).places(0, 0)
        for d in (torch.zeros_like(deformation), deformation)
    )
    shown = (moved - still).reshape(5, 20, 21, 2)[2].flip(-1).permute(2, 0, 1)  # (across, along) of the middle layer
    y, x = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (20, 21))
    expected = displacement(control[0], x.expand(20, 21), y[:, None].expand(20, 21), (20, 21))
    torch.testing.assert_close(shown.double(), expected, rtol=0, atol=1e-5)


def test_a_deformation_takes_images_that_hold_windows():
    with pytest.raises(ValueError, match="75 pixels or more for a deformation"):
        inv.align(Taken(48, 10, 1.0, 1).images, ANGLES, 5.0, fit=("shifts", "deformation"))
