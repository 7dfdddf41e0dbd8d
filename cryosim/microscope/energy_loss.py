"""Electrons that lost energy in the specimen: how many, how much, and the image they make.

The number of losses of an electron that crosses t / Lambda mean free paths is Poisson distributed, and n losses have
the n-fold convolution S_n of the single-loss distribution S:

    P(n) = exp(-t / Lambda) (t / Lambda)^n / n!,      P(E) = sum_n P(n) S_n(E)

(Egerton 2011, Electron Energy-Loss Spectroscopy in the Electron Microscope, 3rd ed., section 3.4.) A slit of full
width `slit`, centred on the electrons without a loss, passes the losses from 0 to slit / 2.

A plasmon extends over many Å, so an electron that excites one keeps the wave that elastic scattering gave it: phase
contrast is the same whether the object lies above or below the loss (Dickerson et al. 2022, PMC9355893; PMC9355894).
Electrons with different losses do not interfere. So the image is the sum of the image without a loss and, for each
small interval of losses, the same elastic wave, weighted, and seen through a lens of another focus.
Slower electrons are bent more strongly: the lens acts as if it were stronger, which is less underfocus,

    defocus(E) = defocus - Cc E / (e V)

with defocus > 0 underfocus. Left out are the change of wavelength itself, 4e-5 for 20 eV at 300 kV, and the angle of
an inelastic event, which damps fine detail away from focus: with losses of 23 eV the power at 2.35 Å falls to one half
1300 Å from it (Dickerson et al. 2022, table 1). So fine detail is a little too strong in the unfiltered image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from cryosim.core.fourier import fast_length
from cryosim.core.record import Record, hidden, item, static
from cryosim.microscope.imaging import image as coherent_image
from cryosim.microscope.imaging import unchecked_image
from cryosim.microscope.optics import Optics, is_zero, per_image

Number = float | torch.Tensor

_STEP = 0.25  # of the grid on which losses are convolved [eV]
_FIRST = 5.0  # upper end of the first bin [eV]
_SMALL = 1e-10  # probability below which a weight has no square root of its own
_DEEPEST = 12.0  # t / Lambda up to which the elastic wave is had from the one without losses
_EMPTY = 1e-12  # probability below which a bin has no mean loss of its own


class LossSpectrum(Record):
    """Energies lost in one inelastic event, in the Drude model of a damped plasmon,

        S(E) ~ E / ((E^2 - plasmon_energy^2)^2 + (E width)^2),     0 < E < largest

    (Egerton 2011, section 3.3), and the bins in which the losses are imaged.

    The defaults stand for vitreous ice: a broad maximum at 20.6 eV, 14 eV wide at half maximum, mean loss 25 eV.
    (Spectra of vitreous ice: Leapman & Sun 1995, doi:10.1016/0304-3991(95)00019-W. The valence bands of water and ice
    as sums of Drude functions: Emfietzoglou et al. 2008, Nucl. Instrum. Methods B 266:1154.) The K edge of oxygen at
    532 eV, rare and blurred beyond use, is left out.

    Attributes
    ----------
    plasmon_energy : float or tensor ()
        [eV]. The maximum lies a little below it.
    width : float or tensor ()
        Damping of the plasmon [eV].
    largest : float
        Largest loss of one event, and the lower limit of what the last bin must hold [eV].
    bins : int
        Number of bins: the first ends at 5 eV, the others grow geometrically to `largest`. The last has no upper
        end, so the probabilities add up to one. Without a filter, at t / Lambda = 1 and 2 µm underfocus, 32 bins err
        by 1 % of the contrast of white detail down to 6 Å, and by 5 % of that down to 3 Å; 48 bins by 0.6 and 2 %.
        Through a slit of 20 eV the error is 2e-5.
    most_events : int
        Largest number of events told apart; what has more counts as if it had so many. Of all electrons 2e-7 have
        more than 12 at t / Lambda = 2, and 0.2 % at 5.
    """

    plasmon_energy: Number = item(default=22.0)
    width: Number = item(default=15.0)
    largest: float = static(default=200.0)
    bins: int = static(default=32)
    most_events: int = static(default=12)

    def __post_init__(self) -> None:
        for name in ("plasmon_energy", "width"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"LossSpectrum.{name}: expected a positive number [eV], got {value}.")
        if not _FIRST < self.largest < math.inf:
            raise ValueError(f"LossSpectrum.largest: expected more than {_FIRST:g} [eV], got {self.largest}.")
        for name in ("bins", "most_events"):
            if getattr(self, name) < 2:
                raise ValueError(f"LossSpectrum.{name}: expected 2 or more, got {getattr(self, name)}.")

    @property
    def edges(self) -> list[float]:
        """Lower ends of the bins (bin,) [eV]."""
        growth = (self.largest / _FIRST) ** (1 / (self.bins - 1))
        return [0.0] + [_FIRST * growth**i for i in range(self.bins - 1)]


ICE_LOSSES = LossSpectrum()
"""Losses in vitreous ice."""


def loss_probabilities(
    depth: Number, spectrum: LossSpectrum = ICE_LOSSES, slit: Number = math.inf
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies of the bins, and the probability of each loss to happen and to pass the slit.

    Parameters
    ----------
    depth : float, tensor () or (tilt,), or map (..., y, x)
        Inelastic mean free paths crossed, t / Lambda [1].
    spectrum : LossSpectrum
    slit : float or tensor () or (tilt,)
        Full width of the energy slit [eV]; infinity is no filter, 0 passes no loss.

    Returns
    -------
    energies : tensor (bin,) or (bin, tilt)
        Mean loss of the electrons in a bin [eV], float64; for a map, at its mean depth. So the mean change of
        focus is exact, and only its spread within a bin is lost. The lower end of a bin that the slit closes.
    weights : tensor (bin,), (bin, tilt) or (bin, ..., y, x)
        [1]. Their sum is 1 - exp(-depth) without a filter.

    Raises
    ------
    ValueError
        When depth or slit is negative.

    Notes
    -----
    Differentiable in depth, slit, plasmon_energy and width.
    """
    _check(depth, slit)
    column, uniform = _columns(depth)
    fractions, energies = _bins(spectrum, slit, column)
    many = _many(column, spectrum.most_events)
    weights = torch.stack([_weight(column, many, fractions[:, j]) for j in range(spectrum.bins)])
    return energies, weights[..., 0, 0] if uniform else weights


