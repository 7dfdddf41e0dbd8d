"""Images of a weak object each of whose voxels is seen at the defocus of its own height; pure functions.

A voxel at (x, y, z) of the specimen comes, after the turn by t about y, to u = x cos t + z sin t in the image and to
the height w = -x sin t + z cos t along the beam, where the lens acts with defocus + w. In u,

    w = z / cos t - u tan t                                                                              (1)

The contrast of all voxels together, with ctf(k; w) the contrast transfer function at defocus + w, is

    (I - 1)^(k) = 2 sigma integral dw ctf(k; w) F_uv[V(u, v, w)](k)                                      (2)

which for constant amplitude holds both side-bands of the curved Ewald sphere: ctf ~ sin(chi + pi lambda w k^2) are two
exponentials, and each takes the volume's transform where k_z = -+ lambda k^2 / 2 (DeRosier 2000,
doi:10.1016/S0304-3991(99)00120-5; Wolf et al. 2006, doi:10.1016/j.ultramic.2005.11.001). The phase pi lambda w k^2
turns by little over a specimen, so ctf(k; w) at any w follows from its values at few heights w_q by Chebyshev
interpolation,

    ctf(k; w) = sum_q L_q(w) ctf(k; w_q)

and the powers of z in L_q(w), through (1), from few weights l_j(z) at nodes z_j likewise. So

    lines_j = exact line integrals of l_j(z) V                              one projection for each node in z
    (I - 1)^ = 2 sigma sum_q ctf(k; w_q) F[sum_j L_q(z_j / cos t - u tan t) lines_j]                     (3)

Whatever the lens does (astigmatism, envelopes, odd aberrations) is in the ctf, and nothing is resampled. With the one
node z = 0 what is left is the tilted plane, the defocus gradient across the image; with w_q = 0 alone it is the usual
image of one defocus. As many nodes are taken as the largest phase needs for a given error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cryosim.core.constants import interaction_constant, wavelength
from cryosim.microscope.optics import Number, Optics, ctf, per_image
from inverse.physics.spectral import TiltGeometry, backproject, cosines, fitted, project, slopes

_MOST = 256  # nodes


class Imaging(NamedTuple):
    """How the volume of one item becomes its images.

    Attributes
    ----------
    angles : tensor (tilt,)
        [deg].
    geometry : TiltGeometry
        From the volume to the padded width of an image.
    rows, padded_rows : int
        Of the volume and of an image.
    shares : tensor (j, z)
        l_j(z).
    across : tensor (q, j, tilt, u)
        L_q at the heights of (1).
    transfers : tensor (q, tilt, ky, kx)
        From line integrals [V·voxel] to the contrast, on the half plane.
    item : int
        Its number in the batch.
    """

    angles: torch.Tensor
    geometry: TiltGeometry
    rows: int
    padded_rows: int
    shares: torch.Tensor
    across: torch.Tensor
    transfers: torch.Tensor
    item: int = 0


def see(volume: torch.Tensor, imaging: Imaging) -> torch.Tensor:
    """Contrast (tilt, y, u) on the padded image of a volume (z, y, x) [V]."""
    return contrast(
        [
            fitted(project(volume * share[:, None, None], imaging.angles, imaging.geometry), imaging.padded_rows, -2)
            for share in imaging.shares
        ],
        imaging,
    )


def see_adjoint(images: torch.Tensor, imaging: Imaging) -> torch.Tensor:
    """Adjoint of `see`: a volume (z, y, x) from padded images (tilt, y, u)."""
    volume = torch.zeros((), dtype=images.dtype)
    for lines, share in zip(contrast_adjoint(images, imaging), imaging.shares, strict=True):
        back = backproject(fitted(lines, imaging.rows, -2), imaging.angles, imaging.geometry)
        volume = volume + back * share[:, None, None]
    return volume


def contrast(lines: Sequence[torch.Tensor], imaging: Imaging) -> torch.Tensor:
    """Equation (3): contrast (tilt, y, u) of line integrals [V·voxel], such images for each node in z."""
    spectrum = torch.zeros((), dtype=lines[0].dtype)
    for across, transfer in zip(imaging.across, imaging.transfers, strict=True):
        field = sum((a[:, None] * line for a, line in zip(across, lines, strict=True)), torch.zeros_like(lines[0]))
        spectrum = spectrum + torch.fft.rfft2(field) * transfer
    return torch.fft.irfft2(spectrum, s=(imaging.padded_rows, imaging.geometry.image_width))


def contrast_adjoint(images: torch.Tensor, imaging: Imaging) -> list[torch.Tensor]:
    """Adjoint of `contrast`."""
    spectrum = torch.fft.rfft2(images)
    size = (imaging.padded_rows, imaging.geometry.image_width)
    fields = [torch.fft.irfft2(spectrum * transfer.conj(), s=size) for transfer in imaging.transfers]
    return [
        torch.stack([a[j][:, None] * field for a, field in zip(imaging.across, fields, strict=True)]).sum(0)
        for j in range(len(imaging.shares))
    ]


def node_counts(
    geometry: TiltGeometry,
    steepest: float,
    voltage: Number,
    voxel_size: float,
    *,
    plane: bool,
    depth: bool,
    accuracy: float,
) -> tuple[int, int]:
    """How many nodes in z and in w give all phase factors to an accuracy, at tilts up to `steepest` [deg].

    Parameters
    ----------
    geometry : TiltGeometry
    steepest : float
        [deg].
    voltage : float or tensor
        [kV].
    voxel_size : float
        [Å].
    plane : bool
        Whether the defocus follows the tilted plane, else it is the same all over an image.
    depth : bool
        Whether it also follows z.
    accuracy : float
        Largest error of a phase factor.

    Raises
    ------
    ValueError
        When the phases turn too often over the field.
    """
    wave = torch.as_tensor(wavelength(torch.as_tensor(voltage, dtype=torch.float64).detach()))
    fastest = math.pi * float(wave.max()) * 0.5 / voxel_size**2  # [rad/Å], in the corners of the band
    radians = math.radians(steepest)
    along_z = 0.5 * geometry.depth * voxel_size / math.cos(radians)  # [Å]
    across = math.hypot(math.tan(radians) * _half_width(geometry, radians), 4) * voxel_size
    return (
        _nodes_for(fastest * along_z * depth, accuracy),
        _nodes_for(fastest * (across + along_z * depth) * plane, accuracy),
    )


def heights(
    angles: torch.Tensor,
    geometry: TiltGeometry,
    voxel_size: float,
    counts: tuple[int, int],
    *,
    plane: bool,
    depth: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights l_j(z) (j, z), L_q (q, j, tilt, u) at the heights of (1), and the heights w_q (q, tilt) [Å].

    Parameters
    ----------
    angles : tensor (tilt,)
        [deg].
    geometry : TiltGeometry
    voxel_size : float
        [Å].
    counts : (int, int)
        Nodes in z and in w.
    plane, depth : bool
        As in `node_counts`.
    """
    n_z, n_w = counts
    tan, cos = slopes(angles), cosines(angles)
    half_depth = 0.5 * geometry.depth * voxel_size  # [Å]
    z = _chebyshev(n_z).to(angles.device) * half_depth * depth  # (j,)
    u = torch.arange(geometry.image_width, dtype=torch.float64, device=angles.device) - geometry.image_width // 2
    u = u * voxel_size * (cos if geometry.grid == "stretched" else torch.ones_like(cos))[:, None]  # (tilt, u) [Å]
    w = z[:, None, None] / cos[:, None] - u * tan[:, None] * plane  # (j, tilt, u) [Å]
    across_field = tan * _half_width(geometry, torch.deg2rad(angles.double()).abs()) * voxel_size * plane
    reach = (across_field**2 + (4 * voxel_size) ** 2).sqrt()  # not zero at any tilt, where there still is a slope
    reach = reach + half_depth / cos * depth  # (tilt,)
    samples = torch.arange(geometry.depth, dtype=torch.float64, device=angles.device) - geometry.depth // 2
    shares = _lagrange(samples * voxel_size / half_depth, n_z)
    across = _lagrange((w / reach[:, None]).clamp(-1, 1), n_w)
    return shares, across, _chebyshev(n_w).to(angles.device)[:, None] * reach


