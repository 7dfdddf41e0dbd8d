"""Frames of one exposure put together: moved back, weighted by what damage left, summed."""

from __future__ import annotations

import torch

from cryosim.core.fourier import shifted, squared_frequencies
from cryosim.specimen.damage import Damage, fading
from cryosim.specimen.moment import Moment


def dose_weights(
    moments: list[Moment],
    shape: tuple[int, int],
    pixel_size: float | torch.Tensor,
    voltage: float | torch.Tensor = 300.0,
    damage: Damage | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What is left of the signal in each frame, which is also the best weight a frame can be given.

    Of frames with signals a_n s and noises of the same power, the sum of w_n times frame n has the signal-to-noise
    ratio (sum w_n a_n)^2 / sum w_n^2 times one frame's, which is largest for w_n = a_n (Cauchy and Schwarz).

    Parameters
    ----------
    moments : list of Moment
        Of the frames: those of one exposure, of several, or the exposures of a series.
    shape : (int, int)
        (y, x) of the images [px].
    pixel_size : float or tensor ()
        [Å].
    voltage : float or tensor ()
        [kV].
    damage : Damage, optional
        `Damage()` when left out: the critical exposure of Grant & Grigorieff 2015.
    dtype : torch.dtype

    Returns
    -------
    tensor (frame, y, x // 2 + 1)
        [1], of a half-plane spectrum.
    """
    damage = Damage() if damage is None else damage
    k2 = squared_frequencies(shape, pixel_size, half=True, dtype=torch.float64)
    return torch.stack([fading(damage, k2, moment, voltage) for moment in moments]).to(dtype)


def sum_frames(
    frames: torch.Tensor,
    pixel_size: float | torch.Tensor = 1.0,
    *,
    shifts: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """One image of many frames.

    Parameters
    ----------
    frames : tensor (..., frame, y, x)
        [e-/px]; whole numbers are taken as float32.
    pixel_size : float or tensor ()
        [Å], in which the shifts are counted.
    shifts : tensor (..., frame, 2), optional
        (x, y) by which the content of each frame is displaced [Å]; it is moved back.
    weights : tensor (frame, y, x // 2 + 1), optional
        As of `dose_weights`. Noise keeps its power: at each frequency the sum is divided by the root mean square of the
        weights (Grant & Grigorieff 2015, doi:10.7554/eLife.06980). At frequency zero it is the plain sum.

    Returns
    -------
    tensor (..., y, x)
        [e-/px].

    Raises
    ------
    ValueError
        When shifts or weights are not one a frame, or the weights are of another size.
    """
    frames = frames if frames.is_floating_point() else frames.float()
    n, (ny, nx) = frames.shape[-3], frames.shape[-2:]
    if shifts is not None and shifts.shape[-2:] != (n, 2):
        raise ValueError(f"sum_frames.shifts: expected (..., {n}, 2) [Å], got {tuple(shifts.shape)}.")
    if weights is not None and tuple(weights.shape) != (n, ny, nx // 2 + 1):
        raise ValueError(f"sum_frames.weights: expected ({n}, {ny}, {nx // 2 + 1}), got {tuple(weights.shape)}.")
    if weights is not None and not bool((weights >= 0).all()):
        raise ValueError("sum_frames.weights: expected numbers of 0 or more, got some that are not.")
    if shifts is not None:
        frames = shifted(frames, -shifts / pixel_size)
    if weights is None:
        return frames.sum(-3)
    largest = weights.amax(0)  # divided by first: where little is left its square is 0 in any precision
    weights = torch.where(largest > 0, weights / torch.where(largest > 0, largest, 1.0), 1.0)
    share = (weights / weights.square().mean(0).sqrt()).to(frames)
    share = torch.where(torch.arange(ny * (nx // 2 + 1), device=share.device).view(ny, -1) == 0, 1.0, share)
    spectrum = (torch.fft.rfft2(frames) * share).sum(-3)
    return torch.fft.irfft2(spectrum, s=frames.shape[-2:])
