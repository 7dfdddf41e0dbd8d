"""Pictures of tilt series, volumes, spectra and correlations: functions of data that return a matplotlib Figure.

The only file that imports matplotlib. Figures are made through the object API, so nothing here opens a window, keeps a
list of open figures or reads the user's own matplotlib settings: the same data give the same picture.

How things lie on the page, everywhere: x to the right; y upwards (row 0 of an image at the bottom, as IMOD shows it);
z downwards, along the beam, in sections that hold z. Spectra lie as the planes they belong to.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, Protocol

import numpy as np
import torch
from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.ndimage import gaussian_filter

from cryosim.core.fourier import cosine_edges
from cryosim.core.volume import Volume
from cryosim.microscope.optics import Optics, ctf

P = ParamSpec("P")

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that people with any of the usual colour vision deficiencies can tell apart: Okabe & Ito 2008."""

_MARKERS = "os^Dv<>"
_ORANGE = "#E69F00"
_SKY = "#56B4E9"
_INK, _MUTED = "#222222", "#6b6b6b"
_OUTLINE = (withStroke(linewidth=2.6, foreground="#000000a0"),)
_STYLE: Any = {k: v for k, v in rcParamsDefault.items() if k != "backend"} | {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same letters
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.0,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": _INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "figure.dpi": 150.0,
    "image.cmap": "gray",
    "image.origin": "lower",
}
_BAR_LENGTHS = [base * 10**power for power in range(-1, 5) for base in (1, 2, 5)]  # [nm]
_STEPS = (1, 2, 5, 10)  # between ticks
_PANEL = 384  # [px] of the widest plane in `ortho_slices` and `measured_slices`
_RINGS = (100.0, 50.0, 20.0, 10.0, 5.0, 2.0)  # [Å]


class Correlation(Protocol):
    """What `fsc_curves` needs of a shell correlation: tensors (shell,) of these names."""

    @property
    def frequency(self) -> torch.Tensor:
        """[1/Å]."""
        ...

    @property
    def correlation(self) -> torch.Tensor:
        """[1]."""
        ...

    @property
    def reliable(self) -> torch.Tensor:
        """False where the correlation says nothing."""
        ...


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapped


@_styled
def tilt_gallery(
    images: torch.Tensor,
    angles: torch.Tensor,
    pixel_size: float,
    *,
    doses: torch.Tensor | None = None,
    n: int = 5,
) -> Figure:
    """Some images of a tilt series, evenly spaced from the lowest to the highest angle.

    Parameters
    ----------
    images : tensor (tilt, y, x)
        In any unit and any order; each is shown in its own range of grey.
    angles : tensor (tilt,)
        [deg].
    pixel_size : float
        [Å].
    doses : tensor (tilt,), optional
        Accumulated before each exposure [e-/Å^2].
    n : int
        How many images at most.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When images and angles disagree, or a value is not finite.
    """
    expect_finite(images, 3, "tilt_gallery: images")
    if len(angles) != len(images):
        raise ValueError(f"tilt_gallery: expected one angle for each of {len(images)} images, got {len(angles)}.")
    order = torch.argsort(angles.detach().cpu(), stable=True).tolist()
    chosen = [order[i] for i in _evenly(len(order), n)]
    height, width = images.shape[1:]
    panel = 10.0 / max(len(chosen), 3)  # [inch]
    figure = Figure((panel * len(chosen), panel * height / width + 0.5), layout="constrained")
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    for k, (axis, i) in enumerate(zip(axes, chosen, strict=True)):
        shown = visible(images[i])
        _picture(axis, shown, robust_window(shown), width * float(pixel_size) / shown.shape[1])
        title = signed_degrees(float(angles[i]))
        axis.set_title(title if doses is None else f"{title}\nafter {float(doses[i]):.0f} e⁻/Å²")
        if k == 0:
            _scale_bar(axis, width * float(pixel_size))
    return figure


