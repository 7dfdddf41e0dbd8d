"""`DeformedProjection`: the specimen moves and bends from tilt to tilt.

In tilt t the matter of the voxel at r is found at

    r' = R_x(chi) [r + d_t(r)],     d_t(r) = sum_abc beta(z - z_a) beta(y - y_b) beta(x - x_c) D_t,abc             (1)

a cubic B-spline over control points that span the volume (Unser 1999, doi:10.1109/79.799930), and in the image at

    (u, v) = m_t Z(phi_t) (x' cos t + z' sin t, y') + s_t                                                (2)

with a turn chi of the specimen about x, a magnification m_t, a turn phi_t in the plane of the image, and a shift s_t.
Matter is carried along, so none is
lost where the specimen is stretched. The line integrals of voxels so displaced are a non-uniform Fourier transform:
every voxel adds a narrow bell around its place in the image, and the image's transform is divided by that of the bell
(`cryosim.specimen.bells`; Barnett, Magland & af Klinteberg 2019, doi:10.1137/18M120885X), on a grid one and a half
times as fine. The adjoint reads the images at the same places with the same bells, so it is exact, and everything is
differentiable in D, chi, m, phi, s and the angles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from cryosim.core.fourier import fast_length
from cryosim.microscope.optics import Optics
from cryosim.specimen.bells import bell_transform, spread
from inverse.physics.contrast import ContrastProjection
from inverse.physics.heights import Imaging, contrast, contrast_adjoint
from inverse.physics.spectral import Grid

_WIDTH = 7  # samples of a bell: 8e-6


class DeformedProjection(ContrastProjection):
    """`ContrastProjection` of a specimen that is displaced, turned, magnified and bent in each tilt.

    Parameters
    ----------
    angles, volume_shape, voxel_size, optics, image_shape, grid
        As in `ContrastProjection`; on the camera grid only.
    deformation : tensor (tilt, 3, cz, cy, cx) or (batch, ...), optional
        D, displacements (x, y, z) [Å] at control points from end to end of the volume, at least 2 along each axis; the
        buffer `deformation`. None where left out.
    axis_angles : tensor (tilt,) or (batch, tilt), optional
        phi, from x towards y [deg]; the buffer `axis_angles`.
    magnifications : tensor (tilt,) or (batch, tilt), optional
        m; the buffer `magnifications`.
    x_tilt : float or tensor () or (batch,)
        chi, from y towards z [deg]; the buffer `x_tilt` (1 or batch,).
    **options
        Further arguments of `ContrastProjection`, such as `shifts`.

    Raises
    ------
    ValueError
        For parameters of another shape or the stretched grid.

    Notes
    -----
    The defocus follows the heights of the specimen as if it were not deformed; 10 Å of displacement are 10 Å of focus.
    Takes about half a microsecond for each voxel in each tilt.
    """

    parameter_names: ClassVar[tuple[str, ...]] = (
        *ContrastProjection.parameter_names,
        "deformation",
        "axis_angles",
        "magnifications",
        "x_tilt",
    )

    deformation: torch.Tensor
    axis_angles: torch.Tensor
    magnifications: torch.Tensor
    x_tilt: torch.Tensor

    def __init__(
        self,
        angles: Sequence[float] | torch.Tensor,
        volume_shape: tuple[int, int, int],
        voxel_size: float,
        optics: Optics,
        image_shape: tuple[int, int] | None = None,
        grid: Grid = "camera",
        *,
        deformation: torch.Tensor | None = None,
        axis_angles: torch.Tensor | None = None,
        magnifications: torch.Tensor | None = None,
        x_tilt: float | torch.Tensor = 0.0,
        **options,
    ) -> None:
        if grid != "camera":
            raise ValueError(f"DeformedProjection: expected the camera grid, got {grid!r}.")
        super().__init__(angles, volume_shape, voxel_size, optics, image_shape, grid, **options)
        tilts, like = self.angles.shape[-1], self.angles
        given = like.new_zeros(tilts, 3, 2, 2, 2) if deformation is None else deformation.to(like)
        if given.ndim not in (5, 6) or given.shape[-5:-3] != (tilts, 3) or min(given.shape[-3:]) < 2:
            raise ValueError(
                f"deformation: expected ([batch,] {tilts}, 3, z, y, x) [Å], two control points or more along each "
                f"axis, got {tuple(given.shape)}."
            )
        self.register_buffer("deformation", given if given.ndim == 6 else given[None])
        for name, value, usual in (("axis_angles", axis_angles, 0.0), ("magnifications", magnifications, 1.0)):
            value = like.new_full((tilts,), usual) if value is None else value.to(like)
            if value.ndim not in (1, 2) or value.shape[-1] != tilts:
                raise ValueError(f"{name}: expected one for each of {tilts} tilts, got {tuple(value.shape)}.")
            self.register_buffer(name, value if value.ndim == 2 else value[None])
        x_tilt = torch.as_tensor(x_tilt).to(like)
        if x_tilt.ndim > 1 or not torch.isfinite(x_tilt).all():
            raise ValueError(f"x_tilt: expected a finite number [deg], or one for each item, got {x_tilt.tolist()}.")
        self.register_buffer("x_tilt", x_tilt.reshape(-1))

    def places(self, item: int, tilt: int) -> torch.Tensor:
        """Where (v, u) [px from the centre] each voxel (z y x, 2) of an item is seen in a tilt, float64."""
        axes = [torch.arange(n, dtype=torch.float64, device=self.angles.device) - n // 2 for n in self.volume_shape]
        control = self._of("deformation", item)[tilt].double() / self.voxel_size  # (3, cz, cy, cx) [voxel]
        bases = [_spline(len(axis), n).to(axis) for axis, n in zip(axes, control.shape[1:], strict=True)]
        dx, dy, dz = torch.einsum("za,yb,xc,dabc->dzyx", *bases, control)
        z, y, x = axes[0][:, None, None] + dz, axes[1][:, None] + dy, axes[2] + dx
        chi = torch.deg2rad(self._of("x_tilt", item).double())
        y, z = y * torch.cos(chi) - z * torch.sin(chi), y * torch.sin(chi) + z * torch.cos(chi)
        angle, turn = (torch.deg2rad(self._of(n, item)[tilt].double()) for n in ("angles", "axis_angles"))
        u = x * torch.cos(angle) + z * torch.sin(angle)
        magnified = self._of("magnifications", item)[tilt].double()
        turned = (u * torch.sin(turn) + y * torch.cos(turn), u * torch.cos(turn) - y * torch.sin(turn))
        return magnified * torch.stack([t.flatten() for t in turned], 1)

    def open_sided(self, images: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
        """Refused: a deformed specimen has no closed form.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            "least_squares: open sides have a closed form for tilts and lens only, got a DeformedProjection; take "
            "open_sides=False."
        )

    def _imaging(self, item: int, dtype: torch.dtype) -> Imaging:
        return super()._imaging(item, dtype)._replace(item=item)

    def _see(self, volume: torch.Tensor, imaging: Imaging) -> torch.Tensor:
        weighted = volume[None] * imaging.shares[:, :, None, None]  # (j, z, y, x)
        tilts = [checkpoint(self._lines, weighted, imaging.item, i, use_reentrant=False) for i in self._tilts()]
        return contrast(list(torch.stack(tilts, 1)), imaging)

    def _see_adjoint(self, images: torch.Tensor, imaging: Imaging) -> torch.Tensor:
        lines = torch.stack(contrast_adjoint(images, imaging), 1)  # (tilt, j, v, u)
        total = images.new_zeros(self.volume_shape)
        for i in self._tilts():
            with torch.enable_grad():
                blank = images.new_zeros(len(imaging.shares), *self.volume_shape).requires_grad_()
                seen = self._lines(blank, imaging.item, i)
                (back,) = torch.autograd.grad(seen, blank, lines[i], create_graph=torch.is_grad_enabled())
            total = total + (back * imaging.shares[:, :, None, None]).sum(0)
        return total

    def _tilts(self) -> range:
        return range(self.angles.shape[-1])

    def _lines(self, volumes: torch.Tensor, item: int, tilt: int) -> torch.Tensor:
        """Line integrals (j, v, u) [V·voxel] of volumes (j, z, y, x) in a tilt, on the padded field."""
        shape = self.padded_shape
        fine = [fast_length(max(2 * _WIDTH, -(-3 * n // 2))) for n in shape]  # of the same field
        ratio = torch.tensor([f / n for f, n in zip(fine, shape, strict=True)], dtype=torch.float64)
        places = self.places(item, tilt)
        half = places.new_tensor([n / 2 for n in shape])
        inside = (places.detach().abs() <= half).all(1).nonzero()[:, 0]
        grid = torch.zeros(len(volumes), fine[0] * fine[1], dtype=volumes.dtype, device=volumes.device)
        spread([grid], places[inside] * ratio, volumes.flatten(1)[:, inside].T.contiguous(), fine, _WIDTH)
        spectrum = torch.fft.rfft2(grid.unflatten(1, fine))
        for axis, (n, f) in enumerate(zip(shape, fine, strict=True)):
            spectrum = _narrowed(spectrum, n, f, axis - 2)
        return torch.fft.irfft2(spectrum, s=shape)


def _narrowed(spectrum: torch.Tensor, n: int, fine: int, axis: int) -> torch.Tensor:
    """Frequencies of n samples out of those of `fine` along an axis, over the bell's transform, about the centre."""
    m = (torch.fft.fftfreq(n) * n).round().long() if axis == -2 else torch.arange(n // 2 + 1)
    paired = 2 * m.abs() < n
    turns = m.double() * (fine // 2 / fine - n // 2 / n)  # from one grid's centre sample to the other's
    factor = torch.polar(paired / bell_transform(fine, _WIDTH)[m], 2 * torch.pi * turns).to(spectrum)
    return spectrum.index_select(axis, m % fine) * (factor[:, None] if axis == -2 else factor)


def _spline(n: int, control: int) -> torch.Tensor:
    """Basis (n, control) of samples between the first control point and the last."""
    ends = torch.linspace(0, control - 1, n, dtype=torch.float64)
    return spline_basis(ends if n > 1 else torch.full_like(ends, (control - 1) / 2), control)


def spline_basis(at: torch.Tensor, control: int) -> torch.Tensor:
    """Cubic B-splines (place, control) at places `at` (place,), in control points from the first; held at the ends."""
    basis = torch.zeros(len(at), control, dtype=torch.float64)
    for j in range(-1, control + 1):
        d = (at - j).abs()
        value = torch.where(d < 1, 2 / 3 - d**2 + d**3 / 2, ((2 - d).clamp_min(0)) ** 3 / 6)
        basis[:, min(max(j, 0), control - 1)] += value
    return basis


def free_shifts(angles: torch.Tensor) -> torch.Tensor:
    """Directions (2 tilt, parameter), all x and then all y, that no displacement of the specimen makes."""
    n, t = len(angles), torch.deg2rad(angles)
    held = torch.zeros(2 * n, 3, dtype=torch.float64)
    held[:n, 0], held[:n, 1], held[n:, 2] = torch.cos(t), torch.sin(t), 1.0
    basis = torch.linalg.qr(torch.cat([held, torch.eye(2 * n, dtype=torch.float64)], 1))[0]
    return basis[:, 3 : 2 * n]


def displacement(control: torch.Tensor, x: torch.Tensor, y: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """e ([tilt,] 2, ...) [px] of control points ([tilt,] 2, y, x) at places x, y ([tilt,] ...) [px] from the middle of
    a field (y, x); held beyond it."""
    lead, bases = control.ndim - 3, []
    for place, n, points in ((y, shape[0], control.shape[-2]), (x, shape[1], control.shape[-1])):
        at = ((place + n // 2) / (n - 1)).clamp(0, 1) * (points - 1)
        bases.append(spline_basis(at.flatten(), points).reshape(*at.shape[:lead], -1, points))
    lines = torch.einsum("...pa,...cab->...cpb", bases[0], control)
    return torch.einsum("...pb,...cpb->...cp", bases[1], lines).reshape(*control.shape[: lead + 1], *x.shape[lead:])


def twice(images: torch.Tensor) -> torch.Tensor:
    """Images (..., y, x) at twice the samples, by their transforms: (..., 2 y, 2 x), sample m at 2 m."""
    ny, nx = images.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), (-2, -1))
    low = [n - n // 2 for n in (ny, nx)]
    padded = torch.nn.functional.pad(spectrum, (low[1], nx - low[1], low[0], ny - low[0]))
    return 4 * torch.fft.ifft2(torch.fft.ifftshift(padded, (-2, -1))).real
