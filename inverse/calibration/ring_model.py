"""What the powers of an image should be behind a lens, and how likely they are.

The expected power is S(k) = b(|k|) + g(|k|) T(k): b of what has no rings, g of what has, both smooth and positive, the
exponentials of cubic splines; T the squared CTF. Through a specimen of thickness t whose scatterers lie at all heights
alike, T is the mean of the square over their defoci (McMullan et al. 2015, doi:10.1016/j.ultramic.2015.05.003;
Tichelaar et al. 2020, doi:10.1016/j.ultramic.2020.113023),

    T = (1 - sinc(lambda k^2 t) cos 2 (chi - asin A)) / 2,        sinc x = sin(pi x) / (pi x),              (1)

so that beyond the node k^2 = 1 / (lambda t) bright rings are where dark ones would be. Of a tilted specimen each tile
has the defocus of its own height, and its heights widen t by those it spans.

With J the slopes of log S, the information of equation (1) of `inverse.calibration.thon_rings`, and its slope, are

    I = J^T N J,      J^T N (P / S - 1),      N the samples of each cell.                                    (2)

Astigmatism has two components, a (cos 2 alpha, sin 2 alpha), so that nothing is singular without any.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from cryosim.core.constants import wavelength
from cryosim.microscope.optics import Optics, aberration_at
from inverse.calibration.thon_rings import Cells

COARSEST = 32.0  # [Å]: what is coarser is specimen
_KNOT = 0.22  # of log |k| between splines
_STIFF = 0.1  # how little splines want to curve, where the image says nothing

SCALES = {
    "defocus": 1e4,  # [Å]
    "along": 1e3,  # [Å]
    "across": 1e3,  # [Å]
    "phase_shift": 30.0,  # [deg]
    "amplitude_contrast": 0.1,  # [1]
    "spherical_aberration": 1.0,  # [mm]
    "magnification": 0.1,  # [1]
    "thickness": 1e3,  # [Å]
    "rise_x": 0.3,  # [1]
    "rise_y": 0.3,  # [1]
}
"""By which parameters are measured, and the most that a step changes two of them."""


class State(NamedTuple):
    """The lens, by the names of `SCALES`, and the splines of log b and log g, each (spline,).

    Heights of the specimen rise by `rise_x` and `rise_y` along the image [1]; `magnification` multiplies the pixel
    size that the image was said to have.
    """

    lens: dict[str, float]
    background: torch.Tensor
    gain: torch.Tensor


class RingModel:
    """Likelihood of the cells of one image [nat], for states of one lens.

    Parameters
    ----------
    cells : Cells
    fixed : Optics
        Fields that a state does not name.

    Attributes
    ----------
    prior : dict of str to (float, float)
        Mean and standard deviation that a parameter of the lens is expected to have.
    """

    def __init__(self, cells: Cells, fixed: Optics) -> None:
        self.cells, self.fixed = cells, fixed
        self.prior: dict[str, tuple[float, float]] = {}
        place = (cells.radius * COARSEST).log() / _KNOT
        self.basis = splines(place, 4 + math.ceil(float(place.max())))
        self.weighted = self.basis * cells.samples[:, None]
        n = self.basis.shape[1]
        bend = torch.diff(torch.eye(n, dtype=torch.float64), 2, 0)
        self.rough = _STIFF * bend.T @ bend + 1e-8 * torch.eye(n, dtype=torch.float64)
        a = cells.azimuth
        # two points in radius and two in azimuth have the mean and the variance of the samples
        sides = [(r, t) for r in (-1, 1) for t in (-1, 1)]
        radii = torch.stack([cells.radius + r * cells.radius_spread for r, _ in sides])
        turns = torch.stack([a + t * cells.azimuth_spread for _, t in sides])
        self._factor = torch.linalg.cholesky(self.basis.T @ self.weighted + self.rough)
        self.kx, self.ky = radii * torch.cos(turns), radii * torch.sin(turns)

    # rings

    def rings(self, lens: Mapping[str, Any]) -> torch.Tensor:
        """T (cell,) of equation (1) [1]."""
        optics = optics_of(self.fixed, lens)
        scale = 1 / lens.get("magnification", 1.0)
        kx, ky = self.kx * scale, self.ky * scale
        square = kx.square() + ky.square()
        chi = aberration_at(optics, kx, ky)
        wave = wavelength(float(optics.voltage))
        rise = [lens.get(name, 0.0) for name in ("rise_x", "rise_y")]
        tilted = any(isinstance(r, torch.Tensor) or r for r in rise)
        if tilted:
            chi = chi - (math.pi * wave) * square * (rise[0] * self.cells.x + rise[1] * self.cells.y)
        contrast = torch.as_tensor(optics.amplitude_contrast, dtype=torch.float64)
        seen = torch.cos(2 * (chi - torch.asin(contrast)))
        for spread in (lens.get("thickness", 0.0), *(r * self.cells.span for r in rise if tilted)):
            if isinstance(spread, torch.Tensor) or spread:
                seen = seen * torch.sinc(wave * square * spread)
        return (1 - seen.mean(0)) / 2

    def slopes(self, lens: Mapping[str, Any], names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """T (cell,), and its slopes (cell, parameter) to `names`, in units of `SCALES`."""
        lens = dict(lens)
        if math.hypot(lens["along"], lens["across"]) < 1.0:  # [Å]: atan2 has slopes but at the very centre
            lens["along"] = math.copysign(1.0, lens["along"])
        columns = []
        for name in names:
            with forward_ad.dual_level(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # torch's own, of its first dual number
                value = torch.tensor(lens[name], dtype=torch.float64)
                dual = forward_ad.make_dual(value, torch.full_like(value, SCALES[name]))
                columns.append(forward_ad.unpack_dual(self.rings(lens | {name: dual})).tangent)
        value = self.rings(lens)
        return value, torch.stack(columns, 1) if columns else value.new_zeros(len(value), 0)

    # powers

    def expected(
        self, state: State, rings: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """S, b and g (cell,)."""
        rings = self.rings(state.lens) if rings is None else rings
        background, gain = (self.basis @ state.background).exp(), (self.basis @ state.gain).exp()
        return background + gain * rings, background, gain

    def log_likelihood(self, state: State) -> float:
        """Equation (1) of `inverse.calibration.thon_rings` [nat]."""
        return self._of(self.expected(state)[0])

    def without_rings(self) -> float:
        """The same, of the smooth spectrum that fits best."""
        return self._of(self.smooth())

    def _of(self, mean: torch.Tensor) -> float:
        return -float((self.cells.samples * (mean.log() + self.cells.power / mean)).sum())

    def penalty(self, state: State) -> float:
        """How much the splines curve, and the lens is not as expected [nat]."""
        unexpected = sum(((state.lens[name] - mean) / deviation) ** 2 for name, (mean, deviation) in self.prior.items())
        return 0.5 * (unexpected + float(sum(s @ self.rough @ s for s in (state.background, state.gain))))

    def smooth(self) -> torch.Tensor:
        """Mean power (cell,) as the exponential of splines, without rings."""
        at, normal = self._log_fit(), self.basis.T @ self.weighted + self.rough
        for _ in range(8):
            residual = self.cells.power / (self.basis @ at).exp() - 1
            at = at + torch.linalg.solve(normal, self.weighted.T @ residual - self.rough @ at).clamp(-1, 1)
        return (self.basis @ at).exp()

    def begun(self, lens: dict[str, float]) -> State:
        """Splines to begin with: a tenth of the power has rings."""
        log = self._log_fit()
        return State(lens, log + math.log(0.9), log + math.log(0.2))

    def _log_fit(self) -> torch.Tensor:
        logs = self.cells.power.clamp_min(1e-300).log()
        return torch.linalg.solve(self.basis.T @ self.weighted + self.rough, self.weighted.T @ logs)

    def score(self, lens: Mapping[str, float], smooth: torch.Tensor) -> float:
        """How far rings stand out of a smooth spectrum [standard deviations], to first order in their strength."""
        products, squares = self._against(self.rings(lens)[None], smooth)
        return float(products.sum() / squares.sum().sqrt().clamp_min(1e-30))

    def table(self, lens: Mapping[str, float], defoci: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each defocus [Å], without astigmatism, scores in each sector of each tile.

        Returns
        -------
        tensor (defocus, group), tensor (defocus, group)
            Sums over a group whose ratio, of the first to the root of the second, is `score`.
        tensor (group,), tensor (group,), tensor (group,)
            0, 1, 2 ..., azimuth [rad], and height of the tile [Å].
        """
        cells, smooth = self.cells, self.smooth()
        step = math.pi / 18
        rise = lens.get("rise_x", 0.0), lens.get("rise_y", 0.0)
        height = rise[0] * cells.x + rise[1] * cells.y
        label = torch.stack([((cells.azimuth + math.pi / 2) / step).floor(), height], 1)
        found, group = torch.unique(label, dim=0, return_inverse=True)
        products, squares = (torch.zeros(len(defoci), len(found), dtype=torch.float64) for _ in range(2))
        flat = dict(lens) | {"along": 0.0, "across": 0.0, "rise_x": 0.0, "rise_y": 0.0}
        for i, defocus in enumerate(defoci.tolist()):
            parts = self._against(self.rings(flat | {"defocus": defocus})[None], smooth)
            for total, part in zip((products, squares), parts, strict=True):
                total[i].index_add_(0, group, part[0])
        azimuth = (found[:, 0] + 0.5) * step - math.pi / 2
        return products, squares, torch.arange(len(found)), azimuth, found[:, 1]

    def _against(self, rings: torch.Tensor, smooth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """n (P / S - 1) T, and n T^2 (lens, cell), of what of T (lens, cell) is not smooth itself."""
        n = self.cells.samples
        rings = rings - (self.basis @ torch.cholesky_solve(self.weighted.T @ rings.T, self._factor)).T
        return n * (self.cells.power / smooth - 1) * rings, n * rings.square()

    def information(self, state: State, free: list[str]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Equation (2): of lens, background and gain together; and the residuals' mean square over its expectation."""
        rings, slopes = self.slopes(state.lens, free)
        expected, background, gain = self.expected(state, rings)
        parts = [gain[:, None] * slopes, background[:, None] * self.basis, (gain * rings)[:, None] * self.basis]
        jacobian = torch.cat(parts, 1) / expected[:, None]
        residual = self.cells.power / expected - 1
        weighted = jacobian * self.cells.samples[:, None]
        still = torch.zeros(len(free), len(free), dtype=torch.float64)
        rough = torch.block_diag(still, self.rough, self.rough)
        at = torch.cat([still.new_zeros(len(free)), state.background, state.gain])
        dispersion = float((self.cells.samples * residual.square()).sum() / len(residual))
        for i, name in enumerate(free):
            if name in self.prior:
                mean, deviation = (value / SCALES[name] for value in self.prior[name])
                rough[i, i], at[i] = deviation**-2, state.lens[name] / SCALES[name] - mean
        return jacobian.T @ weighted + rough, weighted.T @ residual - rough @ at, dispersion

    def climbed(self, state: State, free: list[str], iterations: int = 60) -> State:
        """The maximum of the likelihood near a state, by damped steps I^-1 J^T N (P / S - 1)."""
        state = self._extended(state)
        value, damping = self.log_likelihood(state) - self.penalty(state), 1e-3
        for _ in range(iterations):
            information, slope, _ = self.information(state, free)
            gained = 0.0
            for _ in range(8):
                scaled = information + damping * torch.diag(information.diagonal().clamp_min(1e-9))
                candidate = _moved(state, free, torch.linalg.solve(scaled, slope))
                new = self.log_likelihood(candidate) - self.penalty(candidate)
                if new > value:
                    gained, state, value, damping = new - value, candidate, new, max(damping / 5, 1e-7)
                    break
                damping *= 6
            if gained < 1e-3:
                break
        return state

    def _extended(self, state: State) -> State:
        """With splines for all radii: the last of a state of fewer goes on."""
        n = self.basis.shape[1]
        parts = [torch.cat([s, s[-1:].expand(max(0, n - len(s)))])[:n] for s in (state.background, state.gain)]
        return State(state.lens, *parts)


def optics_of(fixed: Optics, lens: Mapping[str, Any]) -> Optics:
    """Optics with the values of a state."""
    along, across = (torch.as_tensor(lens[name], dtype=torch.float64) for name in ("along", "across"))
    changes: dict[str, Any] = {
        "defocus": lens["defocus"],
        "astigmatism": (along**2 + across**2).sqrt(),
        "astigmatism_angle": torch.rad2deg(torch.atan2(across, along)) / 2,
    }
    names = ("phase_shift", "amplitude_contrast", "spherical_aberration")
    return fixed.replace(**changes, **{name: lens[name] for name in names if name in lens})


def _moved(state: State, free: list[str], step: torch.Tensor) -> State:
    lens = dict(state.lens)
    for name, change in zip(free, step[: len(free)].tolist(), strict=True):
        lens[name] = lens[name] + max(-0.5, min(0.5, change)) * SCALES[name]
    if "thickness" in free:
        lens["thickness"] = abs(lens["thickness"])
    if "amplitude_contrast" in free:
        lens["amplitude_contrast"] = max(0.0, min(0.9, lens["amplitude_contrast"]))
    background, gain = step[len(free) :].chunk(2)
    return State(lens, state.background + background.clamp(-1, 1), state.gain + gain.clamp(-2, 2))


def splines(at: torch.Tensor, number: int) -> torch.Tensor:
    """Cubic B-splines (place, spline) about -1, 0, 1, 2 ..."""
    t = (at[:, None] - (torch.arange(number, dtype=at.dtype) - 1)).abs()
    inner, outer = 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp_min(0) ** 3 / 6
    return torch.where(t < 1, inner, outer)
