"""Fourier shell correlation, whole or of the measured region only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cryosim.core.fourier import frequencies, half_frequencies
from cryosim.core.record import Record, item
from cryosim.core.volume import Volume


class ShellCorrelation(Record):
    """Correlation of two volumes, shell by shell in Fourier space.

    Attributes
    ----------
    frequency : tensor (shell,)
        Middle of each shell [1/Å].
    correlation : tensor (shell,)
        [1]; NaN in a shell without samples.
    samples : tensor (shell,)
        Fourier samples in each shell, of the whole space; independent noise has a variance of one over them.
    reliable : tensor (shell,)
        False where the shell lies below 1 / thickness: there a slab has almost nothing but its own outline.
    """

    frequency: torch.Tensor = item(0)
    correlation: torch.Tensor = item(0)
    samples: torch.Tensor = item(0)
    reliable: torch.Tensor = item(0)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Frequency and correlation, so that `k, c = fsc(a, b, voxel_size)` can be drawn at once."""
        return iter((self.frequency, self.correlation))

    def resolution(self, threshold: float = 0.143) -> float:
        """Resolution [Å] where the reliable correlation first falls below `threshold`, linear between shells.

        The finest resolution when it never does; infinity when it never reaches the threshold.
        """
        keep = self.reliable & torch.isfinite(self.correlation)
        k, c = self.frequency[keep].tolist(), self.correlation[keep].tolist()
        for i, value in enumerate(c):
            if value < threshold:
                if i == 0:
                    return float("inf")
                share = (c[i - 1] - threshold) / (c[i - 1] - value)
                return 1 / (k[i - 1] + share * (k[i] - k[i - 1]))
        return 1 / k[-1] if k else float("inf")


def fsc(
    a: torch.Tensor | Volume,
    b: torch.Tensor | Volume,
    voxel_size: float,
    *,
    region: torch.Tensor | None = None,
    thickness: float | None = None,
) -> ShellCorrelation:
    """Fourier shell correlation of two volumes.

    Parameters
    ----------
    a, b : tensor (z, y, x) or Volume
        Any common unit; they need not be cubes.
    voxel_size : float
        [Å].
    region : tensor (z, y, x // 2 + 1), optional
        Weights 0 to 1 of the Fourier samples that count, as from `measured_region`.
    thickness : float, optional
        Of the slab [Å]: shells below 1 / thickness are marked as not reliable.

    Returns
    -------
    ShellCorrelation
        Shells as wide as one sample of the longest axis, up to the Nyquist frequency.

    Raises
    ------
    ValueError
        When the volumes differ in shape or hold values that are not finite.

    Notes
    -----
    Harauz & van Heel 1986, Optik 73, 146.
    """
    a, b = two_volumes("fsc", a, b)
    fa, fb = (torch.fft.rfftn(v.double()) for v in (a, b))
    k = squared_frequencies_3d(a.shape, voxel_size, a.device).sqrt()
    weight = k.new_full(k.shape, 2.0)  # a half space: all columns but the first (and an even last) stand for two
    weight[..., 0] = 1.0
    if a.shape[-1] % 2 == 0:
        weight[..., -1] = 1.0
    if region is not None:
        weight = weight * region.to(weight)
    width = 1 / (max(a.shape) * voxel_size)
    n_shells = int(max(a.shape) // 2)
    shell = (k / width).round().long()
    inside = shell <= n_shells
    shell, weight = shell[inside], weight[inside]

    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(n_shells + 1, dtype=torch.float64, device=k.device).index_add(0, shell, values)

    fa, fb = fa[inside], fb[inside]
    cross = total(weight * (fa * fb.conj()).real)
    power = total(weight * fa.abs() ** 2) * total(weight * fb.abs() ** 2)
    samples = total(weight)
    correlation = torch.where(power > 0, cross / power.clamp_min(1e-300).sqrt(), torch.nan)
    middle = torch.arange(n_shells + 1, dtype=torch.float64, device=k.device) * width
    reliable = middle >= (1 / thickness if thickness else 0.5 * width)
    return ShellCorrelation(middle, correlation, samples, reliable)


def two_volumes(name: str, a: torch.Tensor | Volume, b: torch.Tensor | Volume) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (z, y, x) of both; ValueError, in the name of a function, unless they are finite and of one shape."""
    a, b = (torch.as_tensor(v.values if isinstance(v, Volume) else v) for v in (a, b))
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(
            f"{name}: expected two volumes (z, y, x) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"{name}: a volume holds values that are not finite.")
    return a, b


def measured_region(shape: tuple[int, int, int], angles: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """Fourier samples (z, y, x // 2 + 1), True where kz lies between the lowest and the highest tilt `angles` [deg].

    With cubic voxels. The slice of a tilt by t lies at kz = kx tan t; what no tilt reaches is the missing wedge.
    """
    angles = torch.as_tensor(angles)
    kz = frequencies(shape[0], dtype=torch.float64)[:, None, None]
    kx = half_frequencies(shape[2], dtype=torch.float64)[None, None, :]
    low, high = (torch.tan(torch.deg2rad(t.double())) for t in (angles.min(), angles.max()))
    within = (kz >= kx * low - 1e-12) & (kz <= kx * high + 1e-12)
    return within.expand(*shape[:2], shape[2] // 2 + 1)


def squared_frequencies_3d(shape: tuple[int, ...], voxel_size: float, device: torch.device) -> torch.Tensor:
    """k^2 (z, y, x // 2 + 1) [1/Å^2] in the order of `torch.fft.rfftn`."""
    kz, ky = (frequencies(n, voxel_size, dtype=torch.float64, device=device) for n in shape[:2])
    kx = half_frequencies(shape[2], voxel_size, dtype=torch.float64, device=device)
    return kz[:, None, None] ** 2 + ky[:, None] ** 2 + kx**2
