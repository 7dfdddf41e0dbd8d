"""What all operators of a tilt series share: a volume tilted about y, one image for each tilt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from deepinv.physics import LinearPhysics

from inverse.physics.spectral import fitted


class TiltPhysics(LinearPhysics):
    """A linear operator from volumes (batch, channel, z, y, x) to images (batch, channel, tilt, y, x).

    All methods are differentiable in the volume, the data and the parameters. Parameters given to a call stay, as
    deepinv's `update` has it; nothing else does.

    Parameters
    ----------
    angles : sequence of float, or tensor (tilt,) or (batch, tilt)
        [deg]; kept as the buffer `angles` (1 or batch, tilt), so `update(angles=...)` and gradients work.
    volume_shape : (int, int, int)
        (z, y, x) [voxel].
    image_shape : (int, int), optional
        (y, x) [px] of the camera; (y, x) of the volume when left out.
    tolerance, max_iterations
        Of `prox_l2` and `A_dagger` where they have no closed form.
    **physics
        Further arguments of deepinv's LinearPhysics, such as `noise_model`.

    Raises
    ------
    ValueError
        For shapes that do not fit, or angles that are not finite.
    """

    angles: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        angles: Sequence[float] | torch.Tensor,
        volume_shape: tuple[int, int, int],
        image_shape: tuple[int, int] | None = None,
        *,
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
        depth, rows, width = volume_shape
        self.volume_shape: tuple[int, int, int] = (depth, rows, width)
        rows, width = image_shape or (rows, width)
        self.image_shape: tuple[int, int] = (rows, width)
        self.register_buffer("angles", angles)
        self.register_buffer("scale", torch.ones((), dtype=angles.dtype))

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

        In closed form where there is one; else by conjugate gradients preconditioned with one, to `tol`.

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
        damping = (self.scale.to(y) ** 2 / gamma).expand(len(y))
        return self._solve(z, y * self.scale.to(y), damping, tol or self.tol, max_iter or self.max_iter)

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

        The damping, in units of |A|^2, is near the rounding error of a closed form (1e-6 in float32, 1e-12 in float64)
        and 1e-6 where iterations would resolve no less. Arguments as in `prox_l2`.
        """
        self.expect_images(y)
        z = y.new_zeros((*y.shape[:2], *self.volume_shape))
        damping = (self._least_damping(y.dtype) * self.squared_norm() * self.scale**2).to(y).expand(len(y))
        return self._solve(z, y * self.scale.to(y), damping, tol or self.tol, max_iter or self.max_iter)

    @abstractmethod
    def _solve(
        self, z: torch.Tensor, y: torch.Tensor, damping: torch.Tensor, tolerance: float, max_iterations: int
    ) -> torch.Tensor:
        """Damped least squares for each item; `damping` (batch,) belongs to the operator without its scale."""

    @abstractmethod
    def _least_damping(self, dtype: torch.dtype) -> float:
        """That of `A_dagger`, in units of |A|^2."""

    @abstractmethod
    def approximate_inverse(self, damping: float, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """(A^T A + damping)^-1 of the operator without edges, as a function of volumes (batch, channel, z, y, x).

        Symmetric and positive: a preconditioner. Volumes are of the type of `like`; without gradients. Where the
        operator has no edges it is exact; else a damping that is too weak for it is raised.
        """

    @abstractmethod
    def squared_norm(self) -> torch.Tensor:
        """|A|^2 () of the operator without edges, which may only lessen it."""

    def expect_images(self, images: torch.Tensor) -> None:
        """Raise ValueError unless `images` are what this operator makes."""
        expect(self, images, (self.angles.shape[-1], *self.image_shape), "images (batch, channel, tilt, y, x)")

    def fit_rows(self, images: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Images cut or padded with zeros to `rows` (those of the volume), about the centre row n // 2."""
        return fitted(images, self.volume_shape[1] if rows is None else rows, -2)


def expect(operator: object, given: torch.Tensor, shape: Sequence[int], what: str) -> None:
    """Raise ValueError, in the name of an operator, unless `given` is (batch, channel, *shape)."""
    if given.ndim != 5 or tuple(given.shape[2:]) != tuple(shape):
        raise ValueError(
            f"{type(operator).__name__}: expected {what} with the last sizes {tuple(shape)}, got {tuple(given.shape)}."
        )
