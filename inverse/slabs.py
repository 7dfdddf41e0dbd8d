"""The tomogram of prepared images by each method: the whole of it, or slab by slab of rows.

Back-projection and least squares make blocks of layers of a slab; what iterates makes all of a slab at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from inverse.design import AT_ONCE, HALO, LEARNED, ROWS, Design, Stack
from inverse.physics.closed_form import gram_solver
from inverse.physics.rows import LAYERS, Block, backproject_rows, row_backprojection
from inverse.solvers.linear import wbp_filter

if TYPE_CHECKING:
    from inverse.physics.gaussian import GaussianModel


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
        As it was computed, of which `design.columns` are the tomogram's [V].
    """
    height, step, halo = design.shape[1], rows or ROWS, HALO.get(design.method, 0)
    starts = range(0, height, step) if starts is None else starts
    if design.method in AT_ONCE:
        whole = solved(design, images[:, 0:height]).volume
        for start in starts:
            yield slice(start, min(start + step, height)), slice(0, len(whole)), whole[:, start : start + step]
        return
    make = _maker(design, images.dtype, layers)
    for start in starts:
        slab = slice(start, min(start + step, height))
        seen, above = _with_halo(images, slab, halo, padded=design.method not in LEARNED)
        for block, values in make(seen):
            yield slab, block, values[:, above : above + slab.stop - start]


def _with_halo(images: Stack, slab: slice, halo: int, *, padded: bool) -> tuple[torch.Tensor, int]:
    """Rows of a slab (tilt, row, u) and up to `halo` more on both sides; how many of those come first.

    Where the images end there are zeros, if `padded`, else nothing: a network takes zeros for vacuum, with an edge.
    """
    start, stop = slab.start - halo, slab.stop + halo
    seen = images[:, max(start, 0) : min(stop, images.shape[1])]
    if not padded:
        return seen, slab.start - max(start, 0)
    return functional.pad(seen, (0, 0, max(-start, 0), max(stop - images.shape[1], 0))) if halo else seen, halo


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
        volume = solved(design, images).volume
        for start in range(0, len(volume), layers):
            block = slice(start, min(start + layers, len(volume)))
            yield block, volume[block]

    return make


class Solved(NamedTuple):
    """A volume (z, row, x) [V], as it is computed, with what its method tells of it, as in `Reconstruction`."""

    volume: torch.Tensor
    std: torch.Tensor | None = None
    residuals: tuple[float, ...] = ()
    misfits: tuple[float, ...] = ()
    displacement: torch.Tensor | None = None
    straight: torch.Tensor | None = None

    def cropped(self, design: Design) -> Solved:
        """Without what was computed beside the field."""
        if self.volume.shape[2] == design.shape[2]:
            return self
        std = None if self.std is None else self.std[..., design.columns]
        return self._replace(volume=self.volume[..., design.columns].contiguous(), std=std)


def solved(design: Design, images: torch.Tensor) -> Solved:
    """The volume of images (tilt, row, u), by the methods that make all rows of it at once."""
    return SOLVERS[design.method](design, images)


def _by_sirt(design: Design, images: torch.Tensor) -> Solved:
    from inverse.solvers.sirt import sirt

    return Solved(sirt(design.projection(images.shape[1]), images, iterations=design.iterations))


def _by_wiener(design: Design, images: torch.Tensor) -> Solved:
    from inverse.solvers.wiener import wiener

    return Solved(wiener(design.projection(images.shape[1]), images, model_of(design)).volume)


def _by_variation(design: Design, images: torch.Tensor) -> Solved:
    from inverse.priors.classic import TotalVariation
    from inverse.solvers.primal_dual import primal_dual

    physics, priors = design.projection(images.shape[1]), [(TotalVariation(), design.weight)]
    found = primal_dual(physics, images[None, None], priors, noise=design.mean_noise, iterations=design.iterations)
    return Solved(found.volume[0, 0])


def _by_plug_and_play(design: Design, images: torch.Tensor) -> Solved:
    from inverse.solvers.plug_and_play import plug_and_play

    physics, denoiser = design.projection(images.shape[1]), design.denoiser(images.dtype)
    how: Any = {"iterations": design.iterations, "strength": design.weight, "noise_levels": design.levels}
    made = plug_and_play(physics, images, denoiser, design.mean_noise, **how)
    return Solved(made.volume, None, tuple(made.residuals[:, 0].tolist()), tuple(made.misfits[:, 0].tolist()))


def _by_diffusion(design: Design, images: torch.Tensor) -> Solved:
    from inverse.solvers.diffusion import diffusion

    generator = torch.Generator(images.device).manual_seed(design.seed)
    physics, denoiser = design.projection(images.shape[1]), design.denoiser(images.dtype)
    made = diffusion(physics, images, denoiser, design.mean_noise, samples=design.samples, generator=generator)
    return Solved(made.mean, made.std)


def _by_local_network(design: Design, images: torch.Tensor) -> Solved:
    from inverse.solvers.local import local
    from inverse.weights import load_network

    network, noise = load_network(design.network).to(images.dtype), torch.tensor(design.noise, dtype=images.dtype)
    transfer = torch.tensor(design.transfer, dtype=images.dtype)
    made = local(design.projection(images.shape[1]), images, network, noise=noise, transfer=transfer)
    return Solved(made.volume, made.std)


def _by_field(design: Design, images: torch.Tensor) -> Solved:
    from inverse.solvers.implicit import implicit

    generator = torch.Generator(images.device).manual_seed(design.seed)
    physics = design.projection(images.shape[1])
    with torch.enable_grad():
        how = {"steps": design.iterations, "bends": design.bends, "generator": generator}
        made = implicit(physics, images, design.mean_noise, **how)
    return Solved(made.volume, displacement=made.displacement, straight=made.straight)


SOLVERS: dict[str, Callable[[Design, torch.Tensor], Solved]] = {
    "sirt": _by_sirt,
    "wiener": _by_wiener,
    "tv": _by_variation,
    "pnp": _by_plug_and_play,
    "diffusion": _by_diffusion,
    "implicit": _by_field,
    "local": _by_local_network,
}


def model_of(design: Design) -> GaussianModel:
    from inverse.physics.gaussian import GaussianModel

    assert design.model is not None
    spectrum, frequencies, noise, (thickness,) = (torch.tensor(part, dtype=torch.float64) for part in design.model)
    return GaussianModel(spectrum, frequencies, noise, thickness)
