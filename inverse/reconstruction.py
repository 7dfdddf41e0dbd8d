"""From a tilt series to a tomogram: prepare the images, then reconstruct slab by slab of rows.

Tilted about y, row y of the volume depends on row y of the images alone. So the images are prepared once, in two
dimensions and tilt by tilt, and the volume is made in slabs of rows whose memory does not grow with the tomogram.
Back-projection, least squares and SIRT do not couple rows, so their slabs need no margin. Total variation and the
Wiener filter do, by what they expect of the specimen: their slabs are made with `HALO` more rows on both sides, and
what they expect is found once, from rows in the middle.

Operators, and solvers that take one, are imported where they are needed: they bring deepinv, which takes seconds to
load, and back-projection and least squares do without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch.nn import functional

from cryosim.acquisition.series import TiltSeries
from cryosim.core.fourier import squared_frequencies
from cryosim.core.record import Record, item
from cryosim.core.volume import Volume
from cryosim.microscope.optics import Optics
from inverse.physics.closed_form import gram_solver, largest_eigenvalue
from inverse.physics.rows import LAYERS, Block, backproject_rows, row_backprojection
from inverse.physics.spectral import TiltGeometry, project, tilt_geometry
from inverse.physics.wedge import LEAST_CUTOFF, projector
from inverse.preparation import Correction, frame_shape, kept_variance, prepare
from inverse.solvers.linear import Filter, wbp_filter

if TYPE_CHECKING:
    from inverse.physics.gaussian import GaussianModel
    from inverse.physics.tilt import TiltProjection

Method = Literal["wbp", "least-squares", "sirt", "tv", "wiener"]
HALO = {"tv": 16, "wiener": 32}
"""Rows on both sides of a slab that a method sees and does not keep; those not named here need none."""
_ROWS = 64
_ITERATIONS = {"sirt": 10, "tv": 100}
_ROOM = 1.3  # the slab of the Wiener filter over the most probable one, which cuts off what is rare near the faces
_VOXELS_AT_ONCE = 2**26  # of total variation and the Wiener filter, which take some 60 bytes for each
_MOST_VOXELS = 2**28  # of a slab, for methods that keep it in memory
_NOISE_SAMPLES = 2**15  # of each layer, by which the deviation of noise is measured
_DEEPEST = 16384  # [voxel]: what is deeper was asked for in another unit


class Reconstruction(Record):
    """What `reconstruct` returns.

    Attributes
    ----------
    volume : Volume
        Potential above its surroundings [V], as far as the images carry it.
    std : tensor (z, y, x), or None
        Standard deviation of each voxel [V]. By the Wiener filter that of its posterior: of what noise and missing
        views leave open. By methods that are linear in the images, that of the noise alone. None for total variation.
    images : tensor (tilt, y, x)
        Prepared images that the volume was made of [V·voxel].
    noise : tensor (tilt,)
        Variance of their pixels by counting statistics, before edges fade and a low pass [V^2·voxel^2].
    kept : tensor ()
        Share of it that those leave in the mean [1].
    angles : tensor (tilt,)
        [deg].
    weight : tensor ()
        That regularised: the damping of least squares [voxel^2], that of total variation; NaN where there is none.
    """

    volume: Volume
    std: torch.Tensor | None
    images: torch.Tensor = item(2)
    noise: torch.Tensor = item(0)
    kept: torch.Tensor = item(0)
    angles: torch.Tensor = item(0)
    weight: torch.Tensor = item(0)

    @property
    def measured(self) -> Volume:
        """The part of the volume that the images determine in spite of their noise; the rest is the method's own.

        See `inverse.measured`. What is weaker in the images than `estimated_damping` finds the noise to be is not
        determined.
        """
        values = self.volume.values
        cutoff = estimated_damping(self.images, self.noise, self.angles, self._geometry)
        least = LEAST_CUTOFF * largest_eigenvalue(self.angles.double(), self._geometry)
        act = projector(self.angles, self._geometry, torch.maximum(cutoff, least), values.dtype)
        return self.volume.replace(values=act(values))

    @property
    def misfit(self) -> torch.Tensor:
        """Mean square (tilt,) of what the images differ by from those of the volume, over the noise's [1].

        About 1 where a volume explains its images; more where it lacks something, less where it has taken up noise.
        """
        squares = 0.0
        for rows in range(0, self.images.shape[1], _ROWS):
            y = self.images[:, rows : rows + _ROWS]
            seen = project(self.volume.values[:, rows : rows + _ROWS], self.angles, self._geometry)
            squares = squares + (seen - y).double().square().sum((1, 2))
        return squares / self.images[0].numel() / (self.kept * self.noise)

    @property
    def _geometry(self) -> TiltGeometry:
        depth, _, width = self.volume.values.shape
        return tilt_geometry(depth, width, width, "camera", float(self.angles.abs().max()))


def reconstruct(
    series: TiltSeries,
    method: Method = "wbp",
    *,
    thickness: float | None = None,
    bin: int = 1,
    ctf: Correction = "flip",
    filter: Filter = "ramp",
    low_pass: float | None = None,
    weight: float | None = None,
    iterations: int | None = None,
    std: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Tomogram of a tilt series. It has no gradients: for those use the operators.

    Parameters
    ----------
    series : TiltSeries
        Counts, or any images whose mean is the unscattered intensity.
    method : {"wbp", "least-squares", "sirt", "tv", "wiener"}
        Weighted back-projection; damped least squares in closed form; simultaneous iterations; total variation;
        posterior mean under the Gaussian model of which the images are most probable.
    thickness : float, optional
        Of the volume along the beam [Å]; half the width of the images when left out.
    bin : int
        Image pixels to a voxel edge, by cutting in Fourier space.
    ctf : {"flip", "wiener", "none"}
        Correction of the contrast transfer, one defocus an image: its sign only, also its size where it is not small,
        or nothing. A series without optics is not corrected.
    filter : {"ramp", "exact"}
        Of the back-projection.
    low_pass : float, optional
        Finest period to keep [Å]; not with total variation and the Wiener filter.
    weight : float, optional
        Of the damping, as in `inverse.least_squares` [voxel^2], or of the variation, as in `inverse.tv`; positive, and
        for these two only. When left out, estimated from the images' noise and signal, or so that the images are met as
        closely as their noise allows.
    iterations : int, optional
        Of SIRT, 10 when left out; at most so many of total variation, 100 when left out.
    std : bool
        Compute the standard deviation.
    progress : callable, optional
        Called with (rows done, rows in all).

    Returns
    -------
    Reconstruction

    Warns
    -----
    UserWarning
        When the series has no optics: not corrected, and scaled as for 300 kV.

    Raises
    ------
    ValueError
        For an unknown method, a number out of bounds, images that hold no electrons, or a slab that is too large for
        the memory that SIRT, total variation and the Wiener filter take.
    """
    how: Any = {"bin": bin, "ctf": ctf, "low_pass": low_pass}
    design = designed(series, method, thickness=thickness, filter=filter, weight=weight, iterations=iterations, **how)
    images, noise = prepare(series, **how)  # (tilt, y, x) [V·voxel], (tilt,)
    design = fitted_design(design, images, noise)
    values = images.new_empty(design.shape)
    at_once = method in HALO and math.prod(design.shape) <= _VOXELS_AT_ONCE
    for rows, layers, block in slabs(images, design, rows=design.shape[1] if at_once else None):
        values[layers, rows] = block
        if progress and layers.stop == design.shape[0]:
            progress(rows.stop, design.shape[1])
    spread = deviation(series, design, images.dtype, **how) if std else None
    return Reconstruction(
        Volume(values, design.voxel_size),
        None if spread is None else spread[:, None, None].expand(design.shape),
        images,
        noise,
        torch.tensor(kept_variance(design.shape[1:], _in_pixels(low_pass, design)), dtype=torch.float64),
        series.tilts.angles,
        torch.tensor(design.weight, dtype=torch.float64),
    )


