"""Filtered back-projection of any number of rows in the memory of a few: no array grows with depth times frequencies.

As in `inverse.physics.closed_form`, the volume is F^H B^H action(S images), row by row of y. The products go like this:

- S, the frequencies k / cos t of an image, is a chirp transform: with m j = (m^2 + j^2 - (m - j)^2) / 2 a sum over
  exp(-2 pi i a m j) is a convolution with exp(i pi a n^2), two FFTs (Bluestein 1970, doi:10.1109/TAU.1970.1162132).
- B^H, the sum over tilts of exp(2 pi i z k tan t), goes by blocks of layers z = c + b about their middle c. The layers
  c + b and c - b share the sums with cos(2 pi b k tan t) and sin(2 pi b k tan t), real matrices that are the same in
  every block; what differs from block to block is one phase exp(2 pi i c k tan t) for each k and tilt.
- F^H is a real FFT of each line.

Phases are reduced to one turn in float64 before they are rounded to the precision of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from cryosim.core.fourier import fast_length
from inverse.physics.closed_form import edge_weights
from inverse.physics.spectral import TiltGeometry, cosines, frequencies, slopes

LAYERS = 64
"""Of a block. More of them share a phase, fewer stay in cache."""

_FREQUENCIES_AT_ONCE = (
    256  # whose products stay in cache until they are sorted into lines: measured, 64 to 512 are alike
)

Block = tuple[slice, torch.Tensor]


class Chirps(NamedTuple):
    """What the chirp transform of each tilt's lines is made of, complex.

    Attributes
    ----------
    before : tensor (tilt, u)
    kernel : tensor (tilt, n)
        Transform of the chirp that the lines are convolved with.
    after : tensor (tilt, k)
    """

    before: torch.Tensor
    kernel: torch.Tensor
    after: torch.Tensor


class RowBackprojection(NamedTuple):
    """Everything about F^H B^H action(S .) that does not depend on the rows.

    Attributes
    ----------
    geometry : TiltGeometry
    action : callable
        On frequencies (k, tilt, row), complex128, k >= 0.
    chirps : Chirps
    weights : tensor (k, tilt)
        Of B^H and F^H, complex128: the origin of x is in their phase.
    turns : tensor (k, tilt)
        k tan t [1/voxel], float64.
    cosine, sine : tensor (k, layer, tilt)
        Of 2 pi b k tan t at b = 1/2, 3/2, ... [voxel].
    """

    geometry: TiltGeometry
    action: Callable[[torch.Tensor], torch.Tensor]
    chirps: Chirps
    weights: torch.Tensor
    turns: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor


def row_backprojection(
    angles: torch.Tensor,
    geometry: TiltGeometry,
    action: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    *,
    layers: int = LAYERS,
) -> RowBackprojection:
    """Prepare the back-projection of images of `dtype` taken at `angles` (tilt,) [deg], by blocks of `layers`."""
    k = frequencies(geometry, angles.device)[:, None]  # (k, 1) [1/voxel]
    turns = k * slopes(angles)
    half = (min(layers, geometry.depth) + 1) // 2
    b = torch.arange(half, dtype=torch.float64, device=angles.device) + 0.5
    near = _wave(turns[:, None, :] * b[:, None], dtype)  # (k, layer, tilt)
    stretch = cosines(angles) if geometry.grid == "camera" else torch.ones_like(cosines(angles))
    chirps = _chirps(1 / (geometry.period * stretch), geometry, dtype)
    weights = edge_weights(angles, geometry) / geometry.period**0.5 * _wave(-k * (geometry.width // 2), torch.float64)
    return RowBackprojection(geometry, action, chirps, weights, turns, near.real.contiguous(), near.imag.contiguous())


def backproject_rows(plan: RowBackprojection, images: torch.Tensor) -> Iterator[Block]:
    """Blocks of layers of the volume that belongs to images (tilt, row, u), from the first layer to the last.

    Yields
    ------
    layers : slice
        Of the volume's z.
    values : tensor (layer, row, x)
    """
    depth, period, width = plan.geometry.depth, plan.geometry.period, plan.geometry.width
    lines = plan.action(_image_frequencies(plan.chirps, images)).mul_(plan.weights[:, :, None])
    lines = lines.to(plan.chirps.before.dtype)  # (k, tilt, row)
    half = plan.cosine.shape[1]
    spectra = lines.new_zeros(2 * half, images.shape[1], period // 2 + 1)  # an even period's unpaired one stays 0
    for start in range(0, depth, 2 * half):
        n = min(2 * half, depth - start)
        pairs = (n + 1) // 2
        _sums_over_tilts(plan, lines, start + pairs - 0.5 - depth // 2, spectra[: 2 * pairs])
        values = images.new_empty(n, images.shape[1], width)
        for layer in range(n):  # one at a time stays in cache
            values[layer] = torch.fft.irfft(spectra[layer], n=period, norm="forward")[:, :width]
        yield slice(start, start + n), values


def _sums_over_tilts(plan: RowBackprojection, lines: torch.Tensor, middle: float, out: torch.Tensor) -> None:
    """sum_t exp(2 pi i z k tan t) lines (k, tilt, row) at the layers z about `middle`, into `out` (layer, row, k)."""
    half, (n_k, _, rows) = len(out) // 2, lines.shape
    phases = _wave(plan.turns * middle, plan.cosine.dtype)[:, :, None]  # (k, tilt, 1)
    for first in range(0, n_k, _FREQUENCIES_AT_ONCE):
        k = slice(first, min(first + _FREQUENCIES_AT_ONCE, n_k))
        turned = torch.view_as_real(lines[k] * phases[k]).flatten(2)  # (k, tilt, 2 row)
        even, odd = (
            torch.view_as_complex(torch.bmm(m[k, :half], turned).unflatten(2, (rows, 2)))  # (k, layer, row)
            for m in (plan.cosine, plan.sine)
        )
        out[half:, :, k] = torch.add(even, odd, alpha=1j).permute(1, 2, 0)
        out[:half, :, k] = torch.sub(even, odd, alpha=1j).flip(1).permute(1, 2, 0)


def _chirps(steps: torch.Tensor, geometry: TiltGeometry, dtype: torch.dtype) -> Chirps:
    """Of the unitary sums over u of sqrt(a) exp(-2 pi i a m u), a each of `steps` (tilt,), m from 0."""
    width, n_k = geometry.image_width, geometry.n_frequencies
    length = fast_length(width + n_k - 1)
    half = steps[:, None] / 2
    m = torch.arange(n_k, dtype=torch.float64, device=steps.device)
    u = torch.arange(width, dtype=torch.float64, device=steps.device) - width // 2
    apart = torch.arange(length, dtype=torch.float64, device=steps.device)  # m - u, less what the first u is from 0
    apart = torch.where(apart < n_k + width // 2, apart, apart - length)
    kernel = torch.fft.fft(_wave(half * apart**2, torch.float64))
    before = _wave(-half * u**2, dtype)
    after = steps[:, None].sqrt() * _wave(-half * m**2, torch.float64)
    return Chirps(before, kernel.to(before.dtype), after.to(before.dtype))


def _image_frequencies(chirps: Chirps, images: torch.Tensor) -> torch.Tensor:
    """Frequencies (k, tilt, row), complex128, of images (tilt, row, u)."""
    n_tilts, n_rows, width = images.shape
    n_k, first = chirps.after.shape[1], width // 2
    seen = images.new_empty(n_k, n_tilts, n_rows, dtype=torch.complex128)
    for tilt in range(n_tilts):  # one at a time stays in cache
        spectrum = torch.fft.fft(images[tilt] * chirps.before[tilt], n=chirps.kernel.shape[1])
        found = torch.fft.ifft(spectrum * chirps.kernel[tilt])[:, first : first + n_k]
        seen[:, tilt] = (found * chirps.after[tilt]).T
    return seen


def _wave(turns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp(2 pi i turns) of `turns` (float64), in the complex type of `dtype`."""
    phase = ((turns - turns.round()) * (2 * torch.pi)).to(dtype)
    return torch.polar(torch.ones_like(phase), phase)
