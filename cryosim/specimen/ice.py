"""Ice: a slab about the molecules, its surfaces, its structure, and what it takes from the beam.

In the frame of the specimen the slab lies between z = -thickness / 2 and +thickness / 2, each surface raised by its
relief. Turned by R_z(axis_angle) R_y(t), the point (x, y, z) of a surface is seen at u = x cos t + z sin t and stands
at the height w = z cos t - x sin t, so that above (u, v)

    x = (u - z sin t) / cos t,    w = (z - u sin t) / cos t,    column = thickness / cos t

Mean potential has no structure across the beam, so its height does not matter: it is shared evenly by the slices. What
a relief adds stands at the height of its surface. The molecules displace the ice by their volumes, with its potential,
its structure and its absorption.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Literal

import torch

from cryosim.core.fourier import SamplingWarning, fast_length, number, positions, squared_frequencies
from cryosim.core.inelastic import ICE, ICE_INNER_POTENTIAL, PROTEIN
from cryosim.core.record import Record, hidden, item, static
from cryosim.core.slices import SliceSource, column, in_order
from cryosim.specimen.water import WaterField

Structure = Literal["constant", "water"]

_STEPS = 6
"""Towards the point at which a ray meets a relief; each multiplies the error by slope * tan(tilt)."""


class Relief(Record):
    """Heights of the two surfaces of a slab above their flat planes, outwards, on a grid about the origin.

    Attributes
    ----------
    heights : tensor (2, y, x)
        Of the surface the beam enters by, and of the one it leaves by [Å]. Beyond the grid its edge goes on.
    spacing : float
        Of the grid [Å].
    """

    heights: torch.Tensor = item(3)
    spacing: float = static()

    def __post_init__(self) -> None:
        if self.heights.ndim != 3 or self.heights.shape[0] != 2 or not self.spacing > 0:
            raise ValueError(
                f"Relief: expected heights (2, y, x) [Å] and a positive spacing [Å], got {tuple(self.heights.shape)} "
                f"and {self.spacing}."
            )


def rough_relief(
    extent: float, roughness: float, correlation: float, *, generator: torch.Generator | None = None
) -> Relief:
    """Two independent random surfaces with Gaussian heights and a Gaussian correlation.

    Parameters
    ----------
    extent : float
        Least width of the grid [Å]; more than will be seen, which at a tilt t is diagonal of the field / cos t +
        thickness * tan t. At least 8 correlations are made, as the grid is periodic.
    roughness : float
        Standard deviation of the heights [Å].
    correlation : float
        Distance at which the correlation falls to 1/e [Å].
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When extent or correlation is not positive.
    """
    if not (extent > 0 and correlation > 0):
        raise ValueError(
            f"rough_relief: expected a positive extent and correlation [Å], got {extent} and {correlation}."
        )
    spacing = correlation / 4
    n = fast_length(max(int(extent / spacing) + 2, 32))
    noise = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
    k2 = squared_frequencies((n, n), spacing, dtype=torch.float64)
    smooth = torch.exp(-0.5 * torch.pi**2 * correlation**2 * k2)  # root of the spectrum of exp(-r^2 / correlation^2)
    smooth = smooth / smooth.square().mean().sqrt()
    return Relief(roughness * torch.fft.ifft2(torch.fft.fft2(noise) * smooth).real, spacing)


def meniscus(extent: float, deepening: float, radius: float, *, centre: tuple[float, float] = (0.0, 0.0)) -> Relief:
    """Ice in a hole: thinnest at the centre, `deepening` thicker at a distance `radius` from it, as the square of it.

    Parameters
    ----------
    extent : float
        Width of the grid [Å].
    deepening : float
        Additional thickness at the radius, half of it on either side [Å].
    radius : float
        [Å].
    centre : (float, float)
        (x, y) of the thinnest place [Å].
    """
    n = 64
    spacing = extent / n
    y, x = (positions(n, spacing, dtype=torch.float64) - c for c in (centre[1], centre[0]))
    height = 0.5 * deepening * (x**2 + y[:, None] ** 2) / radius**2
    return Relief(height.expand(2, n, n).clone(), spacing)


class Ice(Record):
    """A slab of vitreous ice, wider than any field of view, normal to z at zero tilt.

    Atoms displace ice wherever they stand, so they belong inside the slab. With amplitude contrast A the ice weakens
    the beam by exp(-2 sigma A V t / cos(tilt)): a mean free path of 2400 Å at 300 kV for A = 0.07, 1700 Å for A = 0.1.
    With `Absorption` the mean free paths are stated instead.

    Attributes
    ----------
    thickness : float or tensor ()
        [Å].
    inner_potential : float or tensor ()
        Mean potential of the ice [V]. Atoms displace it by their volumes.
    relief : Relief, optional
        Of its surfaces.
    structure : {"constant", "water"}
        Whether the potential is constant or fluctuates as that of vitreous water does (`WaterField`: ring at 3.7 Å).
        The fluctuations of one tilt and the next are independent: water moves by more than its nearest neighbours are
        apart within a few e-/Å^2 (McMullan, Vinothkumar & Henderson 2015, doi:10.1016/j.ultramic.2015.05.017). From
        frame to frame of one exposure they change as `Damage.water_diffusion` says; without damage they do not.
    seed : int
        Of the fluctuations.
    """

    thickness: float | torch.Tensor = item(0)
    inner_potential: float | torch.Tensor = item(0, default=ICE_INNER_POTENTIAL)
    relief: Relief | None = None
    structure: Structure = static(default="constant")
    seed: int = static(default=0)

    def __post_init__(self) -> None:
        if isinstance(self.thickness, (int, float)) and not self.thickness > 0:
            raise ValueError(f"Ice.thickness: expected a positive number [Å], got {self.thickness}.")
        if self.structure not in ("constant", "water"):
            raise ValueError(f"Ice.structure: expected 'constant' or 'water', got {self.structure!r}.")
        if self.relief is not None and not hidden():
            least = number((self.thickness + self.relief.heights.sum(0)).min())
            if not least > 0:
                raise ValueError(
                    f"Ice.relief: expected surfaces that do not meet, got a thickness of {least:.3g} Å at one place. "
                    "Take thicker ice or less relief."
                )


class Absorption(Record):
    """Electrons that lose energy leave the image of those that do not: absorption by inelastic mean free paths.

    Attributes
    ----------
    medium, molecules : float or tensor ()
        Inelastic mean free paths at 300 kV of the ice and of what stands in it [Å]; at other voltages they are scaled
        by `cryosim.core.inelastic.mean_free_path`. Molecules absorb by the volume of their atoms: a structure without
        hydrogens has 30 % too little of it, so give it hydrogens first.
    """

    medium: float | torch.Tensor = item(0, default=ICE)
    molecules: float | torch.Tensor = item(0, default=PROTEIN)

    def __post_init__(self) -> None:
        for name in ("medium", "molecules"):
            if not hidden() and not number(getattr(self, name)) > 0:
                raise ValueError(
                    f"Absorption.{name}: expected a positive mean free path [Å], got {number(getattr(self, name))}. "
                    "3750 is ice, 1970 protein; inf absorbs nothing."
                )


class Surfaces(Record):
    """Reliefs seen along the beam: heights where they stand, and what they add to the column.

    Attributes
    ----------
    heights : tensor (2, y, x)
        w [Å] of the entrance and the exit surface.
    depths : tensor (2, y, x)
        [Å].
    """

    heights: torch.Tensor = item(3)
    depths: torch.Tensor = item(3)


def surfaces(
    ice: Ice,
    angle: float | torch.Tensor,
    axis_angle: float | torch.Tensor,
    shift: torch.Tensor | None,
    shape: tuple[int, int],
    pixel_size: float | torch.Tensor,
    device: torch.device | None = None,
) -> Surfaces:
    """The surfaces of a tilted slab above each pixel; arguments as in `tilted_slices`."""
    tilt, turn = (torch.deg2rad(torch.as_tensor(a, dtype=torch.float64)) for a in (angle, axis_angle))
    v, u = (positions(n, pixel_size, dtype=torch.float64, device=device) for n in shape)
    u, v = u[None, :], v[:, None]
    lifted = 0.0  # [Å] along the beam
    if shift is not None:
        u, v = u - shift[0], v - shift[1]
        lifted = shift[2] if len(shift) == 3 else 0.0
    across, along = u * torch.cos(turn) + v * torch.sin(turn), v * torch.cos(turn) - u * torch.sin(turn)
    sine, cosine = torch.sin(tilt), torch.cos(tilt)
    side = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=device)[:, None, None]
    plane = 0.5 * side * ice.thickness  # z of the flat surfaces (2, 1, 1) [Å]
    if ice.relief is None:
        heights = (plane - across * sine) / cosine + lifted
        return Surfaces(heights, torch.zeros_like(heights))
    relief = ice.relief.heights.to(plane)
    ny, nx = relief.shape[1:]
    _check_slope(ice.relief, tilt)
    raised = torch.zeros(2, *shape, dtype=torch.float64, device=device)
    for _ in range(_STEPS):  # the ray meets the raised surface at another x than the plane
        x = (across - (plane + side * raised) * sine) / cosine
        at = torch.stack(
            [
                (2 * (x / ice.relief.spacing + nx // 2) + 1) / nx - 1,
                (2 * (along.expand_as(x) / ice.relief.spacing + ny // 2) + 1) / ny - 1,
            ],
            -1,
        )
        raised = torch.nn.functional.grid_sample(relief[:, None], at, padding_mode="border", align_corners=False)[:, 0]
    return Surfaces((plane + side * raised - across * sine) / cosine + lifted, raised / cosine)


def _check_slope(relief: Relief, tilt: torch.Tensor) -> None:
    """Warn where rays come near to grazing a surface, or meet it more than once."""
    if hidden():
        return
    steep = max(float(relief.heights.detach().diff(dim=axis).abs().max()) for axis in (1, 2)) / relief.spacing
    shallow = steep * abs(math.tan(float(tilt.detach())))
    if shallow > 0.7:
        warnings.warn(
            f"tilted_slices: the relief is as steep as {steep:.2g}; rays at {math.degrees(float(tilt.detach())):.3g} "
            "degrees nearly graze it, and its depth is wrong in places. Right would be slopes below "
            f"{0.7 * steep / shallow:.2g}, by a larger correlation or less roughness.",
            SamplingWarning,
            stacklevel=4,
        )


class ImmersedSlices(Record):
    """Source of slices: molecules, which displace the ice, and the ice itself. Made by `tilted_slices`.

    Attributes
    ----------
    atoms : source of slices (y, x)
        Potential of the molecules above that of the ice they displace [V·Å].
    potential : tensor ()
        Mean potential of the ice [V]; 0 in vacuum.
    column : tensor ()
        Of ice, shared evenly by the slices [Å].
    volumes : tuple of sources of slices (y, x)
        Depth that each substance takes [Å]; where structure or absorption ask for it.
    absorption : tensor (1 + substance,) or None
        Imaginary potentials of the ice and of each substance [V].
    surfaces : Surfaces or None
        Where relief or structure ask for them.
    field : WaterField or None
        Fluctuations of the potential.
    drift : tensor (2,) or None
        (x, y) by which they have moved since the exposure began [Å].
    in_ice : tuple of bool
        Whether each substance displaces ice, or stands on it.
    """

    atoms: SliceSource
    potential: torch.Tensor = item(0)
    column: torch.Tensor = item(0)
    volumes: tuple[SliceSource, ...] = ()
    absorption: torch.Tensor | None = item(1, default=None)
    surfaces: Surfaces | None = None
    field: WaterField | None = static(default=None)
    drift: torch.Tensor | None = item(1, default=None)
    in_ice: tuple[bool, ...] = static(default=())

    @property
    def pixel_size(self) -> float | torch.Tensor:
        """[Å]."""
        return self.atoms.pixel_size

    @property
    def thickness(self) -> float | torch.Tensor:
        """Of a slice [Å]."""
        return self.atoms.thickness

    def __len__(self) -> int:
        return len(self.atoms)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Projected potential (y, x) [V·Å] of slice i; complex where there is absorption."""
        i = range(len(self))[i]
        return self._immersed(i, self.atoms[i], [volume[i] for volume in self.volumes])

    def in_order(self) -> Iterator[torch.Tensor]:
        """All slices, first to last."""
        for i, (v, *volumes) in enumerate(zip(in_order(self.atoms), *map(in_order, self.volumes), strict=True)):
            yield self._immersed(i, v, volumes)

    def _immersed(self, i: int, v: torch.Tensor, volumes: list[torch.Tensor]) -> torch.Tensor:
        depth = self.column / len(self)  # of ice [Å]
        if self.surfaces is not None:
            depth = depth + self._relief(i)
        v = v + (depth * self.potential).to(v)
        if self.field is not None:
            water = self.field.displaced(i - len(self) // 2, self.drift)
            v = v + water * self._filled(i, volumes).to(v)
        return v if self.absorption is None else self._absorbing(v, depth, volumes)

    def total(self) -> torch.Tensor:
        """Sum (y, x) [V·Å] of all slices but for the fluctuations of the ice, at little more than the cost of one."""
        depth = self.column if self.surfaces is None else self.column + self.surfaces.depths.sum(0)
        v = column(self.atoms)
        v = v + (depth * self.potential).to(v)
        return v if self.absorption is None else self._absorbing(v, depth, [column(x) for x in self.volumes])

    def _absorbing(self, v: torch.Tensor, depth: torch.Tensor, volumes: list[torch.Tensor]) -> torch.Tensor:
        assert self.absorption is not None
        ice, *substances = self.absorption
        imaginary = (depth * ice).to(v)
        for volume, substance, in_ice in zip(volumes, substances, self.in_ice, strict=True):
            imaginary = imaginary + (substance - ice if in_ice else substance).to(v) * volume
        return torch.complex(v, imaginary.expand_as(v))

    def _relief(self, i: int) -> torch.Tensor:
        """Depth (y, x) [Å] that the reliefs add to slice i, each shared linearly by the slices next to its surface."""
        assert self.surfaces is not None
        last = len(self) - 1
        height = (self.surfaces.heights / self.thickness + len(self) // 2).clamp(0, last)
        return (self.surfaces.depths * (1 - (height - i).abs()).clamp_min(0)).sum(0)

    def _filled(self, i: int, volumes: list[torch.Tensor]) -> torch.Tensor:
        """Fraction (y, x) of slice i that is ice."""
        assert self.surfaces is not None
        below, above = self.surfaces.heights / self.thickness + (len(self) // 2 - i)  # of the surfaces, in slices
        filled = above.clamp(-0.5, 0.5) - below.clamp(-0.5, 0.5)
        displaced = [volume for volume, in_ice in zip(volumes, self.in_ice, strict=True) if in_ice]
        if not displaced:
            return filled
        return (filled.to(displaced[0]) - sum(displaced[1:], start=displaced[0]) / self.thickness).clamp_min(0)


def thinnest(ice: Ice) -> float:
    """Depth [Å] of the largest box about the origin that lies within the ice everywhere."""
    dip = 0.0 if ice.relief is None else min(number(ice.relief.heights.min()), 0.0)
    return number(ice.thickness) + 2 * dip


def reach_of(ice: Ice | None, seen: Surfaces | None) -> float:
    """Largest height |w| [Å] at which the ice has something that stands in a slice of its own."""
    if ice is None or seen is None:
        return 0.0
    standing = seen.heights if ice.structure == "water" else seen.heights[seen.depths != 0]
    return number(standing.abs().max()) if standing.numel() else 0.0
