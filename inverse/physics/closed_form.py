"""Damped least squares of the tilt projection: closed form, or few iterations preconditioned by it.

Write A = S^H B F: F the unitary transform of the volume along x, B(k) the (tilts x depth) matrices of projection with
entries b_i exp(-2 pi i z k tan t_i), and S the transform of the images. On the stretched grid F and S are the same
unitary transform and b = 1 / cos t, so that

    A A^H = S^H G S,      G_ij(k) = b_i b_j sum_z exp(-2 pi i z k (tan t_i - tan t_j))                   (1)

is, for each k, one (tilts x tilts) matrix, a Dirichlet kernel of the depth, and the minimiser of
|A x - y|^2 + lambda |x - z|^2 is

    x = z + A^H (lambda + A A^H)^-1 (y - A z) = z + A^H S^H (lambda + G)^-1 S (y - A z).                 (2)

On the camera grid the same holds with b = cos^(-1/2) t up to the edges of volume and image. There the normal equations
(lambda + A^H A) x = A^H y + lambda z are solved by conjugate gradients, preconditioned by the inverse of the operator
without edges, which by Woodbury's identity needs the same small matrices:

    (lambda + F^H B^H B F)^-1 = (1 - F^H B^H (lambda + G)^-1 B F) / lambda.                              (3)

All rows y are seen by the same operator, so they are many right-hand sides of one system, and every row may use the
directions that all others have explored: block conjugate gradients (O'Leary 1980, doi:10.1016/0024-3795(80)90247-5).
An iteration costs a product with A^H A for each row, as it would row by row, and a few small dense products.

The small matrices are factored in float64 whatever the precision of the data: at low frequency all tilts see nearly
the same, and they are nearly singular.

Gradients follow from the optimality condition, not from the iterations: with v = (lambda + A^H A)^-1 g, where g is the
gradient of a loss with respect to x, the loss changes by <v, d[A^H (y - A x) + lambda (z - x)]> at fixed x and v.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from cryosim.core.fourier import dirichlet_kernel
from inverse.physics.spectral import (
    Placement,
    TiltGeometry,
    backproject,
    cosines,
    frequencies,
    frequencies_first,
    image_matrices,
    pair_weights,
    project,
    resolved,
    shear,
    shear_adjoint,
    shear_matrices,
    slopes,
    transform_x,
    transform_x_adjoint,
)

PRECONDITIONER_FLOOR = 1e-2
"""Least damping, in units of |A|^2, that the preconditioner works with: below, it would trust directions that the edges
have changed. Measured where the damping is 1e-3: a tenth of it takes 1.7 times the iterations, with few rows."""

_FLOOR_OF_MANY_ROWS = 1e-3
"""Instead, from 64 rows in a block on: those directions are soon explored. Measured: 5 to 12 iterations rather than 8
to 13 with 128 rows."""

_ROWS_TOGETHER = 128
"""Most rows in one block: their small dense products cost less than A^H A of them does."""


def damped_least_squares(
    z: torch.Tensor,
    images: torch.Tensor,
    angles: torch.Tensor,
    damping: torch.Tensor,
    geometry: TiltGeometry,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
) -> torch.Tensor:
    """Minimiser (z, row, x) of |A x - images|^2 + damping |x - z|^2; differentiable in everything but the geometry.

    Parameters
    ----------
    z : tensor (z, row, x)
    images : tensor (tilt, row, u)
    angles : tensor (tilt,)
        [deg].
    damping : tensor ()
        lambda > 0 [voxel^2].
    geometry : TiltGeometry
    tolerance : float
        Of |A^H (A x - y) + lambda (x - z)| relative to |A^H y + lambda z|; used on the camera grid only.
    max_iterations : int
        On the camera grid; a warning says so when they do not suffice.
    """

    def forward(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return project(x, angles, geometry)

    def solved(z, images, damping, angles) -> tuple[torch.Tensor, int]:
        return solve(z, images, angles, damping, geometry, tolerance, max_iterations)

    return minimiser(Damped(forward, solved, tolerance, max_iterations), z, images, damping, angles)


class Damped(NamedTuple):
    """How to minimise |A x - y|^2 + damping |x - z|^2.

    Attributes
    ----------
    forward : callable (x, *parameters) -> A x
        Differentiable.
    solve : callable (z, y, damping, *parameters) -> (x, iterations)
        Without gradients; the iterations are max_iterations + 1 where the tolerance was not reached.
    tolerance : float
    max_iterations : int
    """

    forward: Callable[..., torch.Tensor]
    solve: Callable[..., tuple[torch.Tensor, int]]
    tolerance: float
    max_iterations: int


def minimiser(
    system: Damped, z: torch.Tensor, y: torch.Tensor, damping: torch.Tensor, *parameters: torch.Tensor
) -> torch.Tensor:
    """The x of `system`, differentiable in z, y, damping and the parameters by the optimality condition."""
    return _Minimiser.apply(system, z, y, damping, *parameters)


def solve(
    z: torch.Tensor,
    images: torch.Tensor,
    angles: torch.Tensor,
    damping: torch.Tensor,
    geometry: TiltGeometry,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, int]:
    """As `damped_least_squares`, without gradients; also the number of iterations, 0 for the closed form."""
    if geometry.grid == "stretched":
        residual = images - project(z, angles, geometry)
        return z + backproject_filtered(residual, angles, geometry, gram_solver(angles, damping, geometry)), 0

    def normal(x: torch.Tensor) -> torch.Tensor:
        return backproject(project(x, angles, geometry), angles, geometry) + damping * x

    target = backproject(images, angles, geometry) + damping * z
    groups = target.chunk(-(-target.shape[1] // _ROWS_TOGETHER), 1)
    floor = PRECONDITIONER_FLOOR if groups[-1].shape[1] < 64 else _FLOOR_OF_MANY_ROWS
    precondition = edgeless_inverse(angles, damping, geometry, z, floor=floor)
    solved = [block_conjugate_gradients(normal, precondition, g, tolerance, max_iterations) for g in groups]
    return torch.cat([x for x, _ in solved], 1), max(iterations for _, iterations in solved)


def largest_eigenvalue(
    angles: torch.Tensor, geometry: TiltGeometry, placement: Placement | None = None
) -> torch.Tensor:
    """|A|^2 () [voxel^2] without edges: at k = 0 all tilts see the same, and G has rank one."""
    return geometry.depth * (_tilt_weights(angles, geometry, placement) ** 2).sum()


def gram_matrices(angles: torch.Tensor, geometry: TiltGeometry, placement: Placement | None = None) -> torch.Tensor:
    """G (k, tilt, tilt) [voxel^2] of equation (1), complex128."""
    slope = slopes(angles)
    turns = frequencies(geometry, angles.device)[:, None, None] * (slope[:, None] - slope[None, :])
    scale = edge_weights(angles, geometry, placement)
    return _dirichlet(turns, geometry.depth) * (scale[:, :, None] * scale[:, None, :])


def backproject_filtered(
    images: torch.Tensor,
    angles: torch.Tensor,
    geometry: TiltGeometry,
    action: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """F^H B^H action(S images): volume (z, row, x) from images (tilt, row, u), changed between in their frequencies.

    `action` maps (k, tilt, row), complex128, k >= 0, to the same shape. The volume that S^H would first bring back to
    images is not cut by the edges of the camera here: it reaches on over the whole period before it is cut to its box.
    """
    seen = action(image_frequencies(images, angles, geometry))  # (k, tilt, row)
    pairs = torch.stack([seen.real, seen.imag], 2).flatten(1, 2).to(images.dtype)  # (k, 2 tilt, row)
    weights = edge_weights(angles, geometry) / geometry.period**0.5
    weights = weights * pair_weights(geometry, images.device)[:, None]
    matrices = shear_matrices(angles, geometry, weights, images)
    return transform_x_adjoint(shear_adjoint(matrices, pairs), geometry)


def image_frequencies(images: torch.Tensor, angles: torch.Tensor, geometry: TiltGeometry) -> torch.Tensor:
    """S images: frequencies (k, tilt, row), complex128, of images (tilt, row, u)."""
    seen = frequencies_first(torch.bmm(image_matrices(angles, geometry, images), images.transpose(1, 2)))
    length = geometry.period * (cosines(angles) if geometry.grid == "camera" else torch.ones_like(cosines(angles)))
    return torch.complex(seen[:, 0::2].double(), seen[:, 1::2].double()) / length[:, None].sqrt()


def gram_solver(
    angles: torch.Tensor, damping: torch.Tensor, geometry: TiltGeometry
) -> Callable[[torch.Tensor], torch.Tensor]:
    """(damping + G)^-1 acting on frequencies (k, tilt, row): for `backproject_filtered`."""
    factor = _factor(angles, damping, geometry)
    return lambda seen: torch.cholesky_solve(seen, factor)


class _Minimiser(torch.autograd.Function):
    @staticmethod
    def forward(system, z, y, damping, *parameters):
        x, iterations = system.solve(z, y, damping, *parameters)
        if iterations > system.max_iterations:
            warnings.warn(
                f"damped least squares: {system.max_iterations} iterations did not reach the tolerance "
                f"{system.tolerance:g}; the result is approximate. Allow more iterations or a stronger damping (a "
                "smaller gamma).",
                stacklevel=2,
            )
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.system, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, x = ctx.saved_tensors
        z, y, damping, *parameters = inputs
        v, _ = ctx.system.solve(gradient / damping, torch.zeros_like(y), damping, *parameters)
        with torch.enable_grad():
            fresh = [t.detach().requires_grad_(n) for t, n in zip(inputs, ctx.needs_input_grad[1:], strict=True)]
            z, y, damping, *parameters = fresh
            misfit = y - ctx.system.forward(x, *parameters)
            change = (ctx.system.forward(v, *parameters) * misfit).sum() + damping * (v * (z - x)).sum()
        found = iter(torch.autograd.grad(change, [t for t in fresh if t.requires_grad], allow_unused=True))
        return None, *(next(found) if t.requires_grad else None for t in fresh)


def edgeless_inverse(
    angles: torch.Tensor,
    damping: torch.Tensor,
    geometry: TiltGeometry,
    like: torch.Tensor,
    placement: Placement | None = None,
    *,
    floor: float = PRECONDITIONER_FLOOR,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Equation (3) as a function of a volume (z, row, x): the preconditioner on the camera grid."""
    strongest = largest_eigenvalue(angles, geometry, placement)
    damping = torch.maximum(damping.double(), floor * strongest)
    matrices = shear_matrices(angles, geometry, edge_weights(angles, geometry, placement), like)
    inverse = torch.cholesky_inverse(_factor(angles, damping, geometry, placement))  # (k, tilt, tilt)
    rows = [torch.stack([inverse.real, -inverse.imag], -1), torch.stack([inverse.imag, inverse.real], -1)]
    small = torch.stack(rows, 2).flatten(3).flatten(1, 2).to(like.dtype)  # (k, 2 tilt, 2 tilt), pairs tilt-major
    small = small * (pair_weights(geometry, like.device) / geometry.period).to(like.dtype)[:, None, None]

    def apply(volume: torch.Tensor) -> torch.Tensor:
        seen = torch.bmm(small, shear(matrices, transform_x(volume, geometry)))
        return (volume - transform_x_adjoint(shear_adjoint(matrices, seen), geometry)) / damping.to(volume)

    return apply


