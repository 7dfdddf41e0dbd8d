"""How likely tilt images are together, whatever the volume: as a function of their shifts, angles and thickness.

The specimen is stationary Gaussian noise of power S(|k|) in a slab of thickness T, wider than the images. In columns x
shared by all tilts, an image of tilt t has pixels cos t apart, and a layer at height z is displaced by z tan t: of the
layer, two tilts see places that are z (tan t_i - tan t_j) apart, through windows w that fade at the edges. So of the
frequency (kx, ky), at u_i = (kx / cos t_i, ky) of the image i, tilts have the covariance

    C_ij = sqrt(p_i p_j) D(kx, (tan t_i - tan t_j) T) + n_i delta_ij,      p_i = h_i^2 S(|u_i|) T / cos t_i,
    D(kx, a) = integral over -1/2 < q < 1/2 of r(q a) cos(2 pi kx q a),    r(d) = sum w(x) w(x + d) / sum w^2,    (1)

h_i what lens and dose leave of it, n_i the noise. Without edges, r = 1, D is sinc(kx a).
An image whose content is displaced by s has the amplitude y_i = exp(-2 pi i u_i . s_i) x_i, and with W = C^-1

    log L = - sum over k of x^H W x + log det C,
    d/ds_i = - sum 4 pi u_i Im(x_i^* (W x)_i),      I_ij = sum 8 pi^2 u_i u_j (W_ij C_ij - delta_ij).            (2)

With z = W x, and C' the slope of C to a parameter q (T, or a tan t_i),

    d/dq = sum z^H C' z - tr W C',      I_qr = sum tr W C'_q W C'_r                                              (3)

(Mardia & Marshall 1984, doi:10.1093/biomet/71.1.135). Nothing is reconstructed: a volume that is fitted to wrong shifts
would follow them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from numpy.polynomial.legendre import leggauss

from cryosim.core.fourier import cosine_edges, frequencies, resampling_matrix
from inverse.physics.turn import to_tilt_frame

_FADE = 0.12  # of each side
_RINGS = 48


class Geometry(NamedTuple):
    """What is looked for.

    Attributes
    ----------
    shifts : tensor (tilt, 2)
        By which the content of each image is displaced, (x, y) in the image as it was taken [px].
    angles : tensor (tilt,)
        [deg].
    axis_angle : float
        [deg].
    thickness : float
        [px].
    """

    shifts: torch.Tensor
    angles: torch.Tensor
    axis_angle: float
    thickness: float


class Field(NamedTuple):
    """Amplitudes of images in shared columns, at the frequencies (k,) of a half plane.

    Attributes
    ----------
    seen : tensor (k, tilt), complex128
        0 where a tilt has none.
    known : tensor (k, tilt)
        1, or 0 where a tilt has none.
    u : tensor (k, tilt, 2)
        Of the images, (x, y) [1/px].
    row, column : tensor (k,)
        Places of ky and kx in the spectrum of an image.
    rows : int
        Of an image.
    window : tensor (x,)
        w.
    share : float
        Independent frequencies, of all.
    """

    seen: torch.Tensor
    known: torch.Tensor
    u: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    rows: int
    window: torch.Tensor
    share: float


class Spectra(NamedTuple):
    """Power S T at rings of |u| (ring,), and of the noise (tilt,) [square of the images' unit]."""

    signal: torch.Tensor
    noise: torch.Tensor


def field_of(images: torch.Tensor, geometry: Geometry, finest: float, turn: float = 0.0) -> Field:
    """Amplitudes of images (tilt, y, x), moved back by the shifts, up to |u| = `finest` [1/px].

    Corners that a turn of the axis by `turn` [deg] would leave empty are left out: likelihoods of several axes can be
    compared where they have the same part of the images.
    """
    straight = to_tilt_frame(images, geometry.shifts.to(images.dtype), geometry.axis_angle)
    rows, width = straight.shape[1:]
    empty = 0.5 * math.tan(math.radians(turn))
    fade = [_window(n, empty * other, images) for n, other in ((rows, width), (width, rows))]
    cosines = torch.cos(torch.deg2rad(geometry.angles)).double()
    kx = torch.arange(width // 2 + 1, dtype=torch.float64) / width
    ky = frequencies(rows, dtype=torch.float64)
    mask = torch.ones(len(ky), len(kx), dtype=torch.bool)
    mask[:, 0] = ky > 0
    mask &= (kx.square() + ky[:, None].square()).sqrt() < finest
    mask &= (kx.square() + ky[:, None].square()).sqrt() > 1.5 / min(rows, width)
    seen = []
    for image, cosine in zip(straight, cosines, strict=True):
        matrix = resampling_matrix(width, width, float(cosine), dtype=images.dtype)
        field = (image - image.mean()) @ matrix.T * cosine.sqrt()
        field = field * fade[0][:, None] * fade[1]
        seen.append(torch.fft.rfft2(field, norm="ortho")[mask])
    rows_of, columns = mask.nonzero().T
    across = kx[columns][:, None] / cosines
    u = torch.stack([across, ky[rows_of][:, None].expand_as(across)], -1)
    known = (u.square().sum(-1).sqrt() < finest) & (across < 0.5 - 2 / width)
    share = math.prod(float(w.square().mean() ** 2 / w.pow(4).mean()) for w in fade)
    amplitudes = torch.stack(seen, 1).to(torch.complex128) * known
    return Field(amplitudes, known.double(), u, rows_of, columns, rows, fade[1].double(), share)


def _window(n: int, empty: float, like: torch.Tensor) -> torch.Tensor:
    """Cosine edges (n,) beyond some empty samples on each side, of mean square 1."""
    window = cosine_edges(n, _FADE * n, empty=empty, dtype=like.dtype)
    return window / window.square().mean().sqrt()


def rings_of(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ring below |u| (...), of `_RINGS` up to 0.71, and the way to the next one, 0 to 1."""
    at = (u.square().sum(-1).sqrt() * (_RINGS - 1) / 0.71).clamp(0, _RINGS - 1.001)
    return at.long(), at - at.floor()


def power_at(spectra: Spectra, u: torch.Tensor) -> torch.Tensor:
    """S T (...) at u (..., 2)."""
    ring, share = rings_of(u)
    return spectra.signal[ring] * (1 - share) + spectra.signal[ring + 1] * share


def spectra_of(field: Field, angles: torch.Tensor, transfer: torch.Tensor | None) -> Spectra:
    """From the images' own powers: of each the noise where it is least, beyond it what all have in common."""
    cosines, power = torch.cos(torch.deg2rad(angles)).double(), field.seen.abs().square()
    radius = field.u.square().sum(-1).sqrt()
    far = field.known * (radius > 0.8 * float((radius * field.known).max()))
    noise = (power * far).sum(0) / far.sum(0).clamp_min(1)
    gain = field.known / cosines if transfer is None else field.known * transfer.square() / cosines
    ring, share = rings_of(field.u)
    top, bottom = torch.zeros(2, _RINGS, dtype=torch.float64)
    for at, weight in ((ring, 1 - share), (ring + 1, share)):
        top.index_add_(0, at.flatten(), (weight * gain * (power - noise)).flatten())
        bottom.index_add_(0, at.flatten(), (weight * gain.square()).flatten())
    signal = top / bottom.clamp_min(1e-9)
    floor = 1e-3 * float(noise.mean())
    smooth = torch.nn.functional.avg_pool1d(signal[None], 3, 1, 1, count_include_pad=False)[0]
    return Spectra(torch.where(bottom > 0, torch.maximum(smooth, signal.clamp_min(0) * 0.5), 0).clamp_min(floor), noise)


class Model:
    """C and W of equation (1) at the frequencies of a field.

    Parameters
    ----------
    field : Field
    spectra : Spectra
    geometry : Geometry
    transfer : tensor (k, tilt), optional
        h_i; 1 when left out.
    alone : float
        Power that each tilt has for itself beyond its noise, over that of the signal: the more, the broader the maxima
        of the likelihood, for a start.
    """

    def __init__(
        self,
        field: Field,
        spectra: Spectra,
        geometry: Geometry,
        transfer: torch.Tensor | None = None,
        alone: float = 0.0,
    ) -> None:
        self.field, self.geometry = field, geometry
        angles = torch.deg2rad(geometry.angles.double())
        passed = field.known if transfer is None else field.known * transfer
        self.amplitude = passed * (power_at(spectra, field.u) / torch.cos(angles)).clamp_min(0).sqrt()
        self.noise, self.alone = spectra.noise, alone
        tangents = torch.tan(angles)
        apart = (tangents[:, None] - tangents) * geometry.thickness
        self.kernel, self.kernel_slope = _kernel(field, apart)
        self.apart = apart
        self.inverse = torch.empty(len(field.seen), len(angles), len(angles), dtype=torch.float64)
        self.log_det = 0.0
        for block in self._blocks():
            factor = torch.linalg.cholesky(self.covariance(block))
            self.log_det += 2 * float(factor.diagonal(dim1=1, dim2=2).log().sum())
            self.inverse[block] = torch.cholesky_inverse(factor)

    def _blocks(self) -> list[slice]:
        step = max(1, 2**18 // len(self.noise) ** 2)  # few enough to stay in the cache
        return [slice(i, i + step) for i in range(0, len(self.field.seen), step)]

    def signal(self, block: slice, kernel: torch.Tensor) -> torch.Tensor:
        """sqrt(p_i p_j) times a kernel (column, tilt, tilt): (k, tilt, tilt)."""
        a = self.amplitude[block]
        return a[:, :, None] * a[:, None] * kernel[self.field.column[block]]

    def covariance(self, block: slice) -> torch.Tensor:
        """C (k, tilt, tilt)."""
        own = self.noise + self.alone * self.amplitude[block].square()
        return self.signal(block, self.kernel) + torch.diag_embed(own)

    def log_likelihood(self, x: torch.Tensor) -> float:
        """Of amplitudes (k, tilt) [nat]."""
        return -self.field.share * (float((x.conj() * self.times(x)).real.sum()) + self.log_det)

    def apart_log_likelihood(self, x: torch.Tensor) -> float:
        """The same, were the tilts independent, each of its own C_ii [nat]."""
        total = 0.0
        for block in self._blocks():
            own = self.covariance(block).diagonal(dim1=1, dim2=2)
            total += float((x[block].abs().square() / own + own.log()).sum())
        return -self.field.share * total

    def agreement(self, x: torch.Tensor) -> torch.Tensor:
        """What each tilt has in common with the others (tilt,) [nat]: -2 Re sum x_i^* sum over j != i of W_ij x_j."""
        own = self.inverse.diagonal(dim1=1, dim2=2) * x
        return -2 * self.field.share * (x.conj() * (self.times(x) - own)).real.sum(0)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """W x (k, tilt)."""
        return torch.view_as_complex((self.inverse @ torch.view_as_real(x)).contiguous())

    def moved(self, shifts: torch.Tensor) -> torch.Tensor:
        """Amplitudes (k, tilt) of the images moved back by `shifts` (tilt, 2) [px]."""
        turns = (self.field.u * shifts).sum(-1)
        return self.field.seen * torch.polar(torch.ones_like(turns), 2 * math.pi * turns)

    def jumped(self, least: float = 5.0) -> torch.Tensor:
        """Moves (tilt, 2) [px] of single tilts, each to the best of all places given the others.

        Of a tilt alone log L is, but for a constant, -2 Re sum x_i^* sum over j != i of W_ij x_j: a correlation. A tilt
        is moved where that gains `least` [nat].
        """
        moves, x = torch.zeros(len(self.noise), 2, dtype=torch.float64), self.field.seen
        for i in self.geometry.angles.abs().argsort().tolist():
            gain = self._gains(i, self.times(x)[:, i] - self.inverse[:, i, i] * x[:, i])
            if float(gain.max() - gain[0, 0]) < least:
                continue
            moves[i] = self._places(i).flatten(0, 1)[gain.argmax()]
            x = torch.cat([x[:, :i], self.moved(moves)[:, i : i + 1], x[:, i + 1 :]], 1)
        return moves

    def grown(self, widest: float) -> torch.Tensor:
        """Moves (tilt, 2) [px] of all tilts, from the least tilted on: each to the best place given those before it.

        With C = L L^T in that order, log L = - sum over i of |(L^-1 x)_i|^2, of which row i is of tilt i and those
        before: those that still lie anywhere say nothing. Places are expected within `widest` [px].
        """
        order = self.geometry.angles.abs().argsort()
        rows = torch.empty_like(self.inverse)
        eye = torch.eye(len(order), dtype=torch.float64)
        for block in self._blocks():
            factor = torch.linalg.cholesky(self.covariance(block)[:, order][:, :, order])
            rows[block] = torch.linalg.solve_triangular(factor, eye, upper=False)
        moves, x = torch.zeros(len(order), 2, dtype=torch.float64), self.field.seen[:, order].clone()
        for m, i in enumerate(order.tolist()):
            if m == 0:
                continue
            before = (rows[:, m, :m].to(x.dtype) * x[:, :m]).sum(1) * rows[:, m, m]
            places = self._places(i)
            gain = self._gains(i, before) - 0.5 * (places / widest).square().sum(-1)
            moves[i] = places.flatten(0, 1)[gain.argmax()]
            turns = 2 * math.pi * (self.field.u[:, i] @ moves[i])
            x[:, m] = x[:, m] * torch.polar(torch.ones_like(turns), turns)
        return moves

    def _gains(self, tilt: int, others: torch.Tensor) -> torch.Tensor:
        """log L (y, x) [nat] at all places of a tilt, but for a constant, from W x of the others (k,)."""
        field, n, width = self.field, self.field.rows, len(self.field.window)
        plane = torch.zeros(n, width // 2 + 1, dtype=others.dtype)
        plane[field.row, field.column] = field.seen[:, tilt].conj() * others
        return -2 * field.share * (n * width / 2) * torch.fft.irfft2(plane, s=(n, width))

    def _places(self, tilt: int) -> torch.Tensor:
        """Moves (y, x, 2) [px] of which `_gains` tells: conj(exp(2 pi i u s)) runs the other way."""
        n, width = self.field.rows, len(self.field.window)
        y, x = ((-torch.arange(m) + m // 2) % m - m // 2 for m in (n, width))
        cosine = torch.cos(torch.deg2rad(self.geometry.angles[tilt].double()))
        return torch.stack([(x * cosine).expand(n, width), y[:, None].double().expand(n, width)], -1)

    def shift_score(self, x: torch.Tensor) -> torch.Tensor:
        """Equation (2): slope (2 tilt,), of all x and then of all y."""
        imaginary = (x.conj() * self.times(x)).imag
        return -4 * math.pi * self.field.share * (self.field.u * imaginary[..., None]).sum(0).T.flatten()

    def shift_information(self) -> torch.Tensor:
        """Equation (2): I (2 tilt, 2 tilt)."""
        n = len(self.noise)
        total = torch.zeros(2, n, 2, n, dtype=torch.float64)
        for block in self._blocks():
            both = self.inverse[block] * self.covariance(block) - torch.eye(n, dtype=torch.float64)
            u = self.field.u[block] * self.field.known[block, :, None]
            total += torch.einsum("kia,kij,kjb->aibj", u, both, u)
        return 8 * math.pi**2 * self.field.share * total.reshape(2 * n, 2 * n)

    def thickness_score(self, x: torch.Tensor) -> tuple[float, float]:
        """Equation (3) of log T: slope and information."""
        slope = information = 0.0
        z = self.times(x)
        for block in self._blocks():
            change = self.signal(block, self.apart * self.kernel_slope)
            weighted = self.inverse[block] @ change
            slope += float(torch.einsum("ki,kij,kj->", z[block].conj(), change.to(z.dtype), z[block]).real)
            slope -= float(weighted.diagonal(dim1=1, dim2=2).sum())
            information += float((weighted * weighted.mT).sum())
        return self.field.share * slope, self.field.share * information

    def angle_score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Equation (3) of the angles: slope (tilt,) [1/deg] and information (tilt, tilt) [1/deg^2]."""
        n = len(self.noise)
        slope, information = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        z = self.times(x)
        for block in self._blocks():
            g = self.signal(block, self.geometry.thickness * self.kernel_slope)  # row i: the slope of C_ij to tan t_i
            w = self.inverse[block]
            gw = g @ w
            slope += 2 * ((z[block].conj() * torch.einsum("kij,kj->ki", g.to(z.dtype), z[block])).real).sum(0)
            slope -= 2 * gw.diagonal(dim1=1, dim2=2).sum(0)
            information += 2 * (gw * gw.mT + w * (gw @ g.mT)).sum(0)
        per_degree = math.pi / 180 / torch.cos(torch.deg2rad(self.geometry.angles.double())).square()
        share = self.field.share
        return share * slope * per_degree, share * information * per_degree[:, None] * per_degree


def _kernel(field: Field, apart: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """D of equation (1), and its slope to a, (column, tilt, tilt), at a = `apart` (tilt, tilt) [px]."""
    n, top = len(field.window), int(field.column.max()) + 1
    spectrum = torch.fft.rfft(torch.nn.functional.pad(field.window, (0, n)))
    overlap = torch.fft.irfft(spectrum.abs().square(), n=2 * n)[:n] / field.window.square().sum()
    overlap = torch.cat([overlap, overlap.new_zeros(2)])
    widest = float(apart.abs().max())
    nodes, weights = (torch.as_tensor(v) for v in leggauss(24 + 2 * math.ceil(0.85 * widest * (top - 1) / n)))
    nodes, weights = nodes[nodes > 0] / 2, weights[nodes > 0]  # even in q: over the half, twice
    distances, place = torch.unique((apart.abs() * 1e6).round() / 1e6, return_inverse=True)
    d = nodes * distances[:, None]  # (distance, node)
    at = d.clamp(0, n)
    below = at.long()
    step = overlap[below + 1] - overlap[below]
    r = overlap[below] + (at - below) * step
    value, slope = torch.empty(2, top, len(distances), dtype=torch.float64)
    for column in range(top):  # one by one: of a thick specimen there are millions of (distance, node)
        k = 2 * math.pi * column / n
        real, imaginary = torch.cos(k * d), torch.sin(k * d)
        value[column] = (r * real) @ weights
        slope[column] = (step * real - k * r * imaginary) @ (nodes * weights)
    return value[:, place], slope[:, place] * torch.sign(apart)
