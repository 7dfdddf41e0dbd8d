"""Defocus of every image of a tilt series, and the hand: which way the defocus rises under a tilt.

No image of a series has the dose to be fitted alone, but they have one lens, and a specimen whose tilt is known. Tiles
of all images, each over its own smooth spectrum, are fitted together first, with one defocus, for both hands. Then each
image has a defocus of its own, which is expected near the common one, with a deviation that the images tell:

    log L = sum over tilts of log L_i (d_i) - (d_i - d)^2 / (2 s^2),        s^2 = mean of (d_i - d)^2 + e_i^2,     (1)

e_i the standard error of d_i under this very prior (the EM step of s). The hand is the one with the larger likelihood.
"""

from __future__ import annotations

import math
from copy import copy
from typing import NamedTuple

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.microscope.optics import Optics
from inverse.calibration.ctf_fit import (
    Seen,
    astigmatism_errors,
    covariance_of,
    expect_image,
    lens_of,
    limits_of,
    refined,
    rise_of,
    searched,
    tile_of,
)
from inverse.calibration.ring_model import COARSEST, SCALES, RingModel, State, optics_of
from inverse.calibration.thon_rings import at_one_height, joined, tile_cells

_FREE = ["defocus", "along", "across"]
_SPREAD = 2e3  # [Å] of the defoci of a series, to begin with
DECIDED = 5.0
"""Of a margin, that decides [nat]."""


class SeriesCtf(NamedTuple):
    """What `fit_series_ctf` returns.

    Attributes
    ----------
    optics : Optics
        `defocus` (tilt,); astigmatism and all else are common.
    standard_errors : dict of str to tensor
        Of "defocus" (tilt,) [Å], with what the other images say of it; of "astigmatism" [Å] and "astigmatism_angle"
        [deg], which is infinite where not determined.
    hand : int
        1 where the defocus of a point rises with its height as the angles of the series have it, -1 where it falls, 0
        where the images do not tell by 5 nat; the fit is then of 1.
    hand_margin : float
        Of the hand 1 over -1 [nat].
    spread : float
        Of the defoci about their mean [Å].
    resolution : float
        Finest period of the rings that were used [Å].
    log_likelihood : float
        Of all images, over that of spectra without rings [nat].
    """

    optics: Optics
    standard_errors: dict[str, torch.Tensor]
    hand: int
    hand_margin: float
    spread: float
    resolution: float
    log_likelihood: float

    def lines(self, angles: torch.Tensor) -> list[str]:
        """The figures, for people; angles (tilt,) [deg]."""
        defoci, errors = torch.as_tensor(self.optics.defocus), self.standard_errors["defocus"]
        told = [
            f"tilt {angle:7.2f} deg  defocus {defocus:>9,.0f} ± {error:,.0f} Å"
            for angle, defocus, error in zip(angles.tolist(), defoci.tolist(), errors.tolist(), strict=True)
        ]
        error = float(self.standard_errors["astigmatism"])
        told.append(f"astigmatism {float(torch.as_tensor(self.optics.astigmatism)):,.0f} ± {error:,.0f} Å")
        told.append(f"rings to {self.resolution:g} Å")
        verdict = {1: "as the angles have it", -1: "the other: change the sign of the angles", 0: "undecidable"}
        return [*told, f"hand: {verdict[self.hand]}, by {self.hand_margin:+.1f} nat"]


@torch.no_grad()
def fit_series_ctf(
    series: TiltSeries,
    voltage: float | None = None,
    spherical_aberration: float = 2.7,
    amplitude_contrast: float = 0.07,
    *,
    defocus_range: tuple[float, float] = (5_000.0, 80_000.0),
    finest: float | None = None,
) -> SeriesCtf:
    """Fit the defoci of a tilt series to the Thon rings of its images.

    Parameters
    ----------
    series : TiltSeries
        Images with their angles and the angle of the axis; aligned or not.
    voltage : float, optional
        [kV]; that of the optics of the series when left out, with their aberration, contrast and phase shift.
    spherical_aberration : float
        [mm].
    amplitude_contrast : float
        [1].
    defocus_range : (float, float)
        To search [Å].
    finest : float, optional
        Period beyond which rings are not looked for [Å].

    Returns
    -------
    SeriesCtf

    Raises
    ------
    ValueError
        For images that are too small or not finite, or without a voltage.
    """
    fixed = lens_of_series(series, voltage, spherical_aberration, amplitude_contrast)
    rings = SeriesRings(series, fixed, defocus_range, finest)
    reached = rings.reached()
    finer = min(limit for _, limit in reached)  # of both: likelihoods of the same rings can be compared
    both = [rings.fitted(state, finer) for state, _ in reached]
    margin = both[0].value - both[1].value
    best = both[1] if margin < -DECIDED else both[0]
    told = 0 if abs(margin) < DECIDED else int(math.copysign(1, margin))
    common = optics_of(fixed, best.state.lens)
    return SeriesCtf(
        optics=common.replace(
            defocus=best.defoci.to(series.images.dtype),
            astigmatism=float(common.astigmatism),
            astigmatism_angle=float(common.astigmatism_angle),
        ),
        standard_errors={"defocus": best.errors, **best.astigmatism},
        hand=told,
        hand_margin=margin,
        spread=best.spread,
        resolution=best.limit,
        log_likelihood=best.value - best.without,
    )


