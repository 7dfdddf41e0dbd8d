"""The local network: before it is taught it is weighted back-projection, in any order of the tilts or the blocks."""

import pytest
import torch

from cryosim.io.files import FormatError
from inverse.physics.tilt import TiltProjection
from inverse.priors.local import LocalNetwork, pooled
from inverse.solvers.linear import least_squares, wbp
from inverse.solvers.local import angular_shares, filtered_tilts, local, ramp_filtered
from inverse.train_local import LocalPlan, example, local_loss, train_local

ANGLES = torch.arange(-60.0, 61.0, 5.0)


def awake(
    generator: torch.Generator, dtype: torch.dtype = torch.float32, features: int = 8, width: int = 32
) -> LocalNetwork:
    """A network whose correction is not zero: all weights drawn anew."""
    network = LocalNetwork(features, width).to(dtype)
    with torch.no_grad():
        for value in network.parameters():
            fan_in = max(1, value[0].numel())
            value.copy_(torch.randn(value.shape, generator=generator, dtype=dtype) / fan_in**0.5)
    return network.requires_grad_(False)


def blobs(generator: torch.Generator, shape: tuple[int, int, int], n: int) -> torch.Tensor:
    """Gaussian blobs of 1.2 to 3 voxels deviation, of variance one altogether."""
    grids = torch.meshgrid(*(torch.arange(size) - size // 2 for size in shape), indexing="ij")
    volume = torch.zeros(shape)
    for _ in range(n):
        centre = (torch.rand(3, generator=generator) - 0.5) * torch.tensor(shape)
        width = 1.2 + 1.8 * float(torch.rand((), generator=generator))
        square = sum((grid - c) ** 2 for grid, c in zip(grids, centre, strict=True))
        volume += torch.exp(-torch.as_tensor(square) / (2 * width**2)) * 2
    return volume / volume.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 17, 20), (11, 16, 21)])
