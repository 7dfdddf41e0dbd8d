"""When a specimen is seen: which exposure, which frame of it, after how many electrons."""

from __future__ import annotations

import torch

from cryosim.core.record import Record, item, static


class Moment(Record):
    """One frame of one exposure. Made by `TiltScheme.moment`; the default is a specimen that no electron has met.

    Attributes
    ----------
    before : float or tensor ()
        Dose the specimen has taken when the exposure begins [e-/Å^2].
    dose : float or tensor ()
        Of the whole exposure [e-/Å^2], the same in each of its frames.
    tilt : int
        Number of the exposure, in order.
    frame, frames : int
        Number of the frame, and how many the exposure has.

    Raises
    ------
    ValueError
        When there is no such frame.
    """

    before: float | torch.Tensor = item(0, default=0.0)
    dose: float | torch.Tensor = item(0, default=0.0)
    tilt: int = static(default=0)
    frame: int = static(default=0)
    frames: int = static(default=1)

    def __post_init__(self) -> None:
        if not 0 <= self.frame < self.frames:
            raise ValueError(f"Moment.frame: expected 0 to {self.frames - 1}, got {self.frame}.")

    @property
    def during(self) -> float | torch.Tensor:
        """Dose of the frame [e-/Å^2]."""
        return self.dose / self.frames

    @property
    def start(self) -> float | torch.Tensor:
        """Dose the specimen has taken when the frame begins [e-/Å^2]."""
        return self.before + self.during * self.frame
