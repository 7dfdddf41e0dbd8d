"""Damage: what the electrons that made the image before have done to what is seen now.

At a spatial frequency k the atoms of one class fade exponentially with the dose N,

    amplitude(k, N) = exp(-mu(k) N),     mu(k) = 1 / (2 N_e(k)) + g k^2 / 4 + r                   [1 per e-/Å^2]

whose three terms are

- the critical exposure N_e(k) = a k^-b + c, measured on single particles: everything fades, coarse detail slowly, and
  what lies at k = 0, the mass, stays (Grant & Grigorieff 2015, doi:10.7554/eLife.06980);
- a B-factor that grows by g per dose: atoms move about;
- a loss of occupancy at the rate r: atoms leave.

g and r may differ from class to class of atoms. A frame that lasts from N_1 to N_2 sees the mean,

    exp(-mu N_1) (1 - exp(-x)) / x,      x = mu (N_2 - N_1)

so frames add up exactly, whatever their number. The image is linear in it as far as the specimen is weak.

Water does not fade, it diffuses: a mean squared displacement of D N in three dimensions is a B-factor of
(8 pi^2 / 3) D N. McMullan, Vinothkumar & Henderson 2015 (doi:10.1016/j.ultramic.2015.05.017) measured D = 1.1 Å^2 per
e-/Å^2 at 300 kV. It acts on explicit water molecules and on the fluctuations of structured ice.

At another voltage an electron does the damage of 1 / voltage_factor electrons at 300 kV; the doses above are counted in
those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from cryosim.core.decay import mean_decay
from cryosim.core.fourier import number
from cryosim.core.record import Record, differentiated, hidden, item
from cryosim.specimen.atoms import CLASSES, Atoms
from cryosim.specimen.moment import Moment

Number = float | torch.Tensor

_WATER = CLASSES.index("water")
_SOLIDS = (CLASSES.index("solid"), CLASSES.index("deposit"))
_VOLTAGES = (100.0, 200.0, 300.0)  # [kV]
_FACTORS = (1 / 1.57, 0.8, 1.0)


class CriticalExposure(Record):
    """N_e(k) = scale k^(-exponent) + offset [e-/Å^2], k in 1/Å: the dose after which the power has fallen to 1/e.

    Attributes
    ----------
    scale : float or tensor ()
        [e-/Å^2 Å^-exponent]; inf for no damage.
    exponent : float or tensor ()
        [1], positive.
    offset : float or tensor ()
        [e-/Å^2].

    Source: Grant & Grigorieff 2015, doi:10.7554/eLife.06980, of rotavirus at 300 kV. The defaults are theirs.
    """

    scale: Number = item(0, default=0.24499)
    exponent: Number = item(0, default=1.6649)
    offset: Number = item(0, default=2.8141)

    def __post_init__(self) -> None:
        if hidden():
            return
        for name in ("scale", "exponent", "offset"):
            value = number(getattr(self, name))
            if not value >= 0 or (name == "exponent" and not 0 < value < math.inf):
                raise ValueError(f"CriticalExposure.{name}: expected a positive number, got {value}.")


class Damage(Record):
    """How matter changes in the beam. `critical` holds all that fades; B-factors and losses stand in its place.

    Attributes
    ----------
    critical : CriticalExposure or None
        Of every class but water; None for none.
    b_growth : float or tensor () or (class,)
        Growth of the B-factors of each class of atoms [Å^2 per e-/Å^2]; one number is for all. See `Atoms.classes`.
    loss : float or tensor () or (class,)
        Rate at which atoms of each class leave [1 per e-/Å^2]: occupancies fall as exp(-loss N). Acidic side chains,
        disulfides and metals go first (Hattne et al. 2018, doi:10.1016/j.str.2018.03.021); the rates are yours to give.
    water_diffusion : float or tensor ()
        Mean squared displacement of water [Å^2 per e-/Å^2]. The fluctuations of structured ice change by it from frame
        to frame; explicit molecules of water fade to their mean, as none of the places they may go to is drawn.
    voltage_factor : float or tensor () or None
        Dose at this voltage over the dose at 300 kV that does the same [1]; None takes `voltage_factor`.

    Raises
    ------
    ValueError
        When a rate is negative.
    """

    critical: CriticalExposure | None = CriticalExposure()
    b_growth: Number = item(1, default=0.0)
    loss: Number = item(1, default=0.0)
    water_diffusion: Number = item(0, default=1.1)
    voltage_factor: Number | None = item(0, default=None)

    def __post_init__(self) -> None:
        if hidden():
            return
        for name in ("b_growth", "loss", "water_diffusion"):
            value = torch.as_tensor(getattr(self, name)).detach()
            if value.ndim > (name != "water_diffusion") or not bool((value >= 0).all()):
                raise ValueError(
                    f"Damage.{name}: expected rates of 0 or more, one or one a class, got {value.tolist()}."
                )
        if self.voltage_factor is not None and not 0 < number(self.voltage_factor) < math.inf:
            raise ValueError(f"Damage.voltage_factor: expected a positive number, got {number(self.voltage_factor)}.")


def voltage_factor(voltage: Number) -> Number:
    """Dose at `voltage` [kV] over the dose at 300 kV that does the same damage [1].

    The parabola through 1 at 300 kV, 0.8 at 200 kV and 1 / 1.57 = 0.637 at 100 kV. The last is what Peet, Henderson &
    Russo 2019 (doi:10.1016/j.ultramic.2019.02.007) measured on protein crystals and on particles, and close to the 0.64
    that RELION takes; the 0.532 of other programs is a ratio of cross-sections and was not measured.

    Raises
    ------
    ValueError
        Outside of 100 to 300 kV, where nothing supports it: give `Damage.voltage_factor`.
    """
    if not hidden() and not bool(((torch.as_tensor(voltage) >= 99.999) & (torch.as_tensor(voltage) <= 300.001)).all()):
        raise ValueError(
            "Damage.voltage_factor: expected a voltage between 100 and 300 kV, where it was measured, got "
            f"{voltage} kV. Give Damage(voltage_factor=...) for another."
        )
    x = (voltage - _VOLTAGES[0]) / (_VOLTAGES[1] - _VOLTAGES[0])
    first, second, third = _FACTORS
    return first + (second - first) * x + (third - 2 * second + first) * x * (x - 1) / 2


def critical_exposure(
    frequency: Number, voltage: Number = 300.0, critical: CriticalExposure | None = None
) -> torch.Tensor:
    """Dose N_e (...) [e-/Å^2] at which the power of detail at `frequency` (...) [1/Å] has fallen to 1/e; inf at 0.

    Raises
    ------
    ValueError
        From `voltage_factor`.
    """
    k = torch.as_tensor(frequency, dtype=None if isinstance(frequency, torch.Tensor) else torch.float64)
    rate = 2 * _critical_rate(CriticalExposure() if critical is None else critical, k**2)
    return voltage_factor(voltage) / rate


def optimal_exposure(
    frequency: Number, voltage: Number = 300.0, critical: CriticalExposure | None = None
) -> torch.Tensor:
    """Dose [e-/Å^2] after which more electrons take from a plain sum at `frequency` [1/Å] more than they give.

    The signal of a sum up to N is the integral of exp(-n / 2N_e), its noise grows as sqrt(N). With x = N / N_e the
    ratio (1 - exp(-x / 2)) / sqrt(x) is largest where exp(x / 2) = 1 + x: x = 2.51286.
    """
    return 2.5128624172523393 * critical_exposure(frequency, voltage, critical)


def fading(
    damage: Damage,
    squared_frequency: torch.Tensor,
    moment: Moment,
    voltage: Number | None = None,
    which: int = 0,
) -> torch.Tensor:
    """Amplitude (...) [1] that is left at k^2 (...) [1/Å^2] of atoms of class `which`, averaged over a frame.

    Parameters
    ----------
    damage : Damage
    squared_frequency : tensor (...)
        [1/Å^2].
    moment : Moment
    voltage : float or tensor (), optional
        [kV]; needed unless the damage states its `voltage_factor`.
    which : int
        Class of atoms, see `Atoms.classes`.

    Raises
    ------
    ValueError
        When the voltage is missing, or a class has no rate.
    """
    rate = decay_rate(damage, squared_frequency, which) / _factor(damage, voltage)
    start, during = (torch.as_tensor(d, dtype=rate.dtype) for d in (moment.start, moment.during))
    return torch.exp(-rate * start) * mean_decay(rate * during)


def decay_rate(damage: Damage, squared_frequency: torch.Tensor, which: int = 0) -> torch.Tensor:
    """mu (...) [1 per e-/Å^2 at 300 kV] of atoms of class `which` at k^2 (...) [1/Å^2]."""
    if which in _SOLIDS:
        return torch.zeros_like(squared_frequency)
    growth = _of_class(damage.b_growth, which, "b_growth")
    rate = 0.25 * growth * squared_frequency + _of_class(damage.loss, which, "loss")
    if which == _WATER:
        return rate + 0.25 * (8 * math.pi**2 / 3) * damage.water_diffusion * squared_frequency
    return rate if damage.critical is None else rate + _critical_rate(damage.critical, squared_frequency)


def water_decay(damage: Damage, voltage: Number | None = None) -> float:
    """Rate [Å^2 per e-/Å^2], times k^2, at which the fluctuations of water forget what they were.

    Of molecules that diffuse on their own a density wave decays as exp(-(2 pi k)^2 <x^2> / 2), with <x^2> a third of
    the mean squared displacement. Near the ring of the structure factor real water is slower (de Gennes narrowing).

    Raises
    ------
    ValueError
        When the voltage is missing, or a gradient in the diffusion is asked for: the field is drawn, it has none.
    """
    if differentiated(damage.water_diffusion):
        raise ValueError(
            "Damage.water_diffusion: the fluctuations of structured ice have no gradient in it; give a number, or make "
            "the water explicit with `flooded`."
        )
    return (2 * math.pi) ** 2 / 6 * number(damage.water_diffusion) / number(_factor(damage, voltage))


def alike(damage: Damage | None, atoms: Atoms) -> Iterator[tuple[object, Atoms, int]]:
    """Parts of the atoms that fade alike: what tells them apart, the atoms, and a class that each belongs to.

    Classes are told apart only where their rates differ, or where a derivative in the rates may be asked for.
    """
    if len(atoms) == 0:
        return
    if damage is None:
        yield None, atoms, 0
        return
    apart = differentiated(damage.b_growth) or differentiated(damage.loss)
    groups: dict[object, list[int]] = {}
    for which in torch.unique(atoms.classes).tolist():
        rates = tuple(number(_of_class(getattr(damage, name), which, name)) for name in ("b_growth", "loss"))
        groups.setdefault(which if apart else (rates, which == _WATER), []).append(which)
    for key, members in groups.items():
        mine = torch.isin(atoms.classes, atoms.classes.new_tensor(members)) if len(groups) > 1 else slice(None)
        yield key, atoms.index(mine), members[0]


def fading_of(
    damage: Damage | None, moments: Sequence[Moment], voltage: Number | None, which: int
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """`fading` at one moment (...) or at several (moment, ...) as a function of k^2 alone; None where nothing fades."""
    if damage is None:
        return None

    def left(squared_frequency: torch.Tensor) -> torch.Tensor:
        amplitudes = [fading(damage, squared_frequency, moment, voltage, which) for moment in moments]
        return amplitudes[0] if len(moments) == 1 else torch.stack(amplitudes)

    return left


def _factor(damage: Damage, voltage: Number | None) -> Number:
    if damage.voltage_factor is not None:
        return damage.voltage_factor
    if voltage is None:
        raise ValueError("Damage: expected the voltage [kV]; give voltage=, or state Damage.voltage_factor.")
    return voltage_factor(voltage)


def _critical_rate(critical: CriticalExposure, squared_frequency: torch.Tensor) -> torch.Tensor:
    """1 / (2 N_e), as k^b / (2 (a + c k^b)): zero at k = 0, with finite derivatives in everything."""
    somewhere = squared_frequency > 0
    power = torch.where(somewhere, squared_frequency, 1.0) ** (0.5 * critical.exponent)
    return torch.where(somewhere, 0.5 * power / (critical.scale + critical.offset * power), 0.0)


def _of_class(rates: Number, which: int, name: str) -> Number:
    if not isinstance(rates, torch.Tensor) or rates.ndim == 0:
        return rates
    if which >= len(rates):
        raise ValueError(f"Damage.{name}: expected a rate for class {which} of the atoms too, got {len(rates)} rates.")
    return rates[which]