def block_conjugate_gradients(
    operator: Callable[[torch.Tensor], torch.Tensor],
    precondition: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, int]:
    """Preconditioned conjugate gradients on volumes (z, row, x) of which every row meets the same operator.

    The residual is recomputed at the end, and iterated on where rounding has left more of it than was asked. The count
    is max_iterations + 1 where the tolerance was not reached.

    Parameters
    ----------
    operator, precondition : callable
        Linear, symmetric and positive, from volumes (z, row, x), of any number of rows, to such.
    target : tensor (z, row, x)
    tolerance : float
        Of the residual, relative to the target.
    max_iterations : int
    """
    depth, _, width = target.shape

    def on_block(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda block: act(block.unflatten(1, (depth, width)).transpose(0, 1)).transpose(0, 1).flatten(1)

    system, nearby = on_block(operator), on_block(precondition)
    right = residual = target.transpose(0, 1).flatten(1)  # (row, z x)
    x, left, goal = torch.zeros_like(right), right.norm(), tolerance * right.norm()
    used = 0
    while left > goal and used < max_iterations:
        change, iterations = _block_krylov(system, nearby, residual, goal, max_iterations - used)
        used += iterations
        x = x + change
        before, residual = left, right - system(x)
        left = residual.norm()
        if not left < 0.5 * before:
            break  # rounding allows no more
    used = used if left <= goal else max_iterations + 1
    return x.unflatten(1, (depth, width)).transpose(0, 1).contiguous(), used


def _block_krylov(
    operator: Callable[[torch.Tensor], torch.Tensor],
    precondition: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    goal: torch.Tensor,
    max_iterations: int,
) -> tuple[torch.Tensor, int]:
    """One run from zero, on blocks (row, n): an approximate solution, and how many iterations it took.

    Dubrulle's form BCGrQ (2001, Electron. Trans. Numer. Anal. 12, 216): the residual block is kept as C^T Q with the
    rows of Q orthonormal, here in the preconditioner's metric. Equal and zero rows leave fewer rows in Q than in the
    block, and no small matrix is singular.
    """
    x = torch.zeros_like(target)
    q, direction, c = _orthonormal(target, precondition(target))
    for iteration in range(1, max_iterations + 1):
        image = operator(direction)
        step = torch.linalg.pinv(_products(direction, image), hermitian=True)  # (s, s)
        x = x + (step @ c).T.to(x) @ direction
        rest = q - step.to(x) @ image
        if (c.T.to(x) @ rest).norm() <= goal:
            return x, iteration
        q, preconditioned, triangle = _orthonormal(rest, precondition(rest))
        c = triangle @ c
        direction = preconditioned + triangle.to(x) @ direction
    return x, max_iterations


def _orthonormal(block: torch.Tensor, preconditioned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q and M^-1 Q, (s, n), with Q M^-1 Q^T = 1, and C (s, row), float64, with C^T Q = block, of M^-1 block beside it.

    From the eigenvectors of the products of the rows brought to one length; those of next to no eigenvalue, which
    dependent rows have, are left out.
    """
    products = _products(block, preconditioned)
    length = products.diagonal().clamp_min(0).sqrt()
    per_length = torch.where(length > 0, 1 / length, torch.zeros_like(length))
    values, vectors = torch.linalg.eigh(products * per_length[:, None] * per_length)
    kept = values > _DEPENDENT[block.dtype] * values[-1]
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    new = (per_length[:, None] * vectors / roots).T.to(block)
    return new @ block, new @ preconditioned, (length[:, None] * vectors * roots).T


_DEPENDENT = {torch.float64: 1e-14, torch.float32: 1e-11}
"""Eigenvalue, relative to the largest, below which a combination of rows is rounding error."""


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Scalar products (s, s) of the rows of a and of b, both (s, n), made symmetric, in float64."""
    products = a.double() @ b.double().T
    return (products + products.T) / 2


def conjugate_gradients(
    operator: Callable[[torch.Tensor], torch.Tensor],
    precondition: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, int]:
    """Preconditioned conjugate gradients.

    Polak-Ribière's form of beta, which forgives a preconditioner that is symmetric only to rounding. The count is
    max_iterations + 1 where the tolerance was not reached.
    """
    x, residual = torch.zeros_like(target), target
    goal = tolerance * target.norm()
    if not goal > 0:
        return x, 0
    direction = preconditioned = precondition(residual)
    product = (residual * preconditioned).sum()
    for iteration in range(1, max_iterations + 1):
        image = operator(direction)
        step = _ratio(product, (direction * image).sum())
        x = x + step * direction
        previous, residual = residual, residual - step * image
        if residual.norm() <= goal:
            return x, iteration
        preconditioned = precondition(residual)
        beta = _ratio(((residual - previous) * preconditioned).sum(), product)
        product = (residual * preconditioned).sum()
        direction = preconditioned + beta * direction
    return x, max_iterations + 1


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def _tilt_weights(angles: torch.Tensor, geometry: TiltGeometry, placement: Placement | None) -> torch.Tensor:
    """b (tilt,) of equation (1); where images are magnified by m, times m, the root of how their area grows."""
    size = 1.0 if placement is None else placement.magnifications.double()
    return size * cosines(angles) ** (-1.0 if geometry.grid == "stretched" else -0.5)


def edge_weights(angles: torch.Tensor, geometry: TiltGeometry, placement: Placement | None = None) -> torch.Tensor:
    """b (k, tilt) of equation (1), 0 where a frequency is not resolved."""
    return _tilt_weights(angles, geometry, placement) * resolved(angles, geometry, placement)


def _factor(
    angles: torch.Tensor, damping: torch.Tensor, geometry: TiltGeometry, placement: Placement | None = None
) -> torch.Tensor:
    eye = torch.eye(len(angles), dtype=torch.complex128, device=angles.device)
    return torch.linalg.cholesky(gram_matrices(angles, geometry, placement) + damping.double() * eye)


def _dirichlet(turns: torch.Tensor, depth: int) -> torch.Tensor:
    """sum of exp(-2 pi i z turns) over the samples z of an axis of `depth`, complex128."""
    total = dirichlet_kernel(turns, 2 * ((depth - 1) // 2) + 1) + 0j  # samples symmetric about 0
    if depth % 2 == 0:  # and the first sample, z = -depth / 2, which has no partner
        phase = torch.pi * depth * (turns - turns.detach().round())
        total = total + torch.polar(torch.ones_like(phase), phase)
    return total
