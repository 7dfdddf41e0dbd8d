"""From a tilt series to a tomogram: prepare the images, then reconstruct slab by slab of rows.

Tilted about y, row y of the volume depends on row y of the images alone. So the images are prepared once, in two
dimensions and tilt by tilt, and the volume is made in slabs of rows whose memory does not grow with the tomogram.
Back-projection, least squares and SIRT do not couple rows, so their slabs need no margin. What expects something of the
specimen does: its slabs are made with `inverse.design.HALO` more rows on both sides, and what it expects is found once,
from rows in the middle.

A tilted image shows what lies beside the field as well. Methods that explain the images compute a volume wide enough
for that, `inverse.design.WIDE`, and its middle is kept.

Whatever the method, a result tells what of it the images determine, how far noise moves it, and how closely it meets
the images; where a method has gone further from the images than their noise allows, it warns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cryosim.acquisition.series import TiltSeries
from cryosim.core.record import Record, item, static
from cryosim.core.volume import Volume
from cryosim.microscope.optics import Optics
from inverse.design import (
    AT_ONCE,
    HALO,
    LEARNED,
    ROWS,
    VOXELS_AT_ONCE,
    WIDE,
    Design,
    Method,
    designed,
    estimated_damping,
    fitted_design,
    middle_rows,
)
from inverse.physics.closed_form import gram_solver, largest_eigenvalue
from inverse.physics.rows import backproject_rows, row_backprojection
from inverse.physics.spectral import TiltGeometry, project, tilt_geometry
from inverse.physics.wedge import LEAST_CUTOFF, projector
from inverse.preparation import Correction, kept_variance, prepare
from inverse.slabs import SOLVERS, Solved, model_of, slabs, solved
from inverse.solvers.linear import Filter

if TYPE_CHECKING:
    pass

_NOISE_SAMPLES = 2**15  # of each layer, by which the deviation of noise is measured
_STRIP = 64  # rows that a method is repeated on, to see how far noise moves it
_ALLOWED = 1.3  # times the misfit of least squares, where that is more than 1: beyond, a prior has pulled too far
_ASSUMING = ("tv", "wiener", "pnp", "diffusion", "implicit", "local")  # methods that hold something likelier than else

Progress = Callable[[int, int], None]


class Reconstruction(Record):
    """What `reconstruct` returns.

    Attributes
    ----------
    volume : Volume
        Potential above its surroundings [V], as far as the images carry it.
    std : tensor (z, y, x), or None
        Standard deviation of each voxel [V]. Of the Wiener filter and diffusion that of a posterior: of what noise and
        missing views leave open, to the best of the method's knowledge; of the local network that of the error which
        it expects of itself. Of all others that of the noise alone. None where it was not asked for.
    images : tensor (tilt, y, x)
        Prepared images that the volume was made of [V·voxel].
    noise : tensor (tilt,)
        Variance of their pixels by counting statistics, before edges fade and a low pass [V^2·voxel^2].
    kept : tensor ()
        Share of it that those leave in the mean [1].
    angles : tensor (tilt,)
        [deg].
    weight : tensor ()
        That regularised: the damping of least squares [voxel^2], that of total variation, the strength of
        plug-and-play; NaN where there is none.
    residuals, misfits : tuple of float
        Of methods that iterate and tell: relative change, and misfit, after each iteration [1].
    warnings : tuple of str
        What there is to beware of; they were given as warnings too.
    method : str
        That made it, as `reconstruct` takes it; empty when another function did.
    displacement : tensor (tilt, 2, y, x), or None
        Of a specimen that bends, across and along the tilt axis [Å], at the control points of cubic B-splines from end
        to end of the field; `images` are then as they would be had it not bent, with what the volume does not explain.
    mismatch : tensor (tilt,), or None
        Mean square of what the images differ by from those of the volume as it was computed, wider than `volume` where
        the method explains what tilts bring in from beside the field [V^2·voxel^2]; None of other methods.
    """

    volume: Volume
    std: torch.Tensor | None
    images: torch.Tensor = item(2)
    noise: torch.Tensor = item(0)
    kept: torch.Tensor = item(0)
    angles: torch.Tensor = item(0)
    weight: torch.Tensor = item(0)
    residuals: tuple[float, ...] = static(default=())
    misfits: tuple[float, ...] = static(default=())
    warnings: tuple[str, ...] = static(default=())
    method: str = static(default="")
    mismatch: torch.Tensor | None = item(0, default=None)
    displacement: torch.Tensor | None = item(4, default=None)

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
        mismatch = self.mismatch
        if mismatch is None:
            squares = _projected_squares(self.volume.values, self.images, self.angles, self._geometry)
            mismatch = squares / self.images[0].numel()
        return mismatch / (self.kept * self.noise)

    @property
    def consistency(self) -> float:
        """`misfit` in the mean over the tilts [1]: how closely the volume meets the images as a whole."""
        return float(self.misfit.mean())

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
    network: str | Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    bends: float | None = None,
    std: bool = True,
    progress: Progress | None = None,
) -> Reconstruction:
    """Tomogram of a tilt series. It has no gradients: for those use the operators.

    Parameters
    ----------
    series : TiltSeries
        Counts, or any images whose mean is the unscattered intensity.
    method : {"wbp", "least-squares", "sirt", "tv", "wiener", "pnp", "diffusion", "implicit", "local"}
        Weighted back-projection; damped least squares in closed form; simultaneous iterations; total variation;
        posterior mean under the Gaussian model of which the images are most probable. With trained networks:
        plug-and-play with a denoiser; mean of posterior samples by diffusion; the local network, which looks at the
        surroundings of each voxel in all tilts. A neural field fitted to the images.
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
        Finest period to keep [Å]; of back-projection, least squares and SIRT only.
    weight : float, optional
        Of the damping, as in `inverse.least_squares` [voxel^2]; of the variation, as in `inverse.tv`; or the strength
        of plug-and-play, 0.25 when left out; for these only. The others' is found from the images' noise
        and signal, or so that the images are met as closely as their noise allows.
    iterations : int, optional
        Of SIRT, 10 when left out; of plug-and-play, 20; at most so many of total variation, 100, and steps of the
        neural field, 400.
    network : str or path, optional
        Weights file of "pnp", "diffusion" and "local"; what comes with the project for it when left out.
    samples : int, optional
        Of diffusion, 8 when left out.
    seed : int
        Of diffusion and the neural field.
    bends : float, optional
        How far parts of a specimen that bends from tilt to tilt are expected to be displaced [Å]: the neural field is
        fitted together with the displacements. When left out it does not bend.
    std : bool
        Compute the standard deviation, where that is not a by-product: it may take twice as long as the volume.
    progress : callable, optional
        Called with (rows done, rows in all).

    Returns
    -------
    Reconstruction

    Warns
    -----
    UserWarning
        When the series has no optics: not corrected, and scaled as for 300 kV. When the network was trained at another
        voxel size. When what the method holds likely has pulled the volume from the images by more than their noise.

    Raises
    ------
    ValueError
        For an unknown method, a number out of bounds, images that hold no electrons, or a slab that is too large for
        the memory that all but back-projection and least squares take.
    cryosim.io.FormatError
        For a weights file that cannot be used.
    """
    how: Any = {"bin": bin, "ctf": ctf, "low_pass": low_pass}
    chosen: Any = {
        "filter": filter,
        "weight": weight,
        "iterations": iterations,
        "samples": samples,
        "seed": seed,
        "bends": bends,
    }
    network = None if network is None else str(network)
    design = designed(series, method, thickness=thickness, network=network, **chosen, **how)
    images, noise = prepare(series, **how)  # (tilt, y, x) [V·voxel], (tilt,)
    design = fitted_design(design, images, noise)
    depth, height, _ = design.shape
    small = depth * height * design.width <= VOXELS_AT_ONCE
    if method in AT_ONCE or (method in LEARNED and small):
        with torch.no_grad():
            made = solved(design, images)
        images = images if made.straight is None else made.straight
        missed = _squares(made.volume, images, design)
        if progress:
            progress(height, height)
    else:
        values, missed = images.new_empty(design.shape), torch.zeros(len(images), dtype=torch.float64)
        how_many = {"rows": height if method in HALO and small else None, "layers": depth}
        for rows, _, block in slabs(images, design, **how_many):
            values[:, rows] = block[..., design.columns]
            missed += _squares(block, images[:, rows], design) if method in WIDE else 0
            if progress:
                progress(rows.stop, height)
        made = Solved(values)
    made = made.cropped(design)
    mismatch = missed / images[0].numel() if method in WIDE else None
    spread = made.std
    if spread is None and std:
        layer = deviation(series, design._replace(bends=None), images, **how)
        spread = layer[:, None, None].expand(design.shape)
    period = None if low_pass is None else low_pass / design.voxel_size
    kept = torch.tensor(kept_variance(design.shape[1:], period), dtype=torch.float64)
    told = _pulled(design, made.volume, images, kept * noise, mismatch)
    for text in told:
        warnings.warn(f"reconstruct: {text}", UserWarning, stacklevel=2)
    return Reconstruction(
        Volume(made.volume, design.voxel_size),
        spread,
        images,
        noise,
        kept,
        series.tilts.angles,
        torch.tensor(design.weight, dtype=torch.float64),
        made.residuals,
        made.misfits,
        told,
        method,
        mismatch,
        None if made.displacement is None else made.displacement * design.voxel_size,
    )


def _squares(values: torch.Tensor, images: torch.Tensor, design: Design) -> torch.Tensor:
    """Sums of squares (tilt,) of what images (tilt, row, u) differ by from those of a volume as it was computed."""
    return _projected_squares(values, images, torch.tensor(design.angles, dtype=torch.float64), design.geometry)


def _projected_squares(
    values: torch.Tensor, images: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry
) -> torch.Tensor:
    squares = torch.zeros(len(images), dtype=torch.float64)
    for rows in range(0, images.shape[1], ROWS):
        seen = project(values[:, rows : rows + ROWS], angles, geometry)
        squares = squares + (seen - images[:, rows : rows + ROWS]).double().square().sum((1, 2))
    return squares


def _pulled(
    design: Design, values: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, mismatch: torch.Tensor | None
) -> tuple[str, ...]:
    """A warning if what a method holds likely has pulled the volume from what the images say.

    Seen by the misfit of the volume over the noise, in all rows or those in the middle; where least squares there,
    which holds nothing likely, does not meet the images either, more is allowed: then they are of no volume at all.
    """
    if design.method not in _ASSUMING:
        return ()
    rows = middle_rows(design, _STRIP)
    angles, geometry, seen = torch.tensor(design.angles, dtype=torch.float64), design.geometry, images[:, rows]
    damping = 1e-3 * largest_eigenvalue(angles, geometry)
    plan = row_backprojection(angles, geometry, gram_solver(angles, damping, geometry), seen.dtype)
    least = torch.cat([block for _, block in backproject_rows(plan, seen)])
    floor = float((_squares(least, seen, design) / seen[0].numel() / noise).mean())
    if mismatch is None:
        mismatch = _squares(values[:, rows], seen, design) / seen[0].numel()
    given = float((mismatch / noise).mean())
    if given <= _ALLOWED * max(1.0, floor):
        return ()
    advice = {"pnp": "Lower weight.", "tv": "Lower weight.", "implicit": "Take more iterations."}
    return (
        f"method {design.method}: the volume differs from the images by {given:.2f} times the variance of their noise, "
        f"where {max(1.0, floor):.2f} is possible: what the method holds likely has pulled it from what was measured. "
        + advice.get(design.method, "Compare with least squares before you believe it."),
    )


def deviation(
    series: TiltSeries,
    design: Design,
    images: torch.Tensor,
    *,
    bin: int,
    ctf: Correction,
    low_pass: float | None,
) -> torch.Tensor:
    """Standard deviation (z,) [V] that noise makes in the voxels that `design` makes of `series`.

    That of the Wiener filter is exact, of its posterior. Methods that are linear in the images are given nothing but
    noise: images of the counts of the series, prepared and reconstructed in the same way. Others answer to noise as to
    what is there: images of their own volume, seen anew with two such draws of noise (parametric bootstrap, Efron 1979,
    doi:10.1214/aos/1176344552), make two volumes that differ by sqrt(2) of it. The deviation is that of the middle
    half, good to a few percent.
    """
    if design.method == "wiener":
        from inverse.solvers.wiener import posterior_std

        return posterior_std(design.projection(64), model_of(design))[:, 0, 0].to(images)
    depth, _, width = design.shape
    if design.method in ("wbp", "least-squares", "sirt"):
        rows = min(max(32, -(-2 * _NOISE_SAMPLES // width)), 512)
        strip = design._replace(shape=(depth, rows, width))
        made = _whole(strip, _noise_of(series, rows, bin, ctf, low_pass, images, seed=0))
    else:
        few = middle_rows(design, _STRIP)
        strip = design._replace(shape=(depth, few.stop - few.start, width))
        first = _whole(strip, images[:, few])
        seen = project(first, torch.tensor(design.angles, dtype=torch.float64), design.geometry)
        one, other = (
            _whole(strip, seen + _noise_of(series, strip.shape[1], bin, ctf, low_pass, images, seed)) for seed in (0, 1)
        )
        made = (one - other) / math.sqrt(2)
    middle = slice(width // 4, width // 4 + max(1, width // 2))
    return made[..., design.columns][..., middle].double().square().mean((1, 2)).sqrt().to(images)


def _whole(design: Design, images: torch.Tensor) -> torch.Tensor:
    """The volume (z, row, x) of a few rows."""
    if design.method in SOLVERS:
        return solved(design, images).volume
    return torch.cat([block for _, _, block in slabs(images, design, rows=design.shape[1])])


def _noise_of(
    series: TiltSeries,
    rows: int,
    bin: int,
    ctf: Correction,
    low_pass: float | None,
    like: torch.Tensor,
    seed: int,
) -> torch.Tensor:
    """Prepared images (tilt, rows, u) of nothing but the noise that counts as large as those of a series have."""
    width = like.shape[2]
    means = torch.stack([image.mean(dtype=torch.float64) for image in series.images]).to(like.dtype)
    blank = means[:, None, None].expand(-1, 2 * rows * bin, width * bin)
    counts = torch.poisson(blank, generator=torch.Generator(means.device).manual_seed(seed))
    tilts = series.tilts.replace(shifts=torch.zeros_like(series.tilts.shifts), axis_angle=0.0)
    optics = Optics(300.0) if series.optics is None else series.optics  # as `prepare` takes it, which warned already
    correction: Correction = "none" if series.optics is None else ctf
    noise = series.replace(images=counts, tilts=tilts, optics=optics, movies=None)
    images, _ = prepare(noise, bin=bin, ctf=correction, low_pass=low_pass)
    return images[:, rows // 2 : rows // 2 + rows]


def back_projected(series: TiltSeries, thickness: float, bin: int) -> Volume:
    """Weighted back-projection (z, y, x) [V] of a tilt series, for datasets; `thickness` [Å] as in `reconstruct`."""
    return reconstruct(series, "wbp", thickness=thickness, bin=bin).volume