def _half_width(geometry: TiltGeometry, radians: Any) -> Any:
    """How far from the centre [voxel] the volume is seen in an image, or the image reaches."""
    ops: Any = torch if isinstance(radians, torch.Tensor) else math
    half = 0.5 * (geometry.width * ops.cos(radians) + geometry.depth * ops.sin(radians))
    if geometry.grid == "stretched":
        return 0.5 * geometry.width * ops.cos(radians)
    return half.clamp(max=0.5 * geometry.image_width) if ops is torch else min(half, 0.5 * geometry.image_width)


Fading = Callable[[torch.Tensor], torch.Tensor]
"""k^2 (tilt, ky, kx) [1/Å^2] -> amplitude of the same shape that damage has left in each tilt."""


def transfers(
    optics: Optics,
    angles: torch.Tensor,
    geometry: TiltGeometry,
    rows: int,
    voxel_size: float,
    *,
    focus: torch.Tensor,
    shifts: torch.Tensor | None,
    fading: Fading | None,
) -> torch.Tensor:
    """2 sigma ctf (q, tilt, ky, kx) of images (rows, width), in units of the contrast over V·voxel, on the half plane.

    Parameters
    ----------
    optics : Optics
        Fields () or (tilt,).
    angles : tensor (tilt,)
        [deg].
    geometry : TiltGeometry
    rows : int
        Of an image.
    voxel_size : float
        [Å].
    focus : tensor (q, tilt)
        What each is to have more of defocus [Å].
    shifts : tensor (tilt, 2) or None
        (x, y) by which images are displaced [Å].
    fading : callable or None
    """
    shape, half = (rows, geometry.image_width), geometry.image_width // 2 + 1
    across = voxel_size * (cosines(angles) if geometry.grid == "stretched" else torch.ones_like(cosines(angles)))
    sigma = interaction_constant(torch.as_tensor(optics.voltage, dtype=focus.dtype))
    gain = 2 * voxel_size * per_image(sigma, focus.dtype, focus.device)
    found = [ctf(optics.replace(defocus=optics.defocus + w), shape, (voxel_size, across))[..., :half] for w in focus]
    found = gain * torch.stack(found)
    kx = torch.fft.rfftfreq(shape[1], dtype=torch.float64, device=angles.device) / across[:, None, None]
    ky = (torch.fft.fftfreq(rows, dtype=torch.float64, device=angles.device) / voxel_size)[:, None]
    if fading is not None:
        found = found * fading(kx**2 + ky**2)
    if shifts is None:
        return found
    turns = -2 * torch.pi * (shifts[:, 0, None, None] * kx + shifts[:, 1, None, None] * ky)
    return found * torch.polar(torch.ones_like(turns), turns)


