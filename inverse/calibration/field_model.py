"""The likelihood of counts as a function of named fields, and the climb to its maximum.

With k counts in n camera frames, r(theta) events expected in each, and J = dr / dtheta by forward-mode differentiation,

    log L = sum k log r - n r                          slope J^T (k / r - n)          information J^T (n / r) J      (1)
    log L = sum k log(1 - e^-r) - (n - k) r   (binary)   J^T (k / (e^r - 1) - n + k)   J^T (n / (e^r - 1)) J

is climbed by damped steps information^-1 slope (Fisher scoring). A value of one tilt, frame or pixel has slopes there
only; those of all frames, or pixels, come from one direction. Values of pixels, of which there are as many as data, are
coupled through the others only, and are eliminated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from cryosim.acquisition.simulate import Sampling, expected_frames
from cryosim.core.slices import SliceSource
from cryosim.core.volume import Volume
from cryosim.microscope.counting import events_per_frame
from cryosim.microscope.detector import Detector
from cryosim.microscope.likelihood import negative_log_likelihood
from cryosim.microscope.optics import Optics
from inverse.calibration.named_fields import Parameter, Setting, with_fields
from inverse.calibration.volume_exposure import expected_of_volume

NOTHING = 1e-9
"""Of the scaled information: a direction that has less is not determined."""
_ENOUGH = 1e-3  # [nat] that a step has to gain
_OF_WAVES = ("optics.voltage", "optics.amplitude_contrast", "optics.beam_tilt")  # of the lens, what slices see too
_FACTORS = ("tilts.doses", "detector.dqe")
_KEPT = 2**27  # samples of exit waves that are kept

Scattering = Callable[..., torch.Tensor]
"""Of (slices, optics): an exit wave."""


class Data(NamedTuple):
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


class Point(NamedTuple):
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


class Waves:
    """Exit waves, kept from one lens to the next: what acts after the specimen does not change them.

    Parameters
    ----------
    scattering : callable
    data : Data
    names : sequence of str
        Of the parameters.

    Attributes
    ----------
    names : list of str
        Of those that change the waves.
    """

    def __init__(self, scattering: Scattering, data: Data, names: Sequence[str]) -> None:
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


class Model:
    """The likelihood of the counts, for values of the parameters."""

    def __init__(
        self,
        data: Data,
        free: list[Parameter],
        widths: Mapping[str, float],
        sampling: Sampling | None,
        scattering: Scattering,
    ) -> None:
        self.data, self.free, self.widths = data, free, widths
        self.sampling = sampling
        self.waves = Waves(scattering, data, [p.name for p in free])
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

    def point(self, values: dict[str, torch.Tensor]) -> Point:
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
        return Point(values, value, slope, information, *of_pixels, squares / self.data.counts.numel())

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
        point: Point,
        iterations: int,
        progress: Callable[[int, int], None] | None = None,
        held: frozenset[int] = frozenset(),
    ) -> tuple[Point, bool]:
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


def _promised(point: Point, step: torch.Tensor, pixels: torch.Tensor | None) -> float:
    """What a step gains if the likelihood is a parabola [nat]."""
    gain = float(point.slope @ step)
    if pixels is not None and point.pixel_slope is not None:
        gain += float((point.pixel_slope * pixels).sum())
    return 0.5 * gain


def eliminated(point: Point) -> tuple[torch.Tensor, torch.Tensor]:
    """Information (parameter, parameter) and slope of what is not of pixels, with these at their best."""
    if point.cross is None or point.pixel_information is None or point.pixel_slope is None:
        return point.information, point.slope
    own = point.pixel_information.clamp_min(1e-300)
    over = point.cross / own
    information = point.information - over.flatten(1) @ point.cross.flatten(1).T
    return information, point.slope - over.flatten(1) @ point.pixel_slope.flatten()


def _step(point: Point, damping: float, held: frozenset[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    information, slope = eliminated(point)
    kept = torch.ones(len(slope), dtype=torch.bool)
    kept[list(held)] = False
    values, vectors, scale = scaled(information[kept][:, kept])
    inner = vectors.T @ (slope[kept] * scale)
    step = torch.zeros_like(slope)
    step[kept] = scale * (vectors @ (inner / (values.clamp_min(NOTHING) + damping) * (values > NOTHING)))
    if point.cross is None or point.pixel_slope is None or point.pixel_information is None:
        return step, None
    left = point.pixel_slope - torch.einsum("pyx,p->yx", point.cross, step)
    return step, left / (point.pixel_information * (1 + damping)).clamp_min(1e-300)


def scaled(information: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues and vectors of D^-1/2 I D^-1/2, and D^-1/2; of what acts on nothing D is 1."""
    diagonal = information.diagonal()
    scale = torch.where(diagonal > 0, diagonal.clamp_min(1e-300).rsqrt(), 1.0)
    values, vectors = torch.linalg.eigh(information * scale[:, None] * scale)
    return values, vectors, scale