@_styled
def ortho_slices(volumes: Mapping[str, Volume], *, slab: int = 1) -> Figure:
    """Central xy, xz and yz planes of volumes, a row each, all on one scale.

    Parameters
    ----------
    volumes : mapping of str to Volume
        Values (z, y, x) of each; each row has its own range of grey.
    slab : int
        Voxels that are averaged across a plane.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When there is no volume, or one is not (z, y, x), not real or not finite.
    """
    if not volumes or slab < 1:
        raise ValueError(f"ortho_slices: expected at least one volume and slab >= 1, got {len(volumes)} and {slab}.")
    for name, volume in volumes.items():
        expect_finite(volume.values, 3, f"ortho_slices: volume {name!r}")
    sizes = [[n * float(volume.voxel_size) for n in volume.values.shape] for volume in volumes.values()]
    depth, height, width = (max(size) for size in zip(*sizes, strict=True))  # [Å]
    scale = 9.6 / (2 * width + height)  # [inch/Å]
    row = max(height, depth) * scale + 0.45
    figure = Figure((10.0, row * len(volumes) + 0.1), dpi=120, layout="constrained")
    grid = figure.subplots(len(volumes), 3, squeeze=False, width_ratios=(width, width, height))
    for axes, (name, volume) in zip(grid, volumes.items(), strict=True):
        factor = _bin_factor(volume.values.shape, _PANEL)
        planes = [_averaged(torch.from_numpy(plane), factor) for plane in central_planes(volume.values, slab)]
        window = robust_window(np.concatenate([plane.ravel() for plane in planes]))
        fields = ((width, height), (width, depth), (height, depth))
        axes[0].set_title(name, loc="left", fontweight="bold")
        for axis, plane, letters, field in zip(axes, planes, ("xy", "xz", "yz"), fields, strict=True):
            _picture(axis, plane, window, factor * float(volume.voxel_size), down=letters[1] == "z", field=field)
            axis.set_anchor("N")
            axis.set_xlabel(letters[0], labelpad=2)
            axis.set_ylabel(letters[1], rotation=0, labelpad=7, va="center")
        _scale_bar(axes[0], width)
        _beam_arrow(axes[1])
    return figure


@_styled
def power_spectrum(
    values: torch.Tensor, voxel_size: float, *, angles: torch.Tensor | None = None, title: str = ""
) -> Figure:
    """Central kz-kx plane of the power spectrum of a volume, on a logarithmic scale of grey.

    The volume loses its mean and is tapered at its faces, so that they do not draw a cross. The five planes nearest to
    ky = 0 are averaged: the wedge is the same in all of them.

    Parameters
    ----------
    values : tensor (z, y, x)
    voxel_size : float
        [Å].
    angles : tensor (tilt,), optional
        [deg]; the lines kz = kx tan(angle) of the lowest and the highest are drawn.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When the values are not (z, y, x), not real or not finite.
    """
    expect_finite(values, 3, "power_spectrum: values")
    shown = np.log10(_central_plane_power(values))
    nyquist = 0.5 / voxel_size
    figure = Figure((3.9, 3.9), layout="constrained")
    axis = figure.subplots()
    _spectrum(axis, shown, voxel_size, down=True)
    if angles is not None and len(angles):
        for angle in sorted({float(angles.min()), float(angles.max())}):
            slope = math.tan(math.radians(angle))
            reach = nyquist / max(1.0, abs(slope))
            axis.plot((-reach, reach), (-reach * slope, reach * slope), color=_SKY, lw=1.6, path_effects=_OUTLINE)
    axis.set_xlabel("kx [1/Å]")
    axis.set_ylabel("kz [1/Å]")
    axis.set_title(title, loc="left", fontweight="bold")
    return figure


