"""`TiltProjection`: the exact single-axis projection as a deepinv operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepinv.physics import LinearPhysics
from torch.nn import functional

from inverse.physics.closed_form import damped_least_squares, largest_eigenvalue
from inverse.physics.spectral import Grid, TiltGeometry, backproject, project, tilt_geometry


class TiltProjection(LinearPhysics):
    """Projections of a volume at tilts about y: line integrals in voxels, exact for band-limited volumes.

    Volumes are (batch, channel, z, y, x), images (batch, channel, tilt, y, x). All methods are differentiable in the
    volume, the data and the angles. Angles given to a call stay, as deepinv's `update` has it; nothing else does.

    Parameters
    ----------
    angles : sequence of float, or tensor (tilt,) or (batch, tilt)
        [deg]; kept as the buffer `angles` (1 or batch, tilt), so `update(angles=...)` and gradients work.
    volume_shape : (int, int, int)
        (z, y, x) [voxel].
    image_shape : (int, int), optional
        (y, x) [px] of the camera; (y, x) of the volume when left out. Rows beyond the volume are empty.
    grid : {"camera", "stretched"}
        "camera": images on the volume's own spacing; the volume is zero outside its box. "stretched": pixels cos(angle)
        voxels wide and the volume periodic in x, where least squares has a closed form.
    normalize : bool
        Divide by the operator's norm, kept in the buffer `scale` (1 otherwise): physical images are `scale` times ours.
    tolerance, max_iterations
        Of `prox_l2` and `A_dagger` on the camera grid.
    noise_model : deepinv noise model, optional

    Raises
    ------
    ValueError
        For an unknown grid, tilts of 89 degrees or more, shapes that do not fit, or values that are not finite.

    Notes
    -----
    The derivation stands in `inverse.physics.spectral` and `inverse.physics.closed_form`.
    """

    angles: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        angles: Sequence[float] | torch.Tensor,
        volume_shape: tuple[int, int, int],
        image_shape: tuple[int, int] | None = None,
        grid: Grid = "camera",
        *,
        normalize: bool = False,
        tolerance: float = 1e-5,
        max_iterations: int = 100,
        **physics,
    ) -> None:
        super().__init__(img_size=(1, *volume_shape), tol=tolerance, max_iter=max_iterations, **physics)
        if not (isinstance(angles, torch.Tensor) and angles.is_floating_point()):
            angles = torch.as_tensor(angles, dtype=torch.float64)
        angles = angles[None] if angles.ndim == 1 else angles
        if angles.ndim != 2 or angles.numel() == 0 or not torch.isfinite(angles).all():
            raise ValueError(
                f"angles: expected finite numbers of shape (tilt,) or (batch, tilt) [deg], got {tuple(angles.shape)} "
                f"of {angles.dtype}."
            )
        if len(volume_shape) != 3 or min(volume_shape) < 1:
            raise ValueError(f"volume_shape: expected three sizes (z, y, x), got {tuple(volume_shape)}.")
        self.volume_shape = tuple(volume_shape)
        self.image_shape = tuple(image_shape or volume_shape[1:])
        self._reach(angles, grid)
        self.register_buffer("angles", angles)
        self.register_buffer("scale", torch.ones((), dtype=angles.dtype))
        if normalize:
            self.scale = _norm(angles[0].detach(), self.geometry).to(angles.dtype)

    def update_parameters(self, angles: torch.Tensor | None = None, **kwargs) -> None:
        """Take new angles (tilt,) or (batch, tilt) [deg]; steeper ones than so far get a longer period.

        Raises
        ------
        ValueError
            For tilts of 89 degrees or more.
        """
        if angles is not None:
            angles = angles[None] if angles.ndim == 1 else angles
            self._reach(angles, self.geometry.grid)
        super().update_parameters(angles=angles, **kwargs)

    def _reach(self, angles: torch.Tensor, grid: Grid) -> None:
        """A geometry in which nothing wraps at the steepest of `angles`, or of those before."""
        depth, _, width = self.volume_shape
        steepest = float(angles.detach().abs().max())
        needed = tilt_geometry(depth, width, self.image_shape[1], grid, steepest)
        if "geometry" not in vars(self) or needed.period > self.geometry.period:
            self.geometry: TiltGeometry = needed

    def A(self, x: torch.Tensor, angles: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Images (batch, channel, tilt, y, x) of volumes (batch, channel, z, y, x)."""
        self.update_parameters(angles=angles, **kwargs)
        self._expect(x, self.volume_shape, "a volume (batch, channel, z, y, x)")

        def act(item: torch.Tensor, tilts: torch.Tensor) -> torch.Tensor:
            return project(item, tilts, self.geometry)

        return self.fit_rows(self._each(act, x), self.image_shape[0]) / self.scale.to(x)

    def A_adjoint(self, y: torch.Tensor, angles: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Volumes (batch, channel, z, y, x) from images (batch, channel, tilt, y, x)."""
        self.update_parameters(angles=angles, **kwargs)
        self.expect_images(y)

        def act(item: torch.Tensor, tilts: torch.Tensor) -> torch.Tensor:
            return backproject(item, tilts, self.geometry)

        return self._each(act, self.fit_rows(y) / self.scale.to(y))

    def prox_l2(
        self,
        z: torch.Tensor | float | None,
        y: torch.Tensor,
        gamma: float | torch.Tensor,
        solver: str | None = None,
        max_iter: int | None = None,
        tol: float | None = None,
        verbose: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Minimiser of gamma / 2 |A x - y|^2 + 1/2 |x - z|^2.

        In closed form on the stretched grid; on the camera's by conjugate gradients preconditioned with it, to `tol`.

        Parameters
        ----------
        z : tensor (batch, channel, z, y, x), number or None
        y : tensor (batch, channel, tilt, y, x)
        gamma : float or tensor () or (batch,)
        max_iter, tol
            Instead of the operator's own, for this call.
        solver, verbose, **kwargs
            deepinv's choice of an iterative solver, which is not needed here.

        Raises
        ------
        ValueError
            For a gamma that is not positive, or data of another shape.
        """
        self.expect_images(y)
        volume = (*y.shape[:2], *self.volume_shape)
        z = z.to(y).expand(volume) if isinstance(z, torch.Tensor) else y.new_full(volume, float(z or 0.0))
        gamma = torch.as_tensor(gamma, dtype=y.dtype, device=y.device).reshape(-1)
        if len(gamma) not in (1, len(y)) or not (gamma > 0).all():
            raise ValueError(
                f"prox_l2: expected a positive gamma, or one for each of {len(y)} items, got {gamma.tolist()}."
            )
        return self._solve(z, y, self.scale.to(y) ** 2 / gamma, tol, max_iter)

    def A_dagger(
        self,
        y: torch.Tensor,
        solver: str | None = None,
        max_iter: int | None = None,
        tol: float | None = None,
        verbose: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Least-squares solution of least norm: `prox_l2` about 0 with next to no damping.

        The damping, in units of |A|^2, is near the rounding error of the closed form (1e-6 in float32, 1e-12 in
        float64) and 1e-6 on the camera grid, where iterations would resolve no less. Arguments as in `prox_l2`.
        """
        z = y.new_zeros((*y.shape[:2], *self.volume_shape))
        least = 1e-12 if self.geometry.grid == "stretched" and y.dtype == torch.float64 else 1e-6
        damping = least * largest_eigenvalue(self.angles[0].detach(), self.geometry)
        return self._solve(z, y, damping.to(y).reshape(1), tol, max_iter)

    def _solve(self, z, y, damping, tol, max_iter) -> torch.Tensor:
        """Damped least squares for each item; `damping` (1 or batch,) belongs to the operator without its scale."""
        damping = damping.expand(y.shape[0])
        settings = {"tolerance": tol or self.tol, "max_iterations": max_iter or self.max_iter}
        y = self.fit_rows(y) * self.scale.to(y)
        angles = self.angles.expand(y.shape[0], -1)
        items = []
        for z_item, y_item, tilts, lam in zip(z, y, angles, damping, strict=True):
            # channels are more rows of the same problem
            volume, images = (t.movedim(0, 1).flatten(1, 2) for t in (z_item, y_item))
            x = damped_least_squares(volume, images, tilts, lam, self.geometry, **settings)
            items.append(x.unflatten(1, (z_item.shape[0], -1)).movedim(1, 0))
        return torch.stack(items)

    def _each(self, act, batch: torch.Tensor) -> torch.Tensor:
        """`act` on (slice, row, column) stacks: the batch at once where it shares its angles, else item by item."""
        b, c, _, rows, _ = batch.shape
        if self.angles.shape[0] == 1:
            stacked = batch.flatten(0, 1).movedim(0, 1).flatten(1, 2)  # (slice, batch channel row, column)
            out = act(stacked, self.angles[0]).unflatten(1, (b * c, rows))
            return out.movedim(1, 0).unflatten(0, (b, c)).contiguous()
        if self.angles.shape[0] != b:
            raise ValueError(f"angles: expected one row, or one for each of {b} items, got {self.angles.shape[0]}.")
        items = [act(item.movedim(0, 1).flatten(1, 2), t) for item, t in zip(batch, self.angles, strict=True)]
        return torch.stack([out.unflatten(1, (c, rows)).movedim(1, 0) for out in items])

    def expect_images(self, images: torch.Tensor) -> None:
        """Raise ValueError unless `images` are what this operator makes."""
        self._expect(images, (self.angles.shape[-1], *self.image_shape), "images (batch, channel, tilt, y, x)")

    def fit_rows(self, images: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Images cut or padded with zeros to `rows` (those of the volume), about the centre row n // 2."""
        rows = self.volume_shape[1] if rows is None else rows
        before = rows // 2 - images.shape[-2] // 2
        after = rows - images.shape[-2] - before
        return functional.pad(images, (0, 0, before, after)) if before or after else images

    def _expect(self, given: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
        if given.ndim != 5 or tuple(given.shape[2:]) != tuple(shape):
            raise ValueError(
                f"TiltProjection: expected {what} with the last sizes {tuple(shape)}, got {tuple(given.shape)}."
            )


def _norm(angles: torch.Tensor, geometry: TiltGeometry, iterations: int = 60) -> torch.Tensor:
    """|A| by power iteration on one row: all rows are the same operator."""
    row = torch.ones(geometry.depth, 1, geometry.width, dtype=torch.float64, device=angles.device)
    eigenvalue = row.new_ones(())
    for _ in range(iterations):
        row = row / row.norm()
        row = backproject(project(row, angles, geometry), angles, geometry)
        eigenvalue = row.norm()
    return eigenvalue.sqrt()
