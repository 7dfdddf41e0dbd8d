"""Inelastic scattering: how far an electron flies between two energy losses, and the absorption that follows.

A slab of thickness t and mean free path Lambda lets exp(-t / Lambda) of the electrons pass without a loss. Behind an
energy filter the others are gone, which an imaginary potential describes:

    |exp(i sigma i V_im t)|^2 = exp(-2 sigma V_im t) = exp(-t / Lambda),     V_im = 1 / (2 sigma Lambda)

(Vulović et al. 2013, doi:10.1016/j.jsb.2013.05.008.) All functions take floats or tensors and are differentiable.
"""

from __future__ import annotations

import math

import torch

from cryosim.core.constants import REST_ENERGY, interaction_constant

Number = float | torch.Tensor

REFERENCE_VOLTAGE = 300.0
"""Voltage the mean free paths below belong to [kV]."""
ICE = 3750.0
"""Inelastic mean free path of vitreous ice at 300 kV, 0.93 g/cm^3 [Å]: cross-sections of Langmore & Smith 1992
(Ultramicroscopy 46:349), as in Vulović et al. 2013, eq. 8, for losses of 20 eV. In use are 3150 (the program
Parakeet) to 3950 (measured on a Krios with an energy filter: the ice thickness page of the Leginon wiki)."""
PROTEIN = 1970.0
"""Inelastic mean free path of protein at 300 kV, 1.35 g/cm^3 [Å]; same formula."""
CARBON = 1730.0
"""Inelastic mean free path of amorphous carbon at 300 kV, 1.75 g/cm^3 [Å]; same formula."""
SOLID_PATHS = {6: CARBON, 8: ICE, 78: 1030.0, 79: 1060.0}
"""Inelastic mean free paths at 300 kV of solids [Å], by atomic number; 8 is frozen water. Platinum and gold by eq. 9 of
Iakoubovskii et al. 2008, doi:10.1002/jemt.20597; that of Malis et al. 1988 has 770 for both."""

ICE_INNER_POTENTIAL = 4.5301
"""Mean inner potential of vitreous ice at 0.93 g/cm^3 [V]: Vulović et al. 2013, doi:10.1016/j.jsb.2013.05.008."""
PROTEIN_INNER_POTENTIAL = 8.0
"""Mean inner potential of protein at 1.35 g/cm^3 [V]: independent atoms of ubiquitin with its hydrogens, 7.97 to 8.01
by the three tables of scattering factors; without hydrogens it would be 7.0 (as often quoted) at the same density."""

_LOSS = 20.0  # mean energy loss the scaling assumes [eV]


def mean_free_path(reference: Number, voltage: Number) -> Number:
    """Inelastic mean free path at a voltage, from the one at 300 kV.

    Parameters
    ----------
    reference : float or tensor (...)
        Mean free path at 300 kV [Å]: `ICE`, `PROTEIN`, `CARBON` or a measured one.
    voltage : float or tensor (...)
        [kV].

    Returns
    -------
    float or tensor (...)
        [Å].

    Raises
    ------
    ValueError
        When a number is not positive.

    Notes
    -----
    Lambda is proportional to beta^2 / ln(2 / theta_E), with beta = v / c and the characteristic angle
    theta_E = (E / eV) (eV + m c^2) / (eV + 2 m c^2) of a loss E = 20 eV (Langmore & Smith 1992; Vulović et al. 2013,
    eq. 8). Ice: 3750, 3108 and 2056 Å at 300, 200 and 100 kV.
    """
    _check("reference", reference, "Å", "3750 is ice")
    _check("voltage", voltage, "kV", "300 is usual")
    return reference * (_reach(voltage) / _reach(REFERENCE_VOLTAGE))


def absorption_potential(mean_free_path: Number, voltage: Number) -> Number:
    """Imaginary potential V_im = 1 / (2 sigma Lambda) that takes away the electrons with a loss.

    Parameters
    ----------
    mean_free_path : float or tensor (...)
        Inelastic mean free path Lambda at this voltage [Å].
    voltage : float or tensor (...)
        [kV].

    Returns
    -------
    float or tensor (...)
        [V]; at 300 kV 0.204 for ice and 0.389 for protein. A slice of thickness d has the imaginary part V_im d.

    Raises
    ------
    ValueError
        When a number is not positive.
    """
    _check("mean_free_path", mean_free_path, "Å", "3750 is ice at 300 kV")
    _check("voltage", voltage, "kV", "300 is usual")
    return 1 / (2 * interaction_constant(voltage) * mean_free_path)  # pyright: ignore[reportArgumentType]


