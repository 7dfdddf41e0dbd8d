"""Which way round a tilt series is: the sign of its angles, of its defocus, and the sense of its axis.

Turning the axis by 180 degrees and negating the angles leaves the same specimen, turned about the beam: with

    R_z(axis + 180) R_y(t) = R_z(axis) R_y(-t) R_z(180)                                                       (1)

eight combinations are four. Two things tell these apart:

- *Rings.* Behind the lens, the point at u across the axis has the defocus d - u tan t. Rings are the same for the
  opposite defoci of every point but for the spherical aberration and the amplitude contrast,

    T(d + z; C_s, phi, a) = T(-d - z; -C_s, -phi - 2 a, a),       a = asin A                                  (2)

  so that rings tell the hand for each sign of the defocus, and the sign alone as far as they reach.
- *Density.* What stands out of ice is denser than ice, and sparse: through the lens that the image was taken with the
  third cumulant of the specimen is positive. Its standard error comes from how parts of the image differ. This holds
  of molecules in ice and of gold, not of a cell so full that the gaps are what is sparse.

Each gives a log-likelihood [nat]; the margin of the best over the next is the verdict, or that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import t as student

from cryosim.acquisition.series import TiltSeries
from cryosim.core.constants import wavelength
from cryosim.core.fourier import cosine_edges, frequencies
from cryosim.microscope.optics import Optics, ctf
from inverse.calibration.ctf_fit import covariance_of
from inverse.calibration.ring_model import SCALES, optics_of
from inverse.calibration.series_ctf import DECIDED, HandFit, SeriesRings, lens_of_series

_COARSE = 400.0  # [Å]: what is coarser is the ice
_BLOCKS = 5  # along each side, of which parts of an image the scatter is taken
_RISES = torch.linspace(-1.6, 1.6, 33, dtype=torch.float64)

Flips = tuple[int, int, int]
"""Of (angles, defocus, axis): 1 as declared, -1 negated or, of the axis, turned by 180 degrees."""


class Conventions(NamedTuple):
    """What `check_conventions` returns.

    Attributes
    ----------
    likelihoods : dict of Flips to float
        Log-likelihood of each of the eight combinations, over the best [nat].
    best : tuple of Flips
        The most likely, fewest flips first: two, as equation (1) has it.
    margin : float
        Of the best over the next that is another specimen [nat].
    hand_margin : float
        Of the angles as declared over their negatives, with the defocus of the declared sign [nat].
    defocus_margin : float
        Of the declared sign of the defocus over the other, each with its better hand [nat].
    rings, density : float
        The part of each in `defocus_margin` [nat].
    rise, rise_error : float
        Slope of the heights that the rings of tilted images show over the declared one, with the defocus of the
        declared sign [1]: 1 where the hand is right, -1 where it is not.
    rises, profile : tensor (slope,)
        Slopes [1], and log-likelihood over the best of them [nat].
    defoci : tensor (tilt,)
        Of each image, for the most likely combination [Å]; below 0 is overfocus.
    resolution : float
        Finest period of the rings that were used [Å].
    """

    likelihoods: dict[Flips, float]
    best: tuple[Flips, ...]
    margin: float
    hand_margin: float
    defocus_margin: float
    rings: float
    density: float
    rise: float
    rise_error: float
    rises: torch.Tensor
    profile: torch.Tensor
    defoci: torch.Tensor
    resolution: float

    @property
    def decided(self) -> bool:
        """Whether the margin is 5 nat or more."""
        return self.margin >= DECIDED

    @property
    def verdict(self) -> str:
        """In a sentence."""
        if self.decided:
            return f"{_said(self.best[0])}, by {self.margin:.1f} nat."
        if abs(self.hand_margin) >= DECIDED:
            flips = (1 if self.hand_margin > 0 else -1, 1, 1)
            return (
                f"undecidable: the sign of the defocus is told by {abs(self.defocus_margin):.1f} nat only. If it is as "
                f"declared: {_said(flips)}, by {abs(self.hand_margin):.1f} nat."
            )
        return f"undecidable: the best combination is ahead by {self.margin:.1f} nat only."

    def lines(self) -> list[str]:
        """The figures, for people."""
        told = ["angles    defocus   axis      log-likelihood over the best"]
        words = {1: "as is", -1: "negated"}
        for (angles, defocus, axis), value in sorted(self.likelihoods.items(), key=lambda pair: -pair[1]):
            turned = "as is" if axis == 1 else "+180 deg"
            told.append(f"{words[angles]:9s} {words[defocus]:9s} {turned:9s} {value:12.1f} nat")
        slope = f"{self.rise:.2f} ± {self.rise_error:.2f} of the declared one"
        told.append(f"slope of the heights {slope if self.rise_error < 1 else 'not determined'}")
        parts = f"rings {self.rings:+.1f}, density {self.density:+.1f}"
        told.append(f"sign of the defocus {self.defocus_margin:+.1f} nat ({parts})")
        return [*told, f"verdict: {self.verdict}"]


def _said(flips: Flips) -> str:
    angles, defocus, axis = flips
    told = []
    if angles * axis == -1:
        told.append("negate the angles, or turn the axis by 180 degrees")
    if defocus == -1:
        told.append("negate the defocus")
    return " and ".join(told) or "as declared"


@torch.no_grad()
def check_conventions(
    series: TiltSeries,
    voltage: float | None = None,
    spherical_aberration: float = 2.7,
    amplitude_contrast: float = 0.07,
    *,
    defocus_range: tuple[float, float] = (5_000.0, 80_000.0),
    finest: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conventions:
    """Find out whether the signs of angles, axis and defocus of a tilt series are those of its images.

    Parameters
    ----------
    series : TiltSeries
        As it is declared. The defocus is taken to be declared positive where the series has no optics.
    voltage : float, optional
        [kV]; that of the optics of the series when left out, with their aberration, contrast and phase shift.
    spherical_aberration : float
        [mm].
    amplitude_contrast : float
        [1].
    defocus_range : (float, float)
        To search, of either sign [Å].
    finest : float, optional
        Period beyond which rings are not looked for [Å].
    progress : callable, optional
        Called with the steps done and their number.

    Returns
    -------
    Conventions

    Raises
    ------
    ValueError
        For images that are too small or not finite, or without a voltage.
    """
    fixed = lens_of_series(series, voltage, spherical_aberration, amplitude_contrast)
    under = SeriesRings(series, fixed, defocus_range, finest)
    both = {1: under, -1: under.behind(_mirrored(fixed))}
    found: dict[tuple[int, int], HandFit] = {}
    reached = {sign: rings.reached() for sign, rings in both.items()}
    finer = min(limit for pair in reached.values() for _, limit in pair)
    for i, (sign, rings) in enumerate(both.items()):
        for hand, (state, _) in zip((1, -1), reached[sign], strict=True):
            found[hand * sign, sign] = rings.fitted(state, finer)  # mirrored, heights are too
        if progress is not None:
            progress(i + 1, len(both))
    sign = _declared_sign(series)
    likely = max(found, key=lambda pair: found[pair].value)
    lens = optics_of(both[likely[1]].fixed, found[likely].state.lens)
    density = sign * _underfocus_by_density(series, fixed.replace(defocus=abs(float(lens.defocus))))
    values = {
        (hand, defocus): found[hand, sign * defocus].value + 0.5 * defocus * density
        for hand in (1, -1)
        for defocus in (1, -1)
    }
    (first, top), (_, second) = sorted(values.items(), key=lambda pair: -pair[1])[:2]
    flips = [(angles, defocus, axis) for angles in (1, -1) for defocus in (1, -1) for axis in (1, -1)]
    alike = {one: values[one[0] * one[2], one[1]] - top for one in flips}
    same = [one for one in flips if (one[0] * one[2], one[1]) == first]
    better = {d: max(found[hand, sign * d].value for hand in (1, -1)) for d in (1, -1)}
    rises, profile, rise, error = _rise(both[sign], [found[hand, sign] for hand in (1, -1)], sign, finer)
    return Conventions(
        likelihoods=alike,
        best=tuple(sorted(same, key=lambda one: (one.count(-1), -one[2]))),
        margin=top - second,
        hand_margin=found[1, sign].value - found[-1, sign].value,
        defocus_margin=better[1] - better[-1] + density,
        rings=better[1] - better[-1],
        density=density,
        rise=rise,
        rise_error=error,
        rises=rises,
        profile=profile,
        defoci=sign * first[1] * found[first[0], sign * first[1]].defoci,
        resolution=finer,
    )


def _declared_sign(series: TiltSeries) -> int:
    if series.optics is None:
        return 1
    return -1 if float(torch.as_tensor(series.optics.defocus).double().mean()) < 0 else 1


def _mirrored(optics: Optics) -> Optics:
    """The lens whose rings at the defocus d are those of `optics` at -d: equation (2)."""
    turn = 2 * math.degrees(math.asin(float(optics.amplitude_contrast)))
    aberration, shift = float(optics.spherical_aberration), float(optics.phase_shift)
    return optics.replace(spherical_aberration=-aberration, phase_shift=-shift - turn)


def _rise(
    rings: SeriesRings, fits: list[HandFit], sign: int, limit: float
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Slopes of the heights over the declared ones, their log-likelihoods; the best, and its standard error."""
    model, free = rings.model(limit), ["defocus", "along", "across"]
    start = max(fits, key=lambda fit: fit.value).state
    values = []
    for rise in (sign * _RISES).tolist():
        state = model.climbed(start._replace(lens=start.lens | {"rise_x": rise}), free, 6)
        values.append(model.log_likelihood(state) - model.penalty(state))
    profile = torch.tensor(values, dtype=torch.float64)
    begun = sign * float(_RISES[int(profile.argmax())])
    state = model.climbed(start._replace(lens=start.lens | {"rise_x": begun}), ["rise_x", *free])
    covariance = covariance_of(model.information(state, ["rise_x", *free])[0])
    error = float(covariance[0, 0]) ** 0.5 * SCALES["rise_x"]
    return _RISES, profile - profile.max(), sign * state.lens["rise_x"], error


