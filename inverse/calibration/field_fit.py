"""Any differentiable field of specimen, tilts, lens and camera, from images of a specimen that is known.

The model is the one that simulates: expected electrons of each exposure and frame, counted by the camera. With k counts
in n camera frames, r(theta) events expected in each, and J = dr / dtheta by forward-mode differentiation,

    log L = sum k log r - n r                          slope J^T (k / r - n)          information J^T (n / r) J      (1)
    log L = sum k log(1 - e^-r) - (n - k) r   (binary)   J^T (k / (e^r - 1) - n + k)   J^T (n / (e^r - 1)) J

and the likelihood is climbed by damped steps information^-1 slope (Fisher scoring). Standard errors are the roots of
the diagonal of the inverse information, the bound of Cramér and Rao. What the images cannot tell shows in it:

- *alone*, 1 / sqrt I_ii, is the error were all else known; its ratio to the standard error says what the others cost;
- directions of the scaled information D^-1/2 I D^-1/2 without any are not determined, nor is what takes part in them.

A profile is the log-likelihood against one parameter with all others at their best. Where it falls by 1/2 nat is a
68 % interval, whatever its shape (Venzon & Moolgavkar 1988, doi:10.2307/2347496).

A value of one tilt, frame or pixel has slopes there only; those of all frames, or pixels, come from one direction.
Values of pixels, of which there are as many as data, are coupled through the others only, and are eliminated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import forward_ad

from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.simulate import Sampling, expected_frames, sampling_for
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.slices import SliceSource
from cryosim.core.volume import Volume
from cryosim.microscope.counting import events_per_frame
from cryosim.microscope.detector import Detector
from cryosim.microscope.likelihood import check_counts, negative_log_likelihood
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import multislice
from cryosim.specimen.specimen import Specimen
from inverse.calibration.named_fields import Parameter, Setting, parameter_of, with_fields
from inverse.calibration.volume_exposure import expected_of_volume

_NOTHING = 1e-9  # of the scaled information: a direction that has less is not determined
_PART = 0.1  # of such a direction, that a parameter takes to be one of it
_DOUBTFUL = 10.0  # times the error that it would have alone: the profile is asked
_TOGETHER = 0.9  # of a correlation that is told
_ENOUGH = 1e-3  # [nat] that a step has to gain
_STEP = 0.3  # most that a step of a profile may miss its height by [nat]

_OF_WAVES = ("optics.voltage", "optics.amplitude_contrast", "optics.beam_tilt")  # of the lens, what slices see too
_FACTORS = ("tilts.doses", "detector.dqe")
_KEPT = 2**27  # samples of exit waves that are kept

Scattering = Callable[..., torch.Tensor]
"""Of (slices, optics): an exit wave."""


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
    model = _Model(data, free, widths, grid, scattering)
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


# data and model -------------------------------------------------------------------------------------------------------


class _Data(NamedTuple):
    """Counts (tilt, frame, y, x), and the setting that they were taken in; one frame is the sum of all."""

    counts: torch.Tensor
    setting: Setting

    @property
    def summed(self) -> bool:
        """Whether the frames of an exposure come as their sum."""
        return self.counts.shape[1] == 1

    def camera_frames(self, tilt: int) -> int:
        tilts = self.setting.tilts
        return tilts.camera_frames(tilt, self.setting.detector.frame_rate) * (tilts.frames if self.summed else 1)


def _is_specimen(specimen: Specimen | Volume) -> bool:
    return isinstance(specimen, Specimen)


def _data(
    images: TiltSeries | torch.Tensor,
    specimen: Specimen | Volume,
    tilts: TiltScheme | None,
    optics: Optics | None,
    detector: Detector | None,
) -> _Data:
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
    return _Data(counts.double(), Setting(specimen, tilts, optics, detector))


class _Point(NamedTuple):
    """Values, and log-likelihood with the prior [nat], its slope and information; of pixels these are (y, x), and
    `cross` (parameter, y, x) couples them to the others."""

    values: dict[str, torch.Tensor]
    value: float
    slope: torch.Tensor
    information: torch.Tensor
    pixel_slope: torch.Tensor | None
    pixel_information: torch.Tensor | None
    cross: torch.Tensor | None
    dispersion: float


class _Waves:
    """Exit waves, kept from one lens to the next: what acts after the specimen does not change them.

    Parameters
    ----------
    scattering : callable
    data : _Data
    names : sequence of str
        Of the parameters.

    Attributes
    ----------
    names : list of str
        Of those that change the waves.
    """

    def __init__(self, scattering: Scattering, data: _Data, names: Sequence[str]) -> None:
        self.scattering = scattering
        fades = getattr(data.setting.specimen, "damage", None) is not None
        self.names = [
            name
            for name in names
            if name.startswith("specimen.")
            or name in _OF_WAVES
            or (name.startswith("tilts.") and (fades or name != "tilts.doses"))
        ]
        self._most = _KEPT // (data.counts.shape[0] * data.setting.tilts.frames)
        self._values: dict[str, torch.Tensor] = {}
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, values: Mapping[str, torch.Tensor], tilt: int) -> Scattering:
        """Scattering of one tilt, frames in their order."""
        mine = {name: values[name] for name in self.names}
        if any(not torch.equal(mine[name], self._values.get(name, mine[name] + 1)) for name in mine):
            self._values, self._kept = mine, {}
        calls = 0

        def scattered(slices: SliceSource, optics: Optics, **how: Any) -> torch.Tensor:
            nonlocal calls
            key, calls = (tilt, calls), calls + 1
            if key in self._kept:
                return self._kept[key]
            wave = self.scattering(slices, optics, **how)
            if wave.numel() <= self._most:
                self._kept[key] = wave
            return wave

        return scattered


class _Model:
    """The likelihood of the counts, for values of the parameters."""

    def __init__(
        self,
        data: _Data,
        free: list[Parameter],
        widths: Mapping[str, float],
        sampling: Sampling | None,
        scattering: Scattering,
    ) -> None:
        self.data, self.free, self.widths = data, free, widths
        self.sampling = sampling
        self.waves = _Waves(scattering, data, [p.name for p in free])
        self.pixels = next((p for p in free if p.kind == "pixel"), None)
        self.dense = [p for p in free if p.kind != "pixel"]
        ends = torch.tensor([0, *(p.value.numel() for p in self.dense)]).cumsum(0).tolist()
        self.places = {p.name: slice(a, b) for p, a, b in zip(self.dense, ends[:-1], ends[1:], strict=True)}
        self.size = ends[-1]
        self.labels = [
            p.name if p.value.ndim == 0 else f"{p.name}[{', '.join(map(str, index))}]"
            for p in self.dense
            for index in torch.ones(p.value.shape).nonzero().tolist()
        ]

    def expected(
        self, values: Mapping[str, torch.Tensor], tilt: int, along: str | None = None
    ) -> tuple[torch.Tensor, Detector]:
        """Electrons (frame, y, x) [e-/px], and the camera; `along` names a value that carries a direction."""
        specimen, tilts, optics, detector = with_fields(self.data.setting, dict(values))
        scattering = self.waves.of(values, tilt) if along not in self.waves.names else self.waves.scattering
        if isinstance(specimen, Volume):
            seen = expected_of_volume(specimen, tilts, optics, detector, tilt, scattering)
        else:
            seen = expected_frames(
                specimen, tilts, optics, detector, tilt, sampling=self.sampling, scattering=scattering
            )
        return (seen.sum(0, keepdim=True) if self.data.summed else seen), detector

    def value_of(self, values: Mapping[str, torch.Tensor]) -> float:
        """Log-likelihood with the prior [nat]; -inf where no noun has such values."""
        total = -self.penalty(values)
        try:
            for i, counts in enumerate(self.data.counts):
                seen, detector = self.expected(values, i)
                total -= float(
                    negative_log_likelihood(counts, seen.double(), detector, self.data.camera_frames(i)).sum()
                )
        except ValueError:  # a damage below 0, an astigmatism too large ...: outside of what the fields allow
            return -math.inf
        return total if math.isfinite(total) else -math.inf

    def penalty(self, values: Mapping[str, torch.Tensor]) -> float:
        start = {p.name: p.value for p in self.free}
        return sum(float((values[n] - start[n]).square().sum()) / (2 * w**2) for n, w in self.widths.items())

    def point(self, values: dict[str, torch.Tensor]) -> _Point:
        """Equation (1), of all exposures and the prior."""
        value, size = -self.penalty(values), self.size
        slope, information = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        shape = self.data.counts.shape[2:] if self.pixels else (0, 0)
        pixel_slope, pixel_information = torch.zeros(2, *shape, dtype=torch.float64)
        cross = torch.zeros(size, *shape, dtype=torch.float64)
        squares = 0.0
        for i, counts in enumerate(self.data.counts):
            n = self.data.camera_frames(i)
            seen, detector = self.expected(values, i)
            value -= float(negative_log_likelihood(counts, seen.double(), detector, n).sum())
            rate = events_per_frame(seen.double(), detector, n).clamp_min(1e-12)
            if detector.counting == "binary":
                weight, score = n / torch.expm1(rate), counts / torch.expm1(rate) - n + counts
            else:
                weight, score = n / rate, counts / rate - n
            squares += float((score.square() / weight).sum())
            columns, slopes = self._slopes(values, i, n)  # (column,), (column, frame, y, x)
            flat = slopes.flatten(1)
            slope.index_add_(0, columns, flat @ score.flatten())
            information[columns[:, None], columns] += (flat * weight.flatten()) @ flat.T
            if self.pixels is not None:
                own = self._directed(values, self.pixels.name, torch.ones_like(self.pixels.value), i, n)
                pixel_slope += (own * score).sum(0)
                pixel_information += (own.square() * weight).sum(0)
                cross.index_add_(0, columns, (slopes * (own * weight)).sum(1))
        for name, width in self.widths.items():
            off = next(p.value for p in self.free if p.name == name) - values[name]
            if name in self.places:
                at = self.places[name]
                slope[at] += off.flatten() / width**2
                information.diagonal()[at] += width**-2
            else:
                pixel_slope += off / width**2
                pixel_information += width**-2
        of_pixels = (pixel_slope, pixel_information, cross) if self.pixels else (None, None, None)
        return _Point(values, value, slope, information, *of_pixels, squares / self.data.counts.numel())

    def _slopes(self, values: Mapping[str, torch.Tensor], tilt: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the parameters that act on a tilt (column,), and slopes of its rates (column, frame, y, x)."""
        places, slopes = [], []
        frames = self.data.counts.shape[1]
        for p in self.dense:
            start = self.places[p.name].start
            index = torch.arange(p.value.numel()).reshape(p.value.shape)
            mine = index if p.kind == "common" else index[tilt]
            together = p.kind == "frame" and frames > 1
            for group in mine.flatten(1).T if together else mine.reshape(-1, 1):
                direction = torch.zeros(p.value.numel(), dtype=torch.float64)
                direction[group] = 1.0
                seen = self._directed(values, p.name, direction.reshape(p.value.shape), tilt, n)
                for f, place in enumerate(group.tolist()):
                    own = torch.zeros_like(seen)
                    own[f if together else slice(None)] = seen[f if together else slice(None)]
                    places.append(start + place)
                    slopes.append(own)
        shape = (0, *self.data.counts.shape[1:])
        return torch.tensor(places, dtype=torch.long), torch.stack(slopes) if slopes else torch.zeros(shape).double()

    def _directed(
        self, values: Mapping[str, torch.Tensor], name: str, direction: torch.Tensor, tilt: int, n: int
    ) -> torch.Tensor:
        """Slope (frame, y, x) of the rates of a tilt along a direction of one parameter."""
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # torch's own, of its first dual number
            dual = forward_ad.make_dual(values[name], direction)
            seen, detector = self.expected({**values, name: dual}, tilt, name)
            tangent = forward_ad.unpack_dual(events_per_frame(seen.double(), detector, n)).tangent
        return torch.zeros_like(seen, dtype=torch.float64) if tangent is None else tangent

    # the climb

    def moved(self, values: Mapping[str, torch.Tensor], step: torch.Tensor, pixels: torch.Tensor | None) -> dict:
        """Values a step (parameter,), and of pixels (y, x), away."""
        new = dict(values)
        for p in self.dense:
            old, change = values[p.name], step[self.places[p.name]].reshape(p.value.shape)
            # factors of one another: valleys between these are straight in their logarithms
            factor = p.name in _FACTORS and bool((old > 0).all())
            new[p.name] = old * torch.exp((change / old).clamp(-3, 3)) if factor else old + change
        if self.pixels is not None and pixels is not None:
            new[self.pixels.name] = (values[self.pixels.name] + pixels).clamp_min(0.0)
        return new

    def outside(self, values: Mapping[str, torch.Tensor], step: torch.Tensor) -> frozenset[int]:
        """Places of the numbers that a step alone would take where the nouns allow none: a damage below 0 ..."""
        moved, found = self.moved(values, step, None), []
        for p in self.dense:
            if self.allowed({p.name: moved[p.name]}):
                continue
            old, new = values[p.name].flatten(), moved[p.name].flatten()
            for i in range(len(old)):
                one = old.clone()
                one[i] = new[i]
                if not self.allowed({p.name: one.reshape(p.value.shape)}):
                    found.append(self.places[p.name].start + i)
        return frozenset(found)

    def allowed(self, values: dict[str, torch.Tensor]) -> bool:
        try:
            with_fields(self.data.setting, values)
        except ValueError:
            return False
        return True

    def climbed(
        self,
        point: _Point,
        iterations: int,
        progress: Callable[[int, int], None] | None = None,
        held: frozenset[int] = frozenset(),
    ) -> tuple[_Point, bool]:
        """The maximum near a point, with some numbers held; and whether it was reached."""
        damping, converged = 1e-3, False
        for i in range(iterations):
            gained = 0.0
            for _ in range(8):
                step, pixels = _step(point, damping, held)
                outside = self.outside(point.values, step)
                if outside:
                    step, pixels = _step(point, damping, held | outside)
                if _promised(point, step, pixels) < _ENOUGH:
                    break
                values = self.moved(point.values, step, pixels)
                new = self.value_of(values)
                if new > point.value:
                    gained, damping = new - point.value, damping / 8
                    point = self.point(values)
                    break
                damping = max(damping, 1e-6) * 8
            if progress is not None:
                progress(i + 1, iterations)
            if gained < _ENOUGH:
                converged = True
                break
        return point, converged


