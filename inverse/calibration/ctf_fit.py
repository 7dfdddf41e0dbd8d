"""Defocus, astigmatism and more of a lens from the Thon rings of one image, with standard errors.

The model and its likelihood stand in `inverse.calibration.ring_model`. Rings are dense far out, and the likelihood has
many maxima: the search begins with the coarse rings, of all defoci, and goes on to finer ones as long as these say
anything. Nothing is given to begin with, and nothing is drawn at random.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from cryosim.core.constants import wavelength
from cryosim.microscope.optics import Optics
from inverse.calibration.ring_model import COARSEST, SCALES, RingModel, State, optics_of
from inverse.calibration.thon_rings import Cells, joined, polar_cells, tile_cells

_LIMITS = (10.0, 8.0, 6.6, 5.6, 4.8, 4.2, 3.7, 3.3, 3.0, 2.7, 2.45)
"""Periods [Å] to which rings are used, one after another."""
_EVIDENCE = 8.0  # [nat] that the rings of a band must bring
_FOUND = 20.0  # [nat] that all rings must bring: the best of as many lenses as are tried brings 10 in noise
_THICK = 10.0  # [nat] that a thickness must bring
_RINGS = 16.0  # the most, up to a limit, with which a defocus is searched for

Field = Literal["phase_shift", "amplitude_contrast", "spherical_aberration", "pixel_size", "thickness", "tilt"]
_FIELDS: dict[str, tuple[str, ...]] = {
    "phase_shift": ("phase_shift",),
    "amplitude_contrast": ("amplitude_contrast",),
    "spherical_aberration": ("spherical_aberration",),
    "pixel_size": ("magnification",),
    "thickness": ("thickness",),
    "tilt": ("rise_x", "rise_y"),
}
_WIDEST = {
    "defocus": 2e4,
    "phase_shift": 60.0,
    "amplitude_contrast": 0.3,
    "spherical_aberration": 3.0,
    "pixel_size": 0.3,
    "thickness": 5e3,
    "rise_x": 1.0,
    "rise_y": 1.0,
}
"""Standard errors above which a value is not determined, in the units of `SCALES`; of the pixel size, relative."""


class CtfFit(NamedTuple):
    """What `fit_ctf` returns.

    Attributes
    ----------
    optics : Optics
        That was found; fields that were not fitted are as given.
    standard_errors : dict of str to float
        Of "defocus" [Å], "astigmatism" [Å], "astigmatism_angle" [deg], and of what else was fitted, in its unit;
        infinite where the image does not tell. From the Fisher information, or from how the tiles of the image differ,
        where that is more.
    undetermined : tuple of str
        Names of which that is so.
    resolution : float
        Finest period of the rings that were used [Å].
    thickness : float
        Of the specimen [Å]; 0 where the rings show none.
    thickness_margin : float
        By how much the rings are more likely with a thickness than without [nat].
    pixel_size : float
        As given, or as fitted [Å].
    rise : (float, float)
        Of the specimen's height along x and y of the image [1]: the tangents of its tilt.
    decay : float
        B of the rings' amplitude, exp(-B k^2 / 4), of lens, motion, camera and specimen together [Å^2].
    log_likelihood : float
        Over that of a spectrum without rings [nat].
    dispersion : float
        Mean square of the residuals over what the likelihood expects.
    radius, power, background, gain, rings : tensor (ring,)
        Means over azimuths: |k| [1/Å]; powers, b and g [square of the image's unit]; T [1].
    """

    optics: Optics
    standard_errors: dict[str, float]
    undetermined: tuple[str, ...]
    resolution: float
    thickness: float
    thickness_margin: float
    pixel_size: float
    rise: tuple[float, float]
    decay: float
    log_likelihood: float
    dispersion: float
    radius: torch.Tensor
    power: torch.Tensor
    background: torch.Tensor
    gain: torch.Tensor
    rings: torch.Tensor

    def lines(self) -> list[str]:
        """The figures, for people."""
        units = {
            "astigmatism_angle": "deg",
            "phase_shift": "deg",
            "amplitude_contrast": "",
            "spherical_aberration": "mm",
        }
        own = {
            "pixel_size": self.pixel_size,
            "thickness": self.thickness,
            "rise_x": self.rise[0],
            "rise_y": self.rise[1],
        }
        told = []
        for name, error in self.standard_errors.items():
            value, unit = own.get(name, getattr(self.optics, name, math.nan)), units.get(name, "Å")
            unit = "" if name.startswith("rise") else unit
            digits = 0 if unit == "Å" and name != "pixel_size" else 4
            margin = "not determined" if math.isinf(error) else f"± {error:,.{digits}f} {unit}"
            told.append(f"{name:20s} {value:>12,.{digits}f} {margin}")
        told.append(f"{'rings to':20s} {self.resolution:>12.2f} Å")
        told.append(f"{'thickness margin':20s} {self.thickness_margin:>12.1f} nat")
        return told


@torch.no_grad()
def fit_ctf(
    image: torch.Tensor,
    pixel_size: float,
    voltage: float,
    spherical_aberration: float = 2.7,
    amplitude_contrast: float = 0.07,
    *,
    phase_shift: float = 0.0,
    fit: Sequence[Field] = (),
    thickness: float | None = None,
    tilt: float = 0.0,
    axis_angle: float = 0.0,
    defocus_range: tuple[float, float] = (1_000.0, 80_000.0),
    finest: float | None = None,
) -> CtfFit:
    """Fit the lens to the Thon rings of an image.

    Parameters
    ----------
    image : tensor (y, x) or (frame, y, x)
        Counts, in any unit; frames of a movie, aligned, are summed.
    pixel_size : float
        [Å].
    voltage : float
        [kV].
    spherical_aberration : float
        [mm].
    amplitude_contrast : float
        [1].
    phase_shift : float
        Of a phase plate [deg].
    fit : sequence of str
        What to fit beside defocus and astigmatism: "phase_shift", "amplitude_contrast", "spherical_aberration",
        "pixel_size", "thickness", "tilt". What the image cannot tell apart is said to be undetermined.
    thickness : float, optional
        Of the specimen [Å]. When left out it is fitted, and kept where the rings are more likely by 10 nat.
    tilt, axis_angle : float
        Of the specimen [deg]; the defocus is that of the image's middle.
    defocus_range : (float, float)
        To search [Å].
    finest : float, optional
        Period beyond which rings are not looked for [Å].

    Returns
    -------
    CtfFit

    Raises
    ------
    ValueError
        For an image that is too small or not finite, unknown names, or numbers out of bounds.

    Warns
    -----
    UserWarning
        When no rings are found.
    """
    stack = expect_image(image, pixel_size, voltage, defocus_range, fit)
    limits = limits_of("fit_ctf", pixel_size, finest)
    fixed = Optics(
        voltage,
        spherical_aberration=spherical_aberration,
        amplitude_contrast=amplitude_contrast,
        phase_shift=phase_shift,
    )
    rise_x, rise_y = rise_of(tilt, axis_angle)
    lens = lens_of(fixed) | {"thickness": thickness or 0.0, "rise_x": rise_x, "rise_y": rise_y}
    tile = None if tilt == 0 and "tilt" not in fit else tile_of(stack, pixel_size)
    parts = tile_cells(stack, pixel_size, limits[-1], tile or max(128, min(stack.shape) // 4))
    cells = joined(parts) if tile else polar_cells(stack, pixel_size, limits[-1])
    seen = Seen(cells, fixed, limits)
    free = ["defocus", "along", "across"]
    extra = [name for field in fit for name in _FIELDS[field] if name != "thickness"]
    state, limit = searched(seen, lens, defocus_range, "phase_shift" in fit)
    early = [name for name in extra if name in ("phase_shift", "rise_x", "rise_y")]
    state, limit = refined(seen, state, [*free, *early], limit)
    margin = 0.0
    if thickness is None:
        thick, finer = thickened(seen, state, [*free, *early], limit)
        model = seen.model(min(limit, finer))
        with_it = model.climbed(thick, [*free, *early, "thickness"])
        without = model.climbed(state, [*free, *early])
        margin = model.log_likelihood(with_it) - model.log_likelihood(without)
        if margin > _THICK or "thickness" in fit:
            state, limit, extra = thick, finer, [*extra, "thickness"]
    elif "thickness" in fit:
        extra = [*extra, "thickness"]
    model = seen.model(limit)
    state = model.climbed(state, [*free, *extra])
    by_tile = [RingModel(part.within(COARSEST, limit), fixed) for part in parts]
    return _result(model, by_tile, state, [*free, *extra], limit, margin, pixel_size)


def expect_image(
    image: torch.Tensor, pixel_size: float, voltage: float, defocus_range: tuple[float, float], fit: Sequence[str]
) -> torch.Tensor:
    """The image (y, x), of frames their sum."""
    if image.ndim not in (2, 3) or min(image.shape[-2:]) < 128:
        raise ValueError(
            f"fit_ctf: expected an image (y, x) of 128 pixels or more, or frames, got {tuple(image.shape)}."
        )
    for name, value in (("pixel_size", pixel_size), ("voltage", voltage)):
        if not 0 < value < math.inf:
            raise ValueError(f"fit_ctf: expected a positive {name}, got {value}.")
    if not 0 <= defocus_range[0] < defocus_range[1]:
        raise ValueError(f"fit_ctf: expected a defocus_range (least, greatest) [Å] of underfocus, got {defocus_range}.")
    unknown = sorted(set(fit) - set(_FIELDS))
    if unknown:
        raise ValueError(f"fit_ctf: expected names of {', '.join(_FIELDS)} in fit, got {', '.join(unknown)}.")
    stack = image.double().sum(0) if image.ndim == 3 else image.double()
    if not bool(torch.isfinite(stack).all()) or float(stack.std()) == 0:
        raise ValueError("fit_ctf: expected an image of finite numbers that are not all the same.")
    return stack


def limits_of(caller: str, pixel_size: float, finest: float | None) -> list[float]:
    """Periods [Å], falling, that pixels hold and that are not beyond `finest`."""
    limits = [limit for limit in _LIMITS if limit > max(2.1 * pixel_size, finest or 0.0)]
    if len(limits) < 2:
        raise ValueError(f"{caller}: expected pixels below {_LIMITS[1] / 2.1:.1f} Å, got {pixel_size} Å.")
    return limits


def lens_of(optics: Optics) -> dict[str, float]:
    """All of `SCALES` but the defocus, of a round lens and a thin, level specimen."""
    names = ("phase_shift", "amplitude_contrast", "spherical_aberration")
    plain = dict.fromkeys(("along", "across", "thickness", "rise_x", "rise_y"), 0.0)
    return plain | {"magnification": 1.0} | {name: float(getattr(optics, name)) for name in names}


def rise_of(tilt: float, axis_angle: float) -> tuple[float, float]:
    """Slope of the heights of a tilted slab along x and y of its image: z = -tan(tilt) across the axis."""
    slope, axis = -math.tan(math.radians(tilt)), math.radians(axis_angle)
    return slope * math.cos(axis), slope * math.sin(axis)


def tile_of(image: torch.Tensor, pixel_size: float) -> int:
    """Edge of tiles for a tilted specimen [px]: about 700 Å, that a few heights are apart and rings are still fine."""
    return int(min(min(image.shape), max(128, 2 * round(350 / pixel_size))))


# the search -----------------------------------------------------------------------------------------------------------


class Seen:
    """Models of one image's cells up to several limits, each made when it is asked for."""

    def __init__(self, cells: Cells, fixed: Optics, limits: list[float]) -> None:
        self.cells, self.fixed, self.limits = cells, fixed, limits
        self._models: dict[tuple[float, float], RingModel] = {}

    def model(self, finest: float, coarsest: float = COARSEST) -> RingModel:
        """Of the cells between two periods [Å]."""
        key = (coarsest, finest)
        if key not in self._models:
            self._models[key] = RingModel(self.cells.within(coarsest, finest), self.fixed)
        return self._models[key]


def searched(seen: Seen, lens: dict[str, float], bounds: tuple[float, float], any_phase: bool) -> tuple[State, float]:
    """The best of all defoci by coarse rings, and the period [Å] to which these were taken.

    Of little defocus the coarse rings say nothing, and of much the fine ones are too dense for a search: each limit has
    its own share of the range.
    """
    shifts = (0.0, 45.0, 90.0, 135.0) if any_phase else (lens["phase_shift"],)
    free = ["defocus", "along", "across", *(["phase_shift"] if any_phase else [])]
    best: tuple[float, State, float] | None = None
    for limit in seen.limits[::2][:3]:
        model = seen.model(limit)
        most = min(bounds[1], max(2 * bounds[0], _RINGS * limit**2 / float(wavelength(float(seen.fixed.voltage)))))
        found = [
            c for shift in shifts for c in candidates(model, lens | {"phase_shift": shift}, (bounds[0], most), limit)
        ]
        for _, one in sorted(found, key=lambda pair: -pair[0])[:4]:
            state = model.climbed(model.begun(one), free, 15)
            gained = model.log_likelihood(state) - model.without_rings()
            if best is None or gained > best[0]:
                best = gained, state, limit
    assert best is not None
    return best[1], best[2]


def candidates(
    model: RingModel, lens: dict[str, float], bounds: tuple[float, float], limit: float
) -> list[tuple[float, dict[str, float]]]:
    """Lenses that stand out, with their scores: the best astigmatism of each of several defoci.

    A sector of one tile sees one defocus; what each defocus scores in each sector is tabled once, and a lens with
    astigmatism is a curve through that table.
    """
    step = 0.06 * limit**2 / float(wavelength(float(model.fixed.voltage)))
    widest = 0.25 * bounds[1]
    least = max(0.3 * step, bounds[0] - 0.5 * widest)
    tried = torch.arange(least, bounds[1] + 0.5 * widest, step, dtype=torch.float64)
    products, squares, group, azimuth, height = model.table(lens, tried)
    middles = torch.arange(max(bounds[0], step), bounds[1] + step, step, dtype=torch.float64)
    sizes = torch.arange(0, min(widest, 40 * step), 3 * step, dtype=torch.float64)
    turns = torch.arange(12, dtype=torch.float64) * (math.pi / 12)
    found = []
    for size in sizes.tolist():
        for turn in turns.tolist()[: 12 if size else 1]:
            seen = middles[:, None] + size / 2 * torch.cos(2 * (azimuth - turn)) + height
            at = ((seen - least) / step).round().long().clamp(0, len(tried) - 1)
            score = products[at, group].sum(1) / squares[at, group].sum(1).sqrt().clamp_min(1e-30)
            score = torch.where(size <= torch.clamp(0.25 * middles, min=4 * step), score, -math.inf)
            for i in score.topk(min(4, len(score))).indices.tolist():
                along, across = size * math.cos(2 * turn), size * math.sin(2 * turn)
                found.append((float(score[i]), lens | {"defocus": float(middles[i]), "along": along, "across": across}))
    found.sort(key=lambda pair: -pair[0])
    apart: list[tuple[float, dict[str, float]]] = []
    for score, one in found:
        if all(abs(one["defocus"] - other["defocus"]) > 2 * step for _, other in apart):
            apart.append((score, one))
        if len(apart) == 4:
            break
    return apart


def refined(seen: Seen, state: State, free: list[str], limit: float) -> tuple[State, float]:
    """Rings beyond a limit, band by band, while they say anything; the state, and the finest period [Å]."""
    state = seen.model(limit).climbed(state, free)
    for finer in [f for f in seen.limits if f < limit]:
        candidate = seen.model(finer).climbed(state, free)
        band = seen.model(finer, limit)
        if band.score(candidate.lens, band.smooth()) < math.sqrt(2 * _EVIDENCE):
            break
        state, limit = candidate, finer
    return state, limit


def thickened(seen: Seen, state: State, free: list[str], limit: float) -> tuple[State, float]:
    """Likewise with a thickness, from several to begin with."""
    at = min(limit, seen.limits[min(4, len(seen.limits) - 1)])
    model, names = seen.model(at), [*free, "thickness"]
    starts = [state._replace(lens=state.lens | {"thickness": t}) for t in (400.0, 1000.0, 2000.0)]
    best = max((model.climbed(start, names, 20) for start in starts), key=model.log_likelihood)
    return refined(seen, best, names, at)


# the result -----------------------------------------------------------------------------------------------------------


def _result(
    model: RingModel,
    tiles: list[RingModel],
    state: State,
    free: list[str],
    limit: float,
    margin: float,
    pixel_size: float,
) -> CtfFit:
    information, _, dispersion = model.information(state, free)
    covariance = covariance_of(information)[: len(free), : len(free)]
    widening = _widening(tiles, state, free, covariance)
    told = _errors(covariance * widening[:, None] * widening, state.lens, free, pixel_size)
    gained = model.log_likelihood(state) - model.without_rings()
    if gained < _FOUND:
        told = dict.fromkeys(told, math.inf)
        warnings.warn(
            f"fit_ctf: the image shows no Thon rings: with them it is more likely by {gained:.1f} nat only. Narrow the "
            "defocus_range, or take an image of more dose or defocus.",
            UserWarning,
            stacklevel=3,
        )
    optics = optics_of(model.fixed, state.lens)
    names = ("defocus", "astigmatism", "astigmatism_angle")
    optics = optics.replace(**{name: float(getattr(optics, name)) for name in names})
    mean, background, gain = model.expected(state)
    lens = state.lens
    return CtfFit(
        optics=optics,
        standard_errors=told,
        undetermined=tuple(name for name, error in told.items() if math.isinf(error)),
        resolution=limit,
        thickness=lens["thickness"],
        thickness_margin=margin,
        pixel_size=pixel_size * lens["magnification"],
        rise=(lens["rise_x"], lens["rise_y"]),
        decay=_decay(model, gain),
        log_likelihood=gained,
        dispersion=dispersion,
        **_profiles(model, background, gain, (mean - background) / gain),
    )


def _widening(tiles: list[RingModel], state: State, free: list[str], covariance: torch.Tensor) -> torch.Tensor:
    """By how much the tiles of an image differ more than their noise lets them (parameter,), at least 1.

    A step from the common lens, for each tile alone, is what that tile would have found. A real specimen is neither
    white nor flat; its image says so here.
    """
    shared = [name for name in free if not name.startswith("rise")]
    steps, weights = [], []
    for tile in tiles:
        own = tile.climbed(state, [], 10)
        information, slope, _ = tile.information(own, shared)
        inverse = covariance_of(information)
        steps.append((inverse @ slope)[: len(shared)])
        weights.append(1 / inverse.diagonal()[: len(shared)])
    widening = torch.ones(len(free), dtype=torch.float64)
    if len(tiles) < 4:
        return widening
    step, weight = torch.stack(steps), torch.stack(weights)
    step, share = step.clamp(-1, 1), weight / weight.sum(0)  # a step of one tile is long where it says nothing
    off = step - (share * step).sum(0)
    variance = (share.square() * off.square()).sum(0) * len(tiles) / (len(tiles) - 1)
    for i, name in enumerate(shared):
        at = free.index(name)
        widening[at] = max(1.0, float(variance[i] / covariance[at, at]) ** 0.5)
    return widening


def covariance_of(information: torch.Tensor) -> torch.Tensor:
    """Covariance, of which what is not known at all is very large."""
    scale = information.diagonal().clamp_min(1e-12).rsqrt()
    values, vectors = torch.linalg.eigh(information * scale[:, None] * scale)
    return (vectors / values.clamp_min(1e-12)) @ vectors.T * scale[:, None] * scale


def _errors(covariance: torch.Tensor, lens: dict[str, float], free: list[str], pixel_size: float) -> dict[str, float]:
    """Standard errors by the names of the optics; infinite where they are too wide to say anything."""
    errors = {name: float(covariance[i, i]) ** 0.5 * SCALES[name] for i, name in enumerate(free)}
    told = {"defocus": errors.pop("defocus")}
    told |= {name: float(error) for name, error in astigmatism_errors(covariance, lens, free).items()}
    del errors["along"], errors["across"]
    if "magnification" in errors:
        told["pixel_size"] = errors.pop("magnification")
    told |= errors
    told = {name: error if error < _WIDEST.get(name, math.inf) else math.inf for name, error in told.items()}
    if "pixel_size" in told:
        told["pixel_size"] *= pixel_size
    return told


def astigmatism_errors(covariance: torch.Tensor, lens: dict[str, float], free: list[str]) -> dict[str, torch.Tensor]:
    """Standard errors of the size [Å] and the angle [deg], which is not determined below three errors of the size."""
    i, j = free.index("along"), free.index("across")
    block = covariance[[[i, i], [j, j]], [[i, j], [i, j]]] * SCALES["along"] ** 2
    size, turn = math.hypot(lens["along"], lens["across"]), math.atan2(lens["across"], lens["along"])
    towards = torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)
    sideways = torch.tensor([-math.sin(turn), math.cos(turn)], dtype=torch.float64)
    spread, across = ((v @ block @ v).sqrt() for v in (towards, sideways))
    told = size > 3 * max(float(spread), float(across))
    angle = torch.rad2deg(across / size) / 2 if told else torch.tensor(math.inf, dtype=torch.float64)
    return {"astigmatism": spread, "astigmatism_angle": angle}


def _decay(model: RingModel, gain: torch.Tensor) -> float:
    """B [Å^2] of g = c exp(-B k^2 / 2), by least squares over the cells."""
    square, n = model.cells.radius.square(), model.cells.samples
    centred = square - (n * square).sum() / n.sum()
    return -2 * float((n * centred * gain.log()).sum() / (n * centred.square()).sum())


def _profiles(model: RingModel, *curves: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over the cells of each ring of radius, power, and the curves."""
    cells = model.cells
    width = 1.02 * float(cells.radius_spread.max()) * math.sqrt(12)
    ring = (cells.radius / width).long()
    ring = torch.unique(ring, return_inverse=True)[1]
    total = torch.zeros(int(ring.max()) + 1, dtype=torch.float64)
    weight = total.index_add(0, ring, cells.samples)
    values = (cells.radius, cells.power, *curves)
    names = ("radius", "power", "background", "gain", "rings")
    return {n: total.index_add(0, ring, cells.samples * v) / weight for n, v in zip(names, values, strict=True)}
