"""A tilt series with what was found of it, to go on from: to a tomogram, another fit, or a file."""

from __future__ import annotations

from cryosim.acquisition.series import TiltSeries
from inverse.calibration.alignment import Alignment
from inverse.calibration.series_ctf import SeriesCtf

_FITTED = (
    *("voltage", "defocus", "astigmatism", "astigmatism_angle"),
    *("spherical_aberration", "phase_shift", "amplitude_contrast"),
)


def applied(series: TiltSeries, alignment: Alignment | None = None, ctf: SeriesCtf | None = None) -> TiltSeries:
    """`series` with the geometry of an alignment and the lens of a CTF fit; its images are not changed.

    Both are of the images as they were taken, so that `align` begins at the shifts found, and `reconstruct` and
    `write_calibration` use them as they are. Aberrations that the fit does not know are kept. The hand is not used:
    where `ctf.hand` is -1, the angles have the sign that the images contradict.

    Parameters
    ----------
    series : TiltSeries
        That was aligned or fitted.
    alignment : Alignment, optional
        From `align`.
    ctf : SeriesCtf, optional
        From `fit_series_ctf`.

    Raises
    ------
    ValueError
        When the numbers of tilts differ.
    """
    tilts, optics, n = series.tilts, series.optics, len(series.tilts)
    for name, found in (
        ("alignment", None if alignment is None else alignment.angles),
        ("ctf", None if ctf is None else ctf.standard_errors["defocus"]),
    ):
        if found is not None and len(found) != n:
            raise ValueError(f"applied: {name}: expected {n} tilts, as the series has, got {len(found)}.")
    if alignment is not None:
        tilts = tilts.replace(
            angles=alignment.angles.to(tilts.angles),
            shifts=alignment.shifts.to(tilts.shifts),
            axis_angle=float(alignment.axis_angle),
        )
    if ctf is not None:
        fitted = {name: getattr(ctf.optics, name) for name in _FITTED}
        optics = ctf.optics if optics is None else optics.replace(**fitted)
    return series.replace(tilts=tilts, optics=optics)
