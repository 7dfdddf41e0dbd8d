"""What a tomogram will be and how it is made: chosen, checked, and fitted to the images where a method must know them.

Operators, and solvers that take one, are imported where they are needed: they bring deepinv, which takes seconds to
load, and back-projection and least squares do without.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.core.fourier import squared_frequencies
from inverse.physics.spectral import TiltGeometry, shown_width, tilt_geometry
from inverse.preparation import Correction, carried, frame_shape, kept_variance
from inverse.solvers.linear import Filter

if TYPE_CHECKING:
    from deepinv.models.base import Denoiser

    from inverse.physics.tilt import TiltProjection

Method = Literal["wbp", "least-squares", "sirt", "tv", "wiener", "pnp", "diffusion", "implicit", "local"]

HALO = {"tv": 16, "wiener": 32, "pnp": 32, "local": 36}
"""Rows on both sides of a slab that a method sees and does not keep; those not named here need none."""

AT_ONCE = ("diffusion", "implicit")
"""Methods that cannot make a volume in slabs: what they draw or learn belongs to all of it."""

LEARNED = {
    "pnp": ("crowded", "NoiseConditionalUNet"),
    "diffusion": ("crowded", "NoiseConditionalUNet"),
    "local": ("local", "LocalNetwork"),
}
"""Methods that take the weights of a network: those that come with the project for it, and its class."""

WIDE = ("sirt", "tv", "pnp", "diffusion", "implicit")
"""Methods that explain all that the images show, so also what the tilts bring in from beside the field."""

ROWS = 64
"""Of a slab, where memory asks for slabs."""

VOXELS_AT_ONCE = 2**26
"""That a method is given at once which takes some 60 bytes for each."""

_ITERATIONS = {"sirt": 10, "tv": 100, "pnp": 20, "implicit": 400}
_SAMPLES = 8
_STRENGTH = 0.25  # of plug-and-play, best at all noise levels: see `plug_and_play`
_WEIGHED = ("least-squares", "tv", "pnp")
_ROOM = 1.3  # the slab of the Wiener filter over the most probable one, which cuts off what is rare near the faces
_MOST_VOXELS = 2**28  # of a slab, for methods that keep it in memory
_TILE = 96  # [voxel] that a network is given at once, and its reach about them
_DEEPEST = 16384  # [voxel]: what is deeper was asked for in another unit


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
    method : str
        One of `Method`.
    filter : {"ramp", "exact"}
        Of the back-projection.
    weight : float
        Of what regularises, as in `reconstruct`; NaN where nothing does, and as long as it is to be found.
    iterations : int
        0 for methods in closed form.
    network : str
        Weights file of learned methods, or the name of one that comes with the project; empty for the others.
    samples : int
        Of diffusion.
    seed : int
        Of what is random.
    bends : float, or None
        How far parts of a specimen that bends from tilt to tilt are expected to be displaced [voxel].
    noise : tuple of float
        Variance of a pixel of each faded image [V^2·voxel^2], for methods that weigh it; empty as long as it is to be
        found.
    transfer : tuple of tuple of float
        What lens and dose have left in each image, as `inverse.preparation.carried` has it; for the local network.
    levels : (float, float), or None
        Of the denoiser of plug-and-play, first and last [V]; None as long as they are to be found.
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
    network: str = ""
    samples: int = 0
    seed: int = 0
    bends: float | None = None
    noise: tuple[float, ...] = ()
    transfer: tuple[tuple[float, ...], ...] = ()
    levels: tuple[float, float] | None = None
    model: tuple[tuple[float, ...], ...] | None = None

    @property
    def width(self) -> int:
        """Columns that the volume is computed with [voxel]; `columns` of them are the tomogram's."""
        return _computed_width(self.method, self.shape, self.steepest)

    @property
    def columns(self) -> slice:
        """Of the volume as it is computed, those in the field."""
        start = self.width // 2 - self.shape[2] // 2
        return slice(start, start + self.shape[2])

    @property
    def steepest(self) -> float:
        """Highest tilt [deg]."""
        return max(abs(angle) for angle in self.angles)

    @property
    def geometry(self) -> TiltGeometry:
        """Of the projection of one row, as it is computed."""
        return tilt_geometry(self.shape[0], self.width, self.shape[2], "camera", self.steepest)

    @property
    def mean_noise(self) -> float:
        """`noise`, in the mean over the tilts."""
        return sum(self.noise) / len(self.noise)

    def projection(self, rows: int) -> TiltProjection:
        """The operator of `rows` of the volume, as it is computed."""
        from inverse.physics.tilt import TiltProjection

        angles = torch.tensor(self.angles, dtype=torch.float64)
        return TiltProjection(angles, (self.shape[0], rows, self.width), (rows, self.shape[2]))

    def denoiser(self, dtype: torch.dtype) -> Denoiser:
        """The network, in tiles where a volume is large."""
        from inverse.priors.wrappers import Tiled
        from inverse.weights import load_network

        return Tiled(load_network(self.network).to(dtype), _TILE, HALO["pnp"])


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
    network: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    bends: float | None = None,
) -> Design:
    """What `reconstruct` would make, with the arguments checked and nothing computed. Errors are its own."""
    for name, given, known in (("method", method, Method), ("filter", filter, Filter), ("ctf", ctf, Correction)):
        if given not in get_args(known):
            listed = ", ".join(f'"{one}"' for one in get_args(known))
            raise ValueError(f"reconstruct: expected the {name} to be one of {listed}, got {given!r}.")
    for name, value in (("thickness", thickness), ("low_pass", low_pass), ("bends", bends)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"reconstruct: expected a positive {name} [Å], got {value}. Leave it out if in doubt.")
    if weight is not None and not 0 < weight < math.inf:
        raise ValueError(f"reconstruct: expected a positive weight, got {weight}.")
    if low_pass is not None and method not in ("wbp", "least-squares", "sirt"):
        raise ValueError(
            f"reconstruct: method {method}: expected no low_pass, got {low_pass} Å: what it expects of specimen and "
            "noise says what to keep. Leave it out, or filter the volume."
        )
    _expect_none("weight", weight, method, _WEIGHED)
    _expect_none("iterations", iterations, method, _ITERATIONS)
    _expect_none("network", network, method, LEARNED)
    _expect_none("samples", samples, method, ("diffusion",))
    _expect_none("bends", bends, method, ("implicit",))
    for name, count, least in (("iterations", iterations, 1), ("samples", samples, 2)):
        if count is not None and not (least <= count < math.inf and count == int(count)):
            raise ValueError(f"reconstruct: expected {least} of the {name} or more, got {count}.")
    rows, width = frame_shape(series, bin)
    voxel = float(series.pixel_size) * bin
    thickness = width * voxel / 2 if thickness is None else thickness
    if thickness > _DEEPEST * voxel:
        raise ValueError(
            f"reconstruct: expected a thickness of at most {_DEEPEST} voxels of {voxel:g} Å, got {thickness:g} Å. "
            "Check its unit, or raise bin."
        )
    shape = (max(1, round(thickness / voxel)), rows, width)
    _expect_room(method, shape, _computed_width(method, shape, float(series.tilts.angles.abs().max())))
    if method in LEARNED:
        network = network or LEARNED[method][0]
        _expect_network(network, method, voxel)
    transfer = ()
    if method == "local":
        from inverse.priors.local import RINGS

        transfer = tuple(map(tuple, carried(series, RINGS, bin=bin, ctf=ctf).tolist()))
    design = Design(
        shape,
        voxel,
        tuple(series.tilts.angles.tolist()),
        method,
        filter,
        float(weight) if weight is not None else _STRENGTH if method == "pnp" else math.nan,
        int(iterations or _ITERATIONS[method]) if method in _ITERATIONS else 0,
        network or "",
        int(samples or _SAMPLES) if method == "diffusion" else 0,
        seed,
        None if bends is None else bends / voxel,
        transfer=transfer,
    )
    _ = design.geometry  # refuses tilts that are too steep
    return design


