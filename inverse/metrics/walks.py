"""What correlated samples of several walks tell, and how well: moments, their errors, and whether the walks have met.

Kept are sums over batches of steps. The means of batches that are long beside the walk's memory scatter like
independent numbers, which gives the error of the mean and of the variance (Flegal & Jones 2010,
doi:10.1214/09-AOS735) and, against the variance of the samples, how many independent ones they are worth. rhat compares
the means of half walks, begun at scattered places, with the spread within them (Gelman & Rubin 1992,
doi:10.1214/ss/1177011136). A memory longer than a batch leaves the errors too small; rhat shows it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_BATCHES = 8
"""Of steps, in each walk; two numbers are kept for each element of each."""


class WalkMoments(NamedTuple):
    """Sums over batches of steps of v - centre and its square, (batch of steps, walk item, 1, z, y, x)."""

    centre: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    length: int

    @classmethod
    def empty(cls, v: torch.Tensor, centre: torch.Tensor, steps: int) -> WalkMoments:
        batches = min(_BATCHES, steps)
        sums = v.new_zeros(2, batches, *v.shape)
        return cls(centre, sums[0], sums[1], steps // batches)

    def add(self, v: torch.Tensor, step: int) -> None:
        if step < self.length * len(self.first):  # what is left over of whole batches is not used
            self.first[step // self.length] += v - self.centre
            self.second[step // self.length] += (v - self.centre) ** 2

    def summary(self, walks: int) -> list[torch.Tensor]:
        """Mean, std, their errors, ess and rhat, (batch, 1, z, y, x) each."""
        first, second = (sums.unflatten(1, (walks, -1)) / self.length for sums in (self.first, self.second))
        offset = first.mean((0, 1))
        n = self.length * first.shape[0] * walks
        variance = (second.mean((0, 1)) - offset**2).clamp_min(0) * n / max(1, n - 1)
        squares = second - 2 * first * offset + offset**2  # mean of (v - mean)^2 of each batch
        count = first.shape[0] * walks
        mean_error, square_error = (part.flatten(0, 1).std(0) / count**0.5 for part in (first, squares))
        std = variance.sqrt()
        halves = [part.unflatten(0, (2, -1)).mean(1) if len(part) % 2 == 0 else part for part in (first, second)]
        means, within = halves[0].flatten(0, 1), (halves[1] - halves[0] ** 2).flatten(0, 1).mean(0)
        rhat = (1 + means.var(0) / within).sqrt()
        ess = (std / mean_error) ** 2
        centre = self.centre[: len(self.centre) // walks]
        return [centre + offset, std, mean_error, square_error / (2 * std), ess, rhat]