def test_before_it_is_taught_it_is_least_squares_on_all_that_the_images_show(generator, dtype, shape):
    depth, rows, width = shape
    physics = TiltProjection(ANGLES.to(dtype), shape)
    images = torch.randn(len(ANGLES), rows, width, generator=generator, dtype=dtype)
    wide = TiltProjection(ANGLES.to(dtype), (depth, rows, 2 * width), (rows, width))  # at 60 degrees, twice the field
    network = LocalNetwork(scale=0.3).to(dtype)
    found = local(physics, images, network, noise=1.0)
    expected = least_squares(wide, images, 1 / 0.3**2)[..., width - width // 2 : 2 * width - width // 2]
    assert (found.volume - expected).abs().max() <= 1e-4 * expected.abs().max()
    noise = filtered_tilts(physics, images, 1.0, 0.3).noise.square().sum()
    assert torch.allclose(found.std, 0.3 * (noise / (0.3**2 + noise)).sqrt().expand(shape), rtol=1e-5)


def test_the_filtered_tilts_summed_over_the_voxels_projections_are_the_back_projection(generator):
    # smooth blobs: linear interpolation of a feature image is right to a few per cent there
    volume = blobs(generator, (16, 8, 48), 6)
    physics = TiltProjection(ANGLES, (16, 8, 48))
    images = physics.A(volume[None, None])[0, 0]
    sums, seen = pooled(filtered_tilts(physics, images, 0.0, 1.0).images[:, None], ANGLES, volume.shape)
    inner, expected = (slice(None), slice(None), slice(12, 36)), wbp(physics, images)
    assert (sums[0] - expected)[inner].norm() <= 0.05 * expected[inner].norm()
    assert seen[8, 4, 24] == len(ANGLES)


def test_pooling_interpolates_at_the_projection_of_the_voxel(generator):
    angles = torch.tensor([-50.0, 3.0, 41.0], dtype=torch.float64)
    features = torch.randn(3, 2, 4, 9, generator=generator, dtype=torch.float64)
    sums, seen = pooled(features, angles, (5, 4, 7))
    for z, y, x in [(0, 1, 6), (4, 3, 0), (2, 0, 3)]:
        total, count = torch.zeros(2, dtype=torch.float64), 0.0
        for image, angle in zip(features, torch.deg2rad(angles), strict=True):
            u = float((x - 3) * angle.cos() + (z - 2) * angle.sin()) + 4
            for place, share in ((int(u // 1), 1 - u % 1), (int(u // 1) + 1, u % 1)):
                if 0 <= place < 9:
                    total += share * image[:, y, place]
                    count += share
        assert torch.allclose(sums[:, z, y, x], total, atol=1e-12)
        assert float(seen[z, y, x]) == pytest.approx(count)


def test_the_noise_it_is_told_of_is_that_of_the_back_projection(generator):
    physics = TiltProjection(ANGLES, (9, 64, 64))
    images = 2 * torch.randn(len(ANGLES), 64, 64, generator=generator)
    tilts = filtered_tilts(physics, images, 4.0, 1.0)
    assert torch.allclose(tilts.images[..., 16:48].std((1, 2)), tilts.noise, rtol=0.1)
    # a tilted image has wider pixels in the volume's frame, never less noise
    assert wbp(physics, images)[:, :, 16:48].std() == pytest.approx(float(tilts.noise.square().sum().sqrt()), rel=0.15)


def test_the_order_of_the_tilts_does_not_matter(generator):
    shape = (8, 12, 16)
    images = torch.randn(len(ANGLES), *shape[1:], generator=generator, dtype=torch.float64)
    noise = 0.1 + torch.rand(len(ANGLES), generator=generator, dtype=torch.float64)
    network, order = awake(generator, torch.float64), torch.randperm(len(ANGLES), generator=generator)
    angles = ANGLES.double()
    one = local(TiltProjection(angles, shape), images, network, noise=noise)
    other = local(TiltProjection(angles[order], shape), images[order], network, noise=noise[order])
    tolerance = 1e-5  # that least squares is solved to
    assert (one.volume - other.volume).abs().max() <= tolerance * one.volume.abs().max()
    assert (one.std - other.std).abs().max() <= tolerance * one.std.abs().max()


@pytest.mark.parametrize("n_rows", [95, 120])
def test_blocks_give_what_the_whole_gives(generator, n_rows):
    shape = (6, n_rows, 9)
    physics = TiltProjection(ANGLES[::4], shape)
    images = torch.randn(len(ANGLES[::4]), *shape[1:], generator=generator)
    network = awake(generator, features=2, width=8)
    whole = local(physics, images, network, noise=0.5, rows=n_rows)
    blocks = local(physics, images, network, noise=0.5, rows=14)
    assert (whole.volume - blocks.volume).abs().max() <= 1e-5 * whole.volume.abs().max()
    assert (whole.std - blocks.std).abs().max() <= 1e-5 * whole.std.abs().max()


def test_any_number_of_tilts_and_a_batch(generator):
    shape, network = (6, 8, 10), awake(generator)
    for n_tilts in (1, 2, 7):
        angles = torch.linspace(-40, 50, n_tilts) if n_tilts > 1 else torch.tensor([10.0])
        physics = TiltProjection(angles, shape)
        images = torch.randn(2, 1, n_tilts, *shape[1:], generator=generator)
        both = local(physics, images, network, noise=1.0)
        assert both.volume.shape == both.std.shape == (2, 1, *shape)
        assert torch.isfinite(both.volume).all()
        assert (both.std > 0).all()
        assert torch.equal(both.volume[1, 0], local(physics, images[1, 0], network, noise=1.0).volume)


def test_angles_of_each_item(generator):
    shape, network = (6, 8, 10), awake(generator)
    angles = torch.stack([ANGLES[::4], ANGLES[::4] * 0.8])
    images = torch.randn(2, 1, angles.shape[1], *shape[1:], generator=generator)
    physics = TiltProjection(angles[0], shape)
    physics.update_parameters(angles=angles)
    both = local(physics, images, network, noise=1.0).volume
    second = local(TiltProjection(angles[1], shape), images[1, 0], network, noise=1.0).volume
    assert (both[1, 0] - second).abs().max() <= 1e-4 * second.abs().max()


def test_scale_of_the_operator_does_not_matter(generator):
    shape, network = (6, 8, 10), awake(generator, torch.float64)
    plain, unit = (TiltProjection(ANGLES.double(), shape, normalize=n) for n in (False, True))
    images = torch.randn(len(ANGLES), *shape[1:], generator=generator, dtype=torch.float64)
    one = local(plain, images, network, noise=0.3).volume
    other = local(unit, images / unit.scale, network, noise=0.3 / unit.scale**2).volume
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()  # that least squares is solved to


def test_gradients_are_those_of_differences(generator):
    network = awake(generator, torch.float64, features=2, width=4).requires_grad_(True)
    volumes = [torch.randn(8, 8, 10, generator=generator)]
    shown = example(volumes, LocalPlan(crop=8), 0)
    shown = shown._replace(images=shown.images.double(), truth=shown.truth.double())
    local_loss(network, shown).backward()
    # the part of the loss for the variance holds the mean fixed: take weights that only make the variance
    bias, step = network.leave.bias, 1e-5
    assert bias is not None and bias.grad is not None
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[8:16] += sign * step  # of the eight voxels' variances
            values.append(float(local_loss(network, shown)))
            bias[8:16] -= sign * step
    assert float(bias.grad[8:16].sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_pooling_gradient(generator):
    features = torch.randn(3, 2, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.tensor([-50.0, 3.0, 41.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: pooled(f, angles, (3, 2, 4))[0], features)


def test_a_few_steps_of_training_lower_the_loss_and_can_be_resumed(generator, tmp_path):
    volumes = [blobs(generator, (12, 12, 24), 8)]
    plan = LocalPlan(steps=16, crop=12, rate=3e-3, step=(8.0, 10.0))
    torch.manual_seed(0)
    fresh = LocalNetwork(features=2, width=8)
    start = {name: value.clone() for name, value in fresh.state_dict().items()}
    shown = [example(volumes, plan, 1000 + i) for i in range(4)]
    before = sum(float(local_loss(fresh, one).detach()) for one in shown)
    once = train_local(fresh, volumes, plan, state=tmp_path / "whole.safetensors")
    assert sum(float(local_loss(once, one)) for one in shown) < before - 0.2

    class StoppedError(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 7:
            raise StoppedError

    again = LocalNetwork(features=2, width=8)
    again.load_state_dict(start)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr("inverse.train._SAVED_EVERY", 5)
        train_local(again, volumes, plan, state=tmp_path / "state.safetensors", progress=stop)
    other = LocalNetwork(features=2, width=8)
    train_local(other, volumes, plan, state=tmp_path / "state.safetensors", resume=True)
    for name, value in once.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name
    with pytest.raises(FormatError, match="plan"):
        train_local(other, volumes, plan._replace(seed=1), state=tmp_path / "state.safetensors", resume=True)


def test_what_does_not_fit_is_refused(generator):
    network, images = LocalNetwork(features=2, width=8), torch.randn(3, 8, 10, generator=generator)
    angles = [-10.0, 0.0, 10.0]
    physics = TiltProjection(angles, (4, 8, 10))
    with pytest.raises(ValueError, match="noise: expected one variance or 3"):
        local(physics, images, network, noise=torch.ones(4))
    with pytest.raises(ValueError, match="noise: expected variances of zero or more"):
        local(physics, images, network, noise=-1.0)
    with pytest.raises(ValueError, match="camera grid"):
        local(TiltProjection(angles, (4, 8, 10), grid="stretched"), images, network, noise=1.0)
    with pytest.raises(ValueError, match="rows of the volume"):
        local(TiltProjection(angles, (4, 9, 10), (8, 10)), images, network, noise=1.0)
    with pytest.raises(ValueError, match="one row or more"):
        local(physics, images, network, noise=1.0, rows=0)
    with pytest.raises(ValueError, match="8 voxels"):
        train_local(network, [torch.zeros(4, 9, 9)], LocalPlan())


def test_ramp_of_a_single_tilt_is_the_whole_circle():
    assert angular_shares(torch.tensor([12.0])).item() == pytest.approx(torch.pi)
    uneven = angular_shares(torch.tensor([0.0, 20.0, 10.0, 25.0]))
    assert torch.allclose(torch.rad2deg(uneven), torch.tensor([10.0, 7.5, 10.0, 5.0]), atol=1e-4)
    flat = ramp_filtered(torch.ones(1, 2, 64, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert flat[..., 24:40].abs().max() < 0.02  # of a wide slab the ramp leaves its edges