def _expect_none(name: str, given: object, method: str, takers: Collection[str]) -> None:
    if given is not None and method not in takers:
        raise ValueError(f"reconstruct: method {method}: expected no {name}, got {given}. Leave it out.")


def _expect_network(network: str, method: str, voxel_size: float) -> None:
    """Refuse the weights of another kind of network; warn of one that was trained at another voxel size."""
    from inverse.weights import load_network, warn_of_voxel_size

    found, expected = load_network(network), LEARNED[method][1]
    if type(found).__name__ != expected:
        raise ValueError(
            f"reconstruct: method {method}: expected the weights of a {expected}, got those of a "
            f"{type(found).__name__} in {network}. Leave network out to take those that come with the project."
        )
    warn_of_voxel_size(found, voxel_size)


def _computed_width(method: str, shape: tuple[int, int, int], steepest: float) -> int:
    return shown_width(shape[0], shape[2], steepest) if method in WIDE else shape[2]


def _expect_room(method: str, shape: tuple[int, int, int], width: int) -> None:
    depth, rows, _ = shape
    advice = "Raise bin, or lower the thickness."
    if method in AT_ONCE and depth * rows * width > VOXELS_AT_ONCE:
        raise ValueError(
            f"reconstruct: method {method}: expected a volume of at most {VOXELS_AT_ONCE:.3g} voxels, as it is made at "
            f"once, got {depth} x {rows} x {width}. {advice}"
        )
    slab = min(rows, ROWS + 2 * HALO.get(method, 0))
    if method not in ("wbp", "least-squares") and depth * slab * width > _MOST_VOXELS:
        raise ValueError(
            f"reconstruct: method {method}: expected a slab of rows to have at most {_MOST_VOXELS:.3g} voxels, as it "
            f"takes some 60 bytes for each; layers of {width} and a depth of {depth} have more. {advice}"
        )


