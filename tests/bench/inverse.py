"""Projection against ASTRA's CPU `linear` projector, and what a proximal step costs beside a projection.

ASTRA works on one core at a time: its rows are shared by as many processes as we have threads. They are started and
hold their slices beforehand, so that neither start-up nor copying between processes is timed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch

from tests.bench.table import Entry

VOLUME, ANGLES = (128, 256, 256), torch.linspace(-60, 60, 41, dtype=torch.float64)
SIZE = "256 × 256 × 128 voxels, 41 tilts"
PROCESSES = 2


def our_projection(adjoint: bool) -> Callable[[], object]:
    from inverse.physics.tilt import TiltProjection

    generator = torch.Generator().manual_seed(0)
    physics = TiltProjection(ANGLES, VOLUME)
    if adjoint:
        images = torch.randn(1, 1, len(ANGLES), *VOLUME[1:], generator=generator)
        return lambda: physics.A_adjoint(images)
    volume = torch.randn(1, 1, *VOLUME, generator=generator)
    return lambda: physics.A(volume)


def astra_projection(adjoint: bool) -> Callable[[], object]:
    from tests.bench.astra_rows import serve

    context = multiprocessing.get_context("spawn")
    orders, done = context.Queue(), context.Queue()
    depth, rows, width = VOLUME
    arguments = (adjoint, rows // PROCESSES, depth, width, ANGLES.numpy(), orders, done)
    for _ in range(PROCESSES):
        context.Process(target=serve, args=arguments, daemon=True).start()
    for _ in range(PROCESSES):
        done.get(timeout=60)

    def work():
        for _ in range(PROCESSES):
            orders.put("go")
        for _ in range(PROCESSES):
            done.get(timeout=60)

    return work


def stretched():
    from inverse.physics.tilt import TiltProjection

    generator = torch.Generator().manual_seed(0)
    physics = TiltProjection(ANGLES, VOLUME, grid="stretched")
    volume = torch.randn(1, 1, *VOLUME, generator=generator)
    images = torch.randn(1, 1, len(ANGLES), *VOLUME[1:], generator=generator)
    return physics, volume, images


def proximal_step() -> Callable[[], object]:
    physics, volume, images = stretched()
    return lambda: physics.prox_l2(volume, images, 1e-3)


def forward_and_adjoint() -> Callable[[], object]:
    physics, volume, images = stretched()
    return lambda: (physics.A(volume), physics.A_adjoint(images))


ENTRIES = [
    Entry(
        "tilt projection, forward",
        SIZE,
        lambda: our_projection(adjoint=False),
        lambda: astra_projection(adjoint=False),
        f"ASTRA linear, {PROCESSES} processes",
        "11.8 on 2 cores",
    ),
    Entry(
        "tilt projection, adjoint",
        SIZE,
        lambda: our_projection(adjoint=True),
        lambda: astra_projection(adjoint=True),
        f"ASTRA linear, {PROCESSES} processes",
        "11.1 on 2 cores",
    ),
    Entry(
        "prox_l2, stretched grid",
        SIZE,
        proximal_step,
        forward_and_adjoint,
        "our own A and A^T",
        "0.6 on 2 cores",
    ),
]
