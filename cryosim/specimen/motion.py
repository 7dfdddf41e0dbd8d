"""Motion: the stage drifts, the beam bends the ice, and molecules go along with it.

A `Motion` holds how far everything has moved in each frame of each exposure: it is drawn once, so it is known. Within a
frame the specimen stands still; take more frames where it would move by more than half a pixel.

Two displacements act. The *drift* moves the whole specimen in the frame of the microscope, after the tilt: across the
image, and along the beam, where it changes the defocus. The *field* moves the atoms at (x, y) of the untilted specimen
by a smooth vector (x, y, z), before the tilt, so that its z shows as a shift across the axis in a tilted image.
"""

from __future__ import annotations

import math

import torch

from cryosim.core.fourier import positions
from cryosim.core.record import Record, hidden, item, static
from cryosim.specimen.atoms import Poses
from cryosim.specimen.moment import Moment


class Motion(Record):
    """Displacements in each frame of each exposure.

    Attributes
    ----------
    drift : tensor (tilt, frame, 3)
        Of the whole specimen (x, y) in the image plane and z along the beam [Å].
    field : tensor (tilt, frame, 3, y, x) or None
        (x, y, z) [Å] in the specimen, at the nodes of a grid about its origin; held beyond its edges, smooth (cubic)
        between them.
    spacing : float
        Of the nodes [Å].

    Raises
    ------
    ValueError
        When the shapes disagree.
    """

    drift: torch.Tensor = item(3)
    field: torch.Tensor | None = item(5, default=None)
    spacing: float = static(default=0.0)

    def __post_init__(self) -> None:
        if self.drift.ndim != 3 or self.drift.shape[-1] != 3:
            raise ValueError(f"Motion.drift: expected (tilt, frame, 3) [Å], got {tuple(self.drift.shape)}.")
        for name in ("drift", "field"):
            value = getattr(self, name)
            if value is not None and not hidden() and not bool(torch.isfinite(value.detach()).all()):
                raise ValueError(f"Motion.{name}: expected finite displacements [Å], got NaN or infinity.")
        if self.field is None:
            return
        if self.field.ndim != 5 or self.field.shape[:3] != self.drift.shape or not self.spacing > 0:
            raise ValueError(
                f"Motion.field: expected ({self.drift.shape[0]}, {self.drift.shape[1]}, 3, y, x) [Å] as the drift has "
                f"tilts and frames, and a positive spacing [Å], got {tuple(self.field.shape)} and {self.spacing:g}."
            )

    def __add__(self, other: Motion) -> Motion:
        """Both motions together.

        Raises
        ------
        ValueError
            When tilts, frames or nodes differ.
        """
        both = [m.field for m in (self, other) if m.field is not None]
        shapes = {m.drift.shape for m in (self, other)}, {tuple(f.shape) for f in both}
        spacings = {m.spacing for m in (self, other) if m.field is not None}
        if max(len(s) for s in (*shapes, spacings)) > 1:
            raise ValueError(
                "Motion: expected two motions of the same tilts, frames, nodes and spacing, got "
                f"{self!r} and {other!r}."
            )
        field = both[0] + both[1] if len(both) == 2 else (both[0] if both else None)
        return Motion(self.drift + other.drift, field, max(self.spacing, other.spacing))


def drift_at(motion: Motion | None, moment: Moment) -> torch.Tensor | None:
    """Displacement (3,) [Å] of the whole specimen in the frame of the microscope.

    Raises
    ------
    ValueError
        When the motion has no such tilt, or another number of frames.
    """
    if motion is None:
        return None
    _check(motion, moment)
    return motion.drift[moment.tilt, moment.frame]


def displaced(poses: Poses, motion: Motion | None, moment: Moment) -> Poses:
    """Copies in the untilted specimen where the field at their origins has moved them; errors as in `drift_at`."""
    if motion is None or motion.field is None:
        return poses
    _check(motion, moment)
    return poses.replace(positions=poses.positions + field_at(motion, moment, poses.positions[:, :2]))


