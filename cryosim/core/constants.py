"""Physical constants (CODATA 2018, as in scipy.constants) and the two numbers of electron optics made from them.

    eV        : kinetic energy of the electron
    lambda    = h c / sqrt(eV (eV + 2 m c^2))
    sigma     = 2 pi (eV + m c^2) / (lambda eV (eV + 2 m c^2)) * eV / V   [rad / (V Å)]

(Kirkland, Advanced Computing in Electron Microscopy, 3rd ed. 2020, eqs. 2.5 and 5.6.)
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from scipy import constants as codata

Scalar = TypeVar("Scalar", float, torch.Tensor)

PLANCK_TIMES_LIGHT = codata.h * codata.c / codata.e * 1e10
"""h c [eV Å]."""
REST_ENERGY = codata.m_e * codata.c**2 / codata.e
"""m c^2 of the electron [eV]."""
POTENTIAL_PER_FORM_FACTOR = codata.h**2 / (2 * math.pi * codata.m_e * codata.e) * 1e20
"""h^2 / (2 pi m e) [V Å^2]: Fourier transform of the potential [V Å^3] = this times the form factor [Å]."""


def wavelength(voltage: Scalar) -> Scalar:
    """De Broglie wavelength of electrons accelerated by `voltage`.

    Parameters
    ----------
    voltage : float or tensor (...)
        Acceleration voltage [kV].

    Returns
    -------
    float or tensor (...)
        Wavelength [Å]; 0.019687489 at 300 kV.

    Raises
    ------
    ValueError
        When a voltage given as a number is not positive.
    """
    energy = _energy(voltage)
    return PLANCK_TIMES_LIGHT * (energy * (energy + 2 * REST_ENERGY)) ** -0.5  # pyright: ignore[reportReturnType]


def interaction_constant(voltage: Scalar) -> Scalar:
    """Phase shift of the electron wave per projected potential, sigma.

    Parameters
    ----------
    voltage : float or tensor (...)
        Acceleration voltage [kV].

    Returns
    -------
    float or tensor (...)
        sigma [rad/(V·Å)]; 6.526161e-4 at 300 kV.

    Raises
    ------
    ValueError
        When a voltage given as a number is not positive.
    """
    energy = _energy(voltage)
    return 2 * math.pi * (energy + REST_ENERGY) / (wavelength(voltage) * energy * (energy + 2 * REST_ENERGY))


def _energy(voltage: Scalar) -> Scalar:
    if isinstance(voltage, (int, float)) and not voltage > 0:
        raise ValueError(f"voltage: expected a positive number [kV], got {voltage}. 300 is usual.")
    return 1e3 * voltage
