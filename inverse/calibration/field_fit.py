"""Any differentiable field of specimen, tilts, lens and camera, from images of a specimen that is known.

The model is the one that simulates: expected electrons of each exposure and frame, counted by the camera. It is climbed
in `inverse.calibration.field_model`. Standard errors are the roots of the diagonal of the inverse information, the
bound of Cramér and Rao. What the images cannot tell shows in it:

- *alone*, 1 / sqrt I_ii, is the error were all else known; its ratio to the standard error says what the others cost;
- directions of the scaled information D^-1/2 I D^-1/2 without any are not determined, nor is what takes part in them.

A profile is the log-likelihood against one parameter with all others at their best. Where it falls by 1/2 nat is a
68 % interval, whatever its shape (Venzon & Moolgavkar 1988, doi:10.2307/2347496).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.simulate import Sampling, sampling_for
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.volume import Volume
from cryosim.microscope.detector import Detector
from cryosim.microscope.likelihood import check_counts
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.specimen import Specimen
from inverse.calibration.field_model import NOTHING, Data, Model, Point, Scattering, eliminated, scaled
from inverse.calibration.named_fields import Setting, parameter_of, with_fields

_PART = 0.1  # of such a direction, that a parameter takes to be one of it
_DOUBTFUL = 10.0  # times the error that it would have alone: the profile is asked
_TOGETHER = 0.9  # of a correlation that is told
_STEP = 0.3  # most that a step of a profile may miss its height by [nat]


class Identified(NamedTuple):
    """What the images tell of one number.

    Attributes
    ----------
    name : str
        "optics.defocus", or "optics.defocus[3]" of several.
    value, error : float
        In the unit of the field; the error is infinite where the images do not tell.
    alone : float
        Standard error were all others known.
    partner : str
        Number that it is most correlated with, or those that it is not told apart from; "" where there is none.
    correlation : float
        With the partner [1].
    """

    name: str
    value: float
    error: float
    alone: float
    partner: str
    correlation: float


class Calibration(NamedTuple):
    """What `calibrate` returns.

    Attributes
    ----------
    specimen, tilts, optics, detector
        With the values that were found.
    values, standard_errors : dict of str to tensor
        By whole names, of the fields' shapes and units; errors are infinite where the images do not tell.
    undetermined : tuple of str
        Names of the numbers of which that is so.
    intervals : dict of str to (float, float)
        By profile likelihood, 68 %, of the doubtful; infinite on a side where the likelihood does not fall.
    table : tuple of Identified
        Of every number but those of pixels.
    log_likelihood : float
        [nat].
    gained : float
        Over that of the values to begin with [nat].
    dispersion : float
        Mean square of the residuals over what the counts' own noise makes.
    converged : bool
    """

    specimen: Specimen | Volume
    tilts: TiltScheme
    optics: Optics
    detector: Detector
    values: dict[str, torch.Tensor]
    standard_errors: dict[str, torch.Tensor]
    undetermined: tuple[str, ...]
    intervals: dict[str, tuple[float, float]]
    table: tuple[Identified, ...]
    log_likelihood: float
    gained: float
    dispersion: float
    converged: bool

    def lines(self) -> list[str]:
        """The identifiability table, for people."""
        width = max((len(row.name) for row in self.table), default=4)
        told = [f"{'':{width}s} {'value':>13s} {'std. error':>12s} {'alone':>12s}  with"]
        for row in self.table:
            error = "not told" if math.isinf(row.error) else f"{row.error:.4g}"
            partner = (
                f"{row.partner} ({row.correlation:+.2f})" if row.partner and math.isfinite(row.error) else row.partner
            )
            line = f"{row.name:{width}s} {row.value:>13.6g} {error:>12s} {row.alone:>12.4g}  {partner}"
            if row.name in self.intervals:
                low, high = self.intervals[row.name]
                line += f"  68 %: {low:.5g} to {high:.5g}"
            told.append(line.rstrip())
        told.append(f"{self.gained:,.1f} nat gained; residuals {self.dispersion:.3f} of the counting noise")
        return told


@torch.no_grad()
def calibrate(
    images: TiltSeries | torch.Tensor,
    specimen: Specimen | Volume,
    parameters: Sequence[str],
    *,
    tilts: TiltScheme | None = None,
    optics: Optics | None = None,
    detector: Detector | None = None,
    prior: Mapping[str, float] | None = None,
    sampling: Sampling | None = None,
    scattering: Scattering = multislice,
    profile: Sequence[str] | Literal["doubtful"] = "doubtful",
    iterations: int = 30,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Fit fields of specimen, tilts, lens and camera to images of a specimen that is known.

    Parameters
    ----------
    images : TiltSeries, or tensor (tilt, y, x) or (tilt, frame, y, x)
        Counts [e-/px], as the camera gives them: not normalised. Frames are those of `TiltScheme.frames`.
    specimen : Specimen or Volume
        Of a Volume [V], voxels of the size of pixels; it does not change from frame to frame.
    parameters : sequence of str
        Names of fields: "optics.defocus", "optics.beam_tilt", "specimen.damage.critical.scale",
        "specimen.ice.thickness", "specimen.motion.drift", "detector.dqe", "detector.gain", "tilts.doses" ...; the end
        of a name where one field has it. Fields of the lens that are (tilt,) are fitted for each tilt.
    tilts, optics, detector
        Values to begin with, and of what is not fitted; those of a series come with it. A camera without loss when
        left out. What is found is a maximum near them: begin within a ring of the right defocus, and within the finest
        detail of the right shift.
    prior : mapping of str to float, optional
        Standard deviations about the values to begin with, in the units of the fields.
    sampling : Sampling, optional
        As in `cryosim.simulate`.
    scattering : callable
        `multislice`, or another step of the ladder.
    profile : "doubtful" or sequence of str
        Names of single numbers whose profile likelihood is followed; the doubtful have a standard error ten times the
        one that they would have alone.
    iterations : int
        Most steps.
    progress : callable, optional
        Called with the steps done and the most.

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        For names that are no fields, images that do not fit the tilts or are no counts, or missing tilts or optics.

    Warns
    -----
    UserWarning
        When the maximum was not reached.
    """
    data, names = _data(images, specimen, tilts, optics, detector), list(parameters)
    free = [parameter_of(data.setting, name) for name in names]
    if not free or len({p.name for p in free}) < len(free):
        raise ValueError(f"calibrate: expected one or more names of fields, each once, got {names}.")
    if sum(p.kind == "pixel" for p in free) > 1:
        raise ValueError("calibrate: detector.gain and detector.dark are both of pixels. Fit one of them.")
    widths = {parameter_of(data.setting, name).name: width for name, width in (prior or {}).items()}
    bad = sorted(set(widths) - {p.name for p in free}) or [n for n, w in widths.items() if not w > 0]
    if bad:
        raise ValueError(f"calibrate: prior: expected positive deviations of parameters that are fitted, got {bad}.")
    grid = sampling or (sampling_for(data.setting.detector, data.setting.optics) if _is_specimen(specimen) else None)
    model = Model(data, free, widths, grid, scattering)
    start = model.point({p.name: p.value for p in free})
    best, converged = model.climbed(start, iterations, progress)
    if not converged:
        warnings.warn(
            f"calibrate: no maximum after {iterations} steps. Begin nearer, or allow more iterations.",
            UserWarning,
            stacklevel=2,
        )
    told = _Told(model, best)
    asked = told.doubtful() if profile == "doubtful" else [_single(model, name) for name in profile]
    intervals = {name: _interval(model, best, at, told) for at in asked for name in [model.labels[at]]}
    setting = with_fields(data.setting, best.values)
    return Calibration(
        specimen=setting.specimen,
        tilts=setting.tilts,
        optics=setting.optics,
        detector=setting.detector,
        values=best.values,
        standard_errors=told.by_field(),
        undetermined=tuple(row.name for row in told.rows() if math.isinf(row.error)),
        intervals=intervals,
        table=tuple(told.rows()),
        log_likelihood=best.value,
        gained=best.value - start.value,
        dispersion=best.dispersion,
        converged=converged,
    )