@_styled
def image_spectrum(image: torch.Tensor, pixel_size: float, *, optics: Optics | None = None) -> Figure:
    """Power spectrum of an image and, beside it, its mean on rings against the squared CTF.

    Images wider than 512 px are cut into half-overlapping tiles whose spectra are averaged (Welch 1967).

    Parameters
    ----------
    image : tensor (y, x)
    pixel_size : float
        [Å].
    optics : Optics, optional
        Fields (); the curve is that of the mean defocus.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When the image is not (y, x), not real or not finite.
    """
    expect_finite(image, 2, "image_spectrum: image")
    power, pixels = _tiled_power(image), float(pixel_size)
    frequency, rings = _ring_means(power, pixels)
    noise = np.median(rings[3 * len(rings) // 4 :])
    figure = Figure((10.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    _spectrum(left, gaussian_filter(np.log10(power), 0.7), pixels)
    left.set_xlabel("kx [1/Å]")
    left.set_ylabel("ky [1/Å]")
    right.plot(frequency[1:], rings[1:] / (noise or 1.0), color=OKABE_ITO[0], lw=1.5, label="image, mean on rings")
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.set_ylabel("power / median of the last quarter")
    _frequency_axes(right, float(frequency[-1]))
    if optics is not None:
        _squared_ctf(right, optics, pixels)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


@_styled
def ctf_curve(optics: Optics, pixel_size: float) -> Figure:
    """Contrast transfer function of the mean defocus up to the Nyquist frequency.

    Parameters
    ----------
    optics : Optics
        Fields ().
    pixel_size : float
        [Å].

    Returns
    -------
    Figure
    """
    frequency, transfer = _radial_ctf(optics, float(pixel_size))
    figure = Figure((6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color=_MUTED, lw=0.8)
    axis.plot(frequency, transfer, color=OKABE_ITO[0], lw=1.2)
    axis.set_ylim(-1.05, 1.05)
    axis.set_ylabel("CTF")
    _frequency_axes(axis, float(frequency[-1]))
    return figure


@_styled
def fsc_curves(
    measured: Mapping[str, Correlation],
    *,
    whole: Mapping[str, Correlation] | None = None,
    thickness: float | None = None,
) -> Figure:
    """Fourier shell correlations with the thresholds 0.143 and 0.5.

    Parameters
    ----------
    measured : mapping of str to ShellCorrelation
        Of the measured region alone, without the wedge: solid lines.
    whole : mapping of str to ShellCorrelation, optional
        Of all of Fourier space: dashed lines, in the colour of the same name.
    thickness : float, optional
        Of the slab [Å], named at the grey band of the shells that are not reliable.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When there is no curve at all.
    """
    whole = whole or {}
    names = list(dict.fromkeys([*measured, *whole]))
    if not names:
        raise ValueError("fsc_curves: expected at least one curve, got none.")
    figure = Figure((7.0, 4.4), layout="constrained")
    axis = figure.subplots()
    lowest, last = 0.0, 0.0
    for i, name in enumerate(names):
        colour, marker = OKABE_ITO[i % len(OKABE_ITO)], _MARKERS[i % len(_MARKERS)]
        for curves, line in ((measured, "-"), (whole, "--")):
            if name not in curves:
                continue
            frequency, correlation, reliable = _shells(curves[name])
            label = name if curves is measured else f"{name}, with the wedge"
            _reliable_line(axis, frequency, correlation, reliable, color=colour, ls=line, marker=marker, label=label)
            lowest = min(lowest, float(np.nanmin(correlation, initial=0.0)))
            last = max(last, float(frequency[-1]))
    edge = max(_unreliable_edge(curve) for curve in (*measured.values(), *whole.values()))
    if edge > 0:
        axis.axvspan(0, edge, color="#e4e4e4", lw=0, zorder=0)
        label = "below 1 / thickness" if thickness is None else f"below 1 / {thickness / 10:.0f} nm"
        axis.text(edge / 2, 0.03, label, rotation=90, ha="center", va="bottom", fontsize=7.5, color=_MUTED)
    for threshold in (0.143, 0.5):
        axis.axhline(threshold, color=_INK, lw=0.8, ls=":")
        axis.text(last, threshold + 0.012, f"{threshold:g}", ha="right", va="bottom", fontsize=8.5)
    axis.axhline(0, color=_MUTED, lw=0.6)
    axis.set_ylim(max(-1.0, lowest - 0.03), 1.03)
    axis.set_ylabel("Fourier shell correlation")
    _frequency_axes(axis, last)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


@_styled
def measured_slices(volume: Volume, measured: Volume, *, std: torch.Tensor | None = None, slab: int = 1) -> Figure:
    """Central xy and xz planes of a volume, of the part that was measured, of the rest, and of the standard deviation.

    Parameters
    ----------
    volume : Volume
        Values (z, y, x) [V].
    measured : Volume
        The part of it that images determine, of the same shape; the rest is what the two differ by. All three share one
        range of grey.
    std : tensor (z, y, x), optional
        Of the voxels of the volume [V]; shown from 0 upwards in a scale of its own, and without averaging across the
        plane, as it is that of single voxels. One column less when left out.
    slab : int
        Voxels that the first three are averaged over across a plane.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When the shapes differ, slab is less than 1, or a value is not real or not finite.
    """
    given = {"volume": volume.values, "measured": measured.values} | ({} if std is None else {"std": std})
    for name, values in given.items():
        expect_finite(values, 3, f"measured_slices: {name}")
        if values.shape != volume.values.shape:
            raise ValueError(
                f"measured_slices: {name}: expected the shape {tuple(volume.values.shape)} of the volume, got "
                f"{tuple(values.shape)}. Give what belongs to this volume."
            )
    if slab < 1:
        raise ValueError(f"measured_slices: expected slab >= 1, got {slab}.")
    voxel = float(volume.voxel_size)
    depth, height, width = (n * voxel for n in volume.values.shape)  # [Å]
    factor = _bin_factor(volume.values.shape, _PANEL)
    whole, kept = (_sections(values, slab, factor) for values in (volume.values, measured.values))
    columns = {
        "volume": whole,
        "measured": kept,
        "the rest: the method’s own": [a - b for a, b in zip(whole, kept, strict=True)],
    }
    window = robust_window(np.concatenate([plane.ravel() for plane in whole]))
    n = len(given) + 1
    panel = 2.45  # [inch]
    figure = Figure((panel * n, panel * (height + depth) / width + 0.9), dpi=120, layout="constrained")
    grid = figure.subplots(2, n, squeeze=False, height_ratios=(height, depth))
    shown = [(title, planes, window, "gray") for title, planes in columns.items()]
    if std is not None:
        planes = _sections(std, 1, factor)
        top = float(np.percentile(np.concatenate([plane.ravel() for plane in planes]), 99.5))
        shown.append(("standard deviation", planes, (0.0, top or 1.0), "viridis"))
    for axes, (title, planes, limits, colours) in zip(grid.T, shown, strict=True):
        axes[0].set_title(title)
        for axis, plane, field in zip(axes, planes, ((width, height), (width, depth)), strict=True):
            _picture(axis, plane, limits, factor * voxel, down=axis is axes[1], field=field)
            axis.images[0].set_cmap(colours)
    for axis, letter in zip(grid[:, 0], "yz", strict=True):
        axis.set_xlabel("x", labelpad=2)
        axis.set_ylabel(letter, rotation=0, labelpad=7, va="center")
    _scale_bar(grid[0, 0], width)
    _beam_arrow(grid[1, 0])
    _colour_bar(figure, grid[:, :3], "potential [V]", 1 / 3)
    if std is not None:
        _colour_bar(figure, grid[:, 3:], "standard deviation [V]", 1.0)
    return figure


@_styled
def misfit_curves(misfits: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Figure:
    """How closely volumes meet the images of each tilt, with the line at 1, where they meet them within the noise.

    Parameters
    ----------
    misfits : mapping of str to (tensor (tilt,), tensor (tilt,))
        Angles [deg], in any order, and mean square difference over the variance of the noise [1]. On a logarithmic
        scale where the largest is more than ten times the smallest.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When there is no curve, or angles and misfits differ in number, or a misfit is not finite or negative.
    """
    if not misfits:
        raise ValueError("misfit_curves: expected at least one curve, got none.")
    figure = Figure((7.0, 3.9), layout="constrained")
    axis = figure.subplots()
    ends = [1.0]
    for i, (name, (angles, values)) in enumerate(misfits.items()):
        angle, misfit = (v.detach().cpu().double().numpy() for v in (angles, values))
        if angle.shape != misfit.shape or misfit.size == 0 or not (np.isfinite(misfit) & (misfit >= 0)).all():
            raise ValueError(
                f"misfit_curves: {name!r}: expected as many finite, not negative misfits as angles, got {misfit.shape} "
                f"for {angle.shape}, from {misfit.min(initial=np.inf):g}. Find the noise that they were divided by."
            )
        order = np.argsort(angle, kind="stable")
        axis.plot(angle[order], misfit[order], label=name, **_line(i), ms=4.5, lw=1.5)
        ends += [misfit.min(), misfit.max()]
    _misfit_axis(axis, ends)
    axis.set_xlabel("tilt angle [°]")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


@_styled
def convergence_curves(residuals: Mapping[str, Sequence[float]], misfits: Mapping[str, Sequence[float]]) -> Figure:
    """Relative change of volumes, on a logarithmic scale, and their misfit after each iteration.

    Parameters
    ----------
    residuals : mapping of str to sequence of float
        Relative change after each iteration [1]; names without any take a colour and no line.
    misfits : mapping of str to sequence of float
        Mean square difference from the images over the variance of the noise, after each iteration [1].

    Returns
    -------
    Figure
        With one panel for each of the two that holds a number.

    Raises
    ------
    ValueError
        When there is no number at all.
    """
    names = list(dict.fromkeys([*residuals, *misfits]))
    panels = [curves for curves in (residuals, misfits) if any(len(values) for values in curves.values())]
    if not panels:
        raise ValueError("convergence_curves: expected the numbers of at least one iteration, got none.")
    figure = Figure((4.6 * len(panels) + 0.6, 3.6), layout="constrained")
    for axis, curves in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, values in curves.items():
            if len(values):
                line = _line(names.index(name))
                axis.plot(range(1, len(values) + 1), values, label=name, **line, ms=4.0, lw=1.5)
        axis.xaxis.set_major_locator(MaxNLocator(8, steps=_STEPS, integer=True))
        axis.set_xlabel("iteration")
        if curves is misfits:
            _misfit_axis(axis, [1.0, *(value for values in curves.values() for value in values)])
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_ylabel("relative change")
    handles = {
        text: handle for axis in figure.axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


def to_png(figure: Figure) -> bytes:
    """PNG file of a figure in 256 colours: the same figure, the same bytes; no date and no program name."""
    buffer, canvas = io.BytesIO(), FigureCanvasAgg(figure)
    with rc_context(_STYLE):
        canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)  # keeps rare colours
    few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def to_jpeg(values: np.ndarray, window: tuple[float, float], quality: int = 80) -> bytes:
    """JPEG file in 8-bit grey of an image (row, column), its first row on top: the same values, the same bytes.

    Parameters
    ----------
    values : array (row, column)
    window : (float, float)
        The values of black and white.
    quality : int
        1 to 95.
    """
    low, high = window
    grey = np.clip((values - low) / (high - low) * 255 + 0.5, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def robust_window(values: np.ndarray, outside: float = 0.5) -> tuple[float, float]:
    """Range of grey that leaves `outside` [%] of the values at either end; never empty."""
    low, high = (float(v) for v in np.percentile(values, (outside, 100 - outside)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def binned(image: torch.Tensor, width: int) -> np.ndarray:
    """Image (y, x) averaged over squares of whole pixels until neither side is longer than `width` [px]."""
    return _averaged(image.detach().cpu(), _bin_factor(image.shape, width))


def visible(image: torch.Tensor, width: int = 256) -> np.ndarray:
    """Noisy image (y, x) made readable: `binned`, then smoothed by a Gaussian of 0.8 px."""
    return gaussian_filter(binned(image, width), 0.8)


def central_planes(values: torch.Tensor, slab: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The planes (y, x), (z, x) and (z, y) through the origin of values (z, y, x), averaged over `slab` voxels."""
    planes = []
    for axis, n in enumerate(values.shape):
        start = max(n // 2 - slab // 2, 0)
        length = min(slab, n - start)
        planes.append(values.detach().narrow(axis, start, length).double().mean(axis).cpu().numpy())
    return planes[0], planes[1], planes[2]


def expect_finite(values: torch.Tensor, ndim: int, what: str) -> None:
    """Raise a ValueError that begins with `what` unless `values` are real, finite, not empty and have `ndim` axes."""
    axes = {2: "(y, x)", 3: "(z, y, x) or (tilt, y, x)"}[ndim]
    if values.ndim != ndim or values.is_complex() or values.numel() == 0:
        raise ValueError(f"{what}: expected real values {axes}, got {tuple(values.shape)} of {values.dtype}.")
    bad = values.numel() - int(torch.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"{what}: expected finite values, got {bad} of {values.numel()} that are NaN or infinite. "
            "Find the step that made them, or set them to the mean."
        )


def signed_degrees(angle: float) -> str:
    """Angle [deg] as a label, with a true minus sign."""
    text = f"{abs(angle):.1f}".removesuffix(".0")
    return f"{'−' if angle < 0 and float(text) else '+' if float(text) else ''}{text}°"


def _sections(values: torch.Tensor, slab: int, factor: int) -> list[np.ndarray]:
    """Central planes (y, x) and (z, x), averaged over `slab` voxels across and squares of `factor` within."""
    return [_averaged(torch.from_numpy(plane), factor) for plane in central_planes(values, slab)[:2]]


def _line(i: int) -> dict[str, Any]:
    return {"color": OKABE_ITO[i % len(OKABE_ITO)], "marker": _MARKERS[i % len(_MARKERS)]}


def _misfit_axis(axis: Axes, values: Sequence[float]) -> None:
    """Vertical axis of misfits with the line at 1, logarithmic where the `values` [1] differ more than tenfold."""
    axis.axhline(1.0, color=_INK, lw=1.0, ls=":")
    label = axis.annotate("as the\nnoise", (1.01, 1.0), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
    label.set_in_layout(True)
    if 0 < min(values) < max(values) / 10:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(0, 1.1 * max(values))
    axis.set_ylabel("misfit / variance of the noise")


def _colour_bar(figure: Figure, axes: np.ndarray, label: str, shrink: float) -> None:
    """Scale of the pictures of `axes` (row, column) below them, `shrink` of their width long."""
    bar = figure.colorbar(
        axes[0, 0].images[0], ax=axes, location="bottom", label=label, shrink=0.9 * shrink, aspect=20, pad=0.03
    )
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5, steps=_STEPS)
    bar.update_ticks()


def _bin_factor(shape: Sequence[int], width: int) -> int:
    return min(math.ceil(max(shape) / width), *shape)


def _averaged(image: torch.Tensor, factor: int) -> np.ndarray:
    """Image (y, x) averaged over squares of `factor` pixels; an incomplete square at the end is left out."""
    return torch.nn.functional.avg_pool2d(image.float()[None, None], factor)[0, 0].numpy()


def _picture(
    axis: Axes,
    values: np.ndarray,
    window: tuple[float, float],
    spacing: float,
    *,
    down: bool = False,
    field: tuple[float, float] | None = None,
) -> None:
    """Grey image (row, column) of `spacing` [Å] about its sample n // 2, in a `field` (x, y) [Å] at least as large.

    Rows go upwards, or downwards with `down`.
    """
    (bottom, top), (left, right) = ((-(n // 2 + 0.5) * spacing, (n - n // 2 - 0.5) * spacing) for n in values.shape)
    extent = (left, right, top, bottom) if down else (left, right, bottom, top)
    axis.imshow(values, vmin=window[0], vmax=window[1], extent=extent, origin="upper" if down else "lower")
    if field is not None:
        centre = (left + right) / 2, (extent[2] + extent[3]) / 2
        axis.set_xlim(centre[0] - field[0] / 2, centre[0] + field[0] / 2)
        rise = field[1] / 2 if not down else -field[1] / 2
        axis.set_ylim(centre[1] - rise, centre[1] + rise)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _scale_bar(axis: Axes, width: float) -> None:
    """White bar on a dark strip in the lower left of a picture `width` [Å] wide, near a fifth of its length."""
    length = max((b for b in _BAR_LENGTHS if 10 * b <= 0.3 * width), default=width / 40)  # [nm]
    share = 10 * length / width
    box = {"transform": axis.transAxes, "lw": 0}
    text = axis.text(
        0.035 + share / 2, 0.06, f"{length:g} nm", transform=axis.transAxes, ha="center", va="bottom", color="white",
        fontsize=8.5, bbox={"facecolor": "#000000b0", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip
    text.set_in_layout(False)
    axis.add_patch(Rectangle((0.027, 0.027), share + 0.016, 0.032, facecolor="#000000b0", **box))
    axis.add_patch(Rectangle((0.035, 0.035), share, 0.016, facecolor="white", **box))


def _beam_arrow(axis: Axes) -> None:
    """Arrow down the beam, left above a section that holds z."""
    axis.annotate(
        "", xy=(0.03, 0.55), xytext=(0.03, 0.97), xycoords="axes fraction",
        arrowprops={"arrowstyle": "-|>", "color": _ORANGE, "lw": 1.6, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    text = axis.text(0.06, 0.94, "beam", transform=axis.transAxes, va="top", color=_ORANGE, fontsize=8.5)
    text.set_bbox({"facecolor": "#000000b0", "edgecolor": "none", "pad": 1.5})


def _spectrum(axis: Axes, log_power: np.ndarray, spacing: float, *, down: bool = False) -> None:
    """Centred logarithmic power (row, column) with ticks up to the Nyquist frequency and rings of known lengths."""
    nyquist = 0.5 / spacing
    edges = []
    for n in log_power.shape[::-1]:  # sample n // 2 is frequency zero
        edges += [-(n // 2 + 0.5) / (n * spacing), (n - n // 2 - 0.5) / (n * spacing)]
    left, right, first, last = edges
    shown = np.sort(log_power, axis=None)
    window = robust_window(shown[len(shown) // 20 :], 0.2)
    extent = (left, right, last, first) if down else (left, right, first, last)
    axis.imshow(
        log_power, vmin=window[0], vmax=window[1], extent=extent, origin="upper" if down else "lower", aspect="equal"
    )
    axis.set_xlim(-nyquist, nyquist)
    axis.set_ylim((nyquist, -nyquist) if down else (-nyquist, nyquist))
    ticks = [-nyquist, -nyquist / 2, 0.0, nyquist / 2, nyquist]
    labels = [f"{tick:.3g}".replace("-", "−") for tick in ticks]
    axis.set_xticks(ticks, labels)
    axis.set_yticks(ticks, labels)
    coarsest = min(n * spacing for n in log_power.shape) / 4
    for length in [r for r in _RINGS if 1 / r < 0.97 * nyquist and r < coarsest][-2:]:
        axis.add_patch(Circle((0, 0), 1 / length, fill=False, color=_ORANGE, lw=0.9, alpha=0.8))
        diagonal = math.sqrt(0.5) / length
        text = axis.text(diagonal, -diagonal if down else diagonal, f"{length / 10:g} nm", fontsize=8.5)
        text.set(color="white", ha="left", va="bottom", clip_on=True)
        text.set_bbox({"facecolor": "#000000b0", "edgecolor": "none", "pad": 1.5})


def _frequency_axes(axis: Axes, last: float) -> None:
    """Frequency [1/Å] below and the same places as lengths [Å] above."""
    axis.set_xlim(0, last)
    axis.set_xlabel("spatial frequency [1/Å]")
    top = axis.secondary_xaxis("top")
    lengths = [base * 10**power for power in range(-1, 4) for base in (1, 1.5, 2, 3, 5, 7)]
    lengths = [d for d in sorted(lengths) if 1.0 <= last * d <= 8.0]
    top.set_xticks([1 / d for d in lengths], [f"{d:g}" for d in lengths])
    top.set_xlabel("resolution [Å]")
    top.spines["top"].set_visible(True)
    top.spines["top"].set_color(_MUTED)


def _squared_ctf(axis: Axes, optics: Optics, pixel_size: float) -> None:
    frequency, transfer = _radial_ctf(optics, pixel_size)
    twin = axis.twinx()
    twin.fill_between(frequency, transfer**2, color=OKABE_ITO[4], alpha=0.35, lw=0, label="CTF² of the optics")
    twin.set_ylim(0, 1.0)
    twin.set_ylabel("CTF²")
    twin.spines["right"].set_visible(True)
    axis.set_zorder(twin.get_zorder() + 1)
    axis.patch.set_visible(False)


def _radial_ctf(optics: Optics, pixel_size: float, n: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (n / 2,) [1/Å] and the CTF there of the round lens: without astigmatism, coma and the like."""
    skew = [name for name in optics.polar if name[0] == "C" and name[2] != "0" and hasattr(optics, name)]
    round_lens = optics.replace(
        astigmatism=0.0, coma=0.0, trefoil=0.0, beam_tilt=(0.0, 0.0), **dict.fromkeys(skew, 0.0)
    )
    line = ctf(round_lens, (1, n), pixel_size).detach().cpu()
    if line.ndim != 2:
        raise ValueError(f"optics: expected the fields of one image, got {tuple(line.shape[:-2])}. Use `index`.")
    return np.arange(n // 2) / (n * pixel_size), line[0, : n // 2].numpy()


def _central_plane_power(values: torch.Tensor) -> np.ndarray:
    """Mean power (kz, kx), centred, of the planes with |ky| of at most two samples; zeros are lifted off the floor."""
    values = values.detach().cpu()
    along_z, along_y, along_x = (_taper(n) for n in values.shape)
    n = len(along_y)
    m = torch.arange(min(3, (n + 1) // 2), dtype=torch.float64)
    turns = m[:, None] * torch.arange(n, dtype=torch.float64) / n
    waves = torch.polar(along_y.expand_as(turns), -2 * torch.pi * turns)  # (ky, y)
    mean = values.mean(dtype=torch.float64)
    planes = torch.stack([waves @ (plane.double() - mean).to(waves.dtype) for plane in values], 1)  # (ky, z, x)
    planes = planes * along_z[:, None] * along_x
    power = torch.fft.fft2(planes).abs() ** 2  # (ky, kz, kx)
    mirrored = power.flip(1, 2).roll((1, 1), (1, 2))  # the planes of -ky
    return _lifted(torch.fft.fftshift((power + mirrored).mean(0)).numpy())


def _tiled_power(image: torch.Tensor, tile: int = 512) -> np.ndarray:
    """Mean power (ky, kx), centred, of tapered square tiles of an image."""
    image = image.detach().cpu().double()
    side = min(tile, *image.shape)
    step = max(side // 2, 1)
    tiles = image.unfold(0, side, step).unfold(1, side, step).flatten(0, 1)  # (tile, y, x)
    tiles = tiles - tiles.mean((1, 2), keepdim=True)
    window = _taper(side, 0.5 if len(tiles) > 1 else 0.15)
    power = torch.fft.fft2(tiles * window[:, None] * window).abs().square().mean(0)
    return _lifted(torch.fft.fftshift(power).numpy())


def _lifted(power: np.ndarray) -> np.ndarray:
    largest = power.max()
    return np.maximum(power, 1e-12 * largest if largest > 0 else 1.0)


def _taper(n: int, share: float = 0.1) -> torch.Tensor:
    """Window (n,) that rises as a cosine over `share` of the axis at either end."""
    return cosine_edges(n, max(share * n, 1.0), dtype=torch.float64)


def _ring_means(power: np.ndarray, pixel_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (ring,) [1/Å] up to Nyquist and the mean of a centred square power spectrum on each ring."""
    side = power.shape[0]
    at = np.arange(side) - side // 2
    ring = np.rint(np.hypot(at[:, None], at)).astype(int).ravel()
    count = np.bincount(ring)
    mean = np.bincount(ring, power.ravel()) / np.maximum(count, 1)
    n = max(side // 2, 1) + 1
    return np.arange(n)[: len(mean)] / (side * pixel_size), mean[:n]


def _shells(curve: Correlation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    frequency, correlation = (v.detach().cpu().double().numpy() for v in (curve.frequency, curve.correlation))
    return frequency, correlation, curve.reliable.detach().cpu().bool().numpy()


def _reliable_line(axis: Axes, frequency: np.ndarray, correlation: np.ndarray, reliable: np.ndarray, **style) -> None:
    """Line of the reliable shells; grey and thin where they are not."""
    every = max(len(frequency) // 12, 1)
    axis.plot(
        frequency, np.where(reliable, correlation, np.nan), lw=1.7, ms=4.5, markevery=every, clip_on=False, **style
    )
    joined = ~reliable | np.concatenate([~reliable[:1], ~reliable[:-1]])  # up to the first reliable shell
    style = style | {"color": "#a8a8a8", "marker": "", "label": None}
    axis.plot(frequency, np.where(joined, correlation, np.nan), lw=1.0, **style)


def _unreliable_edge(curve: Correlation) -> float:
    """Frequency [1/Å] of the first reliable shell, 0 when only the mean is unreliable or when all shells are."""
    frequency, _, reliable = _shells(curve)
    first = int(np.argmax(reliable)) if reliable.any() else 0
    return float(frequency[first]) if first > 1 else 0.0


def _evenly(total: int, n: int) -> Sequence[int]:
    """At most `n` indices below `total`, evenly spaced, both ends among them."""
    if n < 1:
        raise ValueError(f"tilt_gallery: expected n of 1 or more, got {n}.")
    if n == 1 or total == 1:
        return [total // 2]
    return sorted({round(i * (total - 1) / (n - 1)) for i in range(n)})