def inelastic_contrast(
    voltage: Number,
    *,
    reference: Number = PROTEIN,
    medium_reference: Number = ICE,
    inner_potential: Number = PROTEIN_INNER_POTENTIAL,
    medium_inner_potential: Number = ICE_INNER_POTENTIAL,
) -> Number:
    """Amplitude contrast A that inelastic scattering alone gives a body in a medium, behind a zero-loss filter.

    Parameters
    ----------
    voltage : float or tensor (...)
        [kV].
    reference, medium_reference : float or tensor (...)
        Mean free paths of the body and of the medium at 300 kV [Å]; protein and ice when left out.
    inner_potential, medium_inner_potential : float or tensor (...)
        Mean inner potentials [V]; protein with its hydrogens at 1.35 g/cm^3, ice at 0.93 g/cm^3.

    Returns
    -------
    float or tensor (...)
        A [1], for protein in ice 0.053 at 300 kV and 0.068 at 100 kV: the A of a potential (sqrt(1 - A^2) + i A) V.

    Raises
    ------
    ValueError
        When a voltage or mean free path given as a number is not positive.

    Notes
    -----
    A / sqrt(1 - A^2) is the ratio of what the body adds to the imaginary and to the real potential. Values in use are
    0.07 (measured on protein in ice by Toyoshima & Unwin 1988, Ultramicroscopy 25:279) to 0.10 (the default of many
    single-particle programs). So inelastic loss explains over half of it; electrons scattered elastically beyond the
    aperture or the band of the simulation add to it. (With 7.0 V for protein, which leaves out its hydrogens, it would
    be 0.075.)
    A specimen whose slices carry their absorption must not be given it again by `Optics.amplitude_contrast`.
    """
    body = absorption_potential(mean_free_path(reference, voltage), voltage)
    medium = absorption_potential(mean_free_path(medium_reference, voltage), voltage)
    ratio = (body - medium) / (inner_potential - medium_inner_potential)
    return ratio * (1 + ratio**2) ** -0.5  # pyright: ignore[reportReturnType]


def log_ratio_thickness(zero_loss: Number, unfiltered: Number, mean_free_path: Number) -> Number:
    """Thickness from two intensities, with and without the energy filter.

    Parameters
    ----------
    zero_loss : float or tensor (...)
        Intensity behind a filter that passes electrons without a loss only [any unit].
    unfiltered : float or tensor (...)
        Intensity of all electrons [same unit].
    mean_free_path : float or tensor (...)
        Inelastic mean free path at this voltage [Å].

    Returns
    -------
    float or tensor (...)
        Lambda ln(unfiltered / zero_loss) [Å].

    Raises
    ------
    ValueError
        When an intensity or the mean free path is not positive.

    Notes
    -----
    Malis, Cheng & Egerton 1988, doi:10.1002/jemt.1060080206. Electrons that an aperture stops are missing in both
    intensities, so they cancel where elastic and inelastic scattering are independent. Average noisy images first:
    a pixel without electrons has no logarithm.
    """
    for name, value in (("zero_loss", zero_loss), ("unfiltered", unfiltered)):
        _check(name, value, "any unit", "average noisy images first")
        if isinstance(value, torch.Tensor) and not (value > 0).all():
            raise ValueError(f"{name}: expected positive intensities, got {float(value.min())}; average pixels first.")
    _check("mean_free_path", mean_free_path, "Å", "3750 is ice at 300 kV")
    return mean_free_path * _log(unfiltered / zero_loss)


def _reach(voltage: Number) -> Number:
    """beta^2 / ln(2 / theta_E) [1]."""
    energy = 1e3 * voltage  # [eV]
    beta2 = energy * (energy + 2 * REST_ENERGY) / (energy + REST_ENERGY) ** 2
    angle = _LOSS / energy * (energy + REST_ENERGY) / (energy + 2 * REST_ENERGY)  # theta_E [rad]
    return beta2 / _log(2 / angle)


def _log(value: Number) -> Number:
    return torch.log(value) if isinstance(value, torch.Tensor) else math.log(value)


def _check(name: str, value: Number, unit: str, hint: str) -> None:
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"{name}: expected a positive number [{unit}], got {value}; {hint}.")
