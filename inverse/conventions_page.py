"""The page that tells whether a tilt series is the right way round."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from cryosim.acquisition.series import TiltSeries
from cryosim.io.files import write_text
from cryosim.plot import to_png
from inverse.calibration.conventions import Conventions
from inverse.calibration.series_ctf import DECIDED
from inverse.report import page
from inverse.report_pictures import png

_LEAST = -60.0  # [nat] that the picture goes down to, or a tenth of the whole way


def write_conventions_page(path: str | Path, series: TiltSeries, found: Conventions, title: str) -> Path:
    """Write what `check_conventions` found as one HTML file that needs nothing but a browser.

    Parameters
    ----------
    path : str or path
        Of the HTML file; it appears whole or not at all.
    series : TiltSeries
        Images (tilt, y, x).
    found : Conventions
    title : str

    Returns
    -------
    Path
        `path`.
    """
    rows, columns = series.images.shape[1:]
    slope = png(to_png(slope_figure(found)), "Log-likelihood against the slope of the specimen's heights")
    context = {
        "title": title,
        "sentence": f"{len(series.tilts)} tilts, {columns} × {rows} pixels of {float(series.pixel_size):.4g} Å.",
        "decided": found.decided,
        "headline": [
            ("Verdict", found.verdict),
            ("Angles as declared, over their negatives", f"{found.hand_margin:+.1f} nat"),
            ("Defocus as declared, over its negative", f"{found.defocus_margin:+.1f} nat"),
            ("Rings to", f"{found.resolution:g} Å"),
        ],
        "rows": _rows(found),
        "slope": slope,
        "rings": f"{found.rings:+.1f}",
        "density": f"{found.density:+.1f}",
    }
    write_text(path, page("conventions", context))
    return Path(path)


def _rows(found: Conventions) -> list[list[str]]:
    """One for each pair of combinations that are one specimen, the most likely first."""
    signs, turns = {1: "as declared", -1: "negated"}, {1: "as declared", -1: "turned by 180°"}
    rows = []
    for (angles, defocus, axis), value in sorted(found.likelihoods.items(), key=lambda pair: -pair[1]):
        if angles == 1:
            rows.append([signs[1], turns[axis], signs[-1], turns[-axis], signs[defocus], f"{value:.1f}"])
    return rows


def slope_figure(found: Conventions) -> Figure:
    """Log-likelihood against the slope of the heights over the declared one, with the defocus as declared."""
    figure = Figure((7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    least = min(_LEAST, 0.1 * float(found.profile.min()))
    axes.plot(found.rises.numpy(), found.profile.clamp_min(2 * least).numpy(), color="#0072b2", lw=1.6)
    axes.axhline(-DECIDED, color="0.7", lw=0.8)
    for slope, name in ((1.0, "as declared"), (-1.0, "the other hand"), (0.0, "level")):
        axes.axvline(slope, color="0.75", lw=0.8, ls=":")
        axes.annotate(name, (slope, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8, color="0.35")
    if found.rise_error < 1:
        axes.errorbar([found.rise], [0.0], xerr=[found.rise_error], fmt="o", color="#d55e00", capsize=3)
    axes.set(
        xlabel="slope of the heights, over the declared one",
        ylabel="log-likelihood [nat]",
        ylim=(least * 1.15, -0.06 * least),
    )
    return figure