def field_at(motion: Motion, moment: Moment, places: torch.Tensor) -> torch.Tensor:
    """Displacement (point, 3) [Å] of the field at `places` (point, 2) [(x, y) Å] of the specimen."""
    if motion.field is None:
        return places.new_zeros(len(places), 3)
    nodes = motion.field[moment.tilt, moment.frame].to(places)  # (3, y, x)
    along_y, along_x = (
        _cubic(places[:, axis] / motion.spacing, n) for axis, n in ((1, nodes.shape[1]), (0, nodes.shape[2]))
    )
    return torch.einsum("pi,pj,cij->pc", along_y, along_x, nodes)


def stage_drift(
    doses: torch.Tensor, frames: int, *, distance: float, settling: float, generator: torch.Generator | None = None
) -> Motion:
    """Drift of a stage that has just been tilted, exponentially coming to rest, in another direction each time.

    Parameters
    ----------
    doses : tensor (tilt,)
        Of the exposures [e-/Å^2].
    frames : int
        Of each.
    distance : float
        Standard deviation of the way in x and in y from the beginning of the exposure to rest [Å].
    settling : float
        Dose after which 1/e of it is left [e-/Å^2].
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When the settling or the number of frames is not positive.
    """
    if not (settling > 0 and frames >= 1):
        raise ValueError(
            f"stage_drift: expected a positive settling and number of frames, got {settling} and {frames}."
        )
    doses = torch.as_tensor(doses, dtype=torch.float64)
    way = distance * torch.randn(len(doses), 2, generator=generator, dtype=torch.float64)
    moved = (1 - torch.exp(-_middles(doses, frames) / settling))[..., None] * way[:, None]
    return Motion(torch.cat([moved, torch.zeros_like(moved[..., :1])], -1))


def beam_induced_motion(
    doses: torch.Tensor,
    frames: int,
    extent: float,
    *,
    velocity: float = 0.2,
    correlation: float = 5000.0,
    memory: float = 4.0,
    nodes: int = 17,
    generator: torch.Generator | None = None,
) -> Motion:
    """Smooth random motion of the ice: a Gaussian process in place and dose.

    Each component of the velocity has the covariance velocity^2 exp(-d^2 / (2 correlation^2)) exp(-|N - N'| / memory)
    between places a distance d apart and doses N, N'. It goes on from one exposure to the next.

    Parameters
    ----------
    doses : tensor (tilt,)
        Of the exposures, in their order [e-/Å^2].
    frames : int
        Of each.
    extent : float
        Side of the square that is covered [Å]: the width of what will be seen.
    velocity : float
        Standard deviation of a component [Å per e-/Å^2].
    correlation : float
        [Å]. With the velocity, the prior of Bayesian polishing (Zivanov, Nakane & Scheres 2019,
        doi:10.1107/S205225251801463X): 0.2 and 5000 are what RELION proposes. Its kernel may be Gaussian, as here, or
        exponential.
    memory : float
        Dose after which the direction is forgotten [e-/Å^2]; without a source.
    nodes : int
        Along each side of the square.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        When a number is out of bounds, or the nodes are too few for the correlation.
    """
    along, spacing = _nodes(extent, nodes)
    if not (correlation > 0 and memory > 0 and velocity >= 0 and frames >= 1):
        raise ValueError(
            "beam_induced_motion: expected a positive correlation, memory and number of frames and a velocity of 0 or "
            f"more, got {correlation}, {memory}, {frames} and {velocity}."
        )
    if spacing > correlation:
        raise ValueError(
            f"beam_induced_motion: expected at least {math.ceil(extent / correlation) + 1} nodes for a correlation of "
            f"{correlation:g} Å over {extent:g} Å, got {nodes}."
        )
    doses = torch.as_tensor(doses, dtype=torch.float64)
    smooth = torch.exp(-0.5 * ((along[:, None] - along) / correlation) ** 2)
    values, vectors = torch.linalg.eigh(smooth)
    root = vectors * values.clamp_min(0).sqrt()  # of the covariance along one axis; in the plane it is a product
    steps = (doses[:, None] / frames).expand(-1, frames).flatten()  # dose of each frame, in order
    shape = (3, len(along), len(along))

    def drawn() -> torch.Tensor:
        return velocity * root @ torch.randn(shape, generator=generator, dtype=torch.float64) @ root.T

    speed, moved, history = drawn(), torch.zeros(shape, dtype=torch.float64), []
    for step in steps:
        parts = 2 * max(1, math.ceil(4 * float(step) / memory))  # of a frame, in which the velocity hardly changes
        kept = torch.exp(-step / parts / memory)
        for part in range(parts):
            after = kept * speed + torch.sqrt(1 - kept**2) * drawn()
            moved, speed = moved + step / parts * (speed + after) / 2, after
            if part == parts // 2 - 1:
                history.append(moved)
    field = torch.stack(history).unflatten(0, (len(doses), frames))
    return Motion(torch.zeros(len(doses), frames, 3, dtype=torch.float64), field, spacing)


