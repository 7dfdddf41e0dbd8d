"""Surfaces: closed or open, smooth, with evenly spread places on them.

A `Surface` is a map from the unit square to space, p -> x(p). With its derivatives x_i, x_ij and the outward normal n
(do Carmo 1976, Differential Geometry of Curves and Surfaces, sections 2.5 and 3.3),

    dA = |x_1 x x_2| dp,    E, F, G = x_1.x_1, x_1.x_2, x_2.x_2,    e, f, g = -x_ij.n
    H  = (eG - 2fF + gE) / 2(EG - F^2),    K = (eg - f^2) / (EG - F^2)

so that a sphere has H = 1 / R. A parallel surface at the height d along n has the area (1 + 2 H d + K d^2) dA.

Places on a surface are the points of a golden-ratio lattice in the unit square (González 2010,
doi:10.1007/s11004-009-9257-x), mapped so that equal parts of the square are equal areas. On a sphere this is the
spherical Fibonacci lattice. The number of places in a patch fluctuates far less than that of random ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from cryosim.core.record import Record, item
from cryosim.specimen.atoms import Poses

_GOLDEN = (math.sqrt(5) - 1) / 2
_CELLS = 200  # of the table of areas, along either side of the unit square
_POINTS_AT_ONCE = 32768


class Surface(Record):
    """Smooth surface about its own origin. Its kinds say where a point of the unit square lies, and what is inside."""

    def place(self, square: torch.Tensor) -> torch.Tensor:
        """Points (point, 3) [Å] of points (point, 2) of the unit square; dx/dp1 x dx/dp2 points outwards."""
        raise NotImplementedError

    def contains(self, points: torch.Tensor) -> torch.Tensor:
        """Whether points (point, 3) [Å] lie inside, (point,) bool."""
        raise NotImplementedError


class Ellipsoid(Surface):
    """x^2 / a^2 + y^2 / b^2 + z^2 / c^2 = 1.

    Attributes
    ----------
    semi_axes : (float, float, float)
        a, b, c [Å].
    """

    semi_axes: tuple[float, float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "semi_axes", tuple(float(a) for a in self.semi_axes))
        _positive("Ellipsoid.semi_axes", *self.semi_axes)

    def place(self, square: torch.Tensor) -> torch.Tensor:
        """As in `Surface`."""
        theta, phi = _polar(square)
        return _direction(theta, phi) * torch.tensor(self.semi_axes, dtype=square.dtype)

    def contains(self, points: torch.Tensor) -> torch.Tensor:
        """As in `Surface`."""
        return (points / torch.tensor(self.semi_axes).to(points)).square().sum(-1) < 1


class Torus(Surface):
    """Ring about the z axis.

    Attributes
    ----------
    major, minor : float
        Radius of the ring and of its tube [Å].
    """

    major: float
    minor: float

    def __post_init__(self) -> None:
        _positive("Torus", self.minor, self.major)
        if not self.minor < self.major:
            raise ValueError(f"Torus: expected a tube thinner than the ring, got {self.minor:g} and {self.major:g} Å.")

    def place(self, square: torch.Tensor) -> torch.Tensor:
        """As in `Surface`."""
        around, along = (-2 * math.pi * square[:, 0], 2 * math.pi * square[:, 1])
        out = self.major + self.minor * torch.cos(around)
        return torch.stack([out * torch.cos(along), out * torch.sin(along), self.minor * torch.sin(around)], -1)

    def contains(self, points: torch.Tensor) -> torch.Tensor:
        """As in `Surface`."""
        from_ring = points[:, :2].norm(dim=1) - self.major
        return from_ring.square() + points[:, 2].square() < self.minor**2


class Vesicle(Surface):
    """Closed surface at the distance r(theta, phi) from the origin, a double Fourier series.

    Attributes
    ----------
    radius : float
        R [Å].
    series : tensor (p, m), complex
        r = R (1 + Re sum_pm series_pm exp(i p theta + i m phi)); p in unshifted order, m from 0 up.
    """

    radius: float
    series: torch.Tensor = item(2)

    def place(self, square: torch.Tensor) -> torch.Tensor:
        """As in `Surface`."""
        theta, phi = _polar(square)
        return (self.radius * (1 + _fourier_sum(self.series, theta, phi)))[:, None] * _direction(theta, phi)

    def contains(self, points: torch.Tensor) -> torch.Tensor:
        """As in `Surface`."""

        def within(part: torch.Tensor) -> torch.Tensor:
            theta = torch.atan2(part[:, :2].norm(dim=1), part[:, 2])
            phi = torch.atan2(part[:, 1], part[:, 0])
            return part.norm(dim=1) < self.radius * (1 + _fourier_sum(self.series, theta, phi))

        return torch.cat([within(part.double()) for part in points.split(_POINTS_AT_ONCE)])


class Patch(Surface):
    """Sheet z = h(x, y) over a rectangle, outwards upwards; inside is below.

    Attributes
    ----------
    size : (float, float)
        (x, y) [Å].
    series : tensor (p, m), complex
        h = Re sum_pm series_pm exp(2 pi i (p y / size_y + m x / size_x)) [Å]; p in unshifted order, m from 0 up.
    """

    size: tuple[float, float]
    series: torch.Tensor = item(2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(float(a) for a in self.size))
        _positive("Patch.size", *self.size)

    def place(self, square: torch.Tensor) -> torch.Tensor:
        """As in `Surface`."""
        x, y = ((square[:, axis] - 0.5) * self.size[axis] for axis in (0, 1))
        return torch.stack([x, y, self._height(x, y)], -1)

    def contains(self, points: torch.Tensor) -> torch.Tensor:
        """As in `Surface`."""
        parts = points.double().split(_POINTS_AT_ONCE)
        return torch.cat([part[:, 2] < self._height(part[:, 0], part[:, 1]) for part in parts])

    def _height(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _fourier_sum(self.series, 2 * math.pi * y / self.size[1], 2 * math.pi * x / self.size[0])


class SurfacePoints(NamedTuple):
    """Points of a surface.

    Attributes
    ----------
    positions, normals : tensor (point, 3)
        [Å]; the normals of length 1, outwards.
    areas : tensor (point,)
        What each stands for [Å^2].
    mean_curvatures, gaussian_curvatures : tensor (point,)
        H [1/Å] and K [1/Å^2]; 1 / R and 1 / R^2 for a sphere.
    """

    positions: torch.Tensor
    normals: torch.Tensor
    areas: torch.Tensor
    mean_curvatures: torch.Tensor
    gaussian_curvatures: torch.Tensor


# surfaces -------------------------------------------------------------------------------------------------------------


def sphere(radius: float) -> Ellipsoid:
    """Sphere of a radius [Å] about the origin; ValueError when it is not positive."""
    return Ellipsoid((radius, radius, radius))


def irregular_vesicle(
    radius: float,
    *,
    bending: float = 20.0,
    tension: float = 0.0,
    amplitude: float | None = None,
    degree: int = 16,
    generator: torch.Generator | None = None,
) -> Vesicle:
    """Vesicle with a random shape: r = R (1 + u), u a Gaussian field on the sphere with the spectrum of Helfrich.

    The coefficients of orthonormal spherical harmonics are independent, for 2 <= l <= degree, with the variance

        <|u_lm|^2> = 1 / (bending (l - 1) (l + 2) (l (l + 1) + tension))

    (Milner & Safran 1987, doi:10.1103/PhysRevA.36.4371).

    Parameters
    ----------
    radius : float
        R [Å].
    bending : float
        Bending modulus over k T [1]: 20 is 8e-20 J, as measured of DOPC (Liu & Nagle 2004,
        doi:10.1103/PhysRevE.69.040901), and makes u about 4 %.
    tension : float
        Reduced tension Sigma R^2 / bending modulus [1]; large ones round the vesicle.
    amplitude : float, optional
        Standard deviation of u [1] instead of the one that bending makes, for shapes beyond thermal ones.
    degree : int
        Highest l.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When a number is out of bounds, or a draw folds the surface to less than a fifth of the radius.
    """
    _positive("irregular_vesicle", radius, bending, amplitude if amplitude is not None else 1.0)
    if not (2 <= degree <= 256 and tension > -6):
        raise ValueError(
            f"irregular_vesicle: expected a degree from 2 to 256 and a tension above -6, got {degree} and {tension}."
        )
    l = torch.arange(2, degree + 1, dtype=torch.float64)  # noqa: E741
    variance = 1 / (bending * (l - 1) * (l + 2) * (l * (l + 1) + tension))
    if amplitude is not None:
        variance = variance * amplitude**2 / ((2 * l + 1) * variance).sum() * 4 * math.pi
    coefficients = torch.zeros(degree + 1, degree + 1, dtype=torch.complex128)
    real, imaginary = torch.randn(2, degree + 1, degree + 1, generator=generator, dtype=torch.float64)
    drawn = torch.complex(real, imaginary) / math.sqrt(2)  # m > 0
    drawn[:, 0] = real[:, 0]
    coefficients[2:] = variance.sqrt()[:, None] * drawn[2:]
    series = _double_fourier_series(torch.tril(coefficients))
    vesicle = Vesicle(radius, series)
    lowest = float(vesicle.place(_cells(4 * degree)).norm(dim=1).min()) / radius
    if lowest < 0.2:
        raise ValueError(
            f"irregular_vesicle: the surface comes to {lowest:.2g} of its radius at one place. Take less amplitude."
        )
    return vesicle


def patch(
    size: tuple[float, float],
    *,
    bending: float = math.inf,
    tension: float = 0.0,
    shortest: float = 100.0,
    generator: torch.Generator | None = None,
) -> Patch:
    """Sheet in the x, y plane, flat or undulating as the heat makes a bilayer do.

    The modes of the wave vector q [rad/Å] are independent, with the variance (Helfrich 1978,
    doi:10.1515/zna-1978-0308; A is the area)

        <|h_q|^2> = 1 / (A bending (q^4 + tension q^2))

    Parameters
    ----------
    size : (float, float)
        (x, y) [Å].
    bending : float
        Bending modulus over k T [1], about 20; infinity is flat.
    tension : float
        Over the bending modulus [1/Å^2].
    shortest : float
        Wavelength below which there are no undulations [Å].
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When a number is out of bounds.
    """
    _positive("patch", *size, bending, shortest)
    if tension < 0:
        raise ValueError(f"patch: expected a tension of 0 or more [1/Å^2], got {tension}.")
    most = [max(1, math.floor(length / shortest)) for length in size]
    if math.isinf(bending):
        return Patch(size, torch.zeros(1, 1, dtype=torch.complex128))
    along_y, along_x = _unshifted(2 * most[1] + 1), torch.arange(most[0] + 1, dtype=torch.float64)
    q2 = (2 * math.pi) ** 2 * ((along_y[:, None] / size[1]) ** 2 + (along_x / size[0]) ** 2)
    power = 1 / (size[0] * size[1] * bending * (q2**2 + tension * q2))
    power[(q2 == 0) | (q2 > (2 * math.pi / shortest) ** 2)] = 0
    real, imaginary = torch.randn(2, *q2.shape, generator=generator, dtype=torch.float64)
    pairs = torch.where(along_x > 0, 2.0, 1.0)  # q and -q, of which only one is here; Re halves the power
    return Patch(size, torch.complex(real, imaginary) * (power * pairs).sqrt())


def area(surface: Surface) -> float:
    """Area of a surface [Å^2]; to 1e-4 where 1/200 of the surface is smooth."""
    return float(elements(surface).mean())


def bounds(surface: Surface) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest (x, y, z) (3,) [Å] of a surface, to about 1e-4 of its size."""
    places = surface.place(_cells(2 * _CELLS))
    return places.amin(0), places.amax(0)


