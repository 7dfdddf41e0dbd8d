"""The registry: every operator once, in its variants. Each law is one file and runs over all of them."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from cryosim.microscope.optics import Optics
from inverse.physics.contrast import ContrastProjection
from inverse.physics.tilt import TiltProjection


class Case(NamedTuple):
    """An operator, ready to be tried."""

    make: Callable[..., torch.nn.Module]
    volume: tuple[int, ...]
    images: tuple[int, ...]
    parameters: tuple[str, ...]


def _tilt(volume, n_tilts=9, image=None, **options) -> Case:
    angles = torch.linspace(-60, 57, n_tilts, dtype=torch.float64)

    def make(**more) -> TiltProjection:
        return TiltProjection(angles, volume, image, **(options | more))

    return Case(make, volume, (n_tilts, *(image or volume[1:])), ("angles",))


def _placed(volume, n_tilts=3, image=None, shifts_only=False, **options) -> Case:
    """In the microscope's whole geometry, with another value in each tilt."""
    angles = torch.linspace(-60, 57, n_tilts, dtype=torch.float64)
    shifts = torch.stack([1.3 * torch.sin(angles), 0.4 + 0.7 * torch.cos(angles)], 1)
    setting: dict = {"shifts": shifts}
    if not shifts_only:
        sizes = torch.linspace(0.96, 1.05, n_tilts, dtype=torch.float64)
        turns = torch.linspace(80.0, 86.0, n_tilts, dtype=torch.float64)
        setting |= {"axis_angle": turns, "magnifications": sizes, "x_tilt": -7.0}

    def make(**more) -> TiltProjection:
        return TiltProjection(angles, volume, image, **(setting | options | more))

    return Case(make, volume, (n_tilts, *(image or volume[1:])), ("angles", *setting))


def _contrast(volume, n_tilts=5, image=None, **options) -> Case:
    """Volts at which a projection through the lens is about as strong as one without."""
    angles = torch.linspace(-60, 57, n_tilts, dtype=torch.float64)
    optics = Optics(80.0, torch.linspace(1000, 1600, n_tilts), astigmatism=200.0, phase_shift=20.0)

    def make(**more) -> ContrastProjection:
        return ContrastProjection(angles, volume, 3.0, optics, image, **(options | {"normalize": True} | more))

    return Case(make, volume, (n_tilts, *(image or volume[1:])), ("angles",))


OPERATORS = {
    "tilt camera, even": _tilt((8, 4, 16)),
    "tilt camera, odd": _tilt((7, 3, 15)),
    "tilt camera, small image": _tilt((6, 5, 17), image=(3, 10)),
    "tilt camera, large image": _tilt((6, 3, 10), image=(6, 21)),
    "tilt camera, unit norm": _tilt((8, 3, 13), normalize=True),
    "tilt camera, as many tilts as layers": _tilt((9, 3, 12)),
    "tilt camera, thicker than wide": _tilt((21, 2, 8)),
    "tilt camera, one layer": _tilt((1, 3, 11)),
    "tilt stretched, even": _tilt((8, 4, 16), grid="stretched"),
    "tilt stretched, odd": _tilt((7, 3, 15), grid="stretched"),
    "tilt stretched, unit norm": _tilt((9, 3, 12), grid="stretched", normalize=True),
    "tilt camera, placed, even": _placed((4, 4, 6)),
    "tilt camera, placed, odd, unit norm": _placed((3, 5, 5), image=(7, 6), normalize=True),
    "tilt camera, shifts, quarter turn": _placed((4, 5, 6), shifts_only=True, axis_angle=90.0),
    "tilt stretched, shifts, even": _placed((6, 4, 12), shifts_only=True, grid="stretched"),
    "tilt stretched, shifts, odd": _placed((7, 5, 11), shifts_only=True, grid="stretched"),
    "contrast camera, plane, even": _contrast((6, 8, 12)),
    "contrast camera, plane, odd, large image": _contrast((5, 7, 9), image=(9, 13)),
    "contrast camera, no heights": _contrast((6, 7, 10), heights="none"),
    "contrast stretched, no heights": _contrast((5, 7, 12), grid="stretched", heights="none"),
    "contrast stretched, plane": _contrast((4, 6, 11), grid="stretched"),
    "ewald camera": _contrast((7, 6, 9), heights="all"),
    "ewald camera, other hand": _contrast((6, 5, 8), heights="all", hand=-1),
}


@pytest.fixture(params=OPERATORS.values(), ids=OPERATORS.keys())
def case(request) -> Case:
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def draw():
    """draw(batch, *shape, dtype): seeded noise with a channel axis."""
    generator = torch.Generator().manual_seed(0)

    def make(batch: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(batch, 1, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return make
