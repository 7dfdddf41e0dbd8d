"""Which tilts are taken, in which order, with which dose."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from cryosim.core.record import Record, item, static
from cryosim.specimen.moment import Moment


class TiltScheme(Record):
    """Tilts in the order of their exposure, so that the accumulated dose is a cumulative sum.

    Attributes
    ----------
    angles : tensor (tilt,)
        [deg].
    doses : tensor (tilt,)
        Of each exposure [e-/Å^2].
    shifts : tensor (tilt, 2)
        (x, y) by which the content of each image is displaced [Å]; zeros when left out.
    axis_angle : float or tensor ()
        In-plane angle of the tilt axis, from y, right-handed about z [deg].
    frames : int
        Of each exposure: the specimen is damaged and moves from one to the next, and is computed anew.
    dose_rate : float
        [e-/Å^2/s]; with the frame rate of the camera it says how many camera frames an exposure takes.

    Raises
    ------
    ValueError
        When the shapes disagree, an angle is not below 90 degrees, or there are no frames or no electrons.
    """

    angles: torch.Tensor = item(0)
    doses: torch.Tensor = item(0)
    shifts: torch.Tensor = item(1, default=None)
    axis_angle: float | torch.Tensor = item(0, default=0.0)
    frames: int = static(default=1)
    dose_rate: float = static(default=3.0)

    def __post_init__(self) -> None:
        for name in ("angles", "doses", "shifts"):
            if not isinstance(getattr(self, name), torch.Tensor) and getattr(self, name) is not None:
                object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64))
        n = self.angles.shape
        if len(n) != 1 or self.doses.shape != n:
            raise ValueError(
                f"TiltScheme: expected angles and doses of one shape (tilt,), got {tuple(n)} and "
                f"{tuple(self.doses.shape)}."
            )
        if self.shifts is None:
            object.__setattr__(self, "shifts", self.angles.new_zeros(n[0], 2))
        if self.shifts.shape != (*n, 2):
            raise ValueError(f"TiltScheme.shifts: expected ({n[0]}, 2), got {tuple(self.shifts.shape)}.")
        if not (self.angles.detach().abs() < 90).all():
            raise ValueError("TiltScheme.angles: expected angles between -90 and 90 degrees, exclusive.")
        if not bool(((self.doses.detach() >= 0) & (self.doses.detach() < math.inf)).all()):
            raise ValueError(
                f"TiltScheme.doses: expected finite doses of 0 or more [e-/Å^2], got {self.doses.tolist()}."
            )
        if not isinstance(self.frames, int) or self.frames < 1:
            raise ValueError(f"TiltScheme.frames: expected a whole number of 1 or more, got {self.frames!r}.")
        if not 0 < self.dose_rate < math.inf:
            raise ValueError(f"TiltScheme.dose_rate: expected a positive number [e-/Å^2/s], got {self.dose_rate}.")

    def __len__(self) -> int:
        return self.angles.shape[0]

    @property
    def accumulated_doses(self) -> torch.Tensor:
        """Dose (tilt,) the specimen has seen when each exposure begins [e-/Å^2]."""
        return torch.cumsum(self.doses, 0) - self.doses

    @property
    def exposure_times(self) -> torch.Tensor:
        """How long each exposure takes (tilt,) [s]."""
        return self.doses / self.dose_rate

    def moment(self, which: int, frame: int = 0) -> Moment:
        """Frame `frame` of exposure `which`, after the dose of all before it.

        Raises
        ------
        IndexError, ValueError
            When there is no such exposure or frame.
        """
        which = range(len(self))[which]
        return Moment(self.accumulated_doses[which], self.doses[which], which, frame, self.frames)

    def camera_frames(self, which: int, frame_rate: float) -> int:
        """Frames that a camera of `frame_rate` [1/s] takes in one frame of exposure `which`, at least one."""
        return max(1, round(float(self.exposure_times[which]) * frame_rate / self.frames))

    def thickness_compensated(self, thickness: float, mean_free_path: float) -> TiltScheme:
        """The same total dose, shared so that equally many electrons pass each tilt without a loss.

        A slab lets exp(-thickness / (mean_free_path cos t)) through, so the doses are its inverse.

        Parameters
        ----------
        thickness, mean_free_path : float
            [Å]; the path at this voltage, see `mean_free_path`.
        """
        paths = thickness / mean_free_path / torch.cos(torch.deg2rad(self.angles))
        return self._weighted(torch.exp(paths - paths.max()))

    def cosine_compensated(self, power: float = 1.0) -> TiltScheme:
        """The same total dose, shared as 1 / cos(tilt)^power, as data collection software does."""
        return self._weighted(torch.cos(torch.deg2rad(self.angles)) ** -power)

    def _weighted(self, weights: torch.Tensor) -> TiltScheme:
        doses = self.doses * weights
        return self.replace(doses=doses * (self.doses.sum() / doses.sum()))

    @classmethod
    def timed(
        cls,
        angles: torch.Tensor,
        times: float | torch.Tensor,
        dose_rate: float,
        *,
        axis_angle: float = 0.0,
        frames: int = 1,
    ) -> TiltScheme:
        """Exposures of given length: their doses are dose_rate times time.

        Parameters
        ----------
        angles : tensor (tilt,)
            In the order of exposure [deg].
        times : float or tensor (tilt,)
            [s].
        dose_rate : float
            [e-/Å^2/s].
        axis_angle : float
            [deg].
        frames : int
            Of each exposure.
        """
        angles, times = (torch.as_tensor(x, dtype=torch.float64) for x in (angles, times))
        if times.ndim and times.shape != angles.shape:
            raise ValueError(f"TiltScheme.timed: expected {len(angles)} times, one a tilt, got {tuple(times.shape)}.")
        doses = (dose_rate * times).expand(angles.shape)
        return cls(angles, doses, axis_angle=axis_angle, frames=frames, dose_rate=dose_rate)

    @classmethod
    def dose_symmetric(
        cls, extent: float = 60.0, step: float = 3.0, total_dose: float = 120.0, group: int = 2, axis_angle: float = 0.0
    ) -> TiltScheme:
        """Hagen's scheme, 0, +s, -s, -2s, +2s, +3s, -3s, ...: the low tilts see the fresh specimen.

        Parameters
        ----------
        extent : float
            Largest tilt [deg], a multiple of `step`.
        step : float
            [deg].
        total_dose : float
            Of the whole series [e-/Å^2].
        group : int
            Tilts taken on one side before the stage crosses to the other (one fewer on the first visit); 2 is Hagen's,
            1 alternates at every tilt.
        axis_angle : float
            [deg].

        Source: Hagen, Wan & Briggs 2017, doi:10.1016/j.jsb.2016.06.007.
        """
        n = _steps(extent, step)
        if group < 1:
            raise ValueError(f"TiltScheme.dose_symmetric: expected group of 1 or more, got {group}.")
        sides, order, take = [list(range(1, n + 1)), list(range(-1, -n - 1, -1))], [0], max(1, group - 1)
        while any(sides):
            order += sides[0][:take]
            sides = [sides[1], sides[0][take:]]
            take = group
        return cls._of_steps(order, step, total_dose, axis_angle)

    @classmethod
    def bidirectional(
        cls,
        extent: float = 60.0,
        step: float = 3.0,
        total_dose: float = 120.0,
        start: float = 0.0,
        axis_angle: float = 0.0,
    ) -> TiltScheme:
        """From `start` up to +extent, then from below `start` down to -extent [deg]; else as `dose_symmetric`."""
        n, s = _steps(extent, step), _steps(start, step) if start >= 0 else -_steps(-start, step)
        return cls._of_steps([*range(s, n + 1), *range(s - 1, -n - 1, -1)], step, total_dose, axis_angle)

    @classmethod
    def unidirectional(
        cls, extent: float = 60.0, step: float = 3.0, total_dose: float = 120.0, axis_angle: float = 0.0
    ) -> TiltScheme:
        """From -extent to +extent. Arguments as in `dose_symmetric` [deg]."""
        n = _steps(extent, step)
        return cls._of_steps(range(-n, n + 1), step, total_dose, axis_angle)

    @classmethod
    def from_file(cls, path: str | Path) -> TiltScheme:
        """Scheme of an .mdoc, .tlt or .rawtlt file; see `cryosim.io.read_tilts`.

        Raises
        ------
        cryosim.io.FormatError
            When the file is missing, empty or malformed.
        """
        from cryosim.io.tilts import read_tilts  # the edge is loaded only when a file is asked for

        return read_tilts(path)

    @classmethod
    def _of_steps(cls, order, step: float, total_dose: float, axis_angle: float) -> TiltScheme:
        angles = torch.tensor([i * step for i in order], dtype=torch.float64)
        return cls(angles, torch.full_like(angles, total_dose / len(angles)), axis_angle=axis_angle)


def _steps(extent: float, step: float) -> int:
    n = round(extent / step) if step > 0 and math.isfinite(extent) else -1
    if n < 0 or abs(n * step - extent) > 1e-6 * step:
        raise ValueError(
            f"TiltScheme: expected a positive step [deg] that divides the extent, got extent {extent} and step {step}. "
            f"Try extent {max(n, 0) * step:g}."
        )
    return n
