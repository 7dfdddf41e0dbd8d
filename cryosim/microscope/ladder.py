"""What each step down the ladder of scattering costs, for a given specimen, voltage and resolution.

A flat projection forgets the heights. What scatters at height z to the frequency k is then wrong by the factor
exp(i phi z), phi = pi lambda k^2, so that for weak matter spread evenly over a thickness t

    error of projection = sqrt(2 - 2 sin(a) / a),     a = pi lambda k^2 t / 2

which at the customary limit t = 0.7 d^2 / lambda (DeRosier 2000, doi:10.1016/S0304-3991(99)00120-5; d = 1 / k) is 0.62
at d itself, and 0.07 at 3 d. Ewald and Rytov keep the heights, and leave out that scattered waves scatter
again. How much that is depends on the specimen: here it is measured.

Multislice has an error of its own, from slices of finite thickness d. Where a slice's matter does not stand at its
middle, flight over the rest is left out: of second order, b d^2 with b ~ (pi lambda k^2)^2, as matter keeps its height
on the mean. And matter shared between two slices scatters in both, or in one slice does not scatter twice: of first
order, a d, but also of second order in the potential, so it rules where d is small. With w(d) the wave,

    D1 = |w(2 d) - w(d)|,    D2 = |w(4 d) - w(2 d)|,    E = D1 / (D2 / D1 - 1),    2 <= D2 / D1 <= 4

is Richardson's estimate for the order that is found, between the first (E = D1) and the second (E = D1 / 3). Slices are
merged so that matter keeps its height on the mean, with hats instead of boxes,

    V_j = v_(2j - 1) / 2 + v_2j + v_(2j + 1) / 2

acting where v_2j does. Atoms shared linearly between slice centres d apart are then shared linearly between centres
2 d apart, because a hat is the sum of three hats half as wide. Plain sums of two would displace every slice by d / 2
one way or the other: an error of first order in d and in the potential, that the slices at hand do not have.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch

from cryosim.core.constants import wavelength
from cryosim.core.fourier import band_limit, number, squared_frequencies
from cryosim.core.record import Record, item
from cryosim.core.slices import SliceSource
from cryosim.microscope.optics import Optics
from cryosim.microscope.scattering import Flight, born_field, multislice, once_scattered, projection

Scalar = TypeVar("Scalar", float, torch.Tensor)
Step = Literal["projection", "ewald", "rytov", "multislice"]


def depth_of_field(resolution: Scalar, voltage: Scalar) -> Scalar:
    """Thickness up to which a flat projection is customarily taken to hold at a resolution.

    Parameters
    ----------
    resolution : float or tensor (...)
        d [Å].
    voltage : float or tensor (...)
        [kV].

    Returns
    -------
    float or tensor (...)
        0.7 d^2 / lambda [Å] (DeRosier 2000); 320 Å for 3 Å at 300 kV. A generous limit, see the top of this file.

    Raises
    ------
    ValueError
        When a resolution or voltage given as a number is not positive.
    """
    if isinstance(resolution, (int, float)) and not resolution > 0:
        raise ValueError(f"depth_of_field: expected a positive resolution [Å], got {resolution}.")
    return 0.7 * resolution**2 / wavelength(voltage)


class MergedSlices(Record):
    """Source of slices twice as thick as those of another, merged with the weights 1/2, 1, 1/2 of a hat.

    Slice n // 2 of both stands at z = 0. At the ends the hats reach beyond the other's slices, so that the total and
    the mean height stay.

    Attributes
    ----------
    slices : source of slices (..., y, x)
        [V·Å].
    """

    slices: Any

    @property
    def pixel_size(self) -> float | torch.Tensor:
        """[Å]."""
        return self.slices.pixel_size

    @property
    def thickness(self) -> float | torch.Tensor:
        """Of one merged slice [Å]."""
        return 2 * self.slices.thickness

    def __len__(self) -> int:
        n = len(self.slices)
        return (n // 2 + 1) // 2 + (n - n // 2) // 2 + 1  # below the middle one, above it, itself

    def __getitem__(self, j: int) -> torch.Tensor:
        """Projected potential (..., y, x) [V·Å] of slice j."""
        m, n = len(self), len(self.slices)
        if not -m <= j < m:
            raise IndexError(f"slice {j} of {m}")
        middle = 2 * (j % m - m // 2) + n // 2  # the slice at the same height
        parts = [(i, 1.0 if i == middle else 0.5) for i in (middle - 1, middle, middle + 1) if 0 <= i < n]
        total = parts[0][1] * self.slices[parts[0][0]]
        for i, weight in parts[1:]:
            total = total + weight * self.slices[i]
        return total


class ScatteringError(Record):
    """Relative errors of exit waves, by Fourier ring. Made by `scattering_error`.

    In ring K, with F the multislice wave and G another: sqrt(sum |F - G|^2 / sum |F|^2).

    Attributes
    ----------
    frequency : tensor (shell,)
        Of the rings' middles, below two thirds of Nyquist; k = 0 belongs to none [1/Å].
    energy : tensor (..., shell)
        Part of the incident electrons that multislice scatters into the ring [1].
    projection, ewald, rytov : tensor (..., shell)
        Of the wave of that step against multislice [1].
    slicing : tensor (..., shell)
        Of multislice, by the thickness of its slices [1]; estimated, see the top of this file. Right to a third with
        ten slices or more, up to two and a half times too large with few.
    """

    frequency: torch.Tensor
    energy: torch.Tensor = item(1)
    projection: torch.Tensor = item(1)
    ewald: torch.Tensor = item(1)
    rytov: torch.Tensor = item(1)
    slicing: torch.Tensor = item(1)

    def at(self, resolution: float) -> dict[str, torch.Tensor]:
        """Relative errors of all detail together that is coarser than a resolution.

        Parameters
        ----------
        resolution : float
            [Å].

        Returns
        -------
        dict of tensor (...)
            "projection", "ewald", "rytov", "slicing" [1]: root mean squares of the rings', weighted by energy.

        Raises
        ------
        ValueError
            When the resolution lies outside the rings.
        """
        coarsest, finest = (1 / float(self.frequency[i]) for i in (0, -1))
        inside = self.frequency <= (1 + 1e-9) / resolution if resolution > 0 else self.frequency < 0
        if not inside.any() or resolution < finest * (1 - 1e-9):
            raise ValueError(
                f"ScatteringError.at: expected a resolution from {finest:.4g} to {coarsest:.4g} Å, got {resolution}. "
                "Smaller pixels give finer detail, a larger field coarser."
            )
        energy = self.energy[..., inside]
        return {
            name: ((getattr(self, name)[..., inside] ** 2 * energy).sum(-1) / energy.sum(-1)).sqrt()
            for name in ("projection", "ewald", "rytov", "slicing")
        }

    def cheapest(self, resolution: float, tolerance: float) -> Step:
        """Name of the cheapest function of the ladder whose wave is right to a tolerance.

        Projection takes no transforms, ewald and rytov one a slice, and multislice two.

        Parameters
        ----------
        resolution : float
            Of the finest detail that matters [Å].
        tolerance : float
            Largest relative error of all detail up to there [1]; of every specimen where there are several.

        Returns
        -------
        {"projection", "ewald", "rytov", "multislice"}

        Raises
        ------
        ValueError
            When the slices are too thick even for multislice, the resolution lies outside the rings, or the tolerance
            is not positive.
        """
        if not tolerance > 0:
            raise ValueError(f"ScatteringError.cheapest: expected a positive tolerance, got {tolerance}.")
        errors = {name: float(value.max()) for name, value in self.at(resolution).items()}
        if not errors["slicing"] <= tolerance:
            raise ValueError(
                f"ScatteringError.cheapest: expected slices thin enough for a relative error of {tolerance:g} at "
                f"{resolution:g} Å, got {errors['slicing']:.2g}. Take thinner slices, or a larger tolerance."
            )
        steps: tuple[Step, ...] = ("projection", "ewald", "rytov")
        for step in steps:
            if errors[step] <= tolerance:
                return step
        return "multislice"


@torch.no_grad()
def scattering_error(slices: SliceSource, optics: Optics, *, flight: Flight = "fresnel") -> ScatteringError:
    """What each step down the ladder costs for this specimen: errors of the exit waves by resolution.

    It takes the time of about three runs of multislice, six where the slices are computed when they are asked for. For
    a large specimen run it on a crop, 100 to 200 Å wide, as thick and as dense.

    Parameters
    ----------
    slices : source of slices (..., y, x)
        [V·Å]; two or more.
    optics : Optics
        Its voltage, beam tilt and amplitude contrast count; the lens does not.
    flight : {"fresnel", "exact"}
        As in `multislice`.

    Returns
    -------
    ScatteringError

    Raises
    ------
    ValueError
        When there are less than two slices, they scatter nothing, or are not finite.

    Notes
    -----
    The errors are those of waves. A small part of a wave's error may be invisible in an image, or, near a zero of the
    contrast transfer, all that is seen.
    """
    if len(slices) < 2:
        raise ValueError(
            f"scattering_error: expected two slices or more, got {len(slices)}. With one, all steps are the same and "
            "the error of slicing cannot be known; take thinner slices."
        )
    field = born_field(slices, optics, flight)
    wave, twice, fourfold = (
        multislice(source, optics, flight=flight)
        for source in (slices, MergedSlices(slices), MergedSlices(MergedSlices(slices)))
    )
    frequency, ring = _rings((wave.shape[-2], wave.shape[-1]), number(slices.pixel_size), wave.device)
    energy = _energies(wave, ring, len(frequency))  # (..., shell)
    rounding = 10 * torch.finfo(wave.real.dtype).eps
    if not (energy.sum(-1) > len(slices) * rounding**2).all():
        raise ValueError("scattering_error: expected slices that scatter, got a wave that is the same everywhere.")

    def apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (_energies(one - other, ring, len(frequency)) / energy.clamp_min(1e-300)).sqrt()  # (..., shell)

    near, far = apart(twice, wave), apart(fourfold, twice)
    return ScatteringError(
        frequency,
        energy,
        projection=apart(projection(slices, optics), wave),
        ewald=apart(once_scattered(field), wave),
        rytov=apart(torch.exp(field), wave),
        slicing=near / ((far / near.clamp_min(1e-300)).clamp(2, 4) - 1),
    )


def _rings(shape: tuple[int, int], pixel_size: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Middles (shell,) [1/Å] of the rings, and the ring of every frequency (y * x,); those of none are of the last."""
    step = 1 / (min(shape) * pixel_size)  # no ring is empty
    k = squared_frequencies(shape, pixel_size, dtype=torch.float64, device=device).sqrt()
    ring = (k / step).round().long()
    inside = (band_limit(shape, dtype=torch.float64, device=device) > 0) & (ring > 0)
    n = int(ring[inside].max()) if inside.any() else 0
    if n == 0:
        raise ValueError(
            f"scattering_error: expected a field with frequencies below two thirds of Nyquist, got {shape}."
        )
    frequency = step * torch.arange(1, n + 1, dtype=torch.float64, device=device)
    return frequency, torch.where(inside, ring - 1, n).flatten()


def _energies(wave: torch.Tensor, ring: torch.Tensor, n: int) -> torch.Tensor:
    """Sum of |F|^2 (..., shell) in every ring; 1 is the incident wave."""
    spectrum = torch.fft.fft2(wave, norm="forward")
    squares = (spectrum.real.double() ** 2 + spectrum.imag.double() ** 2).flatten(-2)
    return squares.new_zeros(*squares.shape[:-1], n + 1).index_add(-1, ring, squares)[..., :n]