def inside(surface: Surface, points: torch.Tensor, poses: Poses | None = None) -> torch.Tensor:
    """Whether points lie inside a surface: in the lumen of a vesicle, below a patch.

    Parameters
    ----------
    surface : Surface
    points : tensor (point, 3)
        [Å].
    poses : Poses, optional
        Where copies of it stand; inside is then inside of any. Its own frame when left out.

    Returns
    -------
    tensor (point,)
        bool
    """
    if poses is None:
        return surface.contains(points)
    found = torch.zeros(len(points), dtype=torch.bool)
    for rotation, position in zip(poses.rotations, poses.positions, strict=True):
        found |= surface.contains((points - position.to(points)) @ rotation.to(points))
    return found


def points_on(
    surface: Surface, n: int, *, even: bool = True, generator: torch.Generator | None = None
) -> SurfacePoints:
    """Places on a surface, each of the same area.

    Parameters
    ----------
    surface : Surface
    n : int
        Number of places.
    even : bool
        On a lattice with a random beginning; otherwise each at random.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When n is less than 1.
    """
    if not n >= 1:
        raise ValueError(f"points_on: expected at least one point, got {n}.")
    if even:
        first, second = torch.rand(2, generator=generator, dtype=torch.float64)
        i = torch.arange(n, dtype=torch.float64)
        square = torch.stack([(i + first) / n, (i * _GOLDEN + second) % 1], -1)
    else:
        square = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    table = elements(surface)
    parts = equal_area(table)(square).split(_POINTS_AT_ONCE)
    found = [geometry(surface, part) for part in parts]
    joined = SurfacePoints(*(torch.cat(each) for each in zip(*found, strict=True)))
    return joined._replace(areas=torch.full((n,), float(table.mean()) / n, dtype=torch.float64))