def _underfocus_by_density(series: TiltSeries, lens: Optics) -> float:
    """Log-odds of underfocus by the third cumulant of the images, seen again through the lens [nat]."""
    pixel, (ny, nx) = float(series.pixel_size), series.images.shape[1:]
    edge = 1 / math.sqrt(float(wavelength(float(lens.voltage))) * float(lens.defocus))  # about the first zero [1/Å]
    ky, kx = (frequencies(n, pixel, dtype=torch.float64) for n in (ny, nx))
    k = (ky[:, None].square() + kx.square()).sqrt()
    passed = ctf(lens, (ny, nx), pixel).real * (k < min(edge, 0.4 / pixel)) * (k > 1 / _COARSE)
    kernel = torch.fft.ifft2(passed).real
    window = torch.outer(*(cosine_edges(n, round(0.1 * n), dtype=torch.float64) for n in (ny, nx)))
    cubes = torch.zeros(_BLOCKS, _BLOCKS, dtype=torch.float64)
    for image, angle in zip(series.images.double(), series.tilts.angles.tolist(), strict=True):
        counts = bool((image >= 0).all())
        mean = float(image.mean())
        contrast = ((image - mean) / (mean if counts else 1.0)) * window
        seen = torch.fft.ifft2(torch.fft.fft2(contrast) * passed).real
        # of Poisson counts, in units of their mean, the third cumulant is 1 / mean^2 for each pixel
        noise = float(kernel.pow(3).sum()) / mean**2 * window.pow(3) if counts else torch.zeros_like(window)
        weight = math.cos(math.radians(angle)) ** 2 / float(seen.var()) ** 1.5
        cubes += weight * torch.nn.functional.adaptive_avg_pool2d((seen.pow(3) - noise)[None], _BLOCKS)[0]
    blocks = cubes.flatten()
    spread = float(blocks.std()) / math.sqrt(len(blocks))
    ratio = float(blocks.mean()) / spread if spread > 0 else 0.0
    return float(student.logcdf(ratio, len(blocks) - 1) - student.logsf(ratio, len(blocks) - 1))