class Stack(Protocol):
    """Prepared images (tilt, y, x): a tensor, or what reads them from a file image by image and slab by slab."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __getitem__(self, which: Any, /) -> torch.Tensor: ...


class Design(NamedTuple):
    """What a tomogram will be and how it is made of prepared images.

    Attributes
    ----------
    shape : (int, int, int)
        (z, y, x) [voxel].
    voxel_size : float
        [Å].
    angles : tuple of float
        Of the tilts [deg].
    method : {"wbp", "least-squares", "sirt", "tv", "wiener"}
    filter : {"ramp", "exact"}
        Of the back-projection.
    weight : float
        Of what regularises, as in `reconstruct`; NaN where nothing does, and as long as it is to be found.
    iterations : int
        0 for methods in closed form.
    noise : float
        Mean variance of a pixel of faded images [V^2·voxel^2], for total variation; NaN as long as it is to be found.
    model : tuple of tuple of float, or None
        Spectrum, frequencies, noise and thickness of the `GaussianModel` of the Wiener filter; None as weight is NaN.
    """

    shape: tuple[int, int, int]
    voxel_size: float
    angles: tuple[float, ...]
    method: Method
    filter: Filter
    weight: float
    iterations: int = 0
    noise: float = math.nan
    model: tuple[tuple[float, ...], ...] | None = None

    @property
    def geometry(self) -> TiltGeometry:
        """Of the projection of one row."""
        depth, _, width = self.shape
        return tilt_geometry(depth, width, width, "camera", max(abs(angle) for angle in self.angles))


def designed(
    series: TiltSeries,
    method: Method,
    *,
    thickness: float | None,
    bin: int,
    ctf: Correction,
    filter: Filter,
    low_pass: float | None,
    weight: float | None,
    iterations: int | None,
) -> Design:
    """What `reconstruct` would make, with the arguments checked and nothing computed. Errors are its own."""
    for name, given, known in (("method", method, Method), ("filter", filter, Filter), ("ctf", ctf, Correction)):
        if given not in get_args(known):
            listed = ", ".join(f'"{one}"' for one in get_args(known))
            raise ValueError(f"reconstruct: expected the {name} to be one of {listed}, got {given!r}.")
    if thickness is not None and not thickness > 0:
        raise ValueError(f"reconstruct: expected a positive thickness [Å], got {thickness}.")
    if low_pass is not None and not 0 < low_pass < math.inf:
        raise ValueError(f"reconstruct: expected a positive low_pass [Å], got {low_pass}. Leave it out to keep all.")
    if weight is not None and not 0 < weight < math.inf:
        raise ValueError(f"reconstruct: expected a positive weight, got {weight}.")
    if low_pass is not None and method in HALO:
        raise ValueError(
            f"reconstruct: method {method}: expected no low_pass, got {low_pass} Å: what it expects of specimen and "
            "noise says what to keep. Leave it out, or filter the volume."
        )
    if weight is not None and method not in ("least-squares", "tv"):
        raise ValueError(f"reconstruct: method {method}: expected no weight, got {weight}. Leave it out.")
    if iterations is not None and method not in _ITERATIONS:
        raise ValueError(f"reconstruct: method {method}: expected no iterations, got {iterations}. Leave them out.")
    if iterations is not None and not (1 <= iterations < math.inf and iterations == int(iterations)):
        raise ValueError(f"reconstruct: expected 1 of the iterations or more, got {iterations}.")
    rows, width = frame_shape(series, bin)
    voxel = float(series.pixel_size) * bin
    thickness = width * voxel / 2 if thickness is None else thickness
    if thickness > _DEEPEST * voxel:
        raise ValueError(
            f"reconstruct: expected a thickness of at most {_DEEPEST} voxels of {voxel:g} Å, got {thickness:g} Å. "
            "Check its unit, or raise bin."
        )
    shape = (max(1, round(thickness / voxel)), rows, width)
    if (
        method not in ("wbp", "least-squares")
        and shape[0] * min(rows, _ROWS + 2 * HALO.get(method, 0)) * width > _MOST_VOXELS
    ):
        raise ValueError(
            f"reconstruct: method {method}: expected a slab of rows to have at most {_MOST_VOXELS:.3g} voxels, as it "
            f"takes some 60 bytes for each; layers of {width} and a depth of {shape[0]} have more. Raise bin, or lower "
            "the thickness."
        )
    given = weight if weight is not None and method in ("least-squares", "tv") else math.nan
    steps = int(iterations or _ITERATIONS[method]) if method in _ITERATIONS else 0
    design = Design(shape, voxel, tuple(series.tilts.angles.tolist()), method, filter, float(given), steps)
    _ = design.geometry  # refuses tilts that are too steep
    return design


def fitted_design(design: Design, images: Stack, noise: torch.Tensor) -> Design:
    """`design` with what its method needs to know of the prepared images, where it was not given."""
    design = design._replace(noise=float(noise.double().mean()) * kept_variance(design.shape[1:], None))
    if design.method == "least-squares" and math.isnan(design.weight):
        angles = torch.tensor(design.angles, dtype=torch.float64)
        return design._replace(weight=float(estimated_damping(images, noise, angles, design.geometry)))
    if design.method not in HALO:
        return design
    from inverse.physics.gaussian_estimate import estimate_model
    from inverse.priors.classic import TotalVariation
    from inverse.solvers.regularised import matching_weight

    depth, height, width = design.shape
    n = min(height, max(32, min(256, _VOXELS_AT_ONCE // (depth * width))))
    few = slice((height - n) // 2, (height - n) // 2 + n)
    seen = images[:, few]
    physics = _projection(design, seen.shape[1])
    if design.method == "wiener":
        model = estimate_model(physics, seen).model
        thickness = (_ROOM * model.thickness).clamp_max(design.shape[0] + 1)
        parts = (model.spectrum, model.frequencies, model.noise, thickness[None])
        return design._replace(model=tuple(tuple(part.tolist()) for part in parts))
    if math.isnan(design.weight):
        weight, _ = matching_weight(physics, seen[None, None], TotalVariation(), design.noise)
        return design._replace(weight=float(weight))
    return design


def _in_pixels(low_pass: float | None, design: Design) -> float | None:
    return None if low_pass is None else low_pass / design.voxel_size


@torch.no_grad()
def slabs(
    images: Stack,
    design: Design,
    *,
    starts: Sequence[int] | None = None,
    rows: int | None = None,
    layers: int = LAYERS,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """The tomogram of prepared images (tilt, y, x) in slabs of `rows`, each in blocks of `layers`, from the first up.

    Parameters
    ----------
    starts : sequence of int, optional
        First rows of the slabs to make; all when left out.

    Yields
    ------
    rows, layers : slice
        Of the volume's y and z.
    values : tensor (layer, row, x)
        [V].
    """
    height, step, halo = design.shape[1], rows or _ROWS, HALO.get(design.method, 0)
    make = _maker(design, images.dtype, layers)
    for start in range(0, height, step) if starts is None else starts:
        slab = slice(start, min(start + step, height))
        for block, values in make(_with_halo(images, slab, halo)):
            yield slab, block, values[:, halo : values.shape[1] - halo]


def _with_halo(images: Stack, slab: slice, halo: int) -> torch.Tensor:
    """Rows of a slab (tilt, row, u) and `halo` more on both sides, zeros where the images end."""
    start, stop = slab.start - halo, slab.stop + halo
    seen = images[:, max(start, 0) : min(stop, images.shape[1])]
    return functional.pad(seen, (0, 0, max(-start, 0), max(stop - images.shape[1], 0))) if halo else seen


def _maker(design: Design, dtype: torch.dtype, layers: int) -> Callable[[torch.Tensor], Iterator[Block]]:
    """How blocks of layers are made of images (tilt, row, u)."""
    if design.method in ("wbp", "least-squares"):
        angles, geometry = torch.tensor(design.angles, dtype=torch.float64), design.geometry
        if design.method == "wbp":
            action = wbp_filter(angles, geometry, design.filter)
        else:
            action = gram_solver(angles, torch.tensor(design.weight, dtype=torch.float64), geometry)
        plan = row_backprojection(angles, geometry, action, dtype, layers=layers)
        return lambda images: backproject_rows(plan, images)

    def make(images: torch.Tensor) -> Iterator[Block]:
        volume = _solved(design, images)
        for start in range(0, len(volume), layers):
            block = slice(start, min(start + layers, len(volume)))
            yield block, volume[block]

    return make


def _solved(design: Design, images: torch.Tensor) -> torch.Tensor:
    """The volume (z, row, x) of images (tilt, row, u), by the methods that make it at once."""
    from inverse.priors.classic import TotalVariation
    from inverse.solvers.primal_dual import primal_dual
    from inverse.solvers.sirt import sirt
    from inverse.solvers.wiener import wiener

    physics = _projection(design, images.shape[1])
    if design.method == "sirt":
        return sirt(physics, images, iterations=design.iterations)
    if design.method == "wiener":
        return wiener(physics, images, _model(design)).volume
    priors = [(TotalVariation(), design.weight)]
    found = primal_dual(physics, images[None, None], priors, noise=design.noise, iterations=design.iterations)
    return found.volume[0, 0]


def _projection(design: Design, rows: int) -> TiltProjection:
    from inverse.physics.tilt import TiltProjection

    depth, _, width = design.shape
    return TiltProjection(torch.tensor(design.angles, dtype=torch.float64), (depth, rows, width))


def _model(design: Design) -> GaussianModel:
    from inverse.physics.gaussian import GaussianModel

    assert design.model is not None
    spectrum, frequencies, noise, (thickness,) = (torch.tensor(part, dtype=torch.float64) for part in design.model)
    return GaussianModel(spectrum, frequencies, noise, thickness)


def deviation(
    series: TiltSeries, design: Design, dtype: torch.dtype, *, bin: int, ctf: Correction, low_pass: float | None
) -> torch.Tensor | None:
    """Standard deviation (z,) [V] of the voxels that `design` makes of `series`; None for total variation.

    That of the Wiener filter is exact. Else images that hold nothing but noise, of the counts of the series, are
    prepared and reconstructed in the same way, and the deviation is that of the middle half of them, good to a few
    percent.
    """
    if design.method == "tv":
        return None
    if design.method == "wiener":
        from inverse.solvers.wiener import posterior_std

        physics = _projection(design, 64)
        return posterior_std(physics, _model(design))[:, 0, 0].to(dtype)
    depth, _, width = design.shape
    rows = min(max(32, -(-2 * _NOISE_SAMPLES // width)), 512)
    means = torch.stack([image.mean(dtype=torch.float64) for image in series.images]).to(dtype)
    blank = means[:, None, None].expand(-1, 2 * rows * bin, width * bin)
    counts = torch.poisson(blank, generator=torch.Generator(means.device).manual_seed(0))
    tilts = series.tilts.replace(shifts=torch.zeros_like(series.tilts.shifts), axis_angle=0.0)
    optics = Optics(300.0) if series.optics is None else series.optics  # as `prepare` takes it, which warned already
    correction: Correction = "none" if series.optics is None else ctf
    noise = series.replace(images=counts, tilts=tilts, optics=optics, movies=None)
    images, _ = prepare(noise, bin=bin, ctf=correction, low_pass=low_pass)
    strip = slabs(images[:, rows // 2 : rows // 2 + rows], design._replace(shape=(depth, rows, width)), rows=rows)
    middle = slice(width // 4, width // 4 + max(1, width // 2))
    variance = [block[..., middle].double().square().mean((1, 2)) for _, _, block in strip]
    return torch.cat(variance).sqrt().to(dtype)


def estimated_damping(images: Stack, noise: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry) -> torch.Tensor:
    """Damping () [voxel^2]: the noise over the signal at the frequency where the specimen stands out most.

    A volume of power s in each layer shows depth / cos t times s in tilt t. So s is what the power of the images,
    averaged on rings, exceeds that of the noise by, over that factor. Structures of the strongest ring come back as a
    Wiener filter would have them, weaker ones less damped than that. At least a tenth of the noise counts as signal.
    """
    ny, nx = images.shape[1:]
    power = torch.zeros(ny, nx // 2 + 1, dtype=torch.float64)  # mean over the tilts
    for tilt in range(images.shape[0]):
        power += torch.fft.rfft2(images[tilt]).abs().square().double() / (ny * nx * images.shape[0])
    ring = (squared_frequencies((ny, nx), half=True, dtype=torch.float64).sqrt() * min(ny, nx)).round().long()
    sums = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add(0, ring.flatten(), power.flatten())
    rings = (sums / torch.bincount(ring.flatten()))[2 : min(ny, nx) // 2]  # without the mean and the edges' own ring
    background = noise.double().mean()
    seen = (geometry.depth / torch.cos(torch.deg2rad(angles.double()))).mean()
    signal = (rings - background).max() if len(rings) else torch.zeros_like(background)
    return background * seen / signal.clamp_min(0.1 * background)


def back_projected(series: TiltSeries, thickness: float, bin: int) -> Volume:
    """Weighted back-projection (z, y, x) [V] of a tilt series, for datasets; `thickness` [Å] as in `reconstruct`."""
    return reconstruct(series, "wbp", thickness=thickness, bin=bin).volume