def defocus_change(loss: Number, optics: Optics) -> Number:
    """Change of defocus -Cc E / (e V) [Å] for electrons that lost E [eV]: -1800 for 20 eV, Cc 2.7 mm, 300 kV."""
    return -1e4 * optics.chromatic_aberration * loss / optics.voltage  # 1e7 Å/mm, 1e3 eV/kV


def energy_filtered_image(
    wave: torch.Tensor,
    depth: Number,
    optics: Optics,
    pixel_size: float | torch.Tensor,
    *,
    losses: LossSpectrum = ICE_LOSSES,
    image: Callable[[torch.Tensor, Optics, float | torch.Tensor], torch.Tensor] = coherent_image,
) -> torch.Tensor:
    """Intensity of the electrons that pass the energy slit, with and without a loss.

    Parameters
    ----------
    wave : tensor (..., y, x)
        Exit wave of the electrons without a loss: their number fell to exp(-depth) on the way.
    depth : float, tensor () or (tilt,), or map (..., y, x)
        Inelastic mean free paths crossed along each column, t / Lambda [1]: the depth at which `wave` was absorbed.
    optics : Optics
        Its `slit` is the full width of the energy slit [eV], 0 for electrons without a loss only, infinity for no
        filter; its `chromatic_aberration` [mm] separates the foci of the losses.
    pixel_size : float or tensor ()
        [Å].
    losses : LossSpectrum
    image : callable
        The lens: a function of (wave, optics, pixel_size) that returns an intensity.

    Returns
    -------
    tensor (..., y, x)
        [1], of the incident intensity.

    Raises
    ------
    ValueError
        When depth or slit is negative.

    Notes
    -----
    I = image(wave) + sum_j image(wave exp(depth / 2) sqrt(w_j)) with the focus of loss j, w_j of `loss_probabilities`.
    With a slit of 0 this is the image of `wave`, and without a filter and other absorption no electron is missing.

    sqrt(w) has no slope at w = 0. A weight that is the same everywhere leaves the square. In a map its mean m does,
    and sqrt((w + s) / (m + s)) stays, s = 1e-10: equal to sqrt(w / m) but where hardly an electron lost energy, and
    smooth. It keeps the number of electrons; beside a sharp edge of vacuum it moves 2e-5 of the incident intensity.
    Where the whole map is zero the slope is that of a depth changed everywhere alike.

    Time: one image for every open bin and one for the rest. The bins beyond a slit given as a number are skipped.
    """
    _check(depth, optics.slit)
    total = image(wave, optics, pixel_size)  # no loss
    if is_zero(optics.slit):
        return total
    real = wave.real.dtype
    column, uniform = _columns(depth, wave.device)
    fractions, energies = _bins(losses, optics.slit, column)
    many = _many(column, losses.most_events)
    if not uniform:
        column, many = column.to(real), many.to(real)
    # a rare loss far out of focus need not be warned of
    of_loss = unchecked_image if image is coherent_image else image
    elastic = wave if uniform else wave * torch.exp(column / 2)
    for j, start in enumerate(losses.edges):
        if isinstance(optics.slit, (int, float)) and start >= optics.slit / 2:
            break
        focused = optics.replace(defocus=optics.defocus + defocus_change(energies[j], optics))
        weight = _weight(column, many, fractions[:, j])  # (..., y, x) or (..., 1, 1)
        if uniform:
            total = total + (torch.exp(column) * weight).to(real) * of_loss(wave, focused, pixel_size)
        else:
            mean = weight.mean((-2, -1), keepdim=True)
            share = torch.sqrt((weight + _SMALL) / (mean + _SMALL)).to(real)
            total = total + mean.to(real) * of_loss(elastic * share, focused, pixel_size)
    return total


