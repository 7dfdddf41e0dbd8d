"""Teaching an `Unrolled` network with volumes of known truth; it can be interrupted at any time and resumed.

The examples are those of `inverse.train_local`, which see a specimen that reaches on in x beyond the field. So the
network computes a volume as wide as the images show, of which the field counts:

    |v - truth|^2 / (s^2 voxels),    s the deviation of the denoiser's volumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from inverse.physics.spectral import shown_width
from inverse.physics.tilt import TiltProjection
from inverse.solvers.unrolled import Unrolled
from inverse.train import Progress, fit
from inverse.train_local import Example, LocalPlan, example, expect_volumes


def train_unrolled(
    network: Unrolled,
    volumes: Sequence[torch.Tensor],
    plan: LocalPlan,
    *,
    state: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Unrolled:
    """Teach a network in place on volumes (z, y, x) [V], of one voxel size.

    Parameters
    ----------
    network : Unrolled
    volumes : sequence of tensor (z, y, x)
        [V].
    plan : LocalPlan
        Which examples are shown; a small `rate` for a denoiser that is trained already.
    state, resume, progress
        As in `inverse.train.train_denoiser`.

    Returns
    -------
    Unrolled
        The same, with the running mean of its weights, for use.

    Raises
    ------
    ValueError
        When there is no volume, or one that is not (z, y, x) or has less than 8 voxels along an axis.
    cryosim.io.FormatError
        When the state is damaged or belongs to another plan or network.
    """
    expect_volumes("train_unrolled", volumes)
    return fit(
        network, plan, lambda step: unrolled_loss(network, example(volumes, plan, step)), state, resume, progress
    )


def unrolled_loss(network: Unrolled, shown: Example) -> torch.Tensor:
    """What training makes small, of one example: ()."""
    depth, rows, width = shown.physics.volume_shape
    wide = shown_width(depth, width, float(shown.physics.angles.abs().max()))
    physics = TiltProjection(shown.physics.angles[0], (depth, rows, wide), (rows, width))
    first = wide // 2 - width // 2
    found = network(physics, shown.images, float(shown.noise.mean()))[..., first : first + width]
    scale = float(getattr(network.denoiser, "scale", 1.0))
    return (found - shown.truth).square().mean() / scale**2
