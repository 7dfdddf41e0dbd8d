"""`TiltProjection`: the exact single-axis projection as a deepinv operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inverse.physics.base import TiltPhysics, expect
from inverse.physics.closed_form import damped_least_squares, largest_eigenvalue
from inverse.physics.spectral import Grid, TiltGeometry, backproject, project, tilt_geometry


class TiltProjection(TiltPhysics):
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
        super().__init__(
            angles, volume_shape, image_shape, tolerance=tolerance, max_iterations=max_iterations, **physics
        )
        self._reach(self.angles, grid)
        if normalize:
            self.scale = _norm(self.angles[0].detach(), self.geometry).to(self.angles.dtype)

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
        expect(self, x, self.volume_shape, "a volume (batch, channel, z, y, x)")

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

    def _least_damping(self, dtype: torch.dtype) -> float:
        return 1e-12 if self.geometry.grid == "stretched" and dtype == torch.float64 else 1e-6

    def squared_norm(self) -> torch.Tensor:
        """|A|^2 () of the operator without edges, which may only lessen it."""
        return largest_eigenvalue(self.angles[0].detach(), self.geometry) / self.scale**2

    def _solve(
        self, z: torch.Tensor, y: torch.Tensor, damping: torch.Tensor, tolerance: float, max_iterations: int
    ) -> torch.Tensor:
        settings = {"tolerance": tolerance, "max_iterations": max_iterations}
        y, angles = self.fit_rows(y), self.angles.expand(y.shape[0], -1)
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


def _norm(angles: torch.Tensor, geometry: TiltGeometry, iterations: int = 60) -> torch.Tensor:
    """|A| by power iteration on one row: all rows are the same operator."""
    row = torch.ones(geometry.depth, 1, geometry.width, dtype=torch.float64, device=angles.device)
    eigenvalue = row.new_ones(())
    for _ in range(iterations):
        row = row / row.norm()
        row = backproject(project(row, angles, geometry), angles, geometry)
        eigenvalue = row.norm()
    return eigenvalue.sqrt()