def _columns(depth: Number, device: torch.device | None = None) -> tuple[torch.Tensor, bool]:
    """Depth as a tensor (..., y, x) or (..., 1, 1), float64, and whether it is the same all over each image."""
    column = torch.as_tensor(depth, dtype=torch.float64, device=device)
    if column.ndim < 2:
        return column[..., None, None], True
    return column, column.shape[-2:] == (1, 1)


def _many(column: torch.Tensor, events: int) -> torch.Tensor:
    """Probability (..., y, x) of `events` losses or more, 1 - exp(-d) sum_(n < events) d^n / n!; to 1e-16 absolute."""
    few = torch.ones_like(column)
    for n in range(events - 1, 0, -1):
        few = 1 + column / n * few
    return (1 - torch.exp(-column) * few).clamp(min=0)


def _weight(column: torch.Tensor, many: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Probability (..., y, x) of a loss in one bin: sum_n P(n) S_n(bin).

    `fraction` (event, ...) holds S_n(bin), and `many` (..., y, x) the probability of as many events or more.
    """
    n = len(fraction)
    few = torch.zeros_like(column)
    for i in range(n - 1, 0, -1):  # Horner: d (f_1 + d / 2 (f_2 + d / 3 (f_3 + ...)))
        few = column / i * (per_image(fraction[i - 1], column.dtype, column.device) + few)
    return torch.exp(-column) * few + many * per_image(fraction[n - 1], column.dtype, column.device)


def _bins(spectrum: LossSpectrum, slit: Number, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Part of n losses that falls into each open bin (event, bin, ...), and the mean loss of a bin (bin, ...) [eV]."""
    device, events = column.device, spectrum.most_events
    cumulative, moment = _cumulative_losses(spectrum, device)  # (event, cell + 1)
    ends = torch.tensor([*spectrum.edges, events * spectrum.largest], dtype=torch.float64, device=device)  # (bin + 1,)
    half = torch.as_tensor(slit, dtype=torch.float64, device=device) / 2
    ends = torch.minimum(ends.reshape(-1, *[1] * half.ndim), half)  # (bin + 1, ...)
    fractions = torch.diff(_interpolate(cumulative, ends), dim=1)  # (event, bin, ...)
    moments = torch.diff(_interpolate(moment, ends), dim=1)
    depth = column.mean((-2, -1))  # (...)
    ratios = torch.stack([depth**i / math.factorial(i + 1) for i in range(events)])[:, None]  # P(n) / P(1)
    axes = max(depth.ndim, half.ndim)
    ratios, parts, losses = (
        x.reshape(*x.shape[:2], *[1] * (axes + 2 - x.ndim), *x.shape[2:]) for x in (ratios, fractions, moments)
    )  # (event, bin, ...)
    ends = ends.reshape(len(ends), *[1] * (axes + 1 - ends.ndim), *ends.shape[1:])
    energies = ((ratios * losses).sum(0) + _EMPTY * ends[:-1]) / ((ratios * parts).sum(0) + _EMPTY)  # (bin, ...)
    return fractions, energies


def _cumulative_losses(spectrum: LossSpectrum, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrals of S_n and of E S_n up to the end of each cell (event, cell + 1), for n = 1 ... most_events.

    S is made of points in the middles of cells, so sums of n losses lie at (i + n / 2) step, and each is spread over
    the cell about it.
    """
    cells = math.ceil(spectrum.largest / _STEP)
    energy = (torch.arange(cells, dtype=torch.float64, device=device) + 0.5) * _STEP
    plasmon, width = (
        torch.as_tensor(value, dtype=torch.float64, device=device)
        for value in (spectrum.plasmon_energy, spectrum.width)
    )
    density = energy / ((energy**2 - plasmon**2) ** 2 + (energy * width) ** 2)
    length = fast_length(spectrum.most_events * cells)
    once = torch.fft.rfft(density / density.sum(), length)
    n = torch.arange(1, spectrum.most_events + 1, device=device)[:, None]
    lost = torch.fft.irfft(torch.stack([once**i for i in range(1, len(n) + 1)]), length)  # (event, cell)
    sums = (torch.arange(length, dtype=torch.float64, device=device) + n / 2) * _STEP  # (event, cell) [eV]
    start = torch.zeros_like(lost[:, :1])
    cumulative = torch.cat([start, torch.cumsum(lost, 1)], 1)
    moment = torch.cat([start, torch.cumsum(lost * sums, 1)], 1)
    return cumulative / cumulative[:, -1:], moment


def _interpolate(cumulative: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Values (event, bin + 1, ...) of a table (event, cell + 1) at energies (bin + 1, ...) [eV]."""
    events, last = cumulative.shape[0], cumulative.shape[1] - 1
    first = torch.arange(events, dtype=torch.float64, device=ends.device) / 2  # cell 0 of S_n starts at (n - 1) / 2
    place = (ends / _STEP - first.reshape(-1, *[1] * ends.ndim)).clamp(0, last)  # (event, bin + 1, ...)
    cell = place.detach().floor().long().clamp(max=last - 1)
    flat = cell.reshape(events, -1)
    below, above = (cumulative.gather(1, flat + i).reshape(cell.shape) for i in (0, 1))
    return below + (place - cell) * (above - below)


def _check(depth: Number, slit: Number) -> None:
    if hidden():
        return
    if not bool((torch.as_tensor(depth) >= 0).all()):
        raise ValueError(
            f"depth: expected t / Lambda >= 0, got {float(torch.as_tensor(depth).detach().min())}; "
            "it is thickness over mean free path."
        )
    if not is_zero(slit) and not bool((torch.as_tensor(depth) <= _DEEPEST).all()):
        deepest = float(torch.as_tensor(depth).detach().max())
        raise ValueError(
            f"depth: expected t / Lambda of at most {_DEEPEST:g}, got {deepest:.3g}: hardly an electron without a loss "
            "is left to tell what the others saw. Close the slit (Optics.slit = 0) or take a thinner specimen."
        )
    if not bool((torch.as_tensor(slit) >= 0).all()):
        raise ValueError(
            f"slit: expected a width >= 0 [eV], got {float(torch.as_tensor(slit).detach().min())}; "
            "0 passes no loss, infinity is no filter."
        )