def fitted_design(design: Design, images: Stack, noise: torch.Tensor) -> Design:
    """`design` with what its method needs to know of the prepared images, where it was not given."""
    design = design._replace(noise=tuple((noise.double() * kept_variance(design.shape[1:], None)).tolist()))
    if design.method == "least-squares" and math.isnan(design.weight):
        angles = torch.tensor(design.angles, dtype=torch.float64)
        return design._replace(weight=float(estimated_damping(images, noise, angles, design.geometry)))
    if design.method == "wiener":
        return _with_model(design, images)
    if design.method == "pnp":
        from inverse.solvers.plug_and_play import plug_and_play

        seen = images[:, middle_rows(design, 96)]
        physics, denoiser = design.projection(seen.shape[1]), design.denoiser(seen.dtype)
        tried = plug_and_play(physics, seen, denoiser, design.mean_noise, iterations=2, strength=design.weight)
        return design._replace(levels=(float(tried.levels[0]), float(tried.levels[-1])))
    if design.method == "tv" and math.isnan(design.weight):
        from inverse.priors.classic import TotalVariation
        from inverse.solvers.regularised import matching_weight

        seen = images[:, middle_rows(design)]
        physics, noise_level = design.projection(seen.shape[1]), design.mean_noise
        weight, _ = matching_weight(physics, seen[None, None], TotalVariation(), noise_level)
        return design._replace(weight=float(weight))
    return design


def middle_rows(design: Design, most: int = 256) -> slice:
    """Rows from the middle of the volume, few enough for methods that keep all of them in memory."""
    depth, height, _ = design.shape
    n = min(height, max(32, min(most, VOXELS_AT_ONCE // (depth * design.width))))
    return slice((height - n) // 2, (height - n) // 2 + n)


def _with_model(design: Design, images: Stack) -> Design:
    from inverse.physics.gaussian_estimate import estimate_model

    seen = images[:, middle_rows(design)]
    model = estimate_model(design.projection(seen.shape[1]), seen).model
    thickness = (_ROOM * model.thickness).clamp_max(design.shape[0] + 1)
    parts = (model.spectrum, model.frequencies, model.noise, thickness[None])
    return design._replace(model=tuple(tuple(part.tolist()) for part in parts))


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
