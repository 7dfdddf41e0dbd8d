"""Whether posterior samples spread as they should: coverage of intervals, rank histograms, and spread against error.

Samples are calibrated when the truth could be one more of them. Of n samples with the mean m and the standard deviation
s (over n - 1), and of a truth t drawn by the same Gaussian law,

    (t - m) / (s sqrt(1 + 1 / n))                                                                        (1)

follows Student's law of n - 1 degrees of freedom, so that the interval m +- q s sqrt(1 + 1 / n), q its quantile, holds
t as often as its level says, for any n from 2 on. Of a law that is not Gaussian that is an approximation; the rank of
the truth among the samples is not: it takes each of its n + 1 values equally often, whatever the law. A histogram of
ranks shaped like a bowl tells of samples that spread too little, a hill of too much, a slope of a bias (Hamill 2001,
doi:10.1175/1520-0493(2001)129<0550:IORHFV>2.0.CO;2). Intervals as sharp as calibration allows are the aim (Gneiting &
Raftery 2007, doi:10.1198/016214506000001437).

Coverage is a mean over voxels or Fourier samples of one volume: neighbours err together, so it scatters by more than
the root of their number would have it.
"""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit

from cryosim.core.record import Record, item, static
from inverse.metrics.fsc import squared_frequencies_3d


class Coverage(Record):
    """How a truth lies among n samples; shares and ratios, all [1].

    Attributes
    ----------
    level : float
        What the coverages should be.
    voxels : tensor ()
        Share of the voxels whose interval holds the truth.
    inside, outside : tensor ()
        Share of the real and imaginary parts of Fourier samples, in the region that was given and out of it; NaN
        without one, or where it holds none.
    frequency : tensor (shell,)
        Middle of each shell [cycles/voxel].
    by_frequency : tensor (shell,)
        Share of the real and imaginary parts in each shell; NaN in a shell without samples.
    spread_skill : tensor ()
        Root mean square error of the mean over that which the samples' spread foretells, s sqrt(1 + 1 / n): 1 when
        calibrated, above when they spread too little. Of voxels, so of the frequencies that have the power.
    spread_skill_by_frequency : tensor (shell,)
    ranks : tensor (sample + 1,)
        Share of the voxels of which the truth exceeds so many samples.
    """

    voxels: torch.Tensor = item(0)
    inside: torch.Tensor = item(0)
    outside: torch.Tensor = item(0)
    frequency: torch.Tensor
    by_frequency: torch.Tensor
    spread_skill: torch.Tensor = item(0)
    spread_skill_by_frequency: torch.Tensor
    ranks: torch.Tensor
    level: float = static(0.9)


