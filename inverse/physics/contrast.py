"""Projections seen through the lens: the contrast of a weak object, linear in its potential."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch

from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.fourier import fast_length
from cryosim.core.record import differentiated, hidden
from cryosim.microscope.optics import Optics, check_per_tilt, largest_displacement
from cryosim.specimen.damage import Damage, fading
from inverse.physics.base import TiltPhysics, expect
from inverse.physics.closed_form import (
    Damped,
    backproject_filtered,
    conjugate_gradients,
    largest_eigenvalue,
    minimiser,
)
from inverse.physics.contrast_inverse import contrast_solver, edgeless_inverse, lens_transfer
from inverse.physics.heights import Fading, Imaging, heights, node_counts, see, see_adjoint, transfers
from inverse.physics.spectral import Grid, TiltGeometry, fitted, tilt_geometry

Heights = Literal["none", "plane", "all"]
LENS = ("defocus", "astigmatism", "astigmatism_angle", "phase_shift")


def fading_by_tilt(damage: Damage, tilts: TiltScheme, voltage: float | torch.Tensor, which: int = 0) -> Fading:
    """What radiation damage leaves in each tilt, as `ContrastProjection` takes it for its `fading`.

    Weighs each image by its dose, too: what has faded is not expected in it, and so is not asked of it.

    Parameters
    ----------
    damage : Damage
    tilts : TiltScheme
        In order of exposure, in which the operator's angles must stand, too.
    voltage : float or tensor ()
        [kV].
    which : int
        Class of atoms, as in `cryosim.fading`.

    Returns
    -------
    callable
        k^2 (tilt, y, x) [1/Å^2] -> amplitude of the same shape [1], averaged over each exposure.
    """
    moments = [tilts.moment(i) for i in range(len(tilts))]

    def left(squared_frequency: torch.Tensor) -> torch.Tensor:
        pairs = zip(squared_frequency, moments, strict=True)
        return torch.stack([fading(damage, k2, moment, voltage, which) for k2, moment in pairs])

    return left


class ContrastProjection(TiltPhysics):
    """Intensity - 1 of a weak object with its potential in volts, by the contrast transfer function of each tilt.

    Volumes are (batch, channel, z, y, x) [V], images (batch, channel, tilt, y, x) [1]. Defocus follows the height of
    the tilted specimen: of its central plane, or, with `heights="all"`, of every voxel, which is the curvature of the
    Ewald sphere. All methods are differentiable in the volume, the data, the angles, the parameters of the lens that
    are buffers, and the shifts; those given to a call stay, as deepinv's `update` has it.

    Parameters
    ----------
    angles : sequence of float, or tensor (tilt,) or (batch, tilt)
        [deg]; the buffer `angles` (1 or batch, tilt).
    volume_shape : (int, int, int)
        (z, y, x) [voxel].
    voxel_size : float
        Also of a pixel [Å].
    optics : Optics
        Fields () or (tilt,). Its defocus, astigmatism, astigmatism_angle and phase_shift become buffers of these names
        (1 or batch, tilt).
    image_shape : (int, int), optional
        (y, x) [px] of the camera; (y, x) of the volume when left out.
    grid : {"camera", "stretched"}
        As in `TiltProjection`. On the stretched grid, x and y are periodic, and with `heights="none"` least squares has
        a closed form; on the camera's, the volume is zero outside its box and images fade out beyond their edges.
    heights : {"plane", "none", "all"}
        What the defocus follows.
    hand : {1, -1}
        Which way the defocus rises under a tilt: 1 where the angles and this library agree about the height of what
        lands at u, -1 where another program had it the other way round.
    shifts : tensor (tilt, 2) or (batch, tilt, 2), optional
        (x, y) by which the content of each image is displaced [Å]; the buffer `shifts`.
    fading : callable, optional
        k^2 (tilt, y, x) [1/Å^2] -> amplitude of the same shape that damage has left, such as `fading_by_tilt` makes.
    accuracy : float
        Of the phase factors that follow the heights; the number of Chebyshev nodes follows from it.
    normalize : bool
        Divide by a bound of the norm, kept in the buffer `scale`: a step of 1 is safe then.
    tolerance, max_iterations
        Of `prox_l2` and `A_dagger` where they have no closed form.
    **physics
        Further arguments of deepinv's LinearPhysics, such as `noise_model`.

    Raises
    ------
    ValueError
        For parameters that do not fit the tilts, or whatever `TiltProjection` refuses.

    Notes
    -----
    The derivation stands in `inverse.physics.heights` and `inverse.physics.contrast_inverse`.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ("angles", *LENS, "shifts")
    """Of the buffers, each (1 or batch, ...)."""

    defocus: torch.Tensor
    astigmatism: torch.Tensor
    astigmatism_angle: torch.Tensor
    phase_shift: torch.Tensor
    shifts: torch.Tensor

    def __init__(
        self,
        angles: Sequence[float] | torch.Tensor,
        volume_shape: tuple[int, int, int],
        voxel_size: float,
        optics: Optics,
        image_shape: tuple[int, int] | None = None,
        grid: Grid = "camera",
        *,
        heights: Heights = "plane",
        hand: Literal[1, -1] = 1,
        shifts: torch.Tensor | None = None,
        fading: Fading | None = None,
        accuracy: float = 1e-5,
        normalize: bool = False,
        tolerance: float = 1e-5,
        max_iterations: int = 100,
        **physics,
    ) -> None:
        super().__init__(
            angles, volume_shape, image_shape, tolerance=tolerance, max_iterations=max_iterations, **physics
        )
        if not 0 < voxel_size < math.inf:
            raise ValueError(f"voxel_size: expected a positive number [Å], got {voxel_size}.")
        if heights not in ("none", "plane", "all"):
            raise ValueError(f'heights: expected "none", "plane" or "all", got {heights!r}.')
        if hand not in (1, -1):
            raise ValueError(f"hand: expected 1 or -1, got {hand!r}.")
        if not 0 < accuracy < 1:
            raise ValueError(f"accuracy: expected a number between 0 and 1, got {accuracy!r}.")
        tilts = self.angles.shape[-1]
        check_per_tilt(optics, tilts)
        self.voxel_size, self.optics = float(voxel_size), optics
        self.grid: Grid = grid
        self.heights, self.hand, self.accuracy, self.fading = heights, hand, accuracy, fading
        for name in LENS:
            value = torch.as_tensor(getattr(optics, name), dtype=self.angles.dtype)
            self.register_buffer(name, value.expand(tilts)[None].clone())
        shifts = self.angles.new_zeros(tilts, 2) if shifts is None else shifts.to(self.angles.dtype)
        if shifts.shape[-2:] != (tilts, 2) or shifts.ndim not in (2, 3):
            raise ValueError(f"shifts: expected ({tilts}, 2) or (batch, {tilts}, 2) [Å], got {tuple(shifts.shape)}.")
        self.register_buffer("shifts", shifts[None] if shifts.ndim == 2 else shifts)
        self._measure()
        if normalize:
            self.scale = self.squared_norm().sqrt()

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(y, x) [px] of the field on which the lens acts."""
        return self._rows, self.geometry.image_width

    def update_parameters(self, **parameters) -> None:
        """Take new angles, defocus, astigmatism, astigmatism_angle or phase_shift, (tilt,) or (batch, tilt), or shifts.

        Raises
        ------
        ValueError
            For tilts of 89 degrees or more, or values of another shape.
        """
        for name in self.parameter_names:
            value = parameters.get(name)
            if value is None:
                continue
            own = getattr(self, name)
            value = value[None] if value.ndim == own.ndim - 1 else value
            if value.shape[1:] != own.shape[1:]:
                raise ValueError(
                    f"{name}: expected {tuple(own.shape[1:])}, one for each tilt, or a batch of them, got "
                    f"{tuple(value.shape)}."
                )
            parameters[name] = value
        super().update_parameters(**parameters)
        if parameters.get("angles") is not None or parameters.get("defocus") is not None:
            self._measure()

    def A(self, x: torch.Tensor, **parameters) -> torch.Tensor:
        """Contrast (batch, channel, tilt, y, x) [1] of volumes (batch, channel, z, y, x) [V]."""
        self.update_parameters(**parameters)
        expect(self, x, self.volume_shape, "a volume (batch, channel, z, y, x)")
        items = [
            torch.stack([self._cut(self._see(volume, imaging)) for volume in item])
            for item, imaging in zip(x, self._imagings(x), strict=True)
        ]
        return torch.stack(items) / self.scale.to(x)

    def A_adjoint(self, y: torch.Tensor, **parameters) -> torch.Tensor:
        """Volumes (batch, channel, z, y, x) from images (batch, channel, tilt, y, x)."""
        self.update_parameters(**parameters)
        self.expect_images(y)
        items = [
            torch.stack([self._see_adjoint(self._padded(images), imaging) for images in item])
            for item, imaging in zip(y / self.scale.to(y), self._imagings(y), strict=True)
        ]
        return torch.stack(items)

    def _see(self, volume: torch.Tensor, imaging: Imaging) -> torch.Tensor:
        """Contrast (tilt, y, u) of a volume (z, y, x) on the padded field, without the scale."""
        return see(volume, imaging)

    def _see_adjoint(self, images: torch.Tensor, imaging: Imaging) -> torch.Tensor:
        return see_adjoint(images, imaging)

    # ------------------------------------------------------------------------------------------------------- geometry

    def _measure(self) -> None:
        """The field, wide enough for the steepest tilt and for how far the lens displaces; it never shrinks."""
        depth, rows, width = self.volume_shape
        steepest = float(self.angles.detach().abs().max())
        margin = 0
        if self.grid == "camera":
            edge = 0.5 / self.voxel_size  # [1/Å]
            rise = 0.5 * (math.tan(math.radians(steepest)) * width + depth) * self.voxel_size
            lens = self._lens(0)
            farthest = largest_displacement(lens.replace(defocus=torch.as_tensor(lens.defocus).abs() + rise), edge)
            margin = math.ceil(farthest / self.voxel_size) + 2
        fields = (self.image_shape[0], rows), (self.image_shape[1], self.image_shape[1])
        sizes = [fast_length(max(field) + 2 * margin) if self.grid == "camera" else max(field) for field in fields]
        needed = tilt_geometry(depth, width, sizes[1], self.grid, steepest)
        if "geometry" not in vars(self) or needed.period > self.geometry.period:
            self.geometry: TiltGeometry = needed
            self._rows = max(sizes[0], getattr(self, "_rows", 0))
            how = {**self._follows(), "accuracy": self.accuracy}
            self._nodes = node_counts(needed, steepest, self.optics.voltage, self.voxel_size, **how)

    def _follows(self) -> dict[str, bool]:
        return {"plane": self.heights != "none", "depth": self.heights == "all"}

    def _cut(self, images: torch.Tensor) -> torch.Tensor:
        return fitted(fitted(images, self.image_shape[0], -2), self.image_shape[1], -1)

    def _padded(self, images: torch.Tensor) -> torch.Tensor:
        return fitted(fitted(images, self._rows, -2), self.geometry.image_width, -1)

    # ------------------------------------------------------------------------------------------------------ parameters

    def _lens(self, item: int) -> Optics:
        return self.optics.replace(**{name: self._of(name, item).double() for name in LENS})

    def _of(self, name: str, item: int) -> torch.Tensor:
        values = getattr(self, name)
        return values[item if len(values) > 1 else 0]

    def _imagings(self, like: torch.Tensor) -> list[Imaging]:
        """How each item of a batch becomes its images; one for all where they share their parameters."""
        counts = {len(getattr(self, name)) for name in self.parameter_names} - {1}
        if counts - {len(like)}:
            raise ValueError(f"{type(self).__name__}: expected parameters of one or {len(like)} items, got {counts}.")
        several = [self._imaging(i, like.dtype) for i in range(len(like) if counts else 1)]
        return several if counts else several * len(like)

    def _imaging(self, item: int, dtype: torch.dtype) -> Imaging:
        angles = self._of("angles", item).double()
        shares, across, focus = heights(angles, self.geometry, self.voxel_size, self._nodes, **self._follows())
        passed = self._transfers(item, self.geometry, self._rows, self.hand * focus)
        passed = passed.to(dtype.to_complex() if passed.is_complex() else dtype)
        return Imaging(
            angles, self.geometry, self.volume_shape[1], self._rows, shares.to(dtype), across.to(dtype), passed
        )

    def _transfers(self, item: int, geometry: TiltGeometry, rows: int, focus: torch.Tensor) -> torch.Tensor:
        angles, shifts = (self._of(name, item).double() for name in ("angles", "shifts"))
        moved = hidden() or differentiated(shifts) or bool((shifts != 0).any())
        how = {"focus": focus, "shifts": shifts if moved else None, "fading": self.fading}
        return transfers(self._lens(item), angles, geometry, rows, self.voxel_size, **how)

    # --------------------------------------------------------------------------------------------------- least squares

    def _solve(
        self, z: torch.Tensor, y: torch.Tensor, damping: torch.Tensor, tolerance: float, max_iterations: int
    ) -> torch.Tensor:
        names = self.parameter_names
        items = []
        for i, (volumes, stacks) in enumerate(zip(z, y, strict=True)):
            parameters = [self._of(name, i) for name in names]
            system = self._system(names, tolerance, max_iterations)
            solved = [minimiser(system, v, s, damping[i], *parameters) for v, s in zip(volumes, stacks, strict=True)]
            items.append(torch.stack(solved))
        return torch.stack(items)

    def _system(self, names: Sequence[str], tolerance: float, max_iterations: int) -> Damped:
        """Least squares of one item, without the operator's scale, as functions of its parameters."""

        def with_parameters(parameters: Sequence[torch.Tensor]) -> ContrastProjection:
            other = copy.copy(self)
            given = {name: value[None] for name, value in zip(names, parameters, strict=True)}
            other._buffers = {**self._buffers, **given}
            return other

        def forward(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            own = with_parameters(parameters)
            return own._cut(own._see(x, own._imaging(0, x.dtype)))

        def solve(z, y, damping, *parameters) -> tuple[torch.Tensor, int]:
            own = with_parameters(parameters)
            imaging = own._imaging(0, z.dtype)
            if own._is_closed():
                action = contrast_solver(imaging.angles, damping, own.geometry, own._constant())
                rest = y - own._cut(own._see(z, imaging))
                return z + backproject_filtered(rest, imaging.angles, own.geometry, action), 0

            def normal(x: torch.Tensor) -> torch.Tensor:
                return own._see_adjoint(own._padded(own._cut(own._see(x, imaging))), imaging) + damping * x

            precondition = edgeless_inverse(imaging.angles, damping, own.geometry, own._constant(), z)
            target = own._see_adjoint(own._padded(y), imaging) + damping * z
            return conjugate_gradients(normal, precondition, target, tolerance, max_iterations)

        return Damped(forward, solve, tolerance, max_iterations)

    @torch.no_grad()
    def approximate_inverse(self, damping: float, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `TiltPhysics`: of one defocus an image; parameters are those of the first item."""
        own = torch.as_tensor(damping, dtype=torch.float64, device=like.device) * self.scale.double() ** 2
        act = edgeless_inverse(self._of("angles", 0), own, self.geometry, self._constant(), like)
        return lambda volumes: (
            torch.stack([torch.stack([act(v) for v in item]) for item in volumes]) * self.scale.to(like) ** 2
        )

    def open_sided(self, images: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
        """Damped least squares of specimens that reach on beyond the volume, on the camera grid: see `least_squares`.

        Images (batch, channel, tilt, y, x), each of the defocus at the box centre; the `damping` () belongs to the
        operator without its scale.
        """
        rows, width = self.padded_shape
        several = max(len(getattr(self, name)) for name in self.parameter_names)
        if several not in (1, len(images)):
            raise ValueError(f"least_squares: expected parameters of one or {len(images)} items, got {several}.")
        volumes, action = [], None
        for i, item in enumerate(images * self.scale.to(images)):
            angles = self._of("angles", i)
            if action is None or several > 1:
                transfer = lens_transfer(self, rows, i if several > 1 else 0).permute(2, 0, 1)  # (k, tilt, ky)
                action = contrast_solver(angles, damping, self.geometry, transfer[: self.geometry.n_frequencies])
            padded = fitted(fitted(item, rows, -2), width, -1)
            made = [backproject_filtered(stack, angles, self.geometry, action) for stack in padded]
            volumes.append(self.fit_rows(torch.stack(made)))
        return torch.stack(volumes)

    def _is_closed(self) -> bool:
        """Whether least squares is a closed form: periodic images of the volume's rows, each of one defocus."""
        return self.grid == "stretched" and self.heights == "none" and self.volume_shape[1] == self.image_shape[0]

    @torch.no_grad()
    def _constant(self) -> torch.Tensor:
        """T (k, tilt, ky) of `contrast_inverse`: the transfer of one defocus at the frequencies of the volume."""
        passed = lens_transfer(self, self.volume_shape[1])  # (tilt, ky, k)
        return passed[..., : self.geometry.n_frequencies].permute(2, 0, 1)

    def squared_norm(self) -> torch.Tensor:
        """|A|^2 () of one defocus an image, without edges: next to no image of several exceeds it."""
        passed = self._constant().abs().square().amax(2)  # (k, tilt)
        strongest = largest_eigenvalue(self._of("angles", 0).detach().double(), self.geometry) * passed.max()
        return (strongest / self.scale**2).to(self.angles.dtype)

    def _least_damping(self, dtype: torch.dtype) -> float:
        return 1e-12 if self._is_closed() and dtype == torch.float64 else 1e-6


class EwaldProjection(ContrastProjection):
    """`ContrastProjection` with the defocus of every voxel its own: the curved Ewald sphere, with both side-bands.

    Matters where the thickness t is more than 0.7 d^2 / lambda, for detail of the size d. Arguments as there, but for
    `heights`.
    """

    def __init__(
        self,
        angles: Sequence[float] | torch.Tensor,
        volume_shape: tuple[int, int, int],
        voxel_size: float,
        optics: Optics,
        image_shape: tuple[int, int] | None = None,
        grid: Grid = "camera",
        **options,
    ) -> None:
        super().__init__(angles, volume_shape, voxel_size, optics, image_shape, grid, heights="all", **options)