def _is_specimen(specimen: Specimen | Volume) -> bool:
    return isinstance(specimen, Specimen)


def _data(
    images: TiltSeries | torch.Tensor,
    specimen: Specimen | Volume,
    tilts: TiltScheme | None,
    optics: Optics | None,
    detector: Detector | None,
) -> Data:
    if isinstance(images, TiltSeries):
        tilts, optics = tilts or images.tilts, optics or images.optics
        rows, columns = images.images.shape[1:]
        detector = detector or Detector((rows, columns), float(images.pixel_size))
        images = images.images
    if tilts is None or optics is None or detector is None:
        raise ValueError("calibrate: expected tilts, optics and detector with images that are not a TiltSeries.")
    counts = images[:, None] if images.ndim == 3 else images
    fits = counts.ndim == 4 and counts.shape[0] == len(tilts) and counts.shape[1] in (1, tilts.frames)
    if not fits or tuple(counts.shape[2:]) != tuple(detector.shape):
        raise ValueError(
            f"calibrate: expected images ({len(tilts)}, {detector.shape[0]}, {detector.shape[1]}), or "
            f"({len(tilts)}, {tilts.frames}, ...) of frames, got {tuple(images.shape)}."
        )
    check_counts(counts, detector.replace(counting="poisson"))
    return Data(counts.double(), Setting(specimen, tilts, optics, detector))