def coverage(
    samples: torch.Tensor, truth: torch.Tensor, level: float = 0.9, region: torch.Tensor | None = None
) -> Coverage:
    """Share of voxels and of Fourier samples whose central interval, made from samples, holds the truth.

    Parameters
    ----------
    samples : tensor (sample, z, y, x)
        Two or more, of the posterior.
    truth : tensor (z, y, x)
        In the same unit.
    level : float
        Of the interval [1], between 0 and 1.
    region : tensor (z, y, x // 2 + 1), optional
        True where Fourier samples belong to it, as `measured_region`.

    Returns
    -------
    Coverage

    Raises
    ------
    ValueError
        For fewer than two samples, shapes that do not fit, values that are not finite, or a level out of range.
    """
    _expect(samples, truth, level)
    n, shape = len(samples), truth.shape
    truth = truth.double()
    sums = [truth.new_zeros(shape) for _ in range(2)]
    parts = [truth.new_zeros(2, *shape[:2], shape[2] // 2 + 1) for _ in range(2)]
    rank = torch.zeros(shape, dtype=torch.long, device=truth.device)
    for sample in samples:  # about the truth, where little is lost in the squares
        error = sample.double() - truth
        rank += error < 0
        waves = torch.view_as_real(torch.fft.rfftn(error)).movedim(-1, 0)  # (real or imaginary, z, y, x // 2 + 1)
        for total, of_waves, power in zip(sums, parts, (1, 2), strict=True):
            total += error**power
            of_waves += waves**power
    error, spread = _moments(sums, n)
    wave_error, wave_spread = _moments(parts, n)
    held, wave_held = (_holds(e, s, level, n) for e, s in ((error, spread), (wave_error, wave_spread)))

    weight = _independent(shape, truth.device)
    k = squared_frequencies_3d(tuple(shape), 1.0, truth.device).sqrt()
    shell = (k * max(shape)).round().long().expand(weight.shape)
    n_shells = max(shape) // 2 + 1

    def by_shell(values: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(int(shell.max()) + 1, dtype=torch.float64, device=k.device)
        return total.index_add(0, shell.flatten(), (values * weight).flatten())[:n_shells]

    count = by_shell(torch.ones_like(weight))
    ratio = by_shell(wave_error**2) / by_shell(wave_spread**2 * (1 + 1 / n))
    chosen = torch.zeros_like(weight) if region is None else weight * _region(region, weight).to(weight)
    rest = torch.zeros_like(weight) if region is None else weight - chosen
    return Coverage(
        voxels=held.mean(),
        inside=(wave_held * chosen).sum() / chosen.sum(),  # 0 / 0 is NaN
        outside=(wave_held * rest).sum() / rest.sum(),
        frequency=torch.arange(n_shells, dtype=torch.float64, device=k.device) / max(shape),
        by_frequency=by_shell(wave_held) / count,
        spread_skill=spread_skill(samples, truth),
        spread_skill_by_frequency=ratio.sqrt(),
        ranks=torch.bincount(rank.flatten(), minlength=n + 1) / rank.numel(),
        level=float(level),
    )


def interval_coverage(
    mean: torch.Tensor, std: torch.Tensor, truth: torch.Tensor, level: float = 0.9, samples: int | None = None
) -> torch.Tensor:
    """Share () of the elements of `truth` in the central intervals about `mean`, of any one shape.

    Gaussian intervals of a mean and standard deviation that are known, as those of `posterior_std`; with `samples`,
    those of Student's law for a mean and standard deviation of so many samples.

    Raises
    ------
    ValueError
        For shapes that do not fit, values that are not finite, a negative std, or a level out of range.
    """
    if not mean.shape == truth.shape == std.shape:
        raise ValueError(
            f"interval_coverage: expected a mean, a std and a truth of one shape, got {tuple(mean.shape)}, "
            f"{tuple(std.shape)} and {tuple(truth.shape)}."
        )
    if samples is not None and samples < 2:
        raise ValueError(f"interval_coverage: expected two samples or more, got {samples}.")
    if not (torch.isfinite(mean).all() and torch.isfinite(truth).all() and (std >= 0).all()):
        raise ValueError("interval_coverage: expected finite numbers, and no negative std.")
    _expect_level(level)
    return _holds(mean.double() - truth.double(), std.double(), level, samples).mean()


def spread_skill(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Root mean square error of the samples' mean over what their spread foretells, () [1]; see `Coverage`.

    Raises
    ------
    ValueError
        As `coverage`.
    """
    _expect(samples, truth, 0.5)
    n = len(samples)
    error = samples.double().mean(0) - truth.double()
    variance = samples.double().var(0) * (1 + 1 / n)
    return (error.square().mean() / variance.mean()).sqrt()


def _moments(sums: list[torch.Tensor], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of n numbers from the sums of themselves and of their squares."""
    mean = sums[0] / n
    return mean, ((sums[1] - n * mean**2) / (n - 1)).clamp_min(0).sqrt()


def _holds(error: torch.Tensor, spread: torch.Tensor, level: float, n: int | None) -> torch.Tensor:
    """1 where the interval of equation (1) holds the truth, float64; Gaussian without n."""
    if n is None:
        quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
        return (error.abs() <= quantile * spread).double()
    quantile = float(stdtrit(n - 1, (1 + level) / 2))
    return (error.abs() <= quantile * math.sqrt(1 + 1 / n) * spread).double()


def _independent(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """How many numbers each real and imaginary part (2, z, y, x // 2 + 1) stands for, of those a volume consists of.

    Every sample of the half space has a conjugate elsewhere, but on its edges the conjugate is there too; and where a
    sample is its own, it has no imaginary part.
    """
    nz, ny, nx = shape
    columns = torch.full((nx // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    columns[0] = 1
    if nx % 2 == 0:
        columns[-1] = 1
    own = [(-torch.arange(n, device=device)) % n == torch.arange(n, device=device) for n in (nz, ny)]
    itself = own[0][:, None, None] & own[1][:, None] & (columns == 1)
    weight = columns.expand(2, nz, ny, -1).clone()
    weight[0] = torch.where(itself, 2 * weight[0], weight[0])
    weight[1] = torch.where(itself, 0.0, weight[1])
    return weight / 2


def _region(region: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if region.shape != weight.shape[1:]:
        raise ValueError(f"region: expected {tuple(weight.shape[1:])}, got {tuple(region.shape)}.")
    return region.to(weight.device)


def _expect(samples: torch.Tensor, truth: torch.Tensor, level: float) -> None:
    if truth.ndim != 3 or samples.ndim != 4 or samples.shape[1:] != truth.shape or len(samples) < 2:
        raise ValueError(
            f"coverage: expected two samples or more (sample, z, y, x) and a truth (z, y, x), got "
            f"{tuple(samples.shape)} and {tuple(truth.shape)}."
        )
    if not (torch.isfinite(samples).all() and torch.isfinite(truth).all()):
        raise ValueError("coverage: a volume holds values that are not finite.")
    _expect_level(level)


def _expect_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"coverage: expected a level between 0 and 1, got {level}.")
