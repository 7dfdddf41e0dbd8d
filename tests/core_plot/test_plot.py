"""Pictures: the same data give the same bytes, odd sizes are drawn, and bad numbers are refused."""

import io
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from cryosim import plot
from cryosim.core.volume import Volume
from cryosim.microscope.optics import Optics


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlation(n=20, first=2):
    k = torch.arange(n, dtype=torch.float64) / (2 * n * 5.0)
    return SimpleNamespace(frequency=k, correlation=torch.exp(-((k * 25) ** 2)), reliable=torch.arange(n) >= first)


FIGURES = {
    "gallery": lambda: plot.tilt_gallery(
        noise(7, 33, 21), torch.linspace(-60, 60, 7), 4.0, doses=torch.arange(7) * 3.0
    ),
    "slices": lambda: plot.ortho_slices({"a": Volume(noise(9, 21, 33), 5.0), "b $x^$": Volume(noise(8, 20, 32), 5.0)}),
    "wedge": lambda: plot.power_spectrum(noise(9, 21, 33), 5.0, angles=torch.tensor([-60.0, 0.0, 54.0]), title="a"),
    "rings": lambda: plot.image_spectrum(noise(33, 21), 5.0, optics=Optics(300.0, 20000.0, 500.0)),
    "tiles": lambda: plot.image_spectrum(noise(700, 600), 5.0),
    "ctf": lambda: plot.ctf_curve(Optics(300.0, 20000.0), 2.0),
    "split": lambda: plot.measured_slices(
        Volume(noise(9, 21, 33), 5.0), Volume(noise(9, 21, 33, seed=1), 5.0), std=noise(9, 21, 33).abs(), slab=2
    ),
    "misfit": lambda: plot.misfit_curves(
        {"a": (torch.linspace(60, -60, 7), noise(7).abs()), "b": (torch.ones(1),) * 2}
    ),
    "steps": lambda: plot.convergence_curves({"a": (1.0, 0.1, 0.0), "b": ()}, {"a": (2.0, 1.1, 1.0), "b": (300.0,)}),
    "fsc": lambda: plot.fsc_curves({"a": correlation()}, whole={"a": correlation(), "b": correlation(first=1)}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_data_give_the_same_png(name):
    first, second = (plot.to_png(FIGURES[name]()) for _ in range(2))
    assert first == second
    image = Image.open(io.BytesIO(first))
    image.load()
    assert min(image.size) > 100
    assert not image.info.keys() & {"Software", "Creation Time", "date"}


@pytest.mark.parametrize("name", ["slices", "fsc"])
def test_the_reader_s_own_settings_do_not_matter(name):
    expected = plot.to_png(FIGURES[name]())
    with rc_context({"font.size": 30, "savefig.dpi": 40, "axes.facecolor": "red", "image.origin": "upper"}):
        assert plot.to_png(FIGURES[name]()) == expected


def test_pyplot_is_not_used():
    code = "import sys, cryosim.plot; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_row_0_of_an_image_lies_at_the_bottom_and_z_0_on_top():
    figure = plot.ortho_slices({"a": Volume(noise(8, 10, 12), 5.0)})
    xy, xz, yz = figure.axes
    assert xy.get_ylim()[0] < xy.get_ylim()[1]
    assert xz.get_ylim()[0] > xz.get_ylim()[1]
    assert yz.get_ylim()[0] > yz.get_ylim()[1]


def test_central_planes_hold_the_origin():
    values = torch.zeros(5, 6, 7)
    values[2, 3, 3] = 1.0
    xy, xz, yz = plot.central_planes(values)
    assert xy[3, 3] == xz[2, 3] == yz[2, 3] == 1.0
    assert plot.central_planes(values, 3)[0][3, 3] == pytest.approx(1 / 3)
    assert plot.central_planes(values, 99)[0].sum() == pytest.approx(1 / 5)


def test_the_gallery_runs_from_the_lowest_to_the_highest_angle():
    angles = torch.tensor([0.0, 30.0, -30.0, -60.0, 60.0])
    figure = plot.tilt_gallery(noise(5, 16, 16), angles, 4.0, n=3)
    assert [axis.get_title() for axis in figure.axes] == ["−60°", "0°", "+60°"]


def test_a_wave_shows_at_its_own_frequency():
    z, x = torch.arange(32.0)[:, None, None], torch.arange(64.0)
    wave = torch.cos(2 * torch.pi * (4 * z / 32 + 8 * x / 64)).expand(32, 20, 64)
    power = plot._central_plane_power(wave)
    centre = np.array([16, 32])
    at = np.array(np.unravel_index(power.argmax(), power.shape)) - centre
    assert tuple(np.abs(at)) == (4, 8)
    assert at[0] * at[1] > 0  # the sign of kz / kx is that of the wave
    assert np.allclose(power[1:, 1:], power[1:, 1:][::-1, ::-1])  # a real volume has an even spectrum


def test_white_noise_has_a_flat_spectrum():
    power = plot._tiled_power(noise(1024, 1024))
    _, rings = plot._ring_means(power, 1.0)
    assert rings[5:].std() / rings[5:].mean() < 0.05


def test_the_window_ignores_a_hot_pixel_and_is_never_empty():
    values = np.linspace(0, 1, 10_000)
    values[0] = 1e6
    assert plot.robust_window(values)[1] < 1.0
    low, high = plot.robust_window(np.full(10, 3.0))
    assert low < 3.0 < high


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    values = noise(8, 8, 8)
    values[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"volume 'a'.*1 of 512"):
        plot.ortho_slices({"a": Volume(values, 5.0)})
    with pytest.raises(ValueError, match="finite"):
        plot.power_spectrum(values, 5.0)
    with pytest.raises(ValueError, match="finite"):
        plot.tilt_gallery(values, torch.arange(8.0), 5.0)
    with pytest.raises(ValueError, match="finite"):
        plot.image_spectrum(values[1], 5.0)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(z, y, x\)"):
        plot.ortho_slices({"a": Volume(noise(2, 8, 8, 8), 5.0)})
    with pytest.raises(ValueError, match="one angle"):
        plot.tilt_gallery(noise(3, 8, 8), torch.arange(4.0), 5.0)
    with pytest.raises(ValueError, match="one image"):
        plot.ctf_curve(Optics(300.0, torch.tensor([1e4, 2e4])), 5.0)
    for draw in (plot.ortho_slices, plot.fsc_curves):
        with pytest.raises(ValueError, match="at least one"):
            draw({})


def test_constant_data_are_drawn():
    constant = torch.ones(8, 8, 8)
    plot.to_png(plot.ortho_slices({"a": Volume(constant, 5.0)}))
    plot.to_png(plot.power_spectrum(constant, 5.0))
    plot.to_png(plot.image_spectrum(constant[0], 5.0))


def test_labels_of_angles():
    assert [plot.signed_degrees(a) for a in (-60.0, 0.0, 2.5, -0.04)] == ["−60°", "0°", "+2.5°", "0°"]


def test_measured_and_rest_sum_up_in_one_range_of_grey_and_the_deviation_starts_at_0():
    whole, part, std = noise(8, 20, 31), noise(8, 20, 31, seed=1), torch.full((8, 1, 1), 0.25).expand(8, 20, 31)
    figure = plot.measured_slices(Volume(whole, 5.0), Volume(part, 5.0), std=std, slab=3)
    grid = np.array(figure.axes[:8]).reshape(2, 4)  # the bars come after
    shown = [[axis.images[0].get_array() for axis in row] for row in grid]
    for row, plane in zip(shown, plot.central_planes(whole, 3)[:2], strict=True):
        np.testing.assert_allclose(row[0], plane, atol=1e-6)
        np.testing.assert_allclose(row[1] + row[2], row[0], atol=1e-6)
    assert len({axis.images[0].get_clim() for axis in grid[:, :3].ravel()}) == 1
    assert {axis.images[0].get_clim() for axis in grid[:, 3]} == {(0.0, 0.25)}
    assert {float(v) for row in shown for v in np.ravel(row[3])} == {0.25}
    assert grid[0, 0].get_ylim()[0] < grid[0, 0].get_ylim()[1]  # y upwards, z along the beam
    assert grid[1, 3].get_ylim()[0] > grid[1, 3].get_ylim()[1]
    assert [axis.get_xlabel() for axis in figure.axes[8:]] == ["potential [V]", "standard deviation [V]"]
    without = plot.measured_slices(Volume(whole, 5.0), Volume(part, 5.0))
    assert len(without.axes) == 6 + 1


def test_misfits_are_sorted_by_angle_about_a_line_at_1():
    figure = plot.misfit_curves({"a": (torch.tensor([30.0, -60.0, 0.0]), torch.tensor([1.5, 0.5, 1.0]))})
    curve, line = figure.axes[0].lines
    assert curve.get_xdata().tolist() == [-60.0, 0.0, 30.0] and curve.get_ydata().tolist() == [0.5, 1.0, 1.5]
    assert list(line.get_ydata()) == [1.0, 1.0]
    assert figure.axes[0].get_yscale() == "linear"
    assert plot.misfit_curves({"a": (torch.zeros(2), torch.tensor([0.05, 40.0]))}).axes[0].get_yscale() == "log"


def test_a_method_has_one_colour_whether_it_iterates_or_not():
    by_tilt = plot.misfit_curves({name: (torch.zeros(1), torch.ones(1)) for name in "ab"})
    steps = plot.convergence_curves({"a": (), "b": (1.0, 0.1)}, {"a": (), "b": ()})
    assert len(steps.axes) == 1  # no misfits, no panel
    assert steps.axes[0].lines[0].get_color() == by_tilt.axes[0].lines[1].get_color()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.measured_slices(Volume(noise(4, 5, 6), 5.0), Volume(noise(4, 5, 7), 5.0)), "measured: expected"),
        (lambda: plot.misfit_curves({}), "at least one curve"),
        (lambda: plot.misfit_curves({"a": (torch.zeros(2), torch.ones(3))}), "'a': expected as many"),
        (lambda: plot.misfit_curves({"a": (torch.zeros(1), torch.tensor([float("nan")]))}), "'a': expected as many"),
        (lambda: plot.convergence_curves({"a": ()}, {}), "at least one iteration"),
    ],
)
def test_pictures_of_nothing_or_of_what_does_not_fit_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_rare_colours_survive_the_palette():
    """A strip of a colour map beside much grey noise: a palette by the median is some 60 of 255 off."""
    png = np.asarray(Image.open(io.BytesIO(plot.to_png(FIGURES["split"]()))).convert("RGB")).astype(int)
    canvas = FigureCanvasAgg(FIGURES["split"]())
    with rc_context(plot._STYLE):
        canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    assert np.abs(png - drawn).max() <= 16