def doming(
    doses: torch.Tensor,
    frames: int,
    extent: float,
    *,
    height: float,
    radius: float,
    settling: float = 10.0,
    nodes: int = 17,
) -> Motion:
    """Ice in a hole that bulges along z like a drum: height (1 - exp(-N / settling)) (1 - r^2 / radius^2).

    Parameters
    ----------
    doses, frames, extent, nodes
        As in `beam_induced_motion`.
    height : float
        Of the middle in the end [Å]; negative bulges towards the source.
    radius : float
        Of the hole, at whose rim the ice is held [Å].
    settling : float
        Dose after which 1/e of it is still to come [e-/Å^2]; without a source.
    """
    along, spacing = _nodes(extent, nodes)
    if not (radius > 0 and settling > 0 and frames >= 1):
        raise ValueError(
            f"doming: expected a positive radius, settling and number of frames, got {radius}, {settling} and {frames}."
        )
    doses = torch.as_tensor(doses, dtype=torch.float64)
    shape = (1 - (along**2 + along[:, None] ** 2) / radius**2).clamp_min(0)
    grown = height * (1 - torch.exp(-(_middles(doses, frames) + (torch.cumsum(doses, 0) - doses)[:, None]) / settling))
    field = torch.zeros(len(doses), frames, 3, len(along), len(along), dtype=torch.float64)
    field[:, :, 2] = grown[..., None, None] * shape
    return Motion(torch.zeros(len(doses), frames, 3, dtype=torch.float64), field, spacing)


def _nodes(extent: float, nodes: int) -> tuple[torch.Tensor, float]:
    """Places of the nodes along one side, one more at either end, and their spacing [Å]."""
    if not (extent > 0 and nodes >= 3):
        raise ValueError(f"Motion: expected a positive extent [Å] and at least 3 nodes, got {extent} and {nodes}.")
    spacing = extent / (nodes - 1)
    return positions(nodes + 2 + (nodes + 1) % 2, spacing, dtype=torch.float64), spacing


def _middles(doses: torch.Tensor, frames: int) -> torch.Tensor:
    """Dose (tilt, frame) from the beginning of each exposure to the middle of each frame [e-/Å^2]."""
    return (torch.arange(frames, dtype=torch.float64) + 0.5) / frames * doses[:, None]


def _check(motion: Motion, moment: Moment) -> None:
    tilts, frames = motion.drift.shape[:2]
    if not (moment.tilt < tilts and moment.frames == frames):
        raise ValueError(
            f"Motion: expected tilt {moment.tilt} with {moment.frames} frames to be among those it was made for, "
            f"{tilts} tilts of {frames} frames. Make it for this TiltScheme."
        )


def _cubic(place: torch.Tensor, n: int) -> torch.Tensor:
    """Weights (point, node) of the n nodes at `place` [nodes from the middle one], by cubic convolution.

    Keys 1981, doi:10.1109/TASSP.1981.1163711: passes through the nodes, exact for parabolas. Held at either end.
    """
    place = (place + n // 2).clamp(0, n - 1)
    first = place.detach().floor().clamp(0, max(n - 2, 0))
    weights = torch.zeros(len(place), n, dtype=place.dtype, device=place.device)
    t = place - first
    shares = (
        ((-0.5 * t + 1) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1,
        ((-1.5 * t + 2) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    )
    for offset, share in enumerate(shares, -1):
        at = (first + offset).long().clamp(0, n - 1)
        weights = weights.scatter_add(1, at[:, None], share[:, None])
    return weights
