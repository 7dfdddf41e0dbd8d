"""`MultisliceProjection`: images of a thick specimen by multislice electron waves, as a nonlinear deepinv physics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from deepinv.physics import Physics

from cryosim.core.fourier import fast_length
from cryosim.microscope.imaging import image
from cryosim.microscope.optics import Optics, check_per_tilt, largest_displacement
from cryosim.microscope.scattering import multislice
from cryosim.specimen.potential import Slices
from inverse.physics.base import expect
from inverse.physics.contrast import LENS, EwaldProjection
from inverse.physics.spectral import fitted
from inverse.physics.turn import turned


class MultisliceProjection(Physics):
    """Intensity (1 = incident) of a volume in volts, each tilt by multislice through the turned volume.

    Volumes are (batch, channel, z, y, x) [V], images (batch, channel, tilt, y, x) [1]. Detail beyond two thirds of the
    Nyquist frequency is not in the images, as nothing there can be kept by multislice. Differentiable in the volume,
    the angles and the lens; tilts are computed one at a time, and their gradients hold a few waves each.

    Parameters
    ----------
    angles : sequence of float, or tensor (tilt,) or (1, tilt)
        [deg]; the buffer `angles` (1, tilt).
    volume_shape : (int, int, int)
        (z, y, x) [voxel].
    voxel_size : float
        Also of a pixel [Å].
    optics : Optics
        Fields () or (tilt,). Its defocus, astigmatism, astigmatism_angle and phase_shift become buffers (1, tilt).
    image_shape : (int, int), optional
        (y, x) [px]; (y, x) of the volume when left out.
    slice_thickness : float, optional
        [Å], rounded to whole voxels; one voxel when left out.
    **physics
        Further arguments of deepinv's Physics, such as `noise_model`.

    Raises
    ------
    ValueError
        For parameters that do not fit the tilts, tilts of 80 degrees or more, or slices thinner than half a voxel.

    Notes
    -----
    `linear` is its linearisation about the vacuum, but for the band limit: the start of a reconstruction.
    """

    angles: torch.Tensor

    def __init__(
        self,
        angles: Sequence[float] | torch.Tensor,
        volume_shape: tuple[int, int, int],
        voxel_size: float,
        optics: Optics,
        image_shape: tuple[int, int] | None = None,
        *,
        slice_thickness: float | None = None,
        **physics,
    ) -> None:
        super().__init__(**physics)
        self.linear = EwaldProjection(angles, volume_shape, voxel_size, optics, image_shape)
        self.volume_shape, self.image_shape = self.linear.volume_shape, self.linear.image_shape
        self.voxel_size, self.optics = float(voxel_size), optics
        self.layers = 1 if slice_thickness is None else round(slice_thickness / voxel_size)
        if self.layers < 1:
            raise ValueError(
                f"slice_thickness: expected at least a voxel of {voxel_size:g} Å, got {slice_thickness} Å."
            )
        if len(self.linear.angles) != 1 or float(self.linear.angles.abs().max()) >= 80:
            raise ValueError("angles: expected one list (tilt,) of angles below 80 degrees, the same for all items.")
        check_per_tilt(optics, self.linear.angles.shape[1])
        self.register_buffer("angles", self.linear.angles.clone())
        for name in LENS:
            self.register_buffer(name, getattr(self.linear, name).clone())

    def update_parameters(self, **parameters) -> None:
        """Take new angles, defocus, astigmatism, astigmatism_angle or phase_shift, (tilt,) or (1, tilt)."""
        for name in ("angles", *LENS):
            value = parameters.get(name)
            if value is not None:
                value = value[None] if value.ndim == 1 else value
                if value.shape != getattr(self, name).shape:
                    raise ValueError(f"{name}: expected {tuple(getattr(self, name).shape)}, got {tuple(value.shape)}.")
                parameters[name] = value
        super().update_parameters(**parameters)

    def A(self, x: torch.Tensor, **parameters) -> torch.Tensor:
        """Intensity (batch, channel, tilt, y, x) [1] of volumes (batch, channel, z, y, x) [V]."""
        self.update_parameters(**parameters)
        expect(self, x, self.volume_shape, "a volume (batch, channel, z, y, x)")
        tilts = range(self.angles.shape[1])
        return torch.stack([torch.stack([self._image(v, i) for i in tilts]) for v in x.flatten(0, 1)]).unflatten(
            0, x.shape[:2]
        )

    def A_vjp(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Gradient (batch, channel, z, y, x) of <A(x), v> in x; one tilt is held at a time."""
        expect(self, v, (self.angles.shape[1], *self.image_shape), "images (batch, channel, tilt, y, x)")
        gradient = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for c in range(x.shape[1]):
                for i in range(self.angles.shape[1]):
                    with torch.enable_grad():
                        volume = x[b, c].detach().requires_grad_()
                        product = (self._image(volume, i) * v[b, c, i]).sum()
                    gradient[b, c] += torch.autograd.grad(product, volume)[0]
        return gradient

    def A_adjoint(self, y: torch.Tensor, **parameters) -> torch.Tensor:
        """Adjoint (batch, channel, z, y, x) of the linearisation about the vacuum, for a start and for deepinv."""
        self.update_parameters(**parameters)
        return self._linear().A_adjoint(y)

    def A_dagger(self, y: torch.Tensor, x_init: torch.Tensor | None = None) -> torch.Tensor:
        """Damped least squares of the linearisation about the vacuum, a start [V]; deepinv's `x_init` is not needed."""
        linear = self._linear()
        return linear.prox_l2(None, y - 1, 100 / linear.squared_norm())

    def slices(self, volume: torch.Tensor, tilt: int) -> tuple[Slices, float]:
        """Slices of a volume (z, y, x) [V] as `tilt` sees it, and at which height its centre is in them [Å]."""
        return turned_slices(volume, self.angles[0, tilt], self.voxel_size, self.layers, self._field())

    def _image(self, volume: torch.Tensor, tilt: int) -> torch.Tensor:
        """Intensity (y, x) of one tilt."""
        slices, centre = self.slices(volume, tilt)
        lens = self.optics.index(tilt).replace(**{name: getattr(self, name)[0, tilt].double() for name in LENS})
        wave = multislice(slices, lens, plane=centre)
        seen = image(wave, lens, self.voxel_size)
        return fitted(fitted(seen, self.image_shape[0], -2), self.image_shape[1], -1)

    def _field(self) -> tuple[int, int]:
        """(y, x) [px] of the waves: image and volume, and what the lens displaces."""
        depth, rows, width = self.volume_shape
        radians = math.radians(float(self.angles.detach().abs().max()))
        rise = 0.5 * (math.tan(radians) * width + depth / math.cos(radians)) * self.voxel_size
        with torch.no_grad():
            lens = self.optics.replace(defocus=self.get_buffer("defocus")[0].double().abs() + rise)
            margin = math.ceil(largest_displacement(lens, 0.5 / self.voxel_size) / self.voxel_size) + 2
        across = math.ceil(width * math.cos(radians) + depth * math.sin(radians))
        sizes = max(self.image_shape[0], rows), max(self.image_shape[1], width, across)
        return fast_length(sizes[0] + 2 * margin), fast_length(sizes[1] + 2 * margin)

    def _linear(self) -> EwaldProjection:
        with torch.no_grad():
            self.linear.update(**{name: getattr(self, name) for name in ("angles", *LENS)})
        return self.linear


def turned_slices(
    volume: torch.Tensor, angle: torch.Tensor, voxel_size: float, layers: int, field: tuple[int, int]
) -> tuple[Slices, float]:
    """Slices of `layers` voxels each, of a field (y, x) [px], of a volume (z, y, x) [V] tilted by `angle` () [deg],
    and at which height its centre is in them [Å]."""
    depth, _, width = volume.shape
    radians = math.radians(abs(float(angle.detach())))
    height = depth * math.cos(radians) + width * math.sin(radians)
    n = math.ceil(height / layers / 2) * 2 + 1
    rows, columns = field
    matter = fitted(turned(volume, angle, n * layers, columns).transpose(0, 1), columns, -1).transpose(0, 1)
    matter = fitted(matter, rows, -2)
    values = matter.unflatten(0, (n, layers)).sum(1) * voxel_size  # (slice, y, u) [V·Å]
    middle = n // 2 * layers + (layers - 1) / 2  # of the middle slice, in layers
    return Slices(values, voxel_size, layers * voxel_size), (n * layers // 2 - middle) * voxel_size