def _nodes_for(phase: float, accuracy: float) -> int:
    """How many Chebyshev nodes give exp(i phase s), |s| <= 1, to an accuracy."""
    if phase < accuracy:
        return 1
    s = torch.linspace(-1, 1, 257, dtype=torch.float64)
    for n in range(2, _MOST + 1):
        nodes = _chebyshev(n)
        wave = torch.polar(torch.ones_like(nodes), phase * nodes)
        seen = wave @ _lagrange(s, n).to(wave.dtype)
        if float((seen - torch.polar(torch.ones_like(s), phase * s)).abs().max()) <= accuracy:
            return n
    raise ValueError(
        f"heights: over the field the phase of the defocus turns by {phase:.0f} rad at the finest detail, more than "
        f"{_MOST} nodes can follow. Take larger voxels, a smaller field or less tilt."
    )


def _chebyshev(n: int) -> torch.Tensor:
    """Nodes (n,) between -1 and 1; the middle for n = 1."""
    return -torch.cos((torch.arange(n, dtype=torch.float64) + 0.5) * torch.pi / n)


def _lagrange(s: torch.Tensor, n: int) -> torch.Tensor:
    """Interpolating polynomials L_q (n, ...) of the nodes at s (...): 1/n sum_m (2 - [m = 0]) T_m(s_q) T_m(s)."""
    m = torch.arange(n, dtype=torch.float64, device=s.device)
    at_nodes = torch.cos(m[:, None] * torch.arccos(_chebyshev(n).to(s.device)))  # (m, q)
    powers = [torch.ones_like(s), s]
    while len(powers) < n:
        powers.append(2 * s * powers[-1] - powers[-2])
    weights = torch.where(m == 0, 1.0, 2.0)[:, None] * at_nodes / n
    return torch.einsum("mq,m...->q...", weights, torch.stack(powers[:n]))
