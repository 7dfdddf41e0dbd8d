"""`TiltProjection`: the exact single-axis projection, in the microscope's whole geometry, as a deepinv operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cryosim.core.record import hidden
from inverse.physics.base import TiltPhysics, expect
from inverse.physics.closed_form import (
    PRECONDITIONER_FLOOR,
    Damped,
    conjugate_gradients,
    damped_least_squares,
    edgeless_inverse,
    largest_eigenvalue,
    minimiser,
)
from inverse.physics.setting import LEAST_MAGNIFICATION, Field, Setting, field, lifted, may_vary, see, see_adjoint
from inverse.physics.spectral import Grid, TiltGeometry, backproject, cosines, project, tilt_geometry


class TiltProjection(TiltPhysics):
    """Projections of a volume at tilts about y: line integrals in voxels, exact for band-limited volumes.

    An image is T P X volume: X turns the specimen about x, P tilts it about y and projects it, and T magnifies the
    image, turns it and displaces it. Volumes are (batch, channel, z, y, x), images (batch, channel, tilt, y, x). All
    methods are differentiable in the volume, the data and the parameters. Parameters given to a call stay, as deepinv's
    `update` has it; nothing else does.

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
    axis_angle : float or tensor (tilt,) or (batch, tilt)
        By which images are turned, from x towards y [deg]; the buffer `axis_angle` (1 or batch, tilt).
    shifts : tensor (tilt, 2) or (batch, tilt, 2), optional
        (x, y) by which the content of each image is displaced, after the turn [voxel]; the buffer `shifts`. On the
        stretched grid images are periodic.
    magnifications : float or tensor (tilt,) or (batch, tilt)
        Of the images, about their centre; their values stay. The buffer `magnifications`.
    x_tilt : float or tensor () or (batch,)
        By which the specimen is turned about x, from y towards z, before all else [deg], below 60; the buffer `x_tilt`
        (1 or batch,).
    normalize : bool
        Divide by the operator's norm, kept in the buffer `scale` (1 otherwise): physical images are `scale` times ours.
    tolerance, max_iterations
        Of `prox_l2` and `A_dagger` on the camera grid.
    noise_model : deepinv noise model, optional

    Raises
    ------
    ValueError
        For an unknown grid, tilts of 89 degrees or more, shapes that do not fit, values that are not finite, or, on the
        stretched grid, an axis angle, a magnification or an x-tilt.

    Notes
    -----
    The derivation stands in `inverse.physics.spectral`, `inverse.physics.setting` and `inverse.physics.closed_form`.
    Where nothing but `angles` is given, rows of the volume are independent, which all methods make use of.
    """

    axis_angle: torch.Tensor
    shifts: torch.Tensor
    magnifications: torch.Tensor
    x_tilt: torch.Tensor

    def __init__(
        self,
        angles: Sequence[float] | torch.Tensor,
        volume_shape: tuple[int, int, int],
        image_shape: tuple[int, int] | None = None,
        grid: Grid = "camera",
        *,
        axis_angle: float | torch.Tensor = 0.0,
        shifts: torch.Tensor | None = None,
        magnifications: float | torch.Tensor = 1.0,
        x_tilt: float | torch.Tensor = 0.0,
        normalize: bool = False,
        tolerance: float = 1e-5,
        max_iterations: int = 100,
        **physics,
    ) -> None:
        super().__init__(
            angles, volume_shape, image_shape, tolerance=tolerance, max_iterations=max_iterations, **physics
        )
        like, n_tilts = self.angles, self.angles.shape[-1]
        self.register_buffer("axis_angle", like.new_zeros(1, n_tilts))
        self.register_buffer("shifts", like.new_zeros(1, n_tilts, 2))
        self.register_buffer("magnifications", like.new_ones(1, n_tilts))
        self.register_buffer("x_tilt", like.new_zeros(1))
        self._grid: Grid = grid
        self._measure()
        given = {"axis_angle": axis_angle, "shifts": shifts, "magnifications": magnifications, "x_tilt": x_tilt}
        self.update_parameters(**{name: torch.as_tensor(v).to(like) for name, v in given.items() if v is not None})
        if normalize:
            self.scale = self._norm().to(like.dtype)

    @property
    def geometry(self) -> TiltGeometry:
        """Sizes of the projection, for solvers that take it to pieces; for one that is tilted about y and no more.

        Raises
        ------
        ValueError
            Where images are turned, displaced or magnified, or the specimen is tilted about x.
        """
        if not self._is_plain():
            raise ValueError(
                "TiltProjection: expected tilts about y alone, got an axis_angle, shifts, magnifications or an x_tilt. "
                "Use prox_l2 or A_dagger, or bring the images to the frame of the tilt axis first "
                "(inverse.physics.turn.to_tilt_frame)."
            )
        return self._geometry

    def update_parameters(self, **parameters) -> None:
        """Take new values of angles, axis_angle, shifts, magnifications or x_tilt, of one item or of each.

        A scalar axis_angle or magnification is that of all tilts. The period grows with what it has to hold.

        Raises
        ------
        ValueError
            For tilts of 89 degrees or more, values that are not finite or of another shape, or what the stretched grid
            does not have.
        """
        given = {name: parameters.get(name) for name in (*_USUAL, "angles")}
        given = {name: self._checked(name, value) for name, value in given.items() if value is not None}
        if "angles" in given:  # before anything is changed
            steepest = float(given["angles"].detach().abs().max())
            tilt_geometry(self.volume_shape[0], self.volume_shape[2], self.image_shape[1], self._grid, steepest)
        super().update_parameters(**(parameters | given))
        if given:
            self._measure()

    def _checked(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A parameter as (1 or batch, ...)."""
        like = getattr(self, name)
        shape = like.shape[1:]
        value = value if isinstance(value, torch.Tensor) else torch.as_tensor(value).to(like)
        if value.ndim == 0 and len(shape) <= 1 and name != "angles":
            value = value.expand(shape).clone()
        value = value[None] if value.ndim == len(shape) else value
        if value.shape[1:] != shape or value.ndim != len(shape) + 1:
            raise ValueError(f"{name}: expected {tuple(shape)} or (batch, *{tuple(shape)}), got {tuple(value.shape)}.")
        seen = value.detach()
        if not torch.isfinite(seen).all():
            raise ValueError(f"{name}: expected finite numbers, got {seen[~torch.isfinite(seen)][0]}.")
        if name == "magnifications" and not (seen >= LEAST_MAGNIFICATION).all():
            raise ValueError(f"magnifications: expected {LEAST_MAGNIFICATION} or more, got {float(seen.min())}.")
        if name == "x_tilt" and not (seen.abs() < 60).all():
            raise ValueError(f"x_tilt: expected less than 60 degrees, got {float(seen.abs().max())}.")
        if self._grid == "stretched" and name in ("axis_angle", "magnifications", "x_tilt"):
            if bool((seen != _USUAL[name]).any()) or value.requires_grad:
                raise ValueError(
                    f"{name}: not on the stretched grid, whose pixels differ along x and y. Take the camera grid, or "
                    "undo it in the images first."
                )
        return value

    def _measure(self) -> None:
        """Sizes in which nothing wraps at the steepest of the parameters, or of those before."""
        depth, _, width = self.volume_shape
        steepest = float(self.angles.detach().abs().max())
        needed = tilt_geometry(depth, width, self.image_shape[1], self._grid, steepest)
        if "_geometry" not in vars(self) or needed.period > self._geometry.period:
            self._geometry: TiltGeometry = needed
        if self._grid == "camera" and not self._is_plain():
            self._sizes()

    def _sizes(self) -> Field:
        """Of the whole geometry as its buffers are now, whoever set them, and no less than before."""
        if hidden() and "_field" in vars(self):
            return self._field
        settings = self._settings(self._n_items())
        self._field: Field = field(self.volume_shape, self.image_shape, settings, vars(self).get("_field"))
        return self._field

    def _is_plain(self) -> bool:
        """Whether the specimen is tilted about y and no more."""
        values = ((getattr(self, name), usual) for name, usual in _USUAL.items())
        return not any(may_vary(value) or bool((value != usual).any()) for value, usual in values)

    def _setting(self, item: int) -> Setting:
        values = (getattr(self, name) for name in Setting._fields)
        return Setting(*(value[item if len(value) > 1 else 0] for value in values))

    def _n_items(self) -> int:
        """How many items the parameters tell apart."""
        return max(len(getattr(self, name)) for name in Setting._fields)

    def _settings(self, n: int) -> list[Setting]:
        """Of each of n items of a batch.

        Raises
        ------
        ValueError
            For parameters of another number of items.
        """
        counts = {len(getattr(self, name)) for name in Setting._fields} - {1, n}
        if counts:
            raise ValueError(
                f"TiltProjection: expected parameters of one item, or one for each of {n} items, got {counts}."
            )
        return [self._setting(i) for i in range(n)]

    def A(self, x: torch.Tensor, angles: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Images (batch, channel, tilt, y, x) of volumes (batch, channel, z, y, x)."""
        self.update_parameters(angles=angles, **kwargs)
        expect(self, x, self.volume_shape, "a volume (batch, channel, z, y, x)")
        if self._is_plain() or self._grid == "stretched":
            images = self.fit_rows(self._each(project, x), self.image_shape[0])
            images = images if self._is_plain() else self._displaced(images, 1)
        else:
            items = zip(x, self._settings(len(x)), strict=True)
            sizes = self._sizes()
            images = torch.stack([see(item, setting, sizes) for item, setting in items])
        return (images / self.scale.to(x)).contiguous()

    def A_adjoint(self, y: torch.Tensor, angles: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Volumes (batch, channel, z, y, x) from images (batch, channel, tilt, y, x)."""
        self.update_parameters(angles=angles, **kwargs)
        self.expect_images(y)
        y = y / self.scale.to(y)
        if self._is_plain() or self._grid == "stretched":
            y = self.fit_rows(y if self._is_plain() else self._displaced(y, -1))
            return self._each(backproject, y).contiguous()
        items = zip(y, self._settings(len(y)), strict=True)
        sizes = self._sizes()
        return torch.stack([see_adjoint(item, setting, sizes) for item, setting in items]).contiguous()

    def _displaced(self, images: torch.Tensor, sign: int) -> torch.Tensor:
        """Images of the stretched grid, periodic, displaced by `sign` times the shifts: an orthogonal operation."""
        settings = self._settings(len(images))
        move = torch.stack([sign * one.shifts.double() / _pixel(one.angles) for one in settings])  # (b, tilt, 2) [px]
        for axis, part in ((-1, move[..., 0]), (-2, move[..., 1])):
            images = _shifted(images, part[:, None], axis)
        return images

    def _least_damping(self, dtype: torch.dtype) -> float:
        return 1e-12 if self._grid == "stretched" and dtype == torch.float64 else 1e-6

    def squared_norm(self) -> torch.Tensor:
        """|A|^2 () of the operator without edges, which may only lessen it."""
        one = self._setting(0)
        if self._is_plain() or self._grid == "stretched":
            return largest_eigenvalue(one.angles.detach(), self._geometry) / self.scale**2
        placement = one.placement()
        return largest_eigenvalue(one.angles, self._sizes().geometry, placement).detach() / self.scale**2

    def _solve(
        self, z: torch.Tensor, y: torch.Tensor, damping: torch.Tensor, tolerance: float, max_iterations: int
    ) -> torch.Tensor:
        settings = self._settings(len(y))
        if not self._is_plain() and self._grid == "camera":
            system = _system(self._sizes(), tolerance, max_iterations)
            items = zip(z, y, damping, settings, strict=True)
            return torch.stack([minimiser(system, z_item, y_item, lam, *one) for z_item, y_item, lam, one in items])
        y = self.fit_rows(y if self._is_plain() else self._displaced(y, -1))
        items = []
        for z_item, y_item, lam, one in zip(z, y, damping, settings, strict=True):
            # channels are more rows of the same problem
            volume, images = (t.movedim(0, 1).flatten(1, 2) for t in (z_item, y_item))
            how = {"tolerance": tolerance, "max_iterations": max_iterations}
            x = damped_least_squares(volume, images, one.angles, lam, self._geometry, **how)
            items.append(x.unflatten(1, (z_item.shape[0], -1)).movedim(1, 0))
        return torch.stack(items)

    @torch.no_grad()
    def approximate_inverse(self, damping: float, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `TiltPhysics`."""
        own = torch.as_tensor(damping, dtype=torch.float64, device=like.device) * self.scale.double() ** 2

        def of_item(setting: Setting) -> Callable[[torch.Tensor], torch.Tensor]:
            if self._is_plain() or self._grid == "stretched":
                floor = 0.0 if self._grid == "stretched" else PRECONDITIONER_FLOOR
                act = edgeless_inverse(setting.angles, own, self._geometry, like, floor=floor)
                rows = self.volume_shape[1]  # channels are more of them
                return lambda v: act(v.transpose(0, 1).flatten(1, 2)).unflatten(1, (-1, rows)).transpose(0, 1)
            sizes = self._sizes()
            nearby = edgeless_inverse(setting.angles, own, sizes.geometry, like, setting.placement())
            return lifted(nearby, setting, sizes)

        items = [of_item(setting) for setting in self._settings(self._n_items())]

        def apply(volumes: torch.Tensor) -> torch.Tensor:
            acts = items if len(items) > 1 else items * len(volumes)
            return torch.stack([act(v) for act, v in zip(acts, volumes, strict=True)]) * self.scale.to(volumes) ** 2

        return apply

    def _norm(self, iterations: int = 60) -> torch.Tensor:
        """|A| by power iteration; on one row where all rows are the same operator."""
        one = self._setting(0)
        shape = self.volume_shape
        with torch.no_grad():
            if self._is_plain() or self._grid == "stretched":
                volume = torch.ones(shape[0], 1, shape[2], dtype=torch.float64, device=self.angles.device)
                forward, back = (lambda v, f=f: f(v, one.angles, self._geometry) for f in (project, backproject))
            else:
                volume = torch.ones(1, *shape, dtype=torch.float64, device=self.angles.device)
                sizes = self._sizes()
                forward, back = (lambda v, f=f: f(v, one, sizes) for f in (see, see_adjoint))
            eigenvalue = volume.new_ones(())
            for _ in range(iterations):
                volume = back(forward(volume / volume.norm()))
                eigenvalue = volume.norm()
        return eigenvalue.sqrt()

    def _each(self, act, batch: torch.Tensor) -> torch.Tensor:
        """`act` on (slice, row, column) stacks: the batch at once where it shares its angles, else item by item."""
        b, c, _, rows, _ = batch.shape
        if self.angles.shape[0] == 1:
            stacked = batch.flatten(0, 1).movedim(0, 1).flatten(1, 2)  # (slice, batch channel row, column)
            out = act(stacked, self.angles[0], self._geometry).unflatten(1, (b * c, rows))
            return out.movedim(1, 0).unflatten(0, (b, c)).contiguous()
        items = zip(batch, self._settings(b), strict=True)
        outs = [act(item.movedim(0, 1).flatten(1, 2), one.angles, self._geometry) for item, one in items]
        return torch.stack([out.unflatten(1, (c, rows)).movedim(1, 0) for out in outs])


_USUAL = {"axis_angle": 0.0, "shifts": 0.0, "magnifications": 1.0, "x_tilt": 0.0}


def _system(sizes: Field, tolerance: float, max_iterations: int) -> Damped:
    """Least squares of one item (channel, z, y, x) in a setting, whose tensors are the parameters."""

    def forward(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return see(x, Setting(*parameters), sizes)

    def solve(z, y, damping, *parameters) -> tuple[torch.Tensor, int]:
        setting = Setting(*parameters)

        def normal(x: torch.Tensor) -> torch.Tensor:
            return see_adjoint(see(x, setting, sizes), setting, sizes) + damping * x

        nearby = edgeless_inverse(setting.angles, damping, sizes.geometry, z, setting.placement())
        target = see_adjoint(y, setting, sizes) + damping * z
        precondition = lifted(nearby, setting, sizes)
        return conjugate_gradients(normal, precondition, target, tolerance, max_iterations)

    return Damped(forward, solve, tolerance, max_iterations)


def _pixel(angles: torch.Tensor) -> torch.Tensor:
    """(x, y) [voxel] of the pixels of the stretched grid (tilt, 2)."""
    return torch.stack([cosines(angles), torch.ones_like(cosines(angles))], -1)


def _shifted(images: torch.Tensor, move: torch.Tensor, axis: int) -> torch.Tensor:
    """Periodic images (..., y, x) displaced by `move` (...) [px] along an axis, but for an unpaired frequency."""
    n = images.shape[axis]
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device=images.device) / n * (2 * torch.arange(n // 2 + 1) < n)
    turns = -move[..., None, None] * (k if axis == -1 else k[:, None])
    phase = (2 * torch.pi * (turns - turns.detach().round())).to(images.dtype)
    spectrum = torch.fft.rfft(images, dim=axis) * torch.polar(torch.ones_like(phase), phase)
    return torch.fft.irfft(spectrum, n=n, dim=axis)
