"""A neural field and how the specimen bent: displacements are those of the operators, and learned with the volume."""

import pytest
import torch

import inverse as inv
from cryosim import Optics
from inverse.calibration.alignment import _shortest
from inverse.physics.deformed import free_shifts
from inverse.solvers.implicit import implicit
from inverse.solvers.implicit_bent import Bending, BentMisfit

ANGLES = torch.linspace(-50, 50, 11, dtype=torch.float64)


def drawn(bending: Bending, size: float, generator: torch.Generator) -> torch.Tensor:
    """D of some size [px] at random, which `bending` then has."""
    with torch.no_grad():
        bending.control.copy_(torch.randn(bending.control.shape, generator=generator, dtype=torch.float64) * size)
    return bending.displacement().detach()


def test_a_bent_specimen_is_seen_as_the_operator_of_deformed_ones_has_it(generator):
    """A thin one: matter is carried along, and its places are where they should be."""
    shape = (3, 31, 40)
    y, x = torch.arange(31.0).double() - 15, torch.arange(40.0).double() - 20
    layer = torch.exp(-(x**2) / 40 - y[:, None] ** 2 / 30) * (1 + torch.cos(0.7 * x - 0.5 * y[:, None]))
    volume = torch.stack([0 * layer, layer, 0 * layer])[None, None]
    bending = Bending(ANGLES, shape[1:], 4.0)
    moved = drawn(bending, 0.7, generator)
    lens = Optics(300.0, defocus=100.0, spherical_aberration=0.0, amplitude_contrast=1.0)
    deformed = inv.DeformedProjection(ANGLES, shape, 5.0, lens, deformation=5.0 * _shortest(moved, ANGLES)).A(volume)
    plain = inv.DeformedProjection(ANGLES, shape, 5.0, lens).A(volume)
    straight = inv.TiltProjection(ANGLES, shape).A(volume)
    scale = (plain * straight).sum() / (straight * straight).sum()  # of the lens
    error = scale * bending(straight[0, 0]).detach() - deformed[0, 0]
    inner = (slice(None), slice(6, -6), slice(6, -6))
    assert error[inner].norm() < 0.1 * (deformed - plain)[0, 0][inner].norm()


@pytest.mark.parametrize("shape", [(8, 7), (9, 12)])
def test_nothing_is_displaced_to_begin_with(shape, generator):
    images = torch.randn(len(ANGLES), *shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(Bending(ANGLES, shape, 4.0)(images), images, atol=1e-12, rtol=0)


def test_what_only_puts_the_specimen_elsewhere_is_no_displacement(generator):
    bending = Bending(ANGLES, (9, 8), 4.0)
    moved = drawn(bending, 1.0, generator).transpose(0, 1).flatten(0, 1).flatten(1)
    free = free_shifts(ANGLES)
    torch.testing.assert_close(free @ (free.T @ moved), moved)
    t = torch.deg2rad(ANGLES)[:, None, None]
    elsewhere = torch.stack([2 * torch.cos(t) - 3 * torch.sin(t), torch.ones_like(t)], 1).expand(-1, -1, 4, 4)
    with torch.no_grad():
        bending.control.copy_(elsewhere)
    assert float(bending.displacement().detach().abs().max()) < 1e-12


@pytest.mark.parametrize("variance", [0.0, 0.3])
def test_gradients_of_the_misfit(variance, generator):
    """In D by finite differences, whatever the metric; in the volume that of the likelihood, or of equation (3)."""
    physics = inv.TiltProjection(ANGLES, (4, 9, 10))
    images = torch.randn(len(ANGLES), 9, 10, generator=generator, dtype=torch.float64)
    noise = torch.full((len(ANGLES), 1, 1), 1.3, dtype=torch.float64)
    fitted = (torch.rand(images.shape, generator=generator) > 0.2).double()
    misfit = BentMisfit(physics, images, noise, fitted, variance, 4.0)
    plain = BentMisfit(physics, images, noise, fitted, 0.0, 4.0)
    plain.bending = misfit.bending
    drawn(misfit.bending, 0.5, generator)
    volume = torch.randn(4, 9, 10, generator=generator, dtype=torch.float64).requires_grad_()
    control = misfit.bending.control
    in_volume, in_control = torch.autograd.grad(misfit(volume).loss, (volume, control))
    way = torch.randn(control.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        start, values = control.clone(), []
        for sign in (1, -1):
            control.copy_(start + sign * 1e-5 * way)
            values.append(float(plain(volume).loss))
        control.copy_(start)
    assert float((in_control * way).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    (wanted,) = torch.autograd.grad(plain(volume).loss, volume)
    if variance:
        wanted = misfit.damping * misfit.nearby(wanted[None, None])[0, 0]
    torch.testing.assert_close(in_volume, wanted)


def test_displacements_are_learned_with_the_volume(generator):
    """A slab of blobs, with a tenth as much noise: not half of the displacements is left, and hidden pixels tell."""
    shape = (10, 40, 72)
    volume = torch.randn(shape, generator=generator, dtype=torch.float64)
    k = [torch.fft.fftfreq(n) for n in shape]
    square = k[0][:, None, None] ** 2 + k[1][:, None] ** 2 + k[2] ** 2
    volume = torch.fft.ifftn(torch.fft.fftn(volume) * torch.exp(-square / (2 * 0.08**2))).real
    physics = inv.TiltProjection(ANGLES.float(), shape, (40, 40))
    bending = Bending(ANGLES, (40, 40), 4.0)
    moved = drawn(bending, 2.0, generator)
    clean = bending(physics.A(volume[None, None].float())[0, 0]).detach()
    noise = 0.1 * float(clean.var())
    images = clean + noise**0.5 * torch.randn(clean.shape, generator=generator)
    how = {"steps": 120, "generator": generator}
    straight, bent = implicit(physics, images, noise, **how), implicit(physics, images, noise, bends=2.0, **how)
    assert straight.displacement is None and bent.displacement is not None
    inner = (slice(None), slice(None), slice(1, 3), slice(1, 3))
    left, before = ((d[inner]).square().mean().sqrt() for d in (bent.displacement - moved, moved))
    assert before > 1.2 and left < before / 2
    assert bent.held_out_losses.min() < 0.8 * straight.held_out_losses.min()


def test_what_is_refused():
    images, generator = torch.randn(3, 8, 8), torch.Generator().manual_seed(0)
    turned = inv.TiltProjection([-30.0, 0.0, 30.0], (4, 8, 8), axis_angle=3.0)
    with pytest.raises(ValueError, match="about y alone"):
        implicit(turned, images, 1.0, bends=2.0, generator=generator)
    with pytest.raises(ValueError, match="positive"):
        implicit(inv.TiltProjection([-30.0, 0.0, 30.0], (4, 8, 8)), images, 1.0, bends=-2.0, generator=generator)
