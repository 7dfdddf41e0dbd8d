"""The report of a reconstruction: one HTML file that needs nothing but a browser.

Pictures, style and script stand inside the file, and a content security policy forbids it to load anything or to run
any script but its own. The same data give the same bytes. The page is laid out in `templates/report.html`.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from cryosim.acquisition.series import TiltSeries
from cryosim.core.volume import Volume
from cryosim.io.files import write_text
from cryosim.microscope.optics import Optics
from cryosim.plot import (
    expect_finite,
    fsc_curves,
    image_spectrum,
    ortho_slices,
    power_spectrum,
    signed_degrees,
    tilt_gallery,
    to_png,
)
from inverse.metrics.fsc import ShellCorrelation
from inverse.reconstruction import Reconstruction
from inverse.report_evidence import evidence
from inverse.report_pictures import SLAB, Picture, in_slab, png, slice_film, tilt_film

_THRESHOLDS = (0.143, 0.5)


def write_report(
    path: str | Path,
    *,
    title: str,
    series: TiltSeries,
    truth: Volume | None,
    reconstructions: Mapping[str, Volume | Reconstruction],
    curves: Mapping[str, ShellCorrelation],
    summary: Mapping[str, str],
    parameters: Mapping[str, Any],
    warnings: Sequence[str] = (),
    files: Sequence[tuple[str, str]] = (),
    whole: Mapping[str, ShellCorrelation] | None = None,
) -> Path:
    """Write the report of a tilt series and the volumes made of it.

    Parameters
    ----------
    path : str or path
        Of the HTML file; it appears whole or not at all.
    title : str
    series : TiltSeries
        Images (tilt, y, x) [e-/px].
    truth : Volume or None
        Values (z, y, x) [V]; None when it is not known, as for real data.
    reconstructions : mapping of str to Volume or Reconstruction
        Values (z, y, x), by the name of the method. Of results of `reconstruct` the report also shows what the images
        determine, how far noise moves it and how closely the images are met, and their warnings.
    curves : mapping of str to ShellCorrelation
        Of the measured region, without the missing wedge: with the truth, or of half sets when there is no truth.
    summary : mapping of str to str
        Further headline numbers, with their units, after those the report finds by itself.
    parameters : mapping
        Nested, with units in the names or values; shown as given.
    warnings : sequence of str
        Shown before everything else.
    files : sequence of (str, str)
        Path relative to the report, and what it holds.
    whole : mapping of str to ShellCorrelation, optional
        Of all of Fourier space, the wedge included, by the same names as `curves`.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        When an image or a volume has the wrong number of axes or values that are not finite, or a result does not hold
        what `reconstruct` gives.
    """
    whole = whole or {}
    made = {name: result for name, result in reconstructions.items() if isinstance(result, Reconstruction)}
    tomograms = {name: r.volume if isinstance(r, Reconstruction) else r for name, r in reconstructions.items()}
    volumes = ({} if truth is None else {"Truth": truth}) | tomograms
    _check(series, truth, tomograms)
    tilted, untilted = _by_angle(series), _untilted(series)
    context = {
        "title": title,
        "sentence": _sentence(series, list(reconstructions)),
        "warnings": [
            *warnings,
            *(f"{name}: {text}" for name, result in made.items() for text in result.warnings),
            *(_reversed(curves) if truth is not None else []),
        ],
        "headline": [*_headline(series, curves), *((str(k), str(v)) for k, v in summary.items())],
        "gallery": _gallery(series),
        "tilt_film": tilt_film(series, tilted, tilted.index(untilted)),
        "slices": _slices(volumes) if volumes else None,
        "slice_film": slice_film(volumes) if volumes else None,
        "evidence": evidence(made) if made else None,
        "spectra": [_wedge(name, volume, series.tilts.angles) for name, volume in tomograms.items()],
        "rings": _rings(series, untilted),
        "fsc": _fsc(curves, whole) if curves or whole else None,
        "columns": [f"{verb} {t:g}" for t in _THRESHOLDS for verb in ("Falls below", "Last above")],
        "rows": _rows(curves, whole),
        "parameters": _shown(parameters),
        "files": [_file(name, content) for name, content in files],
        "against_truth": truth is not None,
        "steepest": round(float(series.tilts.angles.detach().abs().max())),
        "slab": SLAB / 10,  # [nm]
    }
    write_text(path, page("report", context))
    return Path(path)


def _check(series: TiltSeries, truth: Volume | None, tomograms: Mapping[str, Volume]) -> None:
    expect_finite(series.images, 3, "write_report: series.images")
    if truth is not None:
        expect_finite(truth.values, 3, "write_report: truth")
        if "Truth" in tomograms:
            raise ValueError('write_report: expected reconstructions of other names than "Truth". Rename it.')
    for name, volume in tomograms.items():
        expect_finite(volume.values, 3, f"write_report: reconstruction {name!r}")


def page(name: str, context: Mapping[str, Any]) -> str:
    """The template `name` with what it shows, in the style of the report."""
    templates = package_files("inverse") / "templates"
    files = (f"{name}.html", "report.css", "report.js")
    laid_out, style, script = ((templates / file).read_text("utf-8") for file in files)
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(laid_out).render(
        context, style=style, script=script, style_hash=_hash(style), script_hash=_hash(script)
    )


def _hash(text: str) -> str:
    """Name of an inline style or script in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _by_angle(series: TiltSeries) -> list[int]:
    return torch.argsort(series.tilts.angles.detach().cpu(), stable=True).tolist()


def _untilted(series: TiltSeries) -> int:
    return int(torch.argmin(series.tilts.angles.detach().abs()))


# ---- words and numbers -------------------------------------------------------------------------------------------