# geometry -------------------------------------------------------------------------------------------------------------


def geometry(surface: Surface, square: torch.Tensor) -> SurfacePoints:
    """The points of a surface at points (point, 2) of the unit square; their areas are per area of the square."""
    (x, x1, x2), second = _derivatives(surface, square), _second_derivatives(surface, square)
    cross = torch.linalg.cross(x1, x2)
    element = cross.norm(dim=1)
    normal = cross / element[:, None]
    ee, ff, gg = (x1 * x1).sum(1), (x1 * x2).sum(1), (x2 * x2).sum(1)
    e, f, g = (-(each * normal).sum(1) for each in second)
    mean = (e * gg - 2 * f * ff + g * ee) / (2 * element**2)
    return SurfacePoints(x, normal, element, mean, (e * g - f**2) / element**2)


def _derivatives(surface: Surface, square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second = (torch.func.jvp(surface.place, (square,), (_along(axis, square),)) for axis in (0, 1))
    return first[0], first[1], second[1]


def _second_derivatives(surface: Surface, square: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def first(axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda p: torch.func.jvp(surface.place, (p,), (_along(axis, p),))[1]

    return tuple(torch.func.jvp(first(i), (square,), (_along(j, square),))[1] for i, j in ((0, 0), (0, 1), (1, 1)))


def _along(axis: int, square: torch.Tensor) -> torch.Tensor:
    return torch.eye(2, dtype=square.dtype)[axis].expand_as(square)


def _element(surface: Surface, square: torch.Tensor) -> torch.Tensor:
    _, x1, x2 = _derivatives(surface, square)
    return torch.linalg.cross(x1, x2).norm(dim=1)


def _cells(n: int) -> torch.Tensor:
    """Middles (n^2, 2) of the cells of the unit square."""
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.cartesian_prod(middles, middles)


def elements(surface: Surface) -> torch.Tensor:
    """Area of the surface per area of the unit square, in the middles of its cells (cell, cell) [Å^2]."""
    parts = _cells(_CELLS).split(_POINTS_AT_ONCE)
    return torch.cat([_element(surface, part) for part in parts]).reshape(_CELLS, _CELLS)


def equal_area(table: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Map of the unit square to itself, after which equal parts of it are equal areas of the surface.

    Of the areas of the cells the marginal of the first coordinate, then the second given the first, is turned
    into its quantiles (Rosenblatt 1952, doi:10.1214/aoms/1177729394), linear between the edges of the cells and, for
    the second, between the rows.
    """
    zero = table.new_zeros(1)
    marginal = torch.cat([zero, table.sum(1).cumsum(0)])
    marginal = marginal / marginal[-1]
    rows = torch.cat([zero.expand(_CELLS, 1), table.cumsum(1)], 1)
    rows = rows / rows[:, -1:]  # (row, edge)
    flat = (rows[:, :-1] + torch.arange(_CELLS)[:, None]).flatten()  # rising throughout

    def quantile(row: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        cell = (torch.searchsorted(flat, row + second, right=True) - 1 - row * _CELLS).clamp(0, _CELLS - 1)
        low, high = rows[row, cell], rows[row, cell + 1]
        return (cell + (second - low) / (high - low)) / _CELLS

    def mapped(square: torch.Tensor) -> torch.Tensor:
        first, second = square.unbind(1)
        cell = (torch.searchsorted(marginal, first.contiguous(), right=True) - 1).clamp(0, _CELLS - 1)
        share = (first - marginal[cell]) / (marginal[cell + 1] - marginal[cell])
        u = (cell + share) / _CELLS
        lower = (u * _CELLS - 0.5).floor()
        weight = u * _CELLS - 0.5 - lower
        below, above = (quantile(row.clamp(0, _CELLS - 1).long(), second) for row in (lower, lower + 1))
        return torch.stack([u.clamp(1e-9, 1 - 1e-9), torch.lerp(below, above, weight)], -1)

    return mapped


def _polar(square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles theta, phi (point,) [rad] of points of the unit square: equal areas of the sphere."""
    return torch.acos(1 - 2 * square[:, 0]), 2 * math.pi * square[:, 1]


def _direction(theta: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    sine = torch.sin(theta)
    return torch.stack([sine * torch.cos(phi), sine * torch.sin(phi), torch.cos(theta)], -1)


def _double_fourier_series(coefficients: torch.Tensor) -> torch.Tensor:
    """Series (p, m) over both angles of a field given by spherical harmonics (l, m >= 0).

    Continued over the pole as f(2 pi - theta, phi) = f(theta, phi + pi), a band-limited field is a finite Fourier
    series in theta too (Orszag 1974, doi:10.1175/1520-0493(1974)102<0056:FSOS>2.0.CO;2).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, which the package itself uses
        from torch_harmonics import InverseRealSHT  # heavy, and needed here alone

    degree = coefficients.shape[0] - 1
    n = 2 * degree + 2  # intervals from pole to pole, and half of those around
    synthesis = InverseRealSHT(n + 1, 2 * n, degree + 1, degree + 1, grid="equiangular", norm="ortho")
    field = synthesis(coefficients)  # (theta, phi), both poles
    turned = torch.roll(field, n, 1).flip(0)[1:-1]
    spectrum = torch.fft.fft2(torch.cat([field, turned])) / (2 * n) ** 2
    kept = torch.cat([torch.arange(degree + 1), torch.arange(2 * n - degree, 2 * n)])
    half = spectrum[kept][:, : degree + 1].clone()
    half[:, 1:] *= 2  # and what m < 0 holds, which is conjugate
    return half


def _fourier_sum(series: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Re sum_pm series_pm exp(i p first + i m second), (point,); p in unshifted order, m from 0 up."""
    phase = first[:, None] * _unshifted(series.shape[0])
    cosine, sine = torch.cos(phase), torch.sin(phase)
    real = cosine @ series.real - sine @ series.imag  # (point, m)
    imaginary = cosine @ series.imag + sine @ series.real
    phase = second[:, None] * torch.arange(series.shape[1], dtype=phase.dtype)
    return (real * torch.cos(phase) - imaginary * torch.sin(phase)).sum(1)


def _unshifted(n: int) -> torch.Tensor:
    return torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)


def _positive(name: str, *values: float) -> None:
    if not all(value > 0 for value in values):
        raise ValueError(f"{name}: expected positive numbers, got {', '.join(f'{value:g}' for value in values)}.")