def lens_of_series(
    series: TiltSeries, voltage: float | None, spherical_aberration: float, amplitude_contrast: float
) -> Optics:
    """What is known of the lens: all of it that is not the defocus, of the series where no voltage is given."""
    if voltage is None:
        if series.optics is None:
            raise ValueError("fit_series_ctf: the series does not tell its voltage. Give voltage [kV].")
        given = series.optics
        names = ("voltage", "spherical_aberration", "amplitude_contrast", "phase_shift")
        kv, cs, contrast, shift = (float(torch.as_tensor(getattr(given, n)).double().mean()) for n in names)
        return Optics(kv, spherical_aberration=cs, amplitude_contrast=contrast, phase_shift=shift)
    return Optics(voltage, spherical_aberration=spherical_aberration, amplitude_contrast=amplitude_contrast)


class HandFit(NamedTuple):
    """A fit of one hand: defoci and their standard errors (tilt,) [Å], log-likelihoods with and without rings [nat]."""

    state: State
    defoci: torch.Tensor
    errors: torch.Tensor
    astigmatism: dict[str, torch.Tensor]
    spread: float
    limit: float
    value: float
    without: float


class SeriesRings:
    """Powers of all images of a series, and how likely they are behind a lens.

    Parameters
    ----------
    series : TiltSeries
    fixed : Optics
        Of plain numbers: what is known of the lens.
    bounds : (float, float)
        Of the defoci to search [Å].
    finest : float or None
        [Å].
    """

    def __init__(self, series: TiltSeries, fixed: Optics, bounds: tuple[float, float], finest: float | None) -> None:
        pixel, images = float(series.pixel_size), series.images
        self.fixed, self._bounds = fixed, bounds
        self._limits = limits_of("fit_series_ctf", pixel, finest)
        side = max(128, min(images.shape[1:]) // 2)  # heights differ between tiles
        tile, axis = min(side, tile_of(images[0], pixel)), float(series.tilts.axis_angle)
        self._parts = []
        for image, angle in zip(images, series.tilts.angles.tolist(), strict=True):
            stack = expect_image(image, pixel, float(fixed.voltage), bounds, ())
            cells = at_one_height(tile_cells(stack, pixel, self._limits[-1], tile), rise_of(angle, axis))
            self._parts.append(cells.within(COARSEST, self._limits[-1]))
        # each over its own smooth spectrum
        even = [cells._replace(power=cells.power / RingModel(cells, fixed).smooth()) for cells in self._parts]
        low = (series.tilts.angles.abs() <= series.tilts.angles.abs().median()).tolist()
        self._level = joined([cells for cells, kept in zip(even, low, strict=True) if kept])
        self._cells = joined(even)

    def behind(self, fixed: Optics) -> SeriesRings:
        """The same powers, of another lens."""
        other = copy(self)
        other.fixed = fixed
        return other

    def reached(self) -> list[tuple[State, float]]:
        """For both hands, as the angles have it and the other: the lens of all images, and the finest period [Å]."""
        level = Seen(self._level, self.fixed, self._limits)
        start, limit = searched(level, lens_of(self.fixed), self._bounds, False)
        hands = [start._replace(lens=start.lens | {"rise_x": hand}) for hand in (1.0, -1.0)]
        return [refined(self._together(), state, _FREE, limit) for state in hands]

    def model(self, limit: float) -> RingModel:
        """Of all images, with one lens."""
        return self._together().model(limit)

    def _together(self) -> Seen:
        return Seen(self._cells, self.fixed, self._limits)

    def fitted(self, state: State, limit: float) -> HandFit:
        """Defoci of all images for one hand, by rings up to `limit` [Å], from the lens that they have in common."""
        together = self.model(limit)
        state = together.climbed(state, _FREE)
        information = together.information(state, _FREE)[0]
        astigmatism = astigmatism_errors(covariance_of(information)[:3, :3], state.lens, _FREE)
        models = [RingModel(cells.within(COARSEST, limit), self.fixed) for cells in self._parts]
        states = [model.climbed(model.begun(state.lens), [], 20) for model in models]
        mean, spread = state.lens["defocus"], _SPREAD
        defoci, error = torch.zeros(2, len(models), dtype=torch.float64)
        for _ in range(4):
            for i, model in enumerate(models):
                model.prior = {"defocus": (mean, spread)}
                states[i] = model.climbed(states[i], ["defocus"], 20)
                variance = covariance_of(model.information(states[i], ["defocus"])[0])[0, 0]
                defoci[i], error[i] = states[i].lens["defocus"], variance.sqrt() * SCALES["defocus"]
            mean = float(defoci.mean())
            spread = max(10.0, float(((defoci - mean).square() + error.square()).mean()) ** 0.5)
        value = sum(model.log_likelihood(s) - model.penalty(s) for model, s in zip(models, states, strict=True))
        without = sum(model.without_rings() for model in models)
        return HandFit(state, defoci, error, astigmatism, spread, limit, value, without)