def _sentence(series: TiltSeries, methods: list[str]) -> str:
    rows, columns = series.images.shape[1:]
    taken = f"{_tilts(series)}, {columns} × {rows} pixels of {float(series.pixel_size):.4g} Å"
    made = f"; reconstructed: {_listed(methods)}" if methods else ""
    return f"{taken}, {float(series.tilts.doses.sum()):.4g} e⁻/Å² in all{made}."


def _tilts(series: TiltSeries) -> str:
    angles = series.tilts.angles.detach()
    count = f"{len(angles)} tilt{'s' if len(angles) > 1 else ''}"
    return f"{count} from {signed_degrees(float(angles.min()))} to {signed_degrees(float(angles.max()))}"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _headline(series: TiltSeries, curves: Mapping[str, ShellCorrelation]) -> list[tuple[str, str]]:
    resolutions = [
        (f"FSC resolution, {name}", ", ".join(f"{_falls_below(curve, t)} at {t:g}" for t in _THRESHOLDS))
        for name, curve in curves.items()
    ]
    return [
        *resolutions,
        ("Tilts", _tilts(series).replace(" tilts from", ", from")),
        ("Dose", f"{float(series.tilts.doses.sum()):.4g} e⁻/Å²"),
        ("Defocus", _defocus(series.optics)),
    ]


def _defocus(optics: Optics | None) -> str:
    if optics is None:
        return "unknown"
    defocus = torch.as_tensor(optics.defocus).detach().double() / 1e4  # [µm]
    low, high = (f"{float(v):.3g}".replace("-", "−") for v in (defocus.min(), defocus.max()))
    return f"{low} µm" if low == high else f"{low} to {high} µm"


def _falls_below(curve: ShellCorrelation, threshold: float) -> str:
    """Resolution where the reliable correlation first falls below `threshold`."""
    resolution, correlation = curve.resolution(threshold), _reliable(curve)[1]
    if not math.isfinite(resolution):
        return "none"
    return f"{resolution:.1f} Å" + (" or finer" if min(correlation) >= threshold else "")


def _last_above(curve: ShellCorrelation, threshold: float) -> str:
    """Finest reliable shell whose correlation is not below `threshold`."""
    above = [k for k, c in zip(*_reliable(curve), strict=True) if c >= threshold]
    return f"{1 / above[-1]:.1f} Å" if above else "none"


def _reliable(curve: ShellCorrelation) -> tuple[list[float], list[float]]:
    keep = curve.reliable & torch.isfinite(curve.correlation)
    return curve.frequency[keep].tolist(), curve.correlation[keep].tolist()


def _rows(curves: Mapping[str, ShellCorrelation], whole: Mapping[str, ShellCorrelation]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys([*curves, *whole]):
        for kind, samples in ((curves, "measured"), (whole, "all, with the wedge")):
            if name in kind:
                numbers = [read(kind[name], t) for t in _THRESHOLDS for read in (_falls_below, _last_above)]
                rows.append({"name": name, "samples": samples, "numbers": numbers})
    return rows


def _reversed(curves: Mapping[str, ShellCorrelation]) -> list[str]:
    """A warning for each curve whose coarser half of reliable shells is negative on average."""
    found = []
    for name, curve in curves.items():
        correlation = _reliable(curve)[1]
        coarse = correlation[: (len(correlation) + 1) // 2]
        if coarse and sum(coarse) / len(coarse) < -0.1:
            found.append(f"{name} correlates negatively with the truth: its contrast is reversed. Change its sign.")
    return found


def _shown(value: Any) -> Any:
    """Parameters as text, mappings kept as mappings."""
    if isinstance(value, Mapping):
        return {str(k): _shown(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}".replace("-", "−")
    if isinstance(value, list | tuple):
        return ", ".join(str(_shown(v)) for v in value)
    return "not given" if value is None else str(value)


def _file(name: str, content: str) -> dict[str, str | None]:
    """Entry of the list of files, a link when the path is relative: quoting leaves no way to name another scheme."""
    relative = bool(name) and not name.startswith(("/", "\\"))
    return {"name": name, "content": content, "link": quote(name) if relative else None}


# ---- pictures ----------------------------------------------------------------------------------------------------


def _gallery(series: TiltSeries) -> Picture:
    tilts = series.tilts
    figure = tilt_gallery(series.images, tilts.angles, float(series.pixel_size), doses=tilts.accumulated_doses)
    return png(to_png(figure), f"Images of the specimen at increasing tilt, of {_tilts(series)}.")


def _slices(volumes: Mapping[str, Volume]) -> Picture:
    slab = in_slab(max(float(volume.voxel_size) for volume in volumes.values()))
    return png(to_png(ortho_slices(volumes, slab=slab)), f"Central xy, xz and yz planes of {_listed(list(volumes))}.")


def _wedge(name: str, volume: Volume, angles: torch.Tensor) -> Picture:
    figure = power_spectrum(volume.values, float(volume.voxel_size), angles=angles, title=name)
    return png(
        to_png(figure), f"Power spectrum of {name} in the plane of kx and kz, with the borders of the missing wedge."
    )


def _rings(series: TiltSeries, untilted: int) -> Picture:
    optics = None if series.optics is None else series.optics.index(untilted)
    angle = signed_degrees(float(series.tilts.angles[untilted]))
    figure = image_spectrum(series.images[untilted], float(series.pixel_size), optics=optics)
    return png(to_png(figure), f"Power spectrum of the image at {angle} with its Thon rings, and its mean on rings.")


def _fsc(curves: Mapping[str, ShellCorrelation], whole: Mapping[str, ShellCorrelation]) -> Picture:
    names = _listed(list(dict.fromkeys([*curves, *whole])))
    figure = fsc_curves(curves, whole=whole)
    return png(to_png(figure), f"Fourier shell correlation against spatial frequency for {names}.")
