"""How the specimen bent from tilt to tilt, learned with the neural field that is the volume: ICE-TIDE's way.

What is seen at (u, v) in tilt t stood at (u', v'), where

    (u', v') + e_t(u' / cos t, v') = (u, v),     e_t(x, y) = sum over c of B_c(x, y) D_tc                       (1)

with cubic B-splines B over control points that span the field, so a tilt of the bent specimen is one of the straight
volume, read at other places, and as much less as it is spread (Debarnot, Kishore, Righetto, Khorashadizadeh & Dokmanić
2024 have rays that end there). The misfit of `inverse.solvers.implicit` is then that of the parameters of the volume
and of D at once, with |D|^2 / 2 w^2 besides.

Volume and displacements may have errors that cancel: what a displacement of a part of the specimen, the same in all
tilts, would make only puts that part elsewhere, and is taken out of D. What else the volume learns in the place of D
is not: `inverse.align` finds the same D from the covariances of the images, without a volume, and its standard errors.
"""

from __future__ import annotations

import torch
from torch.nn.functional import grid_sample

from inverse.physics.deformed import displacement, free_shifts, twice
from inverse.physics.tilt import TiltProjection
from inverse.solvers.implicit_misfit import ForwardOperator, Misfit, WholeMisfit
from inverse.solvers.primal_dual import expect_positive

CONTROL = 4
"""Points along each side of the field."""

_RATE = 0.05
"""Of Adam [px]; the least of the misfit is found to a few hundredths."""


class Bending(torch.nn.Module):
    """Displacements (1) as parameters: straight images (tilt, y, x) -> those of the bent specimen.

    Parameters
    ----------
    angles : tensor (tilt,)
        [deg]; the tilt axis is y.
    shape : (int, int)
        (y, x) of the images [px].
    width : float
        w, what control points are expected to be displaced [px].
    """

    angles: torch.Tensor
    free: torch.Tensor

    def __init__(self, angles: torch.Tensor, shape: tuple[int, int], width: float) -> None:
        super().__init__()
        self.shape, self.width, self.rate = shape, width, _RATE
        self.register_buffer("angles", torch.deg2rad(angles.double()))
        self.register_buffer("free", free_shifts(angles.double()))  # (2 tilt, parameter)
        start = torch.zeros(len(angles), 2, CONTROL, CONTROL, dtype=torch.float64)
        self.control = torch.nn.Parameter(start.to(angles.device))

    def displacement(self) -> torch.Tensor:
        """D (tilt, 2, y, x) across and along the axis [px], less what would only put the specimen elsewhere."""
        flat = self.control.transpose(0, 1).flatten(0, 1).flatten(1)  # (2 tilt, point)
        kept = self.free @ (self.free.T @ flat)
        return kept.unflatten(0, (2, -1)).unflatten(2, (CONTROL, CONTROL)).transpose(0, 1)

    def prior(self) -> torch.Tensor:
        """|D|^2 / 2 w^2 ()."""
        return self.displacement().square().sum() / (2 * self.width**2)

    def forward(self, straight: torch.Tensor) -> torch.Tensor:
        """Images (tilt, y, x) of the bent specimen, of those of the straight one; 0 from beyond their edges."""
        ny, nx = self.shape
        v, u = (torch.arange(n, dtype=torch.float64, device=straight.device) - n // 2 for n in (ny, nx))
        seen = torch.stack(torch.broadcast_tensors(u, v[:, None]))  # (2, y, x)
        stood = seen.expand(len(straight), -1, -1, -1)  # (tilt, 2, y, x)
        moved = self.displacement()
        for _ in range(3):  # |e| times the cube of its slope is left, less than a thousandth of a pixel
            x = stood[:, 0] / torch.cos(self.angles)[:, None, None]
            stood = seen - displacement(moved, x, stood[:, 1], self.shape)
        # samples twice as fine, with the centre n // 2 of each axis on an even one
        at = stood.permute(0, 2, 3, 1) + seen.new_tensor([nx // 2, ny // 2])
        at = 4 * at / seen.new_tensor([2 * nx - 1, 2 * ny - 1]) - 1
        fine = twice(straight)
        read = grid_sample(fine[:, None], at.to(fine), mode="bicubic", align_corners=True)[:, 0]
        (u_v, u_u), (v_v, v_u) = (torch.gradient(stood[:, i], dim=(1, 2)) for i in (0, 1))
        return read * (u_u * v_v - u_v * v_u).to(read)  # what is spread over more pixels is less in each


class BentMisfit(WholeMisfit):
    """Misfit of a whole volume whose images are bent; parameters as in `WholeMisfit`, and w of `Bending`.

    With v > 0 the loss has the gradient of equation (3) there in the volume, and that of the likelihood in D.

    Raises
    ------
    ValueError
        For anything but a `TiltProjection` of nothing but angles, or a width that is not positive.
    """

    def __init__(
        self,
        physics: ForwardOperator,
        images: torch.Tensor,
        noise: torch.Tensor,
        fitted: torch.Tensor,
        variance: float,
        width: float,
    ) -> None:
        if not isinstance(physics, TiltProjection) or len(physics.angles) != 1:
            raise ValueError("bends: expected a TiltProjection of one series.")
        _ = physics.geometry  # which refuses all but tilts about y
        expect_positive(bends=width)
        super().__init__(physics, images, noise, fitted, variance)
        self.bending = Bending(physics.angles[0], physics.image_shape, width)

    def __call__(self, volume: torch.Tensor, rows: torch.Tensor | None = None) -> Misfit:
        """Of a volume (z, y, x), differentiable in it and in D; there are no rows to choose."""
        straight = self.physics.A(volume[None, None])
        if self.nearby is not None:
            straight = straight.detach().requires_grad_()
        residual = self.bending(straight[0, 0]) - self.images
        loss = 0.5 * (residual.square() * self.fitted / self.noise).sum() + self.bending.prior().to(residual)
        if self.nearby is not None:
            assert isinstance(self.physics, TiltProjection)
            (back,) = torch.autograd.grad(loss, straight, retain_graph=True)
            with torch.no_grad():
                gradient = self.damping * self.nearby(self.physics.A_adjoint(back))[0, 0]
            loss = loss + (volume * gradient).sum()
        return self.found(loss, residual)

    def straight(self, volume: torch.Tensor) -> torch.Tensor:
        """Images (tilt, y, x) had nothing bent: those of a volume (z, y, x), and what it leaves of the measured."""
        seen = self.physics.A(volume[None, None])[0, 0]
        return seen + self.images - self.bending(seen)