def _promised(point: _Point, step: torch.Tensor, pixels: torch.Tensor | None) -> float:
    """What a step gains if the likelihood is a parabola [nat]."""
    gain = float(point.slope @ step)
    if pixels is not None and point.pixel_slope is not None:
        gain += float((point.pixel_slope * pixels).sum())
    return 0.5 * gain


def _eliminated(point: _Point) -> tuple[torch.Tensor, torch.Tensor]:
    """Information (parameter, parameter) and slope of what is not of pixels, with these at their best."""
    if point.cross is None or point.pixel_information is None or point.pixel_slope is None:
        return point.information, point.slope
    own = point.pixel_information.clamp_min(1e-300)
    over = point.cross / own
    information = point.information - over.flatten(1) @ point.cross.flatten(1).T
    return information, point.slope - over.flatten(1) @ point.pixel_slope.flatten()


def _step(point: _Point, damping: float, held: frozenset[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    information, slope = _eliminated(point)
    kept = torch.ones(len(slope), dtype=torch.bool)
    kept[list(held)] = False
    values, vectors, scale = _scaled(information[kept][:, kept])
    inner = vectors.T @ (slope[kept] * scale)
    step = torch.zeros_like(slope)
    step[kept] = scale * (vectors @ (inner / (values.clamp_min(_NOTHING) + damping) * (values > _NOTHING)))
    if point.cross is None or point.pixel_slope is None or point.pixel_information is None:
        return step, None
    left = point.pixel_slope - torch.einsum("pyx,p->yx", point.cross, step)
    return step, left / (point.pixel_information * (1 + damping)).clamp_min(1e-300)


def _scaled(information: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues and vectors of D^-1/2 I D^-1/2, and D^-1/2; of what acts on nothing D is 1."""
    diagonal = information.diagonal()
    scale = torch.where(diagonal > 0, diagonal.clamp_min(1e-300).rsqrt(), 1.0)
    values, vectors = torch.linalg.eigh(information * scale[:, None] * scale)
    return values, vectors, scale


# what is told ---------------------------------------------------------------------------------------------------------


class _Told:
    """Standard errors and correlations at a point."""

    def __init__(self, model: _Model, point: _Point) -> None:
        self.model, self.point = model, point
        information, _ = _eliminated(point)
        values, vectors, scale = _scaled(information)
        told = values > _NOTHING
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


def _single(model: _Model, name: str) -> int:
    """Place of one number by its label, or by the end of one."""
    found = [i for i, label in enumerate(model.labels) if label == name or label.endswith(f".{name}")]
    if len(found) != 1:
        raise ValueError(f"calibrate: profile: expected one of {', '.join(model.labels)}, got {name!r}.")
    return found[0]


def _interval(model: _Model, best: _Point, at: int, told: _Told) -> tuple[float, float]:
    """Where the profile of one number has fallen by 1/2 nat, below and above."""
    here = float(_number(model, best, at))
    error = float(told.errors[at])
    width = error if math.isfinite(error) else abs(here) or 1.0
    along = told.covariance[:, at] / told.covariance[at, at].clamp_min(1e-300)  # where the others go with it
    along[at] = 1.0
    return _side(model, best, at, -width, along), _side(model, best, at, width, along)


def _side(model: _Model, best: _Point, at: int, width: float, along: torch.Tensor) -> float:
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


def _number(model: _Model, point: _Point, at: int) -> torch.Tensor:
    return torch.cat([point.values[p.name].flatten() for p in model.dense])[at]