# what is told ---------------------------------------------------------------------------------------------------------


class _Told:
    """Standard errors and correlations at a point."""

    def __init__(self, model: Model, point: Point) -> None:
        self.model, self.point = model, point
        information, _ = eliminated(point)
        values, vectors, scale = scaled(information)
        told = values > NOTHING
        self.covariance = (vectors[:, told] / values[told]) @ vectors[:, told].T * scale[:, None] * scale
        self.lost = vectors[:, ~told].square()  # (parameter, direction)
        undetermined = (self.lost > _PART**2).any(1)
        self.errors = torch.where(undetermined, math.inf, self.covariance.diagonal().clamp_min(0).sqrt())
        self.alone = torch.where(information.diagonal() > 0, scale, math.inf)

    def doubtful(self) -> list[int]:
        """Places of the numbers that others cost much of what the images tell."""
        wide = self.errors > _DOUBTFUL * self.alone
        return (wide & torch.isfinite(self.errors)).nonzero().flatten().tolist()

    def rows(self) -> list[Identified]:
        at = torch.cat([self.point.values[p.name].flatten() for p in self.model.dense] or [torch.zeros(0)])
        size = self.covariance.diagonal().clamp_min(1e-300).sqrt()
        correlations = self.covariance / size[:, None] / size
        correlations.fill_diagonal_(0.0)
        found = []
        for i, label in enumerate(self.model.labels):
            partner, correlation = "", 0.0
            if math.isinf(float(self.errors[i])):
                among = ((self.lost[i] > _PART**2)[None] & (self.lost > _PART**2)).any(1)
                among[i] = False
                partner = ", ".join(self.model.labels[j] for j in among.nonzero().flatten().tolist())
            elif len(self.model.labels) > 1:
                j = int(correlations[i].abs().argmax())
                correlation = float(correlations[i, j])
                partner = self.model.labels[j] if abs(correlation) > _TOGETHER else ""
            found.append(
                Identified(label, float(at[i]), float(self.errors[i]), float(self.alone[i]), partner, correlation)
            )
        return found

    def by_field(self) -> dict[str, torch.Tensor]:
        model, point = self.model, self.point
        told = {p.name: self.errors[model.places[p.name]].reshape(p.value.shape) for p in model.dense}
        if model.pixels is not None and point.pixel_information is not None and point.cross is not None:
            own = point.pixel_information
            shared = torch.einsum("pyx,pq,qyx->yx", point.cross, self.covariance, point.cross)
            told[model.pixels.name] = torch.where(own > 0, (1 / own + shared / own.square()).sqrt(), math.inf)
        return told


def _single(model: Model, name: str) -> int:
    """Place of one number by its label, or by the end of one."""
    found = [i for i, label in enumerate(model.labels) if label == name or label.endswith(f".{name}")]
    if len(found) != 1:
        raise ValueError(f"calibrate: profile: expected one of {', '.join(model.labels)}, got {name!r}.")
    return found[0]


def _interval(model: Model, best: Point, at: int, told: _Told) -> tuple[float, float]:
    """Where the profile of one number has fallen by 1/2 nat, below and above."""
    here = float(_number(model, best, at))
    error = float(told.errors[at])
    width = error if math.isfinite(error) else abs(here) or 1.0
    along = told.covariance[:, at] / told.covariance[at, at].clamp_min(1e-300)  # where the others go with it
    along[at] = 1.0
    return _side(model, best, at, -width, along), _side(model, best, at, width, along)


def _side(model: Model, best: Point, at: int, width: float, along: torch.Tensor) -> float:
    """Secant steps of the root of the fall, which is near a straight line."""
    here, move, point, fall = float(_number(model, best, at)), width, best, 0.0
    for _ in range(6):
        step = (here + move - float(_number(model, point, at))) * along
        values = model.moved(point.values, step, None)
        if not math.isfinite(model.value_of(values)):
            return here + move if fall else math.copysign(math.inf, width)
        point, _ = model.climbed(model.point(values), 8, held=frozenset([at]))
        fall = best.value - point.value
        if abs(fall - 0.5) < _STEP * 0.5:
            return here + move * math.sqrt(0.5 / fall)
        move *= max(0.4, min(4.0, math.sqrt(0.5 / max(fall, 1e-3))))
    return here + move if fall > 0.25 else math.copysign(math.inf, width)


def _number(model: Model, point: Point, at: int) -> torch.Tensor:
    return torch.cat([point.values[p.name].flatten() for p in model.dense])[at]
