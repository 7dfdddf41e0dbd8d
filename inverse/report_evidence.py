"""What of a tomogram the images determine and what its method made up: numbers and pictures for the report.

With A the tilts' projection, y the prepared images, sigma^2 the variance of their noise, and v the volume,

    misfit of a tilt   mean (A v - y)^2 / sigma^2        about 1 where v explains the image and no more
    measured           m = P v                           P: `Reconstruction.measured`
    the rest           v - m                             in what the tilts do not see, or see below the noise
    their shares       |m|^2 / |v|^2, |v - m|^2 / |v|^2

P projects v, continued with zeros beyond its sides, and cuts the result to the box again (see `inverse.measured`). With
E the energy that it cuts off, |m|^2 + |v - m|^2 = |v|^2 - 2 E: the shares sum to 1 or a little less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from cryosim.core.volume import Volume
from cryosim.plot import convergence_curves, expect_finite, measured_slices, misfit_curves, to_png
from inverse.reconstruction import Reconstruction
from inverse.report_pictures import Picture, in_slab, png

_POSTERIOR = "posterior: noise, and what no tilt saw"
_KINDS = {"wiener": _POSTERIOR, "diffusion": _POSTERIOR, "local": "error that the network expects of itself"}
_NOISE = "noise alone"
_WEIGHTS = {"least-squares": " voxel²", "tv": " V⁻¹"}  # units, where the weight has one


class Row(NamedTuple):
    """Numbers of one method, as text."""

    name: str
    consistency: str
    determined: str
    rest: str
    std: str
    kind: str
    weight: str


class Evidence(NamedTuple):
    """The section "Measured or invented".

    Attributes
    ----------
    rows : list of Row
    misfits : Picture
        By tilt angle.
    planes : list of (str, Picture)
        Of each method: volume, measured, the rest, standard deviation.
    deviation : bool
        Whether some method has one.
    convergence : Picture or None
        None when no method tells of its iterations.
    """

    rows: list[Row]
    misfits: Picture
    planes: list[tuple[str, Picture]]
    deviation: bool
    convergence: Picture | None


@torch.no_grad()
def evidence(made: Mapping[str, Reconstruction]) -> Evidence:
    """Numbers and pictures of results by the names of their methods.

    The measured part is as large as the volume; it is computed once, and of one method at a time.

    Raises
    ------
    ValueError
        When a misfit or a standard deviation is not finite, or the latter has another shape than the volume.
    """
    rows, planes, misfits = [], [], {}
    for name, result in made.items():
        misfit = _checked_misfit(name, result)
        misfits[name] = (result.angles, misfit)
        measured = result.measured
        rows.append(_row(name, result, measured, float(misfit.mean())))
        planes.append((name, _planes(name, result, measured)))
    ends = "; ".join(f"{name} from {float(m.min()):.2g} to {float(m.max()):.2g}" for name, (_, m) in misfits.items())
    return Evidence(
        rows,
        png(to_png(misfit_curves(misfits)), f"Misfit by tilt angle in units of the noise, with a line at 1: {ends}."),
        planes,
        any(result.std is not None for result in made.values()),
        _convergence(made),
    )


def _checked_misfit(name: str, result: Reconstruction) -> torch.Tensor:
    """Misfit (tilt,) [1] of a result whose numbers are finite."""
    where, shape = f"write_report: reconstruction {name!r}", result.volume.values.shape
    if result.std is not None:
        if result.std.shape != shape:
            raise ValueError(
                f"{where}: expected a standard deviation of the volume's shape {tuple(shape)}, got "
                f"{tuple(result.std.shape)}. Take both from one result."
            )
        expect_finite(_distinct(result.std), 3, f"{where}: std")
    misfit = result.misfit
    if not bool(torch.isfinite(misfit).all()):
        raise ValueError(
            f"{where}: expected a finite misfit of every tilt, got {misfit.tolist()}. Give it the images and the "
            "variance of their noise, above 0, that it was made of."
        )
    return misfit


def _row(name: str, result: Reconstruction, measured: Volume, consistency: float) -> Row:
    whole, kept, rest = _energies(result.volume.values, measured.values)
    method, weight = result.method, float(result.weight)
    return Row(
        name,
        f"{consistency:.2f}" if consistency < 100 else f"{consistency:.3g}",
        _percent(kept, whole),
        _percent(rest, whole),
        "not asked for" if result.std is None else f"{np.median(_distinct(result.std).cpu().numpy()):.3g} V",
        "" if result.std is None else _KINDS.get(method, _NOISE) if method else "not told",
        "none" if math.isnan(weight) else f"{weight:.3g}{_WEIGHTS.get(method, '')}",
    )


def _energies(values: torch.Tensor, measured: torch.Tensor) -> tuple[float, float, float]:
    """Sums of squares of a volume, its measured part and the rest; layer by layer, without a volume of the rest."""
    whole = kept = rest = 0.0
    for layer, part in zip(values, measured, strict=True):
        layer, part = layer.double(), part.double()
        whole, kept = whole + float(layer.square().sum()), kept + float(part.square().sum())
        rest += float((layer - part).square().sum())
    return whole, kept, rest


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "none"


def _distinct(values: torch.Tensor) -> torch.Tensor:
    """`values` without the copies that `expand` stands for: each is there equally often."""
    return values[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in values.stride())]


def _planes(name: str, result: Reconstruction, measured: Volume) -> Picture:
    figure = measured_slices(result.volume, measured, std=result.std, slab=in_slab(float(result.volume.voxel_size)))
    std = "" if result.std is None else " Then its standard deviation."
    return png(
        to_png(figure),
        f"Central xy and xz planes of {name}: the volume, the part that the images determine, and the rest.{std}",
    )


def _convergence(made: Mapping[str, Reconstruction]) -> Picture | None:
    residuals = {name: result.residuals for name, result in made.items()}
    misfits = {name: result.misfits for name, result in made.items()}
    told = [name for name in made if residuals[name] or misfits[name]]
    if not told:
        return None
    figure = convergence_curves(residuals, misfits)
    return png(to_png(figure), f"Relative change and misfit after each iteration of {', '.join(told)}.")
